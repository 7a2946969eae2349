"""Damage in stored tensors: NaN and infinities anywhere, and scales that no rule for scales gives.

What is legal, and decoded as it stands:
    E8M0         every byte but 255; 0 is 2^-127
    F32 scale    any number above zero, subnormal ones too (their weights are next to nothing); zero over codes that are
                 all zero
    negative     scales of integer and affine grids: MLX, AutoRound and llama.cpp turn a block round to reach its largest
                 weight; offsets, of course
What is not:
    E8M0 255     NaN (OCP Microscaling Formats, 1.0)
    E4M3 7F, FF  NaN, as a code or as a scale
    any float    NaN or infinite
    FP8, NVFP4   a negative scale (NVFP4's are unsigned by definition; an FP8 scale is a largest magnitude over 448), and
                 a zero F32 scale over codes that are not zero: nobody could have divided by it
Leaves out magnitudes that only a misread scale gives (`Checkpoint.check_magnitude`): those need the whole matrix.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .containers.base import Packing

CHUNK = 1 << 18  # elements at a time: what is made of them stays in the cache
BITS: dict[
    torch.dtype, tuple[type[np.signedinteger], int, int]
] = {  # bits without sign, and the first that is no number
    torch.bfloat16: (np.int16, 0x7FFF, 0x7F80),
    torch.float16: (np.int16, 0x7FFF, 0x7C00),
    torch.float32: (np.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (np.int64, (1 << 63) - 1, 0x7FF << 52),
    torch.float8_e4m3fn: (np.int8, 0x7F, 0x7F),
}
SIGNED = ("int", "affine")  # how formats begin whose scales may be negative


def not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite, by their bits: some 2 GB a second, in no memory. CPU; 0 for integers."""
    if tensor.dtype == torch.float8_e8m0fnu:
        return int((tensor.reshape(-1).view(torch.uint8) == 255).sum())
    if tensor.dtype not in BITS:
        return 0
    kind, mask, first = BITS[tensor.dtype]
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind)
    buffer, found = np.empty(min(CHUNK, bits.size), kind), 0
    for start in range(0, bits.size, CHUNK):
        part = bits[start : start + CHUNK]
        plain = np.bitwise_and(part, kind(mask), out=buffer[: part.size])
        if plain.max() >= first:
            found += int((plain >= first).sum())
    return found


def nan_or_infinite(tensor: Tensor) -> str:
    """What of a tensor is no number, in words: "3 NaN among 512 values, the first at [0, 7]"; "" where all are numbers."""
    if not not_finite(tensor):
        return ""
    values = tensor.cpu().float() if tensor.itemsize == 1 else tensor.cpu()
    nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
    what = " and ".join(f"{count:,} {name}" for count, name in ((nan, "NaN"), (inf, "infinite")) if count)
    return f"{what} among {values.numel():,} values, the first {place(~values.isfinite())}"


def place(wrong: Tensor) -> str:
    return f"at {wrong.nonzero()[0].tolist()}"


def damaged_scales(packing: Packing, parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Which part of a matrix holds scales that cannot be right, and what they are. Costs no look at the codes."""
    signed = packing.format.startswith(SIGNED)
    for key in ("blocks", "shared", "offsets", "inputs"):
        if (part := parts.get(key)) is None:
            continue
        part = part.cpu()
        if part.dtype == torch.uint8:  # bits of E8M0, or as MLX has NVFP4's, of E4M3
            part = part.view(torch.float8_e8m0fnu if packing.format.startswith("mx") else torch.float8_e4m3fn)
        if what := nan_or_infinite(part):
            return key, what
        if key != "offsets" and not signed and bool((wrong := part.float() < 0).any()):
            return key, f"{int(wrong.sum()):,} negative scales among {part.numel():,}, the first {place(wrong)}"
        if key == "shared" and not bool(part.all()):
            return key, "a scale of zero, which is divided by"
    whole = packing.format.startswith("fp8") and "codes" in parts
    return zero_scales(packing, parts) if whole else None


def zero_scales(packing: Packing, parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """FP8 scales of zero over codes that are not."""
    blocks = parts["blocks"].cpu()
    if bool(blocks.all()):
        return None
    codes_OI = parts["codes"].cpu().view(torch.uint8) & 127
    wrong = (blocks == 0) & packing.number_format.blocks(codes_OI).any(-1).reshape(blocks.shape)
    if not bool(wrong.any()):
        return None
    count = f"{int(wrong.sum()):,} scales of zero among {blocks.numel():,}"
    return "blocks", f"{count} over codes that are not zero, the first {place(wrong)}"


def damage(packing: Packing, parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """As `damaged_scales`, and with a look at every code."""
    if (found := damaged_scales(packing, parts)) is not None:
        return found
    what = nan_or_infinite(parts["codes"].cpu()) if "codes" in parts else ""
    return ("codes", what) if what else None
