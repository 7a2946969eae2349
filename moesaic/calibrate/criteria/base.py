"""What a pruning criterion is, how domains are weighed against each other, and where the line is drawn.

A criterion is pure arithmetic on sums that calibration stored, so ranking again, by another criterion
or for other domains, never needs another sweep. Leaves out how the sums come to be (calibrate).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import InputError

Array = np.ndarray

# Sums over tokens routed to an expert, float64 [L, E]; g is the gate, f the expert's output before it:
#   tokens Σ1   gate Σg   gate2 Σg²   norm Σ‖f‖   norm2 Σ‖f‖²   gated Σg‖f‖   gated2 Σg²‖f‖²   gnorm2 Σg‖f‖²
#   turned Σg‖f‖·max(1 − cos(h, h + y), 0)   peak max|f|   and positions [L, 1], all tokens, routed here or not
# and over the weights of an expert's three matrices, where a criterion asks for those:
#   weight_size Σ|w|   weight_square Σw²   weights Σ1
WEIGHT_SUMS = ("weight_size", "weight_square", "weights")
Totals = Mapping[str, Array]


@dataclass(frozen=True)
class Criterion:
    """One way to score experts: higher is kept. `needs` names the sums it reads."""

    name: str
    needs: tuple[str, ...]
    score: Callable[[Totals], Array]  # -> float64 [L, E]
    reference: str

    @property
    def reads_weights(self) -> bool:
        return bool(set(self.needs) & set(WEIGHT_SUMS))

    @property
    def reads_text(self) -> bool:
        return bool(set(self.needs) - set(WEIGHT_SUMS))


@dataclass(frozen=True)
class Cut:
    """Where the line fell: what stays, and by how much the last kept expert beats the first dropped one."""

    kept: dict[int, tuple[int, ...]]  # MoE layer -> ids, ascending
    margins: dict[int, float]  # layer -> (last kept − first dropped) / last kept; 0: a tie


def per_token(sums: Array, totals: Totals) -> Array:
    """Mean over the tokens an expert was given; 0 for one that was given none."""
    return sums / np.maximum(totals["tokens"], 1)


def per_position(sums: Array, totals: Totals) -> Array:
    """Mean over all tokens of the text, whoever got them; 0 where there is no text."""
    return sums / np.maximum(totals["positions"], 1)


def ordered(score_E: Array, guard_E: Array, groups: int = 1) -> Array:
    """Ids of a layer's experts, the one to keep first in front: those of `guard_E`, then by score, then by index.

    Where a router selects within groups, they take turns, so that of any multiple of `groups` each has as many.
    """
    experts = len(score_E)
    order = np.lexsort((np.arange(experts), -score_E, ~guard_E))
    if groups == 1:
        return order
    place_E = np.empty(experts, np.int64)
    for ids in np.split(order[np.argsort(order // (experts // groups), kind="stable")], groups):
        place_E[ids] = np.arange(len(ids))
    return order[np.argsort(place_E[order], kind="stable")]


def cut(
    score_LE: Array, layers: tuple[int, ...], keep: int, protected: frozenset[tuple[int, int]] = frozenset(),
    groups: int = 1,
) -> Cut:  # fmt: skip
    """Keep the `keep` best of each layer; ties go to the lower index, `protected` (layer, expert) before all.

    Of several groups the best of each, and the margin is the least of theirs.

    Raises `InputError` for a count that drops none or all, and for a score that is not a number: such an
    expert cannot be ranked.
    """
    if not 0 < keep < score_LE.shape[1]:
        raise InputError(
            f"asked to keep {keep} of {score_LE.shape[1]} experts; wanted at least 1 and fewer than there are"
        )
    if not np.isfinite(score_LE).all():
        bad = [f"layer {layers[i]} expert {e}" for i, e in np.argwhere(~np.isfinite(score_LE))[:5]]
        raise InputError(
            f"{int((~np.isfinite(score_LE)).sum())} experts have no finite score ({', '.join(bad)}); calibrate again"
        )
    kept, margins = {}, {}
    for layer, score_E in zip(layers, score_LE):
        guard = np.array([(layer, e) in protected for e in range(len(score_E))])
        order = ordered(score_E, guard, groups)
        kept[layer] = tuple(sorted(int(e) for e in order[:keep]))
        lines = [line(score_E, order, keep, groups, group) for group in range(groups)]
        margins[layer] = min(float((last - first) / last) if last else 0.0 for last, first in lines)
    return Cut(kept, margins)


def line(score_E: Array, order_E: Array, keep: int, groups: int, group: int) -> tuple[float, float]:
    """Scores of the last expert that a group keeps, and of the first that it drops."""
    size = len(order_E) // groups
    mine = [e for e in order_E if e // size == group]
    return score_E[mine[keep // groups - 1]], score_E[mine[keep // groups]]


def ranks(score_LE: Array) -> Array:
    """Scores as ranks in [0, 1] within each layer, so that domains of different loudness compare; equals share a rank."""
    below_LE = (score_LE[:, None, :] < score_LE[:, :, None]).sum(2)
    equal_LE = (score_LE[:, None, :] == score_LE[:, :, None]).sum(2) - 1
    return (below_LE + equal_LE / 2) / max(score_LE.shape[1] - 1, 1)


def quota(ranks_DLE: Array, share_D: Array) -> Array:
    """Domains take turns to name their best expert that is left, by highest averages (D'Hondt): each has its
    share of the places, however few or many there are. The first named scores highest.
    """
    _, layers, experts = ranks_DLE.shape
    score_LE, left_LE, named_D = np.zeros((layers, experts)), np.ones((layers, experts), bool), np.zeros(len(share_D))
    for place in range(experts):
        domain = int((share_D / (named_D + 1)).argmax())
        best_L = np.where(left_LE, ranks_DLE[domain], -1.0).argmax(1)
        score_LE[np.arange(layers), best_L] = (experts - place) / experts
        left_LE[np.arange(layers), best_L] = False
        named_D[domain] += 1
    return score_LE


POLICIES: dict[str, Callable[[Array, Array], Array]] = {  # of ranks [D, L, E] and the domains' shares [D], all above 0
    "mean": lambda ranks_DLE, share_D: np.tensordot(share_D / share_D.sum(), ranks_DLE, 1),
    "union": lambda ranks_DLE, _: ranks_DLE.max(0),  # needed by any domain
    "intersection": lambda ranks_DLE, _: ranks_DLE.min(0),  # needed by every domain
    "quota": quota,
}


def combine(score_DLE: Array, policy: str, share_D: Array | None = None) -> Array:
    """Scores by domain [D, L, E] into one [L, E] by rank; a domain without a share is not heard.

    Raises `InputError` for an unknown policy.
    """
    if policy not in POLICIES:
        raise InputError(f"unknown domain policy {policy!r}; choose from {', '.join(POLICIES)}")
    share_D = np.ones(len(score_DLE)) if share_D is None else share_D
    heard = share_D > 0
    return POLICIES[policy](np.stack([ranks(score_LE) for score_LE in score_DLE[heard]]), share_D[heard])
