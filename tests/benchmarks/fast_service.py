"""A cheap HTTP/1.1 service to measure clients against: fixed answers, no routing, hardly any parsing.

    python tests/benchmarks/fast_service.py     prints its URL, serves until its standard input is closed

It takes a fifth of the CPU that a client takes, so that the client is what limits the run. It answers GET with a small
record and POST with some forty words, as `examples/service.py` does; requests are not pipelined.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

PROFILE = {"id": "17", "name": "Ada", "city": "Graz", "profile": {"segment": "new", "visits": 7, "since": 1994}}
SCORE = {"key": "17-0a1b2c3d4e5f", "score": 0.4711, "words": ["weir", "flume", "gate", "delta"] * 10}


def _answer(document: object) -> bytes:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


TO_GET, TO_POST = _answer(PROFILE), _answer(SCORE)


class Connection(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if end and len(body) >= _length(head):
            self._received = b""
            self._transport.write(TO_GET if head.startswith(b"GET") else TO_POST)


def _length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


@contextlib.contextmanager
def running_service() -> Iterator[str]:
    """The service in a process of its own; gives its URL."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(os.read, 0, 1)


def main() -> None:
    """Serve."""
    asyncio.run(serve())


if __name__ == "__main__":
    main()
