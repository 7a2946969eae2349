"""vLLM 0.32 on what we say of it: its parser reads our flags, its cache has our pages, its classes have our bytes.

Needs `pytest --vllm-python PATH`. Shows nothing of activations or graphs, which take a GPU to measure.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.checkpoint import Checkpoint
from moesaic.fit import Layout, Machine, Shapes, fit
from moesaic.serve.vllm import deployment

pytestmark = pytest.mark.engines
HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def ask(request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Puts questions to one process of vllm_side.py."""
    python = request.config.getoption("--vllm-python")
    if not python:
        pytest.skip("no --vllm-python PATH was given, so vLLM is not asked")
    command = [python, str(HERE / "vllm_side.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as vllm:

        def asked(question: str, *arguments: Any) -> dict[str, Any]:
            assert vllm.stdin and vllm.stdout
            vllm.stdin.write(json.dumps([question, arguments]) + "\n")
            vllm.stdin.flush()
            answer: dict[str, Any] = json.loads(vllm.stdout.readline())
            return answer

        yield asked
        vllm.stdin.close()


def opened(name: str, folder: Path, **changes: Any) -> Checkpoint:
    """A released model as a bare config, with keys changed, or dropped where None."""
    folder.mkdir(exist_ok=True)
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("name", "devices", "kv"), [("m2.7", "4xH100", "bf16"), ("m2.7", "8xH200", "fp8"), ("m3", "16xH100", "fp8")]
)
def test_vllm_reads_our_flags(ask: Ask, tmp_path: Path, name: str, devices: str, kv: str) -> None:
    export = opened(name, tmp_path)
    facts = fit(export, Machine.parse(devices), kv=kv)
    found = deployment(export, facts)
    for rank in range(found.nodes):
        read = ask("flags", *found.words(str(tmp_path), rank, "10.0.0.1")[2:])
        for flag, value in found.flags.items():
            key = flag.removeprefix("--").replace("-", "_")
            if flag != "--served-model-name":
                wanted = "True" if value is None else str(value)
                assert wanted in (read[key], read[key].split(".")[-1]), flag
        assert read["model"] == str(tmp_path) and tmp_path.name in read["served_model_name"]
        assert (read["nnodes"], read["node_rank"]) == (str(found.nodes), str(rank))
        assert read["headless"] == str(rank > 0)


def test_vllm_refuses_a_flag_that_it_lacks(ask: Ask, tmp_path: Path) -> None:
    assert "--block-sizes" in ask("flags", str(tmp_path), "--block-sizes=128")["error"]


@pytest.mark.parametrize(
    ("name", "devices", "context", "kv"),
    [
        ("m2.7", "4xH100", 131_072, "bf16"),
        ("m2.7", "8xH100", 196_608, "fp8"),
        ("m3_mxfp8", "8xH100 NVL", 100_000, "bf16"),
        ("m3_mxfp8", "4xB200", 1_000_001, "fp8"),
    ],
)
def test_vllm_allots_our_cache(ask: Ask, tmp_path: Path, name: str, devices: str, context: int, kv: str) -> None:
    """Pages, tokens, concurrency; and, with too little, the longest context of its error."""
    export = opened(name, tmp_path / "model")
    host = opened(
        "m2.7", tmp_path / "host", max_position_embeddings=2**20
    )  # lends vLLM a config; the cache is the question's
    facts = fit(export, Machine.parse(devices), context, kv)
    s, cache = Shapes.of(export).serving, facts["cache"]
    question = {
        "context": context, "kv": kv, "bytes": cache["bytes"]["typical"], "page_tokens": cache["page_tokens"],
        "heads": max(1, s.kv_heads // facts["layout"]["devices"]), "width": s.head_width, "layers": s.cached_layers,
        "index_layers": s.index_layers, "index_width": s.index_width,
    }  # fmt: skip
    found = ask("cache", str(host.path), question)
    assert found["pages"] == cache["pages"] and found["tokens"] == cache["tokens"]
    assert found["concurrency"] == pytest.approx(cache["concurrency"], rel=1e-12)
    few = (cache["page_bytes"] * 40, 39 * cache["page_tokens"])
    error = ask("cache", str(host.path), question | {"bytes": few[0]})["error"]
    assert f"estimated maximum model length is {few[1]}." in error


@pytest.mark.parametrize(
    ("devices", "deal"), [(1, False), (4, False), (8, False), (8, True), (16, False), (16, True), (48, False)]
)
def test_vllm_creates_the_weights_that_we_count(ask: Ask, tmp_path: Path, devices: int, deal: bool) -> None:
    """Of M2.7 in BF16, the one format whose model a CPU build creates without help."""
    export = opened("m2.7", tmp_path, quantization_config=None)
    counted = Shapes.of(export).weight_bytes(Layout(devices, deal))
    assert ask("weights", str(tmp_path), devices, deal) == {"bytes": counted}
