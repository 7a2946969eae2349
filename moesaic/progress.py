"""Progress of a long stage: a bar with rate and time left on a terminal, plain lines elsewhere, nothing with `quiet`.

A caller from Python gets it as calls of a function of its own (`heard`). Leaves out results: those go to standard
output, progress to standard error.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from rich import table
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two plain lines
MOST_SAMPLES = 512


@dataclass(frozen=True)
class Step:
    """How far a stage is: `done` of `total`, both in `unit` ("B" is bytes); `seconds_left` is None before the first step."""

    stage: str
    done: int
    total: int
    unit: str
    seconds_left: float | None


Listener = Callable[[Step], None]
LISTENER: ContextVar[Listener | None] = ContextVar("LISTENER", default=None)


@contextmanager
def heard(listener: Listener | None) -> Iterator[None]:
    """While it lasts, every stage that begins in this thread calls `listener` at its beginning and after each step.

    One call at a time for a stage, from whichever thread made the step. What it raises ends the stage.
    """
    token = LISTENER.set(listener)
    try:
        yield
    finally:
        LISTENER.reset(token)


@dataclass
class Meter:
    """Counts what is done of what there is, from any thread. `done` equals `total` when the stage ends well: callers compare.

    Its rate is that of the latter half of the time so far: steps of minutes have one too, and what was done before an
    interruption, or is quick at the beginning, is soon no part of it.
    """

    title: str
    total: int
    unit: str  # "B" is shown as GB; anything else as it is: "tokens", "experts"
    done: int = 0
    plain: bool = False
    listener: Listener | None = None
    clock: Callable[[], float] = time.monotonic  # seconds
    lock: threading.Lock = field(default_factory=threading.Lock)
    samples: list[tuple[float, int]] = field(default_factory=list)  # when, and what was done by then
    shown: float = 0.0

    def __post_init__(self) -> None:
        self.shown = self.clock()
        self.samples.append((self.shown, self.done))

    @property
    def started(self) -> float:
        return self.samples[0][0]

    def advance(self, amount: int) -> None:
        with self.lock:
            self.done += amount
            self.samples.append((self.clock(), self.done))
            if len(self.samples) > MOST_SAMPLES:
                del self.samples[1:-1:2]
            if self.plain and self.clock() - self.shown > PLAIN_SECONDS:
                self.shown = self.clock()
                print(self.line(), file=sys.stderr, flush=True)
            self.tell()

    def tell(self) -> None:
        if self.listener is not None:
            self.listener(Step(self.title, self.done, self.total, self.unit, self.left()))

    def rate(self) -> float | None:
        """Units a second; None before the first step has ended."""
        samples = tuple(self.samples)  # at once: a bar is drawn by a thread of its own
        last, done = samples[-1]
        middle = (samples[0][0] + last) / 2
        since, before = next(s for s in reversed(samples) if s[0] <= middle)
        return (done - before) / (last - since) if last > since else None

    def left(self) -> float | None:
        """Seconds until the end; between two steps it goes on falling."""
        rate = self.rate()
        if not rate:
            return None
        return max(0.0, (self.total - self.done) / rate - (self.clock() - self.samples[-1][0]))

    def line(self) -> str:
        return f"{self.title}: {self.done / max(self.total, 1):4.0%}  {speed(self)}  {remaining(self)}"


def speed(meter: Meter) -> str:
    """Its rate in a unit of time that leaves a number to look at."""
    rate = meter.rate()
    if rate is None:
        return f"– {meter.unit}/s"
    for seconds, name in ((1, "s"), (60, "min")):
        if rate * seconds >= 1:
            return f"{amount(rate * seconds, meter.unit)}/{name}"
    return f"{amount(rate * 3600, meter.unit)}/h"


def remaining(meter: Meter) -> str:
    left = meter.left()
    return "? left" if left is None else f"{clock(left)} left"


class Column(ProgressColumn):
    """What a function says of the meter."""

    def __init__(self, of: Callable[[Meter], str]) -> None:
        super().__init__(table.Column(no_wrap=True))
        self.of = of

    def render(self, task: Task) -> Text:
        return Text(self.of(task.fields["meter"]), style="cyan")


class Bar(BarColumn):
    """The meter's, whenever it is drawn."""

    def render(self, task: Task) -> ProgressBar:
        task.completed = task.fields["meter"].done
        return super().render(task)


@contextmanager
def progress(title: str, total: int, unit: str, quiet: bool = False) -> Iterator[Meter]:
    """A `Meter` shown while the block runs, and one line that sums up when it ends."""
    console = Console(stderr=True)
    meter = Meter(title, total, unit, plain=not quiet and not console.is_terminal, listener=LISTENER.get())
    meter.tell()
    if quiet or not console.is_terminal:
        yield meter
    else:
        columns = (
            TextColumn("{task.description:<16}"),
            Bar(bar_width=24),
            TextColumn("{task.percentage:>4.0f}%"),
            Column(speed),
            Column(remaining),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(title, total=total, meter=meter)
            yield meter
    if not quiet:
        seconds = meter.clock() - meter.started
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
