"""`moesaic inspect`: what a model holds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Arguments, Command
from .base.telling import show


@dataclass(frozen=True, kw_only=True)
class Inspect(Arguments):
    model: Path
    base: Path | None


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="model folder, or a folder with only a config.json")
    p.add_argument("--base", type=Path, metavar="MODEL", help="show which experts of this model were kept")


def run(a: Inspect) -> dict[str, Any]:
    from ..checkpoint.inspect import inspect, table

    facts = inspect(a.model, a.base)
    show(table(facts))
    for layer, ids in facts.get("kept", {}).items():
        print(f"layer {layer} kept experts {' '.join(map(str, ids))}")
    return facts


COMMAND = Command(
    name="inspect",
    place=20,
    summary="show what a model contains, from headers only",
    example="moesaic inspect MiniMax-M3-MXFP8",
    options=options,
    arguments=Inspect,
    run=run,
)
