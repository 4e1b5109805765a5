"""The example object store speaks S3 as boto3 does, over real HTTP, and fails as its seed says."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import pickle
import signal
import socket
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import boto3.session
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError
from botocore.httpchecksum import AwsChunkedWrapper, Crc32Checksum
from hypothesis import given
from hypothesis import strategies as st

from s3_service import CREDENTIALS, Bucket, EmbeddedS3, S3Config, S3Error, Upload, fate_of, stored, unchunked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from types_boto3_s3 import S3Client

EXAMPLES = Path(__file__).parents[2] / "examples"
BOUND = 30.0
BUCKET = "things"
QUIET = S3Config(latency=0.0)
OPTIONS: Any = {"region_name": "us-east-1", **CREDENTIALS}
ONCE: Any = {"total_max_attempts": 1, "mode": "standard"}
FAULTY = S3Config(latency=0.0, slow_downs=0.2, errors=0.2, drops=0.2, retry_after=0.5, seed=4)


@contextlib.contextmanager
def client_of(service: EmbeddedS3, **options: Any) -> Iterator[S3Client]:
    """A client that sends each request once."""
    config = Config(retries=ONCE, **options)
    session = boto3.session.Session(**OPTIONS)
    with contextlib.closing(session.client("s3", endpoint_url=service.url, config=config)) as s3:
        yield s3


@pytest.fixture(scope="module")
def service() -> Iterator[EmbeddedS3]:
    with EmbeddedS3(QUIET) as service, client_of(service) as s3:
        s3.create_bucket(Bucket=BUCKET)
        yield service


@pytest.fixture
def s3(service: EmbeddedS3) -> Iterator[S3Client]:
    with client_of(service) as client:
        yield client


def body_of(found: Any) -> bytes:
    with contextlib.closing(found["Body"]) as body:
        content: bytes = body.read()
        return content


def code_of(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


# --- objects ---


@pytest.mark.parametrize(
    "key", ["plain", "a/b//c", "../up", "blank and + and %2F", "Łódź/✓", "?query&x=1#y", "/rooted", "stats"]
)
def test_what_is_put_is_what_one_gets_under_any_key(s3: S3Client, key: str) -> None:
    """Bytes, type, metadata and ETag come back; a deleted key is gone, and may be deleted again."""
    body = key.encode() * 1000
    put = s3.put_object(Bucket=BUCKET, Key=key, Body=body, ContentType="text/x-key", Metadata={"origin": "a test"})
    assert put["ETag"] == f'"{hashlib.md5(body).hexdigest()}"'
    got = s3.get_object(Bucket=BUCKET, Key=key)
    assert body_of(got) == body
    for found in (got, s3.head_object(Bucket=BUCKET, Key=key)):
        assert found["ContentType"] == "text/x-key"
        assert found["Metadata"] == {"origin": "a test"}
        assert found["ETag"] == put["ETag"]
        assert found["ContentLength"] == len(body)
    for _ in range(2):
        s3.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(s3.exceptions.NoSuchKey):
        s3.get_object(Bucket=BUCKET, Key=key)


def test_a_compressed_body_stays_as_it_is(s3: S3Client) -> None:
    """A content encoding is the reader's affair: the store must not undo it."""
    body = gzip.compress(b"text")
    s3.put_object(Bucket=BUCKET, Key="compressed", Body=body, ContentEncoding="gzip")
    got = s3.get_object(Bucket=BUCKET, Key="compressed")
    assert (body_of(got), got["ContentEncoding"]) == (body, "gzip")


def test_boto3_checks_what_it_gets_against_the_checksum_of_what_it_put(s3: S3Client) -> None:
    """With its default settings it sends a CRC32 and asks for it."""
    s3.put_object(Bucket=BUCKET, Key="checked", Body=b"check me")
    got = s3.get_object(Bucket=BUCKET, Key="checked")
    assert got["ChecksumCRC32"] == base64.b64encode(zlib.crc32(b"check me").to_bytes(4, "big")).decode()
    assert body_of(got) == b"check me"


def test_an_object_without_a_type_has_the_one_that_s3_gives_it(service: EmbeddedS3, s3: S3Client) -> None:
    with raw(service) as connection:
        connection.putrequest("PUT", f"/{BUCKET}/untyped")
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        assert connection.getresponse().status == 200
    assert s3.head_object(Bucket=BUCKET, Key="untyped")["ContentType"] == "binary/octet-stream"


# --- bodies on the wire ---


@contextlib.contextmanager
def raw(service: EmbeddedS3) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(service.url).netloc, timeout=BOUND)) as connection:
        yield connection


def put_raw(service: EmbeddedS3, key: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    with raw(service) as connection:
        connection.request("PUT", f"/{BUCKET}/{key}", body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


def in_pieces(body: bytes, size: int = 64) -> bytes:
    """As botocore writes it for https."""
    wrapped = AwsChunkedWrapper(io.BytesIO(body), Crc32Checksum, "x-amz-checksum-crc32", size)
    encoded: bytes = wrapped.read()
    return encoded


IN_PIECES = {"Content-Encoding": "gzip,aws-chunked", "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER"}


def test_a_body_in_pieces_is_put_together_again(service: EmbeddedS3, s3: S3Client) -> None:
    """As boto3 sends it over https; the encoding of the object itself stays."""
    body = bytes(range(256)) * 3
    headers = {**IN_PIECES, "x-amz-decoded-content-length": str(len(body))}
    assert put_raw(service, "pieces", in_pieces(body), headers)[0] == 200
    got = s3.get_object(Bucket=BUCKET, Key="pieces")
    assert (body_of(got), got["ContentEncoding"]) == (body, "gzip")
    assert "ChecksumCRC32" in got


@pytest.mark.parametrize(
    ("body", "headers", "code"),
    [
        (in_pieces(b"bytes").replace(b"bytes", b"bites"), IN_PIECES, b"BadDigest"),
        (b"bites", {"x-amz-checksum-crc32": "AAAAAA=="}, b"BadDigest"),
        (in_pieces(b"bytes"), {**IN_PIECES, "x-amz-decoded-content-length": "4"}, b"IncompleteBody"),
        (b"no pieces", IN_PIECES, b"IncompleteBody"),
    ],
)
def test_a_body_that_is_not_what_it_says_is_refused(
    service: EmbeddedS3, body: bytes, headers: dict[str, str], code: bytes
) -> None:
    """A checksum that does not fit, a length that does not, pieces that are none: 400, and nothing is stored."""
    status, answer = put_raw(service, "refused", body, headers)
    assert status == 400
    assert b"<Code>" + code + b"</Code>" in answer
    with raw(service) as connection:
        connection.request("HEAD", f"/{BUCKET}/refused")
        assert connection.getresponse().status == 404


@given(body=st.binary(max_size=300), size=st.integers(1, 100))
def test_pieces_of_any_size_give_the_body_and_its_checksum(body: bytes, size: int) -> None:
    decoded, trailers = unchunked(in_pieces(body, size))
    assert decoded == body
    assert trailers == {"x-amz-checksum-crc32": base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()}


@given(body=st.binary(min_size=1, max_size=100), cut=st.integers(0, 100))
def test_pieces_that_are_cut_off_are_never_a_body(body: bytes, cut: int) -> None:
    """Half an object must not be taken for a whole one."""
    encoded = in_pieces(body, 16)
    rest = encoded[: min(cut, encoded.rindex(b"0\r\nx-amz"))]
    with pytest.raises(S3Error, match="IncompleteBody"):
        unchunked(rest)


def test_signed_pieces_are_understood() -> None:
    """The signature behind a size is left alone, as all signatures are."""
    assert unchunked(b"3;chunk-signature=0a\r\nabc\r\n0;chunk-signature=0b\r\n\r\n") == (b"abc", {})


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(service: EmbeddedS3) -> None:
    """boto3 asks before every put, and waits a second for the answer."""
    address = urlsplit(service.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=BOUND) as connection:
        head = f"PUT /{BUCKET}/asked HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        with connection.makefile("rb") as answers:
            assert answers.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert answers.readline() == b"\r\n"
            connection.sendall(b"body")
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"


def test_a_body_that_is_too_long_is_refused() -> None:
    with EmbeddedS3(S3Config(latency=0.0, largest_bytes=1000)) as service, client_of(service) as s3:
        s3.create_bucket(Bucket=BUCKET)
        s3.put_object(Bucket=BUCKET, Key="fits", Body=bytes(1000))
        with pytest.raises(ClientError) as caught:
            s3.put_object(Bucket=BUCKET, Key="long", Body=bytes(1001))
    assert code_of(caught) == "EntityTooLarge"


# --- listings ---


def listed(s3: S3Client, **options: Any) -> list[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(**options)
    return [found["Key"] for page in pages for found in page.get("Contents", [])]


def test_a_listing_gives_all_keys_of_a_prefix_page_by_page(s3: S3Client) -> None:
    """In the order of their bytes, each once, whatever the size of a page; with length and ETag."""
    s3.create_bucket(Bucket="listed")
    keys = [f"a/{number}" for number in range(7)] + ["a", "a b", "a+b", "aż", "b/1", "a/\n", "a/<&>"]
    for key in keys:
        s3.put_object(Bucket="listed", Key=key, Body=key.encode())
    for size in (1, 3, 1000):
        paging = {"PageSize": size}
        assert listed(s3, Bucket="listed", PaginationConfig=paging) == sorted(keys, key=str.encode)
        below = listed(s3, Bucket="listed", Prefix="a/", PaginationConfig=paging)
        assert below == sorted(key for key in keys if key.startswith("a/"))
    page = s3.list_objects_v2(Bucket="listed", Prefix="a", MaxKeys=2)
    assert (page["KeyCount"], page["MaxKeys"], page["IsTruncated"]) == (2, 2, True)
    assert [found["Size"] for found in page["Contents"]] == [1, 3]
    assert page["Contents"][0]["ETag"] == s3.head_object(Bucket="listed", Key="a")["ETag"]
    assert listed(s3, Bucket="listed", StartAfter="aż") == ["b/1"]
    assert listed(s3, Bucket="listed", Prefix="c") == []
    assert s3.list_objects_v2(Bucket="listed", MaxKeys=0)["IsTruncated"] is False


KEYS = st.text("ab/", max_size=4)


@given(keys=st.sets(KEYS.filter(bool)), prefix=KEYS, most=st.integers(1, 4), deleted=st.sets(KEYS))
def test_pages_put_together_are_the_whole_listing(keys: set[str], prefix: str, most: int, deleted: set[str]) -> None:
    bucket = Bucket()
    for key in keys:
        bucket.put(key, stored(Upload(b"", None), {}))
    bucket.page("", "", 1)
    for key in deleted:
        bucket.delete(key)
    found: list[str] = []
    more = True
    while more:
        page, more = bucket.page(prefix, found[-1] if found else "", most)
        assert len(page) == most or not more
        found += page
    assert found == sorted(key for key in keys - deleted if key.startswith(prefix))


# --- refusals ---


def test_what_is_not_there_or_there_already_is_told_as_s3_does(s3: S3Client) -> None:
    """With code, status and request id in XML; without a body to HEAD."""
    with pytest.raises(s3.exceptions.NoSuchKey) as missing:
        s3.get_object(Bucket=BUCKET, Key="nobody")
    assert missing.value.response["ResponseMetadata"]["HTTPStatusCode"] == 404
    assert missing.value.response["ResponseMetadata"]["RequestId"]
    with pytest.raises(s3.exceptions.NoSuchBucket):
        s3.put_object(Bucket="nobody", Key="x", Body=b"x")
    with pytest.raises(s3.exceptions.BucketAlreadyOwnedByYou):
        s3.create_bucket(Bucket=BUCKET)
    s3.head_bucket(Bucket=BUCKET)
    with pytest.raises(ClientError) as caught:
        s3.head_bucket(Bucket="nobody")
    assert code_of(caught) == "404"


def test_what_is_not_offered_is_refused_and_not_half_done(s3: S3Client) -> None:
    """Uploads in parts, copies, tags, versions, deleting buckets: 501, so that nobody takes silence for success."""
    s3.put_object(Bucket=BUCKET, Key="x", Body=b"x")
    calls: tuple[Callable[[], object], ...] = (
        lambda: s3.create_multipart_upload(Bucket=BUCKET, Key="x"),
        lambda: s3.copy_object(Bucket=BUCKET, Key="y", CopySource=f"{BUCKET}/x"),
        lambda: s3.get_object_tagging(Bucket=BUCKET, Key="x"),
        lambda: s3.list_objects_v2(Bucket=BUCKET, Delimiter="/"),
        lambda: s3.list_objects(Bucket=BUCKET),
        lambda: s3.get_bucket_location(Bucket=BUCKET),
        lambda: s3.delete_bucket(Bucket=BUCKET),
    )
    for call in calls:
        with pytest.raises(ClientError) as caught:
            call()
        assert code_of(caught) == "NotImplemented"


@pytest.mark.parametrize("argument", ["max-keys=many", "max-keys=-1", "continuation-token=%FF"])
def test_an_argument_that_makes_no_sense_is_refused(service: EmbeddedS3, argument: str) -> None:
    with raw(service) as connection:
        connection.request("GET", f"/{BUCKET}?list-type=2&{argument}")
        response = connection.getresponse()
        assert (response.status, b"InvalidArgument" in response.read()) == (400, True)


# --- faults ---


def ending_of(s3: S3Client, key: str) -> str:
    try:
        s3.head_object(Bucket="nobody", Key=key)
    except ConnectionClosedError:
        return "drop"
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return {404: "answer", 500: "InternalError", 503: "SlowDown"}[status]
    raise AssertionError("there is no such bucket")


def test_every_fault_is_what_the_seed_decides() -> None:
    """Each request fails as foretold, and the service's own count agrees."""
    keys = [f"{number}" for number in range(40)] * 2
    seen: Counter[str] = Counter()
    expected = []
    for key in keys:
        expected.append(fate_of(FAULTY, "HeadObject", f"nobody/{key}??", seen[key]).ending)
        seen[key] += 1
    with EmbeddedS3(FAULTY) as service, client_of(service) as s3:
        assert [ending_of(s3, key) for key in keys] == expected
        stats = service.stats()
    counts = Counter(expected)
    assert min(counts[ending] for ending in ("answer", "drop", "InternalError", "SlowDown")) > 0
    assert stats["requests"] == {"HeadObject": 80}
    assert stats["dropped"] == counts["drop"]
    replies = {"404": counts["answer"], "500": counts["InternalError"], "503": counts["SlowDown"]}
    assert stats["replies"] == replies


def test_a_slow_down_tells_how_long_and_has_no_effect() -> None:
    """The wait is in whole seconds; what was to be put is not there."""
    with EmbeddedS3(S3Config(latency=0.0, slow_downs=1.0, retry_after=1.2)) as service, client_of(service) as s3:
        with pytest.raises(ClientError) as caught:
            s3.put_object(Bucket=BUCKET, Key="x", Body=b"x")
        assert service.stats()["objects"] == 0
    assert code_of(caught) == "SlowDown"
    assert caught.value.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "2"


def test_a_key_that_hangs_is_silent_as_often_as_it_was_told_to() -> None:
    """The first requests get no answer, in any bucket and for any operation; the next one does, as all others."""
    config = S3Config(latency=0.0, hang="silent", hangs=2)
    with EmbeddedS3(config) as service, client_of(service, read_timeout=0.1) as hasty, client_of(service) as s3:
        s3.create_bucket(Bucket=BUCKET)
        with pytest.raises(ReadTimeoutError):
            hasty.put_object(Bucket=BUCKET, Key="silent", Body=b"x")
        with pytest.raises(ReadTimeoutError):
            hasty.get_object(Bucket=BUCKET, Key="silent")
        s3.put_object(Bucket=BUCKET, Key="silent", Body=b"x")
        stats = service.stats()
    assert (stats["hung_up"], stats["in_flight"], stats["objects"]) == (2, 0, 1)


def test_the_configuration_is_a_plain_value() -> None:
    """It survives pickling, and nonsense is refused where it is written."""
    assert pickle.loads(pickle.dumps(FAULTY)) == FAULTY
    wrong: Any
    for wrong, message in (
        ({"drops": 1.5}, "share"),
        ({"errors": 0.6, "drops": 0.6}, "together"),
        ({"latency": -1}, "latency"),
        ({"hangs": -1}, "hangs"),
        ({"largest_bytes": 0}, "largest_bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            S3Config(**wrong)


def test_it_says_that_it_cannot_start(capfd: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is an error in the parent, not a wait."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = S3Config(port=taken.getsockname()[1])
        with pytest.raises(RuntimeError, match="did not start"), EmbeddedS3(config):
            pass
    assert "cannot serve on 127.0.0.1" in capfd.readouterr().err


def in_flight(url: str) -> int:
    with urlopen(f"{url}/stats", timeout=BOUND) as answer:
        return int(json.load(answer)["in_flight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_prints_its_url_and_ends_cleanly_on_a_signal(number: signal.Signals) -> None:
    """The first line is the URL, a signal ends it with status 0, though a request hangs; it has said nothing else."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / "s3_service.py"), "--hang=silent"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=BOUND)) as connection:
            connection.request("GET", "/things/silent")
            while in_flight(url) == 0:
                pass
            process.send_signal(number)
            assert process.communicate(timeout=BOUND) == ("", "")
        assert process.returncode == 0
