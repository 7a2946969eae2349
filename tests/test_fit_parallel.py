"""Layouts as an input of planning: what an engine would refuse at load is refused here, with what would load instead."""

import json
from pathlib import Path

import pytest
import tiny

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.cli import main
from moesaic.errors import PlanError
from moesaic.fit import Layout, check_layout, layout_of, servable
from moesaic.measure import offers
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Configs of the released models with their widths, and few layers and experts."""
    found = {}
    for name in ("m2.7", "m3_mxfp8"):
        folder, config = tmp_path_factory.mktemp(name), json.loads((tiny.CONFIGS / f"{name}.json").read_text())
        text = config.get("text_config", config)
        text |= {"num_local_experts": 16, "num_hidden_layers": 2}
        if text is config:
            text["attn_type_list"] = [1, 1]
        else:
            sparse = text["sparse_attention_config"]
            text["moe_layer_freq"] = sparse["sparse_attention_freq"] = sparse["sparse_disable_index_value"] = [0, 1]
        (folder / "config.json").write_text(json.dumps(config))
        found[name] = Checkpoint.open(folder)
    return found


def planned(source: Checkpoint, container: str, experts: str, rest: str) -> Blueprint:
    units = source.architecture.units.items()
    return Blueprint.of(source, Plan(container, {}, {u: experts if m[0].role == "experts" else rest for u, m in units}))


# M2.7: an expert's 1,536 over 8 are 192. container, experts, rest, layout, what is said (nothing: it loads)
SAID = [
    ("compressed_tensors", "int4_g128", "bf16", Layout(8),
     r"layers\.0\.experts .* TP 8 \(.*1,536 columns over 8 are 192, no whole blocks of 128\); "
     r"write layers\.0\.experts in int4_g64 or serve as TP 8 \+ EP or use 4 devices"),
    ("compressed_tensors", "int4_g64", "bf16", Layout(8), ""),
    ("compressed_tensors", "int4_g128", "bf16", Layout(8, deal=True), ""),
    ("compressed_tensors", "int4_g128", "bf16", Layout(4), ""),
    ("compressed_tensors", "source", "source", Layout(8), r"experts in fp8_channel or serve as TP 8 \+ EP"),
    ("compressed_tensors", "nvfp4", "source", Layout(8), ""),
    ("auto_round", "int3_g128", "bf16", Layout(8), r"in int3_g64"),
    ("gptq", "int8_g128", "bf16", Layout(8), r"in int8_g64"),
    ("mlx", "affine4_g128", "bf16", Layout(8), r"1,536 columns over 8.*in affine4_g64 or use 4 devices$"),
    ("mlx", "affine4_g64", "bf16", Layout(8), ""),
    ("mlx", "affine4_g64", "bf16", Layout(8, deal=True), "deal out no whole experts"),
    ("compressed_tensors", "mxfp4", "bf16", Layout(5), r"48 attention heads do not divide by 5.*use 4 devices"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "experts", "rest", "layout", "said"), SAID)
def test_what_would_not_load_is_refused_with_what_would(
    container: str, experts: str, rest: str, layout: Layout, said: str, released: dict[str, Checkpoint]
) -> None:
    blueprint = planned(released["m2.7"], container, experts, rest)
    if not said:
        check_layout(blueprint, layout)
        return
    with pytest.raises(PlanError, match=said):
        check_layout(blueprint, layout)


def test_the_alternative_named_is_one(released: dict[str, Checkpoint]) -> None:
    m2 = released["m2.7"]
    for container, bad, good in (
        ("compressed_tensors", "int4_g128", "int4_g64"),
        ("mlx", "affine2_g128", "affine2_g64"),
    ):
        with pytest.raises(PlanError, match=rf"in {good} or"):
            check_layout(planned(m2, container, bad, "bf16"), Layout(8))
        check_layout(planned(m2, container, good, "bf16"), Layout(8))


def test_a_budget_is_not_offered_what_would_not_load(released: dict[str, Checkpoint]) -> None:
    m2, container = released["m2.7"], CONTAINERS["compressed_tensors"]
    offered = offers(m2, container, ("source", "mxfp4", "int4_g128", "int4_g64"))
    found = servable(m2, container, offered, Layout(8))
    assert found["layers.1.experts"] == ("mxfp4", "int4_g64")  # the source's squares of 128 do not divide either
    assert found["layers.1.o"] == offered["layers.1.o"]
    assert servable(m2, container, offered, Layout(8, deal=True)) == offered
    assert servable(m2, container, offered, Layout(4)) == offered
    with pytest.raises(PlanError, match=r"layers\.0\.experts would be refused at load under TP 8 in all of int4_g128"):
        servable(m2, container, offers(m2, container, ("int4_g128",)), Layout(8))
    m3 = released["m3_mxfp8"]
    offered = offers(m3, container, ("source", "int4_g128"))
    assert servable(m3, container, offered, Layout(8))["layers.1.experts"] == (
        "source",
        "int4_g128",
    )  # 3,072 / 8 = 384


def test_words_of_the_command_line(
    released: dict[str, Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = released["m2.7"].path, tmp_path / "out"
    words = [
        "quantize",
        str(model),
        str(out),
        "--format",
        "int4_g128",
        "--rest",
        "bf16",
        "--tensor-parallel",
        "8",
        "--quiet",
    ]
    assert main(words) == 2
    assert "write layers.0.experts in int4_g64" in capsys.readouterr().err and not out.exists()
    words = [
        "compress",
        str(model),
        str(out),
        "--format",
        "int4_g128",
        "--rest",
        "bf16",
        "--tensor-parallel",
        "8",
        "--quiet",
    ]
    assert main(words) == 2
    assert "write layers.0.experts in int4_g64" in capsys.readouterr().err and not out.exists()
    assert layout_of(None) is None and layout_of(8, True) == Layout(8, deal=True)
    with pytest.raises(PlanError, match="needs --tensor-parallel"):
        layout_of(None, True)
    with pytest.raises(PlanError, match="wanted a number of devices"):
        layout_of(0)


def test_a_model_is_exported_for_its_devices(
    m3: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(m3.path), str(tmp_path / "out"), "--to", "mlx", "--quiet", "--tensor-parallel"]
    assert main([*words, "8"]) == 2
    assert (
        "4 attention heads do not divide by 8); use 4 devices" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )
    assert main([*words, "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["container"] == "mlx"
