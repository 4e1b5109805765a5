"""From a thread to the loop: call something there and wait for it.

    thread: from_thread(loop, fn, ...) -> loop: fn, in a copy of the thread's context
    thread: waits, and runs what is given to its place meanwhile -> value

While a thread of a lane waits, it lends its place (`crossing.Place`) to the calls that are made for it, so a chain
thread -> loop -> same lane makes progress at any depth, in a lane of one thread too.

Guarantees: the thread never waits for ever: when its own caller has gone, when the portal is closed and when the loop
is, what runs for it is cancelled and it gets an error. What would end the loop comes back as an error; Ctrl-C in the
midst of it does both.

Threads: a request is made by the thread, and from then on belongs to the loop, which ends it with the last message to
the thread's inbox.
"""

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from inspect import isawaitable
from queue import Empty, SimpleQueue
from typing import Any

from penstock.callables import is_async, name_of
from penstock.errors import ClosedError, WrongThread
from penstock.outcome import contained
from penstock.threads.call import Call, asking_call
from penstock.threads.mailbox import Mailbox
from penstock.threads.place import Place, run_in_place
from penstock.threads.workers import Worker

LOOK_AGAIN = 1.0
"""Seconds after which a waiting thread looks whether there is still a loop. Arbitrary, because: nobody waits for it."""


class Portal:
    """The way from threads to one loop. Made and closed on it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._requests: set[_Request] = set()
        self._mailbox: Mailbox[Callable[[], None]] = Mailbox(self._loop, lambda callback: callback())
        self._closed = False

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `fn` on the loop, await what can be awaited, and wait for its value. Any thread but the loop's.

        Raises:
            WrongThread: called on the loop's own thread, which it would block.
            ClosedError: the portal or the loop is closed.
            concurrent.futures.CancelledError: what ran on the loop was cancelled, as it is when nobody waits any more
                for the call that this thread runs.
            Exception: what `fn` raised.
        """
        if asyncio._get_running_loop() is self._loop:
            refuse_on_a_loop(fn)
        request = _Request(self, fn, args, kwargs)
        self._post(request.start)
        try:
            request.wait()
        except BaseException:  # KeyboardInterrupt in the main thread, for example
            with suppress(ClosedError):
                self._post(request.cancel)
            raise
        return request.result()

    def close(self) -> None:
        """Cancel what runs for threads, and refuse what they ask from now on. Loop thread only."""
        self._closed = True
        for request in list(self._requests):
            request.cancel()

    def _post(self, callback: Callable[[], None]) -> None:
        if not self._mailbox.post(callback):
            raise ClosedError("the event loop is closed: nothing can be run on it from a thread.")


class _Request:
    """One function that a thread wants to be called on the loop."""

    def __init__(self, portal: Portal, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._portal = portal
        self._fn = fn
        self._args = args
        self._kwargs = kwargs
        self._value: Any = None
        self._error: Exception | None = None
        self._task: asyncio.Task[None] | None = None
        self._over = False
        self._context = contextvars.copy_context()
        self._worker, self._call = _whose_thread()
        self._place: Place | None = None
        self._inbox: SimpleQueue[Call | None] = SimpleQueue()
        if self._call is not None and self._call.crossing.loop is portal._loop:
            if self._call.place is None:
                self._call.place = Place(self._call)
            self._place = self._call.place
            self._inbox = self._place.inbox
            self._context.run(asking_call.set, self._call)

    # --- the thread ---

    def wait(self) -> None:
        """Wait until it is over; meanwhile run what is given to this thread.

        Raises:
            ClosedError: the loop has been closed.
        """
        while True:
            try:
                call = self._inbox.get(timeout=LOOK_AGAIN)
            except Empty:
                if self._portal._loop.is_closed():
                    raise ClosedError("the event loop was closed while a thread waited for it.") from None
                continue
            if self._place is not None:
                self._place.take()
            if call is None:
                return
            assert self._worker is not None, "only a worker's place is lent"
            assert self._place is not None, "only a worker's place is lent"
            if self._over and call.held is None:
                pass  # its lane has it still, and this thread has something else to do now
            elif call.claim_for_thread():
                self._place.occupy()
                run_in_place(call, self._worker, self._place.depth)
                self._place.vacate()
            elif call.held is not None:  # it was given to this thread and no other: its permit has to go back
                call.hand_over()
            call.crossing.end_external_work()

    def result(self) -> Any:
        """The value, or the function's error."""
        error, self._error = self._error, None  # its traceback knows this request: a cycle
        if error is None:
            return self._value
        try:
            raise error
        finally:
            del error

    # --- the loop ---

    def start(self) -> None:
        """Begin. In the loop."""
        portal = self._portal
        if self._place is not None:
            self._place.call.crossing.end_external_work()  # time may go on: it is the loop's turn
        if portal._closed or (self._call is not None and self._call.abandoned):
            self._end(error=self._too_late())
            return
        portal._requests.add(self)
        if self._place is not None:
            self._place.lend(self.cancel)
        self._task = portal._loop.create_task(self._perform(), context=self._context)
        self._task.add_done_callback(self._ended)

    def cancel(self) -> None:
        """Nobody waits for it any more. In the loop."""
        if self._task is not None:
            self._task.cancel()

    async def _perform(self) -> None:
        try:
            value = self._fn(*self._args, **self._kwargs)
            if isawaitable(value):
                value = await value
        except asyncio.CancelledError:
            self._end(error=self._cut_off())
            raise
        except BaseException as error:  # it belongs to the thread, and must not end the loop
            self._end(error=contained(error, name_of(self._fn)))
            if isinstance(error, KeyboardInterrupt):  # but for this one, which is meant for the program
                raise
        else:
            self._end(value)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A task that is cancelled before its first step never reaches its last one."""
        if not self._over:
            self._end(error=self._cut_off())
        if not task.cancelled():
            task.exception()  # it comes out of the loop: asyncio need not complain that nobody looks at it

    def _too_late(self) -> Exception:
        if self._portal._closed and not (self._call is not None and self._call.abandoned):
            return ClosedError(f"from_thread({name_of(self._fn)}) was called after its executor has been shut down.")
        return self._cut_off()

    def _cut_off(self) -> Exception:
        what = f"from_thread({name_of(self._fn)})"
        if self._call is not None and self._call.abandoned:
            return concurrent.futures.CancelledError(f"{what}: nobody waits for this call any more")
        if self._portal._closed:
            return ClosedError(f"{what} was cut off when its executor closed.")
        return concurrent.futures.CancelledError(f"{what} was cancelled on the loop")

    def _end(self, value: Any = None, error: Exception | None = None) -> None:
        self._over = True
        self._value, self._error = value, error
        self._portal._requests.discard(self)
        if self._place is not None:
            self._place.take_back()
        else:
            self._inbox.put(None)


def refuse_on_a_loop(fn: Callable[..., Any]) -> None:
    """Refuse a thread that runs a loop.

    Raises:
        WrongThread: this is one.
    """
    if asyncio._get_running_loop() is not None:
        instead = f"await {name_of(fn)}(...)" if is_async(fn) else f"{name_of(fn)}(...)"
        raise WrongThread(
            f"from_thread({name_of(fn)}) was called on a thread that runs an event loop, which it would block. "
            f"There, write `{instead}`; from_thread is for code in threads."
        )


def _whose_thread() -> tuple[Worker | None, Call | None]:
    """The worker that runs this code, and its call."""
    thread = threading.current_thread()
    if isinstance(thread, Worker) and isinstance(thread.call, Call):
        return thread, thread.call
    return None, None
