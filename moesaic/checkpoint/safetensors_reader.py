"""Tensors of a model folder by the safetensors library: an independent reader used only by verify.

Pages of a mapped file count as memory for as long as it is open; so few files are open at a time, and
each is opened anew after `MAPPED` bytes. Leaves out what the tensors mean.
"""

import threading
from collections.abc import Iterator
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..families import Linear
from .containers.base import Packing
from .open import Checkpoint

MAPPED = 16 << 20  # bytes read through one opening of a file
OPEN = 2  # files at a time


class SafetensorsReader:
    """One folder. May be used by several threads; a tensor keeps its file's pages until it is dropped."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.files: dict[str, tuple[Any, int]] = {}  # file -> handle, bytes read through it; the latest used last
        self.lock = threading.Lock()

    def handle(self, file: str, count: int) -> Any:
        """The library's view of `file`, from which the caller will read `count` bytes."""
        with self.lock:
            handle, used = self.files.pop(file, (None, 0))
            if handle is None or used > MAPPED:
                handle, used = safe_open(self.checkpoint.path / file, "pt"), 0
            self.files[file] = handle, used + count
            if len(self.files) > OPEN:
                del self.files[next(iter(self.files))]
            return handle

    def tensor(self, name: str) -> Tensor:
        where = self.checkpoint.where(name)
        tensor: Tensor = self.handle(where.file, where.info.bytes).get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        where = self.checkpoint.where(name)
        count = where.info.bytes // where.info.shape[0] * (stop - start)
        rows: Tensor = self.handle(where.file, count).get_slice(name)[start:stop]
        return rows

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in blocks of rows of some `MAPPED` bytes: an embedding can be gigabytes."""
        info = self.checkpoint.where(name).info
        if info.bytes <= MAPPED or len(info.shape) < 2:
            yield self.tensor(name)
            return
        step = max(1, MAPPED * info.shape[0] // info.bytes)
        for start in range(0, info.shape[0], step):
            yield self.rows(name, start, min(start + step, info.shape[0]))

    def parts(self, linear: Linear) -> dict[str, Tensor]:
        """The tensors of one matrix, by meaning: of a stack of experts, its own row and no more."""
        checkpoint, found = self.checkpoint, {}
        place = checkpoint.container.place(checkpoint.architecture, linear)
        for key, part in self.packing(linear).parts(linear.shape).items():
            name, row = place.tensor(part).name, place.row
            found[key] = self.tensor(name) if row is None else place.pick(self.rows(name, row, row + 1)[0], part)
        return found

    def names(self, linear: Linear) -> list[str]:
        """The tensors that hold one matrix."""
        place = self.checkpoint.container.place(self.checkpoint.architecture, linear)
        return [place.tensor(part).name for part in self.packing(linear).parts(linear.shape).values()]

    def packing(self, linear: Linear) -> Packing:
        return self.checkpoint.container.packing(self.checkpoint.formats[linear.name])
