"""The shape of the house: imports only go down, files and functions stay small, every file says what it is."""

import ast
import re
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).parent
FLOOR = {name: i for i, name in enumerate(moesaic.FLOORS)}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms_imported(path: Path, tree: ast.AST) -> set[str]:
    """Rooms that a file imports, by whichever of Python's ways: relative or absolute, a name or a module."""
    package = ["moesaic", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "moesaic" and len(name) > 1}
    return found & FLOOR.keys()


@every_file
def test_every_room_has_a_floor(path):
    assert room(path) in FLOOR


@every_file
def test_imports_go_down(path):
    here = room(path)
    for there in rooms_imported(path, ast.parse(path.read_text())) - {here}:
        assert FLOOR[there] < FLOOR[here], f"{here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"


@pytest.mark.parametrize(
    "line",
    [
        "from ..cli import main",
        "from .. import cli",
        "import moesaic.cli",
        "from moesaic.cli import main",
        "from moesaic import cli",
    ],
)
def test_an_import_that_goes_up_is_seen(line):
    assert rooms_imported(ROOT / "formats" / "planted.py", ast.parse(line)) == {"cli"}


@every_file
def test_size_and_docstring(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "say in one line what this file is"
    if room(path) == "kernels":
        return  # a loop that a compiler must see whole is as long as it is
    assert text.count("\n") <= 400
    for f in ast.walk(tree):
        if isinstance(f, ast.FunctionDef):
            assert f.end_lineno - f.lineno < 60, f.name


@every_file
def test_no_imports_inside_functions(path):
    if room(path) == "cli":
        return  # loads a command's module when it is asked for, so that --help is quick
    for f in ast.walk(ast.parse(path.read_text())):
        if isinstance(f, ast.FunctionDef):
            assert not [n for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)], f.name


def test_no_model_is_named_outside_its_family():
    for path in FILES:
        if room(path) not in ("families",):
            code = ast.parse(path.read_text())
            names = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)} | {
                n.name for n in ast.walk(code) if isinstance(n, ast.FunctionDef | ast.ClassDef)
            }
            assert not [n for n in names if "minimax" in n.lower()], path


# Long signatures --------------------------------------------------------------------------------------------------------

MOST_PARAMETERS, MOST_POSITIONAL = 6, 6
TRANSFORMERS = "transformers calls it, or it takes what that call brings"
LONG = {  # file: function -> why; a line goes when its function grows shorter
    "generate/attention.py: ragged": TRANSFORMERS, "generate/attention.py: queries": TRANSFORMERS,
}  # fmt: skip
POSITIONAL: dict[str, str] = {}  # file: callee -> why


def long_signatures(tree: ast.AST) -> set[str]:
    """Functions of more parameters than there should be, `self` and `cls` not counted."""
    found = set()
    for f in ast.walk(tree):
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
            if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_PARAMETERS:
                found.add(f.name)
    return found


def long_calls(tree: ast.AST) -> set[str]:
    """What is called with more arguments by position than anybody can tell apart."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and len(n.args) > MOST_POSITIONAL)
    return {ast.unparse(n.func).rsplit(".", 1)[-1] for n in calls}


@pytest.mark.parametrize(("found", "known"), [(long_signatures, LONG), (long_calls, POSITIONAL)])
def test_what_is_long_says_why(found, known):
    there = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if room(path) != "kernels"
        for name in found(ast.parse(path.read_text()))
    }
    assert there - known.keys() == set(), "pass a part whole, or name the arguments"
    assert known.keys() - there == set(), "shorter now: take it off the list"


def test_a_long_signature_and_a_long_call_are_seen():
    six, seven = "a, b, c, d, e, f", "a, b, c, d, e, f, g"
    assert long_signatures(ast.parse(f"def six({six}): 0\ndef seven({seven}): 0")) == {"seven"}
    assert long_signatures(ast.parse(f"class A:\n def six(self, {six}): 0\n def named(self, *, {seven}): 0")) == {
        "named"
    }
    assert long_calls(ast.parse(f"six({six})\nx.seven({seven})\nnamed(a=1, b=2, c=3, d=4, e=5, f=6, g=7)")) == {"seven"}


def test_the_design_lists_every_room_in_its_order():
    text = (ROOT.parent / "docs" / "DESIGN.md").read_text()
    table = text[text.index("| room | knows |") : text.index("A new thing is one file")]
    rooms = [name for row in table.splitlines()[2:] if row for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert rooms == list(moesaic.FLOORS)
