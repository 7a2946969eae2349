"""Write a model folder: shards planned before the first byte, filled by several threads, renamed when whole.

A shard that stands under its name is complete; one that was interrupted is written again, alone. The
same pieces give the same files, byte for byte. Bytes that only move never pass through Python, and
nothing grows with the model: memory is the pieces in flight. Leaves out what the bytes mean.
"""

import errno
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..artifact import sweep_partials, sync_folder, writing
from ..errors import CheckpointError, InputError
from ..families import DTYPE_BYTES, TensorInfo
from ..progress import Meter
from .digests import NONE, Digests, Hashing, Journal, of_bytes, of_range
from .open import Stored, read_header, reading

SHARD_BYTES = 5_000_000_000
SMALL = 256 << 20  # bytes for which one file will do
PAGE = 4096
COPY_CHUNK = 64 << 20
BUFFER = 256 << 10  # stays in the cache; ones that do not are half as fast
OTHER_WAY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # two file systems, or one that cannot


@dataclass(frozen=True)
class Piece:
    """Tensors that come to be together: one copied as it is, or several that `make` computes in this order.

    Where `row` is given, each is that row of a tensor that stacks `rows` of them; other pieces hold the others.
    """

    tensors: tuple[TensorInfo, ...]
    copy: tuple[Path, Stored] | None = None  # the folder and the range to copy
    make: Callable[[], Iterable[Tensor]] | None = None
    row: int | None = None
    rows: int = 1
    check: Callable[[], None] | None = None  # called before it is copied; raises for what should not be

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors)

    @property
    def entries(self) -> tuple[TensorInfo, ...]:
        """The whole tensors, as a header lists them."""
        stack = () if self.row is None else (self.rows,)
        return tuple(TensorInfo(t.name, t.dtype, stack + t.shape) for t in self.tensors)


@dataclass
class Shard:
    file: str
    pieces: list[Piece] = field(default_factory=list)
    payload_bytes: int = 0

    @property
    def entries(self) -> list[TensorInfo]:
        """Every tensor once, in the order of the pieces."""
        return list({t.name: t for piece in self.pieces for t in piece.entries}.values())

    @property
    def digests(self) -> Digests:
        """Digests of zeros for its tensors: what the journal will say, as long as it will be."""
        rows = {t.name: p.rows if p.row is not None else 0 for p in self.pieces for t in p.tensors}
        return {name: [NONE] * count if count else NONE for name, count in rows.items()}

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's header, and where each tensor starts. Widest elements first, so that all are aligned."""
        at, entries, starts = 0, {"__metadata__": {"format": "pt"}}, {}  # type: int, dict[str, dict], dict[str, int]
        for t in sorted(self.entries, key=lambda t: -DTYPE_BYTES[t.dtype]):
            entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.bytes]}
            starts[t.name] = at
            at += t.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * self.padding(8 + len(text), starts)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + start for name, start in starts.items()}

    def padding(self, end: int, starts: dict[str, int]) -> int:
        """Spaces after a header that ends at `end` without them: so many that most copied bytes keep their place in a page.

        The kernel copies a page to one page a third faster than to the halves of two. Small files are not padded.
        """
        places: Counter[int] = Counter({-end % 8: 0})
        for piece in self.pieces if self.payload_bytes > SMALL else ():
            if piece.copy is not None:
                at = end + starts[piece.tensors[0].name] + (piece.row or 0) * piece.bytes
                places[(piece.copy[1].offset - at) % PAGE] += piece.bytes
        return max((p for p in places if (end + p) % 8 == 0), key=lambda p: (places[p], -p))


def plan_shards(pieces: Iterable[Piece], limit: int = SHARD_BYTES) -> list[Shard]:
    """Pieces in their order, cut into files of at most `limit` bytes (a larger one has a file of its own).

    The rows of one stack stay together, where the first of them stands. A model that one file would hold
    is cut in two if it is not small, since two files are written at a time.
    """
    together: dict[str, list[Piece]] = {}
    for piece in pieces:
        together.setdefault(piece.tensors[0].name, []).append(piece)
    sizes = {name: sum(piece.bytes for piece in group) for name, group in together.items()}
    if SMALL < (total := sum(sizes.values())) <= limit:
        limit = total // 2 + max(sizes.values())
    shards = [Shard("")]
    for name, group in together.items():
        size = sizes[name]
        if shards[-1].pieces and shards[-1].payload_bytes + size > limit:
            shards.append(Shard(""))
        shards[-1].pieces += group
        shards[-1].payload_bytes += size
    for i, shard in enumerate(shards):
        shard.file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    return shards


def write_shards(
    out: Path, shards: Sequence[Shard], meter: Meter, journal: Journal | None = None, threads: int = 2
) -> int:
    """Write every shard that does not stand complete in `out`; returns the payload's bytes.

    With a `journal`, the digests of every shard are in it; one that it does not know is written again.
    One thread a file: a file system lets one at a time write to it. Raises `InputError` when the disk
    cannot hold them, `CheckpointError` when a file under a shard's name is another shard. What was
    written stays, and the same call continues.
    """
    sweep_partials(out)
    missing = [s for s in shards if not (is_complete(out / s.file, s) and (journal is None or journal.knows(s.file)))]
    need, free = sum(s.payload_bytes for s in missing), shutil.disk_usage(out).free
    if need > free:
        raise InputError(f"{out} has {free:,} bytes free and the model needs {need:,} more; make room, then run again")
    meter.advance(sum(s.payload_bytes for s in shards) - need)
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(write_shard, out, shard, meter, stop, journal) for shard in missing]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # at the first error, or Ctrl-C, nobody begins another piece
            stop.set()
    for job in jobs:
        job.result()
    sync_folder(out)
    return sum(s.payload_bytes for s in shards)


def is_complete(path: Path, shard: Shard) -> bool:
    """Whether `path` is this shard, whole. Raises `CheckpointError` if it is another."""
    try:
        found = {info: start for info, start in read_header(path)}
    except CheckpointError:  # not there, or torn by a power cut: to be written
        return False
    starts = shard.layout()[1]
    wanted = {TensorInfo(t.name, t.dtype, t.shape): starts[t.name] for t in shard.entries}
    if found != wanted:
        raise CheckpointError(f"{path} is not the shard that this command writes; use another folder or remove it")
    return True


def write_shard(out: Path, shard: Shard, meter: Meter, stop: threading.Event, journal: Journal | None = None) -> None:
    """One shard under a hidden name, renamed when its length is right, its bytes are on the disk and its digests noted.

    So what stands under a shard's name is whole after a power cut too: a length alone would not tell.
    """
    head, starts = shard.layout()
    unfinished = out / f".{shard.file}.partial"
    with writing(out / shard.file):
        try:
            with open(unfinished, "w+b", buffering=0) as file, Hashing() as hashing:
                write_at(file.fileno(), head, 0)
                for piece in shard.pieces:
                    if stop.is_set():
                        return
                    fill(file.fileno(), piece, starts, meter, hashing if journal else None)
                found = hashing.found()
                os.fsync(file.fileno())
            if (size := unfinished.stat().st_size) != len(head) + shard.payload_bytes:
                raise CheckpointError(
                    f"{unfinished} came out as {size:,} bytes, wanted {len(head) + shard.payload_bytes:,}"
                )
            if journal is not None:
                journal.record(shard.file, found)
            os.replace(unfinished, out / shard.file)
        finally:
            unfinished.unlink(missing_ok=True)


def fill(fd: int, piece: Piece, starts: dict[str, int], meter: Meter, hashing: Hashing | None = None) -> None:
    """Put one piece's tensors where the header says they are, and have them hashed."""
    if piece.check is not None:
        piece.check()
    if piece.copy is not None:
        folder, stored = piece.copy
        (info,) = piece.tensors
        at = starts[info.name] + (piece.row or 0) * info.bytes
        if hashing is not None:
            hashing.add(
                info.name, piece.row, partial(digest_of, folder / stored.file, stored.offset, stored.info.bytes)
            )
        copy_range(folder / stored.file, stored.offset, stored.info.bytes, fd, at)
    else:
        assert piece.make is not None
        for info, tensor in zip(piece.tensors, piece.make(), strict=True):
            data = tensor.reshape(-1).contiguous().view(torch.uint8).numpy()
            if data.nbytes != info.bytes:
                raise CheckpointError(f"{info.name} came out as {data.nbytes:,} bytes, wanted {info.bytes:,}")
            if hashing is not None:
                hashing.add(info.name, piece.row, partial(of_bytes, data.data))
            write_at(fd, data.data, starts[info.name] + (piece.row or 0) * info.bytes)
    meter.advance(piece.bytes)


def copy_range(source: Path, offset: int, count: int, fd: int, at: int) -> None:
    """Copy bytes from file to file inside the kernel where it can, through a buffer where it cannot."""
    buffered = partial(through_buffer, source)
    move = os.copy_file_range if hasattr(os, "copy_file_range") else buffered
    with reading(source):
        theirs = os.open(source, os.O_RDONLY)
    try:
        while count:
            try:
                moved = move(theirs, fd, min(count, COPY_CHUNK), offset, at)
            except OSError as error:
                if error.errno not in OTHER_WAY or move is buffered:
                    check_readable(source, theirs, offset, min(count, COPY_CHUNK))
                    raise
                move = buffered
                continue
            if not moved:
                raise CheckpointError(f"{source} ended {count:,} bytes early; fetch it again")
            offset, at, count = offset + moved, at + moved, count - moved
    finally:
        os.close(theirs)


def through_buffer(source: Path, theirs: int, fd: int, count: int, offset: int, at: int) -> int:
    """`os.copy_file_range`, but through memory; `theirs` is `source`, open. Raises `CheckpointError` for what cannot be read."""
    with reading(source):
        data = os.pread(theirs, min(count, BUFFER), offset)
    return write_at(fd, data, at)


def check_readable(source: Path, theirs: int, offset: int, count: int) -> None:
    """Of a copy that failed, whether the source did. Raises `CheckpointError` if so."""
    with reading(source):
        for at in range(offset, offset + count, BUFFER):
            os.pread(theirs, min(BUFFER, offset + count - at), at)


def digest_of(source: Path, offset: int, count: int) -> str:
    """`of_range` of a file of the source's. Raises `CheckpointError`."""
    with reading(source):
        return of_range(source, offset, count)


def write_at(fd: int, data: bytes | memoryview, at: int) -> int:
    """All of `data` at an offset: pwrite may write less than it is given."""
    view, total = memoryview(data).cast("B"), 0
    while total < len(view):
        total += os.pwrite(fd, view[total:], at + total)
    return total


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """The content of model.safetensors.index.json, with a total_size that is true."""
    weight_map = {t.name: s.file for s in shards for p in s.pieces for t in p.tensors}
    return {
        "metadata": {"total_size": sum(s.payload_bytes for s in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
