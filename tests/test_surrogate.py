"""stream/backward and measure/surrogate against autograd through transformers' whole model, which holds all of it at once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Reference
from test_measure import CONTAINER, rows
from torch import Tensor

import moesaic.measure.slopes as reverse_module
from moesaic.checkpoint import Checkpoint
from moesaic.errors import PlanError, StaleError
from moesaic.families import Linear
from moesaic.measure import Options, Price, Prices, Trial, anchored, offers, price, sense, surrogate, trace
from moesaic.measure.anchored import between, ends
from moesaic.measure.branch import Branch, changes
from moesaic.plan import SOURCE
from moesaic.stream import LayerRun, Observer, Routing, State
from moesaic.stream.backward import Listener, drawn, retreat, tail
from moesaic.stream.router import route

FORMATS = ("source", "mxfp4", "int2_g64")
TOLERANCE = 2e-5  # of the largest gradient of a matrix


def boundaries(run: LayerRun, ids_BT: Tensor) -> list[Tensor]:
    """Hidden states before each layer, and after the last."""
    found = [run.embed(ids_BT)]
    for layer in range(run.architecture.layers):
        (state,) = run.advance(layer, [State(found[-1])])
        found.append(state.hidden_BTD)
    return found


def gradients(reference: Reference, ids_BT: Tensor, labels_BS: Tensor) -> dict[str, Tensor]:
    """Of Σ −ln p(label), by transformers' names; what nothing depends on is left out. `embedding` is by token of the row."""
    model = reference.model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    embedded = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    hidden_BTD = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    logits_BSV = F.linear(hidden_BTD[:, :-1], reference.head_VD)
    F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum").backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert embedded.grad is not None
    return found | {"embedding": embedded.grad}


def of_linear(found: dict[str, Tensor], n: Linear) -> Tensor | None:
    """The gradient of one matrix, from where transformers keeps it."""
    half = {"gate": 0, "up": 1}.get(n.projection)
    at = f"layers.{n.layer}."
    if n.role in ("qkv", "o"):
        index = n.projection.startswith("index_")
        stem = f"indexer.{n.projection[6:]}" if index else n.projection
        return found.get(f"{at}self_attn.{stem}_proj.weight")
    if n.expert is not None:
        name = "down_proj" if half is None else "gate_up_proj"
        whole = found[f"{at}mlp.experts.{name}"][n.expert]
    else:
        name = "down_proj" if half is None else "gate_up_proj"
        whole = found[f"{at}mlp.{'shared_experts.' * (n.role == 'shared')}{name}.weight"]
    return whole if half is None else whole.chunk(2)[half]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("length", (40, 150))
def test_gradients_are_those_of_the_whole_model(source, length):
    """Of every matrix, and of the embedded tokens; 150 tokens are beyond what sparse attention keeps."""
    run, ids_BT = LayerRun(source, block_bytes=2 << 20), rows(3, length).ids_BT
    hidden, labels_BS = boundaries(run, ids_BT), rows(3, length - 1, seed=1).ids_BT
    mine: dict[str, Tensor] = {}

    def add(seen):
        for n, x_nI, slope_nO in zip(seen.linears, seen.x, seen.slope):
            mine[n.name] = mine.get(n.name, torch.zeros(n.shape)) + slope_nO.T @ x_nI

    slope_BTD = tail(run, hidden[-1], labels_BS)
    for layer in reversed(range(run.architecture.layers)):
        slope_BTD = retreat(run, layer, hidden[layer], slope_BTD, Listener(add))
    truth = gradients(Reference(source.path), ids_BT, labels_BS)
    assert apart(slope_BTD, truth["embedding"]) < TOLERANCE
    compared = 0
    for n in source.architecture.linears:
        wanted = of_linear(truth, n)
        if wanted is None or not wanted.any():
            assert n.projection.startswith("index_") or n.expert is not None
            assert n.name not in mine or not mine[n.name].any()
        else:
            assert apart(mine[n.name], wanted) < TOLERANCE, n.name
            compared += 1
    assert compared > len(source.architecture.linears) // 2


def test_labels_are_drawn_from_the_model(source):
    """Of one position drawn many times, shares are probabilities; blocks of the vocabulary do not show."""
    run, hidden_BTD = LayerRun(source, block_bytes=1 << 18), boundaries(LayerRun(source), rows(1, 24).ids_BT)[-1]
    same_BTD = hidden_BTD[:, 5:7].expand(4000, -1, -1).contiguous()
    label_N = drawn(run, same_BTD, seed=3).flatten()
    p_V = run.logits(hidden_BTD[0, 5:6]).softmax(-1)[0].double()
    likely = p_V > 5 / len(label_N)
    share_V = label_N.bincount(minlength=len(p_V)).double() / len(label_N)
    chi2 = float(((share_V - p_V)[likely] ** 2 / p_V[likely]).sum() * len(label_N))
    degrees = int(likely.sum())
    assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5 and degrees > 20
    assert torch.equal(drawn(run, same_BTD, seed=3).flatten(), label_N)
    assert not torch.equal(drawn(run, same_BTD, seed=4).flatten(), label_N)


def order_of(source: Checkpoint) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(source.architecture.experts) for _ in source.architecture.moe_layers])


def test_a_format_costs_the_square_of_its_slope(source, tmp_path):
    """½ ⟨∂loss/∂W, ΔW⟩² of each sequence, by the whole model's gradients and the labels that were drawn."""
    tokens, offered = rows(3, 40), offers(source, CONTAINER, FORMATS)
    found = sense(source, Options(offered, (), order_of(source)), Trial(tokens, quiet=True), tmp_path)
    run, reference = LayerRun(source), Reference(source.path)
    labels_BS = drawn(run, boundaries(run, tokens.ids_BT)[-1], 0)
    by_row = [gradients(reference, ids_1T, l_1S) for ids_1T, l_1S in zip(tokens.ids_BT.split(1), labels_BS.split(1))]
    way = changes([Branch({u: f}) for u, of in offered.items() for f in of if f != SOURCE], "rtn")
    for (unit, format), sensed in found.items():
        groups: dict[int | None, list[Linear]] = {}
        for n in source.architecture.units[unit]:
            groups.setdefault(n.expert, []).append(n)
        sum_B = np.zeros(3)
        for group in groups.values():
            w = [source.decode(n.name) for n in group]
            for n, before_OI, after_OI in zip(group, w, way[format](group, w)):
                slopes = [of_linear(g, n) for g in by_row]
                sum_B += [0.0 if g is None else float((g * (after_OI - before_OI)).double().sum()) for g in slopes]
        assert sensed.by_sequence_B == pytest.approx(sum_B**2 / (2 * 39), rel=2e-3, abs=1e-9), (unit, format)
        assert sensed.price.nats == pytest.approx(sensed.by_token_B.mean()) and sensed.price.nats > 0


def test_dropping_costs_the_square_of_what_rerouting_changes(source, tmp_path):
    """At every count: the routed sum with the experts masked, all experts run on all tokens, times the slope behind it."""
    tokens, a = rows(2, 30), source.architecture
    counts, order_LE = tuple(range(a.top_k, a.experts)), order_of(source)
    found = sense(source, Options({}, counts, order_LE), Trial(tokens, quiet=True), tmp_path)
    assert set(found) == {(layer, kept) for layer in a.moe_layers for kept in counts}
    run = LayerRun(source)
    hidden = boundaries(run, tokens.ids_BT)
    slope_BTD = tail(run, hidden[-1], drawn(run, hidden[-1], 0))
    for layer in reversed(range(a.layers)):
        if layer in a.moe_layers:
            truth = slow_drops(run, layer, hidden[layer], slope_BTD, order_LE[a.moe_layers.index(layer)])
            for kept in counts:
                sum_BT = truth[kept].view(2, 30)
                sensed = found[layer, kept]
                assert sensed.by_sequence_B == pytest.approx(sum_BT.sum(1).square().numpy() / 58, rel=2e-3, abs=1e-9)
                assert sensed.by_token_B == pytest.approx(sum_BT.square().sum(1).numpy() / 58, rel=2e-3, abs=1e-9)
        slope_BTD = retreat(run, layer, hidden[layer], slope_BTD, Listener())


def slow_drops(
    run: LayerRun, layer: int, hidden_BTD: Tensor, slope_BTD: Tensor, order_E: np.ndarray
) -> dict[int, Tensor]:
    a, seen = run.architecture, list[Routing]()
    run.advance(layer, [State(hidden_BTD, observer=Observer(route=seen.append))])
    x_TD = seen[0].x_TD
    with torch.no_grad():
        outputs = []
        for e in range(a.experts):
            w = run.decode_expert(run.read_expert(layer, e), None)
            inner = run.family.arithmetic.activate(run.text, F.linear(x_TD, w.gate), F.linear(x_TD, w.up))
            outputs.append(F.linear(inner, w.down))
        f_TED = torch.stack(outputs, 1) * run.family.arithmetic.routed_scale(run.text)

        def routed(dropped: list[int]) -> Tensor:
            r = route(run.router(layer), x_TD, dropped)
            chosen_TkD = f_TED.gather(1, r.experts_Tk[..., None].expand(-1, -1, a.hidden))
            return (chosen_TkD * r.gates_Tk[..., None]).sum(1)

        whole_TD = routed([])
        return {
            kept: ((routed(order_E[kept:].tolist()) - whole_TD) * slope_BTD.flatten(0, 1)).double().sum(1)
            for kept in range(a.top_k, a.experts)
        }


def test_an_interrupted_sweep_goes_on(source, tmp_path, monkeypatch):
    options = Options(offers(source, CONTAINER, FORMATS), (6, 4), order_of(source))
    trial = Trial(rows(2), quiet=True)

    def prices(run: Path) -> Prices:
        return surrogate(source, options, trial, run)

    truth, calls, whole = prices(tmp_path / "whole"), 0, reverse_module.retreat

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(reverse_module, "retreat", stopping)
    with pytest.raises(KeyboardInterrupt):
        prices(tmp_path / "cut")
    again = prices(tmp_path / "cut")
    assert calls == source.architecture.layers + 1, "layers done before were done again"
    assert again.rounded == truth.rounded and again.dropped == truth.dropped and again.harm == "surrogate"
    assert {f.name for f in (tmp_path / "cut" / "slopes").iterdir()} == {
        f"{layer:03d}.safetensors" for layer in range(source.architecture.layers)
    }
    prices(tmp_path / "cut")
    assert calls == source.architecture.layers + 1
    with pytest.raises(StaleError):
        surrogate(source, replace(options, counts=(6,)), trial, tmp_path / "cut")
    with pytest.raises(PlanError, match="needs"):
        sense(source, options, replace(trial, rounding="gptq"), tmp_path / "g")


def test_small_changes_cost_what_they_are_measured_to_cost(source, tmp_path):
    """With the model's own outcome as the judge: ΔW shrunk until nothing flips, averaged over many labels."""
    once, many = rows(2, 24), 32
    run, unit = LayerRun(source), next(u for u in source.architecture.units if u.endswith(".o"))
    hidden = boundaries(run, once.ids_BT)[-1]
    tokens = once.take([0, 1] * many)
    options = Options({unit: ("mxfp4",)}, (), order_of(source))
    found = sense(source, options, Trial(tokens, quiet=True), tmp_path)
    each = found[unit, "mxfp4"].by_sequence_B.reshape(many, 2).mean(1)
    shrunk = 1 / 16
    way = changes([Branch({unit: "mxfp4"})], "rtn")["mxfp4"]

    def change(linears, w):
        return [a + shrunk * (b - a) for a, b in zip(w, way(linears, w))]

    state = State(run.embed(once.ids_BT), changed={unit: change})
    for layer in range(run.architecture.layers):
        (state,) = run.advance(layer, [state])
    p, q = (run.logits(h[:, :-1].flatten(0, 1)).double().log_softmax(-1) for h in (hidden, state.hidden_BTD))
    kl = float((p.exp() * (p - q)).sum(-1).mean()) / shrunk**2
    assert abs(each.mean() - kl) < 4 * each.std(ddof=1) / len(each) ** 0.5


def test_traces_are_those_of_the_whole_model(source, tmp_path):
    """½ · Σ|g|²|x|² / T · mean(ΔW)² of o, from hooks on transformers' module; a drop is 3 α times what is lost."""
    tokens, a = rows(3, 40), source.architecture
    unit = next(u for u in reversed(a.units) if u.endswith(".o"))
    (linear,) = a.units[unit]
    saliency_LE = np.random.default_rng(1).random((len(a.moe_layers), a.experts))
    options, trial = Options({unit: ("source", "mxfp4")}, (6, 4), order_of(source)), Trial(tokens, quiet=True)
    prices = trace(source, options, saliency_LE, trial, tmp_path)
    reference, seen = Reference(source.path), []

    def hook(module, inputs, out):
        out.retain_grad()
        seen.extend((inputs[0].detach(), out))

    reference.model.layers[linear.layer].self_attn.o_proj.register_forward_hook(hook)
    gradients(reference, tokens.ids_BT, tokens.ids_BT[:, 1:])
    x_TI, slope_TO = seen[0].flatten(0, 1).double(), seen[1].grad.flatten(0, 1).double()
    trace_of_h = float((x_TI.square().sum(1) * slope_TO.square().sum(1)).sum()) / (3 * 39)
    w_OI = source.decode(linear.name)
    (after_OI,) = changes([Branch({unit: "mxfp4"})], "rtn")["mxfp4"]([linear], [w_OI])
    mse = float((after_OI - w_OI).double().square().mean())
    assert prices.rounded[unit]["mxfp4"].nats == pytest.approx(trace_of_h * mse / 2, rel=1e-4)
    assert prices.rounded[unit]["source"].nats == 0 and prices.harm == "trace"
    for layer, order_E, saliency_E in zip(a.moe_layers, prices.order_LE, saliency_LE):
        assert prices.dropped[layer][4].nats == pytest.approx(0.45 * saliency_E[order_E[4:]].sum())
    assert trace(source, options, saliency_LE, trial, tmp_path).rounded == prices.rounded


def test_between_anchors_prices_follow_the_slopes():
    order_LE = np.arange(8)[None]
    sensed = {"source": 0.0, "a": 1e-6, "b": 1e-4, "c": 1e-2}
    rounded = {"u": {f: Price(nats, 0.0) for f, nats in sensed.items()}, "v": {"a": Price(2e-6, 0.0)}}
    cuts = Prices(rounded, {0: {k: Price(1e-3 * (8 - k), 0.0) for k in (4, 5, 6, 7)}}, order_LE, 100)
    assert ends(cuts.rounded["u"]) == ["a", "c"] and ends(cuts.rounded["v"]) == ["a"]
    few = {"u": {"a": Price(1e-5, 1e-6), "c": Price(1e-2, 1e-3)}, "v": {"a": Price(4e-6, 1e-6)}}
    found = between(cuts, Prices(few, {0: {4: Price(6e-3, 6e-4)}}, order_LE, 100))
    assert [found["u", f].nats for f in "abc"] == pytest.approx([1e-5, 10**-3.5, 1e-2])
    assert found["u", "b"].error == pytest.approx(0.1 * 10**-3.5)
    assert (found["v", "a"].nats, found["v", "a"].error) == pytest.approx((4e-6, 1e-6))
    assert [found[0, k].nats for k in (4, 5, 6, 7)] == pytest.approx([6e-3, 4.5e-3, 3e-3, 1.5e-3])
    assert found[0, 7].error == pytest.approx(1.5e-4)


def test_anchors_are_measured(m2, tmp_path):
    """Two formats of three, and one cut of two: those prices are `price`'s own."""
    offered = {u: ("source", "mxfp4", "int3_g64", "int2_g64") for u in m2.architecture.units}
    options, trial = Options(offered, (6, 4), order_of(m2)), Trial(rows(2), quiet=True)
    prices = anchored(m2, options, trial, tmp_path)
    truth = price(m2, options, trial, tmp_path / "all")
    assert prices.harm == "anchored" and Prices.load(tmp_path / "anchors" / "costs.json").harm == "measured"
    sensed = Prices.load(tmp_path / "anchors" / "slopes" / "costs.json")
    for unit, of in prices.rounded.items():
        first, last = ends(sensed.rounded[unit])
        (middle,) = set(of) - {"source", first, last}
        for format in (first, last):
            assert of[format].nats == pytest.approx(truth.rounded[unit][format].nats, rel=1e-9)
        assert min(of[first].nats, of[last].nats) <= of[middle].nats <= max(of[first].nats, of[last].nats)
    for layer, cuts in prices.dropped.items():
        assert cuts[4].nats == pytest.approx(truth.dropped[layer][4].nats) and cuts[6].nats > 0
    assert anchored(m2, options, trial, tmp_path).rounded == prices.rounded
