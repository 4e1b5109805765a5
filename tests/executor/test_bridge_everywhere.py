"""A bridge wherever Python runs: many threads, other event loops, handlers of a server, tests, synchronous clients."""

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, assert_type

import aiohttp
import pytest
from aiohttp import web

import penstock
from penstock import BridgeExecutor, HttpClient, HttpStatusError, UsageError
from penstock.executor.synchronous import SyncHttpClient

LONG = 10.0
"""Seconds that nothing takes on a machine that works."""
HOUR = 3600.0


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def double_plain(number: int) -> int:
    return 2 * number


@pytest.fixture(name="bridge")
def _bridge() -> Iterator[BridgeExecutor]:
    with BridgeExecutor() as bridge:
        yield bridge


# --- many threads ---


def test_any_number_of_threads_may_use_it_at_once(bridge: BridgeExecutor) -> None:
    """From the first call on, which all of them make at once: one loop, and every value to whom it belongs."""
    barrier = threading.Barrier(8)

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def use(first: int) -> asyncio.AbstractEventLoop:
        barrier.wait(LONG)
        futures = [bridge.submit(fn, first + n) for n in range(50) for fn in (double, double_plain)]
        assert [future.result(LONG) for future in futures] == [2 * (first + n) for n in range(50) for _ in "ab"]
        assert list(bridge.map(double, range(first, first + 20))) == [2 * n for n in range(first, first + 20)]
        return bridge.submit(loop).result(LONG)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(use, range(0, 8_000, 1_000)))) == 1


def test_threads_may_submit_while_it_is_shut_down() -> None:
    """Each submit is refused, or its future ends; none is lost in between."""
    futures: list[Future[int]] = []
    barrier = threading.Barrier(5)
    bridge = BridgeExecutor(2)
    bridge.submit(double, 1).result(LONG)

    def submit() -> None:
        barrier.wait(LONG)
        number = 0
        while True:
            number += 1
            try:
                for fn in (double, double_plain):
                    futures.append(bridge.submit(fn, number))
            except penstock.ClosedError:
                return

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    barrier.wait(LONG)
    concurrent.futures.wait([bridge.submit(double_plain, n) for n in range(10)], LONG)
    bridge.shutdown()
    for thread in threads:
        thread.join(LONG)
    assert not concurrent.futures.wait(futures, LONG).not_done
    assert all(future.exception() is None or type(future.exception()) is penstock.ClosedError for future in futures)


# --- other loops ---


async def test_on_another_loop_a_future_is_awaited_by_wrap_future(bridge: BridgeExecutor) -> None:
    """Of either kind; this is a test of pytest-asyncio, on a loop of its own."""
    mine = asyncio.get_running_loop()

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert await asyncio.wrap_future(bridge.submit(loop)) is not mine
    values = await asyncio.gather(
        *(asyncio.wrap_future(bridge.submit(fn, n)) for n in range(50) for fn in (double, double_plain))
    )
    assert values == [2 * n for n in range(50) for _ in "ab"]


async def test_it_is_an_executor_for_run_in_executor(bridge: BridgeExecutor) -> None:
    """Of another loop."""
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(bridge, double_plain, 4) == 8
    assert isinstance(await loop.run_in_executor(bridge, threading.current_thread), threading.Thread)
    with pytest.raises(ZeroDivisionError):
        await loop.run_in_executor(bridge, divmod, 1, 0)
    with pytest.raises(UsageError, match="StopIteration"):
        await loop.run_in_executor(bridge, next, iter(()))


@pytest.mark.parametrize("how", ["wrap_future", "run_in_executor"])
async def test_cancelling_who_awaits_cancels_the_coroutine(bridge: BridgeExecutor, how: str) -> None:
    """On whichever loop it is awaited."""
    begun, ended = asyncio.Event(), asyncio.Event()
    mine = asyncio.get_running_loop()

    async def job() -> None:
        mine.call_soon_threadsafe(begun.set)
        try:
            await asyncio.sleep(HOUR)
        except asyncio.CancelledError:
            mine.call_soon_threadsafe(ended.set)
            raise

    async def who_awaits() -> None:
        if how == "wrap_future":
            await asyncio.wrap_future(bridge.submit(job))
        else:
            await mine.run_in_executor(bridge.with_options(key="k"), job)  # type: ignore[unused-coroutine]  # of its value

    task = asyncio.create_task(who_awaits())
    async with asyncio.timeout(LONG):
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended.wait()


async def test_an_async_executor_and_a_bridge_get_along(bridge: BridgeExecutor) -> None:
    """A job of one awaits a job of the other; each has the identity that its own executor gave it."""

    async def inner() -> str:
        return await penstock.to_thread(threading.current_thread().name.upper)

    async def outer() -> str:
        return await asyncio.wrap_future(bridge.submit(inner))

    async with penstock.Executor() as executor:
        assert (await executor.submit(outer)).endswith("-LOOP")

        def plain() -> int:
            return bridge.submit(double_plain, 21).result(LONG)

        assert await executor.submit(plain) == 42


# --- a server ---


@asynccontextmanager
async def served(handler: Callable[[web.BaseRequest], Any]) -> AsyncIterator[str]:
    """A real server on loopback: its address."""
    runner = web.ServerRunner(web.Server(handler, handler_cancellation=True))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def test_a_handler_of_a_server_may_use_it(bridge: BridgeExecutor) -> None:
    """By `wrap_future` and by `run_in_executor`, many requests at once."""

    async def handler(request: web.BaseRequest) -> web.Response:
        number = int(request.query["n"])
        loop = asyncio.get_running_loop()
        value = await asyncio.wrap_future(bridge.submit(double, number))
        return web.json_response(await loop.run_in_executor(bridge, double_plain, value))

    async with served(handler) as url, aiohttp.ClientSession() as session:

        async def ask(number: int) -> Any:
            async with session.get(url, params={"n": number}) as response:
                return await response.json()

        assert await asyncio.gather(*map(ask, range(40))) == [4 * n for n in range(40)]


async def test_a_client_that_hangs_up_cancels_the_coroutine_behind_its_handler(bridge: BridgeExecutor) -> None:
    """The handler is cancelled by the server, and the coroutine with it."""
    mine = asyncio.get_running_loop()
    begun, ended = asyncio.Event(), asyncio.Event()

    async def job() -> None:
        mine.call_soon_threadsafe(begun.set)
        try:
            await asyncio.sleep(HOUR)
        finally:
            mine.call_soon_threadsafe(ended.set)

    async def handler(_request: web.BaseRequest) -> web.Response:
        await asyncio.wrap_future(bridge.submit(job))
        raise AssertionError

    async with served(handler) as url, aiohttp.ClientSession() as session, asyncio.timeout(LONG):
        asking = asyncio.create_task(session.get(url))
        await begun.wait()
        asking.cancel()
        await ended.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


# --- synchronous clients ---


class ServerThread:
    """A real server in a thread with a loop of its own."""

    def __init__(self) -> None:
        self._ready: Future[str] = Future()
        self._inside = 0
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(),))
        self._thread.start()
        self.url = self._ready.result(LONG)

    async def _main(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        self._all_inside = asyncio.Event()
        async with served(self._answer) as url:
            self._ready.set_result(url)
            await self._leave.wait()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.path == "/missing":
            raise web.HTTPNotFound
        if request.path == "/together":
            self._inside += 1
            if self._inside == 3:
                self._all_inside.set()
            await asyncio.wait_for(self._all_inside.wait(), LONG)
        return web.json_response({"path": request.path, "n": int(request.query.get("n", 0))})

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()


@pytest.fixture
def server() -> Iterator[str]:
    server = ServerThread()
    yield server.url
    server.end()


def test_synchronous_code_may_use_an_http_client(server: str) -> None:
    """`with bridge.open(...)`: opened, used and closed from the main thread; errors are the client's own."""
    with BridgeExecutor() as bridge:
        with bridge.open(HttpClient(server)) as api:
            assert_type(api, SyncHttpClient)
            assert api.get_json("/one", params={"n": 5}) == {"path": "/one", "n": 5}
            with pytest.raises(HttpStatusError, match="HTTP 404"):
                api.get_json("/missing")
        with bridge.open(HttpClient(server)) as api:
            assert api.get_json("/two")["path"] == "/two"


def test_plain_functions_may_use_it_in_one_thread(server: str) -> None:
    """The loop is another thread: a bridge of one worker cannot be full of those that wait for the network."""
    with BridgeExecutor(1) as bridge, bridge.open(HttpClient(server)) as api:

        def ask(number: int) -> int:
            return int(api.get_json("/", params={"n": number})["n"])

        def nested(number: int) -> int:
            return sum(bridge.submit(ask, number).result(LONG) for _ in "ab")

        assert list(bridge.map(ask, range(20))) == list(range(20))
        assert list(bridge.map(nested, range(5))) == [0, 2, 4, 6, 8]
        assert [future.result() for future in [bridge.submit(ask, 3)] if concurrent.futures.wait([future])] == [3]


def test_coroutines_use_the_client_itself(server: str) -> None:
    """The object that was opened, not the view: beside synchronous code, at once."""
    client = HttpClient(server)
    with BridgeExecutor(3) as bridge, bridge.open(client) as api:

        async def ask(path: str) -> Any:
            return (await client.get_json(path))["path"]

        def ask_plain(path: str) -> Any:
            return api.get_json(path)["path"]

        futures = [bridge.submit(fn, "/together") for fn in (ask, ask_plain)]
        assert api.get_json("/together")["path"] == "/together"
        assert [future.result(LONG) for future in futures] == ["/together"] * 2


def test_a_client_that_is_used_until_the_end_lets_the_block_be_left(server: str) -> None:
    """Futures that nobody has waited for use the client while the executor's block drains them: it is closed later."""
    futures: list[Future[Any]] = []
    with BridgeExecutor(2) as bridge, bridge.open(HttpClient(server)) as api:
        futures += [bridge.submit(api.get_json, "/", params={"n": n}) for n in range(4)]
        concurrent.futures.wait(futures, LONG)
    assert [future.result(0)["n"] for future in futures] == [0, 1, 2, 3]


# --- leaving a client's block ---


@asynccontextmanager
async def quiet() -> AsyncIterator[None]:
    """Something to open."""
    yield


def test_leaving_a_client_s_block_waits_for_what_was_submitted_in_it() -> None:
    """So results may be read after both blocks, as of any executor. Of coroutine functions and of plain ones."""
    left: list[bool] = []

    @asynccontextmanager
    async def noted() -> AsyncIterator[None]:
        yield
        left.append(all(future.done() for future in futures))

    with BridgeExecutor() as bridge, bridge.open(noted()):
        futures = [bridge.submit(fn, number) for number in range(20) for fn in (double, double_plain)]
        assert list(bridge.map(double, range(3))) == [0, 2, 4]
    assert left == [True]
    assert [future.result(LONG) for future in futures] == [2 * number for number in range(20) for _ in "ab"]


def test_leaving_it_does_not_wait_for_what_was_there_before() -> None:
    """Nor for what is submitted when it is left; each client waits for its own."""
    go = threading.Event()
    with BridgeExecutor() as bridge:
        before = bridge.submit(go.wait, LONG)
        with bridge.open(quiet()):
            pass
        assert not before.done()
        go.set()


def test_leaving_it_by_an_exception_closes_at_once() -> None:
    """What is in flight fails, and holds nothing up."""
    go = threading.Event()
    with BridgeExecutor() as bridge:
        with pytest.raises(ZeroDivisionError), bridge.open(quiet()):
            running = bridge.submit(go.wait, LONG)
            raise ZeroDivisionError
        assert not running.done()
        go.set()


def test_a_function_of_the_bridge_does_not_wait_for_itself_when_it_leaves_a_client_s_block() -> None:
    with BridgeExecutor(1) as bridge:

        def use() -> str:
            with bridge.open(quiet()):
                bridge.submit(int)
            return "left"

        assert bridge.submit(use).result(LONG) == "left"


# --- awaiting a future ---


async def test_a_future_can_be_awaited_on_any_loop() -> None:
    """Its value and its error; cancelling the wait cancels the coroutine."""
    cancelled = threading.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with BridgeExecutor() as bridge:
        assert await bridge.submit(pow, 2, 5) == 32  # type: ignore[misc]
        with pytest.raises(ValueError, match="no number"):
            await bridge.submit(int, "no number")  # type: ignore[misc]

        async def inner() -> int:
            return await bridge.submit(pow, 2, 6)  # type: ignore[misc,no-any-return]

        assert await bridge.submit(inner) == 64  # type: ignore[misc]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await bridge.submit(forever)  # type: ignore[misc]
        assert await asyncio.to_thread(cancelled.wait, LONG)


# --- messages ---


def test_a_view_is_told_that_its_bridge_has_been_shut_down() -> None:
    with BridgeExecutor() as bridge, bridge.open(HttpClient("http://127.0.0.1")) as api:
        bridge.shutdown()
        with pytest.raises(penstock.ClosedError, match="has been shut down"):
            api.get("/")


def test_an_initializer_that_would_not_run_is_refused() -> None:
    async def init() -> None: ...

    with pytest.raises(TypeError, match="expected a plain function"):
        BridgeExecutor(initializer=init)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        BridgeExecutor(initializer=3)  # type: ignore[arg-type]
