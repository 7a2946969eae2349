"""Random tools and calls of them, such that what a family's template writes of a call has one meaning.

Strings are made of the template's own delimiters, whole and in pieces. What the text does not tell apart is not drawn:
a string that is a number too where both may be, an empty list where a string may be, a null where the template
leaves it out.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

MARK = "]<]minimax[>["
WORDS = (
    "",
    "a",
    " ",
    "\n",
    "Köln",
    "007",
    "1e3",
    "-5",
    "0.5",
    "true",
    "null",
    "[1]",
    '{"a": 1}',
    "<b>",
    "&amp;",
    '"',
    "'",
    "\\",
    "😀",
)
NAMES = (
    "city",
    "days",
    "path",
    "item",
    "a-b",
    "x.y",
    "größe",
    "type",
    "invoke",
    "-n",
    "parameter",
    "name",
    "tool_call",
)
LEAVES = ("string", "integer", "number", "boolean", "enum", "const", "named")
TREES = ("list", "any list", "object", "map", "optional", "union", "reference", "all", "any")


def reads_as_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


TAGS = {  # of templates that write an argument as words between tags; {} stands for an argument's name
    "qwen3_coder": (
        "\n</parameter>", "</parameter>\n", "\n</parameter>\n", "</function>\n", "</function>\n</tool_call>", "\n",
        "</tool_call>", "<tool_call>\n", "<tool_call>\n<function=f>\n", "<parameter={}>\n", "<parameter=unknown>\n",
    ),
    "glm4_moe": (
        "</arg_value>", "</arg_value>\n", "</tool_call>", "\n</tool_call>", "<tool_call>", "<tool_call>f\n", "\n",
        "<arg_key>{}</arg_key>\n", "<arg_key>unknown</arg_key>\n<arg_value>", "<arg_value>", "</think>",
    ),
}  # fmt: skip


@dataclass
class Draw:
    """One source of chance, for one family. Definitions gather in `defs`."""

    random: Random
    family: str
    defs: dict[str, Any]

    @property
    def nested(self) -> bool:
        return self.family == "minimax_m3_vl"

    def words(self, *more: str) -> str:
        return "".join(self.random.choice((*WORDS, *more)) for _ in range(self.random.randint(0, 5)))

    def names(self, count: int, among: tuple[str, ...] = NAMES) -> list[str]:
        return self.random.sample(among, count)

    def delimited(self, names: list[str]) -> str:
        """A string with delimiters. `names` are those that may be opened in it: of arguments written before or unknown."""
        own, r = names[-1], self.random
        opened = r.choice([name for name in names if name != "item"] or ["unknown"])  # another item would be one
        if self.family in TAGS:
            tags = [tag.format(opened) for tag in TAGS[self.family]]
        elif self.nested:
            tags = [f"{MARK}</{own}>", f"{MARK}</invoke>\n", f"{MARK}</tool_call>", MARK, f"{MARK}<tool_call>\n", "</item>",
                    f'{MARK}<invoke name="unknown">', f"{MARK}<{opened}>", f"{MARK}<unknown>", "</mm:think>",
                    f"{MARK}</{own}> {MARK}<{r.choice(NAMES)}>"]  # fmt: skip
        else:
            tags = ["</parameter>", "</parameter>\n", "</invoke>", "</invoke>\n", "</minimax:tool_call>", '<invoke name="',
                    '<invoke name="unknown">\n', f'<parameter name="{opened}">', '<parameter name="unknown">',
                    "<minimax:tool_call>\n", "</parameter>\n</invoke>\n</minimax:tool_call>", "</think>", "[e~[",
                    f'</parameter> <parameter name="{r.choice(NAMES)}">', f'</parameter>\n<parameter name="{own}">']  # fmt: skip
        if self.nested and own != "item":
            tags.append(f"{MARK}</{own}>{MARK}<{own}>")
        return self.words(*tags, *tags, *tags)

    def plain(self) -> str:
        """A string that is nothing else, for where other kinds may stand."""
        while reads_as_json(found := self.words()):
            pass
        return found

    def schema(self, depth: int, names: list[str], listed: bool = False) -> tuple[Any, Any]:
        """A schema, and a value that it allows. `names` as in `delimited`; `listed` within a list."""
        kind = self.random.choice(LEAVES + TREES * 2 if depth else LEAVES)
        return getattr(self, "draw_" + kind.replace(" ", "_"))(depth, names, listed)

    def draw_string(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        extra = self.random.choice(({}, {"description": "any"}, {"minLength": 0}))
        return {"type": "string", **extra}, self.delimited(names)

    def draw_integer(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        return {"type": "integer"}, self.random.choice((0, -7, 3, 2**70, -(10**30)))

    def draw_number(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        return {"type": "number"}, self.random.choice((0.5, 5.0, 1e22, -1e-7, 3, 2**70, 0.1 + 0.2))

    def draw_boolean(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        return {"type": "boolean"}, self.random.random() < 0.5

    def draw_enum(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        values = self.random.choice((["1", "2"], [1, 2, "auto"], [True, "x y"], ["true", "null"]))
        return {"enum": values}, self.random.choice(values)

    def draw_const(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        value = self.random.choice(("7", 7, True, "no"))
        return {"const": value}, value

    def draw_named(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        """No type, but words that tell it."""
        return self.random.choice((({"pattern": "."}, "12"), ({"minimum": 3}, 12), ({"format": "date"}, "2026-12-01")))

    def draw_list(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        count = self.random.randint(0, 3)
        if self.random.random() < 0.2:
            pairs = [self.schema(depth - 1, ["item"], True) for _ in range(count)]
            return {"type": "array", "prefixItems": [schema for schema, _ in pairs]}, [value for _, value in pairs]
        if self.random.random() < 0.5:
            draw = self.random.choice((self.draw_string, self.draw_integer, self.draw_number))
            return {"type": "array", "items": draw(0, ["item"], True)[0]}, [
                draw(0, ["item"], True)[1] for _ in range(count)
            ]
        schema, value = self.schema(depth - 1, ["item"], True)
        return {"type": "array", "items": schema}, [value] * count

    def draw_any_list(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        return {"type": "array"}, [self.anything(depth - 1) for _ in range(self.random.randint(0, 3))]

    def draw_object(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        described, value, before = {}, {}, list[str]()
        for name in self.names(self.random.randint(0, 4)):
            before.append(name)
            described[name], drawn = self.schema(depth - 1, before)
            if self.random.random() < 0.8:
                value[name] = drawn
        required = {"required": self.random.sample(sorted(value), len(value) // 2)} if value else {}
        closed = {"additionalProperties": False} if self.random.random() < 0.3 else {}
        return {"type": "object", "properties": described, **required, **closed}, value

    def draw_map(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        kind = self.random.choice(("integer", "boolean"))
        keys = self.names(self.random.randint(0, 3), ("a", "b-c", "größe", "d"))
        values = {key: getattr(self, f"draw_{kind}")(0, names, False)[1] for key in keys}
        return {"type": "object", "additionalProperties": {"type": kind}}, values

    def draw_optional(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        """Of pydantic's kind, or a list of types."""
        schema, value = self.random.choice((self.draw_integer, self.draw_list, self.draw_object, self.draw_boolean))(
            depth, names, listed
        )
        empty = self.nested and listed and schema["type"] in ("array", "object")  # then null is written as an empty one
        value = None if not empty and self.random.random() < 0.3 else value
        if self.random.random() < 0.3:
            return schema | {"type": [schema["type"], "null"]}, value
        return {self.random.choice(("anyOf", "oneOf")): [schema, {"type": "null"}], "default": None}, value

    def draw_union(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        """Branches that only a member of theirs, or the kind, tells apart."""
        if self.random.random() < 0.5:
            branches = [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": {"type": type}},
                    "required": ["kind"],
                }
                for kind, type in (("text", "string"), ("count", "integer"))
            ]
            value = self.random.choice(({"kind": "text", "value": "12"}, {"kind": "count", "value": 12}))
            return {"oneOf": branches}, value
        item, value = self.draw_integer(depth, names, True)
        branches = [{"type": "string"}, {"type": "array", "items": item}]
        return {"anyOf": branches}, self.random.choice((self.plain(), [value], [value] * 2))

    def draw_reference(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        if self.random.random() < 0.2:  # a tree, which refers to itself
            children = {"type": "array", "items": {"$ref": "#/$defs/tree"}}
            self.defs["tree"] = {"type": "object", "properties": {"n": {"type": "string"}, "children": children}}
            return {"$ref": "#/$defs/tree"}, {
                "n": "1",
                "children": [{"n": "2", "children": []}, {"n": "", "children": [{"n": "3"}]}],
            }
        schema, value = self.schema(depth - 1, names, listed)
        name = f"d{len(self.defs)}"
        self.defs[name] = schema
        return {"$ref": f"#/$defs/{name}", "description": "elsewhere"}, value

    def draw_all(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        schema, value = self.schema(depth - 1, names, listed)
        return {"allOf": [schema, {"description": "both"}]}, value

    def draw_any(self, depth: int, names: list[str], listed: bool) -> tuple[Any, Any]:
        return self.random.choice(({}, {"description": "anything"}, True)), self.anything(depth)

    def anything(self, depth: int) -> Any:
        """A value of no stated kind."""
        r = self.random
        if depth < 1 or r.random() < 0.4:
            return r.choice((3, -0.5, True, self.plain()))
        if r.random() < 0.5:
            return [self.anything(depth - 1) for _ in range(r.randint(1, 3))]
        return {key: self.anything(depth - 1) for key in self.names(r.randint(1, 3), ("a", "b-c", "größe", "d"))}


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def drawn(seed: int, family: str) -> tuple[list[dict[str, Any]], list[tuple[str, dict[str, Any]]]]:
    """Tools, and one to three calls of them with arguments."""
    r = Random(f"{family} {seed}")
    tools, calls = [], []
    for name in r.sample(("f", "write_file", "get-weather", "ns.search"), 2):
        draw = Draw(r, family, {})
        schema, value = draw.draw_object(3, [], False)
        schema["$defs"] = draw.defs
        tools.append({"type": "function", "function": {"name": name, "parameters": schema}})
        calls.append((name, value))
    return tools, r.choices(calls, k=r.randint(1, 3))
