"""What the words of an argument mean: the JSON value that its schema allows and its family's template writes so.

Of several that are possible a string comes last, so `3` is a number wherever a number may be. Words that mean
nothing that the schema allows stay words.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...families import Markup
from .schema import KINDS, Alternative, Shape

Value = str | tuple[tuple[str, Any], ...]  # words, or named values in it
Found = tuple[Any]  # a value that was found, which may be None
STEPS = 20_000  # of one argument; a schema whose unions need more is followed loosely


def fits(words: str, shape: Shape, markup: Markup) -> bool:
    """Whether the words are a value that the schema allows."""
    return read_words(words, shape.alternatives, markup) is not None


def typed(value: Value, shape: Shape, markup: Markup) -> Any:
    """`value` as JSON of a kind that `shape` allows; where none holds all of it, each of its parts for itself."""
    found = Reading(markup, STEPS).read(value, shape)
    return found[0] if found is not None else loosely(value, shape, markup)


@dataclass
class Reading:
    """Tries the alternatives of every part in turn."""

    markup: Markup
    steps: int

    def read(self, value: Value, shape: Shape) -> Found | None:
        self.steps -= 1
        if self.steps < 0:
            return None
        if isinstance(value, str):
            return read_words(value, shape.alternatives, self.markup)
        ways = (self.parts(value, shape, one) for one in shape.alternatives)
        return next((found for found in ways if found is not None), None)

    def parts(self, value: Sequence[tuple[str, Value]], shape: Shape, one: Alternative) -> Found | None:
        if is_list(value, one.kinds):
            items = [self.read(part, shape.narrowed(one).item(i)) for i, (_, part) in enumerate(value)]
            return checked([found[0] for found in items if found], one) if all(items) else None
        if "object" not in one.kinds or not one.required <= {name for name, _ in value}:
            return None
        members: dict[str, Any] = {}
        for name, part in gathered(value):
            found = None if one.forbids(name) else self.read(part, shape.narrowed(one).member(name))
            if found is None:
                return None
            members[name] = found[0]
        return checked(members, one)


def loosely(value: Value, shape: Shape, markup: Markup) -> Any:
    """`value` part by part, whether or not the whole is allowed."""
    if isinstance(value, str):
        found = read_words(value, shape.alternatives, markup)
        return value if found is None else found[0]
    if is_list(value, shape.kinds) or (is_list(value, KINDS) and "object" not in shape.kinds):
        return [loosely(part, shape.item(i), markup) for i, (_, part) in enumerate(value)]
    return {name: loosely(part, shape.member(name), markup) for name, part in gathered(value)}


def is_list(value: Sequence[tuple[str, Value]], kinds: frozenset[str]) -> bool:
    """Whether elements are a list's rather than an object's."""
    if "array" not in kinds or "object" not in kinds:
        return "array" in kinds
    return all(name == "item" for name, _ in value)


def gathered(value: Sequence[tuple[str, Value]]) -> list[tuple[str, Value]]:
    """Each name once; what bears one together is a list."""
    found: dict[str, list[Value]] = {}
    for name, part in value:
        found.setdefault(name, []).append(part)
    return [(name, p[0] if len(p) == 1 else tuple(("item", one) for one in p)) for name, p in found.items()]


def checked(value: Any, one: Alternative) -> Found | None:
    return (value,) if one.allows(value) else None


def read_words(text: str, alternatives: Sequence[Alternative], markup: Markup) -> Found | None:
    """The value that `text` is, of the first kind that reads it and that an alternative allows."""
    kinds = {kind for one in alternatives for kind in one.kinds}
    exact = "string" in kinds  # then white space, or another way to write a number, is a string's
    if markup.nested and not text:
        empty: tuple[Any, ...] = ("", [], {}, None)
        names = ("string", "array", "object", "null")
        ways = ((v, kind) for v, kind in zip(empty, names) if kind in kinds)
        for value, kind in ways:
            if any(
                kind in one.kinds and one.allows(value) and (value != {} or not one.required) for one in alternatives
            ):
                return (value,)
        return None
    readers = [(kind, reader) for kind, reader in READERS.items() if kind in kinds]
    for kind, reader in readers:
        if markup.nested and exact and kind in ("null", "object", "array"):
            continue  # the template leaves nulls out and writes these as elements
        found = reader(text if exact else text.strip(), exact)
        if found is not None and any(kind in one.kinds and one.allows(found[0]) for one in alternatives):
            return found
    return (text,) if any("string" in one.kinds and one.allows(text) for one in alternatives) else None


def read_json(text: str, wanted: type) -> Found | None:
    try:
        found = json.loads(text, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError):
        return None
    return (found,) if isinstance(found, wanted) else None


SPACE = re.compile(r"\s*")


def read_object(text: str, at: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that begins at `at` after white space, and where it ends; None where there is no whole one."""
    decoder = json.JSONDecoder(parse_constant=refuse, parse_float=finite)
    try:
        found, end = decoder.raw_decode(text, SPACE.match(text, at).end())  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return None
    return (found, end) if isinstance(found, dict) else None


def refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def finite(word: str) -> float:
    if not math.isfinite(found := float(word)):
        raise ValueError(f"{word} is too large")
    return found


INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,999})"), re.compile(r"[+-]?[0-9]{1,999}")  # as JSON has it, and as people do
NUMBER = (
    re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"),
    re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"),
)


def read_integer(text: str, exact: bool) -> Found | None:
    return (int(text),) if INTEGER[not exact].fullmatch(text) else None


def read_number(text: str, exact: bool) -> Found | None:
    if (whole := read_integer(text, exact)) is not None:
        return whole
    if not NUMBER[not exact].fullmatch(text) or not math.isfinite(found := float(text)):
        return None
    return (found,)


def read_word(text: str, exact: bool, meanings: dict[str, Any]) -> Found | None:
    text = text if exact else text.lower()
    return (meanings[text],) if text in meanings else None


READERS: dict[str, Callable[[str, bool], Found | None]] = {
    "null": lambda text, exact: read_word(text, exact, {"null": None}),
    "integer": read_integer,
    "number": read_number,
    "boolean": lambda text, exact: read_word(text, exact, {"true": True, "false": False}),
    "object": lambda text, exact: read_json(text, dict),
    "array": lambda text, exact: read_json(text, list),
}  # in the order in which they are tried; a string comes after all of them
