"""FP8: E4M3 elements under an F32 scale, one a square of 128 × 128 (M2's source has these) or one an output row.

Leaves out how servers round activations, and E5M2, which nobody stores weights in.
"""

import torch
from torch import Tensor

from .base import NumberFormat, Scales, Steps, quotient

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def e4m3_round(x: Tensor) -> Tensor:
    """F32 to the bits of the nearest E4M3, ties to even; beyond 448 stays 448. Codes uint8."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8)


def e4m3_value(codes: Tensor) -> Tensor:
    return codes.view(E4M3).float()


def fit(w: Tensor, shared: Tensor | None) -> Scales:
    """The largest weight of a block lands on 448. An empty block, or one F32 cannot divide, gets 1."""
    scale = quotient(w.abs().amax(-1), E4M3_MAX)
    return Scales(torch.where(scale == 0, 1.0, scale))


def steps(scales: Scales) -> Steps:
    assert scales.blocks is not None
    return (scales.blocks,)


def round(w: Tensor, step: Tensor) -> Tensor:
    return e4m3_round(w / step)


def value(codes: Tensor, step: Tensor) -> Tensor:
    return e4m3_value(codes) * step


FP8 = tuple(
    NumberFormat(
        name,
        block=block,
        element_bits=8,
        scale_bits=32,
        fit=fit,
        steps=steps,
        round=round,
        value=value,
        reference=reference,
        token_group=block[1],
    )
    for name, block, reference in (
        ("fp8_block", (128, 128), "https://arxiv.org/abs/2412.19437"),
        ("fp8_channel", (1, 0), "https://arxiv.org/abs/2209.05433"),
    )
)
