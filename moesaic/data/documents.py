"""Documents that stay on disk: a text of any length is read piece by piece, anew for each use, and never held whole.

A document is a string, or a place in a file. Positions and lengths are characters. Leaves out which files
are read and what is held out of them (texts), and tokens.
"""

import codecs
import hashlib
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from ..artifact import writing
from ..files import CHUNK

JOINT = "\n\n"  # stands between the documents of one domain
SMALL_BYTES = 32 << 20  # of a temporary file that stays in memory


@dataclass(frozen=True, slots=True)
class Stored:
    """The characters from `first` to `stop` (None: to the end) of what `read` yields, anew each time."""

    read: Callable[[], Iterator[str]]
    first: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[str]:
        end = 0
        for piece in self.read():
            start, end = end, end + len(piece)
            if end > self.first:
                yield piece[max(0, self.first - start) : None if self.stop is None else self.stop - start]
            if self.stop is not None and end >= self.stop:
                return


Document = str | Stored


def pieces_of(document: Document) -> Iterator[str]:
    return iter((document,)) if isinstance(document, str) else iter(document)


def part(document: Document, first: int, stop: int) -> Document:
    if isinstance(document, str):
        return document[first:stop]
    return Stored(document.read, document.first + first, document.first + stop)


def is_blank(document: Document) -> bool:
    return not any(piece.strip() for piece in pieces_of(document))


def spans(pieces: Iterable[str], ranges: Sequence[tuple[int, int]]) -> list[str]:
    """The characters in each of `ranges`, of which neither starts nor ends fall; read no further than the last."""
    found: list[list[str]] = [[] for _ in ranges]
    end = first = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        while first < len(ranges) and ranges[first][1] <= start:
            first += 1
        if first == len(ranges):
            break
        for i in range(first, len(ranges)):
            a, b = ranges[i]
            if a >= end:
                break
            found[i].append(piece[max(0, a - start) : max(0, b - start)])
    return ["".join(parts) for parts in found]


@dataclass(frozen=True)
class Text:
    """One domain: its name and its documents, in order."""

    domain: str
    documents: tuple[Document, ...]

    def pieces(self) -> Iterator[str]:
        for i, document in enumerate(self.documents):
            if i:
                yield JOINT
            yield from pieces_of(document)

    @property
    def joined(self) -> str:
        return "".join(self.pieces())

    @cached_property
    def measured(self) -> tuple[int, str]:
        """(characters, SHA-256 of the UTF-8) of all that `pieces` gives."""
        characters, digest = 0, hashlib.sha256()
        for piece in self.pieces():
            characters += len(piece)
            digest.update(piece.encode())
        return characters, digest.hexdigest()

    @property
    def characters(self) -> int:
        return self.measured[0]

    @property
    def sha256(self) -> str:
        return self.measured[1]

    def thin(self, characters: int, blocks: int) -> str:
        """At most about `characters` of it, in equal blocks spread over it, each from the start of a line."""
        if self.characters <= characters:
            return self.joined
        size, starts = characters // blocks, [i * self.characters // blocks for i in range(blocks)]
        before = [min(start, size // 4) for start in starts]  # where a line may start
        found = []
        for block, lead in zip(spans(self.pieces(), [(s - b, s + size) for s, b in zip(starts, before)]), before):
            at = block.rfind("\n", 0, lead) + 1 or lead
            found.append(block[at : at + size])
        return JOINT.join(found)


class Spool:
    """A temporary file of documents, in memory while it is small; the system's TMPDIR says where it lies otherwise."""

    def __init__(self) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=SMALL_BYTES)  # noqa: SIM115
        self.end = 0
        weakref.finalize(self, self.file.close)

    def add(self, pieces: Iterable[str]) -> Stored:
        """Raises `InputError` when the disk is full."""
        start = self.end
        for piece in pieces:
            with writing(Path(tempfile.gettempdir())):
                self.file.seek(self.end)
                self.file.write(piece.encode())
                self.end = self.file.tell()
        return Stored(partial(self.read, start, self.end))

    def read(self, start: int, end: int) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        while start < end:
            self.file.seek(start)
            raw = self.file.read(min(CHUNK, end - start))
            start += len(raw)
            yield decoder.decode(raw)
