"""A permit for a round trip of one's own: how its block is left, what that tells the gate, and what is misuse."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from penstock import CircuitOpen, FailureKind, Gate, HttpStatusError, Rate, Retry, UsageError
from penstock.gate.breaker import Breaker
from penstock.gate.limiter import LimitChange
from penstock.gate.service import KeyStatistics
from penstock.testing import cancel_at_every_step

pytestmark = pytest.mark.virtual_clock

ONCE = Retry(attempts=1)


def now() -> float:
    return asyncio.get_running_loop().time()


def status(code: int, retry_after: float | None = None) -> HttpStatusError:
    return HttpStatusError(code, "GET", "http://h/", b"", retry_after)


async def start(call: Callable[[], Any]) -> "asyncio.Task[Any]":
    """A task that has come as far as it comes at once."""
    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    return task


class Listening:
    """A rule, and its limiter, that only remember what they are told."""

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self.baseline: float | None = None
        self.queue = 0.0
        self.ends: list[tuple[float | None, bool]] = []

    def limiter(self, _now: float, _most: int | None, _rng: random.Random) -> "Listening":
        return self

    def started(self, _now: float) -> int:
        return 7

    def ended(self, mark: int, _now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        assert mark == 7
        self.ends.append((rtt, dropped))
        return None

    def contaminate(self) -> None:
        """Nothing is measured."""

    def half_open(self, _now: float) -> None:
        """The limit stays."""

    def recovered(self, _now: float) -> None:
        """The limit stays."""

    def cap(self, _most: int | None, _now: float) -> None:
        """The limit stays."""


def seen(gate: Gate) -> KeyStatistics:
    return gate.statistics()[None]


# --- how it comes back by itself ---


async def test_a_block_that_is_left_well_has_succeeded_and_its_time_is_a_measurement() -> None:
    limiter = Listening()
    gate = Gate("g", limit=limiter)
    async with gate.permit():
        await asyncio.sleep(2)
    assert limiter.ends == [(2.0, False)]
    assert (seen(gate).succeeded, seen(gate).attempts, seen(gate).failed) == (1, 1, {})
    assert (seen(gate).latency.count, seen(gate).latency.max) == (1, 2)


@pytest.mark.parametrize(
    ("error", "kind", "dropped"),
    [
        (status(429, 5), FailureKind.THROTTLED, True),
        (status(429), FailureKind.THROTTLED, False),  # it is answered by a rate
        (status(503), FailureKind.TRANSIENT, True),
        (ConnectionError(), FailureKind.TRANSIENT, True),
        (TimeoutError(), FailureKind.TRANSIENT, True),
        (status(500), FailureKind.PERMANENT, False),
        (status(404), FailureKind.PERMANENT, False),
        (ValueError(), FailureKind.PERMANENT, False),
        (TypeError(), FailureKind.BUG, False),
    ],
    ids=repr,
)
async def test_a_block_that_is_left_by_an_error_is_judged_by_it(
    error: Exception, kind: FailureKind, dropped: bool
) -> None:
    """Trouble of the service is a drop; all else says nothing about its load, since nobody knows when it answered."""
    limiter = Listening()
    gate = Gate("g", limit=limiter)
    with pytest.raises(type(error)) as caught:
        async with gate.permit():
            await asyncio.sleep(2)
            raise error
    assert caught.value is error
    assert limiter.ends == [(None, dropped)]
    assert (seen(gate).succeeded, seen(gate).failed, seen(gate).in_flight) == (0, {kind: 1}, 0)


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), GeneratorExit(), BaseExceptionGroup("both", [SystemExit()])]
)
async def test_a_block_that_is_left_by_what_is_no_error_says_nothing(error: BaseException) -> None:
    """A cancellation above all: neither success nor failure."""
    limiter = Listening()
    gate = Gate("g", limit=limiter)
    with pytest.raises(type(error)):
        async with gate.permit():
            raise error
    assert limiter.ends == [(None, False)]
    assert (seen(gate).succeeded, seen(gate).failed, seen(gate).in_flight) == (0, {}, 0)


async def test_an_error_that_says_when_to_come_back_pauses_the_key() -> None:
    """If it is a refusal for being too many, as for a call."""
    gate = Gate("g", limit=4)
    with pytest.raises(HttpStatusError):
        async with gate.permit():
            raise status(429, 10)
    started = now()
    async with gate.permit():
        assert 10 <= now() - started <= 11
    with pytest.raises(HttpStatusError):
        async with gate.permit():
            raise status(404, 10)
    assert seen(gate).paused_for == 0


# --- what is said of it ---


async def test_what_is_ignored_is_no_measurement_however_the_block_ends() -> None:
    limiter = Listening()
    gate = Gate("g", limit=limiter)
    async with gate.permit() as permit:
        permit.ignore()
    with pytest.raises(HttpStatusError):
        async with gate.permit() as permit:
            permit.ignore()
            raise status(429, 10)
    assert limiter.ends == [(None, False)] * 2
    assert (seen(gate).succeeded, seen(gate).failed, seen(gate).paused_for) == (0, {}, 0)


@pytest.mark.parametrize("error", [None, ValueError(), asyncio.CancelledError()], ids=repr)
async def test_what_is_dropped_is_throttled_however_the_block_ends(error: BaseException | None) -> None:
    limiter = Listening()
    gate = Gate("g", limit=limiter)
    with suppress(ValueError, asyncio.CancelledError):
        async with gate.permit() as permit:
            permit.drop()
            if error is not None:
                raise error
    assert limiter.ends == [(None, False)]  # it is answered by a rate
    assert (seen(gate).succeeded, seen(gate).failed) == (0, {FailureKind.THROTTLED: 1})
    assert (seen(gate).paused_for, seen(gate).in_flight) == (0, 0)


async def test_a_drop_may_ask_for_a_pause() -> None:
    """Of the whole key, a little longer than said; those who come later wait."""
    gate = Gate("g", limit=4)
    async with gate.permit() as permit:
        permit.drop(retry_after=10)
    assert 10 <= seen(gate).paused_for <= 11
    assert seen(gate).failed == {FailureKind.THROTTLED: 1}
    started = now()
    async with gate.permit():
        assert 10 <= now() - started <= 11


async def test_the_last_word_counts() -> None:
    limiter = Listening()
    gate = Gate("g", limit=limiter)
    async with gate.permit() as permit:
        permit.drop(retry_after=10)
        permit.ignore()
    async with gate.permit() as permit:
        permit.ignore()
        permit.drop()
    assert limiter.ends == [(None, False), (None, False)]
    assert seen(gate).failed == {FailureKind.THROTTLED: 1}
    assert seen(gate).paused_for == 0


async def test_what_was_said_the_time_before_is_forgotten() -> None:
    limiter = Listening()
    gate = Gate("g", limit=limiter)
    permit = gate.permit()
    async with permit:
        permit.drop(retry_after=10)
    async with permit:
        await asyncio.sleep(1)
    assert limiter.ends == [(None, True), (1.0, False)]
    assert seen(gate).paused_for == 0


async def test_a_permit_says_how_it_stands() -> None:
    permit = Gate("maps", limit=1).permit()
    assert repr(permit) == "<Permit of 'maps' not held>"
    async with permit:
        assert repr(permit) == "<Permit of 'maps' held>"
        permit.ignore()
        assert repr(permit) == "<Permit of 'maps' ignored>"
        permit.drop()
        assert repr(permit) == "<Permit of 'maps' dropped>"
    assert repr(permit) == "<Permit of 'maps' not held>"


# --- misuse ---


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "10", True, 3_601], ids=repr)
async def test_a_pause_that_is_no_time_is_refused(seconds: Any) -> None:
    """And the permit stays as it was."""
    gate = Gate("g", limit=1)
    async with gate.permit() as permit:
        with pytest.raises(UsageError, match=r"retry_after=.*: expected seconds from 0 to 3600, or None"):
            permit.drop(retry_after=seconds)
    assert seen(gate).succeeded == 1


@pytest.mark.parametrize(
    "say",
    [lambda permit: permit.ignore(), lambda permit: permit.drop(), lambda permit: permit.settle({})],
    ids=["ignore", "drop", "settle"],
)
async def test_nothing_can_be_said_of_a_permit_that_is_not_held(say: Callable[[Any], object]) -> None:
    """Neither before its block nor after it."""
    permit = Gate("g", limit=1).permit()
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r"this permit is not held\. Call this inside `async with gate\.permit\(\)"
        ):
            say(permit)
        async with permit:
            pass


async def test_a_permit_that_is_not_held_cannot_be_left() -> None:
    with pytest.raises(UsageError, match="not held"):
        await Gate("g", limit=1).permit().__aexit__(None, None, None)


async def test_a_permit_that_could_not_be_had_can_be_entered_again() -> None:
    """After a wait that was given up, and after a refusal."""
    gate = Gate("g", limit=1, breaker=Breaker(calls=1, pause=1, probes=1, fail_fast=True), retry=ONCE)
    permit = gate.permit()
    async with gate.permit():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await permit.__aenter__()
    with pytest.raises(HttpStatusError):
        await gate.call(_fail)
    with pytest.raises(CircuitOpen):
        await permit.__aenter__()
    await asyncio.sleep(2)
    async with permit:
        assert seen(gate).in_flight == 1


async def _fail() -> None:
    raise status(503)


async def test_who_waits_for_a_permit_is_sent_away_when_the_breaker_opens_to_fail_fast() -> None:
    gate = Gate("g", limit=1, breaker=Breaker(calls=1, fail_fast=True), retry=ONCE)
    failing = await start(lambda: gate.call(_fail))
    permit = gate.permit()
    with pytest.raises(CircuitOpen):
        await permit.__aenter__()
    assert repr(permit) == "<Permit of 'g' not held>"
    assert isinstance(failing.exception(), HttpStatusError)


# --- cancellation ---


@pytest.mark.parametrize("said", [None, "ignored", "dropped"])
def test_a_cancel_at_any_step_gives_the_permit_back(said: str | None) -> None:
    """While it waits for a pause, for the rate, for its turn; held; on its way out."""

    async def hold(gate: Gate) -> None:
        async with gate.permit(weight=2) as permit:
            if said == "ignored":
                permit.ignore()
            if said == "dropped":
                permit.drop(retry_after=0.5)
            permit.settle({"requests": 1})
            await asyncio.sleep(0.1)

    async def scenario(gate: Gate) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(hold(gate))

    def check(gate: Gate) -> bool:
        after = gate.statistics().get(None)
        return after is None or (after.in_flight, after.waiting) == (0, 0)

    def arrange() -> Gate:
        return Gate("g", limit=2, rate=Rate(2, burst=2))

    assert cancel_at_every_step(scenario, arrange=arrange, check=check) >= 8


# --- a limit that is somebody else's rule, and fails ---


class Failing(Listening):
    """A rule with a mistake in it."""

    def __init__(self, where: str) -> None:
        super().__init__(limit=1)
        self.where = where

    def started(self, now: float) -> int:
        if self.where == "started":
            raise ZeroDivisionError
        return super().started(now)

    def ended(self, mark: int, now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        if self.where == "ended":
            raise ZeroDivisionError
        return super().ended(mark, now, rtt, dropped)


@pytest.mark.parametrize("where", ["started", "ended"])
@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
async def test_a_mistake_of_a_rule_leaks_no_permit_of_a_call(where: str, fails: bool, threaded: bool) -> None:
    """Whoever comes next waits for nobody."""
    gate = Gate("g", limit=Failing(where), retry=ONCE)

    def in_thread() -> None:
        if fails:
            raise status(503)

    async def in_loop() -> None:
        in_thread()

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await gate.call(in_thread if threaded else in_loop)
        async with asyncio.timeout(10):
            while seen(gate).in_flight:  # the thread says so itself
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("where", ["started", "ended"])
@pytest.mark.parametrize("error", [None, status(503), asyncio.CancelledError()], ids=["works", "fails", "cancelled"])
async def test_a_mistake_of_a_rule_leaks_no_permit_of_a_block(where: str, error: BaseException | None) -> None:
    gate = Gate("g", limit=Failing(where), retry=ONCE)
    permit = gate.permit()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with permit:
                if error is not None:
                    raise error
        assert seen(gate).in_flight == 0
        assert repr(permit) == "<Permit of 'g' not held>"


# --- what a server tells ---


async def test_a_block_may_hand_on_what_the_server_says_of_its_rates() -> None:
    gate = Gate("g", retry=ONCE)
    async with gate.permit() as permit:
        permit.learn({"Content-Type": "text/plain"})
        assert seen(gate).tokens == {}
        permit.learn({"X-RateLimit-Limit": "10", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "30"})
    asked = now()
    async with gate.permit():
        assert 25 <= now() - asked <= 40
    with pytest.raises(UsageError, match="not held"):
        permit.learn({})
