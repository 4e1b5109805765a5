"""Worker threads: one elastic set that all lanes of the process share.

    loop:    take_nowait() -> run(work)      a thread is promised first, then gets its work
    thread:  work(worker) -> next work, or parked -> work.land()

Threads are made on demand, parked last in, first out, and end when they have been idle for a time, so that a set that
was large once becomes small again. They are daemons, which those of a `ThreadPoolExecutor` are not: the interpreter
would wait for a call that nobody waits for any more.

Purpose of the promise: there are never more promises than `most`, and never fewer threads than promises as long as
threads can be started, so work that is handed over has a thread that is free or about to be, and is not queued behind a
call that may hang.

One wake-up is under way at a time. A thread that has been woken wakes the next one if there is more work, and starts it
if there is none to wake: a burst of short calls is done by few threads, and the loop never waits for a thread to start
but for the first.

Threads: any thread may call everything here. The lock guards all state; work is never run or told of with it held.
"""

import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from penstock import clock
from penstock.errors import UsageError
from penstock.memory import MEMORY

IDLE_TIMEOUT = 10.0
"""Seconds until an idle thread ends. As tokio's blocking threads and .NET's idea of a short lull."""
MOST_THREADS = 512
"""As tokio's cap of blocking threads. Blocked threads cost memory, not CPU."""
BYTES_FOR_EACH_THREAD = 1 << 20
"""Arbitrary, because: stacks are reserved and not used; a call with its buffers is seldom larger."""
SHARE_OF_MEMORY = 0.25
"""Of what this process may use, for threads. Arbitrary, because: most of it is the program's own."""
SPARE_THREADS = 64
"""Above the cap, for calls that a thread waits for, which would wait for ever otherwise. Arbitrary, because: each
covers a depth of nesting that nobody writes by hand."""


class Named(Protocol):
    """What a thread does, as far as its name tells."""

    def thread_name(self, number: int) -> str:
        """What the thread is called meanwhile."""
        ...


class Work(Protocol):
    """What is given to a thread: a call, or one call after the other."""

    def __call__(self, worker: "Worker", /) -> None:
        """Do it. Never raises."""
        ...

    def land(self) -> None:
        """Tell who waits for it. The thread counts as free by now. Never raises."""
        ...


class Worker(threading.Thread):
    """A thread of a set. What it runs is to be seen in its name."""

    def __init__(self, workers: "Workers", number: int) -> None:
        self.call: Named | None = None
        """What it runs now."""
        self.ended: Named | None = None
        """What it has run, until who waits for that has been told."""
        self.number = number
        self.cpu_clock: int | None = None
        """For `clock.cpu_time`; None before the thread has begun, and where there is none."""
        self.bell = threading.Lock()
        """Held by a thread that is parked; who wakes it lets go."""
        self.bell.acquire()
        self._prefix = workers.prefix
        super().__init__(target=workers._life, args=(self,), daemon=True)

    @property
    def name(self) -> str:
        """The lane and the job that it works for; what the set was given as a prefix, and its number."""
        if self._prefix:
            return f"{self._prefix}_{self.number}"
        call = self.call
        return f"penstock-idle_{self.number}" if call is None else call.thread_name(self.number)

    @name.setter
    def name(self, _name: str) -> None:
        """Threads are named after what they do."""

    @property
    def idle(self) -> bool:
        """True while it has no call to run."""
        return self.call is None


class Workers:
    """A set of at most `most` threads.

    Args:
        most: threads at most, but for the spare ones.
        idle_timeout: seconds until an idle thread ends.
        keep: threads that do not end when they are idle.
        on_start: called in each thread before it takes work; False ends the thread, which the set then does without.
        on_exit: called in each thread when it ends.
        prefix: what the threads are called; without it, they are named after what they do.
        spare: threads above `most`, for calls that a thread waits for; None is `SPARE_THREADS`.
    """

    def __init__(
        self,
        most: int,
        *,
        idle_timeout: float = IDLE_TIMEOUT,
        keep: int = 0,
        on_start: Callable[[], bool] | None = None,
        on_exit: Callable[[], object] | None = None,
        prefix: str = "",
        spare: int | None = None,
    ) -> None:
        self.most = most
        self._spare = spare
        self.with_spare = _WithSpare(self)
        """The same threads, and the spare ones, for calls without which a thread cannot go on."""
        self.prefix = prefix
        self._idle_timeout = idle_timeout
        self._keep = keep
        self._on_start = on_start
        self.starts_slowly = on_start is not None
        """Whether threads may take their time to begin: so several of them may be under way."""
        self._on_exit = on_exit
        self.forget()

    def forget(self) -> None:
        """Begin anew without any thread: in the child of a fork there is none."""
        self._lock = threading.RLock()  # re-entrant: a finalizer that wants a thread may interrupt anything
        self._numbers = itertools.count()
        self._backlog: deque[Work] = deque()
        self._parked: list[Worker] = []
        self._threads: set[Worker] = set()
        self._promised = 0
        self._waking = 0
        self.wanting: list[Callable[[], None]] = []
        """Who has asked for a thread in vain, and is to be told when one is free."""
        self._wanting_spare: list[Callable[[], None]] = []
        self._leaving: set[Worker] = set()
        self._asking = 0
        self._dismissed = False

    @property
    def spare(self) -> int:
        """Threads above `most` at most."""
        return SPARE_THREADS if self._spare is None else self._spare

    @property
    def threads(self) -> tuple[Worker, ...]:
        """All threads there are, those included that are about to end."""
        with self._lock:
            return (*self._threads, *self._leaving)

    @property
    def all_wait(self) -> bool:
        """Whether no thread is left, not even a spare one, and all there are wait for something else to happen."""
        with self._lock:
            return self._promised >= self.most + self.spare and self._asking >= self._promised

    def take_nowait(self, *, spare: bool = False) -> bool:
        """Promise a thread if there is one left. `run` or `give_back` is owed for it.

        With `spare`, one of the few more that there are for calls without which a thread cannot go on.
        """
        with self._lock:
            if self._promised >= self.most + (self.spare if spare else 0):
                return False
            self._promised += 1
            return True

    def give_back(self) -> None:
        """Return a promise that is not used."""
        with self._lock:
            wanting = self._one_less()
        _tell(wanting)

    def when_free(self, tell: Callable[[], None], *, spare: bool = False) -> None:
        """Call `tell` once, in any thread, when a thread may be free, or with `spare` a spare one."""
        with self._lock:
            if self._promised >= self.most + (self.spare if spare else 0):
                (self._wanting_spare if spare else self.wanting).append(tell)
                return
        tell()

    def run(self, work: Work, *, at_once: bool = False) -> None:
        """Do `work` in a thread, which has been promised. Does not wait for it.

        With `at_once`, it must not wait for a thread that is busy, which may be waiting for it.

        Raises:
            RuntimeError: no thread can be started, and there is none or it would have to wait for one; the promise is
                taken back.
        """
        with self._lock:
            try:
                self._backlog.append(work)
                self._summon()
            except RuntimeError:
                if self._threads and not at_once:
                    return  # it takes longer; who is busy comes back
                self._backlog.remove(work)
                self._promised -= 1
                raise
            except BaseException:  # an interrupt, before or after the summons
                if work in self._backlog:
                    self._summon()
                raise

    def has(self, work: Work) -> bool:
        """Whether no thread has taken this work yet."""
        with self._lock:
            return work in self._backlog

    def begin_to_wait(self) -> None:
        """A thread waits for the loop, or for another thread: it has a promise and does nothing."""
        with self._lock:
            self._asking += 1
            wanting: list[Callable[[], None]] = []
            if self._asking >= self._promised:  # those who wait for one of them had better look again
                wanting, self._wanting_spare = self._wanting_spare, []
        _tell(wanting)

    def go_on(self) -> None:
        """It waits no more."""
        with self._lock:
            self._asking -= 1

    def dismiss(self) -> None:
        """Let the threads end, those that work after their work. Never blocks."""
        with self._lock:
            self._dismissed = True
            for worker in self._parked:
                worker.bell.release()
            self._waking += len(self._parked)
            self._parked.clear()

    def _summon(self) -> None:
        """See that somebody comes for the backlog. With the lock held."""
        if self._waking:
            return  # who has been woken looks for more, and wakes the next one
        if self._parked:
            worker = self._parked[-1]
            del self._parked[-1]  # and not pop(): an interrupt comes after a call, and this one would be lost
            self._waking += 1
            worker.bell.release()
        elif len(self._threads) < self._promised:
            worker = Worker(self, next(self._numbers))
            self._waking += 1
            under_way = False
            try:
                self._threads.add(worker)
                under_way = True
                worker.start()
            except BaseException as error:
                if isinstance(error, Exception) or not under_way:  # an interrupt may come when it is
                    self._waking -= 1
                    self._threads.discard(worker)
                raise

    def _life(self, worker: Worker) -> None:
        worker.cpu_clock = clock.thread_cpu_clock()
        woken = True
        try:
            if self._on_start is not None:
                self._others_may_start()
                woken = False
                if not self._on_start():
                    return
            while (work := self._wait_for_work(worker, woken)) is not None:
                while work is not None:
                    work(worker)
                    done, work = work, self._next()
                    done.land()
                    del done  # nothing of a call may stay alive while the thread is idle
                woken = False
        finally:
            with self._lock:
                self._leave(worker)
            if self._on_exit is not None:
                self._on_exit()
            with self._lock:
                self._leaving.discard(worker)

    def _others_may_start(self) -> None:
        """This thread takes its time to begin: who has been promised another one is not to wait for that."""
        with self._lock:
            self._waking -= 1
            if self._backlog:
                with suppress(RuntimeError):  # no thread to be had: who is busy comes back
                    self._summon()

    def _next(self) -> Work | None:
        """After a call: its promise is fulfilled. The next one at once, if there is one."""
        with self._lock:
            wanting = self._one_less()
            work = self._take()
        _tell(wanting)
        return work

    def _wait_for_work(self, worker: Worker, woken: bool) -> Work | None:
        """Park until there is work; None when it is time to end."""
        work = self._take_or_park(worker, woken)
        while work is None and worker in self._threads:
            if worker.bell.acquire(timeout=self._idle_timeout):
                work = self._take_or_park(worker, woken=True)
            else:
                self._end_if_parked(worker)
        return work

    def _take_or_park(self, worker: Worker, woken: bool) -> Work | None:
        with self._lock:
            self._waking -= woken
            work = self._take()
            if work is None:
                if self._dismissed:
                    self._leave(worker)
                else:
                    self._parked.append(worker)
            return work

    def _end_if_parked(self, worker: Worker) -> None:
        with self._lock:
            if worker in self._parked and len(self._threads) > self._keep:  # else it is being woken, or stays
                self._parked.remove(worker)
                self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        """It takes no more work, and is not counted on."""
        self._threads.discard(worker)
        self._leaving.add(worker)

    def _take(self) -> Work | None:
        if not self._backlog:
            return None
        work = self._backlog.popleft()
        if self._backlog:
            with suppress(RuntimeError):  # no thread to be had: who is busy comes back
                self._summon()
        return work

    def _one_less(self) -> list[Callable[[], None]]:
        self._promised -= 1
        if not self.wanting and not self._wanting_spare:
            return _NOBODY
        wanting, self._wanting_spare = self._wanting_spare, []
        if self._promised < self.most:
            wanting, self.wanting = wanting + self.wanting, []
        return wanting


class _WithSpare:
    """The threads of a set as a `Companion` for calls that a thread waits for."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def take_nowait(self) -> bool:
        """Promise a thread if there is one left, also a spare one."""
        return self._workers.take_nowait(spare=True)

    def give_back(self) -> None:
        """Return a promise that is not used."""
        self._workers.give_back()

    def when_free(self, tell: Callable[[], None]) -> None:
        """Call `tell` once, in any thread, when one may be free, also a spare one."""
        self._workers.when_free(tell, spare=True)


def most_threads() -> int:
    """The cap of threads that this process's memory allows."""
    allowed = MEMORY.allowed()
    if allowed is None:
        return MOST_THREADS
    return max(1, min(MOST_THREADS, int(allowed * SHARE_OF_MEMORY) // BYTES_FOR_EACH_THREAD))


def check_threads(name: str, value: int) -> None:
    """Refuse a number of threads that there will never be.

    Raises:
        UsageError: more than the cap.
    """
    if value > SHARED.most:
        raise UsageError(
            f"{name}={value}: this process uses at most {SHARED.most} threads, so that they do not use up its memory. "
            f"Write at most {name}={SHARED.most}."
        )


def usable_cores() -> int:
    """Cores that threads of this interpreter can compute on: one where it has a GIL."""
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return 1 if gil else cores()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "process_cpu_count"):  # from 3.13 on; it can also be set by the user there
        number: int | None = os.process_cpu_count()
        return number or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tell(wanting: list[Callable[[], None]]) -> None:
    for tell in wanting:
        tell()


_NOBODY: list[Callable[[], None]] = []

SHARED = Workers(most_threads())
"""The threads of this process's lanes. There is none until the first blocking call."""

if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows does not fork
    os.register_at_fork(after_in_child=SHARED.forget)
