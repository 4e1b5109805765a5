"""What a failed attempt says about its service, for limiter, meter and breaker at once."""

import asyncio
import concurrent.futures
import errno
import socket
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

from penstock.errors import (
    AttemptTimeout,
    BodyTooLarge,
    CircuitOpen,
    ClosedError,
    ConnectionFailed,
    ConnectTimeout,
    HttpStatusError,
    NotJson,
    Overloaded,
    RoundTripError,
)
from penstock.gate.verdict import ANSWERED, BROKEN, LOST, REFUSED, THROTTLED, UNKNOWN, UNREACHABLE, Verdict, judge

PEER: Any = ConnectionKey("api.test", 443, True, True, None, None, None)


def status(code: int, retry_after: float | None = None) -> HttpStatusError:
    return HttpStatusError(code, "GET", "https://api.test/", retry_after=retry_after)


def aiohttps(code: int, **headers: str) -> aiohttp.ClientResponseError:
    request: Any = SimpleNamespace(real_url=URL("https://api.test/"))
    named = CIMultiDictProxy(CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()}))
    return aiohttp.ClientResponseError(request, (), status=code, headers=named)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class Busy(Exception):
    failure_kind = "throttled"


class Gone(Exception):
    status = 410


ANSWERS = [400, 402, 404, 405, 409, 410, 412, 413, 415, 422, 428, 431, 451, 499]


@pytest.mark.parametrize("code", ANSWERS)
def test_a_4xx_is_an_answer(code: int) -> None:
    """The service has done its work: the time is a sample, and it lives."""
    assert judge(status(code)) == ANSWERED == Verdict(False, True, False, False, False)


@pytest.mark.parametrize("error", [NotJson("GET", "u", 200, "text/html", b"<", "no"), aiohttps(404), Gone()])
def test_an_answer_is_known_by_its_status_whatever_the_error(error: Exception) -> None:
    """A 200 whose body is no JSON was answered, too."""
    assert judge(error) == ANSWERED


@pytest.mark.parametrize(
    "error", [*map(status, (401, 403, 407, 425)), aiohttps(403), BodyTooLarge("GET", "https://api.test/", 10)]
)
def test_a_refusal_shows_that_the_service_lives_and_is_no_sample(error: Exception) -> None:
    """Whoever guards the service refuses faster than it works; a body cut off says nothing of its time either."""
    assert judge(error) == REFUSED == Verdict(False, False, False, False, False)


@pytest.mark.parametrize(
    "error",
    [
        status(429),
        status(429, 3.0),
        status(503, 3.0),
        status(403, 60.0),
        status(403, 0.0),
        aiohttps(429),
        Busy(),
        aiohttps(503, Retry_After="3"),
    ],
)
def test_a_service_that_asks_for_less_is_throttled_and_does_not_fail(error: Exception) -> None:
    """A 403 with a wait is GitHub's way; it is loss for the limiter, and nothing for the breaker."""
    assert judge(error) == THROTTLED == Verdict(True, False, None, True, False)


@pytest.mark.parametrize(
    "error",
    [
        *map(status, (408, 502, 503, 504)),
        aiohttps(503),
        AttemptTimeout("late"),
        TimeoutError(),
        aiohttp.SocketTimeoutError(),
        ConnectionFailed("GET", "u", "reset"),
        ConnectionResetError(),
        BrokenPipeError(),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError(),
        asyncio.IncompleteReadError(b"", 1),
        OSError(errno.ENETRESET, "reset"),
    ],
)
def test_no_answer_is_loss_and_failure(error: Exception) -> None:
    """Time-outs, cut connections, and those statuses that say that nobody has done the work."""
    assert judge(error) == LOST == Verdict(True, False, True, False, False)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionFailed("GET", "u", "refused", False),
        ConnectTimeout("GET", "u", "late"),
        ConnectionRefusedError(),
        socket.gaierror(socket.EAI_NONAME, "unknown"),
        aiohttp.ConnectionTimeoutError(),
        aiohttp.ClientConnectorError(PEER, OSError(errno.ECONNREFUSED, "refused")),
        aiohttp.ClientConnectorDNSError(PEER, OSError(-2, "unknown")),
        OSError(errno.EHOSTUNREACH, "no way"),
        OSError(errno.ENETUNREACH, "no way"),
        OSError(errno.EHOSTDOWN, "no way"),
        OSError(errno.ENETDOWN, "no way"),
    ],
)
def test_a_connection_that_could_not_be_made_is_told_apart(error: Exception) -> None:
    """A few of them in a row are proof enough for the breaker."""
    assert judge(error) == UNREACHABLE == Verdict(True, False, True, False, True)


@pytest.mark.parametrize("error", [*map(status, (500, 501, 505, 507, 511, 599)), aiohttps(500)])
def test_a_server_error_is_a_failure_and_no_loss(error: Exception) -> None:
    """500 may be the fault of the request: sending less of them would not help."""
    assert judge(error) == BROKEN == Verdict(False, False, True, False, False)


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        KeyError("id"),
        TypeError(),
        ClosedError(),
        CircuitOpen(),
        Overloaded(),
        BrokenProcessPool(),
        ValueError("bad"),
        FileNotFoundError(2, "no"),
        RoundTripError(),
        caused(ConnectionFailed("GET", "u", "who?", False), aiohttp.ServerFingerprintMismatch(b"", b"", "h", 1)),
        Exception("unknown"),
        KeyboardInterrupt(),
        status(0),
        status(600),
        aiohttps(0),
    ],
)
def test_what_is_not_known_to_come_from_the_service_moves_nothing(error: BaseException) -> None:
    """Cancellations, bugs, our own refusals, a dead worker process, a peer of the wrong name, unknown classes."""
    assert judge(error) == UNKNOWN == Verdict(False, False, None, False, False)


class Told(Exception):
    """Carries whatever a user's class may carry."""

    def __init__(self, **carried: object) -> None:
        self.__dict__.update(carried)


CARRIED = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 700), st.floats(), st.sampled_from(["throttled", "bug", ""])
)


@given(CARRIED, CARRIED, CARRIED)
def test_any_error_has_a_verdict_that_makes_sense(code: object, kind: object, retry_after: object) -> None:
    """No error makes the gate fail; a sample is never a loss, and what is throttled or lost is no success."""
    verdict = judge(Told(status=code, failure_kind=kind, retry_after=retry_after))
    assert not (verdict.sampled and verdict.dropped)
    assert not (verdict.dropped and verdict.failed is False)
    assert not (verdict.throttled and verdict.failed is not None)
    assert verdict.failed or not verdict.unreachable
