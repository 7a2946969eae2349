"""A model in another container, its values untouched: bytes copied where both containers agree, codes carried over elsewhere.

Nothing is rounded. What the other container cannot hold exactly is refused, by the name of its unit and with the
containers that can. Leaves out changing formats (quantize) and choosing them (compress).
"""

from collections import Counter
from pathlib import Path
from typing import Any

from ..artifact import read_json, write_json
from ..checkpoint import Checkpoint
from ..checkpoint.containers import CONTAINERS
from ..errors import InputError
from ..export import export
from ..export.claim import check_free
from ..fit import Layout, check_layout
from ..lock import held
from ..plan import Plan
from ..plan.blueprint import Blueprint, keeps_bytes, keeps_values
from ..verify import verify

PLAN, DESCRIPTION = "plan.json", "source.json"  # of a run


def convert(
    model: Path, out: Path, container: str, layout: Layout | None = None, check: bool = True, quiet: bool = False
) -> dict[str, Any]:
    """Write the existing `model` to `out` in `container`; returns JSON-able facts. Interrupted, it continues.

    `layout` is how it will be served: what an engine would not load so is refused.
    Raises `PlanError` (and for names `InputError`) before the first byte for what cannot be carried over,
    `CheckError` when the result does not verify.
    """
    if container not in CONTAINERS:
        raise InputError(f"unknown container {container!r}; choose from {', '.join(CONTAINERS)}")
    source = Checkpoint.open(model)
    if source.container.name == container:
        raise InputError(f"{model} is in {container} already; name another container")
    check_free(out, source)
    return written(Blueprint.of(source, Plan(container)), out, None, layout, check, quiet)


def is_run(folder: Path) -> bool:
    return (folder / PLAN).exists() and (folder / DESCRIPTION).exists()


def export_run(
    run: Path,
    out: Path | None,
    container: str | None,
    layout: Layout | None = None,
    check: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Carry out the plan of the run folder `run`: to run/model, and from there to `container` if that is another."""
    source = Checkpoint.open(read_json(run / DESCRIPTION, "source")["model"])
    plan, model = Plan.load(run / PLAN, {"source": source.identity}), run / "model"
    if container is not None and container != plan.container:
        if not (model / "config.json").exists():
            export_run(run, None, None, None, check, quiet)
        return convert(model, out or run / f"model-{container}", container, layout, check, quiet)
    check_free(out or model, source)
    return written(Blueprint.of(source, plan), out or model, run, layout, check, quiet)


def written(
    blueprint: Blueprint, out: Path, overlays: Path | None, layout: Layout | None, check: bool, quiet: bool
) -> dict[str, Any]:
    source = blueprint.source
    if layout is not None:
        check_layout(blueprint, layout)
    with held(out / "moesaic"):
        result = export(source, blueprint.plan, out, quiet, overlays)
        facts: dict[str, Any] = {
            "model": str(source.path),
            "out": str(out),
            "from": source.container.name,
            "container": blueprint.container.name,
            "matrices": dict(Counter(way(blueprint, name) for name in blueprint.formats)),
            "source_bytes": sum(t.bytes for t in source.inventory),
            "bytes": sum(t.bytes for t in result.inventory),
        }
        if check:
            verdict = verify(out, source, quiet)
            facts["verified"] = dict(verdict.compared)
            verdict.require(out, "remove it and export again")
        write_json(out / "moesaic" / "export.json", "export", facts, {"source": source.identity})
        return facts


def way(blueprint: Blueprint, name: str) -> str:
    """How a matrix came over: "mxfp4 copied", "nvfp4 repacked", "int4_g128 as affine4_g128", "fp8_block rounded to mxfp4"."""
    linear = blueprint.architecture.by_name[name]
    before, after = blueprint.source.formats[blueprint.origin[name].name], blueprint.formats[name]
    if not keeps_values(blueprint, linear):
        return f"{before} rounded to {after}"
    if before != after:
        return f"{before} as {after}"
    return f"{after} {'copied' if keeps_bytes(blueprint, linear) else 'repacked'}"
