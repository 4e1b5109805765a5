"""The executor's calls for code that runs inside a job and is not handed the executor."""

from collections.abc import Callable
from typing import Any, TypeVar

from penstock.context import host_of_current_job

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
