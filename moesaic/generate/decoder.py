"""`Decoder`: one sweep of the layers over new tokens of many sequences, whose older tokens lie in their caches.

Weights come from a `LayerRun` and stay as far as memory goes (resident.py). Routing, experts and norms are
the stream's own, attention is transformers' module on our rows of keys. Leaves out what to do with the
outcome: choosing tokens is sampling.py, and which sequences go on is batch.py.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..resources import Resources
from ..stream import Change, LayerRun
from ..stream.attention import ROW_COPIES, SCORE_COPIES, head_width
from ..stream.experts import ExpertWeights, Share, pass_expert
from ..stream.layer import StoredExpert
from ..stream.memory import ahead
from ..stream.router import route
from .attention import RAGGED
from .cache import Cache, Rows
from .resident import Resident


@dataclass(frozen=True)
class Feed:
    """New tokens of one sequence, to follow those in its cache."""

    cache: Cache
    tokens: Sequence[int]


class Decoder:
    """One checkpoint, as a model that goes on where its caches end. Owns the weights that it keeps in memory.

    memory_bytes   of weights between steps, default: half of what is available; what does not fit is read again, each
                   time it is needed. Experts stay decoded: at real dimensions to decode one took ten times as long
                   as to multiply it by a token, and five times as long as to read it
    dropped        MoE layer -> experts that cannot be selected, as in `stream.State`
    changed        unit -> what becomes of its matrices, as in `stream.State`
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory_bytes: int | None = None,
        *,
        device: torch.device | str | None = None,
        dropped: Mapping[int, Sequence[int]] | None = None,
        changed: Mapping[str, Change] | None = None,
    ) -> None:
        self.run = LayerRun(checkpoint, device, attention=RAGGED)
        self.architecture = self.run.architecture
        self.dropped, self.changed = dropped or {}, changed or {}
        self.resident = Resident(Resources().held_bytes(self.run.device) if memory_bytes is None else memory_bytes)

    def most_queries(self, length: int) -> int:
        """New tokens of a sequence whose attention over `length` keys fits the buffer; one at least."""
        config = self.run.config
        query_bytes = 4 * config.num_attention_heads * (SCORE_COPIES * length + ROW_COPIES * head_width(config))
        return max(1, self.run.block_bytes // query_bytes)

    @torch.no_grad()
    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Advance every sequence by its tokens: of each the last layer's hidden states [n, D], for `logits`.

        The caches hold the new tokens afterwards; should anything be raised, they hold none of them.
        """
        ones = [feed for feed in feeds if len(feed.tokens) == 1]
        parts = [ones] * bool(ones) + [[feed] for feed in feeds if len(feed.tokens) > 1]
        hidden_TD = self.embed([token for part in parts for feed in part for token in feed.tokens])
        for layer in range(self.architecture.layers):
            self.advance(layer, parts, hidden_TD)
        for feed in feeds:
            feed.cache.length += len(feed.tokens)
        order = [id(feed) for part in parts for feed in part]
        pieces = hidden_TD.split([len(feed.tokens) for part in parts for feed in part])
        found = dict(zip(order, pieces))
        return [found[id(feed)] for feed in feeds]

    def advance(self, layer: int, parts: Sequence[Sequence[Feed]], hidden_TD: Tensor) -> None:
        """One layer, in place. The rows of a part have equally many tokens and are attended to in one call."""
        sizes = [len(part) * len(part[0].tokens) for part in parts]
        views = [h_TD.view(len(part), -1, h_TD.shape[1]) for part, h_TD in zip(parts, hidden_TD.split(sizes))]
        block, split = self.block(layer), self.run.family.wiring.split
        if not split:
            self.advance_whole(layer, block, parts, views)
            return
        norm, attention = block.get_submodule(split.before_attention), self.run.skeleton(block).attention
        for part, x_BnD in zip(parts, views):
            x_BnD += self.attended(attention, layer, part, norm(x_BnD))
        x_TD = block.get_submodule(split.before_mlp)(hidden_TD)
        out_TD, *more = self.mlp(layer, block, x_TD)
        for shared_TD in more:
            out_TD += shared_TD
        hidden_TD += out_TD

    def advance_whole(self, layer: int, block: Any, parts: Sequence[Sequence[Feed]], views: Sequence[Tensor]) -> None:
        """By the layer's own forward; see `stream.skeleton`."""
        run = self.run
        skeleton = replace(run.skeleton(block), block_bytes=sys.maxsize)  # a part is one call
        real = skeleton.attention.forward
        attended = [
            skeleton.attended(x_BnD, partial(self.attended, real, layer, part)) for part, x_BnD in zip(parts, views)
        ]
        entered = [skeleton.entering(x_BnD, a_BnD)[0] for x_BnD, a_BnD in zip(views, attended)]
        given = [out_TD.split([len(x_TD) for x_TD in entered]) for out_TD in self.mlp(layer, block, torch.cat(entered))]
        for x_BnD, a_BnD, *out in zip(views, attended, *given):
            known = run.in_block(*out) if layer in self.architecture.moe_layers else {run.family.wiring.mlp: out[0]}
            x_BnD.copy_(skeleton.leaving(x_BnD, a_BnD, known)[1])

    def attended(self, attention: Callable[..., Any], layer: int, part: Sequence[Feed], x_BnD: Tensor) -> Tensor:
        """Attention over the keys in the caches of `part` and those of its new tokens."""
        if self.run.family.wiring.latent and len(part) > 1:  # the module makes keys of one row's cache at a time
            rows = [self.attended(attention, layer, [feed], x_BnD[i : i + 1]) for i, feed in enumerate(part)]
            return torch.cat(rows)
        first_B = torch.tensor([feed.cache.length for feed in part], device=x_BnD.device)
        positions_Bn = first_B[:, None] + torch.arange(x_BnD.shape[1], device=x_BnD.device)
        attended_BnD: Tensor = attention(
            hidden_states=x_BnD,
            position_embeddings=self.run.rotary(x_BnD, positions_Bn),
            attention_mask=None,
            position_ids=positions_Bn,
            past_key_values=Rows([feed.cache for feed in part], layer),
        )[0]
        return attended_BnD

    def mlp(self, layer: int, block: Any, x_TD: Tensor) -> list[Tensor]:
        """What a dense layer's MLP gives, or what `moe` does."""
        if layer in self.architecture.moe_layers:
            return self.moe(layer, block, x_TD)
        return [self.run.skeleton(block).mlp(x_TD)]

    def moe(self, layer: int, block: Any, x_TD: Tensor) -> list[Tensor]:
        """What the routed experts give, times the family's factor, and what the shared one does, if any."""
        run = self.run
        router = self.resident.pin(("router", layer), lambda: run.router(layer), lambda r: total(*r.tensors))
        routing = route(router, x_TD, self.dropped.get(layer, ()))
        (unit,) = run.units(layer, ("experts",))
        change = self.changed.get(unit)
        share = Share.of(x_TD, routing, None, change)
        activate, read = partial(run.family.arithmetic.activate, run.text), partial(self.read_expert, layer)
        selected = routing.experts_Tk.unique().tolist()
        here = all(self.resident.get((layer, expert)) is not None for expert in selected)
        for expert, found in (
            ((e, read(e)) for e in selected) if here else ahead(read, selected)
        ):  # no thread for nothing
            pass_expert(share, expert, self.decode_expert(found, change), activate, run.block_bytes)
        routed_TD, shared = share.routed_TD.mul_(run.family.arithmetic.routed_scale(run.text)), run.family.wiring.shared
        return [routed_TD, block.get_submodule(shared)(x_TD)] if shared else [routed_TD]

    # Weights, from memory or from disk.

    def read_expert(self, layer: int, expert: int) -> tuple[tuple[int, int], StoredExpert | ExpertWeights]:
        """Called ahead of need by another thread: only reads."""
        key = (layer, expert)
        found = self.resident.get(key)
        return key, self.run.read_expert(layer, expert) if found is None else found

    def decode_expert(
        self, read: tuple[tuple[int, int], StoredExpert | ExpertWeights], change: Change | None
    ) -> ExpertWeights:
        key, found = read
        weights = found if isinstance(found, ExpertWeights) else self.run.decode_expert(found, change)
        self.resident.keep(key, weights, total(weights.gate, weights.up, weights.down))
        return weights

    def block(self, layer: int) -> Any:
        """transformers' decoder layer with all but its router and routed experts."""
        wiring = self.run.family.wiring
        mlp = wiring.shared if layer in self.architecture.moe_layers else wiring.mlp
        names = (*self.run.besides(layer), wiring.attention, *([mlp] * bool(mlp)))
        units = self.run.units(layer, ("qkv", "o", "dense", "shared"))
        changed = {unit: self.changed[unit] for unit in units if unit in self.changed}
        return self.resident.pin(("block", layer), lambda: self.run.block(layer, names, changed), module_bytes)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """[T, D]. Reads the rows of these tokens and no others. Raises `InputError` for an id outside the vocabulary."""
        run, name = self.run, self.architecture.embedding
        self.check(tokens)
        rows = {token: run.checkpoint.rows(name, token, token + 1)[0] for token in set(tokens)}
        return torch.stack([rows[token] for token in tokens]).to(run.device, run.dtype)

    def check(self, tokens: Sequence[int]) -> None:
        """Raises `InputError` for an id outside the vocabulary."""
        if wrong := [token for token in tokens if not 0 <= token < self.architecture.vocab]:
            raise InputError(
                f"token {wrong[0]} is not among the {self.architecture.vocab:,} of this model; "
                "tokenize with the model's own tokenizer"
            )

    @torch.no_grad()
    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Final norm and head: [n, V] in F32. See `LayerRun.logit_spans` for how many at a time."""
        run = self.run
        x_nD = self.resident.pin("norm", run.norm, module_bytes)(hidden_nD)
        logits_nV = torch.empty(len(x_nD), self.architecture.vocab, device=run.device)
        for span in run.vocabulary_spans():
            make = partial(run.rows, self.architecture.head, span)
            rows_vD = self.resident.pin(("head", span.start), make, total)
            logits_nV[:, span] = F.linear(x_nD, rows_vD)
        return logits_nV


def total(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def module_bytes(module: nn.Module) -> int:
    return total(*(p for p in module.parameters() if not p.is_meta))
