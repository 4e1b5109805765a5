"""Two round trips for each record, and an account of every record: the job that penstock is made for.

For each record it asks `GET /api1`, posts the answer to `/api2`, counts the words of that answer off the loop and takes
its key. Without options it makes 10,000 records and starts a service of its own, one that fails now and then.

    python examples/two_step.py
    python examples/two_step.py --errors 0.3 --output keys.jsonl
    python examples/two_step.py --knee 40
    python examples/two_step.py --quota 200 --quota-headers
    python examples/two_step.py --base-url http://127.0.0.1:8080 --input people.csv --output keys.jsonl
    python examples/two_step.py --journal run.db --output keys.jsonl

No limit is set: how many requests the service can take at once is measured, and the account at the end says what was
found, what requests waited for, and what held the run back.

The input is read and the output written as the run goes, so neither has to fit into memory. A record is known by its
`id`; one without is known by its line, as "line 17". Each outcome, good or bad, is one whole line of the output, on its
way to the disk before the next one is looked at: whatever ends this program, none is missing, and none is torn but by a
kill in the middle of that one write.

Ctrl-C takes no more records and finishes those in flight; a second one cancels them. Either way the sums are drawn.

With a journal, a run that was ended by anything, `kill -9` among it, goes on where it was: start it again as it was
started before. Records whose outcome is in the journal, good or bad, are not asked for again. Their outcomes come out
of it, so the output is written anew, and is complete once a run has come to its end. Keys must then be distinct, and
each a text or a number. The journal knows where its records come from, and refuses those of another input or seed.

Exit status: 0 all done; 1 wrong use, a malformed input line, an output or a journal that cannot be written; 5 some
records failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import penstock
from records import make_records
from service import EmbeddedService, add_service_flags, config_from

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from typing import BinaryIO

JOBS = 10_000
RETRY = penstock.Retry(attempts=4)


# --- the job ---


class Item(NamedTuple):
    """A record, and what it is known by."""

    key: object
    record: dict[str, Any]


def digest(answer: dict[str, Any]) -> dict[str, Any]:
    """What is wanted of an answer: stands for all work that would hold up the loop."""
    words = Counter(answer["words"])
    return {"key": answer["key"], "words": len(words)}


async def score_all(
    api: penstock.HttpClient, source: Source, output: Output, limit: int | None, journal: penstock.Journal | None
) -> Run:
    async def score(item: Item) -> dict[str, Any]:
        profile = await api.get_json("/api1", params=item.record)
        answer = await api.post_json("/api2", json=profile, idempotent=True)
        return await penstock.compute(digest, answer)

    run = Run()
    progress = penstock.ProgressLine(source.total)
    async with api, penstock.Executor(limit=limit, instruments=[progress]) as executor:
        with contextlib.closing(progress), ctrl_c_shuts_down(executor):
            async with executor.as_completed(score, source, key=attrgetter("key"), journal=journal) as stream:
                await collect(stream, output, run)
        run.ended_at = asyncio.get_running_loop().time()
    return run


async def collect(stream: penstock.Stream[penstock.Outcome[dict[str, Any]]], output: Output, run: Run) -> None:
    try:
        async for outcome in stream:
            report = report_of(outcome)
            output.write(report)
            run.count(outcome.kind, report, replayed=outcome.replayed)
    except penstock.ClosedError:
        run.stopped = True
    except BadInput as error:
        run.bad_input = error
    output.complete()
    run.left = stream.statistics().left


@contextlib.contextmanager
def ctrl_c_shuts_down(executor: penstock.Executor) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    shutdowns: list[asyncio.Task[None]] = []

    def shut_down() -> None:
        again = bool(shutdowns)
        shutdowns.append(loop.create_task(executor.shutdown(timeout=0.0 if again else None)))
        what = "cancelling it" if again else "finishing what is in flight; Ctrl-C again cancels it"
        print(f"\ninterrupted: {what}", file=sys.stderr)

    loop.add_signal_handler(signal.SIGINT, shut_down)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


# --- records in ---


class BadInput(Exception):
    """The input cannot be read, or has a line that is no record."""


class Source:
    """The records, counted where they are taken: the sums at the end must not rest on penstock's own count."""

    def __init__(self, items: Iterator[Item], *, total: int | None = None, waits: bool = False) -> None:
        self.taken = 0
        self.total = total
        self._items = items
        self._waits = waits

    async def __aiter__(self) -> AsyncIterator[Item]:
        if self._waits:
            async for item in penstock.pull_in_thread(self._items):
                self.taken += 1
                yield item
        else:
            for item in self._items:
                self.taken += 1
                yield item

    def take_rest(self) -> None:
        """Count what was not taken. What a pipe still holds, nobody knows."""
        for _ in () if self._waits else self._items:
            self.taken += 1


def item_of(record: dict[str, Any], number: int) -> Item:
    key = record.get("id")
    return Item(f"line {number}" if key in (None, "") else key, record)


def lines_of(name: str, file: BinaryIO) -> Iterator[str]:
    # Decoded one by one: a text file decodes ahead, and would refuse good lines for the sake of a later one.
    for number in itertools.count(1):
        try:
            line = file.readline().decode("utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            raise BadInput(f"{name}, line {number}: {error}") from None
        if not line:
            return
        yield line


def read_jsonl(name: str, file: BinaryIO) -> Iterator[Item]:
    for number, line in enumerate(lines_of(name, file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise BadInput(f"{name}, line {number}: expected a JSON object, found {line.strip():.50}")
        yield item_of(record, number)


def read_csv(name: str, file: BinaryIO) -> Iterator[Item]:
    rows = csv.reader(lines_of(name, file), strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise BadInput(f"{name}, line 1: two columns of the same name")
        for row in rows:
            if row and len(row) != len(header):
                raise BadInput(f"{name}, line {rows.line_num}: {len(row)} fields under {len(header)} column names")
            if row:
                yield item_of(dict(zip(header, row, strict=True)), rows.line_num)
    except csv.Error as error:
        raise BadInput(f"{name}, line {rows.line_num}: {error}") from None


READERS = {".jsonl": read_jsonl, ".csv": read_csv}


# --- outcomes out ---


class BadOutput(Exception):
    """The output cannot be written."""


class Output:
    """A file of whole lines. Each is one system call: some microseconds, and nothing is left behind in a buffer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not emptied yet: a run that its journal refuses, since another one is going on, must leave that one's output.
        self._file = open(path, "wb", buffering=0, opener=_without_emptying)  # noqa: SIM115  # closed by close()
        self._lines = self._size_bytes = 0

    def write(self, report: dict[str, Any]) -> None:
        if not self._lines:
            self.empty()
        line = json.dumps(report).encode() + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            # A full disk takes what fits: no line is better than half a line.
            with contextlib.suppress(OSError):
                self._file.truncate(self._size_bytes)
            raise BadOutput(f"{self._path}: {error.strerror}, after {self._lines} whole lines") from None
        self._lines += 1
        self._size_bytes += len(line)

    def empty(self) -> None:
        """Remove what an earlier run has left. The first line does so, too."""
        with contextlib.suppress(OSError):  # a pipe, or /dev/null
            self._file.truncate(0)

    def complete(self) -> None:
        """There are no more lines."""
        if not self._lines:
            self.empty()

    def close(self) -> None:
        self._file.close()


def _without_emptying(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def report_of(outcome: penstock.Outcome[dict[str, Any]]) -> dict[str, Any]:
    report = {"id": outcome.key, "ok": outcome.ok, "attempts": outcome.attempts}
    if outcome.ok:
        return report | outcome.unwrap()
    # What an earlier run has recorded names the class of the error itself.
    name = "" if isinstance(outcome.error, penstock.RecordedError) else f"{type(outcome.error).__name__}: "
    return report | {"kind": outcome.kind, "error": f"{name}{outcome.error}"}


# --- what held it back ---

A_FULL_CORE = 0.7
"""Of a core, used by this program over the whole run, its start and end among it: then its own speed bounds it."""
WORTH_NAMING = 0.25
"""Of the time, in which somebody waited at the gate: with less, the service was not what the run waited for."""
A_QUOTA_SHOWS = 0.05
"""Of the time, in which its rate or the pauses that it asks for were waited for."""


def usual_limit(seen: penstock.KeyStatistics, ended_at: float) -> int:
    """The limit below which it was for half of the time, and above which for the other half."""
    ends = [*(change.at for change in seen.changes[1:]), ended_at]
    spans = sorted((change.after, end - change.at) for change, end in zip(seen.changes, ends, strict=False))
    half = sum(span for _, span in spans) / 2
    passed = 0.0
    for limit, span in spans:
        passed += span
        if passed >= half:
            return limit
    return seen.limit


def found_by(seen: penstock.KeyStatistics) -> str:
    """What has taken most from the limit: "queue", "loss" or "server"; "growth" if it has only grown."""
    taken = {reason: lowered_by(seen, reason) for reason in ("queue", "loss", "server")}
    reason = max(taken, key=taken.__getitem__)
    return reason if taken[reason] > 0 else "growth"


def lowered_by(seen: penstock.KeyStatistics, reason: str) -> int:
    return sum(change.before - change.after for change in seen.changes if change.reason == reason)


def is_overloaded(seen: penstock.KeyStatistics, ended_at: float) -> bool:
    """Whether this program has kept its limits down for most of the time since the oldest change that is known."""
    if not seen.changes:
        return False
    ends = [*(change.at for change in seen.changes[1:]), ended_at]
    lowered = 0
    overloaded = 0.0
    for change, end in zip(seen.changes, ends, strict=True):
        lowered += change.before - change.after if change.reason == "guard" else 0
        overloaded += end - change.at if lowered > 0 else 0.0
    return 2 * overloaded > ended_at - seen.changes[0].at


def has_a_quota(seen: penstock.KeyStatistics, wall: float) -> bool:
    """Whether the service refuses what comes too fast, and says when to come back."""
    refused = seen.failed.get(penstock.FailureKind.THROTTLED, 0)
    paused = seen.waited.get("rate", 0.0) + seen.waited.get("pause", 0.0)
    return 2 * refused > sum(seen.failed.values()) and paused > A_QUOTA_SHOWS * wall


def held_back_by(seen: penstock.KeyStatistics, wall: float, cpu: float, ended_at: float) -> str:
    """One sentence on what a faster run would need."""
    limit = usual_limit(seen, ended_at)
    if seen.opened and not seen.succeeded:
        return "the service: it has never answered. Is the address right?"
    if cpu >= A_FULL_CORE:
        return "nothing: this machine's CPU"
    if is_overloaded(seen, ended_at):
        return "nothing: this machine's CPU or memory, which other programs may have taken"
    waits_for = max(seen.waited, key=seen.waited.__getitem__, default=None)
    if waits_for is None or sum(seen.waited.values()) < WORTH_NAMING * wall:
        return "nothing: too few records at once"
    if waits_for in ("rate", "pause") or (found_by(seen) == "loss" and has_a_quota(seen, wall)):
        return f"the service's quota ({seen.succeeded / wall:.0f}/s)"
    if waits_for == "breaker":
        return "the service's failures: for most of the time it was left alone"
    if waits_for == "processing":
        return "nothing: this machine's CPU, where answers wait to be processed"
    return {
        "queue": f"the service's knee (limit {limit})",
        "loss": f"its refusals and failures (limit {limit})",
        "server": f"the service's word on how many it takes at once ({limit})",
        "growth": f"nothing: too few records to find a limit (it has grown to {seen.limit})",
    }[found_by(seen)]


def print_findings(seen: penstock.KeyStatistics, wall: float, cpu: float, ended_at: float) -> None:
    baseline = "" if seen.baseline is None else f"; baseline {seen.baseline * 1e3:.0f} ms"
    print(f"  limit {usual_limit(seen, ended_at)}, found by {found_by(seen)}{baseline}")
    waited = sorted(seen.waited.items(), key=itemgetter(1), reverse=True)
    shares = ", ".join(f"{reason} {seconds / wall:.0%}" for reason, seconds in waited if seconds / wall >= 0.005)
    print(f"  waited for: {shares or 'nothing'}{' of the time' if shares else ''}")
    print(f"  held back by: {held_back_by(seen, wall, cpu, ended_at)}")


# --- the sums ---


@dataclass
class Run:
    """What became of the records, counted where the outcomes arrive."""

    ended: Counter[penstock.FailureKind | None] = field(default_factory=Counter)
    examples: dict[penstock.FailureKind | None, dict[str, Any]] = field(default_factory=dict)
    replayed: Counter[penstock.FailureKind | None] = field(default_factory=Counter)
    """Of those that ended: recorded by an earlier run."""
    left: int = 0
    stopped: bool = False
    bad_input: BadInput | None = None
    ended_at: float = 0.0
    """On the loop's clock, as the changes of a limit are."""

    def count(self, kind: penstock.FailureKind | None, report: dict[str, Any], *, replayed: bool) -> None:
        self.ended[kind] += 1
        self.replayed[kind] += replayed
        self.examples.setdefault(kind, report)

    @property
    def done(self) -> int:
        return self.ended[None]

    @property
    def failed(self) -> int:
        return self.ended.total() - self.done


class Usage(NamedTuple):
    """Clocks, of which differences are taken."""

    wall: float
    client: float
    service: float | None


def usage(service: EmbeddedService | None) -> Usage:
    return Usage(time.perf_counter(), time.process_time(), service.cpu_time() if service else None)


def count_what_is_left(run: Run, source: Source) -> None:
    taken = source.taken
    try:
        source.take_rest()
    except BadInput as error:
        run.bad_input = error
    run.left += source.taken - taken


def print_account(run: Run, source: Source, api: penstock.HttpClient, before: Usage, after: Usage) -> None:
    wall = after.wall - before.wall
    # Those of an earlier run have cost nothing, and nobody was asked for them.
    print(f"{run.done} done in {wall:.2f} s: {(run.done - run.replayed[None]) / wall:.1f} jobs/s")
    if run.replayed.total():
        print(f"{run.replayed.total()} of the outcomes are from the journal: recorded before, and not asked for again")
    for kind, report in run.examples.items():
        if kind is not None:
            print(f"{run.ended[kind]} failed ({kind}), as {report['id']!r} did: {report['error']}")
    for origin, seen in api.statistics().items():
        print(f"{origin}: {seen.attempts} requests, {seen.retries} of them retries", end="")
        if seen.succeeded:
            print(f"; round trip p50 {seen.latency.p50 * 1e3:.1f} ms, p99 {seen.latency.p99 * 1e3:.1f} ms", end="")
        print()
        print_findings(seen, wall, (after.client - before.client) / wall, run.ended_at)
    print(f"CPU: client {(after.client - before.client) / wall:.0%}", end="")
    if before.service is not None and after.service is not None:
        print(f", service {(after.service - before.service) / wall:.0%}", end="")
    print(" of a core")
    print(f"in {source.taken} = done {run.done} + failed {run.failed} + left {run.left}")


def exit_status(run: Run, source: Source) -> int:
    if source.taken != run.done + run.failed + run.left:
        return complain("the sums do not hold: a record was lost, or counted twice")
    status = 5 if run.failed else 0
    if run.bad_input is not None:
        status = complain(str(run.bad_input))
    return 130 if run.stopped or run.left else status


def complain(message: str) -> int:
    print(f"two_step.py: error: {message}", file=sys.stderr)
    return 1


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


def make_parser() -> Parser:
    parser = Parser(description="Two round trips for each record, and an account of every record.", allow_abbrev=False)
    records = parser.add_mutually_exclusive_group()
    records.add_argument("--jobs", type=at_least_one, default=JOBS, help=f"records to make (default: {JOBS})")
    records.add_argument("--input", type=Path, help="records to read: a .jsonl or .csv file, or - for JSONL from stdin")
    parser.add_argument("--output", type=Path, help="outcomes as JSONL, one line each; an existing file is replaced")
    parser.add_argument("--journal", type=Path, help="remembers outcomes: run again to go on after a kill")
    parser.add_argument("--limit", type=at_least_one, help="jobs that run at once (default: penstock's)")
    parser.add_argument("--base-url", help="a service that runs already; else one is started for this run")
    add_service_flags(parser, without=("host", "port", "log"))
    return parser


def open_source(parser: Parser, flags: argparse.Namespace, stack: contextlib.ExitStack) -> Source:
    path: Path | None = flags.input
    if path is None:
        return Source((item_of(record, 0) for record in make_records(flags.jobs, flags.seed)), total=flags.jobs)
    if path == Path("-"):
        # Not sys.stdin: closing that at exit would wait for the thread that reads it.
        return Source(read_jsonl("stdin", open(0, "rb", closefd=False)), waits=True)
    if path.suffix not in READERS:
        parser.error(f"--input {path}: expected a name that ends in {' or '.join(READERS)}")
    try:
        return Source(READERS[path.suffix](str(path), stack.enter_context(path.open("rb"))))
    except OSError as error:
        parser.error(f"--input {path}: {error.strerror}")


def open_output(parser: Parser, flags: argparse.Namespace) -> Output:
    path: Path = flags.output or Path(os.devnull)
    try:
        if flags.input is not None and path.exists() and flags.input.exists() and path.samefile(flags.input):
            parser.error(f"--output {path}: is the input, too")
        return Output(path)
    except OSError as error:
        parser.error(f"--output {path}: {error.strerror}")


def open_journal(parser: Parser, flags: argparse.Namespace) -> penstock.Journal | None:
    path: Path | None = flags.journal
    if path is None:
        return None
    for name in ("input", "output"):
        other: Path | None = getattr(flags, name)
        if other is not None and other.resolve() == path.resolve():
            parser.error(f"--journal {path}: is the {name}, too")
    # Records of another origin may have the same ids.
    records = {"seed": flags.seed} if flags.input is None else {"input": str(flags.input)}
    return penstock.Journal(path, params=records)


def open_client(parser: Parser, base_url: str) -> penstock.HttpClient:
    try:
        return penstock.HttpClient(base_url, retry=RETRY)
    except (penstock.UsageError, ValueError) as error:
        parser.error(f"--base-url {base_url}: {error}")


def run_and_account(parser: Parser, flags: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    config = config_from(parser, flags)
    source = open_source(parser, flags, stack)
    journal = open_journal(parser, flags)
    api = None if flags.base_url is None else open_client(parser, flags.base_url)
    output = stack.enter_context(contextlib.closing(open_output(parser, flags)))
    if journal is None:
        output.empty()
    service = None
    if api is None:
        service = stack.enter_context(EmbeddedService(config))
        api = open_client(parser, service.url)

    # Failures are in the output, and an example of each kind in the account; tracebacks are for bugs.
    logging.getLogger("penstock.jobs").setLevel(logging.ERROR)
    before = usage(service)
    run = asyncio.run(score_all(api, source, output, flags.limit, journal))
    after = usage(service)
    count_what_is_left(run, source)
    print_account(run, source, api, before, after)
    return exit_status(run, source)


def main() -> int:
    parser = make_parser()
    flags = parser.parse_args()
    try:
        with contextlib.ExitStack() as stack:
            return run_and_account(parser, flags, stack)
    except (BadOutput, penstock.JournalError) as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
