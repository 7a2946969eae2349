"""How a model will be served, asked when it is planned: formats that an engine could not cut between devices are left out.

By the rules of `shapes`, unit by unit, and each refusal with what would load: another format of as many bits,
whole experts on each device, or fewer devices. Leaves out memory (footprint).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from ..checkpoint.containers import Container, Packing
from ..errors import PlanError
from ..families import FAMILIES, Linear
from ..formats import weights_of
from ..plan import SOURCE
from .shapes import Kind, Layout, Model, Shapes


def check_layout(model: Model, layout: Layout) -> None:
    """Raises `PlanError` where an engine would not start `model` so laid out, naming the unit and what would load."""
    container, shapes, a = model.container, Shapes.of(model), model.architecture
    ways = [way for way in shapes.layouts(layout.devices) if container.expert_parallel or not way.deal]
    if layout not in ways:
        raise PlanError(f"{container.name}'s engines deal out no whole experts; ask for --tensor-parallel alone")
    if not (refusals := shapes.refusals(layout)):
        return
    others = [f"serve as {way.name}" for way in ways if not shapes.refusals(way)]
    fewer = (n for n in range(layout.devices - 1, 0, -1) if not shapes.refusals(Layout(n, layout.deal)))
    others += [f"use {n} devices" for n in islice(fewer, 1)]
    what, why = "the model", refusals[0]
    for unit, members in a.units.items() if not shapes.indivisible(layout) else ():
        packing = container.packing(model.formats[members[0].name])
        if found := refusal(members, packing, shapes.serving.kv_heads, layout):
            formats = (f for f in alike(container, packing.format) if loads(container, model, unit, f, layout))
            others = [f"write {unit} in {f}" for f in islice(formats, 1)] + others
            what, why = unit, found
            break
    raise PlanError(f"{what} would be refused at load under {layout.name} ({why}); {' or '.join(others)}")


def servable(
    model: Model, container: Container, offered: dict[str, tuple[str, ...]], layout: Layout
) -> dict[str, tuple[str, ...]]:
    """Of the formats on offer to each unit ("source" among them) those that an engine can cut so.

    Raises `PlanError`, naming the unit, where none is left.
    """
    kv_heads = FAMILIES[model.architecture.family].engine.serving(model.config).kv_heads
    found = {}
    for unit, formats in offered.items():
        members = model.architecture.units[unit]
        own = model.formats[members[0].name]
        named = {f: own if f == SOURCE else f for f in formats}
        whys = {f: refusal(members, container.packing(name), kv_heads, layout) for f, name in named.items()}
        found[unit] = tuple(f for f in formats if not whys[f])
        if not found[unit]:
            raise PlanError(
                f"{unit} would be refused at load under {layout.name} in all of {', '.join(formats)} ({whys[formats[0]]}); "
                "offer formats of smaller groups, or serve otherwise"
            )
    return found


def refusal(members: Sequence[Linear], packing: Packing, kv_heads: int, layout: Layout) -> str:
    """Why a unit in this packing could not be cut so; empty when it could."""
    kinds = dict.fromkeys(
        Kind(
            role=n.role,
            what=n.projection,
            packing=packing,
            dtype="",
            shape=n.shape,
            cut=n.cut,
            kv_heads=kv_heads,
            each=n.expert is not None,
        )
        for n in members
    )
    return next((why for kind in kinds if (why := kind.refusal(layout))), "")


def alike(container: Container, format: str) -> list[str]:
    """Other formats of a container: those of as many bits and the same kind first, then the nearest in size."""
    number, kind = weights_of(format), format.rstrip("_g0123456789")

    def distance(other: str) -> tuple[bool, bool, float]:
        theirs = weights_of(other)
        apart = abs(theirs.bits_per_weight - number.bits_per_weight)
        return theirs.element_bits != number.element_bits, not other.startswith(kind), apart

    return sorted((f for f in container.packings if f != format), key=distance)


def loads(container: Container, model: Model, unit: str, format: str, layout: Layout) -> bool:
    """Whether a unit could have this format instead."""
    a, members = model.architecture, model.architecture.units[unit]
    try:
        container.config(replace(a, linears=members), dict.fromkeys((n.name for n in members), format), model.config)
    except PlanError:
        return False
    return not refusal(
        members, container.packing(format), FAMILIES[a.family].engine.serving(model.config).kv_heads, layout
    )


def layout_of(devices: int | None, deal: bool = False) -> Layout | None:
    """What `--tensor-parallel N` and `--expert-parallel` say; None where nothing is said."""
    if devices is None:
        if deal:
            raise PlanError("--expert-parallel needs --tensor-parallel N: the number of devices")
        return None
    if devices < 1:
        raise PlanError(f"--tensor-parallel {devices}; wanted a number of devices")
    return Layout(devices, deal)
