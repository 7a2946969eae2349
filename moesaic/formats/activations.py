"""Activations rounded beside weights: the names that ask for both. A number format itself is of weights or activations.

`nvfp4_a4` is NVFP4 weights, and what they multiply rounded to NVFP4 under a second scale that calibration finds. Other
formats need no such name: what an engine does to activations beside them follows from config.json. Leaves out the
rounding of activations (measure) and the tensors that it needs (checkpoint.containers).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """Number formats of weights and of what they multiply."""

    weights: str
    activations: str


PAIRS = {"nvfp4_a4": Pair("nvfp4", "nvfp4")}
