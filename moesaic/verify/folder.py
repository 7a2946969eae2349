"""What an export's folder says of itself, and what its plan makes of the source: all but the tensors' values.

One expert count everywhere, a true index, nothing half-written, every small file as it was written and as the source
has it. Leaves out tensors (verify/__init__.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint import INDEX, Checkpoint, read_object
from ..checkpoint.containers.base import inventory
from ..checkpoint.digests import NOTE as DIGESTS
from ..checkpoint.digests import Digests, load, of_file
from ..errors import InputError, MoesaicError
from ..families import expert_counts
from ..files import same_files
from ..plan import Plan
from ..plan.blueprint import Blueprint
from ..plan.pieces import NOTE, carried
from ..rounding import rounding_named
from .verdict import Verdict


def check_digests(export: Checkpoint, has_source: bool, verdict: Verdict) -> Digests:
    """Every file as it was written, by its SHA-256; returns those of the tensors. Says what cannot be told."""
    try:
        found = load(export.path)
    except InputError as error:
        verdict.add("digest", DIGESTS, f"cannot be believed: {error}")
        return {}
    if found is None and (export.path / NOTE).exists():
        verdict.notes.append(
            f"whether anything changed since it was written is unknown: no {DIGESTS}, as in older exports"
        )
    tensors, files = found or ({}, {})
    for name, wanted in sorted(files.items()):
        verdict.compared["digest"] += 1
        try:
            mine = of_file(export.path / name, export.path)
        except OSError as error:
            verdict.add("digest", name, f"was written with this export, and cannot be read: {error}")
            continue
        if mine != wanted:
            what = f"is not what was written: its SHA-256 is {mine[:12]}…, wanted {str(wanted)[:12]}…"
            verdict.add("digest", name, what)
    if not has_source:
        what = "what was written is here unchanged, and whether it is right" if found else "whether any value is right"
        verdict.notes.append(f"{what} is unknown without the source (--source)")
    return tensors


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


def blueprint_of(export: Checkpoint, source: Checkpoint, bad: dict[str, str], verdict: Verdict) -> Blueprint | None:
    """What the export should be, by the plan that travels in it. None where that plan cannot be believed."""
    note = export.path / NOTE
    if not note.exists():
        raise InputError(f"{export.path} has no {NOTE}, so what it should be is unknown; verify it without a source")
    try:
        blueprint = Blueprint.of(source, Plan.load(note, {"source": source.identity}))
        rounding_named(blueprint.plan.rounding)
    except MoesaicError as error:
        verdict.add("plan", NOTE, f"is not this export's: {error}")
        return None
    wanted = {t.name for t in inventory(blueprint.architecture, blueprint.container, blueprint.formats)}
    for name in sorted((wanted ^ set(export.stored)) - set(bad)):
        bad[name] = (
            "is missing, and the plan makes it" if name in wanted else "is not in what the plan makes of the source"
        )
        verdict.add("structure", name, bad[name])
    for key in differing(blueprint.config, export.config):
        verdict.add("counts", f"config.json {key}", "is not what the plan makes of the source's")
    for file in carried(source.path):
        verdict.compared["files"] += 1
        if not (export.path / file).exists():
            verdict.add("files", str(file), "was not carried along from the source")
        elif not same_files(source.path / file, export.path / file):
            verdict.add("files", str(file), "differs from the source's")
    return blueprint


def differing(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names of the keys that differ between two configs."""
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from differing(x, y, f"{path}{key}.")
        elif x != y or (key in a) != (key in b):
            yield path + key
