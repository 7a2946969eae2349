"""Dropout loss as PrismaQuant prints it: sum of gate × squared output norm, over all tokens of the calibration."""

from .base import Array, Criterion, Totals, per_position


def score(totals: Totals) -> Array:
    return per_position(totals["gnorm2"], totals)


DROPOUT = Criterion("dropout", ("gnorm2", "positions"), score, "https://github.com/RobTand/prismaquant")
