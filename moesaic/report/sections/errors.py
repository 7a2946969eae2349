"""How well each expert was rounded: the relative error of its weights, expert by expert."""

import numpy as np
from markupsafe import Markup

from .. import plots
from ..blocks import Block, Drawing, Section
from ..facts import Facts
from ..grids import TONES, Paint, Row, grid
from .base import Part

BY_EXPERT = (
    "The same by layer and expert: the stronger, the larger, over the range above. Holes: dropped, or not rounded."
)


def section(facts: Facts) -> Section | None:
    if not facts.expert_errors:
        return None
    values = np.array([e for layer in facts.expert_errors.values() for e in layer], float)
    low, middle, high = float(values.min()), float(np.median(values)), float(values.max())
    caption = (
        f"{len(values):,} experts: {low:.4f} to {high:.4f}, median {middle:.4f}, standard deviation {values.std():.6f}."
    )
    marks = {"median": middle, "largest": high} if high > low else {"all": middle}
    blocks: list[Block] = [
        Drawing(plots.histogram("errors", "Experts by their weight error", values, marks, "relative error"), caption),
        Drawing(by_expert(facts, low, high), BY_EXPERT),
    ]
    aside = [
        "The error of each expert's three matrices together, relative to their norm, as the export decodes them. It says "
        "how evenly rounding fell; what it did to predictions stands under what it cost."
    ]
    return Section("How experts were rounded", aside, blocks)


def by_expert(facts: Facts, low: float, high: float) -> Markup:
    """One row a layer, under the ids of the source."""
    layers = sorted(map(int, facts.expert_errors))
    width = max(facts.experts, *(len(e) for e in facts.expert_errors.values()))
    kept = facts.plan.kept if facts.plan is not None else {}
    rows = []
    for layer in layers:
        errors = facts.expert_errors[str(layer)]
        paint: list[Paint | None] = [None] * width
        for expert, error in zip(kept.get(layer, range(len(errors))), errors):
            share = (error - low) / (high - low) if high > low else 0.5
            paint[expert] = Paint("var(--fate-1)", min(int(share * len(TONES)), len(TONES) - 1))
        rows.append(Row(f"layer {layer}", paint))
    label = "Weight error by layer and expert"
    return grid(label, rows, [str(e) for e in range(width)], "expert")


PART = Part(name="errors", place=130, section=section)
