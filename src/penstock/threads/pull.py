"""A blocking source, pulled in a thread of its own, as an async iterator.

    thread: room? -> next(source) -> buffer -> wake-up of the loop, one for all items that arrived meanwhile
    loop:   async for item in ...           -> room again -> the thread goes on

Purpose: a source whose `next` blocks (a database cursor, a queue, a pipe) must not block the loop.

Guarantees: items come in order, at most `buffersize` of them are pulled ahead; what the source raises is raised after
the items before it; leaving early stops the thread at its next item, and never waits for a source that hangs. A
generator is closed in the thread that ran it, since what it holds may belong to that thread (sqlite3's connections
do). Anything else that has a `close`, such as a file, is the caller's to close.

Threads: the lock guards what both sides touch, `_items`, `_ended`, `_error`, `_reader`. The thread knows the buffer
only, so that a reader that is dropped can be collected and stops its thread. That happens in a finalizer, which may
run in any thread at any moment, also in one that holds such a lock: so stopping takes none. Room is counted by a
`SimpleQueue`, whose `put` is made for this.
"""

import asyncio
import contextvars
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from penstock import clock
from penstock.errors import UsageError, WrongLoop
from penstock.outcome import contained

T = TypeVar("T")

logger = logging.getLogger("penstock.sources")

BUFFERSIZE = 64
"""Items. Arbitrary, because: enough to share one wake-up among many, little enough to hold in memory."""

_END: Any = object()


def pull_in_thread(items: Iterable[T], *, buffersize: int = BUFFERSIZE) -> AsyncIterator[T]:
    """Pull a blocking iterable in a thread of its own: `executor.map(fn, pull_in_thread(cursor))`.

    The thread starts at the first item that is asked for, and context variables go along. It is a daemon: an
    interpreter that exits does not wait for a source that hangs. One task may iterate, on one event loop. A generator
    is closed, in its thread, when the iteration ends or the iterator is dropped; other sources are left open.

    **Cancellation** while it waits for an item loses none: iterating again goes on.

    Raises:
        UsageError: `items` is not iterable, or `buffersize` is no whole number of at least 1; where it is iterated:
            a second task iterates at the same time.
        WrongLoop: where it is iterated: this began on another event loop.
        Exception: where it is iterated: what the source raised, after the items before it.
    """
    if not isinstance(items, Iterable):
        raise UsageError(
            f"pull_in_thread({items!r:.100}): expected an iterable that blocks, such as a cursor. An async iterable "
            f"needs no thread: give it to `executor.map` as it is."
        )
    if isinstance(buffersize, bool) or not isinstance(buffersize, int) or buffersize < 1:
        raise UsageError(f"pull_in_thread(buffersize={buffersize!r}): expected a whole number of at least 1 item.")
    return ThreadSource(items, buffersize)


class ThreadSource(Generic[T]):
    """What `pull_in_thread` returns: the reader's handle on a buffer that a thread fills."""

    def __init__(self, source: Iterable[T], buffersize: int) -> None:
        self._source: Iterable[T] | None = source
        self._buffer: _Buffer[T] = _Buffer(buffersize)
        self._waiting = False

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        buffer = self._buffer
        if self._source is not None:
            buffer.loop = asyncio.get_running_loop()
            context = contextvars.copy_context()
            threading.Thread(
                target=context.run, args=(buffer.fill, self._source), name="penstock-pull", daemon=True
            ).start()
            self._source = None  # the thread's from now on
        while (wake_up := buffer.next_wake_up()) is not None:
            if self._waiting:
                raise UsageError(
                    "pull_in_thread(...) is iterated by one task at a time, and another one is waiting on it. "
                    "Iterate it in one task and hand the items on, for example through an asyncio.Queue."
                )
            self._waiting = True
            try:
                with clock.stands_still(buffer.loop):
                    await wake_up
            finally:
                self._waiting = False
        return buffer.take()

    def __del__(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the thread at its next item. Does not wait for it. Any thread, also in a finalizer: takes no lock."""
        self._buffer.stop()


class _Buffer(Generic[T]):
    """What the thread and the loop share."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._items: deque[T] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._stopped = False
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(size):
            self._room.put(None)

    # --- the loop's side ---

    def next_wake_up(self) -> "asyncio.Future[None] | None":
        """What to wait for; None when there is an item, or the end."""
        with self._lock:
            if self._items or self._ended:
                return None
            if asyncio.get_running_loop() is not self.loop:
                raise WrongLoop("this iterator began on another event loop; call pull_in_thread() for each loop.")
            if self._reader is None or self._reader.done():
                self._reader = self.loop.create_future()
            return self._reader

    def take(self) -> T:
        """The next item, and room for one more."""
        with self._lock:
            if self._items:
                self._room.put(None)
                return self._items.popleft()
            error, self._error = self._error, None
        if error is None:
            raise StopAsyncIteration
        try:
            raise error
        finally:
            del error  # its traceback holds this frame: a cycle

    def stop(self) -> None:
        self._stopped = True
        self._room.put(None)  # for a thread that waits for room

    # --- the thread's side ---

    def fill(self, source: Iterable[T]) -> None:
        """The thread: pull until the source ends or nobody reads any more."""
        try:
            iterator = iter(source)
            try:
                self._fill(iterator)
            finally:
                if isinstance(iterator, Generator):
                    iterator.close()
        except BaseException as raised:  # whatever the source raises belongs to who reads it
            # In no local variable: its traceback holds this frame.
            self._error = contained(raised, "the source of pull_in_thread")
            if self._stopped:
                logger.warning("a source raised an error that nobody reads any more", exc_info=self._error)
        with self._lock:
            self._ended = True
            self._wake()

    def _fill(self, iterator: Iterator[T]) -> None:
        while True:
            self._room.get()
            if self._stopped:
                return
            item = next(iterator, _END)
            if item is _END:
                return
            with self._lock:
                self._items.append(item)
                self._wake()
            del item  # the reader's from now on

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self.loop.call_soon_threadsafe(_finish, reader)


def _finish(reader: "asyncio.Future[None]") -> None:
    if not reader.done():
        reader.set_result(None)
