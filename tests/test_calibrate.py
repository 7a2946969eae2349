"""Calibration: every sum against a slow observer of transformers' own modules, and interrupted runs against whole ones.

The observer sees what enters and leaves the modules of the full transformers model (reference.py) and
redoes router and experts token by token in F64, from values decoded by plain torch.
"""

import dataclasses
import hashlib
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from children import child, contents, dying
from forward import final
from reference import Reference
from safetensors import safe_open
from torch import Tensor

import moesaic.calibrate.sweep as calibrate_module
import moesaic.calibrate.weights as weights_module
import moesaic.stream.sweep as sweep_module
from moesaic.calibrate import SUMS, LayerSums, Statistics, calibrate, check_unread, groups, weigh
from moesaic.calibrate.criteria import WEIGHT_SUMS
from moesaic.calibrate.selection import select_experts
from moesaic.calibrate.statistics import layer_file
from moesaic.checkpoint import Checkpoint
from moesaic.data.tokens import TokenSet
from moesaic.errors import CheckpointError, InputError, StaleError
from moesaic.progress import Meter
from moesaic.stream import LayerRun, Observer, State

DOMAINS = ("code", "math")


def tokens_of(
    seed: int, rows: int = 5, length: int = 24, vocab: int = 256, domains: tuple[str, ...] = DOMAINS
) -> TokenSet:
    ids_BT = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    digest = hashlib.sha256(ids_BT.numpy().tobytes()).hexdigest()
    domain_B = torch.arange(rows) * len(domains) // rows
    return TokenSet(ids_BT, domain_B, domains, {"ids_sha256": digest, "tokenizer_sha256": "0"})


@pytest.fixture(scope="module", params=["minimax_m2", "minimax_m3_vl"])
def model(request, tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("calibrate") / "model", request.param))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("small") / "m3", "minimax_m3_vl", layers=2, experts=4))


# The slow observer ------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expert_output(config: dict[str, Any], values: dict[str, Tensor], at: str, x_D: np.ndarray) -> np.ndarray:
    w1, w2, w3 = (values[f"{at}.{w}.weight"].double().numpy() for w in ("w1", "w2", "w3"))
    gate, up = w1 @ x_D, w3 @ x_D
    if config["model_type"] == "minimax_m2":
        return w2 @ (gate / (1 + np.exp(-gate)) * up)
    t = config["text_config"]
    gate, up = np.minimum(gate, t["swiglu_limit"]), np.clip(up, -t["swiglu_limit"], t["swiglu_limit"])
    return w2 @ ((up + 1) * gate / (1 + np.exp(-t["swiglu_alpha"] * gate)))


def observed(checkpoint: Checkpoint, tokens: TokenSet) -> dict[int, dict[str, np.ndarray]]:
    """Layer -> sums [domain, half, expert], by the definitions, one token at a time."""
    reference, a, config = Reference(checkpoint.path), checkpoint.architecture, checkpoint.config
    entering: dict[int, dict[str, Tensor]] = {}

    def keep(layer: int, what: str) -> Callable[..., None]:
        return lambda module, args: entering.setdefault(layer, {}).update({what: args[0].detach()})

    for layer in a.moe_layers:
        block = reference.model.layers[layer]
        block.post_attention_layernorm.register_forward_pre_hook(keep(layer, "h"))
        block.mlp.register_forward_pre_hook(keep(layer, "x"))
    reference.logits(tokens.ids_BT)
    scale = config["text_config"]["routed_scaling_factor"] if "text_config" in config else 1.0
    nth, half_B = [0] * len(tokens.domains), []
    for domain in tokens.domain_B.tolist():
        half_B.append(nth[domain] % 2)
        nth[domain] += 1
    found = {}
    for layer in a.moe_layers:
        at = f"{a.layer_prefix}{layer}.block_sparse_moe"
        router, bias = (
            reference.values[f"{at}.{n}"].double().numpy() for n in ("gate.weight", "e_score_correction_bias")
        )
        sums = {name: np.zeros((len(tokens.domains), 2, a.experts)) for name in (*SUMS, "peak")}
        for row in range(tokens.rows):
            place = int(tokens.domain_B[row]), half_B[row]
            for position in range(tokens.ids_BT.shape[1]):
                x_D, h_D = (entering[layer][w][row, position].double().numpy() for w in ("x", "h"))
                affinity = [sigmoid(v) for v in router @ x_D]
                chosen = sorted(range(a.experts), key=lambda e: (-(affinity[e] + bias[e]), e))[: a.top_k]
                total = sum(affinity[e] for e in chosen)
                outputs = {e: expert_output(config, reference.values, f"{at}.experts.{e}", x_D) for e in chosen}
                y_D = scale * sum(affinity[e] / total * f_D for e, f_D in outputs.items())
                after = h_D + y_D
                turn = max(0.0, 1 - float(h_D @ after) / float(np.linalg.norm(h_D) * np.linalg.norm(after)))
                for e, f_D in outputs.items():
                    g, norm = affinity[e] / total, float(np.linalg.norm(f_D))
                    one = {
                        "tokens": 1.0, "gate": g, "gate2": g * g, "norm": norm, "norm2": norm**2, "gated": g * norm,
                        "gated2": (g * norm) ** 2, "gnorm2": g * norm**2, "turned": g * norm * turn,
                    }  # fmt: skip
                    for name, value in one.items():
                        sums[name][(*place, e)] += value
                    sums["peak"][(*place, e)] = max(sums["peak"][(*place, e)], float(np.abs(f_D).max()))
        found[layer] = sums
    return found


def test_every_sum_is_the_slow_observers(model, tmp_path):
    tokens = tokens_of(0)
    statistics = calibrate(model, tokens, tmp_path, quiet=True)
    for at, (layer, sums) in enumerate(observed(model, tokens).items()):
        assert statistics.layers[at] == layer
        for name, wanted in sums.items():
            found = statistics.sums[name][at]
            assert found.dtype == np.float64 and found == pytest.approx(wanted, rel=2e-4, abs=1e-6), (layer, name)
        assert np.array_equal(statistics.sums["tokens"][at], sums["tokens"])


# What sums must be ------------------------------------------------------------------------------------------------


def test_tokens_routed_are_tokens_times_top_k(model, tmp_path):
    tokens = tokens_of(1)
    statistics = calibrate(model, tokens, tmp_path, quiet=True)
    assert statistics.tokens == tokens.tokens == 120
    assert (statistics.sums["tokens"].sum((1, 2, 3)) == tokens.tokens * model.architecture.top_k).all()
    assert statistics.sums["gate"].sum((1, 2, 3)) == pytest.approx(tokens.tokens), "a token's gates add up to 1"
    assert statistics.nonfinite() == []


def test_domains_and_halves_add_up(model, tmp_path):
    s = calibrate(model, tokens_of(2), tmp_path, quiet=True)
    whole = s.totals()
    for parts in ([s.totals({d: 1.0}) for d in DOMAINS], [s.totals(half=h) for h in range(2)]):
        for name in whole:
            together = np.maximum(*(p[name] for p in parts)) if name == "peak" else sum(p[name] for p in parts)
            assert together == pytest.approx(whole[name], rel=1e-12), name
    assert s.positions_DH.tolist() == [[2 * 24, 24], [24, 24]]  # 3 rows of code, 2 of math


def test_rows_of_a_domain_alternate_between_halves():
    tokens = dataclasses.replace(tokens_of(0), domain_B=torch.tensor([0, 1, 0, 0, 1]))
    group_T, positions = groups(tokens, 256)
    assert group_T.view(5, 24)[:, 0].tolist() == [0, 2, 1, 0, 3] and positions == [[48, 24], [24, 24]]


def test_pairs_and_moments_fit_the_sums(model, tmp_path):
    s = calibrate(model, tokens_of(0), tmp_path, quiet=True)
    layer, totals = s.layers[0], s.totals()
    together_EE = s.layer(layer, "together_EE")
    assert torch.equal(together_EE, together_EE.T) and together_EE.diagonal().tolist() == totals["tokens"][0].tolist()
    assert int(together_EE.sum()) == 120 * model.architecture.top_k**2


def test_squares_of_inputs_are_those_of_the_tokens_that_chose_an_expert(model, tmp_path):
    """By a slow loop over what experts were seen to multiply; they and the pairs are all that is kept beside sums."""
    s, layer, passes = calibrate(model, tokens_of(0), tmp_path, quiet=True), model.architecture.moe_layers[0], []
    run = LayerRun(model)
    final(run, [State(run.embed(tokens_of(0).ids_BT), observer=Observer(expert=passes.append))])
    for seen in (p for p in passes if p.layer == layer):
        for name, x_nI in (("inputs_ED", seen.x_nD), ("inner_EI", seen.inner_nI)):
            assert s.layer(layer, name)[seen.expert] == pytest.approx(sum(x_I.square() for x_I in x_nI), rel=1e-4)
    with safe_open(layer_file(s.folders[0], layer), "pt") as file:
        assert {n for n in file.keys() if "_" in n} == {"inputs_ED", "inner_EI", "together_EE"}  # noqa: SIM118


def test_the_same_call_writes_the_same_and_then_only_reads(model, tmp_path):
    for name in ("one", "two"):
        calibrate(model, tokens_of(0), tmp_path / name, quiet=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*.safetensors")}
    again = calibrate(model, tokens_of(0), tmp_path / "one", quiet=True)
    assert again.tokens == 120 and times == {p: p.stat().st_mtime_ns for p in times}
    layers = {f"{layer:03d}.safetensors" for layer in model.architecture.moe_layers}
    assert {p.name for p in times} == layers | {"tokens.safetensors"}


def test_text_added_later_adds_up(small, tmp_path):
    """Two texts, and a domain that only the second has."""
    texts = [tokens_of(0), tokens_of(1, rows=3, domains=("math", "prose"))]
    parts = [calibrate(small, t, tmp_path, quiet=True) for t in texts]
    both = Statistics.load(tmp_path, small)
    assert both.tokens == 120 + 72 and set(both.domains) == {"code", "math", "prose"}
    for name, whole in both.totals().items():
        a, b = (p.totals()[name] for p in parts)
        assert whole == pytest.approx(np.maximum(a, b) if name == "peak" else a + b, rel=1e-12), name
    math_of = [p.totals({"math": 1.0})["gated"] for p in parts]
    assert both.totals({"math": 1.0})["gated"] == pytest.approx(sum(math_of), rel=1e-12)
    layer = small.architecture.moe_layers[0]
    assert torch.equal(both.layer(layer, "together_EE"), sum(p.layer(layer, "together_EE") for p in parts))


def test_a_call_returns_its_own_text_alone(small, tmp_path):
    """So that what a command gives depends on nothing that an earlier one left."""
    alone = calibrate(small, tokens_of(1), tmp_path / "alone", quiet=True)
    calibrate(small, tokens_of(0), tmp_path / "shared", quiet=True)
    after = calibrate(small, tokens_of(1), tmp_path / "shared", quiet=True)
    assert all(np.array_equal(alone.sums[name], after.sums[name]) for name in alone.sums)


# Interrupted ------------------------------------------------------------------------------------------------------


def test_more_than_a_chunk_is_several_sweeps_of_the_same_sums(small, tmp_path, monkeypatch):
    tokens = tokens_of(3, rows=7)
    whole = calibrate(small, tokens, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(calibrate_module, "CHUNK_TOKENS", 72)  # three rows
    parts = calibrate(small, tokens, tmp_path / "parts", quiet=True)
    assert len(parts.folders) == 3 and parts.tokens == whole.tokens and parts.domains == whole.domains
    for name, found in parts.totals().items():
        assert found == pytest.approx(whole.totals()[name], rel=1e-6), name
    assert Statistics.load(tmp_path / "parts", small).tokens == whole.tokens


def test_text_that_was_counted_already_is_refused(small, tmp_path):
    for tokens in (tokens_of(0, length=48), tokens_of(0, length=48).take([0, 1, 2])):
        calibrate(small, tokens, tmp_path, quiet=True)
    with pytest.raises(InputError, match=r"144 of the \d+ tokens in .* and would count twice"):
        Statistics.load(tmp_path, small)
    with pytest.raises(InputError, match="48 of the 48 tokens in this text stand in"):
        check_unread(tmp_path, [tokens_of(0, length=48).take([1])])
    check_unread(tmp_path, [tokens_of(5, length=48)])
    check_unread(tmp_path / "nowhere", [tokens_of(0)])


# Weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_summed_as_plain_torch_sums_them(model, tmp_path):
    found, values, a = weigh(model, tmp_path, quiet=True), Reference(model.path).values, model.architecture
    for at, layer in enumerate(a.moe_layers):
        for e in range(a.experts):
            stem = f"{a.layer_prefix}{layer}.block_sparse_moe.experts.{e}"
            w = torch.cat([values[f"{stem}.{n}.weight"].flatten() for n in ("w1", "w2", "w3")]).double()
            wanted = (float(w.abs().sum()), float((w**2).sum()), w.numel())
            assert [found[name][at, e] for name in WEIGHT_SUMS] == pytest.approx(wanted, rel=1e-6)


def test_weighing_goes_on_where_it_was(small, tmp_path, monkeypatch):
    whole = weigh(small, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, weights_module, "of_expert", 5)
        weigh(small, tmp_path / "weights", quiet=True)
    with monkeypatch.context() as patch:
        calls = interrupting(patch, weights_module, "of_expert", 99)
        found = weigh(small, tmp_path / "weights", quiet=True)
    assert calls[0] == 4 and all(np.array_equal(found[name], whole[name]) for name in WEIGHT_SUMS)
    assert contents(tmp_path / "weights") == contents(tmp_path / "whole")


@pytest.fixture
def whole(small, tmp_path) -> dict[str, bytes]:
    calibrate(small, tokens_of(0), tmp_path / "whole", quiet=True)
    return contents(tmp_path / "whole")


def interrupting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> list[int]:
    """Ctrl-C in the `at`-th call of a function, after its work; the list counts calls."""
    real, calls = getattr(owner, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        found = real(*args, **options)
        if calls[0] == at:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize(
    "owner, name, at, left",
    [
        (LayerSums, "route", 1, 2),  # in the first MoE layer: the dense one is done
        (LayerSums, "expert", 6, 1),
        (LayerSums, "block", 2, 1),
        (Meter, "advance", 1, 2),  # between a layer and the next: its states and its number belong together
        (Meter, "advance", 2, 1),
        (Meter, "advance", 3, 0),
        (calibrate_module, "write_tensors", 1, 2),
        (calibrate_module, "write_tensors", 2, 0),
        (calibrate_module, "groups", 1, 2),
    ],
)
def test_after_ctrl_c_the_same_call_goes_on_and_gives_the_same(
    small, whole, tmp_path, monkeypatch, owner, name, at, left
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, owner, name, at)
        calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    with monkeypatch.context() as patch:
        calls = interrupting(patch, LayerSums, "route", 99)
        calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    assert contents(tmp_path / "stats") == whole
    assert calls[0] == left, "no layer that was done is done again"


def test_after_ctrl_c_while_the_states_are_saved(small, whole, tmp_path, monkeypatch):
    """The longest moment of all: gigabytes on their way to disk."""
    monkeypatch.setattr(sweep_module, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, sweep_module, "save", 2)
        calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    assert contents(tmp_path / "stats") == whole


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_after_any_death_the_same_call_gives_the_same(small, whole, tmp_path, monkeypatch, sign):
    monkeypatch.setattr(sweep_module, "SAVE_SECONDS", 0.0)  # states are saved after each of three layers
    deaths = 0
    for at in range(1, 8, 2):
        folder = tmp_path / f"stats-{at}"

        def work(folder: Path = folder) -> None:
            calibrate(small, tokens_of(0), folder, quiet=True)

        code = child(dying(work, at, sign))
        assert code in (0, 130, -signal.SIGKILL)
        deaths += code != 0
        work()
        assert contents(folder) == whole, f"after death at call {at}"
    assert deaths >= 3


def test_after_three_interrupts_in_a_row(small, whole, tmp_path, monkeypatch):
    for at in (1, 2, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupting(patch, LayerSums, "expert", at)
            calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    assert contents(tmp_path / "stats") == whole


def test_a_lost_layer_is_done_again(small, whole, tmp_path):
    calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    next(p for p in (tmp_path / "stats").rglob("001.safetensors")).unlink()
    calibrate(small, tokens_of(0), tmp_path / "stats", quiet=True)
    assert contents(tmp_path / "stats") == whole


def test_an_unfinished_text_is_not_summed(small, tmp_path, monkeypatch):
    calibrate(small, tokens_of(1), tmp_path, quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, LayerSums, "route", 2)
        calibrate(small, tokens_of(0), tmp_path, quiet=True)
    with pytest.raises(InputError, match="lacks 1 of 2 layers: its sweep was not finished"):
        Statistics.load(tmp_path, small)
    assert calibrate(small, tokens_of(1), tmp_path, quiet=True).tokens == 120, "and it does not disturb another"


def test_statistics_of_another_model_are_stale(small, model, tmp_path):
    calibrate(small, tokens_of(0), tmp_path, quiet=True)
    with pytest.raises(StaleError, match="was made from source"):
        calibrate(dataclasses.replace(small, config=small.config | {"note": 1}), tokens_of(0), tmp_path, quiet=True)
    with pytest.raises(InputError, match="holds no statistics; run `moesaic calibrate` first"):
        Statistics.load(tmp_path / "nowhere", small)


# Not finite -------------------------------------------------------------------------------------------------------


def poisoned(small: Checkpoint, path: Path, name: str, at: int, data: bytes) -> Checkpoint:
    """A copy with bytes of one tensor replaced."""
    copy = Checkpoint.open(shutil.copytree(small.path, path))
    where = copy.where(name)
    with open(path / where.file, "r+b") as f:
        f.seek(where.offset + at)
        f.write(data)
    return copy


def test_tokens_that_are_no_numbers_are_counted_and_named(small, tmp_path, monkeypatch):
    """One token's embedding is NaN, and through attention its row: whoever these are routed to is told, nobody ranked by them."""
    tokens = tokens_of(0)
    rows = tokens.ids_BT.clone()
    rows[rows == 7] = 8
    rows[-1, -1] = 7
    tokens, width = dataclasses.replace(tokens, ids_BT=rows), small.architecture.hidden
    nan_row = b"\xc0\x7f" * width
    broken = poisoned(small, tmp_path / "broken", small.architecture.embedding, 7 * len(nan_row), nan_row)
    monkeypatch.setattr(Checkpoint, "check_values", lambda self: None)  # stands for values that overflow on the way
    s = calibrate(broken, tokens, tmp_path / "stats", quiet=True)
    bad, good, top_k = s.totals()["nonfinite"], s.totals()["tokens"], small.architecture.top_k
    assert bad.sum(1).tolist() == [24 * top_k] * 2 and good.sum(1).tolist() == [96 * top_k] * 2
    whole_rows = dataclasses.replace(tokens, ids_BT=rows[:-1], domain_B=tokens.domain_B[:-1])
    clean = calibrate(small, whole_rows, tmp_path / "clean", quiet=True)
    for name in SUMS:
        assert s.totals()[name] == pytest.approx(clean.totals()[name], rel=1e-5), "the other rows count as if alone"
    selection = select_experts(s, "reap", 2)
    assert sum(count for layer, _, count in selection.nonfinite if layer == 1) == 24 * top_k
    assert "gave NaN or infinite values" in selection.warnings[0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, LayerSums, "route", 2)
        calibrate(broken, tokens, tmp_path / "again", quiet=True)
    calibrate(broken, tokens, tmp_path / "again", quiet=True)
    assert contents(tmp_path / "again") == contents(tmp_path / "stats")


def test_an_expert_whose_weights_are_no_numbers_is_named_at_once(small, tmp_path):
    name = f"{small.architecture.layer_prefix}1.block_sparse_moe.experts.2.w2"
    broken = poisoned(small, tmp_path / "broken", f"{name}.weight", 0, b"\x7f")
    with pytest.raises(CheckpointError, match=rf"{name}\.weight holds 1 NaN among"):
        calibrate(broken, tokens_of(0), tmp_path / "stats", quiet=True)
