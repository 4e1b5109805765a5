"""Outcomes as rows, and rows as outcomes. Decides only: no I/O.

    Outcome -> Row, and what is too large for it -> writer
    Row -> Outcome with `replayed=True` -> stream

A result that the codec cannot write is a failure of its item, since nobody could resume from it.
"""

from json import loads
from typing import Any, NamedTuple

from penstock.errors import RecordedError, SkipItem, UsageError, status_of
from penstock.journal.options import Codec, Journal
from penstock.journal.schema import INLINE_BYTES, Key, Row, State, checksum_of_done
from penstock.outcome import FailureKind, Outcome

LONGEST_TEXT = 10_000
"""Characters of an error's message, or of an item that is shown. Arbitrary, because: more than a person reads."""
FIRST_BYTES = 4_096
"""Of the last answer. Arbitrary, because: clients keep fewer as a rule."""


_DONE = State.DONE.value


class Entry(NamedTuple):
    """A row to be written, and what goes into the side file for it."""

    row: Row
    large: bytes | None = None
    """The result as bytes, where it is too large for a row: then `row.result` is empty, but of the codec's type."""


def write_value(codec: Codec, value: Any) -> tuple[str | bytes, bytes | None]:
    """The value as the codec writes it: for the row, and for the side file if it is too large for a row.

    Raises:
        UsageError: the codec cannot write it.
    """
    try:
        data = _plain(codec.dumps(value))
        if isinstance(data, bytes):
            return (data, None) if len(data) <= INLINE_BYTES else (b"", data)
        if data.isascii() and len(data) <= INLINE_BYTES:
            return data, None
        encoded = data.encode()  # refuses what is no Unicode
        return (data, None) if len(encoded) <= INLINE_BYTES else ("", encoded)
    except Exception as error:
        raise UsageError(
            f"what the job returned cannot be recorded in the journal: {type(error).__name__}: {error}. Return what "
            f"can be JSON, or give the journal a codec: `penstock.Journal(path, codec=pickle)`."
        ) from error


def _plain(data: object) -> str | bytes:
    """What a codec wrote, of the very type that comes back from the file: the checksum is of what is stored.

    Raises:
        TypeError: neither text nor bytes.
    """
    if type(data) is str:
        return data
    if isinstance(data, str):
        return str.__str__(data)
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(memoryview(data))
    raise TypeError(f"the codec's dumps() returned a {type(data).__name__}, expected text or bytes")


def read_value(codec: Codec, result: str | bytes, large: bytes | None) -> Any:
    """The value again. `large` is what the side file holds of it."""
    if large is not None:
        return codec.loads(large.decode() if isinstance(result, str) else large)
    return codec.loads(result)


def done_columns(
    outcome: Outcome[Any], key: Key, run: int, now: float, spent: str | None, result: str | bytes
) -> tuple[Any, ...]:
    """The row of an item that is done and whose result fits into it, as far as there is something in it: `DONE_COLUMNS`
    and the checksum. One of these is made for every item."""
    attempts, waited, ran = outcome.attempts, outcome.waited, outcome.ran
    crc = checksum_of_done(key, attempts, run, now, waited, ran, spent, result)
    return key, _DONE, attempts, run, now, waited, ran, spent, result, crc


def row_of(
    outcome: Outcome[Any], key: Key | None, run: int, now: float, spent: str | None, result: str | bytes | None,
    codec: Codec,
) -> Row:  # fmt: skip
    """The row of an outcome; `result` is its value as `write_value` gives it for the row."""
    error = outcome.error
    if error is None:
        return Row(key, _DONE, outcome.attempts, run, now, outcome.waited, outcome.ran, spent, result)
    state = State.SKIPPED if isinstance(error, SkipItem) else State.DEAD
    given, shown = (None, None) if state is State.SKIPPED else write_input(codec, outcome.input)
    return Row(
        key, state.value, outcome.attempts, run, now, outcome.waited, outcome.ran, spent,
        input=given, shown_input=shown, kind=None if outcome.kind is None else outcome.kind.value,
        error=class_of(error), message=message_of(error), status=_small(status_of(error)), answer=_answer_of(error),
    )  # fmt: skip


def intent_of(item: Any, key: Key, run: int, now: float, codec: Codec) -> Row:
    """The row of an item that is about to be started."""
    given, shown = write_input(codec, item)
    return Row(key, State.UNKNOWN.value, 0, run, now, 0.0, 0.0, input=given, shown_input=shown)


def write_input(codec: Codec, item: Any) -> tuple[str | bytes | None, str | None]:
    """An item as the codec writes it, or else as text. Never raises: a dead letter without its input is one still."""
    try:
        data = _plain(codec.dumps(item))
        if isinstance(data, str):
            data.encode()  # refuses what is no Unicode
        return data, None
    except Exception:  # noqa: BLE001  # a codec is the user's, and so is a repr
        return None, _shown(item)


def _shown(item: Any) -> str:
    try:
        return _text(repr(item))
    except Exception:  # noqa: BLE001  # the user's class
        return f"<a {type(item).__name__} that cannot be shown>"


def class_of(error: BaseException) -> str:
    """Class of an error, with its module unless it is a built-in one."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def message_of(error: BaseException) -> str:
    """An error's message, in bounds."""
    try:
        return _text(str(error))
    except Exception:  # noqa: BLE001  # the user's class
        return "<its __str__ raised an error>"


def _text(text: str) -> str:
    """As the database takes it: in bounds, and Unicode."""
    return text[:LONGEST_TEXT].encode("utf-8", "backslashreplace").decode()


def _small(status: int | None) -> int | None:
    return int(status) if status is not None and abs(status) < 1 << 31 else None


def _answer_of(error: BaseException) -> bytes | None:
    try:
        start = getattr(error, "body_start", None)
        return bytes(start[:FIRST_BYTES]) if isinstance(start, bytes | bytearray) else None
    except Exception:  # noqa: BLE001  # a property of the user's
        return None


def recorded_error(row: Row) -> RecordedError:
    """The error of a row that is dead or unknown, as far as it is recorded."""
    if row.state == State.UNKNOWN:
        why = (
            "it was started by a run that ended in the middle of it, so nobody knows what it has done. Look at the "
            'service, then run it again: Journal(on_unknown="rerun"), or `penstock retry --unknown`'
        )
        return RecordedError("OutcomeUnknown", why, None, FailureKind.PERMANENT)
    kind = FailureKind(row.kind) if row.kind is not None else FailureKind.PERMANENT
    return RecordedError(row.error or "", row.message or "", row.status, kind, row.answer)


def replayed(row: Row, key: Any, item: Any, value: Any) -> Outcome[Any]:
    """The outcome of a recorded item; `value` is what is recorded of it, decoded or left out."""
    if row.state == State.DONE:
        return Outcome(key, item, value, None, None, row.attempts, row.waited, row.ran, True)
    if row.state == State.SKIPPED:
        return Outcome(key, item, None, SkipItem(row.message), None, row.attempts, row.waited, row.ran, True)
    error = recorded_error(row)
    return Outcome(key, item, None, error, FailureKind(error.failure_kind), row.attempts, row.waited, row.ran, True)


def spent_of(row: Row) -> dict[str, float]:
    """What the job spent, by unit."""
    return {} if row.spent is None else dict(loads(row.spent))


def runs_again(row: Row, options: Journal) -> bool:
    """Whether an item that has this row is run."""
    if row.state == State.RETRY:
        return True
    if row.state == State.UNKNOWN:
        return options.on_unknown == "rerun"
    if options.resume == "all":
        return True
    if row.state != State.DEAD or options.resume == "missing":
        return False
    _, _, which = options.resume.partition(":")
    return not which or is_about(row, which)


def is_about(row: Row, which: str) -> bool:
    """Whether a failure is of that kind ("transient"), of that status ("HTTP 422"), or has it in its error's text."""
    which = which.strip()
    if which.lower() == row.kind or which.upper() == f"HTTP {row.status}":
        return True
    return which in f"{row.error}: {row.message}".partition("\n")[0]
