"""Time limits of many attempts on one timer.

`asyncio.timeout` makes a timer of its own for each attempt, and almost all of them are cancelled again: that is the
largest single part of what a gate costs a request (`tests/benchmarks/client.py` prints it). The attempts of a gate all
have the same time, so their deadlines come in the order in which they start, and one timer for the oldest is enough:

    start: append the deadline    end: remove it    timer: cancel the tasks that are late, wait for the next oldest

Guarantees, as of `asyncio.timeout`: a task is cancelled at its deadline, its count of cancellations is put back, and a
cancellation from elsewhere is never taken for ours. When nothing is in flight any more, the timer runs out once: to
cancel it and to set it anew for each lone attempt would cost as much as the rest of a guarded call. Loop thread only.
"""

import asyncio


class Deadline:
    """The time limit of one attempt."""

    __slots__ = ("before", "expired", "task", "when")

    def __init__(self, task: "asyncio.Task[object]", when: float) -> None:
        self.task = task
        self.when = when
        self.before = task.cancelling()
        """Cancellations that were asked for before."""
        self.expired = False

    @property
    def has_cancelled(self) -> bool:
        """True if a `CancelledError` that comes out is due to this deadline and to nothing else."""
        return self.expired and self.task.cancelling() <= self.before + 1


class Deadlines:
    """The time limits of all attempts in flight that have `timeout` seconds each."""

    __slots__ = ("_loop", "_pending", "_timer", "timeout")

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        self._loop = loop
        self.timeout = timeout
        self._pending: dict[Deadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self, started: float) -> Deadline:
        """Begin the current task's time."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        deadline = Deadline(task, started + self.timeout)
        self._pending[deadline] = None
        if self._timer is None:
            self._timer = self._loop.call_at(deadline.when, self._expire)
        return deadline

    def end(self, deadline: Deadline) -> None:
        """End it."""
        if deadline.expired:
            deadline.task.uncancel()
            return
        del self._pending[deadline]

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._pending:
            oldest = next(iter(self._pending))
            if oldest.when > now:
                self._timer = self._loop.call_at(oldest.when, self._expire)
                return
            del self._pending[oldest]
            oldest.expired = True
            oldest.task.cancel()
