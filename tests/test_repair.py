"""Repair: the shared expert of a cut layer takes over what is missing, is written as the source stores it, and is told.

Truths: a dense least-squares fit through the full transformers model, an export's logits, and a repair that was
not interrupted. Leaves out whether it helps a trained model (benchmarks/repair.py).
"""

import json
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
from reference import Reference, decoded
from torch import Tensor

from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet, sha256_of
from moesaic.errors import FaultError, InputError, StaleError
from moesaic.export import export
from moesaic.export.repair import RIDGE, correction, made_from, repair
from moesaic.formats import FORMATS
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.recipes.prune import Pruning, prune
from moesaic.report.facts import gather
from moesaic.report.sections import done
from moesaic.stream import STATES, LayerRun, Standing, State
from moesaic.stream.sweep import save
from moesaic.verify import verify

KEPT = {1: (0, 2, 3, 6), 2: (1, 4, 5, 7)}
WORDS = "the sum of all parts is less than one whole; def f(x): return x + 1"
DOWN = "language_model.model.layers.{}.block_sparse_moe.shared_experts.down_proj"


def some_tokens(source: Checkpoint, rows: int, seed: int) -> TokenSet:
    ids_BT = torch.randint(0, source.architecture.vocab, (rows, 48), generator=torch.Generator().manual_seed(seed))
    return TokenSet(ids_BT, torch.zeros(rows, dtype=torch.int64), ("noise",), {"ids_sha256": sha256_of(ids_BT)})


def repaired(source: Checkpoint, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    plan = Plan(source.container.name, KEPT)
    return repair(Blueprint.of(source, plan), some_tokens(source, 20, 0), some_tokens(source, 8, 1), folder, quiet=True)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("bf16") / "m3", "minimax_m3_vl", "bf16"))


@pytest.fixture(scope="module")
def fitted(m3: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("repair") / "repaired"
    return folder, *repaired(m3, folder)


@pytest.fixture(scope="module")
def made(m3, fitted, tmp_path_factory) -> Path:
    folder, digests, _ = fitted
    out = tmp_path_factory.mktemp("made") / "out"
    export(m3, Plan("mxfp8", KEPT, overlays={"repaired": digests}), out, quiet=True, overlays=folder.parent)
    return out


def dense_fit(path: Path, ids_BT: Tensor, store: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Layer -> the repaired matrix, by a least-squares solver on all tokens of the full model, one layer after another."""
    model, found = Reference(path), {}
    layers, biases = model.model.layers, Reference.biases(model)
    blocks: dict[str, Tensor] = {}
    for layer, kept in KEPT.items():
        mlp, down = layers[layer].mlp, layers[layer].mlp.shared_experts.down_proj
        hooks = [
            mlp.register_forward_hook(lambda _, into, out: blocks.update(out=out.flatten(0, 1).double())),
            down.register_forward_pre_hook(lambda _, into: blocks.update(h=into[0].flatten(0, -2).double())),
        ]
        model.logits(ids_BT)
        whole_TD, h_TI = blocks["out"], blocks["h"]
        biases[layer][[e for e in range(8) if e not in kept]] = -1e9
        model.logits(ids_BT)
        for hook in hooks:
            hook.remove()
        ridge = float(RIDGE * h_TI.square().sum(0).mean()) ** 0.5
        a = torch.cat([h_TI, ridge * torch.eye(h_TI.shape[1])]).numpy()
        b = torch.cat([whole_TD - blocks["out"], torch.zeros(h_TI.shape[1], whole_TD.shape[1])]).numpy()
        down.weight.data = store(down.weight + torch.from_numpy(np.linalg.lstsq(a, b)[0]).T.float())
        found[layer] = down.weight.data
    return found


def mxfp8(w_OI: Tensor) -> Tensor:
    format = FORMATS["mxfp8"]
    return format.decode(format.encode(w_OI, scales := format.scales(w_OI)), scales)


def test_a_correction_is_the_ridge_regression_of_what_lacks():
    """By hand: one hidden unit that is always 1, λ = RIDGE · T: the mean of what lacks, shrunk by 1 + RIDGE."""
    h_TI, lacking_TO = torch.ones(4, 1), torch.tensor([[1.0, -2.0], [3.0, -2.0], [1.0, -2.0], [3.0, -2.0]])
    wanted_OI = torch.tensor([[2.0], [-2.0]]) / (1 + RIDGE)
    assert torch.allclose(correction(h_TI, lacking_TO, 1 << 20), wanted_OI)
    assert torch.allclose(correction(h_TI, lacking_TO, 1), wanted_OI), "a token at a time"


@pytest.mark.parametrize("kind", ["m3", "bf16"])
def test_every_matrix_is_that_of_a_dense_fit_through_the_full_model(request, tmp_path, kind):
    source = request.getfixturevalue(kind)
    digests, facts = repaired(source, tmp_path / "repaired")
    assert list(digests) == [DOWN.format(layer) for layer in KEPT] and facts["matrices"] == 2
    plan = Plan(source.container.name, KEPT, overlays={"repaired": digests})
    export(source, plan, tmp_path / "out", quiet=True, overlays=tmp_path)
    store = mxfp8 if kind == "m3" else lambda w_OI: w_OI.bfloat16().float()
    wanted = dense_fit(source.path, some_tokens(source, 20, 0).ids_BT, store)
    after, before = decoded(tmp_path / "out"), decoded(source.path)
    for layer, w_OI in wanted.items():
        name = f"{DOWN.format(layer)}.weight"
        moved = float((after[name] - before[name]).norm())
        assert float((after[name] - w_OI).norm()) < 0.02 * moved, "but for weights on the edge between two codes"


def test_the_figures_are_those_of_the_exports(m3, fitted, made, tmp_path):
    """KL of both models by transformers alone."""
    _, _, facts = fitted
    export(m3, Plan("mxfp8", KEPT), tmp_path / "cut", quiet=True)
    ids_BT = some_tokens(m3, 8, 1).ids_BT
    log_p, *others = (
        Reference(p).logits(ids_BT)[:, :-1].double().log_softmax(-1) for p in (m3.path, tmp_path / "cut", made)
    )
    kl = [(log_p.exp() * (log_p - log_q)).sum(-1).mean().item() for log_q in others]
    assert facts["cut_nats"]["value"] == pytest.approx(kl[0], rel=1e-3)
    assert facts["repaired_nats"]["value"] == pytest.approx(kl[1], rel=1e-3)
    assert facts["change_nats"]["value"] == pytest.approx(kl[1] - kl[0], rel=1e-2)
    assert facts["kept"] and facts["change_nats"]["high"] < 0
    assert (facts["tokens"], facts["fitted_tokens"], facts["rows"]) == (8 * 47, 20 * 48, 8)


def test_nothing_but_the_repaired_matrices_differs_from_a_plain_cut(m3, made, tmp_path):
    export(m3, Plan("mxfp8", KEPT), tmp_path / "cut", quiet=True)
    a, b = Checkpoint.open(tmp_path / "cut"), Checkpoint.open(made)
    assert {n: s.info for n, s in a.stored.items()} == {n: s.info for n, s in b.stored.items()}
    changed = {n for n in a.stored if not torch.equal(*(x.read(n).view(torch.uint8) for x in (a, b)))}
    assert {n.rsplit(".", 1)[0] for n in changed} == {DOWN.format(layer) for layer in KEPT}
    assert (tmp_path / "cut" / "config.json").read_bytes() == (made / "config.json").read_bytes()
    assert "overlays" not in json.loads((tmp_path / "cut" / "moesaic" / "plan.json").read_text())


def test_too_few_rows_to_tell_leave_it_out(m3, fitted, tmp_path):
    folder = Path(shutil.copytree(fitted[0], tmp_path / "repaired"))
    (folder / "repair.json").unlink()
    plan, rows = Plan("mxfp8", KEPT), some_tokens(m3, 3, 1)
    digests, facts = repair(Blueprint.of(m3, plan), some_tokens(m3, 20, 0), rows, folder, quiet=True)
    assert digests == {} and not facts["kept"] and facts["change_nats"]["value"] < 0


def test_a_layer_that_was_passed_over_is_noticed(m3, tmp_path):
    """A saved state, as a fault would leave it, that is behind layer 1 and has no matrix of it."""
    plan, tokens = Plan("mxfp8", KEPT), some_tokens(m3, 8, 0)
    inputs = made_from(m3, plan, tokens.take(range(tokens.rows)))
    behind = Standing({"cut": State(LayerRun(m3).embed(tokens.ids_BT))}, {"groups": []}, done=2)
    save(tmp_path / STATES, behind, inputs)
    with pytest.raises(FaultError, match="1 of 2 shared experts were fitted"):
        repair(Blueprint.of(m3, plan), tokens, some_tokens(m3, 3, 1), tmp_path, quiet=True)


# Verify -----------------------------------------------------------------------------------------------------------


def test_a_repaired_export_verifies_and_says_so(m3, made):
    verdict = verify(made, m3, quiet=True)
    assert verdict.holds and verdict.compared["overlay"] == 4, "codes and scales of two matrices"
    assert verdict.compared["codes"] == verdict.compared["near"] == 0


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_a_flipped_bit_in_a_repaired_matrix_is_found(m3, made, tmp_path, part):
    broken = Path(shutil.copytree(made, tmp_path / "broken"))
    flip(broken, f"{DOWN.format(1)}.{part}")
    findings = verify(broken, m3, quiet=True).findings
    assert ("overlay", DOWN.format(1)) in [(f.check, f.where) for f in findings]
    assert {f.check for f in findings} == {"overlay", "digest"}


def test_another_changed_matrix_is_found_beside_the_repaired_ones(m3, made, tmp_path):
    broken, gate = Path(shutil.copytree(made, tmp_path / "broken")), DOWN.format(1).replace("down", "gate")
    flip(broken, f"{gate}.weight")
    assert {f.check for f in verify(broken, m3, quiet=True).findings} == {"bytes", "digest"}


def test_a_plan_that_says_nothing_of_it_excuses_nothing(m3, made, tmp_path):
    """Without the digests the matrices are what they are not supposed to be: others than the source's."""
    broken = Path(shutil.copytree(made, tmp_path / "broken"))
    Plan("mxfp8", KEPT).save(broken / "moesaic" / "plan.json", {"source": m3.identity})
    findings = verify(broken, m3, quiet=True).findings
    assert {f.check for f in findings} - {"digest"} == {"bytes"}


def flip(path: Path, name: str) -> None:
    where = Checkpoint.open(path).where(name)
    with open(path / where.file, "r+b") as file:
        file.seek(where.offset + 3)
        byte = file.read(1)[0]
        file.seek(where.offset + 3)
        file.write(bytes([byte ^ 1]))


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for domain in ("code", "prose"):
        words = rng.permutation(WORDS.split() * 150)
        (folder / f"{domain}.txt").write_text("\n".join(" ".join(line) for line in words.reshape(-1, 8)))
    return folder


def test_prune_repairs_and_dies_and_goes_on(m3, data, tmp_path, capsys):
    """Killed at any write, the same command ends with the same model; and told on the terminal is what was found."""
    corpus = Corpus(data, tokens=960, length=48)

    def work(out: Path) -> Callable[[], Any]:
        return lambda: prune(m3.path, out, Pruning(4, repair=True), corpus=corpus, quiet=True)

    words = ["--data", data, "--tokens", 960, "--length", 48, "--quiet", "--repair"]
    assert main([*map(str, ["prune", m3.path, tmp_path / "whole", "--experts", 4, *words])]) == 0
    said, note = capsys.readouterr().out, json.loads((tmp_path / "whole" / "moesaic" / "prune.json").read_text())
    change = note["repair"]["change_nats"]
    assert note["repair"]["kept"] and f"({change['value']:+.4f} ± {change['error']:.4f})" in said and "; kept" in said
    assert Plan.load(tmp_path / "whole" / "moesaic" / "plan.json").overlays and note["verified"]["overlay"] == 4
    assert "Fitted the shared experts of 2 layers" in done.steps(gather(tmp_path / "whole"))[1]
    assert not list((tmp_path / "whole" / "moesaic" / "repaired").glob("*.safetensors")), "they are in the export"
    for at in (9, 5, 20):  # in the second fit, before the verdict, in the shards
        code = child(dying(work(tmp_path / "again"), at, signal.SIGKILL))
        assert code == -signal.SIGKILL
    assert child(work(tmp_path / "again")) == 0
    whole, again = (
        {n: b for n, b in contents(tmp_path / x).items() if "moesaic/" not in n} for x in ("whole", "again")
    )
    assert whole == again
    with pytest.raises(StaleError, match="by another plan"):
        prune(m3.path, tmp_path / "whole", Pruning(4), corpus=corpus, quiet=True)
    (tmp_path / "again" / "config.json").unlink()
    for shard in (tmp_path / "again").glob("*.safetensors"):
        shard.unlink()
    assert (
        prune(m3.path, tmp_path / "again", Pruning(4, repair=True), corpus=corpus, quiet=True)["verified"]["overlay"]
        == 4
    )


def test_a_model_without_a_shared_expert_is_refused_at_once(m2, data, tmp_path):
    with pytest.raises(InputError, match="has no shared expert that could stand in"):
        prune(m2.path, tmp_path / "out", Pruning(4, repair=True), corpus=Corpus(data), quiet=True)
    assert not (tmp_path / "out").exists()


def test_what_was_repaired_is_not_written_without_its_matrices(m3, fitted, tmp_path):
    plan = Plan("mxfp8", KEPT, overlays={"repaired": fitted[1]})
    with pytest.raises(InputError, match="run the stage that writes it"):
        export(m3, plan, tmp_path / "out", quiet=True)
