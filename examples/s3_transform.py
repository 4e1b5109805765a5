"""List, get, change, put: every object below a prefix is rewritten below another one, through boto3.

Without options it starts an object store of its own, one that fails now and then, and puts 500 objects of JSON lines
there.

    python examples/s3_transform.py
    python examples/s3_transform.py --objects 2000 --errors 0.05
    python examples/s3_transform.py --endpoint-url http://127.0.0.1:9000 --bucket data --fill

The listing is pulled page by page, as there is room for more jobs. Each job gets one object, body included, in a
thread; normalises and compresses it off the loop, in another; and puts it below `out/`. Both calls to the store go
through one client, which bounds what is in flight and asks again where that may help. A second run does the same again.

In the end both prefixes are listed side by side: as many objects as there were jobs, and each has its counterpart
unless its job failed. Nobody else should write there meanwhile.

Exit status: 0 all done; 1 some failed, or the counts do not hold; 2 wrong use, or boto3 is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import penstock
from records import make_records
from s3_service import CREDENTIALS, EmbeddedS3, add_s3_flags, s3_config_from

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator

    from types_boto3_s3 import S3Client

OBJECTS = 500
RECORDS_EACH = 20
BUCKET = "penstock-example"
SOURCE, TARGET = "in/", "out/"
LIMIT = 32
RETRY = penstock.Retry(attempts=5)
LISTING_ATTEMPTS = 5


class Store(NamedTuple):
    """Where the objects are."""

    bucket: str
    options: dict[str, Any]
    """What boto3 is told of the store."""

    def client(self) -> penstock.BlockingClient[Any]:
        return penstock.boto3_client("s3", limit=LIMIT, retry=RETRY, **self.options)


# --- the job ---


def transforming(store: Store) -> penstock.Job[Callable[[str], Awaitable[None]]]:
    @penstock.job
    async def transform() -> AsyncIterator[Callable[[str], Awaitable[None]]]:
        async with store.client() as s3:

            async def rewrite(key: str) -> None:
                body = await s3.run(read, store.bucket, key)
                smaller = await penstock.compute(normalised, body)
                await s3.call(
                    "put_object",
                    Bucket=store.bucket,
                    Key=counterpart(key),
                    Body=smaller,
                    ContentType="application/jsonl",
                    ContentEncoding="gzip",
                )

            yield rewrite

    return transform


def read(s3: S3Client, bucket: str, key: str) -> bytes:
    """Get a whole object. Runs in a thread: the body comes only while it is read."""
    with contextlib.closing(s3.get_object(Bucket=bucket, Key=key)["Body"]) as body:
        return body.read()


def normalised(body: bytes) -> bytes:
    """Clean up JSON lines: stands for all work that would hold up the loop. The same body gives the same bytes."""
    records = (json.loads(line) for line in body.splitlines() if line.strip())
    lines = [
        json.dumps({name: clean(record[name]) for name in sorted(record)}, ensure_ascii=False) for record in records
    ]
    return gzip.compress("\n".join([*lines, ""]).encode(), mtime=0)


def clean(value: object) -> object:
    return " ".join(value.split()) if isinstance(value, str) else value


def counterpart(key: str) -> str:
    return TARGET + key.removeprefix(SOURCE)


# --- objects in ---


def list_keys(store: Store, prefix: str) -> Generator[str, None, None]:
    """The keys below a prefix, in order, one page in memory at a time. Blocks: `pull_in_thread` is for such sources."""
    import boto3.session  # here, for those who do not have it: see main()
    from botocore.config import Config

    # Pages come one after the other, behind no gate: here the SDK's own retries are the right ones.
    config = Config(retries={"total_max_attempts": LISTING_ATTEMPTS, "mode": "standard"})
    with contextlib.closing(boto3.session.Session().client("s3", config=config, **store.options)) as s3:
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=prefix):
            for found in page.get("Contents", []):
                yield found["Key"]


def filling(store: Store) -> penstock.Job[Callable[[int], Awaitable[None]]]:
    @penstock.job
    async def fill() -> AsyncIterator[Callable[[int], Awaitable[None]]]:
        async with store.client() as s3:
            await s3.run(make_bucket, store.bucket)

            async def put(number: int) -> None:
                await s3.call("put_object", Bucket=store.bucket, Key=f"{SOURCE}{number:06}.jsonl", Body=made(number))

            yield put

    return fill


def make_bucket(s3: S3Client, bucket: str) -> None:
    with contextlib.suppress(s3.exceptions.BucketAlreadyOwnedByYou):
        s3.create_bucket(Bucket=bucket)


def made(number: int) -> bytes:
    """An object as somebody else has written it: blanks anywhere, names in any order."""
    records = ({**record, "name": f"  {record['name']} "} for record in make_records(RECORDS_EACH, seed=number))
    return "\n\n".join(json.dumps(record) for record in records).encode()


# --- the account ---


class Listed(NamedTuple):
    """Both prefixes, side by side."""

    objects: int
    without_counterpart: int


def list_both(store: Store) -> Listed:
    # Both come in the same order, so neither has to fit into memory.
    objects = missing = 0
    with contextlib.closing(list_keys(store, TARGET)) as targets:
        target = next(targets, None)
        for key in list_keys(store, SOURCE):
            wanted = counterpart(key)
            while target is not None and target < wanted:
                target = next(targets, None)
            objects += 1
            missing += target != wanted
    return Listed(objects, missing)


def transform_and_account(store: Store) -> int:
    report = penstock.run(transforming(store), penstock.pull_in_thread(list_keys(store, SOURCE)))
    print(report)
    report.verify()
    listed = list_both(store)
    print(f"{listed.objects} objects below {SOURCE}, {listed.without_counterpart} without a counterpart below {TARGET}")
    if report.stopped is None and listed.objects != report.read:
        return complain(f"there are {listed.objects} objects, but {report.read} jobs were done")
    if listed.without_counterpart > listed.objects - report.done:
        return complain("an object that was reported as done has no counterpart")
    return 1 if report.exit_code else 0


def complain(message: str) -> int:
    print(f"s3_transform.py: error: {message}", file=sys.stderr)
    return 1


# --- the command line ---


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="List, get, change, put, through boto3.", allow_abbrev=False)
    parser.add_argument("--objects", type=at_least_one, default=OBJECTS, help=f"to fill in (default: {OBJECTS})")
    parser.add_argument("--bucket", default=BUCKET, help=f"where the objects are (default: {BUCKET})")
    parser.add_argument(
        "--endpoint-url",
        help="a store that runs already, with boto3's usual credentials; else one is started for this run",
    )
    parser.add_argument("--fill", action="store_true", help="with --endpoint-url: make the bucket, and objects in it")
    add_s3_flags(parser, without=("host", "port"))
    parser.set_defaults(slow_downs=0.01, errors=0.01, drops=0.002)
    return parser


def fill_and_transform(parser: argparse.ArgumentParser, flags: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    config = s3_config_from(parser, flags)
    store = Store(flags.bucket, {"endpoint_url": flags.endpoint_url})
    if flags.endpoint_url is None:
        service = stack.enter_context(EmbeddedS3(config))
        store = Store(flags.bucket, {"endpoint_url": service.url, "region_name": "us-east-1", **CREDENTIALS})
    if flags.fill or flags.endpoint_url is None:
        filled = penstock.run(filling(store), range(flags.objects))
        if filled.exit_code:
            print(filled)
            return complain("the store could not be filled")
    return transform_and_account(store)


def main() -> int:
    parser = make_parser()
    flags = parser.parse_args()
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        print('s3_transform.py: error: needs boto3. Write: pip install "penstock[aws]"', file=sys.stderr)
        return 2
    # Failures are in the report; tracebacks are for bugs.
    logging.getLogger("penstock.jobs").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        try:
            return fill_and_transform(parser, flags, stack)
        except (BotoCoreError, ClientError) as error:  # of a listing, or of making the bucket
            return complain(str(error))


if __name__ == "__main__":
    sys.exit(main())
