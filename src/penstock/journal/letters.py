"""What a program reads out of a journal: results; and dead letters, with all that is known of them.

    run.db -> rows that are done, checked, in slices            -> key and value
           -> rows that are dead or unknown, checked, in slices -> DeadLetter

Threads: any; the iterator belongs to the one that uses it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from penstock.journal.options import Codec
from penstock.journal.schema import Key, Row, State
from penstock.outcome import FailureKind

if TYPE_CHECKING:
    from penstock.journal.reading import Reading


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An item that has failed, or of which nobody knows how it ended."""

    key: Key | None
    """None where the item has no key that could be recorded."""
    state: Literal["dead", "unknown"]
    """"unknown": its process died in the middle of it. Only with `Journal(intents=True)`."""
    input: Any
    """The item. None where the codec could not write it: then there is `shown_input`."""
    error: str
    """Class of the error, with its module unless it is a built-in one; empty where the state is "unknown"."""
    kind: FailureKind | None
    """Of failure; None where the state is "unknown"."""
    message: str
    """Of the error, its first 10,000 characters."""
    status: int | None
    """HTTP status, where the error carried one."""
    attempts: int
    """Of all round trips of its job."""
    answer: bytes
    """First bytes of the service's last answer, where the error carried them."""
    recorded: float
    """Seconds since the epoch."""
    shown_input: str | None = None
    """The item as text, where the codec could not write it: for reading, not for sending it again."""


_KINDS = {kind.value: kind for kind in FailureKind}


def dead(path: str | os.PathLike[str], *, codec: Codec | None = None) -> Iterator[DeadLetter]:
    """The dead letters of the journal at `path`, in the order in which they were first recorded.

        for letter in penstock.dead("run.db"):
            if letter.status == 422:
                repaired.append(repair(letter.input))

    Constant memory; also while a run writes. Blocks for as long as the disk does, from the first `next` on, which opens
    the file; it is closed at the end, or with the iterator. Any thread.

    Args:
        codec: what wrote the inputs: that of the run's `Journal`.

    Raises:
        JournalError: by `next`: the journal cannot be read, a row is damaged, or the codec is another one.
        UsageError: by `next`: the path is none.
    """
    from penstock.journal.reading import Reading  # SQLite is not for everybody to import

    with Reading(path, codec=codec) as reading:
        for row in reading.rows(State.DEAD, State.UNKNOWN):
            yield dead_letter(reading, row)


def results(path: str | os.PathLike[str], *, codec: Codec | None = None) -> Iterator[tuple[Key, Any]]:
    """Key and value of each item that is done, in the order in which they were first recorded.

        values = dict(penstock.results("run.db"))

    As for `dead`: constant memory, also while a run writes, blocking, any thread.

    Args:
        codec: what wrote the results: that of the run's `Journal`.

    Raises:
        JournalError: by `next`: the journal cannot be read, something in it is damaged, or the codec is another one.
        UsageError: by `next`: the path is none.
    """
    from penstock.journal.reading import Reading  # SQLite is not for everybody to import

    with Reading(path, codec=codec) as reading:
        for row in reading.rows(State.DONE):
            assert row.key is not None, "what is done has one"
            yield row.key, reading.value(row)


def dead_letter(reading: "Reading", row: Row) -> DeadLetter:
    """A row as a dead letter.

    Raises:
        JournalError: its input was written by another codec.
    """
    return DeadLetter(
        key=row.key,
        state="dead" if row.state == State.DEAD else "unknown",
        input=reading.input(row),
        error=row.error or "",
        kind=_KINDS.get(row.kind or ""),
        message=row.message or "",
        status=row.status,
        attempts=row.attempts,
        answer=row.answer or b"",
        recorded=row.recorded,
        shown_input=row.shown_input,
    )
