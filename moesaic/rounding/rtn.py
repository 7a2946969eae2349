"""RTN: scales by the format's standard rule, every weight to its nearest grid point."""

from torch import Tensor

from ..formats import NumberFormat, Scales
from .base import Known, Rounding


def round(w_OI: Tensor, format: NumberFormat, shared: Tensor | None, known: Known) -> tuple[Tensor, Scales]:
    scales = format.scales(w_OI, shared)
    return format.encode(w_OI, scales), scales


RTN = Rounding("rtn", (), round, "https://arxiv.org/abs/2210.17323", kernel="standard")
