"""Several models through the same tokens in one sweep: each layer of each is read once, for all rows and all ways of running it.

Saves where it stands when asked to, so that an interrupted sweep continues. Leaves out what the
outcome means (bootstrap.py) and what was read (evaluate/).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..stream import Intake, LayerRun, State
from ..stream.memory import spans
from .boundary import Boundary, Known, Mark
from .comparison import Comparison, Divergence
from .routing import Kept, Route, agreement, into

SOURCE = "source"
SAVE_SECONDS = 600.0  # between two saves of the hidden states
COPIES = 6  # float64 tensors [tokens, ids] that a comparison makes


@dataclass(frozen=True)
class Contender:
    """A model, or one way of running it, that is held against the source.

    rounded  unit -> what becomes of its activations (`State.rounded`)
    noise    standard deviation of what its hidden states are multiplied by after each layer, about 1
    kept     its experts in the source's numbering; None: where its tokens go is not compared
    """

    run: LayerRun
    rounded: Mapping[str, Intake] = field(default_factory=dict)
    noise: float = 0.0
    seed: int = 0
    kept: Kept | None = None

    def told(self, name: str) -> str:
        """The name, with the noise and where its dice begin: what a saved sweep must not be continued with another of."""
        return f"{name} {self.noise} {self.seed}" if self.noise else name


@dataclass(frozen=True)
class Lockstep:
    """What came of it: per-token values for each block of rows, and what happened layer by layer."""

    divergences: Mapping[str, list[Divergence]]  # contender -> for each block of rows
    marks: Mapping[str, Sequence[Mark]]  # contender -> layer by layer
    nonfinite: Mapping[str, dict[int, int]]  # model -> layer -> tokens whose hidden state is not finite after it
    known: Known  # of the source; its floor is empty


def lockstep(
    source: LayerRun,
    contenders: Mapping[str, Contender],
    rows: Sequence[Tensor],
    scored: Sequence[Tensor],
    *,
    save: Path | None = None,
    inputs: Mapping[str, str] | None = None,
    known: Known | None = None,
    done: Callable[[int], None] = lambda layers: None,
) -> Lockstep:
    """Read `rows` (token ids [B, T] each) with all models and compare the predictions that are `scored` [B, T−1].

    save   file for the hidden states, every ten minutes and on Ctrl-C; when it is there and made from
           the same `inputs`, the sweep goes on from it. It is removed at the end.
    known  of the source from an earlier call on these rows: then only the contenders are swept, and
           no error by layer is known.
    done   told how many layers are behind us, as they are.
    """
    for contender in contenders.values():
        check(source, contender.run)
    sides = {SOURCE: Contender(source), **contenders}
    live = dict(contenders) if known else sides
    inputs = {**(inputs or {}), "swept": " ".join(c.told(side) for side, c in live.items())}
    devices = {side: contender.run.device for side, contender in sides.items()}
    resumed = save is not None and save.exists()
    at = Boundary.load(save, inputs, devices) if save and resumed else begin(sides, rows, known)
    done(at.layer)
    saved = time.monotonic()
    try:
        while at.layer < source.architecture.layers:
            at = step(at, live, source.architecture.experts)
            done(1)
            if save is not None and time.monotonic() - saved > SAVE_SECONDS:
                at.save(save, inputs)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if save is not None:
            at.save(save, inputs)
        raise
    divergences = head(sides, at, rows, scored)
    if save is not None:
        save.unlink(missing_ok=True)
    ends = at.states[SOURCE]
    nonfinite = {side: total(states) for side, states in at.states.items()}
    found = Known([s.hidden_BTD for s in ends], at.routes, [s.nonfinite for s in ends], [])
    return Lockstep(divergences, at.marks, nonfinite, found)


def check(source: LayerRun, other: LayerRun) -> None:
    a, b = source.architecture, other.architecture
    if (a.vocab, a.layers) != (b.vocab, b.layers):
        raise InputError(
            f"{source.checkpoint.path} has {a.layers} layers and {a.vocab:,} ids, {other.checkpoint.path} {b.layers} and "
            f"{b.vocab:,}; only models of one vocabulary and depth can be compared"
        )


def begin(sides: Mapping[str, Contender], rows: Sequence[Tensor], known: Known | None) -> Boundary:
    states: dict[str, list[State]] = {}
    if known is not None:
        device = sides[SOURCE].run.device
        states[SOURCE] = [State(h.to(device), nonfinite=bad) for h, bad in zip(known.final, known.nonfinite)]
    alike: dict[int, str] = {}  # contenders of one run start from the same tensors, and share the first attention
    for side, contender in sides.items():
        if side not in states:
            first = alike.setdefault(id(contender.run), side)
            states[side] = states.get(first) or [State(contender.run.embed(tokens_BT)) for tokens_BT in rows]
    others = [side for side in sides if side != SOURCE]
    routing = {side: [torch.zeros(2, tokens_BT.numel()) for tokens_BT in rows] for side in others}
    return Boundary(0, states, dict(known.routes) if known else {}, routing, {side: [] for side in others})


def step(at: Boundary, live: Mapping[str, Contender], experts: int) -> Boundary:
    """One layer of every model that is `live`; those of one run ride together. `experts` are the source's."""
    layer, states = at.layer, dict(at.states)
    seen: dict[str, list[list[Route]]] = {side: [[] for _ in states[side]] for side in live}
    for run in {id(c.run): c.run for c in live.values()}.values():
        ours = [side for side, contender in live.items() if contender.run is run]
        going = [
            replace(state, rounded=live[side].rounded, observer=into(routes))
            for side in ours
            for state, routes in zip(states[side], seen[side])
        ]
        after = iter(run.advance(layer, going))
        for side in ours:
            states[side] = [replace(next(after), observer=None, rounded={}) for _ in states[side]]
            if live[side].noise:
                states[side] = [disturbed(s, live[side], layer, i) for i, s in enumerate(states[side])]
    routes = dict(at.routes)
    if SOURCE in live and all(seen[SOURCE]):
        routes[layer] = [found[0] for found in seen[SOURCE]]
    routing, marks = dict(at.routing), dict(at.marks)
    for side in live:
        if side != SOURCE:
            error = apart(states[SOURCE], states[side]) if SOURCE in live else None
            agreed = gone = None
            if (kept := live[side].kept) is not None and layer in routes:
                pairs = zip(routes[layer], seen[side])
                added = [torch.stack(agreement(route, found[0], kept[layer], experts)) for route, found in pairs]
                routing[side] = [old_2T + x_2T for old_2T, x_2T in zip(routing[side], added)]
                agreed, gone = torch.cat(added, 1).double().mean(1).tolist()
            marks[side] = [*marks[side], Mark(layer, error, agreed, gone)]
    return Boundary(layer + 1, states, routes, routing, marks)


def disturbed(state: State, by: Contender, layer: int, block: int) -> State:
    """`state` times 1 + noise, drawn anew for each layer and block of rows: the same whenever it is drawn."""
    hidden_BTD = state.hidden_BTD.clone()
    dice = torch.Generator(hidden_BTD.device).manual_seed((by.seed * 4096 + layer) * 65536 + block)
    for row_TD in hidden_BTD:
        noise_TD = torch.randn(row_TD.shape, generator=dice, device=row_TD.device, dtype=torch.float32)
        row_TD *= (1 + by.noise * noise_TD).to(row_TD.dtype)
    return replace(state, hidden_BTD=hidden_BTD)


def apart(source: Sequence[State], other: Sequence[State]) -> float | None:
    """‖h_other − h_source‖ / ‖h_source‖ over all tokens at which both are finite; None where there is none."""
    off = size = 0.0
    for a, b in zip(source, other):
        for a_TD, b_TD in zip(a.hidden_BTD, b.hidden_BTD.to(a.hidden_BTD.device)):
            finite_T1 = (a_TD.isfinite() & b_TD.isfinite()).all(-1, keepdim=True)
            off += float((b_TD - a_TD).where(finite_T1, 0.0).square().sum(dtype=torch.float64))
            size += float(a_TD.where(finite_T1, 0.0).square().sum(dtype=torch.float64))
    return (off / size) ** 0.5 if size else None


@torch.no_grad()
def head(
    sides: Mapping[str, Contender], at: Boundary, rows: Sequence[Tensor], scored: Sequence[Tensor]
) -> dict[str, list[Divergence]]:
    """Final norms and heads, a block of the vocabulary at a time, over every scored position."""
    source, runs = sides[SOURCE].run, {id(c.run): c.run for c in sides.values()}
    x_ND = {}
    for side, contender in sides.items():
        run = contender.run
        parts = [s.hidden_BTD[:, :-1][mask_BS.to(run.device)] for s, mask_BS in zip(at.states[side], scored)]
        x_ND[side] = run.in_spans(run.norm(), torch.cat(parts), 4)
    next_N = torch.cat([tokens_BT[:, 1:][mask_BS] for tokens_BT, mask_BS in zip(rows, scored)]).to(source.device)
    comparisons = {side: Comparison.of(next_N) for side in sides if side != SOURCE}
    for block in source.vocabulary_spans():
        weights = {key: run.rows(run.architecture.head, block) for key, run in runs.items()}
        for n in spans(len(next_N), 8 * COPIES * (block.stop - block.start), source.block_bytes):
            source_nv = F.linear(x_ND[SOURCE][n], weights[id(source)])
            for side, comparison in comparisons.items():
                export_nv = F.linear(x_ND[side][n], weights[id(sides[side].run)])
                comparison.add(n, block.start, source_nv, export_nv.to(source.device))
    found = {}
    for side, comparison in comparisons.items():
        values = comparison.finish() | routed(sides[side], at, side, scored)
        split = {name: x_N.split([int(mask_BS.sum()) for mask_BS in scored]) for name, x_N in values.items()}
        found[side] = [Divergence.of(mask, {name: x[i] for name, x in split.items()}) for i, mask in enumerate(scored)]
    return found


def routed(contender: Contender, at: Boundary, side: str, scored: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean over MoE layers of what `agreement` says of each scored token [N]; empty where it was not compared."""
    if contender.kept is None or not at.routes:
        return {}
    parts = [
        (sums_2T / len(at.routes)).reshape(2, len(mask_BS), -1)[:, :, :-1][:, mask_BS]
        for sums_2T, mask_BS in zip(at.routing[side], scored)
    ]
    agreed_N, gone_N = torch.cat(parts, 1)
    return {"router_agreement": agreed_N, "pruned_mass": gone_N}


def total(states: Sequence[State]) -> dict[int, int]:
    found: dict[int, int] = {}
    for state in states:
        for layer, count in state.nonfinite.items():
            found[layer] = found.get(layer, 0) + count
    return found
