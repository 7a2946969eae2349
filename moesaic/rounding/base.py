"""What a rounding is: weights to codes and scales, for any number format, and what it has to be told beside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..formats import NumberFormat, Scales

Known = Mapping[str, Tensor]  # what is known about a matrix's inputs, by the names that `needs` uses


@dataclass(frozen=True)
class Rounding:
    """One way to round.

    needs  names of what `round` reads from `known`: "second_moments" (E[x²], [I]), "hessian" (E[xxᵀ], [I, I])
    kernel whether a kernel rounds the same from stored bytes: "" for none, "standard" scales, "searched" ones
    round  (w [O, I] F32, format, second level shared with fused siblings or None, known) -> codes [O, I], Scales
    """

    name: str
    needs: tuple[str, ...]
    round: Callable[[Tensor, NumberFormat, Tensor | None, Known], tuple[Tensor, Scales]]
    reference: str
    kernel: str = ""
