"""What travels through the layers, and what may be seen on the way. Plain data; no arithmetic.

T is B·T here: tokens of all rows of a state in row-major order, so that token t stands in row t // T.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..families import Linear

# A unit's matrices, or of its experts one's, with their values [O, I] in F32 -> the values to multiply with instead.
Change = Callable[[Sequence[Linear], Sequence[Tensor]], Sequence[Tensor]]
# Activations [n, I] on their way into a unit's matrix of that projection (any of those that share them) -> what is
# multiplied instead; token by token.
Intake = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens of one MoE layer go to, and with which weights. All F32 but the ids.

    `experts_Tk` holds the k ids of the highest selection scores (affinity + correction bias), highest first; of equal
    scores the lower id wins. `gates_Tk` are made of their affinities by the family's rule (router.py).
    """

    layer: int
    affinity_TE: Tensor  # what the rule makes of the router's logits, before the correction bias
    experts_Tk: Tensor
    gates_Tk: Tensor
    x_TD: Tensor  # what is routed, in the run's dtype


@dataclass(frozen=True)
class ExpertPass:
    """One expert on the tokens that chose it. A popular expert's tokens may come in several passes."""

    layer: int
    expert: int
    tokens_n: Tensor  # ascending
    gates_n: Tensor  # F32
    x_nD: Tensor  # what gate and up projection multiply
    inner_nI: Tensor  # what the down projection multiplies
    f_nD: Tensor  # what comes out, not yet multiplied by the gate


@dataclass(frozen=True)
class BlockPass:
    """A whole MoE block: the residual stream gains `routed_TD` + `shared_TD`."""

    layer: int
    h_TD: Tensor  # the residual stream before it gains
    x_TD: Tensor
    routed_TD: Tensor  # Σ gate · f over the selected experts, times the family's factor; F32
    shared_TD: Tensor | None  # None where the family has no shared expert


@dataclass(frozen=True)
class LinearPass:
    """Inputs of one matrix outside the routed experts, or of several stacked by rows. They may come in several passes."""

    linears: tuple[Linear, ...]
    x_nI: Tensor


def ignore(seen: Any) -> None:
    """The observer's answer to what it does not care for."""


@dataclass(frozen=True)
class Observer:
    """Called while a MoE layer is computed: `route` once, then `expert` for each that was selected, then `block`.

    `linear` is called in every layer, for what attention, dense and shared MLP multiply.
    Tensors are on the run's device and must not be changed; whoever keeps one keeps its memory.
    """

    route: Callable[[Routing], None] = ignore
    expert: Callable[[ExpertPass], None] = ignore
    block: Callable[[BlockPass], None] = ignore
    linear: Callable[[LinearPass], None] = ignore


@dataclass(frozen=True)
class State:
    """The hidden states of some rows between two layers, and how this branch of the run differs from others.

    dropped    MoE layer -> ids of experts that cannot be selected there (score −inf), as if pruned
    nonfinite  layer -> tokens whose hidden state is infinite or NaN after it; layers with none are left out
    changed    unit -> what becomes of its matrices, as if they were written so; branches that name the very
               same `Change` for a unit share what it makes
    rounded    unit -> what becomes of the activations that its matrices multiply, as an engine rounds them
    """

    hidden_BTD: Tensor
    dropped: Mapping[int, Sequence[int]] = field(default_factory=dict)
    observer: Observer | None = None
    nonfinite: Mapping[int, int] = field(default_factory=dict)
    changed: Mapping[str, Change] = field(default_factory=dict)
    rounded: Mapping[str, Intake] = field(default_factory=dict)


def passed(layer: int, state: State, hidden_BTD: Tensor) -> State:
    """`state` with its new hidden states, and what of them is not finite on record."""
    suspects_nD = hidden_BTD[~hidden_BTD.sum(-1).isfinite()]  # a sum hides no inf or NaN, and is one pass
    bad = int((~suspects_nD.isfinite().all(-1)).sum())
    return replace(state, hidden_BTD=hidden_BTD, nonfinite={**state.nonfinite, layer: bad} if bad else state.nonfinite)
