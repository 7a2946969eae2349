"""Roundings on one matrix [3072, 6144]: held-out output error, CPU-seconds, peak memory; beside other people's GPTQ.

    python benchmarks/rounding.py [--formats int4_g128 nvfp4 mxfp4] [--ways rtn search gptq descent] [--rows 4096]
                                  [--peer PYTHON]  (an interpreter that can import llmcompressor and gptqmodel)

Activations are synthetic and strongly correlated (rank 512 with a power law, noise, 12 outlier channels), so
gains over RTN are larger than on a model: compare ways, not absolutes. Every figure comes from a process of its
own with one thread, on the same data; output error is ‖(value − w) X‖² / ‖w X‖². Leaves out models: docs/LOG.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.formats import FORMATS
from moesaic.rounding import ROUNDINGS, Batch

HELD_OUT = 1024


def data(rows: int, out: int, width: int) -> dict[str, Tensor]:
    """A weight with rows and columns of unlike size and some outliers, and inputs that leave few directions free."""
    g = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    rank = min(512, width)
    mix = gaussian(rank, width) * torch.arange(1, rank + 1)[:, None] ** -0.5
    x = gaussian(rows + HELD_OUT, rank) @ mix + 0.3 * gaussian(rows + HELD_OUT, width)
    x[:, torch.randperm(width, generator=g)[:12]] *= 20
    w = 0.02 * gaussian(out, width) * (0.3 * gaussian(out, 1)).exp() * (0.3 * gaussian(1, width)).exp()
    w[torch.rand(w.shape, generator=g) < 0.0005] *= 4
    return {"w": w, "x": x[:rows].contiguous(), "heldout": x[rows:].contiguous()}


def output_error(w: Tensor, value: Tensor, x: Tensor) -> float:
    return float(((w - value) @ x.T).square().sum() / (w @ x.T).square().sum())


def measure(path: Path, way: str, format_name: str) -> dict[str, float]:
    """One way in this process. Peak memory counts what the data takes: see the way called "rtn"."""
    found, format = load_file(path), FORMATS[format_name]
    w, x, heldout = found["w"], found["x"], found["heldout"]
    started = time.process_time()
    hessian = x.T @ x / len(x)
    hessian_seconds = time.process_time() - started
    batch = Batch(w[None], torch.tensor([len(x)]), hessian[None])
    started = time.process_time()
    rounded = ROUNDINGS[way].round(batch, format)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    value = rounded.values(format)[0]
    return {
        "hessian_cpu_s": hessian_seconds,
        "solve_cpu_s": seconds,
        "peak_mb": peak / 1e6,
        "calibration_error": output_error(w, value, x),
        "heldout_error": output_error(w, value, heldout),
        "weight_error": output_error(w, value, torch.eye(w.shape[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["int4_g128", "nvfp4", "mxfp4"])
    parser.add_argument("--ways", nargs="+", default=["rtn", "search", "gptq", "descent"])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--shape", type=int, nargs=2, default=(3072, 6144))
    parser.add_argument("--peer", type=Path, help="python of an environment with llm-compressor and GPTQModel")
    parser.add_argument("--data", type=Path, help="(for this script's own processes)")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.data:
        print(json.dumps(measure(a.data, a.ways[0], a.formats[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.safetensors"
        save_file(data(a.rows, *a.shape), path)
        for format in a.formats:
            commands = {
                way: [sys.executable, __file__, "--data", str(path), "--ways", way, "--formats", format]
                for way in a.ways
            }
            if a.peer:
                peer = Path(__file__).with_name("rounding_peer.py")
                for name in ("llm-compressor", "gptqmodel") if format.startswith("int") else ("llm-compressor",):
                    commands[name] = [str(a.peer), "-P", str(peer), str(path), format, name]
            for way, command in commands.items():
                run = json.loads(subprocess.check_output(command).splitlines()[-1])
                print(f"{format:10} {way:15}", "  ".join(f"{k} {v:.4g}" for k, v in run.items()), flush=True)


if __name__ == "__main__":
    main()
