"""What a run folder has to tell, read back from the files that its stages left. Leaves out how it looks (page.py).

A file that is not there means a stage that was not run; the page then says so, and no figure is made up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import read_json, read_tensors
from ..errors import InputError
from ..evaluate import Scores
from ..inspect import inspect
from ..plan import SOURCE, Plan

DROPPED = "dropped"


@dataclass(frozen=True)
class Facts:
    """All that a page can show. None, or empty: not done, or not measured."""

    run: str
    source: Mapping[str, Any]  # source.json: model, family, container, identity, experts, bytes, command, recipe
    before: Mapping[str, Any] | None = None  # `inspect` of the source, where it still stands
    after: Mapping[str, Any] | None = None  # `inspect` of the export
    plan: Plan | None = None
    selection: Mapping[str, Any] | None = None  # selection.json: criterion, kept, margins, scores, tokens, warnings …
    verify: Mapping[str, Any] | None = None  # verify.json: holds, compared, findings
    scores: Scores | None = None
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


def gather(run: str | Path) -> Facts:
    """Read a run folder. Raises `InputError` when it has no source.json: then it is none."""
    run = Path(run)
    source = read_json(run / "source.json", "source")
    scores = Scores.read(run / "scores.json") if (run / "scores.json").exists() else None
    return Facts(
        run=run.name,
        source=source,
        before=looked_at(Path(source["model"]), source["identity"]),
        after=looked_at(run / "model"),
        plan=Plan.load(run / "plan.json") if (run / "plan.json").exists() else None,
        selection=optional(run / "selection.json", "selection"),
        verify=optional(run / "verify.json", "verify"),
        scores=scores,
        kl_nats=token_values(run / "scores.safetensors", scores) if scores else {},
    )


def optional(path: Path, kind: str) -> dict[str, Any] | None:
    return read_json(path, kind) if path.exists() else None


def looked_at(model: Path, identity: str = "") -> dict[str, Any] | None:
    """`inspect` of a model folder; None when it is gone, or another one stands there now."""
    if not (model / "config.json").exists():
        return None
    found = inspect(model)
    return found if identity in ("", found["identity"]) else None


def token_values(path: Path, scores: Scores) -> dict[str, np.ndarray]:
    tensors, _ = read_tensors(path, "token_scores")
    found = {}
    for reading in scores.facts["readings"]:
        kl_N = tensors[f"{reading['name']}.kl_nats"].double().numpy().ravel()
        kl_N = kl_N[np.isfinite(kl_N)]
        if len(kl_N) != reading["tokens_counted"]:
            raise InputError(
                f"{path} holds {len(kl_N):,} values of {reading['name']!r}, scores.json {reading['tokens_counted']:,}"
            )
        found[reading["name"]] = kl_N
    return found
