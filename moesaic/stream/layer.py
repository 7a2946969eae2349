"""`LayerRun`: hidden states advanced by one layer, whose weights are read and decoded for that and then dropped.

transformers is the reference for arithmetic. Norms, attention, rotary and dense MLP are its own
modules, built without memory and filled with exactly the values that the checkpoint means; the router is
in router.py, experts are in experts.py. What a family has to say comes from `Family`. Leaves out going backward (backward).
"""

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, FamilyError, InputError
from ..families import Linear
from .attention import attend
from .experts import INNER_COPIES, ExpertWeights, Share, run_experts
from .memory import spans, standard_block_bytes
from .router import LayerRouter, route
from .skeleton import Skeleton, see_inputs, take_in
from .state import BlockPass, Change, State, ignore, passed

StoredExpert = dict[str, tuple[Linear, dict[str, Tensor]]]  # projection -> the matrix, and its tensors on disk


class LayerRun:
    """One checkpoint, source or export, as a model that never is in memory whole.

    `advance` depends on its arguments alone: a caller may save hidden states between any two layers and
    go on later, or let several branches ride one reading of the weights.

    Memory: the largest of one layer's attention, its dense or shared MLP, and two experts (one decoded,
    one as it is stored); `block_bytes` for what is made of one block of tokens; and, for T tokens, four times T · D (before,
    after, normed, and the experts' sum). Never the embedding or the head, which pass by in blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        block_bytes: int | None = None,
        attention: str = "sdpa",
    ) -> None:
        """Raises `CheckpointError` for a folder without weights, and for NaN in what is no linear.

        device        where to compute; by itself CUDA where there is one, else CPU
        dtype         of weights, activations and hidden states; routers, gates and the experts' sum stay F32
        block_bytes   what one block of tokens may take, and with the model's widths how many tokens it has: part of
                      what a result depends on. Default: `standard_block_bytes`; others are for tests
        attention     what transformers' modules attend with, by its name there
        """
        if not checkpoint.has_weights:
            raise CheckpointError(
                f"{checkpoint.path} has no weights, only a config; a forward pass needs the whole checkpoint"
            )
        checkpoint.check_values()
        family = checkpoint.family
        self.checkpoint, self.family, self.architecture = checkpoint, family, checkpoint.architecture
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self.block_bytes = block_bytes or standard_block_bytes(self.device)
        self.config = text_config(family.wiring.configuration, checkpoint.config, attention)
        self.text = family.text(checkpoint.config)  # as on disk
        self.modeling = importlib.import_module(family.wiring.modeling)
        with building(family.wiring.rotary_class):
            self.rotary = getattr(self.modeling, family.wiring.rotary_class)(config=self.config).to(self.device)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token ids to hidden states [B, T, D]. Raises `InputError` for an id outside the vocabulary."""
        vocab, name = self.architecture.vocab, self.architecture.embedding
        if tokens_BT.numel() and not 0 <= int(tokens_BT.min()) <= int(tokens_BT.max()) < vocab:
            raise InputError(
                f"token ids reach from {int(tokens_BT.min())} to {int(tokens_BT.max())}, and {self.checkpoint.path} "
                f"has {vocab} of them; tokenize with the model's own tokenizer"
            )
        tokens_BT = tokens_BT.to(self.device)
        hidden_BTD = torch.empty(*tokens_BT.shape, self.architecture.hidden, dtype=self.dtype, device=self.device)
        for block in self.vocabulary_spans():
            inside = (tokens_BT >= block.start) & (tokens_BT < block.stop)
            if inside.any():
                hidden_BTD[inside] = self.rows(name, block)[tokens_BT[inside] - block.start]
        return hidden_BTD

    @torch.no_grad()
    def advance(self, layer: int, states: Sequence[State]) -> list[State]:
        """`states` after one layer; every expert that any of them needs is read once.

        Each state's result is to the bit what it would be alone. States that begin with one tensor, as the
        branches of one place do, share its attention.
        """
        middle = self.attention(layer, states)
        after = self.feed_forward(layer, states, middle)
        return [passed(layer, state, hidden_BTD) for state, hidden_BTD in zip(states, after)]

    @torch.no_grad()
    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Final norm and head: [n, D] -> [n, V] in F32. The head passes by in blocks, once a call: see `logit_spans`."""
        norm = self.norm()
        x_nD = norm(hidden_nD)
        logits_nV = torch.empty(len(x_nD), self.architecture.vocab, device=self.device)
        for block in self.vocabulary_spans():
            logits_nV[:, block] = F.linear(x_nD, self.rows(self.architecture.head, block))
        return logits_nV

    def logit_spans(self, tokens: int, copies: int = 4) -> Iterator[slice]:
        """`tokens` in slices of which `copies` tensors [n, V] in F32 fit the buffer, at least 64 at a time."""
        limit = max(self.block_bytes, 64 * 4 * copies * self.architecture.vocab)
        return spans(tokens, 4 * copies * self.architecture.vocab, limit)

    # A layer in two steps, with a tensor [B, T, D] between them that is the family's own business. Each step builds and
    # fills its own modules, which are gone when it returns, and takes the states as they were before the layer.

    def attention(self, layer: int, states: Sequence[State]) -> list[Tensor]:
        """Of each state what `feed_forward` goes on from: hidden + attention where the layer is split, else attention."""
        split, name = self.family.wiring.split, self.family.wiring.attention
        norms = (split.before_attention,) if split else self.besides(layer)
        out = [s.hidden_BTD for s in states]
        for block, members in self.blocks(layer, (*norms, name), states, ("qkv", "o")):
            found: dict[tuple[Any, ...], Tensor] = {}  # by identity of what went in, and what becomes of it inside
            for i in members:
                h_BTD, rounded = states[i].hidden_BTD, states[i].rounded
                same = (id(h_BTD), *(rounded.get(unit) for unit in self.units(layer, ("qkv", "o"))))
                if same in found:
                    out[i] = found[same].clone()
                else:
                    with self.watched(block, layer, states[i]):
                        out[i] = self.attend(block, h_BTD)
                    found[same] = out[i]
        return out

    def attend(self, block: Any, hidden_BTD: Tensor) -> Tensor:
        split, words = self.family.wiring.split, (self.rotary, self.config, self.block_bytes)
        if split:
            norm = block.get_submodule(split.before_attention)
            return attend(block.get_submodule(self.family.wiring.attention), hidden_BTD, *words, norm)
        skeleton = self.skeleton(block)
        real = skeleton.attention.forward  # which will have a stand-in
        return skeleton.attended(hidden_BTD, lambda x_BTD: attend(real, x_BTD, *words))

    def feed_forward(self, layer: int, states: Sequence[State], middle: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states after the layer, of what `attention` gave, which may be overwritten."""
        split = self.family.wiring.split
        if not split:
            return [out_BTD for _, _, out_BTD in self.through(layer, states, middle)]
        norm = self.block(layer, (split.before_mlp,)).get_submodule(split.before_mlp)
        flat = [middle_BTD.flatten(0, 1) for middle_BTD in middle]
        normed = [self.in_spans(norm, h_TD, 4) for h_TD in flat]
        if layer in self.architecture.moe_layers:
            for h_TD, given in zip(flat, self.moe(layer, states, normed, flat)):
                for out_TD in given:
                    h_TD += out_TD
        else:
            for h_TD, out_TD in zip(flat, self.mlp(layer, self.family.wiring.mlp, states, normed)):
                h_TD += out_TD
        return list(middle)

    def through(
        self, layer: int, states: Sequence[State], attended: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By the layer's own forward: what goes into its MLP and what comes out of it [T, D], and what leaves it [B, T, D]."""
        wiring, skeleton = self.family.wiring, self.skeleton(self.block(layer, self.besides(layer)))
        entered = [skeleton.entering(s.hidden_BTD, a_BTD) for s, a_BTD in zip(states, attended)]
        normed = [x_TD for x_TD, _ in entered]
        acts: list[dict[str, Tensor]]
        if layer in self.architecture.moe_layers:
            hidden = [left_BTD.flatten(0, 1) for _, left_BTD in entered]
            acts = [self.in_block(*given) for given in self.moe(layer, states, normed, hidden)]
        else:
            acts = [{wiring.mlp: out_TD} for out_TD in self.mlp(layer, wiring.mlp, states, normed)]
        out = [skeleton.leaving(s.hidden_BTD, a_BTD, act) for s, a_BTD, act in zip(states, attended, acts)]
        return [(x_TD, mlp_TD, out_BTD) for x_TD, (mlp_TD, out_BTD) in zip(normed, out)]

    def in_block(self, routed_TD: Tensor, shared_TD: Tensor | None = None) -> dict[str, Tensor]:
        """What modules of a MoE block have to give so that it makes the same of it as `moe` says."""
        wiring, factor = self.family.wiring, self.family.arithmetic.routed_scale(self.text)
        known = {f"{wiring.mlp}.{wiring.experts}": routed_TD / factor if wiring.block_scales else routed_TD}
        return known if shared_TD is None else known | {wiring.shared: shared_TD}

    def skeleton(self, block: Any) -> Skeleton:
        return Skeleton(block, self.family.wiring, self.block_bytes)

    def besides(self, layer: int) -> list[str]:
        """Modules that are neither attention, experts nor a MLP: norms, and what else a family has."""
        wiring, moe = self.family.wiring, layer in self.architecture.moe_layers
        others = tuple(f"{name}." for name in (wiring.attention, wiring.shared if moe else wiring.mlp) if name)
        names = self.family.wiring.parameters(self.architecture, layer)
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names if not name.startswith(others)))

    def mlp(self, layer: int, name: str, states: Sequence[State], normed: Sequence[Tensor]) -> list[Tensor]:
        """The dense or shared MLP of that name on each of `normed`."""
        out = list(normed)
        for block, members in self.blocks(layer, (name,), states, ("dense", "shared")):
            module = block.get_submodule(name)
            for i in members:
                with self.watched(block, layer, states[i]):
                    out[i] = self.in_spans(module, normed[i], self.widening(module))
        return out

    def moe(
        self, layer: int, states: Sequence[State], normed: Sequence[Tensor], hidden: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """Of each state what the routed experts give, times the family's factor, and what the shared one does, if any.

        `hidden` is for observers: the residual stream that is about to gain all that.
        """
        router, (unit,), shares = self.router(layer), self.units(layer, ("experts",)), []
        for state, x_TD in zip(states, normed):
            routing = route(router, x_TD, state.dropped.get(layer, ()))
            if state.observer is not None:
                state.observer.route(routing)
            shares.append(Share.of(x_TD, routing, state.observer, state.changed.get(unit), state.rounded.get(unit)))
        run_experts(
            shares,
            lambda expert: self.read_expert(layer, expert),
            self.decode_expert,
            lambda gate, up: self.family.arithmetic.activate(self.text, gate, up),
            self.block_bytes,
        )
        scale, name = self.family.arithmetic.routed_scale(self.text), self.family.wiring.shared
        shared = self.mlp(layer, name, states, normed) if name else []
        given = [[share.routed_TD.mul_(scale), *shared[i : i + 1]] for i, share in enumerate(shares)]
        for share, h_TD, (routed_TD, *more) in zip(shares, hidden, given):
            if share.observer is not None:
                share.observer.block(BlockPass(layer, h_TD, share.x_TD, routed_TD, more[0] if more else None))
        return given

    def in_spans(self, module: nn.Module, x_TD: Tensor, widening: int) -> Tensor:
        """`module` on each token, a span at a time; it needs `widening` times the memory of its input."""
        out_TD = torch.empty_like(x_TD)
        for span in spans(len(x_TD), widening * x_TD.shape[1] * x_TD.itemsize, self.block_bytes):
            out_TD[span] = module(x_TD[span])
        return out_TD

    @contextmanager
    def watched(self, block: nn.Module, layer: int, state: State) -> Iterator[None]:
        """While it lasts, what goes into the matrices of `block` is rounded as `state` says, and its observer sees it."""
        hooks, observer = [], state.observer
        watching = observer is not None and observer.linear is not ignore
        if watching or state.rounded:
            for name, tensors in self.family.wiring.parameters(self.architecture, layer).items():
                found = [self.architecture.by_name.get(tensor.removesuffix(".weight")) for tensor in tensors]
                linears = tuple(linear for linear in found if linear is not None)
                module = block.get_submodule(name.rsplit(".", 1)[0])
                if not linears or next(module.parameters()).is_meta:
                    continue
                if (rounded := state.rounded.get(linears[0].unit)) is not None:
                    hooks.append(module.register_forward_pre_hook(partial(take_in, rounded, linears[0].projection)))
                if watching and observer is not None:
                    hooks.append(module.register_forward_pre_hook(partial(see_inputs, linears, observer.linear)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def widening(self, mlp: nn.Module) -> int:
        width = sum(p.shape[0] for p in mlp.parameters())
        return INNER_COPIES * width // self.architecture.hidden

    # Weights, from disk to the device.

    def units(self, layer: int, roles: Sequence[str]) -> list[str]:
        found = self.architecture.units.items()
        return [unit for unit, members in found if members[0].layer == layer and members[0].role in roles]

    def blocks(
        self, layer: int, modules: Sequence[str], states: Sequence[State], roles: Sequence[str]
    ) -> Iterator[tuple[Any, list[int]]]:
        """`block` for all states that change the units of `roles` alike, one block after another, and which they are."""
        units, alike = self.units(layer, roles), dict[tuple[Change | None, ...], list[int]]()
        for i, state in enumerate(states):
            alike.setdefault(tuple(state.changed.get(unit) for unit in units), []).append(i)
        for changes, members in alike.items():
            yield self.block(layer, modules, {u: c for u, c in zip(units, changes) if c is not None}), members

    def block(self, layer: int, modules: Sequence[str], changed: Mapping[str, Change] | None = None) -> Any:
        """transformers' decoder layer in which `modules` are filled and all others have no memory.

        Raises `FamilyError` when one of them is left without values: the family's `parameters` is wrong.
        """
        with torch.device("meta"):
            block = getattr(self.modeling, self.family.wiring.layer_class)(self.config, layer).eval()
        within = tuple(f"{module}." for module in modules)
        names = self.family.wiring.parameters(self.architecture, layer)
        values: dict[str, Tensor] = {}
        for unit, change in (changed or {}).items():
            linears = self.architecture.units[unit]
            w = change(linears, [self.checkpoint.decode(n.name, self.device) for n in linears])
            values |= {f"{n.name}.weight": w_OI.to(self.dtype) for n, w_OI in zip(linears, w)}
        filled = {name: self.parameter(disk, values) for name, disk in names.items() if name.startswith(within)}
        unknown = block.load_state_dict(filled, strict=False, assign=True).unexpected_keys
        empty = [name for name, p in block.named_parameters() if p.is_meta and name.startswith(within)]
        if unknown or empty:
            raise FamilyError(
                f"layer {layer} of {self.family.name} has no module for {unknown} and no values for {empty}; "
                f"families/{self.family.name}.py names its parameters wrongly for this transformers"
            )
        return block

    def parameter(self, names: Sequence[str], values: Mapping[str, Tensor]) -> Tensor:
        """Matrices or vectors, of `values` or else from disk, stacked by rows, in the run's dtype."""
        if len(names) == 1:
            return self.weight(names[0], values)
        sizes = [self.architecture.by_name[name.removesuffix(".weight")].shape for name in names]
        stacked = torch.empty(sum(o for o, _ in sizes), sizes[0][1], dtype=self.dtype, device=self.device)
        start = 0
        for name, (o, _) in zip(names, sizes):
            stacked[start : start + o] = self.weight(name, values)
            start += o
        return stacked

    def weight(self, name: str, values: Mapping[str, Tensor] | None = None) -> Tensor:
        if values and name in values:
            return values[name]
        return self.checkpoint.decode(name, self.device).to(self.dtype)

    def router(self, layer: int) -> LayerRouter:
        facts = self.architecture.routers[layer]
        weight_ED, correction_E, bias_E = (
            self.checkpoint.read(name).to(self.device).float() if name else None
            for name in (facts.weight, facts.correction, facts.bias)
        )
        assert weight_ED is not None
        return LayerRouter(layer, facts, weight_ED, correction_E, bias_E, self.architecture.top_k)

    def read_expert(self, layer: int, expert: int) -> StoredExpert:
        linears = self.architecture.experts_of[layer, expert]
        return {p: (linears[p], self.checkpoint.parts(linears[p])) for p in ("gate", "up", "down")}

    def decode_expert(self, stored: StoredExpert, change: Change | None) -> ExpertWeights:
        values = [self.checkpoint.value(linear, parts, self.device) for linear, parts in stored.values()]
        changed = change([linear for linear, _ in stored.values()], values) if change else values
        biases = {p: self.bias(linear).to(self.dtype) for p, (linear, _) in stored.items() if linear.bias}
        return ExpertWeights(**{p: w_OI.to(self.dtype) for p, w_OI in zip(stored, changed)}, biases=biases)

    def bias(self, linear: Linear) -> Tensor:
        """An expert's own [O], in F32."""
        assert linear.expert is not None
        row = self.checkpoint.rows(linear.bias, linear.expert, linear.expert + 1)[0].to(self.device).float()
        stack = linear.stack if linear.stack and len(row) == linear.stack.rows else None
        return row[stack.first :: stack.step][: linear.shape[0]] if stack else row

    def norm(self) -> nn.Module:
        weight_D = self.weight(self.architecture.norm)
        norm = getattr(self.modeling, self.family.wiring.norm_class)(len(weight_D), eps=self.config.rms_norm_eps)
        norm.load_state_dict({"weight": weight_D}, assign=True)
        return norm

    def vocabulary_spans(self) -> Iterator[slice]:
        return spans(self.architecture.vocab, 8 * self.architecture.hidden, self.block_bytes // 4)

    def rows(self, name: str, span: slice) -> Tensor:
        """Rows of the embedding or the head."""
        return self.checkpoint.rows(name, span.start, span.stop).to(self.device, self.dtype)


def text_config(where: str, config: Mapping[str, Any], attention: str) -> Any:
    """transformers' config of the language model. What it says of quantization is left out: values come decoded."""
    module, name = where.split(":")
    whole = copy.deepcopy({key: value for key, value in config.items() if key != "quantization_config"})
    kind = getattr(importlib.import_module(module), name)
    with building(name):
        text = kind.from_dict(whole).get_text_config()
    text._attn_implementation = attention
    return text


@contextmanager
def building(what: str) -> Iterator[None]:
    """Say in one sentence that transformers will not make `what` of a config.json: it raises whatever came up."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise FamilyError(
            f"config.json holds a value of which transformers makes no {what} ({type(error).__name__}: {why}); "
            "fetch config.json again"
        ) from error
