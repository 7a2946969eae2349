"""Attention over rows that each have keys of their own length, under a name that transformers' modules call it by.

The modules still project, norm and rotate, and M3's indexer still chooses its blocks of keys; here each row
of queries meets its keys. A single query reads the blocks that were chosen for it and no others. Leaves
out dropout, and any training.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RAGGED = "moesaic_ragged"


def ragged(
    module: Any,
    query_BHnW: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    attention_mask: None,
    scaling: float,
    position_ids: Tensor,
    block_indices: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Rows of queries [B, H, n, W] on their own keys and values [G, length, W] each: [B, n, H, W of the values].

    The queries are the last n positions of their row, which `position_ids` [B, n] holds too.
    `block_indices` [B, G, n, k] are an indexer's blocks of keys, -1 for none.
    """
    rows = []
    for b, q_HnW in enumerate(query_BHnW):
        blocks_Gnk = None if block_indices is None else block_indices[b]
        if q_HnW.shape[1] == 1:
            rows.append(one_query(module, q_HnW, keys[b], values[b], scaling, blocks_Gnk))
        else:
            rows.append(
                queries(
                    module=module,
                    q_HnW=q_HnW,
                    k_GLW=keys[b],
                    v_GLW=values[b],
                    scaling=scaling,
                    blocks_Gnk=blocks_Gnk,
                    positions_1n=position_ids[b : b + 1],
                )
            )
    return torch.stack(rows).transpose(1, 2), None


def one_query(
    module: Any, q_H1W: Tensor, k_GLW: Tensor, v_GLW: Tensor, scaling: float, blocks_G1k: Tensor | None
) -> Tensor:
    """The last position on all keys or on its blocks of them; heads of a group are as queries of one head."""
    (groups, length, width), mask_G1K = k_GLW.shape, None
    if blocks_G1k is not None and blocks_G1k.shape[2] * module.indexer.block_size < length:
        size = module.indexer.block_size
        places_GK = (blocks_G1k[:, 0, :, None] * size + torch.arange(size, device=q_H1W.device)).flatten(1)
        mask_G1K = ((places_GK >= 0) & (places_GK < length))[:, None]
        index_GKW = places_GK.clamp(0, length - 1)[..., None].expand(-1, -1, width)
        k_GLW, v_GLW = k_GLW.gather(1, index_GKW), v_GLW.gather(1, index_GKW)
    q_GqW = q_H1W.reshape(groups, -1, width)
    return F.scaled_dot_product_attention(q_GqW, k_GLW, v_GLW, mask_G1K, scale=scaling).reshape(len(q_H1W), 1, -1)


def queries(
    module: Any,
    q_HnW: Tensor,
    k_GLW: Tensor,
    v_GLW: Tensor,
    scaling: float,
    blocks_Gnk: Tensor | None,
    positions_1n: Tensor,
) -> Tensor:
    """Several positions, each on the keys up to its own; where blocks were chosen, on those."""
    length = k_GLW.shape[1]
    if blocks_Gnk is not None:
        mask = module.indexer.build_block_mask(blocks_Gnk[None], None, length, q_HnW.dtype, q_HnW.device, positions_1n)[
            0
        ]
    else:
        mask = torch.arange(length, device=q_HnW.device) <= positions_1n[0, :, None]
    return F.scaled_dot_product_attention(q_HnW[None], k_GLW[None], v_GLW[None], mask, scale=scaling, enable_gqa=True)[
        0
    ]


ALL_ATTENTION_FUNCTIONS.register(RAGGED, ragged)  # the library's own way to name an attention function
