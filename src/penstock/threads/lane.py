"""A lane: a named view of the worker threads, for one kind of blocking call.

    await lane.call(fn, ...)      loop: the lane's queue, and a thread is summoned if one may come
                                  thread: fn, in the caller's context; then the next in the queue
                                  loop: the call is over -> caller goes on

    lane.submit(fn, ...)          any thread: the same queue; the future is done where fn ran, and no loop is woken

Guarantees: a permit is a thread that goes through the queue. So never more than `limit` calls are at work, however many
callers gave up waiting: a thread that one of them has left is still at it. (Calls that wait for the loop are not at
work; when all do, one that a thread waits for gets a thread beyond the limit, see `_relieve`. Nor is one that waits for
a `WatchedFuture`: while it does, another thread stands in for it, which runs nothing but calls that threads wait for,
the latest first: so there are never more threads than the limit and those that wait.) First in, first out. A
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

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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

STANDSTILL = 1.0
"""Seconds for which all threads of a lane may wait for futures while calls wait for a thread. Arbitrary, because: a
service that takes longer is seldom waited for by all of them, and one thread more for each such second is few."""


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
        self._own = workers is not SHARED
        """Whether the threads are this lane's own: then it makes up for those that wait for the loop, too."""
        self._lock = self.books.lock
        self._queue: OrderedDict[Call, None] = OrderedDict()
        self._wanted: dict[Call, None] = {}
        """Those of them that threads of this lane wait for, or may come to wait for."""
        self._standing = 0
        """Threads that wait for a future, and may be stood in for."""
        self._standing_for_jobs = 0
        """Those of them that wait for a job."""
        self._looks = False
        """Whether a look at whether it stands still is under way. Loop thread only."""
        self._waited: dict[Call, int] = {}
        """How many of them wait for just this call."""
        self._on_idle: Callable[[], object] | None = None
        self._runners = 0
        """Threads that go through the queue: the permits that are taken."""
        self._on_its_way = False
        """A thread has been summoned that has not taken its first call yet."""
        self._no_thread = False
        """The set of threads has said that there is none left; it will tell."""
        self._no_spare = False
        """The same of its spare threads."""
        self._nested: dict[Call, list[Place]] = {}
        """Calls that threads wait for, and the places of this lane that may run them. Loop thread only."""
        self._relief: Call | None = None
        """The last of them that was given a thread beyond the lane's own."""
        self.books.changed = self._look_at_nested
        self._closed: Callable[[Call], Exception] | None = None
        """How calls are refused, once it takes no more."""
        self._door = Door(self._enter)
        self._measured = Measured(self, workers) if limit is None else None
        if self._measured is not None:
            self.books.timed = True
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
        self.queue(call)
        return call

    def queue(self, call: SubmittedCall) -> None:
        """Have a submitted call run. Any thread."""
        if asyncio._get_running_loop() is self._loop:
            self._enter(call)
            return
        call.home = self
        measured = self._measured
        if measured is not None:
            call.asked = self._loop.time()
        nested = call.context.get(asking_call) is not None and waited_for(call.context)
        try:
            with self._lock:
                if self._closed is None:
                    self.asked += 1
                    self._queue[call] = None
                    if nested:
                        self._wanted[call] = None
                    if not self._on_its_way and (nested or self._runners < self.limit):
                        self._summon(nested)
            if self._standing:
                self._look_whether_it_stands_still()
        except RuntimeError as error:  # no thread can be started: it belongs to who waits for the call
            self._drop(call, error)
        except BaseException:  # an interrupt: nobody has its future, and perhaps no thread is on its way for it
            with self._lock:
                self._queue.pop(call, None)
                self._wanted.pop(call, None)
            call.cancel()
            raise
        if self._closed is not None:
            self._drop(call, self._closed(call))
        if measured is not None and self._queue and measured.rests:
            with suppress(RuntimeError):  # the loop is closed: the threads that there are go on with the queue
                self._loop.call_soon_threadsafe(measured.watch)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; see `close`. Any thread. Never waits: the threads are not the lane's."""
        try:
            self._loop.call_soon_threadsafe(self.close)
        except RuntimeError:  # the loop is closed: nobody there is about to look at what is changed
            self.close()

    def close(self) -> None:
        """Take no more calls and refuse those that wait. Never blocks. Closing twice is fine."""
        self.refuse_by(_closed)

    def refuse_by(self, error: Callable[[Call], Exception]) -> None:
        """Take no more calls, and end those that wait with an error. Loop thread; any, where no coroutine calls."""
        with self._lock:
            if self._closed is None:
                self._closed = error
            waiting = list(self._queue)
        for call in waiting:
            self._send_away(call, error(call))
        self._look_whether_idle()

    def cancel_waiting(self) -> None:
        """Cancel the futures of submitted calls that have no thread yet. Any thread."""
        with self._lock:
            waiting = [call for call in self._queue if isinstance(call, SubmittedCall)]
        for call in waiting:
            call.cancel()

    def in_flight(self) -> list[SubmittedCall]:
        """Submitted calls that wait or run, or whose futures are not done yet. Any thread."""
        with self._lock:
            waiting = list(self._queue)
            running = [call for worker in self._workers.threads for call in (worker.call, worker.ended)]
        return [call for call in (*waiting, *running) if isinstance(call, SubmittedCall) and call.home is self]

    def when_idle(self, tell: Callable[[], object]) -> None:
        """Call `tell`, in any thread, whenever no call waits or runs, but for those that nobody waits for."""
        self._on_idle = tell
        self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        if self._on_idle is not None and self.idle:
            self._on_idle()

    @property
    def idle(self) -> bool:
        """Whether no call waits or runs, but for those that nobody waits for any more."""
        with self._lock:
            return not self._queue and self.books.busy <= self.books.abandoned_calls

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
        if self._closed is not None:
            call.refuse(self._closed(call))
            return
        call.home = self
        call.asked = self._loop.time()
        self.asked += 1
        nested = call.context.get(asking_call) is not None and waited_for(call.context)
        if nested:
            self._offer(call)  # before a thread may take it: who ends it is to find that somebody here is to be told
        try:
            with self._lock:
                self._queue[call] = None
                if nested or (self._standing_for_jobs and call.job is not None):
                    self._wanted[call] = None
                if not self._on_its_way and (self._wanted or self._runners < self.limit):
                    self._summon(nested)
        except RuntimeError as error:  # no thread can be started: it belongs to who waits for the call
            self._send_away(call, error)
        if (nested or (self._own and self.books.waiting)) and not call.over:
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
            self._wanted.pop(call, None)

    def _look_at_nested(self) -> None:
        """Something has changed: calls that threads wait for may need another thread than the lane's next one."""
        if self._own and self.books.waiting and self._stands_still:
            self._look_later()
        if not self._nested and not self._wanted:
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
            idle = not self._on_its_way and self.books.busy <= len(self.books.waiting) + self._standing
            if not idle or any(place.has_work for place in self.books.waiting):
                return
            call = next((call for call in (*self._nested, *self._wanted) if call.unclaimed), None)
        if call is None:
            return
        if not self._workers.take_nowait(spare=True):
            if self._workers.all_wait:
                self._send_away(call, out_of_threads(call))
            else:
                self._workers.when_free(self.look_soon, spare=True)
            return
        self._relief = call
        with self._lock:  # no other thread is to come upon it
            self._queue.pop(call, None)
            self._wanted.pop(call, None)
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

    def _drop(self, call: Call, error: Exception) -> None:
        """As `_send_away`, for a call that the loop does not know. Any thread."""
        with self._lock:
            self._queue.pop(call, None)
            self._wanted.pop(call, None)
        if call.claim():
            call.refuse(error)

    # --- threads that wait for a future; any thread ---

    def stand_in(self, wanted: Sequence[Call | None]) -> Callable[[], None]:
        """The thread that calls waits for these calls from now on, None is for a job: another one may run them.

        A job may need any call that a job has made: it, or those whose slot it waits for. What else may be behind it is
        not known: see `_last_resort`.

        What is returned ends that: who stood in for it leaves after the call that it runs. Where it is one call that is
        waited for, it ends with that call already, so that no more functions are at work than the limit.

        Raises:
            DeadlockError: so do all others, and there is no thread left for what it waits for.
        """
        calls = [call for call in wanted if call is not None]
        only = calls[0] if len(wanted) == len(calls) == 1 else None
        for_jobs = len(calls) < len(wanted)
        self._workers.begin_to_wait()
        with self._lock:
            if only is not None and only.finished:
                return self._workers.go_on
            self._standing += 1
            self._standing_for_jobs += for_jobs
            if only is not None:
                self._waited[only] = self._waited.get(only, 0) + 1
            if for_jobs:
                calls += [call for call in self._queue if call.job is not None]
            for call in calls:
                if call in self._queue and (call is only or call not in self._wanted):
                    self._wanted.pop(call, None)  # what one thread waits for comes next; of several, any is right
                    self._wanted[call] = None
            with suppress(RuntimeError):  # no thread can be started: the others go on with the queue
                self._summon()
            stuck = None
            if not self._on_its_way and self._workers.all_wait:
                stuck = next((call for call in calls if call.unclaimed), None)
        go_on = partial(self._stand_in_no_more, only, for_jobs)
        if stuck is not None:
            go_on()
            raise out_of_threads(stuck)
        if self._nested:
            self.look_soon()
        self._look_whether_it_stands_still()
        return go_on

    def _stand_in_no_more(self, only: Call | None, for_jobs: bool) -> None:
        self._workers.go_on()
        with self._lock:
            self._standing_for_jobs -= for_jobs
            if only is None:
                self._standing -= 1
            elif (waiting := self._waited.pop(only, 0)) > 0:
                self._standing -= 1
                if waiting > 1:
                    self._waited[only] = waiting - 1

    @property
    def _stands_still(self) -> bool:
        """Whether calls wait for a thread, all of which wait for futures; or, of threads of its own, for the loop."""
        waiting = self._standing + (len(self.books.waiting) if self._own else 0)
        return bool(self._queue) and not self._on_its_way and 0 < self.books.busy <= waiting

    def _look_whether_it_stands_still(self) -> None:
        with self._lock:
            stands_still = self._stands_still
        if stands_still:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to look
                self._loop.call_soon_threadsafe(self._look_later)

    def _look_later(self) -> None:
        """See to it that it does not stand still for ever. In the loop."""
        if not self._looks:
            self._looks = True
            self._loop.call_later(STANDSTILL, self._last_resort, self.books.started)

    def _last_resort(self, started: int) -> None:
        """What its threads wait for may wait, in ways that nobody can see, for any of the calls in the queue.

        So when nothing has begun for a while, one of them gets a thread; the oldest, as it would from a thread that is
        free. Not at once: a pool whose functions wait for a service would grow by a thread for each call in its queue.
        """
        self._looks = False
        with self._lock:
            if not self._stands_still:
                return
            nothing_began = self.books.started == started
            if nothing_began:
                self._wanted[next(iter(self._queue))] = None
                with suppress(RuntimeError):  # no thread can be started: the next look may be luckier
                    self._summon()
        if nothing_began:
            self._relieve()
        self._look_later()

    def _left(self, call: Call, error: BaseException) -> None:
        """The caller of a call has gone."""
        self._withdraw(call)
        call.leave()
        in_vain = self.in_vain
        if in_vain is not None and not call.abandoned:
            error.add_note(in_vain)
        self.books.tell_once(in_vain, self.limit)
        self._look_whether_idle()
        self._look_at_nested()  # a thread may have been about to run it, for which others were given none

    # --- threads that go through the queue; any thread, with the lock held ---

    def _summon(self, spare: bool = False) -> None:
        """See that a further thread comes, if one may and is needed."""
        if self._on_its_way or not self._queue:
            return
        if self._runners >= self.limit and (self._runners >= self.limit + self._standing or not self._wanted):
            return
        spare = spare or bool(self._wanted)
        if not self._workers.take_nowait(spare=spare):
            if not (self._no_spare if spare else self._no_thread):
                self._no_spare, self._no_thread = self._no_spare or spare, True
                self._workers.when_free(self._thread_is_free, spare=spare)
            return
        runner = _Runner(self)
        try:
            self._runners += 1
            self._on_its_way = not self._workers.starts_slowly
            self.books.begin_external_work()
            self._workers.run(runner)
        except BaseException:  # an interrupt may come when the thread is under way, which waits for the lock
            if not runner.begun and not self._workers.has(runner):
                self._runners -= 1
                self._on_its_way = False
                self.books.end_external_work()
            raise

    def _thread_is_free(self) -> None:
        with self._lock, suppress(RuntimeError):
            self._no_thread = self._no_spare = False
            self._summon()

    def _take(self, *, after_call: bool = False) -> Call | None:
        """The next call, for a thread that is free; None ends it.

        A thread that has done one call leaves when others wait for a thread of the set, or a lane that is never idle
        would keep it from them. Not when calls are queued that threads wait for.
        """
        leave = after_call and self._workers.wanting and not self._nested and not self._wanted
        while self._queue and self._runners <= self.limit and not leave:
            call, _ = self._queue.popitem(last=False)
            if self._wanted:
                self._wanted.pop(call, None)
            if call.claim():
                self.books.started += 1
                if self._queue and not self._on_its_way and (self._runners < self.limit or self._wanted):
                    with suppress(RuntimeError):  # no thread to be had: this one comes back
                        self._summon()
                return call
        if self._wanted and (stood_in_for := self._take_wanted()) is not None:
            return stood_in_for
        self._runners -= 1
        if self._queue:
            with suppress(RuntimeError):
                self._summon()  # behind those others
        return None

    def _take_wanted(self) -> Call | None:
        """The latest call that threads wait for, for one that stands in."""
        while self._wanted and self._runners <= self.limit + self._standing:
            call, _ = self._wanted.popitem()
            self._queue.pop(call, None)
            if call.claim():
                self.books.started += 1
                if self._wanted and not self._on_its_way:
                    with suppress(RuntimeError):  # no thread to be had: this one comes back
                        self._summon()
                return call
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
            self._call.hand_over()
        self._call.crossing.end_external_work()


class _Runner:
    """What a thread does for a lane: one call after the other, until none is left."""

    def __init__(self, lane: Lane) -> None:
        self.begun = False
        """Whether a thread has it."""
        self._lane = lane
        self._last: Call | None = None
        self._worker: Worker | None = None

    def __call__(self, worker: Worker) -> None:
        self.begun = True
        self._worker = worker
        lane, lock, books = self._lane, self._lane._lock, self._lane.books
        with lock:
            lane._on_its_way = False
            worker.call = call = lane._take()
        if lane._nested or (call is None and lane._own and lane.books.waiting):
            lane.look_soon()  # it may have taken another one than those that threads wait for, or none
        while call is not None:
            call.run()
            if call._done_callbacks:  # it is busy until they are through, and no other call is to wait for that
                call.hand_over()
            with lock:
                books.ended += 1  # as `Crossing.count_end`, without the cost of a call
                books.seconds += call.ended - call.began
                call.finished = True
                if lane._waited:
                    lane._standing -= lane._waited.pop(call, 0)
                done, call = call, lane._take(after_call=True)
                worker.ended = done
                worker.call = call  # with the lock: the lane may be idle from here on, and then this thread is
            if call is None:
                self._last = done
            else:
                done.hand_over()  # a second time it only lands, where somebody on the loop waits for that
                worker.ended = None
            del done  # nothing of a call may stay alive while the next one runs

    def land(self) -> None:
        """The last call lands when the thread counts as free: its caller may be about to make the next one."""
        last, self._last = self._last, None  # an error's traceback may know this
        if last is not None:
            last.hand_over()
            assert self._worker is not None, "it has run in one"
            self._worker.ended = None
        self._lane.books.end_external_work()
        self._lane._look_whether_idle()


def _closed(call: Call) -> ClosedError:
    return ClosedError(f"{name_of(call.fn)} was to run in a thread, but its executor has been shut down.")
