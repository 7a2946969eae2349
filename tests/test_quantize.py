"""Quantize as a whole: one format for one class of matrices, everything else as it was, and sizes that are arithmetic.

That every tensor is what rounding gives is test_export.py's and test_verify.py's; here is what the call
promises: which matrices change, what is refused at once, what an interruption leaves.
"""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch
from children import child, contents, dying, killed_after
from safetensors.torch import load_file

import moesaic.recipes.quantize as quantize_module
from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckError, CheckpointError, InputError, PlanError, StaleError
from moesaic.recipes.quantize import SCOPES, Quantizing, quantize


def stored(path: Path) -> dict[str, bytes]:
    tensors = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    return {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


@pytest.mark.parametrize("only", SCOPES)
def test_what_changes_and_what_does_not(minimax, tmp_path, only):
    facts = quantize(minimax.path, tmp_path / "out", Quantizing("mxfp4", only), quiet=True)
    result, before, after = Checkpoint.open(tmp_path / "out"), stored(minimax.path), stored(tmp_path / "out")
    for linear in minimax.architecture.linears:
        inside = linear.role in SCOPES[only]
        assert result.formats[linear.name] == ("mxfp4" if inside else minimax.formats[linear.name])
        assert inside or after[f"{linear.name}.weight"] == before[f"{linear.name}.weight"]
        assert inside or after[f"{linear.name}.weight_scale"] == before[f"{linear.name}.weight_scale_inv"]
    for tensor in minimax.architecture.tensors:
        assert after[tensor.name] == before[tensor.name], "routers, norms, embeddings and vision stay"
    assert facts["bytes"] == sum(map(len, after.values())) and facts["source_bytes"] == sum(map(len, before.values()))


def test_the_size_is_arithmetic(source, tmp_path):
    """4.25 bits a weight in MXFP4, 16 in BF16; and the rest as it was."""
    facts = quantize(source.path, tmp_path / "out", Quantizing("mxfp4", rest="bf16"), quiet=True)
    experts = sum(n.elements for n in source.architecture.linears if n.role == "experts")
    others = sum(n.elements for n in source.architecture.linears if n.role != "experts")
    small = sum(t.bytes for t in source.architecture.tensors)
    assert facts["bytes"] == experts * 17 // 32 + others * 2 + small
    assert {k: facts[k] for k in ("format", "only", "rest", "container", "rounding")} == {
        "format": "mxfp4", "only": "experts", "rest": "bf16", "container": "compressed_tensors", "rounding": "rtn",
    }  # fmt: skip


def test_bf16_of_all_is_the_source_decoded(source, tmp_path):
    """Into the plain container: values of E4M3 times a scale, to the nearest BF16."""
    quantize(source.path, tmp_path / "out", Quantizing("bf16", "linears", container="unquantized"), quiet=True)
    result = Checkpoint.open(tmp_path / "out")
    assert "quantization_config" not in result.config and result.container.name == "unquantized"
    for linear in source.architecture.linears:
        assert torch.equal(result.decode(linear.name), source.decode(linear.name).bfloat16().float())


def test_the_format_of_the_source_is_a_copy(m3, tmp_path):
    facts = quantize(m3.path, tmp_path / "out", Quantizing("mxfp8", "linears"), quiet=True)
    renamed = {n.replace("weight_scale_inv", "weight_scale"): b for n, b in stored(m3.path).items()}
    assert stored(tmp_path / "out") == renamed and facts["verified"].get("codes", 0) == 0


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"format": "mxfp5"}, "unknown format 'mxfp5'; choose from"),
        ({"only": "routers"}, "unknown scope 'routers'; choose from experts, linears"),
        ({"rest": "fp16"}, "unknown format for the rest 'fp16'; choose from source"),
        ({"container": "zip"}, "unknown container 'zip'; choose from"),
        ({"rounding": "magic"}, "unknown rounding 'magic'; choose from"),
        ({"container": "fp8"}, "fp8 carries fp8_block, bf16 and not mxfp4"),
    ],
)
def test_a_name_that_there_is_not(m2, tmp_path, change, sentence):
    with pytest.raises((InputError, PlanError), match=sentence):
        quantize(m2.path, tmp_path / "out", Quantizing(**{"format": "mxfp4", **change}), quiet=True)
    assert not (tmp_path / "out").exists(), "or the corrected call would find the folder taken"


def test_a_folder_that_is_taken(m2, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and was not written by moesaic"):
        quantize(m2.path, tmp_path / "out", Quantizing("mxfp4"), quiet=True)
    quantize(m2.path, tmp_path / "mine", Quantizing("mxfp4"), quiet=True)
    with pytest.raises(StaleError, match="holds an export by another plan"):
        quantize(m2.path, tmp_path / "mine", Quantizing("mxfp4", rest="bf16"), quiet=True)
    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("sign, calls", [(signal.SIGKILL, (1, 60, 130, 184)), (signal.SIGINT, (70,))], ids=str)
def test_after_any_death_the_same_call_finishes_the_same_folder(m2, tmp_path, sign, calls):
    out, deaths = tmp_path / "out", 0

    def work() -> None:
        quantize(m2.path, out, Quantizing("mxfp4"), quiet=True)

    work()
    whole = contents(out)
    for at in calls:
        shutil.rmtree(out)
        deaths += child(dying(work, at, sign)) in (130, -signal.SIGKILL)
        work()
        assert contents(out) == whole, f"after death at call {at}"
    assert deaths >= max(1, len(calls) - 1)


def test_killed_at_random_moments_the_same_calls_end_in_the_same_bytes(m3, tmp_path):
    """SIGKILL from outside, wherever the process then is: in a write, between two files, in a kernel, while verifying."""
    out, random, kills = tmp_path / "out", Random(0), 0

    def work() -> None:
        quantize(m3.path, out, Quantizing("nvfp4"), quiet=True)

    started = time.monotonic()
    assert child(work) == 0
    seconds = time.monotonic() - started
    whole = contents(out)
    shutil.rmtree(out)
    # the first comes at once, since a second run may be quicker than the one whose time was taken
    while (code := child(killed_after(work, random.uniform(0, seconds) if kills else 0.01))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        if kills == 8:
            work()
            break
    assert kills and contents(out) == whole


@pytest.mark.parametrize("factor, refused", [(2.0**40, True), (2.0**-60, True), (2.0**12, False)])
def test_a_magnitude_that_only_a_misread_scale_makes_is_refused(m3, tmp_path, factor, refused):
    """Where kernels see stored bytes alone too; a few large weights are no reason."""
    source = shutil.copytree(m3.path, tmp_path / "in")
    where = m3.where(f"{m3.architecture.layer_prefix}1.block_sparse_moe.experts.0.w1.weight_scale_inv")
    with open(source / where.file, "r+b") as f:
        f.seek(where.offset)
        scales = torch.frombuffer(bytearray(f.read(where.info.bytes)), dtype=torch.uint8)
        scales[: len(scales) if refused else 1] += int(math.log2(factor))
        f.seek(where.offset)
        f.write(scales.numpy().tobytes())
    if refused:
        with pytest.raises(CheckpointError, match=r"experts\.0\.w1 decodes to a root mean square of"):
            quantize(source, tmp_path / "out", Quantizing("mxfp4"), quiet=True)
    else:
        assert Checkpoint.open(source).decode(where.info.name.removesuffix("_scale_inv")).abs().max() > 100
        quantize(source, tmp_path / "out", Quantizing("mxfp4"), quiet=True)


def test_a_result_that_does_not_verify_is_an_error(m3, tmp_path, monkeypatch):
    real = quantize_module.export

    def damaging(*args) -> Checkpoint:
        result = real(*args)
        where = result.where(f"{result.architecture.layer_prefix}1.block_sparse_moe.experts.0.w1.weight_packed")
        with open(result.path / where.file, "r+b") as f:
            f.seek(where.offset + 1)
            f.write(b"\x77\x77\x77")
        return result

    monkeypatch.setattr(quantize_module, "export", damaging)
    with pytest.raises(
        CheckError, match=r"does not verify: codes: .*layers\.1\.block_sparse_moe\.experts\.0\.w1 has codes"
    ) as caught:
        quantize(m3.path, tmp_path / "out", Quantizing("mxfp4"), quiet=True)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "moesaic" / "quantize.json").exists()


def test_facts_are_on_disk(m2, tmp_path):
    facts = quantize(m2.path, tmp_path / "out", Quantizing("mxfp4"), quiet=True)
    on_disk = json.loads((tmp_path / "out" / "moesaic" / "quantize.json").read_text())
    assert {k: on_disk[k] for k in facts} == json.loads(json.dumps(facts)) and on_disk["inputs"] == {
        "source": m2.identity
    }
