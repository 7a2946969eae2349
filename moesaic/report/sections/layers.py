"""Through the layers: how the export's states part from the source's."""

from .. import plots
from ..blocks import Block, Drawing, Heading, Section
from ..facts import Facts
from .base import Part

DRAWINGS = {  # of what each layer has -> what to say of it
    "relative_error": (
        "How far the export’s hidden states are from the source’s after each layer, relative to their norm.",
        "Relative error of the hidden states after each layer",
        "Hidden states",
    ),
    "router_agreement": (
        "The share of the source’s experts that the export selects too, on average over tokens.",
        "Experts selected by both, by layer",
        "Routing",
    ),
    "pruned_mass": (
        "The share of the source’s routing weight that went to dropped experts.",
        "Gates on dropped experts, by layer",
        "What fell on dropped experts",
    ),
}


def section(facts: Facts) -> Section | None:
    if facts.scores is None:
        return None
    blocks: list[Block] = []
    for key, (caption, label, heading) in DRAWINGS.items():
        marks = [(mark["layer"], mark[key]) for mark in facts.scores.facts["layers"] if mark.get(key) is not None]
        if marks and any(value > 0 for _, value in marks):
            layers, values = zip(*marks)
            blocks += [Heading(heading), Drawing(plots.by_layer(key, label, layers, values), caption)]
    if not blocks:
        return None
    aside = "Errors of one layer are the next one’s input: they add up, or fade. Other experts are selected on the way."
    return Section("Through the layers", [aside], blocks)


PART = Part(name="layers", place=50, section=section)
