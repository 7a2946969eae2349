"""The local server on a free port of loopback, and models whose words are known beforehand.

A scripted model is a real checkpoint whose layers add nothing: of its head, the row of each token points to the
embedding of the one before, so that greedy decoding walks through the script.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
import uvicorn
from openai import OpenAI
from safetensors import safe_open
from safetensors.torch import save_file
from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer

KEY = "a-key-of-tests"
ZERO = ("o_proj.weight", "w2.weight", "down_proj.weight")  # what a layer adds to the residual stream passes by these


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    port: int
    app: Starlette
    key: str | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)


@contextmanager
def serving(app: Starlette, key: str | None = None) -> Iterator[Running]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield Running(server.servers[0].sockets[0].getsockname()[1], app, key)
    finally:
        server.should_exit = True
        thread.join()


def scripted(path: Path, family: str, after: str, script: Sequence[str]) -> Path:
    """A tiny model that says `script` after the byte `after`, and then its end token. Words must not repeat."""
    assert len(set(script)) == len(script)
    tiny.make(path, family, "bf16", layers=1, shards=1, hidden_size=256)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(word, special=False) for word in script])
    tokenizer.save(str(path / "tokenizer.json"))
    chain = [tokenizer.encode(after).ids[-1], *(tokenizer.token_to_id(word) for word in script), 256]
    (shard,) = path.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if name.endswith(ZERO):
            tensor.zero_()
        if name.endswith("model.norm.weight"):
            tensor.fill_(0.0 if family == "minimax_m3_vl" else 1.0)
    (embedding,) = (t for name, t in tensors.items() if name.endswith("embed_tokens.weight"))
    (head,) = (t for name, t in tensors.items() if name.endswith("lm_head.weight"))
    embedding.copy_(torch.eye(max(embedding.shape))[: embedding.shape[0], : embedding.shape[1]])
    head.zero_()
    columns = torch.arange(len(chain) - 1)  # a column of its own for each token that is followed by another
    embedding[chain[:-1]] = torch.eye(embedding.shape[1], dtype=embedding.dtype)[columns]
    head[chain[1:], columns] = 1.0
    save_file(tensors, shard, {"format": "pt"})
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.0}))
    return path
