"""Exports of every family but MiniMax in transformers 5.23's own loader: our values, and what it refuses.

transformers knows no model_type kimi_k2, so Kimi-K2 is loaded as the DeepSeek-V3 that it is; and of K2.5's tower it reads
the sizes under names of its own alone, so they are added. Correction biases come out as they are on disk, in F32, whatever
the model is asked for in.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import loads
import pytest
import replica
import torch
import transformers
from folders import deal, reword_tower, write_folder
from safetensors.torch import load_file, save_file
from test_transformers_loads import B16, ENGINE, F32, WHY, worst
from transformers import (
    DeepseekV3ForCausalLM,
    Glm4MoeForCausalLM,
    Glm4MoeLiteForCausalLM,
    Kimi_K25ForConditionalGeneration,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)

from moesaic.checkpoint import Checkpoint
from moesaic.export import export
from moesaic.plan import Plan

CLASSES: dict[str, type[PreTrainedModel]] = {
    "qwen3_moe": Qwen3MoeForCausalLM, "olmoe": OlmoeForCausalLM, "mixtral": MixtralForCausalLM, "glm4_moe": Glm4MoeForCausalLM,
    "glm4_moe_lite": Glm4MoeLiteForCausalLM, "deepseek_v3": DeepseekV3ForCausalLM, "kimi_k2": DeepseekV3ForCausalLM,
    "kimi_k25": Kimi_K25ForConditionalGeneration,
}  # fmt: skip
FAMILY = pytest.mark.parametrize("family", CLASSES)
CONTAINER, COLUMNS = "compressed_tensors", f"compressed_tensors{loads.OTHERS}"
LOADS = [
    ("mxfp4", "mxfp8", B16), ("int4_g64", "int4_g64", B16), ("fp8_channel", "fp8_channel", F32),
    *(pytest.param(experts, "bf16", B16, marks=pytest.mark.long) for experts in ("mxfp4", "int4_g64")),
]  # fmt: skip


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: Checkpoint.open(replica.make(root / family, family)))


def load(path: Path, family: str, dtype: torch.dtype) -> PreTrainedModel:
    transformers.utils.logging.set_verbosity_error()
    if family == "kimi_k2":
        config = json.loads((path / "config.json").read_text()) | {"model_type": "deepseek_v3"}
        (path / "config.json").write_text(json.dumps(config))
    reword_tower(path)
    model, report = CLASSES[family].from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():  # dense modules are decompressed by the first forward pass
        assert model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits.isfinite().all()
    return model


def said_of(family: str) -> str:
    """What a row says, with what had to be reworded."""
    return {"kimi_k2": "yes, as deepseek_v3", "kimi_k25": "yes, reworded"}.get(family, "yes")


def check(model: PreTrainedModel, source: Checkpoint, dtype: torch.dtype, decoded: dict[str, torch.Tensor]) -> None:
    assert worst(model, source, decoded, dtype) == 0.0
    assert torch.equal(model.get_output_embeddings().weight, source.read(source.architecture.head).to(dtype))
    theirs = {name: t for name, t in model.named_buffers() if name.endswith("e_score_correction_bias")}
    ours = [r.correction for r in source.architecture.routers.values() if r.correction]
    assert len(theirs) == len(ours)
    for name, bias in zip(ours, theirs.values()):
        assert torch.equal(bias, source.read(name)) and bias.dtype == F32


@pytest.mark.parametrize(("experts", "rest", "dtype"), LOADS)
@FAMILY
def test_transformers_loads_our_values(
    family: str, experts: str, rest: str, dtype: torch.dtype, source_of, tmp_path: Path, record_property: loads.Record
) -> None:
    source = source_of(family)
    decoded = write_folder(source, deal(source, experts, rest), CONTAINER, tmp_path / "out")
    check(load(tmp_path / "out", family, dtype), source, dtype, decoded)
    said = said_of(family) if dtype == B16 else f"{said_of(family)}, in float32; BF16 rounds F32 scales"
    loads.note(record_property, ENGINE, family, COLUMNS, experts, rest, said)


@pytest.mark.parametrize("rest", ["bf16", "mxfp8"])
@FAMILY
def test_transformers_loads_what_was_pruned(
    family: str, rest: str, source_of, tmp_path: Path, record_property: loads.Record
) -> None:
    """Of a model of BF16 too, in no container."""
    a, source = source_of(family).architecture, source_of(family)
    kept = {layer: tuple(range(1, a.experts, 2)) for layer in a.moe_layers}
    formats = {u: "mxfp4" if members[0].role == "experts" else rest for u, members in a.units.items()}
    plan = Plan("unquantized", kept) if rest == "bf16" else Plan(CONTAINER, kept, formats)
    with torch.no_grad():
        out = export(source, plan, tmp_path / "out", quiet=True)
    check(load(out.path, family, B16), out, B16, {n.name: out.decode(n.name) for n in out.architecture.linears})
    columns, experts = (COLUMNS, "mxfp4") if rest != "bf16" else (f"unquantized{loads.OTHERS}", "bf16")
    loads.note(record_property, ENGINE, family, columns, f"{experts}, half of them", rest, said_of(family))


@FAMILY
def test_transformers_is_known_to_refuse(family: str, source_of, tmp_path: Path, record_property: loads.Record) -> None:
    """FP8 squares of experts. A newer one that can load them will fail here: then tell the user."""
    source = source_of(family)
    write_folder(source, deal(source, "fp8_block", "bf16"), CONTAINER, tmp_path / "out")
    with pytest.raises(RuntimeError, match="conversion of the weights") as refusal:
        load(tmp_path / "out", family, B16)
    why = next(why for said, why in WHY.items() if said in str(refusal.value))
    loads.note(record_property, ENGINE, family, COLUMNS, "fp8_block", "bf16", f"refused: {why}")


def swap_experts(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("weight_packed", "weight_scale"):
        one, two = (f"model.layers.1.mlp.experts.{expert}.up_proj.{part}" for expert in (2, 3))
        tensors[one], tensors[two] = tensors[two], tensors[one]


def round_the_correction(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].bfloat16().float()


@pytest.mark.parametrize("fault", [swap_experts, round_the_correction])
def test_the_check_can_fail(fault: Callable[[dict[str, torch.Tensor]], None], source_of, tmp_path: Path) -> None:
    source, file = source_of("glm4_moe"), tmp_path / "out" / "model.safetensors"
    decoded = write_folder(source, deal(source, "mxfp4", "mxfp8"), CONTAINER, tmp_path / "out")
    tensors = load_file(file)
    fault(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AssertionError):
        check(load(tmp_path / "out", "glm4_moe", B16), source, B16, decoded)
