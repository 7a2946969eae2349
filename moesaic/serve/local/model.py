"""What every endpoint shares: the model with its tokenizer and defaults, the limits, the engine and the meters."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ...checkpoint import Checkpoint, read_object
from ...errors import InputError
from ...generate import end_tokens
from ...tokenizer import Tokenizer
from .engine import Engine
from .metrics import Metrics

RESERVED = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "tokenize",
    "return_dict",
    "return_tensors",
    "padding",
)


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    context: int  # tokens, prompt and answer together
    new_tokens: int  # of an answer; one that names no number may have so many
    body_bytes: int = 16 << 20


@dataclass(frozen=True)
class Served:
    """One model behind a server."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    name: str
    defaults: Mapping[str, Any]  # of generation_config.json
    ends: tuple[tuple[int, ...], ...]
    limits: Limits
    engine: Engine
    metrics: Metrics

    @staticmethod
    def of(checkpoint: Checkpoint, limits: Limits, engine: Engine) -> "Served":
        path = checkpoint.path / "generation_config.json"
        defaults = read_object(path) if path.exists() else {}
        tokenizer = Tokenizer.open(checkpoint.path)
        name = checkpoint.path.resolve().name
        return Served(checkpoint, tokenizer, name, defaults, end_tokens(checkpoint), limits, engine, Metrics.of(engine))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with what the tokenizer itself adds to a text where `special` asks for it."""
        ids: list[int] = self.tokenizer.inner.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self.tokenizer.inner.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def word(self, id: int) -> str:
        """A token by itself."""
        return self.decode([id], skip_special=False)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> str:
        """A conversation as the model's own template writes it, up to where its answer begins.

        Raises `InputError` for a model without a template, and with what the template says against the messages.
        """
        if wrong := [name for name in options if name in RESERVED]:
            raise InputError(f"chat_template_kwargs has {wrong[0]}, which is not the template's; leave it out")
        chat = self.tokenizer.chat
        if not chat.chat_template:
            raise InputError(f"{self.name} has no chat template; ask /v1/completions, or add chat_template.jinja")
        options = {"add_generation_prompt": True, **options}
        try:
            text = chat.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False, **options)
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
        ) as error:  # all that a template can do
            raise InputError(f"the chat template does not take these messages: {error}") from error
        return str(text)

    def thinks(self, prompt: str) -> bool:
        """Whether a rendered prompt has begun the model's reasoning already."""
        return prompt.rstrip().endswith(self.checkpoint.family.talk.think[0])


def normal(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: text in one piece, arguments as objects, reasoning under both of its names."""
    found = dict(message)
    if isinstance(found.get("content"), list):
        found["content"] = "".join(map(text_of, found["content"]))
    calls = found.get("tool_calls")
    if isinstance(calls, list):
        found["tool_calls"] = [with_arguments(call) for call in calls]
    elif "tool_calls" in found:
        del found["tool_calls"]
    for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if isinstance(found.get(name), str):
            found.setdefault(other, found[name])
    return found


def text_of(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise InputError(f"a message holds a part {str(kind)[:40]!r}; this server reads text alone")
    return str(part["text"])


def with_arguments(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError("a message has a tool call without a function's name; send it as it was received")
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the arguments of {function['name'][:80]!r} are no JSON ({error}); send one object"
        ) from error
    if not isinstance(arguments, Mapping):
        raise InputError(f"the arguments of {function['name'][:80]!r} are no object; send one")
    return {**call, "function": {**function, "arguments": dict(arguments)}}
