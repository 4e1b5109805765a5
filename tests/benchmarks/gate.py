"""What the gate itself costs when nobody is in its way, and how long an hour of virtual time takes.

    python tests/benchmarks/gate.py
    python tests/benchmarks/gate.py --only round_trip --rounds 30
    python tests/benchmarks/gate.py --only hour                     3.6 million round trips: minutes
    python tests/benchmarks/gate.py --only hour --seconds 60 --profile

round_trip  a permit taken and given back, and a guarded call of a function that does nothing, one after the other: with
            the default gate, with rates, with all that there is, and with a fixed limit and nothing else
hour        1,000 round trips a second through `Executor`, the default gate and `SimulatedService`, and the same without
            one or the other, to see what each of them takes. The whole of it runs for `--seconds`, the others for a
            minute at most; without `--only`, all run for a minute of virtual time instead of an hour

CPU is that of this process. `best` is the round in which the machine was least in the way: what the code takes. The
bars are 6 us for each uncontended round trip with everything on, and 180 s of CPU for the hour.
"""

import argparse
import asyncio
import cProfile
import itertools
import pstats
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial

from rounds import Cost, Samples, Stopwatch, in_turn, make_parser, new_runner, on_loop, print_table, ratios

from penstock import Executor, Gate, Retry
from penstock.gate.rate import Rate
from penstock.testing import run_in_virtual_time
from penstock.testing.simulated_service import SimulatedService, lognormal

CALLS = 5_000
WIDE = 1e9
"""Of a rate that never delays anybody: it is to cost what a rate costs."""
BAR = 6.0
"""Microseconds."""
HOUR, MINUTE = 3_600.0, 60.0
HOUR_BAR = 180.0
"""Seconds of CPU."""
RATE = 1_000.0
"""Round trips a second that the simulated service can do: 20 servers of 20 ms."""
JOBS = 120
PROFILE_LINES = 30

Call = Callable[[], Awaitable[object]]


async def nothing() -> None:
    """What is guarded."""


async def repeated(call: Call) -> Cost:
    watch = Stopwatch()
    for _ in range(CALLS):
        await call()
    return watch.cost(CALLS)


# --- round trips ---


def plain_gate() -> Gate:
    """A number of permits, and nothing else."""
    return Gate("plain", limit=100, retry=Retry(attempts=1, timeout=None, budget=None), breaker=None, timeout=None)


def rated_gate() -> Gate:
    """The default, and a rate of requests."""
    return Gate("rated", rate=Rate(WIDE))


def full_gate() -> Gate:
    """All that there is: several rates, weights, and what was really used."""
    return Gate(
        "full", rate={"requests": Rate(WIDE), "tokens": Rate(WIDE)},
        weight=lambda: {"tokens": 100.0}, used=lambda _: {"tokens": 90.0},
    )  # fmt: skip


def permit_of(gate: Gate) -> Call:
    async def taken() -> None:
        async with gate.permit():
            pass

    return taken


def call_of(gate: Gate) -> Call:
    return lambda: gate.call(nothing)


def make_contenders() -> dict[str, tuple[Call, str]]:
    """Everyone, with the bar that is theirs."""
    semaphore = asyncio.Semaphore(100)
    bar = f"{BAR:g}"

    async def semaphore_taken() -> None:
        async with semaphore:
            await nothing()

    async def timed() -> None:
        async with semaphore, asyncio.timeout(60.0):
            await nothing()

    return {
        "await a coroutine": (nothing, ""),
        "asyncio.Semaphore": (semaphore_taken, ""),
        "asyncio.Semaphore, asyncio.timeout": (timed, ""),
        "permit(), fixed limit, nothing else": (permit_of(plain_gate()), ""),
        "permit(), default": (permit_of(Gate("default")), bar),
        "permit(), a rate as well": (permit_of(rated_gate()), bar),
        "call(), fixed limit, nothing else": (call_of(plain_gate()), ""),
        "call(), fixed limit, default else": (call_of(Gate("fixed", limit=100)), ""),
        "call(), default": (call_of(Gate("default")), bar),
        "call(), a rate as well": (call_of(rated_gate()), bar),
        "call(), two rates, weight=, used= as well": (call_of(full_gate()), ""),
    }


REFERENCE = "asyncio.Semaphore, asyncio.timeout"


def round_trips(flags: argparse.Namespace) -> None:
    """Costs of one round trip in which nobody waits."""
    with new_runner(flags.uvloop) as runner:

        async def made() -> dict[str, tuple[Call, str]]:
            return make_contenders()

        contenders = runner.run(made())
        measures = {name: on_loop(runner, partial(repeated, call)) for name, (call, _) in contenders.items()}
        for measure in measures.values():
            measure()
        samples: Samples = in_turn(measures, flags.rounds)
    base = [cost.cpu for cost in samples[REFERENCE]]
    rows = []
    for name, costs in samples.items():
        cpu = [cost.cpu for cost in costs]
        low, middle, high = ratios(cpu, base)
        bar = contenders[name][1]
        rows.append(
            (
                name, f"{min(cpu) * 1e6:.2f}", f"{statistics.median(cpu) * 1e6:.2f}", f"{middle:.2f}",
                f"{low:.2f}-{high:.2f}", bar and f"{bar} {'met' if min(cpu) * 1e6 <= BAR else 'MISSED'}",
            )
        )  # fmt: skip
    loop = "uvloop" if flags.uvloop else "asyncio"
    title = f"Uncontended round trips, {CALLS} in each of {flags.rounds} rounds, {loop}"
    print_table(title, ("", "best us", "median us", "x reference", "quartiles", "bar (best)"), rows)


# --- hour ---


def new_service() -> SimulatedService:
    return SimulatedService(servers=20, service_time=lognormal(0.02, 0.2), path=0.03, seed=1)


def as_long_as(seconds: float) -> "itertools.takewhile[None]":
    """Items until so much virtual time has gone by."""
    now = asyncio.get_running_loop().time
    ends = now() + seconds
    return itertools.takewhile(lambda _: now() < ends, itertools.repeat(None))


async def through_loop(seconds: float, ask: Callable[[], Awaitable[object]], callers: int) -> int:
    """The worker loop that one would write by hand; returns how many there were."""
    source = as_long_as(seconds)
    count = 0

    async def work() -> None:
        nonlocal count
        for _ in source:
            await ask()
            count += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(work())
    return count


async def through_executor(seconds: float, ask: Callable[[], Awaitable[object]], jobs: int) -> int:
    count = 0

    async def job(_: None) -> None:
        await ask()

    async with Executor(limit=jobs) as executor, executor.as_completed(job, as_long_as(seconds)) as stream:
        async for outcome in stream:
            outcome.unwrap()
            count += 1
    return count


async def service_alone(seconds: float) -> int:
    return await through_loop(seconds, new_service().call, 50)


async def executor_and_service(seconds: float) -> int:
    return await through_executor(seconds, new_service().call, 50)


async def gate_and_service(seconds: float) -> int:
    gate, service = Gate("hour", limit=50), new_service()
    return await through_loop(seconds, lambda: gate.call(service.call), JOBS)


async def default_gate_and_service(seconds: float) -> int:
    gate, service = Gate("hour"), new_service()
    return await through_loop(seconds, lambda: gate.call(service.call), JOBS)


async def everything(seconds: float) -> int:
    gate, service = Gate("hour"), new_service()
    return await through_executor(seconds, lambda: gate.call(service.call), JOBS)


EVERYTHING = "Executor, default gate, service"
PARTS: dict[str, Callable[[float], Awaitable[int]]] = {
    "service, worker loop": service_alone,
    "Executor, service": executor_and_service,
    "gate with a fixed limit, service": gate_and_service,
    "default gate, service": default_gate_and_service,
    EVERYTHING: everything,
}


def in_virtual_time(part: Callable[[float], Awaitable[int]], seconds: float) -> tuple[int, float]:
    """How many round trips there were, and the CPU that they took."""

    async def measured() -> int:
        return await part(seconds)

    started = time.process_time()
    count = run_in_virtual_time(measured())
    return count, time.process_time() - started


def hour(flags: argparse.Namespace) -> None:
    """CPU of virtual time."""
    seconds = flags.seconds
    rows = []
    for name, part in PARTS.items():
        duration = seconds if name == EVERYTHING else min(seconds, MINUTE)
        count, cpu = in_virtual_time(part, duration)
        full = cpu / count * RATE * HOUR
        verdict = f"{HOUR_BAR:g} {'met' if full <= HOUR_BAR else 'MISSED'}" if name == EVERYTHING else ""
        each = cpu / count * 1e6
        rows.append((name, f"{duration:g}", f"{count:,}", f"{cpu:.1f}", f"{each:.1f}", f"{full:.0f}", verdict))
    head = ("", "virtual s", "round trips", "cpu s", "us each", "s for an hour", "bar")
    print_table(f"Virtual time, {RATE:,.0f} round trips a second", head, rows)
    if flags.profile:
        print_profile(min(seconds, MINUTE))


def print_profile(seconds: float) -> None:
    """Where the time of all of it goes."""
    profile = cProfile.Profile()
    profile.enable()
    in_virtual_time(everything, seconds)
    profile.disable()
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(PROFILE_LINES)


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {"round_trip": round_trips, "hour": hour}


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=30)
    parser.add_argument("--only", choices=SECTIONS, help="default: both, with a short hour")
    parser.add_argument("--seconds", type=float, help="of virtual time; default: 3600 with --only hour, else 60")
    parser.add_argument("--profile", action="store_true", help="print where the time of the hour goes")
    parser.add_argument("--uvloop", action="store_true", help="for round_trip")
    return parser


def main() -> None:
    flags = make_flags().parse_args()
    if flags.seconds is None:
        flags.seconds = HOUR if flags.only == "hour" else MINUTE
    for name, section in SECTIONS.items():
        if flags.only in (None, name):
            section(flags)


if __name__ == "__main__":
    main()
