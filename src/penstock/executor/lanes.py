"""The lanes of an executor: for blocking calls, for processing, and for processes. Each is made when it is first used.

Blocking I/O and CPU work never share a lane: a thread that computes slows down the loop, one that waits does not.
Processes are a lane whose threads each wait for a process, so that a call's cancellation, its permit and the books are
those of any blocking call. Loop thread only.
"""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

from penstock.callables import name_of
from penstock.threads.crossing import named
from penstock.threads.lane import Lane, LaneStatistics
from penstock.threads.workers import SHARED, Workers, check_threads, cores, usable_cores

if TYPE_CHECKING:
    from penstock.threads.call import AbandonedCall
    from penstock.threads.processes import Processes

logger = logging.getLogger("penstock.threads")


class LanesStatistics(TypedDict):
    """As in `ExecutorStatistics`."""

    threads: LaneStatistics | None
    cpu: LaneStatistics | None
    processes: LaneStatistics | None


class Lanes:
    """The lanes of one executor."""

    def __init__(self, threads: int | None, processes: int | None, workers: Workers = SHARED) -> None:
        if threads is not None and workers is SHARED:
            check_threads("threads", threads)
        if processes is not None:
            check_threads("processes", processes)
        self._threads = threads
        self._workers = workers
        self._size = min(cores(), SHARED.most) if processes is None else processes
        self._blocking: Lane | None = None
        self._cpu: Lane | None = None
        self._process: Lane | None = None
        self._processes: Processes | None = None

    @property
    def blocking(self) -> Lane:
        """For blocking calls."""
        if self._blocking is None:
            self._blocking = Lane("thread", self._threads, workers=self._workers)
        return self._blocking

    @property
    def cpu(self) -> Lane:
        """For processing: as many threads as can compute at once."""
        if self._cpu is None:
            self._cpu = Lane("compute", usable_cores(), processing=True)
        return self._cpu

    async def in_process(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `fn(*args, **kwargs)` in a process; see `Executor.to_process`."""
        if self._process is None or self._processes is None:
            from penstock.threads.processes import Processes  # multiprocessing is not for everybody to import

            self._processes = Processes(self._size)
            self._process = Lane("process", self._size)
        return await self._process.call(_InProcess(self._processes, fn), *args, **kwargs)

    def statistics(self) -> LanesStatistics:
        """How busy they are; None for one that has not been used."""
        return LanesStatistics(threads=_of(self._blocking), cpu=_of(self._cpu), processes=_of(self._process))

    def expect_to_close(self) -> None:
        """What is abandoned from now on is named at the close, and not before."""
        for lane in (self._blocking, self._cpu, self._process):
            if lane is not None:
                lane.books.tells = False

    def close(self) -> None:
        """Take no more calls, end processes, and name the calls that still run in threads. Never blocks."""
        abandoned: list[AbandonedCall] = []
        for lane in (self._blocking, self._cpu):
            if lane is not None:
                lane.close()
                abandoned += lane.abandoned
        if self._process is not None and self._processes is not None:
            self._process.close()
            self._processes.close()
            if self._process.books.busy:
                # It may take moments, which the loop does not have; no daemon, since the interpreter's exit would wait
                # for processes that have not been ended.
                threading.Thread(target=self._processes.kill, name="penstock-end-processes").start()
        if abandoned:
            one = len(abandoned) == 1
            logger.warning(
                "%d %s that nobody waits for: %s. The program's exit ends %s.",
                len(abandoned), "call still runs in a thread" if one else "calls still run in threads",
                named(tuple(abandoned)), "it" if one else "them",
            )  # fmt: skip


class _InProcess:
    """A call in a process, by the name of its function."""

    def __init__(self, processes: "Processes", fn: Callable[..., Any]) -> None:
        self.__qualname__ = name_of(fn)
        self._processes = processes
        self._fn = fn

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._processes.call(self._fn, args, kwargs)


def _of(lane: Lane | None) -> LaneStatistics | None:
    return None if lane is None else lane.statistics()
