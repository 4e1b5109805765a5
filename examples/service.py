"""A real HTTP service with seeded faults, for the examples, the tests and the benchmarks.

As a program it prints its URL as the first line and serves until SIGINT or SIGTERM:

    python examples/service.py --port 8080 --latency 0.05 --errors 0.01 --drops 0.002

As a module it gives `make_app(config)` for a loop of your own, and `EmbeddedService`, which runs the service in a
process of its own so that the CPU it uses is not counted as the client's.

    GET  /api1?id=17&name=...  ->  the parameters and a "profile"
    POST /api2 with that JSON  ->  {"key": ..., "score": ..., "words": [...]}
    GET  /stats                ->  what the service has seen so far; never faulty, never counted
    GET  /calls?since=0        ->  with --log: one entry for each request about a record, in the order of arrival

Which request fails, and how, depends on the seed, the route, the record's id and how many times this route was asked
about this record: not on the order of arrival. A run can be repeated at any concurrency.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from aiohttp import web
from multidict import CIMultiDict

from records import profile_of, scored

if TYPE_CHECKING:
    from types import TracebackType

BACKLOG = 4096
SHUTDOWN_GRACE = 1.0
START_TIMEOUT = 30.0
STOP_TIMEOUT = 5.0
STATS_TIMEOUT = 10.0
DRIP_PIECES = 8

Read = Callable[[web.Request], Awaitable[dict[str, Any]]]
Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


def setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class ServiceConfig:
    """All settings of the service; picklable. Each has a flag of the same name on the command line."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(0, "port to listen on; 0: any free one")
    seed: int = setting(0, "decides every fault and every latency")
    latency: float = setting(0.050, "seconds that an answer takes on average")
    jitter: float = setting(0.2, "latency is uniform within this share of itself, either way")
    errors: float = setting(0.01, "share of requests answered 503")
    retry_after: float = setting(0.0, "seconds that a 503 asks to wait; 0: no Retry-After header")
    drops: float = setting(0.002, "share of requests whose connection is dropped before any answer")
    quota: float = setting(0.0, "requests per second; over it 429 with Retry-After; 0: no quota")
    burst: int = setting(0, "requests that the quota lets through at once; 0: one second's worth")
    quota_headers: bool = setting(False, "each answer tells what is left of the quota: RateLimit and RateLimit-Policy")
    knee: int = setting(0, "requests served at once, the rest queue; 0: no knee")
    malformed: float = setting(0.0, "share of the 200 answers whose body is not JSON")
    slow_body: float = setting(0.0, "share of the 200 answers whose body drips")
    drip: float = setting(1.0, "seconds that a dripping body takes")
    log: bool = setting(False, "keep each request in memory, to be read at /calls")

    def __post_init__(self) -> None:
        for name in ("jitter", "errors", "drops", "malformed", "slow_body"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, not {getattr(self, name)}")
        for name in ("latency", "retry_after", "quota", "burst", "knee", "drip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} cannot be {getattr(self, name)}")
        if self.errors + self.drops > 1 or self.malformed + self.slow_body > 1:
            raise ValueError("errors and drops are at most 1 together, and so are malformed and slow_body")

    def as_flags(self) -> list[str]:
        flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(self).items()}
        return [flag if value is True else f"{flag}={value}" for flag, value in flags.items() if value is not False]


Ending = Literal["answer", "error", "drop", "malformed", "slow"]


class Fate(NamedTuple):
    """What is going to happen to one request."""

    latency: float
    ending: Ending


class Call(NamedTuple):
    """One request about a record, as the log keeps it."""

    at: float
    """When it arrived, on this machine's `time.monotonic()`."""
    route: str
    record_id: str
    caller: str
    """What the client calls itself: its User-Agent."""
    ending: Ending


def fate_of(config: ServiceConfig, route: str, record_id: str, nth: int) -> Fate:
    """Decide what happens the nth time, from 0, that a route is asked about a record."""
    seed = f"{config.seed} {route} {nth} {record_id}".encode("utf-8", "surrogatepass")
    digest = blake2b(seed, digest_size=12).digest()
    slowness, failure, flaw = (draw / 2**32 for draw in struct.unpack("<3I", digest))
    # Each cause has a draw of its own: more errors must not change which answers are slow or malformed.
    latency = config.latency * (1 + config.jitter * (2 * slowness - 1))
    if failure < config.drops:
        return Fate(latency, "drop")
    if failure < config.drops + config.errors:
        return Fate(latency, "error")
    if flaw < config.malformed:
        return Fate(latency, "malformed")
    if flaw < config.malformed + config.slow_body:
        return Fate(latency, "slow")
    return Fate(latency, "answer")


class Quota:
    """A token bucket; time is an argument."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at: float | None = None

    def take(self, now: float) -> float:
        """Take a token and return 0.0, or return the seconds until there is one."""
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate

    def headers(self, now: float) -> dict[str, str]:
        """What is left, in the words of the IETF draft on RateLimit fields (draft-ietf-httpapi-ratelimit-headers)."""
        left = self._tokens if self._at is None else min(self._burst, self._tokens + (now - self._at) * self._rate)
        window = max(1, math.ceil(self._burst / self._rate))  # the draft knows whole seconds only
        return {
            "RateLimit-Policy": f'"default";q={self._rate * window:.0f};w={window}',
            "RateLimit": f'"default";r={int(left)};t={math.ceil((self._burst - left) / self._rate)}',
        }


class Gauge:
    """How many are inside now, and how many were at most."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def __enter__(self) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)

    def __exit__(self, *_: object) -> None:
        self.now -= 1


class BadRecord(Exception):
    """The request carries no usable record: 400."""


async def from_query(request: web.Request) -> dict[str, Any]:
    record = dict(request.query)
    if "id" not in record:
        raise BadRecord("parameter 'id' is missing")
    return record


async def from_body(request: web.Request) -> dict[str, Any]:
    try:
        record = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise BadRecord("the body is not JSON") from None
    except web.HTTPRequestEntityTooLarge:
        raise BadRecord("the body is too large") from None
    if not isinstance(record, dict) or "id" not in record:
        raise BadRecord("the body is not a record with an 'id'")
    # A client that mixes up its records is told so here, rather than getting a plausible key.
    if record.get("profile") != profile_of(record):
        raise BadRecord("the profile does not belong to the record")
    return record


def with_profile(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "profile": profile_of(record)}


class Service:
    """The routes, their faults and their counts."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._quota = Quota(config.quota, config.burst or max(1.0, config.quota)) if config.quota else None
        self._knee = asyncio.Semaphore(config.knee) if config.knee else contextlib.nullcontext()
        self._asked: dict[str, Counter[str]] = {"/api1": Counter(), "/api2": Counter()}
        self._log: list[Call] | None = [] if config.log else None
        self._requests = Counter({"/api1": 0, "/api2": 0})
        self._replies: Counter[int] = Counter()
        self._in_flight = Gauge()
        self._serving = Gauge()
        self._dropped = 0
        self._hung_up = 0

    async def api1(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, "/api1", from_query, with_profile)

    async def api2(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, "/api2", from_body, scored)

    async def stats(self, _: web.Request) -> web.Response:
        return _reply(200, self.statistics())

    async def calls(self, request: web.Request) -> web.Response:
        if self._log is None:
            return _reply(404, {"error": "no log is kept: start the service with --log"})
        return _reply(200, self._log[int(request.query.get("since", "0")) :])

    async def tell_quota(self, request: web.Request, response: web.StreamResponse) -> None:
        if self._config.quota_headers and self._quota and request.path in self._requests:
            response.headers.update(self._quota.headers(time.monotonic()))

    def statistics(self) -> dict[str, Any]:
        return {
            "requests": dict(self._requests),
            "replies": {str(status): count for status, count in sorted(self._replies.items())},
            "dropped": self._dropped,
            "hung_up": self._hung_up,
            "in_flight": self._in_flight.now,
            "peak_in_flight": self._in_flight.peak,
            "serving": self._serving.now,
            "peak_serving": self._serving.peak,
            "cpu_seconds": time.process_time(),
        }

    async def _handle(self, request: web.Request, route: str, read: Read, answer: Answer) -> web.StreamResponse:
        self._requests[route] += 1
        try:
            with self._in_flight:
                response = await self._respond(request, route, read, answer)
        except asyncio.CancelledError:
            self._hung_up += 1
            raise
        except ConnectionError:
            response = None
        return self._finished(request.transport, response)

    def _finished(self, transport: asyncio.Transport | None, response: web.StreamResponse | None) -> web.StreamResponse:
        if transport is None or transport.is_closing():
            self._hung_up += 1
        elif response is None:
            self._dropped += 1
            transport.abort()
        else:
            self._replies[response.status] += 1
        # aiohttp wants a response even for a dead connection; it goes nowhere.
        return web.Response() if response is None else response

    async def _respond(self, request: web.Request, route: str, read: Read, answer: Answer) -> web.StreamResponse | None:
        # Before the record's count: which requests are over the quota depends on arrival, the faults must not.
        wait = self._quota.take(time.monotonic()) if self._quota else 0.0
        if wait:
            return _reply(429, {"error": "over the quota"}, retry_after=wait)
        try:
            record = await read(request)
        except BadRecord as error:
            return _reply(400, {"error": str(error)})
        async with self._knee:
            with self._serving:
                return await self._serve(request, self._next_fate(request, route, record), record, answer)

    def _next_fate(self, request: web.Request, route: str, record: Mapping[str, Any]) -> Fate:
        asked = self._asked[route]
        record_id = str(record["id"])
        nth = asked[record_id]
        asked[record_id] = nth + 1
        fate = fate_of(self._config, route, record_id, nth)
        if self._log is not None:
            caller = request.headers.get("User-Agent", "")
            self._log.append(Call(time.monotonic(), route, record_id, caller, fate.ending))
        return fate

    async def _serve(
        self, request: web.Request, fate: Fate, record: dict[str, Any], answer: Answer
    ) -> web.StreamResponse | None:
        await asyncio.sleep(fate.latency)
        if fate.ending == "drop":
            return None
        if fate.ending == "error":
            return _reply(503, {"error": "service unavailable"}, retry_after=self._config.retry_after)
        body = json.dumps(answer(record)).encode()
        if fate.ending == "slow":
            return await self._dripped(request, body)
        if fate.ending == "malformed":
            # Cut short with a matching Content-Length: to HTTP it is whole, to JSON it is not.
            body = body[: len(body) // 2]
        return _response(200, body)

    async def _dripped(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
        size = math.ceil(len(body) / DRIP_PIECES)
        await response.prepare(request)
        await response.write(body[:size])
        for start in range(size, len(body), size):
            await asyncio.sleep(self._config.drip / (DRIP_PIECES - 1))
            await response.write(body[start : start + size])
        return response


def _reply(status: int, document: object, *, retry_after: float = 0.0) -> web.Response:
    response = _response(status, json.dumps(document).encode())
    if retry_after:
        # RFC 9110 knows whole seconds only; rounded down, the client would come back too early.
        response.headers["Retry-After"] = str(math.ceil(retry_after))
    return response


def _response(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, headers=CIMultiDict({"Content-Type": "application/json"}))


def make_app(config: ServiceConfig) -> web.Application:
    service = Service(config)
    app = web.Application()
    app.on_response_prepare.append(service.tell_quota)
    app.router.add_get("/api1", service.api1)
    app.router.add_post("/api2", service.api2)
    app.router.add_get("/stats", service.stats)
    app.router.add_get("/calls", service.calls)
    return app


async def serve(config: ServiceConfig, stop: asyncio.Event, started: Callable[[str], object]) -> None:
    """Serve until `stop` is set; `started` is called with the URL once connections are accepted."""
    runner = web.AppRunner(make_app(config), access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_GRACE)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port, backlog=BACKLOG).start()
        started(f"http://{config.host}:{runner.addresses[0][1]}")
        await stop.wait()
    finally:
        await runner.cleanup()


class EmbeddedService:
    """The service in a process of its own, for as long as the `with` block lasts.

    with EmbeddedService(ServiceConfig(latency=0.01)) as service:
        ... service.url ...
    """

    PROGRAM = os.path.abspath(__file__)

    def __init__(self, config: ServiceConfig | None = None) -> None:
        self._flags = (config or ServiceConfig()).as_flags()
        self._process: subprocess.Popen[str] | None = None
        self._url = ""

    def __enter__(self) -> Self:
        command = [sys.executable, self.PROGRAM, "--embedded", *self._flags]
        # A process group of its own: Ctrl-C in a terminal reaches the parent alone, even before the child has had the
        # time to ignore it. The child reads stdin to learn that its parent is gone.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            self._url = self._first_line()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def url(self) -> str:
        return self._url

    @property
    def pid(self) -> int:
        return self._running().pid

    def cpu_time(self) -> float:
        """CPU seconds that the service has used so far, its start included: take differences."""
        return float(self.stats()["cpu_seconds"])

    def stats(self) -> dict[str, Any]:
        """What the service has seen so far. Blocks for about a millisecond."""
        statistics: dict[str, Any] = self._asked("/stats")
        return statistics

    def calls(self, since: int = 0) -> list[Call]:
        """The log, without its first `since` entries. Needs `ServiceConfig(log=True)`. Blocks: some µs for each."""
        return [Call(*entry) for entry in self._asked(f"/calls?since={since}")]

    def _asked(self, path: str) -> Any:
        self._running()
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=STATS_TIMEOUT)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path}: {answer['error']}")
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("the service is not running: use it inside `with EmbeddedService() as service:`")
        return self._process

    def _first_line(self) -> str:
        process = self._running()
        assert process.stdout is not None
        # Killing it ends the read: a pipe has no time-out of its own.
        watchdog = threading.Timer(START_TIMEOUT, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline().strip()
        finally:
            watchdog.cancel()
        if not line:
            raise RuntimeError(f"the service did not start (exit status {process.wait(STOP_TIMEOUT)})")
        return line

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def add_service_flags(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """Give the parser a flag for each setting of the service."""
    group = parser.add_argument_group("service")
    for setting in fields(ServiceConfig):
        flag = f"--{setting.name.replace('_', '-')}"
        if setting.name in without:
            continue
        if isinstance(setting.default, bool):
            group.add_argument(flag, action="store_true", help=setting.metadata["help"])
        else:
            group.add_argument(
                flag,
                type=type(setting.default),
                default=setting.default,
                metavar=type(setting.default).__name__.upper(),
                help=f"{setting.metadata['help']} (default: {setting.default})",
            )


def config_from(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> ServiceConfig:
    chosen = {setting.name: getattr(flags, setting.name) for setting in fields(ServiceConfig) if setting.name in flags}
    try:
        return ServiceConfig(**chosen)
    except ValueError as error:
        parser.error(str(error))


def end_with_parent() -> None:
    # Not sys.stdin: a daemon thread that holds its lock aborts the interpreter's exit. Not a clean stop either: there
    # is nobody left to answer, and a busy loop must not keep the process alive.
    os.read(0, 1)
    os._exit(0)


async def _serve_until_signalled(config: ServiceConfig, signals: tuple[signal.Signals, ...]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    await serve(config, stop, lambda url: print(url, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="A real HTTP service with seeded faults.", allow_abbrev=False)
    add_service_flags(parser)
    parser.add_argument("--embedded", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    config = config_from(parser, flags)
    # Clients that hang up or talk nonsense are this service's business: it counts them and stays silent.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    ends_on: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
    if flags.embedded:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ends_on = (signal.SIGTERM,)
        threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        asyncio.run(_serve_until_signalled(config, ends_on))
    except OSError as error:
        sys.exit(f"cannot serve on {config.host}:{config.port}: {error}")


if __name__ == "__main__":
    main()
