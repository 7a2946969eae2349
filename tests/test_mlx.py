"""MLX's layout by hand: words, stacks of experts, the map of modules. (tests/engines loads it in mlx-lm itself.)"""

import json
from pathlib import Path

import pytest
import replica
import torch
from folders import deal, write_folder
from hypothesis import given
from hypothesis import strategies as st

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.checkpoint.shards import plan_shards
from moesaic.cli import main
from moesaic.errors import CheckpointError, PlanError
from moesaic.export import export
from moesaic.measure import offers
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.plan.pieces import sorted_pieces
from moesaic.verify import verify

MLX = CONTAINERS["mlx"]
MIXED = {"gate": "affine3_g32", "up": "mxfp4", "down": "affine6_g128"}  # one layer's experts, by projection


def by_projection(source: Checkpoint, rest: str) -> dict[str, str]:
    return {n.name: rest if n.expert is None else MIXED[n.projection] for n in source.architecture.linears}


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6, 8))
def test_affine_words_by_hand(bits: int) -> None:
    """Weight k of a row: `bits` bits from bit k · bits of the row's words, times its group's scale, plus its bias."""
    packing = MLX.packing(f"affine{bits}_g32")
    w_OI = torch.randn(8, 96, generator=torch.Generator().manual_seed(5))
    scales = packing.number_format.scales(w_OI)
    stored = packing.pack(packing.number_format.encode(w_OI, scales), scales)
    ours = packing.decode(stored, w_OI.shape)
    for row in (0, 7):
        words = sum(word << (32 * i) for i, word in enumerate(stored["codes"][row].tolist()))
        for k in (0, 31, 32, 40, 95):
            code = words >> (k * bits) & (1 << bits) - 1
            assert (
                ours[row, k] == code * stored["blocks"][row, k // 32].float() + stored["offsets"][row, k // 32].float()
            )


@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_the_second_scale_comes_back_to_the_bit(largest: float) -> None:
    """Stored as the largest weight, used as the divisor 2688 / largest: both F32, and dividing twice loses a bit."""
    packing = MLX.packing("nvfp4")
    shared = packing.number_format.share(torch.tensor(largest))
    scales = packing.number_format.scales(torch.ones(2, 16), shared)
    stored = packing.pack(torch.zeros(2, 16, dtype=torch.uint8), scales)
    assert torch.equal(packing.unpack(stored, (2, 16))[1].shared, shared)
    assert abs(float(stored["shared"]) / largest - 1) < 2**-22


def test_experts_lie_stacked(source: Checkpoint, tmp_path: Path) -> None:
    """switch_mlp.{gate,up,down}_proj [experts, out, …]; row e is expert e's own packing, wherever w1, w2, w3 stood."""
    decoded = write_folder(source, by_projection(source, "bf16"), "mlx", tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    a, layer = out.architecture, out.architecture.moe_layers[0]
    block = f"{a.layer_prefix}{layer}.block_sparse_moe"
    assert not [name for name in out.stored if ".experts." in name]
    for projection, format in MIXED.items():
        stack = out.read(f"{block}.switch_mlp.{projection}_proj.weight")
        first = a.experts_of[layer, 0][projection]
        bits = MLX.packing(format).number_format.element_bits
        assert stack.shape == (a.experts, first.shape[0], first.shape[1] * bits // 32) and stack.dtype == torch.uint32
        for expert in range(a.experts):
            linear = a.experts_of[layer, expert][projection]
            assert linear.name.endswith({"gate": ".w1", "up": ".w3", "down": ".w2"}[projection])
            assert torch.equal(out.parts(linear)["codes"], stack[expert])
            assert torch.equal(out.decode(linear.name), decoded[linear.name])


def test_source_bytes_become_words(m3: Checkpoint, tmp_path: Path) -> None:
    write_folder(m3, deal(m3, "affine4_g64", "source"), "mlx", tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    for linear in (n for n in m3.architecture.linears if n.expert is None):
        words, scales = out.read(f"{linear.name}.weight"), out.read(f"{linear.name}.scales")
        assert torch.equal(words.view(torch.uint8), m3.read(f"{linear.name}.weight").view(torch.uint8))
        assert torch.equal(scales, m3.read(f"{linear.name}.weight_scale_inv"))


def test_the_map_names_every_module(source: Checkpoint, tmp_path: Path) -> None:
    """mlx-lm guesses what the map leaves out from shapes, and 2-bit groups of 64 look like 4-bit groups of 32."""
    write_folder(source, by_projection(source, "affine4_g64"), "mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization")
    assert config.pop("quantization_config") == quantization
    assert config == {key: value for key, value in source.config.items() if key != "quantization_config"}
    a = source.architecture
    small = {t.name.removesuffix(".weight") for t in a.tensors if t.role in ("embedding", "head", "router")}
    assert {path for path, said in quantization.items() if said is False} == small
    gate = f"{a.layer_prefix}{a.moe_layers[0]}.block_sparse_moe.switch_mlp.gate_proj"
    assert quantization[gate] == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert {n.name for n in a.linears if n.expert is None} < quantization.keys()


def test_a_map_may_be_short(m2: Checkpoint) -> None:
    """As mlx_lm.convert writes it: defaults, and what departs from them; what has no scales is BF16."""
    formats = deal(m2, "affine4_g64", "bf16")
    names = frozenset(
        MLX.place(m2.architecture, n).tensor(part).name
        for n in m2.architecture.linears
        for part in MLX.packing(formats[n.name]).parts(n.shape).values()
    )
    config = {"quantization": {"group_size": 64, "bits": 4}}
    assert MLX.formats(m2.architecture, config, names) == formats
    down = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    config["quantization"][down] = {"group_size": 64, "bits": 8}
    assert MLX.formats(m2.architecture, config, None)["model.layers.0.block_sparse_moe.experts.3.w2"] == "affine8_g64"
    config["quantization"][down] = False
    with pytest.raises(CheckpointError, match=rf"{down} bf16.*hold biases, scales, weight"):
        MLX.formats(m2.architecture, config, names)
    with pytest.raises(CheckpointError, match=r"\('affine', 7, 64\); moesaic reads"):
        MLX.formats(m2.architecture, {"quantization": {"group_size": 64, "bits": 7}}, names)


def test_plans_that_mlx_does_not_load_are_refused(m2: Checkpoint) -> None:
    def config(formats: dict[str, str]) -> object:
        return MLX.config(m2.architecture, formats, m2.config)

    one = "model.layers.1.block_sparse_moe.experts.2.w1"
    with pytest.raises(PlanError, match=r"layers\.1.*switch_mlp\.gate_proj would stack experts in mxfp4 and mxfp8"):
        config(deal(m2, "mxfp4", "mxfp8") | {one: "mxfp8"})
    with pytest.raises(PlanError, match=r"layers\.0\.qkv holds no routed experts"):
        config(deal(m2, "mxfp4", "nvfp4"))
    assert config(deal(m2, "nvfp4", "mxfp8"))
    narrow = m2.family.read(m2.config | {"intermediate_size": 96})
    with pytest.raises(PlanError, match=r"layers\.0\.experts has rows of 96 weights.*affine4_g64's 64"):
        MLX.config(narrow, dict.fromkeys(m2.formats, "affine4_g64"), m2.config)


def test_what_mlx_would_round_again_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kv_b_proj, by its name, before the first byte; and compress leaves it as it is."""
    source = Checkpoint.open(replica.make(tmp_path / "kimi", "kimi_k2"))
    asked = ("quantize", source.path, tmp_path / "out", "--format", "mxfp4", "--only", "linears", "--to", "mlx")
    assert main([*map(str, asked), "--quiet"]) == 2
    assert "layers.0.kv_b holds kv_b_proj, which mlx-lm cuts in two" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))
    offered = offers(source, MLX, ("source", "mxfp4", "affine4_g64"))
    assert offered["layers.0.kv_b"] == ("source",)
    assert {of for unit, of in offered.items() if not unit.endswith("kv_b")} == {("source", "mxfp4", "affine4_g64")}


def test_a_model_of_bf16_alone_says_that_experts_are_stacked(mixtral: Checkpoint, tmp_path: Path) -> None:
    formats = dict.fromkeys(mixtral.architecture.units, "bf16")
    out = export(mixtral, Plan("mlx", {}, formats), tmp_path / "out", quiet=True)
    assert out.container.name == "mlx" and set(out.formats.values()) == {"bf16"}
    assert not [name for name in out.stored if ".experts." in name]
    assert verify(out.path, mixtral, quiet=True).holds


# Through export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "rest"), [("affine4_g32", "affine8_g64"), ("mxfp8", "mxfp8"), ("nvfp4", "bf16"), ("mxfp4", "bf16")]
)
def test_export_writes_stacks_row_by_row(source: Checkpoint, experts: str, rest: str, tmp_path: Path) -> None:
    """The tensors are those of the short way, `verify` finds them so, and rows that change places do not pass."""
    a = source.architecture
    formats = {unit: rest if members[0].expert is None else experts for unit, members in a.units.items()}
    out = export(source, Plan("mlx", {}, formats), tmp_path / "out", quiet=True)
    write_folder(source, {n.name: formats[n.unit] for n in a.linears}, "mlx", tmp_path / "slow")
    slow = Checkpoint.open(tmp_path / "slow")
    assert slow.config == out.config and slow.stored.keys() == out.stored.keys()
    for name in slow.stored:
        assert torch.equal(*(model.read(name).reshape(-1).view(torch.uint8) for model in (slow, out))), name
    assert verify(out.path, source, quiet=True).holds
    stored = out.where(next(n for n in out.stored if n.endswith("switch_mlp.down_proj.scales")))
    with open(out.path / stored.file, "r+b") as file:
        file.seek(stored.offset)
        rows = file.read(stored.info.bytes)
        file.seek(stored.offset)
        file.write(rows[stored.info.bytes // a.experts :] + rows[: stored.info.bytes // a.experts])
    verdict = verify(out.path, source, quiet=True)
    assert {finding.check for finding in verdict.findings} >= {
        "bytes" if experts == "mxfp8" == source.container.name else "codes"
    }


def test_a_stack_stays_in_one_file(source: Checkpoint, tmp_path: Path) -> None:
    """Whatever the limit: its rows come from all over the source, and a header can only list it once."""
    kept = {layer: (1, 3, 6) for layer in source.architecture.moe_layers}
    formats = {unit: "affine3_g32" for unit in source.architecture.units}
    blueprint = Blueprint.of(source, Plan("mlx", kept, formats))
    shards = plan_shards(sorted_pieces(blueprint), 20_000)
    names = [entry.name for shard in shards for entry in shard.entries]
    assert len(shards) > 5 and len(names) == len(set(names))
    assert sum(shard.payload_bytes for shard in shards) == blueprint.payload_bytes
    stack = next(e for shard in shards for e in shard.entries if e.name.endswith("switch_mlp.up_proj.weight"))
    assert stack.shape[0] == 3
