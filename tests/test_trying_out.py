"""Without --data a model depends on the standard library's text: the command, the report and the card say so."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny

from moesaic.cli import main
from moesaic.data.corpus import TRYING_OUT, Corpus
from moesaic.report import Naming, gather
from moesaic.report.card import card
from moesaic.report.page import page
from moesaic.report.sections.limits import CALIBRATED_ON_PYTHON, PYTHON_TEXT

FEW = ("--tokens", "192", "--length", "48")
GPTQ = ("--format", "int4_g128", "--rounding", "gptq")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.make(tmp_path_factory.mktemp("model") / "model", "minimax_m2", layers=1)
    (path / "LICENSE").write_text("MIT")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("\n".join(f"{i} words of the user" for i in range(200)))
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[object]], list[str]]:
    """The lines of a command's standard output."""

    def run(words: Sequence[object]) -> list[str]:
        capsys.readouterr()
        assert main([*map(str, words), "--quiet"]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def shown(run: Path) -> tuple[str, str]:
    facts = gather(run)
    return page(facts), card(facts, Naming("a/b"))


NOTE = f"note     {TRYING_OUT}"
MADE = {
    "compress": ("--experts", "4", "--evaluation-tokens", "96", *FEW),
    "prune": ("--experts", "4", *FEW),
    "quantize": (*GPTQ, *FEW),
}


@pytest.mark.parametrize("command", MADE)
def test_without_data_it_is_said(model, tmp_path, said, command):
    """First, last, on the report and on the card."""
    lines = said([command, model, tmp_path / "out", *MADE[command]])
    assert lines[0] == lines[-1] == NOTE and lines.count(NOTE) == 2
    for text in shown(tmp_path / "out"):
        assert CALIBRATED_ON_PYTHON.split(":")[0] in text.replace("&#39;", "'")
        assert (PYTHON_TEXT.split(":")[0] in text) == (command == "compress")  # judged by the library's text, too


@pytest.mark.parametrize("command", MADE)
def test_with_data_it_is_not(model, data, tmp_path, said, command):
    lines = said([command, model, tmp_path / "out", *MADE[command], "--data", data])
    assert NOTE not in lines
    for text in shown(tmp_path / "out"):
        assert "trials only" not in text and PYTHON_TEXT.split(":")[0] not in text


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "--format", "mxfp4"),  # rounding looks at weights alone
        ("quantize", "--format", "mxfp4", "--rounding", "search"),
        ("prune", "--experts", "4", "--criterion", "aimer"),
    ],
)
def test_where_no_text_is_read_nothing_is_said(model, tmp_path, said, words):
    lines = said([words[0], model, tmp_path / "out", *words[1:]])
    assert NOTE not in lines and CALIBRATED_ON_PYTHON not in shown(tmp_path / "out")[0]


def test_a_run_is_what_it_was_calibrated_on(model, data, tmp_path, said):
    """`prune --run` reads no text; whether that run did is on record."""
    for name, more, count in (("library", (), 2), ("own", ("--data", data), 0)):
        said(["calibrate", model, tmp_path / name, *FEW, *more])
        lines = said(["prune", model, tmp_path / f"{name}-out", "--experts", "4", "--run", tmp_path / name])
        assert lines.count(NOTE) == count
        assert ("trials only" in shown(tmp_path / f"{name}-out")[0]) == bool(count)


def test_json_says_it_too_and_stands_alone(model, tmp_path, capsys):
    assert main(["prune", str(model), str(tmp_path / "out"), *MADE["prune"], "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert json.loads(out)["tokens"]["trying_out"] is True and lines[0] == lines[-1] == NOTE


def test_what_is_judged_by_the_users_text_is_not_for_trying_out(tmp_path):
    assert Corpus().is_trial() and Corpus().is_trial(heldout=True)
    assert Corpus(heldout=tmp_path).is_trial() and not Corpus(heldout=tmp_path).is_trial(heldout=True)
    assert not Corpus(tmp_path).is_trial() and not Corpus(tmp_path).is_trial(heldout=True)


def test_a_folder_called_python_is_the_users(model, tmp_path, said):
    (tmp_path / "Python 3").mkdir()
    (tmp_path / "Python 3" / "a.txt").write_text("\n".join(f"{i} words of the user" for i in range(200)))
    said(["prune", model, tmp_path / "out", *MADE["prune"], "--data", tmp_path / "Python 3"])
    assert "trials only" not in shown(tmp_path / "out")[0]
