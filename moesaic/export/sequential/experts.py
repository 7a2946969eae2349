"""The routed experts of one layer, rounded side by side, each by the tokens that are routed to it.

A token counts by the square of its gate, as the expert's error does. What few tokens leave open is taken from
all tokens of the layer, put through that very expert: hidden neurons of two experts have nothing to do
with each other. An expert that no token chose has nothing else to go by.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plan.blueprint import Blueprint
from ...rounding import Batch, Block, Inputs, Rounding, round_members, split
from ...stream import LayerRun, Routing
from ...stream.memory import spans
from .group import Group, Members, format_of, weights_of

POOL = 2  # tokens at large for each column of a matrix
BLOCK_TOKENS = (256, 2048)  # of an expert, at least and at most, for a rounding that tunes to its output
SIDE_BY_SIDE = (
    4  # blocks that experts rounded side by side may take: how many there are can change bits, so memory has no say
)
COPIES = 8  # F32 tensors the size of a Hessian that are alive at once, and as many the size of the weights

Result = tuple[Group, Members, dict[str, Any]]
ToInput = Callable[[Tensor], Tensor]  # a token [n, D] -> what a matrix multiplies [n, I]


@dataclass(frozen=True)
class Tokens:
    """Some of a layer's tokens, and what each counts."""

    index_n: Tensor
    weight_n: Tensor


def batch_of(groups: Sequence[Group], w_EOI: Tensor, inputs: Sequence[Inputs], pools: Sequence[Inputs] = ()) -> Batch:
    hessian_EII = torch.stack([i.hessian_II for i in inputs])
    return Batch(
        w_EOI,
        torch.tensor([i.tokens for i in inputs]),
        hessian_EII,
        torch.stack([p.hessian_II for p in pools]) if pools else None,
        tuple(" and ".join(n.name for n in group) for group in groups),
    )


@dataclass(frozen=True)
class Experts:
    blueprint: Blueprint
    rounding: Rounding
    run: LayerRun
    seen: Routing

    def batches(self, experts: Sequence[Sequence[Group]]) -> Iterator[Sequence[Sequence[Group]]]:
        """Groups of experts (gate with up, and down), as many experts at a time as `SIDE_BY_SIDE` blocks hold."""
        if not experts:
            return
        sizes = [
            width**2 + width * sum(n.shape[0] for n in group) for group in experts[0] for width in [group[0].shape[1]]
        ]
        for span in spans(len(experts), 4 * COPIES * max(sizes), SIDE_BY_SIDE * self.run.block_bytes):
            yield experts[span]

    def round(self, experts: Sequence[Sequence[Group]]) -> list[Result]:
        assert all(gate_up[0].projection == "gate" and down[0].projection == "down" for gate_up, down in experts)
        return (self.round_blocks if self.rounding.round_block else self.round_alone)(experts)

    @cached_property
    def pool(self) -> Inputs:
        """Of gate and up: all experts would see the same."""
        width = self.seen.x_TD.shape[1]
        return self.inputs(width, self.at_large(width), torch.Tensor.float)

    def round_alone(self, experts: Sequence[Sequence[Group]]) -> list[Result]:
        """Gate and up by what the tokens are; down by what rounded gate and up make of them."""
        gate_ups, downs = zip(*experts)
        tokens = [self.routed(group) for group in downs]
        first = self.round_groups(gate_ups, tokens, [torch.Tensor.float] * len(tokens), [self.pool])
        format = format_of(self.blueprint, gate_ups[0])
        through = [
            partial(self.hidden, torch.cat([format.decode(*member) for member in members]), self.bias(group))
            for group, members, _ in first
        ]
        width = downs[0][0].shape[1]
        pools = [self.inputs(width, self.at_large(width), to_hidden) for to_hidden in through]
        return first + self.round_groups(downs, tokens, through, pools)

    def round_groups(
        self, groups: Sequence[Group], tokens: Sequence[Tokens], through: Sequence[ToInput], pools: Sequence[Inputs]
    ) -> list[Result]:
        w_EOI = torch.stack([weights_of(self.blueprint, group, self.run.device) for group in groups])
        inputs = [self.inputs(w_EOI.shape[2], mine, to_input) for mine, to_input in zip(tokens, through)]
        rows, format = [n.shape[0] for n in groups[0]], format_of(self.blueprint, groups[0])
        members, facts = round_members(self.rounding, batch_of(groups, w_EOI, inputs, pools), rows, format)
        counts = [{"tokens": len(t.index_n), "effective": i.tokens} for t, i in zip(tokens, inputs)]
        return [
            (group, members[e], counts[e] | {name: values[e] for name, values in facts.items()})
            for e, group in enumerate(groups)
        ]

    def round_blocks(self, experts: Sequence[Sequence[Group]]) -> list[Result]:
        """All three matrices by what the expert makes of a sample of its tokens, filled up with tokens at large."""
        assert self.rounding.round_block is not None
        routed = [self.routed(down) for _, down in experts]
        tokens = [self.sampled(mine) for mine in routed]
        length = max(len(t.index_n) for t in tokens)
        x_EnD = torch.stack([self.seen.x_TD[F.pad(t.index_n, (0, length - len(t.index_n)))] for t in tokens]).float()
        weight_En = torch.stack([F.pad(t.weight_n, (0, length - len(t.weight_n))) for t in tokens])
        weights = tuple(
            torch.stack([weights_of(self.blueprint, group, self.run.device) for group in groups])
            for groups in zip(*experts)
        )
        format = format_of(self.blueprint, experts[0][0])
        biases = [
            torch.stack([b for b in map(self.bias, groups) if b is not None])[:, None] if groups[0][0].bias else None
            for groups in zip(*experts)
        ]
        parts = self.rounding.round_block(Block(weights, partial(self.forward, biases), x_EnD, weight_En), format)
        results: list[Result] = []
        for groups, rounded in zip(zip(*experts), parts):
            members = split(rounded, [n.shape[0] for n in groups[0]], format)
            for e, group in enumerate(groups):
                pooled = 1 - min(1.0, len(routed[e].index_n) / len(tokens[e].index_n))
                results.append((group, members[e], {"tokens": len(routed[e].index_n), "pooled": pooled}))
        return results

    # An expert's arithmetic, with values that are not on disk.

    def hidden(self, gate_up_OI: Tensor, bias_O: Tensor | None, x_nD: Tensor) -> Tensor:
        """What down multiplies; gate stands above up."""
        both_nO = x_nD.float() @ gate_up_OI.mT
        return self.activated(both_nO if bias_O is None else both_nO + bias_O)

    def bias(self, group: Group) -> Tensor | None:
        """That of matrices stacked by rows, of the source's experts that they are."""
        if not group[0].bias:
            return None
        return torch.cat([self.run.bias(self.blueprint.origin[n.name]) for n in group])

    def activated(self, both_nO: Tensor) -> Tensor:
        gate_nI, up_nI = both_nO.chunk(2, -1)
        return self.run.family.arithmetic.activate(self.run.text, gate_nI, up_nI)

    def forward(self, biases: Sequence[Tensor | None], weights: Sequence[Tensor], x_EnD: Tensor) -> Tensor:
        """`biases` [E, 1, O] of gate with up, and of down."""
        (gate_up_EOI, down_EOI), (above_E1O, below_E1O) = weights, biases
        both_EnO = x_EnD @ gate_up_EOI.mT
        y_EnD = self.activated(both_EnO if above_E1O is None else both_EnO + above_E1O) @ down_EOI.mT
        return y_EnD if below_E1O is None else y_EnD + below_E1O

    # Tokens.

    def routed(self, group: Group) -> Tokens:
        """The tokens that chose an expert."""
        chosen_Tk = self.seen.experts_Tk.eq(self.blueprint.origin[group[0].name].expert or 0)
        index_n = chosen_Tk.any(1).nonzero().flatten()
        return Tokens(index_n, (self.seen.gates_Tk * chosen_Tk).sum(1)[index_n].square())

    def at_large(self, width: int) -> Tokens:
        """Every so many of the layer's tokens."""
        total = len(self.seen.x_TD)
        index_n = torch.arange(0, total, max(1, total // (POOL * width)), device=self.run.device)
        return Tokens(index_n, torch.ones(len(index_n), device=self.run.device))

    def sampled(self, tokens: Tokens) -> Tokens:
        """Every so many of an expert's tokens; where they are few, with tokens at large that count as their mean does."""
        least, most = BLOCK_TOKENS
        count = len(tokens.index_n)
        kept = slice(None, None, -(-count // most) or 1)
        tokens = Tokens(tokens.index_n[kept], tokens.weight_n[kept])
        if count >= least:
            return tokens
        more = self.at_large(least).index_n[: least - count]
        mean = float(tokens.weight_n.mean()) if count else 1.0
        return Tokens(torch.cat([tokens.index_n, more]), F.pad(tokens.weight_n, (0, len(more)), value=mean))

    def inputs(self, width: int, tokens: Tokens, to_input: ToInput) -> Inputs:
        """What a matrix of that width gets from tokens, a span of them in memory at a time."""
        found = Inputs.empty(width, self.run.device)
        for span in spans(len(tokens.index_n), 16 * (self.seen.x_TD.shape[1] + width), self.run.block_bytes):
            found.add(to_input(self.seen.x_TD[tokens.index_n[span]]), tokens.weight_n[span])
        return found
