"""Progress of a long stage: a bar with rate and time left on a terminal, plain lines elsewhere, nothing if told so.

Leaves out results: those go to standard output, progress to standard error.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two plain lines


@dataclass
class Meter:
    """Counts what is done of what there is, from any thread. `done` equals `total` when the stage ends well: callers compare."""

    title: str
    total: int
    unit: str  # "B" is shown as GB; anything else as it is: "tokens", "experts"
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)
    bar: Progress | None = None
    task: int = 0
    plain: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, amount: int) -> None:
        with self.lock:
            self.done += amount
            self.show()

    def show(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)  # type: ignore[arg-type]
        elif self.plain and time.monotonic() - self.shown > PLAIN_SECONDS:
            self.shown = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        share = self.done / max(self.total, 1)
        return f"{self.title}: {share:4.0%}  {amount(rate, self.unit)}/s  {clock(left)} left"


class Rate(ProgressColumn):
    """Units a second, in the unit's own words."""

    def render(self, task: Task) -> Text:
        return Text(f"{amount(task.speed or 0.0, task.fields['unit'])}/s", style="cyan")


@contextmanager
def progress(title: str, total: int, unit: str, quiet: bool = False) -> Iterator[Meter]:
    """A `Meter` shown while the block runs, and one line that sums up when it ends."""
    meter = Meter(title, total, unit, plain=not quiet)
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield meter
    else:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.percentage:>4.0f}%"),
            Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            meter.bar, meter.task = bar, bar.add_task(title, total=total, unit=unit)
            yield meter
    if not quiet:
        seconds = time.monotonic() - meter.started
        print(f"{title}: {amount(meter.done, unit)} in {clock(seconds)}", file=sys.stderr, flush=True)


@contextmanager
def notice(sentence: str, quiet: bool = False, after_seconds: float = 1.0) -> Iterator[None]:
    """Say what is waited for, if the block takes longer than a moment: something that is fast at every call but the first."""
    timer = threading.Timer(after_seconds, print, (sentence,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def amount(value: float, unit: str) -> str:
    if unit != "B":
        return f"{value:,.0f} {unit}" if value >= 10 or value == int(value) else f"{value:.1f} {unit}"
    for scale, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.2f} {name}"
    return f"{value:.0f} B"


def clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d} min"
