"""Sources of a stream with a journal: read ahead within bounds, asked about by the hundred, and let go at the end."""

import asyncio
import itertools
import logging
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from penstock import ClosedError, Executor, JournalError, Outcome, Stream, TooManyErrors, UsageError, pull_in_thread
from penstock.executor.lookahead import ITEMS_AHEAD
from penstock.executor.running import PATIENCE
from penstock.executor.sources import BLOCKS, LONGEST_TURN
from penstock.journal.lock import is_held
from penstock.journal.store import Store
from penstock.testing import run_in_virtual_time

pytestmark = pytest.mark.virtual_clock

MOST_AHEAD = 3 * ITEMS_AHEAD
"""Items that may have been taken from a source and not by a job: those that wait for their look-up, those that it has
found, and those that are being taken."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


async def same(item: int) -> int:
    return item


async def slow_same(item: int) -> int:
    await asyncio.sleep(10)
    return item


async def for_ever(_item: Any) -> None:
    await asyncio.Event().wait()


async def read(stream: Stream[Outcome[Any]]) -> tuple[list[Any], BaseException | None]:
    """Keys of the outcomes that come before the stream's own error, and that."""
    keys = []
    async with stream:
        try:
            async for outcome in stream:
                keys.append(outcome.key)
        except Exception as error:  # noqa: BLE001  # it is looked at by the tests
            return keys, error
    return keys, None


async def trickle(*items: int, every: float = 1.0) -> AsyncIterator[int]:
    for item in items:
        await asyncio.sleep(every)
        yield item


class Numbers:
    """An async iterable that is no iterator: its iterator is made for who reads it, and is theirs to close."""

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit
        self.closed = 0

    async def __aiter__(self) -> AsyncIterator[int]:
        try:
            for number in range(self.limit):
                yield number
                await asyncio.sleep(1)
        finally:
            await asyncio.sleep(1)
            self.closed += 1


# --- all kinds of sources ---


@pytest.mark.parametrize(
    "source",
    [
        lambda: [0, 1, 2],
        lambda: range(3),
        lambda: (number for number in range(3)),
        lambda: {0: "a", 1: "b", 2: "c"},
        lambda: trickle(0, 1, 2),
        lambda: trickle(0, 1, 2, every=0),
        Numbers,
        lambda: pull_in_thread(iter(range(3))),
    ],
    ids=["list", "range", "generator", "dict", "slow", "async", "iterable", "thread"],
)
@pytest.mark.parametrize("limit", [1, 2, 10])
async def test_every_kind_of_source_is_read_to_its_end(source: Callable[[], Any], limit: int, path: str) -> None:
    """Each item is run once, also where one job runs at a time and one outcome may wait."""
    async with Executor(limit=limit) as executor:
        stream = executor.as_completed(same, source(), key=int, journal=path, buffersize=1)
        keys, error = await read(stream)
    assert (sorted(keys), error) == ([0, 1, 2], None)
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (3, 3, 0)


async def test_an_empty_source_ends_at_once(path: str) -> None:
    """Nothing is looked up, and the run is recorded."""
    async with Executor() as executor:
        assert await read(executor.as_completed(same, [], key=int, journal=path)) == ([], None)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM run WHERE ended IS NOT NULL").fetchone() == (1,)


async def test_a_slow_source_is_not_made_to_wait_for_a_batch(path: str) -> None:
    """Each outcome is there before the next item is: nobody waits until some hundred can be asked about."""
    loop = asyncio.get_running_loop()
    began, came = loop.time(), []
    async with Executor() as executor:
        async with executor.as_completed(same, trickle(1, 2, 3), key=int, journal=path) as stream:
            async for outcome in stream:
                came.append((outcome.key, loop.time() - began))
    assert came == [(1, 1.0), (2, 2.0), (3, 3.0)]


async def test_a_fast_source_is_asked_about_by_the_hundred(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are at hand; and never more than the bound."""
    asked: list[int] = []
    look_up = Store.look_up

    def counted(self: Store, keys: list[Any], with_steps: bool) -> Any:
        asked.append(len(keys))
        return look_up(self, keys, with_steps)

    monkeypatch.setattr(Store, "look_up", counted)
    async with Executor(limit=10) as executor:
        keys, _ = await read(executor.as_completed(same, range(3 * ITEMS_AHEAD), key=int, journal=path))
    assert sorted(keys) == list(range(3 * ITEMS_AHEAD))
    assert sum(asked) == 3 * ITEMS_AHEAD
    assert max(asked) <= ITEMS_AHEAD
    assert len(asked) <= 6


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_endless_source_is_read_ahead_within_bounds(kind: str, path: str) -> None:
    """However long the jobs take; and what was read and not run is left."""
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield number

    async def endlessly() -> AsyncIterator[int]:
        for number in endless():
            yield number

    async with Executor(limit=2) as executor:
        async with executor.as_completed(
            for_ever, endless() if kind == "sync" else endlessly(), key=int, journal=path
        ) as stream:
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.wait([reader], timeout=100)
            assert ITEMS_AHEAD <= taken <= MOST_AHEAD
            reader.cancel()
            await asyncio.wait([reader])
    counts = stream.statistics()
    assert counts.read == counts.left == taken


@pytest.mark.parametrize("buffersize", [1, 5])
async def test_who_sets_the_buffer_has_little_read_ahead(buffersize: int, path: str) -> None:
    """For a source whose items are large, or not to be taken before their time."""
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    most = 0
    async with Executor(limit=1) as executor:
        async with executor.as_completed(same, source(), key=int, journal=path, buffersize=buffersize) as stream:
            async for _ in stream:
                counts = stream.statistics()
                most = max(most, len(taken) - counts.read)
                await asyncio.sleep(1)
    assert len(taken) == 100
    assert most <= 3 * buffersize


async def test_a_slow_reader_holds_up_the_pull(path: str) -> None:
    """Items and outcomes that are alive have a bound, however many the source has and however fast the jobs are."""
    alive = most = 0

    class Item:
        def __init__(self, number: int) -> None:
            nonlocal alive, most
            self.number = number
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    async def job(item: Item) -> int:
        await asyncio.sleep(0.01)
        return item.number

    items = 4 * MOST_AHEAD
    async with Executor(limit=8) as executor:
        stream = executor.as_completed(job, map(Item, range(items)), key=lambda item: item.number, journal=path)
        count = 0
        async with stream:
            async for outcome in stream:
                count += 1
                if count % 500 == 1:
                    await asyncio.sleep(5)  # much longer than a commit
                del outcome
    assert count == items
    assert most < MOST_AHEAD + 1_000
    assert alive <= 1


# --- sources that fail ---


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    ("raised", "comes"),
    [
        (OSError("gone"), OSError),
        (SystemExit("gone"), UsageError),
        (asyncio.CancelledError("gone"), UsageError),
    ],
    ids=["error", "exit", "cancelled"],
)
async def test_what_came_before_a_source_s_error_is_delivered_first(
    kind: str, raised: BaseException, comes: type[BaseException], path: str
) -> None:
    """Then the error comes to the reader; nothing that a source raises ends the program."""

    def fails() -> Iterator[int]:
        yield from range(3)
        raise raised

    async def fails_too() -> AsyncIterator[int]:
        for number in range(3):
            yield number
        raise raised

    async with Executor() as executor:
        stream = executor.as_completed(same, fails() if kind == "sync" else fails_too(), key=int, journal=path)
        keys, error = await read(stream)
    assert sorted(keys) == [0, 1, 2]
    assert type(error) is comes
    assert "gone" in str(error) or "gone" in str(error.__cause__)
    assert stream.statistics().left == 0


async def test_an_iterable_that_cannot_be_iterated_says_so(path: str) -> None:
    """Its own error, as if it came with its first item."""

    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no file")

    async with Executor() as executor:
        keys, error = await read(executor.as_completed(same, Broken(), key=int, journal=path))
    assert keys == []
    assert str(error) == "no file"


def test_ctrl_c_in_a_source_ends_the_program(path: str) -> None:
    """It is meant for the program, and comes out of its loop; the journal is free for the next run."""

    def interrupted() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    async def main() -> None:
        async with Executor() as executor:
            await read(executor.as_completed(same, interrupted(), key=int, journal=path))

    with pytest.raises(KeyboardInterrupt):
        run_in_virtual_time(main())
    assert not is_held(path)


# --- sources that block ---


def slowly(items: int, seconds: float) -> Iterator[int]:
    """A source that keeps the processor, as one that blocks keeps the loop: what is measured is that it does."""
    for number in range(items):
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        yield number


async def in_real_time(path: str, source: Iterator[int], job: Callable[[int], Any]) -> list[Any]:
    async with Executor(limit=50) as executor:
        outcomes = await executor.as_completed(job, source, key=int, journal=path)
    return [outcome.unwrap() for outcome in outcomes]


def test_the_loop_gets_a_turn_while_a_slow_source_is_read(path: str) -> None:
    """The first job runs long before the source is at its end."""
    pulled: list[int] = []

    def source() -> Iterator[int]:
        for number in slowly(50, 2 * LONGEST_TURN):
            pulled.append(number)
            yield number

    async def how_many_had_been_pulled(_item: int) -> int:
        return len(pulled)

    assert min(asyncio.run(in_real_time(path, source(), how_many_had_been_pulled))) <= 10


def test_a_source_that_blocks_the_loop_is_named_once(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A warning with the cure; not one for each item."""
    asyncio.run(in_real_time(path, slowly(3, 1.2 * BLOCKS), same))
    (warning,) = [record for record in caplog.records if record.name == "penstock.sources"]
    assert warning.levelno == logging.WARNING
    assert "penstock.pull_in_thread(items)" in warning.getMessage()


# --- sources that are left early ---


async def test_an_iterator_that_was_made_for_the_stream_is_closed_with_it(path: str) -> None:
    """It is waited for; what it has to clean up is cleaned up."""
    numbers = Numbers(1_000)
    async with Executor(limit=1) as executor:
        async with executor.as_completed(same, numbers, key=int, journal=path) as stream:
            async for _ in stream:
                break
    assert numbers.closed == 1


async def test_a_source_is_waited_for_though_its_own_item_has_ended_the_run(path: str) -> None:
    """It is in the middle of an item when a rule of the run says that it is enough."""
    numbers = Numbers(1_000)

    def refuse(item: int) -> int:
        raise KeyError(item)

    async with Executor() as executor:
        stream = executor.as_completed(same, numbers, key=refuse, journal=path, max_errors=0)
        keys, error = await read(stream)
    assert keys == [None]
    assert isinstance(error, TooManyErrors)
    assert numbers.closed == 1


async def test_a_generator_that_was_handed_over_can_be_read_on(path: str) -> None:
    """As after a `break` out of a `for`: it is whose who made it."""
    source = iter(range(100_000))
    async with Executor(limit=1) as executor:
        async with executor.as_completed(same, source, key=int, journal=path) as stream:
            async for _ in stream:
                break
    assert next(source) == stream.statistics().read


async def test_a_source_that_waits_for_ever_is_let_go(path: str) -> None:
    """Also where no item has come yet; nothing is waited for."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def never() -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 1

    async with Executor() as executor:
        async with executor.as_completed(same, never(), key=int, journal=path) as stream:
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.wait([reader], timeout=1)
            reader.cancel()
            await asyncio.wait([reader])
    assert loop.time() == began + 1


async def test_a_source_that_swallows_its_cancellation_is_read_no_further(path: str) -> None:
    """It is asked for one more item at the most, which is left."""
    loop = asyncio.get_running_loop()

    async def stubborn() -> AsyncGenerator[int, None]:
        for number in itertools.count():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1)
            yield number

    source = stubborn()
    async with Executor() as executor:
        async with executor.as_completed(same, source, key=int, journal=path) as stream:
            assert (await anext(stream)).key == 0
            began = loop.time()
    assert loop.time() - began < PATIENCE
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (2, 1, 1)
    await source.aclose()


async def test_a_source_that_does_not_let_go_is_waited_for_within_bounds(path: str) -> None:
    """What it gives all the same is nobody's any more, and disturbs nobody."""
    loop = asyncio.get_running_loop()

    async def lingering() -> AsyncGenerator[int, None]:
        yield 0
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(2 * PATIENCE)
            yield 1

    source = lingering()
    async with Executor() as executor:
        async with executor.as_completed(same, source, key=int, journal=path) as stream:
            assert (await anext(stream)).key == 0
            began = loop.time()
        assert loop.time() - began == pytest.approx(PATIENCE, abs=0.01)
    assert not is_held(path)
    (lookahead,) = [task for task in asyncio.all_tasks() if task.get_name() == "penstock-lookahead"]
    await asyncio.wait([lookahead], timeout=3 * PATIENCE)
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (1, 1, 0)
    await source.aclose()


async def test_an_iterator_that_does_not_let_itself_be_closed_has_a_bound_of_its_own(path: str) -> None:
    """Then it is told so once more, and the stream is over."""
    loop = asyncio.get_running_loop()
    told = []

    class Lingering:
        async def __aiter__(self) -> AsyncIterator[int]:
            try:
                for number in itertools.count():
                    yield number
            finally:
                try:
                    await asyncio.sleep(100)
                except asyncio.CancelledError:
                    told.append(loop.time() - began)
                    raise

    async with Executor(limit=1) as executor:
        stream = executor.as_completed(for_ever, Lingering(), key=int, journal=path)
        async with stream:
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.wait([reader], timeout=1)
            reader.cancel()
            began = loop.time()
    assert told == [PATIENCE]
    await asyncio.wait([reader])
    assert not is_held(path)


async def test_a_task_that_somebody_else_cancels_ends_the_stream(path: str) -> None:
    """What was read before is not run, or is; the reader is told by an error, and nothing hangs."""
    async with Executor(limit=1) as executor:
        async with executor.as_completed(same, trickle(1, 2, 3), key=int, journal=path) as stream:
            assert (await anext(stream)).key == 1
            (reader,) = [task for task in asyncio.all_tasks() if task.get_name() == "penstock-lookahead"]
            reader.cancel()
            with pytest.raises(ClosedError, match="the task that reads the source was cancelled"):
                await anext(stream)


async def test_the_end_of_a_loop_that_cancels_everything_ends_the_stream(path: str) -> None:
    """As `asyncio.run` does for what a program has left; the journal is free then."""
    async with Executor(limit=2) as executor:
        async with executor.as_completed(for_ever, itertools.count(), key=int, journal=path) as stream:
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.wait([reader], timeout=1)
            for task in asyncio.all_tasks() - {asyncio.current_task(), reader}:
                task.cancel()
            with pytest.raises(ClosedError):
                await reader
    assert not is_held(path)
    counts = stream.statistics()
    assert counts.read == counts.left


# --- keys ---


class Number:
    """As an integer of another library."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class Numbered:
    """As an array of another library: an integer only if it holds one."""

    def __index__(self) -> int:
        raise TypeError("only integer scalar arrays can be converted to a scalar index")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (None, "of type NoneType"),
        (True, "of type bool"),
        (object(), "of type object"),
        (Numbered(), "of type Numbered"),
        ((1, 2), "of type tuple"),
        (float("nan"), "no finite number"),
        (1 << 63, "a whole number of more than 64 bits"),
        ("\ud800", "text with lone surrogates"),
    ],
    ids=["none", "bool", "object", "array", "tuple", "nan", "large", "surrogate"],
)
async def test_an_item_whose_key_cannot_be_recorded_fails_and_the_others_go_on(key: Any, said: str, path: str) -> None:
    """It is not given to its job; it is recorded without a key, and asked for anew by the next run."""
    asked: list[int] = []

    def key_of(item: int) -> Any:
        asked.append(item)
        return key if item == 2 else item

    for life in range(2):
        async with Executor() as executor:
            outcomes = await executor.as_completed(same, [1, 2, 3], key=key_of, journal=path)
        by_item = {outcome.input: outcome for outcome in outcomes}
        assert (by_item[1].value, by_item[3].value) == (1, 3)
        assert [by_item[item].replayed for item in (1, 2, 3)] == [life == 1, False, life == 1]
        assert by_item[2].key is None
        assert isinstance(by_item[2].error, UsageError)
        assert said in str(by_item[2].error)
        assert asked == [1, 2, 3] * (life + 1)
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT count(*), count(key) FROM item").fetchone() == (3, 2)


async def test_an_integer_of_another_library_is_one(path: str) -> None:
    """Its outcome has the plain one for a key, which the journal knows the next time."""
    for life in range(2):
        async with Executor() as executor:
            (outcome,) = await executor.as_completed(same, [7], key=Number, journal=path)
        assert (outcome.key, type(outcome.key), outcome.replayed) == (7, int, life == 1)


@pytest.mark.parametrize("raised", [KeyError("id"), SystemExit(2), asyncio.CancelledError()], ids=repr)
async def test_an_item_whose_key_raises_fails_and_the_others_go_on(raised: BaseException, path: str) -> None:
    """Whatever it raises; the cause is told."""

    def key_of(item: int) -> int:
        if item == 2:
            raise raised
        return item

    async with Executor() as executor:
        outcomes = await executor.as_completed(same, [1, 2, 3], key=key_of, journal=path)
    (failed,) = [outcome for outcome in outcomes if not outcome.ok]
    assert (failed.key, failed.input) == (None, 2)
    assert isinstance(failed.error, UsageError)
    assert failed.error.__cause__ is raised


async def test_items_without_a_key_are_never_the_same(path: str) -> None:
    """Nobody knows whether one has come twice, so none is left out."""
    async with Executor() as executor:
        outcomes = await executor.as_completed(same, [1, 1], key=lambda _item: None, journal=path)
    assert len(outcomes) == 2


# --- journals that fail ---


async def test_a_row_that_is_damaged_ends_the_run_after_what_came_before(path: str) -> None:
    """Its error names the key; items that were read and not looked up are left."""
    async with Executor() as executor:
        await read(executor.as_completed(same, [7], key=int, journal=path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE item SET result = '8'")
        connection.commit()

    async def source() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(1)
        yield 7
        yield 8
        await asyncio.Event().wait()

    async with Executor() as executor:
        stream = executor.as_completed(same, source(), key=int, journal=path)
        keys, error = await read(stream)
    assert keys == [1]
    assert isinstance(error, JournalError)
    assert "the row of 7" in str(error)
    counts = stream.statistics()
    assert (counts.read, counts.finished, counts.left) == (3, 1, 2)


async def test_a_damaged_row_is_told_though_the_source_is_at_its_end(path: str) -> None:
    """It is not taken for an end."""
    async with Executor() as executor:
        await read(executor.as_completed(same, [7], key=int, journal=path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE item SET result = '8'")
        connection.commit()
    async with Executor() as executor:
        keys, error = await read(executor.as_completed(same, [7], key=int, journal=path))
    assert keys == []
    assert isinstance(error, JournalError)


async def test_a_stream_that_is_closed_while_it_looks_up_takes_no_notice_of_the_answer(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items whose look-up is under way are left."""
    look_up, asked, answer = Store.look_up, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(self: Store, *args: Any) -> Any:
        loop.call_soon_threadsafe(asked.set)
        assert answer.wait(10)
        return look_up(self, *args)

    monkeypatch.setattr(Store, "look_up", slow)
    async with Executor() as executor:
        async with executor.as_completed(same, [1, 2, 3], key=int, journal=path) as stream:
            reader = asyncio.ensure_future(anext(stream))
            await asked.wait()
            reader.cancel()
            await asyncio.wait([reader])
            closing_it = asyncio.ensure_future(stream.aclose())
            await asyncio.sleep(0)
            answer.set()
            await closing_it
    counts = stream.statistics()
    assert (counts.read, counts.left) == (3, 3)


async def test_a_row_that_is_damaged_is_told_when_its_turn_has_come(path: str) -> None:
    """Items before it that wait for a slot are run; the source is let go meanwhile."""
    async with Executor() as executor:
        await read(executor.as_completed(slow_same, [7], key=int, journal=path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE item SET result = '8'")
        connection.commit()
    let_go = []

    async def source() -> AsyncIterator[int]:
        try:
            async for item in trickle(1, 2, 7, every=0.1):
                yield item
            await asyncio.Event().wait()
        finally:
            let_go.append(asyncio.get_running_loop().time() - began)

    async with Executor(limit=1) as executor:
        began = asyncio.get_running_loop().time()
        stream = executor.as_completed(slow_same, source(), key=int, journal=path)
        keys, error = await read(stream)
    assert keys == [1, 2]
    assert isinstance(error, JournalError)
    assert "the row of 7" in str(error)
    assert let_go == [pytest.approx(0.3)]
