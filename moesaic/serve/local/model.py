"""What every endpoint shares: the model with its tokenizer and defaults, the limits, the engine and the meters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checkpoint import Checkpoint, read_object
from ...data.conversations import Conversation
from ...data.tokenizer import Tokenizer
from ...errors import InputError
from ...families import Talk
from ...generate import end_tokens
from .engine import Engine
from .metrics import Metrics
from .text import hidden_words

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
    talk: Talk
    hidden: frozenset[int]  # tokens that are not shown

    @staticmethod
    def of(checkpoint: Checkpoint, limits: Limits, engine: Engine) -> "Served":
        path = checkpoint.path / "generation_config.json"
        defaults = read_object(path) if path.exists() else {}
        tokenizer = Tokenizer.open(checkpoint.path)
        name, talk = checkpoint.path.resolve().name, checkpoint.family.talk(tokenizer.template)
        return Served(
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            name=name,
            defaults=defaults,
            ends=end_tokens(checkpoint),
            limits=limits,
            engine=engine,
            metrics=Metrics.of(engine),
            talk=talk,
            hidden=hidden_words(tokenizer.inner, talk),
        )

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
        if not self.tokenizer.chat.chat_template:
            raise InputError(f"{self.name} has no chat template; ask /v1/completions, or add chat_template.jinja")
        options = {"add_generation_prompt": True, **options}
        return self.tokenizer.renderer.render(Conversation.of(list(messages), list(tools)), **options)

    def thinks(self, prompt: str) -> bool:
        """Whether a rendered prompt has begun the model's reasoning already."""
        word = self.talk.think[0]
        return bool(word) and prompt.rstrip().endswith(word)
