"""Cancellation tried at every step: whenever it comes, every slot comes back and nothing runs on."""

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from penstock import Executor, FailureKind
from penstock.testing import cancel_at_every_step

Scenario = Callable[[Executor], Awaitable[object]]


async def job(item: int) -> int:
    await asyncio.sleep(item % 3)
    return item


async def numbers() -> AsyncIterator[int]:
    for number in range(6):
        await asyncio.sleep(number % 2)
        yield number


async def whole_map(executor: Executor) -> None:
    assert await executor.map(job, range(8), buffersize=3) == list(range(8))


async def slow_reader(executor: Executor) -> None:
    async with executor.as_completed(job, range(6), buffersize=2, timeout=9) as stream:
        async for _ in stream:
            await asyncio.sleep(2)


async def async_source(executor: Executor) -> None:
    async with executor.map(job, numbers()) as stream:
        async for _ in stream:
            pass


async def failing_map(executor: Executor) -> None:
    async def fail(item: int) -> int:
        await asyncio.sleep(1)
        return 1 // (item - 2)

    with pytest.raises(ZeroDivisionError):
        await executor.map(fail, range(9))


async def submitted(executor: Executor) -> None:
    futures = [executor.submit(job, item) for item in range(6)]
    assert await asyncio.gather(*futures) == list(range(6))


async def nested(executor: Executor) -> None:
    async def parent(item: int) -> int:
        children = [executor.submit(job, item) for item in range(3)]
        return sum(await executor.map(job, range(item))) + sum([await child for child in children])

    assert await executor.map(parent, range(4)) == [3, 3, 4, 6]


async def drained(executor: Executor) -> None:
    for item in range(5):
        executor.submit(job, item)
    await executor.shutdown(timeout=2)


async def run_whole(executor: Executor) -> None:
    report = await executor.run(job, range(6))
    report.verify()
    assert report.done == 6


SCENARIOS = [whole_map, slow_reader, async_source, failing_map, submitted, nested, drained, run_whole]


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_cancelled_at_any_step_everything_comes_back(scenario: Scenario, limit: int) -> None:
    """The program is cancelled at each of its steps: no job, task or slot is left, and slots can all be taken again."""

    async def program(executors: list[Executor]) -> None:
        async with Executor(limit=limit) as executor:
            executors.append(executor)
            await scenario(executor)

    def check(executors: list[Executor]) -> None:
        for executor in executors:
            assert executor.statistics().jobs == 0
            assert free_slots(executor) == limit

    assert cancel_at_every_step(program, arrange=list[Executor], check=check) > 5


@pytest.mark.parametrize(
    "scenario", [whole_map, slow_reader, async_source, submitted, nested], ids=lambda s: s.__name__
)
def test_a_stream_cancelled_at_any_step_leaves_its_executor_usable(scenario: Scenario) -> None:
    """Only the reader is cancelled: the executor goes on, and has all its slots."""

    async def program(executors: list[Executor]) -> None:
        executor = executors[0]
        async with executor:
            reader = asyncio.ensure_future(scenario(executor))
            try:
                await reader
            except asyncio.CancelledError:
                reader.cancel()
                await asyncio.wait([reader])
                await asyncio.sleep(10)  # submitted jobs of a cancelled gather end by themselves
                assert executor.statistics().jobs == 0
                assert free_slots(executor) == 3
                assert await executor.submit(job, 1) == 1
                raise

    cancel_at_every_step(program, arrange=lambda: [Executor(limit=3)])


def free_slots(executor: Executor) -> int:
    """Slots that nobody holds; the books of the permits, not of the jobs."""
    assert executor._jobs is not None
    queue = executor._jobs.slots._free
    assert queue.waiting == 0
    return queue.limit - queue.in_flight


async def leave_at_once(_item: int) -> None:
    raise concurrent.futures.CancelledError("mine")


def leave_in_a_thread(_item: int) -> None:
    raise concurrent.futures.CancelledError("mine")


@pytest.mark.parametrize("leave", [leave_at_once, leave_in_a_thread])
async def test_a_job_that_raises_a_future_s_cancellation_has_cancelled_itself(leave: Callable[[int], Any]) -> None:
    """What a wait for a future in a thread raises: it is the outcome, the very error, and cancels nobody."""
    async with Executor() as executor:
        (outcome,) = [outcome async for outcome in executor.as_completed(leave, [1])]
        assert (outcome.kind, type(outcome.error)) == (FailureKind.CANCELLED, concurrent.futures.CancelledError)
        with pytest.raises(concurrent.futures.CancelledError, match="mine"):
            await executor.submit(leave, 1)
        assert executor.statistics().failed == {FailureKind.CANCELLED: 2}
