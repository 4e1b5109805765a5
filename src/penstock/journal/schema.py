"""What a journal looks like on disk: the tables, and the row of an item.

    meta    what the whole file is: when and by which version it was made
    run     one row for each run: its process, its fingerprint, how it ended
    item    one row for each item that has a state
    step    results of steps of items that are not finished

A journal `run.db` has neighbours of the same name: `run.db-wal` and `run.db-shm` are SQLite's own, `run.db-lock` says
that a run writes, `run.db-results` holds the results that are too large for a row. They belong together: move or copy
them all, while no run writes.

Every row carries a checksum over its other columns: SQLite would not notice a bit that has turned within a value.
"""

import os
import struct
import zlib
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

APPLICATION_ID = 0x70656E73
"""In the header of each file: "pens". Tells a journal from other SQLite databases."""
FORMAT = 1
"""In the header of each file (`user_version`): the version of these tables."""

INLINE_BYTES = 64 * 1024
"""Longer results go to the side file. Arbitrary, because: rows stay small enough to be read by the hundred."""

Key: TypeAlias = str | int | float | bytes


class State(IntEnum):
    """What a journal knows of an item. An item without a row is missing: it has never been finished."""

    UNKNOWN = 0
    """It was started, and nobody knows how it ended. Recorded with `intents=True` only."""
    DONE = 1
    DEAD = 2
    """Its job failed."""
    SKIPPED = 3
    """Its job raised `SkipItem`."""
    RETRY = 4
    """It was dead or unknown, and somebody has asked for it to be run again: as good as missing."""


class Row(NamedTuple):
    """An item's row, but for its id and its checksum. Columns stand in this order."""

    key: Key | None
    """None where the item has none that can be recorded: `key=` raised, or gave something else."""
    state: int
    attempts: int
    run: int
    """The run that recorded it."""
    recorded: float
    """Seconds since the epoch."""
    waited: float
    ran: float
    spent: str | None = None
    """JSON object: what the job spent, by unit."""
    result: str | bytes | None = None
    """As the codec wrote it; None where there is none, or where it is in the side file."""
    file_offset: int | None = None
    """Where it begins in the side file; or the input, of an item that has no result."""
    file_size: int | None = None
    """Its length there, in bytes."""
    file_crc: int | None = None
    """CRC-32 of those bytes. `result` (or `input`) is '' then where the codec wrote text, and b'' where bytes."""
    input: str | bytes | None = None
    """As the codec wrote it, of items that are dead, unknown or to be run again; or else as `shown_input`."""
    shown_input: str | None = None
    """The item as text, where the codec could not write it."""
    kind: str | None = None
    """Of the failure."""
    error: str | None = None
    """Class of the error, with its module."""
    message: str | None = None
    status: int | None = None
    """HTTP status."""
    answer: bytes | None = None
    """First bytes of the last answer."""


class StepRow(NamedTuple):
    """The row of a step, but for its checksum."""

    key: Key
    name: str
    arguments: bytes
    """Hash of what the step was called with."""
    result: str | bytes | None
    file_offset: int | None = None
    file_size: int | None = None
    file_crc: int | None = None


ITEM_COLUMNS = Row._fields
DONE_COLUMNS = ITEM_COLUMNS[: ITEM_COLUMNS.index("result") + 1]
"""Those of an item that is done and whose result is in its row; the others are empty."""
STEP_COLUMNS = StepRow._fields

# `key` has no type, so that text, numbers and bytes stay what they are and apart from each other.
TABLES = (
    "CREATE TABLE meta(name TEXT PRIMARY KEY, value)",
    "CREATE TABLE run(id INTEGER PRIMARY KEY, started REAL, ended REAL, host TEXT, pid INTEGER, boot TEXT,"
    " fingerprint TEXT, stopped TEXT, counts TEXT)",
    "CREATE TABLE item(id INTEGER PRIMARY KEY, key UNIQUE, state INTEGER, attempts INTEGER, run INTEGER, recorded REAL,"
    " waited REAL, ran REAL, spent TEXT, result, file_offset INTEGER, file_size INTEGER, file_crc INTEGER, input,"
    " shown_input TEXT, kind TEXT, error TEXT, message TEXT, status INTEGER, answer BLOB, crc INTEGER)",
    "CREATE TABLE step(key, name TEXT, arguments BLOB, result, file_offset INTEGER, file_size INTEGER,"
    " file_crc INTEGER, crc INTEGER, PRIMARY KEY(key, name, arguments))",
)


_pack = struct.Struct("<3q3d").pack
_NUMBERS = slice(1, 7)
"""state, attempts, run; recorded, waited, ran."""
_REST = 7
_END_OF_DONE = len(DONE_COLUMNS)
_EMPTY = (None,) * (len(ITEM_COLUMNS) - _END_OF_DONE)


def checksum(row: tuple[Any, ...]) -> int:
    """Of a row, in any process and version of Python. `ascii` and not `repr`, which follows the Unicode tables.

    Of an item: the numbers as they are stored, then all else without the empty columns at its end. -1 is that of no
    row: of one whose numbers are none.
    """
    if len(row) != len(ITEM_COLUMNS):
        return zlib.crc32(ascii(tuple(row)).encode())
    end = _END_OF_DONE if row[_END_OF_DONE:] == _EMPTY else len(row)  # nearly all are done
    while end > _REST and row[end - 1] is None:
        end -= 1
    try:
        numbers = zlib.crc32(_pack(*row[_NUMBERS]))
    except (struct.error, TypeError):
        return -1
    return zlib.crc32(ascii((row[0], *row[_REST:end])).encode(), numbers)


def checksum_of_done(
    key: Key,
    attempts: int,
    run: int,
    recorded: float,
    waited: float,
    ran: float,
    spent: str | None,
    result: str | bytes,
) -> int:
    """The same for an item that is done: one of these is made for every item."""
    numbers = zlib.crc32(_pack(_DONE, attempts, run, recorded, waited, ran))
    return zlib.crc32(ascii((key, spent, result)).encode(), numbers)


_DONE = State.DONE.value


def side_file_of(path: str) -> str:
    """Where the results are that are too large for a row: beside the file itself, whatever links lead to it."""
    return f"{os.path.realpath(path)}-results"


def lock_of(path: str) -> str:
    """The file that is locked while a run writes."""
    return f"{path}-lock"
