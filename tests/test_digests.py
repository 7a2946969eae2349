"""An export proves without its source that it is what was written: every bit of every tensor and every file.

The digests are held to hashlib over what the safetensors library reads; faults are planted one bit at a time, in what
was copied, sliced, rounded and stacked; interruptions are at every shard.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import moesaic.checkpoint.shards as shards_module
import moesaic.export as export_module
from moesaic.allocate import folder_bytes, stored_bytes
from moesaic.checkpoint import Checkpoint, digests
from moesaic.cli import main
from moesaic.export import export
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.verify import verify

KEPT = {1: (0, 2, 3, 6), 2: (1, 4, 5, 7)}
NOTE = "moesaic/digests.json"
KINDS = {
    "copied": Plan("mxfp8", KEPT),
    "rounded": Plan("compressed_tensors", KEPT),
    "stacked": Plan("mlx"),
    "whole": Plan("mxfp8"),
}


@pytest.fixture(scope="module")
def exports(m3: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that copies and slices, one that rounds, one that stacks its experts, in several shards."""
    root, found = tmp_path_factory.mktemp("digests"), {}
    units = {u: "mxfp4" for u, m in m3.architecture.units.items() if m[0].role == "experts"}
    plans = KINDS | {"rounded": Plan("compressed_tensors", KEPT, units), "stacked": Plan("mlx", formats=units)}
    before, export_module.SHARD_BYTES = export_module.SHARD_BYTES, 1_500_000
    try:
        for name, plan in plans.items():
            found[name] = export(m3, plan, root / name, quiet=True).path
    finally:
        export_module.SHARD_BYTES = before
    return found


@pytest.fixture
def a_copy(exports, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(exports[name], tmp_path / name))


def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NOTE).read_text())


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


# What is recorded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_and_file_has_its_digest(exports, name):
    folder, seen = exports[name], recorded(exports[name])
    shards = {f.name: load_file(f) for f in folder.glob("*.safetensors")}
    assert set(seen["shards"]) == set(shards) and len(shards) > 1
    stacked = 0
    for file, tensors in shards.items():
        assert set(seen["shards"][file]) == set(tensors)
        for tensor, value in tensors.items():
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest = seen["shards"][file][tensor]
            if isinstance(digest, list):
                each = len(raw) // len(digest)
                assert digest == [sha(raw[i * each : (i + 1) * each]) for i in range(len(digest))]
                assert len(digest) == len(value)
                stacked += 1
            else:
                assert digest == sha(raw), tensor
    assert (stacked > 0) == (name == "stacked")
    names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.suffix != ".safetensors"}
    assert set(seen["files"]) == names - {NOTE} >= {"config.json", "tokenizer.json", "moesaic/plan.json", "LICENSE"}
    assert all(digest == sha((folder / file).read_bytes()) for file, digest in seen["files"].items())


@pytest.mark.parametrize("name", KINDS)
def test_a_clean_export_holds_alone_and_says_what_it_cannot_know(exports, m3, name, capsys):
    verdict = verify(exports[name], quiet=True)
    model = Checkpoint.open(exports[name])
    parts = sum(len(model.located(n)) for n in model.architecture.linears) + len(model.architecture.tensors)
    assert verdict.holds and verdict.compared["digest"] == parts + len(recorded(exports[name])["files"])
    assert verdict.notes == [
        "what was written is here unchanged, and whether it is right is unknown without the source (--source)"
    ]
    assert not verify(exports[name], m3, quiet=True).notes
    assert main(["verify", str(exports[name]), "--quiet"]) == 0
    assert "note: what was written is here unchanged, and whether it is right is unknown" in capsys.readouterr().out


def test_an_old_export_says_that_it_has_none(a_copy, m3, capsys):
    folder = a_copy("copied")
    (folder / NOTE).unlink()
    assert main(["verify", str(folder), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "note: whether anything changed since it was written is unknown: no moesaic/digests.json" in said
    assert "note: whether any value is right is unknown without" in said and "digest ×" not in said
    verdict = verify(folder, m3, quiet=True)
    assert verdict.holds and len(verdict.notes) == 1


def test_a_release_has_none_and_is_not_told_off(m3):
    verdict = verify(m3.path, quiet=True)
    assert verdict.holds and verdict.notes == ["whether any value is right is unknown without the source (--source)"]


@pytest.mark.parametrize("name", KINDS)
def test_its_bytes_are_counted_before_they_are_written(exports, m3, name, monkeypatch):
    monkeypatch.setattr(export_module, "SHARD_BYTES", 1_500_000)
    monkeypatch.setattr("moesaic.allocate.sizes.SHARD_BYTES", 1_500_000)
    plan = Plan.load(exports[name] / "moesaic/plan.json")
    assert folder_bytes(Blueprint.of(m3, plan)) == stored_bytes(exports[name])


# What is found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [0, 3, 7])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", KINDS)
def test_any_flipped_bit_of_a_tensor_is_named(a_copy, name, place, bit):
    """In what was copied, sliced, rounded and stacked alike."""
    folder = a_copy(name)
    model = Checkpoint.open(folder)
    kinds: dict[str, str] = {}
    for tensor in sorted(model.stored):
        kinds.setdefault(tensor.rpartition(".")[2] + ("expert" if "experts" in tensor else ""), tensor)
    for tensor in kinds.values():
        where = model.where(tensor)
        at = {"first": 0, "middle": where.info.bytes // 2, "last": where.info.bytes - 1}[place]
        flip(folder / where.file, where.offset + at, bit)
    found = {f.where.split(" ")[0] for f in verify(folder, quiet=True).findings if f.check == "digest"}
    assert found == set(kinds.values())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_found(exports, tmp_path_factory, data):
    """But for the digests' own: see below."""
    name = data.draw(st.sampled_from(sorted(KINDS)))
    folder = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(exports[name], folder)
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {NOTE}
    file = data.draw(st.sampled_from(sorted(files)))
    size = (folder / file).stat().st_size
    flip(folder / file, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
    assert not verify(folder, quiet=True).holds
    shutil.rmtree(folder.parent)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another rope_theta": (
        lambda p: edit(p / "config.json", lambda b: b["text_config"].update(rope_theta=1e4)),
        "digest: config.json is not what was written",
    ),
    "one digit of rope_theta": (
        lambda p: (p / "config.json").write_text((p / "config.json").read_text().replace("000000", "000001", 1)),
        "digest: config.json is not what was written",
    ),
    "a config of other spaces": (
        lambda p: edit(p / "config.json", lambda b: None), "digest: config.json is not what was written",
    ),
    "a plan of another rounding": (
        lambda p: edit(p / "moesaic/plan.json", lambda b: b.update(rounding="search")),
        "digest: moesaic/plan.json is not what was written",
    ),
    "a plan that keeps others": (
        lambda p: edit(p / "moesaic/plan.json", lambda b: b.update(kept={"1": [0, 1, 2, 3], "2": [0, 1, 2, 3]})),
        "digest: moesaic/plan.json is not what was written",
    ),
    "a changed chat template": (
        lambda p: (p / "chat_template.jinja").write_text("{{ messages }}"), "digest: chat_template.jinja is not",
    ),
    "a changed tokenizer": (lambda p: flip(p / "tokenizer.json", 99), "digest: tokenizer.json is not what"),
    "another temperature": (
        lambda p: edit(p / "generation_config.json", lambda b: b.update(temperature=0.1)),
        "digest: generation_config.json is not what was written",
    ),
    "a lost licence": (
        lambda p: (p / "LICENSE").unlink(), "digest: LICENSE was written with this export, and cannot be read: .*No such",
    ),
    "an index that was sorted anew": (
        lambda p: edit(p / "model.safetensors.index.json", lambda b: None), "digest: model.safetensors.index.json is not",
    ),
    "a file that leads out": (
        lambda p: ((p / "LICENSE").unlink(), (p / "LICENSE").symlink_to("/etc/hostname")), "leads out of",
    ),
    "a digest that is none": (
        lambda p: edit(p / NOTE, lambda b: b["files"].update({"config.json": 3})), "digest: config.json is not",
    ),
    "a digest that is not there": (
        lambda p: edit(p / NOTE, lambda b: b["shards"]["model-00001-of-00003.safetensors"].clear()), "has none in moesaic/dig",
    ),
    "digests of nothing": (lambda p: edit(p / NOTE, lambda b: b.pop("shards")), "digest: moesaic/digests.json cannot be"),
    "digests that are no JSON": (lambda p: (p / NOTE).write_text("{"), "digest: moesaic/digests.json cannot be believed"),
    "digests of another kind": (lambda p: edit(p / NOTE, lambda b: b.update(kind="plan")), "cannot be believed"),
    "a digest of a file outside": (
        lambda p: edit(p / NOTE, lambda b: b["files"].update({"../secret": "0" * 64})), r"digest: \.\./secret .* cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_every_change_of_a_file_is_found_without_the_source(a_copy, fault, capsys):
    plant, sentence = FILES[fault]
    folder = a_copy("copied")
    (folder.parent / "secret").touch()
    plant(folder)
    assert main(["verify", str(folder), "--quiet"]) == 1
    said = capsys.readouterr().out
    assert re.search(sentence, said) and "all hold" not in said


# Interrupted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", range(3))
def test_a_resumed_export_has_the_digests_of_what_was_there_before(m3, exports, tmp_path, monkeypatch, when):
    """Killed before shard number `when` got its name: those before it are kept as they are, with their digests."""
    monkeypatch.setattr(export_module, "SHARD_BYTES", 1_500_000)
    out, real, done = tmp_path / "out", shards_module.os.replace, []

    def replace(a: Path, b: Path) -> None:
        if str(b).endswith(".safetensors"):
            if len(done) == when:
                raise KeyboardInterrupt
            done.append(b)
        real(a, b)

    monkeypatch.setattr(shards_module.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        export(m3, KINDS["whole"], out, quiet=True)
    monkeypatch.setattr(shards_module.os, "replace", real)
    there = {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
    assert len(there) == when
    export(m3, KINDS["whole"], out, quiet=True)
    assert all((out / name).stat().st_mtime_ns == time for name, time in there.items())
    assert recorded(out) == recorded(exports["whole"])
    assert verify(out, quiet=True).holds


def test_a_shard_without_its_digest_is_written_again(m3, exports, a_copy, monkeypatch):
    """As an export that was begun before digests were kept: to hash what lies there would bless its damage."""
    monkeypatch.setattr(export_module, "SHARD_BYTES", 1_500_000)
    folder = a_copy("whole")
    (folder / NOTE).unlink()
    (folder / "config.json").unlink()
    file = sorted(folder.glob("*.safetensors"))[0]
    flip(file, file.stat().st_size - 1)
    export(m3, KINDS["whole"], folder, quiet=True)
    assert recorded(folder) == recorded(exports["whole"]) and verify(folder, m3, quiet=True).holds


def test_the_same_call_on_a_whole_export_writes_no_shard_again(m3, exports, a_copy, monkeypatch):
    monkeypatch.setattr(export_module, "SHARD_BYTES", 1_500_000)
    folder = a_copy("whole")
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    export(m3, KINDS["whole"], folder, quiet=True)
    assert before == {f: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    assert recorded(folder) == recorded(exports["whole"])


def test_what_goes_wrong_while_hashing_ends_the_writing(m3, tmp_path, monkeypatch):
    def broken(*_: Any) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shards_module, "of_range", broken)
    with pytest.raises(Exception, match="Input/output error"):
        export(m3, KINDS["whole"], tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("*.safetensors")) and not list((tmp_path / "out").rglob(".*.partial"))


def test_digests_of_ranges(tmp_path):
    raw = bytes(i % 251 for i in range(1_000_003))
    (tmp_path / "x").write_bytes(raw)
    for offset, count in ((0, 0), (0, 1), (7, 999_996), (0, len(raw)), (262_144, 262_144), (262_143, 262_146)):
        assert digests.of_range(tmp_path / "x", offset, count) == sha(raw[offset : offset + count])
    assert digests.of_file(tmp_path / "x") == sha(raw)
    with pytest.raises(OSError, match="ended 4 bytes early"):
        digests.of_range(tmp_path / "x", 1_000_000, 7)
