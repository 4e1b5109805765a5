"""boto3 behind a gate: as many connections as calls, retries in one place only, and a kind for each error."""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import boto3
import botocore.exceptions as aws
import pytest
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore.config import Config
from botocore.retries.standard import ThrottledRetryableChecker, TransientRetryableChecker
from hypothesis import given
from hypothesis import strategies as st

from penstock import FailureKind, Retry, UsageError, classify
from penstock.clients.aws import (
    THROTTLING_CODES,
    TRANSIENT_CODES,
    TRANSIENT_STATUSES,
    boto3_client,
    classify_aws,
)
from penstock.clients.blocking import BlockingClient
from penstock.gate.server_hints import LONGEST_HINT, hint_of
from s3_service import CREDENTIALS, EmbeddedS3, S3Config

BOUND = 30.0
BUCKET = "things"
OPTIONS: dict[str, Any] = {"region_name": "us-east-1", **CREDENTIALS}


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")


@pytest.fixture(scope="module")
def store() -> Iterator[EmbeddedS3]:
    """It works, and has the bucket; requests for the key "silent" get no answer the first time."""
    with EmbeddedS3(S3Config(latency=0.002, hang="silent", hangs=1)) as service:
        with contextlib.closing(boto3.session.Session().client("s3", endpoint_url=service.url, **OPTIONS)) as s3:
            s3.create_bucket(Bucket=BUCKET)
        yield service


@pytest.fixture(scope="module")
def busy() -> Iterator[EmbeddedS3]:
    """It answers everything with 503 SlowDown."""
    with EmbeddedS3(S3Config(latency=0.0, slow_downs=1.0, retry_after=2.0)) as service:
        yield service


@pytest.fixture(scope="module")
def failing() -> Iterator[EmbeddedS3]:
    """It answers everything with 500 InternalError."""
    with EmbeddedS3(S3Config(latency=0.0, errors=1.0)) as service:
        yield service


@pytest.fixture(scope="module")
def dropping() -> Iterator[EmbeddedS3]:
    """It hangs up on everybody."""
    with EmbeddedS3(S3Config(latency=0.0, drops=1.0)) as service:
        yield service


@contextlib.contextmanager
def requests_expected(service: EmbeddedS3, operation: str, count: int) -> Iterator[None]:
    """Fail unless the block sends so many requests."""
    before = service.stats()["requests"].get(operation, 0)
    yield
    assert service.stats()["requests"].get(operation, 0) - before == count


def client_of(service: EmbeddedS3, **options: Any) -> BlockingClient[Any]:
    return boto3_client("s3", endpoint_url=service.url, **OPTIONS | options)


def read(s3: Any, key: str) -> bytes:
    with contextlib.closing(s3.get_object(Bucket=BUCKET, Key=key)["Body"]) as body:
        content: bytes = body.read()
        return content


async def config_of(**options: Any) -> Any:
    """The configuration of an opened client; nothing is sent."""
    async with boto3_client("s3", endpoint_url="http://127.0.0.1:1", **OPTIONS | options) as s3:
        return await s3.run(lambda client: client.meta.config)


# --- what an error is ---


def answered(
    code: str | None = "AccessDenied", status: int | None = 403, headers: dict[str, str] | None = None
) -> aws.ClientError:
    error: Any = {} if code is None else {"Code": code, "Message": "no"}
    metadata: Any = {} if status is None else {"HTTPStatusCode": status, "HTTPHeaders": headers or {}}
    return aws.ClientError({"Error": error, "ResponseMetadata": metadata}, "PutObject")


def test_the_codes_and_statuses_are_those_that_botocore_repeats() -> None:
    """A code that botocore has learned in the meantime is to be taken over."""
    throttled, transient = vars(ThrottledRetryableChecker), vars(TransientRetryableChecker)
    assert set(throttled["_THROTTLED_ERROR_CODES"]) == THROTTLING_CODES
    assert set(transient["_TRANSIENT_ERROR_CODES"]) <= TRANSIENT_CODES | THROTTLING_CODES
    assert set(transient["_TRANSIENT_STATUS_CODES"]) <= TRANSIENT_STATUSES


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("SlowDown", 503, "throttled"),
        ("ThrottlingException", 400, "throttled"),
        ("ProvisionedThroughputExceededException", 400, "throttled"),
        ("429", 429, "throttled"),
        (None, 429, "throttled"),
        ("InternalError", 500, "transient"),
        ("503", 503, "transient"),
        ("RequestTimeout", 400, "transient"),
        ("408", 408, "transient"),
        ("InternalError", None, "transient"),
        ("NoSuchKey", 404, "permanent"),
        ("AccessDenied", 403, "permanent"),
        ("NotImplemented", 501, "permanent"),
        (None, None, "permanent"),
    ],
)
def test_an_answer_goes_by_its_code_then_by_its_status(code: str | None, status: int | None, kind: str) -> None:
    """A 500 is worth another attempt here, as AWS says; an answer to HEAD has no code, and a stream's no status."""
    assert classify_aws(answered(code, status)) == kind


@given(
    code=st.none() | st.sampled_from(sorted(THROTTLING_CODES | TRANSIENT_CODES)) | st.text("SlowDown503"),
    status=st.none() | st.integers(300, 599),
    headers=st.dictionaries(
        st.sampled_from(["retry-after", "x-amz-retry-after", "date"]), st.text("0123456789. -GMTon")
    ),
)
def test_every_answer_has_a_kind_that_follows_the_rule(
    code: str | None, status: int | None, headers: dict[str, str]
) -> None:
    """Whatever the service says, in whatever shape: throttled, transient or permanent, and a wait that can be used."""
    error = answered(code, status, headers)
    kind = classify_aws(error)
    wait = getattr(error, "retry_after", None)
    hinted = wait is not None
    throttled = code in THROTTLING_CODES or status == 429 or (status == 503 and hinted)
    assert (kind is FailureKind.THROTTLED) == throttled
    transient = code in TRANSIENT_CODES or status in TRANSIENT_STATUSES
    assert (kind is FailureKind.TRANSIENT) == (transient and not throttled)
    assert kind in ("throttled", "transient", "permanent")
    assert wait is None or wait >= 0


@pytest.mark.parametrize("response", [{}, {"Error": {}}, {"ResponseMetadata": {}}])
def test_an_answer_without_its_parts_is_permanent(response: Any) -> None:
    """As hand-made errors and those of event streams are."""
    assert classify_aws(aws.ClientError(response, "PutObject")) == "permanent"


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"x-amz-retry-after": "1500"}, 1.5),
        ({"retry-after": "7"}, 7.0),
        ({"x-amz-retry-after": "20", "retry-after": "7"}, 0.02),
        ({"x-amz-retry-after": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Fri, 01 Jan 2027 00:00:05 GMT", "date": "Fri, 01 Jan 2027 00:00:00 GMT"}, 5.0),
        ({"x-amz-retry-after": "-5"}, None),
        ({"x-amz-retry-after": "9" * 400}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_a_wait_that_the_service_asks_for_is_where_a_gate_looks_for_it(
    headers: dict[str, str], wait: float | None
) -> None:
    """In seconds; AWS's own header counts milliseconds. What is no number, or no sound one, is ignored."""
    error = answered("SlowDown", 503, headers)
    classify_aws(error)
    assert hint_of(error) == wait
    assert wait is None or wait <= LONGEST_HINT


def uploaded(cause: aws.ClientError) -> Exception:
    """What `upload_file` makes of an answer."""
    try:
        try:
            raise cause
        except aws.ClientError as error:
            raise S3UploadFailedError(f"Failed to upload: {error}")  # noqa: B904  # as boto3 does
    except S3UploadFailedError as error:
        return error


def without_context(code: str) -> S3UploadFailedError:
    """An upload's error whose context Python has cut: nothing but its text tells of the answer."""
    answer = f"An error occurred ({code}) when calling the PutObject operation: for some reason"
    return S3UploadFailedError(f"Failed to upload here to there: {answer}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (aws.EndpointConnectionError(endpoint_url="x"), "transient"),
        (aws.ConnectTimeoutError(endpoint_url="x"), "transient"),
        (aws.ReadTimeoutError(endpoint_url="x"), "transient"),
        (aws.ConnectionClosedError(endpoint_url="x"), "transient"),
        (aws.ProxyConnectionError(proxy_url="x"), "transient"),
        (aws.ResponseStreamingError(error="x"), "transient"),
        (aws.IncompleteReadError(actual_bytes=1, expected_bytes=2), "transient"),
        (aws.HTTPClientError(error="x"), "transient"),
        (RetriesExceededError(cast("Any", TimeoutError())), "transient"),
        (uploaded(answered("SlowDown", 503)), "throttled"),
        (uploaded(answered("AccessDenied", 403)), "permanent"),
        (S3UploadFailedError("of nobody knows what"), None),
        (without_context("SlowDown"), FailureKind.THROTTLED),
        (without_context("ServiceUnavailable"), FailureKind.TRANSIENT),
        (without_context("500"), FailureKind.TRANSIENT),
        (without_context("AccessDenied"), FailureKind.PERMANENT),
        (aws.SSLError(endpoint_url="x", error=OSError("expired")), "permanent"),
        (aws.NoCredentialsError(), "permanent"),
        (aws.PartialCredentialsError(provider="env", cred_var="x"), "permanent"),
        (aws.NoRegionError(), "permanent"),
        (aws.ProfileNotFound(profile="x"), "permanent"),
        (aws.ParamValidationError(report="x"), "bug"),
        (aws.MissingParametersError(object_name="x", missing="y"), "bug"),
        (aws.RangeError(value=1, param="x", min_value=2, max_value=3), "bug"),
        (aws.UnknownServiceError(service_name="s4", known_service_names="s3"), "bug"),
        (aws.OperationNotPageableError(operation_name="x"), "bug"),
        (ValueError("x"), None),
        (TypeError("x"), None),
        (ConnectionResetError(), None),
        (UsageError("x"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_error_without_an_answer_goes_by_its_class(error: Exception, kind: str | None) -> None:
    """Connections may hold the next time; certificates and credentials will not; wrong use is a bug; the rest is not
    botocore's."""
    assert classify_aws(error) == kind


def subclasses(of: Any) -> Iterator[Any]:
    for found in of.__subclasses__():
        yield found
        yield from subclasses(found)


def test_no_error_of_botocore_is_unknown() -> None:
    found = [error for error in subclasses(aws.BotoCoreError) if error.__module__ == "botocore.exceptions"]
    assert len(found) > 50
    assert {classify_aws(error.__new__(error)) for error in found} == {"transient", "permanent", "bug"}


def test_without_botocore_no_error_is_its(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    assert classify_aws(ValueError()) is None


# --- the client ---


async def test_as_many_connections_as_calls_in_flight_and_each_kept(
    store: EmbeddedS3, caplog: pytest.LogCaptureFixture
) -> None:
    """64 jobs share 12 connections: no handshake for every call, no thread finds the pool full."""
    before = store.stats()
    async with client_of(store, limit=12) as s3:

        async def put_and_get(number: int) -> bytes:
            key = f"there-and-back/{number}"
            await s3.call("put_object", Bucket=BUCKET, Key=key, Body=b"%d" % number)
            return await s3.run(read, key)

        with caplog.at_level(logging.WARNING):
            bodies = await asyncio.gather(*(put_and_get(number) for number in range(64)))
    after = store.stats()
    assert bodies == [b"%d" % number for number in range(64)]
    assert after["requests"]["PutObject"] - before["requests"].get("PutObject", 0) == 64
    assert after["connections"] - before["connections"] <= 12
    assert after["peak_in_flight"] <= 12
    assert not caplog.records


async def test_a_failed_call_is_repeated_by_the_gate_alone(failing: EmbeddedS3) -> None:
    """As many requests as there are attempts: the SDK would have made three of each. The error is the service's own."""
    async with client_of(failing, retry=Retry(attempts=4, wait=0)) as s3:
        with requests_expected(failing, "PutObject", 4), pytest.raises(aws.ClientError) as caught:
            await s3.call("put_object", Bucket=BUCKET, Key="x", Body=b"x")
    assert caught.value.response["Error"]["Code"] == "InternalError"
    assert classify(caught.value) is FailureKind.TRANSIENT
    assert any("all 4 attempts used" in note for note in caught.value.__notes__)


async def test_a_broken_connection_is_repeated(dropping: EmbeddedS3) -> None:
    async with client_of(dropping, retry=Retry(attempts=3, wait=0)) as s3:
        with requests_expected(dropping, "HeadObject", 3), pytest.raises(aws.ConnectionClosedError) as caught:
            await s3.call("head_object", Bucket=BUCKET, Key="x")
    assert classify(caught.value) is FailureKind.TRANSIENT


async def test_a_throttled_call_waits_as_long_as_the_service_asks(busy: EmbeddedS3) -> None:
    """The gate sees the kind and the wait: it does not begin an attempt that the wait puts beyond the end."""
    async with client_of(busy, retry=Retry(attempts=3, wait=0, timeout=1.5)) as s3:
        with requests_expected(busy, "PutObject", 1), pytest.raises(aws.ClientError) as caught:
            await s3.call("put_object", Bucket=BUCKET, Key="x", Body=b"x")
    assert caught.value.response["Error"]["Code"] == "SlowDown"
    assert classify(caught.value) is FailureKind.THROTTLED
    assert hint_of(caught.value) == 2.0


@pytest.mark.parametrize(
    ("call", "kind", "sent"),
    [
        ({"Key": "nobody has put it"}, FailureKind.PERMANENT, 1),
        ({"Key": 7}, FailureKind.BUG, 0),
        ({"Name": "x"}, FailureKind.BUG, 0),
    ],
    ids=str,
)
async def test_what_will_fail_again_is_not_repeated(
    store: EmbeddedS3, call: dict[str, Any], kind: FailureKind, sent: int
) -> None:
    """A key that is missing costs one request; parameters that botocore refuses cost none."""
    async with client_of(store, retry=Retry(attempts=4, wait=0)) as s3:
        with requests_expected(store, "GetObject", sent):
            with pytest.raises((aws.ClientError, aws.ParamValidationError)) as caught:
                await s3.call("get_object", Bucket=BUCKET, **call)
    assert classify(caught.value) is kind


async def test_a_silent_server_is_given_up_by_the_sdk_and_asked_again(store: EmbeddedS3) -> None:
    """The call ends by itself, long before the gate's time-out, so its thread is free. The next one is answered."""
    hung_up = store.stats()["hung_up"]
    async with client_of(store, timeout=10 * BOUND, config=Config(read_timeout=0.2)) as s3:
        await s3.call("put_object", Bucket=BUCKET, Key="silent", Body=b"at last")
        assert await s3.run(read, "silent") == b"at last"
        assert store.stats()["hung_up"] == hung_up + 1


async def test_a_file_transfer_is_repeated_like_any_call(
    tmp_path: Path, store: EmbeddedS3, failing: EmbeddedS3
) -> None:
    """`upload_file` hides the service's answer in a class of boto3's own."""
    (tmp_path / "in").write_bytes(b"a file")
    async with client_of(failing, retry=Retry(attempts=2, wait=0)) as s3:
        with requests_expected(failing, "PutObject", 2), pytest.raises(S3UploadFailedError) as caught:
            await s3.call("upload_file", Filename=str(tmp_path / "in"), Bucket=BUCKET, Key="file")
    assert classify(caught.value) is FailureKind.TRANSIENT
    async with client_of(store) as s3:
        await s3.call("upload_file", Filename=str(tmp_path / "in"), Bucket=BUCKET, Key="file")
        await s3.call("download_file", Bucket=BUCKET, Key="file", Filename=str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == b"a file"


# --- what botocore is told ---


async def test_botocore_has_a_connection_for_each_call_and_no_retries() -> None:
    config = await config_of(limit=7)
    assert config.max_pool_connections == 7
    assert config.retries == {"total_max_attempts": 1, "mode": "standard"}
    assert config.tcp_keepalive


@pytest.mark.parametrize("timeout", [0.01, 1.0, 5.0, 5.5, 60.0, 3600.0])
async def test_botocore_gives_up_before_the_gate_does(timeout: float) -> None:
    """Else each time-out would leave an abandoned call behind. A connection is not waited for longer than 5 s."""
    config = await config_of(timeout=timeout)
    assert 0.5 * timeout < config.read_timeout < timeout
    assert config.connect_timeout < timeout
    assert config.connect_timeout <= 5.0


async def test_without_a_timeout_botocore_keeps_its_own() -> None:
    """No limit for the call does not mean to wait for a dead server for ever."""
    config = await config_of(timeout=None)
    assert (config.read_timeout, config.connect_timeout) == (Config().read_timeout, 5.0)  # type: ignore[attr-defined]


async def test_what_a_config_sets_explicitly_wins() -> None:
    """Also where it sets botocore's default; what it does not set stays."""
    config = await config_of(limit=7, config=Config(max_pool_connections=10, read_timeout=300, user_agent_extra="me"))
    assert (config.max_pool_connections, config.read_timeout) == (10, 300)
    assert config.user_agent_extra == "me"
    assert config.retries["total_max_attempts"] == 1


@pytest.mark.parametrize(
    ("retries", "attempts"),
    [
        ({"mode": "adaptive"}, 1),
        ({"mode": "legacy"}, 1),
        ({"total_max_attempts": 2}, 2),
        ({"max_attempts": 1, "mode": "standard"}, 2),
    ],
    ids=str,
)
async def test_the_sdk_retries_only_if_it_is_told_how_often(failing: EmbeddedS3, retries: Any, attempts: int) -> None:
    """A mode alone does not bring its retries back. A number does, within each attempt of ours."""
    async with client_of(failing, retry=Retry(attempts=1), config=Config(retries=retries)) as s3:
        with requests_expected(failing, "HeadBucket", attempts), pytest.raises(aws.ClientError):
            await s3.call("head_bucket", Bucket=BUCKET)


async def test_a_given_session_is_used_as_it_is() -> None:
    session = boto3.session.Session(**OPTIONS | {"region_name": "eu-north-1"})
    async with boto3_client("s3", session=session, endpoint_url="http://127.0.0.1:1") as s3:
        assert await s3.run(lambda client: client.meta.region_name) == "eu-north-1"


async def test_the_default_session_is_left_alone() -> None:
    """It is not thread safe, and may be the program's."""
    assert boto3.DEFAULT_SESSION is None
    async with boto3_client("s3", **OPTIONS):
        assert boto3.DEFAULT_SESSION is None


async def test_what_boto3_refuses_is_refused_where_the_client_is_opened() -> None:
    client = boto3_client("s4", **OPTIONS)
    with pytest.raises(aws.UnknownServiceError):
        async with client:
            pass


@pytest.mark.parametrize(
    ("service", "options", "message"),
    [
        (None, {}, r'boto3_client\(None\): expected the name of a service.*"s3"'),
        ("", {}, r"boto3_client\(''\): expected the name of a service"),
        ("s3", {"config": {"region_name": "eu"}}, r"config=\{.*\}: .*Write `config=botocore\.config\.Config\("),
        ("s3", {"session": "profile"}, r"session='profile': .*Session\(profile_name=\.\.\.\)`"),
        ("s3", {"session": boto3.session.Session}, r"session=<class .*: .*expected a session"),
    ],
)
def test_arguments_that_cannot_work_are_refused(service: Any, options: dict[str, Any], message: str) -> None:
    """Before anything is opened, with what to write."""
    with pytest.raises(UsageError, match=message):
        boto3_client(service, **options)


def test_a_missing_boto3_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the client is made, not where it is first used."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UsageError, match=r'pip install "penstock\[aws\]"'):
        boto3_client("s3")


def test_boto3_is_not_imported_before_a_client_is_opened() -> None:
    """It takes longer than everything else together."""
    program = (
        "import sys, penstock\n"
        "from penstock.clients.aws import boto3_client\n"
        "boto3_client('s3')\n"
        "print([name for name in sys.modules if name.startswith(('boto', 's3transfer'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=BOUND, check=True)
    assert done.stdout == "[]\n"
