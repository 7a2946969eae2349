"""Marks of source and export on the same tasks: each metric with the harness's own error, and what changed between them.

Two models of one mark may differ on many documents, so the documents whose answer changed from right to
wrong or back are counted (flips; arXiv 2407.09141) and the two directions held against each other by
McNemar's exact test. Leaves out which tasks are worth asking.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from torch import Tensor

from ...artifact import read_tensors
from ...measure.divergence import Estimate
from ..scores.base import Score
from .asked import Answer, Asked, Pair


def mark(asked: Asked, folder: Path, ways: Sequence[str], seed: int = 0) -> tuple[list[Score], dict[str, Any]]:
    """Scores and JSON-able facts of the tasks, from the token values that `evaluate` left in `folder`.

    ways  the ways of activations that were swept, the first one first
    """
    values, _ = read_tensors(folder / "scores.safetensors", "token_scores")
    source = asked.run(partial(answers, asked, values, "", "source"))
    scores, facts = [], {}
    for number, way in enumerate(ways):
        at = "" if number == 0 else f"@{way}"
        export = asked.run(partial(answers, asked, values, at, "export"))
        for task in source["samples"]:
            found, counts = compared(asked, task, source, export, way, seed)
            scores += found
            facts[f"{task} {way}"] = counts
    own = None if asked.folder is None else str(asked.folder)
    return scores, {"harness": f"lm-eval {lm_eval.__version__}", "folder": own, "compared": facts}


def answers(asked: Asked, values: Mapping[str, Tensor], at: str, model: str, pairs: Sequence[Pair]) -> list[Answer]:
    """Σ ln p and greedy match of each pair. A position that is not finite makes the whole −inf, as the harness wants it."""
    found = []
    for pair in pairs:
        reading, row = asked.rows[pair]
        first, count = len(pair[0]) - 1, len(pair[1])
        nll_n, greedy_n = (
            values[f"{reading}{at}.{field}_{model}"][row, first : first + count].double() for field in ("nll", "greedy")
        )
        found.append((float(-nll_n.sum()) if nll_n.isfinite().all() else -math.inf, bool((greedy_n == 1).all())))
    return found


def compared(
    asked: Asked, task: str, source: Mapping[str, Any], export: Mapping[str, Any], way: str, seed: int
) -> tuple[list[Score], dict[str, Any]]:
    """Every metric that has a number for each document, for both models, and their paired difference."""
    before, after = ({s["doc_id"]: s for s in of["samples"][task]} for of in (source, export))
    scores: list[Score] = []
    facts: dict[str, Any] = {}
    for metric in before[next(iter(before))].get("metrics", ()):
        if not all(isinstance(s.get(metric), int | float) for s in before.values()):
            facts[metric] = {"not_scored": "no number for each document"}
            continue
        a_N, b_N = (np.array([of[doc][metric] for doc in before], float) for of in (before, after))

        def score(name: str, x: Estimate, unit: str = "share", metric: str = metric) -> Score:
            return Score(
                reading=task,
                name=f"task_{metric}_{name}",
                part="",
                value=x.value,
                error=x.error,
                low=x.low,
                high=x.high,
                unit=unit,
                tokens=tokens(asked),
                rows=len(before),
                activations=way,
                seed=seed,
            )

        for name, x_N in (("source", a_N), ("export", b_N), ("delta", b_N - a_N)):
            scores.append(score(name, Estimate.of_rows(x_N)))
        if set(a_N) | set(b_N) <= {0.0, 1.0}:
            lost, gained = int(((a_N == 1) & (b_N == 0)).sum()), int(((a_N == 0) & (b_N == 1)).sum())
            scores.append(score("flips", Estimate.of_share(lost + gained, len(a_N))))
            scores.append(score("mcnemar_p", Estimate(mcnemar(lost, gained)), "probability"))
            facts[metric] = {"documents": len(a_N), "lost": lost, "gained": gained}
    return scores, facts


def tokens(asked: Asked) -> int:
    return sum(int(reading.scored_BS.sum()) for reading in asked.readings)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact probability that so uneven a split of the changes is chance."""
    changes = lost + gained
    tail = sum(math.comb(changes, k) for k in range(min(lost, gained) + 1)) / 2**changes
    return min(1.0, 2 * tail)
