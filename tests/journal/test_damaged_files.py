"""Whatever has become of a journal's files: a `JournalError` that names file and cure, or rows that are right.

200 files that are torn, cut off, bit-flipped, of another program, another format or another kind. Each is opened to
read, and to write, and all of its rows are read. A row whose checksum is right must be one that was written. Some of
them are given to a run, which must refuse them, or complete them.
"""

import gzip
import json
import random
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import penstock
from penstock.errors import JournalError
from penstock.journal import schema
from penstock.journal.database import explaining, open_to_read, open_to_write
from penstock.journal.lock import Lock
from penstock.journal.schema import Key, Row, State, StepRow

CURES = ("Restore", "restore", "Move", "move", "Upgrade", "Choose", "choose", "Undo", "Use the penstock", "remove it")
ROWS = 400
CASES_OF_A_KIND = 20
RUNS_OF_A_KIND = 4

Damage = Callable[[Path, random.Random], None]
Ways = tuple[tuple[str, Callable[[str], sqlite3.Connection]], ...]


class Originals(NamedTuple):
    """Two states of one journal, and one that was killed while it was written."""

    early: bytes
    late: bytes
    killed: bytes
    wal: bytes
    written: set[object]
    """All rows that were ever committed."""


def item(number: int, state: State, random: random.Random) -> Row:
    keys: tuple[Key, ...] = (f"item {number}", number, number + 0.5, f"item {number}".encode())
    return Row(
        key=keys[number % 4],
        state=state,
        attempts=random.randint(1, 9),
        run=1,
        recorded=1.7e9 + number,
        waited=random.random(),
        ran=random.random(),
        spent='{"usd": 0.002}' if number % 3 else None,
        result="é" * random.randint(0, 300) if state is State.DONE else None,
        input=f'{{"id": {number}}}'.encode() if state is State.DEAD else None,
        kind="permanent" if state is State.DEAD else None,
        status=422 if state is State.DEAD else None,
        answer=random.randbytes(100) if state is State.DEAD else None,
    )


def write(connection: sqlite3.Connection, numbers: range, state: State, random: random.Random) -> set[object]:
    """Commit rows in batches. Return them."""
    rows = [item(number, state, random) for number in numbers]
    steps = [StepRow(f"step {number}", "score", random.randbytes(16), "[1, 2]") for number in numbers]
    for start in range(0, len(rows), 50):
        connection.execute("BEGIN IMMEDIATE")
        for table, batch in (("item", rows[start : start + 50]), ("step", steps[start : start + 50])):
            columns = ", ".join((*type(batch[0])._fields, "crc"))
            marks = ", ".join("?" * (len(batch[0]) + 1))
            connection.executemany(
                f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({marks})",
                [(*row, schema.checksum(row)) for row in batch],
            )
        connection.execute("COMMIT")
    return {tuple(row) for row in (*rows, *steps)}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    path = str(tmp_path_factory.mktemp("originals") / "run.db")
    chance = random.Random(1)
    with closing(open_to_write(path, full_sync=False)) as connection:
        written = write(connection, range(ROWS), State.DEAD, chance)
    early = Path(path).read_bytes()
    with closing(open_to_write(path, full_sync=False)) as connection:
        # Some are run again, some are new.
        written |= write(connection, range(ROWS // 2, ROWS + 100), State.DONE, chance)
    late = Path(path).read_bytes()
    connection = open_to_write(path, full_sync=False)
    written |= write(connection, range(ROWS, ROWS + 200), State.SKIPPED, chance)
    # As after a kill: copied while it is open. No process opens a journal by itself whose locks it needs afterwards.
    killed, wal = (shutil.copy(name, f"{name}.copy") for name in (path, f"{path}-wal"))
    connection.close()
    return Originals(early, late, Path(killed).read_bytes(), Path(wal).read_bytes(), written)


def to_write(path: str) -> sqlite3.Connection:
    """As a run opens it."""
    lock = Lock(path)
    lock.take()
    try:
        return open_to_write(path, full_sync=False)
    finally:
        lock.release()


WAYS: Ways = (("read", open_to_read), ("write", to_write), ("read again", open_to_read))


def rows_of(path: str, opened: Callable[[str], sqlite3.Connection]) -> Iterator[tuple[Any, ...]]:
    """As every reader of a journal does it.

    Raises:
        JournalError: a row is damaged, among others.
    """
    with explaining(path), closing(opened(path)) as connection:
        for table, columns in (("item", schema.ITEM_COLUMNS), ("step", schema.STEP_COLUMNS)):
            for row in connection.execute(f"SELECT {', '.join(columns)}, crc FROM {table}"):
                if schema.checksum(row[:-1]) != row[-1]:
                    raise JournalError(f"{path}: a row of {table} is damaged. Restore it from a copy.")
                yield row[:-1]


def assert_it_helps(error: JournalError, path: str) -> None:
    message = str(error)
    assert message.startswith(path), message
    assert any(cure in message for cure in CURES), message


def endings(path: str, originals: Originals) -> list[str]:
    """How each way to open it ends. Anything but a JournalError is raised, a wrong row fails."""
    found = list[str]()
    for way, opened in WAYS:
        try:
            rows = list(rows_of(path, opened))
        except JournalError as error:
            assert_it_helps(error, path)
            found.append("refused")
        else:
            assert set(rows) <= originals.written, f"{way} gave rows that nobody has written"
            found.append("recovered")
    return found


# --- what becomes of files ---


def flip(content: bytes, chance: random.Random, bits: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(bits):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def torn(old: bytes, new: bytes, chance: random.Random, size: int) -> bytes:
    """Some blocks were written, some were not."""
    blocks = [
        new[start : start + size] if chance.random() < 0.5 else old[start : start + size] or bytes(size)
        for start in range(0, len(new), size)
    ]
    return b"".join(blocks)[: len(new)]


def damages(originals: Originals) -> dict[str, Damage]:
    early, late, killed, wal = originals[:4]

    def with_wal(path: Path, main: bytes, beside: bytes) -> None:
        path.write_bytes(main)
        Path(f"{path}-wal").write_bytes(beside)

    def foreign(path: Path, chance: random.Random) -> None:
        text = "".join(chance.choices("key,value\n", k=chance.randrange(1, 9000)))
        kinds = (
            b"\x89PNG\r\n\x1a\n" + chance.randbytes(5000),
            gzip.compress(late),
            text.encode(),
            chance.randbytes(chance.randrange(1, 20_000)),
            zlib.compress(late)[: chance.randrange(1, 600)],
            late[:16] + chance.randbytes(chance.randrange(1, 20_000)),
            b"\0" * chance.randrange(1, 20_000),
        )
        path.write_bytes(chance.choice(kinds))

    def other_database(path: Path, chance: random.Random) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA page_size = {chance.choice((512, 1024, 65536))}")
            connection.execute(f"PRAGMA application_id = {chance.choice((0, 1, schema.APPLICATION_ID))}")
            connection.execute(f"PRAGMA user_version = {chance.choice((0, schema.FORMAT, 99))}")
            connection.execute(
                chance.choice(("CREATE TABLE item(key)", "CREATE TABLE x(y)", "CREATE VIEW v AS SELECT 1"))
            )

    def changed_tables(path: Path, chance: random.Random) -> None:
        path.write_bytes(late)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(
                chance.choice(
                    (
                        "DROP TABLE step",
                        "ALTER TABLE item RENAME COLUMN state TO status_of_it",
                        "ALTER TABLE item ADD COLUMN note",
                        "ALTER TABLE run RENAME TO runs",
                        "CREATE INDEX mine ON item(state)",
                        f"PRAGMA user_version = {chance.randrange(schema.FORMAT + 1, 2**31)}",
                        f"PRAGMA user_version = {chance.randrange(-(2**31), schema.FORMAT)}",
                        f"PRAGMA application_id = {chance.randrange(2**31)}",
                    )
                )
            )

    def nothing_there(path: Path, chance: random.Random) -> None:
        kind = chance.randrange(5)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            with_wal(path, b"", wal)
        elif kind == 2:
            Path(f"{path}-wal").write_bytes(wal)
        elif kind == 3:
            path.touch()
            Path(schema.lock_of(str(path))).touch()
        else:
            path.symlink_to(path)

    return {
        "cut off": lambda path, chance: none(path.write_bytes(late[: chance.randrange(1, len(late))])),
        "a bit": lambda path, chance: none(path.write_bytes(flip(late, chance))),
        "bits": lambda path, chance: none(path.write_bytes(flip(late, chance, chance.choice((10, 100, 5000))))),
        "a bit of the header": lambda path, chance: none(path.write_bytes(flip(late[:100], chance) + late[100:])),
        "torn": lambda path, chance: none(path.write_bytes(torn(early, late, chance, chance.choice((512, 4096))))),
        "wal cut off": lambda path, chance: with_wal(path, killed, wal[: chance.randrange(1, len(wal))]),
        "wal with bits": lambda path, chance: with_wal(path, killed, flip(wal, chance, chance.choice((1, 10, 1000)))),
        "wal of another": lambda path, chance: with_wal(path, chance.choice((early, flip(late, chance))), wal),
        "foreign": foreign,
        "other": lambda path, chance: chance.choice((other_database, changed_tables, nothing_there))(path, chance),
    }


def none(_: object) -> None:
    """For functions that return more than is asked for."""


KINDS = tuple(damages(Originals(b"", b"", b"", b"", set())))


def test_the_originals_are_whole(originals: Originals, tmp_path: Path) -> None:
    """Or nothing would be tested below."""
    path = tmp_path / "run.db"
    path.write_bytes(originals.killed)
    Path(f"{path}-wal").write_bytes(originals.wal)
    assert endings(str(path), originals) == ["recovered"] * 3
    rows = list(rows_of(str(path), open_to_read))
    assert len(rows) == len(set(rows))
    assert sum(row[:1] == ("item 400",) and row[1] == State.SKIPPED for row in rows) == 1
    assert len(originals.wal) > 10 * 4096


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_journal_is_refused_or_read_right(kind: str, originals: Originals, tmp_path: Path) -> None:
    """Never another error, never a row that nobody wrote."""
    damage = damages(originals)[kind]
    seen = set[str]()
    for seed in range(CASES_OF_A_KIND):
        folder = tmp_path / str(seed)
        folder.mkdir()
        damage(folder / "run.db", random.Random(f"{kind} {seed}"))
        seen.update(endings(str(folder / "run.db"), originals))
    assert "refused" in seen or kind.startswith("wal")


@pytest.mark.parametrize("kind", ["wal cut off", "wal with bits"])
def test_a_damaged_wal_costs_its_last_commits_and_no_others(kind: str, originals: Originals, tmp_path: Path) -> None:
    """What had reached the file itself is there."""
    path = tmp_path / "run.db"
    path.write_bytes(originals.late)
    before = set(rows_of(str(path), open_to_read))
    for seed in range(CASES_OF_A_KIND):
        folder = tmp_path / str(seed)
        folder.mkdir()
        damages(originals)[kind](folder / "run.db", random.Random(f"{kind} {seed}"))
        rows = set(rows_of(str(folder / "run.db"), open_to_read))
        replaced = {row for row in before if row not in rows}
        assert {row[0] for row in replaced} <= {row[0] for row in rows}


# --- a run ---


def value_of(number: int) -> str:
    return "é" * (number % 300)


async def job(number: int) -> str:
    if number % 10 == 9:
        raise ValueError(number)
    return value_of(number)


def number_of(number: int) -> int:
    return number


@pytest.fixture(scope="module")
def originals_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """As above, by the library's own runs, for the damages to work on."""
    path = str(tmp_path_factory.mktemp("runs") / "run.db")
    penstock.run(job, range(ROWS), key=number_of, journal=path)
    early = Path(path).read_bytes()
    penstock.run(job, range(ROWS + 100), key=number_of, journal=path)
    late = Path(path).read_bytes()
    penstock.run(job, range(ROWS + 200), key=number_of, journal=path)
    killed = Path(path).read_bytes()
    with closing(open_to_write(path, full_sync=False)) as connection:
        # Commits to most of its pages that a killed process has not brought into the file; no row says anything else.
        connection.execute("UPDATE item SET id = id + 10000 WHERE id > 300")
        wal = shutil.copy(f"{path}-wal", f"{path}-wal.copy")
    return Originals(early, late, killed, Path(wal).read_bytes(), set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_refuses_a_damaged_journal_or_completes_it(
    kind: str, originals_of_a_run: Originals, tmp_path: Path
) -> None:
    """Then it holds each item once, with the result that belongs to it."""
    damage = damages(originals_of_a_run)[kind]
    for seed in range(RUNS_OF_A_KIND):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = str(folder / "run.db")
        damage(folder / "run.db", random.Random(f"{kind} {seed}"))
        try:
            report = penstock.run(job, range(ROWS + 200), key=number_of, journal=path)
        except JournalError as error:
            assert_it_helps(error, path)
            continue
        assert (report.done, report.failed) == (540, 60)
        items = [Row(*row) for row in rows_of(path, open_to_read) if len(row) == len(Row._fields)]
        assert sorted(row.key for row in items) == list(range(ROWS + 200))  # type: ignore[type-var]
        for row in items:
            assert isinstance(row.key, int)
            expected = None if row.key % 10 == 9 else value_of(row.key)
            assert row.result is None if expected is None else json.loads(row.result or "") == expected
