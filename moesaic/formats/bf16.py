"""BF16: no scales at all. What a source stores, and what is kept where rounding is not wanted."""

import torch
from torch import Tensor

from .base import LARGEST, NumberFormat, Scales, Steps


def fit(w: Tensor, shared: Tensor | None) -> Scales:
    return Scales()


def steps(scales: Scales) -> Steps:
    return ()


def round(w: Tensor) -> Tensor:
    """The 16 bits, as int16. To the nearest, ties to even; the last half step below infinity stays finite."""
    return w.clamp(-LARGEST, LARGEST).bfloat16().view(torch.int16)


def value(codes: Tensor) -> Tensor:
    return codes.view(torch.bfloat16).float()


BF16 = NumberFormat(
    "bf16",
    block=(0, 0),
    element_bits=16,
    scale_bits=0,
    fit=fit,
    steps=steps,
    round=round,
    value=value,
    reference="https://arxiv.org/abs/1905.12322",
)
