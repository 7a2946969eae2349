"""Versions of arithmetic: what another version made is named, held as far as it can be, and never continued or reused.

And what else an identity must not leave out: each test changes one argument that changes the result. Leaves out what
each stage makes.
"""

import dataclasses
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from children import child, dying
from test_sequential import a_plan, some_tokens

import moesaic.export.sequential.layer as work_module
from moesaic.artifact import read_json
from moesaic.calibrate import Statistics, calibrate
from moesaic.checkpoint import Checkpoint
from moesaic.errors import StaleError
from moesaic.export import export
from moesaic.export.repair import repair
from moesaic.export.sequential import round_on_text
from moesaic.formats import FORMATS
from moesaic.measure import Options, Trial, price, trace
from moesaic.measure import prices as prices_module
from moesaic.measure.divergence import Contender, Rows, lockstep
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.plan.pieces import NOTE
from moesaic.rounding import ROUNDINGS
from moesaic.stream import LayerRun, Sweep
from moesaic.verify import verify


def newer(monkeypatch: pytest.MonkeyPatch, registry: dict, name: str) -> None:
    monkeypatch.setitem(registry, name, dataclasses.replace(registry[name], version=registry[name].version + 1))


def two_formats(source: Checkpoint, rounding: str = "search") -> Plan:
    """Experts in int4_g32, attention in int8_g32, o in its own."""
    units = {
        u: {"experts": "int4_g32", "qkv": "int8_g32"}.get(m[0].role, "source")
        for u, m in source.architecture.units.items()
    }
    return Plan("compressed_tensors", formats=units, rounding=rounding)


@pytest.fixture
def rounded(m2: Checkpoint, tmp_path: Path) -> Path:
    export(m2, two_formats(m2), tmp_path / "out", quiet=True)
    return tmp_path / "out"


def test_an_export_says_which_versions_made_it(m2, rounded, tmp_path):
    made = read_json(rounded / NOTE, "plan")["inputs"]
    assert made == {"source": m2.identity, "rounding": "search 1", "formats": "int4_g32 1, int8_g32 1"}
    export(m2, Plan(m2.container.name, {0: (0, 1, 2), 1: (1, 2, 3)}), tmp_path / "cut", quiet=True)
    assert read_json(tmp_path / "cut" / NOTE, "plan")["inputs"] == {"source": m2.identity}, "nothing was rounded"


def test_another_version_of_the_rounding_is_named_and_values_are_held(m2, rounded, monkeypatch):
    before = verify(rounded, m2, quiet=True)
    assert before.holds and not before.notes and not before.compared["near"]
    newer(monkeypatch, ROUNDINGS, "search")
    verdict = verify(rounded, m2, quiet=True)
    (note,) = verdict.notes
    assert "was rounded by search version 1, this moesaic has version 2" in note and "by moesaic 0.1.0" in note
    assert verdict.holds and verdict.compared["near"] == before.compared["codes"] and not verdict.compared["codes"]
    names = list(before.errors)
    assert np.allclose([verdict.errors[n] for n in names], [before.errors[n] for n in names], rtol=1e-3)


def test_another_version_of_a_format_concerns_its_matrices_alone(m2, rounded, monkeypatch):
    newer(monkeypatch, FORMATS, "int8_g32")
    verdict = verify(rounded, m2, quiet=True)
    attention = sum(n.role == "qkv" for n in m2.architecture.linears)
    assert "was rounded by int8_g32 version 1, this moesaic has version 2" in verdict.notes[0]
    assert verdict.holds and verdict.compared["near"] % attention == 0 and verdict.compared["codes"] > 0


def test_values_that_no_version_can_have_made_are_found(m2, rounded, monkeypatch):
    newer(monkeypatch, ROUNDINGS, "search")
    result = Checkpoint.open(rounded)
    name = f"{result.architecture.experts_of[1, 2]['down'].name}.weight_packed"
    where = result.where(name)
    with open(rounded / where.file, "r+b") as file:
        file.seek(where.offset)
        data = np.frombuffer(file.read(where.info.bytes), np.uint8)
        file.seek(where.offset)
        file.write(np.random.default_rng(0).permutation(data).tobytes())
    finding, digest = verify(rounded, m2, quiet=True).findings
    assert digest.check == "digest"
    assert finding.check == "near" and "times as far from the source as rounding to nearest is" in finding.what


def test_an_interrupted_export_is_not_finished_by_another_version(m2, tmp_path, monkeypatch):
    def work() -> None:
        export(m2, two_formats(m2), tmp_path / "out", quiet=True)

    assert child(dying(work, 12, signal.SIGKILL)) == -signal.SIGKILL
    with monkeypatch.context() as other:
        newer(other, ROUNDINGS, "search")
        with pytest.raises(StaleError, match=r"begun by another version: search version 1, this moesaic has version 2"):
            work()
    work()
    newer(monkeypatch, ROUNDINGS, "search")
    work()  # whole: nothing is written


def test_an_interrupted_rendering_is_not_finished_by_another_version(m2, tmp_path, monkeypatch):
    plan, tokens, calls = a_plan(m2), some_tokens(m2), []
    write = work_module.write_group

    def dies(*arguments: object) -> dict[str, object]:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(work_module, "write_group", dies)
    with pytest.raises(KeyboardInterrupt):
        round_on_text(m2, plan, tokens, tmp_path / "rendered", quiet=True)
    for registry, name, word in ((ROUNDINGS, "gptq", "rounding gptq 1"), (FORMATS, "int4_g32", "formats int4_g32 1")):
        with monkeypatch.context() as other:
            newer(other, registry, name)
            with pytest.raises(StaleError, match=f"was made from {word}, and this is {name} 2"):
                round_on_text(m2, plan, tokens, tmp_path / "rendered", quiet=True)
    round_on_text(m2, plan, tokens, tmp_path / "rendered", quiet=True)


def test_statistics_and_prices_of_another_version_are_not_reused(m2, tmp_path, monkeypatch):
    tokens = some_tokens(m2)
    tokens = dataclasses.replace(tokens, facts=tokens.facts | {"tokenizer_sha256": "0"})
    calibrate(m2, tokens, tmp_path / "stats", quiet=True)
    for module in ("statistics", "sweep"):
        monkeypatch.setattr(f"moesaic.calibrate.{module}.VERSION", "2")
    with pytest.raises(StaleError, match="was made from statistics 1, and this is 2"):
        Statistics.load(tmp_path / "stats", m2)
    a = m2.architecture
    order_LE = np.tile(np.arange(a.experts), (len(a.moe_layers), 1))
    unit = next(iter(a.units))

    def priced() -> object:
        options = Options(units={unit: ("source", "int8_g32")}, counts=[], order_LE=order_LE)
        return price(m2, options, Trial(tokens, quiet=True), tmp_path)

    priced()
    for registry, name in ((ROUNDINGS, "rtn"), (FORMATS, "int8_g32")):
        with monkeypatch.context() as other:
            newer(other, registry, name)
            with pytest.raises(StaleError, match="move it away or use another run folder"):
                priced()
    monkeypatch.setitem(prices_module.VERSIONS, "measured", 2)
    with pytest.raises(StaleError, match="was made from harm measured 1, and this is measured 2"):
        priced()


# What identities must not leave out -------------------------------------------------------------------------------


def test_prices_that_users_have_are_still_read():
    """Identities of version 0.1.0, to the digit: a costs.json is stale where one of these moves."""
    asked: Any = SimpleNamespace(identity="there")
    options = Options({"u": ("source", "mxfp4", "int4_g32"), "v": ("mxfp4",)}, (3, 2), np.array([[3, 1, 0, 2]]))
    measured = prices_module.inputs_of(asked, options, Trial(asked), "measured")
    assert measured == {
        "source": "there", "tokens": "there", "rounding": "rtn 1", "harm": "measured 1", "options": "1aaa63d2585ad6fe",
    }  # fmt: skip
    sensed = prices_module.inputs_of(asked, options, Trial(asked, rounding="search"), "surrogate", 0)
    assert sensed["options"] == "7ccc7bb6d988600a" and sensed["rounding"] == "search 1"


def test_a_trace_of_another_saliency_is_not_reused(m2, tmp_path):
    a, tokens = m2.architecture, some_tokens(m2)
    order_LE = np.tile(np.arange(a.experts), (len(a.moe_layers), 1))
    saliency_LE = np.ones(order_LE.shape)

    def traced(saliency_LE: np.ndarray) -> object:
        options = Options(units={}, counts=[a.experts - 1], order_LE=order_LE)
        return trace(m2, options, saliency_LE, Trial(tokens, quiet=True), tmp_path)

    traced(saliency_LE)
    with pytest.raises(StaleError, match="was made from options"):
        traced(2 * saliency_LE)


def test_a_repair_judged_by_another_seed_is_not_reused(m3, tmp_path):
    blueprint = Blueprint.of(m3, Plan("mxfp8", {1: (0, 2, 3, 6), 2: (1, 4, 5, 7)}))
    both = some_tokens(m3, 8, seed=1), some_tokens(m3, 4, seed=2)
    repair(blueprint, *both, tmp_path / "repaired", seed=0, quiet=True)
    with pytest.raises(StaleError, match="was made from seed 0, and this is 1"):
        repair(blueprint, *both, tmp_path / "repaired", seed=1, quiet=True)


def test_a_sweep_with_noise_is_not_continued_with_another_seed(m2, tmp_path, monkeypatch):
    """Half of the layers under one seed's noise and half under another's would be a floor of neither."""
    run, rows = LayerRun(m2), some_tokens(m2).ids_BT
    scored = torch.ones(rows.shape[0], rows.shape[1] - 1, dtype=torch.bool)
    module = sys.modules[lockstep.__module__]
    step, calls = module.forward, []

    def dies(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*arguments)

    def swept(seed: int) -> object:
        noisy = {"floor": Contender(run, noise=0.01, seed=seed)}
        sweep = Sweep(range(run.architecture.layers), tmp_path / "partial.safetensors", {"source": "x"}, run.device)
        return lockstep(run, noisy, [Rows(rows, scored)], sweep)

    monkeypatch.setattr(module, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        swept(0)
    with pytest.raises(StaleError, match="was made from swept"):
        swept(1)
    swept(0)
