"""Upkeep: dead items asked for again, and disk space given back, without losing anything at any moment."""

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest

from penstock.errors import JournalError, UsageError
from penstock.journal import side_file, upkeep
from penstock.journal.database import open_to_read, open_to_write
from penstock.journal.lock import Lock
from penstock.journal.reading import SLICE, Reading
from penstock.journal.schema import STEP_COLUMNS, Key, Row, State, StepRow, checksum, side_file_of
from penstock.journal.side_file import SideFile
from penstock.journal.upkeep import compact, forget_damaged, retry

R = TypeVar("R", Row, StepRow)

RECORDED = 1_767_225_600.25
KEYS = ("a", "b", "c")

KILLED_AT_EVERY_LINE = """
import os, shutil, signal, sys
from collections import Counter
from itertools import count
from penstock.journal import upkeep
from penstock.journal.reading import Reading
from penstock.journal.schema import State, side_file_of

original, path, what, times = sys.argv[1:]
times = int(times)
work = {"compact": upkeep.compact, "retry": upkeep.retry}[what]

def anew():
    for name in (path, f"{path}-wal", f"{path}-shm", side_file_of(path)):
        if os.path.exists(name):
            os.remove(name)
    shutil.copyfile(original, path)
    shutil.copyfile(side_file_of(original), side_file_of(path))

def killed_at(moment):
    # Whether a child that does the work died at its n-th moment: a line, told by where it was called from, as often as
    # a loop comes to it, but no more than `times`.
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    moments, seen = 0, Counter()
    def trace(frame, event, argument):
        nonlocal moments
        if frame.f_code.co_filename != upkeep.__file__:
            return None
        if event == "line":
            lines, above = [], frame
            while above:
                if above.f_code.co_filename == upkeep.__file__:
                    lines.append(above.f_lineno)
                above = above.f_back
            seen[tuple(lines)] += 1
            moments += seen[tuple(lines)] <= times
            if moments == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    work(path)
    os._exit(0)

def content():
    with Reading(path) as reading:
        return {row.key: (row.state, reading.value(row)) for row in reading.rows()}

anew()
before = content()
work(path)
after = content()
compacted = os.path.getsize(side_file_of(path))
for moment in count(1):
    anew()
    if not killed_at(moment):
        print(moment - 1)
        break
    found = content()
    assert found in (before, after), (moment, found)
    work(path)
    assert content() == after, moment
    if what == "compact":
        assert os.path.getsize(side_file_of(path)) == compacted, moment
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


def row(key: Key | None, state: State, **more: Any) -> Row:
    return Row(key, int(state), 1, 1, RECORDED, 0.0, 0.0)._replace(**more)


def dead(key: Key | None, message: str = "no", kind: str = "permanent", status: int | None = None) -> Row:
    return row(key, State.DEAD, kind=kind, error="ValueError", message=message, status=status, input="1")


def in_file(path: str, row: R, data: str) -> R:
    """The row, with its result in the side file."""
    file = SideFile(side_file_of(path))
    offset, size, crc = file.append(data.encode())
    file.close()
    return row._replace(result="", file_offset=offset, file_size=size, file_crc=crc)


def done(key: Key, result: str | None = None) -> Row:
    return row(key, State.DONE, result=result)


def record(path: str, rows: Iterable[Row], steps: Iterable[StepRow] = ()) -> None:
    """As runs do, by the same keys too."""
    with closing(open_to_write(path, full_sync=False)) as connection:
        connection.execute("BEGIN")
        connection.execute("INSERT INTO run(started) VALUES (?)", (RECORDED,))
        all_rows: list[Row | StepRow] = [*rows, *steps]
        for found in all_rows:
            table = "item" if isinstance(found, Row) else "step"
            columns, marks = ", ".join((*found._fields, "crc")), ", ".join("?" * (len(found) + 1))
            statement = f"INSERT OR REPLACE INTO {table}({columns}) VALUES ({marks})"
            connection.execute(statement, (*found, checksum(found)))
        connection.execute("COMMIT")


def change(path: str, statement: str) -> None:
    """As no run does."""
    with closing(open_to_write(path, full_sync=False)) as connection:
        connection.execute(statement)


def states(path: str) -> dict[Key | None, str]:
    with Reading(path) as reading:
        return {row.key: State(row.state).name for row in reading.rows()}


def values(path: str) -> dict[Key | None, Any]:
    with Reading(path) as reading:
        return {row.key: reading.value(row) for row in reading.rows(State.DONE)}


def fragmented(path: str) -> int:
    """A journal of three results in its side file; returns the bytes of what nothing refers to, or soon will not."""
    first = in_file(path, done(KEYS[0]), f'"new {KEYS[0]}"')
    garbage = sum(in_file(path, done(key), f'"old {key}"').file_size or 0 for key in KEYS)
    finished = in_file(path, StepRow("a", "score", b"hash", None), '"of a"')
    record(path, [first, *(in_file(path, done(key), f'"new {key}"') for key in KEYS[1:])])
    record(path, [], [in_file(path, StepRow("unfinished", "score", b"hash", None), "123"), finished])
    return garbage + (finished.file_size or 0)


# --- retry ---


def test_dead_items_are_asked_for_again(path: str) -> None:
    """All of them, and nothing else; what is known of them stays there to be read."""
    others = [row(state.name, state) for state in State]
    record(path, [*others, *(dead(key) for key in range(2 * SLICE))])
    assert retry(path) == 2 * SLICE + 1
    expected = {state.name: "RETRY" if state is State.DEAD else state.name for state in State}
    assert states(path) == expected | dict.fromkeys(range(2 * SLICE), "RETRY")
    with Reading(path) as reading:
        assert {row.error for row in reading.rows(State.RETRY) if isinstance(row.key, int)} == {"ValueError"}
    assert retry(path) == 0


@pytest.mark.parametrize(
    ("where", "keys"),
    [("transient", {"b"}), ("HTTP 422", {"c"}), ("ValueError: no", {"a"}), ("yes", {"b", "c"}), ("nothing", set())],
)
def test_which_of_them_can_be_said(path: str, where: str, keys: set[str]) -> None:
    """By kind, by status, by a part of the error's class and first line."""
    entries = [dead("a"), dead("b", "yes", kind="transient"), dead("c", "yes\nno, but 422", status=422)]
    record(path, entries)
    assert retry(path, where) == len(keys)
    assert {key for key, state in states(path).items() if state == "RETRY"} == keys


@pytest.mark.parametrize("where", ["", " "])
def test_which_of_them_has_to_be_said_if_anything_is(path: str, where: str) -> None:
    """An empty variable of a shell must not mean all of them."""
    record(path, [dead("a")])
    with pytest.raises(UsageError, match="where is empty: .* Leave it out for all"):
        retry(path, where)
    assert retry(path) == 1


def test_items_whose_outcome_is_unknown_are_asked_for_by_name(path: str) -> None:
    """Whatever is said of the dead: they have no error."""
    record(path, [row("u", State.UNKNOWN), dead("a")])
    assert retry(path, "HTTP 422") == 0
    assert retry(path, "HTTP 422", unknown=True) == 1
    assert states(path) == {"u": "RETRY", "a": "DEAD"}


def test_an_item_without_a_key_stays_dead(path: str) -> None:
    """Nobody could tell that it comes again."""
    record(path, [dead(None)])
    assert retry(path) == 0
    assert states(path) == {None: "DEAD"}


def test_a_damaged_row_stops_a_retry_before_it_has_done_anything(path: str) -> None:
    """Nothing gets a new checksum that had a wrong one."""
    record(path, [dead("a"), dead("b")])
    change(path, "UPDATE item SET message = 'else' WHERE key = 'b'")
    with pytest.raises(JournalError, match="row of 'b'"):
        retry(path)
    with Reading(path, skip_damaged=True) as reading:
        assert [row.state for row in reading.rows()] == [State.DEAD]


# --- compact ---


def test_disk_space_is_given_back_and_nothing_else_is_gone(path: str) -> None:
    """Of results that nothing refers to, of steps of finished items, of rows that were deleted."""
    garbage = fragmented(path)
    record(path, [row(key, State.DONE, result=f'"{"x" * 1000}"') for key in range(1000)])
    change(path, "DELETE FROM item WHERE typeof(key) = 'integer'")
    size, side = os.path.getsize(path), os.path.getsize(side_file_of(path))
    done = compact(path)
    assert done.before_bytes == size + side
    assert (
        done.after_bytes == os.path.getsize(path) + os.path.getsize(side_file_of(path)) < done.before_bytes - 1_000_000
    )
    assert os.path.getsize(side_file_of(path)) == side - garbage
    assert values(path) == {key: f"new {key}" for key in KEYS}
    again = compact(path)
    assert again.after_bytes == again.before_bytes


def test_the_steps_of_an_unfinished_item_stay(path: str) -> None:
    """They have been paid for, and their results move with the others."""
    fragmented(path)
    compact(path)
    with closing(open_to_read(path)) as connection:
        ((*columns, crc),) = connection.execute(f"SELECT {', '.join(STEP_COLUMNS)}, crc FROM step")
    kept = StepRow(*columns)
    assert kept.key == "unfinished"
    assert checksum(kept) == crc
    assert kept.file_offset is not None
    assert kept.file_size is not None
    assert kept.file_crc is not None
    assert side_file.read(side_file_of(path), kept.file_offset, kept.file_size, kept.file_crc) == b"123"


def test_a_journal_without_large_results_has_no_side_file_afterwards_either(path: str) -> None:
    """Nor one whose results have all become garbage any bytes in it."""
    record(path, [dead("a")])
    compact(path)
    assert not os.path.exists(side_file_of(path))
    in_file(path, done("a"), "1")
    record(path, [done("a", "2")])
    compact(path)
    assert os.path.getsize(side_file_of(path)) == 0
    assert values(path) == {"a": 2}


def test_readers_go_on_meanwhile(path: str) -> None:
    """One in the middle of its iteration, too."""
    fragmented(path)
    with Reading(path) as reading:
        results = reading.results()
        assert next(results)[1] == '"new a"'
        compact(path)
        assert [data for _, data in results] == ['"new b"', '"new c"']


def test_a_full_disk_leaves_the_side_file_as_it_was(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written in vain is cut off, since the disk is full."""
    fragmented(path)
    before = Path(side_file_of(path)).read_bytes()
    write, calls = upkeep._write, []

    def write_twice(file: Any, data: bytes) -> None:
        calls.append(data)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(upkeep, "_write", write_twice)
    with pytest.raises(JournalError, match="disk is full"):
        compact(path)
    assert Path(side_file_of(path)).read_bytes() == before
    assert values(path) == {key: f"new {key}" for key in KEYS}


def test_an_interruption_after_the_commit_cuts_nothing_off(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows refer to the end of the file by then; the next compaction takes it from there."""
    fragmented(path)
    move = upkeep._move

    def move_and_be_interrupted(*arguments: Any) -> None:
        move(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "_move", move_and_be_interrupted)
        with pytest.raises(KeyboardInterrupt):
            compact(path)
    assert values(path) == {key: f"new {key}" for key in KEYS}
    compact(path)
    assert values(path) == {key: f"new {key}" for key in KEYS}
    assert os.path.getsize(side_file_of(path)) == 3 * len('"new a"') + len("123")


def test_a_damaged_result_stops_a_compaction_and_stays_where_it_is(path: str) -> None:
    """Nothing is moved that cannot be checked."""
    fragmented(path)
    with open(side_file_of(path), "r+b") as file:
        file.seek(-12, os.SEEK_END)  # within the result of the last item
        file.write(b"!")
    size = os.path.getsize(side_file_of(path))
    with pytest.raises(JournalError, match="is damaged: a result differs"):
        compact(path)
    assert os.path.getsize(side_file_of(path)) == size


@pytest.mark.parametrize(
    ("what", "times"), [("compact", 1), ("retry", 1), pytest.param("compact", 10, marks=pytest.mark.full)]
)
def test_a_kill_at_any_line_loses_nothing(path: str, what: str, times: int) -> None:
    """Each item is there, with its result, before or after; and the work can be done again to its end."""
    fragmented(path)
    record(path, [dead("d"), dead("e")])
    # In memory where there is such a place: a kill takes nothing from a file, and syncing a disk takes long.
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        command = [sys.executable, "-c", KILLED_AT_EVERY_LINE, path, f"{folder}/copy.db", what, str(times)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 20


# --- what is damaged ---


def test_what_is_damaged_is_forgotten_and_nothing_else(path: str) -> None:
    """Rows that differ from their checksum, in text that is none among others, and those whose result is lost."""
    fragmented(path)
    lost = in_file(path, done("lost"), '"lost"')
    record(path, [done("good", "1"), done("bad", "1"), dead("worse"), lost], [StepRow("worse", "bad step", b"", "1")])
    change(path, "UPDATE item SET result = '2' WHERE key = 'bad'")
    change(path, "UPDATE item SET message = CAST(x'ff' AS TEXT) WHERE key = 'worse'")
    change(path, "UPDATE step SET result = '2' WHERE name = 'bad step'")
    with open(side_file_of(path), "r+b") as file:
        file.truncate(os.path.getsize(side_file_of(path)) - 1)
    assert forget_damaged(path) == 4
    assert values(path) == {"good": 1, **{key: f"new {key}" for key in KEYS}}
    assert states(path).keys() == {"good", *KEYS}
    with closing(open_to_read(path)) as connection:
        assert connection.execute("SELECT key FROM step ORDER BY key").fetchall() == [("a",), ("unfinished",)]
    assert forget_damaged(path) == 0


# --- all of them ---


@pytest.mark.parametrize("work", [retry, compact, forget_damaged])
def test_upkeep_is_refused_while_a_run_writes(path: str, work: Any) -> None:
    """And does not hold the lock afterwards, whatever came of it."""
    record(path, [dead("a")])
    lock = Lock(path)
    lock.take()
    with pytest.raises(JournalError, match="writes it already"):
        work(path)
    lock.release()
    work(path)
    lock.take()
    lock.release()


@pytest.mark.parametrize("work", [retry, compact, forget_damaged])
def test_upkeep_makes_no_journal(path: str, work: Any) -> None:
    """A path that was mistyped leaves nothing on the disk."""
    with pytest.raises(JournalError, match="does not exist"):
        work(path)
    with pytest.raises(UsageError, match="no path"):
        work(7)
    assert os.listdir(os.path.dirname(path)) == []
