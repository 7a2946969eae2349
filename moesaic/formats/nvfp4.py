"""NVFP4: E2M1 elements, an E4M3 scale for each 16 weights of a row, and one F32 for the matrix.


The F32 is shared by matrices that a server fuses (q/k/v, w1/w3), and is stored as compressed-tensors
does: as the number to *divide* by, 448 · 6 / amax. NVIDIA's own files hold its inverse, 1 / 2688 of amax.
"""

import torch
from torch import Tensor

from .base import NumberFormat, Scales, Steps, quotient
from .fp8 import E4M3, E4M3_MAX
from .mxfp4 import e2m1_round, e2m1_value

NEIGHBOURS = (1, -1, 2, -2, 3, -3, 4, 5, 6)
SMALLEST_SCALE = 2.0**-9  # E4M3's first subnormal; a scale of 0 would divide by zero


def share(amax: Tensor) -> Tensor:
    """The divisor that brings the largest scale to 448. Where F32 cannot hold it (amax below 8e-36), 1: all is zero."""
    divisor = amax.float().reciprocal() * (E4M3_MAX * 6.0)  # two roundings, as compressed-tensors has
    return torch.where(divisor.isinf(), 1.0, divisor).reshape(-1)


def fit(w: Tensor, shared: Tensor | None) -> Scales:
    """The largest weight of a block lands near 6: scale = E4M3(amax / 6 · shared)."""
    assert shared is not None
    ideal = quotient(w.abs().amax(-1), 6.0) * shared
    return Scales(ideal.clamp(SMALLEST_SCALE, E4M3_MAX).to(E4M3), shared)


def steps(scales: Scales) -> Steps:
    assert scales.blocks is not None and scales.shared is not None
    return (scales.blocks.float() / scales.shared,)


def candidates(scales: Scales) -> tuple[Scales, ...]:
    """The neighbouring E4M3 codes, −3 … +6: as good as any finer sweep, since nothing else can be stored."""
    assert scales.blocks is not None
    code = scales.blocks.view(torch.uint8).int()
    codes = ((code + k).clamp(1, 126).to(torch.uint8) for k in NEIGHBOURS)
    return tuple(Scales(c.view(E4M3), scales.shared) for c in codes)


def round(w: Tensor, step: Tensor) -> Tensor:
    return e2m1_round(w / step)


def value(codes: Tensor, step: Tensor) -> Tensor:
    return e2m1_value(codes) * step


NVFP4 = NumberFormat(
    "nvfp4",
    block=(1, 16),
    element_bits=4,
    scale_bits=8,
    fit=fit,
    steps=steps,
    round=round,
    value=value,
    share=share,
    candidates=candidates,
    reference="https://arxiv.org/abs/2509.25149",
    token_group=16,
    offered=True,
    tabled=True,
)
