"""Several models through the same tokens in one sweep: each layer of each is read once, for all rows and all ways of running it.

Saves where it stands when asked to, so that an interrupted sweep continues. Leaves out what the
outcome means (bootstrap.py) and what was read (evaluate/).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint.kept import Kept
from ...errors import InputError
from ...stream import Intake, LayerRun, Standing, State, Sweep
from ...stream.memory import spans
from ...stream.state import ignore
from .boundary import Known, Mark, route_tensors, routes_of
from .comparison import Comparison, Divergence
from .routing import Route, agreement, into

SOURCE = "source"
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
class Rows:
    """A block of rows that every model reads, and which of their predictions are compared."""

    ids_BT: Tensor
    scored_BS: Tensor  # bool, S = T − 1


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
    rows: Sequence[Rows],
    sweep: Sweep | None = None,
    *,
    known: Known | None = None,
    done: Callable[[int], None] = ignore,
) -> Lockstep:
    """Read `rows` with all models and compare the predictions that are scored.

    sweep  through the source's layers, with the file it is kept in while under way; None: nothing is saved.
    known  of the source from an earlier call on these rows: then only the contenders are swept, and
           no error by layer is known.
    done   told how many layers are behind us, as they are.
    """
    for contender in contenders.values():
        check(source, contender.run)
    sides = {SOURCE: Contender(source), **contenders}
    live = dict(contenders) if known else sides
    sweep = sweep or Sweep(range(source.architecture.layers), None, {}, source.device)
    sweep = replace(sweep, inputs={**sweep.inputs, "swept": " ".join(c.told(side) for side, c in live.items())})
    done(sweep.done)
    begin, step = partial(first, sides, rows, known), partial(forward, live, source.architecture.experts)
    return sweep.through(begin, step, partial(end, sides, rows), lambda _: done(1))


def check(source: LayerRun, other: LayerRun) -> None:
    a, b = source.architecture, other.architecture
    if (a.vocab, a.layers) != (b.vocab, b.layers):
        raise InputError(
            f"{source.checkpoint.path} has {a.layers} layers and {a.vocab:,} ids, {other.checkpoint.path} {b.layers} and "
            f"{b.vocab:,}; only models of one vocabulary and depth can be compared"
        )


def first(sides: Mapping[str, Contender], rows: Sequence[Rows], known: Known | None) -> Standing:
    """All models before their first layer; a source that is known stands at the end from the start."""
    states: dict[str, State] = {}
    if known is not None:
        device = sides[SOURCE].run.device
        ends = zip(known.final, known.nonfinite)
        states = {name_of(SOURCE, i): State(h.to(device), nonfinite=bad) for i, (h, bad) in enumerate(ends)}
    alike: dict[int, str] = {}  # contenders of one run start from the same tensors, and share the first attention
    for side, contender in sides.items():
        if name_of(side, 0) not in states:
            same = alike.setdefault(id(contender.run), side)
            for i, block in enumerate(rows):
                states[name_of(side, i)] = states.get(name_of(same, i)) or State(contender.run.embed(block.ids_BT))
    others = [side for side in sides if side != SOURCE]
    tensors = {routing(side, i): torch.zeros(2, r.ids_BT.numel()) for side in others for i, r in enumerate(rows)}
    return Standing(
        states, {"marks": {side: [] for side in others}}, {**tensors, **route_tensors(known.routes if known else {})}
    )


def forward(live: Mapping[str, Contender], experts: int, layer: int, before: Standing) -> Standing:
    """One layer of every model that is `live`; those of one run go together. `experts` are the source's."""
    states, seen, tensors = dict(before.states), dict[str, list[Route]](), dict(before.tensors)
    for run in {id(c.run): c.run for c in live.values()}.values():
        ours = {name: side for side, c in live.items() if c.run is run for name in blocks(states, side)}
        seen |= {name: [] for name in ours}
        going = [
            replace(
                states[name], hidden_BTD=states[name].hidden_BTD.to(run.device), rounded=live[side].rounded,
                observer=into(seen[name]),
            )
            for name, side in ours.items()
        ]  # fmt: skip
        for name, state in zip(ours, run.advance(layer, going)):
            states[name] = replace(state, observer=None, rounded={})
            if (by := live[ours[name]]).noise:
                states[name] = disturbed(states[name], by, layer, int(name.rsplit(".", 1)[1]))
    if SOURCE in live and all(seen[name] for name in blocks(states, SOURCE)):
        tensors |= route_tensors({layer: [seen[name][0] for name in blocks(states, SOURCE)]})
    routes, marks = routes_of(tensors).get(layer), dict(before.notes["marks"])
    for side in live:
        if side != SOURCE:
            error = apart(of(states, SOURCE), of(states, side)) if SOURCE in live else None
            agreed = gone = None
            if (kept := live[side].kept) is not None and routes is not None:
                pairs = zip(routes, blocks(states, side))
                added = [torch.stack(agreement(route, seen[name][0], kept[layer], experts)) for route, name in pairs]
                tensors |= {routing(side, i): tensors[routing(side, i)] + x_2T for i, x_2T in enumerate(added)}
                agreed, gone = torch.cat(added, 1).double().mean(1).tolist()
            marks[side] = [*marks[side], asdict(Mark(layer, error, agreed, gone))]
    return replace(before, states=states, notes={"marks": marks}, tensors=tensors)


def end(sides: Mapping[str, Contender], rows: Sequence[Rows], last: Standing) -> Lockstep:
    """What came of it, of what stands behind the last layer."""
    ends = {side: of(last.states, side) for side in sides}
    routes = routes_of(last.tensors)
    sums = {side: [last.tensors[routing(side, i)] for i in range(len(rows))] for side in sides if side != SOURCE}
    agreed = {side: routed(sides[side], len(routes), sums_B, rows) for side, sums_B in sums.items()}
    marks = {side: [Mark(**mark) for mark in found] for side, found in last.notes["marks"].items()}
    source = ends[SOURCE]
    known = Known([s.hidden_BTD for s in source], routes, [s.nonfinite for s in source], [])
    nonfinite = {side: total(states) for side, states in ends.items()}
    return Lockstep(head(sides, ends, agreed, rows), marks, nonfinite, known)


def name_of(side: str, block: int) -> str:
    """The name of a model's states for one block of rows."""
    return f"{side}.{block}"


def routing(side: str, block: int) -> str:
    """The name of sums [2, T] over MoE layers so far: agreement, and mass on experts that are gone."""
    return f"routing.{side}.{block}"


def blocks(states: Mapping[str, State], side: str) -> list[str]:
    """Names of a model's states, block by block."""
    return [name for name in states if name.rsplit(".", 1)[0] == side]


def of(states: Mapping[str, State], side: str) -> list[State]:
    return [states[name] for name in blocks(states, side)]


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
    sides: Mapping[str, Contender], ends: Mapping[str, Sequence[State]], agreed: Mapping[str, Mapping[str, Tensor]],
    rows: Sequence[Rows],
) -> dict[str, list[Divergence]]:  # fmt: skip
    """Final norms and heads, a block of the vocabulary at a time, over every scored position."""
    source, runs = sides[SOURCE].run, {id(c.run): c.run for c in sides.values()}
    x_ND = {}
    for side, contender in sides.items():
        run = contender.run
        parts = [s.hidden_BTD[:, :-1][r.scored_BS.to(run.device)] for s, r in zip(ends[side], rows)]
        x_ND[side] = run.in_spans(run.norm(), torch.cat(parts), 4)
    next_N = torch.cat([r.ids_BT[:, 1:][r.scored_BS] for r in rows]).to(source.device)
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
        values = {**comparison.finish(), **agreed[side]}
        split = {name: x_N.split([int(r.scored_BS.sum()) for r in rows]) for name, x_N in values.items()}
        found[side] = [
            Divergence.of(r.scored_BS, {name: x[i] for name, x in split.items()}) for i, r in enumerate(rows)
        ]
    return found


def routed(contender: Contender, layers: int, sums: Sequence[Tensor], rows: Sequence[Rows]) -> dict[str, Tensor]:
    """Mean over MoE `layers` of what `agreement` says of each scored token [N]; empty where it was not compared."""
    if contender.kept is None or not layers:
        return {}
    parts = [
        (sums_2T / layers).reshape(2, len(r.ids_BT), -1)[:, :, :-1][:, r.scored_BS] for sums_2T, r in zip(sums, rows)
    ]
    agreed_N, gone_N = torch.cat(parts, 1)
    return {"router_agreement": agreed_N, "pruned_mass": gone_N}


def total(states: Sequence[State]) -> dict[int, int]:
    found: dict[int, int] = {}
    for state in states:
        for layer, count in state.nonfinite.items():
            found[layer] = found.get(layer, 0) + count
    return found
