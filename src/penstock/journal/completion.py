"""The completion report: what became of each item, a line for each, as S3 Batch Operations makes it.

    run.db -> rows, checked, in slices -> lines of CSV or JSON

A line holds key, state, attempts, kind, error, status, message, run and the time at which the item was recorded (UTC,
ISO 8601). How they are written: see `lines`.

Threads: any.
"""

import os
from typing import TextIO

from penstock.journal.lines import Lines
from penstock.journal.reading import Reading
from penstock.journal.schema import State

COLUMNS = (
    "key", "key_base64", "state", "attempts", "kind", "error", "status", "message", "run", "recorded",
)  # fmt: skip


def write_completion(path: str | os.PathLike[str], file: TextIO, format: str = "csv") -> int:
    """Write a line for each item of the journal at `path`, and return how many there are.

    Constant memory. Blocks for as long as both files do. A run may go on meanwhile: of what it records from now on,
    some may be among them. An item without a usable key has the key null in JSON; in CSV, `key` and `key_base64` are
    both empty. Any thread.

    Args:
        file: a text file; for CSV opened with `newline=""`.
        format: "csv", with a header, or "jsonl".

    Raises:
        JournalError: the journal cannot be read, or a row is damaged. Lines may have been written by then.
        UsageError: a format that there is not.
    """
    number = 0
    with Reading(path) as reading:
        lines = Lines(file, format, COLUMNS)
        for row in reading.rows():
            number += 1
            lines.write(
                {
                    "key": row.key,
                    "state": State(row.state).name.lower(),
                    "attempts": row.attempts,
                    "kind": row.kind,
                    "error": row.error,
                    "status": row.status,
                    "message": row.message,
                    "run": row.run,
                    "recorded": reading.recorded(row),
                }
            )
    return number
