"""/v1/chat/completions: a conversation in, an answer out, with its reasoning and its tool calls told apart."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from ...errors import InputError
from ...generate import Token
from .fields import Fields
from .model import Served
from .requests import MOST_LOGPROBS, Text, read_wish, steps, usage
from .text import BROKEN, Answer, Part
from .tools import call_objects, shapes_of


@dataclass
class Reply:
    """One choice as a message. `add` returns what is new as a delta of OpenAI's stream."""

    answer: Answer
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, text: str, over: bool) -> dict[str, Any]:
        parts: list[Part] = [*self.answer.push(text), *(self.answer.rest() if over else ())]
        delta: dict[str, Any] = {}
        for kind, piece in parts:
            if kind == "calls":
                new = call_objects(piece, self.answer.tools, self.answer.talk.calls, len(self.calls))
                self.calls += new
                delta["tool_calls"] = [*delta.get("tool_calls", []), *new]
            elif kind == "reasoning":
                self.reasoning += piece
                for name in ("reasoning", "reasoning_content"):  # vLLM's name, and the older one
                    delta[name] = delta.get(name, "") + piece
            else:
                self.content += piece
                delta["content"] = delta.get("content", "") + piece
        return delta

    def message(self) -> dict[str, Any]:
        content = (self.content.strip() or None) if self.calls else self.content
        found: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            found |= {"reasoning": self.reasoning, "reasoning_content": self.reasoning}
        if self.calls:
            found["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
        return found

    def finish(self, text: Text) -> str:
        return "tool_calls" if self.calls and text.finish == "stop" else text.finish


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools that may be called. Raises `InputError` for one without a name, and for a choice nobody can force."""
    tools = fields.items("tools", dict, "tools")
    for tool in tools:
        function = Fields(tool).inner("function")
        if not function.text("name"):
            raise InputError("a tool has no function with a name; describe it as OpenAI's API does")
        function.inner("parameters")
    choice = fields.body.get("tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise InputError('tool_choice is neither "auto" nor "none"; this server cannot force a call')
    return tools if choice == "auto" else []


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = fields.items("messages", dict, "messages")
    return messages


def logprobs_of(served: Served, tokens: Sequence[Token], count: int) -> dict[str, Any]:
    def described(id: int, logprob: float | None) -> dict[str, Any]:
        word = served.word(id)
        return {"token": word, "logprob": logprob, "bytes": None if BROKEN in word else list(word.encode())}

    content = [
        {**described(t.id, t.logprob), "top_logprobs": [described(id, logprob) for id, logprob in t.top[:count]]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


async def chat(fields: Fields, request: Request, served: Served) -> AsyncIterator[dict[str, Any]]:
    """Chunks, in a stream; else the whole answer alone."""
    count = fields.count("top_logprobs", 0, 0, MOST_LOGPROBS)
    logprobs = count if fields.flag("logprobs") else None
    new = fields.count("max_completion_tokens", fields.count("max_tokens", None, 1, 2**31), 1, 2**31)
    wish = read_wish(fields, served, logprobs, new)
    tools, messages = read_tools(fields), read_messages(fields)
    options = fields.inner("chat_template_kwargs").body
    written = await asyncio.to_thread(served.render, messages, tools, options)
    prompt = await asyncio.to_thread(served.encode, written, special=False)
    asks, texts = wish.asks(served, [prompt]), list[Text]()
    inside = "reasoning" if served.thinks(written) else "content"
    talk = served.talk
    shapes = shapes_of(tools) if talk.calls.call[0] else {}  # a model without words for calls answers in content
    replies = [Reply(Answer(talk, inside, shapes)) for _ in asks]
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
    chunk, begun = {**head, "object": "chat.completion.chunk"}, set[int]()
    async for index, gained, news in steps(request, served, asks, wish, texts):
        text, reply = texts[index], replies[index]
        if text.finish:  # reading calls may take a second
            delta = await asyncio.to_thread(reply.add, gained, True)
        else:
            delta = reply.add(gained, False)
        if not wish.stream:
            continue
        if index not in begun:
            begun.add(index)
            delta = {"role": "assistant", "content": "", **delta}
        if delta or text.finish or logprobs is not None:
            told = None if logprobs is None else logprobs_of(served, news.tokens, logprobs)
            finish = reply.finish(text) or None
            yield {**chunk, "choices": [{"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}]}
    if wish.stream:
        if wish.usage:
            yield {**chunk, "choices": [], "usage": usage([prompt], texts)}
        return
    choices = [
        {
            "index": i,
            "message": reply.message(),
            "logprobs": None if logprobs is None else logprobs_of(served, text.tokens, logprobs),
            "finish_reason": reply.finish(text),
        }
        for i, (reply, text) in enumerate(zip(replies, texts))
    ]
    yield {**head, "object": "chat.completion", "choices": choices, "usage": usage([prompt], texts)}
