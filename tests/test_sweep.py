"""The one sweep, and all that use it: cut short at any layer, and at any write, the same call ends in the same bits.

Truths: the same call, not cut short. Leaves out what each of them computes, which has tests of its own.
"""

import io
import json
import pickle
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from children import child, contents, dying

import moesaic.stream.sweep as sweep_module
from moesaic.artifact import read_tensors
from moesaic.calibrate import calibrate
from moesaic.checkpoint import Checkpoint
from moesaic.data.tokens import TokenSet, sha256_of
from moesaic.errors import InputError, StaleError
from moesaic.evaluate import Conditions, Reading, evaluate
from moesaic.export.activations import observe
from moesaic.export.repair import repair
from moesaic.export.sequential import round_on_text
from moesaic.measure import Branch, Options, Trial, measure, sense
from moesaic.measure.preview import Candidate, preview
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.registry import collect
from moesaic.stream import STATE_COPIES, LayerRun, Standing, State, Sweep
from moesaic.stream.sweep import EACH_LAYER, load, packed, save

CPU = torch.device("cpu")
INPUTS = {"source": "a", "tokens": "b"}


def rows(count: int, length: int = 24, seed: int = 0) -> TokenSet:
    ids_BT = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))
    facts = {"ids_sha256": sha256_of(ids_BT), "tokenizer_sha256": "none", "seed": seed}
    return TokenSet(ids_BT, torch.zeros(count, dtype=torch.int64), ("random",), facts)


# One file ---------------------------------------------------------------------------------------------------------


def test_a_standing_comes_back_as_it_was(tmp_path):
    one, other = torch.randn(2, 3, 4), torch.randn(1, 3, 4).bfloat16()
    states = {
        "source": State(one, nonfinite={3: 2}),
        "cut": State(one, {1: (0, 5)}),
        "other": State(other, {2: ()}, nonfinite={0: 1}),
    }
    at = Standing(states, {"largest": {"a": 0.1}, "groups": [{"name": "x"}]}, {"sums": torch.arange(4)}, 3)
    save(tmp_path / "states", at, INPUTS)
    found = load(tmp_path / "states", INPUTS, CPU)
    assert (found.done, found.notes, list(found.states)) == (3, at.notes, list(states))
    for name, state in states.items():
        after = found.states[name]
        assert torch.equal(after.hidden_BTD, state.hidden_BTD) and after.hidden_BTD.dtype == state.hidden_BTD.dtype
        assert {n: list(ids) for n, ids in after.dropped.items()} == {n: list(ids) for n, ids in state.dropped.items()}
        assert after.nonfinite == state.nonfinite
    assert torch.equal(found.tensors["sums"], torch.arange(4)) and list(found.tensors) == ["sums"]
    assert found.states["source"].hidden_BTD is found.states["cut"].hidden_BTD, "one tensor, on disk too"
    assert len([n for n in read_tensors(tmp_path / "states", "states")[0] if n.startswith("state.")]) == 2
    with pytest.raises(StaleError, match="was made from tokens b, and this is c"):
        load(tmp_path / "states", INPUTS | {"tokens": "c"}, CPU)


def added(layer: int, at: Standing) -> Standing:
    """A step for tests: the number of the layer is added, and noted."""
    states = {name: State(s.hidden_BTD + layer) for name, s in at.states.items()}
    return Standing(states, {"seen": [*at.notes.get("seen", []), layer]})


def first() -> Standing:
    return Standing({"text": State(torch.zeros(1, 1, 1))})


@pytest.mark.parametrize("layers", [range(4), [3, 2, 1, 0]])
def test_saved_after_each_layer_or_on_a_timer_or_on_ctrl_c_alone(tmp_path, monkeypatch, layers):
    saved: list[int] = []
    monkeypatch.setattr(sweep_module, "save", lambda file, at, inputs: saved.append(at.done))
    for seconds, wanted in ((EACH_LAYER, [1, 2, 3, 4]), (None, []), (1e9, [])):
        saved.clear()
        found = Sweep(layers, tmp_path / "s", INPUTS, CPU, seconds).through(first, added, lambda at: at)
        assert saved == wanted and found.notes["seen"] == list(layers) and found.done == 4

    def interrupted(at: Standing) -> None:
        raise KeyboardInterrupt

    for step_until, end in ((2, None), (9, interrupted)):

        def step(layer: int, at: Standing, until: int = step_until) -> Standing:
            if at.done == until:
                raise KeyboardInterrupt
            return added(layer, at)

        saved.clear()
        with pytest.raises(KeyboardInterrupt):
            Sweep(layers, tmp_path / "s", INPUTS, CPU).through(first, step, end or (lambda at: at))
        assert saved == [min(step_until, 4)]
        saved.clear()
        with pytest.raises(KeyboardInterrupt):
            Sweep(layers, None, INPUTS, CPU).through(first, step, end or (lambda at: at))
        assert saved == []


def test_passes_hold_what_fits_beside_the_source():
    assert packed([3, 0, 2, 0], 10, 30) == [[1, 3], [2, 0]]
    assert packed([3, 0, 2, 0], 10, 1000) == [[1, 3, 2, 0]]
    assert packed([1, 1], 10, 5) == [[0], [1]], "one goes at least"
    assert packed([], 10, 1000) == []


# All that sweep ---------------------------------------------------------------------------------------------------


def statistics(model: Checkpoint, folder: Path) -> Any:
    calibrate(model, rows(4), folder, quiet=True)


def largest(model: Checkpoint, folder: Path) -> Any:
    kept = {layer: (0, 2, 3, 5, 6) for layer in model.architecture.moe_layers}
    return observe(model, kept, rows(3), folder, quiet=True)


def some_branches(model: Checkpoint) -> list[Branch]:
    """Of all layers, some alike and one that differs in nothing."""
    units, a = list(model.architecture.units), model.architecture
    found = [Branch({unit: "mxfp4"}) for unit in units[::9]]
    found += [Branch({}, {layer: tuple(range(1, 7))}) for layer in a.moe_layers]
    return [*found, Branch({units[3]: "int2_g64"}, {a.moe_layers[-1]: (0, 1, 2, 3)}), Branch(), found[0]]


def branches(model: Checkpoint, folder: Path) -> Any:
    tokens = rows(2)
    memory = 5 * STATE_COPIES * 4 * tokens.tokens * model.architecture.hidden  # four a pass, and the source
    found = measure(model, some_branches(model), Trial(tokens, memory_bytes=memory, quiet=True), folder)
    return [(m.kl_B.tolist(), m.nonfinite) for m in found]


def cuts(model: Checkpoint, folder: Path) -> Any:
    layers, tokens = model.architecture.moe_layers, rows(6)
    kept = [{layer: tuple(sorted((first + layer + i) % 8 for i in range(5))) for layer in layers} for first in range(5)]
    kept += [{layers[-1]: (0, 1, 2, 3, 4)}, kept[2]]
    memory = 4 * STATE_COPIES * 4 * tokens.tokens * model.architecture.hidden  # three a pass, and the source
    found = [Candidate(f"cut {i}", 5, k) for i, k in enumerate(kept)]
    return [o.facts() for o in preview(model, found, Trial(tokens, memory_bytes=memory, quiet=True), folder)]


def on_text(model: Checkpoint, folder: Path) -> Any:
    rounded = ("layers.3.experts", *(unit for unit in model.architecture.units if unit.endswith((".o", ".shared"))))
    units = {unit: "int4_g32" if unit in rounded else "source" for unit in model.architecture.units}
    return round_on_text(model, Plan("compressed_tensors", formats=units, rounding="gptq"), rows(2), folder, quiet=True)


def mended(model: Checkpoint, folder: Path) -> Any:
    """Two sweeps: one that fits, and one that judges."""
    kept = {layer: (0, 2, 3, 5, 6) for layer in model.architecture.moe_layers}
    blueprint = Blueprint.of(model, Plan(model.container.name, kept))
    return repair(blueprint, rows(6), rows(5, seed=1), folder, quiet=True)


def slopes(model: Checkpoint, folder: Path) -> Any:
    """One sweep forward and one backward."""
    a = model.architecture
    offered = {unit: ("mxfp4",) for unit in list(a.units)[::5]}
    order_LE = np.arange(a.experts)[None].repeat(len(a.moe_layers), 0)
    found = sense(model, Options(offered, (6, 4), order_LE), Trial(rows(2), quiet=True), folder)
    return {str(key): (s.by_sequence_B.tolist(), s.by_token_B.tolist()) for key, s in found.items()}


def scored(model: Checkpoint, folder: Path) -> Any:
    """The model against itself as an engine rounds its activations, and against itself with noise."""
    readings = [Reading.of(rows(3)), replace(Reading.of(rows(2, seed=1)), name="other")]
    return evaluate(model, model, readings, folder, Conditions(("none", "engine"), device="cpu"), True).scores


USERS: dict[str, Callable[[Checkpoint, Path], Any]] = {
    "calibrate": statistics,
    "activations": largest,
    "measure": branches,
    "preview": cuts,
    "sequential": on_text,
    "repair": mended,
    "slopes": slopes,
    "evaluate": scored,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    wide = dict(hidden_size=256, intermediate_size=128, shared_intermediate_size=128)
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("deep") / "m3", "minimax_m3_vl", layers=3, **wide))


def outcome(user: str, model: Checkpoint, folder: Path) -> tuple[str, dict[str, bytes]]:
    """What a user returns, and every file that it leaves."""
    return json.dumps(USERS[user](model, folder), default=str), contents(folder)


class Steps:
    """Counts the layers begun by anybody, and interrupts one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.stop_at, self.steps = 0, -1, list[Any]()
        through = Sweep.through

        def counting(sweep: Sweep, begin: Any, step: Any, *others: Any, **named: Any) -> Any:
            self.steps.append(step)

            def counted(layer: int, before: Standing) -> Standing:
                self.begun += 1
                after = step(layer, before)
                if self.begun == self.stop_at:
                    raise KeyboardInterrupt
                return after

            return through(sweep, begin, counted, *others, **named)

        monkeypatch.setattr(Sweep, "through", counting)


@dataclass(frozen=True)
class Whole:
    """A call that was not cut short: what came of it, how many layers that took, and what was done at each."""

    outcome: tuple[str, dict[str, bytes]]
    layers: int
    steps: list[Any]


@pytest.fixture(scope="module")
def whole(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    @cache
    def of(user: str) -> Whole:
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch)
            return Whole(outcome(user, model, tmp_path_factory.mktemp(user) / "whole"), steps.begun, steps.steps)

    return of


@pytest.mark.parametrize("user", USERS)
def test_interrupted_in_any_layer_the_same_call_gives_the_same(user, model, whole, tmp_path, monkeypatch):
    """Ctrl-C at the end of a layer, when all is made and nothing is kept; then in a later one, and so on to the end."""
    truth, steps, interrupts = whole(user), Steps(monkeypatch), 0
    assert truth.layers >= model.architecture.layers
    steps.stop_at = random.Random(user).randint(1, 2)
    for _ in range(truth.layers + 1):
        try:
            again = outcome(user, model, tmp_path / "cut")
            break
        except KeyboardInterrupt:
            interrupts += 1
            steps.stop_at = steps.begun + random.Random(f"{user}{interrupts}").randint(2, 4)
    assert again == truth.outcome and interrupts >= 1
    assert truth.layers <= steps.begun <= truth.layers + interrupts, "only interrupted layers were done twice"


@pytest.mark.parametrize("user", USERS)
def test_killed_at_any_write_the_same_call_gives_the_same(user, model, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "SAVE_SECONDS", 0.0)
    at = random.Random(user).randint(2, 5)
    assert child(dying(lambda: USERS[user](model, tmp_path), at, signal.SIGKILL)) == -signal.SIGKILL
    assert outcome(user, model, tmp_path) == whole(user).outcome, f"after death at write {at}"


@pytest.mark.parametrize("user", USERS)
def test_states_of_a_finished_sweep_do_not_stay(user, model, whole, tmp_path, monkeypatch):
    """Interrupted after the last file is written, before the states are removed."""
    unlink, left = Path.unlink, [1]

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if left and path.is_relative_to(tmp_path) and path.suffix != ".partial" and path.exists():
            left.pop()
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(sweep_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        USERS[user](model, tmp_path)
    assert outcome(user, model, tmp_path) == whole(user).outcome


def test_a_damaged_file_of_states_says_what_to_do(tmp_path):
    (tmp_path / "s").write_bytes(b"torn")
    with pytest.raises(InputError, match="or remove it, and the same command begins anew"):
        Sweep(range(2), tmp_path / "s", INPUTS, CPU).through(first, added, lambda at: at)


class Plain(pickle.Pickler):
    """Takes data and functions of modules. A checkpoint goes as its path, a run as its checkpoint, a plug-in as its name."""

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, Checkpoint):
            return Checkpoint.open, (found.path,)
        if isinstance(found, LayerRun):
            return LayerRun, (found.checkpoint, str(found.device), found.dtype, found.block_bytes)
        if type(found).__name__ in ("Rounding", "NumberFormat", "Container"):
            return collect, (type(found).__module__.rsplit(".", 1)[0], type(found))
        return NotImplemented


@pytest.mark.parametrize("user", USERS)
def test_what_is_done_at_a_layer_is_a_function_of_plain_data(user, whole):
    """So that another process can do it: no closure, no live object that could not be opened there but who is told."""
    for step in whole(user).steps:
        named = {name: value for name, value in step.keywords.items() if name != "told"}
        Plain(io.BytesIO()).dump(partial(step.func, *step.args, **named))
