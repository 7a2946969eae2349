"""The shape of the house: imports only go down, files and functions stay small, every file says what it is."""

import ast
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).parent
FLOOR = {name: i for i, names in enumerate(moesaic.FLOORS) for name in names}
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
