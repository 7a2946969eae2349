"""Which experts stay: a criterion's ranking, protected experts, and how far to trust it.

Leaves out prices in nats (measure, allocate): this is the choice for a kept count that is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .criteria import CRITERIA
from .criteria.base import POLICIES, Cut, combine, cut, ordered
from .statistics import Statistics

POOLED = "pooled"  # the policy that does not tell domains apart
FEW_TOKENS = 32  # an expert that fewer tokens reached has a score, but not one to rely on
STABLE = 0.8  # mean Jaccard of the two halves' kept sets below which the calibration is called too small

AUTO = "auto"


@dataclass(frozen=True)
class Ranking:
    """How experts are ranked, and by what text.

    criterion     one of criteria/, or "auto": the one whose cut has the smallest KL on text not calibrated on
                  (what `until_stable` watches is then REAP)
    policy        how domains are weighed against each other: "pooled", or one of criteria.POLICIES
    domains       name -> share, of those to be heard; None: all alike
    until_stable  read more and more until the choice stops moving (see `calibrate_until_stable`)
    run           a folder where `calibrate` left statistics: all of them are used, and no text is read for it
    mtp           "keep" or "drop" a layer for multi-token prediction, whose experts a cut would have to rank too
    """

    criterion: str = "reap"
    policy: str = POOLED
    domains: Mapping[str, float] | None = None
    until_stable: bool = False
    run: Path | None = None
    mtp: str = "keep"

    @property
    def criteria(self) -> Sequence[str]:
        return sorted(CRITERIA) if self.criterion == AUTO else (self.criterion,)

    @property
    def watched(self) -> str:
        """The criterion that decides how much text is enough."""
        return REAP.criterion if self.criterion == AUTO else self.criterion


REAP, EVERY = Ranking(), Ranking(AUTO)


@dataclass(frozen=True)
class Selection:
    """A cut, and what a reader must know to believe it."""

    criterion: str
    policy: str
    domains: Mapping[str, float]  # name -> share, of those that were heard
    layers: tuple[int, ...]
    score_LE: np.ndarray
    cut: Cut
    protected: tuple[tuple[int, int], ...]  # super experts, (layer, id): kept whatever their score
    few: tuple[tuple[int, int], ...]  # reached by fewer than FEW_TOKENS tokens
    nonfinite: tuple[tuple[int, int, int], ...]  # (layer, id, tokens) with infinite or NaN outputs
    jaccard_L: np.ndarray  # of the kept sets that the two halves alone would give
    tokens: int

    @property
    def warnings(self) -> list[str]:
        """One plain sentence for each thing that makes the choice doubtful."""
        found = []
        if not CRITERIA[self.criterion].reads_text and not self.tokens:
            found.append("no text was read: experts whose loss would wreck the model, if there are any, are not known")
        if self.nonfinite:
            bad = f"{len(self.nonfinite)} experts gave NaN or infinite values ({listed(self.nonfinite)})"
            found.append(f"{bad}; those tokens count for nothing")
        if self.few:
            rare = f"{len(self.few)} experts were reached by fewer than {FEW_TOKENS} of {self.tokens:,} tokens"
            found.append(f"{rare} ({listed(self.few)}); their rank is a guess")
        if (stability := float(self.jaccard_L.mean())) < STABLE:
            small = f"the calibration is small: its two halves agree on only {stability:.0%} of the kept experts"
            found.append(f"{small}; more text would choose others")
        return found

    def facts(self) -> dict[str, Any]:
        """JSON-able: what is kept, margins, stability, guards, warnings."""
        return {
            "criterion": self.criterion,
            "reference": CRITERIA[self.criterion].reference,
            "policy": self.policy,
            "domains": dict(self.domains),
            "calibration_tokens": self.tokens,
            "kept": {str(layer): list(ids) for layer, ids in self.cut.kept.items()},
            "margins": {str(layer): margin for layer, margin in self.cut.margins.items()},
            "jaccard": dict(zip(map(str, self.layers), self.jaccard_L.tolist())),
            "protected": [list(p) for p in self.protected],
            "few_tokens": [list(p) for p in self.few],
            "nonfinite": [list(p) for p in self.nonfinite],
            "warnings": self.warnings,
        }


def select_experts(
    statistics: Statistics, criterion: str, keep: int, policy: str = POOLED, domains: Mapping[str, float] | None = None
) -> Selection:
    """Keep the `keep` best experts of each layer.

    policy   "pooled": all domains' sums as one; or one of criteria.POLICIES over ranks by domain
    domains  name -> share, of those to be heard; None: all alike
    Super experts are kept before all others. Raises `InputError` for a name there is not, and for an
    expert that gave no finite value: there is nothing to rank it by.
    """
    check_ranked(statistics)
    score_LE = scores(statistics, criterion, policy, domains)
    protected = statistics.super_experts()
    groups = statistics.groups
    halves = [
        cut(scores(statistics, criterion, policy, domains, half), statistics.layers, keep, groups=groups)
        for half in (0, 1)
    ]
    jaccard_L = np.array([jaccard(halves[0].kept[layer], halves[1].kept[layer]) for layer in statistics.layers])
    few = statistics.few(FEW_TOKENS) if CRITERIA[criterion].reads_text else ()
    return Selection(
        criterion=criterion,
        policy=policy,
        domains=dict(zip(statistics.domains, statistics.shares(domains).tolist())),
        layers=statistics.layers,
        score_LE=score_LE,
        cut=cut(score_LE, statistics.layers, keep, frozenset(protected), groups),
        protected=tuple(protected),
        few=tuple(few),
        nonfinite=tuple(statistics.nonfinite()),
        jaccard_L=jaccard_L,
        tokens=statistics.tokens,
    )


def order_experts(
    statistics: Statistics, criterion: str, policy: str = POOLED, domains: Mapping[str, float] | None = None
) -> np.ndarray:
    """Ids [L, E], the one to keep first in front: its first k are what `select_experts` keeps of k."""
    check_ranked(statistics)
    score_LE = scores(statistics, criterion, policy, domains)
    experts = score_LE.shape[1]
    protected = set(statistics.super_experts())
    guard_LE = np.array([[(layer, e) in protected for e in range(experts)] for layer in statistics.layers])
    return np.stack([ordered(s_E, g_E, statistics.groups) for s_E, g_E in zip(score_LE, guard_LE)])


def check_names(policy: str, criteria: Sequence[str]) -> None:
    """Raises `InputError` for an unknown policy or criterion. Call it before long-running work."""
    for what, name, there_are in (
        ("domain policy", policy, (POOLED, *POLICIES)),
        *(("criterion", c, CRITERIA) for c in criteria),
    ):
        if name not in there_are:
            raise InputError(f"unknown {what} {name!r}; choose from {', '.join(there_are)}")


def check_ranked(statistics: Statistics) -> None:
    totals = statistics.totals()
    lost = np.argwhere((totals["nonfinite"] > 0) & (totals["tokens"] == 0))
    if len(lost):
        places = listed([(statistics.layers[i], int(e)) for i, e in lost])
        raise InputError(
            f"{len(lost)} experts gave no finite value ({places}) and cannot be ranked; check the source's files"
        )


def scores(
    statistics: Statistics,
    criterion: str,
    policy: str,
    domains: Mapping[str, float] | None = None,
    half: int | None = None,
) -> np.ndarray:
    """Scores [L, E] by one criterion, over all text or one half of it."""
    check_names(policy, (criterion,))
    if CRITERIA[criterion].reads_weights and not statistics.weights:
        raise InputError(f"{criterion} reads weights, and these statistics hold none; weigh the experts first")
    score, share_D = CRITERIA[criterion].score, statistics.shares(domains)
    if policy == POOLED or not CRITERIA[criterion].reads_text:
        return score(statistics.totals(domains, half))
    apart = np.stack([score(statistics.totals({name: 1.0}, half)) for name in statistics.domains])
    return combine(apart, policy, share_D)


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    return len(set(a) & set(b)) / len(set(a) | set(b))


def listed(places: Sequence[tuple[int, ...]], most: int = 4) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(f"layer {p[0]} expert {p[1]}" for p in places[:most]) + more
