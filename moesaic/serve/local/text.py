"""Tokens to text as they come, up to a word that stops it; and the parts of an answer: thought, content, tool calls.

A character may be spread over tokens and a word over pieces, so both hold back what may yet become
something else. What has been let out never changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from ...families import Talk
from .calls import head, read_block
from .schema import Shape

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what the tokenizer makes of bytes that are no whole character


def hidden_words(tokenizer: tokenizers.Tokenizer, talk: Talk) -> frozenset[int]:
    """Special tokens that are not shown: all but those that an answer is taken apart by."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(id for id, token in added.items() if token.special and token.content not in talk.words)


@dataclass
class Detokenizer:
    """Text of one sequence of tokens. The pieces of `push` and `rest` join to the text of all tokens together."""

    tokenizer: tokenizers.Tokenizer
    hidden: frozenset[int] = frozenset()  # ids that are passed over
    ids: list[int] = field(default_factory=list)
    before: int = 0  # tokens ahead of this one change nothing any more
    shown: int = 0  # tokens whose text is out

    def push(self, ids: Sequence[int]) -> str:
        """What `ids` add, but for a character that they leave unfinished."""
        pieces = []
        for id in (id for id in ids if id not in self.hidden):
            self.ids.append(id)
            text = self.decode(len(self.ids))
            if not text.endswith(BROKEN):
                pieces.append(self.advance(text))
        return "".join(pieces)

    def rest(self) -> str:
        """What was held back, when nothing more will come."""
        return self.advance(self.decode(len(self.ids)))

    def advance(self, text: str) -> str:
        new = text[len(self.decode(self.shown)) :]
        self.before, self.shown = self.shown, len(self.ids)
        return new

    def decode(self, end: int) -> str:
        return self.tokenizer.decode(self.ids[self.before : end], skip_special_tokens=False)


@dataclass
class Stopper:
    """Text up to the first of `words`, which is left out."""

    words: Sequence[str]
    held: str = ""
    stopped: bool = False

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        self.held += text
        if hits := [at for word in self.words if (at := self.held.find(word)) >= 0]:
            out, self.held, self.stopped = self.held[: min(hits)], "", True
            return out
        keep = unfinished(self.held, self.words)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def rest(self) -> str:
        out, self.held = self.held, ""
        return out


def unfinished(text: str, words: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `words` begins, not being all of it."""
    longest = max(map(len, words), default=1) - 1
    ends = (n for n in range(min(longest, len(text)), 0, -1) if any(word.startswith(text[-n:]) for word in words))
    return next(ends, 0)


Part = tuple[str, Any]  # "reasoning" or "content" with a piece of it, or "calls" with the calls of a block


@dataclass
class Answer:
    """A chat answer taken apart by the words of its family.

    `inside` is the part that it begins in: "reasoning" where the prompt has opened it. Without `tools` what
    looks like a call is content. A block of calls is read when the answer is over, because only then can it be
    told whether a word of its grammar stood in an argument; one within reasoning that is closed later is reasoning.
    """

    talk: Talk
    inside: str
    tools: Mapping[str, Shape]
    held: str = ""
    block: bool = False  # whether `held` begins with a block, of which the rest is to come

    def push(self, text: str) -> Iterator[Part]:
        self.held += text
        while not (self.block and self.inside == "content"):
            words = self.words()
            begun, sure = self.begun()
            at, word = min(((at, w) for w in words if (at := self.held.find(w)) >= 0), default=(-1, ""))
            if at >= 0 and (self.inside == "reasoning" or not 0 <= begun < at):
                before, self.held = self.held[:at], self.held[at + len(word) :]
                self.inside, inside, self.block = words[word], self.inside, False
                yield from part(inside, before)
                continue
            keep = (
                len(self.held) - begun
                if begun >= 0
                else unfinished(self.held, [*words, *([self.opening] if self.tools else [])])
            )
            piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
            self.block = sure
            yield from part(self.inside, piece)
            break

    def rest(self) -> Iterator[Part]:
        while self.block:
            whole, self.held, self.block = self.held, "", False
            found = read_block(whole.removeprefix(self.talk.calls.block[0]), self.talk.calls, self.tools)
            if not found.calls:
                yield from part(self.inside, whole)
                return
            self.inside = "content"
            yield "calls", found.calls
            if not found.closed:
                yield from part("content", found.rest)
                return
            yield from self.push(found.rest)
        piece, self.held = self.held, ""
        yield from part(self.inside, piece)

    @property
    def opening(self) -> str:
        """The word that a block begins with, or without one a call."""
        return self.talk.calls.block[0] or head(self.talk.calls.call[0])

    def begun(self) -> tuple[int, bool]:
        """Where in `held` a block begins or may begin, -1 for nowhere, and whether it does: a call has to follow."""
        if self.block:
            return 0, True
        markup, word, at = self.talk.calls, self.opening, -1
        call = head(markup.call[0]) if markup.block[0] else "{" if markup.json and "{}" not in markup.call[0] else ""
        while self.tools and (at := self.held.find(word, at + 1)) >= 0:
            after = self.held[at + len(word) :].lstrip()
            if after.startswith(call) or call.startswith(after):
                return at, after.startswith(call)
        return -1, False

    def words(self) -> dict[str, str]:
        """The words around reasoning that matter here, with the part that begins after each."""
        think, thought = self.talk.think
        found = {thought: "content"} if self.inside == "reasoning" else {think: "reasoning", thought: "content"}
        return found if think else {}


def part(inside: str, text: str) -> Iterator[Part]:
    if text:
        yield inside, text
