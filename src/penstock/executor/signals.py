"""Ctrl-C for a script: once drains, twice cancels, three times leaves.

A handler of the `signal` module rather than of the loop, because the third Ctrl-C must work when the loop is blocked.
The handler itself only counts and posts: it may interrupt anything, a log record that is being written included.

It is in place before the loop runs, and so before `asyncio.Runner` asks whether SIGINT is its own to take. Where the
program has a handler of its own, and outside the main thread, nothing is taken.
"""

import asyncio
import contextvars
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType, TracebackType
from typing import Self

from penstock.executor.executor import Executor

logger = logging.getLogger("penstock.run")


class Interrupts:
    """SIGINT, as long as the `with` block lasts: a KeyboardInterrupt, except where an executor is to be shut down."""

    def __init__(self) -> None:
        self._taken = False
        self._presses = 0
        self._post: Callable[[], object] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._taken = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._taken:
            signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._taken and signal.getsignal(signal.SIGINT) == self._pressed:  # else somebody has replaced it since
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @asynccontextmanager
    async def shut_down(self, executor: Executor) -> AsyncIterator[None]:
        """While the block runs, SIGINT drains `executor`, the second one cancels, the third raises KeyboardInterrupt.

        The first two are told to the logger `penstock.run`. A shutdown that is under way at the end is waited for,
        which takes no longer than shutdowns do.
        """
        loop = asyncio.get_running_loop()
        shutdowns: list[asyncio.Task[None]] = []

        def shut_down() -> None:
            if self._post is None:  # the block has ended since
                return
            now = bool(shutdowns)
            logger.warning(
                "interrupted: %s what is in flight; Ctrl-C again %s",
                *(("cancelling", "ends the program") if now else ("finishing", "cancels it")),
            )
            shutdowns.append(loop.create_task(executor.shutdown(wait=now, timeout=0.0)))

        # In the context of here: the signal may come in the middle of a job, whose context is not ours to act in.
        context = contextvars.copy_context()
        self._post = lambda: loop.call_soon_threadsafe(shut_down, context=context)
        try:
            yield
        finally:
            self._post = None
            await asyncio.gather(*shutdowns)

    def _pressed(self, _signal: int, _frame: FrameType | None) -> None:
        self._presses += 1
        if self._presses > 2:
            self._post = None  # what is posted and was not heard is of no use any more
        if self._post is None:
            raise KeyboardInterrupt
        self._post()
