"""The compiled loops: rows of stored bytes in, rows of packed codes and stored scales out.

Elements and scales come first, as branch-free functions that LLVM inlines: each equals its namesake in
`formats/` to the bit, in F32 and its bits. Rounding to nearest even is left to the adder wherever it can
be: adding 2**23 · q to a smaller number rounds it to multiples of q, and leaves the multiple in the low bits.

Every loop runs over a contiguous row without a branch or a call that stays one, so that LLVM vectorises it.
That shapes two things. A block's maximum is found by folding the whole row, neighbour with neighbour, until one
number a block is left. And a search lays the row out as [n, B], block beside block, so that errors of
all blocks are added up side by side, each from its first weight to its last as `formats.base.block_sums` does.

Arrays carry their shapes as suffixes: K columns padded to whole blocks, B blocks of n. What a target needs is
told in plain numbers, so one compiled function handles every source/target pair. Views and
buffers are made by the caller, because compiling them costs more than all the arithmetic. All this is one
file because numba's cache watches only the file of the function that it keeps: an edit elsewhere would go unseen.
"""

# mypy: disable-error-code="no-untyped-def, arg-type"

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

# No fast math: a reordered sum or a fused multiply-add would not be the reference's bits.
jit = njit(
    fastmath=False, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)  # no wrappers: a third less to compile
entry = njit(fastmath=False, error_model="numpy", nogil=True, cache=True)

u32, f32 = np.uint32, np.float32
MAGNITUDE = u32(0x7FFFFFFF)

BF16, E4M3, E2M1, INTEGER, AFFINE = range(5)  # elements
NO_SCALE, F32_SCALE, CEIL_POWER, FLOOR_POWER, E4M3_SCALE, BF16_SCALE = range(6)  # scales
LEAST_GAIN, MOST_GAIN = f32(0.8), f32(1.6)  # `formats.base.GAIN`; the cache would not see it change there
LARGEST_BITS = u32(0x7F7F0000)  # the largest BF16
LEAST_STEP, SAFE = f32(1e-7), f32(2.0**126)  # `formats.affine`'s EPS and SAFE
FLUSH_ROWS = 64  # F32 sums of squares run over this many rows before they go into an F64


@intrinsic
def bits_of(context: Any, x: Any) -> tuple[Any, Callable[..., Any]]:
    """The 32 bits of an F32."""
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(context: Any, x: Any) -> tuple[Any, Callable[..., Any]]:
    """The F32 of 32 bits."""
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> tuple[Any, Callable[..., Any]]:
    """a · b + c, rounded once."""
    return types.float32(*[types.float32] * 3), lambda c, builder, s, args: builder.fma(*args)


# Elements -----------------------------------------------------------------------------------------------------------


@jit
def e4m3_value(code):
    """Bits of the F32 of an E4M3 code. A NaN code becomes an infinity, and is refused as one."""
    magnitude = u32(code & u32(0x7F))
    normal = u32((magnitude << u32(20)) + u32(120 << 23))
    subnormal = bits_of(float_of(u32((magnitude << u32(20)) + u32(121 << 23))) - f32(2.0**-6))
    bits = normal if magnitude >= u32(8) else subnormal
    bits = u32(0x7F800000) if magnitude == u32(0x7F) else bits
    return u32(bits | u32((code & u32(0x80)) << u32(24)))


@jit
def e4m3_round(q):
    """The code of the E4M3 nearest to `q`; beyond 448 stays 448."""
    bits = bits_of(q)
    near = min(float_of(u32(bits & MAGNITUDE)), f32(448.0))
    near_bits = bits_of(near)
    normal = u32(((near_bits + u32(0x7FFFF) + ((near_bits >> u32(20)) & u32(1))) >> u32(20)) - u32(120 << 3))
    subnormal = u32(bits_of(near + f32(2.0**14)) - bits_of(f32(2.0**14)))  # below 2**-6, in steps of 2**-9
    code = normal if near >= f32(2.0**-6) else subnormal
    return u32(code | ((bits >> u32(24)) & u32(0x80)))


@jit
def e2m1_adder(near):
    """What to add to a magnitude up to 6 to leave its E2M1 index in the low three bits.

    The grid's step is ½ below 2, then 1, then 2 from 4 on; the index is 2·near, near + 2, near/2 + 4.
    """
    adder = f32(2.0**22)
    adder = f32(2.0**23 + 2) if near >= f32(2.0) else adder
    return f32(2.0**24 + 8) if near >= f32(4.0) else adder


@jit
def e2m1_round(q):
    """The code of the E2M1 nearest to `q`: index | sign << 3; beyond 6 stays 6."""
    bits = bits_of(q)
    near = min(float_of(u32(bits & MAGNITUDE)), f32(6.0))
    return u32((bits_of(near + e2m1_adder(near)) & u32(7)) | ((bits >> u32(28)) & u32(8)))


@jit
def e2m1_nearest(magnitude):
    """The E2M1 number nearest to a magnitude. Both products are exact, so fusing them rounds nothing differently."""
    near = min(magnitude, f32(6.0))
    power = float_of(u32(bits_of(max(near, f32(1.0))) & u32(0x7F800000)))  # 1, 2 or 4: twice the grid's step
    return multiply_add(power, f32(-(2.0**22)), multiply_add(power, f32(2.0**22), near))


@jit
def integer_nearest(q, low, high):
    """The integer in [low, high] nearest to `q`."""
    return (min(max(q, low), high) + f32(1.5 * 2**23)) - f32(1.5 * 2**23)


@jit
def integer_round(q, low, high):
    """The same, unsigned: low becomes 0."""
    return u32(bits_of(min(max(q, low), high) + (f32(1.5 * 2**23) - low)) & u32(0xFF))


@jit
def bf16_round(bits):
    """The upper 16 bits of an F32, rounded."""
    return u32((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))


# Scales: from the bits of a block's amax, what is stored -------------------------------------------------------------


@jit
def mxfp4_scale(amax):
    return u32(max(amax >> u32(23), u32(2)) - u32(2))


@jit
def mxfp8_scale(amax):
    above = u32((amax & u32(0x7FFFFF)) > u32(0x600000))
    return u32(min(max((amax >> u32(23)) + above, u32(8)) - u32(8), u32(246)))


@jit
def nvfp4_scale(amax, shared):
    ideal = float_of(amax) / f32(6.0) * shared
    return e4m3_round(min(max(ideal, f32(2.0**-9)), f32(448.0)))


@jit
def integer_scale(amax, half_range):
    scale = bf16_round(bits_of(min(float_of(amax), f32(2.0**126)) / half_range))
    return u32(0x3F80) if scale == u32(0) else scale


@jit
def fp8_scale(amax):
    scale = float_of(amax) / f32(448.0)
    return bits_of(f32(1.0)) if scale == f32(0.0) else bits_of(scale)


@jit
def power_of(byte):
    """E8M0: 2**(byte − 127), a subnormal for 0, not finite for 255."""
    return float_of(u32(0x400000)) if byte == u32(0) else float_of(u32(byte << u32(23)))


# In -----------------------------------------------------------------------------------------------------------------


@jit
def load_bf16(stored_Bn, x_Bn):
    row, x_K = stored_Bn[0].view(np.uint16), x_Bn[0]
    for j in range(row.shape[0]):
        x_K[j] = u32(row[j]) << u32(16)


@jit
def load_e4m3(stored_Bn, steps_B, x_Bn):
    for b in range(stored_Bn.shape[0]):
        step = steps_B[b]
        for j in range(stored_Bn.shape[1]):
            x_Bn[b, j] = bits_of(float_of(e4m3_value(u32(stored_Bn[b, j]))) * step)


@jit
def load(element, stored_Bn, steps_B, x_Bn):
    """The F32 bits of one row of a source, in the source's blocks (BF16: one block of all bytes)."""
    if element == BF16:
        load_bf16(stored_Bn, x_Bn)
    else:
        load_e4m3(stored_Bn, steps_B, x_Bn)


# Maxima and scales --------------------------------------------------------------------------------------------------


@jit
def clear(x_K):
    for j in range(x_K.shape[0]):
        x_K[j] = 0


@jit
def raise_maxima(x_K, maxima_K):
    for j in range(x_K.shape[0]):
        maxima_K[j] = max(maxima_K[j], u32(x_K[j] & MAGNITUDE))


@jit
def largest(x_K):
    top = u32(0)
    for j in range(x_K.shape[0]):
        top = max(top, u32(x_K[j] & MAGNITUDE))
    return top


@jit
def fold(x_K, length, folded_K):
    for i in range(length):
        folded_K[i] = max(u32(x_K[2 * i] & MAGNITUDE), u32(x_K[2 * i + 1] & MAGNITUDE))


@jit
def block_maxima(x_K, n, folded_K, again_K, amax_B):
    """Magnitude bits of the largest of each block of n: a power of two, or all. F32 magnitudes are ordered as their bits are."""
    if amax_B.shape[0] == 1:
        amax_B[0] = largest(x_K)
        return
    length = amax_B.shape[0] * n // 2
    fold(x_K, length, folded_K)
    while length > amax_B.shape[0]:
        length //= 2
        fold(folded_K, length, again_K)
        folded_K, again_K = again_K, folded_K
    for b in range(amax_B.shape[0]):
        amax_B[b] = folded_K[b]


@jit
def fit(rule, amax_B, shared, half_range, stored_B):
    """Stored scales by each format's standard rule."""
    for b in range(amax_B.shape[0]):
        if rule == F32_SCALE:
            stored_B[b] = fp8_scale(amax_B[b])
        elif rule == CEIL_POWER:
            stored_B[b] = mxfp8_scale(amax_B[b])
        elif rule == FLOOR_POWER:
            stored_B[b] = mxfp4_scale(amax_B[b])
        elif rule == E4M3_SCALE:
            stored_B[b] = nvfp4_scale(amax_B[b], shared)
        elif rule == BF16_SCALE:
            stored_B[b] = integer_scale(amax_B[b], half_range)


@jit
def step_of(rule, stored, shared):
    if rule == F32_SCALE:
        return float_of(stored)
    if rule in (CEIL_POWER, FLOOR_POWER):
        return power_of(stored)
    if rule == E4M3_SCALE:
        return float_of(e4m3_value(stored)) / shared
    return float_of(u32(stored << u32(16)))


@jit
def candidate_of(rule, stored, change):
    """A scale to try: `change` codes away (MXFP4, NVFP4), or times `change` (integers)."""
    if rule == BF16_SCALE:
        return bf16_round(bits_of(float_of(u32(stored << u32(16))) * change))
    code = np.int64(stored) + np.int64(change)
    return u32(min(max(code, 1), 126)) if rule == E4M3_SCALE else u32(code)


@jit
def fill_steps(rule, stored_B, shared, steps_B):
    for b in range(stored_B.shape[0]):
        steps_B[b] = step_of(rule, stored_B[b], shared)


# Search -------------------------------------------------------------------------------------------------------------


@jit
def transpose(x_Bn, x_nB):
    for j in range(x_nB.shape[0]):
        for b in range(x_nB.shape[1]):
            x_nB[j, b] = x_Bn[b, j]


@jit
def e2m1_miss(x, step):
    """value − w, less its sign, of the E2M1 nearest to a weight."""
    magnitude = float_of(u32(x & MAGNITUDE))
    return e2m1_nearest(magnitude / step) * step - magnitude


@jit
def integer_miss(x, step, low, high):
    w = float_of(x)
    return integer_nearest(w / step, low, high) * step - w


# The two loops below take four weights at a time, so that the sums are read and written less often.


@jit
def e2m1_errors(x_nB, steps_B, errors_B):
    for j in range(0, x_nB.shape[0], 4):
        for b in range(x_nB.shape[1]):
            step, error = steps_B[b], errors_B[b]
            for k in range(4):
                d = e2m1_miss(x_nB[j + k, b], step)
                error += d * d
            errors_B[b] = error


@jit
def integer_errors(x_nB, steps_B, low, high, errors_B):
    for j in range(0, x_nB.shape[0], 4):
        for b in range(x_nB.shape[1]):
            step, error = steps_B[b], errors_B[b]
            for k in range(4):
                d = integer_miss(x_nB[j + k, b], step, low, high)
                error += d * d
            errors_B[b] = error


@jit
def errors(element, x_nB, steps_B, low, high, errors_B):
    """Σ (value − w)² of every block."""
    clear(errors_B)
    if element == E2M1:
        e2m1_errors(x_nB, steps_B, errors_B)
    else:
        integer_errors(x_nB, steps_B, low, high, errors_B)


@jit
def keep_better(tried_B, errors_B, least_B, stored_B):
    for b in range(tried_B.shape[0]):
        if errors_B[b] < least_B[b]:
            stored_B[b], least_B[b] = tried_B[b], errors_B[b]


@jit
def search(element, rule, changes, shared, low, high, x_nB, plain_B, tried_B, steps_B, errors_B, least_B, stored_B):
    """Replace each block's scale by the candidate of least error, if that is less than its own."""
    for b in range(stored_B.shape[0]):
        plain_B[b] = stored_B[b]
    fill_steps(rule, plain_B, shared, steps_B)
    errors(element, x_nB, steps_B, low, high, least_B)
    for change in changes:
        for b in range(stored_B.shape[0]):
            tried_B[b] = candidate_of(rule, plain_B[b], change)
        fill_steps(rule, tried_B, shared, steps_B)
        errors(element, x_nB, steps_B, low, high, errors_B)
        keep_better(tried_B, errors_B, least_B, stored_B)


@jit
def unshrunk(x_nB, low, high, steps_B, whole_B, along_B, stored_B):
    """Replace each block's scale by one under which its values reach as far along its weights as those do. BF16 scales."""
    clear(whole_B)
    clear(along_B)
    for j in range(x_nB.shape[0]):
        for b in range(x_nB.shape[1]):
            u = float_of(x_nB[j, b]) / steps_B[b]
            whole_B[b] += u * u
            along_B[b] += u * integer_nearest(u, low, high)
    for b in range(stored_B.shape[0]):
        ratio = whole_B[b] / along_B[b]
        known = ratio > f32(0.0) and ratio < f32(np.inf)
        gain = min(max(ratio, LEAST_GAIN), MOST_GAIN) if known else f32(1.0)
        stored_B[b] = bf16_round(bits_of(steps_B[b] * gain))


# Out ----------------------------------------------------------------------------------------------------------------


@jit
def encode_e4m3(x_Bn, steps_B, codes_Bn):
    for b in range(x_Bn.shape[0]):
        step = steps_B[b]
        for j in range(x_Bn.shape[1]):
            codes_Bn[b, j] = e4m3_round(float_of(x_Bn[b, j]) / step)


@jit
def encode_e2m1(x_Bn, steps_B, codes_Bn):
    for b in range(x_Bn.shape[0]):
        step = steps_B[b]
        for j in range(x_Bn.shape[1]):
            codes_Bn[b, j] = e2m1_round(float_of(x_Bn[b, j]) / step)


@jit
def encode_integer(x_Bn, steps_B, low, high, codes_Bn):
    for b in range(x_Bn.shape[0]):
        step = steps_B[b]
        for j in range(x_Bn.shape[1]):
            codes_Bn[b, j] = integer_round(float_of(x_Bn[b, j]) / step, low, high)


@jit
def encode(element, x_Bn, steps_B, low, high, codes_Bn):
    if element == E4M3:
        encode_e4m3(x_Bn, steps_B, codes_Bn)
    elif element == E2M1:
        encode_e2m1(x_Bn, steps_B, codes_Bn)
    else:
        encode_integer(x_Bn, steps_B, low, high, codes_Bn)


@jit
def pack_bf16(x_K, packed):
    row = packed.view(np.uint16)
    for j in range(row.shape[0]):
        row[j] = bf16_round(x_K[j])


@jit
def pack_4(codes, packed):
    pairs = codes.view(np.uint16)
    for i in range(packed.shape[0]):
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


@jit
def pack_2(codes, packed):
    fours = codes.view(np.uint32)
    for i in range(packed.shape[0]):
        v = fours[i]
        packed[i] = np.uint8(v | (v >> u32(6)) | (v >> u32(12)) | (v >> u32(18)))


@jit
def join_3(eight):
    """The low three bits of each byte of a 64-bit word, side by side: 24 bits."""
    eight = (eight | (eight >> np.uint64(5))) & np.uint64(0x003F003F003F003F)
    eight = (eight | (eight >> np.uint64(10))) & np.uint64(0x00000FFF00000FFF)
    return eight | (eight >> np.uint64(20))


@jit
def pack_3(codes, packed):
    """Eight codes are three bytes; the last word of a row may end within them."""
    eights, whole = codes.view(np.uint64), packed.shape[0] // 3
    for i in range(whole):
        joined = join_3(eights[i])
        packed[3 * i] = np.uint8(joined)
        packed[3 * i + 1] = np.uint8(joined >> np.uint64(8))
        packed[3 * i + 2] = np.uint8(joined >> np.uint64(16))
    for k in range(packed.shape[0] - 3 * whole):
        packed[3 * whole + k] = np.uint8(join_3(eights[whole]) >> np.uint64(8 * k))


@jit
def join(eight, bits):
    """The low `bits` of each byte of a 64-bit word, side by side."""
    joined = np.uint64(0)
    for k in range(8):
        joined |= ((eight >> np.uint64(8 * k)) & np.uint64(0xFF)) << np.uint64(bits * k)
    return joined


@jit
def pack_eights(bits, codes, packed):
    """Eight codes are `bits` bytes; the last word of a row may end within them."""
    eights, whole = codes.view(np.uint64), packed.shape[0] // bits
    for i in range(whole):
        joined = join(eights[i], bits)
        for k in range(bits):
            packed[bits * i + k] = np.uint8(joined >> np.uint64(8 * k))
    for k in range(packed.shape[0] - bits * whole):
        packed[bits * whole + k] = np.uint8(join(eights[whole], bits) >> np.uint64(8 * k))


@jit
def pack_8(codes, packed):
    for i in range(packed.shape[0]):
        packed[i] = codes[i]


@jit
def pack(bits, codes, packed):
    """Codes [≥ what `packed` holds] as one little-endian bit stream."""
    if bits == 2:
        pack_2(codes, packed)
    elif bits == 3:
        pack_3(codes, packed)
    elif bits == 4:
        pack_4(codes, packed)
    elif bits in (5, 6):
        pack_eights(bits, codes, packed)
    else:
        pack_8(codes, packed)


# Affine grids: a scale and an offset a block ------------------------------------------------------------------------


@jit
def affine_fit(x_nB, last, low_B, high_B, scale_B, offset_B):
    """BF16 bits of each block's scale and offset, as `formats.affine.fit` has them; `last` is the largest code."""
    for b in range(x_nB.shape[1]):
        low_B[b] = high_B[b] = float_of(x_nB[0, b])
    for j in range(1, x_nB.shape[0]):
        for b in range(x_nB.shape[1]):
            w = float_of(x_nB[j, b])
            low_B[b] = min(low_B[b], w)
            high_B[b] = max(high_B[b], w)
    for b in range(x_nB.shape[1]):
        low, high = min(max(low_B[b], -SAFE), SAFE), min(max(high_B[b], -SAFE), SAFE)
        far_is_low = abs(low) > abs(high)
        edge = low if far_is_low else high
        scale = max((high - low) / last, LEAST_STEP)
        scale = scale if far_is_low else -scale
        code = (edge / scale + f32(1.5 * 2**23)) - f32(1.5 * 2**23)
        bent = edge / code if code != f32(0.0) else scale
        offset = edge if code != f32(0.0) else f32(0.0)
        scale_B[b], offset_B[b] = bf16_round(bits_of(bent)), bf16_round(bits_of(offset))


@jit
def encode_affine(x_Bn, steps_B, offsets_B, last, codes_Bn):
    for b in range(x_Bn.shape[0]):
        step, offset = steps_B[b], offsets_B[b]
        for j in range(x_Bn.shape[1]):
            code = min(max((float_of(x_Bn[b, j]) - offset) / step, f32(0.0)), last)
            codes_Bn[b, j] = bits_of(code + f32(2.0**23)) & u32(0xFF)


@jit
def add_misses_affine(x_Bn, codes_Bn, steps_B, offsets_B, sums_Bn):
    for b in range(x_Bn.shape[0]):
        step, offset = steps_B[b], offsets_B[b]
        for j in range(x_Bn.shape[1]):
            d = f32(codes_Bn[b, j]) * step + offset - float_of(x_Bn[b, j])
            sums_Bn[b, j] += d * d


# Measured error -----------------------------------------------------------------------------------------------------


@jit
def add_misses_e2m1(x_Bn, steps_B, sums_Bn):
    for b in range(x_Bn.shape[0]):
        step = steps_B[b]
        for j in range(x_Bn.shape[1]):
            d = e2m1_miss(x_Bn[b, j], step)
            sums_Bn[b, j] += d * d


@jit
def add_misses_integer(x_Bn, steps_B, grown_B, low, high, sums_Bn):
    for b in range(x_Bn.shape[0]):
        step, grown = steps_B[b], grown_B[b]
        for j in range(x_Bn.shape[1]):
            w = float_of(x_Bn[b, j])
            d = integer_nearest(w / step, low, high) * grown - w
            sums_Bn[b, j] += d * d


@jit
def add_misses_e4m3(x_Bn, codes_Bn, steps_B, sums_Bn):
    for b in range(x_Bn.shape[0]):
        step = steps_B[b]
        for j in range(x_Bn.shape[1]):
            d = float_of(e4m3_value(u32(codes_Bn[b, j]))) * step - float_of(x_Bn[b, j])
            sums_Bn[b, j] += d * d


@jit
def add_misses_bf16(x_Bn, sums_Bn):
    for b in range(x_Bn.shape[0]):
        for j in range(x_Bn.shape[1]):
            d = float_of(u32(bf16_round(x_Bn[b, j]) << u32(16))) - float_of(x_Bn[b, j])
            sums_Bn[b, j] += d * d


@jit
def add_misses(element, x_Bn, codes_Bn, steps_B, grown_B, low, high, sums_Bn):
    """(value − w)² of one row, added to the sums of its columns."""
    if element == E2M1:
        add_misses_e2m1(x_Bn, steps_B, sums_Bn)
    elif element == INTEGER:
        add_misses_integer(x_Bn, steps_B, grown_B, low, high, sums_Bn)
    elif element == E4M3:
        add_misses_e4m3(x_Bn, codes_Bn, steps_B, sums_Bn)
    else:
        add_misses_bf16(x_Bn, sums_Bn)


@jit
def add_squares(x_Bn, sums_Bn):
    """w² of one row, added to the sums of its columns."""
    for b in range(x_Bn.shape[0]):
        for j in range(x_Bn.shape[1]):
            w = float_of(x_Bn[b, j])
            sums_Bn[b, j] += w * w


@jit
def flush(sums_Bn):
    total = 0.0
    for b in range(sums_Bn.shape[0]):
        for j in range(sums_Bn.shape[1]):
            total += sums_Bn[b, j]
            sums_Bn[b, j] = f32(0.0)
    return total


# The whole matrix ---------------------------------------------------------------------------------------------------


@entry
def amax_rows(source, stored_OBn, source_steps, source_rows, x_K, x_source_Bn):
    """Magnitude bits of the largest weight of a matrix."""
    top = u32(0)
    for o in range(stored_OBn.shape[0]):
        load(source, stored_OBn[o], source_steps[o // source_rows], x_source_Bn)
        top = max(top, largest(x_K))
    return top


@entry
def requantize_rows(
    source, stored_OBn, source_steps, source_rows,
    element, rule, bits, block_rows, shared, changes, measure,
    x_K, x_source_Bn, x_Bn, x_nB, bits_3K, codes, codes_Bn, spare_codes, bits_3B, floats_3B, sums_2Bn,
    packed, scales, squares,
):  # fmt: skip
    """All rows. Returns the magnitude bits of the largest weight; beyond `LARGEST_BITS` the rest is left out.

    stored_OBn uint8, by the source's blocks; source_steps F32 [⌈O / source_rows⌉, B]; changes F32: the scales to try;
    x_K, x_source_Bn, x_Bn uint32: one buffer, zero beyond the columns, in the source's and in the target's blocks;
    packed uint8 [O, bytes]; scales uint32 [OB, B]: stored bits; squares F64 [2]: Σ (value − w)² and Σ w².
    """
    rows = stored_OBn.shape[0]
    low, high, half_range = f32(-(1 << (bits - 1))), f32((1 << (bits - 1)) - 1), f32((1 << bits) - 1) / f32(2.0)
    amax_B, steps_B, top = bits_3B[0], floats_3B[0], u32(0)
    for start in range(0, rows, block_rows):
        stop, stored_B = min(start + block_rows, rows), scales[start // block_rows]
        if block_rows == 1:
            load(source, stored_OBn[start], source_steps[start // source_rows], x_source_Bn)
            maxima_K = x_K
        else:
            maxima_K = bits_3K[2]
            clear(maxima_K)
            for o in range(start, stop):
                load(source, stored_OBn[o], source_steps[o // source_rows], x_source_Bn)
                raise_maxima(x_K, maxima_K)
        block_maxima(maxima_K, x_Bn.shape[1], bits_3K[0], bits_3K[1], amax_B)
        top = max(top, largest(amax_B))
        if top > LARGEST_BITS:
            return top
        fit(rule, amax_B, shared, half_range, stored_B)
        if changes.shape[0] > 0:
            transpose(x_Bn, x_nB)
            search(
                element, rule, changes, shared, low, high, x_nB,
                bits_3B[1], bits_3B[2], steps_B, floats_3B[1], floats_3B[2], stored_B,
            )  # fmt: skip
        fill_steps(rule, stored_B, shared, steps_B)  # codes are chosen under these
        grown_B = steps_B
        if changes.shape[0] > 0 and rule == BF16_SCALE:
            unshrunk(x_nB, low, high, steps_B, floats_3B[1], floats_3B[2], stored_B)
            grown_B = floats_3B[1]
            fill_steps(rule, stored_B, shared, grown_B)
        for o in range(start, stop):
            if block_rows > 1:
                load(source, stored_OBn[o], source_steps[o // source_rows], x_source_Bn)
            if element == BF16:
                pack_bf16(x_K, packed[o])
            else:
                encode(element, x_Bn, steps_B, low, high, codes_Bn)
                clear(spare_codes)
                pack(bits, codes, packed[o])
            if measure:
                add_misses(element, x_Bn, codes_Bn, steps_B, grown_B, low, high, sums_2Bn[0])
                add_squares(x_Bn, sums_2Bn[1])
                if o % FLUSH_ROWS == FLUSH_ROWS - 1 or o == rows - 1:
                    squares[0] += flush(sums_2Bn[0])
                    squares[1] += flush(sums_2Bn[1])
    return top


@entry
def search_rows(
    weights_OI, element, rule, bits, shared, changes, x_K, x_Bn, x_nB, bits_3K, bits_3B, floats_3B, scales
):  # fmt: skip
    """Scales alone, of F32 weights, for blocks within a row; arrays and what is returned as in `requantize_rows`."""
    low, high, half_range = f32(-(1 << (bits - 1))), f32((1 << (bits - 1)) - 1), f32((1 << bits) - 1) / f32(2.0)
    amax_B, top = bits_3B[0], u32(0)
    for o in range(weights_OI.shape[0]):
        row = weights_OI[o].view(np.uint32)
        for j in range(row.shape[0]):
            x_K[j] = row[j]
        block_maxima(x_K, x_Bn.shape[1], bits_3K[0], bits_3K[1], amax_B)
        top = max(top, largest(amax_B))
        if top > LARGEST_BITS:
            return top
        fit(rule, amax_B, shared, half_range, scales[o])
        transpose(x_Bn, x_nB)
        search(
            element, rule, changes, shared, low, high, x_nB,
            bits_3B[1], bits_3B[2], floats_3B[0], floats_3B[1], floats_3B[2], scales[o],
        )  # fmt: skip
    return top


@entry
def affine_rows(
    source, stored_OBn, source_steps, source_rows, bits, measure,
    x_K, x_source_Bn, x_Bn, x_nB, codes, codes_Bn, spare_codes, floats_4B, sums_2Bn, spare_sums, packed, scales, offsets, squares,
):  # fmt: skip
    """All rows, in an affine grid; arrays and what is returned as in `requantize_rows`; offsets as scales."""
    rows, last, top = stored_OBn.shape[0], f32((1 << bits) - 1), u32(0)
    steps_B, offsets_B = floats_4B[0], floats_4B[1]
    for o in range(rows):
        load(source, stored_OBn[o], source_steps[o // source_rows], x_source_Bn)
        top = max(top, largest(x_K))
        if top > LARGEST_BITS:
            return top
        transpose(x_Bn, x_nB)
        affine_fit(x_nB, last, floats_4B[2], floats_4B[3], scales[o], offsets[o])
        fill_steps(BF16_SCALE, scales[o], f32(1.0), steps_B)
        fill_steps(BF16_SCALE, offsets[o], f32(1.0), offsets_B)
        encode_affine(x_Bn, steps_B, offsets_B, last, codes_Bn)
        clear(spare_codes)
        pack(bits, codes, packed[o])
        if measure:
            add_misses_affine(x_Bn, codes_Bn, steps_B, offsets_B, sums_2Bn[0])
            clear(spare_sums)  # beyond the columns, where code 0 is no zero
            add_squares(x_Bn, sums_2Bn[1])
            if o % FLUSH_ROWS == FLUSH_ROWS - 1 or o == rows - 1:
                squares[0] += flush(sums_2Bn[0])
                squares[1] += flush(sums_2Bn[1])
    return top
