"""How many blocking calls run at once: enough soon after calls get slow, few again soon after, within fixed rules.

The simulation: 100 calls a second, each of which holds its thread for 20 ms, from second 20 for 1 s, from second 40 for
20 ms again, until second 65. Seconds that a call waited for a thread (p99, by when it asked), with pools of a fixed
size for comparison; the first two rows are what the tests run:

|                             | 20 to 30 | 30 to 40 | 40 to 65 | most threads | above 10 threads until |
|-----------------------------|----------|----------|----------|--------------|------------------------|
| regular arrivals            |     0.18 |     0.00 |     0.00 |          116 |               55       |
| Poisson, worst of 10 seeds  |     0.22 |     0.02 |     0.00 |          130 |               56       |
| Poisson, worst of 60 seeds  |     0.27 |     0.03 |     0.00 |          146 |               56       |
| 32 threads, regular         |    13.55 |    10.28 |     0.76 |           32 |            never fewer |
| 64 threads, regular         |     5.40 |     7.15 |     0.28 |           64 |            never fewer |
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.threads import staffing
from penstock.threads.staffing import (
    GROWTH,
    LONGEST_LAG,
    LONGEST_WAIT,
    MEMORY,
    SHORTEST_TICK,
    STALL,
    STALL_PAUSE,
    STALL_STEP,
    TICK,
    Observation,
    Staffing,
)

RATE = 100
FAST, SLOW = 0.02, 1.0
SLOW_FROM, SLOW_UNTIL, END = 20.0, 40.0, 65.0
NEED = 5
"""ceil(RATE * FAST + 2 * sqrt(RATE * FAST)): what the fast calls need by square-root staffing."""

MOST = 512
SEEDS = range(10)

QUIET = Observation(
    now=0.0, arrivals=0, started=0, ended=0, held=0.0, busy=0, waiting=0, oldest_wait=0.0, cpu=0.0, lag=0.0
)
LATE = 2 * LONGEST_WAIT


# --- a simulated pool ---


class FixedPool:
    """What is compared: a pool of one size."""

    def __init__(self, places: int) -> None:
        self.places = places

    def tick(self, _seen: Observation) -> int:
        return self.places


@dataclass(frozen=True, slots=True)
class Look:
    """The pool at one tick."""

    at: float
    places: int
    busy: int
    waiting: int


class Simulation:
    """Calls that arrive, wait for a place in one queue, and hold it: events on a heap, in virtual seconds."""

    def __init__(
        self,
        pool: Staffing | FixedPool,
        arrivals: Iterable[float],
        hold: Callable[[float], float],
        *,
        until: float,
        ticks: Iterator[float] | None = None,
    ) -> None:
        """`hold`: for how long a call that starts at some time holds its place. `ticks`: the pauses between ticks."""
        self.waits: list[tuple[float, float]] = []
        """When each call asked, and how long it waited; the time so far for those that wait at the end."""
        self.looks: list[Look] = []
        self._pool = pool
        self._hold = hold
        self._ticks = itertools.repeat(TICK) if ticks is None else ticks
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._queue: deque[float] = deque()
        self._busy = 0
        self._arrivals = self._started = self._ended = 0
        self._held = 0.0
        for at in arrivals:
            self._at(at, self._arrive)
        self._at(0.0, self._tick)
        self._run(until)

    def p99(self, start: float, end: float) -> float:
        """Of the waits of calls that asked in this time, in seconds."""
        waits = sorted(wait for asked, wait in self.waits if start <= asked < end)
        return waits[math.ceil(0.99 * len(waits)) - 1]

    def last_above(self, number: int) -> float:
        """When there were last more places or busy ones than `number`."""
        return max(look.at for look in self.looks if max(look.places, look.busy) > number)

    def changes(self, start: float) -> int:
        """How often the number of places changed from then on."""
        places = [look.places for look in self.looks if look.at >= start]
        return sum(before != after for before, after in itertools.pairwise(places))

    def _run(self, until: float) -> None:
        while self._events[0][0] <= until:
            at, _, happen = heapq.heappop(self._events)
            happen(at)
            while self._queue and self._busy < self._pool.places:
                self._start(at)
        self.waits += [(asked, until - asked) for asked in self._queue]

    def _at(self, at: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), happen))

    def _arrive(self, at: float) -> None:
        self._arrivals += 1
        self._queue.append(at)

    def _start(self, at: float) -> None:
        asked = self._queue.popleft()
        self.waits.append((asked, at - asked))
        self._started += 1
        self._busy += 1
        hold = self._hold(at)
        self._at(at + hold, lambda _: self._end(hold))

    def _end(self, hold: float) -> None:
        self._busy -= 1
        self._ended += 1
        self._held += hold

    def _tick(self, at: float) -> None:
        waiting = len(self._queue)
        self._pool.tick(
            Observation(
                now=at,
                arrivals=self._arrivals,
                started=self._started,
                ended=self._ended,
                held=self._held,
                busy=self._busy,
                waiting=waiting,
                oldest_wait=at - self._queue[0] if waiting else 0.0,
                cpu=0.0,
                lag=0.0,
            )
        )
        self._arrivals = self._started = self._ended = 0
        self._held = 0.0
        self.looks.append(Look(at, self._pool.places, self._busy, waiting))
        self._at(at + next(self._ticks), self._tick)


def regular(until: float) -> list[float]:
    return [number / RATE for number in range(int(RATE * until))]


def poisson(seed: int, until: float) -> list[float]:
    rng = random.Random(seed)
    at, arrivals = rng.expovariate(RATE), []
    while at < until:
        arrivals.append(at)
        at += rng.expovariate(RATE)
    return arrivals


def slow_for_a_while(at: float) -> float:
    return SLOW if SLOW_FROM <= at < SLOW_UNTIL else FAST


def shifted(pool: Staffing | FixedPool, seed: int | None = None, *, ticks: Iterator[float] | None = None) -> Simulation:
    """The simulation of the module's notes; no seed: regular arrivals."""
    arrivals = regular(END) if seed is None else poisson(seed, END)
    return Simulation(pool, arrivals, slow_for_a_while, until=END, ticks=ticks)


# --- what it is for: calls that become slow, and fast again ---


@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("seed", [None, *SEEDS])
def test_calls_that_become_slow_wait_little_and_their_threads_are_gone_soon_after(seed: int | None, least: int) -> None:
    simulated = shifted(Staffing(least=least, most=MOST), seed)
    assert simulated.p99(SLOW_FROM, SLOW_FROM + 10) <= 0.3
    assert simulated.p99(SLOW_FROM + 10, SLOW_UNTIL) <= 0.05
    assert simulated.p99(SLOW_UNTIL, END) <= 0.05
    assert simulated.last_above(2 * NEED) <= SLOW_UNTIL + 20
    assert max(look.places for look in simulated.looks) <= 2 * RATE * SLOW


@pytest.mark.parametrize("seed", [None, *SEEDS])
def test_the_first_calls_wait_little_without_any_history(seed: int | None) -> None:
    simulated = shifted(Staffing(least=1, most=MOST), seed)
    assert simulated.p99(0, 2) <= 0.1
    assert simulated.p99(2, SLOW_FROM) <= 0.05


def test_calls_that_are_slow_from_the_first_are_staffed_as_fast() -> None:
    """No call ends in the first second, so nothing is known of hold times."""
    simulated = Simulation(Staffing(least=1, most=MOST), regular(20.0), lambda _: SLOW, until=20.0)
    assert simulated.p99(0, 10) <= 0.5
    assert simulated.p99(10, 20) <= 0.05


@pytest.mark.parametrize(("places", "first_ten_seconds"), [(32, 10), (64, 5)])
def test_a_pool_of_a_usual_fixed_size_makes_them_wait_for_seconds(places: int, first_ten_seconds: float) -> None:
    """What the bars are worth: cpu_count * 4 and * 8 on 8 cores."""
    assert shifted(FixedPool(places)).p99(SLOW_FROM, SLOW_FROM + 10) > first_ten_seconds


def test_without_the_rule_of_the_queue_calls_wait_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can fail: the stall rule alone adds a place now and then."""
    monkeypatch.setattr(staffing, "LONGEST_WAIT", math.inf)
    assert shifted(Staffing(least=4, most=MOST)).p99(SLOW_FROM, SLOW_FROM + 10) > 1


@pytest.mark.parametrize("seed", [0, 1])
def test_a_clock_that_ticks_late_makes_all_of_it_later_and_no_more(seed: int) -> None:
    """Up to 200 ms apart: growth and shrinking are slower, by as much, and go where they went."""
    rng = random.Random(seed)
    late = (rng.uniform(1, 4) * TICK for _ in itertools.count())
    simulated = shifted(Staffing(least=1, most=MOST), seed, ticks=late)
    assert simulated.p99(SLOW_FROM, SLOW_FROM + 10) <= 1.0
    assert simulated.p99(SLOW_FROM + 10, END) <= 0.05
    assert max(look.places for look in simulated.looks) <= 2.5 * RATE * SLOW
    assert simulated.looks[-1].places <= 4 * NEED, "one less a tick, since about second 51"


@pytest.mark.parametrize("every", [TICK, 3 * TICK, 10 * TICK])
def test_the_places_that_stay_do_not_depend_on_the_time_between_ticks(every: float) -> None:
    """100 calls a second that hold for 90 ms are 9 busy on the mean: 9 + 2 * 3, and one for what is rounded up."""
    pool = Staffing(least=1, most=MOST)
    grown(pool, 40)
    calls = RATE * every
    now = 1000.0
    for _ in range(400):
        now += every
        pool.tick(replace(QUIET, now=now, arrivals=round(calls), ended=round(calls), held=0.09 * round(calls), busy=9))
    assert pool.places in (15, 16)


def test_the_means_fade_with_time_and_not_with_ticks() -> None:
    """A second in one tick weighs as much as in twenty."""
    often, late = Staffing(least=1, most=MOST), Staffing(least=1, most=MOST)
    for pool in (often, late):
        pool.tick(replace(QUIET, now=0.0, arrivals=50, ended=10, held=1.0))
    for tick in range(1, 21):
        often.tick(replace(QUIET, now=tick * TICK, arrivals=4, ended=2, held=1.0))
    late.tick(replace(QUIET, now=20 * TICK, arrivals=80, ended=40, held=20.0))
    assert late._rate == pytest.approx(often._rate) == pytest.approx(80 + (100 - 80) * 0.9**20)
    assert late._hold == pytest.approx(often._hold) == pytest.approx(0.5 - (0.5 - 0.1) * 0.8**20)


# --- memory of what was needed ---


def bursts(until: float) -> Iterator[float]:
    """Thirty calls at once, every other second."""
    for second in range(0, int(until), 2):
        yield from [float(second)] * 30


def test_places_do_not_come_and_go_with_bursts() -> None:
    simulated = Simulation(Staffing(least=1, most=MOST), bursts(60.0), lambda _: 0.3, until=60.0)
    assert simulated.changes(10.0) == 0
    assert simulated.p99(10, 60) == 0


def test_without_its_memory_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ten seconds are for: between two bursts half the places go, and the next burst waits."""
    monkeypatch.setattr(staffing, "MEMORY", 0.0)
    simulated = Simulation(Staffing(least=1, most=MOST), bursts(60.0), lambda _: 0.3, until=60.0)
    assert simulated.changes(10.0) > 100
    assert simulated.p99(10, 60) > 0.1


def test_memory_is_bounded_however_often_it_ticks() -> None:
    """A need that falls with every tick is the worst case: each is the most there was since."""
    pool = Staffing(least=1, most=10**6)
    for tick in range(10_000):
        pool.tick(replace(QUIET, now=tick * SHORTEST_TICK * 1.01, busy=10**6 - tick))
    assert len(pool._needs) <= MEMORY / SHORTEST_TICK + 1


# --- single steps ---


def grown(pool: Staffing, places: int) -> None:
    """Tick from second 0 until it has so many."""
    for tick in itertools.count():
        if pool.places >= places:
            return
        pool.tick(replace(QUIET, now=tick * TICK, arrivals=1, started=1, busy=pool.places, waiting=1, oldest_wait=LATE))


@pytest.mark.parametrize(
    ("places", "waiting", "then"),
    [(1, 100, 2), (4, 100, 5), (5, 100, 7), (40, 100, 50), (40, 3, 43), (60, 100, 64), (64, 100, 64)],
)
def test_a_call_that_waits_adds_a_quarter_of_the_places_and_no_more_than_calls_wait(
    places: int, waiting: int, then: int
) -> None:
    """Rounded up, and never past the most."""
    pool = Staffing(least=places, most=64)
    assert pool.tick(replace(QUIET, busy=places, waiting=waiting, oldest_wait=LATE)) == then == pool.places


def test_a_call_that_has_waited_a_moment_adds_none() -> None:
    pool = Staffing(least=4, most=64)
    assert pool.tick(replace(QUIET, busy=4, waiting=100, oldest_wait=LONGEST_WAIT)) == 4


def test_observations_that_come_too_soon_count_with_the_next_one() -> None:
    """Nothing is lost, and places do not grow by the number of ticks."""
    at_once, in_parts = Staffing(least=4, most=64), Staffing(least=4, most=64)
    first = replace(QUIET, now=1.0, busy=4, waiting=9, oldest_wait=LATE, arrivals=13, started=4)
    assert at_once.tick(first) == in_parts.tick(first) == 5
    for number in (1, 2):
        soon = replace(first, now=1.0 + number * SHORTEST_TICK / 3, arrivals=5, started=1, ended=1, held=0.1)
        assert in_parts.tick(soon) == 5
    rest = replace(first, now=1.05, arrivals=5, started=1, ended=1, held=0.1)
    whole = replace(rest, arrivals=15, started=3, ended=3, held=0.1 + 0.1 + 0.1)
    assert in_parts.tick(rest) == at_once.tick(whole) == 7
    assert state(in_parts) == state(at_once)


def state(pool: Staffing) -> dict[str, Any]:
    return vars(pool)


def test_the_clock_of_another_loop_is_a_new_beginning() -> None:
    """Seconds of a clock that is far behind are not waited for."""
    pool = Staffing(least=1, most=64)
    pool.tick(replace(QUIET, now=1e6, busy=50))
    grown(pool, 40)
    for tick in range(1000, 2000):
        pool.tick(replace(QUIET, now=tick * TICK))
    assert pool.places == 1


@pytest.mark.parametrize("held", [math.nan, math.inf, -1.0])
def test_a_sum_that_is_no_duration_is_left_out(held: float) -> None:
    """It would stay in the mean for ever."""
    pool, twin = Staffing(least=1, most=64), Staffing(least=1, most=64)
    for tick in range(100):
        seen = replace(QUIET, now=tick * TICK, arrivals=50, ended=50, held=0.5)
        pool.tick(replace(seen, held=held) if tick == 50 else seen)
        twin.tick(replace(seen, ended=0) if tick == 50 else seen)
    assert pool._estimate() == twin._estimate() == 10 + math.ceil(2 * math.sqrt(10))


def test_an_estimate_that_is_no_finite_number_is_the_most() -> None:
    pool = Staffing(least=1, most=64)
    for tick in range(10):
        pool.tick(replace(QUIET, now=tick * TICK, arrivals=10_000, ended=1, held=1e308))
    assert pool._estimate() == 64


@pytest.mark.parametrize(("least", "most"), [(0, 4), (5, 4), (-1, -1)])
def test_bounds_that_leave_no_place_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"least={least}, most={most}"):
        Staffing(least=least, most=most)


# --- calls that never end ---


def test_calls_that_never_end_get_places_until_there_are_as_many_as_may_be() -> None:
    """Nothing can be learnt of their hold time; who asks when all places are taken waits for ever."""
    pool = Staffing(least=1, most=64)
    simulated = Simulation(pool, regular(10.0), lambda _: math.inf, until=10.0)
    assert simulated.looks[-1].places == simulated.looks[-1].busy == 64
    assert next(look.at for look in simulated.looks if look.places == 64) < 2
    assert not pool.settled


def test_places_of_calls_that_hang_stay_as_long_as_they_do() -> None:
    """And no clock has to tick for them."""
    pool = Staffing(least=1, most=64)
    grown(pool, 40)
    for tick in range(1000, 3000):
        pool.tick(replace(QUIET, now=tick * TICK, busy=7))
    assert (pool.places, pool.settled) == (7, True)
    pool.tick(replace(QUIET, now=3000 * TICK, ended=6, held=700.0, busy=1))
    assert not pool.settled


# --- the guard and the stall ---

STUCK = replace(QUIET, busy=4, waiting=9, oldest_wait=5.0)

GUARDS = [{"cpu": 0.95}, {"lag": 1.5 * LONGEST_LAG}]


@pytest.mark.parametrize("guard", GUARDS)
def test_while_threads_compute_no_place_is_added_for_calls_that_wait(guard: dict[str, Any]) -> None:
    """As long as calls end: then a place comes free by itself."""
    pool = Staffing(least=4, most=64)
    for tick in range(200):
        assert pool.tick(replace(STUCK, now=tick * TICK, started=1, ended=1, held=1.0, **guard)) == 4
    assert pool.tick(replace(STUCK, now=200 * TICK, started=1, ended=1, held=1.0)) == 5


@pytest.mark.parametrize("guard", GUARDS)
def test_a_stall_adds_places_at_growing_pauses_whatever_the_guard_says(guard: dict[str, Any]) -> None:
    """After 100 ms without a start; then 25, 50, 75 .. 250 ms apart, as exactly as the ticks allow.

    That the place of a stall lets a call start is not taken for movement.
    """
    pool = Staffing(least=4, most=64)
    every = 1 / 32
    added: list[float] = []
    places = 4
    for tick in range(160):
        now = 10.0 + tick * every
        started = int(bool(added) and added[-1] == now - every)
        before, places = places, pool.tick(replace(STUCK, now=now, started=started, busy=places, **guard))
        assert places - before in (0, 1)
        if places > before:
            added.append(now)
    assert STALL <= added[0] - 10.0 < STALL + every
    pauses = [after - before for before, after in itertools.pairwise(added)]
    assert len(pauses) >= 15
    for number, pause in enumerate(pauses, start=1):
        due = min(number * STALL_STEP, STALL_PAUSE)
        assert due <= pause < due + every


@pytest.mark.parametrize("movement", [{"ended": 1, "started": 1}, {"waiting": 0, "oldest_wait": 0.0}])
def test_a_stall_is_over_when_a_call_ends_or_none_waits(movement: dict[str, Any]) -> None:
    """The next one has to last 100 ms again."""
    pool = Staffing(least=4, most=64)

    def tick(number: int, **others: Any) -> int:
        return pool.tick(replace(STUCK, now=number * TICK, busy=pool.places, lag=1.0, **others))

    assert [tick(number) for number in range(4)] == [4, 4, 5, 6]
    assert tick(4, **movement) == 6
    assert [tick(number) for number in range(5, 9)] == [6, 7, 8, 9]


def test_starts_put_a_stall_off() -> None:
    pool = Staffing(least=4, most=64)
    for tick in range(100):
        pool.tick(replace(STUCK, now=tick * TICK, started=tick % 2, lag=1.0))
    assert pool.places == 4


def test_a_call_that_asks_after_a_pause_is_no_stall() -> None:
    """No call has started for a minute, since none asked."""
    pool = Staffing(least=4, most=64)
    pool.tick(replace(QUIET, now=0.0, busy=4))
    assert pool.tick(replace(STUCK, now=60.0, arrivals=1, waiting=1, oldest_wait=0.05, lag=1.0)) == 4


# --- rules that hold for all that can be seen ---

gaps = st.sampled_from([0.0, 0.01, TICK, TICK, TICK, 3 * TICK, 1.0, 100.0, -5.0]) | st.floats(0, 1)
counts = st.integers(0, 20) | st.integers(0, 10_000)


@st.composite
def histories(
    draw: st.DrawFn, cpu: st.SearchStrategy[float] | None = None, lag: st.SearchStrategy[float] | None = None
) -> list[Observation]:
    """What may be seen, of any pool: also numbers that do not fit together."""
    now = draw(st.floats(0, 1e6))
    history = []
    for gap in draw(st.lists(gaps, max_size=60)):
        now += gap
        waiting = draw(counts)
        history.append(
            Observation(
                now=now,
                arrivals=draw(counts),
                started=draw(counts),
                ended=draw(counts),
                held=draw(st.floats(0, 1e6)),
                busy=draw(st.integers(0, 100)),
                waiting=waiting,
                oldest_wait=draw(st.floats(0, 100)) if waiting else 0.0,
                cpu=draw(st.floats(0, 1.5) if cpu is None else cpu),
                lag=draw(st.floats(0, 2 * LONGEST_LAG) if lag is None else lag),
            )
        )
    return history


bounds = st.integers(1, 64).flatmap(lambda least: st.tuples(st.just(least), st.integers(least, 64)))


@given(bounds, histories())
def test_places_stay_within_their_bounds_and_steps(bounds: tuple[int, int], history: list[Observation]) -> None:
    """At most one fewer, at most a quarter more, and never more than calls wait."""
    least, most = bounds
    pool = Staffing(least=least, most=most)
    before = pool.places
    for seen in history:
        places = pool.tick(seen)
        assert isinstance(places, int)
        assert least <= places <= most
        assert before - 1 <= places <= before + min(math.ceil(GROWTH * before), seen.waiting)
        assert pool.settled == (not seen.waiting and places <= max(least, seen.busy))
        assert 0 <= pool._rate < math.inf
        assert 0 <= (pool._hold or 0.0) < math.inf
        before = places


@given(bounds, histories())
def test_the_same_observations_give_the_same_places(bounds: tuple[int, int], history: list[Observation]) -> None:
    least, most = bounds
    one, other = Staffing(least=least, most=most), Staffing(least=least, most=most)
    assert [one.tick(seen) for seen in history] == [other.tick(seen) for seen in history]
    assert state(one) == state(other)


@given(bounds, histories(cpu=st.floats(0.91, 2)) | histories(lag=st.floats(1.01 * LONGEST_LAG, 10)))
def test_while_the_guard_holds_only_a_stall_adds_a_place(bounds: tuple[int, int], history: list[Observation]) -> None:
    least, most = bounds
    pool = Staffing(least=least, most=most)
    before = pool.places
    for seen in history:
        places = pool.tick(seen)
        stalled = seen.waiting > 0 and not seen.ended and seen.oldest_wait >= STALL
        assert places <= before + stalled
        before = places


@given(bounds, histories())
def test_after_silence_the_least_is_left_and_more_silence_changes_nothing(
    bounds: tuple[int, int], history: list[Observation]
) -> None:
    """Within the memory, a tick for each place, and the time that the means take to fade."""
    least, most = bounds
    pool = Staffing(least=least, most=most)
    for seen in history:
        pool.tick(seen)
    now = history[-1].now if history else 0.0
    fading = 20.0
    for _ in range(int((MEMORY + most * TICK + fading) / TICK)):
        now += TICK
        pool.tick(replace(QUIET, now=now))
    assert (pool.places, pool.settled) == (least, True)
    for _ in range(100):
        now += TICK
        assert pool.tick(replace(QUIET, now=now)) == least
        assert pool.settled


@given(bounds, histories(), st.integers(0, 100))
def test_once_settled_more_ticks_without_an_arrival_or_an_end_change_nothing(
    bounds: tuple[int, int], history: list[Observation], busy: int
) -> None:
    """However many calls are busy: so the clock may pause."""
    least, most = bounds
    pool = Staffing(least=least, most=most)
    now = 0.0
    for seen in history:
        pool.tick(seen)
        now = seen.now
    settled_at = None
    for _ in range(600):
        now += TICK
        places = pool.tick(replace(QUIET, now=now, busy=busy))
        if settled_at is None and pool.settled:
            settled_at = places
        if settled_at is not None:
            assert (places, pool.settled) == (settled_at, True)
    assert settled_at is not None
