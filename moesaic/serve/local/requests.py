"""What both kinds of completion ask for in common, and the texts that are made of it, token by token."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from ...errors import InputError
from ...generate import Sampling, Token
from .engine import Ask, Job, News
from .fields import Fields
from .model import Served
from .text import Detokenizer, Stopper

MOST_LOGPROBS = 20
MOST_CHOICES = 128
MOST_STOPS = 16
NOT_FOLLOWED = (  # whatever their value: grammars, forced calls as they once were, and what vLLM's clients may ask
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "functions", "function_call", "length_penalty", "bad_words", "allowed_token_ids",
)  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """How a request wants its texts."""

    sampling: Sampling
    new_tokens: int | None
    choices: int
    stop_words: tuple[str, ...]
    stream: bool
    usage: bool  # in a stream; an answer in one piece always has it

    def asks(self, served: Served, prompts: Sequence[Sequence[int]]) -> list[Ask]:
        """One for each choice of each prompt; the choices of a seeded request have seeds of their own."""
        found = []
        for prompt in prompts:
            room, most = served.limits.context - len(prompt), served.limits.new_tokens
            new = min(room, most) if self.new_tokens is None else self.new_tokens
            if new > min(room, most) or new < 0:
                raise InputError(
                    f"{len(prompt):,} tokens of prompt and {max(0, new):,} to come; this server takes "
                    f"{served.limits.context:,} together and {most:,} new ones; shorten either"
                )
            for i in range(self.choices):
                seed = self.sampling.seed
                sampling = self.sampling if seed is None or not i else self.sampling.with_seed(seed + i)
                found.append((prompt, new, sampling))
        return found


def read_wish(fields: Fields, served: Served, logprobs: int | None, new_tokens: int | None, echo: bool = False) -> Wish:
    """Raises `InputError` for a field of the wrong kind, and for one that would change the answer and cannot here."""
    asked = fields.text("model", served.name)
    if asked != served.name:
        raise InputError(f"unknown model {str(asked)[:80]!r}; ask for {served.name!r}")
    for name in ("presence_penalty", "frequency_penalty", "min_p"):
        fields.refuse(name, 0)
    for name in NOT_FOLLOWED:
        fields.refuse(name)
    fields.refuse("min_tokens", 0)
    fields.refuse("best_of", 1)
    fields.refuse("repetition_penalty", 1)
    fields.refuse("logit_bias", {})
    fields.refuse("response_format", {"type": "text"})
    stops = [fields.text("stop")] if isinstance(fields.body.get("stop"), str) else fields.items("stop", str, "texts")
    if len(stops) > MOST_STOPS or not all(stops):
        raise InputError(f"stop names {len(stops)} words; wanted up to {MOST_STOPS}, none of them empty")
    ends = () if fields.flag("ignore_eos") else served.ends
    more = fields.items("stop_token_ids", int, "token ids")
    if len(more) > MOST_STOPS:
        raise InputError(f"stop_token_ids names {len(more)} tokens; wanted up to {MOST_STOPS}")
    own = Fields(served.defaults)
    sampling = Sampling(
        temperature=fields.number("temperature", own.number("temperature", 1.0)),
        top_p=fields.number("top_p", own.number("top_p", 1.0)),
        top_k=max(0, fields.count("top_k", own.count("top_k", 0, -1, 2**31), -1, 2**31)),
        seed=fields.count("seed", None, -(2**62), 2**62),
        stop=ends + tuple((id,) for id in more),
        logprobs=logprobs,
        echo=echo,
    )
    choices = fields.count("n", 1, 1, MOST_CHOICES)
    usage = fields.inner("stream_options").flag("include_usage")
    return Wish(sampling, new_tokens, choices, tuple(map(str, stops)), fields.flag("stream"), usage)


@dataclass
class Text:
    """One choice as it grows. `finish` is "stop" or "length" when it is over."""

    detokenizer: Detokenizer
    stopper: Stopper
    ends: frozenset[int]  # tokens that end a text and are no part of it
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""

    @staticmethod
    def of(served: Served, wish: Wish) -> "Text":
        ends = frozenset(stop[0] for stop in wish.sampling.stop)
        return Text(Detokenizer(served.tokenizer.inner, served.hidden), Stopper(wish.stop_words), ends)

    def take(self, news: News) -> str:
        """The text that `news` add. A word that stops it may come before the tokens end."""
        self.tokens += news.tokens
        ids = [token.id for token in news.tokens]
        new = self.stopper.push(self.detokenizer.push(ids[:-1] if ids and ids[-1] in self.ends else ids))
        if news.finish and not self.stopper.stopped:
            new += self.stopper.push(self.detokenizer.rest())
            new += self.stopper.rest()
        self.finish = "stop" if self.stopper.stopped else news.finish
        return new


Step = tuple[int, str, News]  # which text, what it gains, and of which tokens


@asynccontextmanager
async def attended(request: Request, served: Served, job: Job) -> AsyncIterator[None]:
    """While it lasts, the job is given up as soon as the client is gone; afterwards in any case."""
    watch = asyncio.create_task(leave(request, served, job))
    try:
        yield
    finally:
        watch.cancel()
        served.engine.cancel(job)


async def leave(request: Request, served: Served, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    served.engine.cancel(job)
    job.news.put_nowait(News(0, error=ClientDisconnect()))


async def steps(
    request: Request, served: Served, asks: Sequence[Ask], wish: Wish, texts: list[Text]
) -> AsyncIterator[Step]:
    """Every step of every text, until all are over or the client is gone."""
    began = time.monotonic()
    job = served.engine.submit(asks)
    texts += [Text.of(served, wish) for _ in asks]
    latest = [0.0] * len(asks)
    served.metrics.prompt_tokens.inc(sum(len(prompt) for prompt, _, _ in asks[:: wish.choices]))
    async with attended(request, served, job):
        async for news in served.engine.follow(job):
            now, text = time.monotonic(), texts[news.index]
            if news.tokens:
                meter = served.metrics.next_token if latest[news.index] else served.metrics.first_token
                meter.observe(now - (latest[news.index] or began))
                latest[news.index] = now
                served.metrics.new_tokens.inc(len(news.tokens))
            gained = text.take(news)
            if text.finish:
                served.engine.close(job, news.index)
            yield news.index, gained, news


def usage(prompts: Sequence[Sequence[int]], texts: Sequence[Text]) -> dict[str, int]:
    read, made = sum(map(len, prompts)), sum(len(text.tokens) for text in texts)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
