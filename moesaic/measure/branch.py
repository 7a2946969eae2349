"""Branches: models that differ from the source in some units, all measured in one sweep of the source's weights.

A branch leaves the source at the first layer where it differs: until there its hidden states are the
source's and cost nothing. From there on it rides along. What a single option costs and what a whole plan
costs are asked in the same way; nothing is written. Leaves out which branches to ask for (prices).
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import identity, read_json, read_tensors, sweep_partials, write_json, write_tensors
from ..checkpoint import Checkpoint
from ..containers import siblings
from ..errors import PlanError
from ..families import Architecture, Linear
from ..formats import FORMATS, NumberFormat
from ..plan import SOURCE, Plan, dropped
from ..progress import progress
from ..resources import Resources
from ..rounding import Rounding, round_siblings, rounding_named
from ..stream import Change, LayerRun, State
from ..tokens import TokenSet
from .excess import excess

KIND = "branches"
COPIES = 5  # tensors [T, D] of a state in a MoE layer: before, after, normed, the experts' sum, and the shared expert's
SAVE_SECONDS = 600.0  # between two saves of the hidden states


@dataclass(frozen=True)
class Branch:
    """The source but for the formats of some units, and the experts that some layers keep."""

    formats: Mapping[str, str] = field(default_factory=dict)  # unit -> format; "source" says nothing
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # MoE layer -> ids that stay, ascending

    @staticmethod
    def of(plan: Plan) -> "Branch":
        return Branch({u: f for u, f in plan.formats.items() if f != SOURCE}, dict(plan.kept))

    def first(self, architecture: Architecture) -> int:
        """The first layer where it differs."""
        return min([*(architecture.units[unit][0].layer for unit in self.formats), *self.kept, architecture.layers])

    @property
    def facts(self) -> dict[str, Any]:
        return {"formats": dict(self.formats), "kept": {str(n): list(ids) for n, ids in self.kept.items()}}


@dataclass(frozen=True)
class Measured:
    """KL(source ‖ branch) of one branch on some rows."""

    kl_B: np.ndarray  # mean over each row's finite tokens, nats, float64
    nonfinite: int  # tokens that are in no figure

    @property
    def nats(self) -> float:
        """Per token; infinite where a token is not finite, as no plan should be made of such a branch."""
        return float("inf") if self.nonfinite else float(self.kl_B.mean())

    @property
    def error(self) -> float:
        """Standard error over rows; NaN for a single row."""
        return float(self.kl_B.std(ddof=1) / len(self.kl_B) ** 0.5) if len(self.kl_B) > 1 else float("nan")


@dataclass(frozen=True)
class Effort:
    """What measuring will take, known before it starts.

    token_layers      tokens through a layer, all branches and the source's own
    head_layers       what telling logits apart comes to besides, counted as if it were more of these
    one_by_one        the same if each branch were run by itself from the embedding
    read_bytes        of weights; `one_by_one_bytes` if each branch read them all
    memory_bytes      hidden states of the largest batch, beside what `LayerRun` needs
    batches           sweeps; each starts at the first layer where one of its branches differs
    """

    token_layers: int
    head_layers: int
    one_by_one: int
    read_bytes: int
    one_by_one_bytes: int
    memory_bytes: int
    batches: int

    @property
    def work(self) -> int:
        """Token-layers, all told."""
        return self.token_layers + self.head_layers

    def __str__(self) -> str:
        return (
            f"{self.token_layers:,} token-layers and {self.head_layers:,} for logits in {self.batches} "
            f"sweep{'s' * (self.batches > 1)} "
            f"({self.one_by_one / max(self.token_layers, 1):.1f} times as many one by one), "
            f"{self.read_bytes / 1e9:,.2f} GB to read ({self.one_by_one_bytes / 1e9:,.2f} one by one), "
            f"{self.memory_bytes / 1e9:,.2f} GB of hidden states"
        )


def batches(
    architecture: Architecture, branches: Sequence[Branch], state_bytes: int, memory_bytes: int
) -> list[list[int]]:
    """Branches (by number, those that differ earliest first) in groups whose hidden states fit in `memory_bytes`."""
    order = sorted(range(len(branches)), key=lambda i: branches[i].first(architecture))
    size = max(1, memory_bytes // state_bytes - 1)  # the source rides in every one
    return [order[i : i + size] for i in range(0, len(order), size)]


def effort(checkpoint: Checkpoint, branches: Sequence[Branch], tokens: int, memory_bytes: int) -> Effort:
    """Predict what `measure` takes with F32 hidden states."""
    a, state_bytes = checkpoint.architecture, COPIES * 4 * tokens * checkpoint.architecture.hidden
    groups = batches(a, branches, state_bytes, memory_bytes)
    stored_L = np.zeros(a.layers, np.int64)
    for linear in a.linears:
        stored_L[linear.layer] += checkpoint.container.packing(checkpoint.formats[linear.name]).bytes(linear.shape)
    starts = [branches[group[0]].first(a) for group in groups]
    ridden = sum(a.layers - b.first(a) for b in branches) + sum(a.layers - s for s in starts) + max(starts, default=0)
    return Effort(
        tokens * ridden,
        round(tokens * len(branches) * head_layers(a)),
        tokens * a.layers * (len(branches) + 1),
        int(sum(stored_L[s:].sum() for s in starts)),
        int(stored_L.sum()) * (len(branches) + 1),
        state_bytes * (max(map(len, groups), default=0) + 1),
        len(groups),
    )


def head_layers(architecture: Architecture) -> float:
    """Layers that weigh as much as a branch's logits: one product with the head, and an exponential of each."""
    a, per_layer = architecture, np.zeros(architecture.layers)
    for n in a.linears:
        per_layer[n.layer] += n.elements if n.expert is None else n.elements * a.top_k / a.experts
    return 2 * a.vocab * a.hidden / float(per_layer.mean())


def rounded(
    linears: Sequence[Linear], weights: Sequence[Tensor], *, format: NumberFormat, rounding: Rounding
) -> list[Tensor]:
    """A `Change`: the values that an export of these matrices would hold, second scales shared as there."""
    value = dict(zip((linear.name for linear in linears), weights))
    for group in siblings(linears):
        pairs = round_siblings(rounding, [value[n.name] for n in group], format)
        value |= {n.name: format.decode(*pair) for n, pair in zip(group, pairs)}
    return [value[linear.name] for linear in linears]


def changes(branches: Sequence[Branch], rounding: str) -> dict[str, Change]:
    """One `Change` for each format, so that branches share what it makes. Raises `PlanError` for what needs data."""
    way = rounding_named(rounding)
    if way.needs:
        raise PlanError(f"rounding {rounding} needs {', '.join(way.needs)}, which measuring does not collect; use rtn")
    formats = sorted({format for branch in branches for format in branch.formats.values()})
    return {format: partial(rounded, format=FORMATS[format], rounding=way) for format in formats}


def affordable_tokens(checkpoint: Checkpoint, work: float, seconds: float) -> int:
    """How many tokens can be taken in about `seconds`, each through as many layers as `work`: from one row through one layer.

    Reading and decoding that layer's weights counts as if it were arithmetic: the guess is on the safe side.
    """
    run, row_1T = LayerRun(checkpoint), torch.zeros(1, 512, dtype=torch.int64)
    row_1T[0] = torch.arange(512) % checkpoint.architecture.vocab
    began = time.monotonic()
    run.advance(checkpoint.architecture.layers - 1, [State(run.embed(row_1T))])
    return int(seconds / (time.monotonic() - began) * row_1T.numel() / work)


def measure(
    checkpoint: Checkpoint, branches: Sequence[Branch], tokens: TokenSet, folder: Path, *,
    rounding: str = "rtn", memory_bytes: int | None = None, quiet: bool = False, title: str = "measure",
) -> list[Measured]:  # fmt: skip
    """KL(source ‖ branch) of each branch on `tokens`, in nats, by running it.

    memory_bytes  for hidden states, as `effort` counts them; default: half of what is available. More of it means fewer
                  sweeps. What `LayerRun` needs for weights comes on top.

    Each batch leaves a file in `folder` when it is done, and its hidden states every ten minutes and on Ctrl-C: the
    same call goes on from there, however much memory it is given then.
    """
    run, way = LayerRun(checkpoint), changes(branches, rounding)
    inputs = {"source": checkpoint.identity, "tokens": tokens.identity, "rounding": rounding}
    limit = memory_bytes or Resources().held_bytes(run.device)
    names = [identity(branch.facts) for branch in branches]
    sweep_partials(folder)
    done = {
        name: row
        for file in sorted(folder.glob("*.json"))
        for name, row in read_json(file, KIND, inputs)["found"].items()
    }
    left = {name: branch for name, branch in zip(names, branches) if name not in done}
    foreseen, saved = effort(checkpoint, list(left.values()), tokens.tokens, limit), folder / "riders.safetensors"
    if left and not quiet:
        print(f"{title}: {foreseen}", file=sys.stderr, flush=True)
    with progress(title, foreseen.work if left else 0, "token-layers", quiet) as meter:
        at, source = 0, State(run.embed(tokens.ids_BT))
        for group in grouped(run, left, saved, inputs, tokens.tokens, limit):
            start = next(iter(group.values())).first(run.architecture)
            while at < start:
                (source,) = run.advance(at, [source])
                at += 1
                meter.advance(tokens.tokens)
            found = dict(zip(group, ride(run, source, start, group, way, saved, inputs, meter.advance)))
            write_json(folder / f"{identity(list(group))}.json", KIND, {"found": found}, inputs)
            saved.unlink(missing_ok=True)
            done |= found
        meter.advance(meter.total - meter.done)
    return [Measured(np.array(done[name]["kl_nats"]), done[name]["nonfinite"]) for name in names]


Named = Mapping[str, Branch]  # by the identity of what they are


def grouped(
    run: LayerRun, left: Named, saved: Path, inputs: Mapping[str, str], tokens: int, memory_bytes: int
) -> list[Named]:
    """What is left to do in batches, first of all the one whose hidden states were saved."""
    begun: list[str] = read_tensors(saved, "riders", inputs)[1]["names"] if saved.exists() else []
    found: list[Named] = [{name: left[name] for name in begun}] if begun and set(begun) <= set(left) else []
    rest = [name for name in left if not found or name not in found[0]]
    state_bytes = COPIES * 4 * tokens * run.architecture.hidden
    for group in batches(run.architecture, [left[name] for name in rest], state_bytes, memory_bytes):
        found.append({rest[i]: left[rest[i]] for i in group})
    return found


def ride(
    run: LayerRun, source: State, start: int, group: Named, way: Mapping[str, Change], saved: Path,
    inputs: Mapping[str, str], advance: Callable[[int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """One batch, in order of where its branches differ, from layer `start` or where it was saved: its rows' KL."""
    layers, branches = run.architecture.layers, list(group.values())
    reached = start, [source]
    if saved.exists():
        tensors, body = read_tensors(saved, "riders", inputs)
        h = [tensors[str(i)].to(run.device) for i in range(body["states"])]
        reached = body["layer"], [State(h[0]), *(state_of(run, b, h_BTD, way) for b, h_BTD in zip(branches, h[1:]))]
    clock = time.monotonic()
    try:
        while reached[0] < layers:
            layer, states = reached
            joining = [b for b in branches if b.first(run.architecture) == layer]
            states = run.advance(layer, states + [state_of(run, b, states[0].hidden_BTD, way) for b in joining])
            reached = layer + 1, states  # one assignment: an interrupt finds a layer and its own states
            advance(len(states) * source.hidden_BTD[..., 0].numel())
            if time.monotonic() - clock > SAVE_SECONDS:
                save(saved, *reached, list(group), inputs)
                clock = time.monotonic()
    except KeyboardInterrupt:
        save(saved, *reached, list(group), inputs)
        raise
    states = reached[1]
    nowhere = len(branches) + 1 - len(states)  # branches that differ from the source in nothing
    hidden = [s.hidden_BTD for s in states[1:]] + [states[0].hidden_BTD] * nowhere
    each = head_layers(run.architecture) / run.architecture.vocab
    found = excess(run, states[0].hidden_BTD, hidden, lambda logits: advance(round(logits * each)))
    return [summary(kl_BS) for kl_BS in found]


def state_of(run: LayerRun, branch: Branch, hidden_BTD: Tensor, way: Mapping[str, Change]) -> State:
    left_out = dropped(branch.kept, run.architecture.experts)
    return State(hidden_BTD, left_out, changed={unit: way[format] for unit, format in branch.formats.items()})


def summary(kl_BS: Tensor) -> dict[str, Any]:
    return {"kl_nats": kl_BS.nanmean(-1).nan_to_num(0.0).tolist(), "nonfinite": int(kl_BS.isnan().sum())}


def save(file: Path, layer: int, states: Sequence[State], names: Sequence[str], inputs: Mapping[str, str]) -> None:
    tensors = {str(i): s.hidden_BTD.cpu() for i, s in enumerate(states)}
    write_tensors(file, "riders", tensors, inputs, {"layer": layer, "states": len(states), "names": list(names)})


def some_rows(tokens: TokenSet, limit: int) -> TokenSet:
    """At most `limit` tokens of `tokens`, one row at least: rows spread evenly, so that domains keep their shares."""
    rows = min(tokens.rows, max(1, limit // tokens.ids_BT.shape[1]))
    return tokens.take(np.linspace(0, tokens.rows - 1, rows).round().astype(int).tolist())
