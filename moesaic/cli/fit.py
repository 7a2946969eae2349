"""`moesaic fit`: what fits which machine."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Command
from .base.groups import MachineArguments, machine_options
from .base.telling import show, tell


@dataclass(frozen=True, kw_only=True)
class Fit(MachineArguments):
    model: Path
    devices: str
    explain: bool


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="model folder, or a folder with only a config.json")
    machine_options(p)
    p.add_argument("--explain", action="store_true", help="show the formula behind each number")


def run(a: Fit) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..fit import Machine, answer, explain, fit, table

    source = Checkpoint.open(a.model)
    facts = fit(source, Machine.parse(a.devices), context=a.context, kv=a.kv, concurrency=a.concurrency or 1)
    command, search = next_command(a, facts), search_command(a, facts)
    facts["recommendation"] |= {"command": command, "search": search}
    show(table(facts))
    if a.explain:
        print(explain(facts))
    print()
    tell(answer(facts))
    if command:
        where = "" if source.has_weights else f", once the weights are in {a.model}"
        tell(f"Next{where}:")
        print(f"  {command}")
    if search:
        tell("Or, in hours, the best mix of formats and counts that fits there, priced on the model itself:")
        print(f"  {search}")
    return facts


def next_command(a: Fit, facts: dict[str, Any]) -> str:
    """What serves the model where it fits, else what makes the plan that is recommended; "" where none is."""
    plan, machine = facts["recommendation"], facts["machine"]
    if plan["format"] is None:
        return ""
    if plan["unchanged"]:
        words = ["serve", str(a.model)]
        if machine["engine"] == "vllm":
            words += ["--devices", a.devices, "--context", str(facts["context"]), "--kv", a.kv, "--print", "command"]
            words += ["--concurrency", str(a.concurrency)] if a.concurrency else []
        else:
            words += ["--engine", "local", "--context", str(facts["context"])]
        return shlex.join(["moesaic", *words])
    cut = ["--experts", str(plan["experts"])] if plan["experts"] < facts["experts"] else []
    rest = ["--rest", plan["rest"]] if plan["rest"] != "source" else []
    out = "-".join([a.model.resolve().name, plan["format"], *(f"{n}e" for n in cut[1:])])
    words = ["compress", str(a.model), out, "--format", plan["format"], *rest, *cut, *container_words(plan)]
    return shlex.join(["moesaic", *words, *(["--mtp", "drop"] if plan["drops_mtp"] else [])])


def search_command(a: Fit, facts: dict[str, Any]) -> str:
    """What searches a plan for the same room; "" where there is nothing to search."""
    plan = facts["recommendation"]
    if plan["format"] is None or plan["unchanged"] or facts["budget_bytes"] <= 0:
        return ""
    room = facts["budget_bytes"]
    size = f"{room // 10**6}MB" if room >= 10**9 else f"{room}B"
    words = ["compress", str(a.model), f"{a.model.resolve().name}-mixed", "--fit", size]
    return shlex.join(["moesaic", *words, *container_words(plan), *(["--mtp", "drop"] if plan["has_mtp"] else [])])


def container_words(plan: dict[str, Any]) -> list[str]:
    """Where the plan is to be loaded."""
    words, layout = ["--to", plan["container"]], plan["layout"]
    words += ["--tensor-parallel", str(layout["devices"])] if layout["devices"] > 1 else []
    return words + (["--expert-parallel"] if layout["expert_parallel"] else [])


COMMAND = Command(
    name="fit",
    place=30,
    summary="show what fits on given devices, before anything is downloaded",
    example="moesaic fit MiniMax-M3-MXFP8 --devices 4xH100NVL --context 131072 --kv fp8",
    options=options,
    arguments=Fit,
    run=run,
)
