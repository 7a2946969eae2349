"""Greedy text of stock mlx-lm and ours, of the trained small models as MLX exports: the same tokens.

Needs `--mlx-python PATH` and ../shared/testbed. mlx-lm computes in F32 here, as we do: what is left is the order of
sums. So where the tokens part, the two best logits of ours have to lie so close that this order decides.
"""

import json
import subprocess
from pathlib import Path

import loads
import pytest
from conftest import SHARED

from moesaic.checkpoint import Checkpoint
from moesaic.data.tokenizer import Tokenizer
from moesaic.export import export
from moesaic.generate import Decoder, Sampling, generate
from moesaic.plan import Plan

pytestmark = pytest.mark.engines
TESTBED = SHARED / "testbed"
NEW = 48
TIE = 1e-3  # nats between the two best tokens
PROMPTS = ("def add(a, b):", "The history of the river", "import os\n\nclass", "Let x be a number such that", "Once")
CASES = [
    ("m2", "affine4_g64", "affine8_g64"), ("m2", "affine3_g32", "affine6_g64"), ("m3", "mxfp4", "source"),
    ("m3", "affine4_g32", "source"),
]  # fmt: skip
SIDE = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
model.set_dtype(mx.float32)
found = []
for prompt in json.load(open(sys.argv[2])):
    steps = generate_step(mx.array(prompt), model, max_tokens=int(sys.argv[3]), sampler=lambda x: mx.argmax(x, axis=-1))
    found.append([int(token) for token, _ in steps])
json.dump(found, open(sys.argv[4], "w"))
"""


@pytest.mark.parametrize(("family", "experts", "rest"), CASES)
def test_mlx_writes_our_text(
    family: str, experts: str, rest: str, request: pytest.FixtureRequest, tmp_path: Path, record_property: loads.Record
) -> None:
    python = request.config.getoption("--mlx-python")
    if not python:
        pytest.skip("no --mlx-python PATH was given, so mlx-lm writes nothing")
    if not TESTBED.exists():
        pytest.skip(f"the trained models of {TESTBED} are not there, so mlx-lm writes nothing")
    source = Checkpoint.open(TESTBED / family)
    units = source.architecture.units.items()
    plan = Plan("mlx", formats={u: experts if m[0].role == "experts" else rest for u, m in units})
    out = export(source, plan, tmp_path / "out", quiet=True)
    tokenizer = Tokenizer.open(source.path)
    prompts = [[int(id) for id in tokenizer.encode(text)] for text in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    words = [python, "-c", SIDE, str(out.path), str(tmp_path / "prompts.json"), str(NEW), str(tmp_path / "found.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "found.json").read_text())
    ours = generate(Decoder(out), prompts, NEW, Sampling(logprobs=2))
    same = 0
    for completion, tokens in zip(ours, theirs):
        for token, their_id in zip(completion.tokens, tokens, strict=True):
            if token.id != their_id:
                best, second = (logprob for _, logprob in token.top)
                assert best - second < TIE, f"{token} against {their_id}"
                break
            same += 1
    assert same > 0.8 * len(PROMPTS) * NEW
    asked = len(PROMPTS) * NEW
    said = f"all {asked} greedy tokens the same" if same == asked else f"{same} of {asked} greedy tokens, then ties"
    loads.note(record_property, "mlx-lm 0.32", family, "mlx", experts, rest, said)
