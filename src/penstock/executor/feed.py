"""The bounded pull: items in, outcomes out, never more in between than the window allows.

    source -> [room in the window?] -> [slot?] -> next item -> job in a task of its own -> outcome -> ready -> reader
                    ^                                                                                    |
                    +------------------------------- one was read --------------------------------------+

One puller task turns the source into jobs. It waits for room (a slow reader slows the pull), then for a slot, then
takes the next item; from an async source it takes the item before the slot, so that no slot is held while the source
makes it wait, and one item at the most is ahead. In input order a straggler at the head holds back what is behind it,
and the window bounds how much that is.

Counts: read = delivered + ready + in flight + left, at any moment. `left` are items whose job was cancelled from
outside or never started.

Cancelled while pulling, the item in hand is `left`. A source that raises ends the pull; what came before it is
delivered first. Loop thread only.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from penstock.errors import ClosedError, TooManyErrors, UsageError
from penstock.executor.active import ActiveJob
from penstock.executor.running import PATIENCE, RunningJobs
from penstock.outcome import Outcome
from penstock.threads.pull import ThreadSource

MINIMUM_SAMPLE = 100
"""Finished jobs before a share is judged. Arbitrary, because: resilience4j and Polly judge from 100 calls on too."""

_END: Any = object()


class Feed:
    """The jobs of one stream."""

    def __init__(
        self,
        running: RunningJobs,
        source: Iterable[Any] | AsyncIterable[Any],
        new_job: Callable[[], ActiveJob],
        *,
        spread: bool,
        key: Callable[[Any], Any] | None,
        window: int,
        ordered: bool,
        max_errors: float | None,
        nested: bool,
        on_over: Callable[["Feed"], None],
    ) -> None:
        self.nested = nested
        """True when a job of the same executor reads it."""
        self.read = 0
        self.left = 0
        self.finished = 0
        self.failed = 0
        self.in_flight = 0
        self.ready: deque[Outcome[Any]] = deque()
        self.stopped: BaseException | None = None
        """Why the source was not read to its end: its own error, too many errors, or that we were told to stop."""
        self.over = asyncio.Event()
        """Set when nothing of this feed runs any more."""
        self._running = running
        self._source = source
        self._new_job = new_job
        self._spread = spread
        self._key = key
        self._window = window
        self._max_errors = max_errors
        self._in_order: deque[ActiveJob] | None = deque() if ordered else None
        self._on_over = on_over
        self._undelivered = 0
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._puller = self._loop.create_task(self._pull(), name="penstock-puller")
        self._puller.add_done_callback(self._pulled)

    def take(self) -> Outcome[Any]:
        """The next outcome that is ready; makes room for one more item."""
        self._undelivered -= 1
        _wake(self._room)
        return self.ready.popleft()

    async def wait(self) -> None:
        """Wait until something is ready or the feed is over.

        Raises:
            UsageError: another task waits already.
        """
        if self._reader is not None:
            raise UsageError(
                "a stream is read by one task at a time, and another one is waiting on it. "
                "Read it in one task and hand the values on, for example through an asyncio.Queue."
            )
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def stop(self, why: BaseException) -> None:
        """Take no more items; what is in flight goes on. `why` is raised to the reader after everything else."""
        if not self._puller.done():
            self._end_early(why)

    def cancel(self) -> None:
        """Take no more items and cancel what is in flight."""
        self.stop(ClosedError("the stream was closed before its source was read to its end"))
        self._running.cancel(lambda job: job.feed is self)

    async def close(self) -> None:
        """Cancel, and wait until nothing of this feed runs.

        The wait is bounded: jobs that still run after `PATIENCE` seconds are named in the log and abandoned.
        """
        if self.over.is_set():
            return
        self.cancel()
        try:
            async with asyncio.timeout(PATIENCE):
                await self.over.wait()
        except TimeoutError:
            self._running.complain(lambda job: job.feed is self)

    async def _pull(self) -> None:
        if isinstance(self._source, AsyncIterable):
            await self._pull_async(aiter(self._source))
        else:
            await self._pull_sync(iter(self._source))

    async def _pull_sync(self, iterator: Iterator[Any]) -> None:
        slots = self._running.slots
        while True:
            if self._undelivered >= self._window:
                await self._wait_for_room()
            job = self._new_job()
            await slots.take(job)
            item = _END
            try:
                item = next(iterator, _END)
            finally:
                if item is _END:
                    slots.give_back(job)
            if item is _END:
                return
            self.read += 1
            self._start(job, item)

    async def _pull_async(self, iterator: AsyncIterator[Any]) -> None:
        slots = self._running.slots
        try:
            while True:
                if self._undelivered >= self._window:
                    await self._wait_for_room()
                item = await anext(iterator, _END)
                if item is _END:
                    return
                self.read += 1
                job = self._new_job()
                try:
                    await slots.take(job)
                except asyncio.CancelledError:
                    self.left += 1
                    raise
                self._start(job, item)
        finally:
            if isinstance(iterator, ThreadSource):
                iterator.stop()

    async def _wait_for_room(self) -> None:
        self._room = self._loop.create_future()
        try:
            await self._room
        finally:
            self._room = None

    def _start(self, job: ActiveJob, item: Any) -> None:
        job.feed = self
        job.input = item
        job.args = item if self._spread else (item,)
        self._undelivered += 1
        self.in_flight += 1
        if self._in_order is not None:
            self._in_order.append(job)
        if self._key is not None:
            try:
                job.key = self._key(item)
            except Exception as error:  # noqa: BLE001  # it becomes the outcome of the item
                self._refuse(job, error)
                return
        self._running.start(job, self._job_ended)

    def _refuse(self, job: ActiveJob, error: Exception) -> None:
        refusal = UsageError(
            f"key= raised {error!r} for item {job.input!r:.200}. It must return the key of every item; "
            f"this item was not given to the job."
        )
        refusal.__cause__ = error
        self._job_ended(job, self._running.refuse(job, refusal))

    def _job_ended(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        self.in_flight -= 1
        if outcome is None:
            self.left += 1
        else:
            self.finished += 1
            if outcome.kind is not None:
                self.failed += 1
                self._judge()
        self._deliver(job, outcome)
        self._end_if_over()

    def _deliver(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        if self._in_order is None:
            self._make_ready(outcome)
            return
        job.settled = True
        job.result = outcome
        while self._in_order and self._in_order[0].settled:
            self._make_ready(self._in_order.popleft().result)

    def _make_ready(self, outcome: Outcome[Any] | None) -> None:
        if outcome is None:
            self._undelivered -= 1
            _wake(self._room)
        else:
            self.ready.append(outcome)
            _wake(self._reader)

    def _judge(self) -> None:
        allowed = self._max_errors
        if allowed is None:
            return
        if isinstance(allowed, float):
            if self.finished < MINIMUM_SAMPLE:
                return
            allowed *= self.finished
        if self.failed > allowed:
            assert self._max_errors is not None
            self._end_early(TooManyErrors(self.failed, self.finished, self._max_errors))

    def _end_early(self, why: BaseException) -> None:
        if self.stopped is None:
            self.stopped = why
            self._puller.cancel()

    def _pulled(self, puller: "asyncio.Task[None]") -> None:
        if puller.cancelled():
            self._end_early(ClosedError("the event loop is closing"))
        elif (error := puller.exception()) is not None:
            self._end_early(error)
        self._end_if_over()

    def _end_if_over(self) -> None:
        if not self.in_flight and self._puller.done():
            self.over.set()
            self._on_over(self)
            _wake(self._reader)


def _wake(waiter: "asyncio.Future[None] | None") -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
