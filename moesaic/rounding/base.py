"""What a rounding is: weights to codes and scales, for any number format, and what it has to be told beside.

Matrices come in batches: the experts of a layer have one shape, and a GPU wants them side by side. Those
that a server fuses (gate and up of one expert; q, k and v) see the same inputs and may share a second level
of scale, so here they are one matrix, stacked by rows (`stacked`, `split`). Leaves out where inputs come from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..formats import NumberFormat, Scales


@dataclass(frozen=True)
class Batch:
    """E matrices of one shape, and what is known of the vectors that each multiplies. What is not known is None.

    tokens_E     how many vectors of one size would tell as much as those that the means below are taken over
    hessian_EII  E[x xᵀ], F32
    pool_EII     E[x xᵀ] over all tokens of the layer, as each matrix would see them if every token came to it;
                 [1, I, I] where that is one for all. What few tokens leave open is taken from there.
    names        of the matrices, for errors
    """

    w_EOI: Tensor
    tokens_E: Tensor | None = None
    hessian_EII: Tensor | None = None
    pool_EII: Tensor | None = None
    names: tuple[str, ...] = ()

    def name(self, e: int) -> str:
        return self.names[e] if self.names else f"matrix {e} of a batch {list(self.w_EOI.shape)}"


@dataclass
class Inputs:
    """What a `Batch` says of the vectors that one matrix multiplies, added up from as many passes as it takes."""

    outer_II: Tensor
    vectors: float = 0.0
    energy: float = 0.0
    energy_squared: float = 0.0

    @staticmethod
    def empty(width: int, device: torch.device | str = "cpu") -> "Inputs":
        return Inputs(torch.zeros(width, width, device=device))

    def add(self, x_nI: Tensor, weight_n: Tensor | None = None) -> None:
        """Take in vectors, each to count `weight` times."""
        x_nI = x_nI.float() if weight_n is None else x_nI.float() * weight_n.sqrt()[:, None]
        energy_n = x_nI.square().sum(1).double()
        self.outer_II.addmm_(x_nI.T, x_nI)
        self.vectors += len(x_nI) if weight_n is None else float(weight_n.sum())
        self.energy += float(energy_n.sum())
        self.energy_squared += float(energy_n.square().sum())

    @property
    def tokens(self) -> float:
        """Kish's effective number: of vectors of unlike size the few large ones decide, and a sum knows little more."""
        return self.energy**2 / self.energy_squared if self.energy_squared else 0.0

    @property
    def hessian_II(self) -> Tensor:
        return self.outer_II / max(self.vectors, 1e-30)


Facts = Mapping[str, tuple[float, ...]]  # name -> one figure for each of E


@dataclass(frozen=True)
class Rounded:
    """Codes and scales of E matrices, and per matrix what the rounding has to report ("damping", "pooled")."""

    codes_EOI: Tensor
    scales: tuple[Scales, ...]
    facts: Facts = field(default_factory=dict)

    def values(self, format: NumberFormat) -> Tensor:
        """F32 weights [E, O, I]: exactly what a server multiplies with."""
        return torch.stack([format.decode(codes, s) for codes, s in zip(self.codes_EOI, self.scales)])


@dataclass(frozen=True)
class Block:
    """Matrices that make one output together, E times side by side, and tokens to see that output on.

    weights    [E, O, I] each; siblings stacked
    forward    (matrices as in `weights`, x [E, n, D]) -> y [E, n, D']
    x_EnD      inputs; E rows of equal length, the shorter ones filled up with anything
    weight_En  what a token's squared error counts: the square of its gate, 0 for what only fills up
    """

    weights: tuple[Tensor, ...]
    forward: Callable[[Sequence[Tensor], Tensor], Tensor]
    x_EnD: Tensor
    weight_En: Tensor


Round = Callable[[Batch, NumberFormat], Rounded]
RoundBlock = Callable[[Block, NumberFormat], tuple[Rounded, ...]]


@dataclass(frozen=True)
class Rounding:
    """One way to round.

    needs        names of the fields of `Batch` that `round` cannot do without ("hessian_EII"); empty: it needs no data
    round        matrices by themselves
    round_block  matrices together, by the output that they make together; None: it makes no difference
    kernel       whether a kernel rounds the same from stored bytes: "" for none, "standard" scales, "searched" ones
    informed     the rounding that does the same with data, where there is some; "" for none, or for this one
    version      goes up with any change to the codes that come of the same weights, format and data
    """

    name: str
    needs: tuple[str, ...]
    round: Round
    reference: str
    round_block: RoundBlock | None = None
    kernel: str = ""
    informed: str = ""
    version: int = 1


def stacked(rows: Sequence[int], format: NumberFormat) -> bool:
    """Whether matrices of so many rows may be stacked without a block of `format` lying across two of them."""
    return format.block[0] > 0 and all(count % format.block[0] == 0 for count in rows)


def of_rows(scales: Scales, start: int, stop: int, format: NumberFormat) -> Scales:
    """The scales of rows `start` … `stop`, which must not cut a block."""
    count = format.block[0]
    blocks = slice(start // count, -(-stop // count)) if count else slice(None)
    return replace(
        scales,
        blocks=None if scales.blocks is None else scales.blocks[blocks],
        offsets=None if scales.offsets is None else scales.offsets[blocks],
    )


def split(rounded: Rounded, rows: Sequence[int], format: NumberFormat) -> list[list[tuple[Tensor, Scales]]]:
    """Codes and scales of each matrix that was stacked, given their numbers of rows; for each of E."""
    ends = list(accumulate(rows, initial=0))
    return [
        [(codes_OI[a:b], of_rows(scales, a, b, format)) for a, b in pairwise(ends)]
        for codes_OI, scales in zip(rounded.codes_EOI, rounded.scales)
    ]


def round_members(
    rounding: Rounding, batch: Batch, rows: Sequence[int], format: NumberFormat
) -> tuple[list[list[tuple[Tensor, Scales]]], Facts]:
    """A batch of stacked matrices, rounded and cut apart: for each of E its members; and what there is to report.

    Where a block would lie across two members, they are rounded one by one.
    """
    if stacked(rows, format):
        rounded = rounding.round(batch, format)
        return split(rounded, rows, format), rounded.facts
    assert format.share is None
    parts = [rounding.round(replace(batch, w_EOI=w_EOI), format) for w_EOI in batch.w_EOI.split(list(rows), dim=1)]
    members = [[(part.codes_EOI[e], part.scales[e]) for part in parts] for e in range(len(batch.w_EOI))]
    return members, parts[0].facts


def round_siblings(rounding: Rounding, weights: Sequence[Tensor], format: NumberFormat) -> list[tuple[Tensor, Scales]]:
    """Matrices [O, I] that a server fuses, rounded without data; they get one second level of scale."""
    batch = Batch(torch.cat(list(weights))[None])
    return round_members(rounding, batch, [len(w_OI) for w_OI in weights], format)[0][0]
