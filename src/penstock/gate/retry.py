"""When to ask again: tenacity's strategy objects are the language, the attempt loop is the gate's own.

tenacity's engine (`AsyncRetrying`) is not used: an object shared by concurrent tasks mixes up their attempts, and it
costs tens of microseconds a call that never fails (`tests/benchmarks/client.py` prints it). Its strategies are pure
functions of a `RetryCallState`, which is made here after the first failure only, with times of the loop's clock.
"""

import inspect
import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tenacity import AsyncRetrying, Future, RetryCallState, retry_all, retry_any, retry_base, stop_after_attempt
from tenacity.retry import retry_if_not_result, retry_if_result
from tenacity.stop import stop_base
from tenacity.wait import wait_base, wait_fixed

from penstock.errors import SkipItem, UsageError, status_of
from penstock.outcome import FailureKind, classify

Kind: TypeAlias = FailureKind | Literal["throttled", "transient", "permanent", "bug"]

On: TypeAlias = (
    Kind
    | type[Exception]
    | int
    | Callable[[BaseException], bool]
    | Collection[Kind | type[Exception] | int | Callable[[BaseException], bool]]
    | retry_base
)
"""What may be retried: kinds, classes of exceptions, HTTP statuses, predicates, or a tenacity `retry`."""

FIRST_WAIT = 0.05
"""Seconds. botocore's base for transient errors in its retry mode of 2026."""
FIRST_WAIT_THROTTLED = 1.0
"""Seconds. botocore's base for throttling errors in its retry mode of 2026."""
LONGEST_WAIT = 20.0
"""Seconds. botocore's cap."""
ATTEMPTS = 3
"""As botocore's standard mode and Google's SRE book ("Handling Overload")."""
MOST_BUDGET = 100.0
"""Retries for each first attempt. Arbitrary, because: more is no budget."""
BUDGET = 0.1
"""As Google's SRE book: retries are at most 10 % of a client's requests."""
TOTAL_TIMEOUT = 600.0
"""Seconds. Arbitrary, because: a batch should outlast a `Retry-After` of minutes, and still end."""


@dataclass(frozen=True)
class Retry:
    """How often, for how long and after which failures a round trip is asked again. A plain value.

    Comparable, picklable, safe to share between any number of tasks and gates.

    Args:
        attempts: executions of the round trip at most, the first one counted. 1 means no retry.
        timeout: seconds for all attempts with their waits, counted from first asking; None for no limit.
            An attempt that cannot start in time is not waited for.
        wait: seconds of back-off, or a tenacity `wait` object. None is full jitter: a random time between 0 and
            `min(20, base * 2 ** (attempt - 1))`, base 0.05 s, and 1 s after throttling (the formula is "full jitter"
            of the AWS Architecture Blog, "Exponential Backoff And Jitter"). A server's `Retry-After` is never undercut.
        on: what may be retried: a `FailureKind`, an exception class, an HTTP status, a predicate `error -> bool`, or a
            collection of these, such as `["throttled", "transient", 500]`; or a tenacity `retry` object. None is
            throttled and transient.
        stop: a tenacity `stop` object, asked in addition to `attempts`.
        budget: retries that a service key has to bear, as a share of its first attempts, over all jobs together. One
            that is beyond it is not given up: it waits until there is room, and then goes behind fresh work. None for
            no budget. The default is the ratio of Google's SRE book ("Handling Overload").

    Raises:
        UsageError: a value that cannot work.
    """

    attempts: int = ATTEMPTS
    timeout: float | None = TOTAL_TIMEOUT
    wait: float | wait_base | None = None
    on: On | None = None
    stop: stop_base | None = None
    budget: float | None = BUDGET

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise UsageError(
                f"Retry(attempts={self.attempts!r}): expected a whole number of at least 1. "
                f"Write Retry(attempts=1) for no retry; a tenacity stop object goes to stop=."
            )
        check_timeout(f"Retry(timeout={self.timeout!r})", self.timeout)
        if isinstance(self.wait, int | float):
            if isinstance(self.wait, bool) or not 0 <= self.wait < math.inf:
                raise UsageError(f"Retry(wait={self.wait!r}): expected seconds of at least 0.")
        elif self.wait is not None and not callable(self.wait):
            raise UsageError(f"Retry(wait={self.wait!r}): expected seconds, or a tenacity wait object.")
        if self.stop is not None and not callable(self.stop):
            raise UsageError(f"Retry(stop={self.stop!r}): expected a tenacity stop object; a number goes to attempts=.")
        if self.on is not None:
            _check_on(self.on)
        number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if self.budget is not None and not (number and 0 < self.budget <= MOST_BUDGET):
            raise UsageError(
                f"Retry(budget={self.budget!r}): expected a share of first attempts above 0, such as 0.1, or None for "
                f"no budget."
            )


def check_timeout(found: str, timeout: object) -> None:
    """Refuse what is no timeout.

    Raises:
        UsageError: neither None nor seconds above 0.
    """
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (number and 0 < timeout < math.inf):  # type: ignore[operator]
        raise UsageError(f"{found}: expected seconds above 0, or None for no limit.")


def _check_on(on: object) -> None:
    if isinstance(on, Collection) and not isinstance(on, str | type):
        for part in on:
            _check_part(part)
    else:
        _check_part(on)


def _check_part(on: object) -> None:
    """Check what may stand alone and in a collection."""
    if isinstance(on, type):
        fits = issubclass(on, Exception)
    elif callable(on):
        _refuse_what_cannot_be_asked(on)
        fits = True
    elif isinstance(on, int):
        fits = on in range(400, 600)
    else:
        fits = on in list(FailureKind)
    if not fits:
        raise UsageError(
            f"Retry(on={on!r}): expected a failure kind ({', '.join(FailureKind)}), a subclass of Exception, an HTTP "
            f"status from 400 to 599, or a predicate on errors. Cancellation is never retried."
        )


def _refuse_what_cannot_be_asked(on: object) -> None:
    if inspect.iscoroutinefunction(on) or inspect.iscoroutinefunction(type(on).__call__):
        raise UsageError(f"Retry(on={on!r}): an async predicate cannot be asked; write a plain function.")
    if isinstance(on, retry_if_result | retry_if_not_result):
        raise UsageError(
            f"Retry(on={type(on).__name__}(...)) asks about values; round trips are retried after errors. "
            f"Raise an exception for such a value, and name its class in on=."
        )
    if isinstance(on, retry_any | retry_all):
        for part in on.retries:
            _refuse_what_cannot_be_asked(part)


class wait_full_jitter(wait_base):  # tenacity's way of naming strategies
    """Full jitter, with a larger base after throttling; see `Retry`."""

    def __call__(self, retry_state: RetryCallState) -> float:
        throttled = classify(_error_of(retry_state)) is FailureKind.THROTTLED
        base = FIRST_WAIT_THROTTLED if throttled else FIRST_WAIT
        exponent = min(retry_state.attempt_number - 1, 30)  # beyond that only the cap counts, and floats overflow
        return random.uniform(0.0, min(LONGEST_WAIT, base * 2.0**exponent))


_ENGINE = AsyncRetrying()  # a RetryCallState wants one; strategies do not look at it


class RetryPolicy:
    """A `Retry`, ready to be asked. Holds no state of a call: one serves any number of concurrent calls."""

    def __init__(self, retry: Retry) -> None:
        self.timeout = retry.timeout
        self._attempts = stop_after_attempt(retry.attempts)
        self._stop = retry.stop
        self._wait = _wait_strategy(retry.wait)
        self._wants = _predicate(retry.on)

    def decide(self, error: Exception, number: int, asked: float, now: float) -> float | str:
        """Seconds to wait after attempt `number`, which failed with `error`; or why no other attempt follows."""
        if isinstance(error, SkipItem):
            return "the item needs no work"
        state = _call_state(error, number, asked, now)
        if not self._wants(state):
            return f"{classify(error)} errors are not retried here"
        if self._attempts(state):
            return f"all {number} attempts used"
        state.upcoming_sleep = float(self._wait(state))  # before `stop`, as in tenacity: stop_before_delay reads it
        if self._stop is not None and self._stop(state):
            return f"{type(self._stop).__name__} said stop"
        return state.upcoming_sleep


def _call_state(error: Exception, number: int, asked: float, now: float) -> RetryCallState:
    state = RetryCallState(_ENGINE, None, (), {})
    state.attempt_number = number
    state.start_time = asked
    state.outcome_timestamp = now
    state.outcome = Future.construct(number, error, True)
    return state


def _wait_strategy(wait: float | wait_base | None) -> Callable[[RetryCallState], float]:
    if wait is None:
        return wait_full_jitter()
    return wait_fixed(wait) if isinstance(wait, int | float) else wait


def _predicate(on: On | None) -> Callable[[RetryCallState], bool]:
    if isinstance(on, retry_base):
        return on
    return lambda state: _matches(on, _error_of(state))


def _matches(on: Any, error: BaseException) -> bool:
    if on is None:
        return classify(error) in (FailureKind.THROTTLED, FailureKind.TRANSIENT)
    if isinstance(on, str):
        return classify(error) == on
    if isinstance(on, type):
        return isinstance(error, on)
    if isinstance(on, int):
        return status_of(error) == on
    if isinstance(on, Collection):
        return any(_matches(part, error) for part in on)
    return bool(on(error))


def _error_of(state: RetryCallState) -> BaseException:
    assert state.outcome is not None, "a policy is asked after failures only"
    error = state.outcome.exception()
    assert error is not None, "a policy is asked after failures only"
    return error
