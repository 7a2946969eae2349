"""The same values in another format, code by code: what makes a change of container no rounding.

Integers are affine codes whose offset is −2^(bits − 1) scales. A group may be cut into smaller ones under one
scale. Every point of MXFP4's grid is one of MXFP8's, and both are powers of two away from BF16. Nothing here looks
for a nearest value: what another format does not hold is refused. Leaves out how codes lie on disk (containers).
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import PlanError
from . import FORMATS
from .base import Scales

GROUPS = (128, 64, 32)
GRID = re.compile(r"(int|affine)(\d)_(?:g(\d+)|channel)")


def twins(format: str) -> list[str]:
    """Formats that can hold the values of `format`, itself first, then the nearest in size.

    An affine format maps to the integer format when its offsets are symmetric; `recode` refuses the others.
    """
    if (found := GRID.fullmatch(format)) is None:
        return [format, *(FORMATS[format].wider if format in FORMATS else ())]
    kind, bits, group = found[1], found[2], int(found[3] or 0)
    kinds = (kind, "affine" if kind == "int" else "int")
    names = [f"{k}{bits}_g{g}" for g in GROUPS if not group or g <= group for k in kinds]
    return list(dict.fromkeys([format, *(name for name in names if name in FORMATS)]))


def recode(what: str, source: str, format: str, codes_OI: Tensor, scales: Scales) -> tuple[Tensor, Scales]:
    """Codes and scales of `format`, one of the twins of `source`, that mean exactly the same values.

    Raises `PlanError`, naming the matrix as `what`, where they do not exist.
    """
    if format == source:
        return codes_OI, scales
    if format == "bf16":
        w_OI = FORMATS[source].decode(codes_OI, scales)
        codes, same = FORMATS["bf16"].encode(w_OI, Scales()), Scales()
        if torch.equal(FORMATS["bf16"].decode(codes, same), w_OI):
            return codes, same
        raise PlanError(f"{what} holds {source} values too small for BF16; keep it in {source}")
    if format in FORMATS[source].wider:
        return widened(source, format).to(codes_OI.device)[codes_OI.int()], scales
    return codes_OI, regrouped(what, source, format, scales, codes_OI.shape[1])


def widened(source: str, format: str) -> Tensor:
    """Code -> the code of the same point of a grid under the same scales."""
    narrow, one = FORMATS[source], torch.ones(1)
    return FORMATS[format].round(narrow.value(torch.arange(1 << narrow.element_bits), one), one)


def regrouped(what: str, source: str, format: str, scales: Scales, columns: int) -> Scales:
    """Scales of an integer or affine matrix for smaller groups, with or without the offsets."""
    old, new = FORMATS[source], FORMATS[format]
    assert scales.blocks is not None and columns % new.block[1] == 0
    width = old.block[1] or columns
    groups = torch.arange(columns // new.block[1], device=scales.blocks.device) * new.block[1] // width
    blocks, offsets = scales.blocks[:, groups], None if scales.offsets is None else scales.offsets[:, groups]
    zero = -(2.0 ** (new.element_bits - 1))
    if format.startswith("affine"):
        offsets = (blocks.float() * zero).bfloat16() if offsets is None else offsets
    elif offsets is not None:
        if not torch.equal(offsets.float(), blocks.float() * zero):
            raise PlanError(
                f"{what} is in {source} with ranges that are not centred on zero, and {format} has no offsets; "
                "keep it in mlx, which has them"
            )
        offsets = None
    return replace(scales, blocks=blocks.contiguous(), offsets=None if offsets is None else offsets.contiguous())
