"""A journal as a database: made, opened, checked, set aside; and what its errors say."""

import errno
import importlib.metadata
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from penstock.errors import JournalError
from penstock.journal import database, schema
from penstock.journal.database import (
    check_place,
    explained,
    explaining,
    open_to_read,
    open_to_write,
    refuse_emptied,
    set_aside,
    sync_folder,
)

KILLED_WHILE_IT_IS_MADE = """
import os, signal, sys
from penstock.journal import database
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
database.open_to_write(sys.argv[1], full_sync=False)
"""

WRITES_AND_DIES = """
import os, signal, sys
from penstock.journal.database import open_to_write
connection = open_to_write(sys.argv[1], full_sync=False)
connection.executemany("INSERT INTO item(key) VALUES (?)", [(number,) for number in range(100)])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder in which this process has no more rights than the permissions say, also where root runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        user = os.geteuid()
        if user == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
            for place, _, names in os.walk(folder):
                os.chmod(place, 0o700)
                for name in names:
                    os.chmod(os.path.join(place, name), 0o600)


def make(path: str, keys: Iterable[object] = ()) -> None:
    """A journal, closed, with items of these keys."""
    with closing(open_to_write(path, full_sync=False)) as journal:
        journal.executemany("INSERT INTO item(key) VALUES (?)", [(key,) for key in keys])


def keys_of(connection: sqlite3.Connection) -> list[object]:
    return [key for (key,) in connection.execute("SELECT key FROM item ORDER BY id")]


def keys_in(path: str) -> list[object]:
    with closing(open_to_read(path)) as journal:
        return keys_of(journal)


def change(path: str, *statements: str) -> None:
    """By another program."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def run(program: str, path: str) -> int:
    return subprocess.run([sys.executable, "-c", program, path], timeout=60).returncode


def to_write(path: str) -> sqlite3.Connection:
    return open_to_write(path, full_sync=False)


WAYS = (to_write, open_to_read)


def asked(connection: sqlite3.Connection, *pragmas: str) -> list[object]:
    return [connection.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas]


# --- a new one ---


def test_a_new_journal_has_header_tables_and_birth(path: str) -> None:
    with closing(open_to_write(path, full_sync=False)) as journal:
        assert asked(journal, "application_id", "user_version") == [schema.APPLICATION_ID, schema.FORMAT]
        assert {sql for (sql,) in journal.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")} == set(
            schema.TABLES
        )
        meta = dict(journal.execute("SELECT name, value FROM meta"))
        assert set(meta) == {"created", "penstock version"}
        assert abs(meta["created"] - os.stat(path).st_mtime) < 60
        assert not journal.in_transaction


def test_penstock_need_not_be_installed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be imported from a copy of its source."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    with closing(open_to_write(path, full_sync=False)) as journal:
        assert dict(journal.execute("SELECT name, value FROM meta"))["penstock version"] == "unknown"


def test_it_is_written_ahead_and_never_grows_without_bound(path: str) -> None:
    with closing(open_to_write(path, full_sync=False)) as journal:
        assert asked(journal, "journal_mode", "journal_size_limit") == ["wal", database.JOURNAL_SIZE_LIMIT]
        assert asked(journal, "busy_timeout") == [10_000]


@pytest.mark.parametrize(("full_sync", "expected"), [(False, [1, 0]), (True, [2, 1])])
def test_full_sync_is_what_survives_a_power_cut(path: str, full_sync: bool, expected: list[int]) -> None:
    """SQLite's own numbers: 1 is NORMAL, 2 is FULL."""
    with closing(open_to_write(path, full_sync=full_sync)) as journal:
        assert asked(journal, "synchronous", "fullfsync") == expected


def test_one_that_is_killed_while_it_is_made_has_not_begun(path: str, tmp_path: Path) -> None:
    """Nor is what it left in anybody's way."""
    assert run(KILLED_WHILE_IT_IS_MADE, path) == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["run.db-new"]
    make(path, "ab")
    assert os.listdir(tmp_path) == ["run.db"]
    assert keys_in(path) == ["a", "b"]


def test_one_that_cannot_be_made_leaves_nothing_behind(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TABLES", (*schema.TABLES, "CREATE TABLE item(x)"))
    with pytest.raises(JournalError, match=r"run\.db: cannot be used.*table item already exists"):
        open_to_write(path, full_sync=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["two words.db", "what?.db", "a#b", "100%.db", "%41", "it's", 'a"b', "ü", "file:x?mode=memory", "-", "a\nb"]
    + ["\udcff.db"] * (sys.platform == "linux"),
)
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    """Of URIs and of SQL, SQLite takes some characters for its own."""
    path = str(tmp_path / name)
    make(path, [name.encode(errors="surrogateescape")])
    assert os.listdir(tmp_path) == [name]
    assert keys_in(path) == [name.encode(errors="surrogateescape")]
    assert set_aside(path) != path


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("run.db", "a")
    assert os.listdir(tmp_path) == ["run.db"]
    assert keys_in("run.db") == ["a"]


def test_behind_a_link_is_the_journal_that_it_leads_to(path: str, tmp_path: Path) -> None:
    """Also where there is nothing yet."""
    there = tmp_path / "there"
    there.mkdir()
    os.symlink(there / "real.db", path)
    make(path, "a")
    make(path, "b")
    assert os.path.islink(path)
    assert keys_in(str(there / "real.db")) == keys_in(path) == ["a", "b"]


def test_an_empty_file_is_made_a_journal(path: str) -> None:
    """As `tempfile` makes them."""
    Path(path).touch()
    make(path, "a")
    assert keys_in(path) == ["a"]


# --- one that is there ---


def test_what_was_written_is_there_when_it_is_opened_again(path: str) -> None:
    """Keys keep their types."""
    keys = ["1", 1, 1.5, b"1", "é", 2**62]
    make(path, keys)
    make(path)
    assert keys_in(path) == keys


def test_a_killed_writer_loses_nothing_that_it_committed(path: str, tmp_path: Path) -> None:
    """Its WAL is left behind: who reads finds it, and so does who writes."""
    assert run(WRITES_AND_DIES, path) == -signal.SIGKILL
    assert (tmp_path / "run.db-wal").stat().st_size > 0
    assert keys_in(path) == list(range(100))
    with closing(open_to_write(path, full_sync=False)) as journal:
        assert keys_of(journal) == list(range(100))


def test_a_reader_sees_what_is_committed_while_another_writes(path: str) -> None:
    with closing(open_to_write(path, full_sync=False)) as writer, closing(open_to_read(path)) as reader:
        writer.execute("INSERT INTO item(key) VALUES ('a')")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO item(key) VALUES ('b')")
        assert keys_of(reader) == ["a"]
        writer.execute("COMMIT")
        assert keys_of(reader) == ["a", "b"]


def test_a_reader_can_change_nothing(path: str) -> None:
    make(path, "a")
    with closing(open_to_read(path)) as reader, pytest.raises(JournalError, match="may not be written"):
        with explaining(path):
            reader.execute("DELETE FROM item")


def test_to_read_what_is_not_there_makes_nothing(path: str, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"run\.db: does not exist. Check the path"):
        open_to_read(path)
    assert os.listdir(tmp_path) == []


def test_to_read_an_empty_file_is_no_journal(path: str) -> None:
    Path(path).touch()
    with pytest.raises(JournalError, match=r"run\.db: is empty, 0 bytes\. Restore"):
        open_to_read(path)
    assert os.path.getsize(path) == 0


# --- what is refused ---


@pytest.mark.parametrize("name", ["", ":memory:", "run\0.db"])
def test_what_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(JournalError, match="cannot be the name of a file. Choose one"):
        open_to_write(name, full_sync=False)


def test_a_folder_that_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"the folder .*missing does not exist\. Make it"):
        open_to_write(str(tmp_path / "missing" / "run.db"), full_sync=False)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_no_journal(tmp_path: Path) -> None:
    for way in WAYS:
        with pytest.raises(JournalError, match=r"is a folder\. Choose the path of a file"):
            way(str(tmp_path))


def test_what_is_no_ordinary_file_is_no_journal(path: str) -> None:
    """To open a pipe would wait for ever."""
    os.mkfifo(path)
    with pytest.raises(JournalError, match=r"run\.db: is no ordinary file\. Choose"):
        open_to_write(path, full_sync=False)


def test_a_path_that_the_system_refuses_is_explained(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"cannot be opened\. Check.*File name too long"):
        check_place(str(tmp_path / ("x" * 300)))


def test_a_network_folder_is_refused_before_anything_is_made(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("1 0 0:1 / / rw - nfs4 server:/ rw\n")
    monkeypatch.setattr("penstock.journal.network.MOUNTS", str(mounts))
    with pytest.raises(JournalError, match=r"run\.db: .*network file system"):
        open_to_write(path, full_sync=False)
    assert os.listdir(tmp_path) == ["mounts"]


def test_a_file_that_has_been_a_journal_and_is_empty_now_is_not_filled_anew(path: str) -> None:
    """Its lock file shows it, to who takes the lock. One without was made to be filled."""
    refuse_emptied(path)
    Path(path).touch()
    refuse_emptied(path)
    Path(schema.lock_of(path)).touch()
    with pytest.raises(JournalError, match=r"run\.db: has been a journal, as .*run\.db-lock shows.*Restore it"):
        refuse_emptied(path)
    os.remove(path)
    refuse_emptied(path)
    make(path)
    refuse_emptied(path)


@pytest.mark.parametrize("content", [b"", None])
def test_a_wal_without_its_journal_is_not_written_over(path: str, content: bytes | None) -> None:
    """It holds the last commits of a journal that somebody has moved away, or emptied, without it."""
    Path(f"{path}-wal").write_bytes(b"commits")
    if content is not None:
        Path(path).write_bytes(content)
    for way in WAYS:
        with pytest.raises(
            JournalError, match=r"run\.db: is (missing|empty, 0 bytes), but .*run\.db-wal is there.*Restore both"
        ):
            way(path)
    assert Path(f"{path}-wal").read_bytes() == b"commits"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" * 99, b"key,value\n" * 99, b"SQLite format 3", b"{"])
def test_a_file_of_another_kind_is_left_as_it_is(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    for way in WAYS:
        with pytest.raises(JournalError, match=r"run\.db: is no penstock journal\. Choose another path"):
            way(path)
    assert Path(path).read_bytes() == content


def test_the_database_of_another_program_is_left_as_it_is(path: str, tmp_path: Path) -> None:
    change(path, "CREATE TABLE item(key)")
    before = Path(path).read_bytes()
    for way in WAYS:
        with pytest.raises(JournalError, match="is no penstock journal.*of another program"):
            way(path)
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ["run.db"]


@pytest.mark.parametrize(("version", "cure"), [(schema.FORMAT + 1, "Upgrade penstock"), (0, "Use the penstock that")])
def test_a_journal_of_another_format_is_refused(path: str, version: int, cure: str) -> None:
    make(path)
    change(path, f"PRAGMA user_version = {version}")
    for way in WAYS:
        with pytest.raises(JournalError, match=rf"run\.db: is a journal of format {version}, .*{cure}"):
            way(path)


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("DROP TABLE step", "it lacks 'CREATE TABLE step"),
        ("ALTER TABLE item ADD COLUMN note", "there is besides 'CREATE TABLE item.*note"),
        ("CREATE TABLE mine(x)", r"there is besides 'CREATE TABLE mine\(x\)'"),
        ("CREATE TRIGGER t AFTER INSERT ON item BEGIN DELETE FROM item; END", "there is besides 'CREATE TRIGGER t"),
    ],
)
def test_tables_that_somebody_has_changed_are_refused(path: str, statement: str, found: str) -> None:
    make(path, "a")
    change(path, statement)
    for way in WAYS:
        with pytest.raises(
            JournalError, match=r"run\.db: its tables are not those of a journal.*Undo what was changed"
        ):
            way(path)


def test_what_sqlite_adds_for_itself_is_no_change(path: str) -> None:
    make(path, "ab")
    change(path, "ANALYZE", "VACUUM")
    make(path, "c")
    assert keys_in(path) == ["a", "b", "c"]


def test_damage_is_found_before_anything_is_written(path: str) -> None:
    """Here an index that lacks a key: items would be run again."""
    make(path, "abc")
    change(path, "PRAGMA writable_schema = ON", "DELETE FROM sqlite_master WHERE name = 'sqlite_autoindex_item_1'")
    with pytest.raises(JournalError, match=r"run\.db: is damaged\. Restore it from a copy.*\.recover"):
        open_to_write(path, full_sync=False)


def test_a_key_that_its_index_lacks_is_found(path: str, tmp_path: Path) -> None:
    """The structure of the file is whole."""
    make(path, ["aaaaaaaa", "bbbbbbbb"])
    content = Path(path).read_bytes()
    assert content.count(b"bbbbbbbb") == 2  # in the table and in its index
    Path(path).write_bytes(content.replace(b"bbbbbbbb", b"bbbbbbbc", 1))
    with pytest.raises(JournalError, match=r"is damaged.*(missing from index|out of order)"):
        open_to_write(path, full_sync=False)


def test_a_wal_of_another_day_is_found(path: str) -> None:
    """A copy of the file alone was restored, and the WAL of later runs lies beside it: all pages are whole."""
    make(path, "a")
    for run in (2, "'damaged'"):
        change(path, "INSERT OR IGNORE INTO run(id) VALUES (1)", f"UPDATE item SET run = {run}")
        with pytest.raises(JournalError, match=r"is damaged\. Restore.*items of a run later than the last one"):
            open_to_write(path, full_sync=False)
    change(path, "UPDATE item SET run = 1")
    make(path, "b")


def test_a_sqlite_that_is_too_old_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
    with pytest.raises(JournalError, match=r"needs SQLite 3\.32\.0 or newer.*Upgrade Python"):
        open_to_write(path, full_sync=False)


@pytest.mark.skipif(os.name != "posix", reason="a VFS of POSIX")
def test_a_disk_that_allows_no_wal_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where SQLite has no shared memory: here by its dot-file locks."""
    connect = database.connect
    monkeypatch.setattr(
        database, "connect", lambda path, parameters, timeout: connect(path, f"{parameters}&vfs=unix-dotfile", timeout)
    )
    with pytest.raises(JournalError, match=r"run\.db: SQLite cannot keep a write-ahead log here.*'delete'.*Choose"):
        open_to_write(path, full_sync=False)


# --- others, and permissions ---


def test_a_database_that_another_program_keeps_locked_is_waited_for_and_named(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path)
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as tool:
        tool.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match=r"run\.db: another process keeps it locked.*run again.*SQLITE_BUSY"):
            open_to_write(path, full_sync=False)
        assert keys_in(path) == []


def test_a_file_that_may_not_be_written_is_refused_at_once(nobody: Path) -> None:
    """And not at the first commit."""
    path = str(nobody / "run.db")
    make(path, "a")
    os.chmod(path, 0o400)
    with pytest.raises(JournalError, match=r"run\.db: may not be written by this user"):
        open_to_write(path, full_sync=False)
    assert Path(f"{path}-wal").stat().st_size == 0
    assert keys_in(path) == ["a"]


def test_a_folder_that_may_not_be_written_is_refused(nobody: Path) -> None:
    os.chmod(nobody, 0o500)
    with pytest.raises(JournalError, match=r"run\.db: cannot be opened\. Check that this user may"):
        open_to_write(str(nobody / "run.db"), full_sync=False)


def test_a_journal_is_read_from_a_folder_that_may_not_be_written(nobody: Path) -> None:
    """As from an archive; SQLite by itself wants to make files there."""
    path = str(nobody / "run.db")
    make(path, "ab")
    os.chmod(nobody, 0o500)
    assert keys_in(path) == ["a", "b"]
    assert os.listdir(nobody) == ["run.db"]


def test_a_wal_that_cannot_be_read_is_not_left_out(nobody: Path) -> None:
    """Rather than to show a journal without its last commits."""
    path = str(nobody / "run.db")
    with closing(open_to_write(path, full_sync=False)) as journal:
        journal.execute("INSERT INTO item(key) VALUES ('a')")
        copy = str(nobody / "copy.db")
        shutil.copy(path, copy)
        shutil.copy(f"{path}-wal", f"{copy}-wal")
    os.chmod(nobody, 0o500)
    with pytest.raises(JournalError, match=r"copy\.db: cannot be opened"):
        open_to_read(copy)
    os.chmod(nobody, 0o700)
    assert keys_in(copy) == ["a"]


def test_a_file_that_may_not_be_read_is_explained(nobody: Path) -> None:
    path = str(nobody / "run.db")
    make(path)
    os.chmod(path, 0)
    with pytest.raises(JournalError, match=r"run\.db: cannot be opened\. Check that this user may read"):
        open_to_read(path)


# --- set aside ---


def test_a_journal_that_is_set_aside_makes_room_for_a_new_one(path: str, tmp_path: Path) -> None:
    """With its side file; the lock stays with who holds it."""
    for number, key in enumerate("abc", start=1):
        make(path, key)
        Path(schema.side_file_of(path)).write_text(key)
        Path(schema.lock_of(path)).touch()
        free = str(tmp_path / f"run-{number}.db")
        assert set_aside(path) == free
        assert keys_in(free) == [key]
        assert Path(schema.side_file_of(free)).read_text() == key
    assert not os.path.exists(path)
    assert os.path.exists(schema.lock_of(path))


def test_what_a_killed_writer_left_goes_along(path: str, tmp_path: Path) -> None:
    assert run(WRITES_AND_DIES, path) == -signal.SIGKILL
    free = set_aside(path)
    assert os.listdir(tmp_path) == ["run-1.db"]
    assert keys_in(free) == list(range(100))


def test_what_a_reader_left_does_not_count(path: str) -> None:
    """It may not remove SQLite's files, which are empty."""
    make(path, "a")
    assert keys_in(path) == ["a"]
    assert os.path.exists(f"{path}-wal")
    os.rename(path, f"{path}.copy")
    make(path, "b")
    assert keys_in(path) == ["b"]
    assert keys_in(set_aside(path)) == ["b"]
    assert not os.path.exists(f"{path}-wal")


def test_one_that_is_killed_between_the_two_files_is_set_aside_with_both(path: str, tmp_path: Path) -> None:
    """The side file went first, and waits under the name that the journal gets."""
    make(path, "a")
    Path(schema.side_file_of(str(tmp_path / "run-1.db"))).write_text("a")
    assert set_aside(path) == str(tmp_path / "run-1.db")
    make(path, "b")
    Path(schema.side_file_of(path)).write_text("b")
    Path(schema.side_file_of(str(tmp_path / "run-2.db"))).write_text("somebody's")
    assert set_aside(path) == str(tmp_path / "run-3.db")


def test_a_journal_that_somebody_has_open_is_not_set_aside(path: str) -> None:
    """Its WAL would stay behind."""
    make(path, "a")
    with closing(open_to_read(path)) as reader:
        assert keys_of(reader) == ["a"]
        with pytest.raises(JournalError, match=r"run\.db: cannot be set aside.*has it open\. End that"):
            set_aside(path)
    assert keys_in(set_aside(path)) == ["a"]


def test_to_set_aside_what_is_not_there_is_explained(path: str) -> None:
    with pytest.raises(JournalError, match=r"run\.db: cannot be opened"):
        set_aside(path)


# --- what errors say ---


def raised(*statements: str) -> sqlite3.Error:
    """What SQLite really raises."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            for statement in statements:
                connection.execute(statement).fetchall()
        except sqlite3.Error as error:
            return error
    raise AssertionError("nothing was raised")


def test_a_full_disk_is_called_that_and_says_what_is_safe() -> None:
    """As SQLite says it, and as the system does."""
    by_sqlite = raised("PRAGMA max_page_count = 1", "CREATE TABLE a(x)")
    for error in (by_sqlite, OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota")):
        message = str(explained(error, "run.db"))
        assert message.startswith("run.db: the disk is full. Make room, and run again: what was committed is kept.")
        assert str(error) in message
    assert "SQLITE_FULL" in str(explained(by_sqlite, "run.db"))


def test_text_that_is_not_unicode_is_damage() -> None:
    """The one error of the module itself that a file can cause: it has no code."""
    message = str(explained(raised("SELECT CAST(x'ff' AS TEXT)"), "a b.db"))
    assert message.startswith("a b.db: is damaged. Restore it from a copy")
    assert "sqlite3 'a b.db' .recover" in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            raised("SELECT zeroblob(2000000000)"),
            "a value is longer than SQLite takes, which is 1 GB. Store it elsewhere",
        ),
        (OSError(errno.EROFS, "Read-only"), "may not be written"),
        (PermissionError(errno.EACCES, "Denied"), "may not be written"),
        (OSError(errno.EIO, "I/O"), "the disk could not read or write. Check the disk"),
        (OSError(errno.EFBIG, "Too big"), "Check the disk, the quota and `ulimit -f`"),
        (OSError(errno.EMFILE, "Too many"), "cannot be opened. Check"),
        (OSError("without a number"), "cannot be used. Check the file"),
        (raised("SELECT nothing"), "is damaged" if sys.version_info < (3, 11) else "cannot be used"),
        (sqlite3.ProgrammingError("Cannot operate on a closed database."), "cannot be used"),
    ],
)
def test_each_error_says_what_happened_and_what_to_do(error: sqlite3.Error | OSError, said: str) -> None:
    message = str(explained(error, "run.db"))
    assert message.startswith("run.db: ")
    assert said in message
    assert f"({type(error).__name__}: " in message


def test_the_error_that_is_explained_is_the_cause() -> None:
    cause = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(JournalError) as caught, explaining("run.db"):
        raise cause
    assert caught.value.__cause__ is cause


def test_other_errors_are_not_the_journal_s() -> None:
    with pytest.raises(KeyError), explaining("run.db"):
        raise KeyError


def test_a_folder_is_synced_where_the_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[int]()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_folder(str(tmp_path / "run.db"))
    assert synced == [tmp_path.stat().st_ino]
    monkeypatch.setattr("os.name", "nt")
    sync_folder("run.db")
    assert len(synced) == 1
