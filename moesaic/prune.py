"""Experts only: calibrate, rank, cut, and copy what stays byte for byte. The source's format is the result's.

Its working files stand in OUT/moesaic/, so a run can be looked into, and continued, later.
"""

from pathlib import Path
from typing import Any

from .artifact import write_json
from .calibrate import Statistics, calibrate
from .checkpoint import Checkpoint
from .corpus import PYTHON_TEXT, Corpus
from .errors import CheckError, InputError
from .export import NOTE, check_free, export
from .plan import Plan
from .preview import Outlook, candidates, preview
from .select import check_names, select_experts
from .verify import verify

PREVIEW_TOKENS = 8_192  # enough to tell criteria apart; the verdict on what ships is evaluate's


def prune(
    model: Path, out: Path, experts: int, criterion: str = "reap", policy: str = "pooled",
    corpus: Corpus = PYTHON_TEXT, check: bool = True, quiet: bool = False, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write to `out` the model that keeps `experts` experts in every layer; returns JSON-able facts.

    criterion  one of criteria/, or "auto": the one whose cut has the smallest KL on text not calibrated on

    Raises `InputError` before anything is read when the count cannot be, `CheckError` when the result
    does not verify.
    """
    source = Checkpoint.open(model)
    check_count(source, experts)
    check_names(policy, () if criterion == "auto" else (criterion,))
    work = out / "moesaic"
    check_free(out, source)
    if (out / NOTE).exists() and (there := Plan.load(out / NOTE).experts(source.architecture.experts)) != experts:
        raise InputError(f"{out} holds an export of {there} experts a layer; name another folder or remove it")
    tokens = corpus.calibration(source, work / "tokens.safetensors")
    statistics = calibrate(source, tokens, work / "stats", quiet)
    if criterion == "auto":
        outlooks = look_ahead(source, statistics, [experts], corpus, work, quiet)
        criterion = outlooks[0].candidate.criterion
    selection = select_experts(statistics, criterion, experts, policy)
    plan = Plan(container=source.container.name, kept=selection.cut.kept)
    result = export(source, plan, out, quiet)
    facts = selection.facts() | {
        "command": command,
        "model": str(model),
        "out": str(out),
        "experts": experts,
        "source_experts": source.architecture.experts,
        "source_bytes": sum(t.bytes for t in source.inventory),
        "bytes": sum(t.bytes for t in result.inventory),
        "tokens": dict(tokens.facts),
    }
    if check:
        verdict = verify(out, source, quiet)
        facts["verified"] = dict(verdict.compared)
        if not verdict.holds:
            raise CheckError(
                f"{out} does not verify: {verdict.findings[0]} ({len(verdict.findings)} findings); remove it and prune again"
            )
    note = facts | {"scores": selection.score_LE.tolist()}
    write_json(work / "prune.json", "prune", note, {"source": source.identity, "tokens": tokens.identity})
    return facts


def preview_cuts(
    model: Path,
    out: Path,
    counts: list[int],
    criterion: str = "auto",
    corpus: Corpus = PYTHON_TEXT,
    quiet: bool = False,
) -> list[Outlook]:
    """Measure cuts to each of `counts`, by every criterion ("auto") or one, and write no model."""
    source = Checkpoint.open(model)
    for count in counts:
        check_count(source, count)
    work = out / "moesaic"
    statistics = calibrate(source, corpus.calibration(source, work / "tokens.safetensors"), work / "stats", quiet)
    return look_ahead(source, statistics, counts, corpus, work, quiet, () if criterion == "auto" else (criterion,))


def look_ahead(
    source: Checkpoint, statistics: Statistics, counts: list[int], corpus: Corpus, work: Path, quiet: bool,
    criteria: tuple[str, ...] = (),
) -> list[Outlook]:  # fmt: skip
    """Candidates measured on text that calibration did not see, best first; kept in preview.json."""
    rows = corpus.evaluation(source, work / "preview.safetensors", PREVIEW_TOKENS)
    outlooks = preview(source, candidates(statistics, counts, criteria), rows, corpus.seed, quiet)
    facts = {"model": str(source.path), "candidates": [o.facts() for o in outlooks], "seed": corpus.seed}
    facts["text"] = dict(rows.facts)
    write_json(work / "preview.json", "preview", facts, {"source": source.identity, "tokens": rows.identity})
    return outlooks


def check_count(source: Checkpoint, experts: int) -> None:
    a = source.architecture
    if not a.top_k <= experts < a.experts:
        raise InputError(
            f"asked to keep {experts} experts; wanted at least {a.top_k}, which each token selects, "
            f"and fewer than the {a.experts} there are"
        )
