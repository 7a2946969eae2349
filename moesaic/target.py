"""What a plan makes of a source, before anything is written: the model that is to be, and where each matrix comes from.

Everything follows from shapes: names, formats, config and exact bytes, so that a plan can be priced
or refused in a second. A source that is a bare config will do. Leaves out writing (export).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint, sample
from .containers import CONTAINERS, Container, Packing
from .errors import PlanError
from .families import Architecture, Linear, with_experts
from .plan import SOURCE, Plan


@dataclass(frozen=True)
class Target:
    """The model that a plan is to put on disk."""

    source: Checkpoint
    plan: Plan
    container: Container
    config: dict[str, Any]
    architecture: Architecture
    formats: dict[str, str]  # linear of the target -> format
    origin: dict[str, Linear]  # linear of the target -> linear of the source

    @staticmethod
    def of(source: Checkpoint, plan: Plan) -> "Target":
        """Raises `PlanError` where the plan does not fit the source, or its container cannot carry what it asks for."""
        old = source.architecture
        check_kept(old, plan)
        unknown = sorted(set(plan.formats) - set(old.units))
        if unknown:
            raise PlanError(f"the plan names units that the model lacks: {sample(unknown)}")
        if plan.container not in CONTAINERS:
            raise PlanError(f"no container {plan.container!r}; there are {', '.join(CONTAINERS)}")
        container = CONTAINERS[plan.container]
        config = (
            with_experts(source.config, old.experts, plan.experts(old.experts)) if plan.kept else dict(source.config)
        )
        new = source.family.read(config)
        origin = {linear.name: origin_of(linear, old, plan) for linear in new.linears}
        formats = {}
        for linear in new.linears:
            chosen = plan.formats.get(linear.unit, SOURCE)
            formats[linear.name] = source.formats[origin[linear.name].name] if chosen == SOURCE else chosen
        for format in sorted(set(formats.values())):
            if format not in container.packings:
                raise PlanError(
                    f"{container.name} carries {', '.join(container.packings)} and not {format}; "
                    "choose another container, or another format for the units that would keep it"
                )
        for key in source.container.keys:
            config.pop(key, None)
        if (quantization := container.config(new, formats, source.config)) is not None:
            config |= dict.fromkeys(container.keys, quantization)
        return Target(source, plan, container, config, new, formats, origin)

    def packing(self, linear: Linear) -> Packing:
        return self.container.packing(self.formats[linear.name])

    @property
    def payload_bytes(self) -> int:
        """Bytes of every tensor that will be written, headers left out."""
        packed = sum(self.packing(n).bytes(n.shape) for n in self.architecture.linears)
        return packed + sum(t.bytes for t in self.architecture.tensors)


def check_kept(architecture: Architecture, plan: Plan) -> None:
    if not plan.kept:
        return
    if set(plan.kept) != set(architecture.moe_layers):
        raise PlanError(
            f"the plan keeps experts in {len(plan.kept)} layers, and the model has {len(architecture.moe_layers)} MoE layers"
        )
    count = plan.experts(architecture.experts)
    if not architecture.top_k <= count < architecture.experts:
        raise PlanError(
            f"the plan keeps {count} experts a layer; wanted at least the {architecture.top_k} that a token selects "
            f"and fewer than the source's {architecture.experts}"
        )
    beyond = [i for ids in plan.kept.values() for i in ids if not 0 <= i < architecture.experts]
    if beyond:
        raise PlanError(
            f"the plan keeps expert {beyond[0]}, and the source numbers them 0 to {architecture.experts - 1}"
        )


def origin_of(linear: Linear, old: Architecture, plan: Plan) -> Linear:
    if linear.expert is None or not plan.kept:
        return old.by_name[linear.name]
    return old.experts_of[linear.layer, plan.kept[linear.layer][linear.expert]][linear.projection]


def keeps_bytes(target: Target, linear: Linear) -> bool:
    """Whether the target's tensors of a matrix are the source's, but for their names."""
    source, origin = target.source, target.origin[linear.name]
    if source.formats[origin.name] != target.formats[linear.name]:
        return False
    format = target.formats[linear.name]
    return source.container.packing(format).layout == target.container.packing(format).layout


def formats_by_unit(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The format of each unit of an existing model; "mixed" where its matrices differ."""
    found: dict[str, set[str]] = {}
    for linear in checkpoint.architecture.linears:
        found.setdefault(linear.unit, set()).add(checkpoint.formats[linear.name])
    return {unit: next(iter(s)) if len(s) == 1 else "mixed" for unit, s in found.items()}
