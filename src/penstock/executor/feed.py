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
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from penstock.context import current_job
from penstock.errors import BudgetReached, ClosedError, UsageError
from penstock.executor.active import ActiveJob
from penstock.executor.ledger import TIME, Ledger, Rules, Stop
from penstock.executor.running import PATIENCE, RunningJobs
from penstock.executor.sources import BLOCKS, LONGEST_TURN, is_cancelled, key_raised, sources, warn_that_it_blocks
from penstock.outcome import Outcome, contained
from penstock.report import INTERRUPTED

ITEMS_FOR_EACH_SLOT = 2
"""The window, unless it is given. Arbitrary, because: as many outcomes may wait behind a slow one as jobs run."""
_END: Any = object()


class Feed:
    """The jobs of one stream."""

    patience = PATIENCE
    """Seconds that its end may take once everything is cancelled."""

    def __init__(
        self,
        running: RunningJobs,
        source: Iterable[Any] | AsyncIterable[Any],
        new_job: Callable[..., ActiveJob],
        *,
        timeout: float | None,
        spread: bool,
        key: Callable[[Any], Any] | None,
        window: int | None,
        ordered: bool,
        rules: Rules,
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
        self.duplicates = 0
        """Items that were left out, because their key had come before."""
        self.replayed = 0
        """Items that an earlier run had finished."""
        self.ledger = Ledger(**rules._asdict(), on_stop=self.stop_by)
        self.stopped: BaseException | None = None
        """Why the source was not read to its end: its own error, a rule of the run, or that we were told to stop."""
        self.verdict: str | None = None
        """The same as a report says it; None for an error of the source's own."""
        self.over = asyncio.Event()
        """Set when nothing of this feed runs any more."""
        self._running = running
        self._new_job = new_job
        self._timeout = timeout
        self._spread = spread
        self._key = key
        self._follows = window is None
        self._window = ITEMS_FOR_EACH_SLOT * running.slots.limit if window is None else window
        self._in_order: deque[ActiveJob] | None = deque() if ordered else None
        self._on_over = on_over
        self._warned = False
        self._closed = False
        self._gave_up = False
        self._undelivered = 0
        self._held = False
        """Whether jobs in flight are expected to use up the budget."""
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.ledger.begin(self._loop)
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
            self._wake_if_room(self._room)
        return self.ready.popleft()

    def limit_changed(self, limit: int) -> None:
        """So many jobs may run at once from now on: the window follows, unless it was given."""
        if self._follows:
            self._window = ITEMS_FOR_EACH_SLOT * limit
            if self._room is not None:
                self._wake_if_room(self._room)

    def _wake_if_room(self, room: "asyncio.Future[None]") -> None:
        if self._undelivered < self._window and not self._held:
            _wake(room)

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
            self._end_early(why, INTERRUPTED)

    def cancel(self) -> None:
        """Take no more items and cancel what is in flight."""
        self.stop(ClosedError("the stream was closed before its source was read to its end"))
        if self.running:
            self._end_early(ClosedError("the stream was closed before all of its jobs had ended"), INTERRUPTED)
        self._running.cancel(self._is_mine)

    async def close(self) -> None:
        """Cancel, and wait until nothing of this feed runs.

        The wait is bounded: jobs that still run after `PATIENCE` seconds are named in the log and abandoned.
        """
        self._closed = True
        if self.over.is_set() and (self.ready or self._in_order):
            self._end_early(ClosedError("the stream was closed before all that was ready had been read"), INTERRUPTED)
        self.ready.clear()
        while self._in_order:
            self._in_order.popleft().result = None
        if self.over.is_set():
            return
        self.cancel()
        deadline = self._loop.time() + self.patience
        if not await self._running.wait(PATIENCE, self._is_mine):
            self._running.complain(self._is_mine)
            self.give_up()
        job = current_job()
        if isinstance(job, ActiveJob) and job.receiver is self:
            return  # it closes the stream that it belongs to, which is over only after it
        with suppress(TimeoutError):  # a source that does not let go of its puller
            async with asyncio.timeout_at(deadline):
                await self.over.wait()

    @property
    def running(self) -> int:
        """Jobs that have begun and not ended."""
        return self.in_flight

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
            await self._pull_items(source)
        except BaseException as error:
            ours = isinstance(error, asyncio.CancelledError) and is_cancelled()
            if ours or isinstance(error, KeyboardInterrupt | GeneratorExit):
                raise
            harmless = contained(error, "the source of the items")
            try:
                if harmless is error:
                    raise
                raise harmless from harmless.__cause__
            finally:
                del harmless  # its traceback holds this frame: a cycle

    async def _pull_items(self, source: Iterable[Any] | AsyncIterable[Any]) -> None:
        if isinstance(source, AsyncIterable):
            await self._pull_async(source)
        else:
            await self._pull_sync(iter(source))

    async def _pull_sync(self, iterator: Iterator[Any]) -> None:
        slots = self._running.slots
        now = self._loop.time
        turn = last = now()
        while self.stopped is None:
            if self._undelivered >= self._window or self._held:
                await self._wait_for_room()
                turn = last = now()
            job = self._new_job((), self._timeout, self)
            if not slots.take_nowait(job):
                await slots.take(job)
                turn = last = now()
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
            before, last = last, now()
            if last - turn > LONGEST_TURN:
                self._warn_if_blocked(last - before)
                await asyncio.sleep(0)
                turn = last = now()

    def _warn_if_blocked(self, duration: float) -> None:
        if duration > BLOCKS and not self._warned:
            self._warned = True
            warn_that_it_blocks(duration)

    async def _pull_async(self, source: AsyncIterable[Any]) -> None:
        iterator = aiter(source)
        try:
            await self._pull_from(iterator)
        finally:
            if iterator is not source and isinstance(iterator, AsyncGenerator):  # made for us: nobody else closes it
                with suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE):
                        await iterator.aclose()

    async def _pull_from(self, iterator: AsyncIterator[Any]) -> None:
        # Its end is tested, but CPython 3.11 does not trace a coroutine that swallowed what was thrown into it.
        while self.stopped is None:  # pragma: no branch
            if self._undelivered >= self._window or self._held:
                await self._wait_for_room()
            try:
                item = await anext(iterator)
            except StopAsyncIteration:
                return
            self.read += 1
            job = self._new_job((), self._timeout, self)
            try:
                await self._running.slots.take(job)
            except asyncio.CancelledError:
                self.left += 1
                raise
            self._start_unless_stopped(job, item)

    def _start_unless_stopped(self, job: ActiveJob, item: Any) -> None:
        if self.stopped is None:
            self._start(job, item)
        else:  # the source has swallowed its cancellation
            self._running.slots.give_back(job)
            self.left += 1

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
        self._begin(job, None if self._key is None else self._set_key(job, self._key))

    def _begin(self, job: ActiveJob, refusal: UsageError | None) -> None:
        """Run a job that has its slot, its item and its key; or end it, if there is none."""
        job.account = self.ledger
        self._undelivered += 1
        self.in_flight += 1
        if self.ledger.keeps_a_budget:
            self._held = self.ledger.holds(self.running)
        if self._in_order is not None:
            self._in_order.append(job)
        if refusal is None:
            self._running.start(job)
        else:
            self._running.refuse(job, refusal)

    def _set_key(self, job: ActiveJob, key: Callable[[Any], Any]) -> UsageError | None:
        """Ask for the item's key; why the job cannot start if there is none."""
        try:
            job.key = key(job.input)
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001  # the outcome of the item
            return key_raised(job.input, error)
        return None

    def job_ended(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        """Take the outcome of a job of this feed; None if it was cancelled from outside."""
        if self._gave_up:
            return
        if outcome is None:
            self._leave(job)
        else:
            if self.ledger.watches:
                self._judge(outcome, job.spent)
        self._settle(job, outcome)
        if self._held:
            self._look_at_budget()

    def _leave(self, job: ActiveJob) -> None:
        """Its job was cancelled from outside."""
        self.left += 1
        if not job.cancelled:
            why = ClosedError(f"{job!r} was cancelled by something else than its job, stream or executor")
            self._end_early(why, INTERRUPTED)

    def _look_at_budget(self) -> None:
        """A job has ended: how much a job uses is known a little better."""
        self._held = self.ledger.holds(self.running)
        if self._room is not None:
            self._wake_if_room(self._room)

    def _judge(self, outcome: Outcome[Any], spent: Mapping[str, float] | None) -> None:
        stop = self.ledger.count(outcome, spent)
        if stop is not None:
            self.stop_by(stop)

    def stop_by(self, stop: Stop) -> None:
        """Take no more items, since a rule of the run says so; what is in flight goes on.

        A budget that the last jobs have used up stops nothing.
        """
        if self._puller is not None or not isinstance(stop.error, BudgetReached):
            self._end_early(stop.error, stop.verdict)

    def _settle(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        """The item has its state, or was left."""
        self.in_flight -= 1
        if outcome is not None:
            self._count(outcome)
        if self._closed:
            pass  # nobody reads it
        elif self._in_order is not None:
            self._deliver_in_order(self._in_order, job, outcome)
        else:
            self._deliver(outcome)
        self._look_whether_over()

    def _look_whether_over(self) -> None:
        if not self.in_flight and self._puller is None:
            self._end()

    def _count(self, outcome: Outcome[Any]) -> None:
        self.finished += 1
        if outcome.kind is not None:
            self.failed += 1

    def _deliver_in_order(self, waiting: deque[ActiveJob], job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        job.settled = True
        job.result = outcome
        while waiting and waiting[0].settled:
            settled = waiting.popleft()
            self._deliver(settled.result)
            settled.result = None  # an error's traceback holds the job: a cycle

    def _deliver(self, outcome: Outcome[Any] | None) -> None:
        if outcome is not None:  # else it was cancelled, and so is the pull: no need to make room
            self.ready.append(outcome)
            if self._reader is not None:
                _wake(self._reader)

    def _end_early(self, why: BaseException, verdict: str | None) -> None:
        if self.stopped is None:
            self.stopped = why
            self.verdict = verdict
            if self._puller is not None:
                self._puller.cancel()

    def _pulled(self, puller: "asyncio.Task[None]") -> None:
        self._puller = None  # its traceback would hold the source
        if puller.cancelled():
            if self.stopped is None:  # by somebody else, who cancels every task of the loop
                self._end_early(ClosedError("the task that reads the source was cancelled"), INTERRUPTED)
                self.cancel()
        elif (error := puller.exception()) is not None:
            if self.stopped is None:
                self._end_early(error, None)
            else:
                sources.error("the source of a stream failed as it was left", exc_info=error)
        self._look_whether_over()

    def _end(self) -> None:
        """Nothing of this feed runs any more."""
        self.ledger.end()
        why = self.stopped
        if isinstance(why, BudgetReached) and why.unit != TIME:  # with what was in flight then
            why.spent = self.ledger.used(why.unit)
            why.args = why.unit, why.spent, why.limit
        self.over.set()
        self._on_over(self)
        if self._reader is not None:
            _wake(self._reader)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
