"""Within a budget: prices, the rule, the frontier, a few candidates measured on unseen text, and the selected plan.

    price_options → trace_frontier → choose

Every step leaves files in the run folder: costs.json; rule.json and frontier.json; candidates.json. Leaves out
calibration, and writing the export (compress, export).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..artifact import identity, write_json
from ..calibrate import Statistics
from ..calibrate.selection import order_experts, scores
from ..data.tokens import TokenSet
from ..errors import PlanError
from ..measure import (
    ANCHORED,
    MEASURED,
    SURROGATE,
    TRACE,
    Measured,
    Options,
    Price,
    Prices,
    Rule,
    affordable_tokens,
    anchored,
    default_counts,
    effort,
    price,
    reverse_work,
    some_rows,
    surrogate,
    trace,
)
from ..plan import Plan
from .candidates import Candidate, Traced, candidates, menu_of, plan_of, sums, uniform, varied
from .record import write_candidates, write_frontier
from .setting import HARMS, Setting
from .solver.frontier import Frontier


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


def check_limit(setting: Setting) -> None:
    """Raise `PlanError` for prices there are not, and where the smallest plan is too large: before anything is read."""
    a, free = setting.source.architecture, Price(0.0, 0.0)
    if setting.pricing.harm not in HARMS:
        raise PlanError(f"unknown way to find costs {setting.pricing.harm!r}; choose from {', '.join(HARMS)}")
    least = setting.kept[0]
    prices = Prices(
        {unit: dict.fromkeys(formats, free) for unit, formats in setting.offer.units(setting.source).items()},
        {layer: {least: free} if least < a.experts else {} for layer in a.moe_layers},
        np.zeros((0, a.experts), np.int64),
        tokens=0,
    )
    menu = menu_of(setting.sized, setting.container, prices, [least], listed=setting.reads_text)
    if (budget_bytes := setting.limit.bytes(menu)) is not None:
        Frontier.of(menu).fit(budget_bytes)


def price_options(setting: Setting, statistics: Statistics, calibration: TokenSet) -> tuple[Prices, TokenSet]:
    """Every option's price, and the rows of `calibration` that they were found on. Leaves costs.json."""
    source, harm, run = setting.source, setting.pricing.harm, setting.run
    options, work = on_offer(setting, statistics)
    text = price_text(setting, work, calibration)
    trial = setting.trial(text)
    if harm == TRACE:
        return trace(source, options, scores(statistics, "dropout", "pooled"), trial, run), text
    return {MEASURED: price, ANCHORED: anchored, SURROGATE: surrogate}[harm](source, options, trial, run), text


def on_offer(setting: Setting, statistics: Statistics) -> tuple[Options, float]:
    """The options to price, and how many layers each token goes through for that."""
    source, ranking, harm, a = setting.source, setting.ranking, setting.pricing.harm, setting.source.architecture
    options = Options(
        units=setting.offer.units(source),
        counts=[n for n in reversed(setting.kept) if n < a.experts],
        order_LE=order_experts(statistics, ranking.criterion, ranking.policy, ranking.domains),
    )
    if harm in (SURROGATE, TRACE):
        return options, reverse_work(source, options)
    if harm == MEASURED and setting.offer.experts is None:
        options = replace(options, counts=default_counts(a))
    tried, work = options, 0.0
    if harm == ANCHORED:  # which formats will be the ends is not known yet: any two
        ends = {unit: list(dict.fromkeys((*of[:1], *of[-1:]))) for unit, of in options.units.items()}
        tried, work = replace(options, units=ends, counts=options.counts[-1:]), reverse_work(source, options)
    return options, work + effort(source, list(tried.branches(a.moe_layers).values()), 1, 1 << 60).work


def price_text(setting: Setting, work: float, calibration: TokenSet) -> TokenSet:
    """Rows of the calibration text to price on.

    How many fit into the time depends on the machine's mood, so it is found once for everything that decides it, and
    those rows are kept in a priced-….safetensors: other time, text or work has a file of its own.

    work    layers that each token goes through
    """
    pricing = setting.pricing
    if pricing.seconds is None:
        return some_rows(calibration, pricing.tokens)
    asked = identity(setting.source.identity, calibration.identity, pricing.seconds, pricing.tokens, work)
    file = setting.run / f"priced-{asked}.safetensors"
    if not file.exists():
        tokens = min(pricing.tokens, affordable_tokens(setting.source, work, pricing.seconds))
        some_rows(calibration, tokens).save(file)
    return TokenSet.load(file)


def trace_frontier(setting: Setting, prices: Prices, text: TokenSet) -> Traced:
    """Learn how prices compose, by plans measured whole on `text`, and draw the curve. Leaves rule.json, frontier.json."""
    rule = learn(setting, prices, text)
    menu = menu_of(setting.sized, setting.container, prices, setting.kept, rule.weight, setting.reads_text)
    traced = Traced(prices, rule, menu, Frontier.of(menu), setting.limit.bytes(menu))
    inputs = {"source": setting.source.identity, "tokens": text.identity}
    write_frontier(setting.run / "frontier.json", traced, inputs)
    return traced


def learn(setting: Setting, prices: Prices, text: TokenSet) -> Rule:
    """Measure plans whole and fit the rule; rule.json keeps both."""
    source, kept, formats_offered = setting.source, setting.kept, setting.offer.formats
    menu = menu_of(setting.sized, setting.container, prices, kept, listed=setting.reads_text)
    made = varied(menu, setting.pricing.rule_plans - 2, seed=0)
    middle = formats_offered[len(formats_offered) // 2]
    made += [(uniform(menu, f, len(kept) - 1)[0], kept[-1]) for f in dict.fromkeys((middle, formats_offered[-1]))]
    plans = [plan_of(setting, prices, formats, k) for formats, k in made]
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
        raise PlanError("no size was given; add --fit 90GB or --bits 4.25")
    found = candidates(setting, traced, traced.budget_bytes)
    measured, rounding = setting.measure([c.plan for c in found], choice, "candidates"), setting.trial(choice).rounding
    best = min(range(len(found)), key=lambda i: (measured[i].nats, found[i].bytes))
    if math.isinf(measured[best].nats):
        raise PlanError(f"all {len(found)} candidates give NaN or infinite values; offer other formats")
    inputs = {"source": setting.source.identity, "tokens": choice.identity}
    body = {
        "budget_bytes": traced.budget_bytes,
        "rule_error": traced.rule.error,
        "rounding": rounding,
        "ships": best,
    }
    write_candidates(setting.run / "candidates.json", found, measured, choice, body, inputs)
    return Chosen(found[best].plan, found[best], measured[best], traced.budget_bytes, rounding)
