"""Blocking calls through a gate: permit and thread in one step, and both back when the thread has really ended."""

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from penstock import AttemptTimeout, Executor, FailureKind, Gate, HttpStatusError, Retry, UsageError
from penstock.callables import name_of
from penstock.gate.in_thread import CallInThread
from penstock.gate.service import KeyStatistics
from penstock.testing import ThreadLatch, VirtualClockLoop, cancel_at_every_step
from penstock.threads.lane import Lane
from penstock.threads.workers import Worker, Workers

pytestmark = pytest.mark.virtual_clock

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

HOUR = 3600.0


def now() -> float:
    return asyncio.get_running_loop().time()


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


def throttled(retry_after: float) -> HttpStatusError:
    return HttpStatusError(429, "GET", "http://h/", b"", retry_after)


class Blocking:
    """A gate for blocking calls, with threads of its own."""

    def __init__(self, limit: int = 1, threads: int = 8, workers: Workers | None = None, **options: Any) -> None:
        self.gate = Gate("g", limit=limit, **options)
        self.workers = Workers(threads, idle_timeout=0.01) if workers is None else workers

    async def call(self, fn: Callable[..., Any], *args: Any, key: str | None = None) -> Any:
        return await self.gate.perform(self.trip(fn, *args, key=key), key)

    @property
    def seen(self) -> KeyStatistics:
        return self.gate.statistics()[None]

    def trip(self, fn: Callable[..., Any], *args: Any, key: str | None = None, classify: Any = None) -> CallInThread:
        crossing = self.gate.crossing(self.workers)
        return CallInThread(crossing, self.gate.service(key), name_of(fn), fn, args, {}, classify)

    @property
    def clean(self) -> bool:
        """Nobody is in flight or waiting, no call is abandoned, and no thread is promised."""
        keys = self.gate.statistics().values()
        return self.workers._promised == 0 and all(
            (seen.in_flight, seen.waiting, seen.abandoned_calls) == (0, 0, ()) for seen in keys
        )


class Hanging:
    """A blocking function that hangs for the first so many calls, and counts the threads inside."""

    def __init__(self, latch: ThreadLatch, calls: int) -> None:
        self._latch = latch
        self._hang = calls
        self._lock = threading.Lock()
        self.inside = self.most = 0

    def __call__(self) -> str:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._hang -= 1
            hang = self._hang >= 0
        if hang:
            self._latch.wait()
        with self._lock:
            self.inside -= 1
        return "through"


async def start(call: Callable[[], Any]) -> "asyncio.Task[Any]":
    """A task that has come as far as it comes at once."""
    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    return task


async def settle() -> None:
    """Threads are through with what they can do."""
    await asyncio.sleep(0.001)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "penstock.threads"]


# --- permit and thread, in one step ---


async def test_who_gets_no_thread_holds_no_permit_and_those_behind_wait_for_their_turn() -> None:
    """One queue: an async call that came later starts later, though it needs no thread."""
    blocking = Blocking(limit=4, threads=1)

    async def on_the_loop() -> int:
        return blocking.seen.attempts

    with ThreadLatch(virtual_loop()) as latch:
        holder = await start(lambda: blocking.call(latch.wait))
        waiting = await start(lambda: blocking.call(lambda: "through"))
        behind = await start(lambda: blocking.gate.call(on_the_loop))
        await asyncio.sleep(30)
        assert (blocking.seen.in_flight, blocking.seen.waiting, blocking.seen.attempts) == (1, 2, 1)
        latch.open()
        await holder
        assert (await waiting, await behind) == ("through", 3)
    assert blocking.clean


async def test_those_behind_go_on_at_once_when_who_waits_for_a_thread_gives_up() -> None:
    """The permits were free all the time."""
    blocking = Blocking(limit=4, threads=1)
    with ThreadLatch(virtual_loop()) as latch:
        holder = await start(lambda: blocking.call(latch.wait))
        waiting = await start(lambda: blocking.call(int))
        behind = await start(lambda: blocking.gate.call(asyncio.sleep, 0, "slept"))
        waiting.cancel()
        assert await behind == "slept"
        assert (blocking.seen.in_flight, blocking.seen.waiting) == (1, 0)
    await holder
    assert blocking.clean


async def test_threads_go_from_one_gate_to_the_other_in_the_order_of_asking() -> None:
    """Three gates share one thread: whoever asked first gets it first, and nobody is forgotten."""
    workers = Workers(1, idle_timeout=0.01)
    order: list[tuple[int, int]] = []
    gates = [Blocking(limit=4, workers=workers) for _ in range(3)]
    with ThreadLatch(virtual_loop()) as latch:
        tasks = [await start(lambda: gates[0].call(latch.wait))]
        for turn in range(2):
            for number, gate in enumerate(gates):
                tasks.append(await start(partial(gate.call, order.append, (turn, number))))
        latch.open()
        await asyncio.gather(*tasks)
    assert sorted(order) == [(turn, number) for turn in range(2) for number in range(3)]
    assert order[0] == (0, 0)
    assert all(gate.clean for gate in gates)


async def test_waiters_that_give_up_again_and_again_leave_nothing_with_the_threads() -> None:
    """While all threads hang, a gate is told once when one is free, however many callers have come and gone."""
    blocking = Blocking(limit=4, threads=1)
    with ThreadLatch(virtual_loop()) as latch:
        holder = await start(lambda: blocking.call(latch.wait))
        for _ in range(100):
            waiting = await start(lambda: blocking.call(int))
            waiting.cancel()
            await asyncio.wait([waiting])
        assert len(blocking.workers.wanting) <= 1
        waiting = await start(lambda: blocking.call(int))
        latch.open()
        assert await waiting == 0
    await holder
    assert blocking.clean


async def test_a_thread_that_is_free_at_once_is_used_at_once() -> None:
    """No time goes by between asking and working: the call is in its thread within the same turn of the loop."""
    blocking, started = Blocking(limit=2), now()
    assert await blocking.call(divmod, 7, 2) == (3, 1)
    assert now() == started
    assert blocking.seen.latency.count == 1


async def test_a_call_fails_alone_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permit and promise are back, and it does not start later on."""
    blocking = Blocking()
    ran: list[int] = []

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await blocking.call(ran.append, 1)
    await blocking.call(ran.append, 2)
    assert ran == [2]
    assert blocking.clean


async def test_a_call_that_is_cancelled_before_its_thread_takes_it_never_starts() -> None:
    """It has its permit, which comes back when the thread has seen that nobody wants the call any more."""
    blocking = Blocking()
    ran: list[int] = []
    with blocking.workers._lock:  # no thread can look for work meanwhile
        call = await start(lambda: blocking.call(ran.append, 1))
        assert blocking.seen.in_flight == 1
        call.cancel()
        await asyncio.wait([call])
        assert blocking.seen.in_flight == 1
        assert blocking.seen.abandoned_calls == ()
    await settle()
    assert ran == []
    assert blocking.clean


async def test_an_attempt_that_could_only_start_too_late_gives_its_thread_back() -> None:
    """A loop that lags may find both free after the end of the call's time."""
    blocking = Blocking(retry=Retry(timeout=5))
    trip, service = blocking.trip(int), blocking.gate.service(None)
    with pytest.raises(AttemptTimeout, match="int: the attempt could not start in time"):
        await blocking.gate.begin(trip, service, asked=service.now() - 6)
    assert blocking.clean


async def test_context_variables_go_in_and_do_not_come_out() -> None:
    """Each attempt has a copy."""
    variable = contextvars.ContextVar("variable", default="none")
    blocking, seen = Blocking(retry=Retry(wait=0)), []

    def exchange() -> None:
        seen.append(variable.get())
        variable.set("set in the thread")
        if len(seen) == 1:
            raise ConnectionError

    variable.set("set by the caller")
    await blocking.call(exchange)
    assert seen == ["set by the caller"] * 2
    assert variable.get() == "set by the caller"


# --- what it returns and raises ---


@pytest.mark.parametrize("error", [StopIteration(1), SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_what_would_end_more_than_the_call_comes_back_as_an_error(error: BaseException) -> None:
    """A bug, and so never retried."""
    blocking, calls = Blocking(retry=Retry(wait=0)), []

    def leave() -> None:
        calls.append(1)
        raise error

    with pytest.raises(UsageError, match=f"leave raised {type(error).__name__}") as caught:
        await blocking.call(leave)
    assert caught.value.__cause__ is error
    assert len(calls) == 1
    assert blocking.clean


async def test_a_coroutine_that_a_plain_function_returns_is_refused() -> None:
    """Nobody would await it; and it leaves no warning behind."""
    blocking = Blocking()

    def forgets() -> Any:
        return asyncio.sleep(1)

    with pytest.raises(UsageError, match="forgets returned a coroutine .*sleep.* that nobody awaits"):
        await blocking.call(forgets)
    assert blocking.seen.failed == {FailureKind.BUG: 1}
    assert blocking.clean


async def test_what_classify_says_of_an_error_decides_and_stays_with_it() -> None:
    """As its `failure_kind`, in the statistics and for the policy; None leaves the error as it was."""
    blocking, busy = Blocking(retry=Retry(attempts=3, wait=0)), ValueError("busy")
    attempts: list[Exception] = []

    def fail() -> None:
        attempts.append(busy)
        raise busy

    with pytest.raises(ValueError) as caught:
        await blocking.gate.perform(blocking.trip(fail, classify=lambda _: FailureKind.THROTTLED))
    assert caught.value is busy
    assert busy.failure_kind is FailureKind.THROTTLED  # type: ignore[attr-defined]
    assert (len(attempts), blocking.seen.failed) == (3, {FailureKind.THROTTLED: 3})
    with pytest.raises(ZeroDivisionError) as unknown:
        await blocking.gate.perform(blocking.trip(divmod, 1, 0, classify=lambda _: None))
    assert not hasattr(unknown.value, "failure_kind")


async def test_an_error_of_classify_is_raised_with_the_error_that_it_was_asked_about() -> None:
    """It is the user's code too; the permit is back."""
    blocking = Blocking()

    def broken(_error: Exception) -> FailureKind:
        raise KeyError("in classify")

    with pytest.raises(KeyError, match="in classify") as caught:
        await blocking.gate.perform(blocking.trip(divmod, 1, 0, classify=broken))
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert blocking.clean


async def test_a_call_that_is_over_holds_nothing_of_its_data() -> None:
    """Neither its arguments nor its error, once the caller has dropped them; an idle thread holds them neither."""

    class Data:
        pass

    def fail(_data: Data) -> None:
        raise ValueError

    async def lost(blocking: Blocking, fn: Callable[[Data], object]) -> weakref.ref[Data]:
        data = Data()
        with suppress(ValueError):
            await blocking.call(fn, data)
        await settle()
        return weakref.ref(data)

    gc.disable()
    try:
        for fn in (fail, id):
            assert (await lost(Blocking(retry=Retry(attempts=2, wait=0, on=ValueError)), fn))() is None
    finally:
        gc.enable()


async def test_a_pause_is_noted_before_the_permit_goes_back() -> None:
    """Those who are in line do not slip through between the refusal and the pause it asks for."""
    blocking, started = Blocking(retry=Retry(attempts=2, wait=0)), now()
    errors: list[Exception] = [throttled(10)]
    calls: list[float] = []

    def work() -> None:
        calls.append(now_in_thread())
        if errors:
            raise errors.pop()

    now_in_thread = virtual_loop().time
    await asyncio.gather(*[blocking.call(work) for _ in range(5)])
    assert calls[0] == started
    assert len(calls) == 6
    assert all(10 <= at - started <= 11 for at in calls[1:])


# --- time; abandoned calls ---


async def test_the_time_of_an_attempt_starts_when_it_has_its_thread() -> None:
    """The wait for it does not count, although a permit was free all the time."""
    blocking = Blocking(limit=4, threads=1, timeout=2, retry=Retry(attempts=1))
    other = Blocking(workers=blocking.workers)
    with ThreadLatch(virtual_loop()) as latch:
        holder = await start(lambda: other.call(latch.wait))
        waiting = await start(lambda: blocking.call(lambda: "in time"))
        await asyncio.sleep(10)
        latch.open()
        assert await waiting == "in time"
        await holder
    assert blocking.seen.latency.max == 0


async def test_an_attempt_that_takes_too_long_keeps_its_permit_and_the_next_one_takes_another() -> None:
    """The thread cannot be stopped. It is to be seen, with the name of its function, its job and its age."""
    blocking = Blocking(limit=2, timeout=2, retry=Retry(attempts=2, wait=1))

    async def job(_item: int) -> str:
        value: str = await blocking.call(hanging)
        return value

    with ThreadLatch(virtual_loop()) as latch:
        hanging, started = Hanging(latch, calls=1), now()
        async with Executor() as executor:
            (outcome,) = await executor.as_completed(job, [1], key=lambda item: f"record {item}")
        assert (outcome.value, outcome.attempts, now() - started) == ("through", 2, 3)
        assert blocking.seen.in_flight == 1
        (call,) = blocking.seen.abandoned_calls
        assert (call.name, call.job, call.age) == (
            "Hanging",
            "<job test_an_attempt_that_takes_too_long_keeps_its_"
            "permit_and_the_next_one_takes_another.<locals>.job key='record 1'>",
            3,
        )
        assert str(call) == "Hanging (3.0 s)"
        latch.open()
    await settle()
    assert blocking.clean


async def test_never_more_threads_than_the_limit_however_many_calls_are_timed_out() -> None:
    """Thirty callers with two attempts each: three get a thread, the others wait until their time is over."""
    blocking = Blocking(limit=3, threads=64, timeout=2, retry=Retry(attempts=2, wait=1, timeout=20))
    with ThreadLatch(virtual_loop()) as latch:
        hanging = Hanging(latch, calls=1_000)
        errors = await asyncio.gather(*[blocking.call(hanging) for _ in range(30)], return_exceptions=True)
        assert {type(error) for error in errors} == {AttemptTimeout}
        assert (hanging.inside, hanging.most, blocking.workers._promised) == (3, 3, 3)
        assert (blocking.seen.in_flight, blocking.seen.waiting, len(blocking.seen.abandoned_calls)) == (3, 0, 3)
        latch.open()
        assert await asyncio.gather(*[blocking.call(hanging) for _ in range(3)]) == ["through"] * 3
    await settle()
    assert hanging.most == 3
    assert blocking.clean


async def test_a_cancelled_call_is_abandoned_too() -> None:
    """The caller goes on at once; those who wait get the permit when the thread has ended."""
    blocking = Blocking()
    with ThreadLatch(virtual_loop()) as latch:
        call = await start(lambda: blocking.call(latch.wait))
        await settle()
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        waiting = await start(lambda: blocking.call(int))
        await asyncio.sleep(30)
        assert not waiting.done()
        latch.open()
        assert await waiting == 0
    assert blocking.clean


async def test_an_abandoned_call_that_fails_bothers_nobody() -> None:
    """No log record of an exception that was never retrieved."""
    blocking = Blocking(timeout=1, retry=Retry(attempts=1))

    def fail() -> None:
        latch.wait()
        raise ValueError

    with ThreadLatch(virtual_loop()) as latch:
        with pytest.raises(AttemptTimeout):
            await blocking.call(fail)
    await settle()
    assert blocking.clean


IN_VAIN = "the one thread of 'g' is held by a call that nobody waits for any more"


async def abandon_all(blocking: Blocking, latch: ThreadLatch) -> None:
    """All permits are held by calls that hang."""
    call = await start(lambda: blocking.call(latch.wait))
    await settle()
    call.cancel()
    await asyncio.wait([call])


async def test_who_waits_in_vain_is_told_so_when_the_time_of_all_attempts_is_over() -> None:
    """With the calls that hold the permits, and their age."""
    blocking = Blocking(retry=Retry(timeout=5))
    with ThreadLatch(virtual_loop()) as latch:
        await abandon_all(blocking, latch)
        with pytest.raises(AttemptTimeout) as caught:
            await blocking.call(int)
    assert str(caught.value) == (f"int: got no permit of gate 'g' in 5 s: {IN_VAIN}: ThreadLatch.wait (5.0 s)")
    await settle()


async def test_who_waits_in_vain_is_told_so_when_the_job_is_timed_out() -> None:
    """By the `timeout=` of the stream: the job's error names the calls that hold the permits."""
    blocking = Blocking()

    async def job(_item: int) -> None:
        await blocking.call(int)

    with ThreadLatch(virtual_loop()) as latch:
        await abandon_all(blocking, latch)
        async with Executor() as executor:
            (outcome,) = await executor.as_completed(job, [1], timeout=3)
    assert f"did not end within 3 s: {IN_VAIN}: ThreadLatch.wait (3.0 s)" in str(outcome.error)
    await settle()


async def test_who_waits_in_vain_and_is_cancelled_finds_a_note() -> None:
    """A time limit of one's own shows it, too, since its `TimeoutError` has the cancellation as its cause."""
    blocking = Blocking()
    with ThreadLatch(virtual_loop()) as latch:
        await abandon_all(blocking, latch)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(7):
                await blocking.call(int)
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__notes__ == [f"{IN_VAIN}: ThreadLatch.wait (7.0 s)"]
    await settle()


async def test_one_that_is_cancelled_while_permits_come_back_finds_no_note() -> None:
    """One of two hangs; the other one comes back."""
    blocking = Blocking(limit=2)
    with ThreadLatch(virtual_loop()) as latch, ThreadLatch(virtual_loop()) as other:
        await abandon_all(blocking, latch)
        busy = await start(lambda: blocking.call(other.wait))
        waiting = await start(lambda: blocking.call(int))
        waiting.cancel()
        await asyncio.wait([waiting])
        with pytest.raises(asyncio.CancelledError) as caught:
            await waiting
        assert not hasattr(caught.value, "__notes__")
    await busy
    await settle()


async def test_calls_of_one_key_hold_nothing_of_another() -> None:
    """Neither permits nor in the messages."""
    blocking = Blocking(retry=Retry(timeout=5))
    with ThreadLatch(virtual_loop()) as latch:
        await abandon_all(blocking, latch)
        assert await blocking.call(int, key="other") == 0
        async with blocking.gate.permit(key="other"):
            with pytest.raises(AttemptTimeout, match=r"int: got no permit of gate 'g' in 5 s\n"):
                await blocking.call(int, key="other")
        seen = blocking.gate.statistics()
        assert (len(seen[None].abandoned_calls), len(seen["other"].abandoned_calls)) == (1, 0)
    await settle()


async def test_that_all_permits_are_held_in_vain_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many callers find it so; and again after one has come back and it happens anew."""
    blocking = Blocking(limit=2, timeout=1, retry=Retry(attempts=3, wait=1, timeout=10))

    async def all_hang(latch: ThreadLatch) -> None:
        await asyncio.gather(*[blocking.call(latch.wait) for _ in range(6)], return_exceptions=True)

    for times in (1, 2):
        with ThreadLatch(virtual_loop()) as latch:
            await all_hang(latch)
            told = warnings(caplog)
            assert len(told) == times
            assert told[-1].startswith("all 2 threads of 'g' are held by calls that nobody waits for any more: ")
            assert "ThreadLatch.wait (1.0 s), ThreadLatch.wait (1.0 s)" in told[-1]
        await settle()
        assert blocking.clean


# --- thread -> loop -> same gate ---


async def test_a_nested_call_runs_on_the_permit_of_the_call_that_waits_for_it() -> None:
    """To any depth, through a limit of one, with attempts that fail on the way: it would wait for itself otherwise."""
    blocking = Blocking(retry=Retry(attempts=2, wait=1))
    failing = set(range(0, 20, 3))
    threads: dict[int, threading.Thread] = {}

    def step(depth: int) -> int:
        threads[depth] = threading.current_thread()
        if depth == 20:
            assert len(set(threads.values())) == 3, "eight calls on the stack of each"
        below = executor.from_thread(go_down, depth + 1) if depth < 20 else 0
        if depth in failing:
            failing.remove(depth)
            raise ConnectionError
        return below + 1

    async def go_down(depth: int) -> int:
        value: int = await blocking.call(step, depth)
        return value

    async with Executor() as executor:
        assert await executor.submit(go_down, 0) == 21
    assert blocking.seen.retries == 7
    assert blocking.clean


async def test_two_nested_calls_take_turns_on_the_one_permit() -> None:
    """What the waiting thread lends is one permit, not one for each."""
    blocking, crowd = Blocking(), threading.BoundedSemaphore(1)

    def inner(number: int) -> int:
        assert crowd.acquire(blocking=False)
        crowd.release()
        return number

    async def both() -> list[int]:
        return list(await asyncio.gather(*[blocking.call(inner, number) for number in range(4)]))

    async with Executor() as executor:
        assert await blocking.call(executor.from_thread, both) == [0, 1, 2, 3]
    assert blocking.clean


async def test_a_nested_call_takes_a_free_permit_if_there_is_one() -> None:
    """Then it runs in a thread of its own, beside the one that waits."""
    blocking, names = Blocking(limit=2), []

    def inner() -> None:
        names.append(threading.current_thread())

    def outer() -> None:
        names.append(threading.current_thread())
        executor.from_thread(blocking.call, inner)

    async with Executor() as executor:
        await blocking.call(outer)
    assert names[0] is not names[1]
    assert all(isinstance(thread, Worker) for thread in names)
    assert blocking.clean


async def test_a_permit_that_was_lent_and_is_needed_again_is_not_used() -> None:
    """The thread goes on in the very turn in which its permit was promised to the next one: that one waits again."""
    on_the_way: list[asyncio.Task[Any]] = []
    refused = asyncio.get_running_loop().create_future()

    def end_the_wait(_error: BaseException) -> bool:
        refused.set_result(None)  # the thread's wait ends in this turn, before the permit has its next owner
        return False

    blocking = Blocking(retry=Retry(on=end_the_wait))

    def fail() -> None:
        raise ConnectionError

    async def ask() -> None:
        for fn in (fail, lambda: "late, and yet served"):
            on_the_way.append(await start(partial(blocking.call, fn)))
        await refused

    async with Executor() as executor:
        await blocking.call(executor.from_thread, ask)
        async with asyncio.timeout(HOUR):
            assert await on_the_way[1] == "late, and yet served"
    with pytest.raises(ConnectionError):
        await on_the_way[0]
    assert blocking.clean


async def test_a_nested_call_of_an_abandoned_one_is_cancelled() -> None:
    """Nobody waits for it either: permit and thread come back."""
    blocking, ended = Blocking(timeout=2, retry=Retry(attempts=1)), []

    async def slow() -> None:
        try:
            await asyncio.sleep(HOUR)
        finally:
            ended.append(now())

    started = now()
    async with Executor() as executor:
        with pytest.raises(AttemptTimeout):
            await blocking.call(executor.from_thread, slow)
        await settle()
    assert ended == [started + 2]
    assert blocking.clean


@pytest.mark.parametrize("spare", [1, 64])
async def test_calls_that_threads_wait_for_get_a_thread_though_these_threads_have_them_all(
    spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spare one, and before a call that nobody in a thread waits for: else all of them would wait for ever."""
    monkeypatch.setattr("penstock.threads.workers.SPARE_THREADS", spare)
    blocking = Blocking(limit=8, threads=4)
    lane = Lane("outer", 4, workers=blocking.workers)
    meeting = threading.Barrier(4, timeout=BOUND)

    def outer() -> int:
        meeting.wait()
        value: int = executor.from_thread(blocking.call, int)
        return value

    async with Executor() as executor:
        nested = [asyncio.ensure_future(lane.call(outer)) for _ in range(4)]
        while blocking.workers.take_nowait():  # until the lane has them all
            blocking.workers.give_back()
            await asyncio.sleep(0)
        plain = await start(lambda: blocking.call(lambda: "plain"))
        async with asyncio.timeout(1):
            assert await asyncio.gather(*nested) == [0] * 4
            assert await plain == "plain"
    lane.close()
    await settle()
    assert blocking.clean


# --- cancellation, at every step ---


def is_clean(blocking: Blocking) -> bool:
    blocking.workers.dismiss()
    return blocking.clean


def options() -> Blocking:
    return Blocking(limit=2, threads=2, timeout=5, retry=Retry(attempts=3, wait=1, timeout=60))


def test_a_cancelled_call_leaves_nothing_behind_at_any_step() -> None:
    """Contention for permits and threads, failures, back-off, throttling with its pause."""

    class Failing:
        def __init__(self, *errors: Exception) -> None:
            self._errors = list(errors)

        def __call__(self) -> None:
            if self._errors:
                raise self._errors.pop()

    async def scenario(blocking: Blocking) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(blocking.call(Failing(ConnectionError())))
            group.create_task(blocking.call(Failing(throttled(2))))
            group.create_task(blocking.gate.call(asyncio.sleep, 1))
            for _ in range(3):
                group.create_task(blocking.call(int))

    assert cancel_at_every_step(scenario, arrange=options, check=is_clean) >= 5


def test_a_cancelled_call_that_takes_too_long_leaves_nothing_behind_at_any_step() -> None:
    """Time-outs of hanging calls, and waiting in vain; the latch opens when the scenario is over."""

    async def scenario(blocking: Blocking) -> None:
        with ThreadLatch(virtual_loop()) as latch:
            await asyncio.gather(*[blocking.call(latch.wait) for _ in range(4)], return_exceptions=True)

    assert cancel_at_every_step(scenario, arrange=options, check=is_clean) >= 5


def test_a_cancelled_nested_call_leaves_nothing_behind_at_any_step() -> None:
    """Thread -> loop -> same gate -> thread, with an attempt that fails."""

    def arrange() -> Blocking:
        return Blocking(retry=Retry(attempts=2, wait=1))

    async def scenario(blocking: Blocking) -> None:
        errors = [ConnectionError()]

        def bottom() -> None:
            if errors:
                raise errors.pop()

        def middle() -> None:
            executor.from_thread(blocking.call, bottom)

        def outer() -> None:
            executor.from_thread(blocking.call, middle)

        async with Executor() as executor:
            await blocking.call(outer)

    assert cancel_at_every_step(scenario, arrange=arrange, check=is_clean) >= 5
