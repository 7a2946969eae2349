"""What a path takes of the machine: the files that keep its count of threads, and memory for what it sweeps.

Leaves out how much there is (resources).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.inspect import size
from ..errors import InputError
from ..resources import Resources
from ..stream import needed_bytes


@dataclass(frozen=True)
class Use:
    """What one call takes.

    kept_in  files that keep the count of threads of what is read and written (`Resources.used`)
    swept    the model that is taken through a sweep; None: there is no sweep
    tokens   in that sweep at once, in each of `states` states side by side
    """

    kept_in: tuple[Path, ...]
    swept: Path | None = None
    tokens: int = 0
    states: int = 1

    @contextmanager
    def within(self, resources: Resources) -> Iterator[None]:
        """While the call runs. Raises `InputError` for too little memory, `StaleError` for another run's threads."""
        with resources.used(*self.kept_in):
            if resources.memory_bytes is not None and self.swept is not None:
                self.check(self.swept, resources.memory_bytes)
            yield

    def check(self, model: Path, memory_bytes: int) -> None:
        """Raises `InputError` where the sweep needs more, however little it holds at once."""
        need = needed_bytes(Checkpoint.open(model), self.tokens, self.states)
        if memory_bytes < need:
            raise InputError(
                f"--memory is {size(memory_bytes)}, and a sweep of {self.tokens:,} tokens needs {size(need)} for one "
                "block, a layer's weights and hidden states; give more, or fewer --tokens"
            )


def held_bytes(memory_bytes: int | None) -> int | None:
    """What of `memory_bytes` is for what may be held more or less of; None: the like of what is available then."""
    return None if memory_bytes is None else Resources(memory_bytes).held_bytes(torch.device("cpu"))
