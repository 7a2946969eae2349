"""AutoRound: offsets added before rounding, and ranges, that signed gradient descent tunes to what comes out.

Cheng et al.: an offset v of up to half a step for each weight and a factor on each block's range, both moved by
the sign of their gradient, which passes through rounding as if it were not there (but not through clipping);
the step shrinks to nothing, and the best state seen is kept. What comes out is the block's output on
minibatches of its tokens, or, for a matrix by itself, its own, which its Hessian gives for all tokens at once.
Leaves out momentum and regularisation, as they do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..formats import NumberFormat, Scales
from .base import Batch, Block, Rounded, Rounding
from .gptq import blended, reported
from .rtn import round as nearest

STEPS = 200
TOKENS = 512  # a minibatch, of each of E
LOOKS = 10  # how often all tokens are looked at, to keep the best state
RANGES = (0.25, 1.5)  # of the range that the format's rule gives

Gradients = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # of the loss, by the values [E, O, I] of each matrix
Losses = Callable[[Sequence[Tensor]], Tensor]  # [E]


@dataclass
class Tuned:
    """E matrices while they are tuned: offsets in steps, ranges, and the best codes and scales so far."""

    w_EOI: Tensor
    format: NumberFormat
    standard: list[Scales]
    gap_EOI: Tensor  # from one grid point to the next, where the weight lies
    offset_EOI: Tensor
    range_EB: Tensor  # factor on the largest weight of each block [E, OB, IB]
    best: list[tuple[Tensor, Scales]]

    @staticmethod
    def of(w_EOI: Tensor, format: NumberFormat) -> "Tuned":
        standard = [format.scales(w_OI) for w_OI in w_EOI]
        gap_EOI = torch.stack([gaps(w_OI, format, s) for w_OI, s in zip(w_EOI, standard)])
        ranges = torch.ones(len(w_EOI), *format.grid(w_EOI.shape[1:]), device=w_EOI.device)
        best = [(format.encode(w_OI, s), s) for w_OI, s in zip(w_EOI, standard)]
        return Tuned(w_EOI, format, standard, gap_EOI, torch.zeros_like(w_EOI), ranges, best)

    def state(self) -> list[tuple[Tensor, Scales]]:
        """Codes and scales as they would be stored now."""
        moved_EOI = self.w_EOI + self.offset_EOI * self.gap_EOI
        found = []
        for w_OI, moved_OI, range_B, s in zip(self.w_EOI, moved_EOI, self.range_EB, self.standard):
            scales = self.format.fit(self.format.blocks(w_OI) * range_B[..., None], s.shared)
            found.append((self.format.encode(moved_OI, scales), scales))
        return found

    def values(self, state: Sequence[tuple[Tensor, Scales]]) -> Tensor:
        return torch.stack([self.format.decode(codes, scales) for codes, scales in state])

    def move(self, gradient_EOI: Tensor, value_EOI: Tensor, step: float) -> None:
        """One signed step. Values scale with the range: d value / d log range is value, less the weight if not clipped."""
        moved_EOI = self.w_EOI + self.offset_EOI * self.gap_EOI
        free_EOI = (value_EOI - moved_EOI).abs() < 0.51 * self.gap_EOI
        self.offset_EOI = (self.offset_EOI - step * (gradient_EOI * free_EOI).sign()).clamp(-0.5, 0.5)
        slope_EOI = gradient_EOI * (value_EOI - moved_EOI * free_EOI)
        slope_EB = torch.stack([self.format.blocks(slope_OI).sum(-1) for slope_OI in slope_EOI])
        self.range_EB = (self.range_EB - step * slope_EB.sign()).clamp(*RANGES)

    def rounded(self) -> Rounded:
        return Rounded(torch.stack([codes for codes, _ in self.best]), tuple(scales for _, scales in self.best))


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
    """Move all of `tuned` together, and leave in each the state of least loss, E by E."""
    least_E = torch.full((len(tuned[0].w_EOI),), torch.inf)
    for i in range(STEPS + 1):
        states = [t.state() for t in tuned]
        values = [t.values(state) for t, state in zip(tuned, states)]
        if i % (STEPS // LOOKS) == 0:
            loss_E = losses(values).cpu()
            for e in (loss_E < least_E).nonzero().flatten().tolist():
                for t, state in zip(tuned, states):
                    t.best[e] = state[e]
            least_E = torch.minimum(loss_E, least_E)
        for t, gradient, value in zip(tuned, gradients(values), values):
            t.move(gradient, value, (1 - i / STEPS) / STEPS)


def round(batch: Batch, format: NumberFormat) -> Rounded:
    """Matrices by themselves, by Σ error · H · errorᵀ. A format without scales has nothing to tune."""
    if format.scale_bits == 0:
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
    _, damping_E, pooled_E = zip(*blends)
    return replace(tuned.rounded(), facts=reported(damping_E, pooled_E))


def round_block(block: Block, format: NumberFormat) -> tuple[Rounded, ...]:
    """Matrices together, by the weighted squared error of the block's output. Memory: about ten times the weights."""
    if format.scale_bits == 0:
        return tuple(nearest(Batch(w_EOI), format) for w_EOI in block.weights)
    tuned = [Tuned.of(w_EOI.float(), format) for w_EOI in block.weights]
    generator = torch.Generator().manual_seed(0)
    counts_E1 = (block.weight_En > 0).sum(1, keepdim=True).cpu()
    with torch.no_grad():
        wanted_EnD = block.forward(block.weights, block.x_EnD)

    def gradients(values: Sequence[Tensor]) -> Sequence[Tensor]:
        pick_En = (torch.rand(len(counts_E1), TOKENS, generator=generator) * counts_E1).long().to(wanted_EnD.device)
        part = partial(torch.take_along_dim, indices=pick_En[..., None], dim=1)
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            off_EnD = block.forward(leaves, part(block.x_EnD)) - part(wanted_EnD)
            loss = (off_EnD.square().sum(-1) * block.weight_En.gather(1, pick_En)).sum()
            return torch.autograd.grad(loss, leaves)

    def losses(values: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            off_EnD = block.forward(values, block.x_EnD) - wanted_EnD
            return (off_EnD.square().sum(-1) * block.weight_En).sum(1)

    descend(tuned, gradients, losses)
    return tuple(t.rounded() for t in tuned)


AUTOROUND = Rounding("autoround", ("hessian_EII",), round, "https://arxiv.org/abs/2309.05516", round_block)
