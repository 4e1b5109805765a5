"""A blocking SDK behind a gate: opened, called and closed in threads, and never more of them than its limit."""

import asyncio
import contextvars
import gc
import http.client
import http.server
import random
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import requests

import penstock
from penstock import (
    Adaptive,
    AttemptTimeout,
    BlockingClient,
    ClosedError,
    Executor,
    FailureKind,
    Rate,
    Retry,
    UsageError,
    WrongLoop,
    WrongThread,
)
from penstock.clients.blocking import LEAST_TO_OPEN
from penstock.gate.breaker import Breaker
from penstock.gate.limiter import LimitChange
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step, run_in_virtual_time
from penstock.threads.workers import SHARED, Worker

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

HOUR = 3600.0


class Sdk:
    """A blocking SDK that remembers what became of its clients."""

    made: list["Sdk"]

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.closed_in: list[threading.Thread] = []
        self.calls: list[Any] = []
        self.made.append(self)

    def echo(self, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return args, kwargs

    def where(self) -> threading.Thread:
        return threading.current_thread()

    def do(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Whatever a call may do."""
        self.calls.append(fn)
        return fn(*args)

    def fail(self, errors: list[BaseException]) -> str:
        self.calls.append("fail")
        if errors:
            raise errors.pop(0)
        return "done"

    def close(self) -> None:
        self.closed_in.append(threading.current_thread())


@pytest.fixture(autouse=True)
def made() -> list[Sdk]:
    """The clients that the test has made."""
    Sdk.made = []
    return Sdk.made


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


async def start(call: Callable[[], Awaitable[Any]]) -> "asyncio.Task[Any]":
    """A task whose call has its thread."""
    task = asyncio.ensure_future(call())
    await asyncio.sleep(0.001)
    return task


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "penstock.threads"]


def main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# --- opening ---


async def test_the_client_is_made_once_in_a_thread_and_closed_in_a_thread(made: list[Sdk]) -> None:
    """An SDK may read files and ask a metadata service when it is made: the loop does not wait for it."""
    async with BlockingClient(Sdk) as client:
        await asyncio.gather(*[client.call("echo") for _ in range(5)])
        (sdk,) = made
        assert isinstance(sdk.thread, Worker)
        assert sdk.closed_in == []
    (closed_in,) = sdk.closed_in
    assert isinstance(closed_in, Worker)


@pytest.mark.virtual_clock
async def test_the_loop_goes_on_while_the_factory_takes_its_time() -> None:
    with ThreadLatch(virtual_loop()) as latch:

        def slow() -> Sdk:
            latch.wait()
            return Sdk()

        opening = await start(BlockingClient(slow, timeout=None).__aenter__)
        await asyncio.sleep(60)
        assert not opening.done()
        latch.open()
        client = await opening
    assert await client.call("echo", 1) == ((1,), {})
    await client.__aexit__(None, None, None)


async def test_an_error_of_the_factory_comes_out_of_the_opening() -> None:
    """As it is, and nothing is closed that was not made. What would end the loop comes as an error."""

    def fail() -> Sdk:
        raise KeyError("no such profile")

    with pytest.raises(KeyError, match="no such profile"):
        await BlockingClient(fail).__aenter__()
    with pytest.raises(UsageError, match="raised SystemExit"):
        await BlockingClient(lambda: exit(3)).__aenter__()


async def test_a_client_cannot_be_opened_twice(made: list[Sdk]) -> None:
    """Neither while it is open nor afterwards."""
    client = BlockingClient(Sdk)
    async with client:
        with pytest.raises(UsageError, match=r"opened before\. Make a new BlockingClient for each `async with`"):
            await client.__aenter__()
    with pytest.raises(UsageError, match="opened before"):
        await client.__aenter__()
    assert len(made) == 1


@pytest.mark.virtual_clock
async def test_a_client_whose_opening_is_cancelled_is_closed_as_soon_as_it_is_made(made: list[Sdk]) -> None:
    """Nobody else knows that it exists."""
    with ThreadLatch(virtual_loop()) as latch:

        def slow() -> Sdk:
            latch.wait()
            return Sdk()

        await cancelled(await start(BlockingClient(slow).__aenter__))
        assert made == []
    await asyncio.sleep(0.001)
    assert len(made[0].closed_in) == 1


@pytest.mark.virtual_clock
@pytest.mark.parametrize(("timeout", "opening"), [(0.01, LEAST_TO_OPEN), (20.0, 20.0)])
async def test_the_timeout_covers_the_opening(timeout: float, opening: float, made: list[Sdk]) -> None:
    """But a short one for calls is none for making a client. The client that comes later is closed."""
    with ThreadLatch(virtual_loop()) as latch:

        def slow() -> Sdk:
            latch.wait()
            return Sdk()

        client = BlockingClient(slow, name="store", timeout=timeout)
        started = virtual_loop().time()
        with pytest.raises(
            AttemptTimeout, match=rf"^store: its factory .*slow has made no client within {opening:g} s "
        ):
            await client.__aenter__()
        assert (virtual_loop().time() - started, made) == (opening, [])
        with pytest.raises(ClosedError, match="is not open yet"):
            await client.call("echo")
    await asyncio.sleep(0.001)
    assert len(made[0].closed_in) == 1


async def test_a_time_out_of_the_factory_itself_comes_out_unchanged() -> None:
    def slow() -> Sdk:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="^mine$"):
        await BlockingClient(slow, timeout=HOUR).__aenter__()


@pytest.mark.virtual_clock
async def test_a_factory_that_fails_when_the_opening_has_been_cancelled_bothers_nobody(
    made: list[Sdk], caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to close and nobody to be told."""
    with ThreadLatch(virtual_loop()) as latch:

        def slow() -> Sdk:
            latch.wait()
            raise KeyError

        await cancelled(await start(BlockingClient(slow).__aenter__))
    await asyncio.sleep(0.001)
    assert (made, told(caplog)) == ([], [])


def test_a_factory_that_would_begin_after_the_closing_does_not_begin(made: list[Sdk]) -> None:
    """The opening had its thread when it was cancelled, but had not come to the factory yet."""
    clients = BlockingClient(Sdk)._clients
    clients.close()
    clients.open()
    assert made == []


async def test_a_factory_that_makes_nothing_to_close_is_fine() -> None:
    """A module is a client too, and `close` need not exist."""
    async with BlockingClient(lambda: math_module()) as client:
        assert await client.call("sqrt", 9) == 3


def math_module() -> Any:
    import math

    return math


class AsyncSdk:
    def __init__(self) -> None: ...

    async def get(self) -> None: ...


async def make_async() -> Sdk:
    return Sdk()


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (make_async, {}, r"BlockingClient\(make_async\): found an async factory.*An async client needs no thread"),
        (5, {}, r"found 5, expected a function\. Write `BlockingClient\(fn, \.\.\.\)`"),
        (Sdk, {"close": "close"}, r"close='close': expected a function"),
        (Sdk, {"classify": 4}, r"classify=4: expected a function"),
        (Sdk, {"classify": make_async}, r"classify=make_async: found an async function, expected a plain one"),
        (Sdk, {"close": make_async}, r"close=make_async: found an async function, expected a plain one"),
        (Sdk, {"per_thread": "yes"}, r"per_thread='yes': expected True or False"),
        (Sdk, {"name": 3}, r"name=3: expected a string"),
        (Sdk, {"limit": 0}, r"limit=0: expected a whole number"),
        (Sdk, {"limit": SHARED.most + 1}, r"limit=\d+: this process uses at most \d+ threads.*Write at most limit=\d+"),
        (Sdk, {"timeout": 0}, r"timeout=0: expected seconds above 0"),
        (Sdk, {"retry": 3}, r"retry=3: expected a policy"),
        (Sdk, {"key": "host"}, r"key='host': expected a function"),
    ],
)
def test_a_client_that_cannot_work_is_refused(factory: Any, options: dict[str, Any], message: str) -> None:
    """Before anything is opened, with what was found and what to write."""
    with pytest.raises(UsageError, match=message):
        BlockingClient(factory, **options)


async def test_where_memory_is_small_a_number_beyond_the_threads_that_there_are_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit that is measured stays below by itself."""
    monkeypatch.setattr(SHARED, "most", 16)
    async with BlockingClient(Sdk, limit=Adaptive(start=99)) as client:
        await client.call("echo")
        assert client.statistics()[None].limit == 16
    with pytest.raises(UsageError, match="limit=32: this process uses at most 16 threads"):
        BlockingClient(Sdk, limit=32)


async def test_it_tells_what_it_is() -> None:
    client = BlockingClient(Sdk, name="store", limit=4)
    shown = [repr(client)]
    async with client:
        shown.append(repr(client))
    shown.append(repr(client))
    assert shown == [f"<BlockingClient 'store' {state} limit=4>" for state in ("new", "open", "closed")]
    assert BlockingClient(Sdk).name == "Sdk"


# --- calling ---


async def test_call_and_run_hand_every_argument_through() -> None:
    """Whatever the SDK calls its own."""
    awkward = {"fn": 1, "self": 2, "name": 3, "method": 4, "key": 5, "client": 6}
    async with BlockingClient(Sdk) as client:
        assert await client.call("echo", 0, **awkward) == ((0,), awkward)

        def run(client: Sdk, /, *args: int, **kwargs: int) -> tuple[Any, ...]:
            return client.echo(*args, **kwargs)

        assert await client.run(run, 0, **awkward) == ((0,), awkward)


async def test_context_variables_go_into_the_thread() -> None:
    """So does the identity of the job; and its name is the thread's."""
    variable = contextvars.ContextVar("variable", default="none")

    def look(_client: Sdk) -> tuple[Any, ...]:
        return variable.get(), penstock.current_job(), threading.current_thread().name

    async def job(_item: int) -> tuple[Any, ...]:
        variable.set("the job's")
        return *await client.run(look), penstock.current_job()

    async with BlockingClient(Sdk, name="store") as client, Executor() as executor:
        ((value, seen, thread, running),) = await executor.map(job, [1])
    assert (value, seen) == ("the job's", running)
    assert thread.startswith("penstock-store_")
    assert thread.endswith(repr(running))


async def test_an_attribute_that_does_not_exist_is_the_callers_mistake() -> None:
    async with BlockingClient(Sdk) as client:
        with pytest.raises(AttributeError, match="no_such"):
            await client.call("no_such")
        (seen,) = client.statistics().values()
        assert seen.failed == {FailureKind.BUG: 1}


async def test_what_cannot_be_called_is_refused_with_the_right_call() -> None:
    async with BlockingClient(Sdk, name="store") as client:
        with pytest.raises(
            UsageError, match=r"store\.call\(.*expected the name of a method.*write `run\(fn, \.\.\.\)`"
        ):
            await client.call(Sdk.echo)  # type: ignore[arg-type]  # the mistake
        with pytest.raises(
            UsageError, match=r"store\.run\(make_async\): found an async function, expected a plain one"
        ):
            await client.run(make_async)  # type: ignore[arg-type, unused-coroutine]  # the mistake
        with pytest.raises(UsageError, match=r"found 'echo', expected a function\. Write `store\.run\(fn, \.\.\.\)`"):
            await client.run("echo")  # type: ignore[arg-type]  # the mistake
        assert client.statistics() == {}


async def test_a_client_that_turns_out_to_be_async_is_refused() -> None:
    """Its method returns a coroutine, which nobody would await."""
    async with BlockingClient(AsyncSdk, name="store") as client:
        with pytest.raises(UsageError, match=r"store\.get returned a coroutine .*get.* that nobody awaits"):
            await client.call("get")


async def test_an_error_of_the_sdk_is_raised_unchanged_with_its_attempts_as_a_note(made: list[Sdk]) -> None:
    """The same object, once the policy gives up."""
    last = ConnectionResetError("three")
    async with BlockingClient(Sdk, name="store", retry=Retry(attempts=3, wait=0)) as client:
        with pytest.raises(ConnectionResetError) as caught:
            await client.call("fail", [ConnectionError("one"), TimeoutError("two"), last])
    assert caught.value is last
    (note,) = caught.value.__notes__
    assert note.startswith("gate 'store' gave up: all 3 attempts used\n  attempt 1 took ")
    assert "ConnectionError: one" in note
    assert len(made[0].calls) == 3


async def test_what_may_work_the_next_time_is_called_again(made: list[Sdk]) -> None:
    async with BlockingClient(Sdk, retry=Retry(wait=0)) as client:
        assert await client.call("fail", [ConnectionRefusedError()]) == "done"
        with pytest.raises(ValueError):
            await client.call("fail", [ValueError("bad data")])
        (seen,) = client.statistics().values()
    assert made[0].calls == ["fail"] * 3
    assert (seen.attempts, seen.retries, seen.succeeded) == (3, 1, 1)
    assert seen.failed == {FailureKind.TRANSIENT: 1, FailureKind.PERMANENT: 1}


class Busy(Exception):
    """An error of an SDK, of which nobody knows anything."""


async def test_classify_says_what_the_sdks_errors_are(made: list[Sdk]) -> None:
    """Its answer decides, and stays with the error, for the outcome and the log; None leaves it to the library."""

    def kind_of(error: Exception) -> FailureKind | None:
        return FailureKind.THROTTLED if isinstance(error, Busy) else None

    async def job(errors: list[BaseException]) -> str:
        value: str = await client.call("fail", errors)
        return value

    items: list[list[BaseException]] = [[Busy()], [Busy(), Busy()], [ConnectionError()], [ValueError()]]
    async with BlockingClient(Sdk, classify=kind_of, retry=Retry(attempts=2, wait=0)) as client:
        async with Executor() as executor:
            outcomes = {}
            async for outcome in executor.as_completed(job, items, key=items.index):
                outcomes[outcome.key] = outcome
        (seen,) = client.statistics().values()
    assert [outcomes[number].value for number in (0, 2)] == ["done"] * 2
    assert [outcomes[number].kind for number in (1, 3)] == [FailureKind.THROTTLED, FailureKind.PERMANENT]
    assert penstock.classify(outcomes[1].error or ValueError()) is FailureKind.THROTTLED
    assert seen.failed == {FailureKind.THROTTLED: 3, FailureKind.TRANSIENT: 1, FailureKind.PERMANENT: 1}
    assert len(made[0].calls) == 7


async def never_awaited() -> None: ...


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda _: "flaky", "answered 'flaky'"),
        (lambda _: True, "answered True"),
        (lambda _: never_awaited(), "returned a coroutine"),
        (lambda error: error.code, "raised AttributeError"),
    ],
)
async def test_a_classify_that_is_wrong_does_not_hide_the_sdks_error(
    answer: Callable[[Exception], Any], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each error has a note of it; the log has one line, with the words that there are."""
    async with BlockingClient(Sdk, classify=answer, retry=Retry(attempts=3, wait=0)) as client:
        for _ in range(2):
            with pytest.raises(Busy) as caught:
                await client.call("fail", [Busy()])
            (note,) = [note for note in caught.value.__notes__ if "classify" in note]
            assert found in note
            assert penstock.classify(caught.value) is FailureKind.PERMANENT
    (line,) = told(caplog)
    assert "expected None or a FailureKind: throttled, transient, permanent, cancelled, bug" in line


async def test_classify_may_answer_by_the_word() -> None:
    async with BlockingClient(Sdk, classify=lambda _: "transient", retry=Retry(attempts=2, wait=0)) as client:
        assert await client.call("fail", [Busy()]) == "done"


@pytest.mark.parametrize("error", [StopIteration(1), SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_what_would_end_more_than_the_call_comes_back_as_an_error(error: BaseException) -> None:
    async with BlockingClient(Sdk, name="store") as client:
        with pytest.raises(UsageError, match=rf"store\.fail raised {type(error).__name__}") as caught:
            await client.call("fail", [error])
        assert caught.value.__cause__ is error
        assert await client.call("fail", []) == "done"


@pytest.mark.virtual_clock
async def test_each_key_has_its_own_limit() -> None:
    """The function is given what `call` and `run` were given."""

    def by_bucket(_what: object, bucket: str, *_args: object) -> str:
        return bucket

    def hang(_client: Sdk, _bucket: str) -> None:
        latch.wait()

    with ThreadLatch(virtual_loop()) as latch:
        async with BlockingClient(Sdk, limit=1, key=by_bucket) as client:
            hanging = await start(lambda: client.run(hang, "a"))
            waiting = await start(lambda: client.call("echo", "a"))
            assert await client.call("echo", "b") == (("b",), {})
            assert not waiting.done()
            seen = client.statistics()
            assert (seen["a"].in_flight, seen["a"].waiting, seen["b"].succeeded) == (1, 1, 1)
            latch.open()
            await asyncio.gather(hanging, waiting)


@pytest.mark.virtual_clock
async def test_never_more_calls_in_the_sdk_than_the_limit() -> None:
    """Also with callers that give up; what still runs is to be seen, with its name and age."""
    inside = threading.Semaphore(3)

    def hang(_client: Sdk) -> None:
        assert inside.acquire(blocking=False)
        latch.wait()
        inside.release()

    retry = Retry(attempts=2, wait=1, timeout=30)
    with ThreadLatch(virtual_loop()) as latch:
        async with BlockingClient(Sdk, name="store", limit=3, timeout=2, retry=retry) as client:
            errors = await asyncio.gather(*[client.run(hang) for _ in range(20)], return_exceptions=True)
            assert {type(error) for error in errors} == {AttemptTimeout}
            assert any("all 3 threads of 'store' are held by calls that nobody waits for" in str(e) for e in errors)
            (seen,) = client.statistics().values()
            assert (seen.in_flight, seen.waiting) == (3, 0)
            name = f"store: {hang.__qualname__}"
            assert [(call.name, call.job, call.age) for call in seen.abandoned_calls] == [(name, None, 30.0)] * 3
            latch.open()
            await asyncio.gather(*[client.call("echo") for _ in range(3)])


@pytest.mark.virtual_clock
@pytest.mark.parametrize("per_thread", [False, True])
async def test_a_nested_call_goes_on_at_any_depth(per_thread: bool, made: list[Sdk]) -> None:
    """Thread -> loop -> same client, through a limit of one, with attempts that fail on the way."""
    failing = {3, 8, 15, 20}

    def step(_client: Sdk, depth: int) -> int:
        below = executor.from_thread(go_down, depth + 1) if depth < 20 else 0
        if depth in failing:
            failing.remove(depth)
            raise ConnectionError
        return below + 1

    async def go_down(depth: int) -> int:
        return await client.run(step, depth)

    async with BlockingClient(Sdk, limit=1, per_thread=per_thread, retry=Retry(attempts=2, wait=1)) as client:
        async with Executor() as executor:
            assert await executor.submit(go_down, 0) == 21
        (seen,) = client.statistics().values()
    assert (seen.in_flight, seen.waiting, seen.retries) == (0, 0, 4)
    assert [sdk.closed_in for sdk in made] == ([[sdk.thread] for sdk in made] if per_thread else [made[0].closed_in])


def test_a_cancelled_call_leaves_nothing_behind_at_any_step() -> None:
    """Opening, contention, a nested call, failures, closing: permits and threads are back, and the client is closed."""

    class Run:
        client: BlockingClient[Sdk]
        made: list[Sdk]

        def __init__(self) -> None:
            Sdk.made = self.made = []

    async def scenario(run: Run) -> None:
        def nest(_client: Sdk) -> None:
            executor.from_thread(run.client.call, "echo")

        run.client = BlockingClient(Sdk, limit=1, retry=Retry(attempts=2, wait=1))
        async with run.client, Executor() as executor, asyncio.TaskGroup() as group:
            group.create_task(run.client.run(nest))
            group.create_task(run.client.call("fail", [ConnectionError()]))
            group.create_task(run.client.call("echo"))

    def check(run: Run) -> None:
        if hasattr(run, "client"):
            for seen in run.client.statistics().values():
                assert (seen.in_flight, seen.waiting, seen.abandoned_calls) == (0, 0, ())
        for sdk in run.made:
            assert len(sdk.closed_in) == 1 or run.client._crossing is not None
        assert SHARED._promised == 0

    assert cancel_at_every_step(scenario, arrange=Run, check=check) >= 5


# --- limit, rates and breaker ---


class Dial:
    """A rule and its limiter: a number that the test sets, and what it was told."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.baseline: float | None = None
        self.queue = 0.0
        self.most: int | None = None
        self.samples: list[float | None] = []

    def limiter(self, _now: float, most: int | None, _rng: random.Random) -> "Dial":
        self.most = most
        return self

    def started(self, _now: float) -> int:
        return 1

    def ended(self, _mark: int, _now: float, rtt: float | None, _dropped: bool) -> LimitChange | None:
        self.samples.append(rtt)
        return None

    def contaminate(self) -> None:
        """Nothing is measured."""

    def half_open(self, _now: float) -> None:
        """It stays."""

    def recovered(self, _now: float) -> None:
        """It stays."""

    def cap(self, _most: int | None, _now: float) -> None:
        """It stays."""


@pytest.mark.virtual_clock
async def test_calls_start_at_the_rate_by_their_weight() -> None:
    """Of several rates; what they have not used comes back."""
    rates = {"requests": Rate(10, burst=3), "bytes": Rate(100, burst=100)}
    began = virtual_loop().time()
    async with BlockingClient(
        Sdk,
        limit=4,
        rate=rates,
        weight=lambda _method, size=0: {"bytes": size},
        used=lambda value: {"bytes": value[0][0] / 2} if value[0] else None,
    ) as client:
        assert client.rate == rates
        await asyncio.gather(*[client.call("echo") for _ in range(13)])
        assert virtual_loop().time() - began == pytest.approx(1)
        (seen,) = client.statistics().values()
        assert seen.tokens["requests"] == pytest.approx(0, abs=0.001)
        await client.call("echo", 100)
        (seen,) = client.statistics().values()
        assert seen.tokens["bytes"] == pytest.approx(50)
        with pytest.raises(UsageError, match="weight="):
            await client.call("echo", -1)
        with pytest.raises(UsageError, match="weight="):
            await client.call("echo", 101)


@pytest.mark.virtual_clock
async def test_limit_rate_and_breaker_can_be_changed_while_calls_wait() -> None:
    """More threads than there are is refused, and the limit stays."""
    with ThreadLatch(virtual_loop()) as latch:
        breaker = Breaker(calls=5)
        async with BlockingClient(Sdk, limit=1, breaker=breaker) as client:
            tasks = [await start(lambda: client.call("do", latch.wait)) for _ in range(8)]
            assert (client.limit, client.breaker, client.rate) == (1, breaker, None)
            await asyncio.sleep(0.001)
            assert latch.held == 1
            with pytest.raises(UsageError, match=rf"limit={SHARED.most + 1}: this process uses at most"):
                client.limit = SHARED.most + 1
            assert client.limit == 1
            client.limit = 3
            await asyncio.sleep(0.001)
            assert latch.held == 3
            client.limit = Dial(5)
            await asyncio.sleep(0.001)
            assert latch.held == 5
            client.rate = Rate(1, per=60, burst=1)
            client.breaker = None
            assert (client.breaker, client.statistics()[None].breaker) == (None, None)
            client.limit = 8
            await asyncio.sleep(0.001)
            assert (latch.held, client.statistics()[None].waits_for) == (6, "rate")
            client.rate = None
            await asyncio.sleep(0.001)
            assert latch.held == 8
            latch.open()
            await asyncio.gather(*tasks)


@pytest.mark.virtual_clock
async def test_a_limit_that_is_measured_keeps_to_the_threads_and_hears_how_long_they_took() -> None:
    """Not of failures: nobody knows what a library does before it raises."""
    dial = Dial(2)
    loop = virtual_loop()
    async with BlockingClient(Sdk, limit=dial, retry=Retry(attempts=1)) as client:
        with ThreadLatch(loop) as latch:
            loop.call_later(3, latch.open)
            await client.call("do", latch.wait)
        with pytest.raises(ValueError):
            await client.call("fail", [ValueError()])
    assert dial.most == SHARED.most
    sample, failed = dial.samples
    assert sample is not None
    assert 0 <= sample < BOUND
    assert failed is None


@pytest.mark.virtual_clock
async def test_a_service_that_fails_is_left_alone_for_a_while() -> None:
    """By what `classify` says of the SDK's errors."""

    class Down(Exception):
        pass

    errors: list[BaseException] = [Down() for _ in range(3)]
    async with BlockingClient(
        Sdk,
        limit=4,
        classify=lambda error: FailureKind.TRANSIENT if isinstance(error, Down) else None,
        breaker=Breaker(calls=4, pause=10, probes=1),
        retry=Retry(attempts=1),
    ) as client:
        assert await client.call("fail", []) == "done"  # it is worth waiting for
        for _ in range(3):
            with pytest.raises(Down):
                await client.call("fail", errors)
        assert client.statistics()[None].breaker == "open"
        started = virtual_loop().time()
        assert await client.call("fail", errors) == "done"
        assert 8 <= virtual_loop().time() - started <= 12
        assert client.statistics()[None].breaker == "closed"


# --- a client for each thread ---


async def meet(client: BlockingClient[Sdk], threads: int) -> None:
    """As many threads are in the SDK at once."""
    barrier = threading.Barrier(threads, timeout=BOUND)
    await asyncio.gather(*[client.call("do", barrier.wait) for _ in range(threads)])


async def test_per_thread_makes_one_client_for_each_thread_one_after_the_other(made: list[Sdk]) -> None:
    """Each call finds the client of its own thread; each client is closed in its thread."""
    making = threading.Semaphore(1)

    def make() -> Sdk:
        assert making.acquire(blocking=False), "never two at the same time"
        try:
            return Sdk()
        finally:
            making.release()

    async with BlockingClient(make, per_thread=True, limit=8) as client:
        assert made == [], "the first call makes the first one"
        await meet(client, 8)
        await meet(client, 8)
        assert len(made) == 8
        assert await client.run(lambda sdk: sdk.thread is threading.current_thread())
    assert [sdk.closed_in for sdk in made] == [[sdk.thread] for sdk in made]
    assert len({sdk.thread for sdk in made}) == 8


async def test_an_idle_thread_closes_its_client_and_ends(made: list[Sdk]) -> None:
    """The next call makes another one."""
    async with BlockingClient(Sdk, per_thread=True) as client:
        client._clients.workers._idle_timeout = 0.01
        await client.call("echo")
        thread = made[0].thread
        await asyncio.to_thread(thread.join, BOUND)
        assert made[0].closed_in == [thread]
        await client.call("echo")
        assert len(made) == 2
    assert made[1].closed_in == [made[1].thread]


async def test_an_error_of_the_factory_in_a_thread_is_the_calls(made: list[Sdk]) -> None:
    """It is retried as any other, and the thread tries again."""
    errors = [ConnectionError("metadata service"), KeyError("profile")]

    def make() -> Sdk:
        if errors:
            raise errors.pop(0)
        return Sdk()

    async with BlockingClient(make, per_thread=True, retry=Retry(wait=0)) as client:
        with pytest.raises(KeyError, match="profile"):
            await client.call("echo")
        assert await client.call("echo", 1) == ((1,), {})
    assert len(made) == 1


async def test_a_thread_whose_factory_has_failed_has_nothing_to_close(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Sdk:
        raise KeyError

    async with BlockingClient(fail, per_thread=True) as client:
        with pytest.raises(KeyError):
            await client.call("echo")
    assert told(caplog) == []


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)], ids=repr)
async def test_a_client_that_cannot_be_closed_keeps_no_other_from_it(
    error: BaseException, made: list[Sdk], caplog: pytest.LogCaptureFixture
) -> None:
    """It is told, with the traceback; its thread ends all the same."""

    def close(sdk: Sdk) -> None:
        sdk.close()
        if sdk is made[0]:
            raise error

    async with BlockingClient(Sdk, per_thread=True, close=close) as client:
        await meet(client, 3)
    assert [sdk.closed_in for sdk in made] == [[sdk.thread] for sdk in made]
    assert told(caplog) == ["a client of Sdk could not be closed"]
    assert caplog.records[-1].exc_info is not None
    assert not any(sdk.thread.is_alive() for sdk in made)


# --- closing ---


async def test_close_is_called_instead_of_the_clients_own(made: list[Sdk]) -> None:
    closed: list[Sdk] = []
    async with BlockingClient(Sdk, close=closed.append):
        pass
    assert closed == made
    assert made[0].closed_in == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
async def test_an_error_in_closing_is_logged_and_hides_nothing(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a result that is there already nor the error for which the block is left."""

    def close(_client: Sdk) -> None:
        raise error

    with pytest.raises(LookupError, match="the block's own"):
        async with BlockingClient(Sdk, name="store", close=close):
            raise LookupError("the block's own")
    assert told(caplog) == ["'store' could not be closed"]
    assert caplog.records[-1].exc_info is not None


@pytest.mark.virtual_clock
@pytest.mark.parametrize("per_thread", [False, True])
async def test_a_close_that_hangs_is_not_waited_for(
    per_thread: bool, made: list[Sdk], caplog: pytest.LogCaptureFixture
) -> None:
    """Five seconds, and it goes on in its thread."""

    def close(sdk: Sdk) -> None:
        latch.wait()
        sdk.close()

    client = BlockingClient(Sdk, name="store", per_thread=per_thread, close=close)
    with ThreadLatch(virtual_loop()) as latch:
        async with client:
            await client.call("echo")
            left = virtual_loop().time()
        assert virtual_loop().time() - left == 5
        assert told(caplog) == ["closing 'store' takes longer than 5 s; it goes on in its thread"]
        assert made[0].closed_in == []
    await asyncio.sleep(0.001)
    assert len(made[0].closed_in) == 1


@pytest.mark.virtual_clock
async def test_leaving_that_is_cancelled_closes_the_client_all_the_same(made: list[Sdk]) -> None:
    """While a call that somebody waits for ends, and while the client is being closed."""
    with ThreadLatch(virtual_loop()) as latch:

        def close(sdk: Sdk) -> None:
            latch.wait()
            sdk.close()

        client = BlockingClient(Sdk, close=close)
        await client.__aenter__()
        await cancelled(await start(lambda: client.__aexit__(None, None, None)))
    await asyncio.sleep(0.001)
    assert len(made[0].closed_in) == 1


@pytest.mark.virtual_clock
async def test_calls_that_somebody_waits_for_are_finished_first(made: list[Sdk]) -> None:
    """And those that wait for a permit are refused, before they meet a client that is closed."""
    with ThreadLatch(virtual_loop()) as latch:
        async with BlockingClient(Sdk, name="store", limit=1) as client:
            busy = await start(lambda: client.call("do", latch.wait))
            waiting = await start(lambda: client.call("echo"))
            asyncio.get_running_loop().call_later(3, latch.open)
            left = virtual_loop().time()
        assert virtual_loop().time() - left == 3
    assert busy.done()
    with pytest.raises(ClosedError, match="the client has been closed before this call had its turn"):
        await waiting
    assert len(made[0].closed_in) == 1


@pytest.mark.virtual_clock
async def test_a_client_is_not_closed_under_calls_that_take_too_long(
    made: list[Sdk], caplog: pytest.LogCaptureFixture
) -> None:
    """Their callers still wait, and get what they wait for."""
    with ThreadLatch(virtual_loop()) as latch:
        async with BlockingClient(Sdk, name="store") as client:
            busy = [await start(lambda: client.call("do", latch.wait)) for _ in range(2)]
        assert told(caplog) == ["'store' is left open: 2 of its calls take longer than 5 s"]
    assert await asyncio.gather(*busy) == [None, None]
    assert made[0].closed_in == []


@pytest.mark.virtual_clock
@pytest.mark.parametrize("per_thread", [False, True])
async def test_a_client_is_not_closed_under_an_abandoned_call(
    per_thread: bool, made: list[Sdk], caplog: pytest.LogCaptureFixture
) -> None:
    """The call is named, and leaving does not wait for it; a client for each thread is closed when it ends."""
    with ThreadLatch(virtual_loop()) as latch:
        async with BlockingClient(Sdk, name="store", per_thread=per_thread) as client:
            await cancelled(await start(lambda: client.call("do", latch.wait)))
            await asyncio.sleep(2)
            left = virtual_loop().time()
        assert virtual_loop().time() == left
        assert told(caplog)[-1] == "'store' is left open: calls that nobody waits for still use it: store.do (2.0 s)"
        assert made[0].closed_in == []
    if per_thread:
        await asyncio.to_thread(made[0].thread.join, BOUND)
    await asyncio.sleep(0.001)
    assert made[0].closed_in == ([made[0].thread] if per_thread else [])


# --- whose it is ---


async def test_a_client_that_is_not_open_is_refused() -> None:
    client = BlockingClient(Sdk, name="store")
    with pytest.raises(ClosedError, match=r"store\.echo: the client is not open yet\. Use it inside `async with"):
        await client.call("echo")
    async with client:
        pass
    with pytest.raises(ClosedError, match=r"store: id: the client has been closed\."):
        await client.run(id)


async def test_a_client_belongs_to_its_loop_and_thread() -> None:
    """Elsewhere it is refused, and nothing is called."""

    def on_another_loop() -> None:
        run_in_virtual_time(client.call("echo"))

    def on_no_loop() -> None:
        call = client.call("echo")
        with suppress(StopIteration):
            call.send(None)

    async with BlockingClient(Sdk, name="store") as client:
        with pytest.raises(WrongLoop, match=r"store\.echo was called on another event loop than the one"):
            await asyncio.to_thread(on_another_loop)
        with pytest.raises(WrongThread, match=r"store\.echo was called from a thread\. There, use `from_thread`"):
            await asyncio.to_thread(on_no_loop)
        assert client.statistics() == {}


async def test_a_call_that_is_over_keeps_nothing_alive() -> None:
    """Neither does a client that has been left: the SDK's object goes with it."""
    gone = threading.Event()

    class Data:
        def __del__(self) -> None:
            gone.set()

    gc.disable()
    try:
        async with BlockingClient(Sdk) as client:
            await client.call("echo", Data())
            await asyncio.to_thread(gone.wait, BOUND)
            assert gone.is_set()
    finally:
        gc.enable()


# --- real SDKs, against a real server ---


class Service(http.server.ThreadingHTTPServer):
    """Answers 503 to the first request for a path, hangs on the first one for /hang, and counts."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.inside = self.most = 0
        self.ending = threading.Event()
        self.meeting = threading.Barrier(4, timeout=BOUND)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_GET(self) -> None:
        service, path = self.server, self.path
        with service.lock:
            service.requests[path] += 1
            first = service.requests[path] == 1
        if path.startswith("/hang") and first:
            service.ending.wait(BOUND)
        with service.lock:
            service.inside += 1
            service.most = max(service.most, service.inside)
        if path.startswith("/meet"):
            service.meeting.wait()
        with service.lock:
            service.inside -= 1
        failing = path.startswith("/flaky") and first
        with suppress(OSError):  # who asked may have gone
            self.send_response(503 if failing else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield service
        service.ending.set()
        service.shutdown()
        thread.join()


def kind_of_requests_error(error: Exception) -> FailureKind | None:
    if isinstance(error, requests.HTTPError) and error.response.status_code == 503:
        return FailureKind.TRANSIENT
    return FailureKind.TRANSIENT if isinstance(error, requests.ConnectionError | requests.Timeout) else None


def fetch(session: requests.Session, url: str) -> str:
    response = session.get(url, timeout=0.2 if "hang" in url else BOUND)
    response.raise_for_status()
    return response.text


async def test_requests_with_a_session_for_each_thread(service: Service) -> None:
    """Sessions are not thread-safe. Refusals and time-outs of the SDK are retried, and no more than four are inside."""
    retry = Retry(attempts=3, wait=0, budget=None)
    async with BlockingClient(
        requests.Session, per_thread=True, limit=4, retry=retry, breaker=None, classify=kind_of_requests_error
    ) as client:
        urls = [f"{service.url}/{path}" for path in [*[f"flaky{n}" for n in range(20)], "hang", *["meet"] * 4]]
        assert await asyncio.gather(*[client.run(fetch, url) for url in urls]) == ["ok"] * 25
        (seen,) = client.statistics().values()
        with pytest.raises(requests.exceptions.InvalidSchema):
            await client.run(fetch, "gopher://127.0.0.1/")
    assert (seen.succeeded, seen.retries, seen.failed) == (25, 21, {FailureKind.TRANSIENT: 21})
    assert service.most == 4
    assert service.requests["/hang"] == 2


async def test_a_module_as_the_client(service: Service) -> None:
    """`urllib.request` has no client object; its error for a status says itself which one it is."""

    def kind_of(error: Exception) -> FailureKind | None:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            return FailureKind.TRANSIENT if error.code == 503 else None
        return None

    def get(module: Any, path: str) -> bytes:
        with module.urlopen(f"{service.url}/{path}", timeout=BOUND) as answer:
            body: bytes = answer.read()
        return body

    async with BlockingClient(lambda: urllib.request, classify=kind_of, retry=Retry(wait=0)) as client:
        assert await asyncio.gather(*[client.run(get, f"flaky{n}") for n in range(8)]) == [b"ok"] * 8
    assert all(times == 2 for times in service.requests.values())


async def test_a_connection_that_hangs_is_abandoned_and_the_next_attempt_has_another_one(service: Service) -> None:
    """`http.client` without a timeout of its own: the gate's goes on with a second thread while the first one hangs."""

    def get(connection: http.client.HTTPConnection, path: str) -> bytes:
        connection.request("GET", path)
        return connection.getresponse().read()

    def connect() -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", service.server_address[1])

    async with BlockingClient(
        connect, name="wire", per_thread=True, limit=2, timeout=0.2, retry=Retry(attempts=2, wait=0)
    ) as client:
        assert await client.run(get, "/hang") == b"ok"
        (seen,) = client.statistics().values()
        assert (seen.in_flight, seen.retries) == (1, 1)
        assert [call.name for call in seen.abandoned_calls] == [f"wire: {get.__qualname__}"]
        service.ending.set()
        while client.statistics()[None].in_flight:
            await asyncio.sleep(0.001)
    assert service.requests["/hang"] == 2
