"""Whether a cut model falls into loops when it writes: pruned models do where averages look fine.

The source and a cut go on from the same beginnings of held-out text, with the same random numbers. Leaves out
what a loop is (divergence/loops.py), and the text: only how much of it repeats is told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checkpoint import Checkpoint
from .divergence import Estimate, Looped, looped
from .generate import Decoder, Sampling, end_tokens, generate
from .plan import dropped
from .tokens import TokenSet

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 256
SAMPLING = Sampling(temperature=1.0, top_p=0.95, seed=0)  # greedy text loops in sound models too


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
