"""`moesaic measure`: the price of every option."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .base import Command
from .base.groups import corpus
from .base.search import Search, offer_options, recipe, use


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="folder of the source model")
    p.add_argument("run", type=Path, help="run folder; the result is RUN/costs.json")
    p.set_defaults(budget_bytes=None, bits=None, devices=None, context=None)  # prices are the same whatever the size
    offer_options(p)


def run(a: Search) -> dict[str, Any]:
    from ..recipes.compress import price_run

    facts = price_run(a.model, a.run, recipe(a), corpus(a), a.quiet)
    print("nats a token, each option alone, summed over the layers that can have it;", end=" ")
    print(f"{facts['harm']} on {facts['tokens']:,} tokens")
    for what, of in facts["totals"].items():
        print(f"{what:<10}" + "   ".join(f"{option} {nats:.4f}" for option, nats in of.items()))
    print(f"prices   {a.run / 'costs.json'}")
    return facts


COMMAND = Command(
    name="measure",
    place=60,
    summary="find what each option alone costs, in nats",
    example="moesaic measure MiniMax-M2.7 run --harm surrogate --data texts/",
    options=options,
    arguments=Search,
    run=run,
    use=use,
)
