"""The proof at the end of a run: that what was counted is what is recorded.

    run.db -> every row, checked against its checksum -> items that have a state: as many as were counted?
    keys   -> looked up in batches                    -> each has one?

Constant memory. Threads: any.
"""

import itertools
import reprlib
from collections.abc import Iterable
from typing import Any

from penstock.errors import JournalError
from penstock.journal.database import explaining, open_to_read
from penstock.journal.options import key_to_record
from penstock.journal.reading import Reading
from penstock.journal.schema import Key, State

KEYS_AT_ONCE = 500
"""As many as a run looks up at once."""
MOST_NAMES = 20
"""Keys that are named. Arbitrary, because: enough to see what they have in common."""

_WITH_A_STATE = f"state <> {State.RETRY:d}"


def prove_counts(path: str, ended: int) -> None:
    """Check that the journal at `path` is whole, and that no fewer items have a state than a run says.

    (More may: those of earlier runs over other items.) Blocks: goes through the whole file, some seconds for a million.

    Raises:
        JournalError: there are fewer, or a row is damaged.
    """
    found = 0
    with Reading(path) as reading:
        for row in reading.rows():
            found += row.state != State.RETRY
            if row.file_size is not None:
                reading.data(row)
                reading.input_data(row)
    if found < ended:
        raise JournalError(
            f"{path}: {ended:,} items were counted, and {found:,} have a state there. Has it been changed since? Run "
            f"again: what is missing is done then; or name it by report.verify(keys)."
        )


def prove_keys(path: str, keys: Iterable[Any]) -> None:
    """Check that all of these keys have a state in the journal at `path`.

    Raises:
        JournalError: some have none. The message names them.
    """
    missing = 0
    names: list[str] = []
    connection = open_to_read(path)
    try:
        keys = iter(keys)
        while some := list(itertools.islice(keys, KEYS_AT_ONCE)):
            recorded = [_recordable(key) for key in some]
            with explaining(path):
                marks = ",".join("?" * len(some))
                query = f"SELECT key FROM item WHERE key IN ({marks}) AND {_WITH_A_STATE}"
                found = {key for (key,) in connection.execute(query, recorded)}
            lost = [key for key, plain in zip(some, recorded, strict=True) if plain not in found]
            missing += len(lost)
            names += [reprlib.repr(key) for key in lost[: MOST_NAMES - len(names)]]
    finally:
        connection.close()
    if missing:
        more = "" if missing <= len(names) else " and others"
        raise JournalError(
            f"{path}: {missing:,} of these keys have no state there: {', '.join(names)}{more}. Run again: what is "
            f"missing is done then."
        )


def _recordable(key: Any) -> Key | None:
    """None for what cannot be a key, and so has no state under it."""
    try:
        return key_to_record(key)
    except ValueError:
        return None
