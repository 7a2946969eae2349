"""A small server with OpenAI's endpoints over our own generation, for machines that have no vLLM.

One model, one process, loopback by default. Leaves out images, forced tool calls, penalties and grammars:
a request that asks for one is refused, never answered otherwise.
"""

from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from ...checkpoint import Checkpoint
from ...errors import InputError
from ...files import read_utf8
from ...generate import Decoder
from ...resources import Resources
from .app import application
from .engine import Engine
from .model import Limits, Served

CACHE_SHARE = 8
NEW_TOKENS = 4096  # of an answer, by default
CONCURRENCY = 256
SHUTDOWN_SECONDS = 5

__all__ = ["Room", "local", "read_key", "run"]


@dataclass(frozen=True)
class Room:
    """What the server may take.

    memory_bytes  of weights; None: half of what is available. What does not fit is read again when needed
    cache_bytes   of keys and values; None: an eighth of that half
    context       tokens of a prompt and its answer; None: what the model and the cache hold
    concurrency   texts in the server's hands at a time, None: 256; more are refused with 429
    new_tokens    the most of an answer
    """

    memory_bytes: int | None = None
    cache_bytes: int | None = None
    context: int | None = None
    concurrency: int | None = None
    new_tokens: int = NEW_TOKENS


NO_LIMIT = Room()


def local(checkpoint: Checkpoint, key: str | None = None, room: Room = NO_LIMIT) -> Starlette:
    """The server of one checkpoint; `key` is what every request but /health has to bring."""
    decoder = Decoder(checkpoint, room.memory_bytes)
    cache_bytes = room.cache_bytes or Resources().held_bytes(decoder.run.device) // CACHE_SHARE
    cache_tokens = cache_bytes // token_bytes(checkpoint)
    most = min(checkpoint.architecture.context, cache_tokens)
    if (room.context is not None and room.context > most) or most < 2:
        raise InputError(
            f"a context of {room.context or 2:,} tokens; the model has {checkpoint.architecture.context:,} and "
            f"{cache_bytes:,} bytes of cache hold {cache_tokens:,}; ask for less, or give more --cache"
        )
    engine = Engine(decoder, cache_tokens, room.concurrency or CONCURRENCY)
    return application(Served.of(checkpoint, Limits(room.context or most, room.new_tokens), engine), key)


def token_bytes(checkpoint: Checkpoint) -> int:
    """Keys and values of one token in F32, of every layer, and an indexer's keys."""
    s = checkpoint.family.engine.serving(checkpoint.config)
    each = s.latent_width or 2 * s.kv_heads * s.head_width
    return 4 * (s.cached_layers * each + s.index_layers * s.index_width)


def read_key(path: Path) -> str:
    """A key from a file, where no list of processes shows it."""
    key = read_utf8(path).strip()
    if not key or not key.isascii():
        raise InputError(f"{path} holds no key; wanted one line of ASCII")
    return key


def run(app: Starlette, host: str, port: int) -> None:
    """Serve until interrupted."""
    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
