"""The other rules with which ours is compared do what their projects have published."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from rivals import (
    LEAST,
    MOST,
    RIVALS,
    START,
    Aimd,
    AimdLimiter,
    Attempt,
    Averages,
    CautiousLimiter,
    EnvoyLimiter,
    Gradient2Limiter,
    Port,
    SampleWindow,
    VegasLimiter,
)


def at_most_busy(rtt: float, limiter: Port, *, dropped: bool = False) -> Averages:
    """A window in which as many were in flight as may be."""
    return Averages(rtt, limiter.limit, dropped)


def vegas() -> VegasLimiter:
    """One that has seen a first window of 50 ms."""
    limiter = VegasLimiter(random.Random(1))
    limiter.learn_window(at_most_busy(0.05, limiter))
    return limiter


def envoy(rtt: float = 0.05) -> EnvoyLimiter:
    """One that has measured its least round-trip time, at 5 s."""
    limiter = EnvoyLimiter(0.0, random.Random(1))
    for _ in range(EnvoyLimiter.ENOUGH):
        limiter.learn(Attempt(5.0, rtt, 3, False))
    return limiter


@pytest.mark.parametrize("name", RIVALS)
def test_all_begin_alike_and_stay_within_the_same_bounds(name: str) -> None:
    """A lucky start, or a ceiling, is not to decide a comparison."""
    limiter = RIVALS[name].limiter(0.0, None, random.Random(1))
    rng = random.Random(2)
    now = 0.0
    seen = set()
    for _ in range(20_000):
        mark = limiter.started(now)
        now += rng.expovariate(100.0)
        limiter.ended(mark, now, rng.uniform(0.01, 0.1), dropped=rng.random() < 0.3)
        seen.add(limiter.limit)
    assert LEAST <= min(seen) <= START
    assert max(seen) <= MOST


def test_a_refusal_is_timed_though_the_gate_has_no_time_for_it() -> None:
    """In their libraries a dropped call has a round-trip time as well; that is a hole of theirs which is to show."""
    learnt: list[Attempt] = []

    class Listening(AimdLimiter):
        def learn(self, attempt: Attempt) -> None:
            learnt.append(attempt)

    limiter = Listening()
    first, second = limiter.started(1.0), limiter.started(1.5)
    limiter.ended(second, 1.75, None, dropped=True)
    limiter.ended(first, 2.0, 0.9, dropped=False)
    assert learnt == [Attempt(1.75, 0.25, 2, True), Attempt(2.0, 0.9, 1, False)]


def test_what_the_gate_ignores_is_no_sample() -> None:
    """A cancelled call neither raises nor lowers a limit, and is in flight no more."""
    limiter = Aimd().limiter(0.0, None, random.Random(1))
    for _ in range(100):
        assert limiter.ended(limiter.started(0.0), 1.0, None, dropped=False) is None
    assert limiter.limit == START
    limiter.started(2.0)
    assert limiter.ended(limiter.started(2.0), 2.1, 0.1, dropped=False) is None, "two of eight: nobody needs more"


def test_a_cap_is_kept() -> None:
    """What a server or a connector allows is not the rule's to decide."""
    limiter = AimdLimiter()
    limiter.cap(5, 0.0)
    limiter.learn(Attempt(1.0, 0.05, 8, False))
    assert limiter.limit == 5
    limiter.cap(None, 1.0)
    limiter.learn(Attempt(1.0, 0.05, 5, False))
    assert limiter.limit == 6


def test_a_window_lasts_a_second_and_has_ten_samples() -> None:
    """Netflix's WindowedLimit: the mean of a second, with its most in flight; fewer samples than ten are dropped."""
    window = SampleWindow()
    assert window.add(Attempt(0.0, 0.0625, 1, False)) is None, "a first window of one sample"
    for number in range(1, 10):
        assert window.add(Attempt(number / 10, 0.0625, number, number == 5)) is None
    assert window.add(Attempt(1.0, 0.0625, 3, False)) is None, "the second is not over"
    assert window.add(Attempt(1.01, 0.75, 3, False)) == Averages(0.125, 9, True)
    assert window.add(Attempt(5.0, 0.0625, 3, False)) is None, "one sample in four seconds"
    assert window.add(Attempt(9.0, 0.00005, 3, False)) is None, "quicker than any service"
    for _ in range(9):
        assert window.add(Attempt(5.5, 0.0625, 3, False)) is None
    assert window.add(Attempt(6.01, 0.0625, 3, False)) == Averages(0.0625, 3, False)


def test_gradient2_adds_a_fifth_of_a_queue_of_four_while_latency_is_level() -> None:
    """L = 0.8 L + 0.2 (L + 4)."""
    limiter = Gradient2Limiter()
    limiter.learn_window(at_most_busy(0.05, limiter))
    assert limiter._value == pytest.approx(START + 0.8)


def test_gradient2_halves_by_a_fifth_at_most() -> None:
    """g = clamp(1.5 long / short, 0.5, 1), and long follows as a mean of ten windows, then of six hundred."""
    limiter = Gradient2Limiter()
    limiter.set(100.0)
    for _ in range(9):
        limiter.learn_window(Averages(0.05, 0, False))
    assert limiter._value == 100.0, "nobody needs more than half of it"
    limiter.learn_window(Averages(0.55, 100, False))
    assert limiter.baseline == pytest.approx(0.1), "the tenth is the last of the plain mean"
    assert limiter._value == pytest.approx(0.8 * 100 + 0.2 * (0.5 * 100 + 4))
    limiter.learn_window(Averages(0.1 + 0.601, 0, False))
    assert limiter.baseline == pytest.approx(0.1 + 2 * 0.601 / 601)


def test_gradient2_is_not_moved_by_refusals() -> None:
    """It does not ask whether anything was dropped."""
    limiter = Gradient2Limiter()
    limiter.learn_window(at_most_busy(0.03, limiter, dropped=True))
    assert limiter._value == pytest.approx(START + 0.8)


def test_gradient2_forgets_a_long_latency_faster_when_it_is_twice_the_short_one() -> None:
    """Then the long one loses 5 % in each window."""
    limiter = Gradient2Limiter()
    for _ in range(10):
        limiter.learn_window(at_most_busy(0.5, limiter))
    limiter.learn_window(at_most_busy(0.05, limiter))
    assert limiter.baseline == pytest.approx(0.95 * (0.5 + 2 / 601 * (0.05 - 0.5)))


@pytest.mark.parametrize(
    ("queue", "change"),
    [(1, 12), (2, 12), (3, 2), (5, 2), (6, 0), (12, 0), (13, -2)],
)
def test_vegas_steps_by_the_logarithm_of_its_limit(queue: int, change: int) -> None:
    """queue <= log10 L: + 6 log10 L; below 3 log10 L: + log10 L; above 6 log10 L: - log10 L. Of 200 that is 2."""
    limiter = vegas()
    limiter.set(200.0)
    limiter.learn_window(Averages(0.05 / (1 - (queue - 0.5) / 200), 200, False))
    assert limiter.queue == queue
    assert limiter.limit == 200 + change


def test_vegas_takes_a_step_back_when_anything_was_dropped() -> None:
    """However many were in flight."""
    limiter = vegas()
    limiter.learn_window(Averages(0.06, 1, True))
    assert limiter.limit == START - 1


def test_vegas_does_not_grow_while_half_of_it_is_not_needed() -> None:
    """Else it would drift up."""
    limiter = vegas()
    limiter.learn_window(Averages(0.05, START // 2 - 1, False))
    assert limiter.limit == START


def test_vegas_takes_any_quicker_window_for_its_baseline_and_now_and_then_any_window() -> None:
    """A probe each 15 L to 30 L windows, at full load: why its baseline drifts."""
    limiter = vegas()
    limiter.learn_window(Averages(0.04, 0, False))
    assert limiter.baseline == 0.04
    windows = 0
    while limiter.baseline == 0.04:
        limiter.learn_window(Averages(0.5, 0, False))
        windows += 1
    assert limiter.baseline == 0.5
    assert 15 * START <= windows + 2 <= 30 * START


def test_aimd_goes_by_single_calls() -> None:
    """One more for each answer while half of it is in use; a tenth less for each drop, and for each that took 5 s."""
    limiter = AimdLimiter()
    limiter.set(100)
    limiter.learn(Attempt(1.0, 0.05, 50, False))
    assert limiter.limit == 101
    limiter.learn(Attempt(1.0, 0.05, 50, False))
    assert limiter.limit == 101, "less than half of it is in use"
    limiter.learn(Attempt(1.0, 0.05, 50, True))
    assert limiter.limit == 90
    limiter.learn(Attempt(1.0, 5.1, 50, False))
    assert limiter.limit == 81


def test_the_cautious_one_grows_by_one_for_as_many_answers_as_its_limit() -> None:
    """1/L for each answer, from nine tenths of it on; a drop takes a tenth, rounded down."""
    limiter = CautiousLimiter()
    limiter.learn(Attempt(1.0, 0.05, 7, False))
    assert limiter._value == pytest.approx(8.125)
    limiter.learn(Attempt(1.0, 0.05, 6, False))
    assert limiter._value == pytest.approx(8.125)
    limiter.learn(Attempt(1.0, 0.05, 1, True))
    assert limiter._value == 7


def test_envoy_measures_the_least_latency_at_three_in_flight_first_of_all() -> None:
    """The median of fifty is it; then the limit is what it was."""
    limiter = EnvoyLimiter(0.0, random.Random(1))
    assert limiter.limit == 3
    limiter.learn(Attempt(0.04, 0.05, 3, False))  # it began before
    for number in range(50):
        assert limiter.baseline is None
        limiter.learn(Attempt(1.0, 0.05 + number / 1000, 3, number % 2 == 0))
    assert limiter.baseline == pytest.approx(0.074)
    assert limiter.limit == START


def test_envoy_steers_ten_times_a_second_by_the_median_of_all_answers() -> None:
    """L = g L + sqrt(g L), g = clamp(1.25 least / median, 0.5, 2), refusals included: quick ones raise it."""
    limiter = envoy()
    limiter.learn(Attempt(5.05, 0.03, 8, True))
    assert limiter.limit == START, "a tenth of a second is not over"
    limiter.learn(Attempt(5.1, 0.03, 8, True))
    assert limiter.limit == 16 + 4
    for _ in range(3):
        limiter.learn(Attempt(5.15, 0.0625, 20, False))
    limiter.learn(Attempt(5.21, 0.0625, 20, False))
    assert limiter.limit == int(20 + 20**0.5), "one quick answer does not move a median"
    limiter.learn(Attempt(5.32, 0.5, 24, False))
    assert limiter.limit == int(24 + 24**0.5), "what ends a step belongs to the next one"
    limiter.learn(Attempt(5.43, 0.5, 24, False))
    assert limiter.limit == int(14 + 14**0.5)


def test_envoy_doubts_its_least_latency_at_five_least_limits_in_a_row() -> None:
    """Then, and each minute or somewhat later, it measures anew."""
    limiter = envoy(0.001)
    limiter.set(3)
    now = 5.0
    while not limiter._restore:
        assert now < 5.7
        now += 0.101
        limiter.learn(Attempt(now, 0.05, 3, False))
    assert now > 5.5
    limiter = envoy()
    now = 5.0
    while limiter.limit != 3:
        now += 0.101
        limiter.learn(Attempt(now, 0.05, 8, False))  # no queue: it only grows
    assert 65.0 <= now <= 5.0 + 60 * 1.15 + 0.2
    limiter.learn(Attempt(now + 0.01, 0.05, 8, False))
    assert limiter._samples == [], "it began before"
