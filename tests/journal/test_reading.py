"""A journal as others read it: checked row by row, in constant memory, and without holding up who writes."""

import json
import os
import pickle
import socket
import sqlite3
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ClosedError, JournalError, UsageError
from penstock.journal import reading as reading_module
from penstock.journal.database import open_to_write
from penstock.journal.lock import Lock
from penstock.journal.reading import SLICE, DeadCause, Reading
from penstock.journal.schema import INLINE_BYTES, Key, Row, State, checksum, side_file_of
from penstock.journal.side_file import SideFile
from penstock.journal.upkeep import compact

FINGERPRINT = '{"job": "score", "version": "2", "params": {"model": "x"}, "codec": "json"}'
RECORDED = 1_767_225_600.25  # 2026-01-01
LARGE = "é" * INLINE_BYTES


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


def done(key: Key, result: str | bytes | None = "1", spent: str | None = None) -> Row:
    return Row(key, 1, 1, 1, RECORDED, 0.0, 0.5, spent, result)


def large(path: str, key: Key, result: str | bytes) -> Row:
    data, empty = (result.encode(), "") if isinstance(result, str) else (result, b"")
    file = SideFile(side_file_of(path))
    offset, size, crc = file.append(data)
    file.close()
    return done(key, empty)._replace(file_offset=offset, file_size=size, file_crc=crc)


def large_input(path: str, key: Key | None, state: State, data: str | bytes) -> Row:
    row = large(path, "", data)
    return row._replace(key=key, state=int(state), result=None, input=row.result)


def dead(key: Key | None, message: str = "no", status: int | None = None, error: str = "ValueError") -> Row:
    row = Row(key, 2, 1, 1, RECORDED, 0.0, 0.5, input="7", kind="permanent", error=error, message=message)
    return row._replace(status=status)


def in_state(key: Key, state: State) -> Row:
    return Row(key, int(state), 0, 1, RECORDED, 0.0, 0.0)


@contextmanager
def run(path: str, stopped: str | None = None) -> Iterator[sqlite3.Connection]:
    """One that holds the lock, has begun, and ends with the block."""
    lock = Lock(path)
    lock.take()
    with closing(open_to_write(path, full_sync=False)) as connection:
        begun = connection.execute(
            "INSERT INTO run(started, host, pid, fingerprint) VALUES (?, 'here', 7, ?)", (RECORDED, FINGERPRINT)
        )
        yield connection
        ended = (RECORDED + 1, stopped, '{"done": 1}', begun.lastrowid)
        connection.execute("UPDATE run SET ended = ?, stopped = ?, counts = ? WHERE id = ?", ended)
    lock.release()


def insert(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Rows with their checksums. A key that is there already gets the new row."""
    for row in rows:
        columns = (*row._fields, "crc")
        statement = f"INSERT OR REPLACE INTO item({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        connection.execute(statement, (*row, checksum(row)))


def record(path: str, rows: Iterable[Row], stopped: str | None = None) -> None:
    """As a run of one commit does."""
    with run(path, stopped) as connection:
        connection.execute("BEGIN")
        insert(connection, rows)
        connection.execute("COMMIT")


def execute(path: str, statement: str, *parameters: object) -> None:
    """What no run would do to its file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, parameters)


# --- the whole ---


def test_an_overview_tells_what_the_journal_is_and_how_far_it_is(path: str) -> None:
    """Job, runs, items by state, and what was spent, by unit."""
    states = [in_state(state.name, state) for state in State]
    record(path, [*states, done("a", spent='{"usd": 0.5, "tokens": 10}'), done("b", spent='{"usd": 0.25}')])
    record(path, [], stopped="interrupted")
    with Reading(path) as reading:
        assert reading.fingerprint() == json.loads(FINGERPRINT)
        assert set(reading.meta()) == {"created", "penstock version"}
        assert reading.counts() == {state: 3 if state is State.DONE else 1 for state in State}
        assert reading.spent() == {"tokens": 10.0, "usd": 0.75}
        first, second = reading.runs()
        assert (first.stopped, second.stopped) == (None, "interrupted")
        assert first.counts == {"done": 1}
        assert (first.host, first.pid) == ("here", 7)
        assert (first.started, first.ended) == ("2026-01-01T00:00:00.250Z", "2026-01-01T00:00:01.250Z")


def test_a_journal_without_a_run_is_empty_and_no_error(path: str) -> None:
    """Its first run was killed before it had begun."""
    record(path, [])
    execute(path, "DELETE FROM run")
    with Reading(path) as reading:
        assert (reading.fingerprint(), reading.runs(), reading.going_on()) == ({}, [], None)
        assert not any(reading.counts().values())
        assert list(reading.rows()) == []
        assert reading.spent() == {}


def test_a_run_goes_on_while_it_holds_the_lock(path: str) -> None:
    """Not before, not after, and not when somebody holds the lock who is no run."""
    with run(path), Reading(path) as reading:
        going_on = reading.going_on()
        assert going_on is not None
        assert going_on == reading.runs()[0]
    with Reading(path) as reading:
        assert reading.going_on() is None
        lock = Lock(path)
        lock.take()
        assert reading.going_on() is None
        lock.release()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody is asked whether a process lives")
def test_a_run_whose_process_is_dead_does_not_go_on_though_somebody_has_the_lock(path: str) -> None:
    """The next one has it, before it has begun, or who works on the file."""
    record(path, [])
    execute(path, "UPDATE run SET ended = NULL, host = ?, pid = ?", socket.gethostname(), 2**31 - 1)
    lock = Lock(path)
    lock.take()
    with Reading(path) as reading:
        assert reading.going_on() is None
        execute(path, "UPDATE run SET pid = ?", os.getpid())
        assert reading.going_on() == reading.runs()[0]
    lock.release()


def test_causes_are_grouped_as_in_a_report(path: str) -> None:
    """By kind, class, status and path, or the message but for its numbers; the most frequent first."""
    record(
        path,
        [
            dead(1, "row 1 is bad"),
            dead(2, "POST http://x/api2?id=2 -> HTTP 422: name", 422, "penstock.errors.HttpStatusError"),
            dead(3, "row 3 is bad\nand more"),
            dead(4, "POST http://x/api2?id=4 -> HTTP 422: age", 422, "penstock.errors.HttpStatusError"),
            dead(7, "POST http://x/api1?id=7 -> HTTP 422: age", 422, "penstock.errors.HttpStatusError"),
            dead(5, "row 5 is bad"),
            dead(6, ""),
        ],
    )
    with Reading(path) as reading:
        assert reading.causes() == [
            DeadCause("permanent", "ValueError: row 1 is bad", 3, 1),
            DeadCause("permanent", "HttpStatusError: POST http://x/api2?id=2 -> HTTP 422: name", 2, 2),
            DeadCause("permanent", "HttpStatusError: POST http://x/api1?id=7 -> HTTP 422: age", 1, 7),
            DeadCause("permanent", "ValueError", 1, 6),
        ]
        assert len(reading.causes(most=1)) == 1


def test_causes_are_remembered_within_bounds(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that hold the record do not fill the memory."""
    monkeypatch.setattr(reading_module, "KNOWN_CAUSES", 2)
    record(path, [dead(name, name) for name in ("a", "b", "c")])
    with Reading(path) as reading:
        assert [cause.example_key for cause in reading.causes()] == ["a", "b"]


# --- item by item ---


def test_rows_come_in_the_order_in_which_they_were_recorded(path: str) -> None:
    """All of them across slices, or those in the states that were asked for."""
    number = 2 * SLICE + 1
    record(path, (dead(key) if key % 3 == 0 else done(key) for key in range(number)))
    with Reading(path) as reading:
        assert [row.key for row in reading.rows()] == list(range(number))
        assert [row.key for row in reading.rows(State.DEAD)] == list(range(0, number, 3))
        assert [row.key for row in reading.rows(State.DONE)] == [key for key in range(number) if key % 3]
        assert list(reading.rows(State.UNKNOWN)) == []


@pytest.mark.parametrize("key", ["a", "", "1", 1, 1.5, b"a", b"", "\u2028\x00", None])
def test_a_key_comes_back_as_what_it_was(path: str, key: Key | None) -> None:
    """Of the same type; no key is no key."""
    record(path, [dead(key)])
    with Reading(path) as reading:
        (row,) = reading.rows()
        assert (row.key, type(row.key)) == (key, type(key))


@pytest.mark.parametrize("value", [None, {"a": [1]}, "text", LARGE])
def test_a_value_is_what_the_job_returned(path: str, value: Any) -> None:
    """Wherever it is, and by whichever codec."""
    text, data = json.dumps(value, ensure_ascii=False), pickle.dumps(value)
    small = value != LARGE
    record(path, [done("json", text) if small else large(path, "json", text)])
    record(path, [done("pickle", data) if small else large(path, "pickle", data)])
    with Reading(path) as as_json, Reading(path, codec=pickle) as as_pickle:
        first, second = as_json.rows()
        assert as_json.value(first) == value == as_pickle.value(second)
        assert as_json.data(first) == text


def test_nothing_recorded_is_none(path: str) -> None:
    """Neither a result nor an input."""
    record(path, [in_state("a", State.SKIPPED)])
    with Reading(path) as reading:
        (row,) = reading.rows()
        assert (reading.value(row), reading.input(row)) == (None, None)


def test_another_codec_is_told_from_damage(path: str) -> None:
    """The message names the one that the run had."""
    record(path, [done("a", pickle.dumps(1))])
    with Reading(path) as reading, pytest.raises(JournalError, match=r"result of 'a' .* codec=; .* 'json'"):
        reading.value(next(reading.rows()))


def test_a_result_is_found_though_it_has_moved_since_its_row_was_read(path: str) -> None:
    """By a compaction meanwhile."""
    record(path, [large(path, "gone", json.dumps(LARGE)), large(path, "a", json.dumps(LARGE))])
    execute(path, "DELETE FROM item WHERE key = 'gone'")
    with Reading(path) as reading:
        row = next(reading.rows())
        compact(path)
        with open(side_file_of(path), "rb") as file:
            assert file.seek(0, 2) == row.file_size
        assert reading.value(row) == LARGE
        execute(path, "DELETE FROM item")
        with pytest.raises(JournalError, match="-results"):
            reading.value(row)


@pytest.mark.parametrize("state", [State.DEAD, State.UNKNOWN, State.RETRY])
def test_a_large_input_is_what_the_source_gave(path: str, state: State) -> None:
    """From the side file, of text and of bytes, for whoever is not done."""
    rows = [
        large_input(path, "json", state, json.dumps(LARGE, ensure_ascii=False)),
        large_input(path, "pickle", state, pickle.dumps(LARGE)),
    ]
    record(path, rows)
    with Reading(path) as as_json, Reading(path, codec=pickle) as as_pickle:
        first, second = as_json.rows(state)
        assert as_json.input(first) == LARGE == as_pickle.input(second)
        assert as_json.input_data(first) == json.dumps(LARGE, ensure_ascii=False)
        assert as_pickle.input_data(second) == pickle.dumps(LARGE)
        assert as_json.value(first) is None


@pytest.mark.parametrize("key", ["a", None])
def test_a_large_input_is_found_though_it_has_moved_since_its_row_was_read(path: str, key: Key | None) -> None:
    """By a compaction meanwhile; also of items without a usable key, of which there may be many."""
    gone = large(path, "gone", "x" * INLINE_BYTES)
    others = [large_input(path, None, State.DEAD, json.dumps(f"{name}{LARGE}")) for name in "xy"]
    record(path, [gone, others[0], large_input(path, key, State.DEAD, json.dumps(LARGE)), others[1]])
    execute(path, "DELETE FROM item WHERE key = 'gone'")
    with Reading(path) as reading:
        rows = list(reading.rows())
        compact(path)
        assert [reading.input(row) for row in rows] == [f"x{LARGE}", LARGE, f"y{LARGE}"]


@given(seconds=st.floats(0, 4e9))
def test_a_time_is_told_as_its_date(seconds: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """To the millisecond, in UTC."""
    path = str(tmp_path_factory.getbasetemp() / "dates.db")
    if not Path(path).exists():
        record(path, [done("a")])
    with Reading(path) as reading:
        told = reading.recorded(next(reading.rows())._replace(recorded=seconds))
    assert told is not None
    assert abs(datetime.fromisoformat(told).timestamp() - seconds) < 0.0021
    assert datetime.fromisoformat(told).tzinfo == UTC


def test_a_time_that_is_no_date_is_none(path: str) -> None:
    """A clock may tell anything."""
    record(path, [done("a")])
    with Reading(path) as reading:
        assert reading.recorded(next(reading.rows())._replace(recorded=1e300)) is None


# --- beside a run ---


def test_who_reads_does_not_keep_the_wal_from_being_emptied(path: str) -> None:
    """In the middle of an iteration, however long its user takes."""
    with run(path) as connection, Reading(path) as reading:
        insert(connection, (done(key) for key in range(2 * SLICE)))
        rows = reading.rows()
        assert next(rows).key == 0
        insert(connection, [done("later")])
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert not busy
        assert Path(f"{path}-wal").stat().st_size == 0
        assert [row.key for row in rows] == list(range(1, 2 * SLICE)), "not those that came since"


def test_memory_depends_on_a_slice_and_not_on_the_items(path: str) -> None:
    """Reading 16 MB, checked, takes a fraction of that."""
    record(path, (done(key, "x" * 10_000) for key in range(1_600)))
    tracemalloc.start()
    try:
        with Reading(path) as reading:
            assert sum(len(row.result or "") for row in reading.rows()) == 16_000_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


# --- damage ---


@pytest.mark.parametrize(
    "damage", ["result = '2'", "attempts = 2", "message = CAST(x'ff' AS TEXT)", "state = 3", "state = 77"]
)
def test_a_row_that_was_changed_is_refused_by_its_key(path: str, damage: str) -> None:
    """Also where its state is no longer what was asked for, and where its text is no text. Cure: named."""
    record(path, [done("a"), done("b"), done("c")])
    execute(path, f"UPDATE item SET {damage} WHERE key = 'b'")
    with Reading(path) as reading:
        rows = reading.rows(State.DONE)
        assert next(rows).key == "a"
        with pytest.raises(JournalError, match=r"run.db is damaged: the row of 'b' .* Restore"):
            next(rows)
    with Reading(path, skip_damaged=True) as reading:
        assert [row.key for row in reading.rows()] == ["a", "c"]
        assert reading.damaged == 1


def test_a_result_that_was_lost_is_refused_or_left_out(path: str) -> None:
    """A side file that is shorter than its rows say."""
    record(path, [large(path, "a", json.dumps(LARGE)), done("b")])
    with open(side_file_of(path), "r+b") as file:
        file.truncate(1)
    with Reading(path) as reading, pytest.raises(JournalError, match="-results"):
        list(reading.results())
    with Reading(path, skip_damaged=True) as reading:
        assert [(row.key, data) for row, data in reading.results()] == [("b", "1")]
        assert reading.damaged == 1


def test_a_state_that_there_is_not_is_damage(path: str) -> None:
    """Counting does not look at checksums, but nothing is counted as what it is not."""
    row = Row("a", 77, 1, 1, RECORDED, 0.0, 0.5)
    record(path, [row])
    with Reading(path) as reading:
        with pytest.raises(JournalError, match="damaged: it has items in a state 77"):
            reading.counts()
        assert list(reading.rows()) == []
        assert checksum(row)


@pytest.mark.parametrize("fingerprint", ["{", "[]"])
def test_a_fingerprint_that_is_none_is_damage(path: str, fingerprint: str) -> None:
    """Of the runs, too."""
    record(path, [])
    execute(path, "UPDATE run SET fingerprint = ?, counts = ?", fingerprint, fingerprint)
    with Reading(path) as reading:
        with pytest.raises(JournalError, match="should be a JSON object"):
            reading.fingerprint()
        with pytest.raises(JournalError, match="should be a JSON object"):
            reading.runs()


# --- wrong use ---


def test_a_reading_is_used_within_its_block(path: str) -> None:
    """Neither before nor after it; a block that could not be entered leaves nothing behind."""
    with pytest.raises(JournalError, match="does not exist"), Reading(path):
        pass
    record(path, [])
    reading = Reading(path)
    with pytest.raises(ClosedError, match="with Reading"):
        reading.meta()
    with reading:
        reading.meta()
    reading.__exit__(None, None, None)
    with pytest.raises(ClosedError):
        list(reading.rows())


@pytest.mark.parametrize("wrong", [1, None, b"run.db"])
def test_a_path_is_text_or_a_path(wrong: Any) -> None:
    """Anything else is wrong use."""
    with pytest.raises(UsageError, match="no path"):
        Reading(wrong)
