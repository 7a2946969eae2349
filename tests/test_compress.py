"""The whole path on small models, as a user gives it on the command line: what it leaves, what it says, and that it continues."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from children import child, contents, dying
from forward import final

from moesaic.allocate import Offer, stored_bytes
from moesaic.calibrate import calibrate
from moesaic.calibrate.selection import Ranking, select_experts
from moesaic.calibrate.until_stable import calibrate_until_stable
from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.data.corpus import Corpus
from moesaic.errors import InputError
from moesaic.evaluate import Reading, Scores, evaluate
from moesaic.export import export
from moesaic.measure import Trial
from moesaic.measure.divergence import Bootstrap, against
from moesaic.measure.preview import candidates, preview
from moesaic.plan import Plan
from moesaic.recipes.compress import Recipe, select, settled_by
from moesaic.stream import LayerRun, State
from moesaic.verify import verify

FAMILIES = ("minimax_m2", "minimax_m3_vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of text, every line its own."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for domain in ("sums", "words"):
        lines = (f"{domain} {a} and {b} make {a + b}, said {c}" for a, b, c in rng.integers(0, 10**6, (1500, 3)))
        (folder / f"{domain}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny.make(tmp_path / "model", request.param))


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The JSON object that a command printed last."""
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_compress_prunes_rounds_verifies_measures_and_reports(
    model: Checkpoint, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, keep = tmp_path / "run", model.architecture.experts // 2
    call = ["compress", str(model.path), str(run), "--experts", str(keep), "--format", "mxfp4", "--data", str(data)]
    call += ["--tokens", "512", "--length", "64", "--evaluation-tokens", "384", "--json", "--quiet"]
    assert main(call) == 0
    facts = said(capsys)
    result = Checkpoint.open(run / "model")
    assert result.architecture.experts == facts["experts"] == keep
    assert facts["bytes"] == sum(t.bytes for t in result.inventory) < facts["source_bytes"]
    assert {f for n, f in result.formats.items() if result.architecture.by_name[n].role == "experts"} == {"mxfp4"}
    assert verify(run / "model", model, quiet=True).holds
    scores = Scores.read(run / "scores.json")
    kl = scores.find("kl_mean")
    assert kl is not None and kl.value is not None and kl.value > 0 and facts["scores"]["kl_mean"]["value"] == kl.value
    assert "<svg" in (run / "report.html").read_text()
    before = {f: f.stat().st_mtime_ns for f in (run / "model").rglob("*.safetensors")}
    monkeypatch.setattr("moesaic.evaluate.lockstep", lambda *_, **__: pytest.fail("the evaluation was done"))
    assert main(call) == 0, "the same call continues, and finds all done"
    assert said(capsys)["scores"] == facts["scores"]
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_experts_are_ranked_by_the_domains_named_and_by_as_much_text_as_it_takes(m2, data, tmp_path) -> None:
    (tmp_path / "text").mkdir()
    for file in data.iterdir():
        (tmp_path / "text" / file.name).write_text("\n".join(file.read_text().splitlines()[:30]))
    corpus, shares = Corpus(tmp_path / "text", tokens=96, length=48), {"words": 1.0}
    ranking = Ranking(domains=shares, until_stable=True)
    recipe = Recipe(ranking, Offer(5))
    found = select(m2, tmp_path / "run", recipe, corpus, True)
    settled = calibrate_until_stable(m2, corpus, tmp_path / "other", [5], Ranking(domains=shares), quiet=True)
    assert found is not None and found.cut == select_experts(settled.statistics, "reap", 5, domains=shares).cut
    assert found.domains == {"sums": 0.0, "words": 1.0} and found.tokens == settled.statistics.tokens > 96
    assert settled_by(tmp_path / "run") == settled.verdict and settled_by(tmp_path) is None
    assert recipe.setting(m2, tmp_path, True).ranking == ranking
    with pytest.raises(InputError, match="unknown domain 'law'"):
        select(m2, tmp_path / "run", Recipe(Ranking(domains={"law": 1.0}), Offer(5)), corpus, True)


@pytest.mark.long
def test_a_size_is_kept_to_however_often_the_command_is_killed(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    """Killed and interrupted by turns, a few writes further each time, the same command comes to the same model."""
    harm = {"minimax_m2": "anchored", "minimax_m3_vl": "measured"}[model.family.name]
    whole = sum(t.bytes for t in model.inventory)

    def call(run: Path) -> int:
        words = [
            "compress",
            str(model.path),
            str(run),
            "--fit",
            f"{int(0.7 * whole)}B",
            "--harm",
            harm,
            "--data",
            str(data),
        ]
        words += ["--formats", "source,mxfp4,int3_g64,int2_g64", "--tokens", "512", "--length", "64"]
        return main([*words, "--evaluation-tokens", "384", "--quiet"])

    def work() -> None:
        if call(tmp_path / "cut"):
            raise InputError("the command did not end well")

    assert call(tmp_path / "whole") == 0
    codes: set[int] = set()
    for i in range(100):
        codes.add(code := child(dying(work, 10 * (i + 1), (signal.SIGKILL, signal.SIGINT)[i % 2])))
        if code == 0:
            break
    assert codes == {0, -9, 2}, "2: interrupted, which the command itself says by 130"
    assert contents(tmp_path / "cut" / "model") == contents(tmp_path / "whole" / "model")
    assert stored_bytes(tmp_path / "cut" / "model") <= int(0.7 * whole)
    assert not list((tmp_path / "cut").rglob("*.partial"))
    for file in ("costs.json", "rule.json", "frontier.json", "candidates.json", "plan.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_refused_in_the_first_second(model: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = model.architecture.top_k - 1
    for options, sentence in (
        (["--experts", str(few)], f"asked to keep {few} experts"),
        (["--format", "int7"], "unknown format 'int7'"),
        (["--to", "zip"], "unknown container 'zip'"),
        ([], "no goal was given, so the result would be a copy of the model; name one: --fit 90GB"),
        (["--to", "mlx"], "no goal was given"),
        (["--experts", str(model.architecture.experts)], "no goal was given"),
    ):
        assert main(["compress", str(model.path), str(tmp_path / "run"), *options]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_preview_is_what_the_pruned_model_costs(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    """Masked logits are the pruned model's: the figure before a byte is written is the figure afterwards."""
    corpus = Corpus(data, tokens=512, length=64)
    statistics = calibrate(model, corpus.calibration(model, tmp_path / "t.safetensors"), tmp_path / "stats", quiet=True)
    rows = corpus.evaluation(model, tmp_path / "e.safetensors")
    keep = model.architecture.experts // 2
    found = candidates(statistics, [keep], ("reap", "frequency"), seeds=1)
    outlooks = preview(model, found, Trial(rows, quiet=True), tmp_path / "preview")
    assert [o.kl_nats.value for o in outlooks] == sorted(o.kl_nats.value for o in outlooks)
    assert {o.candidate.criterion for o in outlooks} == {"reap", "frequency", "random 0"}
    for o in outlooks:
        assert o.tokens == rows.rows * (rows.ids_BT.shape[1] - 1) and o.nonfinite == 0
        assert 0 < o.overlap.value < 1 and o.kl_nats.value > 0
    best = outlooks[0]
    pruned = export(model, Plan(model.container.name, best.candidate.kept), tmp_path / "out", quiet=True)
    scores = evaluate(model, pruned, [Reading.of(rows)], tmp_path / "scores", quiet=True)
    kl, top = scores.find("kl_mean"), scores.find("top1_agreement")
    assert kl is not None and top is not None
    assert best.kl_nats.value == pytest.approx(kl.value, rel=1e-4)
    assert best.top1.value == pytest.approx(top.value, abs=2e-3)


def test_overlap_is_one_less_total_variation(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    rows = Corpus(data, tokens=128, length=64).evaluation(model, tmp_path / "e.safetensors")
    run, hidden_BTD = swept(model, rows.ids_BT)
    noisy_BTD = hidden_BTD + 0.1 * torch.randn(hidden_BTD.shape, generator=torch.manual_seed(0))
    (divergence,) = against(run, hidden_BTD, [noisy_BTD], rows.ids_BT)
    p, q = (run.logits(h[:, :-1].flatten(0, 1)).double().softmax(-1) for h in (hidden_BTD, noisy_BTD))
    wanted = float(torch.minimum(p, q).sum(-1).mean())
    assert Bootstrap(divergence).mean(divergence["overlap"]).value == pytest.approx(wanted, rel=1e-6)
    kl = float((p * (p.log() - q.log())).sum(-1).mean())
    assert Bootstrap(divergence).mean(divergence["kl_nats"]).value == pytest.approx(kl, rel=1e-5)


def swept(model: Checkpoint, ids_BT: torch.Tensor) -> tuple[LayerRun, torch.Tensor]:
    run = LayerRun(model)
    (state,) = final(run, [State(run.embed(ids_BT))])
    return run, state.hidden_BTD


def test_text_to_judge_by_was_not_calibrated_on(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    corpus = Corpus(data, tokens=2048, length=64)
    first, second = corpus.calibration(model, tmp_path / "a"), corpus.evaluation(model, tmp_path / "b")
    assert second.shared_with(first) == 0 and first.shared_with(first) == first.tokens
    with pytest.raises(InputError, match="longer than the model's context"):
        Corpus(data, tokens=10**7, length=10**7).calibration(model, tmp_path / "c")


@pytest.mark.long
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "run"), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "46.0% saved" in text and "nats a token" in text and str(tmp_path / "run" / "report.html") in text
