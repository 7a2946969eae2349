"""The bound of tokens a second, worked by hand: the builds of two seeds, links, experts of many tokens, selected pages."""

import shutil
from collections.abc import Callable

import pytest
import tiny

from moesaic.checkpoint import Checkpoint
from moesaic.fit import CARDS, Footprint, Layout, Machine, Shapes
from moesaic.fit.speed import experts_read, speed, speeds, sums_sent
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint

HIDDEN, INNER = 3072, 1536  # of M2.7
EXPERT = 3 * 3072 * 6144  # weights of one of M3's experts


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A released model, as a bare config."""

    def opened(name: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(tiny.CONFIGS / f"{name}.json", folder / "config.json")
        return Checkpoint.open(folder)

    return opened


def planned(source: Checkpoint, container: str, kept: int, format: Callable[[str, int], str]) -> Shapes:
    """`format` names that of a role in a layer."""
    a = source.architecture
    formats = {unit: format(m[0].role, m[0].layer) for unit, m in a.units.items()}
    dropped = {n: tuple(range(kept)) for n in a.moe_layers} if kept < a.experts else {}
    return Shapes.of(Blueprint.of(source, Plan(container, dropped, formats)))


def test_seed_001_on_a_spark(released):
    """176 experts of M2.7, 30,780 matrices in NVFP4 and 2,204 in FP8: its card says ~14 tokens a second."""

    def format(role: str, layer: int) -> str:
        fp8 = {"experts": layer < 4, "qkv": layer < 10, "o": True}[role]
        return "source" if fp8 else "nvfp4"

    def nvfp4(weights: int) -> int:
        return weights // 2 + weights // 16 + 4

    def fp8(weights: int) -> int:
        return weights + weights // 128 // 128 * 4

    shapes = planned(released("m2.7"), "compressed_tensors", 176, format)
    at = Footprint.of(shapes, Machine.parse("DGX Spark"), Layout(1), "fp8")
    experts = 8 * 3 * (58 * nvfp4(INNER * HIDDEN) + 4 * fp8(INNER * HIDDEN))
    q, kv = 6144 * HIDDEN, 1024 * HIDDEN
    attention = 10 * (fp8(q) + 2 * fp8(kv)) + 52 * (nvfp4(q) + 2 * nvfp4(kv)) + 62 * fp8(q)
    norms, routers = (125 * HIDDEN + 62 * (6144 + 1024)) * 2, 62 * 176 * (HIDDEN + 1) * 4
    weights = experts + attention + norms + routers + 200_064 * HIDDEN * 2
    cache = 32_768 * 62 * 2 * 8 * 128
    for context, by_hand, rounded in ((32_768, weights + cache, 23.1), (1, weights + cache // 32_768, 35.6)):
        found = speed(at, context, 1)
        assert found.weight_bytes + found.cache_bytes == by_hand
        assert found.tokens_second == pytest.approx(273e9 / by_hand, rel=1e-4) == pytest.approx(rounded, abs=0.05)
        assert found.tokens_second > 14


def test_seed_004_on_two_rtx_pro_6000(released):
    """M3 in 2, 3, 4 and 8 bits, some 176 GiB, experts dealt out, eager: its card says ~13 tokens a second.

    Which matrix has which bits it does not say. Here 6 layers' experts have 4 and the others 3, which gives its size.
    """

    def format(role: str, layer: int) -> str:
        if role == "experts":
            return "int4_g128" if layer < 9 else "int3_g128"
        return "bf16" if role == "qkv" else "int8_g128"

    def integers(bits: int, weights: int) -> int:
        """Codes, and of each 128 an F16 scale and an offset of as many bits."""
        return (weights * bits + weights // 128 * (16 + bits)) // 8

    shapes = planned(released("m3"), "auto_round", 128, format)
    assert round(shapes.disk.value / 2**30, 1) == 176.2
    at = Footprint.of(shapes, Machine.parse("2xRTX PRO 6000@0.97"), Layout(2, deal=True), "bf16")
    experts = 2 * (6 * integers(4, EXPERT) + 51 * integers(3, EXPERT))  # two of a token's four on each device
    qkv = (60 * (8192 + 2 * 512) + 57 * 512) * 6144 * 2
    rest = 60 * integers(8, 6144 * 8192) + 57 * integers(8, EXPERT) + 3 * integers(8, 3 * 12_288 * 6144)
    whole = 57 * 128 * 6144 * 2 + (121 * 6144 + 234 * 128) * 2 + 57 * 128 * (6144 + 1) * 4
    weights = experts + (qkv + rest + 200_064 * 6144 * 2) // 2 + whole
    page = 2 * 2 * 128 * 2  # two heads of a layer, keys and values, BF16
    cache = 30_000 * (3 * page + 57 * 128 * 2) + 16 * 128 * 57 * page  # all of three layers, 16 blocks of the others
    found = speed(at, 30_000, 1)
    assert (found.weight_bytes, found.cache_bytes) == (weights, cache)
    seconds = (weights + cache) / 1792e9 + 2 * 60 * 6144 * 2 / 64e9
    assert found.tokens_second == pytest.approx(1 / seconds, rel=2e-4) == pytest.approx(150, abs=0.5)


def test_many_tokens_read_more_experts_and_never_more_than_all(released):
    at = Footprint.of(Shapes.of(released("m2.7")), Machine.parse("8xH200"), Layout(8, deal=True))
    assert [experts_read(at, n).value for n in (1, 2, 64, 10_000)] == [8, 15, 222, 256]
    assert int(256 * (1 - (31 / 32) ** 64)) == 222
    one, many = speed(at, 1000, 1), speed(at, 1000, 64)
    assert many.tokens_second > one.tokens_second > many.tokens_second / 64
    # of eight experts dealt over eight devices one falls on each at best; of 222 the fullest has 28
    expert = 62 * 3 * (INNER * HIDDEN + INNER * HIDDEN // 128 // 128 * 4)
    assert many.weight_bytes - one.weight_bytes == 27 * expert


@pytest.mark.parametrize(
    ("devices", "link"),
    [
        ("H100 NVL", 64e9),
        ("2xH100 NVL", 300e9),
        ("4xH100 NVL", 64e9),
        ("8xH100", 450e9),
        ("16xH100", 50e9),
        ("2xDGX Spark", 25e9),
    ],
)
def test_links(released, devices, link):
    """A bridge joins two; beyond one machine the network is what counts."""
    machine = Machine.parse(devices)
    assert machine.link == link
    at = Footprint.of(Shapes.of(released("m2.7")), machine, Layout(machine.count))
    sent = sums_sent(at, 3).value
    assert sent == (0 if machine.count == 1 else 2 * 62 * 3 * HIDDEN * 2)
    found = speed(at, 5, 3)
    seconds = (found.weight_bytes + 3 * found.cache_bytes) / machine.card.bandwidth + sent / link
    assert found.tokens_second == pytest.approx(3 / seconds, rel=1e-3)


def test_a_short_context_is_read_whole(released):
    """Of M3's cache: up to 16 blocks of 128 tokens there is nothing to select."""
    at = Footprint.of(Shapes.of(released("m3")), Machine.parse("8xB200"), Layout(8))
    short, long = speed(at, 2048, 1).cache_bytes, speed(at, 2049, 1).cache_bytes
    assert short == 2048 * at.token.value
    assert long - short == at.token.value - 57 * 2 * 128 * 2


def test_how_many_at_once(released):
    """Those asked for, or as many as have room, up to what an engine runs."""
    at = Footprint.of(Shapes.of(released("m2.7")), Machine.parse("8xH200"), Layout(8, deal=True))
    assert [s.requests for s in speeds(at, 32_768, 1)] == [1, at.requests(32_768)]
    assert [s.requests for s in speeds(at, 64, 1)] == [1, 256]
    assert [s.requests for s in speeds(at, 64, 300)] == [1, 300]
    assert at.requests(32_768) == at.longest(at.reserve.typical, at.requests(32_768)) // 32_768 * at.requests(32_768)


def test_every_card_states_its_bandwidth_and_a_size_has_none(released):
    assert all(card.bandwidth > 100e9 and card.network for card in CARDS)
    assert all(card.link or card.per_node == 1 for card in CARDS)
    at = Footprint.of(Shapes.of(released("m2.7")), Machine.parse("4x95GiB"), Layout(4))
    assert speeds(at, 1000, 1) == []


def test_a_model_of_a_test_is_not_divided_by(m2):
    """Its step takes no whole microsecond."""
    at = Footprint.of(Shapes.of(m2), Machine.parse("H200"), Layout(1))
    (found, *_) = speeds(at, 64, 1)
    assert found.tokens_second == 1_000_000
