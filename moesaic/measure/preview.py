"""What a cut would cost, before any byte is written: candidates measured by masking, many in one sweep of the weights.

Masking an expert gives the logits of the model without it, so the figures are those of the pruned
model. Leaves out generation: text that loops is a matter of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from ..artifact import identity
from ..calibrate import Statistics
from ..calibrate.criteria import CRITERIA
from ..calibrate.selection import POOLED, select_experts
from ..checkpoint import Checkpoint
from ..data.tokens import TokenSet
from ..stream import LayerRun
from .branch import Branch, Trial
from .branches import Figures, run_branches
from .divergence.bootstrap import Bootstrap, Estimate
from .divergence.branches import against
from .divergence.comparison import Divergence

Kept = dict[int, tuple[int, ...]]
VERSION = 1  # goes up with any change to what is found of the same cut and text
FIGURES = ("kl_nats", "delta_ln_ppl", "perplexity", "top1", "overlap")


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

    @staticmethod
    def of(candidate: Candidate, row: Mapping[str, Any]) -> "Outlook":
        """Of what `figures_of` gave."""
        estimates = {name: Estimate(**row[name]) for name in FIGURES}
        return Outlook(candidate, **estimates, tokens=row["tokens"], nonfinite=row["nonfinite"])

    def facts(self) -> dict[str, Any]:
        figures = {n: vars(getattr(self, n)) for n in FIGURES}
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
    checkpoint: Checkpoint, found: Sequence[Candidate], trial: Trial, folder: Path, seed: int = 0
) -> list[Outlook]:
    """Measure candidates, best first within each count, as branches of one sweep (see `run_branches`).

    Cuts that are alike are measured once. Interrupted, the same call goes on; done before, it only reads what it left
    in `folder`. Memory: hidden states of as many candidates as fit into what the trial may take; the others take their
    turns. `seed` of the bootstrap.
    """
    figures = Figures(partial(figured, seed), {"figures": f"outlook {VERSION}", "seed": str(seed)})
    cuts = [Branch({}, candidate.kept) for candidate in found]
    place = folder / identity(checkpoint.identity, trial.tokens.identity, seed, VERSION)
    rows = run_branches(checkpoint, cuts, trial, place, figures, title="preview")
    outlooks = [Outlook.of(candidate, row) for candidate, row in zip(found, rows)]
    return sorted(outlooks, key=lambda o: (-o.candidate.experts, o.kl_nats.value))


def figured(
    seed: int, run: LayerRun, source_BTD: Tensor, cuts: Sequence[Tensor], tokens: TokenSet, told: Callable[[int], None]
) -> list[dict[str, Any]]:
    """`Figures.find` of `preview`."""
    return [figures_of(d, seed) for d in against(run, source_BTD, cuts, tokens.ids_BT)]


def figures_of(divergence: Divergence, seed: int) -> dict[str, Any]:
    """What `Outlook.of` reads, JSON-able."""
    bootstrap = Bootstrap(divergence, seed)
    nll = bootstrap.mean(divergence["nll_export"])
    figures = {
        "kl_nats": bootstrap.mean(divergence["kl_nats"], within=(0.0, np.inf)),
        "delta_ln_ppl": bootstrap.mean(divergence["nll_export"] - divergence["nll_source"]),
        "perplexity": nll.map(math.exp, math.exp(nll.value)),
        "top1": bootstrap.mean(divergence["same_top1"], within=(0.0, 1.0)),
        "overlap": bootstrap.mean(divergence["overlap"], within=(0.0, 1.0)),
    }
    counts = {"tokens": divergence.tokens, "nonfinite": sum(divergence.nonfinite.values())}
    return {name: vars(estimate) for name, estimate in figures.items()} | counts


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
