"""A plan carried out: rendered on text where its rounding looks at data, and then written.

Rendered matrices lie in an overlay until they are in the export's shards; its listing stays, with what each rounding
had to go by. Leaves out choosing a plan, and checking what was written.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import overlay
from .checkpoint import Checkpoint, sample
from .corpus import Corpus
from .export import export, rounding_of
from .export.claim import check_plan
from .plan import Plan
from .render import FOLDER, render
from .rounding import ROUNDINGS
from .target import Target
from .tokens import TokenSet
from .verdict import Verdict


def rendered(
    source: Checkpoint, plan: Plan, out: Path, overlays: Path, text: Callable[[], TokenSet], quiet: bool = False
) -> tuple[Plan, dict[str, Any] | None]:
    """The plan with an overlay of what its rounding needs text for, and what rendering that reports.

    The overlay lies in `overlays`, and `out` is where the export is going to be. Where the rounding needs no data, the plan
    stays as it is and `text` is not called. Memory, errors and resumption are `render`'s.
    """
    if not rounding_of(plan).needs:
        return plan, None
    Target.of(source, plan)  # refuses before the hours
    check_plan(out, source, plan)
    folder = overlays / FOLDER
    if overlay.is_dropped(folder) and not (out / "config.json").exists():
        shutil.rmtree(folder)  # the export that had taken it in is gone
    facts = render(source, plan, text(), folder, quiet)
    told = {name: value for name, value in facts.items() if name not in ("by_group", "inputs", "items")}
    return replace(plan, overlays={FOLDER: facts["items"]} if facts["items"] else {}), told


def make(source: Checkpoint, plan: Plan, out: Path, overlays: Path, quiet: bool = False) -> Checkpoint:
    """Write the export, and free the disk of the overlays that it has taken in. Resumption and errors are `export`'s."""
    result = export(source, plan, out, quiet, overlays)
    for name in plan.overlays:
        overlay.drop(overlays / name)
    return result


def rounding_on(name: str, corpus: Corpus) -> str:
    """The rounding of that name, or what does the same with data where the user brought text."""
    return (corpus.is_own and name in ROUNDINGS and ROUNDINGS[name].informed) or name


def sentence(facts: dict[str, Any]) -> str:
    """What a rendering reports, for people."""
    text = (
        f"{facts['groups']:,} groups of matrices by {facts['rounding']} on {facts['tokens']:,} tokens; of what experts' "
        f"weights were rounded by, {facts['pooled_mean']:.0%} is the layer's tokens at large"
    )
    for names, part in (
        (facts["mostly_pooled"], "more than half"),
        (facts["unreached"], "all, as no token chose them,"),
    ):
        if names:
            text += f"; {part} for {len(names):,} expert{'s' * (len(names) > 1)}: {sample(names)}"
    return text


def expert_errors(export: Checkpoint, verdict: Verdict) -> dict[str, list[float]]:
    """Relative weight error ‖value − w‖ / ‖w‖ of each rounded expert's matrices together: MoE layer -> one an expert."""
    found: dict[str, list[float]] = {}
    for (layer, _), matrices in sorted(export.architecture.experts_of.items()):
        pairs = [verdict.errors[n.name] for n in matrices.values() if n.name in verdict.errors]
        if pairs:
            off, whole = (sum(p[i] for p in pairs) for i in (0, 1))
            found.setdefault(str(layer), []).append((off / whole) ** 0.5 if whole else 0.0)
    return found
