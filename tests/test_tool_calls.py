"""Tool calls by round trip: what a family's template writes, cut anywhere, is read as what was called."""

import json
import time
from pathlib import Path
from random import Random

import pytest
from random_calls import MARK, drawn, without_nulls
from transformers.utils.chat_template_utils import render_jinja_template

from moesaic.families import FAMILIES, Markup
from moesaic.serve.local.chat import Reply
from moesaic.serve.local.text import Answer
from moesaic.serve.local.tools import shapes_of

TEMPLATES = Path(__file__).parent / "chat_templates"
PROMPTED = {"minimax_m2": ("]~b]ai\n", "<think>\n"), "minimax_m3_vl": ("]~b]ai\n", "")}  # what a prompt ends with
FAMILY = pytest.mark.parametrize("family", sorted(PROMPTED))


def written(family: str, message: dict) -> str:
    """What the model has to say after the prompt, for the template to write `message`."""
    template = (TEMPLATES / f"{family}.jinja").read_text()
    (text,), _ = render_jinja_template(conversations=[[{"role": "assistant", **message}]], chat_template=template)
    turn, thought = PROMPTED[family]
    return text.split(turn, 1)[1].removeprefix(thought).removesuffix("[e~[\n")


def markup(family: str) -> Markup:
    return FAMILIES[family].talk("").calls


def asked(calls: list) -> list[dict]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]


def read(family: str, tools: list[dict], pieces: list[str], inside: str = "") -> tuple[list, dict]:
    """The calls and the message, which its deltas joined have to be."""
    talk = FAMILIES[family].talk("")
    reply = Reply(Answer(talk, inside or ("reasoning" if family == "minimax_m2" else "content"), shapes_of(tools)))
    deltas = [reply.add(piece, i + 1 == len(pieces)) for i, piece in enumerate(pieces)]
    message = reply.message()
    assert [call for delta in deltas for call in delta.get("tool_calls", [])] == reply.calls
    assert "".join(delta.get("content", "") for delta in deltas) == reply.content
    assert "".join(delta.get("reasoning", "") for delta in deltas) == message.get("reasoning", "")
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reply.calls], message


def cut(r: Random, text: str) -> list[str]:
    places = sorted(r.randint(0, len(text)) for _ in range(r.randint(0, 12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def round_trip(family: str, seed: int) -> None:
    tools, calls = drawn(seed, family)
    r = Random(seed)
    thought = r.choice(("Let me see.", "<minimax:tool_call> it is", f'{MARK}<tool_call>\n{MARK}<invoke name="f">'))
    text = written(family, {"content": "One moment.", "reasoning_content": thought, "tool_calls": asked(calls)})
    wanted = without_nulls([list(call) for call in calls]) if family == "minimax_m3_vl" else [list(c) for c in calls]
    for pieces in (cut(r, text), [text]):
        found, message = read(family, tools, pieces)
        assert json.dumps(found) == json.dumps(wanted), f"seed {seed}: {json.dumps(tools)}\n{text}"
        assert message["content"] == "One moment." and message["reasoning"].strip() == thought


@FAMILY
def test_round_trip(family):
    for seed in range(200):
        round_trip(family, seed)


@pytest.mark.long
@FAMILY
def test_round_trip_of_many(family):
    for seed in range(200, 10_200):
        round_trip(family, seed)


# What no template writes, and models do ----------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "share": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {"x": {"type": "number"}}},
        "rows": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    },
    "required": ["city", "days"],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
FREE = [{"type": "function", "function": {"name": "f"}}]


def block(family: str, inside: str) -> str:
    start, end = markup(family).block
    return f"{start}{inside}{end}"


def element(name: str, inside: str) -> str:
    return f"{MARK}<{name}>{inside}{MARK}</{name}>"


def invoke(*elements: str, gap: str = "") -> str:
    return gap.join([f'{MARK}<invoke name="f">', *elements, f"{MARK}</invoke>"])


LOOSE = [
    ("minimax_m2", TOOLS,  # other quotes and spaces
     "<invoke name='f'> <parameter name=days>3</parameter><parameter name='city'> New\nYork </parameter></invoke>",
     {"days": 3, "city": " New\nYork "}),
    ("minimax_m2", TOOLS, '<invoke name="f"><parameter name="days">three</parameter></invoke>', {"days": "three"}),  # no integer
    ("minimax_m2", TOOLS, '<invoke name="f"><parameter name="days"> +3 </parameter></invoke>', {"days": 3}),
    ("minimax_m2", TOOLS, '<invoke name="f"><parameter name="tags">["a", NaN]</parameter></invoke>', {"tags": '["a", NaN]'}),
    ("minimax_m2", TOOLS, '<invoke name="f"><parameter name="share">1e999</parameter></invoke>', {"share": "1e999"}),
    ("minimax_m2", TOOLS, '<invoke name="f"><parameter name="more">1</parameter></invoke>', {"more": 1}),  # not described
    ("minimax_m2", TOOLS, '<invoke name="f"></invoke>', {}),
    ("minimax_m2", FREE, '<invoke name="f"><parameter name="a">{"b": "\\ud800"}</parameter></invoke>', {"a": {"b": "\ud800"}}),
    ("minimax_m3_vl", TOOLS, invoke(element("city", "Köln"), element("days", " 3\n"), gap="\n"), {"city": "Köln", "days": 3}),
    ("minimax_m3_vl", TOOLS, invoke(element("tags", "a"), element("tags", "b")), {"tags": ["a", "b"]}),  # a list by repetition
    ("minimax_m3_vl", FREE, invoke(element("x", "a"), element("x", "b")), {"x": ["a", "b"]}),
    ("minimax_m3_vl", TOOLS, invoke(element("tags", '["a", "b"]')), {"tags": ["a", "b"]}),  # JSON after all
    ("minimax_m3_vl", TOOLS, invoke(element("tags", element("tag", "a"))), {"tags": ["a"]}),  # by another name
    ("minimax_m3_vl", TOOLS, invoke(element("rows", element("n", "1"))), {"rows": ["1"]}),
    ("minimax_m3_vl", TOOLS, invoke(element("where", element("x", "1e3") + element("y", "south"))),
     {"where": {"x": 1000.0, "y": "south"}}),
    ("minimax_m3_vl", TOOLS, invoke(element("tags", ""), element("where", "")), {"tags": [], "where": {}}),
    ("minimax_m3_vl", FREE, invoke(element("item", "1")), {"item": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tools", "text", "wanted"), LOOSE)
def test_what_no_template_writes(family, tools, text, wanted):
    found, message = read(family, tools, [block(family, text)], "content")
    assert found == [("f", wanted)] and message["content"] is None


def test_what_is_required_tells_two_readings_apart():
    """Two calls of which one lacks a city, or one call with an odd city."""
    city = 'a</parameter>\n</invoke>\n<invoke name="f">\n<parameter name="city">b'
    text = written("minimax_m2", {"content": "", "tool_calls": asked([("f", {"city": city, "days": 3})])})
    assert read("minimax_m2", TOOLS, [text], "content")[0] == [("f", {"city": city, "days": 3})]


UNREADABLE = [
    ("minimax_m2", '\n<invoke name="f">\n<parameter name="city">a'),
    ("minimax_m2", '\n<invoke name="f">\n<parameter name="city">a</parameter>\n</minimax:tool_call>'),
    ("minimax_m2", '\n<invoke name="f">\n<parameter city="city">a</parameter>\n</invoke>\n</minimax:tool_call>'),
    ("minimax_m2", '\n<invoke name="f">\nwords\n</invoke>\n</minimax:tool_call>'),
    ("minimax_m3_vl", f'\n{MARK}<invoke name="f">{MARK}<city>a{MARK}</days>{MARK}</invoke>\n{MARK}</tool_call>'),
    ("minimax_m3_vl", f"\n{invoke(element('where', 'a' + element('x', '1')))}\n{MARK}</tool_call>"),
    ("minimax_m3_vl", f'\n{MARK}<invoke name="f">{MARK}<where>{MARK}<x>1'),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text"), UNREADABLE)
def test_a_call_that_cannot_be_read_is_content(family, text):
    """All of it, with what was said before, and no call."""
    whole = f"Hm. {FAMILIES[family].talk('').calls.block[0]}{text}"
    for pieces in ([whole], list(whole)):
        found, message = read(family, TOOLS, pieces, "content")
        assert not found and message["content"] == whole


def test_calls_before_the_cut_are_made():
    whole = invoke(element("city", "a"), element("days", "1")) + "\n"
    cut_off = f'{MARK}<invoke name="f">{MARK}<city>b'
    text = f"{FAMILIES['minimax_m3_vl'].talk('').calls.block[0]}\n{whole * 3}{cut_off}"
    found, message = read("minimax_m3_vl", TOOLS, list(text), "content")
    assert found == [("f", {"city": "a", "days": 1})] * 3 and message["content"] == cut_off


# Schemas and texts that are made to hurt -----------------------------------------------------------------------------


def doubled(levels: int) -> dict:
    """2^levels ways to be a number, and none to be words."""
    steps = {f"s{i}": {"anyOf": [{"$ref": f"#/$defs/s{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/s0", "$defs": {**steps, f"s{levels}": {"type": "integer"}}}


def chain(levels: int) -> dict:
    steps = {f"s{i}": {"$ref": f"#/properties/a/$defs/s{i + 1}"} for i in range(levels)}
    return {"$ref": "#/properties/a/$defs/s0", "$defs": {**steps, f"s{levels}": {"type": "string"}}}


def nested(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema


HARD = [
    {"$ref": "#"}, {"$ref": "#/properties/a"}, {"$ref": "#/nowhere"}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": 5},
    {"allOf": [{"$ref": "#/properties/a"}] * 3}, {"anyOf": [{"$ref": "#/properties/a"}, {"type": "integer"}]}, {"type": 5},
    {"anyOf": 5}, {"allOf": {"a": 1}}, {"enum": 5}, {"properties": 5, "required": 5, "items": 5}, {"type": "any"}, False, True, 5,
    {"$id": 5}, {"$id": "http://a/b", "$ref": "c"}, {"$anchor": "x", "$ref": "#y"}, {"$dynamicRef": "#x"}, {"pattern": "(a+)+$"},
    doubled(40), chain(900), nested(400), {"anyOf": [{"const": n} for n in range(1000)]}, {"required": ["n"] * 1000},
    {"allOf": [{"anyOf": [{"type": "integer"}, {"minimum": i}]} for i in range(30)]},
]  # fmt: skip


@pytest.mark.parametrize("schema", HARD, ids=lambda schema: json.dumps(schema)[:40])
@FAMILY
def test_no_schema_hangs(family, schema):
    """Some are circles, some lead nowhere, some have more ways than can be tried: words stay words, soon."""
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}}
    ]
    text = written(family, {"content": "", "tool_calls": asked([("f", {"a": "b c"})])})
    start = time.monotonic()
    assert read(family, tools, [text], "content")[0] == [("f", {"a": "b c"})]
    assert time.monotonic() - start < 5


PIECES = {
    "minimax_m2": ('\n<invoke name="f">\n', '<parameter name="city">', "</parameter>\n", "</invoke>\n", "x", " "),
    "minimax_m3_vl": (f'{MARK}<invoke name="f">', f"{MARK}<city>", f"{MARK}</city>", f"{MARK}<rows>", f"{MARK}<item>",
                      f"{MARK}</item>", f"{MARK}</rows>", f"{MARK}</invoke>\n", "x"),
}  # fmt: skip


@FAMILY
def test_no_text_hangs(family):
    """Delimiters by the thousand, in any order: whatever is read, nothing is lost without a call."""
    r = Random(5)
    for _ in range(4):
        start, first = markup(family).block[0], PIECES[family][0]
        text = start + first + "".join(r.choice(PIECES[family]) for _ in range(4000))
        begun = time.monotonic()
        found, message = read(family, TOOLS, [text], "content")
        assert time.monotonic() - begun < 20 and (found or message["content"] == text)
