"""`moesaic prune`: drop experts, or measure what that would cost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .base import Command
from .base.groups import CutArguments, TextArguments, corpus, cut_options, ranking, text_options
from .base.telling import plus_minus, show, sizes, trying_out
from .base.values import counts_of

if TYPE_CHECKING:
    from ..recipes.machine import Use


@dataclass(frozen=True, kw_only=True)
class Prune(TextArguments, CutArguments):
    model: Path
    out: Path
    experts: Sequence[int]
    preview: bool
    loops: bool
    run: Path | None
    repair: bool
    check: bool


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="folder of the source model")
    p.add_argument("out", type=Path, help="folder for the result")
    p.add_argument(
        "--experts",
        type=counts_of,
        required=True,
        metavar="K",
        help="number of experts to keep in every layer; with --preview also a list: 64,96",
    )
    p.add_argument(
        "--criterion",
        default="reap",
        help="pruning criterion: reap, mass, …, or auto, the best of a preview (default %(default)s)",
    )
    p.add_argument("--preview", action="store_true", help="measure what each cut would cost, and write no model")
    p.add_argument(
        "--loops",
        action="store_true",
        help="with --preview: also generate text with the best cuts and count repetition",
    )
    p.add_argument("--run", type=Path, metavar="RUN", help="use the statistics in RUN instead of calibrating")
    cut_options(p)
    p.add_argument(
        "--repair", action="store_true",
        help="fit shared experts to compensate for dropped ones; kept only if held-out KL improves (M3)",
    )  # fmt: skip
    p.add_argument("--no-verify", action="store_false", dest="check", help="do not verify the result")
    text_options(p)


def run(a: Prune) -> dict[str, Any]:
    from ..recipes.machine import held_bytes
    from ..recipes.prune import Pruning, prune

    if a.loops and not a.preview:
        raise InputError("--loops probes what --preview compares; give --preview too")
    if a.run is not None and a.until_stable:
        raise InputError("--until-stable reads text, and --run reads none; give one of them")
    if a.repair and a.preview:
        raise InputError("--repair changes the model that is written, and --preview writes none; give one of them")
    if a.preview:
        return preview(a)
    if len(a.experts) > 1:
        raise InputError(f"asked to keep {a.experts} experts; wanted one count, or --preview to compare several")
    pruning = Pruning(
        experts=a.experts[0],
        ranking=ranking(a, a.run),
        repair=a.repair,
        check=a.check,
        memory_bytes=held_bytes(a.memory_bytes),
    )
    with trying_out(reads_library(a)):
        return told_pruning(prune(a.model, a.out, pruning, corpus(a), command=a.line, quiet=a.quiet))


def reads_library(a: Prune) -> bool:
    """Whether the choice of experts, or a repair, depends on the standard library's text; of a run, on what it read."""
    from ..calibrate.criteria import CRITERIA
    from ..data.corpus import recorded_text

    reads = a.criterion not in CRITERIA or CRITERIA[a.criterion].reads_text
    own = a.data is not None
    if a.run is not None:
        return bool(recorded_text(a.run).get("trying_out")) or (a.repair and not own)
    return not own and (reads or a.repair)


def told_pruning(facts: dict[str, Any]) -> dict[str, Any]:
    from ..export.repair import sentence

    margins = sorted(facts["margins"].values())
    print(
        f"kept {facts['experts']} of {facts['source_experts']} experts in {len(margins)} layers "
        f"by {facts['criterion']} on {facts['calibration_tokens']:,} tokens"
    )
    print(f"cut margin (last kept over first dropped): least {margins[0]:.2%}, median {margins[len(margins) // 2]:.2%}")
    for layer, margin in facts["margins"].items():
        print(f"  layer {layer:>3}  margin {margin:7.2%}  halves agree {facts['jaccard'][layer]:4.0%}")
    if settled := facts.get("settled"):
        print(settled["verdict"])
    if "repair" in facts:
        print(sentence(facts["repair"]))
    for warning in facts["warnings"]:
        print(f"note: {warning}")
    sizes(facts)
    return facts


def preview(a: Prune) -> dict[str, Any]:
    from ..measure.preview import table
    from ..recipes.machine import held_bytes
    from ..recipes.prune import Cuts, preview_cuts, probe_cuts

    cuts = Cuts(counts=a.experts, ranking=ranking(a, a.run), memory_bytes=held_bytes(a.memory_bytes))
    outlooks = preview_cuts(a.model, a.out, cuts, corpus(a), quiet=a.quiet)
    probes = probe_cuts(a.model, a.out, outlooks, cuts.memory_bytes, quiet=a.quiet) if a.loops else {}
    show(table(outlooks))
    for name, found in probes.items():
        share, endless = plus_minus(vars(found.share)), found.endless
        ends = f"{endless.value:.0%} ({endless.low:.0%} to {endless.high:.0%}) of {found.prompts} texts end in a loop"
        print(f"loops: {name:12} {share} of {found.new_tokens:,} tokens repeat; {ends}")
    print(f"plot: {a.out / 'moesaic' / 'preview.svg'}")
    return {"candidates": [o.facts() for o in outlooks], "loops": {n: found.facts() for n, found in probes.items()}}


def use(a: Prune) -> Use:
    from ..recipes.prune import use

    return use(a.model, a.out, a.run, corpus(a))


COMMAND = Command(
    name="prune",
    place=80,
    summary="drop experts; the rest is copied byte for byte",
    example="moesaic prune MiniMax-M3-MXFP8 M3-64e --experts 64 --data texts/",
    options=options,
    arguments=Prune,
    run=run,
    use=use,
)
