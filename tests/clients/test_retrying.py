"""What the client sends again and what it does not, how long it waits, and that it counts every request on the wire."""

from __future__ import annotations

import asyncio
import socket
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest
from yarl import URL

import penstock
from penstock import AttemptTimeout, ConnectionFailed, Executor, FailureKind, HttpClient, HttpStatusError, Retry
from penstock.clients.exchange import IDEMPOTENT_METHODS

if TYPE_CHECKING:
    from tests.clients.conftest import Request, Web

pytestmark = pytest.mark.virtual_clock

SAFE_TO_REPEAT = sorted(IDEMPOTENT_METHODS)
QUICK = Retry(attempts=3, wait=0.0)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- which requests are repeated ---


@pytest.mark.parametrize("method", SAFE_TO_REPEAT)
@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
async def test_what_is_idempotent_is_repeated_after_a_status_that_may_pass(web: Web, method: str, status: int) -> None:
    """RFC 9110 9.2.2; and the answer says how many attempts it took."""
    answer = web.script(web.reply(status=status), web.reply(status=status), web.reply())
    async with web.serving(answer) as server, HttpClient(server.url, retry=QUICK) as api:
        response = await api.request(method, "/x")
        assert (response.status, response.attempts) == (200, 3)
        assert server.seen == [f"{method} /x"] * 3
        assert web.in_use(api) == 0


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 418, 422, 500, 501, 505])
async def test_other_statuses_are_final(web: Web, method: str, status: int) -> None:
    """The same request would fail again; 500 says nothing about the next one."""
    body = b"why not" * 100
    async with web.serving(web.reply(body, status)) as server, HttpClient(server.url, retry=QUICK) as api:
        with pytest.raises(HttpStatusError) as caught:
            await api.request(method, "/x", idempotent=True)
        assert len(server.requests) == 1
    error = caught.value
    assert (error.status, error.method, error.url) == (status, method, f"{server.url}/x")
    assert error.body_start == body[:512]
    assert penstock.classify(error) is FailureKind.PERMANENT
    assert "permanent errors are not retried here" in error.__notes__[0]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("status", [408, 502, 503, 504])
async def test_post_and_patch_are_not_repeated_when_they_may_have_been_carried_out(
    web: Web, method: str, status: int
) -> None:
    """A second order, a second payment: the error says why there was no retry."""
    async with web.serving(web.reply(status=status)) as server, HttpClient(server.url, retry=QUICK) as api:
        with pytest.raises(HttpStatusError) as caught:
            await api.request(method, "/x", json={})
        assert len(server.requests) == 1
    assert "may have been carried out, and is not declared idempotent" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize(("status", "header"), [(429, "X-Nothing"), (429, "Retry-After"), (503, "Retry-After")])
async def test_post_and_patch_are_repeated_when_they_were_refused(
    web: Web, method: str, status: int, header: str
) -> None:
    """Too many requests, or come back later: nothing was done."""
    answer = web.script(web.reply(b"", status, **{header: "1"}), web.reply())
    async with web.serving(answer) as server, HttpClient(server.url, retry=QUICK) as api:
        assert (await api.request(method, "/x", data=b"body")).attempts == 2
    assert [request.body for request in server.requests] == [b"body", b"body"]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize(
    "how", [{"idempotent": True}, {"headers": {"Idempotency-Key": "k"}}, {"headers": {"idempotency-key": "k"}}]
)
async def test_post_and_patch_are_repeated_when_declared_idempotent(web: Web, method: str, how: Any) -> None:
    """By the keyword or by the header that services use for it."""
    answer = web.script(web.reply(status=502), None, web.reply())
    async with web.serving(answer) as server, HttpClient(server.url, retry=QUICK) as api:
        assert (await api.request(method, "/x", data="body", **how)).attempts == 3
    assert {request.body for request in server.requests} == {b"body"}


async def test_an_idempotency_key_among_the_clients_headers_counts_too(web: Web) -> None:
    """Wherever the header comes from."""
    answer = web.script(web.reply(status=502), web.reply())
    async with (
        web.serving(answer) as server,
        HttpClient(server.url, headers={"idempotency-key": "k"}, retry=QUICK) as api,
    ):
        assert (await api.post("/x")).attempts == 2


async def test_a_method_declared_not_idempotent_is_not_repeated(web: Web) -> None:
    """There are services whose GET does something."""
    async with web.serving(web.reply(status=502)) as server, HttpClient(server.url, retry=QUICK) as api:
        with pytest.raises(HttpStatusError):
            await api.get("/x", idempotent=False)
    assert len(server.requests) == 1


async def test_a_method_in_lower_case_is_the_same_method(web: Web) -> None:
    """`api.request("get", ...)` is retried like any GET."""
    answer = web.script(web.reply(status=502), web.reply())
    async with web.serving(answer) as server, HttpClient(server.url, retry=QUICK) as api:
        await api.request("get", "/x")
    assert server.seen == ["GET /x", "GET /x"]


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
async def test_everything_is_repeated_when_it_was_provably_not_sent(method: str) -> None:
    """Connection refused: nothing of it left this machine."""
    async with HttpClient(f"http://127.0.0.1:{free_port()}", retry=QUICK) as api:
        with pytest.raises(ConnectionFailed, match="not sent: ConnectionRefusedError") as caught:
            await api.request(method, "/x", data=b"body" if method != "GET" else None)
        assert api.statistics()[str(URL(caught.value.url).origin())].attempts == 3
    assert caught.value.sent is False
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize(("method", "attempts"), [("GET", 3), ("POST", 1)])
async def test_a_connection_that_dies_unanswered_is_repeated_only_if_that_is_harmless(
    web: Web, method: str, attempts: int
) -> None:
    """Executed or not? Nobody knows."""
    async with web.serving(lambda _: None) as server, HttpClient(server.url, retry=QUICK) as api:
        with pytest.raises(ConnectionFailed, match="no answer: ServerDisconnectedError") as caught:
            await api.request(method, "/x")
        assert len(server.requests) == attempts
        assert web.in_use(api) == 0
    assert caught.value.sent is True


@pytest.mark.parametrize(("method", "attempts"), [("PUT", 2), ("POST", 1)])
async def test_an_answer_that_breaks_off_is_repeated_only_if_that_is_harmless(
    web: Web, method: str, attempts: int
) -> None:
    """The status was 200, so it was carried out; the body never came."""

    def half(request: Request) -> None:
        request.transport.write(web.head(200, Content_Length="10") + b"half")

    async with web.serving(half) as server, HttpClient(server.url, retry=Retry(attempts=2, wait=0)) as api:
        with pytest.raises(ConnectionFailed, match="ClientPayloadError"):
            await api.request(method, "/x")
        assert len(server.requests) == attempts
        assert web.in_use(api) == 0


# --- every request on the wire is an attempt ---


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_aiohttp_sends_nothing_a_second_time_on_its_own(web: Web, method: str) -> None:
    """A kept connection dies under a request: the server has seen exactly as many requests as were counted."""

    def answer_once_per_connection(request: Request) -> bytes | None:
        first = sum(seen.connection == request.connection for seen in server.requests) == 1
        return web.reply() if first else None

    async with (
        web.serving(answer_once_per_connection) as server,
        HttpClient(server.url, retry=Retry(attempts=1)) as api,
    ):
        await api.request(method, "/1")
        with pytest.raises(ConnectionFailed, match="ServerDisconnectedError"):
            await api.request(method, "/2")
        assert server.seen == [f"{method} /1", f"{method} /2"]
        assert api.statistics()[server.url].attempts == 2


async def test_a_job_accounts_for_every_request_that_the_server_saw(web: Web) -> None:
    """Retries, redirects, dead connections, and all round trips of the job."""
    answer = web.script(
        web.reply(status=503), None, web.reply(status=302, Location="/there"), web.reply(), web.reply(b"{}")
    )
    async with (
        web.serving(answer) as server,
        HttpClient(server.url, retry=Retry(wait=1)) as api,
        Executor() as executor,
    ):

        async def job(_: int) -> int:
            attempts = (await api.get("/here")).attempts
            await api.get_json("/more")
            return attempts

        async with executor.as_completed(job, [1]) as stream:
            outcomes = [outcome async for outcome in stream]
    assert len(server.requests) == outcomes[0].attempts == 5
    assert outcomes[0].value == 4
    assert outcomes[0].waited == 2


# --- when it is repeated ---


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_in_seconds_is_obeyed_by_all_requests_of_the_origin(web: Web, status: int) -> None:
    """Not only by the one that heard it; and not by other origins."""
    answer = web.script(web.reply(status=status, Retry_After="30"), web.reply())
    async with web.serving(answer) as server, web.serving(web.reply()) as other, HttpClient(server.url) as api:
        first = asyncio.create_task(api.get("/1"))
        await asyncio.sleep(1)
        second = asyncio.create_task(api.get("/2"))
        before = asyncio.get_running_loop().time()
        await api.get(other.url + "/3")
        assert asyncio.get_running_loop().time() - before < 1
        await asyncio.gather(first, second)
    assert server.seen[0] == "GET /1"
    assert sorted(server.seen[1:]) == ["GET /1", "GET /2"]
    assert all(30 <= at <= 34 for at in server.times[1:])


async def test_retry_after_as_a_date_is_relative_to_the_date_of_the_answer(web: Web) -> None:
    """The server's clock is years off ours; 20 s are 20 s."""
    refusal = web.reply(status=503, Date=formatdate(1e9, usegmt=True), Retry_After=formatdate(1e9 + 20, usegmt=True))
    async with web.serving(web.script(refusal, web.reply())) as server, HttpClient(server.url) as api:
        await api.get("/x")
    assert 20 <= server.times[1] <= 23


@pytest.mark.parametrize("retry_after", ["soon", "-5", "1e9", "3601", ""])
async def test_a_retry_after_that_makes_no_sense_is_ignored(web: Web, retry_after: str) -> None:
    """Also one of more than an hour; what is left is the usual back-off."""
    refusal = web.reply(status=429, Retry_After=retry_after)
    async with (
        web.serving(web.script(refusal, web.reply())) as server,
        HttpClient(server.url, retry=Retry(wait=1)) as api,
    ):
        await api.get("/x")
    assert 1 <= server.times[1] <= 1.1


async def test_a_503_with_a_senseless_retry_after_refuses_nothing(web: Web) -> None:
    """So a POST is not repeated."""
    async with web.serving(web.reply(status=503, Retry_After="soon")) as server, HttpClient(server.url) as api:
        with pytest.raises(HttpStatusError):
            await api.post("/x")
    assert len(server.requests) == 1


async def test_back_off_holds_neither_a_permit_nor_a_connection(web: Web) -> None:
    """One permit, one connection: the second request is done while the first one waits."""
    answer = web.script(web.reply(b"x" * 100_000, status=503), web.reply())
    async with web.serving(answer) as server, HttpClient(server.url, limit=1, retry=Retry(wait=50)) as api:
        first = asyncio.create_task(api.get("/1"))
        await asyncio.sleep(1)
        assert web.in_use(api) == 0
        await api.get("/2")
        await first
    assert server.seen == ["GET /1", "GET /2", "GET /1"]


async def test_the_connection_of_a_refusal_is_used_again(web: Web) -> None:
    """Its body is read or, if that would take longer than a new connection, the connection is closed; none is left."""
    small, large = web.reply(b"x" * 1_000, status=503), web.reply(b"x" * 1_000_000, status=503)
    for body, connections in ((small, 1), (large, 2)):
        async with web.serving(web.script(body, web.reply())) as server, HttpClient(server.url, retry=QUICK) as api:
            assert (await api.get("/x")).attempts == 2
            assert server.connections == connections
            assert web.in_use(api) == 0


async def test_attempts_and_total_time_are_both_capped(web: Web) -> None:
    """Whichever ends first."""
    async with web.serving(web.reply(status=503)) as server:
        async with HttpClient(server.url, retry=Retry(attempts=4, wait=1)) as api:
            with pytest.raises(HttpStatusError):
                await api.get("/x")
        assert len(server.requests) == 4
        async with HttpClient(server.url, retry=Retry(attempts=99, timeout=10, wait=4)) as api:
            with pytest.raises(HttpStatusError):
                await api.get("/x")
        assert len(server.requests) == 4 + 3


async def test_an_answer_that_does_not_come_in_time_is_an_attempt_timeout(web: Web) -> None:
    """Headers or body, all of it; repeated if harmless; the connection is gone."""

    def too_slow(request: Request) -> bytes:
        if len(server.requests) == 1:
            return b""
        return web.head(200, Content_Length="10") + web.later(request, 60, b"0123456789")

    async with (
        web.serving(too_slow) as server,
        HttpClient(server.url, timeout=5, retry=Retry(attempts=2, wait=1)) as api,
    ):
        with pytest.raises(AttemptTimeout, match=rf"GET {server.url}/x\?a=\.\.\.: no answer within 5 s") as caught:
            await api.get("/x", params={"a": "secret"})
        assert web.in_use(api) == 0
        assert 6 <= server.times[1] <= 6.1
    assert isinstance(caught.value, TimeoutError)


async def test_total_time_includes_redirects_and_renewals(web: Web) -> None:
    """It is counted from first asking, however many round trips that takes."""

    def slow_redirect(request: Request) -> bytes:
        return web.later(request, 4, web.reply(status=302, Location="/again"))

    async with web.serving(slow_redirect) as server, HttpClient(server.url, retry=Retry(timeout=10)) as api:
        with pytest.raises(AttemptTimeout):
            await api.get("/x")
        assert asyncio.get_running_loop().time() - server.requests[0].at < 10.1
        assert len(server.requests) == 3


async def test_no_request_is_sent_when_a_renewal_has_used_up_the_total_time(web: Web) -> None:
    """Nobody waits for its answer any more."""

    waits = [0, 20]

    async def slow() -> dict[str, str]:
        await asyncio.sleep(waits.pop(0))
        return {}

    async with (
        web.serving(web.reply(status=401)) as server,
        HttpClient(server.url, auth=slow, retry=Retry(timeout=10)) as api,
    ):
        with pytest.raises(AttemptTimeout, match=r"auth= gave no headers before the end of Retry\(timeout=10\)"):
            await api.get("/x")
        assert len(server.requests) == 1
        assert api.statistics()[server.url].in_flight == 0


async def test_a_status_is_heard_though_its_body_does_not_come(web: Web) -> None:
    """The pause that a 429 asks for must not be lost to the time-out of a body that nobody needs."""

    class Throttle(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.write(b"HTTP/1.1 429 Slow Down\r\nRetry-After: 30\r\nContent-Length: 1000\r\n\r\n")

    server = await asyncio.get_running_loop().create_server(Throttle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, HttpClient(url, timeout=20.0, retry=Retry(attempts=1)) as api:
        with pytest.raises(HttpStatusError) as caught:
            await api.get("/x")
        assert caught.value.retry_after == 30
        assert api.statistics()[url].paused_for > 20
