"""Images in calibration: which experts their tokens use is a domain of its own, "image".

A line of `.jsonl` may name an `image`, a file beside it; its text follows the image. The vision tower and
its projector are transformers' modules, in memory whole for as long as images are read. Leaves out video, and
every use of such samples but calibration: all other stages skip them, text and all.
"""

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import FamilyError, InputError
from ..families import Vision
from ..files import check_link, check_plain, is_hidden, json_lines
from .corpus import Corpus
from .texts import data_files, has_image, read_entry
from .tokenizer import Tokenizer
from .tokens import IMAGE, IMAGE_TOKENS, TokenSet, sha256_of

BUCKETS = (2**31 - 2**24) // IMAGE_TOKENS  # images that can be told apart, above any vocabulary


@dataclass(frozen=True)
class Pictured:
    """Rows in which images stand. A token whose id is not in the vocabulary is one of an image's: see `Seen`."""

    tokens: TokenSet
    seen: Mapping[int, Tensor]  # first id of an image -> what the language model sees in its place, [n, D]


@dataclass(frozen=True)
class Sample:
    image: Path
    text: str


class Sight:
    """The vision tower of a checkpoint and its projector, in F32 on the CPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises `FamilyError` where the family has no vision, or its names do not fill transformers' modules."""
        family = checkpoint.family
        if family.vision is None:
            raise FamilyError(f"{family.name} sees no images; remove the samples that have one")
        self.vision: Vision = family.vision
        where, name = family.wiring.configuration.split(":")
        plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        config = getattr(importlib.import_module(where), name).from_dict(plain)
        self.config = config.vision_config
        self.config._attn_implementation = "sdpa"
        modeling = importlib.import_module(family.wiring.modeling)
        with torch.device("meta"):
            modules = nn.ModuleDict({
                "tower": getattr(modeling, self.vision.tower_class)(self.config),
                "projector": getattr(modeling, self.vision.projector_class)(config),
            })  # fmt: skip
        self.tower, self.projector = modules["tower"].eval(), modules["projector"].eval()
        self.tower.rotary_emb = type(self.tower.rotary_emb)(self.config)  # its buffer is made, not read
        values = {}
        for tensor in checkpoint.architecture.tensors:
            for disk, module in self.vision.modules.items():
                if tensor.name.startswith(disk):
                    values[module + tensor.name.removeprefix(disk)] = checkpoint.read(tensor.name).float()
        unknown = modules.load_state_dict(values, strict=False, assign=True).unexpected_keys
        empty = [name for name, p in modules.named_parameters() if p.is_meta]
        if unknown or empty:
            raise FamilyError(f"families/{family.name}.py names the vision tower wrongly: {unknown[:2]} {empty[:2]}")

    @torch.no_grad()
    def features(self, image: Image.Image) -> Tensor:
        """[n, D]: what the language model sees of an image, one row for each `spatial_merge_size`² patches."""
        patches_NP, grid = self.patches(image)
        out = self.tower(patches_NP, grid_thw=torch.tensor([[1, *grid]])).last_hidden_state
        found: Tensor = self.projector(out.squeeze(0))
        return found

    def patches(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Patches [N, C · frames · p · p], those that will be merged side by side; and how many down and across."""
        p, merge, frames = self.config.patch_size, self.config.spatial_merge_size, self.config.temporal_patch_size
        height, width = fitted(image.height, image.width, p * merge, self.vision)
        rgb = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        x_HWC = torch.from_numpy(np.asarray(rgb, dtype=np.float32) / 255)
        x_CHW = ((x_HWC - torch.tensor(self.vision.mean)) / torch.tensor(self.vision.std)).permute(2, 0, 1)
        down, across = height // p, width // p
        parts = x_CHW.reshape((3, down // merge, merge, p, across // merge, merge, p)).permute((1, 4, 2, 5, 0, 3, 6))
        still = parts.unsqueeze(5).expand((*parts.shape[:5], frames, p, p))
        return still.reshape(down * across, -1), (down, across)


def fitted(height: int, width: int, factor: int, vision: Vision) -> tuple[int, int]:
    """The nearest size of whole blocks of `factor` pixels that is neither too small nor too large for the tower."""
    rows, columns = (max(1, round(side / factor)) for side in (height, width))
    if rows * columns * factor**2 > vision.most_pixels:
        shrink = (height * width / vision.most_pixels) ** 0.5
        rows, columns = (max(1, int(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < vision.least_pixels:
        grow = (vision.least_pixels / (height * width)) ** 0.5
        rows, columns = (-int(-side * grow // factor) for side in (height, width))
    return rows * factor, columns * factor


def pictured(checkpoint: Checkpoint, corpus: Corpus) -> Pictured | None:
    """All rows of `corpus.data` with images, up to `corpus.tokens`; None where no sample has one.

    Raises `InputError` for an image that cannot be read, or samples that do not fill a row.
    """
    tokenizer = Tokenizer.open(checkpoint.path)
    samples = list(read_samples(corpus.data, tokenizer)) if corpus.data else []
    if not samples:
        return None
    sight, vocab = Sight(checkpoint), checkpoint.architecture.vocab
    seen: dict[int, Tensor] = {}
    streams: dict[str, list[int]] = {}
    length = corpus.row_length(checkpoint)
    for domain, sample in samples:
        if sum(map(len, streams.values())) >= max(corpus.tokens, length):
            break
        first, found = look(sight, sample.image, seen, vocab)
        seen[first] = found
        before, after = (tokenizer.encode(word).tolist() for word in sight.vision.around)
        image = list(range(first, first + len(found)))
        streams.setdefault(domain, []).extend([*before, *image, *after, *tokenizer.encode(sample.text).tolist()])
    rows = {d: torch.tensor(ids[: len(ids) // length * length]).view(-1, length) for d, ids in streams.items()}
    if short := [d for d, ids_BT in rows.items() if not len(ids_BT)]:
        raise InputError(
            f"the samples with images in {short[0]} fill no row of {length:,} tokens; give more, or a --length"
        )
    ids_BT = torch.cat(list(rows.values()))
    facts = {
        "ids_sha256": sha256_of(ids_BT),
        "tokenizer_sha256": tokenizer.sha256,
        "length": length,
        "images": len(seen),
    }
    domain_B = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(r) for r in rows.values()]))
    domains = tuple(dict.fromkeys((*rows, IMAGE)))  # a file may be called that
    return Pictured(TokenSet(ids_BT, domain_B, domains, facts), seen)


def look(sight: Sight, path: Path, seen: Mapping[int, Tensor], vocab: int) -> tuple[int, Tensor]:
    """The first id that stands for an image, the same for the same file in any run, and what is seen of it."""
    try:
        raw = path.read_bytes()
        with Image.open(path) as image:
            found = sight.features(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); fix it or remove the sample") from error
    bucket = int.from_bytes(hashlib.sha256(raw).digest()[:8]) % BUCKETS
    while (first := vocab + bucket * IMAGE_TOKENS) in seen and not torch.equal(seen[first], found):
        bucket = (bucket + 1) % BUCKETS
    return first, found


def read_samples(data: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, Sample]]:
    """(domain, sample) of each line that names an image; the domain is the file's."""
    files, root = data_files(data, ".jsonl")
    for file in (f for f in files if f.suffix == ".jsonl"):
        for where, entry in json_lines(file, root, containing=b'"image"'):
            if has_image(entry, where):
                path = inside(file.parent, entry["image"], where)
                yield file.stem, Sample(path, read_entry(entry, where, tokenizer))


def inside(folder: Path, name: str, where: str) -> Path:
    """The file of that name in `folder` or below. Raises `InputError` for one elsewhere, through links too, and for none."""
    path = folder / name
    try:
        check_link(path, folder)
        check_plain(path)
        if is_hidden(path.name):
            raise InputError(f"{path} is a hidden file; name the image itself")
    except (OSError, ValueError, InputError) as error:  # ValueError: a null character in the name
        raise InputError(f"{where} names the image {name[:80]!r}, and {str(error)[-300:]}") from error
    return path
