"""A whole coroutine on an event loop of its own, in the thread that calls or in one of its own.

    loop -> main() -> what still runs is cancelled, `patience` seconds -> loop closed

As `asyncio.run`, which waits for ever for a task that swallows its cancellation.

Guarantees: the loop is closed when the call is over, whichever way it ends. The wait for tasks that were left behind is
bounded; unbounded are a `main` that swallows its own cancellation, and asyncio's default executor. A thread of its own
has ended by then too, unless an error came to the thread that waits for it: then that wait is bounded as well.

Threads: any, several at once; in each the loop is its own. SIGINT is `asyncio.Runner`'s, as under `asyncio.run`: taken
in the main thread, and only where the handler is Python's default.
"""

import asyncio
import contextlib
import contextvars
import functools
import logging
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from penstock.callables import is_async, name_of
from penstock.errors import UsageError

T = TypeVar("T")

logger = logging.getLogger("penstock.run")

SLICE = 0.2
"""Seconds. On Windows no signal ends the wait for a lock; handlers run between two of them. Arbitrary, because: Ctrl-C
answers at once, and five looks in a second cost nothing."""


def run_on_own_loop(
    main: Callable[[], Coroutine[Any, Any, T]],
    *,
    patience: float,
    loop_factory: Callable[[], AbstractEventLoop] | None = None,
) -> T:
    """Run `main()` on a new event loop, close the loop, and return what `main` returned.

    Blocks until all of it has ended, in any thread that has no running loop.

    Args:
        main: gives the coroutine; called once, in this thread and context, when there is a loop.
        patience: seconds that tasks which `main` has left behind get to end, once they are cancelled. Those that go on
            are destroyed with the loop.
        loop_factory: makes the loop, as in `asyncio.Runner(loop_factory=)`; None asks the event loop policy.

    Raises:
        UsageError: `loop_factory` returned something else than a loop that is new.
        BaseException: what `main` or `loop_factory` raised.
    """
    runner = asyncio.Runner(loop_factory=None if loop_factory is None else lambda: _new_loop(loop_factory))
    loop = runner.get_loop()
    ended = False
    try:
        try:
            return runner.run(main())
        finally:
            ended = _all_ended(loop, patience)
    finally:
        if ended:
            runner.close()
        else:  # without its unbounded wait
            if loop_factory is None:
                asyncio.set_event_loop(None)
            loop.close()


def run_in_own_thread(
    main: Callable[[], Coroutine[Any, Any, T]],
    *,
    patience: float,
    loop_factory: Callable[[], AbstractEventLoop] | None = None,
) -> T:
    """As `run_on_own_loop`, in a thread that ends with the call: for a thread whose own loop waits below this call.

    Blocks the calling thread, which must not be one that `main` waits for. Context variables go along. In the main
    thread the handlers of signals run meanwhile. What they raise cancels `main`, and is raised once all has ended, but
    no later than `patience` seconds later: then the thread is left behind and named in the log. The interpreter does
    not wait for it at its exit.

    Raises:
        UsageError: as `run_on_own_loop`.
        BaseException: what `main` or `loop_factory` raised, or a handler of a signal.
    """
    thread = _OwnThread(main, patience, loop_factory)
    try:
        thread.start()
        thread.wait()
    except BaseException:  # a handler's
        thread.cancel()
        raise
    thread.join()
    return thread.outcome.result()


def check_loop_factory(factory: object) -> None:
    """Refuse what can be no `loop_factory`, before anything is begun.

    Raises:
        UsageError: a loop, a coroutine function, or anything that is not callable.
    """
    if isinstance(factory, AbstractEventLoop):
        raise UsageError(
            f"loop_factory={factory!r:.200}: expected a function that makes a loop. Write it without `()`."
        )
    if factory is not None and (not callable(factory) or is_async(factory)):
        raise UsageError(
            f"loop_factory={factory!r:.200}: expected a function that makes a new event loop, such as "
            f"`loop_factory=uvloop.new_event_loop`, or None for asyncio's own."
        )


def _new_loop(factory: Callable[[], AbstractEventLoop]) -> AbstractEventLoop:
    loop: object = factory()
    if not isinstance(loop, AbstractEventLoop) or loop.is_closed() or loop.is_running():
        raise UsageError(
            f"loop_factory={name_of(factory)} returned {loop!r:.200}: expected a new event loop each time, as "
            f"`uvloop.new_event_loop` makes one."
        )
    return loop


class _OwnThread(threading.Thread, Generic[T]):
    """Runs `main` on a loop of its own, in the context of whoever makes it.

    Waited for by a bare lock: wherever an error interrupts the wait, the other end can let go.
    """

    def __init__(
        self,
        main: Callable[[], Coroutine[Any, Any, T]],
        patience: float,
        loop_factory: Callable[[], AbstractEventLoop] | None,
    ) -> None:
        super().__init__(name="penstock-run", daemon=True)
        self.outcome: Future[T] = Future()
        self._main = main
        self._patience = patience
        self._loop_factory = loop_factory
        self._context = contextvars.copy_context()
        self._cancel: Callable[[], object] | None = None
        self._given_up = False
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        try:
            value = self._context.run(
                run_on_own_loop, self._cancellable, patience=self._patience, loop_factory=self._loop_factory
            )
        except BaseException as error:  # noqa: BLE001  # whoever waits gets it
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(value)
        finally:
            self._running.release()

    def wait(self) -> None:
        """Block until `main` has ended and the loop is closed."""
        ended = False
        while not ended:
            ended = self._running.acquire(timeout=SLICE)

    def cancel(self) -> None:
        """Cancel `main`, and block until all has ended, for `patience` seconds at most."""
        ended = self.ident is None or self.outcome.done()  # None: it could not be started
        try:
            self._given_up = True
            if self._cancel is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._cancel()
            ended = ended or self._running.acquire(timeout=self._patience)
        finally:  # another signal may have come
            if not ended:
                logger.error(
                    "the run goes on after it was cancelled; it is left behind in its thread, and ends with the program"
                    " if not before"
                )

    async def _cancellable(self) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._cancel = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        if self._given_up:  # read after `_cancel` is written; `cancel` does it the other way round
            raise asyncio.CancelledError
        return await self._main()


def _all_ended(loop: AbstractEventLoop, patience: float) -> bool:
    """Cancel what still runs, before it takes another step; False if some of it goes on `patience` seconds later."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if not tasks:
        return True
    _, going_on = loop.run_until_complete(asyncio.wait(tasks, timeout=patience))
    return not going_on
