"""One sweep over the layers, and from it everything that any criterion needs, one small file a layer.

Interrupted, it goes on at the layer it had reached; text added later is a folder beside the first.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..artifact import read_tensors, sweep_partials, write_tensors
from ..checkpoint import Checkpoint
from ..errors import InputError
from ..families import Architecture
from ..progress import progress
from ..stream import LayerRun, State
from ..tokens import IMAGE, IMAGE_TOKENS, TokenSet
from .statistics import KIND, TEXT, Statistics, layer_file
from .sums import LayerSums
from .weights import WEIGHTS, weigh

CHUNK_TOKENS = 65_536  # hidden states of more need not fit anywhere: 1.6 GB for 6,144 wide
SAVE_SECONDS = 300.0  # a killed sweep loses at most this much, and a layer


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
    architecture = checkpoint.architecture
    inputs = {"source": checkpoint.identity, "tokens": tokens.identity}
    group_T, positions = groups(tokens, architecture.vocab)
    sweep_partials(chunk)
    start, hidden = resume(chunk, architecture, inputs)
    if start < architecture.layers:
        run = LayerRun(checkpoint)
        reached = start - 1, State(embed(run, tokens.ids_BT, seen) if hidden is None else hidden.to(run.device))
        left, saved = architecture.layers - start, time.monotonic()
        with progress("calibrate", left * tokens.tokens, "token-layers", quiet) as meter:
            try:
                for layer in range(start, architecture.layers):
                    after = observe(run, layer, reached[1], group_T.to(run.device), tokens, positions, chunk, inputs)
                    reached = layer, after  # one assignment: an interrupt finds a layer and its own states
                    meter.advance(tokens.tokens)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        save_hidden(chunk, reached, inputs)
                        saved = time.monotonic()
            except KeyboardInterrupt:
                if reached[0] >= start:
                    save_hidden(chunk, reached, inputs)
                raise
    if not (chunk / TEXT).exists():
        tokens.save(chunk / TEXT)
    (chunk / "hidden.safetensors").unlink(missing_ok=True)


def observe(
    run: LayerRun, layer: int, state: State, group_T: Tensor, tokens: TokenSet,
    positions: list[list[int]], chunk: Path, inputs: dict[str, str],
) -> State:  # fmt: skip
    """One layer forward; a MoE layer's sums are written to its file."""
    a = run.architecture
    if layer not in a.moe_layers:
        return run.advance(layer, [state])[0]
    sums = LayerSums(group_T, 2 * len(tokens.domains), a.experts)
    (after,) = run.advance(layer, [State(state.hidden_BTD, state.dropped, sums.observer, state.nonfinite)])
    routed = int((sums.sums["tokens"] + sums.sums["nonfinite"]).sum())
    if routed != tokens.tokens * a.top_k:
        raise InputError(
            f"layer {layer} routed {routed:,} tokens, wanted {tokens.tokens * a.top_k:,}; report this as a bug"
        )
    body = {
        "domains": tokens.domains,
        "positions": positions,
        "routed": routed,
        "nonfinite_tokens": after.nonfinite.get(layer, 0),
    }
    write_tensors(layer_file(chunk, layer), KIND, sums.tensors(), inputs, body)
    return State(after.hidden_BTD, after.dropped, None, after.nonfinite)


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


def resume(chunk: Path, architecture: Architecture, inputs: dict[str, str]) -> tuple[int, Tensor | None]:
    """The first layer still to do, and the hidden states before it (None: from the embedding)."""
    missing = [layer for layer in architecture.moe_layers if not layer_file(chunk, layer).exists()]
    if not missing:
        return architecture.layers, None
    if (chunk / "hidden.safetensors").exists():
        tensors, body = read_tensors(chunk / "hidden.safetensors", "hidden", inputs)
        if body["layer"] < missing[0]:
            return body["layer"] + 1, tensors["hidden_BTD"]
    return 0, None


def save_hidden(chunk: Path, reached: tuple[int, State], inputs: dict[str, str]) -> None:
    layer, state = reached
    tensors = {"hidden_BTD": state.hidden_BTD.cpu()}
    write_tensors(chunk / "hidden.safetensors", "hidden", tensors, inputs, {"layer": layer})
