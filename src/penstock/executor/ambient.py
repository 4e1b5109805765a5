"""The calls for code that runs inside a job and is not handed the executor: the executor's own, and `spend`."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ParamSpec, TypeVar, overload

from penstock.context import current_job, host_of_current_job
from penstock.errors import UsageError
from penstock.executor.ledger import RESERVED_UNITS
from penstock.gate.rate import is_amount
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


def spend(**units: float) -> None:
    """Inside a job: say what it has spent, in any units: `penstock.spend(usd=0.002, tokens=812)`.

    It is added to what the item has cost, whichever job works for that item, and to the sums of the run: the report
    shows them, and a `Budget` that names the unit stops the run when it is reached. Nothing is undone when the job
    fails. Does not block; any thread that works for the job, but not another process.

    Raises:
        UsageError: outside a job; no unit, one that is measured anyhow, or an amount that is no finite number of at
            least 0.
    """
    job = current_job()
    if job is None:
        raise UsageError(
            "penstock.spend was called outside a job, so nobody would pay. Call it in the job, or in a thread that "
            "works for one; from to_process, return the amounts and spend them in the job."
        )
    if not units:
        raise UsageError("penstock.spend() found nothing to spend. Write penstock.spend(usd=0.002, tokens=812).")
    for unit, amount in units.items():
        if unit in RESERVED_UNITS:
            raise UsageError(f"penstock.spend({unit}={amount!r:.100}): {unit} is measured, so choose another name.")
        if not is_amount(amount):
            raise UsageError(f"penstock.spend({unit}={amount!r:.100}): expected a finite number of at least 0.")
    job.spend(units)
