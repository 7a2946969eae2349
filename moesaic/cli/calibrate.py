"""`moesaic calibrate`: statistics of every expert."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Command
from .base.groups import RankingArguments, TextArguments, corpus, ranking, ranking_options, text_options
from .base.telling import show
from .base.values import counts_of

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..recipes.machine import Use


@dataclass(frozen=True, kw_only=True)
class Calibrate(TextArguments, RankingArguments):
    model: Path
    run: Path
    experts: Sequence[int] | None


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="folder of the source model")
    p.add_argument(
        "run",
        type=Path,
        help="run folder; text of a later call is added to its statistics; a line of a .jsonl file may name an `image`",
    )
    p.add_argument(
        "--criterion", default="reap", help="with --until-stable: criterion of the selection (default %(default)s)"
    )
    p.add_argument(
        "--experts",
        type=counts_of,
        metavar="K",
        help="with --until-stable: numbers of experts to keep: 64,96 (default: a half and three quarters)",
    )
    ranking_options(p)
    text_options(p)


def run(a: Calibrate) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..lock import held

    source = Checkpoint.open(a.model)
    source.check_values()
    with held(a.run):
        return gather(a, source)


def gather(a: Calibrate, source: Checkpoint) -> dict[str, Any]:
    """Statistics of the text, added to what the run has."""
    from ..calibrate import Statistics, calibrate, check_unread, chunks
    from ..calibrate.selection import FEW_TOKENS
    from ..calibrate.until_stable import calibrate_until_stable, table
    from ..data.images import pictured

    stats, stability = a.run / "stats", None
    if a.until_stable:
        experts = source.architecture.experts
        stability = calibrate_until_stable(
            source, corpus(a), a.run, a.experts or [experts // 2, experts * 3 // 4], ranking(a), a.quiet
        )
        show(table(stability))
        print(stability.verdict)
    else:
        tokens = corpus(a).calibration(source, a.run / "tokens.safetensors")
        check_unread(stats, chunks(tokens))
        calibrate(source, tokens, stats, a.quiet)
    if pictures := pictured(source, corpus(a)):
        calibrate(source, pictures.tokens, stats, a.quiet, seen=pictures.seen)
    statistics = Statistics.load(stats, source)
    few = statistics.few(FEW_TOKENS)
    print(
        f"{statistics.tokens:,} tokens of {', '.join(statistics.domains)} through {len(statistics.layers)} MoE layers"
    )
    print(f"experts reached by fewer than {FEW_TOKENS} tokens: {len(few)}")
    print(f"experts with NaN or infinite values: {len(statistics.nonfinite())}")
    print(f"statistics: {stats}")
    return {
        "tokens": statistics.tokens,
        "domains": statistics.domains,
        "few_tokens": few,
        "nonfinite": statistics.nonfinite(),
        "settled": stability.facts() if stability else None,
    }


def use(a: Calibrate) -> Use:
    from ..recipes.compress import use

    return use(a.model, a.run, corpus(a))


COMMAND = Command(
    name="calibrate",
    place=50,
    summary="collect statistics of every expert, for all criteria and domains at once",
    example="moesaic calibrate MiniMax-M3-MXFP8 run --data texts/",
    options=options,
    arguments=Calibrate,
    run=run,
    use=use,
)
