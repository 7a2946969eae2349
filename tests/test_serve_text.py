"""Text of a stream: whatever the cuts, its pieces join to what the whole would have been."""

import json

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moesaic.families import FAMILIES
from moesaic.serve.local.text import Answer, Detokenizer, Stopper
from moesaic.serve.local.tools import call_objects, typed

M2, M3 = FAMILIES["minimax_m2"].talk, FAMILIES["minimax_m3_vl"].talk
MARK = "]<]minimax[>["


@pytest.fixture(scope="module")
def byte_tokens(tmp_path_factory):
    """A token a byte."""
    tiny.write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"), 320)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.text(max_size=20), noise=st.lists(st.integers(0, 260), max_size=12))
def test_pieces_join_to_the_whole(byte_tokens, data, text, noise):
    """Characters of up to four bytes, and bytes that are none, in tokens of one byte."""
    ids = [*noise, *byte_tokens.encode(text).ids, *noise[::-1]]
    detokenizer, pieces, at = Detokenizer(byte_tokens), [], 0
    while at < len(ids):
        end = at + data.draw(st.integers(1, 3))
        pieces.append(detokenizer.push(ids[at:end]))
        at = end
    assert "".join([*pieces, detokenizer.rest()]) == byte_tokens.decode(ids)


def test_an_unfinished_character_waits(byte_tokens):
    detokenizer = Detokenizer(byte_tokens)
    assert [detokenizer.push([id]) for id in byte_tokens.encode("aé😀").ids] == ["a", "", "é", "", "", "", "😀"]


def cut(data: st.DataObject, text: str) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(), text=st.text("abc", max_size=30), words=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)
)
def test_a_stop_word_ends_it_wherever_it_is_cut(data, text, words):
    """Up to the piece in which a word is whole, and of that the earliest place of any."""
    stopper, out = Stopper(words), ""
    for piece in cut(data, text):
        out += stopper.push(piece)
    out += stopper.rest()
    places = [at for word in words if (at := text.find(word)) >= 0]
    assert stopper.stopped == bool(places)
    if not places:
        assert out == text
    else:
        assert text.startswith(out) and any(text[len(out) :].startswith(word) for word in words)
        assert not any(word in out for word in words)


PLAIN = "It is <b>warm</b> there."
CALLS_M2 = '<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>'
ANSWERS = [
    (M2, "reasoning", True, f"Hm.</think>{PLAIN}", [("reasoning", "Hm."), ("content", PLAIN)]),
    (M2, "reasoning", True, "Hm.", [("reasoning", "Hm.")]),
    (M2, "content", True, f"<think>Hm.</think>{PLAIN}", [("reasoning", "Hm."), ("content", PLAIN)]),
    (M2, "content", True, f"a<minimax:tool_call>{CALLS_M2}</minimax:tool_call>b<thi",
     [("content", "a"), ("calls", CALLS_M2), ("content", "b<thi")]),
    (M2, "reasoning", True, f"Hm.<minimax:tool_call>{CALLS_M2}", [("reasoning", "Hm."), ("calls", CALLS_M2)]),
    (M2, "content", False, f"<minimax:tool_call>{CALLS_M2}", [("content", f"<minimax:tool_call>{CALLS_M2}")]),
    (M3, "content", True, f"<mm:think>Hm.</mm:think>x{MARK}<tool_call>y{MARK}</tool_call>",
     [("reasoning", "Hm."), ("content", "x"), ("calls", "y")]),
    (M3, "content", True, f"{MARK}<tool", [("content", f"{MARK}<tool")]),
]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(("talk", "inside", "tools", "text", "wanted"), ANSWERS)
def test_an_answer_comes_apart_wherever_it_is_cut(talk, inside, tools, text, wanted, data):
    answer, found = Answer(talk, inside, tools), []
    for parts in (*map(answer.push, cut(data, text)), answer.rest()):
        for kind, piece in parts:
            if found and found[-1][0] == kind != "calls":
                found[-1] = (kind, found[-1][1] + piece)
            else:
                found.append((kind, piece))
    assert found == wanted


# Tool calls ------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "share": {"type": ["number", "null"]},
        "metric": {"anyOf": [{"type": "boolean"}, {"type": "string"}]}, "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {"x": {"type": "number"}}}, "mode": {"enum": [1, 2]},
        "rows": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    },
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


def arguments(calls):
    return [json.loads(call["function"]["arguments"]) for call in call_objects(calls, TOOLS, 0)]


def test_calls_as_the_first_family_writes_them():
    text = (
        '<invoke name="f">\n<parameter name="city"> New\nYork </parameter><parameter name="days">3</parameter>'
        '<parameter name="share">null</parameter><parameter name="metric">true</parameter>'
        '<parameter name="tags">["a", "b"]</parameter><parameter name="where">{"x": 1.5}</parameter></invoke>'
        "<invoke name='f'><parameter name='days'>three</parameter><parameter name='mode'>2</parameter></invoke>"
        '<invoke name="f"><parameter name="city">cut o'
    )
    assert arguments(M2.read_calls(text)) == [
        {"city": " New\nYork ", "days": 3, "share": None, "metric": True, "tags": ["a", "b"], "where": {"x": 1.5}},
        {"days": "three", "mode": 2},
    ]


def element(name: str, inside: str) -> str:
    return f"{MARK}<{name}>{inside}{MARK}</{name}>"


def invoke(inside: str) -> str:
    return f'{MARK}<invoke name="f">{inside}{MARK}</invoke>\n'


def test_calls_as_the_second_family_writes_them():
    rows = element("rows", "".join(element("item", element("n", str(n))) for n in (1, 2)))
    tags = element("tags", element("item", "a < b") + element("item", "]<]c"))
    text = (
        invoke(element("city", "Köln") + element("days", "3") + tags)
        + invoke(element("where", element("x", "1e3") + element("y", "south")) + rows)
        + invoke("")
        + invoke(f"{MARK}<city>{MARK}</days>")  # closed by another name
        + f'{MARK}<invoke name="f">{MARK}<city>cut o'
    )
    assert arguments(M3.read_calls(text)) == [
        {"city": "Köln", "days": 3, "tags": ["a < b", "]<]c"]},
        {"where": {"x": 1000, "y": "south"}, "rows": [{"n": 1}, {"n": 2}]},
        {},
    ]


@pytest.mark.parametrize(
    ("words", "schema", "wanted"),
    [
        ("7", {"type": "string"}, "7"), ("7", {"type": "integer"}, 7), ("7.0", {"type": "integer"}, "7.0"),
        ("nan", {"type": "number"}, "nan"), ("1e999", {"type": "number"}, "1e999"), ("0.5", {"type": "number"}, 0.5),
        ("True", {"type": "boolean"}, True), ("yes", {"type": "boolean"}, "yes"), ("[1", {"type": "array"}, "[1"),
        ("null", {"type": ["null", "string"]}, None), ("7", None, "7"), ("7", {"type": 5}, "7"), ("7", {"anyOf": 5}, "7"),
        ("9" * 2000, {"type": "integer"}, "9" * 2000), ("", {"type": "object"}, ""), ("{}", {"type": "object"}, {}),
    ],
)  # fmt: skip
def test_words_become_what_the_schema_says(words, schema, wanted):
    assert typed(words, schema) == wanted and type(typed(words, schema)) is type(wanted)
