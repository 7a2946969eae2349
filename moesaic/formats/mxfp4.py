"""MXFP4: E2M1 elements (0, ½, 1, 1½, 2, 3, 4, 6 and a sign), one power of two (E8M0) for each 32 weights of a row."""

import torch
from torch import Tensor

from .base import NumberFormat, Scales
from .mxfp8 import e8m0_steps, float_bits

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

# The largest F32 that still rounds to index 0, 1, … 6: midpoints go to the even index, so every other one lies above.
_HALVES = (E2M1[1:] + E2M1[:-1]) / 2
_UP_TO = torch.where(torch.arange(7) % 2 == 0, _HALVES, _HALVES.nextafter(torch.zeros(7)))


def e2m1_round(x: Tensor) -> Tensor:
    """F32 to the nearest E2M1, ties to even; beyond 6 stays 6; −0 keeps its sign. Codes: index | sign << 3."""
    index = torch.bucketize(x.abs(), _UP_TO.to(x.device), out_int32=True)
    return (index | (x.signbit().int() << 3)).to(torch.uint8)


def e2m1_value(codes: Tensor) -> Tensor:
    return torch.cat([E2M1, -E2M1]).to(codes.device)[codes.int()]


def fit(w: Tensor, shared: Tensor | None) -> Scales:
    """⌊log2 amax⌋ − 2, the OCP rule: the largest weight lands in [4, 8), and what is over 6 is clipped to it.

    The next exponent has only every other point, but also 8. So up to 7 no weight is nearer to its grid:
    for a source in MXFP8 that was clipped at 448 (7 · 2**6) this rule is best weight by weight.
    """
    exponent = float_bits(w.abs().amax(-1)) >> 23
    return Scales((exponent - 2).clamp(min=0).to(torch.uint8))


def candidates(scales: Scales) -> tuple[Scales]:
    """The next power of two, which does not clip. On real weights no third exponent wins."""
    assert scales.blocks is not None
    return (Scales(scales.blocks + 1),)


def round(w: Tensor, step: Tensor) -> Tensor:
    return e2m1_round(w / step)


def value(codes: Tensor, step: Tensor) -> Tensor:
    return e2m1_value(codes) * step


MXFP4 = NumberFormat(
    "mxfp4",
    block=(1, 32),
    element_bits=4,
    scale_bits=8,
    fit=fit,
    steps=e8m0_steps,
    round=round,
    value=value,
    candidates=candidates,
    reference="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    wider=("mxfp8", "bf16"),
    token_group=32,
    offered=True,
    tabled=True,
)
