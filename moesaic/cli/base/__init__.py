"""What a file of this folder holds: one command, with its options, what it was given, its run and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from ...recipes.machine import Use


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What every command is given. `line` is the command as it was typed.

    A command's arguments are its parser's destinations, no more and no fewer (tests/test_cli_options.py).
    """

    line: str
    json: bool
    quiet: bool


A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True, kw_only=True)
class Command(Generic[A]):
    """One word of the command line. Its file imports a stage where it runs, so that --help answers at once.

    place  in the list of commands: the least stands first
    run    prints, and returns facts for --json; "exit" among them is the exit code
    use    what of the machine it takes; None: of a command that has no --memory and --threads, or reads no run
    """

    name: str
    place: int
    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    arguments: type[A]
    run: Callable[[A], dict[str, Any]]
    use: Callable[[A], Use] | None = None
