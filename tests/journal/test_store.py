"""The thread's side of a journal: real files, one run after the other."""

import errno
import os
import pathlib
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.errors import JournalError
from penstock.journal.lock import is_held
from penstock.journal.options import JSON, Journal
from penstock.journal.record import Entry, done_columns, row_of
from penstock.journal.schema import Key, Row, State, StepRow
from penstock.journal.store import Batch, Begun, Known, StepEntry, Store, fingerprint_of
from penstock.outcome import FailureKind, Outcome

FINGERPRINT = Journal("run.db").fingerprint("job")
LARGE = b"x" * 100_000


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path.resolve() / "run.db")


@contextmanager
def opened(path: str, fingerprint: str = FINGERPRINT, **options: Any) -> Iterator[Store]:
    """One run, in which all steps are of use, unless it is said otherwise."""
    store = Store(Journal(path, **{"resume": "all", "on_unknown": "rerun", **options}), fingerprint)
    try:
        store.open()
        yield store
    finally:
        store.close_reading()
        store.close(None, {})


def done(key: Key, value: str = '"x"', run: int = 1) -> list[Any]:
    """The columns of an item that is done."""
    outcome = Outcome(key, "item", None, None, None, 1, 0.0, 0.5)
    return list(done_columns(outcome, key, run, 100.0, None, value))


def ended(key: Key | None, state: State, message: str = "bad", run: int = 1) -> Entry:
    if state is State.DONE:
        return Entry(Row(key, state.value, 1, run, 100.0, 0.0, 0.5, None, message))
    outcome: Outcome[Any] = Outcome(key, "item", None, ValueError(message), FailureKind.PERMANENT, 1, 0.0, 0.5)
    entry = row_of(outcome, key, run, 100.0, None, None, JSON)
    return Entry(entry.row._replace(state=state.value))


def step(key: Key, name: str = "score", arguments: bytes = b"a", result: str = "1") -> StepEntry:
    return StepEntry(StepRow(key, name, arguments, result))


def rows(path: str, query: str) -> list[tuple[Any, ...]]:
    """As another program sees them."""
    with closing(sqlite3.connect(pathlib.Path(path).as_uri() + "?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def change(path: str, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def write(store: Store, *batches: Batch) -> None:
    """In one transaction."""
    store.write(batches)


@contextmanager
def locked(path: str, store: Store) -> Iterator[None]:
    """Somebody has an open transaction, and nobody waits for it."""
    assert store._writer is not None
    store._writer.execute("PRAGMA busy_timeout = 0")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def states(path: str) -> dict[Key, int]:
    return dict(rows(path, "SELECT key, state FROM item ORDER BY id"))


# --- runs ---


def test_each_run_has_a_row_of_its_own(path: str) -> None:
    store = Store(Journal(path), FINGERPRINT)
    assert store.open() == Begun(1, with_steps=False, example=None)
    write(store, Batch(done=done("a"), steps=[step("b")]))
    store.close("too many errors", {"read": 2})
    store = Store(Journal(path), FINGERPRINT)
    assert store.open() == Begun(2, with_steps=True, example="a")
    store.close(None, {})
    [first, second] = rows(path, "SELECT id, started <= ended, pid, fingerprint, stopped, counts FROM run")
    assert first == (1, 1, os.getpid(), FINGERPRINT, "too many errors", '{"read": 2}')
    assert second == (2, 1, os.getpid(), FINGERPRINT, None, "{}")


def test_a_run_that_did_not_come_to_its_end_was_killed(path: str) -> None:
    """As the next one says of it; another one that ended keeps what it said itself."""
    with opened(path):
        pass
    change(path, "UPDATE run SET ended = NULL")
    with opened(path), opened(f"{path}-other"):
        assert rows(path, "SELECT stopped, ended IS NULL FROM run") == [("killed", 0), (None, 1)]
    assert rows(path, "SELECT stopped, ended IS NULL FROM run") == [("killed", 0), (None, 0)]


def test_the_start_of_the_machine_is_recorded_where_it_is_known(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(_path: Path) -> str:
        raise FileNotFoundError(errno.ENOENT, "no such file")

    with opened(path):
        pass
    monkeypatch.setattr(Path, "read_text", read_text)
    with opened(path):
        pass
    [(known,), (unknown,)] = rows(path, "SELECT boot FROM run")
    assert unknown is None
    assert known is None or len(known) == 36


def test_what_had_no_key_is_asked_for_anew(path: str) -> None:
    """Nobody could say whether it comes again."""
    with opened(path) as store:
        write(store, Batch(entries=[ended(None, State.DEAD), ended(None, State.DEAD), ended("a", State.DEAD)]))
        assert rows(path, "SELECT key FROM item") == [(None,), (None,), ("a",)]
    with opened(path):
        assert rows(path, "SELECT key FROM item") == [("a",)]


def test_two_runs_do_not_write_one_file(path: str) -> None:
    """And the one that is refused leaves the other its lock."""
    with opened(path) as store:
        for _ in range(2):
            second = Store(Journal(path), FINGERPRINT)
            with pytest.raises(JournalError, match="this very process writes it already"):
                second.open()
            second.close(None, {})
        assert is_held(path)
        write(store, Batch(done=done("a")))
    assert not is_held(path)
    assert states(path) == {"a": State.DONE}


def test_two_runs_write_two_files(tmp_path: Path) -> None:
    with opened(str(tmp_path / "one.db")) as one, opened(str(tmp_path / "two.db")) as two:
        write(one, Batch(done=done("a")))
        write(two, Batch(done=done("b")))
    assert states(str(tmp_path / "one.db")) == {"a": State.DONE}
    assert states(str(tmp_path / "two.db")) == {"b": State.DONE}


def test_a_run_leaves_one_file_and_its_lock(path: str) -> None:
    """What was in the WAL is in the file, so that a copy of it is a copy of all."""
    with opened(path) as store:
        write(store, Batch(done=done("a")))
        assert os.path.exists(f"{path}-wal")
    assert sorted(os.listdir(os.path.dirname(path))) == ["run.db", "run.db-lock"]


@pytest.mark.parametrize(("durability", "synchronous"), [("process", 1), ("machine", 2)])
def test_durability_says_whether_a_commit_waits_for_the_disk(path: str, durability: str, synchronous: int) -> None:
    """SQLite's own numbers: 1 is NORMAL, 2 is FULL."""
    with opened(path, durability=durability) as store:
        assert store._writer is not None
        assert store._writer.execute("PRAGMA synchronous").fetchone() == (synchronous,)


# --- another job's ---

ANOTHER = Journal("run.db", version="2").fingerprint("job")


def test_a_journal_of_another_job_is_refused_and_left_alone(path: str) -> None:
    with opened(path) as store:
        write(store, Batch(done=done("a")))
    with (
        pytest.raises(JournalError, match=r"begun by another job.*\n  there: .*\n  here: .*\n.*on_mismatch=") as caught,
        opened(path, ANOTHER),
    ):
        pass
    assert FINGERPRINT in str(caught.value)
    assert ANOTHER in str(caught.value)
    assert not is_held(path)
    with opened(path):
        assert states(path) == {"a": State.DONE}
    assert rows(path, "SELECT count(*) FROM run") == [(2,)]


def test_a_journal_of_another_job_is_set_aside_on_request(path: str) -> None:
    """With its results, and as often as there is another one."""
    with opened(path) as store:
        write(store, Batch(entries=[ended("a", State.DONE)._replace(large=LARGE)]))
    for fingerprint in (ANOTHER, FINGERPRINT):
        with opened(path, fingerprint, on_mismatch="new") as store:
            assert store._run == 1
            assert store.look_up(["a"], True) == ({}, {})
            write(store, Batch(done=done("b")))
    folder = os.path.dirname(path)
    assert sorted(os.listdir(folder)) == ["run-1.db", "run-1.db-results", "run-2.db", "run.db", "run.db-lock"]
    assert states(f"{folder}/run-1.db") == {"a": State.DONE}
    assert states(f"{folder}/run-2.db") == {"b": State.DONE}


def test_a_journal_of_another_job_is_taken_over_on_request(path: str) -> None:
    """Then it is the new job's, and the one that began it is another one."""
    with opened(path) as store:
        write(store, Batch(done=done("a")))
    with opened(path, ANOTHER, on_mismatch="ignore") as store:
        assert set(store.look_up(["a"], False)[0]) == {"a"}
    with opened(path, ANOTHER):
        pass
    with pytest.raises(JournalError, match="begun by another job"), opened(path):
        pass


@pytest.mark.parametrize("on_mismatch", ["error", "new", "ignore"])
def test_one_s_own_journal_is_gone_on_with_in_any_case(path: str, on_mismatch: str) -> None:
    for run in (1, 2):
        with opened(path, on_mismatch=on_mismatch) as store:
            assert store._run == run


def test_a_journal_without_a_run_is_nobody_s(path: str) -> None:
    with opened(path):
        pass
    change(path, "DELETE FROM run")
    with opened(path, ANOTHER) as store:
        assert store._writer is not None
        assert fingerprint_of(store._writer) == ANOTHER


def test_what_is_wrong_with_the_last_run_is_told_and_the_lock_given_back(path: str) -> None:
    with opened(path):
        pass
    change(path, "UPDATE run SET fingerprint = CAST(x'ff' AS TEXT)")
    with pytest.raises(JournalError, match=r"run\.db: is damaged\. Restore it"), opened(path):
        pass
    assert not is_held(path)


def test_one_that_was_never_opened_can_be_closed(path: str) -> None:
    store = Store(Journal(path), FINGERPRINT)
    store.close_reading()
    store.close(None, {})
    assert not os.path.exists(path)


# --- what is written ---


def test_a_batch_of_everything_is_written(path: str) -> None:
    with opened(path) as store:
        write(store, Batch())
        write(
            store,
            Batch(
                done=[*done("a"), *done(1), *done(b"a"), *done(1.5)],
                entries=[ended("b", State.DEAD), ended("c", State.SKIPPED), ended("d", State.UNKNOWN)],
                steps=[step("b"), step("b", "other"), step("d")],
            ),
        )
        known, steps = store.look_up(["a", 1, b"a", 1.5, "b", "c", "d", "e", 2], True)
    assert {key: found.row.state for key, found in known.items()} == {
        "a": 1, 1: 1, b"a": 1, 1.5: 1, "b": 2, "c": 3, "d": 0,
    }  # fmt: skip
    assert [known[key].id for key in ("a", 1, b"a", 1.5, "b", "c", "d")] == list(range(1, 8))
    assert {key: [row.name for row in found] for key, found in steps.items()} == {
        "b": ["other", "score"],
        "d": ["score"],
    }
    assert known["b"].row == ended("b", State.DEAD).row
    assert list(known["a"].row[:9]) == done("a")[:9]


def test_nothing_is_asked_of_a_journal_for_no_keys(path: str) -> None:
    with opened(path) as store:
        write(store, Batch(done=done("a"), steps=[step("b")]))
        assert store.look_up([], True) == ({}, {})
        assert store.look_up(["b"], False) == ({}, {})


def test_only_steps_of_items_that_are_run_are_looked_up(path: str) -> None:
    """Of those that failed when they are run again; and of those that are not recorded at all."""
    ends = {"done": State.DONE, "dead": State.DEAD, "unknown": State.UNKNOWN, "retry": State.RETRY}
    with opened(path) as store:
        write(
            store,
            Batch(
                entries=[ended(key, state) for key, state in ends.items()],
                steps=[step(key) for key in (*ends, "missing")],
            ),
        )
    expected = {"missing": {"missing", "retry"}, "failed": {"missing", "retry", "dead"}}
    for resume, keys in expected.items():
        with opened(path, resume=resume, on_unknown="dead") as store:
            known, steps = store.look_up([*ends, "missing"], True)
            assert known.keys() == ends.keys()
            assert steps.keys() == keys
            assert store.look_up(["done"], True)[1] == {}


def test_a_look_up_sees_what_is_committed_and_waits_for_nobody(path: str) -> None:
    with opened(path) as store:
        write(store, Batch(done=done("a")))
        with locked(path, store):
            assert set(store.look_up(["a"], True)[0]) == {"a"}


ENDS = st.tuples(st.sampled_from(["a", 1, b"a", 2.5]), st.sampled_from(State), st.integers(0, 9).map(str))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for many examples, which empty it first."""
    with opened(str(tmp_path_factory.mktemp("store") / "run.db")) as store:
        yield store


def emptied(store: Store) -> Store:
    assert store._writer is not None
    store._writer.execute("DELETE FROM item")
    store._writer.execute("DELETE FROM step")
    return store


@given(batches=st.lists(st.lists(ENDS, max_size=4), max_size=6))
@example(
    batches=[[("a", State.DONE, "1")], [("a", State.DEAD, "2")], [("a", State.DONE, "3")], [("a", State.UNKNOWN, "4")]]
)
def test_what_is_done_stays_done_and_all_else_is_what_it_was_last(
    shared: Store, batches: list[list[tuple[Key, State, str]]]
) -> None:
    """A later success is the better one: it is what somebody has asked for."""
    store = emptied(shared)
    expected: dict[Key, tuple[int, str]] = {}
    ids: dict[Key, int] = {}
    for ends in batches:
        batch = Batch()
        for key, state, text in ends:
            if state is State.DONE:
                batch.done += done(key, text)
            else:
                batch.entries.append(ended(key, state, text))
        write(store, batch)
        for key, state, text in sorted(ends, key=lambda end: end[1] is not State.DONE):
            if expected.get(key, (-1,))[0] != State.DONE or state is State.DONE:
                expected[key] = state, text
        known, _ = store.look_up(["a", 1, b"a", 2.5], False)
        found = {key: (each.row.state, each.row.result or each.row.message) for key, each in known.items()}
        assert found == expected
        for key, each in known.items():
            assert ids.setdefault(key, each.id) == each.id, "a row keeps its number"


@pytest.mark.parametrize(("first", "second"), [(1, 1.0), (1.0, 1), (2**53, 2.0**53)])
@pytest.mark.parametrize("state", [State.DONE, State.DEAD])
def test_an_item_whose_key_is_another_number_of_the_same_size_is_the_same_item(
    shared: Store, first: Key, second: Key, state: State
) -> None:
    """Identifiers become floats as soon as one of them is missing in a table. The row is undamaged."""
    store = emptied(shared)
    write(store, Batch(entries=[ended(first, State.DEAD)]))
    write(store, Batch(done=done(second)) if state is State.DONE else Batch(entries=[ended(second, state)]))
    for key in (first, second):
        known, _ = store.look_up([key], False)
        assert known[key].row.state == state


KEYS = st.text(max_size=8) | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=8) | st.floats(-1e300, 1e300)


@given(keys=st.lists(KEYS, max_size=20))
@example(keys=["1", 1, b"1", 1.5, "", b"", "\0", -(2**63), 5e-324])
def test_each_key_has_a_row_and_steps_of_its_own(shared: Store, keys: list[Key]) -> None:
    store = emptied(shared)
    own = dict.fromkeys(key + 0.0 if isinstance(key, float) else key for key in keys)
    for number, key in enumerate(own):
        write(store, Batch(done=done(key, str(number)), steps=[step(key, result=str(number))]))
    known, steps = store.look_up(list(own), True)
    assert {key: found.row.result for key, found in known.items()} == {key: str(n) for n, key in enumerate(own)}
    assert {key: found[0].result for key, found in steps.items()} == {key: str(n) for n, key in enumerate(own)}


def test_a_step_that_is_recorded_again_is_what_it_was_last(shared: Store) -> None:
    store = emptied(shared)
    write(store, Batch(steps=[step(1, result="1"), step(1, result="2")]))
    write(store, Batch(steps=[step(1.0, result="3")]))
    _, steps = store.look_up([1], True)
    assert [row.result for row in steps[1]] == ["3"]


def test_steps_are_forgotten_in_the_transaction_that_finishes_the_item(path: str) -> None:
    """Also those that it writes itself. So no moment knows neither the item nor its steps."""
    with opened(path) as store:
        write(store, Batch(steps=[step("a"), step("b"), step(7)]))
        with locked(path, store), pytest.raises(JournalError):
            write(store, Batch(done=done("a"), forgotten=["a"]))
        assert rows(path, "SELECT key FROM step ORDER BY rowid") == [("a",), ("b",), (7,)]
        write(store, Batch(done=done("a"), steps=[step("a", "other")], forgotten=["a", 7]))
        assert rows(path, "SELECT key FROM step") == [("b",)]


def test_a_batch_forgets_as_many_steps_as_it_likes(path: str) -> None:
    keys: list[Key] = list(range(1201))
    with opened(path) as store:
        write(store, Batch(steps=[step(key) for key in keys]))
        write(store, Batch(forgotten=keys[:-1]))
        assert rows(path, "SELECT key FROM step") == [(1200,)]


# --- large results ---


def test_large_results_of_items_and_steps_stand_beside_the_file(path: str) -> None:
    entry = ended("a", State.DONE, "")._replace(large=LARGE)
    large_step = step("b", result="")._replace(large=b"y" * 70_000)
    with opened(path) as store:
        write(store, Batch(done=done("c"), entries=[entry, ended("d", State.DEAD)], steps=[large_step, step("d")]))
    with opened(path) as store:
        known, steps = store.look_up(["a", "b", "c", "d"], True)
        assert store.large_value(known["a"].row) == LARGE
        assert store.large_value(steps["b"][0]) == b"y" * 70_000
        assert [store.large_value(row) for row in (known["c"].row, known["d"].row, steps["d"][0])] == [None] * 3
        os.truncate(f"{path}-results", 10)
        with pytest.raises(JournalError, match=r"run\.db-results: ends before"):
            store.large_value(known["a"].row)


def test_a_large_result_is_on_the_disk_before_its_row(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[object]()
    with opened(path) as store:
        monkeypatch.setattr(store._side, "sync", lambda: seen.append(rows(path, "SELECT key FROM item")))
        write(store, Batch(entries=[ended("a", State.DONE, "")._replace(large=LARGE)]))
        write(store, Batch(done=done("b")))
    assert seen == [[]]


def test_what_could_not_be_committed_takes_no_room_beside_the_file_for_ever(path: str) -> None:
    """Somebody may be making room, while it is tried again and again."""
    batch = Batch(entries=[ended("a", State.DONE, "")._replace(large=LARGE)], steps=[step("b")._replace(large=LARGE)])
    with opened(path) as store:
        with locked(path, store):
            for _ in range(5):
                with pytest.raises(JournalError, match="another process keeps it locked"):
                    write(store, batch)
        write(store, batch)
        assert os.path.getsize(f"{path}-results") <= 2 * (len(LARGE) + len(LARGE))
        known, steps = store.look_up(["a", "b"], True)
        assert store.large_value(known["a"].row) == LARGE
        assert store.large_value(steps["b"][0]) == LARGE


def test_a_large_result_that_did_not_get_to_the_disk_is_written_again(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says once that it has lost what was written; asked again, it says that there is nothing left to do."""
    batch = Batch(entries=[ended("a", State.DONE, "")._replace(large=LARGE)], steps=[step("b")._replace(large=LARGE)])

    def lose() -> None:
        os.truncate(f"{path}-results", 0)
        raise OSError(errno.EIO, "input/output error")

    with opened(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store._side, "sync", lose)
            with pytest.raises(JournalError, match="the disk could not read or write"):
                write(store, batch)
        write(store, batch)
        known, steps = store.look_up(["a", "b"], True)
        assert store.large_value(known["a"].row) == LARGE
        assert store.large_value(steps["b"][0]) == LARGE


# --- trouble ---


def test_a_batch_is_written_as_a_whole_or_not_at_all(path: str) -> None:
    """And as a whole when it is tried again."""
    batch = Batch(done=done("a"), entries=[ended("b", State.DEAD)], steps=[step("c")])
    with opened(path) as store:
        assert store._writer is not None
        store._writer.execute("CREATE TEMP TRIGGER full BEFORE INSERT ON step BEGIN SELECT RAISE(FAIL, 'full'); END")
        with pytest.raises(JournalError, match=r"run\.db: "):
            write(store, batch)
        assert rows(path, "SELECT key FROM item UNION SELECT key FROM step") == []
        store._writer.execute("DROP TRIGGER full")
        write(store, batch)
        assert states(path) == {"a": State.DONE, "b": State.DEAD}


def test_several_batches_are_written_together_in_their_order(path: str) -> None:
    with opened(path) as store:
        write(
            store,
            Batch(entries=[ended("a", State.DEAD)], steps=[step("a"), step("b")]),
            Batch(done=done("a"), forgotten=["a"]),
            Batch(done=done("b"), steps=[step("c")]),
        )
        assert rows(path, "SELECT key FROM step ORDER BY key") == [("b",), ("c",)]
    assert states(path) == {"a": State.DONE, "b": State.DONE}


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("suffix", ["", "-lock"])
def test_a_file_that_was_removed_or_replaced_is_written_no_more(path: str, suffix: str, is_replaced: bool) -> None:
    """SQLite would go on, and nobody would ever see it again; without its lock, somebody else may write it."""
    file = f"{path}{suffix}"
    with opened(path) as store:
        write(store, Batch(done=done("a")))
        os.rename(file, f"{file}-away")
        if is_replaced:
            shutil.copy(f"{file}-away", file)
        with pytest.raises(JournalError, match=rf"run\.db{suffix} was removed or replaced while a run wrote"):
            write(store, Batch(done=done("b")))
        os.replace(f"{file}-away", file)
        write(store, Batch(done=done("b")))
    assert states(path) == {"a": State.DONE, "b": State.DONE}


def test_a_side_file_that_cannot_be_written_leaves_no_row(path: str) -> None:
    os.mkdir(f"{path}-results")
    with opened(path) as store:
        with pytest.raises(JournalError, match=r"run\.db: "):
            write(store, Batch(done=done("b"), entries=[ended("a", State.DONE, "")._replace(large=LARGE)]))
        assert states(path) == {}
        write(store, Batch(done=done("b")))
        assert states(path) == {"b": State.DONE}


@pytest.mark.parametrize("status", [2**70, "\ud800", object()], ids=["too large", "no Unicode", "no value"])
def test_what_cannot_be_written_at_all_leaves_no_transaction_open(path: str, status: Any) -> None:
    """Nor is it told that it had: it could never be written, whatever is tried."""
    bad = ended("a", State.DEAD)
    with opened(path) as store:
        with pytest.raises(Exception):  # noqa: B017  # by whatever the interpreter says
            write(store, Batch(entries=[bad._replace(row=bad.row._replace(status=status))]))
        assert store._writer is not None
        assert not store._writer.in_transaction
        write(store, Batch(done=done("b")))
    assert states(path) == {"b": State.DONE}


def test_a_commit_that_fails_for_want_of_memory_is_rolled_back(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error of SQLite's or of the system's; the next try is as good as new."""

    def no_memory(_rows: object) -> list[object]:
        raise MemoryError

    with opened(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr("penstock.journal.store._with_checksums", no_memory)
            with pytest.raises(MemoryError):
                write(store, Batch(done=done("a"), entries=[ended("b", State.DEAD)]))
        write(store, Batch(done=done("c")))
    assert states(path) == {"c": State.DONE}


def test_the_end_of_a_run_that_cannot_be_recorded_is_told_and_the_lock_given_back(path: str) -> None:
    store = Store(Journal(path), FINGERPRINT)
    store.open()
    with locked(path, store), pytest.raises(JournalError, match="another process keeps it locked"):
        store.close(None, {})
    assert not is_held(path)
    with opened(path):
        assert rows(path, "SELECT stopped FROM run WHERE id = 1") == [("killed",)]


def test_a_journal_that_cannot_be_read_says_so(path: str) -> None:
    with opened(path) as store:
        change(path, "DROP TABLE step")
        with pytest.raises(JournalError, match=r"run\.db: cannot be used"):
            store.look_up(["a"], True)
        assert store.look_up(["a"], False) == ({}, {})


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE item SET result = '2'",
        "UPDATE item SET state = 2",
        "UPDATE item SET crc = crc + 1",
        "UPDATE item SET crc = NULL",
        "UPDATE item SET message = ''",
        "UPDATE item SET attempts = 'many', crc = -2",
        "UPDATE step SET result = NULL",
        "UPDATE step SET crc = crc + 1",
    ],
)
def test_a_row_that_is_damaged_is_told_by_its_key(path: str, damage: str) -> None:
    with opened(path) as store:
        write(store, Batch(done=done("the key"), steps=[step("the key")]))
        change(path, damage)
        with pytest.raises(JournalError, match=r"run\.db is damaged: the row of 'the key' does not match"):
            store.look_up(["the key", "another"], True)
        assert store.look_up(["another"], True) == ({}, {})


def test_what_is_known_has_the_number_of_its_row(shared: Store) -> None:
    """`Seen` remembers it by that."""
    store = emptied(shared)
    write(store, Batch(done=[*done("a"), *done("b")]))
    known, _ = store.look_up(["b", "a"], False)
    assert isinstance(known["a"], Known)
    assert known["b"].id == known["a"].id + 1
