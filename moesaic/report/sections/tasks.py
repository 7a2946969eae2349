"""Tasks: marks of source and export with their errors, and the answers that changed."""

import re

from ...evaluate import Score
from .. import plots, words
from ..blocks import Block, Drawing, Heading, Section, Table, Text, two_lines
from ..facts import Facts
from ..plots import Mark
from .base import Part

NAMED = re.compile(r"task_(.+)_(source|export|delta|flips|mcnemar_p)")


def section(facts: Facts) -> Section | None:
    if facts.scores is None:
        return None
    first = next(iter(facts.ways), "none")
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for score in facts.scores.scores:
        if (named := NAMED.fullmatch(score.name)) and score.activations == first:
            found.setdefault((score.reading, named[1]), {})[named[2]] = score
    if not found:
        return None
    rows: list[list[Text]] = []
    marks = []
    for (task, metric), of in found.items():
        cells = [figure(of.get(which)) for which in ("source", "export", "delta")]
        flips = words.figure(of["flips"]) if "flips" in of else None
        chance = words.significant(of["mcnemar_p"].value or 0.0) if "mcnemar_p" in of else ""
        count = f"{of['source'].rows:,} documents"
        rows.append([two_lines(task, f"{metric}, {count}"), *cells, f"{flips['value']} %" if flips else "", chance])
        delta = of.get("delta")
        if delta is not None and delta.value is not None:
            low, high = (None if x is None else 100 * x for x in (delta.low, delta.high))
            marks.append(Mark(f"{task} {metric}", 100 * delta.value, low, high))
    head = ("task", "source", "export", "Δ, paired", "flips", "McNemar p")
    blocks: list[Block] = [Table(head, rows, optional=(4, 5))]
    if marks:
        plot = plots.whiskers(
            "tasks", "Change of each task's mark", marks, "percentage points, 95 % intervals", signed=True
        )
        blocks += [Heading("What changed"), Drawing(plot)]
    aside: list[Text] = [
        "Log-likelihood tasks of lm-evaluation-harness, scored by the harness itself, for both models in one sweep.",
        "Flips are answers that went from right to wrong or back; McNemar's p is the chance that so uneven a split of them is "
        "chance. Marks that agree may hide flips that cancel.",
    ]
    return Section("At tasks", aside, blocks)


def figure(score: Score | None) -> Text:
    if score is None:
        return ""
    shown = words.figure(score)
    return two_lines(f"{shown['value']} {shown['unit']}", shown["error"])


PART = Part(name="tasks", place=70, section=section)
