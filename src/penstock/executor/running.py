"""The jobs that run: their tasks, their end, and the counts of it.

Every job is started and ended here, whether it came from `submit` or from a stream. The end of a job is a callback on
its task, because that is called whatever happened to the task, also when it never took its first step. In this order:
the slot goes back, the outcome is counted, failures are logged, instruments are told; then whoever asked is told.

Loop thread only.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

from penstock.events import Instrument, JobEnded
from penstock.executor.active import ActiveJob, perform
from penstock.executor.failure_log import FailureLog
from penstock.executor.slots import Slots
from penstock.histogram import Histogram
from penstock.outcome import FailureKind, Outcome

OnEnd: TypeAlias = Callable[[ActiveJob, Outcome[Any] | None], None]

logger = logging.getLogger("penstock.jobs")

PATIENCE = 5.0
"""Seconds that cancelled jobs get to end. Arbitrary, because: longer than clean-up takes, shorter than a hang."""


class RunningJobs:
    """The jobs of one executor that have a task."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, instruments: Sequence[Instrument]) -> None:
        self.slots = Slots(limit)
        self.done = 0
        self.failed: dict[FailureKind, int] = {}
        self.cancelled = 0
        self.ran = Histogram()
        self._loop = loop
        self._tasks: dict[asyncio.Task[Any], tuple[ActiveJob, OnEnd | None]] = {}
        self._instruments = list(instruments)
        self._log = FailureLog()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(
        self, job: ActiveJob, on_end: OnEnd | None = None, body: Coroutine[Any, Any, Any] | None = None
    ) -> "asyncio.Task[Any]":
        """Give `job` a task and a context of its own. It has its slot already, or `body` takes one first."""
        task = self._loop.create_task(perform(job) if body is None else body)
        self._tasks[task] = (job, on_end)
        task.add_done_callback(self._ended)
        return task

    def refuse(self, job: ActiveJob, error: Exception) -> Outcome[Any]:
        """The outcome of a job that has its slot and cannot start."""
        outcome = job.refused(error)
        self.slots.give_back(job)
        self._count(job, outcome)
        return outcome

    def cancel(self, jobs: Callable[[ActiveJob], bool] = lambda _job: True) -> None:
        """Cancel the jobs that `jobs` picks. Their ends come through the loop."""
        for task, (job, _) in list(self._tasks.items()):
            if jobs(job):
                job.cancelled = True
                task.cancel()

    def complain(self, jobs: Callable[[ActiveJob], bool] = lambda _job: True) -> None:
        """Name the jobs that still run `PATIENCE` seconds after they were cancelled."""
        for job, _ in self._tasks.values():
            if jobs(job):
                logger.error(
                    "%r goes on %g s after it was cancelled: it swallowed asyncio.CancelledError, which must be raised "
                    "again wherever it is caught. It is abandoned, and keeps its slot until it ends.",
                    job,
                    PATIENCE,
                )

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until no job runs; False if `timeout` seconds were not enough."""
        deadline = None if timeout is None else self._loop.time() + timeout
        while self._tasks:
            left = None if deadline is None else deadline - self._loop.time()
            if left is not None and left <= 0:
                return False
            others = [task for task in self._tasks if task is not asyncio.current_task()]
            if not others:
                return False
            await asyncio.wait(others, timeout=left)
        return True

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        job, on_end = self._tasks.pop(task)
        outcome = job.outcome(task, self._loop.time())
        if job.holds:
            self.slots.give_back(job)
        if outcome is None:
            self.cancelled += 1
        else:
            self._count(job, outcome)
        if on_end is not None:
            on_end(job, outcome)
        job.forget()

    def _count(self, job: ActiveJob, outcome: Outcome[Any]) -> None:
        if outcome.kind is None:
            self.done += 1
            self.ran.record(outcome.ran)
        else:
            self.failed[outcome.kind] = self.failed.get(outcome.kind, 0) + 1
            self._log.write(job.name, outcome)
        if self._instruments:
            self._tell(JobEnded(outcome))

    def _tell(self, event: JobEnded) -> None:
        for instrument in tuple(self._instruments):
            try:
                instrument.notify(event)
            except Exception:
                logger.exception("instrument %r failed; it is told nothing more", instrument)
                self._instruments.remove(instrument)
