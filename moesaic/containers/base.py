"""What a container is: for each format it carries, the tensors of one matrix on disk, to and fro.

A container knows bits, names and its part of config.json. Formats know values; nobody else knows
either. Every `pack` has its `unpack` beside it, both pure, on names local to one module
("weight", "weight_scale"). Leaves out which format a matrix should have: that is a plan's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families import Architecture, TensorInfo
from ..formats import FORMATS, NumberFormat, Scales

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8, "I8": torch.int8,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One tensor of a packed matrix: its suffix after the module's name, its dtype and its shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Packing:
    """How one format lies in one container.

    parts   (shape [O, I]) -> its tensors, by meaning: "codes", "blocks", "shared", "offsets", or what else there is
    pack    (codes [O, I], Scales) -> those tensors, by the same keys
    unpack  (those tensors, shape) -> codes [O, I], Scales
    layout  two packings of one format with one layout differ in names alone: bytes may be copied across
    """

    format: str
    layout: str
    parts: Callable[[Sequence[int]], dict[str, Part]]
    pack: Callable[[Tensor, Scales], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Sequence[int]], tuple[Tensor, Scales]]

    @property
    def number_format(self) -> NumberFormat:
        return FORMATS[self.format]

    def tensors(self, module: str, shape: Sequence[int]) -> list[TensorInfo]:
        """The header entries of one packed matrix."""
        return [TensorInfo(f"{module}.{p.suffix}", p.dtype, p.shape) for p in self.parts(shape).values()]

    def bytes(self, shape: Sequence[int]) -> int:
        return sum(part.bytes for part in self.parts(shape).values())

    def decode(self, stored: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """F32 weights [O, I] from the tensors on disk."""
        return self.number_format.decode(*self.unpack(stored, shape))


@dataclass(frozen=True)
class Container:
    """One way to write quantized matrices, under the `quant_method` that config.json gives it.

    formats  (architecture, config.json, names on disk) -> the format of every linear, by name; raises
             CheckpointError for a matrix whose tensors make none of its packings
    config   (architecture, format of every linear, config.json of the source) -> quantization_config,
             or None where this container writes none
    """

    name: str
    quant_method: str
    packings: Mapping[str, Packing]
    formats: Callable[[Architecture, Mapping[str, Any], frozenset[str] | None], dict[str, str]]
    config: Callable[[Architecture, Mapping[str, str], Mapping[str, Any]], dict[str, Any] | None]
    reference: str

    def packing(self, format: str) -> Packing:
        if format not in self.packings:
            raise CheckpointError(f"{self.name} cannot carry {format}; it carries {', '.join(self.packings)}")
        return self.packings[format]


def inventory(architecture: Architecture, container: Container, formats: Mapping[str, str]) -> list[TensorInfo]:
    """Every tensor of a model: the family's small ones as they are, each linear as its container packs it."""
    found = list(architecture.tensors)
    for linear in architecture.linears:
        found += container.packing(formats[linear.name]).tensors(linear.name, linear.shape)
    return found


def codes_as_bytes(stored: Tensor) -> Tensor:
    """E4M3 elements as the uint8 codes that formats speak of; the same memory."""
    return stored.view(torch.uint8)
