"""Every supported plan of every kept count, and the best plan for a budget. The reasoning stands in `__init__`.

Leaves out the search among plans that no price supports (search).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...errors import PlanError
from .menu import Choice, Floats, Ints, Menu
from .search import falling, search


@dataclass(frozen=True)
class Allocation:
    """A plan, what it costs, and how good it is proven to be.

    kept       experts that each layer keeps
    formats    unit -> format
    experts    unit -> ids that stay, ascending, where its `Choice` has an order
    bytes      all that is stored, never above the budget
    harm       nats per token
    bound      no plan on offer within the budget has less harm, but for the rounding of sums
    """

    kept: int
    formats: Mapping[str, str] = field(repr=False)
    experts: Mapping[str, tuple[int, ...]] = field(repr=False)
    bytes: int
    harm: float
    budget_bytes: int
    bound: float

    @property
    def gap(self) -> float:
        """Nats per token that the best plan could at most save over this one; 0 when this is the best."""
        return self.harm - self.bound


@dataclass(frozen=True, eq=False)
class Frontier:
    """The curves: row k of each table is one kept count, column p the plan after its first p steps.

    choices      the menu's, by name: U units, in whatever order they were given
    kept_K       the kept counts at which every unit has an option
    bytes_KP     of each point; rising, and the last point repeats where a row's steps run out
    harm_KP      falling
    price_KP     λ, the nats per byte that the step after a point saves; 0 where there is none
    """

    choices: tuple[Choice, ...]
    kept_K: Ints
    fixed_bytes_K: Ints
    bytes_KUF: Ints
    harm_KUF: Floats
    start_KU: Ints  # options at point 0
    unit_KS: Ints  # the unit that takes step s …
    option_KS: Ints  # … and the option it steps to
    bytes_KP: Ints
    harm_KP: Floats
    price_KP: Floats

    @staticmethod
    def of(menu: Menu) -> "Frontier":
        """Trace every curve. Raises `PlanError` if at no kept count each unit has an option."""
        choices = tuple(sorted(menu.choices, key=lambda choice: choice.unit))
        bytes_KUF, harm_KUF = _tables(choices, len(menu.kept))
        missing_KU: NDArray[np.bool_] = np.isinf(harm_KUF).min(-1)
        rows = np.flatnonzero(~missing_KU.max(1))
        if not rows.size:
            unit = choices[int(missing_KU.sum(0).argmax())].unit
            raise PlanError(
                f"at none of {len(menu.kept)} kept counts has every unit an option, {unit} least often; offer more formats"
            )
        bytes_KUF, harm_KUF, fixed_bytes_K = bytes_KUF[rows], harm_KUF[rows], menu.fixed_bytes_K[rows]
        option_HKU, price_HKU = _hulls(bytes_KUF, harm_KUF)

        # Steps [K, S]: hull by hull, so that a stable sort leaves a unit's own steps in order where prices tie.
        rise, fall = (np.diff(_pick(table, option_HKU), axis=0) for table in (bytes_KUF, -harm_KUF))
        units = np.broadcast_to(np.arange(len(choices)), price_HKU.shape)
        steps = [
            table.swapaxes(0, 1).reshape(len(rows), -1) for table in (price_HKU, rise, fall, units, option_HKU[1:])
        ]
        order = np.argsort(-steps[0], axis=1, kind="stable")
        price, rise, fall, taker, option = (np.take_along_axis(table, order, 1) for table in steps)

        zero, none = np.zeros((len(rows), 1)), np.zeros((len(rows), 1), np.int64)
        smallest = fixed_bytes_K + _pick(bytes_KUF, option_HKU[:1])[0].sum(1)
        least = _pick(harm_KUF, option_HKU[-1:])[0].sum(1)
        above = fall[:, ::-1].cumsum(1)[:, ::-1]  # added up from the end where digits matter
        return Frontier(
            choices,
            np.array(menu.kept)[rows],
            fixed_bytes_K,
            bytes_KUF,
            harm_KUF,
            start_KU=option_HKU[0],
            unit_KS=taker,
            option_KS=option,
            bytes_KP=smallest[:, None] + np.hstack([none, rise.cumsum(1)]),
            harm_KP=least[:, None] + np.hstack([above, zero]),
            price_KP=np.hstack([price, zero]),
        )

    def pareto(self, kept: Collection[int] | None = None) -> tuple[Ints, Ints]:
        """(k, p) of the supported points of all (or the given) kept counts that no other one beats, bytes rising."""
        rows = self._rows(kept)
        bytes_, harm = self.bytes_KP[rows].ravel(), self.harm_KP[rows].ravel()
        order = np.lexsort((harm, bytes_))
        row, p = np.divmod(order[falling(harm[order])], self.bytes_KP.shape[1])
        return rows[row], p

    def knee(self, kept: Collection[int] | None = None) -> tuple[int, int]:
        """(k, p) of the point of `pareto` farthest below the chord of its ends, both axes scaled to 1.

        Kneedle (Satopää et al. 2011), which needs no smoothing here. It marks where the curve on offer bends, and
        moves when the ends of the offer do: a mark for the eye, not advice.
        """
        k, p = self.pareto(kept)
        bytes_, harm = self.bytes_KP[k, p], self.harm_KP[k, p]
        x = (bytes_ - bytes_[0]) / max(bytes_[-1] - bytes_[0], 1)
        y = (harm - harm[-1]) / (harm[0] - harm[-1] or 1)
        at = int((x + y).argmin())
        return int(k[at]), int(p[at])

    def plan(self, k: int, p: int) -> Allocation:
        """The plan at a point. None of its kept count has less harm in its bytes (Everett), so that bound is its harm."""
        option_U = self._options(k, p)
        harm = self._harm(k, option_U)
        return self._allocation(k, option_U, harm, int(self.bytes_KP[k, p]), harm)

    def fit(self, budget_bytes: int, kept: Collection[int] | None = None) -> Allocation:
        """The plan of least harm in at most `budget_bytes`, of all (or the given) kept counts; `gap` says how sure.

        Given counts that are not on offer are passed by, so that multiples of 8 can be asked for as such. Raises
        `PlanError` when none of them is, or when not even the smallest plan fits, naming the shortfall.
        """
        rows = self._rows(kept)
        smallest = rows[self.bytes_KP[rows, 0].argmin()]
        if (least := int(self.bytes_KP[smallest, 0])) > budget_bytes:
            raise PlanError(
                f"the smallest plan, of {self.kept_K[smallest]} experts a layer, takes {least:,} bytes, "
                f"{least - budget_bytes:,} more than the budget of {budget_bytes:,}; "
                "allow fewer experts, offer a smaller format or raise the budget"
            )
        dual_K, last_K = self.bounds(budget_bytes), self._last_within(budget_bytes)
        best, harm, passed_over = None, math.inf, math.inf
        for k in sorted(rows, key=lambda k: (dual_K[k], -self.kept_K[k])):
            if dual_K[k] >= harm:
                break
            supported_U = self._options(k, last_K[k])
            if (found := self._harm(k, supported_U)) < harm:
                best, harm = (k, supported_U), found
            moved_U, unseen = self._search(k, last_K[k], supported_U, budget_bytes, harm - dual_K[k])
            if moved_U is not None and (found := self._harm(k, moved_U)) < harm:
                best, harm = (k, moved_U), found
            passed_over = min(passed_over, dual_K[k] + unseen)
        assert best is not None
        return self._allocation(*best, harm, budget_bytes, min(harm, passed_over))

    def _search(self, k: int, p: int, option_U: Ints, budget_bytes: int, ceiling: float) -> tuple[Ints | None, float]:
        """`search` around point p, whose options are given; harms and ceiling are counted from D."""
        taken = np.arange(len(option_U)), option_U
        priced_UF = self.harm_KUF[k] + self.price_KP[k, p] * self.bytes_KUF[k]
        forfeit_UF = np.maximum(priced_UF - priced_UF[taken][:, None], 0.0)  # below 0 only by rounding
        extra_UF = self.bytes_KUF[k] - self.bytes_KUF[k][taken][:, None]
        spare = budget_bytes - int(self.bytes_KP[k, p])
        moved_U, unseen = search(forfeit_UF, extra_UF, float(self.price_KP[k, p]), spare, ceiling)
        return None if moved_U is None else np.where(moved_U < 0, option_U, moved_U), unseen

    def bounds(self, budget_bytes: int) -> Floats:
        """D [K]: nats that no plan of a kept count in `budget_bytes` comes below; infinite where none fits.

        Less by what the rounding of its own sums can have added to it.
        """
        p = self._last_within(budget_bytes)
        price_K = self.price_KP[np.arange(len(p)), p]
        cheapest_KU = (self.harm_KUF + price_K[:, None, None] * self.bytes_KUF).min(-1)
        paid_K = price_K * (budget_bytes - self.fixed_bytes_K)
        sums_K = np.abs(cheapest_KU).sum(1) + np.abs(paid_K)
        rounding_K = np.finfo(np.float64).eps * (cheapest_KU.shape[1] + 4) * sums_K
        return np.where(self.bytes_KP[:, 0] <= budget_bytes, cheapest_KU.sum(1) - paid_K - rounding_K, np.inf)

    def _last_within(self, budget_bytes: int) -> Ints:
        """The last point [K] of each row within the budget; 0 also where there is none."""
        return np.maximum((self.bytes_KP <= budget_bytes).sum(1) - 1, 0)

    def _rows(self, kept: Collection[int] | None) -> Ints:
        if kept is None:
            return np.arange(len(self.kept_K))
        rows = np.flatnonzero(np.isin(self.kept_K, list(kept)))
        if not rows.size:
            raise PlanError(f"no plan keeps {sorted(kept)} experts a layer; on offer are {_spelled(self.kept_K)}")
        return rows

    def _options(self, k: int, p: int) -> Ints:
        """Options [U] at a point: of a unit that has taken several steps, the last one's."""
        option_U = self.start_KU[k].copy()
        option_U[self.unit_KS[k, :p]] = self.option_KS[k, :p]
        return option_U

    def _harm(self, k: int, option_U: Ints) -> float:
        return math.fsum(self.harm_KUF[k][np.arange(len(option_U)), option_U])

    def _allocation(self, k: int, option_U: Ints, harm: float, budget_bytes: int, bound: float) -> Allocation:
        kept = int(self.kept_K[k])
        chosen = list(zip(self.choices, option_U.tolist()))
        orders = {c.unit: c.order_FE[f % len(c.order_FE)] for c, f in chosen if c.order_FE is not None}
        return Allocation(
            kept=kept,
            formats={c.unit: c.formats[f] for c, f in chosen},
            experts={unit: tuple(sorted(order_E[:kept].tolist())) for unit, order_E in orders.items()},
            bytes=int(self.fixed_bytes_K[k]) + int(self.bytes_KUF[k][np.arange(len(option_U)), option_U].sum()),
            harm=harm,
            budget_bytes=budget_bytes,
            bound=bound,
        )


def _spelled(kept_K: Ints) -> str:
    return f"{len(kept_K)} counts from {kept_K[0]} to {kept_K[-1]}" if len(kept_K) > 9 else str(kept_K.tolist())


def _tables(choices: tuple[Choice, ...], columns: int) -> tuple[Ints, Floats]:
    """Bytes and harm [K, U, F]; a unit with fewer formats than F has infinite harm in the rest."""
    shape = columns, len(choices), max(len(c.formats) for c in choices)
    bytes_KUF, harm_KUF = np.zeros(shape, np.int64), np.full(shape, np.inf)
    for u, c in enumerate(choices):
        bytes_KUF[:, u, : len(c.formats)] = c.bytes_FK.T
        harm_KUF[:, u, : len(c.formats)] = c.harm_FK.T
    return bytes_KUF, harm_KUF


def _hulls(bytes_KUF: Ints, harm_KUF: Floats) -> tuple[Ints, Floats]:
    """Every unit's lower hull at every kept count: options [H, K, U] from the smallest up, prices [H − 1, K, U].

    By gift wrapping: from where a unit stands, the next corner is the larger option that saves most nats per byte;
    of several on one line the nearest, so that a curve stops at each. A unit at its end stays there, at price 0.
    """
    size = np.where(np.isinf(harm_KUF), np.iinfo(np.int64).max, bytes_KUF)
    at = np.where(size == size.min(-1, keepdims=True), harm_KUF, np.inf).argmin(-1)[None]
    options, prices = [at[0]], []
    for _ in range(harm_KUF.shape[-1] - 1):
        rise = bytes_KUF - _pick(bytes_KUF, at)[0][..., None]
        fall = _pick(harm_KUF, at)[0][..., None] - harm_KUF
        rate = np.where((rise > 0) & (fall > 0), fall, 0.0) / np.maximum(rise, 1)
        price = rate.max(-1)
        nearest = np.where((rate == price[..., None]) & (rate > 0), rise, np.iinfo(np.int64).max).argmin(-1)
        at = np.where(price > 0, nearest, at)
        options.append(at[0])
        prices.append(price)
    shape = 0, *harm_KUF.shape[:2]
    # Corners nearly on one line may come out a rounding error too steep: a unit's prices must not rise.
    return np.stack(options), np.minimum.accumulate(np.stack(prices), axis=0) if prices else np.zeros(shape)


def _pick(table_KUF: np.ndarray, option_HKU: Ints) -> np.ndarray:
    """Entries [H, K, U] of the table at options."""
    return np.take_along_axis(table_KUF[None], option_HKU[..., None], -1)[..., 0]
