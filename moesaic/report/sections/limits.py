"""What the figures do not say, and what was not measured."""

from typing import Any

from ..blocks import Block, Heading, Items, Section
from ..facts import Facts
from .base import Part

SMALL_TAIL = 20  # a percentile that fewer tokens lie beyond is worth a warning
PYTHON_TEXT = (
    "The text evaluated on comes with every Python installation: the model may have been trained on it, so it is not held out. "
    "It shares no document and no paragraph with the text of the calibration."
)
CALIBRATED_ON_PYTHON = (
    "No calibration text was given, so Python's standard library was used, which is for trials only. For a model that will "
    "be used, make it again with text like that which it will read (--data FOLDER)."
)
UNROUNDED = (
    "Weights are as stored, activations were not rounded. An engine that rounds those too (W4A4, FP8 dynamic) adds an error "
    "that is not in these figures."
)


def section(facts: Facts) -> Section:
    known, absent = limits(facts), missing(facts)
    blocks: list[Block] = [Items(known)] if known else []
    blocks += [Heading("Not measured in this run"), Items(absent, plain=True)] if absent else []
    return Section("What this does not say", [], blocks)


def limits(facts: Facts) -> list[str]:
    """What the figures do not say, in plain sentences."""
    found = [] if facts.selection is None else [sentence(w) for w in facts.selection["warnings"]]
    if facts.calibration.get("trying_out"):
        found.insert(0, CALIBRATED_ON_PYTHON)
    if facts.scores is None:
        return found
    for reading in facts.scores.facts["readings"]:
        if reading["kind"] == "text":
            found += of_reading(reading)
    if list(facts.ways) == ["none"]:
        found.append(UNROUNDED)
    if all(reading["kind"] != "tasks" for reading in facts.scores.facts["readings"]):
        found.append("Figures compare two models on the same text; they do not say how good either is at a task.")
    return list(dict.fromkeys(found))


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def of_reading(reading: dict[str, Any]) -> list[str]:
    found = []
    if reading["facts"].get("trying_out"):
        found.append(PYTHON_TEXT)
    for model, count in reading["nonfinite"].items():
        if count:
            found.append(
                f"{count:,} predictions of the {model} were not finite; every figure of both models leaves them out."
            )
    beyond = reading["tokens_counted"] / 1000
    if beyond < SMALL_TAIL:
        worst = f"the {max(1, round(beyond))} worst of {reading['tokens_counted']:,} tokens"
        found.append(f"The 99.9th percentile rests on {worst}: read it as an order of magnitude.")
    length = reading["tokens_read"] // reading["rows"]
    return [
        *found,
        f"No prediction here had more than {length - 1:,} tokens of context; nothing is said of longer ones.",
    ]


def missing(facts: Facts) -> list[str]:
    """What a complete report would hold and this run has not done."""
    kinds = {r["kind"] for r in facts.scores.facts["readings"]} if facts.scores is not None else set()
    floor = facts.scores.find("floor_kl_mean") if facts.scores is not None else None
    absent = {
        "the choice of experts: all were kept, or another program chose": facts.selection is None,
        "an export": facts.after is None,
        "verification of the export": facts.verify is None,
        "KL divergence, perplexity and agreement": facts.scores is None,
        "sizes of the source by class of module: its folder is gone or has changed": facts.before is None,
        "long context (needles in haystacks)": "needle" not in kinds,
        "tasks, and answers that flip": "tasks" not in kinds,
        "texts written by both, side by side": not facts.samples,
        "the noise floor: the source against itself": floor is None,
    }
    return [what for what, is_absent in absent.items() if is_absent]


PART = Part(name="limits", place=160, section=section)
