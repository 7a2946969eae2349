"""MAN: mean norm of an expert's outputs over its tokens, gates left out."""

from .base import Array, Criterion, Totals, per_token


def score(totals: Totals) -> Array:
    return per_token(totals["norm"], totals)


MAN = Criterion("man", ("norm", "tokens"), score, "https://arxiv.org/abs/2606.15716")
