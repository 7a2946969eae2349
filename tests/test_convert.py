"""Models from one container to another without loss: the same values to the bit, there and back, or a refusal by name."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from folders import deal, write_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moesaic.artifact import write_json
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.cli import main
from moesaic.errors import InputError, PlanError
from moesaic.export import export
from moesaic.formats import FORMATS, Scales
from moesaic.formats.recode import recode, twins
from moesaic.plan import Plan
from moesaic.recipes.convert import convert
from moesaic.verify import verify

# family, from, experts, rest, to, formats there
WAYS = [
    ("m2", "compressed_tensors", "int4_g128", "int8_g64", "mlx", {"affine4_g128", "affine8_g64"}),
    ("m3", "compressed_tensors", "int3_g32", "int8_channel", "mlx", {"affine3_g32", "affine8_g128"}),
    ("m2", "compressed_tensors", ["int2_g64", "int8_channel"], "bf16", "auto_round", {"int2_g64", "int8_g128", "bf16"}),
    ("m3", "compressed_tensors", "mxfp4", "mxfp8", "mlx", {"mxfp4", "mxfp8"}),
    ("m2", "compressed_tensors", "nvfp4", "bf16", "mlx", {"nvfp4", "bf16"}),
    ("m3", "compressed_tensors", "int8_g32", "bf16", "gptq", {"int8_g32", "bf16"}),
    ("m3", "compressed_tensors", "mxfp4", "mxfp8", "unquantized", {"bf16"}),
    ("m2", "auto_round", "int4_g64", "int4_g64", "gptq", {"int4_g64"}),
    ("m3", "gptq", "int4_g32", "bf16", "auto_round", {"int4_g32", "bf16"}),
    ("m2", "mlx", "mxfp8", "mxfp4", "compressed_tensors", {"mxfp8", "mxfp4"}),
    ("m3", "mlx", "nvfp4", "mxfp8", "compressed_tensors", {"nvfp4", "mxfp8"}),
]  # fmt: skip


def same_values(a: Checkpoint, b: Checkpoint) -> int:
    """Every linear decodes to the same bits; how many there are."""
    for linear in a.architecture.linears:
        assert torch.equal(a.decode(linear.name), b.decode(linear.name)), linear.name
    return len(a.architecture.linears)


@pytest.mark.parametrize(("family", "container", "experts", "rest", "to", "formats"), WAYS)
def test_values_come_over_to_the_bit(
    family: str, container: str, experts: str | list[str], rest: str, to: str, formats: set[str],
    request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    source: Checkpoint = request.getfixturevalue(family)
    write_folder(source, deal(source, experts, rest), container, tmp_path / "one")
    one = Checkpoint.open(tmp_path / "one")
    facts = convert(tmp_path / "one", tmp_path / "two", to, quiet=True)
    two = Checkpoint.open(tmp_path / "two")
    assert two.container.name == to and set(two.formats.values()) == formats
    count = same_values(one, two)
    assert sum(facts["matrices"].values()) == count and facts["container"] == to
    recoded = sum(n for way, n in facts["matrices"].items() if not way.endswith("copied"))
    assert facts["verified"].get("values", 0) == recoded
    assert facts["bytes"] == sum(t.bytes for t in two.inventory)


@pytest.mark.parametrize(("family", "experts"), [("m2", "int3_g64"), ("m3", "nvfp4")])
def test_there_and_back_is_the_same_file(
    family: str, experts: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """compressed-tensors -> MLX -> compressed-tensors: every tensor and the config, byte for byte."""
    source: Checkpoint = request.getfixturevalue(family)
    write_folder(source, deal(source, experts, "bf16"), "compressed_tensors", tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", "mlx", quiet=True)
    convert(tmp_path / "two", tmp_path / "three", "compressed_tensors", quiet=True)
    one, three = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "three")
    assert one.config == three.config and one.stored.keys() == three.stored.keys()
    for name in one.stored:
        assert torch.equal(*(m.read(name).reshape(-1).view(torch.uint8) for m in (one, three))), name


def test_a_source_keeps_its_bytes_in_mlx(m3: Checkpoint, tmp_path: Path) -> None:
    facts = convert(m3.path, tmp_path / "out", "mlx", quiet=True)
    assert facts["matrices"] == {"mxfp8 copied": len(m3.architecture.linears)}


def test_pruning_goes_along(m2: Checkpoint, tmp_path: Path) -> None:
    """A plan that drops experts and changes the container, and rounds nothing."""
    write_folder(m2, deal(m2, "int4_g128", "bf16"), "compressed_tensors", tmp_path / "one")
    one, kept = Checkpoint.open(tmp_path / "one"), {layer: (1, 2, 6) for layer in m2.architecture.moe_layers}
    two = export(one, Plan("mlx", kept), tmp_path / "two", quiet=True)
    for (layer, expert), linears in two.architecture.experts_of.items():
        for projection, linear in linears.items():
            theirs = one.architecture.experts_of[layer, kept[layer][expert]][projection]
            assert torch.equal(two.decode(linear.name), one.decode(theirs.name))
    assert verify(two.path, one, quiet=True).holds


def test_verify_sees_a_weight_that_changed(m2: Checkpoint, tmp_path: Path) -> None:
    write_folder(m2, deal(m2, "int4_g128", "bf16"), "compressed_tensors", tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", "mlx", quiet=True)
    (file,) = (tmp_path / "two").glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("switch_mlp.up_proj.biases"))
    tensors[name][1, 0, 0] *= 1.01
    save_file(tensors, file)
    finding, digest = verify(tmp_path / "two", Checkpoint.open(tmp_path / "one"), quiet=True).findings
    assert (digest.check, digest.where) == ("digest", f"{name} [1]")
    assert (finding.check, finding.what[:17]) == ("values", "has 128 of 32,768")


# What cannot be -----------------------------------------------------------------------------------------------------


def test_refusals_name_the_unit_and_who_can(m2: Checkpoint, m3: Checkpoint, tmp_path: Path) -> None:
    def refused(model: Path, to: str, match: str) -> None:
        with pytest.raises(InputError, match=match):
            convert(model, tmp_path / "out", to, quiet=True)
        assert not (tmp_path / "out").exists()

    refused(m2.path, "mlx", r"layers\.0\.qkv is in fp8_block.*compressed_tensors and fp8 would keep")
    refused(
        m3.path, "gptq", r"layers\.0\.qkv is in mxfp8.*compressed_tensors and mlx and mxfp8 and unquantized would keep"
    )
    refused(m2.path, "unquantized", r"fp8_block")  # BF16 has too few bits for an F32 scale
    refused(m2.path, "fp8", "is in fp8 already")
    refused(m2.path, "gguf", "unknown container 'gguf'")
    write_folder(m2, deal(m2, "mxfp4", "nvfp4"), "compressed_tensors", tmp_path / "dense")
    refused(tmp_path / "dense", "mlx", r"layers\.0\.qkv holds no routed experts")
    write_folder(m2, deal(m2, ["int4_g32", "int8_g32"], "bf16"), "auto_round", tmp_path / "two")
    refused(tmp_path / "two", "gptq", "one format beside bf16.*write auto_round")
    write_folder(m2, deal(m2, "affine4_g64", "bf16"), "mlx", tmp_path / "affine")
    refused(tmp_path / "affine", "compressed_tensors", r"layers\.\d\.experts \(.*w1\).*not centred.*keep it in mlx")
    write_folder(m2, deal(m2, "affine5_g64", "bf16"), "mlx", tmp_path / "five")
    refused(tmp_path / "five", "compressed_tensors", r"layers\.0\.experts is in affine5_g64.*; mlx would keep")


def test_fused_matrices_with_two_second_scales_are_refused(m2: Checkpoint, tmp_path: Path) -> None:
    """MLX gives each projection a second scale of its own; vLLM would apply w1's to w3."""
    write_folder(m2, deal(m2, "nvfp4", "bf16"), "mlx", tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("layers.1.block_sparse_moe.switch_mlp.up_proj.global_scale"))
    tensors[name] = tensors[name] * 2
    save_file(tensors, file)
    with pytest.raises(PlanError, match=r"layers\.1\.experts.*w3.*the matrices fused with it; keep it in mlx"):
        convert(tmp_path / "one", tmp_path / "two", "compressed_tensors", quiet=True)


def test_it_continues_where_it_was_stopped(m3: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(m3.path, out, "mlx", quiet=True)
    (out / "config.json").unlink()
    shard = next(iter(sorted(out.glob("*.safetensors"))))
    before = shard.stat().st_mtime_ns
    convert(m3.path, out, "mlx", quiet=True)
    assert (out / "config.json").exists() and shard.stat().st_mtime_ns == before
    assert json.loads((out / "moesaic" / "plan.json").read_text())["container"] == "mlx"


# The command line ---------------------------------------------------------------------------------------------------


def test_a_run_is_exported_again_and_elsewhere(
    m3: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUN -> RUN/model, which its plan makes of the source, and RUN/model-mlx, which holds the very same values."""
    run = tmp_path / "run"
    experts = [unit for unit, members in m3.architecture.units.items() if members[0].role == "experts"]
    plan = Plan("compressed_tensors", {}, dict.fromkeys(experts, "int4_g64"))
    plan.save(run / "plan.json", {"source": m3.identity})
    write_json(run / "source.json", "source", {"model": str(m3.path)}, {})
    assert main(["export", str(run), "--to", "mlx", "--quiet"]) == 0
    model, mlx = Checkpoint.open(run / "model"), Checkpoint.open(run / "model-mlx")
    same_values(model, mlx)
    assert model.container.name == "compressed_tensors" and mlx.container.name == "mlx"
    assert "int4_g64 as affine4_g64" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in (run / "model").glob("*.safetensors")}
    assert main(["export", str(run), "--quiet", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["matrices"]["mxfp8 rounded to int4_g64"] == 24 * len(experts) and facts["verified"]["codes"]
    assert before == {file: file.stat().st_mtime_ns for file in (run / "model").glob("*.safetensors")}


def test_a_model_goes_beside_itself(m3: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(m3.path, model)
    assert main(["export", str(model), "--quiet"]) == 2 and "--to mlx" in capsys.readouterr().err
    assert main(["export", str(model), "--to", "mlx", "--quiet"]) == 0
    assert Checkpoint.open(tmp_path / "model-mlx").container.name == "mlx"
    assert "mxfp8 copied" in capsys.readouterr().out


# Codes --------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_every_twin_means_the_same(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(sorted(f for f in FORMATS if len(twins(f)) > 1 and not f.startswith("affine"))))
    other = data.draw(st.sampled_from(twins(format)))
    seed = data.draw(st.integers(0, 99))
    w_OI = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * 10.0 ** data.draw(st.integers(-6, 3))
    number, theirs = FORMATS[format], FORMATS[other]
    scales = number.scales(w_OI)
    codes_OI = number.encode(w_OI, scales)
    codes, same = recode("m", format, other, codes_OI, scales)
    assert torch.equal(theirs.decode(codes, same), number.decode(codes_OI, scales))
    assert same.blocks is None or same.blocks.shape == theirs.grid(w_OI.shape)
    if format in twins(other):  # and back
        again, scales_again = recode("m", other, format, codes, same)
        assert torch.equal(number.decode(again, scales_again), number.decode(codes_OI, scales))


def test_what_bf16_cannot_hold_is_refused() -> None:
    codes_OI, blocks = torch.full((1, 32), 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.raises(PlanError, match="m holds mxfp8 values too small for BF16"):
        recode("m", "mxfp8", "bf16", codes_OI, Scales(blocks))  # 2^-9 · 2^-127


def test_twins_are_in_every_container_somewhere() -> None:
    carried = {format for container in CONTAINERS.values() for format in container.packings}
    assert {twin for format in carried for twin in twins(format)} <= carried


def test_bf16_alone_goes_into_mlx(tmp_path: Path) -> None:
    """The map of config.json says that experts are stacked, so it can be opened again."""
    source = Checkpoint.open(tiny.make(tmp_path / "bf16", "minimax_m2", "bf16"))
    convert(source.path, tmp_path / "out", "mlx", quiet=True)
    out = Checkpoint.open(tmp_path / "out")
    assert out.container.name == "mlx" and set(out.formats.values()) == {"bf16"}
    assert all(torch.equal(out.decode(n.name), source.decode(n.name)) for n in source.architecture.linears)
