"""EASY-EP: gated output norms, each weighed by how far its token's state was turned by the routed experts."""

from .base import Array, Criterion, Totals


def score(totals: Totals) -> Array:
    return totals["turned"]


EASY_EP = Criterion("easy_ep", ("turned",), score, "https://arxiv.org/abs/2504.06792")
