"""AIMER: an expert whose weight lies in few large values stands out, and no text is needed to see it.

AIMER is mean|w| over the root mean square of all three matrices, 1 where all weights are equally
large, and prunes the experts that have most of it. This is its inverse, since here the higher is kept.
"""

import numpy as np

from .base import Array, Criterion, Totals


def score(totals: Totals) -> Array:
    size, square, weights = (totals[name] for name in AIMER.needs)
    inverse = np.sqrt(square * weights) / np.where(size > 0, size, 1.0)
    return np.asarray(np.where(size > 0, inverse, 0.0))


AIMER = Criterion("aimer", ("weight_size", "weight_square", "weights"), score, "https://github.com/ZongfangLiu/AIMER")
