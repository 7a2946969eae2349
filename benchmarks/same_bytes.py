"""One layer of released dimensions, calibrated, rounded by GPTQ and priced, again and with other memory: the same bytes?

    python benchmarks/same_bytes.py LAYER [--tokens 2048] [--threads 1] [--memory 1GB,16GB] [--format int4_g128]

LAYER is a model folder, such as make_replica.py writes with `--family m3 --preset layer --experts 4`. Every run is a
process of its own: with the first memory twice, then with the others. Compared are all tensors of the statistics and of
the rounded matrices, and the KL of each row and branch. Exit 1 where two differ. With `--threads 1,2` one more run shows
what another count of threads changes, which counts for nothing. Tokens are drawn evenly, seed 0, in rows of 512.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moesaic.calibrate import calibrate
from moesaic.checkpoint import Checkpoint
from moesaic.cli.base.values import bytes_of
from moesaic.data.tokens import TokenSet
from moesaic.export.sequential import round_on_text
from moesaic.measure import Branch, Trial, effort, measure
from moesaic.plan import Plan
from moesaic.recipes.quantize import formats_of
from moesaic.resources import THREADS, Resources

LENGTH = 512
PRICED = ("int4_g128", "mxfp4", "int2_g64")  # of the routed experts, a branch each


def evenly(vocab: int, count: int) -> TokenSet:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocab, (count // LENGTH, LENGTH), generator=generator)
    digest = hashlib.sha256(ids_BT.numpy().tobytes()).hexdigest()
    return TokenSet(
        ids_BT, torch.zeros(len(ids_BT), dtype=torch.int64), ("drawn",), {"ids_sha256": digest, "tokenizer_sha256": ""}
    )


def tensors_of(folder: Path) -> dict[str, str]:
    """A digest of each tensor that stands in a folder, by its file and name."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            whole = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{file.relative_to(folder)} {name}"] = hashlib.sha256(whole).hexdigest()
    return found


def once(model: Path, tokens: int, format: str, resources: Resources, run: Path) -> dict[str, Any]:
    """Digests of everything, and what it took."""
    source = Checkpoint.open(model)
    text, held = evenly(source.architecture.vocab, tokens), resources.held_bytes(torch.device("cpu"))
    plan = Plan("compressed_tensors", formats=formats_of(source, format, "experts", "source"), rounding="gptq")
    units = [n.unit for n in source.architecture.linears if n.role == "experts"]
    branches = [Branch(dict.fromkeys(units, name)) for name in PRICED]
    wall, cpu = time.perf_counter(), time.process_time()
    with resources.used(run / THREADS):
        calibrate(source, text, run / "stats", quiet=True)
        round_on_text(source, plan, text, run / "rendered", quiet=True)
        prices = measure(source, branches, Trial(text, memory_bytes=held, quiet=True), run / "prices")
    spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    kl = {name: found.kl_B.tolist() for name, found in zip(PRICED, prices)}
    sweeps = effort(source, branches, text.tokens, held).batches
    return {"tensors": tensors_of(run), "kl": kl, "sweeps": sweeps, **spent}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--format", default="int4_g128")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--memory", default="1GB,16GB")
    parser.add_argument("--folder", type=Path, help="for what is made, and gone again (default the system's)")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.once:
        resources = Resources(bytes_of(a.memory), int(a.threads))
        print(json.dumps(once(a.model, a.tokens, a.format, resources, a.once)))
        return 0
    first, *others = a.memory.split(",")
    threads, *more = a.threads.split(",")
    runs = [(first, threads), (first, threads), *((memory, threads) for memory in others), *((first, n) for n in more)]
    truth: dict[str, Any] = {}
    differing = 0
    for memory, count in runs:
        with tempfile.TemporaryDirectory(dir=a.folder) as folder:
            words = [sys.executable, __file__, str(a.model), "--tokens", str(a.tokens), "--format", a.format]
            words += ["--threads", count, "--memory", memory, "--once", str(Path(folder) / "run")]
            found = json.loads(
                subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
        truth = truth or found
        assert truth["tensors"].keys() == found["tensors"].keys() and truth["kl"].keys() == found["kl"].keys()
        tensors = sum(found["tensors"][name] != digest for name, digest in truth["tensors"].items())
        rows = sum(a != b for name, kl_B in truth["kl"].items() for a, b in zip(kl_B, found["kl"][name]))
        differing += (tensors + rows) * (count == threads)
        print(
            f"{memory:>8} {count} threads: {found['sweeps']} sweeps for prices, {found['cpu_s']:.0f} CPU-s "
            f"({found['wall_s']:.0f} s); {tensors} of {len(truth['tensors'])} tensors and {rows} prices of "
            f"{sum(map(len, truth['kl'].values()))} rows differ from the first run's",
            flush=True,
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
