"""Resources that are checked out: never too many, never lost, never shared, whatever happens to who uses them."""

import asyncio
import gc
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from contextvars import Context, ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import (
    AttemptTimeout,
    ClosedError,
    DeadlockError,
    Executor,
    FailureKind,
    UsageError,
    WrongLoop,
    WrongThread,
)
from penstock.clients.pool import CHECK_AFTER, DEFAULT_IDLE_TIMEOUT, MOST_NAMED, PATIENCE, Pool
from penstock.context import Lease, RunningJob, current_job, enter, leases
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step, run_in_virtual_time
from penstock.threads.lane import Lane

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

HOUR = 3600.0


class Thing:
    """A resource. It exists from the moment in which it is asked for until it is closed."""

    def __init__(self, bank: "Bank", number: int) -> None:
        self.bank = bank
        self.number = number
        self.users = 0
        self.closed = False

    def __repr__(self) -> str:
        return f"<thing {self.number}>"

    async def close(self) -> None:
        await asyncio.sleep(self.bank.latency)
        self.bank.forget(self)

    @contextmanager
    def used(self) -> Iterator[None]:
        assert not self.closed
        self.users += 1
        assert self.users == 1, "one at a time"
        try:
            yield
        finally:
            self.users -= 1


class Bank:
    """Makes things, and knows how many there are."""

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency
        self.made = self.alive = self.most = 0
        self.well = True
        self.checked: list[Thing] = []
        self.closed: list[int] = []
        self._lock = threading.Lock()

    async def open(self) -> Thing:
        thing = self._new()
        try:
            await asyncio.sleep(self.latency)
        except BaseException:
            self.forget(thing)
            raise
        return thing

    def open_blocking(self) -> Thing:
        return self._new()

    def close_blocking(self, thing: Thing) -> None:
        self.forget(thing)

    async def check(self, thing: Thing) -> bool:
        self.checked.append(thing)
        with thing.used():
            await asyncio.sleep(self.latency)
        return self.well

    def check_blocking(self, thing: Thing) -> bool:
        self.checked.append(thing)
        with thing.used():
            return self.well

    def _new(self) -> Thing:
        with self._lock:
            self.made += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            return Thing(self, self.made)

    def forget(self, thing: Thing) -> None:
        with self._lock:
            assert not thing.closed, "closed once"
            assert not thing.users, "not closed under anybody"
            thing.closed = True
            self.closed.append(thing.number)
            self.alive -= 1


@pytest.fixture
def bank() -> Bank:
    return Bank()


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


def counts(pool: Pool[Any]) -> tuple[int, int, int]:
    """In use, idle, waiting."""
    seen = pool.statistics()
    return seen.in_use, seen.idle, seen.waiting


async def settled(pool: Pool[Any]) -> None:
    """Wait until no place is taken any more."""
    async with asyncio.timeout(BOUND):
        while pool.statistics().in_use:
            await asyncio.sleep(0.001)


async def use(pool: Pool[Thing], duration: float = 0.0) -> int:
    async with pool.acquire() as thing:
        with thing.used():
            await asyncio.sleep(duration)
        return thing.number


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == "penstock.pool" and record.levelno >= level
    ]


def alone(coroutine: Any) -> "asyncio.Task[Any]":
    """A task that does not inherit what the test holds."""
    return asyncio.create_task(coroutine, context=Context())


# --- made, used again, closed ---


async def test_a_resource_is_made_when_it_is_asked_for_and_used_again(bank: Bank) -> None:
    """Two jobs one after the other share one; leaving the pool closes it."""
    async with Pool(bank.open, size=3) as pool:
        assert bank.made == 0
        assert [await use(pool), await use(pool)] == [1, 1]
        seen = pool.statistics()
        assert (seen.size, seen.in_use, seen.idle, seen.waiting, seen.abandoned, seen.made, seen.closed) == (
            3, 0, 1, 0, 0, 1, 0,
        )  # fmt: skip
    assert bank.closed == [1]
    assert pool.statistics().closed == 1


async def test_the_one_used_last_is_used_next(bank: Bank) -> None:
    """So the others stand idle, and can be closed."""
    async with Pool(bank.open, size=3) as pool:
        async with AsyncExitStack() as stack:
            things = [await stack.enter_async_context(pool.acquire()) for _ in range(3)]
        assert [thing.number for thing in things] == [1, 2, 3]
        assert [await use(pool), await use(pool)] == [1, 1]  # an exit stack closes in reverse


@pytest.mark.parametrize("check", [True, False])
async def test_one_that_comes_back_just_in_time_saves_an_opening(bank: Bank, check: bool) -> None:
    """And a check: it has just been in use."""
    async with Pool(bank.open, size=2, check=bank.check if check else None) as pool:
        async with pool.acquire():
            asking = alone(use(pool))
            await asyncio.sleep(0)
        assert await asking == 1
        assert (bank.made, bank.checked) == (1, [])


@pytest.mark.virtual_clock
async def test_no_more_than_size_exist_and_who_waits_is_served_in_order(bank: Bank) -> None:
    order: list[int] = []

    async def job(number: int) -> None:
        async with pool.acquire():
            order.append(number)
            await asyncio.sleep(1)

    async with Pool(bank.open, size=2) as pool:
        started = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(job(number))
        assert asyncio.get_running_loop().time() - started == 5
    assert order == list(range(10))
    assert (bank.most, bank.made, bank.alive) == (2, 2, 0)


async def test_plain_functions_run_in_threads_beside_a_plain_factory() -> None:
    """Factory, check and close; the loop's thread does none of it."""
    threads: list[str] = []

    class Blocking:
        def __init__(self) -> None:
            threads.append(threading.current_thread().name)

        def close(self) -> None:
            threads.append(threading.current_thread().name)

    def check(_: Blocking) -> bool:
        threads.append(threading.current_thread().name)
        return True

    async with Pool(Blocking, size=1, check=check, name="db") as pool:
        with suppress(KeyError):
            async with pool.acquire():
                raise KeyError
        await settled(pool)
    assert len(threads) == 3
    assert all(name.startswith("penstock-pool db") for name in threads)


async def test_plain_functions_run_on_the_loop_beside_an_async_factory() -> None:
    """What was made on the loop belongs to its thread. What they return is awaited if it is to be."""
    seen: list[object] = []

    class Connection:
        async def ping(self) -> bool:
            seen.append("ping")
            return True

        def close(self) -> None:
            seen.append(threading.current_thread())

    async def connect() -> Connection:
        return Connection()

    async with Pool(connect, size=1, check=lambda connection: connection.ping()) as pool:
        with suppress(KeyError):
            async with pool.acquire():
                raise KeyError
    assert seen == ["ping", threading.main_thread()]


async def test_aclose_goes_before_close() -> None:
    called: list[str] = []

    class Both:
        async def aclose(self) -> None:
            called.append("aclose")

        def close(self) -> None:
            called.append("close")

    async with Pool(Both, size=1) as pool, pool.acquire():
        pass
    assert called == ["aclose"]


async def test_a_resource_that_cannot_be_closed_is_let_go() -> None:
    class Odd:
        close = "today"

    for factory in (object, Odd):
        async with Pool(factory, size=1) as pool, pool.acquire() as resource:
            assert isinstance(resource, factory)
        assert pool.statistics().closed == 1


async def test_close_is_called_instead_of_the_resources_own(bank: Bank) -> None:
    closed: list[Thing] = []
    async with Pool(bank.open, size=1, close=closed.append) as pool, pool.acquire() as thing:
        pass
    assert closed == [thing]
    assert not thing.closed


async def test_the_factory_does_not_run_as_the_job_that_asks() -> None:
    """What it makes outlives the job: it sees the job's context variables, but not the job nor what the job holds."""
    variable = ContextVar("variable", default="none")
    seen: list[object] = []

    async def connect() -> object:
        seen.extend([variable.get(), current_job(), leases.get()])
        return object()

    async with Pool(object, size=1) as other, Pool(connect, size=1) as pool, Executor() as executor:

        async def job() -> None:
            variable.set("the job's")
            async with other.acquire(), pool.acquire():
                assert current_job() is not None
                assert len(leases.get()) == 2

        await executor.submit(job)
    assert seen == ["the job's", None, ()]


# --- errors of what the user gave ---


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_an_error_of_the_factory_goes_to_who_asked_and_the_place_comes_back(kind: str) -> None:
    """Unchanged, also if it is a `TimeoutError` within a timeout of ours; the next one may be luckier."""
    answers: list[object] = [TimeoutError("mine"), OSError("down"), "connection"]

    def connect() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def connect_async() -> object:
        return connect()

    factory: Any = connect if kind == "blocking" else connect_async
    async with Pool(factory, size=1, timeout=HOUR) as pool:
        with pytest.raises(TimeoutError, match="^mine$"):
            await pool.acquire().__aenter__()
        with pytest.raises(OSError, match="^down$"):
            await pool.acquire().__aenter__()
        assert counts(pool) == (0, 0, 0)
        async with pool.acquire() as resource:
            assert resource == "connection"
    assert pool.statistics().made == 1


async def test_a_factory_that_returns_a_coroutine_by_mistake_is_told() -> None:
    async def connect() -> str:
        return "never"

    async with Pool(lambda: connect(), size=1) as pool:
        with pytest.raises(
            UsageError,
            match="returned a coroutine .*connect.* that nobody awaits. Make it, or the decorator that made it,",
        ):
            await pool.acquire().__aenter__()
        assert counts(pool) == (0, 0, 0)


async def test_a_factory_whose_result_is_to_be_awaited_is_told(tmp_path: Path) -> None:
    """As that of `aiosqlite.connect`, which is a plain function."""
    async with Pool(partial(aiosqlite.connect, tmp_path / "a.db"), size=1) as pool:
        with pytest.raises(UsageError, match=r"^connect returned an object that is to be awaited \(Connection\)"):
            await pool.acquire().__aenter__()
        assert counts(pool) == (0, 0, 0)


async def test_an_error_of_close_is_logged_and_the_users_own_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    def close(_: object) -> None:
        raise OSError("already gone")

    async with Pool(object, size=1, close=close, name="db") as pool:
        with pytest.raises(KeyError):
            async with pool.acquire():
                raise KeyError
        await settled(pool)
        assert await asyncio.create_task(_kind_of(pool)) is object
    assert messages(caplog) == ["pool 'db': closing a resource failed: OSError: already gone"] * 2


async def _kind_of(pool: Pool[Any]) -> type:
    async with pool.acquire() as resource:
        return type(resource)


@pytest.mark.virtual_clock
async def test_a_close_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Its place is taken so long, and then comes back. Leaving the pool has no more time than one close."""

    async def close(_: object) -> None:
        await asyncio.sleep(HOUR)

    async with Pool(object, size=1, close=close, name="db") as pool:
        with suppress(KeyError):
            async with pool.acquire():
                raise KeyError
        started = asyncio.get_running_loop().time()
        async with pool.acquire():
            assert asyncio.get_running_loop().time() - started == PATIENCE
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started == PATIENCE
    await settled(pool)
    given_up = "pool 'db': closing a resource takes more than 5 s and is given up"
    left = (
        "pool 'db' was left while 1 of its resources are in use; each is closed when it comes back: in use by 1 "
        "being opened, checked or closed"
    )
    assert messages(caplog) == [given_up, left, given_up]


# --- waiting ---


@pytest.mark.virtual_clock
async def test_a_close_in_a_thread_keeps_its_place_until_the_thread_has_ended(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    """However long it takes: the server still has that connection."""

    def close(thing: Thing) -> None:
        latch.wait()
        bank.close_blocking(thing)

    with ThreadLatch(virtual_loop()) as latch:
        async with Pool(bank.open_blocking, size=1, close=close, name="db") as pool:
            with suppress(KeyError):
                async with pool.acquire():
                    raise KeyError
            asking = asyncio.create_task(use(pool))
            await asyncio.sleep(PATIENCE - 1)
            assert (counts(pool), pool.statistics().abandoned) == ((1, 0, 1), 0)
            await asyncio.sleep(HOUR)
            assert (counts(pool), pool.statistics().abandoned) == ((1, 0, 1), 1)
            assert messages(caplog) == [
                "pool 'db': closing a resource takes more than 5 s; it keeps its place until its thread has ended"
            ]
            latch.open()
            await asking
            assert (pool.statistics().abandoned, pool.statistics().closed, bank.most) == (0, 1, 1)
    assert bank.alive == 0


@pytest.mark.virtual_clock
async def test_an_opening_in_a_thread_for_which_nobody_waits_is_counted_as_abandoned(bank: Bank) -> None:
    def connect() -> Thing:
        latch.wait()
        return bank.open_blocking()

    with ThreadLatch(virtual_loop()) as latch:
        async with Pool(connect, size=2, close=bank.close_blocking, timeout=3) as pool:
            with pytest.raises(AttemptTimeout):
                await use(pool)
            assert (counts(pool), pool.statistics().abandoned) == ((1, 0, 0), 1)
            latch.open()
            await settled(pool)
            assert (counts(pool), pool.statistics().abandoned) == ((0, 1, 0), 0)


@pytest.mark.virtual_clock
async def test_the_timeout_covers_the_wait_for_a_place(bank: Bank) -> None:
    """It is a `TimeoutError`, counts as transient, and says who has the resources."""
    async with Pool(bank.open, size=1, timeout=5, name="db") as pool:
        holder = asyncio.create_task(use(pool, 60), name="reader")
        await asyncio.sleep(1)
        with pytest.raises(AttemptTimeout) as caught:
            await use(pool)
        assert str(caught.value) == (
            "pool 'db': no place was free within 5 s (size 1; in use by task 'reader' for 6.0 s)"
        )
        await holder
        assert counts(pool) == (0, 1, 0)


@pytest.mark.virtual_clock
async def test_the_timeout_covers_the_opening(caplog: pytest.LogCaptureFixture) -> None:
    """An async factory is cancelled, and the place comes back at once."""
    bank = Bank(latency=HOUR)
    async with Pool(bank.open, size=1, timeout=5, name="db") as pool:
        with pytest.raises(AttemptTimeout, match=r"^pool 'db': no resource was ready within 5 s .*1 being opened"):
            await use(pool)
        await asyncio.sleep(1)
        assert counts(pool) == (0, 0, 0)
        assert bank.alive == 0
    assert messages(caplog) == []


@pytest.mark.virtual_clock
async def test_what_opens_in_a_thread_for_someone_who_has_left_is_for_the_next_one(bank: Bank) -> None:
    """A thread cannot be stopped, so its place stays taken; what it makes is used."""

    def connect() -> Thing:
        latch.wait()
        return bank.open_blocking()

    with ThreadLatch(virtual_loop()) as latch:
        async with Pool(connect, size=1, timeout=5, close=bank.close_blocking) as pool:
            with pytest.raises(AttemptTimeout):
                await use(pool)
            assert counts(pool) == (1, 0, 0)
            waiting = asyncio.create_task(use(pool))
            await asyncio.sleep(1)
            latch.open()
            assert await waiting == 1
            assert (bank.made, counts(pool)) == (1, (0, 1, 0))


@pytest.mark.virtual_clock
async def test_an_opening_that_fails_when_nobody_waits_for_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def connect() -> object:
        latch.wait()
        raise OSError("no route")

    with ThreadLatch(virtual_loop()) as latch:
        async with Pool(connect, size=1, timeout=5, name="db") as pool:
            with pytest.raises(AttemptTimeout):
                await pool.acquire().__aenter__()
            latch.open()
            await asyncio.sleep(1)
            assert counts(pool) == (0, 0, 0)
    assert messages(caplog) == [
        "pool 'db': opening a resource failed when nobody waited for it any more: OSError: no route"
    ]


@pytest.mark.virtual_clock
@pytest.mark.parametrize("end", ["served", "cancelled"])
async def test_the_wait_for_a_place_counts_as_the_jobs_waiting(bank: Bank, end: str) -> None:
    """What the job does with the resource, and the opening, do not."""
    job = RunningJob()

    async def body() -> None:
        enter(job)
        await use(pool, 7)

    async with Pool(bank.open, size=1) as pool:
        holder = asyncio.create_task(use(pool, 5))
        await asyncio.sleep(0)
        task = asyncio.create_task(body())
        await asyncio.sleep(3)
        if end == "cancelled":
            task.cancel()
        await asyncio.wait([holder, task])
    assert job.waited == (3 if end == "cancelled" else 5)


@pytest.mark.virtual_clock
async def test_the_wait_for_a_place_is_in_the_outcome(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool, Executor() as executor:

        async def job(_: int) -> None:
            await use(pool, 5)

        outcomes = await executor.as_completed(job, range(3))
    assert sorted(outcome.waited for outcome in outcomes) == [0, 5, 10]


# --- suspect ones, and the check ---


@pytest.mark.parametrize("error", [KeyError("x"), asyncio.CancelledError()], ids=repr)
async def test_without_a_check_a_block_left_by_an_exception_costs_the_resource(
    bank: Bank, error: BaseException
) -> None:
    """Nobody knows its state. The error of the block comes out as it is."""
    async with Pool(bank.open, size=1) as pool:
        with pytest.raises(type(error)) as caught:
            async with pool.acquire():
                raise error
        assert caught.value is error
        assert await use(pool) == 2
    assert (bank.closed, bank.most) == ([1, 2], 1)


@pytest.mark.parametrize("kind", ["async", "blocking"])
@pytest.mark.parametrize("answer", [True, None, 1, False, 0, OSError("dead")], ids=repr)
async def test_with_a_check_it_is_asked_before_the_next_use(
    bank: Bank, kind: str, answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, so that a check that rolls back ends the transaction of the failed block. One that returns nothing
    says no by raising."""
    caplog.set_level(logging.INFO)

    def check(thing: Thing) -> object:
        bank.checked.append(thing)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def check_async(thing: Thing) -> object:
        return check(thing)

    async with Pool(
        bank.open if kind == "async" else bank.open_blocking,
        size=1, close=bank.close_blocking, check=check_async if kind == "async" else check, name="db",
    ) as pool:  # fmt: skip
        with suppress(KeyError):
            async with pool.acquire():
                raise KeyError
        await settled(pool)
        assert [thing.number for thing in bank.checked] == [1]
        well = answer in (True, None)
        assert counts(pool) == (0, int(well), 0)
        assert await use(pool) == (1 if well else 2)
    reason = "OSError: dead" if isinstance(answer, OSError) else "its check said so"
    expected = [] if well else [f"pool 'db': a resource is of no use any more and is replaced: {reason}"]
    assert messages(caplog, logging.INFO) == expected
    assert bank.alive == 0


@pytest.mark.virtual_clock
async def test_one_that_stood_idle_is_checked_before_it_is_used(bank: Bank) -> None:
    """Not below a second: under load no job pays for it. All that are dead are replaced by one."""
    async with Pool(bank.open, size=3, check=bank.check) as pool:
        await asyncio.gather(*[use(pool, 1) for _ in range(3)])
        await asyncio.sleep(CHECK_AFTER / 2)
        last = await use(pool)
        assert bank.checked == []
        await asyncio.sleep(CHECK_AFTER)
        assert await use(pool) == last
        assert [thing.number for thing in bank.checked] == [last]
        await asyncio.sleep(CHECK_AFTER)
        bank.well = False
        assert await use(pool) == 4
        assert counts(pool) == (0, 1, 0)
        assert sorted(bank.closed) == [1, 2, 3]
    assert bank.most == 3


@pytest.mark.virtual_clock
async def test_without_a_check_one_that_stood_idle_is_used_as_it_is(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool:
        assert await use(pool) == 1
        await asyncio.sleep(DEFAULT_IDLE_TIMEOUT - 1)
        assert await use(pool) == 1


@pytest.mark.virtual_clock
async def test_an_async_check_that_hangs_has_failed(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def check(_: Thing) -> None:
        await asyncio.sleep(HOUR)

    async with Pool(bank.open, size=1, check=check, name="db") as pool:
        await use(pool)
        await asyncio.sleep(CHECK_AFTER)
        started = asyncio.get_running_loop().time()
        assert await use(pool) == 2
        assert asyncio.get_running_loop().time() - started == PATIENCE
    assert messages(caplog, logging.INFO) == [
        "pool 'db': a resource is of no use any more and is replaced: no answer to its check within 5 s"
    ]


@pytest.mark.virtual_clock
async def test_one_whose_check_was_cancelled_half_way_is_closed(bank: Bank) -> None:
    """Nobody knows its state. Its place comes back when it is closed."""
    async with Pool(bank.open, size=1, check=bank.check) as pool:
        await use(pool)
        await asyncio.sleep(CHECK_AFTER)
        bank.latency = 3
        task = asyncio.create_task(use(pool))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.sleep(1)
        assert counts(pool) == (1, 0, 0)
        assert await use(pool) == 2
    assert (bank.closed, bank.most) == ([1, 2], 1)


@pytest.mark.virtual_clock
async def test_a_close_that_has_begun_is_finished_though_who_asked_has_left(bank: Bank) -> None:
    async with Pool(bank.open, size=1, check=bank.check) as pool:
        await use(pool)
        await asyncio.sleep(CHECK_AFTER)
        bank.latency, bank.well = 3, False
        task = asyncio.create_task(use(pool))
        await asyncio.sleep(4)  # the check took 3 s
        task.cancel()
        await asyncio.sleep(0)
        assert counts(pool) == (1, 0, 0)
        bank.well = True
        assert await use(pool) == 2
    assert (bank.closed, bank.most) == ([1, 2], 1)


@pytest.mark.virtual_clock
async def test_a_check_that_runs_in_a_thread_outlives_who_asked(bank: Bank) -> None:
    """The thread uses the resource: nobody else gets it, and it is not closed under the thread."""

    def check(thing: Thing) -> None:
        with thing.used():
            latch.wait()

    with ThreadLatch(virtual_loop()) as latch:
        async with Pool(bank.open_blocking, size=1, check=check, close=bank.close_blocking, timeout=5) as pool:
            await use(pool)
            await asyncio.sleep(CHECK_AFTER)
            with pytest.raises(AttemptTimeout):
                await use(pool)
            assert counts(pool) == (1, 0, 0)
            assert bank.closed == []
            latch.open()
            assert await use(pool) == 1


def test_the_end_of_the_loop_does_not_close_what_a_thread_is_checking(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    """`asyncio.run` cancels everything: what the thread uses is left to the garbage collector."""
    inside, go = threading.Event(), threading.Event()

    def check(thing: Thing) -> None:
        with thing.used():
            inside.set()
            go.wait(BOUND)

    async def main() -> None:
        async with AsyncExitStack() as forgotten:
            pool = await forgotten.enter_async_context(
                Pool(bank.open_blocking, size=1, check=check, close=bank.close_blocking)
            )
            with suppress(KeyError):
                async with pool.acquire():
                    raise KeyError
            await asyncio.to_thread(inside.wait, BOUND)
            forgotten.pop_all()

    asyncio.run(main())
    assert (bank.closed, messages(caplog)) == ([], [])
    go.set()


# --- idle ---


@pytest.mark.virtual_clock
async def test_what_stands_idle_for_too_long_is_closed(bank: Bank) -> None:
    """Those that are in use again are not; one timer serves all."""
    async with Pool(bank.open, size=3, idle_timeout=60) as pool:
        await asyncio.gather(*[use(pool, 1) for _ in range(3)])
        await asyncio.sleep(30)
        assert await use(pool) == 3
        await asyncio.sleep(31)
        assert (bank.closed, counts(pool)) == ([1, 2], (0, 1, 0))
        await asyncio.sleep(30)
        assert (bank.closed, counts(pool)) == ([1, 2, 3], (0, 0, 0))
        assert await use(pool) == 4
        async with pool.acquire():
            await asyncio.sleep(HOUR)
            assert bank.alive == 1


@pytest.mark.virtual_clock
async def test_with_none_nothing_is_closed_for_being_idle(bank: Bank) -> None:
    async with Pool(bank.open, size=1, idle_timeout=None) as pool:
        await use(pool)
        await asyncio.sleep(1000 * HOUR)
        assert await use(pool) == 1


@pytest.mark.virtual_clock
async def test_one_that_is_being_closed_still_has_its_place() -> None:
    """The server counts it as well."""
    bank = Bank(latency=2)
    async with Pool(bank.open, size=1, idle_timeout=10) as pool:
        await use(pool)
        await asyncio.sleep(11)
        started = asyncio.get_running_loop().time()
        await use(pool)
        assert asyncio.get_running_loop().time() - started == 1 + 2
    assert bank.most == 1


async def test_one_that_is_meant_for_who_was_just_admitted_is_not_closed(bank: Bank) -> None:
    """Though it has been idle for too long when a loop that was busy comes to look."""

    async def give_back_and_keep_the_loop_busy() -> None:
        async with pool.acquire():
            waiting.append(alone(use(pool)))
            await asyncio.sleep(0)
            assert counts(pool) == (1, 0, 1)
            # As the timer of one that was idle before: due in the iteration in which the resource comes back.
            assert pool._stock is not None
            asyncio.get_running_loop().call_soon(pool._stock._evict)
        time.sleep(0.002)  # noqa: ASYNC251

    waiting: list[asyncio.Task[int]] = []
    async with Pool(bank.open, size=1, idle_timeout=0.001) as pool:
        await asyncio.create_task(give_back_and_keep_the_loop_busy())
        assert await waiting[0] == 1
        assert bank.made == 1


# --- nested ---


async def test_who_holds_one_and_would_wait_for_another_one_is_told(bank: Bank) -> None:
    """At once, with who holds what. The first one goes on working."""
    async with Pool(bank.open, size=1, name="db") as pool:
        task = asyncio.current_task()
        assert task is not None
        task.set_name("transfer")
        async with pool.acquire() as thing:
            with pytest.raises(DeadlockError) as caught:
                await use(pool)
            assert not thing.closed
        assert str(caught.value) == (
            "this task, or the one that started it, holds a resource of pool 'db' and asks for another one, while all "
            "1 are taken (in use by task 'transfer' for 0.0 s): if every holder did so, none would ever get it. Pass "
            "the resource on as an argument, or leave its block before asking for another one."
        )
        assert await use(pool) == 1


async def test_a_job_that_asks_twice_is_named(bank: Bank) -> None:
    """The outcome tells which job it was; a tenth holder is only counted."""
    inside = asyncio.Semaphore(0)
    full = asyncio.Event()

    async def job(number: int) -> None:
        async with pool.acquire():
            inside.release()
            await full.wait()
            await use(pool)

    async with Pool(bank.open, size=MOST_NAMED + 2) as pool, Executor() as executor:
        stream = executor.as_completed(job, range(MOST_NAMED + 2), key=str)
        reading = asyncio.create_task(_all_of(stream))
        for _ in range(MOST_NAMED + 2):
            await inside.acquire()
        full.set()
        outcomes = await reading
    first = next(outcome for outcome in outcomes if outcome.key == "0")
    assert isinstance(first.error, DeadlockError)
    assert first.kind is not FailureKind.TRANSIENT
    assert "in use by <job" in str(first.error)
    assert ", 2 more)" in str(first.error)


async def _all_of(stream: Any) -> list[Any]:
    return [outcome async for outcome in stream]


async def test_a_child_task_inherits_what_its_parent_holds_and_siblings_share_nothing(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool:
        async with pool.acquire():
            with pytest.raises(ExceptionGroup) as caught:
                async with asyncio.TaskGroup() as group:
                    group.create_task(use(pool))
        assert caught.group_contains(DeadlockError)
        assert list(await asyncio.gather(alone(use(pool)), alone(use(pool)))) == [1, 1]


@pytest.mark.virtual_clock
async def test_what_was_given_back_does_not_count(bank: Bank) -> None:
    """A child that was started within the block and asks after it waits like anybody else."""

    async def child() -> int:
        await asyncio.sleep(2)
        return await use(pool)

    async with Pool(bank.open, size=1) as pool:
        async with pool.acquire():
            waiting = asyncio.create_task(child())
            await asyncio.sleep(1)
        holder = asyncio.create_task(use(pool, 5))
        assert await waiting == 1
        assert holder.done()


async def test_a_resource_of_another_pool_does_not_count(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool, Pool(bank.open, size=1) as other:
        holder = asyncio.create_task(use(pool))
        await asyncio.sleep(0)
        async with other.acquire():
            assert await use(pool) == 1
        await holder


async def test_who_holds_one_gets_another_one_that_is_free_with_one_warning(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pool(bank.open, size=3, name="db") as pool:
        for _ in range(2):
            async with pool.acquire(), pool.acquire(), pool.acquire():
                pass
    assert messages(caplog) == [
        "pool 'db': a task that holds a resource asks for another one and gets it, since a place is free; when none "
        "is, that raises DeadlockError. Pass the resource on as an argument"
    ]


@pytest.mark.virtual_clock
async def test_who_holds_one_waits_for_a_place_that_comes_back_by_itself() -> None:
    """It is nobody's: the resource that had it is being closed. For one such place one may wait and not two."""
    bank = Bank(latency=1)
    async with Pool(bank.open, size=2) as pool:
        async with pool.acquire():
            with suppress(KeyError):
                async with pool.acquire():
                    raise KeyError
            answers = await asyncio.gather(use(pool), use(pool), return_exceptions=True)
    assert answers[0] == 3
    assert isinstance(answers[1], DeadlockError)


@pytest.mark.virtual_clock
async def test_who_holds_one_waits_for_one_that_opens_for_nobody_any_more(bank: Bank) -> None:
    """It was asked for by a job that has left, so it is there for the next one."""
    latches = [ThreadLatch(virtual_loop()), ThreadLatch(virtual_loop())]

    def connect() -> Thing:
        latches[bank.made].wait()
        return bank.open_blocking()

    latches[0].open()
    async with Pool(connect, size=2, close=bank.close_blocking) as pool:
        async with pool.acquire():
            asking = alone(use(pool))
            await asyncio.sleep(1)
            asking.cancel()
            await asyncio.sleep(1)
            nested = asyncio.create_task(use(pool))
            await asyncio.sleep(1)
            latches[1].open()
            assert await nested == 2
    assert asking.cancelled()


async def test_a_block_that_is_left_in_another_context_leaves_nothing_behind(bank: Bank) -> None:
    """As an async generator's may be: the stale entry does not count, and goes with the next acquire."""
    async with Pool(bank.open, size=1) as pool:
        lease = pool.acquire()
        await lease.__aenter__()
        await asyncio.create_task(_leave(lease))
        assert leases.get() == (lease,)
        assert await use(pool) == 1
        assert leases.get() == ()


async def _leave(lease: Any) -> None:
    await lease.__aexit__(None, None, None)


# --- calls that were abandoned ---


@pytest.mark.parametrize("check", [True, False])
async def test_what_an_abandoned_call_uses_comes_back_when_the_last_one_has_ended(bank: Bank, check: bool) -> None:
    """And is suspect then, though the block was left without an error."""
    async with Pool(bank.open, size=1, check=bank.check if check else None, name="db") as pool:
        async with pool.acquire():
            (lease,) = leases.get()
            lease.hold()
            lease.hold()
        assert leases.get() == ()
        assert (pool.statistics().in_use, pool.statistics().abandoned) == (1, 1)
        waiting = asyncio.create_task(use(pool))
        await asyncio.sleep(0)
        lease.release()
        await asyncio.sleep(0)
        assert counts(pool) == (1, 0, 1)
        lease.release()
        assert pool.statistics().abandoned == 0
        assert await waiting == (1 if check else 2)
    assert bank.most == 1


async def test_a_call_that_was_abandoned_and_ended_within_the_block_leaves_a_suspect(bank: Bank) -> None:
    """It comes back with the block and not before."""
    async with Pool(bank.open, size=1) as pool:
        async with pool.acquire() as thing:
            (lease,) = leases.get()
            lease.hold()
            lease.release()
            await asyncio.sleep(0)
            assert not thing.closed
        assert await use(pool) == 2


async def test_what_has_come_back_can_be_held_no_more(bank: Bank) -> None:
    """A call of a child task that outlives the block has nothing to do with who has the resource now."""
    async with Pool(bank.open, size=1) as pool:
        async with pool.acquire():
            (lease,) = leases.get()
        lease.hold()
        assert await use(pool) == 1
        lease.release()
        assert await use(pool) == 1
        assert pool.statistics().abandoned == 0


@pytest.mark.virtual_clock
async def test_a_cancelled_call_in_a_thread_keeps_its_resource_until_the_thread_has_ended(bank: Bank) -> None:
    """The job goes on at once, and the next one does not get what the thread still uses."""
    lane = Lane("test", 1)

    def query(thing: Thing) -> None:
        with thing.used():
            latch.wait()

    async def job() -> None:
        async with pool.acquire() as thing:
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await lane.call(query, thing)

    with ThreadLatch(virtual_loop()) as latch:
        async with Pool(bank.open, size=1) as pool:
            await job()
            assert (pool.statistics().in_use, pool.statistics().abandoned) == (1, 1)
            waiting = asyncio.create_task(use(pool))
            await asyncio.sleep(60)
            assert not waiting.done()
            assert bank.closed == []
            latch.open()
            assert await waiting == 2
    lane.close()


# --- leaving ---


@pytest.mark.virtual_clock
async def test_leaving_refuses_who_waits_and_waits_for_what_is_in_use(bank: Bank) -> None:
    async with Pool(bank.open, size=1, name="db") as pool:
        holder = asyncio.create_task(use(pool, 3))
        await asyncio.sleep(1)
        waiting = [asyncio.create_task(use(pool)) for _ in range(3)]
        cancelled = asyncio.create_task(use(pool))
        await asyncio.sleep(1)
        started = asyncio.get_running_loop().time()
        cancelled.cancel()
    assert asyncio.get_running_loop().time() - started == 1
    assert await holder == 1
    for answer in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(answer, ClosedError)
        assert "pool 'db' has been closed" in str(answer)
    assert (bank.closed, counts(pool)) == ([1], (0, 0, 0))
    with pytest.raises(ClosedError):
        pool.acquire()


@pytest.mark.virtual_clock
async def test_leaving_refuses_who_waits_at_once(bank: Bank) -> None:
    """Though what it waits for is in use for longer."""
    async with Pool(bank.open, size=1) as pool:
        holder = asyncio.create_task(use(pool, 3))
        await asyncio.sleep(1)
        waiting = asyncio.create_task(use(pool))
        await asyncio.sleep(0)
        leaving = asyncio.create_task(pool.__aexit__(None, None, None))
        await asyncio.sleep(0.5)
        assert isinstance(waiting.exception(), ClosedError)
        assert not leaving.done()
        await asyncio.wait([holder, leaving])


@pytest.mark.virtual_clock
async def test_leaving_does_not_wait_for_one_who_was_cancelled_with_the_last_place() -> None:
    """In the very tick in which it was admitted."""

    async def connect() -> None:
        await asyncio.sleep(1)
        raise OSError("down")

    started = asyncio.get_running_loop().time()
    async with Pool(connect, size=1) as pool:
        waiting = alone(_kind_of(pool))
        with suppress(OSError):
            await pool.acquire().__aenter__()
        waiting.cancel()
    assert asyncio.get_running_loop().time() == started + 1
    assert waiting.cancelled()


async def test_a_pool_that_was_left_keeps_neither_threads_nor_timers() -> None:
    async with Pool(object, size=1) as pool, pool.acquire():
        pass
    stock = pool._stock
    assert stock is not None
    assert stock._lane is not None
    with pytest.raises(ClosedError):
        await stock._lane.call(int)
    gone = weakref.ref(stock)
    del pool, stock
    gc.collect()
    assert gone() is None


@pytest.mark.virtual_clock
async def test_what_is_still_in_use_after_a_while_is_named_and_closed_later(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool does not take it away from who uses it."""
    async with Pool(bank.open, size=2, name="db") as pool:
        holder = asyncio.create_task(use(pool, 60), name="slow")
        await asyncio.sleep(1)
        abandoned = asyncio.create_task(_abandon(pool), name="late")
        await asyncio.sleep(2)
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started == PATIENCE
    assert messages(caplog) == [
        "pool 'db' was left while 2 of its resources are in use; each is closed when it comes back: in use by "
        "task 'slow' for 8.0 s, task 'late' for 7.0 s (an abandoned call)"
    ]
    assert bank.closed == []
    abandoned.result().release()
    assert await holder == 1
    await settled(pool)
    assert bank.closed == [2, 1]


async def _abandon(pool: Pool[Any]) -> Lease:
    """Leave a block while a call goes on using its resource."""
    async with pool.acquire():
        (lease,) = leases.get()
        lease.hold()
        return lease


@pytest.mark.virtual_clock
async def test_a_suspect_that_is_checked_while_the_pool_is_left_is_closed() -> None:
    bank = Bank(latency=2)
    async with Pool(bank.open, size=1, check=bank.check) as pool:
        with suppress(KeyError):
            async with pool.acquire():
                raise KeyError
        await asyncio.sleep(1)
    assert (bank.alive, counts(pool)) == (0, (0, 0, 0))


@pytest.mark.virtual_clock
@pytest.mark.parametrize("latency", [3.0, HOUR])
async def test_leaving_ends_what_is_being_opened(latency: float) -> None:
    """It is cancelled at once, since nobody would get it. Who asked is told that the pool was closed."""
    bank = Bank(latency=latency)
    async with Pool(bank.open, size=1) as pool:
        asking = asyncio.create_task(use(pool))
        await asyncio.sleep(1)
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() == started
    with pytest.raises(ClosedError):
        await asking
    await settled(pool)
    assert bank.alive == 0


@pytest.mark.virtual_clock
async def test_what_is_being_opened_in_a_thread_is_closed_when_it_comes(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    def connect() -> Thing:
        latch.wait()
        return bank.open_blocking()

    with ThreadLatch(virtual_loop()) as latch:
        async with Pool(connect, size=1, close=bank.close_blocking, name="db") as pool:
            asking = asyncio.create_task(use(pool))
            await asyncio.sleep(1)
        assert messages(caplog) == [
            "pool 'db' was left while 1 of its resources are in use; each is closed when it comes back: in use by 1 "
            "being opened, checked or closed"
        ]
        latch.open()
        with pytest.raises(ClosedError):
            await asking
        await settled(pool)
        await asyncio.sleep(1)
    assert (bank.made, bank.alive) == (1, 0)


@pytest.mark.virtual_clock
async def test_leaving_has_one_budget_for_using_and_closing(caplog: pytest.LogCaptureFixture) -> None:
    """What comes back late goes on closing, and the program goes on."""
    bank = Bank(latency=4)
    async with Pool(bank.open, size=1, name="db") as pool:
        holder = asyncio.create_task(use(pool, 6))
        await asyncio.sleep(6)
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started == PATIENCE
    assert messages(caplog) == [
        "pool 'db' was left while 1 of its resources are in use; each is closed when it comes back: in use by 1 "
        "being opened, checked or closed"
    ]
    await holder
    await settled(pool)
    assert bank.alive == 0


@pytest.mark.virtual_clock
async def test_a_cancellation_while_leaving_still_closes_what_is_idle(bank: Bank) -> None:
    """It does not wait for what is in use, which is closed when it comes back."""
    bank.latency = 1

    async def program() -> None:
        async with Pool(bank.open, size=3) as pool:
            pools.append(pool)
            await asyncio.gather(use(pool), use(pool))
            holders.append(asyncio.create_task(use(pool, 60)))
            await asyncio.sleep(1)

    pools: list[Pool[Thing]] = []
    holders: list[asyncio.Task[int]] = []
    task = asyncio.create_task(program())
    await asyncio.sleep(3.5)
    task.cancel()
    started = asyncio.get_running_loop().time()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.get_running_loop().time() - started <= 1
    assert (bank.alive, counts(pools[0])) == (1, (1, 0, 0))
    await holders[0]
    await settled(pools[0])
    assert bank.alive == 0


# --- states and arguments ---


async def test_a_pool_that_is_not_open_says_how_to_open_it(bank: Bank) -> None:
    pool = Pool(bank.open, size=1, name="connect")
    for call in (pool.acquire, pool.statistics):
        with pytest.raises(
            ClosedError, match=r"is not open yet. Write `async with Pool\(connect, size=...\) as pool:`"
        ):
            call()


async def test_a_pool_is_opened_once(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool:
        with pytest.raises(UsageError, match="has been opened before"):
            await pool.__aenter__()


async def test_a_pool_that_was_closed_between_asking_and_entering_refuses(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool:
        lease = pool.acquire()
    with pytest.raises(ClosedError, match="has been closed"):
        await lease.__aenter__()


async def test_an_acquire_is_for_one_block(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool:
        lease = pool.acquire()
        async with lease:
            pass
        with pytest.raises(UsageError, match=r"Call pool.acquire\(\) once for each `async with`"):
            async with lease:
                pass


async def test_a_pool_belongs_to_the_loop_on_which_it_was_opened(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool:
        with pytest.raises(WrongThread, match="give the thread the resource"):
            await asyncio.to_thread(pool.acquire)
        with pytest.raises(WrongLoop, match="Open one pool for each loop"):
            await asyncio.to_thread(asyncio.run, use(pool))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"size": 0}, "size=0: expected a whole number"),
        ({"size": True}, "size=True: expected a whole number"),
        ({"size": 2.0}, "size=2.0: expected a whole number"),
        ({"close": "close"}, "close='close': expected a function"),
        ({"check": 1}, "check=1: expected a function"),
        ({"idle_timeout": 0}, "idle_timeout=0: expected seconds above 0"),
        ({"timeout": -1}, "timeout=-1: expected seconds above 0"),
        ({"name": 3}, "name=3: expected a string"),
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_refused(found: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pool(object, **{"size": 1, **found})


async def test_a_factory_that_cannot_be_called_is_refused(bank: Bank) -> None:
    with pytest.raises(UsageError, match=r"Write `Pool\(open, ...\)`, without calling open"):
        Pool(bank.open(), size=1)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match=r"Write `Pool\(fn, ...\)`"):
        Pool("sqlite:///", size=1)  # type: ignore[call-overload]


def test_a_connection_in_place_of_a_function_that_connects_is_refused() -> None:
    """That of sqlite3 can be called, which compiles a statement."""
    connection = sqlite3.connect(":memory:")
    try:
        with pytest.raises(UsageError, match=r"found an open connection .*Write `Pool\(connect, size=3\)`"):
            Pool(connection, size=3)  # type: ignore[arg-type]
    finally:
        connection.close()


async def test_an_acquire_that_is_no_async_with_says_what_to_write(bank: Bank) -> None:
    async with Pool(bank.open, size=1) as pool:
        lease: Any = pool.acquire()
        with pytest.raises(UsageError, match=r"Write `async with pool\.acquire\(\) as resource:`"):
            await lease
        with pytest.raises(UsageError, match="Write `async with"), lease:
            pass
        async with lease as thing:  # nothing has been taken for it
            assert thing.number == 1


async def test_a_check_that_is_a_bug_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Else the pool would for ever make new resources, and nobody would know why."""

    def check(resource: Any) -> None:
        resource.pink()

    async with Pool(object, size=1, check=check, name="db") as pool:
        for _ in range(3):
            with suppress(KeyError):
                async with pool.acquire():
                    raise KeyError
            await settled(pool)
    assert messages(caplog) == [
        "pool 'db': its check raised AttributeError, which is a mistake in the check: each resource that is checked "
        "is replaced"
    ]
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert told.exc_info is not None


async def test_a_pool_shows_its_state(bank: Bank) -> None:
    pool = Pool(bank.open, size=2)
    assert repr(pool) == "<Pool 'open' new size=2>"
    async with pool:
        async with pool.acquire():
            assert repr(pool) == "<Pool 'open' open size=2 in_use=1 idle=0 waiting=0>"
    assert repr(pool) == "<Pool 'open' closed size=2 in_use=0 idle=0 waiting=0>"


# --- every step ---


class Books:
    """A pool in a scenario, and what must hold when it is over."""

    def __init__(self, latency: float = 0.0) -> None:
        self.bank = Bank(latency)
        self.pool: Pool[Thing] | None = None

    def balanced(self) -> None:
        assert self.bank.alive == 0, "all that was made was closed"
        assert self.bank.most <= 2
        if self.pool is not None and self.pool._stock is not None:
            assert counts(self.pool) == (0, 0, 0)


@pytest.mark.parametrize("check", [True, False])
def test_every_step_of_a_program_can_be_cancelled(check: bool) -> None:
    """Waits, openings, checks, closings, failures, idle ones: whatever is cancelled when, nothing is lost."""

    async def fails(pool: Pool[Thing]) -> None:
        with suppress(KeyError):
            async with pool.acquire():
                raise KeyError

    async def scenario(books: Books) -> None:
        bank = books.bank
        books.pool = Pool(bank.open, size=2, check=bank.check if check else None, idle_timeout=2.5)
        async with books.pool as pool:
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(use(pool, 0.5))
                group.create_task(fails(pool))
            await asyncio.sleep(2)
            bank.well = False
            await use(pool)
            await asyncio.sleep(1)

    assert cancel_at_every_step(scenario, arrange=lambda: Books(0.25), check=Books.balanced) > 20


def test_every_step_of_a_user_can_be_cancelled_and_the_pool_goes_on() -> None:
    """The place of who is cancelled serves the next one, and the pool is as good as new."""

    async def scenario(books: Books) -> None:
        bank = books.bank
        books.pool = Pool(bank.open, size=1, check=bank.check)
        async with books.pool as pool:
            user = asyncio.create_task(use(pool, 0.5))
            other = asyncio.create_task(use(pool, 0.5))
            try:
                await user
                await asyncio.sleep(2)
                await use(pool)
            finally:
                user.cancel()
                await asyncio.wait([user, other])
                assert await asyncio.create_task(use(pool)) > 0
                assert counts(pool) == (0, 1, 0)

    assert cancel_at_every_step(scenario, arrange=lambda: Books(0.25), check=Books.balanced) > 10


def test_every_step_of_a_program_with_threads_can_be_cancelled() -> None:
    """What threads open for those who have left is closed too."""

    async def fails(pool: Pool[Thing]) -> None:
        with suppress(KeyError):
            async with pool.acquire():
                raise KeyError

    async def scenario(books: Books) -> None:
        bank = books.bank
        books.pool = Pool(bank.open_blocking, size=2, check=bank.check_blocking, close=bank.close_blocking)
        async with books.pool as pool:
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(use(pool))
                group.create_task(fails(pool))
            await asyncio.sleep(2)
            await use(pool)

    assert cancel_at_every_step(scenario, arrange=Books, check=Books.balanced) > 5


JOBS = st.lists(
    st.tuples(
        st.integers(0, 5),  # when it asks
        st.integers(0, 3),  # how long it works
        st.sampled_from(["well", "fails", "held"]),
        st.none() | st.integers(0, 8),  # when it is cancelled
    ),
    max_size=8,
)


@given(
    jobs=JOBS,
    size=st.integers(1, 3),
    latency=st.sampled_from([0, 1]),
    check=st.sampled_from([None, True, False]),
    idle_timeout=st.sampled_from([1, 3, None]),
    timeout=st.sampled_from([2, None]),
)
def test_no_order_of_events_loses_or_shares_a_resource(
    jobs: list[tuple[int, int, str, int | None]],
    size: int,
    latency: int,
    check: bool | None,
    idle_timeout: float | None,
    timeout: float | None,
) -> None:
    """Never more than `size`, one user at a time, all closed in the end, all places back."""
    bank = Bank(latency)
    bank.well = bool(check)

    async def job(pool: Pool[Thing], start: int, work: int, end: str) -> None:
        await asyncio.sleep(start)
        async with pool.acquire() as thing:
            with thing.used():
                await asyncio.sleep(work)
                if end == "held":
                    (lease,) = leases.get()
                    lease.hold()
                    asyncio.get_running_loop().call_later(2, lease.release)
                if end == "fails":
                    raise KeyError

    async def program() -> None:
        loop = asyncio.get_running_loop()
        async with Pool(
            bank.open,
            size=size,
            check=None if check is None else bank.check,
            idle_timeout=idle_timeout,
            timeout=timeout,
        ) as pool:
            tasks = []
            for start, work, end, cancelled_at in jobs:
                task = asyncio.create_task(job(pool, start, work, end))
                tasks.append(task)
                if cancelled_at is not None:
                    loop.call_later(cancelled_at, task.cancel)
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(answer) for answer in answers} <= {
                type(None), KeyError, AttemptTimeout, asyncio.CancelledError,
            }  # fmt: skip
        assert counts(pool) == (0, 0, 0)
        assert pool.statistics().made == pool.statistics().closed

    run_in_virtual_time(program())
    assert bank.alive == 0
    assert bank.most <= size


# --- real databases ---


ROWS = 40


def opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, check_same_thread=False, timeout=BOUND)


def rolled_back(connection: sqlite3.Connection) -> None:
    connection.rollback()
    connection.execute("select 1")


def insert(connection: sqlite3.Connection, number: int) -> str:
    with connection:
        connection.execute("insert into item values (?)", (number,))
    return threading.current_thread().name


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "items.db"
    connection = opened(path)
    with connection:
        connection.execute("create table item (number integer primary key)")
    connection.close()
    return path


def rows_in(path: Path) -> list[int]:
    connection = opened(path)
    try:
        return [number for (number,) in connection.execute("select number from item order by number")]
    finally:
        connection.close()


async def test_jobs_share_the_connections_of_a_blocking_driver(database: Path) -> None:
    """sqlite3: opened, used and closed in threads; every row arrives."""
    async with Pool(partial(opened, database), size=3, check=rolled_back) as pool, Executor() as executor:

        async def store(number: int) -> None:
            async with pool.acquire() as connection:
                await executor.to_thread(insert, connection, number)

        await executor.map(store, range(ROWS))
        seen = pool.statistics()
        assert 1 <= seen.made <= 3
        assert (seen.in_use, seen.idle) == (0, seen.made)
    assert pool.statistics().closed == seen.made
    assert rows_in(database) == list(range(ROWS))


async def test_the_check_ends_the_transaction_of_a_failed_block(database: Path) -> None:
    """At once: nobody inherits half of it, and nobody waits for its lock."""
    async with Pool(partial(opened, database), size=1, check=rolled_back) as pool, Executor() as executor:
        with pytest.raises(KeyError):
            async with pool.acquire() as connection:
                await executor.to_thread(connection.execute, "insert into item values (1)")
                raise KeyError
        await settled(pool)
        await executor.to_thread(insert_in_a_connection_of_its_own, database, 2)
        async with pool.acquire() as again:
            assert again is connection
            await executor.to_thread(insert, again, 3)
    assert rows_in(database) == [2, 3]


def insert_in_a_connection_of_its_own(path: Path, number: int) -> None:
    connection = opened(path)
    try:
        insert(connection, number)
    finally:
        connection.close()


async def test_a_query_whose_job_timed_out_keeps_its_connection(database: Path) -> None:
    """The thread is still within SQLite; the next job gets another connection only when that one is closed."""
    inside, go = threading.Event(), threading.Event()

    def wait() -> int:
        inside.set()
        go.wait(BOUND)
        return 1

    def opened_with_wait() -> sqlite3.Connection:
        connection = opened(database)
        connection.create_function("wait", 0, wait)
        return connection

    async with Pool(opened_with_wait, size=1) as pool, Executor() as executor:

        async def query() -> None:
            async with pool.acquire() as connection:
                await executor.to_thread(_one_value, connection, "select wait()")

        async def count() -> object:
            async with pool.acquire() as connection:
                return await executor.to_thread(_one_value, connection, "select count(*) from item")

        late = asyncio.create_task(query())
        await asyncio.to_thread(inside.wait, BOUND)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert pool.statistics().abandoned == 1
        waiting = asyncio.create_task(count())
        await asyncio.sleep(0)
        assert counts(pool) == (1, 0, 1)
        go.set()
        assert await waiting == 0
        assert pool.statistics().made == 2


def _one_value(connection: sqlite3.Connection, query: str) -> object:
    return connection.execute(query).fetchone()[0]


async def test_jobs_share_the_connections_of_an_async_driver(database: Path) -> None:
    """aiosqlite: each connection has a thread, which ends with it."""

    async def connect() -> aiosqlite.Connection:
        return await aiosqlite.connect(database, timeout=BOUND)

    async def check(connection: aiosqlite.Connection) -> None:
        await connection.rollback()

    async with Pool(connect, size=3, check=check) as pool, Executor() as executor:

        async def store(number: int) -> None:
            async with pool.acquire() as connection:
                await connection.execute("insert into item values (?)", (number,))
                if number == 7:
                    raise KeyError(number)
                await connection.commit()

        outcomes = await executor.as_completed(store, range(ROWS))
        assert [type(outcome.error) for outcome in outcomes if not outcome.ok] == [KeyError]
        await settled(pool)
        assert pool.statistics().made <= 3
    assert pool.statistics().closed == pool.statistics().made
    assert rows_in(database) == [number for number in range(ROWS) if number != 7]
