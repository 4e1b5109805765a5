"""The jobs that run: their tasks, their end, and the counts of it.

Every job is started and ended here, whether it came from `submit` or from a stream. A job ends in the last step of its
own task, which spares a callback for each item. In this order: the slot goes back, the outcome is counted, failures are
logged, instruments are told, then the stream is told.

A task that is cancelled before its first step never reaches its last one. Whoever cancels here ends such a job at once;
a task that somebody else cancelled is found by `wait`.

Loop thread only.
"""

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from types import CoroutineType
from typing import Any, TypeAlias

from penstock.callables import refuse_coroutine
from penstock.context import enter
from penstock.errors import JobTimeout, UsageError
from penstock.events import Instrument, JobEnded
from penstock.executor.active import ActiveJob
from penstock.executor.failure_log import FailureLog
from penstock.executor.job_limit import LEAST, MeasuredJobs
from penstock.executor.slots import Slots
from penstock.gate.guard import Guard, guard_of
from penstock.histogram import Histogram
from penstock.outcome import FailureKind, Outcome, contained

Which: TypeAlias = Callable[[ActiveJob], bool]

logger = logging.getLogger("penstock.jobs")

PATIENCE = 5.0
"""Seconds that cancelled jobs get to end. Arbitrary, because: longer than clean-up takes, shorter than a hang."""


def all_of_them(_job: ActiveJob) -> bool:
    """Every job."""
    return True


class RunningJobs:
    """The jobs of one executor that have a task.

    Args:
        limit: jobs that run at once; None measures how many.
        resized: who is told when that number has changed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limit: int | None,
        instruments: Sequence[Instrument],
        resized: Callable[[int], None],
    ) -> None:
        self.slots = Slots(loop, LEAST if limit is None else limit)
        self.done = 0
        self.failed: dict[FailureKind, int] = {}
        self.cancelled = 0
        self.ran = Histogram()
        self._loop = loop
        self._now = loop.time
        self._interruptible = threading.current_thread() is threading.main_thread()
        """Whether a KeyboardInterrupt can be Ctrl-C, which is meant for the program; elsewhere a job has raised it."""
        self._tasks: dict[ActiveJob, asyncio.Task[Any] | None] = {}
        self._instruments = list(instruments)
        self._log = FailureLog()
        self._resized = resized
        self.on_free: Callable[[], object] | None = None
        """Called when a job has given its slot back."""
        self._measured: MeasuredJobs | None = None
        self._guard: Guard | None = None
        """To be stirred by each job that starts; None when nothing is measured."""
        self.set_limit(limit)

    def set_limit(self, limit: int | None) -> None:
        """Change the number of jobs that run at once; None measures it from now on."""
        if limit is not None:
            self.stop_measuring()
            self._resize(limit)
        elif self._measured is None:
            self._guard = guard_of(self._loop)
            self._measured = MeasuredJobs(self._guard, self.slots, self._resize)

    def stop_measuring(self) -> None:
        """Leave the number as it is."""
        if self._measured is not None:
            self._measured.stop()
        self._measured = self._guard = None

    def _resize(self, limit: int) -> None:
        if limit != self.slots.limit:
            self.slots.resize(limit)
            self._resized(limit)

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, job: ActiveJob, context: Context | None = None) -> None:
        """Run a job that has its slot and a receiver, in a task and a context of its own: this one, or a copy."""
        self._tasks[job] = None  # before the task: an eager one may end within the next line
        task = self._loop.create_task(self._perform(job), name=job.name, context=context)
        if job in self._tasks:  # pragma: no branch  # an eager task factory (3.12) may have run it to its end
            self._tasks[job] = task

    def start_in_turn(self, job: ActiveJob, context: Context) -> None:
        """Run a job that has a receiver in a task and this context, when there is a slot for it."""
        self._tasks[job] = None
        task = self._loop.create_task(self._perform_in_turn(job), name=job.name, context=context)
        if job in self._tasks:  # pragma: no branch  # as above
            self._tasks[job] = task

    def submit(self, job: ActiveJob) -> "asyncio.Task[Any]":
        """Run a submitted job in a task and a context of its own, when there is a slot for it."""
        self._tasks[job] = None
        task = self._loop.create_task(self._perform_in_turn(job), name=job.name)
        if job in self._tasks:  # pragma: no branch  # as above
            self._tasks[job] = task
            task.add_done_callback(lambda done: self._settle(job, done))
        else:  # pragma: no cover  # as above
            task.add_done_callback(_retrieve)
        return task

    def refuse(self, job: ActiveJob, error: Exception) -> None:
        """End a job that has its slot and cannot start."""
        self._tasks[job] = None
        self._end(job, job.failed(error, self._now()))

    def cancel(self, which: Which = all_of_them) -> None:
        """Cancel jobs, but for the one that asks. They end when their tasks do."""
        this = asyncio.current_task()
        for job, task in list(self._tasks.items()):
            if task is not None and task is not this and which(job):
                job.cancelled = True
                task.cancel()
                if job.started is None and job.receiver is not None:
                    self._end(job, None)

    def cancel_one(self, job: ActiveJob) -> None:
        """Cancel this job, if it still runs; it ends when its task does."""
        task = self._tasks.get(job)
        if task is not None and not job.cancelled:  # a second time would cut off its clean-up
            job.cancelled = True
            task.cancel()
            if job.started is None:
                self._end(job, None)

    async def wait(self, timeout: float | None = None, which: Which = all_of_them) -> bool:
        """Wait until none of these jobs runs; False if `timeout` seconds were not enough.

        A job that calls this is not waited for.
        """
        deadline = None if timeout is None else self._loop.time() + timeout
        while tasks := self._tasks_to_wait_for(which):
            left = None if deadline is None else deadline - self._loop.time()
            if left is not None and left <= 0:
                return False
            # In slices, since a job that is given up meanwhile is not waited for any more.
            done, _ = await asyncio.wait(tasks, timeout=PATIENCE if left is None else min(left, PATIENCE))
            for task in done:
                self._end_if_never_begun(tasks[task])
        return True

    def complain(self, which: Which = all_of_them) -> None:
        """Name the jobs that still run `PATIENCE` seconds after they were cancelled."""
        for job in self._tasks:
            if job.given_up or job.abandoned or not which(job):
                continue
            job.abandoned = True
            logger.error(
                "%r goes on %g s after it was cancelled: it swallowed asyncio.CancelledError, which must be raised "
                "again wherever it is caught. It is abandoned, and keeps its slot until it ends.",
                job,
                PATIENCE,
            )

    def _tasks_to_wait_for(self, which: Which) -> "dict[asyncio.Task[Any], ActiveJob]":
        this = asyncio.current_task()
        return {
            task: job
            for job, task in self._tasks.items()
            if task is not None and task is not this and not (job.given_up or job.abandoned) and which(job)
        }

    async def _perform_in_turn(self, job: ActiveJob) -> Any:
        guard = self._guard
        if guard is not None and guard.quiet:
            guard.stir()  # it may wait for what the guard holds back
        try:
            await self.slots.take(job)
        except asyncio.CancelledError:
            self._end_if_never_begun(job)  # unless who cancelled it has
            raise
        return await self._perform(job)

    async def _perform(self, job: ActiveJob) -> Any:
        """The body of a job's task. A submitted job's value and error go to its future, all others to the receiver."""
        enter(job)
        if job.before is not None:
            try:
                await job.before(job)
            except asyncio.CancelledError:
                self._end_if_never_begun(job)  # unless who cancelled it has
                raise
        job.started = self._now()
        guard = self._guard
        if guard is not None and guard.quiet:
            guard.stir()
        try:
            if job.timeout is not None:
                value = await self._in_time(job, job.timeout)
            elif job.kwargs is None:
                value = await job.fn(*job.args)
            else:
                value = await job.fn(*job.args, **job.kwargs)
            if type(value) is CoroutineType:
                refuse_coroutine(value, job)
            if job.recorder is not None:
                job.recorder.take_value(job, value)
        except GeneratorExit as error:
            if job not in self._tasks or asyncio._get_running_loop() is not self._loop:
                raise  # the loop was closed under the job: nobody is left to be told
            self._fail(job, error)
        except KeyboardInterrupt as error:
            if not self._interruptible:
                self._fail(job, error)
                return None
            self._end(job, None)
            task = asyncio.current_task()
            assert task is not None, "this is the body of a task"
            task.add_done_callback(_retrieve)  # it comes out of the loop, where nobody can overlook it
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            assert task is not None, "this is the body of a task"
            if job.cancelled or job.receiver is None or task.cancelling():
                self._end(job, None)
                raise
            self._end(job, job.failed(error, self._now()))
        except BaseException as error:  # noqa: BLE001  # all of them end the job, and none may end the loop
            self._fail(job, error)
        else:
            self._end(job, job.succeeded(value, self._now()))
            return value if job.receiver is None else None

    def _fail(self, job: ActiveJob, error: BaseException) -> None:
        """Its function has raised `error`, which is being handled."""
        harmless = _harmless(error, job)
        try:
            self._end(job, job.failed(harmless, self._now()))
            if job.receiver is None:
                if harmless is error:
                    raise error
                raise harmless from harmless.__cause__
        finally:
            del harmless  # its traceback holds this frame: a cycle that would keep the item alive

    async def _in_time(self, job: ActiveJob, timeout: float) -> Any:
        """Call the job's function, for at most `timeout` seconds; deliver its outcome without it if it does not end.

        Raises:
            JobTimeout: it took longer, or went on although it was cancelled for that.
            Exception: what the function raised.
        """
        last = self._loop.call_later(timeout + PATIENCE, self._give_up_on, job, timeout)
        try:
            async with asyncio.timeout(timeout) as scope:
                value = await job.fn(*job.args, **(job.kwargs or {}))
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise JobTimeout(f"{job!r} did not end within {timeout:g} s{_why(error)}") from error
        finally:
            last.cancel()
        if scope.expired():
            raise JobTimeout(
                f"{job!r} swallowed the cancellation of its {timeout:g} s timeout and went on. "
                f"Re-raise asyncio.CancelledError wherever it is caught."
            )
        return value

    def _give_up_on(self, job: ActiveJob, timeout: float) -> None:
        """Deliver the outcome of a job that goes on after its timeout. It keeps its slot until it ends."""
        self.complain(lambda other: other is job)
        why = f"{job!r} did not end within {timeout:g} s, nor {PATIENCE:g} s after it was cancelled for that"
        self._deliver(job, job.failed(JobTimeout(why), self._now()))
        job.given_up = True

    def _settle(self, job: ActiveJob, task: "asyncio.Task[Any]") -> None:
        """The future of a submitted job is done."""
        self._end_if_never_begun(job)
        _retrieve(task)  # the failure is in the log already

    def _end_if_never_begun(self, job: ActiveJob) -> None:
        if job in self._tasks:
            self._end(job, None)

    def _end(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        del self._tasks[job]
        if job.holds:
            self.slots.give_back(job)
        if not job.given_up:
            self._deliver(job, outcome)
        job.forget()
        if self.on_free is not None:
            self.on_free()

    def _deliver(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        try:
            self._account(job, outcome)
        except Exception as error:  # noqa: BLE001  # a filter of the user's logging, for example; the outcome must arrive
            self._loop.call_exception_handler({"message": f"{job!r} could not be logged", "exception": error})
        finally:
            if job.receiver is not None:
                job.receiver.job_ended(job, outcome)

    def _account(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        if outcome is None:
            self.cancelled += 1
            return
        if outcome.kind is None:
            self.done += 1
            if outcome.error is None:
                self.ran.record(outcome.ran)
        else:
            self.failed[outcome.kind] = self.failed.get(outcome.kind, 0) + 1
            if job.logged:
                self._log.write(job, outcome)
        if self._instruments:
            self._tell(JobEnded(outcome))

    def tell_of_replayed(self, outcome: Outcome[Any]) -> None:
        """An earlier run has ended this job: who counts the whole run is told, too."""
        if self._instruments:
            self._tell(JobEnded(outcome))

    def _tell(self, event: JobEnded) -> None:
        for instrument in tuple(self._instruments):
            try:
                instrument.notify(event)
            except Exception:
                logger.exception("instrument %r failed; it is told nothing more", instrument)
                self._instruments.remove(instrument)


def _harmless(error: BaseException, job: ActiveJob) -> Exception:
    """`contained`, but for a job that says by the error of a future in a thread that it was cancelled.

    That one ends nothing where it is an outcome; only `asyncio.wrap_future`, which no outcome passes, would turn it
    into a cancellation.
    """
    harmless = contained(error, job)
    cancelled = harmless.__cause__
    if type(harmless) is UsageError and isinstance(cancelled, concurrent.futures.CancelledError):
        harmless.__cause__ = None  # else each knows the other
        return cancelled
    return harmless


def _why(error: TimeoutError) -> str:
    """What was noted on the cancellation behind a time-out: that the job waited in vain, for example."""
    notes: list[str] = getattr(error.__cause__, "__notes__", [])
    return "".join(f": {note}" for note in notes)


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Look at a task's exception, so that asyncio need not complain that nobody did."""
    if not task.cancelled():
        task.exception()
