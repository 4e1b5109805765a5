"""`submit`: one job, one future."""

import asyncio
import functools
import logging
import threading
from typing import Any

import pytest

from penstock import ClosedError, Executor, FailureKind, JobEnded, UsageError, WrongLoop, WrongThread

pytestmark = pytest.mark.virtual_clock


async def add(left: int, right: int = 0) -> int:
    await asyncio.sleep(1)
    return left + right


async def test_submit_gives_a_future_and_leaves_keywords_to_the_function() -> None:
    """Every keyword belongs to the function, also one that is called `fn` or `timeout`."""

    async def job(**words: Any) -> dict[str, Any]:
        return words

    async with Executor() as executor:
        assert await executor.submit(add, 1, right=2) == 3
        assert await executor.submit(job, fn=1, self=2, timeout=3) == {"fn": 1, "self": 2, "timeout": 3}


async def test_submit_takes_partials_callable_objects_and_plain_functions() -> None:
    """Async ones run on the loop, plain ones in a thread."""

    class Adder:
        async def __call__(self, item: int) -> int:
            return item + 1

    async with Executor() as executor:
        assert await executor.submit(functools.partial(add, 1), 4) == 5
        assert await executor.submit(Adder(), 4) == 5
        assert await executor.submit(divmod, 7, 2) == (3, 1)
        assert (await executor.submit(threading.current_thread)).name.startswith("penstock")


async def test_a_single_call_raises_the_jobs_own_error_unwrapped(caplog: pytest.LogCaptureFixture) -> None:
    """The future raises what the job raised; the log has the traceback, also when nobody looks at the future."""

    async def fail() -> None:
        raise ZeroDivisionError("mine")

    async with Executor() as executor:
        with pytest.raises(ZeroDivisionError, match="mine"):
            await executor.submit(fail)
        executor.submit(fail)
    records = [r for r in caplog.records if r.name == "penstock.jobs"]
    assert len(records) == 2
    assert all(r.levelno == logging.ERROR for r in records)
    assert [r.exc_info is not None for r in records] == [True, False]  # the traceback is told once


async def test_cancelling_the_future_cancels_the_job() -> None:
    """Running or waiting for a slot: it ends, and its slot is free."""
    async with Executor(limit=1) as executor:
        running, waiting, fresh = (executor.submit(add, n) for n in range(3))
        fresh.cancel()
        await asyncio.sleep(0.5)
        waiting.cancel()
        running.cancel()
        for future in (running, waiting, fresh):
            with pytest.raises(asyncio.CancelledError):
                await future
        assert await executor.submit(add, 5) == 5
        statistics = executor.statistics()
        assert (statistics.done, statistics.cancelled, statistics.failed, statistics.jobs) == (1, 3, {}, 0)


async def test_submitted_jobs_start_in_order_and_never_exceed_the_limit() -> None:
    """First in, first out."""
    started: list[int] = []
    running = most = 0

    async def job(item: int) -> None:
        nonlocal running, most
        started.append(item)
        running += 1
        most = max(most, running)
        await asyncio.sleep(item % 3)
        running -= 1

    async with Executor(limit=4) as executor:
        for item in range(40):
            executor.submit(job, item)
    assert started == list(range(40))
    assert most == 4


async def test_what_would_end_the_loop_becomes_an_error_of_the_job() -> None:
    """StopIteration and SystemExit, from async and plain functions."""

    async def stop() -> None:
        raise StopIteration(1)

    async def leave() -> None:
        raise SystemExit(3)

    def leave_plainly() -> None:
        raise SystemExit(4)

    def stop_plainly(_item: int) -> int:
        return next(iter(()))

    async with Executor() as executor:
        for fn in (stop, leave, leave_plainly):
            with pytest.raises(UsageError, match="would end more than this"):
                await executor.submit(fn)
        outcomes = await executor.as_completed(stop_plainly, [1])
        assert outcomes[0].kind is FailureKind.BUG
        assert await executor.submit(add, 1) == 1


async def test_a_job_that_returns_an_unawaited_coroutine_is_told_to_await_it() -> None:
    """The classic: a lambda around an async function."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match=r"returned a coroutine \(add\).*async def.*await add"):
            await executor.submit(lambda: add(1))

        async def forgetful() -> Any:
            return add(1)

        with pytest.raises(UsageError, match="returned a coroutine"):
            await executor.submit(forgetful)


async def test_a_coroutine_object_is_refused_with_the_right_call() -> None:
    """A retry must be able to call again."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match=r"Write `executor.submit\(add, ...\)`, without calling add"):
            executor.submit(add(1))  # type: ignore[call-overload]
        with pytest.raises(UsageError, match="found 17, expected a function"):
            executor.map(17, [])  # type: ignore[call-overload]


async def test_submit_belongs_to_the_loop_thread() -> None:
    """From another thread, with a loop or without one, an error says what to do instead."""
    async with Executor() as executor:

        def outside() -> None:
            executor.submit(add, 1)

        with pytest.raises(
            WrongThread, match=r"in a thread, write `executor\.from_thread\(executor\.submit, \.\.\.\)`"
        ):
            await executor.submit(outside)

        async def on_another_loop() -> None:
            executor.submit(add, 1)

        with pytest.raises(WrongLoop, match="one executor for each loop"):
            await executor.submit(lambda: asyncio.run(on_another_loop()))


async def test_submit_before_opening_and_after_shutdown_is_refused() -> None:
    """A closed executor says so; it is a RuntimeError too, as in the stdlib."""
    executor = Executor()
    with pytest.raises(ClosedError, match="not open yet"):
        executor.submit(add, 1)
    async with executor:
        pass
    with pytest.raises(ClosedError, match="after shutdown") as caught:
        executor.submit(add, 1)
    assert isinstance(caught.value, RuntimeError)
    with pytest.raises(UsageError, match="has been opened before"):
        async with executor:
            pass


async def test_instruments_are_told_of_every_outcome_and_a_broken_one_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Successes and failures; one that raises is logged once, and harms nobody."""

    class Listening:
        def __init__(self) -> None:
            self.ok: list[bool] = []

        def notify(self, event: JobEnded, /) -> None:
            self.ok.append(event.outcome.ok)

    class Broken:
        def notify(self, _event: JobEnded, /) -> None:
            raise RuntimeError("no more paper")

    async def fail() -> None:
        raise ValueError

    listening = Listening()
    async with Executor(instruments=[Broken(), listening]) as executor:
        await executor.submit(add, 1)
        executor.submit(fail)
    assert listening.ok == [True, False]
    assert caplog.text.count("it is told nothing more") == 1


async def test_statistics_and_repr_show_the_state() -> None:
    """Counts are those of the moment; the representation names the state."""
    executor = Executor(limit=3)
    assert repr(executor) == "<Executor new limit=3 jobs=0>"
    async with executor:
        futures = [executor.submit(add, 1) for _ in range(5)]
        assert repr(executor) == "<Executor open limit=3 jobs=5>"
        await asyncio.gather(*futures)
        statistics = executor.statistics()
        assert (statistics.limit, statistics.done, statistics.ran.count, statistics.ran.max) == (3, 5, 5, 1.0)
        assert (statistics.threads, statistics.cpu) == (None, None)
    assert repr(executor) == "<Executor closed limit=3 jobs=0>"


async def test_compute_runs_one_at_a_time_beside_a_busy_blocking_lane() -> None:
    """Response processing has a lane of its own: it is not delayed by blocking calls."""
    release = threading.Event()
    async with Executor(threads=1) as executor:
        blocked = executor.submit(release.wait)
        while (threads := executor.statistics().threads) is None or not threads.busy:
            await asyncio.sleep(0)
        assert await executor.compute(sum, [1, 2, 3]) == 6
        statistics = executor.statistics()
        assert statistics.cpu is not None
        assert statistics.threads is not None
        assert (statistics.cpu.limit, statistics.cpu.calls, statistics.threads.busy) == (1, 1, 1)
        release.set()
        assert await blocked


async def test_a_job_may_be_awaited_from_another_job_without_being_its_child() -> None:
    """A future can be handed around; awaiting it needs no slot."""
    async with Executor(limit=2) as executor:
        first = executor.submit(add, 1)

        async def wait_for(future: "asyncio.Future[int]") -> int:
            return await future

        assert await executor.submit(wait_for, first) == 1
