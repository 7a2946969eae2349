"""UTF-8 text of files: whole, in pieces or as JSON Lines; a byte order mark at the start is never part of it.

The one reader of what people write: texts, conversations, configs, keys. Leaves out what the text means.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from .errors import InputError
from .files import open_file

ENCODING = "utf-8-sig"  # UTF-8, less the byte order mark that some editors put first
MARK = b"\xef\xbb\xbf"  # that mark
CHUNK = 1 << 20  # characters read at a time
LONGEST = 256 << 20  # bytes of one line of JSON Lines, which has to be in memory whole


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
