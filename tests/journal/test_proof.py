"""The proof at the end of a run: what was counted is recorded, whole; and each key that is asked for has a state."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import Executor, Journal, JournalError, Report, SkipItem
from penstock.journal.database import open_to_write
from penstock.journal.proof import KEYS_AT_ONCE, MOST_NAMES, prove_counts, prove_keys
from penstock.journal.schema import INLINE_BYTES, State, side_file_of
from penstock.journal.upkeep import retry

pytestmark = pytest.mark.virtual_clock

LARGE = "x" * (INLINE_BYTES + 1)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path.resolve() / "run.db")


async def end_somehow(item: Any) -> Any:
    """As its item says, which is its key too."""
    if item == "dead":
        raise ValueError("bad")
    if item == "skipped":
        raise SkipItem("of no use")
    return LARGE if item == "large" else type(item).__name__


async def record(path: str, items: Iterable[Any], **options: Any) -> Report:
    async with Executor() as executor:
        journal = Journal(path, on_mismatch="ignore")
        return await executor.run(end_somehow, items, key=lambda item: item, journal=journal, **options)


def change(path: str, statement: str, *values: object) -> None:
    """Behind the journal's back."""
    with closing(open_to_write(path, full_sync=False)) as connection:
        connection.execute(statement, values)


def spoil(file: str, damage: str) -> None:
    """A side file is not what it was."""
    if damage == "changed":
        Path(file).write_bytes(b"y" * os.path.getsize(file))
    elif damage == "cut off":
        os.truncate(file, os.path.getsize(file) - 1)
    else:
        os.unlink(file)


ITEMS = ["done", "dead", "skipped", "large", 7, 7.5, b"bytes"]


async def test_a_run_that_has_recorded_what_it_counted_is_proven(path: str) -> None:
    """Each item that has a state counts, whatever it is; and more may be there, of runs over other items."""
    report = await record(path, ITEMS)
    report.verify()
    report.verify(keys=ITEMS)
    report.verify(keys=iter(ITEMS))
    report.verify(keys=[])
    (await record(path, ["another"])).verify()
    prove_counts(path, len(ITEMS) + 1)
    with pytest.raises(JournalError, match=r"run\.db: 9 items were counted, and 8 have a state there"):
        prove_counts(path, len(ITEMS) + 2)


async def test_items_that_were_left_out_have_no_state_to_be_proven(path: str) -> None:
    """A key that has come twice has one row."""
    async with Executor() as executor:
        journal = Journal(path, duplicates="skip")
        report = await executor.run(end_somehow, ["a", "a", "b"], key=str, journal=journal)
    assert (report.done, report.skipped, report.duplicates) == (2, 1, 1)
    report.verify()


async def test_an_item_that_was_removed_is_missed(path: str) -> None:
    """By the count; and by its key, where that is asked for."""
    report = await record(path, ITEMS)
    change(path, "DELETE FROM item WHERE key = 'done'")
    with pytest.raises(JournalError, match="7 items were counted, and 6 have a state there"):
        report.verify()
    with pytest.raises(JournalError, match="1 of these keys have no state there: 'done'. Run again"):
        prove_keys(path, ITEMS)
    report = await record(path, ITEMS)
    assert (report.replayed, report.read) == (6, 7)
    report.verify(keys=ITEMS)


async def test_an_item_that_is_to_be_run_again_has_no_state(path: str) -> None:
    """Somebody has asked for it since: it is as good as missing."""
    report = await record(path, ITEMS)
    assert retry(path) == 1
    with pytest.raises(JournalError, match="7 items were counted, and 6 have a state"):
        report.verify()
    with pytest.raises(JournalError, match="have no state there: 'dead'"):
        prove_keys(path, ITEMS)


async def test_what_a_run_that_was_stopped_has_not_come_to_is_named(path: str) -> None:
    """The counts add up: what is left is no fault. Who asks whether all keys are there is told that they are not."""

    async def job(item: int) -> int:
        penstock.spend(usd=1)
        return item

    async with Executor(limit=1) as executor:
        budget = penstock.Budget(usd=3)
        report = await executor.run(job, range(1_000), key=int, journal=path, budget=budget)
    report.verify()
    with pytest.raises(JournalError, match="997 of these keys have no state there: 3, 4, 5, ") as caught:
        report.verify(keys=range(1_000))
    named = ", ".join(str(key) for key in range(3, 3 + MOST_NAMES))
    assert named in str(caught.value)
    assert str(3 + MOST_NAMES) not in str(caught.value), "no more than a person reads"


async def test_so_many_keys_are_gone_through_as_there_are(path: str) -> None:
    """Some hundred at once, and an iterator once."""
    number = 2 * KEYS_AT_ONCE + 1
    report = await record(path, range(number))

    def keys() -> Iterator[int]:
        yield from range(number)
        yield -1

    report.verify(keys=range(number))
    with pytest.raises(JournalError, match="1 of these keys have no state there: -1"):
        report.verify(keys=keys())


@pytest.mark.parametrize("key", ["7", 8, b"7", "DONE", True, None, (1, 2)], ids=repr)
async def test_what_is_no_key_of_the_journal_has_no_state_there(path: str, key: Any) -> None:
    """Text, numbers and bytes are different keys; and what cannot be one at all has no state either."""
    report = await record(path, [7, "done"])
    report.verify(keys=[7.0, "done"])
    with pytest.raises(JournalError, match="1 of these keys have no state there") as caught:
        report.verify(keys=[7, key])
    assert f": {key!r}. Run again" in str(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE item SET attempts = 5 WHERE key = 'dead'",
        "UPDATE item SET result = '\"other\"' WHERE key = 'done'",
        "UPDATE item SET state = 1 WHERE key = 'skipped'",
    ],
)
async def test_a_row_that_was_changed_is_no_proof(path: str, statement: str) -> None:
    report = await record(path, ITEMS)
    change(path, statement)
    with pytest.raises(JournalError, match="does not match its checksum"):
        report.verify()


@pytest.mark.parametrize("state", [State.DONE, State.DEAD])
@pytest.mark.parametrize("damage", ["changed", "cut off", "removed"])
async def test_a_large_result_or_input_that_is_damaged_is_no_proof(path: str, state: State, damage: str) -> None:
    """What is beside the file is compared with its checksum, too."""
    item = LARGE if state is State.DEAD else "large"

    async def job(item: str) -> str:
        if item == LARGE:
            raise ValueError("bad")
        return LARGE

    async with Executor() as executor:
        report = await executor.run(job, [item], key=len, journal=path)
    report.verify()
    spoil(side_file_of(path), damage)
    with pytest.raises(JournalError, match=r"run\.db-results: "):
        report.verify()


async def test_a_journal_that_is_gone_proves_nothing(path: str) -> None:
    report = await record(path, ITEMS)
    os.unlink(path)
    with pytest.raises(JournalError, match=r"run\.db"):
        report.verify()
    with pytest.raises(JournalError, match=r"run\.db"):
        prove_keys(path, ITEMS)
