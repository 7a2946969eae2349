"""`moesaic demo`: the whole path on the small model that comes along."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import THREADS, Command
from .base.groups import ResourceArguments, resource_options
from .base.telling import told


@dataclass(frozen=True, kw_only=True)
class Demo(ResourceArguments):
    run: Path


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", type=Path, nargs="?", default=Path("moesaic-demo"), help="run folder (default %(default)s)")
    resource_options(p)


def run(a: Demo) -> dict[str, Any]:
    from ..recipes.demo import demo

    return told(demo(a.run, a.quiet))


COMMAND = Command(
    name="demo",
    place=10,
    summary="the whole path on the small model that comes along",
    example="moesaic demo",
    options=options,
    arguments=Demo,
    run=run,
    threads_in=lambda a: [a.run / THREADS],
)
