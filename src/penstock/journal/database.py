"""A journal as an SQLite database: opened to write or to read, checked, and set aside.

    nothing there    -> made beside it, complete, synced -> renamed -> opened
    a file           -> ours? -> tables as they should be? -> undamaged? -> opened
    any of SQLite's errors -> explained() -> JournalError

Guarantees: a journal is there with all of its tables or not at all; nothing is written to a file that is no journal; a
file that is wrong ends in a `JournalError` that says what was found and what to do. The journal itself is opened by
SQLite alone, never by `open()`: POSIX takes all of a process's locks on a file away when any descriptor of it is closed
(https://sqlite.org/howtocorrupt.html, 2.2).

Threads: any. A connection is for one thread at a time, which need not be the one that opened it.
"""

import errno
import importlib.metadata
import os
import pathlib
import shlex
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

from penstock import clock
from penstock.errors import JournalError, first_line
from penstock.journal import schema
from penstock.journal.network import refuse_network

BUSY_TIMEOUT = 10.0
"""Seconds to wait for a lock that another process has on the database. Arbitrary, because: a look with a tool of
SQLite's is over by then, and a forgotten transaction will not be."""
JOURNAL_SIZE_LIMIT = 64 * 1024 * 1024
"""Bytes that the WAL keeps on disk once it is empty. Arbitrary, because: a reader that stays long may let it grow to
gigabytes."""
PAGES_IN_WAL = 10_000
"""Pages of 4 KiB after which the WAL is brought into the file: 40 MB. With SQLite's 1,000, keys in no order, each of
which changes a page of the index, cost a third more; `tests/benchmarks/journal.py`."""
OLDEST_SQLITE = (3, 32, 0)
"""Of 2020: its command line can `.recover`, and no version since has lost what was committed in a way known to us."""


def open_to_write(path: str, *, full_sync: bool) -> sqlite3.Connection:
    """Open the journal at `path`, or make a new one. The caller holds its `Lock`.

    Blocks: an old one is checked from end to end (half a second for a million rows), and another process's lock is
    waited for up to BUSY_TIMEOUT. Any thread; the connection is for any one thread at a time, in autocommit mode.

    Args:
        full_sync: each commit is on the disk before it returns, and so survives a power cut; otherwise what was
            committed last may be missing after that, but nothing is after the death of the process.

    Raises:
        JournalError: what is there is no journal, or of another version, or damaged; or the folder is missing, lies on
            a network, or cannot be written. Nothing has been changed then.
    """
    check_place(path)
    refuse_network(path)
    real = os.path.realpath(path)
    with explaining(path):
        if not os.path.exists(real) or not os.path.getsize(real):
            _create(path, real)
        connection = _connect(real, "mode=rw")
    with explaining(path), _closed_on_error(connection):
        _check_header(connection, path)
        _check_integrity(connection, path)
        _set_up(connection, path, full_sync)
    return connection


def open_to_read(path: str) -> sqlite3.Connection:
    """Open the journal at `path` to read it, also while a run writes it, or after a crash.

    Its tables are checked, its content is not: check the checksum of each row. A reader may leave an empty `-wal` and
    a `-shm` behind, which the next writer removes. In a folder that may not be written it must not be open while
    somebody else begins to write. Blocks for as long as the disk does,
    while another process recovers the journal for up to BUSY_TIMEOUT. Any thread; the connection is for any one thread
    at a time.

    Raises:
        JournalError: there is none, or what is there is no journal, or of another version, or damaged.
    """
    check_place(path, to_write=False)
    real = os.path.realpath(path)
    connection = _connected_to_read(path, real)
    with explaining(path), _closed_on_error(connection):
        _check_header(connection, path)
    return connection


def set_aside(path: str) -> str:
    """Rename a journal that nobody has open to a free name beside it (`run.db` to `run-1.db`), and return that name.

    Its side file goes along; its lock stays, since the caller holds it. Any thread.

    Raises:
        JournalError: it could not be renamed, or what its last writer left in the WAL could not be brought in.
    """
    real = os.path.realpath(path)
    with explaining(path):
        if os.path.exists(_wal_of(real)):
            with closing(_connect(real, "mode=rw")) as connection:  # the last one to close it removes the WAL
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if os.path.exists(_wal_of(real)):
            raise JournalError(f"{path}: cannot be set aside, another process has it open. End that, and run again.")
        free = _free_name(real)
        # The side file first: whoever is killed in between finds it under the name that is free next time.
        with suppress(FileNotFoundError):
            os.rename(schema.side_file_of(real), schema.side_file_of(free))
        os.rename(real, free)
        sync_folder(free)
    return free


def check_place(path: str, *, to_write: bool = True) -> None:
    """Refuse what cannot be a journal's path, before anything is made there: also for who takes its lock first.

    Any thread.

    Raises:
        JournalError: a folder or a device, a file in a folder that does not exist, a WAL without its journal;
            `to_write=False`: also a file that does not exist, or is empty.
    """
    if not path or path == ":memory:" or "\0" in path:
        raise JournalError(f"journal={path!r}: cannot be the name of a file. Choose one, such as 'run.db'.")
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    if not os.path.isdir(folder):
        raise JournalError(f"{path}: the folder {folder} does not exist. Make it, or choose another path.")
    size = _size(path, real)
    if not size and _has_wal(real):
        found = "is missing" if size is None else "is empty, 0 bytes"
        raise JournalError(
            f"{path}: {found}, but {_wal_of(path)} is there, with what was written to it last. Restore both from the "
            f"same copy, or move the latter away to start anew."
        )
    if size is None and not to_write:
        raise JournalError(f"{path}: does not exist. Check the path, or choose another one.")
    if size == 0 and not to_write:
        raise JournalError(f"{path}: is empty, 0 bytes. Restore it from a copy, or choose another path.")


def refuse_emptied(path: str) -> None:
    """Refuse a file without content that has been a journal, as its lock file shows: for who takes the lock, before.

    Any thread.

    Raises:
        JournalError: it is such a file.
    """
    real = os.path.realpath(path)
    if os.path.exists(schema.lock_of(real)) and _size(path, real) == 0:
        raise JournalError(
            f"{path}: has been a journal, as {schema.lock_of(path)} shows, and is empty now, 0 bytes. Restore it from "
            f"a copy, or remove it to start anew."
        )


@contextmanager
def explaining(path: str) -> Iterator[None]:
    """Within the block, errors of SQLite and of the system become JournalErrors about the journal at `path`.

    Raises:
        JournalError: as `explained` puts it, with the error as its cause.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise explained(error, path) from error


def explained(error: sqlite3.Error | OSError, path: str) -> JournalError:
    """What an error of SQLite's or of the system's means for the journal at `path`, and what to do. Any thread.

    To be raised `from error`.
    """
    if isinstance(error, OSError):
        what = _BY_ERRNO.get(error.errno or 0, _unforeseen)
    else:
        # Without a code are errors of the module itself: the one that a file can cause is text that is not UTF-8.
        code: int | None = getattr(error, "sqlite_errorcode", None)
        damaged = code is None and isinstance(error, sqlite3.OperationalError)
        what = _damaged if damaged else _BY_CODE.get((code or 0) & 0xFF, _unforeseen)
    name: str = getattr(error, "sqlite_errorname", "") or ""
    detail = f"{first_line(error)}{f', {name}' if name else ''}"
    return JournalError(f"{path}: {what(path)} ({detail})")


def sync_folder(path: str) -> None:
    """Have it on the disk that there is a file of this name, or that it has got it just now."""
    if os.name != "posix":
        return
    descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- opening ---


def connect(path: str, parameters: str, timeout: float) -> sqlite3.Connection:
    """A plain connection in autocommit mode, for one thread at a time. `parameters` are those of SQLite's URIs."""
    uri = f"{pathlib.Path(os.path.abspath(path)).as_uri()}?{parameters}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def _connect(real: str, parameters: str) -> sqlite3.Connection:
    return connect(real, parameters, BUSY_TIMEOUT)


def _connected_to_read(path: str, real: str) -> sqlite3.Connection:
    with explaining(path):
        connection = _connect(real, "mode=ro")
        with _closed_on_error(connection):
            try:
                connection.execute("PRAGMA schema_version").fetchone()
                return connection
            except sqlite3.OperationalError as error:
                # A folder that may not be written: SQLite can make neither WAL nor shared memory. Where others have
                # left no WAL, all is in the file itself.
                barred = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
                if not barred or _has_wal(real):
                    raise
        connection.close()
        return _connect(real, "immutable=1")


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _create(path: str, real: str) -> None:
    """Under another name, so that a journal that exists is complete. What a killed process left of that is removed."""
    draft = f"{real}-new"
    with suppress(FileNotFoundError):
        os.remove(draft)
    try:
        with closing(_connect(draft, "mode=rwc")) as connection:
            connection.execute("PRAGMA journal_mode = MEMORY")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {schema.FORMAT}")
            for table in schema.TABLES:
                connection.execute(table)
            made = [("created", clock.wall()), ("penstock version", version_of_penstock())]
            connection.executemany("INSERT INTO meta VALUES (?, ?)", made)
            connection.execute("COMMIT")
        os.replace(draft, real)
        sync_folder(real)
    except BaseException:
        with suppress(OSError):
            os.remove(draft)
        raise


def version_of_penstock() -> str:
    """As it was installed; "unknown" where it was not. Any thread."""
    try:
        return importlib.metadata.version("penstock")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _set_up(connection: sqlite3.Connection, path: str, full_sync: bool) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise JournalError(
            f"{path}: SQLite cannot keep a write-ahead log here (its journal mode stays {mode!r}). Choose a path on a "
            f"local disk."
        )
    connection.execute(f"PRAGMA synchronous = {'FULL' if full_sync else 'NORMAL'}")
    connection.execute(f"PRAGMA fullfsync = {int(full_sync)}")  # macOS: its fsync leaves data in the disk's cache
    connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_IN_WAL}")
    connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT}")
    # A file that may not be written is opened all the same; even a transaction begins, and says so at its first write.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA user_version = {schema.FORMAT}")
    connection.execute("ROLLBACK")


# --- checking ---


def _check_header(connection: sqlite3.Connection, path: str) -> None:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise JournalError(
            f"{path}: needs SQLite {'.'.join(map(str, OLDEST_SQLITE))} or newer, this Python has "
            f"{sqlite3.sqlite_version}. Upgrade Python, or choose one that is built with a newer SQLite."
        )
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application != schema.APPLICATION_ID:
        raise JournalError(f"{path}: {_no_journal(path)} (an SQLite database of another program)")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > schema.FORMAT:
        raise JournalError(
            f"{path}: is a journal of format {version}, of a newer penstock; this one knows {schema.FORMAT}. Upgrade "
            f"penstock, or choose another path."
        )
    if version < schema.FORMAT:
        raise JournalError(
            f"{path}: is a journal of format {version}, which this penstock does not know; it knows {schema.FORMAT}. "
            f"Use the penstock that made it, or choose another path."
        )
    tables = {
        sql or name
        for name, sql in connection.execute("SELECT name, sql FROM sqlite_master")
        if not name.startswith("sqlite_")  # indexes of the primary keys, and what ANALYZE has found out
    }
    for odd in sorted(tables ^ set(schema.TABLES)):
        found = "there is besides" if odd in tables else "it lacks"
        raise JournalError(
            f"{path}: its tables are not those of a journal: {found} {odd!r:.100}. Undo what was changed, or move the "
            f"file away to start anew."
        )


def _check_integrity(connection: sqlite3.Connection, path: str) -> None:
    found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise JournalError(f"{path}: {_damaged(path)} ({found:.200})")
    # A WAL does not know its journal: beside a copy of another day, it makes one of the two whose pages are all whole.
    recorded, begun = "(SELECT max(run) FROM item)", "(SELECT max(id) FROM run)"
    if connection.execute(f"SELECT {recorded} > {begun}").fetchone()[0]:  # compared by SQLite, whatever they are
        raise JournalError(
            f"{path}: {_damaged(path)} (it has items of a run later than the last one: the file and its WAL are not of "
            f"the same day)"
        )


def _size(path: str, real: str) -> int | None:
    try:
        status = os.stat(real)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explained(error, path) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise JournalError(f"{path}: is {kind}. Choose the path of a file, such as 'run.db'.")
    return status.st_size


def _free_name(real: str) -> str:
    stem, extension = os.path.splitext(real)
    number = 1
    while os.path.exists(name := f"{stem}-{number}{extension}") or (
        os.path.exists(schema.side_file_of(name)) and os.path.exists(schema.side_file_of(real))
    ):
        number += 1
    return name


def _wal_of(path: str) -> str:
    return f"{path}-wal"


def _has_wal(path: str) -> bool:
    """Whether there is more than what a reader leaves behind, who may not remove an empty one."""
    return os.path.exists(_wal_of(path)) and os.path.getsize(_wal_of(path)) > 0


# --- what errors mean ---


def _full(path: str) -> str:
    return "the disk is full. Make room, and run again: what was committed is kept."


def _read_only(path: str) -> str:
    return (
        "may not be written by this user, or its disk is mounted read-only. Allow writing to the file and its folder, "
        "or choose another path."
    )


def _locked(path: str) -> str:
    return (
        "another process keeps it locked, perhaps a tool with an open transaction. End that, and run again: what was "
        "committed is kept."
    )


def _unreadable(path: str) -> str:
    return (
        "the disk could not read or write. Check the disk, the quota and `ulimit -f`, and run again; if it stays so, "
        "restore the journal from a copy."
    )


def _damaged(path: str) -> str:
    return (
        f"is damaged. Restore it from a copy, with all files of that name; or save what `sqlite3 {shlex.quote(path)} "
        f".recover` can read, and move it away to start anew."
    )


def _too_large(path: str) -> str:
    return (
        "a value is longer than SQLite takes, which is 1 GB. Store it elsewhere, and have the job return where; if no "
        "job or item has anything that large, the file is damaged: restore it from a copy."
    )


def _no_journal(path: str) -> str:
    return "is no penstock journal. Choose another path; if it has been a journal, restore it from a copy."


def _closed_off(path: str) -> str:
    return (
        "cannot be opened. Check that this user may read and write it and its folder, that the folder exists and that "
        "the process has not too many files open (`ulimit -n`); or choose another path."
    )


def _unforeseen(path: str) -> str:
    return "cannot be used. Check the file and its disk; if it stays so, move it away to start anew."


_BY_CODE: dict[int, Callable[[str], str]] = {
    sqlite3.SQLITE_FULL: _full,
    sqlite3.SQLITE_READONLY: _read_only,
    sqlite3.SQLITE_PERM: _read_only,
    sqlite3.SQLITE_BUSY: _locked,
    sqlite3.SQLITE_LOCKED: _locked,
    sqlite3.SQLITE_PROTOCOL: _locked,
    sqlite3.SQLITE_IOERR: _unreadable,
    sqlite3.SQLITE_NOLFS: _unreadable,
    sqlite3.SQLITE_CORRUPT: _damaged,
    sqlite3.SQLITE_FORMAT: _damaged,
    sqlite3.SQLITE_TOOBIG: _too_large,
    sqlite3.SQLITE_SCHEMA: _damaged,
    sqlite3.SQLITE_NOTADB: _no_journal,
    sqlite3.SQLITE_CANTOPEN: _closed_off,
}

_BY_ERRNO: dict[int, Callable[[str], str]] = {
    errno.ENOSPC: _full,
    errno.EDQUOT: _full,
    errno.EROFS: _read_only,
    errno.EACCES: _read_only,
    errno.EPERM: _read_only,
    errno.EIO: _unreadable,
    errno.EFBIG: _unreadable,
    errno.ENOENT: _closed_off,
    errno.EMFILE: _closed_off,
    errno.ENFILE: _closed_off,
    errno.ENAMETOOLONG: _closed_off,
    errno.ELOOP: _closed_off,
}
