"""tokens.py: windows, shares, hashes and errors, against a tokenizer whose ids are bytes and can be read off."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors

from moesaic.data.documents import Text, pieces_of
from moesaic.data.texts import python_texts, read_texts, split
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokens import TokenSet, allot
from moesaic.errors import InputError, StaleError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def folder(path: Path, bos: bool = False, chat: bool = False) -> Path:
    """A folder with a tokenizer of one id per byte; id 256 is the BOS."""
    inner = Inner(models.BPE({c: i for i, c in enumerate(BYTES)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<s>"])
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    path.mkdir(exist_ok=True)
    inner.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": TEMPLATE} if chat else {})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def byte_level(tmp_path: Path) -> Tokenizer:
    return Tokenizer.open(folder(tmp_path / "model"))


def numbers(count: int, first: int = 0) -> str:
    return "".join(f"{i:07d}\n" for i in range(first, first + count))  # eight tokens each, none twice


def test_rows_are_windows_of_the_text_spread_over_it(byte_level: Tokenizer) -> None:
    text = Text("numbers", (numbers(1000),))
    tokens = TokenSet.build([text], byte_level, shape=(10, 64), vocab=257, seed=3)
    whole = byte_level.encode(text.joined).tolist()
    assert tokens.ids_BT.shape == (10, 64) and tokens.ids_BT.dtype == torch.int64
    starts = []
    for row in tokens.ids_BT.tolist():
        (start,) = [i for i in range(len(whole) - 63) if whole[i : i + 64] == row]
        starts.append(start)
    for i, start in enumerate(starts):  # the i-th window lies in the i-th tenth
        assert i * 800 <= start and start + 64 <= (i + 1) * 800


def test_same_seed_same_rows_other_seed_other_rows(byte_level: Tokenizer) -> None:
    text = [Text("numbers", (numbers(1000),))]
    a, b, c = (TokenSet.build(text, byte_level, shape=(5, 50), vocab=257, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.ids_BT, b.ids_BT) and a.identity == b.identity
    assert not torch.equal(a.ids_BT, c.ids_BT) and a.identity != c.identity


def test_bos_is_the_tokenizers_own_and_recorded(tmp_path: Path) -> None:
    text = [Text("numbers", (numbers(100),))]
    plain = TokenSet.build(text, Tokenizer.open(folder(tmp_path / "a")), shape=(2, 32), vocab=257)
    dressed = TokenSet.build(text, Tokenizer.open(folder(tmp_path / "b", bos=True)), shape=(2, 32), vocab=257)
    assert plain.facts["bos"] == "none" and not (plain.ids_BT == 256).any()
    assert dressed.facts["bos"] == "every-row" and dressed.ids_BT.shape == (2, 32)
    assert (dressed.ids_BT[:, 0] == 256).all() and not (dressed.ids_BT[:, 1:] == 256).any()


def test_shares_are_equal_and_short_domains_give_all(byte_level: Tokenizer) -> None:
    texts = [Text("long", (numbers(900),)), Text("short", (numbers(9),)), Text("other", (numbers(900),))]
    found = TokenSet.build(texts, byte_level, shape=(12, 24), vocab=257)
    assert found.facts["rows_by_domain"] == {"long": 5, "short": 3, "other": 4}  # 9 × 8 tokens hold 3 rows of 24
    assert found.domain_B.tolist() == [0] * 5 + [1] * 3 + [2] * 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 60))
def test_allot_gives_exactly_what_was_asked_within_room(room: list[int], rows: int) -> None:
    named = {str(i): n for i, n in enumerate(room)}
    if rows > sum(room):
        with pytest.raises(InputError, match=f"asked for {rows}"):
            allot(rows, named)
        return
    counts = allot(rows, named)
    assert sum(counts.values()) == rows and all(counts[d] <= named[d] for d in named)
    full = [counts[d] for d in named if counts[d] < named[d]]
    assert not full or max(counts.values()) - min(full) <= 1  # no unfilled domain is behind by more than one


def test_hashes_are_of_what_they_say(byte_level: Tokenizer) -> None:
    tokens = TokenSet.build([Text("n", ("abc " * 50, "déf " * 50))], byte_level, shape=(2, 16), vocab=257)
    raw = (byte_level.folder / "tokenizer.json").read_bytes()
    assert tokens.facts["tokenizer_sha256"] == hashlib.sha256(raw).hexdigest()
    assert tokens.facts["text_sha256"]["n"] == hashlib.sha256(("abc " * 50 + "\n\n" + "déf " * 50).encode()).hexdigest()
    assert tokens.facts["ids_sha256"] == hashlib.sha256(tokens.ids_BT.numpy().astype("<i8").tobytes()).hexdigest()


def test_saved_and_loaded_and_a_changed_file_is_refused(byte_level: Tokenizer, tmp_path: Path) -> None:
    tokens = TokenSet.build([Text("n", (numbers(100),))], byte_level, shape=(4, 16), vocab=257)
    tokens.save(tmp_path / "tokens.safetensors")
    back = TokenSet.load(tmp_path / "tokens.safetensors")
    assert torch.equal(back.ids_BT, tokens.ids_BT) and torch.equal(back.domain_B, tokens.domain_B)
    assert back.facts == tokens.facts and back.domains == tokens.domains and back.identity == tokens.identity
    raw = bytearray((tmp_path / "tokens.safetensors").read_bytes())
    raw[-8] ^= 1  # an id, not the domains: those come first by name
    (tmp_path / "tokens.safetensors").write_bytes(raw)
    with pytest.raises((InputError, StaleError)):
        TokenSet.load(tmp_path / "tokens.safetensors")


def test_overlap_counts_tokens_of_shared_runs(byte_level: Tokenizer) -> None:
    a = TokenSet.build([Text("n", (numbers(200),))], byte_level, shape=(5, 64), vocab=257)
    b = TokenSet.build([Text("n", (numbers(200, 500),))], byte_level, shape=(5, 64), vocab=257)
    assert a.shared_with(b) == 0 and b.shared_with(a) == 0
    assert a.shared_with(a) == a.tokens
    planted = b.ids_BT.clone()
    planted[2, 10:50] = a.ids_BT[4, 3:43]  # forty tokens of a
    mixed = TokenSet(planted, b.domain_B, b.domains, b.facts)
    slow = np.zeros((5, 64), bool)  # the same count, by sets of tuples
    known = {tuple(row[i : i + 32]) for row in a.ids_BT.tolist() for i in range(33)}
    for r, row in enumerate(planted.tolist()):
        for i in range(33):
            if tuple(row[i : i + 32]) in known:
                slow[r, i : i + 32] = True
    assert mixed.shared_with(a) == slow.sum() >= 40


def test_split_shares_no_document_and_no_paragraph() -> None:
    notice = "This notice stands at the head of every document of the collection, word for word."
    documents = tuple(f"{notice}\n\ndocument {i}\n\n{numbers(5, 10 * i)}" for i in range(40))
    many, one = Text("many", (*documents, documents[3])), Text("one", (numbers(400),))
    first, second = split([many, one])
    ours, theirs = (["".join(pieces_of(d)) for d in part.documents] for part in (first[0], second[0]))
    kept = [d.removeprefix(f"{notice}\n\n") for d in ours]
    assert len(ours) == 30 and len(theirs) == 10
    assert sorted([*kept, *theirs]) == sorted(d.removeprefix(f"{notice}\n\n") for d in documents)
    assert not any(notice in d for d in theirs)
    assert first[1].joined + second[1].joined == numbers(400) and len(second[1].joined) == 800


def test_the_running_python_is_two_disjoint_sets(byte_level: Tokenizer) -> None:
    texts, origin = python_texts()
    assert [t.domain for t in texts] == ["code", "tech"] and origin.startswith("Python 3.")
    calibration, evaluation = split(texts)
    a, b = (TokenSet.build(p, byte_level, shape=(40, 256), vocab=257) for p in (calibration, evaluation))
    assert b.shared_with(a, run=100) == 0  # characters here; a shared sentence would be found
    assert b.facts["rows_by_domain"] == {"code": 20, "tech": 20}


def test_thin_reads_whole_lines_from_all_over() -> None:
    text = numbers(10_000)
    part = Text("n", (text,)).thin(8000, 10)
    assert 7900 < len(part) < 8100 and Text("n", (text,)).thin(len(text), 10) == text
    blocks = [block.strip().splitlines() for block in part.split("\n\n")]
    assert len(blocks) == 10 and all(len(lines) >= 99 for lines in blocks)
    assert [int(lines[0]) for lines in blocks] == [1000 * i for i in range(10)]
    assert (
        len({*Text("n", ("x" * 4000 + "y" * 4000,)).thin(800, 4)}) == 3
    )  # x, y, line break: without lines it still goes all over


def test_jsonl_of_text_and_of_chat(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Guten Tag"}, {"role": "assistant", "content": "hello"}]}
    (tmp_path / "mix.jsonl").write_text(json.dumps({"text": "plain"}) + "\n\n" + json.dumps(chat) + "\n")
    (text,) = read_texts(tmp_path, Tokenizer.open(folder(tmp_path / "model", chat=True)))
    assert text.domain == "mix"
    assert ["".join(pieces_of(d)) for d in text.documents] == ["plain", "[user] Guten Tag\n[assistant] hello\n"]
    with pytest.raises(InputError, match=r"mix.jsonl line 3: .* has no chat template"):
        read_texts(tmp_path, Tokenizer.open(folder(tmp_path / "mute")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no .txt or .jsonl file"),
        ({"notes.md": "text"}, "has no .txt or .jsonl file"),
        ({"a.txt": " \n"}, "a.txt holds no text"),
        ({"a.txt": "text", "a.jsonl": '{"text": "more"}'}, "two files of the domain 'a'"),
        ({"a.jsonl": "{"}, "a.jsonl line 1 is not JSON"),
        ({"a.jsonl": '{"prompt": "x"}'}, "neither `text` nor `messages`"),
        ({"a.txt": "short"}, "a holds 5 tokens and a row has 64"),
        ({"a.txt": "x" * 100}, "asked for 3 rows, and the text holds 1"),
    ],
)
def test_bad_text_is_one_clear_sentence(
    tmp_path: Path, byte_level: Tokenizer, files: dict[str, str], message: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, text in files.items():
        (data / name).write_text(text)
    with pytest.raises(InputError, match=message):
        TokenSet.build(read_texts(data, byte_level), byte_level, shape=(3, 64), vocab=257)


def test_no_folder_no_tokenizer_bad_bytes_foreign_ids(tmp_path: Path, byte_level: Tokenizer) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_texts(tmp_path / "nowhere", byte_level)
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        Tokenizer.open(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_texts(tmp_path / "latin.txt", byte_level)
    with pytest.raises(InputError, match=r"gives id \d+, and the model knows 20"):
        TokenSet.build([Text("n", (numbers(100),))], byte_level, shape=(1, 8), vocab=20)
