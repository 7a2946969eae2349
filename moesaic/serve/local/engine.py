"""The thread that generates, and how requests on the event loop talk to it.

One thread owns the batch. A request is a job: some passages put in the batch's line together, and one queue
in which every step tells of them. A job that is given up leaves the batch at the next step. Leaves out
text and HTTP.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from ...errors import BusyError, EngineError, InputError, MoesaicError
from ...generate import Batch, Decoder, Passage, Sampling, Token

Ask = tuple[Sequence[int], int, Sampling]  # prompt, most new tokens, how to choose them
ENDED = "the generating thread has ended; restart the server"


@dataclass(frozen=True)
class News:
    """What one step did for the passage `index` of a job."""

    index: int
    tokens: Sequence[Token] = ()
    finish: str = ""
    echoed: Sequence[Token] = ()  # all of them, with the first token or the end
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """Passages that one request waits for. `open` holds those of which there will be news."""

    passages: Sequence[Passage]
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[News] = field(default_factory=asyncio.Queue)
    open: set[int] = field(default_factory=set)
    told: list[int] = field(default_factory=list)  # tokens of each


class Engine:
    """Owns the generating thread from `start` to `stop`. At most `most_passages` are in its hands at a time."""

    def __init__(self, decoder: Decoder, cache_tokens: int, most_passages: int) -> None:
        self.decoder, self.most_passages = decoder, most_passages
        self.batch = Batch(decoder, cache_tokens)
        self.places: dict[Passage, tuple[Job, int]] = {}  # of every passage that someone waits for
        self.leaving: list[Passage] = []
        self.stopping = False
        self.changed = threading.Condition()  # guards the three above
        self.thread = threading.Thread(target=self.work, name="generate", daemon=True)

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    @property
    def cache_bytes(self) -> int:
        return sum(passage.cache.bytes for passage in tuple(self.batch.live))

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def submit(self, asks: Sequence[Ask]) -> Job:
        """All of `asks` or none. Raises `InputError` for what cannot be generated, `BusyError` for what cannot now."""
        if len(asks) > self.most_passages:
            raise InputError(f"the request makes {len(asks):,} texts; this server makes {self.most_passages:,} at once")
        passages = [self.batch.passage(*ask) for ask in asks]
        job = Job(passages, asyncio.get_running_loop(), open=set(range(len(asks))), told=[0] * len(asks))
        with self.changed:
            if not self.alive:
                raise EngineError(ENDED)
            if len(self.places) + len(asks) > self.most_passages:
                raise BusyError(
                    f"{len(self.places):,} texts are being made, of {self.most_passages:,}; try again later"
                )
            self.places |= {passage: (job, i) for i, passage in enumerate(passages)}
            self.batch.waiting.extend(passages)
            self.changed.notify()
        return job

    async def follow(self, job: Job) -> AsyncIterator[News]:
        """Everything that becomes of a job. Raises what ended it before its time."""
        while job.open:
            news = await job.news.get()
            if news.error is not None:
                raise news.error
            if news.index in job.open:
                if news.finish:
                    job.open.discard(news.index)
                yield news

    def close(self, job: Job, index: int) -> None:
        """No more of this passage is wanted."""
        job.open.discard(index)
        with self.changed:
            if self.places.pop(job.passages[index], None) is not None:
                self.leaving.append(job.passages[index])
                self.changed.notify()

    def cancel(self, job: Job) -> None:
        for index in range(len(job.passages)):
            self.close(job, index)

    # What follows runs in the thread.

    def work(self) -> None:
        try:
            while self.ready():
                try:
                    moved = self.batch.step()
                except MoesaicError as error:  # of the weights: whoever was in that sweep has lost its place
                    moved, self.batch.live = self.batch.live, []
                    for passage in moved:
                        passage.error = error
                for passage in moved:
                    self.tell(passage)
        finally:
            for passage in tuple(self.places):
                passage.error = EngineError(ENDED)
                self.tell(passage)

    def ready(self) -> bool:
        """Wait for something to do; False when there will be nothing more."""
        with self.changed:
            while True:
                for passage in self.leaving:
                    self.batch.drop(passage)
                self.leaving.clear()
                if self.stopping:
                    return False
                if self.batch.live or self.batch.waiting:
                    return True
                self.changed.wait()

    def tell(self, passage: Passage) -> None:
        """What is new of a passage, to its job if that still waits."""
        with self.changed:
            if passage not in self.places:
                return
            job, index = self.places.pop(passage) if passage.over else self.places[passage]
        new, first = passage.tokens[job.told[index] :], job.told[index] == 0
        if not (new or passage.over):
            return
        job.told[index] = len(passage.tokens)
        news = News(index, new, passage.finish, passage.echoed if first else (), passage.error)
        if not job.loop.is_closed():
            job.loop.call_soon_threadsafe(job.news.put_nowait, news)
