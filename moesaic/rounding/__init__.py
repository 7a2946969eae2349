"""Ways to choose codes, one file each. None knows a number format by name."""

from ..registry import collect
from .base import Rounding

ROUNDINGS = collect(__name__, Rounding)

__all__ = ["ROUNDINGS", "Rounding"]
