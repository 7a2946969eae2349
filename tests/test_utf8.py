"""UTF-8 of files: where a line of JSON Lines ends, the byte order mark, hidden files, and what is no file at all.

The property tests hold the reader to a slow plain one, written here: bytes, cut at 0x0A, one after the other.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.artifact import read_json, write_json
from moesaic.checkpoint import INDEX, Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.data.images import read_samples
from moesaic.data.texts import read_texts
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import InputError
from moesaic.evaluate.scores.perplexity import windows
from moesaic.files import CHUNK, json_lines, pieces, read_utf8
from moesaic.serve.local import read_key

BOM = b"\xef\xbb\xbf"
BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"  # where str.splitlines breaks too, and JSON Lines do not


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token a byte."""
    tiny.write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"), 320)
    return Tokenizer.open(folder)


def slow_lines(raw: bytes) -> list[tuple[int, Any]]:
    """JSON Lines by the letter: a byte at a time."""
    lines, line = [], bytearray()
    for byte in raw.removeprefix(BOM):
        if byte == 0x0A:
            lines.append(bytes(line))
            line.clear()
        else:
            line.append(byte)
    lines.append(bytes(line))
    found = []
    for number, one in enumerate(lines, 1):
        if one.decode("utf-8").strip():
            found.append((number, json.loads(one.decode("utf-8"))))
    return found


texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(BREAKS + "\ufeff\n"), max_size=12)
values = st.fixed_dictionaries({"text": texts}, optional={"id": st.integers() | st.none() | texts})
lines = st.lists(st.none() | values, max_size=6)  # None: a blank line


def written(entries: list[Any], ascii: bool, end: str, bom: bool, closed: bool) -> bytes:
    body = end.join("" if e is None else json.dumps(e, ensure_ascii=ascii) for e in entries)
    return BOM * bom + (body + end * closed).encode()


def agrees(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    assert list(json_lines(path)) == [(f"{path} line {number}", value) for number, value in slow_lines(raw)]


@settings(max_examples=150, deadline=None)
@given(lines, st.booleans(), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_lines_are_those_of_a_slow_reader(tmp_path_factory, entries, ascii, end, bom, closed):
    raw = written(entries, ascii, end, bom, closed)
    agrees(tmp_path_factory.getbasetemp() / "lines.jsonl", raw)
    assert [value for _, value in slow_lines(raw)] == [e for e in entries if e is not None]


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@given(lines, st.booleans(), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_lines_are_those_of_a_slow_reader_at_length(tmp_path_factory, entries, ascii, end, bom, closed):
    agrees(tmp_path_factory.getbasetemp() / "lines.jsonl", written(entries, ascii, end, bom, closed))


@settings(max_examples=60, deadline=None)
@given(texts, st.booleans())
def test_text_is_that_of_a_slow_reader(tmp_path_factory, text, bom):
    path = tmp_path_factory.getbasetemp() / "whole.txt"
    path.write_bytes(BOM * bom + text.encode())
    wanted = text if bom else text.removeprefix("\ufeff")
    assert read_utf8(path) == wanted.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("character", BREAKS[:3])
def test_a_raw_separator_in_a_string_is_text(tmp_path, tokenizer, character):
    """Legal in JSON and seen in published data sets: U+2028, U+2029, U+0085."""
    long = "The quick brown fox jumps over the lazy dog near the river bank. "
    rows = [{"text": f"{i} {long * 3}{character}and on {long}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    (text,) = read_texts(tmp_path, tokenizer)
    assert text.joined == "\n\n".join(r["text"] for r in rows)
    assert text.joined.count(character) == 3


def test_a_piece_may_end_inside_a_line_end_or_a_character(tmp_path):
    for shift in range(4):
        text = "x" * (CHUNK - shift) + "\r\né😀\r\n" * 3
        (tmp_path / "a.txt").write_bytes(BOM + text.encode())
        assert "".join(pieces(tmp_path / "a.txt")) == text.replace("\r\n", "\n")


@pytest.mark.parametrize("name, raw", [("a.txt", "héllo wörld"), ("a.jsonl", '{"text": "héllo wörld"}')])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_mark_is_no_part_of_a_text(tmp_path, tokenizer, name, raw, end):
    (tmp_path / name).write_bytes(BOM + (raw + end).encode())
    assert read_texts(tmp_path, tokenizer)[0].joined.rstrip() == "héllo wörld"


@pytest.mark.parametrize("file", ["config.json", INDEX, "generation_config.json"])
def test_a_mark_is_no_part_of_a_models_json(tmp_path, file):
    path = tiny.make(tmp_path / "model", "minimax_m2")
    before = Checkpoint.open(path)
    (path / file).write_bytes(BOM + (path / file).read_bytes())
    after = Checkpoint.open(path)
    assert after.config == before.config and after.inventory == before.inventory


def test_a_mark_is_no_part_of_a_tokenizer(tmp_path):
    tiny.write_tokenizer(tmp_path, 320)
    plain = Tokenizer.open(tmp_path)
    wanted = plain.encode("héllo").tolist(), plain.chat.chat_template, plain.chat.all_special_tokens
    for file in tmp_path.iterdir():
        file.write_bytes(BOM + file.read_bytes())
    marked = Tokenizer.open(tmp_path)
    assert (marked.encode("héllo").tolist(), marked.chat.chat_template, marked.chat.all_special_tokens) == wanted
    assert marked.sha256 != plain.sha256  # of the file as it lies there


def test_a_mark_is_no_part_of_a_template_of_its_own(tmp_path):
    tiny.write_tokenizer(tmp_path, 320)
    (tmp_path / "chat_template.jinja").write_bytes(BOM + b"{{ messages[0].content }}")
    assert Tokenizer.open(tmp_path).chat.chat_template == "{{ messages[0].content }}"


def test_a_mark_is_no_part_of_a_key_or_of_a_run(tmp_path):
    (tmp_path / "key").write_bytes(BOM + b"secret\r\n")
    assert read_key(tmp_path / "key") == "secret"
    write_json(tmp_path / "plan.json", "plan", {"a": 1}, {})
    (tmp_path / "plan.json").write_bytes(BOM + (tmp_path / "plan.json").read_bytes())
    assert read_json(tmp_path / "plan.json", "plan")["a"] == 1


def test_a_mark_is_no_part_of_a_perplexity(tmp_path, tokenizer):
    """`evaluate --text`: the same text with and without it gives the same tokens."""
    for name, mark in (("plain", b""), ("marked", BOM)):
        (tmp_path / f"{name}.txt").write_bytes(mark + b"A text to be read. " * 40)
    a, b = (windows(tmp_path / f"{n}.txt", tokenizer, vocab=320, window=32, stride=32) for n in ("plain", "marked"))
    assert a.ids_BT.equal(b.ids_BT) and list(a.facts["text_sha256"].values()) == list(b.facts["text_sha256"].values())


@pytest.mark.parametrize(
    "raw, message",
    [
        (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        (b'{"text": "a"}\xe2\x80\xa8{"text": "b"}\n', "line 1 is not JSON"),  # U+2028 between two values ends no line
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 cannot be read as UTF-8"),
        (b'{"text": "a"}\n\n\n' + BOM + b'{"text": "b"}\n', "line 4 is not JSON"),  # files joined by cat
        ('{"text": "ä"}'.encode("utf-16"), "line 1 cannot be read as UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"text": ' + b'{"a": ' * 100_000, "line 1 is not JSON"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'"text"\n', "line 1: it is not an object"),
        (b"null\n", "line 1: it is not an object"),
        (b'{"text": null}\n', "line 1: it has neither `text` nor `messages`"),
        (b'{"text": "a", "image": {"bytes": "iVBOR"}}\n', "line 1 has an `image` that is a dict"),
        (b'{"text": "a", "image": ["b.png"]}\n', "line 1 has an `image` that is a list"),
    ],
)
def test_bad_lines_are_named(tmp_path, tokenizer, raw, message):
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(InputError, match=message):
        read_texts(tmp_path, tokenizer)


def test_a_line_too_long_for_memory_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("moesaic.files.LONGEST", 1 << 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (1 << 20)}))
    with pytest.raises(InputError, match="line 1 is longer than 1 MiB"):
        read_texts(tmp_path, tokenizer)


HIDDEN = ("._a.txt", "._a.jsonl", ".DS_Store", ".hidden.txt", "~$a.txt", "~$notes.jsonl", ".a.jsonl.swp", "._b.jsonl")


def test_hidden_files_are_no_texts(tmp_path, tokenizer):
    for name in HIDDEN:
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 not text \xff")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "more"}')
    assert [(t.domain, t.joined) for t in read_texts(tmp_path, tokenizer)] == [("a", "text"), ("b", "more")]
    assert list(read_samples(tmp_path, tokenizer)) == []
    (tmp_path / "a.txt").unlink(), (tmp_path / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"has no \.txt or \.jsonl"):
        read_texts(tmp_path, tokenizer)


@pytest.mark.parametrize("name", ["._model-00001-of-00003.safetensors", ".x.safetensors", "~$m.safetensors"])
def test_hidden_files_are_no_shards(tmp_path, name):
    path = tiny.make(tmp_path / "model", "minimax_m2")
    before = Checkpoint.open(path)
    (path / name).write_bytes(b"\x00\x05\x16\x07" * 1024)
    after = Checkpoint.open(path)
    assert after.inventory == before.inventory and after.identity == before.identity


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_pipe_is_refused_before_it_is_read(tmp_path, tokenizer, name):
    os.mkfifo(tmp_path / name)
    for data in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="wanted a plain file"):
            read_texts(data, tokenizer)
    with pytest.raises(InputError, match="wanted a plain file"):
        read_texts(Path("/dev/zero"), tokenizer)


def sample(folder: Path, image: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text(json.dumps({"image": image, "text": "a picture"}))
    return folder


@pytest.mark.parametrize("image", ["x.png", "./x.png", "deep/../x.png", "deep/y.png", "link.png", "deep/link.png"])
def test_images_inside_the_folder_are_read(tmp_path, tokenizer, image):
    data = sample(tmp_path / "data", image)
    (data / "deep").mkdir()
    for name in ("x.png", "deep/y.png"):
        (data / name).write_bytes(b"png")
    (data / "link.png").symlink_to("x.png")
    (data / "deep" / "link.png").symlink_to("../x.png")
    ((domain, found),) = read_samples(data, tokenizer)
    assert domain == "a" and found.text == "a picture" and found.image.read_bytes() == b"png"


@pytest.mark.parametrize(
    "image, message",
    [
        ("../secret.png", "leads out of"),
        ("/etc/hostname", "leads out of"),
        ("deep/../../secret.png", "leads out of"),
        ("link.png", "leads out of"),  # to ../secret.png
        ("elsewhere/secret.png", "leads out of"),  # through a linked folder
        ("ring.png", "cannot be read"),
        ("x\x00.png", "null|cannot be read"),
        ("x" * 5000, "null|cannot be read"),
        ("._x.png", "a hidden file"),
        ("~$x.png", "a hidden file"),
        ("", "wanted a plain file"),
        ("deep", "wanted a plain file"),
        ("pipe.png", "wanted a plain file"),
        ("missing.png", "cannot be read"),
    ],
)
def test_images_elsewhere_are_refused(tmp_path, tokenizer, image, message):
    data = sample(tmp_path / "data", image)
    (tmp_path / "secret.png").write_bytes(b"png")
    (data / "deep").mkdir()
    (data / "._x.png").write_bytes(b"png"), (data / "~$x.png").write_bytes(b"png")
    (data / "link.png").symlink_to("../secret.png")
    (data / "elsewhere").symlink_to("..")
    (data / "ring.png").symlink_to("ring.png")
    os.mkfifo(data / "pipe.png")
    with pytest.raises(InputError, match=message) as raised:
        list(read_samples(data, tokenizer))
    assert "a.jsonl line 1 names the image" in str(raised.value)


def test_an_image_named_with_escapes_is_not_lost(tmp_path, tokenizer):
    """Its key spelt as JSON allows: what the reader of texts leaves to images.py must be read there."""
    (tmp_path / "x.png").write_bytes(b"png")
    (tmp_path / "a.jsonl").write_text('{"\\u0069mage": "x.png", "text": "seen"}\n{"text": "words"}')
    assert read_texts(tmp_path, tokenizer)[0].joined == "words"
    assert [s.text for _, s in read_samples(tmp_path, tokenizer)] == ["seen"]


def test_the_case_that_failed(m2, tmp_path):
    """A row of each kind of break in one file, from the command's side: rows of tokens."""
    lines = [json.dumps({"text": f"{i} words{c}more " * 20}, ensure_ascii=False) for i, c in enumerate(BREAKS[:3] * 4)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    corpus = Corpus(tmp_path, tokens=256, length=32)
    assert corpus.calibration(m2, tmp_path / "tokens.safetensors").rows == 8
