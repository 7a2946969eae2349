"""Kernels equal the reference path (decode, fit, search, round, pack) to the bit, from every source to every target."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.containers import CONTAINERS
from moesaic.containers.base import pack_bits
from moesaic.errors import PlanError
from moesaic.formats import FORMATS, NumberFormat, Scales
from moesaic.formats.base import LARGEST, no_candidates
from moesaic.kernels import loops
from moesaic.kernels.cpu import SOURCES, TARGETS, amax, requantize
from moesaic.kernels.decode import decode, decodes

every_source = pytest.mark.parametrize("source", SOURCES)
every_target = pytest.mark.parametrize("target", TARGETS)


def real_like(o: int, i: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=g) * torch.exp(0.3 * torch.randn(o, 1, generator=g)) * 0.02
    return torch.where(torch.rand(o, i, generator=g) < 0.0005, 4 * w, w)


def awkward(o: int, i: int, seed: int = 1) -> Tensor:
    """Ties under power-of-two steps, zeros of both signs, empty blocks, subnormals, outliers, wildly different rows."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-28, 29, (o, i), generator=g) / 4.0
    w = w * 2.0 ** torch.randint(-60, 60, (o, 1), generator=g)
    w[:, i // 4 : i // 2] *= 0.0  # keeps signs
    w[::2, -7] *= 1000.0
    w[1, : i // 4] = 1e-40 * torch.randn(i // 4, generator=g)
    w[2] = 1e-36 * torch.randn(i, generator=g)
    w[3] = LARGEST * torch.rand(i, generator=g)
    return w


MATRICES = {
    "real_like": real_like(130, 512),
    "awkward": awkward(130, 512),
    "ragged": real_like(131, 424, seed=2),
    "narrow": awkward(5, 40, seed=3),
}
every_matrix = pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES)


def stored_as(source: str, w: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """`w` as a checkpoint would hold it, and the F32 weights that it then stands for."""
    if source == "bf16":
        stored = w.clamp(-LARGEST, LARGEST).bfloat16()
        return stored, None, stored.float()
    fmt = FORMATS[source]
    w = w.clamp(-LARGEST / 2, LARGEST / 2)
    scales = fmt.scales(w)
    codes = fmt.encode(w, scales)
    return codes.view(torch.float8_e4m3fn), scales.blocks, fmt.decode(codes, scales)


def same_bits(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and as_bytes(ours) == as_bytes(theirs)


def as_bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def reference(
    fmt: NumberFormat, w: Tensor, shared: Tensor | None, search: bool, moments: Tensor | None
) -> tuple[Tensor, Scales]:
    scales = fmt.scales(w, shared)
    scales = fmt.search(w, scales, moments) if search else scales
    codes = fmt.encode(w, scales)
    return CONTAINERS["compressed_tensors"].packing(fmt.name).pack(codes, scales)["codes"], scales


def assert_equal_to_reference(source: str, fmt: NumberFormat, w: Tensor, search: bool, moments: Tensor | None) -> None:
    weight, weight_scales, decoded = stored_as(source, w)
    shared = None if fmt.share is None else fmt.share(1.25 * decoded.abs().max())
    done = requantize(source, weight, weight_scales, fmt, shared=shared, search=search, second_moments_I=moments)
    packed, scales = reference(fmt, decoded, shared, search, moments)
    assert same_bits(done.scales.blocks, scales.blocks) and done.scales.shared is shared
    assert same_bits(done.packed, packed)


@every_matrix
@every_target
@every_source
def test_equal_to_the_reference_to_the_bit(source, target, w):
    fmt = FORMATS[target]
    assert_equal_to_reference(source, fmt, w, False, None)
    if fmt.candidates is not no_candidates:
        moments = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(0)) ** 4
        assert_equal_to_reference(source, fmt, w, True, None)
        assert_equal_to_reference(source, fmt, w, True, moments)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[O, I] of any shape out of a few drawn magnitudes over all of BF16's range, so that blocks hold ties and zeros."""
    pool = draw(st.lists(st.floats(0.0, 2.0**122, width=32), min_size=1, max_size=5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    w = torch.tensor([0.0, 1.0, *pool])[torch.randint(len(pool) + 2, shape, generator=g)]
    w = w * torch.tensor([0.25, 0.5, 0.75, 1.0])[torch.randint(4, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.5, w, -w)


@given(source=st.sampled_from([*SOURCES]), target=st.sampled_from([*TARGETS]), w=matrices(), search=st.booleans())
@settings(max_examples=250, deadline=None, derandomize=True)
def test_equal_to_the_reference_whatever_the_matrix(source, target, w, search):
    assert_equal_to_reference(source, FORMATS[target], w, search, None)


def test_scales_next_to_ties_go_the_same_way():
    """Block maxima within a rounding error of the middle of two E4M3 numbers: another order of operations would show."""
    fmt, g = FORMATS["nvfp4"], torch.Generator().manual_seed(0)
    other_way = 0
    for _ in range(200):
        w = torch.rand(1, 16, generator=g).bfloat16()
        code = int(torch.randint(8, 125, (), generator=g))
        middle = torch.tensor([code, code + 1], dtype=torch.uint8).view(torch.float8_e4m3fn).float().mean()
        shared = (middle * 6 / w.max().float()).reshape(1)
        scales = fmt.scales(w.float(), shared)
        assert same_bits(requantize("bf16", w, None, fmt, shared=shared).scales.blocks, scales.blocks)
        swapped = (w.max().float() * shared / 6).to(torch.float8_e4m3fn)
        other_way += int(swapped.float() != scales.blocks.float())
    assert other_way > 10, "or the test could not tell"


@pytest.mark.parametrize("target", ["mxfp4", "nvfp4", "int2_g32", "int3_g64", "int4_g128", "int8_g32"])
def test_bytes_are_what_compressed_tensors_packs(target):
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    integers = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    fmt, w = FORMATS[target], MATRICES["real_like"].bfloat16()
    done = requantize("bf16", w, None, fmt)
    codes = fmt.encode(w.float(), done.scales)
    if fmt.name.startswith("int"):
        theirs = integers.pack_to_int32((codes.int() - 2 ** (fmt.element_bits - 1)).to(torch.int8), fmt.element_bits)
    else:
        theirs = nvfp4.pack_fp4_to_uint8(fmt.value(codes, torch.ones(())))
    assert same_bits(done.packed, theirs)


@every_source
def test_amax_and_the_shared_scale_it_gives(source):
    weight, weight_scales, decoded = stored_as(source, MATRICES["awkward"])
    assert amax(source, weight, weight_scales).equal(decoded.abs().max())
    fmt = FORMATS["nvfp4"]
    assert requantize(source, weight, weight_scales, fmt).scales.shared.equal(fmt.scales(decoded).shared)


@every_target
@every_source
def test_measured_error_is_that_of_the_decoded_weights(source, target):
    fmt = FORMATS[target]
    weight, weight_scales, decoded = stored_as(source, MATRICES["ragged"])
    done = requantize(source, weight, weight_scales, fmt, search=True, measure=True)
    back = fmt.decode(fmt.encode(decoded, done.scales), done.scales)
    assert done.squared_error == pytest.approx(float(((back - decoded).double() ** 2).sum()), rel=1e-5, abs=1e-12)
    assert done.squared_weight == pytest.approx(float((decoded.double() ** 2).sum()), rel=1e-5)
    assert requantize(source, weight, weight_scales, fmt).squared_error is None


@every_source
@every_target
def test_what_is_not_finite_is_refused(source, target):
    weight, weight_scales, _ = stored_as(source, MATRICES["real_like"])
    if source == "bf16":
        infinite, nan = weight.clone(), weight.clone()
        infinite[129, 511], nan[0, 0] = torch.inf, torch.nan
        faults = [(infinite, None), (nan, None)]
    else:
        broken = weight.view(torch.uint8).clone()
        broken[77, 300] = 0x7F
        scale = weight_scales.clone()
        scale[0, 1] = 255 if source == "mxfp8" else float("inf")
        faults = [(broken.view(weight.dtype), weight_scales), (weight, scale)]
    for stored, scales in faults:
        with pytest.raises(PlanError, match="infinities, NaNs"):
            requantize(source, stored, scales, FORMATS[target])


def test_what_has_no_kernel_is_refused():
    w = torch.zeros(1, 64).bfloat16()
    with pytest.raises(PlanError, match="no kernel goes from bf16 to affine4_g64"):
        requantize("bf16", w, None, FORMATS["affine4_g64"])
    with pytest.raises(PlanError, match="no kernel goes from int4_g32 to mxfp4"):
        requantize("int4_g32", w, None, FORMATS["mxfp4"])


def test_threads_share_nothing_and_the_lock_is_released():
    matrices = [real_like(64, 1024, seed=k).bfloat16() for k in range(12)]
    alone = [requantize("bf16", w, None, FORMATS["nvfp4"], search=True) for w in matrices]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: requantize("bf16", w, None, FORMATS["nvfp4"], search=True), matrices))
    assert all(
        same_bits(a.packed, b.packed) and same_bits(a.scales.blocks, b.scales.blocks) for a, b in zip(alone, together)
    )
    assert loops.requantize_rows.targetoptions["nogil"] and loops.amax_rows.targetoptions["nogil"]


def test_no_copy_of_the_matrix_is_made():
    w, fmt = real_like(1024, 2048).bfloat16(), FORMATS["mxfp4"]
    requantize("bf16", w, None, fmt)
    tracemalloc.start()
    done = requantize("bf16", w, None, fmt, search=True, measure=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    scale_bits = 4 * done.scales.blocks.numel()
    assert done.packed.nbytes < peak < done.packed.nbytes + 2 * scale_bits + 40 * w.shape[1] + 100_000 < 0.5 * w.nbytes


def test_a_matrix_that_is_a_view_is_read_as_it_looks():
    w = real_like(64, 512).bfloat16()
    plain = requantize("bf16", w[:, 128:384].contiguous(), None, FORMATS["int4_g32"])
    assert same_bits(requantize("bf16", w[:, 128:384], None, FORMATS["int4_g32"]).packed, plain.packed)


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if decodes(format)])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 37), (130, 384), (257, 1100)])
def test_stored_codes_decode_to_the_formats_own_values(name: str, rows: int, columns: int) -> None:
    """Every code there is, under every sort of scale; the last matrix is cut over threads."""
    format = FORMATS[name]
    w_OI = real_like(rows, columns, seed=5)
    w_OI[: rows // 3] *= 0.0
    scales = format.scales(w_OI)
    codes_OI = torch.randint(0, 2**format.element_bits, (rows, columns), generator=torch.Generator().manual_seed(6)).to(
        torch.uint8
    )
    for word in (1, 4):
        found = decode(format, pack_bits(codes_OI, format.element_bits, word), scales, columns)
        assert torch.equal(found.view(torch.int32), format.decode(codes_OI, scales).view(torch.int32))
