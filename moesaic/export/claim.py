"""Whose an export's folder is: by which plan, of which source, rounded by which versions. Nothing is mixed."""

from pathlib import Path

from ..artifact import read_json
from ..checkpoint import Checkpoint
from ..errors import InputError, StaleError
from ..plan import Plan
from ..plan.blueprint import Blueprint
from ..plan.pieces import NOTE, noted


def claim(out: Path, blueprint: Blueprint) -> None:
    """Make `out` this export's folder, or find that it already is. Raises `StaleError` rather than mix two exports."""
    source, plan = blueprint.source, blueprint.plan
    check_free(out, source)
    if not (out / NOTE).exists():
        plan.save(out / NOTE, noted(blueprint))
        return
    if Plan.load(out / NOTE) != plan:
        raise StaleError(f"{out} holds an export by another plan; name another folder or remove it")
    if (told := outdated(out / NOTE, blueprint)) and not (out / "config.json").exists():
        raise StaleError(
            f"{out} was begun by another version: {told[0]}; finish it with that version, or remove the folder"
        )


def outdated(note: Path, blueprint: Blueprint) -> tuple[str, frozenset[str]] | None:
    """How versions in an export's note differ from what its matrices would now be rounded by, and in which formats.

    None where they do not, or where the note is of a time when there were none: then codes will tell.
    """
    found, wanted = read_json(note, "plan"), blueprint.arithmetic
    made, formats = found["inputs"], versions(wanted.get("formats", ""))
    if "rounding" not in made or not wanted:
        return None
    before = versions(str(made.get("formats", "")))
    if made["rounding"] != wanted["rounding"]:
        name, version = str(made["rounding"]).rpartition(" ")[::2]
        what = f"{name} version {version}, this moesaic has version {wanted['rounding'].rpartition(' ')[2]}"
        return f"{what} (it was rounded by {found.get('maker')})", frozenset(formats)
    if changed := sorted(f for f in formats if before.get(f) != formats[f]):
        what = f"{changed[0]} version {before.get(changed[0])}, this moesaic has version {formats[changed[0]]}"
        return f"{what} (it was rounded by {found.get('maker')})", frozenset(changed)
    return None


def versions(told: str) -> dict[str, str]:
    """ "int4_g64 1, mxfp4 1" as name -> version."""
    return dict(entry.rpartition(" ")[::2] for entry in told.split(", ") if entry)


def check_plan(out: Path, source: Checkpoint, plan: Plan) -> None:
    """Refuse an `out` that holds an export by another plan, whatever overlays `plan` is still to get. Errors as `check_free`."""
    check_free(out, source)
    if (out / NOTE).exists() and Plan.load(out / NOTE).identity != plan.identity:
        raise StaleError(f"{out} holds an export by another plan; name another folder or remove it")


def check_free(out: Path, source: Checkpoint) -> None:
    """Refuse an `out` that holds what moesaic did not write from `source`. Call it before the hours, not after.

    Raises `InputError`, or `StaleError` for an export of another source.
    """
    if source.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out} lies in the source's own folder; name a folder outside of {source.path}")
    if (out / NOTE).exists():
        Plan.load(out / NOTE, {"source": source.identity})
    elif out.exists() and (not out.is_dir() or any(f.name != "moesaic" for f in out.iterdir())):
        raise InputError(f"{out} exists and was not written by moesaic; name another folder or remove it")
