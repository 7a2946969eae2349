"""`moesaic fit`: what fits which machine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Command
from .base.groups import MachineArguments, machine_options
from .base.telling import show


@dataclass(frozen=True, kw_only=True)
class Fit(MachineArguments):
    model: Path
    devices: str
    explain: bool


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="a model folder, or one with a config.json alone")
    machine_options(p)
    p.add_argument("--explain", action="store_true", help="the formula behind each number")


def run(a: Fit) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..fit import Machine, explain, fit, table

    facts = fit(
        Checkpoint.open(a.model), Machine.parse(a.devices), context=a.context, kv=a.kv, concurrency=a.concurrency or 1
    )
    show(table(facts))
    if a.explain:
        print(explain(facts))
    return facts


COMMAND = Command(
    name="fit",
    place=30,
    summary="what fits which machine, before anything is downloaded",
    example="moesaic fit MiniMax-M3-MXFP8 --devices 4xH100NVL --context 131072 --kv fp8",
    options=options,
    arguments=Fit,
    run=run,
)
