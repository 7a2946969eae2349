"""Search: of the scales that a format can store, those of least squared error; every weight to its nearest grid point.

Such values fall short of the weights, so scales are raised until they no longer do (`NumberFormat.unshrunk`): at 2 bits
that takes half of the KL and more away, at 4 up to a tenth. A kernel does the same from stored bytes. With data, errors
count by their inputs: `weighted.py`.
"""

import torch
from torch import Tensor

from ..formats import NumberFormat, Scales
from ..formats.base import no_candidates
from ..kernels import cpu
from .base import Batch, Rounded, Rounding, of_rows
from .rtn import round as nearest

CHUNK = 1 << 18  # weights looked at in one go: a cache holds them, while every candidate passes by


def searched(w_OI: Tensor, format: NumberFormat, moments_I: Tensor | None = None) -> Scales:
    """`format.search` from its standard scales on, some rows at a time; or by a kernel that does the same."""
    if moments_I is None and w_OI.device.type == "cpu" and cpu.searches(format):
        return cpu.search(w_OI, format)
    scales, rows = format.scales(w_OI), format.block[0] or len(w_OI)
    step = rows * max(1, CHUNK // (rows * w_OI.shape[1]))
    parts = [
        format.search(w_OI[start : start + step], of_rows(scales, start, start + step, format), moments_I)
        for start in range(0, len(w_OI), step)
    ]
    blocks = [part.blocks for part in parts if part.blocks is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Scales(torch.cat(blocks) if blocks else None, scales.shared, torch.cat(offsets) if offsets else None)


def round(batch: Batch, format: NumberFormat) -> Rounded:
    """A format without candidates leaves nothing to choose: its weights go to their nearest, by its standard scales."""
    if format.candidates is no_candidates:
        return nearest(batch, format)
    scales = [searched(w_OI, format) for w_OI in batch.w_EOI]
    codes_EOI = torch.stack([format.encode(w_OI, s) for w_OI, s in zip(batch.w_EOI, scales)])
    return Rounded(codes_EOI, tuple(format.unshrunk(*each) for each in zip(batch.w_EOI, codes_EOI, scales)))


SEARCH = Rounding("search", (), round, "https://arxiv.org/abs/2606.07618", kernel="searched", informed="weighted")
