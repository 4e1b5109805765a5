"""What is done to a journal while no run writes it: dead items are asked for again, and it is made smaller.

    retry    rows that are dead -> checked, state RETRY -> one transaction
    forget_damaged   rows that differ from their checksum, or whose result does -> removed -> one transaction
    compact  steps of finished items go
             side file: what rows refer to -> its end -> rows commit -> its beginning -> rows commit -> cut off behind
             database: VACUUM, and what is in the -wal goes into the file

Guarantees: both hold the journal's `Lock`, and are refused while a run writes. Killed at any moment, or out of disk
space, they lose nothing: `retry` has happened or not, and after a broken `compact` each row refers to bytes that are
there. That is why results move twice within one file, and never onto bytes that a committed row refers to; a new file
beside the old one would have to be renamed in the same moment in which the rows change. What a kill leaves behind is a
tail that nothing refers to, and the next `compact` removes it. Checksums are verified before they are renewed.

Threads: any. All of it blocks.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import FileIO
from typing import NamedTuple

from penstock.errors import JournalError, UsageError
from penstock.journal import side_file
from penstock.journal.database import explaining, open_to_read, open_to_write
from penstock.journal.lock import Lock
from penstock.journal.reading import SLICE, as_path, as_text
from penstock.journal.record import is_about
from penstock.journal.schema import Row, State, StepRow, checksum, side_file_of
from penstock.journal.store import damaged

_TABLES: dict[str, type[Row] | type[StepRow]] = {"item": Row, "step": StepRow}
_LARGE = "file_offset IS NOT NULL"
_FINISHED = f"({State.DONE:d}, {State.SKIPPED:d})"


class Compacted(NamedTuple):
    """What `compact` has come to. Sizes are those of the database, its WAL and the side file together."""

    before_bytes: int
    after_bytes: int


def retry(path: str | os.PathLike[str], where: str | None = None, *, unknown: bool = False) -> int:
    """Ask for dead items to be run again, by the next run on this journal, and return how many they are.

    All or nothing, in one transaction. Items without a usable key stay dead: nobody could tell that they come again.
    Blocks for as long as the disk does; the whole file is checked first. Any thread.

    Args:
        where: which of the dead: a kind ("transient"), a status ("HTTP 422"), or a part of the error's class and first
            line ("ValueError"); None: all of them.
        unknown: also those of which nobody knows how they ended, whatever `where` says.

    Raises:
        JournalError: a run writes it, it cannot be read or written, or a row is damaged. Nothing is changed then.
        UsageError: the path is none; `where` is blank.
    """
    path = as_path(path)
    if where is not None and not where.strip():
        raise UsageError(
            'where is empty: expected which dead items are meant, such as "transient", "HTTP 422" or "ValueError". '
            "Leave it out for all of them."
        )
    number = 0
    with _alone(path) as connection, _transaction(connection):
        states = f"({State.DEAD:d}, {State.UNKNOWN:d})" if unknown else f"({State.DEAD:d})"
        for id_, row in _rows(connection, path, "item", f"state IN {states} AND key IS NOT NULL"):
            assert isinstance(row, Row), "an item's"
            if where is None or row.state == State.UNKNOWN or is_about(row, where):
                number += 1
                _update(connection, "item", id_, row._replace(state=int(State.RETRY)), "state")
    return number


def forget_damaged(path: str | os.PathLike[str]) -> int:
    """Remove rows that are damaged, or whose result or input beside the file is, and return how many they were.

    The next run does their items and steps again; without it, one such row stops each run that comes to it. All or
    nothing, in one transaction. Blocks: everything is read. Any thread.

    Raises:
        JournalError: a run writes it, it cannot be read or written, or it is damaged as a database, not in its rows.
        UsageError: the path is none.
    """
    path = as_path(path)
    number = 0
    with _alone(path) as connection, _transaction(connection):
        connection.text_factory = as_text
        for table in _TABLES:
            for id_, row, crc in _all_rows(connection, table, "TRUE"):
                if checksum(row) != crc or not _has_its_result(path, row):
                    connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (id_,))
                    number += 1
    return number


def _has_its_result(path: str, row: Row | StepRow) -> bool:
    """Whether what is beside the file for this row is whole."""
    if row.file_offset is None:
        return True
    try:
        side_file.read(side_file_of(path), *_place(row))
    except JournalError:
        return False
    return True


def compact(path: str | os.PathLike[str]) -> Compacted:
    """Give disk space back: that of finished items' steps, of results that nothing refers to, of what was deleted.

    Blocks for as long as it takes to write everything anew, the side file's results twice; needs that much room for a
    while. Any thread. Readers go on meanwhile.

    Raises:
        JournalError: a run writes it, it cannot be read or written, or something in it is damaged. No item is lost
            then, and it may be done again.
        UsageError: the path is none.
    """
    path = as_path(path)
    with _alone(path) as connection:
        before = _size(path)
        connection.execute(f"DELETE FROM step WHERE key IN (SELECT key FROM item WHERE state IN {_FINISHED})")
        _move_results_together(connection, path)
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return Compacted(before, _size(path))


@contextmanager
def _alone(path: str) -> Iterator[sqlite3.Connection]:
    open_to_read(path).close()  # what is missing would be made anew
    lock = Lock(path)
    lock.take()
    try:
        with explaining(path), closing(open_to_write(path, full_sync=True)) as connection:
            yield connection
    finally:
        lock.release()


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()  # does nothing where SQLite has done so by itself
        raise


def _size(path: str) -> int:
    files = (path, f"{os.path.realpath(path)}-wal", side_file_of(path))
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


# --- the side file ---


def _move_results_together(connection: sqlite3.Connection, path: str) -> None:
    name = side_file_of(path)
    if not os.path.exists(name):
        return
    with open(name, "r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        places = [_extent(connection, path, table) for table in _TABLES]
        live, first = sum(live for live, _ in places), min(first for _, first in places)
        if live == end:
            return
        # Where nothing that is referred to stands in the way, it has been moved to the end before: by a compaction that
        # did not come to its own end.
        if first < live:
            _move_to_the_end(connection, path, file, end, max(live, end))
        _move(connection, path, file, 0)
        file.truncate(live)
        os.fsync(file.fileno())


def _extent(connection: sqlite3.Connection, path: str, table: str) -> tuple[int, float]:
    """Bytes that rows refer to, and where the first of them is."""
    live, first = 0, float("inf")
    for _, row in _rows(connection, path, table, _LARGE):
        offset, size, _ = _place(row)
        live, first = live + size, min(first, offset)
    return live, first


def _move_to_the_end(connection: sqlite3.Connection, path: str, file: FileIO, end: int, to: int) -> None:
    try:
        _move(connection, path, file, to)
    except BaseException:
        # A full disk should not stay full of what was in vain. The interruption may have come after the commit.
        with suppress(sqlite3.Error):
            if all(_reach(connection, table) <= end for table in _TABLES):
                file.truncate(end)
        raise


def _reach(connection: sqlite3.Connection, table: str) -> int:
    """Where the last byte is that a row refers to."""
    found: int = connection.execute(f"SELECT coalesce(max(file_offset + file_size), 0) FROM {table}").fetchone()[0]
    return found


def _move(connection: sqlite3.Connection, path: str, file: FileIO, to: int) -> None:
    """Copy all results to where nothing refers to, one behind the other, and then have the rows refer to them there."""
    with _transaction(connection):
        for table in _TABLES:
            for id_, row in _rows(connection, path, table, _LARGE):
                data = side_file.read(side_file_of(path), *_place(row))
                file.seek(to)
                _write(file, data)
                _update(connection, table, id_, row._replace(file_offset=to), "file_offset")
                to += len(data)
        os.fsync(file.fileno())


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


# --- rows ---


def _rows(connection: sqlite3.Connection, path: str, table: str, condition: str) -> Iterator[tuple[int, Row | StepRow]]:
    """Number and row, checked; each may be updated meanwhile."""
    for id_, row, crc in _all_rows(connection, table, condition):
        if checksum(row) != crc:
            raise damaged(path, row.key)
        yield id_, row


def _all_rows(connection: sqlite3.Connection, table: str, condition: str) -> Iterator[tuple[int, Row | StepRow, int]]:
    """Number, row and checksum as it is recorded; each may be changed or removed meanwhile."""
    kind = _TABLES[table]
    at = 0
    while found := connection.execute(
        f"SELECT rowid, {', '.join(kind._fields)}, crc FROM {table} "
        f"WHERE rowid > ? AND {condition} ORDER BY rowid LIMIT {SLICE}",
        (at,),
    ).fetchall():
        for at, *columns, crc in found:  # the last one is where the next slice begins
            yield at, kind(*columns), crc


def _place(row: Row | StepRow) -> tuple[int, int, int]:
    """Offset, size and checksum of its result in the side file."""
    assert row.file_offset is not None, "asked for"
    assert row.file_size is not None, "written with the offset"
    assert row.file_crc is not None, "written with the offset"
    return row.file_offset, row.file_size, row.file_crc


def _update(connection: sqlite3.Connection, table: str, id_: int, row: Row | StepRow, column: str) -> None:
    """Have one column on the disk as it is in the row."""
    connection.execute(
        f"UPDATE {table} SET {column} = ?, crc = ? WHERE rowid = ?", (getattr(row, column), checksum(row), id_)
    )
