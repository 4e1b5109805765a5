"""One call in a thread: its states, and who waits for it.

    made -> queued, or given to a thread -> claimed -> run, in the caller's context -> landed -> over

A call whose caller is a coroutine lands on the loop. One that was submitted, whose caller may be in any thread, lands
where it ran: its future is done, and the loop hears nothing of it unless somebody there waits for that.

What a call is at the moment is decided by who claims it first: its thread, which then runs it, or its caller that has
gone, after which it never starts. A call *asks* when its thread waits for the loop (`penstock.from_thread`); calls that
are made on its behalf find it in a context variable.

Guarantees: what would end more than the call (`StopIteration`, `SystemExit`, `KeyboardInterrupt`) comes back as an
error. A call that is over holds nothing of the user's.

Threads: `value`, `error`, `began` and `ended` are written by the thread before the call lands. All else belongs to the
loop thread, but for `claim`; and but for a submitted call, which nobody but its thread knows any more once it has run.
"""

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.callables import name_of
from penstock.context import RunningJob, current_job
from penstock.outcome import contained
from penstock.permits import PermitQueue
from penstock.threads.future import Waiters, WatchedFuture
from penstock.threads.workers import Worker

if TYPE_CHECKING:
    import asyncio

    from penstock.threads.crossing import Crossing
    from penstock.threads.place import Place

logger = logging.getLogger("concurrent.futures")
"""Where the standard library tells of callbacks that go wrong."""


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
    on_loan: bool = False
    """Whether it runs on the place of a call that waits, and so takes none of its own."""
    over: bool = False
    finished: bool = False
    """Whether its thread has ended it. With the lane's lock held."""
    abandoned: bool = False
    error: BaseException | None = None
    value: Any = None
    _done_callbacks: Sequence[object] = ()
    """Functions of the user's that are called at its end, and may take their time; as `Future` calls them."""
    place: "Place | None" = None
    """What it lends, once its thread has waited for the loop, or while it runs on the place of another call."""

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
            self.error = self.told(error)
        self.ended = now()

    def told(self, error: BaseException) -> BaseException:
        """What its caller is told of `error`."""
        return contained(error, self.name)

    def hand_over(self) -> None:
        """It has been ended, and its thread counts as free: tell who waits for it."""
        self.crossing.land(self)

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
        self.hand_over()
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
        self._kwargs = _NOTHING
        self.value = self.error = self.waiter = self.give_back = self.place = None
        if self.context.get(asking_call) is None:
            self.context = _NO_CONTEXT
        else:
            self.context = _short_cut(self.context)


class SubmittedCall(Call, WatchedFuture[Any]):
    """A call that is its own `concurrent.futures.Future`, which is done as soon as the thread is free again."""

    waiter = None
    told_already: bool = False
    """Whether its holder knows how it ended."""

    def __init__(
        self, crossing: "Crossing", fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        Future.__init__(self)
        self._waiters = waiters = Waiters()
        waiters.future = self
        self.crossing = crossing
        self.fn = fn
        self._args = args
        self._kwargs = kwargs
        self.context = context_of_caller()
        self.job = current_job()
        self._claim = [True]

    @property
    def subject(self) -> str:
        """What messages call it."""
        return self.name

    @property
    def wanted(self) -> Call | None:
        """Itself, until it is over."""
        return None if self.over else self

    def run(self) -> None:
        """Call the function, unless the future has been cancelled; from now on that cannot be done. Never raises."""
        crossing = self.crossing
        if not self.set_running_or_notify_cancel():
            with crossing.lock:
                crossing.never_ran()
            self.told_already = True
            return
        if crossing.timed:
            self.began = crossing.loop.time()
        try:
            self.value = self.context.run(self.perform)
        except BaseException as error:  # noqa: BLE001  # it belongs to who waits for the call
            self.error = self.told(error)
        if crossing.timed:
            self.ended = crossing.loop.time()
        del self  # the error's traceback holds this frame: a cycle

    def perform(self) -> Any:
        """Call the function, in the context of the call."""
        fn, args, kwargs = self.fn, self._args, self._kwargs
        del self  # an error's traceback holds this frame: a cycle
        return fn(*args, **kwargs)

    def hand_over(self) -> None:
        """The future is done. The loop hears of it where somebody waits there for calls to be over."""
        if not self.told_already:
            self.told_already = True
            try:
                if self.error is None:
                    self.set_result(self.value)
                else:
                    self.set_exception(self.error)
            except BaseException:  # of a callback: what is no Exception comes through, and would end the thread
                logger.critical("Exception in worker", exc_info=True)
        crossing = self.crossing
        if self.give_back is not None or crossing.waiting or crossing.attentive:
            crossing.land(self)
        else:
            self.over = True
            self.forget()

    def tell(self) -> None:
        """Say to its holder that it is refused; any other end has been told where it came."""
        if self.told_already:
            return
        self.told_already = True
        assert self.error is not None, "it has been refused"
        if self.set_running_or_notify_cancel():
            self.set_exception(self.error)
        else:
            with self.crossing.lock:
                self.crossing.never_started += 1

    def forget(self) -> None:
        """Let go of the user's data, function included: its holder may keep the future for long."""
        self.let_go()
        self.fn = _over
        self._args = ()
        self._kwargs = _NOTHING
        self.value = None
        if self.error is not None or self.place is not None or self.give_back is not None or self.job is not None:
            self.error = self.place = self.give_back = self.job = None
        self.context = _NO_CONTEXT if self.context.get(asking_call) is None else _short_cut(self.context)


asking_call: ContextVar[Call | None] = ContextVar("penstock_asking_call", default=None)
"""The call in a thread on whose behalf this code runs on the loop."""


def context_of_caller() -> contextvars.Context:
    """A copy of the current context; in a thread that runs a call, what is done in the copy is done for that call."""
    context = contextvars.copy_context()
    thread = threading.current_thread()
    if isinstance(thread, Worker):
        call = thread.call
        if isinstance(call, Call) and context.get(asking_call) is not call:
            context.run(asking_call.set, call)
    return context


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
    short = contextvars.Context()
    short.run(asking_call.set, next((call for call in asking_calls(context) if not call.over), None))
    return short


_NO_CONTEXT = contextvars.Context()
_NOTHING: dict[str, Any] = {}


def _over() -> None:
    """What is left of the function of a submitted call that is over."""
