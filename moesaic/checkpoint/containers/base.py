"""What a container is: for each format it carries, the tensors of one matrix on disk, to and fro.

A container knows bits, names and its part of config.json. Formats know values; nobody else knows
either. Every `pack` has its `unpack` beside it, both pure, on names local to one module
("weight", "weight_scale"). Leaves out which format a matrix should have: that is a plan's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, PlanError
from ...families import FAMILIES, Architecture, Linear, Stack, TensorInfo
from ...formats import FORMATS, NumberFormat, Scales
from ...kernels.decode import decode, decodes

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


Write = Callable[[Tensor, Scales, Sequence[int]], dict[str, Tensor]]
Read = Callable[[Mapping[str, Tensor], Sequence[int]], tuple[Tensor, Scales]]
Recognise = Callable[[Architecture, Mapping[str, Any], frozenset[str] | None], dict[str, str]]
Config = Callable[[Architecture, Mapping[str, str], Mapping[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Packing:
    """How one format lies in one container.

    parts   (shape [O, I]) -> its tensors, by meaning: "codes", "blocks", "shared", "offsets", or what else there is
    write   (codes as one dense little-endian bit stream a row, uint8 [O, ·], Scales, shape) -> those tensors, by the
            same keys, but for "inputs": the second level of scale of the vectors that it multiplies, which its weights
            do not tell
    read    (those tensors, shape) -> that stream, and Scales
    layout  two packings of one format with one layout differ in names, dtypes and shapes alone: bytes may be copied
    word    the bytes of which each row of the stream has a whole number
    activations    the format that what the matrix multiplies is rounded to, under a scale that lies with it as "inputs"
    """

    format: str
    layout: str
    parts: Callable[[Sequence[int]], dict[str, Part]]
    write: Write
    read: Read
    word: int = 1
    activations: str | None = None

    @property
    def number_format(self) -> NumberFormat:
        return FORMATS[self.format]

    def tensors(self, module: str, shape: Sequence[int]) -> list[TensorInfo]:
        """The header entries of one packed matrix."""
        return [TensorInfo(f"{module}.{p.suffix}", p.dtype, p.shape) for p in self.parts(shape).values()]

    def bytes(self, shape: Sequence[int]) -> int:
        return sum(part.bytes for part in self.parts(shape).values())

    def pack(self, codes_OI: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The tensors on disk, but for "inputs", of codes [O, I] and scales."""
        stream_OS = pack_bits(codes_OI, self.number_format.element_bits, self.word)
        return self.write(stream_OS, scales, codes_OI.shape)

    def unpack(self, stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
        """Codes [O, I] and scales from the tensors on disk: the inverse of `pack`."""
        stream_OS, scales = self.read(stored, shape)
        return unpack_bits(stream_OS, self.number_format.element_bits, shape[1]), scales

    def decode(self, stored: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """F32 weights [O, I] from the tensors on disk."""
        stream_OS, scales = self.read(stored, shape)
        if stream_OS.device.type == "cpu" and decodes(self.number_format):
            return decode(self.number_format, stream_OS, scales, shape[1])
        return self.number_format.decode(*self.unpack(stored, shape))


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: in tensors of its own, or in one row of tensors that stack a layer's experts.

    A row is one run of bytes, so that what moves or reads a matrix never needs the rest of the stack. In the stack of
    a release it may share its row with other matrices, and be no run of bytes itself (`families.Stack`).
    """

    module: str
    row: int | None = None
    rows: int = 1
    stack: Stack | None = None

    def tensor(self, part: Part) -> TensorInfo:
        """The header entry of the tensor that holds `part`."""
        above = () if self.row is None else (self.rows,)
        name = f"{self.module}.{part.suffix}" if self.stack is None else self.stack.tensor
        return TensorInfo(name, part.dtype, above + self.row_of(part).shape)

    def row_of(self, part: Part) -> Part:
        """What lies in the row: `part`, and whatever shares it."""
        return part if self.stack is None else replace(part, shape=self.stack.part(part.shape))

    def run(self, part: Part) -> tuple[int, Part]:
        """The least run of bytes that holds `part`: where it begins in that tensor, in bytes, and what it is."""
        start = (self.row or 0) * self.row_of(part).bytes
        if self.stack is None or not self.stack.is_run:
            return start, self.row_of(part)
        return start + self.stack.first * part.bytes // part.shape[0], part

    def pick(self, row: Tensor, part: Part) -> Tensor:
        """`part` of what lies in the row."""
        if self.stack is None:
            return row.reshape(part.shape)
        rows = row.mT if self.stack.transposed else row
        return rows[self.stack.first :: self.stack.step][: part.shape[0]].contiguous()

    @property
    def is_run(self) -> bool:
        return self.stack is None or self.stack.is_run


def retyped(packing: Packing, suffix: str, dtype: str) -> Packing:
    """`packing` with the part of that suffix stored in another dtype; itself where it has none."""

    def usual(shape: Sequence[int]) -> dict[str, Part]:
        return {key: part for key, part in packing.parts(shape).items() if part.suffix == suffix}

    def parts(shape: Sequence[int]) -> dict[str, Part]:
        return packing.parts(shape) | {key: replace(part, dtype=dtype) for key, part in usual(shape).items()}

    def write(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
        """Raises `PlanError` for numbers that the dtype does not hold."""
        found = packing.write(stream_OS, scales, shape)
        for key in usual(shape):
            whole, found[key] = found[key], found[key].to(DTYPES[dtype])
            if not torch.equal(found[key].to(whole.dtype), whole):
                raise PlanError(
                    f"the source stores {suffix} in {dtype}, which does not hold scales that were computed anew; "
                    "export to compressed_tensors"
                )
        return found

    def read(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
        back = {key: stored[key].to(DTYPES[part.dtype]) for key, part in usual(shape).items()}
        return packing.read({**stored, **back}, shape)

    if not usual((1, 1)):
        return packing
    return replace(packing, layout=f"{packing.layout}, {suffix} {dtype}", parts=parts, write=write, read=read)


def alone(architecture: Architecture, linear: Linear) -> Place:
    return Place(linear.name)


def stacked(architecture: Architecture, linear: Linear) -> Place:
    """As a release of the family has it."""
    return Place(linear.name, linear.expert, architecture.experts, linear.stack) if linear.stack else Place(linear.name)


@dataclass(frozen=True)
class Container:
    """One way to write quantized matrices, under the `quant_method` that config.json gives it.

    formats  (architecture, config.json, names on disk) -> the format of every linear, by name; raises
             CheckpointError for a matrix whose tensors make none of its packings
    config   (architecture, format of every linear, config.json of the source) -> quantization_config,
             or None where this container writes none; raises PlanError for what its engines would not load
    place    (architecture, linear) -> where its tensors lie
    stacks   whether releases of a family that stacks experts (`Linear.stack`) lie so in this container
    dtypes   suffix of a part -> the dtypes in which vendors store it; the first is the one in `packings`
    keys     where config.json has what `config` returns; the first is the one that engines read
    expert_parallel  whether its engines can give whole experts to each device
    """

    name: str
    quant_method: str
    packings: Mapping[str, Packing]
    formats: Recognise
    config: Config
    reference: str
    place: Callable[[Architecture, Linear], Place] = alone
    keys: tuple[str, ...] = ("quantization_config",)
    expert_parallel: bool = True
    stacks: bool = False
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of_release(self, architecture: Architecture, stored: Mapping[str, str]) -> "Container":
        """This container as a model of these tensors (name -> dtype) uses it; with none, as the family releases it."""
        first = next((n.stack.tensor for n in architecture.linears if n.stack), None)
        place = stacked if self.stacks and first is not None and (first in stored or not stored) else self.place
        packings = self.packings
        for suffix, known in self.dtypes.items():
            released = FAMILIES[architecture.family].dtypes.get(suffix, known[0])
            dtype = next((dtype for name, dtype in stored.items() if name.endswith(f".{suffix}")), released)
            if dtype in known[1:]:
                packings = {name: retyped(packing, suffix, dtype) for name, packing in packings.items()}
        return replace(self, place=place, packings=packings)

    def packing(self, format: str) -> Packing:
        if format not in self.packings:
            raise CheckpointError(f"{self.name} cannot carry {format}; it carries {', '.join(self.packings)}")
        return self.packings[format]


def inventory(architecture: Architecture, container: Container, formats: Mapping[str, str]) -> list[TensorInfo]:
    """Every tensor of a model: the family's small ones as they are, each linear as its container packs it."""
    found = {tensor.name: tensor for tensor in architecture.tensors}
    for linear in architecture.linears:
        place = container.place(architecture, linear)
        for part in container.packing(formats[linear.name]).parts(linear.shape).values():
            tensor = place.tensor(part)
            found[tensor.name] = tensor
    return list(found.values())


def siblings(linears: Sequence[Linear]) -> list[tuple[Linear, ...]]:
    """`linears` in the groups that a server fuses into one matrix: q/k/v with the indexer, and gate/up of one expert.

    A format with a second scale (`NumberFormat.share`) has one for the whole group, because the server
    applies one member's to all of them. A matrix that is fused with none is a group of its own.
    """
    groups: dict[tuple[str, int | None], list[Linear]] = {}
    for linear in linears:
        groups.setdefault((linear.input, linear.expert), []).append(linear)
    return [tuple(group) for group in groups.values()]


def check_loadable(container: str, unit: str, members: Sequence[Linear], format: str) -> None:
    """Raises `PlanError` where the family knows of a matrix that an engine would not load so."""
    for refusal in dict.fromkeys(refusal for linear in members for refusal in linear.refusals):
        if refusal.meets(container, format):
            raise PlanError(f"{unit} {refusal.why}")


def compare(
    packings: Mapping[str, Packing],
    architecture: Architecture,
    formats: Mapping[str, str],
    names: frozenset[str],
    place: Callable[[Architecture, Linear], Place] = alone,
) -> None:
    """Whether each linear's tensors are those of its format. One with none at all is left to the inventory.

    Raises `CheckpointError`: an engine would believe the config, and drop or misread what is on disk.
    """
    present: dict[str, set[str]] = {}
    for name in names.difference(tensor.name for tensor in architecture.tensors):  # a bias is no part of its matrix
        module, _, suffix = name.rpartition(".")
        present.setdefault(module, set()).add(suffix)
    for linear in architecture.linears:
        format, module = formats[linear.name], place(architecture, linear).module
        wanted = {part.suffix for part in packings[format].parts(linear.shape).values()}
        if (there := present.get(module, wanted)) != wanted:
            raise CheckpointError(
                f"config.json makes {module} {format} for an engine, which takes {', '.join(sorted(wanted))}; "
                f"the files hold {', '.join(sorted(there))}. Export it again with names that the engine knows"
            )


def released(quant_method: str, read: Recognise) -> Config:
    """`Container.config` of a source's own container: the source's words, for a model that they still describe."""

    def config(
        architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        quantization = source.get("quantization_config") or {}
        if quantization.get("quant_method") != quant_method or read(architecture, source, None) != formats:
            raise PlanError(
                f"the {quant_method} container writes models that are {quant_method} throughout, as their source is; "
                "choose compressed_tensors for any other"
            )
        return dict(quantization)

    return config


def entries(quantization: Mapping[str, Any], key: str) -> list[str]:
    """The names that a quantization_config lists under `key`; none where it has no such key. Raises `CheckpointError`."""
    found = quantization.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise CheckpointError(f"config.json has {key} = {found!r:.80} in quantization_config; wanted a list of names")
    return found


def table(where: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`; an empty one where there is no such key. Raises `CheckpointError`."""
    found = where.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json has {key} = {found!r:.80}; wanted an object")
    return found


def stream_bytes(columns: int, bits: int, word: int = 1) -> int:
    """Bytes of one row of codes as a bit stream, in whole words of `word` bytes."""
    return -(-columns * bits // (8 * word)) * word


def pack_bits(codes_OI: Tensor, bits: int, word: int = 1) -> Tensor:
    """Each row of codes as one dense little-endian bit stream: uint8 [O, stream_bytes(I, bits, word)].

    Code i has bits i·bits and up of the stream; no code is padded to a power of two, so 3-bit codes cross
    bytes and words. With 4 bits the even column is the low nibble. Spare bits at the end of a row are zero.
    """
    rows, columns = codes_OI.shape
    if bits >= 8 and columns * bits % (8 * word) == 0:
        return codes_OI.contiguous().view(torch.uint8)
    lanes, span = lanes_and_span(bits)
    padded = torch.nn.functional.pad(codes_OI, (0, -columns % lanes))
    joined = padded[:, ::lanes].to(torch.uint8 if span == 1 else torch.int64)
    for lane in range(1, lanes):
        joined = joined | (padded[:, lane::lanes].to(joined.dtype) << (lane * bits))
    stream = joined.contiguous().view(torch.uint8).reshape(rows, -1, joined.itemsize)[..., :span].reshape(rows, -1)
    packed = stream.new_zeros(rows, stream_bytes(columns, bits, word))
    width = min(stream.shape[1], packed.shape[1])
    packed[:, :width] = stream[:, :width]
    return packed


def unpack_bits(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Codes uint8 [O, columns] of `pack_bits`; int16 where a code has 16 bits."""
    if bits >= 8:
        return stream.view({8: torch.uint8, 16: torch.int16}[bits])[:, :columns]
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
