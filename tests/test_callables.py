"""What kind of function the user gave us, and what is refused with which words."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any
from unittest.mock import AsyncMock

import pytest

from penstock.callables import check_function, check_value, is_async, name_of, refuse_coroutine
from penstock.errors import UsageError


async def score(record: int, scale: int = 1) -> int:
    return record * scale


def blocking(record: int) -> int:
    return record


async def generating(_record: int) -> AsyncIterator[int]:
    yield 1


def plainly_generating(_record: int) -> Iterator[int]:
    yield 1


class Generating:
    def __call__(self, _record: int) -> Iterator[int]:
        yield 1

    def method(self, _record: int) -> Iterator[int]:
        yield 1


GENERATOR_FUNCTIONS: list[Callable[..., Any]] = [
    plainly_generating,
    functools.partial(plainly_generating),
    functools.partial(functools.partial(plainly_generating, 1)),
    Generating(),
    Generating().method,
]


def forgets_to_await(record: int) -> Coroutine[Any, Any, int]:
    return score(record)


class AsyncCallable:
    async def __call__(self, record: int) -> int:
        return record

    async def method(self, record: int) -> int:
        return record

    @classmethod
    async def of_class(cls, record: int) -> int:
        return record

    @staticmethod
    async def static(record: int) -> int:
        return record


class PlainCallable:
    func = 3
    """An attribute of that name does not make it a partial."""

    def __call__(self, record: int) -> int:
        return record

    def method(self, record: int) -> int:
        return record


ASYNC: list[Callable[..., Any]] = [
    score,
    functools.partial(score, scale=2),
    functools.partial(functools.partial(score, 1), scale=2),
    AsyncCallable(),
    AsyncCallable().method,
    AsyncCallable.of_class,
    AsyncCallable.static,
    functools.partial(AsyncCallable()),
    functools.partial(AsyncCallable().method),
    AsyncMock(),
]
PLAIN: list[Callable[..., Any]] = [
    blocking,
    functools.partial(blocking),
    PlainCallable(),
    PlainCallable().method,
    AsyncCallable,
    PlainCallable,
    len,
    "x".join,
    lambda record: record,
    forgets_to_await,
]


@pytest.mark.parametrize("fn", ASYNC, ids=name_of)
async def test_a_function_that_gives_a_coroutine_is_async(fn: Callable[..., Any]) -> None:
    """However it is dressed: partials, methods, objects with an async call."""
    assert is_async(fn)


@pytest.mark.parametrize("fn", PLAIN, ids=name_of)
def test_all_other_callables_are_plain(fn: Callable[..., Any]) -> None:
    """A class is called to make an object, so it is plain even if its objects are async."""
    assert not is_async(fn)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (score, "score"),
        (functools.partial(score, scale=2), "score"),
        (functools.partial(functools.partial(AsyncCallable().method)), "AsyncCallable.method"),
        (functools.partial(AsyncCallable()), "AsyncCallable"),
        (PlainCallable(), "PlainCallable"),
        (PlainCallable, "PlainCallable"),
        (len, "len"),
    ],
)
def test_a_function_is_called_by_the_name_the_user_gave_it(fn: Callable[..., Any], name: str) -> None:
    assert name_of(fn) == name


@pytest.mark.parametrize("fn", [*ASYNC, *PLAIN], ids=name_of)
def test_what_can_be_called_passes(fn: Callable[..., Any]) -> None:
    check_function(fn, "executor.map")


def test_a_coroutine_object_is_refused_and_closed() -> None:
    """Closed, so that Python does not warn of it as well."""
    coroutine = score(1)
    with pytest.raises(UsageError) as caught:
        check_function(coroutine, "executor.submit")
    assert str(caught.value) == (
        "found a coroutine object (score), expected a function: penstock calls it itself, where and when it is to run. "
        "Write `executor.submit(score, ...)`, without calling score."
    )
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@pytest.mark.parametrize("found", [3, None, "score", [score]], ids=["a number", "None", "a text", "a list"])
def test_what_cannot_be_called_is_refused(found: object) -> None:
    with pytest.raises(UsageError, match=r"found .*, expected a function. Write `executor.map\(fn, ...\)`\."):
        check_function(found, "executor.map")


async def test_a_task_is_refused() -> None:
    """It runs already: there is nothing left to call."""
    task = asyncio.create_task(score(1))
    with pytest.raises(UsageError, match="found <Task"):
        check_function(task, "executor.map")
    await task


def test_a_large_object_does_not_flood_the_message() -> None:
    with pytest.raises(UsageError) as caught:
        check_function(list(range(100_000)), "executor.map")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("fn", [generating, functools.partial(generating)], ids=name_of)
def test_an_async_generator_function_is_refused(fn: Callable[..., Any]) -> None:
    """Calling it runs nothing: every job would succeed and have done no work. Most often a decorator is missing."""
    with pytest.raises(UsageError, match=r"async generator function generating: .*@penstock\.job.*run\(generating,"):
        check_function(fn, "executor.map")


@pytest.mark.parametrize("fn", GENERATOR_FUNCTIONS, ids=name_of)
def test_a_generator_function_is_refused(fn: Callable[..., Any]) -> None:
    """For the same reason, however it is dressed."""
    with pytest.raises(UsageError, match=r"found the generator function \S*: .* none of it\. Return the value instead"):
        check_function(fn, "executor.map")


@pytest.mark.parametrize("fn", [*GENERATOR_FUNCTIONS, generating], ids=name_of)
def test_what_a_generator_function_returned_is_refused(fn: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"found the (async )?generator function .* none of it"):
        check_value(fn, fn(*[] if getattr(fn, "args", None) else [1]), "executor.compute")


def test_what_an_async_function_returned_in_a_thread_is_refused_and_closed() -> None:
    """It belongs on the loop."""
    coroutine: Any = score(1)
    with pytest.raises(UsageError) as caught:
        _ = check_value(score, coroutine, "executor.to_thread")
    assert str(caught.value) == (
        "executor.to_thread found score, which is an async function: it needs no thread. Write `await score(...)`."
    )
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
    with pytest.raises(UsageError, match=r"forgets_to_await returned a coroutine \(score\)"):
        _ = check_value(forgets_to_await, forgets_to_await(1), "executor.to_thread")


def test_a_generator_that_a_plain_function_returned_is_a_value() -> None:
    """It was made on purpose, to be read by the caller."""
    squares = (number * number for number in range(3))
    assert check_value(lambda: squares, squares, "executor.compute") is squares
    assert check_value(len, 3, "executor.compute") == 3


def test_a_coroutine_that_nobody_awaited_is_refused_and_closed() -> None:
    coroutine = forgets_to_await(1)
    with pytest.raises(UsageError) as caught:
        refuse_coroutine(coroutine, "<job f>")
    assert str(caught.value) == (
        "<job f> returned a coroutine (score) that nobody awaits. "
        "Make it, or the decorator that made it, `async def`, and write `return await score(...)`."
    )
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@pytest.mark.parametrize("value", [None, 3, score, generating(1)], ids=["none", "int", "function", "generator"])
def test_any_other_value_is_a_value(value: object) -> None:
    refuse_coroutine(value, "<job f>")
