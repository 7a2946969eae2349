"""Experts only: calibrate, rank, cut, and copy what stays byte for byte. The source's format is the result's.

Its working files stand in OUT/moesaic/, so a run can be looked into, and continued, later.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import overlay
from .artifact import atomic, write_json
from .calibrate import WEIGHTS, Statistics, calibrate, check_domains, weigh
from .checkpoint import Checkpoint
from .corpus import PYTHON_TEXT, Corpus
from .criteria import CRITERIA
from .errors import InputError
from .export import NOTE, check_free, export
from .loops import Probe, probe
from .plan import Plan
from .preview import Candidate, Kept, Outlook, candidates, plot, preview
from .progress import progress
from .repair import FOLDER as REPAIRED
from .repair import check_repairable, repair
from .select import POOLED, check_names, select_experts
from .settle import settle
from .tokens import TokenSet
from .verify import verify

PREVIEW_TOKENS = 8_192  # enough to tell criteria apart; the verdict on what ships is evaluate's
AUTO = "auto"


@dataclass(frozen=True)
class Ranking:
    """How experts are ranked, and by what text.

    criterion     one of criteria/, or "auto": the one whose cut has the smallest KL on text not calibrated on
                  (what `until_stable` watches is then REAP)
    policy        how domains are weighed against each other: "pooled", or one of criteria.POLICIES
    domains       name -> share, of those to be heard; None: all alike
    until_stable  read more and more until the choice stops moving (see `settle`)
    run           a folder where `calibrate` left statistics: all of them are used, and no text is read for it
    """

    criterion: str = "reap"
    policy: str = POOLED
    domains: Mapping[str, float] | None = None
    until_stable: bool = False
    run: Path | None = None

    @property
    def criteria(self) -> Sequence[str]:
        return sorted(CRITERIA) if self.criterion == AUTO else (self.criterion,)


REAP, EVERY = Ranking(), Ranking(AUTO)


@dataclass(frozen=True)
class Known:
    """Statistics, and where they come from: `facts` of the text, and identities of what was read."""

    statistics: Statistics
    facts: Mapping[str, Any]
    inputs: Mapping[str, str]


def prune(
    model: Path, out: Path, experts: int, ranking: Ranking = REAP, corpus: Corpus = PYTHON_TEXT,
    check: bool = True, quiet: bool = False, command: str = "", mend: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write to `out` the model that keeps `experts` experts in every layer; returns JSON-able facts.

    With `mend`, shared experts take over what dropped ones gave, where that helps (see `repair`). Raises `InputError`
    before anything is read when the count cannot be, `CheckError` when the result does not verify.
    """
    source = Checkpoint.open(model)
    check_count(source, experts)
    check_names(ranking.policy, ranking.criteria)
    if mend:
        check_repairable(source)
    work = out / "moesaic"
    check_free(out, source)
    source.check_values()
    if (out / NOTE).exists() and (there := Plan.load(out / NOTE).experts(source.architecture.experts)) != experts:
        raise InputError(f"{out} holds an export of {there} experts a layer; name another folder or remove it")
    known = know(source, [experts], ranking, corpus, work, quiet)
    criterion = ranking.criterion
    if criterion == AUTO:
        criterion = look_ahead(source, known.statistics, [experts], ranking, corpus, work, quiet)[0].candidate.criterion
    selection = select_experts(known.statistics, criterion, experts, ranking.policy, ranking.domains)
    plan = Plan(container=source.container.name, kept=selection.cut.kept)
    mended: dict[str, Any] = {}
    if mend:
        plan, mended["repair"] = repaired(source, plan, corpus, work, quiet)
    result = export(source, plan, out, quiet)
    overlay.drop(work / REPAIRED)
    facts = selection.facts() | {
        "command": command,
        "model": str(model),
        "out": str(out),
        "experts": experts,
        "source_experts": source.architecture.experts,
        "source_bytes": sum(t.bytes for t in source.inventory),
        "bytes": sum(t.bytes for t in result.inventory),
        **known.facts,
        **mended,
    }
    if check:
        verdict = verify(out, source, quiet)
        facts["verified"] = dict(verdict.compared)
        verdict.require(out, "remove it and prune again")
    note = facts | {"scores": selection.score_LE.tolist()}
    write_json(work / "prune.json", "prune", note, known.inputs)
    return facts


def repaired(source: Checkpoint, plan: Plan, corpus: Corpus, work: Path, quiet: bool) -> tuple[Plan, dict[str, Any]]:
    """The plan with shared experts fitted to its cut, if that helps on text not fitted on; and what it changed."""
    folder = work / REPAIRED
    if overlay.is_dropped(folder) and not (work.parent / "config.json").exists():
        shutil.rmtree(folder)  # the export that had taken it in is gone
    rows = corpus.evaluation(source, work / "preview.safetensors", PREVIEW_TOKENS, at_most=True)
    tokens = corpus.calibration(source, work / "tokens.safetensors")
    found, facts = repair(source, plan, tokens, rows, folder, corpus.seed, quiet)
    return replace(plan, overlays={REPAIRED: found} if found else {}), facts


def know(source: Checkpoint, counts: Sequence[int], ranking: Ranking, corpus: Corpus, work: Path, quiet: bool) -> Known:
    """What `ranking` asks for: read from a run, from weights alone, or from as much text as it takes."""
    inputs, weighs = {"source": source.identity}, any(CRITERIA[name].reads_weights for name in ranking.criteria)
    if ranking.run is not None:
        statistics = Statistics.load(ranking.run / "stats", source)
        weights = weigh(source, ranking.run / WEIGHTS, quiet) if weighs else {}
        return Known(replace(statistics, weights=weights), {"statistics": str(ranking.run)}, inputs)
    if not any(CRITERIA[name].reads_text for name in ranking.criteria):
        return Known(Statistics.of_weights(source, weigh(source, work / WEIGHTS, quiet)), {}, inputs)
    if ranking.until_stable:
        criterion = "reap" if ranking.criterion == AUTO else ranking.criterion
        settled = settle(source, corpus, work, counts, criterion, ranking.policy, ranking.domains, quiet)
        statistics, tokens = settled.statistics, settled.tokens
        weights = weigh(source, work / WEIGHTS, quiet) if weighs else {}
        facts: dict[str, Any] = {"tokens": dict(tokens.facts), "settled": settled.facts()}
        return Known(replace(statistics, weights=weights), facts, inputs | {"tokens": tokens.identity})
    tokens = corpus.calibration(source, work / "tokens.safetensors")
    if ranking.domains is not None:
        check_domains(ranking.domains, tokens.domains)
    statistics = calibrate(source, tokens, work / "stats", quiet, weighs)
    return Known(statistics, {"tokens": dict(tokens.facts)}, inputs | {"tokens": tokens.identity})


def preview_cuts(
    model: Path, out: Path, counts: Sequence[int], ranking: Ranking = EVERY, corpus: Corpus = PYTHON_TEXT,
    loops: bool = False, quiet: bool = False,
) -> tuple[list[Outlook], dict[str, Probe]]:  # fmt: skip
    """Measure cuts to each of `counts`, by every criterion ("auto") or one, and write no model.

    With `loops`, the source and the best cut to each count write text too, and how it repeats is in the second
    result, by "source" and "16 reap".
    """
    source = Checkpoint.open(model)
    for count in counts:
        check_count(source, count)
    check_names(ranking.policy, ranking.criteria)
    source.check_values()
    work = out / "moesaic"
    known = know(source, counts, ranking, corpus, work, quiet)
    outlooks = look_ahead(source, known.statistics, counts, ranking, corpus, work, quiet)
    probes: dict[str, Probe] = {}
    if loops:
        rows = TokenSet.load(work / "preview.safetensors")
        best: dict[int, Candidate] = {}
        for o in outlooks:
            best.setdefault(o.candidate.experts, o.candidate)
        kept: dict[str, Kept | None] = {"source": None} | {f"{k} {c.criterion}": c.kept for k, c in best.items()}
        with progress("write text", len(kept), "models", quiet) as meter:
            for name, ids in kept.items():
                probes[name] = probe(source, rows, ids)
                meter.advance(1)
        facts = {"models": {name: found.facts() for name, found in probes.items()}}
        write_json(work / "loops.json", "loops", facts, {"source": source.identity, "tokens": rows.identity})
    return outlooks, probes


def look_ahead(
    source: Checkpoint, statistics: Statistics, counts: Sequence[int], ranking: Ranking, corpus: Corpus, work: Path,
    quiet: bool,
) -> list[Outlook]:  # fmt: skip
    """Candidates measured on text that calibration did not see, best first; kept in preview.json and preview.svg."""
    rows = corpus.evaluation(source, work / "preview.safetensors", PREVIEW_TOKENS, at_most=True)
    cuts = candidates(statistics, counts, ranking.criteria, policy=ranking.policy, domains=ranking.domains)
    outlooks = preview(source, cuts, rows, corpus.seed, quiet)
    facts = {"model": str(source.path), "candidates": [o.facts() for o in outlooks], "seed": corpus.seed}
    facts["text"] = dict(rows.facts)
    write_json(work / "preview.json", "preview", facts, {"source": source.identity, "tokens": rows.identity})
    with atomic(work / "preview.svg") as partial:
        partial.write_text(plot(outlooks), encoding="utf-8")
    return outlooks


def check_count(source: Checkpoint, experts: int) -> None:
    a = source.architecture
    if not a.top_k <= experts < a.experts:
        raise InputError(
            f"asked to keep {experts} experts; wanted at least {a.top_k}, which each token selects, "
            f"and fewer than the {a.experts} there are"
        )
