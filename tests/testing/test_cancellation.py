"""The rules of the sweep: it finds what a cancel at the wrong moment breaks, and passes what it does not break."""

import asyncio
import threading

import pytest

from penstock.errors import DeadlockError, UsageError
from penstock.testing import ThreadLatch, VirtualClockLoop, act_at_every_step, cancel_at_every_step


class Counter:
    """A semaphore's permits, and how many steps were seen."""

    def __init__(self, permits: int = 1) -> None:
        self.semaphore = asyncio.Semaphore(permits)
        self.seen: list[str] = []

    def permit_is_back(self) -> bool:
        return not self.semaphore.locked()


async def well_behaved(counter: Counter) -> None:
    async with counter.semaphore:
        await asyncio.sleep(1)


async def forgetful(counter: Counter) -> None:
    await counter.semaphore.acquire()
    await asyncio.sleep(1)
    counter.semaphore.release()


def test_a_scenario_that_cleans_up_passes_at_every_step() -> None:
    assert cancel_at_every_step(well_behaved, arrange=Counter, check=Counter.permit_is_back) >= 1


def test_each_suspension_is_a_step_and_so_is_the_moment_between_ready_and_running() -> None:
    """Three bare yields are three steps; a sleep is two: before its timer, and after it in the same iteration."""

    async def yield_three_times() -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def sleep_once() -> None:
        await asyncio.sleep(1)

    assert cancel_at_every_step(yield_three_times) == 3
    assert cancel_at_every_step(sleep_once) == 2


def test_a_lost_permit_is_found_and_the_error_names_the_step_and_the_line() -> None:
    with pytest.raises(AssertionError) as caught:
        cancel_at_every_step(forgetful, arrange=Counter, check=Counter.permit_is_back)
    told = str(caught.value)
    assert "cancelled after step 1" in told
    assert "the check returned False" in told
    assert "in forgetful: await asyncio.sleep(1)" in told


def test_a_check_that_raises_is_a_failure_with_its_error_as_the_cause() -> None:
    def refuse(counter: Counter) -> None:
        assert counter.permit_is_back(), "a permit is missing"

    with pytest.raises(AssertionError, match="a permit is missing") as caught:
        cancel_at_every_step(forgetful, arrange=Counter, check=refuse)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_a_cancel_between_the_grant_and_the_run_of_its_owner_is_tried() -> None:
    """The classic: the grant is made, its owner is cancelled before it runs, and the permit is lost."""

    class LosingLock:
        def __init__(self) -> None:
            self.free = True
            self.grant: asyncio.Future[None] | None = None

        async def acquire(self) -> None:
            if not self.free:
                self.grant = asyncio.get_running_loop().create_future()
                await self.grant
            self.free = False

        def release(self) -> None:
            if self.grant is not None and not self.grant.done():
                self.grant.set_result(None)  # handed over: stays taken
            else:
                self.free = True

    async def hold(lock: LosingLock) -> None:
        await lock.acquire()
        try:
            await asyncio.sleep(1)
        finally:
            lock.release()

    async def hand_over(lock: LosingLock) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(hold(lock))
            group.create_task(hold(lock))

    with pytest.raises(AssertionError, match=r"cancelled after step \d: the check returned False"):
        cancel_at_every_step(hand_over, arrange=LosingLock, check=lambda lock: lock.free)


def test_every_run_has_a_state_of_its_own() -> None:
    made: list[Counter] = []

    def arrange() -> Counter:
        made.append(Counter())
        return made[-1]

    steps = cancel_at_every_step(well_behaved, arrange=arrange)
    # One undisturbed, one for each step, and one in which the cancel came too late.
    assert len(made) == steps + 2


def test_a_scenario_without_arguments_is_checked_without_arguments() -> None:
    checks: list[bool] = []

    async def scenario() -> None:
        await asyncio.sleep(0)

    steps = cancel_at_every_step(scenario, check=lambda: checks.append(True))
    assert len(checks) == steps + 2


def test_a_task_left_over_is_a_failure_that_says_where_it_waits() -> None:
    children: list[asyncio.Task[None]] = []

    async def orphan_its_child() -> None:
        child = asyncio.create_task(asyncio.sleep(1), name="orphan")
        children.append(child)
        await asyncio.sleep(0)
        await child

    async def shielded() -> None:
        await asyncio.shield(orphan_its_child())

    with pytest.raises(AssertionError, match=r"(?s)cancelled after step 1: it left tasks behind:.*in orphan_its_child"):
        cancel_at_every_step(shielded)


def test_a_scenario_that_does_not_end_in_time_is_a_failure_that_says_where_it_stands() -> None:
    async def lingers() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            await asyncio.sleep(100)
            raise

    with pytest.raises(AssertionError, match=r"(?s)not ended within 60 s.*in lingers: await asyncio\.sleep\(100\)"):
        cancel_at_every_step(lingers)
    assert cancel_at_every_step(lingers, patience=101) == 2


def test_a_scenario_that_spins_for_ever_is_ended_even_if_it_cannot_be_closed() -> None:
    async def immortal() -> None:
        while True:
            try:
                await asyncio.sleep(1)
                return
            except asyncio.CancelledError:
                while True:
                    try:
                        await asyncio.sleep(0)
                    except asyncio.CancelledError:
                        continue

    with pytest.raises(AssertionError, match="not ended within 60 s and 10,000 steps"):
        cancel_at_every_step(immortal)


def test_a_scenario_that_waits_for_ever_after_its_cancel_is_a_failure() -> None:
    async def waits_in_its_cleanup() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    with pytest.raises(
        AssertionError, match="cancelled after step 1: it can never end: nothing can ever run"
    ) as caught:
        cancel_at_every_step(waits_in_its_cleanup)
    assert isinstance(caught.value.__cause__, DeadlockError)


def test_another_error_in_place_of_the_cancel_is_a_failure() -> None:
    async def mistaken() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError as error:
            raise ValueError("not what was asked") from error

    with pytest.raises(AssertionError, match="it raised ValueError") as caught:
        cancel_at_every_step(mistaken)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_scenario_may_finish_in_spite_of_its_cancel() -> None:
    async def finishes() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            return

    assert cancel_at_every_step(finishes) == 2


def test_a_scenario_that_fails_undisturbed_raises_its_own_error() -> None:
    async def fails() -> None:
        raise LookupError("on its own")

    with pytest.raises(LookupError, match="on its own"):
        cancel_at_every_step(fails)


def test_a_scenario_that_cancels_itself_undisturbed_is_a_failure() -> None:
    async def gives_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(AssertionError, match="scenario undisturbed: it ended cancelled"):
        cancel_at_every_step(gives_up)


def test_an_error_that_only_the_loop_hears_of_is_a_failure() -> None:
    async def fails_in_a_callback() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)

    with pytest.raises(AssertionError, match=r"exception handler: .*ZeroDivisionError"):
        cancel_at_every_step(fails_in_a_callback)


def test_an_exception_that_nobody_retrieved_is_a_failure_even_in_a_reference_cycle() -> None:
    async def forgets_an_error() -> None:
        future = asyncio.get_running_loop().create_future()
        cycle: list[object] = [future]
        cycle.append(cycle)
        future.set_exception(ValueError("forgotten"))

    with pytest.raises(AssertionError, match=r"never retrieved ValueError\('forgotten'\)"):
        cancel_at_every_step(forgets_an_error)


def test_what_threads_post_is_seen_before_the_check() -> None:
    """A thread outlives the cancel of its caller; its permit comes back when it has really ended."""

    class Lane:
        def __init__(self) -> None:
            self.busy = 0
            self.let_go = threading.Event()

        def work(self, loop: asyncio.AbstractEventLoop) -> None:
            self.let_go.wait()
            loop.call_soon_threadsafe(self.leave)

        def leave(self) -> None:
            self.busy -= 1

    async def scenario(lane: Lane) -> None:
        lane.busy += 1
        threading.Timer(0.01, lane.let_go.set).start()
        await asyncio.to_thread(lane.work, asyncio.get_running_loop())

    assert cancel_at_every_step(scenario, arrange=Lane, check=lambda lane: lane.busy == 0) >= 1


def test_the_loop_of_a_run_can_be_chosen() -> None:
    starts: list[float] = []

    async def scenario() -> None:
        starts.append(asyncio.get_running_loop().time())

    cancel_at_every_step(scenario, loop_factory=lambda: VirtualClockLoop(start=5))
    assert set(starts) == {5}


def test_an_action_is_called_once_after_every_step_and_the_scenario_goes_on() -> None:
    class Door:
        def __init__(self) -> None:
            self.closed = False
            self.seen_closed: list[bool] = []

    doors: list[Door] = []

    def arrange() -> Door:
        doors.append(Door())
        return doors[-1]

    async def look_three_times(door: Door) -> None:
        for _ in range(3):
            door.seen_closed.append(door.closed)
            await asyncio.sleep(0)

    def close(door: Door) -> None:
        assert not door.closed
        door.closed = True

    steps = act_at_every_step(look_three_times, close, arrange=arrange, check=lambda door: len(door.seen_closed) == 3)
    assert steps == 3
    assert [door.seen_closed.count(True) for door in doors] == [0, 2, 1, 0, 0]


def test_an_action_that_ends_the_scenario_is_a_failure() -> None:
    tasks: list[asyncio.Task[object] | None] = []

    async def scenario() -> None:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(1)

    def cancel() -> None:
        task = tasks[-1]
        assert task is not None
        task.cancel()

    with pytest.raises(AssertionError, match="scenario disturbed after step 1: it ended cancelled"):
        act_at_every_step(scenario, cancel)


def test_an_action_that_fails_raises_its_own_error() -> None:
    async def scenario() -> None:
        await asyncio.sleep(1)

    def fail() -> None:
        raise LookupError("the action's")

    with pytest.raises(LookupError, match="the action's"):
        act_at_every_step(scenario, fail)


def test_a_thread_held_by_a_latch_does_not_keep_a_run_from_ending() -> None:
    """The run ends with the latch still shut; its owner opens it."""
    latches: list[ThreadLatch] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        latch = ThreadLatch(loop)
        latches.append(latch)
        call = loop.run_in_executor(None, latch.wait)
        try:
            async with asyncio.timeout(1):
                await call
        except TimeoutError:
            pass

    def open_latch() -> None:
        latches[-1].open()

    assert cancel_at_every_step(scenario, check=open_latch) >= 2


def test_a_coroutine_object_is_refused_with_the_right_call() -> None:
    async def scenario() -> None: ...

    with pytest.raises(UsageError, match=r"cancel_at_every_step\(scenario, \.\.\.\)"):
        cancel_at_every_step(scenario())  # type: ignore[call-overload]


async def test_a_call_from_inside_a_loop_is_refused() -> None:
    async def scenario() -> None: ...

    with pytest.raises(UsageError, match="inside a running event loop"):
        cancel_at_every_step(scenario)


def test_a_scenario_of_too_many_steps_is_refused() -> None:
    async def spins() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(AssertionError, match="undisturbed: it has not ended"):
        cancel_at_every_step(spins)
