"""Reopen an export and believe nothing: structure, counts, bytes, kept rows, values.

Tensors are read by the safetensors library, not by the code that wrote them. Without the source,
everything that a folder can say about itself is checked, and every tensor and file is what was written, by its
SHA-256; with it, every tensor is compared with what the plan says it is: copied bytes, sliced rows, what an overlay
held, or what rounding the source again gives. Leaves out quality (evaluate) and engines (tests/engines).
"""

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.containers import siblings
from ..checkpoint.damage import not_finite
from ..checkpoint.safetensors_reader import SafetensorsReader
from ..errors import InputError, MoesaicError
from ..export import prepare_kernels
from ..export.claim import outdated
from ..families import Linear
from ..plan.blueprint import Blueprint, keeps_bytes
from ..plan.pieces import NOTE
from ..progress import Meter, progress
from .folder import blueprint_of, check_digests, check_folder
from .linears import Sides, check_digest, check_linears, check_overlaid, raw, same_bytes
from .verdict import Verdict

THREADS = 2
REFERENCE_EVERY = 16  # one group in so many is rounded by the reference, the others by the kernels held to it
AGAINST_SOURCE = ("bytes", "rows", "codes", "overlay", "near")
# near: rounded on text without an overlay, or by another version, so that size and error alone can be told


def verify(out: Path, source: Checkpoint | None = None, quiet: bool = False) -> Verdict:
    """Check the model folder `out`, and against its source if that is at hand.

    Reads every byte of the export and the source's matching tensors, and rounds again what was rounded without text;
    memory is a few matrices. Raises only where there is nothing to check; all else is a `Finding`.
    """
    verdict = Verdict()
    try:
        export = Checkpoint.open(out, whole=False)
    except MoesaicError as error:
        verdict.add("structure", str(out), str(error))
        return verdict
    if not export.has_weights:
        raise InputError(f"{out} holds no weights; name the folder of an export")
    bad = export.differences()
    for name, what in bad.items():
        verdict.add("structure", name, what)
    verdict.compared["structure"] = len(export.inventory)
    check_folder(export, verdict)
    digests = check_digests(export, source is not None, verdict)
    blueprint = blueprint_of(export, source, bad, verdict) if source is not None else None
    if blueprint is not None:
        prepare_kernels(blueprint, quiet)
    reader = SafetensorsReader(source) if source is not None and blueprint is not None else None
    sides = Sides(
        SafetensorsReader(export), reader, blueprint, bad, check_versions(export, blueprint, verdict), digests
    )
    with progress("verify", sum(s.info.bytes for s in export.stored.values()), "B", quiet) as meter:
        try:
            check_tensors(sides, verdict, meter)
        except (OSError, SafetensorError) as error:
            verdict.add("structure", str(out), f"is refused by the safetensors library: {error}")
            return verdict
    check_coverage(sides, verdict)
    return verdict


def check_versions(export: Checkpoint, blueprint: Blueprint | None, verdict: Verdict) -> frozenset[str]:
    """Formats that cannot be rounded again here, because the export was rounded by another version; and a note of that."""
    if blueprint is None or (told := outdated(export.path / NOTE, blueprint)) is None:
        return frozenset()
    what, formats = told
    verdict.notes.append(
        f"{export.path} was rounded by {what}; so its values are held to the source by their error alone, and that "
        "version verifies its codes"
    )
    return formats


def check_tensors(sides: Sides, verdict: Verdict, meter: Meter) -> None:
    """Every tensor that its header entry does not already condemn, by several threads, reported in the model's order."""
    architecture = sides.export.checkpoint.architecture
    work = [
        partial(check_small, sides, info.name, meter) for info in architecture.tensors if info.name not in sides.bad
    ]
    groups = enumerate(together(sides))
    work += [partial(check_linears, sides, group, i % REFERENCE_EVERY == 0, meter) for i, group in groups]
    pool = ThreadPoolExecutor(THREADS)
    try:
        for found in pool.map(lambda job: job(), work):
            verdict.take(found)
    finally:
        pool.shutdown(cancel_futures=True)


def together(sides: Sides) -> Iterator[tuple[Linear, ...]]:
    """Matrices that were rounded together, and the others one by one: so much is in memory at a time."""
    blueprint = sides.blueprint
    for group in siblings(sides.export.checkpoint.architecture.linears):
        alone = [n for n in group if blueprint is None or n.name in blueprint.plan.overlaid]
        rest = tuple(n for n in group if n not in alone)
        if blueprint is None or any(n.name not in blueprint.origin or keeps_bytes(blueprint, n) for n in rest):
            alone, rest = list(group), ()
        yield from ((n,) for n in alone)
        if rest:
            yield rest


def check_small(sides: Sides, name: str, meter: Meter) -> Verdict:
    """A norm, embedding, router or vision tensor: finite, and the source's own bytes or rows."""
    verdict, bad, same, source = Verdict(), 0, True, sides.source
    rows = None if sides.blueprint is None else kept_rows(sides.blueprint, name)
    wanted_digest = None if sides.blueprint is None else sides.blueprint.plan.overlaid.get(name)
    if wanted_digest is not None:
        source = None
        check_overlaid(name, sides.export.blocks(name), 1, wanted_digest, verdict)
    written = hashlib.sha256()
    for mine, wanted in side_by_side(sides.export, source, name, rows):
        bad += not_finite(mine)
        if sides.digests:
            written.update(raw(mine))
        same &= wanted is None or same_bytes(mine, wanted)
        meter.advance(mine.nbytes)
    verdict.compared["finite"] += 1
    if bad:
        origin = ", as the source's does: fetch that again" if source is not None and same else ""
        verdict.add("finite", name, f"holds {bad:,} NaN or infinite values{origin}")
    if source is not None:
        verdict.compared["bytes" if rows is None else "rows"] += 1
        if not same:
            what = "differs from the source's" + ("" if rows is None else " kept rows")
            verdict.add("bytes" if rows is None else "rows", name, what)
    if sides.digests:
        check_digest(sides.digests.get(name), written.hexdigest(), name, verdict)
    return verdict


def side_by_side(
    export: SafetensorsReader, source: SafetensorsReader | None, name: str, rows: tuple[int, ...] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Blocks of a tensor, each with the source's, or None where there is none; kept rows in one block."""
    if source is None:
        yield from zip(export.blocks(name), itertools.repeat(None))
    elif rows is not None:
        yield export.tensor(name), source.tensor(name)[list(rows)]
    else:
        yield from itertools.zip_longest(export.blocks(name), source.blocks(name), fillvalue=torch.empty(0))


def kept_rows(blueprint: Blueprint, name: str) -> tuple[int, ...] | None:
    """Which rows of the source's tensor stand in the export's; None: all."""
    plan, rows_of = blueprint.plan, blueprint.architecture.rows_of
    return plan.kept[rows_of[name]] if plan.kept and name in rows_of else None


def check_coverage(sides: Sides, verdict: Verdict) -> None:
    """Where no header entry was condemned, every tensor was looked at, and compared with the source if there is one."""
    model, compared = sides.export.checkpoint, verdict.compared
    there = len(model.architecture.tensors) + sum(len(sides.export.names(n)) for n in model.architecture.linears)
    looked = {"looked at": compared["finite"]}
    if sides.blueprint is not None:
        looked["compared with the source"] = sum(compared[check] for check in AGAINST_SOURCE)
    for what, count in looked.items() if not sides.bad else ():
        if count != there and not any(f.check == "structure" for f in verdict.findings):
            verdict.add(
                "structure", str(sides.export.checkpoint.path), f"has {there:,} tensors and {count:,} were {what}"
            )
