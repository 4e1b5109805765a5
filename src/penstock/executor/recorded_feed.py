"""A feed whose outcomes are recorded: what is known is not done again, what ends is told after its commit.

    source -> lookahead: items with what the journal knows of them
       known, not to be run again    -> replayed: counted, delivered unless nobody wants it
       the key has come before       -> an error, or left out, or under another key
       else    -> [intent committed] -> job -> outcome -> journal -> committed: counted, delivered

Outcomes that wait for their commit have a bound of their own (`Recording.has_room`); they take no room in the window,
so that a small one does not wait for the disk, unless the reader lags behind what is committed already.

Counts: read = delivered + ready + in flight + left + duplicates, where what waits for its commit is in flight.

When the disk is in trouble, no more items are taken, what is in flight is finished and held; the reader gets what was
committed, then the `JournalError`. Loop thread only.
"""

import asyncio
import logging
from collections.abc import AsyncIterable, Iterable
from contextlib import suppress
from enum import Enum
from typing import Any

from penstock.context import RunningJob
from penstock.errors import ClosedError, JournalError, UsageError, first_line
from penstock.executor.active import ActiveJob
from penstock.executor.feed import Feed
from penstock.executor.lookahead import ITEMS_AHEAD, Item, Lookahead
from penstock.executor.sources import LONGEST_TURN
from penstock.journal.options import Journal
from penstock.journal.record import is_unknown, replayed, runs_again, spent_of
from penstock.journal.recording import Recording, Waiting
from penstock.journal.schema import Key, State, StepRow
from penstock.journal.steps import Memo
from penstock.journal.store import Known
from penstock.outcome import Outcome
from penstock.report import INTERRUPTED

logger = logging.getLogger("penstock.journal")

_DONE = State.DONE.value


class Replay(Enum):
    """What becomes of items that an earlier run has finished."""

    WHOLE = "whole"
    """They are delivered."""
    BARE = "bare"
    """They are delivered without their values, to somebody who only counts."""
    NONE = "none"
    """They are counted only."""


class RecordedFeed(Feed):
    """The jobs of one stream with a journal."""

    patience = 30.0
    """Seconds for the last commits. Arbitrary, because: longer than two tries with a file that somebody else has
    locked (`BUSY_TIMEOUT`)."""

    def __init__(self, *args: Any, journal: Journal, job_name: str, replay: Replay, **kwargs: Any) -> None:
        self._recording = Recording(journal, job_name, settle=self._committed, trouble=self._disk_trouble)
        self._journal = journal
        self._replay = replay
        self._ending = False
        self._steps: dict[RunningJob, list[StepRow]] = {}
        """Steps of jobs that run, which an earlier life of their items has finished."""
        self._memos: dict[RunningJob, Memo] = {}
        self._spent_before: dict[RunningJob, dict[str, float]] = {}
        """Of jobs that run, what earlier lives of their items have spent."""
        self._met_again = self._still_failed = 0
        """Items that an earlier run had finished and that are run again; that it had seen fail, and that are not."""
        self._suffixes: dict[Key, int] = {}
        """The last one of each key that has come before. Grows with such keys only."""
        self._starved = False
        """Whether the puller waits for items."""
        super().__init__(*args, **kwargs)

    # --- items in ---

    async def _pull_items(self, source: Iterable[Any] | AsyncIterable[Any]) -> None:
        assert self._key is not None, "a journal needs one"
        await self._recording.open()
        most = ITEMS_AHEAD if self._follows else min(ITEMS_AHEAD, self._window)
        ahead = Lookahead(source, self._key, self._recording, most)
        del source
        now = self._loop.time
        turn = now()
        try:
            # Its end is tested, but CPython 3.11 does not trace a coroutine that swallowed what was thrown into it.
            while self.stopped is None:  # pragma: no branch
                if not ahead.chunk:
                    if not await self._more(ahead):
                        return
                    turn = now()
                if not self._run_at_once(ahead) and not self._play_at_once(ahead):
                    await self._admit(ahead)
                if now() - turn > LONGEST_TURN:
                    await asyncio.sleep(0)
                    turn = now()
        finally:
            self._leave_untaken(ahead.stop())
            if not self._loop.is_closed():
                if (
                    self.stopped is not None
                ):  # cancelled by what it has just begun itself, it would not wait for the source
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(0)
                self._leave_untaken(await ahead.ended())

    def _leave_untaken(self, items: int) -> None:
        self.read += items
        self.left += items

    def _run_at_once(self, ahead: Lookahead) -> bool:
        """Start the next item if nothing is in its way, as a rule."""
        item = ahead.chunk[0]
        if (
            item.known is not None
            or item.key is None
            or self._is_full()
            or self._recording.seen.is_repeat(item.key, None, ahead.since)
        ):
            return False
        job = self._new_job((), self._timeout, self)
        if not self._running.slots.take_nowait(job):
            return False
        self._run(job, item, ahead)
        return True

    def _play_at_once(self, ahead: Lookahead) -> bool:
        """Replay the next item if nothing is in its way, as a rule where a run is resumed."""
        item = ahead.chunk[0]
        known = item.known
        if (
            known is None
            or item.key is None
            or known.row.file_offset is not None
            or (self._undelivered >= self._window and self._replay is not Replay.NONE)
            or self._recording.seen.is_repeat(item.key, known, ahead.since)
            or runs_again(known.row, self._journal)
        ):
            return False
        self._play(
            item, item.key, known, self._recording.value_in(known.row) if self._wants_value(known) else None, ahead
        )
        return True

    def _is_full(self) -> bool:
        """Whether no further job may start. What waits for its commit counts once the reader lags."""
        recording = self._recording
        unread = self._undelivered + recording.uncommitted if self.ready else self._undelivered
        return unread >= self._window or self._held or not recording.has_room

    async def _more(self, ahead: Lookahead) -> bool:
        self._starved = True
        self._look_whether_all_wait()
        try:
            return await ahead.more()
        finally:
            self._starved = False

    async def _admit(self, ahead: Lookahead) -> None:
        """See to the next item, whatever it takes."""
        item = ahead.chunk[0]
        if item.key is not None and self._recording.seen.is_repeat(item.key, item.known, ahead.since):
            if self._journal.duplicates == "skip":
                self._take(ahead)
                self.duplicates += 1
                return
            item = await self._under_another_key(item, item.key)
        if item.known is not None and not runs_again(item.known.row, self._journal):
            await self._play_again(item, item.known, ahead)
            return
        while self._is_full():
            await self._wait_for_room()
        job = self._new_job((), self._timeout, self)
        await self._running.slots.take(job)
        if item.known is not None:
            self._met_again += 1
            job.outcome_unknown = is_unknown(item.known.row)
            self._spent_before[job] = spent_of(item.known.row)
        self._run(job, item, ahead)

    def _take(self, ahead: Lookahead) -> None:
        ahead.chunk.popleft()
        self.read += 1

    async def _under_another_key(self, item: Item, key: Key) -> Item:
        """An item whose key has come before, under the next one that has not, with what is known of that.

        Raises:
            UsageError: such items are not wanted.
        """
        if self._journal.duplicates == "error":
            raise UsageError(
                f"the key {key!r:.200} has come twice: the second time for item {item.item!r:.200}. A journal "
                f'knows an item by its key. Give each its own, or write Journal(path, duplicates="skip") to leave the '
                f'second one out, or duplicates="suffix" to record it under another key.'
            )
        seen = self._recording.seen
        while True:
            number = self._suffixes[key] = self._suffixes.get(key, 1) + 1
            since = seen.look_up_begins()
            try:
                other = with_suffix(key, number)
                known, steps = await self._recording.look_up_one(other)
                if not seen.is_repeat(other, known, since):
                    return item._replace(key=other, known=known, steps=steps)
            finally:
                seen.look_up_is_used(since)

    def _run(self, job: ActiveJob, item: Item, ahead: Lookahead) -> None:
        """Start a job that has its slot."""
        self._take(ahead)
        job.input = item.item
        job.number = self.read
        job.args = (item.item,)
        job.key = item.key
        job.recorder = self
        if item.steps:
            self._steps[job] = item.steps
        if item.key is not None:
            self._recording.seen.admit(item.key, item.known, runs=True)
            if self._journal.intents:
                job.before = self._record_intent
        self._begin(job, item.refusal)

    async def _record_intent(self, job: ActiveJob) -> None:
        """Have it on the disk that the job is about to start. If that cannot be, its item is left."""
        try:
            await self._recording.put_intent(job.key, job.input, self._spent_before.get(job))
        except JournalError as error:
            if self.stopped is None:  # the source is at its end, and yet not all of it is done
                self._stop_for(error)
            job.cancelled = True
            raise asyncio.CancelledError from None
        except ClosedError:
            job.cancelled = True
            raise asyncio.CancelledError from None

    def take_value(self, item: RunningJob, value: Any) -> None:
        """A job has returned `value`: write it while that can still make the job a failure.

        Raises:
            UsageError: the journal's codec cannot write it.
        """
        item.written = self._recording.written(value)

    def memo_of(self, item: RunningJob) -> Memo | None:
        """What is recorded of an item's steps; None if it has no key."""
        memo = self._memos.get(item)
        if memo is None and item.key is not None:
            memo = self._memos[item] = Memo(self._recording, item.key, self._steps.get(item))
        return memo

    async def _play_again(self, item: Item, known: Known, ahead: Lookahead) -> None:
        """An earlier run has finished it."""
        value = await self._recording.value_of(known.row) if self._wants_value(known) else None
        if self._replay is not Replay.NONE:
            while self._undelivered >= self._window:
                await self._wait_for_room()
        assert item.key is not None, "what has a row is known by its key"
        self._play(item, item.key, known, value, ahead)

    def _wants_value(self, known: Known) -> bool:
        return self._replay is Replay.WHOLE and known.row.state == _DONE

    def _play(self, item: Item, key: Key, known: Known, value: Any, ahead: Lookahead) -> None:
        self._take(ahead)
        self._recording.seen.admit(key, known, runs=False)
        outcome = replayed(known.row, key, item.item, value)
        self.replayed += 1
        self._count(outcome)
        if outcome.kind is None:
            self.ledger.reassure()
        else:
            self._still_failed += 1
        self._running.tell_of_replayed(outcome)
        if self._replay is not Replay.NONE and not self._closed:
            self._undelivered += 1
            self._deliver(outcome)

    # --- outcomes out ---

    def job_ended(self, job: ActiveJob, outcome: Outcome[Any] | None) -> None:
        """As in `Feed`, but an outcome waits for its commit, in a room of its own."""
        if self._gave_up or outcome is None:
            super().job_ended(job, outcome)
            return
        if self.ledger.watches:
            self._judge(outcome, job.spent)
        self._undelivered -= 1
        job.recorder = None  # what still runs for it is not recorded
        had_steps = bool(self._memos or self._steps) and self._forget_steps(job)
        written = job.written if outcome.error is None else None
        spent = job.spent
        if self._spent_before and (before := self._spent_before.pop(job, None)):
            spent = {unit: before.get(unit, 0.0) + (spent or {}).get(unit, 0.0) for unit in {**before, **(spent or {})}}
        self._recording.put(job.key, outcome, written, spent, steps=had_steps)
        if self._held:
            self._look_at_budget()
        elif self._room is not None:
            self._wake_if_room(self._room)
        if self._starved:
            self._look_whether_all_wait()
        if self._puller is None:
            self._look_whether_over()

    def _forget_steps(self, job: ActiveJob) -> bool:
        """The item is finished: whether steps of it may be in the journal."""
        memo, steps = self._memos.pop(job, None), self._steps.pop(job, None)
        if memo is not None:
            memo.close()
        return memo is not None or steps is not None

    def _look_whether_all_wait(self) -> None:
        """When no job runs and none is about to, nothing comes that a commit could be shared with."""
        if self._starved and not self.running:
            self._recording.flush()

    def _leave(self, job: ActiveJob) -> None:
        super()._leave(job)
        job.recorder = None
        spent = self._spent_before.pop(job, None)
        if self._journal.intents and job.started is None and isinstance(job.key, Key):
            self._recording.withdraw_intent(job.key, job.input, spent, unknown=job.outcome_unknown)
        self._forget_steps(job)

    def _committed(self, waiting: list[Waiting]) -> None:
        """A batch is on the disk: its items have their state."""
        self.in_flight -= len(waiting)
        if not self._closed:
            self._undelivered += len(waiting)
        for outcome, _ in waiting:
            self._count(outcome)
            if not self._closed:
                self._deliver(outcome)
        if self._room is not None:
            self._wake_if_room(self._room)
        self._look_whether_over()

    def _look_whether_over(self) -> None:
        if self._puller is None and not self.running:
            self._end()

    @property
    def running(self) -> int:
        """Jobs that have begun and not ended."""
        return self.in_flight - self._recording.uncommitted

    async def close(self) -> None:
        """As in `Feed`; what waits for its commit is committed, and nobody reads it."""
        if self._recording.uncommitted:
            why = ClosedError("the stream was closed before all of its outcomes had been read")
            self._end_early(why, INTERRUPTED)
        await super().close()

    def give_up(self) -> None:
        """As in `Feed`; outcomes that wait for their commit are not among what is left."""
        running = self.running
        self.left += running
        self.in_flight -= running
        self._gave_up = True
        self._end()

    def _disk_trouble(self, error: JournalError) -> None:
        """Nothing can be written: take no more items. Where there are none, it may pass."""
        if self._puller is not None:
            self._stop_for(error)
            self._puller.cancel()

    def _stop_for(self, error: JournalError) -> None:
        if self.stopped is not None:
            error.add_note(f"the run was about to end: {self.stopped}")
        self.stopped, self.verdict = error, None

    def _end(self) -> None:
        """Nothing of this feed runs any more: commit the rest, and be over then."""
        if not self._ending:
            self._ending = True
            self._recording.close(self._account, self._recorded)

    def _account(self) -> tuple[str | None, dict[str, int]]:
        """Why it ended early, and what it has counted, for the run's own row."""
        error, unrecorded = self._recording.in_trouble, self._recording.unrecorded
        if error is not None and unrecorded:
            error.hold(unrecorded)
            if self.stopped is not error:
                self._stop_for(error)
        elif error is not None and self.stopped is error:
            error.add_note("all that was finished until then is recorded")
        if ":" in self._journal.resume and self._still_failed and not self._met_again:
            logger.warning("resume=%r is about none of the items that failed before", self._journal.resume)
        why = self.verdict if self.stopped is None or self.verdict is not None else first_line(self.stopped)
        replayed, left = self.replayed, self.left + len(self._recording.unrecorded)
        counts = {"read": self.read, "finished": self.finished, "failed": self.failed, "duplicates": self.duplicates}
        return why, {**counts, "left": left, "replayed": replayed}

    def _recorded(self) -> None:
        """The journal is closed."""
        unrecorded = len(self._recording.unrecorded)
        self.left += unrecorded
        self.in_flight -= unrecorded
        super()._end()


def with_suffix(key: Key, number: int) -> Key:
    """Another key for an item whose key has come before: "7#2" for the second 7."""
    if isinstance(key, bytes):
        return key + f"#{number}".encode()
    return f"{key}#{number}"
