"""A loop of one's own: what it gives back, what it refuses, and that it is gone when the call is over."""

import asyncio
import contextvars
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from penstock import UsageError
from penstock.testing import VirtualClockLoop
from penstock.threads.own_loop import _OwnThread, check_loop_factory, run_in_own_thread, run_on_own_loop

BOUND = 20.0
"""Seconds after which what should have happened is not waited for any more."""

LEFT_BEHIND = (
    "the run goes on after it was cancelled; it is left behind in its thread, and ends with the program if not before"
)

run_anywhere = pytest.mark.parametrize("run", [run_on_own_loop, run_in_own_thread], ids=["here", "own thread"])


async def nothing() -> None: ...


class Remembered(asyncio.SelectorEventLoop):
    """A loop that a test can find again."""

    made: list[asyncio.AbstractEventLoop]

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)


class Swallower:
    """Leaves a task behind that cannot be cancelled."""

    def __init__(self) -> None:
        self.swallowed = 0
        self._task: asyncio.Task[None] | None = None

    async def leave_behind(self) -> asyncio.AbstractEventLoop:
        self._task = asyncio.create_task(self._go_on())
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    async def _go_on(self) -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.swallowed += 1


@pytest.fixture(autouse=True)
def _made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every loop that was made here has to be closed."""
    monkeypatch.setattr(Remembered, "made", [], raising=False)
    yield
    assert all(loop.is_closed() for loop in Remembered.made)


# --- both of them ---


@run_anywhere
@pytest.mark.parametrize("factory", [None, Remembered])
def test_what_the_coroutine_returns_comes_back_and_its_loop_is_closed(run: Callable[..., Any], factory: Any) -> None:
    async def main() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    loop = run(main, patience=BOUND, loop_factory=factory)
    assert loop.is_closed()
    assert isinstance(loop, Remembered) == (factory is Remembered)


@run_anywhere
def test_what_the_coroutine_raises_comes_with_its_traceback(run: Callable[..., Any]) -> None:
    async def break_here() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="^mine$") as raised:
        run(break_here, patience=BOUND, loop_factory=Remembered)
    assert "break_here" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert Remembered.made


@run_anywhere
def test_it_runs_in_the_context_of_whoever_calls(run: Callable[..., Any]) -> None:
    """And what it sets there stays there, as under `asyncio.run`."""
    variable = contextvars.ContextVar("variable", default="nothing")
    token = variable.set("mine")

    async def main() -> str:
        found = variable.get()
        variable.set("the loop's")
        return found

    try:
        assert run(main, patience=BOUND) == "mine"
        assert variable.get() == "mine"
    finally:
        variable.reset(token)


@run_anywhere
def test_several_threads_may_call_at_once(run: Callable[..., Any]) -> None:
    """Each has a loop of its own, and all are there at the same time."""
    barrier = threading.Barrier(4, timeout=BOUND)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        barrier.wait()

    callers = [threading.Thread(target=run, args=(main,), kwargs={"patience": BOUND}) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(BOUND)
    assert len(set(loops)) == 4
    assert all(loop.is_closed() for loop in loops)


@run_anywhere
def test_what_was_left_running_is_cancelled_and_cleans_up(run: Callable[..., Any]) -> None:
    ended: list[str] = []

    async def linger() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async def main() -> asyncio.Task[None]:
        return asyncio.create_task(linger())

    assert run(main, patience=BOUND).cancelled()
    assert ended == ["cleaned up"]


@run_anywhere
@pytest.mark.parametrize("factory", [None, Remembered])
@pytest.mark.may_leave("errors")  # asyncio tells that the task was pending when it was destroyed
def test_what_swallows_its_cancellation_is_destroyed(run: Callable[..., Any], factory: Any) -> None:
    """`asyncio.run` would wait for it for ever."""
    swallower = Swallower()
    assert run(swallower.leave_behind, patience=0.01, loop_factory=factory).is_closed()
    assert swallower.swallowed == 1


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "left behind"])
@pytest.mark.may_leave("errors")  # as above
def test_a_loop_that_is_set_in_this_thread_stays_where_a_factory_is_given(ends: bool) -> None:
    """`asyncio.Runner` sets a loop, and unsets it, only where it was not told which."""
    swallower = Swallower()
    mine = asyncio.new_event_loop()
    asyncio.set_event_loop(mine)
    try:
        run_on_own_loop(nothing if ends else swallower.leave_behind, patience=0.01, loop_factory=Remembered)
        assert asyncio.get_event_loop_policy().get_event_loop() is mine
    finally:
        asyncio.set_event_loop(None)
        mine.close()


# --- whose loop ---


async def make_loop() -> None: ...


@run_anywhere
@pytest.mark.parametrize("what", ["nothing at all", "a policy", "a closed loop", "a running loop"])
def test_a_factory_that_makes_no_new_loop_is_refused(run: Callable[..., Any], what: str) -> None:
    closed, running = asyncio.new_event_loop(), asyncio.new_event_loop()
    closed.close()
    made = {
        "nothing at all": None,
        "a policy": asyncio.DefaultEventLoopPolicy(),
        "a closed loop": closed,
        "a running loop": running,
    }[what]

    def factory() -> Any:
        return made

    async def main() -> None:
        with pytest.raises(UsageError, match=r"factory returned .*: expected a new event loop each time"):
            await asyncio.to_thread(run, nothing, patience=BOUND, loop_factory=factory)

    try:
        running.run_until_complete(main())
        running.run_until_complete(running.shutdown_default_executor())
        assert not running.is_closed()
    finally:
        running.close()


@run_anywhere
def test_what_the_factory_raises_comes_through(run: Callable[..., Any]) -> None:
    def factory() -> asyncio.AbstractEventLoop:
        raise OSError("too many open files")

    with pytest.raises(OSError, match="too many open files"):
        run(nothing, patience=BOUND, loop_factory=factory)


def test_what_can_be_no_factory_is_refused_before_anything_begins() -> None:
    """A loop itself is what one writes by mistake."""
    for good in (None, asyncio.new_event_loop, VirtualClockLoop, lambda: asyncio.new_event_loop()):
        check_loop_factory(good)
    for bad in ("uvloop", True, 3, make_loop):
        with pytest.raises(UsageError, match="expected a function that makes a new event loop, such as"):
            check_loop_factory(bad)
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(UsageError, match=r"^loop_factory=<.*>: expected a function .* Write it without `\(\)`.$"):
            check_loop_factory(loop)
    finally:
        loop.close()


def test_a_loop_in_virtual_time_will_do() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(3600)
        return loop.time() - began

    assert run_on_own_loop(main, patience=BOUND, loop_factory=VirtualClockLoop) == 3600


# --- a thread of its own ---


class Alarm(Exception):
    """What a handler of these tests raises."""


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    def raise_it(_number: int, _frame: FrameType | None) -> None:
        raise Alarm

    before = signal.signal(signal.SIGUSR1, raise_it)
    yield
    signal.signal(signal.SIGUSR1, before)


def alarm() -> None:
    """From another thread: send the main one the signal."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def our_thread() -> threading.Thread:
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "penstock-run")
    return thread


async def test_it_works_above_a_running_loop() -> None:
    """Which waits meanwhile. The thread has ended when the call has."""

    async def main() -> threading.Thread:
        return threading.current_thread()

    thread = run_in_own_thread(main, patience=BOUND)
    assert (thread.name, thread.daemon, thread.is_alive()) == ("penstock-run", True, False)


def test_it_may_take_longer_than_a_slice_of_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.threads.own_loop.SLICE", 0.001)

    async def main() -> str:
        await asyncio.sleep(0.02)
        return "value"

    assert run_in_own_thread(main, patience=BOUND) == "value"


def test_handlers_of_signals_run_while_the_main_thread_waits() -> None:
    heard = threading.Event()

    async def main() -> bool:
        alarm()
        return heard.wait(BOUND)

    before = signal.signal(signal.SIGUSR1, lambda *_: heard.set())
    try:
        assert run_in_own_thread(main, patience=BOUND)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_a_handler_raises_cancels_and_comes_when_all_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def main() -> None:
        try:
            alarm()
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    with pytest.raises(Alarm):
        run_in_own_thread(main, patience=BOUND, loop_factory=Remembered)
    assert ended == ["cleaned up"]
    assert Remembered.made[0].is_closed()
    assert not caplog.records


def test_what_does_not_end_then_is_left_behind_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """Here because it blocks its loop."""
    released = threading.Event()
    threads: list[threading.Thread] = []

    async def main() -> None:
        threads.append(our_thread())
        alarm()
        released.wait(BOUND)

    try:
        with pytest.raises(Alarm):
            run_in_own_thread(main, patience=0.01)
        assert threads[0].is_alive()
    finally:
        released.set()
    threads[0].join(BOUND)
    assert [record.getMessage() for record in caplog.records] == [LEFT_BEHIND]


def test_another_signal_does_not_wait_any_longer(caplog: pytest.LogCaptureFixture) -> None:
    """The first error is its context."""
    released = threading.Event()
    threads: list[threading.Thread] = []

    async def main() -> None:
        threads.append(our_thread())
        try:
            alarm()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            alarm()
            released.wait(BOUND)

    try:
        with pytest.raises(Alarm) as raised:
            run_in_own_thread(main, patience=3600)
        assert isinstance(raised.value.__context__, Alarm)
    finally:
        released.set()
    threads[0].join(BOUND)
    assert [record.getMessage() for record in caplog.records] == [LEFT_BEHIND]


def test_an_error_when_all_has_ended_waits_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The last moment: the wait is over, and the call has not returned."""
    thread = _OwnThread(nothing, patience=3600, loop_factory=None)
    thread.start()
    thread.wait()
    thread.cancel()
    thread.join(BOUND)
    assert not caplog.records


def test_a_thread_that_cannot_be_started_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_OwnThread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_in_own_thread(nothing, patience=3600)
    assert not caplog.records


def test_an_error_before_there_is_a_loop_lets_nothing_begin() -> None:
    released = threading.Event()
    threads: list[threading.Thread] = []
    begun: list[str] = []

    async def main() -> None:
        begun.append("main")

    def factory() -> asyncio.AbstractEventLoop:
        threads.append(our_thread())
        alarm()
        released.wait(BOUND)
        return Remembered()

    try:
        with pytest.raises(Alarm):
            run_in_own_thread(main, patience=0.01, loop_factory=factory)
    finally:
        released.set()
    threads[0].join(BOUND)
    assert not begun


def test_an_error_after_the_loop_was_closed_finds_nothing_to_cancel() -> None:
    released = threading.Event()
    threads: list[threading.Thread] = []

    class Lingering(Remembered):
        def close(self) -> None:
            super().close()
            threads.append(our_thread())
            alarm()
            released.wait(BOUND)

    try:
        with pytest.raises(Alarm):
            run_in_own_thread(nothing, patience=0.01, loop_factory=Lingering)
    finally:
        released.set()
    threads[0].join(BOUND)
