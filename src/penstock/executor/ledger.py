"""The books of a run, and when they say that it is to stop.

    outcome ends -> count(outcome) ──┐
    penstock.spend(usd=...) -> spend ├──> Stop, once: why, as an error, and in the word of a report
    the time budget's timer ─────────┘

Three rules, each off unless it was asked for: more jobs failed than `max_errors` allows; the first `fail_fast` jobs all
failed; a limit of the `Budget` was reached. `count` answers with the stop, since its caller is about to act on the
outcome anyhow; the others tell it to `on_stop`, on the loop. What a stop does (take no more items, finish what is in
flight) is the feed's business.

**A budget is kept by foresight.** Jobs in flight have used only part of what they will use. So `holds` says when what
finished jobs used, and for each job in flight what they used on average, reaches a limit: then nothing more is begun
until that has changed. What a job uses nobody knows before the first one has ended: until then few are begun.

Guarantees: one stop at the most, the first; none after `end`. Replayed outcomes are not counted here: an earlier run
has judged them. Sums do not drift, however many small amounts are added.

**Threads**: `spend` and `spent` any, all else the loop thread. Nothing blocks.
"""

import asyncio
import logging
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

logger = logging.getLogger("penstock.run")

MINIMUM_SAMPLE = 100
"""Finished jobs before a share is judged. Arbitrary, because: resilience4j and Polly judge from 100 calls on too."""

FIRST_JOBS = 8
"""In flight while nobody knows what a job uses. As many round trips as a gate begins with (`Adaptive(start=8)`)."""

TIME = "time"
REQUESTS = "requests"
RESERVED_UNITS = frozenset({TIME, REQUESTS})
"""Units that are measured, and that nobody can spend by saying so."""


@dataclass(frozen=True, init=False, repr=False)
class Budget:
    """How much a run may use before it takes no more items. A plain value: comparable, picklable, safe to share.

        Budget(time=3600, requests=50_000, usd=10, tokens=2_000_000)

    No more jobs are begun than the limit has room for, as far as finished ones tell what a job uses; what is in flight
    is finished and counts. So a run ends about there, a job or so above it, and by more where jobs differ widely. Until
    the first one has ended, at most 8 are begun.

    Args:
        time: seconds from the first item on.
        requests: attempts of round trips, retries included, counted as each job ends.
        units: of anything that jobs `penstock.spend`. A unit that no job ever spends is named in the log.

    Raises:
        UsageError: a limit that is no number above 0; a name that looks like `time` or `requests`.
    """

    time: float | None
    requests: int | None
    units: tuple[tuple[str, float], ...]
    """Name and limit of each, by name."""

    def __init__(self, *, time: float | None = None, requests: int | None = None, **units: float) -> None:
        _check_names(units)
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


_MEANT = {
    **dict.fromkeys(("seconds", "minutes", "hours", "duration", "timeout", "max_time", "deadline"), "time=<seconds>"),
    **dict.fromkeys(("attempts", "calls", "request", "max_requests", "round_trips"), "requests=<number>"),
    **dict.fromkeys(("jobs", "items", "records"), "the run fewer items, such as itertools.islice(items, 100)"),
    **dict.fromkeys(("errors", "failures", "max_errors"), "the run max_errors=<number>"),
}
"""What is meant by names that no job spends."""


def _check_names(units: Mapping[str, object]) -> None:
    for name in units:
        if name in _MEANT:
            raise UsageError(f"Budget({name}=...): is nothing that jobs spend. Give {_MEANT[name]}.")


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
        """Attempts so far, those of jobs in flight among them."""
        self._ended_jobs = dict.fromkeys((*self._limits, REQUESTS), 0.0)
        """What jobs that have ended used, by unit."""
        self.keeps_a_budget = bool(self._limits) or self._budget.requests is not None
        """Whether `holds` may ever say so."""
        self.watches = False
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
        if not self._ended and self.finished:
            self._name_units_that_nobody_spent()
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def count(self, outcome: Outcome[Any], spent: Mapping[str, float] | None = None) -> Stop | None:
        """A job of this run has ended, which has spent so much; whether the run is to stop for it."""
        self.finished += 1
        if outcome.kind is not None:
            self.failed += 1
        if self.keeps_a_budget:
            self._ended_jobs[REQUESTS] += outcome.attempts
            for unit in self._limits:
                self._ended_jobs[unit] += (spent or {}).get(unit, 0.0)
        if outcome.kind is None:
            self.reassure()
        stop = self._judge(outcome)
        return stop if stop is not None and self._is_first() else None

    def reassure(self) -> None:
        """An item was done by an earlier run: that the first ones fail says nothing about the address or the key."""
        if self._fail_fast is not None:
            self._fail_fast = None
            self._look_whether_to_watch()

    def holds(self, in_flight: int) -> bool:
        """Whether nothing more is to be begun, while so many jobs are in flight: they are expected to use the rest."""
        if not in_flight:
            return False
        if not self.finished:
            return in_flight >= FIRST_JOBS
        requests = self._budget.requests
        if requests is not None and self._foreseen(REQUESTS, in_flight) >= requests:
            return True
        return any(self._foreseen(unit, in_flight) >= limit for unit, limit in self._limits.items())

    def _foreseen(self, unit: str, in_flight: int) -> float:
        used = self._ended_jobs[unit]
        return used + used * in_flight / self.finished

    def attempt(self) -> None:
        """A job has begun an attempt of a round trip. Loop thread only."""
        self._requests += 1

    def used(self, unit: str) -> float:
        """How much of a budget's unit was used so far. Any thread."""
        return self._requests if unit == REQUESTS else self.spent.get(unit, 0.0)

    def _name_units_that_nobody_spent(self) -> None:
        spent = self.spent
        for unit in self._limits:
            if unit not in spent:
                found = f"spent were: {', '.join(spent)}" if spent else "nothing was spent at all"
                logger.warning("Budget(%s=...): no job has spent any %r; %s.", unit, unit, found)

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
        rules = (self._max_errors, self._fail_fast)
        self.watches = self.keeps_a_budget or any(rule is not None for rule in rules)

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
