"""Tokens to text as they come, up to a word that stops it; and the parts of an answer: thought, content, tool calls.

A character may be spread over tokens and a word over pieces, so both hold back what may yet become
something else. What has been let out never changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import tokenizers

from ...families import Talk

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what the tokenizer makes of bytes that are no whole character


@dataclass
class Detokenizer:
    """Text of one sequence of tokens. The pieces of `push` and `rest` join to the text of all tokens together."""

    tokenizer: tokenizers.Tokenizer
    ids: list[int] = field(default_factory=list)
    before: int = 0  # tokens ahead of this one change nothing any more
    shown: int = 0  # tokens whose text is out

    def push(self, ids: Sequence[int]) -> str:
        """What `ids` add, but for a character that they leave unfinished."""
        pieces = []
        for id in ids:
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
        return self.tokenizer.decode(self.ids[self.before : end], skip_special_tokens=True)


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


Part = tuple[str, str]  # "reasoning" or "content" with a piece of it, or "calls" with a whole block of them


@dataclass
class Answer:
    """A chat answer taken apart by the words of its family.

    `inside` is the part that it begins in: "reasoning" where the prompt has opened it. Without `tools` what
    looks like a call is content.
    """

    talk: Talk
    inside: str
    tools: bool
    held: str = ""

    def push(self, text: str) -> Iterator[Part]:
        self.held += text
        while True:
            words = self.words()
            at, word = min(((at, w) for w in words if (at := self.held.find(w)) >= 0), default=(-1, ""))
            if at < 0:
                break
            before, self.held = self.held[:at], self.held[at + len(word) :]
            yield from self.part(before)
            self.inside = words[word]
        if self.inside != "calls":
            keep = unfinished(self.held, list(self.words()))
            piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
            yield from self.part(piece)

    def rest(self) -> Iterator[Part]:
        piece, self.held = self.held, ""
        yield from self.part(piece)

    def part(self, text: str) -> Iterator[Part]:
        if text:
            yield self.inside, text

    def words(self) -> dict[str, str]:
        """The words that matter here, with the part that begins after each."""
        (think, thought), (call, called) = self.talk.think, self.talk.calls
        if self.inside == "calls":
            return {called: "content"}
        found = {thought: "content"} if self.inside == "reasoning" else {think: "reasoning", thought: "content"}
        return found | ({call: "calls"} if self.tools else {})
