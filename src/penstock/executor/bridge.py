"""The synchronous face: a `concurrent.futures.Executor` over an event loop in a thread of its own.

    program -- submit(fn) --> BridgeExecutor (this face) -> Bridged (its threads) -> Future -- result() --> program

What is here is the standard library's contract: arguments, `map`, the `with` block, what the garbage collector does.
Where things run is in `bridged.py`.

Threads: any.
"""

import asyncio
import copy
import inspect
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from itertools import islice
from types import FunctionType
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar, overload

from penstock import clock
from penstock.callables import check_function, is_async, name_of
from penstock.clients.http import HttpClient
from penstock.errors import UsageError
from penstock.executor.bridged import Bridged
from penstock.executor.definition import Job
from penstock.executor.statistics import ExecutorStatistics
from penstock.executor.synchronous import SyncHttpClient, opened
from penstock.gate.retry import check_timeout
from penstock.threads.future import WatchedFuture
from penstock.threads.main_guard import refuse_a_child_that_imports
from penstock.threads.own_loop import check_loop_factory

T = TypeVar("T")
P = ParamSpec("P")


class _Options(NamedTuple):
    """What `with_options` sets."""

    key: Any = None
    timeout: float | None = None


_NO_OPTIONS = _Options()
_NO_PLAIN_FUNCTION = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class BridgeExecutor(Executor):
    """A `concurrent.futures.Executor` for synchronous programs, for coroutine functions and plain functions.

        with BridgeExecutor() as bridge, bridge.open(HttpClient("http://example.com")) as api:
            futures = [bridge.submit(score, record) for record in records]      # score: async or not
            for future in concurrent.futures.as_completed(futures):
                print(future.result())

    Coroutine functions run as jobs on an event loop in a thread of its own: with an identity, gates, lanes and clients
    as under `Executor`. Plain functions run in threads of its own. All futures are those of the standard library, and
    what that says of `submit`, `map`, `shutdown`, `wait` and `as_completed` holds. Threads start at the first use.

    A function that runs here may submit here and wait for it. For a thread that waits (in `result`, `exception`, `wait`
    or `as_completed`) another one stands in, which runs what is waited for. So plain functions may wait for each other
    512 deep, then `DeadlockError` is raised; coroutines, which await the future itself, to any depth.

    **Threads**: any may use it, at once; also one that runs another event loop, in `loop.run_in_executor(bridge, fn)`.
    **Exit and fork** as for `ThreadPoolExecutor`: the interpreter waits at its exit for what has been submitted; one
    that is garbage collected finishes what it has and ends; in the child of a fork it cannot be used if it was in use
    before.

    Args:
        max_workers: threads for plain functions, beside those that stand in for one that waits. None measures how many:
            they are made while calls wait for one longer than 20 ms, and end when they are idle.
        thread_name_prefix: what the threads are called.
        initializer: called in each of these threads when it starts, with `initargs`. When it fails, the executor is
            broken: what waits for a thread fails, and nothing more can be submitted.
        initargs: its arguments.
        limit: jobs that run at once; None measures how many, see `Executor`.
        loop_factory: makes the event loop, such as `uvloop.new_event_loop`; None asks asyncio's policy.

    Raises:
        ValueError: `max_workers` is less than 1.
        TypeError: it is no whole number, or `initializer` cannot be called.
        UsageError: `limit` or `loop_factory` cannot work.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        thread_name_prefix: str = "",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        limit: int | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> None:
        _check_max_workers(max_workers)
        _check_initializer(initializer)
        check_loop_factory(loop_factory)
        refuse_a_child_that_imports("A BridgeExecutor")
        self._bridged = Bridged(max_workers, thread_name_prefix, initializer, initargs, limit, loop_factory)
        self._options = _NO_OPTIONS
        self._viewed: BridgeExecutor | None = None
        """Whose view this is: it has to live as long."""
        weakref.finalize(self, self._bridged.shutdown, wait=False).atexit = False

    def __repr__(self) -> str:
        bridged = self._bridged
        state = bridged.state
        threads = "" if state == "forked" else f" threads={len(bridged.workers.threads)}"  # its lock may be held
        return f"<BridgeExecutor {bridged.name} {state}{threads}>"

    @overload
    def submit(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]": ...

    @overload
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]": ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `fn(*args, **kwargs)`: a coroutine function as a job on the loop, a plain one in a thread.

        Never blocks, but for a moment at the first use. Any thread, also the loop's own: there, await the future, or
        `asyncio.wrap_future(future)` where types are checked. What waits has no bound: use `map` with `buffersize=` for
        many items. Context variables go along.

        **Cancellation**: `future.cancel()` cancels the coroutine, whether it has begun or not; a plain function only
        before it has begun. The future of a coroutine says at once that it is cancelled; `wait` and `as_completed` wait
        until the coroutine has ended.

        A future that fails and is thrown away before anybody asked for its error is logged (`penstock.jobs`).

        Raises:
            UsageError: `fn` is a coroutine object, an async generator function, a `@penstock.job` or not callable.
            ClosedError: it has been shut down, or was in use before this process was forked. A `RuntimeError`.
            concurrent.futures.BrokenExecutor: an initializer has failed, or the event loop has ended.
            RuntimeError: the interpreter is about to end.
        """
        return self._submit(fn, args, kwargs)

    def _submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> WatchedFuture[Any]:
        options = self._options
        as_a_rule = type(fn) is FunctionType and not fn.__code__.co_flags & _NO_PLAIN_FUNCTION
        if as_a_rule and options is _NO_OPTIONS and not fn.__dict__:  # in which 3.12 marks coroutine functions
            return self._bridged.submit_plain(fn, args, kwargs, None)  # every microsecond counts
        _check_function(fn)
        key = None if options.key is None else _key_of(options.key, fn, args)
        if options.timeout is None and not is_async(fn):
            return self._bridged.submit_plain(fn, args, kwargs, key)
        return self._bridged.submit(fn, args, kwargs, key, options.timeout)

    @overload
    def map(
        self, fn: Callable[..., Awaitable[T]], /, *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int = 1, buffersize: int | None = None,
    ) -> Generator[T, None, None]: ...  # fmt: skip

    @overload
    def map(
        self, fn: Callable[..., T], /, *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int = 1, buffersize: int | None = None,
    ) -> Generator[T, None, None]: ...  # fmt: skip

    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int = 1, buffersize: int | None = None,
    ) -> Generator[Any, None, None]:  # fmt: skip
        """`fn` of the items of all iterables side by side: an iterator over the values, in their order.

        Args:
            fn: a coroutine function or a plain one.
            iterables: read to the end of the shortest, at once: unless there is a `buffersize`.
            timeout: seconds, counted from this call, after which asking for a value raises `TimeoutError`.
            chunksize: for process pools; has no effect here.
            buffersize: how many items may be submitted and not yet asked for. The iterables, which may be endless, are
                then read as values are asked for, in the thread that asks.

        Raises:
            TypeError, ValueError: `buffersize` is no whole number, or less than 1.
            UsageError, ClosedError, RuntimeError: as `submit`.

        Raises, when values are asked for:
            TimeoutError: `timeout` is over.
            Exception: what `fn` raised. What has not begun is then cancelled.
        """
        _check_buffersize(buffersize)
        _check_function(fn)
        deadline = None if timeout is None else clock.steady() + timeout
        items = zip(*iterables, strict=False)  # which keeps the last tuple that it has made, and with it the items
        futures = deque(self._submit(fn, (*each,), {}) for each in islice(items, buffersize))
        if buffersize is None:  # there is nothing left to submit, and the iterator keeps nothing alive
            return _values(None, futures, iter(()), deadline)
        return _values(lambda each: self._submit(fn, (*each,), {}), futures, items, deadline)

    @overload
    def open(self, resource: HttpClient) -> AbstractContextManager[SyncHttpClient]: ...

    @overload
    def open(self, resource: AbstractAsyncContextManager[Any]) -> AbstractContextManager[Any]: ...

    def open(self, resource: Any) -> AbstractContextManager[Any]:
        """Open an async client for synchronous code: `with bridge.open(HttpClient(url)) as api: api.get_json("/x")`.

        The resource is opened and closed in one task on the loop. The value is a view of it: what is awaited there is
        waited for here, `async with` is `with`, `async for` is `for`. Coroutine functions use the resource itself.

        Leaving the block waits for what was submitted to this executor since it was entered, and then closes: whoever
        reads the results after the block finds them. Left by an exception, Ctrl-C included, it closes at once; so it
        does in a function that runs in this executor, which would wait for itself.

        Opening, closing and each call block the thread. Any thread but the loop's own may use the view, several at
        once. A Ctrl-C in the main thread cancels what it waits for.

        Raises:
            UsageError: `resource` is no async context manager.
            ClosedError, RuntimeError: as `submit`; by the view, when the loop has ended.
            WrongThread: called on the loop's own thread, which it would block.
            Exception: what the resource raises when it is opened or closed, and what its methods raise.
        """
        return opened(resource, self._bridged.call, self._bridged.in_flight)

    def with_options(self, *, key: Any = None, timeout: float | None = None) -> Self:
        """This executor, with options for what is submitted through the view that is returned.

        They stand here, and not in `submit`, where all keywords belong to the function. The view is the same executor:
        shutting it down shuts down both. Never blocks; any thread.

        Args:
            key: what logs and errors call the job: a function of its first argument, or the key itself. A plain
                function that a job of this executor submits goes by the key of that job.
            timeout: seconds that each function may take, counted from its start; then its future fails by `JobTimeout`.
                A coroutine is cancelled. A plain function cannot be stopped: it is left behind, and keeps its thread
                until it ends. It is a job, too, then: its future can be cancelled at any time, with the same effect,
                and a `SystemExit` that it raises comes as a `UsageError`.

        Raises:
            UsageError: `timeout` is no number of seconds above 0.
        """
        check_timeout(f"timeout={timeout!r}", timeout)
        view = copy.copy(self)
        view._options = _Options(key, timeout)
        view._viewed = self
        return view

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more, finish what has been submitted, and end the threads. Any thread; calling it again is fine.

        Args:
            wait: block until all that has happened; False returns at once. Functions that are left behind after their
                timeout are not waited for.
            cancel_futures: cancel what has not begun.

        Raises:
            WrongThread: with `wait`, on the loop's own thread.
            DeadlockError: with `wait`, by a function that runs in one of its threads.
        """
        self._bridged.shutdown(wait, cancel_futures=cancel_futures)

    def statistics(self) -> ExecutorStatistics:
        """What is going on: jobs, and the lane of plain functions and of `to_thread` (`threads`). Blocks for a moment.

        Any thread but the loop's own.

        Raises:
            ClosedError, RuntimeError: as `submit`.
        """
        statistics: ExecutorStatistics = self._bridged.call(self._bridged.executor.statistics, (), {})
        return statistics

    @property
    def _broken(self) -> str | None:
        """Where those who look into a `ThreadPoolExecutor` find whether it is broken."""
        return self._bridged.broken


def _values(
    submit: "Callable[[tuple[Any, ...]], WatchedFuture[Any]] | None",
    futures: "deque[WatchedFuture[Any]]",
    items: Iterator[tuple[Any, ...]],
    deadline: float | None,
) -> Generator[Any, None, None]:
    """The values in order; each that is asked for lets one more item in. What is not asked for is cancelled."""
    try:
        while futures:
            if submit is not None:
                futures.extend(map(submit, islice(items, 1)))
            # No variable may keep the future or its value while the reader has it.
            yield _result_or_cancel(futures.popleft(), deadline)
    finally:
        for future in reversed(futures):  # or the end of an earlier one might begin a later one
            future.cancel()
            future.disregard()  # nobody else has it


def _result_or_cancel(future: "Future[T]", deadline: float | None) -> T:
    try:
        try:
            return future.result(None if deadline is None else deadline - clock.steady())
        finally:
            future.cancel()
    finally:
        del future  # an error's traceback holds this frame: a cycle


def _check_function(fn: Callable[..., Any]) -> None:
    if isinstance(fn, Job):
        raise UsageError(
            f"found {fn!r}, which opens resources. Write `penstock.run({fn.__name__}, items)`, or open them by "
            f"`bridge.open(...)` and submit the function that uses them."
        )
    check_function(fn, "bridge.submit")


def _key_of(key: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if not callable(key):
        return key
    if not args:
        raise UsageError(
            f"with_options(key={name_of(key)}) is a function of the first argument, and {name_of(fn)} was submitted "
            f"without any. Give the item as an argument, or the key itself."
        )
    return key(args[0])


def _check_max_workers(number: object) -> None:
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"max_workers={number!r}: expected a whole number, or None to measure how many are needed")
    if number < 1:
        raise ValueError(f"max_workers must be greater than 0, found {number}")


def _check_initializer(initializer: object) -> None:
    if initializer is not None and not callable(initializer):
        raise TypeError(f"initializer must be a callable, found {initializer!r:.100}")
    if initializer is not None and is_async(initializer):
        raise TypeError(
            f"initializer={name_of(initializer)}: expected a plain function, which is called in each thread; a "
            f"coroutine function would not run there."
        )


def _check_buffersize(number: object) -> None:
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"buffersize must be an integer or None, found {number!r}")
    if number < 1:
        raise ValueError(f"buffersize must be None or > 0, found {number}")
