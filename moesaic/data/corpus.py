"""Text used for calibration and evaluation: --data, or the Python standard library by default.

One choice, made once: the two never share a document or a paragraph. Leaves out tokenizing (tokens).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import InputError
from .documents import Text
from .texts import python_texts, read_texts, split
from .tokenizer import Tokenizer
from .tokens import TokenSet

LENGTH = 2048  # tokens a row, unless the model's context is shorter
TRYING_OUT = (
    "no --data was given, so the text is Python's standard library, which is for trials only; for a model that will be "
    "used, give text like that which it will read: --data FOLDER"
)
POOL_TOKENS = 1 << 21  # scores by REAP still moved between 0.5 and 2.1 million tokens (the AIMER paper, on C4)


@dataclass(frozen=True)
class Corpus:
    """What `--data`, `--tokens`, `--length` and `--seed` say.

    data     folder of text, one domain a file; None: the text of the Python installation that runs this
    heldout  folder of text to judge by; None: a part of `data` that calibration never sees
    tokens   to calibrate on; a quarter of them is a quarter of the time
    length   tokens a row; None: 2048, or the model's context or `tokens` if that is less
    """

    data: Path | None = None
    heldout: Path | None = None
    tokens: int = 65_536
    length: int | None = None
    seed: int = 0

    def calibration(self, model: Checkpoint, file: Path) -> TokenSet:
        """Rows to calibrate on; a copy of them stays in `file`."""
        return self.rows(model, file, heldout=False)

    def evaluation(self, model: Checkpoint, file: Path, tokens: int | None = None, at_most: bool = False) -> TokenSet:
        """Rows to judge by: of `heldout`, or of what calibration leaves of `data`; fewer if that is short and `at_most`."""
        return replace(self, tokens=tokens or self.tokens).rows(model, file, heldout=True, at_most=at_most)

    def pool(self, model: Checkpoint, file: Path) -> TokenSet:
        """All rows that calibration may ever use, the same whatever `tokens` is: up to `POOL_TOKENS` of them."""
        length = self.row_length(model)
        return replace(self, tokens=max(length, POOL_TOKENS), length=length).rows(
            model, file, heldout=False, at_most=True
        )

    def row_length(self, model: Checkpoint) -> int:
        return min(LENGTH, model.architecture.context, self.tokens) if self.length is None else self.length

    def rows(self, model: Checkpoint, file: Path, heldout: bool, at_most: bool = False) -> TokenSet:
        tokenizer = Tokenizer.open(model.path)
        texts, origin, parts = self.texts(tokenizer, heldout)
        length = self.row_length(model)
        if self.tokens < length:
            raise InputError(f"asked for {self.tokens:,} tokens in rows of {length:,}; wanted at least one row")
        if length > model.architecture.context:
            raise InputError(
                f"rows of {length:,} tokens are longer than the model's context, {model.architecture.context:,}"
            )
        try:
            chosen = TokenSet.build(
                texts, tokenizer, shape=(self.tokens // max(1, length), length),
                vocab=model.architecture.vocab, seed=self.seed, at_most=at_most,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{error} ({told(parts)})" if parts else str(error)) from error
        more = {"parts": parts, "trying_out": self.is_trial(heldout)}
        chosen = replace(chosen, facts={"origin": origin, **chosen.facts, **more})
        if not file.exists() or TokenSet.load(file).facts != chosen.facts:
            chosen.save(file)
        return chosen

    def texts(self, tokenizer: Tokenizer, heldout: bool) -> tuple[list[Text], str, dict[str, dict[str, int]]]:
        """The text, what it is called, and how many characters of each domain each part got where one text was split."""
        if heldout and self.heldout is not None:
            return read_texts(self.heldout, tokenizer), str(self.heldout.name), {}
        whole, origin = python_texts() if self.data is None else (read_texts(self.data, tokenizer), self.data.name)
        if self.heldout is not None:
            return whole, origin, {}
        both = split(whole)
        parts = {
            ours.domain: {"calibration": ours.characters, "evaluation": theirs.characters}
            for ours, theirs in zip(*both)
        }
        return both[int(heldout)], origin, parts

    def is_trial(self, heldout: bool = False) -> bool:
        """Whether the text to calibrate on, or to judge by, is the standard library's."""
        return self.data is None and not (heldout and self.heldout is not None)

    @cached_property
    def is_own(self) -> bool:
        """Whether the text is the user's. Otherwise models have read it, and no score on it may be called held out."""
        return self.data is not None


PYTHON_TEXT = Corpus()


def told(parts: Mapping[str, Mapping[str, int]]) -> str:
    """What each part of a text got, in words."""
    found = (
        f"of {domain}, calibration got {n['calibration']:,} characters and evaluation {n['evaluation']:,}"
        for domain, n in parts.items()
    )
    return "; ".join(found)


def recorded_text(run: Path) -> dict[str, Any]:
    """Facts of the text that was read to calibrate in a run's folder; empty where none was."""
    files = (run / name for name in ("tokens.safetensors", "pool.safetensors"))
    return next((dict(TokenSet.load(file).facts) for file in files if file.exists()), {})
