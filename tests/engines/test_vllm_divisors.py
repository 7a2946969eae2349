"""Exports whose activations are rounded to NVFP4, in stock vLLM: its parameters hold the divisors that we wrote, each its own.

Needs `--vllm-python PATH` and the load check of ../shared, which decodes the weights (test_vllm.py). Every input of
the model has another divisor here, so that one that lands in a wrong place is seen. What moesaic refuses is shown refused.
"""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import loads
import pytest
import torch
from test_exports import twin
from test_vllm import CHECK, checked, faults

from moesaic.checkpoint import Checkpoint
from moesaic.errors import PlanError
from moesaic.export import export
from moesaic.families import Linear
from moesaic.plan import SOURCE, Plan
from moesaic.plan.blueprint import Blueprint

pytestmark = pytest.mark.engines
ENGINE, CONTAINER = "vLLM 0.32", "compressed_tensors"
CASES = [  # family, experts (a list: layer by layer), rest
    ("m2", ["nvfp4_a4"], SOURCE), ("m2", ["nvfp4_a4"], "nvfp4_a4"), ("m2", ["nvfp4_a4", "mxfp4"], SOURCE),
    ("m3", ["nvfp4_a4"], SOURCE), ("m3", ["nvfp4_a4"], "bf16"), ("m3", ["nvfp4_a4"], "fp8_channel"),
    ("m3", ["nvfp4_a4", "mxfp4"], SOURCE),
]  # fmt: skip


def plan_of(source: Checkpoint, experts: list[str], rest: str) -> Plan:
    """Formats as asked, and a largest value of its own for every input that they round."""
    units = source.architecture.units.items()
    moe = [unit for unit, members in units if members[0].role == "experts"]
    formats = {unit: experts[moe.index(unit) % len(experts)] if unit in moe else rest for unit, _ in units}
    plan = Plan(CONTAINER, formats=formats)
    asked = Blueprint.of(source, plan).uncalibrated
    return replace(plan, activations={name: 3.0 + 0.7 * i for i, name in enumerate(asked)})


Divisors = dict[tuple[str, str], torch.Tensor]  # (layer, "w13", "w2", "qkv_proj" or "o_proj") -> one for each member


def in_vllm(python: str, folder: Path, out: Path) -> Divisors:
    torchvision = Path(python).parents[1] / "tv"  # as in test_vllm.py
    environment = os.environ | {"PYTHONPATH": f"{torchvision}:{CHECK.parent}", "OMP_NUM_THREADS": "1"}
    command = [python, str(Path(__file__).with_name("vllm_divisors.py")), str(folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return {
        re.fullmatch(r".*layers\.(\d+)\..*\.(\w+)[._]input_global_scale", name).groups(): torch.tensor(value)
        for name, value in json.loads(out.read_text()).items()
    }


def ours(model: Checkpoint) -> Divisors:
    """The divisors on disk, stacked as vLLM stacks what it fuses."""
    a, found = model.architecture, {}

    def read(*linears: Linear) -> torch.Tensor:
        return torch.cat([model.read(f"{n.name}.input_global_scale") for n in linears])

    for unit, members in a.units.items():
        layer, of = str(members[0].layer), {n.projection: n for n in members if n.expert is None}
        if model.formats[members[0].name] != "nvfp4_a4":
            continue
        if members[0].role == "experts":
            experts = [a.experts_of[members[0].layer, e] for e in range(a.experts)]
            found[layer, "w13"] = torch.stack([read(e["gate"], e["up"]) for e in experts])
            found[layer, "w2"] = read(*(e["down"] for e in experts))
        elif "q" in of:
            found[layer, "qkv_proj"] = read(of["q"], of["k"], of["v"])
        else:
            assert list(of) == ["o"], unit
            found[layer, "o_proj"] = read(of["o"])
    return found


@pytest.mark.parametrize(("family", "experts", "rest"), CASES)
@torch.no_grad()
def test_vllm_has_our_divisors(
    family: str,
    experts: list[str],
    rest: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: loads.Record,
) -> None:
    python = request.config.getoption("--vllm-python")
    if not python:
        pytest.skip("no --vllm-python PATH was given, so nothing is loaded in vLLM")
    if not CHECK.exists():
        pytest.skip(f"the load check {CHECK} is not there, so nothing is loaded in vLLM")
    source = request.getfixturevalue(family)
    plan = plan_of(source, experts, rest)
    out = export(source, plan, tmp_path / "out", quiet=True)
    twin(out)
    (report,) = checked(python, [out.path], tmp_path / "report.json").values()
    assert not faults(report) and report["decoded_layers"] > 0
    theirs, wanted = in_vllm(python, out.path, tmp_path / "divisors.json"), ours(out)
    assert theirs.keys() == wanted.keys() and len(wanted) == len(plan.activations)
    assert all(torch.equal(theirs[where], divisors) for where, divisors in wanted.items())
    assert len({float(divisors.flatten()[0]) for divisors in wanted.values()}) == len(wanted)
    loads.note(record_property, ENGINE, family, CONTAINER, experts, rest, "yes, with our divisors")


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_a4"])
def test_an_indexer_in_nvfp4_is_refused(m3: Checkpoint, format: str, record_property: loads.Record) -> None:
    with pytest.raises(PlanError, match="holds an indexer, which vLLM does not load in NVFP4"):
        plan_of(m3, [format], format)
    loads.note(record_property, ENGINE, "m3", CONTAINER, format, format, "refused by moesaic: its indexer")
