"""MXFP8: E4M3 elements, one power of two (E8M0) for each 32 weights of a row. M3's source."""

import torch
from torch import Tensor

from .base import NumberFormat, Scales, Steps
from .fp8 import e4m3_round, e4m3_value

POWERS = torch.tensor([2.0 ** (b - 127) for b in range(255)] + [float("nan")])  # E8M0: a byte b is 2**(b - 127)

LARGEST_BYTE = 246  # 448 · 2**119 still is an F32; one more and a weight could round to 2**128


def e8m0_steps(scales: Scales) -> Steps:
    """Exact powers of two: the byte 0 is 2**-127, which only F32's subnormals hold; 255 is NaN."""
    assert scales.blocks is not None
    bytes_ = scales.blocks.flatten().int()
    return (POWERS.to(bytes_.device).index_select(0, bytes_).reshape(scales.blocks.shape),)


def float_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def fit(w: Tensor, shared: Tensor | None) -> Scales:
    """The smallest power of two that does not clip: ⌈log2(amax / 448)⌉, read off the bits of amax.

    The OCP text takes ⌊log2 amax⌋ − 8, which clips the top eighth of a binade; E4M3 keeps its three
    bits one binade lower, so clipping buys nothing. And not to clip is what makes re-encoding an MXFP8
    source change no value, whichever of the two rules wrote it.
    """
    bits = float_bits(w.abs().amax(-1))
    above = (bits & 0x7FFFFF) > 0x600000  # 448 is 1.75 · 2**8
    return Scales(((bits >> 23) - 8 + above.int()).clamp(0, LARGEST_BYTE).to(torch.uint8))


def round(w: Tensor, step: Tensor) -> Tensor:
    return e4m3_round(w / step)


def value(codes: Tensor, step: Tensor) -> Tensor:
    return e4m3_value(codes) * step


MXFP8 = NumberFormat(
    "mxfp8",
    block=(1, 32),
    element_bits=8,
    scale_bits=8,
    fit=fit,
    steps=e8m0_steps,
    round=round,
    value=value,
    reference="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    wider=("bf16",),
    token_group=32,
    offered=True,
    tabled=True,
)
