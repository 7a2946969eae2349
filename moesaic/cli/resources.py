"""What a command may take of the machine, by its options: the threads of its run, and whether its memory is enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import arguments


@contextmanager
def used(a: arguments.Arguments) -> Iterator[None]:
    """While a command runs. Raises `InputError` for memory that it cannot do with, `StaleError` for another run's threads."""
    if not isinstance(a, arguments.ResourceArguments):
        yield
        return
    from ..resources import Resources

    with Resources(memory_bytes=a.memory_bytes, threads=a.threads).used(*kept_in(a)):
        if a.memory_bytes is not None:
            check_memory(a, a.memory_bytes)
        yield


def held_bytes(a: arguments.ResourceArguments) -> int | None:
    """What of --memory is for what may be held more or less of; None: the like of what is available then."""
    import torch

    from ..resources import Resources

    return None if a.memory_bytes is None else Resources(a.memory_bytes).held_bytes(torch.device("cpu"))


def kept_in(a: arguments.ResourceArguments) -> list[Path]:
    """The files that keep the counts of threads of what a command reads and writes. An export alone depends on none."""
    from ..resources import THREADS

    match a:
        case arguments.Prune():
            return [folder / THREADS for folder in (a.out / "moesaic", a.run) if folder]
        case arguments.Quantize():
            return [a.out / "moesaic" / THREADS]
        case arguments.Evaluate():  # an export may be judged on another machine than it was made on
            out = a.out or a.export / "moesaic"
            return [out / f"evaluate-{THREADS}", *([a.cache / THREADS] if a.cache else [])]
        case arguments.Search() | arguments.Calibrate() | arguments.Demo():
            return [a.run / THREADS]
    return []


def check_memory(a: arguments.ResourceArguments, memory_bytes: int) -> None:
    """Raises `InputError` where a sweep of the command's tokens needs more than --memory, however little it holds at once."""
    from ..calibrate import CHUNK_TOKENS
    from ..checkpoint import Checkpoint
    from ..checkpoint.inspect import size
    from ..errors import InputError
    from ..stream import needed_bytes

    match a:
        case arguments.Search() | arguments.Calibrate():
            model, tokens, states = a.model, min(a.tokens, CHUNK_TOKENS), 1
        case arguments.Prune() | arguments.Quantize():
            model, tokens, states = a.model, a.tokens, 1
        case arguments.Evaluate(against=Path()) if not a.server:
            model, tokens, states = a.against or a.export, a.tokens, 2
        case _:
            return
    if isinstance(a, arguments.Quantize) and a.rounding in (None, "rtn"):
        tokens = 0
    need = needed_bytes(Checkpoint.open(model), tokens, states)
    if memory_bytes < need:
        raise InputError(
            f"--memory is {size(memory_bytes)}, and a sweep of {tokens:,} tokens needs {size(need)} for one block, a layer's "
            "weights and hidden states; give more, or fewer --tokens"
        )
