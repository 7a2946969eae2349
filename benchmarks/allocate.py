"""The allocator on a problem of MiniMax-M2.7's size: objective, bits really spent, proven gap, CPU-seconds.

    python benchmarks/allocate.py [--instances ../shared/instances] [--seed 0] [--json]

Makes the instance with the generator in that folder, solves it, and has its `evaluate.py` judge every plan; prints
the figures beside those its README knows. Exit 1 if a plan is above its budget or behind the best of them.
Leaves out measuring harm: the instance states it.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.allocate.solver import Allocation, Choice, Frontier, Menu, keep_first

# Seed 0: a menu of ratios, any uniform count in the order of saliency, and PrismaQuant (April 2026) with the bits it spends.
KNOWN = {
    3.16: (0.0525635, 0.0509571, 0.0516595, 3.1721),
    3.20: (0.0514316, 0.0483406, 0.0509709, 3.2121),
    3.25: (0.0507933, 0.0451822, 0.0506265, 3.2616),
    3.30: (0.0505430, 0.0421881, 0.0504000, 3.3756),
    3.40: (0.0367724, 0.0367128, 0.0368131, 3.3997),
}


def menu_of(instance: dict[str, Any]) -> Menu:
    """The instance as a menu: a unit is a group whose matrices share a format, the weights are all there are."""
    meta = instance["meta"]
    kept = tuple(range(meta["prune"]["top_k"], meta["prune"]["num_experts"] + 1))
    harm = np.where(instance["legal"], instance["dloss"], np.inf)
    group, expert, layer = instance["group"], instance["unit_expert"], instance["unit_layer"]
    choices = []
    for g in range(group.max() + 1):
        rows = np.flatnonzero(group == g)
        stored_F, unit = instance["bytes"][rows].sum(0), f"{g:04d}"
        if expert[rows[0]] < 0:
            choices.append(Choice(unit, tuple(meta["formats"]), stored_F[:, None], harm[rows].sum(0)[:, None]))
            continue
        dropped_E = meta["prune"]["weight"] * instance["saliency"][layer[rows[0]]]
        rounded_FE = np.stack([np.bincount(expert[rows], column) for column in harm[rows].T])
        harm_FK, order_FE = keep_first(dropped_E, rounded_FE, kept)
        each_F = stored_F // len(dropped_E)
        choices.append(Choice(unit, tuple(meta["formats"]), each_F[:, None] * np.array(kept), harm_FK, order_FE))
    return Menu(tuple(choices), kept, np.zeros(len(kept), np.int64), meta["total_params"])


def solution_of(instance: dict[str, Any], plan: Allocation) -> dict[str, Any]:
    """The plan as `evaluate.py` reads it: formats by group, and who is dropped."""
    experts = instance["meta"]["prune"]["num_experts"]
    layers = dict(zip(instance["group"].tolist(), instance["unit_layer"].tolist()))
    dropped = {str(layers[int(unit)]): sorted(set(range(experts)) - set(ids)) for unit, ids in plan.experts.items()}
    return {"group_format": {str(int(unit)): name for unit, name in plan.formats.items()}, "dropped": dropped}


def run(instances: Path, seed: int) -> dict[str, Any]:
    """Figures of one seed: seconds of each part, and per target what the judge says of our plan."""
    spec = importlib.util.spec_from_file_location("judge", instances / "evaluate.py")
    assert spec and spec.loader
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instance.npz"
        call = [sys.executable, instances / "gen_instance.py", path, "--preset", "m27", "--scale", "balanced"]
        subprocess.run([*call, "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
        instance = judge.load(path)
    start = time.process_time()
    menu = menu_of(instance)
    read = time.process_time()
    frontier = Frontier.of(menu)
    traced = time.process_time()
    points = frontier.pareto()[0].size
    knee = frontier.plan(*frontier.knee())
    figures: dict[str, Any] = {
        "seed": seed,
        "menu_cpu_s": read - start,
        "frontier_cpu_s": traced - read,
        "pareto_cpu_s": time.process_time() - traced,
        "supported_points": int((frontier.price_KP > 0).sum()) + len(frontier.kept_K),
        "kept_counts": len(frontier.kept_K),
        "pareto_points": points,
        "knee": {"kept": knee.kept, "bits": menu.bits(knee.bytes), "harm": knee.harm},
        "targets": {},
    }
    for target in KNOWN:
        start = time.process_time()
        plan = frontier.fit(menu.budget_bytes(target))
        seconds = time.process_time() - start
        judged = judge.evaluate(instance, solution_of(instance, plan))
        figures["targets"][str(target)] = {
            "objective": judged["objective"],
            "bits": judged["bpp"],
            "bytes": round(judged["gb"] * 1e9),
            "budget": plan.budget_bytes,
            "kept": judged["kept_per_layer"],
            "mixed": judged["mixed_format_groups"] + judged["units_without_format"],
            "harm": plan.harm,
            "bound": plan.bound,
            "fit_cpu_s": seconds,
        }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "instances"
    parser.add_argument("--instances", type=Path, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    if not (options.instances / "gen_instance.py").is_file():
        print(f"{options.instances} holds no gen_instance.py; name the folder of instances", file=sys.stderr)
        return 2
    figures = run(options.instances, options.seed)
    failed = 0
    if options.json:
        print(json.dumps(figures))
    else:
        print(
            "{supported_points:,} supported points of {kept_counts} kept counts in {frontier_cpu_s:.3f} CPU-s".format(
                **figures
            )
        )
        print(f"knee: {figures['knee']}")
        print("target  objective   bits     kept  proven gap  CPU-s   ratio menu  any count  PrismaQuant at bits")
    for target, (menu, count, peer, peer_bits) in KNOWN.items():
        got = figures["targets"][str(target)]
        behind = options.seed == 0 and got["objective"] > min(menu, count, peer)
        failed += got["bits"] > target or got["mixed"] > 0 or behind
        if not options.json:
            row = f"{target:.2f}    {got['objective']:.7f}  {got['bits']:.5f}  {got['kept'][0]:3d}   "
            row += f"{got['harm'] - got['bound']:.1e}    {got['fit_cpu_s']:.3f}   "
            row += f"{menu:.7f}  {count:.7f}  {peer:.7f} {peer_bits:.4f}" if options.seed == 0 else ""
            print(row + ("   BEHIND OR ABOVE" if behind or got["bits"] > target else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
