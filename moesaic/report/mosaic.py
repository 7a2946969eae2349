"""The mosaic: layers × experts as tiles, coloured by what became of each, toned by how much it mattered.

SVG written by hand, one path for each colour and tone, so that sixteen thousand tiles stay light. Colours
are CSS variables in the page; the picture that stands alone brings its own, for light and for dark.
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from .facts import DROPPED

TILE, GROUT = 10.0, 1.1  # drawing units
TONES = (0.42, 0.62, 0.82, 1.0)  # opacity, from the least to the most important quarter of what is kept
HAND_CUT = 4000  # up to so many tiles have corners that are not quite square
COLORS = {  # distinguishable with any colour vision: they differ in lightness too
    "light": {"paper": "#fbfaf7", "ink": "#1d1c1a", "muted": "#6b675f", "tile": "#eae5da"},
    "dark": {"paper": "#141517", "ink": "#ece8e0", "muted": "#9b968c", "tile": "#26272a"},
}
FATES = {  # in the order in which fates are met
    "light": ("#17617a", "#d8922a", "#a8452b", "#6f4a8e", "#7d8f2e", "#5ba4cf"),
    "dark": ("#4fa9c4", "#e3a447", "#d4704f", "#a683c9", "#a9bb57", "#8cc8ea"),
}


def order(fate_LE: np.ndarray) -> list[str]:
    """The fates that occur, kept ones first: "source", formats by name, "dropped"."""
    found = {str(f) for f in fate_LE.ravel()}
    kept = sorted(found - {DROPPED}, key=lambda f: (f != "source", f))
    return kept + ([DROPPED] if DROPPED in found else [])


def color(fate: str, fates: Sequence[str]) -> str:
    """The CSS variable of a fate. The first belongs to "source", whether or not it occurs."""
    kept = ["source", *(f for f in fates if f not in ("source", DROPPED))]
    return "var(--tile)" if fate == DROPPED else f"var(--fate-{kept.index(fate) % len(FATES['light'])})"


def tone_of(score_LE: np.ndarray | None, kept_LE: np.ndarray) -> np.ndarray:
    """int [L, E], 0 … 3: the quarter of its layer's kept experts that a tile is in; all 3 without scores."""
    if score_LE is None:
        return np.full(kept_LE.shape, len(TONES) - 1)
    held_LE = np.where(kept_LE, score_LE, -np.inf)
    behind_LE = kept_LE.shape[1] - 1 - np.argsort(np.argsort(-held_LE, 1, kind="stable"), 1)
    kept_L1, lost_L1 = kept_LE.sum(1, keepdims=True), (~kept_LE).sum(1, keepdims=True)
    return np.clip((behind_LE - lost_L1) * len(TONES) // np.maximum(kept_L1, 1), 0, len(TONES) - 1)


def tiles(fate_LE: np.ndarray, score_LE: np.ndarray | None, palette: Sequence[str] = ()) -> Markup:
    """The tiles as SVG paths, in a space of `TILE` units a tile."""
    layers, experts = fate_LE.shape
    fates = order(fate_LE)
    tone_LE = tone_of(score_LE, fate_LE != DROPPED)
    wobble = np.random.default_rng(0).uniform(-0.42, 0.42, (layers, experts, 4, 2))
    paths = []
    for fate in fates:
        for tone, opacity in enumerate(TONES):
            where = np.argwhere((fate_LE == fate) & (True if fate == DROPPED else tone_LE == tone))
            if len(where) == 0 or (fate == DROPPED and tone):
                continue
            shapes = "".join(tile(e, l, wobble[l, e] if fate_LE.size <= HAND_CUT else None) for l, e in where)
            fill, alpha = color(fate, palette or fates), 1 if fate == DROPPED else opacity
            paths.append(Markup('<path style="fill:{}" fill-opacity="{}" d="{}"/>').format(fill, alpha, shapes))
    return Markup("").join(paths)


def tile(column: int, row: int, wobble: np.ndarray | None) -> str:
    x, y, side = column * TILE + GROUT / 2, row * TILE + GROUT / 2, TILE - GROUT
    if wobble is None:
        return f"M{x:g} {y:g}h{side:g}v{side:g}h-{side:g}z"
    corners = np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]]) + wobble
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners) + "z"


def mosaic(fate_LE: np.ndarray, score_LE: np.ndarray | None, palette: Sequence[str] = ()) -> Markup:
    """The mosaic for the page: no words in it, colours from the page's variables.

    palette  the fates in the order of their colours, where others than those that occur have one too
    """
    layers, experts = fate_LE.shape
    counts = ", ".join(f"{int((fate_LE == f).sum()):,} {f}" for f in order(fate_LE))
    return Markup('<svg class="mosaic" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        experts * TILE,
        layers * TILE,
        f"{layers} layers of {experts} experts: {counts}",
        tiles(fate_LE, score_LE, palette),
    )


def variables(theme: str) -> Markup:
    """CSS declarations of one theme, shared by the page and the picture."""
    fates = {f"fate-{i}": value for i, value in enumerate(FATES[theme])}
    return Markup("").join(f"--{name}:{value};" for name, value in {**COLORS[theme], **fates}.items())


def picture(
    fate_LE: np.ndarray, score_LE: np.ndarray | None, labels: Sequence[str], caption: str, width: int = 1200
) -> Markup:
    """A standalone SVG for a README: the mosaic on its ground, a legend (`labels`, in `order`), and one line of words."""
    layers, experts = fate_LE.shape
    margin, foot = 48, 92
    scale = (width - 2 * margin) / (experts * TILE)
    height = layers * TILE * scale + margin + foot
    fates, x, legend = order(fate_LE), float(margin), Markup("")
    baseline = height - foot / 2 + 6
    for fate, label in zip(fates, labels):
        legend += Markup(
            '<rect x="{:g}" y="{:g}" width="18" height="18" rx="2" style="fill:{}"/><text x="{:g}" y="{:g}">{}</text>'
        ).format(x, baseline - 15, color(fate, fates), x + 28, baseline, label)
        x += 28 + 9.6 * len(label) + 36
    return Markup(PICTURE).format(
        width=width, height=f"{height:.0f}", caption=caption, light=variables("light"), dark=variables("dark"),
        shift=margin, scale=f"{scale:.4f}", tiles=tiles(fate_LE, score_LE), legend=legend,
        right=width - margin, baseline=f"{baseline:g}",
    )  # fmt: skip


PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    "<title>{caption}</title><style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
    "text{{font:18px 'Inter','Segoe UI','Helvetica Neue',Arial,sans-serif;fill:var(--muted)}}</style>"
    '<rect width="100%" height="100%" rx="14" style="fill:var(--paper)"/>'
    '<g transform="translate({shift} {shift}) scale({scale})">{tiles}</g>{legend}'
    '<text x="{right}" y="{baseline}" text-anchor="end">{caption}</text></svg>\n'
)
