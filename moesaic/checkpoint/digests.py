"""SHA-256 of everything an export is made of, kept in it: each tensor, config, index, plan, and each file carried along.

They are taken while the bytes are written, from the bytes that are written, by a thread beside the writing; a shard's
are put down before it gets its name, so that an export that was interrupted has those of the shards it had finished.
What they prove is that an export is what was written, to the bit, without its source. That what was written is right,
`verify` proves with the source alone. A stack of experts has one digest a row, since rows are written one by one.
Leaves out the writing (shards, export) and the comparing (verify).
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..artifact import read_json, write_json
from ..errors import InputError
from ..files import check_link, open_file

NOTE, KIND = "moesaic/digests.json", "digests"
BUFFER = 256 << 10  # bytes read at a time: it stays in the cache
BEHIND = 4  # pieces of which the bytes wait to be hashed
NONE = "0" * 64  # as long as a digest

Digests = dict[str, str | list[str]]  # tensor -> SHA-256 of its bytes; of a stack one for each row


def of_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def of_range(path: Path, offset: int, count: int) -> str:
    """SHA-256 of a range of a file. Raises `OSError` where it ends early."""
    found, buffer = hashlib.sha256(), bytearray(min(BUFFER, count))
    view = memoryview(buffer)
    with open_file(path) as file:
        while count:
            got = os.preadv(file.fileno(), [view[: min(count, len(buffer))]], offset)
            if not got:
                raise OSError(f"{path} ended {count:,} bytes early")
            found.update(view[:got])
            offset, count = offset + got, count - got
    return found.hexdigest()


def of_file(path: Path, root: Path | None = None) -> str:
    """SHA-256 of a plain file; with `root`, of one in that folder. Raises `OSError`."""
    if root is not None:
        check_link(path, root)
    return of_range(path, 0, path.stat().st_size)


class Hashing:
    """Digests of one shard's pieces, a thread of its own for them. At most `BEHIND` pieces wait at a time."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self.waiting: deque[tuple[str, int | None, Future[str]]] = deque()
        self.done: dict[str, dict[int | None, str]] = {}

    def __enter__(self) -> "Hashing":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def add(self, name: str, row: int | None, job: Callable[[], str]) -> None:
        """`job` gives the digest of a tensor, or of one row of it."""
        self.waiting.append((name, row, self.pool.submit(job)))
        while len(self.waiting) > BEHIND:
            self.take()

    def take(self) -> None:
        name, row, future = self.waiting.popleft()
        self.done.setdefault(name, {})[row] = future.result()

    def found(self) -> Digests:
        """All of them, when they are there."""
        while self.waiting:
            self.take()
        return {n: rows[None] if None in rows else [rows[i] for i in range(len(rows))] for n, rows in self.done.items()}


class Journal:
    """The digests of an export under way, shard by shard, in its own folder. May be used by several threads."""

    def __init__(self, out: Path, inputs: Mapping[str, str]) -> None:
        self.path, self.inputs, self.lock = out / NOTE, dict(inputs), threading.Lock()
        self.shards: dict[str, Digests] = {}
        if self.path.exists():
            try:
                self.shards = dict(read_json(self.path, KIND, self.inputs)["shards"])
            except (InputError, KeyError, TypeError, ValueError):
                self.shards = {}  # what it was of will be written again

    def knows(self, shard: str) -> bool:
        return shard in self.shards

    def record(self, shard: str, found: Digests) -> None:
        with self.lock:
            self.shards[shard] = found
            self.write({})

    def finish(self, shards: Sequence[str], files: Mapping[str, str]) -> None:
        """The last word: the shards that there are, and the other files."""
        with self.lock:
            self.shards = {name: self.shards[name] for name in shards}
            self.write(files)

    def write(self, files: Mapping[str, str]) -> None:
        write_json(self.path, KIND, listing(self.shards, files), self.inputs)


def listing(shards: Mapping[str, Digests], files: Mapping[str, str]) -> dict[str, Any]:
    """What the file says."""
    return {"shards": dict(sorted(shards.items())), "files": dict(sorted(files.items()))}


def load(out: Path) -> tuple[Digests, dict[str, str]] | None:
    """Tensor -> digest, and file -> digest, of an export; None for one that has none. Raises `InputError`."""
    path = out / NOTE
    if not path.exists():
        return None
    found = read_json(path, KIND)
    shards, files = found.get("shards"), found.get("files")
    if isinstance(shards, dict) and isinstance(files, dict) and all(isinstance(of, dict) for of in shards.values()):
        return {name: digest for of in shards.values() for name, digest in of.items()}, files
    raise InputError(f"{path} does not list shards and files with their digests; export the model again")
