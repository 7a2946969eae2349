"""Prices as PrismaQuant makes them, to compare with and to make its plans again: no nats, and no measure of what is lost.

    a format     Σ over matrices of ½ · trace(H) · mean (ΔW)²     trace(H) = 1/T · Σ over tokens of |g|² |x|²
    a drop       3 α · Σ over the dropped experts of S            S = 1/T · Σ over tokens of gate · |f|²

H is the diagonal of the Fisher matrix by the text's own next tokens, summed token by token; T is one count for all
matrices. Its April version divided an expert's by the tokens routed to it, and squared a batch's gradient, which counts
chance agreement of tokens as curvature; both are left out. α times S is charged once for each of an expert's three
projections, as there. Leaves out ratios of experts as a menu: any count may be had.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import FaultError
from ..plan import SOURCE
from ..stream import Change, LayerRun
from ..stream.backward import Listener, UnitPass
from .branch import Trial, changes
from .prices import TRACE, Key, Options, Price, Prices, inputs_of
from .slopes import reverse

ALPHA = 0.15  # as shipped
PROJECTIONS = 3


@dataclass
class Traces:
    """Of each matrix of a layer: Σ over tokens of |g|² |x|², and what each format does to its weights."""

    options: Options
    way: Mapping[str, Change]
    sums: dict[str, float] = field(default_factory=dict)
    mse: dict[tuple[str, str], float] = field(default_factory=dict)
    unit_of: dict[str, str] = field(default_factory=dict)

    def unit(self, seen: UnitPass) -> None:
        for n, x_nI, slope_nO in zip(seen.linears, seen.x, seen.slope):
            sizes_n = x_nI.square().sum(1).double() * slope_nO.square().sum(1).double()
            self.sums[n.name] = self.sums.get(n.name, 0.0) + float(sizes_n.sum())
            self.unit_of[n.name] = seen.unit
        formats = [f for f in self.options.units.get(seen.unit, ()) if f != SOURCE]
        if (
            formats and (seen.linears[0].name, formats[0]) not in self.mse
        ):  # an expert's tokens may come in several passes
            for format in formats:
                for n, w_OI, after_OI in zip(seen.linears, seen.w, self.way[format](seen.linears, seen.w)):
                    self.mse[n.name, format] = float((after_OI - w_OI).double().square().mean())

    def found(self, tokens: int) -> dict[str, Tensor]:
        """ "unit/format" -> ½ Σ trace · error."""
        prices: dict[str, float] = {}
        for (name, format), mse in self.mse.items():
            key = f"{self.unit_of[name]}/{format}"
            prices[key] = prices.get(key, 0.0) + 0.5 * self.sums[name] / tokens * mse
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in prices.items()}


def trace(checkpoint: Checkpoint, options: Options, saliency_LE: np.ndarray, trial: Trial, run: Path) -> Prices:
    """Their prices of all options, without errors; S is criterion "dropout". Leaves run/costs.json."""
    layers, tokens = checkpoint.architecture.moe_layers, trial.tokens
    way = changes(options.branches(layers).values(), trial.rounding)
    inputs = inputs_of(checkpoint, options, trial, TRACE, saliency_LE.tolist(), ALPHA)
    if (run / "costs.json").exists():
        return Prices.load(run / "costs.json", inputs)
    hearing = partial(heard, options, way, tokens.rows * (tokens.ids_BT.shape[1] - 1))
    found = reverse(LayerRun(checkpoint), trial, run / TRACE, inputs, hearing, seed=None)
    if missing := [f"{unit}/{f}" for unit, f in options.rounded if f"{unit}/{f}" not in found]:
        raise FaultError(f"{len(missing)} options were not priced ({missing[0]}, …)")
    prices = drops(layers, options, saliency_LE)
    prices |= {(unit, f): Price(float(found[f"{unit}/{f}"]), 0.0) for unit, f in options.rounded}
    table = Prices.of(TRACE, options, layers, tokens.tokens, prices)
    table.save(run / "costs.json", inputs)
    return table


def heard(
    options: Options, way: Mapping[str, Change], counted: int, layer: int
) -> tuple[Listener, Callable[[], Mapping[str, Tensor]]]:
    """What `reverse` asks of a layer."""
    traces = Traces(options, way)
    return Listener(traces.unit), partial(traces.found, counted)


def drops(layers: Sequence[int], options: Options, saliency_LE: np.ndarray) -> dict[Key, Price]:
    """3 α S of the experts that go, by MoE layer and kept count."""
    return {
        (layer, kept): Price(PROJECTIONS * ALPHA * float(saliency_E[order_E[kept:]].sum()), 0.0)
        for layer, order_E, saliency_E in zip(layers, options.order_LE, saliency_LE)
        for kept in options.counts
    }
