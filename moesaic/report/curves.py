"""The two drawings of a budget: harm against bytes with what was chosen, and prediction against measurement.

They rest on plots.py for how a drawing gets onto the page. Leaves out the tables beside them (sections/frontier.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .plots import ACCENT, INK, LINE, MUTED, PAPER, SECOND, drawn, logarithmic

DECADES = 3000.0  # between the most and the least KL that is drawn


@dataclass(frozen=True)
class Point:
    """One plan: how large it is, and what it was predicted and measured to cost."""

    name: str
    bytes: float
    predicted_nats: float
    measured_nats: float | None = None
    error: float | None = None
    is_chosen: bool = False


def frontier(
    unit: tuple[float, str], line_bytes: np.ndarray, line_nats: np.ndarray, knee: Point, points: Sequence[Point],
    budget_bytes: float | None,
) -> Markup:  # fmt: skip
    """Predicted KL along the frontier, with the knee, the budget, and candidates as predicted and as measured.

    unit  of the axis of bytes: how many, and its name
    """
    size, name = unit
    high = max([float(line_nats.max()), *(p.measured_nats or p.predicted_nats for p in points)])
    low = max(float(line_nats[line_nats > 0].min()), high / DECADES) / 1.6
    nats = np.maximum(line_nats, low / 2)

    def draw(axes: Axes, narrow: bool) -> None:
        axes.plot(line_bytes / size, nats, color=ACCENT, linewidth=1.8, drawstyle="steps-post", label="predicted")
        axes.plot(
            [knee.bytes / size],
            [knee.predicted_nats],
            "D",
            markersize=8,
            color=PAPER,
            markeredgecolor=INK,
            label="knee",
        )
        for point in points:
            candidate(axes, point, point.bytes / size)
        axes.set_xlabel(f"{name} on disk, every file counted")
        axes.set_ylabel("KL, nats per token")
        axes.set_ylim(low, high * 1.8)
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 8))
        logarithmic(axes, "y")
        if budget_bytes is not None:
            limit(axes, budget_bytes / size)
        if not narrow and len(points) > 1:
            closer(axes, points)

    return drawn("frontier", "Predicted KL against bytes, with measured candidates", 3.7, draw)


def limit(axes: Axes, x: float) -> None:
    """The budget, named on the side that has room."""
    left = x > sum(axes.get_xlim()) / 2
    axes.axvline(x, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
    style: dict[str, Any] = {"textcoords": "offset points", "color": MUTED, "fontsize": 9.5}
    axes.annotate("budget", (x, axes.get_ylim()[1]), (-5 if left else 5, -10), ha="right" if left else "left", **style)


def closer(axes: Axes, points: Sequence[Point]) -> None:
    """The candidates again, side by side, in the corner that a falling line leaves free."""
    inset = axes.inset_axes((0.6, 0.56, 0.4, 0.44))
    inset.set_facecolor(PAPER)
    for i, point in enumerate(points):
        candidate(inset, point, i)
    inset.set_xticks(
        range(len(points)), ["ships" if p.is_chosen else str(i + 1) for i, p in enumerate(points)], fontsize=9
    )
    inset.set_xlim(-0.6, len(points) - 0.4)
    inset.set_ylim(bottom=0)
    inset.yaxis.set_major_locator(MaxNLocator(4))
    inset.tick_params(labelsize=9)
    inset.set_title("candidates, in the order of the table", fontsize=9, color=MUTED, loc="left")


def candidate(axes: Axes, point: Point, x: float) -> None:
    """An open square where it was predicted, a full one where it was measured, the selected plan larger."""
    color = SECOND if point.is_chosen else ACCENT
    side = 9 if point.is_chosen else 6
    if point.measured_nats is not None:
        axes.plot([x, x], [point.predicted_nats, point.measured_nats], color=color, linewidth=0.9)
        spread = 1.96 * (point.error or 0.0)
        axes.plot([x, x], [point.measured_nats - spread, point.measured_nats + spread], color=color, linewidth=1.8)
        axes.plot([x], [point.measured_nats], "s", markersize=side, color=color)
    axes.plot([x], [point.predicted_nats], "s", markersize=side - 1, color=PAPER, markeredgecolor=color, zorder=3)


def is_drawn(point: Point) -> bool:
    """Whether a point has a place on two logarithmic axes."""
    return all(x is not None and np.isfinite(x) and x > 0 for x in (point.predicted_nats, point.measured_nats))


def agreement(fitted: Sequence[Point], found: Sequence[Point]) -> Markup:
    """Measured against predicted KL: plans that the rule was fitted on, and candidates that it had not seen."""
    every = [p for p in (*fitted, *found) if is_drawn(p)]
    values = np.array([(p.predicted_nats, p.measured_nats) for p in every], float)

    def draw(axes: Axes, narrow: bool) -> None:
        low, high = values.min() / 1.5, values.max() * 1.5
        ends = np.array([low, high])
        axes.fill_between(ends, ends / 2, ends * 2, color=LINE, alpha=0.45, linewidth=0)
        axes.plot(ends, ends, color=MUTED, linewidth=0.9)
        for group, style in ((fitted, {"color": PAPER, "markeredgecolor": ACCENT}), (found, {"color": SECOND})):
            usable = [p for p in group if p in every]
            x, y = [p.predicted_nats for p in usable], [p.measured_nats for p in usable]
            axes.plot(x, y, "s", markersize=6.5, **style)  # type: ignore[arg-type]
        for point in found:
            if point in every and point.measured_nats is not None and point.error is not None:
                at, spread = point.predicted_nats, 1.96 * point.error
                axes.plot([at, at], [point.measured_nats - spread, point.measured_nats + spread], color=SECOND)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        logarithmic(axes, "x", sparse=narrow)
        logarithmic(axes, "y")
        axes.grid(axis="both")
        axes.set_xlabel("predicted KL, nats per token")
        axes.set_ylabel("measured")

    return drawn("agreement", "Measured against predicted KL", 3.6, draw)
