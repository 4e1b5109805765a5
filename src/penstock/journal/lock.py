"""One writer for each journal: across processes, and within one.

    take()    -> BEGIN EXCLUSIVE on run.db-lock, an empty database -> held until release(), or the death of the process
    is_held() -> a read of the same, which an exclusive lock refuses; reads do not refuse each other

The locks are those of SQLite, which knows each platform's. The kernel gives them back when the process dies, also where
a child that it forked lives on, which has got none of them.

Guarantees: of any number of `take`s one succeeds, whoever looks by `is_held` meanwhile. The file stays where it is, for
ever: who removes a lock file lets a second one in beside the first.

A program that opens and closes run.db-lock by other means than SQLite gives its own lock away (POSIX).

Threads: any, and not always the same one.
"""

import os
import socket
import sqlite3
from contextlib import closing

from penstock import clock
from penstock.errors import JournalError
from penstock.journal import database, schema
from penstock.journal.network import refuse_network

LOOK_TIME = 0.1
"""Seconds that `take` waits for who only looks, before it asks again whether it is that. Arbitrary, because: a look
takes well below a millisecond, where the machine gives it the time."""
LOOKS = 50
"""How often it waits. Arbitrary, because: a process that is stopped within a look must not hold up others for ever."""

_held_here: dict[tuple[str, int], object] = {}
"""Lock file and process -> who has it, or is about to. A child of a fork has the entries of its parent, but not the
locks. No lock of threads is around it, which a fork could leave locked: `setdefault` is atomic."""


class Lock:
    """The right to write the journal at `path`. Any thread may take it, any other may release it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._entry = ("", 0)

    def take(self) -> None:
        """Take the lock, or refuse at once. Makes the file `run.db-lock` where there is none.

        Blocks while others look whether it is held, which is next to nothing, and never more than LOOKS * LOOK_TIME.
        Any thread. In the child of a fork whose parent held it at that time, it is refused for good.

        Raises:
            JournalError: it is held: by this process, or by another one that the message names; or the path cannot be
                that of a journal.
        """
        database.check_place(self._path)
        database.refuse_emptied(self._path)
        refuse_network(self._path)
        # A journal by two names, one of them a link, is one journal.
        file = schema.lock_of(os.path.realpath(self._path))
        entry = file, os.getpid()
        reservation = object()
        connection = None
        try:
            if _held_here.setdefault(entry, reservation) is not reservation:
                raise JournalError(
                    f"{self._path}: this very process writes it already, in another run. Wait for that one to end, or "
                    f"choose another path for each run."
                )
            connection = database.connect(file, "mode=rwc", 0)
            if not _is_taken(connection):
                raise JournalError(_refusal(self._path))
            # In a file that may not be written, SQLite begins to read instead, and says so at the first write only.
            connection.execute("PRAGMA user_version = 1")
        except BaseException as error:
            if connection is not None:
                connection.close()
            if _held_here.get(entry) is reservation:
                del _held_here[entry]
            if isinstance(error, sqlite3.Error):
                raise _explained(error, file) from error
            raise
        self._connection = connection
        self._entry = entry

    def __del__(self) -> None:
        """A loop was closed under its run: nobody else would let go. Not in the child of a fork, which has no lock."""
        if self._entry[1] == os.getpid():
            self.release()

    def release(self) -> None:
        """Let others in. Any thread; does nothing where it is not held."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            del _held_here[self._entry]


def is_held(path: str) -> bool:
    """Whether somebody writes the journal at `path` now: this process or another one. Keeps nobody out.

    Any thread.

    Raises:
        JournalError: its lock file is none, or cannot be read.
    """
    file = schema.lock_of(os.path.realpath(path))
    if not os.path.exists(file):
        return False
    try:
        with closing(database.connect(file, "mode=ro", 0)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        if _is_busy(error):
            return True
        raise _explained(error, file) from error
    return False


def _is_taken(connection: sqlite3.Connection) -> bool:
    """Take the lock; False if somebody has it.

    Raises:
        sqlite3.Error: the file is something else, or is being looked at without an end.
    """
    looks = LOOKS
    while True:
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            # Or SQLite makes a file for undoing what will never be done, which a killed process leaves behind.
            connection.execute("PRAGMA journal_mode = MEMORY")
            # Those who look are in nobody's way here, but do not see this lock either.
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if _is_busy(error):
                return False
            raise
        connection.execute("ROLLBACK")
        connection.execute(f"PRAGMA busy_timeout = {round(LOOK_TIME * 1000)}")
        looks -= 1
        try:
            connection.execute("BEGIN EXCLUSIVE")
            return True
        except sqlite3.Error:
            if not looks:
                raise


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _explained(error: sqlite3.Error, file: str) -> JournalError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_NOTADB:
        return JournalError(f"{file}: is not the lock of a journal. Move it away, or choose another path.")
    return database.explained(error, file)


def _refusal(path: str) -> str:
    writer = _writer(path)
    if writer is None:
        return f"{path}: another process writes it. Wait for it to end, or choose another path."
    host, pid, started = writer
    since = max(clock.wall() - started, 0.0)
    return (
        f"{path}: process {pid} on {host} writes it, since {_spoken(since)}. Wait for it to end, or stop it "
        f"(`kill -INT {pid}` lets it finish what is in flight); or choose another path."
    )


def _writer(path: str) -> tuple[str, int, float] | None:
    """Host, process and start of the last run, unless it has ended: the lock may be somebody's who is no run."""
    try:
        with closing(database.open_to_read(path)) as connection:
            row = connection.execute("SELECT host, pid, started, ended FROM run ORDER BY id DESC LIMIT 1").fetchone()
    except (JournalError, sqlite3.Error):
        return None
    if row is None or row[3] is not None:
        return None
    host, pid, started = row[:3]
    if not (isinstance(host, str) and isinstance(pid, int) and isinstance(started, float)) or is_gone(host, pid):
        return None
    return host, pid, started


def is_gone(host: str, pid: int) -> bool:
    """Whether a process of this machine has died. What cannot be told is no. Any thread."""
    if os.name != "posix" or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:  # among others PermissionError: somebody else's
        return isinstance(error, ProcessLookupError)
    return False


def _spoken(seconds: float) -> str:
    """As two words at most: 48 s, 5 min, 2 h 10 min, 3 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
