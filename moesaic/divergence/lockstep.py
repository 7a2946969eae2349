"""Two models through the same tokens in one sweep: each layer of each is read once, for all rows.

Saves where it stands when asked to, so that an interrupted sweep continues. Leaves out what the
outcome means (bootstrap.py) and what was read (evaluate/).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifact import read_tensors, write_tensors
from ..errors import InputError
from ..stream import LayerRun, State
from ..stream.memory import spans
from .comparison import Comparison, Divergence

KIND = "lockstep"
SAVE_SECONDS = 600.0  # between two saves of the hidden states
COPIES = 6  # float64 tensors [tokens, ids] that a comparison makes
Runs = Mapping[str, LayerRun]


@dataclass(frozen=True)
class Boundary:
    """Both models between two layers. The source stands at the end from the start when that is known already."""

    layer: int  # the next to run
    states: Mapping[str, list[State]]  # "source" and "export"
    errors: tuple[float, ...] = ()  # after each layer: ‖h_export − h_source‖ / ‖h_source‖


@dataclass(frozen=True)
class Lockstep:
    """What came of it: per-token values for each block of rows, and what happened layer by layer."""

    divergences: list[Divergence]
    errors: tuple[float, ...]  # as in `Boundary`; empty when the source's end was known already
    nonfinite: dict[str, dict[int, int]]  # model -> layer -> tokens whose hidden state is not finite after it
    final: list[Tensor]  # the source's hidden states before the last norm, [B, T, D] each


def lockstep(
    source: LayerRun,
    export: LayerRun,
    rows: Sequence[Tensor],
    scored: Sequence[Tensor],
    *,
    save: Path | None = None,
    inputs: Mapping[str, str] | None = None,
    final: Sequence[Tensor] | None = None,
    done: Callable[[int], None] = lambda layers: None,
) -> Lockstep:
    """Read `rows` (token ids [B, T] each) with both models and compare the predictions that are `scored` [B, T−1].

    save    file for the hidden states, every ten minutes and on Ctrl-C; when it is there and made from
            the same `inputs`, the sweep goes on from it. It is removed at the end.
    final   the source's own final hidden states from an earlier call: then only the export is swept.
    done    told how many layers are behind us, as they are.
    """
    a, b = source.architecture, export.architecture
    if (a.vocab, a.layers) != (b.vocab, b.layers):
        raise InputError(
            f"{source.checkpoint.path} has {a.layers} layers and {a.vocab:,} ids, {export.checkpoint.path} {b.layers} and "
            f"{b.vocab:,}; only models of one vocabulary and depth can be compared"
        )
    runs = {"source": source, "export": export}
    inputs = {**(inputs or {}), "swept": "both" if final is None else "export"}
    at = resume(save, inputs, runs) if save is not None and save.exists() else begin(runs, rows, final)
    done(at.layer)
    saved = time.monotonic()
    try:
        while at.layer < a.layers:
            at = step(at, {"export": export} if final is not None else runs)
            done(1)
            if save is not None and time.monotonic() - saved > SAVE_SECONDS:
                write(save, at, inputs)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if save is not None:
            write(save, at, inputs)
        raise
    divergences = head(runs, at, rows, scored)
    if save is not None:
        save.unlink(missing_ok=True)
    nonfinite = {side: total(states) for side, states in at.states.items()}
    return Lockstep(divergences, at.errors, nonfinite, [s.hidden_BTD for s in at.states["source"]])


def begin(runs: Runs, rows: Sequence[Tensor], final: Sequence[Tensor] | None) -> Boundary:
    states = {side: [State(run.embed(tokens_BT)) for tokens_BT in rows] for side, run in runs.items() if final is None}
    if final is not None:
        states["source"] = [State(hidden_BTD.to(runs["source"].device)) for hidden_BTD in final]
        states["export"] = [State(runs["export"].embed(tokens_BT)) for tokens_BT in rows]
    return Boundary(0, states)


def step(at: Boundary, runs: Runs) -> Boundary:
    """One layer of each of `runs`."""
    states = {**at.states, **{side: run.advance(at.layer, at.states[side]) for side, run in runs.items()}}
    errors = (*at.errors, apart(states["source"], states["export"])) if len(runs) == 2 else ()
    return Boundary(at.layer + 1, states, errors)


def apart(source: Sequence[State], export: Sequence[State]) -> float:
    """‖h_export − h_source‖ / ‖h_source‖ over all tokens at which both are finite."""
    off = size = 0.0
    for a, b in zip(source, export):
        for a_TD, b_TD in zip(a.hidden_BTD, b.hidden_BTD.to(a.hidden_BTD.device)):
            finite_T1 = (a_TD.isfinite() & b_TD.isfinite()).all(-1, keepdim=True)
            off += float((b_TD - a_TD).where(finite_T1, 0.0).square().sum(dtype=torch.float64))
            size += float(a_TD.where(finite_T1, 0.0).square().sum(dtype=torch.float64))
    return (off / size) ** 0.5 if size else 0.0


@torch.no_grad()
def head(runs: Runs, at: Boundary, rows: Sequence[Tensor], scored: Sequence[Tensor]) -> list[Divergence]:
    """Final norms and heads of both models, a block of the vocabulary at a time, over every scored position."""
    source = runs["source"]
    x_ND = {}
    for side, run in runs.items():
        parts = [s.hidden_BTD[:, :-1][mask_BS.to(run.device)] for s, mask_BS in zip(at.states[side], scored)]
        x_ND[side] = run.in_spans(run.norm(), torch.cat(parts), 4)
    next_N = torch.cat([tokens_BT[:, 1:][mask_BS] for tokens_BT, mask_BS in zip(rows, scored)]).to(source.device)
    comparison = Comparison.of(next_N)
    for block in source.vocabulary_spans():
        weights = {side: run.rows(run.architecture.head, block) for side, run in runs.items()}
        for n in spans(len(next_N), 8 * COPIES * (block.stop - block.start), source.buffer_bytes):
            logits = {side: F.linear(x_ND[side][n], w_vD) for side, w_vD in weights.items()}
            comparison.add(n, block.start, logits["source"], logits["export"].to(source.device))
    found = comparison.finish()
    counts = [int(mask_BS.sum()) for mask_BS in scored]
    split = {name: x_N.split(counts) for name, x_N in found.items()}
    return [Divergence.of(mask, {name: x[i] for name, x in split.items()}) for i, mask in enumerate(scored)]


def total(states: Sequence[State]) -> dict[int, int]:
    found: dict[int, int] = {}
    for state in states:
        for layer, count in state.nonfinite.items():
            found[layer] = found.get(layer, 0) + count
    return found


def write(path: Path, at: Boundary, inputs: Mapping[str, str]) -> None:
    tensors = {f"{side}.{i}": s.hidden_BTD.cpu() for side, states in at.states.items() for i, s in enumerate(states)}
    nonfinite = {side: [dict(s.nonfinite) for s in states] for side, states in at.states.items()}
    write_tensors(path, KIND, tensors, inputs, {"layer": at.layer, "errors": at.errors, "nonfinite": nonfinite})


def resume(path: Path, inputs: Mapping[str, str], runs: Runs) -> Boundary:
    tensors, body = read_tensors(path, KIND, inputs)
    states = {}
    for side, counts in body["nonfinite"].items():
        bad = [{int(layer): n for layer, n in c.items()} for c in counts]
        device = runs[side].device
        states[side] = [State(tensors[f"{side}.{i}"].to(device), nonfinite=b) for i, b in enumerate(bad)]
    return Boundary(body["layer"], states, tuple(body["errors"]))
