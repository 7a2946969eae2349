"""The allocator against every plan there is, against a dynamic program over bytes, and against numbers worked by hand."""

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moesaic.allocate.solver import Choice, Frontier, Menu, keep_first, search
from moesaic.errors import PlanError

REPOSITORY = Path(__file__).resolve().parents[1]
INSTANCES = REPOSITORY.parent / "shared" / "instances"


def random_menu(seed, units=4, formats=4, counts=3):
    """Small tables with what is awkward in them: ties, dominated and missing options, negative harm, lines, one column."""
    rng = np.random.default_rng(seed)
    choices = []
    for u in range(units):
        rows, columns = int(rng.integers(1, formats + 1)), int(rng.choice([1, counts]))
        stored = rng.integers(0, 30, (rows, columns))
        harm = rng.choice([rng.normal(3, 2, (rows, columns)), 30.0 - stored, rng.integers(0, 6, (rows, columns)) * 1.0])
        harm[rng.random(harm.shape) < 0.1] = np.inf
        choices.append(Choice(f"u{u}", tuple(f"f{i}" for i in range(rows)), stored, harm))
    kept = tuple(sorted(rng.choice(np.arange(1, 20), counts, replace=False).tolist()))
    return Menu(tuple(choices), kept, rng.integers(0, 20, counts), weights=100)


def all_plans(menu):
    """(kept, bytes, harm) of every plan that can be had."""
    for k, kept in enumerate(menu.kept):
        for plan in itertools.product(*(range(len(c.formats)) for c in menu.choices)):
            picked = [(c.bytes_FK, c.harm_FK, f) for c, f in zip(menu.choices, plan)]
            harm = math.fsum(h[f, k % h.shape[1]] for _, h, f in picked)
            if harm < math.inf:
                yield kept, int(menu.fixed_bytes_K[k]) + sum(int(b[f, k % b.shape[1]]) for b, _, f in picked), harm


def possible(seeds, **shape):
    """Menus of those seeds that have a plan, with their plans."""
    for seed in seeds:
        menu = random_menu(seed, **shape)
        if plans := list(all_plans(menu)):
            yield menu, plans
        else:
            with pytest.raises(PlanError, match="every unit an option"):
                Frontier.of(menu)


def cost(menu, plan):
    """Bytes and harm of an allocation, looked up in the menu."""
    k = menu.kept.index(plan.kept)
    cells = [(c, c.formats.index(plan.formats[c.unit])) for c in menu.choices]
    stored = sum(int(c.bytes_FK[f, k % c.bytes_FK.shape[1]]) for c, f in cells)
    return int(menu.fixed_bytes_K[k]) + stored, math.fsum(c.harm_FK[f, k % c.harm_FK.shape[1]] for c, f in cells)


@pytest.fixture
def by_hand():
    """Attention in three formats; two experts, of which the second is dropped first, in two."""
    attention = Choice("a", ("four", "eight", "sixteen"), np.array([[4], [8], [16]]), np.array([[6.0], [2.0], [0.0]]))
    harm, order = keep_first(np.array([9.0, 4.0]), np.array([[3.0, 1.0], [0.0, 0.0]]), (1, 2))
    experts = Choice("x", ("four", "eight"), np.array([[10, 20], [20, 40]]), harm, order)
    return Menu((experts, attention), (1, 2), np.array([1, 2]), weights=64)


def test_hand_worked_curves(by_hand):
    # One expert kept: 3 + 4 rounded to four, 0 + 4 to eight; two: 3 + 1 or 0.
    frontier = Frontier.of(by_hand)
    assert frontier.bytes_KP.tolist() == [[15, 19, 29, 37, 37], [26, 30, 38, 58, 58]]
    assert frontier.harm_KP.tolist() == [[13, 9, 6, 4, 4], [10, 6, 4, 0, 0]]
    assert frontier.price_KP.tolist() == [[1, 0.3, 0.25, 0, 0], [1, 0.25, 0.2, 0, 0]]
    k, p = frontier.pareto()
    assert list(zip(frontier.kept_K[k], frontier.bytes_KP[k, p])) == [(1, 15), (1, 19), (1, 29), (1, 37), (2, 58)]
    # Below the chord from (15, 13) to (58, 0): 4/43 + 9/13 = .785, 14/43 + 6/13 = .787, 22/43 + 4/13 = .819.
    assert frontier.knee() == (0, 1)
    assert frontier.knee({2}) == (1, 1)  # 4/32 + 6/10 = .725, 12/32 + 4/10 = .775


def test_hand_worked_budget(by_hand):
    # 28 bytes: one step short of 29. The curve stops at 19 with harm 9; D = 9 − 0.3 · 9 = 6.3 there, 10 − 1 · 2 = 8 with both
    # experts. Better than 9, and off the curve: attention in sixteen, the expert in four: 1 + 16 + 10 bytes, harm 0 + 7.
    frontier = Frontier.of(by_hand)
    assert frontier.bounds(28) == pytest.approx([6.3, 8.0], abs=1e-12)
    plan = frontier.fit(28)
    assert (plan.kept, plan.bytes, plan.harm, plan.gap) == (1, 27, 7.0, 0.0)
    assert plan.formats == {"a": "sixteen", "x": "four"} and plan.experts == {"x": (0,)}
    both = frontier.fit(28, kept={2})
    assert (both.kept, both.bytes, both.harm, both.experts["x"]) == (2, 26, 10.0, (0, 1))
    assert frontier.bounds(25)[1] == math.inf and frontier.fit(10**9).harm == 0


def test_equals_the_best_of_all_plans():
    tried = 0
    for menu, plans in possible(range(400)):
        frontier = Frontier.of(menu)
        sizes = sorted({stored for _, stored, _ in plans})
        for budget in {sizes[0], sizes[-1] + 5, *np.linspace(sizes[0], sizes[-1], 6).astype(int).tolist()}:
            for kept in (None, {menu.kept[-1], menu.kept[0]}):
                within = [h for c, b, h in plans if b <= budget and (kept is None or c in kept)]
                if not within:
                    continue
                plan = frontier.fit(budget, kept)
                assert cost(menu, plan) == (plan.bytes, plan.harm) and plan.bytes <= budget
                assert plan.harm == pytest.approx(min(within), abs=1e-12)
                assert plan.bound == plan.harm and (kept is None or plan.kept in kept)
                tried += 1
    assert tried > 3000


def test_every_supported_point_and_no_other():
    for menu, plans in possible(range(150)):
        frontier = Frontier.of(menu)
        for k, count in enumerate(frontier.kept_K):
            of_count = [(b, h) for c, b, h in plans if c == count]
            curve = list(zip(frontier.bytes_KP[k], frontier.harm_KP[k], frontier.price_KP[k]))
            for p, (stored, harm, price) in enumerate(curve):
                # A line of slope −λ through the point has every plan above it, with the λ before and the λ after.
                for slope in (price, curve[p - 1][2] if p else 1e6):
                    assert all(harm + slope * stored <= h + slope * b + 1e-6 for b, h in of_count)
                plan = frontier.plan(k, p)
                assert (plan.bytes, plan.kept) == (stored, count) and plan.harm == pytest.approx(harm, abs=1e-12)
                assert cost(menu, plan) == (plan.bytes, plan.harm)
            for slope in (0.01, 0.3, 1, 1.7, 20):
                ours = min(h + slope * b for b, h, _ in curve)
                assert ours == pytest.approx(min(h + slope * b for b, h in of_count), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_steps_along_one_line_are_taken_in_order(seed):
    """Of ten units five have 24 options on one exact line, five on lines that are straight but for rounding."""
    rng = np.random.default_rng(seed)
    choices = []
    for u in range(10):
        stored = np.sort(rng.choice(10**6, 24, replace=False))[:, None]
        line = (2.0 - u % 2 if u < 5 else rng.random()) * (10**6 - stored)
        choices.append(Choice(f"u{u}", tuple(map(str, range(24))), stored, line))
    frontier = Frontier.of(Menu(tuple(choices), (1,), np.array([0]), 8))
    assert len(np.unique(frontier.bytes_KP)) > 5 * 23
    for p in range(frontier.bytes_KP.shape[1]):
        plan = frontier.plan(0, p)
        assert plan.bytes == frontier.bytes_KP[0, p]
        assert plan.harm == pytest.approx(frontier.harm_KP[0, p], rel=1e-12)


def test_of_equal_units_the_first_by_name_is_raised():
    tables = ("four", "eight"), np.array([[4], [8]]), np.array([[3.0], [1.0]])
    for names in itertools.permutations("abcd"):
        menu = Menu(tuple(Choice(name, *tables) for name in names), (1,), np.array([0]), 8)
        assert Frontier.of(menu).fit(25).formats == {"a": "eight", "b": "eight", "c": "four", "d": "four"}


def test_pareto_falls_and_hides_nothing():
    for menu, _ in possible(range(100)):
        frontier = Frontier.of(menu)
        k, p = frontier.pareto()
        stored, harm = frontier.bytes_KP[k, p], frontier.harm_KP[k, p]
        assert (np.diff(stored) > 0).all() and (np.diff(harm) < 0).all()
        for b, h in zip(frontier.bytes_KP.ravel(), frontier.harm_KP.ravel()):
            assert ((stored <= b) & (harm <= h)).any()
        fitted = [frontier.fit(int(budget)).harm for budget in range(stored[0], stored[-1] + 3, 2)]
        assert all(more <= less for less, more in itertools.pairwise(fitted))


def by_bytes(menu, k, budget):
    """Least harm within a budget, by the textbook table: one cell for every byte."""
    best = np.full(budget - int(menu.fixed_bytes_K[k]) + 1, 0.0)
    for c in menu.choices:
        ways = []
        for b, h in zip(c.bytes_FK[:, k % c.bytes_FK.shape[1]], c.harm_FK[:, k % c.harm_FK.shape[1]]):
            ways.append(np.concatenate([np.full(min(b, len(best)), np.inf), best[: max(0, len(best) - b)]]) + h)
        best = np.min(ways, axis=0)
    return best[-1]


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_textbook_table_where_plans_are_countless(seed):
    rng = np.random.default_rng(seed)
    kept, choices = (4, 5, 6), []
    for u in range(40):
        each = np.sort(rng.integers(5, 60, 5))
        harm = rng.lognormal(0, 1) * np.sort(rng.random(5))[::-1]
        counts = np.array(kept) if u % 2 else np.ones(1, np.int64)
        choices.append(Choice(f"{u:02}", tuple("abcde"), each[:, None] * counts, harm[:, None] * (1 + 1 / counts)))
    menu = Menu(tuple(choices), kept, np.array([100, 120, 140]), 10_000)
    frontier = Frontier.of(menu)
    for share in (0.1, 0.35, 0.6):
        budget = int((1 - share) * frontier.bytes_KP[0, 0] + share * frontier.bytes_KP[-1, -1])
        plan = frontier.fit(budget)
        assert plan.harm == pytest.approx(min(by_bytes(menu, k, budget) for k in range(3)), rel=1e-12)
        assert plan.gap == 0 and plan.bytes <= budget


def test_a_search_cut_short_says_so(monkeypatch):
    gaps = []
    for menu, plans in possible(range(300), units=6, formats=3, counts=1):
        frontier = Frontier.of(menu)
        sizes = sorted({stored for _, stored, _ in plans})
        for budget in np.linspace(sizes[0], sizes[-1], 5).astype(int).tolist():
            monkeypatch.setattr(search, "STATES", 1)
            plan = frontier.fit(budget)
            best = min(h for _, b, h in plans if b <= budget)
            assert plan.bound <= best + 1e-12 and best <= plan.harm + 1e-12
            gaps.append((plan.gap, plan.harm - best))
    assert any(gap > 0 for gap, _ in gaps)  # it was cut short …
    assert any(lost > 1e-9 for _, lost in gaps)  # … and the best plan was missed


def test_bounds_hold_for_every_count():
    for menu, plans in possible(range(100)):
        frontier = Frontier.of(menu)
        for budget in range(0, 130, 9):
            for count, bound in zip(frontier.kept_K, frontier.bounds(budget)):
                best = min((h for c, b, h in plans if c == count and b <= budget), default=math.inf)
                assert bound <= best
                assert (bound == math.inf) == (best == math.inf)


def test_order_and_scale_change_nothing():
    for menu, plans in possible(range(60)):
        budget = int(np.median([b for _, b, _ in plans]))
        plan = Frontier.of(menu).fit(budget)
        turned = Menu(menu.choices[::-1], menu.kept, menu.fixed_bytes_K, menu.weights)
        assert Frontier.of(turned).fit(budget) == plan

        scaled = [Choice(c.unit, c.formats, 8 * c.bytes_FK, c.harm_FK / 4) for c in menu.choices]
        again = Frontier.of(Menu(tuple(scaled), menu.kept, 8 * menu.fixed_bytes_K, menu.weights)).fit(8 * budget)
        assert (again.formats, again.kept) == (plan.formats, plan.kept)
        assert (again.bytes, again.harm) == (8 * plan.bytes, plan.harm / 4)

        shifted = Frontier.of(Menu(menu.choices, menu.kept, menu.fixed_bytes_K + 7, menu.weights)).fit(budget + 7)
        assert (shifted.formats, shifted.bytes) == (plan.formats, plan.bytes + 7)


@pytest.mark.parametrize("seed", range(30))
def test_experts_kept_are_the_best_set_of_every_size(seed):
    rng = np.random.default_rng(seed)
    dropped, rounded = rng.random(7), rng.random((3, 7)) * rng.random((3, 1))
    harm_FK, order_FE = keep_first(dropped, rounded, range(8))
    for f, count in itertools.product(range(3), range(8)):

        def total(kept, f=f):
            return sum(rounded[f, e] if e in kept else dropped[e] for e in range(7))

        assert harm_FK[f, count] == pytest.approx(min(map(total, itertools.combinations(range(7), count))), abs=1e-12)
        assert harm_FK[f, count] == pytest.approx(total(order_FE[f, :count]), abs=1e-12)


def test_each_format_keeps_its_own_experts():
    # Worth of keeping: 9 − 7 and 4 − 0 in four bits, 9 and 4 in eight: the wide format keeps the other one.
    harm, order = keep_first(np.array([9.0, 4.0]), np.array([[7.0, 0.0], [0.0, 0.0]]), (1,))
    assert harm.tolist() == [[9.0], [4.0]] and order.tolist() == [[1, 0], [0, 1]]
    menu = Menu((Choice("x", ("four", "eight"), np.array([[4], [8]]), harm, order),), (1,), np.array([0]), 16)
    assert Frontier.of(menu).fit(5).experts == {"x": (1,)}
    assert Frontier.of(menu).fit(9).experts == {"x": (0,)}
    one_order = Choice("x", ("four", "eight"), np.array([[4], [8]]), harm, np.array([[1, 0]]))
    assert Frontier.of(Menu((one_order,), (1,), np.array([0]), 16)).fit(9).experts == {"x": (1,)}


def test_bits_are_never_above_those_asked_for(by_hand):
    assert by_hand.budget_bytes(3.5) == 28 and by_hand.bits(28) == 3.5
    for weights, bits in itertools.product((227_412_541_440, 7, 428_000_000_001), (0.1, 3.16, 3.2, 4.25, 16)):
        menu = Menu(by_hand.choices, by_hand.kept, by_hand.fixed_bytes_K, weights)
        assert 8 * menu.budget_bytes(bits) <= bits * weights < 8 * (menu.budget_bytes(bits) + 1)


def test_says_how_many_bytes_are_missing(by_hand):
    with pytest.raises(PlanError, match="of 1 experts a layer, takes 15 bytes, 4 more than the budget of 11"):
        Frontier.of(by_hand).fit(11)
    with pytest.raises(PlanError, match="of 2 experts a layer, takes 26 bytes, 1 more"):
        Frontier.of(by_hand).fit(25, kept={2})
    with pytest.raises(PlanError, match=r"no plan keeps \[3, 4\].*on offer are \[1, 2\]"):
        Frontier.of(by_hand).fit(25, kept={4, 3})


BYTES, HARM = np.array([[1, 2]]), np.array([[0.5, 0.25]])
BROKEN = {
    "more than once": lambda: (Choice("a", ("f",), BYTES, HARM), Choice("a", ("f",), BYTES, HARM)),
    "has 0 units": lambda: (),
    "a row for each of 2 formats": lambda: (Choice("a", ("f", "g"), BYTES, HARM),),
    "a column for each of 2 kept": lambda: (Choice("a", ("f",), BYTES, np.zeros((1, 3))),),
    "wanted integers from 0": lambda: (Choice("a", ("f",), -BYTES, HARM),),
    "float64 bytes": lambda: (Choice("a", ("f",), BYTES * 1.0, HARM),),
    "NaN or minus infinity": lambda: (Choice("a", ("f",), BYTES, HARM * np.nan),),
    "order of": lambda: (Choice("a", ("f",), BYTES, HARM, np.array([[0]])),),
}


@pytest.mark.parametrize("message", BROKEN)
def test_refuses_tables_that_contradict_each_other(message):
    with pytest.raises(PlanError, match=message):
        Menu(BROKEN[message](), (1, 2), np.array([0, 0]), 8)


@pytest.mark.parametrize(
    "kept, fixed", [((2, 1), [0, 0]), ((1, 1), [0, 0]), ((1, 2), [0]), ((1, 2), [0.0, 0.0]), ((), [])]
)
def test_refuses_counts_out_of_order_and_fixed_bytes_that_do_not_match(kept, fixed):
    with pytest.raises(PlanError, match="wanted"):
        Menu((Choice("a", ("f",), BYTES, HARM),), kept, np.array(fixed), 8)


def test_a_large_model_takes_seconds():
    """60 layers of four units in nine formats and 125 kept counts: all curves, and a plan proven near the best."""
    rng = np.random.default_rng(0)
    bits = np.array([2.25, 3.25, 4.25, 4.5, 5.25, 6.25, 8.25, 8.5, 16])
    formats, kept, choices = tuple(map(str, bits)), tuple(range(4, 129)), []
    for layer in range(60):
        loss = rng.lognormal(0, 2) * np.exp2(-1.8 * bits)
        for name, weights in (("qkv", 60_000_000), ("o", 50_000_000), ("shared", 38_000_000)):
            stored = (bits * weights / 8).astype(np.int64)
            choices.append(
                Choice(f"{layer}.{name}", formats, stored[:, None], (loss * rng.lognormal(0, 1, 9))[:, None])
            )
        load = rng.lognormal(0, 1, 128) / 200
        harm, order = keep_first(load * rng.lognormal(0, 0.8, 128), loss[:, None] * load, kept)
        choices.append(Choice(f"{layer}.experts", formats, (bits * 7e6).astype(np.int64)[:, None] * kept, harm, order))
    menu = Menu(tuple(choices), kept, np.full(len(kept), 3 * 10**9), 430 * 10**9)
    start = time.process_time()
    frontier = Frontier.of(menu)
    k, p = frontier.pareto()
    assert time.process_time() - start < 5 and len(k) > 1000
    for wanted in (2.5, 4.25):
        plan = frontier.fit(menu.budget_bytes(wanted))
        assert cost(menu, plan) == (plan.bytes, plan.harm) and menu.bits(plan.bytes) <= wanted
        curve = frontier.harm_KP[k, p][frontier.bytes_KP[k, p] <= plan.budget_bytes].min()
        assert 0 <= plan.gap <= 1e-3 * plan.harm and plan.harm <= curve


@pytest.mark.skipif(not INSTANCES.is_dir(), reason="../shared/instances is absent: its generator and judge are needed")
def test_known_instance_is_solved_better_than_known():
    call = [sys.executable, REPOSITORY / "benchmarks" / "allocate.py", "--json", "--instances", INSTANCES]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["menu_cpu_s"] + figures["frontier_cpu_s"] + figures["pareto_cpu_s"] < 5
    best_known = {"3.16": 0.0509571, "3.2": 0.0483200, "3.25": 0.0451822, "3.3": 0.0421881, "3.4": 0.0367128}
    assert figures["targets"].keys() == best_known.keys()
    for target, got in figures["targets"].items():
        assert got["objective"] <= best_known[target] and got["bits"] <= float(target)
        assert got["bytes"] <= got["budget"] and got["mixed"] == 0 and len(got["kept"]) == 1
        assert got["objective"] == pytest.approx(got["harm"], rel=1e-12) and got["bound"] == got["harm"]
