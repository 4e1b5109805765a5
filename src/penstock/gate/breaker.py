"""The circuit breaker of one service: it stops asking a service that is down, and finds out when it is up again.

    closed ── too many failures ──> open ── the pause is over ──> half-open ── `probes` successes ──> closed
                                     ^                                 │
                                     └───────── one failure ───────────┘

`Breaker` is the rule, a plain value; `Circuit` is the state of one service key. The gate tells `started` and `ended` of
each attempt, keeps everything back until `until` while the circuit is open, calls `half_open` then, and lets as many
probes start as `allowed` says. Throttling is no failure: a service that says "less" is up.

Guarantees: only the transitions drawn above; a result counts only in the state in which its attempt began (`epoch`);
nothing is counted while open; memory and time of each call are bounded, whatever the load. Pauses are random within a
fifth, so that the processes that lost a service together do not come back together.

Pure: the time is an argument (seconds, never going back), randomness is injected. Loop thread only, no locks.
"""

import math
import random
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from penstock.errors import UsageError
from penstock.gate.server_hints import LONGEST_HINT

BUCKETS = 10
"""The window moves in tenths. Arbitrary, because: Hystrix counts ten seconds in ten buckets too."""
JITTER = 0.2
"""A pause is up to a fifth shorter or longer. Arbitrary, because: enough to part two processes at the first pause."""
PROBE_EVERY = 1.0
"""Seconds between the starts of probes until one has succeeded: what a service that is down may be asked for."""
CALM = 2.0
"""A closed circuit takes one doubling back for each time that it lasts this many pauses.

Arbitrary, because: five doublings, from 5 s to more than a minute, are then forgotten after ten times the last pause.
"""
_MOST_DOUBLINGS = 60
"""Beyond that only `longest` counts, and floats would overflow at a thousand."""


class CircuitState(StrEnum):
    """Where a circuit is."""

    CLOSED = "closed"
    """Attempts start."""
    OPEN = "open"
    """None starts until the pause is over."""
    HALF_OPEN = "half-open"
    """A few probes may start, to find out."""


@dataclass(frozen=True)
class Breaker:
    """When to stop asking a service that fails, and for how long. A plain value.

    Comparable, picklable, safe to share between any number of gates. Failures are 500 and other statuses above it, 408,
    time-outs and connection trouble; 429, and 503 with `Retry-After`, are none, and so is an error of your own
    making. Other answers are successes.

    Args:
        share: failures among the attempts that ended in the window, from above 0 to 1, at which the circuit opens.
        calls: attempts in the window below which the share says nothing (Hystrix: 20; Polly and resilience4j: 100).
        window: seconds of looking back.
        pause: seconds for which it opens, up to a fifth more or less; twice as long each time that no probe worked. A
            `Retry-After` of the failure that opens it lengthens the pause.
        longest: seconds that a pause lasts at most, `Retry-After` apart.
        connect_errors: attempts in a row that found no connection, at which it opens without looking at the share.
        probes: successes that close it again.
        fail_fast: what is asked meanwhile fails with `CircuitOpen`, instead of waiting. So it does anyhow where nothing
            has ever answered and no connection was found: a wrong address is not worth waiting for.

    Raises:
        UsageError: a value that cannot work.
    """

    share: float = 0.5
    calls: int = 20
    window: float = 10.0
    pause: float = 5.0
    longest: float = 60.0
    connect_errors: int = 10
    probes: int = 5
    fail_fast: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.share) or not 0 < self.share <= 1:
            raise UsageError(
                f"Breaker(share={self.share!r}): expected a share of failures above 0 and up to 1. "
                f"Write Breaker(share=0.5) to open when half of the attempts fail; breaker=None is no breaker at all."
            )
        self._check_count("calls", self.calls)
        self._check_count("connect_errors", self.connect_errors)
        self._check_count("probes", self.probes)
        self._check_seconds("window", self.window)
        self._check_seconds("pause", self.pause)
        self._check_seconds("longest", self.longest)
        if self.longest < self.pause:
            raise UsageError(
                f"Breaker(pause={self.pause!r}, longest={self.longest!r}): the longest pause is shorter than "
                f"the first. "
                f"Write Breaker(pause={self.pause!r}, longest={self.pause!r}) for pauses that do not grow."
            )
        if not isinstance(self.fail_fast, bool):
            raise UsageError(f"Breaker(fail_fast={self.fail_fast!r}): expected True or False.")

    def _check_count(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            default = Breaker.__dataclass_fields__[name].default
            raise UsageError(
                f"Breaker({name}={value!r}): expected a whole number of at least 1. Write Breaker({name}={default})."
            )

    def _check_seconds(self, name: str, value: object) -> None:
        if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
            default = Breaker.__dataclass_fields__[name].default
            raise UsageError(f"Breaker({name}={value!r}): expected seconds above 0. Write Breaker({name}={default}).")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class CircuitStatistics(NamedTuple):
    """A circuit as it is now, for people."""

    state: CircuitState
    calls: int
    """Attempts in the window that count: successes and failures."""
    failures: int
    opens_for: float
    """Seconds until probes may start; 0.0 when it is not open."""


class Circuit:
    """The breaker of one service key. Loop thread only; no method raises, blocks or waits."""

    __slots__ = (
        "_breaker",
        "_bucket_ends",
        "_calls",
        "_changed",
        "_doublings",
        "_failures",
        "_last_pause",
        "_last_start",
        "_older",
        "_older_calls",
        "_older_failures",
        "_rng",
        "_successes",
        "_unconnected",
        "_width",
        "epoch",
        "outrun",
        "probing",
        "state",
        "until",
    )

    def __init__(self, breaker: Breaker, now: float, rng: random.Random) -> None:
        self.state = CircuitState.CLOSED
        self.epoch = 0
        """Grows with each change of state, and with each probe that works. An attempt takes it along, and hands it back
        to `ended`."""
        self.until = now
        """While open: when probes may start."""
        self.probing = 0
        """Probes in flight; 0 unless half-open."""
        self.outrun: int | None = None
        """Set when a probe has worked and others are to follow: how many are in flight that began before it, and count
        as probes no more. For the owner to take note of, and to set back."""
        self._breaker = breaker
        self._rng = rng
        self._width = breaker.window / BUCKETS
        self._doublings = 0  # of the next pause, before calm is taken off
        self._last_pause = breaker.pause
        self._changed = now
        self._successes = 0
        self._last_start = -math.inf  # kept from one half-open phase to the next: pauses may be shorter than a second
        self._calls = self._failures = self._unconnected = 0
        self._older: deque[tuple[int, int]] = deque(maxlen=BUCKETS - 1)
        self._older_calls = self._older_failures = 0
        self._bucket_ends = now + self._width

    def delay(self, now: float) -> float:
        """Seconds until the next attempt may start as far as this circuit goes; 0.0: now.

        Half-open with all places taken, seconds until another probe may be tried; `math.inf` when only the end of an
        attempt can change anything. Open, it stays above 0 until `half_open` was called: at least a nanosecond.
        """
        if self.state is CircuitState.CLOSED:
            return 0.0
        if self.state is CircuitState.OPEN:
            return max(self.until - now, 1e-9)
        if self.probing >= self._breaker.probes:
            return math.inf
        if self._successes and not self.probing:
            return 0.0
        return max(0.0, self._last_start + PROBE_EVERY - now)

    def allowed(self, now: float) -> int:
        """Probes that may be in flight now, those that are (`probing`) included; meant for half-open.

        One, and one more for each second that there was no answer: a probe that hangs does not hold up recovery. Never
        more than `probes`. Until one has succeeded, starts are a second apart, whatever became of the last probe; after
        that, the next one may follow at once. 0 while open.
        """
        if self.state is CircuitState.OPEN:
            return 0
        return min(self.probing + (self.delay(now) <= 0.0), self._breaker.probes)

    def started(self, now: float) -> int:
        """An attempt starts: returns the epoch to hand to `ended`, which must be called however the attempt ends."""
        if self.state is CircuitState.HALF_OPEN:
            self.probing += 1
            self._last_start = now
        return self.epoch

    def ended(
        self, epoch: int, now: float, failed: bool | None, unreachable: bool = False, retry_after: float | None = None
    ) -> bool:
        """An attempt of `epoch` has ended. True when that has changed the state.

        `failed` None says nothing about the service: nothing counts, but a probe is over. `retry_after` (seconds) is
        used when this failure opens the circuit. Results of an earlier epoch are ignored.
        """
        if epoch != self.epoch:
            return False
        if self.state is CircuitState.CLOSED:
            if failed is None:
                return False
            if now >= self._bucket_ends:
                self._turn(now)
            self._calls += 1
            if not failed:
                self._unconnected = 0
                return False
            return self._failed(now, unreachable, retry_after)
        if self.state is CircuitState.OPEN:
            return False
        return self._probe_ended(now, failed, retry_after)

    def half_open(self, now: float) -> bool:
        """Let probes through if the pause is over; True when that has changed the state."""
        if self.state is not CircuitState.OPEN or now < self.until:
            return False
        self._change(CircuitState.HALF_OPEN, now)
        return True

    def opens_for(self, now: float) -> float:
        """Seconds until probes may start; 0.0 when it is not open, or its pause is over."""
        return max(0.0, self.until - now) if self.state is CircuitState.OPEN else 0.0

    def statistics(self, now: float) -> CircuitStatistics:
        """The circuit as it is at `now`. While it is not closed, calls and failures are those that opened it."""
        if self.state is CircuitState.CLOSED and now >= self._bucket_ends:
            self._turn(now)
        return CircuitStatistics(self.state, self._calls, self._failures, self.opens_for(now))

    def _failed(self, now: float, unreachable: bool, retry_after: float | None) -> bool:
        self._failures += 1
        self._unconnected = self._unconnected + 1 if unreachable else 0
        breaker = self._breaker
        enough = self._calls >= breaker.calls and self._failures / self._calls >= breaker.share
        if not enough and self._unconnected < breaker.connect_errors:
            return False
        calm = max(0.0, now - self._changed) / (CALM * self._last_pause)
        self._open(max(0, self._doublings - int(min(calm, _MOST_DOUBLINGS))), now, retry_after)
        return True

    def _probe_ended(self, now: float, failed: bool | None, retry_after: float | None) -> bool:
        self.probing = max(0, self.probing - 1)
        if failed is None:
            return False
        if failed:
            # Where some probes work, the next pause is as long as the last one: there is a service to be found.
            self._open(max(0, self._doublings - bool(self._successes)), now, retry_after)
            return True
        self._successes += 1
        if self._successes < self._breaker.probes:
            # The service is back: what became of probes that began before that tells of the time before.
            self.outrun, self.probing = self.probing, 0
            self.epoch += 1
            return False
        self._forget(now)
        self._change(CircuitState.CLOSED, now)
        return True

    def _open(self, doublings: int, now: float, retry_after: float | None) -> None:
        longest = self._breaker.longest
        pause = min(self._breaker.pause * 2.0**doublings, longest)
        # A pause that has reached `longest` still differs from process to process: it is cut from above only.
        length = self._rng.uniform((1.0 - JITTER) * pause, min((1.0 + JITTER) * pause, longest))
        if retry_after is not None and 0 <= retry_after <= LONGEST_HINT:
            length = max(length, retry_after)
        self._last_pause = pause
        # Doublings that change nothing would have to be forgotten all the same.
        self._doublings = min(doublings + (pause < longest), _MOST_DOUBLINGS)
        self.until = now + length
        self._change(CircuitState.OPEN, now)

    def _change(self, state: CircuitState, now: float) -> None:
        self.state = state
        self.epoch += 1
        self.probing = 0
        self._successes = 0
        self._changed = now

    def _forget(self, now: float) -> None:
        """An empty window that begins at `now`."""
        self._calls = self._failures = self._unconnected = 0
        self._older.clear()
        self._older_calls = self._older_failures = 0
        self._bucket_ends = now + self._width

    def _turn(self, now: float) -> None:
        """Close the running bucket, and drop those that the window has left behind."""
        late = now - self._bucket_ends
        if late >= (BUCKETS - 1) * self._width:
            unconnected = self._unconnected  # in a row, however long that took
            self._forget(now)
            self._unconnected = unconnected
            return
        passed = int(late / self._width) + 1
        self._older.append((self._calls - self._older_calls, self._failures - self._older_failures))
        self._older.extend([(0, 0)] * (passed - 1))
        self._calls = self._older_calls = sum(calls for calls, _ in self._older)
        self._failures = self._older_failures = sum(failures for _, failures in self._older)
        self._bucket_ends += passed * self._width
