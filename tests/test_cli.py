"""The command line: what it prints is what --json says, exit codes mean what they promise, and no call ends in a traceback.

Commands run in this process (or a fork of it, where they are interrupted); only --help, which must be
quick, is timed in one of its own.
"""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from children import contents, mend_threads

import moesaic
from moesaic import __version__
from moesaic.allocate import folder_bytes, stored_bytes
from moesaic.artifact import read_json
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.inspect import size
from moesaic.cli import COMMANDS, main, parser
from moesaic.data.corpus import TRYING_OUT
from moesaic.errors import FaultError, MoesaicError, PluginError
from moesaic.evaluate.repetition import probe
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.verify import verify

Told = tuple[dict[str, Any], str]  # facts of --json, and the text before them


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for domain in ("code", "prose"):
        words = rng.permutation(
            ["the", "sum", "of", "all", "parts", "is", "less", "than", "one", "whole", "def", "x", "return"] * 400
        ).reshape(-1, 8)
        (folder / f"{domain}.txt").write_text("\n".join(" ".join(line) for line in words))
    return folder


@pytest.fixture(scope="module")
def text(data: Path) -> list[str]:
    return ["--data", str(data), "--tokens", "384", "--length", "48"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("cli") / "model", "minimax_m3_vl")


@pytest.fixture(scope="module")
def smaller(model: Path, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model to look at."""
    out = tmp_path_factory.mktemp("smaller") / "out"
    assert main(["prune", str(model), str(out), "--experts", "4", "--quiet", *text]) == 0
    return out


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Run a command with --json and --quiet: standard output is one object, and what people read on standard error."""

    def run(*words: str | Path, code: int = 0) -> Told:
        capsys.readouterr()
        assert main([*map(str, words), "--json", "--quiet"]) == code
        out, err = capsys.readouterr()
        facts = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        return facts, "\n".join(line for line in err.splitlines() if not line.startswith("[transformers]"))

    return run


# What is printed --------------------------------------------------------------------------------------------------


def test_inspect(tell, model, smaller):
    facts, text = tell("inspect", model)
    assert f"{facts['tensors']:,} tensors, {facts['bytes']:,} bytes" in text and f"{facts['experts']} experts" in text
    facts, text = tell("inspect", smaller, "--base", model)
    kept = json.loads((smaller / "moesaic" / "prune.json").read_text())["kept"]
    assert facts["kept"] == kept
    for layer, ids in kept.items():
        assert f"layer {layer} kept experts {' '.join(map(str, ids))}" in text


def test_prune(tell, model, text, tmp_path):
    facts, said = tell("prune", model, tmp_path / "out", "--experts", 5, "--criterion", "mass", *text)
    assert "kept 5 of 8 experts in 2 layers by mass on 384 tokens" in said
    for layer, margin in facts["margins"].items():
        assert f"layer {layer:>3}  margin {margin:7.2%}  halves agree {facts['jaccard'][layer]:4.0%}" in said
    assert f"{size(facts['source_bytes'])} -> {size(facts['bytes'])}" in said and f"in {tmp_path / 'out'}" in said
    assert all(f"note: {warning}" in said for warning in facts["warnings"])
    assert facts["bytes"] == sum(s.info.bytes for s in Checkpoint.open(tmp_path / "out").stored.values())


def test_preview_and_domains(tell, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.recipes.prune.PREVIEW_TOKENS", 480)
    monkeypatch.setattr("moesaic.recipes.prune.probe", partial(probe, prompts=2, new_tokens=8))
    asked = ["prune", model, tmp_path / "out", "--experts", "5,3", "--preview", "--domains", "code=2,prose", *text]
    facts, said = tell(*asked, "--criterion", "ean", "--policy", "quota", "--loops")
    assert list(facts["loops"]) == ["source", "5 ean", "3 ean"] and said.count(" texts end in a loop") == 3
    assert [(c["experts"], c["criterion"]) for c in facts["candidates"]] == [(5, "ean"), (3, "ean")]
    assert f"{facts['candidates'][0]['kl_nats']['value']:.4f}" in said
    assert f"plot: {tmp_path / 'out' / 'moesaic' / 'preview.svg'}" in said.replace("\n", "")


def test_quantize(tell, model, tmp_path):
    facts, said = tell("quantize", model, tmp_path / "out", "--format", "mxfp4", "--rest", "bf16")
    assert f"{size(facts['source_bytes'])} -> {size(facts['bytes'])}" in said
    assert all(f"{check} × {count:,}" in said for check, count in facts["verified"].items())


def test_scale_search_is_a_name_for_a_rounding(tell, model, tmp_path):
    facts, _ = tell("quantize", model, tmp_path / "a", "--format", "nvfp4", "--scale-search")
    assert facts["rounding"] == "search"
    tell("quantize", model, tmp_path / "b", "--format", "nvfp4", "--rounding", "search")
    tell("quantize", model, tmp_path / "c", "--format", "nvfp4")
    a, b, c = (b"".join(f.read_bytes() for f in sorted((tmp_path / x).glob("*.safetensors"))) for x in "abc")
    assert a == b != c


def test_verify(tell, model, smaller, tmp_path):
    facts, said = tell("verify", smaller, "--source", model)
    assert facts["holds"] and facts["findings"] == [] and said.endswith(": all hold")
    assert all(f"{check} × {count:,}" in said for check, count in facts["compared"].items())
    broken = shutil.copytree(smaller, tmp_path / "broken")
    (broken / "LICENSE").unlink()
    (broken / "tokenizer.json").write_text("{}")
    facts, said = tell("verify", broken, "--source", model, code=1)
    assert not facts["holds"] and "all hold" not in said
    assert [f"FAIL  {f['check']}: {f['where']} {f['what']}" for f in facts["findings"]] == [
        line for line in said.splitlines() if line.startswith("FAIL")
    ]
    assert {f["what"] for f in facts["findings"] if f["check"] == "files"} >= {"was not carried along from the source"}
    alone, _ = tell("verify", broken, code=1)  # without a source, by the digests that it carries
    assert {f["where"] for f in alone["findings"]} == {"LICENSE", "tokenizer.json"}


def test_calibrate(tell, model, text, tmp_path):
    facts, said = tell("calibrate", model, tmp_path / "run", *text)
    assert facts["tokens"] == 384 and facts["domains"] == ["code", "prose"]
    assert "384 tokens of code, prose through 2 MoE layers" in said
    assert (
        f"fewer than 32 tokens: {len(facts['few_tokens'])}" in said
        and f"infinite values: {len(facts['nonfinite'])}" in said
    )


def test_calibrate_until_stable_and_prune_by_it(tell, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.data.corpus.POOL_TOKENS", 768)
    facts, said = tell("calibrate", model, tmp_path / "run", *text, "--until-stable", "--experts", "4")
    stability = facts["settled"]
    assert (
        facts["tokens"] == stability["read_tokens"]
        and stability["verdict"] in said
        and len(stability["steps"]) in (1, 2)
    )
    assert all(f"{step['tokens']:,}" in said and f"{step['jaccard']:.1%}" in said for step in stability["steps"])
    facts, _ = tell("prune", model, tmp_path / "out", "--experts", 4, "--run", tmp_path / "run")
    assert facts["calibration_tokens"] == stability["read_tokens"]


def test_evaluate(tell, model, smaller, text, tmp_path):
    facts, said = tell("evaluate", smaller, "--against", model, "--out", tmp_path, *text)
    kl, top = facts["scores"]["kl_mean"], facts["scores"]["top1_agreement"]
    assert kl["value"] > 0 and f"over {kl['tokens']:,} tokens in {kl['rows']} rows" in said
    assert f"top1_agreement {top['value']:.2f}" in " ".join(said.split()) and "activations engine" in said
    assert read_json(tmp_path / "scores.json", "scores")["command"].startswith("moesaic evaluate ")
    same, _ = tell("evaluate", model, "--against", model, "--out", tmp_path / "same", *text)
    assert same["scores"]["kl_mean"]["value"] == pytest.approx(0, abs=1e-7)


def test_evaluate_as_the_engine_rounds_and_no_other_way(tell, model, smaller, text, tmp_path):
    facts, said = tell("evaluate", smaller, "--against", model, "--out", tmp_path, "--activations", "engine", *text)
    assert facts["scores"]["kl_mean"]["value"] > 0 and "activations engine" in said
    assert next(iter(read_json(tmp_path / "scores.json", "scores")["activations"])) == "engine"
    assert (
        "Mean    KLD:" in (tmp_path / "kld.txt").read_text()
        and "not measured" not in (tmp_path / "kld.txt").read_text()
    )


def test_evaluate_tasks_alone(tell, model, smaller, tmp_path):
    pytest.importorskip("lm_eval")
    questions = [{"q": f"{i} and {i} is", "choices": [" one", " two"], "answer": i % 2} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    words = ["--scores", "tasks", "--tasks", "sums", "--task-files", tmp_path, "--out", tmp_path / "out"]
    facts, said = tell("evaluate", smaller, "--against", model, *words)
    assert facts["scores"]["task_acc_delta"]["rows"] == 8 and "sums: over" in said
    compared = read_json(tmp_path / "out" / "scores.json", "scores")["tasks"]["compared"]
    assert set(compared) == {"sums none", "sums engine"}


def test_compress_and_report(tell, model, text, tmp_path):
    run = tmp_path / "run"
    words = ["--experts", 4, "--format", "mxfp4", "--evaluation-tokens", 192, *text]
    facts, said = tell("compress", model, run, *words)
    assert (
        "experts  8 -> 4 in every layer" in said and f"{size(facts['source_bytes'])} -> {size(facts['bytes'])}" in said
    )
    assert verify(run / "model", Checkpoint.open(model), quiet=True).holds
    assert Path(facts["report"]).is_file() and facts["report"] in said
    again, said = tell("report", run)
    assert Path(again["report"]).is_file() and again["report"] in said


def test_measure_and_allocate_are_compress_stopped_early(tell, model, text, tmp_path):
    """One run folder: what one command found, the next only reads."""
    words = [model, tmp_path, "--harm", "surrogate", "--formats", "source,mxfp4,int2_g64", *text]
    facts, said = tell("measure", *words)
    assert facts["harm"] == "surrogate" and "surrogate on 384 tokens" in said and str(tmp_path / "costs.json") in said
    assert facts["totals"]["experts"]["int2_g64"] > facts["totals"]["experts"]["mxfp4"] > 0
    whole = sum(t.bytes for t in Checkpoint.open(model).inventory)
    written = (tmp_path / "costs.json").stat().st_mtime_ns
    facts, said = tell("allocate", *words, "--fit", f"{int(0.8 * whole)}B")
    assert (tmp_path / "costs.json").stat().st_mtime_ns == written
    best, curve = facts["best"], facts["curve"]
    assert best["bytes"] <= best["budget_bytes"] == int(0.8 * whole) and f"{best['bytes']:,} of" in said
    assert [row["bytes"] for row in curve] == sorted(row["bytes"] for row in curve)
    assert [row["predicted_nats"] for row in curve] == sorted((r["predicted_nats"] for r in curve), reverse=True)
    assert sum(row["knee"] for row in curve) == 1 and "<- knee" in said
    assert folder_bytes(Blueprint.of(Checkpoint.open(model), Plan.load(tmp_path / "plan.json"))) == best["bytes"]
    facts, said = tell("compress", *words, "--fit", f"{int(0.8 * whole)}B", "--evaluation-tokens", 192)
    assert (tmp_path / "costs.json").stat().st_mtime_ns == written
    assert facts["chosen"]["bytes"] == stored_bytes(tmp_path / "model") <= int(0.8 * whole)


def test_measure_by_what_the_weights_say(tell, model, text, tmp_path):
    words = ["--criterion", "aimer", "--harm", "surrogate", "--formats", "source,mxfp4", *text]
    facts, _ = tell("measure", model, tmp_path, *words)
    assert facts["totals"]["experts"]["mxfp4"] > 0


def test_fit_and_serve(tell, model, smaller):
    facts, said = tell("fit", model, "--devices", "1x24GiB", "--context", 1024)
    assert facts and said
    facts, said = tell("serve", smaller, "--devices", "1x24GiB", "--context", 1024, "--print", "command")
    assert facts["text"] in said and str(smaller) in facts["text"]


# Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_real_calls(command, capsys):
    """Each parses, as the command that it stands under; and --help shows it."""
    example = COMMANDS[command].example
    assert parser().parse_args(shlex.split(example)[1:]).command == command and example.startswith("moesaic ")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"example: {example}" in " ".join(capsys.readouterr().out.split())


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys\nfrom moesaic.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    print(*sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5, "seconds of CPU"
    assert not {"torch", "numpy", "transformers", "rich", "numba"} & set(out.split())
    assert all(command in out for command in COMMANDS)


# Wrong calls ------------------------------------------------------------------------------------------------------


WRONG: dict[str, tuple[list[str], str]] = {
    "no such model": (["inspect", "/nowhere"], "/nowhere has no config.json; name the folder of a model"),
    "a file for a model": (["inspect", __file__], "has no config.json"),
    "no such base": (["inspect", "MODEL", "--base", "/nowhere"], "/nowhere has no config.json"),
    "a stranger for a base": (["inspect", "MODEL", "--base", "OTHER"], "have different families, layers or widths"),
    "too few experts": (["prune", "MODEL", "OUT", "--experts", "1"], "asked to keep 1 experts; wanted at least 2"),
    "too many experts": (["prune", "MODEL", "OUT", "--experts", "8"], "fewer than the 8 there are"),
    "several counts": (["prune", "MODEL", "OUT", "--experts", "4,5"], "wanted one count, or --preview to compare several"),
    "no such criterion": (["prune", "MODEL", "OUT", "--experts", "4", "--criterion", "luck"], "unknown criterion 'luck'"),
    "no such policy": (["prune", "MODEL", "OUT", "--experts", "4", "--policy", "vote"], "unknown domain policy 'vote'"),
    "no such domain": (["prune", "MODEL", "OUT", "--experts", "4", "--tokens", "512", "--domains", "a"], "unknown domain 'a'"),
    "no statistics": (["prune", "MODEL", "OUT", "--experts", "4", "--run", "/nowhere"], "holds no statistics"),
    "no such text": (["prune", "MODEL", "OUT", "--experts", "4", "--data", "/nowhere"], "/nowhere is not a folder"),
    "loops of nothing": (["prune", "MODEL", "OUT", "--experts", "4", "--loops"], "give --preview too"),
    "text for a run": (["prune", "MODEL", "OUT", "--experts", "4", "--run", "R", "--until-stable"], "give one of them"),
    "a folder that is taken": (["prune", "MODEL", "OTHER", "--experts", "4"], "exists and was not written by moesaic"),
    "a file for a folder": (["prune", "MODEL", __file__, "--experts", "4"], "exists and was not written by moesaic"),
    "into the source": (["quantize", "MODEL", "MODEL", "--format", "mxfp4"], "lies in the source's own folder"),
    "no such format": (["quantize", "MODEL", "OUT", "--format", "mxfp5"], "unknown format 'mxfp5'; choose from"),
    "no such container": (["quantize", "MODEL", "OUT", "--format", "mxfp4", "--to", "zip"], "unknown container 'zip'"),
    "no such rounding": (["quantize", "MODEL", "OUT", "--format", "mxfp4", "--rounding", "up"], "unknown rounding 'up'"),
    "no export": (["verify", "MODEL", "--source", "MODEL"], "has no moesaic/plan.json"),
    "no source": (["verify", "MODEL", "--source", "/nowhere"], "/nowhere has no config.json"),
    "nothing to compare": (["evaluate", "MODEL", "--against", "/nowhere"], "/nowhere has no config.json"),
    "too little text": (["calibrate", "MODEL", "OUT", "--tokens", "10", "--length", "20"], "wanted at least one row"),
    "no run": (["report", "/nowhere"], "/nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_is_one_sentence_and_exit_2(model, m2, tmp_path, capsys, call):
    words, sentence = WRONG[call]
    places = {"MODEL": str(model), "OTHER": str(m2.path), "OUT": str(tmp_path / "out")}
    capsys.readouterr()
    assert main([places.get(w, w) for w in words]) == 2
    out, err = capsys.readouterr()
    assert out in ("", f"note     {TRYING_OUT}\n") and err.startswith(f"moesaic {words[0]}: ") and sentence in err
    assert err.count("\n") == 1 and "Traceback" not in err and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["prune", "a"],
        ["prune", "a", "b", "--experts", "few"],
        ["inspect", "a", "--colour"],
        ["quantize", "a", "b"],
        ["quantize", "a", "b", "--format", "nvfp4", "--rounding", "rtn", "--scale-search"],
    ],
)
def test_what_is_no_call_at_all_is_exit_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "usage: moesaic" in err and "Traceback" not in err


def test_errors_have_the_exit_codes_they_promise():
    codes = {error.__name__: error.exit_code for error in below(MoesaicError)}
    assert {codes.pop(name) for name in ("CheckError", "EngineError", "BusyError")} == {1}
    assert {codes.pop(name) for name in ("FaultError", "PluginError")} == {70}
    assert set(codes.values()) == {2}


def below(error: type[MoesaicError]) -> list[type[MoesaicError]]:
    return [error] + [deeper for child in error.__subclasses__() for deeper in below(child)]


# Ctrl-C -----------------------------------------------------------------------------------------------------------


def spawn(words: list[str], said: Path) -> int:
    """The command in a fork, its output in the file `said`; returns the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child is ready to be interrupted
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return pid
    code = 70
    try:
        mend_threads()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with open(said, "w", buffering=1) as file:
            sys.stdout = sys.stderr = file
            code = main(words)
    except KeyboardInterrupt:  # before the command had begun
        code = 130
    finally:
        os._exit(code)


def interrupted_when(sign: Callable[[], bool], pid: int) -> int:
    """Ctrl-C as soon as `sign` is seen; the exit code."""
    while not sign():
        if os.waitpid(pid, os.WNOHANG)[0]:
            pytest.fail("the command ended before it could be interrupted")
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_ctrl_c_from_outside_in_calibration_and_the_same_command_goes_on(model, text, tmp_path, tell):
    """As a user does it: the first layer's statistics are there, then Ctrl-C, then the same words again."""
    out, said, long = tmp_path / "out", tmp_path / "said", [*text[:-3], "4800", "--length", "48"]
    words = ["prune", str(model), str(out), "--experts", "4", "--quiet", *long]

    def in_the_next_layer() -> bool:  # a moment later: until it knows of the file, the layer is done again
        return any(time.time() - p.stat().st_mtime > 0.02 for p in out.rglob("001.safetensors"))

    code = interrupted_when(in_the_next_layer, spawn(words, said))
    assert code == 130 and "\nmoesaic prune: interrupted; run the same command again to continue\n" in said.read_text()
    assert "Traceback" not in said.read_text() and not list(out.rglob("*.partial"))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("001.safetensors")}
    tell(*words)
    assert before == {p: p.stat().st_mtime_ns for p in before}, "what was done is not done again"
    other = tmp_path / "other"
    tell("prune", model, other, "--experts", "4", *long)
    drop = {"moesaic/prune.json"}  # names the folder
    assert {k: v for k, v in contents(out).items() if k not in drop} == {
        k: v for k, v in contents(other).items() if k not in drop
    }


@pytest.mark.parametrize("command", ["verify", "quantize"])
def test_ctrl_c_at_once(model, smaller, tmp_path, command):
    """Wherever it strikes, nothing but that sentence is said."""
    words = {
        "verify": ["verify", str(smaller), "--source", str(model)],
        "quantize": ["quantize", str(model), str(tmp_path / "out"), "--format", "int4_g32", "--rest", "bf16"],
    }[command]
    said, codes = tmp_path / "said", []
    for wait in (0.0, 0.01, 0.03, 0.1):
        pid = spawn([*words, "--quiet"], said)
        time.sleep(wait)
        os.kill(pid, signal.SIGINT)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert codes[-1] in (0, 130) and (not said.exists() or "Traceback" not in said.read_text())
    assert 130 in codes
    assert main([*words, "--quiet"]) == 0


# Faults of ours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said", "has_traceback"),
    [
        (FaultError("3 options were not priced"), "3 options were not priced", False),
        (PluginError("b.py defines no Format"), "b.py defines no Format", False),
        (IndexError("list index\nout of range"), "IndexError: list index", True),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error", True),
    ],
)
@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_fault_of_ours_asks_to_be_reported(error, said, has_traceback, quiet, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("moesaic.checkpoint.inspect.inspect", fail)
    assert main(["inspect", "a model", *quiet]) == 70
    *before, last = capsys.readouterr().err.splitlines()
    line = shlex.join(["moesaic", "inspect", "a model", *quiet])
    asks = f"this is a fault of moesaic {__version__}, please report it with the command line: {line}"
    assert last == f"moesaic inspect: {said}; {asks}"
    assert bool(before) == has_traceback and (not before or before[0].startswith("Traceback"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "x"), "x does not exist; check the path"),
        (PermissionError(13, "Permission denied", "x"), "x cannot be used: Permission denied; change its permissions"),
    ],
)
def test_a_file_that_cannot_be_had_is_no_fault_of_ours(error, said, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("moesaic.checkpoint.inspect.inspect", fail)
    assert main(["inspect", "model"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"moesaic inspect: {said}") and err.count("\n") == 1


def test_nothing_of_ours_is_said_to_be_the_user_s():
    """The exit code asks for the report, in one place: no message does, whatever its class."""
    for path in Path(moesaic.__file__).parent.rglob("*.py"):
        assert "report this" not in path.read_text(encoding="utf-8"), path


# --json -------------------------------------------------------------------------------------------------------------


def test_an_error_is_one_object_too(tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--json"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found == {"error": err.removeprefix("moesaic inspect: ").strip(), "exit": 2}
    with pytest.raises(SystemExit):
        main(["inspect", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "error": "the command line is wrong; standard error says how",
        "exit": 2,
    }


def test_an_interruption_is_one_object_too(monkeypatch, capsys):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.checkpoint.inspect.inspect", stop)
    assert main(["inspect", "model", "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {
        "error": "interrupted; run the same command again to continue",
        "exit": 130,
    }


def test_what_does_not_hold_is_facts(tell, smaller, tmp_path):
    shutil.copytree(smaller, tmp_path / "broken")
    (tmp_path / "broken" / "LICENSE").write_text("")
    facts, text = tell("verify", tmp_path / "broken", code=1)
    assert facts["holds"] is False and "error" not in facts and "FAIL" in text
