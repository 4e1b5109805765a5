"""When a loop is overloaded, and how much less it is to start then. Decides only: measurements in, a share out.

    every BEAT: the loop's lag     -> LoadRule.beat -> share of the limits, whether limits may grow
    every LOOK: the memory in use  -> MemoryRule.look -> whether memory is short

A loop that lags has more to do than its thread can: what is started in addition only waits, and is measured wrongly.
So all gates of the loop start a fifth less, once a second, as long as it lasts, and come back by a tenth of the whole
each second once it is over, slower the nearer the lag still is to that. The same while memory is short. A single long
lag among short ones is a pause, of the garbage collector for instance: what is measured then is wrong, but it says
nothing about how much the loop can do.

Memory is short when this process holds most of what it may, or when others have left next to nothing. What a process
has freed it does not always give back to the system. So when nothing has come back for `PATIENCE` seconds, what is left
is taken for the program's own, and the mark moves up, at most to `LAST_MARK`.

Guarantees: `share` in (0, 1], and never so small that fewer than `LEAST_IN_FLIGHT` round trips may be in flight on the
loop because of it. Same measurements, same decisions.
"""

from collections import deque

from penstock.memory import MemoryUse

BEAT = 0.05
"""Seconds between two measurements of the loop's lag. Arbitrary, because: twenty of them in a second have a median, and
are no load."""
WINDOW = 1.0
"""Seconds over which lags are judged, and between two cuts. Arbitrary, because: a cut takes effect within a round
trip, which is shorter as a rule."""
LEAST_BEATS = 5
"""Beats before there is a median. Arbitrary, because: one callback that is slow once delays a single beat."""
LAGS = 0.02
"""Seconds of median lag from which on a loop is overloaded: it turns fifty times a second at the most."""
LAGS_ONCE = 0.1
"""Seconds of a single lag from which on it is, too. As asyncio's debug mode (`loop.slow_callback_duration`)."""
LAGS_OFTEN = 2
"""Such lags within `WINDOW` that cut though the others are short. Arbitrary, because: one is a pause."""
CALM = 0.005
"""Seconds of median lag below which all that may come back does. CPython's own switch interval between threads."""
CUT = 0.8
"""Factor of a cut. Arbitrary, because: half is reached in three seconds, and one hiccup costs little."""
RECOVERY = 0.1
"""Share that comes back each second. Arbitrary, because: a second of it is half of a cut, so it cannot oscillate
fast."""
LEAST_IN_FLIGHT = 16
"""Round trips in all that are never cut. Arbitrary, because: they are no load for any loop."""

LOOK = 0.25
"""Seconds between two looks at the memory. Arbitrary, because: 30 us each, and a network of 10 Gbit/s brings 300 MB in
them."""
MARK = 0.8
"""Share of what this process may use, from which on memory is short. Arbitrary, because: what is in flight goes on and
needs room, too."""
BACK = 0.1
"""Share by which it must fall below the mark until memory is not short any more. Arbitrary, because: a tenth is more
than what one job makes."""
STEP = 0.04
"""Share by which the mark moves up when nothing comes back."""
LAST_MARK = 0.92
"""Where it moves at most. Arbitrary, because: what is left then is no room for anything."""
PATIENCE = 10.0
"""Seconds without a new low after which nothing is expected to come back. Arbitrary, because: longer than most jobs
take to end."""
NEW_LOW = 0.01
"""Share by which it must have fallen to be a new low. Arbitrary, because: less is noise."""
LEAST_AVAILABLE = 0.05
"""Share of what this process may use that must be left for it by others. Half of what earlyoom kills at."""


class LoadRule:
    """The share of their limits that the gates of one loop may use."""

    def __init__(self) -> None:
        self.share = 1.0
        self.lagging = False
        """Whether the loop is late, be it once: limits that are measured now must not grow."""
        self.worst = 0.0
        """The longest lag of the last `WINDOW`, in seconds."""
        self._lags: deque[tuple[float, float]] = deque()
        self._last: float | None = None
        self._cut_at: float | None = None

    def beat(self, now: float, lag: float, total: int, *, short: bool) -> None:
        """A measurement has come `lag` seconds late.

        Args:
            now: seconds, of any clock.
            total: the sum of the limits that the share is taken of.
            short: memory is.
        """
        lags = self._lags
        lags.append((now, lag))
        while now - lags[0][0] >= WINDOW:
            lags.popleft()
        ordered = sorted([lag for _, lag in lags])
        median = ordered[len(ordered) // 2]
        # Of the beats in a second, the 99th percentile is the worst one.
        self.worst = ordered[-1]
        overloaded = len(ordered) >= LEAST_BEATS and median > LAGS
        self.lagging = overloaded or self.worst > LAGS_ONCE
        often = sum(lag > LAGS_ONCE for lag in ordered) >= LAGS_OFTEN
        cut = short or overloaded or (self.lagging and (often or median > CALM))
        elapsed = 0.0 if self._last is None else now - self._last
        self._last = now
        if cut:
            if self._cut_at is None or now - self._cut_at >= WINDOW:
                self._cut_at = now
                self.share *= CUT
        elif not self.lagging:
            self.share += RECOVERY * elapsed * min(1.0, max(0.0, (LAGS - median) / (LAGS - CALM)))
        if self.share < 1.0 and total > 0:
            self.share = max(self.share, LEAST_IN_FLIGHT / total)
        self.share = min(1.0, self.share)


class MemoryRule:
    """Whether memory is short."""

    def __init__(self) -> None:
        self.short = False
        self.used: float | None = None
        """Share of what this process may use that it holds; None before it is known."""
        self.mark = MARK
        """Share from which on it is short."""
        self.since = 0.0
        """When it became short."""
        self.by_others = False
        """It became short because others have left nothing."""
        self.looked_at: float | None = None
        """When it was looked at last; None: never."""
        self._lowest = 1.0
        self._lowest_at = 0.0

    @property
    def room(self) -> float | None:
        """Share that this process may hold in addition before memory is short; None before that is known."""
        return None if self.used is None else max(0.0, self.mark - self.used)

    def look(self, now: float, use: MemoryUse) -> None:
        """Take in what is used `now`."""
        self.looked_at = now
        self.used = used = use.used / use.allowed
        available = use.available / use.allowed
        if used < MARK - BACK:
            self.mark = MARK
        if not self.short:
            self.by_others = used < self.mark
            self.short = not self.by_others or available < LEAST_AVAILABLE
            self.since = self._lowest_at = now
            self._lowest = used
        else:
            self.short = available < 2 * LEAST_AVAILABLE or not self._came_back(now, used)

    def _came_back(self, now: float, used: float) -> bool:
        """Whether enough has come back, or the rest never will."""
        if used < (self.mark if self.by_others else self.mark - BACK):
            return True
        if used < self._lowest - NEW_LOW:
            self._lowest, self._lowest_at = used, now
        elif now - self._lowest_at >= PATIENCE and used < LAST_MARK:
            self.mark = min(LAST_MARK, max(self.mark, used + STEP))
            return True
        return False
