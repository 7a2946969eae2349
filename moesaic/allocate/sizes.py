"""Bytes on disk: of every option before anything is chosen, and of a chosen plan's folder to the byte.

An option's bytes are its tensors and their entries in the shard's header and the index, so that sums of options are
what a folder takes. Offsets count with as many digits as a full shard needs: a sum is never too small. Leaves
out harm (measure).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..artifact import json_text
from ..checkpoint import Checkpoint, digests
from ..checkpoint.containers import Container
from ..checkpoint.digests import NONE
from ..checkpoint.shards import PAGE, SHARD_BYTES, SMALL, index_of, plan_shards
from ..families import TensorInfo
from ..plan import SOURCE
from ..plan.blueprint import Blueprint, is_made_of_source
from ..plan.overlay import ON_TEXT
from ..plan.pieces import carried, digest_names, noted, sorted_pieces
from ..rounding import rounding_named
from .solver.menu import Ints

SHARD = "model-00001-of-00001.safetensors"
UNIT_BYTES = 400  # of config.json and the plan, for each unit: its name, its format, its share of the patterns
NOTE_BYTES = 8_192  # of config.json and the plan beside the source's config
LISTED_BYTES = 75  # of the plan, for the digest of a matrix, beside its name
FOLDER_BYTES = 4_096  # of a folder itself, as `du` counts it


def entry_bytes(tensor: TensorInfo) -> int:
    """What naming a tensor takes in a shard's header and in the index, at most."""
    place = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [SHARD_BYTES, SHARD_BYTES]}
    in_header = len(json.dumps({tensor.name: place}, separators=(",", ":"))) - 1
    in_digests = len(f'   "{tensor.name}": "{NONE}",\n')
    return in_header + len(f'    "{tensor.name}": "{SHARD}",\n') + in_digests


def option_bytes(source: Checkpoint, container: Container, unit: str, format: str, kept: Sequence[int]) -> Ints:
    """Stored bytes of a unit in a format: [K], or [1] for a unit that kept counts do not touch."""
    members = source.architecture.units[unit]
    packing = container.packing(source.formats[members[0].name] if format == SOURCE else format)
    entries = {n.name: sum(entry_bytes(t) for t in packing.tensors(n.name, n.shape)) for n in members}
    if members[0].expert is None:
        return np.array([sum(packing.bytes(n.shape) + entries[n.name] for n in members)], np.int64)
    each_E = np.zeros(source.architecture.experts + 1, np.int64)  # experts that stay are numbered from 0
    for n in members:
        assert n.expert is not None
        each_E[n.expert + 1] += packing.bytes(n.shape) + entries[n.name]
    return each_E.cumsum()[list(kept)]


def listed_bytes(source: Checkpoint, kept: Sequence[int]) -> Ints:
    """[K]: what the plan takes to have the digest of every matrix, as it does where all are rounded on text."""
    each_E = np.zeros(source.architecture.experts + 1, np.int64)  # experts that stay are numbered from 0
    for n in source.architecture.linears:
        each_E[0 if n.expert is None else n.expert + 1] += LISTED_BYTES + len(n.name)
    return each_E.cumsum()[list(kept)]


def fixed_bytes(source: Checkpoint, kept: Sequence[int]) -> Ints:
    """[K]: what is written whatever the formats: norms, embeddings, routers' rows, vision, texts, config, notes."""
    a = source.architecture
    routers = [t for t in a.tensors if t.name in a.rows_of]
    rest = [t for t in a.tensors if t.name not in a.rows_of]
    total = sum(t.bytes for t in source.inventory)
    headers = 64 if total <= SMALL else (2 + 2 * total // SHARD_BYTES) * (64 + PAGE)
    config = len(json.dumps(source.config, indent=2).encode())
    still = sum(t.bytes for t in rest) + sum(entry_bytes(t) for t in a.tensors) + headers
    files = carried(source.path)
    still += sum((source.path / f).stat().st_size + len(f'  "{f}": "{NONE}",\n') for f in files) + config
    still += NOTE_BYTES + UNIT_BYTES * len(a.units) + FOLDER_BYTES * folders(source)
    row = sum(t.bytes // a.experts for t in routers) + len(a.moe_layers) * len("   8191,\n")
    return still + row * np.array(kept, np.int64)


def folder_bytes(blueprint: Blueprint) -> int:
    """Bytes of the folder that `export` writes for a plan, as `stored_bytes` counts, before it is written."""
    listed, inputs = as_listed(blueprint), {"source": blueprint.source.identity}
    shards = plan_shards(sorted_pieces(blueprint), SHARD_BYTES)
    tensors = sum(len(s.layout()[0]) + s.payload_bytes for s in shards)
    texts = [
        json.dumps(index_of(shards), indent=2) + "\n",
        json.dumps(blueprint.config, indent=2, ensure_ascii=False) + "\n",
        json_text("plan", listed.plan.body, noted(listed)),
        json_text(digests.KIND, digest_names(blueprint.source.path, shards), inputs),
    ]
    files = sum((blueprint.source.path / f).stat().st_size for f in carried(blueprint.source.path))
    return tensors + sum(len(text.encode()) for text in texts) + files + FOLDER_BYTES * folders(blueprint.source)


def as_listed(blueprint: Blueprint) -> Blueprint:
    """The blueprint as it is exported: what its rounding needs text for will be in an overlay."""
    rounded = [n.name for n in blueprint.architecture.linears if is_made_of_source(blueprint, n)]
    if not (rounded and rounding_named(blueprint.plan.rounding).needs):
        return blueprint
    return replace(blueprint, plan=replace(blueprint.plan, overlays={ON_TEXT: dict.fromkeys(rounded, "0" * 64)}))


def folders(source: Checkpoint) -> int:
    """Folders that an export makes: its own, the plan's, and those of files that are carried along."""
    return 2 + len({parent for file in carried(source.path) for parent in file.parents} - {Path()})


def stored_bytes(folder: Path) -> int:
    """Bytes of all files of a folder, and of the folders: what `du --apparent-size` says on most file systems."""
    inside = list(folder.rglob("*"))
    return sum(p.stat().st_size for p in inside if p.is_file()) + FOLDER_BYTES * (1 + sum(p.is_dir() for p in inside))
