"""A standard library future that knows when a thread waits for it.

    result(), exception(), concurrent.futures.wait(), as_completed()
        on the thread of a bridge's loop         -> WrongThread, instead of a hang
        in a thread that works for a lane        -> the lane is told, and a further thread stands in for this one
        anywhere else                            -> as ever

`wait` and `as_completed` put a waiter of theirs into the future's list of waiters and then wait for its event: so that
list gives it an event that does the above. It is the only place where the inside of the standard library is touched.
CPython 3.8 to 3.14 have it alike; where a later one does not, these two wait as they always did.

A future that failed and is thrown away before anybody asked for its error says so in the log, as asyncio's do.

Threads: any.
"""

import asyncio
import logging
import threading
import traceback
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from penstock.errors import WrongThread
from penstock.threads.loop_thread import LoopThread
from penstock.threads.workers import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from penstock.threads.call import Call

T = TypeVar("T")

DONE = frozenset({"CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED"})
"""The states of a future that is done, as `Future.done` has them, which takes a lock; here it is only a short cut."""

logger = logging.getLogger("penstock.jobs")


@runtime_checkable
class Lender(Protocol):
    """Who has further threads for those of its own that wait."""

    def stand_in(self, wanted: "Sequence[Call | None]") -> "Callable[[], None]":
        """One of its threads is about to wait for these calls, None is for a job; what is returned ends that."""
        ...


class WatchedFuture(Future[T]):
    """A future of which it is known when a thread waits for it."""

    _unseen: "_Unseen | None" = None
    _disregarded: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._waiters = waiters = Waiters()
        waiters.future = self

    @property
    def subject(self) -> str:
        """What messages call that which it is the future of."""
        return "something"

    @property
    def wanted(self) -> "Call | None":
        """The call in a thread that it is the future of; None of a job, and of a call that is over."""
        return None

    def result(self, timeout: float | None = None) -> T:
        """As in the standard library.

        Raises:
            WrongThread: it is not done, and this is the thread of a bridge's loop.
            DeadlockError: it is not done, all threads wait, and none is left to stand in for this one.
        """
        lender = None if self._state in DONE else _lender("future.result()", timeout)
        go_on = None if lender is None else lender.stand_in(_wanted([self]))
        try:
            return Future.result(self, timeout)
        finally:
            if go_on is not None:
                go_on()
            if self._unseen is not None:
                self._unseen.error = None
            del self  # the error's traceback holds this frame: a cycle

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As in the standard library; raises as `result` does."""
        lender = None if self._state in DONE else _lender("future.exception()", timeout)
        go_on = None if lender is None else lender.stand_in(_wanted([self]))
        try:
            return Future.exception(self, timeout)
        finally:
            if go_on is not None:
                go_on()
            if self._unseen is not None:
                self._unseen.error = None
            del self  # the error's traceback holds this frame: a cycle

    def __await__(self) -> "Generator[Any, Any, T]":
        """Wait for it in a coroutine, on any loop, as `asyncio.wrap_future` does: cancelling the wait cancels it."""
        return asyncio.wrap_future(self).__await__()

    def disregard(self) -> None:
        """Nobody is going to ask for its error, and that is as it should be."""
        self._disregarded = True
        if self._unseen is not None:
            self._unseen.error = None

    def let_go(self) -> None:
        """It is done: break the cycle. By who has made it so."""
        self._waiters.future = None  # type: ignore[attr-defined]  # ours, which the standard library does not know

    def set_exception(self, exception: BaseException | None) -> None:
        """As in the standard library."""
        if exception is not None and not self._disregarded:
            self._unseen = _Unseen(self.subject, exception)
        super().set_exception(exception)


class _Unseen:
    """An error that nobody has asked for yet."""

    __slots__ = ("error", "subject")

    def __init__(self, subject: str, error: BaseException) -> None:
        self.subject = subject
        self.error: BaseException | None = error

    def __del__(self) -> None:
        error = self.error
        if error is None or not logger.isEnabledFor(logging.ERROR):
            return
        record = logger.makeRecord(
            logger.name, logging.ERROR, __file__, 0, "%s failed, and nobody asked its future for the error",
            (self.subject,), (type(error), error, error.__traceback__),
        )  # fmt: skip
        # The garbage collector may have come in the midst of a compilation, and what a traceback is adorned with is
        # compiled: CPython 3.11 does not stand that (SystemError in whatever was compiled).
        frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__))
        record.exc_text = "".join(
            ["Traceback (most recent call last):\n", *frames.format(), *traceback.format_exception_only(error)]
        ).rstrip()
        logger.handle(record)


class Waiters(list[Any]):
    """The waiters of a future: objects of the standard library, each with an event that a thread is to wait for."""

    __slots__ = ("future",)

    future: "WatchedFuture[Any] | None"
    """Whose they are, until it is done: a cycle, for as long as it is waited for. Set from outside, to spare a call."""

    def append(self, waiter: Any) -> None:
        event = getattr(waiter, "event", None)
        if type(event) is threading.Event:
            event = waiter.event = _Event()
        if type(event) is _Event and self.future is not None:
            event.futures.append(self.future)
        super().append(waiter)


class _Event(threading.Event):
    """What `wait` and `as_completed` wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.futures: list[WatchedFuture[Any]] = []

    def wait(self, timeout: float | None = None) -> bool:
        lender = None if self.is_set() else _lender("concurrent.futures.wait() or as_completed()", timeout)
        if lender is None:
            return super().wait(timeout)
        go_on = lender.stand_in(_wanted(self.futures))
        try:
            return super().wait(timeout)
        finally:
            go_on()


def _wanted(futures: "Iterable[WatchedFuture[Any]]") -> "list[Call | None]":
    """What has to run for these to be done."""
    return [future.wanted for future in futures if not future.done()]


def _lender(what: str, timeout: float | None) -> Lender | None:
    """Who is to be told that this thread waits."""
    if timeout is not None and timeout <= 0:
        return None  # it does not
    thread = threading.current_thread()
    if isinstance(thread, Worker):
        home = getattr(thread.call, "home", None)
        return home if isinstance(home, Lender) else None
    if isinstance(thread, LoopThread):
        raise WrongThread(
            f"{what} was called on the thread of a bridge's event loop, which cannot go on while it is blocked. In a "
            f"coroutine, write `await asyncio.wrap_future(future)`."
        )
    return None
