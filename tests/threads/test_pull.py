"""A blocking source in a thread of its own: order, a bound on what is pulled ahead, and an end in every case."""

import asyncio
import contextvars
import gc
import itertools
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Executor, UsageError, WrongLoop, pull_in_thread
from penstock.testing import VirtualClockLoop, cancel_at_every_step
from penstock.threads.pull import ThreadSource

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""


class Source:
    """Numbers that come when they are let: counts what was pulled, and knows its thread."""

    def __init__(self, numbers: Iterable[int], *, after: int | None = None) -> None:
        """Hang before the number `after`, until `go`."""
        self._numbers = iter(numbers)
        self._after = after
        self.pulled = 0
        self.hangs = threading.Event()
        self.go = threading.Event()
        self.thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.thread = threading.current_thread()
        if self.pulled == self._after:
            self.hangs.set()
            assert self.go.wait(BOUND)
        self.pulled += 1
        return next(self._numbers)

    async def ended(self) -> None:
        """Wait until its thread has ended."""
        assert self.thread is not None
        await asyncio.to_thread(self.thread.join, BOUND)
        assert not self.thread.is_alive()


def pulling() -> list[threading.Thread]:
    """The threads that pull now."""
    return [thread for thread in threading.enumerate() if thread.name == "penstock-pull"]


async def collected(items: AsyncIterator[int]) -> list[int]:
    return [item async for item in items]


# --- order, bound, end ---


@given(numbers=st.lists(st.integers()), buffersize=st.integers(1, 10))
def test_items_come_in_order_and_none_is_lost(numbers: list[int], buffersize: int) -> None:
    async def main() -> None:
        assert await collected(pull_in_thread(numbers, buffersize=buffersize)) == numbers

    asyncio.run(main())


@pytest.mark.parametrize("source", [range(200), list(range(200)), iter(range(200)), dict.fromkeys(range(200))])
async def test_any_iterable_will_do(source: Iterable[int]) -> None:
    assert await collected(pull_in_thread(source)) == list(range(200))


@pytest.mark.parametrize("buffersize", [1, 2, 7])
async def test_no_more_is_pulled_ahead_than_the_buffer_holds(buffersize: int) -> None:
    """The item that is in the thread's hand included; each one that is read makes room for one more."""
    ahead = []
    pulled = 0
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal pulled
        for pulled in range(1, 101):
            ahead.append(pulled - read)
            yield pulled

    async for _ in pull_in_thread(numbers(), buffersize=buffersize):
        read += 1
        if read == 1:
            while pulled < buffersize + 1:
                await asyncio.sleep(0)
    assert pulled == read == 100
    assert max(ahead) == buffersize


async def test_a_source_is_not_touched_before_the_first_item_is_asked_for() -> None:
    """Nor is a thread started, so one that is made and not used needs no closing."""
    source = Source(range(3))
    threads = threading.active_count()
    items = pull_in_thread(source)
    assert threading.active_count() == threads
    assert source.pulled == 0
    del items


async def test_the_thread_ends_with_the_source() -> None:
    source = Source(range(3))
    items = pull_in_thread(source)
    assert await collected(items) == [0, 1, 2]
    await source.ended()
    assert await anext(items, "still over") == "still over"


async def test_the_thread_has_a_name_and_the_context_of_who_reads() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("reader")
    items = pull_in_thread((threading.current_thread(), variable.get()) for _ in range(1))
    (found,) = [item async for item in items]
    assert found[0].name == "penstock-pull"
    assert found[0].daemon, "an interpreter that exits does not wait for a source that hangs"
    assert found[1] == "reader"


# --- wake-ups ---


async def test_the_loop_goes_on_while_the_source_blocks() -> None:
    source = Source(range(2), after=1)
    items = pull_in_thread(source)
    assert await anext(items) == 0
    waiting = asyncio.create_task(collected(items))
    await asyncio.to_thread(source.hangs.wait, BOUND)
    assert not waiting.done()
    source.go.set()
    assert await waiting == [1]


async def test_items_that_arrive_together_share_a_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand items of a fast source do not cost a thousand posts to the loop."""
    loop = asyncio.get_running_loop()
    posts = 0
    post = loop.call_soon_threadsafe

    def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
        nonlocal posts
        posts += 1
        return post(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    begin, full = threading.Event(), threading.Event()

    def burst() -> Iterator[int]:
        assert begin.wait(BOUND)
        yield from range(1000)
        full.set()
        yield 1000

    items = pull_in_thread(burst(), buffersize=2000)
    first = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0)
    begin.set()
    assert full.wait(BOUND), "blocks the loop on purpose: no wake-up can be served meanwhile"
    assert await first == 0
    assert await collected(items) == list(range(1, 1001))
    assert posts <= 3


async def test_a_read_that_is_cancelled_loses_no_item() -> None:
    """The next one gets it. An impatient reader may put a time-out around each item."""
    source = Source(range(3), after=1)
    items = pull_in_thread(source)
    assert await anext(items) == 0
    for _ in range(3):
        reading = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
    source.go.set()
    assert await collected(items) == [1, 2]


def test_every_step_of_reading_can_be_cancelled() -> None:
    """The thread ends, the generator is closed, whatever step the reader was cancelled at."""

    class State:
        closed = started = False

        def numbers(self) -> Generator[int, None, None]:
            self.started = True
            try:
                yield from range(4)
            finally:
                self.closed = True

    async def scenario(state: State) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        items = pull_in_thread(state.numbers(), buffersize=1)
        assert isinstance(items, ThreadSource)
        try:
            with loop.external_work():
                assert await collected(items) == [0, 1, 2, 3]
        finally:  # as the executor does; the traceback of the cancellation keeps the iterator from being dropped
            items.stop()

    def check(state: State) -> bool:
        for thread in pulling():
            thread.join(BOUND)
        return state.closed == state.started

    assert cancel_at_every_step(scenario, arrange=State, check=check) >= 3


# --- errors ---


async def test_an_error_of_the_source_comes_after_the_items_before_it() -> None:
    """Once; then it is over."""

    def breaking() -> Iterator[int]:
        yield from range(100)
        raise OSError("the cursor is gone")

    items = pull_in_thread(breaking())
    read = []
    with pytest.raises(OSError, match="the cursor is gone"):
        async for item in items:
            read.append(item)  # what was read is wanted after the error too
    assert read == list(range(100))
    assert await anext(items, "over") == "over"


async def test_an_iterable_that_cannot_even_begin_is_an_error_of_the_source() -> None:
    """`iter()` runs in the thread: it may block too."""

    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise PermissionError(threading.current_thread().name)

    with pytest.raises(PermissionError, match="penstock-pull"):
        await collected(pull_in_thread(Broken()))


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), StopAsyncIteration(), asyncio.CancelledError()], ids=repr
)
async def test_a_source_that_wants_to_leave_does_not_end_the_loop_or_the_items_unnoticed(error: BaseException) -> None:
    class Leaving:
        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            raise error

    with pytest.raises(UsageError, match=f"source of pull_in_thread raised {type(error).__name__}") as caught:
        await collected(pull_in_thread(Leaving()))
    assert caught.value.__cause__ is error


async def test_an_error_makes_no_cycle() -> None:
    """It is freed with its last holder, and the source with it."""
    alive = [0]

    class Error(Exception):
        def __init__(self) -> None:
            alive[0] += 1

        def __del__(self) -> None:
            alive[0] -= 1

    def breaking() -> Iterator[int]:
        yield 1
        raise Error

    async def read() -> None:
        with suppress(Error):
            await collected(pull_in_thread(breaking()))

    gc.disable()
    try:
        await read()
        while pulling():
            await asyncio.sleep(0)
        assert alive == [0]
    finally:
        gc.enable()


# --- leaving early ---


async def test_dropping_the_iterator_stops_the_thread() -> None:
    """`break`, and nobody holds it any more: it does not wait for a reader that never comes."""
    source = Source(itertools.count())
    async for item in pull_in_thread(source, buffersize=3):
        if item == 10:
            break
    await source.ended()
    assert source.pulled <= 11 + 3


async def test_leaving_never_waits_for_a_source_that_hangs() -> None:
    """The thread ends when the source comes back; the item that it brings is nobody's."""
    source = Source(itertools.count(), after=1)
    async for _ in pull_in_thread(source):
        break
    await asyncio.to_thread(source.hangs.wait, BOUND)
    assert source.thread is not None
    assert source.thread.is_alive()
    source.go.set()
    await source.ended()
    assert source.pulled == 2


async def test_stopping_a_source_leaves_what_was_pulled_to_be_read() -> None:
    source = Source(range(100))
    items = pull_in_thread(source, buffersize=3)
    assert isinstance(items, ThreadSource)
    assert await anext(items) == 0
    while source.pulled < 4:
        await asyncio.sleep(0)
    items.stop()
    items.stop()
    assert await collected(items) == [1, 2, 3]
    await source.ended()


async def test_a_generator_is_closed_in_the_thread_that_ran_it() -> None:
    """What it holds may belong to that thread, as sqlite3's connections do, which check it."""
    ended = threading.Event()
    problems: list[BaseException] = []

    def rows() -> Iterator[int]:
        try:
            with closing(sqlite3.connect(":memory:")) as connection:
                yield from (number for (number,) in connection.execute("SELECT 1 UNION SELECT 2 UNION SELECT 3"))
        except sqlite3.Error as problem:
            problems.append(problem)
        finally:
            ended.set()

    generator = rows()
    async for _ in pull_in_thread(generator, buffersize=2):
        break
    assert await asyncio.to_thread(ended.wait, BOUND)
    assert problems == []
    assert list(generator) == [], "closed, though somebody else holds it"


async def test_a_source_that_the_caller_can_close_is_left_open(tmp_path: Any) -> None:
    """A file, for example: who opened it closes it, and may read on."""
    path = tmp_path / "numbers"
    path.write_text("1\n2\n3\n4\n5\n")
    with open(path) as file:  # noqa: ASYNC230  # a blocking file is what this is for
        async for line in pull_in_thread(file, buffersize=1):
            assert line == "1\n"
            break
        while pulling():
            await asyncio.sleep(0)
        assert not file.closed
        assert file.read().endswith("5\n")


async def test_an_error_that_nobody_reads_any_more_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A generator that fails to close, say. It must not vanish."""
    begun = threading.Event()

    def stubborn() -> Iterator[int]:
        try:
            yield 1
        finally:
            begun.set()
            raise OSError("cannot close")

    with caplog.at_level(logging.WARNING, "penstock.sources"):
        async for _ in pull_in_thread(stubborn(), buffersize=1):
            break
        assert await asyncio.to_thread(begun.wait, BOUND)
        while pulling():
            await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.getMessage() == "a source raised an error that nobody reads any more"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], OSError)


async def test_a_finalizer_takes_no_lock() -> None:
    """It may run in any thread at any moment, also in one that holds the buffer's lock, and must not wait for it."""
    items = pull_in_thread(range(3))
    assert isinstance(items, ThreadSource)
    assert await anext(items) == 0
    with items._buffer._lock:
        items.__del__()


def test_a_loop_that_is_closed_while_the_source_hangs_makes_no_noise() -> None:
    """What comes late, here the end, has nowhere to go."""
    source = Source(range(1), after=1)

    async def impatient() -> None:
        items = pull_in_thread(source)
        kept.append(items)
        assert await anext(items) == 0
        reading = asyncio.ensure_future(anext(items))
        await asyncio.to_thread(source.hangs.wait, BOUND)
        reading.cancel()

    kept: list[object] = []
    asyncio.run(impatient())
    source.go.set()
    assert source.thread is not None
    source.thread.join(BOUND)
    assert not source.thread.is_alive()


# --- used wrongly ---


@pytest.mark.parametrize("items", [3, None, collected], ids=["a number", "None", "a function"])
def test_what_is_no_iterable_is_refused(items: Any) -> None:
    with pytest.raises(UsageError, match="expected an iterable that blocks"):
        pull_in_thread(items)


def test_an_async_iterable_needs_no_thread() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(UsageError, match=r"An async iterable needs no thread: give it to `executor\.map` as it is"):
        pull_in_thread(numbers())  # type: ignore[arg-type]


@pytest.mark.parametrize("buffersize", [0, -1, 1.5, "4", None, True], ids=repr)
def test_a_buffer_size_that_cannot_work_is_refused(buffersize: Any) -> None:
    with pytest.raises(UsageError, match=r"expected a whole number of at least 1"):
        pull_in_thread([], buffersize=buffersize)


async def test_two_tasks_cannot_wait_for_an_item_at_once() -> None:
    """The second one is told so; the first one reads on."""
    source = Source(range(2), after=1)
    items = pull_in_thread(source)
    assert await anext(items) == 0
    first = asyncio.create_task(collected(items))
    await asyncio.to_thread(source.hangs.wait, BOUND)
    with pytest.raises(UsageError, match="iterated by one task at a time"):
        await anext(items)
    source.go.set()
    assert await first == [1]


def test_another_loop_cannot_go_on_reading() -> None:
    source = Source(range(3), after=1)
    items = pull_in_thread(source)

    async def read() -> int:
        return await anext(items)

    assert asyncio.run(read()) == 0
    with pytest.raises(WrongLoop, match="began on another event loop"):
        asyncio.run(read())
    source.go.set()


# --- under an executor ---


async def double(item: int) -> int:
    return 2 * item


async def test_it_feeds_a_map() -> None:
    source = Source(range(500))
    async with Executor(limit=8) as executor:
        assert await executor.map(double, pull_in_thread(source)) == [2 * number for number in range(500)]
    await source.ended()


async def test_a_map_that_is_left_early_stops_the_thread() -> None:
    """No more is pulled than the window and the two buffers hold."""
    source = Source(itertools.count())
    async with Executor(limit=4) as executor, executor.map(double, pull_in_thread(source, buffersize=5)) as stream:
        async for value in stream:
            if value == 20:
                break
    await source.ended()
    assert source.pulled <= 11 + 8 + 1 + 5


async def test_a_map_raises_the_error_of_its_source_after_the_values_before_it() -> None:
    def breaking() -> Iterator[int]:
        yield from range(10)
        raise OSError("gone")

    values = []
    async with Executor() as executor:
        with pytest.raises(OSError, match="gone"):
            async with executor.map(double, pull_in_thread(breaking())) as stream:
                async for value in stream:
                    values.append(value)  # what was read is wanted after the error too
    assert values == [2 * number for number in range(10)]


async def test_leaving_an_executor_does_not_wait_for_a_source_that_hangs() -> None:
    source = Source(itertools.count(), after=3)
    async with Executor() as executor, executor.map(double, pull_in_thread(source)) as stream:
        async for value in stream:
            if value == 4:
                break
    assert await asyncio.to_thread(source.hangs.wait, BOUND)
    source.go.set()
    await source.ended()


async def test_a_source_side_by_side_with_another_is_stopped_too() -> None:
    source = Source(itertools.count())

    async def add(left: int, right: int) -> int:
        return left + right

    async with Executor(limit=2) as executor:
        assert await executor.map(add, pull_in_thread(source), range(3)) == [0, 2, 4]
    gc.collect()
    await source.ended()


@pytest.mark.virtual_clock
async def test_a_virtual_clock_stands_still_while_the_source_is_waited_for() -> None:
    """A thread is work outside the loop: a time-out does not fire because the source takes real time."""
    go = threading.Event()

    def source() -> Iterator[int]:
        go.wait(BOUND)
        yield 1

    loop = asyncio.get_running_loop()
    started = loop.time()
    loop.call_soon(lambda: threading.Timer(0.05, go.set).start())
    async with asyncio.timeout(1):
        assert [item async for item in pull_in_thread(source())] == [1]
    assert loop.time() == started
