"""The books of a run: what is counted, what is kept, and that they cannot be cooked."""

import dataclasses
import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import FailureKind, HttpStatusError, InternalError, Outcome, Report, UsageError, classify
from penstock.errors import first_line
from penstock.report import INTERRUPTED, KNOWN_CAUSES, MOST_CAUSES, TOO_MANY_ERRORS, Cause, Tally


def done(ran: float = 0.0, attempts: int = 0) -> Outcome[Any]:
    return Outcome("k", "item", 1, None, None, attempts, 0.0, ran)


def failed(error: Exception, key: object = None, attempts: int = 0) -> Outcome[Any]:
    return Outcome(key, "item", None, error, classify(error), attempts, 0.0, 0.0)


def report_of(*outcomes: Outcome[Any], left: int = 0, stopped: str | None = None) -> Report:
    tally = Tally()
    for outcome in outcomes:
        tally.add(outcome)
    return tally.report(read=len(outcomes) + left, left=left, stopped=stopped, elapsed=1.0)


ERRORS = st.sampled_from([ValueError("a"), ValueError("b"), KeyError("c"), TimeoutError(), OSError("d\nmore")])
OUTCOMES = st.lists(
    st.one_of(
        st.builds(done, ran=st.floats(0, 1e6), attempts=st.integers(0, 5)),
        st.builds(failed, error=ERRORS, key=st.integers(), attempts=st.integers(0, 5)),
    )
)


# --- counting ---


@given(outcomes=OUTCOMES, left=st.integers(0, 10))
def test_every_outcome_is_counted_exactly_once(outcomes: list[Outcome[Any]], left: int) -> None:
    """By state, by kind and by cause; attempts are those of all jobs, durations those of the successful ones."""
    report = report_of(*outcomes, left=left)
    report.verify()
    bad = [outcome for outcome in outcomes if not outcome.ok]
    assert (report.done, report.failed, report.left) == (len(outcomes) - len(bad), len(bad), left)
    assert report.kinds == Counter(outcome.kind for outcome in bad)
    assert sum(cause.count for cause in report.causes) == len(bad)
    assert report.attempts == sum(outcome.attempts for outcome in outcomes)
    assert report.ran.count == report.done


@given(outcomes=OUTCOMES)
def test_causes_are_sorted_and_each_is_told_once(outcomes: list[Outcome[Any]]) -> None:
    """The most frequent first, of equally frequent ones the one that came first; each with its first key."""
    causes = report_of(*outcomes).causes
    told = [(cause.kind, cause.error) for cause in causes]
    assert len(set(told)) == len(told)
    in_order_of_coming = [(o.kind, first_line(o.error)) for o in outcomes if o.error is not None]
    assert told == [cause for cause, _ in Counter(in_order_of_coming).most_common()]
    for cause in causes:
        first = next(o for o in outcomes if o.error is not None and (o.kind, first_line(o.error)) == told[0])
        assert cause.example_key == first.key
        told.pop(0)


def test_a_cause_is_kind_class_and_first_line_with_an_example() -> None:
    report = report_of(failed(ValueError("bad id\ndetails 1"), key=7), failed(ValueError("bad id\ndetails 2"), key=8))
    assert report.causes == (Cause(FailureKind.PERMANENT, "ValueError: bad id", 2, 7),)


def test_memory_is_bounded_when_every_error_has_a_message_of_its_own() -> None:
    """Causes beyond the first thousand are counted by kind only; those that are known go on being counted."""
    tally = Tally()
    for number in range(KNOWN_CAUSES + 500):
        tally.add(failed(ValueError(f"record {in_letters(number)}"), key=number))
    for _ in range(3):
        tally.add(failed(ValueError(f"record {in_letters(5)}"), key=None))
    assert len(tally._causes) == KNOWN_CAUSES
    report = tally.report(read=KNOWN_CAUSES + 503, left=0, stopped=None, elapsed=1.0)
    report.verify()
    assert len(report.causes) == MOST_CAUSES
    assert report.causes[0] == Cause(FailureKind.PERMANENT, f"ValueError: record {in_letters(5)}", 4, 5)


def in_letters(number: int) -> str:
    """A number that does not look like one."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def test_failures_that_differ_in_numbers_or_addresses_only_are_one_cause() -> None:
    """Ten thousand 404s of ten thousand addresses are one line, and the first of them is the example."""
    tally = Tally()
    for number in range(50):
        tally.add(failed(HttpStatusError(404, "GET", f"http://h/{number}"), key=number))
        tally.add(failed(HttpStatusError(410, "GET", f"http://h/{number}"), key=number))
        tally.add(failed(ValueError(f"no item {number}"), key=number))
    report = tally.report(read=150, left=0, stopped=None, elapsed=1.0)
    assert [(cause.error, cause.count, cause.example_key) for cause in report.causes] == [
        ("HttpStatusError: GET http://h/0 -> HTTP 404", 50, 0),
        ("HttpStatusError: GET http://h/0 -> HTTP 410", 50, 0),
        ("ValueError: no item 0", 50, 0),
    ]


def test_a_report_is_printed_as_a_summary() -> None:
    """Sums, speed, why it stopped, and the causes, a line each."""
    tally = Tally()
    tally.add(failed(ValueError("bad"), key="k", attempts=3))
    report = tally.report(read=3, left=2, stopped="interrupted", elapsed=0.5)
    assert str(report).splitlines() == [
        "read 3 = done 0 + failed 1 + left 2, 1 permanent",
        "0.5 s, 2 jobs/s, 3 attempts",
        "stopped early: interrupted",
        "1 x ValueError: bad (first: 'k')",
    ]
    assert "0 jobs/s" in str(Tally().report(read=0, left=0, stopped=None, elapsed=0.0))


def test_a_report_does_not_change_when_counting_goes_on() -> None:
    tally = Tally()
    tally.add(failed(ValueError()))
    report = tally.report(read=1, left=0, stopped=None, elapsed=1.0)
    tally.add(failed(ValueError()))
    report.verify()
    assert report.kinds == {FailureKind.PERMANENT: 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.done = 5  # type: ignore[misc]


def test_a_report_survives_pickling() -> None:
    report = report_of(done(0.5), failed(KeyError("id"), key=3), left=1, stopped=INTERRUPTED)
    assert pickle.loads(pickle.dumps(report)) == report


# --- verify ---


BOOKS = report_of(done(), done(), failed(ValueError("x")), failed(KeyError("y")), left=3)


def test_books_that_add_up_verify() -> None:
    BOOKS.verify()
    report_of().verify()


@pytest.mark.parametrize(
    "cooked",
    [
        {"read": 8},
        {"read": 6},
        {"done": 1},
        {"done": 3},
        {"failed": 3},
        {"left": 0},
        {"done": 3, "failed": 1},
        {"done": 4, "failed": 0},
        {"kinds": {}},
        {"kinds": {FailureKind.BUG: 3}},
        {"causes": (Cause(FailureKind.BUG, "KeyError", 3, None),)},
    ],
    ids=str,
)
def test_cooked_books_do_not_verify(cooked: dict[str, Any]) -> None:
    """One number changed, an item in two states, a failure without a kind: it says so, and whose fault it is."""
    with pytest.raises(InternalError, match=r"items do not add up: read \d.*bug in penstock, please report it"):
        dataclasses.replace(BOOKS, **cooked).verify()


# --- exit code ---


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (report_of(), 0),
        (report_of(done()), 0),
        (report_of(done(), failed(ValueError())), 5),
        (report_of(done(), left=1), 5),
        (report_of(failed(ValueError()), stopped=TOO_MANY_ERRORS), 8),
        (report_of(done(), left=1, stopped=TOO_MANY_ERRORS), 8),
        (report_of(done(), stopped=INTERRUPTED), 130),
        (report_of(failed(ValueError()), left=2, stopped=INTERRUPTED), 130),
    ],
)
def test_a_script_can_exit_with_what_happened(report: Report, code: int) -> None:
    """What ended the run early says more than what failed in it."""
    assert report.exit_code == code


# --- first_line ---


class Unshowable(Exception):
    """As classes that read an attribute of a response that never came."""

    def __str__(self) -> str:
        raise AttributeError("'NoneType' object has no attribute 'status'")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad id"), "ValueError: bad id"),
        (ValueError("bad id\nand more"), "ValueError: bad id"),
        (ValueError("\n\n  bad id"), "ValueError: bad id"),
        (ValueError(), "ValueError"),
        (TimeoutError(), "TimeoutError"),
        (UsageError("x"), "UsageError: x"),
        (Unshowable(), "Unshowable: <its __str__ raised an error>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_told_in_one_line(error: Exception, line: str) -> None:
    """Also one whose class cannot be shown: that mistake must not end a run of a million items."""
    assert first_line(error) == line


@given(st.text())
def test_the_line_is_one_line_and_short_whatever_the_message_is(message: str) -> None:
    line = first_line(ValueError(message * 10))
    assert line.startswith("ValueError")
    assert len(line) <= 200
    assert len(line.splitlines()) == 1
