"""What a command may take of the machine, by its options: the threads of its run, and whether its memory is enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import A, Command, Swept
from .groups import ResourceArguments


@contextmanager
def used(command: Command[A], a: A) -> Iterator[None]:
    """While a command runs. Raises `InputError` for memory that it cannot do with, `StaleError` for another run's threads."""
    if not isinstance(a, ResourceArguments):
        yield
        return
    from ...resources import Resources

    with Resources(memory_bytes=a.memory_bytes, threads=a.threads).used(*command.threads_in(a)):
        if a.memory_bytes is not None and (swept := command.sweeps(a)):
            check_memory(swept, a.memory_bytes)
        yield


def held_bytes(a: ResourceArguments) -> int | None:
    """What of --memory is for what may be held more or less of; None: the like of what is available then."""
    import torch

    from ...resources import Resources

    return None if a.memory_bytes is None else Resources(a.memory_bytes).held_bytes(torch.device("cpu"))


def check_memory(swept: Swept, memory_bytes: int) -> None:
    """Raises `InputError` where the sweep needs more than --memory, however little it holds at once."""
    from ...checkpoint import Checkpoint
    from ...checkpoint.inspect import size
    from ...errors import InputError
    from ...stream import needed_bytes

    need = needed_bytes(Checkpoint.open(swept.model), swept.tokens, swept.states)
    if memory_bytes < need:
        raise InputError(
            f"--memory is {size(memory_bytes)}, and a sweep of {swept.tokens:,} tokens needs {size(need)} for one block, a "
            "layer's weights and hidden states; give more, or fewer --tokens"
        )
