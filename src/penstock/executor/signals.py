"""Ctrl-C for a script: once drains, twice cancels, three times leaves.

A handler of the `signal` module rather than of the loop, because the third Ctrl-C must work when the loop is blocked.
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from penstock.executor.executor import Executor


def may_take_sigint() -> bool:
    """Whether SIGINT is ours to take: in the main thread, and nobody has replaced Python's own handler.

    Ask before the event loop runs: `asyncio.Runner` puts a handler of its own in place.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextmanager
def sigint_shuts_down(executor: Executor) -> Iterator[None]:
    """While the block runs, SIGINT drains `executor`; the second one cancels; the third raises KeyboardInterrupt.

    Main thread only. The previous handler is put back at the end.
    """
    loop = asyncio.get_running_loop()
    shutdowns: list[asyncio.Task[None]] = []

    def shut_down(now: bool) -> None:
        shutdowns.append(loop.create_task(executor.shutdown(wait=now, timeout=0.0)))

    presses = 0

    def pressed(_signal: int, _frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 2:
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(shut_down, presses == 2)

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
