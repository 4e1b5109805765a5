"""Retries stay a small share of a failing service's load, and random failures do not bring a batch to a halt."""

import heapq
import math
import pickle
import random
from bisect import bisect
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import UsageError
from penstock.gate.budget import INITIAL, RETRY_COST, SUCCESS, THROTTLED_RETRY_COST, RetryBudget

NOW = 1_000.0


def emptied(share: float = 0.1, now: float = NOW) -> RetryBudget:
    """A budget of which all has been spent at `now`."""
    budget = RetryBudget(share)
    assert budget.withdraw(budget.balance(now), now)
    return budget


def test_ten_retries_are_free_and_the_next_one_is_denied() -> None:
    """The initial balance is what a service key that was never asked before may repeat at once."""
    budget = RetryBudget()
    assert [budget.withdraw(RETRY_COST, NOW) for _ in range(11)] == [True] * 10 + [False]
    assert budget.balance(NOW) == 0.0


def test_a_denied_retry_costs_nothing() -> None:
    """What could not be paid is not taken."""
    budget = emptied()
    budget.deposit(NOW)
    assert not budget.withdraw(RETRY_COST, NOW)
    assert budget.balance(NOW) == pytest.approx(0.1)


def test_ten_first_attempts_pay_for_one_retry() -> None:
    """The share is retries for each first attempt."""
    budget = emptied(share=0.1)
    for _ in range(10):
        assert not budget.withdraw(RETRY_COST, NOW)
        budget.deposit(NOW)
    assert budget.withdraw(RETRY_COST, NOW)


def test_a_retry_that_succeeds_gets_its_cost_back_and_more() -> None:
    """What helped was no waste; and each success says that the service is well."""
    budget = emptied()
    budget.succeeded(NOW, refund=RETRY_COST)
    assert budget.balance(NOW) == pytest.approx(RETRY_COST + SUCCESS * 0.1)


def test_a_retry_after_a_throttling_with_a_hint_is_cheaper() -> None:
    """The server itself has said when: fourteen of these cost what five of the others do."""
    budget = RetryBudget()
    paid = 0
    while budget.withdraw(THROTTLED_RETRY_COST, NOW):
        paid += 1
    assert paid == 28 == math.floor(INITIAL * 14 / 5)


def test_savings_are_those_of_the_last_ten_seconds() -> None:
    """A healthy day does not pay for a storm of retries: the balance stays at ten seconds of deposits, then at 10."""
    budget, now = RetryBudget(), NOW
    for _ in range(60_000):
        now += 0.001
        budget.deposit(now)
        budget.succeeded(now)
    assert budget.balance(now) == pytest.approx(0.1 * 1_000 * 10, rel=0.01)
    assert budget.balance(now + 5) == pytest.approx(0.1 * 1_000 * 5, abs=101)  # counted in seconds
    assert budget.balance(now + 11) == INITIAL


def test_savings_shrink_with_the_rate_and_are_gone_after_a_silence() -> None:
    """Second by second, also while nothing is paid in or out."""
    budget, now = RetryBudget(), NOW
    for step in range(15_001):
        now = NOW + step / 1_000
        budget.deposit(now)
        budget.succeeded(now)
    assert budget.balance(now + 0.9) == pytest.approx(1_000, rel=0.01)
    budget.deposit(now + 0.95)
    assert budget.balance(now + 1.05) == pytest.approx(900, rel=0.01)
    budget.deposit(now + 1_000)
    budget.succeeded(now + 1_001, refund=500.0)
    assert budget.balance(now + 1_001) == INITIAL


def test_savings_are_bounded_from_the_first_second() -> None:
    """Before the rate is known, ten is all that can be saved."""
    budget = RetryBudget()
    for _ in range(1_000):
        budget.deposit(NOW)
        budget.succeeded(NOW)
    assert budget.balance(NOW) == INITIAL


def test_the_reserve_pays_for_a_retry_a_second_where_little_is_asked() -> None:
    """A service that is asked once a minute may have its retry too."""
    budget = emptied()
    assert budget.affordable_in(RETRY_COST, NOW) == pytest.approx(1.0)
    assert budget.affordable_in(RETRY_COST, NOW + 0.25) == pytest.approx(0.75)
    assert not budget.withdraw(RETRY_COST, NOW + 0.99)
    assert budget.withdraw(RETRY_COST, NOW + 1.0)


def test_the_reserve_stands_back_while_deposits_are_as_high() -> None:
    """It makes up for deposits that are missing, and is nothing on top of them."""
    budget, now = emptied(), NOW
    for _ in range(100):  # deposits of 2 a second, for five seconds
        now += 0.05
        budget.deposit(now)
    assert budget.balance(now) == pytest.approx(10, abs=0.2)
    budget, now = emptied(), NOW
    for _ in range(25):  # deposits of half a second's reserve a second, for five seconds
        now += 0.2
        budget.deposit(now)
    assert budget.balance(now) == pytest.approx(5, abs=0.2)


def test_a_burst_holds_the_reserve_back_for_a_second_only() -> None:
    """What was deposited long ago and is spent does not count for now."""
    budget = emptied()
    for _ in range(1_000):
        budget.deposit(NOW)
    assert budget.withdraw(budget.balance(NOW), NOW)
    assert budget.affordable_in(RETRY_COST, NOW) == pytest.approx(2.0)
    assert budget.balance(NOW + 1.0) == 0.0
    assert budget.balance(NOW + 1.5) == pytest.approx(0.5)


def test_what_is_affordable_is_affordable_now() -> None:
    """No wait where none is needed."""
    assert RetryBudget().affordable_in(RETRY_COST, NOW) == 0.0


def test_what_costs_more_than_can_be_saved_never_comes() -> None:
    """Who asks for it must not wait."""
    budget = RetryBudget()
    assert budget.affordable_in(INITIAL + 1, NOW) is None
    assert not budget.withdraw(INITIAL + 1, NOW)


COSTS = st.one_of(st.sampled_from([RETRY_COST, THROTTLED_RETRY_COST]), st.floats(0.01, 10.0))
STEPS = st.tuples(st.sampled_from(["first", "success", "retry"]), st.floats(0, 3), COSTS)


@given(st.floats(0, 2), st.lists(STEPS, max_size=80), COSTS)
def test_the_wait_that_is_told_is_enough_and_not_too_long(
    share: float, steps: list[tuple[str, float, float]], cost: float
) -> None:
    """After it the retry is paid, without anything else having come in; half of it would not have done."""
    budget, now = RetryBudget(share), NOW
    for what, pause, amount in steps:
        now += pause
        if what == "first":
            budget.deposit(now)
        elif what == "success":
            budget.succeeded(now)
        else:
            budget.withdraw(amount, now)
    wait = budget.affordable_in(cost, now)
    assert wait is not None
    assert 0 <= wait <= 1 + cost
    if wait > 1e-6:
        assert not budget.withdraw(cost, now + wait / 2)
    assert budget.withdraw(cost, now + wait)


@given(st.floats(0, 2), st.lists(STEPS, max_size=200))
def test_the_balance_is_never_negative_and_never_above_ten_seconds_of_deposits(
    share: float, steps: list[tuple[str, float, float]]
) -> None:
    """Whatever happens in which order; savings are counted in full seconds, so eleven contain them."""
    budget, now = RetryBudget(share), NOW
    firsts: list[float] = []
    for what, pause, cost in steps:
        now += pause
        if what == "first":
            budget.deposit(now)
            firsts.append(now)
        elif what == "success":
            budget.succeeded(now, cost)
        else:
            budget.withdraw(cost, now)
        recent = len(firsts) - bisect(firsts, now - 11.001)
        assert 0 <= budget.balance(now) <= max(INITIAL, share * recent) + 1e-6


@given(st.floats(0, 1), st.lists(st.tuples(st.integers(1, 30), st.floats(0, 3), COSTS), max_size=100))
def test_without_a_success_retries_cost_at_most_deposits_and_reserve(
    share: float, steps: list[tuple[int, float, float]]
) -> None:
    """However greedily they are asked for."""
    budget, now, firsts, paid = RetryBudget(share), NOW, 0, 0.0
    for many, pause, cost in steps:
        now += pause
        for _ in range(many):
            budget.deposit(now)
        firsts += many
        while budget.withdraw(cost, now):
            paid += cost
    assert paid <= INITIAL + share * firsts + (now - NOW) + 1e-6


@pytest.mark.parametrize("healthy", [0, 15])
@pytest.mark.parametrize("rate", [8, 10, 30, 100, 1_000, 10_000])
def test_when_all_fails_attempts_are_at_most_115_percent_in_any_minute(rate: int, healthy: int) -> None:
    """The worst client there is: each retry that can be paid is made at once. Also after times that were good."""
    rng, budget, now = random.Random(rate), RetryBudget(), NOW
    ends = NOW + healthy + (62 if rate > 1_000 else 130)
    asked_before = 0
    every = max(1, rate // 1_000)
    firsts: list[float] = []
    retries: list[float] = []
    while now < ends:
        asked_before += 1
        now = NOW + (asked_before + rng.random()) / rate  # out of step, and yet exactly so many
        budget.deposit(now)
        if now < NOW + healthy:
            budget.succeeded(now)
            continue
        firsts.append(now)
        while len(firsts) % every == 0 and budget.withdraw(RETRY_COST, now):
            retries.append(now)
    begins = NOW + healthy
    while begins + 60 <= ends:
        asked = bisect(firsts, begins + 60) - bisect(firsts, begins)
        repeated = bisect(retries, begins + 60) - bisect(retries, begins)
        assert asked + repeated <= 1.15 * asked
        begins += 5
    assert len(retries) > 0.09 * len(firsts)


def finished_per_second(failing: float, attempts: int, *, seconds: int = 30, warm: int = 15) -> float:
    """256 jobs and a service that serves 1,000 attempts a second, one after the other, and fails some at random.

    A retry that is denied waits, in order, until it can be paid, and goes to the end of the queue of fresh work.
    """
    rate, rng, budget = 1_000, random.Random(7), RetryBudget()
    queue = deque([(1, 0.0)] * 256)  # number of the attempt, and what it has cost
    backing_off: list[tuple[float, int]] = []
    deferred: deque[int] = deque()
    finished = 0
    for tick in range(seconds * rate):
        now = NOW + tick / rate
        while backing_off and backing_off[0][0] <= now:
            queue.appendleft((heapq.heappop(backing_off)[1], RETRY_COST))
        while deferred and budget.withdraw(RETRY_COST, now):
            queue.append((deferred.popleft(), RETRY_COST))
        if not queue:
            continue
        number, cost = queue.popleft()
        if number == 1:
            budget.deposit(now)
        fails = rng.random() < failing
        if not fails:
            budget.succeeded(now, cost)
        if not fails or number == attempts:
            finished += now >= NOW + warm
            queue.append((1, 0.0))
        elif not deferred and budget.withdraw(RETRY_COST, now):
            heapq.heappush(backing_off, (now + rng.uniform(0, 0.05 * 2.0 ** (number - 1)), number + 1))
        else:
            deferred.append(number + 1)
    return finished / (seconds - warm)


@pytest.mark.parametrize("attempts", [3, 4])
@pytest.mark.parametrize("failing", [0.05, 0.1, 0.2, 0.3, 0.4, 0.45])
def test_random_failures_below_the_breakers_share_cost_no_throughput(failing: float, attempts: int) -> None:
    """Since a denied retry waits, a budget that runs dry is a batch that stands still."""
    without_budget = 1_000 * (1 - failing) / (1 - failing**attempts)
    assert finished_per_second(failing, attempts) >= 0.9 * without_budget


def test_where_most_attempts_fail_the_budget_holds_jobs_back() -> None:
    """The other half of the simulation above: it can tell a budget that binds from one that does not."""
    assert finished_per_second(0.8, 3, seconds=20, warm=10) < 0.1 * 1_000


def test_memory_does_not_grow_with_what_was_counted() -> None:
    """One number for each of ten seconds."""
    budget, now = RetryBudget(), NOW
    for _ in range(100):
        now += 0.5
        budget.deposit(now)
    before = len(pickle.dumps(budget))
    for _ in range(100_000):
        now += 0.01
        budget.deposit(now)
    assert len(pickle.dumps(budget)) <= before + 64


@pytest.mark.parametrize("share", [-0.1, math.nan, math.inf, True, "0.1", None])
def test_a_share_that_cannot_work_is_refused(share: float) -> None:
    """The message shows what to write."""
    with pytest.raises(UsageError, match=r"Write RetryBudget\(share=0.1\)"):
        RetryBudget(share)


def test_a_refund_fills_the_balance_to_its_cap_and_no_further() -> None:
    budget = RetryBudget()
    assert budget.withdraw(3.0, 0.0)
    budget.refund(1.0, 0.0)
    assert budget.balance(0.0) == INITIAL - 2
    budget.refund(5.0, 0.0)
    assert budget.balance(0.0) == INITIAL
