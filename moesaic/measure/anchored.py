"""Prices of which a few are measured: each unit's cheapest and dearest format, and each layer's deepest cut.

What slopes cannot see, tokens that change experts, makes the surrogate too low by a factor that differs between
units and falls as damage grows, but it does so smoothly: between two measured formats ln(measured) is nearly linear in
ln(surrogate). A cut of another depth is in proportion. Two branches a unit and one a layer are run, however many options
there are. Leaves out both ways of pricing themselves (prices, surrogate).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..checkpoint import Checkpoint
from ..plan import SOURCE
from .branch import Trial
from .prices import ANCHORED, Key, Options, Price, Prices, inputs_of, price
from .surrogate import surrogate

LEAST = 1e-15  # nats: of an option that nothing depends on


def anchored(checkpoint: Checkpoint, options: Options, trial: Trial, run: Path) -> Prices:
    """`price`, with most of it from slopes. Leaves run/costs.json, and what it was made of in run/anchors."""
    inputs = inputs_of(checkpoint, options, trial, ANCHORED)
    if (run / "costs.json").exists():
        return Prices.load(run / "costs.json", inputs)
    sensed = surrogate(checkpoint, options, trial, run / "anchors" / "slopes")
    few = {unit: ends(of) for unit, of in sensed.rounded.items()}
    anchors = replace(options, units=few, counts=sorted(options.counts)[:1])
    found = between(sensed, price(checkpoint, anchors, trial, run / "anchors"))
    prices = Prices.of(ANCHORED, options, checkpoint.architecture.moe_layers, trial.tokens.tokens, found)
    prices.save(run / "costs.json", inputs)
    return prices


def ends(of: Mapping[str, Price]) -> list[str]:
    """The cheapest and the dearest of a unit's formats; one, where there is no other."""
    formats = sorted((f for f in of if f != SOURCE), key=lambda f: of[f].nats)
    return list(dict.fromkeys((*formats[:1], *formats[-1:])))


def between(sensed: Prices, measured: Prices) -> dict[Key, Price]:
    """Every option of `sensed`, at what those that were measured make of it; errors are theirs, in proportion."""
    found: dict[Key, Price] = {}
    for unit, of in sensed.rounded.items():
        known = sorted((f for f in measured.rounded[unit] if f != SOURCE), key=lambda f: of[f].nats)
        at, nats = (np.log([max(t[f].nats, LEAST) for f in known]) for t in (of, measured.rounded[unit]))
        doubt = [measured.rounded[unit][f].error / max(measured.rounded[unit][f].nats, LEAST) for f in known]
        for format in (f for f in of if f != SOURCE):
            x = np.log(max(of[format].nats, LEAST))
            value = float(np.exp(np.interp(x, at, nats)))
            found[unit, format] = Price(value, value * float(np.interp(x, at, doubt)))
    for layer, cuts in sensed.dropped.items():
        for deepest, told in measured.dropped[layer].items():
            rate = told.nats / max(cuts[deepest].nats, LEAST)
            for kept, cut in cuts.items():
                value = cut.nats * rate
                found[layer, kept] = Price(value, value * told.error / max(told.nats, LEAST))
    return found
