"""Futures that know who waits for them: the standard library's to everybody else, and no error is lost in silence."""

import asyncio
import concurrent.futures
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from penstock import WrongThread
from penstock.threads.future import Waiters, WatchedFuture
from penstock.threads.lane import Lane
from penstock.threads.loop_thread import LoopThread
from penstock.threads.workers import Worker, Workers

BOUND = 10.0
"""Seconds after which a failed test gives up."""

SHORT = 0.02
"""Seconds for which a test waits in vain on purpose."""

Wait = Callable[[Future[Any]], Any]


class Watched(WatchedFuture[Any]):
    """A future of something that needs no thread."""

    @property
    def subject(self) -> str:
        return "my job"


def by_result(future: Future[Any]) -> Any:
    return future.result(BOUND)


def by_exception(future: Future[Any]) -> Any:
    assert future.exception(BOUND) is None
    return future.result()


def by_wait(future: Future[Any]) -> Any:
    done, not_done = concurrent.futures.wait([future], BOUND)
    assert (done, not_done) == ({future}, set())
    return future.result()


def by_as_completed(future: Future[Any]) -> Any:
    (done,) = concurrent.futures.as_completed([future], BOUND)
    assert done is future
    return future.result()


each_way = pytest.mark.parametrize("wait", [by_result, by_exception, by_wait, by_as_completed])


@pytest.fixture
def lane() -> Iterator[Lane]:
    """A lane of one thread, which needs no loop any more."""

    async def make() -> Lane:
        return Lane("test", 1)

    lane = asyncio.run(make())
    yield lane
    lane.close()


@pytest.fixture
def loop_thread() -> Iterator[Callable[[Callable[[], object]], object]]:
    """Calls something on the thread of a bridge's loop, and gives its value or raises its error."""
    leave = list[Callable[[], object]]()

    async def main() -> None:
        event = asyncio.Event()
        leave.append(event.set)
        thread.ready()
        await event.wait()

    def call(fn: Callable[[], object]) -> object:
        def answer() -> None:
            try:
                value.set_result(fn())
            except BaseException as error:  # noqa: BLE001  # it belongs to the test
                value.set_exception(error)

        value = Future[object]()
        thread.post(answer)
        return value.result(BOUND)

    thread = LoopThread("penstock-test-loop", main, lambda _error: None, None)
    thread.start()
    thread.wait_until_ready()
    yield call
    thread.post(leave[0])
    thread.join(BOUND)


def finish(*futures: Future[Any]) -> None:
    for number, future in enumerate(futures):
        future.set_result(number)


def done_soon(future: Future[Any], value: object = "value") -> threading.Timer:
    """It is done by another thread while somebody waits."""
    timer = threading.Timer(SHORT, future.set_result, [value])
    timer.start()
    return timer


# --- as in the standard library ---


@each_way
def test_a_thread_that_is_nobodys_waits_as_ever(wait: Wait) -> None:
    future = Watched()
    timer = done_soon(future)
    assert wait(future) == "value"
    assert wait(future) == "value", "a second time, when it is done"
    timer.join()


@each_way
def test_the_main_thread_waits_for_a_call_in_a_thread(lane: Lane, wait: Wait) -> None:
    go = threading.Event()
    timer = threading.Timer(SHORT, go.set)
    timer.start()
    assert wait(lane.submit(go.wait, BOUND)) is True
    timer.join()


def test_waiting_in_vain_ends_by_the_standard_librarys_errors() -> None:
    future = Watched()
    with pytest.raises(TimeoutError):
        future.result(0)
    with pytest.raises(TimeoutError):
        future.exception(0)
    assert concurrent.futures.wait([future], 0).not_done == {future}
    with pytest.raises(TimeoutError):
        list(concurrent.futures.as_completed([future], 0))
    assert future.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    with pytest.raises(concurrent.futures.CancelledError):
        future.exception()


def test_an_error_is_raised_or_given_as_it_is() -> None:
    error = ValueError("mine")
    future = Watched()
    future.set_exception(error)
    with pytest.raises(ValueError) as caught:
        future.result()
    assert caught.value is error
    assert future.exception() is error


def test_futures_of_all_kinds_are_waited_for_together(lane: Lane) -> None:
    """The standard library's own, that of a job and that of a call, in one `wait` and one `as_completed`."""
    go = threading.Event()
    plain, watched = Future[Any](), Watched()
    futures: list[Future[Any]] = [plain, watched, lane.submit(go.wait, BOUND)]
    threading.Timer(0, finish, [plain, watched]).start()
    timer = threading.Timer(SHORT, go.set)
    timer.start()
    assert concurrent.futures.wait(futures, BOUND).not_done == set()
    assert set(concurrent.futures.as_completed(futures, BOUND)) == set(futures)
    timer.join()


def test_futures_of_all_kinds_are_waited_for_together_in_a_thread_of_the_lane(lane: Lane) -> None:
    """Another thread stands in for it meanwhile, whichever of them comes first in the list."""

    def outer(order: int) -> int:
        plain, watched = Future[Any](), Watched()
        inner = lane.submit(finish, plain, watched)
        futures: list[Future[Any]] = [plain, watched, inner]
        futures = futures[order:] + futures[:order]
        seen = list(concurrent.futures.as_completed(futures, BOUND))
        return len(concurrent.futures.wait(futures, BOUND).done) + len(seen)

    assert [lane.submit(outer, order).result(BOUND) for order in range(3)] == [6, 6, 6]


# --- in a thread that works for a lane ---


@each_way
def test_a_thread_of_the_lane_that_waits_is_stood_in_for(lane: Lane, wait: Wait) -> None:
    """The only thread of the lane waits for what the lane is to do."""
    assert lane.submit(lambda: wait(lane.submit(pow, 2, 5))).result(BOUND) == 32
    assert (lane._standing, lane._wanted) == (0, {})


@each_way
def test_a_thread_that_waits_for_what_is_done_troubles_nobody(
    lane: Lane, wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[object]()
    monkeypatch.setattr(lane, "stand_in", told.append)
    done = Watched()
    done.set_result("value")
    assert lane.submit(wait, done).result(BOUND) == "value"
    assert told == []


def test_waiting_in_vain_in_a_thread_of_the_lane_ends_too(lane: Lane) -> None:
    """And it is not counted as one that waits when it goes on."""

    def outer() -> list[str]:
        future, seen = Watched(), list[str]()
        for wait in (future.result, future.exception):
            try:
                wait(0.001)
            except TimeoutError:
                seen.append(wait.__name__)
        assert concurrent.futures.wait([future], 0.001).not_done == {future}
        return [*seen, str(lane._standing)]

    assert lane.submit(outer).result(BOUND) == ["result", "exception", "0"]


@each_way
def test_a_thread_of_the_set_that_works_for_no_lane_waits_as_ever(wait: Wait) -> None:
    class Task:
        def __call__(self, worker: Worker) -> None:
            worker.call = self
            values.append(wait(future))
            worker.call = None

        def land(self) -> None:
            landed.set()

        def thread_name(self, number: int) -> str:
            return f"penstock-mine_{number}"

    workers, values, landed, future = Workers(1), list[Any](), threading.Event(), Watched()
    assert workers.take_nowait()
    workers.run(Task())
    timer = done_soon(future)
    assert landed.wait(BOUND)
    assert values == ["value"]
    timer.join()
    workers.dismiss()
    for worker in workers.threads:
        worker.join(BOUND)


# --- on the thread of a bridge's loop ---


@pytest.mark.parametrize(
    ("wait", "named"),
    [
        (by_result, "future.result()"),
        (by_exception, "future.exception()"),
        (by_wait, "concurrent.futures.wait()"),
        (by_as_completed, "as_completed()"),
    ],
)
def test_waiting_on_the_thread_of_a_bridges_loop_is_refused(
    loop_thread: Callable[[Callable[[], object]], object], wait: Wait, named: str
) -> None:
    """It would wait for ever; the message says what to write."""
    future = Watched()
    with pytest.raises(WrongThread) as caught:
        loop_thread(lambda: wait(future))
    assert named in str(caught.value)
    assert "await asyncio.wrap_future(future)" in str(caught.value)
    future.set_result("value")
    assert loop_thread(lambda: wait(future)) == "value", "what is done is not waited for"


async def test_a_coroutine_awaits_it_by_wrap_future(lane: Lane) -> None:
    assert await asyncio.wrap_future(lane.submit(pow, 2, 5)) == 32


async def test_the_thread_of_another_loop_may_block_itself(lane: Lane) -> None:
    """As with any future: it is its own affair, and the bridge's loop goes on."""
    assert lane.submit(pow, 2, 5).result(BOUND) == 32


# --- the inside of the standard library ---


def test_waiters_of_another_standard_library_are_left_alone() -> None:
    """Those without an event, and those with one of their own kind: they wait as they always did."""

    class OwnEvent(threading.Event):
        pass

    class Waiter:
        def __init__(self, event: object) -> None:
            self.event = event

    waiters, own = Waiters(), OwnEvent()
    without, with_own = object(), Waiter(own)
    waiters.append(without)
    waiters.append(with_own)
    assert waiters == [without, with_own]
    assert with_own.event is own


def test_the_standard_library_installs_its_waiters_where_they_are_looked_for() -> None:
    """If this fails on a new Python, `wait` and `as_completed` in a thread of a lane are not stood in for there."""
    seen = list[Any]()

    class Watching(Waiters):
        def append(self, waiter: Any) -> None:
            super().append(waiter)
            seen.append(waiter)

    future = Watched()
    watching = Watching()
    watching.future = future
    future._waiters = watching
    concurrent.futures.wait([future], 0)
    assert [type(waiter.event).__module__ for waiter in seen] == ["penstock.threads.future"]


# --- errors that nobody asked for ---


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    gc.collect()
    return [record.getMessage() for record in caplog.records if record.name == "penstock.jobs"]


def test_an_error_that_nobody_asked_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """When its future is thrown away, with the error; by what the future is called."""
    future = Watched()
    future.set_exception(ValueError("lost"))
    assert logged(caplog) == []
    del future
    assert logged(caplog) == ["my job failed, and nobody asked its future for the error"]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert repr(record.exc_info[1]) == "ValueError('lost')"


def test_an_error_of_a_call_that_nobody_asked_for_is_logged_by_its_function(
    lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    def careless() -> None:
        raise ValueError("lost")

    lane.submit(careless)
    lane.submit(int).result(BOUND)
    assert [message.split()[0].split(".")[-1] for message in logged(caplog)] == ["careless"]


def ask_by_result(future: Future[Any]) -> None:
    with pytest.raises(ValueError):
        future.result(BOUND)


def ask_by_exception(future: Future[Any]) -> None:
    assert isinstance(future.exception(BOUND), ValueError)


def ask_in_a_callback(future: Future[Any]) -> None:
    seen = list[BaseException | None]()
    future.add_done_callback(lambda done: seen.append(done.exception()))
    concurrent.futures.wait([future], BOUND)


def ask_by_await(future: Future[Any]) -> None:
    async def main() -> None:
        with pytest.raises(ValueError):
            await asyncio.wrap_future(future)

    asyncio.run(main())


@pytest.mark.parametrize("ask", [ask_by_result, ask_by_exception, ask_in_a_callback, ask_by_await])
@pytest.mark.parametrize("first", ["asked", "failed"])
def test_an_error_that_somebody_asked_for_is_not_logged(
    ask: Callable[[Future[Any]], None], first: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether they asked when it had failed already, or waited for it."""
    future = Watched()
    if first == "failed":
        future.set_exception(ValueError("seen"))
        ask(future)
    else:
        timer = threading.Timer(SHORT, future.set_exception, [ValueError("seen")])
        timer.start()
        ask(future)
        timer.join()
        del timer
    del future
    assert logged(caplog) == []


def test_an_error_that_came_after_somebody_stopped_waiting_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """They have not seen it."""
    future = Watched()
    with pytest.raises(TimeoutError):
        future.result(0)
    with pytest.raises(TimeoutError):
        future.exception(0)
    future.set_exception(ValueError("lost"))
    del future
    assert len(logged(caplog)) == 1


def test_neither_a_value_nor_a_cancellation_nor_no_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        futures = [Watched(), Watched(), Watched()]
        futures[0].set_result(1)
        futures[1].cancel()
        futures[2].set_exception(None)
        futures.clear()
        assert logged(caplog) == []


def test_a_future_of_a_kind_without_a_name_is_told_of_too(caplog: pytest.LogCaptureFixture) -> None:
    WatchedFuture[int]().set_exception(ValueError("lost"))
    assert logged(caplog) == ["something failed, and nobody asked its future for the error"]
