"""Streams with a journal: outcomes come after their commit, and whatever ends a stream early loses none of them."""

import asyncio
import contextlib
import gc
import io
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import (
    Budget,
    ClosedError,
    Executor,
    FailureKind,
    Journal,
    JournalError,
    Outcome,
    RecordedError,
    SkipItem,
    Stream,
    TooManyErrors,
    UsageError,
    current_job,
)
from penstock.errors import BudgetReached
from penstock.events import JobEnded
from penstock.executor.running import PATIENCE
from penstock.instruments.progress import ProgressLine
from penstock.journal import database, recording
from penstock.journal.lock import is_held
from penstock.journal.recording import Recording
from penstock.journal.schema import INLINE_BYTES, State
from penstock.journal.store import Batch, Store
from penstock.journal.upkeep import retry
from penstock.report import BUDGET_REACHED
from penstock.testing import cancel_at_every_step, run_in_virtual_time

pytestmark = pytest.mark.virtual_clock

Job = Callable[[Any], Awaitable[Any]]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="penstock.jobs")


def states(path: str) -> dict[Any, State]:
    """What the journal holds, looked at from outside."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT key, state FROM item WHERE key IS NOT NULL").fetchall()
    assert len(rows) == len(dict(rows))
    return {key: State(state) for key, state in rows}


async def same(item: Any) -> Any:
    return item


async def refuse(item: Any) -> Any:
    raise ValueError(item)


async def for_ever(_item: Any) -> None:
    await asyncio.Event().wait()


async def read(stream: Stream[Outcome[Any]]) -> tuple[list[Outcome[Any]], Any]:
    """The outcomes that come before the stream's own error, and that."""
    outcomes = []
    async with stream:
        try:
            async for outcome in stream:
                outcomes.append(outcome)
        except Exception as error:  # noqa: BLE001  # it is looked at by the tests
            return outcomes, error
    return outcomes, None


def identity(item: Any) -> Any:
    return item


async def live(job: Job, items: Iterable[Any], path: str, **options: Any) -> list[Outcome[Any]]:
    """One run, whatever job the journal was begun by."""
    journal = Journal(path, on_mismatch="ignore", **options)
    async with Executor() as executor:
        return await executor.as_completed(job, items, key=identity, journal=journal)


# --- the commit comes first ---


@pytest.mark.parametrize("job", [same, refuse], ids=["done", "failed"])
async def test_an_outcome_is_in_the_file_when_it_is_delivered(job: Job, path: str) -> None:
    """For another process, too; and it is not delivered before, nor counted."""
    async with Executor(limit=3) as executor:
        async with executor.as_completed(job, range(20), key=int, journal=path) as stream:
            async for outcome in stream:
                assert states(path)[outcome.key] == (State.DONE if outcome.ok else State.DEAD)
                counts = stream.statistics()
                assert counts.finished <= len(states(path))
                assert counts.read == counts.finished + counts.in_flight + counts.left


async def test_outcomes_wait_for_no_more_than_a_batch(path: str) -> None:
    """While jobs go on, those that have ended come 200 ms later at the most; the last ones at once."""
    loop = asyncio.get_running_loop()
    began, came = loop.time(), {}

    async def sleep_for(seconds: float) -> None:
        await asyncio.sleep(seconds)

    async with Executor() as executor:
        async with executor.as_completed(sleep_for, [1.0, 1.1, 5.0], key=float, journal=path) as stream:
            async for outcome in stream:
                came[outcome.key] = loop.time() - began
    assert came == {1.0: pytest.approx(1.2), 1.1: pytest.approx(1.2), 5.0: pytest.approx(5.0)}


async def test_what_waits_for_its_commit_takes_no_room(path: str) -> None:
    """One slot and one place for an outcome, and nobody waits 200 ms for each job."""
    loop = asyncio.get_running_loop()

    async def job(item: int) -> int:
        await asyncio.sleep(0.01)
        return item

    async with Executor(limit=1) as executor:
        began = loop.time()
        outcomes, _ = await read(executor.as_completed(job, range(100), key=int, journal=path, buffersize=1))
    assert sorted(outcome.unwrap() for outcome in outcomes) == list(range(100))
    assert loop.time() - began < 1.5


async def test_when_too_much_waits_for_the_disk_no_job_is_begun(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has a bound there, too."""
    monkeypatch.setattr(recording, "MOST_UNCOMMITTED", 10)
    most = 0

    async def job(item: int) -> int:
        nonlocal most
        counts = stream.statistics()
        most = max(most, counts.in_flight)
        await asyncio.sleep(0.001)
        return item

    async with Executor(limit=2) as executor:
        stream = executor.as_completed(job, range(100), key=int, journal=path, buffersize=50)
        outcomes, error = await read(stream)
    assert (len(outcomes), error) == (100, None)
    assert most <= 10 + 2


async def test_large_results_that_wait_for_the_disk_have_a_bound_of_their_own(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in bytes; each is delivered as it was returned."""
    monkeypatch.setattr(recording, "MOST_UNCOMMITTED_BYTES", 3 * INLINE_BYTES)

    async def job(item: int) -> str:
        return str(item) * 2 * INLINE_BYTES

    outcomes = await live(job, range(10), path)
    assert all(outcome.value == str(outcome.key) * 2 * INLINE_BYTES for outcome in outcomes)
    again = await live(job, range(10), path)
    assert all(outcome.replayed and outcome.value == str(outcome.key) * 2 * INLINE_BYTES for outcome in again)


# --- what is known ---


async def test_what_is_recorded_is_delivered_and_not_run(path: str) -> None:
    """Value, attempts and times as they were; in the order of the items."""

    async def slowly(item: int) -> dict[str, int]:
        await asyncio.sleep(item)
        return {"id": item}

    first = {outcome.key: outcome for outcome in await live(slowly, [1, 2, 3], path)}
    second = await live(refuse, [3, 1, 2], path)
    assert [outcome.key for outcome in second] == [3, 1, 2]
    assert all(outcome == first[outcome.key]._replace(replayed=True) for outcome in second)


async def test_a_failure_comes_back_as_far_as_it_is_recorded(path: str) -> None:
    """Class, message, status, kind and the answer's first bytes."""

    class Refused(Exception):
        failure_kind = FailureKind.TRANSIENT
        status = 429
        body_start = b"slow down"

    async def job(_item: int) -> None:
        raise Refused("not now")

    (first,) = await live(job, [1], path)
    (second,) = await live(job, [1], path)
    assert isinstance(second.error, RecordedError)
    assert second.error.error.endswith("Refused")
    assert (second.error.message, second.error.status, second.error.answer) == ("not now", 429, b"slow down")
    assert second.kind == first.kind == FailureKind(second.error.failure_kind)
    assert penstock.classify(second.error) == first.kind
    assert (second.input, second.value, second.replayed) == (1, None, True)


async def test_an_item_that_needed_no_work_comes_back_as_that(path: str) -> None:
    """It is no failure, and is not run again where failed ones are."""

    async def job(_item: int) -> None:
        raise SkipItem("nothing to do")

    await live(job, [1], path)
    (again,) = await live(refuse, [1], path, resume="failed")
    assert isinstance(again.error, SkipItem)
    assert str(again.error) == "nothing to do"
    assert (again.kind, again.replayed) == (None, True)


async def test_a_stream_may_leave_out_what_is_recorded(path: str) -> None:
    """It is counted in any case."""
    await live(same, [1, 2], path)
    async with Executor() as executor:
        journal = Journal(path, replay=False)
        stream = executor.as_completed(same, [1, 2, 3], key=int, journal=journal)
        outcomes, error = await read(stream)
    assert ([outcome.key for outcome in outcomes], error) == ([3], None)
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.replayed) == (3, 3, 2)


async def test_large_results_that_are_left_out_are_counted(path: str) -> None:
    """They are not even read; nor is anything delivered."""

    async def job(_item: int) -> str:
        return "x" * 2 * INLINE_BYTES

    await live(job, [1, 2], path)
    spoil(f"{path}-results", "changed")
    async with Executor() as executor:
        stream = executor.as_completed(job, [1, 2], key=int, journal=Journal(path, on_mismatch="ignore", replay=False))
        assert await read(stream) == ([], None)
    assert stream.statistics().replayed == 2


async def test_a_slow_reader_holds_up_what_is_replayed(path: str) -> None:
    """No more outcomes are ready than its window has room for."""
    await live(same, range(1_000), path)
    async with Executor() as executor:
        async with executor.as_completed(same, range(1_000), key=int, journal=path, buffersize=7) as stream:
            async for _ in stream:
                await asyncio.sleep(0.001)
                assert stream.statistics().ready <= 7
    assert stream.statistics().finished == 1_000


async def test_the_loop_has_its_turns_while_thousands_are_replayed(path: str) -> None:
    """Though nothing in it would wait."""
    await live(same, range(5_000), path)
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    ticking = asyncio.ensure_future(tick())
    async with Executor() as executor:
        report = await executor.run(same, range(5_000), key=int, journal=path)
    ticking.cancel()
    assert report.replayed == 5_000
    assert turns > 10


def spoil(file: str, damage: str) -> None:
    """A side file is not what it was."""
    if damage == "changed":
        Path(file).write_bytes(b"y" * os.path.getsize(file))
    elif damage == "cut off":
        os.truncate(file, os.path.getsize(file) - 1)
    else:
        os.unlink(file)


async def test_a_large_result_that_is_damaged_ends_the_run(path: str) -> None:
    """Nobody is given something else; the item is left."""

    async def job(_item: int) -> str:
        return "x" * 2 * INLINE_BYTES

    await live(job, [1], path)
    spoil(f"{path}-results", "changed")
    async with Executor() as executor:
        stream = executor.as_completed(job, [1, 2], key=int, journal=Journal(path, on_mismatch="ignore"))
        outcomes, error = await read(stream)
    assert outcomes == []
    assert isinstance(error, JournalError)
    counts = stream.statistics()
    assert (counts.read, counts.left) == (2, 2)


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("loss", ["removed", "cut off"])
async def test_a_journal_without_its_large_results_is_refused(path: str, loss: str, replay: bool) -> None:
    """Also by a run that reads none of them: what it counts as done would be gone. No item is taken."""

    async def job(_item: int) -> str:
        return "x" * 2 * INLINE_BYTES

    await live(job, [1, 2], path)
    spoil(f"{path}-results", loss)
    async with Executor() as executor:
        journal = Journal(path, on_mismatch="ignore", replay=replay)
        stream = executor.as_completed(job, [1, 2], key=int, journal=journal)
        outcomes, error = await read(stream)
    assert outcomes == []
    assert isinstance(error, JournalError)
    assert "run.db-results: has " in str(error)
    assert stream.statistics().read == 0
    assert not is_held(path)


# --- keys that come twice ---


async def test_a_key_that_comes_twice_ends_the_run(path: str) -> None:
    """Unless something else is asked for: two items would share a state. What is in flight is finished."""
    async with Executor() as executor:
        stream = executor.as_completed(same, ["a", "b", "a", "c"], key=identity, journal=path)
        outcomes, error = await read(stream)
    assert sorted(outcome.key for outcome in outcomes) == ["a", "b"]
    assert isinstance(error, UsageError)
    assert "the key 'a' has come twice" in str(error)
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (4, 2, 2)


@pytest.mark.parametrize("apart", [0, 1, 1_000], ids=["at once", "after its end", "after its commit"])
@pytest.mark.parametrize("life", [1, 2])
async def test_a_key_that_comes_twice_is_left_out_where_that_is_asked_for(path: str, apart: int, life: int) -> None:
    """However far apart they are, and also where an earlier run has recorded the first one."""
    items = ["a", *range(apart), "a", "b", "a"]
    for _ in range(life):
        async with Executor(limit=10) as executor:
            journal = Journal(path, duplicates="skip")
            stream = executor.as_completed(same, items, key=identity, journal=journal)
            outcomes, error = await read(stream)
        assert error is None
        assert max(Counter(outcome.key for outcome in outcomes).values()) == 1
        counts = stream.statistics()
        assert (counts.read, counts.finished, counts.duplicates) == (apart + 4, apart + 2, 2)


@pytest.mark.parametrize(
    ("key", "second", "third"),
    [(7, "7#2", "7#3"), ("a", "a#2", "a#3"), (b"a", b"a#2", b"a#3"), (1.5, "1.5#2", "1.5#3")],
    ids=repr,
)
async def test_a_key_that_comes_twice_is_recorded_under_others_where_that_is_asked_for(
    path: str, key: Any, second: Any, third: Any
) -> None:
    """In the order of the items; the next run finds each again."""

    async def run(items: list[int], **options: Any) -> dict[Any, tuple[Any, bool]]:
        journal = Journal(path, duplicates="suffix", **options)
        async with Executor(limit=2) as executor:
            outcomes = await executor.as_completed(same, items, key=lambda _: key, journal=journal)
        return {outcome.key: (outcome.value, outcome.replayed) for outcome in outcomes}

    assert await run([1, 2, 3]) == {key: (1, False), second: (2, False), third: (3, False)}
    assert await run([4, 5]) == {key: (1, True), second: (2, True)}
    assert await run([4, 5], resume="all") == {key: (4, False), second: (5, False)}


async def test_another_key_is_not_one_that_an_item_has_of_itself(path: str) -> None:
    """It gets the next one that has not come."""
    journal = Journal(path, duplicates="suffix")
    async with Executor(limit=1) as executor:
        outcomes = await executor.as_completed(same, ["a", "a#2", "a", "a"], key=identity, journal=journal)
    assert [outcome.key for outcome in outcomes] == ["a", "a#2", "a#3", "a#4"]


# --- streams that end early ---


async def test_a_break_loses_nothing_that_has_ended(path: str) -> None:
    """What was not delivered is recorded; what was not run is run the next time."""
    async with Executor(limit=4) as executor:
        async with executor.as_completed(same, range(100), key=int, journal=path) as stream:
            async for _ in stream:
                break
    counts = stream.statistics()
    assert counts.read == counts.finished + counts.left == 100
    assert len(states(path)) == counts.finished
    assert not is_held(path)
    again = await live(same, range(100), path)
    assert sum(outcome.replayed for outcome in again) == counts.finished


async def test_a_shutdown_drains(path: str) -> None:
    """What is in flight is finished, recorded and delivered; then the reader is told."""

    async def job(item: int) -> int:
        await asyncio.sleep(10)
        return item

    async with Executor(limit=3) as executor:
        stream = executor.as_completed(job, itertools.count(), key=int, journal=path)
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        await executor.shutdown()
        outcomes, error = await reader
    assert sorted(outcome.key for outcome in outcomes) == [0, 1, 2]
    assert isinstance(error, ClosedError)
    assert set(states(path)) == {0, 1, 2}
    counts = stream.statistics()
    assert (counts.finished, counts.in_flight) == (3, 0)
    assert counts.left == counts.read - 3


async def test_jobs_that_never_end_are_cancelled_and_left(path: str) -> None:
    """A shutdown with a bound: they have no state, and what had ended has."""

    async def job(item: int) -> int:
        if item:
            await for_ever(item)
        return item

    async with Executor(limit=3) as executor:
        stream = executor.as_completed(job, range(10), key=int, journal=path)
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        await executor.shutdown(timeout=1)
        outcomes, error = await reader
    assert [outcome.key for outcome in outcomes] == [0]
    assert isinstance(error, ClosedError)
    assert states(path) == {0: State.DONE}
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (10, 1, 9)


@pytest.mark.parametrize("by", ["break", "shutdown"])
async def test_jobs_that_swallow_their_cancellation_are_given_up(path: str, by: str) -> None:
    """After a bounded wait the journal is closed; what they do later is in nobody's books."""
    loop = asyncio.get_running_loop()
    go = asyncio.Event()

    async def job(item: int) -> int:
        while item and not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()
        await penstock.step("late", same, item)
        return item

    async with Executor(limit=2) as executor:
        stream = executor.as_completed(job, range(5), key=int, journal=path)
        async with stream:
            assert (await anext(stream)).key == 0
            began = loop.time()
            if by == "shutdown":
                await executor.shutdown(timeout=0)
        assert loop.time() - began == pytest.approx(PATIENCE, abs=1)
        assert not is_held(path)
        go.set()
        await asyncio.sleep(1)
    assert states(path) == {0: State.DONE}
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (5, 1, 4)


async def test_a_stream_that_is_closed_before_its_last_commit_was_not_read_to_its_end(path: str) -> None:
    """All jobs have ended and one outcome is on its way to the disk: it is recorded, and who reads on is told."""
    ended, go = asyncio.Event(), asyncio.Event()

    async def job(item: int) -> int:
        if item == 2:
            await go.wait()
            ended.set()
        return item

    async with Executor() as executor:
        stream = executor.as_completed(job, [1, 2], key=int, journal=path)
        assert (await anext(stream)).key == 1
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            go.set()
            await ended.wait()
            await asyncio.sleep(0)
            closing_it = asyncio.ensure_future(stream.aclose())
            await asyncio.sleep(0)
            other.execute("ROLLBACK")
        await closing_it
        with pytest.raises(ClosedError):
            await anext(stream)
    assert states(path) == {1: State.DONE, 2: State.DONE}


async def test_a_stream_that_is_dropped_is_closed_by_the_collector(path: str) -> None:
    """With a warning; the journal is free then."""
    async with Executor(limit=1) as executor:
        stream = executor.as_completed(same, itertools.count(), key=int, journal=path)
        assert (await anext(stream)).key == 0
        with pytest.warns(ResourceWarning, match="a stream was dropped"):
            del stream
    assert not is_held(path)
    assert states(path)[0] == State.DONE


def test_a_reader_may_be_cancelled_at_any_moment() -> None:
    """Nothing is left behind: no task, no lock; and each item has one state or none."""

    async def job(item: int) -> int:
        await asyncio.sleep(item / 10)
        if item == 2:
            raise SkipItem
        return item

    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def arrange() -> str:
            return os.path.join(folder, f"{next(numbers)}.db")

        async def scenario(path: str) -> None:
            journal = Journal(path, duplicates="suffix", intents=True)
            async with Executor(limit=2) as executor:
                async with executor.as_completed(job, [0, 1, 1, 2, 3], key=int, journal=journal) as stream:
                    async for outcome in stream:
                        assert states(path)[outcome.key] in (State.DONE, State.SKIPPED)

        def check(path: str) -> bool:
            return not is_held(path) and (not os.path.exists(path) or set(states(path)) <= {0, 1, "1#2", 2, 3})

        steps = cancel_at_every_step(scenario, arrange=arrange, check=check)
    assert steps > 10


def test_ctrl_c_in_a_job_frees_the_journal(path: str) -> None:
    """It comes out of the loop; what had ended before is recorded."""

    async def job(item: int) -> int:
        await asyncio.sleep(item)
        if item == 2:
            raise KeyboardInterrupt
        return item

    async def main() -> None:
        async with Executor() as executor:
            await read(executor.as_completed(job, [1, 2, 3], key=int, journal=path))

    with pytest.raises(KeyboardInterrupt):
        run_in_virtual_time(main())
    assert not is_held(path)
    assert states(path) == {1: State.DONE}


async def test_a_job_that_somebody_else_cancels_is_left(path: str) -> None:
    """The run ends, and the item is run by the next one."""
    tasks: list[asyncio.Task[Any]] = []

    async def job(item: int) -> int:
        tasks.extend(task for task in asyncio.all_tasks() if task is asyncio.current_task())
        if item:
            await for_ever(item)
        return item

    async with Executor() as executor:
        stream = executor.as_completed(job, [0, 1], key=int, journal=path)
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        tasks[1].cancel()
        outcomes, error = await reader
    assert [outcome.key for outcome in outcomes] == [0]
    assert isinstance(error, ClosedError)
    assert states(path) == {0: State.DONE}


async def test_a_job_that_takes_too_long_is_recorded_once(path: str) -> None:
    """Though it goes on after its time; what it returns then is nobody's."""
    ended = asyncio.Event()

    async def job(item: int) -> int:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)
        ended.set()
        return item

    async with Executor() as executor:
        stream = executor.as_completed(job, [1], key=int, journal=path, timeout=1)
        outcomes, error = await read(stream)
        await ended.wait()
    assert [type(outcome.error) for outcome in outcomes] == [penstock.JobTimeout]
    assert error is None
    assert states(path) == {1: State.DEAD}


# --- more than one ---


async def test_two_streams_at_once_have_a_journal_each(tmp_path: Path) -> None:
    """Neither knows of the other."""
    async with Executor(limit=2) as executor:
        paths = [str(tmp_path / name) for name in ("a.db", "b.db")]
        reads = [read(executor.as_completed(same, range(50), key=int, journal=path)) for path in paths]
        for outcomes, error in await asyncio.gather(*reads):
            assert (sorted(outcome.key for outcome in outcomes), error) == (list(range(50)), None)
    assert [len(states(path)) for path in paths] == [50, 50]


async def test_a_job_may_read_a_stream_with_a_journal_of_its_own(tmp_path: Path) -> None:
    """Its items are that journal's, the job is the outer one's; one slot is enough for both."""

    async def part(item: int) -> int:
        return await penstock.step("ask", same, item)

    async def job(item: int) -> list[int]:
        host: Any = current_job().host  # type: ignore[union-attr]
        stream = host.as_completed(part, range(3), key=int, journal=tmp_path / f"{item}.db")
        return sorted(outcome.value for outcome in await stream)

    for life in range(2):
        async with Executor(limit=1) as executor:
            outcomes = await executor.as_completed(job, [7, 8], key=int, journal=tmp_path / "outer.db")
        assert {outcome.key: outcome.value for outcome in outcomes} == {7: [0, 1, 2], 8: [0, 1, 2]}
        assert all(outcome.replayed == bool(life) for outcome in outcomes)
    assert set(states(str(tmp_path / "outer.db"))) == {7, 8}
    assert set(states(str(tmp_path / "7.db"))) == {0, 1, 2}


async def test_one_journal_has_one_run_at_a_time(path: str) -> None:
    """The second one is refused, and the first one goes on undisturbed."""
    async with Executor() as executor:
        async with executor.as_completed(for_ever, [1], key=int, journal=path) as first:
            reader = asyncio.ensure_future(anext(first))
            await asyncio.sleep(1)
            outcomes, error = await read(executor.as_completed(for_ever, [2], key=int, journal=path))
            assert outcomes == []
            assert isinstance(error, JournalError)
            assert "this very process writes it already" in str(error)
            assert is_held(path)
            reader.cancel()
            await asyncio.wait([reader])
    assert await live(same, [1], path)


# --- journals that cannot be used ---


@pytest.fixture
def foreign(path: str) -> str:
    Path(path).write_bytes(b"no journal at all, but somebody's text" * 100)
    return path


async def test_a_journal_that_cannot_be_used_is_told_to_the_reader(foreign: str) -> None:
    """By a stream that is iterated, awaited or counted; no item is taken from the source, no job is run."""
    taken: list[int] = []

    def source() -> Iterator[int]:
        taken.append(1)
        yield 1

    async with Executor() as executor:
        for _ in range(2):  # nothing is left behind that would be found the second time
            async with executor.as_completed(same, source(), key=int, journal=foreign) as stream:
                with pytest.raises(JournalError, match="run.db"):
                    await anext(stream)
                with pytest.raises(ClosedError):
                    await stream
            with pytest.raises(JournalError, match="run.db"):
                await executor.as_completed(same, source(), key=int, journal=foreign)
            with pytest.raises(JournalError, match="run.db") as caught:
                await executor.run(same, source(), key=int, journal=foreign)
            assert any("read 0" in note for note in caught.value.__notes__)
        assert await executor.map(same, [1]) == [1]
    assert taken == []
    assert not is_held(foreign)


async def test_a_job_s_resources_are_closed_where_its_journal_cannot_be_used(foreign: str) -> None:
    """As after any other error."""
    told = []

    @penstock.job
    async def job() -> AsyncIterator[Job]:
        told.append("opened")
        try:
            yield same
        finally:
            told.append("closed")

    async with Executor() as executor:
        with pytest.raises(JournalError):
            await executor.run(job, [1], key=int, journal=foreign)
    assert told == ["opened", "closed"]


def test_a_script_is_told_too(foreign: str) -> None:
    """By `run`; no thread is left."""
    with pytest.raises(JournalError, match="run.db"):
        penstock.run(same, [1], key=int, journal=foreign)


@pytest.mark.parametrize("wrong", [7, b"run.db", "", "folder/"])
async def test_what_names_no_journal_is_refused_at_once(wrong: Any) -> None:
    """Before anything is begun."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match="journal="):
            executor.as_completed(same, [1], key=int, journal=wrong)
        with pytest.raises(UsageError, match="journal="):
            await executor.run(same, [1], key=int, journal=wrong)


async def test_a_journal_needs_a_key(path: str) -> None:
    """The error says what one is."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match="found no key="):
            executor.as_completed(same, [1], journal=path)
        with pytest.raises(UsageError, match="found no key="):
            await executor.run(same, [1], journal=path)
    assert not is_held(path)


# --- rules ---


@pytest.mark.parametrize("begun", [False, True], ids=["before its job began", "in the middle of its job"])
async def test_what_an_item_has_spent_is_kept_when_its_next_life_is_cut_off(
    path: str, slow_intents: list[tuple[float, float]], begun: bool
) -> None:
    """Its intent replaces the row that said so."""
    lives = 0

    async def job(item: int) -> None:
        penstock.spend(usd=1)
        if lives == 2:
            await for_ever(item)
        raise ValueError

    for lives in (1, 2, 3):
        if lives == 2 and not begun:
            slow_intents.append((0, 10))
        async with Executor() as executor:
            journal = Journal(path, intents=True, resume="failed", on_unknown="rerun")
            reader = asyncio.ensure_future(read(executor.as_completed(job, [7], key=int, journal=journal)))
            await asyncio.sleep(1)
            await executor.shutdown(timeout=0)
            await reader
        slow_intents.clear()
        with closing(sqlite3.connect(path)) as connection:
            (spent,) = connection.execute("SELECT spent FROM item").fetchone()
        # What a job spends that is cut off is in the report of its run alone.
        assert json.loads(spent) == {"usd": {1: 1, 2: 1, 3: 2}[lives]}


async def test_failures_of_an_earlier_run_are_not_judged_again(path: str) -> None:
    """Neither by `max_errors` nor by `fail_fast`: they have ended that one."""
    await live(refuse, range(10), path)
    async with Executor() as executor:
        report = await executor.run(refuse, range(10), key=int, journal=path, max_errors=0, fail_fast=1)
    assert (report.failed, report.replayed, report.stopped) == (10, 10, None)


async def test_a_success_of_an_earlier_run_says_that_the_address_is_right(path: str) -> None:
    """First items that all fail end no run that has had a success; without one they do."""
    await live(same, [0], path)
    async with Executor(limit=1) as executor:
        journal = Journal(path, on_mismatch="ignore")
        report = await executor.run(refuse, range(20), key=int, journal=journal, fail_fast=3)
        assert (report.done, report.failed, report.stopped) == (1, 19, None)
        report = await executor.run(refuse, range(100, 120), key=int, journal=journal, fail_fast=3)
        assert report.stopped == penstock.report.ALL_FAILED
        assert report.left + report.failed == 20
        report.verify()


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ({"max_errors": 2}, TooManyErrors),
        ({"budget": Budget(usd=3)}, BudgetReached),
        ({"budget": Budget(time=2.5)}, BudgetReached),
    ],
    ids=["errors", "usd", "time"],
)
async def test_a_rule_that_ends_a_run_loses_no_outcome(
    path: str, rules: dict[str, Any], error: type[Exception]
) -> None:
    """Those before it are delivered and recorded; the next run goes on."""

    async def job(item: int) -> None:
        await asyncio.sleep(1)
        penstock.spend(usd=1)
        raise ValueError(item)

    async with Executor(limit=1) as executor:
        stream = executor.as_completed(job, range(10), key=int, journal=path, **rules)
        outcomes, raised = await read(stream)
    assert [outcome.key for outcome in outcomes] == [0, 1, 2]
    assert isinstance(raised, error)
    assert set(states(path)) == {0, 1, 2}
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (10, 3, 7)


async def test_what_an_earlier_run_has_spent_is_not_spent_again(path: str) -> None:
    """A budget is that of one run."""

    async def job(item: int) -> int:
        await asyncio.sleep(1)
        penstock.spend(usd=1)
        return item

    async with Executor(limit=1) as executor:
        for life in range(1, 4):
            report = await executor.run(job, range(6), key=int, journal=path, budget=Budget(usd=2))
            assert report.spent == {"usd": 2}
            assert report.replayed == 2 * (life - 1)
            assert report.done == 2 * life
            assert report.stopped == (BUDGET_REACHED if life < 3 else None)
            report.verify()
    with closing(sqlite3.connect(path)) as connection:
        assert set(connection.execute("SELECT spent FROM item")) == {('{"usd": 1.0}',)}


async def test_an_item_that_is_tried_again_has_spent_what_all_tries_have(path: str) -> None:
    """In its row; the report tells of this run alone."""
    tries: list[int] = []

    async def job(item: int) -> None:
        tries.append(item)
        penstock.spend(usd=len(tries))
        if len(tries) < 3:
            penstock.spend(tokens=1)
            raise ValueError

    for life in (1, 2, 3):
        async with Executor() as executor:
            report = await executor.run(job, [7], key=int, journal=Journal(path, resume="failed"))
        assert report.spent["usd"] == life
        with closing(sqlite3.connect(path)) as connection:
            (spent,) = connection.execute("SELECT spent FROM item").fetchone()
        assert json.loads(spent) == {"usd": sum(range(life + 1)), "tokens": min(life, 2)}


async def test_results_that_cannot_be_written_are_failures_to_every_rule(path: str) -> None:
    """A job whose every result is lost is not carried on to the end; instruments and the log hear of it."""
    heard = []

    class Listening:
        def notify(self, event: JobEnded) -> None:
            heard.append(event.outcome.kind)

    async def job(_item: int) -> object:
        return object()

    async with Executor(limit=1, instruments=[Listening()]) as executor:
        stream = executor.as_completed(job, range(100), key=int, journal=path, max_errors=2)
        outcomes, error = await read(stream)
        assert isinstance(error, TooManyErrors)
        assert [outcome.key for outcome in outcomes] == [0, 1, 2]
        assert all(isinstance(outcome.error, UsageError) and outcome.value is None for outcome in outcomes)
        assert {outcome.kind for outcome in outcomes} == {FailureKind.BUG}
        assert heard == [FailureKind.BUG] * 3
        assert executor.statistics().failed == {FailureKind.BUG: 3}
        report = await executor.run(job, range(100, 200), key=int, journal=path, fail_fast=5)
        assert (report.failed, report.stopped) == (5, penstock.report.ALL_FAILED)
    assert set(states(path).values()) == {State.DEAD}


# --- who listens ---


async def test_instruments_hear_of_what_is_replayed(path: str) -> None:
    """Once for each item, so that they count the whole run; a progress line does."""
    heard: list[tuple[Any, bool]] = []

    class Listening:
        def notify(self, event: JobEnded) -> None:
            heard.append((event.outcome.key, event.outcome.replayed))

    await live(refuse, [1], path)
    await live(same, [2], path)
    told = io.StringIO()
    line = ProgressLine(total=3, stream=told)
    async with Executor(instruments=[Listening(), line]) as executor:
        journal = Journal(path, on_mismatch="ignore", replay=False)
        await executor.as_completed(same, [1, 2, 3], key=int, journal=journal)
    line.close()
    assert sorted(heard) == [(1, True), (2, True), (3, False)]
    assert "3 of 3 jobs, 1 failed" in told.getvalue()


# --- intents ---


async def test_an_intent_is_in_the_file_before_its_job_begins(path: str) -> None:
    """As unknown; its outcome replaces it."""

    async def job(item: int) -> int:
        assert states(path)[item] == State.UNKNOWN
        return item

    outcomes = await live(job, range(50), path, intents=True)
    assert all(outcome.ok for outcome in outcomes)
    assert states(path) == dict.fromkeys(range(50), State.DONE)


async def test_however_many_jobs_begin_at_once_their_intents_are_committed_in_batches(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs for a while does not make one of all of them, which no statement of SQLite's could hold."""
    jobs = 2_000
    batches: list[int] = []
    all_wait = threading.Event()
    write = Store.write

    def counted(self: Store, together: Sequence[Batch]) -> None:
        assert all_wait.wait(60)
        batches.extend(len(batch.entries) for batch in together)
        write(self, together)

    monkeypatch.setattr(Store, "write", counted)
    async with Executor(limit=jobs) as executor:
        stream = executor.as_completed(same, range(jobs), key=int, journal=Journal(path, intents=True))
        reader = asyncio.ensure_future(read(stream))
        while stream.statistics().in_flight < jobs:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        all_wait.set()
        outcomes, error = await reader
    assert (len(outcomes), error) == (jobs, None)
    assert sum(batches) == jobs
    assert max(batches) <= recording.BATCH_ROWS


@pytest.mark.parametrize("on_unknown", ["dead", "rerun"])
async def test_a_job_that_was_cancelled_is_unknown(path: str, on_unknown: str) -> None:
    """Nobody knows what it has done. It is a failure until somebody has looked; or it is run, and told."""
    told = []

    async def job(item: int) -> int:
        told.append(current_job().outcome_unknown)  # type: ignore[union-attr]
        if len(told) == 1:
            await for_ever(item)
        return item

    async with Executor() as executor:
        stream = executor.as_completed(job, [1], key=int, journal=Journal(path, intents=True))
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        await reader
    assert states(path) == {1: State.UNKNOWN}
    (outcome,) = await live(job, [1], path, intents=True, on_unknown=on_unknown)
    if on_unknown == "rerun":
        assert told == [False, True]
        assert (outcome.value, outcome.replayed) == (1, False)
    else:
        assert told == [False]
        assert isinstance(outcome.error, RecordedError)
        assert outcome.error.error == "OutcomeUnknown"
        (letter,) = penstock.dead(path)
        assert (letter.key, letter.state, letter.input) == (1, "unknown", 1)


async def test_a_key_that_has_come_before_is_told_as_unknown_by_its_own_row(path: str) -> None:
    """Not by that of the first item."""
    told = {}

    async def job(item: str) -> str:
        job = current_job()
        assert job is not None
        told[job.key] = job.outcome_unknown
        if item == "left":
            await for_ever(item)
        return item

    async with Executor() as executor:
        journal = Journal(path, intents=True, duplicates="suffix")
        stream = executor.as_completed(job, ["done", "left"], key=lambda _: "a", journal=journal)
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        await reader
    journal = Journal(path, intents=True, duplicates="suffix", on_unknown="rerun")
    async with Executor() as executor:
        await executor.as_completed(job, ["done", "done"], key=lambda _: "a", journal=journal)
    assert told == {"a": False, "a#2": True}


async def unknown_after(path: str, job: Job) -> None:
    """A life of item 1 that is cancelled in the middle."""
    async with Executor() as executor:
        stream = executor.as_completed(job, [1], key=int, journal=Journal(path, intents=True, on_unknown="rerun"))
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        await reader
    assert states(path) == {1: State.UNKNOWN}


@pytest.fixture
def slow_intents(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """How long a job waits before and after the commit of its intent; nothing unless something is put here."""
    delays: list[tuple[float, float]] = []
    put_intent = Recording.put_intent

    async def put_intent_slowly(self: Recording, *args: Any, **kwargs: Any) -> None:
        before, after = delays[-1] if delays else (0, 0)
        await asyncio.sleep(before)
        await put_intent(self, *args, **kwargs)
        await asyncio.sleep(after)

    monkeypatch.setattr(Recording, "put_intent", put_intent_slowly)
    return delays


async def test_the_time_of_a_job_begins_after_its_intent(path: str, slow_intents: list[tuple[float, float]]) -> None:
    """A slow disk makes no job late, and is no work of its."""
    slow_intents.append((50, 50))

    async def job(item: int) -> int:
        await asyncio.sleep(0.5)
        return item

    async with Executor() as executor:
        journal = Journal(path, intents=True)
        stream = executor.as_completed(job, range(20), key=int, journal=journal, timeout=1)
        outcomes, error = await read(stream)
    assert error is None
    assert sorted(outcome.unwrap() for outcome in outcomes) == list(range(20))
    assert {outcome.ran for outcome in outcomes} == {0.5}


@pytest.mark.parametrize("delay", [(10, 0), (0, 10)], ids=["before its commit", "after its commit"])
@pytest.mark.parametrize("by", ["shutdown", "break"])
async def test_an_item_that_was_about_to_begin_is_as_good_as_missing(
    path: str, slow_intents: list[tuple[float, float]], delay: tuple[float, float], by: str
) -> None:
    """Its job was never called, so nobody has to look what it has done: the next run runs it like any other."""
    told: list[tuple[int, bool]] = []

    async def job(item: int) -> int:
        told.append((item, current_job().outcome_unknown))  # type: ignore[union-attr]
        return item

    async def source() -> AsyncIterator[int]:
        yield 0
        await asyncio.sleep(1)
        slow_intents.append(delay)
        yield 1
        yield 2

    async with Executor() as executor:
        stream = executor.as_completed(job, source(), key=int, journal=Journal(path, intents=True))
        async with stream:
            assert (await anext(stream)).key == 0
            await asyncio.sleep(2)
            if by == "shutdown":
                await executor.shutdown(timeout=0)
    assert told == [(0, False)]
    assert states(path) == {0: State.DONE, 1: State.RETRY, 2: State.RETRY}
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (3, 1, 2)
    assert list(penstock.dead(path)) == []
    slow_intents.clear()
    outcomes = await live(job, range(3), path, intents=True)
    assert sorted(outcome.unwrap() for outcome in outcomes) == [0, 1, 2]
    assert sorted(told) == [(0, False), (1, False), (2, False)]


async def test_a_job_that_its_run_has_left_before_it_began_never_begins(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run has ended without it: nobody would record what it does."""
    put_intent = Recording.put_intent
    go, asked = asyncio.Event(), asyncio.Event()
    begun: list[int] = []

    async def put_intent_at_last(self: Recording, *args: Any, **kwargs: Any) -> None:
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()
        asked.set()
        await put_intent(self, *args, **kwargs)

    async def job(item: int) -> None:
        begun.append(item)

    monkeypatch.setattr(Recording, "put_intent", put_intent_at_last)
    async with Executor() as executor:
        stream = executor.as_completed(job, [1], key=int, journal=Journal(path, intents=True))
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        _, error = await reader
        assert not is_held(path)
        go.set()
        await asked.wait()
    assert isinstance(error, ClosedError)
    assert begun == []
    assert states(path) == {1: State.RETRY}


@pytest.mark.parametrize("asked", ["rerun", "retry"])
async def test_who_asks_for_an_unknown_item_again_is_told_that_it_was(path: str, asked: str) -> None:
    """Whoever asked for it: the job has to look whether it has happened before."""
    told: list[bool] = []

    async def job(item: int) -> int:
        told.append(current_job().outcome_unknown)  # type: ignore[union-attr]
        if len(told) == 1:
            await for_ever(item)
        return item

    await unknown_after(path, job)
    if asked == "retry":
        assert retry(path, unknown=True) == 1
        assert states(path) == {1: State.RETRY}
    (outcome,) = await live(job, [1], path, on_unknown="rerun" if asked == "rerun" else "dead")
    assert (told, outcome.unwrap()) == ([False, True], 1)
    assert states(path) == {1: State.DONE}


@pytest.mark.parametrize("delay", [(10, 0), (0, 10)], ids=["before its commit", "after its commit"])
async def test_an_item_that_was_unknown_stays_so_when_it_has_not_begun_again(
    path: str, slow_intents: list[tuple[float, float]], delay: tuple[float, float]
) -> None:
    """A second life that never got to it has found nothing out."""
    told: list[bool] = []

    async def job(item: int) -> int:
        told.append(current_job().outcome_unknown)  # type: ignore[union-attr]
        if len(told) == 1:
            await for_ever(item)
        return item

    await unknown_after(path, job)
    slow_intents.append(delay)
    async with Executor() as executor:
        journal = Journal(path, intents=True, on_unknown="rerun")
        reader = asyncio.ensure_future(read(executor.as_completed(job, [1], key=int, journal=journal)))
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        await reader
    assert told == [False]
    slow_intents.clear()
    (outcome,) = await live(job, [1], path, intents=True, on_unknown="rerun")
    assert (told, outcome.unwrap()) == ([False, True], 1)


async def test_a_job_without_an_answer_is_unknown_and_others_are_dead(path: str) -> None:
    """What it has asked for may have happened. Its own outcome is a failure all the same; the next run tells both."""

    async def job(item: str) -> None:
        if item == "late":
            await for_ever(item)
        elif item == "cut off":
            raise penstock.ConnectionFailed("POST", "http://h/pay", "reset")
        elif item == "not sent":
            raise penstock.ConnectionFailed("POST", "http://h/pay", "refused", sent=False)
        elif item == "answered":
            raise penstock.HttpStatusError(503, "POST", "http://h/pay")
        raise penstock.CircuitOpen("http://h")

    items = ["late", "cut off", "not sent", "answered", "refused"]
    unknown = {"late", "cut off"}
    async with Executor() as executor:
        journal = Journal(path, intents=True)
        outcomes, error = await read(executor.as_completed(job, items, key=str, journal=journal, timeout=1))
    assert error is None
    assert {outcome.key for outcome in outcomes if outcome.kind is FailureKind.TRANSIENT} == set(items)
    assert states(path) == {item: State.UNKNOWN if item in unknown else State.DEAD for item in items}
    letters = {letter.key: letter for letter in penstock.dead(path)}
    assert {key for key, letter in letters.items() if letter.state == "unknown"} == unknown
    assert "ConnectionFailed" in letters["cut off"].error
    again = await live(same, items, path, intents=True, resume="failed:transient")
    assert {outcome.key for outcome in again if not outcome.replayed} == set(items) - unknown
    assert all(str(outcome.error).startswith("OutcomeUnknown") for outcome in again if outcome.replayed)


# --- what is told ---


async def test_a_filter_that_fits_none_of_the_failed_items_is_told_of(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It was misspelt, as a rule; and not where one of them fits, or where nothing had failed before."""
    caplog.set_level("WARNING", logger="penstock.journal")
    await live(same, [1], path, resume="failed:transiet")
    await live(refuse, [2], path, resume="failed:transiet")
    assert caplog.messages == []
    await live(same, [1, 2], path, resume="failed:transiet")
    assert caplog.messages == ["resume='failed:transiet' is about none of the items that failed before"]
    await live(refuse, [1, 2], path, resume="failed:ValueError")
    await live(same, [1, 2], path, resume="failed")
    assert len(caplog.messages) == 1


async def test_an_input_that_is_too_large_for_a_row_stands_beside_the_file(path: str) -> None:
    """Of items that are dead or unknown, and whole: they are to be repaired and sent again."""

    async def job(item: str) -> None:
        if item[0] == "b":
            await for_ever(item)
        raise ValueError("bad")

    items = [letter * 2 * INLINE_BYTES for letter in "ab"]
    async with Executor() as executor:
        journal = Journal(path, intents=True)
        stream = executor.as_completed(job, items, key=lambda item: item[0], journal=journal)
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        await reader
    assert states(path) == {"a": State.DEAD, "b": State.UNKNOWN}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT max(length(input)) FROM item").fetchone() == (0,)
    assert sorted(letter.input for letter in penstock.dead(path)) == items
    (outcome, *_) = await live(same, items[:1], path, resume="all")
    assert outcome.replayed is False


# --- files that are lost while they are written ---


def take_away(path: str, what: str) -> None:
    os.rename(path, f"{path}-old")
    if what == "replaced":
        Path(path).touch()


@pytest.mark.parametrize("what", ["removed", "replaced"])
@pytest.mark.parametrize("suffix", ["", "-lock"])
async def test_a_journal_that_goes_while_a_run_writes_it_ends_the_run(path: str, suffix: str, what: str) -> None:
    """SQLite would write on, into a file that nobody finds again; or two runs would do everything twice. What the run
    had got is handed over."""
    begun: list[int] = []

    async def job(item: int) -> int:
        begun.append(item)
        if item == 1:
            await asyncio.sleep(1)
            take_away(path + suffix, what)
        return item

    async def source() -> AsyncIterator[int]:
        yield 0
        yield 1
        await asyncio.sleep(100)
        yield 2

    async with Executor() as executor:
        stream = executor.as_completed(job, source(), key=int, journal=path)
        outcomes, error = await read(stream)
    assert [outcome.key for outcome in outcomes] == [0]
    assert isinstance(error, JournalError)
    assert f"run.db{suffix} was removed or replaced while a run wrote" in str(error)
    assert [outcome.unwrap() for outcome in error.unrecorded] == [1]
    assert begun == [0, 1]
    assert not is_held(path)
    os.replace(f"{path}{suffix}-old", f"{path}{suffix}")
    again = await live(same, [0, 1], path)
    assert {outcome.key: outcome.replayed for outcome in again} == {0: True, 1: False}


# --- disks that fail ---


class Locked:
    """Somebody else who keeps the database locked, for longer than anybody waits."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.05)
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def begin(self) -> None:
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._connection.execute("BEGIN IMMEDIATE")

    def end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@pytest.fixture
def locked(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Locked]:
    locked = Locked(path, monkeypatch)
    yield locked
    locked.end()


async def test_in_disk_trouble_no_more_is_begun_and_what_has_ended_is_handed_over(path: str, locked: Locked) -> None:
    """What found no place comes with the error; its items are left."""
    begun = []

    async def job(item: int) -> int:
        begun.append(item)
        if item == 2:
            locked.begin()
        await asyncio.sleep(1 if item < 2 else 5)
        return item

    async def source() -> AsyncIterator[int]:
        for item in (0, 1):
            yield item
        await asyncio.sleep(2)
        for item in (2, 3, 4):
            yield item
        await asyncio.sleep(100)
        yield 5

    async with Executor() as executor:
        stream = executor.as_completed(job, source(), key=int, journal=path)
        outcomes, error = await read(stream)
    assert sorted(outcome.key for outcome in outcomes) == [0, 1]
    assert isinstance(error, JournalError)
    assert sorted(outcome.unwrap() for outcome in error.unrecorded) == [2, 3, 4]
    assert "3 outcomes could not be recorded" in str(error)
    assert begun == [0, 1, 2, 3, 4]
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left, counts.in_flight) == (5, 2, 3, 0)
    assert not is_held(path)


@pytest.mark.parametrize("more", [False, True], ids=["all taken", "more to come"])
async def test_a_trouble_that_passes_loses_nothing(path: str, locked: Locked, more: bool) -> None:
    """All that was in flight is recorded and delivered; a run that would go on ends all the same, and says why."""

    async def job(item: int) -> int:
        if item == 1:
            await asyncio.sleep(1)
            locked.begin()
        if item == 2:
            await asyncio.sleep(5)
            locked.end()
        return item

    async def source() -> AsyncIterator[int]:
        for item in (0, 1, 2):
            yield item
        if more:
            await for_ever(None)

    async with Executor() as executor:
        stream = executor.as_completed(job, source(), key=int, journal=path)
        outcomes, error = await read(stream)
    assert sorted(outcome.key for outcome in outcomes) == [0, 1, 2]
    if more:
        assert isinstance(error, JournalError)
        assert error.unrecorded == ()
    else:
        assert error is None
    assert states(path) == dict.fromkeys([0, 1, 2], State.DONE)


async def test_a_trouble_that_does_not_pass_is_told_though_all_has_been_done(path: str, locked: Locked) -> None:
    """The last outcomes have no place: they come with the error."""

    async def job(item: int) -> int:
        await asyncio.sleep(item)
        if item == 1:
            locked.begin()
        return item

    async with Executor() as executor:
        stream = executor.as_completed(job, [0, 1, 2], key=int, journal=path)
        outcomes, error = await read(stream)
    assert [outcome.key for outcome in outcomes] == [0]
    assert isinstance(error, JournalError)
    assert sorted(outcome.unwrap() for outcome in error.unrecorded) == [1, 2]
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (3, 1, 2)


async def test_a_trouble_that_comes_while_a_run_ends_tells_both(path: str, locked: Locked) -> None:
    """The journal's error, with a note of the other."""

    async def job(item: int) -> int:
        locked.begin()
        await asyncio.sleep(1)
        raise ValueError(item)

    async with Executor() as executor:
        outcomes, error = await read(executor.as_completed(job, [0], key=int, journal=path, max_errors=0))
    assert outcomes == []
    assert isinstance(error, JournalError)
    assert any("the run was about to end" in note for note in error.__notes__)
    assert isinstance(error.unrecorded[0].error, ValueError)


async def test_a_job_whose_intent_found_no_place_has_not_begun(path: str, locked: Locked) -> None:
    """It is left, and is no dead letter when the disk works again."""
    begun = []

    async def job(item: int) -> int:
        begun.append(item)
        if item == 0:
            await asyncio.sleep(1)
            locked.begin()
            await asyncio.sleep(10)
            locked.end()
        return item

    async def source() -> AsyncIterator[int]:
        yield 0
        await asyncio.sleep(2)
        for item in (1, 2, 3):
            yield item
        await for_ever(None)

    async with Executor() as executor:
        stream = executor.as_completed(job, source(), key=int, journal=Journal(path, intents=True))
        outcomes, error = await read(stream)
    assert [outcome.key for outcome in outcomes] == [0]
    assert isinstance(error, JournalError)
    assert begun == [0]
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (4, 1, 3)
    assert not {State.DEAD, State.UNKNOWN} & set(states(path).values())
    with closing(sqlite3.connect(path)) as connection:
        (counted,) = connection.execute("SELECT counts FROM run").fetchone()
    assert '"left": 3' in counted


async def test_a_job_that_could_not_begin_is_told_of_though_the_source_is_at_its_end(path: str, locked: Locked) -> None:
    """Nothing is unrecorded, but not all has been done."""

    async def source() -> AsyncIterator[int]:
        yield 0
        await asyncio.sleep(1)
        locked.begin()
        yield 1

    async with Executor() as executor:
        stream = executor.as_completed(same, source(), key=int, journal=Journal(path, intents=True))
        outcomes, error = await read(stream)
    assert [outcome.key for outcome in outcomes] == [0]
    assert isinstance(error, JournalError)
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (2, 1, 1)


CLOSED_LOOP = """
import asyncio, gc, itertools, sys, time, penstock
from penstock.journal.lock import is_held

async def job(item):
    if item:
        await asyncio.Event().wait()
    return item

async def begin():
    executor = await penstock.Executor(limit=2).__aenter__()
    stream = executor.as_completed(job, itertools.count(), key=int, journal=sys.argv[1])
    assert (await anext(stream)).key == 0
    return executor, stream

loop = asyncio.new_event_loop()
kept = loop.run_until_complete(begin())
loop.close()
del kept
until = time.monotonic() + 10
while is_held(sys.argv[1]) and time.monotonic() < until:  # a thread of it may be at the disk just now
    gc.collect()
print(is_held(sys.argv[1]))
"""


@pytest.mark.may_leave("errors")  # asyncio tells of each task that was left to a closed loop
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # and so do executor and stream
def test_a_program_goes_on_when_a_loop_was_closed_under_a_stream(path: str) -> None:
    """A notebook, for example: another run on the same journal may begin at once, and goes on where that one was."""

    async def job(item: int) -> int:
        if item:
            await for_ever(item)
        return item

    async def begin() -> tuple[Executor, Stream[Outcome[Any]]]:
        executor = await Executor(limit=2).__aenter__()
        stream = executor.as_completed(job, itertools.count(), key=int, journal=path)
        assert (await anext(stream)).key == 0
        return executor, stream

    loop = asyncio.new_event_loop()
    kept: list[Any] = [loop.run_until_complete(begin())]
    loop.close()
    kept.clear()
    until = time.monotonic() + 10
    while is_held(path) and time.monotonic() < until:  # a thread of it may be at the disk just now
        gc.collect()
    assert not is_held(path)
    outcomes = run_in_virtual_time(live(same, [0, 1], path))
    assert {outcome.key: outcome.replayed for outcome in outcomes} == {0: True, 1: False}


def test_a_loop_that_is_closed_under_a_stream_takes_the_lock_with_it(path: str) -> None:
    """A program that does not wait for its end: what was delivered is recorded, and the next run may begin."""
    command = [sys.executable, "-W", "ignore", "-c", CLOSED_LOOP, path]
    ended = subprocess.run(command, capture_output=True, timeout=60, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, "False"), ended.stderr
    assert "ignored" not in ended.stderr
    assert states(path) == {0: State.DONE}
