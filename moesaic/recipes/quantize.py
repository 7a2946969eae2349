"""One format for one class of matrices: as fast as the disk, or, where the rounding looks at data, rounded on text.

Router, embeddings, norms, head and vision stay as they are: no tool that rounded a router was right.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import write_json
from ..checkpoint import Checkpoint
from ..checkpoint.containers import CONTAINERS
from ..data.corpus import PYTHON_TEXT, Corpus
from ..data.tokens import TokenSet
from ..errors import InputError
from ..export import export
from ..export.claim import check_free
from ..export.sequential import overlaid_on_text
from ..fit import Layout, check_layout
from ..formats import NAMES
from ..lock import held
from ..plan import DROP, KEEP, SOURCE, Plan, overlay
from ..plan.blueprint import Blueprint
from ..resources import THREADS
from ..rounding import ROUNDINGS, informed
from ..verify import verify
from ..verify.verdict import expert_errors
from .machine import Use

SCOPES = {"experts": ("experts",), "linears": ("experts", "shared", "dense", "qkv", "o")}


@dataclass(frozen=True)
class Quantizing:
    """What is asked for.

    only       "experts" (routed experts) or "linears" (attention, shared and dense too) are in `format`
    rest       "source": the others keep their bytes; "bf16" or another format: they are written in that
    container  that is written
    rounding   one of rounding/; one that looks at data, or "search" where the text is the user's, reads text
    layout     how the result will be served, if that is known: what an engine would not load so is refused
    check      reopen the result and compare it with the source
    mtp        "keep" or "drop" a layer for multi-token prediction, which is never rounded
    """

    format: str
    only: str = "experts"
    rest: str = SOURCE
    container: str = "compressed_tensors"
    rounding: str = "rtn"
    layout: Layout | None = None
    check: bool = True
    mtp: str = KEEP


def quantize(
    model: Path, out: Path, asked: Quantizing, corpus: Corpus = PYTHON_TEXT, command: str = "", quiet: bool = False
) -> dict[str, Any]:
    """Write to `out` the model with matrices in the formats that are asked for; returns JSON-able facts.

    Raises `InputError` before the first byte for what cannot be, `CheckError` when the result does not verify.
    """
    for what, name, there_are in (
        ("format", asked.format, NAMES), ("scope", asked.only, SCOPES),
        ("format for the rest", asked.rest, (SOURCE, *NAMES)),
        ("container", asked.container, CONTAINERS), ("rounding", asked.rounding, ROUNDINGS),
        ("answer to --mtp", asked.mtp, (KEEP, DROP)),
    ):  # fmt: skip
        if name not in there_are:
            raise InputError(f"unknown {what} {name!r}; choose from {', '.join(there_are)}")
    source = Checkpoint.open(model)
    check_free(out, source)
    formats = formats_of(source, asked.format, asked.only, asked.rest)
    rounding = informed(asked.rounding, corpus.is_own)
    plan = Plan(asked.container, formats=formats, rounding=rounding, drop_mtp=asked.mtp == DROP)
    if asked.layout is not None:
        check_layout(Blueprint.of(source, plan), asked.layout)
    source.check_values()

    def text() -> TokenSet:
        return corpus.calibration(source, out / "moesaic" / "tokens.safetensors")

    with held(out / "moesaic"):
        plan, told = overlaid_on_text(source, plan, out, out / "moesaic", text, quiet)
        result = export(source, plan, out, quiet)
        overlay.drop(*(out / "moesaic" / name for name in plan.overlays))
        facts: dict[str, Any] = {
            "command": command,
            "model": str(model),
            "out": str(out),
            "format": asked.format,
            "only": asked.only,
            "rest": asked.rest,
            "container": asked.container,
            "rounding": plan.rounding,
            "rendered": told,
            "source_bytes": sum(t.bytes for t in source.inventory),
            "bytes": sum(t.bytes for t in result.inventory),
        }
        if asked.check:
            verdict = verify(out, source, quiet)
            facts["verified"] = dict(verdict.compared)
            facts["expert_errors"] = expert_errors(result, verdict)
            verdict.require(out, "remove it and quantize again")
        write_json(out / "moesaic" / "quantize.json", "quantize", facts, {"source": source.identity})
        return facts


def use(model: Path, out: Path, rounding: str, corpus: Corpus) -> Use:
    """What of the machine `quantize` takes."""
    return Use((out / "moesaic" / THREADS,), model, 0 if rounding == "rtn" else corpus.tokens)


def formats_of(source: Checkpoint, format: str, only: str, rest: str) -> dict[str, str]:
    """A format for every unit of a model: `format` inside the scope, `rest` outside it; MTP keeps its values."""
    roles = {unit: members[0].role for unit, members in source.architecture.units.items()}
    return {unit: format if role in SCOPES[only] else rest for unit, role in roles.items() if role != "mtp"}
