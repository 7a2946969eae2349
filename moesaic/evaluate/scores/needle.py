"""A number hidden in a long text, asked for at its end: how likely each model finds the answer, and whether it would say it.

Nothing is generated: the answer stands in the row, and its log-probability and greedy match are read off
the same sweep as everything else, all lengths and depths at once. Haystacks are made here, from a seed.
Each length has a control besides: a set phrase at the end of the same haystack, which any language model
finishes. Where the control fails a needle that is not found says nothing of finding. Leaves out what a
server would generate (served).
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from ...checkpoint import Checkpoint
from ...data.tokenizer import Tokenizer
from ...data.tokens import sha256_of
from ...errors import InputError
from ...measure.divergence import Estimate
from .base import Evaluation, Reading, Score, Scoring

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 4
CONTROL = "control"
WHO = (
    "the old man",
    "a young woman",
    "the grey dog",
    "a tall boy",
    "the teacher",
    "a farmer",
    "the captain",
    "a child",
)
DID = ("walked to", "looked at", "waited by", "ran past", "sat near", "thought of", "came from", "slept under")
WHAT = ("the river", "a small house", "the town hall", "an old bridge", "the green hill", "a long road", "the harbour")
WHEN = ("in the morning", "after the rain", "before dinner", "late at night", "for an hour", "again", "on Sunday")
COLOURS = ("amber", "silver", "purple", "golden", "crimson", "white", "black", "orange")
THINGS = ("lantern", "violin", "ladder", "compass", "basket", "kettle", "mirror", "saddle", "anchor", "pillow")
PHRASES = (
    (" The house was built according", " to"), (" We saw a number", " of"), (" He was able", " to"),
    (" They began", " to"), (" It was a kind", " of"), (" He took this one instead", " of"),
    (" This was part", " of"), (" She told the rest", " of"), (" It was a series", " of"), (" He became a member", " of"),
)  # fmt: skip


def haystacks(
    model: Checkpoint,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[Reading]:
    """One reading a length, of `samples` rows for each depth (0: at the start, 1: right before the question) and control.

    Raises `InputError` for a length beyond the model's context or too short for needle and question.
    """
    tokenizer, vocab, context = Tokenizer.open(model.path), model.architecture.vocab, model.architecture.context
    found = []
    for length in lengths:
        if length > context:
            raise InputError(f"a haystack of {length:,} tokens does not fit the model's context, {context:,}")
        dice = np.random.default_rng((seed, length))
        rows, scored, cells = [], [], []
        for depth, sample in itertools.product((*depths, None), range(samples)):
            ids, answer = needle_row(tokenizer, length, depth, sample, dice)
            rows.append(ids)
            scored.append([t + 1 >= length - answer for t in range(length - 1)])
            cells.append(CONTROL if depth is None else depth_name(depth))
        ids_BT = torch.tensor(rows)
        if int(ids_BT.max()) >= vocab:
            raise InputError(
                f"the tokenizer gives id {int(ids_BT.max()):,}, and the model knows {vocab:,}; use the model's own"
            )
        parts = {cell: torch.tensor([c == cell for c in cells]) for cell in dict.fromkeys(cells)}
        facts = {
            "convention": f"a 7-digit number in {length:,} tokens of made sentences, asked for at the end",
            "length": length,
            "depths": list(depths),
            "samples": samples,
            "seed": seed,
            "bos": "none" if tokenizer.bos is None else "every-row",
            "text_sha256": {},
            "tokenizer_sha256": tokenizer.sha256,
            "ids_sha256": sha256_of(ids_BT),
        }
        found.append(Reading(f"needle {length}", ids_BT, torch.tensor(scored), facts, parts, "needle"))
    return found


def needle_row(
    tokenizer: Tokenizer, length: int, depth: float | None, sample: int, dice: np.random.Generator
) -> tuple[list[int], int]:
    """`length` ids, and how many at the end are the answer. Without a depth, the control of that number."""
    needle: list[int] = []
    if depth is None:
        asked, said = PHRASES[sample % len(PHRASES)]
    else:
        thing = f"{dice.choice(COLOURS)} {dice.choice(THINGS)}"
        said = f" {dice.integers(10**6, 10**7)}"
        needle = tokenizer.encode(f" The special number of the {thing} is{said}.").tolist()
        asked = f" What is the special number of the {thing}? The special number of the {thing} is"
    question, answer = tokenizer.encode(asked).tolist(), tokenizer.encode(said).tolist()
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    room = length - len(begin) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise InputError(
            f"a needle and its question take {length - room} tokens; wanted haystacks of at least as many, not {length}"
        )
    hay: list[int] = []
    ends = [0]
    while len(hay) < room:
        words = " ".join(dice.choice(part) for part in (WHO, DID, WHAT, WHEN))
        hay += tokenizer.encode(f" {words[0].upper()}{words[1:]}.").tolist()
        ends.append(len(hay))
    cut = len(hay) - room  # the first sentence begins in its middle, so that the last one ends
    places = [0, *(end - cut for end in ends if end > cut)]
    at = min(places, key=lambda place: abs(place - (depth or 0.0) * room))
    return begin + hay[cut:][:at] + needle + hay[cut:][at:] + question + answer, len(answer)


def depth_name(depth: float) -> str:
    return f"depth {depth:.0%}"


def score(of: Scoring) -> list[Score]:
    """For all depths together, for each, and for the control: found by each model, and log-probability an answer token."""
    divergence, parts = of.divergence, of.reading.parts
    rows_B = divergence.counted_BS.any(-1)
    tokens_B = divergence.counted_BS.sum(-1).clip(1)
    whole_B = divergence.counted_BS.sum(-1) == of.reading.scored_BS.numpy().sum(-1)
    found_B = {m: whole_B & (divergence[f"greedy_{m}"].sum(-1) == tokens_B) for m in ("source", "export")}
    log_p_B = {m: -divergence[f"nll_{m}"].sum(-1) / tokens_B for m in ("source", "export")}
    hidden_B = ~np.asarray(parts[CONTROL].numpy())
    scores = []
    for part, where_B in {"": hidden_B, **{name: np.asarray(rows.numpy()) for name, rows in parts.items()}}.items():
        where_BS = divergence.counted_BS & where_B[:, None]
        among = rows_B & where_B
        for model in ("source", "export"):
            share = Estimate.of_share(int(found_B[model][where_B].sum()), int(where_B.sum()))
            scores.append(of.score(f"needle_found_{model}", share, "share", part, where_BS))
            scores.append(
                of.score(f"needle_log_p_{model}", Estimate.of_rows(log_p_B[model][among]), "nats", part, where_BS)
            )
        paired = Estimate.of_rows(log_p_B["export"][among] - log_p_B["source"][among])
        scores.append(of.score("needle_delta_log_p", paired, "nats", part, where_BS))
    return scores


NEEDLE = Evaluation(
    "needle",
    "whether a number hidden in a long text is found, by length and depth, with a control that needs no finding",
    score,
    "needle in a haystack (Kamradt 2023); made sentences as in RULER, arXiv 2404.06654",
    reads=("needle",),
)
