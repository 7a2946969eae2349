"""Prices without running the options: what the loss says, to second order, of the change that each makes to its unit.

With Δy the change of a unit's outputs on the text (ΔW x for a format; for dropping, of the routed sum under the
gates as they are when the others are gone) and g the slope of the summed loss there, labels drawn from the model
itself, KL(source‖option) per token is, to second order in Δy,

    1/(2T) · E[ Σ over sequences ( Σ over tokens and the unit's matrices g·Δy )² ]

since slopes of −ln p(drawn label) have the model's Fisher matrix as their covariance (Martens 2020, §5). `by_token`
is the same with each token squared by itself: less noise, and a bias, for a change that a token makes to later tokens' losses
is correlated from token to token. One sweep forward, which leaves the hidden states before each layer on disk, and one backward
price everything: per option the work of one more forward pass, whatever the depth. Leaves out what no slope can see: tokens
that change experts because of a change before them, and keys that an indexer keeps or not (its matrices cost nothing here).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..data.tokens import TokenSet
from ..errors import FaultError
from ..plan import SOURCE
from ..stream import Change, LayerRun, Routing
from ..stream.backward import GatePass, Listener, UnitPass
from ..stream.router import route
from .branch import Trial, changes
from .prices import SURROGATE, Key, Options, Price, Prices, inputs_of
from .slopes import reverse


@dataclass(frozen=True)
class Sensed:
    """What one option costs by its slopes, in nats per token, row by row: their means are prices."""

    by_sequence_B: np.ndarray
    by_token_B: np.ndarray

    @property
    def price(self) -> Price:
        """By token, with the standard error over rows."""
        return Price(float(self.by_token_B.mean()), spread(self.by_token_B))


def spread(row_B: np.ndarray) -> float:
    return float(row_B.std(ddof=1) / len(row_B) ** 0.5) if len(row_B) > 1 else float("nan")


@dataclass
class Sums:
    """Σ over matrices of g·Δy for one layer's options, token by token: [T] each."""

    options: Options
    way: Mapping[str, Change]
    order_E: Sequence[int]  # the expert to keep first in front; empty where there are none
    run: LayerRun
    tokens: int
    sums: dict[Key, Tensor] = field(default_factory=dict)
    steps: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)  # kept, tokens, experts, gates

    def unit(self, seen: UnitPass) -> None:
        for format in self.options.units.get(seen.unit, ()):
            if format == SOURCE:
                continue
            after = self.way[format](seen.linears, seen.w)
            sum_T = self.sums.setdefault((seen.unit, format), torch.zeros(self.tokens, device=self.run.device))
            for w_OI, after_OI, x_nI, slope_nO in zip(seen.w, after, seen.x, seen.slope):
                sum_T.index_add_(0, seen.tokens_n, torch.linalg.vecdot(x_nI @ (after_OI - w_OI).T, slope_nO))

    def wanted(self, seen: Routing) -> Tensor | None:
        """Where each token goes as experts are dropped one by one, and with that all experts whose outputs are needed."""
        router, now_Tk = self.run.router(seen.layer), seen.experts_Tk.clone()
        needed_TE = torch.zeros_like(seen.affinity_TE, dtype=torch.bool)
        counts = range(len(self.order_E) - 1, min(self.options.counts, default=len(self.order_E)) - 1, -1)
        for kept in counts if router.is_local else [count for count in counts if count in self.options.counts]:
            gone = list(self.order_E[kept:])
            moved_T = (now_Tk == gone[0]).any(1) if router.is_local else torch.ones(len(now_Tk), dtype=torch.bool)
            moved_n = moved_T.nonzero().flatten().to(now_Tk.device)
            there = route(router, seen.x_TD[moved_n], gone)
            now_Tk[moved_n] = there.experts_Tk
            needed_TE[moved_n] = needed_TE[moved_n].scatter(1, there.experts_Tk, True)
            self.steps.append((kept, moved_n, there.experts_Tk, there.gates_Tk))
        return needed_TE

    def gates(self, seen: GatePass) -> None:
        first_T = (seen.routing.gates_Tk * seen.slope_TE.gather(1, seen.routing.experts_Tk)).sum(1)
        now_T = first_T.clone()
        for kept, moved_n, experts_nk, gates_nk in self.steps:
            now_T[moved_n] = (gates_nk * seen.slope_TE[moved_n].gather(1, experts_nk)).sum(1)
            if kept in self.options.counts:
                self.sums[seen.routing.layer, kept] = now_T - first_T

    def rows(self, length: int) -> dict[str, Tensor]:
        """ "unit/format" or "layer/kept" -> [2, B]: nats per counted token of each row, by sequence and by token."""
        found = {}
        for (where, what), sum_T in self.sums.items():
            sum_BT = sum_T.double().view(-1, length)
            both = torch.stack([sum_BT.sum(1).square(), sum_BT.square().sum(1)])
            found[f"{where}/{what}"] = (both / (2 * (length - 1))).cpu()
        return found


def sense(checkpoint: Checkpoint, options: Options, trial: Trial, folder: Path, seed: int = 0) -> dict[Key, Sensed]:
    """What every option costs by its slopes; `seed` of the labels drawn.

    Any kept count down to half of the experts takes the outputs of 1 + ln 2 times the experts that a token selects;
    down to k of E it is 1 + ln(E/k) times.
    """
    run, branches = LayerRun(checkpoint), options.branches(checkpoint.architecture.moe_layers)
    hearing = partial(heard, run, options, changes(branches.values(), trial.rounding), trial.tokens)
    found = reverse(run, trial, folder, inputs_of(checkpoint, options, trial, SURROGATE, seed), hearing, seed)
    names = {key: f"{key[0]}/{key[1]}" for key in branches}
    if missing := set(names.values()) ^ set(found):
        raise FaultError(f"{len(missing)} options were not priced ({sorted(missing)[0]})")
    return {key: Sensed(*found[name].numpy()) for key, name in names.items()}


def heard(
    run: LayerRun, options: Options, way: Mapping[str, Change], tokens: TokenSet, layer: int
) -> tuple[Listener, Callable[[], Mapping[str, Tensor]]]:
    """What `reverse` asks of a layer."""
    moe_layers = run.architecture.moe_layers
    order_E = options.order_LE[moe_layers.index(layer)].tolist() if layer in moe_layers else []
    sums = Sums(options, way, order_E, run, tokens.tokens)
    return Listener(sums.unit, sums.wanted, sums.gates), partial(sums.rows, tokens.ids_BT.shape[1])


def surrogate(checkpoint: Checkpoint, options: Options, trial: Trial, run: Path) -> Prices:
    """`price` without running the options: by token, which costs a bias and saves most of the noise. Leaves run/costs.json."""
    inputs = inputs_of(checkpoint, options, trial, SURROGATE)
    if (run / "costs.json").exists():
        return Prices.load(run / "costs.json", inputs)
    nats = {key: sensed.price for key, sensed in sense(checkpoint, options, trial, run / "slopes").items()}
    prices = Prices.of(SURROGATE, options, checkpoint.architecture.moe_layers, trial.tokens.tokens, nats)
    prices.save(run / "costs.json", inputs)
    return prices
