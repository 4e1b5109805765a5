"""A thread program; the same one with an import changed; then with its requests made async. Which is how fast?

Each program makes two round trips for each record and takes a key from the last answer. They share one loop of `submit`
and `as_completed`, and one service, which is started for them and takes 50 ms for an answer.

    python examples/drop_in.py
    python examples/drop_in.py --records 2000 --workers 16 --latency 0.02

The second program differs from the first in nothing but this, so it has as many threads and much the same speed:

    -from concurrent.futures import ThreadPoolExecutor, as_completed
    +from concurrent.futures import as_completed
    +from penstock import BridgeExecutor as ThreadPoolExecutor

In the third one `score` is a coroutine function. No number of threads holds it back, nor any other number that somebody
guessed: how many requests the service can take at once is measured, and what can be repeated is retried.

The first two need `requests`; without it they are left out.

Exit status: 0 every program has got the key of every record; 1 some key is missing; 2 wrong use.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, NamedTuple

from penstock import BridgeExecutor, HttpClient
from records import Record, key_of, make_records
from service import EmbeddedService, config_from

try:
    import requests
except ImportError:
    requests = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDS = 300
WORKERS = 8
LATENCY = 0.05
TIMEOUT = 30.0


# --- the programs ---


def with_threads(pool: Callable[[int], Executor], workers: int, base_url: str, records: list[Record]) -> int:
    """The usual program, whatever the pool's class: a shared session, and a thread for each record in flight."""
    with requests.Session() as session, pool(workers) as executor:
        # Without this the session throws connections away beyond its ten, and warns about each.
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=max(10, workers)))

        def ask(method: str, path: str, **keywords: Any) -> Any:
            response = session.request(method, base_url + path, timeout=TIMEOUT, **keywords)
            response.raise_for_status()
            return response.json()

        def score(record: Record) -> str:
            profile = ask("GET", "/api1", params=record)
            answer = ask("POST", "/api2", json=profile)
            return str(answer["key"])

        return collect(executor, score, records)


def with_coroutines(base_url: str, records: list[Record]) -> int:
    """The same with async requests. The client is opened on the bridge's loop, where `score` runs, too."""
    api = HttpClient(base_url)
    with BridgeExecutor() as bridge, bridge.open(api):

        async def score(record: Record) -> str:
            profile = await api.get_json("/api1", params=record)
            answer = await api.post_json("/api2", json=profile, idempotent=True)
            return str(answer["key"])

        return collect(bridge, score, records)


def collect(executor: Executor, score: Callable[[Record], Any], records: list[Record]) -> int:
    """The loop of all three: it does not know which executor this is, nor what kind of function `score`."""
    done = 0
    futures = {executor.submit(score, record): record for record in records}
    for future in as_completed(futures):
        record = futures[future]
        error = future.exception()
        if error is not None:
            print(f"record {record['id']}: {error!r}", file=sys.stderr)
        elif future.result() != key_of(record):
            print(f"record {record['id']}: the key of another one: {future.result()}", file=sys.stderr)
        else:
            done += 1
    return done


# --- their speeds ---


class Speed(NamedTuple):
    """What a program has done, and in how many seconds."""

    name: str
    done: int
    elapsed: float

    @property
    def per_second(self) -> float:
        return self.done / self.elapsed


def timed(name: str, program: Callable[..., int], *arguments: Any) -> Speed:
    start = time.perf_counter()
    done = program(*arguments)
    return Speed(name, done, time.perf_counter() - start)


def run_all(base_url: str, records: list[Record], workers: int) -> list[Speed]:
    speeds = []
    if requests is None:
        print("requests is not installed: the two programs with threads are left out (pip install requests)")
    else:
        for pool in (ThreadPoolExecutor, BridgeExecutor):
            name = f"{pool.__name__}({workers}), requests"
            speeds.append(timed(name, with_threads, pool, workers, base_url, records))
    speeds.append(timed("BridgeExecutor(), HttpClient", with_coroutines, base_url, records))
    return speeds


def print_speeds(speeds: list[Speed], records: int) -> None:
    first = speeds[0].per_second
    for speed in speeds:
        ratio = f"{speed.per_second / first:6.2f} x" if first else ""
        print(
            f"{speed.name:33} {speed.done} of {records} done in {speed.elapsed:.2f} s: "
            f"{speed.per_second:7.1f} records/s {ratio}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Threads, a drop-in, and async requests.", allow_abbrev=False)
    parser.add_argument("--records", type=int, default=RECORDS, help=f"default: {RECORDS}")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"threads (default: {WORKERS})")
    parser.add_argument("--latency", type=float, default=LATENCY, help=f"seconds to an answer (default: {LATENCY})")
    parser.set_defaults(errors=0.0, drops=0.0)
    flags = parser.parse_args()
    if min(flags.records, flags.workers) < 1:
        parser.error("--records and --workers are at least 1")

    records = list(make_records(flags.records))
    with EmbeddedService(config_from(parser, flags)) as service:
        speeds = run_all(service.url, records, flags.workers)
    print_speeds(speeds, len(records))
    return 0 if all(speed.done == len(records) for speed in speeds) else 1


if __name__ == "__main__":
    sys.exit(main())
