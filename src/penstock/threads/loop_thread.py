"""An event loop in a thread of its own.

    start(), wait_until_ready() -> thread: a new loop runs main(), which calls ready() -> they return
    post(callback), any thread -> loop: callback()
    main() returns, or the loop is stopped under it -> over() -> the thread ends

Guarantees: `wait_until_ready` returns when the loop takes callbacks, or raises why it does not. Many that are posted
share one wake-up. What is posted when it is over is refused, and `over` is told once, on this thread, when nothing runs
on the loop any more: nobody has to wait for ever for a callback that never comes.

The thread is a daemon: it is ended by whoever started it, and the interpreter's exit waits for it only where that is
asked for (`at_exit.py`).
"""

import asyncio
import operator
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from penstock.threads.mailbox import Mailbox
from penstock.threads.own_loop import run_on_own_loop

PATIENCE = 5.0
"""Seconds that tasks get to end which are left when the loop is to be closed, as in `executor/running.py`."""

Callback = Callable[[], object]


class LoopThread(threading.Thread):
    """A thread that runs an event loop.

    Args:
        name: of the thread.
        main: what runs on the loop, for as long as there is to be one.
        over: called at the end, with the error that ended it too early, if any.
        loop_factory: makes the loop; None asks asyncio's policy.
    """

    def __init__(
        self,
        name: str,
        main: Callable[[], Coroutine[Any, Any, None]],
        over: Callable[[BaseException | None], object],
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._main = main
        self._over = over
        self._loop_factory = loop_factory
        self._mailbox: Mailbox[Callback] | None = None
        self._started_or_not = threading.Event()
        self._error: BaseException | None = None

    def wait_until_ready(self) -> None:
        """Wait until `main` has said that it is. Any thread, once the thread has been started.

        Raises:
            BaseException: what `loop_factory` raised, or `main` before it was ready.
        """
        self._started_or_not.wait()
        if self._mailbox is None:
            assert self._error is not None, "it was ready, or something kept it from that"
            raise self._error

    def run(self) -> None:
        """The thread's life."""
        error: BaseException | None = None
        try:
            run_on_own_loop(self._main, patience=PATIENCE, loop_factory=self._loop_factory)
        except BaseException as raised:  # noqa: BLE001  # it belongs to who started the thread, or waits for the loop
            error = raised
        if self._mailbox is None:
            self._error = error
        else:
            self._over(error)
        self._started_or_not.set()

    def ready(self) -> None:
        """Let callbacks come. On the loop."""
        self._mailbox = Mailbox(asyncio.get_running_loop(), operator.call)
        self._started_or_not.set()

    def post(self, callback: Callback) -> bool:
        """Have `callback` called on the loop; False if that is over. Any thread, once it is ready. Never blocks."""
        assert self._mailbox is not None, "nobody has this thread before it is ready"
        return self._mailbox.post(callback)
