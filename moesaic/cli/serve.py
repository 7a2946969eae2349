"""`moesaic serve`: serve with vLLM or here, or write down what does."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .base import Command
from .base.groups import MachineArguments, machine_options
from .base.values import bytes_of, count_of, port_of


@dataclass(frozen=True, kw_only=True)
class Serve(MachineArguments):
    export: Path
    engine: str
    devices: str | None
    way: str | None
    host: str
    port: int
    expert_bytes: int | None
    cache_bytes: int | None
    key_file: Path | None
    new_tokens: int


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path, help="folder of the model to serve")
    p.add_argument(
        "--engine",
        choices=("vllm", "local"),
        default="vllm",
        help="vllm, or local for the included server (default %(default)s)",
    )
    machine_options(p, required=False)
    p.add_argument(
        "--print",
        dest="way",
        metavar="WAY",
        help="print a command, compose, kubernetes or ray file instead of running vLLM",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    p.add_argument("--port", type=port_of, default=8000, help="port to listen on (default %(default)s)")
    local = p.add_argument_group("with --engine local")
    local.add_argument(
        "--expert-memory",
        type=bytes_of,
        dest="expert_bytes",
        metavar="SIZE",
        help="memory for weights (default: half of what is available)",
    )
    local.add_argument("--memory", type=bytes_of, dest="expert_bytes", help=argparse.SUPPRESS)  # its former name
    local.add_argument(
        "--cache",
        type=bytes_of,
        dest="cache_bytes",
        metavar="SIZE",
        help="memory for the KV cache (default: 1/16 of what is available)",
    )
    local.add_argument("--key-file", type=Path, metavar="FILE", help="file with the key that requests must send")
    local.add_argument(
        "--max-tokens",
        type=count_of,
        default=4096,
        dest="new_tokens",
        metavar="N",
        help="largest number of new tokens per answer (default %(default)s)",
    )


def run(a: Serve) -> dict[str, Any]:
    if a.engine == "local":
        return local(a)
    if not a.devices:
        raise InputError("no devices were given for vLLM; add --devices 2x95GiB, or use --engine local")
    from ..checkpoint import Checkpoint
    from ..fit import Machine, fit
    from ..serve.vllm import deployment, render

    export, machine = Checkpoint.open(a.export), Machine.parse(a.devices)
    facts = fit(export, machine, context=a.context, kv=a.kv, concurrency=a.concurrency or 1)
    deployed = deployment(export, facts, host=a.host, port=a.port)
    if a.way:
        written = render(deployed, a.way)
        print(written)
        return {"printed": a.way, "text": written}
    if deployed.nodes > 1 or shutil.which("vllm") is None:
        why = "vLLM is not installed here" if deployed.nodes == 1 else f"this takes {deployed.nodes} machines"
        raise InputError(f"{why}; add --print command, compose, kubernetes or ray to get what starts it elsewhere")
    return {"exit": subprocess.call(deployed.words(str(a.export)))}


def local(a: Serve) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..serve.local import Room, local, read_key, run

    key = read_key(a.key_file) if a.key_file else None
    room = Room(
        memory_bytes=a.expert_bytes, cache_bytes=a.cache_bytes, context=a.context, concurrency=a.concurrency,
        new_tokens=a.new_tokens,
    )  # fmt: skip
    run(local(Checkpoint.open(a.export), key, room), host=a.host, port=a.port)
    return {}


COMMAND = Command(
    name="serve",
    place=140,
    summary="serve with vLLM or the included server, or print the command or manifest for it",
    example="moesaic serve run/model --devices 4xH100NVL --print compose",
    options=options,
    arguments=Serve,
    run=run,
)
