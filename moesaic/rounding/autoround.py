"""AutoRound: offsets added before rounding, and ranges, that signed gradient descent tunes to what comes out.

Cheng et al.: an offset v of up to half a step for each weight and a factor on each block's range, both moved by
the sign of their gradient, which passes through rounding as if it were not there (but not through clipping);
the step shrinks to nothing, and the best state seen is kept. What comes out is the block's output on
minibatches of its tokens, or, for a matrix by itself, its own, which its Hessian gives for all tokens at once.
Ranges are tuned up to 3 bits alone: beyond, and where a scale can only jump, what moves them is noise, and those that
search finds stay. Leaves out momentum and regularisation, as they do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..formats import NumberFormat, Scales
from ..formats.base import gain
from .base import Batch, Block, Rounded, Rounding, of_rows
from .gptq import blended, falls_short, gains, raised, reported
from .rtn import round as nearest
from .search import searched

WIDEST = 4  # bits; what it is for
STEPS = 200
TOKENS = 512  # a minibatch, of each of E
LOOKS = 10  # how often all tokens are looked at, to keep the best state
RANGES = (0.25, 1.5)  # of the one that the format's rule gives

Gradients = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # of the loss, by the values [E, O, I] of each matrix
Losses = Callable[[Sequence[Tensor]], Tensor]  # [E]


@dataclass
class Tuned:
    """E matrices while they are tuned, R = E · O rows one above the other: offsets in steps, ranges, and the best of both."""

    w_RI: Tensor
    members: int
    format: NumberFormat
    scales: Scales  # what ranges are factors on; `shared` beside each row of blocks
    gap_RI: Tensor  # from one grid point to the next, where the weight lies
    offset_RI: Tensor
    range_RB: Tensor  # factor on the largest weight of each block
    best: tuple[Tensor, Tensor]

    @staticmethod
    def of(w_EOI: Tensor, format: NumberFormat) -> "Tuned":
        w_RI = w_EOI.flatten(0, 1)
        start = format.scales if falls_short(format) else partial(searched, format=format)
        scales = start(w_RI) if format.share is None else stacked([start(w_OI) for w_OI in w_EOI])
        offset_RI, range_RB = torch.zeros_like(w_RI), torch.ones(format.grid(w_RI.shape), device=w_RI.device)
        return Tuned(
            w_RI=w_RI,
            members=len(w_EOI),
            format=format,
            scales=scales,
            gap_RI=gaps(w_RI, format, scales),
            offset_RI=offset_RI,
            range_RB=range_RB,
            best=(offset_RI, range_RB),
        )

    def state(self) -> tuple[Tensor, Scales]:
        """Codes and scales as they would be stored now."""
        scales = self.scales
        if falls_short(self.format):
            assert self.format.times is not None
            scales = self.format.times(scales, self.range_RB)
        return self.format.encode(self.w_RI + self.offset_RI * self.gap_RI, scales), scales

    def values(self) -> Tensor:
        return self.by_member(self.format.decode(*self.state()))

    def by_member(self, x_RI: Tensor) -> Tensor:
        return x_RI.unflatten(0, (self.members, -1))

    def move(self, gradient_EOI: Tensor, value_EOI: Tensor, step: float) -> None:
        """One signed step. Values scale with the range: d value / d log range is value, less the weight if not clipped."""
        gradient_RI, value_RI = gradient_EOI.flatten(0, 1), value_EOI.flatten(0, 1)
        moved_RI = self.w_RI + self.offset_RI * self.gap_RI
        free_RI = (value_RI - moved_RI).abs() < 0.51 * self.gap_RI
        self.offset_RI = (self.offset_RI - step * (gradient_RI * free_RI).sign()).clamp(-0.5, 0.5)
        if not falls_short(self.format):
            return
        slope_RI = gradient_RI * (value_RI - moved_RI * free_RI)
        slope_RB = self.format.blocks(slope_RI).sum(-1)
        self.range_RB = (self.range_RB - step * slope_RB.sign()).clamp(*RANGES)

    def keep(self, better_E: Tensor) -> None:
        """Take the state that matrices `better_E` are in for their best."""
        now = (self.offset_RI, self.range_RB)
        kept = (self.by_member(x).where(better_E[:, None, None], self.by_member(y)) for x, y in zip(now, self.best))
        offset_EOI, range_EOB = kept
        self.best = offset_EOI.flatten(0, 1), range_EOB.flatten(0, 1)

    def rounded(self) -> Rounded:
        self.offset_RI, self.range_RB = self.best
        codes_RI, scales = self.state()
        rows = len(self.w_RI) // self.members
        parts = [of_rows(scales, e * rows, (e + 1) * rows, self.format) for e in range(self.members)]
        if scales.shared is not None:
            parts = [replace(part, shared=shared) for part, shared in zip(parts, scales.shared[::rows])]
        return Rounded(self.by_member(codes_RI), tuple(parts))


def stacked(each: Sequence[Scales]) -> Scales:
    """Scales of matrices of two levels, one above the other."""
    blocks = torch.cat([s.blocks.view(torch.uint8) for s in each if s.blocks is not None])
    assert each[0].blocks is not None
    shared = torch.cat(
        [s.shared.expand(len(s.blocks), 1) for s in each if s.blocks is not None and s.shared is not None]
    )
    return Scales(blocks.view(each[0].blocks.dtype), shared)


def gaps(w_OI: Tensor, format: NumberFormat, scales: Scales) -> Tensor:
    """The distance of the two grid points that enclose each weight; beyond the last ones, that of the nearest two."""
    steps = format.spread(format.steps(scales), w_OI.shape)
    nearest = format.value(format.round(w_OI, *steps), *steps)
    below, above = torch.full_like(w_OI, -torch.inf), torch.full_like(w_OI, torch.inf)
    for code in range(1 << format.element_bits):
        point = format.value(torch.full_like(w_OI, code, dtype=torch.uint8), *steps)
        below = torch.where((point < nearest) & (point > below), point, below)
        above = torch.where((point > nearest) & (point < above), point, above)
    up, down = above - nearest, nearest - below
    gap = torch.where(w_OI > nearest, up, torch.where(w_OI < nearest, down, torch.minimum(up, down)))
    return torch.where(gap.isfinite(), gap, torch.minimum(up, down))


def descend(tuned: Sequence[Tuned], gradients: Gradients, losses: Losses) -> None:
    """Move all of `tuned` together, and leave as best in each the state of least loss, E by E."""
    least_E = torch.full((tuned[0].members,), torch.inf, device=tuned[0].w_RI.device)
    for i in range(STEPS + 1):
        values = [t.values() for t in tuned]
        if i % (STEPS // LOOKS) == 0:
            loss_E = losses(values)
            for t in tuned:
                t.keep(loss_E < least_E)
            least_E = torch.minimum(loss_E, least_E)
        for t, gradient, value in zip(tuned, gradients(values), values):
            t.move(gradient, value, (1 - i / STEPS) / STEPS)


def round(batch: Batch, format: NumberFormat) -> Rounded:
    """Matrices by themselves, by Σ error · H · errorᵀ. Beyond `WIDEST` bits, weights go to their nearest."""
    if format.element_bits > WIDEST:
        return nearest(batch, format)
    blends = [blended(batch, e) for e in range(len(batch.w_EOI))]
    hessian_EII = torch.stack([h_II for h_II, _, _ in blends])
    w_EOI = batch.w_EOI.float()
    tuned = Tuned.of(w_EOI, format)
    descend(
        [tuned],
        lambda values: [(values[0] - w_EOI) @ hessian_EII],
        lambda values: (((values[0] - w_EOI) @ hessian_EII) * (values[0] - w_EOI)).sum((1, 2)),
    )
    rounded = tuned.rounded()
    if falls_short(format):
        off_EOI = rounded.values(format) - w_EOI
        gain_EO = [gains(*each) for each in zip(w_EOI, off_EOI, hessian_EII)]
        rounded = replace(rounded, scales=raised(rounded.scales, gain_EO, format))
    _, damping_E, pooled_E = zip(*blends)
    return replace(rounded, facts=reported(damping_E, pooled_E))


def round_block(block: Block, format: NumberFormat) -> tuple[Rounded, ...]:
    """Matrices together, by the weighted squared error of the block's output. Memory: about ten times the weights."""
    if format.element_bits > WIDEST:
        return tuple(nearest(Batch(w_EOI), format) for w_EOI in block.weights)
    tuned = [Tuned.of(w_EOI.float(), format) for w_EOI in block.weights]
    generator = torch.Generator().manual_seed(0)
    counts_E1 = (block.weight_En > 0).sum(1, keepdim=True).cpu()
    with torch.no_grad():
        wanted_EnD = block.forward(block.weights, block.x_EnD)
    members_E1 = torch.arange(len(wanted_EnD), device=wanted_EnD.device)[:, None]

    def gradients(values: Sequence[Tensor]) -> Sequence[Tensor]:
        pick_En = (torch.rand(len(counts_E1), TOKENS, generator=generator) * counts_E1).long().to(wanted_EnD.device)
        picked = (members_E1, pick_En)
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            off_EnD = block.forward(leaves, block.x_EnD[picked]) - wanted_EnD[picked]
            loss = (off_EnD.square().sum(-1) * block.weight_En[picked]).sum()
            return torch.autograd.grad(loss, leaves)

    def losses(values: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            off_EnD = block.forward(values, block.x_EnD) - wanted_EnD
            return (off_EnD.square().sum(-1) * block.weight_En).sum(1)

    descend(tuned, gradients, losses)
    *before, last = (t.rounded() for t in tuned)
    if falls_short(format):
        with torch.no_grad():
            seen_EnD = block.weight_En[..., None] * wanted_EnD
            found_EnD = block.forward([r.values(format) for r in (*before, last)], block.x_EnD)
        gain_EO = gain((seen_EnD * wanted_EnD).sum(1), (seen_EnD * found_EnD).sum(1))
        last = replace(last, scales=raised(last.scales, gain_EO, format))
    return *before, last


AUTOROUND = Rounding("autoround", ("hessian_EII",), round, "https://arxiv.org/abs/2309.05516", round_block)
