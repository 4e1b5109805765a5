"""The thread's side of a journal while a run writes it: the lock, two connections, the side file.

    open     lock taken -> file made or checked -> fingerprint compared -> a row for this run
    write    one batch, one transaction: large results to the side file and to the disk, then rows
    look_up  rows and steps by key, on a connection of its own, so that no commit is waited for
    close    this run's row is ended -> what is in the -wal goes into the file -> lock released

One statement writes a whole batch: each step of SQLite gives up the GIL, and 500 rows would wait for it 500 times.

Raises `JournalError` for everything that is wrong with the file or its disk. Threads: one at a time for `look_up`, one
at a time for the rest; none is the loop's.
"""

import json
import logging
import os
import shlex
import socket
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from penstock import clock
from penstock.errors import JournalError
from penstock.journal import side_file
from penstock.journal.database import explained, open_to_read, open_to_write, set_aside
from penstock.journal.lock import Lock
from penstock.journal.options import Journal
from penstock.journal.record import Entry, runs_again
from penstock.journal.schema import (
    DONE_COLUMNS,
    ITEM_COLUMNS,
    STEP_COLUMNS,
    Key,
    Row,
    State,
    StepRow,
    checksum,
    lock_of,
    side_file_of,
)
from penstock.journal.side_file import SideFile

R = TypeVar("R", Row, StepRow)

logger = logging.getLogger("penstock.journal")

KILLED = "killed"
"""Why a run has ended whose process did not live to tell."""


class StepEntry(NamedTuple):
    """A row of a step to be written, and what goes into the side file for it."""

    row: StepRow
    large: bytes | None = None


@dataclass(slots=True)
class Batch:
    """What one transaction writes."""

    done: list[Any] = field(default_factory=list)
    """Items that are done, as nearly all are: their columns (`DONE_COLUMNS`, and the checksum) one after the other."""
    entries: list[Entry] = field(default_factory=list)
    """All other items."""
    steps: list[StepEntry] = field(default_factory=list)
    forgotten: list[Key] = field(default_factory=list)
    """Items that are finished, and whose steps may be on the disk."""

    def has_large(self) -> bool:
        """Whether something of it goes to the side file."""
        return any(entry.large is not None for entry in self.entries) or any(
            step.large is not None for step in self.steps
        )


class Known(NamedTuple):
    """What the journal knows of an item."""

    id: int
    row: Row


class Begun(NamedTuple):
    """A journal as a run finds it."""

    run: int
    """The number of this run."""
    with_steps: bool
    """Whether it knows of steps."""
    example: Key | None
    """The key of an item that it knows."""


class Store:
    """One run's file. See the module."""

    def __init__(self, options: Journal, fingerprint: str) -> None:
        self._options = options
        self._fingerprint = fingerprint
        self._path = options.file
        self._lock: Lock | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._side = SideFile(side_file_of(self._path))
        self._identities: dict[str, tuple[int, int] | None] = {}
        """Of the journal and its lock, which lets others in where it is removed."""
        self._run = 0

    def open(self) -> Begun:
        """Begin a run.

        Raises:
            JournalError: the file cannot be used, by another job's fingerprint among other reasons.
        """
        path, full_sync = self._path, self._options.durability == "machine"
        lock = Lock(path)
        lock.take()
        self._lock = lock
        try:
            self._writer = open_to_write(path, full_sync=full_sync)
            if self._is_another_job_s(self._writer):
                self._writer.close()
                logger.warning("%s was begun by another job; it is now %s, and a new one begins", path, set_aside(path))
                self._writer = open_to_write(path, full_sync=full_sync)
            self._identities = {file: _identity(file) for file in (path, lock_of(path))}
            _refuse_without_side_file(self._writer, path)
            begun = self._begin(self._writer)
            self._reader = open_to_read(path)
        except (sqlite3.Error, OSError) as error:
            raise explained(error, path) from error
        return begun

    def _is_another_job_s(self, connection: sqlite3.Connection) -> bool:
        """Whether it is to be set aside.

        Raises:
            JournalError: the fingerprint is another one, and nobody has said what to do.
        """
        found = fingerprint_of(connection)
        if found is None or found == self._fingerprint or self._options.on_mismatch == "ignore":
            return False
        if self._options.on_mismatch == "new":
            return True
        raise JournalError(
            f"{self._path} was begun by another job than this one:\n"
            f"  there: {found}\n"
            f"  here:  {self._fingerprint}\n"
            f'Choose another path; or write Journal(path, on_mismatch="new") to set it aside and begin anew, or '
            f'on_mismatch="ignore" to go on with what it holds.'
        )

    def _begin(self, connection: sqlite3.Connection) -> Begun:
        now = clock.wall()
        connection.execute("BEGIN IMMEDIATE")
        # Of those that had no key, nobody can say whether they come again: they are asked for anew.
        connection.execute("DELETE FROM item WHERE key IS NULL")
        connection.execute("UPDATE run SET ended = ?, stopped = ? WHERE ended IS NULL", (now, KILLED))
        example = connection.execute("SELECT key FROM item LIMIT 1").fetchone()
        with_steps = connection.execute("SELECT EXISTS (SELECT 1 FROM step)").fetchone()[0]
        added = connection.execute(
            "INSERT INTO run(started, host, pid, boot, fingerprint) VALUES (?, ?, ?, ?, ?)",
            (now, socket.gethostname(), os.getpid(), _boot(), self._fingerprint),
        )
        connection.execute("COMMIT")
        assert added.lastrowid is not None, "it has inserted a row"
        self._run = added.lastrowid
        return Begun(self._run, bool(with_steps), None if example is None else example[0])

    def write(self, batches: Sequence[Batch]) -> None:
        """Commit batches, all of them or nothing.

        Raises:
            JournalError: the disk is full, and the like.
        """
        connection = self._writer
        assert connection is not None, "opened before it is written"
        try:
            self._refuse_if_replaced()
            self._place(batches)
            connection.execute("BEGIN IMMEDIATE")
            for batch in batches:
                _insert(connection, batch)
            connection.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error | OSError):
                raise explained(error, self._path) from error
            raise

    def _refuse_if_replaced(self) -> None:
        """SQLite goes on with a file that has lost its name, and what is written there is lost with it."""
        for file, identity in self._identities.items():
            if _identity(file) != identity:
                raise JournalError(
                    f"{file} was removed or replaced while a run wrote the journal. What was recorded is where it "
                    f"went; put it back in its place and run again, or choose another path."
                )

    def _place(self, batches: Sequence[Batch]) -> None:
        """Write what is too large for a row to the side file, and have it on the disk. Once, however often it is tried.

        What a `sync` that failed was to bring to the disk is written again: the system tells of it only once.
        """
        if any(batch.has_large() for batch in batches):
            placed = [
                (
                    [self._placed_entry(entry) for entry in batch.entries],
                    [self._placed_step(step) for step in batch.steps],
                )
                for batch in batches
            ]
            self._side.sync()
            for batch, (entries, steps) in zip(batches, placed, strict=True):
                batch.entries, batch.steps = entries, steps

    def _placed_entry(self, entry: Entry) -> Entry:
        return entry if entry.large is None else Entry(self._placed(entry.row, entry.large))

    def _placed_step(self, step: StepEntry) -> StepEntry:
        return step if step.large is None else StepEntry(self._placed(step.row, step.large))

    def _placed(self, row: R, large: bytes) -> R:
        offset, size, crc = self._side.append(large)
        return row._replace(file_offset=offset, file_size=size, file_crc=crc)

    def look_up(self, keys: Sequence[Key], with_steps: bool) -> tuple[dict[Key, Known], dict[Key, list[StepRow]]]:
        """What is known of these items, at most some hundred, and the steps of theirs that are finished.

        Raises:
            JournalError: a row is damaged, or the file cannot be read.
        """
        connection = self._reader
        assert connection is not None, "opened before it is read"
        try:
            items = connection.execute(_select_items(len(keys)), keys).fetchall()
            known = {
                columns[1]: Known(columns[0], self._checked(Row(*columns[1:-1]), columns[-1])) for columns in items
            }
            return known, self._look_up_steps(connection, keys, known) if with_steps else {}
        except (sqlite3.Error, OSError) as error:
            raise explained(error, self._path) from error

    def _look_up_steps(
        self, connection: sqlite3.Connection, keys: Sequence[Key], known: Mapping[Key, Known]
    ) -> dict[Key, list[StepRow]]:
        """Of the items that are run: all others have no use for them."""
        running = [key for key in keys if key not in known or runs_again(known[key].row, self._options)]
        steps: dict[Key, list[StepRow]] = {}
        if running:
            for columns in connection.execute(_select_steps(len(running)), running).fetchall():
                step = self._checked(StepRow(*columns[:-1]), columns[-1])
                steps.setdefault(step.key, []).append(step)
        return steps

    def _checked(self, row: R, crc: int) -> R:
        if checksum(row) != crc:
            raise damaged(self._path, row.key)
        return row

    def large_value(self, row: "Row | StepRow") -> bytes | None:
        """What the side file holds of a row's result; None if it holds nothing of it.

        Raises:
            JournalError: the side file is missing or damaged.
        """
        if row.file_offset is None or row.file_size is None or row.file_crc is None:
            return None
        return side_file.read(side_file_of(self._path), row.file_offset, row.file_size, row.file_crc)

    def close_reading(self) -> None:
        """No more is looked up."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def close(self, stopped: str | None, counts: dict[str, int]) -> None:
        """End the run. Without an error: what is recorded is recorded.

        Raises:
            JournalError: the end of the run could not be recorded.
        """
        connection, self._writer = self._writer, None
        self.close_reading()  # before the writer, which removes the -wal if it is the last one
        try:
            if connection is not None and self._run:
                connection.execute(
                    "UPDATE run SET ended = ?, stopped = ?, counts = ? WHERE id = ?",
                    (clock.wall(), stopped, json.dumps(counts), self._run),
                )
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (sqlite3.Error, OSError) as error:
            raise explained(error, self._path) from error
        finally:
            if connection is not None:
                connection.close()
            self._side.close()
            if self._lock is not None:
                self._lock.release()


def _refuse_without_side_file(connection: sqlite3.Connection, path: str) -> None:
    """Refuse a journal whose large results are gone: what is done would be so by name only."""
    reach = connection.execute(
        "SELECT max(coalesce((SELECT max(file_offset + file_size) FROM item), 0),"
        " coalesce((SELECT max(file_offset + file_size) FROM step), 0))"
    ).fetchone()[0]
    side = side_file_of(path)
    found = os.path.getsize(side) if os.path.exists(side) else 0
    if found < reach:
        raise JournalError(
            f"{side}: has {found:,} bytes, and the journal refers to {reach:,}. Restore both from the same copy; "
            f"or have what is lost run again, by `penstock retry --damaged {shlex.quote(path)}`."
        )


def fingerprint_of(connection: sqlite3.Connection) -> str | None:
    """Of the job whose outcomes a journal holds; None if none has begun."""
    found = connection.execute("SELECT fingerprint FROM run ORDER BY id DESC LIMIT 1").fetchone()
    return None if found is None else found[0]


def damaged(path: str, key: Key | None) -> JournalError:
    """What is said of a row whose checksum is wrong."""
    return JournalError(
        f"{path} is damaged: the row of {key!r:.200} does not match its checksum. Restore a copy of the file; or have "
        f"what is damaged run again, by `penstock retry --damaged {shlex.quote(path)}`."
    )


def _insert(connection: sqlite3.Connection, batch: Batch) -> None:
    if batch.done:
        connection.execute(_insert_done(len(batch.done) // (len(DONE_COLUMNS) + 1)), batch.done)
    if batch.entries:
        rows = [entry.row for entry in batch.entries]
        connection.execute(_insert_items(len(rows)), _with_checksums(rows))
    if batch.steps:
        steps = [entry.row for entry in batch.steps]
        connection.execute(_insert_steps(len(steps)), _with_checksums(steps))
    for some in _slices(batch.forgotten):
        connection.execute(f"DELETE FROM step WHERE key IN ({_marks(len(some))})", some)


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _with_checksums(rows: Iterable[tuple[object, ...]]) -> list[object]:
    return [column for row in rows for column in (*row, checksum(row))]


def _one(columns: Sequence[str]) -> str:
    return f"({_marks(len(columns) + 1)})"


_NEWER = ", ".join(f"{name} = excluded.{name}" for name in (*ITEM_COLUMNS, "crc"))
"""The key, too: 1.0 is the same one as 1, and the checksum tells them apart."""


@lru_cache(16)
def _insert_done(rows: int) -> str:
    return (
        f"INSERT INTO item({', '.join(DONE_COLUMNS)}, crc) VALUES {', '.join([_one(DONE_COLUMNS)] * rows)} "
        f"ON CONFLICT(key) DO UPDATE SET {_NEWER}"
    )


@lru_cache(16)
def _insert_items(rows: int) -> str:
    return (
        f"INSERT INTO item({', '.join(ITEM_COLUMNS)}, crc) VALUES {', '.join([_one(ITEM_COLUMNS)] * rows)} "
        f"ON CONFLICT(key) DO UPDATE SET {_NEWER} "
        # What is done stays done: nothing that was paid for is lost to a second try that fails.
        f"WHERE item.state <> {State.DONE:d} OR excluded.state = {State.DONE:d}"
    )


@lru_cache(16)
def _insert_steps(rows: int) -> str:
    return (
        f"INSERT OR REPLACE INTO step({', '.join(STEP_COLUMNS)}, crc) VALUES {', '.join([_one(STEP_COLUMNS)] * rows)}"
    )


@lru_cache(16)
def _select_items(keys: int) -> str:
    return f"SELECT id, {', '.join(ITEM_COLUMNS)}, crc FROM item WHERE key IN ({_marks(keys)})"


@lru_cache(16)
def _select_steps(keys: int) -> str:
    return f"SELECT {', '.join(STEP_COLUMNS)}, crc FROM step WHERE key IN ({_marks(keys)})"


def _marks(number: int) -> str:
    return ",".join("?" * number)


def _slices(keys: Sequence[Key], size: int = 500) -> Iterable[Sequence[Key]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _boot() -> str | None:
    """Which start of the machine this is: a process number says nothing beyond it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
