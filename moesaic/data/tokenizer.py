"""The tokenizer of a model folder, and its chat template. Leaves out texts (tokens)."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from ..files import MARK, decoded, read_file
from .conversations import Renderer

READ = ("tokenizer.json", "*token*.json", "chat_template*", "additional_chat_templates/*")  # by transformers


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model folder, and the BOS token it adds, if any."""

    folder: Path
    inner: tokenizers.Tokenizer
    sha256: str  # of tokenizer.json
    bos: int | None

    @staticmethod
    def open(folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`. Raises `InputError` when it is missing or no tokenizer."""
        path = Path(folder) / "tokenizer.json"
        try:
            raw = read_file(path)
            inner = tokenizers.Tokenizer.from_buffer(decoded(raw).encode())
        except FileNotFoundError:
            raise InputError(f"{folder} has no tokenizer.json; copy it there from where the model came from") from None
        except Exception as error:  # the library raises no type of its own
            raise InputError(f"{path} cannot be read as a tokenizer ({error}); fetch it again") from error
        inner.no_truncation()
        inner.no_padding()
        plain, dressed = (inner.encode("a", add_special_tokens=own).ids for own in (False, True))
        bos = dressed[0] if len(dressed) > len(plain) and dressed[0] != plain[0] else None
        return Tokenizer(Path(folder), inner, hashlib.sha256(raw).hexdigest(), bos)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` alone: nothing added before or after it."""
        return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, np.int64)

    @cached_property
    def chat(self) -> PreTrainedTokenizerFast:
        """What knows the chat template. Raises `InputError` when its files cannot be read."""
        try:
            with unmarked(self.folder) as folder:
                return PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # whatever a damaged file makes transformers do
            raise InputError(
                f"the tokenizer's files in {self.folder} cannot be read ({error}); fetch them again"
            ) from error

    @property
    def template(self) -> str:
        """The chat template; of several all, since one of them is for tools. "" where there is none."""
        found = self.chat.chat_template or ""
        return found if isinstance(found, str) else "\n".join(found.values())

    @cached_property
    def renderer(self) -> Renderer:
        """Raises `InputError` when the model has no chat template."""
        if not self.chat.chat_template:
            raise InputError(f"{self.folder} has no chat template; give text, or add its chat_template.jinja")
        return Renderer(self.chat)


def template_of(folder: Path) -> str:
    """The chat template of a model folder; "" where it has none, or no tokenizer at all."""
    return Tokenizer.open(folder).template if (folder / "tokenizer.json").exists() else ""


@contextmanager
def unmarked(folder: Path) -> Iterator[Path]:
    """The folder, or copies of its tokenizer's files where one begins with a byte order mark: transformers keeps that."""
    names = {file.relative_to(folder) for pattern in READ for file in folder.glob(pattern) if file.is_file()}
    contents = {name: read_file(folder / name) for name in names}
    if not any(raw.startswith(MARK) for raw in contents.values()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copies:
        for name, raw in contents.items():
            (Path(copies) / name).parent.mkdir(exist_ok=True)
            (Path(copies) / name).write_bytes(raw.removeprefix(MARK))
        yield Path(copies)
