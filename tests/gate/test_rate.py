"""Rates let through what they say and no more, in all their dimensions at once, however late their timers fire."""

import itertools
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import UsageError
from penstock.gate.quota import LIES
from penstock.gate.rate import (
    EARLY,
    MOST_QUOTAS,
    REQUESTS,
    SLICE,
    Meter,
    Rate,
    amounts,
    checked_rates,
)
from penstock.gate.server_hints import CONCURRENT, Policy, ServerHints

ROUNDING = 1e-6
"""Share by which sums of floats may be off."""

rates = st.builds(
    Rate,
    amount=st.floats(0.1, 1e5),
    per=st.floats(0.1, 3_600),
    burst=st.none() | st.floats(0.1, 1e5),
)
starts = st.floats(0, 1e6)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def largest(rate: Rate) -> float:
    return max(rate.amount, rate.size)


def told(
    remaining: float | None,
    reset: float | None = 10.0,
    *,
    quota: float | None = 50.0,
    window: float | None = None,
    unit: str = REQUESTS,
    name: str = "default",
) -> ServerHints:
    return ServerHints(None, (Policy(name, quota, remaining, reset, window, unit),))


# --- the value ---


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "5", None])
@pytest.mark.parametrize("name", ["amount", "per", "burst"])
def test_a_rate_is_made_of_numbers_above_0(name: str, value: Any) -> None:
    """Anything else would let nothing through, or everything."""
    if name == "burst" and value is None:
        assert Rate(5, burst=None).size == 1
        return
    wrong: dict[str, Any] = {"amount": 5, name: value}
    with pytest.raises(UsageError, match=rf"Rate\({name}={value!r}\): expected a number above 0"):
        Rate(**wrong)


def test_a_rate_is_a_plain_value() -> None:
    """Comparable and picklable; a burst that nobody gave is a tenth of it, and at least one."""
    assert pickle.loads(pickle.dumps(Rate(500, per=60))) == Rate(500, per=60)
    assert (Rate(500).size, Rate(3).size, Rate(500, burst=7).size) == (50, 1, 7)


@pytest.mark.parametrize("rates", [5, "5/s", {"requests": 5}, {5: Rate(5)}, [Rate(5)]])
def test_rates_are_one_rate_or_rates_by_name(rates: Any) -> None:
    """The message shows both ways to write it."""
    with pytest.raises(UsageError, match=r"Write rate=Rate\(500, per=60\), or rate="):
        checked_rates(rates)
    with pytest.raises(UsageError):
        Meter(rates)


@pytest.mark.parametrize("rates", [None, Rate(5), {"tokens": Rate(5)}])
def test_rates_that_fit_are_returned_as_they_came(rates: Any) -> None:
    """To be checked where they are given."""
    assert checked_rates(rates) is rates


@pytest.mark.parametrize(
    ("weight", "expected"), [(None, None), (1, None), (1.0, None), (3, {REQUESTS: 3}), ({"tokens": 5}, {"tokens": 5})]
)
def test_a_number_is_so_many_requests(weight: Any, expected: Mapping[str, float] | None) -> None:
    """None stands for the plain request, which most are."""
    assert amounts(weight) == expected


# --- one bucket ---


def test_without_rates_nothing_delays_anybody() -> None:
    """The gate need not even ask."""
    meter = Meter()
    assert not meter.active
    assert meter.delay(None, 5.0) == 0
    assert meter.tokens(5.0) == {}


def test_a_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    """5 a second with a burst of 3: three now, then one each 0.2 s."""
    meter = Meter(Rate(5, burst=3))
    assert meter.active
    for _ in range(3):
        assert meter.delay(None, 100.0) == 0
        meter.take(None, 100.0)
    assert meter.tokens(100.0) == {REQUESTS: pytest.approx(0)}
    assert meter.delay(None, 100.0) == pytest.approx(0.2)
    assert meter.delay(None, 100.1) == pytest.approx(0.1)
    assert meter.delay(None, 100.2) == 0


@given(rates, shares, st.lists(st.floats(0, 2), max_size=40), starts)
def test_no_time_has_more_in_it_than_the_rate_the_burst_and_one_heavy_weight(
    rate: Rate, weights: list[float], pauses: list[float], now: float
) -> None:
    """For any weights, each at the earliest time that is permitted, or after a rest."""
    meter = Meter(rate)
    taken: list[tuple[float, float]] = []
    for share, pause in itertools.zip_longest(weights, pauses, fillvalue=0.0):
        weight = {REQUESTS: share * largest(rate)}
        now += pause * rate.per
        now += meter.delay(weight, now)
        meter.take(weight, now)
        taken.append((now, weight[REQUESTS]))
    heaviest = max(amount for _, amount in taken)
    for first, (begin, _) in enumerate(taken):
        used = 0.0
        for end, amount in taken[first:]:
            used += amount
            allowed = rate.amount * (end - begin + EARLY) / rate.per + rate.size + heaviest
            assert used <= allowed * (1 + ROUNDING)


@given(rates, shares, starts)
def test_after_the_delay_it_may_start(rate: Rate, weights: list[float], now: float) -> None:
    """Asked again when the time has come, the meter does not put it off any further."""
    meter = Meter({REQUESTS: rate, "tokens": Rate(7, per=3)})
    for share in weights:
        weight = {REQUESTS: share * largest(rate), "tokens": share}
        delay = meter.delay(weight, now)
        assert 0 <= delay < math.inf
        now += delay
        assert meter.delay(weight, now) == 0
        meter.take(weight, now)


@given(rates, shares, starts)
def test_taking_never_brings_tokens(rate: Rate, weights: list[float], now: float) -> None:
    """At one moment it only becomes less, by what was taken."""
    meter = Meter(rate)
    for share in weights:
        before = meter.tokens(now)[REQUESTS]
        meter.take({REQUESTS: share * rate.amount}, now)
        after = meter.tokens(now)[REQUESTS]
        assert after == pytest.approx(before - share * rate.amount, abs=rate.amount * 1e-3 + 1e-3)
        assert after <= before


@pytest.mark.parametrize("late", [0.001, 0.015, 0.08])
def test_late_timers_lose_nothing(late: float) -> None:
    """As long as they are late by less than the burst lasts: 0.1 s here."""
    meter = Meter(Rate(200))
    now = started = 0.0
    count = 0
    while now < 10:
        delay = meter.delay(None, now)
        if delay:
            now += delay + late
        else:
            meter.take(None, now)
            count += 1
    assert count >= 200 * (now - started)


def test_a_weight_above_the_burst_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    """For which the next one waits."""
    meter = Meter(Rate(10, burst=2))
    meter.take(None, 0.0)
    assert meter.delay({REQUESTS: 5}, 0.0) == pytest.approx(0.1)
    meter.take({REQUESTS: 5}, 0.1)
    assert meter.tokens(0.1) == {REQUESTS: pytest.approx(-3)}
    assert meter.delay(None, 0.1) == pytest.approx(0.4)


def test_what_weighs_nothing_waits_for_nothing() -> None:
    """Also while the bucket is in debt."""
    meter = Meter({REQUESTS: Rate(1), "tokens": Rate(10)})
    meter.take({REQUESTS: 5}, 0.0)
    assert meter.delay({REQUESTS: 0, "tokens": 1}, 0.0) == 0


# --- several ---


@given(rates, rates, st.floats(0, 1), st.floats(0, 1), starts)
def test_the_slower_dimension_decides_and_both_are_taken(
    requests: Rate, tokens: Rate, some: float, more: float, now: float
) -> None:
    """All at once or nothing: a delay takes nothing."""
    meter = Meter({REQUESTS: requests, "tokens": tokens})
    alone = [Meter(requests), Meter({"tokens": tokens})]
    first = {REQUESTS: some * largest(requests), "tokens": more * largest(tokens)}
    for each in (meter, *alone):
        each.take(first, now)
    before = meter.tokens(now)
    delays = [each.delay(first, now) for each in alone]
    assert meter.delay(first, now) == max(delays)
    assert meter.tokens(now) == before
    meter.take(first, now)
    assert meter.tokens(now)[REQUESTS] <= before[REQUESTS]
    assert meter.tokens(now)["tokens"] <= before["tokens"]


def test_a_plain_request_weighs_1_in_requests_and_nothing_else() -> None:
    """A mapping says what it says, and one request unless it names them."""
    meter = Meter({REQUESTS: Rate(10, burst=5), "tokens": Rate(100, burst=50)})
    meter.take(None, 0.0)
    assert meter.tokens(0.0) == {REQUESTS: 4, "tokens": 50}
    meter.take({"tokens": 20}, 0.0)
    assert meter.tokens(0.0) == {REQUESTS: 3, "tokens": 30}


# --- reserve and settle ---


def test_what_was_reserved_in_vain_comes_back() -> None:
    """And what was used beyond is a debt; what is not named stays as reserved."""
    meter = Meter({REQUESTS: Rate(10, burst=5), "tokens": Rate(100, burst=50)})
    reserved = {"tokens": 40.0}
    meter.take(reserved, 0.0)
    meter.settle(reserved, {"tokens": 10}, 0.0)
    assert meter.tokens(0.0) == {REQUESTS: 4, "tokens": 40}
    meter.settle({"tokens": 10}, {"tokens": 90, "unheard of": 3}, 0.0)
    assert meter.tokens(0.0) == {REQUESTS: 4, "tokens": pytest.approx(-40)}
    assert meter.delay({"tokens": 10}, 0.0) == pytest.approx(0.5)
    meter.settle(None, {REQUESTS: 0}, 0.0)
    assert meter.tokens(0.0)[REQUESTS] == 5


@given(rates, st.floats(0, 1), st.floats(0, 1), starts)
def test_settling_there_and_back_changes_nothing(rate: Rate, some: float, other: float, now: float) -> None:
    """As long as the bucket was not full in between."""
    meter = Meter(rate)
    most = {REQUESTS: 3 * largest(rate)}
    meter.take(most, now)
    before = meter.tokens(now)[REQUESTS]
    a, b = {REQUESTS: some * largest(rate)}, {REQUESTS: other * largest(rate)}
    meter.settle(a, b, now)
    meter.settle(b, a, now)
    assert meter.tokens(now)[REQUESTS] == pytest.approx(before, rel=1e-3, abs=largest(rate) * 1e-3)


@given(rates, st.floats(0, 1), st.floats(0, 1e6), starts, st.floats(0, 1e4))
def test_a_refund_never_fills_a_bucket_beyond_its_burst(
    rate: Rate, some: float, refund: float, now: float, later: float
) -> None:
    """Neither at once nor by time that it has saved."""
    meter = Meter(rate)
    meter.take({REQUESTS: some * rate.amount}, now)
    meter.settle({REQUESTS: refund}, {REQUESTS: 0}, now + later)
    assert meter.tokens(now + later)[REQUESTS] <= rate.size
    clock = 4 * math.ulp(now + later) * rate.amount / rate.per  # what the time itself is rounded by
    assert meter.tokens(now + later)[REQUESTS] >= rate.size - some * rate.amount * (1 + ROUNDING) - ROUNDING - clock


# --- weights that cannot work ---


def test_a_weight_that_never_fits_is_refused_at_once() -> None:
    """It would wait for ever. The message says what was found, what fits and what to write."""
    meter = Meter({REQUESTS: Rate(500, per=60), "tokens": Rate(90_000, per=60)})
    meter.refuse_what_never_fits({"tokens": 90_000})
    with pytest.raises(UsageError) as caught:
        meter.refuse_what_never_fits({"tokens": 120_000})
    message = str(caught.value)
    assert "weight={'tokens': 120000} never fits" in message
    assert "lets 90000 through at once" in message
    assert "rate={'tokens': Rate(120_000, per=...)}" in message


def test_a_burst_above_the_amount_lets_more_fit() -> None:
    """What is in a full bucket can be taken."""
    meter = Meter(Rate(5, burst=20))
    meter.refuse_what_never_fits({REQUESTS: 20})
    with pytest.raises(UsageError, match="weight=21 never fits"):
        meter.refuse_what_never_fits({REQUESTS: 21})


def test_a_rate_below_one_request_lets_none_through() -> None:
    """Half a request in an hour with a burst of one is fine; without room for one it is said at once."""
    Meter(Rate(0.5, per=3_600)).refuse_what_never_fits(None)
    with pytest.raises(UsageError, match="weight=1 never fits"):
        Meter(Rate(0.5, burst=0.5)).refuse_what_never_fits(None)


@pytest.mark.parametrize("amount", [-1, math.nan, math.inf, True, "3", None])
def test_amounts_are_numbers_from_0(amount: Any) -> None:
    """Also where nothing has a rate: they are checked when they are given. The message shows both ways to write it."""
    with pytest.raises(UsageError, match=r"'tokens' is .*, expected a number of at least 0. Write a weight of 3"):
        amounts({"tokens": amount})
    if amount is not None:
        with pytest.raises(UsageError, match="expected a number of at least 0"):
            amounts(amount)


def test_names_of_amounts_are_text() -> None:
    """Anything else cannot be the name of a rate."""
    with pytest.raises(UsageError, match="5 is no name"):
        amounts({5: 1})  # type: ignore[dict-item]


def test_amounts_stay_as_they_were_given() -> None:
    """What is taken is what will be settled, whatever becomes of the mapping."""
    weight = {"tokens": 5.0}
    taken = amounts(weight)
    weight["tokens"] = -1
    assert taken == {"tokens": 5}


def test_integers_beyond_all_floats_are_refused() -> None:
    """Nothing could be computed with them."""
    with pytest.raises(UsageError, match="expected a number above 0"):
        Rate(10**400)
    with pytest.raises(UsageError, match="expected a number of at least 0"):
        amounts(10**400)


def test_a_dimension_without_a_rate_is_a_mistake_where_others_have_one() -> None:
    """Most likely it is misspelt. Without any rate it is what a server may tell of."""
    with pytest.raises(UsageError, match=r"there is no rate named 'token', only 'requests', 'tokens'"):
        Meter({REQUESTS: Rate(5), "tokens": Rate(5)}).refuse_what_never_fits({"token": 3})
    Meter({"tokens": Rate(5)}).refuse_what_never_fits({REQUESTS: 2, "tokens": 3})
    Meter().refuse_what_never_fits({"tokens": 3})
    Meter().refuse_what_never_fits(None)


def test_what_was_used_has_a_rate_or_is_told_by_the_server() -> None:
    """Anything else is misspelt, and would be lost without a word. Without any rate nothing is known to be wrong."""
    Meter().refuse_unknown({"token": 3})
    meter = Meter({"tokens": Rate(5)})
    meter.refuse_unknown({"tokens": 3, REQUESTS: 0})
    with pytest.raises(UsageError, match=r"used=.*: there is no rate named 'output_tokens', only 'tokens'"):
        meter.refuse_unknown({"output_tokens": 3})
    meter.learn(told(3, unit="output-tokens"), 0, 0.0)
    meter.refuse_unknown({"output_tokens": 3, "output-tokens": 3})


def test_a_server_cannot_fill_the_memory_with_units() -> None:
    """The newest one is known in any case."""
    meter = Meter(Rate(5))
    for number in range(10 * MOST_QUOTAS):
        meter.learn(told(3, unit=f"u{number}"), 0, 0.0)
        meter.refuse_unknown({f"u{number}": 1})
    with pytest.raises(UsageError):
        meter.refuse_unknown({"u0": 1})


# --- live changes ---


def test_a_bucket_keeps_its_tokens_when_its_rate_changes() -> None:
    """A debt of an hour at the old rate is one of seconds at the new one."""
    meter = Meter({REQUESTS: Rate(1, per=3_600), "tokens": Rate(10)})
    meter.take({"tokens": 1}, 0.0)
    assert meter.delay(None, 0.0) == 3_600
    meter.set_rates(Rate(100))
    assert meter.delay(None, 0.0) == 0
    assert meter.tokens(0.0) == {REQUESTS: pytest.approx(9)}
    assert meter.delay({"tokens": 5}, 0.0) == 0


@pytest.mark.parametrize("what", ["delay", "take", "settle", "tokens"])
def test_a_change_holds_whatever_is_done_next(what: str) -> None:
    """The bucket is converted when the time is known again."""
    meter = Meter(Rate(10, burst=4))
    for _ in range(4):
        meter.take(None, 0.0)
    meter.set_rates(Rate(1, burst=4))
    if what == "delay":
        assert meter.delay(None, 0.0) == pytest.approx(1)
    elif what == "take":
        meter.take(None, 0.0)
        assert meter.delay(None, 0.0) == pytest.approx(2)
    elif what == "settle":
        meter.settle(None, {REQUESTS: 0}, 0.0)
        assert meter.delay(None, 0.0) == 0
    else:
        assert meter.tokens(0.0) == {REQUESTS: pytest.approx(0)}


def test_the_same_rate_again_changes_nothing_and_none_takes_it_away() -> None:
    """And a full bucket stays full."""
    meter = Meter(Rate(10, burst=4))
    meter.take(None, 0.0)
    meter.set_rates(Rate(10, burst=4))
    assert meter.tokens(0.0) == {REQUESTS: pytest.approx(3)}
    meter.set_rates(Rate(10, burst=8))
    assert meter.tokens(50.0) == {REQUESTS: 8}
    meter.set_rates(None)
    assert not meter.active
    assert meter.delay(None, 50.0) == 0


# --- what servers say ---


def test_what_a_server_allows_in_flight_is_no_rate() -> None:
    """It is for the limiter."""
    meter = Meter()
    meter.learn(told(3, quota=20, unit=CONCURRENT), 0, 0.0)
    assert meter.concurrency == 20
    assert not meter.active
    for quota in (None, 0.0):
        meter.learn(told(3, quota=quota, unit=CONCURRENT), 0, 0.0)
    assert meter.concurrency == 20
    meter.learn(told(3, quota=1e30, unit=CONCURRENT), 0, 0.0)
    assert meter.concurrency == 1_000_000


@pytest.mark.parametrize(("remaining", "reset"), [(None, 5.0), (5.0, None)])
def test_a_policy_that_does_not_say_both_what_is_left_and_until_when_is_no_help(
    remaining: float | None, reset: float | None
) -> None:
    """Its refusals will tell."""
    meter = Meter()
    meter.learn(told(remaining, reset), 0, 0.0)
    assert not meter.active


def test_a_quota_that_is_used_up_is_waited_for() -> None:
    """The tightest of all policies decides."""
    meter = Meter(Rate(1_000))
    meter.learn(told(40, name="minute"), 0, 0.0)
    meter.learn(told(0, 7.5, name="second"), 0, 0.0)
    assert meter.active
    assert meter.delay(None, 0.0) == pytest.approx(7.5)
    assert meter.tokens(0.0)[REQUESTS] == 0


def test_what_starts_counts_until_the_next_answer() -> None:
    """Two left and two taken: the third one waits."""
    meter = Meter()
    meter.learn(told(2, 7.5, quota=2), 0, 0.0)
    for _ in range(2):
        assert meter.delay(None, 0.0) == 0
        meter.take(None, 0.0)
    assert meter.delay(None, 0.0) == pytest.approx(7.5)


def test_what_is_under_way_counts_too() -> None:
    """The server had not seen it when it wrote the answer."""
    meter = Meter()
    meter.learn(told(30, 5.5), 28, 0.0)
    assert meter.tokens(0.0) == {REQUESTS: 2}


def test_slow_ones_that_the_server_has_seen_long_ago_do_not_count() -> None:
    """A mark tells which are younger than the answer's own round trip."""
    meter = Meter()
    meter.learn(told(50, 9.5), 0, 0.0)
    for step in range(20):
        meter.take(None, step * 2 * SLICE)
    mark = meter.taken
    meter.take(None, 50 * SLICE)
    meter.learn(told(30, 8.5), 20, 60 * SLICE, mark)
    assert 26 <= meter.tokens(1.2)[REQUESTS] <= 28


def test_an_answer_that_comes_late_changes_nothing() -> None:
    """An older one says that there was more; there is not."""
    meter = Meter()
    meter.learn(told(50, 9.5), 0, 0.0)
    marks = []
    for step in range(30):
        meter.take(None, step * 2 * SLICE)
        marks.append(meter.taken)
    meter.learn(told(22, 8.0), 5, 1.5, marks[-1])
    known = meter.tokens(1.5)
    meter.learn(told(45, 8.0), 4, 1.5, marks[5])
    assert meter.tokens(1.5) == known


def test_round_trips_that_start_together_may_arrive_in_any_order() -> None:
    """The mark of a burst is that of its beginning: all of it may be unseen."""
    meter = Meter()
    meter.learn(told(50, 9.5), 0, 0.0)
    for _ in range(20):
        meter.take(None, 1.0)
    meter.learn(told(49, 8.5), 19, 1.05, meter.taken)
    assert meter.tokens(1.05) == {REQUESTS: 30}


def test_tokens_are_counted_if_weights_name_them() -> None:
    """In both spellings; an answer counts what is under way at what they weigh on average."""
    meter = Meter()
    meter.refuse_what_never_fits({"input_tokens": 100})
    meter.learn(told(1_000, 9.5, quota=1_000, unit="input-tokens"), 0, 0.0)
    meter.take({"input_tokens": 200}, 0.0)
    meter.take({"input_tokens": 100}, 0.0)
    meter.take(None, 0.0)
    assert meter.tokens(0.0) == {"input_tokens": 700}
    assert meter.delay({"input_tokens": 800}, 0.0) == pytest.approx(9.5)
    assert meter.delay(None, 0.0) == 0
    meter.learn(told(800, 9.0, quota=1_000, unit="input-tokens"), 1, 0.5)
    assert meter.tokens(0.5) == {"input_tokens": 650}
    meter.learn(told(40, 9.0), 1, 0.5)
    meter.settle({"input_tokens": 100}, {"input_tokens": 40}, 0.5)
    assert meter.tokens(0.5) == {"input_tokens": 650, REQUESTS: 39}


def test_weights_that_are_taken_name_dimensions_too() -> None:
    """From then on the server's word on them counts."""
    meter = Meter(Rate(1_000))
    meter.take({"tokens": 200}, 0.0)
    meter.learn(told(100, 9.5, quota=500, unit="tokens"), 0, 0.0)
    assert meter.delay({"tokens": 150}, 0.0) == pytest.approx(9.5)


def test_what_nobody_counts_is_obeyed_when_it_is_used_up() -> None:
    """Tokens that no weight names: their quota cannot be paced, but it can be waited for."""
    meter = Meter()
    meter.learn(told(100, 9.5, unit="tokens"), 0, 0.0)
    assert meter.delay(None, 0.0) == 0
    meter.learn(told(0, 8.5, unit="tokens"), 0, 0.0)
    assert meter.delay(None, 0.0) == 8.5
    meter.learn(told(0, 8.0, unit="tokens"), 0, 0.0)
    assert meter.delay(None, 0.0) == 8
    meter.refuse_what_never_fits({"tokens": 10})
    meter.learn(told(90, 7.5, unit="tokens"), 0, 0.5)
    assert meter.delay({"tokens": 10}, 0.5) == 0


def test_a_server_cannot_fill_the_memory_with_policies() -> None:
    """The newest ones take the places of those that were heard of longest ago."""
    meter = Meter()
    for number in range(3 * MOST_QUOTAS):
        meter.learn(told(10, name=f"p{number}"), 0, 0.0)
        meter.learn(told(0, 5.0 + number, name=f"p{number}", unit="tokens"), 0, 0.0)
    assert meter.delay(None, 0.0) == 5 + 3 * MOST_QUOTAS - 1
    assert len(meter.told(0.0)) == MOST_QUOTAS
    meter.learn(told(0, 2.5, name="p0"), 0, 0.0)
    for number in range(3 * MOST_QUOTAS):
        meter.learn(told(5, name=f"p{number}", unit="tokens"), 0, 0.0)
    assert meter.delay(None, 0.0) == pytest.approx(2.5)


def test_a_refused_one_has_used_nothing() -> None:
    """What is left stays what the answer said; and it enables nothing where the server tells its quota."""
    meter = Meter()
    meter.refuse_what_never_fits({"tokens": 1})
    meter.learn(told(9, 5.5, unit="tokens"), 0, 0.0)
    meter.learn(told(10, 5.5, quota=10), 0, 0.0)
    meter.take(None, 0.0)
    meter.learn(told(7, 5.0), 0, 0.5)
    meter.throttled(0.5, hinted=True, queueing=False)
    assert meter.tokens(0.5) == {REQUESTS: 7, "tokens": 9}
    assert not meter.searching


# --- refusals without a word ---


def test_refusals_without_a_word_start_a_search_and_quiet_ends_it() -> None:
    """Only while it lasts is the meter asked at all."""
    meter = Meter()
    meter.succeeded(0.0)
    meter.throttled(1.0, hinted=True, queueing=False)
    meter.throttled(1.0, hinted=False, queueing=True)
    assert not meter.searching
    assert not meter.active
    meter.throttled(1.0, hinted=False, queueing=False)
    meter.throttled(1.1, hinted=False, queueing=False)
    assert meter.searching
    assert meter.active
    meter.take(None, 1.0)
    assert meter.delay(None, 1.0) > 0
    assert meter.delay(None, 302.0) == 0
    assert not meter.searching
    assert not meter.active


# --- forgetting ---


def test_a_quota_that_is_told_of_no_longer_is_dropped_after_a_minute() -> None:
    """Another plan has replaced it, and is all that counts from then on."""
    meter = Meter()
    meter.learn(told(0, 3_000.0, name="basic", window=20.0), 0, 0.0)
    meter.learn(told(50, 9.5, name="pro"), 0, 59.0)
    assert meter.delay(None, 59.0) > 2_000
    meter.learn(ServerHints(3.0, ()), 0, 60.0)
    assert meter.told(60.0).keys() == {"basic", "pro"}
    meter.learn(told(50, 9.5, name="pro"), 0, 60.0)
    assert meter.told(60.0).keys() == {"pro"}
    assert meter.delay(None, 60.0) == 0


def test_a_long_quota_is_kept_for_two_windows() -> None:
    """A server may tell of it only now and then."""
    meter = Meter()
    meter.learn(told(10, 300.0, name="long", window=300.0), 0, 0.0)
    meter.learn(told(50, 9.5, name="short"), 0, 599.0)
    assert "long" in meter.told(599.0)
    meter.learn(told(50, 9.5, name="short"), 0, 600.0)
    assert "long" not in meter.told(600.0)


def test_the_place_of_the_quota_heard_of_longest_ago_is_taken() -> None:
    """Not that of the one that came first."""
    meter = Meter()
    for number in range(MOST_QUOTAS):
        meter.learn(told(10, name=f"p{number}"), 0, float(number))
    meter.learn(told(10, name="p0"), 0, 20.0)
    meter.learn(told(10, name="new"), 0, 21.0)
    assert meter.told(21.0).keys() == {"p0", "new"} | {f"p{number}" for number in range(2, MOST_QUOTAS)}


def test_what_was_used_up_and_is_not_any_more_leaves_nothing_behind() -> None:
    """The meter need not even be asked."""
    meter = Meter()
    meter.learn(told(0, 5.0, unit="tokens"), 0, 0.0)
    assert meter.told(1.0) == {"default": 0}
    assert meter.told(5.0) == {}
    assert meter.active
    meter.learn(told(3, 5.0, unit="bytes", name="other"), 0, 5.0)
    assert not meter.active


def test_a_meter_is_at_rest_when_all_its_buckets_are_full() -> None:
    """Who forgets it then loses nothing; also after its rates have changed."""
    assert Meter().at_rest(0.0)
    meter = Meter(Rate(1, burst=5))
    assert meter.at_rest(0.0)
    meter.take(None, 0.0)
    assert not meter.at_rest(0.9)
    assert meter.at_rest(1.0)
    meter.set_rates(Rate(0.5, burst=5))
    assert not meter.at_rest(0.9)


def test_a_meter_is_not_at_rest_while_a_reset_is_to_come() -> None:
    """Of what is counted, and of what is only noted."""
    meter = Meter()
    meter.learn(told(3, 5.5), 0, 0.0)
    meter.learn(told(0, 9.5, unit="tokens", name="t"), 0, 0.0)
    assert not meter.at_rest(5.0)
    assert not meter.at_rest(9.0)
    assert meter.at_rest(9.5)


def test_a_meter_is_not_at_rest_while_it_searches() -> None:
    """What refusals have taught would have to be paid for again."""
    meter = Meter()
    meter.throttled(1.0, hinted=False, queueing=False)
    assert meter.rate_found(1.0) is not None
    assert not meter.at_rest(300.0)
    assert meter.at_rest(301.0)
    assert meter.rate_found(301.0) is None


# --- servers that lie ---


def test_a_server_that_always_says_that_nothing_is_left_is_disbelieved() -> None:
    """Each answer is a success: after some dozens nothing waits for it, until there is something left."""
    meter = Meter()
    now = 0.0
    for _ in range(LIES):
        now += meter.delay(None, now) + 0.01
        meter.take(None, now)
        meter.learn(told(0, 0.0), 0, now)
        meter.succeeded(now)
    for _ in range(1_000):
        assert meter.delay(None, now) == 0
        meter.take(None, now)
        meter.learn(told(0, 0.0), 0, now)
        meter.succeeded(now)
    assert meter.told(now) == meter.tokens(now) == {}
    assert meter.wait_reason(now) is None
    meter.learn(told(2, 5.5), 0, now)
    assert meter.told(now) == {"default": 2}


def test_a_refusal_makes_it_believed_again_and_for_longer() -> None:
    """It was true: a bucket of one tells nothing else."""
    meter = Meter()

    def lies(count: int) -> bool:
        for _ in range(count):
            meter.learn(told(0, 0.0), 0, 1.0)
            meter.succeeded(1.0)
        return meter.told(1.0) == {}

    assert not lies(LIES - 1)
    meter.throttled(1.0, hinted=True, queueing=False)
    assert not lies(LIES - 1)
    assert lies(1)
    meter.learn(told(0, 0.0), 0, 1.0)
    meter.throttled(1.0, hinted=True, queueing=False)
    assert not lies(2 * LIES - 1)
    assert lies(1)


def test_a_quota_that_is_used_up_until_later_is_always_believed() -> None:
    """A bucket of one, filled once a second: each success has taken the last."""
    meter = Meter()
    for step in range(5 * LIES):
        meter.learn(told(0, 1.0, quota=1), 0, float(step))
        meter.succeeded(float(step))
    assert meter.delay(None, 5.0 * LIES - 1) > 0.5


# --- in words ---


def test_the_reason_to_wait_is_named() -> None:
    """The slowest of all that hold it back, what it allows, and for how long."""
    meter = Meter({REQUESTS: Rate(50, burst=1), "tokens": Rate(90_000, per=60, burst=3_000)})
    assert meter.wait_reason(0.0) is None
    meter.take({"tokens": 3_000}, 0.0)
    assert meter.wait_reason(0.0, {"tokens": 0}) == "the rate of 'requests' (50 in 1 s), for another 0.0 s"
    assert meter.wait_reason(0.0, {"tokens": 1_500}) == "the rate of 'tokens' (90000 in 60 s), for another 1.0 s"
    meter.set_rates(None)
    meter.learn(told(0, 358.5, name="bytes", unit="bytes"), 0, 0.0)
    assert meter.wait_reason(0.0) == "the server's quota 'bytes' (0 left, reset in 359 s), for another 358.5 s"
    meter.learn(told(0, 500.5, name="minute"), 0, 0.0)
    assert meter.wait_reason(0.0) == "the server's quota 'minute' (0 left, reset in 501 s), for another 500.5 s"
    assert "'bytes'" in str(meter.wait_reason(0.0, {REQUESTS: 0}))


def test_a_change_of_rates_is_seen_in_the_reason() -> None:
    """The bucket is converted first."""
    meter = Meter(Rate(10, burst=1))
    meter.take(None, 0.0)
    meter.set_rates(Rate(1, burst=1))
    assert meter.wait_reason(0.0) == "the rate of 'requests' (1 in 1 s), for another 1.0 s"


def test_a_rate_found_by_refusals_is_a_reason_too() -> None:
    """With what it is at present."""
    meter = Meter()
    meter.throttled(1.0, hinted=False, queueing=False)
    meter.take(None, 1.0)
    assert meter.wait_reason(1.0) == "the rate found by refusals (0.5/s), for another 2.0 s"
    assert meter.rate_found(1.0) == 0.5
