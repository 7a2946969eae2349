"""Work done in a child process that may die: killed, interrupted, or refused by the system at a call of its own.

A fork, so that it starts at once and inherits what a test has patched. Leaves out Windows, where moesaic
runs but these tests do not.
"""

import itertools
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import MoesaicError

WRITES = ((os, "copy_file_range"), (os, "pwrite"), (os, "replace"), (shutil, "copyfile"), (Path, "write_text"))


def child(work: Callable[[], Any], said: Path | None = None) -> int:
    """Run `work` in a child; its exit code, as the command line gives it, or minus the signal that killed it.

    What a `MoesaicError` says goes to the file `said`.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 70
    try:
        mend_threads()
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except MoesaicError as error:
        code = error.exit_code
        if said:
            said.write_text(str(error))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def mend_threads() -> None:
    """Replace the thread pool that a fork breaks, before two threads come to do so at once: torch fails if they race."""
    torch.set_num_threads(1)


def dying(work: Callable[[], Any], at: int, sign: signal.Signals) -> Callable[[], Any]:
    """`work`, but its `at`-th call that writes sends the process `sign`; a pwrite has by then written half."""
    count = itertools.count(1)

    def deadly(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if next(count) == at:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), sign)
            return real(*args, **options)

        return call

    def patched() -> Any:
        for owner, name in WRITES:
            setattr(owner, name, deadly(getattr(owner, name), name))
        return work()

    return patched


def killed_after(work: Callable[[], Any], seconds: float) -> Callable[[], Any]:
    """`work`, but SIGKILL comes after some time, wherever the process then is."""

    def timed() -> Any:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return work()

    return timed


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
