"""A journal as others read it: while a run writes it, after it has ended, or after a crash.

    run.db          -> rows in slices, each checked against its checksum -> items, dead letters, reports
    run.db-results  -> results and inputs that are too large for a row
    run.db-lock     -> whether a run is going on now

Guarantees: nothing is written, and no run is held up. No transaction outlasts a slice, so that an export of hours does
not keep the WAL from being emptied. Memory depends on the size of a slice, never on the number of items. What is
delivered is what was recorded: a row or a result that differs from its checksum is refused.

Not a snapshot: what a run records meanwhile may be met or not, each item at most once.

Threads: a `Reading` belongs to the one that entered it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from penstock.errors import ClosedError, JournalError, UsageError, first_line, in_common
from penstock.journal import side_file
from penstock.journal.database import explaining, open_to_read
from penstock.journal.lock import is_gone, is_held
from penstock.journal.options import JSON, Codec
from penstock.journal.schema import ITEM_COLUMNS, Key, Row, State, checksum, side_file_of
from penstock.journal.store import damaged

if TYPE_CHECKING:
    import sqlite3

SLICE = 100
"""Rows that are read at once. Arbitrary, because: 6 MiB of results at most, and what a slice costs by itself is lost in
what its rows cost."""

KNOWN_CAUSES = 1_000
"""Arbitrary, because: a thousand distinct messages already say that the message holds the record."""

_SELECT = f"SELECT id, {', '.join(ITEM_COLUMNS)}, crc FROM item"


@dataclass(frozen=True, slots=True)
class Run:
    """One run that the journal has seen."""

    id: int
    started: str
    """UTC, in ISO 8601."""
    ended: str | None
    """UTC, in ISO 8601; None while it goes on, and where its process died."""
    host: str
    pid: int
    stopped: str | None
    """Why it ended before its source did; None where it did not."""
    counts: dict[str, Any]
    """What it counted, by what; empty until it has ended."""


@dataclass(frozen=True, slots=True)
class DeadCause:
    """One reason why items are dead: as a `Cause` of a report."""

    kind: str | None
    error: str
    """Class and first line of the message, as of the first such item."""
    count: int
    example_key: Key | None


class Reading:
    """A journal, to be read. A context manager; what it does blocks for as long as the disk does.

        with Reading("run.db") as reading:
            for row in reading.rows(State.DONE):
                print(row.key, reading.value(row))

    Args:
        path: the file.
        codec: what wrote results and inputs; None is JSON.
        skip_damaged: leave out items whose row or result is damaged, and count them in `damaged`.

    Raises:
        UsageError: the path is none.
        JournalError: on entering, where the file is missing, no journal, or cannot be read; from any method, where
            something in it is damaged or the disk fails.
    """

    def __init__(self, path: str | os.PathLike[str], *, codec: Codec | None = None, skip_damaged: bool = False) -> None:
        self.path = as_path(path)
        self.damaged = 0
        """Items that were left out by `skip_damaged`."""
        self._codec = JSON if codec is None else codec
        self._skip_damaged = skip_damaged
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> "Reading":
        self._connection = open_to_read(self.path)
        # Text that a flipped bit has made no UTF-8 is then found by its checksum, as everything else is.
        self._connection.text_factory = as_text
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # --- the whole ---

    def meta(self) -> dict[str, Any]:
        """What is said of the file: `created` (seconds since the epoch) and `penstock version`."""
        return dict(self._all("SELECT name, value FROM meta"))

    def fingerprint(self) -> dict[str, Any]:
        """What tells its job from others: `job`, `version`, `params` and `codec`; empty before the first run."""
        found = self._all("SELECT fingerprint FROM run ORDER BY id DESC LIMIT 1")
        return self._object(found[0][0]) if found else {}

    def runs(self) -> list[Run]:
        """Its runs, the first one first."""
        columns = f"id, {_iso('started')}, {_iso('ended')}, host, pid, stopped, counts"
        return [
            Run(id_, started, ended, host, pid, stopped, self._object(counts))
            for id_, started, ended, host, pid, stopped, counts in self._all(f"SELECT {columns} FROM run ORDER BY id")
        ]

    def going_on(self) -> Run | None:
        """The run that writes it now, in this process or another one.

        None as well while somebody works on it who is no run yet, or none at all: who opens it, or compacts it.
        """
        if not is_held(self.path):
            return None
        last = self.runs()[-1:]
        return last[0] if last and last[0].ended is None and not is_gone(last[0].host, last[0].pid) else None

    def counts(self) -> dict[State, int]:
        """Items by state, each state among them. Rows are counted, not checked."""
        found = dict(self._all("SELECT state, count(*) FROM item GROUP BY state"))
        counts = {state: found.pop(int(state), 0) for state in State}
        for state in found:
            raise JournalError(
                f"{self.path} is damaged: it has items in a state {state!r:.50}, which there is not. Restore a copy of "
                f"the file, or move it away and begin anew."
            )
        return counts

    def spent(self) -> dict[str, float]:
        """What the recorded jobs spent in all, by unit. Rows are added up, not checked."""
        told = "SELECT each.key, total(each.value) FROM item, json_each(item.spent) AS each WHERE spent IS NOT NULL"
        return dict(self._all(f"{told} GROUP BY each.key ORDER BY each.key"))

    def causes(self, most: int = 10) -> list[DeadCause]:
        """Why items are dead, the most frequent reasons first. Looks at each of them, in bounded memory."""
        known: dict[tuple[str | None, str], DeadCause] = {}
        for row in self.rows(State.DEAD):
            told = error_line(row)
            reason = (row.kind, in_common(told, row.status))
            if reason in known:
                known[reason] = replace(known[reason], count=known[reason].count + 1)
            elif len(known) < KNOWN_CAUSES:
                known[reason] = DeadCause(row.kind, told, 1, row.key)
        return sorted(known.values(), key=lambda cause: -cause.count)[:most]

    # --- item by item ---

    def rows(self, *states: State) -> Iterator[Row]:
        """The items in these states, or all of them, in the order in which they were first recorded.

        Each is checked against its checksum. Those that a run adds after the first one was asked for are not among
        them.
        """
        wanted = frozenset(states or State)
        # A turned bit in the state itself must not hide a result; for the few dead ones, the rest is not gone through.
        condition = "" if State.DONE in wanted else f"AND state IN ({', '.join(str(int(state)) for state in wanted)})"
        last = self._all("SELECT max(id) FROM item")[0][0]
        at = 0
        while last is not None:
            found = self._all(
                f"{_SELECT} WHERE id > ? AND id <= ? {condition} ORDER BY id LIMIT {SLICE}",
                at,
                last,
            )
            for _, *columns, crc in found:
                row = Row(*columns)
                if checksum(row) == crc:
                    if row.state in wanted:
                        yield row
                elif self._skip_damaged:
                    self.damaged += 1
                else:
                    raise damaged(self.path, row.key)
            if not found:
                return
            at = found[-1][0]

    def results(self) -> Iterator[tuple[Row, str | bytes | None]]:
        """The items that are done, each with `data`. `skip_damaged` is about both."""
        for row in self.rows(State.DONE):
            try:
                data = self.data(row)
            except JournalError:
                if not self._skip_damaged:
                    raise
                self.damaged += 1
                continue
            yield row, data

    def data(self, row: Row) -> str | bytes | None:
        """The result of an item as the codec wrote it, from wherever it is; None where none is recorded."""
        return row.result if row.result is None else self._whole(row, row.result)

    def _whole(self, row: Row, in_row: str | bytes) -> str | bytes:
        """A result or an input, from the side file if it is not in its row."""
        if row.file_offset is None or row.file_size is None or row.file_crc is None:
            return in_row
        try:
            large = side_file.read(side_file_of(self.path), row.file_offset, row.file_size, row.file_crc)
        except JournalError:
            newer = self._newer(row)
            if newer is None:
                raise
            return self._whole(newer, in_row)
        return large.decode() if isinstance(in_row, str) else large

    def value(self, row: Row) -> Any:
        """The result of an item; None where none is recorded."""
        return self._decoded(row, "result", self.data(row))

    def input(self, row: Row) -> Any:
        """The item itself, as far as it is recorded: of those that are dead or unknown; None otherwise."""
        return self._decoded(row, "input", self.input_data(row))

    def input_data(self, row: Row) -> str | bytes | None:
        """The same as the codec wrote it, from wherever it is."""
        return row.input if row.input is None else self._whole(row, row.input)

    def recorded(self, row: Row) -> str | None:
        """When an item was recorded: UTC, in ISO 8601. None for what is no date."""
        found: str | None = self._all(f"SELECT {_iso('?')}", row.recorded)[0][0]
        return found

    def _newer(self, row: Row) -> Row | None:
        """The row as it is by now, if its result or input has moved: the journal was compacted meanwhile."""
        condition = "key = ?"
        asked: tuple[object, ...] = (row.key,)
        if row.key is None:  # of those without a key, one that refers to the same bytes is as good
            condition, asked = "key IS NULL AND file_size = ? AND file_crc = ?", (row.file_size, row.file_crc)
        for _, *columns, crc in self._all(f"{_SELECT} WHERE {condition} LIMIT 1", *asked):
            newer = Row(*columns)
            return newer if newer.file_offset != row.file_offset and checksum(newer) == crc else None
        return None

    def _decoded(self, row: Row, what: str, data: str | bytes | None) -> Any:
        if data is None:
            return None
        try:
            return self._codec.loads(data)
        except Exception as error:
            written_by = self.fingerprint().get("codec", "json")
            raise JournalError(
                f"{self.path}: the {what} of {row.key!r:.200} cannot be read by this codec ({first_line(error)}). Give "
                f"the one that it was written with, as codec=; its run called it {written_by!r}."
            ) from error

    def _object(self, text: str | None) -> dict[str, Any]:
        try:
            found = json.loads(text or "{}")
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        raise JournalError(
            f"{self.path} is damaged: in its runs, {text!r:.200} should be a JSON object. Restore a copy of the file, "
            f"or move it away and begin anew."
        )

    def _all(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        if self._connection is None:
            raise ClosedError("this Reading is not open. Use it within its block: `with Reading(path) as reading:`.")
        with explaining(self.path):
            return self._connection.execute(query, parameters).fetchall()


def as_path(path: str | os.PathLike[str]) -> str:
    """A path as text.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(told := os.fspath(path), str):
        raise UsageError(f'{path!r:.100} is no path. Expected that of a journal, such as "run.db".')
    return told


def error_line(row: Row) -> str:
    """Class of a recorded error, without its module, and the first line of its message."""
    name = (row.error or "").rpartition(".")[2]
    first = (row.message or "").lstrip()[:200].splitlines()
    return f"{name}: {first[0]}"[:200] if first else name


def _iso(seconds: str) -> str:
    """As SQL. SQLite knows the calendar, and nobody but the clock reads time here."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {seconds}, 'unixepoch')"


def as_text(data: bytes) -> str:
    """Text as it is stored, also where a turned bit has made it no UTF-8."""
    return data.decode("utf-8", "surrogateescape")
