"""One process at a time in a folder that is being written: who holds it is in a file there, and the system frees it.

The lock is the system's (flock), so one that a killed process left behind is free, whatever its file says; on network
file systems it holds between machines where they keep such locks. Leaves out what is written.
"""

import fcntl
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .artifact import writing
from .errors import HeldError, InputError

FILE = "lock"
mine: Counter[Path] = Counter()  # folders that this process holds, and how often


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While it lasts, `folder` is this process's, which may take it again; made where it is missing.

    The file, and folders made for it alone, go with it. Raises `HeldError`, which says who holds it, `InputError` where
    the file system keeps no locks.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        key = folder.resolve()
        descriptor = None if mine[key] else taken(folder)
        mine[key] += 1
        try:
            yield
        finally:
            mine[key] -= 1
            if descriptor is not None:
                (folder / FILE).unlink(missing_ok=True)
                os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty, or another process has begun there
            for path in made:
                path.rmdir()


def taken(folder: Path) -> int:
    """The locked file of a folder, open, with this process's name in it."""
    path = folder / FILE
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stands(path, descriptor):
                break
            os.close(descriptor)  # its holder went, and took the file along, after this had opened it
        except BlockingIOError as error:
            holder = os.read(descriptor, 1 << 12).decode(errors="replace")
            os.close(descriptor)
            raise HeldError(f"{folder} is {told(holder)}; wait until it has ended, or name another folder") from error
        except OSError as error:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            what = f"{folder} lies on a file system that keeps no locks ({error.strerror})"
            raise InputError(f"{what}, so two commands could mix their files; name a folder elsewhere") from error
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}).encode())
    return descriptor


def stands(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def told(holder: str) -> str:
    """Who holds a folder, by what it has written into the file; it may just have begun to."""
    try:
        found = json.loads(holder)
        return f"held by process {found['process']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "held by another process, which has just begun"
