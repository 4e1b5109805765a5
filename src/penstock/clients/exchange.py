"""One HTTP request as a round trip that the gate can attempt: sending, reading, and what each failure means.

The only module that turns aiohttp's exceptions into penstock's.
"""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from penstock import clock
from penstock.clients.auth import RenewableAuth
from penstock.clients.response import BODY_START_BYTES, JsonLoads, Response, masked
from penstock.errors import (
    AttemptTimeout,
    BodyTooLarge,
    ClosedError,
    ConnectionFailed,
    ConnectTimeout,
    HttpStatusError,
    RoundTripError,
    UsageError,
)
from penstock.gate.round_trip import RoundTrip
from penstock.gate.server_hints import hints_of
from penstock.outcome import FailureKind, classify, provably_unsent
from penstock.permits import Weight

IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"})
"""RFC 9110 9.2.2."""
ERROR_BODY_BYTES = 65_536
"""Read of a body that goes with an error, so that its connection can be used again. Arbitrary, because: a longer one
costs more than a new connection."""

ERROR_BODY_TIMEOUT = 1.0
"""Seconds for it. Arbitrary, because: a status that asks for a pause must be heard while the attempt has time."""

LONGEST_REASON = 200
"""Characters. aiohttp quotes what it cannot parse, all of it."""
NO_BODY = frozenset({204, 304})
"""RFC 9112 6.3; a 304 may announce the length of what it does not send."""

_SHOWING_URLS = (aiohttp.ClientResponseError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)
"""Their text holds the whole URL, secrets and all: it is neither quoted nor chained."""


class Settings(Protocol):
    """What an exchange needs of its client."""

    timeout: float | None
    max_body_bytes: int
    json_loads: JsonLoads


class TimedResponse(aiohttp.ClientResponse):
    """Knows how long the service took: from the moment in which the request had its connection to the headers.

    Neither the opening of a connection nor the reading of a body is in it, which say nothing about how busy the service
    is. aiohttp's trace signals tell the same, at the price of a dozen coroutine calls for each request.
    """

    rtt: float | None = None

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """As aiohttp's, with an eye on the clock."""
        started = clock.now()
        await super().start(connection)
        self.rtt = clock.now() - started
        return self


class StreamedResponse:
    """An answer whose body is read in pieces; it holds its permit and its connection until its block is left."""

    def __init__(self, response: aiohttp.ClientResponse, exchange: "Exchange[StreamedResponse]") -> None:
        self._response = response
        self._exchange = exchange
        self.status = response.status
        self.headers = response.headers
        self.url = str(response.url)
        """Where the answer comes from, after redirects."""
        self.attempts = exchange.attempts
        """Requests sent until the headers arrived, as in `Response`; a body that breaks off is not asked for again."""

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """The body, piece by piece, as it arrives.

        Raises:
            ConnectionFailed: the body broke off.
            AttemptTimeout: the next piece did not come within the client's `timeout`.
        """
        while piece := await self._next_piece():
            yield piece

    async def _next_piece(self) -> bytes:
        timeout = self._exchange.settings.timeout
        try:
            async with asyncio.timeout(timeout):
                return await self._response.content.readany()
        except aiohttp.ClientError as error:
            raise self._exchange.translated(error) from error
        except TimeoutError as error:
            raise AttemptTimeout(f"{self._exchange}: nothing more of the body within {timeout} s") from error

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""
        self._response.close()


A = TypeVar("A", Response, StreamedResponse)


class Exchange(RoundTrip[A], Generic[A]):
    """A request that can be sent any number of times."""

    __slots__ = (
        "attempts", "auth", "body", "generation", "idempotent", "key", "method", "sent_headers", "session",
        "settings", "url", "weight",
    )  # fmt: skip

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: Settings,
        method: str,
        url: URL,
        sent_headers: Mapping[str, str],
        body: bytes | None,
        auth: RenewableAuth | None,
        idempotent: bool,
        key: Hashable,
        weight: Weight,
    ) -> None:
        self.session = session
        self.settings = settings
        self.method = method
        self.url = url
        self.sent_headers = sent_headers
        self.body = body
        self.auth = auth
        self.idempotent = idempotent
        self.key = key
        """The service key, by which the gate chooses a queue."""
        self.weight = weight
        self.attempts = 0
        self.generation = 0
        """Which generation of the auth headers the last attempt was sent with."""

    def __str__(self) -> str:
        return f"{self.method} {masked(self.url)}"

    @abstractmethod
    async def attempt(self) -> A:
        """Send it once."""

    @abstractmethod
    def discard(self, answer: A, /) -> None:
        """Let go of an answer that is not the final one."""

    def repeatable(self, error: Exception) -> bool:
        """Whether sending it again cannot repeat its effect: safe by itself, never sent, or refused unread."""
        return self.idempotent or provably_unsent(error) or classify(error) is FailureKind.THROTTLED

    async def send(self) -> aiohttp.ClientResponse:
        """Send it and return the answer with its body unread, once its status is known to be below 400."""
        if self.session.closed:
            raise ClosedError(f"{self}: this HttpClient was closed before it could be sent.")
        self.attempts += 1
        headers = self.sent_headers
        if self.auth is not None and self.auth.headers is not None:
            self.generation = self.auth.generation
            headers = CIMultiDict(headers)
            headers.update(self.auth.headers)
        try:
            response = await self.session.request(
                self.method, self.url, headers=headers, data=self.body, allow_redirects=False
            )
        except aiohttp.ClientError as error:
            raise self.translated(error) from (None if isinstance(error, _SHOWING_URLS) else error)
        except (ValueError, TypeError) as error:  # a header or a host that cannot be written
            raise UsageError(f"{self}: aiohttp refuses this request: {error}") from error
        self.rtt = getattr(response, "rtt", None)  # a stand-in for aiohttp in somebody's test has none
        self.headers = response.headers
        if response.status >= 400:
            raise await self._refusal(response)
        return response

    async def _refusal(self, response: aiohttp.ClientResponse) -> HttpStatusError:
        body = b""  # the status is the news: that its body breaks off, or does not come, changes nothing
        with suppress(ConnectionFailed, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_TIMEOUT):
                body = await self.read(response, ERROR_BODY_BYTES) or b""
        hints = hints_of(response.headers, now=clock.wall())
        retry_after = None if hints is None else hints.pause(response.status)
        return HttpStatusError(response.status, self.method, masked(self.url), body[:BODY_START_BYTES], retry_after)

    async def read(self, response: aiohttp.ClientResponse, max_bytes: int) -> bytes | None:
        """The whole body; None, with the connection closed, if it is longer than `max_bytes`."""
        try:
            length = response.content_length
            if length is not None and "Content-Encoding" not in response.headers:
                if length <= max_bytes or self.method == "HEAD" or response.status in NO_BODY:
                    return await response.read()
                response.close()
                return None
            return await _read_at_most(response, max_bytes)
        except aiohttp.ClientError as error:
            response.close()
            raise self.translated(error) from error
        except BaseException:
            response.close()
            raise

    def translated(self, error: aiohttp.ClientError) -> Exception:
        """aiohttp's exception as one of ours, to be raised from it."""
        if isinstance(error, aiohttp.InvalidURL):
            return UsageError(f"{self}: aiohttp refuses this URL ({type(error).__name__}).")
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return ConnectTimeout(self.method, masked(self.url), "no connection in time", False)
        if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError):
            return ConnectionFailed(
                self.method, masked(self.url), _told(error), not isinstance(error, aiohttp.ClientConnectorError)
            )
        return RoundTripError(f"{self} -> {_told(error)}")


class WholeExchange(Exchange[Response]):
    """A request whose answer is read fully."""

    __slots__ = ()

    async def attempt(self) -> Response:
        """Send it and read the answer.

        Raises:
            HttpStatusError: the status is 400 or more.
            BodyTooLarge: the body is longer than allowed.
            ConnectionFailed: no complete answer arrived.
        """
        started = clock.now()
        response = await self.send()
        body = await self.read(response, self.settings.max_body_bytes)
        if body is None:
            raise BodyTooLarge(self.method, masked(self.url), self.settings.max_body_bytes)
        return Response(
            response.status, response.headers, body, self.attempts, clock.now() - started,
            self.method, self.url, self.settings.json_loads,
        )  # fmt: skip

    def discard(self, answer: Response, /) -> None:
        """Nothing is held: the answer has been read."""


class StreamedExchange(Exchange[StreamedResponse]):
    """A request whose answer is read in pieces by the caller; attempted until its headers have arrived."""

    __slots__ = ()

    async def attempt(self) -> StreamedResponse:
        """Send it; the body stays unread.

        Raises:
            HttpStatusError: the status is 400 or more.
            ConnectionFailed: no answer arrived.
        """
        return StreamedResponse(await self.send(), self)

    def discard(self, answer: StreamedResponse, /) -> None:
        """Let the connection go, with what was not read."""
        answer.close()


def _told(error: aiohttp.ClientError) -> str:
    name = type(error).__name__
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{name}: {' '.join(error.message.split())[:LONGEST_REASON]}"
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
        return f"{type(error.os_error).__name__}: {error.os_error}"  # aiohttp's own text talks of SSL in any case
    return name if isinstance(error, _SHOWING_URLS) else f"{name}: {error}"


async def _read_at_most(response: aiohttp.ClientResponse, max_bytes: int) -> bytes | None:
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in response.content.iter_any():
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            response.close()
            return None
        chunks.append(chunk)
    return b"".join(chunks)
