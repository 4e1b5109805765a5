"""How many blocking calls without a limit of their own may run at once. Decides only: counts in, a number out.

    every TICK: Observation (asked, ended, busy, waiting, CPU, lag) -> Staffing.tick -> places

The queue says when there are too few: a place is added because calls do wait, never because an estimate says they
will. The estimate says when there are too many: Little's law (calls that arrive in a second, times the seconds each
holds its thread) with square-root staffing for the chance that several come at once. So growth needs no history, and
calls that never end, of which no hold time can be learnt, cost one place each until there are `most`: past that,
whoever asks waits.

Guarantees: `least <= places <= most`; a tick takes at most one place away, and none that was needed in the last
`MEMORY` seconds; while threads burn the CPU or the loop lags (a further thread would only take turns at the GIL),
places are added by the stall rule alone. Same observations, same places. Memory is bounded by the ticks in `MEMORY`.

Whoever keeps the clock may tick late, or pause while `settled`: rates are taken over the time that really went by.

Threads: none here; one thread at a time may tick.
"""

import math
from collections import deque
from dataclasses import dataclass

TICK = 0.05
"""Seconds between two ticks. Arbitrary, because: below the 100 ms at which people notice a wait, and twenty times a
second is no load."""

SHORTEST_TICK = TICK / 2
"""Seconds. An observation that comes sooner counts with the next one: so growth by a share is bounded in time, and no
rate is taken over next to nothing."""

LONGEST_WAIT = 0.02
"""Seconds that the oldest call waits before places are added: the queue delay at which Finagle's offload filter
rejects work."""

GROWTH = 0.25
"""Share of the places that is added at a time, rounded up and no more than calls wait. Simulated: 100 calls a second,
over 60 seeds, of which each call suddenly takes 1 s instead of 20 ms: p99 wait at most 0.27 s in the ten seconds after.
Rounded down it was 0.39 s, since growth from few places is then by one at a time; without the bound, there were up to
177 places instead of 146."""

MEMORY = 10.0
"""Seconds for which a need is remembered. Arbitrary, because: longer than the pause between two bursts of one job,
shorter than anybody takes to look whether the threads are gone."""

ARRIVALS_WEIGHT = 0.1
"""Share of the newest tick in the mean of arrivals. Arbitrary, because: half the mean is then from the last third of
a second, which averages over bursts and is well within `MEMORY`."""

HOLD_WEIGHT = 0.2
"""Share of the newest tick in the mean of hold times, of which not every tick has one."""

SPARE = 2.0
"""Square-root staffing: spare places, in square roots of the mean number of busy ones. At 2, an arriving call finds
all places busy in 3 of 100 cases (Halfin and Whitt 1981)."""

FULL_CPU = 0.9
"""Share of the usable cores from which on further threads would only take turns. Arbitrary, because: less than 1, which
is never measured, and more than what calls that wait for a network burn."""

LONGEST_LAG = 0.01
"""Seconds of median loop lag from which on no place is added. Measured: 256 blocked threads cost the loop 0.2 ms, one
that computes 5 to 10 ms, four that do 20 to 30 ms, at the interpreter's own switch interval."""

STALL = 0.1
"""Seconds without a start, after which calls that wait are taken for stalled. Arbitrary, because: two ticks, and five
times `LONGEST_WAIT`, so that the rule of the queue has had its turn."""

STALL_STEP = 0.025
"""Seconds by which the pauses between places for a stall grow, up to `STALL_PAUSE`: the steps in which .NET's thread
pool makes up for threads that block."""

STALL_PAUSE = 0.25
"""Seconds: the longest of these pauses, which is .NET's too."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen at one tick. Counts and sums are since the last tick."""

    now: float
    """Seconds, of any clock."""
    arrivals: int
    """Calls that asked for a thread."""
    started: int
    """Calls that got one."""
    ended: int
    """Calls whose thread came free, abandoned ones included."""
    held: float
    """Seconds for which the calls that ended had their threads, together."""
    busy: int
    """Calls that have a thread now, abandoned ones included."""
    waiting: int
    """Calls that wait for one now."""
    oldest_wait: float
    """Seconds for which the oldest of them has waited; 0 when there is none."""
    cpu: float
    """Share, from 0 to 1, of the usable cores that worker threads burnt."""
    lag: float
    """Median lag of the loop, in seconds."""


class Staffing:
    """The number of places: how many calls may have a thread at once."""

    def __init__(self, *, least: int, most: int) -> None:
        """Begin with `least` places.

        Raises:
            ValueError: not `1 <= least <= most`.
        """
        if not 1 <= least <= most:
            raise ValueError(f"expected 1 <= least <= most, found least={least!r}, most={most!r}")
        self.places = least
        """How many calls may have a thread at once."""
        self._least = least
        self._most = most
        self._last: float | None = None
        self._settled = True
        self._arrivals = self._ended = self._started = 0
        self._held = 0.0
        self._rate = 0.0
        self._hold: float | None = None
        self._needs: deque[tuple[float, int]] = deque()
        self._stall_due = 0.0
        self._stall_pause = 0.0

    @property
    def settled(self) -> bool:
        """True when nothing would change as long as no call arrives or ends: who ticks may pause until one does."""
        return self._settled

    def tick(self, seen: Observation) -> int:
        """Take in what was seen and return the new number of places. Never blocks."""
        self._arrivals += seen.arrivals
        self._started += seen.started
        self._ended += seen.ended
        self._held += seen.held
        elapsed = self._elapsed(seen.now)
        if elapsed >= SHORTEST_TICK:
            self._last = seen.now
            need = self._need(seen, elapsed)
            self.places = self._next(seen, need)
            self._arrivals = self._started = self._ended = 0
            self._held = 0.0
        self._settled = not seen.waiting and self.places <= max(self._least, seen.busy)
        return self.places

    def _elapsed(self, now: float) -> float:
        if self._last is None or now < self._last:
            # At the first tick, or on the clock of another loop, times that were written down mean nothing.
            self._needs.clear()
            self._stall_due = now + STALL
            return TICK
        return now - self._last

    def _next(self, seen: Observation, need: int) -> int:
        places = self.places
        stalled = self._stalled(seen)
        guarded = seen.cpu > FULL_CPU or seen.lag > LONGEST_LAG
        if seen.waiting and seen.oldest_wait > LONGEST_WAIT and not guarded:
            # Once a tick, however late: what waited for the loop does not need more places.
            places += min(math.ceil(GROWTH * places), seen.waiting)
        elif stalled:
            places += 1
        elif places > need:
            places -= 1
        return min(max(places, self._least), self._most)

    def _need(self, seen: Observation, elapsed: float) -> int:
        """The most places that were needed at once within `MEMORY`."""
        ticks = elapsed / TICK
        weight = 1 - (1 - ARRIVALS_WEIGHT) ** ticks
        self._rate += weight * (self._arrivals / elapsed - self._rate)
        if self._ended and 0 <= self._held < math.inf:  # anything else would stay in the mean for ever
            hold = self._held / self._ended
            weight = 1 - (1 - HOLD_WEIGHT) ** ticks
            self._hold = hold if self._hold is None else self._hold + weight * (hold - self._hold)
        need = max(self._estimate(), seen.busy)
        needs = self._needs
        while needs and needs[-1][1] <= need:
            needs.pop()
        needs.append((seen.now, need))
        while needs[0][0] < seen.now - MEMORY:
            needs.popleft()
        return needs[0][1]

    def _estimate(self) -> int:
        offered = self._rate * (self._hold or 0.0)
        if offered >= self._most:
            return self._most  # also what would be no finite number
        return math.ceil(offered + SPARE * math.sqrt(offered))

    def _stalled(self, seen: Observation) -> bool:
        """Whether a place is due because nothing moves.

        A start that follows a place of this rule is not taken for movement, or the pauses would never grow.
        """
        if not seen.waiting or self._ended or (self._started and not self._stall_pause):
            self._stall_due = seen.now + STALL
            self._stall_pause = 0.0
            return False
        if seen.now < self._stall_due or seen.oldest_wait < STALL:
            return False
        self._stall_pause = min(self._stall_pause + STALL_STEP, STALL_PAUSE)
        self._stall_due = seen.now + self._stall_pause
        return True
