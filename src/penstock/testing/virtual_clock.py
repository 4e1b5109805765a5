"""An event loop whose clock jumps: an hour of waiting takes no time, and takes it the same way every time.

Semantics are those of Trio's `MockClock` with `autojump_threshold=0`: while anything can run, time stands still;
when everything waits, time jumps to the next timer. Nothing has to be advanced by hand: a test awaits
`asyncio.sleep` or a deadline like any other program.

**What the loop knows of the world outside it.** Three things can wake a program that waits, besides a timer:

* *A thread.* A `run_in_executor` call, of whatever executor, is external work until its `concurrent.futures.Future`
  is done, even when the awaiting side was cancelled long before. While external work is outstanding, time does not
  jump and the loop waits for real. Other work must be declared with `external_work`: `asyncio.wrap_future` around a
  bare `submit`, a thread of one's own, a process, a portal. A thread that a test holds on purpose (a "hung" call)
  waits at a `ThreadLatch`, which is no work, so that time-outs around it can be tested.
* *A socket whose other end is served by this loop.* Before a jump the selector is polled. On Linux a loopback packet
  is delivered inside the `send`, `connect` or `close` that caused it (measured: 20,000 of 20,000 sends, 2,000 of 2,000
  connects and closes readable at once), so such traffic is always seen first and takes no virtual time. Where the
  kernel is free to deliver later (a busy softirq thread, other systems), `io_grace` gives it some real time.
* *A socket whose other end is somewhere else*: another process, a thread. Its answer takes real time which the loop
  cannot foresee: longer than `io_grace`, and time jumps first. Declare it, `with loop.external_work():`.

A signal handler does not count as something that can wake the program: nobody may ever send the signal.

**When nothing is left that could wake it**, the program has come to its end without finishing. As Go does with "all
goroutines are asleep", the loop then raises `DeadlockError` out of `run_until_complete`.

**Same program, same schedule.** Callbacks run first in, first out; timers of one deadline fire in the order in which
they were set (asyncio's own heap promises nothing there); a timer never fires early, not even by the clock's
resolution. Threads and sets of objects are what remains to break it.

**Threads.** All state belongs to the loop's thread, except the count of external work, which has a lock. The count
goes up at once but down only through `call_soon_threadsafe`: what a thread posted before it finished therefore runs
before time may jump.
"""

import asyncio
import contextlib
import heapq
import itertools
import math
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import Context
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple

from penstock.errors import DeadlockError
from penstock.testing.task_location import locations

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Seconds. Arbitrary, because it only has to look like no other clock: code that compares the loop's time with
# another clock is then wrong by days and not by a little. Fixed, so that even rounding errors repeat; a sum of
# sixteenths, so that sums of short binary fractions are exact.
START = 741_776.0625

# Seconds of real time: the shortest wait that epoll knows.
IO_GRACE = 0.001

# Seconds of real time. Arbitrary, because any answer of another process that takes longer should be declared
# external work; it only has to stay well below the time after which a test runner ends a hung test.
IO_PATIENCE = 5.0

# Iterations without sockets or threads after which the selector is asked even so, for the sake of signals. Arbitrary,
# because a person's Ctrl-C waits for a millisecond, and a system call for each jump was a tenth of a simulation.
UNPOLLED = 64

_Events = list[tuple[selectors.SelectorKey, int]]
_Poll = Callable[[float | None], _Events]


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop in virtual time. See the module's notes for what exactly is promised.

    **Cost**: 8 us of CPU time for a jump with its timer and the task that it wakes, so an hour with 1,000 timers a
    second takes 30 s (Python 3.11, one slow core); while sockets are open, `io_grace` of real time more for each jump.

    Args:
        start: what `time()` says first, in seconds.
        io_grace: real seconds given to open sockets before each jump; 0 polls only.
        io_patience: real seconds to wait for open sockets when there is no timer to jump to.

    Raises:
        DeadlockError: out of `run_until_complete` or `run_forever`, when nothing can ever run again. The loop can
            still be run, to cancel and close.
    """

    if TYPE_CHECKING:  # of asyncio's own, used to keep timers in order; the type stubs do not show them
        _scheduled: list[asyncio.TimerHandle]
        _ready: list[asyncio.Handle]
        _clock_resolution: float

        def _check_thread(self) -> None: ...

    def __init__(self, *, start: float = START, io_grace: float = IO_GRACE, io_patience: float = IO_PATIENCE) -> None:
        self._start = start
        self._now = start
        self._io_grace = io_grace
        self._io_patience = io_patience
        self._timers_set = itertools.count()
        self._external_lock = threading.Lock()
        self._external = 0
        self._default_pool: Executor | None = None
        self._unpolled = 0
        """Iterations in which the selector was not asked."""
        self.iteration_hook: Callable[[], None] | None = None
        """Called on the loop's thread before each iteration, before time may jump. What it raises leaves the loop."""
        self._asking_selector = _AskingSelector(self._next_events)
        super().__init__(self._asking_selector)
        # Everything that the loop watches from birth is its own.
        self._own_descriptors = self._descriptors()
        self._move_to(start)

    def time(self) -> float:
        """Virtual seconds. Only differences mean anything. Any thread."""
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's, except that timers of one deadline fire in the order of these calls."""
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        if self.get_debug():
            self._check_thread()
        timer = _Timer(when, callback, args, self, context)
        timer._sequence = next(self._timers_set)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """As asyncio's, and time stands still until the call has really ended in its executor."""
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        if executor is None:
            executor = self._default_pool
        if executor is None:
            executor = ThreadPoolExecutor(thread_name_prefix="asyncio")
            self.set_default_executor(executor)
        submitted: Any = executor.submit(func, *args)
        if asyncio.isfuture(submitted):
            return submitted  # a lane's, which says itself when its threads are at work
        future = asyncio.wrap_future(submitted, loop=self)
        self._add_external_work(1)
        # After wrap_future has added its own callback: the result is posted to the loop before the work ends.
        submitted.add_done_callback(lambda _: self._end_external_work())
        return future

    def set_default_executor(self, executor: ThreadPoolExecutor) -> None:  # type: ignore[override]
        """As asyncio's."""
        super().set_default_executor(executor)
        self._default_pool = executor

    async def shutdown_default_executor(self, *timeout: float | None) -> None:
        """As asyncio's: waits for threads, hence in real time."""
        with self.external_work():
            await super().shutdown_default_executor(*timeout)

    @contextlib.contextmanager
    def external_work(self) -> Iterator[None]:
        """Time stands still inside: something that the loop does not know is at work and may wake it.

        Any thread. Another thread should enter before the loop has nothing left but to jump: declare the work where
        it is started, not where it runs. Does not block.
        """
        self.begin_external_work()
        try:
            yield
        finally:
            self.end_external_work()

    def begin_external_work(self) -> None:
        """As entering `external_work`, where its beginning and its end are in different places. Any thread."""
        self._add_external_work(1)

    def end_external_work(self) -> None:
        """As leaving `external_work`: takes effect behind whatever this thread has posted to the loop before."""
        self._end_external_work()

    def _add_external_work(self, amount: int) -> None:
        with self._external_lock:
            self._external += amount

    def _end_external_work(self) -> None:
        """Any thread; takes effect in the loop, behind whatever this thread has posted before."""
        # A call may outlive its loop: then nobody counts any more.
        with contextlib.suppress(RuntimeError):
            self.call_soon_threadsafe(self._add_external_work, -1)

    def _next_events(self, poll: _Poll, timeout: float | None) -> _Events:
        """What the loop's wait for I/O is here. `timeout`: 0 something is ready, None no timer is set."""
        if self.iteration_hook is not None:
            self.iteration_hook()
        if self._nobody_else() and self._unpolled < UNPOLLED:
            self._unpolled += 1
            if timeout != 0 and not self._ready:
                self._jump()
            return []
        self._unpolled = 0
        events = poll(0)
        if events or timeout == 0 or self._ready:
            return events
        if self._external:
            return poll(None)
        if self._descriptors() > self._own_descriptors:
            events = poll(self._io_patience if timeout is None else self._io_grace)
        if not events:
            self._jump()
        return events

    def _nobody_else(self) -> bool:
        """Whether nothing outside is known that could wake the loop: what a thread posts is in its queue even so."""
        return not self._external and self._descriptors() == self._own_descriptors

    def _jump(self) -> None:
        if not self._scheduled:
            raise DeadlockError(self._obituary())
        # Not by the timeout that the loop has computed: rounding and its upper bound of a day would miss the deadline.
        self._move_to(max(self._now, self._scheduled[0].when()))

    def _move_to(self, now: float) -> None:
        self._now = now
        # One unit in the last place: the loop fires what is due before `now + resolution`, so all that is due now
        # and nothing else. A fixed resolution would vanish beside a large `now`, and due timers never fire.
        self._clock_resolution = math.ulp(now)

    def _descriptors(self) -> int:
        return len(self._asking_selector.get_map())

    def _obituary(self) -> str:
        watched = self._descriptors() - self._own_descriptors
        silent = f", {watched} sockets or pipes silent for {self._io_patience:g} s of real time" if watched else ""
        return (
            f"nothing can ever run again: no callback is ready, no timer is set, no known thread is at work{silent} "
            f"({self._now - self._start:g} s after the start in virtual time).\n"
            f"{locations(asyncio.all_tasks(self))}\n"
            "If a thread or process that the loop does not know was to wake it: `with loop.external_work():`."
        )


class ThreadLatch:
    """Holds worker threads until a test opens it; virtual time goes on meanwhile.

    The stand-in for a call that hangs. A thread at `wait` is no external work, so time-outs around it run off; with
    `open` it is work again at once, before it has noticed. One-shot: once open it stays open. Leaving its `with`
    opens it, so that a failed test does not leave a thread behind.

        with ThreadLatch(loop) as latch:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(30):
                    await asyncio.to_thread(latch.wait)
    """

    def __init__(self, loop: VirtualClockLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._opened = threading.Event()
        self._held = 0

    @property
    def held(self) -> int:
        """How many threads wait here now. Any thread."""
        return self._held

    def wait(self) -> None:
        """Block until `open`. Only in a thread that counts as external work: an executor's, or a declared one."""
        with self._lock:
            if self._opened.is_set():
                return
            self._held += 1
            self._loop._end_external_work()
        self._opened.wait()

    def open(self) -> None:
        """Let all threads go, those that come later too. Any thread; does not block."""
        with self._lock:
            self._loop._add_external_work(self._held)
            self._held = 0
            self._opened.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()


def run_in_virtual_time(main: Coroutine[Any, Any, T], *, start: float = START) -> T:
    """`asyncio.run` on a `VirtualClockLoop`: blocks until `main` has finished, returns its value or raises its error.

    Raises:
        DeadlockError: nothing could ever run again.
        RuntimeError: the calling thread already runs a loop.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualClockLoop(start=start)) as runner:
        return runner.run(main)


class _Timer(asyncio.TimerHandle):
    """A timer that goes behind those of the same deadline that were set before it."""

    __slots__ = ("_sequence",)

    if TYPE_CHECKING:
        _when: float
        _scheduled: bool
        _sequence: int

    def __lt__(self, other: Any) -> bool:  # only call_at makes timers for this loop
        if self._when == other._when:
            return self._sequence < other._sequence  # type: ignore[no-any-return]
        return self._when < other._when  # type: ignore[no-any-return]


class _AskingSelector(selectors.DefaultSelector):
    """A selector that leaves the decision how long to wait to the loop, which alone knows the clock.

    asyncio calls `select` exactly once in each iteration: that makes it the place for the clock to jump, and needs
    nothing of the loop's private machinery.
    """

    def __init__(self, next_events: Callable[[_Poll, float | None], _Events]) -> None:
        super().__init__()
        self._next_events = next_events
        self._poll = super().select

    def select(self, timeout: float | None = None) -> _Events:
        return self._next_events(self._poll, timeout)
