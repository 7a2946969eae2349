"""MLX's grid: codes of 2, 3, 4, 5, 6 or 8 bits, value = code · scale + offset, both BF16, each 32, 64 or 128 weights.

The scale may be negative: code 0 is the end of the range that is farther from zero, so that end is exact.
"""

from functools import partial

import torch
from torch import Tensor

from .base import NumberFormat, Scales, Steps, quotient

EPS = 1e-7  # MLX's smallest scale
SAFE = 2.0**126  # weights beyond are taken for this: code · scale could overflow F32


def fit(w: Tensor, shared: Tensor | None, *, bits: int) -> Scales:
    """Spread the range over all codes, then bend the scale so that zero falls on a code."""
    low, high = w.amin(-1).clamp(-SAFE, SAFE), w.amax(-1).clamp(-SAFE, SAFE)
    far_is_low = low.abs() > high.abs()
    edge = torch.where(far_is_low, low, high)
    scale = quotient(high - low, 2**bits - 1).clamp(min=EPS)
    scale = torch.where(far_is_low, scale, -scale)
    zero_code = (edge / scale).round()
    scale = torch.where(zero_code == 0, scale, edge / zero_code)
    offset = torch.where(zero_code == 0, 0.0, edge)
    return Scales(scale.bfloat16(), offsets=offset.bfloat16())


def times(scales: Scales, factor: Tensor) -> Scales:
    assert scales.blocks is not None and scales.offsets is not None
    return Scales((scales.blocks.float() * factor).bfloat16(), offsets=(scales.offsets.float() * factor).bfloat16())


def steps(scales: Scales) -> Steps:
    assert scales.blocks is not None and scales.offsets is not None
    return scales.blocks.float(), scales.offsets.float()


def round(w: Tensor, step: Tensor, offset: Tensor, *, bits: int) -> Tensor:
    """To the nearest code under the scale *as stored*; MLX itself rounds under the one before BF16."""
    return ((w - offset) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)


def value(codes: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    return codes.float() * step + offset


def affine(bits: int, group: int) -> NumberFormat:
    return NumberFormat(
        f"affine{bits}_g{group}",
        block=(1, group),
        element_bits=bits,
        scale_bits=32,
        fit=partial(fit, bits=bits),
        steps=steps,
        round=partial(round, bits=bits),
        value=value,
        times=times,
        tabled=bits < 5 and group == 64,  # mlx-lm's own default group
        reference="https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html",
    )


AFFINE = tuple(affine(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128))
