"""Perplexity in the real vLLM engine against our streaming evaluation: the trained small M2, in INT4 and INT8.

Needs `--vllm-python PATH`, the patches of ../shared/checks, and the trained model of ../shared/testbed. vLLM computes
in BF16, and its CPU kernels round activations to INT8, we compute in F32: the same model by other arithmetic. Of CPUs
only some have those kernels; on any, "reference" multiplies by what vLLM's own loaded parameters decode to.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import loads
import numpy as np
import pytest
import torch
from conftest import SHARED
from folders import write_twin
from forward import final

from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.export import export
from moesaic.plan import Plan
from moesaic.stream import LayerRun, State

pytestmark = pytest.mark.engines
MODEL, DATA, CHECKS = SHARED / "testbed" / "m2", SHARED / "data", SHARED / "checks" / "vllm"
ROWS, LENGTH = 24, 192
TWIN = "bf16"
CLOSE = 0.02  # nats a token


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    path = request.config.getoption("--vllm-python")
    if not path:
        pytest.skip("no --vllm-python PATH was given, so no engine runs")
    if missing := [p for p in (MODEL, DATA, CHECKS) if not p.exists()]:
        pytest.skip(f"{missing[0]} is not there, so no engine runs")
    return str(path)


def in_vllm(python: str, way: str, folder: Path, rows: list[list[int]]) -> np.ndarray:
    """Log-probabilities [rows, length − 1] of the engine. Skips where vLLM itself says that it has no kernel."""
    tokens, out = folder.with_suffix(".tokens.json"), folder.with_suffix(".logprobs.json")
    tokens.write_text(json.dumps(rows))
    zen = Path(python).parents[1] / "zen"  # where the environment keeps kernels for CPUs without matrix units
    environment = os.environ | {"PYTHONPATH": f"{CHECKS}:{zen}", "OMP_NUM_THREADS": "1"}
    command = [python, str(Path(__file__).with_name("vllm_perplexity.py")), way, str(folder), str(tokens), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if refusal := re.search(r"No \w+ MoE backend supports", done.stderr + done.stdout):
        pytest.skip(f"vLLM on this CPU: {refusal[0]} this model")
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return np.array(json.loads(out.read_text()))


@torch.no_grad()
def in_ours(model: Checkpoint, ids_BT: torch.Tensor) -> np.ndarray:
    run = LayerRun(model)
    (state,) = final(run, [State(run.embed(ids_BT))])
    logprobs_BTV = torch.stack([run.logits(hidden_TD).log_softmax(-1) for hidden_TD in state.hidden_BTD])
    return logprobs_BTV[:, :-1].gather(2, ids_BT[:, 1:, None])[..., 0].numpy()


@pytest.mark.parametrize("way", ["kernels", "reference"])
@pytest.mark.parametrize("format", ["int4_g128", "int8_channel", "mxfp4", TWIN])
def test_the_engine_finds_our_perplexity(
    format: str, way: str, python: str, tmp_path: Path, record_property: loads.Record
) -> None:
    source = Checkpoint.open(MODEL)
    corpus = Corpus(DATA / "heldout", DATA / "heldout", ROWS * LENGTH, LENGTH, 0)
    ids_BT = corpus.evaluation(source, tmp_path / "tokens.safetensors", ROWS * LENGTH).ids_BT
    if format == TWIN:
        decoded = {n.name: source.decode(n.name) for n in source.architecture.linears}
        write_twin(source, decoded, tmp_path / "out")
    else:
        plan = Plan("compressed_tensors", formats=dict.fromkeys(source.architecture.units, format))
        export(source, plan, tmp_path / "out", quiet=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "out" / file).write_bytes((MODEL / file).read_bytes())
    theirs, ours = (
        in_vllm(python, way, tmp_path / "out", ids_BT.tolist()),
        in_ours(Checkpoint.open(tmp_path / "out"), ids_BT),
    )
    difference = ours - theirs
    error = difference.mean(1).std(ddof=1) / len(difference) ** 0.5
    facts = {
        "format": format, "way": way, "tokens": int(theirs.size),
        "vllm_nll": float(-theirs.mean()), "our_nll": float(-ours.mean()),
        "difference": float(difference.mean()), "error": float(error), "median": float(np.median(np.abs(difference))),
    }  # fmt: skip
    record_property(loads.FIGURES, facts)
    assert theirs.shape == ours.shape == (len(ids_BT), LENGTH - 1)
    assert abs(facts["difference"]) < CLOSE, facts
    uniform = np.log(source.architecture.vocab)
    assert facts["our_nll"] < 0.8 * uniform, "a model that has learnt nothing would agree with any other"
