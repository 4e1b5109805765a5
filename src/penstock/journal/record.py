"""Outcomes as rows, and rows as outcomes. Decides only: no I/O.

    Outcome -> Row, and what is too large for it -> writer
    Row -> Outcome with `replayed=True` -> stream

A result that the codec cannot write is a failure of its item, since nobody could resume from it.
"""

from json import loads
from typing import Any, NamedTuple, TypeAlias

from penstock.errors import CircuitOpen, RecordedError, SkipItem, UsageError, status_of
from penstock.journal.options import JSON, Codec, Journal
from penstock.journal.schema import INLINE_BYTES, Key, Row, State, checksum_of_done
from penstock.outcome import FailureKind, Outcome, provably_unsent

LONGEST_TEXT = 10_000
"""Characters of an error's message, or of an item that is shown. Arbitrary, because: more than a person reads."""
FIRST_BYTES = 4_096
"""Of the last answer. Arbitrary, because: clients keep fewer as a rule."""


_DONE = State.DONE.value
_NEVER_BEGUN = "it was about to begin"


class Entry(NamedTuple):
    """A row to be written, and what goes into the side file for it."""

    row: Row
    large: bytes | None = None
    """The result, or the input of an item that has none, where it is too large for a row: there it is empty then, but
    of the type that the codec wrote."""


Written: TypeAlias = tuple[str | bytes, bytes | None]
"""A value as the codec wrote it: for the row, and for the side file if it is too large for that."""


def write_value(codec: Codec, value: Any, what: str = "what the job returned") -> Written:
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
        cure = (
            "Return what can be JSON, or give the journal a codec: `penstock.Journal(path, codec=pickle)`."
            if codec is JSON
            else "Return what the journal's codec can write, or give it another one."
        )
        raise UsageError(
            f"{what} cannot be recorded in the journal: {type(error).__name__}: {error}. {cure}"
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
    outcome: Outcome[Any], key: Key | None, run: int, now: float, spent: str | None, written: Written | None,
    codec: Codec, *, intents: bool = False,
) -> Entry:  # fmt: skip
    """The row of an outcome; `written` is its value as `write_value` gives it.

    A row that is unknown has no kind of failure, so that it can be told from a dead one when it is to be run again.
    """
    error = outcome.error
    start = key, _DONE, outcome.attempts, run, now, outcome.waited, outcome.ran, spent
    if error is None:
        result, large = (None, None) if written is None else written
        return Entry(Row(*start, result), large)
    state = _state_of_failure(error, outcome.kind, intents)
    given, shown, large = (None, None, None) if state is State.SKIPPED else write_input(codec, outcome.input)
    row = Row(
        *start, input=given, shown_input=shown, kind=outcome.kind if state is State.DEAD else None,
        error=class_of(error), message=message_of(error), status=_small(status_of(error)), answer=_answer_of(error),
    )  # fmt: skip
    return Entry(row._replace(state=state.value, kind=None if row.kind is None else str(row.kind)), large)


def _state_of_failure(error: BaseException, kind: FailureKind | None, intents: bool) -> State:
    """With intents, a job that got no answer has no known outcome: what it asked for may have happened."""
    if isinstance(error, SkipItem):
        return State.SKIPPED
    unanswered = kind in (FailureKind.TRANSIENT, FailureKind.CANCELLED) and status_of(error) is None
    certain = provably_unsent(error) or isinstance(error, CircuitOpen)
    return State.UNKNOWN if intents and unanswered and not certain else State.DEAD


def intent_of(item: Any, key: Key, run: int, now: float, spent: str | None, codec: Codec) -> Entry:
    """The row of an item that is about to be started; `spent` is what its earlier lives have spent."""
    given, shown, large = write_input(codec, item)
    return Entry(Row(key, State.UNKNOWN.value, 0, run, now, 0.0, 0.0, spent, input=given, shown_input=shown), large)


def never_begun(intent: Entry, *, unknown: bool) -> Entry:
    """The row that takes an intent back; `unknown`: nobody knows what an earlier life of the item has done."""
    message = None if unknown else _NEVER_BEGUN
    return intent._replace(row=intent.row._replace(state=State.RETRY.value, message=message))


def is_unknown(row: Row) -> bool:
    """Whether nobody knows what an earlier run has done for this item, also where somebody has asked for it again."""
    if row.state == State.UNKNOWN:
        return True
    return row.state == State.RETRY and row.kind is None and row.message != _NEVER_BEGUN


def write_input(codec: Codec, item: Any) -> tuple[str | bytes | None, str | None, bytes | None]:
    """An item as the codec writes it, or else as text; and what goes to the side file.

    Never raises: a dead letter without its input is one still.
    """
    try:
        data, large = write_value(codec, item)
        return data, None, large
    except UsageError:
        return None, _shown(item), None


def _shown(item: Any) -> str:
    try:
        if isinstance(item, str | bytes | bytearray):
            item = item[:LONGEST_TEXT]
        return _text(repr(item))
    except Exception:  # noqa: BLE001  # the user's class
        return f"<a {type(item).__name__} that cannot be shown>"


def class_of(error: BaseException) -> str:
    """Class of an error, with its module unless it is a built-in one."""
    kind = type(error)
    return _text(f"{kind.__qualname__}" if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}")


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
