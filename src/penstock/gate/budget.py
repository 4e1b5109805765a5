"""The retry budget of one service: how much of its load may be retries, over all jobs together.

A failing service is not helped by being asked three times as often. So retries are paid for, out of one balance per
service key that first attempts fill:

    first attempt   + share
    retry           - its cost; denied when the balance does not cover it
    success         + SUCCESS x share, and the cost back if it was a retry
    time            + RESERVE a second, as far as the deposits of the last second were below it

A denied retry is not lost: the gate lets it wait, in order, until the balance affords it. That is why a success
deposits too: with 30 % of random failures, the retries that fail again cost more than first attempts bring. A budget
that only these fill would run dry, all jobs would come to wait in it, and no first attempt would be left to fill it.
Where nothing succeeds the plain rule is left, and a total failure is what a budget is for.

Guarantees: the balance is never negative, and never above 10 or the share of the first attempts of the last ten
seconds, whichever is more. Over any time in which nothing succeeds, retries cost at most the balance before it, the
share of its first attempts, and the reserve. So with all attempts failing from the start, there are at most 1.15
attempts for each first attempt in a minute, from a steady 8 first attempts a second on; below that the reserve is more,
by intent.

Pure: the time is an argument (seconds, never going back). Loop thread only, no locks. O(1) memory.
"""

import math
from collections import deque

from penstock.errors import UsageError

SHARE = 0.1
"""Retries for each first attempt. Google's SRE book, "Handling Overload": a per-client retry budget of 10 %."""
INITIAL = 10.0
"""The balance at the start, and the smallest cap. gRPC's proposal A6 shows `maxTokens` of 10."""
MEMORY = 10
"""Seconds for which deposits are kept: as in Finagle's RetryBudget and tower's."""
SUCCESS = 4.0
"""Shares that a success deposits. When a share f of attempts fails at random, a job costs up to f * f / (1 - f) in
retries that fail again: 0.5 at the half at which a breaker opens, and a first attempt and a success then bring
0.1 * (1 + 4). With less there is a gap below the breaker in which jobs stand still (with 1, from f = 0.36 on); with
more, a service whose breaker should have opened would still be asked again at full rate."""
RESERVE = 1.0
"""Cost units a second for services that are asked seldom. Arbitrary, because: Finagle reserves 10 retries a second; a
batch can wait."""
RETRY_COST = 1.0
"""What a retry costs."""
THROTTLED_RETRY_COST = 5 / 14
"""What a retry costs after a throttling that said when to come back: in AWS's retry mode of 2026 a transient retry
costs 14 tokens, one after throttling 5."""
_ROUNDING = 1e-9
"""A balance that is short by no more than this is short by rounding."""


class RetryBudget:
    """The budget of one service key, shared by all its jobs. Loop thread only; nothing here blocks or waits.

    Args:
        share: retries for each first attempt. 0 leaves the initial balance and the reserve.

    Raises:
        UsageError: a share that cannot work.
    """

    __slots__ = ("_balance", "_cap", "_covered", "_firsts", "_second_ends", "_seconds", "share")

    def __init__(self, share: float = SHARE) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
            raise UsageError(
                f"RetryBudget(share={share!r}): expected retries for each first attempt, as a share of at least 0. "
                f"Write RetryBudget(share=0.1)."
            )
        self.share = float(share)
        self._balance = self._cap = INITIAL
        self._covered = -math.inf  # until then deposits have taken the place of the reserve
        self._firsts = 0  # first attempts in the running second
        self._seconds: deque[int] = deque(maxlen=MEMORY)  # those of the seconds before it
        self._second_ends = -math.inf

    def deposit(self, now: float) -> None:
        """A first attempt starts."""
        if now >= self._second_ends or now >= self._covered:
            self._settle(now)
        self._firsts += 1
        self._covered += self.share / RESERVE
        balance = self._balance + self.share
        self._balance = balance if balance < self._cap else self._cap

    def succeeded(self, now: float, refund: float = 0.0) -> None:
        """An attempt succeeded; `refund` is what it had cost, 0.0 for a first attempt."""
        if now >= self._second_ends or now >= self._covered:
            self._settle(now)
        deposit = SUCCESS * self.share
        self._covered += deposit / RESERVE
        balance = self._balance + deposit + refund
        self._balance = balance if balance < self._cap else self._cap

    def withdraw(self, cost: float, now: float) -> bool:
        """Pay for a retry; False when the balance does not cover it, which then stays as it is."""
        balance = self.balance(now)
        if balance < cost - _ROUNDING:
            return False
        self._balance = max(0.0, balance - cost)
        return True

    def refund(self, cost: float, now: float) -> None:
        """A retry that was paid for is not made."""
        self._balance = min(self._cap, self.balance(now) + cost)

    def affordable_in(self, cost: float, now: float) -> float | None:
        """Seconds until `withdraw` would pay, if nothing but the reserve came in; 0.0: now. None: never."""
        missing = cost - self.balance(now)
        if missing <= _ROUNDING:
            return 0.0
        if cost > self._cap:
            return None
        return max(0.0, self._covered - now) + missing / RESERVE

    def balance(self, now: float) -> float:
        """What may be spent at `now`."""
        self._settle(now)
        return self._balance

    def _settle(self, now: float) -> None:
        """Let the reserve flow up to `now`, and the cap follow the rate."""
        if now >= self._second_ends:
            self._turn(now)
        if now > self._covered:
            self._balance = min(self._cap, self._balance + (now - self._covered) * RESERVE)
            self._covered = now
        elif self._covered > now + 1.0:
            self._covered = now + 1.0  # deposits of the last second hold the reserve back, not those of a burst before

    def _turn(self, now: float) -> None:
        """Close the running second, and forget deposits that are too old."""
        late = now - self._second_ends
        if late >= MEMORY:
            self._seconds.clear()
            self._second_ends = now + 1.0
        else:
            passed = int(late) + 1
            self._seconds.append(self._firsts)
            self._seconds.extend([0] * (passed - 1))
            self._second_ends += passed
        self._firsts = 0
        self._cap = max(INITIAL, self.share * sum(self._seconds))
        self._balance = min(self._balance, self._cap)
