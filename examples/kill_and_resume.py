"""Kill a run every few seconds, start it again each time, and prove that nothing was lost.

It starts a service, and a run of 20,000 records in a process of its own, which is killed by `kill -9` every three
seconds and started again, with nothing but its journal to tell it what was done before.

    python examples/kill_and_resume.py
    python examples/kill_and_resume.py --records 5000 --every 1.5
    python examples/kill_and_resume.py --every 0.7 --rounds 100 --errors 0.05

The program that survives this is the function `score_all`: a resumable script needs no more than that. Everything else
here is the one who kills, and the proof, which does not take the program's word: what is recorded is read from the
journal, which is an SQLite database, and what was asked from the service's log.

A record whose job ran when the kill came is not recorded, so its requests are made again by the next process: these are
the repeated calls. They belong to jobs that were in flight, which `limit=` bounds, or that had ended within the last
commit interval, which is 200 ms. Where a request is worth more than that, `penstock.step` records it by itself.

Exit status: 0 all records are recorded, once, as their service answered; 1 they are not, or wrong use.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import penstock
from records import Record, key_of, make_records
from service import EmbeddedService, add_service_flags, config_from

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from service import Call

DONE, FAILED = 1, 2
"""In the journal's column `state`."""

RECORDS = 20_000
EVERY = 3.0
ROUNDS = 25


# --- the run, in a process that may be killed ---


def score_all(url: str, journal: str, records: Iterable[Record]) -> penstock.Report:
    @penstock.job
    async def scoring() -> AsyncIterator[Callable[[Record], Awaitable[str]]]:
        async with penstock.HttpClient(url) as api:

            async def score(record: Record) -> str:
                profile = await api.get_json("/api1", params=record)
                answer = await api.post_json("/api2", json=profile, idempotent=True)
                return str(answer["key"])

            yield score

    return penstock.run(scoring, records, key=itemgetter("id"), journal=journal)


# --- the one who kills ---


class Killed(NamedTuple):
    """What is known when the last process has ended."""

    kills: int
    seen: set[int]
    """Records that were recorded at the time of some kill."""


def kill_and_resume(command: list[str], journal: Path, *, every: float, rounds: int, records: int) -> Killed:
    """Run `command` again and again, until it ends by itself; after `rounds` kills it is left alone."""
    seen: set[int] = set()
    for kills in range(rounds + 1):
        with subprocess.Popen(command) as process:
            try:
                status = process.wait(every if kills < rounds else None)
            except subprocess.TimeoutExpired:
                process.kill()
            except BaseException:
                process.kill()
                raise
            else:
                if status not in (0, 5):
                    raise Unproven(f"the run has ended by itself, with exit status {status}")
                return Killed(kills, seen)
        seen |= {row.key for row in recorded(journal)}
        print(f"killed after {every:g} s: {len(seen):,} of {records:,} recorded", flush=True)
    raise AssertionError("the last one is waited for")


# --- the proof ---


class Unproven(Exception):
    """Something was lost, or is there twice."""


class Recorded(NamedTuple):
    """A row of the journal."""

    key: int
    state: int
    result: Any


def recorded(journal: Path) -> list[Recorded]:
    """What the journal holds. A look, which changes nothing: what a kill left there is the next process's."""
    if not journal.exists():
        return []
    with closing(sqlite3.connect(f"{journal.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT key, state, result FROM item").fetchall()
    return [Recorded(key, state, None if result is None else json.loads(result)) for key, state, result in rows]


def prove(killed: Killed, found: list[Recorded], calls: list[Call], keys: dict[int, str]) -> str:
    """One line on what was found. `keys` has what must be recorded of each record.

    Raises:
        Unproven: it is not as it should be.
    """
    times = Counter(row.key for row in found)
    lost = killed.seen - times.keys()
    states = Counter(row.state for row in found if row.key in keys)
    wrong = sum(row.state == DONE and row.result != keys.get(row.key) for row in found)
    asked = Counter((call.route, call.record_id) for call in calls if call.ending == "answer")
    repeated = sum(asked.values()) - len(asked)
    once = sum(times[key] == 1 for key in keys)
    account = (
        f"{killed.kills} kills: {once:,} of {len(keys):,} records are recorded exactly once "
        f"({states[DONE]:,} done, {states[FAILED]:,} failed), {len(lost):,} lost, {wrong:,} with a wrong result; "
        f"{repeated:,} of {sum(asked.values()):,} calls were repeated"
    )
    if not once == len(found) == len(keys) or lost or wrong:
        raise Unproven(account)
    return account


# --- the command line ---


class Parser(argparse.ArgumentParser):
    """argparse, with exit status 1 for wrong use."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def make_parser() -> Parser:
    parser = Parser(description="Kill a run every few seconds, and prove that nothing was lost.", allow_abbrev=False)
    parser.add_argument("--records", type=at_least_one, default=RECORDS, help=f"to score (default: {RECORDS})")
    parser.add_argument("--every", type=seconds, default=EVERY, help=f"seconds between two kills (default: {EVERY:g})")
    parser.add_argument("--rounds", type=at_least_one, default=ROUNDS, help=f"kills at most (default: {ROUNDS})")
    parser.add_argument("--run", nargs=2, metavar=("URL", "JOURNAL"), help=argparse.SUPPRESS)
    add_service_flags(parser, without=("host", "port", "log"))
    return parser


def run(flags: argparse.Namespace) -> int:
    """What is killed. It leaves nothing behind but its journal."""
    logging.getLogger("penstock.jobs").setLevel(logging.ERROR)  # failures are in the journal
    url, journal = flags.run
    report = score_all(url, journal, make_records(flags.records, flags.seed))
    report.verify()
    return report.exit_code


def kill_and_prove(parser: Parser, flags: argparse.Namespace, folder: str) -> int:
    journal = Path(folder) / "run.db"
    keys = {int(record["id"]): key_of(record) for record in make_records(flags.records, flags.seed)}
    with EmbeddedService(replace(config_from(parser, flags), log=True)) as service:
        command = [sys.executable, __file__, f"--records={flags.records}", f"--seed={flags.seed}"]
        command += ["--run", service.url, str(journal)]
        killed = kill_and_resume(command, journal, every=flags.every, rounds=flags.rounds, records=flags.records)
        print(prove(killed, recorded(journal), service.calls(), keys))
    return 0


def main() -> int:
    parser = make_parser()
    flags = parser.parse_args()
    try:
        if flags.run is not None:
            return run(flags)
        with tempfile.TemporaryDirectory() as folder:
            return kill_and_prove(parser, flags, folder)
    except (Unproven, penstock.JournalError) as error:
        print(f"kill_and_resume.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
