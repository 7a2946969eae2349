"""What every container promises: bits to and fro, headers as announced, and a config that reads back as the plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import deal, write_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS, Packing, container_of
from moesaic.checkpoint.containers.base import DTYPES, pack_bits, siblings, stream_bytes, unpack_bits
from moesaic.errors import CheckpointError, PlanError
from moesaic.formats import Scales

EVERY = [pytest.param(p, id=f"{c.name}-{name}") for c in CONTAINERS.values() for name, p in c.packings.items()]
SHAPES = [(256, 384), (130, 160), (3, 33), (5, 7), (1, 1)]  # whole groups, ragged ones, less than one


def rounded(packing: Packing, shape: tuple[int, int]) -> tuple[torch.Tensor, Scales]:
    format = packing.number_format
    w_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scales = format.scales(w_OI)
    return format.encode(w_OI, scales), scales


def packed(packing: Packing, codes_OI: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
    """With the one tensor that weights do not tell."""
    inputs = {"inputs": torch.tensor([9.0])} if "inputs" in packing.parts(codes_OI.shape) else {}
    return packing.pack(codes_OI, scales) | inputs


@pytest.mark.parametrize("packing", EVERY)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_undoes_pack(packing: Packing, shape: tuple[int, int]) -> None:
    codes_OI, scales = rounded(packing, shape)
    stored = packed(packing, codes_OI, scales)
    for key, part in packing.parts(shape).items():
        assert (stored[key].dtype, stored[key].shape) == (DTYPES[part.dtype], part.shape), key
    assert stored.keys() == packing.parts(shape).keys()
    assert packing.bytes(shape) == sum(t.nbytes for t in stored.values())
    again, found = packing.unpack(stored, shape)
    assert torch.equal(again, codes_OI) and again.dtype == codes_OI.dtype
    for ours, theirs in ((scales.blocks, found.blocks), (scales.shared, found.shared), (scales.offsets, found.offsets)):
        assert (ours is None and theirs is None) or torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("packing", [p for p in EVERY if p.values[0].number_format.element_bits <= 8])
def test_every_code_survives(packing: Packing) -> None:
    """Also the codes that rounding seldom or never gives: −0, NaN, the lowest integer."""
    bits_each = packing.number_format.element_bits
    codes_OI = torch.arange(2**bits_each, dtype=torch.uint8).repeat(3, 1 + 256 // 2**bits_each)
    _, scales = rounded(packing, tuple(codes_OI.shape))
    assert torch.equal(packing.unpack(packed(packing, codes_OI, scales), codes_OI.shape)[0], codes_OI)


def test_one_layout_is_one_run_of_bytes() -> None:
    """`Packing.layout` promises that bytes may be copied from one container to another."""
    by_layout: dict[tuple[str, str], list[Packing]] = {}
    for container in CONTAINERS.values():
        for packing in container.packings.values():
            by_layout.setdefault((packing.format, packing.layout), []).append(packing)
    pairs = [(a, b) for group in by_layout.values() for a in group for b in group if a is not b]
    assert {a.format for a, _ in pairs} >= {"fp8_block", "mxfp8"}  # source bytes, under another name for the scale
    for a, b in pairs:
        stored, other = (p.pack(*rounded(a, (64, 128))) for p in (a, b))
        assert stored.keys() == other.keys() and all(torch.equal(bits(stored[k]), bits(other[k])) for k in stored)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_bit_streams_by_hand() -> None:
    assert pack_bits(codes([1, 2, 15, 0]), 4).tolist() == [[0x21, 0x0F]]  # the even column is the low nibble
    assert pack_bits(codes([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [
        [0xD1, 0x58, 0x1F]
    ]  # 0b000_111_110_101_100_011_010_001
    assert pack_bits(codes([7, 7]), 3, word=4).tolist() == [[0x3F, 0, 0, 0]]  # a row ends in a whole word
    assert pack_bits(codes([3, 0, 1]), 2).tolist() == [[0b00_01_00_11]]
    assert pack_bits(codes([200, 7]), 8).tolist() == [[200, 7]]


def codes(row: list[int]) -> torch.Tensor:
    return torch.tensor([row], dtype=torch.uint8)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.sampled_from((1, 4)), st.integers(0, 2**31))
def test_bit_streams_are_the_binary_number(bits_each: int, rows: int, columns: int, word: int, seed: int) -> None:
    codes_OI = torch.randint(0, 2**bits_each, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    stream = pack_bits(codes_OI, bits_each, word)
    for row, packed in zip(codes_OI.tolist(), stream.tolist()):
        number = sum(code << (i * bits_each) for i, code in enumerate(row))
        assert bytes(packed) == number.to_bytes(stream_bytes(columns, bits_each, word), "little")
    assert torch.equal(unpack_bits(stream, bits_each, columns), codes_OI)


def test_siblings_are_what_servers_fuse(source: Checkpoint) -> None:
    linears = source.architecture.linears
    groups = siblings(linears)
    assert sorted(n.name for group in groups for n in group) == sorted(n.name for n in linears)
    projections = {tuple(n.projection for n in group) for group in groups}
    assert projections <= {("q", "k", "v"), ("q", "k", "v", "index_q", "index_k"), ("gate", "up"), ("o",), ("down",)}
    assert all(len({(n.unit, n.expert) for n in group}) == 1 for group in groups)


PLANS = {
    "compressed_tensors": ("mxfp4", "source"),
    "auto_round": ("int3_g64", "bf16"),
    "gptq": ("int4_g32", "bf16"),
    "mlx": ("affine3_g64", "mxfp8"),
}


@pytest.mark.parametrize("container", PLANS)
def test_a_whole_model_opens_as_planned(source: Checkpoint, container: str, tmp_path: Path) -> None:
    """Names, dtypes and shapes on disk, as the safetensors library sees them, are the inventory's."""
    formats = deal(source, *PLANS[container])
    decoded = write_folder(source, formats, container, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.container.name == container and out.formats == formats
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        seen = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    assert seen == {t.name: (t.dtype, t.shape) for t in out.inventory}
    for name, w_OI in decoded.items():
        assert torch.equal(out.decode(name), w_OI)


def test_sources_keep_their_config_and_refuse_another(minimax: Checkpoint) -> None:
    container, formats = minimax.container, dict(minimax.formats)
    assert container.config(minimax.architecture, formats, minimax.config) == minimax.config["quantization_config"]
    some = minimax.architecture.linears[0].name
    with pytest.raises(PlanError, match="compressed_tensors"):
        container.config(minimax.architecture, formats | {some: "bf16"}, minimax.config)
    with pytest.raises(PlanError, match="as their source is"):
        container.config(
            minimax.architecture, formats, {k: v for k, v in minimax.config.items() if k != "quantization_config"}
        )


def test_a_skip_list_names_whole_words(m2: Checkpoint) -> None:
    config = json.loads(json.dumps(m2.config))
    skip = config["quantization_config"]["modules_to_not_convert"]
    assert "gate" in skip and set(m2.formats.values()) == {"fp8_block"}  # not gate_proj, not w1
    skip.append("self_attn.k_proj")
    formats = m2.container.formats(m2.architecture, config, None)
    assert {n.rsplit(".", 1)[1] for n, f in formats.items() if f == "bf16"} == {"k_proj"}


OTHERS = [("m2", "weight_block_size", [1, 128]), ("m2", "fmt", "float8_e5m2"), ("m3", "weight_block_size", [128, 128])]


@pytest.mark.parametrize(("family", "key", "value"), OTHERS)
def test_another_block_is_refused(family: str, key: str, value: object, request) -> None:
    source = request.getfixturevalue(family)
    config = source.config | {"quantization_config": source.config["quantization_config"] | {key: value}}
    with pytest.raises(CheckpointError, match="moesaic reads"):
        source.container.formats(source.architecture, config, None)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'awq'"):
        container_of({"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(CheckpointError, match="cannot carry affine4_g64"):
        CONTAINERS["compressed_tensors"].packing("affine4_g64")


DAMAGED = [
    ("compressed_tensors", {"config_groups": [1]}, "config_groups"),
    ("compressed_tensors", {"config_groups": {"group_0": None, "group_1": 3}}, "group_1 = 3"),
    ("compressed_tensors", {"config_groups": {"group_0": {"targets": "Linear", "weights": {}}}}, "list of names"),
    ("compressed_tensors", {"config_groups": {"group_0": {"targets": ["Linear"], "weights": []}}}, "moesaic reads"),
    ("compressed_tensors", {"ignore": "re:.*"}, "list of names"),
    (
        "compressed_tensors",
        {"ignore": ["re:(" * 3]},
        r"pattern '\(re:\(re:\(', which is not a valid regular expression",
    ),
    ("auto_round", {"bits": "four", "group_size": 32}, "'bits': 'four'"),
    ("auto_round", {"extra_config": [{}], "bits": 4, "group_size": 32}, "extra_config"),
    ("auto_round", {"extra_config": {"(": {}}, "bits": 4, "group_size": 32}, "pattern '\\('"),
    ("auto_round", {"block_name_to_quantize": 7, "bits": 4, "group_size": 32}, "block_name_to_quantize"),
    ("gptq", {}, "'bits': None"),
    ("gptq", {"bits": 4, "group_size": 128, "dynamic": {"-:[": {}}}, "pattern"),
    ("mlx", {"bits": 4}, "'affine', 4, None"),
    ("mlx", {"bits": 4, "group_size": 64, "mode": ["affine"]}, "moesaic reads"),
]


@pytest.mark.parametrize(("container", "quantization", "match"), DAMAGED)
def test_a_damaged_config_is_one_sentence(
    container: str, quantization: dict[str, object], match: str, m2: Checkpoint
) -> None:
    config = m2.config | dict.fromkeys(CONTAINERS[container].keys, quantization)
    with pytest.raises(CheckpointError, match=match):
        CONTAINERS[container].formats(m2.architecture, config, None)


def test_a_planted_fault_is_seen() -> None:
    """The round trip would not notice a packing that stores nothing; this one drops a bit."""
    packing = CONTAINERS["compressed_tensors"].packing("mxfp4")
    faulty = replace(packing, write=lambda stream_OS, *rest: packing.write(stream_OS & 0x77, *rest))
    with pytest.raises(AssertionError):
        test_unpack_undoes_pack(faulty, (64, 64))
