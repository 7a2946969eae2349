"""What roundings cost a model: held-out KL of every format by every way, in the routed experts alone and in all matrices.

    python benchmarks/rounding_kl.py MODEL RUN --data DIR --heldout DIR [--tokens 16384] [--held-tokens 7680]
                                     [--formats …] [--ways …] [--scopes experts linears]

Calibration and held-out text share nothing. KL(source ‖ export) in nats a token, ± one standard error over rows; its
ratio to RTN's on the same rows, with the error of the paired difference. Exports are written, measured and removed one
by one; RUN/cells.jsonl keeps what was found, and the same call goes on. Leaves out mixed plans: `compress` makes those.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from stream import final
from torch import Tensor

from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet
from moesaic.export import export
from moesaic.export.sequential import overlaid_on_text
from moesaic.measure.kl import kl_to_source
from moesaic.plan import Plan
from moesaic.recipes.quantize import SCOPES, formats_of
from moesaic.stream import LayerRun, State

FORMATS = ("mxfp4", "nvfp4", "int4_g64", "int3_g64", "int2_g64")
WAYS = ("rtn", "search", "weighted", "gptq", "descent", "autoround")


@torch.no_grad()
def last_hidden(model: Checkpoint, rows: TokenSet) -> tuple[LayerRun, Tensor]:
    run = LayerRun(model)
    return run, final(run, [State(run.embed(rows.ids_BT))])[0]


def kl_of_rows(
    run: LayerRun, wanted_BTD: Tensor, plan: Plan, source: Checkpoint, folder: Path, both: tuple[TokenSet, TokenSet]
) -> tuple[np.ndarray, float]:
    """Mean KL of each held-out row, and the CPU-seconds of rounding and writing."""
    calibration, heldout = both
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    plan, _ = overlaid_on_text(source, plan, folder / "out", folder, lambda: calibration, quiet=True)
    result = export(source, plan, folder / "out", quiet=True, overlays=folder)
    seconds = time.process_time() - began
    _, hidden_BTD = last_hidden(result, heldout)
    (kl_BS,) = kl_to_source(run, wanted_BTD, [hidden_BTD])
    shutil.rmtree(folder)
    return kl_BS.mean(-1).numpy(), seconds


def told(kl_B: np.ndarray, base_B: np.ndarray | None) -> str:
    """KL with its error, and its ratio to the base's; errors over rows, of the ratio by paired differences."""
    text = f"{kl_B.mean():.5f} ± {kl_B.std(ddof=1) / len(kl_B) ** 0.5:.5f}"
    if base_B is None:
        return text
    ratio = kl_B.mean() / base_B.mean()
    error = (kl_B - ratio * base_B).std(ddof=1) / len(kl_B) ** 0.5 / base_B.mean()
    return f"{text}   {ratio:.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--held-tokens", type=int, default=7_680)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--scopes", nargs="+", default=tuple(SCOPES))
    a = parser.parse_args()
    source, corpus = Checkpoint.open(a.model), Corpus(a.data, a.heldout, a.tokens, a.length)
    calibration = corpus.calibration(source, a.run / "tokens.safetensors")
    heldout = corpus.evaluation(source, a.run / "heldout.safetensors", a.held_tokens)
    run, wanted_BTD = last_hidden(source, heldout)
    cells = a.run / "cells.jsonl"
    done = [json.loads(line) for line in cells.read_text().splitlines()] if cells.exists() else []
    found = {(c["scope"], c["format"], c["way"]): np.array(c["kl_nats"]) for c in done}
    for scope in a.scopes:
        for format in a.formats:
            for way in a.ways:
                if (scope, format, way) not in found:
                    plan = Plan("compressed_tensors", {}, formats_of(source, format, scope, "source"), way)
                    kl_B, seconds = kl_of_rows(run, wanted_BTD, plan, source, a.run / "cell", (calibration, heldout))
                    found[scope, format, way] = kl_B
                    cell = {"scope": scope, "format": format, "way": way, "seconds": seconds, "kl_nats": kl_B.tolist()}
                    with open(cells, "a") as file:
                        file.write(json.dumps(cell) + "\n")
                text = told(found[scope, format, way], found.get((scope, format, "rtn")) if way != "rtn" else None)
                print(f"{scope:8} {format:10} {way:10} {text}", flush=True)


if __name__ == "__main__":
    main()
