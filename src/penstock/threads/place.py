"""The place of a call, permit and thread, and how it is lent while its thread waits for the loop.

    thread: from_thread(...) waits -> place lent -> calls that are made for it run in this very thread -> it goes on

Without that, thread -> loop -> same lane would wait for itself. From `DEEPEST_STACK` such calls on, one on top of the
other, a further thread is taken, so that no stack overflows; when there is none, `DeadlockError` names the chain.
"""

import threading
from collections.abc import Callable
from contextvars import Context
from queue import SimpleQueue

from penstock.errors import DeadlockError
from penstock.permits import PermitQueue
from penstock.threads.call import Call, asking_calls
from penstock.threads.workers import Worker

DEEPEST_STACK = 8
"""Calls on the stack of one thread, one waiting for the other. Arbitrary, because: Python's own limit of 1,000 frames
leaves more than 100 to each."""
LAST_RESORT = 64
"""Such calls where no further thread is to be had. Arbitrary, because: it leaves some 15 frames to each."""

NAMED_IN_A_CHAIN = 6
"""Calls that an error names of a chain, the last one among them. Arbitrary, because: a line or two."""


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
        self._queued: dict[Call, bool] = {}
        """Calls that wait for its lane or for its place, whichever is free first; True when given to the thread."""
        self._cancel: Callable[[], object] | None = None

    def lend(self, cancel: Callable[[], object]) -> None:
        """The thread waits from now on; `cancel` ends that."""
        self._waiting = True
        self._cancel = cancel
        self.call.crossing.waiting[self] = None
        self.loan.resize(1)
        self.call.crossing.workers.begin_to_wait()
        self.call.crossing.changed()

    def take_back(self) -> None:
        """The thread is about to go on."""
        self._waiting = False
        self._cancel = None
        self._queued.clear()  # the thread waits for these no more, and is not to be kept by them
        if self.call.crossing.waiting.pop(self, self) is None:
            self.call.crossing.workers.go_on()
        self.loan.resize(0)
        self._post(None)

    def offer(self, call: Call) -> None:
        """Run `call` in the thread, when it is handed over, if nobody else has claimed it by then."""
        if self._waiting:
            self._queued[call] = False

    def hand_over(self) -> None:
        """The lane has no other thread for what is offered. The thread waits."""
        for call, given in self._queued.items():
            if not given and call.unclaimed:
                self._queued[call] = True
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
        self.call.crossing.workers.go_on()
        with self._lock:
            self._occupied = True
            for _ in range(self._posted):
                self.call.crossing.end_external_work()

    def vacate(self) -> None:
        """It waits again, and is about to take what is in the inbox."""
        self.call.crossing.workers.begin_to_wait()
        with self._lock:
            self._occupied = False
            for _ in range(self._posted):
                self.call.crossing.begin_external_work()

    def forsake(self) -> None:
        """Nobody waits for the call any more: neither does it need what it waits for."""
        if self._cancel is not None:
            self._cancel()


def loans(home: PermitQueue, context: Context) -> tuple[PermitQueue, ...]:
    """What those lend who hold a permit of `home` and wait for what is done in `context`."""
    return tuple(asking.place.loan for asking in asking_calls(context, home) if asking.place is not None)


def lender_of(call: Call) -> Place:
    """Who holds a loan was asked for by the lender."""
    places = (asking.place for asking in asking_calls(call.context) if asking.place is not None)
    return next(place for place in places if place.loan is call.held)


def run_in_place(call: Call, worker: Worker, depth: int) -> None:
    """Run `call` in a thread that waits, or in a further one while that waits. In the thread whose place is lent.

    It has been claimed for this thread.
    """
    call.on_loan = True
    if depth < DEEPEST_STACK or not _ran_in_a_further_thread(call):
        if depth < LAST_RESORT:
            call.place = Place(call)
            call.place.depth = depth + 1
            call.run_claimed(worker)
        else:
            call.error = out_of_threads(call)
            with call.crossing.lock:
                call.crossing.started -= 1
    call.hand_over()


def _ran_in_a_further_thread(call: Call) -> bool:
    workers = call.crossing.workers
    if not workers.take_nowait(spare=True):
        return False
    further = _Further(call)
    try:
        workers.run(further, at_once=True)
    except RuntimeError:  # no thread can be started
        return False
    workers.begin_to_wait()
    further.wait()
    workers.go_on()
    return True


def out_of_threads(call: Call) -> DeadlockError:
    """There is no thread for a call without which others cannot go on."""
    chain = [f"{each.name} in {each.crossing.name!r}" for each in (call, *asking_calls(call.context))]
    if len(chain) > NAMED_IN_A_CHAIN:
        chain[NAMED_IN_A_CHAIN - 1 : -1] = [f"{len(chain) - NAMED_IN_A_CHAIN} more"]
    return DeadlockError(
        f"no thread is left for {call.name}, and threads wait for it: {' <- '.join(chain)}. "
        f"Nest less deeply, or run fewer of these at a time."
    )


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
