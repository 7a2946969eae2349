"""Criteria, cuts and selections, against numbers worked by hand and the plainest Python that says the same.

The worked example: three tokens whose expert gives [3, 4], [5, 12] and [8, 15], of norms 5, 13 and 17,
under gates ½, ¼ and ¾.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.calibrate import SUMS, LayerSums, Statistics
from moesaic.calibrate.criteria import CRITERIA, POLICIES, WEIGHT_SUMS, combine, cut
from moesaic.calibrate.criteria.base import ranks
from moesaic.calibrate.selection import jaccard, select_experts
from moesaic.errors import InputError
from moesaic.stream import BlockPass, ExpertPass, Routing

OUTPUTS = torch.tensor([[3.0, 4.0], [5.0, 12.0], [8.0, 15.0]])
GATES = torch.tensor([0.5, 0.25, 0.75])
WEIGHED = {
    name: np.array([[0.0, s, 0.0]]) for name, s in zip(WEIGHT_SUMS, (3 + 4, 9 + 16, 2))
}  # the weights are 3 and −4


def seen(expert: int, tokens: list[int], gates: Tensor, f_nD: Tensor, layer: int = 3) -> ExpertPass:
    x_nD = torch.arange(2.0 * len(tokens)).reshape(-1, 2)
    return ExpertPass(layer, expert, torch.tensor(tokens, dtype=torch.int64), gates, x_nD, f_nD[:, :1] + 1, f_nD)


def totals_of(sums: LayerSums, positions: int) -> dict[str, np.ndarray]:
    """One layer's sums as a criterion reads them, [1, E]."""
    found = {name: t.sum(0).numpy()[None] for name, t in sums.sums.items()}
    found["peak"] = sums.sums["peak"].max(0).values.numpy()[None]
    return found | {"positions": np.array([[positions]])} | WEIGHED


@pytest.fixture
def worked() -> LayerSums:
    """Expert 1 of 3 sees tokens 0, 2 and 3 of four; tokens 0 and 1 are of group 0, the others of group 1."""
    sums = LayerSums(torch.tensor([0, 0, 1, 1]), groups=2, experts=3)
    sums.expert(seen(1, [0, 2, 3], GATES, OUTPUTS))
    h_TD = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    routed_TD = torch.tensor([[0.0, 1.0], [5.0, 5.0], [1.0, 0.0], [-2.0, 0.0]])
    sums.block(BlockPass(3, h_TD, h_TD, routed_TD, None))
    return sums


TURNS = 1 - 1 / math.sqrt(2), 0.0, 2.0  # 1 − cosine for 45°, 0° and 180°
WORKED = {
    "frequency": 3,
    "mass": 0.5 + 0.25 + 0.75,
    "reap": (0.5 * 5 + 0.25 * 13 + 0.75 * 17) / 3,
    "ean": 5 + 13 + 17,
    "man": (5 + 13 + 17) / 3,
    "msan": (25 + 169 + 289) / 3,
    "dropout": (0.5 * 25 + 0.25 * 169 + 0.75 * 289) / 4,
    "squared_loss": (0.25 * 25 + 0.0625 * 169 + 0.5625 * 289) / 4,
    "aimer": math.sqrt(25 / 2) / (7 / 2),
    "easy_ep": 0.5 * 5 * TURNS[0] + 0.25 * 13 * TURNS[1] + 0.75 * 17 * TURNS[2],
}


def test_every_criterion_is_worked_by_hand():
    assert set(WORKED) == set(CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_the_worked_example(worked, name):
    criterion = CRITERIA[name]
    totals = totals_of(worked, positions=4)
    score_LE = criterion.score({need: totals[need] for need in criterion.needs})  # reads no more than it says
    assert score_LE.dtype == np.float64 and score_LE.shape == (1, 3)
    assert score_LE[0, 1] == pytest.approx(WORKED[name], rel=1e-7)
    assert score_LE[0, 0] == score_LE[0, 2] == 0, "an expert that no token reached is worth nothing"
    assert criterion.reference.startswith("https://")


def test_what_else_is_kept_of_the_worked_example(worked):
    assert worked.sums["peak"].tolist() == [[0, 4, 0], [0, 15, 0]]
    assert worked.sums["tokens"].tolist() == [[0, 1, 0], [0, 2, 0]]
    assert worked.sums["gate2"][:, 1].tolist() == [0.25, 0.0625 + 0.5625]
    tensors = worked.tensors()
    assert tensors["inputs_ED"][1].tolist() == [0 + 4 + 16, 1 + 9 + 25]
    assert tensors["inner_EI"][1].tolist() == [16 + 36 + 81]


def test_pairs_of_experts_that_are_selected_together():
    sums = LayerSums(torch.zeros(3, dtype=torch.int64), 1, 4)
    chosen = torch.tensor([[0, 1], [1, 3], [1, 0]])
    sums.route(Routing(0, torch.zeros(3, 4), chosen, torch.full((3, 2), 0.5), torch.zeros(3, 4)))
    assert sums.tensors()["together_EE"].tolist() == [[2, 2, 0, 0], [2, 3, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("name", CRITERIA)
def test_neither_order_nor_passes_of_tokens_matter(worked, name):
    """A popular expert's tokens may come in several passes."""
    parts = LayerSums(torch.tensor([0, 0, 1, 1]), 2, 3)
    for i in (2, 0, 1):
        parts.expert(seen(1, [[0, 2, 3][i]], GATES[i : i + 1], OUTPUTS[i : i + 1]))
    h_TD = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    routed_TD = torch.tensor([[0.0, 1.0], [5.0, 5.0], [1.0, 0.0], [-2.0, 0.0]])
    parts.block(BlockPass(3, h_TD, h_TD, routed_TD, None))
    a, b = (CRITERIA[name].score(totals_of(s, 4)) for s in (worked, parts))
    assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize(
    "name, power", [("mass", 1), ("reap", 1), ("dropout", 1), ("squared_loss", 2), ("ean", 0), ("msan", 0)]
)
def test_how_scores_grow_with_the_gates(name, power):
    scores = []
    for factor in (1.0, 0.5):
        sums = LayerSums(torch.zeros(3, dtype=torch.int64), 1, 1)
        sums.expert(seen(0, [0, 1, 2], factor * GATES, OUTPUTS))
        scores.append(CRITERIA[name].score(totals_of(sums, 3))[0, 0])
    assert scores[1] == pytest.approx(scores[0] * 0.5**power, rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_no_number_is_counted_and_in_no_sum(bad):
    sums = LayerSums(torch.tensor([0, 0, 1, 1]), 2, 3)
    f_nD = OUTPUTS.clone()
    f_nD[1, 0] = bad
    sums.expert(seen(1, [0, 2, 3], GATES, f_nD))
    h_TD = torch.ones(4, 2)
    h_TD[2] = bad  # and its token's stream is gone too
    sums.block(BlockPass(3, h_TD, h_TD, torch.ones(4, 2), None))
    assert sums.sums["nonfinite"].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert sums.sums["tokens"].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert all(t.isfinite().all() for t in sums.tensors().values())
    assert float(sums.sums["norm"].sum()) == 5 + 17


# Cuts -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e-300, 3e5]), min_size=2, max_size=9), st.data())
def test_a_cut_is_the_best_by_score_then_index(scores, data):
    keep = data.draw(st.integers(1, len(scores) - 1))
    guard = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    found = cut(np.array([scores]), (7,), keep, frozenset((7, e) for e in guard))
    order = sorted(range(len(scores)), key=lambda e: (e not in guard, -scores[e], e))
    assert found.kept == {7: tuple(sorted(order[:keep]))}
    last, first = scores[order[keep - 1]], scores[order[keep]]
    assert found.margins[7] == ((last - first) / last if last else 0.0)


def test_a_cut_by_hand():
    score_LE = np.array([[1.0, 4.0, 4.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    found = cut(score_LE, (5, 9), 2)
    assert found.kept == {5: (1, 2), 9: (0, 1)} and found.margins == {5: 0.5, 9: 0.0}
    guarded = cut(score_LE, (5, 9), 2, frozenset({(5, 0), (9, 3)}))
    assert guarded.kept == {5: (0, 1), 9: (0, 3)}


@pytest.mark.parametrize("keep", [-1, 0, 4, 5])
def test_a_count_that_cuts_nothing(keep):
    with pytest.raises(InputError, match=f"asked to keep {keep} of 4 experts"):
        cut(np.ones((1, 4)), (0,), keep)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_never_ranked(bad):
    score_LE = np.ones((2, 4))
    score_LE[1, 2] = bad
    with pytest.raises(InputError, match=r"1 experts have no finite score \(layer 9 expert 2\)"):
        cut(score_LE, (5, 9), 2)


# Domains ----------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    assert ranks(np.array([[10.0, 30.0, 20.0]])).tolist() == [[0.0, 1.0, 0.5]]
    assert ranks(np.array([[0.0, 0.0, 7.0]])).tolist() == [[0.25, 0.25, 1.0]], "equals share a rank"


def test_policies_by_hand():
    """One domain ten times as loud as the other: ranks do not hear it."""
    score_DLE = np.array([[[10.0, 30.0, 20.0]], [[3.0, 1.0, 2.0]]])
    assert combine(score_DLE, "mean").tolist() == [[0.5, 0.5, 0.5]]
    assert combine(score_DLE, "union").tolist() == [[1.0, 1.0, 0.5]]
    assert combine(score_DLE, "intersection").tolist() == [[0.0, 0.0, 0.5]]
    assert combine(score_DLE, "mean", np.array([3.0, 1.0])).tolist() == [[0.25, 0.75, 0.5]]
    for policy in POLICIES:  # a domain without a share is not heard
        assert combine(score_DLE, policy, np.array([0.0, 2.0])).argmax() == 0
    with pytest.raises(InputError, match="unknown domain policy 'vote'; choose from mean, union, intersection, quota"):
        combine(score_DLE, "vote")


def test_quotas_by_hand():
    """Two places for the first domain to one for the second: it names 1 and 2, the second 4, the first 3, then 0."""
    score_DLE = np.array([[[1.0, 9.0, 8.0, 7.0, 0.0]], [[3.0, 2.0, 1.0, 0.0, 9.0]]])
    assert combine(score_DLE, "quota", np.array([2.0, 1.0])).tolist() == [[0.2, 1.0, 0.8, 0.4, 0.6]]
    assert combine(score_DLE, "quota").tolist() == [[0.4, 1.0, 0.6, 0.2, 0.8]]  # in turn: 1, 4, 2, 0, 3


@given(st.integers(1, 20), st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_each_domain_has_its_share_of_any_number_of_places(keep, shares):
    """Domains that want different experts: of the first k, each has named its share, rounded down, at least."""
    domains, experts = len(shares), 20 * len(shares)
    score_DLE = np.zeros((domains, 1, experts))
    for d in range(domains):
        score_DLE[d, 0, d * 20 : d * 20 + 20] = np.arange(20, 0, -1)
    kept = cut(combine(score_DLE, "quota", np.array(shares, float)), (0,), keep).kept[0]
    for d, share in enumerate(shares):
        assert sum(e // 20 == d for e in kept) >= math.floor(keep * share / sum(shares))


@given(st.permutations(range(5)), st.sampled_from(("mean", "union", "intersection")))
def test_renumbering_experts_renumbers_scores(order, policy):
    score_DLE = np.random.default_rng(0).integers(0, 3, (3, 2, 5)).astype(float)
    assert np.array_equal(combine(score_DLE[..., order], policy), combine(score_DLE, policy)[..., order])


# Selections -------------------------------------------------------------------------------------------------------


def statistics(tokens_LDHE: np.ndarray, **more: np.ndarray) -> Statistics:
    """Every routed token with gate ½ and norm 2, unless told otherwise."""
    t = tokens_LDHE.astype(float)
    sums = {name: np.zeros_like(t) for name in (*SUMS, "nonfinite")}
    sums |= {"tokens": t, "gate": t / 2, "gated": t.copy(), "norm": 2 * t, "peak": np.ones_like(t)} | more
    layers, domains = t.shape[:2]
    positions = np.full((domains, 2), t[0].sum() / 2 / (2 * domains))
    names, layers = tuple(f"d{i}" for i in range(domains)), tuple(range(3, 3 + layers))
    weighed = {name: np.ones((len(layers), t.shape[-1])) for name in WEIGHT_SUMS}
    return Statistics(layers, names, sums, positions, (Path(),), weighed)


def halves(rows: list[list[int]]) -> np.ndarray:
    """One domain, equal halves: [L, 1, 2, E] from tokens [L][E]."""
    return np.repeat(np.array(rows)[:, None, None, :], 2, axis=2)


def test_a_selection_and_its_facts():
    found = select_experts(statistics(halves([[90, 10, 60, 40], [50, 80, 50, 90]])), "frequency", 2)
    assert found.cut.kept == {3: (0, 2), 4: (1, 3)}
    facts = found.facts()
    assert facts["kept"] == {"3": [0, 2], "4": [1, 3]} and facts["jaccard"] == {"3": 1.0, "4": 1.0}
    assert facts["margins"] == {"3": pytest.approx(1 / 3), "4": pytest.approx(3 / 8)}
    assert facts["warnings"] == [
        "1 experts were reached by fewer than 32 of 200 tokens (layer 3 expert 1); their rank is a guess"
    ]


def test_the_same_statistics_ranked_for_other_domains():
    """Domain d0 is larger and wants 0 and 1, d1 wants 2 and 3."""
    t = np.repeat(np.array([[90, 80, 20, 10], [0, 10, 40, 50]])[None, :, None, :], 2, axis=2)

    def kept(policy: str = "pooled", **domains: float) -> tuple[int, ...]:
        return select_experts(statistics(t), "frequency", 2, policy, domains or None).cut.kept[3]

    assert kept() == kept(d0=1) == kept(d0=1, d1=1) == (0, 1)
    assert kept(d1=1) == kept(d0=0, d1=1) == kept(d0=1, d1=9) == (2, 3)
    assert kept("mean") == (0, 1) and kept("mean", d0=1, d1=3) == (2, 3)
    assert kept("quota") == kept("quota", d0=3, d1=2) == (0, 3) and kept("quota", d0=3, d1=1) == (0, 1)
    assert kept("quota", d1=1) == (2, 3)
    facts = select_experts(statistics(t), "frequency", 2, "mean", {"d1": 2.0}).facts()
    assert facts["domains"] == {"d0": 0.0, "d1": 2.0} and facts["policy"] == "mean"


@pytest.mark.parametrize(
    "domains, sentence",
    [
        ({"code": 1.0}, "unknown domain 'code' in the text; choose from d0, d1"),
        ({"d0": -1.0, "d1": 1.0}, "wanted numbers from 0 up, and one above 0"),
        ({"d0": 0.0}, "wanted numbers from 0 up, and one above 0"),
        ({}, "wanted numbers from 0 up, and one above 0"),
    ],
)
def test_domains_that_will_not_do(domains, sentence):
    with pytest.raises(InputError, match=sentence):
        select_experts(statistics(np.ones((1, 2, 2, 4))), "frequency", 2, "pooled", domains)


def test_weights_are_ranked_without_text_or_not_at_all():
    whole = statistics(halves([[4, 3, 2, 1]]))
    weights = {name: np.array([v]) for name, v in zip(WEIGHT_SUMS, ([4.0, 1, 3, 2], [9.0] * 4, [4.0] * 4))}
    none = {name: a[:, :0] for name, a in whole.sums.items()}
    found = select_experts(Statistics((3,), (), none, np.zeros((0, 2)), (), weights), "aimer", 2)
    assert found.cut.kept == {3: (1, 3)} and found.few == () and found.tokens == 0
    assert found.warnings == [
        "no text was read: experts whose loss would wreck the model, if there are any, are not known"
    ]
    bare = Statistics(whole.layers, whole.domains, whole.sums, whole.positions_DH, whole.folders)
    with pytest.raises(InputError, match="aimer reads weights, and these statistics hold none"):
        select_experts(bare, "aimer", 2)


def test_halves_that_disagree_are_said():
    t = np.array([[[[90, 80, 40, 40], [40, 40, 80, 90]]]])
    found = select_experts(statistics(t), "frequency", 2)
    assert found.jaccard_L.tolist() == [0.0]
    assert any("two halves agree on only 0% of the kept experts" in w for w in found.warnings)
    assert jaccard((0, 1, 2), (1, 2, 3)) == 0.5


def test_a_super_expert_is_kept_whatever_its_score():
    t = halves([[90, 80, 70, 60, 50, 40, 40, 33]])
    peak = np.ones(t.shape)
    peak[..., 7] = 500.0
    plain, guarded = (select_experts(statistics(t, **more), "frequency", 3) for more in ({}, {"peak": peak}))
    assert plain.cut.kept == {3: (0, 1, 2)} and plain.protected == ()
    assert guarded.cut.kept == {3: (0, 1, 7)} and guarded.facts()["protected"] == [[3, 7]]


def test_an_ordinary_loudest_expert_is_not_protected():
    t = halves([[90, 80, 70, 60, 50, 40, 40, 33]])
    peak = np.broadcast_to(np.arange(1.0, 9.0), t.shape)
    assert select_experts(statistics(t, peak=peak.copy()), "frequency", 3).protected == ()


def test_experts_with_values_that_are_no_numbers_are_named():
    t = halves([[90, 80, 70, 60]])
    bad = np.zeros(t.shape)
    bad[..., 2] = 4
    found = select_experts(statistics(t, nonfinite=bad), "frequency", 2)
    assert found.nonfinite == ((3, 2, 8),) and found.facts()["nonfinite"] == [[3, 2, 8]]
    assert "1 experts gave NaN or infinite values (layer 3 expert 2); those tokens count for nothing" in found.warnings
    t[..., 2] = 0
    with pytest.raises(InputError, match=r"1 experts gave no finite value \(layer 3 expert 2\) and cannot be ranked"):
        select_experts(statistics(t, nonfinite=bad), "frequency", 2)


def test_a_long_list_is_cut_short():
    found = select_experts(statistics(halves([[90, 90, 1, 1, 1, 1, 1, 1]])), "frequency", 2)
    assert any("6 experts" in w and "and 2 more" in w for w in found.warnings)


@pytest.mark.parametrize("criterion, policy", list(itertools.product(CRITERIA, ("pooled", *POLICIES))))
def test_every_criterion_with_every_policy_on_the_smallest_calibration(criterion, policy):
    """One row of text: the other half is empty, and nothing may divide by it."""
    t = np.zeros((1, 2, 2, 4))
    t[0, 0, 0] = [4, 3, 2, 1]
    s = statistics(t)
    s.positions_DH[:] = [[5, 0], [0, 0]]
    with np.errstate(all="raise"):
        found = select_experts(s, criterion, 2, policy)
    assert len(found.cut.kept[3]) == 2


def test_names_that_there_are_not():
    s = statistics(halves([[4, 3, 2, 1]]))
    with pytest.raises(
        InputError, match="unknown criterion 'luck'; choose from aimer, dropout, ean, easy_ep, frequency"
    ):
        select_experts(s, "luck", 2)
    with pytest.raises(InputError, match="unknown domain policy 'vote'"):
        select_experts(s, "frequency", 2, "vote")
