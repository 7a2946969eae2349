"""What fits where: published sizes and cache figures to the byte, seeds' models, vLLM's own count of a rank's weights."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moesaic.checkpoint import Checkpoint
from moesaic.errors import InputError, PlanError
from moesaic.fit import Footprint, Layout, Machine, Shapes, budget, explain, fit, table
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint

CONFIGS = Path(__file__).parent / "configs"
GIB = 2**30
SPARK, NVL = Machine.parse("2xDGX Spark"), Machine.parse("4xH100 NVL")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The released MiniMax models, as bare configs."""
    found = {}
    for config in CONFIGS.glob("m[23]*.json"):
        folder = tmp_path_factory.mktemp(config.stem)
        shutil.copy(config, folder / "config.json")
        found[config.stem] = Checkpoint.open(folder)
    return found


def planned(source: Checkpoint, kept: int | None = None, **formats: str) -> Blueprint:
    """`source` with the first `kept` experts, and formats by role: experts="mxfp4"."""
    a = source.architecture
    chosen = {unit: formats[m[0].role] for unit, m in a.units.items() if m[0].role in formats}
    container = "compressed_tensors" if formats else source.container.name
    return Blueprint.of(source, Plan(container, {n: tuple(range(kept)) for n in a.moe_layers} if kept else {}, chosen))


# Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "payload"),
    [
        ("m2.7", 96_103, 230_121_630_720),  # with F32 routers
        ("m3", 23_416, 854_172_958_720),
        ("m3_mxfp8", 45_838, 443_742_085_120),
    ],
)
def test_released_models_to_the_byte(released, name, tensors, payload):
    model = released[name]
    assert len(model.inventory) == tensors
    assert Shapes.of(model).disk.value == sum(t.bytes for t in model.inventory) == payload


def test_a_model_on_disk_weighs_what_its_files_hold(source):
    facts = fit(source, Machine.parse("24GB"))
    assert facts["disk_bytes"] == sum(s.info.bytes for s in source.stored.values())


def test_seed_000_half_the_experts_of_m3(released):
    """~444 GB to ~231 GB, in decimal GB, on four H100 NVL at 32,768 tokens."""
    half = planned(released["m3_mxfp8"], 64)
    by_hand = 443_742_085_120 - 57 * 64 * (3 * 3072 * 6144 * 33 // 32 + 6144 * 4 + 4)
    assert Shapes.of(half).disk.value == half.payload_bytes == by_hand == 230_636_300_032
    assert fit(half, NVL)["verdict"] == "fits"
    assert fit(released["m3_mxfp8"], NVL)["verdict"] == "does not fit"


def test_seed_003_experts_in_mxfp4(released):
    """118.7 GiB, which the card writes as 119 GB: the attention in BF16. 1.81 times less."""
    small = planned(released["m2.7"], experts="mxfp4", qkv="bf16", o="bf16")
    found = Shapes.of(small).disk.value
    assert found == small.payload_bytes
    assert round(found / GIB, 1) == 118.7
    assert round(230_121_630_720 / found, 2) == 1.81


def test_seed_001_kept_counts(released):
    """Prune ratios 0 to 0.375 of 256; the card's dropped "experts" are matrices, three each."""
    rows = {row["format"]: row for row in fit(released["m2.7"], Machine.parse("DGX Spark"), kv="fp8")["plans"]}
    kept = [cell["experts"] for cell in rows["nvfp4"]["kept"]]
    assert kept == [256, 224, 208, 192, 176, 160, 128]
    assert [62 * (256 - n) * 3 for n in (160, 176, 192)] == [17_856, 14_880, 11_904]
    assert [cell["fits"] for cell in rows["nvfp4"]["kept"]] == [False, False, False, True, True, True, True]


@pytest.mark.parametrize(("fused", "outputs"), [(10, 62), (30, 2)])
def test_seed_001_size(released, fused, outputs):
    """30,780 matrices in NVFP4 and 2,204 as in the source: four layers' experts, and 92 of attention. `du` says 90 GB."""
    source, kept = released["m2.7"], 176
    names = {f"layers.{n}.experts" for n in range(4)} | {f"layers.{n}.qkv" for n in range(fused)}
    names |= {f"layers.{n}.o" for n in range(outputs)}
    formats = {unit: "source" if unit in names else "nvfp4" for unit in source.architecture.units}
    small = Blueprint.of(source, Plan("compressed_tensors", {n: tuple(range(kept)) for n in range(62)}, formats))
    counts = [sum(f == format for f in small.formats.values()) for format in ("nvfp4", "fp8_block")]
    assert counts == [30_780, 2_204]
    found = Shapes.of(small).disk.value
    assert found == small.payload_bytes
    assert 95.72e9 < found < 96.01e9 and -(-found // GIB) == 90


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(["m2.7", "m3_mxfp8"]), kept=st.integers(8, 127),
    format=st.sampled_from(["source", "mxfp4", "nvfp4", "int4_g128", "int3_g128"]),
)  # fmt: skip
def test_shapes_count_as_a_plan_does(released, name, kept, format):
    """Pruned and rounded as shapes alone, or as a plan of 48,000 matrices."""
    source = released[name]
    blueprint = planned(source, kept, **({} if format == "source" else {"experts": format}))
    shapes = Shapes.of(source).pruned(kept)
    if format != "source":
        shapes = shapes.rounded(blueprint.container.packing(format))
    assert shapes.disk.value == blueprint.payload_bytes
    assert {k.format: k.count for k in shapes.kinds} == {k.format: k.count for k in Shapes.of(blueprint).kinds}


# A device's weights ----------------------------------------------------------------------------------------------

# Parameters of rank 0, as stock vLLM 0.32 creates them (tests/engines/test_vllm_fit.py counts them again).
BY_VLLM = [
    ("m2.7", True, 1, False, 457_477_079_040),
    ("m2.7", True, 4, False, 114_516_169_728),
    ("m2.7", True, 8, False, 57_356_018_176),
    ("m2.7", True, 8, True, 57_356_018_176),
    ("m2.7", True, 16, False, 28_824_709_120),
    ("m2.7", True, 48, False, 9_803_836_416),
    ("m2.7", False, 4, False, 57_677_308_144 - 62 * 8),  # less two cache scales a layer
    ("m2.7", False, 8, True, 28_936_587_632 - 62 * 8),
    # less the scales of three dense layers; and the patch embedding, F32 on disk, is BF16 in memory
    ("m3_mxfp8", False, 4, False, 111_107_749_912 - 3 * 8 + 1280 * 3 * 2 * 14 * 14 * 2),
    ("m3_mxfp8", False, 8, True, 55_740_970_008 - 3 * 8 + 1280 * 3 * 2 * 14 * 14 * 2),
]


@pytest.mark.parametrize(("name", "bf16", "devices", "deal", "counted"), BY_VLLM)
def test_a_rank_holds_what_vllm_creates(released, name, bf16, devices, deal, counted):
    model = planned(released[name], experts="bf16", qkv="bf16", o="bf16") if bf16 else released[name]
    shapes = Shapes.of(model)
    assert shapes.weight_bytes(Layout(devices, deal)) == counted
    assert counted * devices >= shapes.disk.value


def test_repeated_weights_are_told_apart(released):
    """Of M3 on eight devices: routers, norms, indexer keys and parts of the tower everywhere; heads of k and v twice."""
    shapes, layout = Shapes.of(released["m3_mxfp8"]), Layout(8)
    repeated = {(k.role, k.what) for k in shapes.kinds if k.repeated(layout)}
    assert repeated == {
        ("norm", ""), ("router", ""), ("router_bias", ""), ("vision", ""), ("qkv", "k, v, index_q"), ("qkv", "index_k"),
    }  # fmt: skip
    everywhere = sum(
        k.device_bytes(layout, 128) for k in shapes.kinds if k.repeated(layout) and k.what != "k, v, index_q"
    )
    twice = next(k for k in shapes.kinds if k.what == "k, v, index_q").device_bytes(layout, 128)
    assert shapes.repeated_bytes(layout) == everywhere + twice
    assert shapes.weight_bytes(layout) * 8 - shapes.disk.value == 7 * everywhere + 4 * twice


def test_an_uneven_deal_counts_the_fullest_device(released):
    shapes = Shapes.of(released["m2.7"]).pruned(100)
    one = sum(k.device_bytes(Layout(1), 1) for k in shapes.kinds if k.role == "experts")
    cut, dealt = (shapes.weight_bytes(Layout(8, deal)) for deal in (False, True))
    # thirteen whole experts, or an eighth of a hundred, whose blocks of 192 rows need two scales for one and a half
    assert dealt - 13 * one == cut - sum(k.device_bytes(Layout(8), 100) for k in shapes.kinds if k.role == "experts")


# The cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "kv", "token_bytes"),
    [
        ("m2.7", 1, "fp8", 126_976),
        ("m2.7", 1, "bf16", 253_952),  # vLLM's log in prismaquant: 6.07 GiB for 25,664 tokens
        ("m2.7", 2, "bf16", 126_976),
        ("m2.7", 4, "fp8", 31_744),
        ("m2.7", 16, "fp8", 15_872),  # eight heads, each on two devices
        ("m3", 1, "bf16", 137_472),
        ("m3", 1, "fp8", 76_032),
        ("m3", 2, "bf16", 76_032),
        ("m3", 4, "bf16", 45_312),
        ("m3", 8, "bf16", 45_312),
        ("m3", 8, "fp8", 29_952),
    ],
)
def test_cache_of_a_token(released, name, devices, kv, token_bytes):
    machine = Machine.parse(f"{devices}xB200")
    at = Footprint.of(Shapes.of(released[name]), machine, Layout(devices), kv)
    assert at.token.value == token_bytes


def test_published_caches(released):
    """hf-mem: 24,964,497,408 B of M2's FP8 cache at 196,608 tokens; a Spark's log: 23.25 GiB in BF16 on two devices."""
    one = Footprint.of(Shapes.of(released["m2.7"]), Machine.parse("H200"), Layout(1), "fp8")
    two = Footprint.of(Shapes.of(released["m2.7"]), SPARK, Layout(2), "bf16")
    for at, published in ((one, 24_964_497_408), (two, int(23.25 * GIB))):
        values = {line.name: line.value for line in at.lines(196_608, 1)}
        assert values["cache of a request"] == at.request_pages(196_608) * at.page_bytes == published


def test_page_of_m3(released):
    """5,799,936 B for 128 tokens on each of four devices: the indexer's keys are on all of them."""
    at = Footprint.of(Shapes.of(released["m3"]), NVL, Layout(4), "bf16")
    assert (at.page_tokens, at.page_bytes) == (128, 5_799_936)


def test_pages_of_a_published_start(released):
    """46,464 tokens in 3.29 GiB of each of two GPUs: 363 pages, of which one is never a request's."""
    at = Footprint.of(Shapes.of(released["m3"]), Machine.parse("2xRTX PRO 6000"), Layout(2), "bf16")
    rest = at.machine.requested_bytes - at.weight_bytes - 363 * at.page_bytes
    assert at.pages(rest) * at.page_tokens == 46_464
    assert round(363 * at.page_bytes / GIB, 2) == 3.29
    assert at.longest(rest) == 362 * 128
    assert at.longest(rest, concurrency=3) == 120 * 128
    assert at.longest(rest + 362 * at.page_bytes) == at.longest(10**15) == 0


def test_estimated_maximum_model_length(released):
    """A Spark's log: 22.5 GiB of cache, hence 190,272 tokens. (Before vLLM set a page aside.)"""
    at = Footprint.of(Shapes.of(released["m2.7"]), SPARK, Layout(2), "bf16")
    rest = at.machine.requested_bytes - at.weight_bytes - int(22.5 * GIB)
    assert at.longest(rest) == pytest.approx(190_272, rel=2e-4)


@pytest.mark.parametrize(
    ("device_gib", "devices", "deal", "tokens", "rounding"),
    [
        (191.7, 2, False, 497_600, 0),  # MI300X, github.com/vllm-project/recipes/pull/273
        (95.0, 4, False, 400_000, 50_000),  # "96G x4: 400K tokens", of vLLM's recipe for M2
        (139.8, 8, True, 3_000_000, 500_000),  # "144G x8: up to 3M tokens"
    ],
)
def test_public_starts_lie_in_the_band(released, device_gib, devices, deal, tokens, rounding):
    """BF16 caches of M2 at 0.9 of each device, those versions' default."""
    machine = Machine.parse(f"{devices}x{device_gib * 0.9 / 0.92}GiB")
    at = Footprint.of(Shapes.of(released["m2.7"]), machine, Layout(devices, deal), "bf16")
    low, high = (at.pages(reserved) * at.page_tokens for reserved in (at.reserve.high, at.reserve.low))
    assert low - rounding <= tokens <= high + rounding


# What an engine refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "devices", "layout", "reason"),
    [
        (None, 4, "TP 4", ""),
        (None, 8, "TP 8 + EP", "experts gate, up fp8_block: 1,536 rows over 8 are 192, no whole blocks of 128"),
        ("int4_g128", 8, "TP 8 + EP", "experts down int4_g128: 1,536 columns over 8 are 192, no whole blocks of 128"),
        ("mxfp4", 8, "TP 8", ""),
        ("nvfp4", 16, "TP 16", ""),
        ("mxfp4", 16, "TP 16", ""),
        ("mxfp4", 48, "TP 48", ""),
    ],
)
def test_layouts_of_m2(released, experts, devices, layout, reason):
    model = planned(released["m2.7"], experts=experts) if experts else released["m2.7"]
    facts = fit(model, Machine.parse(f"{devices}xH200"))
    assert facts["layout"]["name"] == layout
    assert [refused["layout"] for refused in facts["refused"]] == ([f"TP {devices}"] if reason else [])
    assert not reason or reason in facts["refused"][0]["reasons"]


@pytest.mark.parametrize(
    ("name", "devices", "reason", "alternative"),
    [
        ("m2.7", 3, "8 key/value heads and 3 devices", 2),
        ("m2.7", 5, "48 attention heads do not divide by 5", 4),
        ("m2.7", 32, "48 attention heads do not divide by 32", 24),
        ("m3", 6, "64 attention heads do not divide by 6", 4),
        ("m3", 128, "64 attention heads do not divide by 128", 64),
    ],
)
def test_a_count_that_no_layout_takes(released, name, devices, reason, alternative):
    with pytest.raises(PlanError, match=f"{reason}.*use {alternative} of them"):
        fit(released[name], Machine.parse(f"{devices}xB200"))


def test_more_devices_than_experts(released):
    few = Shapes.of(released["m2.7"]).pruned(8)
    assert few.refusals(Layout(16, deal=True)) == ["16 devices are more than 8 experts"]


# Budget, plans and what is shown ---------------------------------------------------------------------------------

SITUATIONS = [
    ("m2.7", "4xH100", None, "bf16", 1), ("m2.7", "8xRTX 5090", 8192, "fp8", 4), ("m2.7", "DGX Spark", None, "fp8", 1),
    ("m2.7", "2xDGX Spark", 196_608, "bf16", 1), ("m3_mxfp8", "2x95GiB", 40_960, "bf16", 1),
    ("m3_mxfp8", "4xH100 NVL", None, "fp8", 8), ("m3", "8xB200", 1_048_576, "fp8", 1),
    ("m2.7", "Mac Studio 256 GB", 65_536, "bf16", 1),
]  # fmt: skip


@pytest.fixture(scope="module", params=SITUATIONS, ids=lambda s: " ".join(map(str, s)))
def situation(request, released):
    """A question, and its facts."""
    name, devices, *more = request.param
    question = (released[name], Machine.parse(devices), *more)
    return question, fit(*question)


def test_the_budget_parts_plans_that_fit_from_those_that_do_not(situation):
    (model, machine, *more), facts = situation
    allowed = budget(machine, model, *more)
    assert allowed == facts["budget_bytes"]
    # the source's own router rows are counted, which a pruned model has fewer of; and a deal may be uneven
    slack = machine.count * facts["device"]["repeated_bytes"] + 2**30
    for row in facts["plans"]:
        for cell in row["kept"]:
            if abs(cell["bytes"] - allowed) > slack:
                assert cell["fits"] == (cell["bytes"] <= allowed), (row["format"], cell)
        fitting = [cell["experts"] for cell in row["kept"] if cell["fits"]]
        assert max(fitting, default=0) <= row["most_experts"]


@pytest.mark.parametrize(
    ("name", "devices", "format"),
    [("m2.7", "DGX Spark", "mxfp4"), ("m3_mxfp8", "2x95GiB", "source"), ("m3", "4xH100 NVL", "mxfp8")],
)
def test_the_most_experts_are_the_most(released, name, devices, format):
    """The plan itself fits, and with one expert more it does not."""
    source, machine = released[name], Machine.parse(devices)
    row = next(row for row in fit(source, machine)["plans"] if row["format"] == format)
    most = row["most_experts"]
    plans = [planned(source, kept, **({} if format == "source" else {"experts": format})) for kept in (most, most + 1)]
    assert [fit(plan, machine)["verdict"] == "does not fit" for plan in plans] == [False, True]
    assert plans[0].payload_bytes == row["most_bytes"]


def test_no_room_for_weights(released):
    with pytest.raises(InputError, match="no room for weights beside 64 × 204,800 tokens of bf16 cache"):
        budget(Machine.parse("2x24GB"), released["m2.7"], 204_800, "bf16", 64)


@pytest.mark.parametrize("wrong", [{"context": 0}, {"context": 204_801}, {"concurrency": 0}, {"kv": "int4"}])
def test_wrong_questions(released, wrong):
    with pytest.raises(InputError):
        fit(released["m2.7"], NVL, **wrong)


def computed(formula: str) -> float:
    """A formula's value: what is left of it without words, units and separators is arithmetic."""
    return eval(re.sub(r"[A-Za-z,]", "", formula).replace("×", "*"))


def test_every_formula_gives_its_number(situation):
    _, facts = situation
    bounds = [line for bound in facts["recommendation"].get("speed", []) for line in bound["lines"]]
    for line in [*facts["explain"], *bounds]:
        assert int(computed(line["formula"])) == line["value"], line
    values = {line["name"]: line["value"] for line in facts["explain"]}
    assert values["on disk"] == facts["disk_bytes"]
    assert values["Model loading took"] == facts["device"]["weight_bytes"]
    assert values["cache of a token"] == facts["cache"]["token_bytes"]
    assert values["KV cache memory"] == facts["cache"]["bytes"]["typical"]
    assert len(explain(facts).splitlines()) == len(facts["explain"]) + len(bounds) + 2  # the rule, and its evidence


def test_a_formula_with_another_operand_is_seen():
    assert computed("62 layers × 2 × 4 heads × 128 × 1 B") == 63_488 != computed("62 layers × 2 × 8 heads × 128 × 1 B")


def test_facts_are_json_and_shown_in_vllms_words(situation):
    _, facts = situation
    assert json.loads(json.dumps(facts)) == facts
    shown = io.StringIO()
    Console(width=200, file=shown).print(table(facts))
    for words in (
        "Model loading took",
        "Available KV cache memory",
        "KV cache size",
        "Maximum concurrency for",
        "maximum model length",
    ):
        assert words in shown.getvalue()
    assert f"{facts['disk_bytes'] / 1e9:,.2f} GB" in shown.getvalue() and facts["verdict"] in shown.getvalue()


def test_the_verdict_follows_the_band(released):
    """More context, and what surely fits becomes tight and then too much; never the other way."""
    machine, order = Machine.parse("4xA100"), ["fits", "tight", "does not fit"]
    said = [fit(released["m2.7"], machine, n, "bf16", 2)["verdict"] for n in range(8192, 204_800, 24_576)]
    assert said == sorted(said, key=order.index) and set(said) == set(order)


def test_nothing_is_read_but_headers(m2, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    fit(m2, Machine.parse("8GB"))
