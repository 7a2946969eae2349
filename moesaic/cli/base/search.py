"""What `measure`, `allocate` and `compress` have in common: what is on offer, how large the result may be, and the recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import THREADS, Swept
from .groups import (
    CutArguments,
    ParallelArguments,
    TextArguments,
    cut_options,
    layout,
    parallel_options,
    ranking,
    rounding_option,
    text_options,
)
from .resources import held_bytes
from .values import bits_of, bytes_of, count_of, names_of, seconds_of

if TYPE_CHECKING:
    from ...fit import Layout
    from ...recipes.compress import Recipe


@dataclass(frozen=True, kw_only=True)
class Search(TextArguments, CutArguments, ParallelArguments):
    """Of `measure` and `allocate`, and most of `compress`."""

    model: Path
    run: Path
    experts: int | None
    formats: tuple[str, ...] | None
    container: str
    budget_bytes: int | None
    bits: float | None
    devices: str | None
    context: int | None
    harm: str
    seconds: float | None
    rounding: str | None


def budget_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--fit",
        type=bytes_of,
        dest="budget_bytes",
        metavar="SIZE",
        help="bytes on disk, never exceeded: 90GB, 84GiB; finds the plan",
    )
    p.add_argument("--devices", metavar="NxSIZE", help="instead of --fit: 2x95GiB, 4xH100NVL, …; with --context")
    p.add_argument("--context", type=count_of, metavar="N", help="tokens that a request on --devices may have")
    p.add_argument("--bits", type=bits_of, metavar="B", help="the same as stored bits per weight of the source")


def offer_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--formats", type=names_of, metavar="F,F", help="what --fit may write units in, such as source,nvfp4,int3_g64"
    )
    p.add_argument(
        "--harm",
        default="measured",
        help="how options are priced: measured, each by running it; surrogate, all by one sweep backward; anchored, "
        "that with a few of them measured; trace, as PrismaQuant does (default %(default)s)",
    )
    p.add_argument(
        "--hours", type=seconds_of, dest="seconds", metavar="H", help="for measuring prices; the less, the fewer tokens"
    )
    p.add_argument(
        "--experts", type=count_of, metavar="K", help="experts to keep in every layer (default: all, or what fits)"
    )
    p.add_argument("--criterion", default="reap", help="what ranks experts (default %(default)s)")
    cut_options(p)
    rounding_option(p)
    p.add_argument(
        "--to", default="compressed_tensors", dest="container", metavar="CONTAINER", help="(default %(default)s)"
    )
    parallel_options(p)
    text_options(p)


def recipe(a: Search) -> Recipe:
    """What the options of a search say; a size that --devices leaves is asked of `fit`."""
    from ...allocate import FORMATS_OFFERED, Limit, Offer, Pricing
    from ...checkpoint.inspect import size
    from ...recipes.compress import Recipe

    budget_bytes, served = a.budget_bytes, layout(a)
    if a.devices:
        room, fastest = room_on(a.model, a.devices, a.context)
        budget_bytes, served = room if budget_bytes is None else min(room, budget_bytes), served or fastest
        print(f"budget   {size(room)} on {a.devices}, served as {served.name}")
    return Recipe(
        ranking=ranking(a),
        offer=Offer(experts=a.experts, formats=a.formats or FORMATS_OFFERED, container=a.container, layout=served),
        limit=Limit(budget_bytes=budget_bytes, bits=a.bits),
        pricing=Pricing(harm=a.harm, seconds=a.seconds, memory_bytes=held_bytes(a)),
        rounding=a.rounding or "rtn",
        devices=a.devices or "",
        context=a.context,
    )


def room_on(model: Path, devices: str, context: int | None) -> tuple[int, Layout]:
    """The bytes that devices have room for, and how they would serve the model."""
    from ...checkpoint import Checkpoint
    from ...fit import Machine, Shapes, budget, choose

    machine, source = Machine.parse(devices), Checkpoint.open(model)
    return budget(machine, source, context), choose(Shapes.of(source), machine)


def threads_in(a: Search) -> Sequence[Path]:
    return [a.run / THREADS]


def sweeps(a: Search) -> Swept:
    from ...calibrate import CHUNK_TOKENS

    return Swept(a.model, min(a.tokens, CHUNK_TOKENS))
