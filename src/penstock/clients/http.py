"""The HTTP client: round trips over an aiohttp connector, each through the gate of its origin.

    request -> exchange (method, URL, body as bytes) -> gate of the origin -> aiohttp, no redirects, no cookies
                  ^                                          |
                  +-- redirected, or auth renewed after a 401 +-> Response

A redirect is a round trip of its own: it may lead to another origin with another gate, and takes no credentials there.
aiohttp's silent second sending of requests on a connection that died is switched off, so that every request on the wire
is an attempt that is counted. Loop thread only.
"""

import asyncio
import json as json_module
import sys
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias, TypedDict, Unpack
from urllib.parse import urlencode

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from penstock import clock
from penstock.callables import is_async
from penstock.clients.auth import FetchHeaders, Headers, RenewableAuth
from penstock.clients.exchange import (
    IDEMPOTENT_METHODS,
    A,
    Exchange,
    Settings,
    StreamedExchange,
    StreamedResponse,
    WholeExchange,
)
from penstock.clients.response import JsonLoads, Response, masked, masked_text
from penstock.errors import ClosedError, HttpStatusError, RoundTripError, UsageError, WrongLoop
from penstock.gate.gate import DEFAULT_LIMIT, DEFAULT_TIMEOUT, Gate
from penstock.gate.retry import Retry
from penstock.gate.service import KeyStatistics, Service

Params: TypeAlias = Mapping[str, str | int | float] | str | None
Body: TypeAlias = bytes | str | Mapping[str, str] | None

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Arbitrary, because: longer than an API's answer, and a hundred of them in flight still fit into memory."""
MAX_REDIRECTS = 10
"""As aiohttp."""
CONNECT_TIMEOUT = 10.0
"""Seconds for opening a connection, so that "not sent" can be told from "no answer". Arbitrary, because: three
retransmissions of a SYN (RFC 6298: 1, 2 and 4 s) fit in."""
SPARE_DESCRIPTORS = 64
"""File descriptors left to the rest of the process. Arbitrary, because: files, pipes and other sockets need some."""
KNOWN_PATHS = 1_024
"""Parsed URLs that are remembered. Arbitrary, because: more than a service has routes."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CREDENTIALS = frozenset({"authorization", "cookie", "proxy-authorization"})


class _Target(NamedTuple):
    """Where a path leads."""

    url: URL
    at_home: bool
    """True on the origin of `base_url`, where the client's headers go."""
    origin: str


class RequestOptions(TypedDict, total=False):
    """The options of a request; see `HttpClient.request`."""

    params: Params
    json: Any
    data: Body
    headers: Headers | None
    idempotent: bool | None


_Parts: TypeAlias = tuple[
    aiohttp.ClientSession, Settings, str, URL, Headers, bytes | None, RenewableAuth | None, bool, Hashable
]


class HttpClient:
    """Talks to one service, and to where it redirects.

        async with HttpClient("http://example.com", retry=Retry(attempts=4)) as api:
            profile = await api.get_json("/api1", params={"id": 17})

    What is retried: GET, HEAD, PUT, DELETE and OPTIONS after connection trouble, time-outs and 408, 429, 502, 503, 504;
    POST and PATCH only when they were provably not sent, were answered with 429 or 503 with `Retry-After`, carry an
    `Idempotency-Key` header, or are declared `idempotent=True`. `Retry-After` pauses the whole origin.

    Args:
        base_url: what paths are appended to, with its scheme: `"https://host/v1"`. User info in it becomes an
            `Authorization` header.
        headers: sent with every request to the origin of `base_url`, never elsewhere.
        auth: more such headers, or an async function that gives them; it is called again, once for all who wait, after
            a 401.
        timeout: seconds for one attempt, from its admission to the end of the body; for `stream`, to the headers, and
            then for each piece of the body.
        max_body_bytes: longer answers are not read.
        cookies: True keeps and sends cookies; they are shared by all jobs.
        connector: an aiohttp connector of your own, which you close; None makes a `TCPConnector`.
        json_loads: what parses JSON; gets the bytes of the body. `orjson.loads` is faster.
        limit: requests in flight at once, for each origin.
        retry: the policy; see `Retry`.
        key: gives the service key of a request from its method and URL; None is the origin.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Headers | None = None,
        auth: Headers | FetchHeaders | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_body_bytes: int = MAX_BODY_BYTES,
        cookies: bool = False,
        connector: aiohttp.BaseConnector | None = None,
        json_loads: JsonLoads = json_module.loads,
        limit: int = DEFAULT_LIMIT,
        retry: Retry | None = None,
        key: Callable[[str, URL], Hashable] | None = None,
    ) -> None:
        base = _checked_base(base_url)
        self._base = base.with_user(None)
        self._origin = self._base.origin()
        if isinstance(max_body_bytes, bool) or not isinstance(max_body_bytes, int) or max_body_bytes < 1:
            raise UsageError(f"max_body_bytes={max_body_bytes!r}: expected a whole number of at least 1.")
        self.timeout = timeout
        self.max_body_bytes = max_body_bytes
        self.json_loads = json_loads
        self._headers = CIMultiDict(_user_info(base))
        self._headers.update(headers or {})
        self._headers.update(auth if isinstance(auth, Mapping) else {})
        self._auth = _renewable(auth)
        self._cookies = cookies
        self._connector = connector
        self._limit = limit
        self._key = key
        self._gate = Gate(masked(self._origin), limit=limit, retry=retry, timeout=timeout)
        self._targets: dict[str, _Target] = {}
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._session is None else "open"
        return f"<HttpClient {masked(self._base)} {state} {self._gate!r}>"

    async def __aenter__(self) -> Self:
        if self._session is not None:
            raise UsageError("this client has been opened before. Make a new HttpClient() for each `async with`.")
        self._loop = asyncio.get_running_loop()
        available = _descriptors(self._limit)
        connector = aiohttp.TCPConnector(limit=available) if self._connector is None else self._connector
        _check_connector(connector, self._limit)
        self._session = aiohttp.ClientSession(
            connector=connector,
            connector_owner=self._connector is None,
            cookie_jar=aiohttp.CookieJar() if self._cookies else aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
        )
        # Private, and there is no public way: aiohttp would send some requests twice without telling anybody.
        self._session._retry_connection = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the session and its connections. Requests in flight fail. Closing twice is fine."""
        self._closed = True
        try:
            if self._auth is not None:
                await self._auth.close()
        finally:
            if self._session is not None:
                await self._session.close()

    async def request(self, method: str, path: str, **how: Unpack[RequestOptions]) -> Response:
        """Do one round trip and return the answer, read fully.

        Args:
            method: GET, POST ...
            path: appended to `base_url`; or a whole URL, which gets the client's headers only on the same origin.
            params: the query.
            json: a body, written as JSON. None is no body; send `null` as `data=b"null"`.
            data: a body as bytes or text, or a mapping, written as a form.
            headers: for this request.
            idempotent: whether sending it twice does no harm; None goes by the method and an `Idempotency-Key` header.

        **Cancellation**: the request is given up and its connection closed. **Threads**: loop thread only.

        Raises:
            HttpStatusError: the status is 400 or more.
            BodyTooLarge: the body is longer than `max_body_bytes`.
            ConnectionFailed: no complete answer arrived.
            AttemptTimeout: no answer in time.
            ClosedError, WrongLoop: the client is not open, or was opened on another loop.
        """
        exchange = WholeExchange(*self._request(method, path, **how))
        response, service = await self._send(exchange)
        service.give_back()
        return response

    @asynccontextmanager
    async def stream(self, method: str, path: str, **how: Unpack[RequestOptions]) -> AsyncIterator[StreamedResponse]:
        """Do one round trip and read a large answer in pieces: `async with api.stream("GET", "/dump") as answer:`.

        It is retried until the headers have arrived. The block holds a permit and a connection. Everything else is as
        for `request`.
        """
        exchange = StreamedExchange(*self._request(method, path, **how))
        response, service = await self._send(exchange)
        try:
            yield response
        finally:
            response.close()
            service.give_back()

    async def get(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """GET; options as for `request`."""
        return await self.request("GET", path, **how)

    async def head(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """HEAD; options as for `request`."""
        return await self.request("HEAD", path, **how)

    async def options(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """OPTIONS; options as for `request`."""
        return await self.request("OPTIONS", path, **how)

    async def put(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """PUT; options as for `request`."""
        return await self.request("PUT", path, **how)

    async def delete(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """DELETE; options as for `request`."""
        return await self.request("DELETE", path, **how)

    async def post(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """POST; options as for `request`."""
        return await self.request("POST", path, **how)

    async def patch(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """PATCH; options as for `request`."""
        return await self.request("PATCH", path, **how)

    async def get_json(self, path: str, **how: Unpack[RequestOptions]) -> Any:
        """GET, and the body as JSON; options as for `request`. Raises `NotJson` too."""
        return (await self.request("GET", path, **how)).json()

    async def post_json(self, path: str, **how: Unpack[RequestOptions]) -> Any:
        """POST, and the body as JSON; options as for `request`. Raises `NotJson` too."""
        return (await self.request("POST", path, **how)).json()

    def statistics(self) -> dict[Hashable, KeyStatistics]:
        """What is going on, by service key: the origin, unless `key=` says otherwise."""
        return self._gate.statistics()

    def _request(
        self,
        method: str,
        path: str,
        *,
        params: Params = None,
        json: Any = None,
        data: Body = None,
        headers: Headers | None = None,
        idempotent: bool | None = None,
    ) -> _Parts:
        """Everything that an exchange is made of."""
        session = self._opened()
        method = method.upper()
        target = self._targets.get(path) or self._resolve(path)
        body, content_type = _encoded(json, data)
        sent = CIMultiDict(self._headers if target.at_home else ())
        if content_type is not None:
            sent["Content-Type"] = content_type
        if headers:
            sent.update(headers)
        if idempotent is None:
            idempotent = method in IDEMPOTENT_METHODS or "Idempotency-Key" in sent
        url = _with_query(target.url, params) if params else target.url
        key = target.origin if self._key is None else self._key(method, url)
        return session, self, method, url, sent, body, self._auth if target.at_home else None, idempotent, key

    async def _send(self, exchange: Exchange[A]) -> tuple[A, Service]:
        """Send until there is a final answer; the permit that goes with it is still held."""
        if exchange.auth is not None:
            await exchange.auth.renew(0)
        asked = clock.now()
        redirects = 0
        renewed = False
        while True:
            service = self._gate.service(exchange.key)
            try:
                response = await self._gate.begin(exchange, service, asked=asked)
            except HttpStatusError as error:
                if error.status != 401 or exchange.auth is None or renewed:
                    raise
                renewed = True
                await exchange.auth.renew(exchange.generation)
                continue
            if response.status not in _REDIRECTS or "Location" not in response.headers:
                return response, service
            exchange.discard(response)
            service.give_back()
            redirects += 1
            if redirects > MAX_REDIRECTS:
                raise RoundTripError(f"{exchange}: redirected more than {MAX_REDIRECTS} times")
            self._redirect(exchange, response.status, response.headers["Location"])

    def _redirect(self, exchange: Exchange[Any], status: int, location: str) -> None:
        """Turn the exchange to where the server points (RFC 9110 15.4); no credentials follow to another origin."""
        try:
            url = exchange.url.join(URL(location))
        except ValueError as error:
            raise RoundTripError(f"{exchange}: redirected to what is no URL ({error})") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise RoundTripError(f"{exchange}: redirected to {masked_text(location)}, which is no HTTP address")
        if status == 303 or (status in (301, 302) and exchange.method == "POST"):
            exchange.method = "HEAD" if exchange.method == "HEAD" else "GET"
            exchange.body = None
            exchange.idempotent = True
            exchange.headers = _without(exchange.headers, {"content-type"})
        if url.origin() != exchange.url.origin():
            exchange.headers = _without(exchange.headers, _CREDENTIALS | {name.lower() for name in self._headers})
            exchange.auth = None
        exchange.url = url
        exchange.key = masked(url.origin()) if self._key is None else self._key(exchange.method, url)

    def _resolve(self, path: str) -> _Target:
        if not isinstance(path, str):
            raise UsageError(f"path={type(path).__name__}: expected text, as in `api.get('/items')`.")
        whole = path.startswith(("http://", "https://"))
        try:
            url = URL(path if whole else f"{str(self._base).rstrip('/')}/{path.lstrip('/')}")
            url.origin()
        except ValueError as error:
            raise UsageError(f"path={masked_text(path)!r}: expected a path or a whole URL; {error}.") from error
        target = _Target(url, url.origin() == self._origin, masked(url.origin()))
        if len(self._targets) < KNOWN_PATHS:
            self._targets[path] = target
        return target

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None or self._closed:
            state = "has been closed" if self._closed else "is not open yet"
            raise ClosedError(f"this HttpClient {state}. Use it inside `async with HttpClient(...) as api:`.")
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoop(
                "this HttpClient was opened on another event loop, to which its connections belong. "
                "Open one on each loop, and use it only there."
            )
        return self._session


def _checked_base(base_url: str) -> URL:
    try:
        url = URL(base_url)
    except (TypeError, ValueError):
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(
            f"base_url={masked_text(str(base_url))!r}: expected an address with scheme and host. "
            f"Write HttpClient('https://host/path')."
        )
    if url.query_string or url.fragment:
        raise UsageError(
            f"base_url={masked(url)}: has a query or a fragment. Give the query with each request: params=."
        )
    return url


def _renewable(auth: Headers | FetchHeaders | None) -> RenewableAuth | None:
    if auth is None or isinstance(auth, Mapping):
        return None
    if not is_async(auth):
        raise UsageError(f"auth={auth!r}: expected a mapping of headers, or an async function that returns one.")
    return RenewableAuth(auth)


def _user_info(base: URL) -> Headers:
    return {} if base.user is None else {"Authorization": aiohttp.encode_basic_auth(base.user, base.password or "")}


def _check_connector(connector: aiohttp.BaseConnector, limit: int) -> None:
    if connector.closed:
        raise ClosedError("the connector= has been closed. Make a new one for each client, or leave it out.")
    if connector._loop is not asyncio.get_running_loop():  # private, and there is no public way to find out in time
        raise WrongLoop("the connector= belongs to another event loop. Make it inside this one.")
    for name, bound in (("limit", connector.limit), ("limit_per_host", getattr(connector, "limit_per_host", 0))):
        if 0 < bound < limit:
            raise UsageError(
                f"the connector's {name}={bound} is below the client's limit={limit}: requests would wait inside "
                f"aiohttp, on the clock of their timeout. Make it at least {limit}, or 0."
            )


def _descriptors(limit: int) -> int:
    """Connections that this process may have open, which must be `limit` at least."""
    try:
        import resource
    except ImportError:  # Windows has no such limit on sockets
        return sys.maxsize
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    if limit > max(1, soft - SPARE_DESCRIPTORS):
        raise UsageError(
            f"limit={limit}: this process may open {soft} files, {SPARE_DESCRIPTORS} of them kept for other uses. "
            f"Lower limit=, or raise the process's limit (`ulimit -n`)."
        )
    return max(1, soft - SPARE_DESCRIPTORS)


def _encoded(json: Any, data: Body) -> tuple[bytes | None, str | None]:
    """The body as bytes, which can be sent again, and its content type."""
    if json is not None:
        if data is not None:
            raise UsageError("found both json= and data=, expected one body.")
        try:
            return json_module.dumps(json).encode(), "application/json"
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"json={type(json).__name__}: cannot be written as JSON: {error}.") from error
    if data is None or isinstance(data, bytes):
        return data, None
    if isinstance(data, str):
        return data.encode(), "text/plain; charset=utf-8"
    if isinstance(data, Mapping):
        return urlencode(data).encode(), "application/x-www-form-urlencoded"
    raise UsageError(
        f"data={type(data).__name__}: expected bytes, text or a mapping. A retry must be able to send it again, "
        f"so a stream or a file has to be read first."
    )


def _with_query(url: URL, params: Params) -> URL:
    try:
        return url.extend_query(params)
    except (TypeError, ValueError) as error:
        raise UsageError(f"params={type(params).__name__}: cannot be written as a query: {error}.") from error


def _without(headers: Headers, names: AbstractSet[str]) -> Headers:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in names)
