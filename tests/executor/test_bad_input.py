"""Wrong calls: each gets an error of the tree that says what was found, what was expected and what to write."""

import asyncio
from typing import Any

import pytest

from penstock import ClosedError, Executor, UsageError, WrongLoop

pytestmark = pytest.mark.virtual_clock


async def job(item: Any) -> Any:
    return item


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8"])
@pytest.mark.parametrize("name", ["limit", "threads"])
def test_limits_are_whole_numbers_above_zero(name: str, value: Any) -> None:
    """Zero would hang, a flag or a text is a mistake: refused when the executor is made."""
    with pytest.raises(UsageError, match=f"{name}={value!r}: expected a whole number of at least 1"):
        Executor(**{name: value})


@pytest.mark.parametrize("buffersize", [0, -3, True])
async def test_the_window_holds_at_least_one_item(buffersize: int) -> None:
    """A window of nothing would never move."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match="buffersize="):
            executor.map(job, [1], buffersize=buffersize)


@pytest.mark.parametrize("timeout", [0, -1.0, True, float("nan"), "5"])
async def test_a_timeout_is_above_zero(timeout: Any) -> None:
    """A timeout of nothing would fail every job."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match="expected seconds above 0, or None for no limit"):
            executor.as_completed(job, [1], timeout=timeout)


@pytest.mark.parametrize("max_errors", [-1, -0.5, True, 1.0, 5.0, float("nan"), float("inf"), "5"])
async def test_max_errors_is_a_count_or_a_share(max_errors: Any) -> None:
    """Negative and boolean values mean nothing; a share of 1 or more is a count that was written as a float."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match=r"expected a count \(int\) of at least 0, or a share \(float\)"):
            executor.as_completed(job, [1], max_errors=max_errors)


@pytest.mark.parametrize("items", [5, None, job])
async def test_items_are_iterable(items: Any) -> None:
    """Refused at the call, not at the first item."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match="as items, expected an iterable or an async iterable"):
            executor.map(job, items)
        with pytest.raises(UsageError, match="as items, expected an iterable or an async iterable"):
            executor.as_completed(job, items)


async def test_map_without_items_is_a_mistake() -> None:
    """`map(fn)` would be an empty list; nobody means that."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match=r"found no items. Write `executor.map\(fn, items\)`"):
            executor.map(job)


async def test_key_is_a_function() -> None:
    """The name of a field is a common guess."""
    async with Executor() as executor:
        with pytest.raises(UsageError, match="operator.itemgetter"):
            executor.as_completed(job, [], key="id")  # type: ignore[call-overload]


async def test_an_async_function_does_not_belong_in_a_thread() -> None:
    """Its coroutine would never be awaited."""
    async with Executor() as executor:
        for run in (executor.to_thread, executor.compute):
            with pytest.raises(
                UsageError, match=r"found 17, expected a function\. Write `executor\.(to_thread|compute)\("
            ):
                _ = await run(17, 1)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match=r"found a coroutine object \(job\)"):
                _ = await run(job(1))  # type: ignore[arg-type]
            with pytest.raises(
                UsageError, match=r"found job, which is an async function: it needs no thread\. Write `await job"
            ):
                _ = await run(job, 1)


@pytest.mark.parametrize("instruments", [[print], 5, print])
def test_instruments_are_told_by_their_notify(instruments: Any) -> None:
    """A mere function would be dropped at its first event; it is refused at once."""
    with pytest.raises(UsageError, match="objects with a method notify"):
        Executor(instruments=instruments)


async def test_a_stream_belongs_to_the_loop_that_made_it() -> None:
    """Reading it elsewhere is refused; here it still works."""
    async with Executor() as executor, executor.map(job, [1, 2]) as stream:

        async def elsewhere() -> None:
            await anext(stream)

        with pytest.raises(WrongLoop, match="read it on the loop where it was made"):
            await executor.submit(lambda: asyncio.run(elsewhere()))
        assert [value async for value in stream] == [1, 2]


async def test_a_stream_is_refused_by_a_closed_executor() -> None:
    """At the call, and at the first use of a stream that was made before."""
    async with Executor() as executor:
        stream = executor.map(job, [1])
    with pytest.raises(ClosedError, match="after shutdown"):
        await stream
    with pytest.raises(ClosedError, match="after shutdown"):
        executor.map(job, [1])
    await stream.aclose()
