"""One job while it runs: calling the user's function, with its identity, its time, and nothing it can break."""

import asyncio
from collections.abc import Callable
from typing import Any

from penstock.callables import refuse_coroutine
from penstock.clock import now
from penstock.context import Host, enter
from penstock.errors import JobTimeout
from penstock.executor.slots import Holder
from penstock.outcome import FailureKind, Outcome, classify, contained


class ActiveJob(Holder):
    """A job of an executor, from its slot to its outcome."""

    __slots__ = ("args", "cancelled", "feed", "fn", "input", "kwargs", "result", "settled", "started", "timeout")

    def __init__(
        self,
        host: Host,
        parent: Holder | None,
        name: str,
        fn: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(host, name, None, parent)
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.input: Any = None
        self.timeout = timeout
        self.started = 0.0
        self.cancelled = False
        """True when the executor or a stream asked for the cancellation, so that it is no outcome."""
        self.feed: object = None
        """The stream's side that the job belongs to; None for a submitted job."""
        self.settled = False
        """True when the job has ended and waits for the items before it to be delivered."""
        self.result: Outcome[Any] | None = None

    def outcome(self, task: "asyncio.Task[Any]", ended: float) -> Outcome[Any] | None:
        """How the job ended; None when it was cancelled from outside.

        Only its executor can reach the task of a stream's job, so a cancellation that the executor did not ask for is
        the job's own doing. A submitted job's future is in the hands of the caller.
        """
        value: Any = None
        error: BaseException | None = None
        if task.cancelled():
            if self.cancelled or self.feed is None:
                return None
            error = asyncio.CancelledError(f"{self!r} cancelled itself")
        elif (error := task.exception()) is None:
            value = task.result()
        kind = None if error is None else classify(error)
        return Outcome(self.key, self.input, value, error, kind, self.attempts, self.waited, ended - self.started)

    def refused(self, error: Exception) -> Outcome[Any]:
        """The outcome of a job that could not even start."""
        return Outcome(self.key, self.input, None, error, FailureKind.BUG, 0, 0.0, 0.0)

    def forget(self) -> None:
        """Let go of the user's data: children may keep this record longer than anyone needs them."""
        self.args = ()
        self.kwargs = self.input = None


async def perform(job: ActiveJob) -> Any:
    """Run a job that has a slot; the body of its task.

    Raises:
        JobTimeout: it took longer than its timeout.
        UsageError: it raised what would end the loop, or returned a coroutine that nobody awaits.
        Exception: what the job raised.
    """
    enter(job)
    job.started = now()
    try:
        if job.timeout is None:
            value = await job.fn(*job.args, **(job.kwargs or {}))
        else:
            value = await _in_time(job, job.timeout)
    except (SystemExit, RuntimeError) as error:
        harmless = contained(error, repr(job))
        if harmless is error:
            raise
        raise harmless from harmless.__cause__
    refuse_coroutine(value, job)
    return value


async def _in_time(job: ActiveJob, timeout: float) -> Any:
    try:
        async with asyncio.timeout(timeout) as scope:
            value = await job.fn(*job.args, **(job.kwargs or {}))
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise JobTimeout(f"{job!r} did not end within {timeout:g} s") from error
    if scope.expired():
        raise JobTimeout(
            f"{job!r} swallowed the cancellation of its {timeout:g} s timeout and went on. "
            f"Re-raise asyncio.CancelledError wherever it is caught."
        )
    return value
