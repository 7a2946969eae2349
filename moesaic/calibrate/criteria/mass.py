"""Routing mass: the sum of an expert's gates over the tokens that selected it."""

from .base import Array, Criterion, Totals


def score(totals: Totals) -> Array:
    return totals["gate"]


MASS = Criterion("mass", ("gate",), score, "https://huggingface.co/morriszjm/MiniMax-M3-MXFP8-64e")
