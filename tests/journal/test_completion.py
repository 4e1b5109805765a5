"""The completion report and its lines: one for each item, in two formats that programs can read back."""

import csv
import io
import json
from base64 import b64decode
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import JournalError, UsageError
from penstock.journal.completion import COLUMNS, write_completion
from penstock.journal.database import open_to_write
from penstock.journal.lines import Lines
from penstock.journal.schema import ITEM_COLUMNS, Row, State, checksum

RECORDED = 1_767_225_600.25
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def record(path: str, rows: Iterable[Row]) -> None:
    """As runs do, by the same keys too."""
    with closing(open_to_write(path, full_sync=False)) as connection:
        connection.execute("INSERT INTO run(started) VALUES (?)", (RECORDED,))
        for row in rows:
            marks = ", ".join("?" * (len(row) + 1))
            columns = ", ".join((*ITEM_COLUMNS, "crc"))
            connection.execute(f"INSERT OR REPLACE INTO item({columns}) VALUES ({marks})", (*row, checksum(row)))


def completion(path: str, format: str) -> tuple[int, str]:
    file = io.StringIO(newline="")
    number = write_completion(path, file, format)
    return number, file.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "run.db")
    dead = {"kind": "permanent", "error": "ValueError", "message": 'a "b",\r\n\u2028', "status": 422}
    rows = [Row(state.name, int(state), 1, 1, RECORDED, 0.0, 0.0) for state in State]
    record(path, [*rows, Row("=1+1", 2, 3, 1, RECORDED, 0.0, 0.0, **dead), Row(b"a\xff", 1, 1, 1, RECORDED, 0.0, 0.0)])  # type: ignore[arg-type]
    return path


def test_each_item_has_its_line_of_json(path: str) -> None:
    """Whatever its state is, with the fields that are known."""
    number, text = completion(path, "jsonl")
    lines = [json.loads(line) for line in text.splitlines()]
    assert number == len(lines) == len(State) + 2
    assert {line["state"] for line in lines} == {"unknown", "done", "dead", "skipped", "retry"}
    assert lines[-2] == {
        "key": "=1+1", "state": "dead", "attempts": 3, "kind": "permanent", "error": "ValueError", "status": 422,
        "message": 'a "b",\r\n\u2028', "run": 1, "recorded": "2026-01-01T00:00:00.250Z",
    }  # fmt: skip
    assert b64decode(lines[-1]["key_base64"]) == b"a\xff"
    assert "key" not in lines[-1]


def test_each_item_has_its_line_of_csv(path: str) -> None:
    """With a header; line breaks within a message do not break a line, and nothing is changed in a cell."""
    number, text = completion(path, "csv")
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert tuple(header) == COLUMNS
    assert number == len(rows)
    dead = dict(zip(header, rows[-2], strict=True))
    assert (dead["key"], dead["message"], dead["status"]) == ("=1+1", 'a "b",\r\n\u2028', "422")
    assert rows[-1][:2] == ["", "Yf8="]


def test_an_item_without_a_usable_key_has_a_line_too(tmp_path: Path) -> None:
    """Key null in JSON, and nothing in CSV."""
    path = str(tmp_path / "run.db")
    record(path, [Row(None, 2, 1, 1, RECORDED, 0.0, 0.0)])
    assert json.loads(completion(path, "jsonl")[1])["key"] is None
    assert completion(path, "csv")[1].splitlines()[1].startswith(",,dead,1,")


def test_another_format_is_refused(path: str) -> None:
    """Before a line is written."""
    with pytest.raises(UsageError, match="expected 'csv' or 'jsonl'"):
        completion(path, "xml")


def test_a_journal_that_cannot_be_read_has_no_report(tmp_path: Path) -> None:
    """Not even a header."""
    file = io.StringIO()
    with pytest.raises(JournalError):
        write_completion(tmp_path / "none.db", file)
    assert file.getvalue() == ""


# --- lines ---


@given(key=st.one_of(TEXT, st.binary()), value=st.recursive(st.none() | st.integers() | TEXT, st.lists))
def test_what_is_written_can_be_read_back(key: str | bytes, value: Any) -> None:
    """From both formats, the type of the key too; a line of JSON is one by any definition of a line."""
    for format in ("csv", "jsonl"):
        file = io.StringIO(newline="")
        lines = Lines(file, format, ("key", "key_base64", "value"), anything=("value",))
        lines.write({"key": key, "value": value})
        text = file.getvalue()
        if format == "csv":
            (found,) = csv.DictReader(io.StringIO(text, newline=""))
            assert json.loads(found["value"]) == value
        else:
            assert text.isascii()
            assert len(text.splitlines()) == 1
            found = json.loads(text)
            assert found["value"] == value
        told = b64decode(found["key_base64"]) if found.get("key_base64") else found.get("key")
        assert told == key or (not key and not told)


def test_a_value_that_is_bytes_is_base64_in_a_field_of_its_own() -> None:
    """The field without the suffix is empty in CSV."""
    file = io.StringIO(newline="")
    Lines(file, "csv", ("value", "value_base64"), anything=("value",)).write({"value": b"a"})
    assert file.getvalue().splitlines()[1] == ",YQ=="
