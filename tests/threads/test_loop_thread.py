"""A loop in a thread of its own: it is ready or says why not, and at its end it says so once."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from penstock import UsageError
from penstock.threads.loop_thread import LoopThread

BOUND = 10.0
"""Seconds after which a failed test gives up."""


class Kept:
    """A loop thread that runs until it is let go, and what it told of its end."""

    def __init__(self, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self.ends = list[BaseException | None]()
        self.thread = LoopThread("penstock-test-loop", self._main, self.ends.append, loop_factory)

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        self.thread.ready()
        await self._leave.wait()

    def end(self) -> None:
        """Let its main end, and wait for the thread."""
        self.thread.post(self._leave.set)
        self.thread.join(BOUND)
        assert not self.thread.is_alive()


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    begun(kept.thread)
    yield kept
    if kept.thread.is_alive():
        kept.end()


def begun(thread: LoopThread) -> None:
    """It has been started, and is ready; or raises why not."""
    thread.start()
    thread.wait_until_ready()


def made(
    main: Callable[[LoopThread], Coroutine[Any, Any, None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> tuple[LoopThread, list[BaseException | None]]:
    """A thread that is to run this; and what it will tell of its end."""
    ends = list[BaseException | None]()
    thread = LoopThread("penstock-test-loop", lambda: main(thread), ends.append, loop_factory)
    return thread, ends


def test_it_is_ready_when_the_loop_takes_callbacks(kept: Kept) -> None:
    """In the thread of that name, which keeps no interpreter from its exit."""
    threads = list[threading.Thread]()
    called = threading.Event()

    def callback() -> None:
        threads.append(threading.current_thread())
        called.set()

    assert kept.thread.post(callback)
    assert called.wait(BOUND)
    assert threads == [kept.thread]
    assert kept.thread.daemon
    assert kept.thread.name == "penstock-test-loop"
    assert kept.ends == []


def test_callbacks_come_in_their_order_on_the_loop(kept: Kept) -> None:
    numbers, complete = list[int](), threading.Event()
    for number in range(100):
        kept.thread.post(lambda number=number: numbers.append(number))  # type: ignore[misc]  # bound here
    kept.thread.post(complete.set)
    assert complete.wait(BOUND)
    assert numbers == list(range(100))


def test_over_is_told_once_when_main_has_ended(kept: Kept) -> None:
    """On the thread, when the loop is closed: nothing runs on it any more."""
    states = list[tuple[bool, bool]]()

    def over(error: BaseException | None) -> None:
        states.append((kept.loop.is_closed(), threading.current_thread() is kept.thread))
        kept.ends.append(error)

    kept.thread._over = over
    kept.end()
    assert kept.ends == [None]
    assert states == [(True, True)]


def test_what_is_posted_after_the_end_is_refused(kept: Kept) -> None:
    kept.end()
    called = list[int]()
    assert [kept.thread.post(lambda: called.append(1)) for _ in range(3)] == [False] * 3
    assert called == []
    assert kept.ends == [None], "and tells of no further end"


def test_over_is_told_of_a_loop_that_was_stopped_under_its_main(kept: Kept) -> None:
    kept.thread.post(kept.loop.stop)
    kept.thread.join(BOUND)
    (error,) = kept.ends
    assert isinstance(error, RuntimeError)
    assert "stopped" in str(error)
    assert kept.loop.is_closed()


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_over_is_told_of_what_main_raised_once_it_was_ready(kind: type[BaseException]) -> None:
    """Whatever it is: none may be lost in a thread that nobody looks at."""

    async def main(thread: LoopThread) -> None:
        thread.ready()
        raise kind("later")

    thread, ends = made(main)
    begun(thread)
    thread.join(BOUND)
    assert [type(error) for error in ends] == [kind]


def test_what_still_ran_when_main_ended_is_cancelled_before_over_is_told() -> None:
    steps, tasks = list[str](), list["asyncio.Task[None]"]()

    async def left_behind() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("cancelled")

    async def main() -> None:
        tasks.append(asyncio.create_task(left_behind()))
        await asyncio.sleep(0)
        thread.ready()

    thread = LoopThread("penstock-test-loop", main, lambda _error: steps.append("over"), None)
    begun(thread)
    thread.join(BOUND)
    assert steps == ["cancelled", "over"]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_the_wait_raises_what_main_raised_before_it_was_ready(kind: type[BaseException]) -> None:
    """The very object; and nobody is told of the end of what never was."""
    error = kind("at once")

    async def main(_thread: LoopThread) -> None:
        await asyncio.sleep(0)
        raise error

    thread, ends = made(main)
    with pytest.raises(kind) as caught:
        begun(thread)
    assert caught.value is error
    thread.join(BOUND)
    assert ends == []


def test_the_wait_raises_what_the_loop_factory_raised() -> None:
    """`main` is never called then."""
    called = list[int]()

    async def main(_thread: LoopThread) -> None:
        called.append(1)

    def factory() -> asyncio.AbstractEventLoop:
        raise OSError("no more files")

    thread, ends = made(main, factory)
    with pytest.raises(OSError, match="no more files"):
        begun(thread)
    thread.join(BOUND)
    assert called == []
    assert ends == []


def test_the_wait_refuses_a_loop_factory_that_makes_no_loop() -> None:
    async def main(_thread: LoopThread) -> None:
        raise AssertionError("there is no loop for it")

    thread, _ = made(main, lambda: "a loop")  # type: ignore[arg-type, return-value]  # the point of the test
    with pytest.raises(UsageError, match="expected a new event loop"):
        begun(thread)
    thread.join(BOUND)


def test_the_loop_is_the_one_that_the_factory_makes() -> None:
    made = list[asyncio.AbstractEventLoop]()

    def factory() -> asyncio.AbstractEventLoop:
        made.append(asyncio.SelectorEventLoop())
        return made[-1]

    kept = Kept(factory)
    begun(kept.thread)
    kept.end()
    assert made == [kept.loop]
    assert kept.loop.is_closed()


def test_several_may_wait_until_it_is_ready() -> None:
    """Each is told, also of an error: the loop may have been needed by several threads at once."""

    async def main(_thread: LoopThread) -> None:
        assert go.wait(BOUND)
        raise ValueError("at once")

    go = threading.Event()
    thread, _ = made(main)
    thread.start()
    told = list[str]()

    def wait() -> None:
        with pytest.raises(ValueError, match="at once"):
            thread.wait_until_ready()
        told.append("told")

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for each in waiting:
        each.start()
    go.set()
    for each in waiting:
        each.join(BOUND)
    assert told == ["told"] * 3
    thread.join(BOUND)
