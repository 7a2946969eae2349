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
    p.add_argument("model", type=Path)
    p.add_argument("run", type=Path, help="run folder: run/model is the result, run/report.html what it cost")
    budget_options(p)
    p.add_argument(
        "--format", default="source", help="of routed experts: mxfp4, nvfp4, int4_g128, … (default %(default)s)"
    )
    p.add_argument("--rest", default="source", help="of every other matrix: source, bf16, … (default %(default)s)")
    p.add_argument(
        "--evaluation-tokens",
        type=count_of,
        default=65_536,
        metavar="N",
        help="tokens to judge by (default %(default)s)",
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
    summary="the whole path: choose, export, verify, evaluate, report",
    example="moesaic compress MiniMax-M3-MXFP8 run --experts 64 --format mxfp4 --data texts/",
    options=options,
    arguments=Compress,
    run=run,
    use=use,
)
