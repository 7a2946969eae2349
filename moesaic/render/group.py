"""Matrices of a target that a server fuses, as one: their weights stacked by rows, and their file when rounded."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import read_tensors, write_tensors
from ..families import Linear
from ..formats import NumberFormat, Scales
from ..target import Target

KIND = "rounded"

Group = tuple[Linear, ...]  # of the target
Members = Sequence[tuple[Tensor, Scales]]  # codes [O, I] and scales of each


def path_of(folder: Path, group: Group) -> Path:
    return folder / f"{group[0].name}.safetensors"


def format_of(target: Target, group: Group) -> NumberFormat:
    return target.packing(group[0]).number_format


def weights_of(target: Target, group: Group, device: torch.device) -> Tensor:
    """F32 [ΣO, I] of the source."""
    return torch.cat([target.source.decode(target.origin[n.name].name, device) for n in group])


def names_of(target: Target, linear: Linear) -> dict[str, str]:
    """What a matrix's tensors are called in its file, by meaning."""
    return {key: f"{linear.name}.{part.suffix}" for key, part in target.packing(linear).parts(linear.shape).items()}


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of packed tensors in their order: what an export of them must hold."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_group(
    folder: Path, target: Target, group: Group, members: Members, inputs: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Pack and write; returns `facts`, which are in the file too, with the digest."""
    tensors: dict[str, Tensor] = {}
    for linear, (codes_OI, scales) in zip(group, members, strict=True):
        packed = target.pack(linear, codes_OI.cpu(), on_cpu(scales))
        tensors |= {
            name: packed[key].clone() for key, name in names_of(target, linear).items()
        }  # siblings share a scale
    whole = {**facts, "sha256": digest(tensors.values())}
    write_tensors(path_of(folder, group), KIND, tensors, inputs, {"facts": whole})
    return whole


def read_packed(folder: Path, target: Target, group: Group, inputs: Mapping[str, str]) -> dict[str, Tensor]:
    """A group's tensors by name, in the order of its members' parts."""
    tensors, _ = read_tensors(path_of(folder, group), KIND, inputs)
    return {name: tensors[name] for linear in group for name in names_of(target, linear).values()}


def on_cpu(scales: Scales) -> Scales:
    blocks, shared, offsets = (None if t is None else t.cpu() for t in (scales.blocks, scales.shared, scales.offsets))
    return Scales(blocks, shared, offsets)


def read_values(folder: Path, target: Target, group: Group, inputs: Mapping[str, str]) -> dict[str, Tensor]:
    """F32 values of each member as written, by its name in the source."""
    tensors, found = read_packed(folder, target, group, inputs), {}
    for linear in group:
        parts = {key: tensors[name] for key, name in names_of(target, linear).items()}
        found[target.origin[linear.name].name] = target.packing(linear).decode(parts, linear.shape)
    return found
