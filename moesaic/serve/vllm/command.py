"""The command line itself: one command, or one for each node, for a shell."""

import shlex

from .base import Deployment, Renderer

HEAD = '"$HEAD"'


def shell(what: Deployment, rank: int = 0, more: str = "") -> str:
    """One command over several lines; $HEAD stands for the first node's address."""
    pairs = [(flag, value if value in ("", HEAD) else shlex.quote(value)) for flag, value in what.pairs(rank, HEAD)]
    lines = [f"vllm serve {shlex.quote(str(what.model))}", *(f"{flag} {value}".rstrip() for flag, value in pairs)]
    return " \\\n  ".join(lines + ([more] if more else []))


def render(what: Deployment) -> str:
    if what.nodes == 1:
        return shell(what) + "\n"
    commands = [f"# on node {rank}\n{shell(what, rank)}\n" for rank in range(what.nodes)]
    return "HEAD=10.0.0.1  # the address of node 0, as the other nodes reach it\n\n" + "\n".join(commands)


COMMAND = Renderer("command", render, "https://docs.vllm.ai/en/v0.32.0/cli/serve")
