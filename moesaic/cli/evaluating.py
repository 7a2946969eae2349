"""`moesaic evaluate`: what is asked for becomes readings, all read in one sweep, or by a server. Nothing is computed here."""

import argparse
import importlib.util
import itertools
from pathlib import Path
from typing import Any

from ..errors import InputError
from .options import counts_of, names_of, text_options

TEXT = ("kld", "perplexity", "router")  # scored on the same readings at no further cost
SCORES = (*TEXT, "needle", "tasks", "spots")
SERVED = ("perplexity", "needle", "spots")
NOTHING: dict[str, Any] = {"readings": [], "layers": [], "activations": {}}  # facts of an evaluation without a sweep
LENGTHS = (1024, 4096, 8192)  # of haystacks; the longer ones are beyond what M3's sparse attention looks at


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path)
    p.add_argument("--against", type=Path, metavar="MODEL", help="the source; not needed with --server")
    p.add_argument(
        "--scores",
        type=names_of,
        metavar="S,S",
        help=f"of {', '.join(SCORES)} (default {','.join(TEXT)})",
    )
    p.add_argument(
        "--activations", type=names_of, default=("none", "engine"), metavar="W,W",
        help="none: left as computed; engine: rounded as config.json asks; w4a4 (default none,engine)",
    )  # fmt: skip
    p.add_argument("--text", type=Path, metavar="FILE", help="instead of --data: a whole text in windows")
    p.add_argument("--window", type=int, default=2048, metavar="N", help="tokens of a window (default %(default)s)")
    p.add_argument("--stride", type=int, metavar="N", help="from window to window (default: the window)")
    p.add_argument("--lengths", type=counts_of, metavar="N,N", help="of haystacks (default 1024,4096,8192)")
    p.add_argument("--tasks", type=names_of, default=(), metavar="T,T", help="of lm-evaluation-harness")
    p.add_argument("--task-files", type=Path, metavar="DIR", help="your own tasks (YAML), instead of the harness's")
    p.add_argument("--limit", type=int, metavar="N", help="documents a task")
    p.add_argument(
        "--cache", type=Path, metavar="DIR", help="keeps what the source gave: a further export costs its own sweep"
    )
    p.add_argument("--server", metavar="URL", help="ask a server of EXPORT instead: http://127.0.0.1:8000/v1")
    p.add_argument("--key-file", type=Path, metavar="FILE", help="holds the server's key")
    p.add_argument("--out", type=Path, metavar="DIR", help="where scores go (default EXPORT/moesaic)")
    text_options(p)


def run(a: argparse.Namespace) -> dict[str, Any]:
    out = a.out or a.export / "moesaic"
    if a.server:
        return by_server(a, out)
    if a.against is None:
        raise InputError("no source is named; give --against MODEL, or --server URL")
    wanted = chosen(a, SCORES, TEXT)
    checkpoint, evaluate = room("checkpoint").Checkpoint, room("evaluate")
    source, export = checkpoint.open(a.against), checkpoint.open(a.export)
    source.check_values()
    export.check_values()
    asked = ask(a, source) if "tasks" in wanted else None
    readings = read_what(a, source, out, wanted) + (list(asked.readings) if asked else [])
    scores = None
    if readings:
        scores = evaluate.evaluate(
            source, export, readings, out, activations=a.activations, seed=a.seed, cache=a.cache, quiet=a.quiet
        )
    if asked and scores:
        more, facts = room("tasks").mark(asked, out, list(evaluate.ways(export, a.activations)), a.seed)
        scores = scores.add(more, {"tasks": facts}, out / "scores.json")
    if "spots" in wanted:
        spots = room("spots")
        writers = {"source": spots.local(source), "export": spots.local(export)}
        more, facts = spots.compare(writers, room("tokens").Tokenizer.open(source.path))
        inputs = {"source": source.identity, "export": export.identity}
        scores = (scores or evaluate.Scores((), NOTHING)).add(more, {"spots": facts}, out / "scores.json", inputs)
    if scores is None:
        raise InputError("the tasks ask for nothing; give others")
    if "kld" in wanted:
        with room("artifact").atomic(out / "kld.txt") as partial:
            partial.write_text(room("evaluate.kld").llama_text(scores) + "\n", encoding="utf-8")
    return told(scores.add((), {"command": a.line}, out / "scores.json"), out / "scores.json")


def by_server(a: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The same readings through a server, beside what a sweep of the export left."""
    served, spots = room("served"), room("spots")
    wanted = chosen(a, SERVED, ("perplexity",))
    export, tokenizer = room("checkpoint").Checkpoint.open(a.export), room("tokens").Tokenizer.open(a.export)
    key = room("serve.local").read_key(a.key_file) if a.key_file else ""
    server = served.Server.open(a.server, key)
    readings = read_what(a, export, out, wanted)
    values = served.swept(out / "scores.safetensors", export, readings)
    found = served.score(readings, served.read(server, readings, a.quiet), values, a.seed)
    facts: dict[str, Any] = {
        "server": server.url,
        "model": server.model,
        "activations": {"served": "as the server rounds them"},
    }
    facts["readings"] = [{"name": r.name, "kind": r.kind, "facts": dict(r.facts)} for r in readings]
    scores = room("evaluate").Scores(tuple(found), facts)
    scores.write(out / "served.json", {"export": export.identity})
    if "spots" in wanted:
        writers = {"served": served.writer(server, bool(tokenizer.chat.chat_template))}
        more, samples = spots.compare(writers, tokenizer)
        scores = scores.add(more, {"spots": samples}, out / "served.json")
    return told(scores.add((), {"command": a.line}, out / "served.json"), out / "served.json")


def read_what(a: argparse.Namespace, model: Any, out: Path, wanted: tuple[str, ...]) -> list[Any]:
    """The readings of text and of haystacks."""
    evaluate, tokenizer, found = room("evaluate"), room("tokens").Tokenizer.open(model.path), []
    architecture = model.architecture
    if set(wanted) & set(TEXT):
        if a.text:
            windows = room("evaluate.perplexity").windows
            found.append(
                windows(a.text, tokenizer, vocab=architecture.vocab, window=a.window, stride=a.stride or a.window)
            )
        else:
            corpus = room("corpus").Corpus(a.data, a.heldout, a.tokens, a.length, a.seed)
            found.append(evaluate.Reading.of(corpus.evaluation(model, out / "evaluation.safetensors")))
    if "needle" in wanted:
        lengths = a.lengths or [n for n in LENGTHS if n <= architecture.context]
        found += room("evaluate.needle").haystacks(
            tokenizer, lengths, vocab=architecture.vocab, context=architecture.context, seed=a.seed
        )
    return found


def ask(a: argparse.Namespace, source: Any) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks are lm-evaluation-harness's, and it is not installed; pip install moesaic[tasks]")
    if not a.tasks:
        raise InputError("no task is named; give --tasks hellaswag,…")
    tokenizer, architecture = room("tokens").Tokenizer.open(source.path), source.architecture
    return room("tasks").ask(
        a.tasks, tokenizer, vocab=architecture.vocab, context=architecture.context, folder=a.task_files, limit=a.limit
    )


def chosen(a: argparse.Namespace, there_are: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    wanted = tuple(a.scores or (default + (("tasks",) if a.tasks else ())))
    if unknown := sorted(set(wanted) - set(there_are)):
        raise InputError(f"no score {unknown[0]!r} here; there are {', '.join(there_are)}")
    return wanted


def told(scores: Any, path: Path) -> dict[str, Any]:
    """The figures that stand for a whole reading, as a table."""
    commands = room("cli.commands")
    shown = [s for s in scores.scores if not s.part or s.part == "control"]
    for name, of_it in itertools.groupby(sorted(shown, key=lambda s: s.reading), lambda s: s.reading):
        lines = list(of_it)
        print(f"{name}: over {lines[0].tokens:,} tokens in {lines[0].rows} rows")
        for s in lines:
            way = "" if s.activations == "none" else f", activations {s.activations}"
            value = commands.plus_minus(vars(s)) if s.error else "not finite" if s.value is None else f"{s.value:.4g}"
            print(f"  {s.name:<24} {value:>24} {s.unit}{f', {s.part}' if s.part else ''}{way}")
    print(f"every figure: {path}")
    found: dict[str, Any] = {s.name: vars(s) for s in reversed(shown) if not s.part}
    nonfinite = {r["name"]: r["nonfinite"] for r in scores.facts.get("readings", []) if "nonfinite" in r}
    return {"scores": found, "nonfinite": next(iter(nonfinite.values()), None), "file": str(path)}


def room(name: str) -> Any:
    return importlib.import_module(f"moesaic.{name}")
