"""The best plan near a supported one: how to spend what the last whole step left over.

Leaves out where the supported plan, its price and the ceiling come from (frontier).
"""

import numpy as np

from .menu import Floats, Ints

STATES = 1 << 14  # partial plans held at once; of those beyond it only the least they could come to is kept


def search(forfeit_UF: Floats, extra_UF: Ints, price: float, spare: int, ceiling: float) -> tuple[Ints | None, float]:
    """The plan of least Σ forfeit + price · (spare − Σ extra) below `ceiling`, with Σ extra ≤ spare.

    forfeit_UF   nats, from 0 up; infinite where an option cannot be had
    extra_UF     bytes above those of the supported plan, which leaves `spare` bytes
    price        nats per byte; ceiling: nats, above 0

    Returns the option [U] of each unit, −1 for "as it was", or None if no plan is below the ceiling; and the
    nats below which nothing was passed over: infinite if the search was exhaustive.

    Dynamic programming over the units that can move at all, the largest first, so that the small ones are left to
    fill what is left. A partial plan is (bytes spent, nats lost). It goes when another spends no more and has
    no more harm, or when the units to come cannot take it below the ceiling: one of them must move, which
    costs at least its minimum penalty, and every byte nearer to `spare` loses at least the best rate among them, or the price
    of leaving it. Every plan found lowers the ceiling for the rest.
    """
    movable_UF = (extra_UF != 0) & (forfeit_UF < ceiling)
    size_U = np.where(movable_UF, np.abs(extra_UF), 0).max(1)
    core = np.argsort(-size_U, kind="stable")[: np.count_nonzero(size_U)]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_UF = np.where(movable_UF, forfeit_UF / np.abs(extra_UF), np.inf)
    toll = _least_from(np.where(movable_UF, forfeit_UF, np.inf).min(1)[core])  # at i: least of core units i and later
    fill_rate = _least_from(np.where(extra_UF > 0, rate_UF, np.inf).min(1)[core])
    shed_rate = _least_from(np.where(extra_UF < 0, rate_UF, np.inf).min(1)[core])

    spent, lost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []  # per unit gone through: each partial plan's forerunner, and the option taken
    found: tuple[int, int, int] | None = None
    passed_over = np.inf
    for i, unit in enumerate(core):
        options = np.append(-1, np.flatnonzero(movable_UF[unit] & (forfeit_UF[unit] < ceiling)))
        extra_O, forfeit_O = np.append(0, extra_UF[unit, options[1:]]), np.append(0.0, forfeit_UF[unit, options[1:]])
        spent, lost = (spent[:, None] + extra_O).ravel(), (lost[:, None] + forfeit_O).ravel()

        left = spare - spent
        total = np.where(left >= 0, lost + price * left, np.inf)
        best = int(total.argmin())
        if total[best] < ceiling:
            ceiling, found = float(total[best]), (i, best // len(options), int(options[best % len(options)]))
        if i + 1 == len(core):
            break

        with np.errstate(invalid="ignore"):  # 0 · ∞ where nothing is left: not taken
            rest = np.where(left >= 0, left * min(price, fill_rate[i + 1]), -left * shed_rate[i + 1])
        reach = lost + np.maximum(rest, toll[i + 1])
        going = np.flatnonzero(reach < ceiling)
        harm = lost[going] - price * spent[going]
        by_spent = np.lexsort((harm, spent[going]))
        going = going[by_spent[falling(harm[by_spent])]]
        if len(going) > STATES:
            ranked = np.argsort(reach[going], kind="stable")
            passed_over = min(passed_over, float(reach[going[ranked[STATES]]]))
            going = going[np.sort(ranked[:STATES])]
        spent, lost = spent[going], lost[going]
        trail.append((going // len(options), options[going % len(options)]))
        if not going.size:
            break
    return (None if found is None else _walk_back(found, trail, core, len(forfeit_UF))), passed_over


def _walk_back(found: tuple[int, int, int], trail: list[tuple[Ints, Ints]], core: Ints, units: int) -> Ints:
    """Options [U] of the plan whose last move is core unit i's, from a partial plan, by an option."""
    moved_U = np.full(units, -1, np.int64)
    i, state, moved_U[core[found[0]]] = found
    for earlier in range(i - 1, -1, -1):
        forerunner, option = trail[earlier]
        moved_U[core[earlier]], state = option[state], forerunner[state]
    return moved_U


def _least_from(values: Floats) -> Floats:
    """At each place the least value from there on."""
    return np.minimum.accumulate(values[::-1])[::-1]


def falling(values: Floats) -> Ints:
    """Places where a value is below all before it."""
    before = np.minimum.accumulate(np.append(np.inf, values))[:-1]
    return np.flatnonzero(values < before)
