"""MXFP8 as MiniMax-M3 releases it: E4M3, and uint8 E8M0 exponents in a tensor named `weight_scale_inv`.

The name promises an inverse and the dtype a number; it is neither. Byte b multiplies its 32 weights
by 2^(b-127). Tools that multiply by the byte itself write weights 917,929 times too large.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import CheckpointError
from ...families import Architecture
from ...formats import FORMATS
from .base import Container, Packing, Part, entries, released
from .fp8 import read_e4m3, skipped, write_e4m3
from .unquantized import BF16


def parts(shape: Sequence[int]) -> dict[str, Part]:
    return {
        "codes": Part("weight", "F8_E4M3", tuple(shape)),
        "blocks": Part("weight_scale_inv", "U8", FORMATS["mxfp8"].grid(shape)),
    }


MXFP8_PACKING = Packing("mxfp8", "e4m3 + e8m0 1x32", parts, write_e4m3, read_e4m3)


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    """mxfp8 for every linear, unless `ignored_layers` names it. Raises `CheckpointError` for another block."""
    quantization = config["quantization_config"]
    if quantization.get("weight_block_size") != [1, 32]:
        raise CheckpointError(
            f"config.json says mxfp8 in blocks {quantization.get('weight_block_size')}; moesaic reads [1, 32]"
        )
    kept = skipped(architecture, entries(quantization, "ignored_layers"))
    return {linear.name: "bf16" if linear.name in kept else "mxfp8" for linear in architecture.linears}


MXFP8 = Container(
    "mxfp8", "mxfp8", {"mxfp8": MXFP8_PACKING, "bf16": BF16}, formats, released("mxfp8", formats),
    "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
)  # fmt: skip
