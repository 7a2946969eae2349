"""An export against its source: one sweep of both, that feeds every score. `EVALUATIONS["kld"]` is scores/kld.py.

In that sweep the export may ride more than once (activations left alone, and rounded as an engine
does), and the source compared with a BF16-noised copy of itself: the noise floor.
docs/SCORES.md says what the files hold. Leaves out text, haystacks and tasks: those are readings.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from .. import __version__
from ..artifact import identity, write_tensors
from ..checkpoint import Checkpoint
from ..checkpoint.kept import Kept, kept_of
from ..errors import CheckpointError, InputError
from ..lock import held
from ..measure.divergence import Bootstrap, Contender, Divergence, Known, Lockstep, Rows, lockstep
from ..measure.divergence.activations import intakes, told
from ..progress import progress
from ..stream import LayerRun, Sweep
from .scores import EVALUATIONS, Reading, Score, Scores, Scoring

FLOOR, TOKENS = "floor", "scores.safetensors"
VERSIONS = {"moesaic": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
NOISE = 2.0**-9  # about what rounding to BF16 does to a number, as a standard deviation relative to it
FLOOR_SCORES = ("kl_mean", "kl_median", "kl_p99", "top1_agreement", "delta_ln_ppl", "delta_p_rms")


@dataclass(frozen=True)
class Conditions:
    """Under which the models are compared.

    activations  ways to run the export, of divergence.WAYS: the first is the one that plots are made of
    floor        also the source against itself with one rounding to BF16 after every layer
    device       None: CUDA where there is one, else CPU
    seed         of that rounding's noise and of the bootstrap
    cache        folder for what the source gave on these readings: with it each further export costs one
                 sweep of its own bytes, and no error by layer is known
    """

    activations: tuple[str, ...] = ("none",)
    floor: bool = True
    device: str | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    cache: Path | None = None


AS_STORED = Conditions()


def evaluate(
    source: Checkpoint,
    export: Checkpoint,
    readings: Sequence[Reading],
    folder: Path,
    conditions: Conditions = AS_STORED,
    quiet: bool = False,
) -> Scores:
    """Read every reading with both models and score it; writes scores.json, scores.csv and scores.safetensors.

    `folder` is where they go, and where an interrupted sweep is kept. Done before with the same models, readings,
    conditions and versions, it only reads, and says so.

    Raises `InputError` when two readings bear one name or the models cannot be compared. Where no
    prediction is finite in both models a score's value is None, and the count of them is in the facts.
    """
    names = [r.name for r in readings]
    if not readings or len(set(names)) < len(names):
        raise InputError(f"{len(names)} readings named {names}; wanted one or more, of different names")
    of_source = {
        "source": source.identity,
        "rows": identity([r.identity for r in readings]),
        "arithmetic": str(conditions.dtype).removeprefix("torch."),
    }
    cache = conditions.cache and conditions.cache / f"source-{identity(of_source, conditions.seed)}.safetensors"
    device = str(LayerRun(source, conditions.device, conditions.dtype).device)
    asked = identity(list(conditions.activations), conditions.floor, device, conditions.seed, NOISE, VERSIONS)
    inputs = of_source | {"export": export.identity, "asked": asked}
    files = {"files": identity(touched(source), touched(export))}
    with held(folder):
        scores = None if cache and not cache.exists() else finished(folder / TOKENS, inputs | files)
        if scores is None:
            scores, found = measured(Pair(source, export, folder, conditions, cache), readings, inputs, quiet)
            write_tokens(folder / TOKENS, readings, found, scores, inputs | files)
        elif not quiet:
            where = folder / "scores.json"
            print(
                f"evaluate: {where} is of these models, this text and these options already",
                file=sys.stderr,
                flush=True,
            )
        scores.write(folder / "scores.json", inputs)
        return scores


def finished(file: Path, inputs: Mapping[str, str]) -> Scores | None:
    """What an earlier call with these inputs found; None where there was none."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as tensors:
        body = json.loads((tensors.metadata() or {}).get("moesaic", "{}"))
    if body.get("inputs") != dict(inputs) or "scores" not in body:
        return None
    return Scores(tuple(Score(**score) for score in body["scores"]), body["facts"])


def touched(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Shards with their sizes and times: an identity reads a few kilobytes of each, and would miss a matrix in between."""
    names = sorted({stored.file for stored in checkpoint.stored.values()})
    found = [(name, (checkpoint.path / name).stat()) for name in names]
    return [(name, of.st_size, of.st_mtime_ns) for name, of in found]


@dataclass(frozen=True)
class Pair:
    """Two models to compare, under which conditions, and where what was swept is kept."""

    source: Checkpoint
    export: Checkpoint
    folder: Path
    conditions: Conditions
    cache: Path | None


def measured(
    pair: Pair, readings: Sequence[Reading], inputs: Mapping[str, str], quiet: bool
) -> tuple[Scores, dict[str, list[Divergence]]]:
    """Both models on all readings, in one sweep; the values of each token by side too."""
    source, export, conditions, path = pair.source, pair.export, pair.conditions, pair.cache
    activations, floor, seed = conditions.activations, conditions.floor, conditions.seed
    of_source = {name: inputs[name] for name in ("source", "rows", "arithmetic")}
    kept, why_not = correspondence(source, export)
    runs = [LayerRun(checkpoint, conditions.device, conditions.dtype) for checkpoint in (source, export)]
    contenders = {way: Contender(runs[1], found, kept=kept) for way, found in ways(export, activations).items()}
    known = Known.load(path, of_source) if path and path.exists() else None
    if known and floor and not known.floor:
        known = None
    if floor and known is None:
        same = {layer: range(source.architecture.experts) for layer in source.architecture.moe_layers}
        contenders[FLOOR] = Contender(runs[0], noise=NOISE, seed=seed, kept=same)
    rows, file = [Rows(r.ids_BT, r.scored_BS) for r in readings], pair.folder / "evaluate.partial.safetensors"
    sweep = Sweep(range(source.architecture.layers), file, inputs, runs[0].device)
    with progress("evaluate", source.architecture.layers, "layers", quiet) as meter:
        outcome = lockstep(runs[0], contenders, rows, sweep, known=known, done=meter.advance)
    found = dict(outcome.divergences)
    if known and floor:
        found[FLOOR] = list(known.floor)
    if path and known is None:
        replace(outcome.known, floor=found.get(FLOOR, [])).save(path, of_source)
    facts = facts_of(source, export, readings, outcome, found) | {"arithmetic": inputs["arithmetic"]}
    facts |= {"device": str(runs[0].device), "seed": seed, "routing": why_not or "compared"}
    first = next(iter(outcome.divergences))  # the name that its scores bear
    facts["activations"] = {first: "not rounded"} | {way: told(export, way) for way in dict.fromkeys(activations)}
    return Scores(tuple(scored(readings, found, seed)), facts), found


def ways(export: Checkpoint, activations: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """How each way rounds inputs; one that rounds nothing is the first of its kind, under the name "none"."""
    found: dict[str, Mapping[str, Any]] = {}
    for way in activations:
        rounded = intakes(export, way)
        found.setdefault(way if rounded else "none", rounded)
    return found


def correspondence(source: Checkpoint, export: Checkpoint) -> tuple[Kept | None, str]:
    """The export's experts in the source's numbering, or why there are none."""
    try:
        return kept_of(export, source), ""
    except (CheckpointError, InputError) as error:
        return None, f"not compared: {error}"


def scored(readings: Sequence[Reading], found: Mapping[str, Sequence[Divergence]], seed: int) -> list[Score]:
    """What each evaluation says of each reading and way; the floor after the rest."""
    scores, floors = [], []
    for side, divergences in found.items():
        for reading, divergence in zip(readings, divergences):
            way = "none" if side == FLOOR else side
            scoring = Scoring(reading, divergence, Bootstrap(divergence, seed), way, seed)
            of_it = [s for e in EVALUATIONS.values() if reading.kind in e.reads for s in e.score(scoring)]
            if side == FLOOR:
                wanted = [s for s in of_it if s.name in FLOOR_SCORES and not s.part]
                floors += [replace(s, name=f"{FLOOR}_{s.name}") for s in wanted]
            else:
                scores += of_it
    return scores + floors


def facts_of(
    source: Checkpoint,
    export: Checkpoint,
    readings: Sequence[Reading],
    outcome: Lockstep,
    found: Mapping[str, Sequence[Divergence]],
) -> dict[str, Any]:
    """What was compared, on what, by what, and what happened on the way; JSON-able."""
    first = next(iter(found))
    return {
        "source": {"path": str(source.path), "identity": source.identity},
        "export": {"path": str(export.path), "identity": export.identity},
        "readings": [of_reading(reading, divergence) for reading, divergence in zip(readings, found[first])],
        "layers": of_layers(outcome, first),
        "noise": NOISE if FLOOR in found else None,
        "versions": VERSIONS,
    }


def of_reading(reading: Reading, divergence: Divergence) -> dict[str, Any]:
    return {
        "name": reading.name,
        "kind": reading.kind,
        "rows": len(reading.ids_BT),
        "tokens_read": reading.ids_BT.numel(),
        "tokens_scored": int(reading.scored_BS.sum()),
        "tokens_counted": divergence.tokens,
        "nonfinite": divergence.nonfinite,
        "facts": dict(reading.facts),
    }


def of_layers(outcome: Lockstep, way: str) -> list[dict[str, Any]]:
    """By layer, None where not measured: error of the export's hidden states, routing, what was not finite."""
    bad = {"source": outcome.nonfinite["source"], "export": outcome.nonfinite[way]}
    return [
        asdict(mark) | {"nonfinite": {side: counts.get(mark.layer, 0) for side, counts in bad.items()}}
        for mark in outcome.marks[way]
    ]


def write_tokens(
    path: Path, readings: Sequence[Reading], found: Mapping[str, Sequence[Divergence]], scores: Scores,
    inputs: Mapping[str, str],
) -> None:  # fmt: skip
    """`<reading>.<field>` [B, T−1] of the first way, `<reading>@<way>.<field>` of the others and of the floor.

    Which rows those are is in the file too (reading -> identity), and the scores with their facts.
    """
    tensors: dict[str, torch.Tensor] = {}
    for number, (side, divergences) in enumerate(found.items()):
        for reading, divergence in zip(readings, divergences):
            name = reading.name if number == 0 else f"{reading.name}@{side}"
            tensors |= {f"{name}.{f}": x for f, x in divergence.values.items() if x.is_floating_point()}
            if number == 0:
                tensors |= {f"{name}.part.{part}": rows_B.clone() for part, rows_B in reading.parts.items()}
    body = {
        "readings": {r.name: r.identity for r in readings},
        "scores": [asdict(score) for score in scores.scores],
        "facts": dict(scores.facts),
    }
    write_tensors(path, "token_scores", tensors, inputs, body)


__all__ = ["EVALUATIONS", "Conditions", "Evaluation", "Reading", "Score", "Scores", "evaluate"]
