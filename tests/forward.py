"""States through the layers of a model, by the one sweep and without a file."""

from collections.abc import Callable, Sequence
from functools import partial

from moesaic.stream import LayerRun, Standing, State, Sweep, advanced
from moesaic.stream.state import ignore


def final(
    run: LayerRun, states: Sequence[State], start: int = 0, done: Callable[[Standing], None] = ignore
) -> list[State]:
    """`states` after the last layer, from layer `start` on; `done` is told after each one, with states by their number."""
    begin = Standing({str(i): state for i, state in enumerate(states)}, done=start)
    sweep = Sweep(range(run.architecture.layers), None, {}, run.device)
    return sweep.through(lambda: begin, partial(advanced, run), lambda at: list(at.states.values()), done)
