"""boto3 clients behind a gate: made right for many threads, and their errors read.

    boto3_client("s3") -> BlockingClient -> gate -> thread of a lane -> method of one shared boto3 client
                              ^                                                    | ClientError, ConnectionError, ...
                              +--------- failure kind, server's wait <- classify_aws

Purpose: a boto3 client as it comes has ten connections whatever the number of threads, retries within a call, while it
holds a thread and a permit, and raises errors that say nothing to a policy. Here the connections are as many as the
gate's limit, the gate is the only one that retries, and each error has a kind.

Guarantees: nothing of boto3 is imported before a client is opened, and none but this module knows it. The default
session of boto3 is never touched: it is not thread safe (boto/boto3 #1592), a client is.

Threads: the factory runs in the thread that opens the client; `classify_aws` in any.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from penstock import clock
from penstock.clients.blocking import BlockingClient
from penstock.errors import UsageError
from penstock.gate.breaker import Breaker
from penstock.gate.gate import DEFAULT_BREAKER, DEFAULT_LIMIT
from penstock.gate.limiter import LimitRule
from penstock.gate.rate import Rates
from penstock.gate.retry import Retry
from penstock.gate.server_hints import parse_retry_after
from penstock.outcome import FailureKind
from penstock.threads.workers import SHARED

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.config import Config

TIMEOUT = 60.0
"""Seconds for one call. As botocore's own time-outs."""
CONNECT_TIMEOUT = 5.0
"""Seconds. Arbitrary, because: two retransmissions of a SYN (RFC 6298: 1 and 2 s) fit in."""
SHARE_OF_THE_SDK = 0.9
"""Of the attempt's time, what botocore may wait for a silent server. Arbitrary, because: botocore must be the first to
give up, also on a busy machine; see `boto3_client`."""

THROTTLING_CODES = frozenset(
    {
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestThrottledException",
        "TooManyRequestsException",
        "ProvisionedThroughputExceededException",
        "TransactionInProgressException",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "LimitExceededException",
        "RequestThrottled",
        "SlowDown",
        "PriorRequestNotComplete",
        "EC2ThrottledException",
    }
)
"""botocore 1.44, `retries/standard.py`, `ThrottledRetryableChecker._THROTTLED_ERROR_CODES`."""
TRANSIENT_CODES = frozenset({"RequestTimeout", "RequestTimeoutException", "InternalError"})
"""The same file, `TransientRetryableChecker._TRANSIENT_ERROR_CODES`, without the one that is a throttling code, too.
`InternalError` is S3's word for a 500 ("An internal error occurred. Try again": S3 API Reference, Error Responses); in
an event stream it stands alone, since there is no status left to send."""
TRANSIENT_STATUSES = frozenset({408, 500, 502, 503, 504})
"""The same class, `_TRANSIENT_STATUS_CODES`, and 408 (RFC 9110 15.5.9). 500 is among them, unlike elsewhere: AWS
documents it as worth a repetition."""
_CODE_IN_TEXT = re.compile(r"An error occurred \(([^)]*)\) when calling the ")
"""botocore 1.44, `exceptions.py`, `ClientError.MSG_TEMPLATE`. Without a code in the answer, it is the status."""
_UNAVAILABLE = "ServiceUnavailable"
"""S3's code for a 503 (S3 API Reference, Error Responses), where there is no status to tell."""


def boto3_client(
    service: str,
    /,
    *,
    limit: int | LimitRule = DEFAULT_LIMIT,
    rate: Rates | None = None,
    timeout: float | None = TIMEOUT,
    retry: Retry | None = None,
    breaker: Breaker | None = DEFAULT_BREAKER,
    session: "Session | None" = None,
    config: "Config | None" = None,
    **client_kwargs: Any,
) -> BlockingClient[Any]:
    """A boto3 client for many jobs, as an async context manager.

        async with penstock.boto3_client("s3", limit=64) as s3:
            await s3.call("put_object", Bucket="out", Key=key, Body=body)
            body = await s3.run(read, key)      # read(client, key), in a thread: for a body, a paginator, a waiter

    Nothing is opened here: that happens in a thread when the client is entered, and takes some 0.3 s the first time.

    **Connections** are as many as `limit`, or as there can be threads where that is measured, so that no thread finds
    the pool full. boto3's transfers (`upload_file`) start up to ten threads of their own for a large file;
    `TransferConfig(use_threads=False)` forbids it.

    **Retries** are the gate's: the SDK's own are switched off, since they multiply with ours and wait with a thread and
    a permit in hand. Only a `config` that says how many attempts it wants (`retries={"total_max_attempts": 3}`) gets
    them, within each of ours; one that names a mode and no number does not.

    **Time-outs**: `timeout` is for one attempt, from its admission. botocore gives up after nine tenths of it without a
    byte from the server, or after 5 s without a connection, so that it is the first to do so: then the call's thread
    is free at once, and the error names the address. The gate's own time-out comes later, for servers that drip; the
    thread that it leaves behind ends when botocore notices, and keeps its permit so long. With None there is no limit
    for a whole call, and botocore's 60 s for silence.

    Args:
        service: as in `boto3.client(service)`: `"s3"`, `"dynamodb"`.
        limit: calls in flight at once; also threads, and connections. A number, or the rule by which it is measured.
        rate: calls in a time; see `Rate`.
        timeout: seconds for one attempt; None for no limit.
        breaker: when to leave the service alone; see `Breaker`.
        retry: the policy; see `Retry`. What is transient or throttled is said by `classify_aws`.
        session: a session of your own, used as it is. Nobody else may use it while the client is opened. None makes
            one for this client, which reads environment and files as boto3 always does.
        config: what it sets explicitly wins over what is set here.
        client_kwargs: anything else that `Session.client` takes: `region_name`, `endpoint_url`, credentials.

    Raises:
        UsageError: boto3 is not installed, or a value cannot work.
        Exception: where it is entered: what boto3 raises when it makes the client.
    """
    if find_spec("boto3") is None:
        raise UsageError('boto3_client() needs boto3, which is not installed. Write: pip install "penstock[aws]"')
    if not isinstance(service, str) or not service:
        raise UsageError(
            f"boto3_client({service!r:.100}): expected the name of a service. "
            f'Write it as for boto3: `boto3_client("s3")`.'
        )
    if session is not None and (isinstance(session, type) or not callable(getattr(session, "client", None))):
        raise UsageError(
            f"session={session!r:.100}: expected a session. Write `session=boto3.session.Session(profile_name=...)`."
        )
    if config is not None:
        _check_config(config)

    connections = limit if isinstance(limit, int) else SHARED.most

    def make() -> Any:
        import boto3.session

        own = boto3.session.Session() if session is None else session
        # The stubs know each service by its literal name only.
        return cast("Any", own).client(service, config=_merged(config, connections, timeout), **client_kwargs)

    return BlockingClient(
        make,
        name=service,
        limit=limit,
        rate=rate,
        close=_close,
        classify=classify_aws,
        retry=retry,
        breaker=breaker,
        timeout=timeout,
    )


def _check_config(config: object) -> None:
    from botocore.config import Config  # who has a right one has imported it

    if not isinstance(config, Config):
        raise UsageError(
            f"config={config!r:.100}: expected a botocore Config. Write `config=botocore.config.Config(...)`; "
            f"`region_name` and the like may also stand beside it."
        )


def _close(client: Any) -> None:
    client.close()


def _merged(config: "Config | None", limit: int, timeout: float | None) -> "Config":
    """What `boto3_client` promises, overridden by what `config` sets explicitly."""
    from botocore.config import Config

    merged = Config(
        max_pool_connections=limit,
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=CONNECT_TIMEOUT,
        tcp_keepalive=True,
    )
    if timeout is not None:
        patience = timeout * SHARE_OF_THE_SDK
        merged = merged.merge(Config(connect_timeout=min(CONNECT_TIMEOUT, patience), read_timeout=patience))
    if config is None:
        return merged
    merged = merged.merge(config)
    retries: Any = config.retries  # type: ignore[attr-defined]  # documented, and missing from the stubs
    if retries is not None and not retries.keys() & {"total_max_attempts", "max_attempts"}:
        # Merging replaces the whole dictionary: a mode alone would bring the SDK's three attempts back.
        once: Any = {**retries, "total_max_attempts": 1}
        merged = merged.merge(Config(retries=once))
    return merged


def classify_aws(error: Exception) -> FailureKind | None:
    """Say what kind of failure an error of botocore is; None for any other. Any thread.

    Answers of the service go by their code first, then by their status: throttling codes, 429, and 503 with a
    `Retry-After` are throttled; 500, 502, 503, 504 and 408 are transient; all others permanent. Connections that fail,
    break off or are silent are transient, except for a peer whose certificate is refused. Parameters and names that
    botocore refuses are bugs; missing credentials, a missing region and what is left are permanent. The errors that
    `upload_file` and `download_file` raise in their stead are known, too.

    A wait that the service asked for (`x-amz-retry-after` in milliseconds, else `Retry-After`) is put on the error as
    `retry_after`, in seconds, where gates look for it.
    """
    try:
        import botocore.exceptions as aws
        from boto3.exceptions import RetriesExceededError, S3UploadFailedError
    except ImportError:
        return None
    if isinstance(error, RetriesExceededError):  # of a download: its transfer repeats broken connections only
        return FailureKind.TRANSIENT
    # An upload's class says nothing, and is raised while the one that does is handled.
    cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
    if cause is None:
        return _classify_text(str(error))
    if isinstance(cause, aws.ClientError):
        return _classify_answer(error, cause.response)
    if isinstance(cause, aws.SSLError):  # a ConnectionError, for botocore
        return FailureKind.PERMANENT
    if isinstance(cause, aws.ConnectionError | aws.HTTPClientError | aws.IncompleteReadError):
        return FailureKind.TRANSIENT
    if isinstance(
        cause,
        aws.ParamValidationError
        | aws.MissingParametersError
        | aws.ValidationError
        | aws.UnknownServiceError
        | aws.UnknownClientMethodError
        | aws.OperationNotPageableError,
    ):
        return FailureKind.BUG
    return FailureKind.PERMANENT if isinstance(cause, aws.BotoCoreError) else None


def _classify_answer(error: Exception, response: Mapping[str, Any]) -> FailureKind:
    """Say what an answer of the service means, and put the wait it asks for on the error."""
    metadata: Mapping[str, Any] = response.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode")
    code = response.get("Error", {}).get("Code")
    wait = _wait(metadata.get("HTTPHeaders", {}))
    if wait is not None:
        error.retry_after = wait  # type: ignore[attr-defined]  # where a gate looks for it, on any error
    if code in THROTTLING_CODES or status == 429 or (status == 503 and wait is not None):
        return FailureKind.THROTTLED
    return FailureKind.TRANSIENT if code in TRANSIENT_CODES or status in TRANSIENT_STATUSES else FailureKind.PERMANENT


def _classify_text(text: str) -> FailureKind | None:
    """Say what kind of failure an upload's error is that has lost its context.

    `upload_file` leaves its transfer manager while it raises, and that may raise the service's answer once more within:
    Python then cuts the context of the outer error, so that the two are no cycle.
    """
    found = _CODE_IN_TEXT.search(text)
    if found is None:
        return None
    code = found[1]
    status = int(code) if code.isascii() and code.isdigit() else 503 if code == _UNAVAILABLE else None
    return _classify_answer(Exception(), {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}})


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the service asks to wait. botocore gives the names of headers in lower case."""
    milliseconds = headers.get("x-amz-retry-after", "").strip()
    if milliseconds.isascii() and milliseconds.isdigit():
        return float(milliseconds) / 1000.0
    return parse_retry_after(headers.get("retry-after"), date=headers.get("date"), now=clock.wall())
