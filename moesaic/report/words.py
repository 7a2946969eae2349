"""Figures as people read them: sizes in both units, values with no more digits than their error allows, names in full."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluate import Score

NAMES = {
    "kl_mean": "KL divergence, mean",
    "kl_median": "KL divergence, median",
    "kl_p90": "KL divergence, 90th percentile",
    "kl_p95": "KL divergence, 95th percentile",
    "kl_p99": "KL divergence, 99th percentile",
    "kl_p999": "KL divergence, 99.9th percentile",
    "kl_max": "KL divergence, largest",
    "kl_above_1_nat": "Tokens with more than 1 nat",
    "ppl_source": "Perplexity, source",
    "ppl_export": "Perplexity, export",
    "delta_ln_ppl": "Δ ln perplexity, paired",
    "ppl_difference": "Perplexity, export less source",
    "ppl_ratio": "Perplexity, export over source",
    "top1_agreement": "Same most likely token",
    "top5_overlap": "Overlap of the five most likely",
    "delta_p_mean": "Δp of the token that follows, mean",
    "delta_p_rms": "Δp of the token that follows, root mean square",
    "nll_correlation": "Correlation of −ln p by token",
    "ppl_served": "Perplexity",
    "needle_found_served": "needles found",
    "needle_log_p_served": "ln p of the answer, a token",
    "served_delta_nll": "−ln p of the server less that of the sweep",
    "router_agreement": "Experts selected by both",
    "pruned_mass": "Gates that fell on dropped experts",
}
SHARES = ("share", "probability", "correlation")  # units that are shown in per cent
ROLES = {
    "experts": "Routed experts",
    "shared": "Shared expert",
    "dense": "Dense MLP",
    "qkv": "Attention: q, k, v and indexer",
    "o": "Attention: output",
    "router": "Routers and biases",
    "embedding": "Embedding",
    "head": "Output head",
    "norm": "Norms",
    "vision": "Vision tower",
}
TERMS = {
    "reap": "REAP",
    "ean": "EAN",
    "easy_ep": "EASY-EP",
    "man": "MAN",
    "msan": "MSAN",
    "aimer": "AIMER",
    "rtn": "rounding to nearest",
    "search": "scale search",
    "weighted": "scale search weighted by inputs",
    "gptq": "GPTQ",
    "autoround": "AutoRound",
    "compressed_tensors": "compressed-tensors",
    "vllm": "vLLM",
    "mlx": "MLX",
}
CHECKS = {
    "structure": "tensors present, of the right shape and type",
    "counts": "expert counts in the config agree",
    "index": "index names every tensor and its true size",
    "files": "files carried over unchanged",
    "finite": "tensors without a single infinite or missing value",
    "magnitude": "matrices of a plausible size",
    "bytes": "tensors byte-identical to the source",
    "rows": "router tensors equal to the kept rows of the source",
    "codes": "tensors that rounding the source again gives again",
    "near": "tensors that cannot be rounded again, held to the source by their size and error",
    "overlay": "tensors unchanged since they were made on text",
}


def decimal(count: float) -> str:
    return scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def binary(count: float) -> str:
    return scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = 0 if count < 1 else min(int(math.log(count, base)), len(units) - 1)
    value = count / base**power
    return f"{value:,.0f} {units[power]}" if power == 0 else f"{value:,.{2 if value < 100 else 1}f} {units[power]}"


def digits(value: float, error: float | None) -> int:
    """Decimals to show: two digits of the error, or three of a value that has none."""
    size = error if error else abs(value) * 0.1
    return 2 if not size or not math.isfinite(size) else max(0, min(9, 1 - math.floor(math.log10(size))))


def figure(score: Score | None) -> dict[str, str]:
    """`value`, `error` (with its ±), `interval` and `unit` of a score as text; empty where there is none."""
    if score is None or score.value is None:
        return {"value": "not measured", "error": "", "interval": "", "unit": ""}
    scale, unit = (
        (100, "%") if score.unit in SHARES else (1, "" if score.unit in ("perplexity", "ratio") else score.unit)
    )
    value, error = score.value * scale, None if score.error is None else score.error * scale
    places = digits(value, error)
    sign = "+" if "delta" in score.name.split("_") and not score.name.endswith("rms") else ""
    shown = {"value": f"{value:{sign},.{places}f}", "error": "", "interval": "", "unit": unit}
    if error:
        shown["error"] = f"± {error:,.{places}f}"
    if score.low is not None and score.high is not None:
        shown["interval"] = f"{score.low * scale:{sign},.{places}f} to {score.high * scale:{sign},.{places}f}"
    return {key: text.replace("-", "−") for key, text in shown.items()}


def model_name(model: str) -> str:
    """What a model is called: its folder, or in the hub's cache (models--ORG--NAME/snapshots/…) its repository."""
    path = Path(model).resolve()
    hub = next((part for part in path.parts if part.startswith("models--")), "")
    return hub.split("--")[-1] or path.name


def name(score: str) -> str:
    """What a score is called; one that has no entry here keeps its own name."""
    return NAMES.get(score, score.replace("_", " "))


def value_error(value: float | None, error: float | None) -> tuple[str, str]:
    """A value and its standard error, with as many digits as the error deserves."""
    if value is None or not math.isfinite(value):
        return "not measured", ""
    places = digits(value, error)
    return f"{value:,.{places}f}".replace("-", "−"), f"{error:,.{places}f}" if error and math.isfinite(error) else ""


def significant(value: float) -> str:
    """Three digits of a value that has no error."""
    return value_error(value, None)[0]


def term(name: str) -> str:
    """The name that people know a plug-in by."""
    return TERMS.get(name, name.replace("_", " "))


def bucket(part: str) -> str:
    """A part of a reading: a domain as it is, a range of confidence in per cent."""
    if not part.startswith("confidence "):
        return part
    low, high = (100 * float(x) for x in part.removeprefix("confidence ").split("–"))
    return f"{low:.0f} to {high:.0f} %"


def fate(name: str, source_format: str) -> str:
    """What became of an expert, in words."""
    return {"dropped": "dropped", "source": f"kept as stored, {source_format}"}.get(
        name, f"kept, rounded to {name.upper()}"
    )


def one_format(facts: Mapping[str, Any] | None, role: str) -> str:
    """The format, or formats, that matrices of a role are stored in."""
    if facts is None:
        return "unknown"
    return ", ".join(name.upper() for name in facts["formats"].get(role, {})) or "as released"
