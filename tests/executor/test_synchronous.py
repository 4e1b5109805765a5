"""The synchronous view: async objects, used from threads without a loop of their own."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import inspect
import io
import pickle
import signal
import threading
import typing
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, assert_type, cast

import pytest
from aiohttp import web

import penstock
from penstock import (
    BlockingClient,
    ClosedError,
    DeadlockError,
    Executor,
    Gate,
    HttpClient,
    HttpStatusError,
    Pool,
    UsageError,
    WrongThread,
)
from penstock.clients.response import Response
from penstock.executor.synchronous import (
    Call,
    IterableView,
    Opened,
    PlainIterator,
    Synchronous,
    SyncHttpClient,
    SyncStreamedResponse,
    opened,
    view_of,
)

LONG = 10.0
"""Seconds that nothing takes on a machine that works."""


PATIENCE = 1.0
"""Seconds in which what nobody waits for has to end: it needs some turns of the loop."""
LARGE_BYTES = 4_000_000
"""More than a connection takes at once, so that it is not read to its end unless somebody reads."""


class LoopThread:
    """A loop with an open executor, in a thread of its own."""

    def __init__(self) -> None:
        self._ready: Future[None] = Future()
        self.left: set[asyncio.Task[Any]] = set()
        self.thread = threading.Thread(target=asyncio.run, args=(self._main(),))
        self.thread.start()
        self._ready.result(LONG)

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        async with Executor() as self.executor:
            self._ready.set_result(None)
            await self._leave.wait()
        end = self.loop.time() + self._patience
        while (left := asyncio.all_tasks() - {asyncio.current_task()}) and self.loop.time() < end:
            await asyncio.sleep(0)
        self.left = left

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        return self.executor.from_thread(fn, *args, **kwargs)

    def end(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self._leave.set)
            self.thread.join()


@pytest.fixture
def bridge() -> Iterator[LoopThread]:
    """A loop thread that is left with no task on it."""
    loop_thread = LoopThread()
    yield loop_thread
    loop_thread.end()
    assert loop_thread.left == set()


@pytest.fixture
def call(bridge: LoopThread) -> Call:
    return bridge.call


async def _answer(request: web.BaseRequest) -> web.Response:
    if request.path == "/missing":
        raise web.HTTPNotFound
    if request.path == "/large":
        return web.Response(body=bytes(LARGE_BYTES))
    return web.json_response({"path": request.path, "method": request.method, "body": await request.text()})


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """A real server on loopback: its address."""
    server = web.Server(_answer)
    runner = web.ServerRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def url(call: Call) -> Iterator[str]:
    with opened(serving(), call) as address:
        yield address


who = contextvars.ContextVar("who", default="nobody")


class Counter:
    """Something with async and plain methods, which notes the thread of each."""

    step = 1
    Error = KeyError

    def __init__(self) -> None:
        self.count = 0
        self.threads: list[threading.Thread] = []
        self.closed = False
        self._secret = 7

    def __repr__(self) -> str:
        return f"<Counter at {self.count}>"

    async def add(self, amount: int = 1, *, twice: bool = False) -> int:
        """Add."""
        await asyncio.sleep(0)
        return self.plain_add(amount * (1 + twice))

    def plain_add(self, amount: int) -> int:
        self.threads.append(threading.current_thread())
        self.count += amount * self.step
        return self.count

    def itself(self) -> Self:
        return self

    async def fail(self) -> None:
        raise self.Error("no")

    async def asker(self) -> str:
        return who.get()

    @property
    def doubled(self) -> int:
        self.threads.append(threading.current_thread())
        return 2 * self.count

    async def numbers(self, end: int) -> AsyncIterator[int]:
        try:
            for number in range(end):
                await asyncio.sleep(0)
                yield number
        finally:
            await asyncio.sleep(0)
            self.closed = True


# --- the view ---


def test_an_async_method_blocks_and_gives_its_value(bridge: LoopThread) -> None:
    """It runs on the loop's thread, with the arguments that were given."""
    counter = Counter()
    view = view_of(counter, bridge.call)
    assert view.add(3) == 3
    assert view.add(2, twice=True) == 7
    assert counter.threads == [bridge.thread] * 2


def test_a_plain_method_runs_on_the_loop_as_well(bridge: LoopThread) -> None:
    """It may touch what belongs to the loop."""
    counter = Counter()
    assert view_of(counter, bridge.call).plain_add(3) == 3
    assert counter.threads == [bridge.thread]


def test_what_is_no_function_is_read_as_it_is_in_the_calling_thread(call: Call) -> None:
    """So is a class, which can be named in `except`."""
    counter = Counter()
    view = view_of(counter, call)
    assert view.doubled == 0
    assert counter.threads == [threading.current_thread()]
    with pytest.raises(view.Error):
        view.fail()


def test_what_is_set_is_set_on_the_loop(bridge: LoopThread) -> None:
    """A setter may touch what belongs to the loop; the view itself has nothing to set."""
    threads: list[threading.Thread] = []

    class Noting(Counter):
        def __setattr__(self, name: str, value: Any) -> None:
            threads.append(threading.current_thread())
            super().__setattr__(name, value)

    counter = Noting()
    del threads[:]
    view_of(counter, bridge.call).step = 5
    assert counter.step == 5
    assert threads == [bridge.thread]


def test_private_names_are_not_shown(call: Call) -> None:
    """Neither for reading nor for writing; and what is missing is missing as usual."""
    counter = Counter()
    view = view_of(counter, call)
    with pytest.raises(AttributeError, match="_secret"):
        _ = view._secret
    with pytest.raises(AttributeError, match="_secret"):
        view._secret = 8
    with pytest.raises(AttributeError, match="'Counter' object has no attribute 'missing'"):
        _ = view.missing
    assert counter._secret == 7


def test_a_view_says_what_it_views(call: Call) -> None:
    """In its repr, its `dir` and the names and texts of its methods."""
    view = view_of(Counter(), call)
    assert repr(view) == "<synchronous view of <Counter at 0>>"
    assert {"add", "plain_add", "count", "doubled"} <= set(dir(view))
    assert not any(name.startswith("_") for name in dir(view))
    assert (view.add.__name__, view.add.__doc__) == ("add", "Add.")
    assert str(inspect.signature(view.add)) == "(amount: int = 1, *, twice: bool = False) -> int"
    assert not inspect.iscoroutinefunction(view.add)


def test_a_method_that_returns_its_object_returns_the_view(call: Call) -> None:
    """So that calls can be chained."""
    view = view_of(Counter(), call)
    assert view.itself() is view
    assert view_of(view, call) is view


def test_errors_come_through_with_their_type(call: Call) -> None:
    """The object itself, with what it says."""
    with pytest.raises(KeyError, match="no"):
        view_of(Counter(), call).fail()


def test_context_variables_go_along(call: Call) -> None:
    """Those of the calling thread, as they are at the call."""
    view = view_of(Counter(), call)
    assert view.asker() == "nobody"
    token = who.set("me")
    assert view.asker() == "me"
    who.reset(token)


def test_a_view_is_used_by_several_threads_at_once(call: Call) -> None:
    """Each of them waits for its own calls."""
    all_there = asyncio.Event()

    class Meeting:
        waiting = 0

        async def meet(self, guests: int, name: int) -> int:
            self.waiting += 1
            if self.waiting == guests:
                all_there.set()
            await all_there.wait()
            return name

    view = view_of(Meeting(), call)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(partial(view.meet, 8), range(8))) == list(range(8))


async def test_a_thread_with_a_loop_of_its_own_may_use_a_view() -> None:
    """It blocks that loop, as any synchronous code does. It is for `call` to refuse the loop's own thread."""
    loop_thread = LoopThread()

    def call_of_any_thread(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as helper:
            return helper.submit(context.run, loop_thread.call, fn, args, kwargs).result()

    with opened(serving(), call_of_any_thread) as url:
        with opened(HttpClient(url), call_of_any_thread) as api:
            assert api.get_json("/x")["path"] == "/x"
        with pytest.raises(ClosedError):
            api.get_json("/x")
    loop_thread.end()
    assert loop_thread.left == set()


def test_the_loops_own_thread_is_refused(call: Call) -> None:
    """It would wait for itself; the error names what was called."""
    counter = Counter()
    view = view_of(counter, call)

    async def blocks_the_loop() -> None:
        view.add(1)

    async def opens_on_the_loop() -> None:
        with opened(serving(), call):
            raise AssertionError("it would wait for itself")

    with pytest.raises(WrongThread, match=r"await Counter.add\(...\)"):
        call(blocks_the_loop, (), {})
    with pytest.raises(WrongThread):
        call(opens_on_the_loop, (), {})
    assert counter.count == 0


def test_without_its_loop_a_view_raises_closed_error(bridge: LoopThread) -> None:
    """Its calls, its setters, and a block that is opened."""
    view = view_of(Counter(), bridge.call)
    bridge.end()
    with pytest.raises(ClosedError):
        view.add(1)
    with pytest.raises(ClosedError):
        view.step = 2
    with pytest.raises(ClosedError), opened(serving(), bridge.call):
        raise AssertionError("there is nothing to open it on")


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_neither_views_nor_blocks_nor_iterators_can_be_pickled(call: Call, copied: Callable[[Any], Any]) -> None:
    """The error says what to do instead."""
    view = view_of(Counter(), call)
    for found in (view, opened(serving(), call), view.numbers(3)):
        with pytest.raises(UsageError, match="belongs to an event loop of this process"):
            copied(found)


def test_only_what_has_async_parts_becomes_a_view(call: Call) -> None:
    """A value without them is the value itself; an async function becomes one that blocks."""

    class Wrapped:
        @asynccontextmanager
        async def block(self) -> AsyncIterator[None]:
            yield

    class Static:
        @staticmethod
        async def fetch() -> int:
            return 1

    class Child(Static): ...

    class Awaitable:
        def __await__(self) -> Iterator[Any]:
            raise AssertionError("nobody awaits it")

    class Private:
        async def _fetch(self) -> None:
            raise AssertionError("nobody calls it")

    async def fetch(number: int) -> int:
        return number

    value: Any
    for value in (Wrapped(), Static(), Child(), Awaitable(), Counter(), asyncio.Event()):
        assert type(view_of(value, call)) is Synchronous
    for value in (None, 1, "text", {}, Counter, Private(), io.BytesIO(), len):
        assert view_of(value, call) is value
    assert view_of(fetch, call)(3) == 3


# --- iterators ---


def test_an_async_iterator_becomes_a_plain_one(bridge: LoopThread) -> None:
    """Each step is a call; read to its end it stays there."""
    counter = Counter()
    numbers = view_of(counter, bridge.call).numbers(3)
    assert isinstance(numbers, PlainIterator)
    assert iter(numbers) is numbers
    assert "numbers" in repr(numbers)
    assert list(numbers) == [0, 1, 2]
    assert counter.closed
    assert list(numbers) == []
    numbers.close()


def test_closing_an_iterator_closes_the_async_one(call: Call) -> None:
    """It waits for that, and is then at its end."""
    counter = Counter()
    numbers = view_of(counter, call).numbers(3)
    assert next(numbers) == 0
    numbers.close()
    assert counter.closed
    assert list(numbers) == []
    numbers.close()


def test_an_iterator_that_was_never_begun_can_be_closed(call: Call) -> None:
    """It is at its end then, and nothing of it has run."""
    counter = Counter()
    numbers = view_of(counter, call).numbers(3)
    numbers.close()
    assert list(numbers) == []
    assert not counter.closed


class Steps:
    """An async iterator that is no generator: nobody else closes it."""

    def __init__(self) -> None:
        self.number = 0
        self.closed: Future[None] = Future()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        self.number += 1
        return self.number

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.closed.set_result(None)


class Source:
    """Makes such iterators."""

    def __init__(self) -> None:
        self.made: list[Steps] = []

    def __aiter__(self) -> Steps:
        self.made.append(Steps())
        return self.made[-1]

    def steps(self) -> Steps:
        return Steps()


def test_a_dropped_iterator_closes_the_async_one(call: Call) -> None:
    """Nobody waits for that: it happens soon. What never began needs no closing."""
    source = Source()
    view = view_of(source, call)
    assert isinstance(view, IterableView)
    for number in view:
        assert number == 1
        break
    source.made[0].closed.result(LONG)
    del number
    iter(view)
    assert len(source.made) == 1


def test_an_iterator_that_a_call_gave_is_closed_and_one_that_is_viewed_is_not(call: Call) -> None:
    """Whoever opened that one closes it; it can be read on."""
    steps = cast("PlainIterator", view_of(Source(), call).steps())
    assert next(steps) == 1
    steps.close()
    assert list(steps) == []
    mine = Steps()
    view = view_of(mine, call)
    for number in view:
        assert number == 1
        break
    assert next(iter(view)) == 2
    closed = iter(view)
    assert next(closed) == 3
    closed.close()
    assert not mine.closed.done()


def test_closing_closes_the_iterator_that_was_made_for_it(call: Call) -> None:
    """Of what is viewed and makes a new one each time."""
    source = Source()
    plain = iter(view_of(source, call))
    assert next(plain) == 1
    plain.close()
    assert source.made[0].closed.done()


def test_what_has_nothing_to_close_is_just_left(call: Call) -> None:
    """An async iterator need not have `aclose`."""

    class Bare:
        def __aiter__(self) -> Self:
            return self

        async def __anext__(self) -> int:
            return 1

    class Maker:
        async def bare(self) -> Bare:
            return Bare()

    ones = view_of(Maker(), call).bare()
    assert isinstance(ones, PlainIterator)
    assert next(ones) == 1
    ones.close()
    assert list(ones) == []


def test_an_error_of_a_step_comes_through(call: Call) -> None:
    """As with any generator, which is at its end then."""

    class Broken:
        async def numbers(self) -> AsyncIterator[int]:
            yield 1
            raise LookupError("no more")

    numbers = view_of(Broken(), call).numbers()
    assert next(numbers) == 1
    with pytest.raises(LookupError, match="no more"):
        next(numbers)
    assert list(numbers) == []


def test_several_threads_read_one_iterator(call: Call) -> None:
    """Each piece goes to one of them, and all of them see the end."""
    numbers = view_of(Counter(), call).numbers(100)
    with ThreadPoolExecutor(4) as threads:
        parts: list[list[int]] = list(threads.map(list, [numbers] * 4))
    assert sorted(number for part in parts for number in part) == list(range(100))


def test_an_iterator_that_outlives_its_loop_is_dropped_in_silence(bridge: LoopThread) -> None:
    """The loop has closed its generators."""
    counter = Counter()
    numbers = view_of(counter, bridge.call).numbers(3)
    assert next(numbers) == 0
    bridge.end()
    assert counter.closed
    del numbers


def test_two_who_close_an_iterator_close_it_once(call: Call) -> None:
    """The second one finds it closed, and so does who waited for a piece."""
    closings: list[int] = []

    class Slow(Steps):
        async def aclose(self) -> None:
            await asyncio.sleep(0)
            closings.append(1)

    class Maker:
        async def slow(self) -> Slow:
            return Slow()

    slow = view_of(Maker(), call).slow()

    async def at_once() -> None:
        await asyncio.gather(slow._pieces.close(), slow._pieces.close(), slow._pieces.next())

    assert next(slow) == 1
    call(at_once, (), {})
    assert closings == [1]
    assert list(slow) == []


# --- blocks ---


class Block:
    """A block that notes what happens to it, and requires one task."""

    def __init__(self, swallows: bool = False) -> None:
        self.said: list[Any] = []
        self.over: Future[None] = Future()
        self.swallows = swallows

    async def __aenter__(self) -> Self:
        await asyncio.sleep(0)
        self.task = asyncio.current_task()
        self.said.append("entered")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        await asyncio.sleep(0)
        assert asyncio.current_task() is self.task
        assert kind is (None if error is None else type(error))
        assert traceback is (None if error is None else error.__traceback__)
        self.said.append(repr(error))
        self.over.set_result(None)
        return self.swallows

    async def say(self, what: str) -> None:
        self.said.append(what)


def test_a_block_is_entered_and_left_in_one_task(call: Call) -> None:
    """Cancel scopes require it. Inside, its value is a view."""
    block = Block()
    with opened(block, call) as view:
        assert type(view) is Synchronous
        view.say("inside")
    assert block.said == ["entered", "inside", "None"]


def test_a_time_out_may_surround_a_block(call: Call) -> None:
    """It cancels the task that holds the block open; the error is raised where the block is left."""

    @asynccontextmanager
    async def in_time() -> AsyncIterator[asyncio.Timeout]:
        async with asyncio.timeout(None) as scope:
            yield scope

    with pytest.raises(TimeoutError), opened(in_time(), call) as scope:
        scope.reschedule(0.0)
        while not scope.expired():
            call(asyncio.sleep, (0,), {})


def test_an_exception_of_the_block_is_passed_on(call: Call) -> None:
    """It comes out as it was, if nobody swallows it."""
    block = Block()
    with pytest.raises(LookupError, match="mine") as raised, opened(block, call):
        raise LookupError("mine")
    assert block.said == ["entered", repr(raised.value)]


def test_a_block_may_swallow_its_exception(call: Call) -> None:
    """As under `async with`."""
    with opened(contextlib.AsyncExitStack(), call):
        pass
    with opened(Block(swallows=True), call):
        raise LookupError("mine")


@pytest.mark.parametrize("error", [StopIteration(), StopAsyncIteration(), KeyboardInterrupt(), SystemExit(3)])
def test_any_exception_goes_through_a_block(call: Call, error: BaseException) -> None:
    """Also through one that raises what it is given, and through a generator's."""

    @asynccontextmanager
    async def generated() -> AsyncIterator[None]:
        yield

    class Raising(Block):
        async def __aexit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> bool:
            assert error is not None
            raise error

    for block in (generated(), Block(), *(() if isinstance(error, StopIteration) else (Raising(),))):
        with pytest.raises(type(error)) as raised, opened(block, call):
            raise error
        assert raised.value is error


def test_an_error_of_opening_is_raised_where_it_is_opened(call: Call) -> None:
    """The block does not run."""

    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        await asyncio.sleep(0)
        raise LookupError("cannot open")
        yield

    with pytest.raises(LookupError, match="cannot open"), opened(broken(), call):
        raise AssertionError("it is not open")


def test_an_error_of_closing_is_raised_where_the_block_is_left(call: Call) -> None:
    """With the block's own error as its context."""

    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise LookupError("cannot close")

    with pytest.raises(LookupError, match="cannot close") as raised, opened(broken(), call):
        raise ValueError("mine")
    assert isinstance(raised.value.__context__, ValueError)
    with pytest.raises(LookupError, match="cannot close"), opened(broken(), call):
        pass


class Ending:
    """Raises what would end a loop: when it opens, or when it closes."""

    def __init__(self, when: str, error: BaseException) -> None:
        self.when = when
        self.error = error

    async def __aenter__(self) -> None:
        if self.when == "opening":
            raise self.error

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.when == "closing":
            raise self.error


@pytest.mark.parametrize("when", ["opening", "closing"])
def test_no_block_ends_the_loop(call: Call, when: str) -> None:
    """What would becomes an error, and what else is open stays open."""
    with opened(Block(), call) as other:
        for error in (SystemExit(3), KeyboardInterrupt()):
            with pytest.raises(UsageError, match=type(error).__name__) as raised, opened(Ending(when, error), call):
                pass
            assert raised.value.__cause__ is error
        with pytest.raises(CancelledError), opened(Ending(when, asyncio.CancelledError()), call):
            pass
        other.say("still there")


def test_a_block_can_be_used_again_if_its_object_can(call: Call) -> None:
    """But not while it is in use, and not left before it is entered."""
    block = Block()
    again = opened(block, call)
    assert "not open" in repr(again)
    with again:
        assert "<open" in repr(again)
        with pytest.raises(UsageError, match="has been entered before"):
            again.__enter__()
    block.over = Future()
    with again:
        pass
    with pytest.raises(UsageError, match="has not been entered"):
        again.__exit__(None, None, None)


def test_what_is_open_already_says_so(call: Call) -> None:
    """Its own error, with its own words; a view and a block are for synchronous code already."""
    client = HttpClient("http://127.0.0.1:1")
    with opened(client, call) as api:
        with pytest.raises(UsageError, match="has been opened before"), opened(client, call):
            raise AssertionError("it is open")
        with pytest.raises(UsageError, match="Use it as it is"):
            opened(api, call)
    with pytest.raises(UsageError, match="Write `with` around it"):
        opened(cast("Any", opened(Block(), call)), call)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (HttpClient, r"the class HttpClient, expected one of its objects: `HttpClient\(...\)`"),
        (serving, r"the function serving, expected what `async with` opens.*call it: `serving\(...\)`"),
        (io.BytesIO(), r"which a plain `with` opens, without the bridge"),
        (3, r"found 3, expected what `async with` opens"),
        (Counter, r"Counter.*expected what `async with` opens"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_right_call(call: Call, found: Any, message: str) -> None:
    """Before anything is opened."""
    with pytest.raises(UsageError, match=message) as raised:
        opened(found, call)
    assert "Write `with bridge.open(HttpClient(url)) as api:`" in str(raised.value)


def test_a_coroutine_object_is_refused_and_closed(call: Call) -> None:
    """Python does not complain that nobody awaited it; the error says how to."""

    async def connect() -> None:
        raise AssertionError("nobody awaits it")

    with pytest.raises(UsageError, match=r"`bridge.submit\(connect, ...\).result\(\)`"):
        opened(cast("Any", connect()), call)
    gc.collect()


def test_a_block_that_was_not_opened_says_that_it_is_to_be(call: Call) -> None:
    """Its methods are those of what it opens."""
    with pytest.raises(AttributeError, match=r"Open it: `with ... as it: it.say`"):
        _ = cast("Any", opened(Block(), call)).say


def test_a_call_that_gives_a_block_gives_a_plain_one(call: Call) -> None:
    """Also where the block could be awaited: somebody has to let go of what it opens."""

    class Lent(Block):
        def __await__(self) -> Iterator[Any]:
            raise AssertionError("it is to be entered")

    class Maker:
        def lend(self) -> Lent:
            return Lent()

        async def make(self) -> Block:
            return Block()

        async def several(self) -> AsyncIterator[Block]:
            yield Block()

    maker = view_of(Maker(), call)
    for block in (maker.lend(), maker.make(), *maker.several()):
        assert isinstance(block, Opened)
        with block as view:
            view.say("inside")


def test_context_variables_go_into_a_block_and_come_out(call: Call) -> None:
    """What entering sets is set in the block and for its calls, and is as before afterwards."""
    seen: list[str] = []

    @asynccontextmanager
    async def as_somebody() -> AsyncIterator[None]:
        seen.append(who.get())
        token = who.set("somebody")
        yield
        seen.append(who.get())
        who.reset(token)

    token = who.set("me")
    with opened(as_somebody(), call):
        assert who.get() == "somebody"
        assert view_of(Counter(), call).asker() == "somebody"
    assert who.get() == "me"
    who.reset(token)
    assert seen == ["me", "somebody"]


def test_a_block_can_be_left_in_another_thread_than_entered(call: Call) -> None:
    """An `ExitStack` may be closed anywhere; that thread's context variables are left alone."""

    @asynccontextmanager
    async def as_somebody() -> AsyncIterator[None]:
        who.set("somebody")
        yield

    stack = ExitStack()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(stack.enter_context, opened(as_somebody(), call)).result()
    stack.close()
    assert who.get() == "nobody"


# --- interrupted, dropped, and at the end of the loop ---


def interrupt_main_thread() -> None:
    identity = threading.main_thread().ident
    assert identity is not None
    signal.pthread_kill(identity, signal.SIGINT)


class Interrupted(Block):
    """Interrupts the main thread when it opens, or when it closes, and takes its time to clean up."""

    def __init__(self, when: Literal["opening", "closing"]) -> None:
        super().__init__()
        self.when = when
        self.go_on = asyncio.Event()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        if self.when == "opening":
            interrupt_main_thread()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.said.append("cancelled")
                await self.go_on.wait()
                self.said.append("cleaned up")
                self.over.set_result(None)
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self.when == "closing":
            interrupt_main_thread()
            await self.go_on.wait()
        return await super().__aexit__(kind, error, traceback)


def test_ctrl_c_while_it_opens_cancels_the_opening(call: Call) -> None:
    """Once: what it does to clean up is not cut off. The thread does not wait for that."""
    block = Interrupted("opening")
    with pytest.raises(KeyboardInterrupt), opened(block, call):
        raise AssertionError("it is not open")
    while "cancelled" not in block.said:
        call(asyncio.sleep, (0,), {})
    call(block.go_on.set, (), {})
    block.over.result(LONG)
    assert block.said == ["entered", "cancelled", "cleaned up"]


def test_ctrl_c_when_it_is_just_open_closes_it(bridge: LoopThread) -> None:
    """The thread may be interrupted between the opening and its block."""

    def interrupted(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        bridge.call(fn, args, kwargs)
        raise KeyboardInterrupt

    block = Block()
    with pytest.raises(KeyboardInterrupt), opened(block, interrupted):
        raise AssertionError("nobody is there to use it")
    block.over.result(LONG)
    assert block.said == ["entered", "CancelledError()"]


def test_what_was_given_up_before_it_began_is_never_opened(bridge: LoopThread) -> None:
    """The interrupted thread's wish may arrive before the opening itself."""
    begun: list[Callable[..., Any]] = []

    def interrupted(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        begun.append(fn)
        raise KeyboardInterrupt

    block = Block()
    with pytest.raises(KeyboardInterrupt), opened(block, interrupted):
        raise AssertionError("it is not open")
    with pytest.raises(CancelledError):
        bridge.call(begun[0], (), {})
    assert block.said == []


def test_ctrl_c_while_it_closes_lets_it_close(call: Call) -> None:
    """The thread goes on; the closing is not cut off."""
    block = Interrupted("closing")
    with pytest.raises(KeyboardInterrupt), opened(block, call):
        pass
    call(block.go_on.set, (), {})
    block.over.result(LONG)
    assert block.said == ["entered", "None"]


def test_ctrl_c_before_the_loop_knows_that_a_block_is_left_closes_it(bridge: LoopThread) -> None:
    """With the exception with which the block was left."""
    block = Block()
    calls: list[object] = []

    def interrupted(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        calls.append(fn)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bridge.call(fn, args, kwargs)

    with pytest.raises(KeyboardInterrupt), opened(block, interrupted):
        raise LookupError("mine")
    block.over.result(LONG)
    assert block.said == ["entered", "LookupError('mine')"]


def test_a_dropped_block_is_closed_with_a_warning(call: Call) -> None:
    """Nobody can leave it any more."""
    block = Block()
    handle = opened(block, call)
    handle.__enter__()
    with pytest.warns(ResourceWarning, match="opened and never closed"):
        del handle
        gc.collect()
    block.over.result(LONG)
    assert block.said == ["entered", "CancelledError()"]


def test_a_closing_that_nobody_waits_for_is_kept_until_its_end(call: Call) -> None:
    """A loop knows its tasks by weak references alone."""
    waited_for: list[weakref.ref[asyncio.Event]] = []
    closed: Future[None] = Future()

    @asynccontextmanager
    async def patient() -> AsyncIterator[None]:
        try:
            yield
        finally:
            event = asyncio.Event()
            waited_for.append(weakref.ref(event))
            await event.wait()
            closed.set_result(None)

    handle = opened(patient(), call)
    handle.__enter__()
    with pytest.warns(ResourceWarning, match="opened and never closed"):
        del handle
        gc.collect()
    while not waited_for:
        call(asyncio.sleep, (0,), {})
    gc.collect()
    event = waited_for[0]()
    assert event is not None
    call(event.set, (), {})
    closed.result(LONG)


def test_what_is_open_at_the_end_of_the_loop_is_closed_with_it(bridge: LoopThread) -> None:
    """Leaving the block afterwards is no error, since what it is for has been done."""
    block = Block()
    with opened(block, bridge.call) as view:
        _end_with_open_tasks(bridge)
        with pytest.raises(ClosedError):
            view.say("too late")
    assert block.said == ["entered", "CancelledError()"]


def test_the_end_of_the_loop_does_not_hide_the_blocks_own_error(bridge: LoopThread) -> None:
    """Neither is it swallowed then, whoever swallowed the cancellation."""
    block = Block(swallows=True)
    with pytest.raises(LookupError, match="mine"), opened(block, bridge.call):
        _end_with_open_tasks(bridge)
        raise LookupError("mine")
    assert block.said == ["entered", "CancelledError()"]


@pytest.mark.may_leave("errors")  # `asyncio.run` logs what its tasks raise when it cancels them
def test_an_error_of_closing_at_the_end_of_the_loop_is_raised_where_the_block_is_left(bridge: LoopThread) -> None:
    """Somebody should know."""

    class Broken(Block):
        async def __aexit__(self, *_: object) -> bool:
            raise LookupError("cannot close")

    with pytest.raises(LookupError, match="cannot close"), opened(Broken(), bridge.call):
        _end_with_open_tasks(bridge)


def _end_with_open_tasks(bridge: LoopThread) -> None:
    """`asyncio.run` cancels what is left."""
    bridge.end(patience=0.0)
    assert len(bridge.left) == 1
    bridge.left.clear()


def test_an_opening_that_is_cancelled_on_the_loop_ends_the_wait(call: Call) -> None:
    """As the end of the loop does; the thread does not wait for ever."""

    class Never(Block):
        async def __aenter__(self) -> Self:
            await super().__aenter__()
            await asyncio.Event().wait()
            raise AssertionError("it waits for ever")

    never = Never()
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(opened(never, call).__enter__)
        while not never.said:
            call(asyncio.sleep, (0,), {})
        assert never.task is not None
        call(never.task.cancel, (), {})
        with pytest.raises(CancelledError):
            opening.result(LONG)


def test_a_closing_that_is_cancelled_on_the_loop_is_an_error(call: Call) -> None:
    """Nobody can say then that it has been closed."""

    class Never(Block):
        async def __aexit__(self, *_: object) -> bool:
            self.said.append("leaving")
            await asyncio.Event().wait()
            raise AssertionError("it waits for ever")

    never = Never()
    block = opened(never, call)
    block.__enter__()
    with ThreadPoolExecutor(1) as thread:
        closing = thread.submit(block.__exit__, None, None, None)
        while "leaving" not in never.said:
            call(asyncio.sleep, (0,), {})
        assert never.task is not None
        call(never.task.cancel, (), {})
        with pytest.raises(CancelledError):
            closing.result(LONG)


def test_a_group_that_fails_says_so_where_its_block_is_left(call: Call) -> None:
    """It cancels the task that holds it, whatever the thread does meanwhile."""

    async def fail() -> None:
        raise LookupError("mine")

    with pytest.raises(ExceptionGroup) as raised, opened(asyncio.TaskGroup(), call) as group:
        group.create_task(fail())
    assert [repr(error) for error in raised.value.exceptions] == ["LookupError('mine')"]


def test_an_error_keeps_nothing_alive(call: Call) -> None:
    """No cycle for the garbage collector: neither of an opening, nor of a closing, nor of a call."""

    class Failing(Block):
        def __init__(self, when: str) -> None:
            super().__init__()
            self.when = when

        async def __aenter__(self) -> Self:
            if self.when == "opening":
                raise LookupError(self.when)
            return self

        async def __aexit__(self, *_: object) -> bool:
            raise LookupError(self.when)

    gc.disable()
    try:
        for when in ("opening", "closing"):
            block = Failing(when)
            known = weakref.ref(block)
            with contextlib.suppress(LookupError), opened(block, call):
                pass
            del block
            call(asyncio.sleep, (0,), {})
            assert known() is None, when
    finally:
        gc.enable()


# --- penstock's own ---


def test_an_http_client_in_synchronous_code(call: Call, url: str) -> None:
    """Each verb, its errors, its settings and its statistics."""
    with opened(HttpClient(url, limit=4), call) as view:
        api = cast("SyncHttpClient", view)
        assert_type(api.get("/x"), Response)
        assert api.get_json("/x") == {"path": "/x", "method": "GET", "body": ""}
        assert api.post_json("/y", data="text")["body"] == "text"
        for verb in ("put", "delete", "patch", "options", "post", "get"):
            assert getattr(api, verb)("/z").json()["method"] == verb.upper()
        assert api.head("/z").body == b""
        assert api.request("GET", "/x", params={"id": "17"}).attempts == 1
        with pytest.raises(HttpStatusError) as raised:
            api.get("/missing")
        assert raised.value.status == 404
        api.limit = 20
        assert api.limit == 20
        assert [statistics.limit for statistics in api.statistics().values()] == [20]
        assert repr(api).startswith("<synchronous view of <HttpClient")
    with pytest.raises(ClosedError):
        api.get("/x")


def test_an_answer_is_streamed_in_synchronous_code(call: Call, url: str) -> None:
    """Piece by piece, in a block that holds the connection."""
    client = HttpClient(url)

    def in_use() -> int:  # private, and there is no public way to see a leak
        return len(client._session.connector._acquired)  # type: ignore[union-attr]

    with opened(client, call) as view:
        api = cast("SyncHttpClient", view)
        assert_type(api.stream("GET", "/"), AbstractContextManager[SyncStreamedResponse])
        with api.stream("GET", "/dump") as answer:
            assert (answer.status, answer.attempts) == (200, 1)
            assert answer.headers["Content-Type"].startswith("application/json")
            assert b'"/dump"' in b"".join(answer.iter_bytes())
        with pytest.raises(LookupError), api.stream("GET", "/large") as answer:
            assert call(in_use, (), {}) == 1
            for _ in answer.iter_bytes():
                raise LookupError("enough")
        assert call(in_use, (), {}) == 0
        with pytest.raises(HttpStatusError), api.stream("GET", "/missing"):
            raise AssertionError("there is nothing to read")


def test_a_blocking_client_in_synchronous_code(call: Call) -> None:
    """Its calls go through its gate, into its threads."""

    class Sdk:
        def whoami(self) -> threading.Thread:
            return threading.current_thread()

    with opened(BlockingClient(Sdk), call) as sdk:
        thread = sdk.call("whoami")
        assert thread.name.startswith("penstock")
        assert sdk.run(Sdk.whoami) is not threading.current_thread()


def test_a_pool_in_synchronous_code(call: Call) -> None:
    """What it lends is a view, if it has async parts; a second one for who holds the only one is refused at once."""

    class Connection:
        async def execute(self, text: str) -> str:
            return text.upper()

    async def connect() -> Connection:
        return Connection()

    with opened(Pool(connect, size=1), call) as pool:
        with pool.acquire() as connection:
            assert connection.execute("select") == "SELECT"
            assert pool.statistics().in_use == 1
            with pytest.raises(DeadlockError), pool.acquire():
                raise AssertionError("there is none")
        with pool.acquire() as connection:
            assert connection.execute("again") == "AGAIN"
        assert pool.statistics().made == 1


def test_a_permit_in_synchronous_code(call: Call) -> None:
    """It is held for the block, and its methods run on the loop, to which they belong."""
    gate = view_of(Gate("service", limit=2), call)
    with gate.permit() as permit:
        assert [statistics.in_flight for statistics in gate.statistics().values()] == [1]
        permit.ignore()
    assert [statistics.in_flight for statistics in gate.statistics().values()] == [0]
    assert gate.call(Counter().add, 3) == 3


def test_a_jobs_resources_in_synchronous_code(call: Call) -> None:
    """Opened, they give the job's function, which blocks."""

    @penstock.job
    async def doubling() -> AsyncIterator[Callable[..., Any]]:
        async def double(number: int) -> int:
            return 2 * number

        yield double

    with opened(doubling.open(), call) as double:
        assert double(4) == 8


# --- what a type checker is told ---

ASYNC_ONLY = {"aclose"}
"""Leaving the block does it."""


def _public(kind: type) -> dict[str, Any]:
    return {name: attribute for name, attribute in vars(kind).items() if not name.startswith("_")}


def test_the_typed_face_of_the_http_client_has_its_parameters() -> None:
    """Parameter by parameter, so that the two cannot drift apart."""
    async_face = {name: fn for name, fn in _public(HttpClient).items() if inspect.isfunction(fn)}
    face = _public(SyncHttpClient)
    assert set(face) == set(async_face) - ASYNC_ONLY
    for name, fn in face.items():
        mine, theirs = inspect.signature(fn), inspect.signature(async_face[name])
        assert list(mine.parameters.values()) == list(theirs.parameters.values()), name
        if name != "stream":
            assert mine.return_annotation == theirs.return_annotation, name


def test_the_typed_face_of_the_http_client_has_its_properties() -> None:
    """With their types; each can be set."""
    properties = {name: found for name, found in _public(HttpClient).items() if isinstance(found, property)}
    assert all(found.fset is not None for found in properties.values())
    assert typing.get_type_hints(SyncHttpClient) == {
        name: inspect.signature(cast("Callable[..., Any]", found.fget)).return_annotation
        for name, found in properties.items()
    }


def test_in_the_child_of_a_fork_a_block_of_the_parent_is_left_in_silence(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is open in the parent, and closed there; nothing is written to its loop. (A real child: test_bridge_exit.)"""
    resource = Block()
    handle = opened(resource, call)
    handle.__enter__()
    block = handle._block
    assert block is not None
    with monkeypatch.context() as patch:
        patch.setattr("penstock.executor.synchronous.os.getpid", lambda: -1)
        assert handle.__exit__(None, None, None) is None
    assert not block.over
    assert call(block.leave, (None,), {}) is False
