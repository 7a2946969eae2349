"""REAP: how much an expert adds to its layer, mean of gate × output norm over the tokens that reach it."""

from .base import Array, Criterion, Totals, per_token


def score(totals: Totals) -> Array:
    return per_token(totals["gated"], totals)


REAP = Criterion("reap", ("gated", "tokens"), score, "https://arxiv.org/abs/2510.13999")
