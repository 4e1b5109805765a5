"""A quota that a server tells of is used, nearly all of it, with next to no refusals: rules, and closed loops.

The closed loops run against simulated servers, in a simulation of events that is as small as can be: clients that
always want more, a path that jitters, a server that counts.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.gate.quota import PATIENCE, Quota
from penstock.gate.rate import Meter
from penstock.gate.server_hints import LONGEST_HINT, Policy, ServerHints

ROUND_TRIP = 0.05
IN_FLIGHT = 128
LATEST = 0.001
"""Seconds that a timer may be late."""


class Server(Protocol):
    """Counts requests."""

    amount: float
    per: float

    def take(self, now: float) -> tuple[bool, float, float]:
        """Whether one more is allowed, what is left, and the seconds until there is more."""
        ...


class Bucket:
    """A token bucket. It tells when it will be full, or (`nearest`) when there will be one token."""

    def __init__(self, amount: float, per: float, size: float | None = None, *, nearest: bool = False) -> None:
        self.amount, self.per = amount, per
        self.size = self.left = amount if size is None else size
        self.nearest = nearest
        self.at = 0.0

    def take(self, now: float) -> tuple[bool, float, float]:
        rate = self.amount / self.per
        self.left = min(self.size, self.left + (now - self.at) * rate)
        self.at = now
        allowed = self.left >= 1
        self.left -= allowed
        missing = 1 - self.left if self.nearest else self.size - self.left
        return allowed, math.floor(self.left), max(0.0, missing / rate)


class Window:
    """A fixed window. The first one has begun before the client comes."""

    def __init__(self, amount: float, per: float) -> None:
        self.amount, self.per = amount, per
        self.start = -0.37 * per
        self.used = 0

    def take(self, now: float) -> tuple[bool, float, float]:
        if now >= self.start + self.per:
            self.start += (now - self.start) // self.per * self.per
            self.used = 0
        allowed = self.used < self.amount
        self.used += allowed
        return allowed, self.amount - self.used, self.start + self.per - now


class Sliding:
    """A sliding window, which remembers each request."""

    def __init__(self, amount: float, per: float) -> None:
        self.amount, self.per = amount, per
        self.seen: deque[float] = deque()

    def take(self, now: float) -> tuple[bool, float, float]:
        while self.seen and self.seen[0] <= now - self.per:
            self.seen.popleft()
        allowed = len(self.seen) < self.amount
        if allowed:
            self.seen.append(now)
        return allowed, self.amount - len(self.seen), self.seen[0] + self.per - now


@dataclass
class Client:
    """Has a meter, and always something to send."""

    meter: Meter = field(default_factory=Meter)
    in_flight: int = 0
    wakes_at: float = -1.0
    allowed: int = 0
    refused: int = 0


class Simulation:
    """Some clients and one server."""

    def __init__(
        self, server: Server, *, written: Callable[[float], float], window: bool, clients: int = 1, marks: bool = True
    ) -> None:
        self.server = server
        self.written = written
        self.window = server.per if window else None
        self.marks = marks
        self.clients = [Client() for _ in range(clients)]
        self.random = random.Random(7)
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        for client in self.clients:
            self.at(self.random.random() * 0.01, self.wake, client)

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what, args))

    def run(self, until: float) -> None:
        while self.events[0][0] <= until:
            now, _, what, args = heapq.heappop(self.events)
            what(now, *args)

    def measure(self, begin: float, end: float) -> tuple[float, float]:
        """Shares: of the quota that is used, of the requests that are refused."""
        self.run(begin)
        for client in self.clients:
            client.allowed = client.refused = 0
        self.run(end)
        allowed = sum(client.allowed for client in self.clients)
        refused = sum(client.refused for client in self.clients)
        return allowed / (self.server.amount / self.server.per * (end - begin)), refused / (allowed + refused)

    def half_way(self) -> float:
        return ROUND_TRIP / 2 * (1 + 0.1 * self.random.random())

    def wake(self, now: float, client: Client) -> None:
        self.send(now, client)

    def send(self, now: float, client: Client) -> None:
        meter = client.meter
        while client.in_flight < IN_FLIGHT:
            delay = meter.delay(None, now) if meter.active else 0.0
            if delay > 0:
                if not now < client.wakes_at <= now + delay + LATEST:
                    client.wakes_at = now + delay + self.random.random() * LATEST
                    self.at(client.wakes_at, self.wake, client)
                return
            if meter.active:
                meter.take(None, now)
            client.in_flight += 1
            self.at(now + self.half_way(), self.arrive, client, meter.taken)

    def arrive(self, now: float, client: Client, mark: int) -> None:
        allowed, left, reset = self.server.take(now)
        client.allowed += allowed
        client.refused += not allowed
        policy = Policy("default", self.server.amount, left, self.written(reset), self.window, "requests")
        self.at(now + self.half_way(), self.answer, client, mark, allowed, ServerHints(None, (policy,)))

    def answer(self, now: float, client: Client, mark: int, allowed: bool, hints: ServerHints) -> None:
        client.in_flight -= 1
        client.meter.learn(hints, client.in_flight, now, mark if self.marks else None)
        if allowed:
            client.meter.succeeded(now)
        else:
            client.meter.throttled(now, hinted=True, queueing=False)
        self.send(now, client)


def up(seconds: float) -> float:
    return float(math.ceil(seconds))


def down(seconds: float) -> float:
    return float(math.floor(seconds))


def exactly(seconds: float) -> float:
    return seconds


SERVERS: dict[str, Callable[[], Server]] = {
    "bucket of 200 for 200 a second": lambda: Bucket(200, 1),
    "bucket of 20 for 200 a second": lambda: Bucket(200, 1, 20),
    "bucket of 20 for 200 a second, tells of the next token": lambda: Bucket(200, 1, 20, nearest=True),
    "window of 200 a second": lambda: Window(200, 1),
    "bucket of 50 for 50 in 10 s": lambda: Bucket(50, 10),
    "bucket of 10 for 50 in 10 s": lambda: Bucket(50, 10, 10),
    "window of 50 in 10 s": lambda: Window(50, 10),
    "window of 60 a minute": lambda: Window(60, 60),
    "bucket of 100 for 5000 an hour": lambda: Bucket(5_000, 3_600, 100),
}


@pytest.mark.parametrize("window", [True, False], ids=["window told", "not told"])
@pytest.mark.parametrize("written", [up, exactly])
@pytest.mark.parametrize("name", SERVERS)
def test_one_client_uses_97_percent_with_half_a_percent_refused(
    name: str, written: Callable[[float], float], window: bool
) -> None:
    """Whatever kind of quota it is, and however exactly its reset is told. From its second window on."""
    server = SERVERS[name]()
    begin = min(max(2 * server.per, 2.0), 600.0)
    used, refused = Simulation(server, written=written, window=window).measure(begin, begin + max(10.0, 3 * server.per))
    assert used >= 0.97
    assert refused <= 0.005


def test_a_quota_of_an_hour_is_used_to_its_end() -> None:
    """5,000 an hour: half of it at once, the rest evenly, and nothing is left when the window ends."""
    server = Window(5_000, 3_600)
    simulation = Simulation(server, written=up, window=False)
    simulation.run(0.63 * 3_600 - 1.0)
    assert server.used >= 4_995
    assert simulation.clients[0].refused == 0
    simulation.run(0.63 * 3_600 + 60.0)
    assert server.used > 2_400
    assert simulation.clients[0].refused == 0


@pytest.mark.parametrize(
    ("server", "used_at_least"), [(Sliding(200, 1), 0.9), (Sliding(50, 10), 0.93), (Sliding(60, 60), 0.93)]
)
def test_a_sliding_window_is_used_with_half_a_percent_refused(server: Server, used_at_least: float) -> None:
    """What comes back is known half a round trip later, and sent another half later: of a second that is 5 %."""
    used, refused = Simulation(server, written=up, window=True).measure(3 * server.per, 10 * server.per)
    assert used >= used_at_least
    assert refused <= 0.005


@pytest.mark.parametrize("server", [Window(200, 1), Window(50, 10)])
def test_servers_that_round_down_are_found_out(server: Server) -> None:
    """A reset in 0 s that is none yet: from then on one second more is waited."""
    used, refused = Simulation(server, written=down, window=False).measure(3 * server.per, 13 * server.per)
    assert used >= 0.95
    assert refused <= 0.01


@pytest.mark.parametrize("name", ["bucket of 20 for 200 a second", "window of 200 a second", "window of 60 a minute"])
def test_without_marks_answers_are_taken_to_come_in_order(name: str) -> None:
    """What is in flight is what the server has not seen: true as long as all take equally long."""
    server = SERVERS[name]()
    used, refused = Simulation(server, written=up, window=True, marks=False).measure(
        2 * server.per, 2 * server.per + max(10.0, 2 * server.per)
    )
    assert used >= 0.97
    assert refused <= 0.005


@pytest.mark.parametrize("server", [Bucket(200, 1), Window(200, 1), Window(50, 10), Window(60, 60)])
def test_clients_that_share_a_quota_find_that_out(server: Server) -> None:
    """Four of them, none of which knows of the others: 95 % is used, with 5 % refused where the window is long."""
    simulation = Simulation(server, written=exactly, window=False, clients=4)
    used, refused = simulation.measure(6 * server.per, 16 * server.per)
    assert used >= 0.95
    assert refused <= (0.01 if server.per == 1 else 0.05)
    counts = [client.allowed for client in simulation.clients]
    assert min(counts) > 0


# --- rules ---


def quota(remaining: float = 50, reset: float = 10.5, *, of: float | None = 50, window: float | None = None) -> Quota:
    quota = Quota("requests", 0.0)
    quota.learn(remaining, reset, of, window, 0, 0.0)
    return quota


def half_gone() -> Quota:
    half = quota()
    half.learn(24, 10.5, 50, None, 0, 0.0)
    return half


def taken_by(quota: Quota, until: float) -> list[float]:
    """When each one starts that starts as early as it may."""
    times = []
    now = 0.0
    while (now := max(now, quota.due(1.0, now))) < until:
        quota.take(1.0, now)
        times.append(now)
    return times


def test_while_more_than_half_is_left_nothing_waits() -> None:
    """A small job never does."""
    assert taken_by(quota(), 0.001) == [0.0] * 27


def test_the_other_half_is_spent_evenly_until_the_reset() -> None:
    """And not a single one beyond what is left."""
    times = taken_by(quota(), 10.49)
    assert 49 <= len(times) <= 50
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[26:])]
    assert max(gaps) <= 2 * min(gaps)


def test_a_late_start_is_made_up_for_until_the_reset() -> None:
    """What is left is spent in the time that is left."""
    late = half_gone()
    now = 0.0
    count = 0
    while (now := max(now, late.due(1.0, now)) + 0.1) < 10.5:
        late.take(1.0, now)
        count += 1
    assert count >= 23


def test_after_a_reset_one_may_go_then_two_then_four() -> None:
    """As long as nothing is heard; a full refill is never assumed."""
    times = taken_by(quota(0), 12.2)
    assert len(times) == 1 + 2 + 4 + 8
    assert times[0] == 10.5
    assert times[1] == times[2] == 10.5 + PATIENCE
    assert times[3] == times[6] == 10.5 + 2 * PATIENCE


def test_what_is_heavier_than_the_quota_goes_when_a_window_begins() -> None:
    """Waiting for so much to be left would be for ever."""
    heavy = quota(50)
    assert heavy.due(80.0, 1.0) == -math.inf
    heavy.take(80.0, 1.0)
    assert heavy.due(1.0, 1.0) == 10.5


def test_in_a_bucket_what_is_heavier_goes_when_it_is_full() -> None:
    """The same where there are no windows."""
    bucket = quota(4, 0.1, of=4, window=1.0)
    for step in range(1, 5):
        bucket.take(1.0, step * 0.05)
        bucket.learn(4, 0.1, 4, 1.0, 0, step * 0.05)
    bucket.take(4.0, 0.2)
    due = bucket.due(10.0, 0.2)
    assert 0.2 < due <= 1.3
    bucket.take(10.0, due)
    assert bucket.due(1.0, due) > due


def test_what_does_not_wait_until_it_is_due_counts_all_the_same() -> None:
    """Others wait the longer for it."""
    bucket = quota(4, 0.1, of=4, window=1.0)
    for step in range(1, 5):
        bucket.take(1.0, step * 0.05)
        bucket.learn(4, 0.1, 4, 1.0, 0, step * 0.05)
    bucket.take(4.0, 0.2)
    before = bucket.due(1.0, 0.2)
    bucket.take(1.0, 0.2)
    assert bucket.due(1.0, 0.2) > before > 0.2


def test_a_server_that_does_not_say_its_quota_has_what_was_seen_of_it() -> None:
    """At first what is left is all there is; half of it goes at once."""
    unknown = quota(40, of=None)
    assert taken_by(unknown, 0.001) == [0.0] * 22
    unknown.learn(80, 9.5, None, None, 0, 1.0)
    assert unknown.due(1.0, 1.0) == -math.inf


def test_refusals_make_it_slower_once_for_each_episode() -> None:
    """And measurements without one make up for it in time."""
    careful = half_gone()
    for _ in range(10):
        careful.refused(1.0)
    careful.take(1.0, 1.0)
    slow = careful.due(1.0, 1.0) - 1.0
    usual = half_gone()
    usual.take(1.0, 1.0)
    assert slow == pytest.approx((usual.due(1.0, 1.0) - 1.0) / 0.7)


def test_a_refilling_server_from_which_nothing_comes_is_not_asked_all_the_time() -> None:
    """A minute at most from one to the next, and no more often than it says after a refusal."""
    bucket = quota(2, 0.5, of=1, window=3_600.0)
    for step in range(1, 9):
        bucket.take(1.0, step * 0.1)
        bucket.learn(2, 0.5, 1, 3_600.0, 0, step * 0.1)
    bucket.learn(0, 0.5, 1, 3_600.0, 0, 1.0)
    assert 1.0 < bucket.due(1.0, 1.0) <= 61.0
    bucket.refused(1.0)
    assert bucket.due(1.0, 1.0) <= 1.0 + 0.5 + PATIENCE


answers = st.tuples(
    st.floats(0, 1e6),
    st.one_of(st.integers(0, 3_600).map(float), st.floats(0, LONGEST_HINT)),
    st.none() | st.floats(0, 1e6),
    st.none() | st.floats(0, 1e6),
    st.integers(0, 200),
)
steps = st.one_of(answers, st.floats(0, 1e4), st.sampled_from(["refused", "asked"]))


@given(answers, st.lists(st.tuples(st.floats(0, 100), steps), max_size=40))
@example((0.0, 3.0, None, None, 0), [(0.0, 5e-324)] * 3)
def test_no_answers_make_anybody_wait_for_more_than_an_hour_or_for_no_number(
    first: tuple[float, float, float | None, float | None, int],
    history: list[tuple[float, tuple[float, float, float | None, float | None, int] | float | str]],
) -> None:
    """Whatever a server says in whatever order, and whatever is taken. A second more is for clocks that round down."""
    quota = Quota("requests", 0.0)
    quota.learn(*first, 0.0)
    now = 0.0
    for pause, step in history:
        now += pause
        if isinstance(step, tuple):
            quota.learn(*step, now)
        elif isinstance(step, float):
            if step > 0:
                quota.take(step, now)
        elif step == "refused":
            quota.refused(now)
        due = quota.due(1.0, now)
        assert due <= now + LONGEST_HINT + 1.0
        assert not math.isnan(due)


def refilling() -> Quota:
    bucket = quota(4, 0.1, of=4, window=1.0)
    for step in range(1, 5):
        bucket.take(1.0, step * 0.05)
        bucket.learn(4, 0.1, 4, 1.0, 0, step * 0.05)
    return bucket


def test_a_refilling_quota_is_at_rest_when_half_of_it_is_there_again() -> None:
    """Or when nothing was heard of it for so long that nothing is known."""
    bucket = refilling()
    bucket.take(4.0, 0.2)
    assert not bucket.at_rest(0.25)
    assert bucket.at_rest(3.0)
    empty = quota(2, 0.5, of=1, window=40.0)
    for step in range(1, 9):
        empty.take(1.0, step * 0.1)
        empty.learn(2, 0.5, 1, 40.0, 0, step * 0.1)
    empty.learn(0, 0.5, 1, 40.0, 0, 1.0)
    empty.take(1_000.0, 1.0)
    assert not empty.at_rest(80.0)
    assert empty.at_rest(81.0)


def test_the_time_until_a_reset_is_never_negative() -> None:
    """It is over then."""
    assert quota(reset=10.5).reset_in(4.0) == 6.5
    assert quota(reset=10.5).reset_in(40.0) == 0
