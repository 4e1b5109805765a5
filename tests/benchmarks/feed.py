"""What it costs to push items through: microseconds and memory of each item that suspends once, 200 in flight.

    python tests/benchmarks/feed.py                       10,000 and 100,000 items in turn, then memory up to 1,000,000
    python tests/benchmarks/feed.py --items 10000 --rounds 5 --no-memory --suspend future

The job says nothing about services, it shows what the feed itself takes. It suspends in one of two ways: for a `turn`
of the loop, `await asyncio.sleep(0)`, the least that a suspension can cost; or on a `future` that the loop sets, which
is what reading from a socket does. The reference is what one would write by hand and what every convenience is paid on
top of: 200 workers that pull from one iterator and drop what they get. Items come from a generator where the contender
takes one; results are dropped.

Memory is the growth of peak RSS from 10,000 to 1,000,000 items, each in a process of its own. A feed that is bounded
does not grow. Those that would take gigabytes or minutes are run with 100,000 items, and the table says so.
"""

import argparse
import asyncio
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import aiometer
import aiostream
from rounds import (
    Cost,
    Measure,
    Samples,
    Stopwatch,
    in_turn,
    make_parser,
    new_runner,
    on_loop,
    print_costs,
    print_table,
)

from penstock import Executor

IN_FLIGHT = 200
FEW, SOME, MANY = 10_000, 100_000, 1_000_000
REFERENCE = "worker loop, by hand"

Feed: TypeAlias = Callable[[int], Awaitable[None]]


async def job_that_gives_a_turn(item: int) -> int:
    await asyncio.sleep(0)
    return item


async def job_that_awaits_a_future(item: int) -> int:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()
    loop.call_soon(future.set_result, item)
    return await future


JOBS = {"turn": job_that_gives_a_turn, "future": job_that_awaits_a_future}
job = job_that_gives_a_turn


def plain_job(item: int) -> int:
    return item


def generated(items: int) -> Iterator[int]:
    yield from range(items)


async def worker_loop(items: int) -> None:
    source = generated(items)

    async def work() -> None:
        for item in source:
            await job(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(work())


async def sliding_window(items: int) -> None:
    room = asyncio.Semaphore(IN_FLIGHT)
    running: set[asyncio.Task[int]] = set()

    def ended(task: asyncio.Task[int]) -> None:
        running.discard(task)
        room.release()

    for item in generated(items):
        await room.acquire()
        task = asyncio.create_task(job(item))
        running.add(task)
        task.add_done_callback(ended)
    if running:
        await asyncio.wait(running)


current: ContextVar[int] = ContextVar("current")


async def wrapped(item: int) -> int:
    current.set(item)
    return await job(item)


async def floor(items: int, fn: Callable[[int], Coroutine[Any, Any, int]]) -> None:
    """A task for each item and a callback at its end that starts the next: no outcome, no window, no reader."""
    loop = asyncio.get_running_loop()
    source = generated(items)
    running: set[asyncio.Task[int]] = set()
    over: asyncio.Future[None] = loop.create_future()

    def start() -> None:
        for item in source:
            task = loop.create_task(fn(item))
            running.add(task)
            task.add_done_callback(ended)
            return
        if not running and not over.done():
            over.set_result(None)

    def ended(task: asyncio.Task[int]) -> None:
        running.discard(task)
        start()

    for _ in range(IN_FLIGHT):
        start()
    await over


async def floor_of_tasks(items: int) -> None:
    await floor(items, job)


async def floor_of_contexts(items: int) -> None:
    await floor(items, wrapped)


async def task_for_each(items: int) -> None:
    room = asyncio.Semaphore(IN_FLIGHT)

    async def work(item: int) -> None:
        async with room:
            await job(item)

    async with asyncio.TaskGroup() as group:
        for item in generated(items):
            group.create_task(work(item))


async def aiometer_amap(items: int) -> None:
    async with aiometer.amap(job, range(items), max_at_once=IN_FLIGHT) as results:
        async for _ in results:
            pass


async def aiostream_map(items: int) -> None:
    async def source() -> AsyncIterator[int]:
        for item in range(items):
            yield item

    async def work(item: int, *_: int) -> int:
        return await job(item)

    mapped: aiostream.core.Stream[int] = aiostream.stream.map(source(), work, ordered=False, task_limit=IN_FLIGHT)
    async with mapped.stream() as results:
        async for _ in results:
            pass


async def threads_map(items: int) -> None:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(plain_job, generated(items)):
            pass


async def penstock_as_completed(items: int) -> None:
    async with Executor(limit=IN_FLIGHT) as executor, executor.as_completed(job, generated(items)) as stream:
        async for _ in stream:
            pass


async def penstock_map(items: int) -> None:
    async with Executor(limit=IN_FLIGHT) as executor, executor.map(job, generated(items)) as stream:
        async for _ in stream:
            pass


async def penstock_submit(items: int) -> None:
    async with Executor(limit=IN_FLIGHT) as executor:
        for future in [executor.submit(job, item) for item in generated(items)]:
            await future


FEEDS: dict[str, tuple[Feed, int]] = {
    REFERENCE: (worker_loop, MANY),
    "penstock as_completed": (penstock_as_completed, MANY),
    "penstock map, streamed": (penstock_map, MANY),
    "penstock submit": (penstock_submit, FEW),
    "floor: a task for each item": (floor_of_tasks, MANY),
    "floor: and a wrapper, a ContextVar": (floor_of_contexts, MANY),
    "create_task, sliding window": (sliding_window, MANY),
    "TaskGroup + Semaphore": (task_for_each, SOME),
    "aiometer.amap": (aiometer_amap, SOME),
    "aiostream.map": (aiostream_map, SOME),
    "ThreadPoolExecutor.map": (threads_map, SOME),
}
"""Each feed with the number of items beyond which it takes gigabytes or minutes."""

SLOW = {"aiostream.map"}
"""Left out of the rounds above 10,000 items: what they would add is known, and takes minutes."""


async def measured(feed: Feed, items: int) -> Cost:
    watch = Stopwatch()
    await feed(items)
    return watch.cost(items)


def time_in_turn(items: int, rounds: int, *, uvloop: bool) -> Samples:
    with new_runner(uvloop) as runner:
        contenders: dict[str, Measure] = {
            name: on_loop(runner, partial(measured, feed, items))
            for name, (feed, most) in FEEDS.items()
            if items <= most and (items <= FEW or name not in SLOW)
        }
        for measure in contenders.values():
            measure()  # what is imported or made at first use is no cost of an item
        return in_turn(contenders, rounds)


def peak_kib() -> int:
    """Peak RSS of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `ru_maxrss` begins with the peak of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def one_pass(name: str, items: int, *, uvloop: bool) -> None:
    """Print peak RSS and the cost of an item, for the process that started this one."""
    with new_runner(uvloop) as runner:
        cost = on_loop(runner, partial(measured, FEEDS[name][0], items))()
    print(peak_kib(), cost.cpu)


def in_own_process(name: str, items: int, *, uvloop: bool) -> tuple[int, float]:
    command = [sys.executable, __file__, "--only", name, "--items", str(items), *(["--uvloop"] if uvloop else [])]
    peak, cpu = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(peak), float(cpu)


def print_memory(*, uvloop: bool) -> None:
    rows = []
    for name, (_, most) in FEEDS.items():
        if most > FEW:
            small, _ = in_own_process(name, FEW, uvloop=uvloop)
            large, cpu = in_own_process(name, most, uvloop=uvloop)
            note = "" if most == MANY else f"with {most:,} items"
            rows.append((name, f"{small / 1024:.1f}", f"{(large - small) / 1024:+.1f}", f"{cpu * 1e6:.2f}", note))
    title = f"Memory: peak RSS with {FEW:,} items, and its growth up to {MANY:,}; one pass each"
    print_table(title, ("", "MiB", "growth MiB", "cpu us/item", "note"), rows)


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--items", type=int, action="append", help=f"may be repeated; default: {FEW} and {SOME}")
    parser.add_argument("--suspend", choices=JOBS, help="how the job suspends; default: turn, then future")
    parser.add_argument("--no-memory", action="store_true", help="leave out the part on memory")
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--only", choices=FEEDS, help=argparse.SUPPRESS)
    return parser


def print_rounds(suspend: str, items: int, rounds: int, *, uvloop: bool) -> None:
    global job
    job = JOBS[suspend]
    samples = time_in_turn(items, rounds, uvloop=uvloop)
    title = f"{items:,} items that suspend for a {suspend}, {rounds} rounds{', uvloop' if uvloop else ''}"
    print_costs(title, samples, REFERENCE, unit="us/item")


def main() -> None:
    flags: Any = make_flags().parse_args()
    sizes = flags.items or [FEW, SOME]
    if flags.only is not None:
        one_pass(flags.only, sizes[0], uvloop=flags.uvloop)
        return
    for suspend in [flags.suspend] if flags.suspend else JOBS:
        for items in sizes if suspend != "future" or flags.items else [FEW]:
            print_rounds(suspend, items, flags.rounds, uvloop=flags.uvloop)
    if not flags.no_memory:
        print_memory(uvloop=flags.uvloop)


if __name__ == "__main__":
    main()
