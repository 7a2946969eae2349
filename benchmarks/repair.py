"""Two repairs of a pruned model that need no training: what they win on held-out text, if anything.

    python benchmarks/repair.py MODEL --data CALIBRATION --heldout HELDOUT [--tokens 65536] [--keep 24,16]

shared  The shared expert's down projection takes over what the dropped experts gave on average: ΔW = R Hᵀ
        (H Hᵀ + λ I)⁻¹ by least squares, layer after layer, H being what the projection multiplies in the model
        repaired so far, and R what its block lacks: "block" of the full block on the same input, "stream" of the
        source's own residual stream. λ is a share of the mean diagonal of H Hᵀ. Rounded to MXFP8 as stored.
bias    Correction biases of kept experts are moved until each has its share of the tokens that it had among
        kept ones in the source (routing of the source's own stream).

Every figure is KL(source ‖ cut) on held-out text, ± one standard error over rows; and what the repair changes it
by, paired over rows. Cuts are REAP's.
"""

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.calibrate import calibrate
from moesaic.checkpoint import Checkpoint
from moesaic.corpus import Corpus
from moesaic.divergence import Bootstrap, Divergence, against
from moesaic.families import Linear
from moesaic.formats import FORMATS
from moesaic.select import select_experts
from moesaic.stream import Change, LayerRun, LinearPass, Observer, Routing, State

RIDGES = (1e-2,)
STEPS, PACE = 300, 0.3  # of matching loads

Dropped = Mapping[int, Sequence[int]]


# The shared expert ------------------------------------------------------------------------------------------------


def adding(delta_DI: Tensor) -> Change:
    """The down projection plus `delta_DI`, as MXFP8 stores it."""

    def change(linears: Sequence[Linear], values: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for linear, w_OI in zip(linears, values):
            if linear.projection == "down":
                w_OI = w_OI + delta_DI
                w_OI = FORMATS["mxfp8"].decode(FORMATS["mxfp8"].encode(w_OI, s := FORMATS["mxfp8"].scales(w_OI)), s)
            found.append(w_OI)
        return found

    return change


def repair(run: LayerRun, ids_BT: Tensor, dropped: Dropped, ridge: float, target: str) -> dict[str, Change]:
    """Unit -> its repaired shared expert, for every MoE layer."""
    found: dict[str, Change] = {}
    source_BTD = run.embed(ids_BT)
    cut_BTD = source_BTD.clone()
    for layer in range(run.architecture.layers):
        if layer not in run.architecture.moe_layers:
            source_BTD, cut_BTD = (s.hidden_BTD for s in run.advance(layer, [State(source_BTD), State(cut_BTD)]))
            continue
        parts: list[Tensor] = []

        def see(seen: LinearPass, parts: list[Tensor] = parts) -> None:
            if seen.linears[0].projection == "down":
                parts.append(seen.x_nI)

        entering = source_BTD if target == "stream" else cut_BTD
        states = [State(entering), State(cut_BTD, dropped, Observer(linear=see))]
        full, after = (s.hidden_BTD.flatten(0, 1).double() for s in run.advance(layer, states))
        h_TI = torch.cat(parts).double()
        gram_II = h_TI.T @ h_TI
        gram_II += ridge * gram_II.diagonal().mean() * torch.eye(len(gram_II))
        delta_DI = torch.linalg.solve(gram_II, h_TI.T @ (full - after)).T.float()
        (unit,) = run.units(layer, ("shared",))
        found[unit] = adding(delta_DI)
        branches = [State(cut_BTD, dropped, changed={unit: found[unit]})]
        if target == "stream":
            branches.append(State(source_BTD))
        ahead = [s.hidden_BTD for s in run.advance(layer, branches)]
        cut_BTD, source_BTD = ahead[0], ahead[-1]
    return found


# Biases -----------------------------------------------------------------------------------------------------------


def moved_biases(run: LayerRun, ids_BT: Tensor, kept: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """Layer -> correction biases with which kept experts share the tokens as they did among themselves."""
    found, state = {}, State(run.embed(ids_BT))
    for layer in range(run.architecture.layers):
        seen: list[Routing] = []
        after = run.advance(layer, [replace(state, observer=Observer(route=seen.append))])[0]
        state = replace(after, observer=None)
        for routing in seen:
            bias_E = run.checkpoint.read(run.architecture.routers[layer][1])
            found[layer] = matched(routing, bias_E, list(kept[layer]))
    return found


def matched(routing: Routing, bias_E: Tensor, kept: list[int]) -> Tensor:
    experts, top_k = len(bias_E), routing.experts_Tk.shape[1]
    load_E = routing.experts_Tk.flatten().bincount(minlength=experts).double()
    wanted_K = load_E[kept] / load_E[kept].sum()
    affinity_TK, delta_K = routing.affinity_TE[:, kept], torch.zeros(len(kept))
    spread = float((affinity_TK + bias_E[kept]).std())
    for step in range(STEPS):
        chosen = (affinity_TK + bias_E[kept] + delta_K).topk(top_k, dim=1).indices.flatten()
        share_K = chosen.bincount(minlength=len(kept)).double() / len(chosen)
        delta_K += (
            PACE * spread * ((wanted_K - share_K) / wanted_K.clamp_min(1e-3)).clamp(-1, 1).float() / (1 + step / 20)
        )
    moved_E = bias_E.clone()
    moved_E[kept] += delta_K - delta_K.mean()
    return moved_E


def patched(source: Checkpoint, biases: Mapping[int, Tensor], folder: Path) -> Checkpoint:
    """A copy of a small model with other correction biases."""
    shutil.copytree(source.path, folder)
    for layer, bias_E in biases.items():
        where = source.where(source.architecture.routers[layer][1])
        with open(folder / where.file, "r+b") as file:
            file.seek(where.offset)
            file.write(bias_E.numpy().tobytes())
    return Checkpoint.open(folder)


# Figures ----------------------------------------------------------------------------------------------------------


def swept(run: LayerRun, states: list[State]) -> list[Tensor]:
    for _, after in run.sweep(states):
        states = after
    return [s.hidden_BTD for s in states]


def tell(what: str, cut: Divergence, repaired: Divergence, seed: int) -> None:
    kl = Bootstrap(repaired, seed).mean(repaired["kl_nats"])
    change = Bootstrap(repaired, seed).mean(repaired["kl_nats"] - cut["kl_nats"])
    print(f"{what:32} KL {kl.value:.4f} ± {kl.error:.4f}   change {change.value:+.4f} ± {change.error:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--tokens", type=int, default=65_536, help="to calibrate on")
    parser.add_argument("--fitted", type=int, default=16_384, help="of these, to fit repairs on")
    parser.add_argument("--judged", type=int, default=16_384, help="tokens to judge by")
    parser.add_argument("--keep", type=lambda text: [int(k) for k in text.split(",")], default=[24, 16])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    source = Checkpoint.open(a.model)
    corpus, run = Corpus(a.data, a.heldout, a.tokens, a.length, a.seed), LayerRun(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = corpus.calibration(source, folder / "tokens.safetensors")
        statistics = calibrate(source, tokens, folder / "stats", quiet=True)
        rows = corpus.evaluation(source, folder / "heldout.safetensors", a.judged).ids_BT
        fitted = tokens.ids_BT[:: max(1, a.tokens // a.fitted)]
        for keep in a.keep:
            kept = select_experts(statistics, "reap", keep).cut.kept
            dropped = {n: [e for e in range(source.architecture.experts) if e not in ids] for n, ids in kept.items()}
            names, states = ["cut"], [State(run.embed(rows)), State(run.embed(rows), dropped)]
            for target in ("block", "stream") if source.family.shared else ():
                for ridge in RIDGES:
                    names.append(f"shared, {target}, λ = {ridge:g}")
                    states.append(State(run.embed(rows), dropped, changed=repair(run, fitted, dropped, ridge, target)))
            base, *hidden = swept(run, states)
            biased = LayerRun(patched(source, moved_biases(run, fitted, kept), folder / f"biases-{keep}"))
            names.append("bias")
            hidden += swept(biased, [State(biased.embed(rows), dropped)])
            found = against(run, base, hidden, rows)
            for label, divergence in zip(names, found):
                tell(f"{a.model.name} {keep} kept, {label}", found[0], divergence, a.seed)
    print(f"fitted on {fitted.numel():,} tokens, measured on {rows.numel():,} in {len(rows)} rows, seed {a.seed}")


if __name__ == "__main__":
    main()
