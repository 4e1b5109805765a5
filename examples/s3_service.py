"""An object store that speaks S3 to boto3, with seeded faults, for the examples and the tests.

As a program it prints its URL as the first line and serves until SIGINT or SIGTERM:

    python examples/s3_service.py --port 9000 --latency 0.02 --slow-downs 0.01 --errors 0.01 --drops 0.002

As a module it gives `make_app(config)` for a loop of your own, and `EmbeddedS3`, which runs it in a process of its own.

    PUT, HEAD              /bucket         CreateBucket, HeadBucket
    GET                    /bucket?list-type=2&prefix=...&max-keys=...&continuation-token=...   ListObjectsV2
    PUT, GET, HEAD, DELETE /bucket/key     whole objects with content type, content encoding and x-amz-meta-* headers
    GET                    /stats          what the service has seen so far; never faulty, never counted

Buckets stand in the path, as boto3 writes them for an endpoint that is an IP address. Bodies may come as they are,
after `Expect: 100-continue`, or in the pieces of `aws-chunked` with a checksum behind them; a CRC32 that comes along is
checked and kept. **Signatures are not checked**: any credentials do. All is kept in memory: it takes what is put.

Which request fails, and how, depends on the seed, the operation, what it is about and how many times that was asked:
not on the order of arrival. A request that fails has had no effect.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import io
import itertools
import logging
import math
import os
import signal
import struct
import sys
import threading
import time
import weakref
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, fields
from email.utils import formatdate
from hashlib import blake2b, md5
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import quote, unquote
from xml.etree import ElementTree

from aiohttp import web
from multidict import CIMultiDict

from service import BACKLOG, SHUTDOWN_GRACE, EmbeddedService, Gauge, end_with_parent, setting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MOST_KEYS = 1000
"""In one page of a listing, as S3."""
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
BUCKET_OPERATIONS = {"PUT": "CreateBucket", "HEAD": "HeadBucket"}
OBJECT_OPERATIONS = {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
LIST_PARAMETERS = {
    "list-type",
    "prefix",
    "max-keys",
    "continuation-token",
    "start-after",
    "encoding-type",
    "fetch-owner",
}
MESSAGES = {
    "BadDigest": (400, "The checksum you specified did not match what we received."),
    "EntityTooLarge": (400, "Your proposed upload exceeds the maximum allowed object size."),
    "IncompleteBody": (400, "The body is not what its aws-chunked encoding says it is."),
    "InvalidArgument": (400, "An argument is invalid."),
    "NoSuchBucket": (404, "The specified bucket does not exist."),
    "NoSuchKey": (404, "The specified key does not exist."),
    "BucketAlreadyOwnedByYou": (409, "The bucket you tried to create already exists, and you own it."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "NotImplemented": (501, "This example implements a small part of S3, and not this."),
    "SlowDown": (503, "Please reduce your request rate."),
}


CREDENTIALS = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
"""boto3 wants some before it sends anything; they are not checked."""


@dataclass(frozen=True)
class S3Config:
    """All settings of the service; picklable. Each has a flag of the same name on the command line."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(0, "port to listen on; 0: any free one")
    seed: int = setting(0, "decides every fault and every latency")
    latency: float = setting(0.010, "seconds that an answer takes on average")
    jitter: float = setting(0.2, "latency is uniform within this share of itself, either way")
    slow_downs: float = setting(0.0, "share of requests answered 503 SlowDown")
    retry_after: float = setting(0.0, "seconds that a 503 asks to wait; 0: no Retry-After header")
    errors: float = setting(0.0, "share of requests answered 500 InternalError")
    drops: float = setting(0.0, "share of requests whose connection is dropped before any answer")
    largest_bytes: int = setting(64 * 1024 * 1024, "bodies that are longer are refused")
    hang: str = setting("", "key whose requests get no answer; empty: none")
    hangs: int = setting(0, "how many of its requests get none, the first ones; 0: all")

    def __post_init__(self) -> None:
        for name in ("jitter", "slow_downs", "errors", "drops"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, not {getattr(self, name)}")
        for name in ("latency", "retry_after", "hangs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} cannot be {getattr(self, name)}")
        if self.largest_bytes < 1:  # 0 is no limit, for aiohttp
            raise ValueError(f"largest_bytes cannot be {self.largest_bytes}")
        if self.slow_downs + self.errors + self.drops > 1:
            raise ValueError("slow_downs, errors and drops are at most 1 together")

    def as_flags(self) -> list[str]:
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]


class Fate(NamedTuple):
    """What is going to happen to one request."""

    latency: float
    ending: Literal["answer", "SlowDown", "InternalError", "drop"]


def fate_of(config: S3Config, operation: str, about: str, nth: int) -> Fate:
    """Decide what happens the nth time, from 0, that an operation is asked for a bucket, a key or a page."""
    seed = f"{config.seed} {operation} {nth} {about}".encode("utf-8", "surrogatepass")
    slowness, failure = (draw / 2**32 for draw in struct.unpack("<2I", blake2b(seed, digest_size=8).digest()))
    latency = config.latency * (1 + config.jitter * (2 * slowness - 1))
    if failure < config.drops:
        return Fate(latency, "drop")
    if failure < config.drops + config.slow_downs:
        return Fate(latency, "SlowDown")
    if failure < config.drops + config.slow_downs + config.errors:
        return Fate(latency, "InternalError")
    return Fate(latency, "answer")


class S3Error(Exception):
    """A refusal, by its code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code
        self.status, self.message = MESSAGES[code]


# --- what is put ---


class Upload(NamedTuple):
    """A body, and the CRC32 that came with it."""

    body: bytes
    crc32: str | None


async def upload_of(request: web.Request) -> Upload:
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise S3Error("EntityTooLarge") from None
    headers: Mapping[str, str] = request.headers
    crc32 = headers.get("x-amz-checksum-crc32")
    if headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
        body, trailers = unchunked(body)
        crc32 = trailers.get("x-amz-checksum-crc32", crc32)
        if headers.get("x-amz-decoded-content-length", str(len(body))) != str(len(body)):
            raise S3Error("IncompleteBody")
    if crc32 is not None and crc32 != crc32_of(body):
        raise S3Error("BadDigest")
    return Upload(body, crc32)


def unchunked(encoded: bytes) -> tuple[bytes, dict[str, str]]:
    """Decode `aws-chunked`: "size in hex[;extension] CRLF bytes CRLF" again and again, size 0, then trailers.

    Raises:
        S3Error: IncompleteBody.
    """
    stream = io.BytesIO(encoded)
    pieces = []
    while size := _size(stream.readline()):
        piece = stream.read(size)
        if len(piece) != size or stream.read(2) != b"\r\n":
            raise S3Error("IncompleteBody")
        pieces.append(piece)
    trailers = (line.decode("latin-1").partition(":") for line in stream.read().split(b"\r\n"))
    return b"".join(pieces), {name.strip().lower(): value.strip() for name, _, value in trailers if name}


def _size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise S3Error("IncompleteBody") from None


def crc32_of(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


class StoredObject(NamedTuple):
    """What a key stands for."""

    body: bytes
    headers: dict[str, str]
    etag: str
    crc32: str | None
    modified: float


def stored(upload: Upload, headers: Mapping[str, str]) -> StoredObject:
    kept = {name: value for name, value in headers.items() if name.lower().startswith("x-amz-meta-")}
    kept["Content-Type"] = headers.get("Content-Type", "binary/octet-stream")
    encodings = [part.strip() for part in headers.get("Content-Encoding", "").split(",")]
    if encoding := ",".join(part for part in encodings if part not in ("", "aws-chunked")):
        kept["Content-Encoding"] = encoding
    etag = f'"{md5(upload.body, usedforsecurity=False).hexdigest()}"'
    return StoredObject(upload.body, kept, etag, upload.crc32, time.time())


class Bucket:
    """Objects by key, and their order, which is made when a listing needs it."""

    def __init__(self) -> None:
        self.objects: dict[str, StoredObject] = {}
        self._order: list[str] | None = None

    def put(self, key: str, new: StoredObject) -> None:
        if key not in self.objects:
            self._order = None
        self.objects[key] = new

    def delete(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            self._order = None

    def page(self, prefix: str, after: str, most: int) -> tuple[list[str], bool]:
        """At most `most` keys behind `after` that begin with the prefix, and whether there are more."""
        if self._order is None:
            self._order = sorted(self.objects)  # by code point, which is S3's order of UTF-8 bytes
        start = max(bisect.bisect_left(self._order, prefix), bisect.bisect_right(self._order, after) if after else 0)
        found = [key for key in itertools.islice(self._order, start, start + most + 1) if key.startswith(prefix)]
        return found[:most], 0 < most < len(found)


# --- the service ---


class S3Service:
    """The operations, their faults and their counts."""

    def __init__(self, config: S3Config) -> None:
        self._config = config
        self._buckets: dict[str, Bucket] = {}
        self._asked: Counter[tuple[str, str]] = Counter()
        self._hangs = 0
        self._stopping = asyncio.Event()
        self._numbers = itertools.count(1)
        self._requests: Counter[str] = Counter()
        self._replies: Counter[int] = Counter()
        self._seen: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._connections = 0
        self._in_flight = Gauge()
        self._dropped = 0
        self._hung_up = 0

    def statistics(self) -> dict[str, Any]:
        objects = [one for bucket in self._buckets.values() for one in bucket.objects.values()]
        return {
            "requests": dict(self._requests),
            "replies": {str(status): count for status, count in sorted(self._replies.items())},
            "dropped": self._dropped,
            "hung_up": self._hung_up,
            "in_flight": self._in_flight.now,
            "peak_in_flight": self._in_flight.peak,
            "connections": self._connections,
            "objects": len(objects),
            "stored_bytes": sum(len(one.body) for one in objects),
            "cpu_seconds": time.process_time(),
        }

    async def stop(self, _: web.Application) -> None:
        """Let go of the requests that hang."""
        self._stopping.set()

    async def handle(self, request: web.Request) -> web.Response:
        # Not request.path: a key may hold dots and slashes that must not be tidied up.
        path = request.raw_path.partition("?")[0]
        bucket, _, key = (unquote(part) for part in path[1:].partition("/"))
        if request.method == "GET" and (bucket, key, request.query_string) == ("stats", "", ""):
            return web.json_response(self.statistics())
        operation = operation_of(request, key)
        self._count(request, operation)
        try:
            with self._in_flight:
                response = await self._respond(request, operation, bucket, key)
        except asyncio.CancelledError:
            self._hung_up += 1
            raise
        except ConnectionError:
            response = None
        return self._finished(request.transport, response)

    def _count(self, request: web.Request, operation: str) -> None:
        self._requests[operation] += 1
        transport = request.transport
        if transport is not None and transport not in self._seen:
            self._seen.add(transport)
            self._connections += 1

    def _finished(self, transport: asyncio.Transport | None, response: web.Response | None) -> web.Response:
        if transport is None or transport.is_closing():
            self._hung_up += 1
        elif response is None:
            self._dropped += 1
            transport.abort()
        else:
            self._replies[response.status] += 1
        # aiohttp wants a response even for a dead connection; it goes nowhere.
        return web.Response() if response is None else response

    async def _respond(self, request: web.Request, operation: str, bucket: str, key: str) -> web.Response | None:
        request_id = f"{next(self._numbers):016X}"
        try:
            upload = await upload_of(request)
            ending = await self._fate(request, operation, bucket, key)
            if ending == "drop":
                return None
            if ending != "answer":
                raise S3Error(ending)
            response = self._answer(request, operation, bucket, key, upload)
        except S3Error as error:
            response = self._refusal(error, request.raw_path, request_id)
        response.headers["x-amz-request-id"] = request_id
        return response

    async def _fate(self, request: web.Request, operation: str, bucket: str, key: str) -> str:
        if key and key == self._config.hang and (not self._config.hangs or self._hangs < self._config.hangs):
            self._hangs += 1
            await self._stopping.wait()  # or until the client hangs up, which cancels this
            return "InternalError"
        about = f"{bucket}/{key}?{request.query.get('prefix', '')}?{request.query.get('continuation-token', '')}"
        nth = self._asked[operation, about]
        self._asked[operation, about] += 1
        fate = fate_of(self._config, operation, about, nth)
        await asyncio.sleep(fate.latency)
        return fate.ending

    def _answer(self, request: web.Request, operation: str, name: str, key: str, upload: Upload) -> web.Response:
        if operation == "NotImplemented":
            raise S3Error("NotImplemented")
        if operation == "CreateBucket":
            if name in self._buckets:
                raise S3Error("BucketAlreadyOwnedByYou")
            self._buckets[name] = Bucket()
            return web.Response(headers={"Location": f"/{name}"})
        bucket = self._buckets.get(name)
        if bucket is None:
            raise S3Error("NoSuchBucket")
        if operation == "HeadBucket":
            return web.Response()
        if operation == "ListObjectsV2":
            return listing(name, bucket, request.query)
        if operation == "PutObject":
            new = stored(upload, request.headers)
            bucket.put(key, new)
            return web.Response(headers={"ETag": new.etag})
        if operation == "DeleteObject":
            bucket.delete(key)
            return web.Response(status=204)
        if key not in bucket.objects:
            raise S3Error("NoSuchKey")
        return whole(bucket.objects[key], with_checksum=request.headers.get("x-amz-checksum-mode") == "ENABLED")

    def _refusal(self, error: S3Error, resource: str, request_id: str) -> web.Response:
        document = ElementTree.Element("Error")
        texts = {"Code": error.code, "Message": error.message, "Resource": resource, "RequestId": request_id}
        add_texts(document, texts)
        response = xml_response(error.status, document)
        if error.code == "SlowDown" and self._config.retry_after:
            # RFC 9110 knows whole seconds only; rounded down, the client would come back too early.
            response.headers["Retry-After"] = str(math.ceil(self._config.retry_after))
        return response


def operation_of(request: web.Request, key: str) -> str:
    """The name of what is asked for; "NotImplemented" where it is not offered here."""
    asked = set(request.query) - {"x-id"}  # by which boto3 tells the operation to people who read logs
    if not key:
        if request.method == "GET" and request.query.get("list-type") == "2" and asked <= LIST_PARAMETERS:
            return "ListObjectsV2"
        return "NotImplemented" if asked else BUCKET_OPERATIONS.get(request.method, "NotImplemented")
    if asked or "x-amz-copy-source" in request.headers:
        return "NotImplemented"
    return OBJECT_OPERATIONS.get(request.method, "NotImplemented")


def whole(found: StoredObject, *, with_checksum: bool) -> web.Response:
    headers = CIMultiDict(found.headers)
    headers["ETag"] = found.etag
    headers["Last-Modified"] = formatdate(found.modified, usegmt=True)
    if with_checksum and found.crc32 is not None:
        headers["x-amz-checksum-crc32"] = found.crc32
        headers["x-amz-checksum-type"] = "FULL_OBJECT"
    return web.Response(body=found.body, headers=headers)


def listing(name: str, bucket: Bucket, query: Mapping[str, str]) -> web.Response:
    try:
        most = min(int(query.get("max-keys", MOST_KEYS)), MOST_KEYS)
        token = query.get("continuation-token", "")
        after = base64.urlsafe_b64decode(token).decode() if token else query.get("start-after", "")
    except ValueError:
        raise S3Error("InvalidArgument") from None
    if most < 0:
        raise S3Error("InvalidArgument")
    in_url = query.get("encoding-type") == "url"
    prefix = query.get("prefix", "")
    keys, more = bucket.page(prefix, after, most)
    document = ElementTree.Element("ListBucketResult", xmlns=NAMESPACE)
    texts = {"Name": name, "Prefix": _written(prefix, in_url), "KeyCount": len(keys), "MaxKeys": most}
    add_texts(document, texts | {"IsTruncated": str(more).lower()})
    if in_url:
        add_texts(document, {"EncodingType": "url"})
    if token:
        add_texts(document, {"ContinuationToken": token})
    if more:
        add_texts(document, {"NextContinuationToken": base64.urlsafe_b64encode(keys[-1].encode()).decode()})
    for key in keys:
        found = bucket.objects[key]
        modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.modified))
        texts = {"Key": _written(key, in_url), "LastModified": modified, "ETag": found.etag, "Size": len(found.body)}
        add_texts(ElementTree.SubElement(document, "Contents"), texts | {"StorageClass": "STANDARD"})
    return xml_response(200, document)


def _written(key: str, in_url: bool) -> str:
    return quote(key, safe="/") if in_url else key


def add_texts(element: ElementTree.Element, texts: Mapping[str, object]) -> None:
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = str(text)


def xml_response(status: int, document: ElementTree.Element) -> web.Response:
    body = ElementTree.tostring(document, encoding="utf-8", xml_declaration=True)
    return web.Response(status=status, body=body, content_type="application/xml")


def make_app(config: S3Config) -> web.Application:
    """The service for a loop of your own: serve it with `auto_decompress=False`, since what is put must stay as it is,
    and with `handler_cancellation=True`, which ends requests that hang when their client hangs up."""
    service = S3Service(config)
    app = web.Application(client_max_size=config.largest_bytes)
    app.router.add_route("*", r"/{path:[\s\S]*}", service.handle)  # a key may hold line ends, which a dot is not
    app.on_shutdown.append(service.stop)
    return app


async def serve(config: S3Config, stop: asyncio.Event, started: Callable[[str], object]) -> None:
    """Serve until `stop` is set; `started` is called with the URL once connections are accepted."""
    runner = web.AppRunner(
        make_app(config),
        access_log=None,
        handle_signals=False,
        shutdown_timeout=SHUTDOWN_GRACE,
        auto_decompress=False,
        handler_cancellation=True,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port, backlog=BACKLOG).start()
        started(f"http://{config.host}:{runner.addresses[0][1]}")
        await stop.wait()
    finally:
        await runner.cleanup()


class EmbeddedS3(EmbeddedService):
    """The service in a process of its own, for as long as the `with` block lasts.

    with EmbeddedS3(S3Config(slow_downs=0.1)) as service:
        ... boto3.client("s3", endpoint_url=service.url, region_name="us-east-1", **CREDENTIALS) ...
    """

    PROGRAM = os.path.abspath(__file__)

    def __init__(self, config: S3Config | None = None) -> None:
        super().__init__()
        self._flags = (config or S3Config()).as_flags()


def add_s3_flags(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """Give the parser a flag for each setting of the service."""
    group = parser.add_argument_group("service")
    for each in fields(S3Config):
        if each.name not in without:
            group.add_argument(
                f"--{each.name.replace('_', '-')}",
                type=type(each.default),
                default=each.default,
                metavar=type(each.default).__name__.upper(),
                help=f"{each.metadata['help']} (default: {each.default!r})",
            )


def s3_config_from(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> S3Config:
    chosen = {setting.name: getattr(flags, setting.name) for setting in fields(S3Config) if setting.name in flags}
    try:
        return S3Config(**chosen)
    except ValueError as error:
        parser.error(str(error))


async def _serve_until_signalled(config: S3Config, signals: tuple[signal.Signals, ...]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    await serve(config, stop, lambda url: print(url, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="An object store that speaks S3, with seeded faults.", allow_abbrev=False
    )
    add_s3_flags(parser)
    parser.add_argument("--embedded", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    config = s3_config_from(parser, flags)
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
