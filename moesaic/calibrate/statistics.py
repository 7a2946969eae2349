"""All layers' sums in memory: what criteria read, and what the guards see. Text added later is a folder beside the first.

Leaves out how the sums come to be (sweep.py).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import read_tensors
from ..checkpoint import Checkpoint
from ..data.tokens import TokenSet
from ..errors import InputError
from .criteria.base import Totals
from .sums import SUMS

KIND = "statistics"
VERSION = "1"  # goes up with any change to what is stored, or to what comes of the same text
TEXT = "tokens.safetensors"  # what was read, beside what was seen
TOWERS = 10.0
SHARED = 0.05  # of a text that may stand in another: licences, boilerplate


@dataclass(frozen=True)
class Statistics:
    """All layers' sums, in memory: float64 [L, D, 2, E] each, MoE layers in order, and tokens [D, 2] in all."""

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    sums: dict[str, np.ndarray]
    positions_DH: np.ndarray
    folders: tuple[Path, ...]
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)  # criteria.WEIGHT_SUMS [L, E], where asked for
    groups: int = 1  # of experts, of which each keeps as many

    def totals(self, domains: Mapping[str, float] | None = None, half: int | None = None) -> Totals:
        """Sums over both halves or one, [L, E], each domain's times its share; what a criterion reads.

        domains  name -> share; None: all alike. Raises `InputError` for a name that no text had.
        """
        share_D = self.shares(domains)
        halves = slice(None) if half is None else slice(half, half + 1)
        found = {name: np.einsum("ldhe,d->le", a[:, :, halves], share_D) for name, a in self.sums.items()}
        found["peak"] = self.sums["peak"][:, share_D > 0, halves].max((1, 2), initial=0.0)
        found["positions"] = np.full((len(self.layers), 1), share_D @ self.positions_DH[:, halves].sum(1))
        return {**found, **self.weights}

    def shares(self, domains: Mapping[str, float] | None) -> np.ndarray:
        """The share of each domain, [D]: 1 where none are given, 0 for one that is not among those given."""
        if domains is None:
            return np.ones(len(self.domains))
        check_domains(domains, self.domains)
        return np.array([domains.get(name, 0.0) for name in self.domains])

    @cached_property
    def tokens(self) -> int:
        return int(self.positions_DH.sum())

    def few(self, tokens: int) -> list[tuple[int, int]]:
        """(layer, expert) that fewer than `tokens` finite tokens reached."""
        seen_LE = self.totals()["tokens"]
        return [(self.layers[i], int(e)) for i, e in np.argwhere(seen_LE < tokens)]

    def nonfinite(self) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) whose outputs were infinite or no number: left out of all sums, never ranked."""
        bad_LE = self.totals()["nonfinite"]
        return [(self.layers[i], int(e), int(bad_LE[i, e])) for i, e in np.argwhere(bad_LE > 0)]

    def super_experts(self) -> list[tuple[int, int]]:
        """Experts whose outputs tower over all others': losing one of these few wrecks a model.

        The rule of arXiv 2507.23279, above the 99.5th percentile and a tenth of the highest peak, finds one
        in any model; so a peak has to be `TOWERS` times the usual one besides.
        """
        peak_LE = self.totals()["peak"]
        high = peak_LE > max(np.percentile(peak_LE, 99.5), peak_LE.max() / 10, TOWERS * np.median(peak_LE))
        return [(self.layers[i], int(e)) for i, e in np.argwhere(high)]

    def layer(self, layer: int, name: str) -> Tensor:
        """A layer's "inputs_ED", "inner_EI" or "together_EE", summed over all text seen."""
        parts = [read_tensors(layer_file(folder, layer), KIND)[0][name] for folder in self.folders]
        return torch.stack(parts).sum(0)

    @staticmethod
    def load(folder: Path, checkpoint: Checkpoint) -> "Statistics":
        """Everything that stands in a stats folder, summed.

        Raises `InputError` when a sweep of it is unfinished, or when two of its texts share more than phrases.
        """
        chunks = tuple(sorted(p for p in folder.iterdir() if p.is_dir())) if folder.exists() else ()
        if not chunks:
            raise InputError(f"{folder} holds no statistics; run `moesaic calibrate` first")
        found = Statistics.of(chunks, checkpoint)
        texts = [TokenSet.load(chunk / TEXT) for chunk in chunks]
        for (one, a), (other, b) in itertools.combinations(zip(chunks, texts), 2):
            check_apart(str(one), a, str(other), b)
        return found

    @staticmethod
    def of_weights(checkpoint: Checkpoint, weights: Mapping[str, np.ndarray]) -> "Statistics":
        """What is known without any text (see `weigh`): enough for criteria that read weights alone."""
        layers, experts = checkpoint.architecture.moe_layers, checkpoint.architecture.experts
        sums = {name: np.zeros((len(layers), 0, 2, experts)) for name in (*SUMS, "peak", "nonfinite")}
        groups = checkpoint.architecture.groups
        return Statistics(layers, (), sums, np.zeros((0, 2)), (), weights=weights, groups=groups)

    @staticmethod
    def of(chunks: Sequence[Path], checkpoint: Checkpoint) -> "Statistics":
        """The sums of these texts, one folder each."""
        layers = checkpoint.architecture.moe_layers
        parts = [read_chunk(chunk, layers, checkpoint.identity) for chunk in chunks]
        domains = tuple(dict.fromkeys(d for part in parts for d in part[1]))
        shape = (len(layers), len(domains), 2, checkpoint.architecture.experts)
        sums = {name: np.zeros(shape) for name in (*SUMS, "peak", "nonfinite")}
        positions_DH = np.zeros((len(domains), 2))
        for found, names, positions in parts:
            at = [domains.index(d) for d in names]
            positions_DH[at] += positions
            for name, a in found.items():
                sums[name][:, at] = np.maximum(sums[name][:, at], a) if name == "peak" else sums[name][:, at] + a
        groups = checkpoint.architecture.groups
        return Statistics(layers, domains, sums, positions_DH, tuple(chunks), groups=groups)


def read_chunk(
    folder: Path, layers: Sequence[int], source: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...], np.ndarray]:
    if missing := [layer for layer in layers if not layer_file(folder, layer).exists()]:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(layers)} layers: its sweep was not finished; "
            "give the command that began it again, or remove the folder"
        )
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*SUMS, "peak", "nonfinite")}
    body: dict[str, Any] = {}
    for layer in layers:
        tensors, body = read_tensors(layer_file(folder, layer), KIND, {"source": source, "statistics": VERSION})
        for name, stack in found.items():
            stack.append(tensors[name].reshape(len(body["domains"]), 2, -1).numpy())
    return {n: np.stack(s) for n, s in found.items()}, tuple(body["domains"]), np.array(body["positions"])


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"{layer:03d}.safetensors"


def check_domains(wanted: Mapping[str, float], there_are: Sequence[str]) -> None:
    """Raises `InputError` for a domain that the text lacks, and for shares of which none is above 0."""
    if unknown := [name for name in wanted if name not in there_are]:
        raise InputError(f"unknown domain {unknown[0]!r} in the text; choose from {', '.join(there_are)}")
    if not wanted or min(wanted.values()) < 0 or not max(wanted.values()) > 0:
        raise InputError(f"the shares of domains are {dict(wanted)}; wanted numbers from 0 up, and one above 0")


def check_unread(folder: Path, texts: Sequence[TokenSet]) -> None:
    """Raises `InputError` for text that another sweep has left its statistics of in `folder`: it would count twice."""
    own = {text.identity for text in texts}
    for chunk in sorted(folder.iterdir()) if folder.exists() else ():
        if chunk.name not in own and (chunk / TEXT).exists():
            for text in texts:
                check_apart("this text", text, str(chunk), TokenSet.load(chunk / TEXT))


def check_apart(one: str, a: TokenSet, other: str, b: TokenSet) -> None:
    if (shared := a.shared_with(b)) > SHARED * a.tokens:
        raise InputError(
            f"{shared:,} of the {a.tokens:,} tokens in {one} stand in {other} too, and would count twice; "
            "remove that folder, or use another run folder"
        )
