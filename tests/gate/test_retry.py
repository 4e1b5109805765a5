"""`Retry` is a plain value, its formulas hold, and tenacity's strategy objects are its language."""

import asyncio
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from tenacity.asyncio import retry_if_exception as async_retry_if_exception

from penstock import FailureKind, Gate, HttpStatusError, Retry, UsageError
from penstock.gate.retry import FIRST_WAIT, FIRST_WAIT_THROTTLED, LONGEST_WAIT, RetryPolicy

pytestmark = pytest.mark.virtual_clock

THROTTLED = HttpStatusError(429, "GET", "http://h/")


class Failing:
    """An async function that fails every time, and the times at which it was called."""

    def __init__(self, error: Callable[[], BaseException] = ConnectionError) -> None:
        self._error = error
        self.called: list[float] = []

    async def __call__(self) -> None:
        self.called.append(asyncio.get_running_loop().time())
        raise self._error()

    @property
    def waits(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.called)]


async def failing_under(retry: Retry, error: Callable[[], BaseException] = ConnectionError) -> Failing:
    """What a call that always fails experiences under a policy."""
    fn = Failing(error)
    with pytest.raises(type(error())):
        await Gate("g", retry=retry).call(fn)
    return fn


# --- the value ---


def test_equal_policies_are_equal_and_survive_pickling() -> None:
    """A policy can be compared, stored and sent to another process."""
    retry = Retry(attempts=5, timeout=None, wait=0.5, on=(FailureKind.TRANSIENT, LookupError))
    assert retry == Retry(attempts=5, timeout=None, wait=0.5, on=(FailureKind.TRANSIENT, LookupError))
    assert hash(retry) != hash(Retry())
    assert pickle.loads(pickle.dumps(retry)) == retry != Retry()


def test_a_policy_of_tenacity_objects_survives_pickling() -> None:
    """tenacity's objects compare by identity, but they can be sent."""
    retry = Retry(wait=tenacity.wait_fixed(2), stop=tenacity.stop_after_delay(9), on=tenacity.retry_if_exception_type())
    copy = pickle.loads(pickle.dumps(retry))
    assert RetryPolicy(copy).decide(ValueError(), 1, 0.0, 1.0) == 2


async def never(_: BaseException) -> bool:
    return False


class AsyncPredicate:
    async def __call__(self, error: BaseException) -> bool:
        return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, r"attempts=0.*at least 1.*Retry\(attempts=1\) for no retry"),
        ({"attempts": True}, "attempts=True"),
        ({"attempts": 2.0}, r"attempts=2\.0"),
        ({"attempts": tenacity.stop_after_attempt(3)}, "a tenacity stop object goes to stop="),
        ({"timeout": 0}, "timeout=0.*above 0, or None"),
        ({"timeout": math.nan}, "timeout=nan"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": True}, "timeout=True"),
        ({"wait": -1}, "wait=-1.*at least 0"),
        ({"wait": math.nan}, "wait=nan"),
        ({"wait": math.inf}, "wait=inf"),
        ({"wait": True}, "wait=True"),
        ({"wait": "5"}, "wait='5'.*tenacity wait object"),
        ({"stop": 5}, "stop=5.*a number goes to attempts="),
        ({"on": 200}, "on=200.*an HTTP status from 400 to 599"),
        ({"on": "transiet"}, "on='transiet'.*throttled, transient, permanent"),
        ({"on": int}, "subclass of Exception"),
        ({"on": asyncio.CancelledError}, "Cancellation is never retried"),
        ({"on": (ConnectionError, asyncio.CancelledError)}, "Cancellation is never retried"),
        ({"on": [never]}, "async predicate"),
        ({"on": [True]}, "on=True.*an HTTP status"),
        ({"on": never}, "async predicate"),
        ({"on": AsyncPredicate()}, "async predicate"),
        ({"on": async_retry_if_exception(never)}, "async predicate"),
        ({"on": tenacity.retry_if_result(bool)}, "asks about values"),
        ({"on": tenacity.retry_if_not_result(bool)}, "asks about values"),
        ({"on": tenacity.retry_if_exception_type() | tenacity.retry_if_result(bool)}, "asks about values"),
        ({"on": tenacity.retry_if_exception_type() & tenacity.retry_if_result(bool)}, "asks about values"),
    ],
)
def test_a_policy_that_cannot_work_is_refused_where_it_is_written(options: dict[str, Any], message: str) -> None:
    """Not at the first failure, hours into a run."""
    with pytest.raises(UsageError, match=message):
        Retry(**options)


# --- what is retried ---


@pytest.mark.parametrize(
    ("on", "error", "attempts"),
    [
        (None, ConnectionError(), 2),
        (None, TimeoutError(), 2),
        (None, THROTTLED, 2),
        (None, HttpStatusError(500, "GET", "http://h/"), 1),
        (None, ValueError(), 1),
        (None, KeyError(), 1),
        (FailureKind.PERMANENT, ValueError(), 2),
        ("permanent", ValueError(), 2),
        (FailureKind.PERMANENT, ConnectionError(), 1),
        (ValueError, UnicodeError(), 2),
        (ValueError, ConnectionError(), 1),
        ({FailureKind.TRANSIENT, ValueError}, ValueError(), 2),
        ([FailureKind.TRANSIENT, ValueError], ConnectionError(), 2),
        ((FailureKind.TRANSIENT, ValueError), KeyError(), 1),
        (lambda error: isinstance(error, KeyError), KeyError(), 2),
        (lambda error: isinstance(error, KeyError), ConnectionError(), 1),
        (500, HttpStatusError(500, "GET", "http://h/"), 2),
        (500, HttpStatusError(503, "GET", "http://h/"), 1),
        (["throttled", 500, lambda error: isinstance(error, KeyError)], KeyError(), 2),
        (["throttled", 500, lambda error: isinstance(error, KeyError)], THROTTLED, 2),
        (["throttled", 500, lambda error: isinstance(error, KeyError)], ConnectionError(), 1),
        (tenacity.retry_if_exception_type(KeyError), KeyError(), 2),
        (tenacity.retry_if_not_exception_type(KeyError), KeyError(), 1),
        (tenacity.retry_if_exception_message(match="x") | tenacity.retry_if_exception_type(OSError), OSError(), 2),
        (tenacity.retry_if_exception_message(match="x") & tenacity.retry_if_exception_type(OSError), OSError(), 1),
    ],
)
async def test_what_is_retried_is_what_on_says(on: Any, error: Exception, attempts: int) -> None:
    """None means throttled and transient; kinds, classes, statuses, predicates, several of them, tenacity objects."""
    fn = await failing_under(Retry(attempts=2, wait=0, on=on), lambda: error)
    assert len(fn.called) == attempts


@pytest.mark.parametrize(
    "on",
    [
        tenacity.retry_if_exception(lambda _: True),
        tenacity.retry_if_not_exception_type(KeyError),
        tenacity.retry_always,
        lambda _: True,
        Exception,
    ],
)
async def test_a_cancellation_is_never_retried_whatever_the_policy_would_like(on: Any) -> None:
    """Also one that the function inflicts on itself."""
    fn = Failing(asyncio.CancelledError)
    gate = Gate("g", retry=Retry(attempts=5, wait=0, on=on))
    with pytest.raises(asyncio.CancelledError):
        await gate.call(fn)
    assert len(fn.called) == 1
    assert gate.statistics()[None].in_flight == 0


@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_what_ends_the_program_is_not_retried_and_holds_no_permit(fatal: type[BaseException]) -> None:
    """Only exceptions are failures of an attempt."""
    fn = Failing(fatal)
    gate = Gate("g", limit=1, retry=Retry(on=lambda _: True))
    call = gate.call(fn)
    with pytest.raises(fatal):
        call.send(None)
    assert len(fn.called) == 1
    assert gate.statistics()[None].in_flight == 0


# --- how often and how long ---


async def test_attempts_are_capped() -> None:
    """The first one counts."""
    assert len((await failing_under(Retry(attempts=4, wait=0))).called) == 4


async def test_a_number_as_wait_is_the_wait() -> None:
    """Between the end of one attempt and the start of the next."""
    assert (await failing_under(Retry(attempts=3, wait=2))).waits == [2, 2]


async def test_total_time_is_capped_and_a_retry_that_would_start_late_is_not_waited_for() -> None:
    """Attempts at 0, 4 and 8; the one at 12 would come after the end of 10 seconds."""
    fn = await failing_under(Retry(attempts=99, timeout=10, wait=4))
    assert fn.waits == [4, 4]
    assert asyncio.get_running_loop().time() == fn.called[-1]


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"stop": tenacity.stop_after_attempt(2)}, [1]),
        ({"stop": tenacity.stop_after_delay(2.5)}, [1, 1, 1]),
        ({"stop": tenacity.stop_before_delay(2.5)}, [1, 1]),
        ({"stop": tenacity.stop_after_delay(100) | tenacity.stop_after_attempt(3)}, [1, 1]),
        ({"stop": tenacity.stop_never}, [1] * 5),
        ({"wait": tenacity.wait_exponential(multiplier=1, max=5)}, [1, 2, 4, 5, 5]),
        ({"wait": tenacity.wait_fixed(1) + tenacity.wait_fixed(2)}, [3] * 5),
        ({"wait": tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(7))}, [1, 7, 7, 7, 7]),
        ({"wait": tenacity.wait_incrementing(1, 2)}, [1, 3, 5, 7, 9]),
        ({"wait": lambda state: state.attempt_number * 10}, [10, 20, 30, 40, 50]),
    ],
)
async def test_tenacity_stop_and_wait_objects_work_in_virtual_time(options: dict[str, Any], waits: list[float]) -> None:
    """They see attempt numbers and the loop's own time, as under tenacity's engine."""
    fn = await failing_under(Retry(**{"attempts": 6, "wait": 1, **options}))
    assert fn.waits == waits


@given(number=st.integers(1, 10_000), throttled=st.booleans())
def test_full_jitter_stays_within_its_bounds(number: int, throttled: bool) -> None:
    """0 to base * 2 ** (n - 1), capped at 20 s; base is 0.05 s, after throttling 1 s. No attempt number overflows."""
    policy = RetryPolicy(Retry(attempts=10**9))
    wait = policy.decide(THROTTLED if throttled else ConnectionError(), number, 0.0, 0.0)
    assert isinstance(wait, float)
    base = FIRST_WAIT_THROTTLED if throttled else FIRST_WAIT
    assert 0 <= wait <= min(LONGEST_WAIT, base * 2.0 ** min(number - 1, 1_000))


@pytest.mark.parametrize(("error", "number", "bound"), [(ConnectionError(), 1, 0.05), (THROTTLED, 3, 4.0)])
def test_full_jitter_uses_its_whole_range(error: Exception, number: int, bound: float) -> None:
    """Uniform: the mean is half of the bound. 4,000 draws are off by 5 % once in a few hundred million times."""
    policy = RetryPolicy(Retry(attempts=number + 1))
    draws = [float(policy.decide(error, number, 0.0, 0.0)) for _ in range(4_000)]
    assert sum(draws) / len(draws) == pytest.approx(bound / 2, rel=0.06)
    assert max(draws) <= bound


# --- one policy, many tasks ---


async def test_200_concurrent_calls_of_one_policy_do_not_mix_up_their_attempts() -> None:
    """Each fails its own number of times and gets its own value: what a shared `AsyncRetrying` does not give."""
    retry = Retry(attempts=5, wait=tenacity.wait_fixed(1), stop=tenacity.stop_after_attempt(5))
    gate = Gate("g", limit=200, retry=retry, breaker=None)
    calls = dict.fromkeys(range(200), 0)

    async def fail_some_times(number: int) -> int:
        calls[number] += 1
        await asyncio.sleep(number % 3)
        if calls[number] <= number % 6:
            raise ConnectionError(number)
        return number

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(settled(gate, fail_some_times, number)) for number in calls]
    for number, task in enumerate(tasks):
        ended, attempts = task.result(), calls[number]
        if number % 6 == 5:
            assert isinstance(ended, ConnectionError)
            assert ended.args == (number,)
            assert "all 5 attempts used" in ended.__notes__[0]
            assert attempts == 5
        else:
            assert ended == number
            assert attempts == number % 6 + 1


async def settled(gate: Gate, fn: Callable[[int], Any], number: int) -> object:
    try:
        return await gate.call(fn, number)
    except ConnectionError as error:
        return error
