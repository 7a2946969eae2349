"""GPTQ: column after column to its nearest grid point, each first pulled to make up for the errors before it.

Frantar et al. write it with the factor of the inverse Hessian. What is solved here is the same recurrence, code
for code, with the factor of the Hessian itself, H = L Lᵀ, the last column first; nothing is inverted:

    wanted_k = w_k + Σ error_j · L_jk / L_kk  over the columns j already done,    error_j = w_j − value_j

The sum is split in halves, recursively, so that almost all of it is large matrix products; the E matrices of a
batch go side by side. Scales are chosen first, by the format's search, and blocks stay where they are: going
through the columns by size of input changes the sequence alone, and so suits any container. Leaves out choosing
scales block by block afterwards: done by the error of the weights, it costs more than GPTQ has gained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..formats import NumberFormat, Scales
from ..formats.base import gain
from .base import Batch, Facts, Rounded, Rounding
from .search import searched

LEAF = 32  # columns that are done one by one before their errors are multiplied out together
COARSE = 3  # bits; up to these, what is wanted outgrows the scales of the weights, which are fitted to it, and outputs shrink
PRIOR = 1.5  # the pool weighs as much as this many tokens for each column
DAMP, DAMP_FEW = 0.01, 0.03  # of the median diagonal, the second times columns over tokens; of least held-out error


@dataclass(frozen=True)
class Ordered:
    """Matrices and Hessians with their columns by size of input, ascending: the last column is the first to be done.

    order_EI     the column of the matrix that stands at each place
    w_EIO        F32, transposed, so that a column is contiguous
    hessian_EII  F32, blended with the pool and damped
    damping_E    what was added to its diagonal, in medians of it: a few inputs of great size should not count
    pooled_E     the pool's share in it
    names        of the matrices, for errors
    """

    order_EI: Tensor
    w_EIO: Tensor
    hessian_EII: Tensor
    damping_E: list[float]
    pooled_E: list[float]
    names: list[str]

    @staticmethod
    def of(batch: Batch) -> "Ordered":
        """Raises `InputError` when a Hessian's diagonal is not finite."""
        blends = [blended(batch, e) for e in range(len(batch.w_EOI))]
        orders = [h_II.diagonal().argsort() for h_II, _, _ in blends]
        return Ordered(
            torch.stack(orders),
            torch.stack([w_OI.float().T.contiguous()[order] for w_OI, order in zip(batch.w_EOI, orders)]),
            torch.stack([h_II[order].index_select(1, order) for (h_II, _, _), order in zip(blends, orders)]),
            [damping for _, damping, _ in blends],
            [pooled for _, _, pooled in blends],
            [batch.name(e) for e in range(len(blends))],
        )

    def restored(self, x_EIO: Tensor) -> Tensor:
        """[E, O, I], columns back in their places."""
        return torch.stack([x_IO[order.argsort()].T for x_IO, order in zip(x_EIO, self.order_EI)])

    def facts(self) -> Facts:
        return reported(self.damping_E, self.pooled_E)


def blended(batch: Batch, e: int) -> tuple[Tensor, float, float]:
    """One matrix's Hessian with the pool in it and its diagonal raised; by how much, and the pool's share.

    Without a token, and without a pool, it is the identity: every weight goes to its nearest.
    """
    assert batch.hessian_EII is not None
    h_II, width = batch.hessian_EII[e].float(), batch.w_EOI.shape[2]
    tokens = float("inf") if batch.tokens_E is None else float(batch.tokens_E[e])
    prior = 0.0 if batch.pool_EII is None else PRIOR * width
    pooled = prior / (tokens + prior) if tokens + prior else 0.0
    if batch.pool_EII is not None:
        pool_II = batch.pool_EII[e if len(batch.pool_EII) > 1 else 0].float()
        mine, theirs = h_II.trace(), pool_II.trace()
        h_II = (1 - pooled) * h_II + pooled * (mine / theirs if mine > 0 < theirs else 1.0) * pool_II
    diagonal_I = h_II.diagonal()
    if not diagonal_I.isfinite().all():
        raise InputError(
            f"the inputs of {batch.name(e)} are NaN or infinite, or too large for F32 when squared; "
            "calibrate on other text, or find the layer before that makes them"
        )
    damping = DAMP + DAMP_FEW * width / max(tokens + prior, 1.0)
    h_II = h_II.clone() if batch.pool_EII is None else h_II
    h_II.diagonal().add_(damping * typical(diagonal_I))
    return h_II, damping, pooled


def reported(damping_E: Sequence[float], pooled_E: Sequence[float]) -> Facts:
    return {"damping": tuple(damping_E), "pooled": tuple(pooled_E)}


def typical(diagonal_I: Tensor) -> float:
    """The median of what is not zero; 1 where all is."""
    return float(diagonal_I[diagonal_I > 0].median()) if (diagonal_I > 0).any() else 1.0


def compensation(ordered: Ordered) -> Tensor:
    """L_jk / L_kk of each Hessian at [k, j], right of the diagonal. One that cannot be factored is damped twice as much.

    LAPACK has columns where torch has rows: so turned, symmetric Hessians and their factors need no transposing.
    Raises `InputError` for a Hessian that no damping makes positive definite.
    """
    pull_EII = torch.empty_like(ordered.hessian_EII)
    for e in range(len(pull_EII)):
        l_II = factored(ordered, e)
        torch.div(l_II.mT, l_II.diagonal()[:, None], out=pull_EII[e])
    return pull_EII


def factored(ordered: Ordered, e: int) -> Tensor:
    """The Cholesky factor of Hessian `e`, whose damping in `ordered` is doubled until there is one.

    A diagonal raised by more than the largest sum of a row's absolute values outweighs every row (Gershgorin), and its
    matrix is positive definite: where that does not help, the Hessian is NaN, infinite, or too large for F32.
    """
    h_II, damping_E = ordered.hessian_EII[e], ordered.damping_E
    unit = typical(h_II.diagonal()) / (1 + damping_E[e])
    enough = None
    while True:
        l_II, failed = torch.linalg.cholesky_ex(h_II.mT)
        if not failed and l_II.diagonal().isfinite().all():
            return l_II
        if enough is None:
            enough = float(h_II.double().abs().sum(1).max())
        if not (damping_E[e] * unit <= 2 * enough < float("inf")):  # so written, NaN fails too
            raise InputError(
                f"the Hessian of the inputs of {ordered.names[e]} has no Cholesky factor, however much it is damped: "
                "it holds values that are NaN, infinite or too large for F32; calibrate on other text, or round by rtn"
            )
        h_II.diagonal().add_(damping_E[e] * unit)
        damping_E[e] *= 2


def sweep(
    ordered: Ordered, pull_EII: Tensor, format: NumberFormat, scales: Sequence[Scales],
    flow_EIO: Tensor, error_EIO: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose every column's codes, the last column first; returns codes, and what the codes were chosen for, [E, I, O].

    `flow_EIO` begins as what pulls each column already, and ends as what its error has become: the whole of it,
    or what it changed by from `error_EIO`. While it works, what is done lies above what is still to do.
    """
    w_EIO, found = ordered.w_EIO, []
    members = torch.arange(len(w_EIO), device=w_EIO.device)
    steps = steps_by_column(format, scales, w_EIO.shape[2])
    block_EI = ordered.order_EI // (format.block[1] or w_EIO.shape[1])
    wanted_EIO = torch.empty_like(w_EIO)

    for part, done in halves(0, w_EIO.shape[1]):
        if done is not None:
            flow_EIO[:, part].baddbmm_(pull_EII[:, part, done], flow_EIO[:, done])
            continue
        for k in reversed(range(part.start, part.stop)):
            after = slice(k + 1, part.stop)
            if k + 1 < part.stop:
                flow_EIO[:, k : k + 1].baddbmm_(pull_EII[:, k : k + 1, after], flow_EIO[:, after])
            here = tuple(step_EGO[members, block_EI[:, k]] for step_EGO in steps)
            wanted_EO = torch.add(w_EIO[:, k], flow_EIO[:, k], out=wanted_EIO[:, k])
            found.append(format.round(wanted_EO, *here))
            torch.sub(w_EIO[:, k], format.value(found[-1], *here), out=flow_EIO[:, k])
            if error_EIO is not None:
                flow_EIO[:, k] -= error_EIO[:, k]
    return torch.stack(found[::-1], 1), wanted_EIO


def halves(start: int, stop: int) -> Iterator[tuple[slice, slice | None]]:
    """Columns in the order of work, the last first: a part to be done, or one that takes in the errors of a part done.

    A generator, as a function inside `sweep` that called itself would keep all that it sees alive until Python looks
    for cycles: at M3's dimensions, tens of matrices of 151 MB.
    """
    if stop - start <= LEAF:
        yield slice(start, stop), None
        return
    middle = (start + stop) // 2
    yield from halves(middle, stop)
    yield slice(start, middle), slice(middle, stop)
    yield from halves(start, middle)


def steps_by_column(format: NumberFormat, scales: Sequence[Scales], rows: int) -> tuple[Tensor, ...]:
    """Each level of steps as [E, G, O]: a block of columns -> the step of every row."""
    levels = zip(*(format.steps(s) for s in scales))
    count = format.block[0] or rows
    return tuple(torch.stack([s.repeat_interleave(count, 0)[:rows].T for s in level]).contiguous() for level in levels)


def compensated(ordered: Ordered, w_EOI: Tensor, format: NumberFormat) -> tuple[Tensor, list[Scales], Tensor]:
    """Codes [E, I, O], scales and errors [E, I, O] of one GPTQ sweep; of a second one, where the grid is coarse.

    Scales are searched by the plain error of weights: by that of outputs they serve the few columns of large
    input, and the clipped rest leaves more to make up for than it can.
    """
    pull_EII, scales = compensation(ordered), [searched(w_OI, format) for w_OI in w_EOI]
    error_EIO = torch.zeros_like(ordered.w_EIO)
    codes_EIO, wanted_EIO = sweep(ordered, pull_EII, format, scales, error_EIO)
    if format.element_bits <= COARSE:
        scales = [searched(w_OI, format) for w_OI in ordered.restored(wanted_EIO)]
        codes_EIO, _ = sweep(ordered, pull_EII, format, scales, error_EIO.zero_())
    return codes_EIO, scales, error_EIO


def finished(
    ordered: Ordered, format: NumberFormat, codes_EIO: Tensor, scales: Sequence[Scales], error_EIO: Tensor
) -> Rounded:
    if falls_short(format):
        each = zip(ordered.w_EIO, error_EIO, ordered.hessian_EII)
        scales = raised(scales, [gains(w_IO.T, -error_IO.T, h_II) for w_IO, error_IO, h_II in each], format)
    return Rounded(ordered.restored(codes_EIO), tuple(scales), ordered.facts())


def falls_short(format: NumberFormat) -> bool:
    """Whether outputs of codes of least error fall short by more than noise, and scales can make up for it."""
    return format.element_bits <= COARSE and format.times is not None


def raised(scales: Sequence[Scales], gain_EO: Sequence[Tensor] | Tensor, format: NumberFormat) -> tuple[Scales, ...]:
    """Scales that make every value of a row `gain` times as large, for blocks of one row."""
    assert format.times is not None
    return tuple(format.times(s, gain_O[:, None]) for s, gain_O in zip(scales, gain_EO))


def gains(w_OI: Tensor, off_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """[O]: what makes each row's outputs reach as far along the source's as those do: w H wᵀ / value H wᵀ; off = value − w.

    `NumberFormat.unshrunk` says why; this knows what inputs have to do with each other.
    """
    seen_OI = w_OI @ hessian_II
    whole_O = (w_OI * seen_OI).sum(1)
    return gain(whole_O, whole_O + (off_OI * seen_OI).sum(1))


def round(batch: Batch, format: NumberFormat) -> Rounded:
    """Codes and scales for E matrices; reports `damping` and `pooled` of each.

    Memory: beside the batch, E · (2 I² + 4 I O) F32 numbers. Raises `InputError` for a Hessian that is not finite, or
    that no damping makes positive definite.
    """
    ordered = Ordered.of(batch)
    return finished(ordered, format, *compensated(ordered, batch.w_EOI, format))


GPTQ = Rounding("gptq", ("hessian_EII",), round, "https://arxiv.org/abs/2210.17323")
