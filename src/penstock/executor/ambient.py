"""The executor's calls for code that runs inside a job and is not handed the executor."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ParamSpec, TypeVar, overload

from penstock.context import host_of_current_job
from penstock.outcome import Outcome
from penstock.threads.portal import refuse_on_a_loop

P = ParamSpec("P")
I = TypeVar("I")  # noqa: E741  # the item
T = TypeVar("T")


async def to_thread(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Inside a job: `Executor.to_thread` of the executor that runs it.

    Raises:
        UsageError: outside a job.
        ClosedError: the job has outlived its executor.
        Exception: what `fn` raised.
    """
    return await host_of_current_job("to_thread").to_thread(fn, *args, **kwargs)


async def compute(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Inside a job: `Executor.compute` of the executor that runs it.

    Raises:
        UsageError: outside a job.
        ClosedError: the job has outlived its executor.
        Exception: what `fn` raised.
    """
    return await host_of_current_job("compute").compute(fn, *args, **kwargs)


async def compute_each(fn: Callable[[I], T], items: Iterable[I], /) -> list[Outcome[T]]:
    """Inside a job: `Executor.compute_each` of the executor that runs it.

    Raises:
        UsageError: outside a job, or `fn` is an async function, or `items` is not iterable.
        ClosedError: the job has outlived its executor.
        Exception: what iterating over `items` raised.
    """
    return await host_of_current_job("compute_each").compute_each(fn, items)


async def to_process(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Inside a job: `Executor.to_process` of the executor that runs it.

    Raises:
        UsageError: outside a job, or `fn` cannot be sent to another process.
        ClosedError: the job has outlived its executor.
        concurrent.futures.process.BrokenProcessPool: a process died.
        Exception: what `fn` raised.
    """
    return await host_of_current_job("to_process").to_process(fn, *args, **kwargs)


@overload
def from_thread(fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


@overload
def from_thread(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


def from_thread(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """In a thread that works for a job: `Executor.from_thread` of the executor that runs the job. Blocks.

    What `fn` returns is awaited if it can be: the future of `submit`, the stream of `map`.

    Raises:
        UsageError: outside a job.
        WrongThread: called on a thread that runs an event loop.
        ClosedError: the job has outlived its executor.
        concurrent.futures.CancelledError: nobody waits for the call of this thread any more.
        Exception: what `fn` raised.
    """
    refuse_on_a_loop(fn)
    return host_of_current_job("from_thread").from_thread(fn, *args, **kwargs)
