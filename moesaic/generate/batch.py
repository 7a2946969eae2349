"""Many sequences written at once: each step is one sweep of the layers, over whichever are there to go on.

A sequence joins between two steps and leaves as it ends. Its prompt is read in chunks beside the
others' new tokens, so that a long one delays them by a step's work and no more. Leaves out text:
tokens come in and go out.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError, MoesaicError
from .cache import Cache
from .decoder import Decoder, Feed
from .sampling import Sampling, Token, choose, generator, told

STEP_TOKENS = 512  # new tokens of a step, all sequences together; more read the weights less often


@dataclass(eq=False)
class Passage:
    """One sequence being written: what was asked, and what has come of it so far."""

    prompt: Sequence[int]
    new_tokens: int  # at most
    sampling: Sampling
    numbers: torch.Generator
    cache: Cache = field(default_factory=Cache)
    echoed: list[Token] = field(default_factory=list)  # of the prompt, when asked for; the first has no logprob
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""  # "stop" or "length" once it is over
    error: MoesaicError | None = None  # why it could not go on

    @property
    def over(self) -> bool:
        return bool(self.finish) or self.error is not None

    @property
    def most_tokens(self) -> int:
        """What its cache may have to hold."""
        return len(self.prompt) + self.new_tokens

    def due(self) -> Sequence[int]:
        """Tokens that are not in the cache yet."""
        at = self.cache.length
        return self.prompt[at:] if at < len(self.prompt) else [self.tokens[-1].id]


class Batch:
    """The sequences of one decoder. `cache_tokens` is how many tokens all caches together may come to hold."""

    def __init__(self, decoder: Decoder, cache_tokens: int, step_tokens: int = STEP_TOKENS) -> None:
        self.decoder, self.cache_tokens, self.step_tokens = decoder, cache_tokens, step_tokens
        self.waiting: deque[Passage] = deque()
        self.live: list[Passage] = []

    def add(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling) -> Passage:
        """A sequence to be written from the next step that has room for it. Raises as `passage` does."""
        passage = self.passage(prompt, new_tokens, sampling)
        self.waiting.append(passage)
        return passage

    def passage(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling) -> Passage:
        """A sequence that this batch could write; it is not in it yet.

        Raises `InputError` for an empty prompt, an unknown token, or more tokens than the model or the cache hold.
        """
        context = self.decoder.architecture.context
        passage = Passage(prompt, new_tokens, sampling, generator(sampling.seed))
        if not prompt or new_tokens < 0:
            raise InputError(f"a prompt of {len(prompt)} tokens to go on for {new_tokens}; wanted 1 and 0, or more")
        if passage.most_tokens > min(context, self.cache_tokens):
            raise InputError(
                f"{len(prompt):,} tokens of prompt and {new_tokens:,} to come are {passage.most_tokens:,}; this model's "
                f"context is {context:,} and the cache here holds {self.cache_tokens:,}; shorten either"
            )
        self.decoder.check(prompt)
        return passage

    def drop(self, passage: Passage) -> None:
        """Forget a sequence; it goes no further."""
        for place in (self.waiting, self.live):
            if passage in place:
                place.remove(passage)

    def step(self) -> list[Passage]:
        """One sweep; returns the sequences that it brought further, those that are over being out of the batch.

        When anything is raised, those in `live` have lost their place: drop them.
        """
        held = sum(passage.most_tokens for passage in self.live)
        while self.waiting and held + self.waiting[0].most_tokens <= self.cache_tokens:
            held += self.waiting[0].most_tokens
            self.live.append(self.waiting.popleft())
        fed = self.portions()
        if not fed:
            return []
        hidden = self.decoder.step([Feed(passage.cache, tokens) for passage, tokens in fed])
        ready = []
        for (passage, tokens), hidden_nD in zip(fed, hidden):
            if passage.sampling.echo and not passage.tokens:
                self.echo(passage, len(tokens), hidden_nD)
            if passage.cache.length >= len(passage.prompt):
                ready.append((passage, hidden_nD[-1]))
        self.choose(ready)
        self.live = [passage for passage in self.live if not passage.over]
        return [passage for passage, _ in fed]

    def portions(self) -> list[tuple[Passage, Sequence[int]]]:
        """What each sequence adds to the next step: its newest token, or as much of its prompt as there is room for."""
        left, found = self.step_tokens, []
        for passage in sorted(self.live, key=lambda p: p.cache.length < len(p.prompt)):
            due = passage.due()
            most = min(len(due), max(0, left), self.decoder.most_queries(passage.cache.length + len(due)))
            if len(due) == 1 or most:
                found.append((passage, due[: max(1, most)]))
                left -= max(1, most)
        return found

    def echo(self, passage: Passage, count: int, hidden_nD: Tensor) -> None:
        """Tell the probability of each prompt token that follows one of the `count` newest."""
        end = passage.cache.length
        start, asked = end - count, passage.sampling.logprobs
        if not passage.echoed:
            passage.echoed.append(Token(passage.prompt[0]))
        following = list(passage.prompt[start + 1 : end + 1])
        if asked is None:
            passage.echoed += [Token(id) for id in following]
            return
        for span in self.decoder.run.logit_spans(len(following)):
            passage.echoed += told(self.decoder.logits(hidden_nD[: len(following)][span]), following[span], asked)

    def choose(self, ready: Sequence[tuple[Passage, Tensor]]) -> None:
        """The next token of each, from its last hidden state."""
        writing = []
        for passage, last_D in ready:
            if passage.new_tokens:
                writing.append((passage, last_D))
            else:
                passage.finish = "length"
        for span in self.decoder.run.logit_spans(len(writing)):
            logits_nV = self.decoder.logits(torch.stack([last_D for _, last_D in writing[span]]))
            for (passage, _), logits_V in zip(writing[span], logits_nV):
                try:
                    write(passage, logits_V)
                except MoesaicError as error:
                    passage.error = error


def write(passage: Passage, logits_V: Tensor) -> None:
    sampling = passage.sampling
    id = choose(logits_V, sampling, passage.numbers)
    passage.tokens.append(Token(id) if sampling.logprobs is None else told(logits_V[None], [id], sampling.logprobs)[0])
    ids = tuple(token.id for token in passage.tokens[-max(map(len, sampling.stop), default=1) :])
    if any(ids[-len(stop) :] == stop for stop in sampling.stop):
        passage.finish = "stop"
    elif len(passage.tokens) == passage.new_tokens:
        passage.finish = "length"
