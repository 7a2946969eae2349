"""A plan made true: rendered on text where its rounding looks at data, and then written.

Rendered matrices lie in a folder of their own until they are in the export's shards; its rendered.json stays, with
what each rounding had to go by and the digest of every group, which `verify` holds the shards to. Leaves out choosing
a plan, and checking what was written.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, sample
from .corpus import Corpus
from .export import claim, export, rounding_of
from .plan import Plan
from .render import drop, is_dropped, render
from .rounding import ROUNDINGS
from .target import Target
from .tokens import TokenSet
from .verdict import Verdict


def make(
    source: Checkpoint, plan: Plan, out: Path, rendered: Path, text: Callable[[], TokenSet], quiet: bool = False
) -> tuple[Checkpoint, dict[str, Any] | None]:
    """Write what `plan` makes of `source` to `out`; returns the export, and what rendering reports if it took place.

    Where the plan's rounding needs no data, `text` is not called, and nothing is in the folder `rendered`. Memory,
    errors and resumption are `render`'s and `export`'s.
    """
    if not rounding_of(plan).needs:
        return export(source, plan, out, quiet), None
    Target.of(source, plan)  # refuses before the folder is taken
    claim(out, source, plan)
    if is_dropped(rendered) and not (out / "config.json").exists():
        shutil.rmtree(rendered)  # the export that had taken it in is gone
    facts = render(source, plan, text(), rendered, quiet)
    result = export(source, plan, out, quiet, rendered)
    drop(rendered)
    return result, {name: value for name, value in facts.items() if name not in ("by_group", "inputs")}


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
