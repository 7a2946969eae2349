"""Symmetric integers of 2, 3, 4 and 8 bits, one BF16 scale for each 32, 64 or 128 weights of a row, or (8) a whole row.

Codes are unsigned as the servers' packings want them: q + 2**(bits − 1) for q from −2**(bits − 1) on.
Leaves out zero points; an offset grid is `affine.py`.
"""

from functools import partial

import torch
from torch import Tensor

from .base import NumberFormat, Scales, Steps, no_candidates, quotient

# Chosen greedily on Gaussian, Laplace and Student-t weights: within 2 % of a sweep of 30 (3 % at 2 bits).
CLIPS = {2: (0.6, 0.5, 0.7, 0.4, 0.8), 3: (0.8, 0.7, 0.9, 0.6, 1.05), 4: (0.9, 0.85, 0.95, 0.8, 1.05), 8: (1.03, 1.06)}
SAFE = 2.0**126  # a larger amax is taken for this: q = −2**(bits − 1) could overflow F32


def fit(w: Tensor, shared: Tensor | None, *, bits: int) -> Scales:
    """amax lands half a step beyond the largest q, so that ±amax clip and round by the same half step."""
    amax = w.abs().amax(-1).clamp(max=SAFE)
    scale = quotient(amax, (2**bits - 1) / 2).bfloat16()
    return Scales(torch.where(scale == 0, 1.0, scale))


def candidates(scales: Scales, *, bits: int) -> tuple[Scales, ...]:
    """Clipping the largest weights for a finer step for the rest."""
    assert scales.blocks is not None
    return tuple(Scales((scales.blocks.float() * clip).bfloat16()) for clip in CLIPS[bits])


def times(scales: Scales, factor: Tensor) -> Scales:
    assert scales.blocks is not None
    return Scales((scales.blocks.float() * factor).bfloat16())


def steps(scales: Scales) -> Steps:
    assert scales.blocks is not None
    return (scales.blocks.float(),)


def round(w: Tensor, step: Tensor, *, bits: int) -> Tensor:
    """To the nearest integer, ties to even."""
    zero = 2 ** (bits - 1)
    return ((w / step).round().clamp(-zero, zero - 1) + zero).to(torch.uint8)


def value(codes: Tensor, step: Tensor, *, bits: int) -> Tensor:
    return (codes.float() - 2 ** (bits - 1)) * step


def integer(bits: int, group: int) -> NumberFormat:
    return NumberFormat(
        f"int{bits}_g{group}" if group else f"int{bits}_channel",
        block=(1, group),
        element_bits=bits,
        scale_bits=16,
        fit=partial(fit, bits=bits),
        steps=steps,
        round=partial(round, bits=bits),
        value=partial(value, bits=bits),
        candidates=partial(candidates, bits=bits) if group else no_candidates,  # a whole row gains 0.1 %
        times=times if group else None,
        reference="https://arxiv.org/abs/2210.17323",
        token_group=None if group else 0,
        offered=bits < 8 and group == 64,
        tabled=bits < 8 and group == 128,
    )


INTEGER = (*(integer(b, g) for b in (2, 3, 4, 8) for g in (32, 64, 128)), integer(8, 0))
