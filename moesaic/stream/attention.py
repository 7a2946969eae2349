"""The attention half of a decoder layer, by transformers' own modules, fed in rows and chunks of queries.

Leaves out padding: rows of one state are equally long, and rows of another length are another state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .memory import spans

SCORE_COPIES = 3  # F32 tensors of [heads, queries, keys] that block-sparse selection makes on the way to its mask
ROW_COPIES = 8  # F32 tensors of [heads, queries, head_dim]: q, k, v, their norms and rotations


def attend(
    attention: Callable[..., Any], x_BTD: Tensor, rotary: nn.Module, config: Any, block_bytes: int,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """attention(x) [B, T, D]; with `norm`, x + attention(norm(x)).

    A mask of [heads, queries, keys] may exist only for what `block_bytes` holds: whole rows if they
    fit, else one row in chunks of queries through transformers' cache, which is the same sum in
    another order. Beside the buffer a chunk needs the keys and values of its row, once as cached and
    once repeated for every query head: 8 · heads · T · head_dim bytes in F32.
    """
    rows, length, _ = x_BTD.shape
    heads = config.num_attention_heads
    query_bytes = 4 * heads * (SCORE_COPIES * length + ROW_COPIES * head_width(config))
    out_BTD = torch.empty_like(x_BTD)
    for row in spans(rows, query_bytes * length, block_bytes // 4):  # more at a time are slower on a CPU
        chunks = list(spans(length, query_bytes * (row.stop - row.start), block_bytes))
        cache = DynamicCache(config=config) if len(chunks) > 1 else None
        for chunk in chunks:
            x_BQD = x_BTD[row, chunk]
            positions_1Q = torch.arange(chunk.start, chunk.stop, device=x_BQD.device)[None]
            attended_BQD, _ = attention(
                hidden_states=x_BQD if norm is None else norm(x_BQD),
                position_embeddings=rotary(x_BQD, positions_1Q),
                attention_mask=causal(positions_1Q) if chunk.start else None,
                position_ids=positions_1Q,
                past_key_values=cache,
            )
            if norm is None:
                out_BTD[row, chunk] = attended_BQD
            else:
                torch.add(x_BQD, attended_BQD, out=out_BTD[row, chunk])
    return out_BTD


def head_width(config: Any) -> int:
    """Of a query, where transformers' config says so; else heads share the model's width.

    Of latent attention `head_dim` is only the part that is rotated.
    """
    width: int = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or 0
    width = width or config.hidden_size // config.num_attention_heads
    return width


def causal(positions_1Q: Tensor) -> Tensor:
    """True [1, 1, Q, K] where a key is not in the query's future.

    Only a first chunk goes without: there transformers' shortcut for "no mask" means the same.
    """
    keys_K = torch.arange(int(positions_1Q[0, -1]) + 1, device=positions_1Q.device)
    return (keys_K <= positions_1Q[0, :, None])[None, None]
