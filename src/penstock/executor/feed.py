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
from contextlib import suppress
from typing import Any

from penstock.errors import ClosedError, TooManyErrors, UsageError
from penstock.executor.active import ActiveJob
from penstock.executor.running import PATIENCE, RunningJobs
from penstock.outcome import Outcome, contained
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
        new_job: Callable[..., ActiveJob],
        *,
        timeout: float | None,
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
        self._new_job = new_job
        self._timeout = timeout
        self._spread = spread
        self._key = key
        self._window = window
        self._max_errors = max_errors
        self._in_order: deque[ActiveJob] | None = deque() if ordered else None
        self._on_over = on_over
        self._gave_up = False
        self._undelivered = 0
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        # The puller alone holds the source: a generator that nobody else holds is closed when the pull ends.
        # Not made by the loop's task factory: an eager one would run it before this object is complete.
        self._puller: asyncio.Task[None] | None = asyncio.Task(
            self._pull(source), loop=self._loop, name="penstock-puller"
        )
        self._puller.add_done_callback(self._pulled)

    def take(self) -> Outcome[Any]:
        """The next outcome that is ready; makes room for one more item."""
        self._undelivered -= 1
        if self._room is not None:
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
        if self._puller is not None:
            self._end_early(why)

    def cancel(self) -> None:
        """Take no more items and cancel what is in flight."""
        self.stop(ClosedError("the stream was closed before its source was read to its end"))
        if self.in_flight and self.stopped is None:
            self.stopped = ClosedError("the stream was closed before all of its jobs had ended")
        self._running.cancel(self._is_mine)

    async def close(self) -> None:
        """Cancel, and wait until nothing of this feed runs.

        The wait is bounded: jobs that still run after `PATIENCE` seconds are named in the log and abandoned.
        """
        self.ready.clear()
        while self._in_order:
            self._in_order.popleft().result = None
        if self.over.is_set():
            return
        self.cancel()
        deadline = self._loop.time() + PATIENCE
        if not await self._running.wait(PATIENCE, self._is_mine):
            self._running.complain(self._is_mine)
            self.give_up()
        with suppress(TimeoutError):  # a source that does not let go of its puller
            async with asyncio.timeout_at(deadline):
                await self.over.wait()

    def give_up(self) -> None:
        """Be over without the jobs that do not end: their items are `left`."""
        self.left += self.in_flight
        self.in_flight = 0
        self._gave_up = True
        self._end()

    def _is_mine(self, job: ActiveJob) -> bool:
        return job.receiver is self

    async def _pull(self, source: Iterable[Any] | AsyncIterable[Any]) -> None:
        try:
            if isinstance(source, AsyncIterable):
                await self._pull_async(aiter(source))
            else:
                await self._pull_sync(iter(source))
        except SystemExit as error:
            harmless = contained(error, "the source of the items")
            raise harmless from error

    async def _pull_sync(self, iterator: Iterator[Any]) -> None:
        slots = self._running.slots
        while True:
            if self._undelivered >= self._window:
                await self._wait_for_room()
            job = self._new_job((), self._timeout, self)
            if not slots.take_nowait(job):
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
                job = self._new_job((), self._timeout, self)
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
        job.input = item
        job.number = self.read
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
        self._running.start(job)

    def _refuse(self, job: ActiveJob, error: Exception) -> None:
        refusal = UsageError(
            f"key= raised {error!r} for item {job.input!r:.200}. It must return the key of every item; "
            f"this item was not given to the job."
        )
        refusal.__cause__ = error
        self._running.refuse(job, refusal)

    def job_ended(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        """Take the outcome of a job of this feed; None if it was cancelled from outside."""
        if self._gave_up:
            return
        self.in_flight -= 1
        if outcome is None:
            self.left += 1
        else:
            self.finished += 1
            if outcome.kind is not None:
                self.failed += 1
                self._judge()
        if self._in_order is not None:
            self._deliver_in_order(self._in_order, job, outcome)
        else:
            self._deliver(outcome)
        if not self.in_flight and self._puller is None:
            self._end()

    def _deliver_in_order(self, waiting: deque[ActiveJob], job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        job.settled = True
        job.result = outcome
        while waiting and waiting[0].settled:
            settled = waiting.popleft()
            self._deliver(settled.result)
            settled.result = None  # an error's traceback holds the job: a cycle

    def _deliver(self, outcome: Outcome[Any] | None) -> None:
        if outcome is not None:
            self.ready.append(outcome)
            if self._reader is not None:
                _wake(self._reader)
            return
        self._undelivered -= 1
        if self._room is not None:
            _wake(self._room)

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
            if self._puller is not None:
                self._puller.cancel()

    def _pulled(self, puller: "asyncio.Task[None]") -> None:
        self._puller = None  # its traceback would hold the source
        if not puller.cancelled():
            if (error := puller.exception()) is not None:
                self._end_early(error)
        elif self.stopped is None:  # by somebody else, who cancels every task of the loop
            self._end_early(ClosedError("the task that reads the source was cancelled"))
            self.cancel()
        if not self.in_flight:
            self._end()

    def _end(self) -> None:
        self.over.set()
        self._on_over(self)
        if self._reader is not None:
            _wake(self._reader)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
