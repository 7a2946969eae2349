"""Roundings that look at data, from the command line to the page: rendered, written, verified, continued, told.

What each rounding and the rendering do is test_rounding.py's and test_sequential.py's; here is that a user gets it.
"""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from children import child, contents, dying

from moesaic.allocate import stored_bytes
from moesaic.artifact import read_json
from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.data.corpus import Corpus
from moesaic.plan import Plan, overlay
from moesaic.recipes.quantize import Quantizing, quantize
from moesaic.verify import verify


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = (f"{a} and {b} make {a + b}, said {c}" for a, b, c in rng.integers(0, 10**6, (1500, 3)))
    (folder / "sums.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("make") / "model", "minimax_m2", layers=1, experts=4))


def rounded(model: Checkpoint, out: Path, data: Path | None, rounding: str) -> dict[str, object]:
    corpus = Corpus(data, tokens=256, length=64)
    return quantize(model.path, out, Quantizing("int4_g32", rounding=rounding), quiet=True, corpus=corpus)


@pytest.mark.parametrize("rounding, informed", [("gptq", "gptq"), ("search", "weighted")])
def test_data_is_used_where_there_is_some(model, data, tmp_path, rounding, informed) -> None:
    facts = rounded(model, tmp_path / "out", data, rounding)
    assert facts["rounding"] == Plan.load(tmp_path / "out" / "moesaic" / "plan.json").rounding == informed
    matrices = sum(n.role == "experts" for n in model.architecture.linears)
    assert facts["rendered"]["groups"] == 2 * matrices / 3 and facts["rendered"]["tokens"] == 256
    assert facts["verified"]["overlay"] == 3 * matrices and facts["verified"].get("codes", 0) == 0


def test_without_data_search_reads_none(model, tmp_path) -> None:
    facts = rounded(model, tmp_path / "out", None, "search")
    assert facts["rounding"] == "search" and facts["rendered"] is None and facts["verified"]["codes"] > 0
    assert [f.name for f in (tmp_path / "out" / "moesaic").iterdir() if f.suffix != ".json"] == []


def test_what_was_rounded_on_text_is_told_from_anything_else(model, data, tmp_path) -> None:
    rounded(model, tmp_path / "out", data, "gptq")
    out, result = tmp_path / "out", Checkpoint.open(tmp_path / "out")
    assert sorted(f.name for f in (out / "moesaic" / "rendered").iterdir()) == ["overlay.json"], (
        "or the disk is held twice"
    )
    assert verify(out, model, quiet=True).holds
    name = result.architecture.experts_of[0, 2]["up"].name
    where = result.where(f"{name}.weight_packed")
    with open(out / where.file, "r+b") as f:
        f.seek(where.offset + 5)
        byte = f.read(1)[0]
        f.seek(where.offset + 5)
        f.write(bytes([byte ^ 1]))
    finding, digest = verify(out, model, quiet=True).findings
    assert finding.check == "overlay" and finding.where == name
    assert digest.check == "digest" and digest.where == f"{name}.weight_packed"
    plan = Plan.load(out / "moesaic" / "plan.json")
    replace(plan, overlays={}).save(out / "moesaic" / "plan.json", {"source": model.identity})
    (out / "moesaic" / "digests.json").unlink()
    verdict = verify(out, model, quiet=True)  # then, in an old export, nothing tells, and that is said
    assert verdict.holds and verdict.compared["near"] > 0 and not verdict.compared["overlay"]


def test_after_any_death_the_same_call_finishes_the_same_folder(model, data, tmp_path) -> None:
    def work(out: Path = tmp_path / "parts") -> None:
        rounded(model, out, data, "gptq")

    work(tmp_path / "whole")
    for at in (10, 60):
        assert child(dying(work, at, signal.SIGKILL)) == -signal.SIGKILL
    work()
    shards = {f: f.stat().st_mtime_ns for f in (tmp_path / "parts").glob("*.safetensors")}
    work()
    assert {f: f.stat().st_mtime_ns for f in shards} == shards, "whole: nothing is rendered or written again"
    for file in [*shards, tmp_path / "parts" / "config.json"]:
        file.unlink()  # the export is gone, and with it what was rendered
    work()
    whole, parts = (contents(tmp_path / name / "moesaic" / "rendered") for name in ("whole", "parts"))
    assert whole == parts
    assert {n: b for n, b in contents(tmp_path / "whole").items() if n.endswith("safetensors")} == {
        n: b for n, b in contents(tmp_path / "parts").items() if n.endswith("safetensors")
    }


def test_compress_within_a_budget_is_rounded_on_text(model, data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("moesaic.recipes.compress.CHOICE_TOKENS", 128)
    run = tmp_path / "run"
    call = ["compress", str(model.path), str(run), "--bits", "7", "--rounding", "gptq", "--data", str(data)]
    call += ["--experts", str(model.architecture.experts), "--formats", "source,int4_g32,int2_g32"]
    call += ["--tokens", "256", "--length", "64", "--evaluation-tokens", "256", "--quiet"]
    assert main(call) == 0
    told = capsys.readouterr().out
    plan, facts = Plan.load(run / "plan.json"), overlay.listing(run / "rendered")
    assert plan.rounding == facts["rounding"] == "gptq" and "before it was written, by rtn" in told
    assert f"rounded  {facts['groups']:,} groups of matrices by gptq on 256 tokens" in told
    assert read_json(run / "verify.json", "verify")["compared"]["overlay"] > 0
    assert "GPTQ" in (run / "report.html").read_text()
    assert main(["verify", str(run / "model"), "--source", str(model.path), "--quiet"]) == 0
    assert "overlay" in capsys.readouterr().out
    before, tried = contents(run / "model"), read_json(run / "candidates.json", "candidates")
    assert tried["candidates"][tried["ships"]]["bytes"] == stored_bytes(run / "model"), "digests count too"
    assert main(call) == 0 and contents(run / "model") == before
