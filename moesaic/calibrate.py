"""One sweep over the layers, and from it everything that any criterion needs, one small file a layer.

Sums are kept by domain and by half (every second row), so that experts can be ranked again for other
domains, and the ranking of one half held against that of the other, without another sweep. Only
selected experts run, with exact gates. Text added later is a folder beside the first: sums add up.
Leaves out scores (criteria) and inputs of attention (rounding asks for those itself).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .artifact import read_tensors, sweep_partials, write_tensors
from .checkpoint import Checkpoint
from .criteria import Totals
from .errors import InputError
from .families import Architecture
from .progress import progress
from .stream import BlockPass, ExpertPass, LayerRun, Observer, Routing, State
from .tokens import TokenSet

KIND = "statistics"
SUMS = ("tokens", "gate", "gate2", "norm", "norm2", "gated", "gated2", "gnorm2", "turned")  # see criteria/base.py
TOWERS = 10.0
SAVE_SECONDS = 300.0  # a killed sweep loses at most this much, and a layer


@dataclass
class LayerSums:
    """What one MoE layer's observer adds up, in F64; G groups are domain × half, E experts."""

    group_T: Tensor
    groups: int
    experts: int
    sums: dict[str, Tensor] = field(default_factory=dict)  # name -> [G, E]
    mean_ED: Tensor | None = None  # Σ f
    inputs_ED: Tensor | None = None  # Σ x², for scale search on gate and up
    inner_EI: Tensor | None = None  # Σ inner², for the down projection
    together_EE: Tensor | None = None  # tokens that selected both
    weighted: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # expert, tokens, g‖f‖

    def __post_init__(self) -> None:
        for name in (*SUMS, "peak", "nonfinite"):
            self.sums[name] = torch.zeros(self.groups, self.experts, dtype=torch.float64)

    @property
    def observer(self) -> Observer:
        return Observer(self.route, self.expert, self.block)

    def route(self, seen: Routing) -> None:
        ids, count = seen.experts_Tk, self.experts
        pairs = ids[:, :, None] * count + ids[:, None, :]
        self.together_EE = pairs.flatten().bincount(minlength=count * count).reshape(count, count).cpu()

    def expert(self, seen: ExpertPass) -> None:
        norm_n = seen.f_nD.float().norm(dim=1).double()
        group_n, gate_n = self.group_T[seen.tokens_n], seen.gates_n.double()
        finite = norm_n.isfinite() & gate_n.isfinite()
        self.add("nonfinite", seen.expert, group_n[~finite], torch.ones_like(norm_n[~finite]))
        group_n, gate_n, norm_n, f_nD = group_n[finite], gate_n[finite], norm_n[finite], seen.f_nD[finite]
        for name, values in (
            ("tokens", torch.ones_like(norm_n)), ("gate", gate_n), ("gate2", gate_n**2), ("norm", norm_n), ("norm2", norm_n**2),
            ("gated", gate_n * norm_n), ("gated2", (gate_n * norm_n) ** 2), ("gnorm2", gate_n * norm_n**2),
        ):  # fmt: skip
            self.add(name, seen.expert, group_n, values)
        if len(norm_n):
            peak_n = f_nD.abs().amax(1).double().cpu()
            peak_G = self.sums["peak"][:, seen.expert]
            self.sums["peak"][:, seen.expert] = peak_G.scatter_reduce(0, group_n.cpu(), peak_n, "amax")
        self.weighted.append((seen.expert, seen.tokens_n[finite], gate_n * norm_n))
        self.moments(seen, finite)

    def add(self, name: str, expert: int, group_n: Tensor, values_n: Tensor) -> None:
        self.sums[name][:, expert] += group_n.bincount(values_n, minlength=self.groups).double().cpu()

    def moments(self, seen: ExpertPass, finite: Tensor) -> None:
        if self.mean_ED is None or self.inputs_ED is None or self.inner_EI is None:
            width, inner = seen.x_nD.shape[1], seen.inner_nI.shape[1]
            self.mean_ED, self.inputs_ED = torch.zeros(self.experts, width), torch.zeros(self.experts, width)
            self.inner_EI = torch.zeros(self.experts, inner)
        self.mean_ED[seen.expert] += seen.f_nD[finite].float().sum(0).cpu()
        self.inputs_ED[seen.expert] += seen.x_nD[finite].float().square().sum(0).cpu()
        self.inner_EI[seen.expert] += seen.inner_nI[finite].float().square().sum(0).cpu()

    def block(self, seen: BlockPass) -> None:
        """EASY-EP's term: how far the routed experts turned each token's residual stream."""
        turn_T = (1 - torch.cosine_similarity(seen.h_TD, seen.h_TD + seen.routed_TD, dim=1)).clamp(min=0).double()
        for expert, tokens_n, gated_n in self.weighted:
            self.add("turned", expert, self.group_T[tokens_n], (gated_n * turn_T[tokens_n]).nan_to_num(0.0))
        self.weighted.clear()

    def tensors(self) -> dict[str, Tensor]:
        found = dict(self.sums)
        for name in ("mean_ED", "inputs_ED", "inner_EI", "together_EE"):
            if (tensor := getattr(self, name)) is not None:
                found[name] = tensor
        return found


@dataclass(frozen=True)
class Statistics:
    """All layers' sums, in memory: float64 [L, D, 2, E] each, MoE layers in order, and tokens [D, 2] in all."""

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    sums: dict[str, np.ndarray]
    positions_DH: np.ndarray
    folders: tuple[Path, ...]

    def totals(self, domain: int | None = None, half: int | None = None) -> Totals:
        """Sums over domains and halves, [L, E], or over one of them; what a criterion reads."""
        domains = slice(None) if domain is None else slice(domain, domain + 1)
        halves = slice(None) if half is None else slice(half, half + 1)
        found = {name: a[:, domains, halves].sum((1, 2)) for name, a in self.sums.items()}
        found["peak"] = self.sums["peak"][:, domains, halves].max((1, 2))
        found["positions"] = np.full((len(self.layers), 1), self.positions_DH[domains, halves].sum())
        return found

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
        """A layer's "mean_ED", "inputs_ED", "inner_EI" or "together_EE", summed over all text seen."""
        parts = [read_tensors(layer_file(folder, layer), KIND)[0][name] for folder in self.folders]
        return torch.stack(parts).sum(0)

    @staticmethod
    def load(folder: Path, checkpoint: Checkpoint) -> "Statistics":
        """Everything that stands in a stats folder, summed. Raises `InputError` when a sweep of it is unfinished."""
        chunks = tuple(sorted(p for p in folder.iterdir() if p.is_dir())) if folder.exists() else ()
        if not chunks:
            raise InputError(f"{folder} holds no statistics; run `moesaic calibrate` first")
        return Statistics.of(chunks, checkpoint)

    @staticmethod
    def of(chunks: tuple[Path, ...], checkpoint: Checkpoint) -> "Statistics":
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
        return Statistics(layers, domains, sums, positions_DH, chunks)


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
        tensors, body = read_tensors(layer_file(folder, layer), KIND, {"source": source})
        for name, stack in found.items():
            stack.append(tensors[name].reshape(len(body["domains"]), 2, -1).numpy())
    return {n: np.stack(s) for n, s in found.items()}, tuple(body["domains"]), np.array(body["positions"])


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"{layer:03d}.safetensors"


def calibrate(checkpoint: Checkpoint, tokens: TokenSet, folder: Path, quiet: bool = False) -> Statistics:
    """Sweep `tokens` through the model once, store each MoE layer's statistics under `folder`, and return them.

    Interrupted, the same call goes on at the layer it had reached; done before, it only reads. What other
    texts left in `folder` stays apart: `Statistics.load` sums them all. Memory: that of `LayerRun` and two
    F64 numbers a token and selected expert. Raises `InputError` when the tokens routed in a layer are not
    `top_k` a token.
    """
    architecture, chunk = checkpoint.architecture, folder / tokens.identity
    inputs = {"source": checkpoint.identity, "tokens": tokens.identity}
    group_T, positions = groups(tokens)
    sweep_partials(chunk)
    start, hidden = resume(chunk, architecture, inputs)
    if start < architecture.layers:
        run = LayerRun(checkpoint)
        reached = start - 1, State(run.embed(tokens.ids_BT) if hidden is None else hidden.to(run.device))
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
    (chunk / "hidden.safetensors").unlink(missing_ok=True)
    return Statistics.of((chunk,), checkpoint)


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


def groups(tokens: TokenSet) -> tuple[Tensor, list[list[int]]]:
    """Group of every token (domain × 2 + half; rows of a domain alternate), and tokens by domain and half."""
    rows, length = tokens.ids_BT.shape
    half_B = torch.zeros(rows, dtype=torch.int64)
    for domain in range(len(tokens.domains)):
        mine = tokens.domain_B == domain
        half_B[mine] = torch.arange(int(mine.sum())) % 2
    group_B = tokens.domain_B * 2 + half_B
    positions = group_B.bincount(minlength=2 * len(tokens.domains)).reshape(-1, 2) * length
    return group_B.repeat_interleave(length), positions.tolist()


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
