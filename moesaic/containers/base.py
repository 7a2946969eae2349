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

from ..errors import CheckpointError, PlanError
from ..families import Architecture, Linear, TensorInfo
from ..formats import FORMATS, NumberFormat, Scales

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8, "I8": torch.int8,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
}  # fmt: skip
FUSED = {"qkv": ("q", "k", "v", "index_q", "index_k"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Part:
    """One tensor of a packed matrix: its suffix after the module's name, its dtype and its shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Pack = Callable[[Tensor, Scales], dict[str, Tensor]]
Unpack = Callable[[Mapping[str, Tensor], Sequence[int]], tuple[Tensor, Scales]]
Read = Callable[[Architecture, Mapping[str, Any], frozenset[str] | None], dict[str, str]]
Config = Callable[[Architecture, Mapping[str, str], Mapping[str, Any]], dict[str, Any] | None]


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
    pack: Pack
    unpack: Unpack

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
             or None where this container writes none; raises PlanError for what its engines would not load
    """

    name: str
    quant_method: str
    packings: Mapping[str, Packing]
    formats: Read
    config: Config
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


def siblings(linears: Sequence[Linear]) -> list[tuple[Linear, ...]]:
    """`linears` in the groups that a server fuses into one matrix: q/k/v with the indexer, and gate/up of one expert.

    A format with a second scale (`NumberFormat.share`) has one for the whole group, because the server
    applies one member's to all of them. A matrix that is fused with none is a group of its own.
    """
    groups: dict[tuple[str, int | None, str], list[Linear]] = {}
    for linear in linears:
        fused = next((name for name, members in FUSED.items() if linear.projection in members), linear.projection)
        groups.setdefault((linear.unit, linear.expert, fused), []).append(linear)
    return [tuple(group) for group in groups.values()]


def released(quant_method: str, read: Read) -> Config:
    """`Container.config` of a source's own container: the source's words, for a model that they still describe."""

    def config(
        architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        quantization = source.get("quantization_config", {})
        if quantization.get("quant_method") != quant_method or read(architecture, source, None) != formats:
            raise PlanError(
                f"the {quant_method} container writes models that are {quant_method} throughout, as their source is; "
                "choose compressed_tensors for any other"
            )
        return dict(quantization)

    return config


def stream_bytes(columns: int, bits: int, word: int = 1) -> int:
    """Bytes of one row of codes as a bit stream, in whole words of `word` bytes."""
    return -(-columns * bits // (8 * word)) * word


def pack_bits(codes_OI: Tensor, bits: int, word: int = 1) -> Tensor:
    """Each row of codes as one dense little-endian bit stream: uint8 [O, stream_bytes(I, bits, word)].

    Code i has bits i·bits and up of the stream; no code is padded to a power of two, so 3-bit codes cross
    bytes and words. With 4 bits the even column is the low nibble. Spare bits at the end of a row are zero.
    """
    rows, columns = codes_OI.shape
    lanes, span = lanes_and_span(bits)
    padded = torch.nn.functional.pad(codes_OI, (0, -columns % lanes))
    joined = padded[:, ::lanes].to(torch.uint8 if span == 1 else torch.int64)
    for lane in range(1, lanes):
        joined = joined | (padded[:, lane::lanes].to(joined.dtype) << (lane * bits))
    stream = joined.contiguous().view(torch.uint8).reshape(rows, -1, joined.itemsize)[..., :span].reshape(rows, -1)
    size = stream_bytes(columns, bits, word)
    return torch.nn.functional.pad(stream, (0, size - stream.shape[1])).contiguous()


def unpack_bits(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Codes uint8 [O, columns] of `pack_bits`."""
    rows = stream.shape[0]
    lanes, span = lanes_and_span(bits)
    groups = -(-columns // lanes)
    stream = torch.nn.functional.pad(stream, (0, max(0, groups * span - stream.shape[1])))[:, : groups * span]
    joined = stream
    if span > 1:
        spans = stream.reshape(rows, groups, span)
        joined = torch.nn.functional.pad(spans, (0, 8 - span)).view(torch.int64).squeeze(-1)
    codes = [((joined >> (lane * bits)) & (2**bits - 1)).to(torch.uint8) for lane in range(lanes)]
    return torch.stack(codes, -1).reshape(rows, -1)[:, :columns].contiguous()


def lanes_and_span(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes: 8 codes of 3 bits fill 3."""
    lanes = 8 // math.gcd(8, bits)
    return lanes, lanes * bits // 8
