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
from ..errors import InputError
from ..plan import SOURCE
from ..stream import Change, LayerRun
from ..stream.backward import Listener, UnitPass
from ..tokens import TokenSet
from .branch import Branch, changes
from .prices import TRACE, Key, Price, Prices, inputs_of
from .reverse import reverse

ALPHA = 0.15  # as shipped
PROJECTIONS = 3


@dataclass
class Traces:
    """Of each matrix of a layer: Σ over tokens of |g|² |x|², and what each format does to its weights."""

    offered: Mapping[str, Sequence[str]]
    way: Mapping[str, Change]
    sums: dict[str, float] = field(default_factory=dict)
    mse: dict[tuple[str, str], float] = field(default_factory=dict)
    unit_of: dict[str, str] = field(default_factory=dict)

    def unit(self, seen: UnitPass) -> None:
        for n, x_nI, slope_nO in zip(seen.linears, seen.x, seen.slope):
            sizes_n = x_nI.square().sum(1).double() * slope_nO.square().sum(1).double()
            self.sums[n.name] = self.sums.get(n.name, 0.0) + float(sizes_n.sum())
            self.unit_of[n.name] = seen.unit
        formats = [f for f in self.offered.get(seen.unit, ()) if f != SOURCE]
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


def trace(
    checkpoint: Checkpoint, offered: Mapping[str, Sequence[str]], counts: Sequence[int], order_LE: np.ndarray,
    saliency_LE: np.ndarray, tokens: TokenSet, run: Path, *, rounding: str = "rtn", alpha: float = ALPHA,
    quiet: bool = False,
) -> Prices:  # fmt: skip
    """Their prices of all options, without errors. Arguments as for `price`; S is criterion "dropout". Leaves run/costs.json."""
    a, engine = checkpoint.architecture, LayerRun(checkpoint)
    way = changes([Branch({unit: f}) for unit, of in offered.items() for f in of if f != SOURCE], rounding)
    cuts = list(counts), order_LE.tolist(), saliency_LE.tolist(), alpha
    inputs = inputs_of(checkpoint, tokens, rounding, TRACE, offered, *cuts)
    if (run / "costs.json").exists():
        return Prices.load(run / "costs.json", inputs)
    counted = tokens.rows * (tokens.ids_BT.shape[1] - 1)
    hearing = partial(heard, offered, way, counted)
    found = reverse(engine, tokens, run / TRACE, inputs, hearing, from_text=True, quiet=quiet)
    asked = [(unit, f) for unit, of in offered.items() for f in of if f != SOURCE]
    if missing := [f"{unit}/{f}" for unit, f in asked if f"{unit}/{f}" not in found]:
        raise InputError(f"{len(missing)} options were not priced ({missing[0]}, …); report this as a bug")
    prices: dict[Key, Price] = {(unit, f): Price(float(found[f"{unit}/{f}"]), 0.0) for unit, f in asked}
    prices |= drops(a.moe_layers, counts, order_LE, saliency_LE, alpha)
    table = Prices.of(TRACE, offered, a.moe_layers, order_LE, tokens.tokens, prices)
    table.save(run / "costs.json", inputs)
    return table


def heard(
    offered: Mapping[str, Sequence[str]], way: Mapping[str, Change], counted: int, layer: int
) -> tuple[Listener, Callable[[], Mapping[str, Tensor]]]:
    """What `reverse` asks of a layer."""
    traces = Traces(offered, way)
    return Listener(traces.unit), partial(traces.found, counted)


def drops(
    layers: Sequence[int], counts: Sequence[int], order_LE: np.ndarray, saliency_LE: np.ndarray, alpha: float = ALPHA
) -> dict[Key, Price]:
    """3 α S of the experts that go, by MoE layer and kept count."""
    return {
        (layer, kept): Price(PROJECTIONS * alpha * float(saliency_E[order_E[kept:]].sum()), 0.0)
        for layer, order_E, saliency_E in zip(layers, order_LE, saliency_LE)
        for kept in counts
    }
