"""Matrices of a blueprint that a server fuses, as one: their weights stacked by rows, and their items in an overlay."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...families import Linear
from ...formats import NumberFormat, Scales
from ...plan import overlay
from ...plan.blueprint import Blueprint

Group = tuple[Linear, ...]  # of the blueprint
Members = Sequence[tuple[Tensor, Scales]]  # codes [O, I] and scales of each


def is_written(folder: Path, group: Group) -> bool:
    """Whether all members are in the overlay: the first one is put there last."""
    return overlay.path_of(folder, group[0].name).exists()


def format_of(blueprint: Blueprint, group: Group) -> NumberFormat:
    return blueprint.packing(group[0]).number_format


def weights_of(blueprint: Blueprint, group: Group, device: torch.device) -> Tensor:
    """F32 [ΣO, I] of the source."""
    return torch.cat([blueprint.source.decode(blueprint.origin[n.name].name, device) for n in group])


def write_group(
    folder: Path,
    blueprint: Blueprint,
    group: Group,
    members: Members,
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Pack and put into the overlay; returns `facts`, which are there too, with the members' digests."""
    packed = {n.name: packed_tensors(blueprint, n, *member) for n, member in zip(group, members, strict=True)}
    whole = {**facts, "sha256": {name: overlay.digest(tensors.values()) for name, tensors in packed.items()}}
    for linear in reversed(group):
        overlay.put(folder, linear.name, packed[linear.name], inputs, whole if linear is group[0] else None)
    return whole


def read_facts(folder: Path, group: Group, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What `write_group` returned."""
    return overlay.facts_of(folder, group[0].name, inputs)


def packed_tensors(blueprint: Blueprint, linear: Linear, codes_OI: Tensor, scales: Scales) -> dict[str, Tensor]:
    """A matrix's tensors by the names that its item has for them."""
    packed, parts = (
        blueprint.pack(linear, codes_OI.cpu(), on_cpu(scales)),
        blueprint.packing(linear).parts(linear.shape),
    )
    return {info.name: packed[key] for key, info in zip(parts, blueprint.item(linear.name))}


def on_cpu(scales: Scales) -> Scales:
    blocks, shared, offsets = (None if t is None else t.cpu() for t in (scales.blocks, scales.shared, scales.offsets))
    return Scales(blocks, shared, offsets)


def read_values(folder: Path, blueprint: Blueprint, group: Group, inputs: Mapping[str, str]) -> dict[str, Tensor]:
    """F32 values of each member as written, by its name in the source."""
    found = {}
    for linear in group:
        names, packing = [info.name for info in blueprint.item(linear.name)], blueprint.packing(linear)
        tensors = overlay.get(folder, linear.name, names, inputs)
        parts = dict(zip(packing.parts(linear.shape), tensors, strict=True))
        found[blueprint.origin[linear.name].name] = packing.decode(parts, linear.shape)
    return found
