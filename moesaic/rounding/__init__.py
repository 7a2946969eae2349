"""Ways to choose codes, one file each. None knows a number format by name."""

from collections.abc import Iterable

from ..errors import PlanError
from ..formats import weights_of
from ..registry import collect
from .base import Batch, Block, Inputs, Rounded, Rounding, round_members, round_siblings, split

ROUNDINGS = collect(__name__, Rounding)


def rounding_named(name: str) -> Rounding:
    """The rounding of that name. Raises `PlanError` for an unknown name."""
    if name not in ROUNDINGS:
        raise PlanError(f"unknown rounding {name!r}; choose from {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name]


def informed(name: str, has_text: bool) -> str:
    """The rounding of that name; where there is text to round by, the one that does the same with data."""
    return (has_text and name in ROUNDINGS and ROUNDINGS[name].informed) or name


def arithmetic(rounding: str, formats: Iterable[str]) -> dict[str, str]:
    """What rounded matrices depend on besides weights and data, as inputs of an artifact: names with their versions.

    {"rounding": "search 1", "formats": "int4_g64 1, mxfp4 1"}
    """
    told = ", ".join(f"{name} {weights_of(name).version}" for name in sorted(set(formats)))
    return {"rounding": f"{rounding} {rounding_named(rounding).version}", "formats": told}


__all__ = [
    "ROUNDINGS",
    "Batch",
    "Block",
    "Inputs",
    "Rounded",
    "Rounding",
    "arithmetic",
    "informed",
    "round_members",
    "round_siblings",
    "rounding_named",
    "split",
]
