"""Compiled twins of decode, fit, search, round and pack: from a source's stored bytes to an export's, in one pass.

A file a kind of device (`cpu`, `cuda`), each with the same three functions: `requantize` and `amax`, on tensors that lie
there, and `prepare`; and with `TARGETS`, the formats that it writes. Triton is imported where there is a card, and nowhere
else: no Mac has it, and no CPU needs it.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

from .cpu import SOURCES, Requantized

__all__ = ["SOURCES", "Requantized", "device", "of"]


@cache
def device() -> torch.device:
    """Where to requantize: a card, if torch sees one and Triton is installed."""
    card = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    return torch.device("cuda" if card else "cpu")


def of(device: torch.device) -> ModuleType:
    """The kernels of a device: `cpu` or `cuda`."""
    return importlib.import_module(f"{__name__}.{device.type}")
