"""Processing in other processes, as the executor offers it: values, errors, statistics, and nothing left at the end."""

import asyncio
import logging
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

import penstock
from penstock import ClosedError, Executor, FailureKind, UsageError, classify
from penstock.threads.lane import LaneStatistics

BOUND = 20.0
"""Seconds of real time after which something hangs. Arbitrary, because it is spent by failing tests only."""


def processes_of(executor: Executor) -> LaneStatistics:
    statistics = executor.statistics().processes
    assert statistics is not None
    return statistics


async def test_a_job_computes_in_another_process() -> None:
    """Values and errors come back, the loop goes on, and no more processes run than allowed."""

    async def job(number: int) -> tuple[int, int]:
        return await penstock.to_process(pow, number, 2), await penstock.to_process(os.getpid)

    async with Executor(processes=1) as executor:
        assert executor.statistics().processes is None, "no process before the first call"
        results = await executor.map(job, range(3))
        assert [square for square, _ in results] == [0, 1, 4]
        assert len({pid for _, pid in results} - {os.getpid()}) == 1
        with pytest.raises(ZeroDivisionError):
            await executor.to_process(divmod, 1, 0)
        with pytest.raises(UsageError, match="lambda"):
            await executor.to_process(lambda: None)
        statistics = processes_of(executor)
        assert (statistics.limit, statistics.busy, statistics.waiting) == (1, 0, 0)
    with pytest.raises(ClosedError):
        await executor.to_process(int)


async def test_a_process_that_dies_fails_its_call_as_transient_and_the_next_one_works() -> None:
    """Once: there is a new process for it."""
    async with Executor(processes=1) as executor:
        with pytest.raises(BrokenProcessPool) as caught:
            await executor.to_process(os.kill, await executor.to_process(os.getpid), signal.SIGKILL)
        assert classify(caught.value) is FailureKind.TRANSIENT
        assert await executor.to_process(int) == 0


async def test_a_process_that_hangs_is_named_and_ended_with_the_executor(caplog: pytest.LogCaptureFixture) -> None:
    """Its call was given up; leaving does not wait for it, and nobody has to end it by hand."""
    async with Executor(processes=1) as executor:
        pid = await executor.to_process(os.getpid)
        hung = asyncio.create_task(executor.to_process(time.sleep, 600))
        async with asyncio.timeout(BOUND):
            while not processes_of(executor).busy:
                await asyncio.sleep(0)
        with caplog.at_level(logging.WARNING, "penstock.threads"):
            hung.cancel()
            await asyncio.wait([hung])
        assert [call.name for call in processes_of(executor).abandoned_calls] == ["sleep"]
        assert "the one thread of 'process' is held by a call that nobody waits for any more: sleep" in caplog.text
        left = time.monotonic()
    assert time.monotonic() - left < BOUND / 4
    deadline = time.monotonic() + BOUND
    while alive(pid):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
