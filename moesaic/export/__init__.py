"""Write the export: source checkpoint + plan -> a model folder that an engine loads.

What keeps its format is copied byte for byte, whatever its name becomes; what changes is decoded,
rounded and packed, a few matrices in memory at a time. config.json is written last, so a folder with
one is whole; without one, the same call continues where the last stopped. The plan travels in the
export as moesaic/plan.json, and beside it the SHA-256 of every tensor and file (digests). Leaves out
choosing (plan) and believing (verify).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .. import kernels
from ..artifact import atomic, writing
from ..checkpoint import INDEX, PLAUSIBLE_RMS, Checkpoint, sample
from ..checkpoint.containers import siblings
from ..checkpoint.containers.base import DTYPES
from ..checkpoint.digests import Journal, of_bytes, of_file
from ..checkpoint.open import reading
from ..checkpoint.shards import SHARD_BYTES, index_of, plan_shards, write_shards
from ..errors import FaultError, InputError, PlanError, StaleError
from ..families import Linear
from ..files import open_file
from ..formats.recode import recode
from ..plan import Plan, overlay
from ..plan.blueprint import Blueprint, bound, is_made_of_source, keeps_bytes, keeps_values
from ..plan.pieces import NOTE, Makers, carried, sorted_pieces
from ..progress import progress
from ..rounding import Rounding, round_siblings, rounding_named
from .claim import claim

Read = Callable[[Linear], dict[str, Tensor]]  # of a matrix of the source: its tensors by meaning


def export(source: Checkpoint, plan: Plan, out: Path, quiet: bool = False, overlays: Path | None = None) -> Checkpoint:
    """Write the model that `plan` makes of `source` to the folder `out`, and open it.

    `overlays` is the folder in which those that the plan names lie; default: the export's own moesaic/.
    Memory: a few decoded matrices for each of two threads. Raises `PlanError` before the first byte
    when the plan cannot be carried out, `InputError` when `out` holds something else or the disk is
    too small. Interrupted at any byte, the same call continues.
    """
    blueprint, rounding = Blueprint.of(source, plan), rounding_named(plan.rounding)
    source.check_values()
    along = carried(source.path)
    if rounding.needs and any(is_made_of_source(blueprint, n) for n in blueprint.architecture.linears):
        raise PlanError(f"rounding {rounding.name} needs {', '.join(rounding.needs)}: round the plan on text first")
    if unknown := blueprint.uncalibrated:
        raise PlanError(
            f"the plan rounds activations as they come, and does not know how large {sample(unknown)} get; "
            "compress measures that on text"
        )
    try_recoding(blueprint)
    makers = Makers(
        taken=from_overlays(blueprint, overlays or out / "moesaic", (out / "config.json").exists()),
        rounded=partial(round_together, blueprint, rounding=rounding),
        recoded=partial(recoded, blueprint),
    )
    shards = plan_shards(sorted_pieces(blueprint, makers), SHARD_BYTES)
    claim(out, blueprint)
    prepare_kernels(blueprint, quiet)
    with progress("export", sum(s.payload_bytes for s in shards), "B", quiet) as meter:
        journal = Journal(out, {"source": source.identity})
        written = write_shards(out, shards, meter, journal)
        if not written == meter.done == blueprint.payload_bytes:
            raise FaultError(f"{written:,} bytes were written, the plan's are {blueprint.payload_bytes:,}")
    files = carry_along(source.path, along, out)
    texts = {
        INDEX: json.dumps(index_of(shards), indent=2) + "\n",
        "config.json": json.dumps(blueprint.config, indent=2, ensure_ascii=False) + "\n",
    }
    files |= {name: of_bytes(text.encode()) for name, text in texts.items()} | {NOTE: of_file(out / NOTE)}
    journal.finish([shard.file for shard in shards], files)
    for name, text in texts.items():
        write_text(out / name, text)
    return Checkpoint.open(out)


def from_overlays(blueprint: Blueprint, folder: Path, is_whole: bool) -> Callable[[Sequence[str]], Iterator[Tensor]]:
    """What the plan's overlays in `folder` hold. Of an export that `is_whole`, their tensors may be gone.

    Raises `InputError` for an overlay that is not there or incomplete, `StaleError` for one of another plan or source;
    and so does each tensor when its turn comes.
    """
    inputs, folders = bound(blueprint.source, blueprint.plan), dict[str, Path]()
    for name, digests in blueprint.plan.overlays.items():
        found = overlay.listing(folder / name, inputs)["items"]
        if found != digests:
            other = sorted(k for k in {*found, *digests} if found.get(k) != digests.get(k))
            raise StaleError(f"{folder / name} is not the overlay that the plan names: it differs in {sample(other)}")
        lost = [item for item in digests if not overlay.path_of(folder / name, item).exists()]
        if lost and not is_whole:
            raise InputError(
                f"{folder / name} lacks {sample(lost)}: an export took them in and they were removed, or they are lost; "
                "copy that export, or make the overlay again"
            )
        folders |= dict.fromkeys(digests, folder / name)

    def take(items: Sequence[str]) -> Iterator[Tensor]:
        for item in items:
            wanted = blueprint.item(item)
            tensors = overlay.get(folders[item], item, [t.name for t in wanted], inputs, blueprint.plan.overlaid[item])
            for info, tensor in zip(wanted, tensors):
                if (tensor.dtype, tuple(tensor.shape)) != (DTYPES[info.dtype], info.shape):
                    found = f"{tensor.dtype} {list(tensor.shape)}"
                    raise InputError(f"{info.name} of an overlay is {found}, wanted {info.dtype} {list(info.shape)}")
                yield tensor

    return take


def try_recoding(blueprint: Blueprint) -> None:
    """Recode one group of each kind: what a container cannot hold, it mostly cannot hold anywhere. Raises `PlanError`."""
    kept = [n for n in blueprint.architecture.linears if keeps_values(blueprint, n) and not keeps_bytes(blueprint, n)]
    kinds = {
        (group[0].role, group[0].projection, *(blueprint.formats[n.name] for n in group)): group
        for group in siblings(kept)
    }
    for group in kinds.values():
        for _ in recoded(blueprint, group):
            pass


def recoded(blueprint: Blueprint, group: tuple[Linear, ...]) -> Iterator[Tensor]:
    """The same values under other codes, or other bytes. Raises `PlanError` where the blueprint cannot hold them."""
    source = blueprint.source
    shared: list[Tensor] = []
    for linear in group:
        origin, packing = blueprint.origin[linear.name], blueprint.packing(linear)
        format = source.formats[origin.name]
        stored = source.parts(origin)
        source.check_parts(origin, stored)
        codes_OI, scales = source.container.packing(format).unpack(stored, origin.shape)
        what = f"{linear.unit} ({origin.name})"
        packed = packing.pack(*recode(what, format, blueprint.formats[linear.name], codes_OI, scales))
        if scales.shared is not None:
            shared += [s for s in (scales.shared, packing.unpack(packed, linear.shape)[1].shared) if s is not None]
            if not all(torch.equal(s, shared[0]) for s in shared):
                raise PlanError(
                    f"{what} has a second scale that {blueprint.container.name} cannot give it and the matrices fused with it; "
                    f"keep it in {source.container.name}"
                )
        yield from (packed[key] for key in packing.parts(linear.shape))


def round_together(blueprint: Blueprint, group: tuple[Linear, ...], rounding: Rounding) -> Iterable[Tensor]:
    """Round and pack matrices that a server fuses; they share a second level of scale. A kernel does it where one can."""
    if rounding.kernel and in_kernels(blueprint, group):
        return through_kernels(blueprint, group, rounding.kernel == "searched")
    return through_values(blueprint, group, rounding)


def in_kernels(blueprint: Blueprint, group: tuple[Linear, ...]) -> bool:
    """Whether kernels know these matrices' formats, as read and as written."""
    read = (blueprint.source.formats[blueprint.origin[n.name].name] for n in group)
    written = kernels.of(kernels.device()).TARGETS
    return all(f in kernels.SOURCES for f in read) and all(blueprint.packing(n).format in written for n in group)


def prepare_kernels(blueprint: Blueprint, quiet: bool) -> None:
    """Compile before a meter runs what will be needed while it does."""
    changed = (n for n in blueprint.architecture.linears if is_made_of_source(blueprint, n))
    written = {blueprint.packing(n).format for n in changed if in_kernels(blueprint, (n,))}
    if rounding_named(blueprint.plan.rounding).kernel and written:
        kernels.of(kernels.device()).prepare(written, quiet)


def through_values(blueprint: Blueprint, group: tuple[Linear, ...], rounding: Rounding) -> Iterator[Tensor]:
    """Decode, round, pack: the reference, and the way of every rounding that looks at data."""
    weights = [blueprint.source.decode(blueprint.origin[n.name].name) for n in group]
    for linear, rounded in zip(group, round_siblings(rounding, weights, blueprint.packing(group[0]).number_format)):
        packed = blueprint.pack(linear, *rounded)
        yield from (packed[key] for key in blueprint.packing(linear).parts(linear.shape))


def through_kernels(blueprint: Blueprint, group: tuple[Linear, ...], search: bool) -> Iterator[Tensor]:
    """Stored bytes to stored bytes, to the bit what `through_values` gives, without the matrix in between."""
    for packed, _ in requantized(blueprint, group, search, blueprint.source.parts):
        yield from packed.values()


def requantized(
    blueprint: Blueprint, group: tuple[Linear, ...], search: bool, read: Read, measure: bool = False
) -> Iterator[tuple[dict[str, Tensor], kernels.Requantized]]:
    """What kernels make of what `read` gives of each matrix: tensors by meaning, and (with `measure`) sums of squares."""
    source, device = blueprint.source, kernels.device()
    twin, origins = kernels.of(device), [blueprint.origin[n.name] for n in group]
    formats = [source.formats[origin.name] for origin in origins]
    stored = [kernel_input(source, origin, read(origin), device) for origin in origins]
    number_format, shared = blueprint.packing(group[0]).number_format, None
    with naming_damage(source, origins):
        if number_format.share:
            amax = [twin.amax(f, *parts) for f, parts in zip(formats, stored)]
            shared = number_format.share(torch.stack(amax).max())
    for linear, origin, format, parts in zip(group, origins, formats, stored):
        rounded = partial(twin.requantize, format, *parts, number_format, shared=shared, search=search)
        with naming_damage(source, [origin]):
            made = rounded(measure=measure)
        low, high = PLAUSIBLE_RMS
        if made.amax and not low * linear.elements**0.5 < made.amax < high:  # that bounds the root mean square too
            squared_weight = rounded(measure=True).squared_weight or 0.0
            source.check_magnitude(origin, source.parts(origin), (squared_weight / linear.elements) ** 0.5)
        packing = blueprint.packing(linear)
        packed = packing.write(made.stream_OS, made.scales, linear.shape) | blueprint.inputs(linear)
        yield {key: packed[key].cpu() for key in packing.parts(linear.shape)}, made


@contextmanager
def naming_damage(source: Checkpoint, linears: Sequence[Linear]) -> Iterator[None]:
    """Where kernels refuse a matrix, say which tensor of which file is damaged, if one is."""
    try:
        yield
    except PlanError:
        for linear in linears:
            source.check_parts(linear, source.parts(linear))
        raise


def kernel_input(
    source: Checkpoint, linear: Linear, parts: Mapping[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """A matrix as kernels read it, E4M3 or BF16 [O, I], and its scales, whatever container it lies in."""
    source.check_scales(linear, parts)
    packing = source.container.packing(source.formats[linear.name])
    stream_OS, scales = packing.read({key: part.to(device) for key, part in parts.items()}, linear.shape)
    return stream_OS.view(torch.bfloat16 if packing.format == "bf16" else torch.float8_e4m3fn), scales.blocks


def carry_along(source: Path, files: Sequence[Path], out: Path) -> dict[str, str]:
    """Copy what is `carried`; returns the SHA-256 of each file."""
    found = {}
    for file in files:
        with writing(out / file):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with open_file(source / file, source) as theirs, open(out / file, "wb") as ours:
                while part := read_part(source / file, theirs):
                    digest.update(part)
                    ours.write(part)
                ours.flush()
                os.fsync(ours.fileno())
        found[file.as_posix()] = digest.hexdigest()
    return found


def read_part(path: Path, file: BinaryIO) -> bytes:
    """The next of a file of the source's, empty at its end. Raises `CheckpointError`."""
    with reading(path):
        return file.read(1 << 20)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8")
