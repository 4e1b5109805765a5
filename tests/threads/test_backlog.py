"""Processing that piles up holds back the round trips that would add to it, and never for nothing."""

import asyncio
import gc
import itertools
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from penstock import Executor, Gate, Retry
from penstock.gate.gate import LONGEST_PILE
from penstock.gate.service import KeyStatistics
from penstock.testing import ThreadLatch, VirtualClockLoop, run_in_virtual_time
from penstock.threads.backlog import PROGRESS, TICK
from penstock.threads.lane import Lane

pytestmark = pytest.mark.virtual_clock

HOUR = 3600.0


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


def now() -> float:
    return asyncio.get_running_loop().time()


class Step:
    """Processing that takes some virtual time on a core: a timer of the loop lets its thread go."""

    def __init__(self, seconds: float) -> None:
        self._loop = virtual_loop()
        self._seconds = seconds
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        latch = ThreadLatch(self._loop)
        self._loop.call_soon_threadsafe(self._loop.call_later, self._seconds, latch.open)
        latch.wait()


async def round_trip(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return now()


async def gate_of(latency: float, limit: int = 64) -> Gate:
    """A gate that knows how long its round trips take."""
    gate = Gate("g", limit=limit, timeout=None, retry=Retry(timeout=None, wait=0.1))
    await gate.call(round_trip, latency)
    return gate


def seen(gate: Gate) -> KeyStatistics:
    return gate.statistics()[None]


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    lane = Lane("compute", 1, processing=True)
    yield lane
    lane.close()


class Pile:
    """Calls that wait for a core."""

    def __init__(self, lane: Lane, calls: int, seconds: float) -> None:
        self.step = Step(seconds)
        self.tasks = [asyncio.ensure_future(lane.call(self.step)) for _ in range(calls)]

    async def done(self) -> None:
        await asyncio.gather(*self.tasks)


async def learn(lane: Lane, seconds: float) -> None:
    """Let the lane see how long a step takes."""
    await lane.call(Step(seconds))


# --- holding back, and going on ---


async def test_round_trips_wait_while_what_is_to_be_processed_would_outlast_them(lane: Lane) -> None:
    """And go on early enough that the cores still have work when their answers come."""
    gate = await gate_of(0.1)
    await learn(lane, 0.01)
    began = now()
    pile = Pile(lane, 100, 0.01)  # a second of work
    await asyncio.sleep(2 * TICK)
    held = asyncio.ensure_future(gate.call(round_trip, 0.1))
    await asyncio.sleep(2 * TICK)
    assert (seen(gate).in_flight, seen(gate).waiting) == (0, 1)
    answered = await held
    assert answered - began < 1.0, "a core is not left without work"
    started = answered - 0.1
    left = began + 1.0 - started
    assert 0.1 - 0.01 <= left <= 0.1 + LONGEST_PILE + 0.01, "seconds of work that were left when it began"
    await pile.done()


async def test_a_round_trip_begins_at_once_when_it_will_outlast_the_pile(lane: Lane) -> None:
    """A slow service is never held back by a little work."""
    gate = await gate_of(2.0)
    await learn(lane, 0.01)
    pile = Pile(lane, 100, 0.01)
    await asyncio.sleep(5 * TICK)
    asked = now()
    assert await gate.call(round_trip, 2.0) == asked + 2.0
    await pile.done()


async def test_each_key_is_compared_with_its_own_latency(lane: Lane) -> None:
    """The quick one waits, the slow one does not."""
    gate = Gate("g", limit=64, key=lambda key, _: key)

    async def trip(_key: str, seconds: float) -> None:
        await asyncio.sleep(seconds)

    await asyncio.gather(gate.call(trip, "quick", 0.05), gate.call(trip, "slow", 5.0))
    await learn(lane, 0.01)
    pile = Pile(lane, 100, 0.01)
    await asyncio.sleep(2 * TICK)
    calls = [asyncio.ensure_future(gate.call(trip, *call)) for call in (("quick", 0.05), ("slow", 5.0))]
    await asyncio.sleep(0)
    statistics = gate.statistics()
    assert (statistics["quick"].in_flight, statistics["quick"].waiting) == (0, 1)
    assert (statistics["slow"].in_flight, statistics["slow"].waiting) == (1, 0)
    await asyncio.gather(*calls, pile.done())


async def test_a_service_that_has_never_answered_is_not_held_back(lane: Lane) -> None:
    """Nobody knows how long it takes."""
    gate = Gate("g")
    await learn(lane, 0.01)
    pile = Pile(lane, 100, 0.01)
    await asyncio.sleep(2 * TICK)
    gate.service(None)
    await asyncio.sleep(2 * TICK)
    asked = now()
    assert await gate.call(round_trip, 0.01) == asked + 0.01
    await pile.done()


async def test_retries_are_held_back_as_well_and_go_first_afterwards(lane: Lane) -> None:
    gate = await gate_of(0.1, limit=1)
    await learn(lane, 0.01)
    order: list[str] = []
    errors = [ConnectionError()]

    async def trip(name: str) -> None:
        order.append(name)
        if name == "failing" and errors:
            raise errors.pop()

    failing = asyncio.ensure_future(gate.call(trip, "failing"))
    await asyncio.sleep(0)
    pile = Pile(lane, 100, 0.01)
    await asyncio.sleep(0.2)
    fresh = asyncio.ensure_future(gate.call(trip, "fresh"))
    await asyncio.sleep(0.2)
    assert order == ["failing"]
    assert seen(gate).waiting == 2
    await asyncio.gather(failing, fresh)
    assert order == ["failing", "failing", "fresh"]
    await pile.done()


async def test_what_is_under_way_is_not_touched(lane: Lane) -> None:
    """Only the start of round trips is held back."""
    gate = await gate_of(0.1)
    await learn(lane, 0.01)
    under_way = asyncio.ensure_future(gate.call(round_trip, 0.3))
    began = now()
    pile = Pile(lane, 100, 0.01)
    assert await under_way == began + 0.3
    await pile.done()


async def test_a_pause_that_ends_meanwhile_does_not_let_anybody_through(lane: Lane) -> None:
    """Two reasons to wait: both have to be gone."""
    gate = await gate_of(0.1)
    await learn(lane, 0.01)
    pile = Pile(lane, 100, 0.01)
    await asyncio.sleep(2 * TICK)
    gate.service(None).pause(0.2)
    held = asyncio.ensure_future(gate.call(round_trip, 0.1))
    await asyncio.sleep(0.3)
    assert (seen(gate).paused_for, seen(gate).waiting) == (0, 1)
    await held
    gate.service(None).pause(5)
    await asyncio.sleep(2)
    assert not gate.service(None).take_nowait(), "the pause goes on when the pile is gone"
    await pile.done()


async def test_the_piles_of_two_lanes_add_up(lane: Lane) -> None:
    """The answers of one service may go to two executors."""
    other = Lane("other", 1, processing=True)
    gate = await gate_of(0.1)
    await asyncio.gather(learn(lane, 0.01), learn(other, 0.01))
    piles = [Pile(each, 10, 0.01) for each in (lane, other)]  # 90 ms wait in each
    await asyncio.sleep(TICK)
    held = asyncio.ensure_future(gate.call(round_trip, 0.1))
    await asyncio.sleep(0)
    assert seen(gate).waiting == 1
    await asyncio.gather(held, *[pile.done() for pile in piles])
    other.close()


async def test_the_lane_of_an_executor_and_only_that_for_processing_holds_back() -> None:
    """A pile of blocking calls waits for others, not for a core."""
    gate = await gate_of(0.01)
    async with Executor(threads=1) as executor:
        for call, held in ((executor.to_thread, 0), (executor.compute, 1)):
            await call(Step(0.01))
            tasks = [asyncio.ensure_future(call(Step(0.01))) for _ in range(50)]
            await asyncio.sleep(2 * TICK)
            trip = asyncio.ensure_future(gate.call(round_trip, 0.01))
            await asyncio.sleep(0)
            assert seen(gate).waiting == held
            await asyncio.gather(trip, *tasks)


# --- a pile that does not shrink ---


async def test_a_lane_that_makes_no_progress_holds_nothing_back(lane: Lane) -> None:
    """One call hangs, and those behind it will not be processed sooner for it."""
    gate = await gate_of(0.1)
    await learn(lane, 0.01)
    with ThreadLatch(virtual_loop()) as latch:
        began = now()
        hanging = asyncio.ensure_future(lane.call(latch.wait))
        pile = Pile(lane, 100, 0.01)
        await asyncio.sleep(2 * TICK)
        held = asyncio.ensure_future(gate.call(round_trip, 0.1))
        answered = await held
        assert began + PROGRESS <= answered - 0.1 <= began + PROGRESS + 2 * TICK
        latch.open()
        await asyncio.gather(hanging, pile.done())


async def test_a_lane_that_hangs_holds_nothing_back_again_because_more_calls_come(lane: Lane) -> None:
    """As long as nothing has ended since, a new call is no progress."""
    gate = await gate_of(0.1)
    await learn(lane, 0.01)
    with ThreadLatch(virtual_loop()) as latch:
        calls: list[asyncio.Future[Any]] = [asyncio.ensure_future(lane.call(latch.wait))]
        calls += [asyncio.ensure_future(lane.call(int)) for _ in range(100)]
        await asyncio.sleep(2 * PROGRESS)
        for _ in range(10):
            calls.append(asyncio.ensure_future(lane.call(int)))
            await asyncio.sleep(2 * TICK)
            asked = now()
            assert await gate.call(round_trip, 0.1) == asked + 0.1
        latch.open()
        await asyncio.gather(*calls)


async def test_a_lane_that_goes_on_after_all_holds_back_again(lane: Lane) -> None:
    """As soon as another call comes."""
    gate = await gate_of(0.1)
    await learn(lane, 0.01)
    with ThreadLatch(virtual_loop()) as latch:
        hanging = asyncio.ensure_future(lane.call(latch.wait))
        pile = Pile(lane, 200, 0.01)
        await asyncio.sleep(5)
        latch.open()
        await hanging
    await asyncio.sleep(0.1)
    more = Pile(lane, 1, 0.01)
    await asyncio.sleep(2 * TICK)
    held = asyncio.ensure_future(gate.call(round_trip, 0.1))
    await asyncio.sleep(0)
    assert seen(gate).waiting == 1
    await asyncio.gather(held, pile.done(), more.done())


async def test_processing_that_itself_waits_for_a_round_trip_is_not_waited_for_in_vain() -> None:
    """Each call in the lane wants an answer through the gate that the others hold back: they all get through."""
    gate = await gate_of(0.1)

    def ask() -> float:
        value: float = executor.from_thread(gate.call, round_trip, 0.1)
        return value

    async with Executor() as executor, asyncio.timeout(HOUR):
        await executor.compute(Step(0.01))
        await asyncio.gather(*[executor.compute(ask) for _ in range(20)])


async def test_calls_that_are_given_up_are_no_pile(lane: Lane) -> None:
    """Whoever was held back for them goes on with the next look."""
    gate = await gate_of(0.1)
    await learn(lane, 0.01)
    pile = Pile(lane, 100, 0.01)
    await asyncio.sleep(2 * TICK)
    held = asyncio.ensure_future(gate.call(round_trip, 0.1))
    await asyncio.sleep(0)
    for task in pile.tasks:
        task.cancel()
    asked = now()
    assert await held <= asked + TICK + 0.1
    await asyncio.wait(pile.tasks)


# --- the cores are never idle because of it ---


class ClosedLoop:
    """Jobs that come one after the other without end: a round trip, then a step on a core."""

    LATENCY = 0.1
    STEP = 0.005
    LIMIT = 64
    JOBS = 256

    def __init__(self, processing: bool, latency: Callable[[], float]) -> None:
        self.lane = Lane("compute", 1, processing=processing)
        self.gate = Gate("g", limit=self.LIMIT)
        self.done = 0
        self.piles: list[int] = []
        self._latency = latency
        self._step = Step(self.STEP)

    async def job(self) -> None:
        await self.gate.call(asyncio.sleep, self._latency())
        self.piles.append(self.lane.waiting)
        await self.lane.call(self._step)
        self.done += 1

    async def run(self, seconds: float) -> float:
        """The throughput, after a second to get going."""

        async def worker() -> None:
            while True:
                await self.job()

        workers = [asyncio.create_task(worker()) for _ in range(self.JOBS)]
        await asyncio.sleep(1)
        before, self.piles = self.done, []
        await asyncio.sleep(seconds)
        throughput = (self.done - before) / seconds
        for task in workers:
            task.cancel()
        await asyncio.wait(workers)
        await asyncio.sleep(1)
        self.lane.close()
        return throughput


@pytest.mark.parametrize("jitter", [(1.0,), (0.5, 0.8, 1.1, 1.6)], ids=["steady", "jittery"])
async def test_a_core_is_kept_busy_and_its_pile_stays_small(jitter: tuple[float, ...]) -> None:
    """The network could do three times as much: without holding back, every job that has no permit is in the pile."""
    with_it, without = [
        ClosedLoop(processing, (ClosedLoop.LATENCY * share for share in itertools.cycle(jitter)).__next__)
        for processing in (True, False)
    ]
    capacity = 1 / ClosedLoop.STEP
    assert await with_it.run(3) >= 0.95 * capacity
    assert await without.run(1) >= 0.95 * capacity
    assert min(without.piles) > 200, "otherwise this shows nothing"
    assert max(with_it.piles) <= 120
    assert sum(with_it.piles) / len(with_it.piles) < 60


# --- nothing is kept alive, nothing ticks ---


async def test_a_loop_without_a_pile_has_no_timer(lane: Lane) -> None:
    """A program that waits for nothing else ends, and an idle one stays idle."""
    await gate_of(0.1)
    await learn(lane, 0.01)
    await Pile(lane, 50, 0.01).done()
    await asyncio.sleep(2 * TICK)
    assert lane._backlog is not None
    assert lane._backlog._timer is None


def test_neither_gates_nor_lanes_nor_loops_are_kept_alive() -> None:
    """Those of a long-lived loop may come and go; loops too."""
    dropped: deque[weakref.ref[Any]] = deque()

    async def main() -> None:
        gate, lane = await gate_of(0.1), Lane("compute", 1, processing=True)
        await learn(lane, 0.01)
        await Pile(lane, 20, 0.01).done()
        await asyncio.sleep(1)
        dropped.extend(map(weakref.ref, (gate, lane)))
        lane.close()
        del gate, lane
        gc.collect()
        assert [ref() for ref in dropped] == [None, None]
        dropped.append(weakref.ref(asyncio.get_running_loop()))

    run_in_virtual_time(main())
    gc.collect()
    assert dropped[-1]() is None


def test_a_gate_that_has_moved_to_another_loop_is_held_back_by_that_one_alone() -> None:
    """The old loop may still run, with a pile of its own, in another thread."""
    first, second = VirtualClockLoop(), VirtualClockLoop()
    try:
        gate = first.run_until_complete(gate_of(0.1))
        second.run_until_complete(gate.call(round_trip, 0.1))

        async def pile_up() -> None:
            lane = Lane("compute", 1, processing=True)
            await learn(lane, 0.01)
            pile = Pile(lane, 100, 0.01)
            await asyncio.sleep(2 * TICK)
            await pile.done()
            lane.close()

        async def ask() -> None:
            asked = now()
            assert await gate.call(round_trip, 0.1) == asked + 0.1

        piling = first.create_task(pile_up())
        first.run_until_complete(asyncio.sleep(0.1))
        second.run_until_complete(ask())
        first.run_until_complete(piling)
    finally:
        first.close()
        second.close()
