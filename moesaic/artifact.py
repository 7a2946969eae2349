"""Files that stages hand to each other: atomic, versioned, and bound to the inputs they were made from.

A file appears under its name only when it is complete, so "it exists" means "it is whole". Each
says what kind it is, which program wrote it, and the identities of its inputs; reading it with
other inputs is a `StaleError`, never a silent reuse. Leaves out what is in them: each stage knows.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import __version__
from .errors import InputError, MoesaicError, StaleError
from .files import check_plain, decoded, read_file

SCHEMA = 1


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence why `path` cannot be written: a full disk above all.

    For blocks that write, and whose reads say themselves what cannot be read: a deliberate error passes as it is, and
    one of the system's that names another file, outside the folder of `path`, is of that file.
    """
    try:
        yield
    except MoesaicError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and is_elsewhere(error.filename, path):
            raise InputError(f"{error.filename} cannot be read: {error.strerror}; check the path") from error
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        why = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        remedy = "make room" if full else "make it writable"
        raise InputError(
            f"{path} cannot be written: {why}; {remedy}, then run the same command again to continue"
        ) from error


def is_elsewhere(named: Any, path: Path) -> bool:
    """Whether the file that an error names is neither `path`, nor beside or below it, nor a folder that it is in."""
    if not isinstance(named, str | Path):
        return False
    named, path = Path(named).absolute(), path.absolute()
    return path.parent not in named.parents and named not in path.parents


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends well; otherwise nothing is left behind.

    Raises `InputError` when the disk is full or refuses.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.touch()
            mode = partial.stat().st_mode  # what this user gives to new files; safetensors gives less
            yield partial
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            partial.chmod(mode)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, before another file says that they are there."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep_partials(folder: Path) -> None:
    """Remove what killed writers left in a folder that is this command's own."""
    for leftover in folder.rglob(".*.partial"):
        leftover.unlink(missing_ok=True)


def identity(*parts: Any) -> str:
    """16 hex digits that stand for JSON-able facts: equal facts, equal identity."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dumps(value: Any, **options: Any) -> str:
    """JSON as the standard has it, without infinities and NaN: such a number is {"float": "inf"}, "-inf" or "nan"."""
    return json.dumps(spelled(value), allow_nan=False, **options)


def spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if isinstance(value, Mapping):
        return {key: spelled(one) for key, one in value.items()}
    return [spelled(one) for one in value] if isinstance(value, list | tuple) else value


def loads(text: str) -> Any:
    """What `dumps` wrote, with infinities and NaN as numbers again."""
    return json.loads(text, object_hook=unspelled)


def unspelled(found: dict[str, Any]) -> Any:
    return float(found["float"]) if found.keys() == {"float"} and found["float"] in ("inf", "-inf", "nan") else found


def write_json(path: Path, kind: str, body: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Write `body` as one JSON artifact of `kind`, made from `inputs` (name -> identity)."""
    with atomic(path) as partial:
        partial.write_text(json_text(kind, body, inputs), encoding="utf-8")


def json_text(kind: str, body: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What `write_json` writes."""
    return dumps({**header(kind, inputs), **body}, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path, kind: str, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read a JSON artifact. Raises `InputError` for another kind, `StaleError` for other inputs."""
    try:
        found = loads(decoded(read_file(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a {kind} file ({error}); run the stage that writes it") from error
    check(path, found, kind, inputs)
    return found


def write_tensors(
    path: Path,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    inputs: Mapping[str, str],
    body: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors, and a JSON-able `body` beside them, as one safetensors artifact."""
    note = dumps({**header(kind, inputs), **(body or {})})
    with atomic(path) as partial:
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata={"moesaic": note})


def read_tensors(
    path: Path, kind: str, inputs: Mapping[str, str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and body of a safetensors artifact. Errors as `read_json`."""
    try:
        check_plain(path)
        with safe_open(path, "pt") as file:
            found = loads((file.metadata() or {}).get("moesaic", "{}"))
            check(path, found, kind, inputs)
            return {name: file.get_tensor(name) for name in file.keys()}, found  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a {kind} file ({error}); run the stage that writes it") from error


def read_body(path: Path, kind: str, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What stands beside the tensors of a safetensors artifact, reading none of them. Errors as `read_json`."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = loads((file.metadata() or {}).get("moesaic", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a {kind} file ({error}); run the stage that writes it") from error
    check(path, found, kind, inputs)
    return found


def header(kind: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    return {"kind": kind, "schema": SCHEMA, "maker": f"moesaic {__version__}", "inputs": dict(inputs)}


def check(path: Path, found: Any, kind: str, inputs: Mapping[str, str] | None) -> None:
    if not isinstance(found, dict) or not isinstance(found.get("inputs"), dict):
        raise InputError(f"{path} is not a {kind} file written by moesaic; run the stage that writes it")
    if found.get("kind") != kind or found.get("schema") != SCHEMA:
        raise InputError(
            f"{path} is a {found.get('kind')!r} file of schema {found.get('schema')}, wanted {kind!r} of {SCHEMA}"
        )
    for name, wanted in (inputs or {}).items():
        made_from = found["inputs"].get(name)
        if made_from != wanted:
            raise StaleError(
                f"{path} was made from {name} {made_from}, and this is {wanted}; move it away or use another run folder"
            )
