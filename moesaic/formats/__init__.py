"""Number formats, one file an idea. `FORMATS["mxfp4"]` is formats/mxfp4.py.

A matrix is asked for in one of `NAMES`: a number format of its weights, or such a format with that of what they multiply
(activations.py).
"""

from collections.abc import Iterable

from ..registry import collect
from .activations import PAIRS
from .base import NumberFormat, Scales, Steps

__all__ = [
    "FORMATS",
    "NAMES",
    "PAIRS",
    "NumberFormat",
    "Scales",
    "Steps",
    "activations_of",
    "heaviest_first",
    "weights_of",
]

FORMATS = collect(__name__, NumberFormat, "activations", "recode")
NAMES = (*FORMATS, *PAIRS)


def weights_of(name: str) -> NumberFormat:
    """The format of the weights that `name` asks for."""
    return FORMATS[PAIRS[name].weights if name in PAIRS else name]


def activations_of(name: str) -> NumberFormat:
    """The format that what they multiply is rounded to, where it is rounded to that of the weights or to a named one."""
    return FORMATS[PAIRS[name].activations if name in PAIRS else name]


def heaviest_first(formats: Iterable[NumberFormat]) -> list[str]:
    """Their names; of formats of one size, the one of smaller blocks is first."""
    return [f.name for f in sorted(formats, key=lambda f: (-f.bits_per_weight, f.block[0] * f.block[1]))]
