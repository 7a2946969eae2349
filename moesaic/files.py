"""Opening files that somebody else made: plain ones only, never one that could hang, never end, or lie elsewhere;
and reading their text, which is UTF-8, whole, in pieces or as JSON Lines.

A folder that was downloaded may hold a FIFO (opening it waits for ever), a device (it never ends), or a link to a
file of the user's that has nothing to do with the model (it would be exported, and published). So every file of a
model or data folder is opened here. A link is followed if it leads

    to a file in the same folder, or below it
    to the `blobs` of a Hub cache, where huggingface_hub keeps what its snapshots name

and refused otherwise. What the user names on the command line is the user's choice: the folder itself, or a single
file, may be a link to anywhere. A byte order mark at the start of a text is never part of it. Leaves out what the
files and texts mean.
"""

import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import FileError, InputError

SMALL_BYTES = 100 << 20  # of a file that is read whole: the index of the largest models has a third of it
HUB_FOLDERS = ("models--", "datasets--", "spaces--")  # how a Hub cache names what it keeps
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

ENCODING = "utf-8-sig"  # UTF-8, less the byte order mark that some editors put first
MARK = b"\xef\xbb\xbf"  # that mark
CHUNK = 1 << 20  # characters read at a time
LONGEST = 256 << 20  # bytes of one line of JSON Lines, which has to be in memory whole


def open_file(path: Path, root: Path | None = None) -> BinaryIO:
    """A plain file, opened for reading, unbuffered. With `root`, links that leave that folder are refused.

    Never waits: a FIFO is refused before it is opened. Raises `FileError`, and `OSError` where the system refuses.
    """
    if root is not None:
        check_link(path, root)
    check_plain(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_kind(path, os.fstat(descriptor).st_mode)  # it may have been replaced since
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, root: Path | None = None, most: int = SMALL_BYTES) -> bytes:
    """A whole file of at most `most` bytes. Raises `FileError` for a larger or endless one, and as `open_file` does."""
    with open_file(path, root) as file:
        size = os.fstat(file.fileno()).st_size
        found = bytearray()
        while size <= most and len(found) <= most and (more := file.read(min(1 << 24, most + 1 - len(found)))):
            found += more
    if max(size, len(found)) > most:
        what = f"{size:,} bytes" if size > most else f"more than the {size:,} bytes that it says it has"
        raise FileError(f"{path} has {what}, and at most {most:,} are read; fetch the right file")
    return bytes(found)


def check_plain(path: Path) -> None:
    """Refuse what is no plain file, without opening it."""
    check_kind(path, os.stat(path).st_mode)


def check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise FileError(f"{path} is {kind}, wanted a plain file; remove it, or fetch the file again")


def check_size(path: Path, most: int) -> None:
    if (size := os.stat(path).st_size) > most:
        raise FileError(f"{path} has {size:,} bytes, and at most {most:,} are read; fetch the right file")


def check_link(path: Path, root: Path) -> None:
    """Refuse a link in `root` that leads out of it, in a circle, or nowhere."""
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        what = error.strerror or str(error)
        raise FileError(f"{path} cannot be read: {what}; remove it, or put the file itself there") from error
    if not real.is_relative_to(os.path.realpath(root)) and not is_hub_blob(real):
        raise FileError(f"{path} leads out of {root}, to {real}; put the file itself there")


def same_files(a: Path, b: Path) -> bool:
    """Whether two plain files have the same bytes."""
    with open_file(a) as one, open_file(b) as other:
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return False
        while mine := one.read(1 << 20):
            if mine != other.read(len(mine)):
                return False
        return not other.read(1)


def is_hub_blob(real: Path) -> bool:
    """Whether a path without links is one of the files that a Hub cache keeps by their hashes."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith(HUB_FOLDERS)


def is_hidden(name: str) -> bool:
    """Whether a file is none of a folder's content: a hidden one, a Mac's `._x`, an editor's lock `~$x`."""
    return name.startswith((".", "~$"))


def walk(root: Path, *leave: str) -> list[Path]:
    """Every file in `root` and below it, sorted; left out are hidden ones and folders, and what `leave` names at the top.

    Links to files are followed, under the rules above. Raises `FileError` for whatever is no plain file and no folder.
    """
    found, folders = list[Path](), [root]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as scan:
            for entry in scan:
                if is_hidden(entry.name) or (folder == root and entry.name in leave):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(folder / entry.name)
                    continue
                found.append(folder / entry.name)
                if entry.is_symlink():
                    check_link(found[-1], root)
                if not entry.is_file(follow_symlinks=False):
                    check_plain(found[-1])
    return sorted(found)


# Text -----------------------------------------------------------------------------------------------------------------


def decoded(raw: bytes) -> str:
    """Raises `UnicodeDecodeError`, a `ValueError`."""
    return raw.decode(ENCODING)


def read_utf8(path: Path) -> str:
    """A whole file. Raises `InputError`."""
    return "".join(pieces(path))


def pieces(path: Path, root: Path | None = None) -> Iterator[str]:
    """A file piece by piece, every end of a line as `\\n`; `root` as in `open_file`. Raises `InputError`."""
    try:
        with (
            open_file(path, root) as raw,
            io.TextIOWrapper(io.BufferedReader(cast(io.RawIOBase, raw)), ENCODING) as file,
        ):
            while piece := file.read(CHUNK):
                yield piece
    except (OSError, ValueError) as error:  # not UTF-8, or a null character in the name
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from error


def json_lines(path: Path, root: Path | None = None, containing: bytes = b"") -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line that is not blank, and has `containing` in it if it has no escapes.

    Lines end at `\\n` alone, as jsonlines.org says: U+2028, U+2029 and U+0085 may stand in a string. Raises
    `InputError`, naming the line.
    """
    number = 0
    try:
        with open_file(path, root) as unbuffered, io.BufferedReader(cast(io.RawIOBase, unbuffered)) as file:
            while raw := file.readline(LONGEST + 1):
                number += 1
                if len(raw) > LONGEST:
                    raise InputError(
                        f"{path} line {number} is longer than {LONGEST >> 20} MiB; break it up, or write its text to a .txt file"
                    )
                if containing not in raw and b"\\u" not in raw:
                    continue
                line = decoded(raw) if number == 1 else raw.decode()
                if line.strip():
                    yield f"{path} line {number}", json.loads(line)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} line {number or 1} cannot be read as UTF-8 text ({error})") from error
    except (ValueError, RecursionError) as error:  # too deep, or an integer of thousands of digits
        raise InputError(f"{path} line {number} is not JSON that can be read ({error})") from error
