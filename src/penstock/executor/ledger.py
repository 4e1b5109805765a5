"""The books of a run, and when they say that it is to stop.

    outcome ends -> count(outcome) ──┐
    penstock.spend(usd=...) -> spend ├──> Stop, once: why, as an error, and in the word of a report
    the time budget's timer ─────────┘

Three rules, each off unless it was asked for: more jobs failed than `max_errors` allows; the first `fail_fast` jobs all
failed; a limit of the `Budget` was reached. `count` answers with the stop, since its caller is about to act on the
outcome anyhow; the others tell it to `on_stop`, on the loop. What a stop does (take no more items, finish what is in
flight) is the feed's business.

Guarantees: one stop at the most, the first; none after `end`. Replayed outcomes are not counted here: an earlier run
has judged them. Sums do not drift, however many small amounts are added.

**Threads**: `spend` and `spent` any, all else the loop thread. Nothing blocks.
"""

import asyncio
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from penstock.errors import AllFailed, BudgetReached, TooManyErrors, UsageError, first_line
from penstock.gate.rate import is_amount
from penstock.outcome import Outcome
from penstock.report import ALL_FAILED, BUDGET_REACHED, TIME_UP, TOO_MANY_ERRORS

MINIMUM_SAMPLE = 100
"""Finished jobs before a share is judged. Arbitrary, because: resilience4j and Polly judge from 100 calls on too."""

TIME = "time"
REQUESTS = "requests"
RESERVED_UNITS = frozenset({TIME, REQUESTS})
"""Units that are measured, and that nobody can spend by saying so."""


@dataclass(frozen=True, init=False, repr=False)
class Budget:
    """How much a run may use before it takes no more items. A plain value: comparable, picklable, safe to share.

        Budget(time=3600, requests=50_000, usd=10, tokens=2_000_000)

    When a limit is reached, what is in flight is finished and counts too, so a run ends a little above it: by what the
    jobs in flight still spend.

    Args:
        time: seconds from the first item on.
        requests: attempts of round trips, retries included, counted as each job ends.
        units: of anything that jobs `penstock.spend`.

    Raises:
        UsageError: a limit that is no number above 0.
    """

    time: float | None
    requests: int | None
    units: tuple[tuple[str, float], ...]
    """Name and limit of each, by name."""

    def __init__(self, *, time: float | None = None, requests: int | None = None, **units: float) -> None:
        for name, limit in {TIME: time, **units}.items():
            if limit is not None or name != TIME:
                _check_limit(name, limit)
        if requests is not None and (isinstance(requests, bool) or not isinstance(requests, int) or requests < 1):
            raise UsageError(
                f"Budget(requests={requests!r:.100}): expected a whole number of at least 1. "
                f"Write Budget(requests=50_000); leave it out for no limit."
            )
        object.__setattr__(self, "time", time)
        object.__setattr__(self, "requests", requests)
        object.__setattr__(self, "units", tuple(sorted(units.items())))

    def __repr__(self) -> str:
        limits = [(TIME, self.time), (REQUESTS, self.requests), *self.units]
        return f"Budget({', '.join(f'{name}={limit!r}' for name, limit in limits if limit is not None)})"


def _check_limit(name: str, limit: object) -> None:
    if not is_amount(limit) or limit == 0:
        raise UsageError(
            f"Budget({name}={limit!r:.100}): expected a number above 0. "
            f"Write Budget({name}=10); leave it out for no limit."
        )


def check_rules(max_errors: object, fail_fast: object, budget: object) -> None:
    """Refuse what cannot be a rule for stopping a run.

    Raises:
        UsageError: one of the three is not what a `Ledger` takes.
    """
    if max_errors is not None:
        share = isinstance(max_errors, float)
        number = isinstance(max_errors, int | float) and not isinstance(max_errors, bool)
        if not number or not max_errors >= 0 or (share and max_errors >= 1):  # type: ignore[operator]
            raise UsageError(
                f"max_errors={max_errors!r}: expected a count (int) of at least 0, or a share (float) from 0 to "
                f"below 1."
            )
    if fail_fast is not None and (isinstance(fail_fast, bool) or not isinstance(fail_fast, int) or fail_fast < 1):
        raise UsageError(
            f"fail_fast={fail_fast!r}: expected a whole number of at least 1: so many first jobs that all fail end the "
            f"run. None goes on whatever fails."
        )
    if budget is not None and not isinstance(budget, Budget):
        raise UsageError(f"budget={budget!r:.100}: expected a Budget. Write budget=penstock.Budget(usd=10).")


class Rules(NamedTuple):
    """What ends a run early; see `Ledger`."""

    max_errors: float | None = None
    fail_fast: int | None = None
    budget: Budget | None = None


class Stop(NamedTuple):
    """That a run is to take no more items, and why."""

    error: TooManyErrors | AllFailed | BudgetReached
    verdict: str
    """The same as a report says it."""


class Ledger:
    """The books of one run.

    Args:
        max_errors: an int: how many jobs may fail; a float: which share of the finished ones may, judged from the 100th
            on. None: any number.
        fail_fast: so many first jobs that all fail end the run; one that succeeded or was skipped ends the rule. None:
            no such rule.
        budget: limits, each of which ends the run when it is reached. None: none.
        on_stop: is told, on the loop, of a stop that `count` did not answer with.
    """

    def __init__(
        self,
        *,
        max_errors: float | None,
        fail_fast: int | None,
        budget: Budget | None,
        on_stop: Callable[[Stop], None],
    ) -> None:
        self.finished = 0
        """Outcomes of this run: those that failed, succeeded or were skipped."""
        self.failed = 0
        self._max_errors = max_errors
        self._fail_fast = fail_fast
        self._budget = Budget() if budget is None else budget
        self._limits = dict(self._budget.units)
        self._on_stop = on_stop
        self._first_failure = ""
        self._requests = 0
        self._watches = False
        self._look_whether_to_watch()
        self._stopped = False
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        """For the sums and for who is first to stop."""
        self._sums: dict[str, _Sum] = {}

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """The run begins, and with it the time of its budget."""
        self._loop = loop
        if self._budget.time is not None:
            self._timer = loop.call_later(self._budget.time, self._time_is_up, loop.time(), self._budget.time)

    def end(self) -> None:
        """The run is over: nothing stops it any more. Doing it twice is fine."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def count(self, outcome: Outcome[Any]) -> Stop | None:
        """A job of this run has ended; whether the run is to stop for it."""
        self.finished += 1
        if outcome.kind is not None:
            self.failed += 1
        if not self._watches:
            return None
        self._requests += outcome.attempts
        if outcome.kind is None:
            self.reassure()
        stop = self._judge(outcome)
        return stop if stop is not None and self._is_first() else None

    def reassure(self) -> None:
        """An item was done by an earlier run: that the first ones fail says nothing about the address or the key."""
        if self._fail_fast is not None:
            self._fail_fast = None
            self._look_whether_to_watch()

    def spend(self, units: Mapping[str, float]) -> None:
        """So much was spent. Any thread; also when the run is over, which it no longer stops."""
        reached: BudgetReached | None = None
        with self._lock:
            for unit, amount in units.items():
                total = self._sums.setdefault(unit, _Sum()).add(amount)
                limit = self._limits.get(unit)
                if limit is not None and total >= limit and reached is None:
                    reached = BudgetReached(unit, total, limit)
        if reached is not None and self._is_first():
            self._tell(Stop(reached, BUDGET_REACHED))

    @property
    def spent(self) -> dict[str, float]:
        """All that was spent, by unit. Any thread."""
        with self._lock:
            return {unit: total.value for unit, total in self._sums.items()}

    def _look_whether_to_watch(self) -> None:
        """Most runs have no rule that outcomes could break: they pay for two additions an item."""
        rules = (self._max_errors, self._fail_fast, self._budget.requests)
        self._watches = any(rule is not None for rule in rules)

    def _judge(self, outcome: Outcome[Any]) -> Stop | None:
        stop = None
        if outcome.kind is not None:
            assert outcome.error is not None, "what has a kind has an error"
            stop = self._judge_failure(outcome.error)
        limit = self._budget.requests
        if stop is None and limit is not None and self._requests >= limit:
            return Stop(BudgetReached(REQUESTS, self._requests, limit), BUDGET_REACHED)
        return stop

    def _judge_failure(self, error: BaseException) -> Stop | None:
        if self._max_errors is not None and self._too_many(self._max_errors):
            return Stop(TooManyErrors(self.failed, self.finished, self._max_errors), TOO_MANY_ERRORS)
        if self._fail_fast is not None:
            if self.failed == 1:
                self._first_failure = first_line(error)
            if self.failed >= self._fail_fast:
                return Stop(AllFailed(self.failed, self._first_failure), ALL_FAILED)
        return None

    def _too_many(self, allowed: float) -> bool:
        if isinstance(allowed, float):
            return self.finished >= MINIMUM_SAMPLE and self.failed > allowed * self.finished
        return self.failed > allowed

    def _time_is_up(self, began: float, limit: float) -> None:
        self._timer = None
        assert self._loop is not None, "it has a timer"
        if self._is_first():
            self._tell(Stop(BudgetReached(TIME, self._loop.time() - began, limit), TIME_UP))

    def _is_first(self) -> bool:
        with self._lock:
            first = not self._stopped
            self._stopped = True
            return first

    def _tell(self, stop: Stop) -> None:
        loop = self._loop
        assert loop is not None, "jobs and timers run only after the beginning"
        if asyncio._get_running_loop() is loop:
            self._stop(stop)
        else:
            with suppress(RuntimeError):  # the loop is closed: this thread was left behind by its run
                loop.call_soon_threadsafe(self._stop, stop)

    def _stop(self, stop: Stop) -> None:
        if not self._ended:
            self._on_stop(stop)


class _Sum:
    """A sum of amounts that does not drift: ten times 0.1 is 1.

    What each addition loses is kept beside the sum (A. Neumaier, "Rundungsfehleranalyse einiger Verfahren zur Summation
    endlicher Summen", ZAMM 54, 1974).
    """

    __slots__ = ("_lost", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._lost = 0.0

    def add(self, amount: float) -> float:
        """The sum with `amount`, which is at least 0."""
        total = self._sum + amount
        smaller, larger = sorted((self._sum, float(amount)))
        self._lost += (larger - total) + smaller
        self._sum = total
        return self.value

    @property
    def value(self) -> float:
        """The sum, to the last bit but one; infinity beyond the largest float."""
        return self._sum + self._lost if self._sum < math.inf else math.inf
