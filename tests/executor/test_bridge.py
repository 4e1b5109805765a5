"""The contract of `concurrent.futures`, kept by `BridgeExecutor` for coroutine functions and for plain ones."""

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future, wait
from concurrent.futures.thread import BrokenThreadPool
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NoReturn

import pytest

import penstock
from penstock import (
    BridgeExecutor,
    ClosedError,
    DeadlockError,
    FailureKind,
    Gate,
    JobTimeout,
    Rate,
    Retry,
    UsageError,
    WrongThread,
)
from penstock.context import current_job
from penstock.executor import running
from penstock.threads import at_exit
from penstock.threads.loop_thread import LoopThread
from penstock.threads.workers import Worker

LONG = 10.0
"""Seconds that nothing takes on a machine that works."""
HOUR = 3600.0
BLINK = 0.01
"""Seconds, as a timeout that is meant to run off."""


class Latch:
    """Functions of both kinds that begin, and go on when it is opened."""

    def __init__(self) -> None:
        self._begun = threading.Semaphore(0)
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self._tell: list[Callable[[], object]] = []

    def plain(self, value: object = None) -> Any:
        """For a thread."""
        self._begun.release()
        assert self._opened.wait(LONG)
        return value

    async def coroutine(self, value: object = None) -> Any:
        """For a loop."""
        await self.swallowing(asyncio.Event(), value)
        return value

    async def swallowing(self, go_on: asyncio.Event, value: object = None) -> Any:
        """For a loop, by an event of the caller's, so that it can wait once more."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._tell.append(partial(loop.call_soon_threadsafe, go_on.set))
            if self._opened.is_set():
                go_on.set()
        self._begun.release()
        await go_on.wait()
        return value

    def begun(self, functions: int = 1) -> None:
        """Wait until so many more have begun."""
        for _ in range(functions):
            assert self._begun.acquire(timeout=LONG)

    def open(self) -> None:
        """Let all go on."""
        with self._lock:
            self._opened.set()
        for tell in self._tell:
            with suppress(RuntimeError):  # the loop is closed
                tell()


@pytest.fixture(name="bridge")
def _bridge() -> Iterator[BridgeExecutor]:
    with BridgeExecutor() as bridge:
        yield bridge


@pytest.fixture
def latch(request: pytest.FixtureRequest) -> Iterator[Latch]:
    """Opened before the fixture `bridge` is torn down, whose threads may wait for it."""
    if "bridge" in request.fixturenames:
        request.getfixturevalue("bridge")
    latch = Latch()
    yield latch
    latch.open()


async def add(left: int, right: int = 0) -> int:
    await asyncio.sleep(0)
    return left + right


def subtract(left: int, right: int = 0) -> int:
    return left - right


async def echo(value: Any) -> Any:
    return value


def echo_plain(value: Any) -> Any:
    return value


async def fail(error: BaseException) -> NoReturn:
    raise error


def fail_plain(error: BaseException) -> NoReturn:
    raise error


BOTH_ECHO = pytest.mark.parametrize("fn", [echo, echo_plain])
BOTH_FAIL = pytest.mark.parametrize("fn", [fail, fail_plain])
BOTH_WAIT = pytest.mark.parametrize("kind", ["coroutine", "plain"])


def workers_of(bridge: BridgeExecutor) -> tuple[Worker, ...]:
    """The threads for plain functions."""
    return bridge._bridged.workers.threads


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does and nobody tells."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def messages(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == logger]


# --- submit ---


def test_submit_runs_coroutine_functions_on_the_loop_and_plain_ones_in_threads(bridge: BridgeExecutor) -> None:
    """Each kind where it belongs, both with a future of the standard library."""

    async def where() -> threading.Thread:
        return threading.current_thread()

    futures = [bridge.submit(where), bridge.submit(threading.current_thread)]
    assert all(isinstance(future, Future) for future in futures)
    on_loop, in_thread = (future.result(LONG) for future in futures)
    assert isinstance(on_loop, LoopThread)
    assert isinstance(in_thread, Worker)


def test_submit_takes_all_that_can_be_called(bridge: BridgeExecutor) -> None:
    """Partials, callable objects, builtins and methods of either kind."""

    class Adder:
        def __init__(self, amount: int) -> None:
            self.amount = amount

        async def __call__(self, item: int) -> int:
            return item + self.amount

        async def method(self, item: int) -> int:
            return item + self.amount

        def plain(self, item: int) -> int:
            return item + self.amount

    adder = Adder(1)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
        (add, (1, 2), 3),
        (subtract, (1, 2), -1),
        (lambda: 4, (), 4),
        (partial(add, 1), (4,), 5),
        (partial(partial(subtract, 1), 4), (), -3),
        (adder, (4,), 5),
        (partial(adder, 4), (), 5),
        (adder.method, (4,), 5),
        (adder.plain, (4,), 5),
        (divmod, (7, 2), (3, 1)),
        ("a b".split, (), ["a", "b"]),
        (int, ("7",), 7),
    ]
    assert [bridge.submit(fn, *args).result(LONG) for fn, args, _ in calls] == [value for _, _, value in calls]


def test_all_keywords_belong_to_the_function(bridge: BridgeExecutor) -> None:
    """Also those that are called as parameters of ours."""

    async def job(**words: int) -> dict[str, int]:
        return words

    def plain(**words: int) -> dict[str, int]:
        return words

    words = {"fn": 1, "self": 2, "args": 3, "kwargs": 4, "key": 5, "timeout": 6}
    for fn in (job, plain):
        assert bridge.submit(fn, **words).result(LONG) == words
    assert bridge.submit(add, 1, right=2).result(LONG) == 3
    assert bridge.submit(subtract, 1, right=2).result(LONG) == -1
    assert bridge.with_options(timeout=LONG).submit(plain, **words).result(LONG) == words


@BOTH_FAIL
def test_an_error_comes_back_as_the_very_same_object(bridge: BridgeExecutor, fn: Callable[..., Any]) -> None:
    """Neither wrapped nor copied; by `exception` and by `result`."""
    error = ZeroDivisionError("mine")
    future = bridge.submit(fn, error)
    assert future.exception(LONG) is error
    with pytest.raises(ZeroDivisionError) as raised:
        future.result()
    assert raised.value is error


@BOTH_FAIL
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(4), GeneratorExit()], ids=repr)
def test_what_would_end_more_than_a_function_ends_its_future_alone(
    bridge: BridgeExecutor, fn: Callable[..., Any], error: BaseException
) -> None:
    """No thread, no loop, and no program ends by it; what is raised is told, or is the cause of what is told."""
    told = bridge.submit(fn, error).exception(LONG)
    assert told is error or (isinstance(told, UsageError) and told.__cause__ is error)
    assert bridge.submit(echo, 1).result(LONG) == 1
    assert bridge.submit(echo_plain, 1).result(LONG) == 1


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), CancelledError(), asyncio.CancelledError()]
)
def test_a_plain_function_may_raise_anything(bridge: BridgeExecutor, error: BaseException) -> None:
    """As in the standard library, the future has it as it is: also a cancellation, which does not cancel the future."""
    future: Future[Any] = bridge.submit(fail_plain, error)
    assert future.exception(LONG) is error
    assert not future.cancelled()


@pytest.mark.parametrize("error", [CancelledError(), asyncio.CancelledError()], ids=["futures", "asyncio"])
def test_a_coroutine_that_says_it_was_cancelled_is(bridge: BridgeExecutor, error: BaseException) -> None:
    """By either error, raised by itself: so is its future."""
    future = bridge.submit(fail, error)
    with pytest.raises(CancelledError):
        future.result(LONG)
    assert future.cancelled()


async def _agen() -> AsyncIterator[int]:
    yield 1


def _gen() -> Iterator[int]:
    yield 1


@penstock.job
async def _definition() -> AsyncIterator[Callable[[int], Awaitable[int]]]:
    async def job(item: int) -> int:
        return item

    yield job


@pytest.mark.parametrize(
    ("wrong", "taught"),
    [
        (_agen, "async generator function _agen.*@penstock.job"),
        (_gen, "generator function _gen.*return a list"),
        (_definition, r"penstock.run\(_definition, items\).*bridge.open"),
        (None, r"found None, expected a function. Write `bridge.submit\(fn, ...\)`"),
    ],
)
def test_what_is_no_function_is_refused_by_an_error_that_teaches(
    bridge: BridgeExecutor, wrong: Any, taught: str
) -> None:
    """By `submit` and by `map`, at the call."""
    with pytest.raises(UsageError, match=taught):
        bridge.submit(wrong)
    with pytest.raises(UsageError, match=taught):
        bridge.map(wrong, [1])


def test_a_coroutine_object_is_refused_and_closed(bridge: BridgeExecutor) -> None:
    """The message shows the right call; Python need not warn of a coroutine that was never awaited."""
    with pytest.raises(UsageError, match=r"Write `bridge.submit\(add, ...\)`"):
        bridge.submit(add(1, 2))  # type: ignore[call-overload]  # what is tested


@pytest.mark.parametrize("timeout", [None, LONG])
def test_a_plain_function_that_returns_a_coroutine_fails(bridge: BridgeExecutor, timeout: float | None) -> None:
    """Nobody would await it: the error says what to write."""

    def forgetful() -> Any:
        return add(1, 2)

    with pytest.raises(UsageError, match=r"returned a coroutine \(add\).*return await add"):
        bridge.with_options(timeout=timeout).submit(forgetful).result(LONG)


# --- coroutine functions are jobs ---


def test_a_coroutine_has_the_identity_of_a_job(bridge: BridgeExecutor) -> None:
    """Named after its function; the program that submits it has none."""

    async def who() -> str:
        return repr(current_job())

    assert bridge.submit(who).result(LONG).startswith("<job test_a_coroutine")
    assert current_job() is None


def test_inside_a_coroutine_everything_works_as_under_an_executor(bridge: BridgeExecutor) -> None:
    """Threads, processing, the way back from a thread, and gates."""
    gate = Gate("service", rate=Rate(1000), retry=Retry(1))

    def in_thread() -> int:
        return penstock.from_thread(add, 1, 2)

    async def job() -> tuple[int, int, int]:
        through_gate = await gate.call(add, 2, 3)
        return await penstock.to_thread(in_thread), await penstock.compute(subtract, 4, 3), through_gate

    assert bridge.submit(job).result(LONG) == (3, 1, 5)


def test_jobs_beyond_the_limit_start_in_order_as_others_end(latch: Latch) -> None:
    """Never more at once, first in, first out."""
    order: list[int] = []

    async def job(number: int) -> None:
        order.append(number)
        await latch.coroutine()

    with BridgeExecutor(limit=1) as bridge:
        futures = [bridge.submit(job, number) for number in range(5)]
        latch.begun()
        assert order == [0]
        assert [future.running() for future in futures] == [True, False, False, False, False]
        latch.open()
        assert not wait(futures, LONG).not_done
        assert order == [0, 1, 2, 3, 4]
        assert not futures[0].running()


def test_a_job_that_waits_for_its_children_runs_them_on_its_slot() -> None:
    """At any depth, with one slot."""

    async def job(depth: int) -> int:
        if depth == 0:
            return 0
        return 1 + max(await asyncio.gather(*(asyncio.wrap_future(bridge.submit(job, depth - 1)) for _ in "ab")))

    with BridgeExecutor(limit=1) as bridge:
        assert bridge.submit(job, 5).result(LONG) == 5


def test_a_job_may_wait_for_its_grandchildren() -> None:
    """Also when their parent has ended before they were begun: they run on the slot of who waits."""

    async def leaf() -> str:
        return "leaf"

    async def parent() -> "Future[str]":
        return bridge.submit(leaf)

    async def grandparent() -> str:
        return await asyncio.wrap_future(await asyncio.wrap_future(bridge.submit(parent)))

    with BridgeExecutor(limit=1) as bridge:
        future = bridge.submit(grandparent)
        wait([future], LONG / 4)
        done = future.done()
        future.cancel()
        assert done


def test_jobs_that_nobody_relates_wait_for_a_child_that_was_there_first(latch: Latch) -> None:
    """A child of a running job gets the slot that is free before a job of the program does."""
    order: list[str] = []

    async def record(name: str) -> None:
        order.append(name)

    async def parent() -> None:
        first, second = (bridge.submit(record, name) for name in ("first child", "second child"))
        latch_ended.set()
        await asyncio.wrap_future(first)
        await asyncio.wrap_future(second)

    latch_ended = threading.Event()
    with BridgeExecutor(limit=1) as bridge:
        blocking = bridge.submit(latch.coroutine)
        latch.begun()
        futures = [bridge.submit(parent), bridge.submit(record, "stranger")]
        latch.open()
        assert not wait([blocking, *futures], LONG).not_done
        assert order == ["first child", "second child", "stranger"]


def test_when_the_limit_grows_those_that_wait_begin(latch: Latch) -> None:
    """At once, in their order; the number is that of the executor on the loop."""
    with BridgeExecutor(limit=1) as bridge:
        futures = [bridge.submit(latch.coroutine) for _ in range(5)]
        latch.begun()
        bridge._bridged.call(setattr, (bridge._bridged.executor, "limit", 3), {})
        latch.begun(2)
        assert [future.running() for future in futures] == [True, True, True, False, False]
        assert bridge.statistics().limit == 3
        latch.open()
        assert not wait(futures, LONG).not_done


def test_a_limit_may_change_while_jobs_are_being_started() -> None:
    """By what the loop calls for each task: each job is started once."""
    started: list[int] = []
    bridges: list[BridgeExecutor] = []

    class Task(asyncio.Task[Any]):
        """Each that is made raises the limit."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if bridges and bridges[0]._bridged.executor.limit < 4:
                bridges[0]._bridged.executor.limit += 1

    def make_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(lambda loop, coro, **kwargs: Task(coro, loop=loop, **kwargs))
        return loop

    async def job(number: int) -> None:
        started.append(number)
        await asyncio.sleep(0)

    with BridgeExecutor(limit=1, loop_factory=make_loop) as bridge:
        bridge.submit(echo, 1).result(LONG)
        bridges.append(bridge)
        assert not wait([bridge.submit(job, number) for number in range(20)], LONG).not_done
    assert started == list(range(20))


# --- cancelling ---


def test_cancelling_a_job_that_waits_is_heard_of_at_once(latch: Latch) -> None:
    """Those who wait for its future go on though nothing else has moved; its function is never called."""
    called: list[int] = []

    async def job() -> None:
        called.append(1)

    with BridgeExecutor(limit=1) as bridge:
        blocking = bridge.submit(latch.coroutine)
        latch.begun()
        waiting = bridge.submit(job)
        assert waiting.cancel()
        assert wait([waiting], LONG).done == {waiting}
        assert waiting.cancelled()
        assert not blocking.done()
        latch.open()
        assert bridge.submit(echo, 1).result(LONG) == 1
        assert called == []


def test_a_job_that_is_cancelled_right_away_is_never_begun(bridge: BridgeExecutor) -> None:
    """Before the loop has come to it."""
    called: list[int] = []

    async def job() -> None:
        called.append(1)

    async def on_the_loop() -> None:
        assert bridge.submit(job).cancel()

    bridge.submit(on_the_loop).result(LONG)
    bridge.submit(echo, 1).result(LONG)
    assert called == []


def test_cancelling_a_job_that_runs_cancels_its_coroutine() -> None:
    """The future says so at once; `wait` returns when the coroutine has ended, clean-up included."""
    running, go_on, steps = threading.Event(), threading.Event(), list[str]()

    async def job() -> None:
        running.set()
        try:
            await asyncio.sleep(HOUR)
        except asyncio.CancelledError:
            steps.append("cancelled")
            await asyncio.to_thread(go_on.wait, LONG)
            steps.append("cleaned up")
            raise

    with BridgeExecutor() as bridge:
        future = bridge.submit(job)
        assert running.wait(LONG)
        assert future.running()
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result(LONG)
        assert (future.cancelled(), future.done(), future.running()) == (True, True, False)
        assert wait([future], BLINK).not_done == {future}
        assert future.cancel(), "cancelling again is fine"
        go_on.set()
        assert wait([future], LONG).done == {future}
        assert steps == ["cancelled", "cleaned up"]


def test_cancelling_twice_is_as_cancelling_once(bridge: BridgeExecutor) -> None:
    """Also when the loop has not come to the first one yet; and others who have been told go on."""
    futures: list[Future[Any]] = []

    async def job() -> None:
        await asyncio.sleep(HOUR)

    async def on_the_loop() -> None:
        future = bridge.submit(job)
        futures.append(future)
        assert future.cancel()
        assert future.cancel()

    bridge.submit(on_the_loop).result(LONG)
    assert wait(futures, LONG).done == set(futures)
    assert futures[0].cancel(), "as in the standard library"
    assert bridge.submit(echo, 1).result(LONG) == 1


def test_what_is_done_cannot_be_cancelled(bridge: BridgeExecutor) -> None:
    """As in the standard library; nor can a plain function that runs."""
    for fn in (echo, echo_plain):
        future = bridge.submit(fn, 1)
        assert future.result(LONG) == 1
        assert not future.cancel()
        assert not future.cancelled()
    latch = Latch()
    running = bridge.submit(latch.plain, 2)
    latch.begun()
    assert running.running()
    assert not running.cancel()
    latch.open()
    assert running.result(LONG) == 2


def test_a_coroutine_that_swallows_its_cancellation_is_cancelled_for_its_holder(latch: Latch) -> None:
    """Its value is dropped. It keeps its slot until it ends, and who waits in `wait` hears of it then."""
    running, swallowed = threading.Event(), threading.Event()

    async def stubborn() -> int:
        running.set()
        try:
            await asyncio.sleep(HOUR)
        except asyncio.CancelledError:
            swallowed.set()
        await latch.coroutine()
        return 1

    with BridgeExecutor(limit=1) as bridge:
        future, following = bridge.submit(stubborn), bridge.submit(echo, 2)
        assert running.wait(LONG)
        future.cancel()
        assert swallowed.wait(LONG)
        assert not following.done()
        latch.open()
        assert following.result(LONG) == 2
        assert wait([future], LONG).done == {future}
        with pytest.raises(CancelledError):
            future.result()


def test_a_plain_function_that_waits_for_a_thread_can_be_cancelled(latch: Latch) -> None:
    """It is never called; the standard library's `wait` hears of it when a thread comes to it."""
    called: list[int] = []
    with BridgeExecutor(1) as bridge:
        bridge.submit(latch.plain)
        latch.begun()
        waiting = bridge.submit(called.append, 1)
        assert waiting.cancel()
        assert waiting.cancelled()
        latch.open()
        assert wait([waiting], LONG).done == {waiting}
    assert called == []


@pytest.mark.parametrize("limit", [1, 1_000_000], ids=["waiting", "running"])
def test_the_cost_of_cancelling_grows_no_faster_than_the_number(limit: int) -> None:
    """Ten times as many take about ten times as long, not a hundred times; also when all wait for one slot."""

    def seconds(number: int) -> float:
        with BridgeExecutor(limit=limit) as bridge:
            futures = [bridge.submit(asyncio.sleep, HOUR) for _ in range(number)]
            bridge.statistics()  # all have come to the loop
            start = time.perf_counter()
            for future in futures:
                future.cancel()
            assert not wait(futures, 3 * LONG).not_done
            return time.perf_counter() - start

    gc.disable()  # a collection looks at all of them, again and again
    try:
        few = min(seconds(1_000) for _ in range(3))
        many = min(seconds(10_000) for _ in range(2))
    finally:
        gc.enable()
    assert many < 50 * few


# --- plain functions ---


def test_a_plain_function_has_the_identity_of_a_job(bridge: BridgeExecutor) -> None:
    """Named after itself, or with its key; submitted by a job, it works for that one."""

    def who() -> str:
        return repr(current_job())

    async def job() -> str:
        return await asyncio.wrap_future(bridge.submit(who))

    assert "who>" in bridge.submit(who).result(LONG)
    assert bridge.with_options(key=7).submit(who).result(LONG).endswith("who key=7>")
    assert "job>" in bridge.submit(job).result(LONG)


def test_a_plain_function_may_call_coroutines_on_the_loop(bridge: BridgeExecutor) -> None:
    """By `penstock.from_thread`, also through a gate that was opened there."""

    async def guarded() -> int:
        return await gate.call(add, 1, 2)

    def plain() -> int:
        return penstock.from_thread(guarded)

    gate = Gate("service", retry=Retry(1))
    assert bridge.submit(plain).result(LONG) == 3


def test_the_thread_of_a_plain_function_is_named_after_it(bridge: BridgeExecutor) -> None:
    """Unless there is a prefix for all of them."""

    def named() -> str:
        return threading.current_thread().name

    assert bridge.submit(named).result(LONG).startswith("penstock-thread_0 <job test_the_thread")
    with BridgeExecutor(1, "mine") as prefixed:
        assert prefixed.submit(named).result(LONG) == "mine_0"

        async def on_loop() -> str:
            return named()

        assert prefixed.submit(on_loop).result(LONG) == "mine-loop"


colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


async def _paint(value: str) -> str:
    before = colour.get()
    colour.set(value)
    return before


def _paint_plain(value: str) -> str:
    before = colour.get()
    colour.set(value)
    return before


@pytest.mark.parametrize("fn", [_paint, _paint_plain])
def test_context_variables_go_in_and_not_out(bridge: BridgeExecutor, fn: Callable[..., Any]) -> None:
    """As they were at the call of `submit`; what a function sets is its own."""
    bridge.submit(echo, 1).result(LONG)
    token = colour.set("red")
    try:
        assert bridge.submit(fn, "green").result(LONG) == "red"
        assert bridge.submit(fn, "blue").result(LONG) == "red"
        assert colour.get() == "red"
    finally:
        colour.reset(token)
    assert bridge.submit(fn, "green").result(LONG) == "none"


# --- the future ---


def test_callbacks_run_where_the_function_ran(bridge: BridgeExecutor, latch: Latch) -> None:
    """A coroutine's on the loop thread, a plain function's in its thread; at once, when it is done already."""
    on_loop, in_thread = bridge.submit(latch.coroutine), bridge.submit(latch.plain)
    threads: dict[str, Future[threading.Thread]] = {name: Future() for name in ("coroutine", "plain", "done")}
    on_loop.add_done_callback(lambda _: threads["coroutine"].set_result(threading.current_thread()))
    in_thread.add_done_callback(lambda _: threads["plain"].set_result(threading.current_thread()))
    latch.open()
    assert isinstance(threads["coroutine"].result(LONG), LoopThread)
    assert isinstance(threads["plain"].result(LONG), Worker)
    on_loop.add_done_callback(lambda _: threads["done"].set_result(threading.current_thread()))
    assert threads["done"].result(0) is threading.current_thread()


@pytest.mark.may_leave("errors")
@BOTH_WAIT
@pytest.mark.parametrize("error", [ZeroDivisionError("in a callback"), SystemExit(3)], ids=repr)
def test_an_error_in_a_callback_is_logged_and_harms_nobody(
    caplog: pytest.LogCaptureFixture, kind: str, error: BaseException
) -> None:
    """What waits behind it runs; the future's other callbacks are called, unless it is no `Exception`."""
    latch, called = Latch(), list[bool]()
    with BridgeExecutor(1, limit=1) as bridge:
        future, following = (bridge.submit(getattr(latch, kind), number) for number in range(2))
        latch.begun()
        future.add_done_callback(lambda _: fail_plain(error))
        future.add_done_callback(lambda _: called.append(True))
        latch.open()
        assert future.result(LONG) == 0
        assert following.result(LONG) == 1
    assert called == [True] or not isinstance(error, Exception)
    (message,) = messages(caplog, "concurrent.futures")
    assert message == "Exception in worker" or message.startswith("exception calling callback")


@pytest.mark.may_leave("errors")
def test_a_callback_of_a_job_that_cancels_itself_harms_nobody(bridge: BridgeExecutor) -> None:
    """Whatever it raises: the loop goes on."""

    latch = Latch()

    async def job() -> None:
        latch.plain()  # so that the callback is there in time
        raise asyncio.CancelledError

    future = bridge.submit(job)
    latch.begun()
    future.add_done_callback(lambda _: fail_plain(SystemExit(3)))
    latch.open()
    wait([future], LONG)
    assert future.cancelled()
    assert bridge.submit(echo, 1).result(LONG) == 1


@BOTH_WAIT
def test_waiting_for_a_result_has_a_timeout(bridge: BridgeExecutor, latch: Latch, kind: str) -> None:
    """By `TimeoutError`; the function goes on, and can be asked again."""
    future = bridge.submit(getattr(latch, kind), 5)
    with pytest.raises(TimeoutError):
        future.result(BLINK)
    with pytest.raises(TimeoutError):
        future.exception(timeout=BLINK)
    latch.open()
    assert future.result(LONG) == 5
    assert future.exception() is None


@BOTH_FAIL
def test_an_error_that_nobody_asks_for_is_logged_once(
    bridge: BridgeExecutor, caplog: pytest.LogCaptureFixture, fn: Callable[..., Any]
) -> None:
    """When the future goes, with its traceback."""
    future = bridge.submit(fn, ZeroDivisionError("lost"))
    wait([future], LONG)
    assert messages(caplog, "penstock.jobs") == []
    del future
    bridge.submit(echo_plain, 1).result(LONG)  # the thread has let go of it
    bridge.submit(echo, 1).result(LONG)
    until(lambda: gc.collect() >= 0 and bool(messages(caplog, "penstock.jobs")))
    gc.collect()
    (record,) = [record for record in caplog.records if record.name == "penstock.jobs"]
    assert record.levelno == logging.ERROR
    assert "nobody asked its future" in record.getMessage()
    assert record.exc_info is not None
    assert "lost" in str(record.exc_info[1])


def _by_result(future: "Future[Any]") -> None:
    with suppress(ZeroDivisionError):
        future.result(LONG)


def _by_exception(future: "Future[Any]") -> None:
    future.exception(LONG)


def _by_as_completed(future: "Future[Any]") -> None:
    for each in concurrent.futures.as_completed([future], LONG):
        _by_result(each)


def _by_wrap_future(future: "Future[Any]") -> None:
    async def ask() -> None:
        with suppress(ZeroDivisionError):
            await asyncio.wrap_future(future)

    asyncio.run(ask())


@pytest.mark.parametrize("ask", [_by_result, _by_exception, _by_as_completed, _by_wrap_future])
@pytest.mark.parametrize("when", ["before", "after"])
@BOTH_FAIL
def test_an_error_that_somebody_asks_for_is_not_logged(
    caplog: pytest.LogCaptureFixture,
    fn: Callable[..., Any],
    ask: "Callable[[Future[Any]], None]",
    when: str,
) -> None:
    """Whether they asked before it was there or after."""
    go_on = threading.Event()

    async def later() -> None:
        await asyncio.to_thread(go_on.wait, LONG)
        await fail(ZeroDivisionError())

    def later_plain() -> None:
        go_on.wait(LONG)
        fail_plain(ZeroDivisionError())

    with BridgeExecutor() as bridge:
        future: Future[Any] = bridge.submit(later if fn is fail else later_plain)
        if when == "after":
            go_on.set()
            wait([future], LONG)
        else:
            threading.Timer(BLINK, go_on.set).start()
        ask(future)
        del future
    gc.collect()
    assert messages(caplog, "penstock.jobs") == []


def test_what_a_future_held_goes_with_it(bridge: BridgeExecutor) -> None:
    """Without the garbage collector: values, arguments, and what an error's traceback knows."""

    class Value:
        pass

    async def job(value: Value, error: type[Exception] | None) -> Value:
        if error is not None:
            raise error
        return value

    def plain(value: Value, error: type[Exception] | None) -> Value:
        if error is not None:
            raise error
        return value

    gc.collect()
    gc.disable()
    try:
        for fn, error in itertools.product((job, plain), (None, ZeroDivisionError)):
            value = Value()
            seen = weakref.ref(value)
            future = bridge.submit(fn, value, error)
            assert isinstance(future.exception(LONG), error or type(None))
            del value, future
            until(lambda seen=seen: seen() is None)  # type: ignore[misc]
    finally:
        gc.enable()


# --- map ---


@pytest.mark.parametrize("fn", [add, subtract])
def test_map_gives_the_values_in_the_order_of_the_items(bridge: BridgeExecutor, fn: Callable[..., Any]) -> None:
    """Of several iterables side by side, to the end of the shortest, as the built-in one does."""
    sign = 1 if fn is add else -1
    assert list(bridge.map(fn, range(50))) == list(range(50))
    assert list(bridge.map(fn, range(3), itertools.count(10))) == [n + sign * (10 + n) for n in range(3)]
    assert list(bridge.map(fn, [])) == []
    assert list(bridge.map(fn)) == []


def test_map_without_a_buffer_reads_and_submits_everything_at_once(latch: Latch) -> None:
    """Before the first value is asked for; `chunksize` has no effect."""
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            read.append(number)
            yield number

    with BridgeExecutor(5) as bridge:
        values = bridge.map(latch.plain, items(), chunksize=3)
        assert read == [0, 1, 2, 3, 4]
        latch.begun(5)
        latch.open()
        assert list(values) == [0, 1, 2, 3, 4]


@BOTH_ECHO
def test_map_with_a_buffer_reads_as_values_are_asked_for(bridge: BridgeExecutor, fn: Callable[..., Any]) -> None:
    """So the items may be endless: never more are submitted than were asked for, and the buffer."""
    items = itertools.count()
    read: list[int] = []
    values = bridge.map(fn, (read.append(item) or item for item in items), buffersize=3)  # type: ignore[func-returns-value]
    assert len(read) == 3
    for number in range(10):
        assert next(values) == number
        assert len(read) == 4 + number
    assert isinstance(values, Generator)
    values.close()
    assert next(items) == 13


@pytest.mark.parametrize("buffersize", [1, 2, 5, 100])
def test_map_with_a_buffer_gives_all_values(bridge: BridgeExecutor, buffersize: int) -> None:
    """Whether it is smaller or larger than the number of items."""
    assert list(bridge.map(echo, range(5), buffersize=buffersize)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("wrong", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)]
)
def test_a_buffersize_that_cannot_work_is_refused(bridge: BridgeExecutor, wrong: Any, error: type[Exception]) -> None:
    """At the call, by the standard library's classes."""
    with pytest.raises(error, match="buffersize"):
        bridge.map(echo, [1], buffersize=wrong)


@BOTH_WAIT
def test_map_has_a_timeout_that_counts_from_the_call(bridge: BridgeExecutor, latch: Latch, kind: str) -> None:
    """Asking for a value that is not there by then raises, and cancels what has not begun."""
    values = bridge.map(getattr(latch, kind), range(2), timeout=BLINK)
    with pytest.raises(TimeoutError):
        next(values)
    assert list(bridge.map(echo, range(3), timeout=LONG)) == [0, 1, 2]


@BOTH_WAIT
@pytest.mark.parametrize("buffersize", [None, 4])
def test_an_error_in_map_cancels_the_rest(latch: Latch, kind: str, buffersize: int | None) -> None:
    """It comes in its item's turn, and is the last that comes; what has not begun never does."""
    called: list[int] = []

    def plain(number: int) -> int:
        called.append(number)
        if number == 1:
            raise ZeroDivisionError
        return int(latch.plain(number)) if number == 2 else number

    async def coroutine(number: int) -> int:
        called.append(number)
        if number == 1:
            raise ZeroDivisionError
        return int(await latch.coroutine(number)) if number == 2 else number

    with BridgeExecutor(1, limit=1) as bridge:
        values = bridge.map({"plain": plain, "coroutine": coroutine}[kind], range(10), buffersize=buffersize)
        assert next(values) == 0
        latch.begun()
        with pytest.raises(ZeroDivisionError):
            next(values)
        assert list(values) == []
        latch.open()
    assert called == [0, 1, 2]


@BOTH_WAIT
def test_closing_the_iterator_of_map_cancels_what_is_not_asked_for(latch: Latch, kind: str) -> None:
    """So does letting it go: what has not begun never does."""
    called: list[int] = []

    def plain(number: int) -> int:
        called.append(number)
        return int(latch.plain(number)) if number == 1 else number

    async def coroutine(number: int) -> int:
        called.append(number)
        return int(await latch.coroutine(number)) if number == 1 else number

    with BridgeExecutor(1, limit=1) as bridge:
        values = bridge.map({"plain": plain, "coroutine": coroutine}[kind], range(10))
        assert next(values) == 0
        latch.begun()
        del values
        latch.open()
    assert called == [0, 1]


@pytest.mark.parametrize("buffersize", [None, 2])
@BOTH_ECHO
def test_the_iterator_of_map_keeps_no_value_alive(
    bridge: BridgeExecutor, fn: Callable[..., Any], buffersize: int | None
) -> None:
    """Neither those that were handed over, nor by a future that is done with."""

    class Value:
        pass

    values = bridge.map(fn, (Value() for _ in range(4)), buffersize=buffersize)
    for _ in range(3 if buffersize else 4):  # a `zip` that is being read keeps what it has read last
        seen = weakref.ref(next(values))
        until(lambda seen=seen: seen() is None)  # type: ignore[misc]


# --- options ---


def test_a_key_is_a_value_or_a_function_of_the_first_argument(bridge: BridgeExecutor) -> None:
    """What current_job, logs and errors call the job; all else is the executor's own."""

    async def key_of_job(_item: object = None) -> object:
        job = current_job()
        return None if job is None else job.key

    def key_of_plain(_item: object = None) -> object:
        job = current_job()
        return None if job is None else job.key

    for fn in (key_of_job, key_of_plain):
        assert bridge.with_options(key="k").submit(fn).result(LONG) == "k"
        assert bridge.with_options(key=str).submit(fn, 5).result(LONG) == "5"
        assert list(bridge.with_options(key=str).map(fn, [1, 2])) == ["1", "2"]
        assert bridge.with_options(key=str, timeout=LONG).submit(fn, 5).result(LONG) == "5"
        assert bridge.submit(fn).result(LONG) is None


def test_a_key_function_needs_an_argument(bridge: BridgeExecutor) -> None:
    """The error says what to write instead."""
    with pytest.raises(UsageError, match=r"with_options\(key=str\).*echo was submitted without any.*the key itself"):
        bridge.with_options(key=str).submit(echo, value=1)


def test_a_coroutine_that_takes_too_long_is_cancelled(bridge: BridgeExecutor) -> None:
    """Its future fails by JobTimeout, which names it; the coroutine sees the cancellation."""
    ended: Future[str] = Future()

    async def slow() -> None:
        try:
            await asyncio.sleep(HOUR)
        except asyncio.CancelledError:
            ended.set_result("cancelled")
            raise

    with pytest.raises(JobTimeout, match="slow key='k'.*did not end within 0.01 s"):
        bridge.with_options(timeout=BLINK, key="k").submit(slow).result(LONG)
    assert ended.result(0) == "cancelled"
    assert bridge.with_options(timeout=LONG).submit(echo, 1).result(LONG) == 1


def test_a_coroutine_that_outlives_its_timeout_keeps_its_slot_until_it_ends(
    latch: Latch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has been cancelled and went on: its future is done, the log names it, and what waits runs afterwards."""
    monkeypatch.setattr(running, "PATIENCE", BLINK)

    async def stubborn() -> None:
        over = asyncio.Event()
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await latch.swallowing(over)

    with BridgeExecutor(limit=1) as bridge:
        future, following = bridge.with_options(timeout=BLINK).submit(stubborn), bridge.submit(echo, 1)
        assert isinstance(future.exception(LONG), JobTimeout)
        assert not following.done()
        latch.open()
        done = not wait([following], LONG / 4).not_done
        bridge.submit(echo, 1)  # so that the shutdown ends, at least
        assert done
    assert "swallowed asyncio.CancelledError" in messages(caplog, "penstock.jobs")[0]


def test_a_plain_function_that_takes_too_long_is_left_behind(latch: Latch, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps its thread, the statistics say so, and a shutdown does not wait for it."""
    bridge = BridgeExecutor(2)
    with bridge:
        future = bridge.with_options(timeout=BLINK).submit(latch.plain)
        with pytest.raises(JobTimeout, match=r"<job Latch.plain> did not end within 0.01 s"):
            future.result(LONG)
        threads = bridge.statistics().threads
        assert threads is not None
        assert (threads.busy, threads.abandoned, threads.abandoned_calls[0].name) == (1, 1, "Latch.plain")
        assert bridge.submit(echo_plain, 1).result(LONG) == 1
    assert [thread.is_alive() for thread in workers_of(bridge)] == [True]
    assert any("nobody waits for: Latch.plain" in record.getMessage() for record in caplog.records)
    latch.open()
    for thread in workers_of(bridge):
        thread.join(LONG)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_timeout_that_cannot_work_is_refused(bridge: BridgeExecutor, wrong: Any) -> None:
    """At the call."""
    with pytest.raises(UsageError, match="timeout="):
        bridge.with_options(timeout=wrong)


def test_a_view_is_the_same_executor() -> None:
    """It keeps it alive, and shutting it down shuts down both."""
    view = BridgeExecutor().with_options(timeout=LONG).with_options(key="k")
    gc.collect()
    assert view.submit(echo, 1).result(LONG) == 1
    assert isinstance(view, BridgeExecutor)
    bridge = BridgeExecutor()
    bridge.with_options(key="k").shutdown()
    with pytest.raises(ClosedError):
        bridge.submit(echo, 1)
    view.shutdown()


# --- shutdown ---


def test_leaving_the_block_finishes_what_was_submitted() -> None:
    """And ends all threads."""
    with BridgeExecutor(2, limit=2) as bridge:
        futures = [bridge.submit(fn, number) for number in range(50) for fn in (echo, echo_plain)]
        threads = [bridge._bridged._thread, *workers_of(bridge)]
    assert all(future.done() for future in futures)
    assert not any(thread is not None and thread.is_alive() for thread in threads)
    assert workers_of(bridge) == ()


def test_a_shutdown_that_does_not_wait_returns_at_once(latch: Latch) -> None:
    """What was submitted is finished nevertheless; a second one may wait for it."""
    bridge = BridgeExecutor(1, limit=1)
    futures = [bridge.submit(getattr(latch, kind), n) for n in range(2) for kind in ("plain", "coroutine")]
    bridge.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    latch.open()
    bridge.shutdown()
    bridge.shutdown()
    assert [future.result(0) for future in futures] == [0, 0, 1, 1]


def test_jobs_that_wait_begin_while_it_drains(latch: Latch) -> None:
    """One after the other: the shutdown ends with the last of them. What tells of itself does so until then."""
    bridge = BridgeExecutor(limit=1)
    futures = [bridge.submit(latch.coroutine, number) for number in range(4)]
    latch.begun()
    bridge.shutdown(wait=False)
    assert bridge.statistics().jobs == 1
    latch.open()
    bridge.shutdown()
    assert [future.result(0) for future in futures] == [0, 1, 2, 3]


def test_after_a_shutdown_nothing_can_be_submitted(latch: Latch) -> None:
    """Neither while it drains, nor afterwards, nor when nothing ever was: ClosedError, which is a RuntimeError."""
    bridge, unused = BridgeExecutor(), BridgeExecutor()
    blocking = bridge.submit(latch.plain)
    bridge.shutdown(wait=False)
    unused.shutdown()

    def refused() -> None:
        for closed in (bridge, unused):
            for fn in (echo, echo_plain):
                with pytest.raises(ClosedError, match="cannot schedule new futures after shutdown"):
                    closed.submit(fn, 1)
                with pytest.raises(RuntimeError):
                    closed.map(fn, [1])

    refused()
    latch.open()
    blocking.result(LONG)
    bridge.shutdown()
    refused()
    with pytest.raises(ClosedError):
        bridge.statistics()
    with pytest.raises(ClosedError):
        unused.statistics()


def test_a_shutdown_may_cancel_what_has_not_begun(latch: Latch) -> None:
    """Of both kinds; what runs is finished, and what has been cancelled before is no trouble."""
    called: list[int] = []

    async def job() -> None:
        called.append(1)

    bridge = BridgeExecutor(1, limit=1)
    running = [bridge.submit(latch.plain, 1), bridge.submit(latch.coroutine, 2)]
    latch.begun(2)
    waiting: list[Future[Any]] = [bridge.submit(job), bridge.submit(job), bridge.submit(called.append, 2)]
    waiting[0].cancel()
    bridge.submit(echo, 1).cancel()
    wait(waiting[:1], LONG)
    bridge.shutdown(wait=False, cancel_futures=True)
    latch.open()
    assert [future.result(LONG) for future in running] == [1, 2]
    assert not wait(waiting, LONG).not_done
    assert all(future.cancelled() for future in waiting)
    bridge.shutdown(cancel_futures=True)
    assert called == []


def test_a_shutdown_that_cancels_reaches_children_that_wait_for_a_slot() -> None:
    """They have not begun, and say so; those of them that run go on."""
    begun: list[int] = []
    children: list[Future[None]] = []
    submitted, latch = threading.Event(), Latch()

    async def child(number: int) -> None:
        begun.append(number)
        await latch.coroutine()

    async def parent() -> None:
        children.extend(bridge.submit(child, number) for number in range(3))
        submitted.set()
        await asyncio.wait([asyncio.wrap_future(future) for future in children])

    bridge = BridgeExecutor(limit=1)
    future = bridge.submit(parent)
    assert submitted.wait(LONG)
    latch.begun()
    assert [each.running() for each in children] == [True, False, False]
    bridge.shutdown(wait=False, cancel_futures=True)
    wait(children[1:], LONG / 4)
    latch.open()
    assert future.result(LONG) is None
    bridge.shutdown()
    assert [each.cancelled() for each in children] == [False, True, True]
    assert begun == [0]


def test_a_job_that_drains_may_wait_for_a_plain_function_and_the_other_way_round(latch: Latch) -> None:
    """The shutdown ends when neither is left."""
    bridge = BridgeExecutor(1)
    on_loop = bridge.submit(latch.coroutine, 1)
    in_thread = bridge.submit(on_loop.result)

    async def wait_for_both() -> int:
        return 1 + int(await asyncio.wrap_future(in_thread))

    async def calls_a_thread() -> int:
        await latch.coroutine()
        return await penstock.to_thread(subtract, 5, 2)

    last, through_thread = bridge.submit(wait_for_both), bridge.submit(calls_a_thread)
    bridge.shutdown(wait=False)
    latch.open()
    bridge.shutdown()
    assert (last.result(0), through_thread.result(0)) == (2, 3)


class Resource:
    """An async client: it says when it is used while it is not open."""

    def __init__(self) -> None:
        self.open = False

    async def __aenter__(self) -> "Resource":
        self.open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open = False

    async def get(self) -> bool:
        await asyncio.sleep(0)
        return self.open


def test_what_still_runs_may_use_an_opened_client_while_it_drains(latch: Latch) -> None:
    """Its block, too, can be left while the executor drains."""
    bridge = BridgeExecutor(1)

    def use_it() -> bool:
        latch.plain()
        return bool(view.get())

    resource = Resource()
    keeping_open = Latch()
    other = bridge.submit(keeping_open.coroutine)
    with bridge.open(resource) as view:
        future = bridge.submit(use_it)
        bridge.shutdown(wait=False)
        latch.open()
        assert future.result(LONG) is True
        assert view.get() is True
    assert not resource.open
    keeping_open.open()
    bridge.shutdown()
    assert other.done()
    with pytest.raises(ClosedError):
        view.get()


def test_open_starts_the_executor_and_refuses_one_that_is_closed() -> None:
    """It is a use like any other."""
    with BridgeExecutor() as bridge, bridge.open(Resource()) as view:
        assert view.get() is True
    with pytest.raises(ClosedError):
        with bridge.open(Resource()):
            raise AssertionError
    with pytest.raises(UsageError):
        BridgeExecutor().open(3)  # type: ignore[call-overload]  # what is tested


def test_a_shutdown_on_the_loop_thread_cannot_wait(bridge: BridgeExecutor) -> None:
    """WrongThread says what to write, and nothing has been shut down by it."""

    async def job(wait: bool) -> None:
        bridge.shutdown(wait=wait)

    with pytest.raises(WrongThread, match=r"shutdown\(wait=False\)"):
        bridge.submit(job, True).result(LONG)
    assert bridge.submit(echo, 1).result(LONG) == 1
    bridge.submit(job, False).result(LONG)
    with pytest.raises(ClosedError):
        bridge.submit(echo, 1)


def test_a_shutdown_in_a_function_of_its_own_cannot_wait(bridge: BridgeExecutor) -> None:
    """DeadlockError, instead of a wait for oneself: in its threads, and in any other that works for its jobs."""

    async def elsewhere() -> None:
        await penstock.compute(bridge.shutdown)

    with pytest.raises(DeadlockError, match=r"shutdown\(wait=False\)"):
        bridge.submit(bridge.shutdown).result(LONG)
    future = bridge.submit(elsewhere)
    wait([future], LONG / 4)
    done = future.done()
    future.cancel()
    assert done
    assert isinstance(future.exception(), DeadlockError)
    assert bridge.submit(echo, 1).result(LONG) == 1
    bridge.submit(bridge.shutdown, wait=False).result(LONG)
    with pytest.raises(ClosedError):
        bridge.submit(echo, 1)


def test_another_executor_may_be_shut_down_in_a_function() -> None:
    """Nobody waits for himself there."""
    with BridgeExecutor() as outer:
        inner = BridgeExecutor()
        future = inner.submit(echo, 1)
        outer.submit(inner.shutdown).result(LONG)
        assert future.result(0) == 1


@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_one_that_is_garbage_finishes_what_it_has_and_ends(used: bool) -> None:
    """Nobody has to shut it down; no thread is left."""
    latch = Latch()
    bridge = BridgeExecutor()
    futures: list[Future[Any]] = []
    if used:
        futures = [bridge.submit(latch.coroutine, 1), bridge.submit(latch.plain, 1)]
    thread = bridge._bridged._thread
    seen = weakref.ref(bridge)
    del bridge
    gc.collect()
    assert seen() is None
    latch.open()
    assert all(future.result(LONG) == 1 for future in futures)
    if thread is not None:
        thread.join(LONG)
        assert not thread.is_alive()


def test_the_iterator_of_map_keeps_the_executor_alive_only_while_it_submits() -> None:
    """Without a buffer everything has been submitted: the executor may go."""
    bridge = BridgeExecutor()
    eager = bridge.map(echo, range(3))
    seen = weakref.ref(bridge)
    del bridge
    gc.collect()
    assert seen() is None
    assert list(eager) == [0, 1, 2]
    bridge = BridgeExecutor()
    lazy = bridge.map(echo, range(3), buffersize=1)
    del bridge
    gc.collect()
    assert list(lazy) == [0, 1, 2]
    del lazy
    gc.collect()


# --- the loop thread must not be blocked ---


def _wait_for(future: "Future[Any]") -> object:
    return wait([future])


def _as_completed(future: "Future[Any]") -> object:
    return list(concurrent.futures.as_completed([future]))


BLOCKING = pytest.mark.parametrize("block", [Future.result, Future.exception, _wait_for, _as_completed])


@BLOCKING
@BOTH_WAIT
def test_waiting_for_a_future_on_the_loop_thread_is_refused(
    bridge: BridgeExecutor, latch: Latch, block: "Callable[[Future[Any]], object]", kind: str
) -> None:
    """WrongThread says what to write; nothing stays locked, and the future goes its way."""

    async def job() -> None:
        if block is Future.result:
            future.result()
        elif block is Future.exception:
            future.exception()
        else:
            block(future)

    future = bridge.submit(getattr(latch, kind), 1)
    with pytest.raises(WrongThread, match=r"await asyncio.wrap_future\(future\)"):
        bridge.submit(job).result(LONG)
    latch.open()
    assert future.result(LONG) == 1
    assert wait([future], LONG).done == {future}


@BLOCKING
def test_a_future_that_is_done_may_be_asked_on_the_loop_thread(
    bridge: BridgeExecutor, block: "Callable[[Future[Any]], object]"
) -> None:
    """It blocks nobody."""

    async def job() -> None:
        block(future)

    future = bridge.submit(echo, 1)
    future.result(LONG)
    wait([future], LONG)
    bridge.submit(job).result(LONG)


# --- initializer ---


def test_the_initializer_runs_once_in_each_thread() -> None:
    """With its arguments, before anything else there; the loop thread is none of them."""
    initialized: list[tuple[threading.Thread, str]] = []

    def initializer(word: str) -> None:
        initialized.append((threading.current_thread(), word))

    barrier = threading.Barrier(3)
    with BridgeExecutor(3, initializer=initializer, initargs=("hello",)) as bridge:
        bridge.submit(echo, 1).result(LONG)
        assert initialized == []
        for _ in range(5):
            wait([bridge.submit(barrier.wait, LONG) for _ in range(3)], LONG)
        assert {thread for thread, _ in initialized} == set(workers_of(bridge))
    assert [word for _, word in initialized] == ["hello"] * 3


@pytest.mark.may_leave("errors")
def test_an_initializer_that_fails_breaks_the_executor(latch: Latch, caplog: pytest.LogCaptureFixture) -> None:
    """What waits for a thread fails, nothing can be submitted, coroutines that run go on, and the log has the error."""

    def initializer() -> None:
        raise ZeroDivisionError("cannot begin")

    with BridgeExecutor(2, initializer=initializer) as bridge:
        running = bridge.submit(latch.coroutine, 5)
        latch.begun()
        waiting = bridge.submit(echo_plain, 1)
        assert isinstance(waiting.exception(LONG), BrokenThreadPool)
        for fn in (echo, echo_plain):
            with pytest.raises(BrokenThreadPool, match="an initializer failed"):
                bridge.submit(fn, 1)
        assert "broken" in repr(bridge)
        assert bridge._broken is not None
        latch.open()
        assert running.result(LONG) == 5
    assert "Exception in initializer:" in messages(caplog, "concurrent.futures")
    with pytest.raises(BrokenExecutor):
        bridge.submit(echo, 1)


@pytest.mark.may_leave("errors")
def test_an_initializer_that_fails_later_lets_running_functions_end(latch: Latch) -> None:
    """Those in the threads that it had been fine with; a coroutine that then asks for a thread is told."""
    succeed = iter([True])

    def initializer() -> None:
        next(succeed)

    async def job() -> None:
        await latch.coroutine()
        await penstock.to_thread(echo_plain, 1)

    with BridgeExecutor(2, initializer=initializer) as bridge:
        on_loop, in_thread = bridge.submit(job), bridge.submit(latch.plain, 1)
        latch.begun(2)
        assert isinstance(bridge.submit(echo_plain, 2).exception(LONG), BrokenThreadPool)
        latch.open()
        assert in_thread.result(LONG) == 1
        assert isinstance(on_loop.exception(LONG), BrokenThreadPool)


# --- the loop ---


@pytest.mark.may_leave("errors")
def test_when_the_loop_is_stopped_under_it_every_future_ends(latch: Latch) -> None:
    """What waits fails by BrokenExecutor and never begins, what runs is cancelled, and a shutdown works."""
    begun: list[int] = []

    async def stop() -> None:
        await latch.coroutine()
        asyncio.get_running_loop().stop()
        await asyncio.sleep(HOUR)

    async def job(number: int) -> None:
        begun.append(number)
        await asyncio.sleep(HOUR)

    bridge = BridgeExecutor(1, limit=2)
    bridge.submit(stop)
    futures = [bridge.submit(job, number) for number in range(4)]
    blocked = Latch()
    in_thread = bridge.submit(blocked.plain, 1)
    waiting = bridge.submit(echo_plain, 2)
    latch.begun()
    blocked.begun()
    bridge.statistics()
    start = time.monotonic()
    latch.open()
    assert not wait([*futures, waiting], 3 * LONG).not_done
    assert time.monotonic() - start < LONG / 4
    with pytest.raises(CancelledError):
        futures[0].result()
    for future in (*futures[1:], waiting):
        with pytest.raises(BrokenExecutor, match="the event loop of penstock-bridge-.* ended"):
            future.result()
    assert begun == [0]
    for fn in (echo, echo_plain):
        with pytest.raises(BrokenExecutor):
            bridge.submit(fn, 1)
    with pytest.raises(BrokenThreadPool):
        bridge.statistics()
    blocked.open()
    assert in_thread.result(LONG) == 1
    bridge.shutdown()


@pytest.mark.may_leave("errors")
def test_what_a_broken_loop_cancels_starts_nothing_else(latch: Latch) -> None:
    """The slot that a job gives back as it is cancelled goes to nobody."""

    async def stop() -> None:
        await latch.coroutine()
        asyncio.get_running_loop().stop()
        await asyncio.sleep(HOUR)

    begun: list[int] = []

    async def job() -> None:
        begun.append(1)

    bridge = BridgeExecutor(limit=1)
    bridge.submit(stop)
    waiting = [bridge.submit(job) for _ in range(3)]
    latch.open()
    assert not wait(waiting, 3 * LONG).not_done
    assert all(isinstance(future.exception(), BrokenExecutor) for future in waiting)
    assert begun == []
    bridge.shutdown()


def test_a_loop_that_cannot_be_made_is_told_to_who_submits() -> None:
    """The factory's own error, each time; it can be shut down."""

    def factory() -> asyncio.AbstractEventLoop:
        raise ZeroDivisionError("no loop")

    bridge = BridgeExecutor(loop_factory=factory)
    for fn in (echo, echo_plain):
        with pytest.raises(ZeroDivisionError, match="no loop"):
            bridge.submit(fn, 1)
    assert " new " in repr(bridge)
    bridge.shutdown()


class SlowFactory:
    """Makes a loop when it is let, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()
        self._error = error

    def __call__(self) -> asyncio.AbstractEventLoop:
        self.asked.set()
        assert self.go_on.wait(LONG)
        if self._error is not None:
            raise self._error
        return asyncio.new_event_loop()


@pytest.mark.parametrize("error", [None, ZeroDivisionError("no loop")], ids=["made", "fails"])
def test_a_shutdown_may_come_while_the_loop_is_made(error: Exception | None) -> None:
    """Who submits is refused, or told the error; no thread is left."""
    factory = SlowFactory(error)
    bridge = BridgeExecutor(loop_factory=factory)
    told: Future[Any] = Future()

    def submit() -> None:
        try:
            told.set_result(bridge.submit(echo, 1).exception(LONG))
        except Exception as raised:  # noqa: BLE001  # told to the test
            told.set_exception(raised)

    submitting = threading.Thread(target=submit)
    submitting.start()
    assert factory.asked.wait(LONG)
    ending = threading.Thread(target=bridge.shutdown)
    ending.start()
    until(lambda: bridge._bridged._refusal is not None)
    factory.go_on.set()
    ending.join(LONG)
    submitting.join(LONG)
    assert type(told.exception(LONG)) is (ClosedError if error is None else ZeroDivisionError)
    assert workers_of(bridge) == ()
    with pytest.raises(ClosedError):
        bridge.submit(echo, 1)


def test_all_who_wait_for_a_loop_that_cannot_be_made_are_told() -> None:
    """And the next one tries again."""
    factory = SlowFactory(ZeroDivisionError("no loop"))
    bridge = BridgeExecutor(loop_factory=factory)
    barrier = threading.Barrier(4)

    def submit(fn: Callable[..., Any]) -> BaseException | None:
        barrier.wait(LONG)
        with pytest.raises(ZeroDivisionError) as raised:
            bridge.submit(fn, 1)
        return raised.value

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(submit, fn) for fn in (echo, echo_plain, echo, echo_plain)]
        assert factory.asked.wait(LONG)
        factory.go_on.set()
        assert all(type(future.result(LONG)) is ZeroDivisionError for future in futures)
    with pytest.raises(ZeroDivisionError):
        bridge.submit(echo, 1)


def test_a_loop_factory_that_submits_is_told_that_there_is_no_loop_yet() -> None:
    """Instead of a wait for itself."""

    def factory() -> asyncio.AbstractEventLoop:
        bridge.submit(echo, 1)
        raise AssertionError

    bridge = BridgeExecutor(loop_factory=factory)
    with pytest.raises(WrongThread, match="on its own thread before its loop ran"):
        bridge.submit(echo, 1)


def test_a_loop_that_cannot_be_closed_breaks_the_executor() -> None:
    """It is over nevertheless: what was submitted is done, and the error is told to who comes later."""

    class Loop(asyncio.SelectorEventLoop):
        def close(self) -> None:
            super().close()
            raise ZeroDivisionError("cannot close")

    with BridgeExecutor(loop_factory=Loop) as bridge:
        future = bridge.submit(echo_plain, 1)
    assert future.result(0) == 1
    assert "broken" in repr(bridge)
    with pytest.raises(BrokenExecutor, match="cannot close"):
        bridge.submit(echo, 1)
    del bridge
    gc.collect()


@pytest.mark.parametrize("posted", [False, True], ids=["before", "after"])
def test_an_interrupt_while_a_job_is_submitted_leaves_nothing_that_runs(
    bridge: BridgeExecutor, monkeypatch: pytest.MonkeyPatch, posted: bool
) -> None:
    """Nobody has its future: it is cancelled, whether the loop has been told of it or not."""
    called: list[int] = []

    async def job() -> None:
        called.append(1)

    bridge.submit(echo, 1).result(LONG)
    post = bridge._bridged._post

    def interrupted(callback: Callable[[], object]) -> bool:
        monkeypatch.undo()
        if posted:
            bridge._bridged.call(post, (callback,), {})
        raise KeyboardInterrupt

    monkeypatch.setattr(bridge._bridged, "_post", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bridge.submit(job)
    assert bridge.submit(echo, 1).result(LONG) == 1
    bridge.shutdown()
    assert called in ([], [1][:posted])


def test_the_loop_may_be_any() -> None:
    """Such as uvloop's."""
    uvloop = pytest.importorskip("uvloop")

    async def loop() -> asyncio.AbstractEventLoop:
        await penstock.to_thread(echo_plain, 1)
        return asyncio.get_running_loop()

    with BridgeExecutor(loop_factory=uvloop.new_event_loop) as bridge:
        assert type(bridge.submit(loop).result(LONG)) is uvloop.Loop
        assert bridge.submit(echo_plain, 1).result(LONG) == 1


def test_the_policys_loop_of_the_program_is_left_alone(bridge: BridgeExecutor) -> None:
    """The loop is that of its thread."""

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    own = bridge.submit(loop).result(LONG)

    async def main() -> bool:
        return asyncio.get_running_loop() is not own and await asyncio.wrap_future(bridge.submit(loop)) is own

    assert asyncio.run(main())


# --- how many threads ---


def test_exactly_max_workers_are_at_work_at_once() -> None:
    """Never more, and not fewer while there is enough to do."""
    workers, lock = 4, threading.Lock()
    barrier = threading.Barrier(workers)
    inside = most = 0

    def together() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        barrier.wait(LONG)
        with lock:
            inside -= 1

    with BridgeExecutor(workers) as bridge:
        for future in [bridge.submit(together) for _ in range(50 * workers)]:
            future.result(LONG)
        assert most == workers
        assert len(workers_of(bridge)) == workers


def test_without_max_workers_there_are_as_many_threads_as_are_needed() -> None:
    """Calls that block bring further threads, which end when they are idle."""
    barrier = threading.Barrier(6)
    with BridgeExecutor() as bridge:
        bridge._bridged.workers._idle_timeout = BLINK
        wait([bridge.submit(barrier.wait, LONG) for _ in range(6)], LONG)
        assert not barrier.broken
        until(lambda: workers_of(bridge) == ())
        assert bridge.submit(echo_plain, 1).result(LONG) == 1


def test_max_workers_bounds_submit_and_to_thread_together(latch: Latch) -> None:
    """It is the same lane."""
    with BridgeExecutor(2) as bridge:
        futures = [bridge.submit(latch.plain), bridge.submit(partial(penstock.to_thread), latch.plain)]
        latch.begun(2)
        futures.append(bridge.submit(latch.plain))
        threads = bridge.statistics().threads
        assert threads is not None
        assert (threads.busy, threads.waiting, threads.limit) == (2, 1, 2)
        latch.open()
        assert not wait(futures, LONG).not_done


# --- what it tells of itself ---


def test_statistics_tell_of_jobs_and_threads(latch: Latch) -> None:
    """In any thread but the loop's own."""
    with BridgeExecutor(1, limit=3) as bridge:
        assert bridge.statistics().jobs == 0
        futures = [bridge.submit(latch.coroutine), bridge.submit(latch.plain)]
        latch.begun(2)
        bridge.submit(fail, ZeroDivisionError()).exception(LONG)
        statistics = bridge.statistics()
        assert (statistics.limit, statistics.jobs, statistics.done) == (3, 1, 0)
        assert statistics.failed == {FailureKind.BUG: 1}
        assert statistics.threads is not None
        assert statistics.threads.busy == 1
        assert bridge.submit(bridge.with_options(key="k").submit, echo, 1).cancel() is not None

        async def job() -> None:
            bridge.statistics()

        with pytest.raises(WrongThread):
            bridge.submit(job).result(LONG)
        latch.open()
        assert not wait(futures, LONG).not_done


def test_its_repr_tells_its_state(latch: Latch) -> None:
    """And how many threads it has."""
    bridge = BridgeExecutor(1, "mine")
    assert repr(bridge) == "<BridgeExecutor mine new threads=0>"
    future = bridge.submit(latch.plain)
    latch.begun()
    assert repr(bridge) == "<BridgeExecutor mine open threads=1>"
    bridge.shutdown(wait=False)
    assert repr(bridge) == "<BridgeExecutor mine shut down threads=1>"
    latch.open()
    future.result(LONG)
    bridge.shutdown()
    assert repr(bridge) == "<BridgeExecutor mine shut down threads=0>"
    assert repr(BridgeExecutor()).startswith("<BridgeExecutor penstock-bridge-")


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": 1.5}, TypeError, "max_workers=1.5: expected a whole number"),
        ({"max_workers": True}, TypeError, "max_workers=True"),
        ({"max_workers": "4"}, TypeError, "max_workers='4'"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
        ({"limit": 0}, UsageError, "limit=0"),
        ({"loop_factory": 3}, UsageError, "loop_factory=3"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    """When it is made, by the standard library's classes where it has the argument, too."""
    with pytest.raises(error, match=told):
        BridgeExecutor(**arguments)


# --- exit and fork ---


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> at_exit._Process:
    """A process of the test's own, which can end or fork while the real one goes on."""
    process = at_exit._Process()
    monkeypatch.setattr(at_exit, "_process", process)
    return process


def test_the_interpreters_exit_waits_for_what_was_submitted(process: at_exit._Process, latch: Latch) -> None:
    """Of all that live; nothing more is taken by then, nor by what is made later."""
    bridge, unused = BridgeExecutor(), BridgeExecutor()
    futures = [bridge.submit(latch.coroutine, 1), bridge.submit(latch.plain, 1)]
    latch.begun(2)
    exit_ = threading.Thread(target=process.end)
    exit_.start()
    until(lambda: bridge._bridged._refusal is not None)
    assert exit_.is_alive()
    latch.open()
    exit_.join(LONG)
    assert [future.result(0) for future in futures] == [1, 1]
    for closed in (bridge, unused, BridgeExecutor()):
        with pytest.raises(RuntimeError, match="after interpreter shutdown"):
            closed.submit(echo, 1)


def test_in_the_child_of_a_fork_one_that_was_in_use_cannot_be_used(process: at_exit._Process, latch: Latch) -> None:
    """Its threads are not there: ClosedError says what to do. The parent's goes on."""
    bridge, unused = BridgeExecutor(), BridgeExecutor(1)
    future = bridge.submit(latch.coroutine, 1)
    process.begin_anew()
    with pytest.raises(ClosedError, match=r"Make a new BridgeExecutor\(\) in the child"):
        bridge.submit(echo, 1)
    with pytest.raises(ClosedError):
        bridge.statistics()
    bridge.shutdown()
    bridge.shutdown(cancel_futures=True)
    assert "forked" in repr(bridge)
    assert unused.submit(echo_plain, 1).result(LONG) == 1
    process.end()
    assert unused._bridged.state == "shut down"
    assert not future.done(), "nothing of this waits for threads that are not there"
    _as_in_the_parent(bridge)
    latch.open()
    assert future.result(LONG) == 1


def _as_in_the_parent(bridge: BridgeExecutor) -> None:
    """End the threads of one that believes that it has none."""
    bridge._bridged._post(bridge._bridged._draining.set)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # it is what is tested
def test_a_real_child_can_use_a_new_one(latch: Latch) -> None:
    """And one that was not in use when it forked; the one in use says so, and its block can be left."""
    unused = BridgeExecutor(1)
    with BridgeExecutor(1) as bridge:
        blocking = bridge.submit(latch.plain, 1)
        latch.begun()
        child = os.fork()
        if child == 0:  # pragma: no cover  # coverage is not measured there
            status = 1
            with suppress(BaseException):
                status = _in_the_child(bridge, unused)
            os._exit(status)
        deadline = time.monotonic() + LONG
        ended, status = 0, -1
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if not ended:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 42
        latch.open()
        assert blocking.result(LONG) == 1


def _in_the_child(used: BridgeExecutor, unused: BridgeExecutor) -> int:  # pragma: no cover  # as above
    try:
        used.submit(echo, 1)
    except ClosedError:
        used.shutdown()
        used.shutdown(cancel_futures=True)
        with BridgeExecutor(1) as fresh:
            if fresh.submit(echo_plain, 20).result(LONG) + unused.submit(add, 20, right=2).result(LONG) == 42:
                return 42
    return 2


def test_a_process_that_only_imports_the_program_gets_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of the main module is asked for, as by an executor."""
    seen: list[str] = []
    bridge_module = sys.modules[BridgeExecutor.__module__]
    monkeypatch.setattr(bridge_module, "refuse_a_child_that_imports", seen.append)
    BridgeExecutor()
    assert seen == ["A BridgeExecutor"]


def test_functools_wraps_and_unbound_methods_keep_their_kind(bridge: BridgeExecutor) -> None:
    """A wrapper that is plain runs in a thread and must return a value; one that is async is a job."""

    @functools.wraps(add)
    async def wrapped(*args: int) -> int:
        return 1 + await add(*args)

    assert bridge.submit(wrapped, 1, 2).result(LONG) == 4


@asynccontextmanager
async def _opens_a_number() -> AsyncIterator[int]:
    yield 5


def test_open_takes_any_async_context_manager(bridge: BridgeExecutor) -> None:
    """What has nothing async about it comes as it is."""
    with bridge.open(_opens_a_number()) as number:
        assert number == 5


@BOTH_FAIL
def test_what_a_map_leaves_behind_is_not_logged(
    bridge: BridgeExecutor, fn: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The first error is raised; nobody could ask for the others, whether they have come by then or not."""
    values = bridge.map(fn, [ValueError(str(number)) for number in range(20)])
    bridge.submit(echo, 1).result(LONG)
    with pytest.raises(ValueError, match="0"):
        next(values)
    del values
    bridge.shutdown()
    gc.collect()
    assert not caplog.records


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_jobs_that_end_in_the_call_that_starts_them_start_the_next_ones() -> None:
    """Under an eager task factory, any number of them, on a stack that does not grow."""

    def eager() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        return loop

    with BridgeExecutor(limit=1, loop_factory=eager) as bridge:
        assert list(bridge.map(echo, range(3_000))) == list(range(3_000))
