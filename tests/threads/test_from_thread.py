"""From a thread to the loop and on: values, errors, cancellation, and chains that never wait for themselves."""

import asyncio
import concurrent.futures
import contextvars
import gc
import re
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

import penstock
from penstock import ClosedError, DeadlockError, Executor, Gate, UsageError, WrongThread, current_job
from penstock.context import Lease, leases
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step, run_in_virtual_time
from penstock.threads import portal as module
from penstock.threads import workers as workers_module
from penstock.threads.call import Call, asking_call
from penstock.threads.lane import Lane
from penstock.threads.place import DEEPEST_STACK, LAST_RESORT
from penstock.threads.portal import Portal
from penstock.threads.workers import SHARED, Work, Worker, Workers

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

HOUR = 3600.0


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    async with asyncio.timeout(BOUND), Executor(threads=1) as executor:
        yield executor


@pytest.fixture
def workers() -> Iterator[Workers]:
    """A set of threads for the test alone."""
    workers = Workers(64)
    yield workers
    workers.dismiss()
    for thread in workers.threads:
        thread.join(BOUND)
    assert (workers.threads, workers._promised) == ((), 0)


def generating() -> Iterator[int]:
    yield 1


async def add(left: int, right: int = 0) -> int:
    await asyncio.sleep(0)
    return left + right


# --- values, errors, context ---


@pytest.mark.virtual_clock
async def test_a_thread_calls_async_and_plain_functions_on_the_loop(executor: Executor) -> None:
    """All arguments belong to the function; what it returns or raises comes back, the very object."""
    error = KeyError("mine")

    def fail() -> None:
        raise error

    async def fail_later() -> None:
        await asyncio.sleep(1)
        raise error

    def in_a_thread() -> list[object]:
        assert executor.from_thread(threading.current_thread) is threading.main_thread()
        for failing in (fail, fail_later):
            with pytest.raises(KeyError) as caught:
                executor.from_thread(failing)
            assert caught.value is error
        return [executor.from_thread(add, 1, right=2), executor.from_thread(dict, fn=1, self=2)]

    assert await executor.to_thread(in_a_thread) == [3, {"fn": 1, "self": 2}]


@pytest.mark.virtual_clock
async def test_context_variables_of_the_thread_are_seen_on_the_loop_and_those_of_the_loop_stay_there(
    executor: Executor,
) -> None:
    """The job too, and a change that is made in the thread; what is made on the loop is a copy's."""
    variable = contextvars.ContextVar("variable", default="none")

    async def look() -> tuple[str, object]:
        seen = variable.get(), current_job()
        variable.set("set on the loop")
        return seen

    def in_a_thread() -> tuple[list[object], str]:
        before = variable.get()
        variable.set("set in the thread")
        return [before, executor.from_thread(look), executor.from_thread(variable.get)], variable.get()

    async def job() -> None:
        variable.set("set by the job")
        seen, after = await executor.to_thread(in_a_thread)
        assert seen == ["set by the job", ("set in the thread", current_job()), "set in the thread"]
        assert after == "set in the thread"
        assert variable.get() == "set by the job"

    await executor.submit(job)


@pytest.mark.virtual_clock
async def test_the_ambient_call_finds_the_executor_of_the_job(executor: Executor) -> None:
    def blocking() -> int:
        return penstock.from_thread(add, 1, 2)

    assert await executor.submit(blocking) == 3
    with pytest.raises(UsageError, match=r"from_thread was called outside a job.*Write `executor\.from_thread\("):
        await executor.to_thread(blocking)
    with pytest.raises(WrongThread, match=r"write `await add\(\.\.\.\)`"):
        blocking()  # outside a job, and on the loop's thread: that comes first
    with pytest.raises(WrongThread, match=r"write `len\(\.\.\.\)`"):
        penstock.from_thread(len, "")


@pytest.mark.virtual_clock
@pytest.mark.parametrize("error", [StopIteration(1), SystemExit(3), GeneratorExit()], ids=lambda error: repr(error))
@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_what_would_end_the_loop_comes_back_as_an_error(
    executor: Executor, error: BaseException, kind: str
) -> None:
    def leave() -> None:
        raise error

    async def leave_later() -> None:
        raise error

    def in_a_thread() -> None:
        with pytest.raises(UsageError, match=rf"leave\w* raised {type(error).__name__}") as caught:
            executor.from_thread(leave if kind == "plain" else leave_later)
        assert caught.value.__cause__ is error

    await executor.to_thread(in_a_thread)
    assert await executor.to_thread(int) == 0


@pytest.mark.parametrize("kind", ["async", "plain"])
def test_ctrl_c_in_the_midst_of_it_ends_the_loop_too(kind: str) -> None:
    """The thread gets an error, and the program its KeyboardInterrupt; nobody complains of either."""

    def leave() -> None:
        raise KeyboardInterrupt

    async def leave_later() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with Executor(threads=1) as executor:
            await executor.to_thread(in_a_thread, executor)

    def in_a_thread(executor: Executor) -> None:
        with pytest.raises(UsageError, match=r"leave\w* raised KeyboardInterrupt"):
            executor.from_thread(leave if kind == "plain" else leave_later)

    loop = asyncio.new_event_loop()
    try:
        running = loop.create_task(main())
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(running)
        loop.run_until_complete(running)
        gc.collect()  # a task whose error nobody has looked at would tell now
    finally:
        loop.close()


@pytest.mark.virtual_clock
async def test_what_can_be_awaited_is_awaited(executor: Executor) -> None:
    """A job's future, a stream, a coroutine that a plain function has made: the value comes, not the promise."""

    def in_a_thread() -> list[object]:
        return [
            executor.from_thread(executor.submit, add, 1, 2),
            executor.from_thread(executor.map, add, [1, 2, 3]),
            executor.from_thread(lambda: add(1)),
            executor.from_thread(executor.run, add, [1, 2, 3]).done,
        ]

    assert await executor.to_thread(in_a_thread) == [3, [1, 2, 3], 1, 3]


@pytest.mark.virtual_clock
async def test_what_cannot_be_called_is_refused_with_the_right_call(executor: Executor) -> None:
    def in_a_thread() -> None:
        with pytest.raises(UsageError, match=r"Write `from_thread\(add, ...\)`"):
            executor.from_thread(add(1))  # type: ignore[call-overload]
        with pytest.raises(UsageError, match="found 17, expected a function"):
            executor.from_thread(17)  # type: ignore[call-overload]
        with pytest.raises(UsageError, match="found the generator function generating"):
            executor.from_thread(generating)

    await executor.to_thread(in_a_thread)


@pytest.mark.virtual_clock
async def test_an_error_keeps_nothing_of_the_call_alive(executor: Executor) -> None:
    """Neither on the loop nor in the thread: its traceback must not close a cycle."""

    class Thing:
        pass

    async def fail(_thing: Thing) -> None:
        raise ValueError

    def in_a_thread() -> "weakref.ref[Thing]":
        thing = Thing()
        with pytest.raises(ValueError):
            executor.from_thread(fail, thing)
        return weakref.ref(thing)

    gc.disable()
    try:
        freed = await executor.to_thread(in_a_thread)
        await executor.to_thread(int)
        assert freed() is None
    finally:
        gc.enable()


# --- where it may be called ---


@pytest.mark.virtual_clock
async def test_on_a_thread_with_a_loop_it_says_what_to_write(executor: Executor) -> None:
    """It would block that loop, also when it is another one."""

    async def on_another_loop() -> None:
        with pytest.raises(WrongThread, match=r"from_thread\(add\).*write `await add\(\.\.\.\)`"):
            executor.from_thread(add, 1)

    await on_another_loop()
    await executor.to_thread(lambda: asyncio.run(on_another_loop()))


async def test_a_thread_of_nobodys_may_call_it_while_the_executor_is_open() -> None:
    """Not before and not after."""
    executor = Executor()

    def in_a_thread() -> object:
        try:
            return executor.from_thread(add, 1, 2)
        except ClosedError as error:
            return str(error)

    assert "not open yet" in str(await asyncio.to_thread(in_a_thread))
    async with executor:
        assert await asyncio.to_thread(in_a_thread) == 3
    assert "after its executor has been shut down" in str(await asyncio.to_thread(in_a_thread))


def test_after_its_loop_is_closed_it_raises_at_once() -> None:
    executor = Executor()

    async def open_and_close() -> None:
        async with executor:
            pass

    asyncio.run(open_and_close())
    with pytest.raises(ClosedError, match="the event loop is closed"):
        executor.from_thread(add, 1)


@pytest.mark.may_leave("errors")  # asyncio tells of the task that was pending when its loop was closed
@pytest.mark.parametrize("who", ["a worker", "nobody's"])
def test_a_thread_whose_loop_is_closed_while_it_waits_gets_an_error(
    who: str, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for itself: a loop that is closed tells nobody."""
    monkeypatch.setattr(module, "LOOK_AGAIN", 0.01)
    waiting = threading.Event()
    answer: concurrent.futures.Future[BaseException] = concurrent.futures.Future()

    async def forever() -> None:
        waiting.set()
        await asyncio.Event().wait()

    async def main() -> None:
        portal = Portal()

        def in_a_thread() -> None:
            with pytest.raises(ClosedError) as caught:
                portal.call(forever, (), {})
            answer.set_result(caught.value)

        if who == "a worker":
            Lane("test", 1, workers=workers).submit(in_a_thread)
        else:
            threading.Thread(target=in_a_thread).start()
        while not waiting.is_set():
            await asyncio.sleep(0.001)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    assert "was closed while a thread waited" in str(answer.result(BOUND))
    gc.collect()


async def test_a_thread_that_waits_for_long_looks_for_its_loop_and_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN", 0.001)
    async with asyncio.timeout(BOUND), Executor() as executor:
        assert await executor.to_thread(executor.from_thread, asyncio.sleep, 0.05, "done") == "done"


def test_a_thread_that_is_interrupted_while_it_waits_cancels_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C reaches a main thread that waits for a loop in another thread."""
    cancelled = threading.Event()
    ready: concurrent.futures.Future[tuple[Portal, Callable[[], object]]] = concurrent.futures.Future()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def main() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        ready.set_result((Portal(), lambda: loop.call_soon_threadsafe(done.set)))
        await done.wait()

    def interrupted(_request: object) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    portal, end = ready.result(BOUND)
    with monkeypatch.context() as patch:
        patch.setattr(module._Request, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            portal.call(forever, (), {})
        with pytest.raises(KeyboardInterrupt):
            portal.call(int, (), {})  # which may be over by the time of its cancellation
    assert portal.call(asyncio.sleep, (0,), {}) is None
    end()
    thread.join(BOUND)
    assert not thread.is_alive()


async def test_what_is_asked_of_a_closed_portal_is_refused_and_may_be_cancelled() -> None:
    """A thread that is interrupted cancels what it asked for, without knowing that it never began."""
    portal = Portal()
    portal.close()
    request = module._Request(portal, int, (), {})
    request.start()
    request.cancel()
    request.wait()
    with pytest.raises(ClosedError, match=r"from_thread\(int\) was called after its executor has been shut down"):
        request.result()


def test_calls_work_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with Executor(threads=1) as executor:

            def deeper(depth: int) -> int:
                return 0 if depth == 0 else 1 + executor.from_thread(executor.to_thread, deeper, depth - 1)

            assert await executor.to_thread(deeper, 20) == 20

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# --- chains ---


@pytest.mark.virtual_clock
@pytest.mark.parametrize("depth", [1, DEEPEST_STACK - 1, DEEPEST_STACK, DEEPEST_STACK + 1, 50, 300])
async def test_a_chain_through_one_thread_goes_on_at_any_depth(executor: Executor, depth: int) -> None:
    """Thread, loop, same lane, and so on: on the place of whoever waits. Few threads more than one."""
    seen: set[threading.Thread] = set()
    before = len(SHARED.threads)

    def deeper(left: int) -> int:
        seen.add(threading.current_thread())
        return 0 if left == 0 else 1 + executor.from_thread(executor.to_thread, deeper, left - 1)

    assert await executor.to_thread(deeper, depth) == depth
    assert len(seen) == 1 + depth // DEEPEST_STACK
    assert len(SHARED.threads) <= before + len(seen)
    assert all(isinstance(thread, Worker) for thread in seen)
    statistics = executor.statistics().threads
    assert statistics is not None
    assert (statistics.calls, statistics.busy, statistics.waiting) == (depth + 1, 0, 0)


@pytest.mark.virtual_clock
async def test_a_chain_through_two_lanes_of_one_thread_each_goes_on(executor: Executor) -> None:
    """Computing that asks for a blocking call that asks for computing, and so on."""

    def deeper(left: int) -> int:
        if left == 0:
            return 0
        call: Callable[..., Any] = executor.compute if left % 2 else executor.to_thread
        value: int = executor.from_thread(call, deeper, left - 1)
        return 1 + value

    assert await executor.to_thread(deeper, 50) == 50
    assert await executor.compute(deeper, 51) == 51


@pytest.mark.virtual_clock
async def test_a_chain_of_jobs_each_in_a_thread_goes_on() -> None:
    """Job, thread, loop, child job, thread, ...: one slot and one thread are enough."""
    async with Executor(limit=1, threads=1) as executor:

        def deeper(left: int) -> int:
            if left == 0:
                return 0
            value: int = executor.from_thread(child, left - 1)
            return 1 + value

        async def child(left: int) -> int:
            return await executor.submit(deeper, left)

        assert await executor.submit(deeper, 50) == 50


@pytest.mark.virtual_clock
async def test_calls_side_by_side_of_one_waiting_thread_take_turns_on_its_place(executor: Executor) -> None:
    running = most = 0

    def leaf(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        running -= 1
        return number

    async def both() -> list[int]:
        return await asyncio.gather(*[executor.to_thread(leaf, number) for number in range(10)])

    assert await executor.to_thread(lambda: executor.from_thread(both)) == list(range(10))
    assert most == 1


@pytest.mark.virtual_clock
async def test_a_call_that_waits_for_a_place_takes_a_thread_of_the_lane_if_that_is_free_first() -> None:
    """Two calls of a waiting thread in a lane of two: side by side, one on its place and one in the other thread."""
    async with Executor(threads=2) as executor:
        barrier = threading.Barrier(2, timeout=BOUND)

        async def both() -> None:
            await asyncio.gather(executor.to_thread(barrier.wait), executor.to_thread(barrier.wait))

        await executor.to_thread(lambda: executor.from_thread(both))


@pytest.mark.virtual_clock
@pytest.mark.parametrize("threads", [1, 2])
async def test_a_child_that_outlives_one_wait_goes_on_in_the_next_one(threads: int) -> None:
    """It finds the thread at work, and is offered its place again when that waits for it."""
    async with Executor(limit=1, threads=threads) as executor:

        def child(number: int) -> int:
            return number

        futures: list[asyncio.Future[int]] = []

        def submit(number: int) -> None:
            futures.append(executor.submit(child, number))

        def parent() -> list[int]:
            for number in range(3):
                executor.from_thread(submit, number)
            return [executor.from_thread(wait_for, future) for future in reversed(futures)]

        async def wait_for(future: "asyncio.Future[int]") -> int:
            return await future

        async with asyncio.timeout(HOUR):
            assert await executor.submit(parent) == [2, 1, 0]


@pytest.mark.virtual_clock
async def test_a_child_that_outlives_its_parent_runs_in_the_lane() -> None:
    async with Executor(limit=1, threads=1) as executor:
        children: list[asyncio.Future[int]] = []

        def submit() -> None:
            children.append(executor.submit(int))

        def parent() -> None:
            executor.from_thread(submit)

        await executor.submit(parent)
        assert await children[0] == 0


@pytest.mark.virtual_clock
async def test_a_chain_of_jobs_that_submit_their_successors_from_threads_does_not_grow_in_memory() -> None:
    """Each ends when the next one is submitted: no record keeps its ancestors alive."""
    done = asyncio.Event()
    alive: list[int] = []
    async with Executor(limit=1, threads=1) as executor:

        def start(left: int) -> None:
            executor.submit(hop, left)

        def hop(left: int) -> None:
            if left:
                executor.from_thread(start, left - 1)
            else:
                gc.collect()
                alive.append(sum(isinstance(thing, Call) for thing in gc.get_objects()))
                executor.from_thread(done.set)

        executor.submit(hop, 200)
        await done.wait()
    assert alive[0] < 10


@pytest.mark.virtual_clock
async def test_who_is_asked_for_by_a_call_that_is_over_looks_to_those_before_it() -> None:
    """A job's thread ends, its child goes on, and the thread that waits for both lends its place."""
    async with Executor(limit=2, threads=1) as executor:
        children: list[asyncio.Future[str]] = []

        async def child() -> str:
            await asyncio.sleep(1)
            return await penstock.to_thread(lambda: "child")

        def parent() -> None:
            executor.from_thread(lambda: children.append(executor.submit(child)))

        async def family() -> str:
            await executor.submit(parent)
            return await children[0]

        async with asyncio.timeout(HOUR):
            assert await executor.submit(lambda: executor.from_thread(family)) == "child"


@pytest.mark.virtual_clock
async def test_a_submitted_future_runs_on_the_place_of_the_thread_that_waits_for_it(workers: Workers) -> None:
    """As `run_in_executor(lane, fn)` does."""
    lane = Lane("test", 1, workers=workers)
    portal = Portal()

    async def nested() -> int:
        first = asyncio.get_running_loop().run_in_executor(lane, pow, 2, 5)
        return await first + await asyncio.wrap_future(lane.submit(pow, 2, 6))

    assert await lane.call(portal.call, nested, (), {}) == 96
    assert await lane.call(int) == 0
    statistics = lane.statistics()
    assert (statistics.calls, statistics.never_started, lane.waiting) == (4, 0, 0)


async def test_a_worker_of_another_loop_waits_as_any_thread_does() -> None:
    """Its place belongs to its own loop, which may be busy in another thread: nothing of it is lent."""
    async with Executor(threads=1) as here:

        async def elsewhere() -> list[int]:
            async with Executor(threads=1) as there:

                def in_a_thread() -> list[int]:
                    return [here.from_thread(here.to_thread, pow, 2, number) for number in range(20)]

                async with asyncio.timeout(BOUND):
                    return await there.to_thread(in_a_thread)

        powers = await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
        assert powers == [2**number for number in range(20)]


# --- out of threads ---


@pytest.mark.virtual_clock
async def test_when_no_thread_is_left_for_a_chain_an_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing hangs: the threads that wait get the error, one after the other."""
    monkeypatch.setattr(workers_module, "SPARE_THREADS", 2)
    workers = Workers(1)
    lane = Lane("test", 1, workers=workers)
    portal = Portal()
    deepest = 0

    def deeper(left: int) -> int:
        nonlocal deepest
        deepest = max(deepest, depth - left)
        value: int = portal.call(lane.call, (deeper, left - 1), {})
        return value

    depth = 100
    with pytest.raises(DeadlockError, match=r"no thread is left for .*deeper in 'test' <- .*deeper in 'test' <- ") as e:
        await lane.call(deeper, depth)
    assert deepest == 2 * DEEPEST_STACK + LAST_RESORT - 1
    assert "Nest less deeply" in str(e.value)
    assert await lane.call(int) == 0
    assert workers._promised == 0
    workers.dismiss()


@pytest.mark.virtual_clock
async def test_when_no_thread_is_left_for_another_lane_an_error_names_the_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread for both lanes: who waits holds it."""
    monkeypatch.setattr(workers_module, "SPARE_THREADS", 0)
    workers = Workers(1)
    one, other = Lane("one", 1, workers=workers), Lane("other", 1, workers=workers)
    portal = Portal()

    def outer() -> object:
        return portal.call(other.call, (int,), {})

    with pytest.raises(DeadlockError, match=r"no thread is left for int.*int in 'other' <- .*outer in 'one'\."):
        await one.call(outer)
    assert (other.waiting, other.statistics().calls) == (0, 0)
    assert await other.call(int) == 0
    workers.dismiss()


@pytest.mark.virtual_clock
async def test_a_chain_takes_a_spare_thread_though_others_wait_for_an_ordinary_one() -> None:
    """They are before it in the queue, and are served by that thread too."""
    workers = Workers(1)
    one, other = Lane("one", 1, workers=workers), Lane("other", 4, workers=workers)
    portal = Portal()
    begun = asyncio.Event()
    loop = virtual_loop()
    go = threading.Event()

    def outer() -> object:
        loop.call_soon_threadsafe(begun.set)
        assert go.wait(BOUND)
        return portal.call(other.call, (lambda: "nested",), {})

    nested: asyncio.Task[object] = asyncio.create_task(one.call(outer))
    await begun.wait()
    ordinary = asyncio.create_task(other.call(lambda: "ordinary"))
    await asyncio.sleep(0)
    assert other.waiting == 1
    go.set()
    assert [await nested, await ordinary] == ["nested", "ordinary"]
    workers.dismiss()


@pytest.mark.virtual_clock
async def test_the_child_of_a_call_that_is_over_waits_for_a_thread_like_anybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No thread waits for it any more, so it is no dead end when none is left."""
    monkeypatch.setattr(workers_module, "SPARE_THREADS", 0)
    workers = Workers(1)
    one, other = Lane("one", 1, workers=workers), Lane("other", 1, workers=workers)
    portal = Portal()
    left_behind: list[asyncio.Task[int]] = []

    async def child() -> int:
        await asyncio.sleep(1)
        return await other.call(int)

    await one.call(portal.call, lambda: left_behind.append(asyncio.create_task(child())), (), {})
    with ThreadLatch(virtual_loop()) as latch:
        busy = asyncio.create_task(one.call(latch.wait))
        await asyncio.sleep(10)
        assert not left_behind[0].done()
        latch.open()
        await busy
    assert await left_behind[0] == 0
    workers.dismiss()


# --- cancellation ---


@pytest.mark.virtual_clock
async def test_what_runs_on_the_loop_is_cancelled_when_nobody_waits_for_the_thread(executor: Executor) -> None:
    """At any depth; the threads get an error, and so does what they ask for afterwards."""
    ended: list[str] = []

    async def nap() -> None:
        try:
            await asyncio.sleep(HOUR)
        finally:
            ended.append("nap")

    def deeper(left: int) -> None:
        with pytest.raises(concurrent.futures.CancelledError, match="nobody waits for this call any more"):
            if left:
                executor.from_thread(executor.to_thread, deeper, left - 1)
            else:
                executor.from_thread(nap)
        with pytest.raises(concurrent.futures.CancelledError, match="nobody waits for this call any more"):
            executor.from_thread(ended.append, "never")
        ended.append(f"thread {left}")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await executor.to_thread(deeper, 2)
    assert await executor.to_thread(int) == 0, "its one thread is free again"
    assert ended == ["nap", "thread 0", "thread 1", "thread 2"]


@pytest.mark.virtual_clock
async def test_a_task_that_is_cancelled_on_the_loop_is_an_error_of_the_thread(executor: Executor) -> None:
    """Before its first step too; the call that waits for the thread is not cancelled."""
    tasks: list[asyncio.Task[Any] | None] = []

    async def nap(seconds: float) -> None:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(seconds)

    async def cancel_first(seconds: float) -> None:
        await asyncio.sleep(seconds)
        (task,) = [task for task in tasks if task is not None]
        task.cancel()

    def in_a_thread() -> str:
        with pytest.raises(concurrent.futures.CancelledError, match=r"from_thread\(.*nap\) was cancelled on the loop"):
            executor.from_thread(nap, HOUR)
        return "went on"

    canceller = asyncio.create_task(cancel_first(5))
    assert await executor.to_thread(in_a_thread) == "went on"
    await canceller


@pytest.mark.virtual_clock
async def test_a_task_that_never_begins_is_an_error_of_the_thread(executor: Executor) -> None:
    """Everything on the loop is cancelled in the very tick in which it was asked for."""
    begun: list[int] = []

    async def never() -> None:
        begun.append(1)

    def cancel_all_others() -> None:
        for request in executor._portal._requests if executor._portal is not None else ():
            request.cancel()

    def in_a_thread() -> str:
        loop.call_soon_threadsafe(lambda: loop.call_soon(cancel_all_others))
        with pytest.raises(concurrent.futures.CancelledError):
            never_begun()
        return "went on"

    def never_begun() -> None:
        assert executor._portal is not None
        request = module._Request(executor._portal, never, (), {})

        def start_and_cancel() -> None:
            request.start()
            request.cancel()

        loop.call_soon_threadsafe(start_and_cancel)
        request.wait()
        request.result()

    loop = asyncio.get_running_loop()
    assert await executor.to_thread(in_a_thread) == "went on"
    assert begun == []


@pytest.mark.virtual_clock
async def test_leaving_the_executor_ends_the_wait_of_all_threads() -> None:
    """Its own, whose callers are cancelled, and those of nobody, which do not keep it open."""
    errors: list[str] = []
    loop = virtual_loop()
    left = threading.Event()

    def in_a_thread() -> None:
        try:
            opened.from_thread(asyncio.sleep, HOUR)
        except (ClosedError, concurrent.futures.CancelledError) as error:
            errors.append(type(error).__name__)
            if isinstance(error, ClosedError):
                errors.append(str(error))
                left.set()

    started = loop.time()
    opened = Executor(threads=2)
    with pytest.raises(ZeroDivisionError):
        async with opened as executor:
            executor.submit(in_a_thread)
            foreign = threading.Thread(target=in_a_thread)
            with loop.external_work():
                foreign.start()
                assert executor._portal is not None
                while len(executor._portal._requests) < 2:
                    await asyncio.sleep(0)
            raise ZeroDivisionError
    assert loop.time() - started < 60
    with loop.external_work():
        assert await asyncio.to_thread(left.wait, BOUND)
        await asyncio.to_thread(foreign.join, BOUND)
    told = "from_thread(sleep) was cut off when its executor closed."
    assert sorted(errors) == ["CancelledError", "ClosedError", told]


@pytest.mark.virtual_clock
async def test_a_drain_lets_threads_of_running_jobs_go_on() -> None:
    """They could not end otherwise."""
    async with Executor(limit=1, threads=1) as executor:

        def parent() -> int:
            executor.from_thread(asyncio.sleep, 5)
            return executor.from_thread(child)

        async def child() -> int:
            return await executor.submit(add, 1, 2)

        future = executor.submit(parent)
        await asyncio.sleep(1)
    assert future.result() == 3


def test_every_step_of_what_runs_for_a_thread_can_be_cancelled() -> None:
    """A chain of two threads in a lane of one, and the books are balanced whatever is cancelled when."""

    class Books:
        lane: Lane
        inside = 0
        workers = Workers(2)

    async def scenario(books: Books) -> None:
        books.lane = Lane("test", 1, workers=books.workers)
        portal = Portal()

        async def on_the_loop(left: int) -> None:
            books.inside += 1
            try:
                await asyncio.sleep(1)
                if left:
                    await books.lane.call(in_a_thread, left - 1)
            finally:
                books.inside -= 1

        def in_a_thread(left: int) -> None:
            portal.call(on_the_loop, (left,), {})

        try:
            await books.lane.call(in_a_thread, 1)
        finally:
            await books.lane.books.wait_until_idle(1)
            while books.lane._runners or portal._requests:
                await asyncio.sleep(0.1)

    def check(books: Books) -> None:
        assert books.inside == 0
        if hasattr(books, "lane"):
            statistics = books.lane.statistics()
            assert (statistics.busy, statistics.waiting, statistics.abandoned) == (0, 0, 0)
            assert books.workers._promised == 0

    assert cancel_at_every_step(scenario, arrange=Books, check=check) >= 5
    Books.workers.dismiss()


@pytest.mark.virtual_clock
async def test_what_is_checked_out_is_held_until_an_abandoned_call_has_ended(executor: Executor) -> None:
    """A lease of the context, such as a connection that the thread still uses."""
    held: list[str] = []

    class Checkout:
        def hold(self) -> None:
            held.append("held")

        def release(self) -> None:
            held.append("released")

    lease: Lease = Checkout()
    with ThreadLatch(virtual_loop()) as latch:
        token = leases.set((lease,))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await executor.to_thread(latch.wait)
        leases.reset(token)
        assert held == ["held"]
    assert await executor.to_thread(int) == 0
    assert held == ["held", "released"]


# --- virtual time ---


@pytest.mark.virtual_clock
@pytest.mark.parametrize("depth", [0, 1, 2, 20])
async def test_virtual_time_goes_on_while_threads_wait_for_the_loop(executor: Executor, depth: int) -> None:
    """An hour takes no time, also at the end of a chain."""

    def deeper(left: int) -> None:
        if left:
            executor.from_thread(executor.to_thread, deeper, left - 1)
        else:
            executor.from_thread(asyncio.sleep, HOUR)

    loop = asyncio.get_running_loop()
    started = loop.time()
    await executor.to_thread(deeper, depth)
    assert loop.time() - started == HOUR


@pytest.mark.virtual_clock
@pytest.mark.parametrize("depth", [1, 2, DEEPEST_STACK + 2])
async def test_virtual_time_goes_on_while_the_last_thread_of_a_chain_hangs(executor: Executor, depth: int) -> None:
    """What is offered to a thread that is not able to take it yet does not hold the clock; nor after a time-out."""

    def deeper(left: int) -> None:
        if left:
            executor.from_thread(executor.to_thread, deeper, left - 1)
        else:
            latch.wait()

    loop = virtual_loop()
    started = loop.time()
    with ThreadLatch(loop) as latch:
        loop.call_later(HOUR, latch.open)
        await executor.to_thread(deeper, depth)
        assert loop.time() - started == HOUR
    with ThreadLatch(loop) as latch:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(HOUR):
                await executor.to_thread(deeper, depth)
        await asyncio.sleep(HOUR)
    assert await executor.to_thread(int) == 0


def test_a_chain_that_nothing_can_wake_is_told_from_one_that_sleeps() -> None:
    """The virtual clock says that the program has come to its end: no timer of ours keeps it going."""
    with pytest.raises(DeadlockError, match="nothing can ever run again"):
        run_in_virtual_time(hang())


async def hang() -> None:
    async with Executor(threads=1) as executor:
        await executor.to_thread(lambda: executor.from_thread(asyncio.Event().wait))


# --- chains in opposite directions ---


async def promises_are_back(workers: Workers) -> None:
    """A thread that came for a call which another one had taken by then is about to leave."""
    async with asyncio.timeout(BOUND):
        while workers._promised:
            await asyncio.sleep(0)


@pytest.mark.parametrize("pairs", [1, 3, 20])
async def test_chains_over_two_lanes_in_opposite_directions_do_not_wait_for_each_other(pairs: int) -> None:
    """Each thread holds the place that the other one's call needs: one of these calls gets a further thread."""
    async with Executor(threads=1) as executor:

        def first() -> Any:
            met.wait(BOUND)
            return executor.from_thread(executor.to_thread, int)

        def second() -> Any:
            met.wait(BOUND)
            return executor.from_thread(executor.compute, int)

        for _ in range(pairs):
            met = threading.Barrier(2)
            async with asyncio.timeout(BOUND):
                assert list(await asyncio.gather(executor.compute(first), executor.to_thread(second))) == [0, 0]
        for lane in (executor.statistics().threads, executor.statistics().cpu):
            assert lane is not None
            assert (lane.busy, lane.waiting, lane.calls) == (0, 0, 2 * pairs)


async def test_a_thread_beyond_the_lanes_own_is_used_only_when_all_of_these_wait() -> None:
    """One of two threads works: a call of another lane's thread queues behind it."""
    async with Executor(threads=2) as executor:
        at_work, go_on, asked = threading.Event(), threading.Event(), asyncio.Event()

        def work() -> None:
            at_work.set()
            assert go_on.wait(BOUND)

        async def wait() -> None:
            asked.set()
            await answered.wait()

        answered = asyncio.Event()
        working = asyncio.create_task(executor.to_thread(work))
        waiting = asyncio.create_task(executor.to_thread(executor.from_thread, wait))
        await asyncio.to_thread(at_work.wait, BOUND)
        await asked.wait()
        nested = asyncio.create_task(executor.compute(executor.from_thread, executor.to_thread, int))
        async with asyncio.timeout(BOUND):
            while not queued(executor):
                await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not nested.done()
        go_on.set()
        assert await nested == 0
        answered.set()
        await asyncio.gather(working, waiting)


def queued(executor: Executor) -> int:
    lane = executor.statistics().threads
    assert lane is not None
    return lane.waiting


async def test_opposite_chains_without_a_thread_left_fail_with_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than to wait for ever: one is told, the other one goes on."""
    monkeypatch.setattr(workers_module, "SPARE_THREADS", 0)
    workers = Workers(2)
    one, two = Lane("one", 1, workers=workers), Lane("two", 1, workers=workers)
    portal, met = Portal(), threading.Barrier(2)

    def ask(lane: Lane) -> Any:
        met.wait(BOUND)
        return portal.call(lane.call, (int,), {})

    async with asyncio.timeout(BOUND):
        answers = await asyncio.gather(one.call(ask, two), two.call(ask, one), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["DeadlockError", "int"]
    (error,) = [answer for answer in answers if isinstance(answer, DeadlockError)]
    assert re.search(r"int in '(one|two)' <- .*ask in '(one|two)'", str(error))
    await promises_are_back(workers)


async def test_opposite_chains_fail_when_their_further_thread_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is the call's; the other one goes on."""
    workers = Workers(8)
    one, two = Lane("one", 1, workers=workers), Lane("two", 1, workers=workers)
    portal, met = Portal(), threading.Barrier(2)
    run = workers.run

    def refuse(work: Work, *, at_once: bool = False) -> None:
        if at_once:
            workers.give_back()
            raise RuntimeError("can't start new thread")
        run(work)

    monkeypatch.setattr(workers, "run", refuse)

    def ask(lane: Lane) -> Any:
        met.wait(BOUND)
        return portal.call(lane.call, (int,), {})

    async with asyncio.timeout(BOUND):
        answers = await asyncio.gather(one.call(ask, two), two.call(ask, one), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["RuntimeError", "int"]
    await promises_are_back(workers)


async def test_a_further_thread_leaves_a_call_alone_that_has_been_given_up_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its caller was cancelled before the thread came."""
    workers = Workers(8)
    one, two = Lane("one", 1, workers=workers), Lane("two", 1, workers=workers)
    portal, met, late = Portal(), threading.Barrier(2), asyncio.Event()
    run, relieved, ran = workers.run, list[Work](), list[str]()

    def hold(work: Work, *, at_once: bool = False) -> None:
        if at_once:
            relieved.append(work)
            late.set()
        else:
            run(work)

    monkeypatch.setattr(workers, "run", hold)
    nested: list[asyncio.Task[None]] = []

    async def given_up(lane: Lane) -> None:
        nested.append(asyncio.create_task(lane.call(ran.append, lane.books.name)))
        await asyncio.wait(nested[-1:])

    def ask(lane: Lane) -> None:
        met.wait(BOUND)
        portal.call(given_up, (lane,), {})

    async with asyncio.timeout(BOUND):
        asking = asyncio.gather(one.call(ask, two), two.call(ask, one))
        await late.wait()
        while len(nested) < 2 or len(relieved) < 2:
            await asyncio.sleep(0)
        for lane in (one, two):
            lane.books.changed()
        assert len(relieved) == 2, "one is on its way for each of them"
        for task in nested:
            task.cancel()
        await asyncio.wait(nested)
        for work in relieved:
            run(work)
        await asking
        while workers._promised:
            await asyncio.sleep(0)
    assert ran == []


async def test_a_further_thread_comes_when_another_one_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """All there are have been given out, but one works: opposite chains wait for that one, and then go on."""
    monkeypatch.setattr(workers_module, "SPARE_THREADS", 0)
    workers = Workers(3)
    one, two, three = (Lane(name, 1, workers=workers) for name in ("one", "two", "three"))
    portal, met, at_work, go_on = Portal(), threading.Barrier(2), threading.Event(), threading.Event()

    def work() -> None:
        at_work.set()
        assert go_on.wait(BOUND)

    def ask(lane: Lane) -> Any:
        met.wait(BOUND)
        return portal.call(lane.call, (int,), {})

    async with asyncio.timeout(BOUND):
        working = asyncio.create_task(three.call(work))
        await asyncio.to_thread(at_work.wait, BOUND)
        asking = asyncio.gather(one.call(ask, two), two.call(ask, one))
        while not workers._wanting_spare:
            await asyncio.sleep(0)
        assert not asking.done()
        go_on.set()
        assert list(await asking) == [0, 0]
        await working
    await promises_are_back(workers)


async def test_a_chain_goes_on_in_its_own_thread_when_no_further_one_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A high stack is better than none."""
    workers = Workers(8)
    lane, portal = Lane("test", 1, workers=workers), Portal()
    run = workers.run

    def refuse(work: Work, *, at_once: bool = False) -> None:
        if at_once:
            workers.give_back()
            raise RuntimeError("can't start new thread")
        run(work)

    monkeypatch.setattr(workers, "run", refuse)

    def deeper(left: int) -> int:
        return 1 + portal.call(lane.call, (deeper, left - 1), {}) if left else 0

    assert await lane.call(deeper, 3 * DEEPEST_STACK) == 3 * DEEPEST_STACK
    assert len(workers.threads) == 1
    await promises_are_back(workers)


async def test_a_gate_tells_the_last_thread_that_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a round trip in a thread, and is the only one."""
    monkeypatch.setattr(workers_module, "SPARE_THREADS", 0)
    workers = Workers(1)
    lane, gate, portal = Lane("test", 1, workers=workers), Gate("gate"), Portal()
    gate.crossing(workers)

    def ask() -> Any:
        return portal.call(gate.call, (int,), {})

    with pytest.raises(DeadlockError, match=r"no thread is left for int.*int in 'gate' <- .*ask in 'test'"):
        await lane.call(ask)
    await promises_are_back(workers)


async def test_a_thread_whose_wait_is_over_is_not_kept_by_calls_that_nobody_waits_for() -> None:
    """Two calls were offered to it and left behind: it ran one while it waited, and goes on before the other."""
    lane, portal, order = Lane("test", 1, workers=Workers(8)), Portal(), list[str]()
    begun, go_on = threading.Event(), threading.Event()
    left: list[asyncio.Task[None]] = []

    def first() -> None:
        begun.set()
        assert go_on.wait(BOUND)
        order.append("first")

    async def leave_behind() -> None:
        left.append(asyncio.create_task(lane.call(first)))
        left.append(asyncio.create_task(lane.call(order.append, "second")))
        assert await asyncio.to_thread(begun.wait, BOUND)
        asyncio.get_running_loop().call_soon(go_on.set)

    def ask() -> None:
        portal.call(leave_behind, (), {})
        order.append("the thread goes on")

    await lane.call(ask)
    await asyncio.wait(left)
    assert order == ["first", "the thread goes on", "second"]


async def test_a_thread_that_starts_a_call_and_goes_on_is_not_kept_by_it() -> None:
    """The call waits for what the thread is yet to give, so it must not run on its stack. The lane has no other."""
    async with Executor(threads=1) as executor:
        items: SimpleQueue[int | None] = SimpleQueue()
        consuming: list[asyncio.Task[list[int | None]]] = []

        def consume() -> list[int | None]:
            return list(iter(items.get, None))

        async def start() -> None:
            consuming.append(asyncio.create_task(executor.to_thread(consume)))

        def produce() -> None:
            executor.from_thread(start)
            for item in (1, 2, 3, None):
                items.put(item)
                executor.from_thread(asyncio.sleep, 0)

        async with asyncio.timeout(BOUND):
            await executor.to_thread(produce)
            assert await consuming[0] == [1, 2, 3]


async def test_a_call_that_is_given_to_a_waiting_thread_and_left_meanwhile_gives_its_permit_back() -> None:
    """Nobody else has it, so nobody else would."""
    workers = Workers(1)
    lane, portal, back = Lane("test", 1, workers=workers), Portal(), asyncio.Event()

    async def on_the_loop() -> None:
        asking = asking_call.get()
        assert asking is not None
        assert asking.place is not None
        given = Call(lane.books, int, (), {})
        given.held, given.give_back = asking.place.loan, back.set
        assert given.claim()
        asking.place.give(given)
        await back.wait()

    async with asyncio.timeout(BOUND):
        await lane.call(portal.call, on_the_loop, (), {})
    workers.dismiss()
    for worker in workers.threads:
        await asyncio.to_thread(worker.join, BOUND)
