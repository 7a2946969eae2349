"""A plan's matrices rounded with data: one sweep, each layer calibrated on the outputs of the rounded ones before it.

Within a layer too: o sees what rounded q, k and v give, down what rounded gate and up give, and tokens are
routed as rounded attention routes them. What a server fuses is a group; each group becomes a small file of
packed tensors, which is there when it is whole, and hidden states are saved after each layer. So the same call
goes on where it was, and `export` takes the tensors from the files. Leaves out roundings that need no data:
`export` does those by itself.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import identity, read_json, write_json, write_tensors
from ..checkpoint import Checkpoint
from ..errors import PlanError
from ..plan import Plan, dropped
from ..progress import progress
from ..rounding import rounding_named
from ..stream import LayerRun, State
from ..target import Target
from ..tokens import TokenSet
from .group import Group, digest, read_packed
from .work import Work

__all__ = ["BESIDE", "DONE", "FOLDER", "digest", "digests", "drop", "from_files", "inputs_of", "is_dropped", "render"]

FOLDER, BESIDE = (
    "moesaic/rendered",
    "rendered",
)  # in an export's folder; or beside it in a run's, where a budget counts it not
DONE = "rendered.json"


def render(
    source: Checkpoint, plan: Plan, tokens: TokenSet, folder: Path, quiet: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Round what `plan` changes, by its rounding, on `tokens`; returns what `folder`/rendered.json says.

    Memory: that of `LayerRun`, and four of its blocks for experts side by side with their Hessians, or what one of
    them needs. Raises `PlanError` for a plan that cannot be carried out, `StaleError` when
    `folder` holds matrices of another plan, source or text.
    """
    rounding = rounding_named(plan.rounding)
    target, inputs = Target.of(source, plan), inputs_of(source, plan) | {"tokens": tokens.identity}
    if (folder / DONE).exists():
        return read_json(folder / DONE, "rendered", inputs)
    run = LayerRun(source, device)
    work = Work(target, rounding, run, folder, inputs)
    layer, hidden_BTD = work.resume()
    before = run.embed(tokens.ids_BT) if hidden_BTD is None else hidden_BTD.to(run.device)
    state = State(before, dropped(plan.kept, source.architecture.experts))
    with progress("render", sum(n.elements for g in work.groups for n in g), "weights", quiet) as work.meter:
        for facts in work.facts:
            work.meter.advance(facts["weights"])
        while layer <= max((g[0].layer for g in work.groups), default=-1):
            state = work.advance(layer, state)
            body = {"layer": layer, "groups": work.facts}
            write_tensors(folder / "hidden.safetensors", "hidden", {"hidden_BTD": state.hidden_BTD.cpu()}, inputs, body)
            layer += 1
    write_json(folder / DONE, "rendered", summary(work, tokens), inputs)
    (folder / "hidden.safetensors").unlink(missing_ok=True)
    return read_json(folder / DONE, "rendered", inputs)


def inputs_of(source: Checkpoint, plan: Plan) -> dict[str, str]:
    """What matrices made on text are bound to; what became of them is in the plan and no part of it."""
    return {"source": source.identity, "plan": identity(replace(plan, repaired={}).body)}


def summary(work: Work, tokens: TokenSet) -> dict[str, Any]:
    """Counts, and by name the experts that no token reached, or that owe most of what they know to other tokens.

    Raises `PlanError` when not every group was rounded exactly once.
    """
    groups = sorted(work.facts, key=lambda g: g["group"])
    if [g["group"] for g in groups] != sorted(g[0].name for g in work.groups):
        raise PlanError(f"{len(groups)} groups were rounded, the plan has {len(work.groups)}; report this as a bug")
    experts = [g for g in groups if g["expert"] is not None]
    return {
        "rounding": work.rounding.name,
        "tokens": tokens.tokens,
        "groups": len(groups),
        "unreached": named(g for g in experts if g["tokens"] == 0),
        "mostly_pooled": named(g for g in experts if g.get("pooled", 0.0) > 0.5),
        "pooled_mean": sum(g.get("pooled", 0.0) for g in experts) / max(1, len(experts)),
        "damping_most": max((g.get("damping", 0.0) for g in groups), default=0.0),
        "by_group": groups,
    }


def named(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """The experts of groups, each once, in the order of the model."""
    found = sorted({(g["layer"], g["expert"]) for g in groups})
    return [f"layer {layer} expert {expert}" for layer, expert in found]


def drop(folder: Path) -> None:
    """Remove the matrices of a finished rendering, which an export has taken in; what it reports stays."""
    for file in folder.glob("*.safetensors"):
        file.unlink()


def is_dropped(folder: Path) -> bool:
    return (folder / DONE).exists() and not any(folder.glob("*.safetensors"))


def digests(folder: Path) -> dict[str, str]:
    """First member of a group -> digest of the group's tensors as rendered; nothing where nothing was."""
    path = folder / DONE
    groups = read_json(path, "rendered")["by_group"] if path.exists() else []
    return {group["group"]: group["sha256"] for group in groups}


def from_files(folder: Path, target: Target) -> Callable[[Group], list[Tensor]]:
    """For `export`: a group -> its packed tensors, in the order of its members' parts.

    Raises `InputError` where `folder` is not completely rendered, `StaleError` where it is of another plan.
    """
    inputs = inputs_of(target.source, target.plan)
    read_json(folder / DONE, "rendered", inputs)
    return lambda group: list(read_packed(folder, target, group, inputs).values())
