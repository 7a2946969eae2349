"""FP8 in 128×128 blocks: E4M3, and a `weight_scale_inv` that multiplies, in F32 (DeepSeek, GLM, MiniMax) or BF16 (Qwen).

`modules_to_not_convert` names modules that are no linears of ours (`gate`, `lm_head`) and not the embedding,
which is BF16 all the same: so it says which linears are BF16, and nothing about the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...families import Architecture
from ...formats import FORMATS, Scales
from .base import Container, Packing, Part, entries, released
from .unquantized import BF16


def parts(shape: Sequence[int]) -> dict[str, Part]:
    return {
        "codes": Part("weight", "F8_E4M3", tuple(shape)),
        "blocks": Part("weight_scale_inv", "F32", FORMATS["fp8_block"].grid(shape)),
    }


def write_e4m3(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
    assert scales.blocks is not None
    return {"codes": stream_OS.view(torch.float8_e4m3fn), "blocks": scales.blocks}


def read_e4m3(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
    return stored["codes"].view(torch.uint8), Scales(stored["blocks"])


FP8_BLOCK = Packing("fp8_block", "e4m3 + f32 128x128", parts, write_e4m3, read_e4m3)


KINDS = ("float8_e4m3fn", "e4m3")  # two names of one format


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    """fp8_block for every linear, unless `modules_to_not_convert` names it.

    Raises `CheckpointError` for another block or another kind of FP8.
    """
    quantization = config["quantization_config"]
    block, kind = quantization.get("weight_block_size"), quantization.get("fmt", "float8_e4m3fn")
    if block != [128, 128] or kind not in KINDS:
        raise CheckpointError(
            f"config.json says fp8 in blocks {block} of {kind}; moesaic reads [128, 128] of {' or '.join(KINDS)}"
        )
    kept = skipped(architecture, entries(quantization, "modules_to_not_convert"))
    return {linear.name: "bf16" if linear.name in kept else "fp8_block" for linear in architecture.linears}


def skipped(architecture: Architecture, entries: Sequence[str]) -> set[str]:
    """The linears that a skip list names. An entry stands for whole dotted parts, so that `gate` is not `gate_proj`."""
    words = {word for linear in architecture.linears for word in linear.name.split(".")}
    possible = [entry for entry in entries if words.issuperset(entry.split("."))]  # a routers-only list drops out here
    return {n.name for n in architecture.linears if any(f".{entry}." in f".{n.name}." for entry in possible)}


FP8 = Container(
    "fp8", "fp8", {"fp8_block": FP8_BLOCK, "bf16": BF16}, formats, released("fp8", formats),
    "https://huggingface.co/MiniMaxAI/MiniMax-M2.7/blob/main/config.json",
    dtypes={"weight_scale_inv": ("F32", "BF16", "F16")},
)  # fmt: skip
