"""The boto3 example rewrites every object, and says so when one is missing."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3.session
import pytest

import s3_transform
from records import make_records
from s3_service import CREDENTIALS, EmbeddedS3, S3Config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from types_boto3_s3 import S3Client

EXAMPLES = Path(__file__).parents[2] / "examples"
BOUND = 60.0
OBJECTS = 30
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
    **{name.upper(): value for name, value in CREDENTIALS.items()},
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@pytest.fixture(scope="module")
def service() -> Iterator[EmbeddedS3]:
    with EmbeddedS3(S3Config(latency=0.0)) as service:
        yield service


@pytest.fixture
def s3(service: EmbeddedS3) -> Iterator[S3Client]:
    with contextlib.closing(boto3.session.Session().client("s3", **options_of(service))) as client:
        yield client


def options_of(service: EmbeddedS3) -> dict[str, Any]:
    return {"endpoint_url": service.url, "region_name": "us-east-1", **CREDENTIALS}


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "s3_transform.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=ENVIRONMENT | environment)
    assert not re.search("Traceback|Exception ignored|Warning", done.stderr), done.stderr
    return done


def content(s3: S3Client, bucket: str, key: str) -> list[dict[str, Any]]:
    found = s3.get_object(Bucket=bucket, Key=key)
    assert (found["ContentEncoding"], found["ContentType"]) == ("gzip", "application/jsonl")
    with contextlib.closing(found["Body"]) as body:
        return [json.loads(line) for line in gzip.decompress(body.read()).splitlines()]


def test_without_options_all_objects_are_done_despite_the_faults() -> None:
    """It starts its own store, fills it, rewrites every object, and finds each one's counterpart."""
    done = run(f"--objects={OBJECTS}", "--latency=0.001", "--slow-downs=0", "--errors=0.1", "--drops=0.05")
    assert done.stdout.splitlines()[0] == f"read {OBJECTS} = done {OBJECTS} + failed 0 + left 0"
    assert done.stdout.splitlines()[-1] == f"{OBJECTS} objects below in/, 0 without a counterpart below out/"
    assert (done.returncode, done.stderr) == (0, "")


def test_another_store_is_used_filled_and_read_again(service: EmbeddedS3, s3: S3Client) -> None:
    """Each object holds the records that were put, cleaned up; a second run without filling does the same again."""
    flags = (f"--endpoint-url={service.url}", "--bucket=mine")
    assert run(*flags, "--fill", f"--objects={OBJECTS}").returncode == 0
    again = run(*flags)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith(f"read {OBJECTS} = done {OBJECTS} + failed 0")
    assert service.stats()["requests"]["PutObject"] == 3 * OBJECTS
    assert list(s3_transform.list_keys(s3_transform.Store("mine", options_of(service)), "out/")) == [
        f"out/{number:06}.jsonl" for number in range(OBJECTS)
    ]
    for number in (0, OBJECTS - 1):
        expected = list(make_records(s3_transform.RECORDS_EACH, seed=number))
        assert content(s3, "mine", f"out/{number:06}.jsonl") == expected


def test_an_object_that_cannot_be_rewritten_is_reported_and_costs_the_exit_status(
    service: EmbeddedS3, s3: S3Client
) -> None:
    """The others are done all the same."""
    s3.create_bucket(Bucket="broken")
    s3.put_object(Bucket="broken", Key="in/1", Body=b'{"name": " Ada "}')
    s3.put_object(Bucket="broken", Key="in/2", Body=b"no JSON")
    done = run(f"--endpoint-url={service.url}", "--bucket=broken")
    assert done.returncode == 1
    assert done.stdout.startswith("read 2 = done 1 + failed 1 + left 0, 1 permanent")
    assert "1 x JSONDecodeError" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 objects below in/, 1 without a counterpart below out/"
    assert content(s3, "broken", "out/1") == [{"name": "Ada"}]


def test_counterparts_are_found_whatever_else_is_there(service: EmbeddedS3, s3: S3Client) -> None:
    """Results of earlier runs, before, between and behind, neither count nor hide what is missing."""
    store = s3_transform.Store("compared", options_of(service))
    s3.create_bucket(Bucket=store.bucket)
    assert s3_transform.list_both(store) == (0, 0)
    for key in ("in/b", "in/c", "in/d", "in/e", "out/a", "out/c", "out/cc", "out/d"):
        s3.put_object(Bucket=store.bucket, Key=key, Body=b"")
    assert s3_transform.list_both(store) == (4, 2)
    s3.put_object(Bucket=store.bucket, Key="out/z", Body=b"")
    assert s3_transform.list_both(store) == (4, 2)


@pytest.mark.parametrize(
    ("there", "message"), [(True, "NoSuchBucket"), (False, "Could not connect")], ids=["no bucket", "no store"]
)
def test_a_store_that_cannot_be_listed_is_named(service: EmbeddedS3, there: bool, message: str) -> None:
    """One line, no traceback, status 1."""
    url = service.url if there else "http://127.0.0.1:1"
    done = run(f"--endpoint-url={url}", "--bucket=nobody")
    assert done.returncode == 1
    assert re.fullmatch(rf"s3_transform\.py: error: .*{message}.*\n", done.stderr)


def test_a_missing_boto3_is_told_with_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "botocore.py").write_text("raise ImportError('as if it were not installed')\n")
    done = run(PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 's3_transform.py: error: needs boto3. Write: pip install "penstock[aws]"\n'


@pytest.mark.parametrize("flags", [("--objects=0",), ("--objects=ten",), ("--errors=2",), ("--nonsense",)])
def test_wrong_use_is_refused_before_anything_starts(flags: tuple[str, ...]) -> None:
    done = run(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: s3_transform.py")
