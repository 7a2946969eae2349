"""The page's plots: matplotlib, inlined as SVG, each drawn twice, for a wide page and for a narrow one.

Colours are stand-ins that become the page's CSS variables, so that one drawing serves light and dark.
Leaves out the mosaic (mosaic.py).
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

INK, MUTED, LINE, ACCENT, SECOND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "fate-0", SECOND: "fate-1", PAPER: "paper"}
WIDE, NARROW = 7.6, 4.1  # inches of 72 drawing units
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
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


@dataclass(frozen=True)
class Mark:
    """One value with its 95 % interval, if it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def printable(name: str) -> str:
    """A name without the characters that neither a font nor XML has."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def drawn(name: str, label: str, height: float, draw: Callable[[Axes, bool], None]) -> Markup:
    """HTML with two SVGs: `draw(axes, narrow)` at both widths. `name` keeps their ids apart."""
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(kind, svg(f"{name}-{kind}", label, width, height * tall, draw))
        for kind, width, tall in (("wide", WIDE, 1.0), ("narrow", NARROW, 0.92))
    )


def svg(name: str, label: str, width: float, height: float, draw: Callable[[Axes, bool], None]) -> Markup:
    """One drawing as an SVG element; `name` and `label` may be any text, and text in the drawing is escaped by matplotlib."""
    place = f"plot-{hashlib.sha256(name.encode()).hexdigest()[:8]}-"  # a file's name has no place in an id
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), width == NARROW)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{place}", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    head = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', text)
    assert head is not None
    body = Markup(re.sub(r"\n\s*", "\n", text[head.end() :]))
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(head[1], label) + body


def kl_histogram(name: str, kl_N: np.ndarray, marks: dict[str, float], floor: float | None = None) -> Markup:
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
        if floor is not None and bottom < floor < edges[-1]:
            axes.axvline(floor, color=MUTED, linewidth=1.2, linestyle=(0, (3, 2)))
            style: dict[str, Any] = {"textcoords": "offset points", "color": MUTED, "fontsize": 9.5, "rotation": 90}
            axes.annotate("noise floor", (floor, high), (-4, -4), ha="right", va="top", **style)
        pillars(axes, marks, float(high))
        axes.set_xlabel("KL of one token, nats (logarithmic)")
        axes.xaxis.set_major_formatter(FuncFormatter(power))
        axes.yaxis.set_major_locator(MaxNLocator(4 if narrow else 5, integer=True))
        axes.grid(False)

    return drawn(name, "Histogram of KL divergence by token", 3.3, draw)


def whiskers(
    name: str, label: str, marks: Sequence[Mark], unit: str, floor: Mark | None = None, signed: bool = False
) -> Markup:
    """Values with their 95 % intervals, one line each; `floor` is drawn through all of them, and zero where they are `signed`."""

    def draw(axes: Axes, narrow: bool) -> None:
        if floor is not None:
            axes.axvline(floor.value, color=SECOND, linewidth=1.2, linestyle=(0, (3, 2)))
            axes.annotate(
                printable(floor.name),
                (floor.value, len(marks) - 0.42),
                (4, 0),
                textcoords="offset points",
                color=SECOND,
                fontsize=9.5,
            )
        places = np.arange(len(marks))[::-1]
        for y, mark in zip(places, marks):
            if mark.low is not None and mark.high is not None:
                ends = [mark.low, mark.high]
                axes.plot(ends, [y, y], color=ACCENT, linewidth=2.2, solid_capstyle="round", alpha=0.55)
            axes.plot([mark.value], [y], marker="s", markersize=7, color=ACCENT)
            text, at = f"{mark.value:#.2g}".replace("-", "−"), (mark.value, y)
            axes.annotate(text, at, (0, 8), textcoords="offset points", ha="center", fontsize=9.5, color=MUTED)
        axes.set_yticks(places, [printable(mark.name) for mark in marks], color=INK)
        axes.set_ylim(-0.6, len(marks) - 0.3)
        if signed:
            axes.axvline(0, color=MUTED, linewidth=1)
        else:
            axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 6))
        axes.set_xlabel(unit)

    return drawn(name, label, 0.75 + 0.44 * len(marks), draw)


def by_layer(name: str, label: str, layers: Sequence[int], values: Sequence[float], mark_least: bool = False) -> Markup:
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


def histogram(name: str, label: str, values: np.ndarray, marks: dict[str, float], unit: str) -> Markup:
    """Values on a plain axis, laid in the same tiles as the KL of tokens; `marks` are drawn through."""
    counts, edges = np.histogram(values, min(48, max(8, len(values) // 6)))

    def draw(axes: Axes, narrow: bool) -> None:
        axes.stairs(counts, edges, fill=True, color=ACCENT, linewidth=0)
        axes.vlines(edges, 0, counts.max() * 1.01, color=PAPER, linewidth=0.9)
        pillars(axes, marks, float(counts.max()))
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 7))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(False)

    return drawn(name, label, 2.5, draw)


def power(value: float, _: int) -> str:
    """A power of ten as people write it."""
    return "10" + f"{round(np.log10(value))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def pillars(axes: Axes, marks: dict[str, float], high: float) -> None:
    """A line at each marked value, as high as leaves room for the words beside the others."""
    for i, (label, value) in enumerate(sorted(marks.items(), key=lambda m: m[1])):
        level = high * (1.08 + 0.12 * (len(marks) - 1 - i))
        axes.plot([value, value], [0, level], color=SECOND, linewidth=1.4)
        text, style = (
            f"{printable(label)} {value:#.3g}",
            {"textcoords": "offset points", "color": INK, "fontsize": 10.5},
        )
        axes.annotate(text, (value, level), (5, -3), **style)  # type: ignore[arg-type]
    axes.set_ylim(0, high * (1.12 + 0.12 * len(marks)))


def logarithmic(axes: Axes, which: str, sparse: bool = False) -> None:
    """A logarithmic axis whose numbers are written out, as many as it takes to read between them."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0,) if sparse or high / low > 300 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_locator(NullLocator())
