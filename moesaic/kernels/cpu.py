"""Requantize one matrix on the CPU: its stored bytes are decoded, fitted, searched, rounded and packed row by row.

No copy of the matrix in BF16 or F32 is made: one row at a time lies in buffers that stay in the cache. The
result equals decode → `NumberFormat.scales` → `search` → `encode` → `unshrunk` → the packing of compressed-tensors (of MLX,
where the grid is affine), to the bit; without a search, neither it nor what follows from it takes place.

Why numba: the user's machine needs no compiler, wheels are there for every platform, and LLVM compiles for
the very CPU it runs on (AVX-512, AVX2, NEON from the same lines). That takes some ten seconds once (`prepare`); the result
is cached beside these files, or in the user's cache folder where they are read-only. torch's own compiler wants g++.

Kernels run on one thread and release the GIL. Threads over matrices are the caller's (`ThreadPoolExecutor`).
Leaves out reading files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import PlanError
from ..formats import FORMATS, NumberFormat, Scales
from ..formats.base import GAIN, not_finite
from ..formats.integer import CLIPS
from ..formats.nvfp4 import NEIGHBOURS
from ..progress import notice
from . import loops
from .decode import decode, decodes

SOURCES = {"bf16": loops.BF16, "fp8_block": loops.E4M3, "mxfp8": loops.E4M3}  # how its elements are stored
TARGETS = {  # how an element is rounded, how a scale is stored
    "bf16": (loops.BF16, loops.NO_SCALE),
    "fp8_block": (loops.E4M3, loops.F32_SCALE),
    "fp8_channel": (loops.E4M3, loops.F32_SCALE),
    "mxfp8": (loops.E4M3, loops.CEIL_POWER),
    "mxfp4": (loops.E2M1, loops.FLOOR_POWER),
    "nvfp4": (loops.E2M1, loops.E4M3_SCALE),
    **{name: (loops.INTEGER, loops.BF16_SCALE) for name in FORMATS if name.startswith("int")},
    **{name: (loops.AFFINE, loops.BF16_SCALE) for name in FORMATS if name.startswith("affine")},
}
NO_CHANGES = np.empty(0, np.float32)
assert tuple(map(np.float32, GAIN)) == (loops.LEAST_GAIN, loops.MOST_GAIN)


@dataclass(frozen=True)
class Requantized:
    """One matrix as compressed-tensors stores it, or MLX its affine grids.

    packed          uint8 [O, ⌈I/2⌉] (4-bit floats), int32 [O, ⌈I·bits/32⌉] (integers in groups; uint32 where affine),
                    int8 [O, I] (int8_channel), float8_e4m3fn or bfloat16 [O, I]
    scales          as in `formats/`
    amax            the largest |w|
    squared_error   Σ (value − w)² over the matrix, and squared_weight Σ w²; None where not measured
    """

    packed: Tensor
    scales: Scales
    amax: float
    squared_error: float | None = None
    squared_weight: float | None = None

    @property
    def stream_OS(self) -> Tensor:
        """The codes as one dense little-endian bit stream a row, uint8; a code of int8_channel is q + 128."""
        stream = self.packed.view(torch.uint8)
        return stream ^ 0x80 if self.packed.dtype == torch.int8 else stream


def prepare(formats: Iterable[str], quiet: bool = False) -> None:
    """Compile what writes these formats, or load what an earlier run compiled, and say so where it takes long."""
    one_of_each = {TARGETS[name][0] == loops.AFFINE: FORMATS[name] for name in formats}
    w_OI = torch.zeros(1, 32, dtype=torch.bfloat16)
    with notice("kernels: on a machine's first run they are compiled for its CPU; some ten seconds", quiet, 2.0):
        amax("bf16", w_OI, None)
        for format in one_of_each.values():
            done = requantize("bf16", w_OI, None, format)
            if decodes(format):
                decode(format, done.stream_OS, done.scales, 32)


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
    """`weight_OI` as `source` stores it (bfloat16, or E4M3 with its scales [OB, IB]), in the format `target`.

    `shared` is the second scale where siblings are fused; without it the matrix has its own. `search` tries the
    target's candidate scales. Raises `PlanError` for weights that are not finite, and for a source or target without a kernel.
    """
    if source not in SOURCES or target.name not in TARGETS:
        raise PlanError(f"no kernel goes from {source} to {target.name}; decode and encode through `formats` instead")
    if TARGETS[target.name][0] == loops.AFFINE:
        return affine(source, weight_OI, weight_scales, target, measure)
    if target.share is not None and shared is None:
        shared = target.share(amax(source, weight_OI, weight_scales))
    (rows, columns), (element, rule) = weight_OI.shape, TARGETS[target.name]
    n = target.block[1] or columns
    blocks = -(-columns // n)
    changes = candidate_changes(target) if search else NO_CHANGES
    stored_OBn, steps, source_rows = stored_blocks(source, weight_OI, weight_scales)
    x_K, x_source_Bn = row_buffer(source, columns, blocks * n)
    codes = np.zeros(blocks * n + 64, np.uint8)  # packing reads in words
    packed = packed_rows(target, rows, columns)
    stored = np.empty((-(-rows // (target.block[0] or 1)), blocks), np.uint32)
    squares = np.zeros(2, np.float64)
    top = loops.requantize_rows(
        SOURCES[source], stored_OBn, steps, source_rows,
        element, rule, target.element_bits, target.block[0] or 1, loops.f32(1.0 if shared is None else shared.item()),
        changes, measure,
        x_K, x_source_Bn, x_K[: blocks * n].reshape(blocks, n), np.empty((n, blocks), np.uint32),
        np.empty((3, len(x_K)), np.uint32), codes, codes[: blocks * n].reshape(blocks, n), codes[columns : blocks * n],
        np.empty((3, blocks), np.uint32), np.empty((3, blocks), np.float32), np.zeros((2, blocks, n), np.float32),
        packed, stored, squares,
    )  # fmt: skip
    if top > loops.LARGEST_BITS:
        raise not_finite(target.name, weight_OI.shape)
    measured = squares.tolist() if measure else (None, None)
    largest = float(np.uint32(top).view(np.float32))
    return Requantized(as_stored(target, packed), Scales(as_scales(rule, stored), shared), largest, *measured)


def affine(
    source: str, weight_OI: Tensor, weight_scales: Tensor | None, target: NumberFormat, measure: bool
) -> Requantized:
    """`requantize` for a grid with offsets, which leaves nothing to search."""
    (rows, columns), n = weight_OI.shape, target.block[1]
    blocks = -(-columns // n)
    stored_OBn, steps, source_rows = stored_blocks(source, weight_OI, weight_scales)
    x_K, x_source_Bn = row_buffer(source, columns, blocks * n)
    codes = np.zeros(blocks * n + 64, np.uint8)
    packed, squares = packed_rows(target, rows, columns), np.zeros(2, np.float64)
    scales, offsets = np.empty((2, rows, blocks), np.uint32)
    sums = np.zeros((2, blocks, n), np.float32)
    top = loops.affine_rows(
        SOURCES[source], stored_OBn, steps, source_rows, target.element_bits, measure,
        x_K, x_source_Bn, x_K[: blocks * n].reshape(blocks, n), np.empty((n, blocks), np.uint32),
        codes, codes[: blocks * n].reshape(blocks, n), codes[columns : blocks * n],
        np.empty((4, blocks), np.float32), sums, sums[0].reshape(-1)[columns:], packed, scales, offsets, squares,
    )  # fmt: skip
    if top > loops.LARGEST_BITS:
        raise not_finite(target.name, weight_OI.shape)
    stored, shift = (as_scales(loops.BF16_SCALE, part) for part in (scales, offsets))
    measured = squares.tolist() if measure else (None, None)
    largest = float(np.uint32(top).view(np.float32))
    return Requantized(as_stored(target, packed), Scales(stored, offsets=shift), largest, *measured)


def searches(target: NumberFormat) -> bool:
    """Whether `search` chooses scales of that format."""
    return target.name in TARGETS and len(candidate_changes(target)) > 0


def search(w_OI: Tensor, target: NumberFormat) -> Scales:
    """Scales of least error for weights [O, I] of any dtype: what `NumberFormat.search` makes of the standard ones.

    A tenth of the time and less. Raises `PlanError` for weights that are not finite.
    """
    w_OI = w_OI.float().contiguous()
    (rows, columns), n, (element, rule) = w_OI.shape, target.block[1], TARGETS[target.name]
    shared = None if target.share is None else target.share(w_OI.abs().max())
    blocks = -(-columns // n)
    x_K, stored = np.zeros(blocks * n, np.uint32), np.empty((rows, blocks), np.uint32)
    top = loops.search_rows(
        w_OI.numpy(), element, rule, target.element_bits, loops.f32(1.0 if shared is None else shared.item()),
        candidate_changes(target), x_K, x_K.reshape(blocks, n), np.empty((n, blocks), np.uint32),
        np.empty((2, len(x_K)), np.uint32), np.empty((3, blocks), np.uint32), np.empty((3, blocks), np.float32), stored,
    )  # fmt: skip
    if top > loops.LARGEST_BITS:
        raise not_finite(target.name, w_OI.shape)
    return Scales(as_scales(rule, stored), shared)


def amax(source: str, weight_OI: Tensor, weight_scales: Tensor | None) -> Tensor:
    """The largest |w| of a matrix as `source` stores it: F32 []. Raises `PlanError` if that is not finite."""
    stored_OBn, steps, source_rows = stored_blocks(source, weight_OI, weight_scales)
    x_K, x_source_Bn = row_buffer(source, weight_OI.shape[1])
    top = loops.amax_rows(SOURCES[source], stored_OBn, steps, source_rows, x_K, x_source_Bn)
    if top > loops.LARGEST_BITS:
        raise not_finite("a scale", weight_OI.shape)
    return torch.from_numpy(np.array(top, np.uint32).view(np.float32))


def stored_blocks(source: str, weight_OI: Tensor, scales: Tensor | None) -> tuple[np.ndarray, np.ndarray, int]:
    """A source's bytes [O, B, ·] in its blocks, their steps F32 [·, B], and how many rows share those."""
    rows, columns = weight_OI.shape
    stored = weight_OI.contiguous().view(torch.uint8)
    if scales is None:
        return stored.numpy()[:, None], np.ones((1, 1), np.float32), rows
    source_rows, n = FORMATS[source].block
    if columns % n:  # a copy, but no checkpoint has such rows
        stored = torch.nn.functional.pad(stored, (0, -columns % n))
    (steps,) = FORMATS[source].steps(Scales(scales))
    return stored.numpy().reshape(rows, -1, n), steps.contiguous().numpy(), source_rows


def row_buffer(source: str, columns: int, least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Room for the F32 bits of one row, of `least` columns or more; and a view of it in the source's blocks."""
    n = FORMATS[source].block[1] or columns
    blocks = -(-columns // n)
    x_K = np.zeros(max(least, blocks * n), np.uint32)
    return x_K, x_K[: blocks * n].reshape(blocks, n)


def candidate_changes(target: NumberFormat) -> np.ndarray:
    """The scales that a search tries, in the order of the format's `candidates`."""
    match TARGETS[target.name][1]:
        case loops.FLOOR_POWER:
            return np.array([1], np.float32)
        case loops.E4M3_SCALE:
            return np.array(NEIGHBOURS, np.float32)
        case loops.BF16_SCALE if target.block[1] and TARGETS[target.name][0] == loops.INTEGER:
            return np.array(CLIPS[target.element_bits], np.float32)
    return NO_CHANGES


def packed_rows(target: NumberFormat, rows: int, columns: int) -> np.ndarray:
    """Bytes [O, ·] for the codes: rows of integers in groups are whole 32-bit words."""
    word = 32 if TARGETS[target.name][0] in (loops.INTEGER, loops.AFFINE) and target.block[1] else 8
    return np.empty((rows, -(-columns * target.element_bits // word) * word // 8), np.uint8)


def as_stored(target: NumberFormat, packed: np.ndarray) -> Tensor:
    codes = torch.from_numpy(packed)
    match TARGETS[target.name][0]:
        case loops.BF16:
            return codes.view(torch.bfloat16)
        case loops.E4M3:
            return codes.view(torch.float8_e4m3fn)
        case loops.AFFINE:
            return codes.view(torch.uint32)
        case loops.INTEGER:
            return codes.view(torch.int32) if target.block[1] else codes.bitwise_xor_(0x80).view(torch.int8)
    return codes


def as_scales(rule: int, stored: np.ndarray) -> Tensor | None:
    match rule:
        case loops.NO_SCALE:
            return None
        case loops.F32_SCALE:
            return torch.from_numpy(stored.view(np.float32))
        case loops.BF16_SCALE:
            return torch.from_numpy(stored.astype(np.uint16)).view(torch.bfloat16)
        case loops.E4M3_SCALE:
            return torch.from_numpy(stored.astype(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(stored.astype(np.uint8))
