"""Long context: whether a number hidden in a long text is found, by length and depth."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ...evaluate import Score
from .. import words
from ..blocks import Block, Drawing, Heading, Section, Table, Text
from ..facts import Facts
from ..grids import Paint, Row, grid, tone
from .base import Part

CONTROL = "control"
MODELS = {"source": "Source", "export": "Export"}


def section(facts: Facts) -> Section | None:
    if facts.scores is None:
        return None
    readings = {r["name"]: r for r in facts.scores.facts["readings"] if r["kind"] == "needle"}
    if not readings:
        return None
    first = next(iter(facts.ways), "none")
    mine = [s for s in facts.scores.scores if s.reading in readings and s.activations in (first, "served")]
    blocks: list[Block] = []
    for model, name in MODELS.items():
        found = [s for s in mine if s.name == f"needle_found_{model}"]
        if found:
            blocks += [Heading(name), Drawing(cells(found, readings, name))]
    blocks += [Heading("By length"), table(mine, readings)]
    counts = next(iter(readings.values()))["facts"]
    aside: list[Text] = [
        f"A number of seven digits hidden in made sentences and asked for at the end; {counts['samples']} in each cell, seed "
        f"{counts['seed']}. Found: each of its tokens is the model's first choice.",
        "The control is a set phrase at the end of the same text, which needs no finding. Where it fails, a needle that is not "
        "found says nothing of finding.",
    ]
    return Section("In long contexts", aside, blocks)


def cells(found: list[Score], readings: Mapping[str, Any], name: str) -> Markup:
    """Lengths across, depths down, the control last; in each cell the share found."""
    parts = list(dict.fromkeys(s.part for s in found if s.part))
    by = {(s.reading, s.part): s.value for s in found}
    rows = []
    for part in parts:
        values = [by.get((reading, part)) for reading in readings]
        color = "var(--fate-1)" if part == CONTROL else "var(--fate-0)"
        paint = [None if v is None else Paint(color, tone(v * 0.8)) for v in values]
        rows.append(Row(part, paint, ["" if v is None else f"{v:.0%}" for v in values]))
    lengths = [f"{r['facts']['length']:,}" for r in readings.values()]
    return grid(f"Needles that the {name.lower()} found", rows, lengths, "tokens")


def table(mine: list[Score], readings: Mapping[str, Any]) -> Table:
    rows = []
    for reading, told in readings.items():
        whole = {s.name: words.figure(s) for s in mine if s.reading == reading and not s.part}
        row: list[Text] = [f"{told['facts']['length']:,}"]
        for name in ("needle_found_source", "needle_found_export", "needle_delta_log_p"):
            shown = whole.get(name)
            row.append(f"{shown['value']} {shown['error']} {shown['unit']}" if shown else "")
        rows.append(row)
    return Table(
        ("tokens", "found by source", "found by export", "Δ ln p of the answer, a token"), rows, left=(), optional=(3,)
    )


PART = Part(name="needle", place=60, section=section)
