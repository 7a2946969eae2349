"""Within a budget: prices, the rule, the frontier, a few candidates measured on unseen text, and the one that ships.

Every step leaves a file in the run folder: costs.json, rule.json, frontier.json, candidates.json. Leaves out
calibration, and making the plan true (compress, export).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..allocate import Frontier, Menu
from ..artifact import write_json
from ..calibrate import Statistics
from ..checkpoint import Checkpoint
from ..containers import Container
from ..errors import PlanError
from ..fit import Layout, servable
from ..measure import (
    Branch,
    Measured,
    Price,
    Prices,
    Rule,
    affordable_tokens,
    default_counts,
    measure,
    offers,
    price,
    singles,
    some_rows,
)
from ..plan import Plan
from ..select import order_experts
from ..tokens import TokenSet
from .plans import Candidate, candidates, menu_of, plan_of, sums, uniform, varied

FORMATS_OFFERED = ("source", "mxfp8", "nvfp4", "mxfp4", "int4_g64", "int3_g64", "int2_g64")
POINTS = 2000  # of the frontier that are written down


@dataclass(frozen=True)
class Budget:
    """What is asked for, and what may be spent on finding it.

    fit           bytes on disk, of the whole folder; or bits: stored bits per weight of the source
    experts       the kept counts allowed; empty: any from half of them up
    formats       what units may be written in
    price_tokens  that every option is measured on, of the calibration text
    seconds       for pricing, about: fewer tokens if they would take longer
    rule_plans    plans measured whole to learn how prices compose
    choice        candidates measured on text of their own
    memory_bytes  for hidden states; by itself half of what is free
    layout        how the model will be served: formats that an engine would not load so are not on offer
    """

    fit: int | None = None
    bits: float | None = None
    experts: tuple[int, ...] = ()
    formats: tuple[str, ...] = FORMATS_OFFERED
    price_tokens: int = 8_192
    rule_plans: int = 24
    choice: int = 6
    memory_bytes: int | None = None
    seconds: float | None = None
    layout: Layout | None = None

    def offered(self, source: Checkpoint, container: Container) -> dict[str, tuple[str, ...]]:
        """Formats for each unit that engines load. Raises `PlanError`."""
        found = offers(source, container, self.formats)
        return found if self.layout is None else servable(source, container, found, self.layout)

    def bytes(self, menu: Menu) -> int:
        """Raises `PlanError` when nothing is asked for."""
        if self.fit is None and self.bits is None:
            raise PlanError("no budget is given; say fit in bytes, or bits per weight")
        return min(n for n in (self.fit, None if self.bits is None else menu.budget(self.bits)) if n is not None)


@dataclass(frozen=True)
class Chosen:
    """The plan that ships, and what was known of it before."""

    plan: Plan
    candidate: Candidate
    measured: Measured
    budget_bytes: int

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "name": self.candidate.name, "bytes": self.candidate.bytes, "budget_bytes": self.budget_bytes,
            "predicted_nats": self.candidate.predicted_nats, "measured_nats": self.measured.nats, "error": self.measured.error,
        }  # fmt: skip


def choose(
    source: Checkpoint, container: Container, statistics: Statistics, calibration: TokenSet, choice: TokenSet, run: Path,
    budget: Budget, *, criterion: str = "reap", policy: str = "pooled", rounding: str = "rtn", quiet: bool = False,
) -> Chosen:  # fmt: skip
    """The plan of smallest measured KL on `choice` that is within the budget.

    calibration  text that experts were ranked on; options are priced on some of its rows
    choice       text that nothing before has seen

    Raises `PlanError` when nothing fits. Continues where it was stopped.
    """
    a = source.architecture
    offered = budget.offered(source, container)
    order_LE = order_experts(statistics, criterion, policy)
    counts = list(default_counts(a.experts, a.top_k))
    if budget.experts:
        counts = sorted(set(budget.experts) - {a.experts}, reverse=True)
    options = [b for of in singles(source, offered, counts, order_LE) for b in of.values()]
    text = price_text(source, options, calibration, run / "priced.safetensors", budget)
    prices = price(
        source, offered, counts, order_LE, text, run, rounding=rounding, memory_bytes=budget.memory_bytes, quiet=quiet
    )
    kept = kept_counts(a.experts, a.top_k, counts, budget.experts)
    rule = learn(source, container, prices, kept, text, run, budget, rounding, quiet)
    menu = menu_of(source, container, prices, kept, rule.weight)
    frontier = Frontier.of(menu)
    limit = budget.bytes(menu)
    note_frontier(run / "frontier.json", frontier, menu, rule, limit, {"source": source.identity})
    found = candidates(source, container, prices, rule, frontier, menu, limit, rounding, budget.choice)
    branches = [Branch.of(c.plan) for c in found]
    measured = measure(
        source, branches, choice, run / "candidates", rounding=rounding, memory_bytes=budget.memory_bytes, quiet=quiet,
        title="candidates",
    )  # fmt: skip
    best = min(range(len(found)), key=lambda i: (measured[i].nats, found[i].bytes))
    if math.isinf(measured[best].nats):
        raise PlanError(f"all {len(found)} candidates give values that are no numbers; offer other formats")
    note_candidates(run / "candidates.json", found, measured, best, limit, rule, choice, source)
    return Chosen(found[best].plan, found[best], measured[best], limit)


def check_budget(source: Checkpoint, container: Container, budget: Budget) -> None:
    """Raise `PlanError` where the smallest plan on offer is too large, before anything is read or measured."""
    a, free = source.architecture, Price(0.0, 0.0)
    offered = budget.offered(source, container)
    kept = kept_counts(a.experts, a.top_k, default_counts(a.experts, a.top_k), budget.experts)
    prices = Prices(
        {unit: dict.fromkeys(formats, free) for unit, formats in offered.items()},
        {layer: dict.fromkeys({kept[0]} - {a.experts}, free) for layer in a.moe_layers},
        np.zeros((0, a.experts), np.int64),
        tokens=0,
    )
    menu = menu_of(source, container, prices, kept[:1])
    Frontier.of(menu).fit(budget.bytes(menu))


def price_text(
    source: Checkpoint, options: Sequence[Branch], calibration: TokenSet, file: Path, budget: Budget
) -> TokenSet:
    """Rows of the calibration text to price on. How many fit into the time is found once, and kept in `file`."""
    if budget.seconds is None:
        return some_rows(calibration, budget.price_tokens)
    if not file.exists():
        tokens = min(budget.price_tokens, affordable_tokens(source, options, budget.seconds))
        some_rows(calibration, tokens).save(file)
    return TokenSet.load(file)


def kept_counts(experts: int, top_k: int, counts: Sequence[int], asked: Sequence[int]) -> list[int]:
    """Counts on offer, ascending: those asked for, or any from the smallest one measured."""
    if asked:
        return sorted(set(asked))
    return list(range(min([*counts, experts]), experts + 1))


def learn(
    source: Checkpoint, container: Container, prices: Prices, kept: Sequence[int], text: TokenSet, run: Path, budget: Budget,
    rounding: str, quiet: bool,
) -> Rule:  # fmt: skip
    """Measure plans whole and fit the rule; run/rule.json keeps both."""
    menu = menu_of(source, container, prices, kept)
    plans = varied(menu, budget.rule_plans - 2, seed=0)
    middle = budget.formats[len(budget.formats) // 2]
    plans += [(uniform(menu, f, len(kept) - 1)[0], kept[-1]) for f in dict.fromkeys((middle, budget.formats[-1]))]
    branches = [Branch.of(plan_of(source, container, prices, formats, k, rounding)) for formats, k in plans]
    found = measure(
        source,
        branches,
        text,
        run / "rule",
        rounding=rounding,
        memory_bytes=budget.memory_bytes,
        quiet=quiet,
        title="rule",
    )
    both = [sums(prices, formats, k) for formats, k in plans]
    rule = Rule.fit([r for r, _ in both], [d for _, d in both], [m.nats for m in found])
    body = rule.facts | {
        "predicts": "KL = e^a · (Σ rounding + weight · Σ dropping)^b, nats per token",
        "tokens": text.tokens,
        "measured": [
            {"experts": k, "rounding": r, "dropping": d, "nats": m.nats, "error": m.error, "formats": formats}
            for (formats, k), (r, d), m in zip(plans, both, found)
        ],
    }  # fmt: skip
    write_json(run / "rule.json", "rule", body, {"source": source.identity, "tokens": text.identity})
    return rule


def note_frontier(path: Path, frontier: Frontier, menu: Menu, rule: Rule, limit: int, inputs: dict[str, str]) -> None:
    """Every point that no other beats (evenly thinned if there are very many), the knee, and the bounds at the budget."""
    k, p = frontier.pareto()
    at = np.unique(np.linspace(0, len(k) - 1, min(POINTS, len(k))).round().astype(int))
    harm = frontier.harm_KP[k, p]
    knee_k, knee_p = frontier.knee()
    bound_K = rule.predict(frontier.bounds(limit))
    body = {
        "points": len(k),
        "experts": frontier.kept_K[k][at].tolist(),
        "bytes": frontier.bytes_KP[k, p][at].tolist(),
        "harm_nats": harm[at].tolist(),
        "predicted_nats": rule.predict(harm[at]).tolist(),
        "knee": {
            "experts": int(frontier.kept_K[knee_k]),
            "bytes": int(frontier.bytes_KP[knee_k, knee_p]),
            "predicted_nats": float(rule.predict(frontier.harm_KP[knee_k, knee_p])),
        },
        "budget_bytes": limit,
        "budget_bits": menu.bits(limit),
        "bounds": {
            str(kept): float(b) for kept, b in zip(frontier.kept_K.tolist(), bound_K) if math.isfinite(b)
        },
        "rule": rule.facts,
    }  # fmt: skip
    write_json(path, "frontier", body, inputs)


def note_candidates(
    path: Path, found: Sequence[Candidate], measured: Sequence[Measured], best: int, limit: int, rule: Rule, text: TokenSet,
    source: Checkpoint,
) -> None:  # fmt: skip
    """What each candidate was predicted and measured to cost, and which of them ships."""
    body: dict[str, Any] = {
        "budget_bytes": limit,
        "tokens": text.tokens,
        "text": dict(text.facts),
        "rule_error": rule.error,
        "ships": best,
        "candidates": [
            {
                "name": c.name, "experts": c.experts, "bytes": c.bytes, "harm_nats": c.harm, "predicted_nats": c.predicted_nats,
                "measured_nats": m.nats, "error": m.error, "nonfinite": m.nonfinite, "formats": dict(c.plan.formats),
            }
            for c, m in zip(found, measured)
        ],
    }  # fmt: skip
    write_json(path, "candidates", body, {"source": source.identity, "tokens": text.identity})
