"""What `fit` prints, as wide as a terminal is: no number and no name is cut or broken, at 80 columns, at 120, and in a file."""

import io
import shutil
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.fit import Machine, fit, table

MODELS = ("m2.7", "m3", "m3_mxfp8", "mixtral", "mixtral_8x22b", "kimi_k2", "olmoe")
DEVICES = ("4xH100 NVL", "8xH100", "DGX Spark", "2x95GiB", "16xRTX PRO 6000", "Mac Studio 512 GB")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name)
        shutil.copy(tiny.CONFIGS / f"{name}.json", found[name] / "config.json")
    return found


def printed(facts: dict, columns: int) -> str:
    shown = io.StringIO()
    Console(width=columns, file=shown).print(table(facts))
    return shown.getvalue()


CASES = [(n, d) for n in MODELS for d in DEVICES if not (n.startswith("mixtral") and d.startswith("16"))]  # 8 experts


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(("name", "devices"), CASES)
def test_tables_are_whole(folders, name, devices, columns):
    facts = fit(Checkpoint.open(folders[name]), Machine.parse(devices), kv="fp8", concurrency=3)
    text = printed(facts, columns)
    assert "…" not in text and max(map(len, text.splitlines())) <= columns
    cache, device = facts["cache"], facts["device"]
    figures = [device["bytes"], device["weight_bytes"], *cache["bytes"].values(), *device["reserve_bytes"].values()]
    wanted = [f"{count / 2**30:,.2f}" for count in figures] + [f"{cache['tokens']:,} tokens"]
    lines = text.splitlines()
    for row in facts["plans"]:
        (line,) = (
            line for line in lines if "│" in line and line.split()[0] == row["format"]
        )  # on one line, with its name whole
        wanted.append(f"{row['most_bytes'] / 1e9:,.1f}" if row["most_experts"] else "none")
        cells = [f"{c['bytes'] / 1e9:,.1f}" if c["fits"] else f"({c['bytes'] / 1e9:,.1f})" for c in row["kept"]]
        shown = [cell.strip() for cell in line.split("│")][1:-2]
        assert (
            len(shown) == min(4, len(cells))
            and shown[0] == cells[0]
            and shown[-1] == cells[-1]
            and set(shown) <= set(cells)
        )
    assert not [number for number in wanted if not any(number in line for line in lines)]


def test_a_cut_cell_is_seen(folders):
    """At 40 columns there is no room."""
    facts = fit(Checkpoint.open(folders["m3"]), Machine.parse("4xH100 NVL"))
    assert "…" in printed(facts, 40)


@pytest.mark.parametrize("columns", [None, "80", "120"])
def test_the_command_line_keeps_to_the_width(folders, columns, monkeypatch, capsys):
    """None: as into a file, where rich counts on 80. A command to copy is one line, however long."""
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["fit", str(folders["m3_mxfp8"]), "--devices", "4xH100NVL"]) == 0
    out = capsys.readouterr().out
    prose = [line for line in out.splitlines() if not line.startswith("  moesaic ")]
    assert "…" not in out and max(map(len, prose)) <= int(columns or 80)
    assert "443.74 GB" in out
