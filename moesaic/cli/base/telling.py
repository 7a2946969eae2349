"""What several commands print: sizes, scores with their errors, the end of a whole path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@contextmanager
def trying_out(is_trial: bool) -> Iterator[None]:
    """Where a model is made from the standard library's text, say so in the first line and in the last."""
    from ...data.corpus import TRYING_OUT

    if is_trial:
        print(f"note     {TRYING_OUT}", flush=True)
    yield
    if is_trial:
        print(f"note     {TRYING_OUT}", flush=True)


def told(facts: dict[str, Any]) -> dict[str, Any]:
    """The end of a whole path: what was saved, what it cost, where the page is."""
    from ...checkpoint.inspect import size

    before, after = facts["source_bytes"], facts["bytes"]
    if facts["experts"] != facts["source_experts"]:
        print(f"experts  {facts['source_experts']} -> {facts['experts']} in every layer")
    print(f"size     {size(before)} -> {size(after)}: {1 - after / before:.1%} saved")
    if chosen := facts["chosen"]:
        print(f"budget   {chosen['bytes']:,} of {chosen['budget_bytes']:,} bytes on disk, every file counted")
        before = (
            f"predicted {chosen['predicted_nats']:.4f}, measured {chosen['measured_nats']:.4f} ± {chosen['error']:.4f}"
        )
        print(f"plan     {chosen['name']}: KL {before} before it was written, by {chosen['rounding']}")
    if facts["settled"]:
        print(f"text     {facts['settled']}")
    tell_rounding(facts)
    tell_scores(facts["scores"])
    for warning in facts["warnings"]:
        print(f"note     {warning}")
    print(f"model    {Path(facts['run']) / 'model'}")
    print(f"report   {facts['report']}")
    return facts


def tell_rounding(facts: dict[str, Any]) -> None:
    from ...export.sequential import sentence

    if facts["rendered"]:
        print(f"rounded  {sentence(facts['rendered'])}")


def tell_scores(scores: dict[str, dict[str, Any]]) -> None:
    kl, ppl, before = scores["kl_mean"], scores["ppl_export"], scores["ppl_source"]
    top, ratio = scores["top1_agreement"], scores["delta_ln_ppl"]
    print(
        f"cost     KL(source‖export) {plus_minus(kl)} nats a token, over {kl['tokens']:,} tokens in {kl['rows']} rows"
    )
    print(f"         perplexity {plus_minus(before)} -> {plus_minus(ppl)}; paired Δ ln {plus_minus(ratio)}")
    print(f"         top-1 agreement {top['value']:.1%} ± {top['error']:.1%}")


def plus_minus(score: dict[str, Any]) -> str:
    """A value with as many digits as its error deserves."""
    value, error = score["value"], score["error"]
    if value is None or not error:
        return f"{value}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def sizes(facts: dict[str, Any]) -> None:
    from ...checkpoint.inspect import size

    before, after = facts["source_bytes"], facts["bytes"]
    change = f"{1 - after / before:.1%} saved" if after <= before else f"{after / before - 1:.1%} more"
    print(f"{size(before)} -> {size(after)}, {change}, in {facts['out']}")
    if "verified" in facts:
        print("verified: " + ", ".join(f"{check} × {count:,}" for check, count in facts["verified"].items()))


def show(renderable: RenderableType) -> None:
    from rich.console import Console

    Console().print(renderable)


def tell(text: str) -> None:
    """Prose, broken between words at the terminal's width."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(text)
