"""Two repairs of a pruned model that need no training: what they win on held-out text, if anything.

    python benchmarks/repair.py MODEL --data CALIBRATION --heldout HELDOUT [--tokens 65536] [--keep 24,16]

shared  What `prune --repair` does, and keeps where it helps: moesaic/repair.py.
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
from stream import final
from torch import Tensor

from moesaic.calibrate import calibrate
from moesaic.calibrate.selection import select_experts
from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet
from moesaic.export.repair import repair
from moesaic.measure.divergence import Bootstrap, Estimate, against
from moesaic.plan import Plan, dropped
from moesaic.plan.blueprint import Blueprint
from moesaic.stream import LayerRun, Observer, Routing, State

STEPS, PACE = 300, 0.3  # of matching loads


# Biases -----------------------------------------------------------------------------------------------------------


def moved_biases(run: LayerRun, ids_BT: Tensor, kept: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """Layer -> correction biases with which kept experts share the tokens as they did among themselves."""
    found, state = {}, State(run.embed(ids_BT))
    for layer in range(run.architecture.layers):
        seen: list[Routing] = []
        after = run.advance(layer, [replace(state, observer=Observer(route=seen.append))])[0]
        state = replace(after, observer=None)
        for routing in seen:
            bias_E = run.checkpoint.read(run.architecture.routers[layer].correction)
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
        where = source.where(source.architecture.routers[layer].correction)
        with open(folder / where.file, "r+b") as file:
            file.seek(where.offset)
            file.write(bias_E.numpy().tobytes())
    return Checkpoint.open(folder)


# Figures ----------------------------------------------------------------------------------------------------------


def rebiased(
    source: Checkpoint, plan: Plan, tokens: TokenSet, rows: TokenSet, folder: Path, seed: int
) -> list[Estimate]:
    """KL of the cut, of the cut with moved biases, and the difference."""
    run = LayerRun(source)
    moved = LayerRun(patched(source, moved_biases(run, tokens.ids_BT, plan.kept), folder))
    left_out = dropped(plan.kept, source.architecture.experts)
    base, cut = final(run, [State(run.embed(rows.ids_BT)), State(run.embed(rows.ids_BT), left_out)])
    (after,) = final(moved, [State(moved.embed(rows.ids_BT), left_out)])
    before, found = against(run, base, [cut, after], rows.ids_BT)
    kl_cut, kl = before["kl_nats"], found["kl_nats"]
    return [Bootstrap(found, seed).mean(x_BS) for x_BS in (kl_cut, kl, kl - kl_cut)]


def tell(what: str, cut: Estimate, repaired: Estimate, change: Estimate) -> None:
    figures = (f"{name} {e.value:.4f} ± {e.error:.4f}" for name, e in (("cut", cut), ("repaired", repaired)))
    print(f"{what:20} KL {', '.join(figures)}, change {change.value:+.4f} ± {change.error:.4f}", flush=True)


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
    corpus = Corpus(a.data, a.heldout, a.tokens, a.length, a.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = corpus.calibration(source, folder / "tokens.safetensors")
        statistics = calibrate(source, tokens, folder / "stats", quiet=True)
        rows = corpus.evaluation(source, folder / "heldout.safetensors", a.judged)
        fitted = tokens.take(range(0, tokens.rows, max(1, a.tokens // a.fitted)))
        for keep in a.keep:
            kept = select_experts(statistics, "reap", keep).cut.kept
            plan, what = Plan(source.container.name, kept), f"{a.model.name} {keep} kept"
            if source.family.wiring.shared:
                blueprint = Blueprint.of(source, plan)
                _, facts = repair(blueprint, fitted, rows, folder / f"repaired-{keep}", a.seed, quiet=True)
                figures = (Estimate(**facts[name]) for name in ("cut_nats", "repaired_nats", "change_nats"))
                tell(f"{what}, shared", *figures)
            tell(f"{what}, bias", *rebiased(source, plan, fitted, rows, folder / f"biases-{keep}", a.seed))
    print(f"fitted on {fitted.tokens:,} tokens, measured on {rows.tokens:,} in {rows.rows} rows, seed {a.seed}")


if __name__ == "__main__":
    main()
