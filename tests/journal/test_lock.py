"""One writer for each journal: in one process, among several, and after their death."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from penstock.errors import JournalError
from penstock.journal import lock as lock_module
from penstock.journal.database import open_to_write
from penstock.journal.lock import Lock, is_held
from penstock.journal.schema import lock_of

TAKE = """
import sys
from penstock.journal.lock import Lock
lock = Lock(sys.argv[1])
lock.take()
print("taken", flush=True)
sys.stdin.read()
"""

TAKE_AND_FORK = """
import os, signal, sys
from penstock.journal.lock import Lock
lock = Lock(sys.argv[1])
lock.take()
child = os.fork()
if child:
    print(child, flush=True)
    signal.pause()
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


@contextmanager
def started(program: str, path: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which is killed at the end of the block."""
    command = [sys.executable, "-c", program, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> str:
    """The next line it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def other(path: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which has the lock."""
    with started(TAKE, path) as process:
        assert said(process) == "taken"
        yield process


def record_run(path: str, *run: object) -> None:
    """A journal whose last run has this host, pid, start and end."""
    with closing(open_to_write(path, full_sync=False)) as journal:
        journal.execute("INSERT INTO run(host, pid, started, ended) VALUES (?, ?, ?, ?)", run)


# --- within one process ---


def test_a_second_run_of_the_same_process_is_refused_and_told_so(path: str) -> None:
    lock = Lock(path)
    lock.take()
    with pytest.raises(JournalError, match=r"run\.db: this very process writes it already.*choose another path"):
        Lock(path).take()
    with pytest.raises(JournalError, match="this very process"):
        lock.take()
    assert is_held(path)
    lock.release()


def test_who_was_refused_may_try_again_when_the_other_one_is_through(path: str) -> None:
    first, second = Lock(path), Lock(path)
    first.take()
    with pytest.raises(JournalError):
        second.take()
    first.release()
    assert not is_held(path)
    second.take()
    assert is_held(path)
    second.release()


def test_to_release_what_is_not_held_does_nothing(path: str) -> None:
    lock = Lock(path)
    lock.release()
    lock.take()
    lock.release()
    lock.release()
    assert not is_held(path)


def test_a_lock_that_is_taken_in_one_thread_is_released_in_another(path: str) -> None:
    lock = Lock(path)
    for step in (lock.take, lock.release):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        assert is_held(path) == (step == lock.take)


def test_of_many_threads_one_gets_it(path: str) -> None:
    results = list[str]()
    ready = threading.Barrier(8)
    locks = [Lock(path) for _ in range(8)]

    def attempt(lock: Lock) -> None:
        ready.wait()
        try:
            lock.take()
        except JournalError:
            results.append("refused")
        else:
            results.append("taken")

    threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["refused"] * 7 + ["taken"]
    for lock in locks:
        lock.release()


def test_who_comes_while_another_thread_is_at_it_is_told_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is this very process, and no other one, also while the lock is not taken yet."""
    first, second = Lock(path), Lock(path)
    taken = lock_module._is_taken

    def meanwhile(connection: sqlite3.Connection) -> bool:
        with pytest.raises(JournalError, match=r"run\.db: this very process writes it already"):
            second.take()
        return taken(connection)

    monkeypatch.setattr(lock_module, "_is_taken", meanwhile)
    first.take()
    first.release()


def test_an_attempt_that_failed_leaves_nothing_behind(path: str, other: "subprocess.Popen[str]") -> None:
    """Who was refused for another process is refused for it again, and gets the lock once that one is through."""
    lock = Lock(path)
    for _ in range(2):
        with pytest.raises(JournalError, match="another process writes it"):
            lock.take()
    other.kill()
    other.wait()
    lock.take()
    lock.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_the_child_of_a_fork_does_not_take_its_parent_for_itself(path: str) -> None:
    """It has a copy of what its parent knows, but is another process; what it inherits it may release."""
    program = (
        "import os, sys\n"
        "from penstock.journal.lock import Lock\n"
        "lock = Lock(sys.argv[1])\n"
        "lock.take()\n"
        "if not os.fork():\n"
        "    try:\n"
        "        Lock(sys.argv[1]).take()\n"
        "    except Exception as error:\n"
        "        print(error, flush=True)\n"
        "    lock.release()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "try:\n"
        "    Lock(sys.argv[1]).take()\n"
        "except Exception as error:\n"
        "    print(error, flush=True)\n"
    )
    with started(program, path) as process:
        assert "another process writes it" in said(process)
        assert "this very process writes it" in said(process)


def test_who_only_looks_keeps_nobody_out(path: str) -> None:
    """Another process that looks without a pause, and a hundred runs one after the other."""
    looking = "import sys\nfrom penstock.journal.lock import is_held\nprint('looking', flush=True)\n"
    lock = Lock(path)
    lock.take()  # makes the file
    lock.release()
    with started(looking + "while True: is_held(sys.argv[1])", path) as process:
        assert said(process) == "looking"
        for _ in range(100):
            lock.take()
            lock.release()


def test_who_looks_without_an_end_is_not_waited_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped within a look: it is not taken for a writer, and nobody waits for ever."""
    monkeypatch.setattr(lock_module, "LOOK_TIME", 0.01)
    monkeypatch.setattr(lock_module, "LOOKS", 3)
    with closing(sqlite3.connect(lock_of(path), isolation_level=None)) as looking:
        looking.execute("BEGIN")
        looking.execute("SELECT count(*) FROM sqlite_master").fetchone()
        assert not is_held(path)
        lock = Lock(path)
        with pytest.raises(JournalError, match=r"run\.db-lock: another process keeps it locked"):
            lock.take()
        looking.execute("ROLLBACK")
        lock.take()
        lock.release()


def test_a_journal_by_two_names_is_one_journal(path: str, tmp_path: Path) -> None:
    link = tmp_path / "latest.db"
    link.symlink_to(path)
    lock = Lock(path)
    lock.take()
    assert is_held(str(link))
    with pytest.raises(JournalError, match=r"latest\.db: this very process"):
        Lock(str(link)).take()
    lock.release()


def test_the_lock_s_file_stays_and_is_empty(path: str, tmp_path: Path) -> None:
    """Nothing is left beside it either."""
    lock = Lock(path)
    lock.take()
    assert os.listdir(tmp_path) == ["run.db-lock"]
    lock.release()
    assert os.listdir(tmp_path) == ["run.db-lock"]
    assert os.path.getsize(lock_of(path)) == 0


def test_to_look_makes_no_file(path: str, tmp_path: Path) -> None:
    assert not is_held(path)
    assert os.listdir(tmp_path) == []


# --- among processes ---


def test_another_process_keeps_it_until_it_dies(path: str, other: "subprocess.Popen[str]") -> None:
    assert is_held(path)
    with pytest.raises(JournalError, match=r"run\.db: another process writes it"):
        Lock(path).take()
    other.kill()
    other.wait()
    assert not is_held(path)
    lock = Lock(path)
    lock.take()
    lock.release()


def test_a_refusal_comes_at_once(path: str, other: "subprocess.Popen[str]") -> None:
    """Far sooner than what a write waits for."""
    start = time.monotonic()
    with pytest.raises(JournalError):
        Lock(path).take()
    assert time.monotonic() - start < 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_killed_process_has_let_go_even_where_its_forked_child_lives(path: str) -> None:
    """As of a pool of worker processes, which may outlive the program that was killed."""
    with started(TAKE_AND_FORK, path) as parent:
        child = int(said(parent))
        assert is_held(path)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        os.kill(child, 0)  # it lives
        assert not is_held(path)
        lock = Lock(path)
        lock.take()
        lock.release()
        # The child waits for the end of what it reads.
        assert parent.stdin is not None
        parent.stdin.close()
        assert said(parent) == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_the_end_of_a_forked_child_leaves_the_lock_with_its_parent(path: str, other: "subprocess.Popen[str]") -> None:
    """Although it closes its copies of everything."""
    program = TAKE.replace('print("taken"', "pid = os.fork()\nif not pid: lock.release(); os._exit(0)\n").replace(
        ", flush=True)", 'os.waitpid(pid, 0)\nprint("taken", flush=True)', 1
    )
    beside = f"{path}2"
    with started("import os\n" + program, beside) as process:
        assert said(process) == "taken"
        assert is_held(beside)


def test_the_refusal_names_host_process_and_how_long_it_has_run(path: str, other: "subprocess.Popen[str]") -> None:
    record_run(path, socket.gethostname(), other.pid, time.time() - 2 * 3600 - 600, None)
    with pytest.raises(JournalError) as caught:
        Lock(path).take()
    message = str(caught.value)
    assert f"{path}: process {other.pid} on {socket.gethostname()} writes it, since 2 h 10 min." in message
    assert f"kill -INT {other.pid}" in message


def test_a_process_of_another_machine_is_named_whatever_runs_here(path: str, other: "subprocess.Popen[str]") -> None:
    record_run(path, "elsewhere", 2**31 - 1, time.time() + 60, None)
    with pytest.raises(JournalError, match=r"process 2147483647 on elsewhere writes it, since 0 s\."):
        Lock(path).take()


@pytest.mark.parametrize(
    "run",
    [
        pytest.param((socket.gethostname(), 1, 0.0, 1.0), id="ended"),
        pytest.param((socket.gethostname(), 2**31 - 1, 0.0, None), id="dead"),
        pytest.param((None, None, None, None), id="damaged"),
        pytest.param((socket.gethostname(), 1, b"\0", None), id="damaged too"),
    ],
)
def test_a_run_that_does_not_write_any_more_is_not_named(
    path: str, other: "subprocess.Popen[str]", run: tuple[object, ...]
) -> None:
    """The lock may be held by somebody who is no run, after a run that was killed."""
    record_run(path, *run)
    with pytest.raises(JournalError, match="another process writes it"):
        Lock(path).take()


def test_without_a_run_nobody_is_named(path: str, other: "subprocess.Popen[str]") -> None:
    open_to_write(path, full_sync=False).close()
    with pytest.raises(JournalError, match="another process writes it"):
        Lock(path).take()


@pytest.mark.parametrize(
    ("host", "pid"), [("elsewhere", 2**31 - 1), (socket.gethostname(), 1), (socket.gethostname(), 2**70)]
)
def test_a_process_that_nothing_is_known_of_is_not_taken_for_dead(host: str, pid: int) -> None:
    """Of another machine, of another user, of a number that no process can have."""
    assert not lock_module.is_gone(host, pid)


def test_where_a_process_cannot_be_asked_for_it_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask by `os.kill` would end it on Windows."""
    monkeypatch.setattr("os.name", "nt")
    assert not lock_module.is_gone(socket.gethostname(), 2**31 - 1)


@pytest.mark.parametrize(
    ("seconds", "spoken"),
    [
        *((0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h 0 min"), (8400, "2 h 20 min")),
        *((86399, "23 h 59 min"), (86400, "1 d 0 h"), (1e6, "11 d 13 h")),
    ],
)
def test_how_long_it_has_run_is_said_in_two_words(seconds: float, spoken: str) -> None:
    assert lock_module._spoken(seconds) == spoken


# --- files that are wrong ---


def test_a_lock_file_that_is_something_else_is_named(path: str) -> None:
    Path(lock_of(path)).write_bytes(b"1234\n" * 1000)
    with pytest.raises(JournalError, match=r"run\.db-lock: is not the lock of a journal. Move it"):
        Lock(path).take()
    with pytest.raises(JournalError, match=r"run\.db-lock: is not the lock of a journal. Move it"):
        is_held(path)


def test_a_lock_file_that_cannot_be_made_is_explained(path: str) -> None:
    os.mkdir(lock_of(path))
    with pytest.raises(JournalError, match=r"run\.db-lock: cannot be opened"):
        Lock(path).take()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_lock_file_that_may_not_be_written_is_not_taken_to_be_locked(path: str, tmp_path: Path) -> None:
    """SQLite begins its transaction all the same, without a lock."""
    Path(lock_of(path)).touch(mode=0o444)
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others than root, who may do anything
        beside = os.path.join(folder, "run.db")
        shutil.copy(lock_of(path), lock_of(beside))
        os.chmod(folder, 0o755)
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(JournalError, match=r"run\.db-lock: may not be written by this user"):
                Lock(beside).take()
            assert not is_held(beside)
        finally:
            os.seteuid(user)


def test_a_folder_that_is_missing_is_not_made(path: str, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="missing does not exist. Make it"):
        Lock(str(tmp_path / "missing" / "run.db")).take()
    assert os.listdir(tmp_path) == []


def test_a_journal_that_has_been_emptied_is_not_begun_anew(path: str, tmp_path: Path) -> None:
    """An empty file without a lock is one that somebody has made to be filled."""
    Path(path).touch()
    lock = Lock(path)
    lock.take()
    lock.release()
    with pytest.raises(JournalError, match=r"run\.db: has been a journal.*is empty now.*Restore"):
        lock.take()


def test_a_journal_that_was_removed_is_begun_anew(path: str) -> None:
    record_run(path, None, None, None, None)
    lock = Lock(path)
    lock.take()
    lock.release()
    os.remove(path)
    lock.take()
    lock.release()


def test_a_copied_journal_is_not_held(path: str, tmp_path: Path) -> None:
    """Whatever is copied: a lock is the kernel's, not the file's."""
    lock = Lock(path)
    lock.take()
    shutil.copy(lock_of(path), tmp_path / "copy.db-lock")
    assert not is_held(str(tmp_path / "copy.db"))
    lock.release()


def test_the_locks_of_sqlite_s_own_tools_count(path: str) -> None:
    """It is an ordinary database to them."""
    with closing(sqlite3.connect(lock_of(path), isolation_level=None)) as tool:
        tool.execute("BEGIN EXCLUSIVE")
        assert is_held(path)
        with pytest.raises(JournalError, match="another process writes it"):
            Lock(path).take()
