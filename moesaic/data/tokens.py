"""Text by domain -> rows of token ids, with the hash of everything they were made from.

Each domain is cut into as many equal stretches as it must supply rows; a row is a seeded window inside its stretch, so
windows never overlap and cover the text from end to end. Leaves out chunk-by-chunk perplexity (evaluate/perplexity.py).
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import identity, read_tensors, write_tensors
from ..errors import InputError
from .documents import Text
from .tokenizer import Tokenizer

KIND = "tokens"
GENEROUS = 16  # characters to read for a token wanted; text has 2 to 6 a token
IMAGE, IMAGE_TOKENS = "image", 4096  # the domain of an image's tokens, and how many ids are set aside for one image
RUN = 32  # tokens in a row that two sets must share before that counts as overlap


@dataclass(frozen=True)
class TokenSet:
    """Rows of tokens, the domain of each, and where they came from (`facts`: hashes, seed, BOS convention)."""

    ids_BT: Tensor  # int64
    domain_B: Tensor  # int64, index into `domains`
    domains: tuple[str, ...]
    facts: Mapping[str, Any]

    @staticmethod
    def build(
        texts: Sequence[Text],
        tokenizer: Tokenizer,
        *,
        shape: tuple[int, int],
        vocab: int,
        seed: int = 0,
        at_most: bool = False,
    ) -> "TokenSet":
        """Choose `shape` windows, that is so many rows of so many tokens (BOS included, where the tokenizer adds one to a text).

        Domains get equal shares; one too short for its share gives all it holds and the others make
        up for it. With `at_most`, a text too short for so many rows gives all it holds. Raises
        `InputError` when a domain is shorter than one row, all together are shorter than the rows, or an id
        does not fit the model's `vocab`.
        """
        rows, length = shape
        if rows < 1 or length < 2:
            raise InputError(f"asked for {rows} rows of {length} tokens; wanted at least 1 row of 2")
        body = length - (tokenizer.bos is not None)
        streams = {t.domain: tokenizer.encode(t.thin(rows * length * GENEROUS, rows)) for t in texts}
        for domain, ids_N in streams.items():
            if len(ids_N) < body:
                held = f"{domain} holds {len(ids_N):,} tokens and a row has {length:,}"
                raise InputError(f"{held}; give more text or ask for shorter rows")
            if (largest := int(ids_N.max())) >= vocab:
                held = f"the tokenizer in {tokenizer.folder} gives id {largest:,}, and the model knows {vocab:,}"
                raise InputError(f"{held}; use the model's own tokenizer")
        room = {domain: len(ids_N) // body for domain, ids_N in streams.items()}
        counts = allot(min(rows, sum(room.values())) if at_most else rows, room)
        rng = np.random.default_rng(seed)
        ids_BT = torch.from_numpy(np.concatenate([windows(streams[d], counts[d], body, rng) for d in streams]))
        if tokenizer.bos is not None:
            ids_BT = torch.nn.functional.pad(ids_BT, (1, 0), value=tokenizer.bos)
        facts = {
            "seed": seed,
            "length": length,
            "rows_by_domain": counts,
            "bos": "none" if tokenizer.bos is None else "every-row",
            "text_sha256": {text.domain: text.sha256 for text in texts},
            "tokenizer_sha256": tokenizer.sha256,
            "ids_sha256": sha256_of(ids_BT),
        }
        domain_B = torch.repeat_interleave(torch.arange(len(streams)), torch.tensor([counts[d] for d in streams]))
        return TokenSet(ids_BT, domain_B, tuple(streams), facts)

    @property
    def rows(self) -> int:
        return self.ids_BT.shape[0]

    @property
    def tokens(self) -> int:
        return self.ids_BT.numel()

    @cached_property
    def identity(self) -> str:
        return identity(self.facts["ids_sha256"], self.domains, self.domain_B.tolist())

    def take(self, rows: Sequence[int]) -> "TokenSet":
        """These rows as a set of their own, with its own identity."""
        ids_BT, domain_B = self.ids_BT[list(rows)], self.domain_B[list(rows)]
        counts = domain_B.bincount(minlength=len(self.domains)).tolist()
        facts = {**self.facts, "rows_by_domain": dict(zip(self.domains, counts)), "ids_sha256": sha256_of(ids_BT)}
        return TokenSet(ids_BT, domain_B, self.domains, facts)

    def shared_with(self, other: "TokenSet", run: int = RUN) -> int:
        """How many of these tokens lie in a run of `run` tokens that stands in `other` too. 0: disjoint."""
        mine_BN, theirs_BN = ngrams(self.ids_BT.numpy(), run), ngrams(other.ids_BT.numpy(), run)
        starts_BN = np.isin(mine_BN, theirs_BN)
        covered_BT = np.zeros(self.ids_BT.shape, bool)
        for offset in range(run):
            covered_BT[:, offset : offset + starts_BN.shape[1]] |= starts_BN
        return int(covered_BT.sum())

    def save(self, path: Path) -> None:
        tensors = {"ids_BT": self.ids_BT.to(torch.int32), "domain_B": self.domain_B.to(torch.int32)}
        body = {"domains": self.domains, "facts": self.facts}
        write_tensors(path, KIND, tensors, {"tokenizer": self.facts["tokenizer_sha256"]}, body)

    @staticmethod
    def load(path: Path) -> "TokenSet":
        """Read what `save` wrote. Raises `InputError` when the ids are not those that were hashed."""
        tensors, body = read_tensors(path, KIND)
        ids_BT, domain_B = tensors["ids_BT"].long(), tensors["domain_B"].long()
        if sha256_of(ids_BT) != body["facts"]["ids_sha256"]:
            raise InputError(f"{path} does not hold the tokens that it was written with; make it again")
        return TokenSet(ids_BT, domain_B, tuple(body["domains"]), body["facts"])


def sha256_of(ids: Tensor) -> str:
    return hashlib.sha256(ids.long().numpy().tobytes()).hexdigest()


def allot(rows: int, room: Mapping[str, int]) -> dict[str, int]:
    """Rows for each domain: as many for each, none above its room, `rows` in all."""
    if rows > sum(room.values()):
        held = f"the text holds {sum(room.values()):,} ({', '.join(f'{d} {n:,}' for d, n in room.items())})"
        raise InputError(f"asked for {rows:,} rows, and {held}; ask for fewer tokens or give more text")
    counts = dict.fromkeys(room, 0)
    for _ in range(rows):  # one at a time to the domain that has fewest: exact, and always the same
        unfilled = [d for d in room if counts[d] < room[d]]
        counts[min(unfilled, key=counts.__getitem__)] += 1
    return counts


def windows(ids_N: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """[count, length]: one window in each of `count` equal stretches of a stream."""
    edges = np.linspace(0, len(ids_N), count + 1).astype(np.int64)
    starts = [int(rng.integers(a, b - length + 1)) for a, b in itertools.pairwise(edges)]
    return np.stack([ids_N[s : s + length] for s in starts]) if starts else np.empty((0, length), np.int64)


def ngrams(ids_BT: np.ndarray, length: int) -> np.ndarray:
    """[B, T-length+1]: a 64-bit hash of each run of `length` ids (polynomial, modulo 2^64, ids scrambled first)."""
    scrambled_BT = (ids_BT.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scrambled_BT ^= scrambled_BT >> np.uint64(29)
    stop = ids_BT.shape[1] - length + 1
    hash_BN = np.zeros((ids_BT.shape[0], max(stop, 0)), np.uint64)
    for offset in range(length if stop > 0 else 0):
        hash_BN = hash_BN * np.uint64(0x100000001B3) + scrambled_BT[:, offset : offset + stop]
    return hash_BN
