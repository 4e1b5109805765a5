"""What a gate is told while it works: another limit, other rates, another breaker. Nobody is lost over it."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from penstock import Adaptive, Gate, HttpStatusError, Rate, Retry, UsageError
from penstock.gate.breaker import Breaker
from penstock.gate.limiter import LimitChange, LimitRule
from penstock.gate.server_hints import Policy, ServerHints
from penstock.gate.service import KeyStatistics
from penstock.testing import act_at_every_step

pytestmark = pytest.mark.virtual_clock

ONCE = Retry(attempts=1)


def now() -> float:
    return asyncio.get_running_loop().time()


class Steps:
    """A rule whose limit is a plain number; its limiters remember what they are told."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.made: list[Step] = []

    def limiter(self, _now: float, most: int | None, _rng: random.Random) -> "Step":
        self.made.append(Step(self.first, most))
        return self.made[-1]


class Step:
    """A limiter that grows by one with each success, if it is told to, and never beyond its cap."""

    def __init__(self, limit: int, most: int | None) -> None:
        self.limit = limit
        self.most = most
        self.baseline: float | None = 0.25
        self.queue = 1.5
        self.grows = False
        self.in_flight = 0
        self.told: list[str] = []

    def started(self, _now: float) -> int:
        self.in_flight += 1
        return 3

    def ended(self, mark: int, now: float, _rtt: float | None, _dropped: bool) -> LimitChange | None:
        self.in_flight -= 1
        assert mark == 3
        assert self.in_flight >= 0, "an end without a beginning"
        if not self.grows:
            return None
        self.limit += 1
        return LimitChange(now, self.limit - 1, self.limit, "growth")

    def contaminate(self) -> None:
        self.told.append("contaminated")

    def half_open(self, _now: float) -> None:
        self.told.append("half-open")

    def recovered(self, _now: float) -> None:
        self.told.append("recovered")

    def cap(self, most: int | None, _now: float) -> None:
        self.told.append(f"cap {most}")
        if most is not None:
            self.limit = min(self.limit, most)


class Crowd:
    """Counts who is inside; each takes a second."""

    def __init__(self) -> None:
        self.inside = self.peak = self.ended = 0

    async def __call__(self, duration: float = 1.0) -> None:
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            await asyncio.sleep(duration)
        finally:
            self.inside -= 1
            self.ended += 1


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def start(call: Callable[[], Any], times: int = 1) -> "list[asyncio.Task[Any]]":
    """Tasks that have come as far as they come at once."""
    tasks = [asyncio.create_task(call()) for _ in range(times)]
    await settled()
    return tasks


def seen(gate: Gate) -> KeyStatistics:
    return gate.statistics()[None]


# --- limit ---


async def test_a_larger_limit_lets_through_at_once_and_a_smaller_one_as_permits_come_back() -> None:
    gate, crowd = Gate("g", limit=2), Crowd()
    tasks = await start(lambda: gate.call(crowd), 40)
    assert crowd.inside == 2
    gate.limit = 10
    await settled()
    assert (crowd.inside, gate.limit, seen(gate).limit) == (10, 10, 10)
    gate.limit = 3
    await settled()
    assert (crowd.inside, seen(gate).limit) == (10, 3)
    await asyncio.sleep(1.5)
    assert crowd.inside == 3
    crowd.peak = 0
    await asyncio.gather(*tasks)
    assert crowd.peak == 3
    assert seen(gate).reasons == {"set": 1}  # two changes at a time are one
    assert [(change.before, change.after, change.reason) for change in seen(gate).changes] == [(2, 3, "set")]


async def test_from_a_number_to_a_rule_and_back() -> None:
    """The rule measures anew, and what is under way was not begun under it."""
    gate, crowd, rule = Gate("g", limit=2), Crowd(), Steps(5)
    tasks = await start(lambda: gate.call(crowd), 40)
    gate.limit = rule
    await settled()
    assert (crowd.inside, gate.limit is rule, seen(gate).limit) == (5, True, 5)
    assert (seen(gate).baseline, seen(gate).queue) == (0.25, 1.5)
    rule.made[0].grows = True
    await asyncio.sleep(1.5)
    assert seen(gate).limit == 5 + 3  # those three that began under it
    gate.limit = 1
    await settled()
    assert (seen(gate).limit, seen(gate).baseline, seen(gate).queue) == (1, None, 0)
    await asyncio.sleep(2)
    assert crowd.inside == 1
    gate.limit = 40
    await asyncio.gather(*tasks)
    assert (crowd.ended, seen(gate).in_flight) == (40, 0)


async def test_another_rule_is_not_told_of_what_began_under_the_one_before() -> None:
    """It would count fewer in flight than there are, for ever."""
    gate, crowd, first, second = Gate("g", limit=1, retry=ONCE), Crowd(), Steps(4), Steps(4)
    gate.limit = first
    tasks = await start(lambda: gate.call(crowd), 30)
    tasks[1].cancel()
    gate.limit = second
    await asyncio.sleep(2.5)
    assert second.made[0].in_flight == crowd.inside == 4
    await asyncio.wait(tasks)
    assert second.made[0].in_flight == 0


async def test_keys_that_come_later_have_the_new_limit() -> None:
    gate = Gate("g", limit=2, key=lambda key: key)
    await gate.call(_nothing, "a")
    gate.limit = 7
    await gate.call(_nothing, "b")
    assert {key: known.limit for key, known in gate.statistics().items()} == {"a": 7, "b": 7}


async def _nothing(_key: str) -> None:
    return


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None, "8", Adaptive])
async def test_what_is_no_limit_is_refused_and_the_old_one_stays(limit: Any) -> None:
    gate = Gate("g", limit=2)
    await start(lambda: gate.call(asyncio.sleep, 0))
    with pytest.raises(UsageError, match=r"limit=.*: expected a whole number of at least 1"):
        gate.limit = limit
    with pytest.raises(UsageError, match=r"limit=.*: expected a whole number of at least 1"):
        Gate("g", limit=limit)
    assert (gate.limit, seen(gate).limit) == (2, 2)


async def test_a_rule_is_told_what_the_client_cannot_exceed() -> None:
    gate, rule = Gate("g", limit=2), Steps(5)
    gate.bound(100)
    await gate.call(asyncio.sleep, 0)
    gate.limit = rule
    assert rule.made[0].most == 100


async def test_keys_in_use_share_out_what_the_client_has() -> None:
    """All together use no more connections than there are; what a key has that is at rest is the others'."""
    rule, gate = Steps(100), Gate("g", limit=Steps(100), retry=ONCE)
    gate.limit = rule
    gate.bound(12)
    async with gate.permit(key="a"):
        gate.beat(1.0, 0.0, False)
        assert rule.made[0].told == []
        async with gate.permit(key="b"), gate.permit(key="c"):
            gate.beat(1.0, 0.0, False)
            gate.beat(1.0, 0.0, False)
            assert [key.limit for key in gate.statistics().values()] == [4, 4, 4]
        gate.beat(1.0, 0.0, False)
    assert [each.told for each in rule.made] == [["cap 4", "cap 12"], ["cap 4"], ["cap 4"]]


async def test_a_rule_that_is_set_while_keys_share_may_use_all_when_a_key_is_alone_again() -> None:
    gate = Gate("g", limit=Steps(100), retry=ONCE)
    gate.bound(12)
    async with gate.permit(key="a"):
        async with gate.permit(key="b"), gate.permit(key="c"):
            gate.beat(1.0, 0.0, False)
            gate.limit = Adaptive(start=100)
            assert gate.statistics()["a"].limit == 4
        gate.beat(1.0, 0.0, False)
        assert gate.statistics()["a"].limit == 4
        gate.limit = Adaptive(start=100)
        assert gate.statistics()["a"].limit == 12


async def test_what_is_shared_out_is_as_little_as_the_server_has_said_and_one_at_least() -> None:
    rule = Steps(100)
    gate = Gate("g", limit=rule, retry=ONCE)
    gate.bound(2)
    async with gate.permit(key="a") as first, gate.permit(key="b"), gate.permit(key="c"):
        first.learn({"x-ratelimit-concurrency-limit": "50"})
        gate.beat(1.0, 0.0, False)
        assert [key.limit for key in gate.statistics().values()] == [1, 1, 1]


async def test_a_number_that_somebody_has_set_is_not_shared_out() -> None:
    gate = Gate("g", limit=5, retry=ONCE)
    gate.bound(2)
    async with gate.permit(key="a"), gate.permit(key="b"):
        gate.beat(1.0, 0.0, False)
        assert [key.limit for key in gate.statistics().values()] == [5, 5]


async def test_a_rule_that_comes_later_keeps_to_what_the_server_has_said() -> None:
    """That it takes so many at once."""
    gate, rules = Gate("g", limit=Steps(20)), [Steps(20), Steps(20)]
    service = gate.service(None)
    gate.limit = rules[0]
    said = ServerHints(None, (Policy("c", 6, None, None, None, "concurrent-requests"),))
    service.learn(said, service.start(now(), False))
    assert (service.limit, rules[0].made[0].told) == (6, ["cap 6"])
    gate.limit = rules[1]
    assert (service.limit, rules[1].made[0].told) == (6, ["cap 6"])
    assert seen(gate).reasons["server"] == 1


def test_a_limit_that_changes_at_any_step_loses_nobody() -> None:
    """Larger, smaller, measured, and back."""

    class Changing:
        def __init__(self) -> None:
            self.gate = Gate("g", limit=2, rate=Rate(20, burst=2), retry=Retry(attempts=2, wait=0.1))
            self.limits: list[int | LimitRule] = [1, Steps(3), 5]
            self.crowd = Crowd()

        def change(self) -> None:
            self.limits.append(self.limits.pop(0))
            self.gate.limit = self.limits[0]

    async def scenario(changing: Changing) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(changing.gate.call(changing.crowd, 0.1))

    def check(changing: Changing) -> None:
        after = changing.gate.statistics()[None]
        assert (after.in_flight, after.waiting, changing.crowd.ended) == (0, 0, 4)

    assert act_at_every_step(scenario, Changing.change, arrange=Changing, check=check) >= 5


# --- rates ---


async def test_a_higher_rate_lets_through_sooner_and_none_at_once() -> None:
    """What has been used so far stays used."""
    gate, crowd, began = Gate("g", limit=100, rate=Rate(1, burst=1)), Crowd(), now()
    tasks = await start(lambda: gate.call(crowd), 20)
    await asyncio.sleep(0.5)
    assert (crowd.inside, seen(gate).waiting, seen(gate).waits_for) == (1, 19, "rate")
    gate.rate = Rate(10, burst=1)
    assert gate.rate == Rate(10, burst=1)
    await asyncio.sleep(1.55)
    assert 10 <= seen(gate).attempts <= 17
    gate.rate = None
    await settled()
    assert (seen(gate).waiting, gate.rate) == (0, None)
    await asyncio.gather(*tasks)
    assert now() - began < 3.1


async def test_a_lower_rate_holds_from_now_on_and_one_where_there_was_none() -> None:
    gate, crowd = Gate("g", limit=1), Crowd()
    tasks = await start(lambda: gate.call(crowd), 5)
    gate.rate = Rate(1, per=10, burst=1)
    began = now()
    await asyncio.gather(*tasks)
    assert now() - began == pytest.approx(1 + 30 + 1)  # the first one was under way; the second had the burst


async def test_rates_of_other_names_hold_as_well() -> None:
    """Who waits with a weight for a rate that there is no more waits no longer."""
    gate = Gate("g", limit=10, rate={"tokens": Rate(10, per=60)})
    permits = [gate.permit(weight={"tokens": 10}) for _ in range(3)]
    waiting = [(await start(permit.__aenter__))[0] for permit in permits]
    assert [task.done() for task in waiting] == [True, False, False]
    gate.rate = {"requests": Rate(1000)}
    await asyncio.gather(*waiting)
    assert set(seen(gate).tokens) == {"requests"}


@pytest.mark.parametrize("rate", [5, {"tokens": 5}, {5: Rate(5)}, "fast"], ids=str)
async def test_what_is_no_rate_is_refused_and_the_old_one_stays(rate: Any) -> None:
    gate = Gate("g", rate=Rate(5))
    with pytest.raises(UsageError, match=r"rate=.*: expected a Rate"):
        gate.rate = rate
    assert gate.rate == Rate(5)


# --- breaker ---


async def _fail() -> None:
    raise HttpStatusError(503, "GET", "http://h/", b"", None)


async def test_a_breaker_that_is_taken_away_or_exchanged_while_it_is_open_closes() -> None:
    """Who waits goes on at once."""
    others: list[Breaker | None] = [None, Breaker(calls=1000)]
    for other in others:
        gate, crowd = Gate("g", limit=3, breaker=Breaker(calls=2), retry=ONCE), Crowd()
        for _ in range(2):
            with pytest.raises(HttpStatusError):
                await gate.call(_fail)
        tasks = await start(lambda gate=gate, crowd=crowd: gate.call(crowd), 5)  # type: ignore[misc]
        assert (seen(gate).breaker, crowd.inside) == ("open", 0)
        gate.breaker = other
        await settled()
        assert gate.breaker is other
        assert (seen(gate).breaker, crowd.inside) == (None if other is None else "closed", 3)
        await asyncio.gather(*tasks)
        assert seen(gate).opened == 1


async def test_a_breaker_that_comes_later_knows_nothing_of_what_was_before() -> None:
    """Nor of how that ends which is under way."""
    gate, rule = Gate("g", limit=50, breaker=None, retry=ONCE), Breaker(calls=3, pause=10)

    async def fail_later() -> None:
        await asyncio.sleep(5)
        await _fail()

    gate.breaker = Breaker(calls=3, pause=10)
    old = await start(lambda: gate.call(fail_later), 5)
    gate.breaker = rule
    await asyncio.wait(old)
    assert [type(task.exception()) for task in old] == [HttpStatusError] * 5
    assert seen(gate).breaker == "closed"
    for _ in range(3):
        with pytest.raises(HttpStatusError):
            await gate.call(_fail)
    assert seen(gate).breaker == "open"


async def test_a_measured_limit_is_told_of_probes_and_of_the_end_of_an_outage() -> None:
    """One that comes in between is told of neither."""
    first, second = Steps(4), Steps(4)
    for exchanged in (False, True):
        gate = Gate("g", limit=first, breaker=Breaker(calls=2, pause=1, probes=1), retry=ONCE)
        for _ in range(2):
            with pytest.raises(HttpStatusError):
                await gate.call(_fail)
        await asyncio.sleep(2)
        assert seen(gate).breaker == "half-open"
        if exchanged:
            gate.limit = second
        await gate.call(asyncio.sleep, 0)
        assert seen(gate).breaker == "closed"
        assert first.made[-1].told == ["half-open", *(() if exchanged else ("recovered",))]
    assert second.made[0].told == []


@pytest.mark.parametrize("breaker", [5, Breaker, True])
async def test_what_is_no_breaker_is_refused_and_the_old_one_stays(breaker: Any) -> None:
    gate, old = Gate("g"), Gate("g").breaker
    with pytest.raises(UsageError, match=r"breaker=.*: expected a Breaker\(\), or None for none"):
        gate.breaker = breaker
    assert gate.breaker == old


async def test_attempts_that_began_without_a_breaker_do_not_count_for_one_that_comes_later() -> None:
    gate = Gate("g", limit=4, breaker=None, retry=ONCE)

    async def hang() -> None:
        await asyncio.sleep(1)
        await _fail()

    failing = await start(lambda: gate.call(hang))
    gate.breaker = Breaker(calls=1)
    gate.breaker = None
    failing += await start(lambda: gate.call(hang))
    gate.breaker = Breaker(calls=1)
    errors = await asyncio.gather(*failing, return_exceptions=True)
    assert [type(error) for error in errors] == [HttpStatusError] * 2
    assert seen(gate).breaker == "closed"
    with pytest.raises(HttpStatusError):
        await gate.call(_fail)
    assert seen(gate).breaker == "open"


async def test_a_call_under_way_goes_by_a_new_policy_from_its_next_attempt_on() -> None:
    """And so do those that come later."""
    gate = Gate("g", retry=Retry(attempts=5, wait=10))
    (under_way,) = await start(lambda: gate.call(_fail))
    gate.retry = Retry(attempts=2, wait=0, timeout=30)
    assert gate.retry == Retry(attempts=2, wait=0, timeout=30)
    with pytest.raises(HttpStatusError):
        await under_way
    assert seen(gate).attempts == 2
    gate.retry = ONCE
    with pytest.raises(HttpStatusError):
        await gate.call(_fail)
    assert seen(gate).attempts == 3


async def test_a_new_policy_is_obeyed_before_the_first_call_and_has_no_time_to_keep_to_if_it_says_so() -> None:
    gate = Gate("g", limit=1, retry=ONCE)
    gate.retry = Retry(attempts=1, timeout=None, budget=None)
    async with gate.permit():
        (waiting,) = await start(lambda: gate.call(asyncio.sleep, 0))
        gate.retry = Retry(attempts=1, timeout=5)
        await asyncio.sleep(10)
        assert not waiting.done()  # it goes on within the time that it had
    await waiting


@pytest.mark.parametrize("retry", [5, Retry, True])
async def test_what_is_no_policy_is_refused_and_the_old_one_stays(retry: Any) -> None:
    gate, old = Gate("g"), Gate("g").retry
    with pytest.raises(UsageError, match=r"retry=.*: expected a policy"):
        gate.retry = retry
    assert gate.retry == old
