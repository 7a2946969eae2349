"""Overlays: tensors made elsewhere, with digests, that an export takes in place of what the source would give.

An overlay is a folder with a file for each item: a matrix of the blueprint as its container packs it, or a plain tensor
such as a router or a norm. Its listing is written last. A plan names the folder and has the digest of every item, so
that `export` takes those bytes and no others, and `verify` holds the export to them, whoever made them: a rounding on
text, a repair, a tuning. Leaves out which tensors an item has (blueprint).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import read_body, read_json, read_tensors, write_json, write_tensors
from ..errors import StaleError

KIND, LISTING = "overlay", "overlay.json"
ON_TEXT = "rendered"  # the folder of matrices rounded on text


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def path_of(folder: Path, item: str) -> Path:
    return folder / f"{item}.safetensors"


def put(
    folder: Path, item: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, str], facts: Mapping[str, Any] | None = None
) -> str:  # fmt: skip
    """Write an item's tensors, whole or not at all, with JSON-able `facts` beside them; returns their digest."""
    found = digest(tensors.values())
    copies = {name: tensor.cpu().clone() for name, tensor in tensors.items()}  # the library refuses shared memory
    write_tensors(path_of(folder, item), "overlay_item", copies, inputs, {"sha256": found, "facts": dict(facts or {})})
    return found


def get(
    folder: Path, item: str, names: Sequence[str], inputs: Mapping[str, str] | None = None, wanted: str | None = None
) -> list[Tensor]:
    """An item's tensors in the order of `names`, the order in which they were put.

    Raises `InputError` for a file that is missing, torn, or has other tensors, `StaleError` for one made from other
    inputs, or of another digest than `wanted`.
    """
    path = path_of(folder, item)
    tensors, _ = read_tensors(path, "overlay_item", inputs)
    if set(tensors) != set(names):
        raise StaleError(
            f"{path} holds {', '.join(sorted(tensors))}, wanted {', '.join(names)}; make the overlay again"
        )
    found = [tensors[name] for name in names]
    if wanted is not None and digest(found) != wanted:
        raise StaleError(f"{path} does not hold the tensors that the plan has the digest of; make the overlay again")
    return found


def facts_of(folder: Path, item: str, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `put` wrote beside an item's tensors."""
    facts: dict[str, Any] = read_body(path_of(folder, item), "overlay_item", inputs)["facts"]
    return facts


def finish(folder: Path, digests: Mapping[str, str], inputs: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Write the listing: every item with its digest, and JSON-able `facts` of how they were made. The last thing to do."""
    write_json(folder / LISTING, KIND, {**facts, "items": dict(sorted(digests.items()))}, inputs)


def is_finished(folder: Path) -> bool:
    return (folder / LISTING).exists()


def listing(folder: Path, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `finish` wrote: the facts, and under "items" every item's digest.

    Raises `InputError` for a folder that is not a whole overlay, `StaleError` for one made from other inputs.
    """
    return read_json(folder / LISTING, KIND, inputs)


def drop(*folders: Path) -> None:
    """Remove the tensors of finished overlays, which an export has taken in; the listings stay."""
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            file.unlink()


def is_dropped(folder: Path) -> bool:
    return is_finished(folder) and not any(folder.glob("*.safetensors"))
