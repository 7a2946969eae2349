"""GPTQ's packing by hand, and what vLLM makes of an auto-round or GPTQ config, by rules written down here again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import deal, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS, Container
from moesaic.errors import CheckpointError, PlanError

AUTO_ROUND, GPTQ = CONTAINERS["auto_round"], CONTAINERS["gptq"]


@pytest.mark.parametrize("format", sorted(set(AUTO_ROUND.packings) - {"bf16"}))
def test_words_by_hand(format: str) -> None:
    """Weight k of row n: `bits` bits from bit k · bits of column n's words, less the zero point, times the group's scale."""
    packing = AUTO_ROUND.packing(format)
    bits, group = packing.number_format.element_bits, packing.number_format.block[1]
    w_OI = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    scales = packing.number_format.scales(w_OI)
    stored = packing.pack(packing.number_format.encode(w_OI, scales), scales)
    ours = packing.decode(stored, w_OI.shape)
    for n in (0, 1, 17, 31):
        words = number(stored["codes"][:, n])
        for k in (0, 10, 31, 33, 127):
            q = words >> (k * bits) & (1 << bits) - 1
            z = (number(stored["zeros"][k // group]) >> (n * bits) & (1 << bits) - 1) + 1  # stored less one
            assert ours[n, k] == (q - z) * stored["blocks"][k // group, n].float()


def number(words: torch.Tensor) -> int:
    """The little-endian number that a run of int32 words spells."""
    return sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))


def test_another_zero_point_or_order_is_refused() -> None:
    packing = GPTQ.packing("int4_g32")
    scales = packing.number_format.scales(torch.ones(8, 64))
    stored = packing.pack(torch.zeros(8, 64, dtype=torch.uint8), scales)
    assert stored["order"].tolist() == [0] * 32 + [1] * 32
    with pytest.raises(CheckpointError, match="qzeros"):
        packing.unpack(stored | {"zeros": stored["zeros"] + 1}, (8, 64))
    with pytest.raises(CheckpointError, match="g_idx"):
        packing.unpack(stored | {"order": stored["order"].flip(0)}, (8, 64))


# Configs -------------------------------------------------------------------------------------------------------------


def holder(source: Checkpoint, linear: Any) -> str:
    """The name by which vLLM 0.32 asks for the module that a linear ends up in, or for the linear within a fused one."""
    name = linear.name if linear.expert is None else linear.name.rsplit(".", 2)[0]
    return name.replace("block_sparse_moe", "mlp") if source.architecture.family == "minimax_m2" else name


def vllm_bits(quantization: dict[str, Any], name: str) -> tuple[int, int]:
    """vLLM 0.32's rule for auto-round: the first pattern that is found anywhere in the name, else the block's default."""
    for pattern, said in quantization["extra_config"].items():
        if re.search(pattern, name):
            return said["bits"], said.get("group_size", -1)
    inside = name.startswith(quantization["block_name_to_quantize"])
    return (quantization["bits"], quantization["group_size"]) if inside else (16, -1)


def plain_qkv(source: Checkpoint, formats: dict[str, str]) -> dict[str, str]:
    return formats | {n.name: "bf16" for n in source.architecture.linears if n.role == "qkv"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_vllm_gives_each_module_its_width(source: Checkpoint, data: st.DataObject) -> None:
    chosen = {
        unit: data.draw(st.sampled_from(sorted(AUTO_ROUND.packings)), label=unit) for unit in source.architecture.units
    }
    formats = plain_qkv(source, {n.name: chosen[n.unit] for n in source.architecture.linears})
    quantization = AUTO_ROUND.config(source.architecture, formats, source.config)
    assert (quantization is None) == (set(formats.values()) == {"bf16"})
    if quantization is None:
        return
    assert quantization["bits"] <= 8  # the Hub's parser refuses more
    for linear in source.architecture.linears:
        bits, group = vllm_bits(quantization, holder(source, linear))
        assert formats[linear.name] == ("bf16" if bits == 16 else f"int{bits}_g{group}")
    others = {t.name.removesuffix(".weight") for t in source.architecture.tensors if t.role in ("vision", "head")}
    assert others and all(vllm_bits(quantization, name)[0] == 16 for name in others)
    again = {"quantization_config": json.loads(json.dumps(quantization))}
    assert AUTO_ROUND.formats(source.architecture, again, None) == formats


def test_patterns_for_single_experts_are_ignored_as_vllm_does(m2: Checkpoint) -> None:
    """Keys that end in a projection leave the layer at the default width, and what is on disk is misread: so we refuse."""
    deep = {
        n.name: "int8_g64" if n.expert is not None and n.layer == 0 else "int4_g64" for n in m2.architecture.linears
    }
    names = frozenset(
        t.name for n in m2.architecture.linears for t in AUTO_ROUND.packing("int4_g64").tensors(n.name, n.shape)
    )
    quantization = AUTO_ROUND.config(m2.architecture, deep, m2.config)
    assert quantization and AUTO_ROUND.formats(m2.architecture, {"quantization_config": quantization}, names) == deep
    quantization["extra_config"] = {r".*layers\.0\..*experts\.\d+\.(w1|w2|w3)$": {"bits": 8, "group_size": 64}}
    found = AUTO_ROUND.formats(m2.architecture, {"quantization_config": quantization}, None)
    assert set(found.values()) == {"int4_g64"}


@pytest.mark.parametrize(("key", "value"), [("sym", False), ("bits", 5), ("data_type", "mx_fp"), ("group_size", 256)])
def test_another_kind_is_refused(m2: Checkpoint, key: str, value: object) -> None:
    formats = dict.fromkeys(m2.formats, "int4_g128")
    for container in (AUTO_ROUND, GPTQ):
        quantization = container.config(m2.architecture, formats, m2.config)
        assert quantization
        if container is AUTO_ROUND or key != "data_type":
            with pytest.raises(CheckpointError, match="moesaic reads"):
                container.formats(m2.architecture, {"quantization_config": quantization | {key: value}}, None)
    with pytest.raises(CheckpointError, match="auto_awq"):
        awq = {"packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 128}
        AUTO_ROUND.formats(m2.architecture, {"quantization_config": awq}, None)


def test_plans_that_no_engine_loads_are_refused(m2: Checkpoint, m3: Checkpoint) -> None:
    def config(container: Container, source: Checkpoint, formats: dict[str, str]) -> object:
        return container.config(source.architecture, formats, source.config)

    uniform = dict.fromkeys(m3.formats, "int4_g32")
    with pytest.raises(PlanError, match=r"layers\.1\.qkv holds an indexer"):
        config(AUTO_ROUND, m3, uniform)
    assert config(GPTQ, m3, uniform) and config(AUTO_ROUND, m3, plain_qkv(m3, uniform))
    first = m2.architecture.linears[0].name
    uniform = dict.fromkeys(m2.formats, "int4_g32")
    for container in (AUTO_ROUND, GPTQ):
        with pytest.raises(PlanError, match=r"layers\.0\.qkv would mix bf16 and int4_g32"):
            config(container, m2, uniform | {first: "bf16"})
    experts = {n.name: "int8_g32" if n.expert is not None else "int4_g32" for n in m2.architecture.linears}
    with pytest.raises(PlanError, match=r"int4_g32, int8_g32; write auto_round"):
        config(GPTQ, m2, experts)
    narrow = m2.family.read(m2.config | {"intermediate_size": 96})
    with pytest.raises(PlanError, match=r"matrix of 256 × 96.*groups of 64"):
        AUTO_ROUND.config(narrow, dict.fromkeys(m2.formats, "int4_g64"), m2.config)


@pytest.mark.parametrize(("experts", "rest"), [("int4_g32", "int4_g32"), ("bf16", "int8_g64"), ("int8_g128", "bf16")])
def test_gptq_reads_back(source: Checkpoint, experts: str, rest: str, tmp_path: Path) -> None:
    formats = deal(source, experts, rest)
    write_folder(source, formats, "gptq", tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.formats == formats
    dynamic = out.config["quantization_config"]["dynamic"]
    for linear in source.architecture.linears:  # vLLM: re.match on the module that holds it; a "-:" leaves it alone
        skipped = any(re.match(key.removeprefix("-:"), holder(source, linear)) for key in dynamic)
        assert skipped == (formats[linear.name] == "bf16")
