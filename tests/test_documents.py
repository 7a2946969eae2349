"""What the documents say of the code is so: files are there, the example of a criterion works, versions are one."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import yaml

import moesaic
from moesaic.calibrate.criteria import CRITERIA, Criterion

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"`((?:moesaic|tests|docs|benchmarks)/[\w./]+|[A-Z]\w+\.(?:md|cff))`")
HOLDERS = ("NAME", "MODEL_TYPE")  # stand for a file that is to be written


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example() -> tuple[str, str]:
    """The criterion that CONTRIBUTING.md adds: its file, and what is in it."""
    (code,) = re.findall(r"```python\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)
    (place,) = re.findall(r"This is a whole one,\s+`([^`]+)`", read("CONTRIBUTING.md"))
    return place, code


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_files_that_are_named_are_there(name, example):
    named = {place for place in PLACE.findall(read(name)) if not any(word in place for word in HOLDERS)}
    assert named, "none was found: the pattern is wrong"
    assert [place for place in sorted(named - {example[0]}) if not (ROOT / place).exists()] == []


def test_names_of_code_that_contributing_names_are_there():
    """Words in capitals, such as `WORKED`, in the file that the same step names last before them or first after."""
    text = read("CONTRIBUTING.md")
    for word, place in re.findall(r"`([A-Z]{4,})` (?:in|of) `([\w/.]+)`", text):
        assert re.search(rf"^{word}\b", read(place), re.MULTILINE), f"{word} in {place}"
    assert len(re.findall(r"`([A-Z]{4,})` (?:in|of) `([\w/.]+)`", text)) >= 6


def test_the_criterion_of_contributing_is_one(example, tmp_path):
    place, code = example
    file = tmp_path / Path(place).name
    file.write_text(code.replace("from .base", "from moesaic.calibrate.criteria.base"))
    (found,) = (v for v in runpy.run_path(str(file)).values() if isinstance(v, Criterion))
    assert found.name == file.stem and found.name not in CRITERIA, "an example of what is not there"
    assert found.score({need: np.ones((1, 3)) for need in found.needs}).shape == (1, 3)


def test_the_version_is_one():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == moesaic.__version__
    assert f"\n## {moesaic.__version__}\n" in read("CHANGELOG.md")
