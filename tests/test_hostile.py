"""Two hundred hostile checkpoints: each is refused in one sentence within a second, and nothing is left behind.

What an enemy, a torn download or a broken disk makes of a good folder: headers, indexes, configs, files of every kind
and values of every role. Each is put to `quantize`, which opens, looks and would write. Opening is timed, and a file
that hangs fails and does not hang. The quick ones run with `make test`; all of them are marked long.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_damage import poke
from test_files import PLANTED, within

from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.errors import MoesaicError

CONFIG, INDEX, SHARD = "config.json", "model.safetensors.index.json", "model-00000-of-00008.safetensors"  # as M2 counts
Plant = Callable[[Path], Any]


def header(change: Callable[[dict[str, Any]], Any], payload: int = 0) -> Plant:
    """Rewrite a shard's header, and cut or lengthen what follows it by `payload` bytes."""

    def plant(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        found = change(entries)
        text = json.dumps(entries).encode() if not isinstance(found, bytes) else found
        body = body[:payload] if payload < 0 else body + b"\0" * payload
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + body)

    return plant


def first(entries: dict[str, Any], **changes: Any) -> None:
    name = next(name for name in entries if name != "__metadata__")
    entries[name] |= changes


def length(value: int) -> Plant:
    def plant(folder: Path) -> None:
        with open(folder / SHARD, "r+b") as file:
            file.write(value.to_bytes(8, "little"))

    return plant


def text(name: str, content: bytes | str) -> Plant:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def cut(keep: int) -> Plant:
    return lambda folder: os.truncate(folder / SHARD, keep % os.path.getsize(folder / SHARD))


def index(change: Callable[[dict[str, Any]], Any]) -> Plant:
    def plant(folder: Path) -> None:
        body = json.loads((folder / INDEX).read_text())
        change(body["weight_map"])
        (folder / INDEX).write_text(json.dumps(body))

    return plant


def config(key: str, value: Any) -> Plant:
    def plant(folder: Path) -> None:
        body = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(body | {key: value}))

    return plant


def sparse(name: str, size: int) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return plant


def value(role: str, number: float) -> Plant:
    """NaN or infinity in the last tensor of a role."""

    def plant(folder: Path) -> None:
        tensors = Checkpoint.open(folder).architecture.tensors
        poke(folder, [t for t in tensors if t.role == role][-1].name, number)

    return plant


def scale(part: str, raw: float | str, linear: int) -> Plant:
    """A number, or the byte "0xff", in a part of a matrix."""

    def plant(folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        where = checkpoint.located(checkpoint.architecture.linears[linear])[part]
        poke(folder, where.info.name, raw, 3)

    return plant


def move(old: str, new: str) -> Plant:
    return lambda folder: shutil.copy(folder / old, folder / new)


def cases() -> dict[str, Plant]:
    found: dict[str, Plant] = {}
    for kind, (plant, _) in PLANTED.items():
        for name in (CONFIG, INDEX, SHARD, "tokenizer.json"):
            if kind != "a folder" or name != "tokenizer.json":
                found[f"{name}: {kind}"] = lambda folder, p=plant, n=name: ((folder / n).unlink(), p(folder / n))  # type: ignore[misc]
    for size in (0, 1, 7, 8, 9, 100, 1000, 100_000, -1, -2, -7, -100, -10_000):
        found[f"{SHARD}: cut to {size}"] = cut(size)
    for size in (0, 1, 2**20, 101 << 20, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1):
        found[f"a header of {size}"] = length(size)
    for what, change in {
        "dtype F4": {"dtype": "F4"}, "dtype BOOL": {"dtype": "BOOL"}, "dtype 3": {"dtype": 3}, "dtype None": {"dtype": None},
        "dtype F64": {"dtype": "F64"}, "dtype bf16": {"dtype": "bf16"}, "a longer dtype": {"dtype": "F" * 10_000},
        "shape []": {"shape": []}, "shape [0]": {"shape": [0]}, "a negative shape": {"shape": [-1, -1]},
        "a giant shape": {"shape": [2**62, 4]}, "a shape of text": {"shape": "ab"}, "a shape of nulls": {"shape": [None]},
        "a shape of fractions": {"shape": [1.5, 2]}, "a shape of flags": {"shape": [True]}, "axes": {"shape": [1] * 100},
        "offsets backwards": {"data_offsets": [64, 0]}, "negative offsets": {"data_offsets": [-8, 8]},
        "giant offsets": {"data_offsets": [0, 2**70]}, "offsets past the end": {"data_offsets": [0, 2**40]},
        "one offset": {"data_offsets": [0]}, "no offsets": {"data_offsets": []}, "offsets as text": {"data_offsets": "00"},
        "overlapping offsets": {"data_offsets": [4, 2052]}, "an empty range": {"data_offsets": [0, 0]},
    }.items():  # fmt: skip
        found[f"header: {what}"] = header(lambda e, c=change: first(e, **c))  # type: ignore[misc]
    found |= {
        "header: a tensor too many": header(
            lambda e: e.update(x={"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
        ),
        "header: a foreign tensor": header(lambda e: e.update(x={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})),
        "header: two names swapped for one": header(lambda e: e.pop(next(n for n in e if n != "__metadata__"))),
        "header: a name twice": header(lambda e: b'{"a": 1, "a": 1}'),
        "header: not UTF-8": header(lambda e: b'{"\xff\xfe": 1}'),
        "header: deep": header(lambda e: b'{"a":' * 100_000),
        "header: deep lists": header(lambda e: b"[" * 100_000 + b"]" * 100_000),
        "header: empty": header(lambda e: b""),
        "header: a list": header(lambda e: b"[]"),
        "header: a number": header(lambda e: b"1e999"),
        "header: NaN": header(lambda e: b"NaN"),
        "header: a giant number": header(lambda e: b"9" * 100_000),
        "header: no tensors": header(lambda e: b"{}"),
        "header: metadata of numbers": header(lambda e: e.update(__metadata__={"format": 3})),
        "header: metadata that is text": header(lambda e: e.update(__metadata__="pt")),
        "header: names with escapes": header(lambda e: e.update({"\x1b[2J": {}})),
        "header: half a character": header(lambda e: b'{"\\ud800": {}}'),
        "a payload one byte short": header(lambda e: None, -1),
        "a payload one byte long": header(lambda e: None, 1),
        "a payload a page long": header(lambda e: None, 4096),
        "a pickle": text(SHARD, b"\x80\x04\x95" + b"\0" * 100),
        "HTML in place of a shard": text(SHARD, "<html>Entry not found</html>"),
        "an LFS pointer": text(SHARD, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "a shard of zeros": text(SHARD, b"\0" * 5000),
        "a sparse shard": sparse(SHARD, 1 << 40),
        "a stale shard": move(SHARD, "model-00009-of-00009.safetensors"),
        "a shard without its fellows": lambda f: (f / "model-00001-of-00008.safetensors").unlink(),
        "a shard under another name": lambda f: (f / SHARD).rename(f / "weights.safetensors"),
    }
    for what, content in {
        "nothing": b"", "half an object": b'{"a', "a list": b"[]", "null": b"null", "a number": b"1", "not UTF-8": b'{"\xff": 1}',
        "UTF-16": '{"a": 1}'.encode("utf-16"), "deep": b"[" * 200_000, "deep objects": b'{"a":' * 200_000, "zeros": b"\0" * 99,
        "a giant number": b'{"a": ' + b"9" * 10_000 + b"}", "two objects": b"{}{}", "HTML": b"<html></html>",
    }.items():  # fmt: skip
        found[f"{CONFIG}: {what}"] = text(CONFIG, content)
        found[f"{INDEX}: {what}"] = text(INDEX, content)
    found |= {f"{name}: sparse": sparse(name, 1 << 40) for name in (CONFIG, INDEX, "tokenizer.json")}
    for target in (
        "/etc/passwd",
        "../model/" + SHARD,
        "missing.safetensors",
        "",
        ".",
        "\0",
        "a\nb",
        "\x1b[2J",
        "a" * 5000,
        SHARD + "/",
    ):
        found[f"the index names {target[:20]!r}"] = index(lambda m, t=target: m.update({next(iter(m)): t}))  # type: ignore[misc]
    for target in (None, 3, [], {}, True, 1e300):
        found[f"the index names {target!r}"] = index(lambda m, t=target: m.update({next(iter(m)): t}))  # type: ignore[misc]
    found |= {
        "the index lacks a tensor": index(lambda m: m.popitem()),
        "the index has a ghost": index(lambda m: m.update(ghost=SHARD)),
        "the index has a ghost of two lines": index(lambda m: m.update({"a\nb": SHARD})),
        "the index has a ghost without end": index(lambda m: m.update({"a" * 10_000: SHARD})),
        "the index is empty": index(lambda m: m.clear()),
        "weight_map is a list": text(INDEX, '{"weight_map": []}'),
    }
    for key in (
        "num_local_experts",
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_experts_per_tok",
        "head_dim",
    ):
        for number in (0, -1, 10**30, 1.5, "8", None, True, [8], 2**31):
            found[f"{key} = {number!r}"] = config(key, number)
    for key, number in {
        "rope_theta": "x", "rms_norm_eps": "y", "model_type": "nonesuch", "quantization_config": [], "quantization_config ": {},
    }.items():  # fmt: skip
        if key.strip() == key:
            found[f"{key} = {number!r}"] = config(key, number)
    for method in (
        {"quant_method": "x" * 99},
        {"quant_method": []},
        {"quant_method": "fp8"},
        3,
        "fp8",
        {"quant_method": None},
    ):
        found[f"quantization_config = {str(method)[:30]}"] = config("quantization_config", method)
    for role in ("embedding", "head", "norm", "router", "router_bias"):
        for number in (math.nan, math.inf, -math.inf):
            found[f"{number} in a {role}"] = value(role, number)
    for part, raw in (
        ("codes", "0x7f"),
        ("codes", "0xff"),
        ("blocks", math.nan),
        ("blocks", math.inf),
        ("blocks", -1.0),
    ):
        for linear in (0, 5, -1):
            found[f"{part} {raw} in matrix {linear}"] = scale(part, raw, linear)
    return found


CASES = cases()
READ = {"quantization_config = []", "rope_theta = 'x'", "rms_norm_eps = 'y'"}  # says nothing; transformers alone reads
QUICK = [name for i, name in enumerate(CASES) if i % 6 == 0]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("good") / "model", "minimax_m2")


def hold(good: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "a" / "model", tmp_path / "out"
    shutil.copytree(good, folder)
    CASES[name](folder)
    before = sorted(str(f) for f in tmp_path.rglob("*"))
    with within(5):  # a machine that others use
        start = time.process_time()
        try:
            Checkpoint.open(folder).check_values()
        except MoesaicError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        assert time.process_time() - start < 1
        code = main(
            ["quantize", str(folder), str(out), "--format", "mxfp4", "--only", "linears", "--rest", "bf16", "--quiet"]
        )
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("moesaic quantize: ") and said.count("\n") == 1, said
    assert "Traceback" not in said and len(said) < 1200
    left = [f for f in tmp_path.rglob("*") if str(f) not in before and f.is_file()]
    assert not [f for f in left if f.name == CONFIG or f.suffix == ".safetensors" or f.name.endswith(".partial")], left


def test_there_are_two_hundred():
    assert len(CASES) >= 200


def test_what_they_are_made_of_is_read(good, tmp_path):
    """Or all of them would be refused for another reason."""
    found = Checkpoint.open(good)
    found.check_values()
    assert main(["quantize", str(good), str(tmp_path / "out"), "--format", "mxfp4", "--quiet"]) == 0
    assert torch.isfinite(found.decode(found.architecture.linears[0].name)).all()


@pytest.mark.parametrize("name", [name for name in QUICK if name not in READ])
def test_a_hostile_folder_is_refused_in_one_sentence(good, tmp_path, name, capsys):
    hold(good, tmp_path, name, capsys)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in CASES if name not in READ and name not in QUICK])
def test_every_hostile_folder_is_refused_in_one_sentence(good, tmp_path, name, capsys):
    hold(good, tmp_path, name, capsys)
