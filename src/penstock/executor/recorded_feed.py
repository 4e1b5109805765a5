"""A feed whose outcomes are recorded: what is known is not done again, what ends is told after its commit.

    source -> lookahead: items with what the journal knows of them
       known, not to be run again    -> replayed: counted, delivered unless nobody wants it
       the key has come before       -> an error, or left out, or under another key
       else    -> [intent committed] -> job -> outcome -> journal -> committed: counted, delivered

Outcomes that wait for their commit have a bound of their own (`Recording.has_room`); they take no room in the window,
so that a small one does not wait for the disk.

Counts: read = delivered + ready + in flight + left + skipped, where what waits for its commit is in flight.

When the disk is in trouble, no more items are taken, what is in flight is finished and held; the reader gets what was
committed, then the `JournalError`. Loop thread only.
"""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from enum import Enum
from typing import Any

from penstock.context import RunningJob
from penstock.errors import ClosedError, JournalError, UsageError, first_line
from penstock.executor.active import ActiveJob
from penstock.executor.feed import Feed
from penstock.executor.lookahead import Item, Lookahead
from penstock.executor.sources import LONGEST_TURN
from penstock.journal.options import Journal
from penstock.journal.record import replayed, runs_again
from penstock.journal.recording import Recording, Waiting
from penstock.journal.schema import Key, State, StepRow
from penstock.journal.steps import Memo
from penstock.journal.store import Known
from penstock.outcome import Outcome
from penstock.report import INTERRUPTED

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
        self._starved = False
        """Whether the puller waits for items."""
        super().__init__(*args, **kwargs)

    # --- items in ---

    async def _pull_items(self, source: Iterable[Any] | AsyncIterable[Any]) -> None:
        assert self._key is not None, "a journal needs one"
        await self._recording.open()
        ahead = Lookahead(source, self._key, self._recording)
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
            or self._undelivered >= self._window
            or not self._recording.has_room
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
                self.skipped += 1
                return
            item = await self._under_another_key(item, item.key)
        if item.known is not None and not runs_again(item.known.row, self._journal):
            await self._play_again(item, item.known, ahead)
            return
        while self._undelivered >= self._window or not self._recording.has_room:
            await self._wait_for_room()
        job = self._new_job((), self._timeout, self)
        await self._running.slots.take(job)
        if self.stopped is None:
            job.outcome_unknown = item.known is not None and item.known.row.state == State.UNKNOWN
            self._run(job, item, ahead)
        else:
            self._running.slots.give_back(job)

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
        number = 2
        while True:
            since = seen.look_up_begins()
            try:
                other = with_suffix(key, number)
                known, steps = await self._recording.look_up_one(other)
                if not seen.is_repeat(other, known, since):
                    return item._replace(key=other, known=known, steps=steps)
            finally:
                seen.look_up_is_used(since)
            number += 1

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
                job.fn = self._once_recorded(job, item.key)
        self._begin(job, item.refusal)

    def _once_recorded(self, job: ActiveJob, key: Key) -> Callable[..., Awaitable[Any]]:
        """The job's function, once it is on the disk that it is about to begin. If that cannot be, the item is left."""
        fn = job.fn

        async def begin(*args: Any) -> Any:
            try:
                await self._recording.put_intent(key, job.input)
            except JournalError:
                job.cancelled = True
                raise asyncio.CancelledError from None
            return await fn(*args)

        return begin

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
        self._judge(outcome)
        self._undelivered -= 1
        job.recorder = None  # what still runs for it is not recorded
        had_steps = bool(self._memos or self._steps) and self._forget_steps(job)
        written = job.written if outcome.error is None else None
        self._recording.put(job.key, outcome, written, job.spent, steps=had_steps)
        if self._room is not None:
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
        if self.stopped is not None:
            error.add_note(f"the run was about to end: {self.stopped}")
        self.stopped, self.verdict = error, None
        if self._puller is not None:
            self._puller.cancel()

    def _end(self) -> None:
        """Nothing of this feed runs any more: commit the rest, and be over then."""
        if not self._ending:
            self._ending = True
            self._recording.close(self._account, self._recorded)

    def _account(self) -> tuple[str | None, dict[str, int]]:
        """Why it ended early, and what it has counted, for the run's own row."""
        why = self.verdict if self.stopped is None or self.verdict is not None else first_line(self.stopped)
        replayed, left = self.replayed, self.left + len(self._recording.unrecorded)
        counts = {"read": self.read, "finished": self.finished, "failed": self.failed, "skipped": self.skipped}
        return why, {**counts, "left": left, "replayed": replayed}

    def _recorded(self) -> None:
        """The journal is closed."""
        unrecorded = self._recording.unrecorded
        self.left += len(unrecorded)
        self.in_flight -= len(unrecorded)
        error = self._recording.in_trouble
        if error is not None and unrecorded:
            error.unrecorded = tuple(unrecorded)
            error.args = error.message, error.unrecorded
        super()._end()


def with_suffix(key: Key, number: int) -> Key:
    """Another key for an item whose key has come before: "7#2" for the second 7."""
    if isinstance(key, bytes):
        return key + f"#{number}".encode()
    return f"{key}#{number}"
