"""What the bridge costs a synchronous program, and what holds where calls wait for calls.

    python tests/benchmarks/synchronous.py                          every section, each in a process of its own
    python tests/benchmarks/synchronous.py --quick
    python tests/benchmarks/synchronous.py --only coroutine --rounds 15

plain         `submit` and `result()` of a trivial function, 1 and 64 in flight, against ThreadPoolExecutor
coroutine     `submit` of a trivial coroutine function, 1,000 in flight, against `asyncio.run_coroutine_threadsafe`
memory        100,000 futures through the stdlib's `as_completed`, against those two
nested        calls that submit the next one and wait for it, 100 deep, on one thread

Beside what was measured stands the bar: what is to be reached, where there is one. Nothing fails when it is missed.

`plain` and `coroutine` are rounds taken in turn, all contenders in one process; `cpu` is that of the process with all
its threads. So many in flight means: the next one is submitted as soon as the oldest has ended, and never before, so
whoever submits and whoever runs are at work at the same time. They want the GIL at the same time, too, which costs
several times more where the kernel lets them run side by side: both sections are measured on all cores and, in another
process, on one, where the ratio is steady.

`memory` and each line of `nested` take a fresh process for each pass.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from anyio.from_thread import start_blocking_portal
from feed import peak_kib
from rounds import Cost, Samples, Stopwatch, in_turn, make_parser, print_table, ratios

from penstock import BridgeExecutor

Submit: TypeAlias = Callable[[], "Future[None]"]
Pass: TypeAlias = Callable[[], tuple[float, ...]]
Rows: TypeAlias = list[Sequence[str]]

WORKERS = 8


def nothing() -> None:
    """What is called when only the way there and back is measured."""


async def one_turn() -> None:
    """The same for the loop: it suspends once, as what waits for a network does."""
    await asyncio.sleep(0)


@contextmanager
def loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """What one would use without penstock."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# --- rounds in turn ---


class Contender(NamedTuple):
    """Who is measured, and what the ratio to the first one is to be."""

    submit: Submit
    bar: str = ""


def windowed(submit: Submit, calls: int, in_flight: int) -> Cost:
    """What one call takes when so many are kept in flight."""
    window: deque[Future[None]] = deque()
    watch = Stopwatch()
    for _ in range(calls):
        if len(window) == in_flight:
            window.popleft().result()
        window.append(submit())
    while window:
        window.popleft().result()
    return watch.cost(calls)


def print_in_turn(title: str, contenders: Mapping[str, Contender], calls: int, in_flight: int, rounds: int) -> None:
    """Measure everyone in turn; print medians and the ratios to the first one."""
    measures = {name: partial(windowed, seen.submit, calls, in_flight) for name, seen in contenders.items()}
    for measure in measures.values():
        measure()  # threads are started
    title = f"{title}, {in_flight:,} in flight, {where()}: {calls:,} calls, {rounds} rounds"
    print_samples(title, contenders, in_turn(measures, rounds))


def print_samples(title: str, contenders: Mapping[str, Contender], samples: Samples) -> None:
    reference, *_ = samples.values()
    rows: Rows = []
    for name, costs in samples.items():
        figures: list[str] = []
        for column in ("cpu", "wall"):
            values = [getattr(cost, column) for cost in costs]
            low, middle, high = ratios(values, [getattr(cost, column) for cost in reference])
            figures += [f"{statistics.median(values) * 1e6:.2f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]
        rows.append((name, *figures, contenders[name].bar))
    head = ("", "cpu us/call", "x reference", "quartiles", "wall us/call", "x reference", "quartiles", "bar")
    print_table(title, head, rows)


def where() -> str:
    return "on one core" if cores() == 1 else f"on {cores()} cores"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_one_core() -> None:
    """For this process and its threads to come; where the system lets us say so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# --- plain ---

PLAIN_BAR = "1.3"


def plain(flags: argparse.Namespace) -> None:
    """Both keep as many threads."""
    with ThreadPoolExecutor(WORKERS) as pool, BridgeExecutor(WORKERS) as bridge:
        contenders = {
            f"ThreadPoolExecutor({WORKERS})": Contender(partial(pool.submit, nothing)),
            f"BridgeExecutor({WORKERS})": Contender(partial(bridge.submit, nothing), PLAIN_BAR),
        }
        for in_flight, calls in ((1, 2_000), (64, 5_000)):
            print_in_turn("plain function", contenders, flags.items or calls, in_flight, flags.rounds)


# --- coroutine ---

COROUTINE_BAR = "0.8, goal 0.6"
MANY_IN_FLIGHT = 1_000


def coroutine(flags: argparse.Namespace) -> None:
    """Each has a loop in a thread of its own; those that are not measured sleep."""
    with ExitStack() as stack:
        loop = stack.enter_context(loop_in_thread())
        portal = stack.enter_context(start_blocking_portal())
        bridge = stack.enter_context(BridgeExecutor(WORKERS))
        contenders = {
            "run_coroutine_threadsafe": Contender(lambda: asyncio.run_coroutine_threadsafe(one_turn(), loop)),
            "anyio portal.start_task_soon": Contender(partial(portal.start_task_soon, one_turn)),
            "BridgeExecutor.submit": Contender(partial(bridge.submit, one_turn), COROUTINE_BAR),
        }
        print_in_turn("coroutine function", contenders, flags.items or 10_000, MANY_IN_FLIGHT, flags.rounds)


# --- one pass, in a process of its own ---

BEGUN = "begun"


def in_own_process(name: str, guard: float) -> list[float] | None:
    """What a pass has measured; None when it had not ended `guard` seconds after it began."""
    command = [sys.executable, __file__, "--one-pass", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # from here on: what imports take is not the pass's
        try:
            said, _ = process.communicate(timeout=guard)
        except subprocess.TimeoutExpired:
            process.kill()
            return None
    if process.returncode:
        raise SystemExit(f"the pass {name!r} ended with status {process.returncode}")
    return [float(figure) for figure in said.split()]


def one_pass(name: str) -> None:
    """Print what a pass measures, for the process that started this one."""
    print(BEGUN, flush=True)
    print(*PASSES[name]())


# --- memory ---

FUTURES = 100_000
MEMORY_BAR = "1.2"
MEMORY_GUARD = 120.0


def all_of(submit: Submit) -> tuple[float, float, float]:
    """Peak RSS in KiB before and after, and the seconds between: all are submitted, then taken as they end."""
    submit().result()
    before, start = peak_kib(), time.perf_counter()
    futures = [submit() for _ in range(FUTURES)]
    for future in as_completed(futures):
        future.result()
    return before, peak_kib(), time.perf_counter() - start


def pool_memory() -> tuple[float, ...]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return all_of(partial(pool.submit, nothing))


def loop_memory() -> tuple[float, ...]:
    with loop_in_thread() as loop:
        return all_of(lambda: asyncio.run_coroutine_threadsafe(one_turn(), loop))


def bridge_memory(fn: Callable[[], Any]) -> tuple[float, ...]:
    with BridgeExecutor(WORKERS) as bridge:
        return all_of(partial(bridge.submit, fn))


MEMORY_PAIRS: dict[str, tuple[Pass, str]] = {
    f"plain, ThreadPoolExecutor({WORKERS})": (pool_memory, ""),
    f"plain, BridgeExecutor({WORKERS})": (partial(bridge_memory, nothing), MEMORY_BAR),
    "coroutine, run_coroutine_threadsafe": (loop_memory, ""),
    "coroutine, BridgeExecutor.submit": (partial(bridge_memory, one_turn), MEMORY_BAR),
}
"""References, each followed by what is compared with it."""


def memory(flags: argparse.Namespace) -> None:
    """Peaks depend on who gets ahead, those who submit or those who run: medians of several passes."""
    passes = 1 if flags.quick else 3
    rows: Rows = []
    reference = 0.0
    for name, (_, bar) in MEMORY_PAIRS.items():
        seen = [in_own_process(name, MEMORY_GUARD) for _ in range(passes)]
        done = [figures for figures in seen if figures is not None]
        if len(done) < passes:
            reference = reference if bar else 0.0
            rows.append((name, *["-"] * 4, f"not done in {MEMORY_GUARD:.0f} s", bar))
            continue
        before, after, elapsed = (statistics.median(column) for column in zip(*done, strict=True))
        grown = after - before
        reference = reference if bar else grown
        ratio = f"{grown / reference:.2f}" if reference else "-"
        rows.append(
            (
                name, f"{before / 1024:.1f}", f"{after / 1024:.1f}", f"{grown * 1024 / FUTURES:.0f}", ratio,
                f"{elapsed:.1f}", bar,
            )
        )  # fmt: skip
    title = f"memory: {FUTURES:,} futures, all submitted, then as_completed; peak RSS, median of {passes} passes"
    print_table(title, ("", "MiB before", "MiB peak", "bytes/future", "x reference", "seconds", "bar"), rows)


# --- nested ---

DEPTH, DEADLOCK_DEPTH = 100, 2
NEST_GUARD, DEADLOCK_GUARD = 30.0, 1.0

WaitFor: TypeAlias = Callable[["Future[int]"], int]


def by_result(future: "Future[int]") -> int:
    return future.result()


def by_wait(future: "Future[int]") -> int:
    wait([future])
    return future.result()


def by_as_completed(future: "Future[int]") -> int:
    return next(as_completed([future])).result()


class Nest:
    """Calls that each submit the next one and wait for it; the last one counts the threads."""

    def __init__(self, executor: Executor, wait_for: WaitFor, *, with_coroutines: bool) -> None:
        self._executor = executor
        self._wait_for = wait_for
        self._with_coroutines = with_coroutines

    def submit(self, depth: int) -> "Future[int]":
        # Two of each kind in turn, so either one waits for either one.
        fn: Callable[[int], Any] = self._coroutine if self._with_coroutines and depth % 4 < 2 else self._plain
        return self._executor.submit(fn, depth)

    def _plain(self, depth: int) -> int:
        return threading.active_count() if depth == 1 else self._wait_for(self.submit(depth - 1))

    async def _coroutine(self, depth: int) -> int:
        return threading.active_count() if depth == 1 else await asyncio.wrap_future(self.submit(depth - 1))


def nest_in(executor: Executor, wait_for: WaitFor, depth: int, *, with_coroutines: bool) -> tuple[float, float]:
    """Seconds, and the threads but for the one that began it."""
    start = time.perf_counter()
    with executor:
        threads = Nest(executor, wait_for, with_coroutines=with_coroutines).submit(depth).result() - 1
        return time.perf_counter() - start, threads


def nest_in_bridge(wait_for: WaitFor) -> tuple[float, float]:
    return nest_in(BridgeExecutor(1), wait_for, DEPTH, with_coroutines=True)


def nest_in_pool() -> tuple[float, float]:
    return nest_in(ThreadPoolExecutor(1), by_result, DEADLOCK_DEPTH, with_coroutines=False)


NESTS: dict[str, tuple[Pass, float, str]] = {
    **{
        f"BridgeExecutor(1), {DEPTH} deep, both kinds, {name}": (partial(nest_in_bridge, wait_for), NEST_GUARD, "ends")
        for name, wait_for in {"result()": by_result, "wait": by_wait, "as_completed": by_as_completed}.items()
    },
    f"ThreadPoolExecutor(1), {DEADLOCK_DEPTH} deep, plain functions, result()": (nest_in_pool, DEADLOCK_GUARD, ""),
}


def nested(_flags: argparse.Namespace) -> None:
    """Who does not end within its guard is killed."""
    rows: Rows = []
    for name, (_, guard, bar) in NESTS.items():
        figures = in_own_process(name, guard)
        if figures is None:
            rows.append((name, f"deadlock, {guard:.0f} s guard", "-", bar))
        else:
            elapsed, threads = figures
            rows.append((name, f"{elapsed * 1e3:.1f} ms", f"{threads:.0f}", bar))
    print_table("nested: each call waits for the one that it submits", ("", "time", "threads", "bar"), rows)


# --- all of it ---

PASSES: dict[str, Pass] = {
    **{name: measure for name, (measure, _) in MEMORY_PAIRS.items()},
    **{name: measure for name, (measure, _, _) in NESTS.items()},
}
SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "plain": plain,
    "coroutine": coroutine,
    "memory": memory,
    "nested": nested,
}
ON_ONE_CORE_TOO = {"plain", "coroutine"}
MOST_ROUNDS_WHEN_QUICK = 3


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="may be repeated; default: all")
    parser.add_argument("--items", type=int, help="calls in each round; default: of each section its own")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and passes, for a first look")
    parser.add_argument("--cores", choices=("all", "one"), help="default: all, then one")
    parser.add_argument("--one-pass", choices=PASSES, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    flags = make_flags().parse_args()
    if flags.one_pass is not None:
        one_pass(flags.one_pass)
        return
    if flags.quick:
        flags.rounds = min(flags.rounds, MOST_ROUNDS_WHEN_QUICK)
    wanted = flags.only or list(SECTIONS)
    if len(wanted) == 1 and (flags.cores is not None or wanted[0] not in ON_ONE_CORE_TOO):
        if flags.cores == "one":
            use_one_core()
        SECTIONS[wanted[0]](flags)
        return
    options = [f"--rounds={flags.rounds}", *(["--quick"] if flags.quick else [])]
    if flags.items is not None:
        options.append(f"--items={flags.items}")
    for section in wanted:  # each in a process of its own, or one would find the threads of the one before
        for cores in [flags.cores] if flags.cores else ["all", "one"] if section in ON_ONE_CORE_TOO else ["all"]:
            command = [sys.executable, __file__, f"--only={section}", f"--cores={cores}", *options]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
