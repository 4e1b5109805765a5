"""Many small processing steps in one hop: outcomes in order, a slice of time at a go."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock import ClosedError, Executor, FailureKind, UsageError
from penstock.testing import run_in_virtual_time
from penstock.threads.workers import Worker

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""


class Clock:
    """The process's clock, as far as a batch looks at it: it goes on when a step says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("penstock.threads.batch.clock.steady", clock)
    return clock


def half(number: int) -> float:
    if number % 2:
        raise ValueError(number)
    return number / 2


@given(numbers=st.lists(st.integers(), max_size=30))
def test_outcomes_come_in_the_order_of_the_items_and_an_error_is_its_items_own(numbers: list[int]) -> None:
    """One outcome for each item, with its value or its error."""

    async def main() -> list[penstock.Outcome[float]]:
        async with Executor() as executor:
            return await executor.compute_each(half, numbers)

    outcomes = run_in_virtual_time(main())
    assert [outcome.input for outcome in outcomes] == numbers
    for number, outcome in zip(numbers, outcomes, strict=True):
        if number % 2:
            assert isinstance(outcome.error, ValueError)
            assert (outcome.ok, outcome.value, outcome.kind) == (False, None, FailureKind.PERMANENT)
        else:
            assert (outcome.ok, outcome.value, outcome.kind) == (True, number / 2, None)
        assert (outcome.key, outcome.attempts, outcome.waited) == (None, 0, 0.0)


async def test_the_items_are_iterated_in_the_lane_and_not_on_the_loop() -> None:
    """From `__iter__` on: a cursor may ask the database there."""
    threads = []

    class Cursor:
        def __iter__(self) -> Iterator[int]:
            threads.append(threading.current_thread())
            return iter(range(3))

    async with Executor() as executor:
        outcomes = await executor.compute_each(str, Cursor())
    assert [outcome.value for outcome in outcomes] == ["0", "1", "2"]
    (thread,) = threads
    assert isinstance(thread, Worker)


async def test_inside_a_job_the_executor_need_not_be_named() -> None:
    async def job(items: list[int]) -> list[str | None]:
        return [outcome.value for outcome in await penstock.compute_each(str, items)]

    async with Executor() as executor:
        assert await executor.map(job, [[1, 2], [3], []]) == [["1", "2"], ["3"], []]


async def test_how_long_an_item_took_is_in_its_outcome(clock: Clock) -> None:
    def work(seconds: float) -> None:
        clock.now += seconds
        if seconds == 2:
            raise ValueError

    async with Executor() as executor:
        outcomes = await executor.compute_each(work, [1, 2, 4])
    assert [outcome.ran for outcome in outcomes] == [1, 2, 4]


# --- errors ---


async def test_what_iterating_raises_is_raised() -> None:
    """Wherever it comes: what has been done is of no use without the rest."""

    def items() -> Iterator[int]:
        yield 1
        raise OSError("the cursor is gone")

    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise KeyError("no such table")

    async with Executor() as executor:
        with pytest.raises(OSError, match="the cursor is gone"):
            await executor.compute_each(str, items())
        with pytest.raises(KeyError, match="no such table"):
            await executor.compute_each(str, Broken())


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(1)], ids=repr)
async def test_what_would_end_more_than_the_item_is_the_items_error(error: BaseException) -> None:
    """The items behind it are done all the same."""

    def leave(number: int) -> int:
        if number == 1:
            raise error
        return number

    async with Executor() as executor:
        outcomes = await executor.compute_each(leave, range(3))
    assert [outcome.value for outcome in outcomes] == [0, None, 2]
    assert isinstance(outcomes[1].error, UsageError)
    assert outcomes[1].error.__cause__ is error
    assert outcomes[1].kind is FailureKind.BUG


async def test_a_coroutine_that_a_function_returns_is_its_items_error() -> None:
    """Nobody would await it; it leaves no warning behind."""

    async def double(number: int) -> int:
        return 2 * number

    async with Executor() as executor:
        outcomes = await executor.compute_each(lambda number: double(number), [1, 2])
    assert [type(outcome.error) for outcome in outcomes] == [UsageError] * 2
    assert "returned a coroutine" in str(outcomes[0].error)


async def test_what_cannot_work_is_refused_before_a_thread_is_asked() -> None:
    async def double(number: int) -> int:
        return 2 * number

    wrong: Any = 5
    async with Executor() as executor:
        with pytest.raises(
            UsageError, match=r"compute_each\(.*double, \.\.\.\) found an async function.*executor\.map"
        ):
            await executor.compute_each(double, [1])
        with pytest.raises(UsageError, match=r"compute_each\(fn, 5\): expected items, such as a list"):
            await executor.compute_each(str, wrong)
        with pytest.raises(UsageError, match=r"found 5, expected a function\. Write `executor\.compute_each\(fn, "):
            await executor.compute_each(wrong, [1])
        assert executor.statistics().cpu is None


async def test_a_closed_executor_takes_no_items() -> None:
    async with Executor() as executor:
        pass
    with pytest.raises(ClosedError, match=r"executor\.compute_each\(\) was called after shutdown"):
        await executor.compute_each(str, [1])


async def test_the_rest_is_refused_when_the_executor_is_closed_between_two_slices(clock: Clock) -> None:
    """The caller gets the error, not the outcomes so far."""
    done: list[int] = []

    def slow(number: int) -> None:
        clock.now += 1
        done.append(number)
        if len(done) == 1:
            loop.call_soon_threadsafe(executor._lanes.close)

    loop = asyncio.get_running_loop()
    async with Executor() as executor:
        with pytest.raises(ClosedError, match="was to run in a thread, but its executor has been shut down"):
            await executor.compute_each(slow, range(100_000))
    assert len(done) < 100_000


# --- slices ---


async def test_others_have_their_turn_after_each_slice(clock: Clock) -> None:
    """A batch of hours does not hold up a call that came later."""
    order: list[object] = []

    def slow(number: int) -> None:
        if number == 0:
            first.wait(BOUND)
        clock.now += 0.015
        order.append(number)

    first = threading.Event()
    async with Executor() as executor:
        batch = asyncio.create_task(executor.compute_each(slow, range(6)))
        await asyncio.sleep(0)
        others = [asyncio.create_task(executor.compute(order.append, name)) for name in "ab"]
        await asyncio.sleep(0)
        first.set()
        await asyncio.gather(batch, *others)
        statistics = executor.statistics().cpu
    assert order == [0, 1, "a", "b", 2, 3, 4, 5]
    assert statistics is not None
    assert statistics.calls in (5, 6), "slices of two, and perhaps one that finds nothing left"


async def test_a_cancelled_batch_leaves_the_items_of_the_slices_to_come(clock: Clock) -> None:
    """The slice that runs is finished, which takes no longer than a slice; the lane is free then."""
    entered, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def slow(number: int) -> None:
        entered.set()
        go_on.wait(BOUND)
        clock.now += 0.015
        done.append(number)

    async with Executor() as executor:
        batch = asyncio.create_task(executor.compute_each(slow, range(100)))
        await asyncio.to_thread(entered.wait, BOUND)
        batch.cancel()
        await asyncio.wait([batch])
        assert batch.cancelled()
        go_on.set()
        await executor.compute(int)
    assert done == [0, 1]


async def test_a_batch_that_waits_for_the_lane_and_is_cancelled_begins_nothing() -> None:
    done: list[int] = []
    busy, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        go_on.wait(BOUND)

    async with Executor() as executor:
        holder = asyncio.create_task(executor.compute(hold))
        await asyncio.to_thread(busy.wait, BOUND)
        batch = asyncio.create_task(executor.compute_each(done.append, range(3)))
        await asyncio.sleep(0)
        batch.cancel()
        await asyncio.wait([batch])
        go_on.set()
        await holder
    assert done == []


# --- memory ---


async def test_outcomes_that_were_dropped_hold_no_data() -> None:
    """Neither values nor errors: a run with many failures does not wait for the collector to get its memory back."""

    class Data:
        pass

    def fail(data: Data) -> None:
        raise ValueError(data)

    gc.disable()
    try:
        async with Executor() as executor:
            for fn in (fail, lambda data: data):
                items = [Data(), Data()]
                freed = [weakref.ref(item) for item in items]
                outcomes = await executor.compute_each(fn, items)
                assert len(outcomes) == 2
                del items, outcomes
                await executor.compute(int)
                assert [ref() for ref in freed] == [None, None], fn
    finally:
        gc.enable()


async def test_a_generator_is_left_where_it_was_when_an_item_ends_the_batch() -> None:
    """It belongs to who made it."""
    numbers = iter(range(10))

    class Stop(Exception):
        pass

    def items() -> Iterator[int]:
        for number in numbers:
            if number == 3:
                raise Stop
            yield number

    async with Executor() as executor:
        with suppress(Stop):
            await executor.compute_each(str, items())
    assert next(numbers) == 4
