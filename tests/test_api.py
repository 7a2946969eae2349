"""moesaic from Python: what the command line makes, to the byte; progress by calls, and not a word printed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import moesaic
from moesaic import api
from moesaic.cli import main
from moesaic.errors import CheckpointError, StaleError

ROOT = Path(moesaic.__file__).parents[1]


def written(folder: Path) -> Path:
    folder.mkdir()
    words = np.random.default_rng(0).choice(["the", "sum", "of", "all", "parts", "is", "less", "def", "return"], 40_000)
    (folder / "prose.txt").write_text("\n".join(" ".join(line) for line in words.reshape(-1, 8)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("api") / "texts")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("api") / "model", "minimax_m3_vl")


@pytest.fixture
def text(data: Path) -> moesaic.Corpus:
    return moesaic.Corpus(data=data, tokens=384, length=48)


@pytest.fixture
def call(data: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The command line on the same text."""

    def run(*words: str | Path) -> Any:
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def words_of(data: Path) -> list[str]:
    return ["--data", str(data), "--tokens", "384", "--length", "48", "--quiet"]


def shards(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.glob("*") if f.suffix in (".safetensors", ".json")}


# What is imported ---------------------------------------------------------------------------------------------------


def test_importing_is_quick_and_loads_nothing_heavy():
    code = "import sys, moesaic; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    modules = set(out.stdout.split())
    assert {m for m in modules if m.startswith("moesaic")} == {"moesaic"} and not modules & {"torch", "numpy", "rich"}


def test_what_is_offered_is_api_s():
    assert sorted(moesaic.__all__) == sorted(api.__all__) and set(moesaic.__all__) <= set(dir(moesaic))
    assert all(getattr(moesaic, name) is getattr(api, name) for name in moesaic.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shut'"):
        moesaic.shut  # noqa: B018


# The same as on the command line ------------------------------------------------------------------------------------


def test_inspect_and_fit(path, call):
    model = moesaic.open(path)
    assert json.loads(json.dumps(model.inspect())) == call("inspect", path)
    assert model.inspect(base=path)["kept"] == {"1": list(range(8)), "2": list(range(8))}
    facts = model.fit("2x24GiB", context=1024, kv="fp8", concurrency=3)
    asked = ["--context", "1024", "--kv", "fp8", "--concurrency", "3"]
    said = call("fit", path, "--devices", "2x24GiB", *asked)
    del said["recommendation"]["command"], said["recommendation"]["search"]  # the next words of the command line
    assert json.loads(json.dumps(facts)) == said


def test_prune_and_evaluate(path, text, data, call, tmp_path, capsys):
    model = moesaic.open(path)
    facts = model.prune(tmp_path / "mine", moesaic.Pruning(experts=4), text)
    scores = moesaic.open(tmp_path / "mine").evaluate(path, corpus=text)
    assert capsys.readouterr().out == ""
    said = call("prune", path, tmp_path / "out", "--experts", "4", *words_of(data))
    assert shards(tmp_path / "mine") == shards(tmp_path / "out") and facts["verified"] == said["verified"]
    assert json.loads(json.dumps(facts["kept"])) == said["kept"]
    said = call("evaluate", tmp_path / "out", "--against", path, *words_of(data))
    kl = scores.find("kl_mean")
    assert kl is not None and kl.unit == "nats" and kl.value == said["scores"]["kl_mean"]["value"] > 0
    assert (tmp_path / "mine" / "moesaic" / "kld.txt").exists()


def test_quantize(path, text, data, call, tmp_path):
    asked = moesaic.Quantizing(format="int4_g32", rounding="gptq", rest="bf16")
    moesaic.open(path).quantize(tmp_path / "mine", asked, text)
    words = ["--format", "int4_g32", "--rounding", "gptq", "--rest", "bf16"]
    call("quantize", path, tmp_path / "out", *words, *words_of(data))
    assert shards(tmp_path / "mine") == shards(tmp_path / "out")


def test_compress_says_how_far_it_is_and_prints_nothing(path, text, tmp_path, capfd):
    steps: list[moesaic.Step] = []
    recipe = moesaic.Recipe(offer=moesaic.Offer(experts=4), format="mxfp4", evaluation_tokens=384)
    facts = moesaic.open(path, progress=steps.append).compress(tmp_path / "run", recipe, text)
    out, err = capfd.readouterr()
    assert out == "" and [line for line in err.splitlines() if "[transformers]" not in line] == []
    assert facts["bytes"] < facts["source_bytes"] and (tmp_path / "run" / "report.html").exists()
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages == ["calibrate", "export", "verify", "evaluate"]
    for stage in stages:
        mine = [step for step in steps if step.stage == stage]
        assert [s.done for s in mine] == sorted(s.done for s in mine) and mine[0].done == 0 < mine[-1].done
        assert mine[-1].done == mine[-1].total and mine[0].seconds_left is None and mine[-1].seconds_left is not None


def test_devices_are_a_goal_alike(path, data, call, tmp_path):
    """`compress` and `--devices` find one limit; here it is refused before any text is read."""
    with pytest.raises(moesaic.InputError, match="have no room for weights") as refused:
        moesaic.open(path).compress(tmp_path / "run", moesaic.Recipe(devices="1x1GiB", context=1024))
    assert main(["compress", str(path), str(tmp_path / "run"), "--devices", "1x1GiB", "--context", "1024"]) == 2
    assert not (tmp_path / "run").exists() and str(refused.value)


# Interrupted, and refused -------------------------------------------------------------------------------------------


def test_an_exception_from_progress_ends_a_call_that_the_next_one_continues(path, text, tmp_path):
    class StopError(Exception):
        pass

    def stop(step: moesaic.Step) -> None:
        if step.stage == "verify":
            raise StopError

    asked, out = moesaic.Pruning(experts=4), tmp_path / "out"
    with pytest.raises(StopError):
        moesaic.open(path, progress=stop).prune(out, asked, text)
    steps: list[moesaic.Step] = []
    moesaic.open(path, progress=steps.append).prune(out, asked, text)
    assert {step.stage for step in steps} == {"export", "verify"}, "statistics are there"


def test_threads_and_memory_are_those_of_the_command_line(path, text, tmp_path):
    asked, out = moesaic.Pruning(experts=4, check=False), tmp_path / "out"
    with pytest.raises(moesaic.InputError, match=r"a sweep of 384 tokens needs .* give more"):
        moesaic.open(path, memory_bytes=1000).prune(out, asked, text)
    assert not out.exists()
    moesaic.open(path, threads=2).prune(out, asked, text)
    assert json.loads((out / "moesaic" / "threads.json").read_text())["threads"] == 2
    with pytest.raises(StaleError, match="was begun with 2 threads"):
        moesaic.open(path, threads=1).prune(out, asked, text)


def test_what_is_wrong_is_an_error_of_one_sentence(path, tmp_path):
    with pytest.raises(moesaic.MoesaicError, match=r"has no config\.json") as caught:
        moesaic.open(tmp_path)
    assert isinstance(caught.value, CheckpointError) and isinstance(caught.value, moesaic.InputError)
    model = moesaic.open(path)
    with pytest.raises(moesaic.InputError, match="names no device"):
        model.fit("two large ones")
    with pytest.raises(moesaic.InputError, match="unknown score 'beauty'"):
        model.evaluate(path, moesaic.Evaluating(scores=("beauty",)))
    with pytest.raises(moesaic.InputError, match="no score was asked for"):
        model.evaluate(path, moesaic.Evaluating(scores=()), out=tmp_path / "scores")
    with pytest.raises(moesaic.InputError, match="no goal was given"):
        model.compress(tmp_path / "run", moesaic.Recipe())


# What README shows --------------------------------------------------------------------------------------------------


def test_the_example_in_readme_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    tiny.make(tmp_path / "MiniMax-M3-MXFP8", "minimax_m3_vl", experts=128, top_k=4)
    written(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"KL 0\.\d+ ± 0\.\d+ nats", out[-1]), out
