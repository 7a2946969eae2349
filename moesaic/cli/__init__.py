"""The command line: one word a stage. Nothing is computed here.

Exit 0: done; 1: a check did not hold; 2: the call or its input is wrong, in one sentence; 130:
interrupted, and the same command continues.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import InputError, MoesaicError
from . import arguments, commands, evaluating, options, resources

A = TypeVar("A", bound=arguments.Arguments)


@dataclass(frozen=True)
class Command(Generic[A]):
    """One word of the command line."""

    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    arguments: type[A]
    run: Callable[[A], dict[str, Any]]  # prints, and returns facts; "exit" among them is the exit code


COMMANDS: dict[str, Command[Any]] = {
    "demo": Command(
        "the whole path on the small model that comes along",
        "moesaic demo",
        options.demo_options,
        arguments.Demo,
        commands.run_demo,
    ),
    "inspect": Command(
        "what a model holds, from headers alone",
        "moesaic inspect MiniMax-M3-MXFP8",
        options.inspect_options,
        arguments.Inspect,
        commands.run_inspect,
    ),
    "fit": Command(
        "what fits which machine, before anything is downloaded",
        "moesaic fit MiniMax-M3-MXFP8 --devices 4xH100NVL --context 131072 --kv fp8",
        options.fit_options,
        arguments.Fit,
        commands.run_fit,
    ),
    "compress": Command(
        "the whole path: choose, export, verify, evaluate, report",
        "moesaic compress MiniMax-M3-MXFP8 run --experts 64 --format mxfp4 --data texts/",
        options.compress_options,
        arguments.Compress,
        commands.run_compress,
    ),
    "calibrate": Command(
        "one sweep of statistics, for every criterion and every domain",
        "moesaic calibrate MiniMax-M3-MXFP8 run --data texts/",
        options.calibrate_options,
        arguments.Calibrate,
        commands.run_calibrate,
    ),
    "measure": Command(
        "what every option costs alone, in nats",
        "moesaic measure MiniMax-M2.7 run --harm surrogate --data texts/",
        options.measure_options,
        arguments.Search,
        commands.run_measure,
    ),
    "allocate": Command(
        "the whole curve of bytes against nats, and the best plan of a size",
        "moesaic allocate MiniMax-M2.7 run --fit 90GB --data texts/",
        options.allocate_options,
        arguments.Search,
        commands.run_allocate,
    ),
    "prune": Command(
        "drop experts; what stays is copied byte for byte",
        "moesaic prune MiniMax-M3-MXFP8 M3-64e --experts 64 --data texts/",
        options.prune_options,
        arguments.Prune,
        commands.run_prune,
    ),
    "quantize": Command(
        "round to one format, without data or by it",
        "moesaic quantize MiniMax-M2.7 M2.7-MXFP4 --format mxfp4 --rest bf16",
        options.quantize_options,
        arguments.Quantize,
        commands.run_quantize,
    ),
    "export": Command(
        "write a run's plan, or any model in another container, nothing rounded",
        "moesaic export M3-MXFP4 --to mlx",
        options.export_options,
        arguments.Export,
        commands.run_export,
    ),
    "verify": Command(
        "reopen an export and check everything",
        "moesaic verify M3-64e --source MiniMax-M3-MXFP8",
        options.verify_options,
        arguments.Verify,
        commands.run_verify,
    ),
    "evaluate": Command(
        "KL, perplexity, routing, needle, tasks and samples against the source, or as served, with errors",
        "moesaic evaluate M3-64e --against MiniMax-M3-MXFP8 --data texts/",
        evaluating.options,
        arguments.Evaluate,
        evaluating.run,
    ),
    "report": Command(
        "make a run's page again",
        "moesaic report run",
        options.report_options,
        arguments.Report,
        commands.run_report,
    ),
    "serve": Command(
        "serve with vLLM or by itself, or write down what does",
        "moesaic serve run/model --devices 4xH100NVL --print compose",
        options.serve_options,
        arguments.Serve,
        commands.run_serve,
    ),
}

JSON_HELP = 'print the facts as one JSON object, the last line of all; an infinite number is {"float": "inf"}'


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="moesaic", description="Make a giant mixture-of-experts model fit, and prove what that cost."
    )
    words = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        example = f"example: {command.example}"
        p = words.add_parser(name, help=command.summary, description=command.summary, epilog=example)
        command.options(p)
        p.add_argument("--json", action="store_true", help=JSON_HELP)
        p.add_argument("--quiet", action="store_true", help="no progress")
    return top


def parsed(argv: Sequence[str]) -> tuple[str, arguments.Arguments]:
    """The command's word, and what it was given."""
    found = vars(parser().parse_args(argv))
    word = found.pop("command")
    return word, COMMANDS[word].arguments(**found, line=shlex.join(["moesaic", *argv]))


def main(argv: Sequence[str] | None = None) -> int:
    word, a = parsed(sys.argv[1:] if argv is None else argv)
    try:
        with resources.used(a):
            facts = COMMANDS[word].run(a)
    except MoesaicError as error:
        print(f"moesaic {word}: {error}", file=sys.stderr)
        return error.exit_code
    except FileNotFoundError as error:
        print(f"moesaic {word}: {InputError(f'{error.filename} is not there; check the path')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmoesaic {word}: interrupted; the same command continues", file=sys.stderr)
        return 130
    code = int(facts.pop("exit", 0))
    if a.json:
        from ..artifact import dumps

        print(dumps(facts, default=str))
    return code
