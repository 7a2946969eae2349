"""What each option costs alone, in nats per token: formats a unit may take, counts of experts a layer may keep.

An option is a branch that differs in one unit; `measure` runs them all. Or slopes say what they cost (surrogate), or
traces of the Fisher matrix do (trace): the table is the same. Prices of single options do not add up to a
plan's KL: `composition` says what they come to. Leaves out choosing (allocate), and bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifact import identity, read_json, write_json
from ..checkpoint import Checkpoint
from ..checkpoint.containers import Container
from ..errors import PlanError
from ..families import Architecture
from ..formats import NAMES
from ..plan import SOURCE
from ..rounding import arithmetic
from .branch import Branch, Trial
from .branches import VERSION, measure

KIND = "costs"
MEASURED, SURROGATE, ANCHORED, TRACE = "measured", "surrogate", "anchored", "trace"
VERSIONS = {
    MEASURED: VERSION,
    SURROGATE: 1,
    ANCHORED: 1,
    TRACE: 1,
}  # one goes up with any change to what that way finds
Key = tuple[str, str] | tuple[int, int]  # (unit, format), or (MoE layer, kept count)
KEPT_SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)  # of experts, at which dropping is measured; between them it is interpolated


@dataclass(frozen=True)
class Options:
    """What is on offer, to be priced one by one.

    units      unit -> formats; "source" costs nothing
    counts     of experts kept, for each MoE layer alone
    order_LE   ids of each MoE layer's experts, the one to keep first in front
    """

    units: Mapping[str, Sequence[str]]
    counts: Sequence[int]
    order_LE: np.ndarray

    @property
    def rounded(self) -> list[tuple[str, str]]:
        """Every (unit, format) but "source"."""
        return [(unit, format) for unit, of in self.units.items() for format in of if format != SOURCE]

    def branches(self, layers: Sequence[int]) -> dict[Key, Branch]:
        """Each as a branch; `layers` are the MoE layers, rows of `order_LE`."""
        found: dict[Key, Branch] = {(unit, format): Branch({unit: format}) for unit, format in self.rounded}
        for layer, order_E in zip(layers, self.order_LE):
            for kept in self.counts:
                found[layer, kept] = Branch({}, {layer: tuple(sorted(order_E[:kept].tolist()))})
        return found


@dataclass(frozen=True)
class Price:
    """Nats per token with their standard error over rows."""

    nats: float
    error: float


@dataclass(frozen=True)
class Prices:
    """All options on offer, and what each costs alone.

    rounded   unit -> format -> price; "source" costs nothing
    dropped   MoE layer -> kept count -> price, in the order `order_LE`, rows of which are `dropped`'s layers
    tokens    that were read
    harm      how they were found: "measured", "surrogate", "anchored" or "trace"
    """

    rounded: Mapping[str, Mapping[str, Price]]
    dropped: Mapping[int, Mapping[int, Price]]
    order_LE: np.ndarray
    tokens: int
    harm: str = MEASURED

    @staticmethod
    def of(harm: str, options: Options, layers: Sequence[int], tokens: int, found: Mapping[Key, Price]) -> "Prices":
        """From the price of each (unit, format) but "source", and each (MoE layer, kept count)."""
        rounded = {unit: {f: found[unit, f] for f in of if f != SOURCE} for unit, of in options.units.items()}
        for unit, of in options.units.items():
            rounded[unit] |= {SOURCE: Price(0.0, 0.0)} if SOURCE in of else {}
        dropped: dict[int, dict[int, Price]] = {layer: {} for layer in layers}
        for (where, what), price in found.items():
            if isinstance(where, int) and isinstance(what, int):
                dropped[where][what] = price
        return Prices(rounded, dropped, options.order_LE, tokens, harm)

    def kept(self, count: int) -> dict[int, tuple[int, ...]]:
        """MoE layer -> the ids that stay, ascending; nothing for all of them."""
        if count == self.order_LE.shape[1]:
            return {}
        return {layer: tuple(sorted(order[:count].tolist())) for layer, order in zip(self.dropped, self.order_LE)}

    def dropping(self, layer: int, kept: Sequence[int]) -> np.ndarray:
        """Nats [K] of keeping so many experts of a layer.

        Measured counts are as measured, made to rise with every expert dropped. Between them ln nats is linear in
        ln(experts dropped); above the largest measured count nats are in proportion to the experts dropped.
        Infinite below the smallest.
        """
        experts, measured = self.order_LE.shape[1], self.dropped[layer]
        counts = sorted(measured, reverse=True)
        gone = experts - np.array(kept, np.float64)
        if not counts:
            return np.where(gone > 0, np.inf, 0.0)
        x = experts - np.array(counts, np.float64)
        y = np.maximum.accumulate([max(measured[count].nats, 1e-12) for count in counts])
        inside = np.exp(np.interp(np.log(np.maximum(gone, 1e-9)), np.log(x), np.log(y)))
        return np.where(gone > x[-1], np.inf, np.where(gone < x[0], y[0] * gone / x[0], inside))

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        body = {
            "unit": "nats per token of KL(source‖option), each option alone",
            "harm": self.harm,
            "tokens": self.tokens,
            "rounded": {u: {f: vars(p) for f, p in of.items()} for u, of in self.rounded.items()},
            "dropped": {str(n): {str(k): vars(p) for k, p in of.items()} for n, of in self.dropped.items()},
            "order": self.order_LE.tolist(),
        }
        write_json(path, KIND, body, inputs)

    @staticmethod
    def load(path: Path, inputs: Mapping[str, str] | None = None) -> "Prices":
        body = read_json(path, KIND, inputs)
        return Prices(
            {u: {f: Price(**p) for f, p in of.items()} for u, of in body["rounded"].items()},
            {int(n): {int(k): Price(**p) for k, p in of.items()} for n, of in body["dropped"].items()},
            np.array(body["order"], np.int64),
            body["tokens"],
            body.get("harm", MEASURED),
        )


def offers(checkpoint: Checkpoint, container: Container, formats: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Formats that each unit can have in `container`, as its engines say; "source" where its own can stay.

    Raises `PlanError` for a format there is not, and for a unit that can have none.
    """
    if unknown := [f for f in formats if f != SOURCE and f not in NAMES]:
        raise PlanError(f"unknown format {unknown[0]!r}; choose from {SOURCE}, {', '.join(NAMES)}")
    found: dict[str, tuple[str, ...]] = {}
    known: dict[tuple[object, ...], tuple[str, ...]] = {}  # matrices alike are asked about once
    for unit, members in checkpoint.architecture.units.items():
        if members[0].role == "mtp":  # never run, so never priced: its values stay
            continue
        own = checkpoint.formats[members[0].name]
        alike = (own, *((n.projection, n.shape) for n in members if not n.expert))
        if alike not in known:
            wanted = dict.fromkeys(SOURCE if format == own else format for format in formats)
            known[alike] = tuple(f for f in wanted if accepted(checkpoint, container, unit, own if f == SOURCE else f))
        if not known[alike]:
            raise PlanError(f"{container.name} carries {unit} in none of {', '.join(formats)}; offer another format")
        found[unit] = known[alike]
    return found


def accepted(checkpoint: Checkpoint, container: Container, unit: str, format: str) -> bool:
    if format not in container.packings:
        return False
    a = checkpoint.architecture
    mine = {linear.name for linear in a.units[unit]}
    try:
        container.config(a, {n.name: format if n.name in mine else "bf16" for n in a.linears}, checkpoint.config)
    except PlanError:
        return False
    return True


def default_counts(architecture: Architecture) -> tuple[int, ...]:
    """Kept counts at which dropping is measured, largest first: the nearest that can be to some shares of all."""
    experts, counts = architecture.experts, architecture.counts
    asked = (n for share in KEPT_SHARES if architecture.top_k <= (n := round(share * experts)) < experts)
    near = (min(counts, key=lambda count: (abs(count - n), count)) for n in asked)
    return tuple(dict.fromkeys(count for count in near if count < experts))


def inputs_of(checkpoint: Checkpoint, options: Options, trial: Trial, harm: str, *rest: object) -> dict[str, str]:
    """What prices depend on: model, text, rounding, how they are found, what is on offer, and whatever is in `rest`.

    `harm` and the rounding go with their versions, and so do formats.
    """
    versions = arithmetic(trial.rounding, {format for _, format in options.rounded})
    offered = {unit: list(of) for unit, of in options.units.items()}
    cuts = list(options.counts), options.order_LE.tolist()
    return {
        "source": checkpoint.identity,
        "tokens": trial.tokens.identity,
        "rounding": versions["rounding"],
        "harm": f"{harm} {VERSIONS[harm]}",
        "options": identity(offered, versions["formats"], *cuts, *rest),
    }


def price(checkpoint: Checkpoint, options: Options, trial: Trial, run: Path) -> Prices:
    """Measure every option alone, in one sweep where memory allows, and leave run/costs.json.

    Done before with the same inputs, it only reads. Continues where it was stopped.
    """
    inputs, layers = inputs_of(checkpoint, options, trial, MEASURED), checkpoint.architecture.moe_layers
    if (run / "costs.json").exists():
        return Prices.load(run / "costs.json", inputs)
    branches = options.branches(layers)
    found = measure(checkpoint, list(branches.values()), trial, run / "costs", title="price")
    nats = {key: Price(m.nats, m.error) for key, m in zip(branches, found)}
    prices = Prices.of(MEASURED, options, layers, trial.tokens.tokens, nats)
    prices.save(run / "costs.json", inputs)
    return prices
