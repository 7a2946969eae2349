"""Latency and memory of the local server, with experts in memory and from disk, beside `transformers serve`.

    python benchmarks/serve.py ../shared/testbed/m3 [--prompt 256] [--new 32] [--memory 0 4GB] [--clients 1 8]
                               [--peer PROGRAM]

Each server is a process of its own, asked for a chat answer as a stream. Told of each: seconds to the first token,
median seconds between tokens after it, tokens a second of all clients together, and the largest resident memory of
the process. A first request, which is not counted, warms what can be warm. "From disk" (`--memory 0`) reads through
the system's page cache, which on a machine with room to spare is memory too. PROGRAM is the
`transformers` of an environment that has its `serving` extra. Text is the standard library's source.
"""

import argparse
import asyncio
import itertools
import json
import re
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from tokenizers import Tokenizer

START_SECONDS = 300


def prompt_of(model: Path, tokens: int, start: int) -> str:
    """About so many tokens of the standard library's source, from another place for each client."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    ids = tokenizer.encode(text).ids
    return tokenizer.decode(ids[start * tokens : (start + 1) * tokens])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(model: Path, way: str, port: int, peer: str | None) -> list[str]:
    if way == "transformers":
        return [str(peer), "serve", str(model), "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    words = [sys.executable, "-m", "moesaic", "serve", str(model), "--engine", "local", "--port", str(port)]
    return [*words, "--memory", way]


async def ask(client: AsyncOpenAI, name: str, prompt: str, new: int, extra: dict[str, Any]) -> list[float]:
    """Seconds from the request to each piece of its answer that came with a token of its own."""
    started, times = time.perf_counter(), []
    stream = await client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": prompt}], max_tokens=new, temperature=0, stream=True,
        extra_body=extra,
    )  # fmt: skip
    async for chunk in stream:
        delta: Any = chunk.choices[0].delta if chunk.choices else None
        if delta is not None and (delta.content or chunk.choices[0].logprobs):
            times.append(time.perf_counter() - started)
    return times


async def measure(url: str, name: str, prompts: list[str], new: int, extra: dict[str, Any]) -> dict[str, float]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=1200, max_retries=0) as client:
        await ask(client, name, prompts[0], 2, extra)
        started = time.perf_counter()
        found = await asyncio.gather(*(ask(client, name, prompt, new, extra) for prompt in prompts))
    seconds = time.perf_counter() - started
    gaps = [b - a for times in found for a, b in itertools.pairwise(times)]
    return {
        "first_token_seconds": statistics.median(times[0] for times in found),
        "token_seconds": statistics.median(gaps) if gaps else float("nan"),
        "tokens_per_second": sum(map(len, found)) / seconds,
        "tokens": sum(map(len, found)),
    }


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def serve(model: Path, way: str, peer: str | None, prompts: list[str], new: int) -> dict[str, Any]:
    port = free_port()
    process = subprocess.Popen(command(model, way, port, peer), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{way}: the server did not start") from None
                time.sleep(0.2)
        name = str(model) if way == "transformers" else model.resolve().name
        # The peer refuses fields that it does not know; ours sends a piece with every token where logprobs are asked for.
        extra = {} if way == "transformers" else {"ignore_eos": True, "logprobs": True}
        figures = asyncio.run(measure(f"http://127.0.0.1:{port}", name, prompts, new, extra))
        return {"server": way, "clients": len(prompts), **figures, "peak_bytes": peak_bytes(process.pid)}
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model", type=Path)
    p.add_argument("--prompt", type=int, default=256, metavar="TOKENS")
    p.add_argument("--new", type=int, default=32, metavar="TOKENS")
    p.add_argument("--memory", nargs="*", default=["4GB", "0"], metavar="SIZE")
    p.add_argument("--clients", nargs="*", type=int, default=[1, 8])
    p.add_argument("--peer", metavar="PROGRAM")
    a = p.parse_args()
    for way in [*a.memory, *(["transformers"] if a.peer else [])]:
        for clients in a.clients:
            prompts = [prompt_of(a.model, a.prompt, i) for i in range(clients)]
            print(json.dumps(serve(a.model, way, a.peer, prompts, a.new)), flush=True)


if __name__ == "__main__":
    main()
