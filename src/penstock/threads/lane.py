"""A lane: a named view of the worker threads, for one kind of blocking call.

    await lane.call(fn, ...)      loop: the lane's queue, and a thread is summoned if one may come
                                  thread: fn, in the caller's context; then the next in the queue
                                  loop: the call is over -> caller goes on

Guarantees: a permit is a thread that goes through the queue. So never more than `limit` calls are at work, however many
callers gave up waiting: a thread that one of them has left is still at it. (Calls that wait for the loop are not at
work; when all do, one that a thread waits for gets a thread beyond the limit, see `_relieve`.) First in, first out. A
lane that is closed sends away whoever waits for it; a thread that hangs keeps neither the close nor the interpreter's
exit waiting.

The threads are shared by all lanes of the process (`workers.py`) and never the loop's default executor, which also
resolves DNS and must never be full of our calls.

Without a limit of its own a lane measures: every 50 ms `staffing.py` decides how many calls may run, from how long they
wait, arrive and take. The timer runs only while there is something to decide.

A lane is a real `concurrent.futures.Executor`: `lane.submit(fn)` in any thread gives a `concurrent.futures.Future`, and
`loop.run_in_executor(lane, fn)` works on any loop. `call` is the short way for its own loop. It goes through
`run_in_executor` as well, by a door whose `submit` gives a future of the loop: such a one is handed through as it is,
and needs neither a lock nor a wake-up of its own.

`call`, `close` and `statistics` belong to the loop thread.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from penstock.callables import name_of
from penstock.errors import ClosedError
from penstock.threads.backlog import Backlog
from penstock.threads.call import AbandonedCall, Call, SubmittedCall, asking_call, asking_calls, waited_for
from penstock.threads.crossing import Crossing, Door, enter
from penstock.threads.measured import LEAST_PLACES, Measured
from penstock.threads.place import Place, out_of_threads
from penstock.threads.workers import SHARED, Worker, Workers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """A lane as it was at the time of asking."""

    limit: int
    """Calls that may run at once; of a lane that measures, at this moment."""
    busy: int
    """Calls that have a thread, abandoned ones included."""
    waiting: int
    """Callers that wait for a thread."""
    abandoned: int
    """Calls whose caller stopped waiting and whose thread still runs."""
    abandoned_calls: tuple[AbandonedCall, ...]
    """These calls, the oldest first."""
    calls: int
    """Calls that have got a thread so far."""
    given_up: int
    """Calls so far that were abandoned, whether their thread has ended since or not."""
    never_started: int
    """Calls so far whose caller stopped waiting before they began."""


class Lane(Executor):
    """At most `limit` blocking calls at once; None measures how many.

    With `processing`, calls that pile up hold back the gates of the loop (`backlog.py`).
    """

    def __init__(self, name: str, limit: int | None, *, processing: bool = False, workers: Workers = SHARED) -> None:
        self.limit = LEAST_PLACES if limit is None else limit
        self.books = Crossing(name, workers)
        self.asked = 0
        """Calls so far."""
        self._loop = self.books.loop
        self._workers = workers
        self._lock = self.books.lock
        self._queue: OrderedDict[Call, None] = OrderedDict()
        self._runners = 0
        """Threads that go through the queue: the permits that are taken."""
        self._on_its_way = False
        """A thread has been summoned that has not taken its first call yet."""
        self._no_thread = False
        """The set of threads has said that there is none left; it will tell."""
        self._nested: dict[Call, list[Place]] = {}
        """Calls that threads wait for, and the places of this lane that may run them. Loop thread only."""
        self._relief: Call | None = None
        """The last of them that was given a thread beyond the lane's own."""
        self.books.changed = self._look_at_nested
        self._closed = False
        self._door = Door(self._enter)
        self._measured = Measured(self, workers) if limit is None else None
        if self._measured is not None:
            self.books.recovered = self._measured.watch
        self._backlog = Backlog(self) if processing else None

    async def call(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run `fn(*args, **kwargs)` in a thread of this lane and return its value.

        **Cancellation**: a call that waits for a thread is given up; one that runs is abandoned: the caller goes on at
        once, the thread cannot be stopped and keeps its permit until it ends. Where all permits are held by such
        calls, the `CancelledError` of one that waited in vain carries a note that says so.

        Raises:
            ClosedError: the lane is closed.
            DeadlockError: threads wait for this call, and there is none left for it.
            Exception: what `fn` raised.
        """
        call = Call(self.books, fn, args, kwargs)
        try:
            value: T = await enter(self._loop, self._door, call)
        except BaseException as error:
            if not call.over:
                self._left(call, error)
            raise
        finally:
            if call.job is not None and call.asked:
                call.job.waited += (call.began or self._loop.time()) - call.asked
        return value

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` in a thread of this lane; the standard library's contract. Any thread.

        Never blocks. What waits for a thread is queued without a bound. A lane that is closed, or whose loop is,
        refuses by `ClosedError`, raised here or set as the future's error.
        """
        call = SubmittedCall(self.books, fn, args, kwargs)
        future: Future[T] | None = call.future
        assert future is not None, "only a call that is over has forgotten it"
        try:
            self._loop.call_soon_threadsafe(self._enter, call)
        except RuntimeError as error:
            raise _closed(call) from error
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; see `close`. Any thread. Never waits: the threads are not the lane's."""
        with suppress(RuntimeError):  # the loop is closed: so is the lane
            self._loop.call_soon_threadsafe(self.close)

    def close(self) -> None:
        """Take no more calls and refuse those that wait. Never blocks. Closing twice is fine."""
        self._closed = True
        with self._lock:
            waiting = list(self._queue)
        for call in waiting:
            self._send_away(call, _closed(call))

    @property
    def waiting(self) -> int:
        """Calls that wait for a thread."""
        return len(self._queue)

    @property
    def abandoned(self) -> tuple[AbandonedCall, ...]:
        """Calls that run though nobody waits for them, the oldest first."""
        return self.books.abandoned()

    @property
    def in_vain(self) -> str | None:
        """Why calls wait in vain, when all permits are held by calls that are abandoned."""
        return self.books.in_vain(self, self.limit)

    def oldest_wait(self, now: float) -> float:
        """Seconds that the next call has waited; 0 when none does."""
        with self._lock:
            first = next(iter(self._queue), None)
        return 0.0 if first is None else now - first.asked

    def resize(self, limit: int) -> None:
        """Change the number of calls that may run at once. More than a smaller number end as their calls do."""
        with self._lock, suppress(RuntimeError):  # no thread to be had: the next call tries again
            self.limit = limit
            self._summon()

    def statistics(self) -> LaneStatistics:
        """How busy the lane is."""
        books, abandoned = self.books, self.abandoned
        return LaneStatistics(
            limit=self.limit,
            busy=books.busy,
            waiting=self.waiting,
            abandoned=len(abandoned),
            abandoned_calls=abandoned,
            calls=books.started,
            given_up=books.given_up,
            never_started=books.never_started,
        )

    # --- the way in; loop thread ---

    def _enter(self, call: Call) -> None:
        """Queue the call, and see that a thread comes."""
        if self._closed:
            call.refuse(_closed(call))
            return
        call.home = self
        call.asked = self._loop.time()
        self.asked += 1
        nested = call.context.get(asking_call) is not None and waited_for(call.context)
        try:
            with self._lock:
                self._queue[call] = None
                if not self._on_its_way and self._runners < self.limit:
                    self._summon(nested)
        except RuntimeError as error:  # no thread can be started: it belongs to who waits for the call
            self._send_away(call, error)
        if nested and not call.over:
            self._offer(call)
            self._look_at_nested()
        if self._measured is not None:
            self._measured.watch()
        if self._backlog is not None and self._queue:
            self._backlog.watch()

    def _offer(self, call: Call) -> None:
        """A thread waits for this call: it may run on the place of whoever waits, and must not wait for a thread."""
        places = [asking.place for asking in asking_calls(call.context, self) if asking.place is not None]
        for place in places:
            place.offer(call)
        self._nested[call] = places
        call.give_back = lambda: self._withdraw(call)

    def _withdraw(self, call: Call) -> None:
        """It is over: it may have run on one of the places, and wait still elsewhere."""
        for place in self._nested.pop(call, ()):
            place.withdraw(call)
        with self._lock:
            self._queue.pop(call, None)

    def _look_at_nested(self) -> None:
        """Something has changed: calls that threads wait for may need another thread than the lane's next one."""
        if not self._nested:
            return
        with self._lock:
            full = self._no_thread or (self._runners >= self.limit and not self._on_its_way)
        if full:
            for place in self.books.waiting:
                place.hand_over()
            self._relieve()

    def look_soon(self) -> None:
        """Look at the calls that threads wait for, on the loop. Any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._look_at_nested)

    def _relieve(self) -> None:
        """When all threads of this lane wait for the loop, give a further one to a call that threads wait for.

        Chains over two lanes in opposite directions would wait for each other otherwise: each thread has the place
        that the other one's call needs, and is not the one that waits for it.
        """
        if self._relief is not None and self._relief.unclaimed:
            return
        with self._lock:
            idle = not self._on_its_way and self.books.busy <= len(self.books.waiting)
            if not idle or any(place.has_work for place in self.books.waiting):
                return
            call = next((call for call in self._nested if call.unclaimed), None)
        if call is None:
            return
        if not self._workers.take_nowait(spare=True):
            if self._workers.all_wait:
                self._send_away(call, out_of_threads(call))
            else:
                self._workers.when_free(self.look_soon, spare=True)
            return
        self._relief = call
        self.books.begin_external_work()
        try:
            self._workers.run(_Relief(call), at_once=True)
        except RuntimeError as error:  # no thread can be started: it belongs to who waits for the call
            self.books.end_external_work()
            self._send_away(call, error)

    def _send_away(self, call: Call, error: Exception) -> None:
        self._withdraw(call)
        if call.claim():
            call.refuse(error)

    def _left(self, call: Call, error: BaseException) -> None:
        """The caller of a call has gone."""
        self._withdraw(call)
        call.leave()
        in_vain = self.in_vain
        if in_vain is not None and not call.abandoned:
            error.add_note(in_vain)
        self.books.tell_once(in_vain, self.limit)
        self._look_at_nested()  # a thread may have been about to run it, for which others were given none

    # --- threads that go through the queue; any thread, with the lock held ---

    def _summon(self, spare: bool = False) -> None:
        """See that a further thread comes, if one may and is needed."""
        if self._on_its_way or self._runners >= self.limit or not self._queue:
            return
        if not self._workers.take_nowait(spare=spare):
            if not self._no_thread:
                self._no_thread = True
                self._workers.when_free(self._thread_is_free)
            return
        self._runners += 1
        self._on_its_way = True
        self.books.begin_external_work()
        try:
            self._workers.run(_Runner(self))
        except Exception:  # and not an interrupt, which may come when the thread is under way
            self._runners -= 1
            self._on_its_way = False
            self.books.end_external_work()
            raise

    def _thread_is_free(self) -> None:
        with self._lock, suppress(RuntimeError):
            self._no_thread = False
            self._summon()

    def _take(self, *, after_call: bool = False) -> Call | None:
        """The next call, for a thread that is free; None ends it.

        A thread that has done one call leaves when others wait for a thread of the set, or a lane that is never idle
        would keep it from them. Not when calls are queued that threads wait for.
        """
        leave = after_call and self._workers.wanted and not self._nested
        while self._queue and self._runners <= self.limit and not leave:
            call, _ = self._queue.popitem(last=False)
            if call.claim():
                self.books.started += 1
                if self._queue and not self._on_its_way and self._runners < self.limit:
                    with suppress(RuntimeError):  # no thread to be had: this one comes back
                        self._summon()
                return call
        self._runners -= 1
        if self._queue:
            with suppress(RuntimeError):
                self._summon()  # behind those others
        return None


class _Relief:
    """One call in a thread beyond the lane's own, which all wait."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._claimed = False

    def __call__(self, worker: Worker) -> None:
        self._claimed = self._call.claim_for_thread()
        if self._claimed:
            self._call.on_loan = True
            self._call.run_claimed(worker)

    def land(self) -> None:
        if self._claimed:
            self._call.crossing.land(self._call)
        self._call.crossing.end_external_work()


class _Runner:
    """What a thread does for a lane: one call after the other, until none is left."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._last: Call | None = None

    def __call__(self, worker: Worker) -> None:
        lane, lock = self._lane, self._lane._lock
        with lock:
            lane._on_its_way = False
            call = lane._take()
        if lane._nested and call is not None:  # it may have taken another one than those that threads wait for
            lane.look_soon()
        while call is not None:
            worker.call = call
            call.run()
            with lock:
                lane.books.count_end(call)
                done, call = call, lane._take(after_call=True)
            if call is None:
                self._last = done
            else:
                lane.books.land(done)
            del done  # nothing of a call may stay alive while the next one runs
        worker.call = None

    def land(self) -> None:
        """The last call lands when the thread counts as free: its caller may be about to make the next one."""
        if self._last is not None:
            self._lane.books.land(self._last)
        self._lane.books.end_external_work()


def _closed(call: Call) -> ClosedError:
    return ClosedError(f"{name_of(call.fn)} was to run in a thread, but its executor has been shut down.")
