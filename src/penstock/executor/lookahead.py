"""Items with what their journal knows of them: the source is read ahead, so that one look-up serves some hundred.

    source -- a task of its own --> ahead -- one look-up at a time, in a thread --> chunks -- the puller takes --> jobs

A look-up takes what there is when the one before it has ended: one item from a slow source, some hundred from a fast
one. So nobody waits for a batch to fill, and a fast source is asked about in large ones.

Bounded: at most `most` items wait for their look-up, as many are looked up and ready, and as many are being taken.

Cancelled, what was taken from the source and not handed over is counted by `close`. A source that raises: what came
before it is handed over first. Loop thread only.
"""

import asyncio
import reprlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from penstock.errors import ClosedError, UsageError
from penstock.executor.running import PATIENCE
from penstock.executor.sources import BLOCKS, LONGEST_TURN, is_cancelled, key_raised, warn_that_it_blocks
from penstock.journal.options import key_to_record
from penstock.journal.recording import Found, Recording
from penstock.journal.schema import Key
from penstock.journal.store import Known
from penstock.outcome import contained

ITEMS_AHEAD = 250
"""Arbitrary, because: a look-up of so many costs each of them less than its row does."""


class Item(NamedTuple):
    """An item, and what is known of it."""

    item: Any
    key: Key | None
    refusal: UsageError | None
    """Why it has no key."""
    known: Known | None = None
    steps: Any = None


class Lookahead:
    """What is ahead of one feed."""

    def __init__(
        self, source: Iterable[Any] | AsyncIterable[Any], key: Callable[[Any], Any], recording: Recording, most: int
    ) -> None:
        self.chunk: deque[Item] = deque()
        """What can be taken now."""
        self.since: set[Key] = set()
        """What has been committed since that was looked up, see `Seen`."""
        self._key = key
        self._most = most
        self._recording = recording
        self._loop = asyncio.get_running_loop()
        self._ahead: deque[Item] = deque()
        self._looking: list[Item] = []
        self._chunks: deque[tuple[deque[Item], set[Key]]] = deque()
        self._used = True
        self._room: asyncio.Future[None] | None = None
        self._wanted: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._broken = False
        """Whether the journal cannot be read: what was taken and not looked up stays so."""
        self._ended = False
        self._stopped = False
        self._scheduled = False
        self._warned = False
        # Not made by the loop's task factory: an eager one would run it before this object is complete.
        self._reader = asyncio.Task(self._read(source), loop=self._loop, name="penstock-lookahead")
        self._reader.add_done_callback(self._read_to_its_end)

    async def more(self) -> bool:
        """Wait for another chunk when the last one has been taken; False at the end of the source.

        Raises:
            JournalError: the journal cannot be read, or is damaged.
            Exception: what the source raised, contained.
        """
        if not self._used:
            self._recording.seen.look_up_is_used(self.since)
            self._used = True
        while not self._chunks:
            if self._broken or (self._ended and not self._ahead and not self._looking):
                return self._over()
            self._wanted = self._loop.create_future()
            try:
                await self._wanted
            finally:
                self._wanted = None
        self.chunk, self.since = self._chunks.popleft()
        self._used = False
        self._look_up()
        return True

    def _over(self) -> bool:
        error, self._error = self._error, None
        if error is None:
            return False
        try:
            raise error
        finally:
            del error  # its traceback holds this frame: a cycle

    def stop(self) -> int:
        """Read no more; how many items were taken from the source and not from here."""
        if not self._loop.is_closed():  # else the reader is gone with it
            self._reader.cancel()
        self._stopped = True
        left = len(self.chunk) + sum(len(chunk) for chunk, _ in self._chunks) + len(self._looking) + len(self._ahead)
        self.chunk.clear()
        self._chunks.clear()
        self._looking.clear()
        self._ahead.clear()
        return left

    async def ended(self) -> int:
        """Wait for the source to let go, for a bounded time; how many items came all the same."""
        if not self._reader.done():
            await asyncio.wait([self._reader], timeout=PATIENCE)
        return len(self._ahead)

    # --- the source ---

    async def _read(self, source: Iterable[Any] | AsyncIterable[Any]) -> None:
        try:
            if isinstance(source, AsyncIterable):
                await self._read_async(source)
            else:
                await self._read_sync(iter(source))
        except BaseException as error:
            ours = isinstance(error, asyncio.CancelledError) and is_cancelled()
            if ours or isinstance(error, KeyboardInterrupt | GeneratorExit):
                raise
            self._error = contained(error, "the source of the items")

    async def _read_sync(self, iterator: Iterator[Any]) -> None:
        now = self._loop.time
        turn = last = now()
        for item in iterator:
            self._take(item)
            before, last = last, now()
            if len(self._ahead) >= self._most:
                await self._wait_for_room()
                turn = last = now()
            elif last - turn > LONGEST_TURN:
                if last - before > BLOCKS and not self._warned:
                    self._warned = True
                    warn_that_it_blocks(last - before)
                await asyncio.sleep(0)
                turn = last = now()

    async def _read_async(self, source: AsyncIterable[Any]) -> None:
        iterator = aiter(source)
        try:
            async for item in iterator:
                self._take(item)
                if self._stopped:
                    return
                if len(self._ahead) >= self._most:
                    await self._wait_for_room()
        finally:
            if iterator is not source and isinstance(iterator, AsyncGenerator):  # made for us: nobody else closes it
                with suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE):
                        await iterator.aclose()

    def _take(self, item: Any) -> None:
        key = refusal = None
        try:
            key = self._key(item)
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001  # the outcome of the item
            refusal = key_raised(item, error)
        else:
            try:
                key = key_to_record(key)
            except ValueError as error:
                key, refusal = None, _no_key(item, key, error)
        self._ahead.append(Item(item, key, refusal))
        if not self._looking and not self._scheduled and not self._stopped:
            self._scheduled = True
            self._loop.call_soon(self._look_up)  # with those that the source has at hand

    async def _wait_for_room(self) -> None:
        self._room = self._loop.create_future()
        try:
            await self._room
        finally:
            self._room = None

    def _read_to_its_end(self, reader: "asyncio.Task[None]") -> None:
        self._ended = True
        if reader.cancelled():
            if self._error is None:
                self._error = ClosedError("the task that reads the source was cancelled")
        elif (error := reader.exception()) is not None:
            self._error = error
        self._wake()

    # --- the look-ups ---

    def _look_up(self) -> None:
        self._scheduled = False
        if self._looking or self._broken or self._stopped or not self._ahead or self._chunks:
            return
        self._looking = [self._ahead.popleft() for _ in range(len(self._ahead))]
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        keys = [item.key for item in self._looking if item.key is not None]
        since = self._recording.seen.look_up_begins()
        self._recording.look_up(keys, lambda found: self._looked_up(found, since))

    def _looked_up(self, found: Found, since: set[Key]) -> None:
        if found.error is not None:
            self._error = found.error
            self._broken = True
            self._reader.cancel()
        elif self._looking:  # it is not closed since
            looking, self._looking = self._looking, []
            self._chunks.append((deque(_with_what_is_known(looking, found)), since))
            self._look_up()
        self._wake()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)


def _with_what_is_known(items: list[Item], found: Found) -> Iterable[Item]:
    known, steps = found.known, found.steps
    if not known and not steps:
        return items
    return [
        Item(item, key, refusal, known.get(key), steps.get(key)) if key is not None else Item(item, key, refusal)
        for item, key, refusal, _, _ in items
    ]


def _no_key(item: Any, key: Any, error: ValueError) -> UsageError:
    return UsageError(
        f"key= returned {reprlib.repr(key)}, {error}; expected text, a whole number of 64 bits, a finite float or "
        f"bytes. This item was not given to the job: {reprlib.repr(item)}"
    )
