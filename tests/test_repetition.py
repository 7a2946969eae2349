"""Loops in generated text, worked by hand, and against the plainest search there is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic.evaluate.repetition as repetition_module
from moesaic.data.tokens import TokenSet, sha256_of
from moesaic.evaluate.repetition import COPIES, LEAST_REPEATED, Looped, Probe, looped, probe
from moesaic.generate import Decoder, Sampling, generate

ALL_DIFFERENT = list(range(100, 160))


@pytest.mark.parametrize(
    "ids, wanted",
    [
        ([], Looped(0, 0, 0, False)),
        ([5], Looped(1, 0, 0, False)),
        (ALL_DIFFERENT, Looped(60, 0, 0, False)),
        ([*ALL_DIFFERENT, *[7, 8, 9] * 10], Looped(90, 27, 3, True)),  # ten turns of three: the first is no repetition
        ([*[7, 8, 9] * 10, *ALL_DIFFERENT], Looped(90, 27, 3, False)),  # it got out of it
        ([*ALL_DIFFERENT, *[7, 8, 9] * 10, 7], Looped(91, 28, 3, True)),  # cut off within a turn
        ([7] * 17, Looped(17, 16, 1, True)),
        ([7] * 16, Looped(16, 0, 0, False)),  # 15 repeat: too few
        (ALL_DIFFERENT * 2, Looped(120, 0, 0, False)),  # said twice: a quotation
        (ALL_DIFFERENT * 3, Looped(180, 120, 60, True)),
        ([*[1] * 30, *[2, 3] * 20], Looped(70, 29 + 38, 2, True)),  # two loops; the second repeats more
        ([*[1, 1, 2] * 9, 4, *ALL_DIFFERENT], Looped(88, 24, 3, False)),  # period 3, not the 1s within it
    ],
)
def test_worked_by_hand(ids, wanted):
    assert looped(ids) == wanted


def test_the_share_of_a_text():
    assert looped([*ALL_DIFFERENT, *[7, 8, 9] * 10]).share == 0.3
    assert looped([]).share == 0.0


def plainest(ids: list[int]) -> set[int]:
    """Positions that repeat: every stretch of every period, tried one by one."""
    found: set[int] = set()
    for p in range(1, len(ids) + 1):
        for start in range(len(ids)):
            stop = start + p
            while stop < len(ids) and ids[stop] == ids[stop - p]:
                stop += 1
            if stop - start >= COPIES * p and stop - start - p >= LEAST_REPEATED:
                found |= set(range(start + p, stop))
    return found


@settings(deadline=None)  # the plainest search is cubic
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4), st.integers(1, 12)), max_size=4))
def test_against_the_plainest_search(parts):
    ids = [i for phrase, turns in parts for i in phrase * turns]
    found, wanted = looped(ids), plainest(ids)
    assert found.repeated == len(wanted) and found.endless == (len(ids) - 1 in wanted)
    assert (found.period == 0) == (not wanted)


def test_figures_of_several_texts_by_hand():
    found = Probe.of([Looped(100, 40, 4, True), Looped(50, 0, 0, False), Looped(50, 10, 5, False)])
    assert found.share.value == pytest.approx((0.4 + 0 + 0.2) / 3) and found.share.error == pytest.approx(0.2 / 3**0.5)
    assert found.endless.value == pytest.approx(1 / 3) and (found.prompts, found.new_tokens) == (3, 200)
    assert found.facts()["share"]["value"] == found.share.value


def test_a_probe_is_of_text_that_the_cut_model_writes(m2, monkeypatch):
    """Greedily, of a random model: what `generate` gives of the same beginnings, cut at the end token and looked at."""
    monkeypatch.setattr(repetition_module, "SAMPLING", Sampling())
    ids_BT = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    rows = TokenSet(ids_BT, torch.zeros(3, dtype=torch.int64), ("a",), {"ids_sha256": sha256_of(ids_BT)})
    kept = {layer: (0, 2, 5) for layer in m2.architecture.moe_layers}
    dropped = {layer: [1, 3, 4, 6, 7] for layer in kept}
    texts = generate(Decoder(m2, dropped=dropped), ids_BT[:, :32].tolist(), 64)
    found = probe(m2, rows, kept, new_tokens=64)
    wanted = Probe.of([looped(text.ids) for text in texts])
    assert found == wanted and found.new_tokens == 3 * 64
    assert found.share.value > 0, "a random model loops when it is greedy, or this test sees nothing"
