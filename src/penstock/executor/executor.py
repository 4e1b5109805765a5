"""The executor: one object that takes jobs and items, and the states it goes through.

    new --async with--> open --shutdown or leaving--> draining --nothing runs--> closed

While it drains it takes nothing new from outside, but jobs that are still running may submit jobs of their own, since
they could not end without them. Leaving by an exception cancels what runs instead.

Everything belongs to the thread of the event loop on which it was opened.
"""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast, overload

from penstock.callables import check_function, check_value, is_async, name_of
from penstock.context import current_job
from penstock.errors import ClosedError, UsageError, WrongLoop, WrongThread
from penstock.events import Instrument
from penstock.executor.active import ActiveJob
from penstock.executor.definition import Job
from penstock.executor.feed import Feed
from penstock.executor.job_limit import LEAST
from penstock.executor.lanes import Lanes
from penstock.executor.ledger import Budget, Rules, check_rules
from penstock.executor.resources import Resources
from penstock.executor.running import PATIENCE, RunningJobs
from penstock.executor.slots import Holder
from penstock.executor.sources import Items, check_items, side_by_side
from penstock.executor.statistics import ExecutorStatistics
from penstock.executor.stream import Stream
from penstock.gate.retry import check_timeout
from penstock.journal.options import Journal, as_journal
from penstock.outcome import Outcome
from penstock.report import INTERRUPTED, Report, Tally
from penstock.threads.batch import Batch
from penstock.threads.main_guard import refuse_a_child_that_imports
from penstock.threads.portal import Portal, refuse_on_a_loop

T = TypeVar("T")
P = ParamSpec("P")
I = TypeVar("I")  # noqa: E741  # the item

FAIL_FAST = 50
"""First jobs of a run that may all fail. Arbitrary, because: more than a bad start of good data, and soon found out."""


class Executor:
    """Runs jobs: many at once, never more than `limit`, each in a task and a context of its own.

        async with Executor() as executor:
            async with executor.as_completed(score, records, key=by_id) as stream:
                async for outcome in stream: ...

    Leaving the block drains: what is in flight is finished. Leaving it by an exception cancels.

    Jobs may submit jobs, to any depth and any number: a child takes a free slot, else runs on the slot of its parent.

    Args:
        limit: jobs that run at once. None measures how many: four for each round trip that the gates on this loop may
            have in flight, and 64, at least 256, as long as they fit in the memory. While it is short (80 % of what
            the process may use) no job is begun but for the 16th and those before it; the log says so. A number is
            not bounded by memory.
        threads: blocking calls that are at work at once; one that waits for the loop (`from_thread`) is not, so this is
            no lock. None measures how many: threads are made while calls wait for one longer than 20 ms, and end when
            they are idle, up to a cap of 512 and of a MiB each in a quarter of the memory.
        processes: calls of `to_process` that run at once, each in a process. None is one for each core.
        instruments: who is told of each job's end; see `penstock.events.Instrument`.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(
        self,
        *,
        limit: int | None = None,
        threads: int | None = None,
        processes: int | None = None,
        instruments: Sequence[Instrument] = (),
    ) -> None:
        self._limit = _at_least_one("limit", limit)
        self._lanes = Lanes(
            threads=_at_least_one("threads", threads),
            processes=_at_least_one("processes", processes),
        )
        self._instruments = _checked_instruments(instruments)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: RunningJobs | None = None
        self._feeds: set[Feed] = set()
        self._resources: set[Resources] = set()
        self._deadline: float | None = None
        self._portal: Portal | None = None
        self._draining = False
        self._closed = False

    def __repr__(self) -> str:
        state = (
            "closed" if self._closed else "draining" if self._draining else "open" if self._jobs is not None else "new"
        )
        return f"<Executor {state} limit={self.limit} jobs={len(self._jobs or ())}>"

    async def __aenter__(self) -> Self:
        if self._jobs is not None:
            raise UsageError("this executor has been opened before. Make a new Executor() for each `async with`.")
        refuse_a_child_that_imports("An executor")
        self._loop = asyncio.get_running_loop()
        self._jobs = RunningJobs(self._loop, self._limit, self._instruments, self._limit_changed)
        self._portal = Portal()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown(timeout=None if error is None else 0.0)

    @overload
    def submit(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[T]": ...

    @overload
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[T]": ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "asyncio.Future[Any]":
        """Run `fn(*args, **kwargs)` as a job; return its future.

        `fn` is an async function, or a plain one, which runs in a thread. The job starts when it gets a slot; the
        queue of jobs that wait for one has no bound, and each costs about 2 kB: use `map` for many items. Cancelling
        the future cancels the job. Never blocks. Loop thread only.

        Raises:
            UsageError: `fn` is a coroutine object or not callable.
            ClosedError: the executor is not open, or has been shut down.
            WrongThread, WrongLoop: called from elsewhere than the executor's loop thread.
        """
        jobs = self._ready_for("submit", fn)
        job = ActiveJob(self, self._lender(), name_of(fn), self._as_async(fn), args)
        job.kwargs = kwargs or None
        return jobs.submit(job)

    @overload
    def map(
        self,
        fn: Callable[..., Awaitable[T]],
        /,
        *iterables: Items[Any],
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> Stream[T]: ...

    @overload
    def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Items[Any],
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> Stream[T]: ...

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Items[Any],
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> Stream[Any]:
        """`fn` of every item, in input order: await the stream for a list, or iterate it.

        The first error of a job, in input order, is raised and closes the stream. Several iterables are taken side by
        side, to the end of the shortest, as the built-in `map` does.

        Args:
            fn: an async function, or a plain one, which runs in threads.
            iterables: any iterable or async iterable, also an endless one. It is pulled when there is a slot, on the
                loop thread: wrap a source that blocks in `penstock.pull_in_thread`.
            buffersize: items taken from the source and not yet read at the other end; None is twice the limit, which
                it follows.
            timeout: seconds for each job, counted from its start.

        Raises:
            UsageError, ClosedError, WrongThread, WrongLoop: as `submit`, and for items that are not iterable.
        """
        if not iterables:
            raise UsageError("found no items. Write `executor.map(fn, items)`.")
        for items in iterables:
            check_items(items)
        spread = len(iterables) > 1
        source = side_by_side(*iterables) if spread else iterables[0]
        start = self._feed(
            "map", fn, source, Feed, key=None, buffersize=buffersize, timeout=timeout, rules=Rules(), ordered=True,
            spread=spread,
        )  # fmt: skip
        return Stream(start, Outcome.unwrap)

    @overload
    def as_completed(
        self,
        fn: Callable[[I], Awaitable[T]],
        items: Items[I],
        /,
        *,
        key: Callable[[I], Any] | None = None,
        buffersize: int | None = None,
        timeout: float | None = None,
        max_errors: float | None = None,
        budget: Budget | None = None,
        journal: str | os.PathLike[str] | Journal | None = None,
    ) -> Stream[Outcome[T]]: ...

    @overload
    def as_completed(
        self,
        fn: Callable[[I], T],
        items: Items[I],
        /,
        *,
        key: Callable[[I], Any] | None = None,
        buffersize: int | None = None,
        timeout: float | None = None,
        max_errors: float | None = None,
        budget: Budget | None = None,
        journal: str | os.PathLike[str] | Journal | None = None,
    ) -> Stream[Outcome[T]]: ...

    def as_completed(
        self,
        fn: Callable[[I], Any],
        items: Items[I],
        /,
        *,
        key: Callable[[I], Any] | None = None,
        buffersize: int | None = None,
        timeout: float | None = None,
        max_errors: float | None = None,
        budget: Budget | None = None,
        journal: str | os.PathLike[str] | Journal | None = None,
    ) -> Stream[Outcome[Any]]:
        """`fn` of every item, as `Outcome`s in the order in which they finish; never raises a job's error.

        Args:
            fn, items, buffersize, timeout: as for `map`.
            key: gives each item the key that its outcome, logs and errors carry.
            max_errors: an int: how many jobs may fail; a float: which share of the finished ones may, judged from the
                100th on. When more fail, no more items are taken, what is in flight is finished and delivered, and
                `TooManyErrors` is raised.
            budget: time, requests and anything that jobs `penstock.spend`. When a limit is reached, the same is done,
                and `BudgetReached` raised.
            journal: a path, or a `Journal` with options: outcomes are recorded there, and delivered after that. What
                an earlier run has recorded is not run again, and delivered with `replayed=True`. Needs `key`.

        Raises:
            UsageError, ClosedError, WrongThread, WrongLoop: as `map`.
        """
        rules = Rules(max_errors=max_errors, budget=budget)
        return self._outcomes("as_completed", fn, items, key, buffersize, timeout, rules, journal)

    def _outcomes(
        self, call: str, fn: Callable[..., Any], items: Items[Any], key: Callable[[Any], Any] | None,
        buffersize: int | None, timeout: float | None, rules: Rules,
        journal: str | os.PathLike[str] | Journal | None, *, values: bool = True,
    ) -> Stream[Outcome[Any]]:  # fmt: skip
        """A stream of outcomes. Without `values`, recorded ones come without what nobody looks at."""
        check_items(items)
        check_rules(*rules)
        if key is not None and not callable(key):
            raise UsageError(f"key={key!r}: expected a function of the item, such as operator.itemgetter('id').")
        if journal is None:
            make: Callable[..., Feed] = Feed
        else:
            if key is None:
                raise UsageError(
                    "journal= found no key= beside it. A journal knows an item by what you call it, never "
                    "by its place: write key=operator.itemgetter('id'), or any function that returns text, a number "
                    "or bytes."
                )
            from penstock.executor.recorded_feed import RecordedFeed, Replay  # SQLite is not for everybody to import

            options = as_journal(journal)
            replay = Replay.NONE if not options.replay and values else Replay.WHOLE if values else Replay.BARE
            make = partial(RecordedFeed, journal=options, job_name=name_of(fn), replay=replay)
        start = self._feed(
            call, fn, items, make, key=key, buffersize=buffersize, timeout=timeout, rules=rules, ordered=False,
            spread=False,
        )  # fmt: skip
        return Stream(start, None)

    async def run(
        self, job: Job[Any] | Callable[[I], Any], items: Items[I], /, *, key: Callable[[I], Any] | None = None,
        buffersize: int | None = None, timeout: float | None = None, max_errors: float | None = None,
        fail_fast: int | None = FAIL_FAST, budget: Budget | None = None,
        journal: str | os.PathLike[str] | Journal | None = None,
    ) -> Report:  # fmt: skip
        """Run a job over all items and report what became of them; values are dropped.

        Args:
            job: a function of the item, or a `@penstock.job`, whose resources are open while the run lasts.
            items, key, buffersize, timeout, max_errors, budget: as for `as_completed`. `max_errors`, `budget` and a
                shutdown end the run early; the report says so (`stopped`). A shutdown that cancels also cancels an
                opening, and 5 s later a closing, which the log names.
            fail_fast: so many first jobs that all fail end the run early, too: a wrong URL or key is not tried on a
                million records. None goes on.
            journal: a path, or a `Journal` with options: outcomes are recorded there, and what an earlier run has
                recorded is counted and not run again. Needs `key`.

        Raises:
            UsageError, ClosedError, WrongThread, WrongLoop: as `as_completed`.
            JournalError: the journal cannot be used, or no longer. What was recorded until then is.
            Exception: what the source raised, or the job's opening or closing.
        """
        self._check_open("run")
        rules = Rules(max_errors=max_errors, fail_fast=fail_fast, budget=budget)
        if journal is not None:
            journal = as_journal(journal)

        async def tally(fn: Callable[[I], Any]) -> Report:
            stream = self._outcomes("run", fn, items, key, buffersize, timeout, rules, journal, values=False)
            return await _tally(stream, None if journal is None else journal.file)

        if not isinstance(job, Job):
            return await tally(job)
        report: Report | None = None
        resources = Resources(job, self._deadline)
        self._resources.add(resources)
        try:
            async with resources as fn:
                if self._draining:  # since the job began to open
                    report = Tally().report(read=0, left=0, stopped=INTERRUPTED, elapsed=0.0)
                else:
                    report = await tally(fn)
        except Exception as error:
            if report is not None:
                error.add_note(f"it came when the run had ended: {report}")
            raise
        finally:
            self._resources.discard(resources)
        return report

    async def to_thread(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run a blocking call in a thread of this executor and return its value; context variables go along.

        **Cancellation**: a call that has no thread yet is given up; one that runs is abandoned: the caller goes on,
        and the thread keeps its place until it really ends. **Threads**: loop thread only.

        Raises:
            ClosedError: the executor is not open or has been shut down.
            UsageError: `fn` is an async function or a generator function, or returned a coroutine.
            Exception: what `fn` raised.
        """
        self._check_open("to_thread")
        if not callable(fn):
            check_function(fn, "executor.to_thread")
        return check_value(fn, await self._lanes.blocking.call(fn, *args, **kwargs), "executor.to_thread")

    async def compute(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run response processing off the loop and return its value: like `to_thread`, in the CPU lane.

        The lane has one thread where the interpreter has a GIL, since more of them only slow the loop down, and one
        for each core where it has none. Blocking calls do not belong here. While calls wait for it for longer than a
        round trip takes, gates start no more round trips.
        """
        self._check_open("compute")
        if not callable(fn):
            check_function(fn, "executor.compute")
        return check_value(fn, await self._lanes.cpu.call(fn, *args, **kwargs), "executor.compute")

    async def compute_each(self, fn: Callable[[I], T], items: Iterable[I], /) -> list[Outcome[T]]:
        """`fn` of each item in the CPU lane, many of them in one hop: outcomes in the order of the items.

        For steps of a few microseconds, of which the hop would take most. An error of one item is its outcome's and
        nobody else's. Other calls have their turn in the lane every 20 ms.

        **Cancellation**: items that have not begun are left. **Threads**: loop thread only; `items` is iterated in
        the lane's thread.

        Raises:
            ClosedError: as `to_thread`.
            UsageError: `fn` is an async function, or `items` is not iterable.
            Exception: what iterating over `items` raised.
        """
        self._check_open("compute_each")
        batch = Batch(*_check_batch(fn, items))
        while not await self._lanes.cpu.call(batch):
            pass
        return batch.take()

    async def to_process(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run `fn` in another process and return its value: for processing that needs more than one core.

        `fn` is a function of a module, and it, its arguments and its value can be pickled. Context variables do not go
        along. A process starts when it is first needed, and imports the program's main module: a script guards its
        start by `if __name__ == "__main__":`. A hop costs about as much as a fast HTTP request.

        **Cancellation** as in `to_thread`; a process that still runs when the executor is closed is ended.
        **Threads**: loop thread only.

        Raises:
            ClosedError: the executor is not open or has been shut down.
            UsageError: `fn` cannot be sent to another process.
            concurrent.futures.process.BrokenProcessPool: a process died, of this call or of one beside it; the next
                call gets new ones. Transient.
            Exception: what `fn` raised.
        """
        self._check_open("to_process")
        return cast("T", await self._lanes.in_process(fn, args, kwargs))

    @overload
    def from_thread(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    def from_thread(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    def from_thread(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `fn(*args, **kwargs)` on the loop, from a thread, and wait for its value.

        `fn` is async or plain; a plain one must not block. What it returns is awaited if it can be: the future of
        `submit`, the stream of `map`. To start a job and not wait for it, call a function that keeps its future and
        returns nothing. `fn` runs in a copy of the thread's context. While a thread
        of this executor waits, its place is lent to the calls that are made for it, so that chains thread -> loop ->
        thread go on, in a lane of one thread too: those calls run in this very thread.

        Blocks. **Threads**: any but the loop's. When the caller of the call that this thread runs goes away, what was
        asked for is cancelled. A thread that is none of this executor's does not keep it open.

        Raises:
            WrongThread: called on a thread that runs an event loop.
            ClosedError: the executor is not open, or closed, or its loop is; or that happened while `fn` ran.
            concurrent.futures.CancelledError: it was cancelled, for the reason above or on the loop.
            Exception: what `fn` raised.
        """
        if self._portal is None:
            self._opened()  # raises
            raise AssertionError
        check_function(fn, "from_thread")
        refuse_on_a_loop(fn)
        return self._portal.call(fn, args, kwargs)

    @property
    def limit(self) -> int:
        """Jobs that run at once: the number that was given, or what is measured at this moment. Any thread may read it.

        It can be set while jobs run, on the loop thread: a number of at least 1, or None to measure it from then on.
        Jobs beyond a smaller number go on, and none begins until they have ended.

        Raises:
            UsageError: it is set to anything else.
            WrongThread: it is set from elsewhere than the open executor's loop thread.
        """
        if self._jobs is not None:
            return self._jobs.slots.limit
        return LEAST if self._limit is None else self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        limit = _at_least_one("limit", limit)
        if self._jobs is not None:
            if asyncio._get_running_loop() is not self._loop:
                raise WrongThread(
                    "executor.limit was set from elsewhere than its event loop's thread. Set it in a coroutine on that "
                    "loop; in a thread, write `executor.from_thread(setattr, executor, 'limit', 32)`."
                )
            if not self._closed:
                self._jobs.set_limit(limit)
        self._limit = limit

    def _limit_changed(self, limit: int) -> None:
        for feed in self._feeds:
            feed.limit_changed(limit)

    def statistics(self) -> ExecutorStatistics:
        """What is going on. Loop thread only."""
        jobs = self._opened()
        return ExecutorStatistics(
            limit=jobs.slots.limit,
            jobs=len(jobs),
            done=jobs.done,
            failed=dict(jobs.failed),
            cancelled=jobs.cancelled,
            ran=jobs.ran.snapshot(),
            **self._lanes.statistics(),
        )

    async def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        """Take nothing new and finish what is in flight.

        Streams stop pulling: their readers get what was in flight, then `ClosedError` if items were left in the source.

        Args:
            wait: False returns at once, and what is in flight goes on.
            cancel_futures: cancel submitted jobs that have not started.
            timeout: seconds after which what still runs is cancelled, 0 at once; None waits as long as it takes.
                Resources of a job that are being opened are what still runs; for their closing it is 5 s more. Neither
                is waited for here.

        **Cancellation** while it waits cancels what runs, waits for that at most 5 s, and goes on. Calling it again is
        fine. **Threads**: loop thread only.
        """
        jobs = self._opened()
        self._check_loop("shutdown")
        check_seconds("timeout", timeout)
        if wait and timeout is None and self._lender() is not None:
            raise UsageError(
                "a job asked its own executor for a shutdown that waits for all jobs, itself among them. "
                "Write `await executor.shutdown(wait=False)`, or give it a timeout=."
            )
        self._draining = True
        for feed in [feed for feed in self._feeds if not feed.nested]:
            feed.stop(ClosedError("the executor was shut down before the source was read to its end"))
        if cancel_futures:
            jobs.cancel(lambda job: not job.holds)
        if not wait:
            return
        if timeout is not None:
            self._hurry(timeout)
        try:
            if await jobs.wait(timeout):
                await self._feeds_over()
            else:
                await self._cancel(jobs)
        except asyncio.CancelledError:
            await self._cancel(jobs)
            raise
        finally:
            self._close(jobs)

    def _hurry(self, timeout: float) -> None:
        """Set a bound to the resources of jobs that are opened and closed."""
        self._deadline = asyncio.get_running_loop().time() + timeout
        for resources in self._resources:
            resources.hurry(self._deadline)

    async def _cancel(self, jobs: RunningJobs) -> None:
        self._hurry(0.0)
        self._lanes.expect_to_close()
        for feed in list(self._feeds):
            feed.cancel()
        jobs.cancel()
        if not await jobs.wait(PATIENCE):
            jobs.complain()
            for feed in list(self._feeds):
                feed.give_up()
        await self._feeds_over()

    async def _feeds_over(self) -> None:
        """Wait for the pullers, which end as soon as they are cancelled unless their source does not let them."""
        for feed in list(self._feeds):
            feed.cancel()  # also a stream of a job's own that something has kept alive
        waits = [asyncio.ensure_future(feed.over.wait()) for feed in self._feeds]
        try:
            if waits:
                await asyncio.wait(waits, timeout=max(feed.patience for feed in self._feeds))
        finally:
            for wait in waits:
                wait.cancel()

    def _close(self, jobs: RunningJobs) -> None:
        assert self._portal is not None, "opened before it is closed"
        if not self._closed:
            self._closed = True
            jobs.stop_measuring()
            self._portal.close()
            self._lanes.close()

    def _feed(
        self, call: str, fn: Callable[..., Any], source: Items[Any], make: Callable[..., Feed], *,
        key: Callable[[Any], Any] | None, buffersize: int | None, timeout: float | None, rules: Rules, ordered: bool,
        spread: bool,
    ) -> Callable[[], Feed]:  # fmt: skip
        self._ready_for(call, fn)
        window = _at_least_one("buffersize", buffersize)
        check_timeout(f"timeout={timeout!r}", timeout)

        def start() -> Feed:
            jobs = self._ready_for(call, fn)
            lender = self._lender()
            new_job = partial(ActiveJob, self, lender, name_of(fn), self._as_async(fn))
            feed = make(
                jobs, source, new_job, timeout=timeout, spread=spread, key=key, window=window, ordered=ordered,
                rules=rules, nested=lender is not None, on_over=self._feeds.discard,
            )  # fmt: skip
            self._feeds.add(feed)
            return feed

        return start

    def _lender(self) -> Holder | None:
        """The current job, if it is one of ours: its children may run on its slot."""
        job = current_job()
        return job if isinstance(job, Holder) and job.host is self and job.holds else None

    def _as_async(self, fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """`fn` itself, or a call of it in a thread."""
        return fn if is_async(fn) else partial(self.to_thread, fn)

    def _ready_for(self, call: str, fn: Callable[..., Any]) -> RunningJobs:
        if isinstance(fn, Job):
            raise UsageError(f"found {fn!r}, which opens resources. Write `await executor.run({fn.__name__}, items)`.")
        check_function(fn, f"executor.{call}")
        return self._check_open(call)

    def _check_open(self, call: str) -> RunningJobs:
        if self._jobs is not None and not self._draining and asyncio._get_running_loop() is self._loop:
            return self._jobs  # as a rule: this is asked for every call
        jobs = self._opened()
        self._check_loop(call)
        if self._closed or (self._draining and self._lender() is None):
            raise ClosedError(
                f"executor.{call}() was called after shutdown. Call it inside `async with Executor() as executor:`."
            )
        return jobs

    def _opened(self) -> RunningJobs:
        if self._jobs is None:
            raise ClosedError("this executor is not open yet. Write `async with Executor() as executor:`.")
        return self._jobs

    def _check_loop(self, call: str) -> None:
        loop = asyncio._get_running_loop()
        if loop is self._loop:
            return
        if loop is None:
            raise WrongThread(
                f"executor.{call}() was called from a thread without the executor's event loop. "
                f"Call it in a coroutine on that loop; in a thread, write `executor.from_thread(executor.{call}, ...)`."
            )
        raise WrongLoop(
            f"executor.{call}() was called on another event loop than the one it was opened on. "
            f"Open one executor for each loop."
        )


async def _tally(stream: Stream[Outcome[Any]], journal: str | None) -> Report:
    tally = Tally()
    started = asyncio.get_running_loop().time()
    stopped = why = None

    def report() -> Report:
        counts = stream.statistics()
        return tally.report(
            read=counts.read, left=counts.left, skipped=counts.duplicates, stopped=stopped, why=why, spent=stream.spent,
            journal=journal, elapsed=asyncio.get_running_loop().time() - started,
        )  # fmt: skip

    async with stream:
        try:
            async for outcome in stream:
                tally.add(outcome)
        except Exception as error:
            stopped = stream.verdict
            if stopped is None:  # the source's own error, or the journal's: the account goes with it
                error.add_note(f"it ended the run; until then: {report()}")
                raise
            why = None if stopped == INTERRUPTED else str(error)
        return report()


def _checked_instruments(instruments: Sequence[Instrument]) -> Sequence[Instrument]:
    if not isinstance(instruments, Sequence) or not all(hasattr(instrument, "notify") for instrument in instruments):
        raise UsageError(f"instruments={instruments!r:.100}: expected a list of objects with a method notify(event).")
    return instruments


def _check_batch(fn: Callable[..., Any], items: Any) -> tuple[Callable[..., Any], Iterable[Any]]:
    check_function(fn, "executor.compute_each")
    if is_async(fn):
        raise UsageError(
            f"compute_each({name_of(fn)}, ...) found an async function, expected a plain one: a thread has nothing to "
            f"await it with. Write `await executor.map({name_of(fn)}, items)`."
        )
    if not isinstance(items, Iterable):
        raise UsageError(f"compute_each(fn, {items!r:.100}): expected items, such as a list.")
    return fn, items


def check_seconds(name: str, value: object) -> None:
    """Refuse what is no bound for a wait.

    Raises:
        UsageError: neither None nor a number of seconds from 0 to below infinity.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value < math.inf):  # type: ignore[operator]
        raise UsageError(f"{name}={value!r}: expected seconds of at least 0, or None for no deadline.")


def _at_least_one(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UsageError(f"{name}={value!r}: expected a whole number of at least 1, or None for the default.")
    return value
