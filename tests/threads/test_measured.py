"""A lane that measures how many calls may run: more soon after they get slow, few soon after they are fast again."""

import asyncio
import math
import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import DeadlockError, Executor, clock
from penstock.testing import ThreadLatch, VirtualClockLoop, run_in_virtual_time
from penstock.threads import measured as module
from penstock.threads.lane import Lane
from penstock.threads.measured import LEAST_PLACES
from penstock.threads.staffing import GROWTH, TICK
from penstock.threads.workers import Worker, Workers

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

HOUR = 3600.0
RATE = 100
FAST, SLOW = 0.02, 1.0
SLOW_FROM, SLOW_UNTIL, END = 5.0, 17.0, 40.0


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """A set of threads for the test alone.

    The CPU is that of real time, which says nothing about virtual seconds: nothing is burnt here.
    """
    monkeypatch.setattr(clock, "cpu_time", lambda _: 0.0)
    workers = Workers(256)
    yield workers
    workers.dismiss()
    for thread in workers.threads:
        thread.join(BOUND)
    assert (workers.threads, workers._promised) == ((), 0)


class Load:
    """Calls that hold their thread for as long as a timer of the loop says."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.loop = virtual_loop()
        self.waits: list[tuple[float, float]] = []
        """When each call asked, and how long it waited for its thread."""

    async def call(self, hold: float) -> None:
        asked = self.loop.time()
        began = asyncio.Event()

        def held() -> None:
            with ThreadLatch(self.loop) as latch:
                self.loop.call_soon_threadsafe(begin, latch)
                latch.wait()

        def begin(latch: ThreadLatch) -> None:
            began.set()
            self.waits.append((asked, self.loop.time() - asked))
            self.loop.call_later(hold, latch.open)

        await self.lane.call(held)
        assert began.is_set()

    def p99(self, start: float, end: float) -> float:
        waits = sorted(wait for asked, wait in self.waits if start <= asked < end)
        return waits[math.ceil(0.99 * len(waits)) - 1]


@pytest.mark.virtual_clock
@pytest.mark.parametrize("arrivals", ["regular", "random"])
async def test_calls_that_get_slow_wait_briefly_and_the_threads_go_again(workers: Workers, arrivals: str) -> None:
    """100 calls a second of 20 ms, which take 1 s from second 5 to 17."""
    lane = Lane("test", None, workers=workers)
    load = Load(lane)
    loop, start, chance = load.loop, load.loop.time(), random.Random(1)
    limits: list[tuple[float, int]] = []
    async with asyncio.TaskGroup() as group:
        while (at := loop.time() - start) < END:
            group.create_task(load.call(SLOW if SLOW_FROM <= at < SLOW_UNTIL else FAST))
            limits.append((at, lane.limit))
            await asyncio.sleep(chance.expovariate(RATE) if arrivals == "random" else 1 / RATE)
    assert load.p99(start, start + SLOW_FROM) <= 0.05
    assert load.p99(start + SLOW_FROM, start + SLOW_FROM + 10) <= 0.3
    assert load.p99(start + SLOW_FROM + 10, start + END) <= 0.05
    assert RATE < max(limit for _, limit in limits) < 2 * RATE
    assert max(limit for at, limit in limits if at > SLOW_UNTIL + 20) <= 10


@pytest.mark.virtual_clock
async def test_places_stay_between_the_least_and_what_the_set_has_threads_for(workers: Workers) -> None:
    """Calls that never end take all threads there are, and no more; who comes then waits."""
    workers.most = 12
    lane = Lane("test", None, workers=workers)
    assert lane.limit == LEAST_PLACES
    with ThreadLatch(virtual_loop()) as latch:
        calls = [asyncio.create_task(lane.call(latch.wait)) for _ in range(40)]
        await asyncio.sleep(60)
        assert (lane.limit, latch.held, lane.waiting) == (12, 12, 28)
        latch.open()
        await asyncio.gather(*calls)
    assert await lane.call(int) == 0
    await asyncio.sleep(60)
    assert lane.limit == LEAST_PLACES


@pytest.mark.virtual_clock
async def test_a_set_with_fewer_threads_than_the_least_is_used_as_far_as_it_goes(workers: Workers) -> None:
    workers.most = 2
    lane = Lane("test", None, workers=workers)
    with ThreadLatch(virtual_loop()) as latch:
        calls = [asyncio.create_task(lane.call(latch.wait)) for _ in range(10)]
        await asyncio.sleep(60)
        assert (latch.held, lane.limit) == (2, LEAST_PLACES)
        latch.open()
        await asyncio.gather(*calls)


@pytest.mark.virtual_clock
async def test_it_makes_up_for_calls_that_hang_and_says_so(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """Four bad calls must not end a lane for good; that it grows for them is told, again when they have doubled."""
    lane = Lane("test", None, workers=workers)
    load = Load(lane)

    async def hang(calls: int) -> None:
        hung = [asyncio.create_task(lane.call(latch.wait)) for _ in range(calls)]
        await asyncio.sleep(HOUR)
        for call in hung:
            call.cancel()
        await asyncio.wait(hung)

    with ThreadLatch(virtual_loop()) as latch:
        await hang(LEAST_PLACES)
        asked = load.loop.time()
        await asyncio.gather(*[load.call(FAST) for _ in range(10)])
        assert load.loop.time() - asked < 1
        await hang(LEAST_PLACES)
        await hang(LEAST_PLACES)
    told = [record.getMessage() for record in caplog.records if record.name == "penstock.threads"]
    assert [message.partition(" threads of 'test' are held")[0] for message in told] == ["all 4", "all 8"]


def test_its_timer_stops_when_there_is_nothing_to_decide() -> None:
    """A call that hangs for ever is the end of the program in virtual time, and not a timer that ticks for ever."""
    latches: list[ThreadLatch] = []

    async def main() -> None:
        lane = Lane("test", None)
        latches.append(ThreadLatch(virtual_loop()))
        await lane.call(latches[0].wait)

    try:
        with pytest.raises(DeadlockError, match="nothing can ever run again"):
            run_in_virtual_time(main())
    finally:
        latches[0].open()


@pytest.mark.virtual_clock
async def test_its_timer_stops_with_all_threads_busy_and_starts_with_the_next_call(workers: Workers) -> None:
    """There is nothing to decide until one of them ends."""
    workers.most = 6
    lane = Lane("test", None, workers=workers)
    measured = lane._measured
    assert measured is not None
    assert measured._timer is None
    with ThreadLatch(virtual_loop()) as latch:
        calls = [asyncio.create_task(lane.call(latch.wait)) for _ in range(10)]
        await asyncio.sleep(TICK / 2)
        timer: Any = measured._timer
        assert timer is not None
        await asyncio.sleep(60)
        assert measured._timer is None
        latch.open()
        await asyncio.gather(*calls)
    await lane.call(int)
    assert measured._timer is not None
    await asyncio.sleep(60)
    assert measured._timer is None
    assert lane.limit == LEAST_PLACES


@pytest.mark.virtual_clock
async def test_it_does_not_grow_while_its_threads_compute(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further thread would only take turns with them; a place is added for a stall, and no faster."""
    burnt = 0.0

    def cpu_time(_clock_id: int) -> float:
        nonlocal burnt
        burnt += HOUR
        return burnt

    lane = Lane("test", None, workers=workers)
    with ThreadLatch(virtual_loop()) as latch:
        calls = [asyncio.create_task(lane.call(latch.wait)) for _ in range(100)]
        await asyncio.sleep(TICK / 2)
        monkeypatch.setattr(clock, "cpu_time", cpu_time)
        await asyncio.sleep(4 * TICK)
        assert lane.limit < LEAST_PLACES * (1 + GROWTH) ** 3
        latch.open()
        await asyncio.gather(*calls)


def test_what_threads_burnt_before_they_were_looked_at_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are shared: other lanes, or this one long ago, may have computed for hours. Nor do threads that ended."""
    now = 0.0
    used: dict[int, float | None] = {1: 1000.0, 2: 7.0, 3: 5.0}
    books: Any = object()
    threads = [SimpleNamespace(cpu_clock=number, call=SimpleNamespace(crossing=books)) for number in (1, 2, None)]
    threads.append(SimpleNamespace(cpu_clock=3, call=None))  # it works for others, or for nobody
    monkeypatch.setattr(clock, "steady", lambda: now)
    monkeypatch.setattr(clock, "cpu_time", used.get)
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    burnt = module._BurntCpu(SimpleNamespace(threads=threads), books)  # type: ignore[arg-type]
    assert burnt.share() == 0, "no time has gone by"
    now, used[1], used[3] = 1.0, 1000.5, 6.0
    assert burnt.share() == 0.25
    now, used[1], used[2] = 2.0, None, 8.0
    assert burnt.share() == 0.5
    now, used[2] = 3.0, 80.0
    assert burnt.share() == 1


@pytest.mark.virtual_clock
async def test_a_lane_that_is_new_grows_though_the_shared_threads_have_computed_before(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Lane("old", 1, workers=workers)
    assert await old.call(int) == 0
    (worker,) = workers.threads
    monkeypatch.setattr(clock, "cpu_time", lambda cpu_clock: HOUR if cpu_clock == worker.cpu_clock else 0.0)
    lane = Lane("test", None, workers=workers)
    with ThreadLatch(virtual_loop()) as latch:
        calls = [asyncio.create_task(lane.call(latch.wait)) for _ in range(10)]
        await asyncio.sleep(1.5 * TICK)
        assert lane.limit > LEAST_PLACES
        latch.open()
        await asyncio.gather(*calls)


async def test_an_executor_without_a_number_of_threads_makes_as_many_as_it_needs() -> None:
    """In real time: thirty calls that meet at a barrier, which lets nobody through until all are there."""
    barrier = threading.Barrier(30, timeout=BOUND)
    async with asyncio.timeout(BOUND), Executor() as executor:
        assert sorted(await asyncio.gather(*[executor.to_thread(barrier.wait) for _ in range(30)])) == list(range(30))
        statistics = executor.statistics().threads
        assert statistics is not None
        assert statistics.limit >= 30


async def test_the_threads_of_a_set_say_what_they_burn() -> None:
    """In real time: one that computes is seen, one that waits is not."""
    workers = Workers(2)
    lane = Lane("test", 2, workers=workers)
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    call = asyncio.create_task(lane.call(compute))
    burnt = module._BurntCpu(workers, lane.books)
    while not any(isinstance(thread, Worker) and thread.cpu_clock is not None for thread in workers.threads):
        await asyncio.sleep(0.001)
    burnt.share()
    async with asyncio.timeout(BOUND):
        while burnt.share() < 0.2:
            await asyncio.sleep(0.05)
        stop.set()
        await call
        while burnt.share() > 0.2:
            await asyncio.sleep(0.05)
    workers.dismiss()
