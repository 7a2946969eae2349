"""`Decoder`: one sweep of the layers over new tokens of many sequences, whose older tokens lie in their caches.

Weights come from a `LayerRun` and stay as far as memory goes (resident.py). Routing, experts and norms are
the stream's own, attention is transformers' module on our rows of keys. Leaves out what to do with the
outcome: choosing tokens is sampling.py, and which sequences go on is batch.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..resources import Resources
from ..stream import Change, LayerRun
from ..stream.attention import ROW_COPIES, SCORE_COPIES
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
        query_bytes = 4 * config.num_attention_heads * (SCORE_COPIES * length + ROW_COPIES * config.head_dim)
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
        block, start = self.block(layer), 0
        for part in parts:
            count = len(part[0].tokens)
            x_BnD = hidden_TD[start : start + len(part) * count].view(len(part), count, -1)
            first_B = torch.tensor([feed.cache.length for feed in part], device=hidden_TD.device)
            positions_Bn = first_B[:, None] + torch.arange(count, device=hidden_TD.device)
            attended_BnD, _ = block.self_attn(
                hidden_states=block.input_layernorm(x_BnD),
                position_embeddings=self.run.rotary(x_BnD, positions_Bn),
                attention_mask=None,
                position_ids=positions_Bn,
                past_key_values=Rows([feed.cache for feed in part], layer),
            )
            x_BnD += attended_BnD
            start += len(part) * count
        x_TD = block.post_attention_layernorm(hidden_TD)
        hidden_TD += self.moe(layer, block, x_TD) if layer in self.architecture.moe_layers else block.mlp(x_TD)

    def moe(self, layer: int, block: Any, x_TD: Tensor) -> Tensor:
        """Routed experts, times the family's factor, and the shared one."""
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
        out_TD = share.routed_TD.mul_(run.family.arithmetic.routed_scale(run.text))
        if run.family.wiring.shared:
            out_TD += block.get_submodule(run.family.wiring.shared)(x_TD)
        return out_TD

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
        mlp = self.run.family.wiring.shared if layer in self.architecture.moe_layers else "mlp"
        names = ("input_layernorm", "self_attn", "post_attention_layernorm", *([mlp] * bool(mlp)))
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
                f"token {wrong[0]} is none of the {self.architecture.vocab:,} that this model has; "
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
