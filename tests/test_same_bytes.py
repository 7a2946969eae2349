"""--memory and --threads: what is held at once may change, results may not; a run keeps its count of threads.

Blocks are made so small here that even tiny models have many: what their size decides is seen.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import moesaic.recipes.prune as prune_module
import moesaic.stream.experts as experts_module
import moesaic.stream.layer as layer_module
from moesaic.cli import main, parsed
from moesaic.cli.base.search import recipe
from moesaic.resources import THREADS

BLOCK = 24 << 10


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    words = rng.permutation(["the", "sum", "of", "all", "parts", "is", "less", "def", "x", "return"] * 500)
    (folder / "prose.txt").write_text("\n".join(" ".join(line) for line in words.reshape(-1, 8)))
    return ["--data", str(folder), "--tokens", "256", "--length", "64", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make(tmp_path_factory.mktemp("same") / "model", "minimax_m3_vl"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)} {name}": t for f in files for name, t in load_file(f).items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys() and a
    return [name for name in a if not a[name].view(-1).view(torch.uint8).equal(b[name].view(-1).view(torch.uint8))]


def made(model: str, text: list[str], out: Path, *words: str) -> dict[str, torch.Tensor]:
    """Statistics, and matrices rounded by GPTQ, as the command line makes them."""
    assert main(["calibrate", model, str(out / "run"), *text, *words]) == 0
    rounding = ["--format", "int8_channel", "--rounding", "gptq", "--no-verify"]
    assert main(["quantize", model, str(out / "export"), *rounding, *text, *words]) == 0
    return tensors(out)


def test_memory_changes_no_byte_and_the_size_of_a_block_does(model, text, tmp_path, monkeypatch) -> None:
    """The second says that the first can fail: were blocks cut by memory, other bytes would come."""
    monkeypatch.setattr(layer_module, "standard_block_bytes", lambda device: BLOCK)
    passes, real = [], experts_module.spans
    monkeypatch.setattr(experts_module, "spans", lambda *a: passes.append(len(list(real(*a)))) or real(*a))
    little = made(model, text, tmp_path / "little", "--memory", "300MB", "--threads", "1")
    assert max(passes) > 3, "an expert's tokens come in many blocks"
    much = made(model, text, tmp_path / "much", "--memory", "64GB", "--threads", "1")
    assert differing(little, much) == []
    monkeypatch.setattr(layer_module, "standard_block_bytes", lambda device: 64 * BLOCK)
    other = differing(little, made(model, text, tmp_path / "other", "--threads", "1"))
    assert any(name.startswith("run/stats") for name in other) and any(name.startswith("export") for name in other)


def test_a_run_goes_on_with_its_own_count_of_threads(model, text, tmp_path, capsys) -> None:
    run, before = tmp_path / "run", torch.get_num_threads()
    assert main(["calibrate", model, str(run), *text, "--threads", "2"]) == 0
    assert json.loads((run / THREADS).read_text())["threads"] == 2
    assert main(["calibrate", model, str(run), *text]) == 0 and torch.get_num_threads() == before
    capsys.readouterr()
    assert main(["calibrate", model, str(run), *text, "--threads", "1"]) == 2
    told = capsys.readouterr().err
    assert f"{run} was begun with 2 threads, and this would be 1" in told and "give --threads 2" in told
    out = tmp_path / "out"
    words = ["prune", model, str(out), "--experts", "4", "--run", str(run), *text, "--no-verify"]
    assert main([*words, "--threads", "1"]) == 2 and not out.exists()
    assert main(words) == 0
    assert json.loads((out / "moesaic" / THREADS).read_text())["threads"] == 2


def test_half_of_memory_is_for_hidden_states_side_by_side(model, text, tmp_path, monkeypatch) -> None:
    """In previews by their own call, in prices by what the search is told."""
    told, real = [], prune_module.preview

    def heard(source, cuts, trial, *rest):
        told.append(trial.memory_bytes)
        return real(source, cuts, trial, *rest)

    monkeypatch.setattr(prune_module, "preview", heard)
    words = ["prune", model, str(tmp_path / "out"), "--experts", "4", *text]
    assert main([*words, "--preview", "--memory", "300MB"]) == 0
    assert main([*words, "--criterion", "auto", "--memory", "400MB", "--no-verify"]) == 0
    for options, wanted in ((["--memory", "1GB"], 500_000_000), ([], None)):
        _, a = parsed(["measure", model, str(tmp_path / "run"), *text, *options])
        told.append(recipe(a).pricing.memory_bytes)
        assert told[-1] == wanted
    assert told[:2] == [150_000_000, 200_000_000]


@pytest.mark.parametrize("command", ["calibrate", "quantize", "prune", "compress", "measure", "evaluate"])
def test_memory_below_what_one_block_needs_is_refused_in_a_sentence(model, text, tmp_path, capsys, command) -> None:
    options = {
        "quantize": ["--format", "int4_g32", "--rounding", "gptq"],
        "prune": ["--experts", "4"],
        "compress": ["--experts", "4"],
    }
    words = [command, model, *(["--against", model, "--out"] if command == "evaluate" else []), str(tmp_path / "out")]
    assert main([*words, *options.get(command, []), *text, "--memory", "200MB"]) == 2
    told = capsys.readouterr().err
    assert "--memory is 0.20 GB" in told and "needs 0.2" in told and "give more" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()
