"""Ctrl-C and SIGTERM for a script: once drains, twice cancels, three times leaves.

    signal -> handler: counts, posts -> loop: drain, for `drain_timeout` seconds at most -> cancel

Handlers of the `signal` module rather than of the loop, because the third signal must work when the loop is blocked.
The handler itself only counts and posts: it may interrupt anything, a log record that is being written included.

Guarantees: SIGINT and SIGTERM count together. Each is taken only where its handler is Python's default, else it is the
program's own, and only in the main thread; what was taken is put back, unless somebody has replaced it since. None is
lost: what comes before the executor is open is heard when it is; what comes when there is nothing left to shut down
does what it does by default; and what was posted in the last moment and not heard does so once the handlers are back.

They are in place before the loop runs, and so before `asyncio.Runner` asks whether SIGINT is its own to take.
"""

import asyncio
import contextvars
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self, TypeAlias

from penstock.executor.executor import Executor

logger = logging.getLogger("penstock.run")

DRAIN_TIMEOUT = 25.0
"""Seconds. Kubernetes kills a container 30 s after its SIGTERM (`terminationGracePeriodSeconds`, "Termination of Pods"
in its documentation); the other 5 are for cancelled jobs to end, see `penstock.executor.running.PATIENCE`."""

Handler: TypeAlias = Callable[[int, FrameType | None], Any] | signal.Handlers

DEFAULTS: dict[int, Handler] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The signals that may be taken, with the handler of a program that has none of its own."""

_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """SIGINT and SIGTERM, as long as the `with` block lasts.

    Args:
        drain_timeout: seconds that a drain may take; then what still runs is cancelled. None: as long as it takes.
    """

    def __init__(self, drain_timeout: float | None = DRAIN_TIMEOUT) -> None:
        self._drain_timeout = drain_timeout
        self._taken: list[int] = []
        self._received: list[int] = []
        self._heard = 0
        self._over = False
        self._left = False
        self._post: Callable[[], object] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._taken = [number for number, default in DEFAULTS.items() if signal.getsignal(number) is default]
        for number in self._taken:
            signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in self._taken:
            if signal.getsignal(number) == self._receive:  # else somebody has replaced it since
                signal.signal(number, DEFAULTS[number])
        if self._received and not self._heard and not self._left:
            signal.raise_signal(self._received[0])

    @asynccontextmanager
    async def shut_down(self, executor: Executor) -> AsyncIterator[None]:
        """While the block runs, the first signal drains `executor`, the second cancels, the third ends the program.

        What is done is told to the logger `penstock.run`. A shutdown that is under way at the end is waited for,
        which takes no longer than shutdowns do. After the block, a signal does what it does by default; unless one
        has been heard: then all that it asks for is under way, and the third one ends the program.
        """
        loop = asyncio.get_running_loop()
        descent = _Descent(executor, self._drain_timeout)

        def hear() -> None:
            if self._post is None:  # the block has ended since
                return
            for number in self._received[self._heard :]:
                self._heard += 1
                descent.go_on(_NAMES[number])

        # In the context of here: the signal may come in the middle of a job, whose context is not ours to act in.
        context = contextvars.copy_context()

        def post() -> None:
            with suppress(RuntimeError):  # closed since, by another thread; `__exit__` raises what was not heard
                loop.call_soon_threadsafe(hear, context=context)

        self._post = post
        hear()  # what came before there was an executor
        try:
            yield
        finally:
            self._post = None
            self._over = True
            await descent.ended()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) > 2 or (self._over and not self._heard):
            self._leave(number)
        post = self._post  # read once: the loop may be in another thread, which may end its block now
        if post is not None:
            post()

    def _leave(self, number: int) -> None:
        """End the program as this signal does by default: SIGINT by a KeyboardInterrupt, SIGTERM on the spot.

        Not by a `SystemExit` that nothing but a well-behaved program would let through: whoever sends a third SIGTERM
        has been patient, and the sender is told the truth, which is that a signal ended the process (143 in a shell).

        Raises:
            KeyboardInterrupt: it is SIGINT.
            SystemExit: it is SIGTERM, and the process lives on, as the first one of a container does: the kernel
                spares it all signals that it has no handler for.
        """
        self._left = True
        self._post = None  # what is posted and was not heard is of no use any more
        signal.signal(number, DEFAULTS[number])
        signal.raise_signal(number)
        raise SystemExit(128 + number)


class _Descent:
    """One executor on its way down: draining, then cancelling. Loop thread only."""

    def __init__(self, executor: Executor, drain_timeout: float | None) -> None:
        self._executor = executor
        self._drain_timeout = drain_timeout
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None
        self._cancelling: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def go_on(self, name: str) -> None:
        """Take the next step, asked for by the signal of this name."""
        if self._draining is not None:
            self._cancel()
            logger.warning("interrupted by %s: cancelling what is in flight; %s again ends the program", name, name)
            return
        # The deadline is watched here, so that a second signal need not end a shutdown that waits for its own.
        self._draining = self._loop.create_task(self._executor.shutdown(wait=False))
        within = ""
        if self._drain_timeout is not None:
            self._deadline = self._loop.call_later(self._drain_timeout, self._too_late)
            within = f" within {self._drain_timeout:g} s"
        logger.warning("interrupted by %s: finishing what is in flight%s; %s again cancels it", name, within, name)

    async def ended(self) -> None:
        """Forget the deadline, and wait for what has been begun."""
        if self._deadline is not None:
            self._deadline.cancel()
        await asyncio.gather(*(step for step in (self._draining, self._cancelling) if step is not None))

    def _too_late(self) -> None:
        if self._cancelling is None:
            self._cancel()
            logger.warning("not finished within %g s: cancelling what is in flight", self._drain_timeout)

    def _cancel(self) -> None:
        if self._cancelling is None:
            self._cancelling = self._loop.create_task(self._executor.shutdown(timeout=0.0))
