"""Blocking calls in threads: the limit holds whatever the callers do, and nothing that a call does ends the loop."""

import asyncio
import concurrent.futures
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import ClosedError, Executor, PenstockError, UsageError
from penstock.context import RunningJob, enter
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step
from penstock.threads.lane import Lane

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

HOUR = 3600.0


class Door:
    """Blocking calls that wait until they are let in, and a loop that knows how many have come."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._come = asyncio.Semaphore(0)
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self.inside = self.most = self.total = 0

    def __call__(self) -> str:
        with self._lock:
            self.total += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
        self._loop.call_soon_threadsafe(self._come.release)
        try:
            assert self._opened.wait(BOUND)
        finally:
            with self._lock:
                self.inside -= 1
        return "through"

    async def come(self, calls: int) -> None:
        """Wait until so many more calls stand before the door."""
        for _ in range(calls):
            await self._come.acquire()

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    door = Door()
    yield door
    door.open()


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    lane = Lane("test", 4)
    yield lane
    lane.close()


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


async def all_permits_are_back(lane: Lane, limit: int = 4) -> None:
    """As many calls as the limit allows meet at a barrier, which lets nobody through until all are there."""
    barrier = threading.Barrier(limit, timeout=BOUND)
    await asyncio.gather(*[lane.call(barrier.wait) for _ in range(limit)])
    statistics = lane.statistics()
    assert (statistics.busy, statistics.waiting, statistics.abandoned) == (0, 0, 0)


async def ended(tasks: list["asyncio.Task[Any]"]) -> None:
    await asyncio.wait(tasks)


# --- values, errors, context ---


async def test_a_call_returns_the_value_and_takes_any_arguments(lane: Lane) -> None:
    assert await lane.call(divmod, 7, 2) == (3, 1)
    assert await lane.call(dict, fn=1, self=2, name=3) == {"fn": 1, "self": 2, "name": 3}


async def test_a_call_raises_what_the_function_raised(lane: Lane) -> None:
    """The very object, with its own cause and context, and a traceback that shows the line once."""

    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise errors[0]  # noqa: B904  # the context is what is looked at

    errors = [ValueError("mine")]
    with pytest.raises(ValueError) as caught:
        await lane.call(fail)
    assert caught.value is errors[0]
    assert isinstance(caught.value.__context__, KeyError)
    assert not caught.value.__suppress_context__
    names = [entry.name for entry in caught.traceback]
    assert names.count("__call__") == names.count("fail") == 1


async def test_context_variables_go_in_and_do_not_come_out(lane: Lane) -> None:
    """The thread works in a copy, like a task."""
    variable = contextvars.ContextVar("variable", default="none")

    def exchange() -> str:
        before = variable.get()
        variable.set("set in the thread")
        return before

    variable.set("set by the caller")
    assert await lane.call(exchange) == "set by the caller"
    assert variable.get() == "set by the caller"


@pytest.mark.parametrize(
    "error",
    [
        StopIteration(1),
        StopAsyncIteration(),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
    ],
    ids=repr,
)
async def test_what_would_end_more_than_the_call_comes_back_as_an_error(lane: Lane, error: BaseException) -> None:
    """The loop goes on, the caller is not cancelled, and the message names the function."""

    def leave() -> None:
        raise error

    with pytest.raises(UsageError, match=f"leave raised {type(error).__name__}") as caught:
        await lane.call(leave)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, PenstockError)
    assert await lane.call(int) == 0
    await all_permits_are_back(lane)


# --- threads ---


async def test_threads_have_names_that_say_whose_they_are(lane: Lane) -> None:
    barrier = threading.Barrier(4, timeout=BOUND)

    def name() -> str:
        barrier.wait()
        return threading.current_thread().name

    names = await asyncio.gather(*[lane.call(name) for _ in range(4)])
    assert sorted(names) == [f"penstock-test_{number}" for number in range(4)]


async def test_threads_are_made_when_they_are_needed_and_used_again(lane: Lane) -> None:
    """Calls one after the other share a thread; a lane that is not used has none."""
    before = threading.active_count()
    idents = {await lane.call(threading.get_ident) for _ in range(20)}
    assert len(idents) == 1
    assert threading.active_count() == before + 1


async def test_the_default_executor_stays_free_while_the_lane_is_full(lane: Lane, door: Door) -> None:
    """It also resolves host names."""
    calls = [asyncio.create_task(lane.call(door)) for _ in range(8)]
    await door.come(4)
    assert await asyncio.to_thread(lambda: "free") == "free"
    assert not (await asyncio.to_thread(threading.current_thread)).name.startswith("penstock")
    door.open()
    assert await asyncio.gather(*calls) == ["through"] * 8


async def test_a_call_fails_alone_when_no_thread_can_be_started(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its permit comes back, and it does not start later on."""
    ran: list[int] = []

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(5):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await lane.call(ran.append, 1)
    await all_permits_are_back(lane)
    assert ran == []


async def test_an_idle_thread_holds_nothing_of_the_calls_it_made(lane: Lane) -> None:
    """Neither arguments nor value nor error: each may be large, and a thread may be idle for long."""

    class Thing(SimpleNamespace):
        pass

    def fail(thing: Thing) -> None:
        raise ValueError(thing)

    gc.disable()
    try:
        for fn in (lambda thing: thing, fail):
            thing = Thing()
            freed = weakref.ref(thing)
            await asyncio.gather(lane.call(fn, thing), return_exceptions=True)
            del thing
            await lane.call(int)
            assert freed() is None, fn
    finally:
        gc.enable()


# --- the limit, cancelled and abandoned calls ---


async def test_never_more_threads_are_busy_than_the_limit(lane: Lane, door: Door) -> None:
    """Also when callers give up: forty calls are cancelled, and forty more find the threads still taken."""
    cancelled = [asyncio.create_task(lane.call(door)) for _ in range(40)]
    await door.come(4)
    for call in cancelled:
        call.cancel()
    await ended(cancelled)
    assert all(call.cancelled() for call in cancelled)
    calls = [asyncio.create_task(lane.call(door)) for _ in range(40)]
    await asyncio.sleep(0)
    statistics = lane.statistics()
    assert (statistics.limit, statistics.busy, statistics.waiting, statistics.abandoned) == (4, 4, 40, 4)
    assert statistics.calls == door.total == 4, "those that were cancelled while they waited never started"
    door.open()
    assert await asyncio.gather(*calls) == ["through"] * 40
    assert (door.most, door.total) == (4, 44)
    await all_permits_are_back(lane)


@pytest.mark.virtual_clock
async def test_the_limit_holds_for_calls_that_are_timed_out() -> None:
    """Four of forty hang; all forty callers go on in time; the four keep their permits until they really end."""
    lane = Lane("test", 4)

    async def impatient() -> None:
        async with asyncio.timeout(30):
            await lane.call(latch.wait)

    with ThreadLatch(virtual_loop()) as latch:
        errors = await asyncio.gather(*[impatient() for _ in range(40)], return_exceptions=True)
        assert Counter(type(error) for error in errors) == {TimeoutError: 40}
        assert latch.held == 4
        assert lane.statistics().abandoned == lane.statistics().busy == 4
        waiting = asyncio.create_task(lane.call(int))
        await asyncio.sleep(HOUR)
        assert not waiting.done()
        latch.open()
        assert await waiting == 0
    await all_permits_are_back(lane)
    lane.close()


async def test_an_abandoned_call_is_counted_until_its_thread_ends(lane: Lane, door: Door) -> None:
    call = asyncio.create_task(lane.call(door))
    await door.come(1)
    assert (lane.statistics().busy, lane.statistics().abandoned) == (1, 0)
    call.cancel()
    await ended([call])
    assert (lane.statistics().busy, lane.statistics().abandoned) == (1, 1)
    door.open()
    await all_permits_are_back(lane)


async def test_a_call_that_fails_after_it_was_abandoned_bothers_nobody(lane: Lane, door: Door) -> None:
    """No log record of an exception that was never retrieved."""

    def fail() -> None:
        door()
        raise ValueError

    call = asyncio.create_task(lane.call(fail))
    await door.come(1)
    call.cancel()
    await ended([call])
    door.open()
    await all_permits_are_back(lane)


async def test_a_call_that_is_cancelled_before_its_thread_takes_it_never_starts() -> None:
    """It has its permit, but the thread is still on its way back from the call before."""
    loop_thread = threading.current_thread()
    begin, hold = threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        assert begin.wait(BOUND)
        ran.append("first")

    def hold_up(_: object) -> None:
        if threading.current_thread() is not loop_thread:
            hold.wait(BOUND)

    class Slow(Lane):
        """Its thread is held up between giving the permit back and being idle."""

        def submit(self, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
            future = super().submit(*args, **kwargs)
            future.add_done_callback(hold_up)
            return future

    lane = Slow("test", 1)
    calls = [asyncio.create_task(lane.call(fn)) for fn in (first, lambda: ran.append("second"))]
    await asyncio.sleep(0)
    begin.set()
    while lane.statistics().calls < 2:
        await asyncio.sleep(0)
    assert not calls[0].done()
    calls[1].cancel()
    await ended(calls[1:])
    hold.set()
    await calls[0]
    await all_permits_are_back(lane, 1)
    assert ran == ["first"]
    lane.close()


def test_every_step_of_a_call_can_be_cancelled() -> None:
    """Three calls through a limit of two: whatever is cancelled when, the books are balanced in the end."""

    class Books:
        lane: Lane
        inside = 0

        def work(self) -> None:
            self.inside += 1
            self.inside -= 1

    async def scenario(books: Books) -> None:
        books.lane = Lane("test", 2)
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(books.lane.call(books.work))

    def check(books: Books) -> None:
        if hasattr(books, "lane"):
            statistics = books.lane.statistics()
            assert (statistics.busy, statistics.waiting, statistics.abandoned) == (0, 0, 0)
            assert books.lane._permits._value == 2
            assert books.inside == 0
            books.lane.close()

    assert cancel_at_every_step(scenario, arrange=Books, check=check) >= 3


@pytest.mark.virtual_clock
@pytest.mark.parametrize("end", ["served", "cancelled"])
async def test_the_wait_for_a_thread_counts_as_the_jobs_waiting(end: str) -> None:
    """`Outcome.waited` covers permits; the time in the thread is work and does not count."""
    lane = Lane("test", 1)
    job = RunningJob()

    async def body() -> None:
        enter(job)
        await lane.call(second.wait)

    with ThreadLatch(virtual_loop()) as first, ThreadLatch(virtual_loop()) as second:
        holder = asyncio.create_task(lane.call(first.wait))
        await asyncio.sleep(0)
        task = asyncio.create_task(body())
        await asyncio.sleep(5)
        if end == "cancelled":
            task.cancel()
        first.open()
        await holder
        await asyncio.sleep(7)
        second.open()
        await ended([task])
    assert job.waited == 5
    lane.close()


@pytest.mark.virtual_clock
async def test_the_wait_for_a_thread_is_in_the_outcome() -> None:
    """Two blocking jobs share one thread: the second one waits as long as the first one runs."""
    first = True

    def blocking(_item: int) -> None:
        nonlocal first
        if first:
            first = False
            latch.wait()

    with ThreadLatch(virtual_loop()) as latch:
        asyncio.get_running_loop().call_later(60, latch.open)
        async with Executor(threads=1) as executor:
            outcomes = await executor.as_completed(blocking, [1, 2])
    assert sorted(outcome.waited for outcome in outcomes) == [0, 60]
    assert [outcome.ran for outcome in outcomes] == [60, 60]


# --- close ---


async def test_a_closed_lane_takes_no_calls(lane: Lane) -> None:
    """Closing twice is fine."""
    assert await lane.call(int) == 0
    lane.close()
    lane.close()
    for _ in range(10):
        with pytest.raises(
            ClosedError, match=r"^divmod was to run in a thread, but its executor has been shut down\.$"
        ):
            await lane.call(divmod, 1, 1)


async def test_closing_ends_idle_threads_at_once_and_busy_ones_after_their_call(lane: Lane, door: Door) -> None:
    """It waits for neither: the call that runs goes on and its caller gets the value."""
    idle = await lane.call(threading.current_thread)
    busy = asyncio.create_task(lane.call(door))
    await door.come(1)
    other = await lane.call(threading.current_thread)
    lane.close()
    await asyncio.to_thread(other.join, BOUND)
    assert not other.is_alive()
    assert not busy.done()
    door.open()
    assert await busy == "through"
    await asyncio.to_thread(idle.join, BOUND)
    assert not idle.is_alive()


async def test_closing_wakes_those_that_wait_for_a_thread(lane: Lane, door: Door) -> None:
    """All of them, though no thread comes free: the calls before them may hang for ever."""
    busy = [asyncio.create_task(lane.call(door)) for _ in range(4)]
    await door.come(4)
    waiting = [asyncio.create_task(lane.call(int)) for _ in range(10)]
    await asyncio.sleep(0)
    lane.close()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [ClosedError] * 10
    assert not any(task.done() for task in busy)
    door.open()
    await asyncio.gather(*busy)
    assert lane.statistics().busy == 0


def test_a_lane_that_nobody_closed_lets_its_threads_go() -> None:
    """The lane is collected; its threads do not keep it alive, nor themselves."""

    async def forgetful() -> threading.Thread:
        lane = Lane("test", 2)
        return await lane.call(threading.current_thread)

    thread = asyncio.run(forgetful())
    gc.collect()
    thread.join(BOUND)
    assert not thread.is_alive()


def test_a_loop_that_is_closed_while_a_thread_runs_makes_no_noise() -> None:
    """The permit has nowhere to go back to: neither a warning nor a log record. The thread ends as usual."""
    started, go = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def blocking() -> None:
        threads.append(threading.current_thread())
        started.set()
        go.wait(BOUND)

    async def impatient() -> None:
        lane = Lane("test", 1)
        asyncio.create_task(lane.call(blocking))  # noqa: RUF006  # the end of the loop cancels it
        await asyncio.to_thread(started.wait, BOUND)

    asyncio.run(impatient())
    go.set()
    gc.collect()  # nobody closed the lane: its threads end when it is collected
    threads[0].join(BOUND)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("how", ["executor.submit(hang)", "executor.to_thread(hang)"])
def test_a_thread_that_hangs_does_not_keep_the_interpreter_from_exiting(how: str) -> None:
    """Nobody waits for the call any more; a `ThreadPoolExecutor` would join its thread for ever."""
    program = f"""
import asyncio, threading, penstock
started = threading.Event()
def hang():
    started.set()
    threading.Event().wait()
async def main():
    async with penstock.Executor() as executor:
        task = asyncio.ensure_future({how})
        await asyncio.to_thread(started.wait)
        task.cancel()
asyncio.run(main())
print("left")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=BOUND, check=True)
    assert (done.stdout, done.stderr) == ("left\n", "")


# --- shape ---


async def test_a_lane_can_be_asked_how_busy_it_is(lane: Lane, door: Door) -> None:
    """A frozen record of the moment."""
    before = lane.statistics()
    calls = [asyncio.create_task(lane.call(door)) for _ in range(6)]
    await door.come(4)
    after = lane.statistics()
    assert (before.busy, before.waiting, before.calls) == (0, 0, 0)
    assert (after.busy, after.waiting, after.calls) == (4, 2, 4)
    door.open()
    await asyncio.gather(*calls)
    assert lane.statistics().calls == 6


async def test_a_lane_serves_in_the_order_in_which_it_was_asked(door: Door) -> None:
    """Who gives up is skipped."""
    lane = Lane("test", 1)
    busy = asyncio.create_task(lane.call(door))
    await door.come(1)
    order: list[int] = []
    tasks = [asyncio.create_task(lane.call(order.append, number)) for number in range(20)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    door.open()
    await ended([busy, *tasks])
    assert order == [number for number in range(20) if number != 3]
    lane.close()
