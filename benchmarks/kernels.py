"""How fast the kernels are beside memcpy and other people's code: `python benchmarks/kernels.py OUT.json [--rows N]`.

One matrix [rows, 6144] with the spread of real weights. GB are those of the matrix in BF16 ("source": of the bytes
read), seconds are CPU-seconds of one thread, the best of three. Times are printed and written, never asserted:
they depend on the machine and on who shares it. A peer that is not installed is named and left out. Leaves out the
disk, and GPUs.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.formats import FORMATS, NumberFormat
from moesaic.kernels.cpu import Requantized, requantize

COLUMNS = 6144
TARGETS = (
    "mxfp4",
    "nvfp4",
    "int2_g64",
    "int3_g64",
    "int4_g32",
    "int4_g128",
    "int8_g128",
    "fp8_block",
    "fp8_channel",
    "mxfp8",
)
SEARCHED = ("mxfp4", "nvfp4", "int2_g64", "int3_g64", "int4_g32", "int4_g128")
PEERS = {"compressed-tensors": "compressed_tensors", "torchao": "torchao"}


@dataclass(frozen=True)
class Row:
    who: str
    source: str
    target: str
    cpu_seconds: float
    gb_bf16_per_cpu_second: float
    gb_source_per_cpu_second: float
    relative_squared_error: float | None = None


def weights(rows: int) -> Tensor:
    """BF16, rows of different size, a few outliers."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(rows, COLUMNS, generator=g) * torch.exp(0.3 * torch.randn(rows, 1, generator=g)) * 0.02
    return torch.where(torch.rand(rows, COLUMNS, generator=g) < 0.0005, 4 * w, w).bfloat16()


def best_cpu_seconds(run: Callable[[], object], times: int = 3) -> float:
    """Of all threads of this process; the first call, which may compile, is not counted."""
    run()
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def row(
    who: str, source: str, target: str, run: Callable[[], object], weight: Tensor, error: float | None = None
) -> Row:
    seconds = best_cpu_seconds(run)
    scale_bytes = FORMATS[source].stored_bytes(weight.shape) if source in FORMATS else 2 * weight.numel()
    return Row(who, source, target, seconds, 2 * weight.numel() / 1e9 / seconds, scale_bytes / 1e9 / seconds, error)


def ours(w: Tensor) -> list[Row]:
    sources: dict[str, tuple[Tensor, Tensor | None]] = {"bf16": (w, None)}
    for name in ("mxfp8", "fp8_block"):
        stored = requantize("bf16", w, None, FORMATS[name])
        sources[name] = stored.packed, stored.scales.blocks
    found = []
    for source, (weight, scales) in sources.items():
        for target in TARGETS if source == "bf16" else ("mxfp4", "nvfp4", "int4_g128", "bf16"):
            for search in (False, True) if target in SEARCHED else (False,):
                run = partial(requantize, source, weight, scales, FORMATS[target], search=search)
                done: Requantized = run(measure=True)
                assert done.squared_error is not None and done.squared_weight
                who = "moesaic, scale search" if search else "moesaic"
                found.append(row(who, source, target, run, w, done.squared_error / done.squared_weight))
    return found


def compressed_tensors(w: Tensor) -> list[Row]:
    """Scales and packed codes, as its compressors are called on one weight."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    numbers = importlib.import_module("compressed_tensors.quantization.utils")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    fp4 = importlib.import_module("compressed_tensors.compressors.nvfp4")
    integers = importlib.import_module("compressed_tensors.compressors.pack_quantized")

    def compress(fmt: NumberFormat, args: Any) -> Tensor:
        shared = numbers.generate_gparam(*w.aminmax()) if fmt.share else None
        blocks = fmt.blocks(w)
        scale, _ = numbers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, shared)
        if args.num_bits == 4 and args.type == "float":
            return fp4.quantize_and_pack_fp4(w, scale, shared, group_size=args.group_size)
        codes = forward.quantize(w, scale, None, args, dtype=args.pytorch_dtype(), global_scale=shared)
        return integers.pack_to_int32(codes, args.num_bits) if args.type == "int" else codes

    mx = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    nv = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    schemes: dict[str, dict[str, Any]] = {
        "mxfp4": {"num_bits": 4, "type": "float", **mx},
        "nvfp4": {"num_bits": 4, "type": "float", **nv},
        "int4_g128": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        "fp8_block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "mxfp8": {"num_bits": 8, "type": "float", **mx},
    }
    found = []
    for target, scheme in schemes.items():
        run = partial(compress, FORMATS[target], quantization.QuantizationArgs(symmetric=True, **scheme))
        found.append(row("compressed-tensors", "bf16", target, run, w))
    return found


def torchao(w: Tensor) -> list[Row]:
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    nvfp4 = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    calls = {
        "mxfp4": partial(mx.to_mx, w, torch.float4_e2m1fn_x2, 32),
        "mxfp8": partial(mx.to_mx, w, torch.float8_e4m3fn, 32),
        "nvfp4": lambda: nvfp4.nvfp4_quantize(w, 16, w.abs().amax().float() / 2688),
    }
    return [row("torchao", "bf16", target, run, w) for target, run in calls.items()]


def table(rows: list[Row]) -> str:
    lines = [
        f"{'source':10s} {'target':12s} {'who':22s} {'GB bf16/CPU-s':>14s} {'GB source/CPU-s':>16s} {'rel. error²':>12s}"
    ]
    for r in sorted(rows, key=lambda r: (r.source, r.target, -r.gb_bf16_per_cpu_second)):
        error = "" if r.relative_squared_error is None else f"{r.relative_squared_error:.6f}"
        speeds = f"{r.gb_bf16_per_cpu_second:14.3f} {r.gb_source_per_cpu_second:16.3f}"
        lines.append(f"{r.source:10s} {r.target:12s} {r.who:22s} {speeds} {error:>12s}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, default=1536, help="rows of the matrix (default 1536)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    w = weights(arguments.rows)
    rows = [row("memcpy", "bf16", "bf16", w.clone, w), *ours(w)]
    measures = {"compressed-tensors": compressed_tensors, "torchao": torchao}
    absent = [peer for peer, module in PEERS.items() if importlib.util.find_spec(module) is None]
    for peer in PEERS:
        if peer not in absent:
            rows += measures[peer](w)
    print(table(rows))
    print(f"not installed, left out: {', '.join(absent) or 'none'}")
    facts = {
        "machine": platform.processor() or platform.machine(),
        "load_average": os.getloadavg(),
        "versions": {p: version(p) for p in ("torch", "numba", *PEERS) if p not in absent},
        "matrix": [arguments.rows, COLUMNS],
        "rows": [asdict(r) for r in rows],
    }
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
