"""divergence/: every figure against scipy-free slow truths, hand-worked numbers, and the coverage that its docstring claims."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.measure.divergence import FIELDS, Bootstrap, Comparison, Divergence


def compare(
    source_NV: Tensor, export_NV: Tensor, next_N: Tensor, tokens: int = 10**9, ids: int = 10**9
) -> dict[str, Tensor]:
    """`Comparison`, fed in blocks of `tokens` × `ids`."""
    comparison = Comparison.of(next_N)
    for first in range(0, source_NV.shape[1], ids):
        for start in range(0, len(next_N), tokens):
            at, columns = slice(start, min(start + tokens, len(next_N))), slice(first, first + ids)
            comparison.add(at, first, source_NV[at, columns], export_NV[at, columns])
    return comparison.finish()


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    source_NV = scale * torch.randn(rows, vocab, generator=g)
    return (
        source_NV,
        source_NV + 0.3 * torch.randn(rows, vocab, generator=g),
        torch.randint(vocab, (rows,), generator=g),
    )


def test_numbers_worked_by_hand() -> None:
    p = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 64]
    q = [1 / 4, 1 / 2, 1 / 8, 1 / 16, 1 / 64, 1 / 32, 1 / 64]
    shifted = torch.tensor([p]).log() + 7, torch.tensor([q]).log() - 3  # a shift of all logits changes nothing
    found = compare(*shifted, torch.tensor([1]))
    kl_bits = 1 / 2 * 1 + 1 / 4 * -1 + 1 / 32 * 1 + 1 / 64 * -1
    wanted = {
        "kl_nats": kl_bits * math.log(2),
        "nll_source": 2 * math.log(2),
        "nll_export": math.log(2),
        "confidence": 0.5,
        "delta_p": 0.25,
        "same_top1": 0.0,
        "shared_top5": 0.8,
        "greedy_source": 0.0,
        "greedy_export": 1.0,
    }
    assert {name: found[name].item() for name in FIELDS} == pytest.approx(wanted, rel=1e-6)


def test_equal_to_torch_on_whole_logits() -> None:
    source_NV, export_NV, next_N = logits(50, 1000)
    found = compare(source_NV, export_NV, next_N)
    log_p, log_q = source_NV.double().log_softmax(-1), export_NV.double().log_softmax(-1)
    kl_N = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(found["kl_nats"].double(), kl_N, rtol=1e-6)
    assert torch.allclose(
        found["nll_export"], torch.nn.functional.cross_entropy(export_NV, next_N, reduction="none"), rtol=1e-5
    )
    assert torch.equal(found["same_top1"].bool(), source_NV.argmax(-1) == export_NV.argmax(-1))
    for n in range(50):
        five, other = (set(x[n].topk(5).indices.tolist()) for x in (source_NV, export_NV))
        assert found["shared_top5"][n].item() == pytest.approx(len(five & other) / 5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 5), st.sampled_from([0.1, 3.0, 60.0]))
def test_blocks_of_tokens_and_vocabulary_change_nothing(tokens: int, ids: int, seed: int, scale: float) -> None:
    source_NV, export_NV, next_N = logits(9, 64, seed, scale)
    whole, parts = compare(source_NV, export_NV, next_N), compare(source_NV, export_NV, next_N, tokens, ids)
    for name in FIELDS:
        assert torch.allclose(whole[name], parts[name], rtol=1e-6, atol=1e-12), name


def test_kl_of_a_model_with_itself_is_zero_and_of_any_other_is_not_negative() -> None:
    source_NV, export_NV, next_N = logits(200, 300)
    same = compare(source_NV, source_NV + 0.0, next_N, ids=17)
    assert (same["kl_nats"] == 0).all() and (same["same_top1"] == 1).all() and (same["delta_p"] == 0).all()
    assert (compare(source_NV, source_NV + 5, next_N)["kl_nats"] < 1e-7).all()
    assert (compare(source_NV, export_NV, next_N)["kl_nats"] > 0).all()


def test_small_divergences_are_exact_where_float32_would_be_noise() -> None:
    source_NV, _, next_N = logits(20, 5000)
    step_NV = 1e-4 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(1))
    found = compare(source_NV.double(), source_NV.double() + step_NV, next_N, ids=613)["kl_nats"].double()
    p_NV = source_NV.double().softmax(-1)
    variance_N = (p_NV * step_NV**2).sum(-1) - (p_NV * step_NV).sum(-1) ** 2  # KL = half of it, to second order
    assert torch.allclose(found, variance_N / 2, rtol=1e-3) and found.max() < 1e-7


def test_a_planted_nan_is_counted_and_left_out_of_both() -> None:
    source_NV, export_NV, next_N = logits(6, 100)
    clean = compare(source_NV, export_NV, next_N, ids=30)
    source_NV[1, 99], export_NV[4, 0], export_NV[5, 3] = torch.inf, torch.nan, -torch.inf
    found = compare(source_NV, export_NV, next_N, ids=30)
    scored_BS = torch.tensor([[True, True, True], [True, True, False]])  # the last position is not asked for
    split = {name: x[:5] for name, x in found.items()}
    divergence = Divergence.of(scored_BS, split)
    assert divergence.nonfinite == {"source": 1, "export": 1} and divergence.tokens == 3
    assert divergence.counted_BS.tolist() == [[True, False, True], [True, False, False]]
    kept = [0, 2, 3]
    assert Bootstrap(divergence).mean(divergence["kl_nats"]).value == pytest.approx(
        clean["kl_nats"][kept].mean().item()
    )
    assert divergence.values["nll_source"].isnan().sum() == 3  # two positions and the one never read


def rows_of(kl_BS: np.ndarray, other_BS: np.ndarray | None = None) -> Divergence:
    values = {name: torch.zeros(kl_BS.shape) for name in FIELDS} | {"kl_nats": torch.tensor(kl_BS).float()}
    if other_BS is not None:
        values["nll_source"], values["nll_export"] = torch.tensor(kl_BS).float(), torch.tensor(other_BS).float()
    flags = {name: torch.ones(kl_BS.shape, dtype=torch.bool) for name in ("finite_source", "finite_export")}
    return Divergence(torch.ones(kl_BS.shape, dtype=torch.bool), values | flags)


def test_error_of_a_mean_is_that_of_rows_and_not_of_tokens() -> None:
    kl_BS = np.array([[1.0] * 10, [2.0] * 10, [3.0] * 10, [4.0] * 10, [5.0] * 10, [6.0] * 10])
    divergence = rows_of(kl_BS)
    estimate = Bootstrap(divergence).mean(divergence["kl_nats"])
    assert estimate.value == 3.5 and estimate.error == pytest.approx(np.std([1, 2, 3, 4, 5, 6], ddof=1) / 6**0.5)
    assert estimate.low is not None and estimate.high is not None and estimate.low < 3.5 < estimate.high


def test_few_rows_give_no_interval_and_one_row_no_error() -> None:
    for rows, error, interval in ((1, False, False), (4, True, False), (5, True, True)):
        divergence = rows_of(np.random.default_rng(0).random((rows, 8)))
        estimate = Bootstrap(divergence).mean(divergence["kl_nats"])
        assert (estimate.error is not None, estimate.low is not None) == (error, interval)


def test_differences_are_paired_and_seeded() -> None:
    rng = np.random.default_rng(0)
    nll_BS = rng.gamma(2.0, 2.0, (30, 1)) + rng.random((30, 20))  # rows differ far more than the models do
    divergence = rows_of(nll_BS, nll_BS + 0.01 + 0.001 * rng.standard_normal((30, 20)))
    bootstrap = Bootstrap(divergence, seed=4)
    alone, paired = (
        bootstrap.mean(divergence["nll_source"]),
        bootstrap.mean(divergence["nll_export"] - divergence["nll_source"]),
    )
    assert paired.error is not None and alone.error is not None and paired.error < alone.error / 1000
    assert paired.value == pytest.approx(0.01, abs=5 * paired.error)
    again, other = (Bootstrap(divergence, seed=s).mean(divergence["nll_source"]) for s in (4, 5))
    assert again == alone and other.value == alone.value and other.low != alone.low


def test_a_correlation_is_numpys_and_its_error_that_of_drawing_rows_again() -> None:
    rng = np.random.default_rng(0)
    x_BS = rng.standard_normal((40, 16)) + 7
    y_BS = x_BS + 0.5 * rng.standard_normal((40, 16)) + rng.standard_normal((40, 1))
    divergence = rows_of(x_BS, y_BS)
    divergence.scored_BS[3, 5:] = False
    x, y = divergence["nll_source"], divergence["nll_export"]
    found, counted = Bootstrap(divergence).correlation(x, y), divergence.counted_BS
    assert found.value == pytest.approx(np.corrcoef(x[counted], y[counted])[0, 1], rel=1e-9)
    drawn = []
    for _ in range(400):
        rows = rng.integers(0, 40, 40)
        drawn.append(np.corrcoef(x[rows][counted[rows]], y[rows][counted[rows]])[0, 1])
    assert found.error == pytest.approx(np.std(drawn), rel=0.2) and found.low < found.value < found.high
    assert np.isnan(Bootstrap(rows_of(np.ones((6, 4)), np.ones((6, 4)))).correlation(np.ones((6, 4)), x[:6, :4]).value)


def test_quantiles_are_those_of_the_sorted_tokens() -> None:
    kl_BS = np.random.default_rng(0).permutation(1000).reshape(20, 50) + 1.0
    divergence = rows_of(kl_BS)
    median, top = Bootstrap(divergence).quantiles(divergence["kl_nats"], (0.5, 0.99))
    assert (median.value, top.value) == (500.0, 990.0)
    assert median.low is not None and median.high is not None and 400 < median.low < 500 < median.high < 600


def drawn(draw: str, rows: int, seed: int) -> Divergence:
    """Rows of unequal length whose tokens go together, with a mean of 1 in the long run."""
    rng = np.random.default_rng(seed)
    means_B = rng.lognormal(-0.245, 0.7, rows) if draw == "lognormal" else rng.normal(1.0, 0.3, rows)
    divergence = rows_of(np.repeat(means_B[:, None], 12, 1))
    divergence.scored_BS[torch.tensor(rng.random((rows, 12)) < 0.3)] = False
    return divergence


@pytest.mark.parametrize(("draw", "rows"), [("normal", 16), ("lognormal", 16), ("lognormal", 48)])
def test_intervals_cover_what_they_say(draw: str, rows: int) -> None:
    trials, held, naive = 250, 0, 0
    for seed in range(trials):
        divergence = drawn(draw, rows, seed)
        estimate = Bootstrap(divergence, seed).mean(divergence["kl_nats"])
        assert estimate.low is not None and estimate.high is not None
        held += estimate.low <= 1 <= estimate.high
        tokens_N = divergence["kl_nats"][divergence.counted_BS]
        naive += abs(tokens_N.mean() - 1) <= 1.96 * tokens_N.std() / len(tokens_N) ** 0.5
    assert 0.90 <= held / trials <= 0.98
    assert naive / trials < 0.65  # what an error over tokens would have claimed to be 95 %
