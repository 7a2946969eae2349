"""Which plan to make for a machine: one rule, `recommend`, from what the log has measured on small models.

Leaves out mixes of formats and counts that differ between matrices, which are better and have to be priced on the model
itself (allocate), and the words of the command line (cli/fit).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..checkpoint.containers import CONTAINERS
from ..formats import FORMATS
from ..plan import SOURCE
from .footprint import Footprint
from .machine import Machine
from .plans import footprint, options
from .shapes import Shapes
from .speed import speeds

LEAST_BITS = 3
MOST_DEVICES = 64  # that are tried where nothing fits

RULE = (
    "The model as it is, where it fits; else all experts in the heaviest format of at least 3 bits that fits; only where "
    "3 bits do not fit either, as many experts as do fit in 3 bits, and at least half of them."
)
EVIDENCE = (
    "This is evidence from two small models (32 experts a layer, 4 a token; docs/LOG.md), and how it carries over to "
    "large ones is not known. Their KL with all experts rounded to nearest, in groups of 16 to 64: .0016 to .0043 nats at "
    "4 bits, .0058 and .0061 at 3, .027 and .036 at 2; by GPTQ .24 to .51 of that. With a quarter of the experts dropped, "
    "as REAP ranks them: .053 and .044; with half of them .18 and .15; fewer were never tried. From 4 bits on the best "
    "plan that prices found dropped nothing. At 2 bits all experts cost less there than a cut to as many bytes, but some "
    "five times what 3 bits cost: that choice is left to prices measured on the model (compress --fit)."
)


@dataclass(frozen=True)
class Recommendation:
    """A plan, and how a machine holds it."""

    format: str  # of the experts; "source": as they are, in the model's own container
    shapes: Shapes
    at: Footprint


def recommend(
    shapes: Shapes, machine: Machine, context: int, kv: str = "bf16", concurrency: int = 1
) -> Recommendation | None:
    """What to serve on a machine, with room for so many requests; None where the rule has no plan for it.

    1. The model as it is, where it fits with the reserve at its typical value and the machine's engine reads it.
    2. Else all experts, in the heaviest format of at least 3 bits with which that fits; the rest stays as it is where the
       container carries it, and is BF16 where it does not.
    3. Else, in the lightest of those formats, as many experts as fit, and no fewer than half.

    Bits before experts, because on both small models of docs/LOG.md all experts in 3 bits cost .0058 and .0061 nats, and
    the best cut of a quarter of them .053 and .044. Evidence from small models: `EVIDENCE`.
    """

    offered = {name: o for name, o in options(shapes, machine).items() if name == SOURCE or bits(name) >= LEAST_BITS}
    tried = list(offered.items())
    for format, option in tried[-1:]:
        fewest = max(option.experts / 2, machine.count)
        tried += [(format, option.pruned(n)) for n in reversed(option.counts) if fewest <= n < option.experts]
    for format, option in tried:
        at = footprint(option, machine, kv, concurrency)
        if at and at.longest(at.reserve.typical, concurrency) >= context:
            return Recommendation(format, option, at)
    return None


def bits(format: str) -> int:
    return FORMATS[format].element_bits


def enough(shapes: Shapes, machine: Machine, context: int, kv: str, concurrency: int) -> int:
    """The fewest devices of the kind, beyond those there are, for which the rule has a plan; 0 where none is found."""
    for count in range(machine.count + 1, MOST_DEVICES + 1):
        if shapes.layout(count) and recommend(shapes, replace(machine, count=count), context, kv, concurrency):
            return count
    return 0


def recommendation(shapes: Shapes, machine: Machine, context: int, kv: str, concurrency: int) -> dict[str, Any]:
    """JSON-able facts of what is recommended, how fast it can be at most, and what would be needed where nothing is."""
    found = recommend(shapes, machine, context, kv, concurrency)
    rule = {"rule": RULE, "evidence": EVIDENCE}
    if found is None:
        return {"format": None, "devices": enough(shapes, machine, context, kv, concurrency), **rule}
    at, model = found.at, found.shapes
    cut = model.experts < shapes.experts
    whole = model.container == shapes.container or shapes.carries(CONTAINERS[model.container])
    has_mtp = any(kind.role == "mtp" for kind in model.kinds)
    drops_mtp = has_mtp and (cut or not whole)
    return {
        "format": found.format,
        "unchanged": found.format == SOURCE and not cut,
        "rest": SOURCE if whole else "bf16",
        "container": model.container,
        "experts": model.experts,
        "has_mtp": has_mtp,
        "drops_mtp": drops_mtp,
        "bytes": replace(model, kinds=tuple(model.served)).disk.value if drops_mtp else model.disk.value,
        "layout": {"name": at.layout.name, "devices": at.layout.devices, "expert_parallel": at.layout.deal},
        "tight": at.longest(at.reserve.high, concurrency) < context,
        "longest_context": at.longest(at.reserve.typical, concurrency),
        "concurrency": at.requests(context),
        "humming": machine.card.engine == "vllm" and found.format != SOURCE and bits(found.format) < 4,
        "speed": [asdict(s) | {"lines": list(map(asdict, s.lines))} for s in speeds(at, context, concurrency)],
        **rule,
    }
