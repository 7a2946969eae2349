"""Activations as an engine rounds them, where tokens go, and the floor: held to compressed-tensors and to transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from folders import deal, write_folder
from reference import Reference
from test_evaluate import changed, noisy, text_rows
from torch import Tensor

from moesaic.artifact import read_tensors
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.kept import kept_of
from moesaic.errors import InputError
from moesaic.evaluate import Conditions, Reading, evaluate
from moesaic.export import export
from moesaic.measure.divergence import Contender, Rows, lockstep
from moesaic.measure.divergence.activations import declared, intakes, rounded, told
from moesaic.plan import Plan
from moesaic.stream import LayerRun, Observer, Routing, State

FP8 = dict(num_bits=8, type="float", dynamic=True, symmetric=True)
MX = dict(type="float", strategy="group", group_size=32, dynamic=True, scale_dtype="torch.uint8", symmetric=True)
THEIRS = {
    "fp8_channel": QuantizationArgs(strategy="token", **FP8),
    "fp8_block": QuantizationArgs(strategy="group", group_size=128, **FP8),
    "mxfp4": QuantizationArgs(num_bits=4, zp_dtype="torch.uint8", **MX),
}


@pytest.mark.parametrize("name", THEIRS)
def test_rounding_is_compressed_tensors(name: str) -> None:
    x_nI = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 40)[:, None]
    args = THEIRS[name]
    scale, zero = compute_dynamic_scales_and_zp(x_nI[None], args, torch.nn.Linear(1, 1))
    theirs, ours = fake_quantize(x_nI[None], scale, zero, args)[0], rounded(name, x_nI)
    if name == "mxfp4":  # theirs takes the next power of two for the top of a binade, as no server's kernel has to
        assert (ours != theirs).float().mean() < 0.1 and (ours - x_nI).norm() < 1.1 * (theirs - x_nI).norm()
    else:
        assert torch.equal(ours, theirs)


def test_nvfp4_under_a_known_divisor_is_compressed_tensors() -> None:
    x_nI = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 40)[:, None]
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local", symmetric=True,
        scale_dtype="torch.float8_e4m3fn",
    )  # fmt: skip
    divisor = (448 * 6 / x_nI.abs().max()).reshape(1) * 1.3  # measured on other text: the largest here are clipped
    scale, zero = compute_dynamic_scales_and_zp(x_nI[None], args, torch.nn.Linear(1, 1), divisor)
    theirs = fake_quantize(x_nI[None], scale, zero, args, global_scale=divisor)[0]
    differ = rounded("nvfp4_a4", x_nI, divisor) != theirs
    assert differ.float().mean() < 0.01 and not torch.equal(theirs, rounded("nvfp4_a4", x_nI))


def test_divisors_come_from_the_export(m2: Checkpoint, tmp_path: Path) -> None:
    write_folder(m2, deal(m2, "nvfp4_a4"), "compressed_tensors", tmp_path / "a4")
    a4 = Checkpoint.open(tmp_path / "a4")
    assert declared(a4) == {"nvfp4_a4", "fp8_block"} and "experts to nvfp4_a4" in told(a4, "engine")
    layer = m2.architecture.moe_layers[0]
    gate = a4.parts(a4.architecture.experts_of[layer, 0]["gate"])["inputs"]
    x_nI = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    taken = intakes(a4, "engine")[f"layers.{layer}.experts"](x_nI, "gate")
    assert torch.equal(taken, rounded("nvfp4_a4", x_nI, gate)) and not torch.equal(taken, rounded("nvfp4_a4", x_nI))


@pytest.mark.parametrize(("name", "most"), [("mxfp8", 0.04), ("nvfp4", 0.13), ("mxfp4", 0.15), ("int8_channel", 0.01)])
def test_each_token_is_rounded_by_itself(name: str, most: float) -> None:
    x_nI = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-3, 3)[:, None]
    whole = rounded(name, x_nI)
    assert torch.equal(whole, torch.cat([rounded(name, x_1I) for x_1I in x_nI.split(1)]))
    error_n = (whole - x_nI).norm(dim=1) / x_nI.norm(dim=1)
    assert (error_n > 0).all() and (error_n < most).all()
    assert torch.equal(rounded(name, whole), whole) or name in ("nvfp4", "int8_channel")
    spoilt = x_nI.clone()
    spoilt[2, 5], spoilt[3, 7] = torch.inf, torch.nan
    kept = rounded(name, spoilt)
    assert torch.equal(kept[[0, 1, 4, 5]], whole[[0, 1, 4, 5]]) and kept[2, 5] == torch.inf and kept[3, 7].isnan()


def test_what_engines_round_is_what_the_config_says(m3: Checkpoint, m2: Checkpoint, tmp_path: Path) -> None:
    assert declared(m3) == {"mxfp8"} and declared(m2) == {"fp8_block"}
    write_folder(m3, deal(m3, ["mxfp4", "nvfp4"]), "compressed_tensors", tmp_path / "four")
    four = Checkpoint.open(tmp_path / "four")
    assert declared(four) == {"mxfp8"} and intakes(four, "none") == {}
    assert "experts" not in told(four, "engine") and "experts to mxfp4, experts to nvfp4" in told(four, "w4a4")
    config = json.loads((four.path / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        if group["weights"]["num_bits"] == 4 and group["weights"]["strategy"] == "group":
            group["input_activations"] = group["weights"]
    (four.path / "config.json").write_text(json.dumps(config))
    assert declared(Checkpoint.open(four.path)) == {"mxfp8", "mxfp4"}
    write_folder(m3, deal(m3, "bf16", "bf16"), "compressed_tensors", tmp_path / "plain")
    assert told(Checkpoint.open(tmp_path / "plain"), "engine") == "not rounded"
    with pytest.raises(InputError, match="unknown rounding of activations 'twice'"):
        intakes(m3, "twice")


def rounding_linear(name: str, skip: set[int]):  # type: ignore[no-untyped-def]
    plain = torch.nn.functional.linear

    def linear(x: Tensor, w_OI: Tensor, bias: Tensor | None = None) -> Tensor:
        if w_OI.shape[0] in skip:  # routers and head
            return plain(x, w_OI, bias)
        return plain(rounded(name, x.flatten(0, -2)).view_as(x), w_OI, bias)

    return linear


def test_equal_to_a_whole_model_whose_every_linear_rounds_its_inputs(
    minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = text_rows(minimax)
    evaluate(
        minimax,
        minimax,
        [Reading.of(tokens)],
        tmp_path,
        Conditions(activations=("none", "engine"), device="cpu"),
        quiet=True,
    )
    values, _ = read_tensors(tmp_path / "scores.safetensors", "token_scores")
    plain = Reference(minimax.path).logits(tokens.ids_BT)[:, :-1].double().log_softmax(-1)
    skip = {minimax.architecture.experts, minimax.architecture.vocab}
    monkeypatch.setattr(torch.nn.functional, "linear", rounding_linear(next(iter(declared(minimax))), skip))
    rounding = Reference(minimax.path)
    rounding.model.config._experts_implementation = "eager"  # the one that multiplies by torch's `linear`
    engine = rounding.logits(tokens.ids_BT)[:, :-1].double().log_softmax(-1)
    wanted_BS = (plain.exp() * (plain - engine)).sum(-1)
    assert values["text.kl_nats"].abs().max() == 0 and wanted_BS.mean() > 1e-5
    near_BS = (values["text@engine.kl_nats"].double() - wanted_BS).abs() / wanted_BS.clamp_min(1e-4)
    assert near_BS.median() < 1e-3 and near_BS.quantile(0.95) < 0.05  # an input near a midpoint may fall either way


def test_scores_say_how_activations_were_treated(m3: Checkpoint, tmp_path: Path) -> None:
    worse = changed(m3.path, tmp_path / "export", noisy)
    tokens = text_rows(m3)
    scores = evaluate(m3, worse, [Reading.of(tokens)], tmp_path, Conditions(activations=("none", "engine")), quiet=True)
    kl = {way: scores.find("kl_mean", activations=way) for way in ("none", "engine")}
    assert all(kl.values()) and kl["none"].value != kl["engine"].value  # type: ignore[union-attr]
    assert (
        scores.facts["activations"]["none"] == "not rounded"
        and "experts to mxfp8" in scores.facts["activations"]["engine"]
    )
    assert scores.find("kl_mean") == kl["none"] and {s.activations for s in scores.scores} == {"none", "engine"}
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0].endswith("activations,seed") and any(line.endswith("engine,0") for line in lines)


def test_routing_is_compared_in_the_numbers_of_the_source(m3: Checkpoint, tmp_path: Path) -> None:
    """Half the experts gone and nothing else changed: the first MoE layer's agreement follows from its own routing."""
    kept = {layer: (1, 2, 4, 7) for layer in m3.architecture.moe_layers}
    pruned = export(m3, Plan("mxfp8", kept), tmp_path / "pruned", quiet=True)
    assert kept_of(pruned, m3) == {layer: list(ids) for layer, ids in kept.items()}
    tokens = text_rows(m3)
    scores = evaluate(m3, pruned, [Reading.of(tokens)], tmp_path, Conditions(device="cpu"), quiet=True)
    first = m3.architecture.moe_layers[0]
    seen: list[Routing] = []
    run = LayerRun(m3, "cpu")
    states = [State(run.embed(tokens.ids_BT))]
    for layer in range(first + 1):
        states = run.advance(layer, [State(states[0].hidden_BTD, observer=Observer(route=seen.append))])
    routing, top_k = seen[-1], m3.architecture.top_k
    mass = agreed = 0.0
    for ids, gates, affinity in zip(routing.experts_Tk, routing.gates_Tk, routing.affinity_TE):
        bias = m3.read(m3.architecture.routers[first].correction)
        left = sorted(kept[first], key=lambda e: -float(affinity[e] + bias[e]))[:top_k]
        agreed += len(set(left) & set(ids.tolist())) / top_k / len(routing.gates_Tk)
        mass += sum(float(g) for e, g in zip(ids, gates) if int(e) not in kept[first]) / len(routing.gates_Tk)
    of_layer = scores.facts["layers"][first]
    assert of_layer["router_agreement"] == pytest.approx(agreed, abs=1e-6) and 0 < agreed < 1
    assert of_layer["pruned_mass"] == pytest.approx(mass, abs=1e-3) and 0 < mass < 1
    agreement, gone = scores.find("router_agreement"), scores.find("pruned_mass")
    assert agreement is not None and agreement.error and gone is not None and gone.tokens == 6 * 47
    layers = [x["router_agreement"] for x in scores.facts["layers"] if x["router_agreement"] is not None]
    assert len(layers) == len(m3.architecture.moe_layers) and agreement.value == pytest.approx(
        sum(layers) / len(layers), abs=0.02
    )


def test_a_stranger_is_compared_without_routing_and_says_so(m3: Checkpoint, tmp_path: Path) -> None:
    router = m3.architecture.routers[m3.architecture.moe_layers[0]].weight
    other = changed(m3.path, tmp_path / "other", lambda n, t: t.flip(1) if n == router else t)
    scores = evaluate(m3, other, [Reading.of(text_rows(m3))], tmp_path, Conditions(device="cpu"), quiet=True)
    assert "resembles none" in scores.facts["routing"] and scores.find("router_agreement") is None
    assert scores.find("kl_mean").value > 0  # type: ignore[union-attr]


def test_the_floor_is_small_but_there_and_kept_with_the_source(m3: Checkpoint, tmp_path: Path) -> None:
    reading = Reading.of(text_rows(m3))
    worse = changed(m3.path, tmp_path / "export", noisy)
    go = Conditions(device="cpu", cache=tmp_path / "cache")
    first = evaluate(m3, worse, [reading], tmp_path / "a", go, True)
    again = evaluate(m3, worse, [reading], tmp_path / "b", go, True)
    floor, kl = first.find("floor_kl_mean"), first.find("kl_mean")
    assert floor is not None and kl is not None and 0 < floor.value < kl.value / 3  # type: ignore[operator]
    assert again.scores == first.scores and again.find("floor_kl_mean") == floor
    assert first.find("floor_router_agreement") is None and first.facts["noise"] == 2**-9
    without = evaluate(m3, worse, [reading], tmp_path / "c", replace(go, floor=False), True)
    assert without.find("floor_kl_mean") is None and without.find("kl_mean") == kl


def test_ways_of_one_model_are_what_each_is_alone(m3: Checkpoint) -> None:
    tokens, run = text_rows(m3), LayerRun(m3, "cpu")
    ways = {
        "none": Contender(run),
        "engine": Contender(run, intakes(m3, "engine")),
        "floor": Contender(run, noise=0.01),
    }
    rows = [Rows(tokens.ids_BT, torch.ones(6, 47, dtype=torch.bool))]
    together = lockstep(run, ways, rows).divergences
    for way, contender in ways.items():
        alone = lockstep(run, {way: contender}, rows).divergences[way][0]
        assert torch.equal(alone.values["kl_nats"], together[way][0].values["kl_nats"])
    assert together["none"][0]["kl_nats"].max() == 0 < together["engine"][0]["kl_nats"].mean()
