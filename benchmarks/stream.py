"""Streaming forward against transformers' own on the same tokens: tokens a second, CPU seconds, peak memory.

    python benchmarks/stream.py ../shared/testbed/m3 [--rows 32] [--length 512] [--repeats 3]

Each run is a process of its own. The stream's time includes reading and decoding every weight; of
transformers only the forward counts, its model being loaded (in F32) before. Both compute all logits
and keep their sum. Text is the standard library's source. Leaves out how near the logits are: that is
a test's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moesaic.checkpoint import Checkpoint
from moesaic.stream import LayerRun, Standing, State, Sweep, advanced

BATCH = 8  # rows that transformers sees at a time


def text_rows(model: Path, rows: int, length: int) -> Tensor:
    """Rows of the standard library's source in the model's tokens, [B, T]."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids: list[int] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer.encode(file.read_text(encoding="utf-8")).ids
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(rows, length)
    raise SystemExit(f"the standard library has {len(ids)} tokens, wanted {rows * length}; ask for fewer rows")


def final(run: LayerRun, states: Sequence[State]) -> list[Tensor]:
    """Hidden states [B, T, D] after the last layer."""
    begin = Standing({str(i): state for i, state in enumerate(states)})
    return Sweep(range(run.architecture.layers), None, {}, run.device).through(
        lambda: begin, partial(advanced, run), lambda at: [state.hidden_BTD for state in at.states.values()]
    )


def streamed(model: Path) -> Callable[[Tensor], float]:
    run = LayerRun(Checkpoint.open(model), device="cpu")

    def forward(tokens_BT: Tensor) -> float:
        hidden_TD = final(run, [State(run.embed(tokens_BT))])[0].flatten(0, 1)
        return sum(float(run.logits(hidden_TD[span]).sum()) for span in run.logit_spans(len(hidden_TD)))

    return forward


def whole(model: Path) -> Callable[[Tensor], float]:
    nested = hasattr(AutoConfig.from_pretrained(model), "text_config")
    loader = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    loaded = loader.from_pretrained(model).float().eval()

    @torch.no_grad()
    def forward(tokens_BT: Tensor) -> float:
        return sum(float(loaded(input_ids=rows, use_cache=False).logits.sum()) for rows in tokens_BT.split(BATCH))

    return forward


def measure(model: Path, way: str, rows: int, length: int) -> dict[str, float]:
    """One way, once, in this process; a short forward first, so that no library starts inside the time taken."""
    started = time.perf_counter()
    forward = {"stream": streamed, "transformers": whole}[way](model)
    ready = time.perf_counter() - started
    tokens_BT = text_rows(model, rows, length)
    forward(tokens_BT[:1, :64])
    wall, cpu = time.perf_counter(), time.process_time()
    checksum = forward(tokens_BT)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "tokens_per_second": rows * length / wall,
        "cpu_seconds": cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "ready_seconds": ready,
        "mean_logit_sum": checksum / (rows * length),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=("stream", "transformers"), help="run this one here and print JSON")
    a = parser.parse_args()
    if a.way:
        torch.set_num_threads(a.threads)
        print(json.dumps(measure(a.model, a.way, a.rows, a.length)))
        return
    runs: dict[str, list[dict[str, float]]] = {"transformers": [], "stream": []}
    for way in [*runs] * a.repeats:  # in turn, so that a busy spell of the machine meets both
        command = [sys.executable, __file__, str(a.model), "--way", way, "--threads", str(a.threads)]
        command += ["--rows", str(a.rows), "--length", str(a.length)]
        runs[way].append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    medians = {way: {key: statistics.median(r[key] for r in found) for key in found[0]} for way, found in runs.items()}
    for way, figures in medians.items():
        print(f"{way:13}", "  ".join(f"{key} {value:,.1f}" for key, value in figures.items()))
    theirs, ours = medians["transformers"], medians["stream"]
    print(
        f"{a.model.name}: {a.rows} rows of {a.length}, {a.threads} threads; stream over transformers: tokens a second "
        f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}, "
        f"CPU seconds {ours['cpu_seconds'] / theirs['cpu_seconds']:.2f}, "
        f"peak memory {ours['peak_mb'] / theirs['peak_mb']:.2f}"
    )


if __name__ == "__main__":
    main()
