"""Experts whose matrices carry biases, in a tensor of each layer with a row for each expert: added, cut and gone through."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_stacked import LAYOUTS, stack_of
from test_stream import Seen, final, logits, text
from torch import Tensor
from torch.nn.functional import silu

import moesaic.families as families_module
from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.export import export
from moesaic.export.sequential.experts import Experts
from moesaic.families import Architecture, Linear, TensorInfo
from moesaic.families.mixtral import MIXTRAL
from moesaic.families.stated import Config
from moesaic.plan import Plan
from moesaic.recipes.quantize import Quantizing, quantize
from moesaic.stream import LayerRun, State
from moesaic.stream.backward import Listener, retreat
from moesaic.verify import verify


def with_bias(linear: Linear, turns: bool) -> Linear:
    """Gate and up share a tensor, as in gpt-oss, one after the other or value by value in turn."""
    stack = stack_of(linear, turns, False)
    return dataclasses.replace(linear, stack=stack, bias=f"{stack.tensor}_bias")


@pytest.fixture(params=("side by side", "in turn"))
def biased(
    request: pytest.FixtureRequest, mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Checkpoint:
    """Mixtral with biases; its matrices lie one by one, whatever its family says of stacks."""
    turns, _ = LAYOUTS[request.param]

    def read(config: Config) -> Architecture:
        a = MIXTRAL.read(config)
        linears = tuple(n if n.expert is None else with_bias(n, turns) for n in a.linears)
        sizes = {n.bias: n.stack.rows for n in linears if n.stack}
        return dataclasses.replace(
            a, linears=linears, tensors=(*a.tensors, *(TensorInfo(b, "BF16", (a.experts, r), "bias") for b, r in sizes.items()))
        )  # fmt: skip

    monkeypatch.setitem(families_module.FAMILIES, "mixtral", dataclasses.replace(MIXTRAL, read=read))
    folder = tmp_path / "biased"
    folder.mkdir()
    tensors = {name: mixtral.read(name) for name in mixtral.stored}
    for i, info in enumerate(t for t in read(mixtral.config).tensors if t.role == "bias"):
        tensors[info.name] = torch.randn(info.shape, generator=torch.Generator().manual_seed(i)).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((mixtral.path / name).read_text())
    return Checkpoint.open(folder)


def by_hand(c: Checkpoint, layer: int, expert: int, x_nD: Tensor) -> tuple[Tensor, Tensor]:
    """What down multiplies, and what comes out of the expert."""
    matrices = c.architecture.experts_of[layer, expert]

    def through(projection: str, x_nI: Tensor) -> Tensor:
        n = matrices[projection]
        row, half = c.read(n.bias)[expert].float(), {"gate": 0, "up": 1}.get(projection)
        if half is not None:
            row = row[half::2] if n.stack.step == 2 else row.chunk(2)[half]
        return x_nI @ c.decode(n.name).T + row

    inner_nI = silu(through("gate", x_nD)) * through("up", x_nD)
    return inner_nI, through("down", inner_nI)


def test_biases_are_added(biased, mixtral):
    run, seen = LayerRun(biased), Seen()
    final(run, [State(run.embed(text(2, 40)), observer=seen.observer)])
    assert len(seen.passes) == 16
    for p in seen.passes:
        inner_nI, f_nD = by_hand(biased, p.layer, p.expert, p.x_nD)
        assert torch.allclose(p.inner_nI, inner_nI, atol=1e-4) and torch.allclose(p.f_nD, f_nD, atol=1e-4)
    assert not torch.allclose(logits(run, text(2, 40)), logits(LayerRun(mixtral), text(2, 40)), atol=0.1)


def test_biases_go_with_their_experts(biased, tmp_path):
    kept = {0: (0, 2, 3, 7), 1: (1, 2, 4, 5)}
    cut = export(biased, Plan("unquantized", kept), tmp_path / "cut", quiet=True)
    for layer, ids in kept.items():
        for linear in biased.architecture.experts_of[layer, 0].values():
            assert torch.equal(cut.read(linear.bias), biased.read(linear.bias)[list(ids)])
    gone = {layer: [e for e in range(8) if e not in ids] for layer, ids in kept.items()}
    assert torch.allclose(
        logits(LayerRun(biased), text(2, 40), dropped=gone), logits(LayerRun(cut), text(2, 40)), atol=1e-4
    )
    assert verify(cut.path, biased, quiet=True).holds


def test_slopes_go_through_them(biased):
    """Against differences, in F64's stead along a direction in which F32 can tell them."""
    run, layer = LayerRun(biased), 1
    hidden_BTD, slope_BTD, step_BTD = (
        torch.randn(1, 12, 256, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)
    )

    def loss(h_BTD: Tensor) -> float:
        (after,) = run.advance(layer, [State(h_BTD)])
        return float((after.hidden_BTD.double() * slope_BTD).sum())

    found = float((retreat(run, layer, hidden_BTD, slope_BTD, Listener()) * step_BTD).sum())
    sides = [loss(hidden_BTD + by * step_BTD) for by in (1e-3, -1e-3)]
    assert found == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=1e-2)


def test_rounding_on_text_sees_them(biased, tmp_path, monkeypatch):
    """What down is rounded by is what the expert's biased gate and up make of tokens."""
    seen, real = [], Experts.activated

    def activated(self: Experts, both_nO: Tensor) -> Tensor:
        seen.append(float(both_nO.mean(-2).std()))
        return real(self, both_nO)

    monkeypatch.setattr(Experts, "activated", activated)
    asked, corpus = Quantizing("int8_g32", "experts", rounding="gptq"), Corpus(None, tokens=256, length=64)
    quantize(biased.path, tmp_path / "out", asked, corpus, quiet=True)
    assert min(seen) > 0.5, "biases of standard deviation 1 stand out of any mean over tokens"


def test_blocks_of_experts_are_forwarded_with_them(biased):
    """As AutoRound tunes them: several experts side by side, each on tokens of its own."""
    a, origin = biased.architecture, {n.name: n for n in biased.architecture.linears}
    experts = Experts(SimpleNamespace(origin=origin), None, LayerRun(biased), None)  # type: ignore[arg-type]
    matrices = [a.experts_of[1, e] for e in (4, 6)]
    groups = [[(m["gate"], m["up"]) for m in matrices], [(m["down"],) for m in matrices]]
    weights = [torch.stack([torch.cat([biased.decode(n.name) for n in g]) for g in of]) for of in groups]
    biases = [torch.stack([experts.bias(g) for g in of])[:, None] for of in groups]
    x_EnD = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(1))
    wanted = torch.stack([by_hand(biased, 1, e, x_nD)[1] for e, x_nD in zip((4, 6), x_EnD)])
    assert torch.allclose(experts.forward(biases, weights, x_EnD), wanted, atol=1e-4)
