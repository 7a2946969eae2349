"""One process at a time in a folder: who holds it is told, a dead holder's lock is taken over, nothing is left behind."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from moesaic.cli import main
from moesaic.errors import HeldError, InputError
from moesaic.lock import FILE, held, mine
from moesaic.verify import verify

HOLD = """
import sys, time
from pathlib import Path
from moesaic.lock import held
with held(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"\n"
    yield child
    child.kill()
    child.wait()


def test_the_second_is_told_who_holds_it(tmp_path, holder):
    since = json.loads((tmp_path / "run" / FILE).read_text())["since"]
    with pytest.raises(HeldError) as found, held(tmp_path / "run"):
        pass
    said = f"{tmp_path / 'run'} is held by process {holder.pid} on {socket.gethostname()} since {since}"
    assert str(found.value) == f"{said}; wait until it has ended, or name another folder"
    assert (tmp_path / "run" / FILE).exists() and not mine[(tmp_path / "run").resolve()]


def test_by_whatever_path(tmp_path, holder):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for way in (tmp_path / "link", tmp_path / "run" / ".." / "run"):
        with pytest.raises(HeldError), held(way):
            pass


def test_a_dead_holders_lock_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / FILE).exists()
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / "run" / FILE).exists()


def test_a_holder_that_has_not_written_its_name_yet(tmp_path, holder):
    (tmp_path / "run" / FILE).write_text("")
    with pytest.raises(HeldError, match="has just begun"), held(tmp_path / "run"):
        pass


def test_a_process_may_take_its_own_again(tmp_path):
    with held(tmp_path / "run"):
        with held(tmp_path / "run" / ".." / "run"):
            pass
        assert (tmp_path / "run" / FILE).exists()
        child = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "run")], capture_output=True, text=True)
        assert child.returncode and "HeldError" in child.stderr
    assert not (tmp_path / "run").exists()


def test_what_fails_leaves_no_folder_of_its_own(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), held(tmp_path / "there" / "a" / "b"):
        1 / 0  # noqa: B018
    assert list((tmp_path / "there").iterdir()) == []


def test_a_folder_that_cannot_be_made_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/run cannot be written: Not a directory"),
        held(tmp_path / "file" / "run"),
    ):
        pass


def test_no_locks_no_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="keeps no locks"), held(tmp_path / "a" / "run"):
        pass
    assert list(tmp_path.iterdir()) == [] and not mine[(tmp_path / "a" / "run").resolve()]


def test_a_file_that_goes_after_it_was_opened(tmp_path, monkeypatch):
    """Its holder ends between the opening and the lock: what was locked has no name any more, and another try is due."""
    locked, gone = fcntl.flock, list[int]()

    def late(descriptor, how):
        locked(descriptor, how)
        if not gone:
            (tmp_path / FILE).unlink()
        gone.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(tmp_path):
        assert len(gone) == 2 and json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / FILE).exists()


def test_many_at_once_and_one_at_a_time(tmp_path):
    """Each adds one to a count, reading and writing it apart: without the lock, counts are lost."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "count").write_text("0")
    add = (
        "import sys, time; from pathlib import Path; from moesaic.lock import held; from moesaic.errors import HeldError\n"
        "folder, left = Path(sys.argv[1]), 20\n"
        "while left:\n"
        "  try:\n"
        "    with held(folder):\n"
        "      n = int((folder / 'count').read_text()); time.sleep(0.001); (folder / 'count').write_text(str(n + 1)); left -= 1\n"
        "  except HeldError: pass\n"
        "  time.sleep(0.001)\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", add, str(tmp_path / "run")]) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert (tmp_path / "run" / "count").read_text() == "80"


COMMANDS = {
    "prune": ("prune MODEL OUT --experts 5 --tokens 512 --length 64", "moesaic"),
    "preview": ("prune MODEL OUT --experts 5 --preview --tokens 512 --length 64", "moesaic"),
    "quantize": ("quantize MODEL OUT --format mxfp4", "moesaic"),
    "export": ("export MODEL OUT --to compressed_tensors", "moesaic"),
    "compress": ("compress MODEL OUT --experts 5 --tokens 512 --evaluation-tokens 512 --length 64", ""),
    "measure": ("measure MODEL OUT --harm surrogate --tokens 512 --length 64", ""),
    "allocate": ("allocate MODEL OUT --fit 1MB --harm surrogate --tokens 512 --length 64", ""),
    "calibrate": ("calibrate MODEL OUT --tokens 512 --length 64", ""),
    "evaluate": ("evaluate MODEL --against MODEL --out OUT --tokens 512 --length 64", ""),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("lock") / "model", "minimax_m2", layers=1)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_a_folder_holds_it(name, model, tmp_path, capsys):
    words, inside = COMMANDS[name]
    folder = tmp_path / "out" / inside
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"\n"
        there = sorted(folder.iterdir())
        assert main(words.replace("MODEL", str(model)).replace("OUT", str(tmp_path / "out")).split()) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"is held by process {child.pid} on " in told
        assert {p.name for p in folder.iterdir()} <= {p.name for p in there} | {"threads.json", "evaluate-threads.json"}
    finally:
        child.kill()
        child.wait()


def test_a_stopped_command_keeps_its_folder_and_goes_on(model, tmp_path, capsys):
    words = ["quantize", str(model), str(tmp_path / "out"), "--format", "mxfp4"]
    child = subprocess.Popen([sys.executable, "-m", "moesaic", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    file = tmp_path / "out" / "moesaic" / FILE
    while not (file.exists() and file.read_text()):
        assert child.poll() is None and time.monotonic() < deadline, "it never held its folder"
        time.sleep(0.001)
    child.send_signal(signal.SIGSTOP)
    try:
        assert main(words) == 2 and f"held by process {child.pid}" in capsys.readouterr().err
    finally:
        child.send_signal(signal.SIGCONT)
    assert child.wait() == 0 and not (tmp_path / "out" / "moesaic" / FILE).exists()
    assert verify(tmp_path / "out", quiet=True).holds
