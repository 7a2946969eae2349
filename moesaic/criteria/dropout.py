"""Dropout loss as PrismaQuant prints it: sum of gate × squared output norm, over all tokens of the calibration."""

from .base import Array, Criterion, Totals


def score(totals: Totals) -> Array:
    return totals["gnorm2"] / totals["positions"]


DROPOUT = Criterion("dropout", ("gnorm2", "positions"), score, "https://github.com/RobTand/prismaquant")
