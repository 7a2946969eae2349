"""Every pruning criterion against random choice, and what the statistics cost: quality, speed, memory.

    python benchmarks/criteria.py quality MODEL --data CALIBRATION --heldout HELDOUT [--tokens 65536] [--keep 24,16]
    python benchmarks/criteria.py speed MODEL [--rows 32] [--length 512] [--repeats 3]
    python benchmarks/criteria.py memory GENERATOR [--experts 128] [--rows 8] [--length 512]

quality  calibrates once and measures each criterion's cut, and five random ones, by masking, on held-out
         text, in one sweep: KL and perplexity, ± one standard error over rows.
speed    one sweep of statistics, against the transformers forward of the same tokens (loaded before, in
         F32), and against that forward with an observer that runs all experts on all tokens, as the
         published implementation of REAP does. Neither side computes logits. Tokens a CPU second: it
         counts the same on a busy machine.
memory   peak of a sweep over one layer of the real dimensions, written by GENERATOR (`--family m3 --preset
         layer --experts N --vocab 32064 --out DIR`), on random tokens; and how much a process without work has.
Each run of `speed` and `memory` is a process of its own.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from stream import BATCH, text_rows
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moesaic.calibrate import calibrate
from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet, sha256_of
from moesaic.measure import Trial
from moesaic.measure.preview import candidates, preview, table
from moesaic.report.outlooks import plot

SEEDS = 5
WAYS = ("transformers", "statistics", "all experts")


def quality(a: argparse.Namespace) -> None:
    source = Checkpoint.open(a.model)
    corpus = Corpus(a.data, a.heldout, a.tokens, a.length, a.seed)
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        found = calibrate(source, corpus.calibration(source, run / "tokens.safetensors"), run / "stats", True, True)
        rows = corpus.evaluation(source, run / "heldout.safetensors", a.judged)
        cuts = candidates(found, a.keep, seeds=SEEDS)
        outlooks = preview(source, cuts, Trial(rows, quiet=True), run / "preview", a.seed)
    for o in outlooks:
        kl, ppl, name = o.kl_nats, o.perplexity, o.candidate.criterion
        print(
            f"{a.model.name} {o.candidate.experts:3d}  {name:12}  KL {kl.value:.4f} ± {kl.error:.4f}  "
            f"perplexity {ppl.value:.2f} ± {ppl.error:.2f}  overlap {o.overlap.value:.4f} ± {o.overlap.error:.4f}"
        )
    for keep in a.keep:
        drawn = [o for o in outlooks if o.candidate.experts == keep and o.candidate.criterion.startswith("random")]
        kl, ppl = ([getattr(o, key).value for o in drawn] for key in ("kl_nats", "perplexity"))
        print(
            f"{a.model.name} {keep:3d}  random, {SEEDS} seeds: KL {statistics.mean(kl):.4f} (± {statistics.stdev(kl):.4f} "
            f"between seeds), perplexity {statistics.mean(ppl):.2f} (± {statistics.stdev(ppl):.2f})"
        )
    print(f"calibrated on {found.tokens:,} tokens, measured on {rows.tokens:,} in {rows.rows} rows, seed {a.seed}")
    if a.svg:
        a.svg.write_text(plot(outlooks), encoding="utf-8")
    print(table(outlooks).title)


# Speed ------------------------------------------------------------------------------------------------------------


def observed(block: Any, x_TD: Tensor) -> Tensor:
    """Norms of all experts' outputs on all tokens, [E]. The activation is SiLU for every family: it is the time that counts."""
    norms = []
    for both, down in zip(block.experts.gate_up_proj, block.experts.down_proj):
        gate, up = F.linear(x_TD, both).chunk(2, -1)
        norms.append(F.linear(F.silu(gate) * up, down).norm(dim=1).sum())
    return torch.stack(norms)


def watch(block: Any, inputs: tuple[Tensor, ...]) -> None:
    observed(block, inputs[0].flatten(0, -2))


@torch.no_grad()
def whole(model: Path, tokens_BT: Tensor, observe: bool) -> float:
    """CPU seconds of transformers' forward, loaded before."""
    nested = hasattr(AutoConfig.from_pretrained(model), "text_config")
    loader = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    loaded = loader.from_pretrained(model).float().eval()
    language = loaded.model.language_model if nested else loaded.model
    for layer in language.layers if observe else ():
        if hasattr(layer.mlp, "experts"):
            layer.mlp.register_forward_pre_hook(watch)
    language(input_ids=tokens_BT[:1, :64], use_cache=False)
    started = time.process_time()
    for rows in tokens_BT.split(BATCH):
        language(input_ids=rows, use_cache=False)
    return time.process_time() - started


def swept(model: Path, tokens: TokenSet) -> float:
    """CPU seconds of a sweep of statistics, reading and decoding included."""
    source = Checkpoint.open(model)
    with tempfile.TemporaryDirectory() as folder:
        calibrate(source, rows_of(tokens.ids_BT[:1, :64]), Path(folder) / "short", quiet=True)
        started = time.process_time()
        calibrate(source, tokens, Path(folder) / "stats", quiet=True)
        return time.process_time() - started


def rows_of(ids_BT: Tensor) -> TokenSet:
    facts = {"ids_sha256": sha256_of(ids_BT), "tokenizer_sha256": "0"}
    return TokenSet(ids_BT, torch.zeros(len(ids_BT), dtype=torch.int64), ("text",), facts)


def speed(a: argparse.Namespace) -> None:
    if a.way:
        torch.set_num_threads(a.threads)
        ids_BT = text_rows(a.model, a.rows, a.length)
        seconds = swept(a.model, rows_of(ids_BT)) if a.way == "statistics" else whole(a.model, ids_BT, a.way != WAYS[0])
        print(json.dumps({"tokens_per_cpu_second": ids_BT.numel() / seconds}))
        return
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    words = ["--rows", str(a.rows), "--length", str(a.length), "--threads", str(a.threads)]
    for way in WAYS * a.repeats:  # in turn, so that a busy spell of the machine meets all
        out = subprocess.check_output([sys.executable, __file__, "speed", str(a.model), "--way", way, *words])
        runs[way].append(json.loads(out.splitlines()[-1])["tokens_per_cpu_second"])
    medians = {way: statistics.median(found) for way, found in runs.items()}
    for way, rate in medians.items():
        print(f"{way:13} {rate:9,.0f} tokens a CPU second")
    ours = medians["statistics"]
    print(
        f"{a.model.name}: {a.rows} rows of {a.length}, {a.threads} threads, median of {a.repeats}: statistics over "
        f"transformers {ours / medians[WAYS[0]]:.2f}, over the all-experts observer {ours / medians[WAYS[2]]:.1f}"
    )


# Memory -----------------------------------------------------------------------------------------------------------


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def memory(a: argparse.Namespace) -> None:
    if a.way:
        torch.set_num_threads(a.threads)
        source, idle = Checkpoint.open(a.model), peak_mb()
        ids_BT = torch.randint(
            source.architecture.vocab, (a.rows, a.length), generator=torch.Generator().manual_seed(0)
        )
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = calibrate(source, rows_of(ids_BT), Path(folder) / "stats", quiet=True)
        least = int(found.totals()["tokens"].min())
        print(
            json.dumps(
                {"peak_mb": peak_mb(), "idle_mb": idle, "seconds": time.perf_counter() - started, "least": least}
            )
        )
        return
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        layer = a.model if a.model.is_dir() else Path(name) / "layer"
        if layer != a.model:
            words = [
                "--family",
                "m3",
                "--preset",
                "layer",
                "--experts",
                str(a.experts),
                "--vocab",
                "32064",
                "--out",
                str(layer),
            ]
            subprocess.run([sys.executable, str(a.model), *words], check=True)
        words = ["--way", "statistics", "--rows", str(a.rows), "--length", str(a.length), "--threads", str(a.threads)]
        found = json.loads(
            subprocess.check_output([sys.executable, __file__, "memory", str(layer), *words]).splitlines()[-1]
        )
        held = sum(f.stat().st_size for f in layer.glob("*.safetensors")) / 1e9
        shutil.rmtree(layer) if layer != a.model else None
    print(
        f"{a.experts} experts, {held:.1f} GB on disk, {a.rows * a.length:,} tokens: peak {found['peak_mb']:,.0f} MB, of which "
        f"{found['idle_mb']:,.0f} MB before any work; {found['seconds']:.0f} s; least tokens of an expert {found['least']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("quality", "speed", "memory"))
    parser.add_argument("model", type=Path, help="a model folder; for memory the program that writes one")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--tokens", type=int, default=65_536, help="to calibrate on")
    parser.add_argument("--judged", type=int, default=16_384, help="tokens to judge by")
    parser.add_argument("--keep", type=lambda text: [int(k) for k in text.split(",")], default=[24, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="draw the preview here")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where some gigabytes may lie for a while")
    parser.add_argument("--way", choices=WAYS, help="run this one here and print JSON")
    a = parser.parse_args()
    {"quality": quality, "speed": speed, "memory": memory}[a.figure](a)


if __name__ == "__main__":
    main()
