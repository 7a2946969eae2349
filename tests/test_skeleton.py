"""Layers by their own forward, with stand-ins, and in two halves: one arithmetic, forward, backward and while decoding."""

import dataclasses

import pytest
import torch
from test_generate import in_steps, prompts
from test_stream import SMALL, Seen, final, text
from torch import Tensor, nn

from moesaic.checkpoint import Checkpoint
from moesaic.generate import Decoder
from moesaic.stream import LayerRun, LinearPass, Observer, State
from moesaic.stream.backward import Listener, UnitPass, retreat
from moesaic.stream.skeleton import standing_in

TOLERANCE = 2e-5


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint of a family that allows no split."""
    wiring = dataclasses.replace(checkpoint.family.wiring, split=None)
    return dataclasses.replace(checkpoint, family=dataclasses.replace(checkpoint.family, wiring=wiring))


@pytest.fixture(params=("m2", "m3"))
def halves(request: pytest.FixtureRequest) -> Checkpoint:
    """Families that are run in two halves."""
    found: Checkpoint = request.getfixturevalue(request.param)
    assert found.family.wiring.split is not None
    return found


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def halved(linears: object, values: list[Tensor]) -> list[Tensor]:
    return [w_OI / 2 for w_OI in values]


@pytest.mark.parametrize("block_bytes", (None, SMALL))
def test_both_ways_forward(halves, block_bytes):
    """Branches too: experts dropped, matrices changed, inputs rounded; and what observers see of every layer."""
    layer = halves.architecture.moe_layers[-1]
    changed = {f"layers.{layer}.{role}": halved for role in ("experts", "o", "shared")}
    rounded = {f"layers.{layer}.{role}": lambda x_nI, _: 0.9 * x_nI for role in ("qkv", "experts", "shared")}
    found = []
    for checkpoint in (halves, whole(halves)):
        run, seen, inputs = LayerRun(checkpoint, block_bytes=block_bytes), Seen(), dict[str, list[Tensor]]()

        def see(p: LinearPass, inputs: dict[str, list[Tensor]] = inputs) -> None:
            inputs.setdefault(p.linears[0].name, []).append(p.x_nI)

        observer = dataclasses.replace(seen.observer, linear=see)
        before_BTD = run.embed(text(2, 150))
        states = [
            State(before_BTD, observer=observer), State(before_BTD, dropped={layer: (0, 3)}),
            State(before_BTD, changed=changed), State(before_BTD, rounded=rounded),
        ]  # fmt: skip
        found.append((final(run, states), seen, {name: torch.cat(x) for name, x in inputs.items()}))
    (mine, seen, inputs), (theirs, seen_whole, inputs_whole) = found
    for a, b in zip(mine, theirs):
        assert apart(b.hidden_BTD, a.hidden_BTD) < TOLERANCE
    assert min(apart(mine[0].hidden_BTD, other.hidden_BTD) for other in mine[1:]) > 1e-4
    assert inputs.keys() == inputs_whole.keys() and len(inputs) > halves.architecture.layers
    assert all(apart(inputs_whole[name], x_nI) < TOLERANCE for name, x_nI in inputs.items())
    for (a, h_TD), (b, h_whole_TD) in zip(seen.blocks, seen_whole.blocks, strict=True):
        assert apart(b.x_TD, a.x_TD) < TOLERANCE and apart(h_whole_TD, h_TD) < TOLERANCE
        assert apart(b.routed_TD, a.routed_TD) < TOLERANCE
        assert (a.shared_TD is None) == (b.shared_TD is None)
        assert a.shared_TD is None or apart(b.shared_TD, a.shared_TD) < TOLERANCE


def test_both_ways_backward(halves):
    a = halves.architecture
    slope_BTD = torch.randn(2, 60, a.hidden, generator=torch.Generator().manual_seed(1))
    hidden_BTD = LayerRun(halves).embed(text(2, 60))
    for layer in range(a.layers):
        found = []
        for checkpoint in (halves, whole(halves)):
            units: dict[tuple[str, ...], Tensor] = {}

            def hear(seen: UnitPass, units: dict[tuple[str, ...], Tensor] = units) -> None:
                for n, x_nI, slope_nO in zip(seen.linears, seen.x, seen.slope):
                    units[n.name] = units.get(n.name, 0) + slope_nO.T @ x_nI

            before_BTD = retreat(
                LayerRun(checkpoint, block_bytes=1 << 20), layer, hidden_BTD, slope_BTD, Listener(hear)
            )
            found.append((before_BTD, units))
        (mine_BTD, mine), (theirs_BTD, theirs) = found
        assert apart(theirs_BTD, mine_BTD) < TOLERANCE and mine.keys() == theirs.keys() and len(mine) > 4
        assert all(apart(theirs[name], slope_OI) < TOLERANCE for name, slope_OI in mine.items() if slope_OI.any())


def test_both_ways_while_decoding(halves):
    rows = prompts((90, 5, 40))
    mine, theirs = (in_steps(Decoder(c, 1 << 30, device="cpu"), rows) for c in (halves, whole(halves)))
    assert all(apart(b, a) < TOLERANCE for a, b in zip(mine, theirs))


def test_a_layer_of_another_skeleton_needs_nothing_of_ours(mixtral, monkeypatch):
    """A norm behind the MLP, whose output is gated by a residual of half weight: written in no line of moesaic's."""
    run = LayerRun(mixtral)
    real = run.modeling.MixtralDecoderLayer

    class Other(real):
        def forward(self, hidden_states: Tensor, **given: object) -> Tensor:
            middle = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)[0]
            return 0.5 * middle + middle.tanh() * self.post_attention_layernorm(self.mlp(middle))

    monkeypatch.setattr(run.modeling, "MixtralDecoderLayer", Other)
    hidden_BTD, slope_BTD = (torch.randn(2, 30, 256, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    (after,) = run.advance(1, [State(hidden_BTD)])
    layer = filled(run, 1)
    leaf_BTD = hidden_BTD.clone().requires_grad_()
    positions_1T = torch.arange(30)[None]
    out_BTD = layer(leaf_BTD, position_embeddings=run.rotary(leaf_BTD, positions_1T), attention_mask=None)
    assert apart(after.hidden_BTD, out_BTD.detach()) < TOLERANCE
    (wanted_BTD,) = torch.autograd.grad(out_BTD, leaf_BTD, slope_BTD)
    assert apart(retreat(run, 1, hidden_BTD, slope_BTD, Listener()), wanted_BTD) < TOLERANCE


def filled(run: LayerRun, layer: int) -> nn.Module:
    """transformers' layer with all its values, experts and router included."""
    c, a = run.checkpoint, run.architecture
    block = run.block(layer, (*run.besides(layer), "self_attn"))
    experts = [{p: c.decode(n.name) for p, n in a.experts_of[layer, e].items()} for e in range(a.experts)]
    block.mlp.experts.gate_up_proj = nn.Parameter(torch.stack([torch.cat([e["gate"], e["up"]]) for e in experts]))
    block.mlp.experts.down_proj = nn.Parameter(torch.stack([e["down"] for e in experts]))
    block.mlp.gate.weight = nn.Parameter(c.decode(a.routers[layer].weight))
    return block


def test_a_stand_in_goes_when_it_is_done():
    module = nn.Linear(3, 3)
    x = torch.ones(2, 3)
    before, seen = module(x), []
    module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with pytest.raises(ZeroDivisionError), standing_in({module: lambda x: x * 7}):
        assert torch.equal(module(x), 7 * x) and len(seen) == 1
        raise ZeroDivisionError
    assert torch.equal(module(x), before) and "forward" not in vars(module)


def test_observers_are_shown_the_stream_before_it_gains(mixtral):
    """What is left of a layer's output when its block's parts are taken away."""
    seen = Seen()
    run = LayerRun(mixtral)
    (after,) = run.advance(0, [State(run.embed(text(2, 40)), observer=Observer(block=seen.observer.block))])
    ((block, h_TD),) = seen.blocks
    assert block.shared_TD is None and apart(h_TD + block.routed_TD, after.hidden_BTD.flatten(0, 1)) < 1e-6
