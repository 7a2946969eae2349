"""The decision, and the one file that carries it: which experts stay, and in which format each unit is written.

Leaves out how a plan is found (allocate, select) and what it costs to make it true (export).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .artifact import read_json, write_json
from .errors import PlanError

SOURCE = "source"  # as a unit's format: the bytes that the source has, copied


@dataclass(frozen=True)
class Plan:
    """What to write. Experts are numbered as in the source, and each layer keeps the same count.

    kept       MoE layer -> ids that stay, ascending; empty: all stay
    formats    unit name -> format name, or "source"; a unit that is not named keeps its source format
    container  the container to write
    rounding   the rounding that chooses codes, for units that change format
    """

    container: str
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    rounding: str = "rtn"

    def __post_init__(self) -> None:
        counts = {len(ids) for ids in self.kept.values()}
        if len(counts) > 1:
            raise PlanError(f"the plan keeps {sorted(counts)} experts in different layers; engines want one count")
        for layer, ids in self.kept.items():
            if list(ids) != sorted(set(ids)):
                raise PlanError(f"layer {layer} keeps experts {ids}; wanted distinct ids in ascending order")

    def experts(self, source: int) -> int:
        """Experts a layer after the plan, given the source's count."""
        return len(next(iter(self.kept.values()))) if self.kept else source

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        body = asdict(self) | {"kept": {str(layer): list(ids) for layer, ids in self.kept.items()}}
        write_json(path, "plan", body, inputs)

    @staticmethod
    def load(path: Path, inputs: Mapping[str, str] | None = None) -> "Plan":
        return Plan.of(read_json(path, "plan", inputs))

    @staticmethod
    def of(body: Mapping[str, Any]) -> "Plan":
        kept = {int(layer): tuple(ids) for layer, ids in body["kept"].items()}
        return Plan(body["container"], kept, body["formats"], body["rounding"])
