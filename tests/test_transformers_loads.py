"""Exports in transformers 5.23's own loader: where it gives our values, and where it is known not to."""

from pathlib import Path

import loads
import pytest
import torch
import transformers
from folders import deal, write_folder
from transformers import MiniMaxM2ForCausalLM, MiniMaxM3SparseForConditionalGeneration, MixtralForCausalLM

from moesaic.checkpoint import Checkpoint
from moesaic.export import export
from moesaic.plan import Plan

CLASSES = {
    "minimax_m2": MiniMaxM2ForCausalLM, "minimax_m3_vl": MiniMaxM3SparseForConditionalGeneration, "mixtral": MixtralForCausalLM,
}  # fmt: skip


def load(path: Path, family: str, dtype: torch.dtype) -> torch.nn.Module:
    transformers.utils.logging.set_verbosity_error()
    model, report = CLASSES[family].from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.arange(1, 9)[None]  # dense modules are decompressed by the first forward pass
    choice = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # released M2 configs ask for MTP modules, which no released file holds: with them generate() refuses
    choice |= {} if family == "mixtral" else {"use_mtp": False}
    assert model.generate(ids, max_new_tokens=2, **choice).shape == (1, 10)
    return model


def worst(model: torch.nn.Module, source: Checkpoint, decoded: dict[str, torch.Tensor], dtype: torch.dtype) -> float:
    """Largest difference of a parameter from our values, relative to the largest weight of its matrix."""
    theirs, a = dict(model.named_parameters()), source.architecture
    prefix = "model.layers." if "vision_config" not in source.config else "model.language_model.layers."
    wanted = {}
    for layer in range(a.layers):
        for name, ours in source.family.wiring.parameters(a, layer).items():
            if ours[0].removesuffix(".weight") in decoded:
                wanted[f"{prefix}{layer}.{name}"] = torch.cat([decoded[n.removesuffix(".weight")] for n in ours])
    for layer in a.moe_layers:
        experts = [{p: decoded[n.name] for p, n in a.experts_of[layer, e].items()} for e in range(a.experts)]
        wanted[f"{prefix}{layer}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([e["gate"], e["up"]]) for e in experts]
        )
        wanted[f"{prefix}{layer}.mlp.experts.down_proj"] = torch.stack([e["down"] for e in experts])
    assert sum(w.numel() for w in wanted.values()) == sum(n.elements for n in a.linears)
    return max(
        float((theirs[k].detach().float() - w.to(dtype).float()).abs().max() / w.abs().max()) for k, w in wanted.items()
    )


def name_of(source: Checkpoint) -> str:
    return {"minimax_m2": "m2", "minimax_m3_vl": "m3"}.get(source.architecture.family, source.architecture.family)


ENGINE = f"transformers {transformers.__version__.rsplit('.', 1)[0]}"
F32, B16 = torch.float32, torch.bfloat16
LOADS = [
    ("m2", "int4_g32", "int4_g32", B16),
    ("m2", "int3_g64", "int8_g128", B16),
    ("m2", "mxfp4", "mxfp4", B16),
    ("m2", "mxfp4", "bf16", B16),
    ("m2", "mxfp4", "mxfp8", B16),
    ("m2", "mxfp4", "source", F32),
    ("m2", "fp8_channel", "fp8_channel", F32),
    ("mixtral", "mxfp4", "bf16", B16),
    ("mixtral", "int4_g32", "int4_g32", B16),
    ("m3", "mxfp4", "mxfp4", B16),
    ("m3", "mxfp4", "source", B16),
    ("m3", "int2_g32", "source", B16),
    ("m3", "fp8_channel", "fp8_channel", F32),
]


@pytest.mark.parametrize(("family", "experts", "rest", "dtype"), LOADS)
def test_transformers_loads_our_values(
    family: str, experts: str, rest: str, dtype: torch.dtype, request, tmp_path, record_property
) -> None:
    source = request.getfixturevalue(family)
    decoded = write_folder(source, deal(source, experts, rest), "compressed_tensors", tmp_path / "out")
    assert worst(load(tmp_path / "out", source.architecture.family, dtype), source, decoded, dtype) == 0.0
    said = "yes" if dtype == B16 else "yes, in float32; BF16 rounds F32 scales"
    loads.note(record_property, ENGINE, family, "compressed_tensors", experts, rest, said)


def test_transformers_in_bf16_rounds_scales_that_are_f32(m2: Checkpoint, tmp_path: Path) -> None:
    """FP8 rests are exact in float32 alone: with dtype=bfloat16 the loader casts weight_scale before it multiplies."""
    decoded = write_folder(m2, deal(m2, "mxfp4"), "compressed_tensors", tmp_path / "out")
    assert 0 < worst(load(tmp_path / "out", "minimax_m2", B16), m2, decoded, B16) < 2**-7


def test_transformers_rounds_integers(m2: Checkpoint, tmp_path: Path, record_property) -> None:
    """It multiplies them by their scales in BF16, whatever it is asked for."""
    decoded = write_folder(m2, deal(m2, "int3_g64"), "compressed_tensors", tmp_path / "out")
    assert 0 < worst(load(tmp_path / "out", "minimax_m2", F32), m2, decoded, F32) < 2**-8
    said = "in float32 to BF16's rounding of integers"
    loads.note(record_property, ENGINE, "m2", "compressed_tensors", "int3_g64", "source", said)


@torch.no_grad()
def test_transformers_loads_what_was_pruned(source: Checkpoint, tmp_path: Path, record_property) -> None:
    a = source.architecture
    kept = {layer: tuple(range(1, a.experts, 2)) for layer in a.moe_layers}
    formats = {u: "mxfp4" if members[0].role == "experts" else "mxfp8" for u, members in a.units.items()}
    out = export(source, Plan("compressed_tensors", kept, formats), tmp_path / "out", quiet=True)
    decoded = {linear.name: out.decode(linear.name) for linear in out.architecture.linears}
    assert worst(load(out.path, a.family, B16), out, decoded, B16) == 0.0
    loads.note(record_property, ENGINE, name_of(source), "compressed_tensors", "mxfp4, half of them", "mxfp8")


CT = "compressed_tensors"
REFUSES = [
    ("m3", CT, "int4_g32", "int4_g32"),  # it concatenates weight_shape of gate and up
    ("m3", CT, "mxfp4", "bf16"), ("m2", CT, "mxfp8", "mxfp8"), ("m3", CT, "mxfp8", "mxfp8"), ("m2", CT, "fp8_block", "fp8_block"),
    ("m2", CT, "int8_channel", "int8_channel"), ("m2", CT, ["mxfp4", "int4_g32"], "source"),
    ("m3", CT, ["mxfp4", "int4_g32"], "source"), ("m2", CT, ["bf16", "int2_g32"], "int8_channel"),
    ("m2", "auto_round", "int4_g32", "int4_g32"), ("m2", "gptq", "int4_g32", "int4_g32"), ("m3", "gptq", "int4_g32", "int4_g32"),
    ("m2", "mlx", "affine4_g32", "affine8_g32"), ("m3", "mlx", "affine4_g32", "affine8_g32"),
]  # fmt: skip
WHY = {
    "conversion of the weights": "its own conversion fails",
    "ignore_mismatched_sizes": "it expects other shapes",
    "requires auto-round": "it wants the library auto-round",
    "requires optimum": "it wants the library optimum",
    "no `quant_method`": "the container is none of its own",
}


@pytest.mark.parametrize(("family", "container", "experts", "rest"), REFUSES)
def test_transformers_is_known_to_refuse(
    family: str, container: str, experts: str | list[str], rest: str, request, tmp_path, record_property
) -> None:
    """Which exports transformers 5.23 cannot open. A newer one that can will fail here: then tell the user."""
    source = request.getfixturevalue(family)
    write_folder(source, deal(source, experts, rest), container, tmp_path / "out")
    with pytest.raises((RuntimeError, ImportError, ValueError), match="|".join(WHY)) as refusal:
        load(tmp_path / "out", source.architecture.family, B16)
    why = next(why for said, why in WHY.items() if said in str(refusal.value))
    loads.note(record_property, ENGINE, family, container, experts, rest, f"refused: {why}")


def test_transformers_is_known_to_misread_nvfp4_experts(minimax: Checkpoint, tmp_path: Path, record_property) -> None:
    """It leaves the divisor out, without a word: experts come out hundreds to thousands of times too large."""
    decoded = write_folder(minimax, deal(minimax, "nvfp4"), "compressed_tensors", tmp_path / "out")
    times = worst(load(tmp_path / "out", minimax.architecture.family, B16), minimax, decoded, B16)
    assert times > 100
    said = "**wrong values**: it leaves weight_global_scale out, without a word"
    loads.note(record_property, ENGINE, name_of(minimax), CT, "nvfp4", "source", said)


def test_transformers_is_known_to_drop_divisors_of_activations(
    minimax: Checkpoint, tmp_path: Path, record_property
) -> None:
    write_folder(minimax, deal(minimax, "nvfp4_a4"), "compressed_tensors", tmp_path / "out")
    with pytest.raises(AssertionError, match=r"unexpected_keys.*input_global_scale"):
        load(tmp_path / "out", minimax.architecture.family, B16)
    said = "**wrong values**: it drops input_global_scale"
    loads.note(record_property, ENGINE, name_of(minimax), CT, "nvfp4_a4", "source", said)
