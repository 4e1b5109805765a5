"""What `map` and `as_completed` return: the reader's handle on a feed.

The handle starts its feed at first use. The feed does not know the handle, so a handle that is dropped in the middle
(`break` without `async with`) is found by the garbage collector, which cancels the feed and warns.
"""

import warnings
from asyncio import get_running_loop
from collections.abc import Callable, Generator
from contextlib import suppress
from threading import get_ident
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from penstock.errors import ClosedError, WrongLoop
from penstock.executor.feed import Feed
from penstock.executor.statistics import StreamStatistics
from penstock.outcome import Outcome

T = TypeVar("T")


class Stream(Generic[T]):
    """Results as they come: await it for all of them as a list, or iterate it.

        values = await executor.map(fn, items)
        async with executor.as_completed(fn, items) as stream:
            async for outcome in stream: ...

    Under `async with`, leaving the block early cancels what is in flight and leaves nothing behind. Without it, the
    garbage collector does so, with a `ResourceWarning`.

    Iteration is lazy and bounded: at most `buffersize` items have been taken from the source and not yet been read
    here, so a slow reader slows the pull. Awaiting collects everything, so its memory grows with the results. As with
    `for`, a generator that was handed over is not closed when the stream ends early: what it still holds can be read
    on, and an async one with something to clean up is closed by whoever made it (`contextlib.aclosing`).

    **Cancellation** of the reader under `async with` or `await` cancels the jobs in flight. **Threads**: loop thread
    only, one reading task at a time.

    Raises, where it is read:
        TooManyErrors: more jobs failed than `max_errors` allows; what was finished has been delivered.
        BudgetReached: what the `budget` allows has been used; the same.
        JournalError: the journal cannot be used, or no longer; what was recorded has been delivered.
        ClosedError: the stream was closed, or its executor was shut down before the source was read to its end.
        Exception: what the source raised, after the results of the items before it; for `map` also the first error
            of a job, in input order, which closes the stream.
    """

    def __init__(self, start: Callable[[], Feed], unpack: Callable[[Outcome[Any]], T] | None) -> None:
        self._start: Callable[[], Feed] | None = start
        self._unpack = unpack
        self._feed: Feed | None = None
        self._closed = False
        self._loop = get_running_loop()
        self._thread = get_ident()

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self._all().__await__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        feed = self._feed
        if feed is None or not feed.ready or get_ident() != self._thread:
            feed = await self._more()
        outcome = feed.take()
        if self._unpack is None:
            return cast("T", outcome)
        try:
            return self._unpack(outcome)
        except BaseException:
            del outcome  # its error's traceback holds this frame: a cycle
            await self.aclose()
            raise

    async def _more(self) -> Feed:
        """The feed, once something is ready."""
        feed = self._opened()
        while not feed.ready:
            if feed.over.is_set():
                self._closed = True
                if feed.stopped is None:
                    raise StopAsyncIteration
                why, feed.stopped = feed.stopped, None
                try:
                    raise why
                finally:
                    del why  # its traceback holds this frame: a cycle
            await feed.wait()
        return feed

    async def __aenter__(self) -> Self:
        self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is in flight and wait, for at most some seconds, until it has ended. Closing twice is fine."""
        self._closed = True
        if self._feed is not None:
            await self._feed.close()

    @property
    def verdict(self) -> str | None:
        """Why the stream took no more items, as a report says it; None at the end of the source, or for its error."""
        return None if self._feed is None else self._feed.verdict

    @property
    def spent(self) -> dict[str, float]:
        """What the jobs of this stream have spent so far, by unit."""
        return {} if self._feed is None else self._feed.ledger.spent

    def statistics(self) -> StreamStatistics:
        """How far it is."""
        feed = self._feed
        if feed is None:
            return StreamStatistics(0, 0, 0, 0, 0, 0)
        return StreamStatistics(
            feed.read, feed.finished, feed.failed, feed.in_flight, len(feed.ready), feed.left, feed.duplicates,
            feed.replayed,
        )  # fmt: skip

    def __del__(self) -> None:
        if self._closed:
            return
        if self._feed is None:
            warnings.warn("a stream was made and never used: await it or iterate it", RuntimeWarning, stacklevel=2)
            return
        if self._feed.over.is_set():
            return
        with suppress(RuntimeError):  # the loop is closed, and with it everything that ran
            self._loop.call_soon_threadsafe(self._feed.cancel)
        warnings.warn(  # last, since it may be an error
            "a stream was dropped before its end. Write `async with executor.map(...) as stream:` around the loop, "
            "so that `break` leaves nothing behind.",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    async def _all(self) -> list[T]:
        if self._closed:
            raise ClosedError("this stream has been read to its end or closed; make a new one for another pass.")
        async with self:
            return [value async for value in self]

    def _opened(self) -> Feed:
        if get_running_loop() is not self._loop:
            raise WrongLoop("this stream belongs to another event loop; read it on the loop where it was made.")
        if self._feed is None:
            if self._closed:
                raise ClosedError("this stream has been closed; make a new one for another pass.")
            assert self._start is not None, "it is dropped only when there is a feed"
            self._feed = self._start()
            self._start = None  # it holds the source, which is the puller's to hold
        return self._feed
