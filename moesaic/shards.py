"""Write a model folder: shards planned before the first byte, filled by several threads, renamed when whole.

A shard that stands under its name is complete; one that was interrupted is written again, alone. The
same pieces give the same files, byte for byte. Bytes that only move never pass through Python, and
nothing grows with the model: memory is the pieces in flight. Leaves out what the bytes mean.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Stored, read_header
from .errors import CheckpointError, InputError
from .families import DTYPE_BYTES, TensorInfo
from .progress import Meter

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
COPY_CHUNK = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Tensors that come to be together: one copied as it is, or several that `make` computes in this order."""

    tensors: tuple[TensorInfo, ...]
    copy: tuple[Path, Stored] | None = None  # the folder and the range to copy
    make: Callable[[], Iterable[Tensor]] | None = None

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors)


@dataclass
class Shard:
    file: str
    pieces: list[Piece] = field(default_factory=list)
    payload_bytes: int = 0

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's header, and where each tensor starts. Widest elements first, so that all are aligned."""
        at, entries, starts = 0, {"__metadata__": {"format": "pt"}}, {}  # type: int, dict[str, dict], dict[str, int]
        for t in sorted((t for p in self.pieces for t in p.tensors), key=lambda t: -DTYPE_BYTES[t.dtype]):
            entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.bytes]}
            starts[t.name] = at
            at += t.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + start for name, start in starts.items()}


def plan_shards(pieces: Iterable[Piece], limit: int = SHARD_BYTES) -> list[Shard]:
    """Pieces in their order, cut into files of at most `limit` bytes (a larger piece has a file of its own)."""
    shards = [Shard("")]
    for piece in pieces:
        if shards[-1].pieces and shards[-1].payload_bytes + piece.bytes > limit:
            shards.append(Shard(""))
        shards[-1].pieces.append(piece)
        shards[-1].payload_bytes += piece.bytes
    for i, shard in enumerate(shards):
        shard.file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    return shards


def write_shards(out: Path, shards: Sequence[Shard], meter: Meter, threads: int = 2) -> int:
    """Write every shard that does not stand complete in `out`; returns the payload's bytes.

    Raises `InputError` when the disk cannot hold them, `CheckpointError` when a file under a shard's
    name is not that shard. What was written stays, and the same call continues.
    """
    missing = [s for s in shards if not is_complete(out / s.file, s)]
    need, free = sum(s.payload_bytes for s in missing), shutil.disk_usage(out).free
    if need > free:
        raise InputError(f"{out} has {free:,} bytes free and the model needs {need:,} more; make room, then run again")
    for leftover in out.glob(".*.partial"):
        leftover.unlink()
    meter.advance(sum(s.payload_bytes for s in shards) - need)
    with ThreadPoolExecutor(threads) as pool:
        for shard in missing:
            write_shard(out, shard, pool, meter)
    return sum(s.payload_bytes for s in shards)


def is_complete(path: Path, shard: Shard) -> bool:
    """Whether `path` is this shard. Raises `CheckpointError` if it is something else."""
    if not path.exists():
        return False
    wanted = sorted((t.name, t.dtype, t.shape) for p in shard.pieces for t in p.tensors)
    if sorted((i.name, i.dtype, i.shape) for i, _ in read_header(path)) != wanted:
        raise CheckpointError(f"{path} is not the shard that this command writes; use another folder or remove it")
    return True


def write_shard(out: Path, shard: Shard, pool: ThreadPoolExecutor, meter: Meter) -> None:
    head, starts = shard.layout()
    partial = out / f".{shard.file}.partial"
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(fd, head, 0)
        jobs = [pool.submit(fill, fd, piece, starts, meter) for piece in shard.pieces]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)
        for job in done:
            job.result()
        os.fsync(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk of {out} is full; make room, then run the same command to continue") from error
        raise
    finally:
        os.close(fd)
    if (size := partial.stat().st_size) != len(head) + shard.payload_bytes:
        raise CheckpointError(f"{partial} came out as {size:,} bytes, wanted {len(head) + shard.payload_bytes:,}")
    os.replace(partial, out / shard.file)


def fill(fd: int, piece: Piece, starts: dict[str, int], meter: Meter) -> None:
    """Put one piece's tensors where the header says they are."""
    if piece.copy is not None:
        folder, stored = piece.copy
        copy_range(folder / stored.file, stored.offset, stored.info.bytes, fd, starts[piece.tensors[0].name])
    else:
        assert piece.make is not None
        for info, tensor in zip(piece.tensors, piece.make(), strict=True):
            data = (
                tensor.contiguous().view(torch.uint8).numpy()
                if tensor.dim()
                else tensor.reshape(1).view(torch.uint8).numpy()
            )
            if data.nbytes != info.bytes:
                raise CheckpointError(f"{info.name} came out as {data.nbytes:,} bytes, wanted {info.bytes:,}")
            write_at(fd, data.reshape(-1).data, starts[info.name])
    meter.advance(piece.bytes)


def copy_range(source: Path, offset: int, count: int, fd: int, at: int) -> None:
    """Copy bytes from file to file inside the kernel where it can, through a buffer where it cannot."""
    with open(source, "rb") as f:
        end = offset + count
        while offset < end:
            if hasattr(os, "copy_file_range"):
                moved = os.copy_file_range(f.fileno(), fd, min(end - offset, COPY_CHUNK), offset, at)
            else:
                chunk = os.pread(f.fileno(), min(end - offset, COPY_CHUNK), offset)
                moved = write_at(fd, chunk, at)
            if not moved:
                raise CheckpointError(f"{source} ended {end - offset:,} bytes early; fetch it again")
            offset, at = offset + moved, at + moved


def write_at(fd: int, data: bytes | memoryview, at: int) -> int:
    """All of `data` at an offset: pwrite may write less than it is given."""
    view, total = memoryview(data).cast("B"), 0
    while total < len(view):
        total += os.pwrite(fd, view[total:], at + total)
    return total


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """The content of model.safetensors.index.json, with a total_size that is true."""
    weight_map = {t.name: s.file for s in shards for p in s.pieces for t in p.tensors}
    return {"metadata": {"total_size": sum(s.payload_bytes for s in shards)}, "weight_map": dict(sorted(weight_map.items()))}
