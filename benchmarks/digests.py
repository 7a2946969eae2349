"""Digests of what the command line makes of small models, kept and held: a change that should move no byte can show it.

    python benchmarks/digests.py SOURCE … --data DIR --keep digests.json
    python benchmarks/digests.py SOURCE … --data DIR --hold digests.json [--only WORD]

Every case is a command as a user types it, run in this process on one thread. Of an export it keeps a SHA-256 over all
tensors (name, dtype, shape, bytes) and one over config.json; of a run also every score and predicted figure as printed
by --json. `--only` runs the cases whose name contains the word. Leaves out AutoRound, which takes minutes a case.
"""

import argparse
import hashlib
import io
import json
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint import Checkpoint
from moesaic.cli import main as moesaic

CARRIED = {
    "compressed_tensors": (
        "mxfp4", "nvfp4", "mxfp8", "fp8_block", "fp8_channel", "int8_channel", "int4_g128", "int3_g64", "int2_g64", "bf16",
    ),
    "auto_round": ("int4_g64", "int2_g32"),
    "gptq": ("int4_g128", "int8_g32"),
    "mlx": ("mxfp4", "nvfp4", "mxfp8", "affine4_g64"),
    "unquantized": ("bf16",),
}  # fmt: skip
TEXT = "--tokens 8192 --length 256 --data {data}"
RUN = f"--evaluation-tokens 4096 {TEXT}"


def cases(shared: bool) -> dict[str, str]:
    """Name -> command; `{model}`, `{out}` and `{data}` stand for the folders. `shared`: there are shared experts."""
    found = {}
    for container, formats in CARRIED.items():
        for format in formats:
            scope = "--only linears" if container == "unquantized" else "--rest bf16"
            found[f"{container} {format}"] = f"quantize {{model}} {{out}} --format {format} {scope} --to {container}"
    for format in ("mxfp4", "nvfp4", "int2_g64", "fp8_block"):
        found[f"search {format}"] = f"quantize {{model}} {{out}} --format {format} --rounding search"
    for rounding, format in (("gptq", "int4_g128"), ("gptq", "nvfp4"), ("descent", "int2_g64"), ("search", "mxfp4")):
        found[f"{rounding} {format} on text"] = (
            f"quantize {{model}} {{out}} --only linears --format {format} --rounding {rounding} {TEXT}"
        )
    found["activations"] = f"compress {{model}} {{out}} --format nvfp4_a4 --rest bf16 {RUN}"
    found["prune"] = f"prune {{model}} {{out}} --experts 16 {TEXT}"
    if shared:
        found["repair"] = f"prune {{model}} {{out}} --experts 8 --repair {TEXT}"
    found["compress plan"] = f"compress {{model}} {{out}} --experts 16 --format int4_g128 --rounding gptq {RUN}"
    for harm in ("measured", "surrogate", "anchored", "trace"):
        found[f"compress {harm}"] = f"compress {{model}} {{out}} --bits 5 --harm {harm} {RUN}"
    found["compress prunes"] = f"compress {{model}} {{out}} --bits 3.8 --experts 16 --harm surrogate {RUN}"
    return found


def digest(folder: Path) -> str:
    """SHA-256 over every tensor of the folder's shards, by name: name, dtype, shape and bytes."""
    found: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                a, b = entry["data_offsets"]
                what = f"{name} {entry['dtype']} {entry['shape']} ".encode()
                found[name] = hashlib.sha256(what + raw[start + a : start + b]).digest()
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()


def run(command: str, out: Path) -> dict[str, Any]:
    """Digests and figures of one command, or the sentence in which it was refused."""
    said, refused = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(refused):
        code = moesaic([*command.split(), "--quiet", "--json"])
    if code:
        return {"exit": code, "refused": refused.getvalue().replace(str(out), "OUT").strip()}
    facts = json.loads(said.getvalue().splitlines()[-1])
    model = out / "model" if (out / "model").exists() else out
    found: dict[str, Any] = {
        "tensors": digest(model),
        "config": hashlib.sha256((model / "config.json").read_bytes()).hexdigest(),
    }
    for name in ("scores", "chosen"):
        if facts.get(name):
            found[name] = facts[name]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--only", default="")
    a = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(a.hold.read_text()) if a.hold else {}
    found, moved = {}, 0
    for source in a.sources:
        shared = any(n.role == "shared" for n in Checkpoint.open(source).architecture.linears)
        for name, command in cases(shared).items():
            key = f"{source.name}: {name}"
            if a.only not in key:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                found[key] = run(command.format(model=source, out=out, data=a.data), out)
            same = "" if not a.hold else "same" if kept.get(key) == found[key] else "MOVED" if key in kept else "new"
            moved += same == "MOVED"
            print(f"{key:44} {found[key].get('tensors', found[key].get('refused', ''))[:60]}  {same}", flush=True)
            if same == "MOVED":
                print(f"    was {json.dumps(kept[key])}\n    is  {json.dumps(found[key])}", flush=True)
    if a.keep:
        a.keep.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
