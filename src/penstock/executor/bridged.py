"""What a `BridgeExecutor` has in its threads: a loop with an executor on it, and threads for plain functions.

    new --first submit--> running --shutdown--> draining --nothing runs or waits--> over

    submit(coroutine function) -> JobFuture -- mailbox --> loop thread: a job of the executor there
    submit(plain function)     -> PlainCall -- the executor's blocking lane, without the loop --> a thread of its own
    call(fn)                   -> the executor's portal, for clients that synchronous code uses

The lane is that of `penstock.to_thread` within the jobs: `max_workers` bounds both together. Its threads belong to this
object alone, since its shutdown has to end them and an initializer has to run in each.

It is apart from its face so that this one can be garbage collected: nothing here knows it.

Guarantees: every future ends. What was submitted before the shutdown is finished; what comes later is refused, under
one lock. When the loop ends before its time (a job that stops it), what waits for it fails by `BrokenThreadPool`, which
is a `BrokenExecutor`.

Threads: any, but for what is marked as the loop's.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures.thread import BrokenThreadPool
from functools import partial
from typing import Any

from penstock.callables import is_async, name_of
from penstock.context import RunningJob, current_job
from penstock.errors import ClosedError, DeadlockError, WrongThread
from penstock.executor.executor import Executor
from penstock.executor.lanes import Lanes
from penstock.executor.submitted import JobFuture, PlainCall, SubmittedJobs
from penstock.threads.at_exit import finish_at_exit, interpreter_is_ending
from penstock.threads.future import WatchedFuture
from penstock.threads.lane import Lane
from penstock.threads.loop_thread import LoopThread
from penstock.threads.workers import Worker, Workers, most_threads

logger = logging.getLogger("concurrent.futures")
"""Where the standard library tells of an initializer that failed."""

STAND_INS = 512
"""Threads beyond `max_workers` at most, for those that wait. As tokio's cap of blocking threads."""

_numbers = itertools.count()


class BridgedExecutor(Executor):
    """The executor on the loop thread: its plain functions run in threads of the bridge."""

    def __init__(self, limit: int | None, threads: int | None, workers: Workers) -> None:
        super().__init__(limit=limit)
        self._lanes = Lanes(threads, None, workers)
        self._on_limit: Callable[[], object] = _nothing

    @property
    def lane(self) -> Lane:
        """For plain functions, those of `submit` and those of `to_thread`. Made on the loop."""
        return self._lanes.blocking

    def submitted(self) -> SubmittedJobs:
        """What takes the bridge's jobs. Loop thread only."""
        jobs = self._opened()
        submitted = SubmittedJobs(self, jobs)
        self._on_limit = submitted.fill
        return submitted

    def _limit_changed(self, limit: int) -> None:
        super()._limit_changed(limit)
        self._on_limit()

    def portal_call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `from_thread`, from any thread but the loop's own: also from one that runs another loop."""
        assert self._portal is not None, "it is open"
        return self._portal.call(fn, args, kwargs)

    async def idle(self) -> None:
        """Wait until no job runs, but for those that are abandoned. Loop thread only."""
        await self._opened().wait()


class Bridged:
    """The running half of a `BridgeExecutor`; its arguments are the same."""

    def __init__(
        self,
        max_workers: int | None,
        thread_name_prefix: str,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        limit: int | None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
    ) -> None:
        self.name = thread_name_prefix or f"penstock-bridge-{next(_numbers)}"
        self.broken: str | None = None
        """Why nothing can be submitted any more, if something has failed that should not."""
        self._initializer = initializer
        self._initargs = initargs
        self._loop_factory = loop_factory
        self.workers = Workers(
            max_workers or most_threads(),
            spare=STAND_INS,
            keep=max_workers or 0,
            on_start=None if initializer is None else self._initialize,
            prefix=thread_name_prefix,
        )
        self.executor = BridgedExecutor(limit, max_workers, self.workers)
        self._lock = threading.RLock()  # re-entrant: a finalizer that submits may interrupt anything
        self._refusal: Callable[[], Exception] | None = None
        """How calls are refused, once nothing is taken any more."""
        self._thread: LoopThread | None = None
        self._starting: LoopThread | None = None
        finish_at_exit(self)
        if interpreter_is_ending():
            self._refusal = _interpreter_ends

    @property
    def state(self) -> str:
        """As in the executor's `repr`."""
        if self._refusal is _forked:
            return "forked"
        if self.broken is not None:
            return "broken"
        if self._refusal is not None:
            return "shut down"
        return "new" if self._thread is None else "open"

    def submit(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: Any,
        timeout: float | None,
    ) -> WatchedFuture[Any]:
        """Have it run as a job; see `BridgeExecutor.submit`."""
        if timeout is not None and not is_async(fn):
            fn = _InThread(self.executor, fn)
        if self._thread is None:
            self._begin()
        with self._lock:  # or what is posted might come behind the end of the loop
            if self._refusal is not None:
                raise self._refusal()
            future: JobFuture[Any] = JobFuture(self._jobs, self._post, (fn, args, kwargs, key, timeout))
            try:
                self._jobs.expect(future)
                self._post(future.begin)
            except BaseException:  # an interrupt: nobody has it
                future.cancel()
                raise
            return future

    def submit_plain(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], key: Any
    ) -> WatchedFuture[Any]:
        """Have a plain function run in a thread; see `BridgeExecutor.submit`."""
        if self._refusal is not None or self._thread is None:
            self._begin()
        lane = self._lane
        call = PlainCall(lane.books, self.executor, fn, args, kwargs, key)
        lane.queue(call)  # once the shutdown has closed the lane, it refuses
        return call

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `fn` on the loop, await what can be awaited, and wait for its value.

        It works until the loop has ended, for what still runs may need it.

        Raises:
            ClosedError: the loop has ended, or the process was forked since it began.
            WrongThread: called on its thread, which it would block.
            Exception: what `fn` raised.
        """
        if self._thread is None or self._refusal is _forked:
            self._begin()
        thread = self._thread
        if threading.current_thread() is thread:
            raise WrongThread(
                f"synchronous code ({name_of(fn)}) was called on the thread of the bridge's event loop, which it would "
                f"block. In a coroutine, use what is given to `bridge.open(...)` itself: `await` its methods; and what "
                f"is not open there, by `async with`."
            )
        if thread is not None and not thread.is_alive():
            raise (self._refusal or _shut_down)()
        return self.executor.portal_call(fn, args, kwargs)

    def in_flight(self) -> set[WatchedFuture[Any]]:
        """What has been submitted and is not over. Empty for a function that runs here: it might wait for itself."""
        job = current_job()
        if self._thread is None or self._runs_here(job):
            return set()
        return {*self._jobs.in_flight(), *self._lane.in_flight()}

    def _runs_here(self, job: RunningJob | None) -> bool:
        """Whether the calling thread works for this bridge."""
        thread = threading.current_thread()
        return (isinstance(thread, Worker) and thread in self.workers.threads) or (
            job is not None and job.host is self.executor
        )

    def shutdown(self, wait: bool, *, cancel_futures: bool = False) -> None:
        """Take nothing more, finish what there is, and end the threads; see `BridgeExecutor.shutdown`."""
        if wait:
            self._refuse_to_wait_for_itself()
        with self._lock:
            if self._refusal is _forked:
                return  # no thread is here, and any lock may be held for ever
            self._refusal = self._refusal or _shut_down
        thread = self._begun()
        if thread is None:
            return
        if cancel_futures:
            self._lane.cancel_waiting()
            self._jobs.cancel_from_outside()
            self._post(self._jobs.cancel_waiting)
        self._post(self._draining.set)
        if wait:
            thread.join()
            for worker in self.workers.threads:
                if worker.idle:  # else it hangs in a call that nobody waits for
                    worker.join()

    def _begun(self) -> LoopThread | None:
        """The loop's thread, if there is one, once its loop runs. (Whoever began may yet wait, or be interrupted.)"""
        if self._thread is None and self._starting is not None and self._starting.ident is not None:
            try:
                self._starting.wait_until_ready()
            except Exception:  # noqa: BLE001  # of `loop_factory`, which has been told to who submitted
                return None
            self._thread = self._starting
        return self._thread

    # --- as the interpreter or a fork has it ---

    def finish(self) -> None:
        """The interpreter is about to end."""
        with self._lock:
            self._refusal = self._refusal or _interpreter_ends
        self.shutdown(wait=True)

    def forsake(self) -> None:
        """This is the child of a fork, in which the threads do not exist."""
        self._lock = threading.RLock()
        if self._starting is not None:
            self._refusal = _forked
        else:
            self.workers.forget()
            finish_at_exit(self)

    # --- beginning and ending ---

    def _begin(self) -> None:
        """Start the loop's thread, if nobody has, unless nothing is taken any more."""
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            if self._starting is None or self._starting.ident is None:  # the latter: Ctrl-C came in between
                thread = LoopThread(f"{self.name}-loop", self._main, self._over, self._loop_factory)
                self._ready, self._post = thread.ready, thread.post
                self._starting = thread
                thread.start()
            starting = self._starting
        if threading.current_thread() is starting:
            raise WrongThread("something was submitted to a BridgeExecutor on its own thread before its loop ran.")
        try:
            starting.wait_until_ready()  # without the lock, which that thread may come to need
        except Exception:  # of `loop_factory`: the next one may try again
            with self._lock:
                self._starting = None if self._starting is starting else self._starting
            raise
        self._thread = starting

    async def _main(self) -> None:
        """What runs on the loop."""
        async with self.executor as executor:
            self._draining = asyncio.Event()
            self._jobs = executor.submitted()
            self._lane = executor.lane
            self._ready()
            try:
                await self._draining.wait()
                await self._drain()
            except BaseException:  # the loop is ended under it: before the lane is closed as after a shutdown
                with self._lock:
                    self._lane.refuse_by(self._break(f"the event loop of {self.name} ended before its time"))
                raise

    async def _drain(self) -> None:
        """Wait until nothing runs or waits: a job may wait for a plain function, and that one for a job."""
        stirred = asyncio.Event()
        self._lane.when_idle(lambda: self._post(stirred.set))
        self._jobs.on_start = stirred.set
        while True:
            stirred.clear()
            await self.executor.idle()
            if self._lane.idle and not self._jobs:
                return
            await stirred.wait()

    def _over(self, error: BaseException | None) -> None:
        """The loop has ended; before its time, if there is an error. On its thread."""
        with self._lock:
            if error is not None and self.broken is None:
                self._lane.refuse_by(self._break(f"the event loop of {self.name} ended: {error!r}"))
            self._jobs.refuse_all(self._refusal or _shut_down)
        self.workers.dismiss()

    def _initialize(self) -> bool:
        """Run the initializer, in a thread that has just begun."""
        assert self._initializer is not None, "else nobody asks for it"
        try:
            self._initializer(*self._initargs)
        except BaseException:  # noqa: BLE001  # it belongs to all who wait, as in the standard library
            try:
                logger.critical("Exception in initializer:", exc_info=True)
            finally:  # a filter of the user's logging may raise
                with self._lock:
                    refusal = self._break("an initializer failed in one of its threads; see the log")
                self._post(partial(self._lane.refuse_by, refusal))
                return False  # noqa: B012  # there is nobody in this thread whom an error could reach
        return True

    def _break(self, why: str) -> Callable[[object], Exception]:
        """Nothing can be submitted any more; returns how calls are refused from now on. With the lock held."""
        self.broken = why

        def refusal(_call: object = None) -> BrokenThreadPool:
            return BrokenThreadPool(f"this BridgeExecutor is broken: {why}")

        self._refusal = refusal
        return refusal

    def _refuse_to_wait_for_itself(self) -> None:
        thread = threading.current_thread()
        if thread is self._thread:
            raise WrongThread(
                "shutdown(wait=True) was called on the thread of the bridge's event loop, which would wait for itself. "
                "Write `shutdown(wait=False)` there."
            )
        if self._runs_here(current_job()):
            raise DeadlockError(
                "shutdown(wait=True) was called by a function that runs in this bridge, and would wait for that "
                "function to end. Write `shutdown(wait=False)` there."
            )


class _InThread:
    """A plain function as a job: what has a timeout is watched on the loop."""

    def __init__(self, executor: Executor, fn: Callable[..., Any]) -> None:
        self.__qualname__ = name_of(fn)
        self._executor = executor
        self._fn = fn

    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return await self._executor.to_thread(self._fn, *args, **kwargs)


def _nothing() -> None:
    """Nobody wants to know."""


def _shut_down() -> Exception:
    return ClosedError(
        "cannot schedule new futures after shutdown: this BridgeExecutor has been shut down, as leaving its `with` "
        "block does. Submit within the block."
    )


def _interpreter_ends() -> Exception:
    return RuntimeError("cannot schedule new futures after interpreter shutdown")


def _forked() -> Exception:
    return ClosedError(
        "this BridgeExecutor was in use when the process forked, and its threads are not in the child. Make a new "
        "BridgeExecutor() in the child."
    )
