"""The program that the tests beside it kill: a run with a journal, which tells each outcome as it is delivered.

    python program_to_kill.py http://127.0.0.1:8080 run.db --items 1000 --name life-1

Standard output: "begin"; then one line for each outcome, flushed: key, state, "fresh" or "replayed"; then the account
as one line of JSON. Every 50th item is skipped by its job, without a request. The service knows each life of the
program by its name.

Exit status: that of the report; 1 with the text of a `JournalError` on standard error; 130 after a Ctrl-C.
"""

# ruff: noqa: T201  # programs print

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import penstock
from penstock.journal import database, recording

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Work = Callable[[int], Awaitable[Any]]

RETRY = penstock.Retry(attempts=4)
SKIPS = 50


def one_trip(api: penstock.HttpClient) -> Work:
    async def ask(number: int) -> Any:
        if number % SKIPS == 0:
            raise penstock.SkipItem("there is nothing to ask")
        return await api.get_json("/api1", params={"id": number})

    return ask


def three_steps(api: penstock.HttpClient) -> Work:
    """Each step is to be found in the service's log: by its route, or by what it makes of the id."""

    async def profile(number: int) -> Any:
        return await api.get_json("/api1", params={"id": number})

    async def score(found: Any) -> Any:
        return await api.post_json("/api2", json=found, idempotent=True)

    async def check(number: int, key: str) -> Any:
        return await api.get_json("/api1", params={"id": f"{number}/check", "key": key})

    async def go_through(number: int) -> Any:
        found = await penstock.step("profile", profile, number)
        scored = await penstock.step("score", score, found)
        checked = await penstock.step("check", check, number, scored["key"])
        return checked["key"]

    return go_through


WORK = {"one_trip": one_trip, "three_steps": three_steps}


def client(flags: argparse.Namespace) -> penstock.HttpClient:
    # Its limit is given: one that is measured begins small, in each life anew.
    return penstock.HttpClient(flags.url, limit=flags.limit, retry=RETRY, headers={"User-Agent": flags.name})


async def read_outcomes(flags: argparse.Namespace) -> int:
    items = range(1, flags.items + 1)
    async with client(flags) as api, penstock.Executor(limit=flags.limit) as executor:
        work = WORK[flags.work](api)
        async with executor.as_completed(work, items, key=int, journal=flags.journal) as stream:
            async for outcome in stream:
                tell(outcome)
        counts = stream.statistics()
    print(json.dumps({"read": counts.read, "finished": counts.finished, "left": counts.left}))
    return 0


def tell(outcome: penstock.Outcome[Any]) -> None:
    state = "done" if outcome.ok else "dead" if outcome.kind is not None else "skipped"
    print(outcome.key, state, "replayed" if outcome.replayed else "fresh", flush=True)


def run(flags: argparse.Namespace) -> int:
    @penstock.job
    async def working() -> AsyncIterator[Work]:
        async with client(flags) as api:
            yield WORK[flags.work](api)

    report = penstock.run(
        working,
        range(1, flags.items + 1),
        key=int,
        limit=flags.limit,
        drain_timeout=flags.drain_timeout,
        journal=flags.journal,
    )
    report.verify()
    names = ("read", "done", "failed", "skipped", "left", "replayed", "stopped")
    print(json.dumps({name: getattr(report, name) for name in names}))
    return report.exit_code


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("url")
    parser.add_argument("journal")
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--name", required=True)
    parser.add_argument("--work", choices=WORK, default="one_trip")
    parser.add_argument("--report", action="store_true", help="by penstock.run, which tells no outcomes")
    parser.add_argument("--drain-timeout", type=float)
    parser.add_argument("--busy-timeout", type=float, default=database.BUSY_TIMEOUT)
    parser.add_argument("--held-for", type=float, default=recording.HELD_FOR)
    flags = parser.parse_args()
    database.BUSY_TIMEOUT, recording.HELD_FOR = flags.busy_timeout, flags.held_for
    logging.getLogger("penstock.jobs").setLevel(logging.CRITICAL)  # which jobs have failed is in the journal
    print("begin", flush=True)
    try:
        return run(flags) if flags.report else asyncio.run(read_outcomes(flags))
    except penstock.JournalError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
