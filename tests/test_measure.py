"""measure/ and candidates/: a branch against the export it stands for, KL against float64, bytes against folders.

Tiny models are random: their figures mean nothing, but every identity that holds for a real model holds for them.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import forward
import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.allocate import Limit, Offer, Pricing, Setting, Traced, choose, folder_bytes, menu_of, stored_bytes
from moesaic.allocate.candidates import candidates, plan_of, sums, uniform, varied
from moesaic.allocate.choice import price_text
from moesaic.allocate.solver import Frontier
from moesaic.calibrate import Statistics, calibrate
from moesaic.calibrate.selection import order_experts, select_experts
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.data.tokens import TokenSet, sha256_of
from moesaic.errors import InputError, PlanError, StaleError
from moesaic.export import export
from moesaic.measure import (
    Branch,
    Measured,
    Options,
    Price,
    Prices,
    Rule,
    Trial,
    default_counts,
    effort,
    measure,
    offers,
    price,
    some_rows,
)
from moesaic.measure.branch import changes
from moesaic.measure.branches import state_of
from moesaic.measure.composition import line
from moesaic.measure.divergence import against
from moesaic.measure.kl import kl_to_source
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.stream import LayerRun, State

CONTAINER = CONTAINERS["compressed_tensors"]
FORMATS = ("source", "mxfp4", "nvfp4", "int3_g64", "int2_g64")


def rows(count: int, length: int = 24, seed: int = 0) -> TokenSet:
    ids_BT = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))
    facts = {"ids_sha256": sha256_of(ids_BT), "tokenizer_sha256": "none", "seed": seed}
    return TokenSet(ids_BT, torch.zeros(count, dtype=torch.int64), ("random",), facts)


def final(run: LayerRun, state: State) -> Tensor:
    (after,) = forward.final(run, [state])
    return after.hidden_BTD


def ridden(source: Checkpoint, branch: Branch, tokens: TokenSet) -> Tensor:
    run = LayerRun(source)
    return final(run, state_of(run, branch, run.embed(tokens.ids_BT), changes([branch], "rtn")))


# A branch is the model that an export would be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "format"),
    [
        ("qkv", "mxfp4"),
        ("o", "int3_g64"),
        ("experts", "nvfp4"),
        ("experts", "int2_g64"),
        ("shared", "nvfp4"),
        ("dense", "nvfp4"),
    ],
)
def test_a_branch_is_its_export_to_the_bit(source, tmp_path, role, format):
    offered = offers(source, CONTAINER, FORMATS)
    units = [u for u, members in source.architecture.units.items() if members[0].role == role and format in offered[u]]
    if not units:
        pytest.skip(f"{source.family.name} has no {role} unit that may be {format}")
    exported = export(source, Plan("compressed_tensors", {}, {units[-1]: format}), tmp_path / "out", quiet=True)
    tokens = rows(2)
    run = LayerRun(exported)
    branch = ridden(source, Branch({units[-1]: format}), tokens)
    assert torch.equal(branch, final(run, State(run.embed(tokens.ids_BT))))
    assert not torch.equal(branch, ridden(source, Branch(), tokens))


def test_a_whole_plan_is_its_export(source, tmp_path):
    offered, kept = (
        offers(source, CONTAINER, FORMATS),
        {layer: (0, 2, 3, 5, 6) for layer in source.architecture.moe_layers},
    )
    formats = {unit: of[i % len(of)] for i, (unit, of) in enumerate(offered.items())}
    plan = Plan("compressed_tensors", kept, formats)
    exported, tokens = export(source, plan, tmp_path / "out", quiet=True), rows(2)
    run = LayerRun(exported)
    there = final(run, State(run.embed(tokens.ids_BT)))
    assert (ridden(source, Branch.of(plan), tokens) - there).abs().max() < 1e-5 * there.abs().max()


def test_branches_together_are_branches_alone(source, tmp_path):
    branches, tokens = some_branches(source), rows(3)
    together = measure(source, branches, Trial(tokens, quiet=True), tmp_path / "all")
    for i in (0, len(branches) // 2, len(branches) - 3):
        alone = measure(source, [branches[i]], Trial(tokens, quiet=True), tmp_path / str(i))
        assert np.array_equal(together[i].kl_B, alone[0].kl_B)


def some_branches(source: Checkpoint) -> list[Branch]:
    """Options of every layer, out of order, a plan, and one that differs in nothing."""
    units, layers = list(source.architecture.units), source.architecture.moe_layers
    found = [Branch({unit: format}) for unit in reversed(units) for format in ("mxfp4", "int2_g64")]
    plan = Branch(dict.fromkeys(units, "int3_g64"), {layer: tuple(range(5)) for layer in layers})
    return [*found, plan, Branch(), Branch({}, {layers[-1]: (0, 1, 4, 7)})]


# Its KL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", (1e-4, 1e-2, 1.0, 5.0))
def test_excess_is_kl_in_float64(source, scale):
    run, tokens = LayerRun(source), rows(2)
    h_BTD = final(run, State(run.embed(tokens.ids_BT)))
    noise = torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(1))
    branch_BTD = h_BTD + scale * h_BTD.std() * noise
    (found_BS,) = kl_to_source(run, h_BTD, [branch_BTD])
    with torch.no_grad():
        x, y = (run.norm()(hidden_BTD[:, :-1]).double() for hidden_BTD in (h_BTD, branch_BTD))
        w = run.rows(run.architecture.head, slice(0, run.architecture.vocab)).double()
    p, q = (x @ w.T).log_softmax(-1), (y @ w.T).log_softmax(-1)
    truth_BS = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(found_BS, truth_BS, rtol=2e-4, atol=1e-10)
    (theirs,) = against(run, h_BTD, [branch_BTD], tokens.ids_BT)
    assert np.allclose(theirs["kl_nats"], truth_BS, rtol=1e-3, atol=2e-6)


def test_what_is_not_finite_is_no_figure(source):
    run, tokens = LayerRun(source), rows(2)
    h_BTD = final(run, State(run.embed(tokens.ids_BT)))
    broken_BTD = h_BTD.clone()
    broken_BTD[0, 3] = torch.nan
    assert kl_to_source(run, h_BTD, [broken_BTD])[0].isnan().sum() == 1
    assert Measured(np.array([0.1, 0.2]), nonfinite=1).nats == np.inf
    assert Measured(np.array([0.1, 0.3]), nonfinite=0).nats == pytest.approx(0.2)
    assert Measured(np.array([0.1, 0.3]), nonfinite=0).error == pytest.approx(0.1)  # sd 0.1414 / √2


def test_a_branch_that_differs_in_nothing_costs_nothing(source, tmp_path):
    *others, nothing, cut = measure(source, some_branches(source), Trial(rows(3), quiet=True), tmp_path)
    assert np.array_equal(nothing.kl_B, np.zeros(3))
    assert all(m.nats > 0 and np.isfinite(m.error) for m in (*others, cut))


# One sweep, many sweeps, interrupted sweeps -----------------------------------------------------------------------------


@dataclasses.dataclass
class Counter:
    token_layers: int = 0
    stop_after: int = 10**9


@pytest.fixture
def counted(monkeypatch) -> Iterator[Counter]:
    """Tokens that went through a layer; a Ctrl-C once there were enough."""
    counter, advance = Counter(), LayerRun.advance

    def counting(self, layer, states):
        if counter.token_layers > counter.stop_after:
            raise KeyboardInterrupt
        counter.token_layers += sum(s.hidden_BTD[..., 0].numel() for s in states)
        return advance(self, layer, states)

    monkeypatch.setattr(LayerRun, "advance", counting)
    yield counter


def test_the_effort_is_what_was_predicted_and_memory_only_cuts_it(source, tmp_path, counted):
    branches, tokens = some_branches(source), rows(3)
    small = 5 * 5 * 4 * tokens.tokens * source.architecture.hidden
    one, many = (effort(source, branches, tokens.tokens, memory) for memory in (1 << 30, small))
    whole = measure(source, branches, Trial(tokens, memory_bytes=1 << 30, quiet=True), tmp_path / "one")
    assert (counted.token_layers, one.batches) == (one.token_layers, 1)
    counted.token_layers = 0
    cut = measure(source, branches, Trial(tokens, memory_bytes=small, quiet=True), tmp_path / "many")
    assert counted.token_layers == many.token_layers and many.batches > 2 and many.memory_bytes <= small
    assert one.token_layers < many.token_layers < many.one_by_one and one.read_bytes < many.read_bytes
    assert all(np.array_equal(a.kl_B, b.kl_B) for a, b in zip(whole, cut))


def test_an_interrupted_sweep_goes_on(source, tmp_path, counted):
    branches, tokens = some_branches(source), rows(2)
    memory = 8 * 5 * 4 * tokens.tokens * source.architecture.hidden
    truth = measure(source, branches, Trial(tokens, memory_bytes=memory, quiet=True), tmp_path / "whole")
    full, counted.token_layers = counted.token_layers, 0
    counted.stop_after = full // 3
    for _ in range(8):
        try:
            found = measure(source, branches, Trial(tokens, memory_bytes=memory, quiet=True), tmp_path / "cut")
            break
        except KeyboardInterrupt:
            counted.token_layers = 0
    else:
        pytest.fail("eight attempts did not finish what one can: nothing was kept between them")
    assert all(np.array_equal(a.kl_B, b.kl_B) for a, b in zip(truth, found))
    assert not list((tmp_path / "cut").glob("*.safetensors"))
    counted.token_layers = counted.stop_after = 0
    measure(source, branches, Trial(tokens, memory_bytes=memory, quiet=True), tmp_path / "cut")
    assert counted.token_layers == 0


def test_a_rounding_that_needs_data_is_refused(source, tmp_path):
    with pytest.raises(PlanError, match="unknown rounding 'none'"):
        measure(source, [Branch()], Trial(rows(2), rounding="none", quiet=True), tmp_path)


# Prices -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def priced(m3, tmp_path_factory) -> tuple[Checkpoint, Statistics, Prices, Path]:
    run, tokens = tmp_path_factory.mktemp("priced"), rows(4)
    statistics = calibrate(m3, tokens, run / "stats", quiet=True)
    return m3, statistics, price_of(m3, statistics, tokens, run), run


def price_of(source: Checkpoint, statistics: Statistics, tokens: TokenSet, run: Path) -> Prices:
    counts = default_counts(source.architecture)
    options = Options(offers(source, CONTAINER, FORMATS), counts, order_experts(statistics, "reap"))
    return price(source, options, Trial(tokens, quiet=True), run)


def test_prices_are_nats_with_errors(priced):
    source, statistics, prices, run = priced
    assert set(prices.rounded) == set(source.architecture.units)
    assert set(prices.dropped) == set(source.architecture.moe_layers)
    for of in prices.rounded.values():
        assert of["source"] == Price(0.0, 0.0)
        assert all(p.nats > 0 and p.error > 0 for f, p in of.items() if f != "source")
        assert of["int2_g64"].nats > of["mxfp4"].nats
    again = Prices.load(run / "costs.json")
    assert again.rounded == prices.rounded and again.dropped == prices.dropped
    with pytest.raises(StaleError):
        price_of(source, statistics, rows(4, seed=5), run)


def test_an_indexer_is_not_offered_what_no_engine_loads(m3):
    for unit, of in offers(m3, CONTAINER, ("source", "nvfp4", "mxfp4")).items():
        indexed = any(n.projection.startswith("index_") for n in m3.architecture.units[unit])
        assert of == (("source", "mxfp4") if indexed else ("source", "nvfp4", "mxfp4"))
    with pytest.raises(PlanError, match="unknown format 'fp3'"):
        offers(m3, CONTAINER, ("fp3",))


def test_dropping_between_measured_counts():
    dropped = {0: {28: Price(1e-3, 0.0), 24: Price(4e-3, 0.0), 16: Price(3e-3, 0.0)}}  # 16 came out below 24: noise
    prices = Prices({}, dropped, np.arange(32)[None], 100)
    kept = [8, 16, 24, 26, 28, 30, 32]
    assert prices.dropping(0, kept) == pytest.approx([np.inf, 4e-3, 4e-3, 1e-3 * 1.5**2, 1e-3, 0.5e-3, 0.0])
    assert prices.kept(3) == {0: (0, 1, 2)} and prices.kept(32) == {}


def test_the_order_is_the_selection_s(priced):
    _, statistics, _, _ = priced
    order_LE = order_experts(statistics, "reap")
    for count in (3, 5, 7):
        kept = select_experts(statistics, "reap", count).cut.kept
        assert [sorted(order_E[:count].tolist()) for order_E in order_LE] == [list(ids) for ids in kept.values()]


def test_some_rows_keep_every_domain():
    tokens = dataclasses.replace(rows(12), domain_B=torch.arange(12) // 4, domains=("a", "b", "c"))
    few = some_rows(tokens, 6 * 24 + 5)
    assert few.rows == 6 and few.domain_B.bincount().tolist() == [2, 2, 2] and few.identity != tokens.identity
    assert some_rows(tokens, 10**6).identity == tokens.identity


# Composition ------------------------------------------------------------------------------------------------------------


def test_a_rule_is_found_again():
    rng = np.random.default_rng(0)
    r, d = np.exp(rng.uniform(-8, 0, 20)), np.exp(rng.uniform(-6, -1, 20)) * (np.arange(20) % 2)
    kl = 0.9 * (r + 2**0.5 * d) ** 1.2
    rule = Rule.fit(r, d, kl)
    assert (rule.a, rule.b, rule.weight) == pytest.approx((np.log(0.9), 1.2, 2**0.5), rel=1e-6)
    assert rule.error < 1e-6 and rule.predict(rule.total(r[1], d[1])) == pytest.approx(kl[1])
    noisy = Rule.fit(r, d, kl * np.exp(0.3 * rng.standard_normal(20)))
    assert 0.2 < noisy.error < 0.6  # not the residual's size, which is smaller
    assert noisy.predict(0.0) == 0 and (np.diff(noisy.predict(np.linspace(0, 2, 50))) > 0).all()


def test_one_strange_plan_bends_nothing():
    r = np.exp(np.linspace(-6, 0, 15))
    kl = 0.8 * r**1.1
    kl[4] /= 3
    rule = Rule.fit(r, np.zeros(15), kl)
    assert (rule.a, rule.b, rule.weight) == pytest.approx((np.log(0.8), 1.1, 1.0), abs=0.01)
    assert rule.error == pytest.approx(np.log(3) / 15**0.5, rel=0.02)  # and is not hushed up


def test_a_line_of_least_absolute_differences():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 9))
    pairs = [(i, k) for i in range(9) for k in range(i)]  # the best one goes through two points
    slopes = [(y[i] - y[k]) / (x[i] - x[k]) for i, k in pairs]
    slow = min(np.abs(y - y[k] - b * (x - x[k])).mean() for (_, k), b in zip(pairs, slopes))
    assert slow <= line(x, y)[0] < 1.03 * slow
    assert line(np.ones(3), np.array([1.0, 2.0, 3.0]))[1:] == pytest.approx((1.0, 1.0))


def test_a_rule_needs_plans_that_tell():
    with pytest.raises(InputError, match="wanted 4"):
        Rule.fit([1, 2, 3], [0, 0, 0], [1, 2, 3])
    with pytest.raises(InputError, match="falls as prices rise"):
        Rule.fit([1, 2, 3, 4], [0, 0, 0, 0], [4, 3, 2, 1])


# Bytes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", (8, 6))
def test_bytes_are_those_of_the_folder(priced, tmp_path, kept):
    source, _, prices, _ = priced
    menu = menu_of(source, CONTAINER, prices, [6, 8])
    for i, format in enumerate(("int3_g64", "source")):
        formats, size, _ = uniform(menu, format, [6, 8].index(kept))
        plan = plan_of(Setting(source, tmp_path), prices, formats, kept)
        blueprint = Blueprint.of(source, plan)
        export(source, plan, tmp_path / str(i), quiet=True)
        there = stored_bytes(tmp_path / str(i))
        assert folder_bytes(blueprint) == there
        assert there <= size < 1.02 * there + 20_000


def test_varied_plans_span_the_menu(priced):
    source, _, prices, _ = priced
    menu = menu_of(source, CONTAINER, prices, [4, 5, 6, 7, 8])
    plans = varied(menu, 12, seed=0)
    harm = [sums(prices, formats, kept)[0] for formats, kept in plans]
    assert len({str(p) for p in plans}) > 9 and {kept for _, kept in plans} > {8}
    assert max(harm) > 20 * max(min(harm), 1e-9) and plans == varied(menu, 12, seed=0) != varied(menu, 12, seed=1)


# The choice -------------------------------------------------------------------------------------------------------------


def test_what_ships_is_within_the_budget_on_disk(priced, tmp_path, counted):
    source, statistics, _, _ = priced
    whole = sum(t.bytes for t in source.inventory)
    limit, pricing = Limit(int(0.75 * whole)), Pricing(tokens=72, rule_plans=8)
    setting = Setting(source, tmp_path, offer=Offer(formats=FORMATS), limit=limit, pricing=pricing, quiet=True)
    chosen = choose(setting, statistics, rows(4), rows(6, seed=1))
    export(source, chosen.plan, tmp_path / "model", quiet=True)
    files = [f for f in (tmp_path / "model").rglob("*") if f.is_file()]
    assert stored_bytes(tmp_path / "model") == chosen.candidate.bytes <= limit.budget_bytes
    assert sum(f.stat().st_size for f in files) == chosen.candidate.bytes - 2 * 4096
    told = json.loads((tmp_path / "candidates.json").read_text())
    figures = [c["measured_nats"] for c in told["candidates"]]
    assert told["ships"] == int(np.argmin(figures)) and all(
        c["bytes"] <= limit.budget_bytes for c in told["candidates"]
    )
    frontier = json.loads((tmp_path / "frontier.json").read_text())
    assert (
        frontier["bytes"] == sorted(frontier["bytes"])
        and frontier["predicted_nats"] == sorted(frontier["predicted_nats"])[::-1]
    )
    assert 0 < frontier["knee"]["bytes"] < whole * 1.1
    counted.token_layers = 0
    again = choose(setting, statistics, rows(4), rows(6, seed=1))
    assert again.plan == chosen.plan and counted.token_layers == 0


def test_bits_and_experts_are_views_of_the_same(priced, tmp_path):
    source, _, prices, _ = priced
    kept = [4, 5, 6, 7, 8]
    menu = menu_of(source, CONTAINER, prices, kept)
    rule = Rule(0.0, 1.1, 1.0, 0.1, 10, (0.0, 1.0))
    limit = Limit(bits=6.0).bytes(menu)
    assert 8 * limit / menu.weights <= 6.0 < 8 * (limit + 1) / menu.weights
    setting, traced = Setting(source, tmp_path), Traced(prices, rule, menu, Frontier.of(menu), limit)
    for found in candidates(setting, traced, limit):
        assert found.bytes <= limit and found.predicted_nats == pytest.approx(found.harm**1.1)
    with pytest.raises(PlanError, match="smallest plan"):
        candidates(setting, traced, 1000)
    assert Limit().bytes(menu) is None


def test_text_to_price_on_fits_the_time_and_is_chosen_once(m2, tmp_path, monkeypatch):
    """The machine grows slower while a run goes on: the same question has the same answer, another question another."""
    speed = itertools.count(10, -1)
    monkeypatch.setitem(
        price_text.__globals__, "affordable_tokens", lambda _, work, seconds: int(next(speed) * seconds / work)
    )

    def priced(text: TokenSet, seconds: float = 24.0, tokens: int = 240, work: float = 1.0) -> TokenSet:
        return price_text(Setting(m2, tmp_path, pricing=Pricing(tokens=tokens, seconds=seconds)), work, text)

    text, other = rows(12), rows(12, seed=1)
    first = priced(text)
    assert first.rows == 10 and priced(text).identity == first.identity, "the guess is not made again"
    assert [priced(text, seconds=12.0).rows, priced(text, tokens=48).rows, priced(text, work=4.0).rows] == [4, 2, 1]
    assert priced(other).rows == 6 and priced(other).shared_with(text) == 0
    assert priced(text).identity == first.identity and next(speed) == 5, "four other questions were asked once each"


def test_a_real_machine_takes_less_text_in_less_time(m2, tmp_path):
    few, many = (Setting(m2, tmp_path, pricing=Pricing(tokens=240, seconds=s)) for s in (1e-6, 1e6))
    assert [price_text(setting, 10.0, rows(12)).rows for setting in (few, many)] == [1, 10]
