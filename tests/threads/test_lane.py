"""Blocking calls in threads: the limit holds whatever the callers do, and nothing that a call does ends the loop."""

import asyncio
import concurrent.futures
import contextvars
import gc
import logging
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import ClosedError, Executor, JobTimeout, PenstockError, UsageError, WrongThread
from penstock.context import RunningJob, enter
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step, run_in_virtual_time
from penstock.threads.call import AbandonedCall, Call, SubmittedCall
from penstock.threads.lane import Lane
from penstock.threads.portal import Portal
from penstock.threads.workers import SHARED, Worker, Workers

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
def workers() -> Iterator[Workers]:
    """A set of threads for the test alone."""
    workers = Workers(64)
    yield workers
    workers.dismiss()
    assert workers._promised == 0, "each thread that was promised has been used or given back"


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
    while lane.abandoned:  # its permit is back as soon as its thread is, and the loop is told a little later
        await asyncio.sleep(0)
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
    assert names.count("run") == names.count("fail") == 1


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


async def test_threads_have_names_that_say_whose_they_are(workers: Workers) -> None:
    """The lane and the job, or the function where there is no job."""
    lane = Lane("test", 4, workers=workers)
    barrier = threading.Barrier(4, timeout=BOUND)

    def meet() -> str:
        barrier.wait()
        return threading.current_thread().name

    names = await asyncio.gather(*[lane.call(meet) for _ in range(4)])
    assert sorted(names) == [f"penstock-test_{number} {meet.__qualname__}" for number in range(4)]
    enter(job := RunningJob())
    job.name = "mine"
    assert await lane.call(lambda: threading.current_thread().name) in [
        f"penstock-test_{number} <job mine>" for number in range(4)
    ]


async def test_threads_are_made_when_they_are_needed_and_used_again(workers: Workers) -> None:
    """Calls one after the other share a thread; a lane that is not used has none."""
    lane = Lane("test", 4, workers=workers)
    assert workers.threads == ()
    idents = {await lane.call(threading.get_ident) for _ in range(20)}
    assert len(idents) == len(workers.threads) == 1


async def test_lanes_share_their_threads(workers: Workers) -> None:
    """A thread that is idle in one of them works for the other."""
    one, other = Lane("one", 4, workers=workers), Lane("other", 4, workers=workers)
    assert await one.call(threading.get_ident) == await other.call(threading.get_ident)
    assert len(workers.threads) == 1


async def test_the_default_executor_stays_free_while_the_lane_is_full(lane: Lane, door: Door) -> None:
    """It also resolves host names."""
    calls = [asyncio.create_task(lane.call(door)) for _ in range(8)]
    await door.come(4)
    assert await asyncio.to_thread(lambda: "free") == "free"
    assert not (await asyncio.to_thread(threading.current_thread)).name.startswith("penstock")
    door.open()
    assert await asyncio.gather(*calls) == ["through"] * 8


async def test_a_call_fails_alone_when_no_thread_can_be_started(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its permit comes back, and it does not start later on."""
    lane = Lane("test", 4, workers=workers)
    ran: list[int] = []

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(5):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await lane.call(ran.append, 1)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await asyncio.wrap_future(lane.submit(ran.append, 1))
    starts = threading.Thread.start

    def refuse_workers(thread: threading.Thread) -> None:
        if isinstance(thread, Worker):
            refuse(thread)
        starts(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_workers)
        elsewhere = await asyncio.to_thread(lane.submit, ran.append, 1)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await asyncio.wrap_future(elsewhere)
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


async def test_a_call_that_is_cancelled_before_its_thread_takes_it_never_starts(workers: Workers) -> None:
    """It is the next one, but the only thread is still with the call before."""
    lane = Lane("test", 1, workers=workers)
    door = Door()
    ran: list[str] = []
    first = asyncio.create_task(lane.call(door))
    await door.come(1)
    second = asyncio.create_task(lane.call(ran.append, "second"))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    door.open()
    await ended([first, second])
    await all_permits_are_back(lane, 1)
    assert (ran, lane.statistics().never_started) == ([], 1)


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
            assert books.lane._runners == 0
            assert statistics.calls + statistics.never_started == books.lane.asked
            assert books.inside == 0
            books.lane.close()

    assert cancel_at_every_step(scenario, arrange=Books, check=check) >= 3


@pytest.mark.virtual_clock
@pytest.mark.parametrize("end", ["served", "cancelled"])
async def test_the_wait_for_a_thread_counts_as_the_jobs_waiting(end: str) -> None:
    """`Outcome.waited` covers permits; the time in the thread is work and does not count."""
    lane = Lane("test", 1)
    job = RunningJob()
    job.name = "body"

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


async def test_closing_does_not_wait_for_calls_that_run(lane: Lane, door: Door) -> None:
    """They go on, and their callers get the values."""
    busy = asyncio.create_task(lane.call(door))
    await door.come(1)
    lane.close()
    assert not busy.done()
    door.open()
    assert await busy == "through"


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


async def test_a_lane_that_nobody_closed_is_collected_though_its_threads_live_on(workers: Workers) -> None:
    """Idle threads do not keep it alive."""
    lane = Lane("test", 2, workers=workers)
    freed = weakref.ref(lane)
    assert await lane.call(int) == 0
    del lane
    while workers.threads and not workers._parked:
        await asyncio.sleep(0)
    gc.collect()
    assert freed() is None
    assert len(workers.threads) == 1


def test_a_loop_that_is_closed_while_a_thread_runs_makes_no_noise(workers: Workers) -> None:
    """The permit has nowhere to go back to: neither a warning nor a log record. The thread ends as usual."""
    started, go = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def blocking() -> None:
        threads.append(threading.current_thread())
        started.set()
        go.wait(BOUND)

    async def impatient() -> None:
        lane = Lane("test", 1, workers=workers)
        asyncio.create_task(lane.call(blocking))  # noqa: RUF006  # the end of the loop cancels it
        await asyncio.to_thread(started.wait, BOUND)

    asyncio.run(impatient())
    go.set()
    workers.dismiss()
    threads[0].join(BOUND)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("how", ["executor.submit(hang)", "executor.to_thread(hang)"])
def test_a_thread_that_hangs_does_not_keep_the_interpreter_from_exiting(how: str) -> None:
    """Nobody waits for the call any more; a `ThreadPoolExecutor` would join its thread for ever. It is named once."""
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
        await asyncio.wait([task])
asyncio.run(main())
print("left")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=BOUND, check=True)
    assert done.stdout == "left\n"
    assert re.fullmatch(
        r"1 call still runs in a thread that nobody waits for: hang \(\d+\.\d s\)\. The program's exit ends it\.\n",
        done.stderr,
    )


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
    """Who has given up is skipped."""
    lane = Lane("test", 1)
    busy = asyncio.create_task(lane.call(door))
    await door.come(1)
    order: list[int] = []
    tasks = [asyncio.create_task(lane.call(order.append, number)) for number in range(20)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    await asyncio.sleep(0)  # a thread may start a call until its caller has noticed
    door.open()
    await ended([busy, *tasks])
    assert order == [number for number in range(20) if number != 3]
    lane.close()


# --- calls that nobody waits for ---


async def test_every_call_that_is_asked_for_is_accounted_for() -> None:
    """200 calls of 300 ms, each given 50 ms, through four threads: a call for each thread begins, and no other."""
    lane = Lane("test", 4)
    lock = threading.Lock()
    busy = most = done = 0

    def slow() -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.3)
        with lock:
            busy -= 1

    async def impatient() -> None:
        nonlocal done
        async with asyncio.timeout(0.05):
            await lane.call(slow)
        done += 1

    errors = await asyncio.gather(*[impatient() for _ in range(200)], return_exceptions=True)
    statistics = lane.statistics()
    assert {type(error) for error in errors} == {TimeoutError}
    assert (most, statistics.busy, statistics.abandoned, statistics.waiting) == (4, 4, 4, 0)
    assert (done, statistics.given_up, statistics.never_started) == (0, 4, 196)
    await all_permits_are_back(lane)
    assert most == 4
    assert lane.statistics().calls == 4 + 4, "those that never started did not begin later on"


@pytest.mark.virtual_clock
async def test_a_time_out_gives_no_thread_to_more_calls_than_the_limit() -> None:
    """The same in virtual time, in waves: each finds the threads of the one before still taken, until they end."""
    lane = Lane("test", 4)
    loop = virtual_loop()
    held: list[int] = []
    outcomes: Counter[str] = Counter()

    async def impatient(latch: ThreadLatch) -> None:
        try:
            async with asyncio.timeout(0.05):
                await lane.call(latch.wait)
        except TimeoutError:
            outcomes["timed out"] += 1
        else:
            outcomes["done"] += 1

    for wave in range(5):
        with ThreadLatch(loop) as latch:
            loop.call_later(0.3 if wave % 2 else 0.04, latch.open)
            calls = [asyncio.create_task(impatient(latch)) for _ in range(40)]
            await asyncio.sleep(0.04)
            held.append(lane.statistics().busy)
            await asyncio.sleep(0.3)
            await ended(calls)
    statistics = lane.statistics()
    assert max(held) <= 4
    assert (statistics.busy, statistics.abandoned, statistics.waiting) == (0, 0, 0)
    assert outcomes["timed out"] == statistics.given_up + statistics.never_started
    assert outcomes.total() == 200
    assert statistics.calls == outcomes["done"] + statistics.given_up


@pytest.mark.virtual_clock
async def test_abandoned_calls_are_shown_by_name_job_and_age() -> None:
    """The oldest first; what is shown is a record of the moment."""
    lane = Lane("test", 4)

    async def asked_by_a_job() -> None:
        job = RunningJob()
        job.name = "mine"
        enter(job)
        await lane.call(latch.wait)

    with ThreadLatch(virtual_loop()) as latch:
        older = asyncio.create_task(asked_by_a_job())
        await asyncio.sleep(10)
        younger = asyncio.create_task(lane.call(latch.wait))
        await asyncio.sleep(5)
        for task in (younger, older):
            task.cancel()
        await ended([older, younger])
        await asyncio.sleep(2)
        name = latch.wait.__qualname__
        assert lane.statistics().abandoned_calls == (
            AbandonedCall(name, "<job mine>", 17),
            AbandonedCall(name, None, 7),
        )
        assert [str(call) for call in lane.abandoned] == [f"{name} (17.0 s)", f"{name} (7.0 s)"]
    await all_permits_are_back(lane)
    assert lane.statistics().abandoned_calls == ()


@pytest.mark.virtual_clock
async def test_who_waits_in_vain_is_told_by_a_note_and_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    """When every thread is held by a call that nobody waits for; again when that has changed and come back."""
    lane = Lane("test", 2)

    async def timed_out(fn: Callable[[], object]) -> BaseException | None:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(5):
                await lane.call(fn)
        return caught.value.__cause__

    for _ in range(2):
        caplog.clear()
        with ThreadLatch(virtual_loop()) as latch:
            for _ in range(2):
                assert not hasattr(await timed_out(latch.wait), "__notes__"), "it did not wait in vain: it ran"
            for age in (10.0, 15.0):
                cancelled = await timed_out(int)
                assert isinstance(cancelled, asyncio.CancelledError)
                (note,) = cancelled.__notes__
                assert re.search(r"all 2 threads .*'test'.*nobody waits for any more", note)
                assert f"{latch.wait.__qualname__} ({age + 5:.1f} s), {latch.wait.__qualname__} ({age:.1f} s)" in note
            records = [record for record in caplog.records if record.name == "penstock.threads"]
            assert [record.levelname for record in records] == ["WARNING"]
            assert "'test'" in records[0].getMessage()
        await all_permits_are_back(lane, 2)


@pytest.mark.virtual_clock
async def test_a_job_that_waited_for_a_thread_in_vain_says_so_in_its_outcome() -> None:
    """The time-out of the third job names the call that keeps the thread."""
    with ThreadLatch(virtual_loop()) as latch:

        def hang(_item: int) -> None:
            latch.wait()

        async with Executor(threads=1) as executor:
            outcomes = await executor.as_completed(hang, range(2), timeout=5)
            later = await executor.as_completed(hang, [2], timeout=5)
        latch.open()
    assert [type(outcome.error) for outcome in outcomes + later] == [JobTimeout] * 3
    assert re.search(rf"'thread'.*nobody waits for any more: {re.escape(hang.__qualname__)} \(10", str(later[0].error))


async def test_of_many_abandoned_calls_a_message_names_five_and_counts_the_others(
    lane: Lane, workers: Workers, door: Door
) -> None:
    lane = Lane("test", 7, workers=workers)
    calls = [asyncio.create_task(lane.call(door)) for _ in range(7)]
    await door.come(7)
    for call in calls:
        call.cancel()
    await ended(calls)
    message = lane.in_vain
    assert message is not None
    assert message.count("Door (") == 5
    assert message.endswith("and 2 more")
    door.open()
    await all_permits_are_back(lane, 7)


async def test_a_storm_of_cancellations_is_quick_and_leaves_nothing(lane: Lane, door: Door) -> None:
    """20,000 calls wait and are cancelled: the queue holds none of them, nor of their arguments."""

    class Thing:
        pass

    busy = [asyncio.create_task(lane.call(door)) for _ in range(4)]
    await door.come(4)
    thing = Thing()
    freed = weakref.ref(thing)
    waiting = [asyncio.create_task(lane.call(id, thing)) for _ in range(20_000)]
    await asyncio.sleep(0)
    assert lane.waiting == 20_000
    began = time.process_time()
    for task in waiting:
        task.cancel()
    await ended(waiting)
    assert time.process_time() - began < 5, "far from linear"
    statistics = lane.statistics()
    assert (statistics.waiting, statistics.never_started, statistics.busy) == (0, 20_000, 4)
    del thing, waiting, task
    gc.collect()
    assert freed() is None
    door.open()
    await asyncio.gather(*busy)
    await all_permits_are_back(lane)


async def test_a_call_whose_coroutine_is_closed_counts_as_given_up(lane: Lane, door: Door) -> None:
    """As the end of a loop does; before its first step nothing has begun."""
    running, waiting, unstarted = (lane.call(door) for _ in range(3))
    lane.resize(1)
    running.send(None)
    await door.come(1)
    waiting.send(None)
    for call in (running, waiting, unstarted):
        call.close()
    statistics = lane.statistics()
    assert (statistics.given_up, statistics.never_started, statistics.waiting, lane.asked) == (1, 1, 0, 2)
    door.open()
    await all_permits_are_back(lane, 1)


# --- the standard library's contract ---


async def test_submit_gives_a_future_of_the_standard_library(lane: Lane) -> None:
    """From the loop and from any other thread; values, errors and callbacks as there."""
    called: list[object] = []

    def elsewhere() -> tuple[int, BaseException | None]:
        future = lane.submit(pow, 2, 5)
        future.add_done_callback(called.append)
        assert future.result(BOUND) == 32
        failing = lane.submit(int, "no number")
        return future.result(BOUND), failing.exception(BOUND)

    value, error = await asyncio.to_thread(elsewhere)
    assert (value, type(error)) == (32, ValueError)
    assert len(called) == 1
    assert await asyncio.wrap_future(lane.submit(dict, fn=1, self=2)) == {"fn": 1, "self": 2}
    await all_permits_are_back(lane)


async def test_the_standard_librarys_helpers_work_with_its_futures(lane: Lane) -> None:
    """`wait`, `as_completed` and `map`, in a thread."""

    def elsewhere() -> tuple[list[int], int, list[int]]:
        futures = [lane.submit(abs, -number) for number in range(10)]
        values = sorted(future.result() for future in concurrent.futures.as_completed(futures, BOUND))
        done, _ = concurrent.futures.wait([lane.submit(int) for _ in range(5)], BOUND)
        return values, len(done), list(lane.map(abs, [-1, -2], timeout=BOUND))

    assert await asyncio.to_thread(elsewhere) == (list(range(10)), 5, [1, 2])


async def test_a_queued_future_can_be_cancelled_and_then_never_starts(door: Door) -> None:
    """It counts as never started; one that runs cannot be cancelled."""
    lane = Lane("test", 1)
    ran: list[int] = []
    running = lane.submit(door)
    await door.come(1)
    queued = lane.submit(ran.append, 1)
    await asyncio.sleep(0.001)
    assert queued.cancel()
    assert not running.cancel()
    assert running.running()
    door.open()
    assert await asyncio.wrap_future(running) == "through"
    await all_permits_are_back(lane, 1)
    assert (ran, lane.statistics().never_started, lane.asked) == ([], 1, 3)


async def test_run_in_executor_works_on_the_lanes_own_loop_and_on_another(lane: Lane) -> None:
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(lane, pow, 2, 5) == 32

    async def on_another_loop() -> int:
        return await asyncio.get_running_loop().run_in_executor(lane, pow, 2, 6)

    assert await asyncio.to_thread(lambda: asyncio.run(on_another_loop())) == 64
    await all_permits_are_back(lane)


@pytest.mark.parametrize("error", [StopIteration(1), SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_a_submitted_call_contains_what_would_end_more_than_itself(lane: Lane, error: BaseException) -> None:
    def leave() -> None:
        raise error

    future = lane.submit(leave)
    with pytest.raises(UsageError, match=f"leave raised {type(error).__name__}"):
        await asyncio.wrap_future(future)
    await all_permits_are_back(lane)


async def test_a_closed_lane_refuses_submitted_calls_by_their_futures(door: Door) -> None:
    """Those that wait, and those that come later."""
    lane = Lane("test", 1)
    running = lane.submit(door)
    await door.come(1)
    waiting = lane.submit(int)
    with lane:  # closes it as any executor
        pass
    later = lane.submit(int)
    for future in (waiting, later):
        with pytest.raises(ClosedError, match="int was to run in a thread"):
            await asyncio.wrap_future(future)
    cancelled = lane.submit(int)
    cancelled.cancel()
    door.open()
    assert await asyncio.wrap_future(running) == "through"


async def test_closing_leaves_a_cancelled_future_as_it_is(door: Door) -> None:
    lane = Lane("test", 1)
    running = lane.submit(door)
    await door.come(1)
    waiting = lane.submit(int)
    await asyncio.sleep(0.001)
    waiting.cancel()
    lane.close()
    assert waiting.cancelled()
    door.open()
    assert await asyncio.wrap_future(running) == "through"


def test_a_lane_whose_loop_is_closed_still_runs_what_is_submitted_until_it_is_shut_down() -> None:
    """No loop is asked for that: what runs or waits by then is finished too, and its futures are done."""
    begin = threading.Event()

    async def make() -> tuple[Lane, list["concurrent.futures.Future[Any]"]]:
        lane = Lane("test", 1)
        futures: list[concurrent.futures.Future[Any]] = [lane.submit(begin.wait, BOUND), lane.submit(pow, 2, 5)]
        await asyncio.sleep(0)
        while not lane.statistics().calls:
            await asyncio.sleep(0)
        return lane, futures

    lane, futures = asyncio.run(make())
    futures.append(lane.submit(int))
    begin.set()
    assert [future.result(BOUND) for future in futures] == [True, 32, 0]
    lane.shutdown()
    with pytest.raises(ClosedError, match="int was to run in a thread"):
        lane.submit(int).result(BOUND)


def test_calls_work_on_uvloop() -> None:
    """Values, errors, cancellation and `submit`: `run_in_executor` hands the loop's own future through there too."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        lane = Lane("test", 2)
        assert await lane.call(divmod, 7, 2) == (3, 1)
        with pytest.raises(ValueError, match="no number"):
            await lane.call(int, "no number")
        door = Door()
        call = asyncio.create_task(lane.call(door))
        await door.come(1)
        call.cancel()
        await ended([call])
        assert lane.statistics().abandoned == 1
        door.open()
        assert await asyncio.get_running_loop().run_in_executor(lane, int) == 0
        await all_permits_are_back(lane, 2)
        lane.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# --- number of threads ---


async def test_a_greater_limit_starts_calls_that_wait_and_a_smaller_one_ends_threads(workers: Workers) -> None:
    lane = Lane("test", 1, workers=workers)
    first, second = Door(), Door()
    calls = [asyncio.create_task(lane.call(first)) for _ in range(3)]
    await first.come(1)
    lane.resize(3)
    await first.come(2)
    assert lane.statistics().busy == 3
    lane.resize(1)
    calls += [asyncio.create_task(lane.call(second)) for _ in range(3)]
    await asyncio.sleep(0)
    first.open()
    await second.come(1)
    await ended(calls[:3])
    second.open()
    await ended(calls)
    assert (second.most, second.total) == (1, 3)


async def test_lanes_that_want_more_threads_than_there_are_take_turns(door: Door) -> None:
    """A call waits for a thread of the set as it does for one of the lane, and gets it when one comes free."""
    workers = Workers(2)
    one, other = Lane("one", 2, workers=workers), Lane("other", 2, workers=workers)
    busy = [asyncio.create_task(one.call(door)) for _ in range(2)]
    await door.come(2)
    waiting = [asyncio.create_task(other.call(int)) for _ in range(5)]
    await asyncio.sleep(0.001)
    assert (other.waiting, len(workers.threads)) == (5, 2)
    door.open()
    assert await asyncio.gather(*waiting) == [0] * 5
    await asyncio.gather(*busy)
    workers.dismiss()


async def test_a_call_that_a_thread_was_found_for_too_late_starts_with_the_next_one(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set of threads says that one is free, and then none can be started."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers.most = 1
    assert workers.take_nowait()
    lane = Lane("test", 2, workers=workers)
    waiting = asyncio.create_task(lane.call(int))
    await asyncio.sleep(0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        workers.give_back()
        lane.resize(1)
    assert (lane.waiting, workers._promised) == (1, 0)
    assert await lane.call(int) == await waiting == 0


# --- the executor's lanes ---


async def test_full_lanes_delay_neither_to_thread_of_asyncio_nor_name_resolution(door: Door) -> None:
    """Both use the loop's default executor, which is not ours."""
    loop = asyncio.get_running_loop()
    async with Executor(threads=8) as executor:
        calls: list[asyncio.Task[Any]] = [asyncio.create_task(executor.to_thread(door)) for _ in range(8)]
        calls += [asyncio.create_task(executor.compute(door))]
        await door.come(9)
        calls += [asyncio.create_task(executor.to_thread(int)) for _ in range(100)]
        async with asyncio.timeout(BOUND):
            assert await asyncio.to_thread(lambda: "free") == "free"
            assert await loop.getaddrinfo("localhost", 80)
        assert executor.statistics().threads is not None
        assert not any(call.done() for call in calls)
        door.open()
        await asyncio.gather(*calls)


@pytest.mark.virtual_clock
async def test_an_executor_that_closes_names_the_calls_that_still_run(caplog: pytest.LogCaptureFixture) -> None:
    """Those of all its lanes, in one warning."""
    with ThreadLatch(virtual_loop()) as latch:
        async with Executor(threads=2) as executor:
            calls = [asyncio.create_task(executor.to_thread(latch.wait)) for _ in range(2)]
            calls.append(asyncio.create_task(executor.compute(latch.wait)))
            await asyncio.sleep(1)
            for call in calls:
                call.cancel()
            await ended(calls)
            caplog.clear()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("penstock.threads", "WARNING")
    assert record.getMessage().startswith(
        "3 calls still run in threads that nobody waits for: ThreadLatch.wait (1.0 s), "
    )


def test_more_threads_than_the_process_may_have_are_refused() -> None:
    with pytest.raises(UsageError, match=rf"threads={SHARED.most + 1}.*Write at most threads={SHARED.most}"):
        Executor(threads=SHARED.most + 1)


def test_every_step_of_to_thread_can_be_cancelled() -> None:
    """Blocking calls beside jobs in a full executor: nothing is left, whatever is cancelled when."""
    seen: list[Executor] = []

    async def scenario() -> None:
        async with Executor(limit=2, threads=1) as executor:
            seen.append(executor)
            async with asyncio.TaskGroup() as group:
                group.create_task(executor.to_thread(int))
                group.create_task(executor.compute(int))
                job = executor.submit(divmod, 7, 2)
            await job

    def check() -> None:
        if seen and seen[-1]._jobs is not None:
            statistics = seen[-1].statistics()
            assert statistics.jobs == 0
            for lane in (statistics.threads, statistics.cpu):
                assert lane is None or (lane.busy, lane.waiting, lane.abandoned) == (0, 0, 0)

    assert cancel_at_every_step(scenario, check=check) >= 3


# --- anything at all ---


class Books:
    """What became of the calls of a random program."""

    def __init__(self) -> None:
        self.running = self.most = self.refused = 0
        self.lock = threading.Lock()
        self.ended: Counter[str] = Counter()
        refuse = Call.refuse

        def counted(call: Call, error: Exception) -> None:
            cancelled = isinstance(call, concurrent.futures.Future) and call.cancelled()  # counted as never started
            self.refused += call.asked > 0 and not cancelled
            refuse(call, error)

        self.refuse = counted

    def __enter__(self) -> None:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.running -= 1


steps = st.tuples(
    st.sampled_from(["call", "submit"]),
    st.sampled_from([0.0, 0.0, 1.0, 3.0]),  # virtual seconds for which the call holds its thread
    st.sampled_from([None, None, 0.0, 0.5, 2.0]),  # when it is given up
    st.integers(0, 3),  # how deep it nests
    st.booleans(),  # whether it fails
)


@given(
    program=st.lists(st.one_of(steps, st.sampled_from([0.0, 0.5, 2.0])), max_size=12),
    limit=st.integers(1, 3),
    most=st.integers(1, 4),
    close_after=st.sampled_from([None, None, 0.0, 1.0]),
)
def test_whatever_is_done_to_a_lane_its_books_balance(
    program: list[Any], limit: int, most: int, close_after: float | None
) -> None:
    """Calls, nestings, time-outs, cancelled futures, closes: all end, the limit holds, no thread or promise is lost."""
    workers = Workers(most, idle_timeout=BOUND)
    books = Books()

    async def main() -> None:
        loop = virtual_loop()
        lane = Lane("test", limit, workers=workers)
        portal = Portal()

        def work(seconds: float, depth: int, fails: bool) -> None:
            if depth:
                portal.call(lane.call, (work, seconds, depth - 1, fails), {})
                return
            with books:
                if seconds:
                    with ThreadLatch(loop) as latch:
                        loop.call_soon_threadsafe(loop.call_later, seconds, latch.open)
                        latch.wait()
                if fails:
                    raise ValueError

        async def ask(kind: str, seconds: float, patience: float | None, depth: int, fails: bool) -> None:
            try:
                async with asyncio.timeout(patience):
                    if kind == "call":
                        await lane.call(work, seconds, depth, fails)
                    else:
                        await asyncio.wrap_future(lane.submit(work, seconds, depth, fails))
            except (TimeoutError, ValueError, ClosedError, concurrent.futures.CancelledError) as error:
                books.ended[type(error).__name__] += 1
            else:
                books.ended["done"] += 1

        tasks = []
        if close_after is not None:
            loop.call_later(close_after, lane.close)
        for step in program:
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                tasks.append(asyncio.create_task(ask(*step)))
            assert lane._runners <= limit
        if tasks:
            async with asyncio.timeout(HOUR):
                await ended(tasks)
        async with asyncio.timeout(HOUR):
            await lane.books.wait_until_idle(HOUR)
            while lane.statistics().busy or lane.abandoned or lane._runners:
                await asyncio.sleep(1)
        statistics = lane.statistics()
        assert (statistics.busy, statistics.waiting, statistics.abandoned, lane._runners) == (0, 0, 0, 0)
        assert not lane._queue
        assert lane.asked == statistics.calls + statistics.never_started + books.refused
        assert statistics.given_up <= statistics.calls
        lane.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "refuse", books.refuse)
        run_in_virtual_time(main())
    assert books.ended.total() == sum(isinstance(step, tuple) for step in program)
    assert books.most <= limit
    assert books.running == 0
    workers.dismiss()
    for thread in workers.threads:
        thread.join(BOUND)
    assert workers._promised == 0
    assert workers.threads == ()


async def test_only_the_first_who_claims_a_submitted_call_runs_it(lane: Lane) -> None:
    """It may be offered in two places: to its lane, and to a thread that waits for it."""
    call = SubmittedCall(lane.books, int, (), {})
    assert call.claim()
    assert not call.claim()


async def test_an_error_in_the_users_logging_holds_up_no_other_call(
    lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    """An abandoned call that fails is logged, and a filter raises at that: the next call comes back all the same."""

    def fail() -> None:
        assert begun.wait(BOUND)
        raise ValueError

    def filter_fails(record: logging.LogRecord) -> bool:
        raise KeyError(record.getMessage())

    begun, seen = threading.Event(), list[Any]()
    loop, logger = asyncio.get_running_loop(), logging.getLogger("penstock.threads")
    loop.set_exception_handler(lambda _loop, context: seen.append(context["exception"]))
    logger.addFilter(filter_fails)
    try:
        with caplog.at_level(logging.INFO, "penstock.threads"):
            abandoned = asyncio.create_task(lane.call(fail))
            while not lane.books.busy:
                await asyncio.sleep(0)
            abandoned.cancel()
            await asyncio.wait([abandoned])
            begun.set()
            while not seen:
                await lane.call(int)
    finally:
        logger.removeFilter(filter_fails)
    assert [type(error) for error in seen] == [KeyError]
    await all_permits_are_back(lane)


# --- from any thread ---


async def test_what_is_submitted_by_another_thread_runs_without_the_loop(lane: Lane) -> None:
    """The loop is blocked all the while, and hears of nothing."""
    futures = list["concurrent.futures.Future[int]"]()
    thread = threading.Thread(target=lambda: futures.extend(lane.submit(pow, 2, n) for n in range(20)))
    thread.start()
    thread.join(BOUND)  # blocks the loop: so does the next line
    assert [future.result(BOUND) for future in futures] == [2**n for n in range(20)]
    assert not lane.books._landed._items
    await all_permits_are_back(lane)


async def test_whoever_waits_for_the_lane_to_be_idle_hears_of_calls_that_no_loop_waits_for(lane: Lane) -> None:
    """Also where the last one ends just when the loop begins to wait."""
    loop, go = asyncio.get_running_loop(), threading.Event()
    future = await asyncio.to_thread(lane.submit, go.wait, BOUND)
    while not lane.books.busy:
        await asyncio.sleep(0)
    create = loop.create_future

    def create_late() -> "asyncio.Future[Any]":
        loop.create_future = create  # type: ignore[method-assign]
        go.set()
        assert concurrent.futures.Future.result(future, BOUND)
        while lane.books.busy:
            time.sleep(0)
        return create()

    loop.create_future = create_late  # type: ignore[method-assign]
    before = loop.time()
    assert await lane.books.wait_until_idle(BOUND)
    assert loop.time() - before < BOUND / 2


async def test_whoever_waits_for_the_lane_to_be_idle_is_woken_by_a_submitted_call(lane: Lane, door: Door) -> None:
    futures = [await asyncio.to_thread(lane.submit, door) for _ in range(4)]
    await door.come(4)
    waiting = asyncio.create_task(lane.books.wait_until_idle(BOUND))
    await asyncio.sleep(0)
    assert not waiting.done()
    door.open()
    async with asyncio.timeout(BOUND):
        assert await waiting
    assert [future.result(BOUND) for future in futures] == ["through"] * 4


async def test_idle_is_told_when_the_last_call_is_abandoned() -> None:
    """Nobody waits for that one: whoever wants to end need not either."""
    lane, told, go = Lane("test", 1), list[int](), threading.Event()
    lane.books.tells = False
    task = asyncio.create_task(lane.call(go.wait, BOUND))
    while not lane.books.busy:
        await asyncio.sleep(0)
    lane.when_idle(lambda: told.append(1))
    assert told == []
    task.cancel()
    await ended([task])
    assert told != []
    go.set()
    await all_permits_are_back(lane, 1)
    lane.close()


def test_calls_of_all_threads_meet_a_close_and_each_future_is_done(workers: Workers) -> None:
    """Submitted while the lane closes: run or refused, never forgotten, never both."""

    async def make() -> Lane:
        return Lane("test", 2, workers=workers)

    for _ in range(20):
        lane, ran = asyncio.run(make()), list[int]()
        futures = [list["concurrent.futures.Future[None]"]() for _ in range(3)]
        start = threading.Barrier(4, timeout=BOUND)

        def submit_all(
            own: list["concurrent.futures.Future[None]"], start: threading.Barrier = start, lane: Lane = lane,
            ran: list[int] = ran,
        ) -> None:  # fmt: skip
            start.wait()
            own.extend(lane.submit(ran.append, 1) for _ in range(30))

        threads = [threading.Thread(target=submit_all, args=(own,)) for own in futures]
        for thread in threads:
            thread.start()
        start.wait()
        lane.close()
        for thread in threads:
            thread.join(BOUND)
        errors = [future.exception(BOUND) for own in futures for future in own]
        assert len(errors) == 90
        assert {type(error) for error in errors} <= {type(None), ClosedError}
        assert len(ran) == errors.count(None)


async def test_a_cancelled_future_holds_nothing_of_the_users_when_its_turn_has_passed(lane: Lane, door: Door) -> None:
    """Neither does the lane: also where a thread was to wait for it."""

    class Argument:
        pass

    running = [lane.submit(door) for _ in range(4)]
    await door.come(4)
    argument = Argument()
    reference = weakref.ref(argument)
    future = await asyncio.to_thread(lane.submit, id, argument)
    del argument
    assert future.cancel()
    door.open()
    for each in running:
        await asyncio.wrap_future(each)
    await all_permits_are_back(lane)
    gc.collect()
    assert reference() is None
    assert future.cancelled()


async def test_a_nested_call_that_the_loop_submits_and_cancels_is_not_kept(lane: Lane) -> None:
    """Its place is told as well that nobody needs it any more."""
    portal = Portal()

    async def on_the_loop() -> bool:
        return lane.submit(int).cancel()

    assert await lane.call(portal.call, on_the_loop, (), {})
    await all_permits_are_back(lane)
    while lane._nested:
        await asyncio.sleep(0)
    portal.close()


async def test_a_portal_refuses_the_thread_of_its_own_loop(lane: Lane) -> None:
    """Which it would block; where another loop runs, it may be used."""
    portal = Portal()
    with pytest.raises(WrongThread, match="from_thread"):
        portal.call(int, (), {})

    async def on_another_loop() -> int:
        value: int = portal.call(pow, (2, 5), {})
        return value

    assert await lane.call(asyncio.run, on_another_loop()) == 32
    portal.close()


def test_a_call_that_is_queued_while_the_lane_closes_is_refused_once(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the close, which found it in the queue, or by whoever submitted it: not by both."""

    async def make() -> Lane:
        return Lane("test", 1, workers=workers)

    def hold() -> bool:
        begun.set()
        return go.wait(BOUND)

    lane, begun, go = asyncio.run(make()), threading.Event(), threading.Event()
    running = lane.submit(hold)
    assert begun.wait(BOUND)
    refused = list[object]()

    class Closing:
        """The lock: when it is let go, the lane is closed."""

        def __enter__(self) -> None:
            lock.__enter__()

        def __exit__(self, *error: Any) -> None:
            lock.__exit__(*error)
            monkeypatch.setattr(lane, "_lock", lock)
            lane.close()

    lock = lane._lock
    refuse = Call.refuse

    def counted(call: Call, error: Exception) -> None:
        refused.append(call)
        refuse(call, error)

    monkeypatch.setattr(Call, "refuse", counted)
    monkeypatch.setattr(lane, "_lock", Closing())
    future = lane.submit(int)
    assert isinstance(future.exception(BOUND), ClosedError)
    assert refused == [future]
    go.set()
    assert running.result(BOUND)


async def test_closing_leaves_a_call_to_the_thread_that_has_claimed_it(lane: Lane) -> None:
    """It may have been claimed between the look at the queue and the refusal: then it is that thread's to end."""
    queued, submitted = Call(lane.books, int, (), {}), SubmittedCall(lane.books, int, (), {})
    for call in (queued, submitted):
        assert call.claim()
        lane._send_away(call, ClosedError("closed"))
        lane._drop(call, ClosedError("closed"))
        assert not call.over
    assert not submitted.done()
    assert queued.waiter is not None
    assert not queued.waiter.done()
