"""What a command may take of the machine: memory that is available, within a container's limit too; and threads.

`SC_AVPHYS_PAGES` would say how much memory is empty: little of it after a sweep, when the page cache is full of files
that the system gives up at once; and macOS has no such figure. Leaves out the machines that an export is served on (fit).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .artifact import read_json, write_json
from .errors import InputError, StaleError

ROOT = Path("/")
THREADS = "threads.json"  # of a run folder


@dataclass(frozen=True)
class Resources:
    """What a command may take.

    memory_bytes  for everything (`--memory`); None: what is available when it is asked
    threads       that products are cut over (`--threads`); None: what a run began with, else torch's own choice
    """

    memory_bytes: int | None = None
    threads: int | None = None

    def held_bytes(self, device: torch.device) -> int:
        """Memory for what a command may hold more or less of: hidden states of branches side by side, decoded weights.

        Half of it all. The other half is for what does not depend on memory: one block's products, a layer's attention,
        two experts, what is being saved, and Python with its libraries.
        """
        return (available_bytes(device) if self.memory_bytes is None else self.memory_bytes) // 2

    @contextmanager
    def used(self, *kept_in: Path) -> Iterator[None]:
        """While it lasts, torch computes with as many threads as the results beside these files are made with.

        Products of real width differ in their last bits between counts of threads, so a run has one: `THREADS` in its
        folder keeps that of the first command that computes for it. Numba's kernels run on one thread each, and what
        is cut over more of them are rows, which have nothing to do with each other. Raises `InputError` for a count
        below 1, `StaleError` where a file has another than is asked for, or than another file.
        """
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads is {self.threads}; wanted 1 or more")
        before, count = torch.get_num_threads(), self.threads
        for file in kept_in:
            kept = kept_threads(file)
            if kept is not None and count is not None and kept != count:
                raise StaleError(
                    f"{file.parent} was begun with {counted(kept)}, and this would be {count}: their products differ; "
                    f"give --threads {kept}, or use another run folder"
                )
            count = kept if count is None else count
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, before)
            torch.set_num_threads(count or before)
            for file in kept_in:
                stack.enter_context(begun(file, count or before))
            yield


@contextmanager
def begun(file: Path, threads: int) -> Iterator[None]:
    """`threads` in a run folder before anything else is; a command that leaves nothing there leaves no folder either."""
    folder = file.parent
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    outermost = made[-1].parent if made else folder
    fresh = outermost.is_dir() and kept_threads(file) is None
    if fresh:
        write_json(file, "threads", {"threads": threads}, {})
    try:
        yield
    finally:
        if fresh and folder.is_dir() and list(folder.iterdir()) == [file]:
            file.unlink()
            for path in made:
                if not any(path.iterdir()):
                    path.rmdir()


def kept_threads(file: Path) -> int | None:
    """The count that a run was begun with; None for a new one."""
    return int(read_json(file, "threads")["threads"]) if file.exists() else None


def counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def available_bytes(device: torch.device, root: Path = ROOT) -> int:
    """Memory that can be taken without swapping; of a GPU, what is free on it. `root` is where /proc and /sys are."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *cgroup_bytes(root)])


def cgroup_bytes(root: Path = ROOT) -> Iterator[int]:
    """What each control group of this process still grants, where it sets a limit; its page cache counts as free.

    Versions 1 and 2, and every group above this one (kernel.org, cgroup-v1/memory and cgroup-v2). In a container the
    path may be the host's, which is not mounted there: then the top of the mounted tree is its own group.
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        within = [top / path.strip("/"), *(top / path.strip("/")).parents]
        for group in within[: within.index(top) + 1]:
            if (group / limit).exists() and (group / usage).exists():
                granted = (group / limit).read_text().strip()
                if granted != "max":
                    yield max(0, int(granted) - int((group / usage).read_text()) + file_bytes(group / "memory.stat"))


def file_bytes(stat: Path) -> int:
    """The page cache that a control group is charged for, itself and the groups in it."""
    if not stat.exists():
        return 0
    found = {name: int(count) for name, count in (line.split() for line in stat.read_text().splitlines())}
    whole = "total_" if "total_inactive_file" in found else ""  # version 1 has both; version 2 counts groups below
    return sum(found.get(f"{whole}{name}_file", 0) for name in ("inactive", "active"))
