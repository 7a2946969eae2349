"""What cuts would cost: candidates measured by masking before any byte was written."""

from collections.abc import Mapping
from typing import Any

from .. import plots, words
from ..blocks import Block, Drawing, Heading, Section, Table
from ..facts import Facts
from ..plots import Mark
from .base import Part

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
    if facts.loops is not None:
        blocks += [Heading("Whether they loop when they write"), loops(facts.loops["models"])]
    return Section("What cuts would cost", aside, blocks)


def loops(models: Mapping[str, Any]) -> Table:
    """Texts of the source and of the best cut to each count, from the same beginnings and the same random numbers."""
    rows = []
    for name, of in models.items():
        shares = [f"{100 * of[k]['value']:.1f} ± {100 * (of[k]['error'] or 0):.1f} %" for k in ("share", "endless")]
        rows.append([name, *shares, f"{of['new_tokens']:,}"])
    return Table(
        ("model", "tokens that only repeat", "texts that end in a loop", "tokens written"), rows, optional=(3,)
    )


def table(found: list[dict[str, Any]]) -> Table:
    rows = [
        [words.term(c["criterion"]), *(" ± ".join(words.value_error(c[k]["value"], c[k]["error"])) for _, k in FIGURES)]
        for c in found
    ]
    return Table(("criterion", *(name for name, _ in FIGURES)), rows, optional=(2, 4))


PART = Part(name="preview", place=100, section=section)
