"""The decision, and the one file that carries it: which experts stay, and in which format each unit is written.

Leaves out how a plan is found (allocate, calibrate) and what it costs to make it true (export).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..artifact import identity, read_json, write_json
from ..errors import PlanError

KEEP, DROP = "keep", "drop"  # what becomes of a layer for multi-token prediction
SOURCE = "source"  # as a unit's format: the source's values; its bytes, copied, wherever the container has the same


@dataclass(frozen=True)
class Plan:
    """What to write. Experts are numbered as in the source, and each layer keeps the same count.

    kept       MoE layer -> ids that stay, ascending; empty: all stay
    formats    unit name -> format name, or "source"; a unit that is not named keeps its source format
    container  the container to write
    rounding   the rounding that chooses codes, for units that change format
    activations  input (`Linear.input`) -> its largest |x| on text, where a format rounds activations by that
    overlays   name of a folder -> {matrix or tensor of the blueprint -> SHA-256 of its tensors as written}: what was made
               elsewhere and takes the place of what the source would give (`overlay`)
    drop_mtp   leave out the layer for multi-token prediction, if the source has one
    """

    container: str
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    rounding: str = "rtn"
    activations: Mapping[str, float] = field(default_factory=dict)
    overlays: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    drop_mtp: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in (self.container, self.rounding, *self.formats.values())):
            raise PlanError("the plan's container, rounding and formats are not names; make it again")
        counts = {len(ids) for ids in self.kept.values()}
        if len(counts) > 1:
            raise PlanError(f"the plan keeps {sorted(counts)} experts in different layers; engines want one count")
        for layer, ids in self.kept.items():
            if list(ids) != sorted(set(ids)) or not all(type(i) is int for i in ids):
                raise PlanError(f"layer {layer} keeps experts {ids}; wanted distinct ids in ascending order")
        if bad := [name for name in self.overlays if not re.fullmatch(r"[\w-]+", name)]:
            raise PlanError(f"the plan names the overlay {bad[0]!r}; wanted the plain name of a folder")
        items = Counter(item for of in self.overlays.values() for item in of)
        if twice := [item for item, count in items.items() if count > 1]:
            raise PlanError(f"two overlays of the plan hold {twice[0]}; leave one of them out")

    def experts(self, source: int) -> int:
        """Experts a layer after the plan, given the source's count."""
        return len(next(iter(self.kept.values()))) if self.kept else source

    @cached_property
    def overlaid(self) -> dict[str, str]:
        """Matrix or tensor of the blueprint -> digest, of all overlays."""
        return {item: digest for of in self.overlays.values() for item, digest in of.items()}

    @property
    def identity(self) -> str:
        """Stands for what was decided: what overlays are made from, and so without them."""
        return identity(replace(self, overlays={}).body)

    @property
    def body(self) -> dict[str, Any]:
        """JSON-able: what `save` writes."""
        found = asdict(self) | {"kept": {str(layer): list(ids) for layer, ids in self.kept.items()}}
        return {name: value for name, value in found.items() if name not in ("overlays", "drop_mtp") or value}

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        write_json(path, "plan", self.body, inputs)

    @staticmethod
    def load(path: Path, inputs: Mapping[str, str] | None = None) -> "Plan":
        """Read what `save` wrote. Raises `PlanError` for what is no plan, `StaleError` for other inputs."""
        body = read_json(path, "plan", inputs)
        try:
            kept = {int(layer): tuple(ids) for layer, ids in body["kept"].items()}
            overlays = {name: dict(of) for name, of in body.get("overlays", {}).items()}
            if body.get("repaired"):  # before 0.2: the one kind of overlay that a plan listed
                overlays["repaired"] = dict(body["repaired"])
            activations = dict(body.get("activations", {}))
            return Plan(
                container=body["container"],
                kept=kept,
                formats=dict(body["formats"]),
                rounding=body["rounding"],
                activations=activations,
                overlays=overlays,
                drop_mtp=body.get("drop_mtp", False) is True,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{path} is not a complete plan ({error!r}); make it again") from error


def dropped(kept: Mapping[int, Sequence[int]], experts: int) -> dict[int, list[int]]:
    """MoE layer -> ids, of `experts`, that `kept` leaves out; empty where all stay."""
    return {layer: sorted({*range(experts)} - {*ids}) for layer, ids in kept.items()}
