"""Within a budget: prices, the rule, the frontier, a few candidates measured on unseen text, and the one that ships.

    price_options → trace_frontier → choose

Every step leaves files in the run folder: costs.json; rule.json and frontier.json; candidates.json. Leaves out
calibration, and making the plan true (compress, export).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..allocate import Allocation, Frontier, Menu
from ..artifact import write_json
from ..calibrate import Statistics
from ..checkpoint import Checkpoint
from ..containers import Container
from ..errors import PlanError
from ..fit import Layout, servable
from ..measure import (
    ANCHORED,
    MEASURED,
    SURROGATE,
    TRACE,
    Branch,
    Measured,
    Price,
    Prices,
    Rule,
    affordable_tokens,
    anchored,
    default_counts,
    effort,
    measure,
    offers,
    price,
    reverse_work,
    singles,
    some_rows,
    surrogate,
    trace,
)
from ..plan import Plan
from ..rounding import ROUNDINGS
from ..select import order_experts, scores
from ..tokens import TokenSet
from .notes import note_candidates, note_frontier
from .plans import Candidate, candidates, exact, menu_of, plan_of, sums, uniform, varied

FORMATS_OFFERED = ("source", "mxfp8", "nvfp4", "mxfp4", "int4_g64", "int3_g64", "int2_g64")
STAND_IN = "rtn"  # for roundings that look at data, until the plan is made true: search ranks formats no better
HARMS = (MEASURED, ANCHORED, SURROGATE, TRACE)


@dataclass(frozen=True)
class Budget:
    """What is asked for, and what may be spent on finding it.

    fit           bytes on disk, of the whole folder; or bits: stored bits per weight of the source
    experts       the kept counts allowed; empty: any from half of them up
    formats       what units may be written in
    harm          how options are priced: "measured" runs each, "surrogate" takes one sweep backward for all,
                  "anchored" that and runs a few; "trace" is PrismaQuant's, to compare with (which drops by "dropout")
    price_tokens  that every option is priced on, of the calibration text
    seconds       for measuring prices, about: fewer tokens if they would take longer
    rule_plans    plans measured whole to learn how prices compose
    choice        candidates measured on text of their own
    memory_bytes  for hidden states; by itself half of what is free
    layout        how the model will be served: formats that an engine would not load so are not on offer
    """

    fit: int | None = None
    bits: float | None = None
    experts: tuple[int, ...] = ()
    formats: tuple[str, ...] = FORMATS_OFFERED
    harm: str = MEASURED
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

    def bytes(self, menu: Menu) -> int | None:
        """The lesser of what is asked for; None when nothing is."""
        asked = (self.fit, None if self.bits is None else menu.budget(self.bits))
        return min((n for n in asked if n is not None), default=None)

    def kept(self, experts: int, top_k: int) -> list[int]:
        """Counts on offer, ascending: those asked for, or any down to half."""
        least = min([*default_counts(experts, top_k), experts])
        return sorted(set(self.experts)) or list(range(least, experts + 1))


@dataclass(frozen=True)
class Setting:
    """What every step has to know."""

    source: Checkpoint
    container: Container
    run: Path
    budget: Budget
    criterion: str = "reap"
    policy: str = "pooled"
    rounding: str = "rtn"
    quiet: bool = False
    domains: Mapping[str, float] | None = None  # name -> share, of those that rank experts; None: all alike

    @property
    def kept(self) -> list[int]:
        return self.budget.kept(self.source.architecture.experts, self.source.architecture.top_k)

    @property
    def trial(self) -> str:
        """The rounding that options and plans are tried with: the plan's own, unless that looks at data."""
        return STAND_IN if self.reads_text else self.rounding

    @property
    def reads_text(self) -> bool:
        """Whether the plan's rounding does, so that its matrices come from an overlay."""
        return self.rounding in ROUNDINGS and bool(ROUNDINGS[self.rounding].needs)

    def measure(self, plans: Sequence[Plan], text: TokenSet, title: str) -> list[Measured]:
        return measure(
            self.source, [Branch.of(plan) for plan in plans], text, self.run / title, rounding=self.trial,
            memory_bytes=self.budget.memory_bytes, quiet=self.quiet, title=title,
        )  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """The plan that ships, and what was known of it before."""

    plan: Plan
    candidate: Candidate
    measured: Measured
    budget_bytes: int
    rounding: str  # that it was measured with

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "name": self.candidate.name, "bytes": self.candidate.bytes, "budget_bytes": self.budget_bytes,
            "predicted_nats": self.candidate.predicted_nats, "measured_nats": self.measured.nats, "error": self.measured.error,
            "rounding": self.rounding,
        }  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """All that is on offer, with its curve."""

    prices: Prices
    rule: Rule
    menu: Menu
    frontier: Frontier
    budget_bytes: int | None

    @property
    def best(self) -> Allocation | None:
        """The plan of least predicted KL within the budget, where there is one. Raises `PlanError` if none fits."""
        return None if self.budget_bytes is None else self.frontier.fit(self.budget_bytes)

    def exact(self, setting: Setting, found: Allocation) -> Candidate:
        """An allocation as a plan, with the bytes of its folder."""
        return exact(
            setting.source,
            setting.container,
            self.prices,
            self.frontier,
            found.budget,
            found,
            setting.rounding,
            self.rule,
        )

    def curve(self, points: int) -> list[dict[str, Any]]:
        """Some points of the frontier from the smallest to the largest, and its knee: bytes, bits, experts, predicted_nats."""
        k, p = self.frontier.pareto()
        knee = self.frontier.knee()
        at = set(np.linspace(0, len(k) - 1, min(points, len(k))).round().astype(int).tolist())
        return [
            {
                "bytes": int(self.frontier.bytes_KP[row]), "bits": self.menu.bits(int(self.frontier.bytes_KP[row])),
                "experts": int(self.frontier.kept_K[row[0]]), "knee": row == knee,
                "predicted_nats": float(self.rule.predict(self.frontier.harm_KP[row])),
            }
            for i, row in enumerate(zip(k.tolist(), p.tolist()))
            if i in at or row == knee
        ]  # fmt: skip


def check_budget(setting: Setting) -> None:
    """Raise `PlanError` for prices there are not, and where the smallest plan is too large: before anything is read."""
    a, free, budget = setting.source.architecture, Price(0.0, 0.0), setting.budget
    if budget.harm not in HARMS:
        raise PlanError(f"no prices {budget.harm!r}; there are {', '.join(HARMS)}")
    least = setting.kept[0]
    offered = budget.offered(setting.source, setting.container)
    prices = Prices(
        {unit: dict.fromkeys(formats, free) for unit, formats in offered.items()},
        {layer: {least: free} if least < a.experts else {} for layer in a.moe_layers},
        np.zeros((0, a.experts), np.int64),
        tokens=0,
    )
    menu = menu_of(setting.source, setting.container, prices, [least], listed=setting.reads_text)
    if (limit := budget.bytes(menu)) is not None:
        Frontier.of(menu).fit(limit)


def price_options(setting: Setting, statistics: Statistics, calibration: TokenSet) -> tuple[Prices, TokenSet]:
    """Every option's price, and the rows of `calibration` that they were found on. Leaves costs.json."""
    source, budget, a = setting.source, setting.budget, setting.source.architecture
    offered = budget.offered(source, setting.container)
    order_LE = order_experts(statistics, setting.criterion, setting.policy, setting.domains)
    every = [n for n in reversed(setting.kept) if n < a.experts]
    how: dict[str, Any] = {"rounding": setting.trial, "quiet": setting.quiet}
    work, memory = reverse_work(source, offered), budget.memory_bytes
    if budget.harm == MEASURED:
        counts = every if budget.experts else list(default_counts(a.experts, a.top_k))
        options = [b for of in singles(source, offered, counts, order_LE) for b in of.values()]
        text = price_text(setting, effort(source, options, 1, 1 << 60).work, calibration)
        return price(source, offered, counts, order_LE, text, setting.run, memory_bytes=memory, **how), text
    if budget.harm == ANCHORED:
        few = {unit: list(dict.fromkeys((*of[:1], *of[-1:]))) for unit, of in offered.items()}
        options = [b for of in singles(source, few, every[-1:], order_LE) for b in of.values()]
        text = price_text(setting, work + effort(source, options, 1, 1 << 60).work, calibration)
        return anchored(source, offered, every, order_LE, text, setting.run, memory_bytes=memory, **how), text
    text = price_text(setting, work, calibration)
    if budget.harm == SURROGATE:
        return surrogate(source, offered, every, order_LE, text, setting.run, **how), text
    saliency_LE = scores(statistics, "dropout", "pooled")
    return trace(source, offered, every, order_LE, saliency_LE, text, setting.run, **how), text


def price_text(setting: Setting, work: float, calibration: TokenSet) -> TokenSet:
    """Rows of the calibration text to price on. How many fit into the time is found once, and kept in priced.safetensors.

    work    layers that each token goes through
    """
    budget, file = setting.budget, setting.run / "priced.safetensors"
    if budget.seconds is None:
        return some_rows(calibration, budget.price_tokens)
    if not file.exists():
        tokens = min(budget.price_tokens, affordable_tokens(setting.source, work, budget.seconds))
        some_rows(calibration, tokens).save(file)
    return TokenSet.load(file)


def trace_frontier(setting: Setting, prices: Prices, text: TokenSet) -> Traced:
    """Learn how prices compose, by plans measured whole on `text`, and draw the curve. Leaves rule.json, frontier.json."""
    source, container, kept = setting.source, setting.container, setting.kept
    rule = learn(setting, prices, text)
    menu = menu_of(source, container, prices, kept, rule.weight, setting.reads_text)
    traced = Traced(prices, rule, menu, Frontier.of(menu), setting.budget.bytes(menu))
    inputs = {"source": source.identity, "tokens": text.identity}
    note_frontier(setting.run / "frontier.json", traced.frontier, menu, rule, traced.budget_bytes, prices.harm, inputs)
    return traced


def learn(setting: Setting, prices: Prices, text: TokenSet) -> Rule:
    """Measure plans whole and fit the rule; rule.json keeps both."""
    source, container, kept, budget = setting.source, setting.container, setting.kept, setting.budget
    menu = menu_of(source, container, prices, kept, listed=setting.reads_text)
    made = varied(menu, budget.rule_plans - 2, seed=0)
    middle = budget.formats[len(budget.formats) // 2]
    made += [(uniform(menu, f, len(kept) - 1)[0], kept[-1]) for f in dict.fromkeys((middle, budget.formats[-1]))]
    plans = [plan_of(source, container, prices, formats, k, setting.rounding) for formats, k in made]
    found = setting.measure(plans, text, "rule")
    both = [sums(prices, formats, k) for formats, k in made]
    rule = Rule.fit([r for r, _ in both], [d for _, d in both], [m.nats for m in found])
    body = rule.facts | {
        "predicts": "KL = e^a · (Σ rounding + weight · Σ dropping)^b, nats per token",
        "tokens": text.tokens,
        "measured": [
            {"experts": k, "rounding": r, "dropping": d, "nats": m.nats, "error": m.error, "formats": formats}
            for (formats, k), (r, d), m in zip(made, both, found)
        ],
    }  # fmt: skip
    write_json(setting.run / "rule.json", "rule", body, {"source": source.identity, "tokens": text.identity})
    return rule


def choose(setting: Setting, statistics: Statistics, calibration: TokenSet, choice: TokenSet) -> Chosen:
    """The plan of smallest measured KL on `choice` that is within the budget. Leaves candidates.json.

    calibration  text that experts were ranked on; options are priced on some of its rows
    choice       text that nothing before has seen

    Where the rounding looks at data, rtn stands in for it until the plan is made true: candidates differ in what they
    keep and in formats, and what a better rounding gives is given to each. Raises `PlanError` when nothing is asked for, or
    nothing fits. Continues where it was stopped.
    """
    traced = trace_frontier(setting, *price_options(setting, statistics, calibration))
    if traced.budget_bytes is None:
        raise PlanError("no budget is given; say fit in bytes, or bits per weight")
    found = candidates(
        setting.source, setting.container, traced.prices, traced.rule, traced.frontier, traced.menu, traced.budget_bytes,
        setting.rounding, setting.budget.choice,
    )  # fmt: skip
    measured = setting.measure([c.plan for c in found], choice, "candidates")
    best = min(range(len(found)), key=lambda i: (measured[i].nats, found[i].bytes))
    if math.isinf(measured[best].nats):
        raise PlanError(f"all {len(found)} candidates give values that are no numbers; offer other formats")
    inputs = {"source": setting.source.identity, "tokens": choice.identity}
    body = {
        "budget_bytes": traced.budget_bytes,
        "rule_error": traced.rule.error,
        "rounding": setting.trial,
        "ships": best,
    }
    note_candidates(setting.run / "candidates.json", found, measured, choice, body, inputs)
    return Chosen(found[best].plan, found[best], measured[best], traced.budget_bytes, setting.trial)
