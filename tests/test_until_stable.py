"""How much text is enough: the order of rows, the rungs, and whole runs on a small model, held to plain calibration."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from children import contents

import moesaic.calibrate.until_stable as settle_module
from moesaic.calibrate import Statistics, calibrate
from moesaic.calibrate.selection import select_experts
from moesaic.calibrate.until_stable import Step, calibrate_until_stable, halving, rungs, score_error, spread, table
from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet, sha256_of


def pool_of(rows: list[int], length: int = 10) -> TokenSet:
    """So many rows of each domain."""
    ids_BT = torch.arange(sum(rows) * length).reshape(-1, length)
    domain_B = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    facts = {"ids_sha256": sha256_of(ids_BT), "tokenizer_sha256": "0"}
    return TokenSet(ids_BT, domain_B, tuple(f"d{i}" for i in range(len(rows))), facts)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two domains of words drawn from different lists, so that experts differ; 16 tokens a row."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = {"code": ["def", "return", "x", "+", "1", "if", "for", "in"], "prose": ["the", "sum", "of", "parts"]}
    for domain, mine in words.items():
        lines = rng.choice(mine, (700, 8))
        (folder / f"{domain}.txt").write_text("\n".join(f"{i} {' '.join(line)}" for i, line in enumerate(lines)))
    return Corpus(folder, tokens=128, length=16)


# Order ------------------------------------------------------------------------------------------------------------


def test_each_next_number_lies_in_the_widest_gap():
    assert halving(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert halving(5) == [0, 4, 2, 1, 3] and halving(1) == [0] and halving(0) == []


def test_any_prefix_has_all_domains_and_is_spread_over_each():
    pool = pool_of([64, 64, 5])
    order = spread(pool)
    assert sorted(order) == list(range(133))
    assert order[:6] == [0, 64, 128, 32, 96, 132]  # the first of each domain, then the middle (of five: the last)
    for n in (20, 50, 100):
        first = sorted(row for row in order[:n] if row < 64)
        assert max(b - a for a, b in itertools.pairwise([*first, 64])) <= 2 * 64 / len(first) + 1


def test_every_rung_doubles_what_was_read():
    pool = pool_of([20, 20])
    found = list(rungs(pool, 80))
    assert [len(rows) for rows in found] == [4, 4, 8, 16, 8]  # the text ends
    assert sorted(itertools.chain(*found)) == list(range(40))
    assert next(rungs(pool, 160)) == sorted(found[0] + found[1]), "other rungs of the same order"
    assert [len(rows) for rows in rungs(pool_of([3]), 10)] == [1, 1, 1]


# Runs -------------------------------------------------------------------------------------------------------------


def steps_of(*still: bool) -> list[Step]:
    return [Step(50, 100, 1.0 if s else 0.5, 0.5, 0.1, 0.0, 0.1, 0.0) for s in still]


def test_what_counts_as_still():
    step = Step(50, 100, 0.96, 0.8, 0.3, 0.01, 0.5, 0.01)
    assert step.still
    for change in ({"jaccard": 0.94}, {"margin_moved": 0.03}, {"error_moved": 0.03}, {"before": 51}):
        assert not dataclasses.replace(step, **change).still


def test_a_run_stops_when_a_doubling_moves_nothing(m2, corpus, tmp_path, monkeypatch):
    """The second doubling does, by decree; what it returns are the statistics of just the rows it says."""
    found = iter(steps_of(False, True))
    monkeypatch.setattr(settle_module, "compared", lambda *_: next(found))
    stability = calibrate_until_stable(m2, corpus, tmp_path / "work", [4], quiet=True)
    assert stability.stable and stability.statistics.tokens == stability.tokens.tokens == 256
    assert stability.verdict.startswith("128 tokens were enough: with twice as many")
    plain = calibrate(m2, stability.tokens, tmp_path / "plain" / "stats", quiet=True)
    for name, sums in plain.totals().items():
        assert stability.statistics.totals()[name] == pytest.approx(sums, rel=1e-5), name
    note = json.loads((tmp_path / "work" / "settled.json").read_text())
    assert note["stable"] and note["read_tokens"] == 256 and [s["still"] for s in note["steps"]] == [False, True]
    assert table(stability).row_count == 2


def test_the_steps_are_what_they_say(m2, corpus, tmp_path, monkeypatch):
    """Redone from the rows of each rung by plain calibration; the text may end before anything is still."""
    monkeypatch.setattr("moesaic.data.corpus.POOL_TOKENS", 16 * 64)
    stability = calibrate_until_stable(m2, corpus, tmp_path / "work", [4, 6], quiet=True)
    assert not stability.stable or stability.steps[-1].still
    pool, read, before = corpus.pool(m2, tmp_path / "pool.safetensors"), [], None
    for number, rows in enumerate(rungs(pool, 128)):
        read += rows
        if number > len(stability.steps):
            break
        now = calibrate(m2, pool.take(read), tmp_path / f"plain-{number}" / "stats", quiet=True)
        cuts = {k: select_experts(now, "reap", k).cut.kept for k in (4, 6)}
        if before is not None:
            step = stability.steps[number - 1]
            agree = {
                k: [len({*cuts[k][n]} & {*before[k][n]}) / len({*cuts[k][n]} | {*before[k][n]}) for n in cuts[k]]
                for k in cuts
            }
            assert step.tokens == now.tokens
            assert step.jaccard == pytest.approx(min(np.mean(a) for a in agree.values()))
            assert step.jaccard_least == min(min(a) for a in agree.values())
        before = cuts


def test_a_text_that_ends_is_said(m2, corpus, tmp_path, monkeypatch):
    real = settle_module.compared
    monkeypatch.setattr(settle_module, "compared", lambda *a: dataclasses.replace(real(*a), jaccard=0.5))
    monkeypatch.setattr("moesaic.data.corpus.POOL_TOKENS", 16 * 16)
    stability = calibrate_until_stable(m2, corpus, tmp_path / "a", [4], quiet=True)
    assert not stability.stable and stability.statistics.tokens == 256
    assert stability.verdict == "the choice still moves with 256 tokens, all that the text holds; give more"
    monkeypatch.setattr("moesaic.data.corpus.POOL_TOKENS", 16 * 20)
    stability = calibrate_until_stable(m2, corpus, tmp_path / "b", [4], quiet=True)
    assert not stability.stable and [(s.before, s.tokens) for s in stability.steps] == [
        (64, 128),
        (128, 256),
        (256, 320),
    ]
    assert stability.verdict.startswith("the text ends with 320 tokens, before a doubling could tell")


def test_a_longer_run_sweeps_only_what_is_new(m2, corpus, tmp_path, monkeypatch):
    """And an interrupted one goes on: what stands in the folder is read, not made again."""
    swept: list[int] = []
    real = settle_module.calibrate

    def counting(checkpoint: Checkpoint, tokens: TokenSet, folder: Path, quiet: bool) -> Statistics:
        if not (folder / tokens.identity).exists():
            swept.append(tokens.tokens)
        if len(swept) == 3 and interrupt:
            raise KeyboardInterrupt
        return real(checkpoint, tokens, folder, quiet)

    interrupt = True
    monkeypatch.setattr(settle_module, "calibrate", counting)
    monkeypatch.setattr(settle_module, "compared", lambda *_: next(found))
    found = iter(steps_of(False))
    with pytest.raises(KeyboardInterrupt):
        calibrate_until_stable(m2, corpus, tmp_path / "one", [4], quiet=True)
    interrupt, found = False, iter(steps_of(False, False, True))
    calibrate_until_stable(m2, corpus, tmp_path / "one", [4], quiet=True)
    assert swept == [64, 64, 128, 128, 256], "the third was interrupted before it began"
    found = iter(steps_of(False, False, True))
    calibrate_until_stable(m2, corpus, tmp_path / "two", [4], quiet=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_error_of_scores_by_hand():
    """Two experts whose halves score 1 and 3, 2 and 2: half the difference is 1 and 0, the mean score 2."""
    tokens = np.ones((1, 1, 2, 2))
    gated = np.array([[[[1.0, 2.0], [3.0, 2.0]]]])
    sums = {name: np.zeros((1, 1, 2, 2)) for name in ("peak", "nonfinite")} | {"tokens": tokens, "gated": gated}
    s = Statistics((0,), ("d",), sums, np.ones((1, 2)), ())
    assert score_error(s, "reap", "pooled", None) == pytest.approx(np.sqrt(0.5) / 2)
