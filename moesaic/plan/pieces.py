"""What an export's folder will hold, before a byte of it is written: pieces of shards, files that go along, notes.

Sizes follow from shapes alone, so a plan can be weighed to the byte without its tensors. Leaves out computing
what is not copied (`Makers` are handed in), and writing (export).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import INDEX, Checkpoint, Stored, reading
from ..checkpoint.containers import siblings
from ..checkpoint.digests import NONE, listing
from ..checkpoint.shards import Piece, Shard
from ..families import Linear, TensorInfo
from ..files import check_size, walk
from .blueprint import Blueprint, keeps_bytes, keeps_values

NOTE = "moesaic/plan.json"
LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".partial")
LARGEST_CARRIED = 1 << 30  # bytes of a file beside the weights: tokenizers have some 30 MB
WRITTEN_ANEW = ("config.json", INDEX, "README.md")

Group = tuple[Linear, ...]  # matrices that a server fuses
Placed = tuple[tuple[str, int], Piece]  # file and offset in the source, where a piece comes in order


@dataclass(frozen=True)
class Makers:
    """What computes the tensors that are not copied; each gives them packed, in the order of the container's parts."""

    taken: Callable[[Sequence[str]], Iterable[Tensor]]  # items of the plan's overlays, by name
    rounded: Callable[[Group], Iterable[Tensor]]
    recoded: Callable[[Group], Iterable[Tensor]]  # the source's values in other codes or bytes


def sorted_pieces(blueprint: Blueprint, makers: Makers | None = None) -> list[Piece]:
    """All pieces, in the order in which their bytes lie in the source, so that disks read forwards.

    Without `makers` they tell sizes, and only what is copied can be written.
    """
    found = list(small_pieces(blueprint, makers)) + list(linear_pieces(blueprint, makers))
    return [piece for _, piece in sorted(found, key=lambda p: p[0])]


def small_pieces(blueprint: Blueprint, makers: Makers | None) -> Iterator[Placed]:
    source, plan = blueprint.source, blueprint.plan
    rows = {name: plan.kept[layer] for name, layer in blueprint.architecture.rows_of.items() if plan.kept}
    for info in blueprint.architecture.tensors:
        stored, make = source.where(info.name), None
        is_copied = info.name not in plan.overlaid and info.name not in rows
        if info.name in plan.overlaid:
            make = partial(makers.taken, (info.name,)) if makers else None
        elif info.name in rows:
            make = partial(slice_rows, source, info.name, rows[info.name])
        yield (stored.file, stored.offset), Piece((info,), (source.path, stored) if is_copied else None, make)


def slice_rows(source: Checkpoint, name: str, rows: tuple[int, ...]) -> Iterable[Tensor]:
    """Rows of a router weight or bias, in its stored dtype: no arithmetic touches them."""
    return (source.read(name)[list(rows)],)


def linear_pieces(blueprint: Blueprint, makers: Makers | None) -> Iterator[Placed]:
    changed = [n for n in blueprint.architecture.linears if not keeps_bytes(blueprint, n)]
    for linear in blueprint.architecture.linears:
        if keeps_bytes(blueprint, linear):
            yield from copies(blueprint, linear)
    for group in apart(blueprint, siblings(changed)):
        place = blueprint.container.place(blueprint.architecture, group[0])
        tensors = tuple(info for n in group for info in tensors_of(blueprint, n).values())
        first = next(iter(stored_parts(blueprint, group[0]).values()))
        if makers is None:
            make = None
        elif group[0].name in blueprint.plan.overlaid:
            make = partial(makers.taken, [n.name for n in group])
        elif keeps_values(blueprint, group[0]):
            make = partial(makers.recoded, group)
        else:
            make = partial(makers.rounded, group)
        yield (first.file, first.offset), Piece(tensors, make=make, row=place.row, rows=place.rows)


def apart(blueprint: Blueprint, groups: Iterable[tuple[Linear, ...]]) -> Iterator[tuple[Linear, ...]]:
    """Groups with what overlays hold apart from what they do not."""
    for group in groups:
        for inside in (True, False):
            if part := tuple(n for n in group if (n.name in blueprint.plan.overlaid) == inside):
                yield part


def copies(blueprint: Blueprint, linear: Linear) -> Iterator[Placed]:
    theirs, place = stored_parts(blueprint, linear), blueprint.container.place(blueprint.architecture, linear)
    for key, info in tensors_of(blueprint, linear).items():
        copy = (blueprint.source.path, theirs[key])
        check = None if key == "codes" else partial(check_copied, blueprint.source, blueprint.origin[linear.name], key)
        yield (theirs[key].file, theirs[key].offset), Piece((info,), copy, None, place.row, place.rows, check)


def check_copied(source: Checkpoint, linear: Linear, key: str) -> None:
    """Refuse damaged scales before they are copied: they are a thirtieth of a model and less."""
    where = source.located(linear)[key]
    offset = where.offset - source.where(where.info.name).offset
    part = source.load(where.info.name, offset, where.info.bytes).reshape(where.info.shape)
    source.check_scales(linear, {key: part})


def tensors_of(blueprint: Blueprint, linear: Linear) -> dict[str, TensorInfo]:
    """What the blueprint has of one matrix, by meaning: a tensor each, or a row of one."""
    module, parts = (
        blueprint.container.place(blueprint.architecture, linear).module,
        blueprint.packing(linear).parts(linear.shape),
    )
    return {key: TensorInfo(f"{module}.{part.suffix}", part.dtype, part.shape) for key, part in parts.items()}


def stored_parts(blueprint: Blueprint, linear: Linear) -> dict[str, Stored]:
    """Where the source has the tensors of a matrix of the blueprint, by meaning."""
    return blueprint.source.located(blueprint.origin[linear.name])


def digest_names(source: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """What digests.json will list, with digests of zeros: as long as it will be."""
    files = [*(f.as_posix() for f in carried(source)), INDEX, "config.json", NOTE]
    return listing({s.file: s.digests for s in shards}, dict.fromkeys(files, NONE))


def carried(source: Path) -> list[Path]:
    """Files that go along untouched, relative to the source: tokenizer, templates, licence, processor, remote code.

    Raises `CheckpointError` for a FIFO or device there, a link that leaves the source, and a file of a size that is not
    such a file's.
    """
    with reading(source):
        inside = [file.relative_to(source) for file in walk(source, "moesaic")]
        found = [f for f in inside if f.suffix not in LEFT_BEHIND and str(f) not in WRITTEN_ANEW]
        for file in found:
            check_size(source / file, LARGEST_CARRIED)
    return found


def noted(blueprint: Blueprint) -> dict[str, str]:
    """What an export is made from, in its note: the source, and versions of what rounds it."""
    return {"source": blueprint.source.identity} | blueprint.arithmetic
