"""Rates as a gate keeps them: how many start in a time, in what order, and what they pay and get back."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest

from penstock import AttemptTimeout, ConnectionFailed, Executor, Gate, HttpStatusError, Rate, Retry, UsageError
from penstock.clients.blocking import BlockingClient
from penstock.gate.gate import _AsyncCall
from penstock.gate.service import KeyStatistics
from penstock.testing import cancel_at_every_step

pytestmark = pytest.mark.virtual_clock

ONCE = Retry(attempts=1)
TWO = {"requests": Rate(10, per=1, burst=10), "tokens": Rate(100, per=1, burst=100)}
"""Ten requests and a hundred tokens a second, and as many at once."""


def now() -> float:
    return asyncio.get_running_loop().time()


def refused(retry_after: float | None = None) -> HttpStatusError:
    return HttpStatusError(429, "GET", "http://h/", b"", retry_after)


class Starts:
    """An async function that notes when it was called, from the first use on."""

    def __init__(self, *errors: Exception, takes: float = 0.0) -> None:
        self.began = now()
        self.errors = list(errors)
        self.takes = takes
        self.at: list[float] = []
        self.names: list[Any] = []

    async def __call__(self, name: Any = None, **_: Any) -> Any:
        self.at.append(now() - self.began)
        self.names.append(name)
        await asyncio.sleep(self.takes)
        if self.errors:
            raise self.errors.pop(0)
        return name


async def start(call: Callable[[], Any]) -> "asyncio.Task[Any]":
    """A task that has come as far as it comes at once."""
    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    return task


def seen(gate: Gate) -> KeyStatistics:
    return gate.statistics()[None]


def keeps(at: list[float], rate: Rate) -> bool:
    """In no stretch of time there are more starts than the rate and its burst allow."""
    return all(
        number + 1 <= rate.amount * (later - earlier) / rate.per + rate.size + 0.001
        for first, earlier in enumerate(at)
        for number, later in enumerate(at[first:])
    )


def new_gate(rate: Any, limit: int = 100, retry: Retry = ONCE, **options: Any) -> Gate:
    return Gate("maps", limit=limit, rate=rate, retry=retry, breaker=None, **options)


def sized(gate_options: Mapping[str, Any] | None = None) -> Gate:
    """A gate whose calls say how many tokens they take."""
    return new_gate(TWO, weight=lambda name, tokens=0: {"tokens": tokens}, **(gate_options or {}))


# --- the rate is kept ---

RATE = Rate(10, per=1, burst=3)


async def test_calls_start_at_the_rate_and_no_slower() -> None:
    """After the burst."""
    gate, trip = new_gate(RATE), Starts(takes=5)
    await asyncio.gather(*[gate.call(trip) for _ in range(43)])
    assert keeps(trip.at, RATE)
    assert trip.at[-1] == pytest.approx(4)


async def test_permits_start_at_the_rate() -> None:
    gate, trip = new_gate(RATE), Starts()

    async def by_permit() -> None:
        async with gate.permit():
            await trip()

    await asyncio.gather(*[by_permit() for _ in range(43)])
    assert keeps(trip.at, RATE)
    assert trip.at[-1] == pytest.approx(4)


async def test_blocking_calls_start_at_the_rate() -> None:
    """With a thread each."""
    gate, began, at = new_gate(RATE, limit=4), now(), list[float]()
    loop = asyncio.get_running_loop()
    await asyncio.gather(*[gate.call(lambda: at.append(loop.time() - began)) for _ in range(23)])
    assert keeps(at, RATE)
    assert at[-1] == pytest.approx(2)


async def test_retries_count_like_first_attempts() -> None:
    """A service that fails is not asked more often for that."""
    gate = new_gate(RATE, retry=Retry(attempts=5, wait=0, budget=None))
    trips = [Starts(ConnectionError(), ConnectionError()) for _ in range(10)]
    await asyncio.gather(*[gate.call(trip) for trip in trips])
    assert len(at := sorted(start for trip in trips for start in trip.at)) == 30
    assert keeps(at, RATE)
    assert at[-1] == pytest.approx(2.7)


async def test_calls_of_an_sdk_start_at_its_rate() -> None:
    loop, at = asyncio.get_running_loop(), list[float]()
    began = now()

    class Sdk:
        def ask(self, size: int = 1) -> int:
            at.append(loop.time() - began)
            return size

    async with BlockingClient(
        Sdk,
        limit=4,
        rate=RATE,
        breaker=None,
        weight=lambda _method, size=1: size,
        used=lambda size: {"requests": size / 2},
    ) as sdk:
        await asyncio.gather(*[sdk.call("ask") for _ in range(13)])
        assert keeps(at[:3], RATE)
        assert 0.3 <= at[-1] < 1  # what they had not used came back
        assert sdk.rate == RATE


async def test_two_rates_hold_at_once() -> None:
    """What is not used of one is not lost to the other."""
    gate, trip = sized(), Starts()
    await asyncio.gather(*[gate.call(trip, number, tokens=50) for number in range(8)])
    assert trip.at == pytest.approx([0, 0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    await asyncio.sleep(10)
    light = Starts()
    await asyncio.gather(*[gate.call(light, number, tokens=1) for number in range(30)])
    assert light.at[-1] == pytest.approx(2)


# --- order ---


async def test_a_heavy_call_is_not_overtaken_by_light_ones_that_come_later() -> None:
    """They would take what it saves for, for ever."""
    gate, trip = sized(), Starts()
    await gate.call(trip, "before", tokens=100)
    tasks = [await start(lambda: gate.call(trip, "heavy", tokens=90))]
    for number in range(5):
        tasks.append(await start(lambda number=number: gate.call(trip, number, tokens=1)))  # type: ignore[misc]
        await asyncio.sleep(0.05)
    await asyncio.gather(*tasks)
    assert trip.names == ["before", "heavy", 0, 1, 2, 3, 4]
    assert trip.at[1] == pytest.approx(0.9)


async def test_a_heavy_call_that_leaves_lets_the_light_ones_go_at_once() -> None:
    """It has taken nothing, of any rate."""
    gate, trip = sized(), Starts()
    await gate.call(trip, "before", tokens=95)
    heavy = await start(lambda: gate.call(trip, "heavy", tokens=90))
    light = await start(lambda: gate.call(trip, "light", tokens=5))
    assert (seen(gate).waits_for, seen(gate).waiting) == ("rate", 2)
    assert seen(gate).tokens == {"requests": pytest.approx(9), "tokens": pytest.approx(5)}
    heavy.cancel()
    await light
    assert trip.at == [0, 0]


async def test_more_than_a_burst_waits_for_a_full_bucket_and_is_paid_off_later() -> None:
    """On average the rate is kept all the same."""
    gate, trip = new_gate({"tokens": Rate(100, per=1, burst=10)}, weight=lambda tokens: {"tokens": tokens}), Starts()
    for tokens in (10, 100, 10):
        await gate.call(trip, tokens)
    assert trip.at == pytest.approx([0, 0.1, 1.1])


async def test_who_waits_for_tokens_holds_no_permit() -> None:
    """And when both are scarce, both are waited for."""
    gate, trip = new_gate(Rate(1, burst=1), limit=1), Starts(takes=3)
    tasks = [await start(lambda: gate.call(trip)) for _ in range(2)]
    await asyncio.sleep(0.5)
    assert (seen(gate).in_flight, seen(gate).waits_for) == (1, "permit")
    await asyncio.sleep(3)
    assert seen(gate).in_flight == 1
    await asyncio.gather(*tasks)
    assert trip.at == pytest.approx([0, 3])


async def test_who_waits_in_vain_is_told_that_it_is_the_rate() -> None:
    gate, trip = new_gate(Rate(1, per=60), retry=Retry(timeout=5)), Starts()
    await gate.call(trip)
    with pytest.raises(
        TimeoutError, match=r"got no permit of gate 'maps' in 5 s: the rate of 'requests' \(1 in 60 s\), for another 55"
    ):
        await gate.call(trip)


# --- what never fits ---


@pytest.mark.parametrize(
    "weight",
    [{"tokens": 101}, {"tokens": -1}, {"tokens": float("nan")}, {"words": 1}, {"tokens": "many"}, 11, {"requests": 11}],
    ids=str,
)
async def test_a_weight_that_will_never_fit_is_refused_at_once(weight: Any) -> None:
    """Otherwise it would wait for ever, and everybody behind it."""
    gate = new_gate(TWO, weight=lambda: weight)
    with pytest.raises(UsageError, match="weight"):
        await gate.call(Starts())
    with pytest.raises(UsageError, match="weight"):
        await gate.permit(weight=weight).__aenter__()
    assert all((key.in_flight, key.waiting) == (0, 0) for key in gate.statistics().values())
    async with gate.permit():
        assert seen(gate).in_flight == 1


async def test_a_mistake_of_the_weight_function_takes_nothing() -> None:
    """It is the caller's own error, unchanged."""
    gate = new_gate(TWO, weight=lambda name: {"tokens": {"a": 1}[name]})
    with pytest.raises(KeyError):
        await gate.call(Starts(), "b")
    assert gate.statistics() == {}


@pytest.mark.parametrize("option", ["weight", "used"])
async def test_what_is_no_plain_function_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}=.*expected a function that is given"):
        Gate("g", **{option: 5})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"{option}=.*expected a function that is given"):
        Gate("g", **{option: Starts()})  # type: ignore[arg-type]


# --- what was taken is put right ---


async def test_what_a_call_has_not_used_is_given_back() -> None:
    """By `used`; who waits for it goes on at once."""
    gate, trip = sized({"used": lambda name: {"tokens": 10} if name == "first" else None}), Starts(takes=0.1)
    tasks = [await start(lambda name=name: gate.call(trip, name, tokens=90)) for name in ("first", "second")]  # type: ignore[misc]
    await asyncio.gather(*tasks)
    assert trip.at == pytest.approx([0, 0.1])  # 10 + 10 in the meantime + 80


async def test_what_a_call_has_used_beyond_is_taken_then() -> None:
    """Later ones wait for it; also of a rate that was not reserved."""
    gate, trip = new_gate(TWO, used=lambda _: {"tokens": 150}), Starts()
    await gate.call(trip)
    assert seen(gate).tokens["tokens"] == pytest.approx(-50)
    await gate.call(trip)
    assert trip.at == pytest.approx([0, 0])  # it takes no tokens as far as anybody knows
    heavy = sized({"used": lambda _: {"tokens": 150}})
    for _ in range(2):
        await heavy.call(trip, None, tokens=100)
    assert trip.at[2:] == pytest.approx([0, 1.5])


async def test_a_permit_is_put_right_by_its_block() -> None:
    """As often as it likes; what it does not name stays as it was reserved."""
    gate = new_gate(TWO)
    async with gate.permit(weight={"tokens": 80}) as permit:
        permit.settle({"tokens": 30})
        assert seen(gate).tokens == {"requests": pytest.approx(9), "tokens": pytest.approx(70)}
        permit.settle({"tokens": 40, "requests": 2})
        assert seen(gate).tokens == {"requests": pytest.approx(8), "tokens": pytest.approx(60)}
    assert seen(gate).tokens == {"requests": pytest.approx(8), "tokens": pytest.approx(60)}


async def test_a_permit_that_is_used_again_reserves_what_was_asked_for() -> None:
    """Not what the time before had used."""
    gate = new_gate(TWO)
    permit = gate.permit(weight={"tokens": 80})
    async with permit:
        permit.settle({"tokens": 1})
    await asyncio.sleep(10)
    async with permit:
        assert seen(gate).tokens["tokens"] == pytest.approx(20)
        permit.settle({"tokens": 30})
        assert seen(gate).tokens["tokens"] == pytest.approx(70)


async def test_what_is_given_back_reaches_who_waits_for_it() -> None:
    """Without anybody else having to come by."""
    gate = new_gate(TWO)
    async with gate.permit(weight={"tokens": 100}) as permit:
        waiting = await start(lambda: gate.permit(weight={"tokens": 50}).__aenter__())
        permit.settle({"tokens": 10})
        started = now()
        await waiting
        assert now() == started


async def test_a_gate_without_rates_settles_nothing() -> None:
    gate = Gate("g", limit=1, used=lambda _: {"tokens": 5})
    assert await gate.call(Starts(), "done") == "done"
    async with gate.permit(weight=5) as permit:
        permit.settle({"tokens": 5})
    assert seen(gate).tokens == {}


@pytest.mark.parametrize("rate", [None, TWO], ids=["without rates", "with rates"])
@pytest.mark.parametrize("used", [5, {"tokens": -1}, {"tokens": "many"}, {"tokens": float("nan")}], ids=str)
async def test_what_cannot_have_been_used_loses_no_answer(
    used: Any, rate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It has been paid for. The log has it once; a permit of one's own says so at once."""
    gate = new_gate(rate, used=lambda _: used)
    for _ in range(2):
        assert await gate.call(Starts(), "done") == "done"
    assert seen(gate).in_flight == 0
    (told,) = caplog.records
    assert "used= failed, so the call counts as what was reserved" in told.message
    assert "expected amounts by the names of the rates, such as {'tokens'" in str(told.exc_info and told.exc_info[1])
    async with gate.permit() as permit:
        with pytest.raises(UsageError, match="used="):
            permit.settle(used)


async def test_a_mistake_of_the_used_function_loses_no_answer() -> None:
    gate = new_gate(TWO, used=lambda value: value["usage"])
    assert await gate.call(Starts(), 5) == 5
    assert await gate.call(lambda: 5) == 5
    await asyncio.sleep(0.001)
    assert seen(gate).in_flight == 0


# --- what was refused ---


def unsent() -> ConnectionFailed:
    return ConnectionFailed("GET", "http://h/", "refused", False)


@pytest.mark.parametrize("way", ["call", "permit"])
@pytest.mark.parametrize(
    ("error", "left"),
    [(refused(), (9, 100)), (unsent(), (10, 100)), (ConnectionError(), (9, 50)), (ValueError(), (9, 50))],
    ids=["refused", "never sent", "lost", "unknown"],
)
async def test_who_was_refused_gets_back_what_it_has_not_used(
    error: Exception, left: tuple[int, int], way: str
) -> None:
    """A 429 has cost its request and nothing else; what never left has cost nothing; of the rest nobody knows."""
    gate = sized()
    with pytest.raises(type(error)):
        if way == "call":
            await gate.call(Starts(error), None, tokens=50)
        else:
            async with gate.permit(weight={"tokens": 50}):
                raise error
    tokens = seen(gate).tokens
    assert (tokens["requests"], tokens["tokens"]) == pytest.approx(left)


async def test_a_permit_that_is_said_to_be_dropped_is_given_back_as_well() -> None:
    """Unless its block has said what it has used."""
    gate = sized()
    for used, left in ((None, 100), (20, 80)):
        async with gate.permit(weight={"tokens": 50}) as permit:
            if used is not None:
                permit.settle({"tokens": used})
            permit.drop()
        assert seen(gate).tokens["tokens"] == pytest.approx(left)


async def test_a_refusal_has_cost_all_requests_that_it_was_to_count_for() -> None:
    gate = new_gate(TWO)
    with pytest.raises(HttpStatusError):
        async with gate.permit(weight={"requests": 3, "tokens": 50}):
            raise refused()
    tokens = seen(gate).tokens
    assert (tokens["requests"], tokens["tokens"]) == pytest.approx((7, 100))


async def test_a_plain_request_that_never_left_is_not_counted() -> None:
    """Its retry need not wait for the next minute."""
    gate, trip = new_gate(Rate(1, per=60), retry=Retry(wait=1)), Starts(unsent())
    await gate.call(trip)
    assert trip.at == [0, 1]


async def test_what_a_refused_one_gives_back_lets_nobody_through_before_the_pause_that_it_was_told() -> None:
    """The next in line waits for tokens, and would be refused as well."""
    gate, trip = sized(), Starts(refused(10.0), takes=0.2)
    first = await start(lambda: gate.call(trip, "first", tokens=100))
    second = await start(lambda: gate.call(trip, "second", tokens=50))
    await asyncio.wait([first])
    assert isinstance(first.exception(), HttpStatusError)
    await second
    assert 10 <= trip.at[1] <= 11.5


# --- cancellation ---


def test_a_cancel_at_any_step_leaves_nobody_waiting_and_nothing_held() -> None:
    """Tokens that were taken are spent at the most; those of who never got any are not."""

    async def scenario(gate: Gate) -> None:
        trip = Starts(ConnectionError(), takes=0.1)

        async def by_permit() -> None:
            async with gate.permit(weight={"tokens": 50}) as permit:
                permit.settle({"tokens": 40})
                await trip()

        async with asyncio.TaskGroup() as group:
            for number in range(2):
                group.create_task(gate.call(trip, number, tokens=60))
            group.create_task(by_permit())

    def arrange() -> Gate:
        return sized({"limit": 2, "retry": Retry(attempts=3, wait=0.1), "used": lambda _: {"tokens": 30}})

    def check(gate: Gate) -> bool:
        after = gate.statistics().get(None)
        return after is None or (after.in_flight, after.waiting, after.deferred) == (0, 0, 0)

    assert cancel_at_every_step(scenario, arrange=arrange, check=check) >= 10


# --- inside a job ---


async def test_a_job_knows_how_long_it_has_waited_for_the_rate() -> None:
    gate = new_gate(Rate(1, per=2))

    async def job(_item: int) -> None:
        await gate.call(asyncio.sleep, 0)

    async with Executor() as executor, executor.as_completed(job, [1, 2]) as stream:
        waited = [outcome.waited async for outcome in stream]
    assert waited == pytest.approx([0, 2])


# --- tokens that are not used ---


async def test_who_is_cancelled_in_the_tick_of_its_admission_gives_its_tokens_back() -> None:
    gate = new_gate(TWO, limit=1, weight=lambda _name, tokens: {"tokens": tokens})
    async with gate.permit():
        waiting = await start(lambda: gate.call(Starts(), "a", tokens=60))
        assert seen(gate).waiting == 1
    assert seen(gate).tokens["tokens"] == pytest.approx(40)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert seen(gate).tokens == {"requests": pytest.approx(9), "tokens": pytest.approx(100)}
    assert seen(gate).in_flight == 0


@pytest.mark.parametrize("rate", [None, TWO], ids=["without rates", "with rates"])
async def test_an_attempt_that_could_not_start_in_time_gives_its_tokens_back(rate: Any) -> None:
    """A loop that lags may find a permit free after the end of the call's time."""
    gate = new_gate(rate, retry=Retry(timeout=5))
    trip = _AsyncCall(Starts(), (), {})
    trip.weight = None if rate is None else {"tokens": 60}
    with pytest.raises(AttemptTimeout, match="could not start in time"):
        await gate.begin(trip, gate.service(None), asked=now() - 5)
    assert (seen(gate).in_flight, seen(gate).attempts) == (0, 0)
    assert seen(gate).tokens == ({} if rate is None else {"requests": 10, "tokens": 100})


# --- what a server tells ---


@pytest.mark.parametrize(("retry_after", "searched"), [(None, True), (0, True), (0.001, True), (2, False)])
async def test_a_refusal_that_says_come_back_at_once_says_nothing(retry_after: float | None, searched: bool) -> None:
    """The rate is searched for then, as it is where there is no hint at all."""
    gate = new_gate(None)
    trip = Starts(*[refused(retry_after)] * 3)
    for _ in range(3):
        with pytest.raises(HttpStatusError):
            await gate.call(trip)
    tokens = gate.service(None).tokens
    assert tokens is not None
    assert tokens.searching is searched


NONE_LEFT = {"X-RateLimit-Limit": "10", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "30"}


class Answer:
    """What an HTTP library returns."""

    def __init__(self, headers: Any) -> None:
        self.headers = headers


class Refusal(Exception):
    """An error of an SDK's own, which carries the headers of its answer."""

    headers = NONE_LEFT


@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
@pytest.mark.parametrize("raised", [False, True], ids=["returned", "raised"])
async def test_headers_that_an_answer_or_an_error_carries_are_obeyed(threaded: bool, raised: bool) -> None:
    """Of any library: they are only asked for by name."""
    gate = new_gate(None)

    def in_thread() -> Answer:
        if raised:
            raise Refusal
        return Answer(NONE_LEFT)

    async def in_loop() -> Answer:
        return in_thread()

    with suppress(Refusal):
        await gate.call(in_thread if threaded else in_loop)
    trip = Starts()
    await gate.call(trip)
    assert 25 <= trip.at[0] <= 40


class Touchy:
    """Its headers cannot be had."""

    @property
    def headers(self) -> Any:
        raise ValueError


class TouchyMapping(dict[str, str]):
    def __iter__(self) -> Any:
        raise ValueError


@pytest.mark.parametrize(
    "value", [Touchy(), Answer(TouchyMapping(NONE_LEFT)), Answer({1: 2}), Answer([1]), Answer(None), 5, None, NONE_LEFT]
)
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
async def test_no_answer_is_lost_over_its_headers(value: Any, threaded: bool) -> None:
    gate = new_gate(None)

    async def in_loop() -> Any:
        return value

    assert await gate.call((lambda: value) if threaded else in_loop) is value
    assert seen(gate).tokens == {}
    assert seen(gate).succeeded == 1
