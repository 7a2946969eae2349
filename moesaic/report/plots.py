"""The page's plots: matplotlib, inlined as SVG, each drawn twice, for a wide page and for a narrow one.

Colours are stand-ins that become the page's CSS variables, so that one drawing serves light and dark.
Leaves out the mosaic (mosaic.py).
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

INK, MUTED, LINE, ACCENT, SECOND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "fate-0", SECOND: "fate-1", PAPER: "paper"}
WIDE, NARROW = 7.6, 4.1  # inches of 72 drawing units
SALIENCY = LinearSegmentedColormap.from_list("tesserae", ["#efe2c2", "#cdbb80", "#6fa39a", "#2b7a96", "#1b5a86"])
STRUCK = 1000  # cells up to which there is room
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.left": False,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def drawn(name: str, label: str, height: float, draw: Callable[[Axes, bool], None]) -> str:
    """HTML with two SVGs: `draw(axes, narrow)` at both widths. `name` keeps their ids apart."""
    return "".join(
        f'<div class="{kind}">{svg(f"{name}-{kind}", label, width, height * tall, draw)}</div>'
        for kind, width, tall in (("wide", WIDE, 1.0), ("narrow", NARROW, 0.92))
    )


def svg(name: str, label: str, width: float, height: float, draw: Callable[[Axes, bool], None]) -> str:
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), width == NARROW)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )
    return re.sub(r"\n\s*", "\n", text)


def kl_histogram(kl_N: np.ndarray, marks: dict[str, float]) -> str:
    """Tokens by KL on a logarithmic axis; what is below the axis is counted in its first bin."""
    top = max(float(kl_N.max()), 1e-6)
    bottom = min(max(float(np.quantile(kl_N, 0.002)), top * 1e-8), top * 1e-2)
    edges = np.geomspace(bottom, top * 1.0001, 61)
    counts, _ = np.histogram(np.maximum(kl_N, bottom), edges)

    def draw(axes: Axes, narrow: bool) -> None:
        axes.set_xscale("log")
        axes.stairs(counts, edges, fill=True, color=ACCENT, linewidth=0)
        high = counts.max()  # then grout in the colour of the page: the columns are laid in tiles
        axes.hlines(np.arange(1, 15) * high / 14, bottom, edges[-1], color=PAPER, linewidth=0.9)
        axes.vlines(edges, 0, high * 1.01, color=PAPER, linewidth=0.9)
        for i, (label, value) in enumerate(sorted(marks.items(), key=lambda m: m[1])):
            level = high * (1.08 + 0.12 * (len(marks) - 1 - i))
            axes.plot([value, value], [0, level], color=SECOND, linewidth=1.4)
            axes.annotate(
                f"{label} {value:#.2g}", (value, level), (5, -3), textcoords="offset points", color=INK, fontsize=10.5
            )
        axes.set_ylim(0, high * (1.12 + 0.12 * len(marks)))
        axes.set_xlabel("KL of one token, nats (logarithmic)")
        axes.yaxis.set_major_locator(MaxNLocator(4 if narrow else 5, integer=True))
        axes.grid(False)

    return drawn("kl", "Histogram of KL divergence by token", 3.3, draw)


def whiskers(name: str, label: str, rows: Sequence[tuple[str, float, float | None, float | None]], unit: str) -> str:
    """Values with their 95 % intervals, one line each: (what, value, low, high)."""

    def draw(axes: Axes, narrow: bool) -> None:
        places = np.arange(len(rows))[::-1]
        for y, (_, value, low, high) in zip(places, rows):
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=ACCENT, linewidth=2.2, solid_capstyle="round", alpha=0.55)
            axes.plot([value], [y], marker="s", markersize=7, color=ACCENT)
            axes.annotate(
                f"{value:#.2g}", (value, y), (0, 8), textcoords="offset points", ha="center", fontsize=9.5, color=MUTED
            )
        axes.set_yticks(places, [row[0] for row in rows], color=INK)
        axes.set_ylim(-0.6, len(rows) - 0.3)
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 6))
        axes.set_xlabel(unit)

    return drawn(name, label, 0.75 + 0.44 * len(rows), draw)


def by_layer(name: str, label: str, layers: Sequence[int], values: Sequence[float], mark_least: bool = False) -> str:
    """A share for each layer, as columns; the least may be marked."""

    def draw(axes: Axes, narrow: bool) -> None:
        least = int(np.argmin(values)) if mark_least else -1
        colors = [SECOND if i == least else ACCENT for i in range(len(values))]
        axes.bar(np.arange(len(layers)), values, 0.82 if len(layers) > 12 else 0.04 + 0.06 * len(layers), color=colors)
        if mark_least:
            words = f"least: {values[least]:.2%} in layer {layers[least]}"
            axes.set_title(words, loc="left", fontsize=10.5, color=MUTED)
        step = max(1, -(-len(layers) // (8 if narrow else 16)))
        axes.set_xticks(np.arange(0, len(layers), step), [str(layers[i]) for i in range(0, len(layers), step)])
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_xlabel("layer")

    return drawn(name, label, 2.3, draw)


def saliency(score_LE: np.ndarray, kept_LE: np.ndarray, layers: Sequence[int]) -> str:
    """Each score as a share of its layer's largest; dropped experts are greyed, and struck through where there is room."""
    share_LE = np.clip(score_LE / np.maximum(score_LE.max(1, keepdims=True), 1e-300), 0, 1)
    rgba_LE4 = SALIENCY(share_LE)
    rgba_LE4[~kept_LE, :3], rgba_LE4[~kept_LE, 3] = 0.5, 0.08 + 0.3 * share_LE[~kept_LE]
    lost = np.argwhere(~kept_LE)[: STRUCK if score_LE.size <= STRUCK else 0]

    def draw(axes: Axes, narrow: bool) -> None:
        axes.imshow(rgba_LE4, aspect="auto", interpolation="nearest")
        strokes = [[(e - 0.32, l + 0.32), (e + 0.32, l - 0.32), (np.nan, np.nan)] for l, e in lost]
        if strokes:
            x, y = np.array(strokes).reshape(-1, 2).T
            axes.plot(x, y, color=MUTED, linewidth=0.7)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.yaxis.set_major_locator(MaxNLocator(min(len(layers), 8), integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: str(layers[int(y)]) if 0 <= y < len(layers) else ""))
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")

    return drawn(
        "saliency",
        "Saliency by layer and expert, dropped experts greyed",
        min(5.6, 1.3 + 0.17 * len(layers)),
        draw,
    )
