"""A number of permits, and one fair queue of those who wait for them: what gates and slots hand out.

Purpose: admit at most `limit` at once, first in, first out, with retries that are due before fresh work, and nobody
while a pause lasts. What is waited for is checked at the head of one queue and taken in one step, so no permit is ever
held by someone who waits for something else: who needs a thread as well (a `Companion`), or tokens of a rate (a
`Meter`), gets all of it together.

Guarantees: a permit is either taken by a caller that runs, or free. A waiter that is cancelled in the very tick in
which it was admitted hands its permit on. A cancelled waiter leaves nothing behind, however long a pause lasts.

All of it belongs to the loop thread; nothing here may be called from another, but for `admit_soon`.

An `asyncio.Semaphore` would count as well, but it cannot be taken outside a coroutine, cannot put a due retry before
fresh work, cannot change its number, and cannot hold its queue back without letting late comers overtake.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias


class Waiter(Protocol):
    """Who waits in a queue: a future, or what behaves like one here."""

    def done(self) -> bool:
        """True when it does not want the permit any more."""
        ...

    def set_result(self, queue: "PermitQueue", /) -> None:
        """It has a permit of `queue`, and its companion's."""
        ...


class Companion(Protocol):
    """Something scarce that some waiters need together with their permit, such as a thread."""

    def take_nowait(self) -> bool:
        """Take one if there is one."""
        ...

    def give_back(self) -> None:
        """Return one that was not used."""
        ...

    def when_free(self, tell: Callable[[], None], /) -> None:
        """Call `tell` once, in any thread, when one may be free."""
        ...


Weight: TypeAlias = Mapping[str, float] | None
"""How much of each rate is needed; None is one request."""


class Meter(Protocol):
    """Rates, of which each admission takes its tokens."""

    active: bool
    """False while nothing can delay anybody: then it need not be asked."""

    def delay(self, weight: Weight, now: float, /) -> float:
        """Seconds until `weight` may be admitted; 0 when it may be now."""
        ...

    def take(self, weight: Weight, now: float, /) -> None:
        """Take the tokens."""
        ...


class Needs(NamedTuple):
    """What a waiter takes together with its permit."""

    companion: Companion | None = None
    weight: Weight = None


_Line: TypeAlias = "OrderedDict[Waiter, Needs]"
_NOTHING = Needs()


PERMIT = "permit"
THREAD = "thread"
TOKENS = "rate"
PAUSE = "pause"
"""What the first in line waits for. Others who hold a queue back give words of their own."""


class PermitQueue:
    """`limit` permits, and who waits for them."""

    __slots__ = (
        "_asked", "_due", "_fresh", "_held", "_holds", "_loop", "_paused_until", "_refill", "_resume", "_stuck",
        "in_flight", "limit", "meter", "now",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self.now = loop.time
        self.limit = limit
        self.in_flight = 0
        self.meter: Meter | None = None
        """Rates that admissions have to keep; None when there are none."""
        self._fresh: _Line = OrderedDict()
        self._due: _Line = OrderedDict()
        self._held = False
        """Nobody is admitted, for one of the reasons that follow."""
        self._stuck: str | None = None
        """What the first in line waits for beside a permit."""
        self._asked: set[Companion] = set()
        """Who is going to tell when there is one."""
        self._refill: asyncio.TimerHandle | None = None
        """When there are tokens for the first in line."""
        self._holds: dict[str, None] = {}
        """Why somebody else has said so."""
        self._paused_until = 0.0
        self._resume: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many wait for a permit."""
        return len(self._fresh) + len(self._due)

    @property
    def first(self) -> Waiter | None:
        """Who is the next to be admitted."""
        return next(iter(self._due or self._fresh), None)

    @property
    def waits_for(self) -> str | None:
        """What the first in line waits for; None when nobody waits."""
        if not (self._fresh or self._due):
            return None
        if self._resume is not None:
            return PAUSE
        return next(iter(self._holds), None) or self._stuck or PERMIT

    @property
    def idle(self) -> bool:
        """True when nobody uses it, nobody waits and no pause is remembered."""
        return not (self.in_flight or self._fresh or self._due or self._resume)

    @property
    def paused_for(self) -> float:
        """Seconds until the pause ends; 0 when there is none."""
        return 0.0 if self._resume is None else max(0.0, self._paused_until - self.now())

    def take_nowait(self, needs: Companion | None = None, weight: Weight = None) -> bool:
        """Take a permit if one is free, and with it what it `needs` and the tokens for its `weight`.

        Nobody is before us then: who waits is admitted as soon as that is possible.
        """
        if self.in_flight >= self.limit or self._held:
            return False
        meter = self.meter
        if meter is not None and meter.active:
            now = self.now()
            if meter.delay(weight, now) > 0 or (needs is not None and not needs.take_nowait()):
                return False
            meter.take(weight, now)
        elif needs is not None and not needs.take_nowait():
            return False
        self.in_flight += 1
        return True

    async def take(self, *, again: bool = False, needs: Companion | None = None, weight: Weight = None) -> None:
        """Wait for a permit and take it. With `again`, wait before all fresh work: the retry is due.

        Cancellation: the place in the queue is given up, and so is a permit granted in the same tick.
        """
        if self.take_nowait(needs, weight):
            return
        admitted: asyncio.Future[PermitQueue] = self._loop.create_future()
        self.join(admitted, again=again, needs=needs, weight=weight)
        try:
            await admitted
        except BaseException:
            self.leave(admitted)
            _hand_back(admitted, self, needs, weight)
            raise

    def join(
        self, waiter: Waiter, *, again: bool = False, needs: Companion | None = None, weight: Weight = None
    ) -> None:
        """Wait in line. Whoever joins two queues leaves the other one when the first has admitted it."""
        line = self._due if again else self._fresh
        line[waiter] = _NOTHING if needs is None and weight is None else Needs(needs, weight)
        if not self._held:
            self._admit()
        elif again and self._stuck:
            self.look_again()  # it is before who is stuck, and may need something else

    def leave(self, waiter: Waiter) -> None:
        """Wait no more, if it still does. Who has been admitted is not in line any more."""
        was_first = self._stuck and waiter is self.first
        if self._fresh.pop(waiter, None) is None:
            self._due.pop(waiter, None)
        if was_first:
            self.look_again()  # the next one may need less

    def give_back(self) -> None:
        """Return a permit; the next in line gets it."""
        self.in_flight -= 1
        if not self._held:
            self._admit()
        elif self._stuck is THREAD:
            self.look_again()  # one has come back with it, if it has been used by one

    def resize(self, limit: int) -> None:
        """Change the number of permits. Those beyond a smaller number are taken back as they come back."""
        self.limit = limit
        if not self._held:
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
        self._held = True
        self._note_reason()

    def hold_back(self, why: str, on: bool) -> None:
        """Admit nobody until it is switched off again by all who have switched it on."""
        if on is (why in self._holds):
            return
        if on:
            self._holds[why] = None
        else:
            del self._holds[why]
        self.look_again()

    def held_back(self, why: str) -> bool:
        """Whether it has been held back for this reason."""
        return why in self._holds

    def clear(self) -> list[Waiter]:
        """Send everybody away who waits, and name them."""
        waiters = [*self._due, *self._fresh]
        self._due.clear()
        self._fresh.clear()
        if self._stuck:
            self.look_again()
        return waiters

    def admit_soon(self, companion: Companion) -> None:
        """There may be one: look again whether somebody can be admitted. Any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._told, companion)

    def look_again(self) -> None:
        """Something has changed: somebody may be admitted now."""
        self._stuck = None
        if self._refill is not None:
            self._refill.cancel()
            self._refill = None
        self._held = bool(self._holds) or self._resume is not None
        if not self._held:
            self._admit()
        self._note_reason()

    def give_tokens_back(self, weight: Weight) -> None:
        """What was taken of the rates is not used. To be overridden by who has any."""

    def _note_reason(self) -> None:
        """What the first in line waits for may be another thing now. To be overridden by who wants to know."""

    def _told(self, companion: Companion) -> None:
        self._asked.discard(companion)
        self.look_again()

    def _end_pause(self) -> None:
        self._resume = None
        self.look_again()

    def _admit(self) -> None:
        while self.in_flight < self.limit and not self._held:
            line = self._due or self._fresh
            if not line:
                return
            waiter, needs = line.popitem(last=False)
            if waiter.done():  # it has been cancelled or admitted elsewhere, and its task has not run yet
                continue
            if needs is not _NOTHING or (self.meter is not None and self.meter.active):
                self._stuck = self._take_with_it(needs)
                if self._stuck is not None:
                    line[waiter] = needs
                    line.move_to_end(waiter, last=False)
                    self._held = True
                    self._note_reason()
                    return
            self.in_flight += 1
            waiter.set_result(self)

    def _take_with_it(self, needs: Needs) -> str | None:
        """Take what goes with a permit, all or nothing; what is lacking, with word to come when it is there."""
        meter, companion = self.meter, needs.companion
        metered = meter is not None and meter.active
        now = self.now()
        if metered and (delay := meter.delay(needs.weight, now)) > 0:  # type: ignore[union-attr]
            self._refill = self._loop.call_at(now + delay, self.look_again)
            return TOKENS
        if companion is not None and not companion.take_nowait():
            if companion not in self._asked:  # else it has been asked for somebody who has left since
                self._asked.add(companion)
                companion.when_free(partial(self.admit_soon, companion))
            return THREAD
        if metered:
            meter.take(needs.weight, now)  # type: ignore[union-attr]
        return None


async def take_first(
    loop: asyncio.AbstractEventLoop,
    *queues: PermitQueue,
    again: bool = False,
    needs: Companion | None = None,
    weight: Weight = None,
) -> PermitQueue:
    """Wait for a permit of whichever queue has one first, behind who waits there already; return that queue.

    `again`, `needs` and `weight` are said of the first queue only.

    Cancellation: as for `PermitQueue.take`.

    Raises:
        Exception: what the waiter was sent away with.
    """
    admitted: asyncio.Future[PermitQueue] = loop.create_future()
    queues[0].join(admitted, again=again, needs=needs, weight=weight)
    for queue in queues[1:]:
        if not admitted.done():
            queue.join(admitted)
    try:
        return await admitted
    except BaseException:
        _hand_back(admitted, queues[0], needs, weight)
        raise
    finally:
        for queue in queues:
            queue.leave(admitted)


def _hand_back(
    admitted: "asyncio.Future[PermitQueue]", first: PermitQueue, needs: Companion | None, weight: Weight
) -> None:
    """Who waited goes away: what it was given in this very tick is the next one's, with all that came from `first`."""
    if not admitted.done() or admitted.cancelled() or admitted.exception() is not None:
        return
    admitted.result().give_back()
    if admitted.result() is first:
        first.give_tokens_back(weight)
        if needs is not None:
            needs.give_back()
