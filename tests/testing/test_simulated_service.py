"""The simulated service: that it queues as theory says, repeats itself to the bit, and fails as it is told to."""

import asyncio
import contextlib
import heapq
import math
import pickle
import random
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import ConnectionFailed, Gate, HttpStatusError, Retry, UsageError
from penstock.gate.server_hints import hint_of
from penstock.outcome import FailureKind, classify
from penstock.testing import (
    Answer,
    Quota,
    SimulatedService,
    cancel_at_every_step,
    lognormal,
    mixture,
    run_in_virtual_time,
)
from penstock.testing.simulated_service import URL, Draw, Refusal

pytestmark = pytest.mark.virtual_clock


async def elapsed(awaitable: Awaitable[object]) -> float:
    """Virtual seconds that it took, however it ended; to the nanosecond, since the clock starts far from zero."""
    now = asyncio.get_running_loop().time
    start = now()
    await asyncio.gather(awaitable, return_exceptions=True)
    return round(now() - start, 9)


async def each(count: int, service: SimulatedService) -> list[Answer | BaseException]:
    """What so many calls at once get."""
    return await asyncio.gather(*(service.call() for _ in range(count)), return_exceptions=True)


def statuses(answers: list[Answer | BaseException]) -> list[int | str]:
    """200, the status of an error, or the name of its class."""
    return [
        200 if isinstance(answer, Answer) else getattr(answer, "status", type(answer).__name__) for answer in answers
    ]


# --- what queueing theory says ---


def erlang_c(servers: int, offered: float) -> float:
    """The probability that a request has to wait in M/M/c (Erlang 1917)."""
    waits = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return waits / (sum(offered**k / math.factorial(k) for k in range(servers)) + waits)


async def poisson(service: SimulatedService, rate: float, calls: int, seed: int) -> list[float]:
    """The times that calls took which came at random."""
    rng = random.Random(seed)
    took: list[float] = []

    async def one() -> None:
        took.append((await service.call()).elapsed)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(calls):
            tasks.create_task(one())
            await asyncio.sleep(rng.expovariate(rate))
    return took


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (2, 0.6), (4, 0.6)])
async def test_random_arrivals_wait_as_long_as_erlang_says(servers: int, load: float) -> None:
    """M/M/c: exponential service times, arrivals at random; mean wait = C(c, a) / (c mu - lambda)."""
    mu = 50.0
    rate = load * servers * mu
    service = SimulatedService(servers=servers, service_time=lambda rng: rng.expovariate(mu), path=0.03, seed=1)
    took = await poisson(service, rate, 12_000, seed=2)
    wait = statistics.fmean(took) - 0.03 - 1 / mu
    expected = erlang_c(servers, load * servers) / (servers * mu - rate)
    assert wait == pytest.approx(expected, rel=0.1)


async def test_what_is_inside_is_throughput_times_time() -> None:
    """Little's law holds for any distribution: L = X R, for the time inside as for that on the way."""
    service = SimulatedService(servers=4, service_time=lognormal(0.02, 1.0), path=0.03, seed=3)
    inside: list[int] = []

    async def look() -> None:
        while True:
            inside.append(service.inside)
            await asyncio.sleep(0.0137)

    looking = asyncio.create_task(look())
    started = asyncio.get_running_loop().time()
    took = await poisson(service, 140.0, 6_000, seed=4)
    looking.cancel()
    throughput = len(took) / (asyncio.get_running_loop().time() - started)
    assert statistics.fmean(inside) == pytest.approx(throughput * (statistics.fmean(took) - 0.03), rel=0.05)


async def test_the_knee_is_where_little_puts_it() -> None:
    """16 servers of 20 ms behind a path of 30 ms: up to 40 in flight throughput grows, beyond it only the time does."""

    async def loop(service: SimulatedService, until: float) -> int:
        done = 0
        while asyncio.get_running_loop().time() < until:
            await service.call()
            done += 1
        return done

    throughput = {}
    for in_flight in (20, 40, 80):
        service = SimulatedService(servers=16, service_time=0.02, path=0.03)
        until = asyncio.get_running_loop().time() + 10.0
        throughput[in_flight] = sum(await asyncio.gather(*(loop(service, until) for _ in range(in_flight)))) / 10.0
    assert throughput[20] == pytest.approx(400, rel=0.02)
    assert throughput[40] == pytest.approx(800, rel=0.02)
    assert throughput[80] == pytest.approx(800, rel=0.02)


def test_lognormal_times_have_their_mean_and_their_noise() -> None:
    rng = random.Random(5)
    draw = lognormal(0.02, 0.5)
    times = [draw(rng) for _ in range(20_000)]
    assert statistics.fmean(times) == pytest.approx(0.02, rel=0.02)
    assert statistics.stdev(math.log(time) for time in times) == pytest.approx(0.5, rel=0.02)


def test_a_mixture_has_its_shares() -> None:
    rng = random.Random(6)
    draw = mixture((0.3, lambda _: 1.0), (0.5, lambda _: 2.0), (0.2, lambda _: 3.0))
    times = [draw(rng) for _ in range(20_000)]
    assert [times.count(kind) / len(times) for kind in (1.0, 2.0, 3.0)] == pytest.approx([0.3, 0.5, 0.2], abs=0.01)


# --- what a straightforward simulation says ---


def reference(
    arrivals: list[float], times: list[float], changes: list[tuple[float, int]], servers: int
) -> dict[int, float]:
    """When each request ends, by an event at a time. What happens at one time: ends, arrivals, changes."""
    events: list[tuple[float, int, int]] = []
    events += [(at, 1, number) for number, at in enumerate(arrivals)]
    events += [(at, 2, now) for at, now in changes]
    heapq.heapify(events)
    waiting: list[int] = []
    serving = 0
    ends: dict[int, float] = {}
    while events:
        at, kind, value = heapq.heappop(events)
        if kind == 0:
            serving -= 1
        elif kind == 1:
            waiting.append(value)
        else:
            servers = value
        while waiting and serving < servers:
            number = waiting.pop(0)
            serving += 1
            ends[number] = at + times[number]
            heapq.heappush(events, (ends[number], 0, number))
    return ends


eighths = st.integers(0, 40).map(lambda n: n / 8)


@given(
    calls=st.lists(st.tuples(eighths, st.integers(1, 24).map(lambda n: n / 8)), min_size=1, max_size=25),
    changes=st.lists(st.tuples(eighths, st.integers(1, 4)), max_size=4),
    servers=st.integers(1, 4),
    path=st.sampled_from([0.0, 0.125, 1.0]),
)
def test_every_answer_comes_when_a_simulation_by_events_says(
    calls: list[tuple[float, float]], changes: list[tuple[float, int]], servers: int, path: float
) -> None:
    """However requests and changes of the number of servers are mixed: the shortcut computes what the long way does."""
    calls.sort()
    changes = sorted({at + 1 / 16: now for at, now in changes}.items())
    times = [time for _, time in calls]
    # A call comes before an arrival of the same time, so times belong to requests in the order of the calls.
    expected = reference([at + path / 2 for at, _ in calls], times, changes, servers)

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        drawn = iter(times)
        service = SimulatedService(servers=servers, service_time=lambda _: next(drawn), path=path)
        for at, now in changes:
            service.change_in(at, servers=now)

        async def one(at: float) -> float:
            await asyncio.sleep(at)
            await service.call()
            return loop.time() - start - path / 2

        ends = await asyncio.gather(*(one(at) for at, _ in calls))
        assert (service.counts.arrived, service.counts.served, service.inside, service.waiting) == (
            len(calls),
            len(calls),
            0,
            0,
        )
        return ends

    assert run_in_virtual_time(main()) == [expected[number] for number in range(len(calls))]


# --- the same every time ---


async def run_of_everything(seed: int) -> tuple[Any, ...]:
    """Something of each kind of chance, and what the service says of it."""
    service = SimulatedService(
        servers=4, service_time=mixture((0.5, lognormal(0.01, 0.3)), (0.5, lognormal(0.1, 1.0))), contention=0.01,
        cap=12, unavailable=0.03, broken=0.02, quota=Quota(200, burst=40), seed=seed,
    )  # fmt: skip
    service.change_in(1.0, servers=2, path=0.1)
    service.change_in(2.0, servers=6, cap=None)
    now = asyncio.get_running_loop().time
    start = now()
    answers: list[tuple[float, str]] = []

    async def one() -> None:
        try:
            what = str((await service.call()).elapsed)
        except (HttpStatusError, ConnectionFailed) as error:
            what = str(error)
        answers.append((now() - start, what))

    rng = random.Random(seed)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(600):
            tasks.create_task(one())
            await asyncio.sleep(rng.expovariate(150))
    return answers, service.counts.served, service.counts.refused, service.counts.failed


def test_a_seed_repeats_itself_to_the_bit_and_another_one_differs() -> None:
    first = run_in_virtual_time(run_of_everything(1))
    assert run_in_virtual_time(run_of_everything(1)) == first
    assert run_in_virtual_time(run_of_everything(2)) != first
    assert min(first[1:]) > 0, "each kind of answer is among them"


# --- time and order ---


async def test_an_answer_takes_the_path_and_the_service() -> None:
    service = SimulatedService(servers=1, service_time=0.5, path=0.25)
    answer = await service.call("any", arguments="are ignored")
    assert answer.elapsed == pytest.approx(0.75)
    assert answer.headers == {}


async def test_nobody_waits_while_a_server_is_free_and_the_first_is_served_first() -> None:
    service = SimulatedService(servers=2, service_time=1.0, path=0.0)
    assert [round(answer.elapsed) for answer in await asyncio.gather(*(service.call() for _ in range(5)))] == [
        1, 1, 2, 2, 3,
    ]  # fmt: skip


async def test_it_can_be_looked_into() -> None:
    service = SimulatedService(servers=2, service_time=1.0, path=0.5)
    assert (service.inside, service.waiting) == (0, 0)
    calls = asyncio.gather(*(service.call() for _ in range(5)))
    await asyncio.sleep(0.1)
    assert (service.counts.called, service.counts.arrived, service.inside) == (5, 0, 0)
    await asyncio.sleep(0.2)
    assert (service.counts.arrived, service.inside, service.waiting) == (5, 5, 3)
    assert repr(service) == "<SimulatedService servers=2 path=0.5 inside=5>"
    await calls
    assert (service.counts.served, service.inside) == (5, 0)


async def test_who_waits_already_makes_service_longer() -> None:
    """Contention 0.5: the third request finds one waiting, the fourth two."""
    service = SimulatedService(servers=1, service_time=1.0, path=0.0, contention=0.5)
    answers = await asyncio.gather(*(service.call() for _ in range(4)))
    assert [answer.elapsed for answer in answers] == pytest.approx([1.0, 2.0, 3.5, 5.5])


async def test_a_shorter_path_overtakes_nobody() -> None:
    """Called later with a shorter path, a request arrives at the same time as the one before it, and behind it."""
    service = SimulatedService(servers=1, service_time=1.0, path=4.0)
    first = asyncio.create_task(service.call())
    await asyncio.sleep(0.5)
    service.change(path=0.2)
    second = asyncio.create_task(service.call())
    assert (await second).elapsed == pytest.approx(1.5 + 2.0 + 0.1)
    assert (await first).elapsed == pytest.approx(2.0 + 1.0 + 2.0)


async def test_a_refusal_is_back_in_the_time_of_the_path() -> None:
    """Also while an earlier request with a longer way back is what the service would look at first."""
    service = SimulatedService(servers=4, service_time=10.0, path=4.0, unavailable=1.0)
    slow = asyncio.create_task(elapsed(service.call()))
    await asyncio.sleep(1.99)
    service.change(path=0.02)
    assert await elapsed(service.call()) == pytest.approx(0.02)
    assert await slow == pytest.approx(4.0)


async def test_on_an_idle_service_no_timer_is_left() -> None:
    service = SimulatedService(path=0.5)
    await each(3, service)
    loop: Any = asyncio.get_running_loop()
    assert not [timer for timer in loop._scheduled if not timer.cancelled()]


# --- changes ---


async def test_fewer_servers_finish_what_they_have_begun() -> None:
    service = SimulatedService(servers=4, service_time=1.0, path=0.0)
    service.change_in(0.5, servers=1)
    answers = await asyncio.gather(*(service.call() for _ in range(6)))
    assert [answer.elapsed for answer in answers] == pytest.approx([1, 1, 1, 1, 2, 3])


async def test_more_servers_serve_those_who_wait() -> None:
    service = SimulatedService(servers=1, service_time=1.0, path=0.0)
    service.change_in(0.5, servers=3)
    answers = await asyncio.gather(*(service.call() for _ in range(4)))
    assert [answer.elapsed for answer in answers] == pytest.approx([1, 1.5, 1.5, 2])


async def test_other_times_hold_for_who_arrives_from_then_on() -> None:
    service = SimulatedService(service_time=1.0, path=0.0)
    first = asyncio.create_task(elapsed(service.call()))
    await asyncio.sleep(0.5)
    service.change(service_time=3.0)
    assert await elapsed(service.call()) == 3.0
    assert await first == 1.0


async def test_a_change_to_come_can_be_cancelled() -> None:
    service = SimulatedService(service_time=1.0, path=0.0)
    service.change_in(0.5, service_time=9.0).cancel()
    await asyncio.sleep(1)
    assert await elapsed(service.call()) == 1.0


async def test_before_the_first_call_it_can_be_changed_outside_of_a_loop() -> None:
    service = await asyncio.to_thread(lambda: _changed(SimulatedService(servers=1, service_time=1.0, path=0.0)))
    assert await elapsed(each(2, service)) == 1.0


def _changed(service: SimulatedService) -> SimulatedService:
    service.change(servers=2)
    return service


# --- refusals and faults ---


async def test_one_more_than_the_cap_is_refused_at_once() -> None:
    """Inside are those who wait and those who are served."""
    service = SimulatedService(servers=2, service_time=1.0, path=0.5, cap=3, retry_after=7.0)
    answers = await each(5, service)
    assert statuses(answers) == [200, 200, 200, 429, 429]
    refusal = answers[3]
    assert isinstance(refusal, Refusal)
    assert hint_of(refusal) == refusal.retry_after == 7.0
    assert refusal.headers == {"Retry-After": "7"}
    assert classify(refusal) is FailureKind.THROTTLED
    assert service.counts.refused == 2


async def test_a_refusal_takes_no_longer_than_the_path() -> None:
    service = SimulatedService(servers=1, service_time=1.0, path=0.5, cap=1)
    first = asyncio.create_task(service.call())
    assert await elapsed(service.call()) == 0.5
    await first


async def test_room_under_the_cap_comes_back() -> None:
    service = SimulatedService(servers=1, service_time=1.0, path=0.0, cap=1)
    for _ in range(3):
        assert statuses(await each(2, service)) == [200, 429]


async def test_a_cap_that_comes_later_counts_those_inside() -> None:
    service = SimulatedService(servers=1, service_time=1.0, path=0.0)
    waiting = asyncio.gather(*(service.call() for _ in range(3)))
    await asyncio.sleep(0.5)
    service.change(cap=4)
    assert statuses(await each(2, service)) == [200, 429]
    await waiting
    service.change(cap=None)
    assert statuses(await each(9, service)) == [200] * 9


async def test_fewer_servers_keep_a_cap_filled_for_longer() -> None:
    service = SimulatedService(servers=2, service_time=1.0, path=0.0, cap=4)
    waiting = asyncio.gather(*(service.call() for _ in range(4)))
    service.change_in(0.5, servers=1)
    await asyncio.sleep(2.5)
    assert service.inside == 1
    assert statuses(await each(4, service)) == [200, 200, 200, 429]
    await waiting


async def test_a_share_of_the_requests_fails_at_once_in_two_ways() -> None:
    service = SimulatedService(unavailable=0.2, broken=0.1, retry_after=1.0, path=0.5, service_time=3.0, servers=9999)
    answers = await each(5_000, service)
    found = statuses(answers)
    assert found.count(503) / len(found) == pytest.approx(0.2, abs=0.02)
    assert found.count("ConnectionFailed") / len(found) == pytest.approx(0.1, abs=0.02)
    assert service.counts.failed == len(found) - found.count(200)
    assert {classify(a) for a in answers if isinstance(a, ConnectionFailed)} == {FailureKind.TRANSIENT}
    service.change(unavailable=1.0, broken=0.0)
    assert await elapsed(service.call()) == 0.5


async def test_a_hole_swallows_requests_and_answers() -> None:
    """The caller hears nothing until its own time-out; afterwards all is as before."""
    service = SimulatedService(service_time=1.0, path=0.0)
    in_it = asyncio.create_task(asyncio.wait_for(service.call(), 5))
    await asyncio.sleep(0.5)
    service.change(hole=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(service.call(), 5)
    with pytest.raises(TimeoutError):
        await in_it
    assert (service.counts.lost, service.counts.served) == (2, 0)
    service.change(hole=False)
    assert await elapsed(service.call()) == 1.0


async def test_a_gate_gets_through_a_service_in_trouble() -> None:
    """It stands in for a real call."""
    service = SimulatedService(unavailable=0.5, seed=7)
    gate = Gate("simulated", limit=4, retry=Retry(attempts=20, budget=None), breaker=None)
    answers = await asyncio.gather(*(gate.call(service.call, number) for number in range(20)))
    assert len(answers) == service.counts.served == 20
    assert service.counts.failed > 5


def test_a_refusal_can_be_pickled() -> None:
    refusal = Refusal(429, "GET", URL, retry_after=1.0)
    refusal.headers = {"Retry-After": "1"}
    copy = pickle.loads(pickle.dumps(refusal))
    assert (copy.status, copy.retry_after, copy.headers) == (429, 1.0, {"Retry-After": "1"})


# --- cancellation ---


async def test_a_request_whose_caller_has_gone_is_served_all_the_same() -> None:
    """It keeps its server busy, as at a real service."""
    service = SimulatedService(servers=1, service_time=1.0, path=0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(service.call(), 0.1)
    assert await elapsed(service.call()) == pytest.approx(0.1 + 1.0 + 1.0 + 0.1 - 0.1)
    assert (service.counts.served, service.counts.unheard) == (2, 1)


async def test_a_request_that_has_not_arrived_when_its_caller_goes_never_does() -> None:
    service = SimulatedService(servers=1, service_time=1.0, path=0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(service.call(), 0.05)
    assert await elapsed(service.call()) == pytest.approx(1.2)
    assert (service.counts.called, service.counts.arrived, service.counts.unheard) == (2, 1, 0)


@pytest.mark.parametrize("trouble", [0.0, 1.0])
def test_cancelled_anywhere_it_leaves_nothing_that_nobody_fetches(trouble: float) -> None:
    """An error that is on its way to a caller who has just gone is no error of the loop's."""

    async def main() -> None:
        service = SimulatedService(unavailable=trouble, seed=1)
        with contextlib.suppress(HttpStatusError):
            await service.call()

    cancel_at_every_step(main)


# --- quotas ---


async def take(service: SimulatedService, count: int) -> list[int | str]:
    return statuses(await each(count, service))


async def test_a_window_lets_its_amount_through_and_begins_anew() -> None:
    service = SimulatedService(path=0.0, service_time=0.01, servers=99, quota=Quota(3, per=10.0))
    assert await take(service, 5) == [200, 200, 200, 429, 429]
    await asyncio.sleep(9.9)
    assert await take(service, 1) == [429]
    await asyncio.sleep(0.2)
    assert await take(service, 4) == [200, 200, 200, 429]
    await asyncio.sleep(25)
    assert await take(service, 4) == [200, 200, 200, 429]


async def test_a_bucket_fills_up_evenly_and_no_higher_than_its_size() -> None:
    service = SimulatedService(path=0.0, service_time=0.01, servers=99, quota=Quota(10, per=1.0, burst=4))
    assert await take(service, 5) == [200] * 4 + [429]
    await asyncio.sleep(0.24)
    assert await take(service, 3) == [200] * 2 + [429]
    await asyncio.sleep(100)
    assert await take(service, 5) == [200] * 4 + [429]


async def test_a_long_run_gets_exactly_its_quota() -> None:
    service = SimulatedService(path=0.0, service_time=0.01, servers=99, quota=Quota(10, per=1.0, burst=4))
    now = asyncio.get_running_loop().time
    start = now()
    for _ in range(500):
        await take(service, 1)
        await asyncio.sleep(0.04)
    assert service.counts.served == pytest.approx(4 + (now() - start) * 10, abs=1)


@pytest.mark.parametrize(("burst", "reset"), [(None, "60"), (20.0, "1")])
async def test_the_ratelimit_headers_say_what_is_left(burst: float | None, reset: str) -> None:
    """By the IETF draft: the quota and its window, what is left and when all of it is back, in whole seconds."""
    service = SimulatedService(path=0.0, quota=Quota(120, per=60.0, burst=burst, headers="ratelimit"))
    answer = await service.call()
    left = 119 if burst is None else 19
    assert answer.headers == {
        "RateLimit-Policy": '"default";q=120;w=60',
        "RateLimit": f'"default";r={left};t={reset}',
    }


async def test_the_older_headers_say_the_same() -> None:
    service = SimulatedService(path=0.0, quota=Quota(2, per=60.0, headers="x-ratelimit", retry_after=True))
    await asyncio.sleep(3)
    answers = await each(3, service)
    refusal = answers[2]
    assert isinstance(refusal, Refusal)
    assert refusal.headers == {
        "X-RateLimit-Limit": "2",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": "60",
        "Retry-After": "60",
    }


@pytest.mark.parametrize(
    ("quota", "wait"),
    [
        (Quota(2, per=60.0, retry_after=True), 60.0),
        (Quota(1, per=4.0, burst=2, retry_after=True), 4.0),
        (Quota(2, per=60.0), None),
    ],
)
async def test_a_refusal_says_when_to_come_back_if_it_is_to(quota: Quota, wait: float | None) -> None:
    """And who comes back then is let in."""
    service = SimulatedService(path=0.0, service_time=0.0, quota=quota)
    answers = await each(3, service)
    refusal = answers[2]
    assert isinstance(refusal, Refusal)
    assert refusal.retry_after == wait
    await asyncio.sleep(wait or 60.0)
    assert await take(service, 1) == [200]


# --- mistakes ---


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: SimulatedService(servers=0), "servers=0: expected a whole number of at least 1"),
        (lambda: SimulatedService(servers=True), "whole number"),
        (lambda: SimulatedService(cap=0.5), "cap=0.5: expected a whole number"),  # type: ignore[arg-type]
        (lambda: SimulatedService(path=-1), "path=-1: expected a number of at least 0"),
        (lambda: SimulatedService(contention=math.inf), "contention"),
        (lambda: SimulatedService(retry_after=math.nan), "retry_after"),
        (lambda: SimulatedService(unavailable=1.5), "a share, from 0 to 1"),
        (lambda: SimulatedService(service_time="fast"), "a function of a random.Random"),  # type: ignore[arg-type]
        (lambda: SimulatedService().change(speed=3), "has no 'speed'"),  # type: ignore[call-arg]
        (lambda: SimulatedService().change(servers=0), "servers=0"),
        (lambda: SimulatedService(quota=5), "quota=5: expected a Quota"),  # type: ignore[arg-type]
        (lambda: SimulatedService(hole=1), "hole=1: expected True or False"),  # type: ignore[arg-type]
        (lambda: SimulatedService(path=10**400), "path=10"),
        (lambda: SimulatedService().change_in(-1.0, path=1), "change_in.*expected seconds"),
        (lambda: SimulatedService().change_in("soon", path=1), "change_in"),  # type: ignore[arg-type]
        (lambda: SimulatedService().change_in(math.nan, path=1), "change_in"),
        (lambda: Quota("5"), "amount='5'"),  # type: ignore[arg-type]
        (lambda: Quota(True), "amount=True"),
        (lambda: Quota(5, per=None), "per=None"),  # type: ignore[arg-type]
        (lambda: Quota(5, burst=math.nan), "burst=nan"),
        (lambda: Quota(5, retry_after=3), "expected True or False"),  # type: ignore[arg-type]
        (lambda: Quota(0), "amount=0"),
        (lambda: Quota(1, burst=-1), "burst=-1"),
        (lambda: Quota(1, headers="some"), "headers='some'"),  # type: ignore[arg-type]
        (lambda: lognormal(0, 0.2), "a mean above 0"),
        (lambda: mixture((0.5, lognormal(1, 0))), "add up to 1"),
        (lambda: lognormal("1", 0.2), "a mean above 0"),  # type: ignore[arg-type]
        (lambda: lognormal(1, True), "a sigma of at least 0"),
        (lambda: lognormal(math.nan, 0.2), "a mean above 0"),
        (lambda: mixture(), "positive numbers"),
        (lambda: mixture((0.0, lognormal(1, 0)), (1.0, lognormal(1, 0))), "positive numbers"),
        (lambda: mixture((True, lognormal(1, 0))), "pairs of a share and a function"),
        (lambda: mixture((1.0, 0.5)), "pairs of a share and a function"),  # type: ignore[arg-type]
        (lambda: mixture(0.5), "pairs of a share and a function"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mistake()


async def test_a_change_to_come_is_checked_when_it_is_asked_for() -> None:
    with pytest.raises(UsageError, match="path"):
        SimulatedService().change_in(1.0, path=-1)


async def test_a_change_that_cannot_work_changes_nothing() -> None:
    service = SimulatedService(servers=1, service_time=1.0, path=0.0)
    with pytest.raises(UsageError):
        service.change(service_time=9.0, servers=0)
    assert await elapsed(service.call()) == 1.0


@pytest.mark.parametrize("draw", [lognormal(0.02, 0.0), mixture((1.0, lognormal(0.02, 0.0)))])
def test_without_noise_a_time_is_its_mean(draw: Draw) -> None:
    assert draw(random.Random(1)) == pytest.approx(0.02)
