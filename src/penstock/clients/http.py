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
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias, TypedDict, Unpack

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from penstock import clock
from penstock.callables import is_async
from penstock.clients.auth import FetchHeaders, Headers, RenewableAuth
from penstock.clients.connector import check_connections, connector_for, most_connections
from penstock.clients.exchange import (
    IDEMPOTENT_METHODS,
    A,
    Exchange,
    Settings,
    StreamedExchange,
    StreamedResponse,
    TimedResponse,
    WholeExchange,
)
from penstock.clients.request import Body, Params, checked_base, encoded, is_ip_address, user_info, with_query, without
from penstock.clients.response import JsonLoads, Response, masked, masked_text
from penstock.errors import AttemptTimeout, ClosedError, HttpStatusError, RoundTripError, UsageError, WrongLoop
from penstock.gate.breaker import Breaker
from penstock.gate.gate import DEFAULT_BREAKER, DEFAULT_LIMIT, DEFAULT_TIMEOUT, Gate
from penstock.gate.limiter import LimitRule
from penstock.gate.rate import Rates, Weight, amounts
from penstock.gate.retry import Retry
from penstock.gate.service import KeyStatistics, Service

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Arbitrary, because: longer than an API's answer, and a hundred of them in flight still fit into memory."""
MAX_REDIRECTS = 10
"""As aiohttp."""
CONNECT_TIMEOUT = 10.0
"""Seconds for opening a connection, so that "not sent" can be told from "no answer". Arbitrary, because: three
retransmissions of a SYN (RFC 6298: 1, 2 and 4 s) fit in."""
KNOWN_PATHS = 1_024
"""Parsed URLs that are remembered. Arbitrary, because: more than a service has routes."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HARMLESS = frozenset({"accept", "accept-encoding", "accept-language", "content-type", "range", "user-agent"})
"""Headers that may follow a redirect to another origin. Any other may hold a credential, whatever its name."""


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
    weight: Weight | None


_Parts: TypeAlias = tuple[
    aiohttp.ClientSession, Settings, str, URL, Headers, bytes | None, RenewableAuth | None, bool, Hashable,
    Mapping[str, float] | None,
]  # fmt: skip


class HttpClient:
    """Talks to one service, and to where it redirects.

        async with HttpClient("http://example.com", retry=Retry(attempts=4)) as api:
            profile = await api.get_json("/api1", params={"id": 17})

    What is retried: GET, HEAD, PUT, DELETE and OPTIONS after connection trouble, time-outs and 408, 429, 502, 503, 504;
    POST and PATCH only when they were provably not sent, were answered with 429 or 503 with `Retry-After`, carry an
    `Idempotency-Key` header, or are declared `idempotent=True`.

    How many requests may be in flight is measured, for each origin, unless `limit` is a number. What a server says of
    its rates (`Retry-After`, `RateLimit`, `X-RateLimit-*` and their relatives) is obeyed for the whole origin.
    `limit`, `rate` and `breaker` can be read and set at any time.

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
        limit: requests in flight at once, for each origin: a number, or the rule by which it is measured.
        rate: requests in a time, for each origin; or several rates by name, of which a request takes its `weight`.
        retry: the policy; see `Retry`.
        breaker: when to leave an origin alone that fails; None for never.
        used: is given each `Response` that is returned, and returns what it really took of each rate, by name; see
            `Gate`.
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
        limit: int | LimitRule = DEFAULT_LIMIT,
        rate: Rates | None = None,
        retry: Retry | None = None,
        breaker: Breaker | None = DEFAULT_BREAKER,
        used: Callable[[Response], Mapping[str, float] | None] | None = None,
        key: Callable[[str, URL], Hashable] | None = None,
    ) -> None:
        base = checked_base(base_url)
        self._base = base.with_user(None)
        self._origin = self._base.origin()
        if isinstance(max_body_bytes, bool) or not isinstance(max_body_bytes, int) or max_body_bytes < 1:
            raise UsageError(f"max_body_bytes={max_body_bytes!r}: expected a whole number of at least 1.")
        self.timeout = timeout
        self.max_body_bytes = max_body_bytes
        self.json_loads = json_loads
        self._headers = CIMultiDict(user_info(base))
        self._headers.update(headers or {})
        self._headers.update(auth if isinstance(auth, Mapping) else {})
        self._auth = _renewable(auth)
        self._cookies = cookies
        self._connector = connector
        self._key = key
        self._gate = Gate(
            masked(self._origin), limit=limit, rate=rate, retry=retry, breaker=breaker, timeout=timeout,
            used=None if used is None else _of_final_answers(used),
        )  # fmt: skip
        self._targets: dict[str, _Target] = {}
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unanswered: set[asyncio.Timeout] = set()
        """Requests that are being sent; their time ends when the client is closed."""
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._session is None else "open"
        return f"<HttpClient {masked(self._base)} {state} {self._gate!r}>"

    async def __aenter__(self) -> Self:
        if self._session is not None:
            raise UsageError("this client has been opened before. Make a new HttpClient() for each `async with`.")
        self._loop = asyncio.get_running_loop()
        self._gate.bound(most_connections(self._connector))
        self._session = aiohttp.ClientSession(
            connector=connector_for(self._connector, self._gate.limit),
            response_class=TimedResponse,
            connector_owner=self._connector is None,
            cookie_jar=self._cookie_jar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
        )
        # Private, and there is no public way: aiohttp would send some requests twice without telling anybody.
        self._session._retry_connection = False
        return self

    def _cookie_jar(self) -> aiohttp.abc.AbstractCookieJar:
        if not self._cookies:
            return aiohttp.DummyCookieJar()
        # aiohttp keeps none of a server that is addressed by IP unless it is told to.
        return aiohttp.CookieJar(unsafe=is_ip_address(self._base.host))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the session and its connections. Closing twice is fine.

        Requests that have no answer yet fail by `ClosedError`, those that wait for a permit or a retry as well. The
        gate learns nothing from that.
        """
        self._closed = True
        try:
            if self._auth is not None:
                await self._auth.close()
        finally:
            now = asyncio.get_running_loop().time()
            for until_closed in self._unanswered:  # those that wait for a permit or a retry would wait in vain
                until_closed.reschedule(now)
            if self._session is not None:
                await self._session.close()

    @property
    def limit(self) -> int | LimitRule:
        """Requests in flight at once, for each origin; see `Gate.limit`."""
        return self._gate.limit

    @limit.setter
    def limit(self, limit: int | LimitRule) -> None:
        if self._session is not None and isinstance(limit, int):
            check_connections(self._connector, limit)
        self._gate.limit = limit

    @property
    def rate(self) -> Rates | None:
        """Requests in a time, for each origin; see `Gate.rate`."""
        return self._gate.rate

    @rate.setter
    def rate(self, rate: Rates | None) -> None:
        self._gate.rate = rate

    @property
    def breaker(self) -> Breaker | None:
        """When to leave an origin alone; see `Gate.breaker`."""
        return self._gate.breaker

    @breaker.setter
    def breaker(self, breaker: Breaker | None) -> None:
        self._gate.breaker = breaker

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Params = None,
        json: Any = None,
        data: Body = None,
        headers: Headers | None = None,
        idempotent: bool | None = None,
        weight: Weight | None = None,
    ) -> Response:
        """Do one round trip and return the answer, read fully.

        Args:
            method: GET, POST ...
            path: appended to `base_url`; or a whole URL, which gets the client's headers only on the same origin.
            params: the query.
            json: a body, written as JSON. None is no body; send `null` as `data=b"null"`.
            data: a body as bytes or text, or a mapping, written as a form.
            headers: for this request.
            idempotent: whether sending it twice does no harm; None goes by the method and an `Idempotency-Key` header.
            weight: what it takes of each rate: a number of requests, or amounts by name; None is one request.

        **Cancellation**: the request is given up and its connection closed. **Threads**: loop thread only.

        Raises:
            HttpStatusError: the status is 400 or more.
            BodyTooLarge: the body is longer than `max_body_bytes`.
            ConnectionFailed: no complete answer arrived.
            AttemptTimeout: no answer in time.
            ClosedError, WrongLoop: the client is not open, or was opened on another loop.
        """
        exchange = WholeExchange(*self._request(method, path, params, json, data, headers, idempotent, weight))
        response, service = await self._send(exchange)
        service.give_back()
        return response

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        params: Params = None,
        json: Any = None,
        data: Body = None,
        headers: Headers | None = None,
        idempotent: bool | None = None,
        weight: Weight | None = None,
    ) -> AsyncIterator[StreamedResponse]:
        """Do one round trip and read a large answer in pieces: `async with api.stream("GET", "/dump") as answer:`.

        It is retried until the headers have arrived. The block holds a permit and a connection. Everything else is as
        for `request`.
        """
        exchange = StreamedExchange(*self._request(method, path, params, json, data, headers, idempotent, weight))
        response, service = await self._send(exchange)
        service.leave_behind()  # the attempt is over, and takes no probe's place
        try:
            yield response
        finally:
            response.close()
            service.come_back()

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
        params: Params,
        json: Any,
        data: Body,
        headers: Headers | None,
        idempotent: bool | None,
        weight: Weight | None,
    ) -> _Parts:
        """Everything that an exchange is made of."""
        session = self._opened()
        method = method.upper()
        target = self._targets.get(path) or self._resolve(path)
        body, content_type = encoded(json, data)
        sent = CIMultiDict(self._headers if target.at_home else ())
        if content_type is not None:
            sent["Content-Type"] = content_type
        if headers:
            sent.update(headers)
        if idempotent is None:
            idempotent = method in IDEMPOTENT_METHODS or "Idempotency-Key" in sent
        url = with_query(target.url, params) if params else target.url
        key = target.origin if self._key is None else self._key(method, url)
        auth = self._auth if target.at_home else None
        return session, self, method, url, sent, body, auth, idempotent, key, amounts(weight)

    async def _send(self, exchange: Exchange[A]) -> tuple[A, Service]:
        """Send until there is a final answer, or the client is closed; the permit of the answer is still held."""
        try:
            async with asyncio.timeout(None) as until_closed:
                self._unanswered.add(until_closed)
                try:
                    return await self._sent(exchange)
                finally:
                    self._unanswered.discard(until_closed)
        except TimeoutError as error:
            if not until_closed.expired():
                raise
            raise ClosedError(f"{exchange}: this HttpClient was closed before there was an answer.") from error

    async def _sent(self, exchange: Exchange[A]) -> tuple[A, Service]:
        asked = clock.now()
        if exchange.auth is not None:
            await self._renew(exchange, exchange.auth, 0, asked)
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
                await self._renew(exchange, exchange.auth, exchange.generation, asked)
                continue
            if not _leads_on(response):
                return response, service
            exchange.discard(response)
            service.give_back()
            redirects += 1
            if redirects > MAX_REDIRECTS:
                raise RoundTripError(f"{exchange}: redirected more than {MAX_REDIRECTS} times")
            self._redirect(exchange, response.status, response.headers["Location"])

    async def _renew(self, exchange: Exchange[Any], auth: RenewableAuth, refused: int, asked: float) -> None:
        """Have newer headers, within the time that the policy has for all of it."""
        if not auth.outdated(refused):
            return
        timeout = self._gate.retry.timeout
        try:
            async with asyncio.timeout_at(None if timeout is None else asked + timeout) as scope:
                await auth.renew()
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise AttemptTimeout(
                f"{exchange}: the function given as auth= gave no headers before the end of Retry(timeout={timeout:g})"
            ) from error

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
            exchange.sent_headers = without(exchange.sent_headers, lambda name: name == "content-type")
        if url.origin() != exchange.url.origin():
            exchange.sent_headers = without(exchange.sent_headers, lambda name: name not in _HARMLESS)
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
            raise ClosedError(
                f"this HttpClient {state}. Use it inside `async with HttpClient(...) as api:`, or in "
                f"synchronous code `with bridge.open(HttpClient(...)) as api:`."
            )
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoop(
                "this HttpClient was opened on another event loop, to which its connections belong. "
                "Open one on each loop, and use it only there."
            )
        return self._session


def _leads_on(response: Response | StreamedResponse) -> bool:
    return response.status in _REDIRECTS and "Location" in response.headers


def _of_final_answers(
    used: Callable[[Response], Mapping[str, float] | None],
) -> Callable[[Any], Mapping[str, float] | None]:
    """Ask only of what the user of the client sees as a `Response`: neither of a redirect nor of a stream."""
    return lambda answer: used(answer) if isinstance(answer, Response) and not _leads_on(answer) else None


def _renewable(auth: Headers | FetchHeaders | None) -> RenewableAuth | None:
    if auth is None or isinstance(auth, Mapping):
        return None
    if not is_async(auth):
        raise UsageError(f"auth={auth!r}: expected a mapping of headers, or an async function that returns one.")
    return RenewableAuth(auth)
