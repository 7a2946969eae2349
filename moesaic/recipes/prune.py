"""Experts only: calibrate, rank, cut, and copy what stays byte for byte. The source's format is the result's.

Its working files stand in OUT/moesaic/, so a run can be looked into, and continued, later.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact import atomic, write_json
from ..calibrate import WEIGHTS, Statistics, calibrate, check_domains, weigh
from ..calibrate.criteria import CRITERIA
from ..calibrate.selection import AUTO, EVERY, REAP, Ranking, check_names, select_experts
from ..calibrate.until_stable import calibrate_until_stable, statistics_of_run
from ..checkpoint import Checkpoint
from ..data.corpus import PYTHON_TEXT, Corpus, recorded_text
from ..data.tokens import TokenSet
from ..errors import InputError
from ..evaluate.repetition import Probe, probe
from ..export import export
from ..export.claim import check_free
from ..export.repair import FOLDER as REPAIRED
from ..export.repair import check_repairable, repair
from ..lock import held
from ..measure import Trial
from ..measure.preview import Candidate, Kept, Outlook, candidates, preview
from ..plan import DROP, Plan, overlay
from ..plan.blueprint import Blueprint, check_mtp
from ..plan.pieces import NOTE
from ..progress import progress
from ..report.outlooks import plot
from ..resources import THREADS
from ..verify import verify
from .machine import Use

PREVIEW_TOKENS = 8_192  # enough to tell criteria apart; the verdict on what ships is evaluate's


@dataclass(frozen=True)
class Pruning:
    """What is asked for.

    experts       that every layer keeps
    repair        fit shared experts to compensate for dropped ones, where that helps (see `repair`)
    check         reopen the result and compare it with the source
    memory_bytes  for hidden states of cuts side by side, where criteria are compared; None: half of what is available
    """

    experts: int
    ranking: Ranking = REAP
    repair: bool = False
    check: bool = True
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Cuts:
    """What is to be previewed: cuts to each of `counts`, by every criterion ("auto") or one; `memory_bytes` as above."""

    counts: Sequence[int]
    ranking: Ranking = EVERY
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Setting:
    """What every step has to know; `work` is where its files stand."""

    source: Checkpoint
    work: Path
    ranking: Ranking
    corpus: Corpus
    quiet: bool
    memory_bytes: int | None


@dataclass(frozen=True)
class Known:
    """Statistics, and where they come from: `facts` of the text, and identities of what was read."""

    statistics: Statistics
    facts: Mapping[str, Any]
    inputs: Mapping[str, str]


def prune(
    model: Path, out: Path, pruning: Pruning, corpus: Corpus = PYTHON_TEXT, command: str = "", quiet: bool = False
) -> dict[str, Any]:
    """Write to `out` the model that keeps `pruning.experts` experts in every layer; returns JSON-able facts.

    Raises `InputError` before anything is read when the count cannot be, `CheckError` when the result does not verify.
    """
    source, experts, ranking = Checkpoint.open(model), pruning.experts, pruning.ranking
    check_count(source, experts)
    check_names(ranking.policy, ranking.criteria)
    check_mtp(source, ranking.mtp)
    if pruning.repair:
        check_repairable(source)
    work = out / "moesaic"
    check_free(out, source)
    source.check_values()
    if (out / NOTE).exists() and (there := Plan.load(out / NOTE).experts(source.architecture.experts)) != experts:
        raise InputError(f"{out} holds an export of {there} experts a layer; name another folder or remove it")
    setting = Setting(source, work, ranking, corpus, quiet, pruning.memory_bytes)
    with held(work):
        return pruned(setting, out, pruning, command)


def use(model: Path, out: Path, run: Path | None, corpus: Corpus) -> Use:
    """What of the machine `prune` and its preview take; `run` is that of the ranking."""
    return Use(tuple(folder / THREADS for folder in (out / "moesaic", run) if folder), model, corpus.tokens)


def pruned(setting: Setting, out: Path, pruning: Pruning, command: str) -> dict[str, Any]:
    """`prune` of what can be, in a folder that nobody else writes."""
    source, work, ranking, quiet = setting.source, setting.work, setting.ranking, setting.quiet
    experts, criterion = pruning.experts, ranking.criterion
    known = know(setting, [experts])
    if criterion == AUTO:
        criterion = look_ahead(setting, known.statistics, [experts])[0].candidate.criterion
    selection = select_experts(known.statistics, criterion, experts, ranking.policy, ranking.domains)
    plan = Plan(container=source.container.name, kept=selection.cut.kept, drop_mtp=ranking.mtp == DROP)
    mended: dict[str, Any] = {}
    if pruning.repair:
        plan, mended["repair"] = repaired(setting, plan)
    result = export(source, plan, out, quiet)
    overlay.drop(work / REPAIRED)
    facts = selection.facts() | {
        "command": command,
        "model": str(source.path),
        "out": str(out),
        "experts": experts,
        "source_experts": source.architecture.experts,
        "source_bytes": sum(t.bytes for t in source.inventory),
        "bytes": sum(t.bytes for t in result.inventory),
        **known.facts,
        **mended,
    }
    if pruning.check:
        verdict = verify(out, source, quiet)
        facts["verified"] = dict(verdict.compared)
        verdict.require(out, "remove it and prune again")
    note = facts | {"scores": selection.score_LE.tolist()}
    write_json(work / "prune.json", "prune", note, known.inputs)
    return facts


def repaired(setting: Setting, plan: Plan) -> tuple[Plan, dict[str, Any]]:
    """The plan with shared experts fitted to its cut, if that helps on text not fitted on; and what it changed."""
    source, work, corpus = setting.source, setting.work, setting.corpus
    folder = work / REPAIRED
    if overlay.is_dropped(folder) and not (work.parent / "config.json").exists():
        shutil.rmtree(folder)  # the export that had taken it in is gone
    rows = corpus.evaluation(source, work / "preview.safetensors", PREVIEW_TOKENS, at_most=True)
    tokens = corpus.calibration(source, work / "tokens.safetensors")
    found, facts = repair(Blueprint.of(source, plan), tokens, rows, folder, seed=corpus.seed, quiet=setting.quiet)
    return replace(plan, overlays={REPAIRED: found} if found else {}), facts


def know(setting: Setting, counts: Sequence[int]) -> Known:
    """What the ranking asks for: read from a run, from weights alone, or from as much text as it takes."""
    source, work, ranking, quiet = setting.source, setting.work, setting.ranking, setting.quiet
    inputs, weighed = {"source": source.identity}, any(CRITERIA[name].reads_weights for name in ranking.criteria)
    if ranking.run is not None:
        return Known(
            statistics_of_run(source, ranking.run, weighed, quiet),
            {"statistics": str(ranking.run), "tokens": recorded_text(ranking.run)},
            inputs,
        )
    if not any(CRITERIA[name].reads_text for name in ranking.criteria):
        return Known(Statistics.of_weights(source, weigh(source, work / WEIGHTS, quiet)), {}, inputs)
    if ranking.until_stable:
        stability = calibrate_until_stable(source, setting.corpus, work, counts, ranking, quiet)
        statistics, tokens = stability.statistics, stability.tokens
        weights = weigh(source, work / WEIGHTS, quiet) if weighed else {}
        facts = {"tokens": dict(tokens.facts), "settled": stability.facts()}
        return Known(replace(statistics, weights=weights), facts, inputs | {"tokens": tokens.identity})
    tokens = setting.corpus.calibration(source, work / "tokens.safetensors")
    if ranking.domains is not None:
        check_domains(ranking.domains, tokens.domains)
    statistics = calibrate(source, tokens, work / "stats", quiet, weighed)
    return Known(statistics, {"tokens": dict(tokens.facts)}, inputs | {"tokens": tokens.identity})


def preview_cuts(
    model: Path, out: Path, cuts: Cuts, corpus: Corpus = PYTHON_TEXT, quiet: bool = False
) -> list[Outlook]:
    """Measure `cuts`, and write no model. Best first."""
    source, counts, ranking = Checkpoint.open(model), cuts.counts, cuts.ranking
    for count in counts:
        check_count(source, count)
    check_names(ranking.policy, ranking.criteria)
    source.check_values()
    setting = Setting(source, out / "moesaic", ranking, corpus, quiet, cuts.memory_bytes)
    with held(setting.work):
        return look_ahead(setting, know(setting, counts).statistics, counts)


def probe_cuts(
    model: Path, out: Path, outlooks: Sequence[Outlook], memory_bytes: int | None = None, quiet: bool = False
) -> dict[str, Probe]:
    """How the texts repeat that the source and the best cut to each count write, after `preview_cuts`: by "source"
    and "16 reap"."""
    source, work = Checkpoint.open(model), out / "moesaic"
    rows = TokenSet.load(work / "preview.safetensors")
    best: dict[int, Candidate] = {}
    for o in outlooks:
        best.setdefault(o.candidate.experts, o.candidate)
    kept: dict[str, Kept | None] = {"source": None} | {f"{k} {c.criterion}": c.kept for k, c in best.items()}
    probes: dict[str, Probe] = {}
    with progress("write text", len(kept), "models", quiet) as meter:
        for name, ids in kept.items():
            probes[name] = probe(source, rows, ids, memory_bytes=memory_bytes)
            meter.advance(1)
    facts = {"models": {name: found.facts() for name, found in probes.items()}}
    with held(work):
        write_json(work / "loops.json", "loops", facts, {"source": source.identity, "tokens": rows.identity})
    return probes


def look_ahead(setting: Setting, statistics: Statistics, counts: Sequence[int]) -> list[Outlook]:
    """Candidates measured on text that calibration did not see, best first; kept in preview.json and preview.svg."""
    source, work, ranking, corpus = setting.source, setting.work, setting.ranking, setting.corpus
    rows = corpus.evaluation(source, work / "preview.safetensors", PREVIEW_TOKENS, at_most=True)
    cuts = candidates(statistics, counts, ranking.criteria, policy=ranking.policy, domains=ranking.domains)
    trial = Trial(tokens=rows, memory_bytes=setting.memory_bytes, quiet=setting.quiet)
    outlooks = preview(source, cuts, trial, work / "preview", corpus.seed)
    facts = {"model": str(source.path), "candidates": [o.facts() for o in outlooks], "seed": corpus.seed}
    facts["text"] = dict(rows.facts)
    write_json(work / "preview.json", "preview", facts, {"source": source.identity, "tokens": rows.identity})
    with atomic(work / "preview.svg") as partial:
        partial.write_text(plot(outlooks), encoding="utf-8")
    return outlooks


def check_count(source: Checkpoint, experts: int) -> None:
    if why := source.architecture.refusal(experts):
        raise InputError(f"asked to keep {experts} experts; {why}")
