"""What each command runs, and what it prints. Every one returns its facts, for --json.

A module is imported when its command is given, so that --help answers at once.
"""

import argparse
import importlib
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ..errors import InputError

Arguments = argparse.Namespace


def room(name: str) -> Any:
    """A module of this package, imported now."""
    return importlib.import_module(f"moesaic.{name}")


def corpus(a: Arguments) -> Any:
    return room("corpus").Corpus(a.data, a.heldout, a.tokens, a.length, a.seed)


def layout(a: Arguments) -> Any:
    return room("fit").layout_of(a.tensor_parallel, a.expert_parallel)


def run_inspect(a: Arguments) -> dict[str, Any]:
    facts = room("inspect").inspect(a.model, a.base)
    show(room("inspect").table(facts))
    for layer, ids in facts.get("kept", {}).items():
        print(f"layer {layer} kept experts {' '.join(map(str, ids))}")
    return facts


def run_prune(a: Arguments) -> dict[str, Any]:
    stage = room("prune")
    ranking = stage.Ranking(a.criterion, a.policy, a.domains, a.until_stable, a.run)
    if a.loops and not a.preview:
        raise InputError("--loops probes what --preview compares; give --preview too")
    if a.run is not None and a.until_stable:
        raise InputError("--until-stable reads text, and --run reads none; give one of them")
    if a.repair and a.preview:
        raise InputError("--repair changes the model that is written, and --preview writes none; give one of them")
    if a.preview:
        outlooks, probes = stage.preview_cuts(a.model, a.out, a.experts, ranking, corpus(a), a.loops, a.quiet)
        show(room("preview").table(outlooks))
        for name, found in probes.items():
            share, endless = plus_minus(vars(found.share)), found.endless
            ends = f"{endless.value:.0%} ({endless.low:.0%} to {endless.high:.0%}) of {found.prompts} texts end so"
            print(f"loops: {name:12} {share} of {found.new_tokens:,} tokens repeat; {ends}")
        print(f"plot: {a.out / 'moesaic' / 'preview.svg'}")
        return {"candidates": [o.facts() for o in outlooks], "loops": {n: found.facts() for n, found in probes.items()}}
    if len(a.experts) > 1:
        raise InputError(f"asked to keep {a.experts} experts; wanted one count, or --preview to compare several")
    facts = stage.prune(a.model, a.out, a.experts[0], ranking, corpus(a), not a.no_verify, a.quiet, a.line, a.repair)
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
        print(room("repair").sentence(facts["repair"]))
    for warning in facts["warnings"]:
        print(f"note: {warning}")
    sizes(facts)
    return facts


def run_quantize(a: Arguments) -> dict[str, Any]:
    facts = room("quantize").quantize(
        a.model, a.out, a.format, a.only, a.rest, a.to, a.rounding or "rtn", layout(a), not a.no_verify, a.quiet, a.line,
        corpus(a),
    )  # fmt: skip
    tell_rounding(facts)
    if errors := sorted(e for layer in facts.get("expert_errors", {}).values() for e in layer):
        middle = errors[len(errors) // 2]
        print(
            f"weight error of {len(errors):,} experts: {errors[0]:.4f} to {errors[-1]:.4f}, median {middle:.4f} of their norm"
        )
    sizes(facts)
    return facts


def run_export(a: Arguments) -> dict[str, Any]:
    convert = room("convert")
    if convert.is_run(a.model):
        facts = convert.export_run(a.model, a.out, a.to, layout(a), not a.no_verify, a.quiet)
    elif a.to is None:
        raise InputError(f"{a.model} is a model and no run; say in which container to write it, as --to mlx")
    else:
        out = a.out or a.model.with_name(f"{a.model.name}-{a.to}")
        facts = convert.convert(a.model, out, a.to, layout(a), not a.no_verify, a.quiet)
    for way, count in facts["matrices"].items():
        print(f"{count:>9,} matrices  {way}")
    sizes(facts)
    return facts


def run_verify(a: Arguments) -> dict[str, Any]:
    checkpoint = room("checkpoint").Checkpoint
    verdict = room("verify").verify(a.export, checkpoint.open(a.source) if a.source else None, a.quiet)
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
    }
    return facts | {"exit": 0 if verdict.holds else 1}


def run_calibrate(a: Arguments) -> dict[str, Any]:
    calibrate, least = room("calibrate"), room("select").FEW_TOKENS
    source = room("checkpoint").Checkpoint.open(a.model)
    source.check_values()
    settled = None
    if a.until_stable:
        counts = a.experts or [source.architecture.experts // 2, source.architecture.experts * 3 // 4]
        settled = room("settle").settle(source, corpus(a), a.run, counts, a.criterion, a.policy, a.domains, a.quiet)
        show(room("settle").table(settled))
        print(settled.verdict)
    else:
        tokens = corpus(a).calibration(source, a.run / "tokens.safetensors")
        calibrate.check_unread(a.run / "stats", calibrate.chunks(tokens))
        calibrate.calibrate(source, tokens, a.run / "stats", a.quiet)
    if pictures := room("images").pictured(source, corpus(a)):
        calibrate.calibrate(source, pictures.tokens, a.run / "stats", a.quiet, seen=pictures.seen)
    statistics = calibrate.Statistics.load(a.run / "stats", source)
    few = statistics.few(least)
    print(
        f"{statistics.tokens:,} tokens of {', '.join(statistics.domains)} through {len(statistics.layers)} MoE layers"
    )
    print(f"experts reached by fewer than {least} tokens: {len(few)}")
    print(f"experts with values that are no numbers: {len(statistics.nonfinite())}")
    print(f"statistics: {a.run / 'stats'}")
    return {
        "tokens": statistics.tokens,
        "domains": statistics.domains,
        "few_tokens": few,
        "nonfinite": statistics.nonfinite(),
        "settled": settled.facts() if settled else None,
    }


def run_compress(a: Arguments) -> dict[str, Any]:
    found = recipe(a, a.format, a.rest)
    return told(room("compress").compress(a.model, a.run, found, corpus(a), a.evaluation_tokens, a.line, a.quiet))


def recipe(a: Arguments, format: str = "source", rest: str = "source") -> Any:
    """What the options of a search say; a size that --devices leaves is asked of `fit`."""
    size, served = a.fit, layout(a)
    if a.devices:
        fit, source = room("fit"), room("checkpoint").Checkpoint.open(a.model)
        machine = fit.Machine.parse(a.devices)
        left, served = fit.budget(machine, source, a.context), served or fit.Shapes.of(source).layout(machine.count)
        print(f"budget   {room('inspect').size(left)} on {a.devices}, served as {served.name}")
        size = left if size is None else min(size, left)
    return room("compress").Recipe(
        a.experts, format, rest, a.criterion, a.policy, a.rounding or "rtn", a.to, size, a.bits,
        a.formats or room("candidates").FORMATS_OFFERED, a.harm, None if a.hours is None else 3600 * a.hours,
        served, a.devices or "", a.context, a.domains, a.until_stable,
    )  # fmt: skip


def run_measure(a: Arguments) -> dict[str, Any]:
    facts = room("compress").price_run(a.model, a.run, recipe(a), corpus(a), a.quiet)
    print("nats a token, each option alone, summed over the layers that can have it;", end=" ")
    print(f"{facts['harm']} on {facts['tokens']:,} tokens")
    for what, of in facts["totals"].items():
        print(f"{what:<10}" + "   ".join(f"{option} {nats:.4f}" for option, nats in of.items()))
    print(f"prices   {a.run / 'costs.json'}")
    return facts


def run_allocate(a: Arguments) -> dict[str, Any]:
    facts = room("compress").allocate_run(a.model, a.run, recipe(a), corpus(a), a.quiet)
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


def run_demo(a: Arguments) -> dict[str, Any]:
    return told(room("demo").demo(a.run, a.quiet))


def run_fit(a: Arguments) -> dict[str, Any]:
    fit = room("fit")
    facts = fit.fit(
        room("checkpoint").Checkpoint.open(a.model), fit.Machine.parse(a.devices), a.context, a.kv, a.concurrency or 1
    )
    show(fit.table(facts))
    if a.explain:
        print(fit.explain(facts))
    return facts


def run_serve(a: Arguments) -> dict[str, Any]:
    if a.engine == "local":
        return run_local(a)
    if not a.devices:
        raise InputError("no --devices are named, for which vLLM is to be set up; name them, or use --engine local")
    fit, vllm = room("fit"), room("serve.vllm")
    export = room("checkpoint").Checkpoint.open(a.export)
    facts = fit.fit(export, fit.Machine.parse(a.devices), a.context, a.kv, a.concurrency or 1)
    deployment = vllm.deployment(export, facts, a.host, a.port)
    if a.print:
        written = vllm.render(deployment, a.print)
        print(written)
        return {"printed": a.print, "text": written}
    if deployment.nodes > 1 or shutil.which("vllm") is None:
        why = "vLLM is not installed here" if deployment.nodes == 1 else f"this takes {deployment.nodes} machines"
        raise InputError(f"{why}; --print command, compose, kubernetes or ray writes what starts it where it is")
    return {"exit": subprocess.call(deployment.words(str(a.export)))}


def run_local(a: Arguments) -> dict[str, Any]:
    local = room("serve.local")
    export = room("checkpoint").Checkpoint.open(a.export)
    key = local.read_key(a.key_file) if a.key_file else None
    app = local.local(export, key, a.memory, a.cache, a.context, a.concurrency, a.max_tokens)
    local.run(app, a.host, a.port)
    return {}


def run_report(a: Arguments) -> dict[str, Any]:
    report, size = room("report"), room("inspect").size
    page = report.report(a.run, a.devices or "", a.context)
    print(f"report   {page}")
    facts: dict[str, Any] = {"report": str(page)}
    if not a.card and not a.push:
        return facts
    known = report.gather(a.run, a.devices or "", a.context)
    card = report.write_card(known, report.Naming(a.base_model or "", a.push or "", a.unlicensed))
    print(f"card     {card}")
    facts["card"] = str(card)
    if a.push:
        files = report.uploads(known)
        for file in files:
            print(f"{file.bytes:>18,}  {file.to}")
        print(f"{len(files):,} files, {size(sum(f.bytes for f in files))}")
        facts["files"] = {f.to: f.bytes for f in files}
        if a.yes:
            facts["address"] = report.push(known, a.push, files, a.public, quiet=a.quiet)
        print(facts.get("address") or f"nothing was uploaded to {a.push}; --yes does it")
    return facts


def told(facts: dict[str, Any]) -> dict[str, Any]:
    """The end of a whole path: what was saved, what it cost, where the page is."""
    size, before, after = room("inspect").size, facts["source_bytes"], facts["bytes"]
    if facts["experts"] != facts["source_experts"]:
        print(f"experts  {facts['source_experts']} -> {facts['experts']} in every layer")
    print(f"size     {size(before)} -> {size(after)}: {1 - after / before:.1%} saved")
    if chosen := facts["chosen"]:
        print(f"budget   {chosen['bytes']:,} of {chosen['budget_bytes']:,} bytes on disk, every file counted")
        before = (
            f"predicted {chosen['predicted_nats']:.4f}, measured {chosen['measured_nats']:.4f} ± {chosen['error']:.4f}"
        )
        print(f"plan     {chosen['name']}: KL {before} before it was written, by {chosen['rounding']}")
    if facts["settled"]:
        print(f"text     {facts['settled']}")
    tell_rounding(facts)
    tell_scores(facts["scores"])
    for warning in facts["warnings"]:
        print(f"note     {warning}")
    print(f"model    {Path(facts['run']) / 'model'}")
    print(f"report   {facts['report']}")
    return facts


def tell_rounding(facts: dict[str, Any]) -> None:
    if facts["rendered"]:
        print(f"rounded  {room('make').sentence(facts['rendered'])}")


def tell_scores(scores: dict[str, dict[str, Any]]) -> None:
    kl, ppl, before = scores["kl_mean"], scores["ppl_export"], scores["ppl_source"]
    top, ratio = scores["top1_agreement"], scores["delta_ln_ppl"]
    print(
        f"cost     KL(source‖export) {plus_minus(kl)} nats a token, over {kl['tokens']:,} tokens in {kl['rows']} rows"
    )
    print(f"         perplexity {plus_minus(before)} -> {plus_minus(ppl)}; paired Δ ln {plus_minus(ratio)}")
    print(f"         top-1 agreement {top['value']:.1%} ± {top['error']:.1%}")


def plus_minus(score: dict[str, Any]) -> str:
    """A value with as many digits as its error deserves."""
    value, error = score["value"], score["error"]
    if value is None or not error:
        return f"{value}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def sizes(facts: dict[str, Any]) -> None:
    size = room("inspect").size
    before, after = facts["source_bytes"], facts["bytes"]
    change = f"{1 - after / before:.1%} saved" if after <= before else f"{after / before - 1:.1%} more"
    print(f"{size(before)} -> {size(after)}, {change}, in {facts['out']}")
    if "verified" in facts:
        print("verified: " + ", ".join(f"{check} × {count:,}" for check, count in facts["verified"].items()))


def show(renderable: Any) -> None:
    importlib.import_module("rich.console").Console().print(renderable)
