"""Damage in a source is found at the first look, and named with tensor and file; what only looks like it is read.

Each fault is planted in the bytes of a good folder. What is looked at before anything else (norms, routers, correction
biases, embedding, head, vision) is damaged in its last element, which a glance would miss.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from folders import deal, write_folder

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.damage import nan_or_infinite, not_finite
from moesaic.cli import main
from moesaic.errors import CheckpointError
from moesaic.export import export
from moesaic.families import Linear
from moesaic.plan import Plan
from moesaic.stream import LayerRun

NAN, INF = math.nan, math.inf
ROLES = ("embedding", "head", "norm", "router", "router_bias", "vision")


def raw(value: float | str, dtype: str) -> bytes:
    """A value as it lies on disk: a number, or "0x7f", which is a byte."""
    if isinstance(value, str):
        return bytes.fromhex(value.removeprefix("0x"))
    torch_dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
    return torch.tensor([value]).to(torch_dtype[dtype]).view(torch.uint8).numpy().tobytes()


def poke(folder: Path, name: str, value: float | str, at: int = -1) -> str:
    """Put `value` in place of element `at` of a tensor; returns its file."""
    where = Checkpoint.open(folder).where(name)
    new = raw(value, where.info.dtype)
    with open(folder / where.file, "r+b") as file:
        file.seek(where.offset + at % where.info.elements * len(new))
        file.write(new)
    return where.file


def copy(source: Checkpoint, to: Path) -> Path:
    return Path(shutil.copytree(source.path, to))


# Beside the linears ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("role", ROLES)
def test_what_is_no_linear_is_looked_at_first(source, tmp_path, role, value):
    named = [t for t in source.architecture.tensors if t.role == role]
    if not named:
        pytest.skip("M2 sees nothing")
    info, folder = named[-1], copy(source, tmp_path / "model")
    file = poke(folder, info.name, value)
    damaged = Checkpoint.open(folder)  # headers tell nothing
    what = "1 NaN" if math.isnan(value) else "1 infinite"
    last = [n - 1 for n in info.shape]
    sentence = (
        rf"{file}: {info.name} holds {what} among {info.elements:,} values, the first at \[" + ".*; fetch the file"
    )
    for look in (damaged.check_values, lambda: LayerRun(damaged)):
        with pytest.raises(CheckpointError, match=sentence) as caught:
            look()
        assert str(last[-1:] if len(info.shape) == 1 else info.elements - 1).strip("[]") in str(caught.value)
    source.check_values()


@pytest.mark.parametrize(
    "command",
    [
        "calibrate {model} {out} --tokens 4096 --length 256 --data {data}",
        "prune {model} {out} --experts 4 --tokens 4096 --length 256 --data {data}",
        "prune {model} {out} --experts 4 --criterion aimer",
        "prune {model} {out} --experts 4 --preview --tokens 4096 --length 256 --data {data}",
        "quantize {model} {out} --format mxfp4",
        "quantize {model} {out} --format int4_g128 --rounding gptq --tokens 4096 --length 256 --data {data}",
        "compress {model} {out} --format mxfp4 --tokens 4096 --length 256 --data {data}",
        "export {model} {out} --to compressed_tensors",
        "measure {model} {out} --tokens 4096 --length 256 --data {data}",
    ],
)
def test_every_stage_looks_before_it_works_and_leaves_nothing(m3, tmp_path, command, capsys):
    """A NaN in a correction bias gives that expert to every token, and nothing that comes out is NaN."""
    folder, out, data = copy(m3, tmp_path / "model"), tmp_path / "out", tmp_path / "data"
    name = m3.architecture.routers[2].correction
    file = poke(folder, name, NAN, 5)
    data.mkdir()
    (data / "text.txt").write_text("Bytes that a byte-level tokenizer makes tokens of. " * 2000)
    words = [word.format(model=folder, out=out, data=data) for word in command.split()]
    assert main([*words, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"{file}: {name} holds 1 NaN among 8 values, the first at [5]" in said and "Traceback" not in said
    assert not out.exists() or not any(f.is_file() for f in out.rglob("*"))


def test_reading_headers_alone_looks_at_none(m3, tmp_path):
    """`inspect` and `fit` take a second on any model."""
    folder = copy(m3, tmp_path / "model")
    poke(folder, m3.architecture.norm, NAN)
    assert main(["inspect", str(folder), "--json"]) == 0
    assert Checkpoint.open(folder).identity


# Matrices -------------------------------------------------------------------------------------------------------------

# source or container and format, part, value, what is said
MATRICES = {
    "E8M0 255": ("m3", "", "blocks", "0xff", r"1 NaN among [\d,]+ values"),
    "E4M3 code 7F": ("m3", "", "codes", "0x7f", "1 NaN among"),
    "E4M3 code FF": ("m2", "", "codes", "0xff", "1 NaN among"),
    "an F32 scale of NaN": ("m2", "", "blocks", NAN, "1 NaN among"),
    "an infinite F32 scale": ("m2", "", "blocks", INF, "1 infinite among"),
    "an F32 scale below infinity": ("m2", "", "blocks", -INF, "1 infinite among"),
    "a negative F32 scale": ("m2", "", "blocks", -1e-3, "1 negative scales among"),
    "a negative subnormal scale": ("m2", "", "blocks", -1e-40, "1 negative scales among"),
    "an F32 scale of zero": ("m2", "", "blocks", 0.0, "1 scales of zero among .* over codes that are not zero"),
    "infinite BF16": ("m3", "unquantized bf16", "codes", INF, "1 infinite among"),
    "BF16 of NaN": ("m2", "unquantized bf16", "codes", NAN, "1 NaN among"),
    "MXFP4's byte 255": ("m3", "compressed_tensors mxfp4", "blocks", "0xff", "1 NaN among"),
    "an NVFP4 scale of NaN": ("m3", "compressed_tensors nvfp4", "blocks", "0x7f", "1 NaN among"),
    "a negative NVFP4 scale": ("m3", "compressed_tensors nvfp4", "blocks", "0xb8", "1 negative scales among"),
    "NVFP4's divisor is NaN": ("m3", "compressed_tensors nvfp4", "shared", NAN, "1 NaN among 1 values"),
    "NVFP4's divisor is zero": ("m3", "compressed_tensors nvfp4", "shared", 0.0, "a scale of zero, which is divided"),
    "NVFP4's divisor is negative": ("m3", "compressed_tensors nvfp4", "shared", -3.0, "1 negative scales among 1"),
    "an integer's scale is NaN": ("m2", "compressed_tensors int4_g128", "blocks", NAN, "1 NaN among"),
    "an integer's scale is infinite": ("m2", "compressed_tensors int4_g128", "blocks", -INF, "1 infinite among"),
    "MLX's scale is infinite": ("m3", "mlx affine4_g64", "blocks", INF, "1 infinite among"),
    "MLX's offset is NaN": ("m3", "mlx affine4_g64", "offsets", NAN, "1 NaN among"),
    "MLX's NVFP4 scale is NaN": ("m3", "mlx nvfp4", "blocks", "0x7f", "1 NaN among"),
    "a row's FP8 scale is NaN": ("m2", "compressed_tensors fp8_channel", "blocks", NAN, "1 NaN among"),
    "a row's FP8 scale is zero": ("m2", "compressed_tensors fp8_channel", "blocks", 0.0, "1 scales of zero among"),
}


@pytest.fixture(scope="module")
def folders(m2, m3, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Both models as they are, and in every container and format above."""
    root, found = tmp_path_factory.mktemp("folders"), {("m2", ""): m2.path, ("m3", ""): m3.path}
    for of, kind, *_ in (*MATRICES.values(), *LEGAL.values()):
        if (of, kind) not in found and kind != "zero codes":
            source, (container, format) = {"m2": m2, "m3": m3}[of], kind.split()
            out = root / f"{of} {kind}"
            write_folder(source, deal(source, format, "bf16"), container, out)
            found[of, kind] = out
    return found


def matrix(checkpoint: Checkpoint) -> Linear:
    """One that is rounded in all of them: the gate of an expert that is not the first."""
    return checkpoint.architecture.experts_of[checkpoint.architecture.moe_layers[-1], 3]["gate"]


@pytest.mark.parametrize("fault", MATRICES)
def test_a_damaged_matrix_is_named_with_tensor_and_file(folders, tmp_path, fault):
    of, kind, part, value, sentence = MATRICES[fault]
    folder = Path(shutil.copytree(folders[of, kind], tmp_path / "model"))
    checkpoint = Checkpoint.open(folder)
    linear = matrix(checkpoint)
    checkpoint.decode(linear.name)
    where = checkpoint.located(linear)[part]
    with open(folder / where.file, "r+b") as file:
        file.seek(where.offset)
        file.write(raw(value, where.info.dtype))
    checkpoint = Checkpoint.open(folder)
    wanted = rf"{where.file}: {where.info.name} holds {sentence}"
    with pytest.raises(CheckpointError, match=wanted):
        checkpoint.decode(linear.name)
    checkpoint.check_values()
    units = checkpoint.architecture.units
    ways = {  # whatever becomes of it: rounded by kernels or through values, or copied
        "kernel": Plan("compressed_tensors", formats=dict.fromkeys(units, "int8_channel")),
        "values": Plan("unquantized", formats=dict.fromkeys(units, "bf16")),
        "copied": Plan(checkpoint.container.name),
    }
    for way, plan in ways.items():
        if (
            way != "kernel"
            and (way == "copied" or "bf16" in kind)
            and (part == "codes" or "scales of zero" in sentence)
        ):
            continue  # bytes that only move are not looked at one by one; verify does
        with pytest.raises(CheckpointError, match=wanted):
            export(checkpoint, plan, tmp_path / way, quiet=True)
        assert not (tmp_path / way / "config.json").exists()


@pytest.mark.parametrize("to", ["compressed_tensors", "mlx"])
def test_a_damaged_scale_is_named_where_codes_are_carried_over(m3, tmp_path, to):
    folder = copy(m3, tmp_path / "model")
    linear = matrix(m3)
    where = m3.located(linear)["blocks"]
    with open(folder / where.file, "r+b") as file:
        file.seek(where.offset + 9)
        file.write(b"\xff")
    with pytest.raises(
        CheckpointError, match=rf"{where.file}: {where.info.name} holds 1 NaN .* at \[0, 1\]|at \[1, 1\]"
    ):
        export(Checkpoint.open(folder), Plan(to), tmp_path / to, quiet=True)


# What only looks like damage ------------------------------------------------------------------------------------------

LEGAL = {  # source, container and format, bytes for the whole of a part or one element, what its weights become
    "E8M0 0": ("m3", "", "blocks", "0x00"),
    "a subnormal F32 scale": ("m2", "", "blocks", 1e-40),
    "the smallest F32": ("m2", "", "blocks", 1.4e-45),
    "minus zero over zeros": ("m2", "zero codes", "blocks", -0.0),
    "a zero F32 scale over zeros": ("m2", "zero codes", "blocks", 0.0),
    "a negative integer scale": ("m2", "compressed_tensors int4_g128", "blocks", -1e-3),
    "a negative MLX scale": ("m3", "mlx affine4_g64", "blocks", -1e-3),
    "a negative MLX offset": ("m3", "mlx affine4_g64", "offsets", -1e-3),
    "MLX's scale of zero": ("m3", "mlx affine4_g64", "blocks", 0.0),
    "the smallest NVFP4 scale": ("m3", "compressed_tensors nvfp4", "blocks", "0x01"),
    "an NVFP4 scale of zero": ("m3", "compressed_tensors nvfp4", "blocks", "0x00"),
    "the largest E4M3": ("m3", "", "codes", "0xfe"),
    "BF16's subnormals": ("m3", "unquantized bf16", "codes", 1e-40),
}


@pytest.mark.parametrize("case", LEGAL)
def test_what_is_legal_is_read_as_it_stands(folders, tmp_path, case):
    of, kind, part, value = LEGAL[case]
    folder = Path(shutil.copytree(folders[of, "" if kind == "zero codes" else kind], tmp_path / "model"))
    checkpoint = Checkpoint.open(folder)
    linear = matrix(checkpoint)
    where = checkpoint.located(linear)
    before = checkpoint.decode(linear.name)
    with open(folder / where[part].file, "r+b") as file:
        file.seek(where[part].offset)
        file.write(raw(value, where[part].info.dtype))
    if kind == "zero codes":
        (o, i), stored = linear.shape, where["codes"]
        with open(folder / stored.file, "r+b") as file:
            for row in range(min(128, o)):
                file.seek(stored.offset + row * i)
                file.write(bytes([0, 128] * (min(128, i) // 2)))
    after = Checkpoint.open(folder).decode(linear.name)
    assert after.isfinite().all() and not torch.equal(after, before)
    scale = checkpoint.parts(linear)
    if case == "a subnormal F32 scale":
        codes = scale["codes"].float()[:128, :128]
        assert torch.equal(after[:128, :128], codes * torch.tensor(1e-40))
    if "zeros" in case:
        assert not after[:128, :128].any()


# By bits --------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_of_bits_is_judged_as_torch_does(dtype):
    """All of them where there are few; for the wide ones those around every border."""
    if dtype.itemsize <= 2:
        kind = torch.uint8 if dtype.itemsize == 1 else torch.int16
        bits = torch.arange(-(2**15), 2**15).to(torch.int16) if kind == torch.int16 else torch.arange(256).to(kind)
    else:
        kind = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
        top = (0x7F8 << 20) if dtype.itemsize == 4 else 0x7FF << 52
        around = [top + k for k in range(-3, 4)] + [0, 1, 2]
        bits = torch.tensor(around + [b - (1 << (8 * dtype.itemsize - 1)) for b in around], dtype=kind)
    x = bits.view(dtype)
    wide = x.float() if dtype.itemsize < 8 else x
    assert not_finite(x) == int((~wide.isfinite()).sum()) and bool(nan_or_infinite(x)) == (not_finite(x) > 0)
    assert sum(not_finite(x[i : i + 1]) for i in range(min(len(x), 600))) == int((~wide[:600].isfinite()).sum())


def test_counting_needs_no_memory_and_takes_what_lies_askew():
    x = torch.zeros(3, 1 << 19)
    x[1, 7], x[2, -1] = NAN, INF
    assert not_finite(x) == 2 == not_finite(x.T) and not_finite(x[:1]) == 0 == not_finite(torch.empty(0))
    assert nan_or_infinite(x) == "1 NaN and 1 infinite among 1,572,864 values, the first at [1, 7]"
    assert not_finite(torch.tensor([255], dtype=torch.uint8)) == 0 == not_finite(torch.full((3,), 3e38))


# Configs that only transformers reads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", None, [], {}, 10**400, -1, {"rope_type": "no such"}], ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "hidden_act"])
def test_a_value_that_transformers_refuses_is_one_sentence(m2, tmp_path, key, value):
    """Or is taken; but nothing comes out as a traceback."""
    folder = copy(m2, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        LayerRun(Checkpoint.open(folder))
    except Exception as error:
        assert type(error).__name__ in ("FamilyError", "CheckpointError") and "\n" not in str(error), repr(error)
