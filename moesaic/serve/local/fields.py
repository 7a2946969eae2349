"""Fields of a request's JSON, each of the type and within the range that it must have. Unknown ones are ignored."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import InputError


@dataclass(frozen=True)
class Fields:
    """One JSON object. null counts as absent. Every getter raises `InputError` that names the field."""

    body: Mapping[str, Any]

    @staticmethod
    def read(raw: bytes) -> "Fields":
        try:
            body = json.loads(raw, parse_constant=no_number)
            json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate is no text
        except (ValueError, RecursionError) as error:
            raise InputError(f"the body is not valid JSON ({error}); send one object") from error
        if not isinstance(body, dict):
            raise InputError(f"the body is a JSON {type(body).__name__}; wanted one object")
        return Fields(body)

    def get(self, name: str, kind: type | tuple[type, ...], wanted: str, default: Any = None) -> Any:
        found = self.body.get(name)
        if found is None:
            return default
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise InputError(f"{name} is {shown(found)}, wanted {wanted}")
        return found

    def flag(self, name: str) -> bool:
        return bool(self.get(name, bool, "true or false", False))

    def number(self, name: str, default: float) -> float:
        found = self.get(name, (int, float), "a number", default)
        if (isinstance(found, int) and abs(found) > 2**63) or not math.isfinite(found):
            raise InputError(f"{name} is {shown(found)}, wanted a number that a server can use")
        return float(found)

    def count(self, name: str, default: Any, least: int, most: int) -> Any:
        """A whole number from `least` to `most`; `default` may be None."""
        found = self.get(name, int, "a whole number", default)
        if found is not None and not least <= found <= most:
            raise InputError(f"{name} is {shown(found)}, wanted {least:,} to {most:,}")
        return found

    def text(self, name: str, default: str | None = None) -> str | None:
        found: str | None = self.get(name, str, "a text", default)
        return found

    def items(self, name: str, kind: type, wanted: str) -> list[Any]:
        """A list of one kind, empty when absent."""
        found = self.get(name, list, f"a list of {wanted}", [])
        if wrong := [item for item in found if not isinstance(item, kind) or (isinstance(item, bool) and kind is int)]:
            raise InputError(f"{name} holds {shown(wrong[0])}, wanted a list of {wanted}")
        return list(found)

    def inner(self, name: str) -> "Fields":
        return Fields(self.get(name, dict, "an object", {}))

    def refuse(self, name: str, *harmless: Any) -> None:
        """A field that would change the answer and that nothing here can follow."""
        if self.body.get(name) is not None and self.body[name] not in harmless:
            raise InputError(f"{name} is {shown(self.body[name])}, which this server cannot follow; leave it out")


def no_number(word: str) -> None:
    raise ValueError(f"{word} is not valid JSON")


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)[:80]
