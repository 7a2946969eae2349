"""evaluate/ and divergence/lockstep.py: two full transformers models are the truth, side by side with two streams."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from reference import Reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.artifact import read_tensors
from moesaic.checkpoint import Checkpoint
from moesaic.data.documents import Text
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokens import TokenSet
from moesaic.errors import InputError, StaleError
from moesaic.evaluate import EVALUATIONS, Conditions, Reading, Scores, evaluate
from moesaic.evaluate.scores.kld import llama_text
from moesaic.evaluate.scores.perplexity import windows
from moesaic.measure.divergence import Contender, Rows, lockstep
from moesaic.stream import LayerRun


def changed(source: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Checkpoint:
    """A copy of a model folder in which each tensor is what `change` makes of it."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)
        save_file({n: change(n, t) for n, t in load_file(file).items()}, file, {"format": "pt"})
    return Checkpoint.open(out)


def noisy(name: str, stored: Tensor) -> Tensor:
    """Expert weights a quarter off, as a coarse rounding might leave them."""
    if ".experts." not in name or not name.endswith(".weight"):
        return stored
    noise = torch.randn(stored.shape, generator=torch.Generator().manual_seed(len(name)))
    return (stored.float() * (1 + 0.25 * noise)).clamp(-448, 448).to(stored.dtype)


def text_rows(checkpoint: Checkpoint, rows: int = 6, length: int = 48) -> TokenSet:
    words = " ".join(f"{i} and {i * i}\n" for i in range(3000))
    texts = [Text("squares", (words,)), Text("letters", ("the quick brown fox " * 500,))]
    vocab = checkpoint.architecture.vocab
    return TokenSet.build(texts, Tokenizer.open(checkpoint.path), shape=(rows, length), vocab=vocab)


@pytest.fixture
def export(source: Checkpoint, tmp_path: Path) -> Checkpoint:
    return changed(source.path, tmp_path / "export", noisy)


def direct(source: Path, export: Path, ids_BT: Tensor) -> dict[str, float]:
    """What two whole models, both in memory, say of the same tokens; by plain torch."""
    log_p, log_q = (Reference(path).logits(ids_BT)[:, :-1].double().log_softmax(-1) for path in (source, export))
    target = ids_BT[:, 1:, None]
    nll_p, nll_q = (-x.gather(-1, target).mean().item() for x in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "kl_mean": kl.mean().item(),
        "kl_max": kl.max().item(),
        "kl_median": kl.flatten().sort().values[(kl.numel() + 1) // 2 - 1].item(),
        "ppl_source": math.exp(nll_p),
        "ppl_export": math.exp(nll_q),
        "delta_ln_ppl": nll_q - nll_p,
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
        "delta_p_rms": (log_q.gather(-1, target).exp() - log_p.gather(-1, target).exp()).square().mean().sqrt().item(),
    }


def found(scores: Scores, names: list[str]) -> dict[str, float | None]:
    values = {name: scores.find(name) for name in names}
    return {name: score.value if score is not None else None for name, score in values.items()}


def test_equal_to_two_full_models(source: Checkpoint, export: Checkpoint, tmp_path: Path) -> None:
    tokens = text_rows(source)
    scores = evaluate(source, export, [Reading.of(tokens)], tmp_path / "run", Conditions(device="cpu"), quiet=True)
    wanted = direct(source.path, export.path, tokens.ids_BT)
    assert wanted["kl_mean"] > 1e-3
    assert found(scores, list(wanted)) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["m3", "m2"])
def test_equal_to_two_full_models_that_were_trained(family: str, tmp_path: Path) -> None:
    path, text = SHARED / "testbed" / family, SHARED / "data" / "heldout" / "math.txt"
    if not path.exists() or not text.exists():
        pytest.skip("no trained models beside this clone")
    source, export = Checkpoint.open(path), changed(path, tmp_path / "export", noisy)
    texts = [Text("math", (text.read_text(),))]
    tokens = TokenSet.build(texts, Tokenizer.open(path), shape=(3, 300), vocab=4096)
    scores = evaluate(source, export, [Reading.of(tokens)], tmp_path / "run", Conditions(device="cpu"), quiet=True)
    wanted = direct(source.path, export.path, tokens.ids_BT)
    assert wanted["kl_mean"] > 1e-3
    assert found(scores, list(wanted)) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_a_model_is_no_distance_from_itself(source: Checkpoint, tmp_path: Path) -> None:
    scores = evaluate(source, source, [Reading.of(text_rows(source))], tmp_path, Conditions(device="cpu"), quiet=True)
    nothing = found(scores, ["kl_mean", "kl_max", "delta_ln_ppl", "delta_p_rms", "kl_above_1_nat"])
    assert set(nothing.values()) == {0.0} and found(scores, ["top1_agreement", "ppl_ratio"]) == {
        "top1_agreement": 1,
        "ppl_ratio": 1,
    }
    assert all(layer["relative_error"] == 0.0 for layer in scores.facts["layers"])


def test_files_hold_every_token_and_the_same_table_twice(m3: Checkpoint, tmp_path: Path) -> None:
    tokens = text_rows(m3)
    export = changed(m3.path, tmp_path / "export", noisy)
    scores = evaluate(m3, export, [Reading.of(tokens)], tmp_path, Conditions(device="cpu"), quiet=True)
    assert Scores.read(tmp_path / "scores.json", {"source": m3.identity, "export": export.identity}) == scores
    with pytest.raises(StaleError):
        Scores.read(tmp_path / "scores.json", {"export": "of another export"})
    values, _ = read_tensors(tmp_path / "scores.safetensors", "token_scores")
    assert values["text.kl_nats"].shape == (6, 47) and values["text.kl_nats"].dtype == torch.float32
    mean = scores.find("kl_mean")
    assert mean is not None and mean.value == pytest.approx(values["text.kl_nats"].double().mean().item())
    assert (mean.tokens, mean.rows, mean.part) == (6 * 47, 6, "")
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + len(scores.scores) and lines[0].startswith("reading,name,part,value,error")
    assert json.loads((tmp_path / "scores.json").read_text())["activations"] == {"none": "not rounded"}
    assert scores.facts["readings"][0]["facts"]["ids_sha256"] == tokens.facts["ids_sha256"]


def test_parts_are_what_they_say(m3: Checkpoint, tmp_path: Path) -> None:
    tokens = text_rows(m3)
    export = changed(m3.path, tmp_path / "export", noisy)
    scores = evaluate(m3, export, [Reading.of(tokens)], tmp_path, Conditions(device="cpu"), quiet=True)
    values, _ = read_tensors(tmp_path / "scores.safetensors", "token_scores")
    for i, domain in enumerate(tokens.domains):
        score = scores.find("kl_mean", part=domain)
        wanted = values["text.kl_nats"][tokens.domain_B == i].double().mean().item()
        assert score is not None and score.value == pytest.approx(wanted) and score.rows == 3
    buckets = [s for s in scores.scores if s.part.startswith("confidence")]
    assert len(buckets) == 5 and sum(s.tokens for s in buckets) == 6 * 47


def test_readings_of_different_lengths_ride_one_sweep(m2: Checkpoint, tmp_path: Path) -> None:
    short, long = Reading.of(text_rows(m2, 4, 24), "short"), Reading.of(text_rows(m2, 2, 80), "long")
    export = changed(m2.path, tmp_path / "export", noisy)
    both = evaluate(m2, export, [short, long], tmp_path / "a", Conditions(device="cpu"), quiet=True)
    for reading in (short, long):
        alone = evaluate(m2, export, [reading], tmp_path / reading.name, Conditions(device="cpu"), quiet=True)
        mine, together = (  # the noise of the floor is drawn by place in the sweep
            [s for s in of.scores if s.reading == reading.name and not s.name.startswith("floor")]
            for of in (alone, both)
        )
        assert [(s.name, s.part, s.value is None) for s in mine] == [
            (s.name, s.part, s.value is None) for s in together
        ]
        values = [[s.value for s in side if s.value is not None] for side in (mine, together)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
    with pytest.raises(InputError, match="different names"):
        evaluate(m2, export, [short, short], tmp_path, quiet=True)


def test_what_is_not_finite_is_counted_and_left_out(
    m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "check_values", lambda self: None)  # stands for values that overflow on the way
    tokens = text_rows(m3, rows=8)
    bad_id = int(tokens.ids_BT[5, 20])  # an embedding that is no number spoils its row, at least from there on

    def plant(name: str, stored: Tensor) -> Tensor:
        if name.endswith("embed_tokens.weight"):
            stored[bad_id] = torch.nan
        return noisy(name, stored)

    export = changed(m3.path, tmp_path / "export", plant)
    scores = evaluate(m3, export, [Reading.of(tokens)], tmp_path, Conditions(device="cpu"), quiet=True)
    spoilt_BT = (tokens.ids_BT == bad_id).cumsum(1) > 0
    bad_BS = read_tensors(tmp_path / "scores.safetensors", "token_scores")[0]["text.kl_nats"].isnan()
    assert bad_BS[spoilt_BT[:, :-1]].all() and not bad_BS[~spoilt_BT.any(1)].any()
    counted = scores.facts["readings"][0]
    assert counted["nonfinite"] == {"source": 0, "export": int(bad_BS.sum())}
    assert counted["tokens_counted"] == counted["tokens_scored"] - counted["nonfinite"]["export"] > 0
    assert scores.facts["layers"][-1]["nonfinite"] == {"source": 0, "export": int(bad_BS.any(1).sum() + bad_BS.sum())}
    measured = found(scores, ["kl_mean", "kl_max", "ppl_export", "ppl_source"]).values()
    assert all(value is not None and math.isfinite(value) for value in measured)


def test_nothing_finite_is_no_figure_at_all(m2: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "check_values", lambda self: None)
    ruined = changed(m2.path, tmp_path / "export", lambda n, t: t * torch.nan if n == m2.architecture.norm else t)
    scores = evaluate(m2, ruined, [Reading.of(text_rows(m2))], tmp_path, Conditions(device="cpu"), quiet=True)
    assert scores.find("kl_mean") is not None and {s.value for s in scores.scores if s.tokens == 0} == {None}
    assert "NaN" not in (tmp_path / "scores.json").read_text()


def test_the_source_kept_from_an_earlier_run_gives_the_same(m3: Checkpoint, tmp_path: Path) -> None:
    reading = Reading.of(text_rows(m3))
    export = changed(m3.path, tmp_path / "export", noisy)
    first = evaluate(m3, m3, [reading], tmp_path / "a", Conditions(cache=tmp_path / "cache", device="cpu"), quiet=True)
    assert first.find("kl_mean").value == 0  # type: ignore[union-attr]
    again = evaluate(
        m3, export, [reading], tmp_path / "b", Conditions(cache=tmp_path / "cache", device="cpu"), quiet=True
    )
    plain = evaluate(m3, export, [reading], tmp_path / "c", Conditions(device="cpu"), quiet=True)
    assert again.scores == plain.scores and len(list((tmp_path / "cache").iterdir())) == 1
    assert again.facts["layers"][0]["relative_error"] is None and plain.facts["layers"][-1]["relative_error"] > 0


def test_a_finished_evaluation_is_read_and_a_changed_option_is_swept(
    m2: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps: list[int] = []
    monkeypatch.setattr("moesaic.evaluate.lockstep", lambda *a, **more: sweeps.append(1) or lockstep(*a, **more))
    reading, go = Reading.of(text_rows(m2, 2, 24)), Conditions(device="cpu", floor=False)

    def swept(conditions: Conditions = go, rows: Reading = reading, export: Checkpoint = m2) -> tuple[int, Scores]:
        before = len(sweeps)
        scores = evaluate(m2, export, [rows], tmp_path / "run", conditions)
        return len(sweeps) - before, scores

    count, first = swept()
    first = first.add(
        [replace(first.scores[0], name="of another stage")], {"more": 1}, tmp_path / "run" / "scores.json"
    )
    capsys.readouterr()
    again, found = swept()
    assert (count, again) == (1, 0)
    assert found.scores == first.scores[:-1] and "more" not in found.facts, "what others added is theirs to add again"
    assert Scores.read(tmp_path / "run" / "scores.json").scores == found.scores
    assert "this text and these options already" in capsys.readouterr().err
    other = changed(m2.path, tmp_path / "export", lambda n, t: t * 1.5 if n == m2.architecture.norm else t)
    for change in (
        {"conditions": replace(go, floor=True)},
        {"conditions": replace(go, seed=1)},
        {"conditions": replace(go, dtype=torch.bfloat16)},
        {"conditions": replace(go, activations=("w4a4",))},
        {"conditions": replace(go, cache=tmp_path / "cache")},
        {"rows": Reading.of(text_rows(m2, 3, 24))},
        {"export": other},
    ):
        assert swept(**change)[0] == 1 and swept(**change)[0] == 0, change
    assert swept()[0] == 1, "one evaluation stands in a folder, the last"
    (tmp_path / "run" / "scores.safetensors").unlink()
    assert swept()[0] == 1


def test_interrupted_and_continued_gives_the_same(
    m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading.of(text_rows(m3))
    export = changed(m3.path, tmp_path / "export", noisy)
    plain = evaluate(m3, export, [reading], tmp_path / "plain", Conditions(device="cpu"), quiet=True)
    advance, calls = LayerRun.advance, []

    def stop(run: LayerRun, layer: int, states: list) -> list:
        calls.append((run.checkpoint.path, layer))
        if layer == 2 and run.checkpoint is export and len(calls) < 10:
            raise KeyboardInterrupt
        return advance(run, layer, states)

    monkeypatch.setattr(LayerRun, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(m3, export, [reading], tmp_path / "run", Conditions(device="cpu"), quiet=True)
    partial = tmp_path / "run" / "evaluate.partial.safetensors"
    assert partial.exists() and not (tmp_path / "run" / "scores.json").exists()
    with pytest.raises(StaleError):
        evaluate(m3, m3, [reading], tmp_path / "run", Conditions(device="cpu"), quiet=True)
    calls[:] = [(m3.path, 0)] * 10
    continued = evaluate(m3, export, [reading], tmp_path / "run", Conditions(device="cpu"), quiet=True)
    assert {layer for _, layer in calls[10:]} == {2} and not partial.exists()
    assert continued.scores == plain.scores and continued.facts["layers"] == plain.facts["layers"]


def test_models_of_other_depth_or_vocabulary_are_refused(m2: Checkpoint, m3: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one vocabulary and depth"):
        evaluate(m2, m3, [Reading.of(text_rows(m2))], tmp_path, Conditions(device="cpu"), quiet=True)


def test_small_steps_change_nothing(m3: Checkpoint, tmp_path: Path) -> None:
    reading = Reading.of(text_rows(m3))
    export = changed(m3.path, tmp_path / "export", noisy)
    found = []
    for size in (1 << 17, 1 << 26):
        runs = [LayerRun(c, "cpu", block_bytes=size) for c in (m3, export)]
        assert (len(list(runs[0].vocabulary_spans())) > 10) == (size == 1 << 17)
        outcome = lockstep(runs[0], {"none": Contender(runs[1])}, [Rows(reading.ids_BT, reading.scored_BS)])
        found.append(outcome.divergences["none"][0].values)
    for name, x in found[0].items():
        assert torch.allclose(x.float(), found[1][name].float(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 8), (64, 63), (50, 7)])
def test_windows_predict_each_token_once(m3: Checkpoint, tmp_path: Path, window: int, stride: int) -> None:
    text = tmp_path / "squares.txt"
    text.write_text(" ".join(str(i * i) for i in range(90)))
    tokenizer = Tokenizer.open(m3.path)
    ids_N = tokenizer.encode(text.read_text())
    reading = windows(text, tokenizer, vocab=m3.architecture.vocab, window=window, stride=stride)
    where = {tuple(ids_N[s : s + window]): s for s in range(len(ids_N) - window + 1)}
    starts = [where[tuple(row)] for row in reading.ids_BT.tolist()]
    times = torch.zeros(len(ids_N), dtype=torch.long)
    for start, scored_S in zip(starts, reading.scored_BS):
        times[start + 1 : start + window] += scored_S
    if stride == window:
        assert times.sum() == len(starts) * (window - 1) and times.max() == 1
        assert reading.facts["left_out_tokens"] == len(ids_N) % window
    else:
        assert times[0] == 0 and (times[1:] == 1).all() and reading.facts["left_out_tokens"] == 0
        assert all(scored_S[: window - stride - 1].sum() == 0 for scored_S in reading.scored_BS[1:])
    assert reading.facts["window"] == window and reading.facts["stride"] == stride


def test_strided_perplexity_equals_the_slow_way(m2: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "squares.txt"
    text.write_text(" ".join(str(i * i) for i in range(60)))
    tokenizer = Tokenizer.open(m2.path)
    reading = windows(text, tokenizer, vocab=m2.architecture.vocab, window=40, stride=10)
    scores = evaluate(m2, m2, [reading], tmp_path / "run", Conditions(device="cpu"), quiet=True)
    ids_N, reference, nll = torch.tensor(tokenizer.encode(text.read_text())), Reference(m2.path), []
    end_before, starts = 0, [*range(0, len(ids_N) - 40 + 1, 10)]
    for start in [*starts, *([len(ids_N) - 40] if starts[-1] + 40 < len(ids_N) else [])]:
        log_p = reference.logits(ids_N[None, start : start + 40])[0].double().log_softmax(-1)
        nll += [-log_p[p - start - 1, ids_N[p]].item() for p in range(max(end_before, start + 1), start + 40)]
        end_before = start + 40
    assert len(nll) == len(ids_N) - 1
    assert found(scores, ["ppl_source"])["ppl_source"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


@pytest.mark.parametrize("mark", ["a <unk> b", "well @-@ known"])
@pytest.mark.parametrize("name", ["wikitext-2-raw", "WikiText2", "wiki_2_test"])
def test_tokenised_text_is_not_called_wikitext_2(m3: Checkpoint, tmp_path: Path, name: str, mark: str) -> None:
    text = tmp_path / f"{name}.txt"
    text.write_text(f"{mark} " * 100)
    tokenizer, vocab = Tokenizer.open(m3.path), m3.architecture.vocab
    with pytest.raises(InputError, match="tokenised split"):
        windows(text, tokenizer, vocab=vocab, window=16, stride=16)
    assert windows(text, tokenizer, vocab=vocab, window=16, stride=16, name="encyclopedia").name == "encyclopedia"
    text.write_text("another text " * 100)
    with pytest.raises(InputError, match="opens with 'another text"):
        windows(text, tokenizer, vocab=vocab, window=16, stride=16)
    text.write_text(" \n = Robert Boulter = \n \n Robert Boulter is an English film actor . " * 20)
    assert windows(text, tokenizer, vocab=vocab, window=16, stride=16).name == name


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [(16, 17, "cannot start"), (1, 1, "cannot start"), (10_000, 16, "a window has 10,000")],
)
def test_bad_windows_are_refused(m3: Checkpoint, tmp_path: Path, window: int, stride: int, message: str) -> None:
    (tmp_path / "t.txt").write_text("some text " * 30)
    with pytest.raises(InputError, match=message):
        windows(tmp_path / "t.txt", Tokenizer.open(m3.path), vocab=m3.architecture.vocab, window=window, stride=stride)


def test_llama_labels_and_registry(m3: Checkpoint, tmp_path: Path) -> None:
    export = changed(m3.path, tmp_path / "export", noisy)
    scores = evaluate(m3, export, [Reading.of(text_rows(m3))], tmp_path, Conditions(device="cpu"), quiet=True)
    text, mean = llama_text(scores), scores.find("kl_mean")
    assert mean is not None and f"Mean    KLD: {mean.value:10.6f} ± {mean.error:10.6f}" in text
    assert all(
        label in text
        for label in ("99.9%   KLD", "Same top p", "RMS Δp", "Mean PPL(Q)", "Cor(ln(PPL(Q)), ln(PPL(base)))")
    )
    ppl, ratio, apart = (scores.find(name) for name in ("ppl_source", "ppl_ratio", "ppl_difference"))
    assert apart.value == pytest.approx(ppl.value * (ratio.value - 1)) and apart.low < apart.value < apart.high
    assert apart.error == pytest.approx(ppl.value * ratio.error, rel=0.5)  # the ratio moves it most
    unmeasured = replace(scores, scores=())
    assert "Mean    KLD: not measured" in llama_text(unmeasured)
    assert list(EVALUATIONS) == ["kld", "needle", "perplexity", "router"] and all(
        e.does and e.reference for e in EVALUATIONS.values()
    )
