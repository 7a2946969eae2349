"""The command line: one word a stage. Nothing is computed here.

Exit 0: done; 1: a check did not hold; 2: the call or its input is wrong, in one sentence; 130:
interrupted, and the same command continues.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError, MoesaicError
from . import commands, options

Command = tuple[str, str, Callable[[argparse.ArgumentParser], None], Callable[[Arguments], dict[str, Any]]]


COMMANDS: dict[str, Command] = {
    "demo": (
        "the whole path on the small model that comes along",
        "moesaic demo",
        options.demo_options,
        commands.run_demo,
    ),
    "inspect": (
        "what a model holds, from headers alone",
        "moesaic inspect MiniMax-M3-MXFP8",
        options.inspect_options,
        commands.run_inspect,
    ),
    "compress": (
        "the whole path: choose, export, verify, evaluate, report",
        "moesaic compress MiniMax-M3-MXFP8 run --experts 64 --format mxfp4 --data texts/",
        options.compress_options,
        commands.run_compress,
    ),
    "prune": (
        "drop experts; what stays is copied byte for byte",
        "moesaic prune MiniMax-M3-MXFP8 M3-64e --experts 64 --data texts/",
        options.prune_options,
        commands.run_prune,
    ),
    "quantize": (
        "round experts to one format, without data",
        "moesaic quantize MiniMax-M2.7 M2.7-MXFP4 --format mxfp4 --rest bf16",
        options.quantize_options,
        commands.run_quantize,
    ),
    "fit": (
        "what fits which machine, before anything is downloaded",
        "moesaic fit MiniMax-M3-MXFP8 --devices 4xH100NVL --context 131072 --kv fp8",
        options.fit_options,
        commands.run_fit,
    ),
    "serve": (
        "an OpenAI-compatible server: vLLM's command, or what deploys it",
        "moesaic serve run/model --devices 4xH100NVL --print compose",
        options.serve_options,
        commands.run_serve,
    ),
    "report": ("make a run's page again", "moesaic report run", options.report_options, commands.run_report),
    "verify": (
        "reopen an export and check everything",
        "moesaic verify M3-64e --source MiniMax-M3-MXFP8",
        options.verify_options,
        commands.run_verify,
    ),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="moesaic", description="Make a giant mixture-of-experts model fit, and prove what that cost."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, example, options, _) in COMMANDS.items():
        p = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        options(p)
        p.add_argument(
            "--json", action="store_true", help="print the facts as one JSON object, last on standard output"
        )
        p.add_argument("--quiet", action="store_true", help="no progress")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    a.line = shlex.join(["moesaic", *(sys.argv[1:] if argv is None else argv)])
    try:
        facts = COMMANDS[a.command][3](a)
    except MoesaicError as error:
        print(f"moesaic {a.command}: {error}", file=sys.stderr)
        return error.exit_code
    except FileNotFoundError as error:
        print(f"moesaic {a.command}: {InputError(f'{error.filename} is not there; check the path')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmoesaic {a.command}: interrupted; the same command continues", file=sys.stderr)
        return 130
    code = facts.pop("exit", 0)
    if a.json:
        print(json.dumps(facts, default=str))
    return code
