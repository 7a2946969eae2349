"""Loops in a generated text, from its token ids alone: pruned models fall into them where averages look fine.

A loop is a stretch said over three times or more, word for word. Leaves out text that varies while it
repeats ("step 1 …, step 2 …"), and generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COPIES = 3  # a phrase said twice is a quotation
LEAST_REPEATED = 16  # tokens that repeat; fewer are rulers, rows of zeros, indentation


@dataclass(frozen=True)
class Looped:
    """How much of one text is a loop."""

    tokens: int
    repeated: int  # tokens that only say again what their loop has said before
    period: int  # tokens a turn, of the loop that repeats most; 0 where there is none
    endless: bool  # the text ends within a loop: left alone, it would have gone on

    @property
    def share(self) -> float:
        """Repeated tokens over all; 0 for a text without tokens."""
        return self.repeated / max(self.tokens, 1)


def looped(ids: Sequence[int]) -> Looped:
    """Find the loops of a generated text (without its prompt and its end token).

    A token repeats when it stands in a stretch of some period p, of `COPIES` p tokens or more, after that
    stretch's first p; stretches that repeat fewer than `LEAST_REPEATED` tokens do not count. Time and memory
    grow with the square and with the length of the text.
    """
    ids_T = np.asarray(ids, np.int64)
    repeats_T = np.zeros(len(ids_T), bool)
    period, most = 0, 0
    for p in range(1, len(ids_T) // COPIES + 1):
        for start, stop in runs(ids_T[p:] == ids_T[:-p]):
            if stop - start >= max((COPIES - 1) * p, LEAST_REPEATED):
                repeats_T[start + p : stop + p] = True
                if stop - start > most:  # a multiple of a period repeats less than the period itself
                    period, most = p, stop - start
    return Looped(len(ids_T), int(repeats_T.sum()), period, bool(len(ids_T) and repeats_T[-1]))


def runs(true_T: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(true_T.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
