"""What a server says about when to come back is read strictly, and never makes anybody wait for more than an hour."""

import os
import time
from collections.abc import Iterator, Mapping
from email.message import Message
from email.utils import formatdate
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from penstock.gate.server_hints import (
    CONCURRENT,
    LONGEST_HINT,
    LONGEST_VALUE,
    MOST_POLICIES,
    REQUESTS,
    Policy,
    ServerHints,
    hint_of,
    hints_of,
    parse_retry_after,
)

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


class Refusing(Exception):
    """An error of some SDK with the headers of an answer."""

    def __init__(self, headers: Any, status: Any = None) -> None:
        self.headers = headers
        self.status = status


def test_headers_of_an_error_are_read_too() -> None:
    """Such as aiohttp's, in any case; its status says what they mean."""
    url = URL("http://example.test/")
    info = aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    refusal = aiohttp.ClientResponseError(info, (), status=429, headers=answer({"retry-after": "7"}))
    assert hint_of(refusal) == 7
    headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(NOW) + 9)}
    assert hint_of(Refusing(headers, 429), now=NOW) == 9
    assert hint_of(Refusing(headers, 500), now=NOW) is None
    assert hint_of(Refusing(headers), now=NOW) is None
    assert hint_of(Refusing({"Retry-After": "7"})) == 7


def test_a_message_of_the_standard_library_is_a_mapping_too() -> None:
    """urllib's errors have one."""
    message = Message()
    message["Retry-After"] = "7"
    assert hint_of(Refusing(message, 503)) == 7


class Awkward(Exception):
    """Raises when it is looked at."""

    @property
    def retry_after(self) -> float:
        raise RuntimeError

    @property
    def headers(self) -> dict[str, str]:
        return AwkwardHeaders(self.args[0])


class AwkwardHeaders(dict[str, str]):
    """The same for headers."""

    def items(self) -> Any:
        raise RuntimeError


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "7"}])
def test_attributes_that_raise_are_as_good_as_absent(headers: dict[str, str]) -> None:
    """The mistake of somebody else's class must not end the run."""
    assert hint_of(Awkward(headers)) is None


@pytest.mark.parametrize("headers", [None, 5, "retry-after", ["retry-after"], {}, {"Date": "x"}, {5: "retry-after"}])
def test_what_is_no_mapping_of_text_says_nothing(headers: Any) -> None:
    """Any attribute may have that name."""
    assert hint_of(Refusing(headers, 429)) is None


# --- headers ---

DATE = formatdate(NOW, usegmt=True)


def answer(*headers: Mapping[str, str]) -> CIMultiDictProxy[str]:
    """Headers as aiohttp gives them; several mappings for several lines of one name."""
    fields = CIMultiDict({"Server": "nginx", "Date": DATE, "Content-Type": "application/json"})
    for more in headers:
        fields.extend(more)
    return CIMultiDictProxy(fields)


def policies(*headers: Mapping[str, str]) -> list[tuple[Any, ...]]:
    """By name: quota, remaining, reset, window, unit."""
    hints = hints_of(answer(*headers), now=0.0)
    return [] if hints is None else [tuple(policy) for policy in hints.policies]


def test_most_answers_say_nothing() -> None:
    """And no object is made for them."""
    assert hints_of(answer(), now=NOW) is None
    assert hints_of({}, now=NOW) is None
    assert hints_of({"X-RateLimit-Used": "5", "X-RateLimit-Resource": "core"}, now=NOW) is None


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7", "retry-after-ms": "100"}, 7.0),
        ({"Retry-After": formatdate(NOW + 90, usegmt=True)}, 90.0),
        ({"Retry-After": "soon", "retry-after-ms": "100"}, 0.1),
        ({"Retry-After-Ms": "1500.5"}, 1.5005),
        ({"x-ms-retry-after-ms": "20"}, 0.02),
        ({"x-amz-retry-after": "3600000"}, 3_600.0),
        ({"x-amz-retry-after": "3600001"}, None),
        ({"x-amz-retry-after": "-1"}, None),
        ({"retry-after-ms": "\u0663"}, None),
        ({"retry-after-ms": "1e3"}, None),
    ],
)
def test_waits_are_seconds_dates_or_milliseconds(headers: dict[str, str], expected: float | None) -> None:
    """The standard's own header is the strongest; a malformed one is as good as absent."""
    hints = hints_of(answer(headers), now=0.0)
    assert (None if hints is None else hints.retry_after) == expected


def test_the_first_of_several_lines_that_can_be_used_counts() -> None:
    """A date has a comma itself, so lines cannot be joined."""
    hints = hints_of(answer({"Retry-After": "soon"}, {"Retry-After": "3"}, {"Retry-After": "5"}), now=0.0)
    assert hints == ServerHints(3.0, ())


def test_the_draft_of_the_ietf_is_read_with_all_its_policies() -> None:
    """Lists, several lines, names as strings and tokens, units, partitions; quotas without a state of their own."""
    assert policies(
        {"RateLimit": '"minute";r=50;t=30, hour;r=0;t=1800'},
        {"RateLimit": '"per \\"user\\"";r=3;t=5;pk=:YWJj:'},
        {
            "RateLimit-Policy": '"minute";q=100;w=60;x="a, b;c", hour;q=1000;w=3600;burst,'
            '"per \\"user\\"";q=9;w=9;pk=:YWJj:, "flight";q=10;qu="concurrent-requests"'
        },
    ) == [
        ("minute", 100, 50, 30, 60, REQUESTS),
        ("hour", 1_000, 0, 1_800, 3_600, REQUESTS),
        ('per "user" :YWJj:', 9, 3, 5, 9, REQUESTS),
        ("flight", 10, None, None, None, CONCURRENT),
    ]


def test_a_policy_and_its_state_find_each_other_though_one_names_no_partition() -> None:
    """The name is enough then."""
    assert policies({"RateLimit": "a;r=1;t=2", "RateLimit-Policy": "a;q=5;w=3;pk=:x:"}) == [("a", 5, 1, 2, 3, REQUESTS)]
    assert policies({"RateLimit": "a;r=1;t=2;pk=:x:", "RateLimit-Policy": "a;q=5;w=3"}) == [
        ("a :x:", 5, 1, 2, 3, REQUESTS)
    ]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"RateLimit": "a;r=1;t=2"}, [("a", None, 1, 2, None, REQUESTS)]),
        ({"RateLimit": "a;r=1"}, [("a", None, 1, None, None, REQUESTS)]),
        ({"RateLimit": "a;r=1;t=3601"}, [("a", None, 1, None, None, REQUESTS)]),
        ({"RateLimit": "a;r=-1;t=-1"}, [("a", None, 0, None, None, REQUESTS)]),
        ({"RateLimit": 'a;r=1;t="2"'}, [("a", None, 1, None, None, REQUESTS)]),
        ({"RateLimit": "a;r=1;t=2,"}, [("a", None, 1, 2, None, REQUESTS)]),
        ({"RateLimit": "a;t=2"}, []),
        ({"RateLimit": ""}, []),
        ({"RateLimit": "a;r=1 b"}, []),
        ({"RateLimit": "a;r=1, ;r=2"}, []),
        ({"RateLimit": '"a;r=1'}, []),
        ({"RateLimit": "a;r=1, " + "x" * LONGEST_VALUE}, []),
        ({"RateLimit-Policy": '"a";w=5'}, []),
        ({"RateLimit-Policy": '"a";q=5;w=0;qu="Tokens"'}, [("a", 5, None, None, None, "tokens")]),
    ],
)
def test_a_malformed_field_is_ignored_whole(headers: dict[str, str], expected: list[tuple[Any, ...]]) -> None:
    """RFC 9651 4.2; a parameter of the wrong kind is ignored alone."""
    assert policies(headers) == expected


def test_many_lines_that_are_too_long_together_are_ignored() -> None:
    """Each for itself would have been read."""
    line = {"RateLimit": ", ".join(f"policy{number};r=1;t=2" for number in range(150))}
    assert len(policies(line)) == MOST_POLICIES
    assert policies(line, line) == []


def test_the_form_of_2023_is_a_dictionary() -> None:
    """With its policy in a header of its own."""
    headers = {"RateLimit": "limit=100, remaining=50, reset=5", "RateLimit-Policy": "100;w=60"}
    assert policies(headers) == [("default", 100, 50, 5, 60, REQUESTS)]
    assert policies({"RateLimit": "limit=100, reset=5"}) == []
    assert policies({"RateLimit": "limit=100, remaining=many"}) == []


def test_the_older_draft_has_its_policies_in_the_limit_or_beside_it() -> None:
    """The first number is the quota that counts at present."""
    state = {"RateLimit-Remaining": "4", "RateLimit-Reset": "13"}
    expected = [("ratelimit", 100, 4, 13, 60, REQUESTS)]
    assert policies({"RateLimit-Limit": "100, 100;w=60, 5000;w=3600"}, state) == expected
    assert policies({"RateLimit-Limit": "100", "RateLimit-Policy": "100;w=60"}, state) == expected
    assert policies({"RateLimit-Limit": "100;w=60"}, state) == expected


def test_everybodys_own_forms_are_read() -> None:
    """The unit stands behind the name, in its middle, or nowhere; twice the same counts once."""
    assert policies({"X-RateLimit-Limit": "5000", "X-RateLimit-Remaining": "4999", "X-RateLimit-Reset": "30"}) == [
        ("x-ratelimit", 5_000, 4_999, 30, None, REQUESTS)
    ]
    assert policies(
        {"x-rate-limit-limit": "5", "x-rate-limit-remaining": "4", "x-rate-limit-reset": "30"},
        {"RateLimit-Limit": "5", "RateLimit-Remaining": "4", "RateLimit-Reset": "30"},
    ) == [("x-rate-limit", 5, 4, 30, None, REQUESTS)]
    assert policies(
        {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
        },
        {"x-ratelimit-limit-tokens": "90000", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"},
    ) == [
        ("x-ratelimit-requests", 60, 59, 1, None, REQUESTS),
        ("x-ratelimit-tokens", 90_000, 0, 360, None, "tokens"),
    ]
    assert policies(
        {
            "anthropic-ratelimit-input-tokens-limit": "50",
            "anthropic-ratelimit-input-tokens-remaining": "49",
            "anthropic-ratelimit-input-tokens-reset": "2023-11-14T22:14:50Z",
        }
    ) == [("anthropic-ratelimit-input-tokens", 50, 49, 90, None, "input-tokens")]
    assert policies({"X-RateLimit-Limit-Minute": "20", "X-RateLimit-Remaining-Minute": "3"}) == [
        ("x-ratelimit-minute", 20, 3, None, 60, REQUESTS)
    ]
    assert policies({"X-RateLimit-Reset": "3"}) == [("x-ratelimit", None, None, 3, None, REQUESTS)]
    assert policies({"X-RateLimit-Limit": "many", "X-RateLimit-Remaining": "-2"}) == [
        ("x-ratelimit", None, 0, None, None, REQUESTS)
    ]


def test_the_draft_wins_over_everybodys_own_forms() -> None:
    """It is the more exact one of the two."""
    assert policies({"RateLimit": "a;r=1;t=2", "X-RateLimit-Remaining": "7"}) == [("a", None, 1, 2, None, REQUESTS)]


def test_a_server_cannot_send_any_number_of_policies() -> None:
    """The first ones count."""
    many = {f"X-RateLimit-Remaining-Unit{number}": str(number) for number in range(3 * MOST_POLICIES)}
    assert len(policies(many)) == MOST_POLICIES


@pytest.mark.parametrize(
    ("reset", "expected"),
    [
        ("13", 13.0),
        ("0.35", 0.35),
        ("0", 0.0),
        ("3600", 3_600.0),
        ("3601", None),
        ("-1", None),
        ("1700000090", 90.0),
        ("1700000090.5", 90.5),
        ("1700000090500", 90.5),
        ("1699999990", 0.0),
        ("1699990000", None),
        ("1700009999", None),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1m30s", 90.0),
        ("500ms", 0.5),
        ("1h", 3_600.0),
        ("1h1s", None),
        ("1.5s", 1.5),
        ("2023-11-14T22:14:50Z", 90.0),
        ("2023-11-14t22:14:50.25z", 90.25),
        ("2023-11-14 22:14:50", 90.0),
        ("2023-11-14T23:14:50+01:00", 90.0),
        ("2023-11-14T21:14:50-0100", 90.0),
        ("2023-11-14T22:12:00Z", 0.0),
        ("2023-13-14T22:14:50Z", None),
        ("0000-01-01T00:00:00Z", None),
        ("2023-11-14T22:99:50Z", None),
        ("Tue, 14 Nov 2023 22:14:50 GMT", 90.0),
        ("Tue Nov 14 2023 23:14:50 GMT+0100 (Central European Standard Time)", 90.0),
        ("Tue Foo 14 2023 23:14:50 GMT+0100", None),
        ("soon", None),
        ("", None),
        ("1s " * 40, None),
        ("\u0661\u0663", None),
        ("1\x00", None),
        ("9" * 400, None),
    ],
)
def test_a_reset_has_many_forms(reset: str, expected: float | None) -> None:
    """All are relative to the date of the answer; what has just passed is now, what is too far away a mistake."""
    assert policies({"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": reset}) == [
        ("x-ratelimit", None, 7, expected, None, REQUESTS)
    ]


def test_a_reset_after_is_never_a_time_of_day() -> None:
    """And is more exact than the other one."""
    headers = {"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": "1700000099", "X-RateLimit-Reset-After": "0.35"}
    assert policies(headers) == [("x-ratelimit", None, 7, 0.35, None, REQUESTS)]
    assert policies(headers | {"X-RateLimit-Reset-After": "1700000099"})[0][3] is None


def test_without_a_date_of_the_answer_the_local_clock_counts() -> None:
    """Second best."""
    for headers in ({"Date": "yesterday"}, {}):
        hints = hints_of(headers | {"X-RateLimit-Reset": "1700000090"}, now=NOW)
        assert hints is not None
        assert hints.policies[0].reset == 90


# --- pauses ---


def told(*states: tuple[float | None, float | None], retry_after: float | None = None) -> ServerHints:
    return ServerHints(
        retry_after,
        tuple(Policy(f"p{index}", 100, left, reset, None, REQUESTS) for index, (left, reset) in enumerate(states)),
    )


@pytest.mark.parametrize(
    ("hints", "status", "expected"),
    [
        (told((0, 30), retry_after=5), 429, 5),
        (told((0, 30), retry_after=5), 503, 5),
        (told((0, 30), retry_after=5), 200, None),
        (told((0, 30), retry_after=5), None, None),
        (told((0, 30)), 429, 30),
        (told((0, 30)), 403, 30),
        (told((0, 30)), 503, None),
        (told((0, 3_000)), 403, 3_000),
        (told((0, 30), (0, 40), (5, 3_000)), 429, 40),
        (told((None, 30)), 429, 30),
        (told((5, 30)), 429, 30),
        (told((50, 30), (2, 7)), 429, 7),
        (told((4_000, 3_000)), 429, 3_000),
        (told((4_000, 3_000)), 403, None),
        (told((4_000, 30)), 403, None),
        (told((0, None)), 429, None),
        (told(), 429, None),
    ],
)
def test_what_a_refusal_pauses(hints: ServerHints, status: int | None, expected: float | None) -> None:
    """`Retry-After` first, then what is used up, then what is nearest to it; an answer that is no refusal nothing."""
    assert hints.pause(status) == expected


def test_a_limit_on_what_is_in_flight_has_no_reset_to_wait_for() -> None:
    """And a policy without a quota is measured by what is left."""
    flight = Policy("flight", 10, 0, 3_000, None, CONCURRENT)
    few = Policy("few", None, 3, 20, None, REQUESTS)
    assert ServerHints(None, (flight,)).pause(429) is None
    assert ServerHints(None, (flight, few)).pause(429) == 20


# --- anything at all ---

names = st.sampled_from(
    [
        "Retry-After", "retry-after-ms", "x-ms-retry-after-ms", "RateLimit", "RateLimit-Policy", "RateLimit-Limit",
        "RateLimit-Remaining", "RateLimit-Reset", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset",
        "X-RateLimit-Reset-After", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens", "Date",
        "anthropic-ratelimit-requests-reset",
    ]
) | st.text()  # fmt: skip
pieces = st.sampled_from(
    ['"a"', "b", ";", "r=", "t=", "q=", "w=", "qu=", "=", ",", " ", "\\", '"', "7", "-1", "1700000090", "m", "s",
     "ms", "h", "2023-11-14T22:14:50", "Z", "+99:99", "Tue Nov 14 2023 23:14:50 GMT+9999", "\x00", "\u0663",
     "limit=", "\n"]
)  # fmt: skip
values = any_text | st.lists(pieces, max_size=12).map("".join)


@given(headers=st.dictionaries(names, values), now=st.floats(0, 1e11), status=st.sampled_from([200, 403, 429, 503]))
def test_no_headers_raise_or_make_anybody_wait_for_more_than_an_hour(
    headers: dict[str, str], now: float, status: int
) -> None:
    """Whatever text they are made of."""
    hints = hints_of(headers, now=now)
    error = Refusing(headers, status)
    assert hint_of(error, now=now) == (None if hints is None else hints.pause(status))
    if hints is None:
        return
    assert hints.retry_after is None or 0 <= hints.retry_after <= LONGEST_HINT
    pause = hints.pause(status)
    assert pause is None or 0 <= pause <= LONGEST_HINT
    for policy in hints.policies:
        assert policy.reset is None or 0 <= policy.reset <= LONGEST_HINT
        assert policy.remaining is None or 0 <= policy.remaining < 1e15
        assert policy.quota is None or 0 <= policy.quota < 1e15
        assert policy.window is None or 0 < policy.window < 1e15
