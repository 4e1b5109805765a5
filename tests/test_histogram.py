"""The rules of the histogram: exact counts, quantiles within the stated error, merging as if recorded together."""

import math
import pickle
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.histogram import RELATIVE_ERROR, Distribution, Histogram

# What the roundings of log and exp add to the bound at the border of a bucket, for the largest exponents.
ROUNDING = 1e-12

normal_values = st.floats(min_value=sys.float_info.min, max_value=sys.float_info.max)
latencies = st.floats(min_value=1e-6, max_value=1e5)
values = st.one_of(st.just(0.0), latencies, normal_values)


def recorded(numbers: list[float]) -> Histogram:
    histogram = Histogram()
    for number in numbers:
        histogram.record(number)
    return histogram


def exact_quantile(numbers: list[float], q: float) -> float:
    """By the same rank rule."""
    return sorted(numbers)[max(1, math.ceil(q * len(numbers))) - 1]


@given(st.lists(values, min_size=1, max_size=200), st.floats(min_value=0, max_value=1))
@example([0.0, sys.float_info.min, 1.0], 0.5)
@example([0.0, sys.float_info.max, sys.float_info.max], 0.5)
def test_a_quantile_is_within_the_stated_relative_error_of_the_exact_one(numbers: list[float], q: float) -> None:
    exact = exact_quantile(numbers, q)
    assert abs(recorded(numbers).quantile(q) - exact) <= (RELATIVE_ERROR + ROUNDING) * exact


@given(normal_values, normal_values, normal_values)
def test_the_error_holds_for_the_middle_of_three_values_over_all_floats(a: float, b: float, c: float) -> None:
    """The ends are exact; the middle one is what a bucket answers."""
    middle = sorted([a, b, c])[1]
    assert abs(recorded([a, b, c]).quantile(0.5) - middle) <= (RELATIVE_ERROR + ROUNDING) * middle


@given(st.lists(values, min_size=1))
def test_a_quantile_rises_with_its_share_and_stays_among_the_values(numbers: list[float]) -> None:
    histogram = recorded(numbers)
    quantiles = [histogram.quantile(step / 20) for step in range(21)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] == min(numbers)
    assert quantiles[-1] == max(numbers)


@given(st.lists(values, min_size=1))
def test_count_total_mean_and_ends_are_exact(numbers: list[float]) -> None:
    histogram = recorded(numbers)
    total = sum(numbers, 0.0)
    assert histogram.count == len(numbers)
    assert histogram.total == pytest.approx(total)
    assert histogram.mean == pytest.approx(total / len(numbers))
    assert (histogram.min, histogram.max) == (min(numbers), max(numbers))


@given(st.lists(latencies), st.lists(latencies))
def test_merging_is_as_if_all_had_been_recorded_in_one(left: list[float], right: list[float]) -> None:
    together = recorded(left + right)
    merged, other = recorded(left), recorded(right)
    merged.merge(other)
    assert merged.count == together.count == len(left) + len(right)
    assert merged.total == pytest.approx(together.total)
    if left + right:
        assert [merged.quantile(step / 50) for step in range(51)] == [
            together.quantile(step / 50) for step in range(51)
        ]
    assert other.count == len(right)


def test_a_histogram_merged_into_itself_counts_twice() -> None:
    histogram = recorded([1, 2, 3])
    histogram.merge(histogram)
    assert (histogram.count, histogram.total) == (6, 12)


def test_zero_has_a_bucket_of_its_own() -> None:
    histogram = recorded([0.0, 0.0, 0.0, 5.0])
    assert (histogram.quantile(0.5), histogram.min, histogram.mean) == (0, 0, 1.25)


def test_numbers_below_the_smallest_normal_float_count_as_zero() -> None:
    """Their own rounding error exceeds ours."""
    subnormal = sys.float_info.min / 3
    assert recorded([0.0, subnormal, subnormal, 1.0]).quantile(0.5) == 0


@pytest.mark.parametrize("value", [-1.0, -1e-300, math.nan, math.inf, -math.inf])
def test_what_is_negative_or_not_finite_is_refused_and_not_counted(value: float) -> None:
    histogram = recorded([1.0])
    with pytest.raises(ValueError, match=f"finite values that are not negative, found {value!r}"):
        histogram.record(value)
    assert (histogram.count, histogram.total, histogram.max) == (1, 1, 1)


@pytest.mark.parametrize("q", [-0.1, 1.1, 99, math.nan])
def test_a_quantile_that_is_no_share_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match=r"p99 is quantile\(0\.99\)"):
        recorded([1.0]).quantile(q)


def test_an_empty_histogram_has_a_count_of_zero_and_answers_nan() -> None:
    histogram = Histogram()
    summary = histogram.snapshot()
    assert (histogram.count, histogram.total, summary.count) == (0, 0, 0)
    assert all(
        math.isnan(number)
        for number in (histogram.quantile(0.5), histogram.mean, histogram.min, histogram.max, summary.p99, summary.max)
    )


def test_a_snapshot_is_a_frozen_summary_of_now() -> None:
    histogram = recorded([float(number) for number in range(1, 1001)])
    summary = histogram.snapshot()
    assert summary == Distribution(
        count=1000,
        mean=500.5,
        min=1,
        p50=histogram.quantile(0.5),
        p90=histogram.quantile(0.9),
        p99=histogram.quantile(0.99),
        p999=histogram.quantile(0.999),
        max=1000,
    )
    histogram.record(1e6)
    assert summary.count == 1000
    with pytest.raises(AttributeError):
        summary.count = 5  # type: ignore[misc]


def test_memory_is_bounded_by_the_buckets_of_all_floats() -> None:
    """One value each half bucket, over the whole range of the normal floats: 28,358 buckets and no more."""
    histogram = Histogram()
    half_bucket = math.sqrt((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
    value = sys.float_info.min * half_bucket
    while value < sys.float_info.max:
        histogram.record(value)
        value *= half_bucket
    histogram.record(0.0)
    assert len(histogram._counts) <= 28_358 + 1


def test_the_extremes_of_the_floats_can_be_asked_for() -> None:
    extremes = [sys.float_info.min, sys.float_info.max, sys.float_info.max, 0.0]
    histogram = recorded(extremes)
    assert histogram.quantile(0.75) == pytest.approx(sys.float_info.max, rel=RELATIVE_ERROR)
    assert histogram.total == math.inf


def test_it_can_be_sent_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(recorded([1, 2, 3])))
    assert copy.snapshot() == recorded([1, 2, 3]).snapshot()


def test_its_repr_shows_the_state() -> None:
    assert repr(recorded([1, 1, 4])) == "<Histogram count=3 mean=2 p50=1 p99=4 max=4>"
