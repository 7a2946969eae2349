"""evaluate/needle.py: rows that hold what they say, figures by hand, and a control that small trained models pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from reference import Reference
from test_evaluate import changed, noisy

from moesaic.checkpoint import Checkpoint
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import InputError
from moesaic.evaluate import Conditions, Reading, evaluate
from moesaic.evaluate.scores.needle import CONTROL, haystacks
from moesaic.measure.divergence import Estimate


def made(checkpoint: Checkpoint, lengths: list[int], **more: Any) -> list[Reading]:
    return haystacks(checkpoint, lengths, **more)


def test_rows_hold_a_needle_where_they_say(m3: Checkpoint) -> None:
    (reading,) = made(m3, [700], samples=3)
    tokenizer = Tokenizer.open(m3.path)
    assert reading.ids_BT.shape == (18, 700) and reading.kind == "needle"
    assert list(reading.parts) == ["depth 0%", "depth 25%", "depth 50%", "depth 75%", "depth 100%", CONTROL]
    for part, rows_B in reading.parts.items():
        for ids_T, scored_S in zip(reading.ids_BT[rows_B], reading.scored_BS[rows_B]):
            text, answer = tokenizer.inner.decode(ids_T.tolist()), tokenizer.inner.decode(ids_T[1:][scored_S].tolist())
            assert text.endswith(answer) and scored_S[-1] and scored_S.sum() == len(answer)  # a byte a token
            if part == CONTROL:
                assert "special number" not in text and answer in (" to", " of")
                continue
            needle = text.index("The special number of the")
            thing = text[needle + 26 :].split(" is")[0]
            assert f"The special number of the {thing} is{answer}." in text and len(answer) == 8
            assert text.count(answer.strip()) == 2 and text.count(thing) == 3
            question = text.index("What is the special number")
            depth = float(part.split()[1][:-1]) / 100
            assert abs(needle - depth * question) < 60  # at the nearest end of a sentence
    again, other = made(m3, [700], samples=3)[0], made(m3, [700], samples=3, seed=1)[0]
    assert again.identity == reading.identity != other.identity


@pytest.mark.parametrize(("length", "message"), [(100, "take"), (5000, "context, 4,096")])
def test_lengths_that_cannot_be_are_refused(m3: Checkpoint, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(m3, [length])


def test_figures_are_those_of_two_whole_models(m2: Checkpoint, tmp_path: Path) -> None:
    export, readings = changed(m2.path, tmp_path / "export", noisy), made(m2, [300, 360], samples=2)
    scores = evaluate(m2, export, readings, tmp_path, Conditions(device="cpu", floor=False), quiet=True)
    assert {s.name for s in scores.scores} == {
        "needle_found_source", "needle_found_export", "needle_log_p_source", "needle_log_p_export", "needle_delta_log_p",
    }  # fmt: skip
    for reading in readings:
        rows_B = reading.parts["depth 50%"]
        ids_BT, scored_BS = reading.ids_BT[rows_B], reading.scored_BS[rows_B]
        each = []
        for path in (m2.path, export.path):
            log_p = (
                Reference(path).logits(ids_BT)[:, :-1].double().log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
            )
            each.append((log_p * scored_BS).sum(-1) / scored_BS.sum(-1))
        found = [scores.find(f"needle_{n}", "depth 50%", reading.name) for n in ("log_p_source", "delta_log_p")]
        wanted = [each[0].mean().item(), (each[1] - each[0]).mean().item()]
        assert [s.value for s in found if s] == pytest.approx(wanted, abs=1e-4) and found[0].rows == 2  # type: ignore[union-attr]
        assert abs(wanted[1]) > 1e-3


def test_wilson_by_hand() -> None:
    none, half = Estimate.of_share(0, 10), Estimate.of_share(5, 10)
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(0.2775, abs=1e-4)
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize("family", ["m3", "m2"])
def test_small_trained_models_pass_the_control_and_fail_it_when_it_is_spoilt(family: str, tmp_path: Path) -> None:
    """Neither model finds numbers; that both finish set phrases says that rows of this length are read right."""
    path = SHARED / "testbed" / family
    if not path.exists():
        pytest.skip("no trained models beside this clone")
    model = Checkpoint.open(path)
    (reading,) = made(model, [360], depths=(0.5,), samples=6)
    swapped_BT = torch.cat([reading.ids_BT[:, :-2], reading.ids_BT[:, -1:], reading.ids_BT[:, -2:-1]], 1)
    spoilt = replace(reading, name="spoilt", ids_BT=swapped_BT)
    scores = evaluate(model, model, [reading, spoilt], tmp_path, Conditions(device="cpu", floor=False), quiet=True)
    found = {r.name: scores.find("needle_found_source", CONTROL, r.name) for r in (reading, spoilt)}
    assert found[reading.name].value >= 0.75 and found["spoilt"].value == 0  # type: ignore[union-attr, operator]
    hidden = scores.find("needle_found_source", reading=reading.name)
    assert hidden is not None and hidden.value == 0 and 0.3 < hidden.high < 0.5  # type: ignore[operator]
