"""`moesaic export`: a run's plan written, or any model in another container."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .base import Command
from .base.groups import ParallelArguments, layout, parallel_options, resource_options
from .base.telling import sizes


@dataclass(frozen=True, kw_only=True)
class Export(ParallelArguments):
    model: Path
    out: Path | None
    container: str | None
    check: bool


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="model folder, or a run folder with a plan")
    p.add_argument(
        "out",
        type=Path,
        nargs="?",
        help="folder for the result (default MODEL-CONTAINER; for a run RUN/model or RUN/model-CONTAINER)",
    )
    p.add_argument(
        "--to",
        dest="container",
        metavar="CONTAINER",
        help="container to write: mlx, compressed_tensors, auto_round, gptq, unquantized, …",
    )
    parallel_options(p)
    p.add_argument("--no-verify", action="store_false", dest="check", help="do not verify the result")
    resource_options(p)


def run(a: Export) -> dict[str, Any]:
    from ..recipes.convert import convert, export_run, is_run

    if is_run(a.model):
        facts = export_run(a.model, a.out, a.container, layout(a), check=a.check, quiet=a.quiet)
    elif a.container is None:
        raise InputError(f"{a.model} is a model folder, not a run folder; add --to CONTAINER, such as --to mlx")
    else:
        out = a.out or a.model.with_name(f"{a.model.name}-{a.container}")
        facts = convert(a.model, out, a.container, layout(a), check=a.check, quiet=a.quiet)
    for way, count in facts["matrices"].items():
        print(f"{count:>9,} matrices  {way}")
    sizes(facts)
    return facts


COMMAND = Command(
    name="export",
    place=100,
    summary="write the plan of a run, or convert a model to another container without rounding",
    example="moesaic export M3-MXFP4 --to mlx",
    options=options,
    arguments=Export,
    run=run,
)
