"""What the bridge into threads costs, and what gives way when calls are slow, hang or are given up.

    python tests/benchmarks/bridge.py                              every section, each in a process of its own
    python tests/benchmarks/bridge.py --quick
    python tests/benchmarks/bridge.py --only hop --only batch --rounds 15 --uvloop

hop           one call into a thread and back, against `run_in_executor` with as many threads and callers
batch         a small processing step: alone in a hop, and many in one
from_thread   thread -> loop -> thread, for an async function that does nothing
shift         calls at a fixed rate, each of which suddenly takes fifty times as long: waits and threads, in real time
lag           how late the loop wakes: idle, beside 500 blocked threads, beside threads that compute
full          DNS, a request by name and the program's own `to_thread` while lanes are full of slow calls
cancelled     calls that are given up again and again: how many threads truly run
nesting       thread -> loop -> the same lane, job -> job, map in map: time, threads, memory
exit          a script that is told to end while three of its threads hang

Beside what was measured stands the bar: what is to be reached, where there is one. Nothing fails when it is missed.

`hop`, `batch` and `from_thread` are rounds taken in turn, all contenders in one process and on one loop; `cpu` is that
of the process with all its threads. The other sections are one pass each. `--uvloop` changes all but `lag` and `exit`.

On two cores a hop of the standard library has two speeds: as long as loop and threads share a core they hand the GIL
over, and where the kernel lets them run side by side they fight for it, at two to three times the price. Which of them
one gets depends on what else the machine does. So hops are measured on one core as well, where the ratio is steady.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import aiohttp
import anyio
import anyio.from_thread
import anyio.to_thread
from fast_service import running_service
from rounds import Cost, Samples, Stopwatch, make_parser, new_runner, print_table, ratios

import penstock
from penstock import BlockingClient, Executor, HttpClient

Call: TypeAlias = Callable[[], Awaitable[object]]
Rows: TypeAlias = list[Sequence[str]]


def nothing() -> None:
    """What is called in a thread when only the way there is measured."""


async def nothing_async() -> None:
    """What is called on the loop when only the way there is measured."""


# --- rounds in turn ---


class Contender(NamedTuple):
    """Who is measured, by whom it is divided, and what the ratio is to be."""

    measure: Callable[[], Awaitable[Cost]]
    reference: str
    bar: str = ""


async def in_turn(contenders: Mapping[str, Contender], rounds: int) -> Samples:
    """As `rounds.in_turn`, within one task: a peer ends its threads with the task that the loop was run for."""
    samples: Samples = {name: [] for name in contenders}
    names = list(contenders)
    for contender in contenders.values():
        await contender.measure()  # threads are started
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(await contenders[name].measure())
    return samples


async def print_in_turn(title: str, contenders: Mapping[str, Contender], rounds: int, unit: str) -> None:
    """Measure everyone in turn; print medians and the ratios to each one's reference."""
    samples = await in_turn(contenders, rounds)
    rows: Rows = []
    for name, costs in samples.items():
        base = samples[contenders[name].reference]
        cpu, wall = (statistics.median(column) for column in zip(*costs, strict=True))
        low, by_cpu, high = ratios([cost.cpu for cost in costs], [cost.cpu for cost in base])
        _, by_wall, _ = ratios([cost.wall for cost in costs], [cost.wall for cost in base])
        quartiles = f"{low:.2f}-{high:.2f}"
        rows.append(
            (
                name, f"{cpu * 1e6:.2f}", f"{wall * 1e6:.2f}", f"{by_cpu:.2f}", quartiles, f"{by_wall:.2f}",
                contenders[name].bar,
            )
        )  # fmt: skip
    head = ("", f"cpu us/{unit}", f"wall us/{unit}", "x reference (cpu)", "quartiles", "(wall)", "bar")
    print_table(title, head, rows)


async def repeated(call: Call, calls: int, callers: int) -> Cost:
    """What one call takes when `callers` make them, each one after the other."""

    async def work(number: int) -> None:
        for _ in range(number):
            await call()

    each = max(1, calls // callers)
    watch = Stopwatch()
    await asyncio.gather(*(work(each) for _ in range(callers)))
    return watch.cost(each * callers)


@contextmanager
def pool_of(threads: int) -> Iterator[ThreadPoolExecutor]:
    """What one would use without penstock."""
    with ThreadPoolExecutor(threads, thread_name_prefix="pool") as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def use_as_default(pool: ThreadPoolExecutor) -> None:
    """`asyncio.to_thread` gets as many threads as others have."""
    asyncio.get_running_loop().set_default_executor(pool)


@contextmanager
def cores_at_most(number: int) -> Iterator[None]:
    """While the block runs, all threads of this process use so many cores; where the system lets us say so."""
    tasks = Path("/proc/self/task")
    if not hasattr(os, "sched_setaffinity") or not tasks.exists():
        yield
        return

    def use(cores: set[int]) -> None:
        for task in tasks.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(task.name), cores)

    usable = os.sched_getaffinity(0)
    use(set(sorted(usable)[-number:]))
    try:
        yield
    finally:
        use(usable)


# --- hop ---

ALL = sys.maxsize
FEW_CALLS, CALLS = 300, 1_500
HOP_BAR = "0.5, goal 0.2"
SHORT_SLEEP = 0.002


async def hops(flags: argparse.Namespace) -> None:
    """A trivial call, from 1, 16 and 64 callers; then one of 2 ms. Divided by `run_in_executor` of as many threads."""
    async with AsyncExitStack() as stack:
        pools = {threads: stack.enter_context(pool_of(threads)) for threads in (1, 8, 64)}
        executors = {n: await stack.enter_async_context(Executor(threads=n)) for n in (8, 64, None)}
        use_as_default(pools[8])
        for callers, cores in ((1, ALL), (16, ALL), (64, ALL), (64, 1)):
            calls = flags.items or (FEW_CALLS if callers == 1 else CALLS)
            contenders = trivial_hops(pools, executors, calls, callers)
            where = "on one core" if cores == 1 else "on all cores"
            title = f"hop: {calls} trivial calls, {callers} callers, {where}, {flags.rounds} rounds"
            with cores_at_most(cores):
                await print_in_turn(title, contenders, flags.rounds, "call")
        title = f"hop: {CALLS} calls of 2 ms, 64 callers, 64 threads, {flags.rounds} rounds; no less than 31 us wall"
        await print_in_turn(title, short_sleeps(pools[64], executors[64]), flags.rounds, "call")


def trivial_hops(
    pools: Mapping[int, ThreadPoolExecutor], executors: Mapping[int | None, Executor], calls: int, callers: int
) -> dict[str, Contender]:
    loop = asyncio.get_running_loop()
    limiter = anyio.CapacityLimiter(8)
    bar = HOP_BAR if callers == 64 else ""

    def contender(call: Call, threads: int, bar: str = "") -> Contender:
        return Contender(partial(repeated, call, calls, callers), by_stdlib(threads), bar)

    contenders = {
        by_stdlib(threads): contender(partial(loop.run_in_executor, pool, nothing), threads)
        for threads, pool in pools.items()
    }
    contenders["asyncio.to_thread, 8 threads"] = contender(partial(asyncio.to_thread, nothing), 8)
    by_anyio = partial(anyio.to_thread.run_sync, nothing, limiter=limiter)
    contenders["anyio.to_thread.run_sync, 8 threads"] = contender(by_anyio, 8)
    for threads, executor in executors.items():
        by_penstock = partial(executor.to_thread, nothing)
        contenders[f"executor.to_thread, threads={threads}"] = contender(by_penstock, threads or 8, bar)
    contenders["executor.compute, one thread"] = contender(partial(executors[8].compute, nothing), 1, bar)
    return contenders


def by_stdlib(threads: int) -> str:
    return f"run_in_executor, {threads} thread{'' if threads == 1 else 's'}"


def short_sleeps(pool: ThreadPoolExecutor, executor: Executor) -> dict[str, Contender]:
    loop = asyncio.get_running_loop()
    limiter = anyio.CapacityLimiter(64)
    calls: dict[str, Call] = {
        by_stdlib(64): partial(loop.run_in_executor, pool, time.sleep, SHORT_SLEEP),
        "anyio.to_thread.run_sync, 64 threads": partial(
            anyio.to_thread.run_sync, time.sleep, SHORT_SLEEP, limiter=limiter
        ),
        "executor.to_thread, threads=64": partial(executor.to_thread, time.sleep, SHORT_SLEEP),
    }
    return {name: Contender(partial(repeated, call, CALLS, 64), by_stdlib(64)) for name, call in calls.items()}


# --- batch ---

ITEMS = 10_000
BATCH_BAR = "2 us"


def step(item: int) -> int:
    """A processing step that is far shorter than the hop."""
    return item + 1


async def batches(flags: argparse.Namespace) -> None:
    """A step for each of many items: one in a hop, or many."""
    items = flags.items or ITEMS
    async with Executor() as executor:
        with pool_of(1) as pool:
            contenders = batch_contenders(executor, pool, items)
            title = f"batch: {items} small steps, {flags.rounds} rounds; `each`: one hop for each item, 64 callers"
            await print_in_turn(title, contenders, flags.rounds, "item")


def batch_contenders(executor: Executor, pool: ThreadPoolExecutor, items: int) -> dict[str, Contender]:
    loop = asyncio.get_running_loop()
    all_items = range(items)

    async def together(call: Call) -> Cost:
        watch = Stopwatch()
        await call()
        return watch.cost(items)

    def by_hand() -> list[int]:
        return [step(item) for item in all_items]

    async def on_the_loop() -> object:
        return by_hand()

    each = partial(repeated, calls=min(items, 2_000), callers=64)
    reference = "run_in_executor each, 1 thread"
    return {
        reference: Contender(partial(each, partial(loop.run_in_executor, pool, step, 1)), reference),
        "compute each": Contender(partial(each, partial(executor.compute, step, 1)), reference),
        "compute_each": Contender(
            partial(together, partial(executor.compute_each, step, all_items)), reference, BATCH_BAR
        ),
        "run_in_executor, all in one hop": Contender(
            partial(together, partial(loop.run_in_executor, pool, by_hand)), reference
        ),
        "on the loop, no hop": Contender(partial(together, on_the_loop), reference),
    }


# --- from_thread ---

TRIPS = 500


async def trips_from_threads(flags: argparse.Namespace) -> None:
    """From one thread, and from eight at once."""
    trips = flags.items or TRIPS
    async with Executor(threads=8) as executor:
        with pool_of(8) as pool:
            for threads in (1, 8):
                contenders = trip_contenders(executor, pool, trips, threads)
                title = f"from_thread: {trips} trips to the loop and back, {threads} threads, {flags.rounds} rounds"
                await print_in_turn(title, contenders, flags.rounds, "trip")


def trip_contenders(executor: Executor, pool: ThreadPoolExecutor, trips: int, threads: int) -> dict[str, Contender]:
    loop = asyncio.get_running_loop()
    limiter = anyio.CapacityLimiter(8)

    def by_penstock() -> None:
        for _ in range(trips):
            executor.from_thread(nothing_async)

    def by_asyncio() -> None:
        for _ in range(trips):
            asyncio.run_coroutine_threadsafe(nothing_async(), loop).result()

    def by_anyio() -> None:
        for _ in range(trips):
            anyio.from_thread.run(nothing_async)

    async def measured(call: Call) -> Cost:
        watch = Stopwatch()
        await asyncio.gather(*(call() for _ in range(threads)))
        return watch.cost(trips * threads)

    reference = "run_coroutine_threadsafe(...).result()"
    calls: dict[str, Call] = {
        reference: partial(loop.run_in_executor, pool, by_asyncio),
        "anyio.from_thread.run": partial(anyio.to_thread.run_sync, by_anyio, limiter=limiter),
        "from_thread, in a thread of the lane": partial(executor.to_thread, by_penstock),
        "from_thread, in a thread of the program": partial(loop.run_in_executor, pool, by_penstock),
    }
    return {name: Contender(partial(measured, call), reference) for name, call in calls.items()}


# --- shift ---

RATE = 100.0
SHORT_HOLD, LONG_HOLD = 0.02, 1.0
POOL_THREADS = 32


class Phases(NamedTuple):
    """Seconds: short holds, long ones, short ones again. `settle`: when to look after the long ones have ended."""

    before: float = 5.0
    long: float = 20.0
    after: float = 25.0
    settle: float = 20.0

    @property
    def total(self) -> float:
        return self.before + self.long + self.after

    def hold(self, at: float) -> float:
        """What a call takes that is made at this time."""
        return LONG_HOLD if self.before <= at < self.before + self.long else SHORT_HOLD


QUICK_PHASES = Phases(before=2.0, long=11.0, after=8.0, settle=7.0)
FIRST = 10.0
"""Seconds after the shift that are looked at by themselves."""


class Waits(NamedTuple):
    """What one side went through: when each call was made, and how long it waited for its thread."""

    calls: list[tuple[float, float]]

    def percentile(self, share: float, start: float, end: float) -> float:
        """Of the calls made from `start` to `end`."""
        return percentile([wait for at, wait in self.calls if start <= at < end], share)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


HoldCall: TypeAlias = Callable[[Callable[[], float]], Awaitable[float]]


async def offered(call: HoldCall, phases: Phases) -> Waits:
    """Make calls at a fixed rate, whether earlier ones have ended or not; at the end give up those that wait."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    waits = Waits([])
    pending: set[asyncio.Task[None]] = set()

    async def one(at: float) -> None:
        hold = phases.hold(at)

        def held() -> float:
            began = time.monotonic()
            time.sleep(hold)
            return began

        try:
            began = await call(held)
        except asyncio.CancelledError:
            began = loop.time()  # it has waited at least so long
        waits.calls.append((at, max(0.0, began - start - at)))

    for number in range(int(RATE * phases.total)):
        at = number / RATE
        await asyncio.sleep(start + at - loop.time())
        task = loop.create_task(one(at))
        pending.add(task)
        task.add_done_callback(pending.discard)
    for task in list(pending):
        task.cancel()
    if pending:
        await asyncio.wait(pending)
    return waits


def threads_called(prefix: str) -> int:
    return sum(thread.name.startswith(prefix) for thread in threading.enumerate())


async def shift(flags: argparse.Namespace) -> None:
    """Both at once on one loop: that is little load, since all they do is sleep."""
    phases = QUICK_PHASES if flags.quick else Phases()
    loop = asyncio.get_running_loop()
    most = {"penstock": 0, "pool": 0}
    late: dict[str, int] = {}

    async def look(executor: Executor) -> int:
        start = loop.time()
        limit = 0
        while (now := loop.time() - start) < phases.total:
            for prefix in most:
                most[prefix] = max(most[prefix], threads_called(prefix))
            if now >= phases.before + phases.long + phases.settle and not late:
                late.update({prefix: threads_called(prefix) for prefix in most})
                limit = limit_of(executor)
            await asyncio.sleep(0.1)
        return limit

    async with Executor() as executor:
        with pool_of(POOL_THREADS) as pool:
            ours, theirs, limit = await asyncio.gather(
                offered(executor.to_thread, phases),
                offered(partial(loop.run_in_executor, pool), phases),
                look(executor),
            )
    print_shift(phases, {"Executor()": ours, f"ThreadPoolExecutor({POOL_THREADS})": theirs}, most, late, limit)


def limit_of(executor: Executor) -> int:
    lane = executor.statistics().threads
    return 0 if lane is None else lane.limit


def print_shift(
    phases: Phases, sides: Mapping[str, Waits], most: Mapping[str, int], late: Mapping[str, int], limit: int
) -> None:
    shifted, back = phases.before, phases.before + phases.long
    spans = [
        (0.5, shifted, shifted + FIRST), (0.99, shifted, shifted + FIRST), (0.99, shifted + FIRST, back),
        (0.99, back, phases.total),
    ]  # fmt: skip
    rows: Rows = []
    for (name, waits), prefix in zip(sides.items(), most, strict=True):
        percentiles = [f"{waits.percentile(*span):.3f}" for span in spans]
        places = str(limit) if prefix == "penstock" else "-"
        rows.append((name, *percentiles, str(most[prefix]), places, str(late[prefix])))
    rows.append(("bar", "", "0.3", "0.05", "", "", "10" if phases == Phases() else "", ""))
    title = (
        f"shift: {RATE:.0f} calls/s of {SHORT_HOLD} s, from {shifted:.0f} s to {back:.0f} s of {LONG_HOLD} s; "
        f"seconds waited for a thread"
    )
    head = (
        "", f"p50, first {FIRST:.0f} s", "p99, first", "p99, then", "p99, short again", "most threads",
        f"limit {phases.settle:.0f} s later", "threads then",
    )  # fmt: skip
    print_table(title, head, rows)


# --- lag ---

BEAT = 0.005
BLOCKED = 500
BURNT = 1_000_000
"""Turns of a loop in pure Python: some 30 ms, since at the end of each step the GIL is free anyway."""


class Lag(NamedTuple):
    late: list[float]
    computed: float
    """Calls of `burn` that ended in a second."""


def burn() -> int:
    """Work that keeps the interpreter."""
    total = 0
    for number in range(BURNT):
        total += number & 7
    return total


async def lag_beside(call: Call | None, callers: int, seconds: float) -> Lag:
    """How late the loop wakes while `callers` make calls, one after the other."""
    loop = asyncio.get_running_loop()
    late: list[float] = []
    computed, over = 0, False

    async def work(call: Call) -> None:
        nonlocal computed
        while not over:
            await call()
            computed += not over

    working = [loop.create_task(work(call)) for _ in range(callers)] if call is not None else []
    await asyncio.sleep(0.2)  # threads are started
    started, computed = loop.time(), 0
    while (before := loop.time()) < started + seconds:
        await asyncio.sleep(BEAT)
        late.append(loop.time() - before - BEAT)
    over = True
    rate = computed / (loop.time() - started)
    if working:
        await asyncio.wait(working)
    return Lag(late, rate)


async def lag_beside_blocked_threads(seconds: float) -> Lag:
    async with Executor(threads=BLOCKED) as executor:
        over = threading.Event()
        waiting = [asyncio.create_task(executor.to_thread(over.wait)) for _ in range(BLOCKED)]
        try:
            while threads_called("penstock") < BLOCKED:
                await asyncio.sleep(0.01)
            return await lag_beside(None, 0, seconds)
        finally:
            over.set()
            await asyncio.wait(waiting)


def lag_in_a_run(seconds: float, **options: Any) -> Lag:
    """Inside `penstock.run`, whose CPU lane has always something to do."""
    seen: list[Lag] = []

    async def job(_item: int) -> None:
        seen.append(await lag_beside(partial(penstock.compute, burn), 4, seconds))

    report = penstock.run(job, [0], progress=False, **options)
    if not seen:
        raise SystemExit(str(report))
    return seen[0]


async def lag_beside_pool(threads: int, seconds: float) -> Lag:
    with pool_of(threads) as pool:
        loop = asyncio.get_running_loop()
        return await lag_beside(partial(loop.run_in_executor, pool, burn), threads, seconds)


def lags(flags: argparse.Namespace) -> None:
    """Each situation by itself."""
    seconds = 1.5 if flags.quick else 4.0
    situations: dict[str, tuple[Callable[[], Lag], str]] = {
        "idle": (lambda: asyncio.run(lag_beside(None, 0, seconds)), ""),
        f"{BLOCKED} blocked threads": (lambda: asyncio.run(lag_beside_blocked_threads(seconds)), "p50 1"),
        "penstock.run, compute without a pause": (lambda: lag_in_a_run(seconds), "p99 30"),
        "... switch_interval=None": (lambda: lag_in_a_run(seconds, switch_interval=None), ""),
        "ThreadPoolExecutor(1), computes": (lambda: asyncio.run(lag_beside_pool(1, seconds)), ""),
        "ThreadPoolExecutor(4), computes": (lambda: asyncio.run(lag_beside_pool(4, seconds)), ""),
    }
    rows: Rows = []
    for name, (measure, bar) in situations.items():
        lag = measure()
        figures = [percentile(lag.late, share) * 1e3 for share in (0.5, 0.99, 1.0)]
        rows.append((name, *(f"{figure:.2f}" for figure in figures), f"{lag.computed:.0f}", bar))
    title = f"lag: how late a loop wakes that sleeps for {BEAT * 1e3:.0f} ms, over {seconds} s each"
    print_table(title, ("", "p50 ms", "p99 ms", "most ms", "steps computed/s", "bar"), rows)


# --- full ---

FULL_CALLERS = 40
FULL_HOLD = 0.2
PROBES = 4


SlowCalls: TypeAlias = Mapping[Callable[..., Awaitable[object]], int]
"""Ways into threads, each with the number of callers that keep it full."""


@asynccontextmanager
async def kept_full(calls: SlowCalls) -> AsyncIterator[None]:
    """While the block runs, slow calls are made one after the other."""
    over = False

    async def work(call: Callable[..., Awaitable[object]]) -> None:
        while not over:
            await call(time.sleep, FULL_HOLD)

    tasks = [asyncio.create_task(work(call)) for call, callers in calls.items() for _ in range(callers)]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        over = True
        if tasks:
            await asyncio.wait(tasks)


async def timed(probe: Call) -> float:
    started = time.perf_counter()
    await probe()
    return time.perf_counter() - started


async def full_lanes(_flags: argparse.Namespace) -> None:
    """What needs the loop's own default executor, while ours or that one is full."""
    loop = asyncio.get_running_loop()
    with running_service() as url:
        port = url.rpartition(":")[2]
        connector = aiohttp.TCPConnector(limit=200, force_close=True, use_dns_cache=False)
        async with (
            connector,
            HttpClient(f"http://localhost:{port}", connector=connector, timeout=60.0) as client,
            BlockingClient(object, limit=20) as sdk,
            Executor(threads=20) as executor,
        ):
            probes: dict[str, Call] = {
                "getaddrinfo('localhost')": partial(loop.getaddrinfo, "localhost", 80),
                "GET by name": partial(client.get_json, "/api1"),
                "asyncio.to_thread(int)": partial(asyncio.to_thread, int),
            }
            in_sdk = partial(sdk.run, lambda _client, fn, *args: fn(*args))
            situations: dict[str, SlowCalls] = {
                "nothing runs": {},
                "our lanes are full": {executor.to_thread: FULL_CALLERS, in_sdk: FULL_CALLERS, executor.compute: 4},
                "the default executor is full": {asyncio.to_thread: FULL_CALLERS},
            }
            await asyncio.gather(*(probe() for probe in probes.values()))  # what is made at first use
            rows = [(name, *await probed(calls, probes)) for name, calls in situations.items()]
    title = f"full: {FULL_CALLERS} callers of {FULL_HOLD} s calls; ms until each of these has ended, median and most"
    print_table(title, ("", *probes), [*rows, ("bar", *["as with nothing"] * len(probes))])


async def probed(calls: SlowCalls, probes: Mapping[str, Call]) -> list[str]:
    """Each probe's time while the calls are made."""
    times: list[list[float]] = [[] for _ in probes]
    async with kept_full(calls):
        for _ in range(PROBES):
            for column, probe in zip(times, await asyncio.gather(*map(timed, probes.values())), strict=True):
                column.append(probe)
    return [f"{statistics.median(column) * 1e3:.1f} ({max(column) * 1e3:.1f})" for column in times]


# --- cancelled ---

GIVEN_UP, GIVERS = 200, 8
HANGS_FOR, TIMES_OUT_AFTER = 0.3, 0.05
PERMITS = 4


class Running:
    """How many calls truly have a thread."""

    def __init__(self) -> None:
        self.now = self.most = self.began = 0
        self._lock = threading.Lock()

    def hang(self) -> None:
        """The call: in a thread."""
        with self._lock:
            self.now += 1
            self.began += 1
            self.most = max(self.most, self.now)
        time.sleep(HANGS_FOR)
        with self._lock:
            self.now -= 1


async def given_up_again_and_again(call: Callable[[Callable[[], None]], Awaitable[object]]) -> Running:
    """Callers that lose patience, one call after the other, until nothing runs any more."""
    running = Running()

    async def work() -> None:
        for _ in range(GIVEN_UP // GIVERS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIMES_OUT_AFTER):
                    await call(running.hang)

    await asyncio.gather(*(work() for _ in range(GIVERS)))
    while running.now:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # the last one comes back to the loop
    return running


async def cancelled(_flags: argparse.Namespace) -> None:
    """The same callers, with each one's way to limit calls to four."""
    with silenced() as warnings, pool_of(64) as pool:
        use_as_default(pool)
        rows: Rows = [
            await cancelled_in_lane(), await cancelled_in_client(), await cancelled_in_limiter(),
            await cancelled_in_semaphore(),
        ]  # fmt: skip
    title = (
        f"cancelled: {GIVEN_UP} calls of {HANGS_FOR} s, {GIVERS} callers that each wait {TIMES_OUT_AFTER} s, a limit "
        f"of {PERMITS}; {len(warnings)} warnings logged"
    )
    head = ("", "most threads", "calls begun", "said to be given up", "never begun", "permits back")
    print_table(title, head, [*rows, ("bar", str(PERMITS), "", "as begun", "the others", str(PERMITS))])


class _Collector(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def silenced() -> Iterator[list[logging.LogRecord]]:
    """What penstock logs is collected and not shown."""
    handler = _Collector()
    logger = logging.getLogger("penstock")
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)


async def cancelled_in_lane() -> Sequence[str]:
    async with Executor(threads=PERMITS) as executor:
        running = await given_up_again_and_again(executor.to_thread)
        lane = executor.statistics().threads
    assert lane is not None, "it has been used"
    back = lane.limit - lane.busy
    return figures("executor.to_thread, threads=4", running, lane.given_up, lane.never_started, back)


async def cancelled_in_client() -> Sequence[str]:
    async with BlockingClient(object, limit=PERMITS) as client:
        running = await given_up_again_and_again(lambda fn: client.run(lambda _client: fn()))
        keys = client.statistics().values()
    attempts = sum(key.attempts for key in keys)
    back = PERMITS - sum(key.in_flight for key in keys)
    return figures("BlockingClient.run, limit=4", running, f"{attempts} attempts", "-", back)


async def cancelled_in_limiter() -> Sequence[str]:
    limiter = anyio.CapacityLimiter(PERMITS)
    running = await given_up_again_and_again(partial(anyio.to_thread.run_sync, limiter=limiter, abandon_on_cancel=True))
    return figures("anyio CapacityLimiter(4), abandon_on_cancel", running, "-", "-", limiter.available_tokens)


async def cancelled_in_semaphore() -> Sequence[str]:
    semaphore = asyncio.Semaphore(PERMITS)

    async def call(fn: Callable[[], None]) -> None:
        async with semaphore:
            await asyncio.to_thread(fn)

    running = await given_up_again_and_again(call)
    return figures("Semaphore(4), asyncio.to_thread", running, "-", "-", semaphore._value)


def figures(name: str, running: Running, given_up: object, never_begun: object, back: object) -> Sequence[str]:
    return name, str(running.most), str(running.began), str(given_up), str(never_begun), str(back)


# --- nesting ---

DEPTH, JOB_DEPTH, WIDTH = 50, 1_000, 20
GUARD = 1.0


class Nested(NamedTuple):
    """A nest, and how deep it is."""

    run: Callable[[], Awaitable[int]]
    expected: int


async def chain_through_threads() -> int:
    """Thread -> loop -> the same lane of one thread, and so on; returns the threads that it took."""
    async with Executor(threads=1) as executor:

        def in_thread(depth: int) -> int:
            return executor.from_thread(on_loop, depth - 1)

        async def on_loop(depth: int) -> int:
            if depth == 0:
                return threads_called("penstock")
            return await executor.to_thread(in_thread, depth)

        return await on_loop(DEPTH)


async def chain_of_jobs() -> int:
    """Each job waits for the one that it submits, on one slot."""
    async with Executor(limit=1) as executor:

        async def job(depth: int) -> int:
            return 0 if depth == 0 else await executor.submit(job, depth - 1)

        return await executor.submit(job, JOB_DEPTH)


async def map_in_map() -> int:
    """Every slot is held by a job that maps."""
    async with Executor(limit=4) as executor:

        async def outer(_number: int) -> int:
            return sum(await executor.map(inner, range(WIDTH)))

        async def inner(_number: int) -> int:
            await asyncio.sleep(0)
            return 0

        return sum(await executor.map(outer, range(WIDTH)))


async def chain_by_hand() -> str:
    """The first chain with `run_in_executor`: what became of it until the guard."""
    loop = asyncio.get_running_loop()
    with pool_of(1) as pool:

        def in_thread(depth: int) -> None:
            asyncio.run_coroutine_threadsafe(on_loop(depth - 1), loop).result()

        async def on_loop(depth: int) -> None:
            if depth:
                inner.append(loop.run_in_executor(pool, in_thread, depth))
                await inner[-1]

        inner: list[asyncio.Future[None]] = []
        chain = loop.create_task(on_loop(2))
        _, pending = await asyncio.wait([chain], timeout=GUARD)
        inner[-1].cancel()  # it is queued behind the thread that waits for it
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await chain
        return f"deadlock, {GUARD} s guard" if pending else "ended"


async def nesting(_flags: argparse.Namespace) -> None:
    """Each nest twice: for its time, then for the memory that Python takes for it."""
    nests: dict[str, Callable[[], Awaitable[int]]] = {
        f"thread -> loop -> the same thread, {DEPTH} deep, threads=1": chain_through_threads,
        f"job -> job, {JOB_DEPTH} deep, limit=1": chain_of_jobs,
        f"{WIDTH} jobs that each map {WIDTH}, limit=4": map_in_map,
    }
    rows: Rows = []
    for name, nest in nests.items():
        started = time.perf_counter()
        threads = await nest()
        seconds = time.perf_counter() - started
        tracemalloc.start()
        await nest()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rows.append((name, f"{seconds * 1e3:.1f} ms", str(threads or "-"), f"{peak / 1024:.0f}"))
    rows.append(("run_in_executor, one thread, 2 deep", await chain_by_hand(), "1", "-"))
    print_table("nesting: all of it on one loop", ("", "time", "threads", "peak KiB"), rows)


# --- exit ---

HUNG, HUNG_FOR = 3, 60.0
DRAIN = 0.5
EXIT_GUARD = 3.0

HANGS = f"""
import asyncio, sys, time
def hang():
    print("hangs", flush=True)
    time.sleep({HUNG_FOR})
"""
WITH_PENSTOCK = f"""{HANGS}
import penstock
async def job(_item):
    await penstock.to_thread(hang)
report = penstock.run(job, range({HUNG}), progress=False, drain_timeout={DRAIN})
sys.exit(report.exit_code)
"""
WITH_ASYNCIO = f"""{HANGS}
import signal
async def main():
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    calls = [asyncio.create_task(asyncio.to_thread(hang)) for _ in range({HUNG})]
    await told.wait()
    await asyncio.wait(calls, timeout={DRAIN})
    for call in calls:
        call.cancel()
asyncio.run(main())
"""


def exits(_flags: argparse.Namespace) -> None:
    """SIGTERM while all threads hang; the drain's deadline is part of the script."""
    rows: Rows = [
        ("penstock.run, drain_timeout=0.5", *ended(WITH_PENSTOCK), "1 s"),
        ("asyncio.run, to_thread, wait(timeout=0.5)", *ended(WITH_ASYNCIO), ""),
    ]
    title = f"exit: {HUNG} threads that hang, SIGTERM, a drain of {DRAIN} s"
    print_table(title, ("", "s from the deadline to the end", "exit status", "lines of warnings", "bar"), rows)


def ended(script: str) -> tuple[str, str, str]:
    """How long a script took to end, how it did, and how much it had to say."""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(HUNG):
            process.stdout.readline()
        deadline = time.monotonic() + DRAIN
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=DRAIN + EXIT_GUARD)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return f"more than {EXIT_GUARD:.0f}", "killed", "-"
        return f"{time.monotonic() - deadline:.2f}", str(process.returncode), str(len(said.splitlines()))


# --- all of it ---

MOST_ROUNDS_WHEN_QUICK = 3


def run_section(section: Callable[[argparse.Namespace], Awaitable[None]], flags: argparse.Namespace) -> None:
    """Run a section on a loop of the chosen kind."""

    async def measured() -> None:
        await section(flags)

    with new_runner(flags.uvloop) as runner:
        runner.run(measured())


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "hop": partial(run_section, hops),
    "batch": partial(run_section, batches),
    "from_thread": partial(run_section, trips_from_threads),
    "shift": partial(run_section, shift),
    "lag": lags,
    "full": partial(run_section, full_lanes),
    "cancelled": partial(run_section, cancelled),
    "nesting": partial(run_section, nesting),
    "exit": exits,
}


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="may be repeated; default: all")
    parser.add_argument(
        "--items", type=int, help="calls, items or trips in each round; default: of each section its own"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter waits, for a first look")
    parser.add_argument("--uvloop", action="store_true")
    return parser


def main() -> None:
    flags = make_flags().parse_args()
    if flags.quick:
        flags.rounds = min(flags.rounds, MOST_ROUNDS_WHEN_QUICK)
    wanted = flags.only or list(SECTIONS)
    if len(wanted) == 1:
        SECTIONS[wanted[0]](flags)
        return
    options = [f"--rounds={flags.rounds}", *(f"--{name}" for name in ("quick", "uvloop") if getattr(flags, name))]
    if flags.items is not None:
        options.append(f"--items={flags.items}")
    for section in wanted:  # each in a process of its own, or one would find the threads of the one before
        subprocess.run([sys.executable, __file__, f"--only={section}", *options], check=True)


if __name__ == "__main__":
    main()
