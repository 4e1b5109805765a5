"""What jobs spend, and runs that stop: at a budget, when time is up, when they are hopeless. Nothing is lost by it."""

import asyncio
import logging
import math
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import Budget, Executor, FailureKind, Gate, Outcome, Retry, SkipItem, UsageError
from penstock.errors import AllFailed, BudgetReached
from penstock.executor.ledger import FIRST_JOBS
from penstock.report import ALL_FAILED, BUDGET_REACHED, TIME_UP

Job = Callable[[int], Awaitable[Any]]


def spent_so_far() -> dict[str, float]:
    """By the item for which this code runs."""
    job = penstock.current_job()
    assert job is not None
    return dict((job.root or job).spent or {})


async def read(stream: penstock.Stream[Outcome[Any]]) -> tuple[list[Outcome[Any]], Exception | None]:
    """The outcomes that come before the stream's own error, and that."""
    outcomes = []
    try:
        async for outcome in stream:
            outcomes.append(outcome)
    except Exception as error:  # noqa: BLE001  # it is looked at by the tests
        return outcomes, error
    return outcomes, None


# --- spending ---


@pytest.mark.virtual_clock
async def test_a_job_adds_up_what_its_item_has_spent() -> None:
    """By unit; each item for itself."""

    async def job(number: int) -> dict[str, float]:
        penstock.spend(usd=0.5, tokens=number)
        await asyncio.sleep(1)
        penstock.spend(usd=0.25)
        return spent_so_far()

    async with Executor() as executor:
        assert await executor.map(job, [1, 2]) == [{"usd": 0.75, "tokens": 1}, {"usd": 0.75, "tokens": 2}]


@pytest.mark.virtual_clock
async def test_a_submitted_job_adds_up_what_it_spends_though_it_belongs_to_no_run() -> None:
    """It is its own item; a job that it submits works for it."""

    async def child() -> None:
        penstock.spend(usd=2)

    async def job() -> dict[str, float]:
        penstock.spend(usd=1)
        await executor.submit(child)
        return spent_so_far()

    async with Executor() as executor:
        assert await executor.submit(job) == {"usd": 3}


@pytest.mark.virtual_clock
async def test_a_stream_that_a_job_of_no_run_reads_pays_for_itself() -> None:
    """There are no books above it; so a chain of jobs without end keeps no memory of those before it."""

    async def part(_: int) -> dict[str, float]:
        penstock.spend(usd=1)
        return spent_so_far()

    async def job() -> dict[str, float]:
        assert await executor.map(part, range(3)) == [{"usd": 1}] * 3
        return spent_so_far()

    async with Executor() as executor:
        assert await executor.submit(job) == {}


@pytest.mark.virtual_clock
async def test_whoever_works_for_an_item_spends_for_it() -> None:
    """Threads, tasks that its job has started, jobs that it has submitted, and theirs."""

    async def in_a_task() -> None:
        penstock.spend(tasks=1)

    async def grandchild() -> None:
        penstock.spend(grandchildren=1)

    async def child() -> None:
        penstock.spend(children=1)
        await executor.submit(grandchild)

    async def job(_: int) -> dict[str, float]:
        await penstock.to_thread(penstock.spend, threads=1)
        await penstock.compute(penstock.spend, threads=1)
        await asyncio.create_task(in_a_task())
        await executor.submit(child)
        return spent_so_far()

    async with Executor(limit=1) as executor:
        [outcome] = await executor.as_completed(job, [1])
    assert outcome.unwrap() == {"threads": 2, "tasks": 1, "children": 1, "grandchildren": 1}


async def test_threads_that_spend_at_once_lose_nothing() -> None:
    async def job(_: int) -> dict[str, float]:
        def spend() -> None:
            together.wait()
            for _ in range(500):
                penstock.spend(usd=1)

        together = threading.Barrier(4)
        await asyncio.gather(*(penstock.to_thread(spend) for _ in range(4)))
        return spent_so_far()

    async with Executor() as executor:
        assert await executor.map(job, [1]) == [{"usd": 2_000}]


@pytest.mark.virtual_clock
async def test_what_is_spent_in_a_stream_within_a_job_is_spent_by_both() -> None:
    """By the item of the inner stream and by the one whose job reads it, and its run; neither pays twice."""
    inner: list[dict[str, float]] = []

    async def part(_: int) -> None:
        penstock.spend(usd=1)
        await executor.submit(child)
        inner.append(spent_so_far())

    async def child() -> None:
        penstock.spend(usd=2)

    async def job(_: int) -> None:
        await executor.map(part, range(3))
        assert spent_so_far() == {"usd": 9}

    async with Executor() as executor:
        report = await executor.run(job, [1, 2])
    assert inner == [{"usd": 3}] * 6
    assert (report.done, report.spent) == (2, {"usd": 18})


@pytest.mark.virtual_clock
async def test_what_failed_jobs_have_spent_is_spent() -> None:
    async def job(number: int) -> None:
        penstock.spend(usd=1)
        if number % 2:
            raise ValueError("bad")

    async with Executor() as executor:
        report = await executor.run(job, range(10))
    assert (report.failed, report.spent) == (5, {"usd": 10})


def test_outside_a_job_nobody_would_pay() -> None:
    with pytest.raises(UsageError, match="outside a job, so nobody would pay"):
        penstock.spend(usd=1)


@pytest.mark.virtual_clock
@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({}, "found nothing to spend"),
        ({"usd": -1}, r"spend\(usd=-1\): expected a finite number of at least 0"),
        ({"usd": math.nan}, "expected a finite number"),
        ({"usd": math.inf}, "expected a finite number"),
        ({"usd": True}, "expected a finite number"),
        ({"usd": "1"}, "expected a finite number"),
        ({"usd": 10**400}, "expected a finite number"),
        ({"time": 1}, "time is measured, so choose another name"),
        ({"usd": 1, "requests": 1}, "requests is measured, so choose another name"),
    ],
)
async def test_what_cannot_be_spent_is_refused_and_nothing_is_booked(units: dict[str, Any], message: str) -> None:
    async def job(_: int) -> None:
        with pytest.raises(UsageError, match=message):
            penstock.spend(**units)
        assert spent_so_far() == {}

    async with Executor() as executor:
        await executor.map(job, [1])


# --- budgets ---


@pytest.mark.virtual_clock
async def test_a_reached_budget_takes_no_more_items_and_loses_none_that_are_in_flight() -> None:
    """They are finished, delivered and paid for; then the reader is told."""
    began: list[int] = []

    async def job(number: int) -> int:
        began.append(number)
        await asyncio.sleep(1 + number % 3)
        penstock.spend(usd=1)
        return number

    async with Executor(limit=4) as executor:
        stream = executor.as_completed(job, range(1_000), budget=Budget(usd=10))
        outcomes, error = await read(stream)
        counts = stream.statistics()
    assert isinstance(error, BudgetReached)
    assert (error.unit, error.spent, error.limit) == ("usd", 10, 10)
    assert sorted(outcome.unwrap() for outcome in outcomes) == began
    assert 10 <= len(began) < 10 + 4, "no more than were in flight"
    assert (counts.read, counts.left) == (len(began), 0)


@pytest.mark.virtual_clock
async def test_a_run_reports_which_budget_was_reached_and_what_was_spent() -> None:
    async def job(_: int) -> None:
        await asyncio.sleep(1)
        penstock.spend(usd=0.1, tokens=100)

    async with Executor(limit=2) as executor:
        report = await executor.run(job, range(1_000), budget=Budget(usd=1, tokens=100_000))
    report.verify()
    assert (report.stopped, report.exit_code) == (BUDGET_REACHED, 8)
    assert report.why is not None
    assert report.why.startswith("the budget of usd=1 was reached: 1 used")
    assert report.read == report.done
    assert report.spent == {"usd": pytest.approx(0.1 * report.done), "tokens": 100 * report.done}
    assert 10 <= report.done <= 11


@pytest.mark.virtual_clock
async def test_a_budget_that_a_thread_reaches_stops_the_run() -> None:
    """Though it says so while its job still runs: what runs beside it is finished too."""

    async def job(number: int) -> None:
        if number == 5:
            await penstock.to_thread(penstock.spend, usd=1)
        await asyncio.sleep(1)

    async with Executor(limit=3) as executor:
        report = await executor.run(job, range(1_000), budget=Budget(usd=1))
    report.verify()
    assert (report.stopped, report.left) == (BUDGET_REACHED, 0)
    assert 6 <= report.done <= 9


@pytest.mark.virtual_clock
async def test_a_budget_of_requests_counts_attempts() -> None:
    """Retries included."""

    async def flaky(number: int) -> None:
        asked.append(number)
        await asyncio.sleep(0.1)
        if asked.count(number) == 1:
            raise ConnectionResetError

    asked: list[int] = []
    gate = Gate("service", limit=1, retry=Retry(attempts=3))

    async def job(number: int) -> None:
        await gate.call(flaky, number)

    async with Executor(limit=1) as executor:
        report = await executor.run(job, range(1_000), budget=Budget(requests=7))
    report.verify()
    assert (report.stopped, report.done, report.attempts) == (BUDGET_REACHED, 4, 8)


@pytest.mark.virtual_clock
@pytest.mark.parametrize("at", ["beginning", "end"])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "journal"])
async def test_a_budget_is_kept_however_many_jobs_may_run_at_once(tmp_path: Path, at: str, recorded: bool) -> None:
    """256 slots, and money for ten jobs: nobody finds out at the end that it was spent 25 times."""
    most = running = 0

    async def job(_: int) -> None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        if at == "beginning":
            penstock.spend(usd=1)
        await asyncio.sleep(0.2)
        if at == "end":
            penstock.spend(usd=1)
        running -= 1

    options: dict[str, Any] = {"key": int, "journal": tmp_path / "run.db"} if recorded else {}
    async with Executor(limit=256) as executor:
        report = await executor.run(job, range(2_000), budget=Budget(usd=10), **options)
    report.verify()
    assert (report.stopped, report.exit_code) == (BUDGET_REACHED, 8)
    assert 10 <= report.spent["usd"] <= 11
    assert report.done == report.spent["usd"]
    assert most == FIRST_JOBS


@pytest.mark.virtual_clock
async def test_once_it_is_known_what_a_job_uses_all_slots_are_used_that_the_budget_has_room_for() -> None:
    """A budget makes a run no slower than it has to be."""
    loop = asyncio.get_running_loop()

    async def job(_: int) -> None:
        await asyncio.sleep(1)
        penstock.spend(usd=1)

    async with Executor(limit=100) as executor:
        began = loop.time()
        report = await executor.run(job, range(10_000), budget=Budget(usd=1_000))
    assert report.done == 1_000
    assert loop.time() - began == pytest.approx(11, abs=0.5)


@pytest.mark.virtual_clock
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "journal"])
async def test_a_budget_of_requests_is_kept_by_many_jobs_at_once(tmp_path: Path, recorded: bool) -> None:
    """A quota of 100 calls, and jobs that make two each; the reason tells how many it were in the end."""

    async def call() -> None:
        await asyncio.sleep(0.1)

    gate = Gate("service", limit=500)

    async def job(_: int) -> None:
        await gate.call(call)
        await gate.call(call)

    options: dict[str, Any] = {"key": int, "journal": tmp_path / "run.db"} if recorded else {}
    async with Executor(limit=256) as executor:
        report = await executor.run(job, range(2_000), budget=Budget(requests=100), **options)
    report.verify()
    assert report.stopped == BUDGET_REACHED
    assert 100 <= report.attempts <= 102
    assert report.done * 2 == report.attempts
    assert report.why is not None
    assert report.why.startswith(f"the budget of requests=100 was reached: {report.attempts} used")


@pytest.mark.virtual_clock
async def test_the_reason_tells_what_was_used_in_the_end() -> None:
    """With what was in flight when it was reached."""

    async def job(number: int) -> None:
        await asyncio.sleep(number + 1)
        penstock.spend(usd=10)

    async with Executor(limit=3) as executor:
        report = await executor.run(job, range(100), budget=Budget(usd=10))
    assert report.spent == {"usd": 30}
    assert report.why is not None
    assert report.why.startswith("the budget of usd=10 was reached: 30 used")


@pytest.mark.virtual_clock
async def test_a_run_tells_of_a_unit_that_no_job_has_spent(caplog: pytest.LogCaptureFixture) -> None:
    """In its log: a misspelt budget limits nothing."""

    async def job(_: int) -> None:
        penstock.spend(usd=1)

    async with Executor() as executor:
        report = await executor.run(job, range(10), budget=Budget(use=5))
        assert (report.done, report.stopped) == (10, None)
        await executor.run(job, range(10), budget=Budget(usd=1_000))
    assert caplog.messages == ["Budget(use=...): no job has spent any 'use'; spent were: usd."]


@pytest.mark.virtual_clock
async def test_when_its_time_is_up_a_run_finishes_what_it_has_begun() -> None:
    async def job(_: int) -> None:
        await asyncio.sleep(3)

    loop = asyncio.get_running_loop()
    async with Executor(limit=2) as executor:
        began = loop.time()
        report = await executor.run(job, range(1_000), budget=Budget(time=10))
        assert loop.time() - began == pytest.approx(12)
    report.verify()
    assert (report.stopped, report.exit_code) == (TIME_UP, 10)
    assert (report.done, report.left) == (8, 0)
    assert report.why is not None
    assert report.why.startswith("the budget of time=10 was reached: 10 s used")


@pytest.mark.virtual_clock
async def test_time_that_is_not_used_up_stops_nothing() -> None:
    """And leaves no timer behind that could."""

    async def job(_: int) -> None:
        await asyncio.sleep(1)

    async with Executor() as executor:
        report = await executor.run(job, range(10), budget=Budget(time=10))
        assert (report.done, report.stopped, report.exit_code) == (10, None, 0)
        await asyncio.sleep(100)


def test_a_script_may_have_a_budget() -> None:
    async def job(_: int) -> None:
        penstock.spend(usd=1)

    report = penstock.run(job, range(1_000), limit=1, budget=Budget(usd=3), progress=False)
    report.verify()
    assert (report.stopped, report.exit_code) == (BUDGET_REACHED, 8)
    assert 3 <= report.done < 1_000
    assert report.spent == {"usd": report.done}


def test_a_script_s_wrong_rules_are_refused() -> None:
    with pytest.raises(UsageError, match="fail_fast=0: expected a whole number"):
        penstock.run(print, [1], fail_fast=0, progress=False)


@pytest.mark.virtual_clock
async def test_wrong_rules_are_refused_before_anything_runs() -> None:
    async def job(_: int) -> None:
        raise AssertionError("it must not run")

    async with Executor() as executor:
        with pytest.raises(UsageError, match="budget=10: expected a Budget"):
            executor.as_completed(job, [1], budget=10)  # type: ignore[call-overload]
        with pytest.raises(UsageError, match="fail_fast=0: expected a whole number"):
            await executor.run(job, [1], fail_fast=0)


# --- hopeless runs ---


@pytest.mark.virtual_clock
@pytest.mark.parametrize("fail_fast", [50, 3])
async def test_a_run_whose_first_items_all_fail_is_not_carried_on(fail_fast: int) -> None:
    """A wrong key is not to be tried a million times. 50 unless another number is given."""

    async def job(_: int) -> None:
        await asyncio.sleep(1)
        raise PermissionError("bad key")

    async with Executor(limit=2) as executor:
        if fail_fast == 50:
            report = await executor.run(job, range(100_000))
        else:
            report = await executor.run(job, range(100_000), fail_fast=fail_fast)
    report.verify()
    assert (report.stopped, report.exit_code) == (ALL_FAILED, 8)
    assert fail_fast <= report.failed <= fail_fast + 1
    assert report.why is not None
    assert report.why.startswith(f"the first {fail_fast} jobs all failed, the first one by 'PermissionError: bad key'")


@pytest.mark.virtual_clock
@pytest.mark.parametrize("end", ["succeeded", "skipped"])
async def test_a_run_with_a_success_among_the_first_goes_on(end: str) -> None:
    async def job(number: int) -> None:
        if number != 20:
            raise PermissionError("bad key")
        if end == "skipped":
            raise SkipItem("of no use")

    async with Executor() as executor:
        report = await executor.run(job, range(300))
    assert (report.stopped, report.failed, report.read) == (None, 299, 300)


@pytest.mark.virtual_clock
async def test_a_hopeless_run_goes_on_where_that_is_asked_for_and_streams_unless_it_is() -> None:
    """A stream's reader sees for itself how it goes."""

    async def job(_: int) -> None:
        raise PermissionError("bad key")

    async with Executor() as executor:
        report = await executor.run(job, range(300), fail_fast=None)
        outcomes, error = await read(executor.as_completed(job, range(300)))
    assert (report.stopped, report.failed) == (None, 300)
    assert (len(outcomes), error) == (300, None)


# --- items that need no work ---


@pytest.mark.virtual_clock
async def test_an_item_that_needs_no_work_is_neither_a_success_nor_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The outcome carries what the job said, and no kind of failure; the log is not bothered with it."""

    async def job(number: int) -> int:
        if number % 2:
            raise SkipItem("odd")
        return number

    with caplog.at_level(logging.DEBUG, "penstock"):
        async with Executor() as executor:
            outcomes, error = await read(executor.as_completed(job, range(10), max_errors=0))
            report = await executor.run(job, range(10), max_errors=0)
    assert error is None
    skips = [outcome for outcome in outcomes if not outcome.ok]
    assert {(type(skip.error), str(skip.error), skip.kind) for skip in skips} == {(SkipItem, "odd", None)}
    report.verify()
    assert (report.done, report.skipped, report.failed, report.exit_code) == (5, 5, 0, 0)
    assert caplog.records == []


@pytest.mark.virtual_clock
async def test_a_class_of_your_own_may_say_that_an_item_needs_no_work() -> None:
    class Known(SkipItem):
        failure_kind = FailureKind.TRANSIENT

    async def job(_: int) -> None:
        raise Known

    async with Executor() as executor:
        [outcome] = await executor.as_completed(job, [1])
    assert (type(outcome.error), outcome.kind) == (Known, None)


@pytest.mark.virtual_clock
async def test_a_gate_takes_an_item_that_needs_no_work_for_no_failure_of_its_service() -> None:
    """It is not tried again, and the circuit stays closed however many they are."""

    async def look(_: int) -> None:
        raise SkipItem("no such address")

    gate = Gate("service")

    async def job(number: int) -> None:
        await gate.call(look, number)

    async with Executor() as executor:
        report = await executor.run(job, range(200))
        [key] = gate.statistics().values()
    assert (report.skipped, report.attempts, report.stopped) == (200, 200, None)
    assert (key.breaker, key.opened, key.retries) == ("closed", 0, 0)


@pytest.mark.virtual_clock
async def test_a_submitted_job_and_a_map_raise_it_to_whoever_asked() -> None:
    """There is no outcome that could carry it."""

    async def job(_: int = 0) -> None:
        raise SkipItem("why")

    async with Executor() as executor:
        with pytest.raises(SkipItem, match="why"):
            await executor.submit(job)
        with pytest.raises(SkipItem, match="why"):
            await executor.map(job, [1])


def test_the_errors_that_stop_a_stream_are_penstock_s() -> None:
    """So one `except` around the loop over a stream is enough."""
    assert issubclass(BudgetReached, penstock.PenstockError)
    assert issubclass(AllFailed, penstock.PenstockError)
