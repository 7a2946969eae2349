"""A layer backward: from slopes of the loss behind it to slopes before it, and what each matrix had to do with them.

Every half of a layer is run again from the hidden states that went in, with autograd, rows or tokens of a span at
a time; experts one at a time, with their own tokens. So memory is that of `LayerRun`, and for the unit in hand what
all its matrices multiply and what comes out. Slopes are d(summed loss)/d(hidden state). Choices are held: which
experts a token selects, which keys an indexer keeps; gates move. `tail` is where slopes begin. Leaves out what is
done with them (measure).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import Linear
from .attention import ROW_COPIES, SCORE_COPIES, head_width
from .experts import INNER_COPIES, ExpertWeights
from .layer import LayerRun
from .memory import ahead, spans
from .router import route
from .skeleton import standing_in
from .state import Routing, State, ignore

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UnitPass:
    """Matrices that are read together, on the tokens that they saw. An expert's tokens may come in several passes.

    Matrix i multiplied x[i] [n, I]; the loss rises by slope[i] [n, O] times what is added to its output.
    """

    unit: str
    linears: tuple[Linear, ...]
    w: tuple[Tensor, ...]  # [O, I] each
    x: tuple[Tensor, ...]
    slope: tuple[Tensor, ...]
    tokens_n: Tensor


@dataclass(frozen=True)
class GatePass:
    """What the loss owes to each gate: slope_TE = slope of the routed sum · expert(x), where it was asked for, else 0."""

    routing: Routing
    slope_TE: Tensor


def nothing_more(seen: Routing) -> Tensor | None:
    """The answer to `Listener.wanted` of those that ask for no expert beyond the selected ones."""


@dataclass(frozen=True)
class Listener:
    """Called while a layer is run backward: `unit` for each unit, `wanted` once and then `gates` in a MoE layer.

    wanted    says with a bool [T, E] on which tokens an expert is to be run beside those that selected it
    """

    unit: Callable[[UnitPass], None] = ignore
    wanted: Callable[[Routing], Tensor | None] = nothing_more
    gates: Callable[[GatePass], None] = ignore


@dataclass(frozen=True)
class Retreat:
    """A layer that is run backward, and who listens."""

    run: LayerRun
    layer: int
    listener: Listener


def retreat(run: LayerRun, layer: int, hidden_BTD: Tensor, slope_BTD: Tensor, listener: Listener) -> Tensor:
    """Slopes before `layer` [B, T, D], of the hidden states before it and the slopes behind it."""
    split = run.family.wiring.split
    here = Retreat(run, layer, listener)
    if not split:
        return retreat_whole(here, hidden_BTD, slope_BTD)
    with torch.no_grad():
        (middle_BTD,) = run.attention(layer, [State(hidden_BTD)])
    h_TD, slope_TD = middle_BTD.flatten(0, 1), slope_BTD.flatten(0, 1)
    norm = run.block(layer, (split.before_mlp,)).requires_grad_(False).get_submodule(split.before_mlp)
    x_TD = run.in_spans(norm, h_TD, 4)
    before_TD = feed_forward(here, x_TD, slope_TD)
    for span in spans(len(h_TD), 8 * 4 * h_TD.shape[1], run.block_bytes):
        before_TD[span] = pulled(norm, h_TD[span], before_TD[span])[0]
    slope_BTD = (slope_TD + before_TD).view_as(slope_BTD)
    block = run.block(layer, (split.before_attention, run.family.wiring.attention)).requires_grad_(False)
    norm = block.get_submodule(split.before_attention)

    def forward(h_BTD: Tensor) -> Tensor:
        return attended(run, run.skeleton(block).attention, norm(h_BTD))

    return slope_BTD + attention(here, block, forward, hidden_BTD, slope_BTD)


def retreat_whole(here: Retreat, hidden_BTD: Tensor, slope_BTD: Tensor) -> Tensor:
    """By the layer's own forward: its MLP is a constant in one graph, whose slope is asked for, and then in another."""
    run, layer = here.run, here.layer
    with torch.no_grad():
        (attended_BTD,) = run.attention(layer, [State(hidden_BTD)])
        ((x_TD, mlp_TD, _),) = run.through(layer, [State(hidden_BTD)], [attended_BTD])
    wiring, besides = run.family.wiring, run.besides(layer)
    skeleton = run.skeleton(run.block(layer, besides).requires_grad_(False))
    mlp_BTD, found = mlp_TD.view_as(hidden_BTD), torch.empty_like(hidden_BTD)
    for row in skeleton.rows(hidden_BTD):

        def of_mlp(m_BTD: Tensor, row: slice = row) -> Tensor:
            return skeleton.leaving(hidden_BTD[row], attended_BTD[row], {wiring.mlp: m_BTD})[1]

        found[row] = pulled(of_mlp, mlp_BTD[row], slope_BTD[row])[0]
    before_TD = feed_forward(here, x_TD, found.flatten(0, 1))
    block = run.block(layer, (*besides, wiring.attention)).requires_grad_(False)
    live = run.skeleton(block)
    real = live.attention.forward

    def forward(both_B2TD: Tensor) -> Tensor:
        """Of hidden states, with the MLP's output beside them: what leaves the layer, with what goes into the MLP."""
        h_BTD, m_BTD = both_B2TD.unbind(1)
        entered = []

        def mlp(x_BTD: Tensor) -> Tensor:
            entered.append(x_BTD)
            return m_BTD.detach()

        with standing_in(
            {live.attention: lambda hidden_states, **given: (attended(run, real, hidden_states), None), live.mlp: mlp}
        ):
            out_BTD = block(h_BTD)
        return torch.stack([out_BTD, *entered], 1)

    both = torch.stack([hidden_BTD, mlp_BTD], 1), torch.stack([slope_BTD, before_TD.view_as(slope_BTD)], 1)
    return attention(here, block, forward, *both)[:, 0]


def attended(run: LayerRun, attention: Callable[..., Any], x_BTD: Tensor) -> Tensor:
    positions_1T = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
    out_BTD: Tensor = attention(
        hidden_states=x_BTD, position_embeddings=run.rotary(x_BTD, positions_1T),
        attention_mask=None, position_ids=positions_1T, past_key_values=None,
    )[0]  # fmt: skip
    return out_BTD


def attention(here: Retreat, block: Any, forward: Forward, x: Tensor, slope: Tensor) -> Tensor:
    """Whole rows: a row needs `SCORE_COPIES` tensors [heads, T, T] where its attention is sparse."""
    run, length, heads = here.run, x.shape[-2], here.run.config.num_attention_heads
    row_bytes = 4 * heads * length * (SCORE_COPIES * length + ROW_COPIES * head_width(run.config))
    return module_back(here, block, forward, x, slope, spans(len(x), row_bytes, run.block_bytes // 4))


def feed_forward(here: Retreat, x_TD: Tensor, slope_TD: Tensor) -> Tensor:
    if here.layer in here.run.architecture.moe_layers:
        return moe(here, x_TD, slope_TD)
    return mlp(here, here.run.family.wiring.mlp, x_TD, slope_TD)


def mlp(here: Retreat, name: str, x_TD: Tensor, slope_TD: Tensor) -> Tensor:
    """The dense or shared MLP of that name."""
    run = here.run
    block = run.block(here.layer, (name,)).requires_grad_(False)
    module = block.get_submodule(name)
    bytes_each = 2 * run.widening(module) * x_TD.shape[1] * x_TD.itemsize
    return module_back(here, block, module, x_TD, slope_TD, spans(len(x_TD), bytes_each, run.block_bytes))


def module_back(
    here: Retreat, block: nn.Module, forward: Forward, x: Tensor, slope: Tensor, parts: Iterable[slice]
) -> Tensor:
    """Slopes before `forward`, part by part, and the units that `block` holds told to the listener behind the last one."""
    run = here.run
    linears_of = {
        module: linears
        for parameter, tensors in run.family.wiring.parameters(run.architecture, here.layer).items()
        for module in [parameter.rsplit(".", 1)[0]]
        if not next(block.get_submodule(module).parameters()).is_meta
        and (linears := [n for t in tensors if (n := run.architecture.by_name.get(t.removesuffix(".weight")))])
    }
    before, heard = torch.empty_like(x), dict[str, list[tuple[Tensor, Tensor]]]()
    for part in parts:
        caught: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [block.get_submodule(m).register_forward_hook(catch(m, caught)) for m in linears_of]
        try:
            before[part], *slopes = pulled(forward, x[part], slope[part], caught)
        finally:
            for hook in hooks:
                hook.remove()
        for (module, (seen, _)), found in zip(caught.items(), slopes):
            heard.setdefault(module, []).append((seen.detach().flatten(0, -2), found.flatten(0, -2)))
    units: dict[str, list[tuple[Linear, Tensor, Tensor]]] = {}
    for module, passes in heard.items():
        seen_nI, found_nO = (torch.cat(tensors) for tensors in zip(*passes))
        linears = linears_of[module]
        for n, slope_nO in zip(linears, found_nO.split([n.shape[0] for n in linears], 1)):
            units.setdefault(n.unit, []).append((n, seen_nI, slope_nO))
    for unit, members in units.items():
        order = {n.name: i for i, n in enumerate(run.architecture.units[unit])}
        linears_, xs, slopes_ = zip(*sorted(members, key=lambda m: order[m[0].name]))
        w = tuple(run.weight(f"{n.name}.weight").float() for n in linears_)
        everyone = torch.arange(len(xs[0]), device=x.device)
        here.listener.unit(UnitPass(unit, linears_, w, xs, slopes_, everyone))
    return before


def catch(module: str, caught: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """A hook that notes what a matrix multiplies, and the node of the graph that comes out."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        caught[module] = inputs[0], out

    return hook


def pulled(
    forward: Forward, x: Tensor, slope: Tensor, caught: dict[str, tuple[Tensor, Tensor]] | None = None
) -> list[Tensor]:
    """The slope at `x`, and at each output that `forward` leaves in `caught`; 0 where the loss does not depend on it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = forward(x)
    nodes = [x, *(node for _, node in (caught or {}).values())]
    found = torch.autograd.grad(out, nodes, slope, allow_unused=True)
    return [torch.zeros_like(node) if g is None else g for node, g in zip(nodes, found)]


def moe(here: Retreat, x_TD: Tensor, slope_TD: Tensor) -> Tensor:
    """Slopes before router, experts and shared expert."""
    run, layer, listener = here.run, here.layer, here.listener
    a = run.architecture
    routed_TD = slope_TD * run.family.arithmetic.routed_scale(run.text)
    with torch.enable_grad():
        leaf_TD = x_TD.detach().requires_grad_()
        moving = route(run.router(layer), leaf_TD)
    routing = Routing(layer, moving.affinity_TE.detach(), moving.experts_Tk, moving.gates_Tk.detach(), x_TD)
    gate_TE = torch.zeros_like(routing.affinity_TE).scatter_(1, routing.experts_Tk, routing.gates_Tk)
    selected_TE = torch.zeros_like(gate_TE, dtype=torch.bool).scatter_(1, routing.experts_Tk, True)
    wanted_TE = listener.wanted(routing)
    more_TE = torch.zeros_like(selected_TE) if wanted_TE is None else wanted_TE & ~selected_TE
    before_TD, owed_TE = torch.zeros_like(x_TD), torch.zeros_like(gate_TE)
    asked = (selected_TE | more_TE).any(0).nonzero().flatten().tolist()
    for e, stored in ahead(lambda e: run.read_expert(layer, e), asked):
        linears, weights = tuple(linear for linear, _ in stored.values()), run.decode_expert(stored, None)
        del stored
        inner = weights.gate.shape[0]
        for tokens_T, selected in ((selected_TE[:, e], True), (more_TE[:, e], False)):
            tokens = tokens_T.nonzero().flatten()
            for span in spans(len(tokens), 4 * (2 * INNER_COPIES * inner + 4 * a.hidden), run.block_bytes):
                n = tokens[span]
                if not selected:
                    f_nD, _ = expert(run, weights, x_TD[n])
                    owed_TE[n, e] = (f_nD * routed_TD[n]).sum(1)
                    continue
                f_nD, found, seen = expert_back(run, weights, x_TD[n], routed_TD[n] * gate_TE[n, e, None])
                owed_TE[n, e] = (f_nD * routed_TD[n]).sum(1)
                before_TD.index_add_(0, n, found[0])
                w = weights.gate, weights.up, weights.down
                listener.unit(UnitPass(linears[0].unit, linears, w, seen, tuple(found[1:]), n))
    listener.gates(GatePass(routing, owed_TE))
    before_TD += torch.autograd.grad(moving.gates_Tk, leaf_TD, owed_TE.gather(1, routing.experts_Tk))[0]
    if run.family.wiring.shared:
        before_TD += mlp(here, run.family.wiring.shared, x_TD, slope_TD)
    return before_TD


def expert(run: LayerRun, weights: ExpertWeights, x_nD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What an expert makes of tokens, and on the way: gate's, up's and down's outputs, and what down multiplies."""
    gate_nI, up_nI = weights.through("gate", x_nD), weights.through("up", x_nD)
    inner_nI = run.family.arithmetic.activate(run.text, gate_nI, up_nI)
    f_nD = weights.through("down", inner_nI)
    return f_nD, (gate_nI, up_nI, f_nD, inner_nI)


def expert_back(
    run: LayerRun, weights: ExpertWeights, x_nD: Tensor, slope_nD: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """An expert's output; slopes at x and behind gate, up and down; and what those three multiply."""
    with torch.enable_grad():
        x_nD = x_nD.detach().requires_grad_()
        f_nD, (gate_nI, up_nI, _, inner_nI) = expert(run, weights, x_nD)
    found = torch.autograd.grad(f_nD, (x_nD, gate_nI, up_nI, f_nD), slope_nD)
    return f_nD.detach(), found, (x_nD.detach(), x_nD.detach(), inner_nI.detach())


@torch.no_grad()
def drawn(run: LayerRun, hidden_BTD: Tensor, seed: int) -> Tensor:
    """Ids [B, T − 1] drawn from the model's own next-token distributions, by the largest of logits with Gumbel noise."""
    x_ND = run.in_spans(run.norm(), hidden_BTD[:, :-1].flatten(0, 1), 4)
    highest_N = torch.full((len(x_ND),), -torch.inf, device=run.device)
    label_N = torch.zeros(len(x_ND), dtype=torch.int64, device=run.device)
    chance = torch.Generator(run.device).manual_seed(seed)
    for block in run.vocabulary_spans():
        head_vD = run.rows(run.architecture.head, block)
        for n in spans(len(x_ND), 16 * len(head_vD), run.block_bytes):
            logits_nv = F.linear(x_ND[n], head_vD).float()
            noise_nv = torch.empty_like(logits_nv).exponential_(generator=chance).log_()
            best_n, at_n = (logits_nv - noise_nv).max(-1)
            label_N[n] = torch.where(best_n > highest_N[n], at_n + block.start, label_N[n])
            highest_N[n] = torch.maximum(highest_N[n], best_n)
    return label_N.view(len(hidden_BTD), -1)


@torch.no_grad()
def tail(run: LayerRun, hidden_BTD: Tensor, labels_BS: Tensor) -> Tensor:
    """Slopes [B, T, D] behind the last layer of Σ −ln p(label): over every position but each row's last, S = T − 1."""
    norm, h_ND = run.norm().requires_grad_(False), hidden_BTD[:, :-1].flatten(0, 1)
    x_ND, label_N = run.in_spans(norm, h_ND, 4), labels_BS.flatten().to(run.device)
    log_z_N = torch.full((len(x_ND),), -torch.inf, device=run.device)
    for block in run.vocabulary_spans():
        head_vD = run.rows(run.architecture.head, block)
        for n in spans(len(x_ND), 8 * len(head_vD), run.block_bytes):
            log_z_N[n] = torch.logaddexp(log_z_N[n], F.linear(x_ND[n], head_vD).float().logsumexp(-1))
    slope_ND = torch.zeros_like(x_ND)
    for block in run.vocabulary_spans():
        head_vD = run.rows(run.architecture.head, block)
        for n in spans(len(x_ND), 8 * len(head_vD), run.block_bytes):
            p_nv = (F.linear(x_ND[n], head_vD).float() - log_z_N[n, None]).exp_()
            here_n = ((label_N[n] >= block.start) & (label_N[n] < block.stop)).nonzero().flatten()
            p_nv[here_n, label_N[n][here_n] - block.start] -= 1
            slope_ND[n] += p_nv.to(x_ND.dtype) @ head_vD
    for n in spans(len(h_ND), 8 * 4 * h_ND.shape[1], run.block_bytes):
        slope_ND[n] = pulled(norm, h_ND[n], slope_ND[n])[0]
    return F.pad(slope_ND.view(*hidden_BTD[:, :-1].shape), (0, 0, 0, 1))
