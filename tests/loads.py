"""What was loaded by what: a row for each folder that an engine was given, and the page made of them.

    pytest tests/engines tests/test_transformers_loads.py … --loads rows.json     any part of them, on any machine
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
Record = Callable[[str, object], None]

HEAD = """# What loads where

Written by `tests/loads.py` from the {tests} tests of `tests/engines` and `tests/test_transformers_loads.py` that passed
when they ran last (tests/engines/README.md). Small random models of both families, with every name, dtype and oddity
of the released ones, unless a heading says otherwise. *Yes* means: every tensor was consumed, every
parameter filled, and all values, decoded from the engine's own parameters, equal ours ("same logits": the model was
run, too). "Source" is FP8 blocks for M2 and MXFP8 for M3, byte for byte; a + b: layers in turn. An empty
cell has no test that passed: mostly because nobody wrote one.
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
            "family": family.upper(),
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
        text += [f"## {container}\n", table([row for row in rows if row["container"] == container])]
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
    lines = [["experts", "rest", *(f"{engine}, {family}" for engine, family in columns)], ["---"] * (2 + len(columns))]
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
