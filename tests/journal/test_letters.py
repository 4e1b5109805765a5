"""What a program reads out of a journal: results; and dead letters, with all that is known of them."""

import json
import pickle
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import JournalError
from penstock.journal.database import open_to_write
from penstock.journal.letters import DeadLetter, dead, results
from penstock.journal.schema import INLINE_BYTES, ITEM_COLUMNS, Row, checksum, side_file_of
from penstock.journal.side_file import SideFile
from penstock.outcome import FailureKind

RECORDED = 1_767_225_600.25


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


def record(path: str, rows: Iterable[Row]) -> None:
    """As runs do, by the same keys too."""
    with closing(open_to_write(path, full_sync=False)) as connection:
        connection.execute("INSERT INTO run(started) VALUES (?)", (RECORDED,))
        for row in rows:
            marks = ", ".join("?" * (len(row) + 1))
            columns = ", ".join((*ITEM_COLUMNS, "crc"))
            connection.execute(f"INSERT OR REPLACE INTO item({columns}) VALUES ({marks})", (*row, checksum(row)))


def failed(key: str | None, input: str | bytes | None, **more: Any) -> Row:
    told = {"kind": "permanent", "error": "ValueError", "message": "no", "input": input}
    return Row(key, 2, 4, 1, RECORDED, 1.0, 2.0)._replace(**(told | more))


def test_a_dead_letter_holds_all_that_is_known(path: str) -> None:
    """The item itself, the failure as it was classified, and what the service said; also without a usable key."""
    refused = failed(None, '{"id": "ø"}', error="penstock.errors.HttpStatusError", status=422, answer=b"\x00no")
    record(path, [refused])
    assert list(dead(path)) == [
        DeadLetter(
            key=None,
            state="dead",
            input={"id": "ø"},
            error="penstock.errors.HttpStatusError",
            kind=FailureKind.PERMANENT,
            message="no",
            status=422,
            attempts=4,
            answer=b"\x00no",
            recorded=RECORDED,
        )
    ]


def test_items_whose_outcome_is_unknown_are_among_them(path: str) -> None:
    """They have no error, no kind and no answer. What is done or skipped is no dead letter."""
    finished = [Row("done", 1, 1, 1, RECORDED, 0.0, 0.0, result="1"), Row("skipped", 3, 1, 1, RECORDED, 0.0, 0.0)]
    record(path, [*finished, Row("b", 0, 0, 1, RECORDED, 0.0, 0.0, input="[1]")])
    assert list(dead(Path(path))) == [DeadLetter("b", "unknown", [1], "", None, "", None, 0, b"", RECORDED)]


def test_an_item_that_the_codec_could_not_write_is_shown_and_not_given(path: str) -> None:
    """Who sends dead letters again must not send its text."""
    record(path, [failed("a", None, shown_input="{1, 2}")])
    (letter,) = dead(path)
    assert (letter.input, letter.shown_input) == (None, "{1, 2}")


def test_inputs_are_read_by_the_codec_that_wrote_them(path: str) -> None:
    """Another one is refused; the letters before it have been delivered."""
    record(path, [failed("a", "[1]"), failed("b", pickle.dumps({1, 2}))])
    letters = dead(path)
    assert next(letters).input == [1]
    with pytest.raises(JournalError, match=r"input of 'b' cannot be read by this codec"):
        next(letters)
    record(path, [failed("a", pickle.dumps([1]))])
    assert [letter.input for letter in dead(path, codec=pickle)] == [{1, 2}, [1]]


def test_a_large_input_comes_from_the_side_file(path: str) -> None:
    """As a small one does from its row."""
    item = "x" * INLINE_BYTES
    file = SideFile(side_file_of(path))
    offset, size, crc = file.append(json.dumps(item).encode())
    file.close()
    record(path, [failed("a", "", file_offset=offset, file_size=size, file_crc=crc)])
    assert [letter.input for letter in dead(path)] == [item]


def test_results_are_those_of_items_that_are_done(path: str) -> None:
    """Key and value, as the codec reads it, in the order in which they were recorded; of nothing else."""
    rows = [Row(key, 1, 1, 1, RECORDED, 0.0, 0.0, result=result) for key, result in (("b", "[1]"), (7, "null"))]
    record(path, [*rows, failed("a", "1"), Row("s", 3, 1, 1, RECORDED, 0.0, 0.0)])
    assert list(results(path)) == [("b", [1]), (7, None)]


def test_results_are_read_by_the_codec_that_wrote_them(path: str) -> None:
    """Another one is refused; what came before it has been delivered."""
    written: list[tuple[str, str | bytes]] = [("a", pickle.dumps({1, 2})), ("b", "7")]
    record(path, [Row(key, 1, 1, 1, RECORDED, 0.0, 0.0, result=result) for key, result in written])
    found = results(Path(path), codec=pickle)
    assert next(found) == ("a", {1, 2})
    with pytest.raises(JournalError, match=r"result of 'b' cannot be read by this codec"):
        next(found)


def test_a_kind_that_is_not_known_here_is_none(path: str) -> None:
    """As a later version may have one."""
    record(path, [failed("a", "1", kind="exotic")])
    (letter,) = dead(path)
    assert letter.kind is None


def test_a_missing_file_is_told_at_the_first_letter(tmp_path: Path) -> None:
    """Not before: nothing is opened that nobody may read."""
    letters = dead(tmp_path / "run.db")
    with pytest.raises(JournalError, match="does not exist"):
        next(letters)
