"""Processes for CPU work, asked from the threads of a lane.

    lane's thread: pickled function and arguments -> stdlib pool -> process: unpickled, run, answer pickled
    lane's thread: waits for the answer           <- bytes       <- value, or error with its traceback as text

Purpose: CPU work in pure Python needs processes. The lane gives the permit, the honest cancellation and the statistics
(`await lane.call(processes.call, fn, args, kwargs)`); this gives the process.

Guarantees: a process that dies fails the calls it affects, once, with `BrokenProcessPool`; the next call gets new
processes. What cannot be pickled or unpickled, on either side, fails its own call alone: the stdlib's pool carries
nothing but bytes, since it breaks for all when unpickling fails. What would end more than a call (`SystemExit`,
`StopIteration`) comes back as an error. Processes are deaf to SIGINT and SIGTERM from their first instruction on, since
terminals and supervisors send them to the whole group, and what is in flight is the parent's to drain. They end when
their parent does, however that one ended, and by SIGKILL. They are never forked from a process that has threads.

Threads: every method may be called from any. The lock guards the fields of `Processes`, and is never held while a
process starts or while something waits. A broken pool is buried by the thread that was first to discard it.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple
from weakref import WeakSet

from penstock.callables import check_function, is_async, name_of, refuse_coroutine
from penstock.errors import ClosedError, UsageError, first_line
from penstock.outcome import contained

NOTICE = 1.0
"""Seconds until a process that died must have been noticed. Arbitrary, because: the stdlib notices at once, except
when it is stuck in half an answer or half a question, which is all that this is waited for."""

DEAF_TO = (signal.SIGINT, signal.SIGTERM)
"""What terminals and supervisors send to all processes of a program."""


class Processes:
    """At most `size` processes for CPU work, started when calls need them."""

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"processes={size!r}: expected a whole number of at least 1 process.")
        self._size = size
        self._lock = threading.Lock()
        self._pool: _Pool | None = None
        self._pools: WeakSet[_Pool] = WeakSet()
        self._calls = 0
        self._closed = self._killed = self._answered = False

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `fn(*args, **kwargs)` in a process and return its value. Blocks until it is done; any thread.

        Function, arguments and value travel by pickle, so the process imports the module that defines `fn`; a script
        must keep its start under `if __name__ == "__main__":`. Context variables do not go along, and changes that
        `fn` makes to its arguments or to globals stay in the process. A call that runs cannot be stopped, except by
        `kill`. An error of `fn` has its traceback in the process, as text, as its cause.

        Raises:
            UsageError: `fn` is async or cannot be pickled, and nothing was sent; or it raised what would end more
                than this call, such as `SystemExit`.
            ClosedError: `close` or `kill` was called before this.
            BrokenProcessPool: a process died while this call ran or waited for one. It may have had its effect.
            Exception: what `fn` raised; what pickle says of an argument or a value, with a note.
        """
        name = name_of(fn)
        question = _question(fn, args, kwargs)
        with self._lock:
            self._refuse_if(self._closed, name)
            self._calls += 1
        try:
            answer = self._ask(question, name)
        finally:
            self._leave()
        return answer.open(name)

    def close(self) -> None:
        """Take no more calls, and let processes end once they have no call. Never blocks; any thread; twice is fine."""
        with self._lock:
            self._closed = True
            idle = self._calls == 0
        if idle:
            self._dismiss()

    def kill(self) -> None:
        """Close, and end the processes that still run: their calls fail soon. Any thread; twice is fine.

        Without it the interpreter's exit waits for a call that hangs. Blocks for moments, until the processes are
        gone; up to twice `NOTICE` where one is stuck in the middle of a message.
        """
        with self._lock:
            self._closed = self._killed = True
            pools = list(self._pools)
        for pool in pools:
            pool.kill()
        for pool in pools:
            self._discard(pool)
            pool.join()  # another thread may be the one that buries it

    def _ask(self, question: bytes, name: str) -> "_Answer":
        pool, future = self._submit(question, name)
        error = pool.failure(future)
        if error is None:
            self._answered = True
            return future.result()
        if isinstance(error, BrokenProcessPool):
            self._discard(pool)
            error = self._broken(error, name)
        try:
            raise contained(error, name)
        finally:
            del error  # its traceback holds this frame: a cycle

    def _submit(self, question: bytes, name: str) -> "tuple[_Pool, Future[_Answer]]":
        while True:
            with self._lock:
                self._refuse_if(self._killed, name)
                self._pool = pool = self._pool or _Pool(self._size)
                self._pools.add(pool)  # also when forgotten, `kill` must find it while calls run in it
            try:
                return pool, pool.submit(question)
            except BrokenProcessPool:  # it broke while it was idle: nothing was sent
                self._discard(pool)
            except Exception as error:
                # The stdlib keeps a call whose process did not start, for the next process: with the pool, it goes.
                self._forget(pool)
                self._refuse_if(self._killed, name)
                error.add_note(f"No process could be started for {name}.")
                raise

    def _forget(self, pool: "_Pool") -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None

    def _discard(self, pool: "_Pool") -> None:
        """Let the first thread that finds a pool broken bury it, and the next call make a new one."""
        self._forget(pool)
        with self._lock:
            first, pool.discarded = not pool.discarded, True
        if first:
            pool.bury()

    def _leave(self) -> None:
        with self._lock:
            self._calls -= 1
            last = self._closed and self._calls == 0
        if last:
            self._dismiss()

    def _dismiss(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    @staticmethod
    def _refuse_if(closed: bool, name: str) -> None:
        if closed:
            raise ClosedError(f"{name} was to run in a process, but its executor has been shut down.")

    def _broken(self, error: BrokenProcessPool, name: str) -> BrokenProcessPool:
        """An error of this call's own: the stdlib gives one and the same to all calls it affects."""
        broken = BrokenProcessPool(*error.args)
        broken.__cause__ = error.__cause__
        if self._killed:
            broken.add_note(
                f"All processes were killed while {name} ran or waited for one: the executor was shut down."
            )
            return broken
        broken.add_note(
            f"A process died (os._exit, a signal, a crash, out of memory) while {name} ran or waited for one. Every "
            f"call of that time fails, whichever was the cause; the next call gets new processes."
        )
        if not self._answered:
            broken.add_note(
                "No process has answered yet. If this is a script without a main guard, that is why: each process "
                "imports it, would start it all over, and dies. Keep what starts the work under `if __name__ == "
                '"__main__":`.'
            )
        return broken


class _Pool:
    """A pool of the stdlib, from its first call until it breaks or is dismissed.

    What is private in it is read here alone, and may be missing: then a pool that is stuck stays stuck.
    """

    def __init__(self, size: int) -> None:
        # Not from the fork server: a signal to the whole group ends it, and with it the pool, and it is not ours alone.
        self._executor = ProcessPoolExecutor(size, mp_context=_Context(), initializer=_prepare)
        # The executor forgets them in its shutdown, and they are needed after it.
        self._processes: dict[int, Any] = getattr(self._executor, "_processes", {})
        self._questions: Any = getattr(self._executor, "_call_queue", None)
        self._answers: Any = getattr(self._executor, "_result_queue", None)
        self._manager: Any = None
        self.discarded = False  # guarded by the lock of `Processes`

    def submit(self, question: bytes) -> "Future[_Answer]":
        """Ask a process; starts one if all have a call."""
        with _born_deaf():
            future = self._executor.submit(_run, question)
        self._manager = getattr(self._executor, "_executor_manager_thread", None) or self._manager
        return future

    def failure(self, future: "Future[_Answer]") -> BaseException | None:
        """Wait for the answer; what is wrong when there will be none.

        Looks for itself whether a process died: the stdlib's thread does not see it while it reads half an answer of
        that very process, and on 3.11 it can miss calls that arrive in the moment of breaking.
        """
        while not wait([future], NOTICE).done:
            if connection.wait([process.sentinel for process in list(self._processes.values())], timeout=0):
                break
        with suppress(TimeoutError, CancelledError):  # 3.14 cancels those that wait when the others are killed
            return future.exception(timeout=0)
        return BrokenProcessPool("A process in the process pool was terminated abruptly.")

    def shutdown(self) -> None:
        """Let the processes end, none of which has a call."""
        self._executor.shutdown(wait=False)

    def kill(self) -> None:
        """End the processes, and take no more calls."""
        self._kill_processes()  # before the lock of the executor is asked for: who joins a process may hold it
        shutdown = partial(self._executor.shutdown, wait=False, cancel_futures=True)
        getattr(self._executor, "kill_workers", shutdown)()  # from 3.14 on
        self._kill_processes()  # also the one that was just being started

    def bury(self) -> None:
        """End what is left of a broken pool, whose thread the interpreter's exit would join.

        Once for each pool. Blocks up to `NOTICE` where that thread is stuck in a pipe: reading half an answer, or (in
        early releases of 3.11) writing a question that nobody reads. Such a pipe lives while this side keeps its far
        end open.
        """
        self._kill_processes()
        self.join()  # it closes pipes, too, and twice at a time is once too often
        with suppress(AttributeError, OSError):
            self._questions._reader.close()
        with suppress(AttributeError, OSError):
            self._answers._writer.close()

    def join(self) -> None:
        """Wait up to `NOTICE` until the stdlib's thread has ended; that of a broken pool does."""
        with suppress(AttributeError):
            self._manager.join(NOTICE)

    def _kill_processes(self) -> None:
        for process in list(self._processes.values()):
            process.kill()


class _Process(SpawnProcess):
    """A worker of a pool, as the stdlib sees it."""

    def terminate(self) -> None:
        """End it, as the stdlib does with those of a broken pool, for which it waits then: they are deaf to SIGTERM."""
        self.kill()


class _Context(SpawnContext):
    """Starts such processes."""

    Process = _Process


class _Answer(NamedTuple):
    """What comes back from a process."""

    pickled: bytes
    """The value, or the error."""
    error: str | None
    """The first line of the error; None when there is a value."""
    trace: str = ""
    """Its traceback."""

    def open(self, name: str) -> Any:
        """The value of the function called `name`; raises its error."""
        if self.error is None:
            with _noted(f"The value of {name} came back from its process, and cannot be rebuilt here."):
                return pickle.loads(self.pickled)
        try:
            error: BaseException = pickle.loads(self.pickled)
        except Exception as cannot:  # noqa: BLE001  # the fault of an exception class of the user's
            error = pickle.UnpicklingError(
                f"{name} raised {self.error}, which cannot be rebuilt here ({first_line(cannot)}). All that "
                f"`{self.error.partition(':')[0]}.__init__` asks for must stand in `args`: hand it to "
                f"`super().__init__`, or define `__reduce__`."
            )
        error.__cause__ = RemoteTraceback(self.trace)
        try:
            raise contained(error, name)
        finally:
            del error  # its traceback holds this frame: a cycle


class RemoteTraceback(Exception):
    """The traceback of an error where it was raised, in another process, as text. Never raised: it is a cause."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _question(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    check_function(fn, "executor.to_process")
    if is_async(fn):
        raise UsageError(
            f"found the async function {name_of(fn)}, expected a plain one: no event loop runs in a worker process. "
            f"Do the awaiting here, and write `executor.to_process(fn, ...)` for the CPU work alone."
        )
    try:
        return pickle.dumps((fn, args, kwargs), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        reason = _unpicklable(fn)
        if reason is None:
            error.add_note(
                f"An argument of {name_of(fn)} cannot be sent to a process: send plain data, and open there "
                f"what cannot travel, such as files, locks and connections."
            )
            raise
        raise UsageError(
            f"found {fn!r:.200}, which cannot be sent to a process ({first_line(reason)}); expected a function that "
            f"the process can import. Define it at module level, and write `executor.to_process(name, ...)`."
        ) from reason


def _unpicklable(fn: Callable[..., Any]) -> Exception | None:
    try:
        pickle.dumps(fn)
    except Exception as error:  # noqa: BLE001  # pickle and the user's classes raise anything
        return error
    return None


@contextmanager
def _noted(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


@contextmanager
def _born_deaf() -> Iterator[None]:
    """Hold signals back in this thread, and so in the processes that it starts, until these are prepared for them.

    The stdlib's resource tracker, whose start would undo that, has been started by the queues of the pool.
    """
    if sys.platform == "win32":  # pragma: no cover  # which has no such signals
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the process ---


def _prepare() -> None:  # pragma: no cover  # runs in worker processes
    """The process's first step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's to decide what Ctrl-C means
    if sys.platform != "win32":
        # A handler: programs that the function starts would inherit that the signal is ignored, and never end by it.
        signal.signal(signal.SIGTERM, _hear_nothing)
        signal.siginterrupt(signal.SIGTERM, False)
        hear = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, DEAF_TO)
        os.register_at_fork(
            before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, DEAF_TO),  # else lost in a child that is not ready
            after_in_parent=hear,
            after_in_child=lambda: (signal.signal(signal.SIGTERM, signal.SIG_DFL), hear()),
        )
        hear()
    threading.Thread(target=_end_with_parent, name="penstock-parent", daemon=True).start()


def _hear_nothing(*_: object) -> None:  # pragma: no cover  # as above
    """SIGTERM, which is the parent's to act upon."""


def _end_with_parent() -> None:  # pragma: no cover  # as above
    # A parent that is killed cannot tell: its processes would wait for calls for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    parent.join()
    os._exit(1)


def _run(question: bytes) -> _Answer:
    """Answer one call. Raises next to nothing, since the stdlib's pool may break when it unpickles an error."""
    try:
        with _noted(
            "A process could not rebuild the function or its arguments. It imports the modules that define them, so "
            "nothing may come from an interactive session or a notebook."
        ):
            fn, args, kwargs = pickle.loads(question)
        value = fn(*args, **kwargs)
        refuse_coroutine(value, name_of(fn))
        with _noted(f"The value of {name_of(fn)} cannot be sent back from its process: return plain data."):
            return _Answer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), None)
    except BaseException as error:  # noqa: BLE001  # it belongs to who waits for the call
        return _failure(error)


def _failure(error: BaseException) -> _Answer:
    trace = "".join(traceback.format_exception(error))
    line = first_line(error)
    try:
        pickled = pickle.dumps(error, pickle.HIGHEST_PROTOCOL)
    except Exception as cannot:  # noqa: BLE001  # pickle and the user's classes raise anything
        pickled = pickle.dumps(
            pickle.PicklingError(f"{line} was raised in a process and cannot be sent back ({first_line(cannot)}).")
        )
    return _Answer(pickled, line, trace)
