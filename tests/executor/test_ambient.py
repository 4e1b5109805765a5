"""`penstock.to_thread` and `penstock.compute`: the executor of the current job, without being handed it."""

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import penstock
from penstock import ClosedError, Executor, UsageError
from penstock.testing import ThreadLatch, VirtualClockLoop

pytestmark = pytest.mark.virtual_clock

Call = Callable[..., Awaitable[Any]]
CALLS = [penstock.to_thread, penstock.compute]


def thread_name() -> str:
    return threading.current_thread().name


@pytest.mark.parametrize(("call", "lane"), [(penstock.to_thread, "thread"), (penstock.compute, "compute")])
async def test_inside_a_job_they_use_the_lanes_of_its_executor(call: Call, lane: str) -> None:
    """Each its own: a long computation must not wait for blocking calls, nor they for it."""

    async def job() -> str:
        name = await call(thread_name)
        assert isinstance(name, str)
        return name

    async with Executor() as executor:
        assert re.fullmatch(rf"penstock-{lane}_\d+ <job .*job>", await executor.submit(job))
        statistics = executor.statistics()
        used, unused = (statistics.threads, statistics.cpu)[:: 1 if lane == "thread" else -1]
        assert used is not None
        assert used.calls == 1
        assert unused is None


@pytest.mark.parametrize("call", CALLS)
async def test_arguments_values_and_errors_pass_unchanged(call: Call) -> None:
    async def job() -> object:
        assert await call(divmod, 7, 2) == (3, 1)
        assert await call(dict, fn=1, self=2) == {"fn": 1, "self": 2}
        return await call(int, "no number")

    async with Executor() as executor:
        with pytest.raises(ValueError, match="no number"):
            await executor.submit(job)


@pytest.mark.parametrize("call", CALLS)
async def test_each_job_finds_the_executor_that_runs_it(call: Call) -> None:
    """With two executors at work; also in tasks that the job starts."""

    async def job() -> None:
        await asyncio.create_task(self_started())

    async def self_started() -> None:
        await call(int)

    async with Executor() as one, Executor() as two:
        await asyncio.gather(one.submit(job), one.submit(job), two.submit(job))
        counts = []
        for executor in (one, two):
            statistics = executor.statistics()
            used = statistics.threads or statistics.cpu
            assert used is not None
            counts.append(used.calls)
    assert counts == [2, 1]


@pytest.mark.parametrize("call", CALLS)
async def test_outside_a_job_they_say_what_to_write(call: Call) -> None:
    """Also within `async with Executor()`: which one would be meant with two of them?"""
    async with Executor():
        with pytest.raises(UsageError, match=r"was called outside a job.*Write `await executor\.(to_thread|compute)\("):
            await call(int)


@pytest.mark.parametrize("call", CALLS)
async def test_a_job_that_outlives_its_executor_gets_an_error(call: Call) -> None:
    """A task that the job left behind; it does not hang, and no thread is made for it."""
    left_behind: list[asyncio.Task[Any]] = []
    closed = asyncio.Event()

    async def later() -> Any:
        await closed.wait()
        return await call(int)

    async def job() -> None:
        left_behind.append(asyncio.create_task(later()))

    async with Executor() as executor:
        await executor.submit(job)
    closed.set()
    threads = threading.active_count()
    with pytest.raises(ClosedError, match="after shutdown"):
        await left_behind[0]
    assert threading.active_count() == threads


async def test_a_task_that_waits_for_a_thread_gets_an_error_when_the_executor_is_closed() -> None:
    """Every thread hangs: none would ever come free for it."""
    left_behind: list[asyncio.Task[Any]] = []
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)

    async def job() -> None:
        left_behind.append(asyncio.create_task(penstock.to_thread(latch.wait)))
        left_behind.append(asyncio.create_task(penstock.to_thread(int)))

    with ThreadLatch(loop) as latch:
        async with Executor(threads=1) as executor:
            await executor.submit(job)
            await asyncio.sleep(1)
        with pytest.raises(ClosedError):
            await left_behind[1]
        assert not left_behind[0].done()
    await left_behind[0]
