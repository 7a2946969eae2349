"""The reverse of a footprint: the bytes that a model may have on given devices, and which plans meet them.

The trade between experts and bits, from shapes alone: experts in a few formats, the rest as it is. Leaves out
what each choice costs in quality, which only measuring tells.
"""

from bisect import bisect
from typing import Any

from ..checkpoint.containers import CONTAINERS
from ..errors import InputError, PlanError
from ..formats import FORMATS, heaviest_first
from .footprint import Footprint
from .machine import Machine
from .shapes import Figure, Layout, Model, Shapes

CONTAINER = "compressed_tensors"
HUMMING = "needs vLLM's humming kernels"
SIXTEENTHS = (16, 14, 13, 12, 11, 10, 8)  # of the experts, kept
CONTEXT = 32_768  # tokens, where none is asked for


def asked(model: Model, context: int | None, concurrency: int) -> int:
    """The context to count with. Raises `InputError` for one that the model lacks."""
    most = model.architecture.context
    found = min(CONTEXT, most) if context is None else context
    if not 0 < found <= most or concurrency < 1:
        raise InputError(
            f"{concurrency} × {found:,} tokens were asked for; wanted at least one request, of 1 to {most:,} tokens"
        )
    return found


def choose(shapes: Shapes, machine: Machine) -> Layout:
    """The layout to use on all devices. Raises `PlanError` that names the reasons and an alternative."""
    layout = shapes.layout(machine.count)
    if layout is None:
        ways = shapes.layouts(machine.count)
        why = "; ".join(f"{way.name}: {refusals[0]}" for way, refusals in ways.items())
        most = next(n for n in range(machine.count - 1, 0, -1) if shapes.layout(n))
        raise PlanError(f"no engine would start this model on {machine.name} ({why}); use {most} of them")
    return layout


def budget_of(at: Footprint, context: int, concurrency: int) -> Figure:
    """What the devices have room for beside the cache of such requests, less what they hold more than once."""
    n, weights, disk = at.layout.devices, at.weight_bytes, at.shapes.disk.value
    requested, reserved, pages = at.machine.requested_bytes, at.reserve.typical, at.request_pages(context)
    return Figure(
        "a model may have",
        (requested - reserved - (pages * concurrency + 1) * at.page_bytes) * n - (weights * n - disk),
        f"({requested:,} - reserve {reserved:,} - ({pages:,} pages × {concurrency} + 1) × {at.page_bytes:,} B) × {n} devices"
        f" - repeated ({weights:,} × {n} - {disk:,})",
    )


def budget(machine: Machine, model: Model, context: int | None = None, kv: str = "bf16", concurrency: int = 1) -> int:
    """Payload bytes that a model made of `model` may have. Raises `InputError` when there is no room for weights.

    Counts router rows as the model has them; one with fewer experts repeats fewer, and has a little more room.
    """
    shapes, context = Shapes.of(model), asked(model, context, concurrency)
    at = Footprint.of(shapes, machine, choose(shapes, machine), kv, concurrency)
    found = budget_of(at, context, concurrency).value
    if found <= 0:
        raise InputError(
            f"{machine.name} have no room for weights beside {concurrency} × {context:,} tokens of {kv} cache; "
            "ask for a shorter context, fewer requests, a smaller cache or more devices"
        )
    return found


def plans(shapes: Shapes, machine: Machine, context: int, kv: str, concurrency: int) -> list[dict[str, Any]]:
    """For each format of the experts, heaviest first: kept counts with bytes and contexts, and the most that fit."""
    rounded = [
        (format, shapes.rounded(CONTAINERS[CONTAINER].packing(format)))
        for format in heaviest_first(f for f in FORMATS.values() if f.tabled)
    ]
    rows = [("source", shapes)] + [row for row in rounded if row[1].disk.value < shapes.disk.value]
    return [plan_row(format, option, machine, context, kv, concurrency) for format, option in rows]


def plan_row(format: str, shapes: Shapes, machine: Machine, context: int, kv: str, concurrency: int) -> dict[str, Any]:
    every, least = shapes.experts, max(shapes.top_k, machine.count)  # an engine wants an expert for each device

    def at(experts: int) -> Footprint | None:
        option = shapes.pruned(experts)
        layout = option.layout(machine.count)
        return Footprint.of(option, machine, layout, kv, concurrency) if layout else None

    def longest(experts: int) -> int:
        found = at(experts)
        return found.longest(found.reserve.typical, concurrency) if found else 0

    most = least - 1 + bisect(range(least, every + 1), False, key=lambda experts: longest(experts) < context)
    layout = shapes.layout(machine.count)
    return {
        "format": format,
        "layout": layout.name if layout else None,
        "note": HUMMING if format in FORMATS and FORMATS[format].element_bits < 4 else "",
        "most_experts": most if most >= least else 0,
        "most_bytes": shapes.pruned(most).disk.value if most >= least else 0,
        "kept": [
            {"experts": n, "bytes": shapes.pruned(n).disk.value, "longest_context": longest(n), "fits": longest(n) >= context}
            for n in dict.fromkeys(max(least, every * sixteenths // 16) for sixteenths in SIXTEENTHS)
        ],
    }  # fmt: skip
