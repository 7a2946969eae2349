"""The one sweep: states through the layers, a layer at a time, saved on the way so that the same call goes on.

What is done at a layer is a plain function of what stands before it and of named inputs: `step(layer, standing)`
gives what stands behind it, and writes what else it makes as whole files of its own. A sweep that is cut short leaves
its `Standing` in one file: after each layer or every few minutes (a kill), and on Ctrl-C. States that do not fit into
memory together go in several passes (`packed`). Leaves out what the layers do (layer.py, backward.py).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..artifact import read_body, read_tensors, write_tensors
from ..errors import InputError, StaleError
from .layer import LayerRun
from .state import State, ignore

KIND = "states"
STATES = "states.safetensors"  # in the folder of whoever sweeps
SAVE_SECONDS = 300.0  # a killed sweep loses at most this much, and a layer
EACH_LAYER = 0.0  # for sweeps whose layers take longer to make than states to save

Result = TypeVar("Result")


@dataclass(frozen=True)
class Standing:
    """All that a sweep knows between two layers.

    states   what goes through the layers, by name; branches that have not left the source yet are not there
    notes    JSON-able: what the layers behind have told
    tensors  the same, as tensors; CPU
    done     how many layers are behind
    """

    states: Mapping[str, State]
    notes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    done: int = 0


Step = Callable[[int, Standing], Standing]  # which layer, and what stands before it -> what stands behind it


def advanced(run: LayerRun, layer: int, at: Standing) -> Standing:
    """The step that does nothing but advance every state."""
    return replace(at, states=dict(zip(at.states, run.advance(layer, list(at.states.values())))))


@dataclass(frozen=True)
class Sweep:
    """What a sweep goes through and where it is kept while it is under way.

    layers   in their order; the last one first for slopes
    file     of the saved standing; None: nothing is saved
    inputs   name -> identity of all that the states depend on
    device   where saved states go on
    seconds  between two saves; `EACH_LAYER`: after every layer; None: `SAVE_SECONDS`
    """

    layers: Sequence[int]
    file: Path | None
    inputs: Mapping[str, str]
    device: torch.device
    seconds: float | None = None

    @property
    def done(self) -> int:
        """How many layers are behind what was saved. Raises `StaleError` where it is of other inputs."""
        return int(self.saved["done"])

    @property
    def saved(self) -> Mapping[str, Any]:
        """ "done" and "notes" of what was saved; no layer and no notes where nothing was."""
        if self.file is None or not self.file.exists():
            return {"done": 0, "notes": {}}
        with removable(self.file):
            return read_body(self.file, KIND, self.inputs)

    def through(
        self, first: Callable[[], Standing], step: Step, end: Callable[[Standing], Result],
        done: Callable[[Standing], None] = ignore,
    ) -> Result:  # fmt: skip
        """From what was saved, or else `first`, through the layers that are left.

        end   makes of the last standing what the sweep is for; after it nothing is kept
        done  told after each layer

        An interrupt, in `end` too, saves the last whole standing.
        """
        at = self.begin(first)
        kept, clock, seconds = at.done, time.monotonic(), SAVE_SECONDS if self.seconds is None else self.seconds
        try:
            while at.done < len(self.layers):
                # one assignment: an interrupt finds states and their own number
                at = replace(step(self.layers[at.done], at), done=at.done + 1)
                done(at)
                if self.file is not None and time.monotonic() - clock >= seconds:
                    save(self.file, at, self.inputs)
                    kept, clock = at.done, time.monotonic()
            found = end(at)
        except KeyboardInterrupt:
            if self.file is not None and at.done > kept:
                save(self.file, at, self.inputs)
            raise
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        return found

    def begin(self, first: Callable[[], Standing]) -> Standing:
        if self.file is None:
            return first()
        for leftover in self.file.parent.glob(".*.partial"):
            leftover.unlink(missing_ok=True)  # of a kill while states or a layer's products were written
        return load(self.file, self.inputs, self.device) if self.file.exists() else first()


@contextmanager
def removable(file: Path) -> Iterator[None]:
    """Whoever reads `file` is who would have to write it again."""
    try:
        yield
    except StaleError:
        raise
    except InputError as error:
        raise InputError(f"{error}; or remove it, and the same command begins anew") from error


def save(file: Path, at: Standing, inputs: Mapping[str, str]) -> None:
    """Write a standing. States that are one tensor are stored once; what a step dresses them in is not."""
    tensors, names, states = dict[str, Tensor](), dict[int, str](), dict[str, Any]()
    for name, state in at.states.items():
        same = names.setdefault(id(state.hidden_BTD), f"state.{name}")
        tensors[same] = state.hidden_BTD.cpu()
        states[name] = {
            "tensor": same,
            "dropped": {str(layer): list(ids) for layer, ids in state.dropped.items()},
            "nonfinite": {str(layer): count for layer, count in state.nonfinite.items()},
        }
    tensors |= {f"tensor.{name}": tensor for name, tensor in at.tensors.items()}
    write_tensors(file, KIND, tensors, inputs, {"done": at.done, "states": states, "notes": dict(at.notes)})


def load(file: Path, inputs: Mapping[str, str], device: torch.device) -> Standing:
    """Read a standing, its states on `device`. Raises `StaleError` where it is of other inputs."""
    with removable(file):
        tensors, body = read_tensors(file, KIND, inputs)
    placed = {name: tensor.to(device) for name, tensor in tensors.items() if name.startswith("state.")}
    states = {
        name: State(placed[of["tensor"]], numbered(of["dropped"]), nonfinite=numbered(of["nonfinite"]))
        for name, of in body["states"].items()
    }
    others = {name.removeprefix("tensor."): t for name, t in tensors.items() if name.startswith("tensor.")}
    return Standing(states, body["notes"], others, body["done"])


def numbered(by_layer: Mapping[str, Any]) -> dict[int, Any]:
    return {int(layer): value for layer, value in by_layer.items()}


def packed(first: Sequence[int], state_bytes: int, memory_bytes: int) -> list[list[int]]:
    """Branches (by number, those of the earliest `first` layer in front) in passes that fit into `memory_bytes`.

    One state more than a pass has branches rides along, the one that they branch from; one branch goes at least.
    """
    order = sorted(range(len(first)), key=lambda i: first[i])
    size = max(1, memory_bytes // state_bytes - 1)
    return [order[i : i + size] for i in range(0, len(order), size)]
