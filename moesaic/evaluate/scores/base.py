"""What an evaluation is, what it reads and what it says. Leaves out the sweep (divergence/) and every figure in particular.

An evaluation is arithmetic on the per-token values of a reading, so another one costs no other sweep.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...artifact import atomic, header, identity, read_json, write_json
from ...data.tokens import TokenSet, sha256_of
from ...measure.divergence import Bootstrap, Divergence, Estimate

KIND = "scores"
SPOTS = "spots"  # the former name of samples
COLUMNS = (
    "reading", "name", "part", "value", "error", "low", "high", "unit", "tokens", "rows", "activations", "seed"
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """Rows of tokens that both models read, which of their predictions count, and by what convention they were cut."""

    name: str
    ids_BT: Tensor
    scored_BS: Tensor  # bool, S = T − 1
    facts: Mapping[str, Any]
    parts: Mapping[str, Tensor]  # part -> bool [B]: the rows of one domain
    kind: str = "text"  # which evaluations it is for

    @staticmethod
    def of(tokens: TokenSet, name: str = "text") -> "Reading":
        """Every prediction of every row."""
        scored_BS = torch.ones(tokens.rows, tokens.ids_BT.shape[1] - 1, dtype=torch.bool)
        parts = {domain: tokens.domain_B == i for i, domain in enumerate(tokens.domains)}
        return Reading(name, tokens.ids_BT, scored_BS, tokens.facts, parts)

    @cached_property
    def identity(self) -> str:
        parts = {name: rows_B.tolist() for name, rows_B in self.parts.items()}
        return identity(self.name, sha256_of(self.ids_BT), sha256_of(self.scored_BS), parts)


@dataclass(frozen=True)
class Score:
    """One figure with its error, and how many tokens of how many rows it rests on."""

    reading: str
    name: str
    part: str  # "" for all of the reading, else a domain or a range of the source's confidence
    value: float | None  # None: nothing was finite
    error: float | None  # one standard error over rows
    low: float | None  # 95 % interval
    high: float | None
    unit: str
    tokens: int
    rows: int
    activations: str = "none"  # how the export ran: left alone, or rounded as by `facts["activations"]`
    seed: int = 0


@dataclass(frozen=True)
class Scoring:
    """The per-token values of one reading, and how to make a `Score` of them."""

    reading: Reading
    divergence: Divergence
    bootstrap: Bootstrap
    activations: str = "none"
    seed: int = 0

    def score(
        self, name: str, estimate: Estimate, unit: str, part: str = "", where_BS: np.ndarray | None = None
    ) -> Score:
        counted_BS = self.divergence.counted_BS
        where_BS = counted_BS if where_BS is None else counted_BS & where_BS
        value, error, low, high = (finite(x) for x in (estimate.value, estimate.error, estimate.low, estimate.high))
        tokens, rows = int(where_BS.sum()), int(where_BS.any(-1).sum())
        return Score(
            reading=self.reading.name,
            name=name,
            part=part,
            value=value,
            error=error,
            low=low,
            high=high,
            unit=unit,
            tokens=tokens,
            rows=rows,
            activations=self.activations,
            seed=self.seed,
        )

    def parts(self) -> Iterator[tuple[str, np.ndarray | None]]:
        """All of the reading, then each of its domains, where it has several."""
        yield "", None
        if len(self.reading.parts) > 1:
            for part, rows_B in self.reading.parts.items():
                if rows_B.any():
                    yield part, np.asarray(rows_B.numpy()[:, None])


def finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else x


@dataclass(frozen=True)
class Evaluation:
    """Figures of one kind. `does` is for people; `reference` is the paper or the convention it follows.

    `reads` are the kinds of readings that it can score.
    """

    name: str
    does: str
    score: Callable[[Scoring], list[Score]]
    reference: str
    reads: tuple[str, ...] = ("text",)


@dataclass(frozen=True)
class Scores:
    """Everything that was measured, under which conditions. `facts` is JSON: models, readings, layers, versions."""

    scores: tuple[Score, ...]
    facts: Mapping[str, Any]

    def find(
        self, name: str, part: str = "", reading: str | None = None, activations: str | None = None
    ) -> Score | None:
        """The score of that name, of the first reading and way unless told; None when it was not measured."""
        for score in self.scores:
            asked = reading in (None, score.reading) and activations in (None, score.activations)
            if asked and (score.name, score.part) == (name, part):
                return score
        return None

    def write(self, path: Path, inputs: Mapping[str, str]) -> None:
        """`path` (JSON) and beside it the same table as CSV."""
        with atomic(path.with_suffix(".csv")) as partial, open(partial, "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(asdict(score) for score in self.scores)
        write_json(path, KIND, {**self.facts, "scores": [asdict(score) for score in self.scores]}, inputs)

    def add(
        self, scores: Sequence[Score], facts: Mapping[str, Any], path: Path, inputs: Mapping[str, str] | None = None
    ) -> "Scores":
        """These and more, written to `path` again; `inputs` where it is not there yet."""
        more = Scores((*self.scores, *scores), {**self.facts, **facts})
        more.write(path, inputs or read_json(path, KIND)["inputs"])
        return more

    @staticmethod
    def read(path: Path, inputs: Mapping[str, str] | None = None) -> "Scores":
        """Scores of `path`. What version 0.1 called spots are samples."""
        body = read_json(path, KIND, inputs)
        facts = {key: value for key, value in body.items() if key not in (*header(KIND, {}), "scores")}
        if SPOTS in facts:
            facts["samples"] = facts.pop(SPOTS)
        found = (Score(**score) for score in body["scores"])
        return Scores(tuple(renamed(score) if score.reading == SPOTS else score for score in found), facts)


def renamed(score: Score) -> Score:
    return replace(score, reading="samples", name=score.name.replace("spot_", "sample_"))
