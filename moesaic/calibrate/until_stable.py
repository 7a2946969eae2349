"""Adaptive calibration size: double the text until the selection of experts is stable.

The rows of a text have a fixed order, spread over all its domains from the first row on, and every chunk is
the next piece of it. So a longer calibration contains each shorter one, and what was swept stays swept.
Leaves out what the choice costs (preview): text that moves the choice no more can still be the wrong text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..artifact import write_json
from ..checkpoint import Checkpoint
from ..data.corpus import Corpus
from ..data.tokens import TokenSet
from .criteria import CRITERIA
from .selection import REAP, Ranking, Selection, check_names, jaccard, scores, select_experts
from .statistics import Statistics, check_domains
from .sweep import calibrate
from .weights import WEIGHTS, weigh

STILL = 0.95  # mean Jaccard of the kept sets before and after a doubling
MOVED = 0.02  # mean change of the cut margins, and change of the scores' error, that count as none


@dataclass(frozen=True)
class Step:
    """The choice after one more doubling, and how far it is from the one before; worst over all counts."""

    before: int  # tokens
    tokens: int
    jaccard: float  # of kept sets, mean over layers
    jaccard_least: float  # in the layer that moved most
    margin: float  # median over layers
    margin_moved: float  # mean change over layers
    error: float  # standard error of the scores, from the two halves, over their mean
    error_moved: float

    @property
    def doubled(self) -> bool:
        """Whether there was text enough for that: the last step may be a shorter one, which tells less."""
        return self.tokens >= 2 * self.before

    @property
    def still(self) -> bool:
        return self.doubled and self.jaccard >= STILL and self.margin_moved <= MOVED and self.error_moved <= MOVED


@dataclass(frozen=True)
class Stability:
    """Statistics of all that was read, and how they came to be enough, or not."""

    statistics: Statistics
    tokens: TokenSet  # that were read
    steps: tuple[Step, ...]

    @property
    def stable(self) -> bool:
        return bool(self.steps) and self.steps[-1].still

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        read = self.statistics.tokens
        if self.stable:
            last = self.steps[-1]
            return (
                f"{read // 2:,} tokens were enough: with twice as many, kept sets agree to {last.jaccard:.1%} (Jaccard)"
            )
        if self.steps and self.steps[-1].doubled:
            return f"the choice still moves with {read:,} tokens, all that the text holds; give more"
        return f"the text ends with {read:,} tokens, before a doubling could tell whether they are enough; give more"

    def facts(self) -> dict[str, Any]:
        steps = [vars(step) | {"still": step.still} for step in self.steps]
        return {"stable": self.stable, "verdict": self.verdict, "read_tokens": self.statistics.tokens, "steps": steps}


def calibrate_until_stable(
    checkpoint: Checkpoint, corpus: Corpus, work: Path, counts: Sequence[int], ranking: Ranking = REAP, quiet: bool = False
) -> Stability:  # fmt: skip
    """Calibrate into `work`/stats on half of `corpus.tokens`, then all of them, then twice as many, until a doubling
    moves nothing: not what each of `counts` keeps by `ranking`, not the margins, not the error of the scores.

    Ends too when the text does. Interrupted, or called again with more `tokens` to begin with, nothing that was
    swept is swept again where the chunks are the same. Leaves `work`/settled.json.
    """
    criterion, policy, domains = ranking.watched, ranking.policy, ranking.domains
    check_names(policy, (criterion,))
    pool = corpus.pool(checkpoint, work / "pool.safetensors")
    if domains is not None:
        check_domains(domains, pool.domains)
    weights = weigh(checkpoint, work / WEIGHTS, quiet) if CRITERIA[criterion].reads_weights else {}
    folders: list[Path] = []
    steps: list[Step] = []
    rows: list[int] = []
    before: list[Selection] = []
    error_before, tokens = 0.0, 0
    for more in rungs(pool, corpus.tokens):
        rows += more
        chunk = calibrate(checkpoint, pool.take(more), work / "stats", quiet)
        folders += chunk.folders
        statistics = replace(Statistics.of(folders, checkpoint), weights=weights)
        now = [select_experts(statistics, criterion, k, policy, domains) for k in counts]
        error = score_error(statistics, criterion, policy, domains)
        if before:
            steps.append(compared(before, now, (tokens, statistics.tokens), error_before, error))
            if steps[-1].still:
                break
        before, error_before, tokens = now, error, statistics.tokens
    stability = Stability(statistics, pool.take(sorted(rows)), tuple(steps))
    inputs = {"source": checkpoint.identity, "tokens": stability.tokens.identity}
    write_json(work / "settled.json", "settled", stability.facts(), inputs)
    return stability


def statistics_of_run(checkpoint: Checkpoint, run: Path, weighed: bool, quiet: bool = False) -> Statistics:
    """All statistics that `calibrate` left in the folder `run`; `weighed`: with those of weights, found where missing."""
    statistics = Statistics.load(run / "stats", checkpoint)
    return replace(statistics, weights=weigh(checkpoint, run / WEIGHTS, quiet)) if weighed else statistics


def rungs(pool: TokenSet, tokens: int) -> Iterator[list[int]]:
    """Rows of `pool` by chunks: half of `tokens`, as many again, and then each time as many as before in all."""
    order = spread(pool)
    start, stop = 0, max(1, tokens // pool.ids_BT.shape[1] // 2)
    while start < len(order):
        yield sorted(order[start:stop])
        start, stop = stop, 2 * stop


def spread(pool: TokenSet) -> list[int]:
    """Every row once, so that the first n of them, for any n, come from all domains and from all over each."""
    domains = [np.flatnonzero(pool.domain_B.numpy() == d) for d in range(len(pool.domains))]
    turns = [(turn, d, int(rows[at])) for d, rows in enumerate(domains) for turn, at in enumerate(halving(len(rows)))]
    return [row for _, _, row in sorted(turns)]


def halving(count: int) -> list[int]:
    """0 … `count` − 1 in the order of van der Corput: each next number lies in the widest gap."""
    bits = max(1, (count - 1).bit_length())
    turned = (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits))
    return [n for n in turned if n < count]


def score_error(statistics: Statistics, criterion: str, policy: str, domains: Mapping[str, float] | None) -> float:
    """Root mean square of half the difference between the two halves' scores, over the mean score, mean over layers."""
    one_LE, other_LE = (scores(statistics, criterion, policy, domains, half) for half in (0, 1))
    rms_L = np.sqrt(np.square((one_LE - other_LE) / 2).mean(1))
    return float((rms_L / np.maximum((one_LE + other_LE).mean(1) / 2, 1e-300)).mean())


def compared(
    before: list[Selection], now: list[Selection], tokens: tuple[int, int], error_before: float, error: float
) -> Step:
    same_KL = np.array([
        [jaccard(a.cut.kept[layer], b.cut.kept[layer]) for layer in b.layers] for a, b in zip(before, now)
    ])  # fmt: skip
    margin_KL, old_KL = (np.array([list(s.cut.margins.values()) for s in found]) for found in (now, before))
    return Step(
        before=tokens[0],
        tokens=tokens[1],
        jaccard=float(same_KL.mean(1).min()),
        jaccard_least=float(same_KL.min()),
        margin=float(np.median(margin_KL, 1).min()),
        margin_moved=float(abs(margin_KL - old_KL).mean(1).max()),
        error=error,
        error_moved=abs(error - error_before),
    )


def table(stability: Stability) -> Table:
    """What each doubling changed."""
    shown = Table(title="what each doubling of the text changed", title_justify="left", show_edge=False)
    for heading in ("tokens", "kept sets agree", "least", "median margin", "moved", "score error", ""):
        shown.add_column(heading, justify="right")
    for s in stability.steps:
        figures = (s.jaccard, s.jaccard_least, s.margin, s.margin_moved, s.error)
        shown.add_row(f"{s.tokens:,}", *(f"{x:.1%}" for x in figures), "still" if s.still else "")
    return shown
