"""Bits by layer and module class: the mosaic of formats."""

from markupsafe import Markup

from ...plan import SOURCE
from .. import mosaic, words
from ..blocks import Block, Drawing, Section
from ..facts import Facts
from ..grids import Paint, Row, grid
from .base import Part


def section(facts: Facts) -> Section | None:
    if not facts.stored:
        return None
    formats = sorted({f for s in facts.stored for f in s.formats}, key=lambda f: -bits_of(facts, f))
    color = {f: mosaic.color(f if f in facts.palette else SOURCE, facts.palette) for f in formats}
    layers = sorted({s.layer for s in facts.stored})
    rows = []
    for role in words.ROLES:
        mine = {s.layer: s for s in facts.stored if s.role == role}
        if mine:
            paint = [Paint(color[mine[layer].formats[-1]]) if layer in mine else None for layer in layers]
            end = span([s.bits_per_weight for s in mine.values()])
            rows.append(Row(words.ROLES[role], paint, end=end))
    label = f"Formats of {len(rows)} classes of matrices in {len(layers)} layers"
    legend = Markup("").join(
        Markup('<span><i style="background:{}"></i>{}, {:.2f} bits</span>').format(
            color[f], f.upper(), bits_of(facts, f)
        )
        for f in formats
    )
    drawing = grid(label, rows, [str(layer) for layer in layers], "layer")
    blocks: list[Block] = [Drawing(drawing + Markup('<div class="legend">{}</div>').format(legend))]
    aside = [
        "The format of each class of matrices in each layer; at the right the stored bits per weight, scales included, "
        "from the least to the most."
    ]
    return Section("Bits by layer", aside, blocks)


def bits_of(facts: Facts, name: str) -> float:
    """Stored bits per weight of the matrices in one format, in the middle of all of them."""
    found = sorted(s.bits_per_weight for s in facts.stored if s.formats[-1] == name)
    return found[len(found) // 2] if found else 0.0


def span(bits: list[float]) -> str:
    least, most = f"{min(bits):.2f}", f"{max(bits):.2f}"
    return least if least == most else f"{least} – {most}"


PART = Part(name="bits", place=120, section=section)
