"""Kernels equal the reference path (decode, fit, search, round, pack) to the bit, from every source to every target."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from requantized import assert_equal_to_reference, awkward, packing_of, real_like, same_bits, stored_as
from torch import Tensor

from moesaic.checkpoint.containers.base import pack_bits
from moesaic.errors import PlanError
from moesaic.formats import FORMATS
from moesaic.formats.base import LARGEST, no_candidates
from moesaic.kernels import cpu, loops
from moesaic.kernels.cpu import SOURCES, TARGETS, amax, prepare, requantize
from moesaic.kernels.decode import decode, decodes

every_source = pytest.mark.parametrize("source", SOURCES)
every_target = pytest.mark.parametrize("target", TARGETS)


MATRICES = {
    "real_like": real_like(130, 512),
    "awkward": awkward(130, 512),
    "ragged": real_like(131, 424, seed=2),
    "narrow": awkward(5, 40, seed=3),
}
every_matrix = pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES)


@every_matrix
@every_target
@every_source
def test_equal_to_the_reference_to_the_bit(source, target, w):
    fmt = FORMATS[target]
    assert_equal_to_reference(cpu, source, fmt, w)
    if fmt.candidates is not no_candidates:
        assert_equal_to_reference(cpu, source, fmt, w, True)


@every_matrix
@every_target
def test_scales_alone_are_those_of_the_reference(target, w):
    """Of F32 weights, which a rounding has: what GPTQ wants is no BF16."""
    fmt = FORMATS[target]
    assert cpu.searches(fmt) == (fmt.candidates is not no_candidates)
    if cpu.searches(fmt):
        w = w.clamp(-LARGEST, LARGEST)
        ours, theirs = cpu.search(w, fmt), fmt.search(w, fmt.scales(w))
        assert same_bits(ours.blocks, theirs.blocks) and same_bits(ours.shared, theirs.shared)
        with pytest.raises(PlanError, match="infinities, NaNs"):
            cpu.search(torch.where(torch.arange(w.shape[1]) == 7, torch.nan, w), fmt)


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
    assert_equal_to_reference(cpu, source, FORMATS[target], w, search)


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
    assert requantize(source, weight, weight_scales, FORMATS["mxfp4"]).amax == decoded.abs().max()
    fmt = FORMATS["nvfp4"]
    assert requantize(source, weight, weight_scales, fmt).scales.shared.equal(fmt.scales(decoded).shared)


@every_target
@every_source
def test_measured_error_is_that_of_the_decoded_weights(source, target):
    fmt = FORMATS[target]
    weight, weight_scales, decoded = stored_as(source, MATRICES["ragged"])
    done = requantize(source, weight, weight_scales, fmt, search=True, measure=True)
    packing = packing_of(fmt)
    back = packing.decode(packing.write(done.stream_OS, done.scales, decoded.shape), decoded.shape)
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


def test_one_compilation_serves_all():
    """So what `prepare` compiles is all that an export needs; the search of scales is compiled when a rounding first asks."""
    prepare(TARGETS, quiet=True)
    for source in SOURCES:
        weight, weight_scales, _ = stored_as(source, MATRICES["ragged"])
        amax(source, weight, weight_scales)
        for target in TARGETS:
            requantize(source, weight, weight_scales, FORMATS[target], search=True, measure=True)
        for target in filter(cpu.searches, map(FORMATS.get, TARGETS)):
            cpu.search(torch.zeros(2, 64), target)
    entries = (loops.requantize_rows, loops.affine_rows, loops.amax_rows, loops.search_rows)
    assert [len(f.signatures) for f in entries] == [1, 1, 1, 1]


def test_what_has_no_kernel_is_refused():
    w = torch.zeros(1, 64).bfloat16()
    with pytest.raises(PlanError, match="no kernel goes from bf16 to unheard_of"):
        requantize("bf16", w, None, replace(FORMATS["nvfp4"], name="unheard_of"))
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
