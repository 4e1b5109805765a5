"""Failed jobs in the log: the first ones in full, repeats by count, and a bound on both lines and memory."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock import Executor, FailureKind, HttpClient, HttpStatusError, Outcome, Retry, classify
from penstock.executor.failure_log import IN_FULL, KNOWN_PLACES, FailureLog


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """What is logged, kept from pytest's own report: thousands of tracebacks take seconds to format."""
    logger, collector = logging.getLogger("penstock.jobs"), Collector()
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(collector)
    yield collector.records
    logger.removeHandler(collector)


class _Job:
    def __repr__(self) -> str:
        return "<job score>"


JOB = _Job()


def failed(error: Exception, key: object = None) -> Outcome[Any]:
    return Outcome(key, None, None, error, classify(error), 0, 0.0, 0.0)


def raised(raising: Callable[[], object]) -> Exception:
    try:
        raising()
    except Exception as error:  # noqa: BLE001  # whichever it is
        return error
    raise AssertionError("it raised nothing")


def here() -> None:
    raise ValueError("here")


def there() -> None:
    raise ValueError("there")


def either(number: int) -> None:
    if number % 2:
        raise ValueError("odd")
    raise KeyError("even")


async def score(item: int) -> int:
    await asyncio.sleep(item)
    if item == 1:
        here()
    return item


def raising_at(line: int) -> Callable[[], object]:
    """A function that raises on the given line of a file of its own."""
    program = compile("\n" * (line - 1) + "raise ValueError", "generated.py", "exec")
    return lambda: exec(program)


def write(log: FailureLog, error: Exception, times: int = 1) -> None:
    for number in range(times):
        log.write(JOB, failed(error, key=number))


def test_the_first_has_its_traceback_and_two_more_their_message(records: list[logging.LogRecord]) -> None:
    """With job, kind and message; the third one says that it is the last of its kind."""
    write(FailureLog(), raised(here), times=IN_FULL + 1)
    assert [record.getMessage() for record in records] == [
        "<job score> failed (permanent): ValueError: here",
        "<job score> failed (permanent): ValueError: here",
        "<job score> failed (permanent): ValueError: here; further ones from here are counted",
    ]
    assert [record.exc_info is not None for record in records] == [True, False, False]


def test_statuses_are_told_apart_though_one_line_of_penstock_raises_them_all(records: list[logging.LogRecord]) -> None:
    """A 401 is news after a hundred 404s; the place is the line of the user's program, not penstock's."""
    log = FailureLog()

    def ask(status: int) -> None:
        raise HttpStatusError(status, "GET", "http://h/")

    write(log, raised(lambda: ask(404)), times=100)
    write(log, raised(lambda: ask(401)))
    assert records[-1].getMessage() == "<job score> failed (permanent): HttpStatusError: GET http://h/ -> HTTP 401"
    assert f"HttpStatusError 404 at {__file__}:" in records[-2].getMessage()


async def test_the_place_of_a_failure_is_the_innermost_line_outside_penstock(
    records: list[logging.LogRecord],
) -> None:
    """Two calls of one client from two lines of the program are two places."""

    async def two_ways(item: int) -> None:
        if item % 2:
            await api.get("/odd")
        await api.get("/even")

    async with HttpClient("http://127.0.0.1:9", retry=Retry(attempts=1)) as api, Executor(limit=1) as executor:
        await executor.as_completed(two_ways, range(8))
    assert [record.exc_info is not None for record in records].count(True) == 2


def test_after_that_every_power_of_ten_is_told_as_a_count(records: list[logging.LogRecord]) -> None:
    """A million failures of one reason are nine lines."""
    write(FailureLog(), raised(here), times=10_000)
    counts = records[IN_FULL:]
    place = f"{__file__}:{here.__code__.co_firstlineno + 1}"
    assert [record.getMessage() for record in counts] == [
        f"<job score> failed: ValueError at {place} for the {count}th time" for count in (10, 100, 1_000, 10_000)
    ]
    assert all(record.exc_info is None for record in counts)


def test_failures_are_told_apart_by_class_and_line(records: list[logging.LogRecord]) -> None:
    """A new place is told in full, however often another one was seen before."""
    log = FailureLog()
    write(log, raised(here), times=9)
    for error in (raised(there), raised(lambda: either(1)), raised(lambda: either(2))):
        write(log, error)
        assert records[-1].exc_info is not None
    write(log, raised(here))
    assert records[-1].getMessage().endswith("for the 10th time")


@pytest.mark.parametrize("kind", list(FailureKind))
def test_a_bug_is_an_error_and_all_else_a_warning(kind: FailureKind, records: list[logging.LogRecord]) -> None:
    """In full and as a count: an alarm on errors rings for what somebody has to mend in the program."""
    log = FailureLog()
    for _ in range(10):
        log.write(JOB, failed(ValueError())._replace(kind=kind))
    assert {record.levelno for record in records} == {logging.ERROR if kind == "bug" else logging.WARNING}
    assert len(records) == IN_FULL + 1


def test_an_error_that_was_never_raised_has_no_place(records: list[logging.LogRecord]) -> None:
    write(FailureLog(), ValueError("made by hand"), times=10)
    assert records[-1].getMessage() == "<job score> failed: ValueError at ?:0 for the 10th time"


def test_places_beyond_a_thousand_are_counted_together(records: list[logging.LogRecord]) -> None:
    """Neither memory nor the log grows with the places; those that are known go on being counted by themselves."""
    log = FailureLog()
    first = raised(raising_at(1))
    write(log, first)
    for line in range(2, KNOWN_PLACES + 1):
        write(log, raised(raising_at(line)))
    assert len(records) == KNOWN_PLACES
    records.clear()
    for line in range(KNOWN_PLACES + 1, KNOWN_PLACES + 1001):
        write(log, raised(raising_at(line)))
    assert [record.exc_info is not None for record in records] == [True] + [False] * 5
    assert records[-1].getMessage().endswith("something from one of more than 1,000 places for the 1000th time")
    assert len(log._seen) == KNOWN_PLACES + 1
    write(log, first, times=9)
    assert records[-1].getMessage() == "<job score> failed: ValueError at generated.py:1 for the 10th time"


@pytest.mark.virtual_clock
async def test_an_executor_writes_the_failures_of_its_jobs(records: list[logging.LogRecord]) -> None:
    """Once each, with the key of the item; successes and cancellations from outside are silent."""

    async with Executor() as executor, executor.as_completed(score, [0, 1, 2, 3600], key=str) as stream:
        async for outcome in stream:
            if outcome.key == "2":
                break
    assert [record.getMessage() for record in records] == ["<job score key='1'> failed (permanent): ValueError: here"]
