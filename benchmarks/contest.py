"""At equal bytes on disk: the plan that moesaic chooses against plans that others would make. Called by measure.py.

At each of six sizes:

    chosen        the best of six candidates, measured on text of its own
    surrogate     the best by prices from slopes alone: nothing measured but the plans that its rule was fitted on
    anchored      the same with a few options measured, and the others between them
    round only    the best plan that keeps every expert
    prune only    source formats, and as many experts as fit
    their prices  ½ · trace(H) · MSE and 3 α S (the card of MiniMax-M2.7 PrismaQuant 3.20 bpp), solved exactly on our menu
    their recipe  the same, with their formats (source, NVFP4) and their ratios of experts, and never above the size
    uniform       each format throughout, with as many experts as fit, the best of them

All are judged together on rows that nothing has seen; differences are paired over rows.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.allocate import Setting, Traced
from moesaic.allocate.candidates import candidates, menu_of, plan_of, sums, uniform
from moesaic.allocate.sizes import folder_bytes
from moesaic.allocate.solver import Frontier, Menu
from moesaic.calibrate import Statistics
from moesaic.calibrate.selection import order_experts, scores
from moesaic.data.tokens import TokenSet
from moesaic.errors import PlanError
from moesaic.measure import TRACE, Measured, Options, Prices, Rule
from moesaic.measure.trace import drops
from moesaic.plan import SOURCE, Plan
from moesaic.plan.blueprint import Blueprint

SHARES = (0.04, 0.16, 0.3, 0.45, 0.6, 0.8)  # of the way from the smallest plan to the source, as budgets
RATIOS = (0.0, 0.125, 0.1875, 0.25, 0.3125, 0.375)  # of experts dropped, as the card says
THEIR_FORMATS = ("source", "nvfp4")  # those of the card that a unit of these sources can take
CLEAR = 2.0  # standard errors from which a difference counts


def contests(rivals: "Rivals", rule: Rule, choice: TokenSet, judge: TokenSet) -> list[dict[str, Any]]:
    """Candidates are measured on `choice` and one of them chosen; all plans are measured on `judge`."""
    setting, prices, menu, frontier = rivals.setting, rivals.prices, rivals.menu, rivals.frontier
    source = setting.source
    whole, smallest = sum(t.bytes for t in source.inventory), int(frontier.bytes_KP[:, 0].min())
    budgets = [int(smallest + share * (whole - smallest)) for share in SHARES]
    found = [candidates(setting, Traced(prices, rule, menu, frontier, budget), budget) for budget in budgets]
    told = iter(setting.measure([c.plan for of in found for c in of], choice, "contest"))
    chosen = [min(zip((next(told) for _ in of), of), key=lambda pair: pair[0].nats)[1] for of in found]
    entries = [{"chosen": c.plan} | rivals.at(budget) for c, budget in zip(chosen, budgets)]
    judged = iter(setting.measure([p for of in entries for p in of.values()], judge, "judge"))
    print(
        f"\nchosen on {choice.tokens:,} tokens, judged on {judge.tokens:,} others; KL in nats, ± one standard error over rows"
    )
    facts = []
    for budget, of, c in zip(budgets, entries, chosen):
        measured = {name: next(judged) for name in of}
        facts.append(contest(budget, {name: folder_bytes(Blueprint.of(source, p)) for name, p in of.items()}, measured))
        facts[-1]["predicted"] = c.predicted_nats
    summed_up(facts)
    return facts


class Rivals:
    """Makes the other plans of a size."""

    def __init__(
        self, setting: Setting, prices: Prices, tables: Mapping[str, Prices], menu: Menu, statistics: Statistics
    ) -> None:
        self.setting, self.prices, self.menu, self.frontier = setting, prices, menu, Frontier.of(menu)
        a, kept = setting.source.architecture, list(menu.kept)
        order_LE, saliency_LE = order_experts(statistics, "dropout"), scores(statistics, "dropout", "pooled")
        options = Options(units={}, counts=[n for n in kept if n < a.experts], order_LE=order_LE)
        as_made = tables[TRACE]
        cuts = Prices.of(TRACE, options, a.moe_layers, as_made.tokens, drops(a.moe_layers, options, saliency_LE))
        theirs = replace(cuts, rounded=as_made.rounded)
        self.curves = {
            **{
                name: (tables[name], self.curve(tables[name], kept, learned_weight(setting.run, tables[name])))
                for name in ("surrogate", "anchored")
            },
            "their prices": (theirs, self.curve(theirs, kept, 1.0)),
            "their recipe": (narrow(theirs), self.curve(narrow(theirs), their_counts(a.experts), 1.0)),
        }

    def curve(self, prices: Prices, kept: list[int], weight: float) -> Frontier:
        return Frontier.of(menu_of(self.setting.source, self.setting.container, prices, kept, weight))

    def at(self, budget: int) -> dict[str, Plan]:
        """By name, each within the budget; one that cannot be is left out."""
        experts = self.setting.source.architecture.experts
        found = {name: self.best(*curve, budget, None) for name, curve in self.curves.items()}
        found["round only"] = self.best(self.prices, self.frontier, budget, [experts])
        found["prune only"] = self.pruned(budget)
        for format in sorted({f for c in self.menu.choices for f in c.formats}):
            found[f"uniform {format}"] = self.throughout(format, budget)
        return {name: plan for name, plan in found.items() if plan is not None}

    def best(self, prices: Prices, frontier: Frontier, budget: int, kept: list[int] | None) -> Plan | None:
        try:
            found = frontier.fit(budget, kept)
        except PlanError:
            return None
        return self.made(prices, found.formats, found.kept)

    def made(self, prices: Prices, formats: Mapping[str, str], kept: int) -> Plan:
        return plan_of(self.setting, prices, formats, kept)

    def fits(self, plan: Plan, budget: int) -> bool:
        return folder_bytes(Blueprint.of(self.setting.source, plan)) <= budget

    def pruned(self, budget: int) -> Plan | None:
        """Down to as many experts as a token needs."""
        a = self.setting.source.architecture
        plans = (self.made(self.prices, dict.fromkeys(a.units, SOURCE), n) for n in range(a.experts, a.top_k - 1, -1))
        return next((plan for plan in plans if self.fits(plan, budget)), None)

    def throughout(self, format: str, budget: int) -> Plan | None:
        for at in reversed(range(len(self.menu.kept))):
            plan = self.made(self.prices, uniform(self.menu, format, at)[0], self.menu.kept[at])
            if self.fits(plan, budget):
                return plan
        return None


def learned(run: Path) -> tuple[list[tuple[dict[str, str], int]], np.ndarray]:
    """The plans that the rule was fitted on, and what they were measured to cost."""
    found = [m for m in json.loads((run / "rule.json").read_text())["measured"] if m["nats"] > 0]
    return [(m["formats"], m["experts"]) for m in found], np.array([m["nats"] for m in found])


def learned_weight(run: Path, prices: Prices) -> float:
    """Of dropping against rounding, with other prices of the same plans."""
    plans, kl_N = learned(run)
    return Rule.fit(*zip(*(sums(prices, formats, kept) for formats, kept in plans)), kl_N).weight


def their_counts(experts: int) -> list[int]:
    return sorted({experts - int(ratio * experts) for ratio in RATIOS})


def narrow(prices: Prices) -> Prices:
    """With their formats alone; a unit that can have none of them keeps what it can have."""
    rounded = {u: {f: p for f, p in of.items() if f in THEIR_FORMATS} or dict(of) for u, of in prices.rounded.items()}
    return Prices(rounded, prices.dropped, prices.order_LE, prices.tokens, prices.harm)


def contest(budget: int, sizes: Mapping[str, int], measured: Mapping[str, Measured]) -> dict[str, Any]:
    """One size: every plan's KL, and what the chosen one saves over each, paired over rows."""
    mine, fact = measured["chosen"], {"budget": budget, "plans": dict[str, Any]()}
    print(f"{budget:>12,} B  chosen {mine.nats:.4f} ± {mine.error:.4f}", flush=True)
    for name, m in measured.items():
        off_B = m.kl_B - mine.kl_B
        saved, error = float(off_B.mean()), float(off_B.std(ddof=1) / len(off_B) ** 0.5)
        plan = {"bytes": sizes[name], "nats": m.nats, "error": m.error, "saved": saved, "saved_error": error}
        fact["plans"][name] = plan
        if name != "chosen":
            less = f"{1 - mine.nats / m.nats:.0%} less, {saved:.4f} ± {error:.4f}"
            print(f"    {name:<18} {m.nats:.4f} ± {m.error:.4f}; chosen has {less}")
    return fact


def summed_up(facts: list[dict[str, Any]]) -> None:
    """Over all sizes, by rival: how often the chosen plan is clearly better, clearly worse, and how much KL it has less."""
    for f in facts:
        if plain := [p for name, p in f["plans"].items() if name.startswith("uniform")]:
            f["plans"]["best uniform"] = min(plain, key=lambda p: p["nats"])
    print("\nover all sizes: clearly better / clearly worse / compared, mean KL less")
    for name in ("best uniform", "round only", "prune only", "their prices", "their recipe", "surrogate", "anchored"):
        of = [(f["plans"]["chosen"], f["plans"][name]) for f in facts if name in f["plans"]]
        better = sum(p["saved"] > CLEAR * p["saved_error"] for _, p in of)
        worse = sum(p["saved"] < -CLEAR * p["saved_error"] for _, p in of)
        less = np.mean([1 - mine["nats"] / p["nats"] for mine, p in of]) if of else float("nan")
        print(f"{name:<18} {better} / {worse} / {len(of)}   {less:.0%}")
