"""`export` of a layer of real dimensions, container by container: bytes a second, CPU seconds, peak memory.

    python benchmarks/export.py LAYER [--folder DIR] [--cases NAME …]

LAYER is a model folder, such as make_replica.py writes with `--family m3 --preset layer`. Each case is a process of
its own and starts with the source in the page cache; its own time alone counts, without its start. Compiled
kernels come from their cache. Conversions start from the compressed-tensors export. Leaves out verify.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prune import warm

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.export import export
from moesaic.plan import SOURCE, Plan
from moesaic.plan.blueprint import Blueprint

CASES = {  # name -> (container, format of experts, whether from the INT4 export instead of the source)
    "mxfp4": ("compressed_tensors", "mxfp4", False),
    "nvfp4": ("compressed_tensors", "nvfp4", False),
    "int4": ("compressed_tensors", "int4_g64", False),
    "int3": ("compressed_tensors", "int3_g64", False),
    "auto_round int4": ("auto_round", "int4_g64", False),
    "gptq int4": ("gptq", "int4_g64", False),
    "mlx mxfp4": ("mlx", "mxfp4", False),
    "mlx nvfp4": ("mlx", "nvfp4", False),
    "mlx affine4": ("mlx", "affine4_g64", False),
    "mlx copied": ("mlx", SOURCE, False),
    "int4 to mlx": ("mlx", SOURCE, True),
}


def plan_of(source: Checkpoint, container: str, format: str) -> Plan:
    """Experts in `format`, the rest as it is, or in BF16 where the container cannot hold it."""
    held = set(source.formats.values()) <= set(CONTAINERS[container].packings)
    units = source.architecture.units.items()
    rest = SOURCE if held else "bf16"
    return Plan(container, formats={unit: format if n[0].role == "experts" else rest for unit, n in units})


def measure(name: str, source: Checkpoint, out: Path) -> dict[str, float]:
    """One export, in this process."""
    container, format, _ = CASES[name]
    plan = plan_of(source, container, format)
    first = Blueprint.of(source, plan)
    read, written = sum(s.info.bytes for s in source.stored.values()), first.payload_bytes
    wall, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    export(source, plan, out, quiet=True)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    peak, before = after.ru_maxrss * 1024 / 1e6, used.ru_maxrss * 1024 / 1e6
    return {
        "read_bytes": read, "written_bytes": written, "seconds": wall, "cpu_seconds": cpu, "peak_mb": peak,
        "peak_before_mb": before, "source_gb_per_second": read / 1e9 / wall,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layer", type=Path)
    parser.add_argument("--folder", type=Path, help="where some gigabytes may lie for a while")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--run", choices=CASES, help="run this one here and print JSON")
    a = parser.parse_args()
    if a.run:
        print(json.dumps(measure(a.run, Checkpoint.open(a.layer), a.folder / "out")))
        return
    found = {}
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder, source = Path(name), Checkpoint.open(a.layer)
        if any(CASES[case][2] for case in a.cases):
            export(source, plan_of(source, *CASES["int4"][:2]), folder / "int4", quiet=True)
        for case in a.cases:
            start = folder / "int4" if CASES[case][2] else a.layer
            warm(start)
            words = [sys.executable, __file__, str(start), "--folder", str(folder), "--run", case]
            found[case] = json.loads(subprocess.check_output(words).splitlines()[-1])
            shutil.rmtree(folder / "out")
            f = found[case]
            sizes = f"{f['read_bytes'] / 1e9:5.2f} -> {f['written_bytes'] / 1e9:5.2f} GB"
            costs = f"{f['source_gb_per_second']:5.2f} GB/s  {f['cpu_seconds']:6.2f} CPU s"
            print(f"{case:15} {sizes}  {costs}  {f['peak_mb']:6,.0f} MB peak ({f['peak_before_mb']:,.0f} before)")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
