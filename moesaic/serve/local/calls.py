"""The tool calls in an answer, read by the grammar of its family's chat template.

Words of the grammar may stand in an argument. One counts as a delimiter only where what follows is again what the
grammar lets stand, up to the end: so what the template wrote is read as it was meant, wherever only one reading of
it is possible. Of several, the one with the shortest values. What the template would not have written, a model may
still write: white space between tags, arguments that no schema describes, words after the block. These are taken if
nothing stricter is possible. Leaves out types: a value stays words or named parts (tools.py).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...families import Markup
from .arguments import SPACE, Value, fits, read_object
from .schema import ANY, Shape

DEPTH = 64  # of elements in each other
STEPS = 50_000  # of one search; a text that needs more is not read
LONGEST_NAME = 256

# A tool's name, and its arguments in order; or as JSON has them.
Call = tuple[str, tuple[tuple[str, Value], ...] | dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """What was read: the calls, and the text behind them. `closed` if their block is."""

    calls: tuple[Call, ...]
    rest: str
    closed: bool


@dataclass(frozen=True)
class Level:
    """What a search lets pass."""

    exact: bool = False  # white space between tags as the template writes it, no name twice, nothing required missing
    described: bool = True  # only arguments that a schema describes, of words that fit it
    tail: str = "none"  # what may follow the block: nothing, "words", or the text may be "cut" off within a call


LEVELS = (
    Level(exact=True), Level(), Level(described=False), Level(tail="words"), Level(described=False, tail="words"),
    Level(tail="cut"), Level(described=False, tail="cut"),
)  # fmt: skip


def read_block(text: str, markup: Markup, tools: Mapping[str, Shape]) -> Block:
    """The calls in `text`, which begins behind the word that opens their block and goes to the answer's end.

    A call that cannot be read whole is not made, nor any after it: they are the rest.
    """
    if markup.json:
        return read_json_block(text, markup)
    for level in LEVELS:
        if (found := Search(text, markup, tools, level).run()) is not None:
            return found
    return Block((), text, False)


Chain = tuple[Any, "Chain"] | None  # the last first: adding to it costs the same however long it is


def listed(chain: Chain) -> tuple[Any, ...]:
    found = []
    while chain is not None:
        last, chain = chain
        found.append(last)
    return tuple(reversed(found))


@dataclass(frozen=True)
class Frame:
    """A call or a value that is open, with the parts read so far."""

    name: str
    shape: Shape
    at: int
    outer: "Frame | None" = None
    depth: int = 0
    parts: Chain = None
    count: int = 0
    names: frozenset[str] = frozenset()

    def having(self, name: str, value: Value) -> "Frame":
        names = self.names if name in self.names else self.names | {name}
        return replace(self, parts=((name, value), self.parts), count=self.count + 1, names=names)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for frames before which the same lies."""
        return (self.at, self.names, self.outer.key if self.outer else None)


@dataclass(frozen=True)
class State:
    """A place between tags."""

    at: int
    frame: Frame | None
    calls: Chain = None


@dataclass
class Search:
    """Depth first, shortest values first. `seen` holds the places from which no way leads to the end."""

    text: str
    markup: Markup
    tools: Mapping[str, Shape]
    level: Level
    steps: int = STEPS
    seen: set[Any] = field(default_factory=set)

    def run(self) -> Block | None:
        start = self.gap(0, 0)
        ways = [self.ways(State(start, None))] if start is not None else []
        while ways and self.steps > 0:
            self.steps -= 1
            state = next(ways[-1], None)
            if state is None:
                ways.pop()
            elif isinstance(state, Block):
                return state
            elif (key := (state.at, state.frame and state.frame.key)) not in self.seen:
                self.seen.add(key)
                ways.append(self.ways(state))
        return None

    def ways(self, state: State) -> Iterator[State | Block]:
        if state.frame is None:
            for name, at in self.opened(state.at, self.markup.call[0], frozenset(self.tools)):
                shape = self.tools.get(name)
                if (shape is not None or not self.level.described) and (inside := self.gap(at, 1)) is not None:
                    yield replace(state, at=inside, frame=Frame(name, shape or ANY, state.at))
            if (block := self.end(state)) is not None:
                yield block
            return
        if (closed := self.closed(state, state.frame)) is not None:
            yield closed
        for name, at in self.opened(state.at, self.markup.value[0], state.frame.shape.names | {"item"}):
            if self.expected(state.frame, name):
                yield from self.value(state, state.frame, name, at)

    def end(self, state: State) -> Block | None:
        """The block is over, or the text is."""
        word = self.markup.block[1]
        if not state.calls:
            return None
        if self.level.tail == "cut":
            rest = self.text[state.at :]
            cut = not rest.strip() or rest.startswith(head(self.markup.call[0]))
            return Block(listed(state.calls), rest, False) if cut else None
        rest = self.text[state.at + len(word) :]
        if not self.text.startswith(word, state.at) or (self.level.tail == "none" and rest.strip()):
            return None
        return Block(listed(state.calls), rest, True)

    def opened(self, at: int, tag: str, known: frozenset[str]) -> Iterator[tuple[str, int]]:
        """Names that an opening tag at `at` may bear, with where it ends."""
        before, after = tag.split("{}")
        if self.text.startswith(before, at):
            start = at + len(before)
            if not after:  # a name up to where it cannot go on
                if found := NAME.match(self.text, start):
                    yield found[0], found.end()
                return
            names = sorted(name for name in known if self.text.startswith(name + after, start))
            end = self.text.find(after, start, start + LONGEST_NAME)
            if end > start and (name := self.text[start:end])[0] != "/" and "\n" not in name and "<" not in name:
                names += [name] if name not in names else []
            yield from ((name, start + len(name) + len(after)) for name in names)
        elif not self.level.exact and (found := loose(tag).match(self.text, at)):
            yield found[1], found.end()

    def expected(self, frame: Frame, name: str) -> bool:
        """Whether an argument or member may bear that name here."""
        items = self.markup.nested and frame.outer is not None and "array" in frame.shape.kinds
        if frame.depth >= DEPTH or (
            name in frame.names and not (items and name == "item") and (self.level.exact or not self.markup.nested)
        ):
            return False
        return not self.level.described or items or frame.shape.describes(name)

    def value(self, state: State, frame: Frame, name: str, at: int) -> Iterator[State]:
        """What may lie in the value that is opened up to `at`: elements, or words up to any place that may close it."""
        one_of_many = name == "item" and "array" in frame.shape.kinds
        shape = frame.shape.item(frame.count) if one_of_many else frame.shape.member(name)
        if self.markup.nested and shape.kinds & {"array", "object"} and (inside := self.gap(at, 2)) is not None:
            yield replace(state, at=inside, frame=Frame(name, shape, at, frame, frame.depth + 1))
        closing = self.markup.value[1].format(name)
        free = "string" in shape.kinds and (not self.markup.nested or len(shape.kinds) < 7)
        end = self.text.find(closing, at)
        while end >= 0 and self.steps > 0:
            self.steps -= 1
            if not free and self.markup.mark and self.text.find(self.markup.mark, at, end) >= 0:
                return
            after = self.gap(end + len(closing), 2)
            if after is not None and self.goes_on(after, frame):
                self.steps -= (end - at) // 1000 + len(frame.names) // 20  # what the next lines cost
                words = self.text[at:end]
                if not self.level.described or fits(words, shape, self.markup):
                    yield replace(state, at=after, frame=frame.having(name, words))
            end = self.text.find(closing, end + 1)

    def closing(self, frame: Frame) -> str:
        return self.markup.call[1] if frame.outer is None else self.markup.value[1].format(frame.name)

    def goes_on(self, at: int, frame: Frame) -> bool:
        return self.text.startswith((self.closing(frame), head(self.markup.value[0])), at)

    def closed(self, state: State, frame: Frame) -> State | None:
        """The state behind the end of the frame, if that stands here."""
        word = self.closing(frame)
        if not self.text.startswith(word, state.at) or (self.level.exact and frame.shape.lacks(frame.names)):
            return None
        self.steps -= frame.count // 50
        if frame.outer is None:
            after = self.gap(state.at + len(word), 3)
            return after if after is None else State(after, None, ((frame.name, listed(frame.parts)), state.calls))
        after = self.gap(state.at + len(word), 2)
        if after is None or not frame.parts or not self.goes_on(after, frame.outer):
            return None
        return replace(state, at=after, frame=frame.outer.having(frame.name, listed(frame.parts)))

    def gap(self, at: int, which: int) -> int | None:
        """Where the next tag begins."""
        if self.level.exact:
            gap = self.markup.gaps[which]
            over = at == len(self.text) and not self.markup.block[1]  # nothing follows the last call
            return at if over else at + len(gap) if self.text.startswith(gap, at) else None
        return SPACE.match(self.text, at).end()  # type: ignore[union-attr]


NAME = re.compile(rf"[^\s<]{{1,{LONGEST_NAME}}}")


def head(tag: str) -> str:
    """What an opening tag begins with, whichever its name and its quotes."""
    return tag.split("{}")[0].rstrip('"')


def loose(tag: str) -> re.Pattern[str]:
    """The tag with other quotes, or none."""
    before, after = (re.escape(part).replace('"', "[\"']?") for part in tag.split("{}"))
    return re.compile(f"{before}([^\"'<>/\\n][^\"'<>\\n]{{0,{LONGEST_NAME}}}?){after}")


def read_json_block(text: str, markup: Markup) -> Block:
    """`read_block` where a call holds one JSON object, which says itself where it ends."""
    calls, at, (before, after) = list[Call](), 0, (*markup.call[0].split("{}"), "")[:2]
    named = "{}" in markup.call[0]
    while text.startswith(before.rstrip(), start := SPACE.match(text, at).end()):  # type: ignore[union-attr]
        start += len(before.rstrip())
        end = text.find(after, start, start + LONGEST_NAME + len(after)) if named else start
        found = read_object(text, end + len(after)) if end >= 0 else None
        if found is None:
            break
        members, stop = found
        name, arguments = (text[start:end], members) if named else (members.get("name"), members.get("arguments", {}))
        stop = SPACE.match(text, stop).end()  # type: ignore[union-attr]
        closing = markup.call[1].lstrip()
        if not isinstance(name, str) or not isinstance(arguments, dict) or not text.startswith(closing, stop):
            break
        calls.append((name.rpartition(":")[0] if markup.numbered and ":" in name else name, arguments))
        at = stop + len(closing)
    end = SPACE.match(text, at).end()  # type: ignore[union-attr]
    closed = bool(calls) and text.startswith(markup.block[1], end)
    return Block(tuple(calls), text[end + len(markup.block[1]) :] if closed and markup.block[1] else text[at:], closed)
