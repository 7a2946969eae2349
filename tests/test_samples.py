"""Samples: writers whose answers are known, and real models asked in full, side by side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluate import changed, noisy

from moesaic.checkpoint import Checkpoint
from moesaic.cli.evaluate import SCORES, SWEPT
from moesaic.data.tokenizer import Tokenizer
from moesaic.evaluate import EVALUATIONS
from moesaic.evaluate.samples import PROBES, PROMPTS, Prompt, compare, judge, local
from moesaic.evaluate.samples.writing import asked
from moesaic.evaluate.scores import Score, Scores
from moesaic.recipes.evaluate import OF_TEXT, chosen

RIGHT = {
    "train": "It came 60 + 160 = 220 miles in 3.5 hours: 62.86 mph.",
    "sql": "SELECT c.name, SUM(o.total) FROM customers c JOIN orders o ON o.customer_id = c.id "
    "WHERE o.ordered_on >= '2024-01-01' GROUP BY c.id ORDER BY 2 DESC LIMIT 5;",
    "rust": "impl Point { fn distance(&self, other: &Point) -> f64 { (self.x - other.x).hypot(self.y - other.y) } }",
    "tool call": '<invoke name="get_weather"><parameter name="city">Lisbon</parameter></invoke>',
    "binary search": "def binary_search(items, target):\n    middle = (low + high) // 2\n    return middle",
    "japanese": "日本の首都は東京です。",
}


def test_right_answers_are_right_and_others_are_not(m3: Checkpoint) -> None:
    tokenizer = Tokenizer.open(m3.path)
    prompts = [p for p in PROMPTS if p.name in RIGHT]
    assert len(prompts) == len(RIGHT)
    right = judge(prompts, [RIGHT[p.name] for p in prompts], 0.0, tokenizer)
    wrong = judge(prompts, [RIGHT[p.name][::-1] for p in prompts], 0.0, tokenizer)
    assert all(a["right"] and not a["endless"] for a in right) and not any(a["right"] for a in wrong)


def test_loops_are_seen_and_what_has_no_right_answer_has_none(m3: Checkpoint) -> None:
    tokenizer = Tokenizer.open(m3.path)
    ends, escapes = (
        "And so it goes. " * 30,
        "word for word " * 30 + "until it came to " + "".join(map(chr, range(65, 123))),
    )
    found = judge(PROBES[:3], [ends, escapes, "Once upon a time there was a keeper."], 0.7, tokenizer)
    assert [a["endless"] for a in found] == [True, False, False] and [a["right"] for a in found] == [None] * 3
    assert found[0]["looped"] > 0.9 > found[1]["looped"] > 0.5 and found[2]["looped"] == 0


def test_figures_of_known_writers(m3: Checkpoint) -> None:
    def knows(prompts: Sequence[Prompt], new_tokens: int, temperature: float) -> list[str]:
        return [RIGHT.get(p.name, "I do not know.") for p in prompts]

    def loops(prompts: Sequence[Prompt], new_tokens: int, temperature: float) -> list[str]:
        return ["again and " * (20 if temperature == 0 else 1) for _ in prompts]

    scores, facts = compare({"source": knows, "export": loops}, Tokenizer.open(m3.path))
    found = {s.name: s for s in scores}
    assert found["sample_right_source"].value == pytest.approx(6 / 15) and found["sample_right_export"].value == 0
    assert found["sample_right_export"].low == 0 and 0.1 < found["sample_right_export"].high < 0.25  # type: ignore[operator]
    assert found["sample_endless_source"].value == 0 and found["sample_endless_export"].value == pytest.approx(19 / 23)
    assert len(facts["samples"]) == 15 + 2 * 4 and facts["samples"][0]["source"]["right"] is True
    assert {s["temperature"] for s in facts["samples"]} == {0.0, 0.7}


def test_two_models_side_by_side(m2: Checkpoint, tmp_path) -> None:  # type: ignore[no-untyped-def]
    export = changed(m2.path, tmp_path / "export", noisy)
    tokenizer = Tokenizer.open(m2.path)
    tool = next(p for p in PROMPTS if p.tools)
    assert tokenizer.inner.decode(asked(tokenizer, tool), skip_special_tokens=False).endswith("]~b]ai\n<think>\n")
    scores, facts = compare({"source": local(m2), "export": local(export)}, tokenizer, tokens=(6, 8))
    again, same = compare({"source": local(m2), "export": local(m2)}, tokenizer, tokens=(6, 8))
    assert len(facts["samples"]) == 23 and all(sample["source"]["text"] for sample in facts["samples"][:3])
    assert any(sample["source"]["text"] != sample["export"]["text"] for sample in facts["samples"])
    assert all(sample["source"] == sample["export"] for sample in same["samples"])
    assert {s.unit for s in scores} == {"share"} and len(again) == 6


def test_files_of_the_former_name_are_read(tmp_path: Path) -> None:
    """Version 0.1 wrote spots; no report of it is lost."""
    score = Score(
        reading="samples", name="sample_right_export", part="", value=0.5, error=0.1, low=0.4, high=0.6, unit="share",
        tokens=9, rows=2, activations="none", seed=0,
    )  # fmt: skip
    kld = replace(score, reading="text", name="kl_mean")
    now = Scores((score, kld), {"samples": {"samples": [1], "seed": 0}, "readings": []})
    now.write(tmp_path / "scores.json", {})
    assert Scores.read(tmp_path / "scores.json") == now
    text = (tmp_path / "scores.json").read_text()
    before = text.replace('"sample_right', '"spot_right').replace('"reading": "samples"', '"reading": "spots"')
    (tmp_path / "scores.json").write_text(before.replace('"samples": {', '"spots": {'))
    assert Scores.read(tmp_path / "scores.json") == now


def test_the_former_name_works_on_the_command_line() -> None:
    said = [chosen(("kld", name), SCORES) for name in ("samples", "spots")]
    assert said == [("kld", "samples")] * 2


def test_scores_are_listed_by_their_files() -> None:
    assert tuple(sorted(EVALUATIONS)) == SWEPT and OF_TEXT == ("kld", "perplexity", "router")
