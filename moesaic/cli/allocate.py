"""`moesaic allocate`: the curve of bytes against nats, and the best plan of a size."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .base import Command
from .base.groups import corpus
from .base.search import Search, budget_options, offer_options, recipe, use


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="folder of the source model")
    p.add_argument(
        "run", type=Path, help="run folder; the result is RUN/frontier.json, and with a size also RUN/plan.json"
    )
    budget_options(p)
    offer_options(p)


def run(a: Search) -> dict[str, Any]:
    from ..recipes.compress import allocate_run

    facts = allocate_run(a.model, a.run, recipe(a), corpus(a), a.quiet)
    print(f"{'bytes':>18}  bits   experts  KL predicted, off by a factor {math.exp(facts['rule_error']):.2f} (rms)")
    for row in facts["curve"]:
        mark = "  <- knee" if row["knee"] else ""
        print(f"{row['bytes']:>18,}  {row['bits']:.2f}  {row['experts']:>7}  {row['predicted_nats']:.4f}{mark}")
    if best := facts["best"]:
        print(f"plan     {best['experts']} experts, {best['bytes']:,} of {best['budget_bytes']:,} bytes")
        print(f"         KL {best['predicted_nats']:.4f} predicted; no plan on offer below {best['bound_nats']:.4f}")
        print(f"plan     {a.run / 'plan.json'}")
    print(f"frontier {a.run / 'frontier.json'}")
    return facts


COMMAND = Command(
    name="allocate",
    place=70,
    summary="compute the lowest KL for every size, and the best plan for one size",
    example="moesaic allocate MiniMax-M2.7 run --fit 90GB --data texts/",
    options=options,
    arguments=Search,
    run=run,
    use=use,
)
