"""The search space: units, their formats, and the bytes and harm of each at every kept count.

Leaves out choosing, and how harm is found where it does not add up expert by expert (measure).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ...errors import PlanError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Choice:
    """One unit and the formats it may take. K is the menu's kept counts; one column serves a unit they don't touch.

    bytes_FK   int64, stored, scales included
    harm_FK    nats per token: of rounding what is kept, and for experts also of dropping the rest;
               infinite where the format cannot be had
    order_FE   experts only: ids, the one to keep first in front; a plan keeps the first so many of its
               format's row, or of the only row. None: the plan states no ids for this unit
    """

    unit: str
    formats: tuple[str, ...]
    bytes_FK: Ints
    harm_FK: Floats
    order_FE: Ints | None = None

    def check(self, kept: Sequence[int]) -> None:
        """Raise `PlanError` if a table contradicts the formats or the kept counts."""
        rows, shapes = len(self.formats), [(len(self.formats), len(kept)), (len(self.formats), 1)]
        if not rows or self.bytes_FK.shape not in shapes or self.harm_FK.shape not in shapes:
            raise PlanError(
                f"{self.unit} has bytes {self.bytes_FK.shape} and harm {self.harm_FK.shape}; "
                f"wanted a row for each of {rows} formats, and a column for each of {len(kept)} kept counts or one for all"
            )
        if self.bytes_FK.dtype.kind != "i" or self.bytes_FK.min() < 0:
            raise PlanError(
                f"{self.unit} has {self.bytes_FK.dtype} bytes from {self.bytes_FK.min()}; wanted integers from 0"
            )
        if np.isnan(self.harm_FK).any() or np.isneginf(self.harm_FK).any():
            raise PlanError(
                f"{self.unit} has a harm of NaN or minus infinity; wanted nats, or infinity for what cannot be had"
            )
        if self.order_FE is not None and (len(self.order_FE) not in (1, rows) or self.order_FE.shape[1] < max(kept)):
            raise PlanError(
                f"{self.unit} puts experts in an order of {self.order_FE.shape}; "
                f"wanted one row or {rows}, of at least {max(kept)} experts"
            )


@dataclass(frozen=True, eq=False)
class Menu:
    """All there is to choose. Raises `PlanError` for tables that contradict each other.

    kept            counts of experts on offer, ascending: any, or the multiples that an engine wants
    fixed_bytes_K   stored whatever is chosen: embeddings, head, norms, routers, vision, headers, index
    weights         weights of the source, over which `bits` are counted
    """

    choices: tuple[Choice, ...]
    kept: tuple[int, ...]
    fixed_bytes_K: Ints
    weights: int

    def __post_init__(self) -> None:
        if not self.choices or not self.kept or list(self.kept) != sorted(set(self.kept)):
            raise PlanError(
                f"a menu has {len(self.choices)} units and kept counts {self.kept}; wanted some, and ascending"
            )
        if self.fixed_bytes_K.shape != (len(self.kept),) or self.fixed_bytes_K.dtype.kind != "i":
            raise PlanError(
                f"fixed bytes are {self.fixed_bytes_K.dtype} {self.fixed_bytes_K.shape}; "
                f"wanted an integer for each of {len(self.kept)} kept counts"
            )
        names = [choice.unit for choice in self.choices]
        if len(set(names)) < len(names):
            raise PlanError(f"{max(names, key=names.count)!r} is on the menu more than once; wanted every unit once")
        for choice in self.choices:
            choice.check(self.kept)

    def bits(self, stored_bytes: int) -> float:
        """Stored bits per weight of the source."""
        return 8 * stored_bytes / self.weights

    def budget_bytes(self, bits: float) -> int:
        """The most bytes that are not above `bits` per weight of the source."""
        return math.floor(Fraction(bits) * self.weights / 8)


def keep_first(dropped_E: Floats, rounded_FE: Floats, kept: Sequence[int]) -> tuple[Floats, Ints]:
    """`harm_FK` and `order_FE` of a layer where harm adds up expert by expert.

    dropped_E    nats of dropping an expert
    rounded_FE   nats of keeping it, in each format

    Dropping an expert also saves the harm of rounding it, so what keeping it is worth is dropped − rounded, which
    has another order in each format. Whatever the count, the experts worth most are the best to keep: no
    other set has less harm. Equals go by id.
    """
    order_FE = np.argsort(rounded_FE - dropped_E, axis=1, kind="stable")
    rounded = np.cumsum(np.take_along_axis(rounded_FE, order_FE, 1), axis=1)
    dropped = np.flip(np.cumsum(np.flip(dropped_E[order_FE], 1), axis=1), 1)
    none = np.zeros((len(rounded_FE), 1))
    harm_FE = np.hstack([none, rounded]) + np.hstack([dropped, none])  # column k: k experts kept
    return harm_FE[:, list(kept)], order_FE
