"""Leaving an executor: drain, cancel, and what becomes of streams and nested jobs meanwhile."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import pytest

import penstock
from penstock import ClosedError, Executor, UsageError
from penstock.executor.active import ActiveJob
from penstock.executor.running import PATIENCE

pytestmark = pytest.mark.virtual_clock


async def nap(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


async def test_leaving_the_block_drains() -> None:
    """Submitted jobs, waiting ones too, have ended when the block is left."""
    async with Executor(limit=2) as executor:
        futures = [executor.submit(nap, 5) for _ in range(10)]
    assert [future.result() for future in futures] == [5] * 10


async def test_leaving_by_an_exception_cancels() -> None:
    """Nothing runs on after an error in the block, and the error is the one that comes out."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    futures = []
    with pytest.raises(ValueError, match="out"):
        async with Executor(limit=2) as executor:
            futures = [executor.submit(nap, 1_000) for _ in range(5)]
            await asyncio.sleep(1)
            raise ValueError("out")
    assert loop.time() - started < 10
    assert all(future.cancelled() for future in futures)


async def test_a_drain_that_is_cancelled_cancels_what_runs() -> None:
    """Ctrl-C while the block waits for its jobs: they are cancelled, and the cancellation comes out."""
    futures = []

    async def program() -> None:
        async with Executor() as executor:
            futures.append(executor.submit(nap, 1_000))

    task = asyncio.create_task(program())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert futures[0].cancelled()


async def test_shutdown_without_waiting_lets_what_runs_go_on() -> None:
    """As in the stdlib: it returns at once, takes nothing new, and what is in flight ends by itself."""
    loop = asyncio.get_running_loop()
    async with Executor() as executor:
        future = executor.submit(nap, 5)
        started = loop.time()
        await executor.shutdown(wait=False)
        assert loop.time() == started
        with pytest.raises(ClosedError, match="after shutdown"):
            executor.submit(nap, 1)
        assert repr(executor).startswith("<Executor draining")
    assert future.result() == 5


async def test_cancel_futures_cancels_only_what_has_not_started() -> None:
    """As in the stdlib: jobs that run are finished."""
    async with Executor(limit=1) as executor:
        running, waiting = executor.submit(nap, 5), executor.submit(nap, 5)
        await asyncio.sleep(1)
        await executor.shutdown(cancel_futures=True)
        assert running.result() == 5
        assert waiting.cancelled()


async def test_timeout_cancels_what_still_runs_after_it() -> None:
    """The drain is bounded when it is asked to be."""
    loop = asyncio.get_running_loop()
    async with Executor() as executor:
        quick, slow = executor.submit(nap, 1), executor.submit(nap, 1_000)
        started = loop.time()
        await executor.shutdown(timeout=10)
        assert loop.time() - started == pytest.approx(10)
        assert quick.result() == 1
        assert slow.cancelled()
        await executor.shutdown()


@pytest.mark.parametrize("value", ["5", -1, float("inf"), float("nan"), True])
async def test_a_timeout_that_cannot_work_is_refused(value: Any) -> None:
    """And nothing is shut down."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match=rf"timeout={value!r}: expected seconds of at least 0, or None"):
            await executor.shutdown(timeout=value)
        assert await executor.submit(nap, 1) == 1


@pytest.mark.parametrize(("opening", "shorter"), [(True, None), (False, None), (True, 2.0), (False, 2.0)])
async def test_a_shutdown_with_a_timeout_bounds_what_opens_and_closes(opening: bool, shorter: float | None) -> None:
    """Also where no signal is involved. It may be asked for again, with a shorter timeout."""
    loop = asyncio.get_running_loop()

    @penstock.job
    async def job() -> AsyncGenerator[Callable[[float], Awaitable[float]], None]:
        if opening:
            await asyncio.sleep(1_000)
        yield nap
        await asyncio.sleep(1_000)

    async with Executor() as executor:
        run = asyncio.create_task(executor.run(job, [0.0]))
        await asyncio.sleep(1)
        started = loop.time()
        for timeout in [10.0] if shorter is None else [10.0, shorter, 10.0]:
            await executor.shutdown(timeout=timeout)
        report = await run
        bound = (shorter or 10.0) + (0 if opening else PATIENCE)
        assert loop.time() - started == pytest.approx(bound)
        assert (report.done, report.stopped) == ((0, "interrupted") if opening else (1, None))


@pytest.mark.parametrize("opening", [True, False])
async def test_a_timeout_of_the_resources_own_is_raised(opening: bool) -> None:
    """It is not taken for the shutdown's."""

    @penstock.job
    async def job() -> AsyncGenerator[Callable[[float], Awaitable[float]], None]:
        if opening:
            raise TimeoutError("mine")
        yield nap
        raise TimeoutError("mine")

    async with Executor() as executor:
        with pytest.raises(TimeoutError, match="mine"):
            await executor.run(job, [0.0])


async def test_a_stream_under_shutdown_delivers_what_was_in_flight_then_says_closed() -> None:
    """Nothing that was finished is lost, and a reader never mistakes the early end for the end of its source."""
    pulled: list[int] = []

    delivered: list[float] = []
    async with Executor(limit=3) as executor:

        async def read() -> None:
            async with executor.as_completed(nap, pulled_numbers(pulled)) as stream:
                async for outcome in stream:
                    delivered.append(outcome.unwrap())

        reader = asyncio.create_task(read())
        await asyncio.sleep(2.5)
        await executor.shutdown()
        with pytest.raises(ClosedError, match="shut down before the source was read to its end"):
            await reader
    assert sorted(delivered) == sorted(float(n % 3) for n in pulled)


def pulled_numbers(pulled: list[int]) -> Iterator[int]:
    """An endless source that remembers what was taken."""
    for number in itertools.count():
        pulled.append(number)
        yield number % 3


async def test_a_stream_whose_source_was_read_to_its_end_ends_well_under_shutdown() -> None:
    """Only streams that had items left say that they were closed."""
    async with Executor() as executor:

        async def read() -> list[float]:
            return await executor.map(nap, [5, 5])

        reader = asyncio.create_task(read())
        await asyncio.sleep(1)
        await executor.shutdown()
        assert await reader == [5, 5]


async def test_running_jobs_may_submit_and_map_while_the_executor_drains() -> None:
    """They could not end without their children."""
    async with Executor(limit=2) as executor:

        async def parent() -> list[float]:
            await asyncio.sleep(1)
            return [await executor.submit(nap, 1), *await executor.map(nap, [1, 2])]

        future = executor.submit(parent)
        stream_of_a_job = executor.submit(nested_stream, executor)
        await asyncio.sleep(0.5)
        await executor.shutdown()
        assert future.result() == [1, 1, 2]
        assert stream_of_a_job.result() == 20


async def nested_stream(executor: Executor) -> int:
    """A job that reads a stream of its own, which was under way when the shutdown came."""
    count = 0
    async with executor.map(nap, [1] * 20) as stream:
        async for _ in stream:
            count += 1
    return count


async def test_a_job_that_shuts_its_executor_down_does_not_wait_for_itself() -> None:
    """The others are cancelled after the timeout, and the job goes on to its end."""
    async with Executor() as executor:

        async def leave() -> str:
            await executor.shutdown(timeout=1)
            return "left"

        other = executor.submit(nap, 1_000)
        assert await executor.submit(leave) == "left"
        assert other.cancelled()


async def test_leaving_does_not_wait_for_an_abandoned_thread() -> None:
    """The job was cancelled; its thread cannot be, and does not hold the loop up."""
    begun, release = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hang() -> None:
        begun.set()
        release.wait()

    try:
        async with Executor() as executor:
            future = executor.submit(hang)
            assert await asyncio.to_thread(begun.wait, 10)
            started = loop.time()
            future.cancel()
        assert loop.time() - started < 1
        statistics = executor.statistics()
        assert statistics.threads is not None
        assert statistics.threads.abandoned == 1
    finally:
        release.set()


async def test_shutdown_from_elsewhere_is_refused() -> None:
    """It belongs to the loop thread, and to an executor that was opened."""
    with pytest.raises(ClosedError, match="not open yet"):
        await Executor().shutdown()


async def test_a_run_that_is_shut_down_while_its_job_opens_is_interrupted() -> None:
    """No item has been taken; the report says why."""

    @penstock.job
    async def slow_to_open() -> AsyncGenerator[Callable[[int], Awaitable[float]], None]:
        await asyncio.sleep(5)
        yield nap

    async with Executor() as executor:
        run = asyncio.create_task(executor.run(slow_to_open, range(10)))
        await asyncio.sleep(1)
        await executor.shutdown(wait=False)
        report = await run
        report.verify()
        assert (report.read, report.stopped, report.exit_code) == (0, "interrupted", 130)


async def test_a_job_whose_loop_was_closed_under_it_tells_nobody() -> None:
    """Its coroutine is closed by the garbage collector, when there is no loop that anything could be posted to."""
    async with Executor() as executor:
        assert executor._jobs is not None
        body = executor._jobs._perform(ActiveJob(executor, None, "nap", nap, (1,)))
        body.send(None)
        body.close()
        assert executor.statistics().cancelled == 0


async def test_a_job_cannot_wait_for_all_jobs_itself_among_them() -> None:
    """Two that did would wait for each other for ever: they are told what to write."""
    async with Executor() as executor:

        async def leave() -> None:
            await executor.shutdown()

        with pytest.raises(UsageError, match="shutdown\\(wait=False\\)"):
            await executor.submit(leave)


async def test_stubborn_sources_hold_a_shutdown_up_once_and_not_each() -> None:
    """Ten sources that swallow their cancellation: the wait for them is bounded as a whole."""
    release = asyncio.Event()

    async def stubborn() -> AsyncGenerator[int, None]:
        yield 1
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    loop = asyncio.get_running_loop()
    async with Executor() as executor:
        readers = [asyncio.ensure_future(executor.map(nap, stubborn())) for _ in range(10)]
        await asyncio.sleep(2)
        started = loop.time()
        await executor.shutdown(timeout=0)
        assert loop.time() - started <= 10
        release.set()
        await asyncio.gather(*readers, return_exceptions=True)


async def test_a_stream_that_a_failed_job_kept_alive_ends_with_the_executor() -> None:
    """Its handle hangs on the traceback of the job's error; the drain does not wait for it."""
    loop = asyncio.get_running_loop()
    outcomes = []
    async with Executor() as executor:

        async def careless(_item: int) -> None:
            stream = executor.as_completed(nap, itertools.repeat(1))
            async for _ in stream:
                raise ValueError

        async with executor.as_completed(careless, [1]) as stream:
            async for outcome in stream:
                outcomes.append(outcome)
        started = loop.time()
    assert loop.time() - started < 3
    assert len(outcomes) == 1


async def test_a_run_whose_source_fails_tells_what_was_done_until_then() -> None:
    """The source's own error comes out, with the account as a note."""

    def source() -> Iterator[int]:
        yield from range(7)
        raise ConnectionError("cursor lost")

    async with Executor() as executor:
        with pytest.raises(ConnectionError, match="cursor lost") as caught:
            await executor.run(nap, source())
    (note,) = caught.value.__notes__
    assert "read 7 = done 7 + failed 0 + left 0" in note


async def test_a_run_whose_job_cannot_be_closed_tells_what_was_done() -> None:
    """All records are done; the error of the clean-up does not take the account with it."""

    @penstock.job
    async def closing_badly() -> AsyncGenerator[Callable[[int], Awaitable[float]], None]:
        yield nap
        raise OSError("flush failed")

    async with Executor() as executor:
        with pytest.raises(OSError, match="flush failed") as caught:
            await executor.run(closing_badly, range(3))
    (note,) = caught.value.__notes__
    assert "read 3 = done 3" in note
