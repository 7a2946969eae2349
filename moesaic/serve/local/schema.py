"""What a JSON Schema allows a value to be: its kinds, its members, its items, through references and alternatives.

Enough to tell apart what a tool call's words may mean. Leaves out checking a value whole (lengths, patterns, formats,
conditions), so that no schema costs more than the steps stated here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

KINDS = frozenset(("null", "integer", "number", "boolean", "object", "array", "string"))
MOST = 256  # alternatives of one value
STEPS = 5000  # to find them
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
HINTS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # what a schema that names no type says of one, by its words


@dataclass(frozen=True, eq=False)
class Node:
    """One schema object, and where its references lead."""

    contents: Mapping[str, Any]
    resolver: Any

    def inner(self, contents: Any) -> tuple["Node", ...]:
        """A schema within this one; none where it says nothing."""
        if not isinstance(contents, Mapping):
            return ()
        if isinstance(contents.get("$id"), str):
            return (Node(contents, self.resolver.in_subresource(DRAFT202012.create_resource(contents))),)
        return (Node(contents, self.resolver),)

    def nodes(self, key: str) -> list[tuple["Node", ...]]:
        """The schemas of a list under `key`."""
        found = self.contents.get(key)
        return [self.inner(one) for one in found] if isinstance(found, list) else []

    def part(self, key: str) -> Mapping[str, Any]:
        found = self.contents.get(key)
        return found if isinstance(found, Mapping) else {}

    def referred(self) -> tuple["Node", ...]:
        """What its references name; one that leads nowhere says nothing."""
        found: tuple[Node, ...] = ()
        for reference in (self.contents.get(key) for key in REFERENCES):
            if isinstance(reference, str):
                try:
                    there = self.resolver.lookup(reference)
                except (Unresolvable, ValueError, TypeError, AttributeError, LookupError, RecursionError):
                    continue
                if isinstance(there.contents, Mapping):
                    found += (Node(there.contents, there.resolver),)
        return found


@dataclass(frozen=True, eq=False)
class Alternative:
    """Schemas that all hold. With none of them, anything does."""

    nodes: tuple[Node, ...]

    @cached_property
    def kinds(self) -> frozenset[str]:
        kinds = KINDS
        for node in self.nodes:
            stated = node.contents.get("type")
            named = (
                frozenset(k for k in (stated if isinstance(stated, list) else [stated]) if isinstance(k, str)) & KINDS
            )
            if named and node.contents.get("nullable") is True:
                named |= {"null"}
            kinds = kinds & (named | {"integer"} if "number" in named else named) if named else kinds
        if self.values is not None:
            kinds &= frozenset(kind_of(value) for value in self.values)
        return kinds if kinds != KINDS else self.hinted or KINDS

    @cached_property
    def hinted(self) -> frozenset[str]:
        found = {kind for kind, words in HINTS.items() for node in self.nodes if any(w in node.contents for w in words)}
        return frozenset(found | ({"integer"} if "number" in found else set()))

    @cached_property
    def values(self) -> list[Any] | None:
        """The only ones, where the schemas list them."""
        found: list[Any] | None = None
        for node in self.nodes:
            listed = [node.contents["const"]] if "const" in node.contents else node.contents.get("enum")
            if isinstance(listed, list):
                found = listed if found is None else [v for v in found if any(same(v, other) for other in listed)]
        return found

    def allows(self, value: Any) -> bool:
        return self.values is None or any(same(value, other) for other in self.values)

    @cached_property
    def required(self) -> frozenset[str]:
        """Members that cannot be missing. One that may be null can: some templates leave nulls out."""
        lists = [node.contents.get("required") for node in self.nodes]
        names = {name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)}
        return frozenset(name for name in names if "null" not in Shape((self.member(name),)).kinds)

    @cached_property
    def names(self) -> frozenset[str]:
        """Members that the schemas describe."""
        return frozenset(name for node in self.nodes for name in node.part("properties"))

    def describes(self, name: str) -> bool:
        """Whether a member of that name is one to expect."""
        free = any(node.part("patternProperties") or node.part("additionalProperties") for node in self.nodes)
        return free or not self.names or name in self.names

    def forbids(self, name: str) -> bool:
        closed = any(
            node.contents.get(key) is False
            for node in self.nodes
            for key in ("additionalProperties", "unevaluatedProperties")
        )
        return closed and name not in self.names and not any(node.part("patternProperties") for node in self.nodes)

    def member(self, name: str) -> tuple[Node, ...]:
        found: tuple[Node, ...] = ()
        for node in self.nodes:
            properties = node.part("properties")
            found += node.inner(properties[name] if name in properties else node.contents.get("additionalProperties"))
        return found

    @cached_property
    def places(self) -> int:
        """Items of a list that have schemas of their own."""
        return max((len(node.nodes("prefixItems") or node.nodes("items")) for node in self.nodes), default=0)

    def item(self, index: int) -> tuple[Node, ...]:
        found: tuple[Node, ...] = ()
        for node in self.nodes:
            places = node.nodes("prefixItems") or node.nodes("items")
            found += places[index] if index < len(places) else node.inner(node.contents.get("items"))
        return found


@dataclass(frozen=True, eq=False)
class Shape:
    """What a value may be: any of these, in each of which all schemas hold."""

    choices: tuple[tuple[Node, ...], ...]

    @staticmethod
    def of(schema: Any) -> "Shape":
        """Of a whole schema; anything where there is none."""
        if not isinstance(schema, Mapping):
            return ANY
        registry: Registry[Any] = Registry().with_resource("", DRAFT202012.create_resource(schema))
        return Shape(((Node(schema, registry.resolver("")),),))

    @cached_property
    def alternatives(self) -> tuple[Alternative, ...]:
        """In the order of the schema, at most `MOST`; what takes more than `STEPS` to find is left out."""
        found: dict[frozenset[int], Alternative] = {}
        left = [STEPS]
        for choice in self.choices:
            for nodes in expanded(choice, left):
                found.setdefault(frozenset(id(node.contents) for node in nodes), Alternative(nodes))
                if len(found) >= MOST:
                    break
        return tuple(found.values()) or (Alternative(()),)

    @cached_property
    def kinds(self) -> frozenset[str]:
        return frozenset(kind for one in self.alternatives for kind in one.kinds)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for one in self.alternatives for name in one.names)

    def of_kind(self, kind: str) -> list[Alternative]:
        return [one for one in self.alternatives if kind in one.kinds] or list(self.alternatives)

    def describes(self, name: str) -> bool:
        return any(one.describes(name) and not one.forbids(name) for one in self.of_kind("object"))

    def lacks(self, names: frozenset[str]) -> bool:
        """Whether a member is missing in whichever way the value is taken."""
        return not any(one.required <= names for one in self.of_kind("object"))

    def member(self, name: str) -> "Shape":
        if name not in self.made:
            self.made[name] = Shape(tuple(one.member(name) for one in self.of_kind("object")))
        return self.made[name]

    def item(self, index: int) -> "Shape":
        index = min(index, max(one.places for one in self.alternatives))  # beyond those listed all are alike
        if index not in self.made:
            self.made[index] = Shape(tuple(one.item(index) for one in self.of_kind("array")))
        return self.made[index]

    def narrowed(self, one: Alternative) -> "Shape":
        """The value taken in one way."""
        if one not in self.made:
            self.made[one] = Shape((one.nodes,)) if len(self.alternatives) > 1 else self
            vars(self.made[one])["alternatives"] = (one,)
        return self.made[one]

    @cached_property
    def made(self) -> "dict[Any, Shape]":
        """Shapes within this one that were asked for."""
        return {}


ANY = Shape(((),))
Step = Node | Sequence[tuple[Node, ...]]  # a schema that holds, or several of which one does


def expanded(nodes: tuple[Node, ...], left: list[int]) -> "list[tuple[Node, ...]]":
    """Every way in which all of `nodes` may hold, one branch of each union taken. Counts its steps off `left`."""
    found: list[tuple[Node, ...]] = []
    stack: list[tuple[tuple[Node, ...], tuple[Step, ...]]] = [((), nodes)]
    while stack and len(found) < MOST and left[0] > 0:
        left[0] -= 1
        done, todo = stack.pop()
        if not todo:
            found.append(done)
            continue
        first, rest = todo[0], todo[1:]
        if not isinstance(first, Node):
            stack += [(done, (*branch, *rest)) for branch in reversed(first)]
        elif any(node.contents is first.contents for node in done):
            stack.append((done, rest))  # a circle, or said twice
        else:
            together = [node for branch in first.nodes("allOf") for node in branch]
            unions = [branches for key in ("anyOf", "oneOf") if (branches := first.nodes(key))]
            stack.append(((*done, first), (*first.referred(), *together, *unions, *rest)))
    return found


def kind_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return names.get(type(value), "null")


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
