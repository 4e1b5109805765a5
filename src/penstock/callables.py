"""What kind of function the user gave us. Decides only."""

import inspect
from collections.abc import Callable
from functools import partial
from types import AsyncGeneratorType, CodeType, CoroutineType, FunctionType, GeneratorType
from typing import Any, TypeVar

from penstock.errors import UsageError

T = TypeVar("T")


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives a coroutine: an async function, a partial of one, an object with an async call."""
    if type(fn) is FunctionType and fn.__code__.co_flags & inspect.CO_COROUTINE:
        return True  # as a rule: this is asked for every call
    fn = _inner(fn)
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(type(fn), "__call__", None))  # noqa: B004  # the attribute itself is asked about


def name_of(fn: Callable[..., Any]) -> str:
    """What a function is called in logs and errors."""
    fn = _inner(fn)
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def _inner(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What a partial calls in the end."""
    while isinstance(fn, partial):
        fn = fn.func
    return fn


def check_function(fn: object, call: str) -> None:
    """Refuse what cannot be called again and again; `call` is what the user wrote, such as `executor.map`.

    Raises:
        UsageError: a coroutine object, a generator function (async or plain), or anything that is not callable.
    """
    if isinstance(fn, CoroutineType):
        fn.close()
        raise UsageError(
            f"found a coroutine object ({fn.__qualname__}), expected a function: penstock calls it itself, where and "
            f"when it is to run. Write `{call}({fn.__name__}, ...)`, without calling {fn.__name__}."
        )
    if not callable(fn):
        raise UsageError(f"found {fn!r:.200}, expected a function. Write `{call}(fn, ...)`.")
    if _flags(fn) & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        _refuse_generator_function(fn)


def check_value(fn: Callable[..., T], value: T, call: str) -> T:
    """`value`, which `fn` returned in a thread: the check of a function where every microsecond counts.

    Raises:
        UsageError: `fn` is async or a generator function, or returned a coroutine instead of awaiting it.
    """
    if type(value) in _NOTHING_HAS_RUN:
        if isinstance(value, CoroutineType) and is_async(fn):
            value.close()
            raise UsageError(
                f"{call} found {name_of(fn)}, which is an async function: it needs no thread. "
                f"Write `await {value.__name__}(...)`."
            )
        refuse_coroutine(value, name_of(fn))
        check_function(fn, call)
    return value


_NOTHING_HAS_RUN = frozenset({CoroutineType, GeneratorType, AsyncGeneratorType})
"""What a function returns that has only been called."""


def _flags(fn: Callable[..., Any]) -> int:
    """The flags of the code that a call of `fn` runs; 0 where there is none to see."""
    fn = _inner(fn)
    code = getattr(fn, "__code__", None) or getattr(getattr(type(fn), "__call__", None), "__code__", None)  # noqa: B004  # the attribute itself is asked about
    return code.co_flags if isinstance(code, CodeType) else 0


def _refuse_generator_function(fn: Callable[..., Any]) -> None:
    if _flags(fn) & inspect.CO_GENERATOR:
        raise UsageError(
            f"found the generator function {name_of(fn)}: calling it would run none of it. Return the value instead "
            f"of yielding it, or return a list."
        )
    raise UsageError(
        f"found the async generator function {name_of(fn)}: calling it would run none of it. Return the value "
        f"instead of yielding it; if it opens what the job needs and yields the job function, decorate it with "
        f"@penstock.job and write `penstock.run({name_of(fn)}, items)`."
    )


def refuse_coroutine(value: object, who: object) -> None:
    """Refuse a coroutine that a function returned instead of awaiting it.

    Raises:
        UsageError: `value` is a coroutine; it is closed.
    """
    if type(value) is CoroutineType:
        value.close()
        raise UsageError(
            f"{who} returned a coroutine ({value.__qualname__}) that nobody awaits. "
            f"Make it, or the decorator that made it, `async def`, and write `return await {value.__name__}(...)`."
        )
