"""Ways to choose codes, one file each. None knows a number format by name."""

from ..registry import collect
from .base import Batch, Block, Inputs, Rounded, Rounding, round_members, round_siblings, split

ROUNDINGS = collect(__name__, Rounding)

__all__ = ["ROUNDINGS", "Batch", "Block", "Inputs", "Rounded", "Rounding", "round_members", "round_siblings", "split"]
