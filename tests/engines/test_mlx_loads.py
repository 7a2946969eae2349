"""Exports in stock mlx-lm, which runs on a CPU too: the same logits, to float32's rounding, as transformers on a twin.

Needs `pytest --mlx-python PATH`, a Python that has mlx[cpu], mlx-lm, torch and transformers, and the check in
../shared/checks. The twin holds our decoded values in F32, so that nothing but summation order differs. MLX's CPU
has no kernel for NVFP4 with a second scale: of that, mlx-lm's loader and mlx's own decoding are the proof.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import loads
import pytest
import torch
from conftest import SHARED
from folders import deal, saved, write_folder, write_twin
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint import Checkpoint

pytestmark = pytest.mark.engines
CHECK = SHARED / "checks" / "mlx" / "check_mlx.py"
ENGINE = "mlx-lm 0.32"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

MIXED = {"gate": "affine3_g32", "up": "affine5_g64", "down": "mxfp4"}
CASES: dict[str, tuple[str | dict[str, str], str]] = {
    "affine4": ("affine4_g64", "affine8_g32"),
    "affine2-bf16": ("affine2_g32", "bf16"),
    "mxfp4-mxfp8": ("mxfp4", "mxfp8"),
    "mixed": (MIXED, "affine6_g128"),
}
LOAD = """
import sys; from pathlib import Path; import mlx.core as mx; import numpy as np; from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
found = {}
for name, module in model.named_modules():
    if name.endswith("_proj") and "switch_mlp" in name:
        w = [mx.dequantize(module.weight[e], module.scales[e], group_size=16, bits=4, mode="nvfp4", dtype=mx.float32,
                           global_scale=module.global_scale[e]) for e in range(module.num_experts)]
        found[name] = mx.stack(w)
mx.save_safetensors(sys.argv[2], found)
"""


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    path = request.config.getoption("--mlx-python")
    if not path:
        pytest.skip("no --mlx-python PATH was given, so nothing is loaded in mlx-lm")
    if not CHECK.exists():
        pytest.skip(f"the check {CHECK} is not there, so nothing is loaded in mlx-lm")
    return str(path)


def export(source: Checkpoint, experts: str | dict[str, str], rest: str, out: Path) -> dict[str, Tensor]:
    if isinstance(experts, str):
        formats = deal(source, experts, rest)
    else:
        formats = {n.name: rest if n.expert is None else experts[n.projection] for n in source.architecture.linears}
    decoded = write_folder(source, formats, "mlx", out)
    write_twin(source, decoded, twin(out), torch.float32)
    for folder in (out, twin(out)):
        for file in TOKENIZER:
            shutil.copy(source.path / file, folder / file)
    return decoded


def twin(out: Path) -> Path:
    return out.with_name(out.name + "-deq")


def check(python: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [python, str(CHECK), str(out), str(twin(out)), __file__, "--tokens", "192", "--window", "96"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", CASES)
def test_mlx_gives_our_logits(
    name: str, source: Checkpoint, python: str, tmp_path: Path, record_property: loads.Record
) -> None:
    export(source, *CASES[name], tmp_path / "out")
    done = check(python, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    experts, rest = CASES[name]
    named = experts if isinstance(experts, str) else ", ".join(f"{p} {f}" for p, f in experts.items())
    family = "m2" if source.architecture.family == "minimax_m2" else "m3"
    loads.note(record_property, ENGINE, family, "mlx", named, rest, "same logits")


def test_mlx_reads_what_transformers_saved(source: Checkpoint, python: str, tmp_path: Path) -> None:
    """A source whose config.json was written by transformers 5, which keeps the rotary embedding where mlx-lm does not look."""
    export(Checkpoint.open(saved(source, tmp_path / "source")), *CASES["affine4"], tmp_path / "out")
    done = check(python, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_mlx_decodes_nvfp4_with_its_second_scale(
    source: Checkpoint, python: str, tmp_path: Path, record_property: loads.Record
) -> None:
    decoded = export(source, "nvfp4", "mxfp8", tmp_path / "out")
    command = [python, "-c", LOAD, str(tmp_path / "out"), str(tmp_path / "found.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    experts = [n for n in source.architecture.linears if n.expert is not None]
    for linear in experts:
        block = linear.name.rsplit(".experts.", 1)[0]
        theirs = found[f"{block}.switch_mlp.{linear.projection}_proj"][linear.expert]
        assert torch.allclose(theirs, decoded[linear.name], rtol=2**-22, atol=0.0)  # they multiply where we divide
    assert sum(t.numel() for t in found.values()) == sum(n.elements for n in experts)
    family = "m2" if source.architecture.family == "minimax_m2" else "m3"
    loads.note(record_property, ENGINE, family, "mlx", "nvfp4", "mxfp8", "same values; no kernel on a CPU")


def swap_experts(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("switch_mlp.up_proj.weight"))
    tensors[name] = tensors[name].flip(0).contiguous()


def bend_a_scale(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("self_attn.q_proj.scales"))
    tensors[name] = tensors[name] * 1.01


def leave_out_an_offset(tensors: dict[str, Tensor]) -> None:
    del tensors[next(n for n in tensors if n.endswith("switch_mlp.down_proj.biases"))]


@pytest.mark.parametrize("fault", [swap_experts, bend_a_scale, leave_out_an_offset])
def test_mlx_shows_planted_faults(
    fault: Callable[[dict[str, Tensor]], None],
    m2: Checkpoint,
    python: str,
    tmp_path: Path,
    record_property: loads.Record,
) -> None:
    """The check is one that can fail."""
    export(m2, *CASES["affine4"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    fault(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert check(python, tmp_path / "out").returncode != 0
    record_property(loads.FAULTS, f"{fault.__name__} (MLX)")
