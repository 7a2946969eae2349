"""Repetition: whether a cut model falls into loops when it writes, as pruned models do where averages look fine.

A loop is a stretch said over three times or more, word for word. The source and a cut go on from the same
beginnings of held-out text, with the same random numbers. Leaves out text that varies while it repeats ("step 1 …,
step 2 …"), and the text itself: only how much of it repeats is told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..data.tokens import TokenSet
from ..generate import Decoder, Sampling, end_tokens, generate
from ..measure.divergence import Estimate
from ..plan import dropped

COPIES = 3  # a phrase said twice is a quotation
LEAST_REPEATED = 16  # tokens that repeat; fewer are rulers, rows of zeros, indentation
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 256
SAMPLING = Sampling(temperature=1.0, top_p=0.95, seed=0)  # greedy text loops in sound models too


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


@dataclass(frozen=True)
class Probe:
    """How the texts of one model repeat: means over texts, ± standard error."""

    share: Estimate  # of tokens that only repeat
    endless: Estimate  # of texts that end within a loop
    prompts: int
    new_tokens: int

    @staticmethod
    def of(found: Sequence[Looped]) -> "Probe":
        shares = Estimate.of_rows([one.share for one in found])
        endless = Estimate.of_share(sum(one.endless for one in found), len(found))
        return Probe(shares, endless, len(found), sum(one.tokens for one in found))

    def facts(self) -> dict[str, Any]:
        return vars(self) | {"share": vars(self.share), "endless": vars(self.endless)}


def probe(
    checkpoint: Checkpoint, tokens: TokenSet, kept: Mapping[int, Sequence[int]] | None = None,
    prompts: int = PROMPTS, new_tokens: int = NEW_TOKENS, memory_bytes: int | None = None,
) -> Probe:  # fmt: skip
    """Let the model, without the experts that are not in `kept` (layer -> ids), go on from rows of `tokens`.

    memory_bytes  of weights between steps; None: half of what is available
    """
    chosen = np.linspace(0, tokens.rows, min(prompts, tokens.rows), endpoint=False).astype(int)
    begun = [tokens.ids_BT[row, :PROMPT_TOKENS].tolist() for row in chosen]
    a = checkpoint.architecture
    room = a.context - max(map(len, begun))
    ends = end_tokens(checkpoint)
    sampling = Sampling(SAMPLING.temperature, SAMPLING.top_p, seed=SAMPLING.seed, stop=ends)
    decoder = Decoder(checkpoint, memory_bytes, dropped=dropped(kept or {}, a.experts))
    texts = generate(decoder, begun, min(new_tokens, room), sampling)
    return Probe.of([looped([id for id in text.ids if (id,) not in ends]) for text in texts])
