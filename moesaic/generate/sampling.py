"""How the next token is chosen, and which log-probabilities are returned. Leaves out penalties and biases on single tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError

SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """Greedy by default. Raises `InputError` for invalid values.

    temperature  0 takes the likeliest token, of equals the lower id
    top_k        only the k likeliest; 0 for all
    top_p        of those the fewest that hold so much of their probability
    seed         the same seed gives the same tokens; None draws one
    stop         token sequences; the first to stand at the end ends it
    logprobs     how many of the likeliest tokens are told beside each chosen one; None tells no probability
    echo         with `logprobs`, tell them of the prompt's tokens too
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value}, wanted {wanted}"
            for name, value, wanted, right in (
                ("temperature", self.temperature, "a number from 0 to 100", 0 <= self.temperature <= 100),
                ("top_p", self.top_p, "a number above 0, up to 1", 0 < self.top_p <= 1),
                ("top_k", self.top_k, "0 or more", self.top_k >= 0),
                ("logprobs", self.logprobs, "0 or more", self.logprobs is None or self.logprobs >= 0),
                ("seed", self.seed, "less than 2^63 on either side", self.seed is None or -SEEDS <= self.seed < SEEDS),
            )
            if not right
        ]
        if wrong:
            raise InputError(f"{'; '.join(wrong)}; correct the request")

    def with_seed(self, seed: int) -> "Sampling":
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Token:
    """A token, and what the model held of it: log-probabilities in nats at temperature 1, before any cut."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest, first first


def generator(seed: int | None) -> torch.Generator:
    """Random numbers of one sequence, whatever else is in the batch."""
    numbers = torch.Generator()
    if seed is None:
        numbers.seed()
    else:
        numbers.manual_seed(seed)
    return numbers


def choose(logits_V: Tensor, sampling: Sampling, numbers: torch.Generator) -> int:
    """The next token. Raises `CheckpointError` for NaN or infinite logits."""
    if not logits_V.isfinite().all():
        raise CheckpointError("the model's logits are not finite; `moesaic evaluate` names the layer where that begins")
    if not sampling.temperature:
        return int((logits_V == logits_V.max()).nonzero()[0])
    score_V, ids_V = logits_V.double() / sampling.temperature, None
    if sampling.top_k or sampling.top_p < 1:
        score_V, ids_V = score_V.sort(descending=True, stable=True)
        score_V = score_V[: sampling.top_k or None]
    cumulative_V = score_V.softmax(0).cumsum(0)
    if sampling.top_p < 1:
        kept = int((cumulative_V < sampling.top_p).sum()) + 1
        cumulative_V = cumulative_V[:kept]
    drawn = torch.rand((), generator=numbers, dtype=torch.float64).to(logits_V.device) * cumulative_V[-1]
    at = min(int((cumulative_V <= drawn).sum()), len(cumulative_V) - 1)
    return at if ids_V is None else int(ids_V[at])


def told(logits_nV: Tensor, ids: Sequence[int], count: int) -> list[Token]:
    """Each of `ids` with its log-probability under a row of logits, and the `count` likeliest beside it."""
    logprobs_nV = logits_nV.log_softmax(-1)
    own_n = logprobs_nV.gather(1, torch.tensor(ids, device=logits_nV.device)[:, None])[:, 0].tolist()
    values, tops = logprobs_nV.topk(min(count, logits_nV.shape[1]), dim=-1)
    return [
        Token(id, own, tuple(zip(top, map(plain, value))))
        for id, own, top, value in zip(ids, map(plain, own_n), tops.tolist(), values.tolist())
    ]


def plain(logprob: float) -> float:
    """As JSON can say it: an impossible token has a very low number and no infinity."""
    return logprob if math.isfinite(logprob) else -9999.0
