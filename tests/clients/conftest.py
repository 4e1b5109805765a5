"""A real HTTP server on loopback, in the loop of the test: it counts what arrives and answers as told.

It is a protocol and no set of tasks, so that a program that is cancelled at every step cannot leave any of it behind.
"""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
from multidict import CIMultiDict


@dataclass(frozen=True)
class Request:
    """A request as it arrived."""

    method: str
    target: str
    headers: CIMultiDict[str]
    body: bytes
    connection: int
    """Number of its connection, from 1."""
    at: float
    transport: asyncio.Transport


Answer: TypeAlias = Callable[[Request], bytes | None]
"""The bytes to be written; None hangs up."""


class Server:
    """What a server has seen. `answer` may be exchanged at any time."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections = 0
        self.open: set[asyncio.Transport] = set()
        self.url = ""

    @property
    def seen(self) -> list[str]:
        return [f"{request.method} {request.target}" for request in self.requests]

    @property
    def times(self) -> list[float]:
        """Seconds from the first request to each."""
        return [request.at - self.requests[0].at for request in self.requests]


class _Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections += 1
        self._number = self._server.connections
        self._server.open.add(transport)

    def connection_lost(self, _: Exception | None) -> None:
        self._server.open.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (request := self._next()) is not None and not self._transport.is_closing():
            self._server.requests.append(request)
            answer = self._server.answer(request)
            if answer is None:
                self._transport.close()
            else:
                head, blank, _ = answer.partition(b"\r\n\r\n")
                self._transport.write(head + blank if request.method == "HEAD" else answer)

    def _next(self) -> Request | None:
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        headers: CIMultiDict[str] = CIMultiDict()
        for line in lines:
            name, _, value = line.partition(": ")
            headers.add(name, value)
        size_bytes = int(headers.get("Content-Length", "0"))
        if len(rest) < size_bytes:
            return None
        self._buffer = rest[size_bytes:]
        method, target, _ = first.split(" ")
        now = asyncio.get_running_loop().time()
        return Request(method, target, headers, rest[:size_bytes], self._number, now, self._transport)


class Web:
    """Servers and their answers."""

    @staticmethod
    def reply(body: bytes = b"", /, status: int = 200, **headers: str) -> bytes:
        """A whole answer, with its length."""
        return Web.head(status, Content_Length=str(len(body)), **headers) + body

    @staticmethod
    def head(status: int = 200, **headers: str) -> bytes:
        """A status line and headers; an underscore is a hyphen."""
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")

    @staticmethod
    def chunked(*chunks: bytes, **headers: str) -> bytes:
        """A whole answer in chunks, its length unknown beforehand."""
        parts = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b"")]
        return Web.head(200, Transfer_Encoding="chunked", **headers) + b"".join(parts)

    @staticmethod
    def gzipped(body: bytes) -> bytes:
        packer = zlib.compressobj(wbits=31)
        return packer.compress(body) + packer.flush()

    @staticmethod
    def script(*answers: bytes | None) -> Answer:
        """One answer after another; the last one again and again."""
        rest = list(answers)
        return lambda _: rest.pop(0) if len(rest) > 1 else rest[0]

    @staticmethod
    def later(request: Request, seconds: float, data: bytes) -> bytes:
        """Nothing now, `data` after a while."""

        def write() -> None:
            if not request.transport.is_closing():
                request.transport.write(data)

        asyncio.get_running_loop().call_later(seconds, write)
        return b""

    @staticmethod
    @asynccontextmanager
    async def serving(answer: Answer | bytes, **how: Any) -> AsyncIterator[Server]:
        server = Server(answer if callable(answer) else lambda _: answer)
        loop = asyncio.get_running_loop()
        # Served in two steps, since `create_server` forgets its socket when it is cancelled.
        # The protocol is named, or asyncio would leave Nagle's algorithm on, and a second write takes 40 ms.
        port = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        port.bind(("127.0.0.1", 0))
        listener = await loop.create_server(lambda: _Connection(server), sock=port, start_serving=False, **how)
        try:
            await listener.start_serving()
            scheme = "https" if "ssl" in how else "http"
            server.url = f"{scheme}://127.0.0.1:{port.getsockname()[1]}"
            yield server
        finally:
            try:
                for _ in range(3):  # asyncio forgets the socket of a connection that was accepted before this close
                    await asyncio.sleep(0)
            finally:
                listener.close()
                for transport in server.open:
                    transport.abort()

    @staticmethod
    def in_use(client: Any) -> int:
        """Connections that are not back in the client's pool: private, and there is no public way to see a leak."""
        return len(client._session.connector._acquired)


@pytest.fixture
def web() -> Web:
    return Web()
