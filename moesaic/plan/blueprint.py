"""What a plan makes of a source, before anything is written: the model that is to be, and where each matrix comes from.

Everything follows from shapes: names, formats, config and exact bytes, so that a plan can be priced
or refused in a second. A source that is a bare config will do. Leaves out writing (export).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, sample
from ..checkpoint.containers import CONTAINERS, Container, Packing, siblings
from ..errors import PlanError
from ..families import Architecture, Linear, TensorInfo, with_experts
from ..formats import FORMATS, Scales, weights_of
from ..formats.recode import twins
from ..rounding import arithmetic
from .plan import DROP, KEEP, SOURCE, Plan


@dataclass(frozen=True)
class Blueprint:
    """The model that a plan is to put on disk."""

    source: Checkpoint
    plan: Plan
    container: Container
    config: dict[str, Any]
    architecture: Architecture
    formats: dict[str, str]  # linear of the blueprint -> format
    origin: dict[str, Linear]  # linear of the blueprint -> linear of the source
    keeping: frozenset[str]  # units whose values are the source's

    @staticmethod
    def of(source: Checkpoint, plan: Plan) -> "Blueprint":
        """Raises `PlanError` where the plan does not fit the source, or its container cannot carry what it asks for."""
        old = source.architecture
        check_kept(old, plan)
        if plan.kept and not plan.drop_mtp:
            check_mtp(source, KEEP)
        unknown = sorted(set(plan.formats) - set(old.units))
        if unknown:
            raise PlanError(f"the plan names units that the model lacks: {sample(unknown)}")
        if plan.container not in CONTAINERS:
            raise PlanError(f"unknown container {plan.container!r}; choose from {', '.join(CONTAINERS)}")
        container = CONTAINERS[plan.container]
        if container.name == source.container.name:  # with the dtypes that the source has there
            container = replace(container, packings=source.container.packings)
        config = (
            with_experts(source.config, old.experts, plan.experts(old.experts)) if plan.kept else dict(source.config)
        )
        if plan.drop_mtp and source.family.mtp_key:
            config[source.family.mtp_key] = 0
        new = source.family.read(config).without(source.absent)
        origin = {linear.name: origin_of(linear, old, plan) for linear in new.linears}
        before = {name: source.formats[linear.name] for name, linear in origin.items()}
        formats: dict[str, str] = {}
        keeping = set()
        for unit, members in new.units.items():
            chosen = plan.formats.get(unit, SOURCE)
            if chosen == SOURCE:
                held = {f: twin(container, unit, members, f) for f in dict.fromkeys(before[n.name] for n in members)}
                formats |= {n.name: held[before[n.name]] for n in members}
            elif chosen in container.packings:
                formats |= {n.name: chosen for n in members}
            else:
                raise PlanError(
                    f"{container.name} carries {', '.join(container.packings)} and not {chosen}; "
                    f"choose another container, or another format for {unit}"
                )
            if chosen == SOURCE or all(before[n.name] == chosen for n in members):
                keeping.add(unit)
        for key in source.container.keys:
            config.pop(key, None)
        if (quantization := container.config(new, formats, source.config)) is not None:
            config |= dict.fromkeys(container.keys, quantization)
        blueprint = Blueprint(
            source=source,
            plan=plan,
            container=container,
            config=config,
            architecture=new,
            formats=formats,
            origin=origin,
            keeping=frozenset(keeping),
        )
        check_overlaid(blueprint)
        return blueprint

    def packing(self, linear: Linear) -> Packing:
        return self.container.packing(self.formats[linear.name])

    def pack(self, linear: Linear, codes_OI: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The tensors of a matrix, by meaning."""
        return self.packing(linear).pack(codes_OI, scales) | self.inputs(linear)

    def inputs(self, linear: Linear) -> dict[str, Tensor]:
        """The "inputs" of a matrix whose format rounds activations; else nothing."""
        activations = self.packing(linear).activations
        if activations is None:
            return {}
        share = FORMATS[activations].share
        assert share is not None
        return {"inputs": share(torch.tensor(self.plan.activations[linear.input]))}

    @cached_property
    def plain(self) -> dict[str, TensorInfo]:
        """Norms, routers, embeddings and the rest that is no matrix of a unit, by name."""
        return {tensor.name: tensor for tensor in self.architecture.tensors}

    def item(self, name: str) -> list[TensorInfo]:
        """The tensors of what an overlay holds under `name`, in their order: a packed matrix's, or the tensor itself."""
        linear = self.architecture.by_name.get(name)
        return [self.plain[name]] if linear is None else self.packing(linear).tensors(name, linear.shape)

    @property
    def uncalibrated(self) -> list[str]:
        """Inputs that the plan's formats round, and whose size it does not know."""
        asked = {
            n.input
            for n in self.architecture.linears
            if not n.expert and is_made_of_source(self, n) and self.packing(n).activations
        }
        return sorted(asked - set(self.plan.activations))

    @property
    def arithmetic(self) -> dict[str, str]:
        """Versions that matrices rounded of the source depend on (`rounding.arithmetic`); nothing where there are none."""
        formats = {self.formats[n.name] for n in self.architecture.linears if is_made_of_source(self, n)}
        return arithmetic(self.plan.rounding, formats) if formats else {}

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
    if why := architecture.refusal(count):
        raise PlanError(f"the plan keeps {count} experts a layer; {why}")
    size = architecture.experts // architecture.groups
    for layer, ids in plan.kept.items():
        held = [sum(i // size == group for i in ids) for group in range(architecture.groups)]
        if len(set(held)) > 1:
            raise PlanError(
                f"layer {layer} keeps {', '.join(map(str, held))} experts of its groups; as many of each are wanted, "
                "since engines cut those that stay into equal groups again"
            )
    beyond = [i for ids in plan.kept.values() for i in ids if not 0 <= i < architecture.experts]
    if beyond:
        raise PlanError(
            f"the plan keeps expert {beyond[0]}, and the source numbers them 0 to {architecture.experts - 1}"
        )


def check_mtp(source: Checkpoint, mtp: str) -> None:
    """Whether a cut may do this with a layer for multi-token prediction. Raises `PlanError` for what no engine loads."""
    if mtp not in (KEEP, DROP):
        raise PlanError(f"asked to {mtp} a layer for multi-token prediction; wanted {KEEP} or {DROP}")
    if mtp == KEEP and source.architecture.has_mtp:
        raise PlanError(
            f"{source.path} has a layer for multi-token prediction with {source.architecture.experts} experts of its own, and "
            f"no engine loads it beside fewer; give --mtp {DROP} to leave it out, or keep all experts"
        )


def check_overlaid(blueprint: Blueprint) -> None:
    """Raises `PlanError` for an overlay that the blueprint has no place for, or that cuts a scale that matrices share."""
    overlaid = blueprint.plan.overlaid
    if foreign := [
        item for item in overlaid if item not in blueprint.plain and item not in blueprint.architecture.by_name
    ]:
        raise PlanError(f"an overlay of the plan holds {sample(foreign)}, which the model does not have")
    if not overlaid:
        return
    for group in siblings(blueprint.architecture.linears):
        inside = [n.name for n in group if n.name in overlaid]
        if inside and len(inside) < len(group) and blueprint.packing(group[0]).number_format.share is not None:
            raise PlanError(
                f"an overlay of the plan holds {sample(inside)} without all of {', '.join(n.name for n in group)}, "
                "which share a scale; put all of them into it"
            )


def origin_of(linear: Linear, old: Architecture, plan: Plan) -> Linear:
    if linear.expert is None or not plan.kept:
        return old.by_name[linear.name]
    return old.experts_of[linear.layer, plan.kept[linear.layer][linear.expert]][linear.projection]


def twin(container: Container, unit: str, members: Sequence[Linear], format: str) -> str:
    """The format in which `container` holds values of `format` as they are. Raises `PlanError` when there is none."""

    def holds(container: Container, other: str) -> bool:
        group = weights_of(other).block[1] if other != format else 0
        plain = other == "bf16" != format and len(container.packings) > 1  # four times the bytes is no twin to want
        return other in container.packings and not plain and not (group and any(n.shape[1] % group for n in members))

    for other in twins(format):
        if holds(container, other):
            return other
    others = [c.name for c in CONTAINERS.values() if any(holds(c, other) for other in twins(format))]
    way = f"round the unit to {', '.join(container.packings)}"
    if members[0].role == "mtp":
        way = f"leave the layer for multi-token prediction out (--mtp {DROP})"
    raise PlanError(
        f"{unit} is in {format}, and {container.name} has no format that holds its values as they are; "
        f"{' and '.join(others)} would keep them, or {way}"
    )


def bound(source: Checkpoint, plan: Plan) -> dict[str, str]:
    """What overlays are made from: the source, and what was decided."""
    return {"source": source.identity, "plan": plan.identity}


def keeps_values(blueprint: Blueprint, linear: Linear) -> bool:
    """Whether the blueprint's weights are the source's to the bit, whatever they are packed as."""
    return linear.unit in blueprint.keeping and linear.name not in blueprint.plan.overlaid


def is_made_of_source(blueprint: Blueprint, linear: Linear) -> bool:
    """Whether a matrix is rounded anew, and not in an overlay."""
    return not keeps_values(blueprint, linear) and linear.name not in blueprint.plan.overlaid


def keeps_bytes(blueprint: Blueprint, linear: Linear) -> bool:
    """Whether the blueprint's tensors of a matrix are the source's, but for their names."""
    source, origin = blueprint.source, blueprint.origin[linear.name]
    format = blueprint.formats[linear.name]
    if not keeps_values(blueprint, linear) or source.formats[origin.name] != format:
        return False
    if not source.container.place(source.architecture, origin).is_run:
        return False
    return source.container.packing(format).layout == blueprint.container.packing(format).layout


def formats_by_unit(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The format of each unit of an existing model; "mixed" where its matrices differ."""
    found: dict[str, set[str]] = {}
    for linear in checkpoint.architecture.linears:
        found.setdefault(linear.unit, set()).add(checkpoint.formats[linear.name])
    return {unit: next(iter(s)) if len(s) == 1 else "mixed" for unit, s in found.items()}
