"""How many jobs run when nobody says how many: as many as keep the gates busy and fit in the memory."""

import asyncio
import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Executor, Gate, UsageError, WrongThread
from penstock.executor.feed import ITEMS_FOR_EACH_SLOT
from penstock.executor.job_limit import (
    BYTES_FOR_EACH_JOB,
    FALL,
    FLOOR,
    JOBS_FOR_EACH_PERMIT,
    LEAST,
    REGROWTH,
    SHARE_OF_MEMORY,
    SMALLEST_GROWTH,
    SPARE,
    JobRule,
)
from penstock.gate.guard import Guard, guard_of
from penstock.gate.guard_rule import BEAT, LOOK, MARK
from penstock.memory import MemoryUse
from penstock.testing import SimulatedService, lognormal

GIB = 1 << 30
AT_MOST = 64 * GIB


class Jobs:
    """An executor, as far as the rule sees it; the memory by the share that its jobs take."""

    def __init__(self, allowed: int | None = AT_MOST, *, program: float = 0.1, each: float = 0.0) -> None:
        self.rule = JobRule(allowed)
        self.program = program
        self.each = each
        self.running = 0
        self.now = 50.0

    @property
    def used(self) -> float:
        return self.program + self.running * self.each

    def beat(self, total: int = 0, *, short: bool = False) -> int:
        self.now += BEAT
        room = max(0.0, MARK - self.used)
        return self.rule.beat(self.now, total, self.running, self.used, room, looked_at=self.now, short=short)

    def beats(self, seconds: float, total: int) -> int:
        """While there is always more to do."""
        for _ in range(round(seconds / BEAT)):
            self.running = max(self.running, self.beat(total))
        return self.rule.limit


# --- the rule ---


def test_jobs_that_use_no_gate_are_256() -> None:
    assert Jobs().beat() == LEAST


def test_each_permit_has_four_jobs_and_there_are_some_to_spare() -> None:
    """At once: a gate grows as long as its limit is used."""
    assert Jobs().beat(1000) == JOBS_FOR_EACH_PERMIT * 1000 + SPARE
    assert Jobs().beat(20) == LEAST


def test_keys_that_are_not_in_use_for_a_moment_take_little_away() -> None:
    jobs = Jobs()
    many = jobs.beat(1000)
    assert jobs.beat(0) == int(many * (1 - FALL))
    assert jobs.beat(1000) == many
    assert jobs.beats(5, total=0) == LEAST


def test_there_are_never_more_than_a_quarter_of_the_memory_can_hold() -> None:
    """By what each takes at the least."""
    most = GIB * SHARE_OF_MEMORY // BYTES_FOR_EACH_JOB
    assert Jobs(GIB).beat(1_000_000) == most
    assert Jobs(1 << 20).beat(1_000_000) == LEAST


def test_where_nobody_knows_of_the_memory_it_bounds_nothing() -> None:
    rule = JobRule(None)
    assert (
        rule.beat(1.0, 1_000_000, 5, None, None, looked_at=None, short=False)
        == JOBS_FOR_EACH_PERMIT * 1_000_000 + SPARE
    )


def test_jobs_that_are_measured_to_be_large_are_begun_only_as_long_as_they_fit() -> None:
    """Half of what is left at a time: the memory never gets short, and most of it is used."""
    jobs = Jobs(each=0.001)
    jobs.beat()
    jobs.running = 100
    limit = jobs.beats(60, total=10_000)
    assert jobs.used < MARK
    assert jobs.used > MARK - 0.1
    assert limit < 800


def test_what_the_program_collects_does_not_keep_jobs_from_being_added() -> None:
    """By and by, since what has grown may not be theirs. Only when nothing is left, none is added."""
    jobs = Jobs()
    jobs.running = 20
    jobs.beat()
    jobs.program = MARK - 0.1
    for _ in range(30):
        jobs.program += 0.001  # each look finds something else
        jobs.running = jobs.beat(1000)
    assert jobs.running > 60
    jobs.program = MARK
    assert jobs.beat(1000) == jobs.running


def test_memory_that_stands_still_is_looked_at_again() -> None:
    """More jobs run in as much: they take less each than they were measured to take."""
    rule, room = JobRule(AT_MOST), MARK - 0.3
    rule.beat(1.0, 1000, 0, 0.1, MARK - 0.1, looked_at=1.0, short=False)
    first = rule.beat(2.0, 1000, 300, 0.3, room, looked_at=2.0, short=False)
    assert rule.beat(2.1, 1000, first, 0.3, room, looked_at=2.0, short=False) == first, "nothing new is known"
    assert rule.beat(3.0, 1000, first, 0.3, room, looked_at=3.0, short=False) > 1.5 * first


def test_growth_that_may_be_anything_says_nothing_about_jobs() -> None:
    jobs = Jobs()
    jobs.beat()
    jobs.running = 5
    jobs.program += SMALLEST_GROWTH - 0.001
    assert jobs.beat(1000) == JOBS_FOR_EACH_PERMIT * 1000 + SPARE


def test_what_is_used_when_there_are_no_jobs_is_not_theirs() -> None:
    jobs = Jobs()
    jobs.beat()
    jobs.program = 0.5
    jobs.beat()
    jobs.running, jobs.each = 10, 0.001
    assert jobs.beat(1000) == JOBS_FOR_EACH_PERMIT * 1000 + SPARE


def test_short_memory_leaves_sixteen_jobs_and_then_half_of_what_ran_and_a_tenth_more_each_second() -> None:
    """Until that is as many as the gates want."""
    jobs = Jobs()
    jobs.running = 1000
    jobs.beat(1000)
    assert jobs.beat(1000, short=True) == FLOOR
    jobs.running = 300
    assert jobs.beat(1000, short=True) == FLOOR
    half = jobs.beat(1000)
    assert half == pytest.approx(500, rel=REGROWTH * BEAT + 0.01)
    for _ in range(round(1 / BEAT)):
        jobs.beat(1000)
    assert jobs.rule.limit == pytest.approx(half * (1 + REGROWTH), rel=0.02)
    for _ in range(round(30 / BEAT)):
        jobs.beat(1000)
    assert jobs.rule.limit == JOBS_FOR_EACH_PERMIT * 1000 + SPARE
    assert jobs.beat(2000) == JOBS_FOR_EACH_PERMIT * 2000 + SPARE


def test_after_short_memory_there_are_at_least_sixteen_jobs() -> None:
    jobs = Jobs()
    jobs.running = 3
    jobs.beat(short=True)
    assert jobs.beat() == FLOOR


@given(
    allowed=st.none() | st.integers(1, 1 << 45),
    beats=st.lists(
        st.tuples(
            st.floats(0, 1000), st.integers(0, 1 << 30), st.integers(0, 1 << 20), st.none() | st.floats(0, 1.2),
            st.booleans(),
        ),
        max_size=60,
    ),
)  # fmt: skip
def test_it_stays_within_its_bounds(
    allowed: int | None, beats: list[tuple[float, int, int, float | None, bool]]
) -> None:
    """Whatever is measured: never below 16, and not above what keeps the gates busy or what fits."""
    rule, now = JobRule(allowed), 0.0
    most = float("inf") if allowed is None else max(LEAST, allowed * SHARE_OF_MEMORY / BYTES_FOR_EACH_JOB)
    highest = 0
    for pause, total, running, used, short in beats:
        now += pause
        highest = max(highest, total)
        room = None if used is None else max(0.0, MARK - used)
        limit = rule.beat(now, total, running, used, room, looked_at=now, short=short)
        assert FLOOR <= limit <= min(most, max(LEAST, JOBS_FOR_EACH_PERMIT * highest + SPARE))
        assert not short or limit == FLOOR


# --- executors ---


class Fake:
    """A gate whose keys in use have so many permits."""

    def __init__(self, total: int) -> None:
        self.total = total

    def beat(self, share: float, lag: float, lagging: bool) -> None:
        """It does not care."""

    def total_limit(self) -> int:
        return self.total


class Machine:
    """Memory as the test says."""

    def __init__(self) -> None:
        self.share = 0.1

    def __call__(self) -> MemoryUse:
        return MemoryUse(int(self.share * AT_MOST), AT_MOST, AT_MOST)


@pytest.fixture
async def machine(guard: Guard) -> Machine:
    machine = Machine()
    guard.look = machine
    return machine


@pytest.fixture
async def guard() -> Guard:
    return guard_of(asyncio.get_running_loop())


class Counted:
    """A job that takes a while, and how many of it run at once."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.running = self.most = self.ended = 0

    async def __call__(self, _item: object = None) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
            self.ended += 1


@pytest.mark.virtual_clock
async def test_jobs_follow_the_gates_of_their_loop_within_two_beats(guard: Guard, machine: Machine) -> None:
    """And the limit, the statistics and the window of a stream are those of the moment."""
    gate = Fake(500)
    guard.add(gate)
    job = Counted()
    async with Executor() as executor, executor.as_completed(job, itertools.count()) as stream:
        assert executor.limit == LEAST
        await asyncio.sleep(BEAT / 2)
        assert job.running == LEAST
        await asyncio.sleep(2 * BEAT)
        assert executor.limit == executor.statistics().limit == JOBS_FOR_EACH_PERMIT * 500 + SPARE == job.running
        assert f"limit={executor.limit}" in repr(executor)
        await asyncio.sleep(10)
        assert stream.statistics().read == ITEMS_FOR_EACH_SLOT * executor.limit, "a reader that reads nothing"


@pytest.mark.virtual_clock
async def test_the_window_of_a_stream_that_was_given_stays(guard: Guard, machine: Machine) -> None:
    gate = Fake(500)
    guard.add(gate)
    async with Executor() as executor, executor.as_completed(Counted(), itertools.count(), buffersize=10) as stream:
        await asyncio.sleep(5)
        assert executor.limit > LEAST
        assert stream.statistics().read == 10


@pytest.mark.virtual_clock
async def test_a_window_that_has_become_smaller_lets_nothing_more_in(machine: Machine) -> None:
    """Until so much has been read."""
    async with Executor(limit=10) as executor, executor.as_completed(Counted(), itertools.count()) as stream:
        await asyncio.sleep(5)
        executor.limit = 2
        for _ in range(20 - ITEMS_FOR_EACH_SLOT * 2):
            await anext(stream)
        await asyncio.sleep(5)
        assert stream.statistics().read == 20
        for _ in range(2):
            await anext(stream)
        await asyncio.sleep(5)
        assert stream.statistics().read == 22


@pytest.mark.virtual_clock
async def test_no_job_is_begun_beyond_sixteen_while_memory_is_short(machine: Machine) -> None:
    """Those that run go on; when it is back, half as many may run as did."""
    job = Counted(0.5)
    async with Executor() as executor, executor.as_completed(job, range(2000)) as stream:
        reading = asyncio.ensure_future(_read(stream.__anext__, 2000))
        await asyncio.sleep(0.3)
        machine.share = 0.9
        await asyncio.sleep(LOOK + BEAT)
        assert executor.limit == FLOOR
        await asyncio.sleep(1)
        job.most = 0
        await asyncio.sleep(3)
        assert job.most == FLOOR
        machine.share = 0.1
        await asyncio.sleep(LOOK + 2 * BEAT)
        assert LEAST / 2 <= job.running <= LEAST * 0.6
        await reading
        assert job.ended == 2000


async def _read(read: Callable[[], object], count: int) -> None:
    for _ in range(count):
        await read()  # type: ignore[misc]


@pytest.mark.virtual_clock
async def test_jobs_that_wait_for_memory_begin_when_it_is_back_though_nothing_ends_meanwhile(machine: Machine) -> None:
    """More than sixteen long jobs run and keep every further one waiting."""
    job = Counted(50.0)
    async with Executor() as executor:
        futures = [executor.submit(job) for _ in range(40)]
        await asyncio.sleep(1)  # the heart beats no more
        executor.limit = 20
        futures += [executor.submit(job) for _ in range(10)]
        machine.share = 0.9
        executor.limit = None
        await asyncio.sleep(2)
        before = job.running
        assert executor.limit == FLOOR
        machine.share = 0.1
        await asyncio.sleep(15)
        assert (before, job.running) == (40, 50), "half of them at first, then a tenth more each second"
        await asyncio.gather(*futures)


@pytest.mark.virtual_clock
async def test_memory_that_is_short_already_is_known_before_the_first_job(machine: Machine) -> None:
    machine.share = 0.9
    job = Counted()
    async with Executor() as executor:
        assert executor.limit == FLOOR
        await executor.map(job, range(100))
    assert job.most == FLOOR


@pytest.mark.virtual_clock
async def test_a_number_is_kept_whatever_the_gates_and_the_memory_say(guard: Guard, machine: Machine) -> None:
    gate = Fake(500)
    guard.add(gate)
    machine.share = 0.9
    job = Counted()
    async with Executor(limit=30) as executor:
        guard.stir()
        await executor.map(job, range(100))
        assert executor.limit == executor.statistics().limit == 30
    assert job.most == 30


@pytest.mark.virtual_clock
async def test_the_limit_can_be_set_while_jobs_run(guard: Guard, machine: Machine) -> None:
    """More begin at once, or none until enough have ended; None measures again."""
    gate = Fake(200)
    guard.add(gate)
    job = Counted()
    executor = Executor(limit=10)
    executor.limit = 5
    assert executor.limit == 5
    async with executor, executor.as_completed(job, itertools.count()) as stream:
        await asyncio.sleep(0.5)
        assert job.running == 5
        executor.limit = 8
        await asyncio.sleep(0.1)
        assert job.running == 8
        executor.limit = 2
        await asyncio.sleep(0.1)
        assert job.running == 8
        reading = asyncio.ensure_future(_read(stream.__anext__, 10_000))
        await asyncio.sleep(2)
        assert job.running == 2
        executor.limit = executor_limit = 8
        assert executor.limit == executor_limit
        for _ in range(2):
            executor.limit = None
        await asyncio.sleep(1 + 2 * BEAT)
        assert executor.limit == JOBS_FOR_EACH_PERMIT * 200 + SPARE
        assert job.running == executor.limit
        executor.limit = 7
        gate.total = 1000
        await asyncio.sleep(1.5)
        assert job.running == executor.limit == 7
        reading.cancel()
        await asyncio.wait([reading])
    executor.limit = None
    assert executor.limit == 7, "there is nothing left to measure"


@pytest.mark.parametrize("limit", [0, -1, 1.5, "8", True], ids=repr)
async def test_what_is_no_number_of_jobs_is_refused(limit: object) -> None:
    async with Executor(limit=3) as executor:
        with pytest.raises(UsageError, match="limit="):
            executor.limit = limit  # type: ignore[assignment]
        assert executor.limit == 3


async def test_a_thread_sets_the_limit_on_the_loop() -> None:
    """It can be read there."""
    async with Executor(limit=3) as executor:

        def in_thread() -> int:
            with pytest.raises(WrongThread, match="from_thread"):
                executor.limit = 4
            executor.from_thread(setattr, executor, "limit", 5)
            return executor.limit

        assert await executor.to_thread(in_thread) == 5


@pytest.mark.virtual_clock
async def test_an_executor_that_is_closed_is_measured_no_more(guard: Guard, machine: Machine) -> None:
    gate = Fake(200)
    guard.add(gate)
    async with Executor() as executor:
        await executor.map(Counted(0.1), range(3))
        before = executor.limit
    gate.total = 1000
    guard.stir()
    await asyncio.sleep(1)
    assert executor.limit == before


# --- with gates that measure, too ---


@pytest.mark.virtual_clock
async def test_a_cold_start_without_any_number_reaches_a_knee_of_400_within_three_seconds(machine: Machine) -> None:
    """256 jobs are enough for a gate to find out that it wants more, and then there are more jobs."""
    service = SimulatedService(servers=280, service_time=lognormal(0.07, 0.2), path=0.03, seed=1)  # 4,000 a second
    gate = Gate("g")

    async def job(_: int) -> None:
        await gate.call(service.call)

    loop = asyncio.get_running_loop()
    began, late = loop.time(), 0
    async with Executor() as executor, executor.as_completed(job, itertools.count()) as stream:
        async for _ in stream:
            late += loop.time() >= began + 3
            if loop.time() >= began + 3.5:
                break
        assert executor.limit > 1000
    assert late > 0.9 * 0.5 * 4000


async def test_a_loop_that_jobs_block_has_fewer_round_trips_in_flight() -> None:
    """Really: the gate says that the guard has cut its limit, and gets it back."""
    gate = Gate("g", limit=100)
    blocks = 3

    async def trip() -> None:
        await asyncio.sleep(0.2)

    async def job(_: int) -> None:
        nonlocal blocks
        await gate.call(trip)
        if blocks == 3:
            while blocks:
                blocks -= 1
                await asyncio.sleep(0.06)
                time.sleep(0.25)  # noqa: ASYNC251  # the mistake that the guard is there for

    async with Executor() as executor, executor.as_completed(job, itertools.count()) as stream:
        async with asyncio.timeout(20):
            async for _ in stream:
                if (low := gate.statistics()[None].limit) < 100:
                    break
            async for _ in stream:
                if gate.statistics()[None].limit > low:
                    break
