"""What fits where, before anything is downloaded: of each device the weights, the cache and the reserve.

And the reverse: given devices and a context, the bytes that a model may have, and the kept counts and formats
that meet them. From headers, a bare config or a plan; by the rules of vLLM and in the words of its log.
"""

from dataclasses import asdict
from typing import Any

from .footprint import Footprint
from .machine import CARDS, Card, Machine
from .parallel import check_layout, layout_of, servable
from .plans import asked, budget, budget_of, choose, plans
from .recommend import recommendation
from .shapes import Figure, Layout, Model, Shapes
from .show import answer, explain, table


def fit(
    model: Model, machine: Machine, context: int | None = None, kv: str = "bf16", concurrency: int = 1
) -> dict[str, Any]:
    """Facts of a model, on disk or planned, on a machine, as JSON-able values.

    `concurrency` requests of `context` tokens each (32,768, or the model's own fewer) are to have their cache at
    once. Raises `InputError` for a context that the model lacks, and `PlanError`, with reasons and an alternative,
    when no engine would start the model on so many devices.
    """
    context = asked(model, context, concurrency)
    shapes = Shapes.of(model)
    layout = choose(shapes, machine)
    at = Footprint.of(shapes, machine, layout, kv, concurrency)
    room = budget_of(at, context, concurrency)
    typical = at.cache_bytes(at.reserve.typical)
    pages, request = at.pages(at.reserve.typical), at.request_pages(context)
    longest = {
        name: at.longest(reserved, concurrency)
        for name, reserved in zip(("low", "typical", "high"), (at.reserve.high, at.reserve.typical, at.reserve.low))
    }
    return {
        "family": model.architecture.family,
        "experts": shapes.experts,
        "machine": {
            "name": machine.name, "devices": machine.count, "nodes": machine.nodes,
            "utilization": machine.card.utilization, "engine": machine.card.engine,
        },
        "layout": {"name": layout.name, "devices": layout.devices, "expert_parallel": layout.deal},
        "refused": [{"layout": w.name, "reasons": r} for w, r in shapes.layouts(machine.count).items() if r],
        "verdict": verdict(longest, context),
        "context": context,
        "kv": kv,
        "concurrency": concurrency,
        "disk_bytes": shapes.disk.value,
        "budget_bytes": room.value,
        "device": {
            "bytes": machine.card.bytes, "requested_bytes": machine.requested_bytes, "weight_bytes": at.weight_bytes,
            "repeated_bytes": at.repeated_bytes, "reserve_bytes": asdict(at.reserve),
        },
        "cache": {
            "token_bytes": at.token.value, "page_tokens": at.page_tokens, "page_bytes": at.page_bytes,
            "bytes": {
                "low": at.cache_bytes(at.reserve.high), "typical": typical, "high": at.cache_bytes(at.reserve.low),
            },
            "pages": pages, "tokens": int(pages / request * context), "concurrency": pages / request,
            "longest_context": longest,
        },
        "plans": plans(shapes, machine, context, kv, concurrency),
        "recommendation": recommendation(shapes, machine, context, kv, concurrency),
        "explain": [asdict(line) for line in (*at.lines(context, concurrency), room)],
    }  # fmt: skip


def verdict(longest: dict[str, int], context: int) -> str:
    """Whether the context fits with the reserve at its highest, at its typical value, or not."""
    if longest["low"] >= context:
        return "fits"
    return "tight" if longest["typical"] >= context else "does not fit"


__all__ = [
    "CARDS", "Card", "Figure", "Footprint", "Layout", "Machine", "Shapes", "answer", "budget", "check_layout", "choose",
    "explain", "fit", "layout_of", "servable", "table",
]  # fmt: skip
