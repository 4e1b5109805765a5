"""The rows of a journal, and the checksums that find what SQLite would not notice."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from penstock.journal.schema import (
    DONE_COLUMNS,
    ITEM_COLUMNS,
    STEP_COLUMNS,
    TABLES,
    Row,
    State,
    StepRow,
    checksum,
    checksum_of_done,
    lock_of,
    side_file_of,
)

TEXT = st.text(max_size=10)
BYTES = st.binary(max_size=10)
WHOLE = st.integers(-(2**63), 2**63 - 1)
REAL = st.floats(allow_nan=False)
VALUE = TEXT | BYTES
# `+ 0.0`: a key is never recorded with the sign of a zero, which SQLite does not keep.
KEY = TEXT | BYTES | WHOLE | REAL.map(lambda number: number + 0.0)
SECONDS = st.floats(0, allow_infinity=False).map(lambda number: number + 0.0)

ROWS = st.builds(
    Row,
    key=st.none() | KEY,
    state=st.sampled_from([int(state) for state in State]),
    attempts=WHOLE,
    run=WHOLE,
    recorded=SECONDS,
    waited=SECONDS,
    ran=SECONDS,
    spent=st.none() | TEXT,
    result=st.none() | VALUE,
    file_offset=st.none() | WHOLE,
    file_size=st.none() | WHOLE,
    file_crc=st.none() | WHOLE,
    input=st.none() | VALUE,
    shown_input=st.none() | TEXT,
    kind=st.none() | TEXT,
    error=st.none() | TEXT,
    message=st.none() | TEXT,
    status=st.none() | WHOLE,
    answer=st.none() | BYTES,
)
STEPS = st.builds(
    StepRow,
    key=KEY,
    name=TEXT,
    arguments=BYTES,
    result=st.none() | VALUE,
    file_offset=st.none() | WHOLE,
    file_size=st.none() | WHOLE,
    file_crc=st.none() | WHOLE,
)
COLUMN = st.none() | TEXT | BYTES | WHOLE | st.floats()
"""What SQLite may hold in any of them."""


@pytest.fixture(scope="module")
def tables() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in TABLES:
            connection.execute(statement)
        yield connection


def through(connection: sqlite3.Connection, table: str, row: tuple[Any, ...], columns: tuple[str, ...]) -> Any:
    """The row as it comes back."""
    connection.execute(f"DELETE FROM {table}")
    marks = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table}({', '.join(columns)}) VALUES ({marks})", row)
    [found] = connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    return found


@given(ROWS)
@example(row=Row("", 1, 0, 0, 0.0, 0.0, 0.0))
@example(row=Row(b"", 2, 0, 0, 0.0, 0.0, 0.0, answer=b"", message="\0", status=0))
@example(row=Row(1.0, 1, 0, 0, 0.0, 1e300, 5e-324))
def test_a_row_has_the_same_checksum_when_it_comes_back(tables: sqlite3.Connection, row: Row) -> None:
    found = Row(*through(tables, "item", row, ITEM_COLUMNS))
    assert found == row
    assert checksum(found) == checksum(row)


@given(STEPS)
def test_a_step_has_the_same_checksum_when_it_comes_back(tables: sqlite3.Connection, row: StepRow) -> None:
    found = StepRow(*through(tables, "step", row, STEP_COLUMNS))
    assert found == row
    assert checksum(found) == checksum(row)


def looks_same(one: Any, other: Any) -> bool:
    """Whether nothing tells them apart, not even their types or signs."""
    return type(one) is type(other) and repr(one) == repr(other)


@given(row=ROWS, name=st.sampled_from(ITEM_COLUMNS), value=COLUMN)
@example(row=Row("a", 1, 1, 1, 1.0, 1.0, 1.0, result="1"), name="result", value=b"1")
@example(row=Row("a", 1, 1, 1, 1.0, 1.0, 1.0, result="1"), name="result", value=None)
@example(row=Row("a", 1, 1, 1, 1.0, 1.0, 1.0, result="1"), name="result", value="")
@example(row=Row(1, 1, 1, 1, 1.0, 1.0, 1.0), name="key", value=1.0)
@example(row=Row(1, 1, 1, 1, 1.0, 1.0, 1.0), name="key", value="1")
@example(row=Row(1, 1, 1, 1, 1.0, 1.0, 1.0), name="answer", value=b"")
@example(row=Row(1, 1, 1, 1, 1.0, 1.0, 1.0), name="state", value=None)
@example(row=Row(1, 1, 1, 1, 1.0, 1.0, 1.0), name="ran", value="1.0")
@example(row=Row(1, 1, 1, 1, 1.0, 1.0, 1.0), name="attempts", value=2**63 - 1)
def test_a_change_of_any_column_of_an_item_is_found(row: Row, name: str, value: Any) -> None:
    was = getattr(row, name)
    # A whole number in the column of a real one is stored as a real one.
    if name in ("recorded", "waited", "ran") and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    assume(not looks_same(was, value))
    assert checksum(row._replace(**{name: value})) != checksum(row)


@given(row=STEPS, name=st.sampled_from(STEP_COLUMNS), value=COLUMN)
@example(row=StepRow("a", "b", b"", "1"), name="result", value=b"1")
@example(row=StepRow("a", "b", b"", "1"), name="file_offset", value=0)
def test_a_change_of_any_column_of_a_step_is_found(row: StepRow, name: str, value: Any) -> None:
    assume(not looks_same(getattr(row, name), value))
    assert checksum(row._replace(**{name: value})) != checksum(row)


@given(row=ROWS, one=st.integers(7, 18), other=st.integers(7, 18))
def test_what_has_moved_to_another_column_is_found(row: Row, one: int, other: int) -> None:
    columns: list[Any] = list(row)
    columns[one], columns[other] = columns[other], columns[one]
    assume(not looks_same(columns[one], columns[other]))
    assert checksum(Row(*columns)) != checksum(row)


@given(row=ROWS, place=st.integers(0, 40), bit=st.integers(0, 7))
def test_a_bit_that_has_turned_within_a_value_is_found(row: Row, place: int, bit: int) -> None:
    data = bytearray(bytes(range(41)))
    whole = row._replace(result=bytes(data))
    data[place] ^= 1 << bit
    assert checksum(row._replace(result=bytes(data))) != checksum(whole)


@given(
    key=KEY, attempts=WHOLE, run=WHOLE, recorded=SECONDS, waited=SECONDS, ran=SECONDS, spent=st.none() | TEXT,
    result=VALUE,
)  # fmt: skip
@example(key="", attempts=0, run=0, recorded=0.0, waited=0.0, ran=0.0, spent=None, result="")
def test_an_item_that_is_done_has_the_checksum_of_its_row(
    key: str | bytes | int | float, attempts: int, run: int, recorded: float, waited: float, ran: float,
    spent: str | None, result: str | bytes,
) -> None:  # fmt: skip
    row = Row(key, State.DONE.value, attempts, run, recorded, waited, ran, spent, result)
    assert checksum_of_done(key, attempts, run, recorded, waited, ran, spent, result) == checksum(row)


@pytest.mark.parametrize("number", [None, "1", 1.5, b"1", 2**63])
def test_a_row_whose_numbers_are_none_has_the_checksum_of_no_row(number: Any) -> None:
    """Which is none that could be recorded: those are of 32 bits without a sign."""
    assert checksum((1, number, 1, 1, 1.0, 1.0, 1.0, *[None] * 12)) == -1


def test_a_checksum_is_the_same_in_any_process() -> None:
    """Written down once, as files are written that outlive a process and a version of Python."""
    row = Row("\u00e9\U0001f600", 2, 3, 4, 5.5, 0.1, 1e-9, '{"usd":0.1}', None, message="\0\n'\"", answer=b"\xff")
    step = StepRow(7, "score", b"\x00\x01", '"x"')
    assert (checksum(row), checksum(step)) == (ROW_CHECKSUM, STEP_CHECKSUM)
    program = (
        "from penstock.journal.schema import *\n"
        f"print(checksum(Row(*{tuple(row)!r})), checksum(StepRow(*{tuple(step)!r})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True, env=environment)
    assert told.stdout.split() == [str(ROW_CHECKSUM).encode(), str(STEP_CHECKSUM).encode()]


ROW_CHECKSUM = 852960481
STEP_CHECKSUM = 1113453877


def test_what_has_no_large_result_is_at_the_beginning_of_a_row() -> None:
    assert ITEM_COLUMNS[: len(DONE_COLUMNS)] == DONE_COLUMNS
    assert DONE_COLUMNS[-1] == "result"
    row = Row("a", 1, 1, 1, 1.0, 1.0, 1.0)
    assert set(row[len(DONE_COLUMNS) :]) == {None}


def test_the_tables_have_the_columns_of_the_rows(tables: sqlite3.Connection) -> None:
    """And a checksum for each."""
    item = [name for _, name, *_ in tables.execute("PRAGMA table_info(item)")]
    step = [name for _, name, *_ in tables.execute("PRAGMA table_info(step)")]
    assert item == ["id", *ITEM_COLUMNS, "crc"]
    assert step == [*STEP_COLUMNS, "crc"]


def test_neighbours_stand_beside_the_file(tmp_path: Any) -> None:
    path = str(tmp_path.resolve() / "run.db")
    assert side_file_of(path) == f"{path}-results"
    assert lock_of(path) == f"{path}-lock"
