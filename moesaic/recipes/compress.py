"""The whole path, as a story: from a checkpoint to a smaller one, and to a page that says what it cost.

    calibrate → select → plan → export (rounded on text first, where the rounding looks at data) → verify → evaluate → report

or, where a size is asked for and not a plan, with prices, the frontier and measured candidates in select's place.

Every step leaves a file in the run folder and reads what the steps before it left, so the same call
continues wherever it was stopped.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..allocate import (
    Chosen,
    Limit,
    Offer,
    Pricing,
    Setting,
    check_limit,
    choose,
    exact,
    price_options,
    stored_bytes,
    trace_frontier,
)
from ..artifact import read_json, sweep_partials, write_json
from ..calibrate import CHUNK_TOKENS, Statistics, calibrate, check_domains
from ..calibrate.criteria import CRITERIA
from ..calibrate.selection import REAP, Ranking, Selection, check_names, select_experts
from ..calibrate.until_stable import calibrate_until_stable, statistics_of_run
from ..checkpoint import Checkpoint
from ..checkpoint.containers import CONTAINERS
from ..data.corpus import PYTHON_TEXT, Corpus
from ..data.tokens import TokenSet
from ..errors import FaultError, InputError
from ..evaluate import Conditions, Reading, Scores, evaluate
from ..export import export
from ..export.activations import calibrated
from ..export.sequential import overlaid_on_text
from ..fit import Layout, Machine, Shapes, budget, check_layout
from ..fit import choose as fastest
from ..formats import NAMES
from ..lock import held
from ..measure import Prices
from ..plan import DROP, SOURCE, Plan, overlay
from ..plan.blueprint import Blueprint, check_mtp
from ..report import report
from ..resources import THREADS
from ..rounding import ROUNDINGS, informed
from ..verify import verify
from ..verify.verdict import Verdict, expert_errors
from .machine import Use

CURVE = 12  # points of the frontier that are told
CHOICE_TOKENS = 16_384  # of unseen text, at most, to choose among candidates; as many judge, or more


@dataclass(frozen=True)
class Recipe:
    """What to make: how many experts stay, in which format they are written, and what becomes of the rest.

    Or how large it may be: with a `limit`, the formats of the offer are on offer to every unit, and kept counts too
    unless it names one.

    format             of routed experts, where there is no limit
    rest               of every other matrix
    evaluation_tokens  to judge the result by
    devices            that the result has to fit, with a request of `context` tokens (see `fitted`): "2x95GiB"
    """

    ranking: Ranking = REAP
    offer: Offer = field(default_factory=Offer)
    limit: Limit = field(default_factory=Limit)
    pricing: Pricing = field(default_factory=Pricing)
    format: str = SOURCE
    rest: str = SOURCE
    rounding: str = "rtn"
    evaluation_tokens: int = 65_536
    devices: str = ""
    context: int | None = None

    def setting(self, source: Checkpoint, run: Path, quiet: bool) -> Setting:
        """What finding a plan has to know."""
        return Setting(
            source=source,
            run=run,
            ranking=self.ranking,
            offer=self.offer,
            limit=self.limit,
            pricing=self.pricing,
            rounding=self.rounding,
            quiet=quiet,
        )

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        run = self.ranking.run
        return asdict(replace(self, ranking=replace(self.ranking, run=None))) | {"statistics": run and str(run)}


def compress(
    model: Path, run: Path, recipe: Recipe, corpus: Corpus = PYTHON_TEXT, command: str = "", quiet: bool = False
) -> dict[str, Any]:
    """Compress `model` by `recipe` into the folder `run`; returns JSON-able facts.

    Leaves run/model (the export), run/report.html and every number behind it. Raises `InputError`
    before the first sweep for what cannot be, `CheckError` when the export does not verify, `FaultError`
    when it is larger than its budget.
    """
    source, recipe = Checkpoint.open(model), fitted(model, recipe)
    recipe = replace(recipe, rounding=informed(recipe.rounding, corpus.is_own))
    check(source, recipe)
    check_goal(source, recipe)
    if recipe.limit:
        check_limit(recipe.setting(source, run, True))
    elif recipe.offer.layout is not None:
        check_layout(Blueprint.of(source, as_told(source, recipe, None)), recipe.offer.layout)
    source.check_values()
    with held(run):
        return compressed(source, run, recipe, corpus, command, quiet)


def fitted(model: Path, recipe: Recipe) -> Recipe:
    """The recipe with the room that its devices have for a limit, and served there as is fastest, unless it says how."""
    if not recipe.devices:
        return recipe
    (room, layout), limit = room_on(model, recipe.devices, recipe.context), recipe.limit
    least = room if limit.budget_bytes is None else min(room, limit.budget_bytes)
    offer = replace(recipe.offer, layout=recipe.offer.layout or layout)
    return replace(recipe, limit=replace(limit, budget_bytes=least), offer=offer)


def room_on(model: Path, devices: str, context: int | None) -> tuple[int, Layout]:
    """The bytes that devices have room for, and how they would serve the model."""
    machine, source = Machine.parse(devices), Checkpoint.open(model)
    return budget(machine, source, context), fastest(Shapes.of(source), machine)


def use(model: Path, run: Path, corpus: Corpus) -> Use:
    """What of the machine `compress` takes, and each stage of it."""
    return Use((run / THREADS,), model, min(corpus.tokens, CHUNK_TOKENS))


def compressed(
    source: Checkpoint, run: Path, recipe: Recipe, corpus: Corpus, command: str, quiet: bool
) -> dict[str, Any]:
    """`compress` of what can be, in a folder that nobody else writes."""
    sweep_partials(run)
    write_json(run / "source.json", "source", describe(source) | {"command": command, "recipe": recipe.facts()}, {})

    chosen = None
    if recipe.limit:
        chosen, selection, rows = within_limit(source, run, recipe, corpus, quiet)
        plan = chosen.plan
    else:
        # Text that is too short says so now.
        rows = corpus.evaluation(source, run / "evaluation.safetensors", recipe.evaluation_tokens)
        selection = select(source, run, recipe, corpus, quiet)
        plan = as_told(source, recipe, selection)

    def text() -> TokenSet:
        return corpus.calibration(source, run / "tokens.safetensors")

    if Blueprint.of(source, plan).uncalibrated:
        plan = calibrated(source, plan, text(), run / "activations", quiet)
    plan.save(run / "plan.json", {"source": source.identity})
    plan, rounded = overlaid_on_text(source, plan, run / "model", run, text, quiet)
    plan.save(run / "plan.json", {"source": source.identity})

    result = export(source, plan, run / "model", quiet, run)
    overlay.drop(*(run / name for name in plan.overlays))
    if chosen and (size := stored_bytes(run / "model")) > chosen.budget_bytes:
        raise FaultError(f"{run / 'model'} takes {size:,} bytes of a budget of {chosen.budget_bytes:,}")
    verdict = verify(run / "model", source, quiet)
    inputs = {"source": source.identity, "export": result.identity}
    write_json(run / "verify.json", "verify", findings(result, verdict), inputs)
    verdict.require(run / "model", "remove it and run again")

    scores = evaluate(source, result, [Reading.of(rows)], run, Conditions(("none", "engine")), quiet)
    page = report(run)
    return summary(source, result, scores, selection) | {
        "run": str(run),
        "report": str(page),
        "verified": dict(verdict.compared),
        "chosen": chosen.facts if chosen else None,
        "rendered": rounded,
        "settled": settled_by(run) if recipe.ranking.until_stable else None,
    }


def check(source: Checkpoint, recipe: Recipe) -> None:
    """Refuse in the first second what would fail in the last hour."""
    a, experts, container = source.architecture, recipe.offer.experts, recipe.offer.container
    check_names(recipe.ranking.policy, (recipe.ranking.criterion,))
    if experts != a.experts and (recipe.limit or experts is not None):
        check_mtp(source, recipe.ranking.mtp)
    if experts is not None and (why := a.refusal(experts, all_too=True)):
        raise InputError(f"asked to keep {experts} experts; {why}")
    for name in (recipe.format, recipe.rest):
        if name != SOURCE and name not in NAMES:
            raise InputError(f"unknown format {name!r}; choose from source, {', '.join(NAMES)}")
    if recipe.rounding not in ROUNDINGS:
        raise InputError(f"unknown rounding {recipe.rounding!r}; choose from {', '.join(ROUNDINGS)}")
    if container not in CONTAINERS:
        raise InputError(f"unknown container {container!r}; choose from {', '.join(CONTAINERS)}")
    if recipe.limit and not keeps_formats(recipe):
        raise InputError(
            "both a size and a format for experts or the rest were given; with a size, offer several with --formats"
        )


def check_goal(source: Checkpoint, recipe: Recipe) -> None:
    """Refuse to copy a model and to measure the copy against it."""
    if not recipe.limit and keeps_formats(recipe) and recipe.offer.experts in (None, source.architecture.experts):
        raise InputError(
            "no goal was given, so the result would be a copy of the model; name one: --fit 90GB, --devices 2x95GiB or "
            "--bits 4.25 for a size, --format mxfp4 to round experts, --experts 64 to keep so many in each layer"
        )


def keeps_formats(recipe: Recipe) -> bool:
    return recipe.format == SOURCE and recipe.rest == SOURCE


def as_told(source: Checkpoint, recipe: Recipe, selection: Selection | None) -> Plan:
    """The plan that the recipe spells out."""
    units = source.architecture.units.items()
    return Plan(
        container=source.container.name if keeps_formats(recipe) else recipe.offer.container,
        kept=selection.cut.kept if selection else {},
        formats={
            unit: recipe.format if m[0].role == "experts" else recipe.rest for unit, m in units if m[0].role != "mtp"
        },
        rounding=recipe.rounding,
        drop_mtp=recipe.ranking.mtp == DROP,
    )


def price_run(
    model: Path, run: Path, recipe: Recipe, corpus: Corpus = PYTHON_TEXT, quiet: bool = False
) -> dict[str, Any]:
    """`compress` until every option has its price; returns Σ over layers by role and format, and by kept count."""
    with held(run):
        setting, prices, _ = priced(model, run, recipe, corpus, quiet)
    units, totals = setting.source.architecture.units, dict[str, dict[str, float]]()
    for unit, of in prices.rounded.items():
        row = totals.setdefault(units[unit][0].role, {})
        for format, price in of.items():
            row[format] = row.get(format, 0.0) + price.nats
    counts = sorted({kept for of in prices.dropped.values() for kept in of}, reverse=True)
    totals["dropping"] = {
        f"to {kept}": sum(of[kept].nats for of in prices.dropped.values())
        for kept in counts[:: -(-len(counts) // 8) or 1]
    }
    return {"harm": prices.harm, "tokens": prices.tokens, "totals": totals, "costs": str(run / "costs.json")}


def allocate_run(
    model: Path, run: Path, recipe: Recipe, corpus: Corpus = PYTHON_TEXT, quiet: bool = False
) -> dict[str, Any]:
    """`compress` until the frontier is drawn; returns some of its points, and the best plan where there is a budget."""
    with held(run):
        setting, prices, text = priced(model, run, recipe, corpus, quiet)
        traced = trace_frontier(setting, prices, text)
        facts: dict[str, Any] = {"rule_error": traced.rule.error, "curve": traced.curve(CURVE), "best": None}
        if best := traced.best:
            candidate = exact(setting, traced, best)
            candidate.plan.save(run / "plan.json", {"source": setting.source.identity})
            facts["best"] = {
                "experts": candidate.experts, "bytes": candidate.bytes, "budget_bytes": best.budget_bytes,
                "predicted_nats": candidate.predicted_nats, "bound_nats": float(traced.rule.predict(best.bound)),
            }  # fmt: skip
    return facts


def priced(model: Path, run: Path, recipe: Recipe, corpus: Corpus, quiet: bool) -> tuple[Setting, Prices, TokenSet]:
    """Calibrated and priced, with the text that it was priced on."""
    source, recipe = Checkpoint.open(model), fitted(model, recipe)
    recipe = replace(recipe, rounding=informed(recipe.rounding, corpus.is_own))
    check(source, recipe)
    setting = recipe.setting(source, run, quiet)
    check_limit(setting)
    source.check_values()
    statistics, tokens = learn(source, run, recipe, corpus, quiet)
    return setting, *price_options(setting, statistics, tokens)


def within_limit(
    source: Checkpoint, run: Path, recipe: Recipe, corpus: Corpus, quiet: bool
) -> tuple[Chosen, Selection | None, TokenSet]:
    """The plan that was measured best within the recipe's limit, and rows of text that took no part in finding it."""
    judging = recipe.evaluation_tokens
    both = judging + min(CHOICE_TOKENS, judging)
    unseen = corpus.evaluation(source, run / "heldout.safetensors", both)
    count = max(1, round(unseen.rows * (1 - judging / both)))
    mine = set(np.linspace(0, unseen.rows - 1, count).round().astype(int).tolist())
    choice, rows = (unseen.take([i for i in range(unseen.rows) if (i in mine) == its]) for its in (True, False))
    rows.save(run / "evaluation.safetensors")
    statistics, tokens = learn(source, run, recipe, corpus, quiet)
    chosen = choose(recipe.setting(source, run, quiet), statistics, tokens, choice)
    kept = chosen.plan.experts(source.architecture.experts)
    return chosen, noted(source, run, recipe.ranking, kept, (statistics, tokens)), rows


def learn(source: Checkpoint, run: Path, recipe: Recipe, corpus: Corpus, quiet: bool) -> tuple[Statistics, TokenSet]:
    """What is known of every expert, and the text that it was learnt from."""
    ranking, asked, experts = recipe.ranking, recipe.offer.experts, source.architecture.experts
    if ranking.until_stable:
        counts = [asked] if asked and asked < experts else [experts // 2, experts * 3 // 4]
        stability = calibrate_until_stable(source, corpus, run, counts, ranking, quiet)
        return stability.statistics, stability.tokens
    tokens = corpus.calibration(source, run / "tokens.safetensors")
    if ranking.domains is not None:
        check_domains(ranking.domains, tokens.domains)
    weighed = CRITERIA[ranking.criterion].reads_weights
    if ranking.run is not None:
        return statistics_of_run(source, ranking.run, weighed, quiet), tokens
    return calibrate(source, tokens, run / "stats", quiet, weighed), tokens


def settled_by(run: Path) -> str | None:
    """How much text was enough, in a sentence; None where no experts were chosen."""
    file = run / "settled.json"
    return read_json(file, "settled")["verdict"] if file.exists() else None


def select(source: Checkpoint, run: Path, recipe: Recipe, corpus: Corpus, quiet: bool) -> Selection | None:
    """Which experts stay; None when all do, and then no text is read."""
    experts = recipe.offer.experts
    if experts is None or experts == source.architecture.experts:
        return None
    known = learn(source, run, recipe, corpus, quiet)
    return noted(source, run, recipe.ranking, experts, known)


def noted(
    source: Checkpoint, run: Path, ranking: Ranking, experts: int, known: tuple[Statistics, TokenSet]
) -> Selection | None:
    """The selection of so many experts, and run/selection.json; None for all of them."""
    if experts == source.architecture.experts:
        return None
    statistics, tokens = known
    selection = select_experts(statistics, ranking.criterion, experts, ranking.policy, ranking.domains)
    facts = selection.facts() | {"scores": selection.score_LE.tolist(), "tokens": dict(tokens.facts)}
    write_json(run / "selection.json", "selection", facts, {"source": source.identity, "tokens": tokens.identity})
    return selection


def describe(source: Checkpoint) -> dict[str, Any]:
    return {
        "model": str(source.path),
        "family": source.family.name,
        "container": source.container.name,
        "identity": source.identity,
        "experts": source.architecture.experts,
        "bytes": sum(t.bytes for t in source.inventory),
    }


def findings(result: Checkpoint, verdict: Verdict) -> dict[str, Any]:
    return {
        "holds": verdict.holds,
        "compared": dict(verdict.compared),
        "findings": [asdict(f) for f in verdict.findings],
        "notes": verdict.notes,
        "expert_errors": expert_errors(result, verdict),
    }


def summary(source: Checkpoint, result: Checkpoint, scores: Scores, selection: Selection | None) -> dict[str, Any]:
    """What the run came to: bytes before and after, and each headline score with its error."""
    found = {
        name: scores.find(name) for name in ("kl_mean", "ppl_source", "ppl_export", "delta_ln_ppl", "top1_agreement")
    }
    return {
        "source_bytes": sum(t.bytes for t in source.inventory),
        "bytes": sum(t.bytes for t in result.inventory),
        "experts": result.architecture.experts,
        "source_experts": source.architecture.experts,
        "scores": {name: asdict(score) for name, score in found.items() if score is not None},
        "warnings": selection.warnings if selection else [],
    }
