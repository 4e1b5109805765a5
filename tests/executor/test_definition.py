"""`@penstock.job`: resources and job function together, opened and closed once, in one task."""

import asyncio
import contextlib
import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, assert_type

import pytest

import penstock
from penstock import Executor, Gate, Job, Report, UsageError

pytestmark = pytest.mark.virtual_clock

Score = Callable[[int], Coroutine[Any, Any, int]]

log: list[tuple[str, object]] = []
"""What happened, and in which task."""


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    log.clear()


def note(what: str) -> None:
    log.append((what, asyncio.current_task()))


def happened() -> list[str]:
    return [what for what, _ in log]


@penstock.job
async def scoring() -> AsyncGenerator[Score, None]:
    """Doubles."""
    note("open")

    async def score(item: int) -> int:
        note(f"score {item}")
        return 2 * item

    try:
        yield score
    except BaseException as error:
        note(f"saw {type(error).__name__}")
        raise
    finally:
        await asyncio.sleep(0)
        note("close")


async def plus_one(item: int) -> int:
    return item + 1


async def plain() -> AsyncIterator[Score]:
    yield plus_one


# --- opened and closed ---


async def test_it_is_opened_and_closed_once_in_one_task() -> None:
    """Not in the tasks of its jobs: what was opened in one task (a cancel scope) must be closed there."""
    async with Executor() as executor:
        report = await executor.run(scoring, [1, 2, 3])
    assert (report.read, report.done) == (3, 3)
    assert happened()[0] == "open"
    assert happened()[-1] == "close"
    assert sorted(happened()[1:-1]) == ["score 1", "score 2", "score 3"]
    tasks = dict(log)
    assert tasks["open"] is tasks["close"] is asyncio.current_task()
    assert len(set(tasks.values())) == 1 + 3


async def test_each_run_opens_anew() -> None:
    async with Executor() as executor:
        await asyncio.gather(executor.run(scoring, [1]), executor.run(scoring, [2]))
    assert happened().count("open") == happened().count("close") == 2


async def test_it_can_be_opened_by_hand() -> None:
    """The value is the job function, with its own type."""
    async with scoring.open() as score:
        assert_type(score, Score)
        assert await score(4) == 8
    assert happened() == ["open", "score 4", "close"]


async def test_an_error_while_opening_is_the_runs_error_and_no_item_is_taken() -> None:
    @penstock.job
    async def broken() -> AsyncGenerator[Score, None]:
        raise ConnectionError("no database")
        yield plus_one

    taken = iter([1, 2])
    async with Executor() as executor:
        with pytest.raises(ConnectionError, match="no database"):
            await executor.run(broken, taken)
    assert list(taken) == [1, 2]


async def test_an_error_while_closing_is_the_runs_error() -> None:
    @penstock.job
    async def broken() -> AsyncGenerator[Score, None]:
        yield plus_one
        raise ConnectionError("cannot commit")

    async with Executor() as executor:
        with pytest.raises(ConnectionError, match="cannot commit"):
            await executor.run(broken, [1])


async def test_the_definition_sees_an_error_within_and_the_caller_gets_it() -> None:
    """The very object, as it was; here the source's."""
    raised = OSError("the source is gone")

    def source() -> Iterator[int]:
        yield 1
        raise raised

    async with Executor() as executor:
        with pytest.raises(OSError, match="the source is gone") as caught:
            await executor.run(scoring, source())
    assert caught.value is raised
    assert happened() == ["open", "score 1", "saw OSError", "close"]


async def test_an_error_within_is_raised_even_if_the_definition_swallows_it() -> None:
    """There is no report to return then."""

    @penstock.job
    async def swallowing() -> AsyncGenerator[Score, None]:
        with contextlib.suppress(BaseException):
            yield plus_one

    with pytest.raises(KeyError) as caught:
        async with swallowing.open():
            raise KeyError("mine")
    assert [entry.name for entry in caught.traceback] == [inspect.currentframe().f_code.co_name]  # type: ignore[union-attr]


async def test_an_error_within_may_be_replaced_by_one_of_the_definition() -> None:
    @penstock.job
    async def translating() -> AsyncGenerator[Score, None]:
        try:
            yield plus_one
        except KeyError as error:
            raise ValueError("translated") from error

    with pytest.raises(ValueError, match="translated"):
        async with translating.open():
            raise KeyError


async def test_a_run_that_is_cancelled_closes_the_resources() -> None:
    """The cancellation passes through the definition and is not turned into something else."""
    async with Executor() as executor:

        @penstock.job
        async def slow() -> AsyncGenerator[Callable[[int], Awaitable[None]], None]:
            try:
                yield asyncio.sleep
            finally:
                note("close")

        run = asyncio.create_task(executor.run(slow, [3600]))
        await asyncio.sleep(1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    assert happened() == ["close"]


# --- definitions that are wrong ---


@pytest.mark.parametrize(
    "found", [plus_one, len, 3, lambda: None], ids=["a function", "a builtin", "a number", "a lambda"]
)
def test_only_an_async_generator_function_is_a_definition(found: Any) -> None:
    with pytest.raises(UsageError, match=r"@penstock\.job found .*expected an async generator function: `async def"):
        penstock.job(found)


@pytest.mark.parametrize("yielded", [None, 3])
async def test_a_definition_that_yields_no_function_is_refused_and_closed(yielded: Any) -> None:
    closed = False

    @penstock.job
    async def wrong() -> AsyncGenerator[Any, None]:
        nonlocal closed
        try:
            yield yielded
        finally:
            closed = True

    async with Executor() as executor:
        with pytest.raises(UsageError, match=r"wrong' yielded (nothing|3), expected the job function: .*`yield score`"):
            await executor.run(wrong, [1])
    assert closed


async def test_a_definition_that_does_not_get_to_its_yield_is_refused() -> None:
    @penstock.job
    async def empty() -> AsyncGenerator[Score, None]:
        for fn in list[Score]():
            yield fn

    with pytest.raises(UsageError, match="empty' yielded nothing, expected the job function"):
        async with empty.open():
            raise AssertionError("it cannot be entered")


async def test_a_definition_that_yields_twice_is_refused_and_closed() -> None:
    """Also when the first `yield` was left by an error, which is then the context."""

    @penstock.job
    async def twice() -> AsyncGenerator[Score, None]:
        with contextlib.suppress(KeyError):
            yield plus_one
        try:
            yield plus_one
        finally:
            note("close")

    with pytest.raises(UsageError, match=r"twice' yielded more than once. Yield the job function once"):
        async with twice.open():
            pass
    with pytest.raises(UsageError, match="more than once") as caught:
        async with twice.open():
            raise KeyError
    assert isinstance(caught.value.__context__, KeyError)
    assert happened() == ["close", "close"]


# --- used wrongly ---


def test_a_definition_is_not_called() -> None:
    """The message shows both ways to use it."""
    with pytest.raises(UsageError) as caught:
        scoring(1)
    assert str(caught.value) == (
        "the job 'scoring' opens resources and cannot be called. Give it to `penstock.run(scoring, items)`, or write "
        "`async with scoring.open() as fn:`."
    )


async def test_a_definition_is_no_function_for_map_submit_or_as_completed() -> None:
    async with Executor() as executor:
        for call in (
            lambda: executor.map(scoring, [1]),
            lambda: executor.submit(scoring, 1),
            lambda: executor.as_completed(scoring, [1]),
        ):
            with pytest.raises(
                UsageError, match=r"found <penstock.Job scoring>.*`await executor\.run\(scoring, items\)`"
            ):
                call()
    assert happened() == []


async def test_a_definition_without_its_decorator_is_missed() -> None:
    """Calling it for each item would run none of it."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match=r"async generator function plain: .*decorate it with @penstock\.job"):
            await executor.run(plain, [1])  # type: ignore[arg-type]


async def test_a_definition_is_no_function_for_a_gate() -> None:
    async def call() -> None:
        await Gate("g").call(scoring)

    async with Executor() as executor:
        with pytest.raises(UsageError, match="opens resources and cannot be called"):
            await executor.submit(call)
    assert happened() == []


# --- identity and pickling ---


def test_it_looks_like_its_definition() -> None:
    assert (scoring.__name__, scoring.__qualname__, scoring.__doc__) == ("scoring", "scoring", "Doubles.")
    assert scoring.__module__ == __name__
    assert repr(scoring) == "<penstock.Job scoring>"
    assert isinstance(scoring, Job)


DEFINITIONS = """
import asyncio, os, penstock

@penstock.job
async def scoring():
    async def score(item):
        return item, os.getpid()
    yield score

class Nested:
    @penstock.job
    async def scoring():
        yield None

async def use(job):
    async with job.open() as score:
        return await score(7)
"""


def test_it_is_pickled_by_its_qualified_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same object comes back, also of one that stands in a class; a copy is the object itself."""
    (tmp_path / "definitions_in_a_module.py").write_text(DEFINITIONS)
    monkeypatch.syspath_prepend(tmp_path)
    import definitions_in_a_module as definitions  # type: ignore[import-not-found]

    for job in (definitions.scoring, definitions.Nested.scoring):
        assert pickle.loads(pickle.dumps(job)) is job
        assert copy.copy(job) is copy.deepcopy(job) is job


def test_another_process_finds_it_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh interpreter, as a spawned worker is one: it imports the module, and opens resources of its own."""
    (tmp_path / "definitions_for_a_process.py").write_text(DEFINITIONS)
    monkeypatch.syspath_prepend(tmp_path)
    import definitions_for_a_process as definitions  # type: ignore[import-not-found]

    program = (
        f"import sys, pickle, asyncio; sys.path.insert(0, {str(tmp_path)!r});"
        "job = pickle.load(sys.stdin.buffer);"
        "import definitions_for_a_process as definitions, os;"
        "assert job is definitions.scoring;"
        "assert asyncio.run(definitions.use(job)) == (7, os.getpid())"
    )
    subprocess.run([sys.executable, "-c", program], input=pickle.dumps(definitions.scoring), check=True)


def test_one_that_stands_in_a_function_has_no_name_to_be_found_by() -> None:
    @penstock.job
    async def local() -> AsyncGenerator[Score, None]:
        yield plus_one

    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(local)


async def test_the_report_is_typed_and_complete() -> None:
    async with Executor() as executor:
        report = await executor.run(scoring, [1])
        assert_type(report, Report)
        report.verify()
