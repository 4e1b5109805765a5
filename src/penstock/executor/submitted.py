"""What is submitted to a bridge: a coroutine function as a job, or a plain function as a call in a thread.

    any thread: JobFuture -- posted --> loop: a slot? -> ActiveJob -> task -> outcome -> the future is done
                                              no slot -> it waits as it is, and the next job that ends starts it
    any thread: PlainCall -- the lane's queue --> thread: fn -> the future is done

A future that waits for its slot is all that there is of its job: so a hundred thousand of them cost little more than
those of the standard library. A job's future stays *pending* while it runs, so that it can be cancelled until it is
done: it says so at once, and those who wait for it in `wait` or `as_completed` hear of it when the coroutine has ended.

Threads: a future is made and cancelled anywhere. All else of a job belongs to the loop thread.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context
from functools import partial
from types import CoroutineType
from typing import Any, Protocol, TypeAlias, TypeVar

from penstock.callables import name_of, refuse_coroutine
from penstock.context import Host, RunningJob, enter, job_in
from penstock.executor.active import ActiveJob
from penstock.executor.running import RunningJobs
from penstock.executor.slots import Holder, Slots
from penstock.outcome import FailureKind, Outcome, contained
from penstock.threads.call import SubmittedCall, context_of_caller
from penstock.threads.crossing import Crossing
from penstock.threads.future import Waiters, WatchedFuture

T = TypeVar("T")

logger = logging.getLogger("concurrent.futures")
"""Where the standard library tells of callbacks that go wrong."""


class Post(Protocol):
    """How a callback gets to the loop."""

    def __call__(self, callback: Callable[[], object], /) -> bool:
        """False if the loop has ended."""
        ...


Submitted: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, float | None]
"""A function, its arguments and keywords, the key of its job and the seconds that this may take."""


class BridgedJob(ActiveJob):
    """A job whose error belongs to the holder of its future, who is told if it is never asked for."""

    logged = False


class JobFuture(WatchedFuture[T]):
    """The future of a coroutine function, and until it has a slot all that there is of its job."""

    job: BridgedJob | None = None
    """Once it has a slot, or waits for that of the job that submitted it."""
    _subject: str = "a job"

    def __init__(self, jobs: "SubmittedJobs", post: Post, submitted: Submitted) -> None:
        Future.__init__(self)
        self._waiters = waiters = Waiters()
        waiters.future = self
        self._jobs: SubmittedJobs | None = jobs
        self._post: Post | None = post
        self.submitted: Submitted | None = submitted
        """What was asked for; None when it is over."""
        self.context = context_of_caller()

    @property
    def subject(self) -> str:
        """What messages call it."""
        return self._subject

    def begin(self) -> None:
        """Run, now or in its turn. On the loop."""
        assert self._jobs is not None, "it begins before it is over"
        self._jobs.begin(self)

    def running(self) -> bool:
        """As in the standard library; and it can be cancelled nevertheless."""
        job = self.job
        return job is not None and job.holds and not self.done()

    def cancel(self) -> bool:
        """Cancel the coroutine, whether it has begun or not; False if it is done."""
        if not super().cancel():
            return False
        jobs, post = self._jobs, self._post
        if jobs is not None and post is not None:
            post(partial(jobs.withdraw, self))
        return True

    # --- loop thread; the one that has run it, once there is no loop any more ---

    def job_ended(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        """The job has given its slot back."""
        if outcome is None or outcome.kind is FailureKind.CANCELLED:
            self.drop()
        else:
            self._end(outcome.value, outcome.error)

    def refuse(self, error: BaseException) -> None:
        """It is never to run, or never to end."""
        self._end(None, error)

    def drop(self) -> None:
        """It was cancelled: those who wait for it hear of it now."""
        try:
            super().cancel()
        except BaseException:  # as in `_end`
            logger.critical("Exception in worker", exc_info=True)
        self._end(None, None)

    def _end(self, value: Any, error: BaseException | None) -> None:
        """It is over; those who wait for it hear of it now."""
        assert self._jobs is not None, "it ends once"
        self._jobs.forget(self)
        self._jobs = self._post = None  # who keeps the future is not to keep the executor
        self.submitted = None
        self.context = _NO_CONTEXT
        self.let_go()
        job, self.job = self.job, None
        if job is not None:
            job.receiver = _NOBODY  # an error's traceback knows the job: a cycle
            if error is not None:
                self._subject = repr(job)
        del job
        try:
            if self.set_running_or_notify_cancel():
                if error is None:
                    self.set_result(value)
                else:
                    self.set_exception(error)
        except BaseException:  # of a callback: what is no Exception comes through, and would end the loop
            logger.critical("Exception in worker", exc_info=True)
        finally:
            del error


class _Nobody:
    """Whom a job tells of its end that has been told already."""

    def job_ended(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        """Nobody wants to know."""


_NOBODY = _Nobody()
_NO_CONTEXT = Context()


class SubmittedJobs:
    """The jobs of a bridge, from their futures to their tasks. Loop thread only.

    Args:
        host: the executor that runs them.
        jobs: those that have a task.
    """

    def __init__(self, host: Host, jobs: RunningJobs) -> None:
        self._host = host
        self._jobs = jobs
        self._waiting: deque[JobFuture[Any]] = deque()
        self._filling = False
        self._futures: set[JobFuture[Any]] = set()
        """All that are not over."""
        main = asyncio.current_task()
        assert main is not None, "it is made by what runs on the loop for as long as jobs may"
        self._loop_ends = main.cancelling
        self.on_start: Callable[[], object] | None = None
        """Called when a job has been started that waited."""
        jobs.on_free = self.fill

    def __len__(self) -> int:
        """Futures that wait for a slot."""
        return len(self._waiting)

    def expect(self, future: JobFuture[Any]) -> None:
        """It has been submitted. Any thread."""
        self._futures.add(future)

    def in_flight(self) -> list[JobFuture[Any]]:
        """Those that are not over. Any thread."""
        return list(self._futures)

    def forget(self, future: JobFuture[Any]) -> None:
        """It is over."""
        self._futures.discard(future)

    def begin(self, future: JobFuture[Any]) -> None:
        """Run its job: now, on the slot of the job that it was submitted by, or in its turn."""
        assert future.submitted is not None, "it is withdrawn by what is posted later"
        parent = job_in(future.context)
        if isinstance(parent, Holder) and self._may_lend(parent) and not self._loop_ends():
            self._jobs.start_in_turn(self._job(future, future.submitted, parent), future.context)
        else:
            self._waiting.append(future)
            self.fill()

    def fill(self) -> None:
        """Start those whose turn it is."""
        if not self._waiting or self._filling:  # the latter: an eager task (3.12) has ended in the call that made it
            return
        self._filling = True
        try:
            self._fill(self._jobs.slots, self._waiting)
        finally:
            self._filling = False

    def _fill(self, slots: Slots, waiting: "deque[JobFuture[Any]]") -> None:
        while waiting and slots.in_use < slots.limit and not self._loop_ends():
            future = waiting.popleft()
            if future.submitted is None:
                continue
            job = self._job(future, future.submitted, None)
            taken = slots.take_nowait(job)
            assert taken, "one is free, and then nobody waits for it"
            self._jobs.start(job, future.context)
            if self.on_start is not None:
                self.on_start()

    def withdraw(self, future: JobFuture[Any]) -> None:
        """Its holder has cancelled it."""
        if future.submitted is None:
            return
        if future.job is None:
            future.drop()
        else:
            self._jobs.cancel_one(future.job)

    def cancel_waiting(self) -> None:
        """Cancel the jobs that wait for the slot of the job that submitted them."""
        self._jobs.cancel(lambda job: not job.holds)

    def cancel_from_outside(self) -> None:
        """Cancel the futures that have no job yet. Any thread."""
        for future in list(self._futures):
            if future.job is None:
                future.cancel()

    def refuse_all(self, refusal: Callable[[], Exception]) -> None:
        """There is no loop any more for those that are not over. On the thread that has run it."""
        for future in list(self._futures):
            future.refuse(refusal())

    def _may_lend(self, parent: Holder) -> bool:
        """Whether a slot may come from the job that submits, or from one that waits for that."""
        return parent.host is self._host and (parent.holds or parent.nearest_lender() is not None)

    def _job(self, future: JobFuture[Any], submitted: Submitted, parent: Holder | None) -> BridgedJob:
        fn, args, kwargs, key, timeout = submitted
        job = BridgedJob(self._host, parent, name_of(fn), fn, args, timeout, future)
        job.kwargs = kwargs or None
        job.key = key
        future.job = job
        return job


class PlainJob(RunningJob):
    """Who asks, in a plain function that no job has submitted."""

    def __init__(self, host: Host, fn: Callable[..., Any], key: Any) -> None:
        self.host = host
        self.key = key
        self._fn = fn

    @property
    def name(self) -> str:  # type: ignore[override]  # worked out when it is asked for, which is seldom
        """The function's name."""
        return name_of(self._fn)


class PlainCall(SubmittedCall):
    """A plain function that was submitted to a bridge: what it runs knows who asks, and its error is its own."""

    def __init__(
        self,
        crossing: Crossing,
        host: Host,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: Any,
    ) -> None:
        super().__init__(crossing, fn, args, kwargs)
        self._host = host
        self._key = key

    @property
    def subject(self) -> str:
        """What messages call it: by its key, if it has one of its own."""
        return self.name if self._key is None else repr(PlainJob(self._host, self.fn, self._key))

    def thread_name(self, number: int) -> str:
        """As that of any call; its own job is known in its context alone."""
        return f"penstock-{self.crossing.name}_{number} {job_in(self.context) or self.name}"

    def perform(self) -> Any:
        """Call the function, as the work of the job that submitted it, or of nobody but itself."""
        fn, args, kwargs = self.fn, self._args, self._kwargs
        if self.job is None or self.job.host is not self._host:
            enter(PlainJob(self._host, fn, self._key))
        del self  # an error's traceback holds this frame: a cycle
        value = fn(*args, **kwargs)
        if type(value) is CoroutineType:
            refuse_coroutine(value, name_of(fn))
        return value

    def told(self, error: BaseException) -> BaseException:
        """As it is: the standard library's contract. But for one that no future of a loop takes, which would hang."""
        return contained(error, self.name) if isinstance(error, StopIteration) else error
