"""What a gate promises: order, limits, pauses, time, whole errors, and permits that always come back."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

import penstock
from penstock import AttemptTimeout, Executor, FailureKind, Gate, HttpStatusError, Rate, Retry, UsageError, WrongLoop
from penstock.gate.gate import MOST_IDLE_KEYS, _AsyncCall
from penstock.testing import VirtualClockLoop, act_at_every_step, cancel_at_every_step, run_in_virtual_time
from penstock.threads.workers import Worker

pytestmark = pytest.mark.virtual_clock


def now() -> float:
    return asyncio.get_running_loop().time()


def throttled(retry_after: float | None = None) -> HttpStatusError:
    return HttpStatusError(429, "GET", "http://h/", b"", retry_after)


class Script:
    """An async function that takes its time and ends as written, one entry for each attempt; then it returns."""

    def __init__(self, *endings: Exception | None, takes: float = 0.0) -> None:
        self._endings = list(endings)
        self._takes = takes
        self.started: list[float] = []

    async def __call__(self) -> str:
        self.started.append(now())
        await asyncio.sleep(self._takes)
        if self._endings and (error := self._endings.pop(0)) is not None:
            raise error
        return "done"


class Crowd:
    """Counts who is inside."""

    def __init__(self) -> None:
        self.inside = self.peak = 0

    async def __call__(self, duration: float = 1.0) -> None:
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        await asyncio.sleep(duration)
        self.inside -= 1


async def start(call: Callable[[], Any]) -> "asyncio.Task[Any]":
    """A task that has come as far as it comes at once."""
    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    return task


# --- who may start, and when ---


async def test_first_come_first_served() -> None:
    """Within a key the order of asking is the order of starting."""
    gate, order = Gate("g", limit=2), []

    async def trip(number: int) -> None:
        order.append(number)
        await asyncio.sleep(1)

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(gate.call(trip, number))
    assert order == list(range(20))


async def test_never_more_in_flight_than_the_limit_and_never_fewer_than_possible() -> None:
    """50 trips of a second through 5 permits take 10 seconds."""
    gate, crowd, started = Gate("g", limit=5), Crowd(), now()
    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(gate.call(crowd))
    assert crowd.peak == 5
    assert now() - started == 10


async def test_a_retry_that_is_due_goes_before_fresh_work() -> None:
    """It has waited longest; and a run of failures must not be pushed back by an endless supply of new items."""
    gate, order = Gate("g", limit=1, retry=Retry(wait=1)), []

    async def trip(name: str, fail: list[bool]) -> None:
        order.append(name)
        await asyncio.sleep(2)
        if fail and fail.pop():
            raise ConnectionError

    async with asyncio.TaskGroup() as group:
        group.create_task(gate.call(trip, "failing", [True]))
        for name in "abc":
            group.create_task(gate.call(trip, name, []))
    assert order == ["failing", "a", "failing", "b", "c"]


async def test_throttled_retries_go_first_when_the_pause_ends() -> None:
    """Whoever was told to come back is before whoever came during the pause."""
    gate, order = Gate("g", limit=1, retry=Retry(wait=0.1)), []

    async def trip(name: str, endings: list[Exception]) -> None:
        order.append(name)
        await asyncio.sleep(1)
        if endings:
            raise endings.pop()

    async with asyncio.TaskGroup() as group:
        group.create_task(gate.call(trip, "throttled", [throttled(5)]))
        for name in "ab":
            group.create_task(gate.call(trip, name, []))
    assert order == ["throttled", "throttled", "a", "b"]


async def test_back_off_holds_no_permit() -> None:
    """Others use it meanwhile."""
    gate = Gate("g", limit=1, retry=Retry(wait=100))
    failing = await start(lambda: gate.call(Script(ConnectionError())))
    await asyncio.sleep(1)
    assert gate.statistics()[None].in_flight == 0
    started = now()
    assert await gate.call(Script()) == "done"
    assert now() == started
    assert await failing == "done"


async def test_keys_are_independent() -> None:
    """Each has its limit and its pauses."""
    gate = Gate("g", limit=1, key=lambda host, _: host, retry=Retry(attempts=1))

    async def trip(_host: str, script: Script) -> str:
        return await script()

    slow = await start(lambda: gate.call(trip, "slow", Script(takes=50)))
    with pytest.raises(HttpStatusError):
        await gate.call(trip, "throttled", Script(throttled(50)))
    started = now()
    await gate.call(trip, "quick", Script())
    assert now() == started
    await gate.call(trip, "throttled", Script())
    assert 50 <= now() - started <= 55
    await slow
    assert set(gate.statistics()) == {"slow", "throttled", "quick"}


async def test_an_error_of_the_key_function_takes_nothing() -> None:
    """It is the caller's own, and unchanged."""
    gate = Gate("g", key=lambda host: {"a": 1}[host])
    with pytest.raises(KeyError):
        await gate.call(lambda host: host, "b")
    assert gate.statistics() == {}


async def test_idle_keys_are_dropped_and_keys_in_use_are_not() -> None:
    """Keys may come and go by the million; who holds a permit, waits, pauses or backs off keeps its key."""
    gate = Gate("g", limit=1, timeout=None, key=lambda key, _: key, retry=Retry(timeout=None, wait=500))

    async def trip(_key: Hashable, script: Script) -> str:
        return await script()

    backing_off = await start(lambda: gate.call(trip, "backing off", Script(ConnectionError())))
    in_flight = await start(lambda: gate.call(trip, "in flight", Script(takes=1_000)))
    paused = await start(lambda: gate.call(trip, "paused", Script(throttled(400))))
    await asyncio.sleep(1)
    quick = Script()
    for number in range(3 * MOST_IDLE_KEYS):
        await gate.call(trip, number, quick)
    assert len(gate.statistics()) <= MOST_IDLE_KEYS + 1
    assert {"backing off", "in flight", "paused"} <= set(gate.statistics())
    assert "keys=" in repr(gate)
    for task in (backing_off, in_flight, paused):
        assert await task == "done"


class Searching(Gate):
    """Notes with how many keys it has looked for idle ones."""

    def _drop_idle_keys(self) -> None:
        self.searched = [*getattr(self, "searched", []), len(self._services)]
        super()._drop_idle_keys()


async def test_idle_keys_are_looked_for_only_when_keys_have_doubled() -> None:
    """Or each new key would search all that are in use. When many come to rest, the next search forgets them."""
    gate, keys = Searching("g", limit=1), 9 * MOST_IDLE_KEYS
    held = [gate.service(number) for number in range(keys) if gate.service(number).take_nowait()]
    assert len(held) == len(gate.statistics()) == keys
    assert gate.searched == [MOST_IDLE_KEYS * times for times in (1, 2, 4, 8)]
    for service in held:
        service.give_back()
    for number in range(8 * MOST_IDLE_KEYS):
        gate.service(-1 - number)
    assert len(gate.statistics()) <= 2 * MOST_IDLE_KEYS


async def test_a_key_whose_rate_is_used_up_is_remembered_until_it_is_not() -> None:
    """One that came back fresh would have its rate once more."""
    gate = Gate("g", rate=Rate(1, per=60))
    await gate.call(Script())
    assert not gate.service(None).idle
    await asyncio.sleep(61)
    assert gate.service(None).idle


async def test_the_limit_holds_for_a_call_that_comes_back_to_its_key() -> None:
    """A key that was forgotten during a back-off would come back with a second set of permits."""
    gate, crowd = Gate("g", limit=1, timeout=None, key=lambda key, *_: key, retry=Retry(wait=10)), Crowd()

    async def trip(_key: Hashable, fail: list[bool]) -> None:
        if fail and fail.pop():
            raise ConnectionError
        await crowd(100)

    first = await start(lambda: gate.call(trip, "a", [True]))
    for number in range(2 * MOST_IDLE_KEYS):
        await gate.call(_nothing, number)
    second = await start(lambda: gate.call(trip, "a", []))
    await asyncio.gather(first, second)
    assert crowd.peak == 1


async def _nothing(_key: Hashable) -> None:
    return


# --- pauses ---


async def test_retry_after_pauses_the_whole_key() -> None:
    """Those who are in line and those who come later wait too, not only who heard it."""
    gate, script, started = Gate("g", limit=1, retry=Retry(wait=0)), Script(throttled(10), takes=1), now()
    others: list[float] = []

    async def other() -> None:
        others.append(now() - started)

    async with asyncio.TaskGroup() as group:
        group.create_task(gate.call(script))
        group.create_task(gate.call(other))  # in line when the pause begins
        await asyncio.sleep(5)
        assert 5 < gate.statistics()[None].paused_for <= 7
        group.create_task(gate.call(other))  # comes during the pause
    assert all(11 <= at <= 13 for at in others)
    assert 11 <= script.started[1] - started <= 12
    assert gate.statistics()[None].paused_for == 0


async def test_retry_after_pauses_the_key_even_if_the_call_that_heard_it_gives_up() -> None:
    """The next one is about to ask as well."""
    gate, started = Gate("g", retry=Retry(attempts=1)), now()
    with pytest.raises(HttpStatusError):
        await gate.call(Script(throttled(10)))
    await gate.call(Script())
    assert 10 <= now() - started <= 11


async def test_retry_after_is_never_undercut_by_a_retry() -> None:
    """Whatever kind of error carries it: a 502 too, and an error of an SDK that is retried."""

    class SlowDown(Exception):
        retry_after = 10

    bad_gateway = HttpStatusError(502, "GET", "http://h/", b"", 10.0)
    for error in (bad_gateway, SlowDown()):
        script = Script(error)
        await Gate("g", retry=Retry(wait=0, on=Exception)).call(script)
        assert 10 <= script.started[1] - script.started[0] <= 11


async def test_retry_after_of_an_error_that_is_final_pauses_nobody() -> None:
    """A 404 with `Retry-After` speaks of one resource, not of the service."""
    gate, started = Gate("g"), now()
    with pytest.raises(HttpStatusError):
        await gate.call(Script(HttpStatusError(404, "GET", "http://h/", b"", 10.0)))
    await gate.call(Script())
    assert now() == started


async def test_throttling_without_a_wait_backs_off_alone() -> None:
    """Nobody said how long the others should wait."""
    gate, script = Gate("g", retry=Retry(wait=10)), Script(throttled())
    failing = await start(lambda: gate.call(script))
    started = now()
    await gate.call(Script())
    assert now() == started
    await failing


# --- time ---


async def test_the_timeout_of_an_attempt_starts_at_its_admission() -> None:
    """Three one after another, each within its second: waiting in the queue does not count."""
    gate = Gate("g", limit=1, timeout=1.5)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(gate.call(Script(takes=1))) for _ in range(3)]
    assert [task.result() for task in tasks] == ["done"] * 3


async def test_an_attempt_that_takes_too_long_is_retried_and_then_raised() -> None:
    """As AttemptTimeout, which is a TimeoutError, with the time in its text."""
    script = Script(takes=9)
    with pytest.raises(AttemptTimeout, match=r"Script: no answer within 2 s") as caught:
        await Gate("g", timeout=2, retry=Retry(attempts=2, wait=1)).call(script)
    assert isinstance(caught.value, TimeoutError)
    assert script.started[1] - script.started[0] == 3


async def test_the_functions_own_timeout_error_is_its_own() -> None:
    """Only the gate's timeout becomes an AttemptTimeout."""
    with pytest.raises(TimeoutError) as caught:
        await Gate("g", timeout=2, retry=Retry(attempts=1)).call(Script(TimeoutError("mine")))
    assert type(caught.value) is TimeoutError


@pytest.mark.parametrize(("timeout", "total"), [(None, None), (None, 5.0), (9.0, 5.0)])
async def test_the_last_attempt_gets_no_more_than_what_is_left_of_the_total(
    timeout: float | None, total: float | None
) -> None:
    """Without any limit an attempt takes as long as it takes."""
    gate, started = Gate("g", timeout=timeout, retry=Retry(timeout=total, wait=1)), now()
    if total is None:
        await gate.call(Script(takes=10_000))
        return
    with pytest.raises(AttemptTimeout):
        await gate.call(Script(ConnectionError(), takes=3))
    assert now() - started == total


async def test_total_time_runs_out_in_the_queue() -> None:
    """The waiter leaves the queue; the error says for what it waited and how it had gone so far."""
    gate = Gate("g", limit=1, timeout=None, retry=Retry(timeout=5, wait=1))
    failing = await start(lambda: gate.call(Script(ConnectionError("reset"))))
    await asyncio.sleep(0.5)
    async with gate.permit():
        with pytest.raises(AttemptTimeout, match=r"Script: got no permit of gate 'g' in 4 s\n") as caught:
            await failing
        assert gate.statistics()[None].waiting == 0
    assert "Retry(timeout=5) was over" in caught.value.__notes__[0]
    assert "attempt 1 took 0.000 s: ConnectionError: reset" in caught.value.__notes__[0]
    assert gate.statistics()[None].retries == 0


async def test_total_time_runs_out_during_a_pause() -> None:
    """The error says that it was the server who asked for it."""
    gate = Gate("g", retry=Retry(timeout=5))
    with pytest.raises(HttpStatusError, match="429") as refused:
        await gate.call(Script(throttled(100)))
    assert "after the end of Retry(timeout=)" in refused.value.__notes__[0]
    loop = asyncio.get_running_loop()
    asked = loop.time()
    with pytest.raises(AttemptTimeout, match=r"gate 'g' is paused for \d+\.\d s"):
        await gate.call(Script())
    assert loop.time() == asked  # a wait that cannot end well is not begun


async def test_an_attempt_that_could_only_start_too_late_is_not_made() -> None:
    """A loop that lags may wake a retry after the end of its time; a permit that was taken for it goes back."""
    gate = Gate("g", retry=Retry(timeout=5))
    script = Script()
    service = gate.service(None)
    with pytest.raises(AttemptTimeout, match="could not start in time"):
        await gate.begin(_AsyncCall(script, (), {}), service, asked=service.now() - 6)
    assert (service.attempts, service.in_flight) == (0, 0)


async def test_total_time_runs_out_when_a_pause_comes_while_waiting() -> None:
    """The error tells how long the call has waited, and that the key is paused."""
    gate = Gate("g", limit=1, retry=Retry(timeout=5))
    first = asyncio.ensure_future(gate.call(Script(throttled(100), takes=1)))
    await asyncio.sleep(0)
    with pytest.raises(AttemptTimeout, match=r"in 5 s: it is paused for another \d+\.\d s"):
        await gate.call(Script())
    with pytest.raises(HttpStatusError, match="429"):
        await first


async def test_a_long_pause_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A run that seems to stand still says why; the other calls that hear the same add nothing."""
    gate = Gate("maps", retry=Retry(timeout=None, attempts=2))
    await asyncio.gather(*(gate.call(Script(throttled(100))) for _ in range(5)))
    (record,) = [record for record in caplog.records if record.name == "penstock.gate"]
    assert "gate 'maps': the server asks for a pause of 1" in record.getMessage()


async def test_an_exception_that_is_raised_again_and_again_carries_one_account() -> None:
    """A shared instance does not collect the notes of all calls that it ever ended."""
    shared = ValueError("the same each time")
    for _ in range(3):
        with pytest.raises(ValueError, match="the same"):
            await Gate("g").call(Script(shared))
    assert len(shared.__notes__) == 1


# --- errors ---


async def test_the_last_error_is_raised_as_it_came_with_its_attempts_as_a_note() -> None:
    """The same object; each attempt with its number, its time and the first line of its error."""
    last = ConnectionError("three\nmore")
    script = Script(ConnectionError("one"), ConnectionError("two"), last, takes=1)
    with pytest.raises(ConnectionError) as caught:
        await Gate("maps", retry=Retry(attempts=3, wait=0)).call(script)
    assert caught.value is last
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert caught.value.__notes__ == [
        "gate 'maps' gave up: all 3 attempts used\n"
        "  attempt 1 took 1.000 s: ConnectionError: one\n"
        "  attempt 2 took 1.000 s: ConnectionError: two\n"
        "  attempt 3 took 1.000 s: ConnectionError: three"
    ]


async def test_an_error_keeps_nothing_of_the_job_alive_once_it_is_dropped() -> None:
    """No reference cycle: a run with many failures must not wait for the collector to get its memory back."""

    class Data:
        pass

    async def failing(_data: Data, error: type[Exception]) -> None:
        await asyncio.sleep(2)
        raise error

    async def lost(gate: Gate, error: type[Exception]) -> weakref.ref[Data]:
        data = Data()
        with suppress(error, AttemptTimeout):
            await gate.call(failing, data, error)
            pytest.fail("it was to fail")
        await asyncio.sleep(0)  # a step of a task holds the exception with which it was resumed
        return weakref.ref(data)

    gc.disable()
    try:
        quick = Retry(attempts=2, wait=0)
        assert (await lost(Gate("g", retry=quick), ConnectionError))() is None
        assert (await lost(Gate("g", retry=quick), ValueError))() is None
        assert (await lost(Gate("g", retry=quick, timeout=1), ValueError))() is None
        full = Gate("g", limit=1, retry=Retry(timeout=3))
        async with full.permit():
            assert (await lost(full, ValueError))() is None
    finally:
        gc.enable()


async def test_a_round_trip_that_must_not_be_repeated_is_not() -> None:
    """It knows better than any policy; the server's wait is heeded all the same."""

    class Once(_AsyncCall):
        def repeatable(self, _error: Exception) -> bool:
            return False

    gate, script, started = Gate("g"), Script(throttled(10)), now()
    with pytest.raises(HttpStatusError) as caught:
        await gate.perform(Once(script, (), {}))
    assert "gave up: it may have been carried out, and is not declared idempotent" in caught.value.__notes__[0]
    assert len(script.started) == 1
    await gate.call(Script())
    assert 10 <= now() - started <= 11


async def test_an_error_of_the_policy_is_raised_and_holds_no_permit() -> None:
    """A predicate is the user's code too."""

    def broken(_: BaseException) -> bool:
        raise KeyError("in the predicate")

    gate = Gate("g", limit=1, retry=Retry(on=broken))
    with pytest.raises(KeyError, match="in the predicate"):
        await gate.call(Script(ConnectionError()))
    assert gate.statistics()[None].in_flight == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0: expected a whole number of at least 1"),
        ({"limit": True}, "limit=True"),
        ({"limit": 2.5}, r"limit=2\.5"),
        ({"timeout": 0}, "timeout=0: expected seconds above 0, or None"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"retry": 3}, r"retry=3: expected a policy\. Write retry=Retry\(attempts=3\)"),
        ({"key": "host"}, "key='host': expected a function"),
    ],
)
def test_a_gate_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    """With what was found and what to write."""
    with pytest.raises(UsageError, match=message):
        Gate("g", **options)


async def test_a_coroutine_object_is_refused_with_the_right_call() -> None:
    """A retry must call again; and the object leaves no warning behind."""
    gate = Gate("g")
    with pytest.raises(UsageError, match=r"found a coroutine object .*_nothing.*gate\.call\(_nothing, \.\.\.\)"):
        await gate.call(_nothing(1))  # type: ignore[call-overload]  # the mistake
    with pytest.raises(UsageError, match="found 5, expected a function"):
        await gate.call(5)  # type: ignore[call-overload]  # the mistake
    assert gate.statistics() == {}


async def test_a_coroutine_that_a_function_returns_is_refused() -> None:
    """Nobody would await it; it is a bug, and never retried."""

    async def forgets() -> Any:
        return _nothing(1)

    gate = Gate("g", retry=Retry(on=FailureKind.TRANSIENT))
    with pytest.raises(UsageError, match="forgets returned a coroutine .*_nothing"):
        await gate.call(forgets)
    assert gate.statistics()[None].failed == {FailureKind.BUG: 1}


async def test_a_partial_of_an_async_function_is_async() -> None:
    """No thread is needed for it; neither for an object with an async `__call__`, which is what a `Script` is."""

    async def shout(word: str, mark: str) -> str:
        return word.upper() + mark

    assert await Gate("g").call(partial(shout, mark="!"), "ok") == "OK!"


async def test_a_plain_function_runs_in_a_thread_outside_a_job_too() -> None:
    """Keywords are its own, whatever they are called."""
    threads = []

    def blocking(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        threads.append(threading.current_thread())
        return args, kwargs

    gate = Gate("g")
    assert await gate.call(blocking, 1, fn=2, self=3, name=4, key=5) == (
        (1,),
        {"fn": 2, "self": 3, "name": 4, "key": 5},
    )
    assert isinstance(threads[0], Worker)
    assert gate.statistics()[None].succeeded == 1


async def test_plain_and_async_functions_share_the_permits_of_a_key() -> None:
    """Three seconds for three of them through one permit, in the order of asking."""
    gate, order = Gate("g", limit=1), []

    async def on_the_loop() -> None:
        await asyncio.sleep(1)
        order.append("async")

    def in_a_thread() -> None:
        order.append("plain")

    tasks = [asyncio.create_task(gate.call(fn)) for fn in (on_the_loop, in_a_thread, on_the_loop)]
    await asyncio.gather(*tasks)
    assert order == ["async", "plain", "async"]
    assert gate.statistics()[None].in_flight == 0


# --- permits of one's own ---


async def test_a_permit_is_held_until_its_block_is_left() -> None:
    """Also when it is left by an error."""
    gate, started = Gate("g", limit=1), now()

    async def fail_inside() -> None:
        async with gate.permit():
            await asyncio.sleep(3)
            raise ValueError

    failing = await start(fail_inside)
    async with gate.permit():
        assert now() - started == 3
    with pytest.raises(ValueError):
        await failing
    assert gate.statistics()[None].in_flight == 0


async def test_a_permit_counts_for_its_key() -> None:
    """`gate.permit(key=...)` and `call` share the queue of the key."""
    gate, started = Gate("g", limit=1, key=lambda key: key), now()
    async with gate.permit(key="a"):
        await gate.call(_nothing, "b")
        assert now() == started
        waiting = await start(lambda: gate.call(_nothing, "a"))
        assert gate.statistics()["a"].waiting == 1
    await waiting


async def test_a_permit_object_serves_one_block_at_a_time() -> None:
    """One after another is fine; a second entry would give back what it does not have."""
    gate = Gate("g", limit=2)
    permit = gate.permit()
    for _ in range(2):
        async with permit:
            with pytest.raises(UsageError, match=r"already in use\. Call gate\.permit\(\) once for each"):
                await permit.__aenter__()
    assert gate.statistics()[None].in_flight == 0


async def test_a_permit_object_that_is_waited_for_cannot_be_entered_a_second_time() -> None:
    """Two tasks that share one would leave a permit behind; one that gave up can be entered again."""
    gate = Gate("g", limit=1)
    permit = gate.permit()
    async with gate.permit():
        waiting = await start(permit.__aenter__)
        with pytest.raises(UsageError, match="already in use"):
            await permit.__aenter__()
        waiting.cancel()
        await asyncio.wait([waiting])
    async with permit:
        assert gate.statistics()[None].in_flight == 1


# --- loops ---


def test_a_gate_serves_one_loop_after_another() -> None:
    """As when a script calls `asyncio.run` twice; what the first one left behind does not matter."""
    gate = Gate("g", limit=1)

    async def abandon_a_permit() -> None:
        await gate.permit().__aenter__()

    async def use() -> None:
        assert await gate.call(Script()) == "done"
        assert gate.statistics()[None].in_flight == 0

    run_in_virtual_time(use())
    run_in_virtual_time(abandon_a_permit())
    run_in_virtual_time(use())


@pytest.mark.parametrize("busy", ["in flight", "backing off"])
def test_a_gate_serves_one_loop_at_a_time(busy: str) -> None:
    """Its counts belong to one thread. Once the first loop has finished its calls, another may come."""
    gate = Gate("g", retry=Retry(wait=10))
    script = Script(takes=10) if busy == "in flight" else Script(ConnectionError())
    first = VirtualClockLoop()
    try:
        task = first.create_task(gate.call(script))
        first.run_until_complete(asyncio.sleep(1))
        with pytest.raises(WrongLoop, match="gate 'g' is in use on another event loop.*one gate for each loop"):
            run_in_virtual_time(gate.call(Script()))
        assert first.run_until_complete(task) == "done"
        assert run_in_virtual_time(gate.call(Script())) == "done"
        assert first.run_until_complete(gate.call(Script())) == "done"
    finally:
        first.close()


# --- what can be seen ---


async def test_statistics_tell_what_happened_and_what_is_going_on() -> None:
    """Attempts by their end, retries among them, the latency of those that worked."""
    gate = Gate("g", limit=20, retry=Retry(wait=1))
    await gate.call(Script(ConnectionError(), throttled(), takes=2))
    with pytest.raises(ValueError):
        await gate.call(Script(ValueError()))
    waiting = await start(lambda: gate.call(Script(takes=5)))
    seen = gate.statistics()[None]
    assert (seen.limit, seen.in_flight, seen.waiting, seen.paused_for) == (20, 1, 0, 0)
    assert (seen.attempts, seen.retries, seen.succeeded) == (5, 2, 1)
    assert seen.failed == {FailureKind.TRANSIENT: 1, FailureKind.THROTTLED: 1, FailureKind.PERMANENT: 1}
    assert (seen.latency.count, seen.latency.min) == (1, 2)
    assert repr(gate) == "<Gate 'g' limit=20 keys=1 in_flight=1 waiting=0>"
    await waiting


# --- inside a job ---


async def test_a_job_knows_its_attempts_and_how_long_it_waited() -> None:
    """All attempts of all its round trips; waits for permits and back-off, not the trips themselves."""
    gate = Gate("g", limit=1, retry=Retry(wait=3))

    async def job(_item: int) -> tuple[int, float]:
        running = penstock.current_job()
        assert running is not None
        await gate.call(Script(ConnectionError(), takes=2))  # 2 + 3 + 2
        async with gate.permit():  # in line behind nobody
            await asyncio.sleep(1)
        return running.attempts, running.waited

    async with Executor() as executor, executor.as_completed(job, [1]) as stream:
        outcomes = [outcome async for outcome in stream]
    assert outcomes[0].value == (2, 3.0)
    assert (outcomes[0].attempts, outcomes[0].waited, outcomes[0].ran) == (2, 3.0, 8.0)


async def test_a_job_counts_its_time_in_the_queue_also_when_it_is_for_nothing() -> None:
    """Waits side by side each count, and so do waits that end in an error."""
    gate = Gate("g", limit=1, retry=Retry(timeout=3))

    async def job(way: str) -> None:
        if way == "call":
            await gate.call(Script())
        async with asyncio.timeout(3):
            await gate.permit().__aenter__()

    async with gate.permit(), Executor() as executor, executor.as_completed(job, ["call", "permit"]) as stream:
        outcomes = [outcome async for outcome in stream]
    assert [(outcome.kind, outcome.attempts, outcome.waited) for outcome in outcomes] == [("transient", 0, 3.0)] * 2


async def test_a_plain_function_of_a_job_runs_in_the_jobs_context_and_is_retried_there() -> None:
    """Under the gate's limit and policy; it takes no thread of the executor's own."""
    gate, attempts = Gate("g", retry=Retry(wait=1)), []

    def blocking(word: str) -> str:
        attempts.append(penstock.current_job())
        if len(attempts) == 1:
            raise ConnectionError
        return word.upper()

    async def job(word: str) -> str:
        return await gate.call(blocking, word)

    async with Executor(threads=1) as executor, executor.as_completed(job, ["ok"]) as stream:
        (outcome,) = [outcome async for outcome in stream]
        assert executor.statistics().threads is None
    assert (outcome.value, outcome.attempts, outcome.waited) == ("OK", 2, 1.0)
    assert attempts[0] is attempts[1] is not None


# --- cancellation, at every step ---


def gates(limit: int = 1) -> Gate:
    return Gate("g", limit=limit, timeout=5, retry=Retry(attempts=3, wait=1, timeout=60))


def clean(gate: Gate) -> bool:
    """Nobody is in flight or waiting, and every permit can be had again."""
    seen = gate.statistics().get(None)
    return seen is None or (seen.in_flight, seen.waiting) == (0, 0)


def test_a_cancelled_call_leaves_nothing_behind_at_any_step() -> None:
    """Contention for one permit, failures, back-off, throttling with its pause, an attempt that is too slow."""

    async def scenario(gate: Gate) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(gate.call(Script(ConnectionError(), takes=1)))
            group.create_task(gate.call(Script(throttled(2.0))))
            group.create_task(gate.call(asyncio.sleep, 1))
        with pytest.raises(AttemptTimeout):
            await gate.call(Script(takes=99))

    assert cancel_at_every_step(scenario, arrange=gates, check=clean) >= 20


def test_a_cancelled_permit_leaves_nothing_behind_at_any_step() -> None:
    """Held, waited for, and handed over."""

    async def hold(gate: Gate) -> None:
        async with gate.permit():
            await asyncio.sleep(1)

    async def scenario(gate: Gate) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(hold(gate))

    assert cancel_at_every_step(scenario, arrange=gates, check=clean) >= 5


def test_a_cancelled_caller_takes_nothing_from_the_others_at_any_step() -> None:
    """One of three is cancelled; the other two always finish, the permit always gets to them."""

    class Three:
        def __init__(self) -> None:
            self.gate = gates()
            self.tasks: list[asyncio.Task[None]] = []
            self.finished = 0

        async def caller(self) -> None:
            await self.gate.call(asyncio.sleep, 1)
            self.finished += 1

    for victim in range(3):

        async def scenario(three: Three) -> None:
            three.tasks = [asyncio.create_task(three.caller()) for _ in range(3)]
            await asyncio.wait(three.tasks)

        def strike(three: Three, victim: int = victim) -> None:
            if three.tasks:
                three.tasks[victim].cancel()

        act_at_every_step(
            scenario, strike, arrange=Three, check=lambda three: three.finished >= 2 and clean(three.gate)
        )
