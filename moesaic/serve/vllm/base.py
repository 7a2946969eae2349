"""How vLLM is to serve one export: plain data, from an export and the facts of `fit`, that every renderer writes down.

What fit counted on is what the flags say. Leaves out running it, and tuning beyond memory.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint import Checkpoint
from ...data.tokenizer import template_of
from ...errors import InputError
from ...fit.footprint import SEQUENCES, STEP_TOKENS

VERSION = "0.32.0"  # of vLLM, whose flags and rules these are
IMAGE = f"vllm/vllm-openai:v{VERSION}"
PORT = 8000
MASTER_PORT = 29501
LOAD_BYTES_SECOND = 150e6  # a slow network volume
WARM_UP_SECONDS = 900  # profiling, compiling, capturing graphs
CACHE_FLAGS = {"bf16": "auto", "fp8": "fp8"}

Flags = Mapping[str, str | int | float | None]  # None: a flag without a value


@dataclass(frozen=True)
class Deployment:
    """One server of one export, on `nodes` machines of `devices` GPUs each."""

    model: Path
    name: str  # that clients ask for
    nodes: int
    devices: int
    flags: Flags
    load_seconds: int  # a start may take so long

    @property
    def slug(self) -> str:
        """The name, as Kubernetes and compose allow it."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40].strip("-") or "model"

    def pairs(self, rank: int, head: str) -> list[tuple[str, str]]:
        """Flags of the node `rank`, whose first node has the address `head`, with their values; "" for none."""
        flags = [(flag, "" if value is None else str(value)) for flag, value in self.flags.items()]
        if self.nodes > 1:
            flags += [("--nnodes", str(self.nodes)), ("--node-rank", str(rank)), ("--master-addr", head)]
            flags += [("--master-port", str(MASTER_PORT))] + ([("--headless", "")] if rank else [])
        return flags

    def words(self, model: str, rank: int = 0, head: str = "127.0.0.1", dollar: str = "$") -> list[str]:
        """The arguments of `vllm serve`, a word each: what to execute, and what YAML lists.

        `dollar` is how a reader that substitutes variables wants one that is part of a name.
        """
        flags = [
            f"{flag}={value if value == head else value.replace('$', dollar)}" if value else flag
            for flag, value in self.pairs(rank, head)
        ]
        return ["vllm", "serve", model.replace("$", dollar), *flags]


@dataclass(frozen=True)
class Renderer:
    """One way to write a deployment down."""

    name: str
    render: Callable[[Deployment], str]
    reference: str


def deployment(export: Checkpoint, facts: Mapping[str, Any], host: str = "127.0.0.1", port: int = PORT) -> Deployment:
    """How vLLM serves `export` on the machine of `facts` (of `fit`): the longest context that surely fits.

    Raises `InputError` when it does not fit, or when no vLLM runs there.
    """
    machine, cache = facts["machine"], facts["cache"]
    if machine["engine"] != "vllm":
        raise InputError(f"vLLM does not run on {machine['name']}; serve an export for {machine['engine']} there")
    if facts["verdict"] == "does not fit":
        room = max(0, facts["budget_bytes"]) / 1e9
        raise InputError(
            f"{export.path.name} does not fit on {machine['name']} with {facts['concurrency']} × {facts['context']:,} tokens "
            f"of {facts['kv']} cache, beside which a model may have {room:,.1f} GB; make it smaller, or ask for less cache"
        )
    serving = export.family.engine.serving(export.config)
    flags: dict[str, str | int | float | None] = {
        "--served-model-name": export.path.name,
        "--host": host,
        "--port": port,
        "--tensor-parallel-size": facts["layout"]["devices"],
        "--max-model-len": max(facts["context"], cache["longest_context"]["low"]),
        "--max-num-seqs": max(SEQUENCES["vllm"], facts["concurrency"]),
        "--max-num-batched-tokens": STEP_TOKENS["vllm"],
        "--gpu-memory-utilization": machine["utilization"],
        "--kv-cache-dtype": CACHE_FLAGS[facts["kv"]],
    }
    talk = export.family.talk(template_of(export.path))
    if talk.tool_parser:
        flags |= {"--tool-call-parser": talk.tool_parser, "--enable-auto-tool-choice": None}
    if talk.reasoning_parser:
        flags["--reasoning-parser"] = talk.reasoning_parser
    if facts["layout"]["expert_parallel"]:
        flags["--enable-expert-parallel"] = None
    if serving.block_tokens:
        flags["--block-size"] = serving.block_tokens
    if serving.attention_backend:
        flags["--attention-backend"] = serving.attention_backend
    seconds = WARM_UP_SECONDS + round(facts["disk_bytes"] / LOAD_BYTES_SECOND)
    nodes = machine["nodes"]
    return Deployment(export.path.resolve(), export.path.name, nodes, machine["devices"] // nodes, flags, seconds)
