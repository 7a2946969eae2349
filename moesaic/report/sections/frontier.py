"""What the bytes could buy: the frontier, its knee, the candidates near the budget as predicted and as measured, the choice."""

from typing import Any

import numpy as np

from .. import words
from ..blocks import Block, Drawing, Heading, Section, Table, Text, two_lines
from ..curves import Point, agreement, frontier
from ..facts import Facts
from .base import Part

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def section(facts: Facts) -> Section | None:
    f, c = facts.frontier, facts.candidates
    if f is None:
        return None
    found, ships = (c["candidates"], c["ships"]) if c else ([], None)
    points = [
        Point(x["name"], x["bytes"], x["predicted_nats"], finite(x["measured_nats"]), x["error"], i == ships)
        for i, x in enumerate(found)
    ]
    unit = next((u for u in UNITS if max(f["bytes"]) >= u[0]), UNITS[-1])
    knee = Point("knee", f["knee"]["bytes"], f["knee"]["predicted_nats"])
    line = (np.array(f["bytes"], float), np.array(f["predicted_nats"], float))
    caption = (
        "The line: the least KL predicted for so many bytes, over every kept count and every mix of formats. The diamond is "
        f"the knee, {f['knee']['experts']} experts in {words.decimal(f['knee']['bytes'])}."
    )
    if c:
        caption += (
            " Open squares: candidates as predicted; full ones: as measured on unseen text, with 95 % intervals; amber: "
            "what ships."
        )
    drawing = frontier(unit, *line, knee, points, f.get("budget_bytes"))
    blocks: list[Block] = [Drawing(drawing, caption)]
    if c:
        blocks += [Heading("Candidates"), table(c)]
    if facts.rule is not None:
        fitted = [Point("", 0, predicted(facts.rule, m), m["nats"], m["error"]) for m in facts.rule["measured"]]
        caption = (
            f"Open: the {len(fitted)} plans that the rule was fitted on. Amber: the candidates, on text it had not seen. "
            "The band is a factor of two either way."
        )
        blocks += [Heading("Prediction held to measurement"), Drawing(agreement(fitted, points), caption)]
    return Section("What the bytes could buy", aside(f), blocks)


def finite(nats: float) -> float | None:
    return nats if np.isfinite(nats) else None


def predicted(rule: dict[str, Any] | Any, measured: dict[str, Any]) -> float:
    """What the fitted rule says of one of the plans that it was fitted on."""
    total = measured["rounding"] + rule["weight"] * measured["dropping"]
    return float(np.exp(rule["a"]) * max(total, 0.0) ** rule["b"])


def aside(f: Any) -> list[Text]:
    budget = f.get("budget_bytes")
    asked = f"; the budget was {words.decimal(budget)} ({words.binary(budget)})" if budget else ""
    found: list[Text] = [
        f"Every choice has a price in bytes and in nats ({f.get('harm', 'measured')}). {f['points']:,} plans are beaten by no "
        f"other at their size{asked}."
    ]
    if error := f["rule"].get("error"):
        factor = f"{np.exp(error):.2f} (root mean square, each plan left out in turn)"
        found.append(f"The rule that adds prices up is right to a factor of {factor}.")
    return found


def table(c: Any) -> Table:
    rows = []
    for x in c["candidates"]:
        nats, error = words.value_error(x["measured_nats"], x["error"])
        size = two_lines(words.decimal(x["bytes"]), words.binary(x["bytes"]))
        measured = two_lines(nats, error and f"± {error}")
        rows.append([x["name"], f"{x['experts']:,}", size, words.significant(x["predicted_nats"]), measured])
    head = ("plan", "experts", "on disk", "predicted", "measured, nats")
    return Table(head, rows, optional=(1,), chosen=c["ships"])


PART = Part(name="frontier", place=30, section=section)
