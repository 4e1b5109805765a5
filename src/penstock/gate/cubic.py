"""A send rate found by trial, for a server that refuses what is too much and says nothing of its quota.

The curve is that of CUBIC (RFC 9438) as the AWS SDKs use it for requests (their "adaptive" retry mode): after a refusal
the rate falls to a share of what got through, rises quickly, then slowly while it is near the rate at which it was
refused, and quickly again if nothing happens there:

    rate(t) = C * (t - K) ** 3 + W        t: since the cut, W: what got through before it, K: when W is reached again

    disabled --refused--> starting: doubled every half second --refused--> cutting and rising
        ^                                                                    |            ^
        |                                             three refusals running v            | one got through
        +---- 5 minutes without a refusal                                   shut: trials, ever more seldom

What differs from the SDKs, all of it tuned in a simulation: 85 % are left after a cut instead of 70 % (the curve then
uses 96 % on average instead of 92 %); one cut for each episode and not for each refusal; K so long that a refusal is
one of a hundred requests also where there are only a few in a second; a start that doubles, because a rate that is
first measured in a burst may be wrong by a factor of a hundred; and `shut`, for quotas in fixed windows, where nothing
helps until the window ends. From one reopening to the next as much gets through as the quota is: that is W then.

A server that refuses above a number of requests *in flight* looks the same, and the rate does for it too, as long as
one loop alone answers the refusals: while this one is enabled, the limit on requests in flight must not hear of them.

Simulated, quotas without headers, with 128 in flight or an adaptive limit: 93-100 % used, 0.1-1.9 % refused (60 a
minute in fixed windows: 95 %, 7 %). A cap on what is in flight: more than the best fixed limit, 0.01 % refused.

Pure: time is an argument. Nothing blocks. Loop thread only.
"""

import math

LEFT_AFTER_A_CUT = 0.85
"""Beta."""
STEEPNESS = 0.4
"""C, in requests a second per cubic second: RFC 9438 and the AWS SDKs."""
FLOOR = 0.5
"""Requests a second: the AWS SDKs."""
HEADROOM = 2.0
"""Times what got through lately, which the rate does not exceed: the AWS SDKs."""
BUCKET = 0.5
"""Seconds over which is counted what gets through: the AWS SDKs."""
NEWEST = 0.8
"""Weight of the newest bucket: the AWS SDKs."""
MANY = 10.0
"""Answers that a bucket should have: with fewer, their number says little. At low rates it lasts longer for that."""
LONGEST_BUCKET = 5.0
SHORTEST_BUCKET = 0.05
"""Seconds."""
APART = 120.0
"""Requests from a cut until the same rate is reached again, at least. Simulated: at 5 a second, with 60, 5 % are
refused."""
LONGEST_RETURN = 30.0
"""Seconds for K. Arbitrary, because: who once guessed too low should not feel it for minutes."""
EPISODE = 0.5
"""Seconds for which a cut stands: refusals in this time were mostly sent before it."""
SHUT_AFTER = 3
"""Refusals running. Arbitrary, because: two may be chance."""
CREDIBLE = 1.5
"""Times what gets through in a whole window: a rate that shut it may have been that much too high, and no more. Where
it was, the window was used to its end; where not, the window may have been used little, and says little."""
FIRST_TRIAL, LONGEST_TRIAL = 0.25, 8.0
"""Seconds between trials. Arbitrary, because: a window of a minute costs ten refusals then."""
MAKES_UP = 0.05
"""Seconds that a late start may catch up."""
QUIET = 300.0
"""Seconds without a refusal, after which the rate is set free. Arbitrary, because: longer than most windows."""


class Cubic:
    """A send rate that falls with refusals and rises along a cubic curve."""

    __slots__ = (
        "_answered", "_bucket_from", "_cut_at", "_cycle_answered", "_cycle_from", "_last", "_measured",
        "_most", "_next", "_return", "_shut_at", "_starting", "_streak", "_trial", "_tried", "enabled",
    )  # fmt: skip

    def __init__(self) -> None:
        self.enabled = False
        self._most = 0.0
        """W; 0 while nothing is known."""
        self._return = 1.0
        """K."""
        self._cut_at = -math.inf
        self._starting = False
        self._next = -math.inf
        self._last = -math.inf
        """The last refusal."""
        self._streak = 0
        """Refusals running."""
        self._trial = 0.0
        """Seconds between trials; 0 while it is not shut."""
        self._tried = False
        """Whether a trial is under way."""
        self._measured = 0.0
        """What got through lately, a second."""
        self._answered = 0
        self._shut_at = math.inf
        """The rate at which it was shut."""
        self._bucket_from = -math.inf
        self._cycle_from = -math.inf
        self._cycle_answered = 0

    def due(self, now: float) -> float:
        """When the next one may start."""
        if now >= self._last + QUIET:
            self.enabled = False
            self._most = self._trial = 0.0
            return -math.inf
        return self._next

    def found(self, now: float) -> float | None:
        """How many may start in a second, trials included; None where nothing is searched for."""
        if not self.enabled or now >= self._last + QUIET:
            return None
        return 1.0 / self._trial if self._trial else self.rate(now)

    def take(self, now: float) -> None:
        """Count one that starts."""
        if self._trial:
            self._tried = True
            self._next = now + self._trial
        else:
            self._next = max(self._next, now - MAKES_UP) + 1.0 / self.rate(now)

    def rate(self, now: float) -> float:
        """How many may start in a second."""
        since = now - self._cut_at
        if self._starting:
            doublings = min(since / EPISODE, 30.0)  # a billion times: more than any machine sends
            return max(FLOOR, LEFT_AFTER_A_CUT * self._most * math.exp2(doublings))
        rise = self._most * (1.0 - LEFT_AFTER_A_CUT) * (since / self._return - 1.0) ** 3
        return max(FLOOR, min(self._most + rise, max(HEADROOM * self._measured, self._most)))

    def succeeded(self, now: float) -> None:
        """One got through."""
        self._streak = 0
        self._answered += 1
        if self._trial:
            self._reopen(now)
        elif now >= self._bucket_from + BUCKET and (
            self._answered >= MANY or now >= self._bucket_from + LONGEST_BUCKET
        ):
            self._measure(now)

    def throttled(self, now: float, queueing: bool) -> None:
        """One was refused, and nothing was said of when to come back.

        While requests queue at the server (`queueing`) that is no sign of a quota: it does not enable this then.
        """
        self._streak += 1
        if not self.enabled:
            if not queueing:
                self.enabled = True
                self._last = now
                self._measure(now)
                self._cut(self._measured, now)
                self._next = now
            return
        self._last = now
        if self._trial:
            if self._tried:  # others were sent before it was shut
                self._tried = False
                self._trial = min(LONGEST_TRIAL, 2.0 * self._trial)
                self._next = now + self._trial
        elif now < self._cut_at + EPISODE:
            return
        elif self._streak >= SHUT_AFTER:
            self._shut_at = self.rate(now)
            self._trial = FIRST_TRIAL
            self._tried = False
            self._next = now + self._trial
        else:
            self._measure(now)
            self._cut(min(self.rate(now), self._measured), now)

    def _cut(self, through: float, now: float) -> None:
        self._starting = self._most == 0.0
        self._most = max(through, FLOOR / LEFT_AFTER_A_CUT)
        curve: float = (self._most * (1.0 - LEFT_AFTER_A_CUT) / STEEPNESS) ** (1 / 3)
        self._return = max(curve, min(LONGEST_RETURN, APART / self._most))
        self._cut_at = now

    def _reopen(self, now: float) -> None:
        """A trial got through: a window has begun."""
        self._trial = 0.0
        self._count(now)
        elapsed = now - self._cycle_from
        if elapsed < math.inf:
            through = self._cycle_answered / elapsed
            self._cut(self._shut_at if self._shut_at <= CREDIBLE * through else through, now)
        self._measured = self._most
        self._cycle_from = now
        self._cycle_answered = 0
        self._next = now

    def _measure(self, now: float) -> None:
        """Bring what gets through up to date."""
        elapsed = now - self._bucket_from
        if elapsed < SHORTEST_BUCKET:
            return
        if elapsed < math.inf:
            full = min(elapsed / BUCKET, max(self._answered / MANY, elapsed / LONGEST_BUCKET))
            weight = 1.0 - (1.0 - NEWEST) ** full if self._measured else 1.0
            self._measured += weight * (self._answered / elapsed - self._measured)
        self._count(now)

    def _count(self, now: float) -> None:
        self._cycle_answered += self._answered
        self._answered = 0
        self._bucket_from = now
