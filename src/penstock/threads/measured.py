"""A lane's number of places, measured: the timer that asks `staffing.py`.

    a call is made -> watch() -> every TICK: counts since the last one -> Staffing -> PermitQueue.resize

Guarantees: the timer runs only while there is something to decide, so an idle loop stays idle and a virtual clock comes
to its end. Calls that hang are made up for by further places, though not in silence: while all places are held by calls
that nobody waits for any more, the log says so, again whenever their number has doubled. Loop thread only.
"""

from collections import deque
from typing import TYPE_CHECKING, Protocol

from penstock import clock
from penstock.threads.crossing import Crossing
from penstock.threads.staffing import TICK, Observation, Staffing
from penstock.threads.workers import Workers, usable_cores

if TYPE_CHECKING:
    import asyncio

LEAST_PLACES = 4
"""Arbitrary, because: as many calls as no machine minds."""
LAGS_REMEMBERED = 5
"""Ticks whose median is the loop's lag."""


class Places(Protocol):
    """A lane, as far as it is measured."""

    limit: int
    asked: int
    books: Crossing

    @property
    def waiting(self) -> int: ...

    @property
    def in_vain(self) -> str | None: ...

    def oldest_wait(self, now: float) -> float: ...

    def resize(self, limit: int) -> None: ...


class Measured:
    """Sets the number of places of a lane that has no limit of its own."""

    def __init__(self, lane: Places, workers: Workers) -> None:
        self._lane = lane
        self._loop = lane.books.loop
        self._most = max(lane.limit, workers.most)
        self._staffing = Staffing(least=lane.limit, most=self._most)
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._lags: deque[float] = deque(maxlen=LAGS_REMEMBERED)
        self._burnt = _BurntCpu(workers, lane.books)
        self._last = self._counts()

    @property
    def rests(self) -> bool:
        """Whether nothing is decided at the moment. Any thread."""
        return self._timer is None

    def watch(self) -> None:
        """A call has been made, or an abandoned one is over: there may be something to decide."""
        if self._timer is None:
            self._lags.clear()
            self._burnt.share()  # what was burnt before is no reason to add no place now
            self._set_timer()

    def _set_timer(self) -> None:
        self._due = self._loop.time() + TICK
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        lane, now = self._lane, self._loop.time()
        self._timer = None  # before looking: who makes a call from now on watches again
        self._lags.append(now - self._due)
        counts, last = self._counts(), self._last
        self._last = counts
        asked, started, ended, seconds = (new - old for new, old in zip(counts, last, strict=True))
        lane.books.tell_once(lane.in_vain, lane.limit)
        places = self._staffing.tick(
            Observation(
                now=now,
                arrivals=int(asked),
                started=int(started),
                ended=int(ended),
                held=seconds,
                busy=lane.books.busy,
                waiting=lane.waiting,
                oldest_wait=lane.oldest_wait(now),
                cpu=self._burnt.share(),
                lag=sorted(self._lags)[len(self._lags) // 2],
            )
        )
        if places != lane.limit:
            lane.resize(places)
        if not self._staffing.settled and lane.books.busy < self._most:
            self._set_timer()

    def _counts(self) -> tuple[float, float, float, float]:
        """Totals so far."""
        books = self._lane.books
        return self._lane.asked, books.started, books.ended, books.seconds


class _BurntCpu:
    """What share of the usable cores the threads of a lane burn. Those of others are not slowed down by more of its."""

    def __init__(self, workers: Workers, books: Crossing) -> None:
        self._workers = workers
        self._books = books
        self._asked = clock.steady()
        self._before: dict[int, float] = {}

    def share(self) -> float:
        """Since it was last asked."""
        now = clock.steady()
        elapsed, self._asked = now - self._asked, now
        burnt, after = 0.0, dict[int, float]()
        for worker in self._workers.threads:
            used = None if worker.cpu_clock is None else clock.cpu_time(worker.cpu_clock)
            if worker.cpu_clock is None or used is None:
                continue
            after[worker.cpu_clock] = used
            if getattr(worker.call, "crossing", None) is self._books:
                burnt += used - self._before.get(worker.cpu_clock, used)
        self._before = after
        return min(1.0, burnt / elapsed / usable_cores()) if elapsed > 0 else 0.0
