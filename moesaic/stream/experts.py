"""Experts of a MoE block, one at a time over the tokens of all branches.

transformers' experts are not used because they are one tensor a layer. Leaves out where tokens go (router), and the
shared expert, which is an ordinary module.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import ahead, spans
from .state import Change, ExpertPass, Intake, Observer, Routing

Stored = TypeVar("Stored")

INNER_COPIES = 8  # F32 tensors of [tokens, inner width] that gate, up and activation make


@dataclass(frozen=True)
class ExpertWeights:
    """The three matrices of one expert, as the server multiplies with them, and biases where they have some."""

    gate: Tensor  # [I, D]
    up: Tensor  # [I, D]
    down: Tensor  # [D, I]
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # projection -> [O]

    def through(self, projection: str, x_nI: Tensor) -> Tensor:
        """What the matrix of that name makes of `x_nI`."""
        return F.linear(x_nI, getattr(self, projection), self.biases.get(projection))


@dataclass(frozen=True)
class Share:
    """One branch's part in a layer's experts: what goes in, where it goes, who watches, and what has come out."""

    x_TD: Tensor
    routing: Routing
    observer: Observer | None
    routed_TD: Tensor  # F32; each expert adds to it
    order: Tensor  # [T·k]: positions in `routing.experts_Tk`, by expert, then token
    ends: list[int]  # expert -> where its part of `order` ends
    change: Change | None = None  # of the experts' weights
    rounded: Intake | None = None  # what becomes of the activations that they multiply

    @staticmethod
    def of(
        x_TD: Tensor,
        routing: Routing,
        observer: Observer | None,
        change: Change | None = None,
        rounded: Intake | None = None,
    ) -> "Share":
        chosen = routing.experts_Tk.flatten()
        ends = chosen.bincount(minlength=routing.affinity_TE.shape[1]).cumsum(0).tolist()
        routed_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        return Share(
            x_TD=x_TD,
            routing=routing,
            observer=observer,
            routed_TD=routed_TD,
            order=chosen.argsort(stable=True),
            ends=ends,
            change=change,
            rounded=rounded,
        )

    def of_expert(self, expert: int) -> Tensor:
        """Positions in `routing.experts_Tk` of the tokens that chose `expert`, by token."""
        return self.order[self.ends[expert - 1] if expert else 0 : self.ends[expert]]


def run_experts(
    shares: Sequence[Share],
    read: Callable[[int], Stored],
    decode: Callable[[Stored, Change | None], ExpertWeights],
    activate: Callable[[Tensor, Tensor], Tensor],
    block_bytes: int,
) -> None:
    """Add to each share's `routed_TD` the sum of gate · expert(x) over the experts that its tokens selected.

    An expert that nobody selected is not read. One that was is read once for all shares, and decoded once for
    all that change it alike; each share is multiplied by itself, so that what a branch gets does not depend
    on which others ride along.
    """
    experts = range(len(shares[0].ends))
    selected = [e for e in experts if any(len(share.of_expert(e)) for share in shares)]
    for expert, stored in ahead(read, selected):
        asking = [share for share in shares if len(share.of_expert(expert))]
        for change in dict.fromkeys(share.change for share in asking):
            weights = decode(stored, change)
            for share in asking:
                if share.change == change:
                    pass_expert(share, expert, weights, activate, block_bytes)
            del weights
        del stored  # before the next but one is read


def pass_expert(
    share: Share,
    expert: int,
    weights: ExpertWeights,
    activate: Callable[[Tensor, Tensor], Tensor],
    block_bytes: int,
) -> None:
    width, inner = share.x_TD.shape[1], weights.gate.shape[0]
    positions = share.of_expert(expert)
    gates = share.routing.gates_Tk.flatten()
    for span in spans(len(positions), 4 * (INNER_COPIES * inner + 2 * width), block_bytes):
        tokens_n = positions[span] // share.routing.experts_Tk.shape[1]
        gates_n = gates[positions[span]]
        x_nD = share.x_TD[tokens_n]
        if share.rounded is not None:
            x_nD = share.rounded(x_nD, "gate")
        inner_nI = activate(weights.through("gate", x_nD), weights.through("up", x_nD))
        if share.rounded is not None:
            inner_nI = share.rounded(inner_nI, "down")
        f_nD = weights.through("down", inner_nI)
        share.routed_TD.index_add_(0, tokens_n, f_nD.float() * gates_n[:, None])
        if share.observer is not None:
            layer = share.routing.layer
            share.observer.expert(
                ExpertPass(
                    layer=layer,
                    expert=expert,
                    tokens_n=tokens_n,
                    gates_n=gates_n,
                    x_nD=x_nD,
                    inner_nI=inner_nI,
                    f_nD=f_nD,
                )
            )
