"""Layers of the released models' own dimensions, as `export` writes them, in stock vLLM: test_vllm.py says what that shows.

Needs `--vllm-python PATH`, the load check of ../shared and its replicas: of M2.7 two layers of 8 experts of
1536 × 3072; of M3 a dense layer and two of 3 experts of 3072 × 6144. A folder of gigabytes is gone before the next
one. Leaves out the other formats, which differ in nothing that dimensions could break.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import loads
import pytest
import torch
from conftest import SHARED
from test_exports import twin
from test_vllm import CHECK, checked, faults, no_default_projections, plant, swapped_nibbles

from moesaic.checkpoint import Checkpoint
from moesaic.export import export
from moesaic.plan import SOURCE, Plan

pytestmark = pytest.mark.engines
REPLICA = SHARED / "replica" / "make_replica.py"
SIZES = {"m2": ("--layers", "2", "--experts", "8"), "m3": ("--layers", "2", "--experts", "3")}
TITLE = "compressed_tensors, dimensions of the released models"
CASES = [
    (family, formats, whole)
    for family in SIZES
    for formats in (("mxfp4",), ("int3_g64",), ("nvfp4",), ("nvfp4", "int3_g64"), ("bf16", "mxfp4"))
    for whole in (True, False)
]
PLANTED = {"m2": swapped_nibbles, "m3": no_default_projections}


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    path = request.config.getoption("--vllm-python")
    if not path:
        pytest.skip("no --vllm-python PATH was given, so nothing is loaded in vLLM")
    if missing := [p for p in (CHECK, REPLICA) if not p.exists()]:
        pytest.skip(f"{missing[0]} is not there, so no layer of real dimensions is loaded in vLLM")
    return str(path)


Replicas = Callable[[str], Checkpoint]  # by family


@pytest.fixture(scope="module")
def replica(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """Each is made when it is first asked for."""
    root = tmp_path_factory.mktemp("replicas")

    @cache
    def made(family: str) -> Checkpoint:
        out = root / family
        words = [sys.executable, str(REPLICA), "--family", family, "--preset", "layer", "--vocab", "512"]
        subprocess.run([*words, *SIZES[family], "--out", str(out)], check=True, capture_output=True)
        config = json.loads((out / "config.json").read_text())
        config.get("text_config", config)["num_experts_per_tok"] = 2  # so that some of so few may go
        (out / "config.json").write_text(json.dumps(config))
        return Checkpoint.open(out)

    yield made
    shutil.rmtree(root)


@torch.no_grad()
def write(source: Checkpoint, formats: tuple[str, ...], whole: bool, out: Path) -> Path:
    """With every second expert where not `whole`, the formats dealt out layer by layer."""
    a = source.architecture
    kept = {} if whole else {layer: tuple(range(0, a.experts, 2)) for layer in a.moe_layers}
    units = [unit for unit, members in a.units.items() if members[0].role == "experts"]
    dealt = {unit: formats[i % len(formats)] for i, unit in enumerate(units)}
    twin(export(source, Plan("compressed_tensors", kept, dealt), out, quiet=True))
    return out


@pytest.mark.parametrize(("family", "formats", "whole"), CASES)
def test_vllm_loads_layers_of_real_dimensions(
    family: str,
    formats: tuple[str, ...],
    whole: bool,
    python: str,
    replica: Replicas,
    tmp_path: Path,
    record_property: loads.Record,
) -> None:
    out = write(replica(family), formats, whole, tmp_path / "out")
    (report,) = checked(python, [out], tmp_path / "report.json").values()
    written = len(Checkpoint.open(out).stored)
    shutil.rmtree(tmp_path)
    assert not faults(report)
    assert report["tensors"] == written and report["decoded_layers"] > 4
    named = " + ".join(formats) + ("" if whole else ", every second expert")
    loads.note(record_property, "vLLM 0.32", family, TITLE, named, SOURCE)


@pytest.mark.parametrize("family", PLANTED)
def test_vllm_shows_planted_faults_in_real_dimensions(
    family: str, python: str, replica: Replicas, tmp_path: Path, record_property: loads.Record
) -> None:
    out, fault = write(replica(family), ("mxfp4",), False, tmp_path / "out"), PLANTED[family]
    plant(out, fault)
    (report,) = checked(python, [out], tmp_path / "report.json").values()
    shutil.rmtree(tmp_path)
    assert faults(report)
    record_property(loads.FAULTS, f"{fault.__name__} (released dimensions)")
