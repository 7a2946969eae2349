"""The command line: one word a stage. Nothing is computed here.

Exit 0     done
     1     a check did not hold
     2     the call or its input is wrong: one sentence of what was found, what was wanted, what to do
     70    a fault of ours: one sentence that asks to report it; an exception that nobody foresaw has its traceback
           before that, with --quiet too, which is of progress alone
     130   interrupted; run the same command again to continue
"""

import argparse
import difflib
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from .. import __version__
from ..errors import FaultError, MoesaicError
from ..registry import collect
from .base import Arguments, Command, resources

FOUND: dict[str, Command[Any]] = collect(__name__, Command)
COMMANDS = {c.name: c for c in sorted(FOUND.values(), key=lambda c: c.place)}

JSON_HELP = 'print the result, or the error, as one JSON object; an infinite number is written {"float": "inf"}'


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="moesaic",
        description="Make a giant mixture-of-experts model fit the machine you have, and prove what that cost.",
        epilog="Start with: moesaic demo. Each command has a --help with an example.",
    )
    top.add_argument("--version", action="version", version=f"moesaic {__version__}")
    words = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        example = f"example: {command.example}"
        p = words.add_parser(name, help=command.summary, description=command.summary, epilog=example)
        command.options(p)
        p.add_argument("--json", action="store_true", help=JSON_HELP)
        p.add_argument("--quiet", action="store_true", help="show no progress")
    return top


def parsed(argv: Sequence[str]) -> tuple[str, Arguments]:
    """The command's word, and what it was given."""
    top = parser()
    if argv and argv[0] not in COMMANDS and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        top.error(
            f"unknown command {argv[0]!r}; "
            + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}")
        )
    found = vars(top.parse_args(argv))
    word = found.pop("command")
    return word, COMMANDS[word].arguments(**found, line=shlex.join(["moesaic", *argv]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. With --json what people read goes to standard error."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        word, a = parsed(argv)
    except SystemExit as end:
        if end.code and "--json" in argv:
            tell_json({"error": "the command line is wrong; standard error says how"}, 2)
        raise
    try:
        with redirect_stdout(sys.stderr if a.json else sys.stdout), resources.used(COMMANDS[word], a):
            facts = COMMANDS[word].run(a)
        code = int(facts.pop("exit", 0))
    except KeyboardInterrupt:
        said, code = "interrupted; run the same command again to continue", 130
        print(f"\nmoesaic {word}: {said}", file=sys.stderr)
        facts = {"error": said}
    except Exception as error:
        said, code = ended(error, a.line)
        print(f"moesaic {word}: {said}", file=sys.stderr)
        facts = {"error": said}
    if a.json:
        tell_json(facts, code)
    return code


def tell_json(facts: dict[str, Any], code: int) -> None:
    """The object; of an error with the exit code."""
    from ..artifact import dumps

    print(dumps(facts | ({"exit": code} if "error" in facts else {}), default=str))


def ended(error: Exception, line: str) -> tuple[str, int]:
    """What is said of an error that ended a command, and the exit code. Prints the traceback of one that nobody foresaw."""
    if isinstance(error, MoesaicError) and not isinstance(error, FaultError):
        return str(error), error.exit_code
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename} does not exist; check the path", 2
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}; change its permissions, or use another path", 2
    if not isinstance(error, FaultError):
        traceback.print_exception(error)
    what = str(error) if isinstance(error, FaultError) else f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"{what}; this is a fault of moesaic {__version__}, please report it with the command line: {line}", 70
