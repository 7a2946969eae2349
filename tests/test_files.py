"""The one opener: plain files are read, and a FIFO, a device, a circle of links or a way out is refused at once.

Every case is also tried where it counts: in a model's folder, with the second in which it has to be refused.
"""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moesaic import files
from moesaic.artifact import read_json, read_tensors, write_json
from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError, FileError, InputError
from moesaic.export import export
from moesaic.files import open_file, read_file, same_files, walk
from moesaic.plan import Plan
from moesaic.plan.pieces import carried
from moesaic.verify import verify


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, and do not hang, when the block takes longer."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def outside(path: Path) -> Path:
    """A file beside the folder that holds `path`."""
    secret = path.parent.parent / "secret"
    secret.write_text("{}")
    return secret


def circle(path: Path) -> None:
    path.symlink_to(path.parent / "circle.json")
    (path.parent / "circle.json").symlink_to(path)


def chain(path: Path) -> None:
    """A link inside the folder to a link that leaves it."""
    (path.parent / "step.json").symlink_to(outside(path))
    path.symlink_to("step.json")


def through_folder(path: Path) -> None:
    """A link with `..` in it, through a folder that is a link itself."""
    elsewhere = path.parent.parent / "elsewhere"
    (elsewhere / "below").mkdir(parents=True)
    (elsewhere / "x.json").write_text("{}")
    path.symlink_to(Path("..") / "elsewhere" / "below" / ".." / "x.json")


def other_blobs(path: Path) -> None:
    """A folder called `blobs` that is no Hub cache's."""
    (path.parent.parent / "blobs").mkdir()
    (path.parent.parent / "blobs" / "x").write_text("{}")
    path.symlink_to(path.parent.parent / "blobs" / "x")


def folder_link(path: Path) -> None:
    (path.parent / "real").mkdir(exist_ok=True)
    path.symlink_to(path.parent / "real")


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (os.mkfifo, "is a FIFO, wanted a plain file"),
    "a socket": (bind, "is a socket, wanted"),
    "a link to a FIFO inside": (lambda p: (os.mkfifo(p.parent / "f"), p.symlink_to("f")), "is a FIFO, wanted"),
    "a folder": (Path.mkdir, "is a folder, wanted"),
    "a link to a folder": (folder_link, "is a folder, wanted"),
    "a link to /dev/zero": (lambda p: p.symlink_to("/dev/zero"), "leads out of .* to /dev/zero"),
    "a link to /proc/self/environ": (lambda p: p.symlink_to("/proc/self/environ"), "leads out of"),
    "an absolute link": (lambda p: p.symlink_to(outside(p)), "leads out of"),
    "a relative link": (lambda p: (outside(p), p.symlink_to("../secret")), "leads out of"),
    "a chain of links": (chain, "leads out of"),
    "a link through a link": (through_folder, "leads out of"),
    "blobs of no cache": (other_blobs, "leads out of"),
    "a circle": (circle, "cannot be read: Too many levels"),
    "a link to itself": (lambda p: p.symlink_to(p), "cannot be read: Too many levels"),
    "a link to nothing": (lambda p: p.symlink_to("gone"), "cannot be read: No such file"),
    "a link to the folder above": (lambda p: p.symlink_to(".."), "leads out of"),
}
NAMES = ("config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors", "tokenizer.json", "a.py")


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, planted):
    plant, sentence = PLANTED[planted]
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "x.json"
    plant(path)
    with within(1):
        for call in (lambda: open_file(path, path.parent), lambda: read_file(path, path.parent)):
            with pytest.raises(FileError, match=sentence) as caught:
                call()
            assert "\n" not in str(caught.value)
        if planted != "a folder":  # which is walked into
            with pytest.raises(FileError, match=r"leads out|is a|cannot be read"):
                walk(path.parent)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_model_folder_with_one_is_refused_at_once(m3, tmp_path, planted, name):
    if planted == "a folder" and name in ("a.py", "tokenizer.json"):
        pytest.skip("a folder that holds nothing, and that opening a checkpoint does not read")
    model = tmp_path / "a" / "model"
    shutil.copytree(m3.path, model)
    path = model / name
    path.unlink(missing_ok=True)
    PLANTED[planted][0](path)
    with within(1), pytest.raises(CheckpointError) as caught:
        Checkpoint.open(model)
    named = (name, "has no config.json", "step.json", "circle.json")
    assert "\n" not in str(caught.value) and any(word in str(caught.value) for word in named)


def test_folders_below_are_looked_through(m3, tmp_path):
    """A FIFO among remote code, a way out three folders down, and a nest of folders."""
    model = Path(shutil.copytree(m3.path, tmp_path / "model"))
    deep = model / "x" / "y" / "z"
    deep.mkdir(parents=True)
    (deep / "same.json").symlink_to("../../../config.json")
    deep.joinpath(*"d" * 200).mkdir(parents=True)
    assert Checkpoint.open(model).identity == m3.identity
    (model / "x" / "out.py").symlink_to("../../secret")
    (tmp_path / "secret").touch()
    with pytest.raises(CheckpointError, match=r"x/out\.py leads out"):
        Checkpoint.open(model)
    (model / "x" / "out.py").unlink()
    os.mkfifo(model / "x" / "y" / "out.py")
    with within(1), pytest.raises(CheckpointError, match=r"x/y/out\.py is a FIFO"):
        Checkpoint.open(model)


def test_links_that_are_legal(m3, tmp_path):
    """Within the folder; into a Hub cache's blobs, from its snapshots or from anywhere; and the folder itself."""
    cache = tmp_path / "hub" / "models--some--model"
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    for i, file in enumerate(sorted(m3.path.iterdir())):
        shutil.copy(file, cache / "blobs" / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    (cache / "blobs" / "ff").write_text("remote code")
    (snapshot / "sub" / "code.py").symlink_to("../../../blobs/ff")
    (snapshot / "README").symlink_to("LICENSE")
    named = tmp_path / "by-name"
    named.symlink_to(snapshot)
    local = tmp_path / "local"  # what huggingface_hub once made of --local-dir
    local.mkdir()
    for file in snapshot.iterdir():
        if not file.is_dir():
            (local / file.name).symlink_to(file.resolve())
    for folder in (snapshot, named, local):
        found = Checkpoint.open(folder)
        assert found.identity == m3.identity
        name = found.architecture.norm
        assert found.read(name).equal(m3.read(name))
    assert {str(f) for f in carried(named)} >= {"sub/code.py", "README", "LICENSE", "tokenizer.json"}
    out = export(Checkpoint.open(named), Plan("mxfp8"), tmp_path / "out", quiet=True).path
    assert (out / "sub" / "code.py").read_text() == "remote code" and not (out / "sub" / "code.py").is_symlink()
    assert verify(out, Checkpoint.open(named), quiet=True).holds


def test_hidden_entries_are_left_alone(m3, tmp_path):
    """They are never read: .git, .cache, and what a Mac leaves behind."""
    model = Path(shutil.copytree(m3.path, tmp_path / "model"))
    os.mkfifo(model / ".fifo")
    (model / ".cache").symlink_to("/")
    (model / "._model-00001-of-00003.safetensors").write_bytes(b"\0\5\26\7 Mac OS X")
    (model / "~$tokenizer.json").write_text("an owner's name")
    assert Checkpoint.open(model).identity == m3.identity
    assert not any(f.name.startswith((".", "~$")) for f in carried(model))


def test_a_file_without_end_or_too_large_is_not_read(tmp_path):
    large = tmp_path / "large.json"
    large.touch()
    os.truncate(large, 1 << 40)
    with within(1), pytest.raises(FileError, match=r"has 1,099,511,627,776 bytes, and at most 104,857,600 are read"):
        read_file(large)
    (tmp_path / "small").write_bytes(b"12345")
    assert read_file(tmp_path / "small", most=5) == b"12345"
    with pytest.raises(FileError, match="has 5 bytes, and at most 4"):
        read_file(tmp_path / "small", most=4)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs a file that says it is empty and is not")
def test_a_file_that_says_it_is_empty_and_goes_on(tmp_path):
    """As those of /proc do; a bind mount can put one anywhere."""
    assert len(read_file(Path("/proc/self/maps"))) > 10
    with pytest.raises(FileError, match="has more than the 0 bytes that it says it has, and at most 10 are read"):
        read_file(Path("/proc/self/maps"), most=10)


def test_a_file_that_becomes_a_fifo_is_refused(tmp_path, monkeypatch):
    """Between the look and the opening; opening it does not wait."""
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(files, "check_plain", lambda path: None)
    with within(1), pytest.raises(FileError, match="is a FIFO"):
        open_file(tmp_path / "x")


def test_equal_and_unequal_files(tmp_path):
    for name, raw in (("a", b"x" * 3_000_000), ("b", b"x" * 3_000_000), ("c", b"x" * 2_999_999 + b"y"), ("d", b"x")):
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "e").touch()
    equal = {(a, b) for a in "abcde" for b in "abcde" if same_files(tmp_path / a, tmp_path / b)}
    assert equal == {(x, x) for x in "abcde"} | {("a", "b"), ("b", "a")}


def test_the_files_of_a_run_are_opened_so_too(tmp_path):
    """A downloaded export has moesaic/plan.json, and whoever wrote that."""
    write_json(tmp_path / "plan.json", "plan", {}, {})
    assert read_json(tmp_path / "plan.json", "plan")["kind"] == "plan"
    for read in (read_json, read_tensors):
        os.mkfifo(tmp_path / read.__name__)
        with within(1), pytest.raises(InputError, match="is a FIFO"):
            read(tmp_path / read.__name__, "plan")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read as a plan file"):
        read_json(tmp_path / "deep", "plan")


def test_an_export_with_a_fifo_in_place_of_a_file_is_a_finding(m3, tmp_path):
    out = export(m3, Plan("mxfp8"), tmp_path / "out", quiet=True).path
    (out / "LICENSE").unlink()
    os.mkfifo(out / "LICENSE")
    with within(5):
        verdict = verify(out, m3, quiet=True)
    assert "LICENSE is a FIFO" in str(verdict.findings[0])
