"""Exports in stock vLLM: its config parser, its model classes, its loaders, and every weight decoded from its parameters.

Needs `pytest --vllm-python PATH`, a Python that has vLLM's CPU build, and the load check in ../shared/checks. What
it shows of a folder: no tensor is dropped, no parameter is left unwritten, and each quantized layer, decoded by
code that is not ours, equals a BF16 twin of our values. It runs no kernel: a machine without a GPU has none.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loads
import pytest
from conftest import SHARED
from folders import deal, write_folder, write_twin
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint import Checkpoint

pytestmark = pytest.mark.engines
CHECK = SHARED / "checks" / "vllm" / "check_load.py"

Formats = str | list[str]  # of the experts; a list is dealt out MoE layer by MoE layer
Case = tuple[str, str, Formats, str]  # container, family, experts, rest
EXPERTS = ("mxfp4", "nvfp4", "int4_g128", "int3_g32", "int2_g32")
UNIFORM = (
    "mxfp4",
    "mxfp8",
    "fp8_block",
    "fp8_channel",
    "int8_channel",
    "int8_g128",
    "int4_g32",
    "int3_g64",
    "int2_g128",
)
CASES: list[Case] = [("compressed_tensors", "m2", "nvfp4", "nvfp4")]
for family in ("m2", "m3"):
    CASES += [("compressed_tensors", family, experts, "source") for experts in EXPERTS]
    # M3's small fused matrices are no whole squares here, as they are in the released model
    CASES += [("compressed_tensors", family, f, "bf16" if (family, f) == ("m3", "fp8_block") else f) for f in UNIFORM]
    CASES += [
        ("compressed_tensors", family, "mxfp4", "bf16"),
        ("compressed_tensors", family, ["nvfp4", "int3_g32"], "source"),
    ]
    CASES += [("compressed_tensors", family, ["bf16", "int2_g32"], "int8_channel")]
    CASES += [("auto_round", family, f, r) for f, r in ((["int8_g64", "int4_g128"], "int4_g128"), ("int4_g32", "bf16"))]
    CASES += [
        ("gptq", family, f, r) for f, r in (("int4_g128", "int4_g128"), ("int8_g32", "bf16"), ("bf16", "int8_g64"))
    ]
METHODS = {
    "mxfp4": "CompressedTensorsW4A4Mxfp4MoEMethod",
    "nvfp4": "CompressedTensorsW4A4Nvfp4MoEMethod",
    "mxfp8": "CompressedTensorsW8A8Mxfp8MoEMethod",
    "fp8_block": "CompressedTensorsW8A8Fp8MoEMethod",
    "fp8_channel": "CompressedTensorsW8A8Fp8MoEMethod",
    "int8_channel": "CompressedTensorsW8A8Int8MoEMethod",
    "bf16": "Unquantized",
}  # of integers: by the container


def name_of(case: Case) -> str:
    container, family, experts, rest = case
    return f"{container}-{family}-{experts if isinstance(experts, str) else '+'.join(experts)}-{rest}"


Config, Tensors = dict[str, Any], dict[str, Tensor]


def disk_names(config: Config, tensors: Tensors) -> None:
    """Experts targeted by the names on disk: vLLM matches none and takes them for BF16."""
    for group in config["config_groups"].values():
        group["targets"] = [t for t in group["targets"] if r"mlp\.experts" not in t]


def no_default_projections(config: Config, tensors: Tensors) -> None:
    """Experts of M3 targeted as w1, w2, w3 alone."""
    for group in config["config_groups"].values():
        group["targets"] = [re.sub(r"(experts.*)\(.*\)", r"\1(w1|w2|w3)", t) for t in group["targets"]]


def two_schemes(config: Config, tensors: Tensors) -> None:
    """w3 in NVFP4 beside w1 in MXFP4."""
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    other = {"targets": [r"re:.*experts\.\d+\.w3$"], "weights": weights, "format": "nvfp4-pack-quantized"}
    config["config_groups"] = {"first": other, **config["config_groups"]}


def plain_indexer(config: Config, tensors: Tensors) -> None:
    """The indexer in BF16 beside quantized q, k, v: vLLM fuses all five."""
    config["ignore"].append(r"re:.*index_(q|k)_proj$")
    for name in [n for n in tensors if re.search(r"index_[qk]_proj\.weight$", n)]:
        tensors[name] = tensors[name].bfloat16()
        del tensors[f"{name}_scale"]


def swapped_nibbles(config: Config, tensors: Tensors) -> None:
    name = next(n for n in tensors if n.endswith("experts.1.w2.weight_packed"))
    tensors[name] = tensors[name] >> 4 | tensors[name] << 4


def missing_scale(config: Config, tensors: Tensors) -> None:
    del tensors[next(n for n in tensors if n.endswith("experts.1.w2.weight_scale"))]


PLANTED: list[tuple[str, Callable[[Config, Tensors], None]]] = [
    ("m2", disk_names), ("m2", two_schemes), ("m2", swapped_nibbles), ("m3", no_default_projections), ("m3", plain_indexer),
    ("m3", missing_scale),
]  # fmt: skip


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What vLLM said of every folder, by its name. One process loads them all: importing vLLM is the slow part."""
    python = request.config.getoption("--vllm-python")
    if not python:
        pytest.skip("no --vllm-python PATH was given, so nothing is loaded in vLLM")
    if not CHECK.exists():
        pytest.skip(f"the load check {CHECK} is not there, so nothing is loaded in vLLM")
    root = tmp_path_factory.mktemp("vllm")
    sources = {family: request.getfixturevalue(family) for family in ("m2", "m3")}
    asked = {
        item.callspec.id
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    folders = [export(root / name_of(case), sources[case[1]], case) for case in CASES if name_of(case) in asked]
    for family, edit in PLANTED:
        if edit.__name__ not in asked:
            continue
        folder = export(root / edit.__name__, sources[family], ("compressed_tensors", family, "mxfp4", "source"))
        plant(folder, edit)
        folders.append(folder)
    return checked(python, folders, root / "reports.json")


def plant(folder: Path, edit: Callable[[Config, Tensors], None]) -> None:
    """Edit the tensors and the config of a folder."""
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    edit(config["quantization_config"], tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def export(out: Path, source: Checkpoint, case: Case) -> Path:
    """The exported folder, and its BF16 twin beside it."""
    container, _, experts, rest = case
    formats = deal(source, experts, rest)
    if container == "auto_round" and source.architecture.family == "minimax_m3_vl":
        formats |= {n.name: "bf16" for n in source.architecture.linears if n.role == "qkv"}
    write_twin(source, write_folder(source, formats, container, out), out.with_name(out.name + "-deq"))
    return out


def outcome(case: Case) -> str:
    container, family, _, rest = case
    return "yes, q/k/v in bf16" if (container, family) == ("auto_round", "m3") and rest != "bf16" else "yes"


def checked(
    python: str, folders: list[Path], result: Path, check: tuple[Path, ...] = (CHECK,), *more: Path
) -> dict[str, dict[str, Any]]:
    """The check's report of every folder, by its name; `more` is on its path."""
    torchvision = Path(python).parents[1] / "tv"  # where the environment keeps the one that MiniMax-M3's classes import
    paths = ":".join(map(str, (torchvision, *more)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, *map(str, (*check, *folders)), "--json", str(result)], env=environment, capture_output=True, text=True
    )
    assert result.exists(), done.stdout + done.stderr
    return {Path(report["ckpt"]).name: report for report in json.loads(result.read_text())}


def faults(report: dict[str, Any]) -> dict[str, Any]:
    return {
        key: report[key] for key in ("error", "dropped", "errors", "unfilled", "decode_mismatch") if report.get(key)
    }


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_vllm_loads_our_values(case: Case, reports: dict[str, dict[str, Any]], record_property: loads.Record) -> None:
    report = reports[name_of(case)]
    assert not faults(report)
    assert report["tensors"] > 0 and report["decoded_layers"] > 0
    container, family, experts, rest = case
    chosen = " ".join(report["methods"].values())
    for format in [experts] if isinstance(experts, str) else experts:
        of_integers = "CompressedTensorsWNA16MoEMethod" if container == "compressed_tensors" else "AutoGPTQMoEMethod"
        assert METHODS.get(format, of_integers) in chosen
    loads.note(record_property, "vLLM 0.32", family, container, experts, rest, outcome(case))


@pytest.mark.parametrize("name", [edit.__name__ for _, edit in PLANTED])
def test_vllm_shows_planted_faults(
    name: str, reports: dict[str, dict[str, Any]], record_property: loads.Record
) -> None:
    """One trap in each of these folders: the check is one that can fail."""
    assert faults(reports[name])
    record_property(loads.FAULTS, name)
