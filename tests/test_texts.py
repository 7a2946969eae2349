"""texts.py and documents.py: both parts of any text get their share, nothing is in both, and memory stays bounded.

The property tests hold them to a slow plain reader, written here: whole strings in memory, and no streams.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data import documents
from moesaic.data.corpus import Corpus
from moesaic.data.documents import Spool, Stored, Text, pieces_of, spans
from moesaic.data.texts import read_texts, split
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokens import TokenSet
from moesaic.errors import InputError

SENTENCE = "The quick brown fox jumps over the lazy dog near the river bank. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token a byte."""
    tiny.write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"), 320)
    return Tokenizer.open(folder)


def whole(text: Text) -> list[str]:
    return ["".join(pieces_of(document)) for document in text.documents]


def slow_split(docs: list[str], share: float = 0.25) -> tuple[list[str], list[str]]:
    """The rule in plain strings."""
    unique = {hashlib.sha256(d.encode()).digest(): d for d in docs}
    total = sum(map(len, unique.values()))

    def cut(d: str, at: int) -> int:
        low = max(0, at - min(len(d) // 4, 65536))
        for mark in ("\n", " \t"):
            if places := [i + 1 for i in range(low, at) if d[i] in mark]:
                return places[-1]
        return at

    order = sorted(unique)
    if len(unique) < 8:
        kept = {h: cut(d, int(len(d) * (1 - share))) for h, d in unique.items()}
    else:
        held = order[: max(1, round(share * len(order)))]
        kept = {h: 0 if h in held else len(d) for h, d in unique.items()}
        if not share / 2 * total <= sum(len(unique[h]) for h in held) <= min(2 * share, (1 + share) / 2) * total:
            kept, left = {h: len(d) for h, d in unique.items()}, int(share * total)
            for h in order:
                if len(unique[h]) > left:
                    kept[h] = cut(unique[h], len(unique[h]) - left)
                    break
                kept[h], left = 0, left - len(unique[h])
    ours = [d[: kept[h]] for h, d in unique.items() if kept[h]]
    theirs = [d[kept[h] :] for h, d in unique.items() if kept[h] < len(d)]
    seen = {p.strip() for d in ours for p in d.split("\n\n") if len(p.strip()) >= 60}
    theirs = ["\n\n".join(p for p in d.split("\n\n") if p.strip() not in seen) for d in theirs]
    return ours, [d for d in theirs if d.strip()]


def slow_thin(text: str, characters: int, blocks: int) -> str:
    if len(text) <= characters:
        return text
    size, starts = characters // blocks, [i * len(text) // blocks for i in range(blocks)]
    starts = [text.rfind("\n", max(0, s - size // 4), s) + 1 or s for s in starts]
    return "\n\n".join(text[s : s + size] for s in starts)


NOTICE = "This notice stands at the head of many documents, word for word, and is long enough to count."
bits = st.sampled_from(
    ["a", "word ", "é😀", "\n", "\n\n", "\n\n\n", f"\n\n{NOTICE}\n\n", SENTENCE, "x" * 80, "\t", "\r\n", "\u2028"]
)
document = st.lists(bits, max_size=12).map("".join)
collections = st.lists(document, min_size=1, max_size=14).filter(lambda docs: any(d.strip() for d in docs))


def agrees(tmp: Path, tokenizer: Tokenizer, docs: list[str], jsonl: bool, piece: int, blocks: int) -> None:
    """In pieces of a few characters, so that every edge falls on every place."""
    tmp.mkdir(exist_ok=True)
    (tmp / "a.txt").unlink(missing_ok=True), (tmp / "a.jsonl").unlink(missing_ok=True)
    if jsonl:
        (tmp / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in docs))
    else:
        docs = ["".join(docs).replace("\r\n", "\n")]
        (tmp / "a.txt").write_text(docs[0], newline="")
    before = documents.CHUNK
    documents.CHUNK = sys.modules["moesaic.files"].CHUNK = piece
    try:
        (text,) = read_texts(tmp, tokenizer)
        assert whole(text) == docs
        (ours,), (theirs,) = split([text])
        assert (whole(ours), whole(theirs)) == slow_split(docs)
        for one in (text, ours, theirs):
            joined = "\n\n".join(whole(one))
            assert (one.characters, one.sha256) == (len(joined), hashlib.sha256(joined.encode()).hexdigest())
            for characters in (len(joined) // 2, len(joined) // 7):
                if characters // blocks:
                    assert one.thin(characters, blocks) == slow_thin(joined, characters, blocks)
    finally:
        documents.CHUNK = sys.modules["moesaic.files"].CHUNK = before


@settings(max_examples=60, deadline=None)
@given(collections, st.booleans(), st.integers(1, 9), st.integers(1, 6))
def test_parts_and_blocks_are_those_of_a_slow_reader(tmp_path_factory, tokenizer, docs, jsonl, piece, blocks):
    agrees(tmp_path_factory.getbasetemp() / "agrees", tokenizer, docs, jsonl, piece, blocks)


@pytest.mark.long
@settings(max_examples=4000, deadline=None)
@given(collections, st.booleans(), st.integers(1, 9), st.integers(1, 6))
def test_parts_and_blocks_are_those_of_a_slow_reader_at_length(tmp_path_factory, tokenizer, docs, jsonl, piece, blocks):
    agrees(tmp_path_factory.getbasetemp() / "agrees", tokenizer, docs, jsonl, piece, blocks)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(max_size=4), max_size=8), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=5)
)
def test_spans_are_slices(pieces, asked):
    starts = sorted(a for a, _ in asked)
    ranges = [(a, a + max([0, *(w for _, w in asked)])) for a in starts]
    assert spans(pieces, ranges) == ["".join(pieces)[a:b] for a, b in ranges]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=4), max_size=8), st.integers(0, 20), st.none() | st.integers(0, 20))
def test_a_part_of_a_stored_document_is_a_slice(pieces, first, length):
    stop = None if length is None else first + length
    assert "".join(Stored(lambda: iter(pieces), first, stop)) == "".join(pieces)[first:stop]


numbers = "".join(f"{i:07d}\n" for i in range(2000))
SHAPES = {
    "one line": [(SENTENCE * 400).strip()],
    "one line without spaces": ["文" * 20_000],
    "one line of tabs": ["column\t" * 3000],
    "a heading and one line": ["Title\n" + SENTENCE * 400],
    "three long lines": [f"{SENTENCE * 150}\n" * 3],
    "seven long lines, a document each": [f"{i} {SENTENCE * 60}" for i in range(7)],
    "eight documents, one of them nearly all": [SENTENCE * 400, *(f"short {i}" for i in range(7))],
    "forty documents, one of them nearly all": [SENTENCE * 400, *(f"short {i} {SENTENCE}" for i in range(39))],
    "nine documents, two of them nearly all": [numbers, numbers[::-1], *(f"short {i}" for i in range(7))],
    "eight documents of one length": [f"{i} {SENTENCE * 60}" for i in range(8)],
    "lines": [numbers],
    "carriage returns": [(SENTENCE + "\r") * 300],
    "the last line is long": [numbers + "x" * 20_000],
    "no-break spaces": ["a\u00a0b" * 5000],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ends", ["jsonl", "txt"])
def test_both_parts_get_their_share(tmp_path, tokenizer, shape, ends):
    docs = SHAPES[shape]
    if ends == "txt":
        docs = ["\n".join(docs)]
        (tmp_path / "a.txt").write_text(docs[0], newline="")
    else:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in docs))
    (ours,), (theirs,) = split(read_texts(tmp_path, tokenizer))
    total = sum(map(len, dict.fromkeys(docs)))
    assert 0.45 * total < ours.characters < 0.9 * total
    assert theirs.characters > 0.1 * total
    for part in (ours, theirs):
        TokenSet.build([part], tokenizer, shape=(4, 64), vocab=320)


def test_the_case_that_failed(m2, tmp_path):
    """A text without an end of line, from the command's side, and what each part got."""
    (tmp_path / "a.txt").write_text(" ".join(f"{i} {SENTENCE}" for i in range(60)))
    corpus = Corpus(tmp_path, tokens=512, length=32)
    ours = corpus.calibration(m2, tmp_path / "ours.safetensors")
    theirs = corpus.evaluation(m2, tmp_path / "theirs.safetensors")
    assert ours.rows == theirs.rows == 16 and ours.shared_with(theirs, run=30) < 32 * 16  # fox and dog are in both
    total = (tmp_path / "a.txt").stat().st_size
    assert ours.facts["parts"] == theirs.facts["parts"]
    found = ours.facts["parts"]["a"]
    assert sum(found.values()) == total and 0.7 * total < found["calibration"] < 0.76 * total


def test_a_part_too_short_says_what_each_got(m2, tmp_path):
    (tmp_path / "a.txt").write_text(SENTENCE * 2)
    with pytest.raises(
        InputError, match=r"a holds 34 tokens.*\(of a, calibration got 96 characters and evaluation 34\)"
    ):
        Corpus(tmp_path, tokens=64, length=64).evaluation(m2, tmp_path / "tokens.safetensors")


def test_evaluation_text_lost_to_repetition_is_named(m2, tmp_path):
    """Every paragraph stands in both parts: nothing is left to judge by, and the sentence shows that."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{NOTICE}\n\n{i}"}) for i in range(9)))
    with pytest.raises(InputError, match=r"evaluation 1[0-9]? ?characters|evaluation \d"):
        Corpus(tmp_path, tokens=64, length=64).evaluation(m2, tmp_path / "tokens.safetensors")


def test_documents_beyond_memory_lie_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SMALL_BYTES", 1000)
    monkeypatch.setattr(documents.tempfile, "tempdir", str(tmp_path))
    spool = Spool()
    stored = [spool.add((f"é{i} ", SENTENCE * i)) for i in range(50)]
    assert spool.file._rolled
    assert ["".join(s) for s in stored] == [f"é{i} {SENTENCE * i}" for i in range(50)]
    assert "".join(stored[3]) == f"é3 {SENTENCE * 3}"  # anew, and in any order


def test_a_full_disk_is_a_sentence(tmp_path):
    spool = Spool()
    spool.file.close()
    spool.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(InputError, match="the disk is full; make room"):
        spool.add(("text",))


PEAK = """
import resource, sys
from pathlib import Path
from moesaic.data.texts import read_texts, split
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokens import TokenSet
tokenizer = Tokenizer.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ours, theirs = split(read_texts(Path(sys.argv[2]), tokenizer))
for part in (ours, theirs):
    TokenSet.build(part, tokenizer, shape=(32, 256), vocab=320)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, ours[0].characters, theirs[0].characters)
"""


def test_memory_is_bounded_whatever_the_length(tmp_path, tokenizer):
    """A line of 36 MB in a process of its own: as strings, it and its parts would take several times that."""
    block = "".join(f"{j} " for j in range(100_000, 200_000))
    with open(tmp_path / "a.txt", "w") as file:
        for i in range(52):
            file.write(f"{i} words ☃ {block}")
    size = len((tmp_path / "a.txt").read_text())
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tokenizer.folder), str(tmp_path / "a.txt")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, ours, theirs = map(int, run.stdout.split())
    assert ours + theirs == size > 34_000_000 and 2.9 < ours / theirs < 3.1
    assert grown < 60_000  # KiB
