"""Perplexity of both models, their paired difference, and the windows that a text is read in.

Perplexities compare only under one convention: same text, tokenizer, window, stride, BOS. So a reading
carries its own, with hashes, and a text is not called WikiText-2 when it is not the raw split of it.
"""

import re
from pathlib import Path

import numpy as np
import torch

from ...data.documents import Text
from ...data.tokenizer import Tokenizer
from ...data.tokens import sha256_of
from ...errors import InputError
from ...files import read_utf8
from ...measure.divergence import Estimate
from .base import Evaluation, Reading, Score, Scoring

TOKENISED = ("<unk>", " @-@ ")  # marks of the tokenised split; the raw one has neither
OPENINGS = ("= Robert Boulter =", "= Homarus gammarus =", "= Valkyria Chronicles III =")  # test, validation, train


def windows(path: str | Path, tokenizer: Tokenizer, *, vocab: int, window: int, stride: int, name: str = "") -> Reading:
    """A whole text in windows of `window` tokens that start `stride` apart; each token is predicted once at most.

    stride < window   every token but the first is predicted once, from at least window − stride before
                      it; the last window is moved back to end with the text
    stride = window   no overlap: the first token of each window is not predicted, and a rest shorter
                      than a window is left out (the convention of GPTQ and most that followed)

    Raises `InputError` for a text shorter than a window, ids that the model lacks, and a `name` (the
    file's, unless told) that claims to be WikiText-2 for text that is not the raw split.
    """
    name = name or Path(path).stem
    text = read_utf8(Path(path))
    check_name(name, text)
    if not 1 <= stride <= window or window < 2:
        raise InputError(
            f"windows of {window} tokens cannot start {stride} apart; wanted 1 ≤ stride ≤ window, window ≥ 2"
        )
    ids_N = np.concatenate([[] if tokenizer.bos is None else [tokenizer.bos], tokenizer.encode(text)]).astype(np.int64)
    if len(ids_N) < window:
        raise InputError(
            f"{path} holds {len(ids_N):,} tokens, and a window has {window:,}; give more text or less window"
        )
    if ids_N.max() >= vocab:
        raise InputError(
            f"{path} gives id {ids_N.max():,}, and the model knows {vocab:,}; use the model's own tokenizer"
        )
    starts = list(range(0, len(ids_N) - window + 1, stride))
    if stride < window and starts[-1] + window < len(ids_N):
        starts.append(len(ids_N) - window)
    ids_BT = torch.from_numpy(np.stack([ids_N[s : s + window] for s in starts]))
    predicted_BS = torch.tensor(starts)[:, None] + torch.arange(1, window)  # place in the text of what is predicted
    behind_B = torch.tensor([0, *(s + window for s in starts[:-1])])  # where the window before ended
    scored_BS = predicted_BS >= behind_B[:, None]
    facts = {
        "origin": Path(path).name,
        "convention": f"windows of {window} tokens, {stride} apart",
        "window": window,
        "stride": stride,
        "bos": "none" if tokenizer.bos is None else "first",
        "left_out_tokens": len(ids_N) - starts[-1] - window,
        "text_sha256": {name: Text(name, (text,)).sha256},
        "tokenizer_sha256": tokenizer.sha256,
        "ids_sha256": sha256_of(ids_BT),
    }
    return Reading(name, ids_BT, scored_BS, facts, {})


def check_name(name: str, text: str) -> None:
    """Refuse to call a text WikiText-2 that is not a whole raw split of it."""
    if not re.search(r"wiki(text)?[-_ ]*2", name.lower()):
        return
    found = [mark for mark in TOKENISED if mark in text]
    if found:
        raise InputError(
            f"text with {found[0].strip()!r} in it is the tokenised split, and {name!r} says WikiText-2, of which only the "
            "raw split compares with published figures; give the raw file, or another name"
        )
    if not text.lstrip().startswith(OPENINGS):
        raise InputError(
            f"{name!r} says WikiText-2, and the text opens with {text.lstrip()[:40]!r} instead of the first heading of a raw "
            "split; give the whole raw file, or another name"
        )


def score(of: Scoring) -> list[Score]:
    divergence, bootstrap = of.divergence, of.bootstrap
    nll_p, nll_q = divergence["nll_source"], divergence["nll_export"]
    found = []
    for part, where in of.parts():
        for name, nll_BS in (("ppl_source", nll_p), ("ppl_export", nll_q)):
            estimate = exponential(bootstrap.mean(nll_BS, where))
            found.append(of.score(name, estimate, "perplexity", part, where))
        paired = bootstrap.mean(nll_q - nll_p, where)
        found.append(of.score("delta_ln_ppl", paired, "nats", part, where))
        if not part:
            found.append(of.score("ppl_ratio", exponential(paired), "ratio"))
    base, other = found[0], found[1]
    if base.value is not None and other.value is not None:
        found.append(of.score("nll_correlation", bootstrap.correlation(nll_p, nll_q), "correlation"))
        slope = bootstrap.mean(other.value * nll_q - base.value * nll_p)  # the difference to first order, row by row
        shift = other.value - base.value - slope.value
        found.append(of.score("ppl_difference", slope.map(lambda x: x + shift, 1.0), "perplexity"))
    return found


def exponential(log: Estimate) -> Estimate:
    return log.map(lambda x: float(np.exp(x)), float(np.exp(log.value)))


PERPLEXITY = Evaluation(
    "perplexity",
    "perplexity of source and export on the same tokens, and the paired difference of their logarithms",
    score,
    "strided windows: Hugging Face transformers, docs/perplexity",
)
