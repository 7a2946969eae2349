"""A model run one layer, and within it one expert, in memory at a time, forward and backward.

`LayerRun` (layer.py) is the whole of it from outside, with the `State`s that it advances and the
`Observer`s that watch (state.py). `Sweep` takes them through all layers and goes on where it was (sweep.py).
Inside: attention in chunks (attention.py), router and experts (experts.py), and what bounds the memory of
both (memory.py); needs.py says what a sweep cannot do without.
backward.py goes the other way, and is asked for by its own name.
"""

from .layer import LayerRun
from .needs import STATE_COPIES, needed_bytes
from .state import BlockPass, Change, ExpertPass, Intake, LinearPass, Observer, Routing, State
from .sweep import STATES, Standing, Sweep, advanced

__all__ = [
    "STATES", "STATE_COPIES", "BlockPass", "Change", "ExpertPass", "Intake", "LayerRun", "LinearPass", "Observer", "Routing",
    "Standing", "State", "Sweep", "advanced", "needed_bytes",
]  # fmt: skip
