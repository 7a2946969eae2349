"""Mixtral through every stage, as a user gives them: one file of its own, no correction bias, no shared expert, no vision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forward import final
from local_server import serving
from reference import Reference

from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.data.tokens import Tokenizer
from moesaic.generate import Decoder, Sampling, end_tokens, generate
from moesaic.serve.local import Room, local
from moesaic.stream import LayerRun, State
from moesaic.verify import verify

KEY = "a-key-of-tests"
CARRIED = [
    ("compressed_tensors", "mxfp4"), ("compressed_tensors", "nvfp4"), ("compressed_tensors", "fp8_block"),
    ("auto_round", "int4_g64"), ("gptq", "int4_g128"), ("mlx", "mxfp4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = (f"sums {a} and {b} make {a + b}, said {c}" for a, b, c in rng.integers(0, 10**6, (1200, 3)))
    (folder / "sums.txt").write_text("\n".join(lines))
    return folder


def go(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main([*map(str, words), "--json", "--quiet"]) == 0
    found: dict = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def logits(checkpoint: Checkpoint, tokens_BT: torch.Tensor) -> torch.Tensor:
    run = LayerRun(checkpoint)
    (state,) = final(run, [State(run.embed(tokens_BT))])
    return run.logits(state.hidden_BTD.flatten(0, 1)).view(*tokens_BT.shape, -1)


def test_a_budget_is_met_and_told(mixtral, data, tmp_path, capsys):
    """compress: both prices, pruning and rounding, export, verify, evaluate, report; then what reads its outcome."""
    text, run = ("--data", data, "--tokens", 512, "--length", 64), tmp_path / "run"
    facts = go(capsys, "inspect", mixtral.path)
    assert facts["experts"] == 8 and set(facts["roles"]) == {
        "embedding",
        "experts",
        "head",
        "norm",
        "o",
        "qkv",
        "router",
    }
    assert go(capsys, "fit", mixtral.path, "--devices", "1x24GiB")
    go(capsys, "calibrate", mixtral.path, tmp_path / "calibrated", *text)
    for harm in ("surrogate", "measured"):
        offer = ("--harm", harm, "--formats", "source,mxfp4,int2_g64", "--criterion", "reap")
        assert go(capsys, "measure", mixtral.path, tmp_path / harm, *offer, *text)
    whole = sum(t.bytes for t in mixtral.inventory)
    call = ("compress", mixtral.path, run, "--fit", f"{int(0.5 * whole)}B", "--harm", "surrogate", *text)
    facts = go(capsys, *call, "--formats", "source,mxfp4,int2_g64", "--experts", 6, "--evaluation-tokens", 384)
    assert facts["bytes"] <= 0.5 * whole and facts["scores"]["kl_mean"]["value"] > 0
    assert verify(run / "model", mixtral, quiet=True).holds
    go(capsys, "report", run, "--card", "--base-model", "mistralai/Mixtral-8x7B-v0.1")
    assert "<svg" in (run / "report.html").read_text()
    assert "mistralai/Mixtral-8x7B-v0.1" in (run / "model" / "README.md").read_text()
    said = go(capsys, "serve", run / "model", "--devices", "1x24GiB", "--print", "command")["text"]
    assert "vllm serve" in said and "parser" not in said and "auto-tool-choice" not in said


def test_a_cut_is_what_its_mask_computes(mixtral, data, tmp_path, capsys):
    """The softmax is over those that stay; streamed, decoded, and by transformers of the export's own folder."""
    go(capsys, "prune", mixtral.path, tmp_path / "cut", "--experts", 5, "--data", data, "--tokens", 512, "--length", 64)
    cut, tokens_BT = Checkpoint.open(tmp_path / "cut"), torch.arange(100).view(2, 50)
    kept = go(capsys, "inspect", cut.path, "--base", mixtral.path)["kept"]
    run = LayerRun(mixtral)
    gone = {int(layer): [e for e in range(8) if e not in ids] for layer, ids in kept.items()}
    (state,) = final(run, [State(run.embed(tokens_BT), dropped=gone)])
    masked = run.logits(state.hidden_BTD.flatten(0, 1)).view(2, 50, -1)
    assert torch.allclose(masked, logits(cut, tokens_BT), atol=1e-4)
    assert torch.allclose(logits(cut, tokens_BT), Reference(cut.path).logits(tokens_BT), atol=1e-4)
    facts = go(capsys, "evaluate", cut.path, "--against", mixtral.path, "--data", data, "--tokens", 512, "--length", 64)
    assert facts["scores"]["router_agreement"]["value"] > 0


@pytest.mark.parametrize(("container", "format"), CARRIED)
def test_every_container_carries_it(mixtral, tmp_path, capsys, container, format):
    out = tmp_path / "out"
    go(capsys, "quantize", mixtral.path, out, "--format", format, "--rest", "bf16", "--to", container)
    export = Checkpoint.open(out)
    assert {export.formats[n.name] for n in mixtral.architecture.linears if n.role == "experts"} == {format}
    gate = mixtral.architecture.routers[1].weight
    assert torch.equal(export.read(gate), mixtral.read(gate)), "a router in BF16 stays so"
    tokens_BT = torch.arange(100).view(2, 50)
    error = (logits(export, tokens_BT) - logits(mixtral, tokens_BT)).std()
    assert 0 < error < 1.0


def test_rounding_on_text(mixtral, data, tmp_path, capsys):
    words = (
        "--only",
        "linears",
        "--format",
        "int4_g64",
        "--rounding",
        "gptq",
        "--data",
        data,
        "--tokens",
        512,
        "--length",
        64,
    )
    assert go(capsys, "quantize", mixtral.path, tmp_path / "out", *words)["rendered"]
    assert verify(tmp_path / "out", mixtral, quiet=True).holds


def test_a_local_server_speaks_for_it(mixtral):
    """With no words of its own for thoughts and calls, all that it says is content."""
    prompt = "]~!b[]~b]user\nhello[e~[\n]~b]ai\n<think>\n"
    with serving(local(mixtral, KEY, Room(64 << 20, 4 << 20, context=600)), KEY) as server:
        answer = server.client.chat.completions.create(
            model=mixtral.path.name, messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=12
        )
    tokenizer = Tokenizer.open(mixtral.path)
    ids = tokenizer.inner.encode(prompt, add_special_tokens=False).ids
    (found,) = generate(Decoder(mixtral, device="cpu"), [ids], 12, Sampling(stop=end_tokens(mixtral)))
    assert answer.choices[0].message.content == tokenizer.inner.decode(found.ids)
