"""What `measure`, `allocate` and `compress` have in common: what is on offer, how large the result may be, and the recipe."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .groups import (
    CutArguments,
    ParallelArguments,
    TextArguments,
    corpus,
    cut_options,
    layout,
    parallel_options,
    ranking,
    rounding_option,
    text_options,
)
from .values import bits_of, bytes_of, count_of, names_of, seconds_of

if TYPE_CHECKING:
    from ...recipes.compress import Recipe
    from ...recipes.machine import Use


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
        help="find the best plan of at most this size on disk: 90GB, 84GiB",
    )
    p.add_argument(
        "--devices", metavar="NxSIZE", help="find the best plan that fits on these devices: 2x95GiB, 4xH100NVL, …"
    )
    p.add_argument(
        "--context", type=count_of, metavar="N", help="with --devices: context length of a request, in tokens"
    )
    p.add_argument(
        "--bits",
        type=bits_of,
        metavar="B",
        help="find the best plan of at most so many stored bits per weight of the source",
    )


def offer_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--formats", type=names_of, metavar="F,F", help="formats that such a plan may use: source,nvfp4,int3_g64"
    )
    p.add_argument(
        "--harm",
        default="measured",
        help="how the cost of an option is found: measured (run each option), surrogate (one backward sweep for all), "
        "anchored (surrogate, and a few measured) or trace (the method of PrismaQuant) (default %(default)s)",
    )
    p.add_argument(
        "--hours",
        type=seconds_of,
        dest="seconds",
        metavar="H",
        help="hours for finding costs; with less time, fewer tokens are used (default: no limit)",
    )
    p.add_argument(
        "--experts",
        type=count_of,
        metavar="K",
        help="number of experts to keep in every layer (default: all, or what fits)",
    )
    p.add_argument("--criterion", default="reap", help="pruning criterion that ranks experts (default %(default)s)")
    cut_options(p)
    rounding_option(p)
    p.add_argument(
        "--to",
        default="compressed_tensors",
        dest="container",
        metavar="CONTAINER",
        help="container to write (default %(default)s)",
    )
    parallel_options(p)
    text_options(p)


def recipe(a: Search) -> Recipe:
    """What the options of a search say; a size that --devices leaves is asked of `fit`."""
    from ...allocate import FORMATS_OFFERED, Limit, Offer, Pricing
    from ...checkpoint.inspect import size
    from ...recipes.compress import Recipe, fitted
    from ...recipes.machine import held_bytes

    found = Recipe(
        ranking=ranking(a),
        offer=Offer(experts=a.experts, formats=a.formats or FORMATS_OFFERED, container=a.container, layout=layout(a)),
        limit=Limit(budget_bytes=a.budget_bytes, bits=a.bits),
        pricing=Pricing(harm=a.harm, seconds=a.seconds, memory_bytes=held_bytes(a.memory_bytes)),
        rounding=a.rounding or "rtn",
        devices=a.devices or "",
        context=a.context,
    )
    found = fitted(a.model, found)
    if (room := found.limit.budget_bytes) and found.devices and found.offer.layout:
        print(f"budget   {size(room)} on {a.devices}, served as {found.offer.layout.name}")
    return found


def use(a: Search) -> Use:
    from ...recipes.compress import use

    return use(a.model, a.run, corpus(a))
