"""What was loaded by what: a row for each folder that an engine was given, and the page made of them.

    pytest tests/engines tests/test_*_loads.py … --loads rows.json     any part of them, on any machine
    python tests/loads.py rows.json … > docs/LOADS.md

Tests leave rows behind with pytest's `record_property`, and `--loads FILE` keeps those of tests that passed; a test
that runs again replaces its own, one that fails takes it away. Nothing on the page is typed by hand. Leaves out the loading.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROW, FIGURES, FAULTS = "loads", "perplexity", "planted"
OTHERS = ", other families"  # ends the name of a container whose tables have the families of tests/replica.py
Record = Callable[[str, object], None]

HEAD = """# What loads where

Written by `tests/loads.py` from the {tests} tests of `tests/engines` and `tests/test_*_loads.py` that passed
when they ran last (tests/engines/README.md). Small random models of each family, with every name, dtype and oddity
of the released ones, unless a heading says otherwise. *Yes* means: every tensor was consumed, every
parameter filled, and all values, decoded from the engine's own parameters, equal ours ("same logits": the model was
run, too). "Source" is FP8 blocks for M2 and MXFP8 for M3, byte for byte; a + b: layers in turn. An empty
cell has no test that passed: because nobody wrote one, or for a reason that the notes give.
"""

NOTES = """## Notes

* vLLM's checks multiply nothing: a CPU has few of its kernels. To run 2 and 3 bits, vLLM wants a CUDA machine with `humming`.
  Its perplexity was taken with two patches: the CPU's router knows no sigmoid, and "reference" stands in for kernels by
  multiplying what vLLM's own loaded parameters decode to. No M3 ran in it, whose classes ask for CUDA.
* Released dimensions: of M2.7 two layers of 8 experts of 1536 × 3072, of M3 a dense layer and two of 3 experts of
  3072 × 6144, random.
* vLLM fuses M3's indexer with q/k/v and loads that matrix neither in NVFP4 nor, from auto-round, in integers.
* The small M3's k and v have no 128 rows, and vLLM wants whole squares in all but the last matrix that it fuses: so
  fp8_block experts are beside a BF16 rest there. The released shapes have whole squares.
* The other families are exported from BF16, but for "as released", "once fp8" and "int4, as they are", of which each has
  what its vendor releases it in. vLLM's check builds and fills its model classes of them and runs none.
* mlx-lm cuts kv_b_proj of latent attention in two; affine codes it rounds again then, and others it does not read. So it
  is BF16 there, and moesaic refuses any other format of it for MLX.
* MTP: only GLM-4.x and DeepSeek-V3 have that layer. mlx-lm drops it, of DeepSeek-V3 by its released number, 61: with
  fewer layers the model does not load. vLLM's own class of the model passes it over; the class that drafts was not tried.
* transformers has no model_type kimi_k2 ("as deepseek_v3": config.json says so), and reads the sizes of Kimi-K2.5's tower
  under names of its own alone ("reworded").
"""


def note(
    record: Record,
    engine: str,
    family: str,
    container: str,
    experts: str | Iterable[str],
    rest: str,
    outcome: str = "yes",
) -> None:
    """Leave a row: which engine was given which formats of which family, and what came of it."""
    named = experts if isinstance(experts, str) else " + ".join(experts)
    record(
        ROW,
        {
            "engine": engine,
            "family": family.upper() if family in ("m2", "m3") else family,
            "container": container,
            "formats": (named, rest),
            "outcome": outcome,
        },
    )


Kept = dict[str, list[tuple[str, Any]]]  # test -> its properties


def keep(file: Path, passed: Kept, failed: Iterable[str]) -> None:
    """Take the results of one run into `file`."""
    found: Kept = json.loads(file.read_text()) if file.exists() else {}
    found |= {test: properties for test, properties in passed.items() if properties}
    for test in failed:
        found.pop(test, None)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(sorted(found.items())), indent=1), encoding="utf-8")


def page(kept: Kept) -> str:
    properties = [property for of in kept.values() for property in of]
    rows = [value for name, value in properties if name == ROW]
    text = [HEAD.format(tests=len(kept))]
    for container in dict.fromkeys(row["container"] for row in rows):
        of = [row for row in rows if row["container"] == container]
        engines = sorted({row["engine"] for row in of}) if container.endswith(OTHERS) else []
        text += [] if engines else [f"## {container}\n", table(of)]
        for engine in engines:  # a column for each family: too many for a table of all engines
            text += [f"## {container}: {engine}\n", table([row for row in of if row["engine"] == engine])]
    if figures := [value for name, value in properties if name == FIGURES]:
        text += ["## Perplexity in the engine\n", perplexities(figures)]
    if faults := [value for name, value in properties if name == FAULTS]:
        named = ", ".join(sorted(str(fault).replace("_", " ") for fault in faults))
        said = "Each of these {} was refused or shown wrong by the check that passes the others: {}."
        text += ["## Known-bad folders\n", said.format(len(faults), named) + "\n"]
    return "\n".join([*text, NOTES])


def table(rows: list[dict[str, Any]]) -> str:
    columns = sorted({(row["engine"], row["family"]) for row in rows})
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows:
        cells.setdefault((*row["formats"],), {})[row["engine"], row["family"]] = row["outcome"]
    alone = rows[0]["container"].endswith(OTHERS)
    heads = [family if alone else f"{engine}, {family}" for engine, family in columns]
    lines = [["experts", "rest", *heads], ["---"] * (2 + len(columns))]
    lines += [[*formats, *(of.get(column, "") for column in columns)] for formats, of in sorted(cells.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def perplexities(figures: list[dict[str, Any]]) -> str:
    lines = [
        ["M2, trained, small", "tokens", "vLLM, nats a token", "ours", "difference", "a token's, median, no sign"],
        ["---"] * 6,
    ]
    lines += [
        [f"{f['format']}, {f['way']}", f"{f['tokens']:,}", f"{f['vllm_nll']:.4f}", f"{f['our_nll']:.4f}",
         f"{f['difference']:+.4f} ± {f['error']:.4f}", f"{f['median']:.4f}"]
        for f in figures
    ]  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    every: Kept = {}
    for name in sys.argv[1:]:
        every |= json.loads(Path(name).read_text())
    print(page(dict(sorted(every.items()))), end="")
