"""The loop's side of a journal while a run writes it: what is known is asked for here, what has ended is put here.

    put(outcome) -> batch -- 500 rows, or 200 ms after its first --> thread: one commit -> settled, all of it
    step done    -> the same batch

Guarantees: `settle` is told of each outcome that was put, after its commit, in the order of the puts; or never, and
then `unrecorded` has it. What could not be written is written before what came after it. Memory: `has_room` says when
enough waits for the disk; whoever admits items asks it.

**Trouble** (a full disk, for example): `trouble` is told once. What cannot be written is held and tried again each
second, also for some seconds after the close; what then has no place is `unrecorded`.

Loop thread only. No task of the loop's is needed for a commit: nothing that cancels tasks can lose one.
"""

import asyncio
import contextvars
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from json import dumps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from penstock import clock
from penstock.errors import ClosedError, JournalError
from penstock.journal.options import Journal
from penstock.journal.record import (
    Entry,
    Written,
    done_columns,
    intent_of,
    never_begun,
    read_value,
    row_of,
    write_value,
)
from penstock.journal.schema import Key, Row, StepRow
from penstock.journal.seen import Seen
from penstock.journal.store import KILLED, Batch, Begun, Known, StepEntry, Store
from penstock.outcome import Outcome
from penstock.threads.lane import Lane
from penstock.threads.workers import Workers

if TYPE_CHECKING:
    import concurrent.futures

T = TypeVar("T")

logger = logging.getLogger("penstock.journal")

BATCH_ROWS = 500
"""Rows that are committed together at most; what a commit costs is shared by them."""
MOST_BATCHES = 20
"""Batches that share a commit, where the disk is slow: all that may wait for it."""
BATCH_TIME = 0.2
"""Seconds after which what there is is committed. Arbitrary, because: five times a second is often enough not to be
waited for, and seldom enough to cost nothing."""
MOST_UNCOMMITTED = MOST_BATCHES * BATCH_ROWS
"""Outcomes that may wait for the disk. Arbitrary, because: a disk that hangs for a second or so stops nobody."""
MOST_UNCOMMITTED_BYTES = 64 * 1024 * 1024
"""Bytes of results that may wait for the disk. Arbitrary, because: a thousand of the largest that fit into a row."""
STRANGE = 100
"""First keys of a run of which a journal knows none. Arbitrary, because: by chance, that is a new source."""
WORTH_A_WORD = 2.0
"""Seconds after which somebody who waits wants to know for what. Arbitrary, because: most disks are done by then."""
RETRY_AFTER_TROUBLE = 1.0
"""Seconds until what could not be written is tried again. Arbitrary, because: somebody may be making room."""
HELD_FOR = 5.0
"""Seconds for which it is tried again when nothing else is left to do. As long as cancelled jobs get."""


Waiting: TypeAlias = tuple[Outcome[Any], Key | None]
"""An outcome that waits for its commit, and the key that it is recorded under."""


class Found(NamedTuple):
    """What a look-up has found."""

    known: dict[Key, Known]
    steps: dict[Key, list[StepRow]]
    error: JournalError | None


class Lot:
    """What is committed together."""

    __slots__ = ("batch", "now", "rows", "size_bytes", "started", "waiting")

    def __init__(self) -> None:
        self.batch = Batch()
        self.rows = 0
        self.size_bytes = 0
        self.now = 0.0
        """When its first row came: as exact as anybody wants to know when an item was recorded."""
        self.waiting: list[Waiting] = []
        self.started: list[asyncio.Future[None]] = []
        """Jobs that wait until their intent is committed."""


class Recording:
    """One run and its journal. `open` it before anything else, and `close` it whatever happens.

    Args:
        options: what the user said of it.
        job: name of the job.
        settle: called with the outcomes of a batch, once it is committed.
        trouble: called once, when nothing more can be written.
    """

    def __init__(
        self,
        options: Journal,
        job: str,
        *,
        settle: Callable[[list[Waiting]], None],
        trouble: Callable[[JournalError], None],
    ) -> None:
        self.options = options
        self.uncommitted = 0
        """Outcomes that wait for their commit."""
        self.unrecorded: list[Outcome[Any]] = []
        """Outcomes that never got one. Known when it is closed."""
        self.in_trouble: JournalError | None = None
        self._loop = asyncio.get_running_loop()
        self._settle = settle
        self._trouble = trouble
        self._workers = Workers(2, prefix="penstock-journal", spare=0)
        self._writer = Lane("journal", 1, workers=self._workers)
        self._reader = Lane("journal-reader", 1, workers=self._workers)
        self._store = Store(options, options.fingerprint(job))
        self._codec = options.values
        self._begun: Begun | None = None
        self._run = 0
        self._strangers: int | None = None
        """Keys that came first and that the journal does not know; None once that is of no interest."""
        self._uncommitted_bytes = 0
        self._lot = Lot()
        self._lots: deque[Lot] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._writing = False
        self._in_hand = 0
        """Batches of the commit that is under way."""
        self._owed = False
        """Whether somebody waits for the commit of what there is."""
        self._until = 0.0
        """When what cannot be written is given up, once it is closed; 0 while that is open."""
        self._on_closed: Callable[[], None] | None = None
        self._account: Callable[[], tuple[str | None, dict[str, int]]] | None = None
        self.seen = Seen(0)

    async def open(self) -> None:
        """Begin the run.

        Raises:
            JournalError: the file cannot be used.
        """
        slow = self._loop.call_later(WORTH_A_WORD, logger.info, "checking %s from end to end", self.options.file)
        try:
            self._begun = await self._answer(self._writer, self._store.open)
        finally:
            slow.cancel()
        self._run = self._begun.run
        self._strangers = None if self._begun.example is None else 0
        self.seen = Seen(self._run)

    @property
    def has_room(self) -> bool:
        """Whether more may wait for the disk."""
        return self.uncommitted < MOST_UNCOMMITTED and self._uncommitted_bytes < MOST_UNCOMMITTED_BYTES

    # --- what is known ---

    def look_up(self, keys: Sequence[Key], then: "Callable[[Found], None]") -> None:
        """Ask for what the journal knows of these items; `then` is called with it on the loop."""
        assert self._begun is not None, "opened before it is asked"

        def found(future: "concurrent.futures.Future[tuple[dict[Key, Known], dict[Key, list[StepRow]]]]") -> None:
            error = future.exception()
            if error is None:
                known, steps = future.result()
                self._look_whether_strange(keys, known)
                then(Found(known, steps, None))
            else:
                then(Found({}, {}, _as_journal_error(error, self.options.file)))

        self._in_thread(self._reader, found, self._store.look_up, keys, self._begun.with_steps)

    def _look_whether_strange(self, keys: Sequence[Key], known: Mapping[Key, Known]) -> None:
        """Say so if a journal that holds items knows none of those that come: as a rule `key=` is another one."""
        if self._strangers is None or not keys:
            return
        self._strangers += len(keys)
        if known:
            self._strangers = None
        elif self._strangers >= STRANGE:
            assert self._begun is not None, "opened before it is asked"
            logger.warning(
                "%s holds items, such as %.100r, and none of the first %d of this run, such as %.100r. Is key= the "
                "same as before? Text, numbers and bytes are different keys.",
                self.options.file, self._begun.example, self._strangers, keys[0],
            )  # fmt: skip
            self._strangers = None

    async def look_up_one(self, key: Key) -> tuple[Known | None, list[StepRow] | None]:
        """What the journal knows of one item, and the steps of it that are finished.

        Raises:
            JournalError: it is damaged, or cannot be read.
        """
        assert self._begun is not None, "opened before it is asked"
        known, steps = await self._answer(self._reader, self._store.look_up, [key], self._begun.with_steps)
        return known.get(key), steps.get(key)

    async def value_of(self, row: Row | StepRow) -> Any:
        """A recorded result, wherever it is.

        Raises:
            JournalError: it is damaged, or the codec cannot read it.
        """
        if row.file_offset is None:
            return self.value_in(row)
        large = await self._answer(self._reader, self._store.large_value, row)
        return self.value_in(row, large)

    def value_in(self, row: Row | StepRow, large: bytes | None = None) -> Any:
        """A recorded result that is in its row, or in `large`.

        Raises:
            JournalError: the codec cannot read it.
        """
        try:
            return None if row.result is None else read_value(self._codec, row.result, large)
        except Exception as error:
            raise JournalError(
                f"{self.options.file}: the codec cannot read the result of {row.key!r:.200} ({type(error).__name__}: "
                f"{error}). Give the journal the codec that it was written with: Journal(path, codec=...)."
            ) from error

    # --- what has ended ---

    def written(self, value: Any) -> Written:
        """A job's value, as `put` takes it.

        Raises:
            UsageError: the codec cannot write it.
        """
        return write_value(self._codec, value)

    def put(
        self, key: Key | None, outcome: Outcome[Any], written: Written | None, spent: Mapping[str, float] | None, *,
        steps: bool,
    ) -> None:  # fmt: skip
        """Have an outcome committed.

        Args:
            written: its value, as `written` gave it; None where it has none.
            steps: whether steps of the item may be in the journal.
        """
        lot = self._begun_lot()
        spending = dumps(spent) if spent else None
        result, large = (None, None) if written is None else written
        if result is not None and large is None and key is not None:
            lot.batch.done += done_columns(outcome, key, self._run, lot.now, spending, result)
            size = len(result)
        else:
            entry = row_of(
                outcome, key, self._run, lot.now, spending, written, self._codec, intents=self.options.intents
            )
            lot.batch.entries.append(entry)
            size = len(entry.large or entry.row.input or "")
        if steps and outcome.kind is None and key is not None:
            self._forget_steps(lot.batch, key)
        self.uncommitted += 1
        lot.waiting.append((outcome, key))
        self._one_more(lot, size)

    def _forget_steps(self, batch: Batch, key: Key) -> None:
        """Its item is finished: what is not written yet need not be, what is written is removed."""
        if batch.steps:
            batch.steps[:] = [step for step in batch.steps if step.row.key != key]
        batch.forgotten.append(key)

    def put_step(self, key: Key, name: str, arguments: bytes, value: Any) -> Any:
        """Have the result of a step committed, some time; the value as the codec reads it.

        Raises:
            UsageError: the codec cannot write it.
        """
        result, large = write_value(self._codec, value, f"what step {name!r:.100} returned")
        lot = self._begun_lot()
        lot.batch.steps.append(StepEntry(StepRow(key, name, arguments, result), large))
        self._one_more(lot, len(result) if large is None else len(large))
        return read_value(self._codec, result, large)

    async def put_intent(self, key: Key, item: Any, spent: Mapping[str, float] | None = None) -> None:
        """Commit that a job is about to start, whose item has spent so much in earlier lives.

        **Cancellation**: the intent may be committed all the same.

        Raises:
            JournalError: it could not be committed.
            ClosedError: the run has ended.
        """
        if self.in_trouble is not None:
            raise self.in_trouble
        if self._account is not None:
            raise ClosedError(f"{self.options.file}: the run has ended, and nothing of it begins any more.")
        started: asyncio.Future[None] = self._loop.create_future()
        lot = self._begun_lot()
        lot.batch.entries.append(self._intent(lot, key, item, spent))
        lot.started.append(started)
        lot.rows += 1
        if lot.rows >= BATCH_ROWS:
            self.flush()
        elif not self._writing:
            self._loop.call_soon(self.flush)  # with those that start in this turn of the loop
        await started

    def _begun_lot(self) -> Lot:
        """What is committed next, to put a row into."""
        lot = self._lot
        if not lot.rows:
            lot.now = clock.wall()
        return lot

    def withdraw_intent(
        self, key: Key, item: Any, spent: Mapping[str, float] | None = None, *, unknown: bool = False
    ) -> None:
        """A job has not started after all: its item is as good as missing, whether the intent is on the disk or not.

        `unknown`: nobody knows what an earlier life of the item has done.
        """
        lot = self._begun_lot()
        lot.batch.entries.append(never_begun(self._intent(lot, key, item, spent), unknown=unknown))
        self._one_more(lot, 0)

    def _intent(self, lot: Lot, key: Key, item: Any, spent: Mapping[str, float] | None) -> Entry:
        return intent_of(item, key, self._run, lot.now, dumps(spent) if spent else None, self._codec)

    def _one_more(self, lot: Lot, size_bytes: int) -> None:
        lot.rows += 1
        lot.size_bytes += size_bytes
        self._uncommitted_bytes += size_bytes
        if lot.rows >= BATCH_ROWS:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(BATCH_TIME, self.flush)

    def flush(self) -> None:
        """Have what there is committed now, or with all that comes while another commit is under way."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._owed = bool(self._lot.rows)
        if self._owed and (not self._writing or self._lot.rows >= BATCH_ROWS):
            self._seal()
        self._write_next()

    def _seal(self) -> None:
        """Nothing more is added to this commit."""
        self._lots.append(self._lot)
        self._lot = Lot()
        self._owed = False

    # --- the way to the disk ---

    def _write_next(self) -> None:
        if self._writing or self._again is not None:
            return
        if self._lots:
            self._writing = True
            self._in_hand = min(len(self._lots), MOST_BATCHES)
            batches = [lot.batch for lot in itertools.islice(self._lots, self._in_hand)]
            self._in_thread(self._writer, self._written, self._store.write, batches)
        elif self._on_closed is not None:
            self._close_store()

    def _written(self, future: "concurrent.futures.Future[None]") -> None:
        self._writing = False
        error = future.exception()
        if error is None:
            committed = [self._lots.popleft() for _ in range(self._in_hand)]
            for lot in committed:
                self._settle_all(lot)
            if self._owed or self._lot.started or self._on_closed is not None:
                self.flush()
            else:
                self._write_next()
        elif self._until and self._loop.time() >= self._until:
            self._give_up()
        else:
            self._hold(error)

    def _settle_all(self, lot: Lot) -> None:
        for started in lot.started:
            if not started.done():
                started.set_result(None)
        self.uncommitted -= len(lot.waiting)
        self._uncommitted_bytes -= lot.size_bytes
        self.seen.committed([key for _, key in lot.waiting if key is not None])
        self._settle(lot.waiting)

    def _hold(self, error: BaseException) -> None:
        """Nothing can be written: keep what there is, and try again."""
        if self.in_trouble is None:
            self.in_trouble = _as_journal_error(error, self.options.file)
            logger.error("%s Nothing new is begun; what is in flight is finished and held.", self.in_trouble)
            self._refuse_intents()
            self._trouble(self.in_trouble)
        if self._on_closed is not None and not self._until:
            self._until = self._loop.time() + HELD_FOR
        self._again = self._loop.call_later(RETRY_AFTER_TROUBLE, self._try_again)

    def _try_again(self) -> None:
        self._again = None
        self.flush()

    def _refuse_intents(self) -> None:
        assert self.in_trouble is not None, "there is a reason"
        for lot in (*self._lots, self._lot):
            for started in lot.started:
                if not started.done():
                    started.set_exception(self.in_trouble)

    # --- the end ---

    def close(self, account: Callable[[], tuple[str | None, dict[str, int]]], on_closed: Callable[[], None]) -> None:
        """Commit what there is, end the run and call `on_closed`. Never raises; does not wait.

        `account` is called when all is committed, for why the run has ended early, and for what it has counted.
        """
        self._account = account
        self._on_closed = on_closed
        self._slow = self._loop.call_later(WORTH_A_WORD, self._tell_that_it_takes_long)
        if self.in_trouble is not None:
            self._until = self._loop.time() + HELD_FOR
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self.flush()

    def _tell_that_it_takes_long(self) -> None:
        logger.warning(
            "still writing to %s: %d outcomes are not committed yet. What ends the program now loses them.",
            self.options.file, self.uncommitted,
        )  # fmt: skip

    def _abandon(self) -> None:
        """The loop was closed under it: let go of file and lock, in the thread that finds out."""
        self._workers.dismiss()
        with suppress(JournalError):
            self._store.close(KILLED, {})

    def _give_up(self) -> None:
        """What is held finds no place."""
        if self._lot.rows:
            self._seal()
        self.unrecorded = [outcome for lot in self._lots for outcome, _ in lot.waiting]
        self._lots.clear()
        self._close_store()

    def _close_store(self) -> None:
        self._writing = True  # nothing is written any more
        self._in_thread(self._reader, self._reading_closed, self._store.close_reading)

    def _reading_closed(self, _future: "concurrent.futures.Future[None]") -> None:
        assert self._account is not None, "it was told to close"
        self._in_thread(self._writer, self._closed, self._store.close, *self._account())

    def _closed(self, future: "concurrent.futures.Future[None]") -> None:
        error = future.exception()
        if error is not None:
            logger.error("the end of the run could not be recorded: %s", error)
        self._writer.close()
        self._reader.close()
        self._workers.dismiss()
        self._slow.cancel()
        on_closed, self._on_closed = self._on_closed, None
        assert on_closed is not None, "it was told to close"
        on_closed()

    def _answer(self, lane: Lane, fn: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """What `fn` returns in a thread. Cancelled, it is not waited for."""
        answer: asyncio.Future[T] = self._loop.create_future()

        def over(future: "concurrent.futures.Future[T]") -> None:
            if answer.done():
                return
            error = future.exception()
            if error is None:
                answer.set_result(future.result())
            else:
                answer.set_exception(_as_journal_error(error, self.options.file))
                answer.exception()  # who waits for it may be cancelled just now

        self._in_thread(lane, over, fn, *args)
        return answer

    def _in_thread(
        self, lane: Lane, then: "Callable[[concurrent.futures.Future[Any]], None]", fn: Callable[..., Any], *args: Any
    ) -> None:
        """Call `fn` in a thread, and `then` on the loop with its future."""
        still = clock.stands_still(self._loop)
        still.__enter__()

        def back(future: "concurrent.futures.Future[Any]") -> None:
            try:
                self._loop.call_soon_threadsafe(_over, still, then, future)
            except RuntimeError:  # the loop is closed: nobody is left to be told
                self._abandon()

        # In a context of its own: whoever puts the last outcome of a batch is not whom it works for.
        contextvars.Context().run(lane.submit, fn, *args).add_done_callback(back)


def _over(
    still: AbstractContextManager[None],
    then: "Callable[[concurrent.futures.Future[Any]], None]",
    future: "concurrent.futures.Future[Any]",
) -> None:
    still.__exit__(None, None, None)
    then(future)


def _as_journal_error(error: BaseException, path: str) -> JournalError:
    if isinstance(error, JournalError):
        return error
    wrapped = JournalError(f"{path} could not be written: {type(error).__name__}: {error}.")
    wrapped.__cause__ = error
    return wrapped
