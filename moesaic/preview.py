"""What a cut would cost, before any byte is written: candidates measured by masking, all in one sweep of the weights.

Masking an expert gives the logits of the model without it, so the figures are those of the pruned
model. Leaves out generation: text that loops is a matter of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from .calibrate import Statistics
from .checkpoint import Checkpoint
from .criteria import CRITERIA
from .divergence import Bootstrap, Divergence, Estimate, against
from .plan import dropped
from .progress import progress
from .report import mosaic
from .report.plots import ACCENT, INK, MUTED, WIDE, svg
from .select import POOLED, select_experts
from .stream import LayerRun, State
from .tokens import TokenSet

Kept = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """One way to cut."""

    criterion: str
    experts: int
    kept: Kept


@dataclass(frozen=True)
class Outlook:
    """What one candidate would cost on the text that was read."""

    candidate: Candidate
    kl_nats: Estimate
    delta_ln_ppl: Estimate
    perplexity: Estimate  # of the cut model
    top1: Estimate
    overlap: Estimate  # Σ min(p, q): share of drafts that speculative sampling would accept
    tokens: int
    nonfinite: int

    def facts(self) -> dict[str, Any]:
        figures = {n: vars(getattr(self, n)) for n in ("kl_nats", "delta_ln_ppl", "perplexity", "top1", "overlap")}
        return {
            "criterion": self.candidate.criterion,
            "experts": self.candidate.experts,
            "tokens": self.tokens,
            "nonfinite": self.nonfinite,
        } | figures


def candidates(
    statistics: Statistics, counts: Sequence[int], criteria: Sequence[str] = (), seeds: int = 0,
    policy: str = POOLED, domains: Mapping[str, float] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Every criterion (all there are, unless named) at every count; and `seeds` random cuts, to compare with."""
    found = [
        Candidate(name, k, select_experts(statistics, name, k, policy, domains).cut.kept)
        for k in counts
        for name in criteria or sorted(CRITERIA)
    ]
    experts = next(iter(statistics.sums.values())).shape[-1]
    for k in counts:
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            kept = {n: tuple(sorted(rng.choice(experts, k, replace=False).tolist())) for n in statistics.layers}
            found.append(Candidate(f"random {seed}", k, kept))
    return found


def preview(
    checkpoint: Checkpoint, found: Sequence[Candidate], tokens: TokenSet, seed: int = 0, quiet: bool = False
) -> list[Outlook]:
    """Measure candidates on `tokens`, best first within each count. One sweep reads each weight once for all.

    Memory: hidden states of all candidates, F32 [candidates + 1, tokens, D].
    """
    run = LayerRun(checkpoint)
    hidden_BTD = run.embed(tokens.ids_BT)
    states = [State(hidden_BTD)]
    for candidate in found:
        states.append(State(hidden_BTD.clone(), dropped(candidate.kept, checkpoint.architecture.experts)))
    with progress("preview", checkpoint.architecture.layers, "layers", quiet) as meter:
        for _, after in run.sweep(states):
            states = after
            meter.advance(1)
    divergences = against(run, states[0].hidden_BTD, [s.hidden_BTD for s in states[1:]], tokens.ids_BT)
    outlooks = [outlook(c, d, seed) for c, d in zip(found, divergences)]
    return sorted(outlooks, key=lambda o: (-o.candidate.experts, o.kl_nats.value))


def outlook(candidate: Candidate, divergence: Divergence, seed: int) -> Outlook:
    bootstrap = Bootstrap(divergence, seed)
    nll = bootstrap.mean(divergence["nll_export"])
    return Outlook(
        candidate,
        bootstrap.mean(divergence["kl_nats"], within=(0.0, np.inf)),
        bootstrap.mean(divergence["nll_export"] - divergence["nll_source"]),
        nll.map(math.exp, math.exp(nll.value)),
        bootstrap.mean(divergence["same_top1"], within=(0.0, 1.0)),
        bootstrap.mean(divergence["overlap"], within=(0.0, 1.0)),
        divergence.tokens,
        sum(divergence.nonfinite.values()),
    )


def table(outlooks: Sequence[Outlook]) -> Table:
    """Candidates to look at, best first."""
    tokens = outlooks[0].tokens if outlooks else 0
    shown = Table(
        title=f"measured by masking, {tokens:,} tokens, ± one standard error over rows",
        title_justify="left",
        show_edge=False,
    )
    for heading in ("experts", "criterion", "KL, nats", "Δ ln perplexity", "top-1", "overlap"):
        shown.add_column(heading, justify="left" if heading == "criterion" else "right")
    for o in outlooks:
        shown.add_row(
            str(o.candidate.experts), o.candidate.criterion,
            *(f"{e.value:.4f} ± {e.error or 0:.4f}" for e in (o.kl_nats, o.delta_ln_ppl, o.top1, o.overlap)),
        )  # fmt: skip
    return shown


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
