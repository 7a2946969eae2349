"""Asking the questions of a model, and saying of the answers what can be said without reading them.

A `Writer` answers: a checkpoint here, a server elsewhere. Leaves out the questions (prompts.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...checkpoint import Checkpoint
from ...data.tokenizer import Tokenizer
from ...generate import Decoder, Sampling, end_tokens, generate
from ...measure.divergence import Estimate
from ..repetition import looped
from ..scores.base import Score
from .prompts import PROBES, PROMPTS, Prompt

Writer = Callable[[Sequence[Prompt], int, float], list[str]]  # prompts, new tokens, temperature -> texts
ANSWER, LONG = 256, 512  # tokens
WARM = 0.7  # temperature at which a model that loops when greedy may still get out
SEED = 0


def local(checkpoint: Checkpoint, memory_bytes: int | None = None) -> Writer:
    """The model of a checkpoint as a writer; a model without a chat template goes on from the bare question.

    memory_bytes  of weights between steps; None: half of what is available
    """
    tokenizer, stop = Tokenizer.open(checkpoint.path), end_tokens(checkpoint)

    def write(prompts: Sequence[Prompt], new_tokens: int, temperature: float) -> list[str]:
        ids = [asked(tokenizer, prompt) for prompt in prompts]
        sampling = Sampling(temperature=temperature, seed=SEED, stop=stop)
        found = generate(Decoder(checkpoint, memory_bytes), ids, new_tokens, sampling)
        return [tokenizer.inner.decode(completion.ids, skip_special_tokens=False) for completion in found]

    return write


def asked(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    if not tokenizer.chat.chat_template:
        return begin + tokenizer.encode(prompt.text).tolist()
    text = tokenizer.chat.apply_chat_template(
        [{"role": "user", "content": prompt.text}],
        tools=list(prompt.tools) or None,
        tokenize=False,
        add_generation_prompt=True,
    )
    return tokenizer.encode(str(text)).tolist()


def compare(
    writers: Mapping[str, Writer], tokenizer: Tokenizer, tokens: tuple[int, int] = (ANSWER, LONG)
) -> tuple[list[Score], dict[str, Any]]:
    """Scores and samples of each writer ("source", "export", "served"), for the same questions.

    tokens  at most, of an answer and of a text that is looked through for loops
    """
    answers: dict[str, list[dict[str, Any]]] = {}
    scores: list[Score] = []
    for name, write in writers.items():
        of_it = judge(PROMPTS, write(PROMPTS, tokens[0], 0.0), 0.0, tokenizer)
        for temperature in (0.0, WARM):
            of_it += judge(PROBES, write(PROBES, tokens[1], temperature), temperature, tokenizer)
        answers[name] = of_it
        scores += marks(name, of_it)
    samples = []
    for row in zip(*answers.values()):
        shown = {key: row[0][key] for key in ("name", "prompt", "temperature")}
        each = {who: {key: a[key] for key in ("text", "right", "looped", "endless")} for who, a in zip(answers, row)}
        samples.append(shown | each)
    return scores, {"samples": samples, "seed": SEED}


def judge(
    prompts: Sequence[Prompt], texts: Sequence[str], temperature: float, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """What each text shows: whether it has all that is wanted (None: nothing is), and how much of it is a loop."""
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        loop = looped(tokenizer.encode(text).tolist())
        right = all(re.search(want, text, re.IGNORECASE) for want in prompt.wants) if prompt.wants else None
        found.append(
            {"name": prompt.name, "prompt": prompt.text, "temperature": temperature, "text": text, "right": right,
             "tokens": loop.tokens, "looped": loop.share, "endless": loop.endless}
        )  # fmt: skip
    return found


def marks(who: str, answers: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Share of answers that were right, and of all texts that end in a loop, with the mean share of tokens that only repeat."""
    rights = [a["right"] for a in answers if a["right"] is not None]
    tokens = sum(a["tokens"] for a in answers)

    def score(name: str, x: Estimate, rows: int) -> Score:
        return Score(
            reading="samples",
            name=f"{name}_{who}",
            part="",
            value=x.value,
            error=x.error,
            low=x.low,
            high=x.high,
            unit="share",
            tokens=tokens,
            rows=rows,
            activations="none",
            seed=SEED,
        )

    return [
        score("sample_right", Estimate.of_share(sum(rights), len(rights)), len(rights)),
        score("sample_endless", Estimate.of_share(sum(a["endless"] for a in answers), len(answers)), len(answers)),
        score("sample_looped", Estimate.of_rows([a["looped"] for a in answers]), len(answers)),
    ]
