"""What a run keeps of the choice, for people and for the report. Keys are only ever added.

frontier.json
    experts, bytes, harm_nats, predicted_nats    lists of one length, bytes rising: plans that no other on offer beats;
                      harm is the sum of prices (dropping weighted), predicted what the rule makes of it
    points            how many there are; the lists are thinned evenly to at most POINTS of them
    knee              the point where the curve bends most: experts, bytes, predicted_nats
    budget_bytes, budget_bits, bounds    where a size is asked for: kept count -> nats that no plan of that count within
                      it comes below, as predicted
    harm              what prices are: "measured", "surrogate", "anchored" or "trace"
    rule              a, b, weight; error: of ln(predicted / measured), rms over plans each left out in turn; plans; range_nats

rule.json             the rule's coefficients, and under "measured" the plans that it was fitted on: experts, rounding, dropping
                      (the two sums), nats, error, formats

candidates.json
    candidates        name, experts, bytes, harm_nats, predicted_nats, measured_nats, error (one standard error over rows),
                      nonfinite, formats; all within the budget
    ships             the number of the one that does
    budget_bytes, tokens, text, rule_error, rounding    tokens and text they were measured on; how they were rounded for it

Leaves out reading them (report).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import write_json
from ..data.tokens import TokenSet
from ..measure import Measured
from .candidates import Candidate, Traced

POINTS = 2000  # of the frontier that are written down


def write_frontier(path: Path, traced: Traced, inputs: Mapping[str, str]) -> None:
    frontier, rule = traced.frontier, traced.rule
    k, p = frontier.pareto()
    at = np.unique(np.linspace(0, len(k) - 1, min(POINTS, len(k))).round().astype(int))
    harm_N = frontier.harm_KP[k, p]
    knee_k, knee_p = frontier.knee()
    body: dict[str, Any] = {
        "points": len(k),
        "experts": frontier.kept_K[k][at].tolist(),
        "bytes": frontier.bytes_KP[k, p][at].tolist(),
        "harm_nats": harm_N[at].tolist(),
        "predicted_nats": rule.predict(harm_N[at]).tolist(),
        "knee": {
            "experts": int(frontier.kept_K[knee_k]),
            "bytes": int(frontier.bytes_KP[knee_k, knee_p]),
            "predicted_nats": float(rule.predict(frontier.harm_KP[knee_k, knee_p])),
        },
        "harm": traced.prices.harm,
        "rule": rule.facts,
    }
    if traced.budget_bytes is not None:
        bound_K = rule.predict(frontier.bounds(traced.budget_bytes))
        bounds = {str(kept): float(b) for kept, b in zip(frontier.kept_K.tolist(), bound_K) if math.isfinite(b)}
        body |= {"budget_bytes": traced.budget_bytes, "budget_bits": traced.menu.bits(traced.budget_bytes)}
        body["bounds"] = bounds
    write_json(path, "frontier", body, inputs)


def write_candidates(
    path: Path, found: Sequence[Candidate], measured: Sequence[Measured], text: TokenSet, body: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> None:  # fmt: skip
    told = [
        {
            "name": c.name, "experts": c.experts, "bytes": c.bytes, "harm_nats": c.harm, "predicted_nats": c.predicted_nats,
            "measured_nats": m.nats, "error": m.error, "nonfinite": m.nonfinite, "formats": dict(c.plan.formats),
        }
        for c, m in zip(found, measured)
    ]  # fmt: skip
    write_json(
        path, "candidates", {**body, "tokens": text.tokens, "text": dict(text.facts), "candidates": told}, inputs
    )
