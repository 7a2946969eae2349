"""The package from outside: its version, `python -m moesaic`, and the files that a wheel takes along beside the code."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import moesaic
from moesaic.cli import main

ROOT = Path(moesaic.__file__).parent


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"moesaic {moesaic.__version__}\n"


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["inspect", "/nowhere"], 2)])
def test_python_m_moesaic_is_the_command(words, code):
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    ended = subprocess.run([sys.executable, "-m", "moesaic", *words], capture_output=True, text=True, env=environment)
    assert ended.returncode == code
    assert ended.stdout.startswith("moesaic ") if code == 0 else ended.stderr.startswith("moesaic inspect: /nowhere")


def test_a_wheel_takes_along_every_file_that_is_no_code():
    setuptools = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["moesaic"]
    taken = {path for pattern in patterns for path in ROOT.glob(pattern)}
    others = {p for p in ROOT.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert ROOT / "py.typed" in others, "type checkers ask for it"
    assert others - taken == set()


def test_every_range_holds_the_version_that_is_tested():
    """A dependency that no line of constraints.txt fixes would be another one tomorrow; Triton is torch's own choice."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    lines = (ROOT.parent / "constraints.txt").read_text().splitlines()
    exact = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, lines[1:])}
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    ranges = {r.name: r.specifier for r in map(Requirement, wanted)}
    assert ranges.keys() - exact.keys() == {"triton"} and exact.keys() <= ranges.keys()
    assert [name for name, version in exact.items() if version not in ranges[name]] == []
