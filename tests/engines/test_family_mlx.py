"""Every family but MiniMax in stock mlx-lm: the logits of our forward pass, or of transformers', to float32's rounding.

Needs `pytest --mlx-python PATH`, and nothing beside the clone: folders are those of tests/replica.py. Of BF16 models the
other side is transformers' full model of the folder; of quantized ones it is ours, on the values that the export decodes
to. The last tokens are also decoded behind a cache: under latent attention mlx-lm multiplies other matrices then. Leaves
out what MTP's layer computes, which mlx-lm never runs.
"""

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import loads
import pytest
import replica
import torch
from forward import final
from safetensors.torch import load_file, save_file
from torch import Tensor
from whole import logits, whole

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.checkpoint.containers.mlx import described
from moesaic.export import export
from moesaic.formats import FORMATS
from moesaic.plan import Plan
from moesaic.stream import LayerRun, State

pytestmark = pytest.mark.engines
SIDE = Path(__file__).with_name("mlx_side.py")
ENGINE = "mlx-lm 0.32"
TOLERANCE = 1e-4  # on logits, whose standard deviation is about 1.3
TOKENS = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(3))
FAMILIES = tuple(sorted(replica.TINY))

# kind -> formats of experts and of the rest, and whether half of the experts go
KINDS: dict[str, tuple[str, str, bool]] = {
    "bf16": ("source", "source", False),
    "stacked": ("bf16", "bf16", False),
    "mxfp4": ("mxfp4", "bf16", False),
    "affine4": ("affine4_g64", "bf16", False),
    "integers": ("int4_g64", "bf16", False),  # rounded in compressed-tensors, carried over to MLX
    "mixed": ("mxfp4", "affine8_g64", False),
    "all mx": ("mxfp4", "mxfp8", False),
    "pruned": ("source", "source", True),
    "pruned mxfp4": ("mxfp4", "affine8_g64", True),
}
VENDORS = [("kimi_k25", "int4", "source"), ("deepseek_v3", "fp8", "mxfp4"), ("qwen3_moe", "fp8", "mxfp4")]
# DeepSeek's layer is dropped by its number, 61
WITH_MTP: list[tuple[str, dict[str, int]]] = [
    ("glm4_moe", {}), ("glm4_moe_lite", {}), ("deepseek_v3", {"layers": 61, "first_k_dense_replace": 60}),
]  # fmt: skip


def formats(source: Checkpoint, experts: str, rest: str) -> dict[str, str]:
    """By unit. A layer for MTP keeps its values, and so does what mlx-lm would round again (kv_b_proj)."""
    found = {}
    for unit, members in source.architecture.units.items():
        wanted = experts if members[0].role == "experts" else rest
        if members[0].role != "mtp":
            found[unit] = "bf16" if members[0].projection == "kv_b" and wanted != "source" else wanted
    return found


def written(source: Checkpoint, experts: str, rest: str, halved: bool, out: Path) -> Path:
    a = source.architecture
    kept = {layer: tuple(range(1, a.experts, 2)) for layer in a.moe_layers} if halved else {}
    if experts == rest == "source":
        return source.path if not halved else export(source, Plan(source.container.name, kept), out, quiet=True).path
    if experts.startswith("int"):
        plan = Plan("compressed_tensors", kept, formats(source, experts, rest))
        source = export(source, plan, out.with_name(f"{out.name}-ct"), quiet=True)
        return export(source, Plan("mlx"), out, quiet=True).path
    return export(source, Plan("mlx", kept, formats(source, experts, rest)), out, quiet=True).path


def name_of(family: str, kind: str) -> str:
    return f"{family}-{kind.replace(' ', '-')}"


class Folders:
    """Model folders, each written once, and what mlx-lm says of all that were asked for."""

    def __init__(self, root: Path, python: str) -> None:
        self.root, self.python = root, python
        self.source = cache(self._source)
        (root / "out").mkdir()
        (root / "tokens.json").write_text(json.dumps(TOKENS.tolist()))

    def _source(self, family: str, source: str = "bf16") -> Checkpoint:
        narrow = {"q_lora_rank": 128} if source == "fp8" and family == "deepseek_v3" else {}
        return Checkpoint.open(replica.make(self.root / f"{family}-{source}", family, source, **narrow))

    def source_with_mtp(self, family: str, more: dict[str, int]) -> Checkpoint:
        return Checkpoint.open(replica.make(self.root / f"{family}-mtp{len(more)}", family, mtp=True, **more))

    def said(self, *folders: Path) -> dict[str, dict[str, Any]]:
        command = [self.python, str(SIDE), str(self.root / "tokens.json"), str(self.root / "out"), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == len(folders), done.stderr[-2000:]
        return {line["folder"]: line for line in lines}

    def found(self, folder: Path) -> dict[str, Tensor]:
        return load_file(self.root / "out" / f"{folder.name}.safetensors")


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    python = request.config.getoption("--mlx-python")
    if not python:
        pytest.skip("no --mlx-python PATH was given, so nothing is loaded in mlx-lm")
    return Folders(tmp_path_factory.mktemp("mlx"), str(python))


def ours(path: Path) -> Tensor:
    run = LayerRun(Checkpoint.open(path))
    (state,) = final(run, [State(run.embed(TOKENS))])
    return run.logits(state.hidden_BTD.flatten(0, 1)).view(*TOKENS.shape, -1)


def difference(found: dict[str, Tensor], wanted: Tensor) -> float:
    whole, cached = (found[name] - wanted[:, -found[name].shape[1] :] for name in ("whole", "cached"))
    assert whole.isfinite().all() and cached.isfinite().all()
    return float(max(whole.abs().max(), cached.abs().max()))


def note(
    record: loads.Record, family: str, experts: str, rest: str, halved: bool = False, source: str = "bf16"
) -> None:
    """A row; "source" is what the source is in."""
    named = {"source": source, "int4_g64": "affine4_g64, once int4_g64"}
    e, r = named.get(experts, experts), named.get(rest, rest)
    latent = "kv_lora_rank" in replica.text(replica.released(replica.TINY[family][0]))
    outcome = "same logits" + ", kv_b in bf16" * (latent and r != "bf16")
    plain = experts == rest == "source"
    container = f"unquantized{loads.OTHERS}" if plain else f"mlx{loads.OTHERS}"
    loads.note(record, ENGINE, family, container, f"{e}, half of them" if halved else e, r, outcome)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_gives_our_logits(family: str, folders: Folders, tmp_path: Path, record_property: loads.Record) -> None:
    """Every kind of export of a family, in one process of mlx-lm."""
    source = folders.source(family)
    made = {kind: written(source, *how, folders.root / name_of(family, kind)) for kind, how in KINDS.items()}
    said = folders.said(*made.values())
    assert not {name: line["error"] for name, line in said.items() if "error" in line}
    for kind, path in made.items():
        experts, rest, halved = KINDS[kind]
        plain = experts == rest == "source"
        wanted = logits(whole(path, tmp_path / kind), TOKENS) if plain else ours(path)
        assert difference(folders.found(path), wanted) < TOLERANCE, kind
        note(record_property, family, experts, rest, halved)


@pytest.mark.parametrize(("family", "source", "experts"), VENDORS)
def test_mlx_gives_our_logits_of_what_a_vendor_rounded(
    family: str, source: str, experts: str, folders: Folders, record_property: loads.Record
) -> None:
    """Kimi's integers carried over as they are; FP8, which MLX has not, rounded to other formats."""
    path = written(folders.source(family, source), experts, "bf16", False, folders.root / f"{family}-of-{source}")
    said = folders.said(path)[path.name]
    assert "error" not in said, said
    assert difference(folders.found(path), ours(path)) < TOLERANCE
    of = f"{source}, as they are" if experts == "source" else f"{experts}, once {source}"
    note(record_property, family, of, "bf16")


@pytest.mark.parametrize(("family", "more"), WITH_MTP)
def test_mlx_leaves_the_layer_for_mtp_unread(
    family: str, more: dict[str, int], folders: Folders, record_property: loads.Record
) -> None:
    source = folders.source_with_mtp(family, more)
    path = written(source, "mxfp4", "affine8_g64", False, folders.root / f"{family}-with-mtp")
    assert Checkpoint.open(path).architecture.has_mtp
    said = folders.said(path)[path.name]
    assert "error" not in said, said
    assert difference(folders.found(path), ours(path)) < TOLERANCE
    note(record_property, family, "mxfp4, with MTP", "affine8_g64")


def test_mlx_is_known_to_want_mtp_behind_61_layers(folders: Folders) -> None:
    """Of DeepSeek-V3, as it is released: it drops layer 61, and of a model of 3 layers finds tensors too many."""
    path = written(
        folders.source_with_mtp("deepseek_v3", {}), "mxfp4", "bf16", False, folders.root / "deepseek_v3-short"
    )
    assert "model.layers.3." in folders.said(path)[path.name]["error"]


@pytest.mark.parametrize("format", ["affine4_g64", "mxfp8"])
def test_mlx_is_known_to_round_kv_b_again(format: str, folders: Folders, tmp_path: Path) -> None:
    """Why moesaic refuses to quantize it for MLX: affine codes are rounded along other rows, others are not read at all."""
    source = folders.source("kimi_k2")
    path = written(source, "mxfp4", "bf16", False, tmp_path / "out")
    config, tensors = json.loads((path / "config.json").read_text()), opened(path)
    packing, number = CONTAINERS["mlx"].packing(format), FORMATS[format]
    for linear in (n for n in source.architecture.linears if n.projection == "kv_b"):
        w_OI = source.decode(linear.name)
        scales = number.scales(w_OI)
        for key, tensor in packing.pack(number.encode(w_OI, scales), scales).items():
            tensors[f"{linear.name}.{packing.parts(linear.shape)[key].suffix}"] = tensor
        for key in CONTAINERS["mlx"].keys:
            config[key][linear.name] = described(format)
    save_file(tensors, path / "model.safetensors", {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    assert set(
        Checkpoint.open(path).formats[n.name] for n in source.architecture.linears if n.projection == "kv_b"
    ) == {format}
    said = folders.said(path)[path.name]
    assert "biases" in said["error"] if format == "mxfp8" else difference(folders.found(path), ours(path)) > TOLERANCE


def opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder, whose files are taken away."""
    tensors: dict[str, Tensor] = {}
    for file in [*path.glob("*.safetensors")]:
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


Config, Tensors = dict[str, Any], dict[str, Tensor]


def named(tensors: Tensors, end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def swap_experts(config: Config, tensors: Tensors) -> None:
    for part in ("weight", "scales"):
        name = named(tensors, f"switch_mlp.up_proj.{part}")
        tensors[name] = tensors[name].flip(0).contiguous()


def swap_gate_and_up(config: Config, tensors: Tensors) -> None:
    for part in ("weight", "scales"):
        gate, up = (named(tensors, f"switch_mlp.{projection}_proj.{part}") for projection in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def bend_a_scale(config: Config, tensors: Tensors) -> None:
    name = named(tensors, "self_attn.o_proj.scales")
    tensors[name] = tensors[name] * 1.1


def forget_an_offset(config: Config, tensors: Tensors) -> None:
    del tensors[named(tensors, "self_attn.q_proj.biases")]


def round_the_correction(config: Config, tensors: Tensors) -> None:
    """To BF16, whose steps are wider there than what tells experts apart."""
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name] = tensors[name].bfloat16()


def select_without_groups(config: Config, tensors: Tensors) -> None:
    config.update(n_group=1, topk_group=1)


def swap_keys_and_values(config: Config, tensors: Tensors) -> None:
    """A head's rows of kv_b_proj, the first half of which make keys."""
    for name in [name for name in tensors if name.endswith("kv_b_proj.weight")]:
        tensors[name] = tensors[name].unflatten(0, (-1, 2, 128)).flip(1).flatten(0, 2).contiguous()


def drop_the_prefix(config: Config, tensors: Tensors) -> None:
    name = named(tensors, "switch_mlp.down_proj.scales")
    tensors[name.removeprefix("language_model.")] = tensors.pop(name)


Fault = Callable[[Config, Tensors], None]
FAULTS: list[tuple[str, Fault]] = [
    ("qwen3_moe", swap_experts), ("olmoe", bend_a_scale), ("mixtral", swap_gate_and_up), ("glm4_moe", round_the_correction),
    ("glm4_moe", forget_an_offset), ("glm4_moe_lite", round_the_correction), ("deepseek_v3", select_without_groups),
    ("kimi_k2", swap_keys_and_values), ("kimi_k2", round_the_correction), ("kimi_k25", drop_the_prefix),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fault"), FAULTS)
def test_mlx_shows_planted_faults(
    family: str, fault: Fault, folders: Folders, tmp_path: Path, record_property: loads.Record
) -> None:
    """The check is one that can fail."""
    path = written(folders.source(family), "mxfp4", "affine8_g64", False, tmp_path / f"{family}-{fault.__name__}")
    wanted, config, tensors = ours(path), json.loads((path / "config.json").read_text()), opened(path)
    fault(config, tensors)
    save_file(tensors, path / "model.safetensors", {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    said = folders.said(path)[path.name]
    assert "error" in said or difference(folders.found(path), wanted) > 100 * TOLERANCE
    record_property(loads.FAULTS, f"{fault.__name__} in MLX ({family})")
