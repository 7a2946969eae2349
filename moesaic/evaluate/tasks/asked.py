"""What the harness asks of a model, as rows of tokens. Leaves out the answers' meaning (marks.py)."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...data.tokenizer import Tokenizer
from ...data.tokens import sha256_of
from ...errors import InputError
from ..scores.base import Reading

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids before, ids whose likelihood is asked for
Answer = tuple[float, bool]  # Σ ln p, and whether each id was the first choice
PADDING = 1.25  # longest over shortest row of a reading, at most; the rest is filled up


class Harnessed(TemplateLM):  # the harness takes a subclass of its own, and nothing else
    """A language model to the harness: tokenizes as it asks, and has `answer` do the rest."""

    def __init__(self, tokenizer: Tokenizer, context: int, answer: Callable[[Sequence[Pair]], list[Answer]]) -> None:
        super().__init__()
        self.words, self.context, self.answer = tokenizer, context, answer

    @property
    def eot_token_id(self) -> int:
        return int(self.words.chat.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.words.chat.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        begin = [] if self.words.bos is None or add_special_tokens is False else [self.words.bos]
        return begin + self.words.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: list[Any], **ignored: Any) -> list[Answer]:
        return self.answer([self.fitted(before, asked) for _, before, asked in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [
            [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.context, 1
                )
            ]
            for request in requests
        ]
        answers = iter(self.answer([self.fitted(*pair) for pairs in windows for pair in pairs]))
        return [sum(next(answers)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise InputError(
            f"{requests[0].task_name} generates text, and through a sweep every token would cost one; "
            "serve the export and give lm-eval its address"
        )

    def fitted(self, before: Sequence[int], asked: Sequence[int]) -> Pair:
        """The pair, cut at its front to what the model's context holds; the last id is only predicted."""
        cut = max(0, len(before) + len(asked) - (self.context + 1))
        if cut >= len(before):
            raise InputError(f"a task asks for {len(asked):,} tokens at once, and the context is {self.context:,}")
        return tuple(before[cut:]), tuple(asked)


@dataclass(frozen=True)
class Asked:
    """Tasks, and every different request of theirs: `rows` says in which reading and row each pair stands."""

    names: tuple[str, ...]
    folder: Path | None
    limit: int | None
    tokenizer: Tokenizer
    context: int
    readings: tuple[Reading, ...]
    rows: dict[Pair, tuple[str, int]]

    def run(self, answer: Callable[[Sequence[Pair]], list[Answer]]) -> dict[str, Any]:
        """The harness's own results, `answer` being the model."""
        return harness(self.names, self.folder, self.limit, Harnessed(self.tokenizer, self.context, answer))


def ask(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    vocab: int,
    context: int,
    folder: Path | None = None,
    limit: int | None = None,
) -> Asked:
    """Have the harness write down what it would ask.

    names   tasks, groups or tags, as the harness has them
    folder  of task files of your own (YAML); then the harness's are not looked for, and nothing is downloaded
    limit   of documents a task; None: all

    Raises `InputError` for a task that the harness does not have, that generates text, or that asks for
    an id which the model lacks.
    """
    pairs: dict[Pair, None] = {}

    def write_down(asked: Sequence[Pair]) -> list[Answer]:
        pairs.update(dict.fromkeys(asked))
        return [(0.0, False)] * len(asked)

    harness(names, folder, limit, Harnessed(tokenizer, context, write_down))
    readings, rows = [], {}
    for bucket in buckets(pairs):
        name = f"tasks to {len(bucket[-1][0]) + len(bucket[-1][1])}"
        readings.append(reading_of(name, bucket, tokenizer, vocab))
        rows.update({pair: (name, row) for row, pair in enumerate(bucket)})
    return Asked(
        names=tuple(names),
        folder=folder,
        limit=limit,
        tokenizer=tokenizer,
        context=context,
        readings=tuple(readings),
        rows=rows,
    )


def harness(names: Sequence[str], folder: Path | None, limit: int | None, model: TemplateLM) -> dict[str, Any]:
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        there_are = ", ".join(sorted(manager.all_tasks)[:8])
        raise InputError(f"unknown task {unknown[0]!r} in {folder or 'the harness'}; choose from {there_are}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):  # its bars: the work that takes time is not the harness's
        found = simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=0
        )
    return dict(found)


def buckets(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs by length, in lists whose longest is little longer than their shortest; no two lists end alike."""
    found: list[list[Pair]] = []
    for pair in sorted(pairs, key=lambda p: len(p[0]) + len(p[1])):
        if found and len(pair[0]) + len(pair[1]) <= max(16, PADDING * (len(found[-1][0][0]) + len(found[-1][0][1]))):
            found[-1].append(pair)
        else:
            found.append([pair])
    return found


def reading_of(name: str, bucket: Sequence[Pair], tokenizer: Tokenizer, vocab: int) -> Reading:
    """Rows filled up at their ends, where nothing that counts can see it."""
    length = len(bucket[-1][0]) + len(bucket[-1][1])
    ids_BT = torch.zeros(len(bucket), length, dtype=torch.long)
    scored_BS = torch.zeros(len(bucket), length - 1, dtype=torch.bool)
    for row, (before, asked) in enumerate(bucket):
        ids_BT[row, : len(before) + len(asked)] = torch.tensor(before + asked)
        scored_BS[row, len(before) - 1 : len(before) + len(asked) - 1] = True
    if int(ids_BT.max()) >= vocab:
        raise InputError(f"a task asks for id {int(ids_BT.max()):,}, and the model knows {vocab:,}")
    facts = {
        "convention": "requests of lm-evaluation-harness, rows filled up at their ends",
        "length": length,
        "text_sha256": {},
        "tokenizer_sha256": tokenizer.sha256,
        "ids_sha256": sha256_of(ids_BT),
    }
    return Reading(name, ids_BT, scored_BS, facts, {}, "tasks")
