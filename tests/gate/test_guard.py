"""The guard of an event loop: less is started while the loop lags or memory is short, and everything comes back."""

import asyncio
import gc
import logging
import time
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Adaptive, DeadlockError, Gate
from penstock.gate.guard import LINGER, WATCH, WORTH_A_WARNING, Guard, guard_of
from penstock.gate.guard_rule import (
    BACK,
    BEAT,
    CALM,
    CUT,
    LAGS,
    LAST_MARK,
    LEAST_AVAILABLE,
    LEAST_BEATS,
    LEAST_IN_FLIGHT,
    LOOK,
    MARK,
    PATIENCE,
    RECOVERY,
    STEP,
    WINDOW,
    LoadRule,
    MemoryRule,
)
from penstock.memory import MemoryUse
from penstock.testing import VirtualClockLoop, run_in_virtual_time

ALLOWED = 1 << 30
BLOCKED = 0.15
"""Seconds of real time for which a callback holds a loop up."""


def used(share: float, available: float = 1.0) -> MemoryUse:
    return MemoryUse(int(share * ALLOWED), ALLOWED, int(available * ALLOWED))


class Beats:
    """A loop that is late by what the test says."""

    def __init__(self, total: int = 1000) -> None:
        self.rule = LoadRule()
        self.total = total
        self.now = 100.0

    def late(self, lag: float, *, seconds: float = BEAT, short: bool = False) -> float:
        """Each beat, for so long; the share then."""
        end = self.now + seconds
        while self.now < end - BEAT / 2:
            self.now += BEAT + lag
            self.rule.beat(self.now, lag, self.total, short=short)
        return self.rule.share


# --- the rule of the lag ---


def test_a_loop_in_time_may_use_all_of_its_limits() -> None:
    beats = Beats()
    assert beats.late(0.004, seconds=60) == 1.0
    assert not beats.rule.lagging


def test_a_loop_that_lags_starts_a_fifth_less_each_second_as_long_as_it_lasts() -> None:
    """And not sooner than there are beats enough for a median."""
    beats = Beats()
    beats.late(0.03, seconds=(LEAST_BEATS - 1) * (BEAT + 0.03))
    assert not beats.rule.lagging
    assert beats.late(0.03) == CUT
    assert beats.rule.lagging
    assert beats.late(0.03, seconds=3 * WINDOW + 2 * BEAT) == pytest.approx(CUT**4)


def test_one_long_lag_is_a_pause() -> None:
    """It cuts nothing, but for a second no limit may grow."""
    beats = Beats()
    beats.late(0.0, seconds=5)
    assert beats.late(0.2) == 1.0
    assert beats.late(0.0, seconds=WINDOW - 2 * BEAT) == 1.0
    assert beats.rule.lagging
    beats.late(0.0, seconds=4 * BEAT)
    assert not beats.rule.lagging


def test_a_long_lag_among_others_that_are_not_short_cuts() -> None:
    beats = Beats()
    beats.late(CALM + 0.001, seconds=5)
    assert beats.late(0.2) == CUT


def test_each_long_lag_cuts_where_a_second_has_no_other() -> None:
    """A loop that turns once in two seconds."""
    beats = Beats()
    beats.late(0.0, seconds=5)
    assert beats.late(2.0, seconds=3 * (BEAT + 2.0)) == pytest.approx(CUT**3)


def test_two_long_lags_within_a_second_count_for_a_second() -> None:
    """They cut once, no limit grows meanwhile, and it is given back afterwards."""
    beats = Beats()
    beats.late(0.0, seconds=5)
    beats.late(0.2)
    assert beats.late(0.2) == CUT
    assert beats.late(0.0, seconds=WINDOW - 2 * BEAT) == CUT
    assert beats.rule.lagging
    beats.late(0.0, seconds=4 * BEAT)
    assert not beats.rule.lagging
    assert beats.late(0.0, seconds=(1 - CUT) / RECOVERY) == 1.0


def test_a_tenth_of_the_whole_comes_back_each_second() -> None:
    beats = Beats()
    low = beats.late(0.03, seconds=5)
    beats.late(0.0, seconds=WINDOW)  # until the last of it is forgotten
    before = beats.rule.share
    assert before < low + RECOVERY * WINDOW
    assert beats.late(0.0, seconds=2) == pytest.approx(before + 2 * RECOVERY)


def test_the_nearer_the_lag_is_to_one_that_cuts_the_slower_it_comes_back() -> None:
    """A little late, it comes back nevertheless: no share is kept for ever."""
    low = None
    came_back = []
    for lag in (CALM, (CALM + LAGS) / 2, LAGS):
        beats = Beats()
        beats.late(0.03, seconds=8)
        beats.late(lag, seconds=2 * WINDOW)
        low = beats.rule.share
        came_back.append(beats.late(lag, seconds=2) - low)
    assert came_back == pytest.approx([2 * RECOVERY, RECOVERY, 0.0], abs=RECOVERY * 2 * (BEAT + LAGS))
    beats = Beats()
    beats.late(0.03, seconds=8)
    assert beats.late(0.01, seconds=60) == 1.0


def test_a_pause_each_minute_does_not_hold_the_share_down() -> None:
    """Nor does one of more than a second, though it cuts."""
    for pause in (0.3, 1.5):
        beats = Beats()
        for _ in range(30):
            beats.late(pause)
            beats.late(0.008, seconds=60)
            assert beats.rule.share == 1.0


def test_time_without_a_beat_counts_as_calm() -> None:
    """Nothing was started meanwhile."""
    beats = Beats()
    beats.late(0.03, seconds=10)
    beats.now += 3600
    assert beats.late(0.0) == 1.0


def test_a_few_round_trips_are_never_cut() -> None:
    beats = Beats(total=LEAST_IN_FLIGHT)
    assert beats.late(0.5, seconds=60) == 1.0
    beats = Beats(total=1000)
    assert beats.late(0.5, seconds=60) == LEAST_IN_FLIGHT / 1000
    beats.total = 100
    assert beats.late(0.5) == LEAST_IN_FLIGHT / 100
    beats.total = 0
    assert beats.late(0.5, seconds=10) > 0


def test_memory_that_is_short_cuts_like_a_lag() -> None:
    beats = Beats()
    assert beats.late(0.0, short=True) == CUT
    assert beats.late(0.0, seconds=2 * WINDOW + 2 * BEAT, short=True) == pytest.approx(CUT**3)
    assert beats.late(0.0, seconds=30) == 1.0
    assert not beats.rule.lagging


@given(
    lags=st.lists(
        st.tuples(st.floats(0, 5), st.floats(0, 100), st.integers(0, 10_000), st.booleans()), min_size=1, max_size=80
    )
)
def test_the_share_stays_within_its_bounds(lags: list[tuple[float, float, int, bool]]) -> None:
    """And never lets fewer than 16 round trips be in flight, on its own account."""
    rule, now = LoadRule(), 0.0
    for lag, pause, total, short in lags:
        now += BEAT + lag + pause
        rule.beat(now, lag, total, short=short)
        assert 0 < rule.share <= 1
        assert rule.share * total >= min(total, LEAST_IN_FLIGHT) - 1e-9


# --- the rule of the memory ---


def test_memory_is_short_from_a_mark_on_until_enough_has_come_back() -> None:
    rule = MemoryRule()
    assert rule.room is None
    rule.look(1, used(0.79))
    assert not rule.short
    assert rule.room == pytest.approx(MARK - 0.79)
    rule.look(2, used(0.81))
    assert rule.short
    assert rule.room == 0
    assert rule.since == 2
    rule.look(3, used(MARK - BACK + 0.01))
    assert rule.short
    rule.look(4, used(MARK - BACK - 0.01))
    assert not rule.short


def test_it_is_short_too_when_others_have_left_nothing() -> None:
    """Until they have given back twice that."""
    rule = MemoryRule()
    rule.look(1, used(0.1, LEAST_AVAILABLE - 0.01))
    assert rule.short
    assert rule.by_others
    rule.look(2, used(0.1, LEAST_AVAILABLE + 0.01))
    assert rule.short
    rule.look(3, used(0.75, 2 * LEAST_AVAILABLE + 0.01))
    assert not rule.short


def test_what_never_comes_back_is_taken_for_the_programs_own() -> None:
    """Nothing new for a time: the mark moves up, though not to the end, and down again with what is used."""
    rule = MemoryRule()
    rule.look(0, used(0.85))
    rule.look(PATIENCE - 1, used(0.82))
    rule.look(PATIENCE, used(0.815))  # less than a percent is no news
    assert rule.short
    rule.look(2 * PATIENCE - 1, used(0.82))
    assert not rule.short
    assert rule.mark == pytest.approx(0.82 + STEP)
    rule.look(31, used(0.85))
    assert not rule.short
    rule.look(32, used(0.87))
    assert rule.short
    rule.look(33, used(0.5))
    assert not rule.short
    assert rule.mark == MARK


def test_there_is_a_last_mark() -> None:
    rule = MemoryRule()
    rule.look(0, used(LAST_MARK - 0.001))
    rule.look(PATIENCE, used(LAST_MARK - 0.001))
    assert not rule.short
    assert rule.mark == LAST_MARK
    rule.look(20, used(LAST_MARK + 0.01))
    rule.look(20 + 100 * PATIENCE, used(LAST_MARK + 0.01))
    assert rule.short


@given(looks=st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1.1), st.floats(0, 1)), min_size=1, max_size=60))
def test_memory_is_never_overlooked(looks: list[tuple[float, float, float]]) -> None:
    """Whatever came before: beyond the last mark it is short, and with plenty of both it is not."""
    rule, now = MemoryRule(), 0.0
    for pause, share, available in looks:
        now += pause
        rule.look(now, used(share, available))
        assert MARK <= rule.mark <= LAST_MARK
        if share > LAST_MARK or available < LEAST_AVAILABLE:
            assert rule.short
        if share < MARK - BACK and available > 2 * LEAST_AVAILABLE + 1e-6:  # it is told whole bytes
            assert not rule.short


# --- the heartbeat ---


class Fake:
    """A gate, as the guard sees it."""

    def __init__(self, total: int = 1000) -> None:
        self.total = total
        self.beats: list[tuple[float, float, bool]] = []

    def beat(self, share: float, lag: float, lagging: bool) -> None:
        self.beats.append((share, lag, lagging))

    def total_limit(self) -> int:
        return self.total


class Broken(Fake):
    """One that cannot be asked, or told."""

    def __init__(self, *, asked: bool) -> None:
        super().__init__()
        self.asked = asked

    def beat(self, share: float, lag: float, lagging: bool) -> None:
        super().beat(share, lag, lagging)
        raise RuntimeError("told")

    def total_limit(self) -> int:
        if self.asked:
            raise RuntimeError("asked")
        return 0


class Machine:
    """Memory as the test says."""

    def __init__(self, share: float = 0.1) -> None:
        self.share: float | None = share
        self.looks = 0

    def __call__(self) -> MemoryUse | None:
        self.looks += 1
        return None if self.share is None else used(self.share)


@pytest.fixture
async def guard() -> Guard:
    guard = guard_of(asyncio.get_running_loop())
    guard.look = Machine()
    return guard


async def stir_for(guard: Guard, seconds: float) -> None:
    """Start something again and again."""
    for _ in range(round(seconds / BEAT)):
        guard.stir()
        await asyncio.sleep(BEAT)


async def late_beat(guard: Guard, lag: float) -> None:
    """The next beat comes late by so much, on a clock that only the test moves."""
    guard.stir()
    guard._due -= lag
    await asyncio.sleep(BEAT)


@pytest.mark.virtual_clock
async def test_each_start_keeps_the_heart_beating_and_without_one_it_stops(guard: Guard) -> None:
    """Soon after the last one."""
    gate = Fake()
    guard.add(gate)
    guard.add(gate)
    assert guard.quiet
    await asyncio.sleep(1)
    assert gate.beats == []
    guard.stir()
    guard.stir()
    assert not guard.quiet
    await asyncio.sleep(10)
    beats = len(gate.beats)
    assert beats * BEAT == pytest.approx(LINGER + BEAT, abs=1.1 * BEAT)
    assert set(gate.beats) == {(1.0, 0.0, False)}
    assert guard.total == 1000
    await stir_for(guard, 5.0)
    assert len(gate.beats) == pytest.approx(beats + round(5.0 / BEAT), abs=1)


def test_a_virtual_clock_finds_out_that_an_attempt_hangs_for_ever() -> None:
    """A heartbeat that went on would keep it alive."""

    async def main() -> None:
        guard_of(asyncio.get_running_loop()).stir()
        await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlockError):
        run_in_virtual_time(main())


@pytest.mark.virtual_clock
async def test_it_beats_on_for_a_while_when_something_is_held_back(guard: Guard) -> None:
    """Or nobody would see that memory is back, while jobs wait for just that."""
    gate = Fake()
    guard.add(gate)
    guard.look = machine = Machine(0.95)
    guard.stir()
    await asyncio.sleep(WATCH / 2)
    assert gate.beats[-1] == (LEAST_IN_FLIGHT / 1000, 0.0, True)
    machine.share = 0.5
    await asyncio.sleep(LOOK + BEAT)
    assert gate.beats[-1][2] is False
    await asyncio.sleep(15)
    assert gate.beats[-1][0] == 1.0
    count = len(gate.beats)
    await asyncio.sleep(WATCH)
    assert len(gate.beats) == count, "nothing is held back any more"


@pytest.mark.virtual_clock
async def test_it_does_not_beat_for_ever_for_nothing(guard: Guard) -> None:
    """Memory may stay short, and nobody start anything."""
    gate = Fake()
    guard.add(gate)
    guard.look = machine = Machine(0.99)
    guard.stir()
    await asyncio.sleep(WATCH + 10 * BEAT)
    count = len(gate.beats)
    await asyncio.sleep(WATCH)
    assert len(gate.beats) == count
    machine.share = 0.1
    guard.stir()
    await asyncio.sleep(1)
    assert gate.beats[-1][2] is False


@pytest.mark.virtual_clock
async def test_memory_is_looked_at_four_times_a_second(guard: Guard) -> None:
    """And at once by who must know it now."""
    guard.look = machine = Machine()
    await stir_for(guard, 10.0)
    assert machine.looks == pytest.approx(10 / LOOK, abs=9)
    before = machine.looks
    assert guard.look_now() == ALLOWED
    assert machine.looks == before + 1
    machine.share = None
    assert guard.look_now() is None
    assert not guard.lagging


@pytest.mark.virtual_clock
async def test_short_memory_is_told_once_when_it_begins_and_once_when_it_is_over(
    guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    """With what is held back, and why."""
    guard.look = machine = Machine(0.85)
    with caplog.at_level(logging.INFO, "penstock.gate"):
        await stir_for(guard, 3.0)
        machine.share = 0.3
        await stir_for(guard, 3.0)
    began, over = caplog.records
    assert began.levelno == logging.WARNING
    assert "holds 870 MiB of the 1024 MiB" in began.getMessage()
    assert "executors without a limit= start a job only while fewer than 16 run" in began.getMessage()
    assert "It is over below 70%." in began.getMessage()
    assert over.levelno == logging.INFO
    assert "not short any more after 3." in over.getMessage()


@pytest.mark.virtual_clock
async def test_short_memory_is_told_apart_when_it_is_the_work_of_others(
    guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    guard.look = lambda: MemoryUse(1 << 30, 20 << 30, 0)
    guard.look_now()
    assert "holds 1024 MiB of the 20.0 GiB" in caplog.text
    assert "It is over when others have given some back" in caplog.text
    assert guard.lagging


@pytest.mark.virtual_clock
async def test_a_loop_that_goes_on_lagging_is_told_once_and_once_when_it_is_over(
    guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as the gates use less than half of their limits, not before; each time anew."""
    gate = Fake()
    guard.add(gate)
    loop = asyncio.get_running_loop()
    with caplog.at_level(logging.INFO, "penstock.gate"):
        for _ in range(2):
            while guard.share >= WORTH_A_WARNING:
                assert not caplog.records
                await late_beat(guard, 0.03)
            for _ in range(40):
                await late_beat(guard, 0.03)
            began = loop.time()
            await stir_for(guard, 12.0)
            warning, over = caplog.records
            assert warning.levelno == logging.WARNING
            assert "the event loop lags by 30 ms" in warning.getMessage()
            assert "gates use 41 % of their limits" in warning.getMessage()
            assert over.levelno == logging.INFO
            assert "does not lag any more after " in over.getMessage()
            assert guard.share == 1.0
            assert loop.time() - began < 13
            caplog.clear()


@pytest.mark.virtual_clock
async def test_a_lag_is_not_told_where_no_gate_is_in_use_or_memory_is_the_reason(
    guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Fake(total=0)
    guard.add(gate)
    for _ in range(200):
        await late_beat(guard, 0.03)
    assert guard.share < WORTH_A_WARNING
    await stir_for(guard, 15.0)
    gate.total = 1000
    guard.look = Machine(0.95)
    await stir_for(guard, 8.0)
    assert guard.share < WORTH_A_WARNING
    (record,) = caplog.records
    assert "memory is short" in record.getMessage()


@pytest.mark.virtual_clock
async def test_small_hiccups_do_not_keep_a_slow_service_from_being_measured(guard: Guard) -> None:
    """20 ms are nothing of two seconds, though nobody knows the baseline before the first cohort is judged."""
    gate = Gate("g", limit=Adaptive())

    async def trips() -> None:
        while True:
            await gate.call(asyncio.sleep, 2.0)

    tasks = [asyncio.ensure_future(trips()) for _ in range(8)]
    for _ in range(round(20 / BEAT)):
        await asyncio.sleep(BEAT)
        gate.beat(1.0, 0.02, False)
    assert gate.statistics()[None].baseline == pytest.approx(2.0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.virtual_clock
async def test_one_that_raises_does_not_keep_the_others_from_being_told(
    guard: Guard, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    """It is told on, and named in the log once."""
    before, broken, after = Fake(), Broken(asked=asked), Fake()
    for gate in (before, broken, after):
        guard.add(gate)
    await stir_for(guard, 1.0)
    assert len(before.beats) == len(broken.beats) == len(after.beats) >= 19
    (record,) = caplog.records
    assert "Broken" in record.getMessage()
    assert record.exc_info is not None
    assert guard.total == 2000


@pytest.mark.virtual_clock
async def test_gates_are_told_in_the_order_in_which_they_came_while_they_are_there(guard: Guard) -> None:
    """So a virtual clock takes the same way every time. One that leaves, or that nobody holds, is told no more."""
    told: list[int] = []

    class Numbered(Fake):
        def beat(self, share: float, lag: float, lagging: bool) -> None:
            told.append(self.total)

    gates = [Numbered(number) for number in range(5)]
    for gate in gates:
        guard.add(gate)
    guard.stir()
    await asyncio.sleep(BEAT)
    assert told == [0, 1, 2, 3, 4]
    guard.remove(gates[1])
    guard.remove(gates[1])
    del gates[3], gate
    told.clear()
    guard.stir()
    await asyncio.sleep(BEAT)
    assert told == [0, 2, 4]
    guard.remove(gates[0])


def test_the_guard_keeps_no_loop_alive() -> None:
    """Neither does a loop that was left in the middle of a beat."""
    loop = VirtualClockLoop()
    guard = guard_of(loop)
    assert guard_of(loop) is guard
    loop.call_soon(guard.stir)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None


async def test_a_loop_that_is_blocked_is_noticed() -> None:
    """Really: by how much it was late, and with what consequence."""
    guard = guard_of(asyncio.get_running_loop())
    gate = Fake()
    guard.add(gate)
    guard.stir()
    loop = asyncio.get_running_loop()
    loop.call_later(BEAT / 2, time.sleep, BEAT + BLOCKED)
    until = loop.time() + 10
    while len(gate.beats) < 1 and loop.time() < until:
        await asyncio.sleep(0.01)
    share, lag, lagging = gate.beats[0]
    assert lag >= BLOCKED - 0.05
    assert lagging
    assert share == CUT, "there was no other beat that was in time"
