"""compressed-tensors exports against the code that will read them: the library's own decompressor and matcher, vLLM's
and vLLM's rules as vLLM states them. (tests/test_transformers_loads.py opens them in transformers.)"""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_named_modules
from folders import deal, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, MiniMaxM2ForCausalLM, MiniMaxM3SparseForConditionalGeneration, MixtralForCausalLM
from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.checkpoint.containers.compressed_tensors import PACKINGS, SCHEMES
from moesaic.errors import CheckpointError, PlanError
from moesaic.export import export
from moesaic.families import Architecture
from moesaic.plan import Plan

CONTAINER = CONTAINERS["compressed_tensors"]
CLASSES = {
    "minimax_m2": MiniMaxM2ForCausalLM, "minimax_m3_vl": MiniMaxM3SparseForConditionalGeneration, "mixtral": MixtralForCausalLM,
}  # fmt: skip


def described(source: Checkpoint, formats: dict[str, str]) -> dict[str, Any]:
    quantization = CONTAINER.config(source.architecture, formats, source.config)
    assert quantization is not None
    return quantization


def read_back(source: Checkpoint, quantization: dict[str, Any], names: frozenset[str] | None = None) -> dict[str, str]:
    return CONTAINER.formats(source.architecture, {"quantization_config": quantization}, names)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SCHEMES)
def test_their_decompressor_gives_our_values(format: str) -> None:
    """Bit for bit, in the dtype that the library computes in (BF16 for most formats)."""
    packing, scheme = PACKINGS[format], SCHEMES[format]
    w_OI = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 256)[:, None]
    scales = packing.number_format.scales(w_OI)
    stored = packing.pack(packing.number_format.encode(w_OI, scales), scales) | {"inputs": torch.tensor([9.0])}
    state = {part.suffix: stored[key] for key, part in packing.parts(w_OI.shape).items()}
    compressor = BaseCompressor.get_value_from_registry(scheme.wire)
    theirs = compressor.decompress(state, QuantizationScheme.model_validate(scheme.group(["Linear"])))["weight"]
    ours = packing.decode(stored, w_OI.shape)
    assert torch.equal(theirs, ours.to(theirs.dtype))
    assert theirs.dtype == torch.float32 or format not in ("fp8_block", "fp8_channel")


def test_every_format_has_a_scheme() -> None:
    assert set(SCHEMES) == set(PACKINGS) - {"bf16"}


def test_a_wrong_weight_shape_is_seen() -> None:
    packing = PACKINGS["int4_g32"]
    scales = packing.number_format.scales(torch.ones(8, 64))
    stored = packing.pack(torch.zeros(8, 64, dtype=torch.uint8), scales)
    with pytest.raises(CheckpointError, match=r"weight_shape says \[8, 128\]"):
        packing.unpack(stored | {"shape": torch.tensor([8, 128])}, (8, 64))


def test_source_bytes_stay(minimax: Checkpoint, tmp_path: Path) -> None:
    write_folder(minimax, deal(minimax, "mxfp4"), "compressed_tensors", tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    kept = [n for n in minimax.architecture.linears if n.expert is None]
    assert kept
    for linear in kept:
        for suffix, theirs in (("weight", "weight"), ("weight_scale", "weight_scale_inv")):
            ours, old = out.read(f"{linear.name}.{suffix}"), minimax.read(f"{linear.name}.{theirs}")
            assert torch.equal(ours.view(torch.uint8), old.view(torch.uint8)) and ours.dtype == old.dtype


def test_siblings_share_one_divisor(source: Checkpoint, tmp_path: Path) -> None:
    """vLLM applies w1's to w3 as well, and the largest of q, k, v to all of them."""
    dense = "nvfp4" if source.architecture.family == "minimax_m2" else "source"
    write_folder(source, deal(source, "nvfp4", dense), "compressed_tensors", tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    own = 0
    for expert in out.architecture.experts_of.values():
        gate, up, down = (out.read(f"{expert[p].name}.weight_global_scale") for p in ("gate", "up", "down"))
        largest = max(source.decode(expert[p].name).abs().max() for p in ("gate", "up"))
        assert gate == up == 448 * 6 / largest  # a divisor
        own += int(gate != down)
    assert own


# Names ---------------------------------------------------------------------------------------------------------------


def engine_names(architecture: Architecture) -> dict[str, str]:
    """vLLM 0.32's name of each module (of experts: of expert 0) -> our linear, spelled out here a second time."""
    found = {}
    for n in architecture.linears:
        if n.expert:
            continue
        if architecture.family == "mixtral":
            found[n.name] = n.name
        elif architecture.family == "minimax_m2":
            found[n.name.replace("block_sparse_moe", "mlp")] = n.name
        else:
            default = {".w1": ".gate_proj", ".w2": ".down_proj", ".w3": ".up_proj"}
            found[n.name[:-3] + default[n.name[-3:]] if n.expert == 0 else n.name] = n.name
    return found


def vllm_group(quantization: dict[str, Any], name: str) -> str | None:
    """The config group that vLLM would choose: `ignore` first, then the first target that matches from the start."""

    def match(target: str) -> bool:
        return re.match(target[3:], name) is not None if target.startswith("re:") else target == name

    if any(match(entry) for entry in quantization["ignore"]):
        return None
    return next((key for key, g in quantization["config_groups"].items() if any(map(match, g["targets"]))), None)


MIXES = [
    ("mxfp4", "source"),
    ("mxfp4", "bf16"),
    ("nvfp4", "source"),
    ("int4_g32", "int4_g32"),
    (["nvfp4", "mxfp4", "int3_g64"], "source"),
    (["bf16", "int2_g32"], "int8_channel"),
]


@pytest.mark.parametrize(("experts", "rest"), MIXES)
def test_vllm_gives_each_module_its_format(source: Checkpoint, experts: str | list[str], rest: str) -> None:
    formats = deal(source, experts, rest)
    quantization = described(source, formats)
    for engine, ours in engine_names(source.architecture).items():
        group = vllm_group(quantization, engine)
        if formats[ours] == "bf16":
            assert group is None, engine
        else:
            assert group is not None, engine
            assert quantization["config_groups"][group]["format"] == SCHEMES[formats[ours]].wire
            weights = quantization["config_groups"][group]["weights"]
            assert weights.items() >= SCHEMES[formats[ours]].weights.items()


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize(("experts", "rest"), [MIXES[0], MIXES[4], MIXES[5]])
def test_their_decompressor_gives_our_values_of_an_export(
    source: Checkpoint, experts: str | list[str], rest: str, pruned: bool, tmp_path: Path
) -> None:
    """Every matrix, under the scheme that config.json gives it, parsed by the library."""
    a, dealt = source.architecture, deal(source, experts, rest)
    kept = {layer: tuple(range(1, a.experts, 2)) for layer in a.moe_layers} if pruned else {}
    formats = {unit: dealt[members[0].name] for unit, members in a.units.items()}
    out = export(source, Plan("compressed_tensors", kept, formats), tmp_path / "out", quiet=True)
    schemes = QuantizationConfig.model_validate(out.config["quantization_config"]).config_groups
    engine = {ours: name for name, ours in engine_names(out.architecture).items()}
    seen = 0
    for linear in out.architecture.linears:
        first = linear if not linear.expert else out.architecture.experts_of[linear.layer, 0][linear.projection]
        group = vllm_group(out.config["quantization_config"], engine[first.name])
        if group is None:
            assert out.formats[linear.name] == "bf16"
            continue
        parts = PACKINGS[out.formats[linear.name]].parts(linear.shape).values()
        state = {part.suffix: out.read(f"{linear.name}.{part.suffix}") for part in parts}
        compressor = BaseCompressor.get_value_from_registry(schemes[group].format)
        theirs = compressor.decompress(state, schemes[group])["weight"]
        assert torch.equal(theirs, out.decode(linear.name).to(theirs.dtype)), linear.name
        seen += 1
    assert seen >= len(a.linears) // 5


def test_nothing_else_is_matched(source: Checkpoint) -> None:
    """Routers, head, embedding, norms and vision, by the names of the disk and by vLLM's."""
    quantization = described(source, deal(source, "mxfp4"))
    others = {t.name.removesuffix(".weight") for t in source.architecture.tensors}
    others |= {name.replace("block_sparse_moe", "mlp") for name in others}
    others |= {re.sub(r"(q|k|v)_proj$", "qkv_proj", name) for name in others if "vision" in name}
    assert all(vllm_group(quantization, name) is None for name in others)
    matrices = {
        t.name.removesuffix(".weight") for t in source.architecture.tensors if t.role in ("router", "head", "vision")
    }
    ignored = [re.compile(entry.removeprefix("re:")) for entry in quantization["ignore"]]
    assert all(any(entry.match(name) for entry in ignored) for name in matrices)


@pytest.mark.parametrize(("experts", "rest"), MIXES)
def test_transformers_matches_exactly_its_linears(source: Checkpoint, experts: str | list[str], rest: str) -> None:
    """compressed-tensors' own matcher, on transformers' modules: those that hold our dense linears, and no other."""
    formats = deal(source, experts, rest)
    quantization = described(source, formats)
    with torch.device("meta"):
        model = CLASSES[source.architecture.family](AutoConfig.from_pretrained(source.path))
    wanted: dict[str, str] = {}
    prefix = "model.language_model.layers." if source.architecture.family == "minimax_m3_vl" else "model.layers."
    for layer in range(source.architecture.layers):
        for theirs, ours in source.family.wiring.parameters(source.architecture, layer).items():
            if (linear := source.architecture.by_name.get(ours[0].removesuffix(".weight"))) is not None:
                wanted[f"{prefix}{layer}.{theirs.removesuffix('.weight')}"] = formats[linear.name]
    found = {}
    for group in quantization["config_groups"].values():
        for name, module in match_named_modules(model, group["targets"], quantization["ignore"]):
            assert isinstance(module, torch.nn.Linear) and name not in found
            found[name] = group["format"]
    assert found == {name: SCHEMES[format].wire for name, format in wanted.items() if format != "bf16"}


@pytest.mark.parametrize(("experts", "rest"), MIXES[:4])
def test_transformers_takes_the_right_group_for_experts(source: Checkpoint, experts: str, rest: str) -> None:
    """Its rule: the first group with a regular expression that says "experts"; dense is the first without."""
    quantization = described(source, deal(source, experts, rest))
    parsed = QuantizationConfig.model_validate(quantization)
    assert get_experts_scheme(parsed).format == SCHEMES[experts].wire
    dense = source.formats[source.architecture.linears[0].name] if rest == "source" else rest
    if dense != "bf16":
        assert get_dense_scheme(parsed).format == SCHEMES[dense].wire
    says = [any("experts" in target for target in g["targets"]) for g in quantization["config_groups"].values()]
    assert says == sorted(says, reverse=True) and sum(says) == 1


def test_patterns_stay_few(source: Checkpoint) -> None:
    """Layers are alternatives of one expression, experts \\d+: the config does not grow with the model."""
    quantization = described(source, deal(source, ["mxfp4", "nvfp4"]))
    assert sum(len(g["targets"]) for g in quantization["config_groups"].values()) <= 10
    assert len(json.dumps(quantization)) < 5000


# Reading -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_plan_reads_back(source: Checkpoint, data: st.DataObject) -> None:
    carried = sorted(set(PACKINGS) - {"nvfp4", "nvfp4_a4", "fp8_block"})  # these do not fit every unit
    chosen = {unit: data.draw(st.sampled_from(carried), label=unit) for unit in source.architecture.units}
    formats = {n.name: chosen[n.unit] for n in source.architecture.linears}
    quantization = CONTAINER.config(source.architecture, formats, source.config)
    assert (quantization is None) == (set(chosen.values()) == {"bf16"})
    if quantization is not None:
        assert read_back(source, json.loads(json.dumps(quantization))) == formats


def test_what_others_write_is_read(m2: Checkpoint) -> None:
    """One group for the class Linear, format above it, exact names ignored: llm-compressor's usual config."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "actorder": None,
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "model.layers.0.self_attn.o_proj"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    formats = read_back(m2, quantization)
    assert {name for name, format in formats.items() if format == "bf16"} == {"model.layers.0.self_attn.o_proj"}
    assert set(formats.values()) == {"int4_g128", "bf16"}
    with pytest.raises(CheckpointError, match=r"'symmetric': False.*moesaic reads"):
        weights["symmetric"] = False
        read_back(m2, quantization)


def edited(quantization: dict[str, Any], edit: Callable[[str], str]) -> dict[str, Any]:
    """A config with every target rewritten."""
    found = deepcopy(quantization)
    for group in found["config_groups"].values():
        group["targets"] = [edit(target) for target in group["targets"]]
    return found


def on_disk(source: Checkpoint, formats: dict[str, str]) -> frozenset[str]:
    linears = source.architecture.linears
    return frozenset(t.name for n in linears for t in PACKINGS[formats[n.name]].tensors(n.name, n.shape))


def test_targets_in_the_names_of_the_disk_are_caught(m2: Checkpoint) -> None:
    """vLLM would find no scheme for the experts, leave them BF16 and drop what is on disk."""
    formats = deal(m2, "mxfp4")
    names, good = on_disk(m2, formats), described(m2, formats)
    assert read_back(m2, good, names) == formats
    bad = edited(good, lambda target: target.replace(r"\.mlp\.", r"\.block_sparse_moe\."))
    with pytest.raises(CheckpointError, match=r"weight_packed.*names that the engine knows"):
        read_back(m2, bad, names)


def test_targets_without_default_projection_names_are_caught(m3: Checkpoint) -> None:
    formats = deal(m3, "mxfp4")
    names, good = on_disk(m3, formats), described(m3, formats)
    assert read_back(m3, good, names) == formats
    bad = edited(good, lambda target: re.sub(r"experts(.*)\(.*\)", r"experts\1(w1|w2|w3)", target))
    with pytest.raises(CheckpointError, match="weight_packed"):
        read_back(m3, bad, names)


def test_an_indexer_apart_from_qkv_is_caught(m3: Checkpoint) -> None:
    quantization = described(m3, deal(m3, "mxfp4"))
    quantization["ignore"].append(r"re:.*index_(q|k)_proj$")
    with pytest.raises(CheckpointError, match=r"layers\.\d+\.qkv, which engines fuse"):
        read_back(m3, quantization)


def test_projections_apart_are_caught(m2: Checkpoint) -> None:
    quantization = described(m2, deal(m2, "mxfp4"))
    nvfp4 = SCHEMES["nvfp4"].group([r"re:.*experts\.\d+\.w3$"])
    quantization["config_groups"] = {"first": nvfp4, **quantization["config_groups"]}
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts, which engines fuse"):
        read_back(m2, quantization)


def test_tensors_of_another_format_are_caught(source: Checkpoint) -> None:
    quantization = described(source, deal(source, "mxfp4"))
    with pytest.raises(CheckpointError, match=r"mxfp4 for an engine.*hold weight_global_scale"):
        read_back(source, quantization, on_disk(source, deal(source, "nvfp4")))


# What is refused -----------------------------------------------------------------------------------------------------


def test_plans_that_no_engine_loads_are_refused(m2: Checkpoint, m3: Checkpoint) -> None:
    def config(source: Checkpoint, formats: dict[str, str]) -> object:
        return CONTAINER.config(source.architecture, formats, source.config)

    with pytest.raises(PlanError, match=r"layers\.1\.qkv holds an indexer"):
        config(m3, deal(m3, "mxfp4", "nvfp4"))
    assert config(m2, deal(m2, "mxfp4", "nvfp4"))
    one = m2.architecture.linears[1].name
    with pytest.raises(PlanError, match=r"layers\.0\.qkv would mix fp8_block and mxfp8"):
        config(m2, deal(m2, "mxfp4") | {one: "mxfp8"})
    narrow = m2.family.read(m2.config | {"intermediate_size": 96})
    formats = {n.name: "int4_g64" if n.expert is not None else "bf16" for n in narrow.linears}  # names do not change
    with pytest.raises(PlanError, match=r"layers\.0\.experts has rows of 96 weights.*int4_g64's 64"):
        CONTAINER.config(narrow, formats, m2.config)
    with pytest.raises(PlanError, match=r"experts\.0\.w1 has 96 rows and another matrix is fused below"):
        CONTAINER.config(narrow, {n: "fp8_block" for n in formats}, m2.config)
    ragged = m2.family.read(m2.config | {"hidden_size": 200})  # the last square of a matrix, or of a row, may be ragged
    assert CONTAINER.config(ragged, {n: "fp8_block" for n in formats}, m2.config)


def test_no_format_at_all_is_no_config(source: Checkpoint) -> None:
    assert CONTAINER.config(source.architecture, deal(source, "bf16", "bf16"), source.config) is None
