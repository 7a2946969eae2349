"""Roundings against slow truths: GPTQ with an inverse in F64, descent one weight at a time, and hand-worked columns.

Every format meets every rounding. Leaves out rendering a model with them (test_sequential.py).
"""

import gc
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from moesaic.errors import InputError
from moesaic.formats import FORMATS, NumberFormat, Scales
from moesaic.rounding import ROUNDINGS, Batch, Block, Inputs, round_siblings, split
from moesaic.rounding import autoround as autoround_module
from moesaic.rounding.base import Rounded
from moesaic.rounding.gptq import COARSE, DAMP, DAMP_FEW, PRIOR, Ordered, blended, compensated, sweep
from moesaic.rounding.search import searched

SAMPLE = ("int2_g32", "int3_g64", "int4_g128", "nvfp4", "mxfp4", "affine4_g32", "fp8_block")
sample = pytest.mark.parametrize("format", [FORMATS[name] for name in SAMPLE], ids=SAMPLE)
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Correlated vectors whose columns differ in size."""
    mix = gaussian(width // 4, width, seed=99) * gaussian(1, width, seed=98).exp()
    return gaussian(rows, width // 4, seed=seed) @ mix + 0.5 * gaussian(rows, width, seed=seed + 1)


def batch_of(w_EOI: Tensor, xs: list[Tensor], pool_mI: Tensor | None = None) -> Batch:
    hessian_EII = torch.stack([x.T @ x / len(x) for x in xs])
    return Batch(
        w_EOI,
        torch.tensor([float(len(x)) for x in xs]),
        hessian_EII,
        None if pool_mI is None else (pool_mI.T @ pool_mI / len(pool_mI))[None],
    )


def output_error(w_OI: Tensor, value_OI: Tensor, x_nI: Tensor) -> float:
    return float(((w_OI - value_OI) @ x_nI.T).double().square().sum() / (w_OI @ x_nI.T).double().square().sum())


def textbook(w_OI: Tensor, hessian_II: Tensor, format: NumberFormat, scales: Scales) -> tuple[Tensor, Tensor]:
    """GPTQ as its paper has it: U of inv(H) = Uᵀ U, all later columns updated after each one, F64 throughout.

    Returns codes and the weights that each column had come to when its turn was.
    """
    order = hessian_II.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian_II.double()[order][:, order]), upper=True)
    steps = tuple(s[:, order] for s in format.spread(format.steps(scales), w_OI.shape))
    w, codes, wanted = w_OI.double()[:, order].clone(), [], []
    for k in range(w.shape[1]):
        here = tuple(s[:, k] for s in steps)
        wanted.append(w[:, k].clone())
        codes.append(format.round(w[:, k].float(), *here))
        miss = (w[:, k] - format.value(codes[k], *here).double()) / upper[k, k]
        w[:, k:] -= torch.outer(miss, upper[k, k:])
    back = order.argsort()
    return torch.stack(codes, 1)[:, back], torch.stack(wanted, 1)[:, back].float()


def damped_by_hand(hessian_II: Tensor, tokens: float) -> Tensor:
    width = len(hessian_II)
    return hessian_II + (DAMP + DAMP_FEW * width / tokens) * hessian_II.diagonal().median() * torch.eye(width)


@sample
def test_gptq_is_the_textbooks(format: NumberFormat) -> None:
    w, x = gaussian(128, 192), inputs(300, 192)
    rounded = ROUNDINGS["gptq"].round(batch_of(w[None], [x]), format)
    hessian = damped_by_hand(x.T @ x / len(x), len(x))
    scales = format.search(w, format.scales(w))
    codes, wanted = textbook(w, hessian, format, scales)
    if format.element_bits <= COARSE:
        again = format.search(wanted, format.scales(wanted))
        codes, _ = textbook(w, hessian, format, again)
        assert (rounded.scales[0].blocks != scales.blocks).any()
    off_O = (rounded.codes_EOI[0] != codes).any(1)
    assert off_O.float().mean() < 0.05  # F32 turns a tie in a row here and there, and with it what follows in that row
    value = rounded.values(format)[0]
    assert output_error(w, value, x) == pytest.approx(
        output_error(w, format.decode(codes, rounded.scales[0]), x), rel=0.01 if not off_O.any() else 0.1
    )


def test_two_columns_by_hand() -> None:
    """H = [[4, 2], [2, 2]]: column 0 has the larger input and goes first; column 1 takes over 2 / 2 of its error."""
    format = FORMATS["int4_g32"]
    w = torch.tensor([[2.3, 1.4], [-0.4, 0.2]])
    ordered = Ordered(
        torch.tensor([[1, 0]]), w.T[[1, 0]][None].contiguous(), torch.zeros(1, 2, 2), [0.0], [0.0], ("w",)
    )
    pull = torch.tensor([[[1.0, 2 / 2], [0.0, 1.0]]])  # L of [[2, 2], [2, 4]] is [[√2, 0], [√2, √2]]; turned
    error = torch.zeros(1, 2, 2)
    codes, wanted = sweep(ordered, pull, format, [Scales(torch.ones(2, 1, dtype=torch.bfloat16))], error)
    # Row 0: 2.3 -> 2, 0.3 over; 1.4 + 0.3 = 1.7 -> 2. Row 1: -0.4 -> 0, -0.4 over; 0.2 - 0.4 = -0.2 -> 0.
    assert ordered.restored(codes)[0].tolist() == [[8 + 2, 8 + 2], [8, 8]]
    assert ordered.restored(wanted)[0].flatten().tolist() == pytest.approx([2.3, 1.7, -0.4, -0.2])
    assert ordered.restored(error)[0].flatten().tolist() == pytest.approx([0.3, -0.6, -0.4, 0.2])


@pytest.mark.parametrize("way", ROUNDINGS)
def test_what_is_worked_with_is_let_go_at_once(way: str) -> None:
    """Not when Python next looks for cycles: a layer's experts would fill the memory until then."""
    w, x, format = gaussian(16, 64), inputs(80, 64), FORMATS["int2_g64"]
    batch = batch_of(w[None], [x])
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is Tensor for o in gc.get_objects())
        ROUNDINGS[way].round(batch, format)
        after = sum(type(o) is Tensor for o in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


@sample
@pytest.mark.parametrize("way", ["gptq", "descent"])
def test_where_inputs_are_white_every_weight_goes_to_its_nearest(format: NumberFormat, way: str) -> None:
    w = gaussian(2, 128, 128)
    white = ROUNDINGS[way].round(Batch(w, hessian_EII=torch.eye(128).expand(2, -1, -1)), format)
    nearest = ROUNDINGS["search"].round(Batch(w), format)
    assert white.codes_EOI.equal(nearest.codes_EOI)
    unknown = ROUNDINGS[way].round(Batch(w, torch.zeros(2), hessian_EII=torch.zeros(2, 128, 128)), format)
    assert unknown.codes_EOI.equal(nearest.codes_EOI)


def test_a_block_that_fell_short_reaches_as_far_as_its_weights_by_hand() -> None:
    """w · w / value · w of (2.4, 1, −.3, 0) and (2, 1, 0, 0): 6.85 / 5.8; of what has no code but 0, and of zeros: 1."""
    format, w = FORMATS["int4_g32"], torch.zeros(3, 32)
    w[0, :4], w[1, 5] = torch.tensor([2.4, 1.0, -0.3, 0.0]), 0.2
    scales = Scales(torch.tensor([[1.0], [1.0], [0.5]], dtype=torch.bfloat16))
    raised = format.unshrunk(w, format.encode(w, scales), scales).blocks
    assert raised.flatten().tolist() == [float(torch.tensor(6.85 / 5.8).bfloat16()), 1.0, 0.5]
    unchanged = Scales(torch.full((3, 1), 120, dtype=torch.uint8))
    assert FORMATS["mxfp4"].unshrunk(w, FORMATS["mxfp4"].encode(w, unchanged), unchanged) is unchanged


@pytest.mark.parametrize("name", ["int2_g32", "int3_g64", "int4_g128"])
def test_search_leaves_every_block_reaching_as_far_as_its_weights(name: str) -> None:
    """But for the rounding of scales to BF16; codes are the nearest under scales of least error, which fall short."""
    format, w = FORMATS[name], gaussian(16, 256)
    rounded = ROUNDINGS["search"].round(Batch(w[None]), format)
    scales = format.search(w, format.scales(w))
    assert rounded.codes_EOI[0].equal(format.encode(w, scales))

    def off(value: Tensor) -> Tensor:
        return format.blocks(value * w).sum(-1) / format.blocks(w * w).sum(-1) - 1

    assert off(rounded.values(format)[0]).abs().max() < 2**-8
    assert off(format.decode(rounded.codes_EOI[0], scales)).mean() < -0.004
    x = inputs(400, 256)
    hessian = damped_by_hand(x.T @ x / len(x), len(x))
    weighted, seen = ROUNDINGS["weighted"].round(batch_of(w[None], [x]), format).values(format)[0], w @ hessian
    assert ((weighted * seen).sum(1) / (w * seen).sum(1) - 1).abs().max() < 2**-8


@pytest.mark.parametrize("way", ["gptq", "descent"])
@pytest.mark.parametrize("name", ["int2_g32", "affine2_g64", "int3_g64"])
def test_few_bits_leave_every_rows_outputs_as_large_as_they_were(name: str, way: str) -> None:
    """Along those of the source, row by row but for the rounding of scales; without that they are not. A row of zeros stays."""
    format, w, x = FORMATS[name], gaussian(16, 192), inputs(200, 192)
    w[3] = 0
    batch = batch_of(w[None], [x])
    value = ROUNDINGS[way].round(batch, format).values(format)[0]
    ordered = Ordered.of(batch)
    codes, (scales,), _ = compensated(ordered, w[None], format)
    plain = format.decode(ordered.restored(codes)[0], scales)
    seen = w @ damped_by_hand(x.T @ x / len(x), len(x))
    off, before = (((v * seen).sum(1) / (w * seen).sum(1) - 1)[w.any(1)].abs() for v in (value, plain))
    assert value[3].eq(0).all() and off.max() < 0.004 < before.max() and off.mean() < 0.5 * before.mean()


@sample
def test_descent_is_one_weight_after_another_with_all_others_fixed(format: NumberFormat) -> None:
    """Each sweep: the exact minimum of error · H · errorᵀ over one column, then the next; written out in F64."""
    w, x = gaussian(16, 96), inputs(200, 96)
    batch = batch_of(w[None], [x])
    hessian = damped_by_hand(x.T @ x / len(x), len(x)).double()
    ordered, found = Ordered.of(batch), ROUNDINGS["descent"].round(batch, format)
    codes, (scales,), _ = compensated(ordered, w[None], format)
    value = format.decode(ordered.restored(codes)[0], scales).double()
    steps = format.spread(format.steps(scales), w.shape)
    before = float((((value - w) @ hessian) * (value - w)).sum())
    for _ in range(2):
        for k in hessian.diagonal().argsort(descending=True).tolist():
            others = (w - value) @ hessian[:, k] - (w - value)[:, k] * hessian[k, k]
            here = tuple(s[:, k] for s in steps)
            value[:, k] = format.value(format.round((w[:, k] + others / hessian[k, k]).float(), *here), *here).double()
    after = float((((value - w) @ hessian) * (value - w)).sum())
    ours = format.decode(found.codes_EOI[0], scales).double()
    assert after < 0.99 * before
    assert float((((ours - w) @ hessian) * (ours - w)).sum()) == pytest.approx(after, rel=0.01)
    assert (ours != value).float().mean() < 0.01


@every_format
@pytest.mark.parametrize("way", [name for name in ROUNDINGS if name not in ("rtn", "autoround")])
def test_on_unseen_inputs_never_worse_than_nearest(way: str, format: NumberFormat) -> None:
    w, x, unseen = gaussian(16, 256), inputs(512, 256), inputs(512, 256, seed=7)
    plain = ROUNDINGS["rtn"].round(Batch(w[None]), format).values(format)[0]
    value = ROUNDINGS[way].round(batch_of(w[None], [x]), format).values(format)[0]
    reached, limit = output_error(w, value, unseen), output_error(w, plain, unseen)
    assert reached <= 1.0001 * limit
    if way in ("gptq", "descent") and format.scale_bits:
        assert reached < 0.7 * limit


@pytest.mark.parametrize("way", ROUNDINGS)
@pytest.mark.parametrize("name", ["int2_g32", "nvfp4"])
def test_a_batch_is_its_matrices_one_by_one(way: str, name: str) -> None:
    format, w = FORMATS[name], gaussian(3, 24, 64)
    whole = batch_of(w, [inputs(40 * (e + 1), 64, seed=10 * e) for e in range(3)], inputs(500, 64, seed=50))
    together = ROUNDINGS[way].round(whole, format)
    for e in range(3):
        mine = slice(e, e + 1)
        one = Batch(w[mine], whole.tokens_E[mine], whole.hessian_EII[mine], whole.pool_EII)
        alone = ROUNDINGS[way].round(one, format)
        assert (alone.codes_EOI[0] != together.codes_EOI[e]).float().mean() < 0.01
        for fact, values in alone.facts.items():
            assert values[0] == pytest.approx(together.facts[fact][e])


def test_few_tokens_lean_on_the_pool_by_as_much_as_is_reported() -> None:
    w, pool = gaussian(3, 8, 64), inputs(2000, 64, seed=5)
    batch = batch_of(w, [inputs(n, 64) for n in (1, 96, 100_000)], pool)
    facts = ROUNDINGS["gptq"].round(batch, FORMATS["int4_g32"]).facts
    assert facts["pooled"] == pytest.approx([PRIOR * 64 / (n + PRIOR * 64) for n in (1, 96, 100_000)])
    assert facts["damping"][0] > facts["damping"][1] > facts["damping"][2] >= DAMP

    unseen = Batch(w, torch.zeros(3), hessian_EII=torch.zeros(3, 64, 64), pool_EII=batch.pool_EII)
    hessian, damping, pooled = blended(unseen, 0)
    assert pooled == 1.0
    assert torch.allclose(hessian, damped_by_hand(batch.pool_EII[0], PRIOR * 64))
    plenty = Batch(w, None, hessian_EII=batch.hessian_EII)
    hessian, damping, pooled = blended(plenty, 2)
    assert (damping, pooled) == (DAMP, 0.0)


def test_the_pool_helps_an_expert_that_saw_little() -> None:
    format, w = FORMATS["int4_g32"], gaussian(1, 32, 128)
    few, unseen, pool = inputs(24, 128), inputs(1000, 128, seed=3), inputs(4000, 128, seed=6)
    alone = ROUNDINGS["gptq"].round(batch_of(w, [few]), format).values(format)[0]
    leaning = ROUNDINGS["gptq"].round(batch_of(w, [few], pool), format).values(format)[0]
    assert output_error(w[0], leaning, unseen) < 0.7 * output_error(w[0], alone, unseen)


def test_a_hessian_that_cannot_be_factored_is_damped_more_and_says_so() -> None:
    w, x = gaussian(2, 16, 64), inputs(300, 64)
    good = x.T @ x / len(x)
    bad = good - 0.5 * good.diagonal().median() * torch.eye(64)
    rounded = ROUNDINGS["gptq"].round(Batch(w, hessian_EII=torch.stack([good, bad])), FORMATS["int4_g32"])
    assert rounded.facts["damping"][0] == DAMP
    assert rounded.facts["damping"][1] > 10 * DAMP
    assert output_error(w[1], rounded.values(FORMATS["int4_g32"])[1], x) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", [name for name, rounding in ROUNDINGS.items() if "hessian_EII" in rounding.needs])
def test_inputs_that_are_not_finite_are_refused_in_a_sentence(way: str, bad: float) -> None:
    x = inputs(50, 32)
    x[3, 3] = bad
    with pytest.raises(InputError, match=r"inputs of layers\.3\.o are NaN or infinite, .*; calibrate"):
        batch = replace(batch_of(gaussian(1, 8, 32), [x]), names=("layers.3.o",))
        ROUNDINGS[way].round(batch, FORMATS["int4_g32"])


def hostile(size: float) -> Tensor:
    """A Hessian whose diagonal is sound, and which no inputs can have."""
    bad = torch.eye(32)
    bad[3, 17] = bad[17, 3] = size
    return bad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("way", ["gptq", "descent"])
def test_a_hessian_that_no_damping_helps_is_refused_by_the_matrixs_name(way: str, bad: float) -> None:
    batch = Batch(
        gaussian(2, 8, 32), hessian_EII=torch.stack([torch.eye(32), hostile(bad)]), names=("a.gate", "b.gate")
    )
    with pytest.raises(InputError, match=r"inputs of b\.gate has no Cholesky factor, however much .*; calibrate"):
        ROUNDINGS[way].round(batch, FORMATS["int4_g32"])


@pytest.mark.parametrize("size", [2.0, 1e6, 1e30])
def test_a_hessian_that_damping_helps_is_damped_until_it_does(size: float) -> None:
    rounded = ROUNDINGS["gptq"].round(Batch(gaussian(1, 8, 32), hessian_EII=hostile(size)[None]), FORMATS["int4_g32"])
    (damping,) = rounded.facts["damping"]
    assert size - 1.0 < damping < 2.1 * size and rounded.values(FORMATS["int4_g32"]).isfinite().all()


def test_an_input_that_never_came_is_rounded_to_nearest() -> None:
    format, w, x = FORMATS["int4_g32"], gaussian(1, 8, 64), inputs(300, 64)
    x[:, 17] = 0.0
    codes = ROUNDINGS["gptq"].round(batch_of(w, [x]), format).codes_EOI[0]
    nearest = format.encode(w[0], searched(w[0], format))
    assert codes[:, 17].equal(nearest[:, 17]) and not codes.equal(nearest)


@every_format
def test_search_in_parts_is_the_formats_search(format: NumberFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.rounding.search.CHUNK", 1024)
    w, moments = gaussian(200, 256), torch.rand(256, generator=torch.Generator().manual_seed(1))
    for known in (None, moments):
        whole, parts = format.search(w, format.scales(w), known), searched(w, format, known)
        for mine, theirs in zip(format.steps(parts), format.steps(whole)):
            assert mine.equal(theirs)


@pytest.mark.parametrize("way", ROUNDINGS)
@pytest.mark.parametrize("rows", [96, 130])
def test_blocks_of_rows_do_not_lie_across_matrices(rows: int, way: str) -> None:
    """Of FP8's 128 × 128: side by side, each matrix is rounded as it is alone."""
    format, w, x = (
        FORMATS["fp8_block"],
        gaussian(3, rows, 128) * torch.tensor([1.0, 30.0, 0.1])[:, None, None],
        inputs(80, 128),
    )
    together = ROUNDINGS[way].round(batch_of(w, [x] * 3), format).values(format)
    for e in range(3):
        assert together[e].equal(ROUNDINGS[way].round(batch_of(w[e : e + 1], [x]), format).values(format)[0])


@pytest.mark.parametrize("way", ROUNDINGS)
@pytest.mark.parametrize("name", ["nvfp4", "int2_g64", "affine3_g32"])
def test_many_rows_are_rounded_as_few_are(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats take a band of rows at a time, whatever rounding asks, and however many matrices lie above each other."""
    format, batch = FORMATS[name], batch_of(gaussian(3, 40, 128), [inputs(80, 128)] * 3)
    whole = ROUNDINGS[way].round(batch, format)
    monkeypatch.setattr("moesaic.formats.base.BAND", 1024)
    parts = ROUNDINGS[way].round(batch, format)
    assert parts.codes_EOI.equal(whole.codes_EOI) and parts.values(format).equal(whole.values(format))


@pytest.mark.parametrize("name", ["nvfp4", "int4_g32", "fp8_block", "fp8_channel", "bf16"])
def test_siblings_share_a_second_scale_and_come_apart_again(name: str) -> None:
    format = FORMATS[name]
    weights = [gaussian(256, 64), 3 * gaussian(128, 64, seed=1), gaussian(128, 64, seed=2)]
    shared = format.share(torch.cat(weights).abs().max()) if format.share else None
    for w, (codes, scales) in zip(weights, round_siblings(ROUNDINGS["rtn"], weights, format)):
        wanted = format.scales(w, shared)
        assert codes.equal(format.encode(w, wanted))
        assert format.decode(codes, scales).equal(format.decode(codes, wanted))
    ragged = [gaussian(130, 64), gaussian(70, 64, seed=1)]
    for w, (codes, scales) in zip(ragged, round_siblings(ROUNDINGS["rtn"], ragged, format)):
        assert codes.shape == w.shape and output_error(w, format.decode(codes, scales), torch.eye(64)) < 0.02


def test_split_cuts_between_blocks() -> None:
    format, w = FORMATS["fp8_block"], gaussian(2, 384, 256)
    rounded = ROUNDINGS["rtn"].round(Batch(w), format)
    for e, members in enumerate(split(rounded, [128, 256], format)):
        assert [scales.blocks.shape for _, scales in members] == [(1, 2), (2, 2)]
        assert torch.cat([format.decode(*member) for member in members]).equal(rounded.values(format)[e])


def test_inputs_add_up() -> None:
    x, weight = inputs(100, 16), torch.rand(100, generator=torch.Generator().manual_seed(0))
    found = Inputs.empty(16)
    for part in (slice(0, 30), slice(30, 100)):
        found.add(x[part], weight[part])
    wanted = (x * weight[:, None]).T @ x / weight.sum()
    assert torch.allclose(found.hessian_II, wanted, rtol=1e-4, atol=1e-5)
    equal = Inputs.empty(16)
    equal.add(torch.ones(50, 16))
    assert equal.tokens == pytest.approx(50)
    equal.add(1000 * torch.ones(1, 16))
    assert equal.tokens == pytest.approx(1, rel=0.01)
    assert Inputs.empty(16).tokens == 0.0 and not Inputs.empty(16).hessian_II.any()


def expert(weights, x):
    gate, up = (x @ weights[0].transpose(1, 2)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ weights[1].transpose(1, 2)


def block_error(block: Block, parts: tuple[Rounded, ...], format: NumberFormat) -> float:
    off = expert([part.values(format) for part in parts], block.x_EnD) - expert(block.weights, block.x_EnD)
    return float((off.square().sum(-1) * block.weight_En).sum())


@pytest.fixture
def block() -> Block:
    x = torch.stack([inputs(300, 64, seed=e) for e in range(2)])
    weight = torch.ones(2, 300)
    weight[1, 200:] = 0.0
    return Block((0.2 * gaussian(2, 64, 64), 0.2 * gaussian(2, 64, 32, seed=1)), expert, x, weight)


@pytest.mark.parametrize("name", ["int2_g32", "int3_g32", "int4_g32", "affine2_g32", "mxfp4", "nvfp4"])
def test_autoround_lowers_the_output_error_of_block_and_matrix(name: str, block: Block) -> None:
    format, rounding = FORMATS[name], ROUNDINGS["autoround"]
    nearest = block_error(block, tuple(ROUNDINGS["rtn"].round(Batch(w), format) for w in block.weights), format)
    tuned = rounding.round_block(block, format)
    assert block_error(block, tuned, format) < (0.6 if format.element_bits < 4 else 0.85) * nearest
    again = rounding.round_block(block, format)
    assert all(a.codes_EOI.equal(b.codes_EOI) for a, b in zip(tuned, again))

    w, x = gaussian(1, 32, 64), inputs(400, 64)
    alone = rounding.round(batch_of(w, [x]), format).values(format)[0]
    plain = ROUNDINGS["rtn"].round(Batch(w), format).values(format)[0]
    limit = 1.0 if name in ("mxfp4", "nvfp4") else 0.85  # on a single matrix of 4-bit floats it finds next to nothing
    assert output_error(w[0], alone, x) <= limit * output_error(w[0], plain, x)


def test_autoround_sees_no_token_that_only_fills_up(block: Block) -> None:
    format = FORMATS["int3_g32"]
    garbage = block.x_EnD.clone()
    garbage[1, 200:] = 1e4
    tuned = ROUNDINGS["autoround"].round_block(block, format)
    other = ROUNDINGS["autoround"].round_block(Block(block.weights, expert, garbage, block.weight_En), format)
    assert all(a.codes_EOI.equal(b.codes_EOI) for a, b in zip(tuned, other))


@every_format
def test_gaps_lie_between_the_neighbours_of_a_weight(format: NumberFormat) -> None:
    if format.element_bits > 8:
        return
    w = gaussian(4, 256, seed=3)
    scales = format.scales(w)
    gap = autoround_module.gaps(w, format, scales)
    steps = format.spread(format.steps(scales), w.shape)
    codes = torch.arange(1 << format.element_bits, dtype=torch.uint8).reshape(-1, 1, 1).expand(-1, 4, 256)
    grid = format.value(codes, *steps).nan_to_num(0.0).sort(0).values
    high = torch.searchsorted(grid.permute(1, 2, 0).contiguous(), w[..., None].contiguous())[..., 0]
    inside = (high > 0) & (high < len(grid)) & ~(grid == w).any(0)
    between = (
        grid.gather(0, high.clamp(1, len(grid) - 1)[None])[0]
        - grid.gather(0, high.clamp(1, len(grid) - 1)[None] - 1)[0]
    )
    assert gap[inside].equal(between[inside]) or torch.allclose(gap[inside], between[inside], rtol=1e-5)
    assert (gap > 0).all() and gap.isfinite().all() and inside.float().mean() > 0.8


def test_what_a_rounding_needs_is_a_field_of_a_batch() -> None:
    names = {field.name for field in fields(Batch)}
    assert all(set(rounding.needs) <= names for rounding in ROUNDINGS.values())
    assert ROUNDINGS["rtn"].needs == ROUNDINGS["search"].needs == ()
