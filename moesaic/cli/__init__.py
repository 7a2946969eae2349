"""The command line: one word a stage. Nothing is computed here.

Exit 0: done; 1: a check did not hold; 2: the call or its input is wrong, in one sentence; 130:
interrupted, and the same command continues.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, MoesaicError
from . import commands, evaluating, options


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]  # prints, and returns facts; "exit" among them is the exit code


COMMANDS = {
    "demo": Command(
        "the whole path on the small model that comes along",
        "moesaic demo",
        options.demo_options,
        commands.run_demo,
    ),
    "inspect": Command(
        "what a model holds, from headers alone",
        "moesaic inspect MiniMax-M3-MXFP8",
        options.inspect_options,
        commands.run_inspect,
    ),
    "fit": Command(
        "what fits which machine, before anything is downloaded",
        "moesaic fit MiniMax-M3-MXFP8 --devices 4xH100NVL --context 131072 --kv fp8",
        options.fit_options,
        commands.run_fit,
    ),
    "compress": Command(
        "the whole path: choose, export, verify, evaluate, report",
        "moesaic compress MiniMax-M3-MXFP8 run --experts 64 --format mxfp4 --data texts/",
        options.compress_options,
        commands.run_compress,
    ),
    "calibrate": Command(
        "one sweep of statistics, for every criterion and every domain",
        "moesaic calibrate MiniMax-M3-MXFP8 run --data texts/",
        options.calibrate_options,
        commands.run_calibrate,
    ),
    "measure": Command(
        "what every option costs alone, in nats",
        "moesaic measure MiniMax-M2.7 run --harm surrogate --data texts/",
        options.measure_options,
        commands.run_measure,
    ),
    "allocate": Command(
        "the whole curve of bytes against nats, and the best plan of a size",
        "moesaic allocate MiniMax-M2.7 run --fit 90GB --data texts/",
        options.allocate_options,
        commands.run_allocate,
    ),
    "prune": Command(
        "drop experts; what stays is copied byte for byte",
        "moesaic prune MiniMax-M3-MXFP8 M3-64e --experts 64 --data texts/",
        options.prune_options,
        commands.run_prune,
    ),
    "quantize": Command(
        "round to one format, without data or by it",
        "moesaic quantize MiniMax-M2.7 M2.7-MXFP4 --format mxfp4 --rest bf16",
        options.quantize_options,
        commands.run_quantize,
    ),
    "export": Command(
        "write a run's plan, or any model in another container, nothing rounded",
        "moesaic export M3-MXFP4 --to mlx",
        options.export_options,
        commands.run_export,
    ),
    "verify": Command(
        "reopen an export and check everything",
        "moesaic verify M3-64e --source MiniMax-M3-MXFP8",
        options.verify_options,
        commands.run_verify,
    ),
    "evaluate": Command(
        "KL, perplexity, routing, needle, tasks and samples against the source, or as served, with errors",
        "moesaic evaluate M3-64e --against MiniMax-M3-MXFP8 --data texts/",
        evaluating.options,
        evaluating.run,
    ),
    "report": Command(
        "make a run's page again",
        "moesaic report run",
        options.report_options,
        commands.run_report,
    ),
    "serve": Command(
        "serve with vLLM or by itself, or write down what does",
        "moesaic serve run/model --devices 4xH100NVL --print compose",
        options.serve_options,
        commands.run_serve,
    ),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="moesaic", description="Make a giant mixture-of-experts model fit, and prove what that cost."
    )
    words = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        example = f"example: {command.example}"
        p = words.add_parser(name, help=command.summary, description=command.summary, epilog=example)
        command.options(p)
        p.add_argument("--json", action="store_true", help="print the facts as one JSON object, the last line of all")
        p.add_argument("--quiet", action="store_true", help="no progress")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    a.line = shlex.join(["moesaic", *(sys.argv[1:] if argv is None else argv)])
    try:
        facts = COMMANDS[a.command].run(a)
    except MoesaicError as error:
        print(f"moesaic {a.command}: {error}", file=sys.stderr)
        return error.exit_code
    except FileNotFoundError as error:
        print(f"moesaic {a.command}: {InputError(f'{error.filename} is not there; check the path')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmoesaic {a.command}: interrupted; the same command continues", file=sys.stderr)
        return 130
    code = int(facts.pop("exit", 0))
    if a.json:
        print(json.dumps(facts, default=str))
    return code
