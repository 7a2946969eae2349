"""The sentences of the page that depend on what was found: what was done, what it does not say, what was not measured."""

from typing import Any

from markupsafe import Markup

from . import words
from .facts import Facts

SMALL_TAIL = 20  # a percentile that fewer tokens lie beyond is worth a warning
PYTHON_TEXT = (
    "The text evaluated on comes with every Python installation: the model may have been trained on it, so it is not held out. "
    "It shares no document and no paragraph with the text of the calibration."
)
UNROUNDED = (
    "Weights are as stored, activations were not rounded. An engine that rounds those too (W4A4, FP8 dynamic) adds an error "
    "that is not in these figures."
)


def summary(facts: Facts) -> Markup:
    """One sentence that would do if there were no other."""
    if facts.after is None:
        return Markup("Nothing has been exported in this run yet.")
    before, after = words.decimal(facts.source["bytes"]), words.decimal(facts.after["bytes"])
    text = Markup("A model of {} now takes <strong>{}</strong>.").format(before, after)
    kl = words.figure(facts.scores.find("kl_mean")) if facts.scores is not None else None
    if kl is None or not kl["unit"]:
        return text + " What that cost has not been measured."
    moved = Markup("<strong>{} {} nats</strong>").format(kl["value"], kl["error"])
    return text + Markup(" For that its predictions moved by {} per token from what they were.").format(moved)


def done(facts: Facts) -> list[str]:
    """The steps that were taken, a sentence each."""
    steps = []
    if facts.selection is not None:
        s, kept = facts.selection, int(facts.kept_LE.sum(1).max())
        seen = f"Calibrated on {s['calibration_tokens']:,} tokens"
        best = f"the {kept} best of {facts.experts} experts in each of {len(s['kept'])} layers"
        steps.append(f"{seen}; kept {best}, by {words.term(s['criterion'])}.")
    if facts.plan is not None:
        formats = ", ".join(sorted(f.upper() for f in set(facts.plan.formats.values()) - {"source"}))
        rounded = f"Wrote {formats} by {words.term(facts.plan.rounding)}" if formats else "Rounded nothing"
        steps.append(
            f"{rounded}; all other bytes are the source's own. The container is {words.term(facts.plan.container)}."
        )
    if facts.verify is not None:
        looked_at = sum(facts.verify["compared"].values())
        steps.append(f"Reopened the export and made {looked_at:,} comparisons with the plan and the source.")
    if facts.scores is not None:
        read = sum(r["tokens_read"] for r in facts.scores.facts["readings"])
        steps.append(f"Read {read:,} tokens with both models, in one sweep of the layers of each.")
    return steps


def limits(facts: Facts) -> list[str]:
    """What the figures do not say, in plain sentences."""
    found = [] if facts.selection is None else list(facts.selection["warnings"])
    if facts.scores is None:
        return found
    for reading in facts.scores.facts["readings"]:
        found += of_reading(reading)
    if list(facts.scores.facts["activations"]) == ["none"]:
        found.append(UNROUNDED)
    return [*found, "Figures compare two models on the same text; they do not say how good either is at a task."]


def of_reading(reading: dict[str, Any]) -> list[str]:
    found = []
    if str(reading["facts"].get("origin", "")).startswith("Python"):
        found.append(PYTHON_TEXT)
    for model, count in reading["nonfinite"].items():
        if count:
            found.append(
                f"{count:,} predictions of the {model} were not finite; every figure of both models leaves them out."
            )
    beyond = reading["tokens_counted"] / 1000
    if beyond < SMALL_TAIL:
        worst = f"the {beyond:.0f} worst of {reading['tokens_counted']:,} tokens"
        found.append(f"The 99.9th percentile rests on {worst}: read it as an order of magnitude.")
    length = reading["tokens_read"] // reading["rows"]
    return [
        *found,
        f"No prediction here had more than {length - 1:,} tokens of context; nothing is said of longer ones.",
    ]


def missing(facts: Facts) -> list[str]:
    """What a complete report would hold and this run has not done."""
    absent = {
        "the choice of experts: all were kept, or another program chose": facts.selection is None,
        "an export": facts.after is None,
        "verification of the export": facts.verify is None,
        "KL divergence, perplexity and agreement": facts.scores is None,
        "sizes of the source by class of module: its folder is gone or has changed": facts.before is None,
        "long context (needles in haystacks)": True,
        "tasks, and answers that flip": True,
        "texts written by both, side by side": True,
        "the noise floor: the source against itself": True,
    }
    return [what for what, is_absent in absent.items() if is_absent]
