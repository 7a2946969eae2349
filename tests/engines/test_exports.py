"""What `export` itself writes, pruned, rounded and both, in stock vLLM: see test_vllm.py for what its check shows."""

import json
from pathlib import Path
from typing import Any

import loads
import pytest
import torch
from folders import saved
from safetensors.torch import save_file
from test_vllm import CHECK, checked, faults

from moesaic.checkpoint import Checkpoint
from moesaic.export import export
from moesaic.plan import Plan

pytestmark = pytest.mark.engines
CASES = [(family, kind) for family in ("m2", "m3") for kind in ("pruned", "rounded", "both", "saved")]


def twin(model: Checkpoint) -> None:
    """A BF16 copy of what `model` means, in the folder beside it where vLLM's check looks."""
    tensors = {t.name: model.read(t.name) for t in model.architecture.tensors}
    tensors |= {f"{n.name}.weight": model.decode(n.name).bfloat16() for n in model.architecture.linears}
    out = model.path.with_name(model.path.name + "-deq")
    out.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors")
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    python = request.config.getoption("--vllm-python")
    if not python:
        pytest.skip("no --vllm-python PATH was given, so nothing is loaded in vLLM")
    if not CHECK.exists():
        pytest.skip(f"the load check {CHECK} is not there, so nothing is loaded in vLLM")
    root: Path = tmp_path_factory.mktemp("exports")
    for family, kind in CASES:
        source: Checkpoint = request.getfixturevalue(family)
        if kind == "saved":
            source = Checkpoint.open(saved(source, root / f"{family}-by-transformers"))
        a = source.architecture
        kept = {layer: tuple(range(1, a.experts, 2)) for layer in a.moe_layers} if kind in ("pruned", "both") else {}
        formats = {unit: "mxfp4" for unit, members in a.units.items() if members[0].role == "experts"}
        plan = Plan(source.container.name, kept) if kind == "pruned" else Plan("compressed_tensors", kept, formats)
        with torch.no_grad():
            twin(export(source, plan, root / f"{family}-{kind}", quiet=True))
    return checked(python, [root / f"{family}-{kind}" for family, kind in CASES], root / "reports.json")


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_vllm_loads_what_was_exported(
    family: str, kind: str, reports: dict[str, dict[str, Any]], record_property: loads.Record
) -> None:
    report = reports[f"{family}-{kind}"]
    assert not faults(report)
    assert report["tensors"] > 0
    made = {
        "pruned": ("source, half of them", "source"),
        "rounded": ("mxfp4", "source"),
        "both": ("mxfp4, half of them", "source"),
        "saved": ("mxfp4", "source"),
    }
    container = "compressed_tensors" if kind != "pruned" else {"m2": "fp8", "m3": "mxfp8"}[family]
    loads.note(record_property, "vLLM 0.32", family, container, *made[kind])
