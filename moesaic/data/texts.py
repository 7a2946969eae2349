"""Text by domain: what a folder or this Python holds, and the part of it that calibration never sees.

A folder holds one domain a file (`code.txt`, `math.jsonl`). Nothing is held whole in memory but a line of JSON Lines.
Leaves out tokens, and any download.
"""

import hashlib
import pydoc_data.topics
import sys
import sysconfig
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import is_hidden, json_lines, pieces
from .conversations import Conversation
from .documents import JOINT, Document, Spool, Stored, Text, is_blank, part, pieces_of, spans
from .tokenizer import Tokenizer

HELD_OUT = 0.25  # of a text, to judge by
FEW = 8  # fewer documents than this are split inside each document, not between them
REACH = 1 << 16  # characters before a cut in which a better place for it is looked for
PARAGRAPH = 60  # characters from which a paragraph that stands in two texts is no coincidence
LONG = 1 << 20  # characters from which a paragraph is compared in parts
CHATS = ("messages", "conversations", "conversation")  # columns that hold a conversation
NO_PROSE = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}  # tables, tests, the other domain


def read_texts(path: str | Path, tokenizer: Tokenizer) -> list[Text]:
    """The domains of a folder (or of one file), by name. Raises `InputError` where there is no text.

    `.txt` is one document; each line of `.jsonl` is one, an object with `text` or with a conversation.
    """
    path = Path(path)
    files, root = data_files(path, ".txt", ".jsonl")
    if not files:
        what = "has no .txt or .jsonl file" if path.is_dir() else "is not a folder"
        raise InputError(f"{path} {what}; wanted text, one domain a file (code.txt, math.jsonl)")
    texts: dict[str, Text] = {}
    for file in files:
        if file.stem in texts:
            raise InputError(f"{path} has two files of the domain {file.stem!r}; give one another name")
        if file.suffix == ".jsonl":
            documents, images = read_lines(file, root, tokenizer)
        else:
            documents, images = (Stored(partial(pieces, file, root)),), 0
        if images and not documents:
            continue
        if all(map(is_blank, documents)):
            raise InputError(f"{file} holds no text; remove it or fill it")
        texts[file.stem] = Text(file.stem, documents)
    if not texts:
        raise InputError(f"{path} holds images alone; wanted some text beside them")
    return list(texts.values())


def data_files(path: Path, *suffixes: str) -> tuple[list[Path], Path | None]:
    """A file itself, or the files of a folder that end so, by name, and the folder that links may not leave."""
    if path.exists() and not path.is_dir():
        return [path], None
    return sorted(f for f in path.glob("*") if f.suffix in suffixes and not is_hidden(f.name)), path


def read_lines(file: Path, root: Path | None, tokenizer: Tokenizer) -> tuple[tuple[Document, ...], int]:
    """The documents of JSON Lines, and how many further lines have an image: those are images.py's."""
    spool, documents, images = Spool(), list[Document](), 0
    for where, entry in json_lines(file, root):
        if has_image(entry, where):
            images += 1
        else:
            documents.append(spool.add((read_entry(entry, where, tokenizer),)))
    return tuple(documents), images


def has_image(entry: Any, where: str) -> bool:
    """Whether a sample's text belongs to an image: it is read with that (images.py), and nowhere else."""
    image = entry.get("image") if isinstance(entry, dict) else None
    if image is not None and not isinstance(image, str):
        raise InputError(
            f"{where} has an `image` that is a {type(image).__name__}; wanted the name of a file beside it"
        )
    return image is not None


def read_entry(entry: Any, where: str, tokenizer: Tokenizer) -> str:
    """The text of a line: its own, or its conversation as the model's chat template writes it."""
    try:
        if not isinstance(entry, dict):
            raise InputError("it is not an object with `text` or `messages`")
        text, rows = entry.get("text"), next((entry[key] for key in CHATS if entry.get(key) is not None), None)
        if isinstance(text, str) and (text.strip() or rows is None):
            text.encode()
            return text
        if rows is None:
            raise InputError("it has neither `text` nor `messages`")
        return tokenizer.renderer.render(Conversation.of(rows, entry.get("tools"), entry.get("system")))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a character ({error.reason}); write it in full") from error


def python_texts() -> tuple[list[Text], str]:
    """Text that every Python brings along, and what to call it: its own sources, and its help topics.

    Nothing is downloaded. Models have read this text: good for a demonstration, never "held out".
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [f for f in sorted(library.rglob("*.py")) if not NO_PROSE & set(f.relative_to(library).parts)]
    code = tuple(f.read_text(encoding="utf-8", errors="replace") for f in files if f.stat().st_size > 2000)
    if not code:
        raise InputError(f"this Python has no standard-library sources in {library}; give a folder of text with --data")
    topics = tuple(text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 200)
    return [
        Text("code", code),
        Text("tech", topics),
    ], f"Python {sys.version.split()[0]}: standard library and help topics"


def split(texts: Sequence[Text], share: float = HELD_OUT) -> tuple[list[Text], list[Text]]:
    """Text to calibrate on, and `share` of it to evaluate on: no document in both, and no paragraph either.

    Many documents are dealt out by the hash of their content (a copy goes where its twin goes), unless one of the
    parts then has too little; a few are cut, their end being kept for evaluation. What is left to evaluate on then
    loses the paragraphs that calibration holds too: licences, quotations, the same section under two titles.
    """
    spool, first, second = Spool(), list[Text](), list[Text]()
    for text in texts:
        ours, theirs = list[Document](), list[Document]()
        for document, kept, characters in dealt(text.documents, share):
            ours += [part(document, 0, kept)] if kept else []
            theirs += [part(document, kept, characters)] if kept < characters else []
        seen = paragraphs_in(ours)
        others = [spool.add(without(document, seen)) if seen else document for document in theirs]
        first.append(Text(text.domain, tuple(ours)))
        second.append(Text(text.domain, tuple(document for document in others if not is_blank(document))))
    return first, second


def dealt(documents: Iterable[Document], share: float) -> Iterator[tuple[Document, int, int]]:
    """Each document once, how many of its characters are to calibrate on, and how many there are."""
    unique: dict[bytes, tuple[Document, int]] = {}
    for document in documents:
        content, characters = hashlib.sha256(), 0
        for piece in pieces_of(document):
            content.update(piece.encode())
            characters += len(piece)
        unique[content.digest()] = document, characters
    if len(unique) < FEW:
        kept = {digest: place(document, n, int(n * (1 - share))) for digest, (document, n) in unique.items()}
    else:
        chosen = set(sorted(unique)[: max(1, round(share * len(unique)))])
        kept = {digest: 0 if digest in chosen else n for digest, (_, n) in unique.items()}
        total = sum(n for _, n in unique.values())
        if not share / 2 * total <= total - sum(kept.values()) <= min(2 * share, (1 + share) / 2) * total:
            kept = by_characters(unique, share * total)
    for digest, (document, n) in unique.items():
        yield document, kept[digest], n


def by_characters(unique: Mapping[bytes, tuple[Document, int]], wanted: float) -> dict[bytes, int]:
    """For documents of very unequal lengths: whole ones are held out in the order of their hashes, and the one
    with which that would be more than `wanted` characters is cut."""
    kept, left = {digest: n for digest, (_, n) in unique.items()}, int(wanted)
    for digest in sorted(unique):
        document, n = unique[digest]
        if n > left:
            kept[digest] = place(document, n, n - left)
            break
        kept[digest], left = 0, left - n
    return kept


def place(document: Document, characters: int, target: int) -> int:
    """Where to cut at `target` or a little before it: after the end of a line, else after a space, else there."""
    low = max(0, target - min(characters // 4, REACH))
    (window,) = spans(pieces_of(document), [(low, target)])
    return low + (window.rfind("\n") + 1 or max(window.rfind(" "), window.rfind("\t")) + 1 or len(window))


def paragraphs(document: Document) -> Iterator[tuple[str, bool]]:
    """What `JOINT` parts, and whether a part begins there: one longer than `LONG` comes in pieces."""
    rest, fresh = "", True
    for piece in pieces_of(document):
        *whole, rest = (rest + piece).split(JOINT)
        for paragraph in whole:
            yield paragraph, fresh
            fresh = True
        while len(rest) > LONG:
            yield rest[:LONG], fresh
            rest, fresh = rest[LONG:], False
    yield rest, fresh


def key(paragraph: str) -> int | None:
    """64 bits of a hash; None for a paragraph too short to be told from a coincidence."""
    text = paragraph.strip()
    if len(text) < PARAGRAPH:
        return None
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), sys.byteorder)


def paragraphs_in(documents: Iterable[Document]) -> "array[int]":
    """Keys of all paragraphs, sorted: eight bytes for each."""
    keys = array("Q", (k for document in documents for p, _ in paragraphs(document) if (k := key(p)) is not None))
    found = array("Q")
    found.frombytes(np.unique(np.frombuffer(keys, np.uint64)).tobytes())
    return found


def without(document: Document, seen: "array[int]") -> Iterator[str]:
    """A document less the paragraphs that are `seen`."""
    joint = ""
    for paragraph, fresh in paragraphs(document):
        k = key(paragraph)
        if k is not None and (at := bisect_left(seen, k)) < len(seen) and seen[at] == k:
            continue
        yield (joint if fresh else "") + paragraph
        joint = JOINT
