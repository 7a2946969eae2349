"""What an evaluation costs beside holding both models in memory, and how its errors shrink with tokens.

    python benchmarks/evaluate.py cost SOURCE EXPORT [--rows 16] [--length 512]
    python benchmarks/evaluate.py errors SOURCE EXPORT [--tokens 2048,16384,65536] [--length 512] [--data DIR]

`cost` runs each way in a process of its own: our sweep (KL, perplexity, top-1, routing), and two transformers
models in F32 that compare whole logits, batch by batch. Both read the same rows and have to give the same
mean KL. EXPORT has to be one that transformers loads without a server's kernels, such as a pruned model.
`errors` sweeps the largest count once and takes its first rows for the smaller ones. Text is the standard
library's source, or that of --data. Leaves out GPUs.
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
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moesaic.artifact import read_tensors
from moesaic.checkpoint import Checkpoint
from moesaic.data.texts import python_texts, read_texts
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokens import TokenSet
from moesaic.evaluate import Conditions, Reading, evaluate
from moesaic.measure.divergence import FIELDS, Bootstrap, Divergence

BATCH = 4  # rows that whole models see at a time
FIGURES = ("kl_mean", "top1_agreement", "delta_ln_ppl")


def rows_of(model: Path, rows: int, length: int, data: Path | None = None) -> TokenSet:
    checkpoint, tokenizer = Checkpoint.open(model), Tokenizer.open(model)
    texts = read_texts(data, tokenizer) if data else python_texts()[0]
    return TokenSet.build(texts, tokenizer, shape=(rows, length), vocab=checkpoint.architecture.vocab)


def streamed(source: Path, export: Path, tokens: TokenSet) -> float:
    with tempfile.TemporaryDirectory() as folder:
        models = Checkpoint.open(source), Checkpoint.open(export)
        scores = evaluate(*models, [Reading.of(tokens)], Path(folder), Conditions(floor=False, device="cpu"), True)
    found = scores.find("kl_mean")
    assert found is not None and found.value is not None
    return found.value


def whole(source: Path, export: Path, tokens: TokenSet) -> float:
    models = []
    for path in (source, export):
        nested = hasattr(AutoConfig.from_pretrained(path), "text_config")
        loader = AutoModelForImageTextToText if nested else AutoModelForCausalLM
        models.append(loader.from_pretrained(path).float().eval())
    total = 0.0
    with torch.no_grad():
        for ids_BT in tokens.ids_BT.split(BATCH):
            log_p, log_q = (
                m(input_ids=ids_BT, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in models
            )
            total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / (tokens.rows * (tokens.ids_BT.shape[1] - 1))


def once(way: str, source: Path, export: Path, rows: int, length: int) -> dict[str, float]:
    """One way, in this process: seconds with everything, and the peak over what merely importing takes."""
    tokens = rows_of(source, rows, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    kl = {"streamed": streamed, "whole": whole}[way](source, export, tokens)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "kl_nats": kl,
    }


def cost(a: argparse.Namespace) -> None:
    found = {}
    for way in ("streamed", "whole"):
        words = [sys.executable, __file__, "once", str(a.source), str(a.export), "--way", way]
        words += ["--rows", str(a.rows), "--length", str(a.length)]
        found[way] = json.loads(
            subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(way, json.dumps(found[way]))
    s, w = found["streamed"], found["whole"]
    print(f"{a.rows * a.length:,} tokens: {s['cpu_seconds'] / w['cpu_seconds']:.2f} × the CPU time, ", end="")
    print(f"{s['peak_mib'] / w['peak_mib']:.2f} × the memory, KL {s['kl_nats']:.6f} and {w['kl_nats']:.6f}")


def errors(a: argparse.Namespace) -> None:
    counts = sorted(int(n) for n in a.tokens.split(","))
    tokens = rows_of(a.source, counts[-1] // a.length, a.length, a.data)
    order_B = torch.randperm(tokens.rows, generator=torch.Generator().manual_seed(0))
    tokens = tokens.take(order_B.tolist())
    with tempfile.TemporaryDirectory() as folder:
        scores = evaluate(
            Checkpoint.open(a.source),
            Checkpoint.open(a.export),
            [Reading.of(tokens)],
            Path(folder),
            Conditions(device="cpu"),
            quiet=True,
        )
        values, _ = read_tensors(Path(folder) / "scores.safetensors", "token_scores")
    for s in scores.scores:
        if s.name.startswith("floor") or s.name in ("router_agreement", "pruned_mass"):
            print(f"{s.name} {s.value} ± {s.error}")
    for count in counts:
        divergence = first_rows(values, count // a.length)
        bootstrap = Bootstrap(divergence)
        figures = {
            "kl_mean": bootstrap.mean(divergence["kl_nats"]),
            "kl_p99": bootstrap.quantiles(divergence["kl_nats"], (0.99,))[0],
            "top1_agreement": bootstrap.mean(divergence["same_top1"]),
            "delta_ln_ppl": bootstrap.mean(divergence["nll_export"] - divergence["nll_source"]),
            "ln_ppl_export": bootstrap.mean(divergence["nll_export"]),
        }
        for name, x in figures.items():
            iid = float(divergence["kl_nats"].std() / divergence.tokens**0.5) if name == "kl_mean" else None
            print(f"{count:>7,} tokens  {name:<16} {x.value:.5f} ± {x.error}  95 % {x.low} to {x.high}  iid {iid}")


def first_rows(values: dict[str, Tensor], rows: int) -> Divergence:
    held = {name: values[f"text.{name}"][:rows] for name in FIELDS}
    flag_BS = held["kl_nats"].isfinite()
    return Divergence(torch.ones_like(flag_BS), held | {"finite_source": flag_BS, "finite_export": flag_BS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "errors", "once"))
    parser.add_argument("source", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", default="2048,16384,65536")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--way", default="streamed")
    a = parser.parse_args()
    if a.what == "once":
        print(json.dumps(once(a.way, a.source, a.export, a.rows, a.length)))
    else:
        {"cost": cost, "errors": errors}[a.what](a)


if __name__ == "__main__":
    main()
