"""Processing that piles up holds back the round trips that would add to it.

    a call waits for a core -> watch() -> every TICK: how long will the pile take? -> each gate: hold back, or go on

A network is faster than a core: without this, answers that wait to be processed fill every slot. A round trip that
starts now adds to the pile when its answer comes. So one is held back while the pile would outlast it: what is started
then still finds the cores busy when it is back, and they are never left without work.

Guarantees: only a pile that shrinks holds anything back. When no call has ended for `PROGRESS` seconds, because one
hangs or itself waits for a round trip, everything goes on. Gates and lanes of one loop find each other here, and
neither keeps the other or the loop alive. Loop thread only.
"""

import asyncio
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from penstock.threads.crossing import Crossing

TICK = 0.02
"""Seconds. The queue delay at which Finagle's offload filter rejects work."""
HOLD_WEIGHT = 0.2
"""Share of the newest tick in the mean of what a call takes, as in `staffing.py`."""
PROGRESS = 1.0
"""Seconds. Arbitrary, because: longer than processing of one answer should take."""


class RoundTrips(Protocol):
    """Who starts round trips, and can hold them back."""

    def hold_back(self, pile: float) -> bool:
        """There are `pile` seconds of processing to do; True if something is held back for that."""
        ...


class Processing(Protocol):
    """A lane for processing."""

    limit: int
    books: Crossing

    @property
    def waiting(self) -> int: ...


class Backlog:
    """What waits to be processed in one lane."""

    def __init__(self, lane: Processing) -> None:
        self._lane = lane
        self._loop = lane.books.loop
        self._timer: asyncio.TimerHandle | None = None
        self._ended = 0
        self._seconds = 0.0
        self._hold = 0.0
        """Seconds that a call takes, as of late."""
        self._progress = 0.0
        self._stuck: int | None = None
        """How many calls had ended when it last gave up waiting for another one."""
        _parties(self._loop).backlogs.add(self)

    def watch(self) -> None:
        """A call waits."""
        if self._timer is None:
            if self._lane.books.ended != self._stuck:  # else one more call that waits is no progress
                self._progress = self._loop.time()
            self._set_timer()

    def seconds(self) -> float:
        """Until all that waits now is processed; 0 while nothing moves, or a thread of the lane waits for the loop.

        What it waits for may be the very round trip that would be held back.
        """
        lane = self._lane
        if not lane.waiting or lane.books.waiting or not self._moves():
            return 0.0
        return lane.waiting * self._hold / lane.limit

    def _set_timer(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._see_what_ended()
        parties = _parties(self._loop)
        pile = sum(backlog.seconds() for backlog in parties.backlogs)
        held = [round_trips.hold_back(pile) for round_trips in list(parties.round_trips)]
        self._timer = None
        if not self._moves():
            self._stuck = self._ended
        if any(held) or (self._lane.waiting and self._moves()):
            self._set_timer()

    def _see_what_ended(self) -> None:
        books = self._lane.books
        ended = books.ended - self._ended
        if ended:
            latest = (books.seconds - self._seconds) / ended
            self._hold = latest if not self._hold else self._hold + HOLD_WEIGHT * (latest - self._hold)
            self._ended, self._seconds, self._progress = books.ended, books.seconds, self._loop.time()

    def _moves(self) -> bool:
        return self._loop.time() - self._progress < PROGRESS


def tell_of_backlog(loop: asyncio.AbstractEventLoop, round_trips: RoundTrips) -> None:
    """Hold these back when processing piles up on `loop`."""
    _parties(loop).round_trips.add(round_trips)


class _Parties:
    """Who is concerned on one loop."""

    def __init__(self) -> None:
        self.backlogs: WeakSet[Backlog] = WeakSet()
        self.round_trips: WeakSet[RoundTrips] = WeakSet()


def _parties(loop: asyncio.AbstractEventLoop) -> _Parties:
    parties = _of_loop.get(loop)
    if parties is None:
        parties = _of_loop[loop] = _Parties()
    return parties


_of_loop: "WeakKeyDictionary[asyncio.AbstractEventLoop, _Parties]" = WeakKeyDictionary()
