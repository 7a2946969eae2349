"""Tools that a request offers, and the calls of an answer as OpenAI's objects.

Leaves out forcing a call: that takes a grammar at every token.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ...families import Markup
from .arguments import Value, gathered, typed
from .calls import Call
from .schema import ANY, Shape


def shapes_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Shape]:
    """What each tool's arguments may be, by its name."""
    return {tool["function"]["name"]: Shape.of(tool["function"].get("parameters")) for tool in tools}


def call_objects(calls: Sequence[Call], tools: Mapping[str, Shape], markup: Markup, first: int) -> list[dict[str, Any]]:
    """The calls with ids of their own, counted from `first` on."""
    return [
        {
            "index": first + i,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": written(arguments, tools.get(name, ANY), markup)},
        }
        for i, (name, arguments) in enumerate(calls)
    ]


def written(arguments: Sequence[tuple[str, Value]] | dict[str, Any], shape: Shape, markup: Markup) -> str:
    """One JSON object, with its characters as they are but for lone surrogates, which no encoding has."""
    if isinstance(arguments, dict):
        return as_json(arguments)
    found = typed(tuple(arguments), shape, markup) if arguments else {}
    if not isinstance(found, dict):
        found = {name: typed(value, shape.member(name), markup) for name, value in gathered(arguments)}
    return as_json(found)


def as_json(found: dict[str, Any]) -> str:
    text = json.dumps(found, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(found)
    return text
