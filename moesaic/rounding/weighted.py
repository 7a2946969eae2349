"""Weighted: search where the error of a column counts by the mean square of its input; what `search` is with data.

An importance matrix, as llama.cpp calls it. Leaves out what inputs have to do with each other: that is GPTQ.
"""

import torch

from ..formats import NumberFormat
from ..formats.base import no_candidates
from .base import Batch, Rounded, Rounding
from .gptq import blended, gains, raised, reported
from .search import searched


def round(batch: Batch, format: NumberFormat) -> Rounded:
    """Mean squares are the diagonal of the Hessian that GPTQ takes: pool, damping and errors are the same."""
    blends = [blended(batch, e) for e in range(len(batch.w_EOI))]
    scales = [searched(w_OI, format, h_II.diagonal()) for w_OI, (h_II, _, _) in zip(batch.w_EOI, blends)]
    codes_EOI = torch.stack([format.encode(w_OI, s) for w_OI, s in zip(batch.w_EOI, scales)])
    if format.times is not None and format.candidates is not no_candidates:
        value_EOI = Rounded(codes_EOI, tuple(scales)).values(format)
        gain_EO = [
            gains(w_OI.float(), v_OI - w_OI, h_II) for w_OI, v_OI, (h_II, _, _) in zip(batch.w_EOI, value_EOI, blends)
        ]
        scales = list(raised(scales, gain_EO, format))
    _, damping_E, pooled_E = zip(*blends)
    return Rounded(codes_EOI, tuple(scales), reported(damping_E, pooled_E))


WEIGHTED = Rounding("weighted", ("hessian_EII",), round, "https://github.com/ggml-org/llama.cpp/pull/4861")
