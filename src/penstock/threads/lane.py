"""A lane: threads for one kind of blocking call, entered from the loop.

    await lane.call(fn, ...)      loop: permit -> run_in_executor -> thread: fn, in the caller's context
                                  thread: call has really ended -> permit back -> loop: caller goes on

Guarantees: never more than `limit` threads are busy, however many callers gave up waiting, because the permit comes
back from the *concurrent* future's callback, when the thread has really ended, and not when the caller stops waiting.
A call that is cancelled before its thread starts never starts. Context variables go into the thread. What would end
more than the call (`StopIteration`, `SystemExit`, `KeyboardInterrupt`) comes back as an error. A lane that is closed
wakes whoever waits for it; a thread that hangs keeps neither the close nor the interpreter's exit waiting.

The threads are private, since the loop's default executor also resolves DNS and must never be full of our calls, and
daemons, which those of a `ThreadPoolExecutor` are not: the interpreter would wait for a call that nobody waits for.
Which calls may be killed by its exit are thus the abandoned ones, and no others.

`call` and `close` belong to the loop thread; `submit` is for `run_in_executor`. Workers know the queue and not the
lane. Only the loop thread counts: a permit that is back means a worker that is idle or about to be, so a call needs a
new thread exactly when all there are have a call.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Executor as FuturesExecutor
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar, cast

from penstock.callables import name_of
from penstock.context import current_job
from penstock.errors import ClosedError
from penstock.outcome import contained

T = TypeVar("T")

_Work: TypeAlias = tuple[Future[Any], Callable[["_Call"], Any], "_Call"]


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """A lane as it was at the time of asking."""

    limit: int
    busy: int
    """Calls that have a thread, abandoned ones included."""
    waiting: int
    """Callers that wait for a thread."""
    abandoned: int
    """Calls whose caller stopped waiting and whose thread still runs."""
    calls: int
    """Calls that have got a thread so far."""


class Lane(FuturesExecutor):
    """At most `limit` threads for blocking calls, made when they are needed."""

    def __init__(self, name: str, limit: int) -> None:
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._threads = 0
        self._name = name
        self._limit = limit
        self._permits = asyncio.Semaphore(limit)
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._busy = self._waiting = self._abandoned = self._calls = 0

    async def call(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run `fn(*args, **kwargs)` in a thread of this lane and return its value.

        **Cancellation**: a call that waits for a thread is given up; one that runs is abandoned: the caller goes on at
        once, the thread cannot be stopped and keeps its permit until it ends.

        Raises:
            ClosedError: the lane is closed.
            Exception: what `fn` raised.
        """
        job = current_job()
        asked = self._loop.time()
        self._waiting += 1
        try:
            await self._permits.acquire()
        finally:
            self._waiting -= 1
            if job is not None:
                job.waited += self._loop.time() - asked
        if self._closed:
            self._permits.release()  # for the next one that waits
            raise ClosedError(f"{name_of(fn)} was to run in a thread, but its executor has been shut down.")
        call = _Call(fn, args, kwargs)
        try:
            return cast("T", await self._loop.run_in_executor(self, contextvars.copy_context().run, call))
        except asyncio.CancelledError:
            if not call.ended:
                call.abandoned = True
                self._abandoned += 1
            raise

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """For `run_in_executor` alone, which calls it on the loop thread with the permit already taken."""
        (call,) = args
        future: Future[T] = Future()
        try:
            if self._busy == self._threads:
                self._add_thread((future, fn, call))
            else:
                self._work.put((future, fn, call))
        except BaseException:
            self._permits.release()
            raise
        self._busy += 1
        self._calls += 1
        future.add_done_callback(partial(self._ended, call))
        return future

    def close(self) -> None:
        """Take no more calls, refuse those that wait, and let threads end. Never blocks. Closing twice is fine."""
        self._closed = True
        self._permits.release()
        self._dismiss()

    def __del__(self) -> None:
        self._dismiss()

    def statistics(self) -> LaneStatistics:
        """How busy the lane is."""
        return LaneStatistics(self._limit, self._busy, self._waiting, self._abandoned, self._calls)

    def _add_thread(self, first: _Work) -> None:
        # Its first call is handed over: in the queue it would stay behind if no thread could be started.
        name = f"penstock-{self._name}_{self._threads}"
        threading.Thread(target=_work, args=([first], self._work), name=name, daemon=True).start()
        self._threads += 1

    def _dismiss(self) -> None:
        # Takes no lock that a garbage collection might find held: SimpleQueue.put may be called in a finalizer.
        while self._threads:
            self._threads -= 1
            self._work.put(None)

    def _ended(self, call: "_Call", _future: Future[Any]) -> None:
        # In the worker thread, or in whichever thread cancelled the call. A loop that is closed needs no permit back.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._give_back, call)

    def _give_back(self, call: "_Call") -> None:
        call.ended = True
        self._abandoned -= call.abandoned
        self._busy -= 1
        self._permits.release()


class _Call:
    """One blocking call. The flags belong to the loop thread."""

    __slots__ = ("abandoned", "args", "ended", "fn", "kwargs")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.ended = False
        self.abandoned = False

    def __call__(self) -> Any:
        try:
            return self.fn(*self.args, **self.kwargs)
        except BaseException as error:  # noqa: BLE001  # it belongs to who waits for the call
            harmless = contained(error, name_of(self.fn))
            try:
                if harmless is error:
                    raise
                raise harmless from harmless.__cause__
            finally:
                del harmless  # its traceback holds this frame: a cycle


def _work(first: list[_Work], calls: "SimpleQueue[_Work | None]") -> None:
    """What a worker thread does: run calls until it is told to end."""
    work: _Work | None = first.pop()  # nothing of a call may stay alive while the thread is idle
    while work is not None:
        _run(*work)
        del work
        work = calls.get()


def _run(future: Future[Any], fn: Callable[["_Call"], Any], call: "_Call") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = fn(call)
    except BaseException as error:  # noqa: BLE001  # it belongs to who waits for the call
        future.set_exception(error)
        del future  # its exception's traceback holds this frame: a cycle
    else:
        future.set_result(value)
