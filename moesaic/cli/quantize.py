"""`moesaic quantize`: round to one format."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Command
from .base.groups import (
    ParallelArguments,
    TextArguments,
    corpus,
    layout,
    mtp_option,
    parallel_options,
    rounding_option,
    text_options,
)
from .base.telling import sizes, tell_rounding, trying_out

if TYPE_CHECKING:
    from ..recipes.machine import Use


@dataclass(frozen=True, kw_only=True)
class Quantize(TextArguments, ParallelArguments):
    model: Path
    out: Path
    format: str
    only: str
    rest: str
    container: str
    rounding: str | None
    check: bool
    mtp: str


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="folder of the source model")
    p.add_argument("out", type=Path, help="folder for the result")
    p.add_argument("--format", required=True, help="format to write: mxfp4, nvfp4, int4_g128, mxfp8, …")
    p.add_argument(
        "--only",
        default="experts",
        help="what is rounded: experts, or linears for every linear layer (default %(default)s)",
    )
    p.add_argument(
        "--rest",
        default="source",
        help="format of the other matrices: source (unchanged) or bf16 (default %(default)s)",
    )
    p.add_argument(
        "--to",
        default="compressed_tensors",
        dest="container",
        metavar="CONTAINER",
        help="container to write (default %(default)s)",
    )
    rounding_option(p)
    mtp_option(p)
    parallel_options(p)
    p.add_argument("--no-verify", action="store_false", dest="check", help="do not verify the result")
    text_options(p)


def run(a: Quantize) -> dict[str, Any]:
    from ..recipes.quantize import Quantizing, quantize
    from ..rounding import ROUNDINGS

    asked = Quantizing(
        format=a.format, only=a.only, rest=a.rest, container=a.container, rounding=a.rounding or "rtn",
        layout=layout(a), check=a.check, mtp=a.mtp,
    )  # fmt: skip
    reads = asked.rounding in ROUNDINGS and bool(ROUNDINGS[asked.rounding].needs)
    with trying_out(reads and a.data is None):
        return told_rounding(quantize(a.model, a.out, asked, corpus(a), command=a.line, quiet=a.quiet))


def told_rounding(facts: dict[str, Any]) -> dict[str, Any]:
    tell_rounding(facts)
    if errors := sorted(e for layer in facts.get("expert_errors", {}).values() for e in layer):
        middle = errors[len(errors) // 2]
        print(
            f"weight error of {len(errors):,} experts: {errors[0]:.4f} to {errors[-1]:.4f}, median {middle:.4f} of their norm"
        )
    sizes(facts)
    return facts


def use(a: Quantize) -> Use:
    from ..recipes.quantize import use

    return use(a.model, a.out, a.rounding or "rtn", corpus(a))


COMMAND = Command(
    name="quantize",
    place=90,
    summary="round to one format, with or without calibration text",
    example="moesaic quantize MiniMax-M2.7 M2.7-MXFP4 --format mxfp4 --rest bf16",
    options=options,
    arguments=Quantize,
    run=run,
    use=use,
)
