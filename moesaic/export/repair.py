"""What dropped experts gave on average, taken over by the shared expert; without training, and kept only if it helps.

Of each layer one matrix is fitted anew by least squares, on text, in the model that is repaired so far: the shared
expert's down projection W becomes W + R Hᵀ (H Hᵀ + λ I)⁻¹, H being what it multiplies and R what the cut block lacks
of the full block's output on the same input. Whether that helps is measured on other text, row by row. The matrices
lie in an overlay until `export` has taken them in. Leaves out families without a shared expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import read_json, write_json
from ..checkpoint import Checkpoint, sample
from ..data.tokens import TokenSet
from ..errors import FaultError, InputError
from ..families import Linear
from ..measure.divergence import Bootstrap, against
from ..plan import Plan, dropped, overlay
from ..plan.blueprint import Blueprint, bound
from ..progress import progress
from ..rounding import ROUNDINGS, arithmetic, round_siblings
from ..stream import STATES, LayerRun, LinearPass, Observer, Standing, State, Sweep, advanced
from ..stream.memory import spans
from ..stream.sweep import EACH_LAYER
from .sequential.group import format_of, read_values, weights_of, write_group

FOLDER, VERDICT = "repaired", "repair.json"
VERSION = "1"  # goes up with any change to what is fitted to the same text
JUDGED = "judged.safetensors"  # states while the repair is judged
SOURCE, CUT, REPAIRED = "source", "cut", "repaired"
RIDGE = 1e-2  # λ, as a share of the mean diagonal of H Hᵀ
FIT_TOKENS = 16_384  # five for each column of the largest shared expert that there is


@dataclass(frozen=True)
class Repair:
    """One repair: the source as it runs, what its plan makes of it, and the overlay, which depends on `inputs`."""

    run: LayerRun
    blueprint: Blueprint
    folder: Path
    inputs: Mapping[str, str]


def repair(
    blueprint: Blueprint, tokens: TokenSet, heldout: TokenSet, folder: Path, seed: int = 0, quiet: bool = False
) -> tuple[dict[str, str], dict[str, Any]]:  # fmt: skip
    """Fit the shared experts of a cut; returns the items of the overlay in `folder`, none where it does not help, and
    JSON-able facts of what it changed.

    It helps where the 95 % interval of its change of KL(source ‖ cut), paired over the rows of `heldout`, lies below
    zero. Interrupted, the same call goes on at the layer it had reached; done before, it only reads. Memory: that of
    `LayerRun` for two branches on at most `FIT_TOKENS` of `tokens`, [T, I] of what one matrix multiplies, and two
    matrices in F64. Raises `InputError` where there is nothing to repair.
    """
    check_repairable(blueprint.source)
    fitted = tokens.take(range(0, tokens.rows, -(-tokens.tokens // FIT_TOKENS)))
    of = Repair(LayerRun(blueprint.source), blueprint, folder, made_from(blueprint.source, blueprint.plan, fitted))
    if not overlay.is_finished(folder):
        fit(of, fitted, quiet)
    (folder / STATES).unlink(missing_ok=True)
    found = overlay.listing(folder, of.inputs)
    inputs = {**of.inputs, "heldout": heldout.identity, "seed": str(seed)}
    if not (folder / VERDICT).exists():
        facts = measured(replace(of, inputs=inputs), heldout, seed, quiet)
        counts = {"matrices": len(found["items"]), "fitted_tokens": fitted.tokens}
        write_json(folder / VERDICT, "repair", counts | facts, inputs)
    facts = read_json(folder / VERDICT, "repair", inputs)
    told = {name: value for name, value in facts.items() if name not in ("kind", "schema", "maker", "inputs")}
    return found["items"] if facts["kept"] else {}, told


def check_repairable(source: Checkpoint) -> None:
    """Raises `InputError` for a model that has no shared expert, or one whose matrix carries more than its weights."""
    matrices = [n for n in source.architecture.linears if is_repairable(n)]
    if not matrices:
        raise InputError(f"{source.path} has no shared expert that could stand in for dropped ones; leave out --repair")
    packings = {n.name: source.container.packing(source.formats[n.name]).parts(n.shape) for n in matrices}
    if bound := [name for name, parts in packings.items() if "inputs" in parts]:
        raise InputError(
            f"{source.path} rounds what {sample(bound)} multiply by a scale that was measured for them as they are; "
            "leave out --repair"
        )


def made_from(source: Checkpoint, plan: Plan, fitted: TokenSet) -> dict[str, str]:
    """What fitted matrices depend on: cut, text, and versions of what fits and rounds them."""
    formats = {source.formats[n.name] for n in source.architecture.linears if is_repairable(n)}
    return bound(source, plan) | {"tokens": fitted.identity, "repair": VERSION} | arithmetic("rtn", formats)


def is_repairable(linear: Linear) -> bool:
    """Whether a matrix may stand in for dropped experts: every token passes it, and it adds to what they added to."""
    return linear.role == "shared" and linear.projection == "down"


# Fitting ----------------------------------------------------------------------------------------------------------


def fit(of: Repair, tokens: TokenSet, quiet: bool) -> None:
    """Every layer's matrix as a file in the overlay, each fitted on what those before it give."""
    layers = of.run.architecture.layers
    under_way = Sweep(range(layers), of.folder / STATES, of.inputs, of.run.device, EACH_LAYER)

    def end(at: Standing) -> None:
        groups = at.notes["groups"]
        if len(groups) != (wanted := sum(map(is_repairable, of.blueprint.architecture.linears))):
            raise FaultError(f"{len(groups)} of {wanted} shared experts were fitted")
        digests = {name: digest for g in groups for name, digest in g["sha256"].items()}
        overlay.finish(of.folder, digests, of.inputs, {})

    with progress("repair", layers - under_way.done, "layers", quiet) as meter:
        begin, step = partial(embedded, of.run, tokens), partial(fit_step, of)
        under_way.through(begin, step, end, lambda _: meter.advance(1))


def embedded(run: LayerRun, tokens: TokenSet) -> Standing:
    return Standing({CUT: State(run.embed(tokens.ids_BT))}, {"groups": []})


def fit_step(of: Repair, layer: int, at: Standing) -> Standing:
    """One layer of the cut and repaired model; its matrix, where it has one, goes into the overlay."""
    down = next((n for n in of.blueprint.architecture.linears if n.layer == layer and is_repairable(n)), None)
    if down is None:
        return advanced(of.run, layer, at)
    hidden_BTD, facts = fit_layer(of, down, at.states[CUT].hidden_BTD)
    return replace(at, states={CUT: State(hidden_BTD)}, notes={"groups": [*at.notes["groups"], facts]})


@torch.no_grad()
def fit_layer(of: Repair, down: Linear, hidden_BTD: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states after the cut and repaired layer, and what its matrix's file notes."""
    run, blueprint = of.run, of.blueprint
    seen: list[Tensor] = []

    def see(found: LinearPass) -> None:
        if down in found.linears:
            seen.append(found.x_nI)

    cut = State(hidden_BTD, dropped(blueprint.plan.kept, blueprint.source.architecture.experts), Observer(linear=see))
    (middle_BTD,) = run.attention(down.layer, [State(hidden_BTD)])
    full_BTD, cut_BTD = run.feed_forward(down.layer, [State(hidden_BTD), cut], [middle_BTD.clone(), middle_BTD])
    h_TI, cut_TD = torch.cat(seen), cut_BTD.flatten(0, 1)
    delta_OI = correction(h_TI, full_BTD.flatten(0, 1).sub_(cut_TD), run.block_bytes)
    if not delta_OI.isfinite().all():
        raise InputError(
            f"layer {down.layer} gives NaN or infinite values on this text, so no shared expert can be "
            "fitted to it; leave out --repair"
        )
    w_OI, format = weights_of(blueprint, (down,), run.device), format_of(blueprint, (down,))
    ((codes_OI, scales),) = round_siblings(ROUNDINGS["rtn"], [w_OI + delta_OI], format)
    step_OI = format.decode(codes_OI, scales) - w_OI
    for span in spans(len(h_TI), 4 * sum(down.shape), run.block_bytes):
        cut_TD[span] += h_TI[span] @ step_OI.mT
    facts = {"group": down.name, "layer": down.layer, "tokens": len(h_TI)}
    return cut_BTD, write_group(of.folder, blueprint, (down,), [(codes_OI, scales)], of.inputs, facts)


def correction(h_TI: Tensor, lacking_TO: Tensor, block_bytes: int) -> Tensor:
    """ΔW [O, I] that minimizes ‖lacking − H ΔWᵀ‖² + λ‖ΔW‖², by the normal equations in F64; F32."""
    inner, outer = h_TI.shape[1], lacking_TO.shape[1]
    gram_II = torch.zeros(inner, inner, dtype=torch.float64, device=h_TI.device)
    cross_IO = torch.zeros(inner, outer, dtype=torch.float64, device=h_TI.device)
    for span in spans(len(h_TI), 8 * (inner + outer), block_bytes):
        h_nI = h_TI[span].double()
        gram_II += h_nI.mT @ h_nI
        cross_IO += h_nI.mT @ lacking_TO[span].double()
    gram_II.diagonal().add_(RIDGE * gram_II.diagonal().mean())
    return torch.linalg.solve(gram_II, cross_IO).mT.float()


# Judging ----------------------------------------------------------------------------------------------------------


def fitted(blueprint: Blueprint, folder: Path, linears: Sequence[Linear], values: Sequence[Tensor]) -> list[Tensor]:
    """A `Change`: the shared experts as their files in `folder` have them."""
    found = {n.name: w_OI for n, w_OI in zip(linears, values)}
    for linear in filter(is_repairable, linears):
        found |= read_values(folder, blueprint, (linear,), bound(blueprint.source, blueprint.plan))
    return [found[n.name].to(w_OI.device) for n, w_OI in zip(linears, values)]


def measured(of: Repair, rows: TokenSet, seed: int, quiet: bool) -> dict[str, Any]:
    """KL of the cut and of the repaired model, their difference, and whether that is to be believed; one sweep for all."""
    run = of.run
    left_out = dropped(of.blueprint.plan.kept, run.architecture.experts)
    under_way = Sweep(range(run.architecture.layers), of.folder / JUDGED, of.inputs, run.device)

    def begin() -> Standing:
        hidden_BTD = run.embed(rows.ids_BT)
        cut = State(hidden_BTD, left_out)
        return Standing({SOURCE: State(hidden_BTD), CUT: cut, REPAIRED: cut})

    with progress("judge the repair", run.architecture.layers - under_way.done, "layers", quiet) as meter:
        step, end = partial(judge_step, of), partial(judged, run, rows, seed)
        return under_way.through(begin, step, end, lambda _: meter.advance(1))


def judge_step(of: Repair, layer: int, at: Standing) -> Standing:
    """One layer of the source, of the cut, and of the cut with the matrices that the overlay has."""
    change = partial(fitted, of.blueprint, of.folder)
    changed = {n.unit: change for n in of.blueprint.architecture.linears if is_repairable(n)}
    states = {**at.states, REPAIRED: replace(at.states[REPAIRED], changed=changed)}
    after = advanced(of.run, layer, replace(at, states=states))
    return replace(after, states={name: replace(state, changed={}) for name, state in after.states.items()})


def judged(run: LayerRun, rows: TokenSet, seed: int, at: Standing) -> dict[str, Any]:
    """Figures of the last states, and whether the repair is kept."""
    source, cut, repaired = (at.states[name].hidden_BTD for name in (SOURCE, CUT, REPAIRED))
    before, after = against(run, source, [cut, repaired], rows.ids_BT)
    kl_cut, kl_repaired = (Bootstrap(d, seed).mean(d["kl_nats"], within=(0.0, torch.inf)) for d in (before, after))
    difference = Bootstrap(after, seed).mean(after["kl_nats"] - before["kl_nats"], where_BS=before.counted_BS)
    sound = after.nonfinite["export"] <= before.nonfinite["export"]
    return {
        "kept": sound and difference.high is not None and difference.high < 0,
        "cut_nats": vars(kl_cut),
        "repaired_nats": vars(kl_repaired),
        "change_nats": vars(difference),
        "tokens": after.tokens,
        "rows": rows.rows,
    }


def sentence(facts: Mapping[str, Any]) -> str:
    """What the repair came to, for people."""
    change, before, after = (facts[name] for name in ("change_nats", "cut_nats", "repaired_nats"))
    error = "" if change["error"] is None else f" ± {change['error']:.4f}"
    moved = f"KL {before['value']:.4f} -> {after['value']:.4f} ({change['value']:+.4f}{error})"
    fitted = f"{facts['matrices']} shared experts fitted to the cut on {facts['fitted_tokens']:,} tokens"
    told = f"repair: {fitted}: {moved} on {facts['tokens']:,} others"
    return f"{told}; kept" if facts["kept"] else f"{told}; that is no gain beyond its error, so it was left out"
