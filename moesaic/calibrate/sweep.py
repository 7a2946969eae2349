"""One sweep over the layers, and from it everything that any criterion needs, one small file a layer.

Interrupted, it goes on at the layer it had reached; text added later is a folder beside the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..artifact import sweep_partials, write_tensors
from ..checkpoint import Checkpoint
from ..data.tokens import IMAGE, IMAGE_TOKENS, TokenSet
from ..errors import FaultError
from ..progress import progress
from ..stream import STATES, LayerRun, Standing, State, Sweep
from ..stream.state import ignore
from .statistics import KIND, TEXT, VERSION, Statistics, layer_file
from .sums import LayerSums
from .weights import WEIGHTS, weigh

CHUNK_TOKENS = 65_536  # hidden states of more need not fit anywhere: 1.6 GB for 6,144 wide


def calibrate(
    checkpoint: Checkpoint, tokens: TokenSet, folder: Path, quiet: bool = False, weights: bool = False,
    seen: Mapping[int, Tensor] | None = None,
) -> Statistics:  # fmt: skip
    """Sweep `tokens` through the model, store each MoE layer's statistics under `folder`, and return them.

    With `weights`, experts are weighed too (see `weigh`), for criteria that ask for it. `seen` is what stands for
    ids beyond the vocabulary: first id of an image -> [n, D]. Interrupted, the same
    call goes on at the layer it had reached; done before, it only reads. What other texts left in `folder`
    stays apart: `Statistics.load` sums them all. More than `CHUNK_TOKENS` are several sweeps. Memory: that of
    `LayerRun` on so many, and two F64 numbers a token and selected expert. Raises `InputError` when the
    tokens routed in a layer are not `top_k` a token.
    """
    parts = chunks(tokens)
    for part in parts:
        sweep(checkpoint, part, folder / part.identity, quiet, seen or {})
    found = Statistics.of([folder / part.identity for part in parts], checkpoint)
    return replace(found, weights=weigh(checkpoint, folder.parent / WEIGHTS, quiet)) if weights else found


def chunks(tokens: TokenSet) -> list[TokenSet]:
    """Rows dealt out to as few sets of at most `CHUNK_TOKENS` as there have to be, each of all domains."""
    parts = min(tokens.rows, -(-tokens.tokens // CHUNK_TOKENS))
    return [tokens] if parts == 1 else [tokens.take(range(i, tokens.rows, parts)) for i in range(parts)]


def sweep(checkpoint: Checkpoint, tokens: TokenSet, chunk: Path, quiet: bool, seen: Mapping[int, Tensor]) -> None:
    """One text through all layers; its statistics and its tokens stand in `chunk` afterwards."""
    a, states = checkpoint.architecture, chunk / STATES
    sweep_partials(chunk)
    missing = [layer for layer in a.moe_layers if not layer_file(chunk, layer).exists()]
    if missing:
        text = Text.of(LayerRun(checkpoint), tokens, chunk)
        under_way = Sweep(range(a.layers), states, text.inputs, text.run.device)
        if under_way.done > missing[0]:  # its file is lost
            states.unlink()
        left = a.layers - under_way.done
        with progress("calibrate", left * tokens.tokens, "token-layers", quiet) as meter:
            begin = partial(embedded, text.run, tokens, seen)
            under_way.through(begin, partial(observe, text), ignore, lambda _: meter.advance(tokens.tokens))
    if not (chunk / TEXT).exists():
        tokens.save(chunk / TEXT)
    states.unlink(missing_ok=True)


@dataclass(frozen=True)
class Text:
    """What a layer's statistics are made of, beside the states: all of it plain, or opened again from what is."""

    run: LayerRun
    tokens: TokenSet
    group_T: Tensor
    positions: list[list[int]]
    chunk: Path
    inputs: Mapping[str, str]

    @staticmethod
    def of(run: LayerRun, tokens: TokenSet, chunk: Path) -> "Text":
        group_T, positions = groups(tokens, run.architecture.vocab)
        inputs = {"source": run.checkpoint.identity, "tokens": tokens.identity, "statistics": VERSION}
        return Text(run, tokens, group_T.to(run.device), positions, chunk, inputs)


def observe(text: Text, layer: int, at: Standing) -> Standing:
    """One layer forward; a MoE layer's sums are written to its file."""
    a, state = text.run.architecture, at.states["text"]
    if layer not in a.moe_layers:
        return replace(at, states={"text": text.run.advance(layer, [state])[0]})
    sums = LayerSums(text.group_T, 2 * len(text.tokens.domains), a.experts)
    (after,) = text.run.advance(layer, [replace(state, observer=sums.observer)])
    routed = int((sums.sums["tokens"] + sums.sums["nonfinite"]).sum())
    if routed != text.tokens.tokens * a.top_k:
        raise FaultError(f"layer {layer} routed {routed:,} tokens, wanted {text.tokens.tokens * a.top_k:,}")
    body = {
        "domains": text.tokens.domains,
        "positions": text.positions,
        "routed": routed,
        "nonfinite_tokens": after.nonfinite.get(layer, 0),
    }
    write_tensors(layer_file(text.chunk, layer), KIND, sums.tensors(), text.inputs, body)
    return replace(at, states={"text": replace(after, observer=None)})


def embedded(run: LayerRun, tokens: TokenSet, seen: Mapping[int, Tensor]) -> Standing:
    return Standing({"text": State(embed(run, tokens.ids_BT, seen))})


def embed(run: LayerRun, ids_BT: Tensor, seen: Mapping[int, Tensor]) -> Tensor:
    """Hidden states [B, T, D] before the first layer: of words as the model embeds them, of images as they are seen."""
    image_BT = ids_BT >= run.architecture.vocab
    hidden_BTD = run.embed(ids_BT.masked_fill(image_BT, 0))
    ids_N = ids_BT[image_BT]
    rows = [(int(id) - run.architecture.vocab) % IMAGE_TOKENS for id in ids_N]
    if rows:
        parts = [seen[int(id) - row][row] for id, row in zip(ids_N, rows)]
        hidden_BTD[image_BT.to(run.device)] = torch.stack(parts).to(run.device, run.dtype)
    return hidden_BTD


def groups(tokens: TokenSet, vocab: int) -> tuple[Tensor, list[list[int]]]:
    """Group of every token (domain × 2 + half; rows of a domain alternate), and tokens by domain and half.

    Tokens beyond the vocabulary are an image's, and of that domain.
    """
    rows, length = tokens.ids_BT.shape
    half_B = torch.zeros(rows, dtype=torch.int64)
    for domain in range(len(tokens.domains)):
        mine = tokens.domain_B == domain
        half_B[mine] = torch.arange(int(mine.sum())) % 2
    domain_T, half_T = (x.repeat_interleave(length) for x in (tokens.domain_B, half_B))
    image_T = tokens.ids_BT.flatten() >= vocab
    if image_T.any():
        domain_T = domain_T.masked_fill(image_T, tokens.domains.index(IMAGE))
    group_T = domain_T * 2 + half_T
    return group_T, group_T.bincount(minlength=2 * len(tokens.domains)).reshape(-1, 2).tolist()
