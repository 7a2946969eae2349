"""Text by domain -> rows of token ids, with the hash of everything they were made from.

A folder holds one domain a file (`code.txt`, `math.jsonl`). Each domain is tokenized whole and cut into
as many equal stretches as it owes rows; a row is a seeded window inside its stretch, so windows never
overlap and cover the file from end to end. Leaves out chunk-by-chunk perplexity (evaluate/perplexity.py)
and any download.
"""

import hashlib
import itertools
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .artifact import identity, read_tensors, write_tensors
from .conversations import Conversation
from .errors import InputError
from .files import is_hidden
from .tokenizer import Tokenizer
from .utf8 import json_lines, pieces

KIND = "tokens"
JOINT = "\n\n"  # stands between the documents of one domain
FEW = 8  # fewer documents than this are split inside each document, not between them
NO_PROSE = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}  # tables, tests, the other domain
PARAGRAPH = 60  # characters from which a paragraph that stands in two texts is no coincidence
GENEROUS = 16  # characters to read for a token wanted; text has 2 to 6 a token
IMAGE, IMAGE_TOKENS = "image", 4096  # the domain of an image's tokens, and how many ids are set aside for one image
CHATS = ("messages", "conversations", "conversation")  # columns that hold one
RUN = 32  # tokens in a row that two sets must share before that counts as overlap


@dataclass(frozen=True)
class Text:
    """One domain: its name and its documents, in order."""

    domain: str
    documents: tuple[str, ...]

    @cached_property
    def joined(self) -> str:
        return JOINT.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.joined.encode()).hexdigest()


@dataclass(frozen=True)
class TokenSet:
    """Rows of tokens, the domain of each, and where they came from (`facts`: hashes, seed, BOS convention)."""

    ids_BT: Tensor  # int64
    domain_B: Tensor  # int64, index into `domains`
    domains: tuple[str, ...]
    facts: Mapping[str, Any]

    @staticmethod
    def build(
        texts: Sequence[Text],
        tokenizer: Tokenizer,
        *,
        rows: int,
        length: int,
        vocab: int,
        seed: int = 0,
        shares: Mapping[str, float] | None = None,
        origin: str = "",
        at_most: bool = False,
    ) -> "TokenSet":
        """Choose `rows` windows of `length` tokens (BOS included, where the tokenizer adds one to a text).

        Domains get equal shares, or those of `shares`; one too short for its share gives all it holds
        and the others make up for it. With `at_most`, a text too short for `rows` gives all it holds. Raises
        `InputError` when a domain is shorter than one row, all together are shorter than `rows`, or an id
        does not fit the model's `vocab`.
        """
        if rows < 1 or length < 2:
            raise InputError(f"asked for {rows} rows of {length} tokens; wanted at least 1 row of 2")
        body = length - (tokenizer.bos is not None)
        streams = {t.domain: tokenizer.encode(thin(t.joined, rows * length * GENEROUS, rows)) for t in texts}
        for domain, ids_N in streams.items():
            if len(ids_N) < body:
                held = f"{domain} holds {len(ids_N):,} tokens and a row has {length:,}"
                raise InputError(f"{held}; give more text or ask for shorter rows")
            if (largest := int(ids_N.max())) >= vocab:
                held = f"the tokenizer in {tokenizer.folder} gives id {largest:,}, and the model knows {vocab:,}"
                raise InputError(f"{held}; use the model's own tokenizer")
        room = {domain: len(ids_N) // body for domain, ids_N in streams.items()}
        counts = allot(min(rows, sum(room.values())) if at_most else rows, room, shares)
        rng = np.random.default_rng(seed)
        ids_BT = torch.from_numpy(np.concatenate([windows(streams[d], counts[d], body, rng) for d in streams]))
        if tokenizer.bos is not None:
            ids_BT = torch.nn.functional.pad(ids_BT, (1, 0), value=tokenizer.bos)
        facts = {
            "origin": origin,
            "seed": seed,
            "length": length,
            "rows_by_domain": counts,
            "bos": "none" if tokenizer.bos is None else "every-row",
            "text_sha256": {text.domain: text.sha256 for text in texts},
            "tokenizer_sha256": tokenizer.sha256,
            "ids_sha256": sha256_of(ids_BT),
        }
        domain_B = torch.repeat_interleave(torch.arange(len(streams)), torch.tensor([counts[d] for d in streams]))
        return TokenSet(ids_BT, domain_B, tuple(streams), facts)

    @property
    def rows(self) -> int:
        return self.ids_BT.shape[0]

    @property
    def tokens(self) -> int:
        return self.ids_BT.numel()

    @cached_property
    def identity(self) -> str:
        return identity(self.facts["ids_sha256"], self.domains, self.domain_B.tolist())

    def take(self, rows: Sequence[int]) -> "TokenSet":
        """These rows as a set of their own, with its own identity."""
        ids_BT, domain_B = self.ids_BT[list(rows)], self.domain_B[list(rows)]
        counts = domain_B.bincount(minlength=len(self.domains)).tolist()
        facts = {**self.facts, "rows_by_domain": dict(zip(self.domains, counts)), "ids_sha256": sha256_of(ids_BT)}
        return TokenSet(ids_BT, domain_B, self.domains, facts)

    def shared_with(self, other: "TokenSet", run: int = RUN) -> int:
        """How many of these tokens lie in a run of `run` tokens that stands in `other` too. 0: disjoint."""
        mine_BN, theirs_BN = ngrams(self.ids_BT.numpy(), run), ngrams(other.ids_BT.numpy(), run)
        starts_BN = np.isin(mine_BN, theirs_BN)
        covered_BT = np.zeros(self.ids_BT.shape, bool)
        for offset in range(run):
            covered_BT[:, offset : offset + starts_BN.shape[1]] |= starts_BN
        return int(covered_BT.sum())

    def save(self, path: Path) -> None:
        tensors = {"ids_BT": self.ids_BT.to(torch.int32), "domain_B": self.domain_B.to(torch.int32)}
        body = {"domains": self.domains, "facts": self.facts}
        write_tensors(path, KIND, tensors, {"tokenizer": self.facts["tokenizer_sha256"]}, body)

    @staticmethod
    def load(path: Path) -> "TokenSet":
        """Read what `save` wrote. Raises `InputError` when the ids are not those that were hashed."""
        tensors, body = read_tensors(path, KIND)
        ids_BT, domain_B = tensors["ids_BT"].long(), tensors["domain_B"].long()
        if sha256_of(ids_BT) != body["facts"]["ids_sha256"]:
            raise InputError(f"{path} does not hold the tokens that it was written with; make it again")
        return TokenSet(ids_BT, domain_B, tuple(body["domains"]), body["facts"])


def sha256_of(ids: Tensor) -> str:
    return hashlib.sha256(ids.long().numpy().tobytes()).hexdigest()


def read_texts(path: str | Path, tokenizer: Tokenizer) -> list[Text]:
    """The domains of a folder (or of one file), by name. Raises `InputError` where there is no text.

    `.txt` is one document; each line of `.jsonl` is one, an object with `text` or with `messages`.
    """
    path = Path(path)
    files, root = data_files(path, ".txt", ".jsonl")
    if not files:
        what = "holds no .txt and no .jsonl file" if path.is_dir() else "is no folder"
        raise InputError(f"{path} {what}; wanted text, one domain a file (code.txt, math.jsonl)")
    texts: dict[str, Text] = {}
    for file in files:
        if file.stem in texts:
            raise InputError(f"{path} has two files of the domain {file.stem!r}; give one another name")
        documents, images = (
            read_lines(file, root, tokenizer) if file.suffix == ".jsonl" else (("".join(pieces(file, root)),), 0)
        )
        if images and not documents:
            continue
        if not any(d.strip() for d in documents):
            raise InputError(f"{file} holds no text; remove it or fill it")
        texts[file.stem] = Text(file.stem, documents)
    if not texts:
        raise InputError(f"{path} holds images alone; wanted some text beside them")
    return list(texts.values())


def data_files(path: Path, *suffixes: str) -> tuple[list[Path], Path | None]:
    """A file itself, or the files of a folder that end so, by name, and the folder that links may not leave."""
    if path.exists() and not path.is_dir():
        return [path], None
    return sorted(f for f in path.glob("*") if f.suffix in suffixes and not is_hidden(f.name)), path


def read_lines(file: Path, root: Path | None, tokenizer: Tokenizer) -> tuple[tuple[str, ...], int]:
    """The documents of JSON Lines, and how many further lines have an image: those are images.py's."""
    documents, images = [], 0
    for where, entry in json_lines(file, root):
        if has_image(entry, where):
            images += 1
        else:
            documents.append(read_entry(entry, where, tokenizer))
    return tuple(documents), images


def has_image(entry: Any, where: str) -> bool:
    """Whether a sample's text belongs to an image: it is read with that (images.py), and nowhere else."""
    image = entry.get("image") if isinstance(entry, dict) else None
    if image is not None and not isinstance(image, str):
        raise InputError(
            f"{where} has an `image` that is a {type(image).__name__}; wanted the name of a file beside it"
        )
    return image is not None


def read_entry(entry: Any, where: str, tokenizer: Tokenizer) -> str:
    """The text of a line: its own, or its conversation as the model's chat template writes it."""
    try:
        if not isinstance(entry, dict):
            raise InputError("it is no object with `text` or `messages`")
        text, rows = entry.get("text"), next((entry[key] for key in CHATS if entry.get(key) is not None), None)
        if isinstance(text, str) and (text.strip() or rows is None):
            text.encode()
            return text
        if rows is None:
            raise InputError("it has neither `text` nor `messages`")
        return tokenizer.renderer.render(Conversation.of(rows, entry.get("tools"), entry.get("system")))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a character ({error.reason}); write it in full") from error


def python_texts() -> tuple[list[Text], str]:
    """Text that every Python brings along, and what to call it: its own sources, and its help topics.

    Nothing is downloaded. Models have read this text: good for a demonstration, never "held out".
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [f for f in sorted(library.rglob("*.py")) if not NO_PROSE & set(f.relative_to(library).parts)]
    code = tuple(f.read_text(encoding="utf-8", errors="replace") for f in files if f.stat().st_size > 2000)
    if not code:
        raise InputError(f"this Python has no standard-library sources in {library}; give a folder of text with --data")
    topics = tuple(text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 200)
    return [
        Text("code", code),
        Text("tech", topics),
    ], f"Python {sys.version.split()[0]}: standard library and help topics"


def split(texts: Sequence[Text], share: float = 0.25) -> tuple[list[Text], list[Text]]:
    """Text to calibrate on, and `share` of it to evaluate on: no document in both, and no paragraph either.

    Many documents are dealt out by the hash of their content (a copy goes where its twin goes); a few
    are cut at a line, their end being kept for evaluation. What is left to evaluate on then loses the
    paragraphs that calibration holds too: licences, quotations, the same section under two titles.
    """
    first, second = [], []
    for text in texts:
        unique = {hashlib.sha256(d.encode()).digest(): d for d in text.documents}
        if len(unique) >= FEW:
            chosen = set(sorted(unique)[: max(1, round(share * len(unique)))])
            ours, theirs = ([d for h, d in unique.items() if (h in chosen) == side] for side in (False, True))
        else:
            cuts = [(d, d.rfind("\n", 0, int(len(d) * (1 - share))) + 1) for d in unique.values()]
            ours, theirs = [d[:at] for d, at in cuts], [d[at:] for d, at in cuts]
        seen = {p.strip() for d in ours for p in d.split(JOINT) if len(p.strip()) >= PARAGRAPH}
        theirs = [JOINT.join(p for p in d.split(JOINT) if p.strip() not in seen) for d in theirs]
        first.append(Text(text.domain, tuple(ours)))
        second.append(Text(text.domain, tuple(d for d in theirs if d.strip())))
    return first, second


def thin(text: str, characters: int, blocks: int) -> str:
    """At most about `characters` of a text, in equal blocks spread over it, each from the start of a line."""
    if len(text) <= characters:
        return text
    size, starts = characters // blocks, [i * len(text) // blocks for i in range(blocks)]
    starts = [text.rfind("\n", max(0, s - size // 4), s) + 1 or s for s in starts]
    return JOINT.join(text[s : s + size] for s in starts)


def allot(rows: int, room: Mapping[str, int], shares: Mapping[str, float] | None) -> dict[str, int]:
    """Rows for each domain: by share, none above its room, `rows` in all."""
    weight = {d: 1.0 if shares is None else shares.get(d, 0.0) for d in room}
    if shares and (not set(shares) <= set(room) or min(shares.values()) < 0):
        raise InputError(
            f"shares {dict(shares)} do not fit the domains {', '.join(room)}; name those, with numbers >= 0"
        )
    limit = {d: n for d, n in room.items() if weight[d] > 0}
    if rows > sum(limit.values()):
        held = f"the text holds {sum(limit.values()):,} ({', '.join(f'{d} {n:,}' for d, n in limit.items())})"
        raise InputError(f"asked for {rows:,} rows, and {held}; ask for fewer tokens or give more text")
    counts = dict.fromkeys(room, 0)
    for _ in range(rows):  # one at a time to the domain furthest behind its share: exact, and always the same
        unfilled = [d for d in limit if counts[d] < limit[d]]
        counts[min(unfilled, key=lambda d: (counts[d] + 1) / weight[d])] += 1
    return counts


def windows(ids_N: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """[count, length]: one window in each of `count` equal stretches of a stream."""
    edges = np.linspace(0, len(ids_N), count + 1).astype(np.int64)
    starts = [int(rng.integers(a, b - length + 1)) for a, b in itertools.pairwise(edges)]
    return np.stack([ids_N[s : s + length] for s in starts]) if starts else np.empty((0, length), np.int64)


def ngrams(ids_BT: np.ndarray, length: int) -> np.ndarray:
    """[B, T-length+1]: a 64-bit hash of each run of `length` ids (polynomial, modulo 2^64, ids scrambled first)."""
    scrambled_BT = (ids_BT.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scrambled_BT ^= scrambled_BT >> np.uint64(29)
    stop = ids_BT.shape[1] - length + 1
    hash_BN = np.zeros((ids_BT.shape[0], max(stop, 0)), np.uint64)
    for offset in range(length if stop > 0 else 0):
        hash_BN = hash_BN * np.uint64(0x100000001B3) + scrambled_BT[:, offset : offset + stop]
    return hash_BN
