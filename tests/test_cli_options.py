"""Every option reaches its place: one at a time is changed, and in what the stages receive that name alone changes.

Stages are recorded instead of run. What they are given is laid open, frozen parts and all, down to its leaves, and an
option's destination is the name of its leaf: two options exchanged on the way, one left behind, or one under another
name, and its case fails. `ELSEWHERE` holds the few that change their name, and why.
"""

import argparse
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.cli import COMMANDS, main, parsed, parser

ALL = {"help", "json", "command", "memory_bytes", "threads"}  # the last two: tests/test_resources.py
TEXT = {"data", "heldout", "tokens", "length", "seed"}


class Recorded(BaseException):
    """Thrown by the last stage of a case: what comes after it only prints. No `Exception`: those are faults to `main`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """`words` as a base, the stages that are recorded with what each gives back, and options that another case has."""

    words: str
    stages: dict[str, Any]
    skip: frozenset[str] = frozenset()


SOURCE = SimpleNamespace(
    path=Path("source"), identity="source", check_values=lambda: None,
    architecture=SimpleNamespace(experts=8, context=1 << 30, vocab=99),
)  # fmt: skip
OPEN = {"checkpoint.Checkpoint.open": SOURCE}
LAYOUT = {"fit.layout_of": SimpleNamespace(name="TP4")}
ROOM = {"recipes.compress.room_on": (1 << 60, SimpleNamespace(name="TP1"))}
MACHINE = {"fit.Machine.parse": "MACHINE"}
READ = {
    "data.corpus.Corpus.evaluation": "rows", "evaluate.Reading.of": "reading", "recipes.evaluate.haystacks": ["hay"],
    "recipes.evaluate.windows": "windows", "data.tokenizer.Tokenizer.open": "tokenizer",
}  # fmt: skip
CASES = {
    "demo": Case("demo RUN", {"recipes.demo.demo": Recorded}),
    "inspect": Case("inspect MODEL", {"checkpoint.inspect.inspect": Recorded}),
    "fit": Case("fit MODEL --devices 2xH100NVL", {**OPEN, **MACHINE, "fit.fit": Recorded}, frozenset({"explain"})),
    "prune": Case("prune MODEL OUT --experts 5", {"recipes.prune.prune": Recorded}, frozenset({"preview", "loops"})),
    "prune --preview": Case(
        "prune MODEL OUT --experts 5 --preview --loops",
        {"recipes.prune.preview_cuts": [], "recipes.prune.probe_cuts": Recorded},
        frozenset({"preview", "loops", "repair", "check"}),
    ),
    "quantize": Case("quantize MODEL OUT --format mxfp4", {**LAYOUT, "recipes.quantize.quantize": Recorded}),
    "export of a model": Case(
        "export MODEL OUT --to mlx", {"recipes.convert.is_run": False, **LAYOUT, "recipes.convert.convert": Recorded}
    ),
    "export of a run": Case("export MODEL", {"recipes.convert.is_run": True, **LAYOUT, "recipes.convert.export_run": Recorded}),
    "verify": Case("verify EXPORT --source MODEL", {**OPEN, "verify.verify": Recorded}),
    "calibrate": Case(
        "calibrate MODEL RUN",
        {**OPEN, "data.corpus.Corpus.calibration": "tokens", "calibrate.chunks": [], "calibrate.check_unread": None,
         "calibrate.calibrate": Recorded},
        frozenset({"criterion", "policy", "domains", "experts", "until_stable"}),
    ),
    "calibrate --until-stable": Case(
        "calibrate MODEL RUN --until-stable", {**OPEN, "calibrate.until_stable.calibrate_until_stable": Recorded},
        frozenset({"until_stable"}),
    ),
    "compress": Case(
        "compress MODEL RUN --devices 2xH100NVL", {**ROOM, **LAYOUT, "recipes.compress.compress": Recorded}
    ),
    "measure": Case("measure MODEL RUN", {**LAYOUT, "recipes.compress.price_run": Recorded}),
    "allocate": Case("allocate MODEL RUN --devices 2xH100NVL", {**ROOM, **LAYOUT, "recipes.compress.allocate_run": Recorded}),
    "evaluate": Case(
        "evaluate EXPORT --against MODEL --scores kld,needle",
        {**OPEN, **READ, "recipes.evaluate.evaluate": Recorded},
        frozenset({"text", "window", "stride", "scores", "tasks", "task_files", "limit", "server", "key_file"}),
    ),
    "evaluate --text": Case(
        "evaluate EXPORT --against MODEL --text FILE --stride 7",
        {**OPEN, **READ, "recipes.evaluate.evaluate": Recorded},
        frozenset({"scores", "tasks", "task_files", "limit", "server", "key_file", "lengths", *TEXT} - {"seed"}),
    ),
    "evaluate by a server": Case(
        "evaluate EXPORT --server http://there/v1 --key-file KEY --scores needle",
        {**OPEN, **READ, "serve.local.read_key": "key", "evaluate.server.Server.open": Recorded},
        frozenset({
            "against", "scores", "activations", "text", "window", "stride", "lengths", "tasks", "task_files", "limit",
            "cache", "out", "quiet", *TEXT,
        }),
    ),
    "report": Case("report RUN", {"report.report": Path("page"), "report.gather": "facts", "report.write_card": "card",
                                  "report.uploads": [], "report.push": "address"},
                   frozenset({"card", "push", "yes", "base_model", "unlicensed", "public"})),
    "report --push": Case(
        "report RUN --push me/mine --yes",
        {"report.report": Path("page"), "report.gather": "facts", "report.write_card": "card", "report.uploads": [],
         "report.push": Recorded},
        frozenset({"card", "yes"}),
    ),
    "serve": Case(
        "serve EXPORT --devices 2xH100NVL --print command",
        {**OPEN, **MACHINE, "fit.fit": {}, "serve.vllm.deployment": "deployed", "serve.vllm.render": Recorded},
        frozenset({"engine", "expert_bytes", "cache_bytes", "key_file", "new_tokens", "quiet"}),
    ),
    "serve --engine local": Case(
        "serve EXPORT --engine local --key-file KEY",
        {**OPEN, "serve.local.read_key": "key", "serve.local.local": "app", "serve.local.run": Recorded},
        frozenset({"engine", "devices", "kv", "way", "quiet"}),
    ),
}  # fmt: skip
QUIET = {"inspect", "fit", "report", "report --push"}  # that have no progress to leave out
ELSEWHERE = {  # (case or "", destination) -> where it arrives
    ("", "model"): {"model", "path"}, ("", "source"): {"path"}, ("", "against"): {"path"},
    ("", "tensor_parallel"): {"devices"}, ("", "expert_parallel"): {"deal"},
    ("export of a model", "model"): {"folder", "model"}, ("export of a run", "model"): {"folder", "run"},
    ("verify", "export"): {"out"},
    ("prune --preview", "experts"): {"counts"}, ("calibrate --until-stable", "experts"): {"counts"},
    ("calibrate --until-stable", "run"): {"work"}, ("calibrate", "run"): {"folder", "file"},
    ("evaluate", "export"): {"path", "folder", "file"}, ("evaluate --text", "export"): {"path", "folder", "file"},
    ("evaluate by a server", "export"): {"path", "folder"}, ("evaluate by a server", "server"): {"url"},
    ("evaluate", "out"): {"folder", "file"}, ("evaluate --text", "out"): {"folder", "file"},
    ("evaluate --text", "text"): {"path"}, ("evaluate by a server", "key_file"): {"path"},
    ("serve", "export"): {"path"}, ("serve --engine local", "export"): {"path"},
    ("serve --engine local", "key_file"): {"path"}, ("fit", "devices"): {"text"}, ("serve", "devices"): {"text"},
    ("report --push", "push"): {"repository"}, ("serve --engine local", "expert_bytes"): {"memory_bytes"},
}  # fmt: skip


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Paths of names to what is at their ends; frozen parts of ours are gone into."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value


def received(case: Case, words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the recorded stages of a case are given when the command line is `words`."""
    found: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.cli.base.resources.used", lambda *_: nullcontext())
        for held in ("lock.held", "recipes.evaluate.held"):
            patch.setattr(f"moesaic.{held}", lambda _: nullcontext())  # folders of these names are there for nobody
        for stage, result in case.stages.items():
            owner, name = place(stage)
            patch.setattr(owner, name, recorder(stage, getattr(owner, name), result, found))
        try:
            main(words)
        except Recorded:
            return found
    assert Recorded not in case.stages.values(), "the last stage was not reached"
    return found


def place(stage: str) -> tuple[Any, str]:
    """The module or class that a stage's dotted path ends in, and its name there."""
    owner, parts = importlib.import_module("moesaic"), stage.split(".")
    for part in parts[:-1]:
        try:
            owner = importlib.import_module(f"{owner.__name__}.{part}")
        except (ModuleNotFoundError, AttributeError):
            owner = getattr(owner, part)
    return owner, parts[-1]


def recorder(stage: str, original: Callable[..., Any], result: Any, found: dict[str, Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def record(*positional: Any, **named: Any) -> Any:
        call = sum(path.startswith(f"{stage}#") and path.endswith("#") for path in found) + 1
        found[f"{stage}#{call}#"] = None  # a call
        for name, value in signature.bind(*positional, **named).arguments.items():
            found.update(leaves(value, f"{stage}#{call}: {name}"))
        if result is Recorded:
            raise Recorded
        return result

    return record


def other(action: argparse.Action) -> list[str]:
    """Words that give an option a value of its own."""
    if action.nargs == 0:
        return [action.option_strings[0]]
    kind = getattr(action.type, "__name__", "str")
    number = str(3 + sum(map(ord, action.dest)))
    word = {
        "int": number, "float": f"{number}.5", "Path": f"/other/{action.dest}", "bytes_of": f"{number}B", "seconds_of": number,
        "count_of": number, "seed_of": number, "port_of": number, "bits_of": f"{number}.5",
        "counts_of": number, "names_of": f"{action.dest},more", "shares_of": f"{action.dest}=2",
    }.get(kind, f"other-{action.dest}")  # fmt: skip
    return [action.option_strings[0], word] if action.option_strings else [word]


def options() -> Iterator[tuple[str, argparse.Action]]:
    choices = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for name, case in CASES.items():
        for action in choices[case.words.split()[0]]._actions:
            if action.dest not in ALL | case.skip | ({"quiet"} if name in QUIET else set()):
                yield name, action


def test_the_cases_leave_out_no_command_and_no_option():
    assert {case.words.split()[0] for case in CASES.values()} == set(COMMANDS)
    choices = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    covered = {(CASES[name].words.split()[0], action.dest) for name, action in options()}
    missed = {(word, a.dest) for word in COMMANDS for a in choices[word]._actions if a.dest not in ALL} - covered
    switches = {  # what chooses between two cases, or what is printed
        ("prune", "preview"), ("prune", "loops"), ("calibrate", "until_stable"), ("serve", "engine"), ("report", "card"),
        ("report", "yes"), ("evaluate", "scores"), ("fit", "explain"), ("serve", "quiet"),
    } | {(name, "quiet") for name in ("inspect", "fit", "report")}  # fmt: skip
    harness = {("evaluate", "tasks"), ("evaluate", "task_files"), ("evaluate", "limit")}  # test_evaluate_tasks_alone
    assert missed == switches - {("calibrate", "until_stable")} | {("calibrate", "until_stable")} | harness


@pytest.mark.parametrize("word", COMMANDS)
def test_arguments_are_the_parser_s(word):
    actions = parser()._subparsers._group_actions[0].choices[word]  # type: ignore[union-attr]
    there = {a.dest for a in actions._actions} | set(actions._defaults)
    assert {f.name for f in dataclasses.fields(COMMANDS[word].arguments)} == there - {"help"} | {"line"}


@pytest.mark.parametrize(("name", "action"), list(options()), ids=lambda x: x if isinstance(x, str) else x.dest)
def test_an_option_changes_what_bears_its_name_and_nothing_else(name, action, monkeypatch, capsys):
    case, dest = CASES[name], action.dest
    words = case.words.split()
    if action.option_strings:
        changed = [*words, *other(action)]
    else:
        choices = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        positionals = [a.dest for a in choices[words[0]]._actions if not a.option_strings]
        at = 1 + positionals.index(dest)
        changed = [*words[:at], *other(action), *words[at + 1 :]]
    before, after = (received(case, w, monkeypatch) for w in (words, changed))
    value = getattr(parsed(changed)[1], dest)
    wanted = ELSEWHERE.get((name, dest)) or ELSEWHERE.get(("", dest)) or {dest}
    moved = {p: after[p] for p in after if p not in before or before[p] != after[p]}
    moved = {p: v for p, v in moved.items() if not p.endswith(": command")}  # the words themselves
    assert moved and {p.replace(": ", ".").rsplit(".", 1)[-1] for p in moved} <= wanted, moved
    for path, found in moved.items():
        same = (
            found == value or [found] == value or (isinstance(value, Path) and value in [found, *Path(found).parents])
        )
        assert same, f"{path} is {found}, and {dest} is {value}"
