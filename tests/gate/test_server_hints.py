"""What a server says about when to come back is read strictly, and never makes anybody wait for more than an hour."""

import os
import time
from collections.abc import Iterator
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gate.server_hints import LONGEST_HINT, hint_of, parse_retry_after

NOW = 1_700_000_000.0


@pytest.fixture
def far_from_greenwich() -> Iterator[None]:
    """A local time zone in which a date that is taken for local is hours off."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Etc/GMT+11"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("3600", 3600.0),
        ("3601", None),
        ("9" * 400, None),
        ("-1", None),
        ("+1", None),
        ("1.5", None),
        ("1_0", None),
        ("٣", None),
        ("", None),
        ("soon", None),
        ("Wed, 99 Foo 2015 07:28:00 GMT", None),
        ("Wed, 21 Oct 99999 07:28:00 GMT", None),
    ],
)
def test_seconds_are_whole_and_everything_else_is_ignored(value: str | None, expected: float | None) -> None:
    """RFC 9110 10.2.3 knows digits and dates; signs, fractions and foreign digits are malformed."""
    assert parse_retry_after(value, date=None, now=NOW) == expected


def test_a_date_is_relative_to_the_date_of_the_answer() -> None:
    """A client whose clock is a day off waits as long as the server means."""
    until, answered = formatdate(NOW + 90, usegmt=True), formatdate(NOW, usegmt=True)
    assert parse_retry_after(until, date=answered, now=NOW + 86_400) == 90


@pytest.mark.parametrize("date", [None, "yesterday"])
def test_a_date_without_a_usable_date_of_the_answer_is_relative_to_now(date: str | None) -> None:
    """The local clock is second best."""
    assert parse_retry_after(formatdate(NOW + 90, usegmt=True), date=date, now=NOW) == 90


def test_a_date_in_the_past_means_at_once() -> None:
    """Nobody waits a negative time."""
    assert parse_retry_after(formatdate(NOW - 90, usegmt=True), date=None, now=NOW) == 0


@pytest.mark.usefixtures("far_from_greenwich")
@pytest.mark.parametrize(
    "until",
    [
        "Tue, 14 Nov 2023 22:14:50 GMT",
        "Tuesday, 14-Nov-23 22:14:50 GMT",
        "Tue Nov 14 22:14:50 2023",
        "Tue, 14 Nov 2023 22:14:50 -0000",
    ],
)
def test_all_forms_of_an_http_date_mean_greenwich(until: str) -> None:
    """The two obsolete forms of RFC 9110 5.6.7 too: one has no zone, and the local one would be hours off."""
    assert parse_retry_after(until, date=None, now=NOW) == 90


tokens = st.sampled_from(
    ["Tue,", "14", "Nov", "14-Nov-23", "2023", "22:14:50", "1:2", "::", "GMT", "-0000", "+9999", "-", ","]
)
any_text = st.one_of(
    st.text(),
    st.from_regex(r"[+-]?[0-9]{1,400}(\.[0-9]*)?"),
    st.floats(-6e10, 2e11).map(formatdate),
    st.lists(tokens | st.text(max_size=3), max_size=8).map(" ".join),
)


@given(value=any_text, date=st.none() | any_text, now=st.floats(0, 1e11))
def test_no_header_raises_or_makes_anybody_wait_for_more_than_an_hour(value: str, date: str | None, now: float) -> None:
    """Whatever bytes a server sends: a number from 0 to 3600, or None."""
    wait = parse_retry_after(value, date=date, now=now)
    assert wait is None or 0 <= wait <= LONGEST_HINT


@given(seconds=st.integers(0, 10**6))
def test_seconds_and_the_date_so_many_seconds_away_mean_the_same(seconds: int) -> None:
    """Two spellings of one wait."""
    until = formatdate(NOW + seconds, usegmt=True)
    assert parse_retry_after(str(seconds), date=None, now=NOW) == parse_retry_after(until, date=None, now=NOW)


class Telling(Exception):
    """An error of some SDK."""

    def __init__(self, retry_after: object) -> None:
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [(2, 2.0), (0.5, 0.5), (0, 0.0), (-1, None), (3601, None), (True, None), ("2", None), (float("nan"), None)],
)
def test_any_error_can_carry_a_wait(retry_after: object, expected: float | None) -> None:
    """Only a number of seconds within an hour is one."""
    assert hint_of(Telling(retry_after)) == expected


def test_an_error_without_a_wait_carries_none() -> None:
    """Most errors say nothing."""
    assert hint_of(ValueError()) is None
