"""Requantize one matrix on a card: the twin of `cpu`, to the bit, by the same calls on tensors that lie there.

Held to the reference in Triton's interpreter, and compiled for cards of compute capability 9.0 without a
division, sum or product that is not correctly rounded; not yet run on a card. `verify` rounds one group of an
export in sixteen by the reference on the CPU. Needs Triton, which torch's CUDA wheels bring along. Leaves out the
affine grids of MLX, several cards, and tuning: tiles are of a size that any card holds.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import PlanError
from ..formats import FORMATS, NumberFormat, Scales
from ..formats.base import not_finite
from . import loops, tiles
from .cpu import NO_CHANGES, SOURCES, Requantized, candidate_changes
from .cpu import TARGETS as EVERY_TARGET

TILE = 2048  # weights, unless a block has more
TARGETS = {name: kinds for name, kinds in EVERY_TARGET.items() if kinds[0] != loops.AFFINE}
STORED = {  # how a scale is stored
    loops.NO_SCALE: torch.uint8,
    loops.F32_SCALE: torch.float32,
    loops.CEIL_POWER: torch.uint8,
    loops.FLOOR_POWER: torch.uint8,
    loops.E4M3_SCALE: torch.float8_e4m3fn,
    loops.BF16_SCALE: torch.bfloat16,
}


def prepare(formats: Iterable[str], quiet: bool = False) -> None:
    """Triton compiles each pair of source and target when it first meets one, in a second or two, and keeps it."""


def requantize(
    source: str,
    weight_OI: Tensor,
    weight_scales: Tensor | None,
    target: NumberFormat,
    *,
    shared: Tensor | None = None,
    search: bool = False,
    measure: bool = False,
) -> Requantized:
    """What `cpu.requantize` gives, on the device of `weight_OI`. Raises the same."""
    if source not in SOURCES or target.name not in TARGETS:
        raise PlanError(f"no kernel goes from {source} to {target.name}; decode and encode through `formats` instead")
    if target.share is not None and shared is None:
        shared = target.share(amax(source, weight_OI, weight_scales))
    (rows, columns), (element, rule), device = weight_OI.shape, TARGETS[target.name], weight_OI.device
    square = target.block[0] > 1
    n = target.block[1] or (128 if element == loops.BF16 else power_above(columns))
    blocks = -(-columns // n)
    lines = target.block[0] if square else max(1, TILE // n)
    grid = -(-rows // lines) * blocks if square else -(-rows * blocks // lines)
    changes = torch.from_numpy(candidate_changes(target) if search else NO_CHANGES)
    row_bytes, codes_dtype = row_layout(target, columns)
    packed = torch.empty(rows, row_bytes // codes_dtype.itemsize, dtype=codes_dtype, device=device)
    scales = torch.empty(-(-rows // lines) if square else rows, blocks, dtype=STORED[rule], device=device)
    top = torch.zeros(1, dtype=torch.int32, device=device)
    squares_T2 = torch.zeros(grid if measure else 1, 2, device=device)
    low, high = -(1 << (target.element_bits - 1)), (1 << (target.element_bits - 1)) - 1
    tiles.requantize_tile[(grid,)](
        *stored(weight_OI, weight_scales), torch.ones(1, device=device) if shared is None else shared.to(device),
        every_change(changes, rule).to(device), packed, as_integers(scales), top, squares_T2,
        rows, columns, blocks, row_bytes, float(low), float(high), ((1 << target.element_bits) - 1) / 2.0,
        **layout(source), ELEMENT=element, RULE=rule, BITS=target.element_bits, R=lines, N=n, SQUARE=square,
        C=power_above(len(changes) + 1) if len(changes) else 0, MEASURE=measure,
        num_warps=min(16, max(4, lines * n // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    largest = top.view(torch.float32).item()
    if top.item() > loops.LARGEST_BITS:
        raise not_finite(target.name, weight_OI.shape)
    measured = squares_T2.double().sum(0).tolist() if measure else (None, None)
    blocks_or_none = None if rule == loops.NO_SCALE else scales
    return Requantized(as_packed(target, packed), Scales(blocks_or_none, shared), largest, *measured)


def amax(source: str, weight_OI: Tensor, weight_scales: Tensor | None) -> Tensor:
    """The largest |w| of a matrix as `source` stores it: F32 []. Raises `PlanError` if that is not finite."""
    (rows, columns), n = weight_OI.shape, 128
    top, blocks = torch.zeros(1, dtype=torch.int32, device=weight_OI.device), -(-columns // n)
    tiles.amax_tile[(-(-rows * blocks // (TILE // n)),)](
        *stored(weight_OI, weight_scales), top, rows, columns, blocks, **layout(source), R=TILE // n, N=n,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if top.item() > loops.LARGEST_BITS:
        raise not_finite("a scale", weight_OI.shape)
    return top.view(torch.float32)[0]


def stored(weight_OI: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """A source's bytes and its scales; where it has none, anything."""
    integers = as_integers(weight_OI.contiguous())
    return integers, integers if scales is None else scales.contiguous()


def as_integers(x: Tensor) -> Tensor:
    """The same bits, of a type that Triton stores integers to."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def layout(source: str) -> dict[str, int | bool]:
    """How a source's scales lie, for `tiles`."""
    rows, n = FORMATS[source].block
    return {"SOURCE_ROWS": max(rows, 1), "SOURCE_N": n, "POWERS": source == "mxfp8"}


def every_change(changes: Tensor, rule: int) -> Tensor:
    """`changes`, with none before them, and filled up with none to a power of two: a change of none is never better."""
    none = 1.0 if rule == loops.BF16_SCALE else 0.0
    padded = torch.full((power_above(len(changes) + 1),), none)
    padded[1 : len(changes) + 1] = changes
    return padded


def power_above(count: int) -> int:
    return 1 << (count - 1).bit_length()


def row_layout(target: NumberFormat, columns: int) -> tuple[int, torch.dtype]:
    """Bytes of a row of codes, and what they are written as. Rows of integers in groups are whole 32-bit words."""
    element = TARGETS[target.name][0]
    word = 32 if element == loops.INTEGER and target.block[1] else 8
    row_bytes = -(-columns * target.element_bits // word) * word // 8
    return row_bytes, torch.int16 if element == loops.BF16 else torch.uint8


def as_packed(target: NumberFormat, packed: Tensor) -> Tensor:
    match TARGETS[target.name][0]:
        case loops.BF16:
            return packed.view(torch.bfloat16)
        case loops.E4M3:
            return packed.view(torch.float8_e4m3fn)
        case loops.INTEGER:
            return packed.view(torch.int32) if target.block[1] else packed.bitwise_xor_(0x80).view(torch.int8)
    return packed
