"""A plan's matrices rounded on the outputs of the already rounded layers (sequential calibration), in one sweep.

Within a layer too: o sees what rounded q, k and v give, down what rounded gate and up give, and tokens are
routed as rounded attention routes them. What a server fuses is a group; its matrices go into an overlay as soon
as they are rounded, and hidden states are saved after each layer, so the same call goes on where it was. Leaves
out roundings that need no data: `export` does those.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import Checkpoint, sample
from ...data.tokens import TokenSet
from ...errors import FaultError
from ...plan import Plan, dropped, overlay
from ...plan.blueprint import Blueprint, bound
from ...progress import progress
from ...rounding import rounding_named
from ...stream import STATES, LayerRun, Standing, State, Sweep
from ...stream.sweep import EACH_LAYER
from ..claim import check_plan
from .layer import TEXT, SequentialRounding, round_layer

__all__ = ["overlaid_on_text", "round_on_text", "sentence"]

VERSION = "1"  # goes up with any change to which inputs matrices are rounded by


def overlaid_on_text(
    source: Checkpoint, plan: Plan, out: Path, overlays: Path, text: Callable[[], TokenSet], quiet: bool = False
) -> tuple[Plan, dict[str, Any] | None]:
    """The plan with an overlay of what its rounding needs text for, and what making it reports.

    The overlay lies in `overlays`, and `out` is where the export is going to be. Where the rounding needs no data, the plan
    stays as it is and `text` is not called. Memory, errors and resumption are `round_on_text`'s.
    """
    if not rounding_named(plan.rounding).needs:
        return plan, None
    Blueprint.of(source, plan)  # refuses before the hours
    check_plan(out, source, plan)
    folder = overlays / overlay.ON_TEXT
    if overlay.is_dropped(folder) and not (out / "config.json").exists():
        shutil.rmtree(folder)  # the export that had taken it in is gone
    facts = round_on_text(source, plan, text(), folder, quiet)
    told = {name: value for name, value in facts.items() if name not in ("by_group", "inputs", "items")}
    return replace(plan, overlays={overlay.ON_TEXT: facts["items"]} if facts["items"] else {}), told


def round_on_text(
    source: Checkpoint, plan: Plan, tokens: TokenSet, folder: Path, quiet: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Round what `plan` changes, by its rounding, on `tokens`; returns the listing of the overlay that `folder` then is.

    Memory: that of `LayerRun`, and four of its blocks for experts side by side with their Hessians, or what one of
    them needs. Raises `PlanError` for a plan that cannot be carried out, `StaleError` when
    `folder` holds matrices of another plan, source or text.
    """
    rounding = rounding_named(plan.rounding)
    if plan.overlays:
        raise FaultError(
            f"the plan has the overlays {', '.join(plan.overlays)} already; round it on text before they are made"
        )
    blueprint = Blueprint.of(source, plan)
    inputs = bound(source, plan) | {"tokens": tokens.identity, "rendering": VERSION} | blueprint.arithmetic
    if overlay.is_finished(folder):
        (folder / STATES).unlink(missing_ok=True)
        return overlay.listing(folder, inputs)
    run = LayerRun(source, device)
    work = SequentialRounding(blueprint, rounding, run, folder, inputs)
    layers = range(max((g[0].layer for g in work.groups), default=-1) + 1)
    under_way = Sweep(layers, folder / STATES, inputs, run.device, EACH_LAYER)

    def begin() -> Standing:
        state = State(run.embed(tokens.ids_BT), dropped(plan.kept, source.architecture.experts))
        return Standing({TEXT: state}, {"groups": []})

    def end(at: Standing) -> dict[str, Any]:
        groups = at.notes.get("groups", [])
        facts = summary(work, groups, tokens)
        overlay.finish(folder, {name: digest for g in groups for name, digest in g["sha256"].items()}, inputs, facts)
        return overlay.listing(folder, inputs)

    with progress("round", sum(n.elements for g in work.groups for n in g), "weights", quiet) as meter:
        meter.advance(sum(facts["weights"] for facts in under_way.saved["notes"].get("groups", ())))
        return under_way.through(begin, partial(round_layer, work, told=meter.advance), end)


def summary(work: SequentialRounding, found: Sequence[Mapping[str, Any]], tokens: TokenSet) -> dict[str, Any]:
    """Counts, and by name the experts that no token reached, or that owe most of what they know to other tokens.

    Raises `FaultError` when not every group was rounded exactly once.
    """
    groups = sorted(found, key=lambda g: g["group"])
    if [g["group"] for g in groups] != sorted(g[0].name for g in work.groups):
        raise FaultError(f"{len(groups)} groups were rounded, the plan has {len(work.groups)}")
    experts = [g for g in groups if g["expert"] is not None]
    return {
        "rounding": work.rounding.name,
        "tokens": tokens.tokens,
        "groups": len(groups),
        "unreached": named(g for g in experts if g["tokens"] == 0),
        "mostly_pooled": named(g for g in experts if g.get("pooled", 0.0) > 0.5),
        "pooled_mean": sum(g.get("pooled", 0.0) for g in experts) / max(1, len(experts)),
        "damping_most": max((g.get("damping", 0.0) for g in groups), default=0.0),
        "by_group": [{name: value for name, value in g.items() if name != "sha256"} for g in groups],
    }


def named(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """The experts of groups, each once, in the order of the model."""
    found = sorted({(g["layer"], g["expert"]) for g in groups})
    return [f"layer {layer} expert {expert}" for layer, expert in found]


def sentence(facts: dict[str, Any]) -> str:
    """What rounding on text reports, for people."""
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
