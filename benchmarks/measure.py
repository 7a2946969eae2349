"""Do prices predict what plans cost, and does the plan that they choose beat uniform ones of the same bytes?

    python benchmarks/measure.py [MODEL] RUN [--data DIR --heldout DIR] [--price-tokens N] [--tokens N] [--plans N]

Prices every option and fits the rule on some rows of calibration text; then measures plans that neither has seen, on
text that neither has seen: rank correlation, and how far predictions are off. The same, each with a rule of its own fitted on
the same plans, for the surrogate (by token and by sequence), for anchored prices, for ½ · trace(H) · MSE with 3 α S, and
for weight error and output error, which need no model behind the unit. Then, at six sizes of disk, the plan chosen
against others (contest.py), all measured on yet other rows. Everything is kept in RUN, and the same call continues.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Rivals, contests, learned

from moesaic.allocate import FORMATS_OFFERED, Setting, Traced
from moesaic.allocate.candidates import menu_of, plan_of, sums, uniform, varied
from moesaic.allocate.choice import learn
from moesaic.allocate.solver import Frontier, Menu
from moesaic.artifact import identity
from moesaic.calibrate import Statistics, calibrate
from moesaic.calibrate.selection import order_experts, scores
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet
from moesaic.measure import (
    ANCHORED,
    SURROGATE,
    TRACE,
    Branch,
    Options,
    Price,
    Prices,
    Rule,
    Sensed,
    Trial,
    default_counts,
    effort,
    offers,
    price,
    sense,
    some_rows,
    trace,
)
from moesaic.measure.anchored import between, ends
from moesaic.measure.branch import changes
from moesaic.measure.branches import state_of
from moesaic.measure.composition import line
from moesaic.plan import SOURCE
from moesaic.recipes.demo import MODEL
from moesaic.stream import LayerRun, State

CONTAINER = CONTAINERS["compressed_tensors"]
LOW = 0.3  # nats below which a prediction should be within a factor of 2
Plans = list[tuple[dict[str, str], int]]


def ranks(x_N: np.ndarray) -> np.ndarray:
    """0 … N − 1; equals share a rank."""
    return (x_N[None] < x_N[:, None]).sum(1) + ((x_N[None] == x_N[:, None]).sum(1) - 1) / 2


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    return float(np.corrcoef(ranks(x_N), ranks(y_N))[0, 1])


def local_errors(source: Checkpoint, prices: Prices, tokens: TokenSet) -> dict[str, dict[Any, float]]:
    """For each option (unit, format) and (layer, kept): Σ‖ΔW‖² over its matrices, and ‖Δh‖² / ‖h‖² after its layer."""
    run, a = LayerRun(source), source.architecture
    options = [(u, f) for u, of in prices.rounded.items() for f in of if f != SOURCE]
    cuts = [(layer, k) for layer, of in prices.dropped.items() for k in of]
    branches = {key: Branch({key[0]: key[1]}) for key in options}
    branches |= {
        (layer, k): Branch({}, {layer: tuple(sorted(prices.order_LE[list(prices.dropped).index(layer)][:k].tolist()))})
        for layer, k in cuts
    }
    way = changes(list(branches.values()), "rtn")
    weight, output = {}, {}
    state = State(run.embed(tokens.ids_BT))
    for layer in range(a.layers):
        mine = {key: b for key, b in branches.items() if b.first(a) == layer}
        states = [state, *(state_of(run, b, state.hidden_BTD, way) for b in mine.values())]
        state, *after = run.advance(layer, states)
        size = float(state.hidden_BTD.square().sum())
        for key, s in zip(mine, after):
            output[key] = float((s.hidden_BTD - state.hidden_BTD).square().sum()) / size
    for unit, format in options:
        groups: dict[int | None, list[Any]] = {}
        for n in a.units[unit]:
            groups.setdefault(n.expert, []).append(n)
        weight[unit, format] = 0.0
        for group in groups.values():
            w = [source.decode(n.name) for n in group]
            weight[unit, format] += sum(float((b - c).square().sum()) for b, c in zip(way[format](group, w), w))
    for layer, k in cuts:
        gone = prices.order_LE[list(prices.dropped).index(layer)][k:].tolist()
        weight[layer, k] = sum(
            float(source.decode(n.name).square().sum()) for e in gone for n in a.experts_of[layer, e].values()
        )
    return {"weight error": weight, "output error": output}


def scored(prices: Prices, errors: dict[Any, float], plans: Plans) -> np.ndarray:
    """Σ of an error over a plan's units; between measured kept counts by experts dropped."""
    found = []
    for formats, kept in plans:
        total = sum(errors[u, f] for u, f in formats.items() if f != SOURCE)
        for layer, of in prices.dropped.items():
            gone = prices.order_LE.shape[1] - np.array([prices.order_LE.shape[1], *of])
            total += float(np.interp(prices.order_LE.shape[1] - kept, gone, [0.0, *(errors[layer, k] for k in of)]))
        found.append(total)
    return np.array(found)


def random_plans(menu: Menu, count: int, seed: int) -> Plans:
    """Every unit a format at random, and any kept count: no plan that anybody would want, but a hard test."""
    rng = np.random.default_rng(seed)
    return [
        ({c.unit: str(rng.choice(c.formats)) for c in menu.choices}, int(rng.choice(menu.kept))) for _ in range(count)
    ]


def unseen(source: Checkpoint, prices: Prices, menu: Menu, count: int) -> Plans:
    """Plans near the frontier from other disturbed prices, plans at random, and all uniform ones at three kept counts."""
    plans = varied(menu, count // 2, seed=1) + random_plans(menu, count // 4, seed=2)
    for format in dict.fromkeys(f for c in menu.choices for f in c.formats):
        plans += [(uniform(menu, format, at)[0], menu.kept[at]) for at in (len(menu.kept) - 1, len(menu.kept) // 2, 0)]
    return [p for p in plans if p != (dict.fromkeys(p[0], SOURCE), source.architecture.experts)]


def told(name: str, predicted_N: np.ndarray, kl_N: np.ndarray) -> dict[str, Any]:
    ratio = predicted_N / kl_N
    low = kl_N < LOW
    found = {
        "spearman": spearman(predicted_N, kl_N),
        "ratio_geometric_mean": float(np.exp(np.log(ratio).mean())),
        "ratio_rms_factor": float(np.exp(np.sqrt((np.log(ratio) ** 2).mean()))),
        "ratio_low": float(ratio[low].min()), "ratio_high": float(ratio[low].max()),
        "within_2": float(((ratio[low] > 0.5) & (ratio[low] < 2)).mean()),
    }  # fmt: skip
    print(
        f"{name:<22} Spearman {found['spearman']:.3f}   predicted/measured {found['ratio_geometric_mean']:.2f}, off by a factor "
        f"{found['ratio_rms_factor']:.2f} (rms), {found['ratio_low']:.2f} to {found['ratio_high']:.2f} and "
        f"{found['within_2']:.0%} within 2 where KL < {LOW}",
        flush=True,
    )
    return found


def predictions(
    setting: Setting, traced: Traced, tables: dict[str, Prices], text: TokenSet, fresh: TokenSet, count: int
) -> dict[str, Any]:
    """Plans that nothing was fitted on, on text that nothing was fitted on."""
    source, prices, rule = setting.source, traced.prices, traced.rule
    plans = unseen(source, prices, traced.menu, count)
    measured = setting.measure([plan_of(setting, prices, f, k) for f, k in plans], fresh, "unseen")
    kl_N = np.array([m.nats for m in measured])
    used = np.isfinite(kl_N)
    doubt = np.median([m.error / m.nats for m in measured])
    print(
        f"\n{used.sum()} unseen plans on {fresh.tokens:,} unseen tokens: KL {kl_N[used].min():.4f} to "
        f"{kl_N[used].max():.3f} nats, median relative error of a measurement {doubt:.1%}"
    )
    both = np.array([sums(prices, f, k) for f, k in plans])
    total_N = both[:, 0] + rule.weight * both[:, 1]
    facts = {"rule": told("rule", rule.predict(total_N)[used], kl_N[used])}
    facts["sum"] = told("sum of prices", both.sum(1)[used], kl_N[used])
    fitted = learned(setting.run)
    kl_fit_N = np.log(fitted[1])
    for name, other in tables.items():
        theirs = Rule.fit(*np.array([sums(other, f, k) for f, k in fitted[0]]).T, fitted[1])
        sums_N2 = np.array([sums(other, f, k) for f, k in plans])
        facts[name] = told(name, theirs.predict(theirs.total(*sums_N2.T))[used], kl_N[used])
    for name, errors in local_errors(source, prices, text).items():
        _, at, slope = line(np.log(scored(prices, errors, fitted[0])), kl_fit_N)
        facts[name] = told(name, np.exp(at + slope * np.log(scored(prices, errors, plans)))[used], kl_N[used])
    facts["plans"] = [
        {"experts": k, "predicted": float(rule.predict(t)), "nats": m.nats, "error": m.error}
        for (_, k), t, m in zip(plans, total_N, measured)
    ]
    return facts


def others(source: Checkpoint, prices: Prices, menu: Menu, run: Path, text: TokenSet) -> dict[str, Prices]:
    """The same options, in the same order of experts, priced from slopes: three ways."""
    options = Options(
        units={unit: tuple(of) for unit, of in prices.rounded.items()},
        counts=[n for n in reversed(menu.kept) if n < source.architecture.experts],
        order_LE=prices.order_LE,
    )
    began, trial = time.process_time(), Trial(text)
    sensed = sense(source, options, trial, run / "slopes")
    print(f"surrogate: {time.process_time() - began:.0f} CPU-s (0 if it was there) for {len(sensed)} options")
    rows_B2 = np.stack([[s.by_sequence_B, s.by_token_B] for s in sensed.values()]).sum(0).T
    ratio, halves = rows_B2.sum(0), [rows_B2[half::2].sum(0) for half in (0, 1)]
    print(
        f"by sequence / by token, all options: {ratio[0] / ratio[1]:.3f}; halves {halves[0][0] / halves[0][1]:.3f}, "
        f"{halves[1][0] / halves[1][1]:.3f}; by token, a half over the other {halves[0][1] / halves[1][1]:.3f}"
    )
    layers = source.architecture.moe_layers
    found = {
        name: Prices.of(SURROGATE, options, layers, text.tokens, {key: of(s) for key, s in sensed.items()})
        for name, of in (("surrogate", by_token), ("surrogate by sequence", by_sequence))
    }
    few = {unit: {f: of[f] for f in ends(found["surrogate"].rounded[unit])} for unit, of in prices.rounded.items()}
    cuts = {layer: {min(of): of[min(of)]} for layer, of in prices.dropped.items()}
    anchors = Prices(few, cuts, prices.order_LE, prices.tokens)
    found["anchored"] = Prices.of(ANCHORED, options, layers, text.tokens, between(found["surrogate"], anchors))
    saliency_LE = scores(Statistics.load(run / "stats", source), "dropout", "pooled")
    return {**found, TRACE: trace(source, options, saliency_LE, trial, run / "theirs")}


def by_token(sensed: Sensed) -> Price:
    return sensed.price


def by_sequence(sensed: Sensed) -> Price:
    return Price(float(sensed.by_sequence_B.mean()), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--calibration", type=int, default=16_384, metavar="N")
    parser.add_argument("--price-tokens", type=int, default=2_048, metavar="N")
    parser.add_argument(
        "--slope-tokens", type=int, default=8_192, metavar="N", help="for prices from slopes, which cost less"
    )
    parser.add_argument(
        "--tokens", type=int, default=4_096, metavar="N", help="to judge plans by; as many again for contests"
    )
    parser.add_argument("--plans", type=int, default=64)
    a = parser.parse_args()
    torch.set_num_threads(1)
    source, corpus = Checkpoint.open(a.model), Corpus(a.data, a.heldout, a.calibration, 256)
    calibration = corpus.calibration(source, a.run / "tokens.safetensors")
    judge = corpus.evaluation(source, a.run / "evaluation.safetensors", 2 * a.tokens)
    first, second = (judge.take(list(range(half, judge.rows, 2))) for half in (0, 1))
    statistics = calibrate(source, calibration, a.run / "stats")
    architecture = source.architecture
    text = some_rows(calibration, a.price_tokens)
    options = Options(
        units=offers(source, CONTAINER, FORMATS_OFFERED),
        counts=default_counts(architecture.experts, architecture.top_k),
        order_LE=order_experts(statistics, "reap"),
    )
    began = time.monotonic()
    prices = price(source, options, Trial(text), a.run)
    print(f"prices: {time.monotonic() - began:.0f} s (0 if they were there)")
    rounded = [Branch({u: f}) for u, f in options.rounded]
    print(f"one sweep: {effort(source, rounded, text.tokens, 4 << 30)}")
    kept = list(range(min(options.counts), architecture.experts + 1))
    setting = Setting(source, a.run)
    rule = learn(setting, prices, text)
    print(f"rule: {rule}")
    menu = menu_of(source, CONTAINER, prices, kept, rule.weight)
    slopes = some_rows(calibration, a.slope_tokens)
    tables = others(source, prices, menu, a.run, slopes)
    traced = Traced(prices, rule, menu, Frontier.of(menu), None)
    facts = {"predictions": predictions(setting, traced, tables, text, first, a.plans)}
    rivals = Rivals(setting, prices, tables, menu, statistics)
    facts["contests"] = contests(rivals, rule, first, second)
    (a.run / "benchmark.json").write_text(json.dumps(facts, indent=1))
    print(f"every figure: {a.run / 'benchmark.json'} ({identity(facts)})")


if __name__ == "__main__":
    main()
