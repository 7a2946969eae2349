"""Every family but MiniMax through every stage, as a user gives them; folders by replica.py, arithmetic by transformers."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replica
import tiny
import torch
import torch.nn.functional as F
from forward import final
from local_server import serving
from safetensors.torch import save_file
from torch import Tensor
from whole import decoded, logits, whole

from moesaic.allocate.candidates import menu_of, plan_of, uniform
from moesaic.allocate.setting import Setting
from moesaic.allocate.sizes import stored_bytes
from moesaic.calibrate.criteria.base import ordered
from moesaic.calibrate.selection import Ranking
from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.data.tokens import Tokenizer
from moesaic.errors import PlanError
from moesaic.export import export
from moesaic.families import FAMILIES, Linear
from moesaic.generate import Decoder, Sampling, end_tokens, generate
from moesaic.measure import Options, Price, Prices
from moesaic.measure.surrogate import Sums
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.serve.local import Room, local
from moesaic.stream import LayerRun, State
from moesaic.stream.backward import GatePass, Listener, retreat, tail
from moesaic.stream.router import route
from moesaic.verify import verify

KEY = "a-key-of-tests"
NAMES = tuple(sorted(replica.TINY))
FAMILY = pytest.mark.parametrize("family", NAMES)
QUICK = (
    "deepseek_v3",
    "glm4_moe",
    "qwen3_moe",
)  # which differ most; what takes long for the others is in `make test-ci`
SOME_QUICK = pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
KINDS = [(family, "bf16") for family in NAMES] + [
    ("qwen3_moe", "fp8"), ("glm4_moe", "fp8_channel"), ("deepseek_v3", "fp8"), ("kimi_k2", "fp8"), ("kimi_k25", "int4"),
]  # fmt: skip
# (container, format of experts) that engines read for these families: all, but for AutoRound under latent attention
CARRIED = [
    ("compressed_tensors", "mxfp4"), ("compressed_tensors", "fp8_block"), ("auto_round", "int4_g64"), ("mlx", "mxfp4"),
    pytest.param("compressed_tensors", "nvfp4", marks=pytest.mark.long),
    pytest.param("gptq", "int4_g128", marks=pytest.mark.long),
]  # fmt: skip
TOLERANCE = 1e-4  # on logits, whose standard deviation is about 1.3
TEXT = ("--tokens", 512, "--length", 64)

Make = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Tiny models, each written once."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def made(family: str, source: str = "bf16", **more: Any) -> Checkpoint:
        name = "-".join(map(str, (family, source, *more.values())))
        narrow = {"q_lora_rank": 128} if source == "fp8" and "q_lora_rank" in replica.text(released(family)) else {}
        return Checkpoint.open(replica.make(root / name, family, source, **narrow, **more))

    return made


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """transformers' model of a folder, loaded once."""
    root = tmp_path_factory.mktemp("whole")

    @cache
    def loaded(path: Path) -> Any:
        return whole(path, root / "-".join(path.parts[-2:]))

    return loaded


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = (f"sums {a} and {b} make {a + b}, said {c}" for a, b, c in rng.integers(0, 10**6, (1200, 3)))
    (folder / "sums.txt").write_text("\n".join(lines))
    return folder


def released(family: str) -> dict:
    return replica.released(replica.TINY[family][0])


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def ours(run: LayerRun, tokens_BT: Tensor, dropped: dict[int, list[int]] | None = None) -> Tensor:
    (state,) = final(run, [State(run.embed(tokens_BT), dropped=dropped or {})])
    return run.logits(state.hidden_BTD.flatten(0, 1)).view(*tokens_BT.shape, -1)


def go(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    code = main([*map(str, words), "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert code == 0, out + err
    found: dict = json.loads(out.strip().splitlines()[-1])
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words), "--quiet"]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# What is on disk


@pytest.mark.parametrize("name", [
    "qwen3_30b_a3b_fp8", "olmoe", "mixtral_8x22b", "glm4_7", "glm4_7_flash",
    *(pytest.param(name, marks=pytest.mark.long) for name in (
        "qwen3_30b_a3b", "qwen3_235b_a22b", "coder_480b", "glm4_air", "deepseek_v3", "kimi_k2", "kimi_k2_5",
    )),
])  # fmt: skip
def test_a_bare_config_tells_every_tensor_of_its_release(name, tmp_path, capsys):
    """Names, dtypes and shapes are those of the tables; test_replica holds their totals to published ones."""
    config = replica.released(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = {t.name: (t.dtype, t.shape) for t in Checkpoint.open(tmp_path).inventory}
    assert found == {name: kind for name, kind in replica.tensors(config).items() if not name.endswith(".inv_freq")}
    facts = go(capsys, "inspect", tmp_path)
    assert facts["bytes"] == sum(map(replica.size, found.values())) and facts["tensors"] == len(found)
    assert go(capsys, "fit", tmp_path, "--devices", "4x141GiB")["disk_bytes"] == facts["bytes"]


def test_what_a_release_leaves_out_is_not_missed(make, tmp_path):
    """GLM-4.6's MTP layer has no embedding; a folder whose config counts a layer that no file holds is taken as it is."""
    bare, full = make("glm4_moe", mtp=True, mtp_embedding=False), make("glm4_moe", mtp=True)
    assert {t.name for t in full.inventory} - {t.name for t in bare.inventory} == {
        "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight",
    }  # fmt: skip
    none = make("glm4_moe")
    for file in none.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    promised = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(promised))
    opened = Checkpoint.open(tmp_path)
    assert not opened.architecture.has_mtp and {t.name for t in opened.inventory} == {t.name for t in none.inventory}


# Arithmetic


@pytest.mark.parametrize(("family", "source"), KINDS)
def test_logits_are_those_of_transformers(make, reference, family, source):
    """Batch of 3, in one piece and, of a small buffer, in chunks of queries."""
    checkpoint, tokens_BT = make(family, source), text(3, 90)
    wanted = logits(reference(checkpoint.path), tokens_BT)
    assert (ours(LayerRun(checkpoint), tokens_BT) - wanted).abs().max() < TOLERANCE
    assert (ours(LayerRun(checkpoint, block_bytes=64 << 10), tokens_BT) - wanted).abs().max() < TOLERANCE


def test_queries_may_be_made_in_one_step(make, tmp_path):
    """Without `q_lora_rank`, as smaller models of the kind have it."""
    config = json.loads((make("deepseek_v3").path / "config.json").read_text()) | {"q_lora_rank": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = tiny.values(FAMILIES["deepseek_v3"].read(config), {}, 0, 8.0)
    save_file({name: w.contiguous() for name, w in values.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    wanted = logits(whole(tmp_path, tmp_path / "whole"), text(2, 60))
    assert (ours(LayerRun(Checkpoint.open(tmp_path)), text(2, 60)) - wanted).abs().max() < TOLERANCE


def gradient(found: dict[str, Tensor], n: Linear) -> Tensor:
    """Of one matrix, from where transformers keeps it."""
    name = n.name.removeprefix("language_model.")
    if n.expert is None:
        return found[f"{name}.weight"]
    at = f"model.layers.{n.layer}.mlp.experts."
    if n.projection == "down":
        return found[f"{at}down_proj"][n.expert]
    return found[f"{at}gate_up_proj"][n.expert].chunk(2)[n.projection == "up"]


@SOME_QUICK
def test_gradients_are_those_of_the_whole_model(make, tmp_path, family):
    """Of every matrix, and of the embedded tokens, relative to the largest of each."""
    checkpoint, ids_BT, labels_BS = make(family), text(2, 40), text(2, 39, seed=1)
    model = whole(checkpoint.path, tmp_path)
    embedded = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    logits_BSV = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum").backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    run, mine = LayerRun(checkpoint), dict[str, Tensor]()

    def add(seen: Any) -> None:
        for n, x_nI, slope_nO in zip(seen.linears, seen.x, seen.slope):
            mine[n.name] = mine.get(n.name, torch.zeros(n.shape)) + slope_nO.T @ x_nI

    hidden = [run.embed(ids_BT)]
    for layer in range(run.architecture.layers):
        hidden.append(run.advance(layer, [State(hidden[-1])])[0].hidden_BTD)
    slope_BTD = tail(run, hidden[-1], labels_BS)
    for layer in reversed(range(run.architecture.layers)):
        slope_BTD = retreat(run, layer, hidden[layer], slope_BTD, Listener(add))
    assert embedded.grad is not None
    assert (slope_BTD - embedded.grad).abs().max() < 2e-5 * embedded.grad.abs().max()
    for n in checkpoint.architecture.linears:
        wanted = gradient(truth, n)
        assert (mine.get(n.name, torch.zeros(n.shape)) - wanted).abs().max() <= 2e-5 * wanted.abs().max(), n.name


@FAMILY
def test_decoding_is_the_forward_pass(make, family):
    """Token by token over caches of two sequences of different lengths, latent ones too."""
    checkpoint, tokens_BT = make(family), text(2, 40)
    decoder, prompts = Decoder(checkpoint, device="cpu"), [tokens_BT[0, :30].tolist(), tokens_BT[1, :17].tolist()]
    found = generate(decoder, prompts, 6, Sampling())
    for prompt, answer in zip(prompts, found):
        row = torch.tensor([prompt + answer.ids])
        best = ours(LayerRun(checkpoint), row)[0, len(prompt) - 1 : -1].argmax(-1)
        assert best.tolist() == answer.ids


# Commands


@FAMILY
def test_a_cut_is_what_its_mask_computes(make, reference, data, tmp_path, capsys, family):
    """Bytes copied, config changed in one key, equal to the masked source and to transformers' model of the cut."""
    source, out = make(family), tmp_path / "cut"
    keep = source.architecture.counts[-2] if source.architecture.groups > 1 else source.architecture.experts - 3
    go(capsys, "prune", source.path, out, "--experts", keep, "--data", data, *TEXT)
    cut, tokens_BT = Checkpoint.open(out), text(2, 50)
    kept = go(capsys, "inspect", out, "--base", source.path)["kept"]
    before, after = (json.loads((path / "config.json").read_text()) for path in (source.path, out))
    assert changed_keys(before, after) == {experts_key(before)}
    for n in cut.architecture.linears:
        origin = n.name
        if n.expert is not None:
            origin = source.architecture.experts_of[n.layer, kept[str(n.layer)][n.expert]][n.projection].name
        assert torch.equal(cut.read(f"{n.name}.weight"), source.read(f"{origin}.weight"))
    gone = {int(layer): sorted(set(range(source.architecture.experts)) - set(ids)) for layer, ids in kept.items()}
    masked = ours(LayerRun(source), tokens_BT, gone)
    assert torch.allclose(masked, ours(LayerRun(cut), tokens_BT), atol=TOLERANCE)
    assert torch.allclose(masked, logits(reference(out), tokens_BT), atol=TOLERANCE)
    facts = go(capsys, "evaluate", out, "--against", source.path, "--data", data, *TEXT)
    assert facts["scores"]["router_agreement"]["value"] > 0 and facts["scores"]["kl_mean"]["value"] > 0


def changed_keys(before: dict, after: dict, at: str = "") -> set[str]:
    found = set()
    for key in before.keys() | after.keys():
        a, b = before.get(key), after.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= changed_keys(a, b, f"{at}{key}.")
        elif a != b:
            found.add(at + key)
    return found


def experts_key(config: dict) -> str:
    inner = "text_config" in config
    return ("text_config." if inner else "") + replica.experts_key(replica.text(config))


@SOME_QUICK
def test_a_budget_is_met_and_told(make, data, tmp_path, capsys, family):
    """compress: calibration, prices, pruning and rounding, export, verify, evaluate, report; then what reads its outcome."""
    source, run = make(family), tmp_path / "run"
    keep = source.architecture.counts[-2]
    whole_bytes = sum(t.bytes for t in source.inventory)
    call = ("compress", source.path, run, "--fit", f"{int(0.55 * whole_bytes)}B", "--harm", "surrogate", "--data", data)
    offer = ("--formats", "source,mxfp4,int2_g64", "--experts", keep, "--evaluation-tokens", 384)
    facts = go(capsys, *call, *offer, *TEXT)
    assert facts["bytes"] <= 0.55 * whole_bytes and facts["scores"]["kl_mean"]["value"] > 0
    assert verify(run / "model", source, quiet=True).holds
    go(capsys, "report", run, "--card", "--base-model", "someone/a-model")
    assert "<svg" in (run / "report.html").read_text()
    said = go(capsys, "serve", run / "model", "--devices", "1x24GiB", "--print", "command")["text"]
    talk = FAMILIES[family].talk((source.path / "chat_template.jinja").read_text())
    assert "vllm serve" in said and (f"--tool-call-parser {talk.tool_parser}" in said) == bool(talk.tool_parser)
    assert (f"--reasoning-parser {talk.reasoning_parser}" in said) == bool(talk.reasoning_parser)


@pytest.mark.long
@FAMILY
def test_measured_prices(make, data, tmp_path, capsys, family):
    offer = ("--harm", "measured", "--formats", "source,mxfp4,int2_g64", "--criterion", "reap", "--data", data)
    found = go(capsys, "measure", make(family).path, tmp_path / "run", *offer, *TEXT)
    assert found["totals"]["experts"]["mxfp4"] > 0 and found["totals"]["dropping"]


@pytest.mark.parametrize(("container", "format"), CARRIED)
@SOME_QUICK
def test_every_container_carries_it(make, tmp_path, capsys, family, container, format):
    source, out = make(family), tmp_path / "out"
    go(capsys, "quantize", source.path, out, "--format", format, "--rest", "bf16", "--to", container)
    export = Checkpoint.open(out)
    assert {export.formats[n.name] for n in source.architecture.linears if n.role == "experts"} == {format}
    for router in source.architecture.routers.values():
        for name in router.tensors:
            assert torch.equal(export.read(name), source.read(name)), "routers and their biases stay as they are"
    error = (ours(LayerRun(export), text(2, 50)) - ours(LayerRun(source), text(2, 50))).std()
    assert 0 < error < 1.0
    assert verify(out, source, quiet=True).holds


@pytest.mark.parametrize(("family", "source"), [kind for kind in KINDS if kind[1] != "bf16"])
def test_what_a_vendor_rounded_is_kept(make, data, tmp_path, capsys, family, source):
    """Copied by a cut, in the source's own dtypes of scales; moved to another container without rounding again."""
    given, cut, moved = make(family, source), tmp_path / "cut", tmp_path / "moved"
    keep = given.architecture.counts[-2]
    go(capsys, "prune", given.path, cut, "--experts", keep, "--data", data, *TEXT)
    kept = go(capsys, "inspect", cut, "--base", given.path)["kept"]
    opened, values = Checkpoint.open(cut), decoded(given.path)
    assert opened.container.name == given.container.name
    for n in opened.architecture.linears:
        if n.expert is not None:
            origin = given.architecture.experts_of[n.layer, kept[str(n.layer)][n.expert]][n.projection]
            assert torch.equal(opened.decode(n.name), values[f"{origin.name}.weight".removeprefix("language_model.")])
            assert {k: t.dtype for k, t in opened.parts(n).items()} == {
                k: t.dtype for k, t in given.parts(origin).items()
            }
    to = {"int4": "auto_round", "fp8": "compressed_tensors"}.get(source)
    if to is None:  # no other container has rows of FP8
        return
    go(capsys, "export", given.path, moved, "--to", to)
    again = Checkpoint.open(moved)
    for n in again.architecture.linears:
        assert torch.equal(again.decode(n.name), values[f"{n.name}.weight".removeprefix("language_model.")]), n.name


@SOME_QUICK
def test_rounding_on_text(make, data, tmp_path, capsys, family):
    words = ("--only", "linears", "--format", "int4_g64", "--rounding", "gptq", "--data", data, *TEXT)
    assert go(capsys, "quantize", make(family).path, tmp_path / "out", *words)["rendered"]
    assert verify(tmp_path / "out", make(family), quiet=True).holds


@FAMILY
def test_a_local_server_speaks_for_it(make, family):
    """What the model writes after its template's prompt, whatever special tokens it would write hidden."""
    checkpoint = make(family)
    with serving(local(checkpoint, KEY, Room(64 << 20, 4 << 20, context=400)), KEY) as server:
        answer = server.client.chat.completions.create(
            model=checkpoint.path.name, messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=12
        )
    tokenizer = Tokenizer.open(checkpoint.path)
    prompt = tokenizer.chat.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.inner.encode(prompt, add_special_tokens=False).ids
    (found,) = generate(Decoder(checkpoint, device="cpu"), [ids], 12, Sampling(stop=end_tokens(checkpoint)))
    message = answer.choices[0].message
    said = (getattr(message, "reasoning", None) or "") + (message.content or "")
    words = [tokenizer.inner.decode([id], skip_special_tokens=False) for id in found.ids]
    talk = checkpoint.family.talk(tokenizer.template)
    shown = [id for id, word in zip(found.ids, words) if word not in (*talk.think,) and not hidden(tokenizer, talk, id)]
    assert said == tokenizer.inner.decode(shown, skip_special_tokens=False)


def hidden(tokenizer: Tokenizer, talk: Any, id: int) -> bool:
    token = tokenizer.inner.get_added_tokens_decoder().get(id)
    return token is not None and token.special and token.content not in talk.words


# Groups: each keeps as many experts, because engines cut those that stay into equal groups again


def test_a_count_that_groups_do_not_divide_is_refused(make, data, tmp_path, capsys):
    source = make("deepseek_v3")  # 16 experts in 4 groups, of which a token selects 4 within 2
    for count, near in ((14, "8 and 12"), (5, "8 and 12"), (4, "8 and 12")):
        said = refused(capsys, "prune", source.path, tmp_path / "out", "--experts", count, "--data", data)
        assert f"asked to keep {count} experts; they are selected within 4 groups" in said and said.endswith(near)
    assert not (tmp_path / "out").exists()
    for command in ("compress", "allocate", "measure"):
        limit = () if command == "measure" else ("--bits", 8)
        said = refused(capsys, command, source.path, tmp_path / "run", *limit, "--experts", 14, "--data", data)
        assert said.endswith("the nearest that can be are 12 and 16")
    assert source.architecture.counts == (8, 12, 16) and make("kimi_k2").architecture.counts == tuple(range(4, 17))


def test_an_unequal_cut_is_refused(make):
    """Kept 2, 2, 4 and 4, which nobody else refuses: transformers and vLLM route within other groups, without a word."""
    source = make("deepseek_v3")
    ids = (0, 1, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15)
    plan = Plan(source.container.name, {layer: ids for layer in source.architecture.moe_layers})
    with pytest.raises(PlanError, match="layer 1 keeps 2, 2, 4, 4 experts of its groups; as many of each are wanted"):
        Blueprint.of(source, plan)


def test_what_an_unequal_cut_would_do(make, tmp_path):
    """Why that is refused, in stock transformers: equal groups compute what the mask does, unequal ones something else."""
    source, tokens_BT = make("deepseek_v3"), text(2, 50)
    for ids, same in (((0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 13, 15), True), ((0, 1, 4, 5, *range(8, 16)), False)):
        plan = Plan(source.container.name, {layer: ids for layer in source.architecture.moe_layers})
        folder = tmp_path / str(same)
        folder.mkdir()
        write_cut(source, plan, folder)
        gone = {layer: sorted(set(range(16)) - set(ids)) for layer in source.architecture.moe_layers}
        apart = (
            logits(whole(folder, tmp_path / f"{same} whole"), tokens_BT) - ours(LayerRun(source), tokens_BT, gone)
        ).abs()
        assert (float(apart.max()) < TOLERANCE) == same


def write_cut(source: Checkpoint, plan: Plan, folder: Path) -> None:
    """By hand, without a check."""
    tensors = {}
    for name in source.stored:
        w = source.read(name)
        if (layer := source.architecture.rows_of.get(name)) is not None:
            w = w[list(plan.kept[layer])]
        linear = source.architecture.by_name.get(name.removesuffix(".weight"))
        if linear is not None and linear.expert is not None:
            if linear.expert not in plan.kept[linear.layer]:
                continue
            at = plan.kept[linear.layer].index(linear.expert)
            name = name.replace(f"experts.{linear.expert}.", f"experts.{at}.")
        tensors[name] = w.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source.path / "config.json").read_text()) | {"n_routed_experts": len(plan.kept[1])}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("criterion", ("reap", "frequency", "aimer"))
def test_each_group_keeps_its_best(make, data, tmp_path, capsys, criterion):
    source, out = make("deepseek_v3"), tmp_path / "cut"
    facts = go(capsys, "prune", source.path, out, "--experts", 8, "--criterion", criterion, "--data", data, *TEXT)
    scores = json.loads((out / "moesaic" / "prune.json").read_text())["scores"]
    for score_E, ids in zip(scores, facts["kept"].values()):
        for group in range(4):
            mine = range(4 * group, 4 * group + 4)
            assert sorted(mine, key=lambda e: -score_E[e])[:2] == sorted(
                (e for e in ids if e in mine), key=lambda e: -score_E[e]
            )


@pytest.mark.parametrize("family", ("deepseek_v3", "olmoe", "qwen3_moe"))
def test_gates_after_a_cut_are_routed_anew(make, family):
    """What surrogate prices say a cut changes in a layer's gates, against routing of every token anew: dropping an expert
    that a token did not select moves it all the same where groups or a softmax over all decide."""
    run = LayerRun(make(family))
    a, layer = run.architecture, run.architecture.moe_layers[-1]
    router, order_E = run.router(layer), torch.randperm(a.experts, generator=torch.Generator().manual_seed(0)).tolist()
    order_E = ordered(-np.argsort(order_E).astype(float), np.zeros(a.experts, bool), a.groups).tolist()
    x_TD = torch.randn(200, a.hidden, generator=torch.Generator().manual_seed(1))
    seen, slope_TE = route(router, x_TD), torch.randn(200, a.experts, generator=torch.Generator().manual_seed(2))
    counts = tuple(count for count in a.counts if count < a.experts)
    sums = Sums(Options({}, counts, np.zeros((0, a.experts))), {}, order_E, run, 200)
    sums.wanted(seen)
    sums.gates(GatePass(seen, slope_TE))
    before_T = (seen.gates_Tk * slope_TE.gather(1, seen.experts_Tk)).sum(1)
    for kept in counts:
        there = route(router, x_TD, order_E[kept:])
        after_T = (there.gates_Tk * slope_TE.gather(1, there.experts_Tk)).sum(1)
        assert torch.allclose(sums.sums[layer, kept], after_T - before_T, atol=1e-6)


def test_surrogate_prices_of_grouped_experts(make, data, tmp_path, capsys):
    """What a cut changes is also felt by tokens that never selected a dropped expert: their groups' scores move."""
    offer = ("--harm", "surrogate", "--formats", "source,mxfp4", "--data", data, *TEXT)
    found = go(capsys, "measure", make("deepseek_v3").path, tmp_path / "run", *offer)
    assert set(found["totals"]["dropping"]) == {"to 12", "to 8"} and found["totals"]["dropping"]["to 8"] > 0


# One more layer, for multi-token prediction: never beside fewer experts than it has itself

MTP = pytest.mark.parametrize("family", ("glm4_moe", "deepseek_v3", "glm4_moe_lite"))


@MTP
def test_a_cut_beside_a_full_mtp_layer_is_refused_at_once(make, data, tmp_path, capsys, family):
    source = make(family, mtp=True)
    keep = source.architecture.counts[-2]
    for words in (("prune", "--experts", keep), ("compress", "--bits", 3), ("compress", "--experts", keep)):
        said = refused(capsys, words[0], source.path, tmp_path / "out", *words[1:], "--data", data)
        assert f"with {source.architecture.experts} experts of its own" in said and "--mtp drop" in said
    assert not (tmp_path / "out").exists()
    said = refused(capsys, "prune", source.path, tmp_path / "out", "--experts", keep, "--mtp", "leave", "--data", data)
    assert said.endswith("asked to leave a layer for multi-token prediction; wanted keep or drop")


@MTP
def test_mtp_dropped(make, reference, data, tmp_path, capsys, family):
    source, out, tokens_BT = make(family, mtp=True), tmp_path / "cut", text(2, 50)
    keep = source.architecture.counts[-2]
    go(capsys, "prune", source.path, out, "--experts", keep, "--mtp", "drop", "--data", data, *TEXT)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source.path, out))
    assert changed_keys(before, after) == {experts_key(before), "num_nextn_predict_layers"}
    assert after["num_nextn_predict_layers"] == 0
    behind = f"model.layers.{source.architecture.layers}."
    cut = Checkpoint.open(out)
    assert any(name.startswith(behind) for name in source.stored) and not any(n.startswith(behind) for n in cut.stored)
    assert go(capsys, "verify", out, "--source", source.path)["holds"]
    assert torch.allclose(ours(LayerRun(cut), tokens_BT), logits(reference(out), tokens_BT), atol=TOLERANCE)
    facts = go(capsys, "evaluate", out, "--against", source.path, "--data", data, *TEXT)
    assert facts["scores"]["kl_mean"]["value"] > 0


@MTP
def test_mtp_kept(make, tmp_path, capsys, family):
    """With all experts it goes along as it is, whatever becomes of the others, and no engine is told to round it."""
    source, out = make(family, mtp=True), tmp_path / "out"
    go(capsys, "quantize", source.path, out, "--format", "mxfp4", "--rest", "mxfp8")
    export, behind = Checkpoint.open(out), f"model.layers.{source.architecture.layers}."
    there = {name for name in source.stored if name.startswith(behind)}
    assert there and {name for name in export.stored if name.startswith(behind)} == there
    assert all(torch.equal(export.read(name), source.read(name)) for name in there)
    ignore = [re.compile(entry.removeprefix("re:")) for entry in export.config["quantization_config"]["ignore"]]
    for name in ("eh_proj", "shared_head.head", "mlp.gate", "self_attn.o_proj", "mlp.experts.0.gate_proj"):
        assert any(pattern.match(behind + name) for pattern in ignore), name
    assert verify(out, source, quiet=True).holds
    found = go(capsys, "fit", source.path, "--devices", "1x24GiB")
    assert found["disk_bytes"] == sum(t.bytes for t in source.inventory)
    mtp = sum(source.stored[name].info.bytes for name in there)
    assert found["device"]["weight_bytes"] == found["disk_bytes"] - mtp, "a server leaves it on the disk"


@pytest.mark.parametrize("mtp", ("keep", "drop"))
def test_bytes_with_mtp_are_those_of_the_folder(make, tmp_path, mtp):
    """What the search counts for the source's formats, beside what is written: its experts too, or nothing of it."""
    source = make("glm4_moe", mtp=True)
    a, free = source.architecture, Price(0.0, 0.0)
    setting = Setting(source, tmp_path, Ranking(mtp=mtp))
    units = {unit: {"source": free} for unit in setting.offer.units(source)}
    order_LE = np.tile(np.arange(a.experts), (len(a.moe_layers), 1))
    prices = Prices(units, {layer: {} for layer in a.moe_layers}, order_LE, tokens=0)
    menu = menu_of(setting.sized, setting.container, prices, [a.experts])
    formats, size, _ = uniform(menu, "source", 0)
    export(source, plan_of(setting, prices, formats, a.experts), tmp_path / "out", quiet=True)
    there = stored_bytes(tmp_path / "out")
    assert there <= size < 1.02 * there + 20_000


def test_vendors_fp8_of_mtp_goes_where_nothing_holds_it_only_without(make, tmp_path, capsys):
    """MLX has no FP8: what says so names the way out."""
    source = make("deepseek_v3", "fp8", mtp=True)
    call = ("quantize", source.path, tmp_path / "out", "--format", "mxfp4", "--rest", "bf16", "--to", "mlx")
    assert "layers.3." in (said := refused(capsys, *call)) and said.endswith("(--mtp drop)")
    go(capsys, *call, "--mtp", "drop")
    out = Checkpoint.open(tmp_path / "out")
    assert not out.architecture.has_mtp and out.config["num_nextn_predict_layers"] == 0
    assert "choose from keep, drop" in refused(capsys, *call, "--mtp", "leave")


@pytest.mark.parametrize(("experts", "mtp", "share"), [(6, "drop", 0.32), (8, "drop", 0.35), (8, "keep", 0.75)])
def test_a_budget_beside_mtp(make, data, tmp_path, capsys, experts, mtp, share):
    """Bytes are counted without it or with it, and what is allowed is nearly used; matrices are rounded on text."""
    source = make("glm4_moe", mtp=True)
    limit = int(share * sum(t.bytes for t in source.inventory))
    call = ("compress", source.path, tmp_path / "run", "--fit", f"{limit}B", "--harm", "surrogate")
    offer = ("--rounding", "gptq", "--formats", "source,mxfp4,int2_g64", "--experts", experts, "--mtp", mtp)
    facts = go(capsys, *call, *offer, "--evaluation-tokens", 384, "--data", data, *TEXT)
    assert 0.7 * limit < facts["bytes"] <= limit
    assert verify(tmp_path / "run" / "model", source, quiet=True).holds


# Routers


def test_a_correction_bias_in_bf16_would_show(make, reference, tmp_path):
    """It lies around 8, where BF16 has steps of a 16th: the check on logits finds such a cast."""
    for family in ("glm4_moe", "deepseek_v3", "kimi_k2"):
        source, tokens_BT = make(family), text(3, 90)
        run = LayerRun(source)
        real = run.router

        def rounded(layer: int, real: Any = real) -> Any:
            router = real(layer)
            return replace(router, correction_E=router.correction_E.bfloat16().float())

        run.router = rounded  # type: ignore[method-assign]
        assert (ours(run, tokens_BT) - logits(reference(source.path), tokens_BT)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", ("qwen3_moe", "glm4_moe", "kimi_k25"))
def test_engines_are_told_to_leave_routers(make, tmp_path, capsys, family):
    """vLLM's Qwen3 router takes the quantization config; nothing may make it one of 4 bits."""
    go(capsys, "quantize", make(family).path, tmp_path / "out", "--format", "mxfp4", "--rest", "mxfp8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gate = make(family).architecture.routers[1].weight.removesuffix(".weight")
    assert any(re.match(entry.removeprefix("re:"), gate) for entry in config["ignore"])
    targets = [t.removeprefix("re:") for group in config["config_groups"].values() for t in group["targets"]]
    assert not any(re.match(target, gate) for target in targets)
