"""The usual program: a pool of guessed size around one requests.Session, and a print in each except.

This is what penstock replaces, written the way it is usually written, for comparison with `two_step.py`. For each
record it asks `GET /api1`, posts the answer to `/api2`, counts the words of that answer and takes its key.

    python examples/threads_baseline.py --jobs 1000
    python examples/threads_baseline.py --base-url http://127.0.0.1:8080 --threads 32
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import requests

from records import Record, make_records
from service import EmbeddedService, ServiceConfig, add_service_flags, config_from

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT = 30.0


@dataclass
class Run:
    jobs: int
    done: int = 0
    failed: int = 0
    elapsed: float = 0.0
    cpu_seconds: float = 0.0
    round_trips: list[float] = field(default_factory=list)

    @property
    def jobs_per_second(self) -> float:
        return self.done / self.elapsed

    def percentile(self, share: float) -> float:
        ordered = sorted(self.round_trips)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def summary(self) -> dict[str, float]:
        return {
            "jobs": self.jobs,
            "done": self.done,
            "failed": self.failed,
            "elapsed": self.elapsed,
            "jobs_per_second": self.jobs_per_second,
            "cpu_seconds": self.cpu_seconds,
            "round_trip_p50": self.percentile(0.50),
            "round_trip_p99": self.percentile(0.99),
        }


def score(session: requests.Session, base_url: str, record: Record, run: Run) -> str:
    profile = exchange(session, run, "GET", f"{base_url}/api1", params=record)
    answer = exchange(session, run, "POST", f"{base_url}/api2", json=profile)
    Counter(answer["words"])
    return str(answer["key"])


def exchange(session: requests.Session, run: Run, method: str, url: str, **keywords: Any) -> Any:
    start = time.perf_counter()
    try:
        response = session.request(method, url, timeout=TIMEOUT, **keywords)
    finally:
        run.round_trips.append(time.perf_counter() - start)
    response.raise_for_status()
    return response.json()


def run_all(base_url: str, jobs: int, threads: int, seed: int) -> Run:
    run = Run(jobs)
    wall, cpu = time.perf_counter(), time.process_time()
    with requests.Session() as session, ThreadPoolExecutor(threads) as pool:
        # Without this the session throws connections away beyond its ten, and warns about each.
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=max(10, threads)))
        futures = {pool.submit(score, session, base_url, record, run): record for record in make_records(jobs, seed)}
        for future in as_completed(futures):
            try:
                future.result()
            except requests.HTTPError as error:
                print(f"record {futures[future]['id']}: {error}")
                run.failed += 1
            except requests.RequestException as error:
                print(f"record {futures[future]['id']}: no answer: {error}")
                run.failed += 1
            except (LookupError, TypeError) as error:
                print(f"record {futures[future]['id']}: not the answer expected: {error!r}")
                run.failed += 1
            else:
                run.done += 1
    run.elapsed, run.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return run


@contextlib.contextmanager
def chosen_service(base_url: str | None, config: ServiceConfig) -> Iterator[str]:
    if base_url is not None:
        yield base_url.rstrip("/")
        return
    with EmbeddedService(config) as service:
        yield service.url


def main() -> None:
    parser = argparse.ArgumentParser(description="The usual program that penstock replaces.", allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=1000, help="records to score (default: 1000)")
    parser.add_argument("--threads", type=int, default=(os.cpu_count() or 1) * 4, help="default: cores times four")
    parser.add_argument("--base-url", help="a service that runs already; else one is started for this run")
    parser.add_argument("--json", action="store_true", help="also print the summary as one line of JSON, the last one")
    add_service_flags(parser, without=("host", "port"))
    flags = parser.parse_args()

    with chosen_service(flags.base_url, config_from(parser, flags)) as base_url:
        run = run_all(base_url, flags.jobs, flags.threads, flags.seed)

    print(
        f"{run.done} done, {run.failed} failed of {run.jobs} in {run.elapsed:.2f} s: {run.jobs_per_second:.1f} jobs/s; "
        f"round trip p50 {run.percentile(0.50) * 1e3:.1f} ms, p99 {run.percentile(0.99) * 1e3:.1f} ms; "
        f"{flags.threads} threads, {run.cpu_seconds:.2f} s of CPU"
    )
    if flags.json:
        print(json.dumps(run.summary()))


if __name__ == "__main__":
    main()
