"""The command line: one word a stage. Nothing is computed here.

Exit 0: done; 1: a check did not hold; 2: the call or its input is wrong, in one sentence; 130:
interrupted, and the same command continues.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, MoesaicError
from ..registry import collect
from .base import Arguments, Command, resources

FOUND: dict[str, Command[Any]] = collect(__name__, Command, "__main__")
COMMANDS = {c.name: c for c in sorted(FOUND.values(), key=lambda c: c.place)}

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


def parsed(argv: Sequence[str]) -> tuple[str, Arguments]:
    """The command's word, and what it was given."""
    found = vars(parser().parse_args(argv))
    word = found.pop("command")
    return word, COMMANDS[word].arguments(**found, line=shlex.join(["moesaic", *argv]))


def main(argv: Sequence[str] | None = None) -> int:
    word, a = parsed(sys.argv[1:] if argv is None else argv)
    try:
        with resources.used(COMMANDS[word], a):
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
