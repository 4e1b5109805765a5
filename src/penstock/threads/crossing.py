"""The way from an event loop into threads and back: one call, and the books of all calls of a lane or gate.

    loop:    a call is given to a thread -> thread: fn, in the caller's context -> the call lands
    loop:    one wake-up for all calls that landed meanwhile -> permit back -> callers go on

Guarantees: a call is *over* when its thread has really ended it, and only then goes its permit back. A caller that
stops waiting *abandons* a call that runs, which cannot be stopped; one that has no thread yet never starts. Context
variables go in. What would end more than the call (`StopIteration`, `SystemExit`, `KeyboardInterrupt`) comes back as
an error. A loop that is closed in the meantime is told nothing.

One wake-up for many: each `call_soon_threadsafe` writes to a socket and makes the loop turn, which costs more than the
rest of a short call (`tests/benchmarks/bridge.py` prints it). So calls land in a deque, and only the first one wakes.

**Lending.** A call whose thread waits for the loop (`penstock.from_thread`) lends its *place*, permit and thread, to
the calls that are made on its behalf: without that, thread -> loop -> same lane would wait for itself. They run in the
very thread that waits. From `DEEPEST_STACK` such calls on, one on top of the other, a further thread is taken, so that
no stack overflows.

Threads: what a call is at the moment is decided by who claims it first, its thread or its caller that has gone. Its
`value`, `error`, `began` and `ended` are written by its thread before it lands. The counts of a crossing are changed
with its lock held and may be read without. All else belongs to the loop thread.
"""

import asyncio
import contextvars
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from penstock.callables import name_of
from penstock.context import RunningJob, current_job, leases
from penstock.errors import DeadlockError
from penstock.outcome import contained
from penstock.permits import PermitQueue
from penstock.threads.workers import Worker, Workers

logger = logging.getLogger("penstock.threads")

DEEPEST_STACK = 8
"""Calls on the stack of one thread, one waiting for the other. Arbitrary, because: Python's own limit of 1,000 frames
leaves more than 100 to each."""
NAMED_AT_MOST = 5
"""Calls that a message names; the others are counted."""


@dataclass(frozen=True, slots=True)
class AbandonedCall:
    """A blocking call that still runs though nobody waits for it any more."""

    name: str
    """The function's name."""
    job: str | None
    """The job that made it, as its `repr`; None outside jobs."""
    age: float
    """Seconds since its thread began."""

    def __str__(self) -> str:
        return f"{self.name} ({self.age:.1f} s)"


class Call:
    """One blocking call.

    What most calls never change stands on the class: one of these is made for every call.
    """

    label: str | None = None
    """What messages call it; None is the function's name."""
    home: object = None
    """Whose permit it needs: a lane or a service key. Also while it runs on the place of another call."""
    held: PermitQueue | None = None
    """Where a permit comes from that a gate has taken for it."""
    give_back: Callable[[], None] | None = None
    """Called when it is over, for a permit that is to go back then."""
    asked: float = 0.0
    """When it was queued; 0 when it was not."""
    began: float = 0.0
    """When its thread began, on the loop's clock; 0 before."""
    ended: float = 0.0
    over: bool = False
    abandoned: bool = False
    error: Exception | None = None
    value: Any = None
    place: "Place | None" = None
    """What it lends; made when its thread first waits for the loop."""

    def __init__(
        self, crossing: "Crossing", fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.crossing = crossing
        self.fn = fn
        self._args = args
        self._kwargs = kwargs
        self.context = contextvars.copy_context()
        self.job: RunningJob | None = current_job()
        self.waiter: asyncio.Future[Any] | None = crossing.loop.create_future()
        """Its caller's; None when it is over, since an error's traceback knows this record: a cycle."""
        self._claim = [True]

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.label or name_of(self.fn)

    def thread_name(self, number: int) -> str:
        """What its thread is called: the lane and the job, or the function where there is no job."""
        return f"penstock-{self.crossing.name}_{number} {self.job or self.name}"

    # --- any thread ---

    @property
    def unclaimed(self) -> bool:
        """Whether it may still be claimed."""
        return bool(self._claim)

    def claim(self) -> bool:
        """True for the first who asks: its thread, which then runs it, or its caller, after which it never starts."""
        try:
            return self._claim.pop()
        except IndexError:
            return False

    # --- its thread ---

    def run(self) -> None:
        """Call the function. It has been claimed. Never raises."""
        now = self.crossing.loop.time
        self.began = now()
        try:
            self.value = self.context.run(self.fn, *self._args, **self._kwargs)
        except BaseException as error:  # noqa: BLE001  # it belongs to who waits for the call
            self.error = contained(error, self.name)
        self.ended = now()

    def claim_for_thread(self) -> bool:
        """True if this thread is to run it, which is then counted."""
        books = self.crossing
        with books.lock:
            claimed = self.claim()
            books.started += claimed
        return claimed

    def run_claimed(self, worker: Worker) -> None:
        """Run it, and count its end."""
        outer, worker.call = worker.call, self
        self.run()
        worker.call = outer
        books = self.crossing
        with books.lock:
            books.count_end(self)

    def __call__(self, worker: Worker) -> None:
        """As the work of a thread by itself, without a lane."""
        if self.claim_for_thread():
            self.run_claimed(worker)

    def land(self) -> None:
        """Its thread has ended it, or left it since its caller has gone."""
        self.crossing.land(self)
        self.crossing.end_external_work()

    # --- loop thread ---

    def leave(self) -> None:
        """Its caller waits no longer: cancelled, or its coroutine was closed."""
        if self.over:
            return
        if self.claim():
            with self.crossing.lock:
                self.crossing.never_started += 1
        else:
            self.crossing.abandon(self)

    def refuse(self, error: Exception) -> None:
        """It is not to begin."""
        self.error = error
        self.over = True
        self.tell()
        self.forget()

    def tell(self) -> None:
        """Let its caller go on, if it still waits."""
        waiter = self.waiter
        if waiter is None or waiter.done() or self.abandoned:
            return
        if self.error is None:
            waiter.set_result(self.value)
        else:
            waiter.set_exception(self.error)

    def forget(self) -> None:
        """Let go of the user's data: whoever still knows this record needs them no more."""
        self._args = ()
        self._kwargs = {}
        self.value = self.error = self.waiter = None
        self.context = _short_cut(self.context)


class SubmittedCall(Call):
    """A call whose caller holds a `concurrent.futures.Future`, which is done as soon as the thread is."""

    def __init__(
        self, crossing: "Crossing", fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__(crossing, fn, args, kwargs)
        self.future: Future[Any] | None = Future()

    def claim(self) -> bool:
        """True for its thread, unless its future has been cancelled; from now on that cannot be done."""
        if not super().claim():
            return False
        assert self.future is not None, "only a call that is over has forgotten it, and that one was claimed"
        if self.future.set_running_or_notify_cancel():
            return True
        with self.crossing.lock:
            self.crossing.never_started += 1
        return False

    def run(self) -> None:
        """Call the function; then the future is done."""
        super().run()
        self.tell()

    def tell(self) -> None:
        """The future is done, if it is not yet."""
        future = self.future
        if future is None or future.done():
            return
        if self.error is None:
            future.set_result(self.value)
        else:
            future.set_exception(self.error)

    def forget(self) -> None:
        """Let go of the future as well."""
        super().forget()
        self.future = None


asking_call: ContextVar[Call | None] = ContextVar("penstock_asking_call", default=None)
"""The call in a thread on whose behalf this code runs on the loop."""


def asking_calls(context: contextvars.Context, home: object = None) -> Iterator[Call]:
    """The calls that wait for what is done in `context`, the nearest first; all, or those with a permit of `home`."""
    call = context.get(asking_call)
    while call is not None:
        if home is None or (call.home is home and not call.over):
            yield call
        call = call.context.get(asking_call)


def waited_for(context: contextvars.Context) -> bool:
    """Whether a thread waits, or may come to wait, for what is done in `context`."""
    return context.get(asking_call) is not None and any(not call.over for call in asking_calls(context))


def _short_cut(context: contextvars.Context) -> contextvars.Context:
    """What is left of the context of a call that is over: who waits for it, without those that are over themselves.

    A chain of calls, each of which has the next one made and ends, must not grow for ever.
    """
    if context.get(asking_call) is None:
        return _NO_CONTEXT
    short = contextvars.Context()
    short.run(asking_call.set, next((call for call in asking_calls(context) if not call.over), None))
    return short


_NO_CONTEXT = contextvars.Context()


class Place:
    """What a call lends while its thread waits for the loop: its permit, and the thread.

    Loop thread only, but for what its own thread does: `take`, `occupy` and `vacate`.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.depth = 1
        """Calls on the thread's stack."""
        self.inbox: SimpleQueue[Call | None] = SimpleQueue()
        """Calls that the waiting thread may run; None when the wait is over."""
        self.loan = PermitQueue(call.crossing.loop, 0)
        """Its gate's permit, lent: one while the thread waits, none while it works."""
        self._waiting = False
        self._lock = threading.Lock()
        self._posted = 0
        """What is in the inbox. A virtual clock stands still for it, unless the thread cannot take it yet."""
        self._occupied = False
        self._queued: dict[Call, None] = {}
        """Calls that wait for its lane or for its place, whichever is free first."""
        self._cancel: Callable[[], object] | None = None

    def lend(self, cancel: Callable[[], object]) -> None:
        """The thread waits from now on; `cancel` ends that."""
        self._waiting = True
        self._cancel = cancel
        self.call.crossing.waiting[self] = None
        for call in self._queued:
            self.give(call)
        self.loan.resize(1)
        self.call.crossing.changed()

    def take_back(self) -> None:
        """The thread is about to go on."""
        self._waiting = False
        self._cancel = None
        self.call.crossing.waiting.pop(self, None)
        self.loan.resize(0)
        self._post(None)

    def offer(self, call: Call) -> None:
        """Run `call` in the thread whenever that waits, if nobody else has claimed it by then."""
        self._queued[call] = None
        if self._waiting:
            self.give(call)

    @property
    def has_work(self) -> bool:
        """Whether the thread is about to run one of the calls that it waits for."""
        return not self._occupied and any(call.unclaimed for call in self._queued)

    def withdraw(self, call: Call) -> None:
        """It is over, or needs no place any more."""
        self._queued.pop(call, None)

    def give(self, call: Call) -> None:
        """Let the thread, which waits, run `call`."""
        self._post(call)

    def _post(self, call: Call | None) -> None:
        with self._lock:
            self._posted += 1
            if not self._occupied:
                self.call.crossing.begin_external_work()
        self.inbox.put(call)

    def take(self) -> None:
        """The thread has taken something out of the inbox, and is at work for it."""
        with self._lock:
            self._posted -= 1

    def occupy(self) -> None:
        """The thread runs a call: what else is in the inbox has to wait for that, and time may go on meanwhile."""
        with self._lock:
            self._occupied = True
            for _ in range(self._posted):
                self.call.crossing.end_external_work()

    def vacate(self) -> None:
        """It waits again, and is about to take what is in the inbox."""
        with self._lock:
            self._occupied = False
            for _ in range(self._posted):
                self.call.crossing.begin_external_work()

    def forsake(self) -> None:
        """Nobody waits for the call any more: neither does it need what it waits for."""
        if self._cancel is not None:
            self._cancel()


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
        self.tells = True
        """Whether callers that wait in vain are worth a warning."""
        self.door = Door(self.begin)
        """For calls that have their permit and their thread."""
        self._abandoned: dict[Call, None] = {}
        self._told = False
        self._landed: deque[Call] = deque()
        self._woken = False
        self._idle: asyncio.Future[None] | None = None
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
            _lender(call).give(call)
            return
        self.begin_external_work()
        try:
            self.workers.run(call)
        except BaseException as error:  # noqa: BLE001  # no thread to be had: it belongs to who waits for the call
            call.error = contained(error, call.name)
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
        if len(self._abandoned) < limit or len(abandoned := self.abandoned(home)) < limit:
            return None
        threads = "the one thread" if limit == 1 else f"all {limit} threads"
        held = "is held by a call" if limit == 1 else "are held by calls"
        return f"{threads} of {self.name!r} {held} that nobody waits for any more: {named(abandoned)}"

    def tell_once(self, explanation: str | None) -> None:
        """Log that callers wait in vain, once until that has changed."""
        if explanation is not None and self.tells and not self._told:
            self._told = True
            logger.warning("%s", explanation)

    async def wait_until_idle(self, timeout: float) -> bool:
        """Wait until nothing runs that somebody waits for; False if `timeout` seconds were not enough."""
        if not self._is_idle():
            self._idle = self.loop.create_future()
            try:
                await asyncio.wait([self._idle], timeout=timeout)
            finally:
                self._idle = None
        return self._is_idle()

    def _is_idle(self) -> bool:
        return self.busy <= len(self._abandoned)

    def _arrive(self) -> None:
        self._woken = False  # before looking: who lands from now on wakes again
        landed = self._landed
        while landed:
            self._over(landed.popleft())
        self.changed()
        if self._idle is not None and not self._idle.done() and self._is_idle():
            self._idle.set_result(None)

    def _over(self, call: Call) -> None:
        """Its thread has ended it: the permit goes back before anything else, then its caller goes on."""
        call.over = True
        if call.abandoned:
            del self._abandoned[call]
            self._told = False
            self.recovered()
            for lease in call.context.get(leases, ()):
                lease.release()
            if call.error is not None:
                logger.info("%s, which nobody waited for any more, failed", call.name, exc_info=call.error)
        if call.give_back is not None:
            call.give_back()
        call.tell()
        call.forget()

    # --- any thread ---

    def count_end(self, call: Call) -> None:
        """Its thread has ended it. With the lock held."""
        self.ended += 1
        self.seconds += call.ended - call.began

    def land(self, call: Call) -> None:
        """Tell the loop that a call is over."""
        self._landed.append(call)
        if not self._woken:
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._arrive)
            except RuntimeError:  # the loop is closed: nobody waits
                self._landed.clear()


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


def loans(home: PermitQueue, context: contextvars.Context) -> tuple[PermitQueue, ...]:
    """What those lend who hold a permit of `home` and wait for what is done in `context`."""
    return tuple(asking.place.loan for asking in asking_calls(context, home) if asking.place is not None)


def run_in_place(call: Call, worker: Worker, depth: int) -> None:
    """Run `call` in a thread that waits, or in a further one while that waits. In the thread whose place is lent.

    It has been claimed for this thread.
    """
    if depth < DEEPEST_STACK:
        call.place = Place(call)
        call.place.depth = depth + 1
        call.run_claimed(worker)
    elif call.crossing.workers.take_nowait(spare=True):
        further = _Further(call)
        call.crossing.workers.run(further)
        further.wait()
    else:
        call.error = out_of_threads(call)
        with call.crossing.lock:
            call.crossing.started -= 1
    call.crossing.land(call)


def out_of_threads(call: Call) -> DeadlockError:
    """There is no thread for a call without which others cannot go on."""
    chain = [call, *asking_calls(call.context)]
    return DeadlockError(
        f"no thread is left for {call.name}, and threads wait for it: "
        f"{' <- '.join(f'{each.name} in {each.crossing.name!r}' for each in chain)}. "
        f"Nest less deeply, or run fewer of these at a time."
    )


def named(calls: tuple[AbandonedCall, ...]) -> str:
    """The calls by name and age, the first few of them."""
    names = [str(call) for call in calls[:NAMED_AT_MOST]]
    if len(calls) > NAMED_AT_MOST:
        names.append(f"and {len(calls) - NAMED_AT_MOST} more")
    return ", ".join(names)


class _Further:
    """A call on the place of a thread whose stack is high, in another thread."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._done = threading.Event()

    def __call__(self, worker: Worker) -> None:
        self._call.run_claimed(worker)

    def land(self) -> None:
        self._done.set()

    def wait(self) -> None:
        self._done.wait()


def _lender(call: Call) -> Place:
    """Who holds a loan was asked for by the lender."""
    places = (asking.place for asking in asking_calls(call.context) if asking.place is not None)
    return next(place for place in places if place.loan is call.held)


def _nothing() -> None:
    """Nobody wants to know."""
