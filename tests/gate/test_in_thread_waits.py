"""A call that a thread waits for, on the place of that thread: rates, pauses and breaker hold for it as well."""

import asyncio
from collections.abc import Callable

import pytest

from penstock import CircuitOpen, Executor, Gate, HttpStatusError, Rate, Retry
from penstock.gate.breaker import Breaker
from penstock.testing import cancel_at_every_step

pytestmark = pytest.mark.virtual_clock

ONCE = Retry(attempts=1)


def nothing() -> None:
    """A call that works."""


class Failing:
    """A blocking function that fails once."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


async def nested(gate: Gate, times: int, inner: Callable[[], None] = nothing) -> list[float]:
    """When the calls started that a call waited for, one after the other, on its place."""
    loop = asyncio.get_running_loop()
    began, at = loop.time(), list[float]()

    def work() -> None:
        at.append(loop.time() - began)
        inner()

    def outer() -> None:
        for _ in range(times):
            executor.from_thread(gate.call, work)

    async with Executor() as executor:
        await gate.call(outer)
    seen = gate.statistics()[None]
    assert (seen.in_flight, seen.waiting) == (0, 0)
    return at


async def test_the_rate_holds_on_a_place_that_is_lent() -> None:
    """A thread that asks again and again would be bound by nothing otherwise."""
    gate = Gate("g", limit=1, rate=Rate(1, burst=2), retry=ONCE, breaker=None)
    assert await nested(gate, 5) == pytest.approx([0, 1, 2, 3, 4])


async def test_a_pause_holds_on_a_place_that_is_lent() -> None:
    gate = Gate("g", limit=1, retry=Retry(wait=0), breaker=None)
    first, second = await nested(gate, 1, Failing(HttpStatusError(429, "GET", "/", b"", 10.0)))
    assert 10 <= second - first <= 11


async def test_an_open_breaker_holds_on_a_place_that_is_lent() -> None:
    gate = Gate("g", limit=1, retry=Retry(wait=0), breaker=Breaker(calls=1, pause=10, probes=1))
    first, second = await nested(gate, 1, Failing(HttpStatusError(503, "GET", "/", b"", None)))
    assert 8 <= second - first <= 12


async def test_who_waits_on_a_place_that_is_lent_is_refused_when_the_breaker_opens_to_fail_fast() -> None:
    gate = Gate("g", limit=1, rate=Rate(1, burst=1), retry=ONCE, breaker=Breaker(calls=1, fail_fast=True))
    service = gate.service(None)

    def fail() -> None:
        service.end_badly(service.start(service.now(), False), HttpStatusError(503, "GET", "/", b"", None), None, None)

    asyncio.get_running_loop().call_later(0.5, fail)
    with pytest.raises(CircuitOpen):
        await nested(gate, 1)
    assert service.in_flight == 0


def test_nothing_is_left_behind_by_a_cancel_at_any_step_of_waiting_on_a_place_that_is_lent() -> None:
    """The thread goes on, and its place is its own again."""

    async def scenario(gate: Gate) -> None:
        await nested(gate, 2, Failing(HttpStatusError(429, "GET", "/", b"", 1.0)))

    def check(gate: Gate) -> None:
        after = gate.statistics().get(None)
        assert after is None or (after.in_flight, after.waiting, after.abandoned_calls) == (0, 0, ())

    def arrange() -> Gate:
        return Gate("g", limit=1, rate=Rate(1, burst=1), retry=Retry(wait=0.1), breaker=None)

    assert cancel_at_every_step(scenario, arrange=arrange, check=check) >= 5
