"""Evaluations, one file each, all fed by one sweep of source and export. `EVALUATIONS["kld"]` is evaluate/kld.py.

Leaves out rounding of activations: figures here are of the weights as stored, multiplied in the
arithmetic that is named in the result.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..artifact import identity, read_tensors, write_tensors
from ..checkpoint import Checkpoint
from ..divergence import FIELDS, Bootstrap, Divergence, Lockstep, lockstep
from ..errors import InputError
from ..progress import progress
from ..registry import collect
from ..stream import LayerRun
from .base import Evaluation, Reading, Score, Scores, Scoring

FINAL = "final_states"
EVALUATIONS = collect(__name__, Evaluation)
ACTIVATIONS = "not rounded"  # the other word will be "as the engine rounds them"


def evaluate(
    source: Checkpoint,
    export: Checkpoint,
    readings: Sequence[Reading],
    folder: Path,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cache: Path | None = None,
    quiet: bool = False,
) -> Scores:
    """Read every reading with both models and score it; writes scores.json, scores.csv and scores.safetensors.

    folder  where they go, and where an interrupted sweep is kept; scores.safetensors holds every
            token's values in F32, `<reading>.<field>` [B, T−1]
    cache   folder for the source's final hidden states: with them each further export costs one sweep
            of its own bytes, and no error by layer is known

    Raises `InputError` when two readings bear one name or the models cannot be compared. Where no
    prediction is finite in both models a score's value is None, and the count of them is in the facts.
    """
    names = [r.name for r in readings]
    if not readings or len(set(names)) < len(names):
        raise InputError(f"{len(names)} readings named {names}; wanted one or more, of different names")
    rows = identity([r.identity for r in readings])
    inputs = {"source": source.identity, "export": export.identity, "rows": rows}
    arithmetic = {"arithmetic": str(dtype).removeprefix("torch.")}
    known = cache and cache / f"source-{identity(source.identity, rows, arithmetic)}.safetensors"
    source_run, export_run = (LayerRun(checkpoint, device, dtype) for checkpoint in (source, export))
    with progress("evaluate", source.architecture.layers, "layers", quiet) as meter:
        outcome = lockstep(
            source_run,
            export_run,
            [r.ids_BT for r in readings],
            [r.scored_BS for r in readings],
            save=folder / "evaluate.partial.safetensors",
            inputs=inputs | arithmetic,
            final=read_final(known) if known and known.exists() else None,
            done=meter.advance,
        )
    if known and not known.exists():
        write_tensors(known, FINAL, {str(i): h.cpu() for i, h in enumerate(outcome.final)}, inputs)
    facts = (
        conditions(source, export, readings, outcome) | arithmetic | {"device": str(source_run.device), "seed": seed}
    )
    scores = Scores(tuple(scored(readings, outcome, seed)), facts)
    write_tokens(folder / "scores.safetensors", readings, outcome, inputs)
    scores.write(folder / "scores.json", inputs)
    return scores


def scored(readings: Sequence[Reading], outcome: Lockstep, seed: int) -> list[Score]:
    """What each evaluation says of each reading."""
    found = []
    for reading, divergence in zip(readings, outcome.divergences):
        scoring = Scoring(reading, divergence, Bootstrap(divergence, seed))
        found += [score for evaluation in EVALUATIONS.values() for score in evaluation.score(scoring)]
    return found


def conditions(
    source: Checkpoint, export: Checkpoint, readings: Sequence[Reading], outcome: Lockstep
) -> dict[str, Any]:
    """What was compared, on what, by what, and what happened on the way; JSON-able."""
    return {
        "activations": ACTIVATIONS,
        "source": {"path": str(source.path), "identity": source.identity},
        "export": {"path": str(export.path), "identity": export.identity},
        "readings": [of_reading(reading, divergence) for reading, divergence in zip(readings, outcome.divergences)],
        "layers": of_layers(outcome, source.architecture.layers),
        "versions": {"moesaic": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def of_reading(reading: Reading, divergence: Divergence) -> dict[str, Any]:
    return {
        "name": reading.name,
        "rows": len(reading.ids_BT),
        "tokens_read": reading.ids_BT.numel(),
        "tokens_scored": int(reading.scored_BS.sum()),
        "tokens_counted": divergence.tokens,
        "nonfinite": divergence.nonfinite,
        "facts": dict(reading.facts),
    }


def of_layers(outcome: Lockstep, layers: int) -> list[dict[str, Any]]:
    """By layer: the relative error of the export's hidden states (None if not measured) and what was not finite."""
    errors = outcome.errors or (None,) * layers
    bad = {side: counts.get for side, counts in outcome.nonfinite.items()}
    return [
        {"layer": i, "relative_error": e, "nonfinite": {side: get(i, 0) for side, get in bad.items()}}
        for i, e in enumerate(errors)
    ]


def read_final(path: Path) -> list[torch.Tensor]:
    tensors, _ = read_tensors(path, FINAL)
    return [tensors[str(i)] for i in range(len(tensors))]


def write_tokens(path: Path, readings: Sequence[Reading], outcome: Lockstep, inputs: dict[str, str]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for reading, divergence in zip(readings, outcome.divergences):
        tensors |= {f"{reading.name}.{name}": divergence.values[name] for name in FIELDS}
        for part, rows_B in reading.parts.items():
            tensors[f"{reading.name}.part.{part}"] = rows_B
    write_tensors(path, "token_scores", tensors, inputs)


__all__ = ["EVALUATIONS", "Evaluation", "Reading", "Score", "Scores", "evaluate"]
