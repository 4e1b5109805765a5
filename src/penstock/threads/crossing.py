"""The way from an event loop into threads and back, and the books of all calls of a lane or gate.

    loop:    a call is given to a thread -> thread: fn, in the caller's context -> the call lands
    loop:    one wake-up for all calls that landed meanwhile -> permit back -> callers go on

Guarantees: a call is *over* when its thread has really ended it, and only then goes its permit back. A caller that
stops waiting *abandons* a call that runs, which cannot be stopped; one that has no thread yet never starts. Context
variables go in. What would end more than the call (`StopIteration`, `SystemExit`, `KeyboardInterrupt`) comes back as
an error. A loop that is closed in the meantime is told nothing.

Threads: the counts are changed with the lock held and may be read without. All else belongs to the loop thread.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from penstock.context import leases
from penstock.threads.call import AbandonedCall, Call
from penstock.threads.mailbox import Mailbox
from penstock.threads.place import Place, lender_of
from penstock.threads.workers import Workers

logger = logging.getLogger("penstock.threads")

NAMED_AT_MOST = 5
"""Calls that a message names; the others are counted."""


class Crossing:
    """The calls of one lane or gate, and how they come back to its loop.

    Args:
        name: what messages and threads call it.
        workers: the threads.
    """

    def __init__(self, name: str, workers: Workers) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        self.workers = workers
        self.lock = threading.RLock()  # re-entrant: a finalizer that makes a call may interrupt anything
        self.started = 0
        """Calls whose thread has begun."""
        self.ended = 0
        """Those of them whose thread has ended."""
        self.seconds = 0.0
        """How long those had their threads, together."""
        self.never_started = 0
        """Calls whose caller went away before they began."""
        self.given_up = 0
        """Calls that have been abandoned."""
        self.timed = False
        """Whether it matters how long submitted calls have their threads."""
        self.tells = True
        """Whether callers that wait in vain are worth a warning."""
        self.door = Door(self.begin)
        """For calls that have their permit and their thread."""
        self._abandoned: dict[Call, None] = {}
        self._told = 0
        self._landed: Mailbox[Call] = Mailbox(self.loop, self._arrive, self._all_arrived)
        self._idle: asyncio.Future[None] | None = None
        self.attentive = False
        """Whether somebody on the loop waits for all calls to be over."""
        self.waiting: dict[Place, None] = {}
        """The places of calls whose threads wait for the loop. Loop thread only."""
        self.changed: Callable[[], object] = _nothing
        """Called when a thread begins to wait for the loop, and when calls are over."""
        self.recovered: Callable[[], object] = _nothing
        """Called when an abandoned call is over."""
        self.begin_external_work: Callable[[], None] = getattr(self.loop, "begin_external_work", _nothing)
        """A virtual clock stands still from now on."""
        self.end_external_work: Callable[[], None] = getattr(self.loop, "end_external_work", _nothing)
        """It may go on, when what has been posted to the loop before is done."""

    @property
    def busy(self) -> int:
        """Calls that have a thread, abandoned ones included."""
        return self.started - self.ended

    # --- loop thread ---

    def begin(self, call: Call) -> None:
        """Give a thread to a call with a gate's permit: one that is promised, or that of the call that lent it."""
        if call.held is not call.home:
            lender_of(call).give(call)
            return
        self.begin_external_work()
        try:
            self.workers.run(call)
        except RuntimeError as error:  # no thread to be had: it belongs to who waits for the call
            call.error = error
            call.land()

    def abandon(self, call: Call) -> None:
        """Its caller has stopped waiting, and it runs on."""
        call.abandoned = True
        self.given_up += 1
        self._abandoned[call] = None
        for lease in call.context.get(leases, ()):
            lease.hold()
        if call.place is not None:
            call.place.forsake()

    def abandoned(self, home: object = None) -> tuple[AbandonedCall, ...]:
        """Calls that run though nobody waits for them, the oldest first; with one kind of permit, or all."""
        now = self.loop.time()
        return tuple(
            AbandonedCall(call.name, None if call.job is None else repr(call.job), now - (call.began or now))
            for call in sorted(self._abandoned, key=lambda call: call.began or now)
            if home is None or call.home is home
        )

    def in_vain(self, home: object, limit: int) -> str | None:
        """What to say to those who wait, when all permits of `home` are held by calls that are abandoned."""
        if len(self._abandoned) < limit:
            return None
        if sum(call.home is home and not call.on_loan for call in self._abandoned) < limit:
            return None
        threads = "the one thread" if limit == 1 else f"all {limit} threads"
        held = "is held by a call" if limit == 1 else "are held by calls"
        return f"{threads} of {self.name!r} {held} that nobody waits for any more: {named(self.abandoned(home))}"

    def tell_once(self, explanation: str | None, limit: int) -> None:
        """Log that all `limit` permits are held in vain: once until that has changed, or `limit` has doubled."""
        if explanation is not None and self.tells and limit >= 2 * self._told:
            self._told = limit
            logger.warning("%s", explanation)

    async def wait_until_idle(self, timeout: float) -> bool:
        """Wait until nothing runs that somebody waits for; False if `timeout` seconds were not enough."""
        if not self._is_idle():
            self._idle, self.attentive = self.loop.create_future(), True
            try:
                if not self._is_idle():  # a submitted call tells nobody that ended before it could see the future
                    await asyncio.wait([self._idle], timeout=timeout)
            finally:
                self._idle, self.attentive = None, False
        return self._is_idle()

    @property
    def abandoned_calls(self) -> int:
        """How many calls run though nobody waits for them."""
        return len(self._abandoned)

    def _is_idle(self) -> bool:
        return self.busy <= len(self._abandoned)

    def _arrive(self, call: Call) -> None:
        try:
            self._over(call)
        except Exception as error:  # noqa: BLE001  # a filter of the user's logging, for example; others have landed too
            self.loop.call_exception_handler({"message": f"the end of {call.name} went wrong", "exception": error})

    def _all_arrived(self) -> None:
        self.changed()
        if self._idle is not None and not self._idle.done() and self._is_idle():
            self._idle.set_result(None)

    def _over(self, call: Call) -> None:
        """Its thread has ended it: the permit goes back before anything else, then its caller goes on."""
        call.over = True
        if call.give_back is not None:
            call.give_back()
        if call.abandoned:
            self._recover(call)
        else:
            call.tell()
        call.forget()

    def _recover(self, call: Call) -> None:
        """An abandoned call has ended after all."""
        del self._abandoned[call]
        self._told = 0
        self.recovered()
        error, held = call.error, call.context.get(leases, ())
        call.forget()
        for lease in held:
            lease.release()
        if error is not None:
            logger.info("%s, which nobody waited for any more, failed", call.name, exc_info=error)

    # --- any thread ---

    def count_end(self, call: Call) -> None:
        """Its thread has ended it. With the lock held."""
        self.ended += 1
        self.seconds += call.ended - call.began

    def never_ran(self) -> None:
        """A call that has been counted as begun was cancelled before it ran. With the lock held."""
        self.never_started += 1
        self.started -= 1
        self.ended -= 1  # its end is about to be counted

    def land(self, call: Call) -> None:
        """Tell the loop that a call is over. Nobody waits when it is closed."""
        self._landed.post(call)


class Door(Executor):
    """What `run_in_executor` is given: its `submit` returns a future of the loop, which is handed through as it is."""

    def __init__(self, begin: Callable[[Call], None]) -> None:
        self._begin = begin

    def submit(self, call: Any, /, *_args: Any, **_kwargs: Any) -> Any:
        """Begin the call and return the future that its caller is to await."""
        waiter = call.waiter  # which the call forgets when it is over
        self._begin(call)
        return waiter


def enter(loop: asyncio.AbstractEventLoop, door: Door, call: Any) -> "asyncio.Future[Any]":
    """Begin `call` by `run_in_executor`, and return the future of its value."""
    return loop.run_in_executor(door, call)


def named(calls: tuple[AbandonedCall, ...]) -> str:
    """The calls by name and age, the first few of them."""
    names = [str(call) for call in calls[:NAMED_AT_MOST]]
    if len(calls) > NAMED_AT_MOST:
        names.append(f"and {len(calls) - NAMED_AT_MOST} more")
    return ", ".join(names)


def _nothing() -> None:
    """Nobody wants to know."""
