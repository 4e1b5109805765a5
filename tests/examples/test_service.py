"""The example service is what its configuration says, and the usual program runs against it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import aiohttp
import pytest

from records import Record, key_of, make_records, profile_of, scored
from service import EmbeddedService, Quota, ServiceConfig, add_service_flags, config_from, fate_of, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

EXAMPLES = Path(__file__).parents[2] / "examples"
BOUND = 10.0

QUIET = ServiceConfig(latency=0.0, errors=0.0, drops=0.0)
FAULTY = ServiceConfig(latency=0.001, errors=0.2, drops=0.1, malformed=0.1, seed=7)


class Client:
    """Asks the service and says what became of each request."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def api1(self, record: Record) -> Any:
        async with self._session.get("/api1", params=record) as response:
            return await response.json()

    async def api2(self, record: Record) -> Any:
        async with self._session.post("/api2", json={**record, "profile": profile_of(record)}) as response:
            return await response.json()

    async def stats(self) -> Any:
        async with self._session.get("/stats") as response:
            return await response.json()

    async def status(self, method: str, path: str, **keywords: Any) -> tuple[int, Mapping[str, str], Any]:
        async with self._session.request(method, path, **keywords) as response:
            return response.status, response.headers, await response.json()

    async def ending(self, record: Record) -> str:
        # A POST, since aiohttp asks again by itself when the connection of a GET is dropped.
        try:
            body = {**record, "profile": profile_of(record)}
            async with self._session.post("/api2", json=body, raise_for_status=True) as response:
                await response.json()
        except aiohttp.ClientResponseError:
            return "error"
        except aiohttp.ClientConnectionError:
            return "drop"
        except json.JSONDecodeError:
            return "malformed"
        return "answer"

    async def endings(self, records: Iterable[Record], *, concurrency: int) -> dict[Any, list[str]]:
        """Ask twice about every record."""
        found: dict[Any, list[str]] = {}
        pending = iter(records)

        async def work() -> None:
            for record in pending:
                found[record["id"]] = [await self.ending(record), await self.ending(record)]

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return found


@asynccontextmanager
async def serving(config: ServiceConfig) -> AsyncIterator[Client]:
    stop = asyncio.Event()
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(config, stop, started.set_result))
    try:
        url = await asyncio.wait_for(started, BOUND)
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(BOUND)) as session:
            yield Client(session)
    finally:
        stop.set()
        await server


async def test_answers_are_a_function_of_the_record() -> None:
    """Both routes answer every record with what `records` derives from it, and ask after ask the same."""
    async with serving(QUIET) as client:
        for record in make_records(5):
            echoed = {name: str(value) for name, value in record.items()}
            assert await client.api1(record) == {**echoed, "profile": profile_of(record)}
            assert await client.api2(record) == await client.api2(record) == scored(record)
            assert (await client.api2(record))["key"] == key_of(record)


def test_records_and_keys_are_reproducible_and_distinct() -> None:
    """The same seed gives the same records, another seed others; no two records share a key."""
    records = list(make_records(1000, seed=3))
    assert records == list(make_records(1000, seed=3)) != list(make_records(1000, seed=4))
    assert len({key_of(record) for record in records}) == 1000


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api1?name=Ada", None),
        ("POST", "/api2", b""),
        ("POST", "/api2", b"{"),
        ("POST", "/api2", b"\xff"),
        ("POST", "/api2", b"[" * 100_000),
        ("POST", "/api2", b"[1]"),
        ("POST", "/api2", b" " * 2**20),
        ("POST", "/api2", b'{"name": "Ada"}'),
        ("POST", "/api2", b'{"id": 1, "profile": {"segment": "of another"}}'),
    ],
)
async def test_a_bad_record_is_answered_400_with_a_json_error(method: str, path: str, body: bytes | None) -> None:
    """A missing, unreadable or mixed-up record gets 400 and a JSON body that says why."""
    async with serving(QUIET) as client:
        status, _, answer = await client.status(method, path, data=body)
        assert status == 400
        assert answer["error"]


async def test_the_same_seed_gives_the_same_faults_at_any_concurrency() -> None:
    """What becomes of each request is decided by seed, route, record and repetition, never by arrival."""
    records = list(make_records(150))
    runs = []
    for concurrency in (1, 50):
        async with serving(FAULTY) as client:
            runs.append(await client.endings(records, concurrency=concurrency))
    expected = {
        record["id"]: [fate_of(FAULTY, "/api2", str(record["id"]), nth).ending for nth in (0, 1)] for record in records
    }
    assert runs == [expected, expected]
    assert {ending for pair in expected.values() for ending in pair} == {"answer", "error", "drop", "malformed"}


def test_the_shares_are_those_of_the_configuration() -> None:
    """Over many records each fault has its share, and latency stays within its jitter."""
    config = ServiceConfig(errors=0.1, drops=0.05, malformed=0.1, slow_body=0.2)
    fates = [fate_of(config, "/api1", str(number), 0) for number in range(20_000)]
    count = Counter(fate.ending for fate in fates)
    share = {ending: count[ending] / len(fates) for ending in count}
    expected = {"error": 0.1, "drop": 0.05, "malformed": 0.85 * 0.1, "slow": 0.85 * 0.2, "answer": 0.85 * 0.7}
    assert share == pytest.approx(expected, abs=0.01)
    latencies = [fate.latency for fate in fates]
    assert 0.040 <= min(latencies) < 0.041
    assert 0.059 < max(latencies) <= 0.060


async def test_every_request_is_counted_once() -> None:
    """Replies by status and dropped connections add up to the requests, also when some are dropped."""
    async with serving(FAULTY) as client:
        found = await client.endings(make_records(100), concurrency=20)
        stats = await client.stats()
    endings = [ending for pair in found.values() for ending in pair]
    assert stats["requests"] == {"/api1": 0, "/api2": 200}
    assert stats["dropped"] == endings.count("drop") > 0
    assert stats["replies"] == {
        "200": endings.count("answer") + endings.count("malformed"),
        "503": endings.count("error"),
    }
    assert 1 < stats["peak_in_flight"] <= 20
    assert (stats["in_flight"], stats["hung_up"]) == (0, 0)


async def test_the_quota_answers_429_with_retry_after() -> None:
    """Over the quota the answer is 429 and says in whole seconds, rounded up, when to come back."""
    async with serving(ServiceConfig(latency=0.0, errors=0.0, drops=0.0, quota=0.4, burst=2)) as client:
        replies = [await client.status("GET", "/api1?id=1") for _ in range(3)]
    assert [status for status, _, _ in replies] == [200, 200, 429]
    assert replies[2][1]["Retry-After"] == "3"


def test_a_quota_gives_its_burst_then_its_rate() -> None:
    """A token bucket: the burst at once, then one request per interval, and never more than the burst saved up."""
    quota = Quota(rate=10, burst=2)
    assert [quota.take(0.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(0.1)]
    assert quota.take(0.1) == 0.0
    assert [quota.take(100.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(0.1)]


async def test_the_quota_is_told_in_headers_only_if_told_to() -> None:
    """Each answer of the counted routes says what is left, and when all is there again; /stats never."""
    config = ServiceConfig(latency=0.0, errors=0.0, drops=0.0, quota=0.4, burst=2, quota_headers=True)
    async with serving(config) as client:
        replies = [await client.status("GET", path) for path in ("/api1?id=1", "/api1?id=1", "/api1?id=1", "/stats")]
    assert [status for status, _, _ in replies] == [200, 200, 429, 200]
    told = [(headers.get("RateLimit-Policy"), headers.get("RateLimit")) for _, headers, _ in replies]
    policy = '"default";q=2;w=5'
    assert told == [(policy, f'"default";r={left};t={t}') for left, t in ((1, 3), (0, 5), (0, 5))] + [(None, None)]
    async with serving(ServiceConfig(latency=0.0, errors=0.0, drops=0.0, quota=0.4, burst=2)) as client:
        assert "RateLimit" not in (await client.status("GET", "/api1?id=1"))[1]


def test_what_a_quota_tells_is_true_between_the_requests_too() -> None:
    quota = Quota(rate=10, burst=20)
    assert quota.headers(0.0)["RateLimit"] == '"default";r=20;t=0'
    quota.take(0.0)
    assert quota.headers(0.05) == {"RateLimit-Policy": '"default";q=20;w=2', "RateLimit": '"default";r=19;t=1'}
    assert quota.headers(100.0)["RateLimit"] == '"default";r=20;t=0'


@pytest.mark.parametrize("config", [QUIET, ServiceConfig(quota=5.0, quota_headers=True, log=True)])
def test_the_flags_of_a_configuration_give_it_back(config: ServiceConfig) -> None:
    parser = argparse.ArgumentParser()
    add_service_flags(parser)
    assert config_from(parser, parser.parse_args(config.as_flags())) == config


async def test_a_503_says_when_to_come_back_only_if_told_to() -> None:
    """Without a setting a 503 has no Retry-After; with one it has, in whole seconds."""
    for retry_after, expected in ((0.0, None), (1.2, "2")):
        async with serving(ServiceConfig(latency=0.0, errors=1.0, drops=0.0, retry_after=retry_after)) as client:
            status, headers, _ = await client.status("GET", "/api1?id=1")
        assert (status, headers.get("Retry-After")) == (503, expected)


async def test_the_knee_limits_how_many_are_served_at_once() -> None:
    """Beyond the knee requests queue: all are answered, never more than the knee are served at a time."""
    async with serving(ServiceConfig(latency=0.005, errors=0.0, drops=0.0, knee=3)) as client:
        await asyncio.gather(*(client.api1(record) for record in make_records(30)))
        stats = await client.stats()
    assert stats["replies"] == {"200": 30}
    assert stats["peak_serving"] == 3
    assert stats["peak_in_flight"] > 3


async def test_a_slow_body_arrives_whole_after_its_time() -> None:
    """A dripping body takes as long as it is told to, and is complete."""
    async with serving(ServiceConfig(latency=0.0, errors=0.0, drops=0.0, slow_body=1.0, drip=0.1)) as client:
        start = asyncio.get_running_loop().time()
        (record,) = make_records(1)
        assert await client.api2(record) == scored(record)
        assert asyncio.get_running_loop().time() - start >= 0.09


async def test_a_client_that_hangs_up_is_counted_as_such() -> None:
    """An answer that nobody waits for any more is not a reply."""
    async with serving(ServiceConfig(latency=0.2, errors=0.0, drops=0.0, knee=1)) as client:
        asked = asyncio.create_task(client.api1({"id": 1}))
        while (await client.stats())["in_flight"] == 0:
            pass
        asked.cancel()
        # The knee serves one at a time: this answer comes after the one that found nobody.
        await client.api1({"id": 2})
        stats = await client.stats()
    assert (stats["hung_up"], stats["replies"]) == (1, {"200": 1})


def test_the_configuration_is_a_plain_value() -> None:
    """It survives pickling, and nonsense is refused where it is written."""
    assert pickle.loads(pickle.dumps(FAULTY)) == FAULTY
    with pytest.raises(ValueError, match="errors"):
        ServiceConfig(errors=1.5)
    with pytest.raises(ValueError, match="together"):
        ServiceConfig(errors=0.6, drops=0.6)
    with pytest.raises(ValueError, match="latency"):
        ServiceConfig(latency=-1)


def test_the_log_tells_each_request_in_the_order_of_arrival() -> None:
    """Route, record, who asked and how it ended; none that is about no record; from wherever one has read to."""
    with EmbeddedService(replace(QUIET, log=True)) as service:
        for number, caller in ((7, "one"), (8, "two"), (7, "two")):
            request = Request(f"{service.url}/api1?id={number}", headers={"User-Agent": caller})
            urlopen(request, timeout=BOUND).close()
        with pytest.raises(HTTPError, match="400") as refused:
            urlopen(f"{service.url}/api1", timeout=BOUND)
        refused.value.close()
        calls = service.calls()
        assert [call[1:] for call in calls] == [
            ("/api1", "7", "one", "answer"),
            ("/api1", "8", "two", "answer"),
            ("/api1", "7", "two", "answer"),
        ]
        assert calls == sorted(calls)
        assert service.calls(2) == calls[2:]
        assert service.calls(3) == []


def test_no_log_is_kept_unless_it_is_asked_for() -> None:
    """A service that runs for long must not fill the memory."""
    with EmbeddedService(QUIET) as service, pytest.raises(RuntimeError, match="--log"):
        service.calls()


def refuses_connections(url: str) -> bool:
    address = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((str(address.hostname), int(address.port or 0))) != 0


def test_the_embedded_service_runs_in_another_process_and_ends_with_its_block() -> None:
    """It has a pid, a URL and CPU time of its own; after the block nothing listens and nothing runs."""
    with EmbeddedService(QUIET) as service:
        url, pid = service.url, service.pid
        assert pid != os.getpid()
        used = service.cpu_time()
        for record in make_records(20):
            urlopen(f"{url}/api1?id={record['id']}", timeout=BOUND).close()
        assert service.cpu_time() > used > 0
        assert service.stats()["requests"]["/api1"] == 20
    assert refuses_connections(url)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="not running"):
        service.stats()


def test_the_embedded_service_survives_an_interrupt() -> None:
    """Ctrl-C is the client's: neither its process group nor the signal itself reaches the service."""
    with EmbeddedService(QUIET) as service:
        assert os.getpgid(service.pid) != os.getpgid(0)
        os.kill(service.pid, signal.SIGINT)
        with urlopen(f"{service.url}/api1?id=1", timeout=BOUND) as response:
            assert response.status == 200


def test_the_embedded_service_says_that_it_cannot_start(capfd: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is an error in the parent, not a wait."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServiceConfig(port=taken.getsockname()[1])
        with pytest.raises(RuntimeError, match="did not start"), EmbeddedService(config):
            pass
    assert "cannot serve on 127.0.0.1" in capfd.readouterr().err


def test_the_embedded_service_dies_with_its_parent() -> None:
    """A parent that is killed has no time to stop its service: it stops by itself."""
    program = (
        "import signal; from service import EmbeddedService\n"
        "with EmbeddedService() as service: print(service.url, flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        with urlopen(f"{url}/stats", timeout=BOUND) as response:
            assert response.status == 200
        parent.kill()
        # The service shares its parent's stderr: only when both have ended does it end, which this waits for.
        assert parent.communicate(timeout=BOUND) == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_prints_its_url_and_ends_cleanly_on_a_signal(number: signal.Signals) -> None:
    """The first line is the URL, a signal ends it with status 0, and it has said nothing else."""
    command = [sys.executable, str(EXAMPLES / "service.py"), "--latency=0", "--errors=0", "--drops=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urlopen(f"{url}/api1?id=1", timeout=BOUND) as response:
            assert response.status == 200
        process.send_signal(number)
        assert process.communicate(timeout=BOUND) == ("", "")
        assert process.returncode == 0


def test_the_usual_program_accounts_for_all_its_jobs() -> None:
    """Done and failed add up to the jobs, and both are what the seed decides."""
    flags = ["--jobs=50", "--threads=8", "--latency=0.002", "--errors=0.1", "--drops=0.02", "--seed=3", "--json"]
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "threads_baseline.py"), *flags],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=True,
    )
    config = ServiceConfig(errors=0.1, drops=0.02, seed=3)
    expected = sum(
        all(fate_of(config, route, str(number), 0).ending == "answer" for route in ("/api1", "/api2"))
        for number in range(1, 51)
    )
    summary = json.loads(run.stdout.splitlines()[-1])
    assert (summary["jobs"], summary["done"], summary["failed"]) == (50, expected, 50 - expected)
    assert summary["elapsed"] > 0
    assert summary["jobs_per_second"] > 0
    assert summary["cpu_seconds"] > 0
    assert run.stdout.count("record ") == summary["failed"]
    assert run.stderr == ""
