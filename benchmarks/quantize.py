"""What `quantize` costs end to end, beside its own kernels, cp of what it writes, and other people's tools.

    python benchmarks/quantize.py MODEL [--format mxfp4] [--repeats 5] [--peers [--llm-compressor PYTHON]] [--folder DIR]

MODEL is a layer of the real dimensions, as a checkpoint. "kernels" is the arithmetic alone: every matrix is read
before its time is taken. "cp" is `cp --reflink=never` of the shards that quantize writes. Every run is a process of its
own that starts with the source in the page cache and nothing left to write back; its start does not count. Medians of
`--repeats` runs; scale search and verification run once.
Peers take BF16 alone: --peers wants a BF16 layer, and runs each once, in MXFP4: llm-compressor's `model_free_ptq` with
the Python that has it, torchao and compressed-tensors in a loop over the shards that does no more than read, round
and save, since they have no such command. What is not installed is named and left out. CPU-seconds are of all threads.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from prune import warm
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import siblings
from moesaic.formats import FORMATS
from moesaic.kernels.cpu import TARGETS, amax, prepare, requantize
from moesaic.recipes.quantize import Quantizing, quantize

WAYS = ("cp", "kernels", "quantize")
ONCE = ("quantize, scale search", "quantize, verified")
PEERS = {"compressed-tensors": "compressed_tensors", "torchao": "torchao"}
EXPERT = re.compile(r".*\.experts\.\d+\.w[123]\.weight")
MODEL_FREE = """
import json, resource, sys, time
from llmcompressor import model_free_ptq
wall, cpu = time.perf_counter(), time.process_time()
model_free_ptq(sys.argv[1], sys.argv[2], scheme="MXFP4A16", ignore=[r"re:^(?!.*experts\\.\\d+\\.w[123]$).*"], device="cpu")
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "peak_mb": peak}))
"""


def kernel_seconds(source: Checkpoint, format: str) -> float:
    """CPU-seconds of the kernels alone over every expert of a model; what they write is dropped."""
    target, total = FORMATS[format], 0.0
    experts = siblings([linear for linear in source.architecture.linears if linear.role == "experts"])
    for group in experts:
        stored = [(source.formats[linear.name], source.parts(linear)) for linear in group]
        before = time.process_time()
        shared = None
        if target.share:
            shared = target.share(torch.stack([amax(f, p["codes"], p.get("blocks")) for f, p in stored]).max())
        for f, parts in stored:
            requantize(f, parts["codes"], parts.get("blocks"), target, shared=shared)
        total += time.process_time() - before
    return total


def measure(way: str, model: Path, made: Path, out: Path, format: str) -> dict[str, float]:
    """One way, once, in this process. `made` is an export to copy."""
    prepare(TARGETS, quiet=True)
    source, files = Checkpoint.open(model), sorted(made.glob("*.safetensors"))
    who = resource.RUSAGE_CHILDREN if way == "cp" else resource.RUSAGE_SELF
    wall, cpu = time.perf_counter(), cpu_seconds(who)
    if way == "cp":
        out.mkdir()
        subprocess.run(["cp", "--reflink=never", *map(str, files), str(out)], check=True)
    elif way == "kernels":
        spent = kernel_seconds(source, format)
        return {"seconds": spent, "cpu_seconds": spent}
    elif way in PEERS:
        out.mkdir()
        in_a_loop(way, model, out)
    else:
        rounding = "search" if "search" in way else "rtn"
        quantize(model, out, Quantizing(format, rounding=rounding, check="verified" in way), quiet=True)
    peak = resource.getrusage(who).ru_maxrss * 1024 / 1e6
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds(who) - cpu, "peak_mb": peak}


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def in_a_loop(peer: str, model: Path, out: Path) -> None:
    """MXFP4 by a library's own functions, shard by shard."""
    if peer == "torchao":
        mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")

        def compress(w: Tensor) -> tuple[Tensor, Tensor]:
            scale, packed = mx.to_mx(w, torch.float4_e2m1fn_x2, 32)
            return packed.view(torch.uint8), scale.view(torch.uint8)
    else:
        quantization = importlib.import_module("compressed_tensors.quantization")
        numbers = importlib.import_module("compressed_tensors.quantization.utils")
        fp4 = importlib.import_module("compressed_tensors.compressors.nvfp4")
        args = quantization.QuantizationArgs(
            num_bits=4, type="float", strategy="group", group_size=32, symmetric=True,
            scale_dtype=torch.uint8, zp_dtype=torch.uint8,
        )  # fmt: skip

        def compress(w: Tensor) -> tuple[Tensor, Tensor]:
            blocks = w.reshape(len(w), -1, 32)
            scale, _ = numbers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, None)
            return fp4.quantize_and_pack_fp4(w, scale, None, group_size=32), scale

    for file in sorted(model.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [n for n in tensors if EXPERT.fullmatch(n)]:
            packed, scale = compress(tensors.pop(name))
            tensors |= {f"{name}_packed": packed, f"{name}_scale": scale}
        save_file(tensors, out / file.name)


def run(words: list[str], model: Path, made: Path, out: Path) -> dict[str, float]:
    """One process that prints its figures last, from a warm cache; what it wrote is removed."""
    warm(model)
    warm(made)
    os.sync()
    found: dict[str, float] = json.loads(subprocess.check_output(words).splitlines()[-1])
    shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="mxfp4", help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="a Python that has it")
    parser.add_argument("--folder", type=Path, help="where some gigabytes may lie for a while")
    parser.add_argument("--way", help="run this one here and print JSON")
    a = parser.parse_args()
    if a.way:
        print(json.dumps(measure(a.way, a.model, a.folder / "made", a.folder / "out", a.format)))
        return
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        made, out = Path(name) / "made", Path(name) / "out"
        quantize(a.model, made, Quantizing(a.format, check=False))
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS + ONCE}
        for way in WAYS * a.repeats + ONCE:  # in turn, so that a busy spell of the machine meets all of them
            words = [sys.executable, __file__, str(a.model), "--format", a.format, "--folder", name, "--way", way]
            runs[way].append(run(words, a.model, made, out))
        for peer, module in PEERS.items() if a.peers else ():
            if importlib.util.find_spec(module):
                words = [sys.executable, __file__, str(a.model), "--folder", name, "--way", peer]
                runs[peer] = [run(words, a.model, made, out)]
            else:
                print(f"{peer} is not installed, left out")
        if a.llm_compressor:
            words = [a.llm_compressor, "-c", MODEL_FREE, str(a.model), str(out)]
            runs["llm-compressor"] = [run(words, a.model, made, out)]
        source_bytes, out_bytes = warm(a.model), warm(made)
    found = {way: {k: statistics.median(r[k] for r in each) for k in each[0]} for way, each in runs.items()}
    print(f"{a.model.name}: {source_bytes / 1e9:.2f} GB read, {out_bytes / 1e9:.2f} GB written as {a.format}")
    for way, f in found.items():
        peak = f"{f['peak_mb']:7,.0f} MB peak" if "peak_mb" in f else ""
        print(f"{way:22} {f['seconds']:7.2f} s  {f['cpu_seconds']:7.2f} CPU-s  {peak}")
    aim = found["kernels"]["cpu_seconds"] + 1.5 * found["cp"]["cpu_seconds"]
    print(f"quantize over (kernels + 1.5 cp): {found['quantize']['cpu_seconds'] / aim:.2f} in CPU-seconds")
    print(json.dumps({"load_average": os.getloadavg(), **found}))


if __name__ == "__main__":
    main()
