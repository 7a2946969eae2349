"""Generation with caches: the logits of every step are those of the full forward, and greedy text is transformers' own.

The slow truth is `LayerRun` over whole rows (held to transformers by test_stream.py). Prompts lie below and
above the 64 keys that block-sparse attention of the tiny M3 keeps.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from forward import final
from reference import Reference
from torch import Tensor
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2ForCausalLM
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError, InputError
from moesaic.generate import Batch, Decoder, Feed, Sampling, end_tokens, generate
from moesaic.generate.cache import Cache
from moesaic.generate.resident import Resident
from moesaic.generate.sampling import choose, generator, told
from moesaic.stream import LayerRun, State

TOLERANCE = 1e-4
PLENTY = 1 << 30
LENGTHS = (150, 40, 7)  # the first goes beyond the sparse budget, the second crosses it while decoding
WHOLE = {"minimax_m2": MiniMaxM2ForCausalLM, "minimax_m3_vl": MiniMaxM3VLForCausalLM}


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=numbers).tolist() for n in lengths]


def full(checkpoint: Checkpoint, tokens: Sequence[int], **differs: object) -> Tensor:
    """Logits [T, V] of a whole row by the streaming forward."""
    run = LayerRun(checkpoint, device="cpu")
    states = [State(run.embed(torch.tensor([tokens])), **differs)]  # type: ignore[arg-type]
    return run.logits(final(run, states)[0].hidden_BTD[0])


def in_steps(decoder: Decoder, rows: Sequence[Sequence[int]], caches: Sequence[Cache] | None = None) -> list[Tensor]:
    """Logits of every position of `rows`, fed together in portions of one token or many, as a seed has it."""
    numbers, caches, at = random.Random(5), caches or [Cache() for _ in rows], [0] * len(rows)
    found: list[list[Tensor]] = [[] for _ in rows]
    while going := [i for i, row in enumerate(rows) if at[i] < len(row)]:
        ends = [min(len(rows[i]), at[i] + numbers.choice((1, 1, 1, 33))) for i in going]
        hidden = decoder.step([Feed(caches[i], rows[i][at[i] : end]) for i, end in zip(going, ends)])
        for i, end, hidden_nD in zip(going, ends, hidden):
            found[i].append(decoder.logits(hidden_nD))
            at[i] = end
    return [torch.cat(parts) for parts in found]


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# Equal to the full forward ---------------------------------------------------------------------------------------


def test_every_step_equals_the_full_forward(source):
    for tokens, got_TV in zip(prompts(), in_steps(Decoder(source, PLENTY, device="cpu"), prompts())):
        assert apart(got_TV, full(source, tokens)) < TOLERANCE


def test_a_masked_and_a_changed_model_too(source):
    layer = source.architecture.moe_layers[0]
    changed = {f"layers.{layer}.experts": halved, f"layers.{layer}.o": halved}
    differs = {"dropped": {layer: (0, 3, 5)}, "changed": changed}
    rows = prompts((90, 5))
    for tokens, got_TV in zip(rows, in_steps(Decoder(source, PLENTY, device="cpu", **differs), rows)):
        assert apart(got_TV, full(source, tokens, **differs)) < TOLERANCE
    for one in differs:
        assert apart(full(source, rows[1], **{one: differs[one]}), full(source, rows[1], **differs)) > 0.01


def halved(linears: Sequence[object], values: Sequence[Tensor]) -> list[Tensor]:
    return [w_OI / 2 for w_OI in values]


def test_indexer_keys_that_were_lost_would_show(m3):
    """The same steps with the indexer's cache wiped before the last: only a sequence beyond the budget minds."""
    decoder, rows, moved = Decoder(m3, PLENTY, device="cpu"), prompts((150, 40)), []
    for tokens in rows:
        cache, want_TV = Cache(), full(m3, tokens)
        decoder.step([Feed(cache, tokens[:-1])])
        for (_, what), held in cache.held.items():
            if what == "index":
                held[:, : len(tokens) - 1].neg_()
        (hidden_nD,) = decoder.step([Feed(cache, tokens[-1:])])
        moved.append(apart(decoder.logits(hidden_nD), want_TV[-1:]))
    assert moved[0] > 0.01 and moved[1] < TOLERANCE


@pytest.mark.parametrize("family", sorted(WHOLE))
def test_greedy_text_is_that_of_transformers(family, tmp_path):
    checkpoint = Checkpoint.open(tiny.make(tmp_path / "x", family))
    reference = Reference(checkpoint.path)
    whole = WHOLE[family](reference.model.config).eval()
    whole.model = reference.model
    whole.lm_head.weight = torch.nn.Parameter(reference.head_VD)
    rows, new = prompts((60, 150, 9)), 16
    got = generate(Decoder(checkpoint, device="cpu"), rows, new)
    for tokens, completion in zip(rows, got):
        with torch.no_grad():
            want = whole.generate(
                torch.tensor([tokens]),
                max_new_tokens=new,
                do_sample=False,
                use_mtp=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert completion.ids == want[0, len(tokens) :].tolist()
        assert completion.finish == "length"


# Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_bytes", [0, 2_000_000])
def test_a_model_larger_than_memory_answers_the_same(source, memory_bytes):
    """Nothing kept; or what is dense, as far as it fits, and some experts as they are stored."""
    decoder, plenty = (Decoder(source, most, device="cpu") for most in (memory_bytes, PLENTY))
    rows = prompts((40, 3))
    for kept, all_kept in zip(in_steps(decoder, rows), in_steps(plenty, rows)):
        assert torch.equal(kept, all_kept)
    resident = decoder.resident
    assert resident.pinned_bytes + resident.passing_bytes <= memory_bytes
    assert resident.misses > plenty.resident.misses == len(plenty.resident.passing)


def test_the_least_recently_used_goes_first():
    resident = Resident(30)
    for key in "abc":
        resident.keep(key, key.upper(), 10)
    resident.keep("a", "A", 10)
    resident.keep("d", "D", 10)
    assert [resident.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert resident.pin("p", lambda: "P", lambda _: 15) == "P"
    assert [resident.get(key) for key in "abcd"] == [None, None, None, "D"]
    assert resident.pin("q", lambda: "Q", lambda _: 16) == "Q" and "q" not in resident.pinned
    resident.keep("huge", "H", 16)
    assert resident.get("huge") is None
    assert (resident.hits, resident.misses) == (1, 5)


def test_what_stays_is_not_read_again(m2, monkeypatch):
    decoder, tokens = Decoder(m2, PLENTY, device="cpu"), prompts((9,))[0]
    cache = Cache()
    decoder.logits(*decoder.step([Feed(cache, tokens)]))
    again = Cache()
    monkeypatch.setattr(LayerRun, "read_expert", lambda *_: pytest.fail("an expert was read again"))
    monkeypatch.setattr(LayerRun, "block", lambda *_: pytest.fail("a layer was built again"))
    decoder.logits(*decoder.step([Feed(again, tokens)]))


# Batches ---------------------------------------------------------------------------------------------------------


def test_a_sequence_may_join_and_leave(source):
    """What it says does not depend on who else is there, nor on the size of the portions."""
    rows = prompts((100, 30, 5, 61))
    alone = [generate(Decoder(source, device="cpu"), [row], 8)[0].ids for row in rows]
    batch = Batch(Decoder(source, PLENTY, device="cpu"), cache_tokens=250, step_tokens=24)
    passages = [batch.add(row, 8, Sampling()) for row in rows[:2]]
    steps = 0
    while batch.live or batch.waiting:
        batch.step()
        steps += 1
        if steps == 2:
            passages += [batch.add(row, 8, Sampling()) for row in rows[2:]]
            assert len(batch.waiting) == 2
            batch.drop(batch.add(rows[0], 8, Sampling()))
        assert sum(p.most_tokens for p in batch.live) <= 250
    assert [[t.id for t in p.tokens] for p in passages] == alone


def test_echoed_logprobs_are_the_prompts_own(source):
    tokens = prompts((80,))[0]
    logprobs_TV = full(source, tokens).log_softmax(-1)
    batch = Batch(Decoder(source, PLENTY, device="cpu"), 1000, step_tokens=30)
    passage = batch.add(tokens, 0, Sampling(logprobs=3, echo=True))
    while batch.live or batch.waiting:
        batch.step()
    assert [t.id for t in passage.echoed] == tokens and passage.finish == "length" and not passage.tokens
    assert passage.echoed[0].logprob is None
    for at, token in enumerate(passage.echoed[1:]):
        assert token.logprob == pytest.approx(float(logprobs_TV[at, token.id]), abs=TOLERANCE)
        assert [id for id, _ in token.top] == logprobs_TV[at].topk(3).indices.tolist()


def test_a_stop_sequence_ends_it(m2):
    row = prompts((20,))[0]
    ids = generate(Decoder(m2, device="cpu"), [row], 12)[0].ids
    pair = (ids[3], ids[4])
    (ended,) = generate(Decoder(m2, device="cpu"), [row], 12, Sampling(stop=((999,), pair)))
    assert ended.finish == "stop" and tuple(ended.ids[-2:]) == pair
    assert ended.ids == ids[: len(ended.ids)]


def test_a_batch_refuses_what_it_cannot_hold(m2):
    batch = Batch(Decoder(m2, PLENTY, device="cpu"), 100)
    for prompt, new, words in (
        ([], 1, "a prompt of 0 tokens"), ([1], -1, "go on for -1"), ([1] * 60, 41, "the cache here holds 100"),
        ([320], 1, "token 320 is not among the 320"), ([-1], 1, "token -1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            batch.add(prompt, new, Sampling())
    assert not batch.waiting and batch.step() == []


def test_where_a_model_ends(m2, m3, tmp_path):
    assert end_tokens(m2) == end_tokens(m3) == ((256,),)


# Sampling --------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    """Counts of 1,000 draws lie within 5 standard errors of what temperature, top_k and top_p leave."""
    logits_V, draws = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0]), 1000
    for sampling in (
        Sampling(1.0), Sampling(2.0), Sampling(0.5, top_k=2), Sampling(1.0, top_p=0.6), Sampling(1.0, top_p=0.9, top_k=4),
    ):  # fmt: skip
        p_V = allowed(logits_V, sampling)
        numbers = generator(7)
        found = [choose(logits_V, sampling, numbers) for _ in range(draws)]
        for id, p in enumerate(p_V):
            assert abs(found.count(id) - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)), (sampling, id)


def allowed(logits_V: Tensor, sampling: Sampling) -> list[float]:
    """The distribution by the definition, one token after another."""
    ranked = sorted(range(len(logits_V)), key=lambda id: -float(logits_V[id]))[: sampling.top_k or None]
    weights = {id: math.exp(float(logits_V[id]) / sampling.temperature) for id in ranked}
    total, kept, mass = sum(weights.values()), {}, 0.0
    for id in ranked:
        if mass >= sampling.top_p:
            break
        kept[id] = weights[id]
        mass += weights[id] / total
    return [kept.get(id, 0.0) / sum(kept.values()) for id in range(len(logits_V))]


def test_a_seed_is_kept_and_ties_go_to_the_lower_id():
    logits_V, sampling = torch.zeros(50), Sampling(1.0, seed=3)
    draws = [[choose(logits_V, sampling, n) for _ in range(20)] for n in map(generator, (3, 3, 4))]
    assert draws[0] == draws[1] != draws[2]
    assert choose(logits_V, Sampling(), generator(None)) == 0
    assert all(token.logprob == pytest.approx(-math.log(50)) for token in told(logits_V[None], [9], 2))


def test_impossible_requests_are_refused():
    for wrong in ({"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Sampling(**wrong)
    with pytest.raises(CheckpointError, match="not finite"):
        choose(torch.tensor([0.0, math.nan]), Sampling(), generator(0))


@pytest.mark.long
def test_trained_models_at_their_own_sparse_budget():
    """400 tokens, of which the trained M3's attention keeps 256."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "testbed"
    if not shared.exists():
        pytest.skip("../shared/testbed is not beside this clone")
    for name in ("m2", "m3"):
        checkpoint = Checkpoint.open(shared / name)
        tokens = torch.randint(0, 4000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
        (got_TV,) = in_steps(Decoder(checkpoint, PLENTY, device="cpu"), [tokens])
        assert apart(got_TV, full(checkpoint, tokens)) < 2e-4
