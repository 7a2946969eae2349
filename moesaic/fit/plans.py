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

WRITTEN = {"vllm": "compressed_tensors", "mlx": "mlx"}  # engine -> the container of a plan for it
READ = {  # engine -> the containers that it loads
    "vllm": ("compressed_tensors", "fp8", "mxfp8", "auto_round", "gptq", "unquantized"),
    "mlx": ("mlx", "unquantized"),
}
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


def options(shapes: Shapes, machine: Machine) -> dict[str, Shapes]:
    """The model with its experts in each format, heaviest first, as the machine's engine loads it; "source" as it is."""
    engine, container = machine.card.engine, CONTAINERS[WRITTEN[machine.card.engine]]
    rest = shapes.carried(container)
    found = {"source": shapes} if shapes.container in READ[engine] else {}
    for format in heaviest_first(f for f in FORMATS.values() if f.tabled and f.name in container.packings):
        option = rest.rounded(container.packing(format))
        if "source" not in found or option.expert_bytes < shapes.expert_bytes:
            found[format] = option
    return found


def plans(shapes: Shapes, machine: Machine, context: int, kv: str, concurrency: int) -> list[dict[str, Any]]:
    """For each format of the experts, heaviest first: kept counts with bytes and contexts, and the most that fit."""
    found = options(shapes, machine).items()
    return [plan_row(format, option, machine, context, kv, concurrency) for format, option in found]


def footprint(shapes: Shapes, machine: Machine, kv: str, concurrency: int) -> Footprint | None:
    """None where no engine starts it."""
    layout = shapes.layout(machine.count)
    return Footprint.of(shapes, machine, layout, kv, concurrency) if layout else None


def plan_row(format: str, shapes: Shapes, machine: Machine, context: int, kv: str, concurrency: int) -> dict[str, Any]:
    every, least = shapes.experts, max(shapes.top_k, machine.count)  # an engine wants an expert for each device
    counts = [n for n in shapes.counts if n >= least] or [every]

    def longest(experts: int) -> int:
        found = footprint(shapes.pruned(experts), machine, kv, concurrency)
        return found.longest(found.reserve.typical, concurrency) if found else 0

    fitting = bisect(counts, False, key=lambda experts: longest(experts) < context)
    most = counts[fitting - 1] if fitting else 0
    layout = shapes.layout(machine.count)
    columns = (counts[max(0, bisect(counts, every * sixteenths // 16) - 1)] for sixteenths in SIXTEENTHS)
    return {
        "format": format,
        "layout": layout.name if layout else None,
        "note": HUMMING if format in FORMATS and FORMATS[format].element_bits < 4 and machine.card.engine == "vllm" else "",
        "most_experts": most,
        "most_bytes": shapes.pruned(most).disk.value if most else 0,
        "kept": [
            {"experts": n, "bytes": shapes.pruned(n).disk.value, "longest_context": longest(n), "fits": longest(n) >= context}
            for n in dict.fromkeys(columns)
        ],
    }  # fmt: skip
