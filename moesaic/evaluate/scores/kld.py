"""KL(source ‖ export) and what goes with it: its spread, its tail, where the source was sure, and agreement on tokens.

Figures are per token over the full vocabulary. Leaves out KL from a server's few best log-probabilities:
that is a lower bound, and not to be called KL.
"""

from itertools import pairwise

import numpy as np

from ...measure.divergence import Estimate
from .base import Evaluation, Score, Scores, Scoring

BUCKETS = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the source's largest probability
SPREAD = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99, "kl_p999": 0.999}
SHARE = (0.0, 1.0)
NONNEGATIVE = (0.0, float("inf"))


def score(of: Scoring) -> list[Score]:
    divergence, bootstrap = of.divergence, of.bootstrap
    kl_BS, delta_BS = divergence["kl_nats"], divergence["delta_p"]
    found = []
    for part, where in of.parts():
        found.append(of.score("kl_mean", bootstrap.mean(kl_BS, where, NONNEGATIVE), "nats", part, where))
        agreement = bootstrap.mean(divergence["same_top1"], where, SHARE)
        found.append(of.score("top1_agreement", agreement, "share", part, where))
    quantiles = bootstrap.quantiles(kl_BS, tuple(SPREAD.values()))
    found += [of.score(name, estimate, "nats") for name, estimate in zip(SPREAD, quantiles)]
    found.append(of.score("kl_max", Estimate(float(kl_BS.max()) if divergence.tokens else float("nan")), "nats"))
    found.append(of.score("kl_above_1_nat", bootstrap.mean((kl_BS > 1).astype(float), within=SHARE), "share"))
    found.append(of.score("top5_overlap", bootstrap.mean(divergence["shared_top5"], within=SHARE), "share"))
    found.append(of.score("delta_p_mean", bootstrap.mean(delta_BS), "probability"))
    found.append(of.score("delta_p_rms", rms(bootstrap.mean(delta_BS**2, within=SHARE)), "probability"))
    return found + by_confidence(of)


def by_confidence(of: Scoring) -> list[Score]:
    """Mean KL where the source gave its first token a probability within each bucket."""
    confidence_BS = of.divergence["confidence"]
    found = []
    for low, high in pairwise(BUCKETS):
        where = (confidence_BS >= low) & ((confidence_BS < high) | (high == 1.0))
        estimate = of.bootstrap.mean(of.divergence["kl_nats"], where, NONNEGATIVE)
        found.append(of.score("kl_mean", estimate, "nats", f"confidence {low:g}–{high:g}", where))
    return found


def rms(square: Estimate) -> Estimate:
    root = float(np.sqrt(square.value))
    return square.map(lambda x: float(np.sqrt(x)), 0.5 / root if root else 0.0)


def llama_text(scores: Scores, reading: str | None = None) -> str:
    """The figures under the labels of llama.cpp's perplexity tool; ± is one standard error over rows here."""

    def line(label: str, name: str, scale: float = 1.0, unit: str = "") -> str:
        s = scores.find(name, reading=reading)
        if s is None or s.value is None:
            return f"{label}: not measured"
        error = "" if s.error is None else f" ± {s.error * scale:10.6f}"
        return f"{label}: {s.value * scale:10.6f}{error}{unit}"

    return "\n".join(
        [
            "====== Perplexity statistics ======",
            line("Mean PPL(Q)                   ", "ppl_export"),
            line("Mean PPL(base)                ", "ppl_source"),
            line("Cor(ln(PPL(Q)), ln(PPL(base)))", "nll_correlation", 100, " %"),
            line("Mean ln(PPL(Q)/PPL(base))     ", "delta_ln_ppl"),
            line("Mean PPL(Q)/PPL(base)         ", "ppl_ratio"),
            line("Mean PPL(Q)-PPL(base)         ", "ppl_difference"),
            "",
            "====== KL divergence statistics ======",
            line("Mean    KLD", "kl_mean"),
            line("Maximum KLD", "kl_max"),
            line("99.9%   KLD", "kl_p999"),
            line("99.0%   KLD", "kl_p99"),
            line("95.0%   KLD", "kl_p95"),
            line("90.0%   KLD", "kl_p90"),
            line("Median  KLD", "kl_median"),
            "",
            "====== Token probability statistics ======",
            line("Mean    Δp", "delta_p_mean", 100, " %"),
            line("RMS Δp    ", "delta_p_rms", 100, " %"),
            line("Same top p", "top1_agreement", 100, " %"),
        ]
    )


KLD = Evaluation(
    "kld",
    "KL(source ‖ export) per token in nats, with its spread, and how often both put the same token first",
    score,
    "labels: llama.cpp, tools/perplexity; buckets of confidence: exllamav3, qbench",
)
