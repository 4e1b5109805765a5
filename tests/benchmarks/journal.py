"""What a journal costs: each item that is recorded, a run that is resumed, an outcome that waits for its commit.

    python tests/benchmarks/journal.py                         all of it: about ten minutes
    python tests/benchmarks/journal.py --only cost --items 10000 --rounds 3
    python tests/benchmarks/journal.py --only resume --recorded 200000
    python tests/benchmarks/journal.py --only latency --seconds 2

`cost`: items that suspend for a turn of the loop and return a small dict, 200 in flight, read from `as_completed`. What
counts is how much dearer an item is than in the feed without a journal in the same round. Beside it stands what one
would write by hand around that feed: a JSON line for each outcome, or rows of a table of one's own. Only
`a commit for each row` keeps the promise that an outcome is told after it is recorded.

`resume`: a journal of 2,000,000 items of which all but 1,000 are done, and the run that does those. Each pass is a
process of its own on a copy of the file; its memory is compared with that of a pass over 10,000 items. Items come from
generators, so that nothing but the run holds them.

`latency`: seconds from the end of a job to its reader, at a given number of items per second.
"""

import argparse
import asyncio
import hashlib
import json
import random
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rounds import Cost, Measure, Samples, Stopwatch, in_turn, make_parser, new_runner, on_loop, print_table

from penstock import Executor, Journal, Outcome, step
from penstock.journal.options import JSON
from penstock.journal.record import done_columns
from penstock.journal.schema import Key
from penstock.journal.store import Batch, Store

IN_FLIGHT = 200
ITEMS, FEW, FEWEST = 50_000, 10_000, 2_000
"""In a round of `cost`: as a rule; for contenders that wait for the disk; and for one that does so for each item."""
RECORDED, SMALL, MISSING = 2_000_000, 10_000, 1_000
RATES = (50, 500, 5_000)
REFERENCE = "feed, no journal"
THREE_STEPS = "feed, no journal, three steps"
BAR = 12.0
"""Microseconds of CPU that a recorded item may add."""


# --- the cost of an item ---


async def job(item: Key) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"id": item, "score": 0.5}


async def fetch(item: Key) -> dict[str, Any]:
    return {"id": item, "score": 0.5}


async def job_of_three_steps(item: Key) -> dict[str, Any]:
    await asyncio.sleep(0)
    await step("first", fetch, item)
    await step("second", fetch, item)
    return await step("third", fetch, item)


def itself(item: Key) -> Key:
    return item


def number_of(item: int) -> Key:
    return item


def text_of(item: int) -> Key:
    return f"record-{item:09d}"


def scattered_text_of(item: int) -> Key:
    return hashlib.blake2b(item.to_bytes(8), digest_size=12).hexdigest()


KEYS: dict[str, Callable[[int], Key]] = {
    "numbers": number_of,
    "text in order": text_of,
    "random text": scattered_text_of,
}

Take: TypeAlias = Callable[[Outcome[Any]], object]


class Contender(NamedTuple):
    """Who is measured, with how many items at most, and against whom."""

    run: Callable[[Sequence[Key], Path], Awaitable[None]]
    most: int = ITEMS
    keys: str = "numbers"
    base: str = REFERENCE


async def feed(keys: Sequence[Key], folder: Path, *, take: Take | None = None, fn: Any = job, **options: Any) -> None:
    """Push the keys through; `options` are those of a journal, by which there is one."""
    journal = Journal(folder / "run.db", **options) if options else None
    async with Executor(limit=IN_FLIGHT) as executor:
        async with executor.as_completed(fn, keys, key=itself, journal=journal) as stream:
            async for outcome in stream:
                if take is not None:
                    take(outcome)


async def by_json_lines(keys: Sequence[Key], folder: Path) -> None:
    with (folder / "done.jsonl").open("a") as file:

        def take(outcome: Outcome[Any]) -> None:
            file.write(json.dumps({"key": outcome.key, "result": outcome.value}) + "\n")
            file.flush()

        await feed(keys, folder, take=take)


def a_table(folder: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(folder / "done.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE done(key PRIMARY KEY, result TEXT)")
    return connection


async def by_a_commit_for_each_row(keys: Sequence[Key], folder: Path) -> None:
    connection = a_table(folder)

    def take(outcome: Outcome[Any]) -> None:
        connection.execute("INSERT OR REPLACE INTO done VALUES (?, ?)", (outcome.key, json.dumps(outcome.value)))

    await feed(keys, folder, take=take)
    connection.close()


async def by_many_rows_at_once(keys: Sequence[Key], folder: Path) -> None:
    connection = a_table(folder)
    rows: list[tuple[Key, str]] = []

    def commit() -> None:
        connection.execute("BEGIN")
        connection.executemany("INSERT OR REPLACE INTO done VALUES (?, ?)", rows)
        connection.execute("COMMIT")
        rows.clear()

    def take(outcome: Outcome[Any]) -> None:
        rows.append((outcome.key, json.dumps(outcome.value)))
        if len(rows) == 500:
            commit()

    await feed(keys, folder, take=take)
    commit()
    connection.close()


recorded = partial(feed, durability="process")

CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender(feed),
    "journal, numbers": Contender(recorded),
    "journal, text in order": Contender(recorded, keys="text in order"),
    "journal, random text": Contender(recorded, keys="random text"),
    "by hand: a JSON line, flushed": Contender(by_json_lines),
    "by hand: sqlite3, a commit for each row": Contender(by_a_commit_for_each_row, FEW),
    "by hand: sqlite3, 500 rows at once": Contender(by_many_rows_at_once),
    'journal, durability="machine"': Contender(partial(feed, durability="machine"), FEW),
    "journal, intents": Contender(partial(feed, intents=True), FEW),
    'journal, intents, durability="machine"': Contender(partial(feed, intents=True, durability="machine"), FEWEST),
    THREE_STEPS: Contender(partial(feed, fn=job_of_three_steps), FEW),
    "journal, three steps": Contender(partial(recorded, fn=job_of_three_steps), FEW, base=THREE_STEPS),
}


async def measured(contender: Contender, items: int, folder: Path) -> Cost:
    """Files are removed by whoever gave the folder: an item pays for its recording only."""
    keys = [KEYS[contender.keys](number) for number in range(items)]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        watch = Stopwatch()
        await contender.run(keys, Path(own))
        return watch.cost(items)


def print_cost(items: int, rounds: int, folder: Path, *, uvloop: bool) -> None:
    with new_runner(uvloop) as runner:
        contenders: dict[str, Measure] = {
            name: on_loop(runner, partial(measured, contender, min(items, contender.most), folder))
            for name, contender in CONTENDERS.items()
        }
        for contender in CONTENDERS.values():
            on_loop(runner, partial(measured, contender, 100, folder))()  # what is made at first use
        print_above_base(items, in_turn(contenders, rounds))


def print_above_base(items: int, samples: Samples) -> None:
    rows = []
    for name, costs in samples.items():
        contender = CONTENDERS[name]
        cpu, wall = (statistics.median(column) * 1e6 for column in zip(*costs, strict=True))
        added = ["", "", ""]
        if name not in (REFERENCE, THREE_STEPS):
            pairs = list(zip(costs, samples[contender.base], strict=True))
            low, middle, high = quartiles([(cost.cpu - base.cpu) * 1e6 for cost, base in pairs])
            waited = statistics.median((cost.wall - base.wall) * 1e6 for cost, base in pairs)
            added = [f"{middle:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{waited:+.2f}"]
        rows.append((name, f"{min(items, contender.most):,}", f"{cpu:.2f}", f"{wall:.2f}", *added))
    title = f"A recorded item, {len(samples[REFERENCE])} rounds; the bar of the journal: +{BAR:g} us of CPU"
    print_table(title, ("", "items", "cpu us", "wall us", "added cpu us", "quartiles", "added wall us"), rows)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


# --- a run that is resumed ---


def in_order(items: int) -> Iterator[int]:
    yield from range(items)


def scattered(items: int) -> Iterator[int]:
    """Each number below `items` once, far from the one before it, and without a list of them."""
    stride = 1_234_567_891  # a prime, so that it divides no number of items here
    return (number * stride % items for number in range(items))


ORDERS = {"in order": in_order, "scattered": scattered}


class Pass(NamedTuple):
    """One way to resume."""

    call: str
    keys: str
    order: str


PASSES = (
    Pass("run", "numbers", "in order"),
    Pass("run", "text in order", "in order"),
    Pass("run", "text in order", "scattered"),
    Pass("run", "random text", "in order"),
    Pass("as_completed, replay=False", "text in order", "in order"),
    Pass("as_completed, replay=True", "text in order", "in order"),
    Pass("as_completed, replay=True", "text in order", "scattered"),
)


async def job_of_a_number(item: int) -> dict[str, Any]:
    return await job(item)


def write_journal(path: Path, items: int, key_of: Callable[[int], Key]) -> None:
    """A journal in which all but some items are done."""
    store = Store(Journal(path), Journal(path).fingerprint(job_of_a_number.__qualname__))
    run = store.open().run
    missing = set(random.Random(1).sample(range(items), min(MISSING, items // 10)))
    for start in range(0, items, 500):
        batch = Batch()
        for number in range(start, min(start + 500, items)):
            if number not in missing:
                value = {"id": number, "score": 0.5}
                outcome: Outcome[Any] = Outcome(None, number, value, None, None, 1, 0.01, 0.05, False)
                batch.done += done_columns(outcome, key_of(number), run, time.time(), None, str(JSON.dumps(value)))
        store.write([batch])
    store.close(None, {})


async def resume(way: Pass, path: Path, items: int) -> None:
    ran = 0

    async def counted(item: int) -> dict[str, Any]:
        nonlocal ran
        ran += 1
        return await job_of_a_number(item)

    counted.__qualname__ = job_of_a_number.__qualname__
    source, key = ORDERS[way.order](items), KEYS[way.keys]
    async with Executor(limit=IN_FLIGHT) as executor:
        if way.call == "run":
            await executor.run(counted, source, key=key, journal=path)
        else:
            options = Journal(path, replay=way.call.endswith("True"))
            async with executor.as_completed(counted, source, key=key, journal=options) as stream:
                async for _ in stream:
                    pass
    if ran != min(MISSING, items // 10):
        raise AssertionError(f"{ran:,} items were run")


def peak_kib() -> int:
    """Peak RSS of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `ru_maxrss` begins with the peak of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def one_pass(number: int, path: Path, items: int) -> None:
    """Print CPU, seconds and peak RSS, for the process that started this one."""
    watch = Stopwatch()
    asyncio.run(resume(PASSES[number], path, items))
    cost = watch.cost(1)
    print(cost.cpu, cost.wall, peak_kib())


def in_own_process(number: int, journal: Path, items: int) -> tuple[float, float, int]:
    with tempfile.TemporaryDirectory(dir=journal.parent) as own:
        path = Path(own) / "run.db"
        shutil.copyfile(journal, path)
        command = [sys.executable, __file__, "--pass", str(number), "--recorded", str(items), "--path", str(path)]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cpu, wall, peak = ended.stdout.split()
    return float(cpu), float(wall), int(peak)


def print_resume(items: int, folder: Path) -> None:
    rows = []
    for keys, key_of in KEYS.items():
        large, small = folder / f"{keys}, large.db", folder / f"{keys}, small.db"
        write_journal(large, items, key_of)
        write_journal(small, SMALL, key_of)
        size = f"{large.stat().st_size / 1e6:,.0f}"
        for number, way in enumerate(PASSES):
            if way.keys == keys:
                cpu, wall, peak = in_own_process(number, large, items)
                _, _, least = in_own_process(number, small, SMALL)
                growth = f"{(peak - least) / 1024:+.1f}"
                rows.append((*way, size, f"{wall:.1f}", f"{cpu:.1f}", f"{wall / items * 1e6:.2f}", growth))
        large.unlink()
    title = (
        f"Resumed: {items:,} items of which {MISSING:,} are missing; peak RSS against {SMALL:,} items. "
        f"The bar: 40 s and no growth with {RECORDED:,}"
    )
    print_table(title, ("", "keys", "items", "file MB", "s", "cpu s", "wall us/item", "growth MiB"), rows)


# --- the wait for a commit ---


async def paced(rate: int, seconds: float) -> AsyncIterator[int]:
    """Items at their times."""
    now = asyncio.get_running_loop().time
    start = now()
    for number in range(int(rate * seconds)):
        due = start + number / rate
        while (left := due - now()) > 0:
            await asyncio.sleep(left)
        yield number


async def waits(rate: int, seconds: float, lasting: float, journal: Journal | None) -> list[float]:
    """Milliseconds from the end of each job to its reader."""

    async def ends(item: int) -> float:
        await asyncio.sleep(lasting)
        return time.perf_counter()

    found = []
    async with Executor(limit=10_000) as executor:
        source = paced(rate, seconds)
        async with executor.as_completed(ends, source, key=number_of, journal=journal) as stream:
            async for outcome in stream:
                assert outcome.value is not None
                found.append((time.perf_counter() - outcome.value) * 1e3)
    return sorted(found)


def print_latency(seconds: float, folder: Path, *, uvloop: bool) -> None:
    rows = []
    with new_runner(uvloop) as runner:
        for lasting in (0.0, 0.3):
            for rate in RATES:
                for name in ("no journal", "process", "machine"):
                    with tempfile.TemporaryDirectory(dir=folder) as own:
                        options: Any = {"durability": name}
                        journal = None if name == "no journal" else Journal(Path(own) / "run.db", **options)
                        found = runner.run(waits(rate, seconds, lasting, journal))
                    shares = [found[int(share * (len(found) - 1))] for share in (0.5, 0.99, 1.0)]
                    rows.append((f"{lasting:g} s", f"{rate:,}", name, *(f"{share:.1f}" for share in shares)))
    title = f"From the end of a job to its reader, in milliseconds; {seconds:g} s each"
    print_table(title, ("job takes", "items/s", "durability", "p50", "p99", "most"), rows)


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--only", choices=("cost", "resume", "latency"))
    parser.add_argument("--items", type=int, default=ITEMS, help=f"in a round of `cost`; default: {ITEMS}")
    parser.add_argument("--recorded", type=int, default=RECORDED, help=f"items of `resume`; default: {RECORDED}")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each line of `latency`; default: 5")
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--pass", type=int, dest="number", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    flags: Any = make_flags().parse_args()
    if flags.number is not None:
        one_pass(flags.number, flags.path, flags.recorded)
        return
    with tempfile.TemporaryDirectory() as folder:
        if flags.only in (None, "cost"):
            print_cost(flags.items, flags.rounds, Path(folder), uvloop=flags.uvloop)
        if flags.only in (None, "latency"):
            print_latency(flags.seconds, Path(folder), uvloop=flags.uvloop)
        if flags.only in (None, "resume"):
            print_resume(flags.recorded, Path(folder))


if __name__ == "__main__":
    main()
