"""The loop's side of a journal: what is told after which commit, and what becomes of it when nothing can be written."""

import asyncio
import contextvars
import json
import logging
import os
import pathlib
import pickle
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.errors import ClosedError, JournalError, SkipItem, UsageError
from penstock.journal import recording as module
from penstock.journal.lock import is_held
from penstock.journal.options import Codec, Journal
from penstock.journal.recording import (
    BATCH_ROWS,
    BATCH_TIME,
    HELD_FOR,
    MOST_BATCHES,
    MOST_UNCOMMITTED,
    RETRY_AFTER_TROUBLE,
    STRANGE,
    Found,
    Recording,
)
from penstock.journal.schema import Key, State
from penstock.journal.store import Batch
from penstock.outcome import FailureKind, Outcome
from penstock.testing import VirtualClockLoop, act_at_every_step, cancel_at_every_step

FULL = JournalError("run.db: the disk is full.")
LARGE = "x" * 100_000


def outcome(key: Any, value: Any = None, error: BaseException | None = None) -> Outcome[Any]:
    kind = None if error is None or isinstance(error, SkipItem) else FailureKind.PERMANENT
    return Outcome(key, "item", value, error, kind, 1, 0.0, 0.5)


class Run:
    """A recording, and what it tells. Whoever is told looks into the file, as another program sees it."""

    def __init__(self, path: str, **options: Any) -> None:
        self.path = path
        self.puts: list[Outcome[Any]] = []
        self.settled: list[Outcome[Any]] = []
        self.troubles: list[JournalError] = []
        self.batches: list[int] = []
        """How many outcomes were settled together."""
        self.times: list[float] = []
        """When."""
        self.broken: BaseException | None = None
        """What each write raises."""
        self.tries = 0
        self.failures = 0
        self.closing = False
        self.closed = asyncio.Event()
        self.recording = Recording(Journal(path, **options), "job", settle=self._settle, trouble=self.troubles.append)
        self.write = self.recording._store.write
        self.recording._store.write = self._write_or_fail  # type: ignore[method-assign]

    def _write_or_fail(self, batches: Sequence[Batch]) -> None:
        self.tries += 1
        if self.broken is not None:
            self.failures += 1
            raise self.broken
        self.write(batches)

    def _settle(self, waiting: Sequence[tuple[Any, ...]]) -> None:
        self.batches.append(len(waiting))
        self.times.append(asyncio.get_running_loop().time())
        there = dict(rows(self.path, "SELECT key, state FROM item"))
        for ended, key, *_ in waiting:
            assert key is None or key in there, "it is told before its commit"
            self.settled.append(ended)

    def put(
        self, key: Any, value: Any = None, error: BaseException | None = None, *, steps: bool = False,
        spent: dict[str, float] | None = None,
    ) -> Outcome[Any]:  # fmt: skip
        ended = outcome(key, value, error)
        written = self.recording.written(value) if error is None else None
        self.recording.put(key, ended, written, spent, steps=steps)
        self.puts.append(ended)
        return ended

    def close(self) -> None:
        """May be called again."""
        if not self.closing:
            self.closing = True
            self.recording.close(lambda: ("why", {"read": len(self.puts)}), self.closed.set)

    async def look_up(self, *keys: Key) -> Found:
        found: asyncio.Future[Found] = asyncio.get_running_loop().create_future()

        def tell(what: Found) -> None:
            if not found.done():
                found.set_result(what)

        self.recording.look_up(keys, tell)
        return await found

    def check(self) -> None:
        """Of one that is closed: each outcome was told once, in order, or is among those that were not recorded."""
        assert self.settled + self.recording.unrecorded == self.puts
        assert len(self.troubles) == (self.failures > 0)
        assert not is_held(self.path)


@asynccontextmanager
async def opened(path: str, **options: Any) -> AsyncIterator[Run]:
    run = Run(path, **options)
    try:
        await run.recording.open()
        yield run
    finally:
        run.close()
        await run.closed.wait()
        run.check()


def rows(path: str, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(pathlib.Path(path).as_uri() + "?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def states(path: str) -> dict[Key, int]:
    return dict(rows(path, "SELECT key, state FROM item ORDER BY id"))


def steps_in(path: str) -> set[tuple[Key, str]]:
    return set(rows(path, "SELECT key, name FROM step"))


def files_beside(path: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path.resolve() / "run.db")


async def until(condition: Callable[[], object]) -> None:
    """In turns of the loop; time may pass, if it is virtual."""
    while not condition():
        await asyncio.sleep(0.01)


# --- batches ---


@pytest.mark.virtual_clock
async def test_an_outcome_is_told_of_200_ms_after_the_first_of_its_batch(path: str) -> None:
    async with opened(path) as run:
        began = asyncio.get_running_loop().time()
        for number in range(3):
            run.put(number)
            await asyncio.sleep(0.06)
        assert run.settled == []
        assert run.recording.uncommitted == 3
        await until(lambda: run.settled)
        assert run.batches == [3]
        assert run.recording.uncommitted == 0
        assert run.times[0] - began == pytest.approx(BATCH_TIME)
        await asyncio.sleep(1)
        run.put("later")
        await until(lambda: len(run.settled) == 4)
        assert run.times[1] - began == pytest.approx(BATCH_TIME + 1 + BATCH_TIME, abs=0.05)


@pytest.mark.virtual_clock
async def test_500_rows_do_not_wait_for_their_time(path: str) -> None:
    """Steps are rows as well."""
    async with opened(path) as run:
        began = asyncio.get_running_loop().time()
        run.recording.put_step("a step", "score", b"", 1)
        for number in range(2 * BATCH_ROWS):
            run.put(number)
        await until(lambda: len(run.batches) == 2)
        assert run.batches == [BATCH_ROWS - 1, BATCH_ROWS]
        assert run.times[0] == began
        assert run.times[1] == began
        await until(lambda: run.recording.uncommitted == 0)
        assert run.batches == [BATCH_ROWS - 1, BATCH_ROWS, 1]
        assert run.times[2] == pytest.approx(began + BATCH_TIME)


@pytest.mark.virtual_clock
async def test_what_there_is_is_committed_at_once_on_request(path: str) -> None:
    async with opened(path) as run:
        began = asyncio.get_running_loop().time()
        run.recording.flush()
        run.put("a")
        run.recording.flush()
        await until(lambda: run.settled)
        assert run.times == [began]
        assert run.tries == 1


@pytest.mark.virtual_clock
async def test_nothing_is_written_when_there_is_nothing(path: str) -> None:
    async with opened(path) as run:
        await asyncio.sleep(10)
    assert run.tries == 0


@pytest.mark.virtual_clock
async def test_one_batch_is_written_at_a_time_in_the_order_of_the_puts(path: str) -> None:
    """However long the disk takes; what has ended meanwhile is committed together."""
    at_work, go = threading.Event(), threading.Event()
    async with opened(path) as run:
        real = run.write

        def slow(batches: Sequence[Batch]) -> None:
            at_work.set()
            assert go.wait(10)
            real(batches)

        run.write = slow
        run.put(0)
        run.recording.flush()
        while not at_work.is_set():
            await asyncio.sleep(0)
        for number in range(1, 4):
            run.put(number)
            run.recording.flush()
        assert run.settled == []
        go.set()
    assert run.batches[0] == 1
    assert [ended.key for ended in run.settled] == [0, 1, 2, 3]


@pytest.mark.virtual_clock
async def test_a_slow_disk_gets_all_that_waits_for_it_in_one_commit(path: str) -> None:
    """Batches keep their size, and each is told of by itself; but for a bound, so that no transaction is endless."""
    at_work, go = threading.Event(), threading.Event()
    commits: list[int] = []
    async with opened(path) as run:
        real = run.write

        def slow(batches: Sequence[Batch]) -> None:
            commits.append(len(batches))
            at_work.set()
            assert go.wait(10)
            real(batches)

        run.write = slow
        run.put("first")
        run.recording.flush()
        while not at_work.is_set():
            await asyncio.sleep(0)
        for number in range((MOST_BATCHES + 3) * BATCH_ROWS):
            run.put(number)
        assert commits == [1]
        go.set()
        await until(lambda: run.recording.uncommitted == 0)
    assert commits == [1, MOST_BATCHES, 3]
    assert run.batches == [1] + [BATCH_ROWS] * (MOST_BATCHES + 3)
    assert run.settled == run.puts


@pytest.mark.virtual_clock
async def test_when_a_commit_of_several_batches_fails_none_is_lost_or_told_twice(path: str) -> None:
    """They are tried again together, and what came after them is behind them."""
    async with opened(path) as run:
        run.broken = FULL
        for number in range(3 * BATCH_ROWS):
            run.put(number)
        await until(lambda: run.tries == 2)
        run.put("later")
        run.broken = None
        await until(lambda: run.recording.uncommitted == 0)
        assert run.batches[:3] == [BATCH_ROWS] * 3


# --- what is recorded ---


async def test_outcomes_of_all_kinds_are_recorded(path: str) -> None:
    async with opened(path) as run:
        run.put("done", {"a": 1}, spent={"usd": 0.5})
        run.put("dead", error=ValueError("bad"), spent={"usd": 0.25})
        run.put("skipped", error=SkipItem("old"))
        run.put(None, error=UsageError("no key"))
        run.put(None, "no key either")
        run.put("large", LARGE)
    recorded = rows(path, "SELECT key, state, result, spent, message, run FROM item ORDER BY id")
    assert {row[0]: row[1:] for row in recorded if row[0] is not None} == {
        "done": (State.DONE, '{"a":1}', '{"usd": 0.5}', None, 1),
        "dead": (State.DEAD, None, '{"usd": 0.25}', "bad", 1),
        "skipped": (State.SKIPPED, None, None, "old", 1),
        "large": (State.DONE, "", None, None, 1),
    }
    assert [row[1:3] for row in recorded if row[0] is None] == [(State.DEAD, None), (State.DONE, '"no key either"')]
    assert rows(path, "SELECT stopped, counts FROM run") == [("why", '{"read": 6}')]


@pytest.mark.parametrize("codec", [None, json, pickle])
async def test_what_is_recorded_comes_back_in_a_later_run(path: str, codec: Codec | None) -> None:
    values = {"small": {"a": [1, None]}, "none": None, "large": LARGE, "large and not ASCII": "é" * 50_000}
    async with opened(path, codec=codec) as run:
        for key, value in values.items():
            run.put(key, value)
        for name, value in values.items():
            run.recording.put_step("open", name, b"", value)
    async with opened(path, codec=codec) as run:
        found = await run.look_up("open", *values)
        assert found.error is None
        assert {key: await run.recording.value_of(known.row) for key, known in found.known.items()} == values
        assert {step.name: await run.recording.value_of(step) for step in found.steps["open"]} == values
        known, steps = await run.recording.look_up_one("open")
        assert known is None
        assert steps == found.steps["open"]
        known, steps = await run.recording.look_up_one("small")
        assert known == found.known["small"]
        assert steps is None


class Odd:
    """A codec that does as it is told."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def dumps(self, _value: Any) -> Any:
        if isinstance(self.data, Exception):
            raise self.data
        return self.data

    def loads(self, data: Any) -> Any:
        if isinstance(self.data, Exception):
            raise self.data
        return data


@pytest.mark.parametrize("data", [ValueError("codec"), 5, None, "\ud800"])
async def test_what_the_codec_cannot_write_is_told_before_it_is_put(path: str, data: Any) -> None:
    async with opened(path, codec=Odd(data)) as run:
        with pytest.raises(UsageError, match="cannot be recorded in the journal"):
            run.recording.written("value")
        with pytest.raises(UsageError, match="cannot be recorded in the journal"):
            run.recording.put_step("a", "score", b"", "value")
        run.put("a", error=ValueError("bad"))
    assert rows(path, "SELECT key, input, shown_input FROM item") == [("a", None, "'item'")]
    assert steps_in(path) == set()


async def test_a_codec_may_write_a_bytearray(path: str) -> None:
    async with opened(path, codec=Odd(bytearray(b"ab"))) as run:
        run.put("a")
    async with opened(path, codec=Odd(b"")) as run:
        found = await run.look_up("a")
        assert await run.recording.value_of(found.known["a"].row) == b"ab"


async def test_a_result_that_the_codec_cannot_read_is_told_with_its_key(path: str) -> None:
    async with opened(path) as run:
        run.put("the key")
    async with opened(path) as run:
        run.recording._codec = Odd(ValueError("not mine"))
        found = await run.look_up("the key")
        with pytest.raises(JournalError, match=r"cannot read the result of 'the key' \(ValueError: not mine\)"):
            await run.recording.value_of(found.known["the key"].row)


async def test_a_large_result_that_is_damaged_is_told(path: str) -> None:
    async with opened(path) as run:
        run.put("a", LARGE)
    async with opened(path) as run:
        os.truncate(f"{path}-results", 5)
        found = await run.look_up("a")
        with pytest.raises(JournalError, match=r"run\.db-results: ends before"):
            await run.recording.value_of(found.known["a"].row)


async def test_what_has_no_result_has_none_as_its_value(path: str) -> None:
    async with opened(path) as run:
        run.put("a", error=ValueError("bad"))
    async with opened(path) as run:
        found = await run.look_up("a")
        assert await run.recording.value_of(found.known["a"].row) is None


async def test_a_damaged_row_is_told_to_who_looks_it_up(path: str) -> None:
    async with opened(path) as run:
        run.put("a")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE item SET result = '1'")
    async with opened(path) as run:
        found = await run.look_up("a", "b")
        assert found[:2] == ({}, {})
        assert "is damaged: the row of 'a'" in str(found.error)
        with pytest.raises(JournalError, match="is damaged: the row of 'a'"):
            await run.recording.look_up_one("a")
        assert (await run.look_up("b")).error is None


async def test_an_error_of_any_kind_is_told_as_one_of_the_journal_s(path: str) -> None:
    """With the file's name, and where it came from as its cause."""

    def look_up(*_: object) -> None:
        raise MemoryError("no more")

    async with opened(path) as run:
        run.recording._store.look_up = look_up  # type: ignore[assignment, method-assign]
        error = (await run.look_up("a")).error
        assert isinstance(error, JournalError)
        assert path in str(error)
        assert "MemoryError: no more" in str(error)
        assert isinstance(error.__cause__, MemoryError)


async def test_a_commit_works_for_no_job(path: str) -> None:
    """Whose outcome happens to fill the batch is not whom its thread works for."""
    variable = contextvars.ContextVar("variable", default="nobody")
    seen = list[str]()
    async with opened(path) as run:
        real = run.write

        def look(batches: Sequence[Batch]) -> None:
            seen.append(variable.get())
            real(batches)

        run.write = look
        variable.set("a job")
        run.put("a")
        run.recording.flush()
        await until(lambda: run.settled)
    assert seen == ["nobody"]


async def test_a_journal_that_is_refused_is_told_and_closes(path: str) -> None:
    async with opened(path) as run:
        run.put("a")
        run.recording.flush()
        await until(lambda: run.settled)
        other = Run(path)
        with pytest.raises(JournalError, match="this very process writes it already"):
            await other.recording.open()
        other.close()
        await other.closed.wait()
        assert is_held(path)
        run.put("b")
    assert states(path) == {"a": State.DONE, "b": State.DONE}


async def test_two_runs_record_side_by_side(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one.db"), str(tmp_path / "two.db")
    async with opened(one) as first, opened(two, durability="machine") as second:
        for number in range(700):
            first.put(number)
            second.put(-number)
    assert set(states(one)) == set(range(700))
    assert set(states(two)) == {-number for number in range(700)}


async def test_one_that_was_never_opened_closes(path: str) -> None:
    run = Run(path)
    run.close()
    await run.closed.wait()
    assert files_beside(path) == []


async def test_it_is_told_when_no_key_is_known_to_a_journal_that_holds_some(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As a rule `key=` is another one than before. Told once; and not where one is known."""
    async with opened(path) as run:
        run.put("7")
        await run.look_up(*range(STRANGE))
    for keys in ([], ["7"], range(STRANGE), range(STRANGE)):
        async with opened(path) as run:
            await run.look_up(*range(STRANGE - 1))
            await run.look_up()
            assert caplog.records == []
            await run.look_up(*keys)
            await run.look_up(*range(STRANGE) if keys else "7")
        assert len(caplog.records) == (isinstance(keys, range))
        caplog.clear()


async def test_an_opening_that_takes_long_says_what_it_does(
    path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal is checked from end to end: of ten gigabytes that takes a minute. A short one is not worth a word."""
    caplog.set_level(logging.INFO, "penstock.journal")
    async with opened(path):
        pass
    assert caplog.messages == []
    monkeypatch.setattr(module, "WORTH_A_WORD", 0.01)
    go = threading.Event()
    run = Run(path)
    really = run.recording._store.open

    def slowly() -> Any:
        assert go.wait(10)
        return really()

    monkeypatch.setattr(run.recording._store, "open", slowly)
    opening = asyncio.create_task(run.recording.open())
    await until(lambda: caplog.records)
    go.set()
    await opening
    run.close()
    await run.closed.wait()
    assert caplog.messages[0] == f"checking {path} from end to end"


async def test_a_close_that_takes_long_says_that_it_still_writes(
    path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORTH_A_WORD", 0.01)
    go = threading.Event()
    async with opened(path) as run:
        real = run.write

        def slow(batches: Sequence[Batch]) -> None:
            assert go.wait(10)
            real(batches)

        run.write = slow
        run.put("a")
        run.close()
        await until(lambda: caplog.records)
        go.set()
    assert "1 outcomes are not committed yet" in caplog.text


# --- steps ---


async def test_steps_are_kept_until_their_item_is_done_or_skipped(path: str) -> None:
    ends: dict[str, BaseException | None] = {"done": None, "skipped": SkipItem("old"), "dead": ValueError("bad")}
    async with opened(path) as run:
        for key in (*ends, "open"):
            run.recording.put_step(key, "early", b"", 1)
        run.recording.flush()
        for key, error in ends.items():
            run.recording.put_step(key, "late", b"", 2)
            run.put(key, error=error, steps=True)
    assert steps_in(path) == {("dead", "early"), ("dead", "late"), ("open", "early")}


async def test_steps_of_an_item_that_has_none_are_not_looked_for(path: str) -> None:
    async with opened(path) as run:
        run.recording.put_step("a", "score", b"", 1)
        run.recording.flush()
        run.put("a", steps=False)
        run.put(None, steps=True)
    assert steps_in(path) == {("a", "score")}


# --- bounds ---


@pytest.mark.virtual_clock
async def test_so_many_outcomes_may_wait_for_the_disk(path: str) -> None:
    async with opened(path) as run:
        run.broken = FULL
        for number in range(MOST_UNCOMMITTED):
            assert run.recording.has_room
            run.put(number)
        assert not run.recording.has_room
        await until(lambda: run.troubles)
        assert not run.recording.has_room
        run.broken = None
        await until(lambda: run.recording.has_room)
        await until(lambda: not run.recording.uncommitted)
    assert len(states(path)) == MOST_UNCOMMITTED


PIECES: dict[str, Callable[[Run, int], object]] = {
    "large results": lambda run, number: run.put(number, LARGE),
    "results": lambda run, number: run.put(number, "x" * 50_000),
    "steps": lambda run, number: run.recording.put_step(number, "score", b"", LARGE),
}


@pytest.mark.virtual_clock
@pytest.mark.parametrize("what", PIECES)
async def test_so_many_bytes_may_wait_for_the_disk(path: str, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(module, "MOST_UNCOMMITTED_BYTES", 1_000_000)
    async with opened(path) as run:
        run.broken = FULL
        number = 0
        while run.recording.has_room:
            PIECES[what](run, number)
            number += 1
        assert 10 <= number <= 20
        await until(lambda: run.troubles)
        assert not run.recording.has_room
        run.broken = None
        await until(lambda: run.recording.has_room)
        run.put("the last")
        await until(lambda: not run.recording.uncommitted)
        assert run.recording._uncommitted_bytes == 0


# --- intents ---


@pytest.mark.virtual_clock
async def test_a_job_begins_once_its_intent_is_committed(path: str) -> None:
    """At once, with those that begin in the same turn of the loop."""
    async with opened(path, intents=True) as run:
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(run.recording.put_intent(number, {"id": number}) for number in range(3)))
        assert states(path) == dict.fromkeys(range(3), State.UNKNOWN)
        assert asyncio.get_running_loop().time() == began
        assert run.tries == 1
        run.put(0)
        run.put(1, error=ValueError("bad"))
    assert states(path) == {0: State.DONE, 1: State.DEAD, 2: State.UNKNOWN}


@pytest.mark.virtual_clock
async def test_an_intent_that_comes_during_a_commit_is_in_the_next_one(path: str) -> None:
    async with opened(path, intents=True) as run:
        began = asyncio.get_running_loop().time()
        run.put("a")
        run.recording.flush()
        await run.recording.put_intent("b", 1)
        assert states(path) == {"a": State.DONE, "b": State.UNKNOWN}
        assert asyncio.get_running_loop().time() == began
        assert run.tries == 2


async def test_jobs_may_begin_in_any_number(path: str) -> None:
    """SQLite takes 32,766 variables in a statement, unless it was built for more: fewer than two thousand rows."""
    async with opened(path, intents=True) as run:
        writer = run.recording._store._writer
        assert writer is not None
        writer.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 32_766)
        run.put("before")
        run.recording.flush()
        await asyncio.gather(*(run.recording.put_intent(number, number) for number in range(2_500)))
        run.put("after")
    assert len(states(path)) == 2_502


async def test_an_item_that_is_done_stays_done_when_it_is_about_to_be_run_again(path: str) -> None:
    async with opened(path) as run:
        run.put("a")
    async with opened(path, resume="failed", intents=True) as run:
        await run.recording.put_intent("a", 1)
        assert states(path) == {"a": State.DONE}
        run.put("a", error=ValueError("bad"))
    assert states(path) == {"a": State.DONE}


@pytest.mark.virtual_clock
async def test_no_job_begins_whose_intent_cannot_be_committed(path: str) -> None:
    """Neither those that wait when the trouble comes, nor those that come later; nor does one that has gone.

    Nor is it said of any of them that nobody knows what it has done, once there is room again.
    """
    async with opened(path, intents=True) as run:
        run.broken = FULL
        waiting = [asyncio.create_task(run.recording.put_intent(number, number)) for number in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        for found in await asyncio.gather(*waiting[1:], return_exceptions=True):
            assert found is run.recording.in_trouble
        for number in range(3):
            run.recording.withdraw_intent(number, number)
        with pytest.raises(JournalError, match="the disk is full"):
            await run.recording.put_intent("later", 1)
        assert waiting[0].cancelled()
        run.broken = None
        run.put("done")
    assert run.troubles == [FULL]
    assert states(path) == {0: State.RETRY, 1: State.RETRY, 2: State.RETRY, "done": State.DONE}


@pytest.mark.virtual_clock
async def test_who_waits_for_an_intent_may_leave(path: str) -> None:
    """The intent may be committed all the same; withdrawn, the item is to be run."""
    async with opened(path, intents=True) as run:
        task = asyncio.create_task(run.recording.put_intent("a", 1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await run.recording.put_intent("b", 1)
        assert states(path) == {"a": State.UNKNOWN, "b": State.UNKNOWN}
        run.recording.withdraw_intent("a", 1)
    assert states(path) == {"a": State.RETRY, "b": State.UNKNOWN}


async def test_an_intent_keeps_what_its_item_has_spent(path: str) -> None:
    """In earlier lives; whether its job begins or not."""
    async with opened(path, intents=True) as run:
        await run.recording.put_intent("begins", 1, {"usd": 1.5})
        await run.recording.put_intent("leaves", 1, {"usd": 2.5})
        run.recording.withdraw_intent("leaves", 1, {"usd": 2.5})
    assert rows(path, "SELECT key, spent FROM item ORDER BY key") == [
        ("begins", '{"usd": 1.5}'),
        ("leaves", '{"usd": 2.5}'),
    ]


@pytest.mark.virtual_clock
async def test_no_job_begins_after_the_end(path: str) -> None:
    """One that has outlived its run does not wait for a commit that never comes."""
    async with opened(path, intents=True) as run:
        run.close()
        await run.closed.wait()
        with pytest.raises((ClosedError, JournalError)):
            await asyncio.wait_for(run.recording.put_intent("late", 1), 10)
    assert states(path) == {}


# --- trouble ---


@pytest.mark.virtual_clock
async def test_what_cannot_be_written_is_held_and_tried_again_each_second(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The trouble is told once; what was held comes before what came after it."""
    async with opened(path) as run:
        run.broken = FULL
        began = asyncio.get_running_loop().time()
        run.put(0)
        run.recording.flush()
        await until(lambda: run.tries == 4)
        assert asyncio.get_running_loop().time() - began == pytest.approx(3 * RETRY_AFTER_TROUBLE, abs=0.02)
        run.put(1)
        run.recording.flush()
        assert run.troubles == [FULL]
        assert run.recording.in_trouble is FULL
        assert run.settled == []
        run.broken = None
        await until(lambda: len(run.settled) == 2)
        assert run.batches == [1, 1]
        run.put(2)
        await until(lambda: len(run.settled) == 3)
    assert [record.getMessage() for record in caplog.records] == [
        "run.db: the disk is full. Nothing new is begun; what is in flight is finished and held."
    ]
    assert states(path) == dict.fromkeys(range(3), State.DONE)


@pytest.mark.virtual_clock
async def test_trouble_of_any_kind_is_told_as_a_journal_s(path: str) -> None:
    async with opened(path) as run:
        run.broken = MemoryError("no more")
        run.put(0)
        await until(lambda: run.troubles)
        run.broken = None
    [trouble] = run.troubles
    assert path in str(trouble)
    assert isinstance(trouble.__cause__, MemoryError)
    assert run.settled == run.puts


@pytest.mark.virtual_clock
async def test_what_is_held_is_tried_a_last_time_at_the_close(path: str) -> None:
    """At once: nobody waits for a second that may bring nothing."""
    async with opened(path) as run:
        run.broken = FULL
        run.put(0)
        await until(lambda: run.troubles)
        run.put(1)
        run.broken = None
        closed = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() == closed
    assert states(path) == {0: State.DONE, 1: State.DONE}


@pytest.mark.virtual_clock
async def test_what_finds_no_place_is_kept_for_who_asks(path: str) -> None:
    async with opened(path) as run:
        run.put(0)
        run.recording.flush()
        await until(lambda: run.settled)
        run.broken = FULL
        run.put(1)
        await until(lambda: run.troubles)
        run.put(2, error=ValueError("bad"))
        run.recording.flush()
        run.put(3)
        tries, began = run.tries, asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began == pytest.approx(HELD_FOR, abs=0.02)
    assert run.tries == tries + 1 + HELD_FOR / RETRY_AFTER_TROUBLE
    assert [ended.key for ended in run.recording.unrecorded] == [1, 2, 3]
    assert states(path) == {0: State.DONE}


@pytest.mark.virtual_clock
async def test_trouble_that_comes_with_the_close_is_borne_for_some_seconds(path: str) -> None:
    """And told: nobody is to take what was lost for recorded."""
    async with opened(path) as run:
        run.broken = FULL
        run.put(0)
        began = asyncio.get_running_loop().time()
        run.close()
        await run.closed.wait()
    assert asyncio.get_running_loop().time() - began == pytest.approx(HELD_FOR, abs=0.02)
    assert run.troubles == [FULL]
    assert run.recording.unrecorded == run.puts
    assert rows(path, "SELECT stopped FROM run") == [("why",)]


@pytest.mark.virtual_clock
async def test_trouble_that_passes_during_the_close_loses_nothing(path: str) -> None:
    """Somebody has made room in time."""
    async with opened(path) as run:
        run.broken = FULL
        run.put(0)
        run.close()
        await until(lambda: run.tries == 3)
        run.broken = None
        await run.closed.wait()
    assert run.recording.unrecorded == []
    assert run.settled == run.puts


@pytest.mark.virtual_clock
async def test_what_ends_while_the_last_try_is_made_is_kept_too(path: str) -> None:
    """Something ends during each of them."""
    loop = asyncio.get_running_loop()
    async with opened(path) as run:
        write = run.recording._store.write

        def write_while_something_ends(batches: Sequence[Batch]) -> None:
            loop.call_soon_threadsafe(run.put, f"during try {run.tries + 1}")
            write(batches)

        run.recording._store.write = write_while_something_ends  # type: ignore[method-assign]
        run.broken = FULL
        run.put(0)
        await until(lambda: run.troubles)
        run.close()
        run.put(1)
        await run.closed.wait()
    assert run.recording.unrecorded[-1].key == f"during try {run.tries}"
    assert len(run.puts) == 2 + run.tries


async def test_a_close_whose_account_cannot_be_recorded_closes_all_the_same(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path) as run:
        run.put(0)
        run.recording.flush()
        await until(lambda: run.settled)
        assert run.recording._store._writer is not None
        run.recording._store._writer.execute("PRAGMA busy_timeout = 0")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            run.close()
            await run.closed.wait()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "the end of the run could not be recorded" in record.getMessage()
    assert states(path) == {0: State.DONE}


@pytest.mark.virtual_clock
async def test_who_is_told_of_a_commit_may_close_or_flush(path: str) -> None:
    """Also where several batches were committed together, of which the others are still to be told of."""
    async with opened(path) as run:
        run.broken = FULL
        for number in range(3):
            run.put(number)
            run.recording.flush()
            await asyncio.sleep(0.3)
        told = run.recording._settle

        def settle(waiting: list[Any]) -> None:
            told(waiting)
            run.recording.flush()
            run.close()

        run.recording._settle = settle
        run.broken = None
        await asyncio.wait_for(run.closed.wait(), 60)
    assert [ended.key for ended in run.settled] == [0, 1, 2]
    assert states(path) == dict.fromkeys(range(3), State.DONE)


@pytest.mark.virtual_clock
async def test_the_account_is_taken_when_all_is_committed(path: str) -> None:
    async with opened(path) as run:
        run.put(0)
        settled = list[int]()

        def account() -> tuple[str | None, dict[str, int]]:
            settled.append(len(run.settled))
            return None, {"done": len(run.settled)}

        run.closing = True
        run.recording.close(account, run.closed.set)
        await run.closed.wait()
    assert settled == [1]
    assert rows(path, "SELECT stopped, counts FROM run") == [(None, '{"done": 1}')]


# --- any doings ---

ACTIONS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(["done", "large", "dead", "skipped", "no key"])),
    st.tuples(st.just("puts"), st.integers(100, 600)),
    st.tuples(st.sampled_from(["step", "large step"]), st.just(0)),
    st.tuples(st.just("intent"), st.just(0)),
    st.tuples(st.just("flush"), st.just(0)),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.05, 0.2, 1.0, 5.0])),
    st.tuples(st.just("break"), st.sampled_from(["journal", "memory"])),
    st.tuples(st.just("mend"), st.just(0)),
)
ERRORS = {"dead": ValueError("bad"), "skipped": SkipItem("old"), "no key": UsageError("no key")}


class Doings:
    """One thing after the other, and what must come of it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number = 0
        self.steps: dict[Key, str] = {}
        self.begun: set[Key] = set()
        self.intents: list[asyncio.Task[None]] = []

    async def do(self, verb: str, how: Any) -> None:
        run, recording = self.run, self.run.recording
        if verb == "put":
            self.put(how)
        elif verb == "puts":
            for _ in range(how):
                self.put("done")
        elif verb in ("step", "large step"):
            recording.put_step(self.number, "score", b"", LARGE if verb == "large step" else 1)
            self.steps[self.number] = "open"
        elif verb == "intent":
            self.intents.append(asyncio.create_task(self.intend(f"intent {len(self.intents)}")))
            await asyncio.sleep(0)  # it waits now
        elif verb == "flush":
            recording.flush()
        elif verb == "wait":
            await asyncio.sleep(how)
        elif verb == "break":
            run.broken = FULL if how == "journal" else MemoryError()
        else:
            run.broken = None

    def put(self, how: str) -> None:
        key = None if how == "no key" else self.number
        value = LARGE if how == "large" else self.number
        self.run.put(key, None if how in ERRORS else value, ERRORS.get(how), steps=self.number in self.steps)
        if self.number in self.steps and key is not None:
            self.steps[self.number] = how
        self.number += 1

    async def intend(self, key: Key) -> None:
        try:
            await self.run.recording.put_intent(key, "item")
        except JournalError:
            assert self.run.recording.in_trouble
            self.run.recording.withdraw_intent(key, "item")
        else:
            self.begun.add(key)
            assert key in states(self.run.path)


@settings(max_examples=50)
@given(actions=st.lists(ACTIONS, max_size=12))
@example(actions=[("step", 0), ("flush", 0), ("put", "done"), ("break", "journal"), ("put", "done")])
@example(actions=[("break", "memory"), ("put", "large"), ("wait", 5.0), ("mend", 0), ("put", "dead")])
@example(actions=[("intent", 0), ("break", "journal"), ("intent", 0), ("wait", 0.0), ("puts", 600)])
@example(actions=[("break", "journal"), ("intent", 0), ("wait", 1.0), ("intent", 0), ("mend", 0), ("wait", 5.0)])
def test_each_outcome_is_told_once_after_its_commit_in_order_or_is_unrecorded(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, Any]]
) -> None:
    path = str(tmp_path_factory.mktemp("run") / "run.db")

    async def life() -> Doings:
        async with opened(path, intents=True) as run:  # which checks it, too
            doings = Doings(run)
            for verb, how in actions:
                await doings.do(verb, how)
            run.close()
            await run.closed.wait()
            await asyncio.gather(*doings.intents)
            return doings

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        doings = runner.run(life())
    run = doings.run
    there = states(path)
    for ended in run.settled:
        expected = State.DEAD if ended.kind else State.SKIPPED if ended.error else State.DONE
        assert ended.key is None or there[ended.key] == expected
    for ended in run.recording.unrecorded:
        assert ended.key not in there
    assert {key for key, state in there.items() if state == State.UNKNOWN} == doings.begun
    if not run.failures:
        assert run.recording.unrecorded == []
        assert steps_in(path) == {(key, "score") for key, how in doings.steps.items() if how in ("open", "dead")}
    else:
        finished = {ended.key for ended in run.settled if ended.kind is None}
        assert not finished & {key for key, _ in steps_in(path)}


# --- the end, at any moment ---


class Scene:
    """A run in a file of its own, which may be closed at any moment."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.run: Run | None = None

    async def play(self) -> None:
        run = self.run = Run(self.path, intents=True)
        try:
            await run.recording.open()
            for number in range(3):
                if not run.closing:
                    await run.recording.put_intent(number, number)
                if not run.closing:
                    run.recording.put_step(number, "score", b"", LARGE)
                    await asyncio.sleep(0.15)
                if not run.closing:
                    run.put(number, number, steps=True)
                if number == 1 and not run.closing:
                    await run.look_up("a", 1)
        finally:
            run.close()
            await run.closed.wait()

    def close(self) -> None:
        if self.run is not None:
            self.run.close()

    def check(self) -> None:
        run = self.run
        if run is None:
            return
        # First of all: who reads leaves an empty WAL behind.
        assert not {"run.db-wal", "run.db-shm"} & set(files_beside(self.path))
        run.check()
        assert run.recording.unrecorded == []
        assert rows(self.path, "SELECT count(*) FROM run WHERE ended IS NULL") == [(0,)]
        there = states(self.path)
        done = {ended.key for ended in run.settled}
        assert {key for key, state in there.items() if state == State.DONE} == done
        assert not done & {key for key, _ in steps_in(self.path)}


def test_it_may_be_closed_at_any_moment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """While it is opened, too. What was put is committed, file and lock are given back."""

    def arrange() -> Scene:
        return Scene(str(tmp_path_factory.mktemp("run") / "run.db"))

    assert act_at_every_step(Scene.play, Scene.close, arrange=arrange, check=Scene.check) > 10


def test_who_uses_it_may_be_cancelled_at_any_moment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file that was about to be opened is closed; nothing that was put is lost."""

    def arrange() -> Scene:
        return Scene(str(tmp_path_factory.mktemp("run") / "run.db"))

    assert cancel_at_every_step(Scene.play, arrange=arrange, check=Scene.check) > 10


def test_a_loop_that_is_closed_under_it_ends_no_thread_with_an_error(path: str) -> None:
    """What was being written is committed; nobody is left to be told."""
    go, done = threading.Event(), threading.Event()

    async def begin() -> Run:
        run = Run(path)
        await run.recording.open()
        real = run.write

        def slow(batches: Sequence[Batch]) -> None:
            assert go.wait(10)
            real(batches)
            done.set()

        run.write = slow
        run.put("a")
        run.recording.flush()
        return run

    loop = asyncio.new_event_loop()
    run = loop.run_until_complete(begin())
    loop.close()
    go.set()
    assert done.wait(10)
    recording = run.recording
    recording._workers.dismiss()
    for thread in recording._workers.threads:
        thread.join(10)
        assert not thread.is_alive()
    assert run.settled == []
    assert states(path) == {"a": State.DONE}
    recording._store.close_reading()
    recording._store.close(None, {})
    assert not is_held(path)
