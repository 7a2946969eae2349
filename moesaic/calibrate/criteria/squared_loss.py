"""Expected squared loss: Σ g²‖f‖² over all tokens, what the layer's output loses if the term is simply gone.

The saliency of Optimal Brain Damage for a whole expert, with the layer's output as the loss; it has
the unit that rounding errors have.
"""

from .base import Array, Criterion, Totals, per_position


def score(totals: Totals) -> Array:
    return per_position(totals["gated2"], totals)


SQUARED_LOSS = Criterion(
    "squared_loss",
    ("gated2", "positions"),
    score,
    "https://papers.nips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html",
)
