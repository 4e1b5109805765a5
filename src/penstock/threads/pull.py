"""A blocking source, pulled in a thread of its own, as an async iterator.

    thread: next(source) -> bounded buffer -> wake-up of the loop, one for all items that arrived meanwhile
    loop:   async for item in ...            <- room again -> the thread goes on

Purpose: a source whose `next` blocks (a database cursor, a queue, a pipe) must not block the loop.
Guarantees: items come in order, at most `buffersize` of them are pulled ahead; what the source raises is raised after
the items before it; leaving early stops the thread at its next item, and never waits for a source that hangs.

The condition guards everything that both sides touch: `_items`, `_ended`, `_stopped`, `_reader`.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

from penstock.errors import UsageError

T = TypeVar("T")

BUFFERSIZE = 64
"""Items. Arbitrary, because: enough to share one wake-up among many, little enough to hold in memory."""


def pull_in_thread(items: Iterable[T], *, buffersize: int = BUFFERSIZE) -> AsyncIterator[T]:
    """Pull a blocking iterable in a thread of its own: `executor.map(fn, pull_in_thread(cursor))`.

    The thread starts at the first item that is asked for. It is a daemon: an interpreter that exits does not wait
    for a source that hangs. One task may iterate, on one event loop.

    Raises:
        UsageError: `items` is not iterable, or `buffersize` is below 1.
        Exception: what the source raised, after the items before it.
    """
    if not isinstance(items, Iterable):
        raise UsageError(f"pull_in_thread({items!r}): expected an iterable. An async iterable needs no thread.")
    if buffersize < 1:
        raise UsageError(f"buffersize={buffersize!r}: expected at least 1 item.")
    return ThreadSource(items, buffersize)


class ThreadSource(Generic[T]):
    """What `pull_in_thread` returns."""

    def __init__(self, source: Iterable[T], buffersize: int) -> None:
        self._source = source
        self._buffersize = buffersize
        self._condition = threading.Condition()
        self._items: deque[T] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._stopped = False
        self._reader: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._pull, name="penstock-pull", daemon=True).start()
        while True:
            with self._condition:
                if self._items:
                    self._condition.notify()
                    return self._items.popleft()
                if self._ended:
                    break
                self._reader = self._loop.create_future()
            await self._reader
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopAsyncIteration

    def __del__(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the thread at its next item. Does not wait for it. Any thread."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def _pull(self) -> None:
        error: BaseException | None = None
        try:
            self._fill(iter(self._source))
        except BaseException as raised:  # noqa: BLE001  # whatever the source raises belongs to who reads it
            error = raised
        with self._condition:
            self._error = error
            self._ended = True
            self._wake()

    def _fill(self, iterator: Iterator[T]) -> None:
        for item in iterator:
            with self._condition:
                while len(self._items) >= self._buffersize and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    return
                self._items.append(item)
                self._wake()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            assert self._loop is not None, "a reader waits on its loop"
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(_finish, reader)


def _finish(reader: "asyncio.Future[None]") -> None:
    if not reader.done():
        reader.set_result(None)
