"""The books of a run: when they say that it is to stop, once, and what they add up."""

import asyncio
import copy
import math
import pickle
import threading
from collections.abc import Callable, Coroutine
from fractions import Fraction
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.errors import AllFailed, BudgetReached, SkipItem, TooManyErrors, UsageError
from penstock.executor.ledger import FIRST_JOBS, MINIMUM_SAMPLE, Budget, Ledger, Stop, check_rules
from penstock.outcome import FailureKind, Outcome
from penstock.report import ALL_FAILED, BUDGET_REACHED, TIME_UP, TOO_MANY_ERRORS
from penstock.testing import VirtualClockLoop

T = TypeVar("T")


def done(attempts: int = 0) -> Outcome[Any]:
    return Outcome(None, "item", 1, None, None, attempts, 0.0, 0.0)


def failed(attempts: int = 0, error: Exception | None = None) -> Outcome[Any]:
    return Outcome(None, "item", None, error or ValueError("bad"), FailureKind.PERMANENT, attempts, 0.0, 0.0)


def skipped(attempts: int = 0) -> Outcome[Any]:
    return Outcome(None, "item", None, SkipItem("why"), None, attempts, 0.0, 0.0)


def no_stop(stop: Stop) -> None:
    pytest.fail(f"nothing was to stop it: {stop}")


def ledger_of(
    *,
    max_errors: float | None = None,
    fail_fast: int | None = None,
    budget: Budget | None = None,
    on_stop: Callable[[Stop], None] = no_stop,
) -> Ledger:
    return Ledger(max_errors=max_errors, fail_fast=fail_fast, budget=budget, on_stop=on_stop)


def stops(ledger: Ledger, outcomes: list[Outcome[Any]]) -> list[tuple[int, Stop]]:
    """After how many outcomes it was to stop, and why. Each attempt is made before its job ends."""
    answers = []
    for number, outcome in enumerate(outcomes, 1):
        for _ in range(outcome.attempts):
            ledger.attempt()
        answers.append((number, ledger.count(outcome)))
    return [(number, stop) for number, stop in answers if stop is not None]


OUTCOMES = st.lists(st.sampled_from([done(1), failed(2), skipped(0)]), max_size=250)
MANY = st.lists(
    st.tuples(st.sampled_from([done(), failed(), skipped()]), st.integers(1, 80)).map(lambda run: [run[0]] * run[1]),
    max_size=6,
).map(lambda runs: [outcome for run in runs for outcome in run])
AMOUNTS = st.floats(0, 1e9) | st.integers(0, 10**9)


# --- what was asked for ---


def test_books_without_rules_never_stop_a_run() -> None:
    ledger = ledger_of()
    assert stops(ledger, [failed(9)] * 1_000) == []
    ledger.spend({"usd": 1e9})
    assert (ledger.finished, ledger.failed, ledger.spent) == (1_000, 1_000, {"usd": 1e9})


@given(outcomes=OUTCOMES, allowed=st.integers(0, 20))
def test_a_count_of_failures_stops_the_run_at_the_first_one_beyond_it(
    outcomes: list[Outcome[Any]], allowed: int
) -> None:
    """What was skipped has not failed."""
    failures = [number for number, outcome in enumerate(outcomes, 1) if outcome.kind is not None]
    found = stops(ledger_of(max_errors=allowed), outcomes)
    assert [number for number, _ in found] == failures[allowed : allowed + 1]
    for number, stop in found:
        assert stop.verdict == TOO_MANY_ERRORS
        assert isinstance(stop.error, TooManyErrors)
        assert stop.error.args == (allowed + 1, number, allowed)


@given(outcomes=MANY, share=st.floats(0, 1, exclude_max=True))
@example(outcomes=[failed()] * 60 + [done()] * 40, share=0.5)
@example(outcomes=[done()] * 98 + [failed()] * 2, share=0.01)
def test_a_share_of_failures_is_judged_from_the_hundredth_outcome_on(
    outcomes: list[Outcome[Any]], share: float
) -> None:
    """At each failure: a success makes no share larger, so a run is not stopped in the midst of them."""
    found = stops(ledger_of(max_errors=share), outcomes)
    failures, expected = 0, []
    for number, outcome in enumerate(outcomes, 1):
        failures += outcome.kind is not None
        if outcome.kind is not None and number >= MINIMUM_SAMPLE and failures > share * number:
            expected.append(number)
    assert [number for number, _ in found] == expected[:1]


@given(outcomes=OUTCOMES, first=st.integers(1, 30))
@example(outcomes=[failed()] * 5, first=5)
@example(outcomes=[failed()] * 4 + [skipped()] + [failed()] * 10, first=5)
def test_a_run_is_hopeless_when_its_first_jobs_all_fail(outcomes: list[Outcome[Any]], first: int) -> None:
    """One that succeeded or was skipped shows that it is not, and ends the rule for good."""
    found = stops(ledger_of(fail_fast=first), outcomes)
    hopeless = len(outcomes) >= first and all(outcome.kind is not None for outcome in outcomes[:first])
    assert [number for number, _ in found] == ([first] if hopeless else [])


def test_a_hopeless_run_tells_the_first_error() -> None:
    outcomes = [failed(error=KeyError("url")), failed(error=ValueError("later")), failed()]
    [(_, stop)] = stops(ledger_of(fail_fast=3), outcomes)
    assert stop.verdict == ALL_FAILED
    assert isinstance(stop.error, AllFailed)
    assert stop.error.args == (3, "KeyError: 'url'")


def test_a_success_of_an_earlier_run_shows_that_a_run_is_not_hopeless() -> None:
    """Then the first items may be just those that failed before; the other rules hold as before."""
    ledger = ledger_of(fail_fast=3, max_errors=5)
    ledger.count(failed())
    ledger.reassure()
    ledger.reassure()
    assert [(number, stop.verdict) for number, stop in stops(ledger, [failed()] * 9)] == [(5, TOO_MANY_ERRORS)]


@given(outcomes=OUTCOMES, limit=st.integers(1, 400))
def test_a_budget_of_requests_is_reached_by_the_attempts_of_jobs_that_ended(
    outcomes: list[Outcome[Any]], limit: int
) -> None:
    """Retries included, and those of jobs that failed; also when the first success has ended another rule."""
    found = stops(ledger_of(budget=Budget(requests=limit), fail_fast=1_000), outcomes)
    attempts, expected = 0, []
    for number, outcome in enumerate(outcomes, 1):
        attempts += outcome.attempts
        if attempts >= limit:
            expected.append((number, ("requests", attempts, limit)))
    assert [(number, stop.error.args) for number, stop in found] == expected[:1]
    assert all(stop.verdict == BUDGET_REACHED for _, stop in found)


def test_attempts_of_jobs_in_flight_count_when_the_next_one_ends() -> None:
    """They are used, whatever becomes of their jobs."""
    ledger = ledger_of(budget=Budget(requests=5))
    for _ in range(4):
        ledger.attempt()
    assert ledger.count(done(1)) is None
    ledger.attempt()
    stop = ledger.count(skipped())
    assert stop is not None
    assert stop.error.args == ("requests", 5, 5)
    ledger.attempt()
    assert (ledger.used("requests"), ledger.used("usd")) == (6, 0)


def test_a_failure_that_breaks_two_rules_is_told_as_too_many_errors() -> None:
    """What the caller has asked for says more than what nobody has."""
    ledger = ledger_of(max_errors=1, fail_fast=2, budget=Budget(requests=2))
    [(number, stop)] = stops(ledger, [failed(1)] * 5)
    assert (number, stop.verdict) == (2, TOO_MANY_ERRORS)


# --- spending ---


@given(amounts=st.lists(AMOUNTS, max_size=50), limit=st.floats(1e-3, 1e10))
def test_a_budget_is_reached_when_so_much_was_spent(amounts: list[float], limit: float) -> None:
    """By the amount that makes it so much or more; what comes after it is added up all the same."""

    async def main() -> None:
        told: list[Stop] = []
        ledger = ledger_of(budget=Budget(usd=limit, other=1e300), on_stop=told.append)
        ledger.begin(asyncio.get_running_loop())
        reached: list[float] = []
        for number, amount in enumerate(amounts, 1):
            ledger.spend({"usd": amount, "not limited": 1})
            so_far = ledger.spent["usd"]
            reached += [so_far] if so_far >= limit else []
            assert len(told) == bool(reached), number
        assert [stop.error.args for stop in told] == [("usd", total, limit) for total in reached[:1]]
        assert all(stop.verdict == BUDGET_REACHED for stop in told)
        if amounts:
            assert ledger.spent == {"usd": pytest.approx(math.fsum(amounts)), "not limited": len(amounts)}
        ledger.end()

    run(main())


@given(amounts=st.lists(st.floats(0, 1e6), max_size=300))
@example(amounts=[0.1] * 10)
@example(amounts=[1e16] + [1.0] * 100)
@example(amounts=[0.002] * 300)
def test_sums_do_not_drift(amounts: list[float]) -> None:
    """Ten times 0.1 is 1, and a budget of 1 is reached by it: the sum is the exact one, rounded once or nearly so."""
    ledger = ledger_of()
    ledger.spend({"usd": 0})
    for amount in amounts:
        ledger.spend({"usd": amount})
    exact = math.fsum(amounts)
    assert abs(ledger.spent["usd"] - exact) <= math.ulp(exact)
    if len(set(amounts)) == 1:
        assert ledger.spent["usd"] == exact


def test_more_than_any_float_is_infinite_and_stays_so() -> None:
    ledger = ledger_of()
    for _ in range(3):
        ledger.spend({"usd": 1.7e308})
    assert ledger.spent == {"usd": math.inf}


def test_the_first_of_two_budgets_that_one_amount_reaches_is_told() -> None:
    async def main() -> None:
        told: list[Stop] = []
        ledger = ledger_of(budget=Budget(usd=1, tokens=1), on_stop=told.append)
        ledger.begin(asyncio.get_running_loop())
        ledger.spend({"tokens": 5, "usd": 5})
        ledger.end()
        assert [stop.error.args for stop in told] == [("tokens", 5.0, 1)]

    run(main())


async def test_threads_may_spend_and_the_stop_is_told_on_the_loop_once() -> None:
    """Nothing is lost between them, and none of them waits for the loop."""
    told: list[threading.Thread] = []
    stopped = asyncio.Event()

    def stop(_stop: Stop) -> None:
        told.append(threading.current_thread())
        stopped.set()

    ledger = ledger_of(budget=Budget(usd=1_000), on_stop=stop)
    ledger.begin(asyncio.get_running_loop())

    def spend() -> None:
        for _ in range(1_000):
            ledger.spend({"usd": 1})

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [], "the loop has had no turn since"
    await stopped.wait()
    ledger.end()
    assert ledger.spent == {"usd": 4_000}
    assert told == [threading.current_thread()]


async def test_a_stop_that_a_thread_has_decided_is_the_only_one() -> None:
    """Though the loop has not heard of it yet: a count that breaks a rule meanwhile is not told beside it."""
    told: list[str] = []
    ledger = ledger_of(max_errors=0, budget=Budget(usd=1), on_stop=lambda stop: told.append(stop.verdict))
    ledger.begin(asyncio.get_running_loop())
    thread = threading.Thread(target=ledger.spend, args=({"usd": 1},))
    thread.start()
    thread.join()
    assert ledger.count(failed()) is None
    await asyncio.sleep(0)
    ledger.end()
    assert told == [BUDGET_REACHED]


async def test_a_run_that_is_over_is_not_stopped() -> None:
    """By a thread that has spent the rest in the last moment, or spends it later; it is added up all the same."""
    ledger = ledger_of(budget=Budget(usd=1))
    ledger.begin(asyncio.get_running_loop())
    thread = threading.Thread(target=ledger.spend, args=({"usd": 1},))
    thread.start()
    thread.join()
    ledger.end()
    await asyncio.sleep(0)
    ledger.spend({"usd": 1})
    assert ledger.spent == {"usd": 2}


def test_a_thread_that_outlives_the_loop_may_still_spend() -> None:
    """It was left behind by its run; its error would be that of its call."""
    loop = VirtualClockLoop()
    ledger = ledger_of(budget=Budget(usd=1))
    ledger.begin(loop)
    loop.close()
    ledger.spend({"usd": 1})
    assert ledger.spent == {"usd": 1}


# --- foresight ---


@given(
    used=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=30),
    in_flight=st.integers(0, 300),
    usd=st.integers(1, 2_000),
    requests=st.integers(1, 300),
)
@example(used=[(1, 1)] * 3, in_flight=4, usd=7, requests=300)
@example(used=[(1, 1)] * 3, in_flight=4, usd=300, requests=7)
@example(used=[(0, 0)] * 9, in_flight=300, usd=1, requests=1)
def test_no_job_is_begun_when_those_in_flight_are_expected_to_use_the_rest(
    used: list[tuple[int, int]], in_flight: int, usd: int, requests: int
) -> None:
    """Each as much as finished ones did on average. Where none has finished, few begin; where none is in flight, one
    may."""
    ledger = ledger_of(budget=Budget(usd=usd, requests=requests))
    for spent, attempts in used:
        ledger.count(done(attempts), {"usd": float(spent), "tokens": 5.0})
    if not used:
        expected = in_flight >= FIRST_JOBS
    else:
        jobs = Fraction(len(used) + in_flight, len(used))
        by_unit = [(sum(spent for spent, _ in used), usd), (sum(attempts for _, attempts in used), requests)]
        expected = in_flight > 0 and any(so_far * jobs >= limit for so_far, limit in by_unit)
    assert ledger.holds(in_flight) == expected


@given(
    cost=st.integers(1, 20),
    limit=st.integers(1, 400),
    slots=st.integers(1, 256),
    unit=st.sampled_from(["usd", "requests"]),
    ends=st.lists(st.booleans(), max_size=300),
)
@example(cost=1, limit=10, slots=256, unit="usd", ends=[])
@example(cost=1, limit=7, slots=256, unit="usd", ends=[True] * 3)
def test_jobs_that_use_the_same_use_what_there_is_and_no_more(
    cost: int, limit: int, slots: int, unit: str, ends: list[bool]
) -> None:
    """In whatever order they begin and end. Only the first few may be too many, of which nobody knew what they use."""

    async def main() -> int:
        told: list[Stop] = []
        budget = Budget(requests=limit) if unit == "requests" else Budget(usd=limit)
        ledger = ledger_of(budget=budget, on_stop=told.append)
        ledger.begin(asyncio.get_running_loop())
        in_flight = began = 0
        chances = iter(ends)
        while True:
            may_begin = not told and in_flight < slots and not (in_flight and ledger.holds(in_flight))
            if may_begin and not (in_flight and next(chances, False)):
                in_flight += 1
                began += 1
                continue
            if not in_flight:
                break
            in_flight -= 1
            if unit == "usd":
                ledger.spend({"usd": cost})
                stop = ledger.count(done(), {"usd": float(cost)})
            else:
                for _ in range(cost):
                    ledger.attempt()
                stop = ledger.count(done(cost))
            told += [] if stop is None else [stop]
        ledger.end()
        assert len(told) == 1
        return began

    enough = -(-limit // cost)
    assert enough <= run(main()) <= max(enough, min(FIRST_JOBS, slots))


def test_books_without_a_budget_never_hold_a_job_back() -> None:
    ledger = ledger_of(max_errors=1, fail_fast=1, budget=Budget(time=1))
    assert not ledger.keeps_a_budget


# --- units that nobody spends ---


def test_a_unit_that_no_job_has_spent_is_named_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """It was misspelt, as a rule, and limits nothing. Told once, with what was spent."""
    ledger = ledger_of(budget=Budget(dollar=10, pages=5))
    ledger.spend({"usd": 1, "pages": 1})
    ledger.count(done(), {"usd": 1.0, "pages": 1.0})
    ledger.end()
    ledger.end()
    assert caplog.messages == ["Budget(dollar=...): no job has spent any 'dollar'; spent were: usd, pages."]


def test_jobs_that_spend_nothing_at_all_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    ledger = ledger_of(budget=Budget(usd=10))
    ledger.count(done())
    ledger.end()
    assert caplog.messages == ["Budget(usd=...): no job has spent any 'usd'; nothing was spent at all."]


def test_where_no_job_has_ended_nobody_can_have_spent_anything(caplog: pytest.LogCaptureFixture) -> None:
    """A run of nothing, or of what earlier runs have done."""
    ledger_of(budget=Budget(usd=10)).end()
    assert caplog.messages == []


# --- time ---


@pytest.mark.virtual_clock
async def test_a_budget_of_time_is_reached_when_it_is_over() -> None:
    told: list[Stop] = []
    ledger = ledger_of(budget=Budget(time=60), on_stop=told.append)
    await asyncio.sleep(1000)
    ledger.begin(asyncio.get_running_loop())
    await asyncio.sleep(59.9)
    assert told == []
    await asyncio.sleep(0.2)
    [stop] = told
    assert stop.verdict == TIME_UP
    assert isinstance(stop.error, BudgetReached)
    assert (stop.error.unit, stop.error.limit) == ("time", 60)
    assert stop.error.spent == pytest.approx(60)
    ledger.end()


@pytest.mark.virtual_clock
async def test_time_stops_no_run_that_is_over_or_was_stopped_before() -> None:
    over = ledger_of(budget=Budget(time=60))
    over.begin(asyncio.get_running_loop())
    over.end()
    over.end()
    stopped = ledger_of(budget=Budget(time=60), max_errors=0)
    stopped.begin(asyncio.get_running_loop())
    assert stopped.count(failed()) is not None
    await asyncio.sleep(100)
    stopped.end()


# --- Budget ---


LIMITS = st.floats(0, 1e12, exclude_min=True) | st.integers(1, 10**12)
UNITS = st.dictionaries(st.sampled_from(["usd", "tokens", "pages"]), LIMITS)


@given(time=st.none() | LIMITS, requests=st.none() | st.integers(1), units=UNITS)
def test_a_budget_is_a_plain_value(time: float | None, requests: int | None, units: dict[str, float]) -> None:
    """Equal when its limits are, in whatever order they were given; its repr is the call that makes it."""
    budget = Budget(time=time, requests=requests, **units)
    twin = Budget(**dict(reversed(units.items())), requests=requests, time=time)
    assert budget == twin == pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget)
    assert hash(budget) == hash(twin)
    assert eval(repr(budget), {"Budget": Budget}) == budget
    assert (budget.time, budget.requests, dict(budget.units)) == (time, requests, units)


def test_a_budget_shows_what_is_limited_and_nothing_else() -> None:
    assert repr(Budget()) == "Budget()"
    assert repr(Budget(usd=10, time=3600, requests=50)) == "Budget(time=3600, requests=50, usd=10)"
    assert Budget(usd=10) != Budget(usd=11)
    assert Budget(usd=10) != Budget(eur=10)
    with pytest.raises(AttributeError):
        Budget().time = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong",
    [
        {"time": 0},
        {"time": -1},
        {"time": math.inf},
        {"time": "60"},
        {"requests": 0},
        {"requests": 1.5},
        {"requests": True},
        {"usd": 0},
        {"usd": None},
        {"usd": math.nan},
        {"usd": True},
        {"usd": 10**400},
    ],
    ids=repr,
)
def test_a_limit_that_cannot_be_one_is_refused(wrong: dict[str, Any]) -> None:
    """At once, and not when the run has gone on for an hour; the message shows a call that works."""
    [name] = wrong
    with pytest.raises(UsageError, match=rf"Budget\({name}=.*expected a .*Write Budget\({name}="):
        Budget(**wrong)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("seconds", "time=<seconds>"),
        ("timeout", "time=<seconds>"),
        ("attempts", "requests=<number>"),
        ("calls", "requests=<number>"),
        ("items", "islice"),
        ("jobs", "islice"),
        ("errors", "max_errors=<number>"),
    ],
)
def test_a_name_that_means_something_else_is_refused(name: str, meant: str) -> None:
    """No job would ever spend it, so that it would limit nothing. The message says what to write."""
    with pytest.raises(UsageError, match=rf"Budget\({name}=...\): .*{meant}"):
        Budget(**{name: 10})


# --- rules ---


@pytest.mark.parametrize("max_errors", [None, 0, 7, 0.0, 0.05])
@pytest.mark.parametrize("fail_fast", [None, 1, 50])
@pytest.mark.parametrize("budget", [None, Budget(), Budget(usd=10)])
def test_rules_that_work_are_accepted(max_errors: object, fail_fast: object, budget: object) -> None:
    check_rules(max_errors, fail_fast, budget)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((-1, None, None), "max_errors=-1: expected a count"),
        ((1.0, None, None), "max_errors=1.0: expected a count"),
        ((math.nan, None, None), "max_errors=nan: expected a count"),
        ((True, None, None), "max_errors=True: expected a count"),
        (("5%", None, None), "max_errors='5%': expected a count"),
        ((None, 0, None), "fail_fast=0: expected a whole number of at least 1"),
        ((None, 0.5, None), r"fail_fast=0\.5: expected a whole number of at least 1"),
        ((None, True, None), "fail_fast=True: expected a whole number of at least 1"),
        ((None, None, 10), r"budget=10: expected a Budget. Write budget=penstock\.Budget\(usd=10\)"),
    ],
)
def test_rules_that_cannot_work_are_refused(rules: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_rules(*rules)


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
