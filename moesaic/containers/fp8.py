"""FP8 in 128×128 blocks, as DeepSeek-V3 and MiniMax-M2 release it: E4M3, and an F32 `weight_scale_inv` that multiplies.

`modules_to_not_convert` may name modules that are no linears (`gate`, `lm_head`) and does not name
the embedding, which is BF16 all the same: so it is read only to refuse a linear that it would cover.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families import Architecture
from ..formats import FORMATS, Scales
from .base import Container, Packing, Part, codes_as_bytes
from .unquantized import BF16


def parts(shape: Sequence[int]) -> dict[str, Part]:
    return {
        "codes": Part("weight", "F8_E4M3", tuple(shape)),
        "blocks": Part("weight_scale_inv", "F32", FORMATS["fp8_block"].grid(shape)),
    }


def pack(codes_OI: Tensor, scales: Scales) -> dict[str, Tensor]:
    assert scales.blocks is not None
    return {"codes": codes_OI.view(torch.float8_e4m3fn), "blocks": scales.blocks}


def unpack(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
    return codes_as_bytes(stored["codes"]), Scales(stored["blocks"])


FP8_BLOCK = Packing("fp8_block", "e4m3 + f32 128x128", parts, pack, unpack)


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    """fp8_block for every linear, unless `modules_to_not_convert` names it. Raises `CheckpointError` for another block."""
    quantization = config["quantization_config"]
    if (
        quantization.get("weight_block_size") != [128, 128]
        or quantization.get("fmt", "float8_e4m3fn") != "float8_e4m3fn"
    ):
        raise CheckpointError(
            f"config.json says fp8 in blocks {quantization.get('weight_block_size')} of {quantization.get('fmt')}; "
            "moesaic reads [128, 128] of float8_e4m3fn"
        )
    kept = quantization.get("modules_to_not_convert", [])
    return {
        linear.name: "bf16" if any(covers(entry, linear.name) for entry in kept) else "fp8_block"
        for linear in architecture.linears
    }


def covers(entry: str, module: str) -> bool:
    """Whether an entry of a skip list names a module: whole dotted parts, so that `gate` is not `gate_proj`."""
    return f".{entry}." in f".{module}."


def config(architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]) -> dict[str, Any] | None:
    return dict(source["quantization_config"])


FP8 = Container(
    "fp8", "fp8", {"fp8_block": FP8_BLOCK, "bf16": BF16}, formats, config,
    "https://huggingface.co/MiniMaxAI/MiniMax-M2.7/blob/main/config.json",
)  # fmt: skip
