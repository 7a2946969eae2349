"""Grids of tiles whose colours and tones mean something: experts by layer, formats by layer, needles by depth.

SVG by hand: a run of equal tiles is one dashed stroke, so that sixteen thousand stay light. Words stand around
it as HTML, since a drawing that fits any width would scale them. Colours are the page's variables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from markupsafe import Markup

TONES = (0.1, 0.24, 0.4, 0.58, 0.78, 1.0)  # opacity
PITCH = 10.0  # drawing units a tile
GROUT_SHARE = 1 / 280  # of a strip: about two points of the page, however many tiles there are
TICKS = 9


@dataclass(frozen=True)
class Paint:
    """How one tile is filled: a CSS colour and one of the tones."""

    color: str
    tone: int = len(TONES) - 1


def tone(share: float) -> int:
    """The tone of a share between 0 and 1."""
    return min(int(max(share, 0.0) * len(TONES)), len(TONES) - 1)


@dataclass(frozen=True)
class Row:
    """Tiles side by side, and what is written at them. No paint leaves a hole.

    name  at the left;  texts  into each tile;  end  behind the last one
    """

    name: str
    paint: Sequence[Paint | None]
    texts: Sequence[str] | None = None
    end: str | None = None


def grid(label: str, rows: Sequence[Row], columns: Sequence[str], across: str) -> Markup:
    """Tiles by row and column, with the rows' names at the left and the columns' below. `across` is what the columns are."""
    count, ended = len(columns), any(row.end is not None for row in rows)
    body = []
    for row in rows:
        inside = Markup("")
        if row.texts is not None:
            inside = Markup("<span>{}</span>").format(
                Markup("").join(Markup("<b>{}</b>").format(text) for text in row.texts)
            )
        end = Markup("<i>{}</i>").format(row.end) if row.end is not None else ""
        body.append(Markup("<em>{}</em><div>{}{}</div>{}").format(row.name, strip(row.paint), inside, end))
    shown = sorted({int(i) for i in np.linspace(0, count - 1, min(count, TICKS)).round()}) if count > TICKS else None
    ticks = Markup("").join(
        Markup("<b{}>{}</b>").format(
            Markup(' style="left:{:.2f}%"').format(100 * (i + 0.5) / count) if shown else "", columns[i]
        )
        for i in (shown or range(count))
    )
    foot = Markup('<em></em><div class="{}">{}</div>{}').format(
        "ticks apart" if shown else "ticks", ticks, Markup("<i></i>") if ended else ""
    )
    below = Markup('<p class="across">{}</p>').format(across)
    kind = "grid ended" if ended else "grid"
    kind += " dense" if len(rows) > 12 and not any(row.texts is not None for row in rows) else ""
    return Markup('<div class="{}" role="img" aria-label="{}">{}{}</div>{}').format(
        kind, label, Markup("").join(body), foot, below
    )


def strip(line: Sequence[Paint | None]) -> Markup:
    """One row of tiles, stretched to whatever width and height its place has."""
    grout = min(PITCH / 8, len(line) * PITCH * GROUT_SHARE)
    strokes: dict[Paint, str] = {}
    at = 0
    for paint, run in groupby(line):
        width = len(list(run))
        if paint is not None:
            strokes[paint] = strokes.get(paint, "") + f"M{at * PITCH:g} 5h{width * PITCH:g}"
        at += width
    paths = Markup("").join(
        Markup('<path style="stroke:{}" stroke-opacity="{}" d="{}"/>').format(paint.color, TONES[paint.tone], d)
        for paint, d in strokes.items()
    )
    return Markup(
        '<svg viewBox="0 0 {:.4g} {:g}" preserveAspectRatio="none" stroke-dasharray="{:.4g} {:.4g}" aria-hidden="true">{}</svg>'
    ).format(len(line) * PITCH - grout, PITCH, PITCH - grout, grout, paths)
