"""EAN: the sum of the norms of an expert's outputs, whatever its gate."""

from .base import Array, Criterion, Totals


def score(totals: Totals) -> Array:
    return totals["norm"]


EAN = Criterion("ean", ("norm",), score, "https://arxiv.org/abs/2510.13999")
