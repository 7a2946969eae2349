"""Reopen an export and believe nothing: structure, counts, bytes, kept rows, values.

Tensors are read by the safetensors library, not by the code that wrote them. Without the source,
everything that a folder can say about itself is checked; with it, every tensor is compared with what
the plan says it is: copied bytes, sliced rows, what an overlay held, or what rounding the source again gives. Leaves
out quality (evaluate) and engines (tests/engines).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import overlay
from .checkpoint import INDEX, PLAUSIBLE_RMS, Checkpoint, read_object
from .containers import Packing, siblings
from .containers.base import inventory
from .damage import not_finite
from .errors import InputError, MoesaicError
from .export import NOTE, carried, in_kernels, prepare_kernels, recoded, requantized, round_together, rounding_of
from .families import Linear, expert_counts
from .files import same_files
from .plan import Plan
from .progress import Meter, progress
from .reader import Reader
from .rounding import round_siblings
from .target import Target, is_made_of_source, keeps_bytes, keeps_values
from .verdict import Verdict

RMS_RATIO = (0.5, 2.0)  # decoded over source; rounding moves it by per cents, a wrong scale by powers
CLOSE = 0.7  # error over weight, root mean squares: two bits stay below it, scales twice too large do not
THREADS = 2
REFERENCE_EVERY = 16  # one group in so many is rounded by the reference, the others by the kernels held to it
AGAINST_SOURCE = ("bytes", "rows", "codes", "overlay", "near")
# near: rounded on text without an overlay, so that size and error alone can be told

Tensors = Mapping[str, Mapping[str, Tensor]]  # linear -> its tensors by meaning


@dataclass(frozen=True)
class Sides:
    """The export, and beside it the source and what the plan makes of it, if they are known."""

    export: Reader
    source: Reader | None
    target: Target | None
    bad: Mapping[str, str]  # tensors whose header entry already has a finding


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
    target = target_of(export, source, bad, verdict) if source is not None else None
    if target is not None:
        prepare_kernels(target, quiet)
    reader = Reader(source) if source is not None and target is not None else None
    sides = Sides(Reader(export), reader, target, bad)
    with progress("verify", sum(s.info.bytes for s in export.stored.values()), "B", quiet) as meter:
        try:
            check_tensors(sides, verdict, meter)
        except (OSError, SafetensorError) as error:
            verdict.add("structure", str(out), f"is refused by the safetensors library: {error}")
            return verdict
    check_coverage(sides, verdict)
    return verdict


def check_folder(export: Checkpoint, verdict: Verdict) -> None:
    """What the folder's small files say: one expert count everywhere, a true index, nothing half-written."""
    experts = export.architecture.experts
    for where, count in expert_counts(export.config):
        verdict.compared["counts"] += 1
        if count != experts:
            verdict.add("counts", f"config.json {where}", f"is {count}, and the layers hold {experts} experts")
    for leftover in sorted(export.path.rglob(".*.partial")):
        verdict.add("files", str(leftover.relative_to(export.path)), "is half-written; run the export again")
    index, payload = export.path / INDEX, sum(s.info.bytes for s in export.stored.values())
    if index.exists():
        verdict.compared["index"] += 1
        metadata = read_object(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != payload and (export.path / NOTE).exists():  # released files lie here; exports must not
            verdict.add("index", INDEX, f"says total_size {total}, and the shards hold {payload} bytes")
    elif len({s.file for s in export.stored.values()}) > 1:
        verdict.add("index", INDEX, "is missing, and the model has several shards")


def target_of(export: Checkpoint, source: Checkpoint, bad: dict[str, str], verdict: Verdict) -> Target | None:
    """What the export should be, by the plan that travels in it. None where that plan cannot be believed."""
    note = export.path / NOTE
    if not note.exists():
        raise InputError(f"{export.path} has no {NOTE}, so what it should be is unknown; verify it without a source")
    try:
        target = Target.of(source, Plan.load(note, {"source": source.identity}))
        rounding_of(target.plan)
    except MoesaicError as error:
        verdict.add("plan", NOTE, f"is not this export's: {error}")
        return None
    wanted = {t.name for t in inventory(target.architecture, target.container, target.formats)}
    for name in sorted((wanted ^ set(export.stored)) - set(bad)):
        bad[name] = (
            "is missing, and the plan makes it" if name in wanted else "is not in what the plan makes of the source"
        )
        verdict.add("structure", name, bad[name])
    for key in differing(target.config, export.config):
        verdict.add("counts", f"config.json {key}", "is not what the plan makes of the source's")
    for file in carried(source.path):
        verdict.compared["files"] += 1
        if not (export.path / file).exists():
            verdict.add("files", str(file), "was not carried along from the source")
        elif not same_files(source.path / file, export.path / file):
            verdict.add("files", str(file), "differs from the source's")
    return target


def differing(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names of the keys that differ between two configs."""
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from differing(x, y, f"{path}{key}.")
        elif x != y or (key in a) != (key in b):
            yield path + key


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
    target = sides.target
    for group in siblings(sides.export.checkpoint.architecture.linears):
        alone = [n for n in group if target is None or n.name in target.plan.overlaid]
        rest = tuple(n for n in group if n not in alone)
        if target is None or any(n.name not in target.origin or keeps_bytes(target, n) for n in rest):
            alone, rest = list(group), ()
        yield from ((n,) for n in alone)
        if rest:
            yield rest


def check_small(sides: Sides, name: str, meter: Meter) -> Verdict:
    """A norm, embedding, router or vision tensor: finite, and the source's own bytes or rows."""
    verdict, bad, same, source = Verdict(), 0, True, sides.source
    rows = None if sides.target is None else kept_rows(sides.target, name)
    wanted_digest = None if sides.target is None else sides.target.plan.overlaid.get(name)
    if wanted_digest is not None:
        source = None
        check_overlaid(name, sides.export.blocks(name), 1, wanted_digest, verdict)
    for mine, wanted in side_by_side(sides.export, source, name, rows):
        bad += not_finite(mine)
        same &= wanted is None or same_bytes(mine, wanted)
        meter.advance(mine.nbytes)
    verdict.compared["finite"] += 1
    if bad:
        verdict.add("finite", name, f"holds {bad:,} values that are no numbers")
    if source is not None:
        verdict.compared["bytes" if rows is None else "rows"] += 1
        if not same:
            what = "differs from the source's" + ("" if rows is None else " kept rows")
            verdict.add("bytes" if rows is None else "rows", name, what)
    return verdict


def side_by_side(
    export: Reader, source: Reader | None, name: str, rows: tuple[int, ...] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Blocks of a tensor, each with the source's, or None where there is none; kept rows in one block."""
    if source is None:
        yield from zip(export.blocks(name), itertools.repeat(None))
    elif rows is not None:
        yield export.tensor(name), source.tensor(name)[list(rows)]
    else:
        yield from itertools.zip_longest(export.blocks(name), source.blocks(name), fillvalue=torch.empty(0))


def kept_rows(target: Target, name: str) -> tuple[int, ...] | None:
    """Which rows of the source's tensor stand in the export's; None: all."""
    plan, rows_of = target.plan, target.architecture.rows_of
    return plan.kept[rows_of[name]] if plan.kept and name in rows_of else None


def check_linears(sides: Sides, group: tuple[Linear, ...], by_reference: bool, meter: Meter) -> Verdict:
    """Matrices that share a second level of scale: finite, of a weight's magnitude, and what the plan says they are."""
    verdict, target = Verdict(), sides.target
    whole = [n for n in group if not any(name in sides.bad for name in sides.export.names(n))]
    stored = {linear.name: sides.export.parts(linear) for linear in whole}
    proven = len(whole) == len(group) and not by_reference and made_again(sides, group, stored, verdict)
    sound = [] if proven else [check_values(n, sides.export.packing(n), stored[n.name], verdict) for n in whole]
    if not proven and sides.source is not None and target is not None:
        for linear in whole:
            if keeps_bytes(target, linear):
                wanted = sides.source.parts(target.origin[linear.name])
                verdict.compared["bytes"] += len(stored[linear.name])
                for key in differing_parts(stored[linear.name], wanted):
                    verdict.add("bytes", f"{linear.name} ({key})", "differs from the source's")
        if len(whole) == len(group) and all(sound) and not any(keeps_bytes(target, n) for n in group):
            if group[0].name in target.plan.overlaid:
                check_taken(sides.source, target, group[0], stored[group[0].name], verdict)
            elif keeps_values(target, group[0]):
                check_recoded(sides.source, target, group, stored, verdict)
            else:
                check_rounded(sides.source, target, group, stored, by_reference, verdict)
    meter.advance(sum(t.nbytes for parts in stored.values() for t in parts.values()))
    return verdict


def made_again(sides: Sides, group: tuple[Linear, ...], stored: Tensors, verdict: Verdict) -> bool:
    """Whether kernels make these very bytes of the source, close to its weights: then no value has to be looked at."""
    source, target = sides.source, sides.target
    if source is None or target is None or any(keeps_values(target, n) for n in group):
        return False
    rounding, (low, high) = rounding_of(target.plan), PLAUSIBLE_RMS
    if not (rounding.kernel and is_made_of_source(target, group[0]) and in_kernels(target, group)):
        return False
    again = list(requantized(target, group, rounding.kernel == "searched", source.parts, measure=True))
    squares = {n.name: (made.squared_error or 0.0, made.squared_weight or 0.0) for n, (_, made) in zip(group, again)}
    for linear, (wanted, _) in zip(group, again):
        error, weight = squares[linear.name]
        near = error <= CLOSE**2 * weight and low < (weight / linear.elements) ** 0.5 < high
        if not near or differing_parts(stored[linear.name], wanted):
            return False
    verdict.errors |= squares
    count = sum(len(wanted) for wanted, _ in again)
    verdict.compared.update(finite=count, codes=count)
    return True


def check_values(linear: Linear, packing: Packing, stored: Mapping[str, Tensor], verdict: Verdict) -> bool:
    """Decoded weights are finite, and neither too small nor of an impossible size. False where nothing decodes."""
    verdict.compared["finite"] += len(stored)
    try:
        w_OI = packing.decode(stored, linear.shape)
    except MoesaicError as error:
        verdict.add("structure", linear.name, f"does not decode: {error}")
        return False
    rms, (low, high) = root_mean_square(w_OI), PLAUSIBLE_RMS
    if bad := not_finite(w_OI):
        verdict.add("finite", linear.name, f"decodes to {bad:,} values that are no numbers")
    elif not low < rms < high and bool(w_OI.any()):
        verdict.add("magnitude", linear.name, f"decodes to a root mean square of {rms:.3g}; no weight matrix has that")
    return True


def check_recoded(source: Reader, target: Target, group: tuple[Linear, ...], stored: Tensors, verdict: Verdict) -> None:
    """The very values of the source under other codes: both sides decoded, and recoding done again."""
    made = iter(recoded(target, group))
    for linear in group:
        packing, parts, origin = target.packing(linear), stored[linear.name], target.origin[linear.name]
        wanted = {key: next(made) for key in packing.parts(linear.shape)}
        w_OI = source.packing(origin).decode(source.parts(origin), origin.shape)
        verdict.compared["values"] += 1
        verdict.compared["codes"] += len(parts)
        if wrong := int((packing.decode(parts, linear.shape) != w_OI).sum()):
            verdict.add("values", linear.name, f"has {wrong:,} of {w_OI.numel():,} weights that are not the source's")
        elif keys := differing_parts(parts, wanted):
            verdict.add("codes", linear.name, f"means the source's weights by other {', '.join(keys)}")


def check_rounded(
    source: Reader, target: Target, group: tuple[Linear, ...], stored: Tensors, by_reference: bool, verdict: Verdict
) -> None:
    """Round the source again and compare codes and scales: exact for a rounding that needs no data."""
    weights = [source.packing(o).decode(source.parts(o), o.shape) for o in (target.origin[n.name] for n in group)]
    again = rounded_again(target, group, weights, by_reference)
    for i, (linear, w_OI) in enumerate(zip(group, weights)):
        packing, parts = target.packing(linear), stored[linear.name]
        mine = packing.decode(parts, linear.shape)
        compare(linear, mine, w_OI, verdict)
        if again is None:
            verdict.compared["near"] += len(parts)
            continue
        verdict.compared["codes"] += len(parts)
        wanted = again[i]
        if wrong := differing_parts(parts, wanted):
            count = int((mine != packing.decode(wanted, linear.shape)).sum())
            what = f"has {', '.join(wrong)} and {count:,} of {mine.numel():,} weights that rounding the source does not give"
            verdict.add("codes", linear.name, what)


def compare(linear: Linear, mine_OI: Tensor, w_OI: Tensor, verdict: Verdict) -> None:
    """Values beside the source's: their error is noted, and they are about as large."""
    ratio = root_mean_square(mine_OI) / max(root_mean_square(w_OI), 1e-30)
    if not RMS_RATIO[0] < ratio < RMS_RATIO[1] and bool(w_OI.any()):
        verdict.add("magnitude", linear.name, f"is {ratio:.3g} times as large as the source's")
    verdict.errors[linear.name] = sum_of_squares(mine_OI - w_OI), sum_of_squares(w_OI)


def check_taken(source: Reader, target: Target, linear: Linear, stored: Mapping[str, Tensor], verdict: Verdict) -> None:
    """A matrix of an overlay: what the plan has the digest of, and where it was rounded, about as large as the source's."""
    packing = target.packing(linear)
    tensors = [stored[key] for key in packing.parts(linear.shape)]
    check_overlaid(linear.name, tensors, len(tensors), target.plan.overlaid[linear.name], verdict)
    if linear.unit not in target.keeping:
        origin = target.origin[linear.name]
        w_OI = source.packing(origin).decode(source.parts(origin), origin.shape)
        compare(linear, packing.decode(stored, linear.shape), w_OI, verdict)


def check_overlaid(name: str, tensors: Iterable[Tensor], count: int, wanted: str, verdict: Verdict) -> None:
    verdict.compared["overlay"] += count
    if overlay.digest(tensors) != wanted:
        verdict.add("overlay", name, "is not what the plan's overlay held")


def rounded_again(
    target: Target, group: tuple[Linear, ...], weights: list[Tensor], by_reference: bool
) -> list[dict[str, Tensor]] | None:
    """The tensors that rounding the source gives, by kernels where there are some; None where only data would tell."""
    rounding = rounding_of(target.plan)
    if rounding.needs:
        return None
    packings = [target.packing(n) for n in group]
    if by_reference:
        pairs = round_siblings(rounding, weights, packings[0].number_format)
        return [target.pack(n, *pair) for n, pair in zip(group, pairs)]
    made = iter(round_together(target, group, rounding))
    return [{key: next(made) for key in packing.parts(n.shape)} for n, packing in zip(group, packings)]


def check_coverage(sides: Sides, verdict: Verdict) -> None:
    """Where no header entry was condemned, every tensor was looked at, and compared with the source if there is one."""
    model, compared = sides.export.checkpoint, verdict.compared
    there = len(model.architecture.tensors) + sum(len(sides.export.names(n)) for n in model.architecture.linears)
    looked = {"looked at": compared["finite"]}
    if sides.target is not None:
        looked["compared with the source"] = sum(compared[check] for check in AGAINST_SOURCE)
    for what, count in looked.items() if not sides.bad else ():
        if count != there and not any(f.check == "structure" for f in verdict.findings):
            verdict.add(
                "structure", str(sides.export.checkpoint.path), f"has {there:,} tensors and {count:,} were {what}"
            )


def differing_parts(mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [key for key in mine if key not in wanted or not same_bytes(mine[key], wanted[key])]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Headers are compared elsewhere; to containers, the same bytes may be of another dtype and shape."""
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def root_mean_square(w: Tensor) -> float:
    return (sum_of_squares(w) / max(1, w.numel())) ** 0.5


def sum_of_squares(w: Tensor) -> float:
    """Piece by piece: over 20 million F32 at once torch's sum comes out .2 % too small."""
    return sum(float(torch.linalg.vector_norm(piece)) ** 2 for piece in w.reshape(-1).split(1 << 16))
