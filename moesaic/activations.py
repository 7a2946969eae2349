"""How large the inputs of matrices get on text: what a format that rounds activations too has to be told.

One number for each input that matrices share: of q, k and v; of gate and up, the same for all experts of a layer,
who all see the same vectors; of down, the largest over a layer's experts, since some of vLLM's kernels take one
for all of them anyway. The largest value seen, as compressed-tensors calibrates. Leaves out percentiles.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from .artifact import identity, read_json, read_tensors, write_json, write_tensors
from .checkpoint import Checkpoint
from .containers import input_of
from .errors import InputError
from .families import Architecture
from .plan import Plan, dropped
from .progress import progress
from .stream import ExpertPass, LayerRun, LinearPass, Observer, State
from .target import Target
from .tokens import TokenSet

KIND, DONE = "activations", "activations.json"
SAVE_SECONDS = 300.0  # a killed sweep loses at most this much, and a layer


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
        self.take(input_of(matrices["gate"]), seen.x_nD)
        self.take(input_of(matrices["down"]), seen.inner_nI)

    def linear(self, seen: LinearPass) -> None:
        for name in {input_of(linear) for linear in seen.linears}:
            self.take(name, seen.x_nI)

    def take(self, name: str, x_nI: Tensor) -> None:
        """Raises `InputError` for an input that is not finite: under no scale would the rest of it survive."""
        largest = float(x_nI.abs().max()) if x_nI.numel() else 0.0
        if not largest < float("inf"):
            raise InputError(
                f"{name} has inputs that are no numbers on this text; give it a format that keeps activations"
            )
        self.found[name] = max(largest, self.found.get(name, 0.0))


def calibrated(source: Checkpoint, plan: Plan, tokens: TokenSet, folder: Path, quiet: bool = False) -> Plan:
    """`plan`, knowing how large the inputs get that its formats round. Reads no text where there are none.

    Sees what the source would with the plan's experts. Interrupted, the same call continues.
    Raises `InputError` where an input was never seen, or is not finite.
    """
    asked = Target.of(source, plan).uncalibrated
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
    if (folder / DONE).exists():
        return dict(read_json(folder / DONE, KIND, inputs)["largest"])
    run, a, hidden = LayerRun(source), source.architecture, folder / "hidden.safetensors"
    start, largest = 0, Largest(a)
    if hidden.exists():
        tensors, body = read_tensors(hidden, KIND, inputs)
        start, largest, before = body["layer"] + 1, Largest(a, body["largest"]), tensors["hidden_BTD"].to(run.device)
    else:
        before = run.embed(tokens.ids_BT)
    saved = time.monotonic()
    with progress("activations", (a.layers - start) * tokens.tokens, "token-layers", quiet) as meter:
        for layer, (state,) in run.sweep([State(before, dropped(kept, a.experts), largest.observer)], start):
            meter.advance(tokens.tokens)
            if time.monotonic() - saved > SAVE_SECONDS:
                body = {"layer": layer, "largest": largest.found}
                write_tensors(hidden, KIND, {"hidden_BTD": state.hidden_BTD.cpu()}, inputs, body)
                saved = time.monotonic()
    write_json(folder / DONE, KIND, {"tokens": tokens.tokens, "largest": largest.found}, inputs)
    hidden.unlink(missing_ok=True)
    return largest.found
