"""The types are part of the interface: what a type checker sees of each call. Checked by mypy, and run as well."""

import asyncio
import functools
import json
import pickle
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, assert_type

import pytest

import penstock
from penstock import (
    Adaptive,
    BlockingClient,
    Breaker,
    Budget,
    CircuitOpen,
    Codec,
    DeadLetter,
    Executor,
    Gate,
    HttpClient,
    Job,
    Journal,
    KeyStatistics,
    LimitChange,
    Limiter,
    LimitRule,
    Outcome,
    Permit,
    Pool,
    Rate,
    Report,
    Response,
    Stream,
)

pytestmark = pytest.mark.virtual_clock


async def length(text: str) -> int:
    return len(text)


def plain_length(text: str) -> int:
    return len(text)


class Scorer:
    async def __call__(self, text: str) -> float:
        return float(len(text))


async def texts() -> AsyncIterator[str]:
    yield "a"


async def test_submit_gives_a_future_of_what_the_function_returns() -> None:
    """Async and plain functions, partials, objects with an async call."""
    async with Executor() as executor:
        assert_type(executor.submit(length, "a"), asyncio.Future[int])
        assert_type(executor.submit(functools.partial(length, "a")), asyncio.Future[int])
        assert_type(executor.submit(Scorer(), "a"), asyncio.Future[float])
        assert_type(await executor.submit(plain_length, "abc"), int)


async def test_map_gives_a_stream_of_values() -> None:
    """A list when awaited, single values when iterated."""
    async with Executor() as executor:
        stream_of_values = assert_type(executor.map(length, ["a"]), Stream[int])
        await stream_of_values
        assert_type(await executor.map(length, texts()), list[int])
        assert_type(await executor.map(plain_length, ["a"]), list[int])
        async with executor.map(Scorer(), ["a"]) as stream:
            async for value in stream:
                assert_type(value, float)


async def test_as_completed_gives_outcomes_of_what_the_function_returns() -> None:
    """The value may be missing; `unwrap` gives it or raises."""
    async with Executor() as executor, executor.as_completed(length, ["a"]) as stream:
        async for outcome in stream:
            assert_type(outcome, Outcome[int])
            assert_type(outcome.value, int | None)
            assert_type(outcome.unwrap(), int)


async def test_gates_threads_and_runs_keep_their_types() -> None:
    """Through a gate, in a thread, over a whole run."""
    assert_type(await Gate("g").call(length, "a"), int)
    assert_type(await Gate("g").call(plain_length, "a"), int)
    async with Executor() as executor:
        assert_type(await executor.to_thread(plain_length, "a"), int)
        assert_type(await executor.compute(plain_length, "a"), int)
        assert_type(await executor.compute_each(plain_length, ["a"]), list[Outcome[int]])
        assert_type(await executor.run(length, ["a"]), Report)


async def test_calls_of_the_current_job_s_executor_have_the_types_of_the_executor_s() -> None:
    """To threads, and back."""

    def in_a_thread() -> int:
        assert_type(penstock.from_thread(plain_length, "a"), int)
        return assert_type(penstock.from_thread(length, "a"), int)

    async def job() -> int:
        assert_type(await penstock.compute(plain_length, "a"), int)
        assert_type(await penstock.compute_each(plain_length, ["a"]), list[Outcome[int]])
        return assert_type(await penstock.to_thread(in_a_thread), int)

    async with Executor() as executor:
        assert await executor.submit(job) == 1


async def test_processes_keep_the_type_of_the_function() -> None:
    """A built-in, which any process can import."""

    async def job() -> int:
        return assert_type(await penstock.to_process(len, "a"), int)

    async with Executor(processes=1) as executor:
        assert_type(await executor.to_process(len, "ab"), int)
        assert await executor.submit(job) == 1


def sdk_length(sdk: Scorer, text: str, *, twice: bool = False) -> int:
    return len(text) * (1 + twice)


async def test_a_blocking_client_knows_its_client_and_the_arguments_of_a_function() -> None:
    """`run` gives what the function returns; `call` goes by a name, so its value may be anything."""
    async with assert_type(BlockingClient(Scorer), BlockingClient[Scorer]) as client:
        assert_type(await client.run(sdk_length, "a", twice=True), int)
        assert_type(await client.call("__repr__"), Any)


async def test_a_pool_lends_what_its_factory_makes() -> None:
    """An async factory's value is awaited."""

    async def connect() -> Scorer:
        return Scorer()

    async with assert_type(Pool(connect, size=1), Pool[Scorer]) as pool, pool.acquire() as resource:
        assert_type(resource, Scorer)
    async with assert_type(Pool(Scorer, size=1), Pool[Scorer]) as pool, pool.acquire() as resource:
        assert_type(resource, Scorer)


@penstock.job
async def scoring() -> AsyncGenerator[Callable[[str], Awaitable[int]], None]:
    yield length


async def test_a_job_keeps_the_type_of_its_function() -> None:
    """Whoever opens it gets the function as it was yielded."""
    assert_type(scoring, Job[Callable[[str], Awaitable[int]]])
    async with scoring.open() as fn:
        assert_type(await fn("a"), int)


class Fixed:
    """A rule of somebody's own, as `LimitRule` and `Limiter` want it."""

    def limiter(self, now: float, most: int | None, rng: random.Random) -> Limiter:
        return FixedLimiter()


class FixedLimiter:
    def __init__(self) -> None:
        self.limit = 2
        self.baseline: float | None = None
        self.queue = 0.0

    def started(self, now: float) -> int:
        return 1

    def ended(self, mark: int, now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        return None

    def contaminate(self) -> None: ...

    def half_open(self, now: float) -> LimitChange | None:
        return None

    def recovered(self, now: float) -> LimitChange | None:
        return None

    def cap(self, most: int | None, now: float) -> LimitChange | None:
        return None


def tokens_of(text: str) -> dict[str, float]:
    return {"tokens": float(len(text))}


def tokens_used(length: int) -> dict[str, float]:
    return {"tokens": float(length)}


def tokens_told(answer: Response) -> dict[str, float]:
    return {"tokens": answer.json()["usage"]}


async def test_limits_and_rates_may_be_numbers_values_or_rules_of_one_s_own() -> None:
    """As arguments, and when they are read and set while a run goes on."""
    rule: LimitRule = Adaptive(start=4, min=1, max=100)
    rates = {"requests": Rate(500, per=60), "tokens": Rate(90_000, per=60)}
    gate = Gate("g", limit=Fixed(), rate=rates, breaker=Breaker(fail_fast=True), weight=tokens_of, used=tokens_used)
    assert_type(await gate.call(length, "a"), int)
    assert_type(gate.limit, int | LimitRule)
    assert_type(gate.breaker, Breaker | None)
    gate.limit = 3
    gate.limit = rule
    gate.rate = Rate(10)
    gate.breaker = None
    async with HttpClient("http://example.com", limit=rule, rate=rates, breaker=None, used=tokens_told) as api:
        assert_type(api.limit, int | LimitRule)
    (seen,) = assert_type(gate.statistics(), dict[Hashable, KeyStatistics]).values()
    assert_type(seen.changes, tuple[LimitChange, ...])
    assert_type(seen.waited, dict[str, float])


async def test_a_permit_is_what_its_block_gets() -> None:
    """With methods that say how the round trip went."""
    async with assert_type(Gate("g").permit(weight=2), Permit) as permit:
        assert_type(permit, Permit)
        permit.settle({"requests": 1})
    assert issubclass(CircuitOpen, penstock.PenstockError)


async def test_the_limit_of_an_executor_is_read_as_a_number_and_set_as_one_or_none() -> None:
    """None measures it."""
    async with Executor(limit=4) as executor:
        assert_type(executor.limit, int)
        executor.limit = 8
        executor.limit = None


async def test_a_step_gives_what_its_function_returns() -> None:
    """Async or plain; the arguments are those of the function."""

    async def job(text: str) -> int:
        assert_type(penstock.idempotency_key("a"), str)
        assert_type(await penstock.step("b", plain_length, text), int)
        return assert_type(await penstock.step("a", length, text), int)

    async with Executor() as executor:
        assert (await executor.as_completed(job, ["a"], key=str))[0].value == 1


async def test_runs_and_streams_take_a_journal_as_a_path_or_with_options(tmp_path: Path) -> None:
    """Each module that can write and read values is a codec; a budget takes any unit."""
    for journal in (str(tmp_path / "a.db"), tmp_path / "b.db", Journal(tmp_path / "c.db", codec=pickle, resume="all")):
        async with Executor() as executor:
            report = await executor.run(length, ["a"], key=str, journal=journal, budget=Budget(usd=1.5, time=60))
            assert_type(report.spent, dict[str, float])
            async with executor.as_completed(length, ["a"], key=str, journal=journal) as stream:
                assert_type([outcome.value async for outcome in stream], list[int | None])
    codecs: list[Codec] = [json, pickle]
    assert codecs
    assert_type(penstock.dead(tmp_path / "a.db"), Iterator[DeadLetter])
    assert_type([letter.status for letter in penstock.dead(tmp_path / "a.db")], list[int | None])
