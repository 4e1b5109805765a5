"""Streams: what `map` and `as_completed` promise about order, bounds, errors and leaving early."""

import asyncio
import contextlib
import gc
import itertools
import logging
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from operator import itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import (
    ClosedError,
    Executor,
    FailureKind,
    JobTimeout,
    Outcome,
    Stream,
    TooManyErrors,
    UsageError,
    current_job,
    pull_in_thread,
)
from penstock.testing import run_in_virtual_time

pytestmark = pytest.mark.virtual_clock


async def double(item: int) -> int:
    await asyncio.sleep(1)
    return 2 * item


def counted(source: list[int], limit: int | None = None) -> Iterator[int]:
    """0, 1, 2 ...; `source` gets each number as it is taken."""
    for number in itertools.count() if limit is None else range(limit):
        source.append(number)
        yield number


async def test_awaiting_a_map_gives_all_values_in_input_order() -> None:
    """Jobs that end in reverse order are still delivered in the order of their items."""

    async def later_first(item: int) -> int:
        await asyncio.sleep(100 - item)
        return item

    async with Executor(limit=20) as executor:
        assert await executor.map(later_first, range(50)) == list(range(50))


async def test_as_completed_delivers_in_the_order_of_completion() -> None:
    """The first to finish is the first to come."""

    async def sleep_for(item: int) -> int:
        await asyncio.sleep(item)
        return item

    async with Executor() as executor:
        outcomes = await executor.as_completed(sleep_for, [3, 1, 2])
    assert [outcome.value for outcome in outcomes] == [1, 2, 3]


async def test_an_outcome_tells_key_input_value_and_time() -> None:
    """`key=` names the outcome; `ran` is the time of the job on the loop's own clock."""

    async def score(record: dict[str, int]) -> int:
        await asyncio.sleep(3)
        return record["id"] + 1

    async with Executor() as executor:
        (outcome,) = await executor.as_completed(score, [{"id": 7}], key=itemgetter("id"))
    assert (outcome.key, outcome.input, outcome.value, outcome.ran) == (7, {"id": 7}, 8, 3.0)
    assert outcome.ok
    assert outcome.unwrap() == 8
    assert not outcome.replayed


async def test_as_completed_never_raises_a_jobs_error(caplog: pytest.LogCaptureFixture) -> None:
    """Errors are data: the other items are not touched by them."""

    async def fail_odd(item: int) -> int:
        if item % 2:
            raise ValueError(item)
        return item

    async with Executor() as executor:
        outcomes = await executor.as_completed(fail_odd, range(10))
    assert sorted(o.input for o in outcomes if o.ok) == [0, 2, 4, 6, 8]
    assert {(o.input, o.kind, repr(o.error)) for o in outcomes if not o.ok} == {
        (i, FailureKind.PERMANENT, f"ValueError({i})") for i in (1, 3, 5, 7, 9)
    }
    assert "ValueError" in caplog.text


async def test_map_raises_the_first_error_in_input_order_and_cancels_the_rest() -> None:
    """What comes before the error is delivered; what is in flight behind it is cancelled; nothing more is pulled."""
    pulled: list[int] = []

    async def job(item: int) -> int:
        await asyncio.sleep(1 if item < 4 else 1_000)
        if item == 3:
            raise ValueError("three")
        return item

    async with Executor(limit=5) as executor:
        values = []
        stream = executor.map(job, counted(pulled), buffersize=10)
        with pytest.raises(ValueError, match="three"):
            async for value in stream:
                values.append(value)  # the values before the error are the point
        assert values == [0, 1, 2]
        statistics = executor.statistics()
        assert statistics.jobs == 0
        assert statistics.done + sum(statistics.failed.values()) + statistics.cancelled == len(pulled)
        assert len(pulled) <= 10


async def test_map_takes_several_iterables_side_by_side_to_the_end_of_the_shortest() -> None:
    """As the built-in `map`, and async iterables may be among them."""

    async def letters() -> AsyncIterator[str]:
        for letter in "abc":
            yield letter

    async def join(number: int, letter: str, flag: bool) -> str:
        return f"{number}{letter}{flag}"

    async def plain(number: int, other: int) -> int:
        return number * other

    async with Executor() as executor:
        assert await executor.map(join, itertools.count(), letters(), [True] * 5) == ["0aTrue", "1bTrue", "2cTrue"]
        assert await executor.map(plain, [1, 2, 3], [4, 5]) == [4, 10]


async def test_items_come_from_an_async_iterable_that_makes_us_wait() -> None:
    """A source that is slow costs its own time only: jobs overlap with it."""

    async def slow() -> AsyncIterator[int]:
        for number in range(5):
            await asyncio.sleep(10)
            yield number

    loop = asyncio.get_running_loop()
    started = loop.time()
    async with Executor() as executor:
        assert await executor.map(double, slow()) == [0, 2, 4, 6, 8]
    assert loop.time() - started == pytest.approx(51)


async def test_a_stream_feeds_another_stream_of_the_same_executor_with_a_single_slot() -> None:
    """A pipeline of streams does not deadlock: no slot is held while an async source makes us wait."""
    async with Executor(limit=1) as executor, executor.map(double, range(20)) as first:
        assert await executor.map(double, first) == [4 * n for n in range(20)]


async def test_a_file_is_a_source(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lines of an open file, one job each."""
    path = tmp_path_factory.mktemp("source") / "lines.txt"
    path.write_text("one\ntwo\n")

    async def length(line: str) -> int:
        return len(line.strip())

    with path.open() as lines:
        async with Executor() as executor:
            assert await executor.map(length, lines) == [3, 3]


async def test_an_endless_source_is_pulled_only_as_far_as_the_window() -> None:
    """A reader that stops reading stops the pull: at most `buffersize` items are between source and reader."""
    pulled: list[int] = []
    async with Executor(limit=4) as executor:
        async with executor.as_completed(double, counted(pulled), buffersize=10) as stream:
            async for _ in stream:
                break
            await asyncio.sleep(1_000)
            assert len(pulled) == 11
            statistics = stream.statistics()
            assert (statistics.read, statistics.finished, statistics.ready) == (11, 11, 10)
        assert executor.statistics().jobs == 0


async def test_a_straggler_at_the_head_holds_no_more_than_the_window() -> None:
    """In input order, what has finished behind a straggler is bounded."""
    pulled: list[int] = []

    async def straggle(item: int) -> int:
        await asyncio.sleep(10_000 if item == 0 else 1)
        return item

    async with Executor(limit=4) as executor, executor.map(straggle, counted(pulled), buffersize=50) as stream:
        async for value in stream:
            assert value == 0
            assert len(pulled) <= 51
            break


@given(limit=st.integers(1, 8), buffersize=st.integers(1, 8), items=st.integers(0, 60), ordered=st.booleans())
def test_limit_and_window_hold_for_any_sizes(limit: int, buffersize: int, items: int, ordered: bool) -> None:
    """Never more than `limit` jobs run, never more than `buffersize` items are out, and every item is delivered."""
    running = most = 0

    async def job(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep((item * 7) % 5)
        running -= 1
        return item

    async def main() -> None:
        pulled: list[int] = []
        source = counted(pulled, items)
        delivered: list[int] = []
        async with Executor(limit=limit) as executor:
            if ordered:
                async with executor.map(job, source, buffersize=buffersize) as values:
                    async for value in values:
                        assert len(pulled) - len(delivered) <= buffersize
                        delivered.append(value)
                assert delivered == list(range(items))
            else:
                async with executor.as_completed(job, source, buffersize=buffersize) as outcomes:
                    async for outcome in outcomes:
                        assert len(pulled) - len(delivered) <= buffersize
                        delivered.append(outcome.unwrap())
                assert sorted(delivered) == list(range(items))
        assert most <= min(limit, buffersize)

    run_in_virtual_time(main())


async def test_break_under_async_with_leaves_nothing_behind() -> None:
    """Jobs in flight are cancelled and have ended when the block is left."""
    running = 0

    async def job(item: int) -> int:
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(item)
        finally:
            running -= 1
        return item

    async with Executor(limit=8) as executor:
        async with executor.map(job, itertools.count()) as stream:
            async for value in stream:
                if value == 2:
                    break
        assert running == 0
        statistics = executor.statistics()
        assert (statistics.jobs, statistics.cancelled) == (0, 8)
        with pytest.raises(ClosedError, match="before its source was read to its end"):
            await anext(stream)


async def test_break_without_async_with_is_cleaned_up_with_a_warning() -> None:
    """The garbage collector cancels what is in flight and says how to write it."""
    async with Executor(limit=4) as executor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            async for _ in executor.map(double, itertools.count()):
                break
            gc.collect()
        assert [w.category for w in caught] == [ResourceWarning]
        assert "async with executor.map" in str(caught[0].message)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert executor.statistics().jobs == 0


async def test_a_stream_that_is_never_used_says_so() -> None:
    """A forgotten `await` is the commonest mistake; nothing has been pulled."""
    pulled: list[int] = []
    async with Executor() as executor:
        with pytest.warns(RuntimeWarning, match="never used: await it or iterate it"):
            executor.map(double, counted(pulled))
            gc.collect()
    assert not pulled


async def test_a_source_that_raises_ends_the_stream_after_what_came_before() -> None:
    """The source's own error is raised, when all items before it have been delivered."""

    def broken() -> Iterator[int]:
        yield from range(5)
        raise OSError("disk gone")

    delivered = []
    async with Executor() as executor, executor.as_completed(double, broken()) as stream:
        with pytest.raises(OSError, match="disk gone"):
            async for outcome in stream:
                delivered.append(outcome.value)
        assert stream.statistics().read == 5
    assert set(delivered) == {0, 2, 4, 6, 8}


async def test_a_source_that_wants_to_exit_does_not_end_the_loop() -> None:
    """`SystemExit` from a source is an error for the reader."""

    def leaving() -> Iterator[int]:
        yield 1
        raise SystemExit(3)

    async with Executor() as executor:
        with pytest.raises(UsageError, match=r"source of the items raised SystemExit"):
            await executor.map(double, leaving())


async def test_a_key_function_that_raises_fails_its_item_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The item is an outcome of kind bug; the others run."""
    async with Executor() as executor:
        outcomes = await executor.as_completed(len_of, [{"id": "a"}, {}, {"id": "bc"}], key=itemgetter("id"))
    assert sorted(str(o.key) for o in outcomes) == ["None", "a", "bc"]
    (failed,) = [o for o in outcomes if not o.ok]
    assert failed.kind is FailureKind.BUG
    assert isinstance(failed.error, UsageError)
    assert "key= raised KeyError('id') for item {}" in str(failed.error)
    assert failed.input == {}
    assert "key= raised" in caplog.text


async def len_of(record: dict[str, str]) -> int:
    return len(record["id"])


async def test_timeout_is_per_job_and_counted_from_its_start() -> None:
    """A job that takes too long fails alone, whatever the time the others had to wait for a slot."""

    async def job(item: int) -> int:
        await asyncio.sleep(item)
        return item

    async with Executor(limit=1) as executor:
        outcomes = await executor.as_completed(job, [4, 6, 4], timeout=5)
    assert [o.value for o in outcomes] == [4, None, 4]
    assert isinstance(outcomes[1].error, JobTimeout)
    assert isinstance(outcomes[1].error, TimeoutError)
    assert outcomes[1].kind is FailureKind.TRANSIENT
    assert outcomes[1].ran == 5.0


async def test_a_timeout_of_the_jobs_own_stays_its_own() -> None:
    """A TimeoutError that the job raises is not mistaken for the stream's."""

    async def job(_item: int) -> None:
        raise TimeoutError("mine")

    async with Executor() as executor:
        (outcome,) = await executor.as_completed(job, [1], timeout=5)
    assert repr(outcome.error) == "TimeoutError('mine')"


async def test_a_job_that_swallows_its_timeout_is_told_so() -> None:
    """The job went on after its time: its outcome says what to write."""

    async def stubborn(_item: int) -> str:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(1)
        return "done all the same"

    async with Executor() as executor:
        (outcome,) = await executor.as_completed(stubborn, [1], timeout=5)
    assert isinstance(outcome.error, JobTimeout)
    assert "Re-raise asyncio.CancelledError" in str(outcome.error)


async def test_a_job_that_swallows_its_cancellation_is_abandoned_with_an_error_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Leaving a stream is bounded in time: after 5 s the job is named, and its item is `left`."""
    release = asyncio.Event()

    async def stubborn(_item: int) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    loop = asyncio.get_running_loop()
    async with Executor(limit=2) as executor:
        async with executor.as_completed(stubborn, itertools.count()) as stream:
            await asyncio.sleep(1)
            started = loop.time()
        assert loop.time() - started == pytest.approx(5)
        assert stream.statistics().left == 2
        assert "swallowed asyncio.CancelledError" in caplog.text
        assert executor.statistics().jobs == 2
        release.set()


async def test_a_reader_that_waits_learns_that_jobs_were_abandoned() -> None:
    """The reader in another task is not left waiting for jobs that do not end."""
    release = asyncio.Event()

    async def stubborn(_item: int) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with Executor(limit=2) as executor:
        stream = executor.as_completed(stubborn, itertools.count())

        async def read() -> None:
            async for _ in stream:
                pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        with pytest.raises(ClosedError):
            await reader
        release.set()
        await asyncio.sleep(1)


async def test_a_job_that_cancels_itself_is_an_outcome_of_kind_cancelled() -> None:
    """By raising CancelledError, or waiting for something that was cancelled: it ends alone."""

    async def job(item: int) -> int:
        if item == 1:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        return item

    async with Executor() as executor:
        outcomes = await executor.as_completed(job, range(3))
    assert {o.input: o.kind for o in outcomes} == {0: None, 1: FailureKind.CANCELLED, 2: None}


async def test_a_job_whose_task_is_cancelled_by_others_ends_the_stream_and_says_so() -> None:
    """It is no outcome, so a later run would do it again; and its reader learns that something is missing."""

    async def job(item: int) -> int:
        if item == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await asyncio.sleep(1)
        return item

    delivered = []
    async with Executor(limit=3) as executor, executor.as_completed(job, range(3)) as stream:
        with pytest.raises(ClosedError, match="item 2> was cancelled by something else"):
            async for outcome in stream:
                delivered.append(outcome.value)
        assert sorted(map(str, delivered)) == ["0", "2"]
        assert stream.statistics().left == 1


async def test_a_cancel_from_outside_is_never_an_outcome() -> None:
    """Cancelling the reader cancels the jobs; nothing is recorded as failed."""
    async with Executor(limit=3) as executor:

        async def read() -> None:
            await executor.map(double, itertools.count(), timeout=None)

        reader = asyncio.create_task(read())
        await asyncio.sleep(10.5)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        statistics = executor.statistics()
        assert (statistics.done, statistics.failed, statistics.cancelled, statistics.jobs) == (30, {}, 3, 0)


@pytest.mark.parametrize("allowed", [0, 3])
async def test_max_errors_as_a_count_delivers_what_there_is_then_raises(allowed: int) -> None:
    """One failure more than allowed: no more items are pulled, those in flight are finished and delivered."""
    pulled: list[int] = []

    async def fail(item: int) -> None:
        await asyncio.sleep(1)
        raise ValueError(item)

    delivered = 0
    async with Executor(limit=2) as executor:
        async with executor.as_completed(fail, counted(pulled), max_errors=allowed) as stream:
            with pytest.raises(TooManyErrors, match=f"max_errors={allowed} allows no more") as caught:
                async for _ in stream:
                    delivered += 1
    assert caught.value.failed == allowed + 1
    assert delivered == len(pulled) <= allowed + 3


async def test_max_errors_as_a_share_is_judged_from_a_hundred_finished_jobs_on() -> None:
    """Early bad luck does not end a run; a bad share does."""

    async def fail_first_ten(item: int) -> None:
        if item < 10:
            raise ValueError(item)

    async def fail_every_fifth(item: int) -> None:
        if item % 5 == 0:
            raise ValueError(item)

    async with Executor(limit=1) as executor:
        assert len(await executor.as_completed(fail_first_ten, range(1_000), max_errors=0.1)) == 1_000
        assert len(await executor.as_completed(fail_every_fifth, range(99), max_errors=0.1)) == 99
        with pytest.raises(TooManyErrors) as caught:
            await executor.as_completed(fail_every_fifth, range(1_000), max_errors=0.1)
    assert (caught.value.failed, caught.value.finished) == (21, 101)


async def test_max_errors_is_raised_also_when_the_source_has_ended() -> None:
    """The last failures count as well."""

    async def fail(item: int) -> None:
        await asyncio.sleep(item)
        raise ValueError(item)

    async with Executor() as executor:
        with pytest.raises(TooManyErrors):
            await executor.as_completed(fail, range(3), max_errors=2)
        assert len(await executor.as_completed(fail, range(3), max_errors=3)) == 3


async def test_two_tasks_cannot_wait_on_one_stream() -> None:
    """The second one is told what to do; the first one goes on."""
    async with Executor() as executor, executor.map(double, range(3)) as stream:
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(UsageError, match="read by one task at a time"):
            await anext(stream)
        assert await first == 0


async def test_each_job_has_a_context_of_its_own() -> None:
    """What a job sets in a context variable is seen by no other job, nor by the source."""
    from contextvars import ContextVar

    variable: ContextVar[int] = ContextVar("variable", default=-1)
    seen_by_source = []

    def source() -> Iterator[int]:
        for number in range(20):
            seen_by_source.append((variable.get(), current_job()))
            yield number

    async def job(item: int) -> int:
        before = variable.get()
        variable.set(item)
        await asyncio.sleep(1)
        return before

    async with Executor(limit=3) as executor:
        assert await executor.map(job, source()) == [-1] * 20
    assert set(seen_by_source) == {(-1, None)}


async def test_a_job_knows_who_it_is() -> None:
    """`current_job()` gives name, key and depth inside a job, and None outside."""

    async def who(item: int) -> tuple[str, object, int]:
        job = current_job()
        assert job is not None
        assert repr(job).startswith("<job test_a_job_knows_who_it_is.<locals>.who")
        return job.name.rpartition(".")[2], job.key, job.depth

    assert current_job() is None
    async with Executor() as executor:
        outcomes = await executor.as_completed(who, [5], key=lambda item: f"k{item}")
        assert outcomes[0].value == ("who", "k5", 0)
        assert await executor.submit(who, 1) == ("who", None, 0)


async def test_plain_functions_run_in_threads() -> None:
    """`map` takes them as it takes async functions."""
    import threading

    def where(_item: int) -> str:
        return threading.current_thread().name

    async with Executor(threads=2) as executor:
        names = await executor.map(where, range(10))
    assert all(name.startswith("penstock") for name in names)


async def test_a_blocking_source_is_pulled_in_a_thread_when_asked() -> None:
    """`pull_in_thread` keeps the loop free, and the values come in order."""

    async def twice(item: int) -> int:
        return 2 * item

    with asyncio.get_running_loop().external_work():  # type: ignore[attr-defined]
        async with Executor() as executor:
            assert await executor.map(twice, pull_in_thread(range(200), buffersize=7)) == [2 * n for n in range(200)]


async def test_a_stream_is_closed_twice_without_harm_and_not_reopened() -> None:
    """Closing is idempotent; a closed stream that never started does not start."""
    async with Executor() as executor:
        stream = executor.map(double, range(3))
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(ClosedError, match="closed; make a new one"):
            await stream
        with pytest.raises(ClosedError, match="has been closed; make a new one"):
            await anext(stream)
        assert stream.statistics().read == 0


async def test_a_million_items_need_no_more_tasks_than_slots() -> None:
    """Tasks never exceed the jobs in flight, plus the puller and the reader."""
    most = 0

    async def job(_item: int) -> None:
        nonlocal most
        if _item % 100 == 0:
            most = max(most, len(asyncio.all_tasks()))
        await asyncio.sleep(0)

    async with Executor(limit=10) as executor, executor.as_completed(job, range(20_000)) as stream:
        async for _ in stream:
            pass
    assert most <= 10 + 2


async def test_rogue_cancellation_of_every_task_strands_no_reader() -> None:
    """A program that cancels all tasks, started or not, gets its reader back; nothing waits for ever."""
    logging.getLogger("penstock.jobs").setLevel(logging.CRITICAL)
    try:
        async with Executor(limit=50) as executor:
            stream = executor.as_completed(double, itertools.count(), buffersize=50)

            async def read() -> int:
                return len([outcome async for outcome in stream])

            reader = asyncio.create_task(read())
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # the puller has started jobs that have not had their first step
            for task in asyncio.all_tasks() - {asyncio.current_task(), reader}:
                task.cancel()
            with pytest.raises(ClosedError):
                await reader
            assert executor.statistics().jobs == 0
    finally:
        logging.getLogger("penstock.jobs").setLevel(logging.NOTSET)


async def test_a_generator_that_nobody_else_holds_is_closed_when_the_stream_ends_early() -> None:
    """Its `finally` runs soon after, not at the end of the program; one that the caller holds can be read on."""
    closed = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
        finally:
            closed.set()

    async with Executor(limit=2) as executor:
        async with executor.map(double, source()) as stream:
            async for _ in stream:
                break
        await closed.wait()
        held = iter(range(100))
        async with executor.map(double, held, buffersize=2) as stream:
            async for _ in stream:
                break
        assert next(held) in (2, 3)


async def test_a_stream_that_is_cancelled_after_its_source_ended_says_so() -> None:
    """Jobs in flight were lost to the cancellation: the end must not look like a good one."""
    async with Executor() as executor:
        stream = executor.as_completed(double, range(3))

        async def read() -> None:
            async for _ in stream:
                pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.5)
        await executor.shutdown(timeout=0)
        with pytest.raises(ClosedError, match="before all of its jobs had ended"):
            await reader
        assert stream.statistics().left == 3


async def test_a_stream_is_read_once() -> None:
    """A second pass would silently be empty; it says what to do instead."""
    async with Executor() as executor:
        stream = executor.map(double, range(3))
        assert await stream == [0, 2, 4]
        with pytest.raises(ClosedError, match="read to its end or closed; make a new one"):
            await stream


async def test_a_stream_whose_jobs_have_all_ended_may_be_dropped() -> None:
    """Nothing runs that would have to be cleaned up, so nothing is said."""
    async with Executor() as executor:
        stream = executor.map(double, range(3))
        assert await anext(stream) == 0
        await asyncio.sleep(5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del stream
            gc.collect()


async def test_failed_jobs_leave_no_reference_cycles(caplog: pytest.LogCaptureFixture) -> None:
    """Errors, and the items that their tracebacks hold, are freed as soon as nobody holds them: no collector needed."""
    import weakref

    caplog.set_level(logging.CRITICAL, logger="penstock.jobs")

    class Item:
        pass

    alive: weakref.WeakSet[Item] = weakref.WeakSet()

    def items() -> Iterator[Item]:
        for _ in range(50):
            item = Item()
            alive.add(item)
            yield item

    async def fail(_item: Item) -> None:
        await asyncio.sleep(1)
        raise ValueError

    gc.collect()
    gc.disable()
    try:
        async with Executor(limit=5) as executor:
            async with executor.as_completed(fail, items()) as outcomes:
                async for _ in outcomes:
                    pass
            del _
            async with executor.map(fail, items()) as values:
                with contextlib.suppress(ValueError):
                    await anext(values)
            assert len(alive) == 0
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="eager tasks came with Python 3.12")
async def test_an_eager_task_factory_changes_nothing() -> None:
    """Jobs that end before their task is returned, that wait, that fail, and that submit others."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    try:

        async def at_once(item: int) -> int:
            return item

        async def fail(item: int) -> int:
            raise ValueError(item)

        async with Executor(limit=3) as executor:

            async def parent(item: int) -> int:
                return sum(await executor.map(at_once, range(item))) + await executor.submit(double, item)

            assert await executor.map(at_once, range(50)) == list(range(50))
            assert await executor.map(parent, range(6)) == [2 * n + n * (n - 1) // 2 for n in range(6)]
            outcomes = await executor.as_completed(fail, range(20), key=lambda item: 1 // (item - 7))
            assert sorted(outcome.input for outcome in outcomes) == list(range(20))
            assert await asyncio.gather(*(executor.submit(at_once, item) for item in range(9))) == list(range(9))
            assert executor.statistics().jobs == 0
    finally:
        loop.set_task_factory(None)


class Hostile(Exception):
    """An exception whose every part is a trap."""

    @property
    def status(self) -> int:
        raise RuntimeError("no status")

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class HostileKey:
    """A key that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


async def test_nothing_a_user_makes_hangs_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    """Errors, keys and items that cannot be shown, and statuses that cannot be hashed: each item has its outcome."""

    class Unhashable(Exception):
        status = {"code": 5}  # noqa: RUF012  # as an SDK has it

    async def fail(item: int) -> None:
        raise Hostile if item % 2 else Unhashable

    async with Executor(limit=2) as executor:
        outcomes = await executor.as_completed(fail, range(10), key=lambda _: HostileKey())
        assert len(outcomes) == 10
        refused = await executor.as_completed(len_of, [HostileKey()], key=itemgetter("id"))  # type: ignore[arg-type]
        assert [type(outcome.error) for outcome in refused] == [UsageError]
        report = await executor.run(fail, range(10))
        report.verify()
        assert report.failed == 10
        assert executor.statistics().jobs == 0


@pytest.mark.parametrize("raised", [SystemExit(3), asyncio.CancelledError()])
async def test_a_key_function_that_wants_to_leave_fails_its_item_alone(raised: BaseException) -> None:
    """It ends neither the loop nor the stream."""

    def key(item: int) -> int:
        if item == 1:
            raise raised
        return item

    async with Executor() as executor:
        outcomes = await executor.as_completed(double, range(3), key=key)
    assert {outcome.input: outcome.ok for outcome in outcomes} == {0: True, 1: False, 2: True}


@pytest.mark.may_leave("errors")  # it is what the loop's exception handler is told
async def test_a_logging_filter_that_raises_does_not_lose_an_outcome() -> None:
    """The outcome arrives; the loop's exception handler is told of the filter."""
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))

    def refuse(_record: logging.LogRecord) -> bool:
        raise RuntimeError("no log today")

    async def fail(item: int) -> None:
        raise ValueError(item)

    logger = logging.getLogger("penstock.jobs")
    logger.addFilter(refuse)
    try:
        async with Executor() as executor:
            assert len(await executor.as_completed(fail, range(3))) == 3
    finally:
        logger.removeFilter(refuse)
    assert len(told) == 3


async def test_a_source_that_swallows_its_cancellation_is_not_pulled_on() -> None:
    """After `max_errors` and after a shutdown it is asked for nothing more, and what it gave is `left`."""
    given: list[int] = []

    async def stubborn() -> AsyncIterator[int]:
        for number in itertools.count():
            given.append(number)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1)
            yield number

    async def fail(item: int) -> None:
        raise ValueError(item)

    async with Executor() as executor:
        with pytest.raises(TooManyErrors):
            await executor.as_completed(fail, stubborn(), max_errors=3)
        assert len(given) < 10
        given.clear()
        stream = executor.as_completed(double, stubborn())
        reader = asyncio.ensure_future(stream)
        await asyncio.sleep(5)
        await executor.shutdown()
        with pytest.raises(ClosedError):
            await reader
        assert len(given) < 10
        statistics = stream.statistics()
        assert statistics.read == statistics.finished + statistics.left


async def test_max_errors_stops_a_source_whose_items_all_fail_at_once() -> None:
    """Also when the failures come out of the puller itself, as those of `key=` do."""
    pulled: list[int] = []
    async with Executor() as executor:
        with pytest.raises(TooManyErrors):
            await executor.as_completed(double, counted(pulled), key=lambda item: item // 0, max_errors=0)
    assert len(pulled) == 1


@pytest.mark.parametrize("raised", [StopAsyncIteration("oops"), asyncio.CancelledError("mine")])
async def test_a_source_is_never_cut_off_in_silence(raised: BaseException) -> None:
    """What would look like an end, or like a cancellation, is an error of the source."""

    def source() -> Iterator[int]:
        yield 1
        raise raised

    async with Executor() as executor:
        with pytest.raises(UsageError, match="the source of the items raised"):
            await executor.map(double, source())


@pytest.mark.parametrize("raised", [ClosedError("the client was closed"), TooManyErrors(3, 9, 2)])
async def test_a_run_raises_the_errors_of_its_source_whatever_they_are(raised: Exception) -> None:
    """An error of penstock's own that comes out of the source is not an interruption of this run."""

    def source() -> Iterator[int]:
        yield 1
        raise raised

    async with Executor() as executor:
        with pytest.raises(type(raised)) as caught:
            await executor.run(double, source())
    assert caught.value is raised


async def test_a_source_in_a_thread_can_be_read_on_after_a_stream_was_left() -> None:
    """It belongs to who made it: nothing of what it still holds is lost."""
    with asyncio.get_running_loop().external_work():  # type: ignore[attr-defined]
        source = pull_in_thread(range(300), buffersize=10)

        async def same(item: int) -> int:
            return item

        async with Executor(limit=2) as executor:
            async with executor.map(same, source, buffersize=2) as stream:
                first = [await anext(stream) for _ in range(3)]
                read = stream.statistics().read
            rest = [item async for item in source]
    assert first == [0, 1, 2]
    assert rest[-1] == 299
    assert len(rest) >= 300 - read - 2


async def test_what_an_iterable_made_for_the_stream_is_closed_with_it() -> None:
    """An object whose `__aiter__` is an async generator: the generator is the stream's, and its clean-up has run."""
    closed = False

    class Source:
        async def __aiter__(self) -> AsyncIterator[int]:
            nonlocal closed
            try:
                for number in itertools.count():
                    yield number
            finally:
                await asyncio.sleep(1)
                closed = True

    async with Executor(limit=2) as executor, executor.map(double, Source()) as stream:
        await anext(stream)
        await stream.aclose()
        assert closed


async def test_a_clean_up_of_a_source_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The stream has ended for another reason; the error is not lost."""

    class Source:
        async def __aiter__(self) -> AsyncIterator[int]:
            try:
                for number in itertools.count():
                    yield number
            finally:
                raise OSError("disk full")

    async with Executor(limit=2) as executor, executor.map(double, Source()) as stream:
        await anext(stream)
    assert "disk full" in caplog.text


async def test_a_closed_stream_delivers_nothing_more() -> None:
    """Neither what was ready nor what ends while it is closed."""

    async def slow_to_die(item: int) -> int:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)
        return item

    async with Executor(limit=2) as executor:
        stream = executor.as_completed(slow_to_die, itertools.count())
        await anext(stream)
        await stream.aclose()
        with pytest.raises(ClosedError):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_dropped_stream_is_cancelled_also_where_warnings_are_errors() -> None:
    """The clean-up comes before the warning."""
    started: list[int] = []

    async def job(item: int) -> int:
        started.append(item)
        await asyncio.sleep(1)
        return item

    async with Executor(limit=2) as executor:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stream = executor.map(job, itertools.count())
            await anext(stream)
            hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
            try:
                del stream
                gc.collect()
            finally:
                sys.unraisablehook = hook
        await asyncio.sleep(0)  # a step that was on its way
        await asyncio.sleep(0)
        before = len(started)
        await asyncio.sleep(20)
        assert len(started) == before
        assert executor.statistics().jobs == 0


async def test_a_job_may_close_the_stream_that_it_belongs_to() -> None:
    """It does not wait for itself: the others are cancelled, and it goes on."""
    loop = asyncio.get_running_loop()
    streams: list[Stream[Outcome[float]]] = []

    async def job(item: int) -> float:
        if item == 0:
            await asyncio.sleep(1)
            started = loop.time()
            await streams[0].aclose()
            return loop.time() - started
        await asyncio.sleep(1_000)
        return 0.0

    async with Executor(limit=3) as executor:
        streams.append(executor.as_completed(job, itertools.count()))
        with pytest.raises(ClosedError):
            await anext(streams[0])
        await asyncio.sleep(10)
        assert executor.statistics().ran.max < 2


async def test_an_item_that_waits_for_a_slot_when_the_stream_is_left_is_counted_as_left() -> None:
    """It was taken from the source, so it must be in the books."""

    async def source() -> AsyncIterator[int]:
        yield 1

    async with Executor(limit=1) as executor:
        executor.submit(double, 50)
        stream = executor.map(double, source())
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.5)
        await stream.aclose()
        with pytest.raises(ClosedError):
            await reader
        statistics = stream.statistics()
        assert (statistics.read, statistics.finished, statistics.left) == (1, 0, 1)


async def test_a_clean_up_of_a_source_that_hangs_is_waited_for_in_bounds() -> None:
    """Leaving the stream goes on after some seconds."""
    loop = asyncio.get_running_loop()

    class Source:
        async def __aiter__(self) -> AsyncIterator[int]:
            try:
                for number in itertools.count():
                    yield number
            finally:
                await asyncio.sleep(1_000)

    async with Executor(limit=2) as executor:
        async with executor.map(double, Source()) as stream:
            await anext(stream)
            started = loop.time()
        assert loop.time() - started <= 10


@pytest.mark.parametrize("stubborn", [True, False])
async def test_a_job_that_does_not_end_after_its_timeout_has_its_outcome_all_the_same(
    stubborn: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it swallows its cancellation or hangs in its clean-up: the run goes on without it, and says so."""
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def job(item: int) -> int:
        try:
            await asyncio.sleep(item * 1_000)
        finally:
            while item and not release.is_set():
                if stubborn:
                    with contextlib.suppress(asyncio.CancelledError):
                        await release.wait()
                else:
                    await release.wait()
        return item

    started = loop.time()
    async with Executor(limit=2) as executor:
        outcomes = await executor.as_completed(job, [0, 1, 0], timeout=10)
        assert loop.time() - started == pytest.approx(15)
        assert sorted(outcome.ok for outcome in outcomes) == [False, True, True]
        (late,) = [outcome for outcome in outcomes if not outcome.ok]
        assert isinstance(late.error, JobTimeout)
        assert "nor 5 s after it was cancelled for that" in str(late.error)
        assert "goes on 5 s after it was cancelled" in caplog.text
        assert executor.statistics().jobs == 1
        release.set()
        await asyncio.sleep(1)
        statistics = executor.statistics()
        assert (statistics.jobs, statistics.done, sum(statistics.failed.values())) == (0, 2, 1)
        assert await executor.map(double, [1, 2]) == [2, 4]


async def test_leaving_an_executor_does_not_wait_for_a_job_that_was_given_up() -> None:
    """Its outcome has been delivered; the drain goes on without it, and so does a stream that is left."""
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def stubborn(_item: int) -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    started = loop.time()
    async with Executor(limit=4) as executor:
        executor.submit(double, 1)
        async with executor.as_completed(stubborn, [1, 2], timeout=10) as stream:
            assert isinstance((await anext(stream)).error, JobTimeout)
        reader = asyncio.ensure_future(executor.as_completed(stubborn, [3], timeout=1))
        await asyncio.sleep(0.5)
    assert len(await reader) == 1
    assert loop.time() - started < 60
    release.set()
    await asyncio.sleep(1)
    assert executor.statistics().jobs == 0


async def test_a_stream_that_is_closed_before_all_was_read_says_so_when_it_is_read_on() -> None:
    """Also when its source and all its jobs had ended: what was ready has been dropped."""

    async def same(item: int) -> int:
        return item

    async with Executor() as executor:
        async with executor.as_completed(same, range(10)) as stream:
            await anext(stream)
            await asyncio.sleep(1)
        with pytest.raises(ClosedError, match="before all that was ready had been read"):
            await anext(stream)
