"""The plans that `fit` compares: in a container that the machine's engine loads, and with counts that a layer can keep."""

import shutil
from collections.abc import Callable

import pytest
import tiny

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.fit import Machine, Shapes, fit
from moesaic.fit.plans import READ, WRITTEN, options
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A released model, as a bare config."""

    def opened(name: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(tiny.CONFIGS / f"{name}.json", folder / "config.json")
        return Checkpoint.open(folder)

    return opened


def test_every_container_is_read_by_an_engine():
    assert {name for names in READ.values() for name in names} == CONTAINERS.keys()
    assert all(WRITTEN[engine] in READ[engine] for engine in READ)


@pytest.mark.parametrize(("name", "rest"), [("m2.7", "bf16"), ("m3_mxfp8", "source"), ("mixtral", "source")])
def test_plans_for_a_mac_are_mlx(released, name, rest):
    """FP8 blocks have no place in MLX: all but experts is BF16 then. A plan's bytes are those of its blueprint."""
    source = released(name)
    found = options(Shapes.of(source), Machine.parse("Mac Studio 512 GB"))
    as_it_is = ["source"] if source.container.name == "unquantized" else []
    assert list(found) == [*as_it_is, "mxfp8", "nvfp4", "affine4_g64", "mxfp4", "affine3_g64", "affine2_g64"]
    for format in ("mxfp4", "affine3_g64"):
        chosen = {u: format if m[0].role == "experts" else rest for u, m in source.architecture.units.items()}
        assert found[format].disk.value == Blueprint.of(source, Plan("mlx", {}, chosen)).payload_bytes


def test_plans_for_vllm_leave_the_rest_as_it_is(released):
    found = options(Shapes.of(released("m2.7")), Machine.parse("H200"))
    assert list(found) == ["source", "nvfp4", "mxfp4", "int4_g128", "int3_g128", "int2_g128"]


def test_grouped_experts_are_kept_in_counts_that_can_be(released):
    """DeepSeek-V3 selects among 8 groups of 32, and each keeps as many."""
    source = released("deepseek_v3")
    facts = fit(source, Machine.parse("4xH100 NVL"), kv="fp8")
    counts = {cell["experts"] for row in facts["plans"] for cell in row["kept"]}
    most = {row["most_experts"] for row in facts["plans"]}
    assert counts == {256, 224, 208, 192, 176, 160, 128}
    assert all(n % 8 == 0 for n in counts | most) and (counts | most) - {0} <= set(source.architecture.counts)
    assert len(most) > 1, "some plan has to be cut, or this shows nothing"
