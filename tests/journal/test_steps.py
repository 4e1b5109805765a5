"""Steps: what a job has paid for is not paid for a second time, and is recorded for as long as its item needs it."""

import asyncio
import dataclasses
import datetime
import decimal
import enum
import functools
import itertools
import math
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock import Executor, Journal, JournalError, Outcome, UsageError, idempotency_key, step
from penstock.journal.schema import INLINE_BYTES
from penstock.journal.steps import _hash_of

pytestmark = pytest.mark.virtual_clock


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="penstock.jobs")


class Service:
    """What is paid for: it counts its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def ask(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((*args, *kwargs.values()))
        return len(self.calls)

    def ask_in_a_thread(self, *args: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        self.calls.append(args)
        return len(self.calls)


Job = Callable[[Any], Awaitable[Any]]


async def live(job: Job, path: str, items: Iterable[Any] = (1,), **options: Any) -> list[Outcome[Any]]:
    """One run, in which what failed in an earlier one is tried again."""
    codec = options.pop("codec", None)
    journal = Journal(path, resume="failed", on_mismatch="ignore", codec=codec)
    async with Executor(**options) as executor:
        return await executor.as_completed(job, items, key=lambda item: item, journal=journal)


def steps_in(path: str) -> list[tuple[Any, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT key, name FROM step ORDER BY key, name").fetchall()


def of_one_step(name: Any, fn: Any, *args: Any) -> Job:
    """A job that calls it."""

    async def job(_item: Any) -> Any:
        return await step(name, fn, *args)

    return job


def in_two_lives(call: Callable[[Service, int], Awaitable[Any]], service: Service) -> Job:
    """A job that fails the first time, after its steps."""
    lives: list[int] = []

    async def job(_item: Any) -> Any:
        lives.append(len(lives))
        value = await call(service, len(lives) - 1)
        if len(lives) == 1:
            raise ValueError("the first time")
        return value

    return job


# --- what is known ---


async def test_an_item_that_is_tried_again_does_not_pay_twice(path: str) -> None:
    """Each step that has returned is known by its name and its arguments; the next one is called."""
    service = Service()
    down = True

    async def job(item: int) -> Any:
        first = await step("first", service.ask, item)
        second = await step("second", service.ask, item, also=first)
        if down:
            raise ValueError("the third one is down")
        return [first, second, await step("third", service.ask, item)]

    (failed,) = await live(job, path)
    assert not failed.ok
    assert steps_in(path) == [(1, "first"), (1, "second")]
    down = False
    (done,) = await live(job, path)
    assert done.value == [1, 2, 3]
    assert service.calls == [(1,), (1, 1), (1,)]


async def test_an_item_that_was_interrupted_does_not_pay_twice(path: str) -> None:
    """It was left, and has no state; its steps have."""
    service = Service()
    waits = True

    async def job(item: int) -> Any:
        found = await step("ask", service.ask, item)
        if waits:
            await asyncio.sleep(100)
        return found

    async with Executor() as executor:
        stream = executor.as_completed(job, [1, 2], key=int, journal=path)
        reader = asyncio.ensure_future(stream)
        await asyncio.sleep(1)
        await executor.shutdown(timeout=0)
        with pytest.raises(penstock.ClosedError):
            await reader
    assert steps_in(path) == [(1, "ask"), (2, "ask")]
    waits = False
    outcomes = await live(job, path, [2, 1])
    assert {outcome.key: outcome.value for outcome in outcomes} == {1: 1, 2: 2}
    assert len(service.calls) == 2


async def test_the_same_step_of_another_item_is_another_step(path: str) -> None:
    """Though its arguments are the same."""
    service = Service()
    job = in_two_lives(lambda service, _: step("ask", service.ask, "the same"), service)
    (failed,) = await live(job, path, [1])
    assert not failed.ok
    outcomes = await live(job, path, [2, "1", 1])
    assert {outcome.key: outcome.value for outcome in outcomes} == {1: 1, 2: 2, "1": 3}


async def test_changed_arguments_make_a_step_run_again(path: str) -> None:
    """So does another name; the order of keywords is no change."""
    service = Service()

    async def call(service: Service, life: int) -> list[Any]:
        return [
            await step("ask", service.ask, life),
            await step("ask", service.ask, 7, limit=life),
            await step(f"ask {life}", service.ask),
            await step("ask", service.ask, **({"a": 1, "b": 2} if life else {"b": 2, "a": 1})),
        ]

    job = in_two_lives(call, service)
    await live(job, path)
    (done,) = await live(job, path)
    assert done.value == [5, 6, 7, 4]


async def test_a_job_that_polls_hears_the_same_answers_in_the_same_order(path: str) -> None:
    """The same step with the same arguments is another one each time."""
    service = Service()

    async def call(service: Service, life: int) -> list[Any]:
        return [await step("poll", service.ask) for _ in range(3 + life)]

    job = in_two_lives(call, service)
    await live(job, path)
    (done,) = await live(job, path)
    assert done.value == [1, 2, 3, 4]
    assert len(service.calls) == 4


async def test_one_item_may_have_steps_by_the_hundred(path: str) -> None:
    """Each is found again."""
    service = Service()

    async def call(service: Service, _life: int) -> list[Any]:
        return [await step("ask", service.ask, number) for number in range(1_200)]

    job = in_two_lives(call, service)
    await live(job, path)
    (done,) = await live(job, path)
    assert done.value == list(range(1, 1_201))
    assert len(service.calls) == 1_200


@pytest.mark.parametrize(
    "value", [None, 0, "", [], {"id": ["ø", 1.5, None]}, "x" * (INLINE_BYTES + 1), "ø" * INLINE_BYTES]
)
async def test_what_a_step_has_returned_comes_back(path: str, value: Any) -> None:
    """Also nothing, and also what is too large for a row."""
    calls = []

    async def ask() -> Any:
        calls.append(1)
        return value

    job = in_two_lives(lambda *_: step("ask", ask), Service())
    await live(job, path)
    (done,) = await live(job, path)
    assert done.value == value
    assert len(calls) == 1


async def test_what_a_step_has_returned_comes_back_as_the_codec_reads_it(path: str) -> None:
    """With pickle a tuple stays one; the life that called it has what was returned."""

    async def ask() -> Any:
        return (1, 2)

    async def call(_service: Service, _life: int) -> Any:
        return repr(await step("ask", ask))

    for codec, expected in ((pickle, "(1, 2)"), (None, "[1, 2]")):
        job = in_two_lives(call, Service())
        file = f"{path}-{expected}"
        await live(job, file, codec=codec)
        (done,) = await live(job, file, codec=codec)
        assert done.value == expected


async def test_a_damaged_step_is_not_taken_for_an_answer(path: str) -> None:
    """The run ends by an error that names the item."""
    service = Service()
    job = in_two_lives(lambda service, _: step("ask", service.ask), service)
    await live(job, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE step SET result = '8'")
        connection.commit()
    with pytest.raises(JournalError, match="the row of 1 does not match its checksum"):
        await live(job, path)


def spoil(file: str) -> None:
    Path(file).write_bytes(b"y" * os.path.getsize(file))


async def test_a_large_step_that_is_damaged_fails_its_item(path: str) -> None:
    """It is not called again behind somebody's back."""

    async def ask() -> str:
        return "x" * (INLINE_BYTES + 1)

    job = in_two_lives(lambda *_: step("ask", ask), Service())
    await live(job, path)
    spoil(f"{path}-results")
    (outcome,) = await live(job, path)
    assert isinstance(outcome.error, JournalError)
    os.unlink(f"{path}-results")
    with pytest.raises(JournalError, match=r"run\.db-results: has 0 bytes"):
        await live(job, path)


# --- for how long ---


@pytest.mark.parametrize("end", ["done", "skipped", "failed"])
async def test_steps_are_kept_until_their_item_is_finished(path: str, end: str) -> None:
    """Those of an item that has failed are kept for the next try."""
    service = Service()

    async def job(item: int) -> None:
        for number in range(3):
            await step("ask", service.ask, number)
            await asyncio.sleep(1)  # they are committed by then
        await step("last", service.ask)  # and this one is not
        if item == 1 and end == "failed":
            raise ValueError
        if item == 1 and end == "skipped":
            raise penstock.SkipItem

    await live(job, path, [1, 2])
    assert steps_in(path) == ([(1, "ask")] * 3 + [(1, "last")] if end == "failed" else [])


async def test_steps_of_an_earlier_life_go_with_their_item(path: str) -> None:
    """Also where the next life did not call any."""
    service = Service()

    async def call(service: Service, life: int) -> None:
        if life == 0:
            await step("ask", service.ask)

    job = in_two_lives(call, service)
    await live(job, path)
    assert steps_in(path) == [(1, "ask")]
    await live(job, path)
    assert steps_in(path) == []


async def test_an_item_that_has_come_twice_has_steps_of_its_own(path: str) -> None:
    """Under its other key: neither those of the first one nor none."""
    service = Service()
    fails = True

    async def job(_item: str) -> Any:
        found = await step("ask", service.ask, "the same")
        if fails:
            raise ValueError
        return found

    async def run() -> dict[Any, Any]:
        journal = Journal(path, duplicates="suffix", resume="failed")
        async with Executor(limit=1) as executor:
            outcomes = await executor.as_completed(job, ["a", "b"], key=lambda _: 7, journal=journal)
        return {outcome.key: outcome.value for outcome in outcomes}

    await run()
    assert steps_in(path) == [(7, "ask"), ("7#2", "ask")]
    fails = False
    assert await run() == {7: 1, "7#2": 2}
    assert len(service.calls) == 2


# --- who may call one ---


async def test_a_plain_function_runs_in_a_thread(path: str) -> None:
    """As everywhere; what it returns is recorded like any other."""
    service = Service()
    job = in_two_lives(lambda service, _: step("ask", service.ask_in_a_thread, 1), service)
    await live(job, path)
    (done,) = await live(job, path)
    assert done.value == 1
    assert service.calls == [(1,)]


async def test_a_child_s_step_is_its_item_s(path: str) -> None:
    """A job that a job submits works for the same item, to any depth."""
    service = Service()

    async def call(service: Service, _life: int) -> Any:
        host: Any = penstock.current_job().host  # type: ignore[union-attr]

        async def child() -> Any:
            return await host.submit(step, "ask", service.ask, "from a grandchild")

        return await host.submit(child)

    job = in_two_lives(call, service)
    await live(job, path)
    assert steps_in(path) == [(1, "ask")]
    (done,) = await live(job, path)
    assert done.value == 1
    assert len(service.calls) == 1


async def test_a_thread_that_works_for_a_job_may_call_one(path: str) -> None:
    """By `from_thread`."""
    service = Service()

    def in_the_thread() -> Any:
        return penstock.from_thread(step, "ask", service.ask, 1)

    job = in_two_lives(lambda *_: penstock.to_thread(in_the_thread), service)
    await live(job, path)
    (done,) = await live(job, path)
    assert done.value == 1
    assert len(service.calls) == 1


async def test_a_child_that_outlives_its_item_leaves_nothing_in_the_journal(path: str) -> None:
    """Its step is called, whether it had begun before the item ended or begins after that; it is not recorded."""
    ended = asyncio.Event()
    service = Service()
    children = []

    async def slowly() -> Any:
        await ended.wait()
        return await service.ask()

    async def early() -> Any:
        return await step("early", slowly)

    async def late() -> Any:
        await ended.wait()
        return await step("late", service.ask)

    async def job(_item: int) -> None:
        host: Any = penstock.current_job().host  # type: ignore[union-attr]
        children.extend([host.submit(early), host.submit(late)])
        await asyncio.sleep(1)
        raise ValueError("the steps of what has failed are kept")

    async with Executor() as executor:
        await executor.as_completed(job, [1], key=int, journal=path)
        ended.set()
        assert sorted(await asyncio.gather(*children)) == [1, 2]
    assert steps_in(path) == []


async def test_without_a_journal_a_step_is_a_call() -> None:
    """The same code runs with and without one; arguments need not be comparable then."""
    service = Service()

    async def job(_item: int) -> Any:
        return [await step("ask", service.ask, object()), await step("ask", service.ask_in_a_thread)]

    async with Executor() as executor:
        assert await executor.map(job, [1]) == [[1, 2]]
        assert await executor.submit(job, 1) == [3, 4]


async def test_a_step_in_a_stream_that_a_job_reads_is_the_item_s(path: str) -> None:
    """It pays for what it maps over, to any depth; unless that stream has a journal of its own."""
    service = Service()

    async def part(number: int) -> Any:
        return await step("ask", service.ask, number)

    async def parts(number: int) -> Any:
        host: Any = penstock.current_job().host  # type: ignore[union-attr]
        return await host.map(part, [10 * number, 10 * number + 1])

    async def call(_service: Service, _life: int) -> Any:
        host: Any = penstock.current_job().host  # type: ignore[union-attr]
        return await host.map(parts, [1, 2])

    job = in_two_lives(call, service)
    await live(job, path)
    assert steps_in(path) == [(1, "ask")] * 4
    (done,) = await live(job, path)
    assert sorted(itertools.chain(*done.unwrap())) == [1, 2, 3, 4]
    assert len(service.calls) == 4
    assert steps_in(path) == []


def test_outside_a_job_there_is_no_step() -> None:
    """Nor a key for one; it says where they belong."""
    with pytest.raises(UsageError, match=r"penstock\.step\(\) was called outside a job"):
        asyncio.run(step("ask", Service().ask))
    with pytest.raises(UsageError, match=r"penstock\.idempotency_key\(\) was called outside a job"):
        idempotency_key("ask")


# --- steps that do not return ---


async def test_a_step_that_raises_is_called_again(path: str) -> None:
    """Its error is the job's to handle, and is not recorded."""
    calls = []

    async def ask() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no route")
        return 7

    job = in_two_lives(lambda *_: step("ask", ask), Service())
    (failed,) = await live(job, path)
    assert str(failed.error) == "no route"
    assert steps_in(path) == []
    (done,) = await live(job, path)
    assert done.value == 7


async def test_a_step_that_is_cancelled_is_called_again(path: str) -> None:
    """The cancellation reaches what it calls."""
    calls: list[str] = []

    async def ask() -> int:
        calls.append("begun")
        try:
            await asyncio.sleep(100 if len(calls) == 1 else 0)
        except asyncio.CancelledError:
            calls.append("cancelled")
            raise
        return 7

    async def job(_item: int) -> int:
        async with asyncio.timeout(1):
            return await step("ask", ask)

    (failed,) = await live(job, path)
    assert isinstance(failed.error, TimeoutError)
    assert steps_in(path) == []
    (done,) = await live(job, path)
    assert done.value == 7
    assert calls == ["begun", "cancelled", "begun"]


async def test_a_step_whose_result_cannot_be_written_says_so(path: str) -> None:
    """To the job that called it; nobody could resume from it."""

    async def ask() -> object:
        return object()

    async def job(_item: int) -> None:
        await step("ask", ask)

    (outcome,) = await live(job, path)
    assert isinstance(outcome.error, UsageError)
    assert "cannot be recorded in the journal" in str(outcome.error)
    assert steps_in(path) == []


@pytest.mark.parametrize("name", [None, 7, b"ask"])
async def test_a_step_has_a_name(path: str, name: Any) -> None:
    """Text; an error says so before anything is called."""
    service = Service()
    (outcome,) = await live(of_one_step(name, service.ask), path)
    assert isinstance(outcome.error, UsageError)
    assert "expected the name of a step" in str(outcome.error)
    assert service.calls == []


async def test_a_name_that_no_file_can_hold_is_refused_and_the_others_go_on(path: str) -> None:
    """A mistake of one job is not a trouble of the disk."""
    service = Service()

    async def job(item: int) -> None:
        await step("\ud800" if item == 1 else "ask", service.ask)
        await asyncio.sleep(1)

    outcomes = await live(job, path, [1, 2])
    by_key = {outcome.key: outcome for outcome in outcomes}
    assert isinstance(by_key[1].error, UsageError)
    assert by_key[2].ok


async def test_a_step_calls_a_function(path: str) -> None:
    """Not what a function has returned: a coroutine would run once and never again."""
    service = Service()

    async def job(_item: int) -> None:
        coroutine: Any = service.ask()
        try:
            await step("ask", coroutine)
        finally:
            coroutine.close()

    (outcome,) = await live(job, path)
    assert isinstance(outcome.error, UsageError)
    assert service.calls == []


# --- arguments ---


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Record:
    id: int
    tags: frozenset[str]
    mother: "Record | None" = None


def comparable(number: int) -> list[Any]:
    """Arguments of each kind that can be compared; equal for equal numbers, made anew each time."""
    return [
        [number, float(number), str(number), None, True, {"a": [number]}],
        (b"%d" % number, bytearray(b"%d" % number), memoryview(b"%d" % number)),
        {f"{letter}{number}" for letter in "abcdefgh"},
        frozenset({(number, "x"), (number, "y")}),
        datetime.datetime(2026, 1, 2, 3, number, tzinfo=datetime.UTC),
        datetime.timedelta(seconds=number),
        decimal.Decimal(number) / 7,
        uuid.UUID(int=number),
        PurePosixPath(f"/a/{number}"),
        Path(f"/a/{number}"),
        complex(1, number),
        Colour.RED,
        Record(number, frozenset({"a", "b"}), Record(0, frozenset())),
        {2: "b", 1: "a"},
        math.inf,
    ]


async def test_arguments_of_many_kinds_are_compared(path: str) -> None:
    """By what they say, in each process the same."""
    service = Service()

    async def call(service: Service, _life: int) -> list[Any]:
        return [await step(f"ask {place}", service.ask, each) for place, each in enumerate(comparable(1))]

    job = in_two_lives(call, service)
    (failed,) = await live(job, path)
    assert str(failed.error) == "the first time"
    (done,) = await live(job, path)
    assert done.value == list(range(1, len(comparable(1)) + 1))


async def test_arguments_that_say_something_else_are_others(path: str) -> None:
    """Within each kind."""
    service = Service()

    async def call(service: Service, life: int) -> list[Any]:
        different = [one for one, other in zip(comparable(life), comparable(1 - life), strict=True) if one != other]
        assert len(different) >= 11
        return [await step(f"ask {place}", service.ask, each) for place, each in enumerate(different)]

    job = in_two_lives(call, service)
    await live(job, path)
    before = len(service.calls)
    await live(job, path)
    assert len(service.calls) == 2 * before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values, json_values)
def test_two_arguments_are_the_same_step_exactly_if_they_are_equal(one: Any, other: Any) -> None:
    """As JSON tells them: 1 and 1.0 and True are three, and so are text and bytes."""
    same = _hash_of("ask", (one,), {}) == _hash_of("ask", (other,), {})
    assert same == (tagged(one) == tagged(other))


def tagged(value: Any) -> Any:
    if isinstance(value, list):
        return [tagged(each) for each in value]
    if isinstance(value, dict):
        return {key: tagged(each) for key, each in value.items()}
    return (type(value).__name__, repr(value))


class Client:
    """What has no meaning beyond its process."""


@pytest.mark.parametrize(
    "argument",
    [Client(), {"a": Client()}, {Client()}, Record, {1: "a", "b": 2}, pytest],
    ids=lambda each: type(each).__name__,
)
async def test_arguments_that_cannot_be_compared_are_refused(path: str, argument: Any) -> None:
    """Before anything is called; it says how to pass them."""
    service = Service()
    (outcome,) = await live(of_one_step("ask", service.ask, argument), path)
    assert isinstance(outcome.error, UsageError)
    assert "functools.partial" in str(outcome.error)
    assert service.calls == []


async def test_an_argument_that_contains_itself_is_refused(path: str) -> None:
    """It has no end."""
    endless: list[Any] = []
    endless.append(endless)
    (outcome,) = await live(of_one_step("ask", Service().ask, endless), path)
    assert isinstance(outcome.error, UsageError)
    assert "functools.partial" in str(outcome.error)


async def test_what_is_bound_is_not_compared(path: str) -> None:
    """As the refusal advises."""
    service = Service()

    async def ask(client: Client, number: int) -> Any:
        return await service.ask(number)

    job = in_two_lives(lambda *_: step("ask", functools.partial(ask, Client()), 1), service)
    await live(job, path)
    (done,) = await live(job, path)
    assert done.value == 1
    assert len(service.calls) == 1


# --- idempotency keys ---

PROGRAM = """
import asyncio, sys, penstock
async def charge(item):
    return penstock.idempotency_key("charge")
async def main():
    async with penstock.Executor() as executor:
        for outcome in await executor.as_completed(charge, [7, "7", b"7", 7.5], key=lambda item: item):
            print(type(outcome.key).__name__, outcome.value)
asyncio.run(main())
"""


def test_an_idempotency_key_is_the_same_in_each_process() -> None:
    """And so over restarts and on other machines, whatever the hashes of that process are."""
    told = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", PROGRAM]
        ended = subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, timeout=60, text=True
        )
        assert ended.returncode == 0, ended.stderr
        told.append(sorted(ended.stdout.split("\n")))
    assert told[0] == told[1]
    assert len(set(told[0])) == 5  # four keys, and the end


async def keys_of(job: Job, items: Iterable[Any]) -> list[str]:
    async with Executor() as executor:
        outcomes = await executor.as_completed(job, items, key=lambda item: item)
    return [outcome.unwrap() for outcome in outcomes]


async def test_idempotency_keys_differ_by_job_item_and_step() -> None:
    """Text from a number, too; nothing else makes a difference. They are hexadecimal digits."""

    async def charge(_item: Any) -> str:
        return idempotency_key("charge")

    async def refund(_item: Any) -> str:
        return idempotency_key("charge")

    async def other_step(_item: Any) -> str:
        return idempotency_key("settle")

    async def no_step(_item: Any) -> str:
        assert idempotency_key() == idempotency_key("")
        return idempotency_key()

    other_step.__qualname__ = no_step.__qualname__ = charge.__qualname__
    items = [7, "7", b"7", 7.0, 8, "", b"", 0, -7]
    keys = [await keys_of(job, items) for job in (charge, refund, other_step, no_step)]
    flat = [key for each in keys for key in each]
    assert len(set(flat)) == 4 * len(items)
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in flat)
    assert await keys_of(charge, items) == keys[0]


async def test_a_child_and_a_thread_have_the_idempotency_key_of_their_item() -> None:
    """They work for it."""

    async def job(_item: int) -> str:
        host: Any = penstock.current_job().host  # type: ignore[union-attr]

        async def child() -> str:
            return idempotency_key("charge")

        own = idempotency_key("charge")
        assert await host.submit(child) == own
        assert await penstock.to_thread(idempotency_key, "charge") == own
        return own

    await keys_of(job, [1])


@pytest.mark.parametrize("key", [None, object(), True], ids=lambda key: type(key).__name__)
async def test_an_item_without_a_key_has_no_idempotency_key(key: Any) -> None:
    """It would be that of all items."""

    async def job(_item: int) -> str:
        return idempotency_key("charge")

    async with Executor() as executor:
        (outcome,) = await executor.as_completed(job, [1], key=lambda _: key)
        with pytest.raises(UsageError, match="Give the run a key="):
            await executor.submit(job, 1)
    assert isinstance(outcome.error, UsageError)
    assert "Give the run a key=" in str(outcome.error)


@pytest.mark.parametrize("name", [None, 7, object()])
async def test_an_idempotency_key_is_that_of_a_step_s_name(name: Any) -> None:
    """Anything else is a mistake."""

    async def job(_item: int) -> str:
        return idempotency_key(name)

    async with Executor() as executor:
        (outcome,) = await executor.as_completed(job, [1], key=int)
    assert isinstance(outcome.error, UsageError)
