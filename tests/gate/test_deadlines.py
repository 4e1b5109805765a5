"""Deadlines: the time limits of many attempts on one timer, and as honest as `asyncio.timeout`."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import AttemptTimeout, Gate, Retry
from penstock.testing import cancel_at_every_step, run_in_virtual_time

pytestmark = pytest.mark.virtual_clock


def timers(loop: asyncio.AbstractEventLoop) -> int:
    """Timers that are set and not cancelled, but for the guard's heartbeat, which ends by itself."""
    timers: list[asyncio.TimerHandle] = loop._scheduled  # type: ignore[attr-defined]
    return sum(not timer.cancelled() and "Guard._beat" not in repr(timer) for timer in timers)


async def sleep(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "slept"


@given(
    attempts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=30),
    timeout=st.integers(1, 10),
)
def test_every_attempt_gets_exactly_its_time(attempts: list[tuple[int, int]], timeout: int) -> None:
    """Whenever attempts start and however long they take: late ones end at their deadline, all others by themselves."""

    async def one(gate: Gate, start: int, duration: int) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(start)
        began = loop.time()
        # Half a second keeps durations apart from the time limit, so that there is no tie to argue about.
        if duration + 0.5 < timeout:
            assert await gate.call(sleep, duration + 0.5) == "slept"
            assert loop.time() - began == pytest.approx(duration + 0.5)
        else:
            with pytest.raises(AttemptTimeout, match=f"no answer within {timeout} s"):
                await gate.call(sleep, duration + 0.5)
            assert loop.time() - began == pytest.approx(timeout)

    async def main() -> None:
        gate = Gate("g", limit=100, timeout=timeout, retry=Retry(attempts=1), breaker=None)
        await asyncio.gather(*(one(gate, start, duration) for start, duration in attempts))
        await asyncio.sleep(timeout + 1)
        assert timers(asyncio.get_running_loop()) == 0

    run_in_virtual_time(main())


async def test_attempts_in_flight_share_one_timer() -> None:
    """A thousand attempts, one timer; when the last has ended it runs out, and none is left."""
    loop = asyncio.get_running_loop()
    gate = Gate("g", limit=1_000, timeout=60.0)
    release = asyncio.Event()
    calls = [asyncio.create_task(gate.call(release.wait)) for _ in range(1_000)]
    await asyncio.sleep(1)
    assert timers(loop) == 1
    release.set()
    await asyncio.gather(*calls)
    await asyncio.sleep(60)
    assert timers(loop) == 0


async def test_a_cancellation_from_outside_wins_over_the_deadline_of_the_same_tick() -> None:
    """The caller's cancellation is never turned into a timeout, and is counted once."""
    loop = asyncio.get_running_loop()
    gate = Gate("g", timeout=5.0)
    call = asyncio.create_task(gate.call(sleep, 100))
    loop.call_later(5.0, call.cancel)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()


async def test_a_call_that_timed_out_leaves_no_cancellation_behind() -> None:
    """The task can go on: an `asyncio.timeout` around it still works, and nothing is pending."""
    gate = Gate("g", timeout=5.0, retry=Retry(attempts=1))
    with pytest.raises(AttemptTimeout):
        await gate.call(sleep, 100)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await gate.call(sleep, 3)


async def test_gates_within_gates_time_out_from_the_inside_out() -> None:
    """Both deadlines in one tick: the outer one decides, and the counts are right."""
    inner = Gate("inner", timeout=5.0, retry=Retry(attempts=1))
    outer = Gate("outer", timeout=5.0, retry=Retry(attempts=1))

    async def through_the_inner() -> Any:
        return await inner.call(sleep, 100)

    with pytest.raises(AttemptTimeout):
        await outer.call(through_the_inner)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_value_that_comes_late_all_the_same_is_a_value() -> None:
    """A function that swallows its cancellation and returns did the work: its value is not thrown away."""

    async def stubborn() -> str:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(1)
        return "late"

    assert await Gate("g", timeout=5.0).call(stubborn) == "late"


async def test_the_end_of_all_attempts_is_named_as_such() -> None:
    """When `Retry(timeout=)` leaves less than the attempt's own time, the message names it."""
    gate = Gate("g", timeout=60.0, retry=Retry(timeout=2.0))
    with pytest.raises(AttemptTimeout, match=r"sleep: no answer before the end of Retry\(timeout=2\)"):
        await gate.call(sleep, 100)


async def test_a_timeout_error_of_the_functions_own_stays_its_own() -> None:
    """Under the last deadline too."""

    async def fail() -> None:
        raise TimeoutError("mine")

    gate = Gate("g", timeout=60.0, retry=Retry(attempts=1, timeout=2.0))
    with pytest.raises(TimeoutError, match="mine"):
        await gate.call(fail)


def test_cancelled_at_any_step_two_shared_timers_are_left_at_most() -> None:
    """Time-outs and cancellations mixed: those of attempts and of waits run out, all permits come back."""

    async def scenario(gates: list[Gate]) -> None:
        gate = Gate("g", limit=2, timeout=2.0, retry=Retry(attempts=2, wait=1.0))
        gates.append(gate)
        calls = [asyncio.ensure_future(gate.call(sleep, duration)) for duration in (1, 3, 1, 5)]
        try:
            await asyncio.wait(calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await asyncio.sleep(0)
            assert timers(asyncio.get_running_loop()) <= 2

    def check(gates: list[Gate]) -> None:
        assert all(key.in_flight == 0 for gate in gates for key in gate.statistics().values())

    assert cancel_at_every_step(scenario, arrange=list[Gate], check=check) > 5
