"""What has to be finished before the interpreter ends, and what a fork leaves behind.

    the main thread is through -> finish() of everybody -> non-daemon threads joined -> atexit -> the end

As `concurrent.futures` does it, and by the same hook, which is private (`threading._register_atexit`, since CPython
3.9): functions of the public `atexit` run later, when the standard library's own executors are shut already, and the
loop's name resolution is one of those.

In the child of a fork no thread of the parent goes on: whoever had one is told, and nobody waits for it there.

Threads: any.
"""

import atexit
import os
import threading
from contextlib import ExitStack
from typing import Protocol
from weakref import WeakSet


class Running(Protocol):
    """What lives in threads of its own."""

    def finish(self) -> None:
        """Finish what has been begun, and wait for that. The interpreter is about to end."""
        ...

    def forsake(self) -> None:
        """This process is the child of a fork: the threads do not exist here, and locks may be held for ever."""
        ...


class _Process:
    """This process, as far as it has threads to wait for."""

    def __init__(self) -> None:
        self.ending = False
        self._running: WeakSet[Running] = WeakSet()
        self._lock = threading.RLock()  # re-entrant: a finalizer may interrupt anything

    def add(self, running: Running) -> None:
        with self._lock:
            self._running.add(running)

    def end(self) -> None:
        """The main thread is through. An error (Ctrl-C) of one keeps no other from being finished."""
        self.ending = True
        with self._lock:
            left = list(self._running)
        with ExitStack() as stack:
            for running in left:
                stack.callback(running.finish)

    def begin_anew(self) -> None:
        """In the child of a fork."""
        self._lock = threading.RLock()  # somebody may have held the other one
        forsaken, self._running = list(self._running), WeakSet()
        for running in forsaken:
            running.forsake()


_process = _Process()


def finish_at_exit(running: Running) -> None:
    """Have `running` finished before the interpreter ends, as long as it lives."""
    _process.add(running)


def interpreter_is_ending() -> bool:
    """Whether the main thread is through, and nothing new is to be begun."""
    return _process.ending


getattr(threading, "_register_atexit", atexit.register)(_process.end)

if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows does not fork
    os.register_at_fork(after_in_child=_process.begin_anew)
