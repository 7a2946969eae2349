"""What a run has to tell, read back from the files that its stages left. Leaves out how it looks (page.py).

A run is what compress leaves in its folder, or what prune, quantize and evaluate leave in EXPORT/moesaic.
A file that is not there means a stage that was not run; the page then says so, and no figure is made up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import read_json, read_tensors
from ..checkpoint import Checkpoint
from ..checkpoint.inspect import inspect
from ..data.corpus import recorded_text
from ..errors import InputError, MoesaicError
from ..evaluate import Scores
from ..fit import Machine, fit
from ..plan import SOURCE, Plan

DROPPED = "dropped"
WORK = "moesaic"  # the folder in an export where stages without a run folder leave their files
NOTES = (
    "source",
    "selection",
    "prune",
    "quantize",
    "export",
    "verify",
    "preview",
    "frontier",
    "candidates",
    "rule",
    "loops",
)


@dataclass(frozen=True)
class Stored:
    """Matrices of one role in one layer, as they lie on disk."""

    layer: int
    role: str
    formats: tuple[str, ...]
    bits_per_weight: float


@dataclass(frozen=True)
class Facts:
    """All that a page can show. None, or empty: not done, or not measured."""

    run: str
    source: Mapping[str, Any]  # source.json: model, family, container, identity, experts, bytes, command, recipe
    model: Path | None = None  # the export
    before: Mapping[str, Any] | None = None  # `inspect` of the source, where it still stands
    after: Mapping[str, Any] | None = None  # `inspect` of the export
    stored: tuple[Stored, ...] = ()  # of the export, layer by layer
    memory: Mapping[str, Any] | None = None  # `fit` of the export on the devices that were named
    plan: Plan | None = None
    selection: Mapping[str, Any] | None = None  # selection.json: criterion, kept, margins, scores, tokens, warnings …
    calibration: Mapping[str, Any] = field(default_factory=dict)  # facts of the text that experts or codes depend on
    verify: Mapping[str, Any] | None = None  # verify.json: holds, compared, findings
    expert_errors: Mapping[str, list[float]] = field(default_factory=dict)  # layer -> ‖error‖/‖w‖ of each expert kept
    preview: Mapping[str, Any] | None = None
    frontier: Mapping[str, Any] | None = None
    candidates: Mapping[str, Any] | None = None
    rule: Mapping[str, Any] | None = None
    loops: Mapping[str, Any] | None = None  # models -> how their text repeats
    scores: Scores | None = None
    served: Scores | None = None  # served.json: what a server of the export was measured at
    kl_nats: Mapping[str, np.ndarray] = field(default_factory=dict)  # reading -> KL of each counted token

    @property
    def moe_layers(self) -> list[int]:
        if self.selection is not None:
            return sorted(map(int, self.selection["kept"]))
        known = self.before or self.after
        return list(range(known["layers"] - known["moe_layers"], known["layers"])) if known else []

    @property
    def experts(self) -> int:
        return int(self.source["experts"])

    @property
    def kept_LE(self) -> np.ndarray:
        """bool [MoE layers, experts of the source]."""
        kept_LE = np.ones((len(self.moe_layers), self.experts), bool)
        if self.plan is not None and self.plan.kept:
            for row, layer in enumerate(self.moe_layers):
                kept_LE[row] = np.isin(np.arange(self.experts), self.plan.kept[layer])
        return kept_LE

    @property
    def score_LE(self) -> np.ndarray | None:
        """The criterion's scores, one row a MoE layer."""
        found = (self.selection or {}).get("scores")
        return None if found is None else np.array(found, float)

    @property
    def fate_LE(self) -> np.ndarray:
        """str [MoE layers, experts]: "dropped", "source" where the bytes were copied, or the format rounded to."""
        formats = self.plan.formats if self.plan else {}
        format_L = [formats.get(f"layers.{layer}.experts", SOURCE) for layer in self.moe_layers]
        return np.where(self.kept_LE, np.array(format_L, object)[:, None], DROPPED)

    @property
    def ways(self) -> dict[str, str]:
        """How the export ran in the evaluation -> in words, which activations were rounded; the first is the one plotted."""
        return dict(self.scores.facts["activations"]) if self.scores is not None else {}

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What both models wrote to the same prompts."""
        of = self.scores.facts if self.scores is not None else {}
        return list(of.get("samples", {}).get("samples", []))

    @property
    def palette(self) -> list[str]:
        """What has a colour, in the order of the colours: "source", the plan's formats, then others that lie on disk."""
        planned = sorted(set(self.plan.formats.values()) - {SOURCE}) if self.plan else []
        others = sorted({f for s in self.stored for f in s.formats} - set(planned))
        return [SOURCE, *planned, *others[1:]]


def gather(run: str | Path, devices: str = "", context: int | None = None) -> Facts:
    """Read a run: its folder, or an export that holds one, or an export's `moesaic` folder.

    devices, context  how many of which cards are to hold the export; by themselves those that the run was made for

    Raises `InputError` where there is no run.
    """
    work, model = places(Path(run))
    notes = {kind: optional(work / f"{kind}.json", kind) for kind in NOTES}
    scores = Scores.read(work / "scores.json") if (work / "scores.json").exists() else None
    source = notes["source"] or source_of(notes, scores, work)
    if scores is not None and "export" in scores.facts and not (model / "config.json").exists():
        model = Path(scores.facts["export"]["path"])
    recipe = source.get("recipe", {})
    devices, context = devices or recipe.get("devices") or "", context or recipe.get("context")
    export = opened(model)
    done = notes["prune"] or notes["quantize"] or notes["export"] or {}
    verify = {"holds": True, "compared": done["verified"], "findings": []} if "verified" in done else notes["verify"]
    return Facts(
        run=str(run),
        source=source,
        model=model if export else None,
        before=looked_at(Path(source["model"]), source["identity"]),
        after=inspect(model) if export else None,
        stored=tuple(stored(export)) if export else (),
        memory=fit(export, Machine.parse(devices), context) if export and devices else None,
        plan=Plan.load(work / "plan.json") if (work / "plan.json").exists() else None,
        selection=notes["selection"] or notes["prune"],
        calibration=(notes["selection"] or notes["prune"] or {}).get("tokens") or recorded_text(work),
        verify=verify,
        expert_errors=(verify or {}).get("expert_errors") or done.get("expert_errors", {}),
        preview=notes["preview"],
        frontier=notes["frontier"],
        candidates=notes["candidates"],
        rule=notes["rule"],
        loops=notes["loops"],
        scores=scores,
        served=Scores.read(work / "served.json") if (work / "served.json").exists() else None,
        kl_nats=token_values(work / "scores.safetensors", scores) if scores and scores.facts["readings"] else {},
    )


def places(run: Path) -> tuple[Path, Path]:
    """(where the run's files lie, where its export lies)."""
    if (run / "source.json").exists():
        return run, run / "model"
    if run.name == "model" and (run.parent / "source.json").exists() and not (run / WORK / "scores.json").exists():
        return run.parent, run
    if run.name == WORK and (run.parent / "config.json").exists():
        return run, run.parent
    if (run / WORK).is_dir():
        return run / WORK, run
    if (run / "scores.json").exists():
        return run, run / "model"
    raise InputError(
        f"{run} holds no run: neither source.json, as compress leaves it, nor a {WORK} folder, as prune, quantize and "
        "evaluate do; name the folder that one of them wrote"
    )


def source_of(notes: Mapping[str, dict[str, Any] | None], scores: Scores | None, work: Path) -> dict[str, Any]:
    """The facts of source.json, where no stage wrote one: from what the others noted, and the model if it is there."""
    done = notes["prune"] or notes["quantize"] or notes["export"] or notes["preview"] or {}
    told = {"path": done["model"], "identity": done["inputs"]["source"]} if "model" in done else None
    told = told or (scores.facts.get("source") if scores else None)
    if told is None:
        raise InputError(f"{work} does not say which model it was made from; run prune, quantize or evaluate again")
    found = {"model": told["path"], "identity": told["identity"], "command": done.get("command", "")}
    if not found["command"] and scores is not None:
        found["command"] = scores.facts.get("command", "")
    there = looked_at(Path(told["path"]), told["identity"]) or {}
    return found | {
        "family": there.get("family", ""),
        "container": there.get("container", ""),
        "experts": done.get("source_experts") or there.get("experts", 0),
        "bytes": done.get("source_bytes") or there.get("bytes", 0),
    }


def optional(path: Path, kind: str) -> dict[str, Any] | None:
    return read_json(path, kind) if path.exists() else None


def opened(model: Path) -> Checkpoint | None:
    return Checkpoint.open(model) if (model / "config.json").exists() else None


def looked_at(model: Path, identity: str) -> dict[str, Any] | None:
    """`inspect` of a model folder; None when it is gone, or another one stands there now."""
    if not (model / "config.json").exists():
        return None
    try:
        found = inspect(model)
    except MoesaicError:
        return None  # torn or foreign by now: not the model that the run read
    return found if found["identity"] == identity else None


def stored(export: Checkpoint) -> list[Stored]:
    """What lies on disk of each layer's matrices, role by role, scales included."""
    formats: dict[tuple[int, str], dict[str, None]] = {}
    bits: dict[tuple[int, str], list[int]] = {}
    for linear in export.architecture.linears:
        key, name = (linear.layer, linear.role), export.formats[linear.name]
        formats.setdefault(key, {})[name] = None
        total = bits.setdefault(key, [0, 0])
        total[0] += 8 * export.container.packing(name).bytes(linear.shape)
        total[1] += linear.elements
    return [Stored(*key, tuple(formats[key]), b / n) for key, (b, n) in sorted(bits.items())]


def token_values(path: Path, scores: Scores) -> dict[str, np.ndarray]:
    tensors, _ = read_tensors(path, "token_scores")
    found = {}
    for reading in scores.facts["readings"]:
        if reading["kind"] != "text":
            continue
        kl_N = tensors[f"{reading['name']}.kl_nats"].double().numpy().ravel()
        kl_N = kl_N[np.isfinite(kl_N)]
        if len(kl_N) != reading["tokens_counted"]:
            raise InputError(
                f"{path} holds {len(kl_N):,} values of {reading['name']!r}, scores.json {reading['tokens_counted']:,}"
            )
        found[reading["name"]] = kl_N
    return found
