"""What a command may take of the machine, by its options: the threads of its run, and whether its memory is enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import A, Command
from .groups import ResourceArguments


@contextmanager
def used(command: Command[A], a: A) -> Iterator[None]:
    """While a command runs. Raises `InputError` for memory that it cannot do with, `StaleError` for another run's threads."""
    if not isinstance(a, ResourceArguments):
        yield
        return
    from ...recipes.machine import Use
    from ...resources import Resources

    use = command.use(a) if command.use else Use(())
    with use.within(Resources(memory_bytes=a.memory_bytes, threads=a.threads)):
        yield
