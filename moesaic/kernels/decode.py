"""Weights from stored bytes on the CPU: each row's bit stream of codes, through the table of what a code means.

One loop serves every format whose codes have up to 8 bits. What a code means is asked of the format itself (its
values at step 1), so that the arithmetic left is a product, and a sum where the grid is affine: the same as
`NumberFormat.decode` has, to the bit. It runs some ten times as fast, as no tensor is made but the result.

A matrix that is not small is cut by rows over torch's number of threads. Leaves out reading files, BF16 (torch's
own conversion is as fast), and other devices.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..formats import NumberFormat, Scales

SMALL = 1 << 18  # weights that one thread decodes before a second would have begun
WIDEST = 8  # bits


def decodes(format: NumberFormat) -> bool:
    """Whether a code of `format` is short enough for a table."""
    return format.element_bits <= WIDEST


def decode(format: NumberFormat, stream_OS: Tensor, scales: Scales, columns: int) -> Tensor:
    """F32 weights [O, columns] of codes that lie as dense little-endian streams, one a row: uint8 [O, S], on the CPU."""
    rows, bits = len(stream_OS), format.element_bits
    steps = [s.contiguous().numpy() for s in format.steps(scales)]
    plain = (torch.ones(()), *[torch.zeros(())] * (len(steps) - 1))  # step 1, offset 0
    table = format.value(torch.arange(2**bits, dtype=torch.uint8), *plain).numpy()
    offsets = steps[1] if len(steps) > 1 else np.empty((0, 0), np.float32)
    w_OI = torch.empty(rows, columns)
    stream, into = stream_OS.contiguous().numpy(), w_OI.numpy()
    block_rows, n = format.block[0] or rows, format.block[1] or columns

    def span(start: int, stop: int) -> None:
        decode_rows(stream, bits, table, steps[0], offsets, block_rows, n, start, stop, into)

    parts = min(torch.get_num_threads(), -(-rows * columns // SMALL))
    if parts <= 1:
        span(0, rows)
    else:
        cuts = [rows * part // parts for part in range(parts + 1)]
        with ThreadPoolExecutor(parts) as pool:
            list(pool.map(span, cuts[:-1], cuts[1:]))
    return w_OI


jit = njit(error_model="numpy")  # no fast math: a product and a sum fused would not be the format's bits


def unpacker(bits: int) -> Callable[[np.ndarray, np.ndarray], None]:
    """The loop that takes codes of so many bits apart: eight of them lie in as many whole bytes as each has bits."""
    mask = np.uint64((1 << bits) - 1)

    @jit
    def unpack(row, codes):  # type: ignore[no-untyped-def]
        whole = codes.shape[0] // 8
        eights, octets = codes[: 8 * whole].reshape(whole, 8), row[: bits * whole].reshape(whole, bits)
        for k in range(whole):
            word = np.uint64(0)
            for j in range(bits):
                word |= np.uint64(octets[k, j]) << np.uint64(8 * j)
            for j in range(8):
                eights[k, j] = (word >> np.uint64(bits * j)) & mask
        word = np.uint64(0)
        for j in range(bits * whole, row.shape[0]):
            word |= np.uint64(row[j]) << np.uint64(8 * (j - bits * whole))
        for j in range(8 * whole, codes.shape[0]):
            codes[j] = (word >> np.uint64(bits * (j - 8 * whole))) & mask

    return unpack


unpack_2, unpack_3, unpack_4, unpack_5, unpack_6 = (unpacker(bits) for bits in (2, 3, 4, 5, 6))


@jit
def unpacked(row, bits, codes):  # type: ignore[no-untyped-def]
    """The codes of one row, a byte each."""
    if bits == 8:
        return row
    if bits == 2:
        unpack_2(row, codes)
    elif bits == 3:
        unpack_3(row, codes)
    elif bits == 4:
        unpack_4(row, codes)
    elif bits == 5:
        unpack_5(row, codes)
    else:
        unpack_6(row, codes)
    return codes


@njit(error_model="numpy", nogil=True, cache=True)
def decode_rows(stream, bits, table, steps, offsets, block_rows, n, start, stop, into):  # type: ignore[no-untyped-def]
    """Rows `start` to `stop`. Slices, not sums of indices, are what lets LLVM drop the check for negative ones."""
    columns = into.shape[1]
    buffer = np.empty(columns, np.uint8)
    for o in range(start, stop):
        codes, at = unpacked(stream[o], bits, buffer), o // block_rows
        for b in range(steps.shape[1]):
            step, first, last = steps[at, b], b * n, min(b * n + n, columns)
            from_n, into_n = codes[first:last], into[o, first:last]
            for k in range(into_n.shape[0]):
                into_n[k] = table[from_n[k]] * step
            if offsets.shape[0] > 0:
                offset = offsets[at, b]
                for k in range(into_n.shape[0]):
                    into_n[k] += offset
