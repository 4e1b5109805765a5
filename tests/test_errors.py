"""The exception tree: who is below whom, what travels in a pickle, and what the messages say."""

import copy
import inspect
import pickle
from typing import Any

import pytest

from penstock import errors
from penstock.errors import (
    AllFailed,
    AttemptTimeout,
    BodyTooLarge,
    BudgetReached,
    CircuitOpen,
    ClosedError,
    ConnectionFailed,
    ConnectTimeout,
    DeadlockError,
    HttpStatusError,
    InternalError,
    JobTimeout,
    JournalError,
    NotJson,
    Overloaded,
    PenstockError,
    RecordedError,
    RoundTripError,
    SkipItem,
    TooManyErrors,
    UsageError,
    WrongLoop,
    WrongThread,
    first_line,
    in_figures,
    name_of_class,
    shown,
)
from penstock.outcome import FailureKind, classify

EXAMPLES: dict[type[PenstockError], tuple[tuple[Any, ...], dict[str, Any]]] = {
    PenstockError: (("text",), {}),
    UsageError: (("text",), {}),
    ClosedError: (("text",), {}),
    WrongLoop: (("text",), {}),
    WrongThread: (("text",), {}),
    RoundTripError: (("text",), {}),
    HttpStatusError: (
        (503, "GET", "http://x/a", b"busy", 2.5),
        {"status": 503, "method": "GET", "url": "http://x/a", "body_start": b"busy", "retry_after": 2.5},
    ),
    BodyTooLarge: (("GET", "http://x/a", 1000), {"method": "GET", "url": "http://x/a", "max_body_bytes": 1000}),
    NotJson: (
        ("GET", "http://x/a", 200, "text/html", b"<html>", "Expecting value"),
        {
            "method": "GET",
            "url": "http://x/a",
            "status": 200,
            "content_type": "text/html",
            "body_start": b"<html>",
            "reason": "Expecting value",
        },
    ),
    ConnectionFailed: (
        ("POST", "http://x/a", "refused", False),
        {"method": "POST", "url": "http://x/a", "reason": "refused", "sent": False},
    ),
    ConnectTimeout: (
        ("POST", "http://x/a", "no connection in time", False),
        {"method": "POST", "url": "http://x/a", "reason": "no connection in time", "sent": False},
    ),
    AttemptTimeout: (("text",), {}),
    JobTimeout: (("text",), {}),
    TooManyErrors: ((7, 1000, 0.005), {"failed": 7, "finished": 1000, "max_errors": 0.005}),
    AllFailed: ((50, "KeyError: 'id'"), {"count": 50, "first": "KeyError: 'id'"}),
    BudgetReached: (("usd", 10.02, 10), {"unit": "usd", "spent": 10.02, "limit": 10}),
    SkipItem: (("text",), {}),
    RecordedError: (
        ("penstock.errors.HttpStatusError", "GET http://x/a -> HTTP 422", 422, "permanent", b"no"),
        {
            "error": "penstock.errors.HttpStatusError",
            "message": "GET http://x/a -> HTTP 422",
            "status": 422,
            "failure_kind": "permanent",
            "answer": b"no",
        },
    ),
    CircuitOpen: (("text",), {}),
    Overloaded: (("text",), {}),
    DeadlockError: (("text",), {}),
    JournalError: (("text",), {}),
    InternalError: (("text",), {}),
}

ALL = sorted(EXAMPLES, key=lambda kind: kind.__name__)


def example(kind: type[PenstockError]) -> PenstockError:
    return kind(*EXAMPLES[kind][0])


def test_every_exception_of_the_module_is_looked_at_here() -> None:
    found = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)}
    assert found == set(EXAMPLES)


def test_the_drawn_tree_is_the_real_one() -> None:
    """Each line of the module's docstring names a class, and its indent its parent."""
    parents: list[str] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        stem, _, name = line.partition("── ")
        if name:
            name, depth = name.split()[0], len(stem) // 4
            parents[depth - 1 :] = [name]
            drawn[name] = parents[depth - 2] if depth > 1 else "PenstockError"
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in ALL if kind is not PenstockError}


@pytest.mark.parametrize(
    ("kind", "built_in"),
    [
        (ClosedError, RuntimeError),
        (WrongLoop, RuntimeError),
        (WrongThread, RuntimeError),
        (ConnectionFailed, ConnectionError),
        (ConnectTimeout, TimeoutError),
        (AttemptTimeout, TimeoutError),
        (JobTimeout, TimeoutError),
    ],
)
def test_some_are_also_what_the_standard_library_would_raise(
    kind: type[PenstockError], built_in: type[Exception]
) -> None:
    """So `except TimeoutError` works. The drawn tree says so too."""
    assert issubclass(kind, built_in)
    assert f"(also {built_in.__name__})" in next(
        line for line in (errors.__doc__ or "").splitlines() if f"── {kind.__name__} " in line
    )


def test_no_other_is_also_a_built_in() -> None:
    """`except OSError` around a file must not catch a full queue."""
    also = {ClosedError, WrongLoop, WrongThread, ConnectionFailed, ConnectTimeout, AttemptTimeout, JobTimeout}
    for kind in set(ALL) - also:
        assert not issubclass(kind, RuntimeError | OSError | LookupError | ValueError)


@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ALL)
def test_an_exception_survives_pickling_and_copying(kind: type[PenstockError], duplicate: Any) -> None:
    """With its attributes, its message and its notes."""
    error = example(kind)
    error.add_note("attempt 1 failed")
    twin = duplicate(error)
    assert type(twin) is kind
    assert twin.args == error.args
    assert str(twin) == str(error)
    assert twin.__notes__ == ["attempt 1 failed"]
    for name, value in EXAMPLES[kind][1].items():
        assert getattr(twin, name) == getattr(error, name) == value


@pytest.mark.parametrize("kind", [ConnectionFailed, AttemptTimeout, JobTimeout])
def test_those_that_are_os_errors_too_carry_no_invented_errno(kind: type[PenstockError]) -> None:
    """OSError reads an errno and a file name out of its arguments unless it is kept from it."""
    error = example(kind)
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror, error.filename) == (None, None, None)


def test_a_connection_counts_as_used_unless_it_provably_was_not() -> None:
    assert ConnectionFailed("GET", "http://x", "reset").sent


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HttpStatusError(404, "GET", "http://x/a"), "GET http://x/a -> HTTP 404"),
        (
            HttpStatusError(429, "GET", "http://x/a", b'{"error": "slow"}', 2.5),
            'GET http://x/a -> HTTP 429, Retry-After 2.5 s: \'{"error": "slow"}\'',
        ),
        (
            BodyTooLarge("GET", "http://x/a", 10_000_000),
            "GET http://x/a -> body of more than max_body_bytes=10,000,000. "
            "Raise max_body_bytes=, or read it in pieces with `async with client.stream(...)`.",
        ),
        (
            NotJson("GET", "http://x/a", 200, "text/html", b"<html>", "Expecting value"),
            "GET http://x/a -> HTTP 200, Content-Type text/html, is not JSON (Expecting value); it starts '<html>'",
        ),
        (
            NotJson("GET", "http://x/a", 200, "", b"", "empty"),
            "GET http://x/a -> HTTP 200, Content-Type absent, is not JSON (empty); it starts ''",
        ),
        (ConnectionFailed("GET", "http://x/a", "reset"), "GET http://x/a -> no answer: reset"),
        (ConnectionFailed("GET", "http://x/a", "refused", sent=False), "GET http://x/a -> not sent: refused"),
        (
            TooManyErrors(1200, 24000, 0.05),
            "1,200 of 24,000 finished jobs failed; max_errors=0.05 allows no more",
        ),
        (TooManyErrors(1, 1, 0), "1 of 1 finished jobs failed; max_errors=0 allows no more"),
        (
            AllFailed(1000, "HttpStatusError: GET http://x/a -> HTTP 401"),
            "the first 1,000 jobs all failed, the first one by 'HttpStatusError: GET http://x/a -> HTTP 401'. As a "
            "rule the URL or the key is wrong, or the job is; correct it and run again, with a journal by "
            'resume="failed". fail_fast=None goes on whatever fails.',
        ),
        (
            BudgetReached("usd", 10.02, 10),
            "the budget of usd=10 was reached: 10.02 used. Raise the budget, or run again to go on: with the same "
            "journal=, what is recorded is not done twice.",
        ),
        (
            BudgetReached("time", 3600.0001, 3600),
            "the budget of time=3600 was reached: 3,600 s used. Raise the budget, or run again to go on: with the same "
            "journal=, what is recorded is not done twice.",
        ),
        (SkipItem("no address"), "no address"),
        (RecordedError("penstock.errors.HttpStatusError", "GET x", 404), "HttpStatusError: GET x"),
        (RecordedError("TimeoutError", ""), "TimeoutError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_message_says_what_was_asked_what_came_and_what_to_do(error: Exception, message: str) -> None:
    assert str(error) == message


def test_a_body_is_shown_as_one_short_line() -> None:
    """Whatever bytes a server sends: no control characters in a terminal, no megabytes in a log."""
    assert shown(b"a\nb\x1b[31m\xff") == r"'a\nb\x1b[31m" + "\N{REPLACEMENT CHARACTER}'"
    assert shown(b"x" * 200) == f"'{'x' * 200}'"
    assert shown(b"x" * 201) == f"'{'x' * 200}'..."
    assert shown(b"abc", limit=2) == "'ab'..."


@pytest.mark.parametrize("kind", FailureKind)
def test_a_recorded_error_is_of_the_kind_that_was_recorded(kind: FailureKind) -> None:
    """Whatever its class or status would say today; and of none but the usual one where nothing was recorded."""
    assert classify(RecordedError("builtins.KeyError", "'id'", 503, kind)) is kind
    assert classify(RecordedError("builtins.KeyError", "'id'", 503)) is FailureKind.PERMANENT


def test_a_recorded_error_is_told_as_the_one_that_it_stands_for() -> None:
    """So that a cause of this run and the same cause of an earlier one are counted together."""
    long = "bad id " * 100 + "\nmore"
    for message in ("bad id\nmore", "", long):
        fresh, recorded = ValueError(message), RecordedError("builtins.ValueError", message)
        assert first_line(recorded) == first_line(fresh)
        assert name_of_class(recorded) == name_of_class(fresh) == "ValueError"
    assert name_of_class(RecordedError("jobs.make.<locals>.Refused", "")) == "Refused"


def test_a_skipped_item_is_no_reason_to_ask_again() -> None:
    """What a gate would retry by default is throttled or transient."""
    assert classify(SkipItem("no address")) is FailureKind.PERMANENT
    assert str(SkipItem()) == ""


@pytest.mark.parametrize(
    ("amount", "figures"),
    [
        (0, "0"),
        (0.002, "0.002"),
        (1 / 3, "0.333333"),
        (10.02, "10.02"),
        (99_999.5, "99,999.5"),
        (1_000_812, "1,000,812"),
        (123_456.7, "123,457"),
        (1e300, "1e+300"),
        (float("inf"), "inf"),
    ],
)
def test_an_amount_is_shown_in_the_figures_that_people_read(amount: float, figures: str) -> None:
    assert in_figures(amount) == figures
