"""Ways to choose codes, one file each. None knows a number format by name."""

from ..errors import PlanError
from ..registry import collect
from .base import Batch, Block, Inputs, Rounded, Rounding, round_members, round_siblings, split

ROUNDINGS = collect(__name__, Rounding)


def rounding_named(name: str) -> Rounding:
    """The rounding of that name. Raises `PlanError` for one that there is not."""
    if name not in ROUNDINGS:
        raise PlanError(f"no rounding {name!r}; there are {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name]


__all__ = [
    "ROUNDINGS",
    "Batch",
    "Block",
    "Inputs",
    "Rounded",
    "Rounding",
    "round_members",
    "round_siblings",
    "rounding_named",
    "split",
]
