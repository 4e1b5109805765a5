"""A quota of which a server says nothing is found by its refusals, and few of them are needed: rules and closed loops.

The closed loops run in a simulation of events that is as small as can be: one client that always wants more, and a
server that counts requests in a time, or requests in flight.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gate.adaptive import Adaptive
from penstock.gate.cubic import EPISODE, FIRST_TRIAL, FLOOR, LEFT_AFTER_A_CUT, LONGEST_TRIAL, QUIET, SHUT_AFTER, Cubic
from penstock.gate.rate import Meter

ROUND_TRIP = 0.05
LATEST = 0.001
"""Seconds that a timer may be late."""
BEST_FIXED_LIMIT = 1_000.0
"""A second: what gets through a cap of 36 here with a fixed limit of 56, at 6 % refused; all others are worse."""


class Server:
    """Refuses what is more than `amount` in `per` seconds, or than `cap` in flight."""

    def __init__(
        self, amount: float = math.inf, per: float = 1.0, *, size: float | None = None, cap: float = math.inf
    ) -> None:
        self.amount, self.per, self.size, self.cap = amount, per, size, cap
        self.left = amount if size is None else size
        self.at = -0.37 * per
        self.inside = 0

    def allows(self, now: float) -> bool:
        if self.size is not None:
            self.left = min(self.size, self.left + (now - self.at) * self.amount / self.per)
            self.at = now
        elif now >= self.at + self.per:
            self.at += (now - self.at) // self.per * self.per
            self.left = self.amount
        if self.left < 1 or self.inside >= self.cap:
            return False
        self.left -= 1
        self.inside += 1
        return True


class Simulation:
    """One client and one server. `limit`: round trips in flight; None is an adaptive limit."""

    def __init__(self, server: Server, limit: int | None = 128) -> None:
        self.server = server
        self.random = random.Random(3)
        self.meter = Meter()
        self.limiter = None if limit is not None else Adaptive().limiter(0.0, 1_000, self.random)
        self.fixed = limit or 0
        self.in_flight = 0
        self.wakes_at = -1.0
        self.allowed = self.refused = 0
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.at(0.0, self.send)

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what, args))

    def measure(self, begin: float, end: float) -> tuple[float, float]:
        """What is allowed in a second, and the share of what is refused."""
        while self.events[0][0] <= end:
            now, _, what, args = heapq.heappop(self.events)
            if now < begin:
                self.allowed = self.refused = 0
            what(now, *args)
        return self.allowed / (end - begin), self.refused / (self.allowed + self.refused)

    def send(self, now: float) -> None:
        meter = self.meter
        while self.in_flight < (self.fixed if self.limiter is None else self.limiter.limit):
            if meter.active:
                delay = meter.delay(None, now)
                if delay > 0:
                    if not now < self.wakes_at <= now + delay + LATEST:
                        self.wakes_at = now + delay + self.random.random() * LATEST
                        self.at(self.wakes_at, self.send)
                    return
                meter.take(None, now)
            self.in_flight += 1
            mark = 0 if self.limiter is None else self.limiter.started(now)
            self.at(now + ROUND_TRIP / 2 * (1 + 0.1 * self.random.random()), self.arrive, now, mark)

    def arrive(self, now: float, started: float, mark: int) -> None:
        allowed = self.server.allows(now)
        self.allowed += allowed
        self.refused += not allowed
        back = now + ROUND_TRIP / 2 * (1 + 0.1 * self.random.random())
        self.at(back, self.answer, started, mark, allowed)

    def answer(self, now: float, started: float, mark: int, allowed: bool) -> None:
        self.in_flight -= 1
        if allowed:
            self.server.inside -= 1
            self.meter.succeeded(now)
        else:
            self.meter.throttled(now, hinted=False, queueing=False)
        if self.limiter is not None:
            dropped = not allowed and not self.meter.searching
            self.limiter.ended(mark, now, now - started if allowed else None, dropped)
        self.send(now)


@pytest.mark.parametrize("limit", [128, None], ids=["128 in flight", "adaptive"])
@pytest.mark.parametrize(
    ("server", "begin", "end"),
    [
        (lambda: Server(200, size=200), 10, 40),
        (lambda: Server(200, size=20), 10, 40),
        (lambda: Server(200), 10, 40),
        (lambda: Server(50, 10, size=50), 60, 300),
        (lambda: Server(50, 10, size=10), 60, 300),
        (lambda: Server(50, 10), 60, 300),
        (lambda: Server(5_000, 3_600, size=100), 600, 1_800),
    ],
    ids=["200/s", "200/s in small pieces", "200/s in windows", "50/10s", "50/10s in small pieces", "50/10s in windows",
         "5000/h"],
)  # fmt: skip
def test_a_silent_quota_is_used_to_92_percent_with_3_percent_refused(
    server: Callable[[], Server], begin: float, end: float, limit: int | None
) -> None:
    """With a limit on what is in flight that knows nothing of it, and with one that finds itself."""
    quota = server()
    used, refused = Simulation(quota, limit).measure(begin, end)
    assert used >= 0.92 * quota.amount / quota.per
    assert refused <= 0.03


def test_a_window_of_a_minute_costs_more_refusals() -> None:
    """Nobody says when it ends, so that has to be tried: 10 of 60."""
    used, refused = Simulation(Server(60, 60)).measure(300, 1_200)
    assert used >= 0.9
    assert refused <= 0.15


def test_a_cap_on_what_is_in_flight_does_not_make_two_loops_fight() -> None:
    """It looks the same; one of them hears of the refusals, and next to none of them are needed."""
    used, refused = Simulation(Server(cap=36), None).measure(15, 60)
    assert used >= BEST_FIXED_LIMIT
    assert refused <= 0.01


# --- rules ---


def refused_at(rate: float, now: float = 10.0) -> Cubic:
    """After a refusal that enables it, a rest, two seconds at that rate, and a refusal that ends the start."""
    cubic = Cubic()
    cubic.throttled(0.0, queueing=False)
    for number in range(int(2 * rate)):
        cubic.succeeded(now + number / rate)
    cubic.throttled(now + 2.0, queueing=False)
    return cubic


def test_the_first_refusal_enables_it_unless_requests_queue() -> None:
    """A queue is too slow a server, and the limit on what is in flight deals with it."""
    cubic = Cubic()
    cubic.throttled(0.0, queueing=True)
    assert not cubic.enabled
    cubic.throttled(0.0, queueing=False)
    assert cubic.enabled


def test_at_first_the_rate_doubles_every_half_second() -> None:
    """What was measured in a burst may be wrong by any factor."""
    cubic = Cubic()
    cubic.throttled(0.0, queueing=False)
    assert [cubic.rate(step * EPISODE) for step in range(5)] == [0.5, 1, 2, 4, 8]
    assert cubic.rate(200.0) < math.inf


def test_a_cut_leaves_85_percent_of_what_got_through() -> None:
    """And then it comes back: quickly, slowly near the old rate, quickly again."""
    cubic = refused_at(200.0)
    before = cubic.rate(12.0)
    assert before == pytest.approx(LEFT_AFTER_A_CUT * 200, rel=0.02)
    rates = [cubic.rate(12.0 + step) for step in range(9)]
    assert rates == sorted(rates)
    middle = (200 * (1 - LEFT_AFTER_A_CUT) / 0.4) ** (1 / 3)
    assert cubic.rate(12.0 + middle) == pytest.approx(200, rel=0.02)
    first, slowest = rates[1] - rates[0], cubic.rate(12.5 + middle) - cubic.rate(11.5 + middle)
    assert first > 10 * slowest


def test_it_never_rises_above_twice_what_gets_through() -> None:
    """So it does not run away while there is nothing to send."""
    cubic = refused_at(200.0)
    assert cubic.rate(100.0) == pytest.approx(400, rel=0.02)


def test_refusals_of_one_episode_make_one_cut() -> None:
    """They were sent before the first one of them was answered."""
    cubic = refused_at(200.0)
    before = cubic.rate(12.1)
    for number in range(20):
        cubic.throttled(12.0 + number * 0.005, queueing=False)
    assert cubic.rate(12.1) == before


def test_the_pace_is_the_rate_and_makes_up_for_late_timers() -> None:
    """170 a second, and no more than a little at once."""
    cubic = refused_at(200.0)
    now = 12.0
    count = 0
    while (now := max(now, cubic.due(now)) + 0.001) < 12.5:
        cubic.take(now)
        count += 1
    assert count == pytest.approx(0.5 * 173 + 0.05 * 173, rel=0.03)


def test_refusals_running_shut_it_and_one_that_gets_through_opens_it() -> None:
    """Trials come ever more seldom; from one reopening to the next the quota has got through."""
    cubic = refused_at(50.0)
    now = 12.0
    for _ in range(2 * SHUT_AFTER):
        now += EPISODE / 2
        cubic.throttled(now, queueing=False)
    gaps = []
    for _ in range(9):
        due = cubic.due(now)
        gaps.append(due - now)
        now = max(now, due)
        cubic.take(now)
        assert cubic.due(now) > now
        cubic.throttled(now, queueing=False)
    assert gaps == sorted(gaps)
    assert gaps[-1] == LONGEST_TRIAL
    cubic.succeeded(now)
    assert cubic.due(now) <= now


def test_from_one_reopening_to_the_next_the_quota_gets_through() -> None:
    """30 in 10 s are 3 a second, however fast they went."""
    cubic = Cubic()
    for number in range(200):
        cubic.succeeded(-1.0 + number * 0.005)
    cubic.throttled(0.0, queueing=False)
    for window in range(2):
        begin = 10.0 * window
        for number in range(30):
            cubic.succeeded(begin + number * 0.1)
        for number in range(6):
            cubic.take(begin + 5.0 + number)
            cubic.throttled(begin + 5.0 + number, queueing=False)
    cubic.succeeded(20.0)
    assert cubic.rate(20.0) == pytest.approx(LEFT_AFTER_A_CUT * 3, rel=0.05)


def test_five_minutes_without_a_refusal_set_it_free() -> None:
    """The server has more to give than is asked for. The next search starts afresh."""
    cubic = refused_at(200.0)
    assert cubic.due(12.0 + QUIET - 0.1) <= 12.0 + QUIET
    assert cubic.enabled
    assert cubic.due(12.0 + QUIET) == -math.inf
    assert not cubic.enabled
    cubic.throttled(400.0, queueing=False)
    assert cubic.rate(400.5) == pytest.approx(2 * cubic.rate(400.0))


@given(st.lists(st.tuples(st.floats(0, 400), st.sampled_from(["take", "succeeded", "throttled"]), st.booleans())))
def test_whatever_happens_the_wait_is_short_and_the_rate_is_at_least_one_in_two_seconds(
    history: list[tuple[float, str, bool]],
) -> None:
    """It slows down and never stops."""
    cubic = Cubic()
    now = 0.0
    for pause, what, queueing in history:
        now += pause
        if what == "throttled":
            cubic.throttled(now, queueing)
        elif what == "succeeded":
            cubic.succeeded(now)
        elif cubic.enabled and cubic.due(now) <= now and cubic.enabled:
            cubic.take(now)
        if cubic.enabled:
            assert cubic.due(now) <= now + LONGEST_TRIAL
        if cubic.enabled:
            assert FLOOR <= cubic.rate(now) < math.inf


def test_while_it_is_shut_the_rate_is_that_of_its_trials() -> None:
    """And none while nothing is searched for."""
    assert Cubic().found(0.0) is None
    cubic = refused_at(200.0)
    last = 12.0
    for number in range(10):
        last = 13.0 + number
        cubic.take(last)
        cubic.throttled(last, queueing=False)
    found = cubic.found(last)
    assert found is not None
    assert 1 / LONGEST_TRIAL <= found <= 1 / FIRST_TRIAL
    assert cubic.found(last + QUIET) is None
