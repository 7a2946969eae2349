"""RTN: scales by the format's standard rule, every weight to its nearest grid point."""

import torch

from ..formats import NumberFormat
from .base import Batch, Rounded, Rounding


def round(batch: Batch, format: NumberFormat) -> Rounded:
    scales = tuple(format.scales(w_OI) for w_OI in batch.w_EOI)
    return Rounded(torch.stack([format.encode(w_OI, s) for w_OI, s in zip(batch.w_EOI, scales)]), scales)


RTN = Rounding("rtn", (), round, "https://arxiv.org/abs/2210.17323", kernel="standard")
