"""Which experts stayed: what calibration saw, and where the line was drawn."""

import numpy as np
from markupsafe import Markup

from .. import plots, words
from ..blocks import Block, Drawing, Heading, Section, Text
from ..facts import Facts
from ..grids import TONES, Paint, Row, grid, tone
from .base import Part


def section(facts: Facts) -> Section | None:
    if facts.selection is None:
        return None
    s, layers = facts.selection, facts.moe_layers
    blocks: list[Block] = []
    if facts.score_LE is not None:
        caption = (
            "Each score as a share of the largest of its layer, the stronger the more. Blue stayed; grey was dropped. "
            "Scores are comparable within a layer only."
        )
        blocks.append(Drawing(saliency(facts.score_LE, facts.kept_LE, layers), caption))
    margins = [s["margins"][str(layer)] for layer in layers]
    caption = (
        "By how much the last expert kept beats the first one dropped. Near zero, another sample of text might have chosen "
        "otherwise."
    )
    drawing = plots.by_layer("margins", "Margin of the cut in each layer", layers, margins, mark_least=True)
    blocks += [Heading("How clear the cut was"), Drawing(drawing, caption)]
    return Section("Which experts stayed", aside(facts), blocks)


def aside(facts: Facts) -> list[Text]:
    s = facts.selection or {}
    name: Text = words.term(s["criterion"])
    if s["reference"].startswith("https://"):
        name = Markup('<a href="{}">{}</a>').format(s["reference"], name)
    else:
        name = f"{name} ({s['reference']})"
    on = (
        f"on {s['calibration_tokens']:,} tokens, domains {s['policy']}"
        if s["calibration_tokens"]
        else "without any text"
    )
    found: list[Text] = [Markup("Ranked by {} {}.").format(name, on)]
    if s.get("jaccard"):
        stability = float(np.mean(list(s["jaccard"].values())))
        found.append(
            f"Each half of the text alone would have kept sets that agree to {stability:.0%} (Jaccard, mean over layers)."
        )
    if s.get("protected"):
        found.append(
            f"{len(s['protected'])} would have been kept whatever the score, since such outputs tower over all others."
        )
    return found


def saliency(score_LE: np.ndarray, kept_LE: np.ndarray, layers: list[int]) -> Markup:
    share_LE = np.clip(score_LE / np.maximum(score_LE.max(1, keepdims=True), 1e-300), 0, 1)
    rows = []
    for layer, shares, kept in zip(layers, share_LE.tolist(), kept_LE.tolist()):
        tiles = zip(shares, kept)
        paint = [
            Paint("var(--fate-0)" if k else "var(--muted)", min(tone(x), len(TONES) - 1 if k else 2)) for x, k in tiles
        ]
        rows.append(Row(f"layer {layer}", paint))
    experts = [str(e) for e in range(score_LE.shape[1])]
    label = "Saliency by layer and expert, dropped experts in grey"
    return grid(label, rows, experts, "expert")


PART = Part(name="experts", place=110, section=section)
