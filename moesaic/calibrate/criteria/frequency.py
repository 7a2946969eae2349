"""Frequency: how many tokens an expert was given. The oldest criterion, and the weakest at half the experts."""

from .base import Array, Criterion, Totals


def score(totals: Totals) -> Array:
    return totals["tokens"]


FREQUENCY = Criterion("frequency", ("tokens",), score, "https://arxiv.org/abs/2510.13999")
