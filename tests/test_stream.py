"""Streaming forward: equal to the full transformers model, alone or in branches, in one piece or in chunks.

The other side of every comparison is reference.py: transformers' model with values decoded by plain
torch. Tiny models are random, so their logits move when anything is wrong; their smallest routing
margin is printed by `margins` and lies far above what F32 sums in another order can shift.
"""

import dataclasses
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import folders
import pytest
import tiny
import torch
from forward import final
from reference import Reference
from torch import Tensor

import moesaic.stream.attention as attention_module
from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError, FamilyError, InputError
from moesaic.families import Linear
from moesaic.stream import BlockPass, ExpertPass, LayerRun, Observer, Routing, State
from moesaic.stream.memory import ahead, spans

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOLERANCE = 1e-4  # on logits, whose standard deviation is about 2
SMALL = 64 << 10  # bytes of buffer that cut a tiny row of 200 tokens into several chunks of queries
KINDS = [(family, source) for family in ("minimax_m2", "minimax_m3_vl") for source in ("native", "bf16")] + [
    ("mixtral", "bf16")
]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A checkpoint, and what transformers makes of it."""

    checkpoint: Checkpoint
    reference: Reference

    @staticmethod
    @cache
    def of(path: Path) -> "Pair":
        return Pair(Checkpoint.open(path), Reference(path))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Tiny models, each made once a module."""
    root = tmp_path_factory.mktemp("stream")

    @cache
    def made(family: str, source: str = "native", **overrides: float) -> Pair:
        name = "-".join(map(str, (family, source, *overrides.items())))
        return Pair.of(tiny.make(root / name, family, source, **overrides))

    return made


def text(rows: int, length: int, vocab: int = 256, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(run: LayerRun, tokens_BT: Tensor, **differs: object) -> Tensor:
    (state,) = final(run, [State(run.embed(tokens_BT), **differs)])  # type: ignore[arg-type]
    assert not state.nonfinite
    return run.logits(state.hidden_BTD.flatten(0, 1)).view(*tokens_BT.shape, -1)


def margin(run: LayerRun, tokens_BT: Tensor) -> float:
    """Least distance, over tokens and layers, of the last selection score that made it from the first that did not."""
    found, top_k = [], run.architecture.top_k

    def route(seen: Routing) -> None:
        bias = run.architecture.routers[seen.layer].correction
        best = (seen.affinity_TE + (run.checkpoint.read(bias) if bias else 0)).sort(descending=True).values
        found.append(float((best[:, top_k - 1] - best[:, top_k]).min()))

    final(run, [State(run.embed(tokens_BT), observer=Observer(route=route))])
    return min(found)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not beside this clone")
    return path


# Equal to the full model


@pytest.mark.parametrize("length", (40, 200))
@pytest.mark.parametrize(("family", "source"), KINDS)
def test_logits_are_those_of_transformers(make, family, source, length):
    """Batch of 3, below and above the 64 keys that block-sparse attention keeps."""
    pair, tokens_BT = make(family, source), text(3, length)
    assert apart(logits(LayerRun(pair.checkpoint), tokens_BT), pair.reference.logits(tokens_BT)) < TOLERANCE


@pytest.mark.parametrize(("family", "source"), KINDS)
def test_no_token_is_near_a_tie(make, family, source):
    """Affinities are good to about 1e-6 in F32; those of a softmax to a fraction of that, as they are smaller."""
    least = 5e-6 if family == "mixtral" else 2e-5
    assert margin(LayerRun(make(family, source).checkpoint), text(3, 200)) > least


def test_the_long_rows_are_beyond_the_sparse_budget(make):
    """Else the test above says nothing about the indexer: 40 tokens see every block anyway, 200 do not."""
    checkpoint = make("minimax_m3_vl").checkpoint
    run, all_blocks = LayerRun(checkpoint), LayerRun(checkpoint)
    all_blocks.config.index_topk_blocks = 10**6
    assert apart(logits(run, text(3, 40)), logits(all_blocks, text(3, 40))) < TOLERANCE
    assert apart(logits(run, text(3, 200)), logits(all_blocks, text(3, 200))) > 0.1


@pytest.mark.parametrize("family", ("minimax_m2", "minimax_m3_vl"))
def test_ragged_blocks(make, family):
    """Dimensions that fill no whole 128 × 128 block at their edges."""
    pair, tokens_BT = make(family, hidden_size=192, intermediate_size=160), text(2, 50)
    assert apart(logits(LayerRun(pair.checkpoint), tokens_BT), pair.reference.logits(tokens_BT)) < TOLERANCE


@pytest.mark.parametrize("family", ("minimax_m2", "minimax_m3_vl"))
def test_a_correction_bias_in_bf16_would_be_caught(make, family):
    """transformers casts it so. Around 8, BF16 has steps of 1/16: other experts are chosen, and the logits say so."""
    pair, tokens_BT = make(family, bias_offset=8.0), text(2, 100)
    exact, biases = logits(LayerRun(pair.checkpoint), tokens_BT), pair.reference.biases()
    assert apart(exact, pair.reference.logits(tokens_BT)) < TOLERANCE
    stored = {layer: bias_E.clone() for layer, bias_E in biases.items()}
    for bias_E in biases.values():
        bias_E.copy_(bias_E.bfloat16())
    assert apart(exact, pair.reference.logits(tokens_BT)) > 1000 * TOLERANCE
    for layer, bias_E in biases.items():
        bias_E.copy_(stored[layer])


@pytest.mark.parametrize("model", ("m2", "m3"))
def test_testbed(model):
    """Trained models; 400 tokens are more than the 256 keys that m3 keeps."""
    pair = Pair.of(shared("testbed", model))
    run = LayerRun(pair.checkpoint)
    for tokens_BT in (text(2, 100, 4000), text(2, 400, 4000, seed=1)):
        assert margin(run, tokens_BT) > 5e-6
        assert apart(logits(run, tokens_BT), pair.reference.logits(tokens_BT)) < TOLERANCE


@pytest.mark.parametrize(("family", "source"), (("m2", "native"), ("m3", "native"), ("m3", "bf16")))
def test_replica(tmp_path, family, source):
    """Real head sizes and block sizes; 300 tokens are more than the 256 keys that the tiny replica keeps."""
    maker = shared("replica", "make_replica.py")
    facts = ["--family", family, "--preset", "tiny", "--source", source, "--seed", "3", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(maker), *facts], check=True, capture_output=True)
    pair = Pair.of(tmp_path)
    for tokens_BT in (text(2, 100), text(2, 300, seed=1)):
        assert apart(logits(LayerRun(pair.checkpoint), tokens_BT), pair.reference.logits(tokens_BT)) < TOLERANCE


def test_an_export_streams_as_its_values_do(source, tmp_path):
    """Experts in MXFP4 by compressed-tensors, against transformers filled with the same values in BF16."""
    formats = {n.name: "mxfp4" if n.role == "experts" else "bf16" for n in source.architecture.linears}
    decoded = folders.write_folder(source, formats, "compressed_tensors", tmp_path / "export")
    folders.write_twin(source, decoded, tmp_path / "twin")
    tokens_BT = text(2, 100)
    streamed = logits(LayerRun(Checkpoint.open(tmp_path / "export")), tokens_BT)
    assert apart(streamed, Reference(tmp_path / "twin").logits(tokens_BT)) < TOLERANCE


def test_bf16_runs_near_f32(source):
    """Not equal: only routers, gates and the experts' sum stay F32."""
    tokens_BT = text(2, 60)
    exact, low = (logits(LayerRun(source, dtype=d), tokens_BT) for d in (torch.float32, torch.bfloat16))
    assert low.dtype == torch.float32
    assert 1e-4 < float((low - exact).abs().median()) < 0.1


# Chunks, blocks and spans change memory, not values


@pytest.mark.parametrize("family", ("minimax_m2", "minimax_m3_vl"))
def test_attention_in_chunks(make, family, monkeypatch):
    pair, tokens_BT = make(family), text(2, 200)
    whole = logits(LayerRun(pair.checkpoint), tokens_BT)
    caches = counted(monkeypatch, attention_module, "DynamicCache")
    masks = counted(monkeypatch, attention_module, "causal")
    parts = logits(LayerRun(pair.checkpoint, block_bytes=SMALL), tokens_BT)
    assert caches["DynamicCache"] == 2 * pair.checkpoint.architecture.layers  # one a row and layer
    assert masks["causal"] >= 3 * caches["DynamicCache"]  # at least four chunks a row
    assert apart(parts, whole) < 1e-5
    assert apart(parts, pair.reference.logits(tokens_BT)) < TOLERANCE


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Counter[str]:
    """Calls of `owner.name` from now on, which still does what it did."""
    found: Counter[str] = Counter()
    real = getattr(owner, name)

    def spy(*args: object, **kwargs: object) -> object:
        found[name] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return found


def test_embedding_and_head_in_blocks(source):
    tokens_BT, hidden_nD = text(2, 70, source.architecture.vocab), torch.randn(9, source.architecture.hidden)
    run, small = LayerRun(source), LayerRun(source, block_bytes=8 << 10)
    assert len(list(small.vocabulary_spans())) > 10
    stored_VD = source.read(source.architecture.embedding).float()
    assert torch.equal(run.embed(tokens_BT), stored_VD[tokens_BT])
    assert torch.equal(small.embed(tokens_BT), stored_VD[tokens_BT])
    assert apart(small.logits(hidden_nD), run.logits(hidden_nD)) < 1e-5


def test_logit_spans_cover_all_tokens_once(source):
    run = LayerRun(source, block_bytes=1 << 20)
    found = list(run.logit_spans(1000, copies=4))
    assert [i for span in found for i in range(1000)[span]] == list(range(1000))
    assert len(found) > 1 and all(4 * 4 * source.architecture.vocab * (s.stop - s.start) <= 1 << 20 for s in found)


def test_spans():
    assert [(s.start, s.stop) for s in spans(10, 3, 10)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [(s.start, s.stop) for s in spans(2, 100, 10)] == [(0, 1), (1, 2)]
    assert not list(spans(0, 3, 10))


def test_ahead_keeps_two_items_and_raises_in_turn():
    class Weights:
        pass

    alive: weakref.WeakSet[Weights] = weakref.WeakSet()
    most = 0

    def load(key: int) -> Weights:
        nonlocal most
        if key == 7:
            raise CheckpointError("damaged")
        made = Weights()
        alive.add(made)
        most = max(most, len(alive))
        return made

    keys = []
    with pytest.raises(CheckpointError, match="damaged"):
        for key, item in ahead(load, range(10)):
            keys.append(key)
            del item
    assert keys == list(range(7)) and most <= 2
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


# Branches


def test_dropped_experts_are_as_good_as_minus_infinity(minimax):
    tokens_BT, dropped = text(2, 100), {layer: (1, 4, 5) for layer in minimax.architecture.moe_layers}
    reference = Reference(minimax.path)
    full = reference.logits(tokens_BT)
    for layer, bias_E in reference.biases().items():
        bias_E[list(dropped[layer])] = -torch.inf
    masked = reference.logits(tokens_BT)
    assert apart(full, masked) > 0.1
    assert apart(logits(LayerRun(minimax), tokens_BT, dropped=dropped), masked) < TOLERANCE


def test_branches_together_are_branches_alone_to_the_bit(source):
    """Different rows, lengths and dropped experts in one sweep."""
    run, last = LayerRun(source), source.architecture.moe_layers[-1]
    a, b = run.embed(text(2, 90)), run.embed(text(1, 150, seed=1))
    states = [State(a), State(a, dropped={last: (0, 3)}), State(b, dropped={last: (7,)})]
    together = final(run, states)
    for state, rode in zip(states, together):
        (alone,) = final(LayerRun(source), [state])
        assert torch.equal(rode.hidden_BTD, alone.hidden_BTD)
    assert not torch.equal(together[0].hidden_BTD, together[1].hidden_BTD)


def test_a_sweep_continues_from_saved_states(source):
    """`advance` leaves its input as it was, so a saved state stays good."""
    run, tokens_BT = LayerRun(source), text(2, 60)
    whole = final(run, [State(run.embed(tokens_BT))])
    kept = run.advance(0, [State(run.embed(tokens_BT))])
    saved = kept[0].hidden_BTD.clone()
    run.advance(1, kept)
    assert torch.equal(kept[0].hidden_BTD, saved)
    (later,) = final(LayerRun(source), [State(saved)], start=1)
    assert torch.equal(later.hidden_BTD, whole[0].hidden_BTD)


# What observers see


@dataclasses.dataclass
class Seen:
    """Everything that an observer is shown."""

    routings: list[Routing] = dataclasses.field(default_factory=list)
    passes: list[ExpertPass] = dataclasses.field(default_factory=list)
    blocks: list[tuple[BlockPass, Tensor]] = dataclasses.field(default_factory=list)

    @property
    def observer(self) -> Observer:
        return Observer(
            self.routings.append, self.passes.append, lambda seen: self.blocks.append((seen, seen.h_TD.clone()))
        )


@pytest.mark.parametrize("block_bytes", (None, SMALL))
def test_observers_see_what_is_computed(source, block_bytes):
    """Passes add up to the routed sum, the block's parts to the next hidden state; tokens and gates are the routing's."""
    run, seen, experts = LayerRun(source, block_bytes=block_bytes), Seen(), Reference(source.path)
    after: dict[int, Tensor] = {}
    start = State(run.embed(text(2, 150)), observer=seen.observer)
    final(run, [start], done=lambda at: after.update({at.done - 1: at.states["0"].hidden_BTD.flatten(0, 1)}))
    moe_layers = source.architecture.moe_layers
    assert [r.layer for r in seen.routings] == [b.layer for b, _ in seen.blocks] == list(moe_layers)
    scale = source.family.arithmetic.routed_scale(source.family.text(source.config))
    for routing, (block, h_TD) in zip(seen.routings, seen.blocks):
        routed_TD, pairs = torch.zeros_like(block.x_TD), Counter()
        for p in (p for p in seen.passes if p.layer == routing.layer):
            where = routing.experts_Tk[p.tokens_n] == p.expert
            assert torch.equal(where.sum(1), torch.ones(len(p.tokens_n), dtype=torch.int64))
            assert torch.equal(p.gates_n, routing.gates_Tk[p.tokens_n][where])
            assert torch.equal(p.x_nD, block.x_TD[p.tokens_n]) and (p.tokens_n.diff() > 0).all()
            assert apart(p.f_nD, reference_expert(experts, p)) < TOLERANCE
            routed_TD[p.tokens_n] += scale * p.gates_n[:, None] * p.f_nD
            pairs.update((int(t), p.expert) for t in p.tokens_n)
        assert pairs == Counter((t, int(e)) for t, row in enumerate(routing.experts_Tk) for e in row)
        assert apart(block.routed_TD, routed_TD) < 1e-5
        total_TD = h_TD + block.routed_TD + (0 if block.shared_TD is None else block.shared_TD)
        assert apart(total_TD, after[routing.layer]) < 1e-5
        assert torch.allclose(routing.gates_Tk.sum(1), torch.ones(300))
    assert (seen.blocks[0][0].shared_TD is None) == (source.family.wiring.shared == "")


def reference_expert(reference: Reference, seen: ExpertPass) -> Tensor:
    """transformers' own experts module, told that the tokens all chose this one with gate 1."""
    experts = reference.model.layers[seen.layer].mlp.experts
    ids = torch.full((len(seen.tokens_n), 1), seen.expert)
    with torch.no_grad():
        return experts(seen.x_nD, ids, torch.ones(len(seen.tokens_n), 1))


def test_only_selected_experts_are_read_and_each_once(source, monkeypatch):
    """One token selects two of eight experts a layer; another state that selects others adds just those."""
    run, read = LayerRun(source), Counter()
    real = Checkpoint.parts

    def spy(self: Checkpoint, linear: Linear) -> dict[str, Tensor]:
        if linear.expert is not None:
            read[linear.layer, linear.expert] += 1
        return real(self, linear)

    monkeypatch.setattr(Checkpoint, "parts", spy)
    seen = [Seen(), Seen()]
    final(run, [State(run.embed(text(1, 1, seed=s)), observer=seen[s].observer) for s in (0, 1)])
    chosen = {(r.layer, int(e)) for s in seen for r in s.routings for e in r.experts_Tk.flatten()}
    layers, top_k = len(source.architecture.moe_layers), source.architecture.top_k
    assert layers * top_k < len(chosen) <= 2 * layers * top_k
    assert read == dict.fromkeys(chosen, 3)  # gate, up, down
    assert {(p.layer, p.expert) for s in seen for p in s.passes} == chosen


# What is wrong is said


def test_nonfinite_tokens_are_counted_and_stay_in_their_row(source):
    run, tokens_BT = LayerRun(source), text(3, 50)
    clean = final(run, [State(run.embed(tokens_BT))])[0]
    hidden_BTD = run.embed(tokens_BT)
    hidden_BTD[1, 10, 0] = torch.inf
    (state,) = final(run, [State(hidden_BTD)])
    bad_BT = ~state.hidden_BTD.isfinite().all(-1)
    assert not clean.nonfinite and state.nonfinite.keys() == set(range(source.architecture.layers))
    assert state.nonfinite[source.architecture.layers - 1] == int(bad_BT.sum()) >= 40
    assert not bad_BT[[0, 2]].any()


def test_a_token_that_is_none(source):
    with pytest.raises(InputError, match=r"token ids reach from 5 to 320.* has 320 of them"):
        LayerRun(source).embed(torch.tensor([[5, 320]]))


def test_a_config_alone_cannot_run(tmp_path, source):
    (tmp_path / "config.json").write_text((source.path / "config.json").read_text())
    with pytest.raises(CheckpointError, match="has no weights"):
        LayerRun(Checkpoint.open(tmp_path))


def test_a_family_that_names_parameters_wrongly(source):
    """A parameter left out, and one that transformers does not have."""
    right = source.family.wiring.parameters

    def left_out(*a: object) -> dict[str, tuple[str, ...]]:
        return {name: disk for name, disk in right(*a).items() if name != "self_attn.o_proj.weight"}

    def misspelt(*a: object) -> dict[str, tuple[str, ...]]:
        return {name.replace("o_proj", "proj_o"): disk for name, disk in right(*a).items()}

    for wrong, named in ((left_out, "self_attn.o_proj.weight"), (misspelt, "self_attn.proj_o.weight")):
        wiring = dataclasses.replace(source.family.wiring, parameters=wrong)
        family = dataclasses.replace(source.family, wiring=wiring)
        run = LayerRun(dataclasses.replace(source, family=family))
        with pytest.raises(FamilyError, match=named):
            run.advance(0, [State(run.embed(text(1, 4)))])
