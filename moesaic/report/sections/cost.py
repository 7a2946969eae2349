"""What it cost: the change of predictions, over the whole vocabulary, with its spread, its tail and where it fell."""

from typing import Any

from ...evaluate import Score
from .. import plots, words
from ..blocks import Block, Drawing, Heading, Section, Table, Text, two_lines
from ..facts import Facts
from ..plots import Mark
from .base import Part

FIRST = (
    "kl_mean", "kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max", "kl_above_1_nat", "ppl_source", "ppl_export",
    "delta_ln_ppl", "top1_agreement", "top5_overlap", "delta_p_mean", "delta_p_rms", "nll_correlation",
)  # fmt: skip
SHORT = ("kl_mean", "kl_median", "kl_p99", "ppl_ratio", "delta_ln_ppl", "top1_agreement", "delta_p_rms")
CONFIDENCE = "confidence "
FLOOR = "floor_kl_mean"
SURE = "The probability that the source gives to its first choice. Damage where it is sure weighs more than where it guesses."


def section(facts: Facts) -> Section | None:
    if facts.scores is None:
        return None
    readings = [r for r in facts.scores.facts["readings"] if r["kind"] == "text"]
    if not readings:
        return None
    blocks: list[Block] = []
    for reading in readings:
        blocks += [Heading(f"Reading: {reading['name']}")] if len(readings) > 1 else []
        blocks += of_reading(facts, reading)
    return Section("What it cost", aside(facts, readings), blocks)


def aside(facts: Facts, readings: list[dict[str, Any]]) -> list[Text]:
    assert facts.scores is not None
    of = facts.scores.facts
    rows, tokens = (sum(r[key] for r in readings) for key in ("rows", "tokens_read"))
    found: list[Text] = [
        f"Both models read the same {tokens:,} tokens in {rows:,} rows, and their predictions of the next token were held "
        "against each other over the whole vocabulary.",
        f"± is one standard error. Both it and the 95 % intervals are over rows: bootstrap-t for means, percentile for "
        f"quantiles, seed {of['seed']}.",
    ]
    if facts.scores.find(FLOOR) is not None:
        found.append(
            "The noise floor is the source held against itself, one rounding to BF16 after each layer apart: what lies below "
            "it is no difference."
        )
    return found


def of_reading(facts: Facts, reading: dict[str, Any]) -> list[Block]:
    """The plots and the table of one text, by the first way that the export ran; a column for each other way."""
    assert facts.scores is not None
    name, ways = reading["name"], facts.ways
    mine = [s for s in facts.scores.scores if s.reading == name and not s.name.startswith("floor_")]
    first = [s for s in mine if s.activations == next(iter(ways))]
    whole = {s.name: s for s in first if not s.part}
    floor = facts.scores.find(FLOOR, reading=name)
    found: list[Block] = []
    kl_N = facts.kl_nats.get(name)
    if kl_N is not None and len(kl_N) and kl_N.max() > 0:
        known = {label: whole.get(n) for label, n in (("median", "kl_median"), ("mean", "kl_mean"), ("p95", "kl_p95"))}
        marks = {label: s.value for label, s in known.items() if s is not None and s.value is not None}
        drawing = plots.kl_histogram(f"kl-{name}", kl_N, marks, floor.value if floor else None)
        caption = "Predictions by how much they changed. What lies left of the axis is counted in its first column."
        found.append(Drawing(drawing, caption))
    found += [Heading("Every figure"), table(whole)]
    others = {way: {s.name: s for s in mine if s.activations == way and not s.part} for way in list(ways)[1:]}
    if any(others.values()) or floor is not None:
        found += [Heading("As an engine runs it"), beside(facts, name, whole, others)]
    parts = [s for s in first if s.name == "kl_mean" and s.part and s.value is not None]
    for title, caption, chosen in (
        ("By domain of the text", "", [s for s in parts if not s.part.startswith(CONFIDENCE)]),
        ("By confidence of the source", SURE, [s for s in parts if s.part.startswith(CONFIDENCE)]),
    ):
        spread = [Mark(words.bucket(s.part), s.value or 0.0, s.low, s.high) for s in chosen]
        if spread:
            line = Mark("noise floor", floor.value) if floor and floor.value else None
            place = f"{title}-{name}".replace(" ", "-")
            plot = plots.whiskers(place, f"KL divergence {title.lower()}", spread, "mean KL, nats per token", line)
            found += [Heading(title), Drawing(plot, caption)]
    return found


def table(whole: dict[str, Score]) -> Table:
    rows = []
    for name in [n for n in FIRST if n in whole] + [n for n in whole if n not in FIRST]:
        shown = words.figure(whole[name])
        error = shown["error"].replace("± ", "")
        rows.append([words.name(name), f"{shown['value']} {shown['unit']}", error, shown["interval"]])
    return Table(("figure", "value", "±", "95 % interval"), rows, optional=(3,))


def beside(facts: Facts, reading: str, whole: dict[str, Score], others: dict[str, dict[str, Score]]) -> Table:
    """The same figures with activations rounded as an engine does, and those of the source against itself."""
    assert facts.scores is not None
    columns: list[tuple[str, dict[str, Score]]] = [("left alone", whole)]
    columns += [(f"{way}: {facts.ways[way]}", found) for way, found in others.items() if found]
    floors = {n: facts.scores.find(f"floor_{n}", reading=reading) for n in SHORT}
    if any(floors.values()):
        columns.append(("noise floor", {n: s for n, s in floors.items() if s is not None}))
    rows = []
    for name in SHORT:
        shown = [words.figure(of[name]) if name in of else None for _, of in columns]
        cells = [two_lines(f"{s['value']} {s['unit']}", s["error"]) if s else "" for s in shown]
        rows.append([words.name(name), *cells])
    return Table(("activations", *(what for what, _ in columns)), rows)


PART = Part(name="cost", place=40, section=section)
