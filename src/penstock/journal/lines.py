"""What a journal holds as lines of text: JSON (one object a line) or CSV. Decides how it is written, and no more.

    JSON  {"key": "a", "state": "dead", "status": 422, "answer_base64": "iVBORw0KGgo="}
    CSV   key,key_base64,state,...    a header, then a row for each record; empty where there is nothing

Bytes stand as base64 in a field of their own, `<name>_base64`: so a key of bytes cannot be taken for one of text. CSV
does not tell the number 1 from the text "1", nor empty text from nothing; JSON does. Fields that may hold anything
(results, inputs) are JSON in CSV, too.

JSON is ASCII: a line ends where everybody thinks that it ends, U+2028 or not. NaN and infinities are written as
Python's `json` writes and reads them, since null would be another value; most other programs refuse them. CSV is that
of RFC 4180: CRLF at the end of a row, line breaks within quotes.
Text that begins with = + - or @ stands there as it is: this is data for programs, and a spreadsheet that takes it for a
formula has to be told (import the column as text).

Threads: any, one at a time for each file.
"""

import csv
import json
from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TextIO, get_args

from penstock.errors import UsageError

Format = Literal["csv", "jsonl"]
FORMATS: tuple[str, ...] = get_args(Format)


class Lines:
    """Writes records to a text file, one by one.

    Args:
        file: for CSV opened with `newline=""`, as the module `csv` asks for.
        columns: of CSV, in this order. JSON has the fields that a record has, in its order.
        anything: names of fields that may hold whatever can be JSON.

    Raises:
        UsageError: a format that there is not.
    """

    def __init__(self, file: TextIO, format: str, columns: Sequence[str], anything: Collection[str] = ()) -> None:
        if format not in FORMATS:
            raise UsageError(f"format={format!r:.100}: expected 'csv' or 'jsonl'.")
        self._file = file
        self._anything = anything
        self._csv = csv.DictWriter(file, columns) if format == "csv" else None
        if self._csv is not None:
            self._csv.writeheader()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record. Blocks for as long as the file does."""
        fields = dict(as_field(name, value) for name, value in record.items())
        if self._csv is None:
            self._file.write(f"{json.dumps(fields)}\n")
            return
        for name in self._anything:
            if name in fields:
                fields[name] = json.dumps(fields[name])
        self._csv.writerow(fields)


def as_field(name: str, value: Any) -> tuple[str, Any]:
    """Under which name, and how, something is written."""
    return (f"{name}_base64", b64encode(value).decode()) if isinstance(value, bytes) else (name, value)
