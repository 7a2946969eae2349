"""What stays in memory between steps: dense parts for good, experts as long as there is room for them.

Every step needs every dense part, so the first ones that fit are pinned; a least-recently-used rule
would drop each just before its turn. Experts are dropped by that rule. Leaves out where things come from.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Resident:
    """Values by key, within `limit_bytes`. Made and changed by one thread; `get` may be called by others."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.pinned_bytes = self.passing_bytes = 0
        self.pinned: dict[Hashable, Any] = {}
        self.passing: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()  # oldest use first
        self.hits = self.misses = 0

    def pin(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The value of `key`, kept for good if there is room beside what is pinned, else made anew each time."""
        if key in self.pinned:
            return self.pinned[key]
        value = make()
        if self.pinned_bytes + size(value) <= self.limit_bytes:
            self.pinned[key] = value
            self.pinned_bytes += size(value)
            self.trim()
        return value

    def get(self, key: Hashable) -> Any | None:
        """The value of `key` if it is here. Counts no use of it: `keep` does."""
        found = self.passing.get(key)
        return found[0] if found else None

    def keep(self, key: Hashable, value: Any, value_bytes: int) -> None:
        """Note a use of `key`; the least recently used go where there is no room for it."""
        if key in self.passing:
            self.hits += 1
            self.passing.move_to_end(key)
            return
        self.misses += 1
        self.passing[key] = (value, value_bytes)
        self.passing_bytes += value_bytes
        self.trim()

    def trim(self) -> None:
        while self.passing and self.pinned_bytes + self.passing_bytes > self.limit_bytes:
            _, (_, freed) = self.passing.popitem(last=False)
            self.passing_bytes -= freed
