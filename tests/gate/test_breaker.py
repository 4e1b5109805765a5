"""A service that is down is left alone, and found again soon after it is up: state by state."""

import math
import pickle
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import UsageError
from penstock.gate.breaker import JITTER, PROBE_EVERY, Breaker, Circuit, CircuitState

NOW = 1_000.0
CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class NoJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        """The middle of what a pause may be before it is cut off at `longest`."""
        return a / (1 - JITTER)


def circuit(rng: random.Random | None = None, **rules: Any) -> Circuit:
    return Circuit(Breaker(**rules), NOW, NoJitter() if rng is None else rng)


def ends(circuit: Circuit, now: float, *failed: bool | None) -> bool:
    """Attempts that start and end at `now`; whether the last one has changed the state."""
    changed = False
    for each in failed:
        changed = circuit.ended(circuit.started(now), now, each)
    return changed


def opened(now: float = NOW, rng: random.Random | None = None, **rules: Any) -> Circuit:
    """A circuit that opens at `now` for the first time."""
    made = circuit(rng, **rules)
    fail(made, now)
    return made


def fail(circuit: Circuit, now: float) -> None:
    """Fail until it opens."""
    while circuit.state is CLOSED:
        ends(circuit, now, True)


def probing(now: float = NOW, **rules: Any) -> Circuit:
    """A circuit that becomes half-open at `now`."""
    made = opened(now - 5.0, pause=5.0, **rules)
    assert made.half_open(now)
    return made


# --- closed ---


def test_it_opens_at_half_failures_of_twenty_attempts() -> None:
    """Neither 19 attempts nor a failure less is enough."""
    tested = circuit()
    assert not ends(tested, NOW, *[True] * 9, *[False] * 10)
    assert tested.statistics(NOW) == (CLOSED, 19, 9, 0.0)
    assert ends(tested, NOW, True)
    assert tested.state is OPEN
    assert tested.statistics(NOW) == (OPEN, 20, 10, 5.0)


def test_it_stays_closed_below_the_share() -> None:
    """One success more, for however long."""
    tested = circuit()
    for step in range(1_000):
        ends(tested, NOW + step * 0.1, False, False, True)
    assert tested.state is CLOSED


def test_a_success_never_opens_it() -> None:
    """It may be the twentieth attempt: the share is looked at after failures."""
    tested = circuit()
    ends(tested, NOW, *[True] * 19)
    assert not ends(tested, NOW, False)
    assert ends(tested, NOW, True)


def test_what_says_nothing_about_the_service_is_not_counted() -> None:
    """Cancellations and throttling."""
    tested = circuit()
    ends(tested, NOW, *[None] * 1_000)
    assert tested.statistics(NOW).calls == 0


def test_failures_are_forgotten_with_the_window() -> None:
    """Nineteen failures of ten seconds ago do not matter; a moment before that, they do."""
    tested = circuit(window=10.0)
    ends(tested, NOW, *[True] * 19)
    assert tested.statistics(NOW + 9.9).failures == 19
    assert not ends(tested, NOW + 10.0, True)
    assert tested.statistics(NOW + 10.0) == (CLOSED, 1, 1, 0.0)
    late = circuit(window=10.0)
    ends(late, NOW, *[True] * 19)
    assert ends(late, NOW + 9.9, True)


@given(st.lists(st.tuples(st.floats(0, 4), st.booleans()), max_size=60), st.sampled_from([1.0, 10.0, 7.3]))
def test_the_window_holds_what_ended_within_it(steps: list[tuple[float, bool]], window: float) -> None:
    """To a tenth of its length: it moves in tenths."""
    tested, now, seen = circuit(window=window, calls=1_000), NOW, []
    for pause, failed in steps:
        now += pause
        ends(tested, now, failed)
        seen.append((now, failed))
        most = [failed for at, failed in seen if at > now - window - 1e-6]
        least = [failed for at, failed in seen if at > now - 0.9 * window + 1e-6]
        statistics = tested.statistics(now)
        assert len(least) <= statistics.calls <= len(most)
        assert sum(least) <= statistics.failures <= sum(most)


def test_ten_attempts_in_a_row_without_a_connection_open_it() -> None:
    """However few they are in the window: a service that is asked once a minute is found to be down, too."""
    tested = circuit()
    for step in range(9):
        assert not tested.ended(tested.started(NOW), NOW + 60 * step, True, unreachable=True)
    assert tested.ended(tested.started(NOW), NOW + 600, True, unreachable=True)


@pytest.mark.parametrize("between", [True, False])
def test_any_word_from_the_service_ends_the_row(between: bool) -> None:
    """A success does, and so does a failure that had a connection."""
    tested = circuit(calls=1_000)
    for _ in range(50):
        for _ in range(9):
            assert not tested.ended(tested.started(NOW), NOW, True, unreachable=True)
        ends(tested, NOW, between)
    assert tested.state is CLOSED


def test_what_says_nothing_does_not_end_the_row() -> None:
    """A cancelled attempt had no word from the service."""
    tested = circuit()
    for _ in range(9):
        tested.ended(tested.started(NOW), NOW, True, unreachable=True)
    ends(tested, NOW, None)
    assert tested.ended(tested.started(NOW), NOW, True, unreachable=True)


# --- open ---


def test_nothing_starts_and_nothing_counts_while_it_is_open() -> None:
    """Hundreds of attempts were in flight: their results are of no interest any more."""
    tested = opened()
    before = tested.statistics(NOW)
    assert tested.allowed(NOW) == 0
    assert tested.delay(NOW + 1) == 4.0
    for failed in (True, False, None) * 100:
        assert not tested.ended(0, NOW + 1, failed)
        assert not tested.ended(tested.epoch, NOW + 1, failed)
    assert tested.statistics(NOW) == before


def test_it_is_half_open_after_its_pause_and_not_before() -> None:
    """Whoever asks, and however often."""
    tested = opened(pause=5.0)
    assert tested.until == NOW + 5.0
    assert tested.opens_for(NOW + 2.0) == 3.0
    assert not tested.half_open(NOW + 4.99)
    assert tested.half_open(NOW + 5.0)
    assert not tested.half_open(NOW + 5.0)
    assert tested.state is HALF_OPEN
    assert tested.opens_for(NOW + 5.0) == 0.0


def test_a_pause_that_is_over_still_has_to_be_ended() -> None:
    """`delay` does not let anybody through an open circuit."""
    tested = opened()
    assert tested.delay(NOW + 100) > 0
    assert tested.opens_for(NOW + 100) == 0.0


@pytest.mark.parametrize(
    ("asked", "pause"),
    [(None, 5.0), (3.0, 5.0), (30.0, 30.0), (3_600.0, 3_600.0), (3_601.0, 5.0), (math.nan, 5.0), (-1.0, 5.0)],
)
def test_the_wait_that_the_server_asks_for_lengthens_the_pause(asked: float | None, pause: float) -> None:
    """It never shortens it, may be longer than `longest`, and is taken for a mistake beyond an hour."""
    tested = circuit(calls=1)
    assert tested.ended(tested.started(NOW), NOW, True, retry_after=asked)
    assert tested.until == NOW + pause


def test_pauses_double_up_to_the_longest() -> None:
    """While every probe fails."""
    tested, now, pauses = opened(pause=5.0, longest=60.0), NOW, []
    for _ in range(100):
        pauses.append(tested.until - now)
        now = tested.until
        tested.half_open(now)
        assert ends(tested, now, True)
    assert pauses[:6] == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert set(pauses[4:]) == {60.0}


@given(st.floats(0.001, 100), st.floats(1, 1_000), st.integers(0, 2**32))
def test_pauses_grow_within_their_jitter(pause: float, times: float, seed: int) -> None:
    """Each lies within a fifth of its doubling and below the longest, so the bounds never fall."""
    longest = pause * times
    tested, now, bounds = opened(rng=random.Random(seed), pause=pause, longest=longest), NOW, []
    for doublings in range(15):
        nominal = min(pause * 2**doublings, longest)
        assert 0.8 * nominal - 1e-9 <= tested.until - now <= min(1.2 * nominal, longest) + 1e-9
        bounds.append(nominal)
        now = tested.until
        tested.half_open(now)
        ends(tested, now, True)
    assert all(earlier <= later for earlier, later in pairwise(bounds))


def test_processes_do_not_come_back_together() -> None:
    """Not after the first pause, and not when the pauses have stopped to grow."""
    circuits = [opened(rng=random.Random(seed)) for seed in range(100)]
    for now in (NOW, *(NOW + 1_000 * step for step in range(1, 10))):
        lengths = [tested.until - max(now, NOW) for tested in circuits]
        assert max(lengths) - min(lengths) > 0.15 * max(lengths)
        for tested in circuits:
            tested.half_open(now + 1_000)
            ends(tested, now + 1_000, True)


# --- half-open ---


def test_five_successes_close_it_one_after_the_other() -> None:
    """Once a probe has succeeded the next one follows at once, and the window is new."""
    tested = probing()
    for _ in range(4):
        assert tested.allowed(NOW) == 1
        assert not ends(tested, NOW, False)
    assert ends(tested, NOW, False)
    assert tested.statistics(NOW) == (CLOSED, 0, 0, 0.0)
    assert tested.delay(NOW) == 0.0
    assert not ends(tested, NOW, *[True] * 19)


def test_one_failure_opens_it_again_and_for_longer_if_none_has_worked() -> None:
    """Where some work there is a service to be found."""
    tested = probing()
    ends(tested, NOW, False, False, False, False)
    assert ends(tested, NOW, True)
    assert tested.until == NOW + 5.0
    tested.half_open(NOW + 5.0)
    assert ends(tested, NOW + 5.0, True)
    assert tested.until == NOW + 15.0
    tested.half_open(NOW + 15.0)
    ends(tested, NOW + 15.0, False, False, False, False)
    assert tested.state is HALF_OPEN


def test_probes_that_hang_take_no_place_of_the_next_phase() -> None:
    """They may hang for ever; what they say at last is not listened to."""
    tested = probing(probes=3)
    hanging = [tested.started(NOW), tested.started(NOW + 1)]
    assert ends(tested, NOW + 2, True)
    assert tested.probing == 0
    tested.half_open(tested.until)
    now = tested.until + 10
    assert tested.allowed(now) == 1
    for epoch in hanging:
        assert not tested.ended(epoch, now, True)
    ends(tested, now, False, False, False)
    assert tested.state is CLOSED


def test_a_probe_that_hangs_does_not_hold_up_recovery() -> None:
    """One more may start each second, up to as many as it takes to close."""
    tested = probing(probes=3)
    allowed = []
    for step in range(60):
        now = NOW + step / 10
        allowed.append(tested.allowed(now))
        if tested.probing < tested.allowed(now):
            tested.started(now)
    assert allowed == [1] * 10 + [2] * 10 + [3] * 40
    assert tested.delay(NOW + 100) == math.inf


def test_a_probe_that_hangs_does_not_hold_up_those_that_follow_a_success() -> None:
    """The same holds later in the phase."""
    tested = probing()
    ends(tested, NOW, False)
    tested.started(NOW)
    assert tested.delay(NOW + 0.25) == 0.75
    assert tested.allowed(NOW + 0.25) == 1
    assert tested.allowed(NOW + 1.0) == 2


def test_a_probe_that_says_nothing_is_followed_by_another_one_a_second_later() -> None:
    """Cancelled or throttled: its place is free again, and the service is not asked more often for it."""
    tested = probing()
    for step in range(20):
        now = NOW + step
        assert tested.allowed(now) == 1
        assert not ends(tested, now, None)
        assert tested.allowed(now + 0.5) == 0
        assert tested.delay(now + 0.5) == 0.5
    assert tested.state is HALF_OPEN


def test_short_pauses_do_not_mean_more_than_a_probe_a_second() -> None:
    """A second lies between two probes of a service that is down, also from one phase to the next."""
    tested, now, starts = opened(pause=0.1, longest=0.1), NOW, []
    for step in range(1_000):
        now = NOW + step / 100
        tested.half_open(now)
        if tested.state is HALF_OPEN and tested.delay(now) == 0.0:
            starts.append(now)
            ends(tested, now, True)
    assert len(starts) >= 9
    assert all(later - earlier >= PROBE_EVERY - 1e-9 for earlier, later in pairwise(starts))


def test_results_of_an_earlier_state_are_ignored() -> None:
    """An attempt that began before it opened tells what was; so does a probe of the phase before."""
    tested = circuit()
    old = tested.started(NOW)
    fail(tested, NOW)
    tested.half_open(NOW + 5)
    probe = tested.started(NOW + 5)
    assert not tested.ended(old, NOW + 5, True)
    assert not tested.ended(old, NOW + 5, False)
    assert tested.probing == 1
    assert tested.ended(probe, NOW + 5, True)
    tested.half_open(NOW + 100)
    assert not tested.ended(probe, NOW + 100, True)
    assert tested.state is HALF_OPEN
    ends(tested, NOW + 100, *[False] * 5)
    assert tested.state is CLOSED
    for _ in range(100):
        tested.ended(old, NOW + 100, True)
    assert tested.statistics(NOW + 100).calls == 0


# --- from outage to outage ---


def reopens_after(calm: float, failed_probes: int) -> float:
    """The pause of a circuit that has had an outage, was closed for `calm` seconds, and opens again."""
    tested, now = opened(), NOW
    for _ in range(failed_probes):
        now = tested.until
        tested.half_open(now)
        ends(tested, now, True)
    now = tested.until
    tested.half_open(now)
    ends(tested, now, *[False] * 5)
    fail(tested, now + calm)
    return tested.until - (now + calm)


@pytest.mark.parametrize(("calm", "pause"), [(0, 10), (9, 10), (11, 5), (1_000, 5)])
def test_a_service_that_fails_again_soon_is_left_alone_for_longer(calm: float, pause: float) -> None:
    """Else one that stands five probes and no more would be asked every five seconds for ever."""
    assert reopens_after(calm, failed_probes=0) == pause


@pytest.mark.parametrize(("calm", "pause"), [(0, 60), (119, 60), (121, 40), (241, 20), (361, 10), (481, 5), (9_999, 5)])
def test_a_long_outage_is_forgotten_step_by_step(calm: float, pause: float) -> None:
    """One doubling for each time that it stayed closed for twice its last pause: ten pauses after, it is as new."""
    assert reopens_after(calm, failed_probes=50) == pause


# --- any sequence ---

LEGAL = {(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, OPEN), (HALF_OPEN, CLOSED)}
RULES = st.builds(
    Breaker,
    share=st.floats(0.01, 1),
    calls=st.integers(1, 5),
    window=st.floats(1e-300, 100),
    pause=st.floats(1e-300, 10),
    longest=st.floats(10, 1e300),
    connect_errors=st.integers(1, 5),
    probes=st.integers(1, 4),
)
STEPS = st.tuples(
    st.sampled_from(["start", "start", "end", "end", "half-open", "look"]),
    st.sampled_from([0.0, 0.01, 0.5, 1.0, 20.0]),
    st.sampled_from([True, True, False, None]),
    st.booleans(),
    st.one_of(st.none(), st.floats()),
    st.integers(0, 1_000),
)


@given(RULES, st.integers(0, 2**32), st.lists(STEPS, max_size=150))
def test_no_sequence_leads_anywhere_else(rules: Breaker, seed: int, steps: list[tuple[Any, ...]]) -> None:
    """Only legal transitions, each with an epoch of its own, as each probe that worked has; stale results change
    nothing; places are bounded."""
    tested, now, in_flight = Circuit(rules, NOW, random.Random(seed)), NOW, list[int]()
    for what, pause, failed, unreachable, retry_after, which in steps:
        now += pause
        state, epoch, worked = tested.state, tested.epoch, False
        if what == "start" and tested.delay(now) == 0.0:
            in_flight.append(tested.started(now))
        elif what == "end" and in_flight:
            began = in_flight.pop(which % len(in_flight))
            before = tested.statistics(now)
            worked = state is HALF_OPEN and began == epoch and failed is False
            changed = tested.ended(began, now, failed, unreachable=unreachable, retry_after=retry_after)
            assert changed == (tested.state is not state)
            if began != epoch or failed is None:
                assert tested.statistics(now) == before
        elif what == "half-open":
            due = state is OPEN and now >= tested.until
            assert tested.half_open(now) == due
        else:
            statistics = tested.statistics(now)
            assert 0 <= statistics.failures <= statistics.calls
            assert statistics.opens_for == tested.opens_for(now) >= 0
        if tested.state is state:
            assert tested.epoch == epoch + worked
        else:
            assert (state, tested.state) in LEGAL
            assert tested.epoch == epoch + 1
        if tested.state is HALF_OPEN:
            assert tested.probing == in_flight.count(tested.epoch)
            assert tested.probing <= tested.allowed(now) <= rules.probes
            assert (tested.probing < tested.allowed(now)) == (tested.delay(now) == 0.0)
        else:
            assert tested.probing == 0
            assert (tested.delay(now) == 0.0) == (tested.state is CLOSED)


@given(st.lists(st.tuples(st.integers(-5, 5), st.sampled_from([True, False, None]), st.floats(-1e9, 1e9)), max_size=50))
def test_no_call_raises_whatever_it_is_told(calls: list[tuple[int, bool | None, float]]) -> None:
    """Ends without a start, epochs that never were, a clock that jumps."""
    tested = circuit(calls=1)
    for epoch, failed, now in calls:
        tested.ended(epoch, now, failed)
        tested.half_open(now)
        tested.started(now)
        tested.statistics(now)
        assert 0 <= tested.allowed(now) <= 5 or tested.state is CLOSED
        assert tested.probing >= 0


def test_memory_does_not_grow_with_what_was_counted() -> None:
    """Ten buckets, however many attempts."""
    tested = circuit()
    for step in range(1_000):
        ends(tested, NOW + step / 10, False)
    before = len(pickle.dumps(tested))
    for step in range(50_000):
        ends(tested, NOW + 100 + step / 100, False)
    assert len(pickle.dumps(tested)) <= before + 64


# --- the rule ---


def test_a_breaker_is_a_plain_value() -> None:
    """Comparable, hashable, picklable."""
    assert Breaker() == Breaker(share=0.5) != Breaker(share=0.6)
    assert pickle.loads(pickle.dumps(Breaker(pause=1))) == Breaker(pause=1)
    assert len({Breaker(), Breaker()}) == 1


@pytest.mark.parametrize(
    ("rules", "write"),
    [({"share": share}, "Breaker(share=0.5)") for share in (0, -1, 1.01, math.nan, True, "half", None)]
    + [({"calls": calls}, "Breaker(calls=20)") for calls in (0, -1, 1.5, True, None)]
    + [({"connect_errors": 0}, "Breaker(connect_errors=10)"), ({"probes": 0.5}, "Breaker(probes=5)")]
    + [({"window": window}, "Breaker(window=10.0)") for window in (0, -1, math.inf, math.nan, True, "10")]
    + [({"pause": 0}, "Breaker(pause=5.0)"), ({"longest": math.inf}, "Breaker(longest=60.0)")]
    + [({"pause": 90}, "Breaker(pause=90, longest=90)"), ({"fail_fast": 1}, "True or False")],
)
def test_what_cannot_work_is_refused_with_what_to_write(rules: dict[str, Any], write: str) -> None:
    """The message quotes what was found and shows a call that works."""
    with pytest.raises(UsageError) as caught:
        Breaker(**rules)
    name, value = next(iter(rules.items()))
    assert f"{name}={value!r}" in str(caught.value)
    assert write in str(caught.value)
