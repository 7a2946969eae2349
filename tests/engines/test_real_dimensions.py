"""Layers of the released widths in stock vLLM: shapes that small models do not have, few experts of them.

Needs `--vllm-python PATH`, and ../shared/replica, which writes random layers as they are released. A few minutes, 6 GB.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import loads
import pytest
import torch
from conftest import SHARED
from test_exports import twin
from test_vllm import CHECK, checked, faults

from moesaic.checkpoint import Checkpoint
from moesaic.export import export
from moesaic.plan import Plan

pytestmark = pytest.mark.engines
MAKE = SHARED / "replica" / "make_replica.py"
EXPERTS = {"m2": 8, "m3": 4}
CASES = [
    ("m2", "mxfp4", "source"), ("m2", "int4_g128", "fp8_channel"), ("m2", "nvfp4", "source"), ("m3", "mxfp4", "source"),
    ("m3", "int3_g64", "source"), ("m3", "nvfp4", "fp8_block"),
]  # fmt: skip


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    python = request.config.getoption("--vllm-python")
    if not python:
        pytest.skip("no --vllm-python PATH was given, so nothing is loaded in vLLM")
    for needed in (CHECK, MAKE):
        if not needed.exists():
            pytest.skip(f"{needed} is not there, so nothing is loaded in vLLM")
    root: Path = tmp_path_factory.mktemp("real")
    found = {}
    for family, experts in EXPERTS.items():
        words = [
            sys.executable,
            str(MAKE),
            "--family",
            family,
            "--preset",
            "layer",
            "--layers",
            "1",
            "--experts",
            str(experts),
        ]
        subprocess.run([*words, "--seed", "0", "--out", str(root / family)], check=True, capture_output=True)
        source = Checkpoint.open(root / family)
        for case in (c for c in CASES if c[0] == family):
            folder, (_, of_experts, rest) = root / "-".join(case), case
            units = source.architecture.units.items()
            formats = {u: of_experts if m[0].role == "experts" else rest for u, m in units}
            with torch.no_grad():
                twin(export(source, Plan("compressed_tensors", {}, formats), folder, quiet=True))
            found |= checked(python, [folder], root / "report.json")
            for file in [*folder.iterdir(), *folder.with_name(f"{folder.name}-deq").iterdir()]:
                if file.suffix == ".safetensors":
                    file.unlink()  # gigabytes, one case at a time
    return found


@pytest.mark.parametrize(("family", "experts", "rest"), CASES)
def test_vllm_loads_layers_of_released_widths(
    family: str, experts: str, rest: str, reports: dict[str, dict[str, Any]], record_property: loads.Record
) -> None:
    report = reports["-".join((family, experts, rest))]
    assert not faults(report)
    assert report["tensors"] > 0 and report["decoded_layers"] > 0
    said = f"{experts}, one layer of released width"
    loads.note(record_property, "vLLM 0.32", family, "compressed_tensors", said, rest)
