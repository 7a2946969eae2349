"""What `fit` recommends: the rule, plan by plan; that the plan holds on the machine; and that its command is one that runs."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from moesaic.checkpoint import Checkpoint
from moesaic.cli import main, parser
from moesaic.cli.base.search import recipe
from moesaic.cli.compress import Compress
from moesaic.fit import Layout, Machine, Shapes, answer, check_layout, explain, fit
from moesaic.fit.recommend import EVIDENCE, RULE, recommend
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.recipes.compress import as_told, check, check_goal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A released model, as a bare config."""

    def made(name: str) -> Path:
        found = tmp_path_factory.mktemp("models") / name
        found.mkdir()
        shutil.copy(tiny.CONFIGS / f"{name}.json", found / "config.json")
        return found

    return made


# model, devices, context, cache, at once -> format, experts, layout, what is said
SAID = [
    ("m2.7", "8xH200", None, "fp8", 1, "source", 256, "TP 8 + EP", "It fits unchanged: 230.12 GB"),
    ("m2.7", "4xH100 NVL", None, "fp8", 1, "source", 256, "TP 4", "It fits unchanged"),
    ("m2.7", "2xH100 NVL", None, "fp8", 1, "nvfp4", 256, "TP 2", "all 256 experts in nvfp4, 131.77 GB"),
    ("m2.7", "DGX Spark", None, "fp8", 1, "int3_g128", 256, "TP 1", "all 256 experts in int3_g128, 93.15 GB"),
    ("m3_mxfp8", "2xRTX PRO 6000", 40_960, "bf16", 1, "int3_g128", 123, "TP 2", "123 of 128 experts in int3_g128"),
    ("m3", "4xH100 NVL", None, "fp8", 8, "nvfp4", 128, "TP 4", "all 128 experts in nvfp4"),
    ("mixtral", "RTX 5090", 2048, "bf16", 1, "int4_g128", 8, "TP 1", "all 8 experts in int4_g128"),
    ("mixtral", "RTX 5090", 8192, "bf16", 1, "int3_g128", 8, "TP 1", "all 8 experts in int3_g128"),
    ("mixtral", "H200", None, "bf16", 1, "source", 8, "TP 1", "It fits unchanged"),
    ("mixtral", "Mac Studio 256 GB", None, "bf16", 1, "source", 8, "TP 1", "mlx_lm.server serves it there"),
    ("m2.7", "Mac Studio 512 GB", None, "bf16", 1, "mxfp8", 256, "TP 1", "MLX does not load it as it is"),
    ("m3_mxfp8", "Mac Studio 256 GB", None, "bf16", 1, "affine3_g64", 128, "TP 1", "experts in affine3_g64"),
    ("kimi_k2", "4xH200", None, "fp8", 1, "int3_g128", 384, "TP 4", "all 384 experts in int3_g128"),
    ("deepseek_v3", "2xB200", None, "fp8", 1, "int3_g128", 256, "TP 2", "all 256 experts in int3_g128"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "devices", "context", "kv", "at_once", "format", "experts", "layout", "said"), SAID)
def test_the_rule(folder, name, devices, context, kv, at_once, format, experts, layout, said):
    facts = fit(Checkpoint.open(folder(name)), Machine.parse(devices), context, kv, at_once)
    plan = facts["recommendation"]
    assert (plan["format"], plan["experts"], plan["layout"]["name"]) == (format, experts, layout)
    assert said in answer(facts)
    assert plan["unchanged"] == (format == "source")


@pytest.mark.parametrize("devices", [f"{gb}GB" for gb in (45, 60, 75, 85, 95, 105, 130, 150, 240, 270)])
def test_bits_go_before_experts(folder, devices):
    """The plan is the first that fits of: as it is; all experts, by falling bits down to 3; then fewer experts in 3 bits."""
    source, machine = Checkpoint.open(folder("m2.7")), Machine.parse(devices)
    facts = fit(source, machine, kv="fp8")
    rows = {row["format"]: row for row in facts["plans"]}
    whole = [f for f in ("source", "nvfp4", "mxfp4", "int4_g128", "int3_g128") if rows[f]["most_experts"] == 256]
    plan = facts["recommendation"]
    if whole:
        assert (plan["format"], plan["experts"]) == (whole[0], 256)
    elif (most := rows["int3_g128"]["most_experts"]) >= 128:
        assert (plan["format"], plan["experts"], plan["bytes"]) == ("int3_g128", most, rows["int3_g128"]["most_bytes"])
    else:
        assert plan["format"] is None


def test_every_branch_of_the_rule_was_met(folder):
    source, found = Checkpoint.open(folder("m2.7")), []
    for gb in (45, 75, 115, 142, 150, 160, 270):
        plan = fit(source, Machine.parse(f"{gb}GB"), kv="fp8")["recommendation"]
        found.append((plan["format"], plan.get("experts")))
    assert found[0] == (None, None) and found[1][0] == "int3_g128" and 128 < found[1][1] < 200
    assert found[2:] == [(f, 256) for f in ("int3_g128", "int4_g128", "mxfp4", "nvfp4", "source")]


def test_nothing_is_recommended_where_half_in_three_bits_does_not_fit(folder):
    """And it says how many devices would do: the fewest."""
    source, machine = Checkpoint.open(folder("m2.7")), Machine.parse("2xRTX 4090")
    facts = fit(source, machine)
    plan, said = facts["recommendation"], answer(facts)
    assert plan["format"] is None and f"{plan['devices']} such devices would do" in said and RULE in said
    shapes = Shapes.of(source)
    found = {n for n in range(3, 9) if shapes.layout(n) and recommend(shapes, replace(machine, count=n), 32_768)}
    assert plan["devices"] == min(found) == 4
    assert fit(source, Machine.parse("100MB"))["recommendation"]["devices"] == 0


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("m2.7", "DGX Spark"), ("m2.7", "85GB"), ("m3_mxfp8", "2xRTX PRO 6000"), ("mixtral", "RTX 5090"), ("m3", "8xH100"),
        ("m2.7", "Mac Studio 192 GB"), ("deepseek_v3", "4xRTX PRO 6000"), ("olmoe", "12GB"),
        ("glm4_7", "2xH100"), ("qwen3_235b_a22b", "2xL40S"),
    ],
)  # fmt: skip
def test_the_command_makes_the_plan_and_the_plan_holds(folder, name, devices, capsys, tmp_path, monkeypatch):
    """Parsed by our own parser, it passes what `compress` checks before it reads a tensor, and its blueprint has the bytes
    that were told and fits."""
    monkeypatch.chdir(tmp_path)
    model = folder(name)
    assert main(["fit", str(model), "--devices", devices, "--kv", "fp8", "--context", "4096", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["recommendation"]
    source = Checkpoint.open(model)
    for command in (plan["command"], plan["search"]):
        a = parsed(command)
        asked = replace(recipe(a), format=a.format, rest=a.rest)
        check(source, asked)
        check_goal(source, asked)
        assert a.model == model and not a.run.exists()
    assert asked.limit and asked.offer.units(source)
    a = parsed(plan["command"])
    asked = replace(recipe(a), format=a.format, rest=a.rest)
    assert (a.format, a.experts or source.architecture.experts) == (plan["format"], plan["experts"])
    made = as_told(source, asked, None)
    kept = {n: tuple(range(a.experts)) for n in source.architecture.moe_layers} if a.experts else {}
    blueprint = Blueprint.of(source, Plan(made.container, kept, made.formats, drop_mtp=made.drop_mtp))
    assert blueprint.payload_bytes == plan["bytes"]
    layout = Layout(plan["layout"]["devices"], plan["layout"]["expert_parallel"])
    check_layout(blueprint, layout)
    assert asked.offer.layout == (layout if layout.devices > 1 else None)
    again = fit(blueprint, Machine.parse(devices), 4096, "fp8")
    assert again["verdict"] == ("tight" if plan["tight"] else "fits")
    assert again["cache"]["longest_context"]["typical"] == plan["longest_context"]
    assert again["recommendation"]["unchanged"] and again["recommendation"]["speed"] == plan["speed"]


def parsed(command: str) -> Compress:
    found = vars(parser().parse_args(shlex.split(command)[1:]))
    assert found.pop("command") == "compress"
    return Compress(**found, line=command)


def test_the_command_for_what_fits_runs(m2, capsys):
    assert main(["fit", str(m2.path), "--devices", "24GB", "--context", "64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["recommendation"]
    assert plan["unchanged"] and plan["search"] == ""
    assert main(shlex.split(plan["command"])[1:]) == 0
    assert f"vllm serve {m2.path}" in capsys.readouterr().out


def test_on_a_mac_what_fits_is_served_here(folder, capsys):
    assert main(["fit", str(folder("mixtral")), "--devices", "Mac Studio 256 GB", "--json"]) == 0
    a = parser().parse_args(shlex.split(json.loads(capsys.readouterr().out)["recommendation"]["command"])[1:])
    assert (a.command, a.engine, a.context) == ("serve", "local", 32_768)


@pytest.mark.long
def test_the_command_for_what_does_not_fit_runs(m3, capsys, tmp_path, monkeypatch):
    """On a machine just too small for the model: what the command writes is as large as was told, and fits unchanged."""
    monkeypatch.chdir(tmp_path)
    shapes = Shapes.of(m3)
    room = fit(m3, Machine.parse("8GB"), 64)
    needed = room["device"]["reserve_bytes"]["typical"] + shapes.rounded(m3.container.packing("mxfp8")).disk.value
    device = f"{(needed - 50_000) / 0.92 / 1e9:.6f}GB"
    words = ["--devices", device, "--context", "64"]
    assert main(["fit", str(m3.path), *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["recommendation"]
    assert not plan["unchanged"] and plan["format"] == "nvfp4"
    cheap = ["--tokens", "256", "--length", "64", "--evaluation-tokens", "128", "--quiet"]
    assert main([*shlex.split(plan["command"])[1:], *cheap]) == 0
    made = Checkpoint.open(parsed(plan["command"]).run / "model")
    assert sum(tensor.bytes for tensor in made.inventory) == plan["bytes"]
    assert main(["fit", str(made.path), *words]) == 0
    assert "It fits unchanged" in capsys.readouterr().out


def test_the_rule_and_its_evidence_are_told(folder):
    facts = fit(Checkpoint.open(folder("m2.7")), Machine.parse("DGX Spark"), kv="fp8")
    assert "evidence from two small models" in answer(facts)
    told = explain(facts).splitlines()
    assert told[-2:] == [f"rule: {RULE}", f"evidence: {EVIDENCE}"]
    bounds = [line for line in told if line.startswith("tokens a second, at most, ")]
    assert len(bounds) == len(facts["recommendation"]["speed"]) == 2
    assert f"at most: {facts['recommendation']['speed'][0]['tokens_second']:.1f} for one request" in answer(facts)
    assert "name the device for a bound" in answer(fit(Checkpoint.open(folder("m2.7")), Machine.parse("128GB")))


def test_the_evidence_is_what_the_log_says():
    """Each figure stands in the tables of docs/LOG.md, with more digits."""
    log = (Path(__file__).parents[1] / "docs" / "LOG.md").read_text()
    for told, measured in {
        ".0016": "nvfp4 | .00158", ".0043": "mxfp4 | .00431", ".0058": "int3_g64 | .00578", ".0061": "int3_g64 | .00610",
        ".027": "int2_g64 | .0265", ".036": "int2_g64 | .0359", ".053": "reap | .0530", ".044": "reap | .0444",
        ".18": ".182 ± .015", ".15": ".150 ± .012",
    }.items():  # fmt: skip
        assert told in EVIDENCE and measured in log, told


def test_the_document_names_every_fact(folder):
    """docs/FIT.md has a row for each key of --json's recommendation, and for no other."""
    document = (Path(__file__).parents[1] / "docs" / "FIT.md").read_text()
    rows = [line.split("|")[1] for line in document.splitlines() if line.startswith("| `")]
    plans = [fit(Checkpoint.open(folder("m2.7")), Machine.parse(d))["recommendation"] for d in ("DGX Spark", "24GB")]
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == plans[0].keys() | {"command", "search"}
    assert plans[1].keys() == {"format", "devices", "rule", "evidence"}
