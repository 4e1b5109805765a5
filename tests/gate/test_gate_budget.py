"""The retry budget as a gate uses it: what becomes of a retry that it denies."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from penstock import AttemptTimeout, Gate, HttpStatusError, Retry, UsageError
from penstock.gate.breaker import Breaker
from penstock.gate.service import KeyStatistics
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step

pytestmark = pytest.mark.virtual_clock

AT_ONCE = Retry(attempts=3, wait=0, timeout=None)
INITIAL = 10
"""Retries that may be made at first."""


def now() -> float:
    return asyncio.get_running_loop().time()


class Trip:
    """An async function that fails so many times, and notes when it was called."""

    def __init__(self, failures: int = 1, takes: float = 0.0, error: Callable[[], Exception] = ConnectionError) -> None:
        self.failures = failures
        self.takes = takes
        self.error = error
        self.at: list[float] = []

    async def __call__(self) -> str:
        self.at.append(now())
        await asyncio.sleep(self.takes)
        if len(self.at) <= self.failures:
            raise self.error()
        return "done"


async def start(call: Callable[[], Any], times: int = 1) -> "list[asyncio.Task[Any]]":
    """Tasks that have come as far as they come at once."""
    tasks = [asyncio.create_task(call()) for _ in range(times)]
    await settled()
    return tasks


async def settled() -> None:
    """All that is ready has run."""
    for _ in range(10):
        await asyncio.sleep(0)


def seen(gate: Gate) -> KeyStatistics:
    return gate.statistics()[None]


def new_gate(retry: Retry = AT_ONCE, limit: int = 100, breaker: Breaker | None = None, **options: Any) -> Gate:
    return Gate("maps", limit=limit, retry=retry, breaker=breaker, **options)


async def spent(gate: Gate) -> None:
    """Use up the budget, and let it get no richer by that."""
    for _ in range(INITIAL):
        gate.service(None).may_repeat(1.0)
    assert not gate.service(None).may_repeat(1.0)


# --- what it denies waits ---


async def test_a_retry_that_the_budget_denies_waits_until_it_affords_it() -> None:
    """It is not given up. While nothing else happens, there is room for one a second."""
    gate, trips = new_gate(), [Trip() for _ in range(4)]
    await spent(gate)
    started = now()
    tasks = [(await start(lambda trip=trip: gate.call(trip)))[0] for trip in trips]  # type: ignore[misc]
    assert (seen(gate).deferred, seen(gate).in_flight, seen(gate).waiting) == (4, 0, 0)
    assert seen(gate).budget == pytest.approx(0.4)
    assert await asyncio.gather(*tasks) == ["done"] * 4
    assert all(0.5 <= trip.at[1] - started <= 4 for trip in trips)
    assert [trip.at[1] for trip in trips] == sorted(trip.at[1] for trip in trips)
    assert seen(gate).deferred == 0


async def test_retries_that_the_budget_affords_go_before_fresh_work_and_denied_ones_behind_it() -> None:
    gate, order = new_gate(limit=1), []

    async def trip(name: str, failures: list[bool]) -> None:
        order.append(name)
        await asyncio.sleep(1)
        if failures:
            failures.pop()
            raise ConnectionError

    fail = [True]
    tasks = await start(lambda: gate.call(trip, "rich", fail))
    tasks += await start(lambda: gate.call(trip, "fresh", []), 3)
    await asyncio.gather(*tasks)
    assert order == ["rich", "fresh", "rich", "fresh", "fresh"]  # one was admitted before the retry was due
    order.clear()
    fail.append(True)
    tasks = await start(lambda: gate.call(trip, "poor", fail))
    await spent(gate)
    tasks += await start(lambda: gate.call(trip, "fresh", []), 4)
    await asyncio.gather(*tasks)
    assert order == ["poor", "fresh", "fresh", "fresh", "fresh", "poor"]


async def test_successes_make_room_for_those_who_wait() -> None:
    """Two of them bring most of one retry; nobody has to wait for the second."""
    gate, trip = new_gate(), Trip()
    await spent(gate)
    (waiting,) = await start(lambda: gate.call(trip))
    assert seen(gate).deferred == 1
    started = now()
    for _ in range(3):
        await gate.call(Trip(0))
    assert await waiting == "done"
    assert now() == started


async def test_first_attempts_make_room_for_those_who_wait() -> None:
    """Also those that do not end."""
    gate, trip = new_gate(timeout=None), Trip()
    await spent(gate)
    (waiting,) = await start(lambda: gate.call(trip))
    started = now()
    others = await start(lambda: gate.call(asyncio.sleep, 1000), 12)
    await settled()
    assert await waiting == "done"
    assert now() == started
    await asyncio.gather(*others)


async def test_nobody_is_overtaken_among_those_who_wait() -> None:
    """Not even by one whose retry would be cheaper, or who comes in the moment in which there is room."""
    gate, order = new_gate(limit=8, timeout=None), []

    async def trip(name: str, *errors: Exception) -> None:
        order.append(name)
        if order.count(name) <= len(errors):
            raise errors[order.count(name) - 1]

    await spent(gate)
    too_many = HttpStatusError(429, "GET", "http://h/", b"", 0.0)
    tasks = await start(lambda: gate.call(trip, "dear", ConnectionError()))
    tasks += await start(lambda: gate.call(trip, "cheap", too_many))
    tasks += await start(lambda: gate.call(trip, "late", ConnectionError()))
    assert seen(gate).deferred == 3
    await asyncio.gather(*tasks)
    assert order == ["dear", "cheap", "late", "dear", "cheap", "late"]


async def test_a_throttled_retry_that_was_told_when_to_come_back_costs_less() -> None:
    """About a third; and nothing, once it has worked."""

    def left_after(error: Exception) -> float:
        balance = seen(gate).budget
        assert balance is not None
        return balance

    for error, cost in (
        (ConnectionError(), 1),
        (HttpStatusError(429, "GET", "http://h/", b"", 0.0), 5 / 14),
        (HttpStatusError(429, "GET", "http://h/", b"", None), 1),
    ):
        gate = new_gate(Retry(attempts=2, wait=50))
        (failing,) = await start(lambda error=error, gate=gate: gate.call(Trip(1, error=lambda: error)))  # type: ignore[misc]
        assert left_after(error) == pytest.approx(INITIAL - cost)
        await failing
        assert seen(gate).budget == INITIAL


async def test_each_key_has_a_budget_of_its_own() -> None:
    gate = Gate("g", limit=100, retry=AT_ONCE, breaker=None, key=lambda key: key)

    async def trip(_key: str) -> None:
        raise ConnectionError

    tasks = await start(lambda: gate.call(trip, "a"), 40)
    assert gate.statistics()["a"].deferred > 10
    with pytest.raises(ConnectionError):
        await gate.call(trip, "b")
    assert gate.statistics()["b"].deferred == 0
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_without_a_budget_nothing_is_denied() -> None:
    gate, trips = new_gate(Retry(attempts=4, wait=0, budget=None)), [Trip(3) for _ in range(50)]
    started = now()
    await asyncio.gather(*[gate.call(trip) for trip in trips])
    assert (now(), seen(gate).budget, seen(gate).deferred) == (started, None, 0)


async def test_a_budget_that_is_taken_away_or_given_anew_releases_who_waits() -> None:
    gate, trips = new_gate(Retry(attempts=3, wait=0, budget=0.001)), [Trip() for _ in range(30)]
    started = now()
    await spent(gate)
    tasks = [(await start(lambda trip=trip: gate.call(trip)))[0] for trip in trips]  # type: ignore[misc]
    assert seen(gate).deferred == 30
    gate.service(None).set_budget(0.001)
    assert seen(gate).deferred == 20
    gate.service(None).set_budget(None)
    await asyncio.gather(*tasks)
    assert now() == started


async def test_a_retry_that_the_budget_can_never_pay_waits_until_there_is_another() -> None:
    """Rather than look for it again and again."""
    service = new_gate().service(None)
    (waiting,) = await start(lambda: service.afford(1000))
    await asyncio.sleep(3600)
    assert not waiting.done()
    service.set_budget(None)
    await waiting


async def test_who_gives_up_in_the_moment_in_which_there_is_room_takes_none_of_it() -> None:
    """It is the next one's."""
    gate = new_gate()
    await spent(gate)
    service = gate.service(None)
    first, second = [(await start(lambda: service.afford(1.0)))[0] for _ in range(2)]
    first.cancel()
    service.set_budget(0.1)
    await second
    assert first.cancelled()
    assert seen(gate).budget == INITIAL - 1


async def test_a_retry_that_was_paid_for_and_is_cancelled_in_its_back_off_is_refunded() -> None:
    gate = new_gate(Retry(attempts=3, wait=10, timeout=None))
    backing_off = await start(lambda: gate.call(Trip()))
    assert seen(gate).budget == INITIAL - 1
    backing_off[0].cancel()
    await asyncio.wait(backing_off)
    assert seen(gate).budget == INITIAL


@pytest.mark.parametrize("budget", [0.1, None])
async def test_a_retry_that_is_cancelled_in_the_tick_in_which_it_was_afforded_is_refunded(budget: float | None) -> None:
    gate = new_gate()
    await spent(gate)
    waiting = await start(lambda: gate.call(Trip()))
    assert seen(gate).deferred == 1
    gate.service(None).set_budget(budget)
    assert (seen(gate).deferred, seen(gate).budget) == (0, None if budget is None else INITIAL - 1)
    waiting[0].cancel()
    await asyncio.wait(waiting)
    assert waiting[0].cancelled()
    assert seen(gate).budget == (None if budget is None else INITIAL)


@pytest.mark.parametrize("budget", [0, -1, 101, True, float("nan"), "10 %"], ids=repr)
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(UsageError, match=r"Retry\(budget=.*\): expected a share of first attempts above 0"):
        Retry(budget=budget)


# --- time ---


async def test_the_time_for_all_attempts_bounds_that_wait_and_the_error_says_for_what() -> None:
    gate, trip = new_gate(Retry(attempts=3, wait=0.25, timeout=0.75)), Trip()
    await spent(gate)
    started = now()
    with pytest.raises(
        AttemptTimeout, match=r"Trip: the retry budget of gate 'maps' had no room in 0.75 s\ngate 'maps' gave up: Retry"
    ) as caught:
        await gate.call(trip)
    assert now() - started == 0.75
    assert "attempt 1 took 0.000 s: ConnectionError" in caught.value.__notes__[0]
    assert seen(gate).deferred == 0


async def test_an_error_of_the_back_off_is_not_taken_for_the_end_of_that_time() -> None:
    """A cancellation stays one, while it waits and when it has just been let go."""
    gate = new_gate()
    await spent(gate)
    first, second = await start(lambda: gate.call(Trip()), 2)
    first.cancel()
    assert await second == "done"
    assert first.cancelled()
    assert (seen(gate).deferred, seen(gate).in_flight) == (0, 0)


async def test_who_waits_for_the_budget_keeps_its_key() -> None:
    """A key that is forgotten meanwhile would come back with a second set of permits."""
    gate, trip = new_gate(), Trip()
    await spent(gate)
    (waiting,) = await start(lambda: gate.call(trip))
    assert not gate.service(None).idle
    await waiting
    assert gate.service(None).idle


# --- outages ---


@pytest.mark.parametrize("breaker", [None, Breaker()], ids=["no breaker", "breaker"])
@pytest.mark.parametrize("jobs", [5, 12, 30])
async def test_after_a_long_outage_all_jobs_finish_soon(jobs: int, breaker: Breaker | None) -> None:
    """However few they are: the budget must not have been eaten up for ever by what failed."""
    gate = Gate("g", limit=8, breaker=breaker, retry=Retry(attempts=1000, timeout=None))
    began, attempts = now(), 0

    async def trip() -> str:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.05)
        if now() - began < 60:
            raise HttpStatusError(503, "GET", "http://h/", b"", None)
        return "done"

    await asyncio.gather(*[gate.call(trip) for _ in range(jobs)])
    # The longest pause of a breaker that has opened three times in a minute; and the longest back-off.
    assert now() - began <= 60 + (72 if breaker else 10) + 20
    assert attempts <= 60 + INITIAL + 3 * jobs
    assert (seen(gate).deferred, seen(gate).in_flight, seen(gate).succeeded) == (0, 0, jobs)


async def test_while_the_breaker_is_open_nobody_who_waits_for_the_budget_is_let_go() -> None:
    """They could do nothing but wait on, and the room would be lost. When it is half open, one may be a probe."""
    gate = new_gate(Retry(attempts=50, wait=0, timeout=None), breaker=Breaker(calls=60, pause=10, probes=1))
    down = True

    async def trip() -> None:
        if down:
            raise HttpStatusError(503, "GET", "http://h/", b"", None)

    tasks = await start(lambda: gate.call(trip), 55)
    async with asyncio.timeout(100):
        while seen(gate).breaker == "closed":
            await asyncio.sleep(0.1)
    deferred = seen(gate).deferred
    await asyncio.sleep(7)
    assert (seen(gate).breaker, seen(gate).deferred) == ("open", deferred)
    down = False
    await asyncio.gather(*tasks)
    assert seen(gate).breaker == "closed"


# --- cancellation ---


def test_a_cancel_at_any_step_of_waiting_for_the_budget_leaves_nothing_behind() -> None:
    """With others who wait before it and behind it."""

    async def scenario(gate: Gate) -> None:
        for _ in range(INITIAL):
            gate.service(None).may_repeat(1.0)
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(gate.call(Trip(1, takes=0.1)))

    def check(gate: Gate) -> bool:
        after = gate.statistics().get(None)
        return after is None or (after.in_flight, after.waiting, after.deferred) == (0, 0, 0)

    assert cancel_at_every_step(scenario, arrange=lambda: new_gate(limit=2), check=check) >= 10


def test_a_cancel_at_any_step_of_a_blocking_call_that_waits_for_the_budget_leaves_nothing_behind() -> None:
    """No thread is promised to it meanwhile."""

    async def scenario(gate: Gate) -> None:
        for _ in range(INITIAL):
            gate.service(None).may_repeat(1.0)
        errors: list[Exception] = [ConnectionError(), ConnectionError()]

        def blocking() -> None:
            if errors:
                raise errors.pop()

        await asyncio.gather(gate.call(blocking), gate.call(blocking))

    def check(gate: Gate) -> bool:
        after = gate.statistics().get(None)
        return after is None or (after.in_flight, after.waiting, after.deferred) == (0, 0, 0)

    assert cancel_at_every_step(scenario, arrange=lambda: new_gate(limit=2), check=check) >= 5


async def test_an_abandoned_call_keeps_its_permit_while_its_retry_waits_for_the_budget() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    with ThreadLatch(loop) as latch:
        gate = new_gate(Retry(attempts=2, wait=0), limit=2, timeout=1)
        ahead = await start(lambda: gate.call(Trip(2)), 1)
        await spent(gate)
        (slow,) = await start(lambda: gate.call(latch.wait))
        await asyncio.sleep(1.001)
        assert (seen(gate).deferred >= 1, seen(gate).in_flight) == (True, 1)
        latch.open()
        await slow
    await asyncio.gather(*ahead, return_exceptions=True)
    await asyncio.sleep(0.001)
    assert seen(gate).in_flight == 0
