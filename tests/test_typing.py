"""The types are part of the interface: what a type checker sees of each call. Checked by mypy, and run as well."""

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import assert_type

import pytest

import penstock
from penstock import Executor, Gate, Job, Outcome, Report, Stream

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
    async with Executor() as executor:
        assert_type(await executor.to_thread(plain_length, "a"), int)
        assert_type(await executor.compute(plain_length, "a"), int)
        assert_type(await executor.run(length, ["a"]), Report)


@penstock.job
async def scoring() -> AsyncGenerator[Callable[[str], Awaitable[int]], None]:
    yield length


async def test_a_job_keeps_the_type_of_its_function() -> None:
    """Whoever opens it gets the function as it was yielded."""
    assert_type(scoring, Job[Callable[[str], Awaitable[int]]])
    async with scoring.open() as fn:
        assert_type(await fn("a"), int)
