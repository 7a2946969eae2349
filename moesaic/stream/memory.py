"""What bounds the memory of a stream: work in blocks of a fixed size, and weights read one item ahead, no more.

How many tokens a block has decides the shapes of products and the order of sums, hence bits. So it follows from the
model's widths and one constant, and never from the memory that a machine has or is told to use: that decides how much
is held at once (`resources`), and whether a block fits at all.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Key = TypeVar("Key")
Loaded = TypeVar("Loaded")


def standard_block_bytes(device: torch.device) -> int:
    """Working memory of one block: 256 MiB, or about a sixteenth of a GPU.

    Of a GPU's total the power of two below counts, which is the same whatever a driver keeps to itself: products of
    different GPUs differ anyway, and those of one kind should not.
    """
    if device.type == "cuda":
        return 1 << (torch.cuda.get_device_properties(device).total_memory // 16).bit_length() - 1
    return 256 << 20


def spans(total: int, bytes_each: int, limit_bytes: int) -> Iterator[slice]:
    """0 … `total` in slices whose items need `limit_bytes` together; an item that is larger goes alone."""
    step = max(1, limit_bytes // max(1, bytes_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def ahead(load: Callable[[Key], Loaded], keys: Iterable[Key]) -> Iterator[tuple[Key, Loaded]]:
    """Each key with what `load` makes of it, the next one being loaded by a thread while this one is used.

    Two items exist at a time, if the caller drops its own before it asks for the next. `load` should
    read and not compute: torch's threads are the caller's. Its errors are raised where the item was due.
    """
    pending: deque[tuple[Key, Future[Loaded]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as pool:
        for key in keys:
            pending.append((key, pool.submit(load, key)))
            if len(pending) == 2:
                yield taken(pending)
        while pending:
            yield taken(pending)


def taken(pending: deque[tuple[Key, Future[Loaded]]]) -> tuple[Key, Loaded]:
    """The oldest item; no name here keeps it alive afterwards."""
    key, future = pending.popleft()
    return key, future.result()
