"""How large the inputs of matrices get on text: what a format that rounds activations too has to be told.

One number for each input that matrices share: of q, k and v; of gate and up, the same for all experts of a layer,
who all see the same vectors; of down, the largest over a layer's experts, since some of vLLM's kernels take one
for all of them anyway. The largest value seen, as compressed-tensors calibrates. Leaves out percentiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..artifact import identity, read_json, sweep_partials, write_json
from ..checkpoint import Checkpoint
from ..data.tokens import TokenSet
from ..errors import InputError
from ..families import Architecture
from ..plan import Plan, dropped
from ..plan.blueprint import Blueprint
from ..progress import progress
from ..stream import STATES, ExpertPass, LayerRun, LinearPass, Observer, Standing, State, Sweep

KIND, DONE = "activations", "activations.json"
VERSION = "1"  # goes up with any change to what is found on the same text


@dataclass
class Largest:
    """The largest |x| of every input seen."""

    architecture: Architecture
    found: dict[str, float] = field(default_factory=dict)

    @property
    def observer(self) -> Observer:
        return Observer(expert=self.expert, linear=self.linear)

    def expert(self, seen: ExpertPass) -> None:
        matrices = self.architecture.experts_of[seen.layer, seen.expert]
        self.take(matrices["gate"].input, seen.x_nD)
        self.take(matrices["down"].input, seen.inner_nI)

    def linear(self, seen: LinearPass) -> None:
        for name in {linear.input for linear in seen.linears}:
            self.take(name, seen.x_nI)

    def take(self, name: str, x_nI: Tensor) -> None:
        """Raises `InputError` for an input that is not finite: under no scale would the rest of it survive."""
        largest = float(x_nI.abs().max()) if x_nI.numel() else 0.0
        if not largest < float("inf"):
            raise InputError(f"{name} has NaN or infinite inputs on this text; give it a format that keeps activations")
        self.found[name] = max(largest, self.found.get(name, 0.0))


def calibrated(source: Checkpoint, plan: Plan, tokens: TokenSet, folder: Path, quiet: bool = False) -> Plan:
    """`plan`, knowing how large the inputs get that its formats round. Reads no text where there are none.

    Sees what the source would with the plan's experts. Interrupted, the same call continues.
    Raises `InputError` where an input was never seen, or is not finite.
    """
    asked = Blueprint.of(source, plan).uncalibrated
    if not asked:
        return plan
    found = observe(source, plan.kept, tokens, folder, quiet)
    if unseen := [name for name in asked if not found.get(name)]:
        raise InputError(f"no input of {', '.join(unseen[:3])} was seen on {tokens.tokens:,} tokens; give it more text")
    return replace(plan, activations={**plan.activations, **{name: found[name] for name in asked}})


def observe(
    source: Checkpoint, kept: Mapping[int, Sequence[int]], tokens: TokenSet, folder: Path, quiet: bool = False
) -> dict[str, float]:
    """The largest |x| of every input of the model with only `kept` experts, by one sweep; all of them where there is none."""
    inputs = {"source": source.identity, "tokens": tokens.identity, "kept": identity(sorted(kept.items()))}
    inputs["activations"] = VERSION
    if (folder / DONE).exists():
        (folder / STATES).unlink(missing_ok=True)
        return dict(read_json(folder / DONE, KIND, inputs)["largest"])
    sweep_partials(folder)
    run, a = LayerRun(source), source.architecture
    under_way = Sweep(range(a.layers), folder / STATES, inputs, run.device)
    left_out = dropped(kept, a.experts)

    def begin() -> Standing:
        return Standing({"text": State(run.embed(tokens.ids_BT), left_out)})

    def end(at: Standing) -> dict[str, float]:
        largest: dict[str, float] = dict(at.notes)
        write_json(folder / DONE, KIND, {"tokens": tokens.tokens, "largest": largest}, inputs)
        return largest

    with progress("activations", (a.layers - under_way.done) * tokens.tokens, "token-layers", quiet) as meter:
        return under_way.through(begin, partial(look, run), end, lambda _: meter.advance(tokens.tokens))


def look(run: LayerRun, layer: int, at: Standing) -> Standing:
    """One layer forward; its inputs' largest values are added to the notes."""
    largest = Largest(run.architecture, dict(at.notes))
    (state,) = run.advance(layer, [replace(at.states["text"], observer=largest.observer)])
    return replace(at, states={"text": replace(state, observer=None)}, notes=largest.found)
