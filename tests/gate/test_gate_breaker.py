"""The breaker as a gate uses it: who is let through to a service that is down, and who waits or fails meanwhile."""

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import pytest

from penstock import AttemptTimeout, CircuitOpen, ConnectionFailed, FailureKind, Gate, HttpStatusError, Retry
from penstock.gate.breaker import Breaker
from penstock.gate.gate import MOST_IDLE_KEYS
from penstock.gate.service import KeyStatistics, Service
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step

pytestmark = pytest.mark.virtual_clock

RULE = Breaker(calls=4, pause=10, probes=3)
"""Opens after 4 attempts of which half have failed; after 8 to 12 s it lets probes through."""
FIRST_PAUSE = (8, 12)
ONCE = Retry(attempts=1)
AGAIN = Retry(attempts=1000, timeout=None, wait=0.1, budget=None)


def now() -> float:
    return asyncio.get_running_loop().time()


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


def status(code: int, retry_after: float | None = None) -> HttpStatusError:
    return HttpStatusError(code, "GET", "http://h/", b"", retry_after)


def unreachable() -> ConnectionFailed:
    return ConnectionFailed("GET", "http://h/", "refused", False)


class Backend:
    """A service that is down from the beginning until a moment, and notes when it was asked."""

    def __init__(
        self, *, takes: float = 0.05, until: float = 60.0, error: Callable[[], Exception] = lambda: status(502)
    ) -> None:
        self.takes = takes
        self.error = error
        self.began = now()
        self.until = until
        self.asked: list[float] = []
        self.inside = 0

    async def __call__(self) -> str:
        self.asked.append(now() - self.began)
        self.inside += 1
        try:
            await asyncio.sleep(self.takes)
        finally:
            self.inside -= 1
        if now() - self.began < self.until:
            raise self.error()
        return "done"

    def asked_between(self, start: float, stop: float) -> list[float]:
        return [at for at in self.asked if start <= at < stop]


async def start(call: Callable[[], Any], times: int = 1) -> "list[asyncio.Task[Any]]":
    """Tasks that have come as far as they come at once."""
    tasks = [asyncio.create_task(call()) for _ in range(times)]
    await asyncio.sleep(0)
    return tasks


async def until(condition: Callable[[], bool]) -> None:
    """It has come to that, within a bound."""
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.01)


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def seen(gate: Gate) -> KeyStatistics:
    return gate.statistics()[None]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "penstock.gate"]


async def opened(gate: Gate, backend: Backend) -> Service:
    """Let the breaker of `gate` open by as many calls as that takes. Nothing is under way then."""
    for _ in range(4):
        with pytest.raises(HttpStatusError):
            await gate.call(backend)
    assert seen(gate).breaker == "open"
    return gate.service(None)


def new_gate(breaker: Breaker | None = RULE, retry: Retry = ONCE, **options: Any) -> Gate:
    return Gate("maps", limit=options.pop("limit", 8), breaker=breaker, retry=retry, **options)


# --- it opens, and what is asked meanwhile waits ---


async def test_a_service_that_fails_is_left_alone_until_the_pause_is_over() -> None:
    """Nothing is sent meanwhile, and who asks waits: a job is not lost over it."""
    gate, backend = new_gate(), Backend(until=5)
    await opened(gate, backend)
    opened_at = now()
    (waiting,) = await start(lambda: gate.call(backend))
    await asyncio.sleep(7.9)
    assert (seen(gate).waiting, seen(gate).waits_for, len(backend.asked)) == (1, "breaker", 4)
    assert await waiting == "done"
    assert FIRST_PAUSE[0] <= now() - opened_at <= FIRST_PAUSE[1] + 0.1
    assert seen(gate).opened == 1


async def test_half_open_probes_go_one_at_a_time_until_enough_have_worked() -> None:
    """Then everybody goes at once."""
    gate, backend = new_gate(), Backend(until=5)
    await opened(gate, backend)
    tasks = await start(lambda: gate.call(backend), 20)
    for probe in range(3):
        await until(lambda probe=probe: len(backend.asked) > 4 + probe)  # type: ignore[misc]
        assert (backend.inside, seen(gate).in_flight, seen(gate).breaker) == (1, 1, "half-open")
        assert seen(gate).limit == 1
    await until(lambda: seen(gate).breaker == "closed")
    assert (backend.inside, seen(gate).limit) == (8, 8)
    assert await asyncio.gather(*tasks) == ["done"] * 20


async def test_a_probe_that_fails_opens_again_and_releases_nobody() -> None:
    """With a crowd waiting, each opening costs one request; the pauses grow."""
    gate, backend = new_gate(retry=AGAIN), Backend()
    tasks = await start(lambda: gate.call(backend), 30)
    await asyncio.sleep(1)
    before = len(backend.asked)
    assert before <= 8 + 3  # those of the first moment, and who had its permit when it opened
    await asyncio.sleep(58)
    probes = backend.asked[before:]
    assert len(probes) == seen(gate).opened - 1
    pauses = gaps(probes)
    assert all(pause >= 16 for pause in pauses)
    await asyncio.gather(*tasks)
    assert (seen(gate).breaker, seen(gate).succeeded) == ("closed", 30)


async def test_while_nothing_succeeds_probes_start_a_second_apart_at_most() -> None:
    """A probe that hangs does not hold up the recovery, and no crowd follows it."""
    gate, backend = new_gate(timeout=None), Backend(takes=0.05)
    await opened(gate, backend)
    backend.takes = 100  # each probe hangs
    tasks = await start(lambda: gate.call(backend), 20)
    await asyncio.sleep(40)
    probes = backend.asked[4:]
    assert len(probes) == 3  # as many as may be in flight
    assert gaps(probes) == pytest.approx([1, 1])
    assert FIRST_PAUSE[0] <= probes[0] - 0.2 <= FIRST_PAUSE[1]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_whatever_a_probe_is_answered_means_that_the_service_is_back() -> None:
    """An SDK's own "not found", or a refusal for being asked too much: only a failure is none."""

    class Unknown(Exception):
        pass

    gate, backend = new_gate(), Backend()
    await opened(gate, backend)
    backend.error = Unknown
    tasks = await start(lambda: gate.call(backend), 8)
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [Unknown] * 8
    assert seen(gate).breaker == "closed"


async def test_attempts_that_hang_from_before_take_no_probes_place() -> None:
    """And their end, whenever it comes, lets no second probe through."""
    gate, hanging, backend = new_gate(timeout=None), Backend(takes=1000, until=0), Backend(until=5)
    old = await start(lambda: gate.call(hanging), 3)
    await opened(gate, backend)
    backend.takes = 50
    new = await start(lambda: gate.call(backend), 3)
    await until(lambda: backend.inside > 0)
    assert (seen(gate).breaker, seen(gate).limit) == ("half-open", 4)
    for task in old:
        task.cancel()
    await asyncio.sleep(0.5)
    assert (backend.inside, seen(gate).limit) == (1, 1)
    await asyncio.sleep(1)
    assert (backend.inside, seen(gate).limit) == (2, 2)  # a second one, since the first one hangs
    await asyncio.gather(*new)


async def test_attempts_that_end_while_it_is_open_take_no_probes_place() -> None:
    """Those which had their permit when it opened, and those which had started: all the same."""
    gate, backend = new_gate(retry=AGAIN, limit=3), Backend(until=1)
    tasks = await start(lambda: gate.call(backend), 12)  # with the fourth end, two more have been admitted
    await asyncio.sleep(1)
    assert seen(gate).breaker == "open"
    first = len(backend.asked)
    await until(lambda: len(backend.asked) > first)
    assert (seen(gate).breaker, seen(gate).limit, backend.inside) == ("half-open", 1, 1)
    await asyncio.gather(*tasks)


async def test_what_a_stale_attempt_brings_does_not_count() -> None:
    """The answer to a request from before says nothing about the service as it is now."""
    gate, backend = new_gate(timeout=None, breaker=Breaker(calls=4, pause=10, probes=1)), Backend()
    old = Backend(takes=13, until=0)
    (early,) = await start(lambda: gate.call(old))
    await opened(gate, backend)
    await early
    assert seen(gate).breaker == "half-open"


async def test_abandoned_calls_take_no_probes_place() -> None:
    """Neither those from before nor a probe that hangs in its thread; their permits come back all the same."""
    loop = virtual_loop()
    down = threading.Event()
    down.set()
    with ThreadLatch(loop) as latch:

        def blocking() -> str:
            if down.is_set():
                latch.wait()
            return "done"

        gate = new_gate(timeout=1, limit=6)
        await gate.call(asyncio.sleep, 0)  # it has worked before
        for _ in range(4):
            with pytest.raises(AttemptTimeout):
                await gate.call(blocking)
        assert (seen(gate).breaker, seen(gate).in_flight, len(seen(gate).abandoned_calls)) == ("open", 4, 4)
        with pytest.raises(AttemptTimeout):  # a probe, beside them
            await gate.call(blocking)
        assert seen(gate).in_flight == 5
        down.clear()
        for _ in range(3):
            assert await gate.call(blocking) == "done"
        assert (seen(gate).breaker, seen(gate).limit, seen(gate).in_flight) == ("closed", 6, 5)
    await asyncio.sleep(0.001)
    assert (seen(gate).in_flight, seen(gate).abandoned_calls) == (0, ())


async def test_a_caller_that_gives_up_its_probe_in_a_thread_leaves_the_place_to_the_next() -> None:
    """The thread goes on with its permit, and who waits is not kept by it. Neither when that ends."""
    loop = virtual_loop()
    with ThreadLatch(loop) as latch:

        async def fail() -> None:
            raise status(502)

        gate = new_gate(timeout=None, limit=2)
        for _ in range(4):
            with pytest.raises(HttpStatusError):
                await gate.call(fail)
        (probe,) = await start(lambda: gate.call(latch.wait))
        await asyncio.sleep(20)
        assert (seen(gate).breaker, latch.held) == ("half-open", 1)
        probe.cancel()
        await asyncio.wait([probe])
        async with asyncio.timeout(2):
            await gate.call(asyncio.sleep, 0)
        (second,) = await start(lambda: gate.call(asyncio.sleep, 5))
        assert (seen(gate).in_flight, seen(gate).limit) == (2, 2)
        latch.open()
        await asyncio.sleep(0.001)
        assert (seen(gate).in_flight, seen(gate).limit) == (1, 1)
        await second


async def test_a_stale_call_that_is_abandoned_keeps_nobody_from_probing() -> None:
    """It changes from one count to the other, in a moment in which nobody else would look."""
    loop = virtual_loop()
    with ThreadLatch(loop) as latch:

        async def fail() -> None:
            raise status(502)

        gate = new_gate(timeout=None, limit=2)
        (old,) = await start(lambda: gate.call(latch.wait))
        for _ in range(4):
            with pytest.raises(HttpStatusError):
                await gate.call(fail)
        await asyncio.sleep(20)
        assert seen(gate).breaker == "half-open"
        old.cancel()
        await asyncio.wait([old])
        async with asyncio.timeout(2):
            await gate.call(asyncio.sleep, 0)


async def test_a_new_outage_opens_it_again() -> None:
    """With a pause as in the beginning, since it has been well for long."""
    gate, backend = new_gate(), Backend(until=5)
    await opened(gate, backend)
    for _ in range(3):
        await gate.call(backend)
    assert seen(gate).breaker == "closed"
    await asyncio.sleep(1000)
    backend.until = now() - backend.began + 5
    await opened(gate, backend)
    again = now()
    await gate.call(backend)
    assert FIRST_PAUSE[0] <= now() - again <= FIRST_PAUSE[1] + 0.1
    assert seen(gate).opened == 2


async def test_throttling_never_opens_it() -> None:
    """A service that says "less" is up; its `Retry-After` is waited for as ever."""
    gate, backend = new_gate(), Backend(until=1e9, error=lambda: status(429))
    for _ in range(50):
        with pytest.raises(HttpStatusError):
            await gate.call(backend)
    assert (seen(gate).breaker, seen(gate).opened) == ("closed", 0)


async def test_a_single_failure_among_successes_opens_nothing() -> None:
    """And answers such as 404 are successes."""
    gate, backend = new_gate(), Backend()
    for code in (404, 404, 502, 404, 502, 404, 404):
        backend.error = lambda code=code: status(code)  # type: ignore[misc]
        with pytest.raises(HttpStatusError):
            await gate.call(backend)
    assert seen(gate).breaker == "closed"


async def test_retry_after_of_the_failure_that_opens_it_is_waited_for() -> None:
    """A 502 that tells when to come back, though it is not retried."""
    gate, backend = new_gate(), Backend(until=5, error=lambda: status(502, 45.0))
    await opened(gate, backend)
    opened_at = now()
    await gate.call(backend)
    assert 45 <= now() - opened_at <= 50


async def test_a_permit_counts_for_the_breaker_as_a_call_does() -> None:
    """Failures open it, and who wants one waits then."""
    gate = new_gate()
    for _ in range(4):
        with pytest.raises(HttpStatusError):
            async with gate.permit():
                raise status(503)
    assert seen(gate).breaker == "open"
    opened_at = now()
    async with gate.permit():
        assert FIRST_PAUSE[0] <= now() - opened_at <= FIRST_PAUSE[1]


async def test_without_a_breaker_a_service_that_fails_is_asked_on() -> None:
    gate, backend = new_gate(breaker=None), Backend()
    for _ in range(100):
        with pytest.raises(HttpStatusError):
            await gate.call(backend)
    assert (seen(gate).breaker, seen(gate).opened) == (None, 0)


# --- who is told ---


async def test_each_opening_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """With what was seen, and what becomes of those who ask."""
    gate, backend = new_gate(retry=AGAIN), Backend(until=30)
    tasks = await start(lambda: gate.call(backend), 20)
    await asyncio.gather(*tasks)
    told = lines(caplog)
    assert len(told) == seen(gate).opened > 1
    latest = "(HttpStatusError: GET http://h/ -> HTTP 502)"
    assert f"gate 'maps': the circuit breaker is open, 4 of the last 4 attempts failed {latest}. The next" in told[0]
    assert f"gate 'maps': the circuit breaker is open, a probe failed {latest}. The next probe follows in" in told[1]
    assert told[0].endswith("What is asked meanwhile waits")
    assert all(record.levelno == logging.WARNING for record in caplog.records)


async def test_who_waits_in_vain_is_told_that_the_breaker_is_open() -> None:
    """When the time of his policy is over."""
    gate, backend = new_gate(retry=Retry(attempts=1, timeout=5)), Backend()
    await opened(gate, backend)
    with pytest.raises(AttemptTimeout, match=r"got no permit of gate 'maps' in 5 s: its circuit breaker is open"):
        await gate.call(backend)


# --- to fail fast ---


async def test_with_fail_fast_who_waits_and_who_comes_fails_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """With what has been seen and when to come back; what is in flight goes on; a probe is let through later."""
    gate = new_gate(breaker=Breaker(calls=4, pause=10, probes=1, fail_fast=True), limit=2)
    backend, slow = Backend(until=5), Backend(takes=3, until=0)
    (in_flight,) = await start(lambda: gate.call(slow))
    tasks = await start(lambda: gate.call(backend), 10)
    await asyncio.wait(tasks)
    errors = [task.exception() for task in tasks]
    assert [type(error) for error in errors[:4]] == [HttpStatusError] * 4
    waiting = errors[-1]
    assert isinstance(waiting, CircuitOpen)
    message = r"the circuit breaker of gate 'maps' is open: 4 of the last 4 attempts failed\. It lets a probe through"
    with pytest.raises(CircuitOpen, match=message) as newcomer:
        await gate.call(backend)
    assert "gate 'maps' gave up: it was not sent" in newcomer.value.__notes__[0]
    with pytest.raises(CircuitOpen):
        await gate.permit().__aenter__()
    assert await in_flight == "done"
    assert (seen(gate).in_flight, seen(gate).waiting) == (0, 0)
    assert lines(caplog)[0].endswith("What is asked meanwhile fails")
    await asyncio.sleep(12)
    assert await gate.call(backend) == "done"
    assert seen(gate).breaker == "closed"


@pytest.mark.parametrize("way", ["call", "permit"])
async def test_where_nothing_has_ever_answered_it_is_not_waited_for(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong address: a batch ends soon, and says what may be wrong."""
    gate, backend = new_gate(breaker=Breaker(), retry=Retry(), limit=4), Backend(error=unreachable)

    async def by_permit() -> None:
        async with gate.permit():
            await backend()

    trip = by_permit if way == "permit" else lambda: gate.call(backend)
    tasks = await start(trip, 100)
    await asyncio.wait(tasks, timeout=5)
    assert all(task.done() for task in tasks)
    errors = [task.exception() for task in tasks]
    assert len(backend.asked) <= 10 + 3
    assert sum(isinstance(error, CircuitOpen) for error in errors) >= 85
    assert "10 of the last 10 attempts failed, and nothing has ever answered. It lets a probe" in str(errors[-1])
    assert lines(caplog)[0].endswith("meanwhile fails, since nothing has ever answered: is the address right?")
    assert (seen(gate).in_flight, seen(gate).waiting, seen(gate).deferred) == (0, 0, 0)


async def test_retries_that_wait_for_the_budget_fail_with_the_others() -> None:
    """What is to fail fast does not wait for its turn to fail."""
    gate = new_gate(breaker=Breaker(connect_errors=25), retry=Retry(attempts=100, wait=0), limit=4)
    backend = Backend(error=unreachable)
    tasks = await start(lambda: gate.call(backend), 60)
    await until(lambda: seen(gate).breaker == "open")
    async with asyncio.timeout(1):
        await asyncio.wait(tasks)
    assert all(isinstance(task.exception(), CircuitOpen) for task in tasks)


@pytest.mark.parametrize("answer", [status(500), status(404), status(429)], ids=str)
async def test_where_anything_has_answered_it_is_waited_for(answer: Exception) -> None:
    """Be it with a refusal: the address is right."""
    gate, backend = new_gate(breaker=Breaker(connect_errors=5)), Backend(until=1e9)
    backend.error = lambda: answer
    with pytest.raises(HttpStatusError):
        await gate.call(backend)
    backend.error = unreachable
    for _ in range(5):
        with pytest.raises(ConnectionFailed):
            await gate.call(backend)
    assert seen(gate).breaker == "open"
    (waiting,) = await start(lambda: gate.call(backend))
    assert seen(gate).waiting == 1
    backend.until = 0
    assert await waiting == "done"


async def test_a_caller_that_is_cancelled_as_it_is_sent_away_ends_cancelled() -> None:
    """And nobody complains of an error that was not looked at."""
    gate = new_gate(breaker=Breaker(calls=4, pause=10, fail_fast=True), limit=1)
    backend = Backend()
    failing = await start(lambda: gate.call(backend), 4)
    (waiting,) = await start(lambda: gate.call(backend))
    await asyncio.sleep(0.15)
    asyncio.get_running_loop().call_at(now() + 0.05, waiting.cancel)
    await asyncio.gather(*failing, return_exceptions=True)
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert seen(gate).in_flight == 0


async def test_only_who_still_waits_is_sent_away() -> None:
    """Not one that has been cancelled in the same tick, before its task has run."""
    gate = new_gate(breaker=Breaker(calls=1, pause=10, fail_fast=True), limit=1)
    service = gate.service(None)
    service.take_nowait()
    gone, other = await start(service.take, 2)
    gone.cancel()
    service.end_badly(service.start(now(), False), status(502), None, None)
    with pytest.raises(CircuitOpen):
        await other
    assert gone.cancelled()


async def test_a_timer_that_comes_early_opens_nothing() -> None:
    """It is set again."""
    gate, backend = new_gate(), Backend(until=5)
    service = await opened(gate, backend)
    opened_at = now()
    service._end_of_pause()
    assert seen(gate).breaker == "open"
    await gate.call(backend)
    assert FIRST_PAUSE[0] <= now() - opened_at <= FIRST_PAUSE[1] + 0.1


# --- keys ---


async def test_a_key_is_forgotten_only_while_its_breaker_is_closed() -> None:
    """One that came back fresh would be asked at full rate again."""
    gate = Gate("g", limit=8, breaker=RULE, retry=Retry(attempts=1), key=lambda key, *_: key)

    async def trip(_key: Hashable, down: bool = False) -> None:
        if down:
            raise status(502)

    for _ in range(4):
        with pytest.raises(HttpStatusError):
            await gate.call(trip, "down", True)
    for number in range(2 * MOST_IDLE_KEYS):
        await gate.call(trip, number)
    assert gate.statistics()["down"].breaker == "open"
    for _ in range(3):
        await gate.call(trip, "down")
    for number in range(2 * MOST_IDLE_KEYS):
        await gate.call(trip, number)
    assert "down" not in gate.statistics()


async def test_each_key_has_a_breaker_of_its_own() -> None:
    gate = Gate("g", limit=8, breaker=RULE, retry=Retry(attempts=1), key=lambda key, *_: key)
    backend = Backend()
    for _ in range(4):
        with pytest.raises(HttpStatusError):
            await _through(gate, "a", backend)
    started = now()
    await _through(gate, "b", Backend(takes=0, until=0))
    assert now() == started
    assert (gate.statistics()["a"].breaker, gate.statistics()["b"].breaker) == ("open", "closed")


async def _through(gate: Gate, key: str, backend: Backend) -> Any:
    async def trip(_key: str) -> str:
        return await backend()

    return await gate.call(trip, key)


# --- cancellation ---


def test_nothing_is_left_behind_by_a_cancel_at_any_step_of_an_outage() -> None:
    """Waiting, probing, opened again, closed."""

    async def scenario(gate: Gate) -> None:
        backend = Backend(until=1.5)
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(gate.call(backend))

    def arrange() -> Gate:
        retry = Retry(attempts=50, timeout=None, wait=0.1, budget=None)
        return Gate("g", limit=2, breaker=Breaker(calls=2, pause=1, probes=2), retry=retry)

    def check(gate: Gate) -> bool:
        after = gate.statistics().get(None)
        return after is None or (after.in_flight, after.waiting, after.deferred) == (0, 0, 0)

    assert cancel_at_every_step(scenario, arrange=arrange, check=check) >= 20


# --- half-open ---

FAST = Breaker(calls=4, pause=10, probes=3, fail_fast=True)


async def half_open(gate: Gate, backend: Backend) -> Service:
    """The breaker of `gate` lets probes through; there are none yet."""
    service = await opened(gate, backend)
    await until(lambda: seen(gate).breaker == "half-open")
    return service


async def test_with_fail_fast_who_comes_beyond_the_probes_fails_at_once() -> None:
    """It would wait for a service of which nobody knows whether it is back."""
    gate, backend = new_gate(FAST), Backend(until=5)
    await half_open(gate, backend)
    backend.takes = 0.5
    (probe,) = await start(lambda: gate.call(backend))
    asked = now()
    with pytest.raises(CircuitOpen) as caught:
        await gate.call(backend)
    assert any("it was not sent" in note for note in caught.value.__notes__)
    permit = gate.permit()
    with pytest.raises(CircuitOpen):
        await permit.__aenter__()
    assert repr(permit) == "<Permit of 'maps' not held>"
    assert now() == asked
    assert await probe == "done"
    async with permit:
        assert seen(gate).in_flight == 1


async def test_a_half_open_key_is_forgotten_unless_a_probe_is_in_flight() -> None:
    """Nothing else is remembered of it that would not be found out again."""
    gate, backend = new_gate(), Backend(until=5)
    service = await opened(gate, backend)
    assert not service.idle
    await until(lambda: seen(gate).breaker == "half-open")
    assert service.idle
    (probe,) = await start(lambda: gate.call(backend))
    assert not service.idle
    await probe
    assert seen(gate).breaker == "half-open"
    assert service.idle


async def test_probes_keep_to_a_number_that_somebody_has_set() -> None:
    """It may be more than a wish: those that hang from before count."""
    gate, backend = new_gate(limit=2, timeout=None), Backend(until=1000)
    slow = Backend(takes=500, until=1000)
    hanging = await start(lambda: gate.call(slow))
    await half_open(gate, backend)
    backend.takes = 100
    tasks = await start(lambda: gate.call(backend), 4)
    for _ in range(20):
        assert seen(gate).in_flight == 2
        await asyncio.sleep(1)
    for task in [*hanging, *tasks]:
        task.cancel()
    await asyncio.wait([*hanging, *tasks])
    assert seen(gate).in_flight == 0


async def test_a_refusal_for_being_asked_too_much_is_a_sign_of_life() -> None:
    gate, backend = new_gate(Breaker(calls=4, pause=10, probes=1)), Backend()
    await half_open(gate, backend)
    backend.error = lambda: status(429)
    with pytest.raises(HttpStatusError, match="429"):
        await gate.call(backend)
    assert seen(gate).breaker == "closed"


async def test_after_a_probe_that_worked_those_that_hang_from_before_it_do_not_count() -> None:
    """The next ones go at once, and what becomes of the old one opens nothing."""
    gate, backend = new_gate(), Backend(until=5)
    await half_open(gate, backend)
    slow = Backend(takes=3, until=1000)
    (hanging,) = await start(lambda: gate.call(slow))
    asked = now()
    assert await gate.call(backend) == "done"
    assert now() - asked == pytest.approx(1.05)  # a second after the first
    tasks = await start(lambda: gate.call(backend), 2)
    await asyncio.gather(*tasks)
    assert now() - asked <= 1.2
    assert seen(gate).breaker == "closed"
    with pytest.raises(HttpStatusError):
        await hanging
    assert (seen(gate).breaker, seen(gate).opened, seen(gate).in_flight) == ("closed", 1, 0)


async def test_a_probe_that_fails_after_one_that_worked_does_not_lengthen_the_pause() -> None:
    gate, backend = new_gate(), Backend(until=5)
    await half_open(gate, backend)
    await gate.call(backend)
    backend.until = 1000
    with pytest.raises(HttpStatusError):
        await gate.call(backend)
    reopened = now()
    await until(lambda: seen(gate).breaker == "half-open")
    assert FIRST_PAUSE[0] <= now() - reopened <= FIRST_PAUSE[1] + 0.1


# --- what is told ---


async def test_the_log_says_that_there_was_no_connection(caplog: pytest.LogCaptureFixture) -> None:
    """Not how few of those attempts failed that the share is taken of."""
    gate, backend = new_gate(Breaker(calls=100, connect_errors=3)), Backend(until=1000, error=unreachable)
    for _ in range(4):
        await gate.call(asyncio.sleep, 0)
    for _ in range(3):
        with pytest.raises(ConnectionFailed):
            await gate.call(backend)
    (line,) = lines(caplog)
    assert "the last 3 attempts found no connection" in line
    assert "of the last 7" not in line


@pytest.mark.parametrize("answered_before", [False, True])
async def test_when_nothing_but_refusals_came_the_log_says_so_once(
    answered_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    gate, backend = new_gate(timeout=None), Backend(until=10_000_000, error=lambda: status(429))
    if answered_before:
        await gate.call(asyncio.sleep, 0)
    for _ in range(45):
        with pytest.raises(HttpStatusError):
            await gate.call(backend)
    told = [line for line in lines(caplog) if "the first 20 answers were all refusals" in line]
    assert len(told) == (not answered_before)


class Forbidden(Exception):
    """An SDK's own error, which it calls permanent though its server says when to come back."""

    failure_kind = FailureKind.PERMANENT
    status = 403
    retry_after = 2.0


async def test_a_refusal_that_an_sdk_calls_permanent_is_raised_as_it_came() -> None:
    """It slows down, but is no refusal among those that are counted."""
    gate, backend = new_gate(), Backend(error=Forbidden)
    for _ in range(2):
        with pytest.raises(Forbidden):
            await gate.call(backend)
    assert seen(gate).failed == {FailureKind.PERMANENT: 2}
    assert seen(gate).in_flight == 0
