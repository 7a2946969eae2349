"""Text from a checkpoint that may be larger than memory: keys and values are kept, weights as far as they fit.

`generate` answers a list of prompts. `Batch` is the same for prompts that come and go, a sweep at a time, over
a `Decoder`, which owns the weights in memory. Leaves out text (tokens only) and serving.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint import Checkpoint, read_object
from ..errors import CheckpointError
from .batch import Batch, Passage
from .decoder import Decoder, Feed
from .sampling import Sampling, Token

__all__ = [
    "Batch", "Completion", "Decoder", "Feed", "Passage", "Sampling", "Token", "end_tokens", "generate",
]  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """What came after one prompt. `finish` is "stop" or "length"."""

    tokens: tuple[Token, ...]
    finish: str
    echoed: tuple[Token, ...] = ()  # the prompt's own tokens, where `Sampling.echo` asks for them

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def generate(
    decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling | None = None
) -> list[Completion]:
    """At most `new_tokens` after each of `prompts` (token ids), all together a batch; greedy without `sampling`.

    It ends at no token by itself: `Sampling(stop=end_tokens(checkpoint))` ends where the model does. Raises
    `InputError` for an unknown token or more tokens than the model's context, `CheckpointError` where the weights give
    no finite numbers.
    """
    batch = Batch(decoder, sum(len(prompt) + new_tokens for prompt in prompts))
    passages = [batch.add(prompt, new_tokens, sampling or Sampling()) for prompt in prompts]
    while batch.live or batch.waiting:
        for passage in batch.step():
            if passage.error is not None:
                raise passage.error
    return [Completion(tuple(p.tokens), p.finish, tuple(p.echoed)) for p in passages]


def end_tokens(checkpoint: Checkpoint) -> tuple[tuple[int, ...], ...]:
    """What the model ends its text with, as `Sampling.stop`: of generation_config.json, or else of config.json."""
    path = checkpoint.path / "generation_config.json"
    config = read_object(path) if path.exists() else checkpoint.family.text(checkpoint.config)
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(id, int) for id in ids):
        raise CheckpointError(f"{path} gives eos_token_id as {json.dumps(ids)}; wanted a token id or several")
    return tuple((id,) for id in ids)
