"""The loops for a card, in Triton: tiles of stored bytes in, packed codes and stored scales out, in one pass.

Each function is its namesake in `loops` on a whole tile, and that in `formats/`, to the bit. Numbers are taken apart
as integers, and what is left to floating point is correctly rounded on every card: sums, products, and divisions by
`div_rn` (Triton's own `/` is not). Nothing may be fused: callers say `enable_fp_fusion=False`.

A tile is [R, N]: R blocks of N weights, one below the other, counted through the matrix row by row; or the R rows
of one square block. A search looks at [R, C]: C candidates for the scale of each block, and at one weight of every
block after the other, so that errors are added up from the first to the last as `formats.base.block_sums` does.
Leaves out the host's side, which is `cuda`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import loops

BF16, E4M3, E2M1, INTEGER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NO_SCALE, F32_SCALE, CEIL_POWER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FLOOR_POWER, E4M3_SCALE, BF16_SCALE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
assert [k.value for k in (BF16, E4M3, E2M1, INTEGER)] == [loops.BF16, loops.E4M3, loops.E2M1, loops.INTEGER]

LEAST_GAIN, MOST_GAIN = tl.constexpr(float(loops.LEAST_GAIN)), tl.constexpr(float(loops.MOST_GAIN))
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


# Elements -----------------------------------------------------------------------------------------------------------


@triton.jit
def e4m3_value(code):
    """The F32 of an E4M3 code. A NaN code becomes an infinity, and is refused as one."""
    magnitude = code & 0x7F
    subnormal = bits_of(magnitude.to(tl.float32) * 0.001953125)  # 2**-9
    bits = tl.where(magnitude >= 8, (magnitude << 20) + (120 << 23), subnormal)
    bits = tl.where(magnitude == 0x7F, INFINITE, bits)
    return float_of(bits | ((code & 0x80) << 24))


@triton.jit
def e4m3_round(q):
    """The code of the E4M3 nearest to `q`; beyond 448 stays 448."""
    bits = bits_of(q)
    near = tl.minimum(bits & MAGNITUDE, 0x43E00000)
    normal = ((near + 0x7FFFF + ((near >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = bits_of(float_of(near) + 16384.0) - 0x46800000  # below 2**-6, in steps of 2**-9
    return tl.where(near >= 0x3C800000, normal, subnormal) | ((bits >> 24) & 0x80)


@triton.jit
def e2m1_adder(near):
    """What to add to a magnitude, up to 6, to leave its E2M1 index in the low three bits. See `loops`."""
    return tl.where(near >= 4.0, 16777224.0, tl.where(near >= 2.0, 8388610.0, 4194304.0))


@triton.jit
def e2m1_round(q):
    """The code of the E2M1 nearest to `q`: index | sign << 3; beyond 6 stays 6."""
    bits = bits_of(q)
    near = float_of(tl.minimum(bits & MAGNITUDE, 0x40C00000))
    return (bits_of(near + e2m1_adder(near)) & 7) | ((bits >> 28) & 8)


@triton.jit
def e2m1_nearest(q):
    """The magnitude of the E2M1 nearest to `q`."""
    near = float_of(tl.minimum(bits_of(q) & MAGNITUDE, 0x40C00000))
    adder = e2m1_adder(near)
    return (near + adder) - adder


@triton.jit
def integer_nearest(q, low, high):
    """The integer in [low, high] nearest to `q`."""
    return (tl.minimum(tl.maximum(q, low), high) + 12582912.0) - 12582912.0


@triton.jit
def integer_round(q, low, high):
    """The same, unsigned: low becomes 0."""
    return bits_of(tl.minimum(tl.maximum(q, low), high) + (12582912.0 - low)) & 0xFF


@triton.jit
def bf16_round(bits):
    """The upper 16 bits of an F32, rounded."""
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


# Scales -------------------------------------------------------------------------------------------------------------


@triton.jit
def power_of(byte):
    """E8M0: 2**(byte − 127), a subnormal for 0, not finite for 255."""
    return float_of(tl.where(byte == 0, 0x400000, byte << 23))


@triton.jit
def fit(amax, shared, half_range, RULE: tl.constexpr):
    """Stored scales, by each format's standard rule, from the bits of the largest magnitude of each block."""
    if RULE == F32_SCALE:
        scale = bits_of(tl.div_rn(float_of(amax), tl.full(amax.shape, 448.0, tl.float32)))
        stored = tl.where(scale == 0, 0x3F800000, scale)
    elif RULE == CEIL_POWER:
        above = ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)
        stored = tl.minimum(tl.maximum((amax >> 23) + above, 8) - 8, 246)
    elif RULE == FLOOR_POWER:
        stored = tl.maximum(amax >> 23, 2) - 2
    elif RULE == E4M3_SCALE:
        ideal = tl.div_rn(float_of(amax), tl.full(amax.shape, 6.0, tl.float32)) * shared
        stored = e4m3_round(tl.minimum(tl.maximum(ideal, 0.001953125), 448.0))
    elif RULE == BF16_SCALE:
        safe = float_of(tl.minimum(amax, 0x7E800000))  # 2**126
        scale = bf16_round(bits_of(tl.div_rn(safe, tl.full(amax.shape, half_range, tl.float32))))
        stored = tl.where(scale == 0, 0x3F80, scale)
    else:
        stored = amax
    return stored


@triton.jit
def candidate_of(stored, change, RULE: tl.constexpr):
    """A scale to try: `change` codes away (MXFP4, NVFP4), or times `change` (integers)."""
    if RULE == BF16_SCALE:
        tried = bf16_round(bits_of(float_of(stored << 16) * change))
    elif RULE == E4M3_SCALE:
        tried = tl.minimum(tl.maximum(stored + change.to(tl.int32), 1), 126)
    else:
        tried = stored + change.to(tl.int32)
    return tried


@triton.jit
def step_of(stored, shared, RULE: tl.constexpr):
    if RULE == F32_SCALE:
        step = float_of(stored)
    elif RULE == E4M3_SCALE:
        step = tl.div_rn(e4m3_value(stored), tl.full(stored.shape, shared, tl.float32))
    elif RULE == BF16_SCALE:
        step = float_of(stored << 16)
    else:
        step = power_of(stored)
    return step


@triton.jit
def over_step(w, stored, step, RULE: tl.constexpr):
    """w / step. By a power of two, times its inverse: that is exact, unless the result is no F32, and much quicker."""
    if (RULE == CEIL_POWER) | (RULE == FLOOR_POWER):
        q = w * power_of(254 - stored)
    else:
        w, step = tl.broadcast(w, step)
        q = tl.div_rn(w, step)
    return q


# In -----------------------------------------------------------------------------------------------------------------


@triton.jit
def place(rows, blocks, R: tl.constexpr, SQUARE: tl.constexpr):
    """Row and block of each of a tile's R lines, and whether they are there at all."""
    line = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    if SQUARE:
        row, block = (
            (tl.program_id(0) // blocks) * R + tl.arange(0, R),
            tl.program_id(0) % blocks + tl.zeros([R], tl.int32),
        )
    else:
        row, block = (line // blocks).to(tl.int32), (line % blocks).to(tl.int32)
    return row, block, row < rows


@triton.jit
def source_steps(
    scales, row, column, there, columns, SOURCE_ROWS: tl.constexpr, SOURCE_N: tl.constexpr, POWERS: tl.constexpr
):
    """What the weights at these places have to be multiplied by: stored as F32, or as powers of two."""
    if SOURCE_N == 0:
        steps = tl.full(column.shape, 1.0, tl.float32)
    else:
        at = (row // SOURCE_ROWS).to(tl.int64) * tl.cdiv(columns, SOURCE_N) + column // SOURCE_N
        steps = tl.load(scales + at, there, 0)
        if POWERS:
            steps = power_of(steps.to(tl.int32))
    return steps


@triton.jit
def load(stored, row, column, there, columns, steps, SOURCE_N: tl.constexpr):
    """F32 weights at these places; 0 where there are none."""
    code = tl.load(stored + row.to(tl.int64) * columns + column, there, 0).to(tl.int32)
    return float_of(code << 16) if SOURCE_N == 0 else e4m3_value(code) * steps


# Search -------------------------------------------------------------------------------------------------------------


@triton.jit
def miss(w, stored, step, low, high, ELEMENT: tl.constexpr, RULE: tl.constexpr):
    """value − w of the nearest value, in E2M1 less its sign."""
    if ELEMENT == E2M1:
        w = tl.abs(w)
        d = e2m1_nearest(over_step(w, stored, step, RULE)) * step - w
    else:
        d = integer_nearest(over_step(w, stored, step, RULE), low, high) * step - w
    return d


@triton.jit
def search(
    stored_R, shared, low, high, changes, stored, scales, row, block, there, columns,
    SOURCE_ROWS: tl.constexpr, SOURCE_N: tl.constexpr, POWERS: tl.constexpr, ELEMENT: tl.constexpr, RULE: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """For each block the candidate of least Σ (value − w)²; of equals the first, which is no change."""
    tried = candidate_of(stored_R[:, None], tl.load(changes + tl.arange(0, C))[None, :], RULE)
    step = step_of(tried, shared, RULE)
    error = tl.zeros([R, C], tl.float32)
    for j in range(N):
        column = block * N + j
        inside = there & (column < columns)
        steps = source_steps(scales, row, column, inside, columns, SOURCE_ROWS, SOURCE_N, POWERS)
        w = load(stored, row, column, inside, columns, steps, SOURCE_N)
        d = miss(w[:, None], tried, step, low, high, ELEMENT, RULE)
        error = error + d * d
    c = tl.arange(0, C)[None, :]
    error = tl.where(error == error, error, tl.where(c == 0, float("-inf"), float("inf")))  # as `<` has it
    best = tl.argmin(error, 1)[:, None]
    return tl.sum(tl.where(c == best, tried, 0), 1)


@triton.jit
def unshrunk(
    kept, low, high, stored, scales, row, block, there, columns,
    SOURCE_ROWS: tl.constexpr, SOURCE_N: tl.constexpr, POWERS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """For each block the scale under which its values reach as far along its weights as those do. BF16 scales."""
    step = step_of(kept, 1.0, BF16_SCALE)
    whole, along = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    for j in range(N):
        column = block * N + j
        inside = there & (column < columns)
        steps = source_steps(scales, row, column, inside, columns, SOURCE_ROWS, SOURCE_N, POWERS)
        u = over_step(load(stored, row, column, inside, columns, steps, SOURCE_N), kept, step, BF16_SCALE)
        whole, along = whole + u * u, along + u * integer_nearest(u, low, high)
    ratio = tl.div_rn(whole, along)
    known = (ratio > 0.0) & (ratio < float("inf"))
    gain = tl.where(known, tl.minimum(tl.maximum(ratio, LEAST_GAIN), MOST_GAIN), 1.0)
    return bf16_round(bits_of(step * gain))


# Out ----------------------------------------------------------------------------------------------------------------


@triton.jit
def pack(codes, packed, row, block, there, row_bytes, BITS: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Codes as one little-endian bit stream a row: the fewest that fill whole bytes are joined, and written byte by byte."""
    LANES: tl.constexpr = 8 // BITS if BITS != 3 else 8
    SPAN: tl.constexpr = LANES * BITS // 8
    joined = codes
    if LANES > 1:
        lanes = tl.reshape(codes, [R, N // LANES, LANES])
        joined = tl.sum(lanes << (tl.arange(0, LANES) * BITS)[None, None, :], 2)
    first = block[:, None] * (N * BITS // 8) + tl.arange(0, N // LANES)[None, :] * SPAN
    for k in tl.static_range(SPAN):
        inside = there[:, None] & (first + k < row_bytes)
        at = packed + row[:, None].to(tl.int64) * row_bytes + first + k
        tl.store(at, (joined >> (8 * k)).to(tl.uint8), inside)


# The whole matrix ---------------------------------------------------------------------------------------------------


@triton.jit
def amax_tile(
    stored, scales, top, rows, columns, blocks,
    SOURCE_ROWS: tl.constexpr, SOURCE_N: tl.constexpr, POWERS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Raises `top` int32 [1] to the bits of the largest magnitude of a tile."""
    row, block, there = place(rows, blocks, R, False)
    row, column = row[:, None], block[:, None] * N + tl.arange(0, N)[None, :]
    inside = there[:, None] & (column < columns)
    steps = source_steps(scales, row, column, inside, columns, SOURCE_ROWS, SOURCE_N, POWERS)
    w = load(stored, row, column, inside, columns, steps, SOURCE_N)
    tl.atomic_max(top, tl.max(tl.max(bits_of(w) & MAGNITUDE, 1), 0))


@triton.jit
def requantize_tile(
    stored, scales, shared_1, changes, packed, out_scales, top, squares, rows, columns, blocks, row_bytes, low, high, half_range,
    SOURCE_ROWS: tl.constexpr, SOURCE_N: tl.constexpr, POWERS: tl.constexpr, ELEMENT: tl.constexpr, RULE: tl.constexpr,
    BITS: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SQUARE: tl.constexpr, C: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """Decode, fit, search (C > 0), round, pack one tile; `top` as in `amax_tile`; squares F32 [tiles, 2]: Σ (value − w)², Σ w².

    Pointers: stored int16 (BF16) or uint8 (E4M3) [O, I]; scales as the source stores them; changes F32 [C];
    packed uint8 [O, row_bytes] or int16 [O, I]; out_scales of as many bits as are stored, [OB, IB].
    """
    row, block, there = place(rows, blocks, R, SQUARE)
    column = block[:, None] * N + tl.arange(0, N)[None, :]
    inside = there[:, None] & (column < columns)
    if N <= SOURCE_N:
        steps = source_steps(scales, row, block * N, there, columns, SOURCE_ROWS, SOURCE_N, POWERS)[:, None]
    else:
        steps = source_steps(scales, row[:, None], column, inside, columns, SOURCE_ROWS, SOURCE_N, POWERS)
    w = load(stored, row[:, None], column, inside, columns, steps, SOURCE_N)
    amax = tl.max(bits_of(w) & MAGNITUDE, 1)
    tl.atomic_max(top, tl.max(amax, 0))
    if SQUARE:
        amax = tl.zeros([R], tl.int32) + tl.max(amax, 0)
    shared = tl.load(shared_1)
    kept = fit(amax, shared, half_range, RULE)
    if C > 0:
        kept = search(
            kept, shared, low, high, changes, stored, scales, row, block, there, columns,
            SOURCE_ROWS, SOURCE_N, POWERS, ELEMENT, RULE, R, N, C,
        )  # fmt: skip
    grown = kept
    if C > 0 and RULE == BF16_SCALE:
        grown = unshrunk(
            kept, low, high, stored, scales, row, block, there, columns, SOURCE_ROWS, SOURCE_N, POWERS, R, N
        )
    if ELEMENT == BF16:
        codes = bf16_round(bits_of(w))
        at = row[:, None].to(tl.int64) * columns + column
        tl.store(packed + at, codes.to(tl.int16), inside)
        d = float_of(codes << 16) - w
    else:
        scale_row = row // R if SQUARE else row
        first = there & (tl.arange(0, R) == 0) if SQUARE else there
        tl.store(out_scales + scale_row.to(tl.int64) * blocks + block, grown.to(out_scales.dtype.element_ty), first)
        step = step_of(kept, shared, RULE)[:, None]
        q = over_step(w, kept[:, None], step, RULE)
        if ELEMENT == E4M3:
            codes = e4m3_round(q)
            d = e4m3_value(codes) * step - w
        elif ELEMENT == E2M1:
            codes = e2m1_round(q)
            d = miss(w, kept[:, None], step, low, high, ELEMENT, RULE)
        else:
            codes = integer_round(q, low, high)
            d = integer_nearest(q, low, high) * step_of(grown, shared, RULE)[:, None] - w
        pack(tl.where(inside, codes, 0), packed, row, block, there, row_bytes, BITS, R, N)
    if MEASURE:
        at = squares + tl.program_id(0).to(tl.int64) * 2
        tl.store(at, tl.sum(tl.sum(tl.where(inside, d * d, 0.0), 1), 0))
        tl.store(at + 1, tl.sum(tl.sum(w * w, 1), 0))
