"""Outcomes as rows, and rows as outcomes: nothing is lost that anybody needs, whatever the user's classes do."""

import http
import json
import pickle
import sqlite3
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.errors import (
    AttemptTimeout,
    CircuitOpen,
    ConnectionFailed,
    HttpStatusError,
    JobTimeout,
    NotJson,
    RecordedError,
    SkipItem,
    UsageError,
)
from penstock.journal.options import JSON, Codec, Journal
from penstock.journal.record import (
    FIRST_BYTES,
    LONGEST_TEXT,
    class_of,
    done_columns,
    intent_of,
    is_about,
    is_unknown,
    message_of,
    never_begun,
    read_value,
    recorded_error,
    replayed,
    row_of,
    runs_again,
    spent_of,
    write_input,
    write_value,
)
from penstock.journal.schema import INLINE_BYTES, ITEM_COLUMNS, TABLES, Row, State, checksum
from penstock.outcome import FailureKind, Outcome

LARGE = b"x" * (INLINE_BYTES + 1)


class Shown(str):
    """Text that shows itself as something else, as that of template engines does."""

    def __repr__(self) -> str:
        return "Shown()"


class Writes:
    """A codec that writes what it is told to."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def dumps(self, _value: Any) -> Any:
        if isinstance(self._data, Exception):
            raise self._data
        return self._data

    def loads(self, data: Any) -> Any:
        return data


class Evil(Exception):
    """Nothing of it can be had."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise LookupError(name)

    def __str__(self) -> str:
        raise LookupError("str")


class Hidden:
    def __repr__(self) -> str:
        raise LookupError("repr")


def done(value: Any = None, key: Any = 7) -> Outcome[Any]:
    return Outcome(key, {"id": 7}, value, None, None, 3, 0.25, 1.5)


def failed(error: BaseException, item: Any = None) -> Outcome[Any]:
    return Outcome(7, item, None, error, FailureKind.TRANSIENT, 3, 0.25, 1.5)


def row(outcome: Outcome[Any], codec: Codec = JSON) -> Row:
    return row_of(outcome, 7, 1, 100.0, None, None, codec).row


def with_status(status: Any) -> Exception:
    error = ValueError("bad")
    error.status = status  # type: ignore[attr-defined]
    return error


@pytest.fixture(scope="module")
def table() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in TABLES:
            connection.execute(statement)
        yield connection


def through(table: sqlite3.Connection, given: Row) -> Row:
    """The row as it comes back from a table: with the same checksum, or it would be called damaged."""
    table.execute("DELETE FROM item")
    marks = ", ".join("?" * len(given))
    table.execute(f"INSERT INTO item({', '.join(ITEM_COLUMNS)}) VALUES ({marks})", given)
    [columns] = table.execute(f"SELECT {', '.join(ITEM_COLUMNS)} FROM item").fetchall()
    found = Row(*columns)
    assert checksum(found) == checksum(given)
    return found


# --- values ---


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("x" * INLINE_BYTES, ("x" * INLINE_BYTES, None)),
        ("x" * (INLINE_BYTES + 1), ("", b"x" * (INLINE_BYTES + 1))),
        ("é" * (INLINE_BYTES // 2), ("é" * (INLINE_BYTES // 2), None)),
        ("é" * (INLINE_BYTES // 2) + "x", ("", "é".encode() * (INLINE_BYTES // 2) + b"x")),
        (b"x" * INLINE_BYTES, (b"x" * INLINE_BYTES, None)),
        (b"x" * (INLINE_BYTES + 1), (b"", b"x" * (INLINE_BYTES + 1))),
        ("", ("", None)),
        (b"", (b"", None)),
        (bytearray(b"ab"), (b"ab", None)),
        (memoryview(b"abc")[::2], (b"ac", None)),
        (Shown("ab"), ("ab", None)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else f"{type(value).__name__} {len(value)}",
)
def test_a_value_goes_into_the_row_if_its_bytes_fit(data: Any, expected: object) -> None:
    """As text or bytes of the plain type; beside a large one stands an empty one of its type."""
    found = write_value(Writes(data), None)
    assert found == expected
    assert type(found[0]) in (str, bytes)
    assert type(found[1]) in (bytes, type(None))


@pytest.mark.parametrize("codec", [JSON, json, pickle, orjson])
@pytest.mark.parametrize("value", [None, 0, "", {"a": [1, "é", None]}, "x" * INLINE_BYTES, ["é"] * INLINE_BYTES])
def test_a_value_comes_back_whatever_its_size(codec: Codec, value: Any) -> None:
    assert read_value(codec, *write_value(codec, value)) == value


def test_of_a_large_value_the_codec_gets_the_type_back_that_it_wrote() -> None:
    for data in ("x" * (INLINE_BYTES + 1), b"x" * (INLINE_BYTES + 1)):
        codec = Writes(data)
        found = read_value(codec, *write_value(codec, None))
        assert type(found) is type(data)
        assert found == data


@pytest.mark.parametrize(
    "data", [None, 5, [1, 2], "\ud800", "x" * INLINE_BYTES + "\ud800", KeyError("codec"), object()]
)
def test_what_a_codec_cannot_write_is_the_user_s_to_mend(data: Any) -> None:
    """Also what it writes as nothing that a file could hold: a number is not so many zeros."""
    with pytest.raises(UsageError, match=r"what it is cannot be recorded in the journal: .*Return what the journal's"):
        write_value(Writes(data), None, "what it is")
    assert write_input(Writes(data), "item") == (None, "'item'", None)


def test_json_that_contains_itself_cannot_be_recorded() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UsageError, match=r"what the job returned cannot be recorded in the journal: .*codec=pickle"):
        write_value(JSON, value)
    assert write_value(JSON, [1]) == ("[1]", None)


# --- inputs ---


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"id": "é\ud800"}, ('{"id":"\\u00e9\\ud800"}', None, None)),
        ({1, 2}, (None, "{1, 2}", None)),
        ("x" * 200_000, ("", None, b'"%s"' % (b"x" * 200_000))),
        ([b"x" * 20_000], (None, f"[b'{'x' * (LONGEST_TEXT - 3)}", None)),
        (Hidden(), (None, "<a Hidden that cannot be shown>", None)),
    ],
    ids=["JSON", "no JSON", "long", "long and shown", "hidden"],
)
def test_an_item_is_recorded_whole_or_else_as_text(item: Any, expected: object) -> None:
    assert write_input(JSON, item) == expected


def test_an_item_is_recorded_as_the_codec_writes_it() -> None:
    assert write_input(pickle, (1, 2)) == (pickle.dumps((1, 2)), None, None)
    assert write_input(Writes(bytearray(b"x")), 1) == (b"x", None, None)
    assert write_input(Writes(LARGE), 1) == (b"", None, LARGE)
    assert write_input(Writes("\ud800"), "\ud800") == (None, "'\\ud800'", None)


def test_a_large_input_goes_beside_the_file_where_there_is_no_result() -> None:
    for entry in (
        row_of(failed(ValueError("bad"), 1), 7, 1, 100.0, None, None, Writes(LARGE)),
        intent_of(1, 7, 1, 100.0, None, Writes(LARGE)),
    ):
        assert (entry.row.input, entry.row.shown_input, entry.row.result, entry.large) == (b"", None, None, LARGE)


# --- rows ---


def test_an_item_that_is_done_has_its_result_and_no_input() -> None:
    found, large = row_of(done(), "a", 4, 100.0, '{"usd":0.5}', ('"x"', None), JSON)
    assert large is None
    assert found == Row("a", State.DONE, 3, 4, 100.0, 0.25, 1.5, '{"usd":0.5}', '"x"')
    assert done_columns(done(), "a", 4, 100.0, '{"usd":0.5}', '"x"') == (*found[:9], checksum(found))
    assert spent_of(found) == {"usd": 0.5}
    assert spent_of(found._replace(spent=None)) == {}
    assert row_of(done(), "a", 4, 100.0, None, (b"", LARGE), JSON).large == LARGE
    assert row_of(done(), "a", 4, 100.0, None, None, JSON).row.result is None


def test_an_item_that_failed_has_its_input_and_what_is_known_of_the_error() -> None:
    error = HttpStatusError(422, "POST", "http://a/b", b"too long " * 1000)
    found = row(failed(error, {"id": 7}))
    assert found == Row(
        7, State.DEAD, 3, 1, 100.0, 0.25, 1.5, input='{"id":7}', kind="transient",
        error="penstock.errors.HttpStatusError", message=str(error), status=422,
        answer=(b"too long " * 1000)[:FIRST_BYTES],
    )  # fmt: skip


def test_an_item_that_was_skipped_has_why_and_no_input() -> None:
    found = row(Outcome(7, {"id": 7}, None, SkipItem("too old"), None, 0, 0.0, 0.0))
    assert (found.state, found.kind, found.input, found.message) == (State.SKIPPED, None, None, "too old")
    assert found.error == "penstock.errors.SkipItem"


def test_an_item_that_is_about_to_start_is_unknown_with_its_input() -> None:
    """And with what its earlier lives have spent: no death of a process makes that less."""
    found = intent_of({"id": 7}, 7, 2, 100.0, '{"usd": 1.5}', JSON).row
    assert found == Row(7, State.UNKNOWN, 0, 2, 100.0, 0.0, 0.0, '{"usd": 1.5}', input='{"id":7}')
    assert spent_of(found) == {"usd": 1.5}
    assert intent_of({7}, 7, 2, 100.0, None, JSON).row.shown_input == "{7}"


@pytest.mark.parametrize(
    ("error", "kind", "state"),
    [
        (JobTimeout("late"), FailureKind.TRANSIENT, State.UNKNOWN),
        (AttemptTimeout("late"), FailureKind.TRANSIENT, State.UNKNOWN),
        (ConnectionFailed("POST", "http://h", "reset"), FailureKind.TRANSIENT, State.UNKNOWN),
        (CancelledError(), FailureKind.CANCELLED, State.UNKNOWN),
        (ConnectionFailed("POST", "http://h", "refused", sent=False), FailureKind.TRANSIENT, State.DEAD),
        (HttpStatusError(503, "POST", "http://h"), FailureKind.TRANSIENT, State.DEAD),
        (CircuitOpen("http://h"), FailureKind.TRANSIENT, State.DEAD),
        (HttpStatusError(422, "POST", "http://h"), FailureKind.PERMANENT, State.DEAD),
        (KeyError("id"), FailureKind.BUG, State.DEAD),
        (SkipItem("too old"), None, State.SKIPPED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_with_intents_a_failure_without_an_answer_is_an_unknown_outcome(
    error: BaseException, kind: FailureKind | None, state: State
) -> None:
    """What the job has asked for may have happened. Not where nothing was sent, nor where an answer says what it was.

    Without intents nobody has asked to know.
    """
    outcome = Outcome(7, "item", None, error, kind, 1, 0.0, 0.0)
    found = row_of(outcome, 7, 1, 100.0, None, None, JSON, intents=True).row
    assert found.state == state
    assert (found.kind is None) == (state is not State.DEAD)
    assert found.error == class_of(error)
    assert is_unknown(found) == (state is State.UNKNOWN)
    if kind is not None:  # nobody asks again for what was skipped
        assert is_unknown(found._replace(state=State.RETRY)) == (state is State.UNKNOWN)
    plain = row_of(outcome, 7, 1, 100.0, None, None, JSON).row
    assert plain.state == (State.SKIPPED if kind is None else State.DEAD)


def odd_class(**names: Any) -> type[Exception]:
    return type("Odd", (Exception,), names)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (KeyError("x"), "KeyError"),
        (json.JSONDecodeError("x", "", 0), "json.decoder.JSONDecodeError"),
        (odd_class(__module__="somewhere", __qualname__="outer.<locals>.Odd")(), "somewhere.outer.<locals>.Odd"),
    ],
)
def test_an_error_s_class_is_told_with_its_module_unless_it_is_built_in(error: Exception, name: str) -> None:
    assert class_of(error) == name


@pytest.mark.parametrize(
    ("message", "expected"),
    [("", ""), ("a\nb\0", "a\nb\0"), ("\ud800", "\\ud800"), ("x" * 20_000, "x" * LONGEST_TEXT)],
    ids=["none", "lines", "no Unicode", "long"],
)
def test_a_message_is_recorded_in_bounds_and_as_unicode(message: str, expected: str) -> None:
    assert message_of(ValueError(message)) == expected
    assert message_of(ValueError(Shown(message))) == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (422, 422),
        (http.HTTPStatus.NOT_FOUND, 404),
        (True, 1),
        (2**31 - 1, 2**31 - 1),
        (2**31, None),
        (-(2**80), None),
        ("422", None),
        (4.5, None),
        (None, None),
    ],
)
def test_a_status_is_a_number_of_moderate_size_or_none(table: sqlite3.Connection, status: Any, expected: Any) -> None:
    """A plain number: of another class, the row would differ from its checksum when it comes back."""
    found = through(table, row(failed(with_status(status))))
    assert found.status == expected
    assert type(row(failed(with_status(status))).status) in (int, type(None))


@pytest.mark.parametrize(
    ("start", "expected"), [(b"a", b"a"), (bytearray(b"a"), b"a"), ("a", None), (b"", b""), (None, None)]
)
def test_the_answer_is_recorded_where_the_error_has_it_as_bytes(start: Any, expected: Any) -> None:
    error = ValueError("bad")
    error.body_start = start  # type: ignore[attr-defined]
    assert row(failed(error)).answer == expected


@pytest.mark.parametrize(
    "error",
    [
        Evil(),
        odd_class(__module__="\ud800")(),
        odd_class(__module__=None)(),
        odd_class(__qualname__="\udfff")(),
        odd_class(__qualname__=Shown("Odd"), __module__="builtins")(),
        odd_class(__str__=lambda _: Shown("text"))(),
        odd_class(status=property(lambda _: 1 / 0), body_start=property(lambda _: 1 / 0))(),
        NotJson("GET", "http://a", 200, "", b"\xff\0", "why"),
        BaseExceptionGroup("many", [KeyboardInterrupt(), ValueError("\ud800")]),
    ],
    ids=["evil", "module", "no module", "name", "shown name", "shown text", "properties", "not JSON", "group"],
)
def test_no_error_keeps_its_row_from_being_recorded(table: sqlite3.Connection, error: BaseException) -> None:
    """A row that the file cannot take would keep all others from it."""
    found = through(table, row(failed(error, Hidden())))
    assert found.state == State.DEAD
    again = recorded_error(found)
    assert again.failure_kind == FailureKind.TRANSIENT
    str(again)


# --- rows, and outcomes again ---

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SECONDS = st.floats(0, 1e12).map(lambda number: number + 0.0)
KEYS = st.text(max_size=8) | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=8)
MESSAGES = st.text(st.characters(exclude_categories=()), max_size=20)
ERRORS = st.builds(
    lambda error, message: error(message),
    st.sampled_from([ValueError, KeyError, UsageError, TimeoutError]),
    MESSAGES,
) | st.builds(HttpStatusError, st.integers(400, 599), st.just("GET"), MESSAGES, st.binary(max_size=20))


@given(value=JSON_VALUES, key=KEYS, attempts=st.integers(0, 2**40), waited=SECONDS, ran=SECONDS)
@example(value="x" * INLINE_BYTES, key="\0", attempts=0, waited=0.0, ran=0.0)
def test_a_value_that_is_recorded_is_replayed_as_it_was(
    table: sqlite3.Connection, value: Any, key: Any, attempts: int, waited: float, ran: float
) -> None:
    outcome = Outcome(key, "item", value, None, None, attempts, waited, ran)
    entry = row_of(outcome, key, 1, 100.0, None, write_value(JSON, value), JSON)
    found = through(table, entry.row)
    assert found.result is not None
    again = replayed(found, found.key, "item", read_value(JSON, found.result, entry.large))
    assert again == outcome._replace(replayed=True)
    assert again.ok


@given(error=ERRORS, kind=st.sampled_from(FailureKind), item=JSON_VALUES, attempts=st.integers(0, 9))
def test_a_failure_that_is_recorded_is_replayed_with_all_that_is_known_of_it(
    table: sqlite3.Connection, error: Exception, kind: FailureKind, item: Any, attempts: int
) -> None:
    outcome = Outcome(7, item, None, error, kind, attempts, 0.5, 1.5)
    found = through(table, row(outcome))
    again = replayed(found, 7, item, None)
    assert again._replace(error=None) == outcome._replace(error=None, replayed=True)
    assert isinstance(again.error, RecordedError)
    assert again.error.error == class_of(error)
    assert again.error.message == message_of(error)
    assert again.error.status == getattr(error, "status", None)
    assert again.error.answer == getattr(error, "body_start", None)
    assert found.input is not None
    assert json.loads(found.input) == item


@given(why=st.text(max_size=20))
def test_an_item_that_was_skipped_is_skipped_again_with_its_reason(table: sqlite3.Connection, why: str) -> None:
    outcome = Outcome(7, "item", None, SkipItem(why), None, 2, 0.5, 1.5)
    again = replayed(through(table, row(outcome)), 7, "item", None)
    assert isinstance(again.error, SkipItem)
    assert str(again.error) == why
    assert again._replace(error=None) == outcome._replace(error=None, replayed=True)


def test_an_unknown_outcome_is_a_failure_that_says_what_to_do() -> None:
    again = replayed(intent_of("item", 7, 1, 100.0, None, JSON).row, 7, "item", None)
    assert again.kind is FailureKind.PERMANENT
    assert isinstance(again.error, RecordedError)
    assert again.error.error == "OutcomeUnknown"
    assert "penstock retry --unknown" in again.error.message


def test_a_failure_of_which_little_is_known_is_permanent() -> None:
    """Another program may have written the row."""
    again = replayed(Row(7, State.DEAD, 1, 1, 100.0, 0.0, 0.0), 7, "item", None)
    assert again.kind is FailureKind.PERMANENT
    assert isinstance(again.error, RecordedError)
    assert again.error.args == ("", "", None, "permanent", None)


def test_an_unknown_outcome_stays_unknown_when_somebody_asks_for_the_item_again() -> None:
    """Unless its job never began, or its failure is known."""
    intent = intent_of("item", 7, 1, 100.0, None, JSON)
    unknown = intent.row
    again = State.RETRY.value
    assert is_unknown(unknown)
    assert is_unknown(unknown._replace(state=again))
    assert not is_unknown(never_begun(intent, unknown=False).row)
    assert is_unknown(never_begun(intent, unknown=True).row), "an earlier life did"
    assert not is_unknown(row(failed(ValueError("bad")))._replace(state=again))
    assert not is_unknown(row(failed(ValueError("bad"))))
    for unknown_before in (False, True):
        assert runs_again(never_begun(intent, unknown=unknown_before).row, Journal("x"))


# --- what is run again ---


def dead(**columns: Any) -> Row:
    known = {
        "kind": "transient",
        "error": "a.b.HttpStatusError",
        "message": "HTTP 503 for x\nsecond line",
        "status": 503,
    }
    return Row(7, State.DEAD, 1, 1, 100.0, 0.0, 0.0, **{**known, **columns})


STATES = {
    State.DONE: {"all"},
    State.SKIPPED: {"all"},
    State.DEAD: {"failed", "failed:transient", "all"},
    State.RETRY: {"missing", "failed", "failed:transient", "failed:KeyError", "all"},
    State.UNKNOWN: set(),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("resume", ["missing", "failed", "failed:transient", "failed:KeyError", "all"])
def test_state_and_resume_say_what_is_run_again(state: State, resume: str) -> None:
    """What is unknown is for `on_unknown` alone to say; what somebody has asked for is as good as missing."""
    assert runs_again(dead()._replace(state=state), Journal("x", resume=resume)) == (resume in STATES[state])
    again = runs_again(dead()._replace(state=state), Journal("x", resume=resume, on_unknown="rerun"))
    assert again == (resume in STATES[state] or state is State.UNKNOWN)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("transient", True),
        (" Transient ", True),
        ("HTTP 503", True),
        ("http 503", True),
        ("HTTP 50", True),  # in the text
        ("HTTP 404", False),
        ("HttpStatusError", True),
        ("a.b", True),
        ("httpstatuserror", False),
        ("for x", True),
        ("second line", False),
        ("permanent", False),
    ],
)
def test_a_failure_is_found_by_its_kind_its_status_or_the_first_line_of_its_error(which: str, expected: bool) -> None:
    assert is_about(dead(), which) is expected


def test_a_failure_without_a_status_is_found_by_none() -> None:
    assert not is_about(dead(status=None, message="bad"), "HTTP None")
    assert is_about(dead(status=None, message="bad"), "bad")
