"""What every number format promises. A new file in formats/ is tested here without a change.

Slow truths stand beside: the nearest grid point is looked for among all of them, in F64, and error
sums are added up one by one. Other people's code is compared with in test_formats_truth.py.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import PlanError
from moesaic.formats import FORMATS, NumberFormat, Scales
from moesaic.formats.base import LARGEST, block_sums, no_candidates

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
SEARCHED = {name: f for name, f in FORMATS.items() if f.candidates is not no_candidates}
every_search = pytest.mark.parametrize("fmt", SEARCHED.values(), ids=SEARCHED)
quick = settings(max_examples=15, deadline=None, derandomize=True)


def gaussian(o: int, i: int, seed: int = 0) -> Tensor:
    """Like real weights: rows of different size, in BF16, with a few outliers."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=g) * torch.exp(0.3 * torch.randn(o, 1, generator=g)) * 0.02
    outliers = torch.rand(o, i, generator=g) < 0.0005
    return torch.where(outliers, 4 * w, w).bfloat16().float()


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[O, I] of any shape, ragged blocks included, out of a few drawn magnitudes, zeros of both signs among them."""
    pool = draw(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 200))
    values = torch.tensor([0.0, *pool])
    w = values[torch.randint(len(values), shape, generator=g)] * torch.rand(shape, generator=g).clamp(min=0.5)
    return torch.where(torch.rand(shape, generator=g) < 0.5, w, -w)


def grid_of(fmt: NumberFormat, *steps: Tensor) -> tuple[Tensor, Tensor]:
    """Every code whose value is finite, and the values, [codes, ...] for steps [...]."""
    codes = torch.arange(2**fmt.element_bits)
    codes = codes.to(torch.int16 if fmt.element_bits == 16 else torch.uint8)
    codes = codes[fmt.value(codes, *(torch.ones(()) for _ in steps)).isfinite()]
    return codes, fmt.value(codes.reshape(-1, *[1] * (steps[0].ndim if steps else 0)), *steps)


@every_format
@given(w=matrices())
@quick
def test_grid_points_round_to_themselves(fmt, w):
    scales = fmt.scales(w)
    once = fmt.decode(fmt.encode(w, scales), scales)
    assert fmt.decode(fmt.encode(once, scales), scales).equal(once)


@every_format
@given(w=matrices())
@quick
def test_rounding_is_nearest_among_all_grid_points(fmt, w):
    if fmt.element_bits == 16:
        w = w[:, :3]
    scales = fmt.scales(w)
    steps = tuple(s.double() for s in fmt.spread(fmt.steps(scales), w.shape))
    chosen = fmt.decode(fmt.encode(w, scales), scales)
    _, grid = grid_of(fmt, *(s.float() for s in steps))
    grid = grid.reshape(-1, *[1] * (w.ndim + 1 - grid.ndim), *grid.shape[1:])
    least = (grid.double() - w).abs().amin(0)
    # F32's own rounding of w / step, and of an offset, may turn a tie
    slack = 1e-6 * (w.abs() + sum(s.abs() for s in steps) + chosen.abs())
    assert ((chosen.double() - w).abs() <= least + slack).all()


@every_format
def test_ties_go_to_the_even_code(fmt):
    steps = (torch.ones(()), torch.zeros(()))[: len(fmt.steps(fmt.scales(gaussian(1, 32))))]
    values = grid_of(fmt, *steps)[1].unique()  # one zero of the two
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    chosen = fmt.round(middles, *steps)
    assert (chosen & 1 == 0).all()
    assert len(middles) > 0.98 * 2**fmt.element_bits - 3  # all codes but NaNs, infinities and the second zero
    below, above = middles.nextafter(values[:-1]), middles.nextafter(values[1:])
    assert fmt.value(fmt.round(below, *steps), *steps).equal(values[:-1])
    assert fmt.value(fmt.round(above, *steps), *steps).equal(values[1:])


@every_format
def test_rounding_is_element_by_element(fmt):
    w = gaussian(5, 256)
    scales = fmt.scales(w)
    steps = fmt.spread(fmt.steps(scales), w.shape)
    codes = fmt.encode(w, scales)
    for k in (0, 31, 255):
        assert fmt.round(w[:, k], *(s[:, k] for s in steps)).equal(codes[:, k])


@every_format
def test_a_block_is_its_own_affair(fmt):
    w = gaussian(130, 300)
    before = fmt.scales(w)
    w[0, 0] = 1.0
    after = fmt.scales(w, before.shared)
    rows, columns = (n or 10**9 for n in fmt.block)
    outside = torch.ones(w.shape, dtype=torch.bool)
    outside[:rows, :columns] = False
    assert fmt.encode(w, after)[outside].equal(fmt.encode(w, before)[outside])
    if before.blocks is not None:
        assert before.blocks.shape == fmt.grid(w.shape)
        changed = before.blocks.float() != after.blocks.float()
        assert changed.sum() == 1 and changed[0, 0]


@every_format
@given(w=matrices())
@quick
def test_sizes_add_up(fmt, w):
    scales, codes = fmt.scales(w), fmt.encode(w, fmt.scales(w))
    assert codes.shape == w.shape and codes.dtype == (torch.int16 if fmt.element_bits == 16 else torch.uint8)
    assert int(codes.view(torch.uint8 if fmt.element_bits < 16 else torch.int16).max()) < 2**fmt.element_bits
    bits = codes.numel() * fmt.element_bits
    bits += 8 * sum(t.nbytes for t in (scales.blocks, scales.offsets, scales.shared) if t is not None)
    assert fmt.stored_bytes(w.shape) == -(-bits // 8)


@every_format
def test_bits_per_weight_is_what_a_large_matrix_costs(fmt):
    shape = (3072, 6144)
    assert 8 * fmt.stored_bytes(shape) / (3072 * 6144) == pytest.approx(fmt.bits_per_weight, abs=0.02)


@every_format
def test_zeros_stay_zero_and_keep_their_sign_where_the_grid_has_two(fmt):
    w = torch.zeros(4, 256)
    w[:, ::3] = -0.0
    scales = fmt.scales(w)
    back = fmt.decode(fmt.encode(w, scales), scales)
    assert not back.any()
    steps = tuple(torch.ones(()) for _ in fmt.steps(scales))
    if fmt.value(fmt.round(torch.tensor(-0.0), *steps[:1], *(0 * s for s in steps[1:])), *steps).signbit():
        assert back.signbit().equal(w.signbit())
    for step in fmt.steps(scales)[:1]:
        assert (step != 0).all() and step.isfinite().all()


@every_format
@pytest.mark.parametrize("magnitude", [1e-45, 9.2e-41, 1.2e-38, 1e-36, 1e36, 2.0**126, LARGEST])
def test_the_ends_of_the_range_stay_finite(fmt, magnitude):
    w = magnitude * torch.tensor([[1.0, -1.0, 0.5, 0.25, 0.0, -0.9] * 40])
    scales = fmt.search(w, fmt.scales(w))
    back = fmt.decode(fmt.encode(w, scales), scales)
    assert back.isfinite().all()
    assert (back.abs() <= 1.5 * w.abs().max() + 1e-7).all()


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_what_is_not_finite_is_refused_in_a_sentence(fmt, bad):
    w = gaussian(2, 128)
    w[1, 77] = bad
    with pytest.raises(PlanError, match=rf"matrix \[2, 128\] holds infinities.*{fmt.name}.*check that"):
        fmt.scales(w)


@every_search
@given(w=matrices(), weighted=st.booleans(), seed=st.integers(0, 99))
@quick
def test_search_never_raises_the_weighted_error_and_takes_the_best(fmt, w, weighted, seed):
    moments = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(seed)) if weighted else None
    if weighted:
        moments[moments < 0.2] = 0.0
    scales = fmt.scales(w)
    found = fmt.search(w, scales, moments)

    def error(s: Scales) -> Tensor:
        """One by one in F64, from the decoded weights."""
        d = (fmt.decode(fmt.encode(w, s), s).double() - w) ** 2
        return fmt.blocks(d if moments is None else d * moments).sum(-1)

    tried = torch.stack([error(s) for s in (scales, *fmt.candidates(scales))])
    assert (error(found) <= tried.amin(0) * (1 + 1e-5) + 1e-30).all()
    assert found.blocks.dtype == scales.blocks.dtype and found.shared is scales.shared


@pytest.mark.parametrize(
    ("name", "least", "most"), [("nvfp4", 0.72, 0.82), ("mxfp4", 0.92, 0.96), ("int4_g128", 0.8, 0.92)]
)
def test_search_gains_what_the_field_reports(name, least, most):
    fmt, w = FORMATS[name], gaussian(64, 2048)
    plain = fmt.scales(w)

    def error(s: Scales) -> float:
        return float(((fmt.decode(fmt.encode(w, s), s) - w) ** 2).sum())

    assert least < error(fmt.search(w, plain)) / error(plain) < most


def test_ten_neighbours_of_nvfp4_are_as_good_as_a_sweep_of_forty_one():
    fmt, w = FORMATS["nvfp4"], gaussian(64, 2048)
    plain = fmt.scales(w)
    blocks = fmt.blocks(w)
    ten = fmt.block_errors(blocks, fmt.search(w, plain))
    sweep = torch.stack(
        [
            fmt.block_errors(blocks, Scales((plain.blocks.float() * r).to(plain.blocks.dtype), plain.shared))
            for r in torch.linspace(0.8, 1.8, 41)
        ]
    ).amin(0)
    assert ten.sum() <= sweep.sum()


def test_floor_is_best_for_mxfp4_when_the_source_is_mxfp8_clipped_at_448():
    mxfp8, mxfp4, w = FORMATS["mxfp8"], FORMATS["mxfp4"], gaussian(64, 2048)
    exponent = torch.frexp(mxfp8.blocks(w).abs().amax(-1)).exponent - 1
    floor = Scales((exponent - 8 + 127).to(torch.uint8))
    source = mxfp8.decode(mxfp8.encode(w, floor), floor)
    plain = mxfp4.scales(source)
    assert mxfp4.search(source, plain).blocks.equal(plain.blocks)
    # the same check on weights never clipped does fail, and so can
    assert not mxfp4.search(w, mxfp4.scales(w)).blocks.equal(mxfp4.scales(w).blocks)


def test_an_mxfp8_source_keeps_its_values_whichever_rule_wrote_it():
    fmt, w = FORMATS["mxfp8"], gaussian(64, 2048)
    exponent = torch.frexp(fmt.blocks(w).abs().amax(-1)).exponent - 1
    for scales in (Scales((exponent - 8 + 127).to(torch.uint8)), fmt.scales(w)):
        source = fmt.decode(fmt.encode(w, scales), scales)
        again = fmt.scales(source)
        assert fmt.decode(fmt.encode(source, again), again).equal(source)


def test_worked_by_hand():
    mxfp4, nvfp4, int4 = FORMATS["mxfp4"], FORMATS["nvfp4"], FORMATS["int4_g32"]
    w = torch.zeros(1, 32)
    w[0, :8] = torch.tensor([7.0, -5.0, 2.5, 0.25, -0.75, -0.2, 3.5, 1.75])
    scales = mxfp4.scales(w)  # ⌊log2 7⌋ − 2 = 0, so byte 127; 7 is clipped to 6, 5 is a tie between 4 and 6
    assert scales.blocks.tolist() == [[127]]
    assert mxfp4.encode(w, scales)[0, :8].tolist() == [7, 8 | 6, 4, 0, 8 | 2, 8 | 0, 6, 4]
    assert mxfp4.decode(mxfp4.encode(w, scales), scales)[0, :8].tolist() == [6, -4, 2, 0, -1, -0.0, 4, 2]
    scales = nvfp4.scales(w, nvfp4.share(torch.tensor(8.0)))  # 2688 / 8; 7 / 6 · 336 = 392, nearer 384 than 416
    assert scales.shared.tolist() == [336.0] and scales.blocks.float().tolist() == [[384.0, 2.0**-9]]
    assert nvfp4.decode(nvfp4.encode(w, scales), scales)[0, 0] == torch.tensor(6.0) * (torch.tensor(384.0) / 336)
    scales = int4.scales(w)  # 7 / 7.5 = 0.93333, in BF16 0.93359375
    assert scales.blocks.float().tolist() == [[0.93359375]]
    assert int4.encode(w, scales)[0, :8].tolist() == [15, 8 - 5, 8 + 3, 8, 8 - 1, 8, 8 + 4, 8 + 2]


@given(st.integers(1, 300), st.integers(0, 99))
@quick
def test_block_sums_add_in_the_order_they_say(n, seed):
    terms = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    total = np.float32(0)
    for t in terms:
        total = total + t
    assert block_sums(torch.from_numpy(terms)).item() == total
