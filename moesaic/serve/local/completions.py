"""/v1/completions: text or token ids in, text out, with the log-probabilities of either. One prompt or many."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request

from ...errors import InputError
from ...generate import Token
from .fields import Fields
from .model import Served
from .requests import MOST_LOGPROBS, Text, read_wish, steps, usage

NEW_TOKENS = 16  # where a request names none, as OpenAI has it


def read_prompts(fields: Fields, served: Served) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt, and its text."""
    asked, special = fields.body.get("prompt"), fields.body.get("add_special_tokens") is not False
    many = asked if isinstance(asked, list) and asked and not isinstance(asked[0], int) else [asked]
    ids, texts = [], []
    for prompt in many:
        if isinstance(prompt, str):
            ids.append(served.encode(prompt, special))
            texts.append(prompt)
        elif isinstance(prompt, list) and all(type(id) is int for id in prompt):
            for id in prompt:
                if not 0 <= id < served.checkpoint.architecture.vocab:
                    raise InputError(f"token {str(id)[:20]} is not in this model's vocabulary")
            ids.append(prompt)
            texts.append(served.decode(prompt))
        else:
            raise InputError("prompt is not a text, a list of token ids, or a list of either; send one of them")
    return ids, texts


def logprobs_of(served: Served, tokens: Sequence[Token], start: int, plain_ids: bool) -> dict[str, Any]:
    """Tokens with their log-probabilities; `start` is where the first stands in the text."""

    def name(id: int) -> str:
        return f"token_id:{id}" if plain_ids else served.word(id)

    words, offsets, tops = [served.word(token.id) for token in tokens], [], []
    for token, word in zip(tokens, words):
        offsets.append(start)
        start += len(word)
        top: dict[str, float] = {}
        for id, logprob in (*token.top, *([] if token.logprob is None else [(token.id, token.logprob)])):
            top.setdefault(name(id), logprob)
        tops.append(top if token.logprob is not None else None)
    return {
        "tokens": [name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


async def completions(fields: Fields, request: Request, served: Served) -> AsyncIterator[dict[str, Any]]:
    """Chunks, in a stream; else the whole answer alone."""
    fields.refuse("suffix", "")
    logprobs = fields.count("logprobs", None, 0, MOST_LOGPROBS)
    echo, plain_ids = fields.flag("echo"), fields.flag("return_tokens_as_token_ids")
    new = fields.count("max_tokens", NEW_TOKENS, 0, 2**31)
    wish = read_wish(fields, served, logprobs, new, echo)
    if not new and not echo:
        raise InputError("max_tokens is 0 and echo is not asked for, which makes no text; wanted 1 or more")
    prompts, given = await asyncio.to_thread(read_prompts, fields, served)
    asks, n = wish.asks(served, prompts), wish.choices
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": served.name,
    }
    texts: list[Text] = []
    whole = [given[i // n] if echo else "" for i in range(len(asks))]
    told: list[list[Token]] = [[] for _ in asks]
    lengths = [0] * len(asks)

    def choice(index: int, text: str, tokens: Sequence[Token], finish: str) -> dict[str, Any]:
        described = None if logprobs is None else logprobs_of(served, tokens, lengths[index], plain_ids)
        lengths[index] += sum(len(served.word(token.id)) for token in tokens) if described else 0
        return {
            "index": index,
            "text": text,
            "logprobs": described,
            "finish_reason": finish or None,
            "stop_reason": None,
        }

    async for index, gained, news in steps(request, served, asks, wish, texts):
        tokens, finish = [*news.echoed, *news.tokens], texts[index].finish
        if wish.stream:
            first = given[index // n] if echo and len(texts[index].tokens) == len(news.tokens) else ""
            if first or gained or finish or logprobs is not None:
                yield {**head, "choices": [choice(index, first + gained, tokens, finish)]}
        whole[index] += gained
        told[index] += tokens
    if wish.stream:
        if wish.usage:
            yield {**head, "choices": [], "usage": usage(prompts, texts)}
        return
    choices = [choice(i, whole[i], told[i], text.finish) for i, text in enumerate(texts)]
    yield {**head, "choices": choices, "usage": usage(prompts, texts)}
