"""`moesaic demo`: the whole path on the small model that comes along."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Command
from .base.groups import ResourceArguments, resource_options
from .base.telling import told

if TYPE_CHECKING:
    from ..recipes.machine import Use


@dataclass(frozen=True, kw_only=True)
class Demo(ResourceArguments):
    run: Path


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", type=Path, nargs="?", default=Path("moesaic-demo"), help="run folder (default %(default)s)")
    resource_options(p)


def run(a: Demo) -> dict[str, Any]:
    from ..recipes.demo import demo

    return told(demo(a.run, a.quiet))


def use(a: Demo) -> Use:
    from ..recipes.demo import use

    return use(a.run)


COMMAND = Command(
    name="demo",
    place=10,
    summary="compress the small model that is included, in two minutes",
    example="moesaic demo",
    options=options,
    arguments=Demo,
    run=run,
    use=use,
)
