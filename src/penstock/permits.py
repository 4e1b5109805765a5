"""A number of permits, and one fair queue of those who wait for them: what gates and slots hand out.

Purpose: admit at most `limit` at once, first in, first out, with retries that are due before fresh work, and nobody
while a pause lasts. What is waited for is checked at the head of one queue and taken in one step, so no permit is ever
held by someone who waits for something else.

Guarantees: a permit is either taken by a caller that runs, or free. A waiter that is cancelled in the very tick in
which it was admitted hands its permit on. A cancelled waiter leaves nothing behind, however long a pause lasts.

All of it belongs to the loop thread; nothing here may be called from another.

An `asyncio.Semaphore` would count as well, but it cannot be taken outside a coroutine, cannot put a due retry before
fresh work, and cannot hold its queue back while a server asks for a pause without letting late comers overtake.
"""

import asyncio
from collections import OrderedDict
from typing import TypeAlias

_Line: TypeAlias = "OrderedDict[asyncio.Future[PermitQueue], None]"


class PermitQueue:
    """`limit` permits, and who waits for them."""

    __slots__ = ("_due", "_fresh", "_loop", "_paused_until", "_resume", "in_flight", "limit", "now")

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self.now = loop.time
        self.limit = limit
        self.in_flight = 0
        self._fresh: _Line = OrderedDict()
        self._due: _Line = OrderedDict()
        self._paused_until = 0.0
        self._resume: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many wait for a permit."""
        return len(self._fresh) + len(self._due)

    @property
    def idle(self) -> bool:
        """True when nobody uses it, nobody waits and no pause is remembered."""
        return not (self.in_flight or self._fresh or self._due or self._resume)

    @property
    def paused_for(self) -> float:
        """Seconds until the pause ends; 0 when there is none."""
        return 0.0 if self._resume is None else max(0.0, self._paused_until - self.now())

    def take_nowait(self) -> bool:
        """Take a permit if one is free. Nobody is before us then: who waits is admitted as soon as one is free."""
        if self.in_flight >= self.limit or self._resume is not None:
            return False
        self.in_flight += 1
        return True

    async def take(self, *, again: bool = False) -> None:
        """Wait for a permit and take it. With `again`, wait before all fresh work: the retry is due.

        Cancellation: the place in the queue is given up, and so is a permit granted in the same tick.
        """
        if self.take_nowait():
            return
        await _admission(self._loop, [self._due if again else self._fresh])

    def give_back(self) -> None:
        """Return a permit; the next in line gets it."""
        self.in_flight -= 1
        self._admit()

    def pause(self, duration: float) -> None:
        """Admit nobody for `duration` seconds. A longer pause that is under way stays."""
        until = self.now() + duration
        if duration <= 0 or until <= self._paused_until:
            return
        self._paused_until = until
        if self._resume is not None:
            self._resume.cancel()
        self._resume = self._loop.call_at(until, self._end_pause)

    def _end_pause(self) -> None:
        self._resume = None
        self._admit()

    def _admit(self) -> None:
        while self.in_flight < self.limit and self._resume is None:
            queue = self._due or self._fresh
            if not queue:
                return
            admitted, _ = queue.popitem(last=False)
            if not admitted.done():  # else it has been cancelled or admitted elsewhere, and its task has not run yet
                self.in_flight += 1
                admitted.set_result(self)


async def take_first(loop: asyncio.AbstractEventLoop, *queues: PermitQueue) -> PermitQueue:
    """Wait for a permit of whichever queue has one first, behind who waits there already; return that queue.

    Cancellation: as for `PermitQueue.take`.
    """
    return await _admission(loop, [queue._fresh for queue in queues])


async def _admission(loop: asyncio.AbstractEventLoop, lines: list[_Line]) -> PermitQueue:
    admitted: asyncio.Future[PermitQueue] = loop.create_future()
    for line in lines:
        line[admitted] = None
    try:
        return await admitted
    except BaseException:
        if admitted.done() and not admitted.cancelled():
            admitted.result().give_back()
        raise
    finally:
        for line in lines:
            line.pop(admitted, None)
