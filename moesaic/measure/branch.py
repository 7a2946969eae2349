"""Branches: models that differ from the source in some units, all measured in one sweep of the source's weights.

A branch leaves the source at the first layer where it differs: until there its hidden states are the
source's and cost nothing. From there on it goes beside it. What a single option costs and what a whole plan
costs are asked in the same way; nothing is written. Leaves out running them (branches.py) and which
to ask for (prices).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import identity
from ..checkpoint import Checkpoint
from ..checkpoint.containers import siblings
from ..data.tokens import TokenSet
from ..errors import PlanError
from ..families import Architecture, Linear
from ..formats import NumberFormat, weights_of
from ..plan import SOURCE, Plan
from ..rounding import Rounding, round_siblings, rounding_named
from ..stream import STATE_COPIES, Change, LayerRun, State
from ..stream.sweep import packed


@dataclass(frozen=True)
class Branch:
    """The source but for the formats of some units, and the experts that some layers keep."""

    formats: Mapping[str, str] = field(default_factory=dict)  # unit -> format; "source" says nothing
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # MoE layer -> ids that stay, ascending

    @staticmethod
    def of(plan: Plan) -> "Branch":
        return Branch({u: f for u, f in plan.formats.items() if f != SOURCE}, dict(plan.kept))

    def first(self, architecture: Architecture) -> int:
        """The first layer where it differs."""
        return min([*(architecture.units[unit][0].layer for unit in self.formats), *self.kept, architecture.layers])

    @property
    def identity(self) -> str:
        """Stands for what is rounded and dropped, with the versions of its formats."""
        return identity(self.facts, {format: weights_of(format).version for format in self.formats.values()})

    @property
    def facts(self) -> dict[str, Any]:
        return {"formats": dict(self.formats), "kept": {str(n): list(ids) for n, ids in self.kept.items()}}


@dataclass(frozen=True)
class Trial:
    """How branches are tried.

    tokens        rows that they are run on
    rounding      that their formats are made with: one that does not look at data
    memory_bytes  for hidden states, as `effort` counts them; None: half of what is available. More of it means fewer
                  passes. What `LayerRun` needs for weights comes on top.
    """

    tokens: TokenSet
    rounding: str = "rtn"
    memory_bytes: int | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Effort:
    """What measuring will take, known before it starts.

    token_layers      tokens through a layer, all branches and the source's own
    head_layers       what telling logits apart comes to besides, counted as if it were more of these
    one_by_one        the same if each branch were run by itself from the embedding
    read_bytes        of weights; `one_by_one_bytes` if each branch read them all
    memory_bytes      hidden states of the largest batch, beside what `LayerRun` needs
    batches           sweeps; each starts at the first layer where one of its branches differs
    """

    token_layers: int
    head_layers: int
    one_by_one: int
    read_bytes: int
    one_by_one_bytes: int
    memory_bytes: int
    batches: int

    @property
    def work(self) -> int:
        """Token-layers, all told."""
        return self.token_layers + self.head_layers

    def __str__(self) -> str:
        return (
            f"{self.token_layers:,} token-layers and {self.head_layers:,} for logits in {self.batches} "
            f"sweep{'s' * (self.batches > 1)} "
            f"({self.one_by_one / max(self.token_layers, 1):.1f} times as many one by one), "
            f"{self.read_bytes / 1e9:,.2f} GB to read ({self.one_by_one_bytes / 1e9:,.2f} one by one), "
            f"{self.memory_bytes / 1e9:,.2f} GB of hidden states"
        )


def effort(checkpoint: Checkpoint, branches: Sequence[Branch], tokens: int, memory_bytes: int) -> Effort:
    """Predict what `measure` takes with F32 hidden states."""
    a, state_bytes = checkpoint.architecture, STATE_COPIES * 4 * tokens * checkpoint.architecture.hidden
    groups = packed([branch.first(a) for branch in branches], state_bytes, memory_bytes)
    stored_L = np.zeros(a.layers, np.int64)
    for linear in (n for n in a.linears if n.role != "mtp"):
        stored_L[linear.layer] += checkpoint.container.packing(checkpoint.formats[linear.name]).bytes(linear.shape)
    starts = [branches[group[0]].first(a) for group in groups]
    passed = sum(a.layers - b.first(a) for b in branches) + sum(a.layers - s for s in starts) + max(starts, default=0)
    return Effort(
        token_layers=tokens * passed,
        head_layers=round(tokens * len(branches) * head_layers(a)),
        one_by_one=tokens * a.layers * (len(branches) + 1),
        read_bytes=int(sum(stored_L[s:].sum() for s in starts)),
        one_by_one_bytes=int(stored_L.sum()) * (len(branches) + 1),
        memory_bytes=state_bytes * (max(map(len, groups), default=0) + 1),
        batches=len(groups),
    )


def head_layers(architecture: Architecture) -> float:
    """Layers that weigh as much as a branch's logits: one product with the head, and an exponential of each."""
    a, per_layer = architecture, np.zeros(architecture.layers)
    for n in (n for n in a.linears if n.role != "mtp"):
        per_layer[n.layer] += n.elements if n.expert is None else n.elements * a.top_k / a.experts
    return 2 * a.vocab * a.hidden / float(per_layer.mean())


def rounded(
    linears: Sequence[Linear], weights: Sequence[Tensor], *, format: NumberFormat, rounding: Rounding
) -> list[Tensor]:
    """A `Change`: the values that an export of these matrices would hold, second scales shared as there."""
    value = dict(zip((linear.name for linear in linears), weights))
    for group in siblings(linears):
        pairs = round_siblings(rounding, [value[n.name] for n in group], format)
        value |= {n.name: format.decode(*pair) for n, pair in zip(group, pairs)}
    return [value[linear.name] for linear in linears]


def changes(branches: Iterable[Branch], rounding: str) -> dict[str, Change]:
    """One `Change` for each format, so that branches share what it makes. Raises `PlanError` for what needs data."""
    way = rounding_named(rounding)
    if way.needs:
        raise PlanError(f"rounding {rounding} needs {', '.join(way.needs)}, which measuring does not collect; use rtn")
    formats = sorted({format for branch in branches for format in branch.formats.values()})
    return {format: partial(rounded, format=weights_of(format), rounding=way) for format in formats}


def affordable_tokens(checkpoint: Checkpoint, work: float, seconds: float) -> int:
    """How many tokens can be taken in about `seconds`, each through as many layers as `work`: from one row through one layer.

    Reading and decoding that layer's weights counts as if it were arithmetic: the guess is on the safe side.
    """
    run, row_1T = LayerRun(checkpoint), torch.zeros(1, 512, dtype=torch.int64)
    row_1T[0] = torch.arange(512) % checkpoint.architecture.vocab
    began = time.monotonic()
    run.advance(checkpoint.architecture.layers - 1, [State(run.embed(row_1T))])
    return int(seconds / (time.monotonic() - began) * row_1T.numel() / work)


def some_rows(tokens: TokenSet, limit: int) -> TokenSet:
    """At most `limit` tokens of `tokens`, one row at least: rows spread evenly, so that domains keep their shares."""
    rows = min(tokens.rows, max(1, limit // tokens.ids_BT.shape[1]))
    return tokens.take(np.linspace(0, tokens.rows - 1, rows).round().astype(int).tolist())
