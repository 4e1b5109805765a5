"""One quota of a server, as far as its answers tell: how much is left, and when the next round trip may start.

Books are kept on what the server has *granted*, counted from the beginning: what was left when it looked, plus all that
had been taken until then. Within a window of a server that has one client this sum stays the same, however many round
trips are under way, and

    left = granted - taken

is right between the answers too. It rises when the quota is filled up, and falls when somebody else uses it.

How fast it goes:

    plenty left          more than half, and nobody else uses it: nothing is held back, so a small job never waits
    refilling server     `granted` rises all the time (token bucket, sliding window): as fast as it rises, or as quota /
                         window say, a little faster while much is left, slower when nearly nothing is
    coarse clock         a window of a second or two whose reset is told in whole seconds, so that nobody knows where
                         in the second it ends: quota / window, from the start
    otherwise            what is left, evenly until the reset: left / (reset - now). There is no fixed margin for
                         others, which would be lost at each reset: whoever shares the quota is seen by his use of it,
                         and the speed is multiplied with our own share

Nothing left: until the reset, and at a refilling server until so much has come in. A reset does not mean that all is
there again: one may go, and if nothing is heard, two, four, ...

Some servers always say that nothing is left, and until now, and refuse nobody. After some dozens of such successes it
is believed no more, until there is something left, or one is refused: then it is believed for twice as many.

Refusals while there should be something left (others were faster) make it slower for a while, once for each episode.

Simulated (50 ms round trips, 128 in flight, resets exact or in whole seconds): one client uses at least 97 % of token
buckets and fixed windows, with no more than 0.2 % refused; of sliding windows 92-97 % where the server tells their
length and 72-94 % where it does not, with no more than 1 %. Four clients, none of which knows of the others and none of
which is paused by a refusal, use 97 % of fixed windows with 0.1 % (a second) to 4 % (a minute) refused, and 79-100 % of
token buckets with up to 5 %, in small ones of few a second more. Sliding windows that are shared are its weak side:
what others use looks like what does not come back, and in the worst case simulated 60 % were refused.

Pure: time is an argument. Nothing blocks. Loop thread only.
"""

import math

HALF = 0.5
"""Of the quota: what may be used without being held back."""
COARSE = 2.0
"""Seconds. In a window that is longer, whole seconds are exact enough: the end is seen when they change."""
FAIRLY_FULL = 0.995
"""Of quota / window: what is aimed at with a coarse clock. All of it would find the end of a window now and then."""
MAKES_UP = 0.05
"""Of a window, and at most of a second: what a late start may catch up. Simulated: less loses at each reset."""
NEARLY_NOTHING = 0.03
"""Of the quota: below, a refilling server is asked more slowly. In a sliding window that is what stays unused."""
TOLD_GAIN, SEEN_GAIN = 0.2, 1.0
"""How much faster a full quota of a refilling server is asked for. A rate that was seen may be our own low speed, and
has to be found out: that takes more."""
SLOWEST = 0.25
"""Of the rate, at a refilling server with nothing left but what comes in."""
LEAST = 0.1
"""Of the speed that would be ours: no measurement makes it slower."""

FULL = 0.9
"""Of the quota: what a window has at least when it has just begun."""
SHARED = 0.1
"""Of all that is used: when others use more, the quota is taken for a shared one. Less may be noise."""
ALARM, SMOOTHING = 0.7, 0.3
"""Weight of a new measurement: others are noticed at once, and forgotten in some time."""
CAREFUL, RECOVERY = 0.7, 0.05
"""What refusals leave of the speed, and what each measurement without one gives back. Additive up, multiplicative down:
so clients that share a quota come to the same speed (Chiu and Jain, 1989)."""
MEASURED_OVER = 0.25
"""Seconds, or of a window: the shortest time for a measurement. Simulated: less is noise."""
ENOUGH = 10.0
"""Taken in such a time, or the rest of that share of a window is waited for."""

REMEMBERED = 10.0
"""Windows after one that was seen to begin, whose ends are known by that. Arbitrary, because: clocks drift little."""

PATIENCE = 0.5
"""Seconds between trials after a reset, and for which a cut stands. Arbitrary, because: most answers take less."""
LIES = 36
"""Successes running that say "used up, until now": whoever says so does not count. Not fewer: a small bucket may tell
the truth thus, where it rounds its resets down."""
FORGOTTEN = 60.0
"""Seconds, or two windows: what is not told of for so long, though others are, exists no longer. Arbitrary, because: an
answer that leaves one out may be of another kind."""
LONGEST_WINDOW = 3_600.0
"""Seconds that count for that: no reset is later, so nothing is known of more."""
SHORTEST = 1e-3
"""Seconds: instead of 0 where a time is divided by."""
LONGEST_WAIT = 60.0
"""Seconds for something to come in. Arbitrary, because: what was measured is not true for ever."""


class Quota:
    """What is known of one quota. Amounts are requests, or whatever its dimension counts.

    `learn` comes first: before the first answer there is nothing to ask.
    """

    __slots__ = (
        "_at", "_base", "_care", "_claimed", "_coarse", "_count", "_cut_at", "_granted", "_gross", "_inflow",
        "_late", "_lies", "_measured_at", "_measured_granted", "_measured_taken", "_most_lies", "_next",
        "_others", "_quota", "_rate", "_refills", "_reset_at", "_size", "_stepped_at", "_taken", "_told",
        "_trial_at", "_trials", "_window", "dimension", "newest",
    )  # fmt: skip

    def __init__(self, dimension: str, now: float) -> None:
        self.dimension = dimension
        self.newest = 0
        """The mark of the newest answer."""
        self._taken = 0.0
        """All that was ever taken and not refused."""
        self._granted = math.inf
        self._at = now
        """When something was heard last."""
        self._gross = 0.0
        self._count = 0
        self._claimed = False
        """Whether the newest answer says "used up, until now"."""
        self._lies = 0
        """Such answers running that were successes."""
        self._most_lies = LIES

        self._quota = self._size = 1.0
        """What the server says; what was ever seen of it: a bucket may be smaller than what flows through it."""
        self._window = 0.0
        self._told = False
        """Whether the server says how long its window is; else it is at least as long as the longest reset."""
        self._coarse = True
        """Whether all resets were whole seconds."""
        self._late = 0.0
        """Seconds that a reset comes later than said: at most one, where they are rounded down."""
        self._reset_at = -math.inf
        self._trial_at = -math.inf
        self._trials = 1.0
        self._next = -math.inf
        """When the pace lets the next one start."""

        self._refills = False
        self._rate = 0.0
        """Of a refilling server: what is aimed at."""
        self._inflow = 0.0
        """What came in lately; 0 where nothing is known."""
        self._others = 0.0
        """Their share of what is used."""
        self._care = 1.0
        self._cut_at = -math.inf
        self._stepped_at = -math.inf
        """When a window was seen to begin."""
        self._base = math.inf
        """What was granted when the window began."""
        self._measured_at = now
        self._measured_granted = math.inf
        self._measured_taken = 0.0

    @property
    def heard(self) -> float:
        """When the server told of it last."""
        return self._at

    @property
    def disbelieved(self) -> bool:
        """Whether it always says that nothing is left, though there is."""
        return self._lies >= self._most_lies

    def answered(self) -> None:
        """One was a success. Those that say so and are refused do not come here between `learn` and `believe`."""
        self._lies += self._claimed
        self._claimed = False

    def believe(self) -> None:
        """One was refused: it is used up indeed."""
        if self.disbelieved:
            self._most_lies *= 2
        self._lies = 0
        self._claimed = False

    def stale(self, now: float) -> bool:
        """Whether it was not told of for so long that it exists no longer, if others are told of."""
        return now >= self._at + max(FORGOTTEN, 2 * min(self._window, LONGEST_WINDOW))

    def reset_in(self, now: float) -> float:
        """Seconds until the reset."""
        return max(0.0, self._reset_at - now)

    def at_rest(self, now: float) -> bool:
        """Whether nobody would have to wait, or would be too fast, who knew nothing of it."""
        if now < max(self._reset_at, self._next, self._trial_at):
            return False
        return not self._refills or self.left(now) >= HALF * self._size or self.stale(now)

    def left(self, now: float) -> float:
        """What nobody has taken yet, as far as it is known."""
        left = self._granted - self._taken
        if self._refills:
            left = min(self._size, left + self._inflow * (now - self._at))
        return left

    def due(self, weight: float, now: float) -> float:
        """When so much may be taken."""
        if self.disbelieved:
            return -math.inf
        left = self.left(now)
        need = self._needed(weight)
        if left >= need:
            return self._next if self._paced(left) else -math.inf
        if self._refills and self._inflow > 0:
            return now + min((need - left) / self._inflow, LONGEST_WAIT)
        return max(self._reset_at, self._trial_at)

    def take(self, weight: float, now: float) -> None:
        """Count so much."""
        left = self.left(now)
        self._taken += weight
        self._gross += weight
        self._count += 1
        if left < self._needed(weight):
            if not (self._refills and self._inflow > 0):
                self._try(weight, now)
        elif self._paced(left):
            self._pace(weight, left, now)
        else:
            self._next = now

    def _needed(self, weight: float) -> float:
        """What has to be left: what is heavier than all there can be waits for all there can be."""
        return min(weight, self._size if self._refills else self._quota)

    def _paced(self, left: float) -> bool:
        return left < HALF * self._size or self._others > SHARED or self._care <= CAREFUL or self._short()

    def _short(self) -> bool:
        """A window so short that a coarse clock says nothing of its end."""
        return self._coarse and self._window <= COARSE and not self._refills

    def _pace(self, weight: float, left: float, now: float) -> None:
        own = self._care * (1.0 - self._others if self._others > SHARED else 1.0)
        makes_up = min(MAKES_UP, MAKES_UP * self._window)
        latest = max(self._reset_at, now + LONGEST_WAIT)
        if self._refills:
            level = left / self._size
            faster = 1.0 + (TOLD_GAIN if self._told else SEEN_GAIN) * level
            speed = max(self._care, LEAST) * self._rate * min(faster, max(level / NEARLY_NOTHING, SLOWEST))
        elif self._short():
            speed = max(own, LEAST) * FAIRLY_FULL * self._quota / self._window
        else:
            speed = max(own, LEAST) * left / max(self._reset_at - now, SHORTEST)
            makes_up = 0.0
            latest = max(self._reset_at, now)
        pause = weight / speed if speed > 0 else math.inf  # all but nothing is left: the speed is no number any more
        self._next = min(max(self._next, now - makes_up) + pause, latest)

    def _try(self, weight: float, now: float) -> None:
        """The reset is over and nothing was heard of it: let a few go, and wait for what they hear."""
        self._granted = self._taken + (self._trials - 1) * weight
        self._trials *= 2
        self._trial_at = now + PATIENCE

    def refused(self, now: float) -> None:
        """One was refused."""
        self.correct(-1.0)
        self._inflow = 0.0
        if now >= self._cut_at + PATIENCE:
            self._cut_at = now
            self._care = max(LEAST, self._care * CAREFUL)

    def correct(self, difference: float) -> None:
        """More or less was used than taken. What is left is as it was: the server has told of it in the answer."""
        self._taken += difference
        self._granted += difference

    def learn(
        self, remaining: float, reset: float, quota: float | None, window: float | None, in_flight: int, now: float
    ) -> None:
        """Take over what an answer says. `in_flight`: round trips that the server had not seen when it said so."""
        self._claimed = remaining <= 0 and reset <= 0
        if not self._claimed:
            self._lies = 0
        outstanding = in_flight * (self._gross / self._count if self._count else 1.0)
        granted = remaining + self._taken - outstanding
        self._describe(remaining, reset, quota, window)
        if self._granted == math.inf:
            self._base = granted
            self._measure_from(granted, now)
        else:
            self._compare(remaining, granted, now)
        self._set_clock(remaining, reset, now)
        self._granted = granted
        self._at = now
        self._trials = 1.0
        self._trial_at = -math.inf

    def _describe(self, remaining: float, reset: float, quota: float | None, window: float | None) -> None:
        seen = max(self._size, remaining)
        self._size = seen if quota is None else max(1.0, min(seen, quota))
        self._quota = self._size if quota is None else max(1.0, quota)
        self._coarse = self._coarse and reset == math.floor(reset)
        if window is not None:
            self._window, self._told = max(window, SHORTEST), True
        elif not self._told:
            self._window = max(self._window, reset, 1.0 if self._coarse else SHORTEST)

    def _set_clock(self, remaining: float, reset: float, now: float) -> None:
        """When the window ends. Whole seconds say "not later than", so the earliest of all is the best."""
        if self._coarse and remaining < 1 and reset == 0 and now >= self._reset_at:
            self._late = 1.0  # it is over and it is not: they are rounded down
        until = now + reset + self._late
        if self._short() and now < self._stepped_at + REMEMBERED * self._window:
            # One window is as long as the other: better known than any reset in whole seconds.
            windows = math.floor((now - self._stepped_at) / self._window) + 1
            until = min(until, self._stepped_at + windows * self._window)
        same_window = self._coarse and now < self._reset_at and until <= self._reset_at + 1.5
        self._reset_at = min(self._reset_at, until) if same_window else until

    def _compare(self, remaining: float, granted: float, now: float) -> None:
        """Find out whether it fills up all the time, how fast, and whether others use it too."""
        rise = granted - self._granted
        much = max(HALF * self._size, 2.0)
        if rise >= much and rise > 2 * self._rate * (now - self._at):
            self._step(remaining < FULL * self._quota and self._others < SHARED, granted, now)
        elif not self._refills and now < self._reset_at and granted - self._base >= much:
            self._fill(granted, now)  # more than there was, and no window has ended
        else:
            elapsed = now - self._measured_at
            enough = self._taken - self._measured_taken >= ENOUGH
            if elapsed >= MEASURED_OVER and (enough or elapsed >= MEASURED_OVER * self._window):
                self._measure(granted, elapsed, now)

    def _step(self, partly: bool, granted: float, now: float) -> None:
        """Much has come in all at once: a window has ended, if all is there again."""
        if not self._refills:
            self._share(self._measured_granted - self._granted)
        if partly:
            self._fill(granted, now)
        else:
            self._refills = False
            self._stepped_at = now
            self._measure_from(granted, now)
        self._base = granted

    def _fill(self, granted: float, now: float) -> None:
        if not self._refills:
            self._refills = True
            seen = (granted - self._measured_granted) / max(now - self._measured_at, MAKES_UP)
            self._rate = self._inflow = self._quota / self._window if self._told else max(seen, self._slowest())
        self._measure_from(granted, now)

    def _slowest(self) -> float:
        return LEAST * self._quota / max(self._window, 1.0)

    def _measure(self, granted: float, elapsed: float, now: float) -> None:
        rise = granted - self._measured_granted
        if self._refills:
            inflow = rise / elapsed
            if self._inflow:
                inflow = self._inflow + SMOOTHING * (inflow - self._inflow)
            self._inflow = max(0.0, inflow)
            if self._told:
                self._inflow = min(self._inflow, self._rate)
            else:
                self._rate = max(self._inflow, self._slowest())
        else:
            self._share(-rise)
        self._care = min(1.0, self._care + RECOVERY)
        self._measure_from(granted, now)

    def _share(self, others: float) -> None:
        """They have used so much since the last measurement."""
        own = self._taken - self._measured_taken
        if own > 0 and own + others > 0:
            share = max(others / (own + others), -1.0)  # an error to either side, which evens out
            self._others += (ALARM if share > self._others else SMOOTHING) * (share - self._others)

    def _measure_from(self, granted: float, now: float) -> None:
        self._measured_at = now
        self._measured_granted = granted
        self._measured_taken = self._taken
