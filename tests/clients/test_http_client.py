"""The client: what goes over the wire, what comes back, what follows a redirect, and what is refused in which words."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import resource
import socket
import ssl
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web as aiohttp_web
from aiohttp.test_utils import TestServer
from aioresponses import aioresponses
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

import penstock
from penstock import (
    AttemptTimeout,
    BodyTooLarge,
    Breaker,
    CircuitOpen,
    ClosedError,
    ConnectionFailed,
    FailureKind,
    HttpClient,
    HttpStatusError,
    NotJson,
    PenstockError,
    Rate,
    Response,
    Retry,
    RoundTripError,
    UsageError,
    WrongLoop,
)
from penstock.clients.response import masked, masked_text
from penstock.testing import VirtualClockLoop, run_in_virtual_time

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.clients.conftest import Request, Web

    from penstock.gate.limiter import LimitChange

pytestmark = pytest.mark.virtual_clock

ONCE = Retry(attempts=1)


# --- what goes over the wire ---


async def test_each_verb_sends_its_method_to_its_path(web: Web) -> None:
    """Paths are appended to the base URL, with or without a slash."""
    async with web.serving(web.reply(b"{}")) as server, HttpClient(server.url + "/v1/") as api:
        for verb in (api.get, api.head, api.options, api.put, api.delete, api.post, api.patch):
            assert (await verb("items")).status == 200
        await api.get("/items?a=1")
        await api.get("")
    methods = ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "POST", "PATCH"]
    assert server.seen == [*(f"{method} /v1/items" for method in methods), "GET /v1/items?a=1", "GET /v1/"]
    assert server.connections == 1


@pytest.mark.parametrize(
    ("how", "body", "content_type"),
    [
        ({"json": {"a": [1, "ä"]}}, b'{"a": [1, "\\u00e4"]}', "application/json"),
        ({"json": 0}, b"0", "application/json"),
        ({"data": "ä"}, "ä".encode(), "text/plain; charset=utf-8"),
        ({"data": {"a": "1 2", "b": "&"}}, b"a=1+2&b=%26", "application/x-www-form-urlencoded"),
        ({"data": b"\0"}, b"\0", "application/octet-stream"),
        ({"json": 1, "headers": {"content-type": "application/x"}}, b"1", "application/x"),
        ({}, b"", "application/octet-stream"),
    ],
)
async def test_a_body_is_sent_as_bytes_with_its_content_type(
    web: Web, how: Any, body: bytes, content_type: str
) -> None:
    """One Content-Type, the caller's if given, in whatever spelling."""
    async with web.serving(web.reply()) as server, HttpClient(server.url) as api:
        await api.post("/x", **how)
    (request,) = server.requests
    assert request.body == body
    assert request.headers.getall("Content-Type") == [content_type]


async def test_headers_of_the_request_go_before_those_of_the_client(web: Web) -> None:
    """Whatever their spelling: each is sent once."""
    async with (
        web.serving(web.reply()) as server,
        HttpClient(server.url, headers={"X-A": "client", "x-b": "client"}, auth={"x-A": "auth"}) as api,
    ):
        await api.get("/x", headers={"X-B": "request"})
    (request,) = server.requests
    assert request.headers.getall("X-A") == ["auth"]
    assert request.headers.getall("X-B") == ["request"]


async def test_the_shape_of_a_request() -> None:
    """Method, URL with its query, headers and body, as aiohttp is given them."""
    with aioresponses() as mock:
        url = "http://api.test/v1/api1?q=a+b&q=1.5&n=2"
        mock.post(url, payload={"ok": True})
        async with HttpClient("http://api.test/v1", headers={"X-Client": "c"}) as api:
            answer = await api.post_json("/api1?q=a+b", params={"q": 1.5, "n": 2}, json={"id": 17})
    assert answer == {"ok": True}
    ((method, asked), (call,)) = next(iter(mock.requests.items()))
    assert (method, str(asked)) == ("POST", "http://api.test/v1/api1?n=2&q=1.5&q=a+b")
    assert call.kwargs["data"] == b'{"id": 17}'
    assert call.kwargs["allow_redirects"] is False
    assert dict(call.kwargs["headers"]) == {"X-Client": "c", "Content-Type": "application/json"}


async def test_user_info_in_the_base_url_becomes_a_header_and_shows_nowhere(web: Web) -> None:
    """It is a credential like any other: not in URLs of answers, and gone after a redirect elsewhere."""
    async with web.serving(web.reply(b"{}")) as server:
        base = server.url.replace("http://", "http://user:secret@")
        async with HttpClient(base) as api:
            assert (await api.get("/x")).url == f"{server.url}/x"
            assert "secret" not in repr(api)
        async with HttpClient(base, headers={"authorization": "Bearer t"}) as api:
            await api.get("/x")
    assert [request.headers.getall("Authorization") for request in server.requests] == [
        ["Basic dXNlcjpzZWNyZXQ="],
        ["Bearer t"],
    ]


async def test_cookies_are_off_by_default_and_kept_when_asked_for() -> None:
    """A cookie jar is shared by all jobs, which only a few services want."""

    async def answer(request: aiohttp_web.Request) -> aiohttp_web.Response:
        response = aiohttp_web.json_response(dict(request.cookies))
        response.set_cookie("session", "17")
        return response

    app = aiohttp_web.Application()
    app.router.add_get("/", answer)
    async with TestServer(app) as server:
        address = str(server.make_url(""))
        for url in (address, address.replace("127.0.0.1", "localhost")):  # by number too, where aiohttp keeps none
            for cookies, expected in ((False, {}), (True, {"session": "17"})):
                async with HttpClient(url, cookies=cookies) as api:
                    assert await api.get_json("/") == {}
                    assert await api.get_json("/") == expected


async def test_paths_beyond_those_that_are_remembered_work_like_the_others(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed URLs are kept for the routes of a service, not for a million records."""
    monkeypatch.setattr("penstock.clients.http.KNOWN_PATHS", 1)
    async with web.serving(web.reply()) as server, HttpClient(server.url) as api:
        for path in ("/1", "/2", "/1", "/2"):
            await api.get(path)
        assert len(api._targets) == 1
    assert server.seen == ["GET /1", "GET /2", "GET /1", "GET /2"]


# --- what comes back ---


async def test_a_response_says_all_about_itself(web: Web) -> None:
    """Frozen, read fully, its connection back."""
    body = '{"größe": 1}'.encode("latin-1")
    answer = web.reply(body, 203, Content_Type="application/json; charset=latin-1", X_Y="z")
    async with web.serving(answer) as server, HttpClient(server.url) as api:
        response = await api.get("/x", params={"a": "1"})
        assert web.in_use(api) == 0
    assert (response.status, response.body, response.attempts) == (203, body, 1)
    assert (response.headers["x-y"], response.url) == ("z", f"{server.url}/x?a=1")
    assert response.text() == '{"größe": 1}'
    assert 0 <= response.elapsed < 1
    with pytest.raises(AttributeError):
        response.status = 200  # type: ignore[misc]  # frozen


@pytest.mark.parametrize(
    ("method", "answer", "connections"),
    [
        ("GET", "HTTP/1.1 204 No\r\n\r\n", 1),
        ("GET", "HTTP/1.1 304 Same\r\nContent-Length: 1000000\r\n\r\n", 1),
        ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", 1),
        ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nContent-Encoding: gzip\r\n\r\n", 1),
        ("HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 1),
        ("GET", "HTTP/1.1 300 Many\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n", 1),
        ("GET", "HTTP/1.1 302 Where\r\nContent-Length: 0\r\n\r\n", 1),
        ("GET", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 2),
    ],
)
async def test_answers_without_a_body_leave_a_connection_that_can_be_used_again(
    web: Web, method: str, answer: str, connections: int
) -> None:
    """HEAD announces a body that does not come, 204 and 304 have none; none counts as too large."""
    async with web.serving(answer.encode()) as server, HttpClient(server.url, max_body_bytes=1_000) as api:
        for _ in range(2):
            response = await api.request(method, "/x")
            assert (response.body, response.status) == (b"", int(answer.split()[1]))
        assert (server.connections, web.in_use(api)) == (connections, 0)


async def test_json_that_is_not_json_shows_what_came_instead(web: Web) -> None:
    """Status, content type, first bytes, and the masked URL; it is not retried, for the server has answered."""
    answer = web.reply(b"<html>Sign in</html>", 200, Content_Type="text/html")
    async with web.serving(answer) as server, HttpClient(server.url) as api:
        with pytest.raises(NotJson) as caught:
            await api.get_json("/x", params={"token": "secret"})
        with pytest.raises(NotJson):
            await api.post_json("/x")
    assert len(server.requests) == 2
    assert str(caught.value) == (
        f"GET {server.url}/x?token=... -> HTTP 200, Content-Type text/html, "
        "is not JSON (Expecting value: line 1 column 1 (char 0)); it starts '<html>Sign in</html>'"
    )


@pytest.mark.parametrize("body", [b"", b"\xff\xfe\xfd", b'{"a":', b"[" * 200_000])
def test_whatever_cannot_be_parsed_is_not_json(body: bytes) -> None:
    """Bytes that are no text, and brackets too deep for the parser, too."""
    with pytest.raises(NotJson):
        made(body, "application/json").json()


async def test_the_parser_of_json_can_be_chosen(web: Web) -> None:
    """`json_loads` gets the bytes."""
    async with web.serving(web.reply(b"[1]")) as server, HttpClient(server.url, json_loads=repr) as api:
        assert await api.get_json("/x") == "b'[1]'"


def made(body: bytes, content_type: str) -> Response:
    headers = CIMultiDictProxy(CIMultiDict({"Content-Type": content_type}))
    return Response(200, headers, body, 1, 0.0, "GET", URL("http://h/x"), json.loads)


@pytest.mark.parametrize("charset", ["utf-8", "no-such", "base64", "idna", "undefined", '"', "utf-16"])
def test_text_in_an_unusable_charset_is_read_as_utf_8(charset: str) -> None:
    """A server's mistake in a header must not cost the body."""
    text = made("ä".encode(), f"text/plain; charset={charset}").text()
    assert text == ("ä" if charset != "utf-16" else "꓃")


@given(body=st.binary(), content_type=st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_text_never_raises(body: bytes, content_type: str) -> None:
    """Whatever the server sends."""
    made(body, content_type).text()
    made(body, f"text/plain; charset={content_type}").text()


async def test_an_error_of_status_can_be_pickled(web: Web) -> None:
    """It goes to journals and other processes."""
    async with web.serving(web.reply(b"gone", 410)) as server, HttpClient(server.url) as api:
        with pytest.raises(HttpStatusError) as caught:
            await api.get("/x")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) == f"GET {server.url}/x -> HTTP 410: 'gone'"


# --- bodies that are too large, or broken ---


def too_large(web: Web) -> dict[str, bytes]:
    body = bytes(2_000_000)
    return {
        "announced": web.reply(body),
        "in chunks": web.chunked(*(body[i : i + 100_000] for i in range(0, len(body), 100_000))),
        "compressed": web.reply(web.gzipped(body), Content_Encoding="gzip"),
        "compressed, in chunks": web.chunked(web.gzipped(body), Content_Encoding="gzip"),
        "until it hangs up": web.head(200) + body,
    }


def serve_at_once(web: Web, way: str) -> Callable[[Request], bytes | None]:
    def answer(request: Request) -> bytes | None:
        if way != "until it hangs up":
            return too_large(web)[way]
        request.transport.write(too_large(web)[way])
        return None

    return answer


@pytest.mark.parametrize("way", ["announced", "in chunks", "compressed", "compressed, in chunks", "until it hangs up"])
async def test_a_body_longer_than_allowed_is_not_read(web: Web, way: str) -> None:
    """Announced or not; of a compressed one the size that it would have in memory counts."""
    async with web.serving(serve_at_once(web, way)) as server, HttpClient(server.url, max_body_bytes=1_000_000) as api:
        with pytest.raises(
            BodyTooLarge, match=r"more than max_body_bytes=1,000,000\. Raise .*client\.stream"
        ) as caught:
            await api.get("/x?token=secret")
        assert web.in_use(api) == 0
    assert caught.value.url == f"{server.url}/x?token=..."
    assert len(server.requests) == 1
    async with web.serving(serve_at_once(web, way)) as server, HttpClient(server.url, max_body_bytes=2_000_000) as api:
        assert len((await api.get("/x")).body) == 2_000_000


async def test_a_small_compressed_body_that_is_huge_is_never_held_in_memory(web: Web) -> None:
    """200 MB in 200 kB: as much is inflated as is allowed, and a piece more."""
    bomb = web.reply(web.gzipped(bytes(200_000_000)), Content_Encoding="gzip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with web.serving(bomb) as server, HttpClient(server.url, max_body_bytes=1_000_000) as api:
        with pytest.raises(BodyTooLarge):
            await api.get("/x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


async def test_a_body_that_cannot_be_inflated_is_an_error_of_the_tree(web: Web) -> None:
    """And behind an error of status it changes nothing."""
    for status, expected in ((200, ConnectionFailed), (500, HttpStatusError)):
        broken = web.reply(b"this is no gzip", status, Content_Encoding="gzip")
        async with web.serving(broken) as server, HttpClient(server.url, retry=ONCE) as api:
            with pytest.raises(expected):
                await api.get("/x")
            assert web.in_use(api) == 0


async def test_what_is_no_http_is_an_error_of_the_tree_without_the_secrets_of_the_url(web: Web) -> None:
    """aiohttp's own text shows the whole URL, so neither text nor chain has it."""
    async with web.serving(b"SSH-2.0-OpenSSH_9.6\r\n\r\n") as server, HttpClient(server.url) as api:
        with pytest.raises(RoundTripError, match=r"GET .*/x\?token=\.\.\. -> ClientResponseError: ") as caught:
            await api.get("/x?token=secret")
        assert web.in_use(api) == 0
    assert penstock.classify(caught.value) is FailureKind.PERMANENT
    assert len(server.requests) == 1
    assert "secret" not in shown(caught.value)


def shown(error: BaseException | None) -> str:
    """What a log shows of an error: its text, its notes, and those of the errors behind it."""
    if error is None:
        return ""
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(traceback.format_exception_only(error)) + shown(behind)


async def test_a_connection_that_cannot_be_opened_in_time_was_not_sent(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a POST is repeated; and the text of aiohttp's error, which holds the URL, is shown nowhere."""
    monkeypatch.setattr("penstock.clients.http.CONNECT_TIMEOUT", 1.0)
    hanging: list[str] = []

    async def hang(**how: Any) -> None:
        hanging.append(str(how["addr_infos"]))
        await asyncio.Event().wait()

    async with web.serving(web.reply()) as server, HttpClient(server.url, retry=Retry(attempts=2, wait=0)) as api:
        monkeypatch.setattr("aiohttp.connector.aiohappyeyeballs.start_connection", hang)
        with pytest.raises(ConnectionFailed, match="not sent: no connection in time") as caught:
            await api.post("/x?token=secret")
        assert web.in_use(api) == 0
    assert len(hanging) == 2
    assert "secret" not in shown(caught.value)


async def test_a_certificate_that_does_not_verify_is_final_and_nothing_was_sent(web: Web) -> None:
    """Asking again will not make it valid."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(__file__).with_name("untrusted.pem"))
    async with web.serving(web.reply(), ssl=context) as server, HttpClient(server.url) as api:
        with pytest.raises(ConnectionFailed, match="not sent: ClientConnectorCertificateError") as caught:
            await api.get("/x")
        assert (web.in_use(api), server.requests) == (0, [])
        assert api.statistics()[server.url].attempts == 1
    assert penstock.classify(caught.value) is FailureKind.PERMANENT


async def test_a_handshake_that_is_never_answered_sent_nothing(web: Web) -> None:
    """TLS belongs to opening the connection, so even a POST is repeated."""
    async with (
        web.serving(web.reply()) as server,
        HttpClient(server.url.replace("http", "https"), retry=Retry(attempts=2, wait=0)) as api,
    ):
        with pytest.raises(ConnectionFailed, match="not sent: no connection in time"):
            await api.post("/x")
        assert (web.in_use(api), server.requests, server.connections) == (0, [], 2)


# --- redirects ---


@pytest.mark.parametrize(
    ("status", "method", "expected"),
    [
        (301, "GET", "GET"), (301, "POST", "GET"), (301, "PUT", "PUT"), (301, "HEAD", "HEAD"),
        (302, "GET", "GET"), (302, "POST", "GET"), (302, "PATCH", "PATCH"),
        (303, "GET", "GET"), (303, "POST", "GET"), (303, "PUT", "GET"), (303, "DELETE", "GET"), (303, "HEAD", "HEAD"),
        (307, "POST", "POST"), (308, "POST", "POST"), (308, "DELETE", "DELETE"),
    ],
)  # fmt: skip
async def test_a_redirect_is_followed_with_the_method_of_the_standard(
    web: Web, status: int, method: str, expected: str
) -> None:
    """RFC 9110 15.4: after 303, and after 301 and 302 to a POST, a GET without a body."""
    answer = web.script(web.reply(status=status, Location="there?a=1"), web.reply())
    async with web.serving(answer) as server, HttpClient(server.url) as api:
        response = await api.request(method, "/v1/here", json={"a": 1})
        assert (response.url, response.attempts) == (f"{server.url}/v1/there?a=1", 2)
        assert web.in_use(api) == 0
    assert server.seen == [f"{method} /v1/here", f"{expected} /v1/there?a=1"]
    changed = status == 303 or expected != method
    assert server.requests[1].body == (b"" if changed else server.requests[0].body)
    assert ("Content-Type" in server.requests[1].headers) == (not changed)


async def test_a_post_that_became_a_get_is_retried_as_a_get(web: Web) -> None:
    """The GET is harmless, whatever the POST was."""
    answer = web.script(web.reply(status=303, Location="/result"), web.reply(status=503), web.reply())
    async with web.serving(answer) as server, HttpClient(server.url, retry=Retry(wait=0)) as api:
        assert (await api.post("/x")).attempts == 3


async def test_credentials_do_not_follow_a_redirect_to_another_origin(web: Web) -> None:
    """Nor do they come back with a redirect home: the way led through foreign hands.

    Any header may hold a credential, so only those follow that say what is accepted and who asks.
    """

    async def token() -> dict[str, str]:
        return {"X-Token": "secret"}

    async with web.serving(web.reply()) as home, web.serving(web.reply()) as away:
        home.answer = web.script(
            web.reply(status=302, Location="/same-origin"),
            web.reply(status=307, Location=f"{away.url}/away"),
            web.reply(),
        )
        away.answer = lambda _: web.reply(status=307, Location=f"{home.url}/home-again")
        async with HttpClient(home.url, headers={"X-Client": "secret"}, auth=token) as api:
            sent = {"Authorization": "secret", "cookie": "secret", "Proxy-Authorization": "secret", "X-Key": "secret"}
            response = await api.get("/x", headers={**sent, "Accept-Language": "tlh"})
    assert response.url == f"{home.url}/home-again"
    secrets = [
        sorted(name for name, value in request.headers.items() if value == "secret")
        for request in (*home.requests, *away.requests)
    ]
    everything = ["Authorization", "Proxy-Authorization", "X-Client", "X-Key", "X-Token", "cookie"]
    assert secrets == [everything, everything, [], []]
    assert {request.headers["Accept-Language"] for request in (*home.requests, *away.requests)} == {"tlh"}


async def test_a_401_from_another_origin_renews_nothing(web: Web) -> None:
    """It is none of its business."""
    asked = []

    async def token() -> dict[str, str]:
        asked.append(1)
        return {"Authorization": "t"}

    async with (
        web.serving(web.reply(status=401)) as away,
        web.serving(web.reply(status=302, Location=away.url)) as home,
        HttpClient(home.url, auth=token) as api,
    ):
        with pytest.raises(HttpStatusError, match="401"):
            await api.get("/x")
        with pytest.raises(HttpStatusError, match="401"):
            await api.get(f"{away.url}/direct")
    assert len(asked) == 1
    assert all("Authorization" not in request.headers for request in away.requests)


async def test_a_whole_url_elsewhere_gets_no_headers_of_the_client(web: Web) -> None:
    """And one at home does."""
    async with (
        web.serving(web.reply()) as home,
        web.serving(web.reply()) as away,
        HttpClient(home.url + "/v1", headers={"X-Client": "secret"}) as api,
    ):
        for url in (home.url, away.url):
            await api.get(f"{url}/whole")
        assert set(api.statistics()) == {home.url, away.url}
    assert home.seen == away.seen == ["GET /whole"]
    assert ("X-Client" in home.requests[0].headers, "X-Client" in away.requests[0].headers) == (True, False)


async def test_a_redirect_loop_ends(web: Web) -> None:
    """After ten redirects, with the masked URL in the error and nothing held."""
    async with (
        web.serving(web.reply(status=302, Location="/x?token=secret")) as server,
        HttpClient(server.url, limit=1) as api,
    ):
        with pytest.raises(RoundTripError, match=r"GET .*/x\?token=\.\.\.: redirected more than 10 times") as caught:
            await api.get("/x")
        assert (web.in_use(api), api.statistics()[server.url].in_flight) == (0, 0)
    assert len(server.requests) == 11
    assert penstock.classify(caught.value) is FailureKind.PERMANENT


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ftp://user:secret@h/x?token=secret", r"redirected to ftp://\.\.\.@h/x, which is no HTTP address"),
        ("file:///etc/passwd", "redirected to file:///etc/passwd, which is no HTTP address"),
        ("mailto:a@b", r"which is no HTTP address"),
        ("http://[::1", "redirected to what is no URL"),
        ("http://h:99999/", "redirected to what is no URL"),
    ],
)
async def test_a_redirect_to_what_is_no_http_address_is_refused(web: Web, location: str, message: str) -> None:
    """An error of the service, not of the program; without the secrets of the address."""
    async with web.serving(web.reply(status=302, Location=location)) as server, HttpClient(server.url, limit=1) as api:
        with pytest.raises(RoundTripError, match=message) as caught:
            await api.get("/x")
        assert (web.in_use(api), api.statistics()[server.url].in_flight) == (0, 0)
    assert "secret" not in shown(caught.value)


async def test_a_redirected_stream_holds_only_its_last_connection(web: Web) -> None:
    """The bodies before it are let go, however long, before the next request is sent."""
    in_use: list[int] = []

    def answer(request: Request) -> bytes:
        in_use.append(web.in_use(api))
        return web.reply(b"body") if request.target == "/y" else web.reply(bytes(500_000), status=302, Location="/y")

    async with web.serving(answer) as server, HttpClient(server.url, limit=1) as api:
        async with api.stream("GET", "/x") as response:
            assert (response.status, response.url, response.attempts) == (200, f"{server.url}/y", 2)
            assert in_use == [1, 1]
            assert b"".join([piece async for piece in response.iter_bytes()]) == b"body"
        assert web.in_use(api) == 0


# --- service keys ---


async def test_the_service_key_can_be_chosen(web: Web) -> None:
    """From method and URL; a redirect has a key of its own."""
    answer = web.script(web.reply(status=302, Location="/b/2"), web.reply())
    async with (
        web.serving(answer) as server,
        HttpClient(server.url, key=lambda method, url: (method, url.path.split("/")[1])) as api,
    ):
        await api.get("/a/1")
        assert set(api.statistics()) == {("GET", "a"), ("GET", "b")}


@pytest.mark.parametrize("fails_at", ["/x", "/y"])
async def test_a_key_function_that_raises_holds_nothing(web: Web, fails_at: str) -> None:
    """At the request or at its redirect."""

    def key(_: str, url: URL) -> str:
        if url.path == fails_at:
            raise KeyError(url.path)
        return "key"

    answer = web.script(web.reply(status=302, Location="/y"), web.reply())
    async with web.serving(answer) as server, HttpClient(server.url, key=key) as api:
        with pytest.raises(KeyError, match=fails_at):
            await api.get("/x")
        assert web.in_use(api) == 0
        assert all(seen.in_flight == 0 for seen in api.statistics().values())


# --- streams ---


async def test_a_stream_gives_the_body_in_pieces_and_holds_permit_and_connection_meanwhile(web: Web) -> None:
    """Longer than `max_body_bytes`, which does not apply."""
    body = bytes(range(256)) * 4_000
    async with web.serving(web.reply(body, X_Y="z")) as server, HttpClient(server.url, max_body_bytes=1_000) as api:
        async with api.stream("GET", "/x", params={"a": 1}) as response:
            assert (response.status, response.headers["x-y"], response.url) == (200, "z", f"{server.url}/x?a=1")
            assert api.statistics()[server.url].in_flight == 1
            assert b"".join([piece async for piece in response.iter_bytes()]) == body
        assert (api.statistics()[server.url].in_flight, web.in_use(api)) == (0, 0)
        await api.head("/y")
    assert server.connections == 1


@pytest.mark.parametrize("leave", ["at once", "half-way", "by an error", "after close"])
async def test_a_stream_that_is_left_early_gives_its_connection_up(web: Web, leave: str) -> None:
    """What was not read is not worth reading."""
    async with web.serving(web.reply(bytes(1_000_000))) as server, HttpClient(server.url) as api:
        try:
            async with api.stream("GET", "/x") as response:
                if leave == "half-way":
                    async for _ in response.iter_bytes():
                        break
                if leave == "by an error":
                    raise LookupError
                if leave == "after close":
                    response.close()
                    with pytest.raises(ConnectionFailed):
                        await anext(response.iter_bytes())
        except LookupError:
            assert leave == "by an error"
        assert (api.statistics()[server.url].in_flight, web.in_use(api)) == (0, 0)


async def test_a_stream_is_retried_until_its_headers_have_arrived(web: Web) -> None:
    """A body that breaks off is an error, and is not asked for again: what was read of it cannot be unread."""
    answer = web.script(web.reply(status=503), web.reply(status=404, Location="/no"))
    async with web.serving(answer) as server, HttpClient(server.url, retry=Retry(wait=0)) as api:
        with pytest.raises(HttpStatusError, match="404"):
            async with api.stream("GET", "/x"):
                pytest.fail("a 404 is no stream")
        assert (api.statistics()[server.url].in_flight, web.in_use(api)) == (0, 0)

    def half(request: Request) -> None:
        request.transport.write(web.head(200, Content_Length="10") + b"half")

    async with web.serving(half) as server, HttpClient(server.url) as api:
        async with api.stream("GET", "/x?token=secret") as response:
            with pytest.raises(ConnectionFailed, match=r"token=\.\.\. -> no answer: ClientPayloadError"):
                async for piece in response.iter_bytes():
                    assert piece == b"half"
        assert len(server.requests) == 1


async def test_a_stream_that_stalls_is_a_timeout(web: Web) -> None:
    """`timeout` holds for each piece: a body may take hours, but silence is no progress."""

    def drip(request: Request) -> bytes:
        for second in range(1, 11):
            web.later(request, second * 4, b"1\r\nx\r\n")
        return web.head(200, Transfer_Encoding="chunked")

    async with web.serving(drip) as server, HttpClient(server.url, timeout=5) as api:
        async with api.stream("GET", "/x") as response:
            pieces = response.iter_bytes()
            assert [await anext(pieces) for _ in range(10)] == [b"x"] * 10
            with pytest.raises(AttemptTimeout, match="GET .*/x: nothing more of the body within 5 s"):
                await anext(pieces)
        assert web.in_use(api) == 0


async def test_a_stream_without_a_timeout_waits(web: Web) -> None:
    """As long as it takes."""
    async with (
        web.serving(lambda request: web.head(200, Content_Length="2") + web.later(request, 10_000, b"ok")) as server,
        HttpClient(server.url, timeout=None) as api,
        api.stream("GET", "/x") as response,
    ):
        assert [piece async for piece in response.iter_bytes()] == [b"ok"]


# --- life of a client ---


async def test_a_client_is_used_between_opening_and_closing(web: Web) -> None:
    """Each mistake gets the right call to write."""
    async with web.serving(web.reply()) as server:
        api = HttpClient(server.url)
        assert " new " in repr(api)
        with pytest.raises(ClosedError, match="is not open yet. Use it inside `async with HttpClient"):
            await api.get("/x")
        async with api:
            assert " open " in repr(api)
            await api.get("/x")
            with pytest.raises(UsageError, match="opened before. Make a new HttpClient"):
                await api.__aenter__()
        assert " closed " in repr(api)
        with pytest.raises(ClosedError, match="has been closed"):
            await api.get("/x")
        with pytest.raises(ClosedError):
            async with api.stream("GET", "/x"):
                pytest.fail("closed")
        await api.aclose()
    never_opened = HttpClient("http://h")
    await never_opened.aclose()


def test_a_client_belongs_to_the_loop_on_which_it_was_opened() -> None:
    """Its connections do."""
    loop = VirtualClockLoop()
    api = HttpClient("http://127.0.0.1:1")
    loop.run_until_complete(api.__aenter__())
    try:
        with pytest.raises(WrongLoop, match="opened on another event loop.*Open one on each loop"):
            run_in_virtual_time(api.get("/x"))
    finally:
        loop.run_until_complete(api.aclose())
        loop.close()


def test_a_connector_belongs_to_its_loop_too() -> None:
    """aiohttp's own error speaks of a session that the user has never seen."""
    loop = VirtualClockLoop()

    async def make() -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=0)

    async def use() -> None:
        async with HttpClient("http://h", connector=connector):
            pytest.fail("it belongs elsewhere")

    connector = loop.run_until_complete(make())
    try:
        with pytest.raises(WrongLoop, match="connector= belongs to another event loop. Make it inside this one"):
            run_in_virtual_time(use())
    finally:
        loop.run_until_complete(connector.close())
        loop.close()


async def test_a_request_that_backs_off_while_the_client_is_closed_says_so_at_once(web: Web) -> None:
    """It does not wait for a retry that cannot be."""
    loop = asyncio.get_running_loop()
    async with web.serving(web.reply(status=503)) as server:
        async with HttpClient(server.url, retry=Retry(wait=10)) as api:
            waiting = asyncio.create_task(api.get("/x"))
            await asyncio.sleep(1)
            closed = loop.time()
        with pytest.raises(ClosedError, match="GET .*/x: this HttpClient was closed before there was an answer"):
            await waiting
        assert loop.time() - closed < 1


async def test_requests_without_an_answer_fail_when_the_client_is_closed(web: Web) -> None:
    """The one in flight, and those that wait for its permit; nobody takes it for the service's fault."""
    async with web.serving(lambda _: b"") as server:
        async with HttpClient(server.url, limit=1, breaker=Breaker(calls=1)) as api:
            waiting = [asyncio.create_task(api.get(f"/{number}")) for number in range(5)]
            while not server.requests:
                await asyncio.sleep(0)
        for request in waiting:
            with pytest.raises(ClosedError, match="was closed before there was an answer"):
                await request
        (key,) = api.statistics().values()
        assert (key.in_flight, key.waiting, len(key.failed), key.retries, key.breaker) == (0, 0, 0, 0, "closed")


async def test_a_connector_of_ones_own_is_used_and_stays_open(web: Web) -> None:
    """Who made it closes it; a closed one is refused."""
    async with web.serving(web.reply()) as server, aiohttp.TCPConnector(limit=2) as connector:
        async with HttpClient(server.url, connector=connector, limit=2) as api:
            await api.get("/x")
        assert not connector.closed
    with pytest.raises(ClosedError, match="connector= has been closed"):
        async with HttpClient("http://h", connector=connector, limit=2):
            pytest.fail("closed")


@pytest.mark.parametrize("bound", ["limit", "limit_per_host"])
async def test_a_connector_whose_limit_binds_is_refused(bound: str) -> None:
    """Requests would wait where their time-out already runs."""
    limits: dict[str, Any] = {"limit": 0, bound: 10}
    async with aiohttp.TCPConnector(**limits) as connector:
        with pytest.raises(UsageError, match=rf"connector's {bound}=10 is below the client's limit=11.*at least 11"):
            async with HttpClient("http://h", connector=connector, limit=11):
                pytest.fail("it binds")
        async with HttpClient("http://h", connector=connector, limit=10):
            pass


async def test_a_limit_above_the_descriptors_of_the_process_is_refused() -> None:
    """Rather than failing with "too many open files" in the middle of a run; with a connector of one's own too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with aiohttp.TCPConnector(limit=0) as connector:
        for own in (None, connector):
            with pytest.raises(UsageError, match=rf"limit={soft}: this process may open {soft} files, 64 .*ulimit -n"):
                async with HttpClient("http://h", limit=soft, connector=own):
                    pytest.fail("too many")


@pytest.mark.parametrize("system", ["no limit", "no such thing"])
async def test_where_descriptors_have_no_limit_there_is_none(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """An unlimited process, and Windows."""
    if system == "no limit":
        monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        monkeypatch.setitem(sys.modules, "resource", None)
    async with HttpClient("http://h", limit=10**9) as api:
        assert " open " in repr(api)


# --- limit, rates and breaker ---

RATE = Rate(10, per=1, burst=3)


class Dial:
    """A rule and its limiter: a number that stays, and what it was told."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.baseline: float | None = None
        self.queue = 0.0
        self.most: int | None = None
        self.samples: list[float | None] = []
        self.caps: list[int | None] = []

    def limiter(self, _now: float, most: int | None, _rng: random.Random) -> Dial:
        self.most = most
        return self

    def started(self, _now: float) -> int:
        return 1

    def ended(self, _mark: int, _now: float, rtt: float | None, _dropped: bool) -> LimitChange | None:
        self.samples.append(rtt)
        return None

    def contaminate(self) -> None:
        """Nothing is measured."""

    def half_open(self, _now: float) -> None:
        """It stays."""

    def recovered(self, _now: float) -> None:
        """It stays."""

    def cap(self, most: int | None, _now: float) -> None:
        self.caps.append(most)


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_requests_start_at_the_rate(web: Web) -> None:
    """A heavier one takes more, and one that never fits is refused."""
    async with web.serving(web.reply(b"{}")) as server, HttpClient(server.url, limit=8, rate=RATE) as api:
        assert api.rate == RATE
        await asyncio.gather(*[api.get("/") for _ in range(13)])
        times = server.times
        assert all(times[number] >= (number - 3) / 10 - 0.001 for number in range(13))
        assert times[-1] == pytest.approx(1, abs=0.02)
        await asyncio.sleep(10)
        started = now()
        await api.get("/", weight=3)
        await api.get("/")
        assert now() - started == pytest.approx(0.1, abs=0.02)
        async with api.stream("GET", "/", weight=2):
            assert now() - started == pytest.approx(0.3, abs=0.02)
        for weight in (-1, 11, {"tokens": 1}):
            with pytest.raises(UsageError, match="weight="):
                await api.get("/", weight=weight)


async def test_what_an_answer_says_that_it_has_used_is_put_right(web: Web) -> None:
    """By `used`, from the answer itself."""
    rates = {"tokens": Rate(100, per=100, burst=100)}
    body = web.reply(b'{"used": 10}')
    async with (
        web.serving(body) as server,
        HttpClient(server.url, limit=8, rate=rates, used=lambda answer: {"tokens": answer.json()["used"]}) as api,
    ):
        await api.get("/", weight={"tokens": 90})
        (seen,) = api.statistics().values()
        assert seen.tokens == {"tokens": pytest.approx(90, abs=0.1)}


async def test_a_limit_can_be_changed_while_requests_are_under_way(web: Web) -> None:
    """For all origins, at once where it grows; beyond the connections that there can be it is refused."""
    inside = []

    def slow(request: Request) -> bytes:
        inside.append(request)
        return web.later(request, 5, web.reply())

    async with (
        web.serving(slow) as server,
        aiohttp.TCPConnector(limit=6) as connector,
        HttpClient(server.url, limit=2, connector=connector) as api,
    ):
        requests = [asyncio.ensure_future(api.get("/")) for _ in range(8)]
        await asyncio.sleep(1)
        assert (len(inside), api.limit) == (2, 2)
        with pytest.raises(UsageError, match=r"connector's limit=6 is below the client's limit=7.*at least 7"):
            api.limit = 7
        assert api.limit == 2
        api.limit = 6
        await asyncio.sleep(1)
        assert len(inside) == 6
        api.limit = Dial(1)
        await asyncio.sleep(4)
        assert len(inside) == 6
        api.limit = 4
        await asyncio.gather(*requests)
        assert len(inside) == 8


async def test_a_limit_can_be_chosen_before_the_client_is_opened() -> None:
    """It is compared with the connections when there are some."""
    api = HttpClient("http://h")
    api.limit = 10**9
    with pytest.raises(UsageError, match=r"limit=1000000000: this process may open"):
        await api.__aenter__()


@pytest.mark.parametrize(("bounds", "most"), [({"limit": 7}, 7), ({"limit": 0, "limit_per_host": 5}, 5)], ids=str)
async def test_a_limit_that_is_measured_keeps_to_the_connections_that_there_can_be(
    web: Web, bounds: dict[str, int], most: int
) -> None:
    dial = Dial(2)
    async with (
        web.serving(web.reply()) as server,
        aiohttp.TCPConnector(**bounds) as connector,  # type: ignore[arg-type]
        HttpClient(server.url, limit=dial, connector=connector) as api,
    ):
        await api.get("/")
    assert dial.most == most


async def test_a_limit_that_is_measured_keeps_to_the_descriptors_of_the_process(web: Web) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    dial = Dial(2)
    async with web.serving(web.reply()) as server, HttpClient(server.url, limit=dial) as api:
        await api.get("/")
    assert dial.most == soft - 64


async def test_the_rate_and_the_breaker_can_be_changed_too(web: Web) -> None:
    answers = [web.reply(status=502)] * 3 + [web.reply()]
    async with (
        web.serving(web.script(*answers)) as server,
        HttpClient(server.url, limit=4, breaker=Breaker(calls=3), retry=ONCE) as api,
    ):
        assert api.breaker == Breaker(calls=3)
        for _ in range(3):
            with pytest.raises(HttpStatusError):
                await api.get("/")
        (seen,) = api.statistics().values()
        assert (seen.breaker, seen.opened) == ("open", 1)
        started = now()
        waiting = asyncio.ensure_future(api.get("/"))
        await asyncio.sleep(1)
        api.breaker = None
        await waiting
        assert now() - started == pytest.approx(1, abs=0.1)
        api.rate = Rate(1, per=50, burst=1)
        for _ in range(2):
            await api.get("/")
        assert now() - started == pytest.approx(51, abs=0.2)
        api.rate = None
        for _ in range(20):
            await api.get("/")
        assert now() - started == pytest.approx(51, abs=0.2)


async def test_where_nothing_answers_requests_fail_soon() -> None:
    """A batch with a wrong address does not wait for it."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with HttpClient(address, limit=4, retry=ONCE) as api:
            started = now()
            ends = await asyncio.gather(*[api.get("/") for _ in range(100)], return_exceptions=True)
            assert now() - started < 5
    kinds = Counter(type(end) for end in ends)
    assert kinds[ConnectionFailed] <= 14
    assert kinds[CircuitOpen] == 100 - kinds[ConnectionFailed]
    assert "nothing has ever answered" in str(ends[-1])


# --- what is measured, and what the server tells ---


async def test_neither_connecting_nor_the_body_count_as_the_services_time(web: Web) -> None:
    """What says how busy it is, is the time from the request to the headers."""

    class Slow(aiohttp.TCPConnector):
        async def connect(self, *args: Any, **how: Any) -> Any:
            await asyncio.sleep(3)
            return await super().connect(*args, **how)

    def answer(request: Request) -> bytes:
        web.later(request, 2, web.head(200, Content_Length="4"))
        return web.later(request, 7, b"done")

    dial = Dial(2)
    async with web.serving(answer) as server, Slow() as connector:
        async with HttpClient(server.url, limit=dial, connector=connector) as api:
            response = await api.get("/")
            (seen,) = api.statistics().values()
    assert dial.samples == [pytest.approx(2, abs=0.1)]
    assert response.elapsed == pytest.approx(10, abs=0.1)
    assert seen.latency.max == pytest.approx(10, abs=0.1)


async def test_an_error_that_is_an_answer_is_measured_as_well(web: Web) -> None:
    """The service has worked for a 404; of a 500 nobody knows."""
    dial = Dial(2)
    statuses = [404, 500]

    def answer(request: Request) -> bytes:
        return web.later(request, 2, web.reply(b"no", statuses[0]))

    async with web.serving(answer) as server, HttpClient(server.url, limit=dial, retry=ONCE) as api:
        for _ in range(2):
            with pytest.raises(HttpStatusError):
                await api.get("/")
            statuses.pop(0)
    assert dial.samples == [pytest.approx(2, abs=0.1), None]


async def test_retry_after_of_a_real_server_pauses_the_whole_origin() -> None:
    """Neither the others that are under way nor those that come meanwhile are sent; other origins go on."""
    asked: list[float] = []

    async def handler(_request: aiohttp_web.Request) -> aiohttp_web.Response:
        asked.append(now())
        if len(asked) == 1:
            return aiohttp_web.Response(status=503, headers={"Retry-After": "20"})
        return aiohttp_web.Response(text="fine")

    async def other(_request: aiohttp_web.Request) -> aiohttp_web.Response:
        return aiohttp_web.Response(text="fine")

    app, elsewhere = aiohttp_web.Application(), aiohttp_web.Application()
    app.router.add_get("/", handler)
    elsewhere.router.add_get("/", other)
    async with TestServer(app) as server, TestServer(elsewhere) as second, HttpClient(str(server.make_url("/"))) as api:
        first = asyncio.ensure_future(api.get("/"))
        async with asyncio.timeout(100):
            while not asked:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        late = asyncio.ensure_future(api.get("/"))
        started = now()
        await api.get(str(second.make_url("/")))
        assert now() - started < 1
        seen = api.statistics()[str(server.make_url("/")).rstrip("/")]
        assert seen.paused_for > 15
        assert seen.waits_for == "pause"
        await asyncio.gather(first, late)
    assert len(asked) == 3
    assert all(20 <= at - asked[0] <= 23 for at in asked[1:])


async def test_a_quota_that_a_real_server_tells_of_is_kept_by_the_whole_origin() -> None:
    """Before anything is refused: when it is used up, everybody waits for the next window."""
    asked: list[float] = []
    refused = 0
    window, quota = 30, 10

    async def handler(_request: aiohttp_web.Request) -> aiohttp_web.Response:
        nonlocal refused
        started = asked[0] if asked else now()
        number = int((now() - started) // window)
        used = sum(int((at - started) // window) == number for at in asked)
        headers = {
            "X-RateLimit-Limit": str(quota),
            "X-RateLimit-Remaining": str(max(0, quota - used - 1)),
            "X-RateLimit-Reset": str(math.ceil(started + (number + 1) * window - now())),
        }
        if used >= quota:
            refused += 1
            return aiohttp_web.Response(status=429, headers=headers)
        asked.append(now())
        return aiohttp_web.Response(text="fine", headers=headers)

    app = aiohttp_web.Application()
    app.router.add_get("/", handler)
    async with TestServer(app) as server, HttpClient(str(server.make_url("/")), limit=2) as api:
        await asyncio.gather(*[api.get("/") for _ in range(25)])
        (seen,) = api.statistics().values()
    assert len(asked) == 25
    assert 2 * window <= asked[-1] - asked[0] <= 4 * window
    assert refused <= 3
    assert seen.waited["rate"] + seen.waited.get("pause", 0) >= window


async def test_what_a_server_takes_at_once_caps_what_is_measured(web: Web) -> None:
    """It says so in its answers."""
    dial = Dial(8)
    answer = web.reply(RateLimit_Policy='"c";q=3;qu="concurrent-requests"')
    async with web.serving(answer) as server, HttpClient(server.url, limit=dial) as api:
        for _ in range(2):
            await api.get("/")
    assert dial.caps == [3]


async def test_what_was_used_is_asked_of_final_answers_only(web: Web) -> None:
    """A redirect has no body to look into, and a stream has not been read."""
    asked: list[str] = []

    def used(answer: Response) -> dict[str, float]:
        asked.append(answer.text())
        return {"tokens": 1}

    def answer(request: Request) -> bytes:
        return web.reply(b"", 302, Location="/end") if request.target == "/" else web.reply(b"end")

    async with web.serving(answer) as server, HttpClient(server.url, used=used) as api:
        await api.get("/")
        async with api.stream("GET", "/") as stream:
            assert [piece async for piece in stream.iter_bytes()] == [b"end"]
        assert web.in_use(api) == 0
    assert asked == ["end"]


async def test_streams_that_are_being_read_take_no_probes_place_and_let_none_through_at_their_end(web: Web) -> None:
    """They have had their answer before."""
    down: list[bool] = []

    def answer(request: Request) -> bytes:
        if request.target == "/stream":
            return web.reply(b"all of it")
        return web.reply(status=502) if down else web.later(request, 50, web.reply())

    async with (
        web.serving(answer) as server,
        HttpClient(server.url, limit=6, retry=ONCE, breaker=Breaker(calls=5, pause=10), timeout=None) as api,
    ):
        async with api.stream("GET", "/stream"), api.stream("GET", "/stream"):
            down.append(True)
            for _ in range(4):
                with pytest.raises(HttpStatusError):
                    await api.get("/")
            down.clear()
            requests = [asyncio.ensure_future(api.get("/")) for _ in range(4)]
            (seen,) = api.statistics().values()
            assert seen.breaker == "open"
            while (seen := next(iter(api.statistics().values()))).breaker == "open":
                await asyncio.sleep(0.1)
            assert (seen.in_flight, seen.limit) == (3, 3)
        (seen,) = api.statistics().values()
        assert (seen.in_flight, seen.limit) == (1, 1)
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "example.com/v1"}, r"base_url='example\.com/v1': expected an address with scheme and host"),
        ({"base_url": "user:secret@example.com?token=secret"}, r"base_url='\.\.\.@example\.com': expected"),
        ({"base_url": "ftp://user:secret@example.com"}, r"base_url='ftp://\.\.\.@example\.com'"),
        ({"base_url": "http://"}, r"base_url='http:\/\/'"),
        ({"base_url": "http://[::1"}, r"base_url='http://\[::1'"),
        ({"base_url": ""}, "base_url=''.*Write HttpClient"),
        ({"base_url": None}, "base_url='None'"),
        ({"base_url": "http://user:secret@h/?token=secret"}, r"base_url=http://h/\?token=\.\.\.: has a query"),
        ({"base_url": "http://h/#secret"}, "base_url=http://h/: has a query or a fragment"),
        ({"auth": dict}, "expected a mapping of headers, or an async function"),
        ({"auth": ("user", "password")}, "expected a mapping of headers, or an async function"),
        ({"max_body_bytes": 0}, "max_body_bytes=0: expected a whole number of at least 1"),
        ({"max_body_bytes": None}, "max_body_bytes=None"),
        ({"max_body_bytes": True}, "max_body_bytes=True"),
        ({"limit": 0}, "limit=0"),
        ({"timeout": aiohttp.ClientTimeout(5)}, r"timeout=ClientTimeout\(.*expected seconds"),
        ({"retry": 3}, r"Write retry=Retry\(attempts=3\)"),
    ],
)
def test_a_client_that_cannot_work_is_refused_where_it_is_made(options: Any, message: str) -> None:
    """With what was found, what was expected, and no secrets."""
    with pytest.raises(UsageError, match=message) as caught:
        HttpClient(**{"base_url": "http://h", **options})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"json": 1, "data": b""}, "found both json= and data=, expected one body"),
        ({"json": {1, 2}}, "json=set: cannot be written as JSON: Object of type set"),
        ({"data": [1]}, "data=list: expected bytes, text or a mapping"),
        ({"data": {"a": 1, "b": None}}, "data={'b': None}: expected text or numbers, or lists of them"),
        ({"data": {"a": [1, True]}}, "data={'a': .1, True.}: expected text or numbers"),
        ({"data": open}, "a stream or a file has to be read first"),
        ({"params": {"b": 1, "a": None}}, "params={'a': None}: expected text or numbers, or lists of them"),
        ({"params": {"a": float("nan")}}, "params={'a': nan}: expected text or numbers"),
        ({"params": 5}, "params=int: expected text or numbers"),
        ({"path": "http://[secret"}, r"path='http://\[secret': expected a path or a whole URL"),
        ({"path": "http://"}, "path='http://': expected a path or a whole URL"),
        ({"path": URL("http://h/x")}, "path=URL: expected text"),
        ({"method": "GE T"}, "GE T http://.*: aiohttp refuses this request"),
        ({"headers": {"X-A": "a\r\nX-B: b"}}, "aiohttp refuses this request"),
        ({"headers": {"X-A": 1}}, "aiohttp refuses this request"),
        ({"path": f"http://{'a' * 64}.test/"}, "aiohttp refuses this request"),
        ({"path": "http://u:p@127.0.0.1:1/", "headers": {"Authorization": "x"}}, "aiohttp refuses this request"),
    ],
)
async def test_a_request_that_cannot_be_made_is_a_usage_error(web: Web, how: dict[str, Any], message: str) -> None:
    """A bug of the program: never retried, and nothing is held afterwards."""
    async with web.serving(web.reply()) as server, HttpClient(server.url) as api:
        with pytest.raises(UsageError, match=message) as caught:
            await api.request(**{"method": "POST", "path": "/x", **how})
        assert web.in_use(api) == 0
        assert all(seen.in_flight == 0 and seen.retries == 0 for seen in api.statistics().values())
    assert server.requests == []
    assert penstock.classify(caught.value) is FailureKind.BUG


async def test_a_connector_that_refuses_a_url_is_a_usage_error() -> None:
    """aiohttp's own InvalidURL, whose text is the URL, secrets and all."""

    class Picky(aiohttp.TCPConnector):
        async def connect(self, *_: Any, **__: Any) -> Any:
            raise aiohttp.InvalidURL("http://h/?token=secret")

    async with Picky(limit=0) as connector, HttpClient("http://127.0.0.1:1", connector=connector) as api:
        with pytest.raises(UsageError, match=r"GET .*token=\.\.\.: aiohttp refuses this URL \(InvalidURL\)") as caught:
            await api.get("/?token=secret")
    assert "secret" not in shown(caught.value)


# --- masking ---


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://user:secret@h:81/p?token=secret&q=secret#secret", "http://h:81/p?token=...&q=..."),
        ("http://h/p", "http://h/p"),
        ("https://[::1]:8/p?a=", "https://[::1]:8/p?a=..."),
    ],
)
def test_a_masked_url_shows_where_and_what_was_asked_but_no_secrets(url: str, expected: str) -> None:
    """No user info, no fragment, names of the query without their values."""
    assert masked(URL(url)) == expected


@given(secret=st.from_regex(r"S[a-zA-Z0-9:@+&=?#]{8}T", fullmatch=True))
def test_masked_text_shows_nothing_of_user_info_query_or_fragment(secret: str) -> None:
    """Also where the text is no URL, as in a forgotten scheme."""
    for address in (f"ftp://u:{secret}@h/p", f"u:{secret}@h/p", f"h/p?{secret}", f"http://h#{secret}"):
        assert secret not in masked_text(address)


async def test_every_error_of_the_client_is_an_error_of_the_tree(web: Web) -> None:
    """Whatever a server does to a request, `except PenstockError` catches it."""
    misbehaviours: list[Callable[[Request], bytes | None]] = [
        lambda _: None,
        lambda request: request.transport.abort(),
        lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        lambda _: b"HTTP/1.1 2000 OK\r\n\r\n",
        lambda _: b"HTTP/9.9 200 OK\r\n\r\n",
        lambda _: b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        lambda _: b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 3\r\n\r\nabc",
        lambda _: b"HTTP/1.1 302 Go\r\nLocation: http://\xff\xfe/\r\nContent-Length: 0\r\n\r\n",
        lambda _: b"\0" * 100,
    ]
    for number, misbehaviour in enumerate(misbehaviours):
        async with web.serving(misbehaviour) as server, HttpClient(server.url, retry=ONCE, timeout=5) as api:
            with pytest.raises(PenstockError):
                await api.get_json("/x")
            assert web.in_use(api) == 0, number
            assert api.statistics()[server.url].in_flight == 0, number


async def test_a_form_repeats_the_names_of_lists(web: Web) -> None:
    """As every other client does."""
    async with web.serving(web.reply()) as server, HttpClient(server.url) as api:
        await api.post("/x", data={"a": ["1", 2], "b": "x y"})
    assert server.requests[0].body == b"a=1&a=2&b=x+y"
