"""Search: of the scales that a format can store, those of least error; every weight to its nearest grid point.

The error of a column counts by the mean square of its input, where that is known. Without data it is the
plain squared error, and a kernel does the same from stored bytes.
"""

import torch

from ..formats import NumberFormat
from .base import Batch, Rounded, Rounding


def round(batch: Batch, format: NumberFormat) -> Rounded:
    moments = [None] * len(batch.w_EOI) if batch.moments_EI is None else list(batch.moments_EI)
    scales = tuple(format.search(w_OI, format.scales(w_OI), m_I) for w_OI, m_I in zip(batch.w_EOI, moments))
    return Rounded(torch.stack([format.encode(w_OI, s) for w_OI, s in zip(batch.w_EOI, scales)]), scales)


SEARCH = Rounding("search", (), round, "https://arxiv.org/abs/2606.07618", kernel="searched")
