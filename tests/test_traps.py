"""Traps of engines' loaders that no other file holds: silent ones above all, where a wrong folder loads without a word.

Others stand where their matter is: names and fused matrices in test_compressed_tensors, zero points and the holder
of experts in test_gptq, stacks in test_mlx, cuts between devices in test_fit_parallel, planted faults in tests/engines.
"""

import json
import re
from pathlib import Path

import pytest
from folders import deal, write_folder
from transformers import AutoConfig

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.errors import CheckpointError, PlanError
from moesaic.export import export
from moesaic.families import FAMILIES
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint

CT = CONTAINERS["compressed_tensors"]
EVERY = {
    "compressed_tensors": ("mxfp4", "source"), "auto_round": ("int3_g64", "bf16"), "gptq": ("int4_g32", "bf16"),
    "mlx": ("affine4_g64", "mxfp8"),
}  # fmt: skip


def nothing(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


@pytest.mark.parametrize("container", EVERY)
def test_config_is_one_that_hub_and_libraries_parse(source: Checkpoint, container: str, tmp_path: Path) -> None:
    """Strict JSON, read by transformers to the same values, and no key but the container's own has changed."""
    write_folder(source, deal(source, *EVERY[container]), container, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text, parse_constant=nothing)
    keys = CONTAINERS[container].keys
    assert {k: v for k, v in config.items() if k not in keys} == {
        k: v for k, v in source.config.items() if k not in source.container.keys
    }
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert read.model_type == source.config["model_type"]
    wanted, said = config[keys[-1]], read.to_dict()["quantization_config"]
    assert said == wanted
    assert set(wanted) - {"quantization_status", "quant_method"} and all(isinstance(key, str) for key in wanted)


@pytest.mark.parametrize(
    ("experts", "rest"), [("mxfp4", "source"), (["nvfp4", "int3_g64"], "bf16"), ("int4_g32", "mxfp8")]
)
def test_no_pattern_matches_nothing(source: Checkpoint, experts: str | list[str], rest: str) -> None:
    """Every target and ignored name is one that vLLM, the disk or transformers knows a module by."""
    a = source.architecture
    formats = deal(source, experts, rest)
    quantization = CT.config(a, formats, source.config)
    assert quantization is not None
    engine = FAMILIES[a.family].engine.name_of
    names = {name for n in a.linears for name in (n.name, engine(n.name))}
    names |= {t.name.removesuffix(".weight") for t in a.tensors}
    names |= {name.replace("language_model.model.", "model.language_model.") for name in names}  # transformers' order
    names |= {re.sub(r"block_sparse_moe\.shared_experts", "mlp.shared_experts", name) for name in names}
    names |= {re.sub(r"(gate|up)_proj$", "gate_up_proj", name) for name in names}
    names |= {re.sub(r"index_([qk])_proj$", r"indexer.\1_proj", name) for name in names}
    patterns = [t for group in quantization["config_groups"].values() for t in group["targets"]] + quantization[
        "ignore"
    ]
    for pattern in patterns:
        assert pattern.startswith("re:") and any(re.match(pattern[3:], name) for name in names), pattern


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_a_fused_matrix_is_ignored_whole_or_not_at_all(source: Checkpoint, projection: str) -> None:
    quantization = CT.config(source.architecture, deal(source, "mxfp4", "mxfp8"), source.config)
    assert quantization is not None
    quantization["ignore"].append(rf"re:.*self_attn\.{projection}$")
    with pytest.raises(CheckpointError, match=r"qkv, which engines fuse"):
        CT.formats(source.architecture, {"quantization_config": quantization}, None)


def test_fp8_blocks_of_a_family_that_was_not_released_so_are_refused(m3: Checkpoint) -> None:
    """vLLM's M3 classes rename `weight_scale_inv`, and would drop every scale of quant_method fp8 without a word."""
    squares = {n.name: "fp8_block" for n in m3.architecture.linears}
    with pytest.raises(PlanError, match="fp8 throughout, as their source is; choose compressed_tensors"):
        CONTAINERS["fp8"].config(m3.architecture, squares, m3.config)


def test_one_count_of_experts_in_every_layer(m2: Checkpoint) -> None:
    """vLLM reads one count for the model, and no `moe_sparsity_config`."""
    with pytest.raises(PlanError, match=r"keeps \[3, 4\] experts in different layers"):
        Plan("compressed_tensors", {0: (0, 1, 2), 1: (0, 1, 2, 3)})
    kept = {layer: (0, 1, 2) for layer in m2.architecture.moe_layers}
    assert Blueprint.of(m2, Plan("compressed_tensors", kept)).config["num_local_experts"] == 3


def test_keys_that_vllm_asks_for_stay(minimax: Checkpoint, tmp_path: Path) -> None:
    """Without scoring_func, use_routing_bias and rotary_dim M2 routes and rotates otherwise; M3 loads as its wrapper alone."""
    units = {u: "mxfp4" for u, members in minimax.architecture.units.items() if members[0].role == "experts"}
    out = export(minimax, Plan("compressed_tensors", {}, units), tmp_path / "out", quiet=True)
    text = out.config.get("text_config", out.config)
    assert text["scoring_func"] == "sigmoid" and text["use_routing_bias"] is True and "rotary_dim" in text
    assert out.config["architectures"] == minimax.config["architectures"]
    assert out.config["model_type"] in ("minimax_m2", "minimax_m3_vl")
