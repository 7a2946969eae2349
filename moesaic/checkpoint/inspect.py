"""What a model folder holds, from headers and config alone; and which experts of another model it kept.

Leaves out every payload byte, but for router rows when a base is given to compare with.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from ..families import TensorInfo
from .kept import kept_of
from .open import Checkpoint


@dataclass
class Share:
    """One role's part of a model."""

    tensors: int = 0
    parameters: int = 0  # weights, scales not counted
    bytes: int = 0


def inspect(model: Path, base: Path | None = None) -> dict[str, Any]:
    """Facts of a model folder, as JSON-able values. Opens headers only; a bare config.json will do.

    With `base`, also `kept`: for each MoE layer, which of the base's experts stand here.
    """
    checkpoint = Checkpoint.open(model)
    a = checkpoint.architecture
    roles = shares(checkpoint)
    active = sum(s.parameters for r, s in roles.items() if r not in ("experts", "embedding", "vision", "mtp"))
    active += roles["experts"].parameters * a.top_k // a.experts
    facts = {
        "model": str(model),
        "family": a.family,
        "container": checkpoint.container.name,
        "weights_present": checkpoint.has_weights,
        "layers": a.layers,
        "moe_layers": len(a.moe_layers),
        "experts": a.experts,
        "experts_per_token": a.top_k,
        "hidden": a.hidden,
        "vocab": a.vocab,
        "context": a.context,
        "tensors": sum(s.tensors for s in roles.values()),
        "parameters": sum(s.parameters for s in roles.values()),
        "active_parameters": active,
        "bytes": sum(s.bytes for s in roles.values()),
        "roles": {role: vars(share) for role, share in roles.items()},
        "formats": formats_by_role(checkpoint),
        "identity": checkpoint.identity,
    }
    if base is not None:
        facts["kept"] = {str(layer): ids for layer, ids in kept_of(checkpoint, Checkpoint.open(base)).items()}
    return facts


def shares(checkpoint: Checkpoint) -> dict[str, Share]:
    """Tensors, parameters and bytes by role, in the order of the model."""
    found: dict[str, Share] = defaultdict(Share)
    counted: set[str] = set()

    def add(role: str, tensors: list[TensorInfo], parameters: int) -> None:
        found[role].tensors += len(tensors)
        found[role].parameters += parameters
        found[role].bytes += sum(t.bytes for t in tensors)

    for linear in checkpoint.architecture.linears:
        packing = checkpoint.container.packing(checkpoint.formats[linear.name])
        place = checkpoint.container.place(checkpoint.architecture, linear)
        add(linear.role, packing.tensors(linear.name, linear.shape), linear.elements)
        names = {place.tensor(part).name for part in packing.parts(linear.shape).values()}
        found[linear.role].tensors -= len(names & counted)  # with the first matrix of its stack
        counted |= names
    for tensor in checkpoint.architecture.tensors:
        add({"router_bias": "router"}.get(tensor.role, tensor.role), [tensor], tensor.elements)
    return dict(found)


def formats_by_role(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """How many matrices of each role are in which format."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for linear in checkpoint.architecture.linears:
        found[linear.role][checkpoint.formats[linear.name]] += 1
    return {role: dict(counts) for role, counts in found.items()}


def size(count: int) -> str:
    """Bytes as people compare them: decimal and binary."""
    if count < 100e6:
        return f"{count / 1e6:,.2f} MB = {count / 2**20:,.2f} MiB"
    return f"{count / 1e9:,.2f} GB = {count / 2**30:,.2f} GiB"


def table(facts: dict[str, Any]) -> Group:
    """The facts of `inspect`, to look at. The totals stand below the table, where no width breaks them."""
    whole, active = facts["parameters"] / 1e9, facts["active_parameters"] / 1e9
    title = f"{facts['family']}, {whole:,.2f} B parameters, {active:,.2f} B active a token"
    shown = Table(title=title, title_justify="left", show_edge=False)
    for heading in ("part", "tensors", "parameters", "GB", "GiB", "formats"):
        shown.add_column(heading, justify="left" if heading in ("part", "formats") else "right")
    for role, share in facts["roles"].items():
        formats = ", ".join(f"{name} × {count:,}" for name, count in facts["formats"].get(role, {}).items())
        shown.add_row(
            role, f"{share['tensors']:,}", f"{share['parameters']:,}",
            f"{share['bytes'] / 1e9:,.2f}", f"{share['bytes'] / 2**30:,.2f}", formats,
        )  # fmt: skip
    below = [
        f"{facts['layers']} layers, {facts['moe_layers']} with {facts['experts']} experts, {facts['experts_per_token']} a token",
        f"{facts['tensors']:,} tensors, {facts['bytes']:,} bytes = {size(facts['bytes'])}",
    ]
    if not facts["weights_present"]:
        below.append("no weights here: what a complete release of this config holds")
    return Group(shown, *below)
