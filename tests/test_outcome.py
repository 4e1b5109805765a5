"""What kind of failure an error is, what may be handed around, and the record of how a job ended."""

import asyncio
import concurrent.futures
import errno
import gc
import json
import pickle
import reprlib
import socket
import ssl
import weakref
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from penstock import FailureKind, HttpStatusError, Outcome, UsageError, classify
from penstock.errors import (
    AttemptTimeout,
    BodyTooLarge,
    CircuitOpen,
    ClosedError,
    ConnectionFailed,
    DeadlockError,
    InternalError,
    JobTimeout,
    JournalError,
    NotJson,
    Overloaded,
    TooManyErrors,
    WrongLoop,
)
from penstock.outcome import TRANSIENT_STATUSES, contained, provably_unsent

KEY = ConnectionKey("example.com", 443, True, True, None, None, None)


def answered(status: int, headers: dict[str, str] | None = None) -> aiohttp.ClientResponseError:
    """aiohttp's error for a status."""
    asked = aiohttp.RequestInfo(URL("http://x/"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://x/"))
    known = None if headers is None else CIMultiDictProxy(CIMultiDict(headers))
    return aiohttp.ClientResponseError(asked, (), status=status, headers=known)


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


BAD_CERTIFICATE = aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError("expired"))


# --- classify ---


@pytest.mark.parametrize(
    ("status", "hinted", "kind"),
    [
        (429, False, "throttled"),
        (429, True, "throttled"),
        (503, True, "throttled"),
        (503, False, "transient"),
        (408, False, "transient"),
        (502, False, "transient"),
        (504, True, "transient"),
        (500, False, "permanent"),
        (501, True, "permanent"),
        (400, False, "permanent"),
        (404, False, "permanent"),
    ],
)
def test_a_status_is_judged_the_same_whoever_reports_it(status: int, hinted: bool, kind: str) -> None:
    """429, and 503 with a hint, ask for less; the RFC's temporary ones may pass; all others will be said again."""
    assert classify(HttpStatusError(status, "GET", "http://x", retry_after=1.0 if hinted else None)) == kind
    assert classify(answered(status, {"retry-after": "1"} if hinted else {})) == kind


def test_an_answer_without_headers_has_no_hint() -> None:
    assert classify(answered(503)) == "transient"


@given(status=st.integers(400, 599), hinted=st.booleans())
def test_every_status_has_a_kind_that_follows_the_rule(status: int, hinted: bool) -> None:
    """Throttled means 429 or a hinted 403 or 503; transient means one of the four; nothing else is asked again."""
    kind = classify(HttpStatusError(status, "GET", "http://x", retry_after=0.0 if hinted else None))
    throttled = status == 429 or (status in (403, 503) and hinted)
    assert (kind is FailureKind.THROTTLED) == throttled
    assert (kind is FailureKind.TRANSIENT) == (status in TRANSIENT_STATUSES and not throttled)
    assert throttled or status in TRANSIENT_STATUSES or kind is FailureKind.PERMANENT


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError(),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        BrokenPipeError(errno.EPIPE, "pipe"),
        ConnectionFailed("GET", "http://x", "reset"),
        TimeoutError(),
        concurrent.futures.TimeoutError(),
        AttemptTimeout("late"),
        JobTimeout("late"),
        socket.gaierror(socket.EAI_AGAIN, "try again"),
        OSError(errno.EHOSTUNREACH, "no route to host"),
        OSError(errno.ENETUNREACH, "network unreachable"),
        asyncio.IncompleteReadError(b"half", 8),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut off"),
        aiohttp.ClientConnectorDNSError(KEY, OSError("no such name")),
        aiohttp.SocketTimeoutError("late"),
        BrokenExecutor(),
        BrokenProcessPool("a child died"),
    ],
    ids=repr,
)
def test_connection_trouble_and_time_outs_are_transient(error: Exception) -> None:
    """The same call may work the next time, whichever library noticed."""
    assert classify(error) is FailureKind.TRANSIENT


def test_what_an_open_breaker_kept_back_may_be_asked_again() -> None:
    """Nothing was sent, and the service may be back the next time."""
    assert classify(CircuitOpen("open")) is FailureKind.TRANSIENT


@pytest.mark.parametrize(
    "error",
    [
        BAD_CERTIFICATE,
        caused(ConnectionFailed("GET", "https://x", "certificate"), BAD_CERTIFICATE),
        aiohttp.ServerFingerprintMismatch(b"1", b"2", "x", 443),
    ],
    ids=reprlib.repr,
)
def test_a_peer_that_cannot_prove_who_it_is_is_not_asked_again(error: Exception) -> None:
    """These are connection errors for aiohttp; asking again would not change the certificate."""
    assert classify(error) is FailureKind.PERMANENT


@pytest.mark.parametrize(
    "error",
    [
        UsageError("wrong"),
        ClosedError("closed"),
        WrongLoop("loop"),
        InternalError("ours"),
        TypeError(),
        AttributeError(),
        NameError(),
        AssertionError(),
        KeyError("id"),
        IndexError(),
        ZeroDivisionError(),
        ImportError(),
        RuntimeError("Session is closed"),
        NotImplementedError(),
        RecursionError(),
    ],
    ids=repr,
)
def test_errors_of_the_program_are_bugs(error: Exception) -> None:
    assert classify(error) is FailureKind.BUG


class OutOfDeviceMemory(RuntimeError):
    """As torch has one."""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad data"),
        json.JSONDecodeError("no JSON", "", 0),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "denied"),
        OSError("multiple exceptions"),
        OSError(errno.ENOSPC, "disk full"),
        EOFError(),
        OutOfDeviceMemory(),
        Exception("who knows"),
        aiohttp.InvalidURL("http:://"),
        BodyTooLarge("GET", "http://x", 1),
        NotJson("GET", "http://x", 200, "text/html", b"<", "bad"),
        TooManyErrors(1, 1, 0),
        Overloaded(),
        DeadlockError(),
        JournalError(),
    ],
    ids=repr,
)
def test_all_else_is_permanent(error: Exception) -> None:
    """Bad data, files, foreign classes, also those derived from RuntimeError: no reason to ask again, and no bug."""
    assert classify(error) is FailureKind.PERMANENT


def test_a_cancelled_future_is_a_cancellation_whichever_library_it_is_of() -> None:
    assert classify(asyncio.CancelledError()) is FailureKind.CANCELLED
    assert classify(concurrent.futures.CancelledError()) is FailureKind.CANCELLED


class SaysWhatItIs(HttpStatusError):
    """A class of a user, who knows better what a 404 of this service means."""

    failure_kind = FailureKind.TRANSIENT


@pytest.mark.parametrize("kind", FailureKind)
@pytest.mark.parametrize("error_class", [ValueError, TypeError, ConnectionError, Exception])
def test_an_error_is_believed_what_it_says_of_itself(kind: FailureKind, error_class: type[Exception]) -> None:
    """As a kind or as its word, on the exception or on its class, whatever its class would be otherwise."""
    for told in (kind, str(kind.value)):
        error = error_class("x")
        error.failure_kind = told  # type: ignore[attr-defined]
        assert classify(error) is kind
        assert classify(type("Telling", (error_class,), {"failure_kind": told})("x")) is kind


def test_what_an_exception_says_of_itself_overrules_its_status() -> None:
    error = SaysWhatItIs(404, "GET", "http://x")
    assert classify(error) is FailureKind.TRANSIENT
    error.failure_kind = FailureKind.BUG
    assert classify(error) is FailureKind.BUG


def test_a_cancellation_is_one_whatever_it_says() -> None:
    """Believing it would retry what somebody has cancelled."""
    for error in (asyncio.CancelledError(), concurrent.futures.CancelledError()):
        error.failure_kind = FailureKind.TRANSIENT  # type: ignore[union-attr]
        assert classify(error) is FailureKind.CANCELLED


NOT_A_KIND = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.binary()
    | st.lists(st.integers())
    | st.text().filter(lambda text: text not in list(FailureKind))
)


@given(told=NOT_A_KIND, status=st.integers(400, 599))
def test_anything_else_by_that_name_is_ignored(told: object, status: int) -> None:
    """A library may use the name for something of its own."""
    error = HttpStatusError(status, "GET", "http://x")
    expected = classify(error)
    error.failure_kind = told  # type: ignore[attr-defined]
    assert classify(error) is expected


def test_an_error_that_fails_to_say_what_it_is_is_looked_at_from_outside() -> None:
    class Broken(ConnectionError):
        @property
        def failure_kind(self) -> FailureKind:
            raise ValueError("no")

    assert classify(Broken()) is FailureKind.TRANSIENT


def test_a_kind_reads_as_its_word() -> None:
    """In logs, JSON and comparisons a kind is a plain string."""
    assert [f"{kind}" for kind in FailureKind] == ["throttled", "transient", "permanent", "cancelled", "bug"]
    assert json.dumps(FailureKind.BUG) == '"bug"'


def test_only_a_connection_that_sent_nothing_is_provably_unsent() -> None:
    assert provably_unsent(ConnectionFailed("POST", "http://x", "refused", sent=False))
    assert not provably_unsent(ConnectionFailed("POST", "http://x", "reset"))
    assert not provably_unsent(ConnectionRefusedError())


# --- contained ---


def raised_by(fn: Callable[[], object]) -> BaseException:
    try:
        fn()
    except BaseException as error:  # noqa: BLE001  # what it is, is the question
        return error
    raise AssertionError("it raised nothing")


def raised_in_a_coroutine(error: BaseException) -> BaseException:
    async def job() -> None:
        raise error

    def drive() -> None:
        job().send(None)

    return raised_by(drive)


@pytest.mark.parametrize(
    "error", [ValueError("x"), TimeoutError(), UsageError("y"), ExceptionGroup("g", [ValueError()])], ids=repr
)
def test_an_ordinary_exception_comes_back_unchanged(error: Exception) -> None:
    before = error.__cause__, error.__context__, error.__suppress_context__
    assert contained(error, "job") is error
    assert (error.__cause__, error.__context__, error.__suppress_context__) == before


@pytest.mark.parametrize(
    "error",
    [
        StopIteration(3),
        StopAsyncIteration(),
        SystemExit(2),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        BaseExceptionGroup("g", [SystemExit()]),
    ],
    ids=repr,
)
def test_what_would_end_more_than_the_job_becomes_a_usage_error(error: BaseException) -> None:
    """The message names who raised what and what to do instead; the original is the cause."""
    harmless = contained(error, "<job f>")
    assert type(harmless) is UsageError
    assert harmless.__cause__ is error
    assert str(harmless).startswith(f"<job f> raised {type(error).__name__}(")
    assert "Return from the function instead, or raise an exception of your own." in str(harmless)


def test_a_stop_iteration_that_left_a_coroutine_is_found_in_its_wrapping() -> None:
    """Python turns it into a RuntimeError, which would look like a bug of ours."""
    original = StopIteration(3)
    harmless = contained(raised_in_a_coroutine(original), "job")
    assert isinstance(harmless, UsageError)
    assert harmless.__cause__ is original
    assert "raised StopIteration(3)" in str(harmless)


def test_a_stop_iteration_that_the_user_has_dealt_with_is_left_alone() -> None:
    """`raise RuntimeError("empty") from stop` says more than its cause does."""
    error = caused(RuntimeError("the source is empty"), StopIteration())
    assert contained(error, "job") is error
    translated = caused(ValueError("coroutine raised StopIteration"), KeyError())
    assert contained(translated, "job") is translated


def test_the_message_is_short_and_safe_whatever_the_arguments_are() -> None:
    """A StopIteration carries a return value: any size, and with a repr that may fail."""

    class Unshowable:
        def __repr__(self) -> str:
            raise ValueError("no")

    assert len(str(contained(StopIteration("x" * 10_000), "job"))) < 250
    assert "Unshowable" in str(contained(StopIteration(Unshowable()), "job"))


@pytest.mark.parametrize("error", [StopAsyncIteration(), asyncio.CancelledError()], ids=repr)
async def test_a_contained_error_can_be_awaited_and_iterated(error: BaseException) -> None:
    """Nobody on the way takes it for the end of an iteration or for a cancellation of its own."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(contained(error, "job"))
    with pytest.raises(UsageError):
        await future


# --- Outcome ---


def outcome(value: Any = None, error: BaseException | None = None) -> Outcome[Any]:
    kind = None if error is None else classify(error)
    return Outcome("k", {"id": 1}, value, error, kind, attempts=2, waited=0.5, ran=1.5)


def test_a_value_is_unwrapped_and_an_error_is_raised() -> None:
    done, failed = outcome(7), outcome(error=KeyError("id"))
    assert done.ok
    assert done.unwrap() == 7
    assert not failed.ok
    with pytest.raises(KeyError) as caught:
        failed.unwrap()
    assert caught.value is failed.error


def test_none_is_a_value() -> None:
    assert outcome(None).ok
    assert outcome(None).unwrap() is None


def test_an_outcome_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        outcome().value = 3  # type: ignore[misc]


def test_an_outcome_is_not_replayed_unless_it_says_so() -> None:
    assert not outcome().replayed
    assert outcome()._replace(replayed=True).replayed


def test_an_outcome_survives_pickling() -> None:
    """With its error, its notes and its kind: it goes to other processes and into the journal."""
    error = HttpStatusError(503, "GET", "http://x", b"busy", retry_after=2.0)
    error.add_note("gave up")
    copy = pickle.loads(pickle.dumps(outcome(error=error)))
    assert isinstance(copy, Outcome)
    assert copy._replace(error=None) == outcome(error=error)._replace(error=None)
    assert isinstance(copy.error, HttpStatusError)
    assert str(copy.error) == str(error)
    assert copy.error.__notes__ == ["gave up"]


def test_unwrapping_an_error_makes_no_cycle() -> None:
    """Else every failed item, with its input, would live until the next garbage collection."""

    class Item(SimpleNamespace):
        pass

    item = Item()
    freed = weakref.ref(item)
    gc.disable()
    try:
        with pytest.raises(ValueError):
            Outcome(None, item, None, ValueError(), FailureKind.PERMANENT, 0, 0.0, 0.0).unwrap()
        del item
        assert freed() is None
    finally:
        gc.enable()
