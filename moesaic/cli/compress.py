"""`moesaic compress`: the whole path."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .base import Command
from .base.groups import corpus
from .base.search import Search, budget_options, offer_options, recipe, use
from .base.telling import told, trying_out
from .base.values import count_of


@dataclass(frozen=True, kw_only=True)
class Compress(Search):
    format: str
    rest: str
    evaluation_tokens: int


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="folder of the source model")
    p.add_argument("run", type=Path, help="run folder; the result is RUN/model, and RUN/report.html shows what it cost")
    budget_options(p)
    p.add_argument(
        "--format",
        default="source",
        help="format of routed experts: mxfp4, nvfp4, int4_g128, … (default %(default)s, unchanged)",
    )
    p.add_argument(
        "--rest", default="source", help="format of all other matrices: bf16, … (default %(default)s, unchanged)"
    )
    p.add_argument(
        "--evaluation-tokens",
        type=count_of,
        default=65_536,
        metavar="N",
        help="number of tokens for evaluation (default %(default)s)",
    )
    offer_options(p)


def run(a: Compress) -> dict[str, Any]:
    from ..recipes.compress import compress

    asked = replace(recipe(a), format=a.format, rest=a.rest, evaluation_tokens=a.evaluation_tokens)
    with trying_out(a.data is None):
        return told(compress(a.model, a.run, asked, corpus(a), command=a.line, quiet=a.quiet))


COMMAND = Command(
    name="compress",
    place=40,
    summary="make a model smaller: choose a plan, export, verify, evaluate and report",
    example="moesaic compress MiniMax-M3-MXFP8 run --experts 64 --format mxfp4 --data texts/",
    options=options,
    arguments=Compress,
    run=run,
    use=use,
)
