"""The routed experts of one layer of real dimensions, rounded on text: CPU-seconds and peak memory, and what all take.

    python benchmarks/sequential.py LAYER [--tokens 12288] [--format int4_g128] [--way gptq] [--of 128 --layers 57]

LAYER is a model folder, such as make_replica.py writes with `--family m3 --preset layer --experts 16`; what an expert
takes is taken for what each of --of of them takes. As many tokens as GPTQ looks at of a layer's at large (two a column)
make an expert of 16 see more of its own than one of 128 does by default, 2,048. Reading, decoding, packing and writing
count; attention and the sweep do not. Tokens are drawn evenly, seed 0. Leaves out how good the result is.
"""

import argparse
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from stream import final

from moesaic.checkpoint import Checkpoint
from moesaic.export.sequential.layer import SequentialRounding
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.recipes.quantize import formats_of
from moesaic.rounding import ROUNDINGS
from moesaic.stream import LayerRun, Observer, Routing, State

LENGTH = 2048


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--format", default="int4_g128")
    parser.add_argument("--way", default="gptq")
    parser.add_argument("--of", type=int, default=128)
    parser.add_argument("--layers", type=int, default=57)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    source = Checkpoint.open(a.model)
    plan = Plan("compressed_tensors", {}, formats_of(source, a.format, "experts", "source"), a.way)
    run, generator = LayerRun(source), torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, source.architecture.vocab, (a.tokens // LENGTH, LENGTH), generator=generator)
    began = State(run.embed(ids_BT))

    def take(work: SequentialRounding, seen: Routing) -> None:
        before, wall, cpu = peak_gb(), time.perf_counter(), time.process_time()
        work.round_experts(began, seen)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        experts = source.architecture.experts
        counts = [facts["tokens"] for facts in work.facts[-2 * experts :]]
        layer_s = cpu / experts * a.of
        print(
            f"{a.way} {a.format}: {experts} experts, {min(counts):,} to {max(counts):,} tokens each; {cpu:.0f} CPU-s "
            f"({wall:.0f} s), {cpu / experts:.1f} an expert, peak {peak_gb():.2f} GB ({before:.2f} before); "
            f"{a.of} experts {layer_s / 60:.0f} CPU-min, {a.layers} such layers {layer_s * a.layers / 3600:.0f} CPU-hours",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        work = SequentialRounding(Blueprint.of(source, plan), ROUNDINGS[a.way], run, Path(folder), {})
        watched = State(began.hidden_BTD, observer=Observer(route=partial(take, work)))
        final(run, [watched])


if __name__ == "__main__":
    main()
