"""The plot of a preview of cuts, as a file of its own. Leaves out measuring them (preview)."""

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..measure.preview import Outlook
from . import mosaic
from .plots import ACCENT, INK, MUTED, WIDE, svg

PANELS = (("kl_nats", "KL, nats"), ("top1", "same top-1"), ("overlap", "acceptance overlap"))


def plot(outlooks: Sequence[Outlook]) -> Markup:
    """A standalone SVG, light and dark: KL, top-1 and overlap of each cut with 95 % intervals, one line a criterion."""
    counts = sorted({o.candidate.experts for o in outlooks}, reverse=True)
    least = [o.candidate.criterion for o in outlooks if o.candidate.experts == counts[-1]]  # best first
    place = {name: -i for i, name in enumerate(least)}

    def draw(axes: Axes, narrow: bool) -> None:
        figure = axes.get_figure()
        assert figure is not None
        axes.remove()
        for panel, (axis, (name, title)) in enumerate(zip(figure.subplots(1, len(PANELS), sharey=True), PANELS)):
            for o in outlooks:
                estimate, y = getattr(o, name), place[o.candidate.criterion]
                shade = 1.0 - 0.65 * counts.index(o.candidate.experts) / max(1, len(counts) - 1)
                if estimate.low is not None:
                    axis.plot([estimate.low, estimate.high], [y, y], color=ACCENT, linewidth=2.2, alpha=0.5 * shade)
                axis.plot([estimate.value], [y], marker="s", markersize=6, color=ACCENT, alpha=shade)
                if y == 0 and panel == 0 and len(counts) > 1:
                    axis.annotate(
                        f"{o.candidate.experts}", (estimate.value, y), (0, 7), textcoords="offset points",
                        ha="center", fontsize=9.5, color=MUTED,
                    )  # fmt: skip
            axis.set_title(title, loc="left", fontsize=10.5, color=MUTED)
            axis.set_yticks([place[c] for c in least], [c.replace("_", " ") for c in least], color=INK)
            axis.set_ylim(min(place.values()) - 0.6, 0.9)
            axis.grid(axis="x")
            axis.grid(visible=False, axis="y")
            axis.xaxis.set_major_locator(MaxNLocator(4))

    drawing = svg("preview", "What each cut would cost", WIDE, 1.0 + 0.3 * len(least), draw)
    return standalone(drawing)


def standalone(drawing: Markup) -> Markup:
    """A plot of the page as a file of its own: with the page's colours, and its ground."""
    head, _, rest = str.partition(drawing, ">")
    colours = Markup(":root{{{}}}@media (prefers-color-scheme: dark){{:root{{{}}}}}").format(
        mosaic.variables("light"), mosaic.variables("dark")
    )
    fonts = Markup("text{font-family:Inter,'Segoe UI','Helvetica Neue',Arial,sans-serif}")
    names = Markup('xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"')
    ground = Markup('<rect width="100%" height="100%" style="fill:var(--paper)"/>')
    return Markup("{} {}><style>{}{}</style>{}{}").format(Markup(head), names, colours, fonts, ground, Markup(rest))
