"""moesaic: make a giant mixture-of-experts model fit the machine you have, and prove what that cost.

From Python, begin with `moesaic.open` (api.py). What is offered there is imported when it is first asked for, so
`import moesaic` is quick. `moesaic.fit` and `moesaic.evaluate` are rooms of the house: a model's `fit` and `evaluate`
are methods of what `open` returns.

The house, floor by floor: a module imports only from floors below its own, and the order is also
the order of reading (tests/test_floors.py holds it).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        CheckError,
        Corpus,
        Evaluating,
        InputError,
        Limit,
        Model,
        MoesaicError,
        Offer,
        Pricing,
        Pruning,
        Quantizing,
        Ranking,
        Recipe,
        Score,
        Scores,
        Step,
        open,
    )  # fmt: skip

__version__ = "0.1.0"
__all__ = [
    "CheckError", "Corpus", "Evaluating", "InputError", "Limit", "Model", "MoesaicError", "Offer", "Pricing", "Pruning",
    "Quantizing", "Ranking", "Recipe", "Score", "Scores", "Step", "open",
]  # fmt: skip

FLOORS = (
    "errors",
    "files",
    "registry",
    "artifact",
    "lock",
    "progress",
    "resources",
    "formats",
    "kernels",
    "families",
    "rounding",
    "checkpoint",
    "plan",
    "data",
    "stream",
    "generate",
    "calibrate",
    "measure",
    "fit",
    "allocate",
    "export",
    "verify",
    "evaluate",
    "serve",
    "report",
    "recipes",
    "api",
    "cli",
    "__main__",
)


if not TYPE_CHECKING:  # which would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """What is offered to Python: from api.py, once (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(".api", __name__), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
