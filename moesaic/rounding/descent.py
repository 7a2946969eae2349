"""Descent: GPTQ, then every column again, in the light of all the others instead of those before it alone.

Each step is the exact minimum over one column, so the error Σ error · H · errorᵀ never rises; it is coordinate
descent as in CDQuant (Nair and Suggala). With H_jk / H_kk in the place of GPTQ's factor it is GPTQ's own sweep.
Leaves out moving scales: held to the outputs' error it gains another per cent or two, for twice the code.
"""

import torch

from ..formats import NumberFormat
from .base import Batch, Rounded, Rounding
from .gptq import Ordered, compensated, finished, sweep

SWEEPS = 2  # the first gains 4 to 12 %, the second 1 to 4 %, a third 1 %


def round(batch: Batch, format: NumberFormat) -> Rounded:
    """As GPTQ's, and as much time again for each sweep. Memory: beside the batch, E · (3 I² + 5 I O) F32 numbers."""
    ordered = Ordered.of(batch)
    codes_EIO, scales, error_EIO = compensated(ordered, batch.w_EOI, format)
    pull_EII = ordered.hessian_EII / ordered.hessian_EII.diagonal(dim1=1, dim2=2)[..., None]
    for _ in range(SWEEPS):
        flow_EIO = torch.bmm(pull_EII, error_EIO) - error_EIO
        codes_EIO, _ = sweep(ordered, pull_EII, format, scales, flow_EIO, error_EIO)
        error_EIO += flow_EIO
    return finished(ordered, format, codes_EIO, scales, error_EIO)


DESCENT = Rounding("descent", ("hessian_EII",), round, "https://arxiv.org/abs/2406.17542")
