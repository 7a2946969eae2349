"""Every family but MiniMax in stock vLLM, as `export` writes it: see test_vllm.py for what its check shows.

No tensor is dropped, no parameter left unwritten, and each quantized layer, decoded from vLLM's own parameters, is ours.
Widths of latent attention are those of the releases, since vLLM's CPU build takes no other. Leaves out running them.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loads
import pytest
import replica
import torch
from folders import reword_tower
from test_exports import twin
from test_vllm import CHECK, METHODS, checked, faults, plant
from torch import Tensor

from moesaic.checkpoint import Checkpoint
from moesaic.export import export
from moesaic.plan import Plan

pytestmark = pytest.mark.engines
FAMILIES = tuple(sorted(replica.TINY))
# kind -> formats of experts (a list: by MoE layer in turn) and of the rest, and whether half of the experts go
KINDS: dict[str, tuple[str | list[str], str, bool]] = {
    "bf16": ("source", "source", False),
    "mxfp4": ("mxfp4", "bf16", False),
    "int4": ("int4_g64", "bf16", False),
    "mixed": (["mxfp4", "int4_g64"], "fp8_channel", False),
    "pruned": ("source", "source", True),
    "pruned-mixed": (["mxfp4", "int4_g64"], "fp8_channel", True),
}
# (family, what its vendor releases it in): cut to half, every byte of what stays the vendor's
VENDORS = [
    ("qwen3_moe", "fp8"), ("glm4_moe", "fp8_channel"), ("deepseek_v3", "fp8"), ("kimi_k2", "fp8"), ("kimi_k25", "int4"),
]  # fmt: skip
WITH_MTP = ("deepseek_v3", "glm4_moe", "glm4_moe_lite")
CASES = [(family, kind) for family in FAMILIES for kind in KINDS]


def plan(source: Checkpoint, kind: str) -> Plan:
    (experts, rest, halved), a = KINDS[kind], source.architecture
    kept = {layer: tuple(range(1, a.experts, 2)) for layer in a.moe_layers} if halved else {}
    if experts == rest == "source":
        return Plan(source.container.name, kept)
    dealt = experts if isinstance(experts, list) else [experts]
    formats = {
        unit: dealt[a.moe_layers.index(members[0].layer) % len(dealt)] if members[0].role == "experts" else rest
        for unit, members in a.units.items()
        if members[0].role != "mtp"
    }
    return Plan("compressed_tensors", kept, formats)


Config, Tensors = dict[str, Any], dict[str, Tensor]


def quantize_the_router(config: Config, tensors: Tensors) -> None:
    """vLLM gives Qwen3's router the quantization config, as it gives no other family's."""
    config["ignore"] = [entry for entry in config["ignore"] if "gate" not in entry]
    config["config_groups"]["group_0"]["targets"].append("Linear")


def missing_scale(config: Config, tensors: Tensors) -> None:
    del tensors[next(n for n in tensors if n.endswith("experts.1.down_proj.weight_scale"))]


def swapped_nibbles(config: Config, tensors: Tensors) -> None:
    name = next(n for n in tensors if re.search(r"experts\.1\.(down_proj|w2)\.weight_packed$", n))
    tensors[name] = tensors[name] >> 4 | tensors[name] << 4


def swap_experts(config: Config, tensors: Tensors) -> None:
    for part in ("weight_packed", "weight_scale"):
        one, two = sorted(n for n in tensors if n.endswith(f"up_proj.{part}"))[:2]
        tensors[one], tensors[two] = tensors[two], tensors[one]


def one_group_short(config: Config, tensors: Tensors) -> None:
    """The last layer's experts under no target: vLLM takes them for BF16."""
    group = config["config_groups"]["group_0"]
    group["targets"] = [target.replace("(1|2)", "(1)") for target in group["targets"]]


def drop_a_correction(config: Config, tensors: Tensors) -> None:
    del tensors[next(n for n in tensors if n.endswith("e_score_correction_bias"))]


def drop_the_prefix(config: Config, tensors: Tensors) -> None:
    """Without the prefix under which vLLM has the language model."""
    for name in [name for name in tensors if ".experts.1." in name]:
        tensors[name.removeprefix("language_model.")] = tensors.pop(name)


PLANTED: list[tuple[str, Callable[[Config, Tensors], None]]] = [
    ("qwen3_moe", quantize_the_router), ("olmoe", missing_scale), ("mixtral", swapped_nibbles), ("glm4_moe", drop_a_correction),
    ("glm4_moe_lite", swap_experts), ("deepseek_v3", one_group_short), ("kimi_k2", swapped_nibbles),
    ("kimi_k25", drop_the_prefix),
]  # fmt: skip


PROCESSOR = {  # of Kimi-K2.5's images: no part of the weights, and asked for before they are
    "patch_size": 14, "merge_kernel_size": 2, "temporal_merge_kernel_size": 4, "fixed_output_tokens": None,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "in_patch_limit": 16384, "in_patch_limit_each_frame": 4096,
    "in_patch_limit_video": None, "patch_limit_on_one_side": 512,
}  # fmt: skip


def with_processor(folder: Path) -> Path:
    """A model with a tower, and its twin, with what vLLM asks of them; a release brings it along."""
    if "vision_config" in json.loads((folder / "config.json").read_text()):
        twin_of = folder.with_name(f"{folder.name}-deq")
        for path in (folder, twin_of):
            reword_tower(path)
            (path / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": PROCESSOR}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / file, twin_of / file)
    return folder


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What vLLM said of every folder that was asked for, by its name."""
    python = request.config.getoption("--vllm-python")
    if not python:
        pytest.skip("no --vllm-python PATH was given, so nothing is loaded in vLLM")
    if not CHECK.exists():
        pytest.skip(f"the load check {CHECK} is not there, so nothing is loaded in vLLM")
    root: Path = tmp_path_factory.mktemp("families")
    asked = {i.callspec.id for i in request.session.items if isinstance(i, pytest.Function) and hasattr(i, "callspec")}
    three = {"glm4_moe_lite": {"layers": 3}}  # of which two have experts, for a mix of formats
    sources = {f: Checkpoint.open(replica.make(root / f, f, **three.get(f, {}))) for f in FAMILIES}
    folders = []
    for family, kind in CASES:
        if f"{family}-{kind}" in asked:
            out = root / f"{family}-{kind}"
            with torch.no_grad():
                twin(export(sources[family], plan(sources[family], kind), out, quiet=True))
            folders.append(with_processor(out))
    for family, vendors in VENDORS:
        if f"{family}-of-{vendors}" in asked:
            narrow = {"q_lora_rank": 128} if vendors == "fp8" and family != "qwen3_moe" else {}
            source = Checkpoint.open(replica.make(root / f"{family}-in-{vendors}", family, vendors, **narrow))
            out = root / f"{family}-of-{vendors}"
            with torch.no_grad():
                twin(export(source, plan(source, "pruned"), out, quiet=True))
            folders.append(with_processor(out))
    for family in WITH_MTP:
        if f"{family}-mtp" in asked:
            source = Checkpoint.open(replica.make(root / f"{family}-whole", family, mtp=True))
            folders.append(export(source, plan(source, "mxfp4"), root / f"{family}-mtp", quiet=True).path)
    for family, fault in PLANTED:
        if f"{family}-{fault.__name__}" in asked:
            out = root / f"{family}-{fault.__name__}"
            with torch.no_grad():
                twin(export(sources[family], plan(sources[family], "mxfp4"), out, quiet=True))
            plant(out, fault)
            folders.append(with_processor(out))
    return checked(python, folders, root / "reports.json")


@pytest.mark.parametrize(("family", "kind"), CASES, ids=[f"{family}-{kind}" for family, kind in CASES])
def test_vllm_loads_what_was_exported(
    family: str, kind: str, reports: dict[str, dict[str, Any]], record_property: loads.Record
) -> None:
    report, (experts, rest, halved) = reports[f"{family}-{kind}"], KINDS[kind]
    assert not faults(report)
    assert report["tensors"] > 0
    chosen = report["methods"]
    for format in ["bf16"] if experts == "source" else [experts] if isinstance(experts, str) else experts:
        assert METHODS.get(format, "CompressedTensorsWNA16MoEMethod") in " ".join(chosen.values())
    assert (report.get("decoded_layers", 0) > 0) == (experts != "source")
    routers = {module: method for module, method in chosen.items() if re.search(r"(mlp|moe)\.gate$", module)}
    assert set(routers.values()) <= {"UnquantizedLinearMethod"}, routers
    assert routers or family != "qwen3_moe"
    named = experts if isinstance(experts, str) else " + ".join(experts)
    e, r = ("bf16" if part == "source" else part for part in (named, rest))
    columns = "unquantized" if experts == "source" else "compressed_tensors"
    loads.note(
        record_property, "vLLM 0.32", family, f"{columns}{loads.OTHERS}", f"{e}, half of them" if halved else e, r
    )


@pytest.mark.parametrize(("family", "source"), VENDORS, ids=[f"{family}-of-{source}" for family, source in VENDORS])
def test_vllm_loads_what_was_cut_from_a_vendors_formats(
    family: str, source: str, reports: dict[str, dict[str, Any]], record_property: loads.Record
) -> None:
    report = reports[f"{family}-of-{source}"]
    assert not faults(report)
    assert report["tensors"] > 0 and report["decoded_layers"] > 0
    rest = "bf16" if source == "int4" else source
    loads.note(record_property, "vLLM 0.32", family, f"as released{loads.OTHERS}", f"{source}, half of them", rest)


@pytest.mark.parametrize("family", WITH_MTP, ids=[f"{family}-mtp" for family in WITH_MTP])
def test_vllm_leaves_mtp_to_the_class_that_drafts(
    family: str, reports: dict[str, dict[str, Any]], record_property: loads.Record
) -> None:
    """The layer behind the last, in the source's BF16 beside experts in MXFP4, is all that the model's own class passes over."""
    report = reports[f"{family}-mtp"]
    config = json.loads((Path(report["ckpt"]) / "config.json").read_text())
    assert faults(report).keys() == {"dropped"}
    assert all(name.startswith(f"model.layers.{config['num_hidden_layers']}.") for name in report["dropped"])
    said = "yes, but for MTP's"
    loads.note(
        record_property, "vLLM 0.32", family, f"compressed_tensors{loads.OTHERS}", "mxfp4, with MTP", "bf16", said
    )


@pytest.mark.parametrize(("family", "fault"), PLANTED, ids=[f"{family}-{fault.__name__}" for family, fault in PLANTED])
def test_vllm_shows_planted_faults(
    family: str,
    fault: Callable[[Config, Tensors], None],
    reports: dict[str, dict[str, Any]],
    record_property: loads.Record,
) -> None:
    """One in each family: the check is one that can fail."""
    assert faults(reports[f"{family}-{fault.__name__}"])
    record_property(loads.FAULTS, f"{fault.__name__} ({family})")
