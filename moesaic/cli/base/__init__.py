"""What a file of this folder holds: one command, with its options, what it was given, its run and what it prints."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What every command is given. `line` is the command as it was typed.

    A command's arguments are its parser's destinations, no more and no fewer (tests/test_cli_options.py).
    """

    line: str
    json: bool
    quiet: bool


THREADS = "threads.json"  # as `resources.THREADS`, which would take a second to import
A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True)
class Swept:
    """What a command takes through a model: so many tokens, in so many states side by side."""

    model: Path
    tokens: int
    states: int = 1


def nowhere(a: Any) -> Sequence[Path]:
    return ()


def nothing(a: Any) -> Swept | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Command(Generic[A]):
    """One word of the command line. Its file imports a stage where it runs, so that --help answers at once.

    place       in the list of commands: the least stands first
    run         prints, and returns facts for --json; "exit" among them is the exit code
    threads_in  the files that keep the counts of threads of what it reads and writes (`Resources.used`)
    sweeps      what has to fit into --memory
    """

    name: str
    place: int
    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    arguments: type[A]
    run: Callable[[A], dict[str, Any]]
    threads_in: Callable[[A], Sequence[Path]] = nowhere
    sweeps: Callable[[A], Swept | None] = nothing
