"""Texts written by both, side by side: short questions, and longer ones looked through for loops."""

from collections.abc import Mapping
from typing import Any

from .. import words
from ..blocks import Beside, Block, Section, Table, Text
from ..facts import Facts
from .base import Part

WHO = ("source", "export", "served")
MOST = 1200  # characters of a text that are shown
FIGURES = {
    "sample_right": "right answers",
    "sample_endless": "texts that end in a loop",
    "sample_looped": "tokens that only repeat",
}


def section(facts: Facts) -> Section | None:
    samples = facts.samples
    if not samples:
        return None
    blocks: list[Block] = []
    scores = {s.name: s for s in facts.scores.scores if s.reading == "samples"} if facts.scores is not None else {}
    there = [who for who in WHO if who in samples[0]]
    if scores:
        rows: list[list[Text]] = []
        for name, told in FIGURES.items():
            shown = [words.figure(scores.get(f"{name}_{who}")) for who in there]
            rows.append([told, *(f"{s['value']} {s['error']} {s['unit']}" for s in shown)])
        blocks.append(Table(("", *there), rows))
    for sample in samples:
        texts = [(f"{who}{verdict(sample[who])}", cut(sample[who]["text"])) for who in there]
        warm = f" (temperature {sample['temperature']:g})" if sample["temperature"] else ""
        blocks.append(Beside(f"{sample['prompt']}{warm}", texts))
    aside: list[Text] = [
        "The same questions to both, answered greedily unless a temperature is named. Right means that what an answer cannot do "
        "without is in it; how good it is is for you to read.",
    ]
    return Section("Samples", aside, blocks)


def verdict(answer: Mapping[str, Any]) -> str:
    found = [{True: "right", False: "not right"}[answer["right"]]] if answer.get("right") is not None else []
    found += ["loops without end"] if answer.get("endless") else []
    return f": {', '.join(found)}" if found else ""


def cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[:MOST]} … ({len(text) - MOST:,} more characters)"


PART = Part(name="samples", place=80, section=section)
