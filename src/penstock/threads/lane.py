"""A lane: threads for one kind of blocking call, entered from the loop.

    await lane.call(fn, ...)      loop: permit -> run_in_executor -> thread: fn, in the caller's context
                                  thread: call has really ended -> permit back -> loop: caller goes on

Guarantees: never more than `limit` threads are busy, however many callers gave up waiting, because the permit comes
back from the *concurrent* future's callback, when the thread has really ended, and not when the caller stops waiting.
A call that is cancelled before its thread starts never starts. Context variables go into the thread. What would end
more than the call (`StopIteration`, `SystemExit`, `KeyboardInterrupt`) comes back as an error.

The pool is private: the loop's default executor also resolves DNS, and must never be full of our calls.
`call` and `close` belong to the loop thread; `submit` is for `run_in_executor`.
"""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor as FuturesExecutor
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from penstock.callables import name_of
from penstock.errors import ClosedError
from penstock.outcome import contained

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """A lane as it was at the time of asking."""

    limit: int
    busy: int
    """Threads that run a call, abandoned calls included."""
    waiting: int
    """Callers that wait for a thread."""
    abandoned: int
    """Calls whose caller stopped waiting and whose thread still runs."""
    calls: int
    """Calls that have got a thread so far."""


class Lane(FuturesExecutor):
    """At most `limit` threads for blocking calls, made when they are needed."""

    def __init__(self, name: str, limit: int) -> None:
        self._limit = limit
        self._permits = asyncio.Semaphore(limit)
        self._pool = ThreadPoolExecutor(limit, thread_name_prefix=f"penstock-{name}")
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
        self._waiting += 1
        try:
            await self._permits.acquire()
        finally:
            self._waiting -= 1
        if self._closed:
            self._permits.release()
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
        try:
            future = self._pool.submit(fn, call, **kwargs)
        except BaseException:
            self._permits.release()
            raise
        self._busy += 1
        self._calls += 1
        future.add_done_callback(partial(self._ended, call))
        return future

    def close(self) -> None:
        """Take no more calls and let idle threads end. Does not wait for busy ones."""
        self._closed = True
        self._pool.shutdown(wait=not self._busy, cancel_futures=True)

    def statistics(self) -> LaneStatistics:
        """How busy the lane is."""
        return LaneStatistics(self._limit, self._busy, self._waiting, self._abandoned, self._calls)

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
        except BaseException as error:
            harmless = contained(error, name_of(self.fn))
            if harmless is error:
                raise
            raise harmless from harmless.__cause__
