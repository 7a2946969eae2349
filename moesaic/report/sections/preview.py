"""What cuts would cost: candidates measured by masking before any byte was written."""

from typing import Any

from .. import plots, words
from ..blocks import Block, Drawing, Heading, Section, Table
from ..facts import Facts
from ..plots import Mark

FIGURES = (("KL, nats", "kl_nats"), ("Δ ln perplexity", "delta_ln_ppl"), ("top-1", "top1"), ("overlap", "overlap"))


def section(facts: Facts) -> Section | None:
    if facts.preview is None or not facts.preview["candidates"]:
        return None
    found = facts.preview["candidates"]
    blocks: list[Block] = []
    for experts in sorted({c["experts"] for c in found}, reverse=True):
        mine = sorted((c for c in found if c["experts"] == experts), key=lambda c: c["kl_nats"]["value"])
        marks = [Mark(words.term(c["criterion"]), *(c["kl_nats"][k] for k in ("value", "low", "high"))) for c in mine]
        plot = plots.whiskers(
            f"preview-{experts}", f"KL by criterion at {experts} experts", marks, "mean KL, nats per token"
        )
        blocks += [Heading(f"{experts} experts kept"), Drawing(plot), table(mine)]
    tokens = f"{found[0]['tokens']:,} tokens that calibration did not see"
    aside = [
        f"Each candidate set of experts, measured on {tokens}, all in one sweep. An expert masked has the logits of the model "
        "without it, so these are the figures of the pruned model.",
        "± is one standard error over rows; overlap is the share of drafts that speculative sampling would accept.",
    ]
    return Section("What cuts would cost", aside, blocks)


def table(found: list[dict[str, Any]]) -> Table:
    rows = [
        [words.term(c["criterion"]), *(" ± ".join(words.value_error(c[k]["value"], c[k]["error"])) for _, k in FIGURES)]
        for c in found
    ]
    return Table(("criterion", *(name for name, _ in FIGURES)), rows, optional=(2, 4))
