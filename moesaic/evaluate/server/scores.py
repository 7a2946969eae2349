"""Scores of what a server serves, on the same rows as a sweep reads. Leaves out the wire (client.py)."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifact import read_tensors
from ...checkpoint import Checkpoint
from ...errors import InputError
from ...measure.divergence import FIELDS, Bootstrap, Divergence
from ...progress import progress
from .. import EVALUATIONS
from ..samples.prompts import Prompt
from ..samples.writing import SEED, Writer
from ..scores.base import Reading, Score, Scoring
from ..scores.perplexity import exponential
from .client import Server
from .reply import Told, Word

AT_ONCE = 4  # requests; the server batches them
NAMES = {"needle_found_export": "needle_found_served", "needle_log_p_export": "needle_log_p_served"}


def read(server: Server, readings: Sequence[Reading], word: Word, quiet: bool = False) -> tuple[list[Divergence], int]:
    """Every row of every reading through the server: what it holds of each next token. Its fields of a source are NaN.

    Also how many tokens the server puts before a row (its BOS), which a sweep does not. `word` gives a token's text.
    """
    found, before = [], set[int]()
    ask: Callable[[Sequence[int]], Told] = lambda ids: server.prompt_logprobs(ids, word)  # noqa: E731
    with progress("served", sum(len(r.ids_BT) for r in readings), "rows", quiet) as meter:
        for reading in readings:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                rows = []
                for told in pool.map(ask, reading.ids_BT.tolist()):
                    rows.append(told.tokens)
                    before.add(told.before)
                    meter.advance(1)
            found.append(divergence_of(reading, rows))
    if len(before) > 1:
        raise InputError(f"{server.url} puts a token before some rows and not before others; its figures mean nothing")
    return found, max(before, default=0)


def divergence_of(reading: Reading, rows: Sequence[Sequence[tuple[float, bool]]]) -> Divergence:
    log_p_BS = torch.tensor([[log_p for log_p, _ in row] for row in rows])
    first_BS = torch.tensor([[float(first) for _, first in row] for row in rows])
    values = {name: torch.full(log_p_BS.shape, math.nan) for name in FIELDS}
    values |= {"nll_export": -log_p_BS, "greedy_export": first_BS}
    finite_BS = log_p_BS.isfinite()
    return Divergence(reading.scored_BS, values | {"finite_source": finite_BS, "finite_export": finite_BS})


def score(
    readings: Sequence[Reading], found: Sequence[Divergence], swept: Mapping[str, Tensor] | None = None, seed: int = 0
) -> list[Score]:
    """Perplexity of texts, and needles found; with token values that a sweep left, how far the server is from it.

    swept  tensors of scores.safetensors: `served_delta_nll` is the server's −ln p less the sweep's, token by token
    """
    scores = []
    for reading, divergence in zip(readings, found):
        of = Scoring(reading, divergence, Bootstrap(divergence, seed), "served", seed)
        if reading.kind == "needle":
            told = EVALUATIONS["needle"].score(of)
            scores += [replace(s, name=NAMES[s.name]) for s in told if s.name in NAMES]
            continue
        for part, where in of.parts():
            nll = of.bootstrap.mean(divergence["nll_export"], where)
            scores.append(of.score("ppl_served", exponential(nll), "perplexity", part, where))
        ours = (swept or {}).get(f"{reading.name}.nll_export")
        if ours is not None and ours.shape == divergence.scored_BS.shape:
            known_BS = ours.isfinite().numpy()
            delta_BS = divergence["nll_export"] - ours.nan_to_num().double().numpy()
            scores.append(of.score("served_delta_nll", of.bootstrap.mean(delta_BS, known_BS), "nats", "", known_BS))
    return scores


def swept(file: Path, export: Checkpoint, readings: Sequence[Reading]) -> dict[str, Tensor]:
    """Token values that a sweep of this export left in `file`, of those readings alone that are the same rows.

    Raises `StaleError` where the sweep was of another export.
    """
    if not file.exists():
        return {}
    values, body = read_tensors(file, "token_scores", {"export": export.identity})
    known = body.get("readings", {})
    same = tuple(f"{r.name}." for r in readings if known.get(r.name) == r.identity)
    return {name: x for name, x in values.items() if name.startswith(same)}


def writer(server: Server, chat: bool) -> Writer:
    """The server as the writer of samples: by chat, or for a model without a template by plain completion."""

    def one(prompt: Prompt, new_tokens: int, temperature: float) -> str:
        more: dict[str, Any] = {"max_tokens": new_tokens, "temperature": temperature, "seed": SEED}
        if not chat:
            return server.complete(prompt.text, **more)
        tools = {"tools": list(prompt.tools)} if prompt.tools else {}
        return server.chat([{"role": "user", "content": prompt.text}], **more, **tools)

    def write(prompts: Sequence[Prompt], new_tokens: int, temperature: float) -> list[str]:
        ask: Callable[[Prompt], str] = lambda prompt: one(prompt, new_tokens, temperature)  # noqa: E731
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, prompts))

    return write
