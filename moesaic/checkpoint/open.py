"""A checkpoint on disk, source or export alike, opened by its headers only.

What the headers say is believed, and nothing else: shard names may lie about their number and the
index about its total_size (both do, in released files). A folder that holds nothing but config.json
can be opened too: then the family and the container say what the release holds. Costs a few
milliseconds a shard and no memory for weights; `read` and `decode` cost the one tensor they return.
Leaves out writing (shards.py).
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import identity
from ..errors import CheckpointError, FileError
from ..families import Architecture, Family, Linear, TensorInfo, family_of
from ..files import decoded, is_hidden, open_file, read_file, walk
from .containers import container_of
from .containers.base import DTYPES, Container, inventory
from .damage import damage, damaged_scales, nan_or_infinite

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 << 20  # bytes; the safetensors library's own limit
MOST_AXES = 16  # of a tensor
LOOK_BYTES = 16 << 20  # of a tensor at a time
SAMPLES, SAMPLE_BYTES = 8, 4096  # of each shard, for `Checkpoint.identity`
UNREAD = (".rotary_emb.inv_freq",)  # ends of names: tables that releases hold (Kimi-K2) and every engine computes anew
PLAUSIBLE_RMS = (1e-7, 1e3)  # of a decoded matrix; M3's scales read as plain numbers land at 1e4 and above


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: a file and a range of bytes in it."""

    info: TensorInfo
    file: str
    offset: int  # from the start of the file

    @property
    def end(self) -> int:
        return self.offset + self.info.bytes


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder. `stored` is empty for a folder of a config alone."""

    path: Path
    config: dict[str, Any]
    family: Family
    architecture: Architecture
    container: Container
    formats: Mapping[str, str]  # linear -> format
    stored: Mapping[str, Stored]
    absent: frozenset[str] = frozenset()  # what some releases of the family have, and this one has not

    @staticmethod
    def open(path: str | Path, whole: bool = True) -> "Checkpoint":
        """Open a folder by its headers; with `whole` false, one whose headers do not fit its config too.

        Raises `CheckpointError` for a missing, truncated or foreign shard, a tensor that is missing or
        has another shape or dtype than its family says, and `FamilyError` for a config that no code
        here was written for.
        """
        path = Path(path)
        config = read_config(path)
        with reading(path):
            walk(path, "moesaic")
        family = family_of(config)
        config = dict(family.released(config))
        architecture, stored = family.read(config), read_shards(path)
        stored = {name: where for name, where in stored.items() if not name.endswith(UNREAD)}
        absent = architecture.absent(stored) if stored else frozenset()
        architecture = architecture.without(absent)
        container = container_of(config).of_release(architecture, {n: s.info.dtype for n, s in stored.items()})
        formats = container.formats(architecture, config, frozenset(stored) if stored else None)
        checkpoint = Checkpoint(
            path=path, config=config, family=family, architecture=architecture, container=container, formats=formats,
            stored=stored, absent=absent,
        )  # fmt: skip
        if stored and whole and (bad := checkpoint.differences()):
            raise CheckpointError(
                f"{path} disagrees with its config.json: {sample([f'{n} {what}' for n, what in bad.items()])}; "
                f"get the complete, unmodified files of a {family.name} model"
            )
        return checkpoint

    @property
    def has_weights(self) -> bool:
        return bool(self.stored)

    @cached_property
    def inventory(self) -> list[TensorInfo]:
        """Every tensor that a model of this config has on disk."""
        return inventory(self.architecture, self.container, self.formats)

    @cached_property
    def identity(self) -> str:
        """Stands for config, headers, and a few kilobytes of each shard.

        Headers alone would not do: two exports that keep other experts, or round otherwise, have the
        same. A change of few bytes can go unseen: that is for `verify` to find.
        """
        places = sorted((n, s.info.dtype, s.info.shape, s.file, s.offset) for n, s in self.stored.items())
        return identity(self.config, places, self.sampled())

    def sampled(self) -> str:
        digest = hashlib.sha256()
        for name in sorted({s.file for s in self.stored.values()}):
            with reading(self.path / name), open_file(self.path / name) as file:
                size = os.fstat(file.fileno()).st_size
                for place in range(SAMPLES):
                    file.seek(size * place // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def differences(self) -> dict[str, str]:
        """Headers against the inventory: each tensor that is missing, foreign, or of another shape or dtype."""
        wanted = {t.name: t for t in self.inventory}
        found = {n: "is missing" for n in wanted if n not in self.stored}
        for name, stored in self.stored.items():
            info = stored.info
            if name not in wanted:
                found[name] = "does not belong to this model"
            elif (info.dtype, info.shape) != (wanted[name].dtype, wanted[name].shape):
                found[name] = (
                    f"is {info.dtype} {list(info.shape)}, wanted {wanted[name].dtype} {list(wanted[name].shape)}"
                )
        return found

    def read(self, name: str) -> Tensor:
        """One tensor as stored, its own memory. Raises `CheckpointError` where there are no weights."""
        return self.load(name, 0, self.where(name).info.bytes).reshape(self.where(name).info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` … `stop` of a stored matrix, reading no others: an embedding can be gigabytes."""
        count, width = self.where(name).info.shape
        assert 0 <= start <= stop <= count, f"rows {start} … {stop} of {count}"
        row_bytes = self.where(name).info.bytes // count
        return self.load(name, start * row_bytes, (stop - start) * row_bytes).reshape(stop - start, width)

    def load(self, name: str, offset: int, count: int) -> Tensor:
        """`count` bytes of a tensor from its byte `offset`, flat, in its dtype."""
        where = self.where(name)
        with reading(self.path / where.file), open_file(self.path / where.file) as file:
            flat = np.fromfile(file, np.uint8, count, offset=where.offset + offset)
        if flat.size != count:
            raise CheckpointError(f"{self.path / where.file} ends inside {name}; fetch the file again")
        dtype = DTYPES[where.info.dtype]
        return torch.from_numpy(flat).view(dtype) if count else torch.empty(0, dtype=dtype)

    def where(self, name: str) -> Stored:
        if name not in self.stored:
            what = "has no weights, only a config" if not self.stored else f"has no tensor {name}"
            raise CheckpointError(f"{self.path} {what}; this needs the whole checkpoint")
        return self.stored[name]

    def parts(self, linear: Linear) -> dict[str, Tensor]:
        """The stored tensors of one matrix, by meaning (see `Packing`)."""
        packing, place = (
            self.container.packing(self.formats[linear.name]),
            self.container.place(self.architecture, linear),
        )
        found = {}
        for key, part in self.located(linear).items():
            whole = self.where(part.info.name)
            run = self.load(part.info.name, part.offset - whole.offset, part.info.bytes).reshape(part.info.shape)
            found[key] = run if place.is_run else place.pick(run, packing.parts(linear.shape)[key])
        return found

    def located(self, linear: Linear) -> dict[str, Stored]:
        """Where the tensors of one matrix lie, by meaning: of a stack of experts, its own row at most."""
        packing = self.container.packing(self.formats[linear.name])
        place, found = self.container.place(self.architecture, linear), {}
        for key, part in packing.parts(linear.shape).items():
            whole = self.where(place.tensor(part).name)
            start, run = place.run(part)
            found[key] = Stored(TensorInfo(whole.info.name, run.dtype, run.shape), whole.file, whole.offset + start)
        return found

    def decode(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A linear's weights [O, I], or a small tensor, in F32 on `device`: exactly the values that the file means.

        `name` is the tensor's ("….q_proj.weight") or the linear's. Raises `CheckpointError` when a
        matrix is not finite or its magnitude cannot be that of a weight.
        """
        linear = self.architecture.by_name.get(name.removesuffix(".weight"))
        if linear is None:
            return self.read(name).to(device).float()
        return self.value(linear, self.parts(linear), device)

    def value(self, linear: Linear, parts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Tensor:
        """What `parts(linear)` mean, for a caller that reads ahead of decoding. Raises as `decode` does."""
        packing = self.container.packing(self.formats[linear.name])
        self.check_scales(linear, parts)
        w_OI = packing.decode({key: part.to(device) for key, part in parts.items()}, linear.shape)
        rms = float(torch.linalg.vector_norm(w_OI)) / max(1, w_OI.numel()) ** 0.5
        if rms or w_OI.any():  # a norm of nought may be an underflow
            self.check_magnitude(linear, parts, rms)
        return w_OI

    def check_scales(self, linear: Linear, parts: Mapping[str, Tensor]) -> None:
        """Raises `CheckpointError`, naming tensor and file, for scales of `parts(linear)` that cannot be right."""
        if (found := damaged_scales(self.container.packing(self.formats[linear.name]), parts)) is not None:
            raise self.damaged(self.located(linear)[found[0]], found[1])

    def check_parts(self, linear: Linear, parts: Mapping[str, Tensor]) -> None:
        """As `check_scales`, and for codes that are NaN or infinite."""
        if (found := damage(self.container.packing(self.formats[linear.name]), parts)) is not None:
            raise self.damaged(self.located(linear)[found[0]], found[1])

    def check_magnitude(self, linear: Linear, parts: Mapping[str, Tensor], rms: float) -> None:
        """Refuse a root mean square that is no number, or as large or small as only a misread scale makes it."""
        low, high = PLAUSIBLE_RMS
        if low < rms < high:
            return
        self.check_parts(linear, parts)
        where = self.located(linear)
        key = "blocks" if "blocks" in where else "codes"
        raise CheckpointError(
            f"{self.path}: {linear.name} decodes to a root mean square of {rms:.3g}, wanted {low:g} to {high:g}; "
            f"{where[key].info.name} in {where[key].file} is damaged or not of the kind that config.json says"
        )

    def damaged(self, where: Stored, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path / where.file}: {where.info.name} holds {what}; fetch the file again, or make it again"
        )

    def check_values(self) -> None:
        """Look at every value outside the linears: norms, routers, correction biases, embedding, head, vision.

        Call it before long work: they are little of a model, and NaN in one of them is in everything that comes of it
        (in a correction bias it gives that expert to every token). Reads them once; some 2 GB a second from memory.
        Raises `CheckpointError`, naming tensor and file.
        """
        assert self.are_numbers

    @cached_property
    def are_numbers(self) -> bool:
        for info in self.architecture.tensors if self.stored else ():
            for start in range(0, info.bytes, LOOK_BYTES):
                part = self.load(info.name, start, min(LOOK_BYTES, info.bytes - start))
                if what := nan_or_infinite(part):
                    where = f", from element {start // part.itemsize:,} on" if start else ""
                    raise self.damaged(self.where(info.name), what + where)
        return True


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one sentence why a file of a checkpoint cannot be read."""
    try:
        yield
    except FileError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; check the path, or fetch it again"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    with reading(path):
        there = (path / "config.json").exists()
    if not there:
        raise CheckpointError(f"{path} has no config.json; name the folder of a model")
    return read_object(path / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """A file of one JSON object. Raises `CheckpointError`."""
    try:
        with reading(path):
            found = json.loads(decoded(read_file(path, path.parent)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, wanted an object; fetch it again")
    return found


def read_shards(path: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files, and a check that the index names the same ones."""
    found: dict[str, Stored] = {}
    files = sorted(file for file in path.glob("*.safetensors") if not is_hidden(file.name))
    for file in files:
        for info, start in read_header(file):
            if info.name in found:
                raise CheckpointError(
                    f"{info.name} stands in {found[info.name].file} and in {file.name}; remove the stale file"
                )
            found[info.name] = Stored(info, file.name, start)
    if (path / INDEX).exists():
        mapped = read_object(path / INDEX).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(file, str) for file in mapped.values()):
            raise CheckpointError(f"{path / INDEX} has no weight_map of tensors to shards; fetch it again")
        compare_index(path, mapped, {f.name for f in files}, found)
    return found


def compare_index(path: Path, mapped: Mapping[str, str], files: set[str], found: Mapping[str, Stored]) -> None:
    if lost := sorted(set(mapped.values()) - files):
        raise CheckpointError(f"{path} lacks the shard {sample(lost)} that its index names; fetch it")
    for name, file in mapped.items():
        if name not in found or found[name].file != file:
            real = f"is in {found[name].file}" if name in found else "is in no shard"
            where = f"{plain(name)} in {plain(file)}"
            raise CheckpointError(f"the index of {path} puts {where}, and it {real}; fetch both again")
    if extra := sorted(set(found) - set(mapped)):
        raise CheckpointError(f"{path} holds {sample(extra)}, which its index does not name; remove the stale shard")


def read_header(file: Path) -> list[tuple[TensorInfo, int]]:
    """Entries of one safetensors header, with where each starts in the file.

    The header is taken for hostile: lengths, dtypes, shapes and offsets are checked before use, and the
    ranges have to fill the file exactly. Raises `CheckpointError`.
    """
    with reading(file), open_file(file, file.parent) as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(f"{file} is not a complete safetensors file ({size:,} bytes); fetch it again")
        text = f.read(length)
    base, at, found = 8 + length, 0, []
    for info, start, end in sorted(parse_header(file, text), key=lambda e: e[1:]):
        if start != at or end - start != info.bytes:
            raise CheckpointError(
                f"{file} gives {info.name} the bytes {start:,} to {end:,}, wanted {info.bytes:,} bytes at {at:,}; "
                "fetch it again"
            )
        found.append((info, base + start))
        at = end
    if base + at != size:
        raise CheckpointError(f"{file} has {size:,} bytes, and its header describes {base + at:,}; fetch it again")
    return found


def parse_header(file: Path, text: bytes) -> list[tuple[TensorInfo, int, int]]:
    """Each tensor with its range, in plain and plausible numbers. Raises `CheckpointError`."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a header that is not valid JSON ({error}); fetch it again") from error
    found = []
    for name, entry in header.items() if isinstance(header, dict) else [("the header", header)]:
        if name == "__metadata__":
            if isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values()):
                continue
            raise CheckpointError(
                f"{file} has __metadata__ = {reprlib.repr(entry)}, wanted an object of strings; fetch it again"
            )
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]}:
                if dtype not in DTYPES:
                    raise CheckpointError(f"{file} stores {name!a:.200} as {dtype!a:.20}, which moesaic does not read")
                if (
                    name.isprintable()
                    and len(shape) <= MOST_AXES
                    and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
                ):
                    found.append((TensorInfo(name, dtype, tuple(shape)), start, end))
                    continue
        raise CheckpointError(
            f"{file} describes {name!a:.200} as {reprlib.repr(entry)}, which is not a tensor; fetch it again"
        )
    return found


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names all differ."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} stands there twice")
    return found


def sample(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(plain, names[:most])) + more


def plain(name: str) -> str:
    """A name that somebody else chose, as one line of a sentence."""
    return name if name.isprintable() and len(name) <= 200 else f"{name!a:.200}"
