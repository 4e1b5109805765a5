"""What a gate knows of one key: what is shown of it, what the loop and the server make it do, and that none is lost."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock import Executor, FailureKind, Gate, HttpStatusError, Rate, Retry, UsageError, WrongLoop
from penstock.gate.breaker import Breaker
from penstock.gate.guard import guard_of
from penstock.gate.limiter import LimitChange
from penstock.gate.rate import Meter
from penstock.gate.server_hints import Policy, ServerHints
from penstock.gate.service import ONE_CHANGE, PROCESSING, REMEMBERED_CHANGES, KeyStatistics, Rules, Service
from penstock.permits import PermitQueue
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step, run_in_virtual_time

ONCE = Retry(attempts=1)


def now() -> float:
    return asyncio.get_running_loop().time()


class Dial:
    """A rule and its limiter: a number that the test sets, and what it was told."""

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self.baseline: float | None = None
        self.queue = 0.0
        self.told: list[str] = []
        self.samples: list[float | None] = []
        self.reason: Any = None
        """Why it changes at the next end; None: it does not say so."""

    def limiter(self, _now: float, _most: int | None, _rng: random.Random) -> "Dial":
        return self

    def started(self, _now: float) -> int:
        return 1

    def ended(self, _mark: int, now: float, rtt: float | None, _dropped: bool) -> LimitChange | None:
        self.samples.append(rtt)
        return None if self.reason is None else LimitChange(now, 0, self.limit, self.reason)

    def contaminate(self) -> None:
        self.told.append("contaminated")

    def half_open(self, _now: float) -> None:
        self.told.append("half-open")

    def recovered(self, _now: float) -> None:
        self.told.append("recovered")

    def cap(self, most: int | None, _now: float) -> None:
        self.told.append(f"cap {most}")
        self.limit = self.limit if most is None else min(self.limit, most)


def new_service(limit: Any = 4, rate: Any = None, breaker: Breaker | None = None, most: int | None = None) -> Service:
    rules = Rules(limit, rate, breaker, 0.1, most)
    return Service(asyncio.get_running_loop(), "g", rules, random.Random(1))


def seen(gate: Gate) -> KeyStatistics:
    return gate.statistics()[None]


async def start(call: Callable[[], Any], times: int = 1) -> "list[asyncio.Task[Any]]":
    """Tasks that have come as far as they come at once."""
    tasks = [asyncio.create_task(call()) for _ in range(times)]
    await settled()
    return tasks


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def attempt(service: Service, *, rtt: float | None = None) -> None:
    """One that works at once."""
    service.end_well(service.start(service.now(), False), service.now(), rtt)


def hints(*policies: Policy) -> ServerHints:
    return ServerHints(None, policies)


def at_most_in_flight(number: float | None) -> ServerHints:
    return hints(Policy("c", number, None, None, None, "concurrent-requests"))


# --- what is shown ---


@pytest.mark.virtual_clock
async def test_a_key_of_which_nothing_is_known_shows_nothing() -> None:
    shown = new_service(limit=3).statistics()
    assert (shown.limit, shown.baseline, shown.queue) == (3, None, 0.0)
    assert (shown.in_flight, shown.waiting, shown.waits_for, shown.waited, shown.paused_for) == (0, 0, None, {}, 0)
    assert (shown.deferred, shown.tokens, shown.budget, shown.breaker, shown.opened) == (0, {}, 10.0, None, 0)
    assert (shown.attempts, shown.retries, shown.succeeded, shown.failed) == (0, 0, 0, {})
    assert (shown.changes, shown.reasons, shown.abandoned_calls, shown.latency.count) == ((), {}, (), 0)


@pytest.mark.virtual_clock
async def test_a_limit_that_was_measured_shows_by_what() -> None:
    dial = Dial(7)
    dial.baseline, dial.queue = 0.25, 2.5
    shown = new_service(dial).statistics()
    assert (shown.limit, shown.baseline, shown.queue) == (7, 0.25, 2.5)


@pytest.mark.virtual_clock
async def test_it_shows_for_what_the_first_in_line_waits() -> None:
    """One word for each reason; a pause and those who hold back come before the rest."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    gate = Gate("g", limit=1, rate=Rate(1, burst=1), breaker=Breaker(), retry=ONCE)
    (first,) = await start(lambda: gate.call(asyncio.sleep, 0.5))
    waiting = await start(lambda: gate.call(asyncio.sleep, 0.5), 3)
    assert seen(gate).waits_for == "permit"
    await asyncio.sleep(0.6)
    assert seen(gate).waits_for == "rate"
    service = gate.service(None)
    service.pause(1)
    assert seen(gate).waits_for == "pause"
    service.hold_back(PROCESSING, True)
    await asyncio.sleep(1.1)
    assert seen(gate).waits_for == "processing"
    assert service.why_waiting() == "answers that wait to be processed hold it back"
    service.hold_back(PROCESSING, False)
    await asyncio.gather(first, *waiting)
    assert seen(gate).waits_for is None


@pytest.mark.virtual_clock
async def test_it_shows_that_the_first_in_line_waits_for_a_thread() -> None:
    class None_:
        def take_nowait(self) -> bool:
            return False

        def give_back(self) -> None:
            raise AssertionError

        def when_free(self, _tell: Callable[[], None], /) -> None:
            """Never."""

    service = new_service()
    (waiting,) = await start(lambda: service.take(needs=None_()))
    assert (service.statistics().waits_for, service.why_waiting()) == ("thread", None)
    await cancel(waiting)


@pytest.mark.virtual_clock
async def test_it_shows_for_how_long_it_was_waited_for_what() -> None:
    """Nothing for the time in which nobody waits."""
    gate = Gate("g", limit=1, rate=Rate(1, per=4, burst=1), retry=ONCE, breaker=None)
    tasks = await start(lambda: gate.call(asyncio.sleep, 1), 3)
    await asyncio.gather(*tasks)  # they start at 0, 4 and 8
    waited = seen(gate).waited
    assert waited == {"permit": pytest.approx(2), "rate": pytest.approx(6)}
    await asyncio.sleep(1000)
    assert seen(gate).waited == waited
    await gate.call(asyncio.sleep, 1)
    await asyncio.sleep(1000)
    assert seen(gate).waited == waited


@pytest.mark.virtual_clock
async def test_a_wait_that_begins_when_nothing_is_going_on_is_counted_too() -> None:
    """While a pause lasts, nothing starts, and the heart does not beat."""
    gate = Gate("g", limit=1)
    gate.service(None).pause(100)
    await asyncio.sleep(40)
    (waiting,) = await start(lambda: gate.call(asyncio.sleep, 0))
    await asyncio.sleep(30)
    assert seen(gate).waited == {"pause": pytest.approx(30)}
    await waiting
    assert seen(gate).waited == {"pause": pytest.approx(60)}


@pytest.mark.virtual_clock
async def test_a_wait_that_was_given_up_ends_with_that() -> None:
    gate = Gate("g", limit=1)
    gate.service(None).pause(100)
    first, second = await start(lambda: gate.call(asyncio.sleep, 0), 2)
    await asyncio.sleep(5)
    await cancel(first)
    await asyncio.sleep(5)
    await cancel(second)
    await asyncio.sleep(1000)
    await gate.call(asyncio.sleep, 1)
    assert seen(gate).waited == {"pause": pytest.approx(10)}


@pytest.mark.virtual_clock
async def test_changes_of_one_kind_within_a_second_are_shown_as_one() -> None:
    """With the number before the first and after the last of them; the latest of many are kept, and all are counted."""
    dial = Dial(4)
    service = new_service(dial)
    began = now()
    for limit in (5, 6, 7):
        dial.limit, dial.reason = limit, "growth"
        attempt(service)
    assert service.statistics().changes == (LimitChange(began, 4, 7, "growth"),)
    dial.limit, dial.reason = 3, "loss"
    attempt(service)
    dial.limit, dial.reason = 4, None  # it has changed, and nobody said so
    attempt(service)
    assert [(c.before, c.after, c.reason) for c in service.statistics().changes[1:]] == [
        (7, 3, "loss"),
        (3, 4, "growth"),
    ]
    dial.reason = "growth"
    for number in range(REMEMBERED_CHANGES):
        await asyncio.sleep(ONE_CHANGE)
        dial.limit = 10 + number
        attempt(service)
    shown = service.statistics()
    assert len(shown.changes) == REMEMBERED_CHANGES
    assert shown.changes[0].before == 4
    assert shown.reasons == {"growth": 2 + REMEMBERED_CHANGES, "loss": 1}


@pytest.mark.virtual_clock
async def test_an_attempt_that_knows_better_how_long_it_took_is_believed() -> None:
    """By the limit, that is; what is shown is the time from admission to the end."""
    dial = Dial()
    service = new_service(dial)
    tag, began = service.start(now(), False), now()
    await asyncio.sleep(5)
    service.end_well(tag, began, 0.5)
    assert dial.samples == [0.5]
    assert service.statistics().latency.max == 5


@pytest.mark.virtual_clock
async def test_an_answer_that_is_an_error_is_a_measurement_if_its_time_is_known() -> None:
    """A 404 has been worked for; a 500 may have been broken off."""
    dial = Dial()
    service = new_service(dial)
    for status, rtt in ((404, 0.5), (404, None), (500, 0.5), (429, 0.5)):
        service.end_badly(service.start(now(), False), HttpStatusError(status, "GET", "/", b"", None), rtt, None)
    assert dial.samples == [0.5, None, None, None]
    assert service.statistics().failed == {FailureKind.PERMANENT: 3, FailureKind.THROTTLED: 1}


# --- the loop's load ---


@pytest.mark.virtual_clock
async def test_a_loop_that_is_overloaded_carries_a_share_of_the_limit() -> None:
    """Until it has recovered; one round trip is always possible."""
    service = new_service(limit=10)
    for share, limit in ((0.5, 5), (0.26, 2), (0.01, 1), (1.0, 10)):
        service.beat(share, 0.2, True)
        assert (service.limit, service.unshared) == (limit, 10)
    assert service.statistics().reasons == {"guard": 1}
    service.beat(0.5, 0, False)
    service.set_limit(30)
    assert service.limit == 15


@pytest.mark.virtual_clock
async def test_who_waits_goes_on_as_the_share_comes_back() -> None:
    service = new_service(limit=4)
    service.beat(0.25, 0.2, True)
    waiting = await start(service.take, 4)
    assert service.in_flight == 1
    service.beat(0.75, 0, False)
    await settled()
    assert service.in_flight == 3
    service.beat(1.0, 0, False)
    await asyncio.gather(*waiting)


@pytest.mark.virtual_clock
@pytest.mark.parametrize(
    ("lag", "lagging", "baseline", "contaminated"),
    [
        (0.0, True, None, True),
        (0.2, False, 1.0, True),
        (0.05, False, 1.0, False),
        (0.05, False, 0.01, True),
        (0.001, False, 0.001, False),
        (0.05, False, None, True),
    ],
)
async def test_a_loop_that_lags_spoils_what_is_measured(
    lag: float, lagging: bool, baseline: float | None, contaminated: bool
) -> None:
    """If it lags by more than a timer does, and by more than a share of what a round trip takes."""
    dial = Dial()
    dial.baseline = baseline
    service = new_service(dial)
    service.beat(1.0, lag, lagging)
    assert dial.told == ["contaminated"] * contaminated
    new_service(4).beat(1.0, lag, lagging)  # there is nothing to spoil


@pytest.mark.virtual_clock
async def test_a_gate_tells_the_guard_what_it_can_carry_and_passes_on_what_it_hears() -> None:
    """Keys that are not used do not count."""
    gate = Gate("g", limit=10, key=lambda key: key)

    async def trip(_key: str) -> None:
        await asyncio.sleep(1)

    tasks = await start(lambda: gate.call(trip, "a"), 2) + await start(lambda: gate.call(trip, "b"))
    gate.service("c")
    assert gate.total_limit() == 20
    gate.beat(0.5, 0.2, True)
    assert {known.limit for known in gate.statistics().values()} == {5}
    await asyncio.sleep(0.2)  # the next beat of the real one
    assert {known.limit for known in gate.statistics().values()} == {10}
    await asyncio.gather(*tasks)
    assert gate.total_limit() == 0


@pytest.mark.virtual_clock
async def test_the_heart_stops_by_itself_when_nothing_is_started_any_more() -> None:
    """An idle loop has no timers; also after a permit, and after calls in threads."""
    gate = Gate("g", limit=4)
    guard = guard_of(asyncio.get_running_loop())
    async with gate.permit():
        assert guard._beating
    await gate.call(lambda: None)
    await asyncio.sleep(10)
    assert not guard._beating


def test_a_gate_that_has_moved_is_told_by_its_new_loop_alone() -> None:
    """The old one's heart beats in another thread, perhaps, and its loop may be quite busy."""
    gate = Gate("g", limit=10)
    old = VirtualClockLoop()

    async def use() -> None:
        await gate.call(asyncio.sleep, 0)
        assert gate in guard_of(asyncio.get_running_loop())._told

    try:
        old.run_until_complete(use())
        run_in_virtual_time(use())
        assert gate not in guard_of(old)._told
    finally:
        old.close()


@pytest.mark.virtual_clock
async def test_a_backlog_that_serves_another_loop_meanwhile_holds_nothing_back_here() -> None:
    gate = Gate("g")
    assert not gate.hold_back(100)
    await gate.call(asyncio.sleep, 1)
    assert gate.hold_back(100)
    assert not gate.hold_back(0)


def test_an_open_breaker_keeps_a_gate_on_its_loop() -> None:
    """What it has seen would be forgotten."""
    gate = Gate("g", breaker=Breaker(calls=1), retry=ONCE)
    old = VirtualClockLoop()

    async def fail() -> None:
        raise HttpStatusError(502, "GET", "/", b"", None)

    try:
        with pytest.raises(HttpStatusError):
            old.run_until_complete(gate.call(fail))
        with pytest.raises(WrongLoop):
            run_in_virtual_time(gate.call(fail))
    finally:
        old.close()


# --- what the server tells ---


@pytest.mark.virtual_clock
async def test_what_the_server_takes_at_once_caps_a_limit_that_is_measured() -> None:
    """Not beyond what the client can do either."""
    dial = Dial(20)
    service = new_service(dial, most=12)
    service.learn(at_most_in_flight(15), service.start(now(), False))
    assert (service.limit, dial.told) == (12, ["cap 12"])
    service.learn(at_most_in_flight(5), service.start(now(), False))
    service.learn(at_most_in_flight(5), service.start(now(), False))
    assert (service.limit, dial.told) == (5, ["cap 12", "cap 5"])
    assert service.statistics().reasons == {"server": 1}


@pytest.mark.virtual_clock
async def test_what_the_server_allows_in_flight_bounds_a_number_that_somebody_has_set() -> None:
    service = new_service(20)
    service.learn(at_most_in_flight(5), service.start(now(), False))
    assert service.limit == 5
    service.set_limit(4)
    assert service.limit == 4
    service.set_limit(30)
    assert service.limit == 5


@pytest.mark.virtual_clock
async def test_what_is_used_up_is_waited_for_by_all() -> None:
    service = new_service(20)
    tag = service.start(now(), False)
    service.learn(hints(Policy("p", 10, 0, 30, 60, "requests")), tag)
    began = now()
    await service.take()
    assert 25 <= now() - began <= 70


@pytest.mark.virtual_clock
async def test_who_waits_for_a_quota_goes_on_when_the_server_says_that_there_is_more() -> None:
    """Not at the end of the time that it had told before."""
    service = new_service(20)
    service.learn(hints(Policy("p", 10, 0, 3000, 3600, "requests")), service.start(now(), False))
    (waiting,) = await start(service.take)
    assert service.waits_for == "rate"
    await asyncio.sleep(50)
    service.take_nowait()
    service.learn(hints(Policy("p", 10_000, 10_000, 3000, 3600, "requests")), service.start(now(), False))
    began = now()
    await waiting
    assert now() - began < 60


@pytest.mark.virtual_clock
async def test_a_call_on_a_place_that_is_lent_takes_its_tokens() -> None:
    """The permit is its lender's, the rate is everybody's."""
    gate = Gate("g", limit=1, rate=Rate(10, per=1000, burst=10), retry=ONCE)

    def outer() -> None:
        executor.from_thread(gate.call, lambda: None)

    async with Executor() as executor:
        await gate.call(outer)
    assert seen(gate).tokens == {"requests": pytest.approx(8, abs=0.01)}


@pytest.mark.virtual_clock
@pytest.mark.parametrize(("queue", "crowded"), [(0.0, False), (5.0, True)])
async def test_a_refusal_by_a_service_where_requests_queue_is_due_to_how_many_there_are(
    queue: float, crowded: bool
) -> None:
    """And not to how many start in a time: that is not lowered then."""
    dial = Dial(20)
    dial.queue = queue
    service = new_service(dial)
    service.tokens = meter = Hearing()
    service.take_nowait()
    service.end_badly(service.start(now(), False), HttpStatusError(429, "GET", "/", b"", None), None, None)
    assert meter.heard == [crowded]


class Hearing(Meter):
    """A meter that remembers whether refusals were said to be due to the crowd."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[bool] = []

    def throttled(self, _now: float, hinted: bool, queueing: bool, mark: int | None = None) -> None:
        self.heard.append(queueing)


@pytest.mark.virtual_clock
async def test_who_waits_in_vain_is_told_why() -> None:
    service = new_service(1, rate=Rate(1, per=10, burst=1), breaker=Breaker(calls=1))
    assert service.why_waiting() is None
    service.take_nowait()
    assert service.why_waiting() == "the rate of 'requests' (1 in 10 s), for another 10.0 s"
    service.end_badly(service.start(now(), False), HttpStatusError(502, "GET", "/", b"", None), None, None)
    assert service.why_waiting() == "its circuit breaker is open"
    service.pause(5)
    assert service.why_waiting() == "it is paused for another 5.0 s"
    await asyncio.sleep(100)


# --- everything at once, cancelled everywhere ---


def test_nothing_is_left_behind_whatever_is_switched_on_and_wherever_it_is_cancelled() -> None:
    """Rates, a breaker that opens, a budget that denies, threads, permits. The heart stops by itself, too."""

    async def scenario(gate: Gate) -> None:
        errors = [
            ConnectionError(),
            HttpStatusError(503, "GET", "/", b"", 0.5),
            HttpStatusError(429, "GET", "/", b"", 0.5),
        ]

        async def trip() -> None:
            await asyncio.sleep(0.1)
            if errors:
                raise errors.pop()

        def blocking() -> None:
            if errors:
                raise errors.pop()

        async def hold() -> None:
            async with gate.permit(weight=2) as permit:
                permit.settle({"requests": 1})
                await asyncio.sleep(0.1)

        for _ in range(9):
            gate.service(None).may_repeat(1.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(gate.call(trip))
            group.create_task(gate.call(blocking))
            group.create_task(gate.call(trip))
            group.create_task(hold())

    def arrange() -> Gate:
        return Gate(
            "g",
            limit=2,
            rate=Rate(5, burst=2),
            breaker=Breaker(calls=2, pause=0.5, probes=1),
            retry=Retry(attempts=9, wait=0.1),
            timeout=5,
        )

    def check(gate: Gate) -> None:
        after = gate.statistics().get(None)
        if after is not None:
            assert (after.in_flight, after.waiting, after.deferred, after.abandoned_calls) == (0, 0, 0, ())

    assert cancel_at_every_step(scenario, arrange=arrange, check=check) >= 20


def test_a_latch_in_a_thread_does_not_keep_the_heart_beating() -> None:
    """A call that hangs is no start."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        with ThreadLatch(loop) as latch:
            gate = Gate("g", limit=1, timeout=None)
            (hanging,) = await start(lambda: gate.call(latch.wait))
            await asyncio.sleep(10)
            assert not guard_of(loop)._beating
            latch.open()
            await hanging

    run_in_virtual_time(scenario())


# --- a model of one key ---


class ServiceUnderDemand(RuleBasedStateMachine):
    """One key with rates, pauses, holds and limits that change, under random demand of all weights.

    What must hold: never more in flight than the limit, but while it drains; who waits, waits for something; first in,
    first out among fresh work, and due retries before it; all permits come back.
    """

    @initialize(
        limit=st.integers(1, 4),
        rate=st.sampled_from([None, Rate(2, burst=1), {"requests": Rate(5), "t": Rate(3, burst=3)}]),
    )
    def begin(self, limit: int, rate: Any) -> None:
        self.loop = VirtualClockLoop()
        self.service = self.run(self.made(limit, rate))
        self.tasks: list[asyncio.Task[None]] = []
        self.line: list[int] = []
        """Fresh ones that wait, in the order in which they came."""
        self.admitted: list[int] = []
        self.held = 0
        self.draining_from = 0

    async def made(self, limit: int, rate: Any) -> Service:
        return new_service(limit, rate)

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    @rule(weight=st.sampled_from([None, {"t": 1}, {"t": 3}, {"t": 0}, {"requests": 1, "t": 2}]), again=st.booleans())
    def join(self, weight: Any, again: bool) -> None:
        number = len(self.tasks)
        if not again:
            self.line.append(number)

        async def caller() -> None:
            if not self.service.take_nowait(None, weight):
                await self.service.take(again=again, weight=weight)
            self.held += 1
            if not again:
                self.admitted.append(number)

        self.tasks.append(self.loop.create_task(caller()))
        self.settle()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiting = [number for number, task in enumerate(self.tasks) if not task.done()]
        if waiting:
            number = data.draw(st.sampled_from(waiting))
            self.tasks[number].cancel()

    @rule(settled=st.booleans())
    def give_back(self, settled: bool) -> None:
        if self.held:
            self.held -= 1
            self.service.give_back()
            if settled:
                self.settle()

    @rule(used=st.floats(0, 4))
    def settle_up(self, used: float) -> None:
        with suppress(UsageError):  # there is no rate of that name
            self.service.settle({"t": 2}, {"t": used})

    @rule(limit=st.integers(1, 5))
    def resize(self, limit: int) -> None:
        self.service.set_limit(limit)

    @rule(share=st.sampled_from([0.3, 1.0]))
    def beat(self, share: float) -> None:
        self.service.beat(share, 0.0, False)

    @rule(rate=st.sampled_from([None, Rate(2, burst=1), Rate(50), {"t": Rate(3, burst=3)}]))
    def change_rate(self, rate: Any) -> None:
        self.service.set_rate(rate)

    @rule(on=st.booleans(), why=st.sampled_from(["processing", "breaker"]))
    def hold_back(self, on: bool, why: str) -> None:
        self.service.hold_back(why, on)

    @rule(seconds=st.sampled_from([0.25, 1.0]))
    def pause(self, seconds: float) -> None:
        self.service.pause(seconds)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        self.settle()
        assert self.service.in_flight == self.held, "a permit is taken by who runs, and by nobody else"
        assert self.service.waiting == sum(not task.done() for task in self.tasks)

    def settle(self) -> None:
        self.run(settled())

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        service = getattr(self, "service", None)
        if service is None:
            return
        if service.waiting == 0:
            assert service.waits_for is None
        elif service.waits_for == "permit":
            assert service.in_flight >= service.limit
        elif service.waits_for == "rate":
            assert service._refill is not None
            assert not service._refill.cancelled()
        elif service.waits_for == "pause":
            assert service.paused_for > 0
        else:
            assert service.held_back(service.waits_for)

    @invariant()
    def order_is_kept(self) -> None:
        if hasattr(self, "service"):
            assert self.admitted == sorted(self.admitted)

    def teardown(self) -> None:
        if not hasattr(self, "service"):
            return
        for why in ("processing", "breaker"):
            self.service.hold_back(why, False)
        for _ in range(2 * len(self.tasks) + 2):
            while self.held:
                self.held -= 1
                self.service.give_back()
            self.run(asyncio.sleep(20.0))
            self.settle()
        assert all(task.done() for task in self.tasks), "somebody was forgotten in the queue"
        while self.held:
            self.held -= 1
            self.service.give_back()
        assert (self.service.in_flight, self.service.waiting, self.service.waits_for) == (0, 0, None)
        assert self.service._refill is None
        self.loop.close()


ServiceUnderDemand.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestServiceUnderDemand = ServiceUnderDemand.TestCase


class NeverOver(RuleBasedStateMachine):
    """A plain queue with a meter: never more in flight than the limit, never more taken than the rate allows."""

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit: int) -> None:
        self.loop = VirtualClockLoop()
        self.queue = PermitQueue(self.loop, limit)
        self.queue.meter = Meter(Rate(4, burst=2))
        self.most = limit
        self.tasks: list[asyncio.Task[None]] = []
        self.at: list[float] = []
        self.held = 0

    @rule(count=st.integers(1, 4))
    def join(self, count: int) -> None:
        async def caller() -> None:
            await self.queue.take()
            self.held += 1
            self.at.append(self.loop.time())

        self.tasks.extend(self.loop.create_task(caller()) for _ in range(count))
        self.loop.run_until_complete(settled())

    @rule()
    def give_back(self) -> None:
        if self.held:
            self.held -= 1
            self.queue.give_back()

    @rule(seconds=st.sampled_from([0.1, 0.25, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @invariant()
    def neither_limit_nor_rate_are_exceeded(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.in_flight <= self.most
        for first, earlier in enumerate(self.at):
            for number, later in enumerate(self.at[first:]):
                assert number + 1 <= 4 * (later - earlier) + 2 + 0.001

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            for task in self.tasks:
                task.cancel()
            self.loop.run_until_complete(settled())
            assert (self.queue.in_flight, self.queue.waiting) == (self.held, 0)
            self.loop.close()


NeverOver.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestNeverOver = NeverOver.TestCase
