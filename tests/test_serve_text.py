"""Text of a stream: whatever the cuts, its pieces join to what the whole would have been."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moesaic.families import FAMILIES, Talk
from moesaic.serve.local.text import Answer, Detokenizer, Stopper, hidden_words
from moesaic.serve.local.tools import shapes_of

M2, M3 = (FAMILIES[f].talk("") for f in ("minimax_m2", "minimax_m3_vl"))
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
    detokenizer, pieces, at = Detokenizer(byte_tokens, hidden_words(byte_tokens, Talk())), [], 0
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
INVOKE = '\n<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>\n'
BLOCK = f"<minimax:tool_call>{INVOKE}</minimax:tool_call>"
BLOCK_M3 = f'{MARK}<tool_call>\n{MARK}<invoke name="f">{MARK}<a>1{MARK}</a>{MARK}</invoke>\n{MARK}</tool_call>'
MADE = (("f", (("a", "1"),)),)
TOOLS = shapes_of([{"type": "function", "function": {"name": "f"}}])
ANSWERS = [
    (M2, "reasoning", TOOLS, f"Hm.</think>{PLAIN}", [("reasoning", "Hm."), ("content", PLAIN)]),
    (M2, "reasoning", TOOLS, "Hm.", [("reasoning", "Hm.")]),
    (M2, "content", TOOLS, f"<think>Hm.</think>{PLAIN}", [("reasoning", "Hm."), ("content", PLAIN)]),
    (M2, "content", TOOLS, f"a{BLOCK}b<thi", [("content", "a"), ("calls", MADE), ("content", "b<thi")]),
    (M2, "content", TOOLS, f"{BLOCK}\n{BLOCK.replace('1', 'x')}<think>b</think>c",
     [("calls", MADE), ("content", "\n"), ("calls", (("f", (("a", "x"),)),)), ("reasoning", "b"), ("content", "c")]),
    (M2, "reasoning", TOOLS, f"Hm.{BLOCK}", [("reasoning", "Hm."), ("calls", MADE)]),  # the model forgot to end it
    (M2, "reasoning", TOOLS, f"I say {BLOCK}</think>b", [("reasoning", f"I say {BLOCK}"), ("content", "b")]),
    (M2, "content", TOOLS, f"a <minimax:tool_call>, {BLOCK}", [("content", "a <minimax:tool_call>, "), ("calls", MADE)]),
    (M2, "content", TOOLS, f"a<minimax:tool_call>{INVOKE}<invoke name=",
     [("content", "a"), ("calls", MADE), ("content", "<invoke name=")]),
    (M2, "content", TOOLS, f"a{BLOCK[:-40]}", [("content", f"a{BLOCK[:-40]}")]),
    (M2, "content", {}, BLOCK, [("content", BLOCK)]),
    (M3, "content", TOOLS, f"<mm:think>Hm.</mm:think>x{BLOCK_M3}",
     [("reasoning", "Hm."), ("content", "x"), ("calls", MADE)]),
    (M3, "content", TOOLS, f"{MARK}<tool", [("content", f"{MARK}<tool")]),
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
