"""`moesaic evaluate`: what is asked for becomes readings, all read in one sweep, or by a server. Nothing is computed here."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..registry import names_in
from .base import Command
from .base.groups import TextArguments, corpus, text_options
from .base.telling import plus_minus
from .base.values import count_of, counts_of, names_of

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..evaluate import Reading, Scores
    from ..evaluate.tasks import Asked
    from ..recipes.evaluate import Evaluating
    from ..recipes.machine import Use

SWEPT = names_in(Path(__file__).parents[1] / "evaluate" / "scores")  # by file: their modules take a second to import
SCORES = (*SWEPT, "tasks", "samples")
SERVED = ("perplexity", "needle", "samples")


@dataclass(frozen=True, kw_only=True)
class Evaluate(TextArguments):
    export: Path
    against: Path | None
    scores: tuple[str, ...] | None
    activations: tuple[str, ...]
    text: Path | None
    window: int
    stride: int | None
    lengths: Sequence[int] | None
    tasks: tuple[str, ...]
    task_files: Path | None
    limit: int | None
    cache: Path | None
    server: str | None
    key_file: Path | None
    out: Path | None


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path, help="folder of the model to score")
    p.add_argument(
        "--against", type=Path, metavar="MODEL", help="source model to compare with; not needed with --server"
    )
    p.add_argument(
        "--scores",
        type=names_of,
        metavar="S,S",
        help=f"scores to compute: {', '.join(SCORES)} (default: kld,perplexity,router)",
    )
    p.add_argument(
        "--activations", type=names_of, default=("none", "engine"), metavar="W,W",
        help="rounding of activations: none, engine (as config.json says), w4a4 (default none,engine)",
    )  # fmt: skip
    p.add_argument("--text", type=Path, metavar="FILE", help="read this whole text file in windows, instead of --data")
    p.add_argument("--window", type=count_of, default=2048, metavar="N", help="tokens per window (default %(default)s)")
    p.add_argument(
        "--stride",
        type=count_of,
        metavar="N",
        help="tokens from the start of one window to the next (default: --window)",
    )
    p.add_argument(
        "--lengths",
        type=counts_of,
        metavar="N,N",
        help="lengths of the needle test, in tokens (default 1024,4096,8192)",
    )
    p.add_argument(
        "--tasks", type=names_of, default=(), metavar="T,T", help="tasks of lm-evaluation-harness: hellaswag,…"
    )
    p.add_argument(
        "--task-files", type=Path, metavar="DIR", help="folder of your own task files (YAML), instead of the harness's"
    )
    p.add_argument("--limit", type=count_of, metavar="N", help="number of documents per task")
    p.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder for the source's results; the next export then needs no sweep of the source",
    )
    p.add_argument("--server", metavar="URL", help="score a running server of EXPORT: http://127.0.0.1:8000/v1")
    p.add_argument("--key-file", type=Path, metavar="FILE", help="file with the key of the server")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for the scores (default EXPORT/moesaic)")
    text_options(p, "for evaluation")


def run(a: Evaluate) -> dict[str, Any]:
    out = a.out or a.export / "moesaic"
    if not a.server and a.against is None:
        raise InputError("no source was given; add --against MODEL, or --server URL")
    from ..checkpoint import Checkpoint
    from ..lock import held
    from ..recipes.evaluate import OF_TEXT, chosen

    scores = a.scores or (*(("perplexity",) if a.server else OF_TEXT), *(("tasks",) if a.tasks else ()))
    wanted = chosen(scores, SERVED if a.server else SCORES)
    export = Checkpoint.open(a.export)
    if a.server:
        with held(out):
            return by_server(a, a.server, export, out, wanted)
    assert a.against is not None
    source = Checkpoint.open(a.against)
    with held(out):
        return by_sweep(a, source, export, out, wanted)


def by_sweep(a: Evaluate, source: Checkpoint, export: Checkpoint, out: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Both models in one sweep, and the marks of tasks where they are asked for."""
    from ..evaluate import ways
    from ..recipes.evaluate import evaluate_export

    tasks, others = ask(a, source) if "tasks" in wanted else None, tuple(s for s in wanted if s != "tasks")
    if tasks and not tasks.readings:
        raise InputError("the tasks have no questions to score; give others")
    asked = evaluating(a, others, tuple(tasks.readings) if tasks else ())
    scores = evaluate_export(source, export, out, asked, corpus(a), a.quiet)
    if tasks:
        from ..evaluate.tasks import mark

        more, facts = mark(tasks, out, list(ways(export, a.activations)), a.seed)
        scores = scores.add(more, {"tasks": facts}, out / "scores.json")
    return told(scores.add((), {"command": a.line}, out / "scores.json"), out / "scores.json")


def evaluating(a: Evaluate, scores: tuple[str, ...], readings: tuple[Reading, ...] = ()) -> Evaluating:
    from ..recipes.evaluate import Evaluating
    from ..recipes.machine import held_bytes

    return Evaluating(
        scores=scores, activations=a.activations, text=a.text, window=a.window, stride=a.stride, lengths=a.lengths,
        readings=readings, cache=a.cache, memory_bytes=held_bytes(a.memory_bytes),
    )  # fmt: skip


def by_server(a: Evaluate, url: str, export: Checkpoint, out: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The same readings through a server, beside what a sweep of the export left."""
    from ..data.tokens import Tokenizer
    from ..evaluate import Scores
    from ..evaluate.samples import compare
    from ..evaluate.server import Server, read, score, swept, writer
    from ..recipes.evaluate import readings_of
    from ..serve.local import read_key

    tokenizer = Tokenizer.open(a.export)
    server = Server.open(url, read_key(a.key_file) if a.key_file else "")
    readings = readings_of(export, evaluating(a, wanted), wanted, corpus(a), out)
    values = swept(out / "scores.safetensors", export, readings)
    word: Callable[[int], str] = lambda id: str(tokenizer.inner.decode([id], skip_special_tokens=False))  # noqa: E731
    divergences, before = read(server, readings, word, a.quiet)
    found = score(readings, divergences, values, a.seed)
    facts: dict[str, Any] = {
        "server": server.url,
        "model": server.model,
        "tokens_before": before,  # that the server puts before every row, and a sweep does not
        "activations": {"served": "as the server rounds them"},
    }
    facts["readings"] = [{"name": r.name, "kind": r.kind, "facts": dict(r.facts)} for r in readings]
    scores = Scores(tuple(found), facts)
    scores.write(out / "served.json", {"export": export.identity})
    if "samples" in wanted:
        writers = {"served": writer(server, bool(tokenizer.chat.chat_template))}
        more, samples = compare(writers, tokenizer)
        scores = scores.add(more, {"samples": samples}, out / "served.json")
    return told(scores.add((), {"command": a.line}, out / "served.json"), out / "served.json")


def ask(a: Evaluate, source: Checkpoint) -> Asked:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-evaluation-harness, which is not installed; run pip install moesaic[tasks]")
    if not a.tasks:
        raise InputError("no task was given; add --tasks hellaswag,…")
    from ..data.tokens import Tokenizer
    from ..evaluate.tasks import ask

    tokenizer, architecture = Tokenizer.open(source.path), source.architecture
    return ask(
        a.tasks, tokenizer, vocab=architecture.vocab, context=architecture.context, folder=a.task_files, limit=a.limit
    )


def told(scores: Scores, path: Path) -> dict[str, Any]:
    """The figures that stand for a whole reading, as a table."""
    shown = [s for s in scores.scores if not s.part or s.part == "control"]
    for name, of_it in itertools.groupby(sorted(shown, key=lambda s: s.reading), lambda s: s.reading):
        lines = list(of_it)
        print(f"{name}: over {lines[0].tokens:,} tokens in {lines[0].rows} rows")
        for s in lines:
            way = "" if s.activations == "none" else f", activations {s.activations}"
            value = plus_minus(vars(s)) if s.error else "not finite" if s.value is None else f"{s.value:.4g}"
            print(f"  {s.name:<24} {value:>24} {s.unit}{f', {s.part}' if s.part else ''}{way}")
    print(f"every figure: {path}")
    found: dict[str, Any] = {s.name: vars(s) for s in reversed(shown) if not s.part}
    nonfinite = {r["name"]: r["nonfinite"] for r in scores.facts.get("readings", []) if "nonfinite" in r}
    return {"scores": found, "nonfinite": next(iter(nonfinite.values()), None), "file": str(path)}


def use(a: Evaluate) -> Use:
    from ..recipes.evaluate import use

    return use(None if a.server else a.against, a.out or a.export / "moesaic", a.cache, corpus(a))


COMMAND = Command(
    name="evaluate",
    place=120,
    summary="score an export against its source, or as served: KL, perplexity, routing, needle, tasks, samples",
    example="moesaic evaluate M3-64e --against MiniMax-M3-MXFP8 --data texts/",
    options=options,
    arguments=Evaluate,
    run=run,
    use=use,
)
