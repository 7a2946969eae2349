"""Keys and values of sequences that are being written, layer by layer; of M3 the indexer's keys too.

A sequence has a cache of its own length. `Rows` shows several of them to transformers' attention where
it expects one of its own caches. Leaves out pages shared between sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEP_TOKENS = 256  # a cache grows by its half, and by no fewer tokens than these


class Cache:
    """What one sequence keeps: of each layer [heads, tokens, width] twice, and one key a token for an indexer."""

    def __init__(self) -> None:
        self.length = 0  # tokens that every layer holds
        self.held: dict[tuple[int, str], Tensor] = {}  # (layer, "keys" | "values" | "index") -> [H, capacity, W]

    def write(self, layer: int, what: str, x_HnW: Tensor) -> Tensor:
        """Put `x_HnW` after the tokens that every layer holds, and return them and it: a view [H, length + n, W]."""
        end = self.length + x_HnW.shape[1]
        held = self.held.get((layer, what))
        if held is None or held.shape[1] < end:
            capacity = max(end, self.length + self.length // 2, self.length + STEP_TOKENS)
            grown = x_HnW.new_empty(x_HnW.shape[0], capacity, x_HnW.shape[2])
            if held is not None:
                grown[:, : self.length] = held[:, : self.length]
            held = self.held[layer, what] = grown
        held[:, self.length : end] = x_HnW
        return held[:, :end]

    @property
    def bytes(self) -> int:
        return sum(held.nbytes for held in tuple(self.held.values()))  # asked while another thread writes


@dataclass(frozen=True)
class Rows:
    """The caches of a call's rows, in the place of transformers' own, for one layer.

    Keys and values come back as lists, a row each, which only our attention function (attention.py) understands; of
    one row as tensors [1, H, length, W], which latent attention makes keys and values of. The indexer's keys come in one
    tensor, padded at the end where its mask of the future hides them.
    """

    caches: Sequence[Cache]
    layer: int

    def update(
        self, keys_BHnW: Tensor, values_BHnW: Tensor, layer: int
    ) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
        keys = [cache.write(layer, "keys", k_HnW) for cache, k_HnW in zip(self.caches, keys_BHnW)]
        values = [cache.write(layer, "values", v_HnW) for cache, v_HnW in zip(self.caches, values_BHnW)]
        if len(keys) == 1:
            return keys[0][None], values[0][None]
        return keys, values

    @property
    def layers(self) -> Mapping[int, "Rows"]:
        return {self.layer: self}

    def update_index(self, keys_B1nW: Tensor) -> Tensor:
        rows = [cache.write(self.layer, "index", k_1nW) for cache, k_1nW in zip(self.caches, keys_B1nW)]
        if len(rows) == 1:
            return rows[0][None]
        longest = max(row.shape[1] for row in rows)
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
