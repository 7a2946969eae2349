"""Plans from prices: the menu, plans to learn the rule of composition from, and the few that may ship.

Leaves out measuring them (measure) and the order of the steps (choice).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..checkpoint.containers import Container
from ..errors import PlanError
from ..measure import Prices, Rule
from ..plan import DROP, SOURCE, Plan
from ..plan.blueprint import Blueprint
from .setting import Setting
from .sizes import fixed_bytes, folder_bytes, listed_bytes, option_bytes
from .solver.frontier import Allocation, Frontier
from .solver.menu import Choice, Menu

JITTER = 1.0  # of ln harm, when plans off the frontier are wanted
NEIGHBOURS = 16  # kept counts nearer than a 16th of the experts count as alike


@dataclass(frozen=True)
class Candidate:
    """A plan that may ship: why it is one, its folder's bytes, and its KL as predicted."""

    name: str
    plan: Plan
    experts: int
    bytes: int
    harm: float  # sum of prices, dropping weighted
    predicted_nats: float


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


def menu_of(
    source: Checkpoint, container: Container, prices: Prices, kept: Sequence[int], weight: float = 1.0,
    listed: bool = False,
) -> Menu:  # fmt: skip
    """Everything on offer, with bytes as on disk and harm in nats: rounding, and dropping times `weight`.

    With `listed`, plans will be rounded on text, and have digests of what that gives.

    Harm of dropping is a layer's alone, whatever the format of what stays.
    """
    choices = []
    for unit, of in prices.rounded.items():
        role, layer = source.architecture.units[unit][0].role, source.architecture.units[unit][0].layer
        harm_F1 = np.array([p.nats for p in of.values()])[:, None]
        dropped_K = weight * prices.dropping(layer, kept) if role == "experts" else np.zeros(1)
        bytes_FK = np.stack([option_bytes(source, container, unit, format, kept) for format in of])
        choices.append(Choice(unit, tuple(of), bytes_FK, harm_F1 + dropped_K))
    unpriced = [unit for unit, members in source.architecture.units.items() if members[0].role == "mtp"]
    whole = [source.architecture.experts]  # it stays only where all experts do
    still = sum(int(option_bytes(source, container, unit, SOURCE, whole)[0]) for unit in unpriced)
    fixed = fixed_bytes(source, kept) + listed * listed_bytes(source, kept) + still
    weights = sum(n.elements for n in source.architecture.linears) + sum(
        t.elements for t in source.architecture.tensors
    )
    return Menu(tuple(choices), tuple(kept), fixed, weights)


def sums(prices: Prices, formats: Mapping[str, str], kept: int) -> tuple[float, float]:
    """Σ rounding and Σ dropping of a plan, nats, unweighted."""
    rounding = sum(prices.rounded[unit][format].nats for unit, format in formats.items())
    return rounding, float(sum(prices.dropping(layer, [kept])[0] for layer in prices.dropped))


def plan_of(setting: Setting, prices: Prices, formats: Mapping[str, str], kept: int) -> Plan:
    container = setting.source.container if set(formats.values()) == {SOURCE} else setting.container
    return Plan(
        container=container.name,
        kept=prices.kept(kept),
        formats=dict(formats),
        rounding=setting.rounding,
        drop_mtp=setting.ranking.mtp == DROP,
    )


def varied(menu: Menu, count: int, seed: int) -> list[tuple[dict[str, str], int]]:
    """`count` plans (formats, kept) from the smallest to the largest, near the frontier but not on it.

    Each is a point of the frontier of a menu whose harms were disturbed by a factor of about e: what it is
    made of varies, as it would with other prices. Half of them keep all experts, the others any count.
    """
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        at = int(rng.integers(len(menu.kept))) if i % 2 else len(menu.kept) - 1
        choices = tuple(
            replace(c, bytes_FK=c.bytes_FK[:, [at if c.bytes_FK.shape[1] > 1 else 0]], harm_FK=disturbed(c, at, rng))
            for c in menu.choices
        )
        frontier = Frontier.of(Menu(choices, (menu.kept[at],), menu.fixed_bytes_K[[at]], menu.weights))
        _, points = frontier.pareto()
        share = (i // 2 + rng.random()) / max(1, (count + 1) // 2)
        point = int(points[min(len(points) - 1, int(share * len(points)))])
        found.append((dict(frontier.plan(0, point).formats), menu.kept[at]))
    return found


def disturbed(choice: Choice, at: int, rng: np.random.Generator) -> np.ndarray:
    harm_F = choice.harm_FK[:, at if choice.harm_FK.shape[1] > 1 else 0]
    return (harm_F * np.exp(JITTER * rng.standard_normal(harm_F.shape)))[:, None]


def uniform(menu: Menu, format: str, at: int) -> tuple[dict[str, str], int, float]:
    """The plan of one format throughout ("source" where a unit cannot have it), its bytes and its harm."""
    formats, size, harm = {}, int(menu.fixed_bytes_K[at]), 0.0
    for c in menu.choices:
        f = c.formats.index(format if format in c.formats else SOURCE if SOURCE in c.formats else c.formats[-1])
        formats[c.unit] = c.formats[f]
        size += int(c.bytes_FK[f, at if c.bytes_FK.shape[1] > 1 else 0])
        harm += float(c.harm_FK[f, at if c.harm_FK.shape[1] > 1 else 0])
    return formats, size, harm


def candidates(setting: Setting, traced: Traced, budget_bytes: int) -> list[Candidate]:
    """At most `setting.pricing.candidates` plans within `budget_bytes` of disk, the most promising first.

    The best of each kept count are told apart by what the rule predicts; of counts that are nearly alike only the
    best is taken. Beside them the best plan that keeps every expert, and the best of one format throughout.
    Raises `PlanError` when nothing fits.
    """
    frontier, menu, experts = traced.frontier, traced.menu, setting.source.architecture.experts
    best = {}
    for kept in frontier.kept_K.tolist():
        try:
            best[kept] = frontier.fit(budget_bytes, [kept])
        except PlanError:
            continue
    if not best:
        frontier.fit(budget_bytes)  # says what falls short
    taken: list[Allocation] = []
    apart = max(1, experts // NEIGHBOURS)
    for found in sorted(best.values(), key=lambda a: a.harm):
        if len(taken) < max(1, setting.pricing.candidates - 2) and all(
            abs(found.kept - t.kept) >= apart for t in taken
        ):
            taken.append(found)
    if (whole := best.get(experts)) and whole not in taken:
        taken.append(whole)
    made = [exact(setting, traced, found) for found in taken]
    plain = []
    for format in sorted({f for c in menu.choices for f in c.formats}):
        for at in range(len(menu.kept)):
            formats, size, harm = uniform(menu, format, at)
            if size <= budget_bytes and np.isfinite(harm):
                plain.append((harm, format, at, formats))
    if plain:
        harm, format, at, formats = min(plain, key=lambda p: p[:3])
        plan = plan_of(setting, traced.prices, formats, menu.kept[at])
        made.append(candidate(f"{format} throughout", setting.source, plan, harm, traced.rule))
    fitting = [c for c in made if c.bytes <= budget_bytes]
    if not fitting:
        raise PlanError(
            f"no plan of {len(made)} tried fits {budget_bytes:,} bytes with all its files; raise the budget"
        )
    return list({str((c.plan.kept, c.plan.formats)): c for c in reversed(fitting)}.values())[::-1]


def exact(setting: Setting, traced: Traced, found: Allocation) -> Candidate:
    """A candidate from an allocation, found again with the bytes that the menu's caution left over."""

    def made(of: Allocation) -> Candidate:
        plan = plan_of(setting, traced.prices, of.formats, of.kept)
        return candidate(f"{of.kept} experts", setting.source, plan, of.harm, traced.rule)

    first = made(found)
    again = traced.frontier.fit(found.budget_bytes + found.bytes - first.bytes, [found.kept])
    if again.harm >= found.harm:
        return first
    second = made(again)
    return second if second.bytes <= found.budget_bytes else first


def candidate(name: str, source: Checkpoint, plan: Plan, harm: float, rule: Rule) -> Candidate:
    size = folder_bytes(Blueprint.of(source, plan))
    return Candidate(name, plan, plan.experts(source.architecture.experts), size, harm, float(rule.predict(harm)))
