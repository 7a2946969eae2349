"""What each command runs, and what it prints. Every one returns its facts, for --json.

A stage is imported when its command is given, so that --help answers at once.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import arguments
from .resources import held_bytes
from .telling import plus_minus, show, sizes, tell_rounding, told, trying_out

if TYPE_CHECKING:
    from ..calibrate.selection import Ranking
    from ..data.corpus import Corpus
    from ..fit import Layout
    from ..recipes.compress import Recipe


def corpus(a: arguments.TextArguments) -> Corpus:
    from ..data.corpus import Corpus

    return Corpus(data=a.data, heldout=a.heldout, tokens=a.tokens, length=a.length, seed=a.seed)


def layout(a: arguments.ParallelArguments) -> Layout | None:
    from ..fit import layout_of

    return layout_of(a.tensor_parallel, a.expert_parallel)


def ranking(a: arguments.RankingArguments, run: Path | None = None) -> Ranking:
    from ..calibrate.selection import Ranking

    return Ranking(criterion=a.criterion, policy=a.policy, domains=a.domains, until_stable=a.until_stable, run=run)


def run_inspect(a: arguments.Inspect) -> dict[str, Any]:
    from ..checkpoint.inspect import inspect, table

    facts = inspect(a.model, a.base)
    show(table(facts))
    for layer, ids in facts.get("kept", {}).items():
        print(f"layer {layer} kept experts {' '.join(map(str, ids))}")
    return facts


def run_prune(a: arguments.Prune) -> dict[str, Any]:
    from ..recipes.prune import Pruning, prune

    if a.loops and not a.preview:
        raise InputError("--loops probes what --preview compares; give --preview too")
    if a.run is not None and a.until_stable:
        raise InputError("--until-stable reads text, and --run reads none; give one of them")
    if a.repair and a.preview:
        raise InputError("--repair changes the model that is written, and --preview writes none; give one of them")
    if a.preview:
        return run_preview(a)
    if len(a.experts) > 1:
        raise InputError(f"asked to keep {a.experts} experts; wanted one count, or --preview to compare several")
    pruning = Pruning(
        experts=a.experts[0], ranking=ranking(a, a.run), repair=a.repair, check=a.check, memory_bytes=held_bytes(a)
    )
    with trying_out(reads_library(a)):
        return told_pruning(prune(a.model, a.out, pruning, corpus(a), command=a.line, quiet=a.quiet))


def reads_library(a: arguments.Prune) -> bool:
    """Whether the choice of experts, or a repair, depends on the standard library's text; of a run, on what it read."""
    from ..calibrate.criteria import CRITERIA
    from ..data.corpus import recorded_text

    reads = a.criterion not in CRITERIA or CRITERIA[a.criterion].reads_text
    own = a.data is not None
    if a.run is not None:
        return bool(recorded_text(a.run).get("trying_out")) or (a.repair and not own)
    return not own and (reads or a.repair)


def told_pruning(facts: dict[str, Any]) -> dict[str, Any]:
    from ..export.repair import sentence

    margins = sorted(facts["margins"].values())
    print(
        f"kept {facts['experts']} of {facts['source_experts']} experts in {len(margins)} layers "
        f"by {facts['criterion']} on {facts['calibration_tokens']:,} tokens"
    )
    print(f"cut margin (last kept over first dropped): least {margins[0]:.2%}, median {margins[len(margins) // 2]:.2%}")
    for layer, margin in facts["margins"].items():
        print(f"  layer {layer:>3}  margin {margin:7.2%}  halves agree {facts['jaccard'][layer]:4.0%}")
    if settled := facts.get("settled"):
        print(settled["verdict"])
    if "repair" in facts:
        print(sentence(facts["repair"]))
    for warning in facts["warnings"]:
        print(f"note: {warning}")
    sizes(facts)
    return facts


def run_preview(a: arguments.Prune) -> dict[str, Any]:
    from ..measure.preview import table
    from ..recipes.prune import Cuts, preview_cuts, probe_cuts

    cuts = Cuts(counts=a.experts, ranking=ranking(a, a.run), memory_bytes=held_bytes(a))
    outlooks = preview_cuts(a.model, a.out, cuts, corpus(a), quiet=a.quiet)
    probes = probe_cuts(a.model, a.out, outlooks, cuts.memory_bytes, quiet=a.quiet) if a.loops else {}
    show(table(outlooks))
    for name, found in probes.items():
        share, endless = plus_minus(vars(found.share)), found.endless
        ends = f"{endless.value:.0%} ({endless.low:.0%} to {endless.high:.0%}) of {found.prompts} texts end so"
        print(f"loops: {name:12} {share} of {found.new_tokens:,} tokens repeat; {ends}")
    print(f"plot: {a.out / 'moesaic' / 'preview.svg'}")
    return {"candidates": [o.facts() for o in outlooks], "loops": {n: found.facts() for n, found in probes.items()}}


def run_quantize(a: arguments.Quantize) -> dict[str, Any]:
    from ..recipes.quantize import Quantizing, quantize
    from ..rounding import ROUNDINGS

    asked = Quantizing(
        format=a.format, only=a.only, rest=a.rest, container=a.container, rounding=a.rounding or "rtn",
        layout=layout(a), check=a.check,
    )  # fmt: skip
    reads = asked.rounding in ROUNDINGS and bool(ROUNDINGS[asked.rounding].needs)
    with trying_out(reads and a.data is None):
        return told_rounding(quantize(a.model, a.out, asked, corpus(a), command=a.line, quiet=a.quiet))


def told_rounding(facts: dict[str, Any]) -> dict[str, Any]:
    tell_rounding(facts)
    if errors := sorted(e for layer in facts.get("expert_errors", {}).values() for e in layer):
        middle = errors[len(errors) // 2]
        print(
            f"weight error of {len(errors):,} experts: {errors[0]:.4f} to {errors[-1]:.4f}, median {middle:.4f} of their norm"
        )
    sizes(facts)
    return facts


def run_export(a: arguments.Export) -> dict[str, Any]:
    from ..recipes.convert import convert, export_run, is_run

    if is_run(a.model):
        facts = export_run(a.model, a.out, a.container, layout(a), check=a.check, quiet=a.quiet)
    elif a.container is None:
        raise InputError(f"{a.model} is a model and no run; say in which container to write it, as --to mlx")
    else:
        out = a.out or a.model.with_name(f"{a.model.name}-{a.container}")
        facts = convert(a.model, out, a.container, layout(a), check=a.check, quiet=a.quiet)
    for way, count in facts["matrices"].items():
        print(f"{count:>9,} matrices  {way}")
    sizes(facts)
    return facts


def run_verify(a: arguments.Verify) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..verify import verify

    verdict = verify(a.export, Checkpoint.open(a.source) if a.source else None, a.quiet)
    for note in verdict.notes:
        print(f"note: {note}")
    for finding in verdict.findings:
        print(f"FAIL  {finding}")
    print(
        ", ".join(f"{check} × {count:,}" for check, count in verdict.compared.items())
        + (": all hold" if verdict.holds else "")
    )
    facts = {
        "holds": verdict.holds,
        "compared": dict(verdict.compared),
        "findings": [vars(f) for f in verdict.findings],
        "notes": verdict.notes,
    }
    return facts | {"exit": 0 if verdict.holds else 1}


def run_calibrate(a: arguments.Calibrate) -> dict[str, Any]:
    from ..calibrate import Statistics, calibrate, check_unread, chunks
    from ..calibrate.selection import FEW_TOKENS
    from ..calibrate.until_stable import settle, table
    from ..checkpoint import Checkpoint
    from ..data.images import pictured

    source, stats = Checkpoint.open(a.model), a.run / "stats"
    source.check_values()
    settled = None
    if a.until_stable:
        experts = source.architecture.experts
        settled = settle(source, corpus(a), a.run, a.experts or [experts // 2, experts * 3 // 4], ranking(a), a.quiet)
        show(table(settled))
        print(settled.verdict)
    else:
        tokens = corpus(a).calibration(source, a.run / "tokens.safetensors")
        check_unread(stats, chunks(tokens))
        calibrate(source, tokens, stats, a.quiet)
    if pictures := pictured(source, corpus(a)):
        calibrate(source, pictures.tokens, stats, a.quiet, seen=pictures.seen)
    statistics = Statistics.load(stats, source)
    few = statistics.few(FEW_TOKENS)
    print(
        f"{statistics.tokens:,} tokens of {', '.join(statistics.domains)} through {len(statistics.layers)} MoE layers"
    )
    print(f"experts reached by fewer than {FEW_TOKENS} tokens: {len(few)}")
    print(f"experts with values that are no numbers: {len(statistics.nonfinite())}")
    print(f"statistics: {stats}")
    return {
        "tokens": statistics.tokens,
        "domains": statistics.domains,
        "few_tokens": few,
        "nonfinite": statistics.nonfinite(),
        "settled": settled.facts() if settled else None,
    }


def run_compress(a: arguments.Compress) -> dict[str, Any]:
    from ..recipes.compress import compress

    asked = replace(recipe(a), format=a.format, rest=a.rest, evaluation_tokens=a.evaluation_tokens)
    with trying_out(a.data is None):
        return told(compress(a.model, a.run, asked, corpus(a), command=a.line, quiet=a.quiet))


def recipe(a: arguments.Search) -> Recipe:
    """What the options of a search say; a size that --devices leaves is asked of `fit`."""
    from ..allocate import FORMATS_OFFERED, Limit, Offer, Pricing
    from ..checkpoint.inspect import size
    from ..recipes.compress import Recipe

    budget_bytes, served = a.budget_bytes, layout(a)
    if a.devices:
        room, fastest = room_on(a.model, a.devices, a.context)
        budget_bytes, served = room if budget_bytes is None else min(room, budget_bytes), served or fastest
        print(f"budget   {size(room)} on {a.devices}, served as {served.name}")
    return Recipe(
        ranking=ranking(a),
        offer=Offer(experts=a.experts, formats=a.formats or FORMATS_OFFERED, container=a.container, layout=served),
        limit=Limit(budget_bytes=budget_bytes, bits=a.bits),
        pricing=Pricing(harm=a.harm, seconds=a.seconds, memory_bytes=held_bytes(a)),
        rounding=a.rounding or "rtn",
        devices=a.devices or "",
        context=a.context,
    )


def room_on(model: Path, devices: str, context: int | None) -> tuple[int, Layout]:
    """The bytes that devices have room for, and how they would serve the model."""
    from ..checkpoint import Checkpoint
    from ..fit import Machine, Shapes, budget, choose

    machine, source = Machine.parse(devices), Checkpoint.open(model)
    return budget(machine, source, context), choose(Shapes.of(source), machine)


def run_measure(a: arguments.Search) -> dict[str, Any]:
    from ..recipes.compress import price_run

    facts = price_run(a.model, a.run, recipe(a), corpus(a), a.quiet)
    print("nats a token, each option alone, summed over the layers that can have it;", end=" ")
    print(f"{facts['harm']} on {facts['tokens']:,} tokens")
    for what, of in facts["totals"].items():
        print(f"{what:<10}" + "   ".join(f"{option} {nats:.4f}" for option, nats in of.items()))
    print(f"prices   {a.run / 'costs.json'}")
    return facts


def run_allocate(a: arguments.Search) -> dict[str, Any]:
    from ..recipes.compress import allocate_run

    facts = allocate_run(a.model, a.run, recipe(a), corpus(a), a.quiet)
    print(f"{'bytes':>18}  bits   experts  KL predicted, off by a factor {math.exp(facts['rule_error']):.2f} (rms)")
    for row in facts["curve"]:
        mark = "  <- knee" if row["knee"] else ""
        print(f"{row['bytes']:>18,}  {row['bits']:.2f}  {row['experts']:>7}  {row['predicted_nats']:.4f}{mark}")
    if best := facts["best"]:
        print(f"plan     {best['experts']} experts, {best['bytes']:,} of {best['budget_bytes']:,} bytes")
        print(f"         KL {best['predicted_nats']:.4f} predicted; no plan on offer below {best['bound_nats']:.4f}")
        print(f"plan     {a.run / 'plan.json'}")
    print(f"frontier {a.run / 'frontier.json'}")
    return facts


def run_demo(a: arguments.Demo) -> dict[str, Any]:
    from ..recipes.demo import demo

    return told(demo(a.run, a.quiet))


def run_fit(a: arguments.Fit) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..fit import Machine, explain, fit, table

    facts = fit(
        Checkpoint.open(a.model), Machine.parse(a.devices), context=a.context, kv=a.kv, concurrency=a.concurrency or 1
    )
    show(table(facts))
    if a.explain:
        print(explain(facts))
    return facts


def run_serve(a: arguments.Serve) -> dict[str, Any]:
    if a.engine == "local":
        return run_local(a)
    if not a.devices:
        raise InputError("no --devices are named, for which vLLM is to be set up; name them, or use --engine local")
    from ..checkpoint import Checkpoint
    from ..fit import Machine, fit
    from ..serve.vllm import deployment, render

    export, machine = Checkpoint.open(a.export), Machine.parse(a.devices)
    facts = fit(export, machine, context=a.context, kv=a.kv, concurrency=a.concurrency or 1)
    deployed = deployment(export, facts, host=a.host, port=a.port)
    if a.way:
        written = render(deployed, a.way)
        print(written)
        return {"printed": a.way, "text": written}
    if deployed.nodes > 1 or shutil.which("vllm") is None:
        why = "vLLM is not installed here" if deployed.nodes == 1 else f"this takes {deployed.nodes} machines"
        raise InputError(f"{why}; --print command, compose, kubernetes or ray writes what starts it where it is")
    return {"exit": subprocess.call(deployed.words(str(a.export)))}


def run_local(a: arguments.Serve) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..serve.local import Room, local, read_key, run

    key = read_key(a.key_file) if a.key_file else None
    room = Room(
        memory_bytes=a.expert_bytes, cache_bytes=a.cache_bytes, context=a.context, concurrency=a.concurrency,
        new_tokens=a.new_tokens,
    )  # fmt: skip
    run(local(Checkpoint.open(a.export), key, room), host=a.host, port=a.port)
    return {}


def run_report(a: arguments.Report) -> dict[str, Any]:
    from ..checkpoint.inspect import size
    from ..report import Naming, gather, push, report, uploads, write_card

    page = report(a.run, devices=a.devices or "", context=a.context)
    print(f"report   {page}")
    facts: dict[str, Any] = {"report": str(page)}
    if not a.card and not a.push:
        return facts
    known = gather(a.run, devices=a.devices or "", context=a.context)
    card = write_card(known, Naming(base_model=a.base_model or "", repository=a.push or "", unlicensed=a.unlicensed))
    print(f"card     {card}")
    facts["card"] = str(card)
    if a.push:
        files = uploads(known)
        for file in files:
            print(f"{file.bytes:>18,}  {file.to}")
        print(f"{len(files):,} files, {size(sum(f.bytes for f in files))}")
        facts["files"] = {f.to: f.bytes for f in files}
        if a.yes:
            facts["address"] = push(known, a.push, files, public=a.public, quiet=a.quiet)
        print(facts.get("address") or f"nothing was uploaded to {a.push}; --yes does it")
    return facts
