"""Prune as a whole: from text to a smaller folder that is the source with experts masked, in our stream and in transformers.

Ranking is redone here from the statistics on disk; logits are held to those of the unpruned model whose
dropped experts cannot be selected, and to the full transformers model filled with the pruned folder.
"""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import torch
import transformers
from children import child, contents, dying
from forward import final
from reference import Reference
from safetensors.torch import load_file
from torch import Tensor

import moesaic.recipes.prune as prune_module
from moesaic.calibrate import calibrate
from moesaic.calibrate.criteria import CRITERIA
from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet, sha256_of
from moesaic.errors import CheckError, InputError, StaleError
from moesaic.recipes.prune import EVERY, Cuts, Pruning, Ranking, preview_cuts, prune
from moesaic.stream import LayerRun, State

WORDS = "the sum of all parts is less than one whole; def f(x): return x + 1\n"
FAMILIES = ["minimax_m2", "minimax_m3_vl"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of text."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for domain in ("code", "prose"):
        words = rng.permutation(WORDS.split() * 150).reshape(-1, 8)
        (folder / f"{domain}.txt").write_text("\n".join(" ".join(line) for line in words))
    return folder


@pytest.fixture(scope="module")
def corpus(data: Path) -> Corpus:
    return Corpus(data, tokens=384, length=48)


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request, corpus, tmp_path_factory) -> tuple[Checkpoint, Path, dict[str, Any]]:
    """Source, result and facts: 5 of 8 experts."""
    root = tmp_path_factory.mktemp("pruned")
    source = Checkpoint.open(tiny.make(root / "source", request.param))
    return source, root / "out", prune(source.path, root / "out", Pruning(5), corpus=corpus, quiet=True)


def kept_of(facts: dict[str, Any]) -> dict[int, list[int]]:
    return {int(layer): ids for layer, ids in facts["kept"].items()}


def logits(checkpoint: Checkpoint, ids_BT: Tensor, dropped: dict[int, list[int]] | None = None) -> Tensor:
    run = LayerRun(checkpoint, device="cpu")
    (state,) = final(run, [State(run.embed(ids_BT), dropped or {})])
    return run.logits(state.hidden_BTD.flatten(0, 1)).view(*ids_BT.shape, -1)


def test_what_stays_is_the_best_by_the_statistics_on_disk(pruned):
    """REAP from the raw sums, ties to the lower index: a sort that anyone can read."""
    source, out, facts = pruned
    files = sorted((out / "moesaic" / "stats").rglob("[0-9]*.safetensors"))
    assert len(files) == len(source.architecture.moe_layers)
    for file, layer in zip(files, source.architecture.moe_layers):
        sums = load_file(file)
        gated, tokens = sums["gated"].sum(0).tolist(), sums["tokens"].sum(0).tolist()
        score = [g / t if t else 0.0 for g, t in zip(gated, tokens)]
        order = sorted(range(8), key=lambda e: (-score[e], e))
        assert facts["kept"][str(layer)] == sorted(order[:5])
        assert facts["margins"][str(layer)] == pytest.approx((score[order[4]] - score[order[5]]) / score[order[4]])


def test_facts_are_those_of_the_folder(pruned):
    source, out, facts = pruned
    result = Checkpoint.open(out)
    payload = sum(t.nbytes for f in out.glob("*.safetensors") for t in load_file(f).values())
    assert facts["bytes"] == payload == sum(s.info.bytes for s in result.stored.values())
    assert facts["source_bytes"] == sum(s.info.bytes for s in source.stored.values())
    assert (facts["experts"], facts["source_experts"], facts["calibration_tokens"]) == (5, 8, 384)
    assert facts["verified"]["structure"] == facts["verified"]["finite"] == len(result.inventory)
    on_disk = json.loads((out / "moesaic" / "prune.json").read_text())
    assert {k: on_disk[k] for k in facts} == json.loads(json.dumps(facts))


def test_logits_are_those_of_the_source_with_the_dropped_experts_masked(pruned):
    source, out, facts = pruned
    dropped = {layer: sorted(set(range(8)) - set(ids)) for layer, ids in kept_of(facts).items()}
    ids_BT = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(0))
    small, masked = logits(Checkpoint.open(out), ids_BT), logits(source, ids_BT, dropped)
    assert torch.allclose(small, masked, rtol=0, atol=1e-5)
    assert float((masked - logits(source, ids_BT)).abs().max()) > 0.1, "and the masked ones were in use"


def test_logits_are_those_of_transformers_with_the_same_values(pruned):
    _, out, _ = pruned
    ids_BT = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(logits(Checkpoint.open(out), ids_BT), Reference(out).logits(ids_BT), rtol=0, atol=1e-4)


def test_transformers_own_loader_takes_it_whole(pruned):
    """No key missing, none left over, no shape changed; and the experts it holds are as many as are kept."""
    source, out, _ = pruned
    nested = source.family.name == "minimax_m3_vl"
    loader = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    model, told = loader.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert {p.shape[0] for n, p in model.named_parameters() if n.endswith("mlp.experts.gate_up_proj")} == {5}


def test_another_criterion_keeps_others(pruned, corpus, tmp_path):
    """So the tests above look at a choice."""
    source, _, facts = pruned
    other = prune(source.path, tmp_path / "out", Pruning(5, Ranking("frequency")), corpus=corpus, quiet=True)
    assert other["kept"] != facts["kept"] and other["criterion"] == "frequency"


@pytest.mark.parametrize("count", [2, 7])
def test_from_the_least_count_to_the_largest(m2, corpus, tmp_path, count):
    """2 is what a token selects: every token then gets all experts there are."""
    facts = prune(m2.path, tmp_path / "out", Pruning(count, Ranking("mass", "intersection")), corpus, quiet=True)
    assert {len(ids) for ids in facts["kept"].values()} == {count} and facts["policy"] == "intersection"
    assert Checkpoint.open(tmp_path / "out").architecture.experts == count


def test_weights_alone_are_ranked_without_text(m2, corpus, tmp_path):
    nowhere = dataclasses.replace(corpus, data=Path("/nowhere"))
    facts = prune(m2.path, tmp_path / "out", Pruning(4, Ranking("aimer")), nowhere, quiet=True)
    assert facts["calibration_tokens"] == 0 and facts["verified"] and "no text was read" in facts["warnings"][0]
    values, a = Reference(m2.path).values, m2.architecture
    for layer, kept in kept_of(facts).items():
        score = []
        for e in range(a.experts):
            stem = f"{a.layer_prefix}{layer}.block_sparse_moe.experts.{e}"
            w = torch.cat([values[f"{stem}.{n}.weight"].flatten() for n in ("w1", "w2", "w3")])
            score.append(float(w.abs().mean() / w.square().mean().sqrt()))
        assert kept == sorted(sorted(range(a.experts), key=lambda e: score[e])[:4])


def test_what_a_run_gathered_is_ranked_again_without_a_sweep(m2, corpus, tmp_path, monkeypatch):
    """Two texts in one run; then other domains, and no text is read."""
    source = Checkpoint.open(m2.path)
    for seed in (0, 3):
        ids = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(seed))
        tokens = TokenSet(
            ids, torch.arange(8) // 4, ("code", "prose"), {"ids_sha256": sha256_of(ids), "tokenizer_sha256": "0"}
        )
        calibrate(source, tokens, tmp_path / "run" / "stats", quiet=True)
    monkeypatch.setattr(prune_module, "calibrate", None)
    nowhere, kept = dataclasses.replace(corpus, data=Path("/nowhere")), {}
    for name, domains in (("both", None), ("code", {"code": 1.0}), ("prose", {"prose": 1.0})):
        ranking = Ranking("frequency", domains=domains, run=tmp_path / "run")
        facts = prune(m2.path, tmp_path / name, Pruning(4, ranking), nowhere, quiet=True)
        assert facts["calibration_tokens"] == 2 * 8 * 24 and facts["statistics"] == str(tmp_path / "run")
        kept[name] = kept_of(facts)
    assert kept["code"] != kept["prose"]
    with pytest.raises(InputError, match="unknown domain 'maths' in the text; choose from code, prose"):
        prune(
            m2.path,
            tmp_path / "no",
            Pruning(4, Ranking(domains={"maths": 1.0}, run=tmp_path / "run")),
            nowhere,
            quiet=True,
        )


def test_text_is_added_until_the_choice_is_still(m2, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.calibrate.until_stable.STILL", 0.0)
    monkeypatch.setattr("moesaic.calibrate.until_stable.MOVED", 9.0)
    facts = prune(m2.path, tmp_path / "out", Pruning(4, Ranking(until_stable=True)), corpus, quiet=True)
    assert facts["settled"]["stable"] and facts["calibration_tokens"] == 384 == facts["settled"]["read_tokens"]
    assert "192 tokens were enough" in facts["settled"]["verdict"]


@pytest.fixture
def short_preview(monkeypatch):
    monkeypatch.setattr(prune_module, "PREVIEW_TOKENS", 480)


def test_a_preview_measures_every_criterion_and_draws_it(m2, corpus, tmp_path, short_preview):
    outlooks = preview_cuts(m2.path, tmp_path / "out", Cuts([5, 3], EVERY), corpus, quiet=True)
    assert {(o.candidate.criterion, o.candidate.experts) for o in outlooks} == {
        (c, k) for c in CRITERIA for k in (5, 3)
    }
    assert not list((tmp_path / "out").glob("*.safetensors")), "no model is written"
    note = json.loads((tmp_path / "out" / "moesaic" / "preview.json").read_text())
    assert len(note["candidates"]) == len(outlooks)
    for candidate in note["candidates"]:
        assert {"criterion", "experts", "tokens", "kl_nats", "perplexity", "top1", "overlap"} <= set(candidate)
        assert candidate["kl_nats"]["value"] > 0 and 0 < candidate["overlap"]["value"] < 1
    drawing = (tmp_path / "out" / "moesaic" / "preview.svg").read_text()
    root = ElementTree.fromstring(drawing)
    words = {"".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {name.replace("_", " ") for name in CRITERIA} | {"KL, nats", "acceptance overlap", "5", "3"} <= words
    assert "var(--fate-0)" in drawing and "--fate-0:" in drawing


def test_auto_picks_what_the_preview_finds_best(m2, corpus, tmp_path, short_preview):
    facts = prune(m2.path, tmp_path / "out", Pruning(4, EVERY), corpus, quiet=True)
    best = json.loads((tmp_path / "out" / "moesaic" / "preview.json").read_text())["candidates"][0]
    assert facts["criterion"] == best["criterion"]


def test_the_same_call_gives_the_same_bytes_and_the_old_folder_again(m2, corpus, tmp_path):
    def files(name: str) -> dict[str, bytes]:
        found = contents(tmp_path / name)
        return found | {
            "moesaic/prune.json": found["moesaic/prune.json"].replace(str(tmp_path / name).encode(), b"OUT")
        }

    for name in ("one", "two"):
        prune(m2.path, tmp_path / name, Pruning(4), corpus=corpus, quiet=True)
    assert files("one") == files("two")
    prune(m2.path, tmp_path / "one", Pruning(4), corpus=corpus, quiet=True)
    assert files("one") == files("two")


@pytest.mark.parametrize("sign, calls", [(signal.SIGKILL, (1, 3, 5, 40, 90, 120)), (signal.SIGINT, (2, 50))], ids=str)
def test_after_any_death_the_same_call_finishes_the_same_folder(m2, corpus, tmp_path, sign, calls):
    """In calibration, in export, between them: the folder ends as if nothing had happened."""
    out, deaths = tmp_path / "out", 0

    def work() -> None:
        prune(m2.path, out, Pruning(4), corpus=corpus, quiet=True)

    work()
    whole = contents(out)
    for at in calls:
        shutil.rmtree(out)
        deaths += child(dying(work, at, sign)) in (130, -signal.SIGKILL)
        work()
        assert contents(out) == whole, f"after death at call {at}"
    assert deaths >= len(calls) - 1


def test_interrupted_while_verifying(m2, corpus, tmp_path, monkeypatch):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prune_module, "verify", interrupted)
        prune(m2.path, tmp_path / "out", Pruning(4), corpus=corpus, quiet=True)
    assert prune(m2.path, tmp_path / "out", Pruning(4), corpus=corpus, quiet=True)["verified"]


def test_a_result_that_does_not_verify_is_an_error(m2, corpus, tmp_path, monkeypatch):
    real = prune_module.export

    def damaging(*args: Any) -> Checkpoint:
        result = real(*args)
        where = result.where("model.norm.weight")
        with open(result.path / where.file, "r+b") as f:
            f.seek(where.offset)
            f.write(b"\x12")
        return result

    monkeypatch.setattr(prune_module, "export", damaging)
    with pytest.raises(CheckError, match=r"does not verify: bytes: model\.norm\.weight differs") as caught:
        prune(m2.path, tmp_path / "out", Pruning(4), corpus=corpus, quiet=True)
    assert caught.value.exit_code == 1


# Wrong calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-1, 0, 1, 8, 9])
def test_a_count_that_cannot_be(m2, corpus, tmp_path, count):
    sentence = (
        f"asked to keep {count} experts; wanted at least 2, which each token selects, and fewer than the 8 there are"
    )
    with pytest.raises(InputError, match=sentence):
        prune(m2.path, tmp_path / "out", Pruning(count), corpus=corpus, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "criterion, policy, sentence",
    [("luck", "pooled", "unknown criterion 'luck'"), ("reap", "vote", "unknown domain policy 'vote'")],
)
def test_a_name_that_there_is_not_is_said_before_the_hours(m2, corpus, tmp_path, criterion, policy, sentence):
    with pytest.raises(InputError, match=sentence):
        prune(m2.path, tmp_path / "out", Pruning(4, Ranking(criterion, policy)), corpus, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken(m2, m3, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and was not written by moesaic"):
        prune(m2.path, tmp_path / "out", Pruning(4), corpus=corpus, quiet=True)
    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}
    prune(m2.path, tmp_path / "mine", Pruning(4), corpus=corpus, quiet=True)
    before = contents(tmp_path / "mine")
    with pytest.raises(InputError, match="mine holds an export of 4 experts a layer; name another folder or remove it"):
        prune(m2.path, tmp_path / "mine", Pruning(5), corpus=corpus, quiet=True)
    with pytest.raises(StaleError, match="was made from source"):
        prune(m3.path, tmp_path / "mine", Pruning(4), corpus=corpus, quiet=True)
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"data": Path("/nowhere")}, "/nowhere is not a folder; wanted text, one domain a file"),
        ({"tokens": 10}, "asked for 10 tokens in rows of 48; wanted at least one row"),
        ({"tokens": 10**7}, r"asked for 208,333 rows, and the text holds \d+"),
        ({"length": 5000, "tokens": 10_000}, "rows of 5,000 tokens are longer than the model's context, 4,096"),
        ({"length": 1}, "rows of 1 tokens; wanted at least 1 row of 2"),
    ],
)
def test_text_that_will_not_do(m2, corpus, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        prune(m2.path, tmp_path / "out", Pruning(4), corpus=dataclasses.replace(corpus, **change), quiet=True)
