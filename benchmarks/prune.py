"""What `prune` writes, against `cp --reflink=never` of the same bytes: bytes a second, CPU seconds, peak memory.

    python benchmarks/prune.py GENERATOR [--experts 32] [--keep 16] [--repeats 5] [--folder DIR]

GENERATOR writes a layer of the real dimensions (`--family m3 --preset layer --experts N --out DIR`). The
source, and what cp copies, are read once before, so that all come from the page cache; each run is a
process of its own, begins with nothing left to write back, and its own time alone counts, without its
start. "synced" adds the time until the files are on the disk, to either side alike. Leaves out the sweep
that ranks experts, which is `benchmarks/stream.py`'s.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moesaic.checkpoint import Checkpoint
from moesaic.export import export
from moesaic.plan import Plan
from moesaic.verify import verify

WAYS = ("cp", "prune", "cp, synced", "prune, synced", "verify")


def plan_of(source: Checkpoint, keep: int) -> Plan:
    """Every other expert, from the second on in every second layer: as scattered as a cut can be."""
    step = source.architecture.experts / keep
    kept = {
        layer: tuple(int((i + layer % 2 / 2) * step) for i in range(keep)) for layer in source.architecture.moe_layers
    }
    return Plan(source.container.name, kept)


def warm(folder: Path) -> int:
    """Read every shard; returns their bytes."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as f:
            while chunk := f.read(1 << 24):
                total += len(chunk)
    return total


def on_disk(folder: Path) -> None:
    for file in sorted(folder.glob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(way: str, source: Path, made: Path, out: Path, keep: int) -> dict[str, float]:
    """One way, once, in this process. `made` is an export to copy or to verify."""
    checkpoint = Checkpoint.open(source)
    plan = plan_of(checkpoint, keep)
    wall, before = time.perf_counter(), resources(way)
    if way.startswith("cp"):
        out.mkdir()
        files = sorted(made.glob("*.safetensors"))
        subprocess.run(["cp", "--reflink=never", *map(str, files), str(out)], check=True)
    elif way.startswith("prune"):
        export(checkpoint, plan, out, quiet=True)
    else:
        assert verify(made, checkpoint, quiet=True).holds
    if way.endswith("synced"):
        on_disk(out)
    wall, after = time.perf_counter() - wall, resources(way)
    found = {"seconds": wall, "cpu_seconds": after[0] - before[0]}
    return found if way.startswith("cp") else found | {"peak_mb": after[1]}


def resources(way: str) -> tuple[float, float]:
    """CPU seconds so far and peak memory in MB, of this process or of the cp that it runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN if way.startswith("cp") else resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def repeat(folder: Path, source: Path, keep: int, repeats: int) -> dict[str, dict[str, float]]:
    """Medians by way; ways in turn, so that a busy spell of the machine meets all of them."""
    made, out = folder / "made", folder / "out"
    export(Checkpoint.open(source), plan_of(Checkpoint.open(source), keep), made, quiet=True)
    total = warm(made)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for way in WAYS * repeats:
        warm(source)
        os.sync()
        words = [sys.executable, __file__, str(source), "--way", way, "--folder", str(folder), "--keep", str(keep)]
        runs[way].append(json.loads(subprocess.check_output(words).splitlines()[-1]))
        shutil.rmtree(out, ignore_errors=True)
    found = {way: {key: statistics.median(r[key] for r in each) for key in each[0]} for way, each in runs.items()}
    for figures in found.values():
        figures["gb_per_second"] = total / 1e9 / figures["seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "generator", type=Path, help="the program that writes the layer, or a layer that it has written"
    )
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where some gigabytes may lie for a while (default: a temporary folder)"
    )
    parser.add_argument("--way", choices=WAYS, help="run this one here and print JSON")
    a = parser.parse_args()
    if a.way:
        print(json.dumps(measure(a.way, a.generator, a.folder / "made", a.folder / "out", a.keep)))
        return
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        source = a.generator if a.generator.is_dir() else folder / "source"
        if source != a.generator:
            words = ["--family", "m3", "--preset", "layer", "--experts", str(a.experts), "--out", str(source)]
            subprocess.run([sys.executable, str(a.generator), *words], check=True)
        found = repeat(folder, source, a.keep, a.repeats)
    for way, f in found.items():
        peak = f"{f['peak_mb']:7,.0f} MB peak" if "peak_mb" in f else ""
        print(f"{way:14} {f['gb_per_second']:6.2f} GB/s  {f['cpu_seconds']:6.2f} CPU s  {peak}")
    for kind in ("", ", synced"):
        ratio = found[f"prune{kind}"]["gb_per_second"] / found[f"cp{kind}"]["gb_per_second"]
        print(f"prune{kind} over cp{kind}: {ratio:.2f} of its bytes a second")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
