"""Tool calls of an answer as OpenAI's objects: arguments become JSON, as the tool's own schema has their types.

Leaves out forcing a call: that takes a grammar at every token.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ...families import Call, Value

KINDS = ("null", "integer", "number", "boolean", "object", "array")  # tried in this order before a string
DEPTH = 32  # of a schema


def call_objects(calls: Sequence[Call], tools: Sequence[Mapping[str, Any]], first: int) -> list[dict[str, Any]]:
    """The calls with ids of their own, counted from `first` on."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    return [
        {
            "index": first + i,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": json.dumps(typed(list(arguments), schemas.get(name), "object"), ensure_ascii=False),
            },
        }
        for i, (name, arguments) in enumerate(calls)
    ]


def typed(value: Value, schema: Any, otherwise: str = "string") -> Any:
    """`value` as JSON of the kind that `schema` allows, or as the words that were written."""
    schema = schema if isinstance(schema, Mapping) else {}
    kinds = kinds_of(schema) or {otherwise}
    if isinstance(value, str):
        return from_words(value, kinds)
    if "array" in kinds and "object" not in kinds:
        return [typed(part, schema.get("items")) for _, part in value]
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    found: dict[str, Any] = {}
    for name, part in value:
        found[name] = typed(part, properties.get(name))
    return found


def kinds_of(schema: Mapping[str, Any], depth: int = 0) -> set[str]:
    """Every type that a schema names, in alternatives and in an enumeration's values too."""
    stated = schema.get("type")
    found = {kind for kind in (stated if isinstance(stated, list) else [stated]) if isinstance(kind, str)}
    if isinstance(schema.get("enum"), list):
        names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
        found |= {names[type(v)] for v in schema["enum"] if type(v) in names}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list) and depth < DEPTH:
            for choice in schema[key]:
                found |= kinds_of(choice, depth + 1) if isinstance(choice, Mapping) else set()
    return found


def from_words(text: str, kinds: set[str]) -> Any:
    for kind in KINDS:
        if kind in kinds and (found := READERS[kind](text.strip())) is not None:
            return found[0]
    return text


def read_json(text: str, wanted: type) -> tuple[Any] | None:
    try:
        found = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return (found,) if isinstance(found, wanted) else None


def read_integer(text: str) -> tuple[int] | None:
    return (int(text),) if text.lstrip("+-").isdecimal() and len(text) < 1000 else None


def read_number(text: str) -> tuple[float] | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return (int(found) if found.is_integer() else found,) if math.isfinite(found) else None


READERS = {
    "null": lambda text: (None,) if text.lower() == "null" else None,
    "integer": read_integer,
    "number": read_number,
    "boolean": lambda text: {"true": (True,), "false": (False,)}.get(text.lower()),
    "object": lambda text: read_json(text, dict),
    "array": lambda text: read_json(text, list),
}  # each gives the value in a tuple, or None where the words are none of the kind
