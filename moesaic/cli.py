"""The command line: one word a stage, and what each prints. Nothing is computed here.

A command's module is imported when it is asked for, so that --help answers at once. Exit 0: done;
1: a check did not hold; 2: the call or its input is wrong, in one sentence; 130: interrupted, and the
same command continues.
"""

import argparse
import importlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, MoesaicError

Arguments = argparse.Namespace
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def room(name: str) -> Any:
    """A module of this package, imported now."""
    return importlib.import_module(f"moesaic.{name}")


def corpus(a: Arguments) -> Any:
    return room("corpus").Corpus(a.data, a.heldout, a.tokens, a.length, a.seed)


def run_inspect(a: Arguments) -> dict[str, Any]:
    facts = room("inspect").inspect(a.model, a.base)
    show(room("inspect").table(facts))
    for layer, ids in facts.get("kept", {}).items():
        print(f"layer {layer} kept experts {' '.join(map(str, ids))}")
    return facts


def run_prune(a: Arguments) -> dict[str, Any]:
    if a.preview:
        outlooks = room("prune").preview_cuts(a.model, a.out, a.experts, a.criterion, corpus(a), a.quiet)
        show(room("preview").table(outlooks))
        return {"candidates": [o.facts() for o in outlooks]}
    if len(a.experts) > 1:
        raise InputError(f"asked to keep {a.experts} experts; wanted one count, or --preview to compare several")
    facts = room("prune").prune(
        a.model, a.out, a.experts[0], a.criterion, a.policy, corpus(a), not a.no_verify, a.quiet
    )
    margins = sorted(facts["margins"].values())
    print(
        f"kept {facts['experts']} of {facts['source_experts']} experts in {len(margins)} layers "
        f"by {facts['criterion']} on {facts['calibration_tokens']:,} tokens"
    )
    print(f"cut margin (last kept over first dropped): least {margins[0]:.2%}, median {margins[len(margins) // 2]:.2%}")
    for layer, margin in facts["margins"].items():
        print(f"  layer {layer:>3}  margin {margin:7.2%}  halves agree {facts['jaccard'][layer]:4.0%}")
    for warning in facts["warnings"]:
        print(f"note: {warning}")
    sizes(facts)
    return facts


def run_quantize(a: Arguments) -> dict[str, Any]:
    facts = room("quantize").quantize(
        a.model, a.out, a.format, a.only, a.rest, a.to, a.rounding, not a.no_verify, a.quiet
    )
    if errors := sorted(e for layer in facts.get("expert_errors", {}).values() for e in layer):
        middle = errors[len(errors) // 2]
        print(
            f"weight error of {len(errors):,} experts: {errors[0]:.4f} to {errors[-1]:.4f}, median {middle:.4f} of their norm"
        )
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
    source = room("checkpoint").Checkpoint.open(a.model)
    tokens = corpus(a).calibration(source, a.run / "tokens.safetensors")
    statistics = room("calibrate").calibrate(source, tokens, a.run / "stats", a.quiet)
    few, least = statistics.few(room("select").FEW_TOKENS), room("select").FEW_TOKENS
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
    }


def run_compress(a: Arguments) -> dict[str, Any]:
    recipe = room("compress").Recipe(
        a.experts, a.format, a.rest, a.criterion, a.policy, a.rounding, a.to, a.fit, a.bits,
        a.formats or room("candidates").FORMATS_OFFERED, None if a.hours is None else 3600 * a.hours,
    )  # fmt: skip
    return told(room("compress").compress(a.model, a.run, recipe, corpus(a), a.evaluation_tokens, a.line, a.quiet))


def run_demo(a: Arguments) -> dict[str, Any]:
    return told(room("demo").demo(a.run, a.quiet))


def run_evaluate(a: Arguments) -> dict[str, Any]:
    checkpoint, evaluate = room("checkpoint").Checkpoint, room("evaluate")
    source, export = checkpoint.open(a.against), checkpoint.open(a.export)
    out = a.out or a.export / "moesaic"
    rows = corpus(a).evaluation(source, out / "evaluation.safetensors")
    scores = evaluate.evaluate(source, export, [evaluate.Reading.of(rows)], out, quiet=a.quiet)
    found = {s.name: vars(s) for s in scores.scores if not s.part}
    tell_scores(found)
    print(f"every figure: {out / 'scores.json'}")
    return {"scores": found, "nonfinite": scores.facts["readings"][0]["nonfinite"]}


def run_fit(a: Arguments) -> dict[str, Any]:
    fit = room("fit")
    facts = fit.fit(
        room("checkpoint").Checkpoint.open(a.model), fit.Machine.parse(a.devices), a.context, a.kv, a.concurrency
    )
    show(fit.table(facts))
    if a.explain:
        print(fit.explain(facts))
    return facts


def run_serve(a: Arguments) -> dict[str, Any]:
    fit, vllm = room("fit"), room("serve.vllm")
    export = room("checkpoint").Checkpoint.open(a.export)
    facts = fit.fit(export, fit.Machine.parse(a.devices), a.context, a.kv, a.concurrency)
    deployment = vllm.deployment(export, facts, a.host, a.port)
    if a.print:
        written = vllm.render(deployment, a.print)
        print(written)
        return {"printed": a.print, "text": written}
    if deployment.nodes > 1 or shutil.which("vllm") is None:
        why = "vLLM is not installed here" if deployment.nodes == 1 else f"this takes {deployment.nodes} machines"
        raise InputError(f"{why}; --print command, compose, kubernetes or ray writes what starts it where it is")
    return {"exit": subprocess.call(deployment.words(str(a.export)))}


def run_report(a: Arguments) -> dict[str, Any]:
    page = room("report").report(a.run)
    print(f"report   {page}")
    return {"report": str(page)}


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
        print(f"plan     {chosen['name']}: KL {before} before it was written")
    tell_scores(facts["scores"])
    for warning in facts["warnings"]:
        print(f"note     {warning}")
    print(f"model    {Path(facts['run']) / 'model'}")
    print(f"report   {facts['report']}")
    return facts


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
    print(f"{size(before)} -> {size(after)}, {1 - after / before:.1%} saved, in {facts['out']}")
    if "verified" in facts:
        print("verified: " + ", ".join(f"{check} × {count:,}" for check, count in facts["verified"].items()))


def show(renderable: Any) -> None:
    importlib.import_module("rich.console").Console().print(renderable)


def bytes_of(text: str) -> int:
    """Bytes as people write them: 90GB, 89GiB, 500_000_000."""
    number = text.rstrip("BbKkMmGgTtIi ")
    unit = text[len(number) :].strip().upper() or "B"
    try:
        return int(float(number.replace("_", "")) * UNITS[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 90GB or 89GiB") from None


def counts_of(text: str) -> list[int]:
    """Kept counts: 64, or 64,80,96."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no count of experts; write 64, or 64,80,96") from None


def names_of(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="text, one domain a file (code.txt, math.jsonl); else the text of this Python",
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        metavar="DIR",
        help="text to judge by; else a part of --data that calibration never sees",
    )
    parser.add_argument(
        "--tokens", type=int, default=65_536, metavar="N", help="tokens to calibrate on (default %(default)s)"
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens a row (default 2048, or the model's context)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows (default %(default)s)")


def inspect_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="a model folder, or one with a config.json alone")
    p.add_argument("--base", type=Path, metavar="MODEL", help="find which experts of this model were kept")


def prune_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--experts", type=counts_of, required=True, metavar="K", help="experts to keep in every layer")
    p.add_argument(
        "--criterion", default="reap", help="reap, mass, …, or auto: the best by preview (default %(default)s)"
    )
    p.add_argument(
        "--preview", action="store_true", help="measure what cuts would cost (K may be 64,96), and write no model"
    )
    p.add_argument(
        "--policy",
        default="pooled",
        help="how domains are weighed: pooled, mean, union, intersection (default %(default)s)",
    )
    p.add_argument("--no-verify", action="store_true", help="do not reopen and compare the result")
    text_options(p)


def quantize_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--format", required=True, help="mxfp4, nvfp4, int4_g128, mxfp8, …")
    p.add_argument("--only", default="experts", help="experts or linears (default %(default)s)")
    p.add_argument("--rest", default="source", help="source or bf16 (default %(default)s)")
    p.add_argument("--to", default="compressed_tensors", metavar="CONTAINER", help="(default %(default)s)")
    p.add_argument("--rounding", default="rtn", help="rtn, or search for better scales (default %(default)s)")
    p.add_argument("--no-verify", action="store_true", help="do not reopen and compare the result")


def calibrate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("run", type=Path, help="run folder; more text later adds to what is there")
    text_options(p)


def compress_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("run", type=Path, help="run folder: run/model is the result, run/report.html what it cost")
    p.add_argument(
        "--fit", type=bytes_of, metavar="SIZE", help="bytes on disk, never exceeded: 90GB, 84GiB; finds the plan"
    )
    p.add_argument("--bits", type=float, metavar="B", help="the same as stored bits per weight of the source")
    p.add_argument(
        "--formats", type=names_of, metavar="F,F", help="what --fit may write units in, such as source,nvfp4,int3_g64"
    )
    p.add_argument("--hours", type=float, metavar="H", help="for pricing options; the less, the fewer tokens")
    p.add_argument("--experts", type=int, metavar="K", help="experts to keep in every layer (default: all)")
    p.add_argument(
        "--format", default="source", help="of routed experts: mxfp4, nvfp4, int4_g128, … (default %(default)s)"
    )
    p.add_argument("--rest", default="source", help="of every other matrix: source, bf16, … (default %(default)s)")
    p.add_argument("--criterion", default="reap", help="what ranks experts (default %(default)s)")
    p.add_argument("--policy", default="pooled", help="how domains are weighed (default %(default)s)")
    p.add_argument("--rounding", default="rtn", help="how codes are chosen (default %(default)s)")
    p.add_argument("--to", default="compressed_tensors", metavar="CONTAINER", help="(default %(default)s)")
    p.add_argument(
        "--evaluation-tokens", type=int, default=65_536, metavar="N", help="tokens to judge by (default %(default)s)"
    )
    text_options(p)


def demo_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", type=Path, nargs="?", default=Path("moesaic-demo"), help="run folder (default %(default)s)")


def evaluate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path)
    p.add_argument("--against", type=Path, required=True, metavar="MODEL", help="the source")
    p.add_argument("--out", type=Path, metavar="DIR", help="where scores go (default EXPORT/moesaic)")
    text_options(p)


def machine_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--devices", required=True, metavar="NxSIZE", help="2x95GiB, 4xH100NVL, DGX Spark, …")
    p.add_argument("--context", type=int, metavar="N", help="tokens a request may have (default 32768, or the model's)")
    p.add_argument("--kv", default="bf16", help="cache type: bf16 or fp8 (default %(default)s)")
    p.add_argument("--concurrency", type=int, default=1, metavar="N", help="requests at once (default %(default)s)")


def fit_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="a model folder, or one with a config.json alone")
    machine_options(p)
    p.add_argument("--explain", action="store_true", help="the formula behind each number")


def serve_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path)
    machine_options(p)
    p.add_argument(
        "--print", metavar="WAY", help="command, compose, kubernetes or ray: write it instead of running vLLM"
    )
    p.add_argument("--host", default="127.0.0.1", help="(default %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="(default %(default)s)")


def report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", type=Path)


def verify_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path)
    p.add_argument(
        "--source", type=Path, metavar="MODEL", help="compare every tensor with what the plan makes of this model"
    )


Command = tuple[str, str, Callable[[argparse.ArgumentParser], None], Callable[[Arguments], dict[str, Any]]]

COMMANDS: dict[str, Command] = {
    "demo": ("the whole path on the small model that comes along", "moesaic demo", demo_options, run_demo),
    "inspect": (
        "what a model holds, from headers alone",
        "moesaic inspect MiniMax-M3-MXFP8",
        inspect_options,
        run_inspect,
    ),
    "compress": (
        "the whole path: choose, export, verify, evaluate, report",
        "moesaic compress MiniMax-M3-MXFP8 run --experts 64 --format mxfp4 --data texts/",
        compress_options,
        run_compress,
    ),
    "prune": (
        "drop experts; what stays is copied byte for byte",
        "moesaic prune MiniMax-M3-MXFP8 M3-64e --experts 64 --data texts/",
        prune_options,
        run_prune,
    ),
    "quantize": (
        "round experts to one format, without data",
        "moesaic quantize MiniMax-M2.7 M2.7-MXFP4 --format mxfp4 --rest bf16",
        quantize_options,
        run_quantize,
    ),
    "fit": (
        "what fits which machine, before anything is downloaded",
        "moesaic fit MiniMax-M3-MXFP8 --devices 4xH100NVL --context 131072 --kv fp8",
        fit_options,
        run_fit,
    ),
    "serve": (
        "an OpenAI-compatible server: vLLM's command, or what deploys it",
        "moesaic serve run/model --devices 4xH100NVL --print compose",
        serve_options,
        run_serve,
    ),
    "report": ("make a run's page again", "moesaic report run", report_options, run_report),
    "verify": (
        "reopen an export and check everything",
        "moesaic verify M3-64e --source MiniMax-M3-MXFP8",
        verify_options,
        run_verify,
    ),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="moesaic", description="Make a giant mixture-of-experts model fit, and prove what that cost."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, example, options, _) in COMMANDS.items():
        p = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        options(p)
        p.add_argument(
            "--json", action="store_true", help="print the facts as one JSON object, last on standard output"
        )
        p.add_argument("--quiet", action="store_true", help="no progress")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    a.line = shlex.join(["moesaic", *(sys.argv[1:] if argv is None else argv)])
    try:
        facts = COMMANDS[a.command][3](a)
    except MoesaicError as error:
        print(f"moesaic {a.command}: {error}", file=sys.stderr)
        return error.exit_code
    except FileNotFoundError as error:
        print(f"moesaic {a.command}: {InputError(f'{error.filename} is not there; check the path')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmoesaic {a.command}: interrupted; the same command continues", file=sys.stderr)
        return 130
    code = facts.pop("exit", 0)
    if a.json:
        print(json.dumps(facts, default=str))
    return code


if __name__ == "__main__":
    sys.exit(main())
