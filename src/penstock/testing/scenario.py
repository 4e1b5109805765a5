"""Closed-loop scenarios: the real gate and the real executor against a simulated service, written down as data.

    scenario file (TOML) -> Scenario -> run_scenario, in virtual time -> Result -> check -> Finding for each expectation

A scenario says what the service is and how it changes, what is asked of it and for how long, and what is expected in
which stretch of time. What it is compared with is the best fixed limit of each window (`Best`), which `best_static`
finds by running the same scenario without a gate, with one fixed limit after another.

Guarantees: the same scenario, limit and seed give the same `Result` to the last bit, whatever the machine is doing;
the generator of the `random` module, from which gates seed themselves, is put back as it was found. Blocks until the
virtual time is over; not to be called while a loop runs in the thread.
"""

import asyncio
import itertools
import math
import random
import tomllib
from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast

from penstock.errors import HttpStatusError, UsageError
from penstock.executor.executor import Executor
from penstock.gate.gate import Gate
from penstock.gate.limiter import LimitRule
from penstock.gate.round_trip import RoundTrip
from penstock.testing.simulated_service import Answer, Conditions, Draw, Quota, SimulatedService, lognormal, mixture
from penstock.testing.virtual_clock import run_in_virtual_time

TICK = 0.25
"""Seconds between two points of a time series."""
REACHED = 0.9
"""Share of the best throughput from which on it counts as reached."""
REACHED_OVER = 0.5
"""Seconds over which it has to be."""
LEAST_LOSS = 0.01
"""Share of the highest throughput that the best fixed limit may give away for less waiting at the service."""
MOST_REFUSED = 0.02
"""Share of refused requests up to which a fixed limit may be the best one."""
MINUTE = 60.0

Limit: TypeAlias = int | LimitRule


@dataclass(frozen=True)
class Change:
    """What changes at the service, and when."""

    at: float
    conditions: Conditions


@dataclass(frozen=True)
class Load:
    """What is asked of the service by each client, from `start` to `stop`."""

    kind: Literal["backlog", "steady", "poisson"]
    """There is always more to do; or jobs come at even times; or at random ones."""
    start: float
    stop: float
    rate: float
    """Jobs that come in a second; nothing for a backlog."""
    jobs: int
    """Jobs at once: the executor's limit."""


@dataclass(frozen=True)
class Window:
    """A stretch of time that is looked at."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Expectation:
    """A range for one number of one window."""

    metric: str
    window: str
    at_least: float
    at_most: float
    since: float
    """Where `reached_after` begins to count."""

    def __str__(self) -> str:
        low = "" if self.at_least == -math.inf else f"at least {self.at_least:g}"
        high = "" if self.at_most == math.inf else f"at most {self.at_most:g}"
        return f"{self.metric} in {self.window}: {low}{low and high and ', '}{high}"


class Best(NamedTuple):
    """What the best fixed limit does in a window."""

    limit: int
    throughput: float
    mean: float
    p99: float


@dataclass(frozen=True)
class Scenario:
    """A scenario; see `load_scenario` for its file."""

    name: str
    title: str
    about: str
    duration: float
    service: Conditions
    changes: tuple[Change, ...]
    loads: tuple[Load, ...]
    clients: int
    gate: Mapping[str, Any]
    windows: Mapping[str, Window]
    expectations: tuple[Expectation, ...]
    sweep: tuple[int, int] | None
    """From which fixed limit to which the best one is looked for; None: nothing is compared with it."""
    long: bool
    """Too long for everyday."""
    best: Mapping[str, Best] = field(default_factory=dict)


class Finding(NamedTuple):
    """What came of an expectation."""

    expectation: Expectation
    value: float

    @property
    def met(self) -> bool:
        """True when the value is in its range."""
        return self.expectation.at_least <= self.value <= self.expectation.at_most

    def __str__(self) -> str:
        return f"{self.expectation}; found {self.value:.4g}"


# --- files ---


def load_scenario(path: Path, best: Mapping[str, Mapping[str, Any]] | None = None) -> Scenario:
    """Read a scenario file.

        title = "Capacity falls to a quarter, and comes back"
        about = "Which hole of other rules it is about."
        duration = 120.0
        sweep = [8, 80]                                  # fixed limits to compare with

        [service]                                        # the arguments of SimulatedService
        servers = 16
        service_time = { mean = 0.02, sigma = 0.2 }      # or a list of these, each with its share
        path = 0.03

        [[change]]
        at = 40.0
        servers = 4

        [[load]]
        kind = "backlog"                                 # or "steady", "poisson", with rate = jobs a second
        jobs = 300

        [[window]]
        name = "quarter"
        start = 43.0
        stop = 80.0

        [[expect]]
        metric = "throughput_share"
        window = "quarter"
        at_least = 0.95

    `clients`, `long` and the table `gate` (arguments of `Gate`) can be left out. `best`: what `best_static` has found
    for each window.

    Raises:
        UsageError: something in it is unknown or missing.
        OSError, tomllib.TOMLDecodeError: it cannot be read.
    """
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        scenario = _scenario(path.stem, found, {name: Best(**numbers) for name, numbers in (best or {}).items()})
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: {type(error).__name__}: {error}. See load_scenario for what is expected.") from error
    for load in scenario.loads:
        if load.kind not in ("backlog", "steady", "poisson") or (load.kind != "backlog" and load.rate <= 0):
            raise UsageError(
                f'{path}: found {load}: expected the kind "backlog", or "steady" or "poisson" with a rate.'
            )
    for expectation in scenario.expectations:
        if expectation.metric not in METRICS or expectation.window not in scenario.windows:
            raise UsageError(f"{path}: unknown metric or window in {expectation}. Metrics: {', '.join(METRICS)}.")
    return scenario


def _scenario(name: str, found: dict[str, Any], best: Mapping[str, Best]) -> Scenario:
    duration = float(found.pop("duration"))
    windows = [Window(**table) for table in found.pop("window")]
    sweep = found.pop("sweep", None)
    return Scenario(
        name=name,
        duration=duration,
        service=_conditions(found.pop("service")),
        changes=tuple(Change(table.pop("at"), _conditions(table)) for table in found.pop("change", [])),
        loads=tuple(Load(**{"start": 0.0, "stop": duration, "rate": 0.0, **table}) for table in found.pop("load")),
        clients=found.pop("clients", 1),
        gate=_gate(found.pop("gate", {})),
        windows={window.name: window for window in windows},
        expectations=tuple(
            Expectation(**{"at_least": -math.inf, "at_most": math.inf, "since": 0.0, **table})
            for table in found.pop("expect")
        ),
        sweep=None if sweep is None else (sweep[0], sweep[1]),
        long=found.pop("long", False),
        best=best,
        **found,
    )


def _conditions(table: dict[str, Any]) -> Conditions:
    conditions = dict(table)
    if "service_time" in table:
        conditions["service_time"] = _service_time(table["service_time"])
    if table.get("quota"):
        conditions["quota"] = Quota(**table["quota"])
    return cast("Conditions", conditions)


def _gate(table: dict[str, Any]) -> Mapping[str, Any]:
    """TOML has no None: `breaker = false` is no breaker."""
    return {**table, "breaker": None} if table.get("breaker") is False else table


def _service_time(found: Any) -> float | Draw:
    if isinstance(found, Mapping):
        return lognormal(found["mean"], found["sigma"])
    if isinstance(found, Sequence):
        return mixture(*((part["share"], lognormal(part["mean"], part["sigma"])) for part in found))
    return float(found)


# --- running ---


class Client:
    """One client's gate, and all that has happened to it. Numbers by tick are counts of what happened in it."""

    def __init__(self, gate: "Gate | _FixedLimit", ticks: int) -> None:
        self.gate = gate
        self.attempts = [0] * ticks
        self.first_attempts = [0] * ticks
        self.succeeded = [0] * ticks
        self.refused = [0] * ticks
        self.failed = [0] * ticks
        """Attempts without a usable answer; those that the gate gave up are counted when it did."""
        self.jobs_succeeded = [0] * ticks
        self.jobs_failed = [0] * ticks
        self.limit: list[int] = []
        """As it was at each tick."""
        self.in_flight: list[int] = []
        self.latencies_at = array("d")
        """When each answer came, in seconds since the start, and how long after its attempt had begun."""
        self.latencies = array("d")


@dataclass(frozen=True)
class Result:
    """What happened in one run."""

    scenario: Scenario
    seed: int
    clients: tuple[Client, ...]
    service: SimulatedService

    def series(self, name: str) -> list[int]:
        """One time series, such as "succeeded" or "limit", summed over the clients."""
        return [sum(values) for values in zip(*(getattr(client, name) for client in self.clients), strict=True)]

    def count(self, name: str, start: float, stop: float) -> int:
        """How many there were from `start` to `stop`, to the tick."""
        return sum(sum(getattr(client, name)[_tick(start) : _tick(stop)]) for client in self.clients)

    def throughput(self, start: float, stop: float) -> float:
        """Answers in a second."""
        return self.count("succeeded", start, stop) / (stop - start)

    def latencies(self, start: float, stop: float) -> list[float]:
        """Of the answers that came from `start` to `stop`, sorted."""
        found: list[float] = []
        for client in self.clients:
            bounds = (bisect_left(client.latencies_at, start), bisect_left(client.latencies_at, stop))
            found.extend(client.latencies[bounds[0] : bounds[1]])
        return sorted(found)


def run_scenario(scenario: Scenario, *, limit: Limit | None = None, seed: int = 1, **gate: Any) -> Result:
    """Run a scenario in virtual time and return what happened.

    Args:
        scenario: what to run.
        limit: a number, or a rule such as `Adaptive()`, for each client's gate; None is what a gate has by default.
        seed: of the service, of the load and of the gates.
        gate: further arguments of `Gate`, before those of the scenario.

    Raises:
        UsageError: the scenario or an argument cannot work.
    """
    options = {**scenario.gate, **({} if limit is None else {"limit": limit}), **gate}
    before = random.getstate()
    random.seed(seed)
    try:
        return run_in_virtual_time(_run(scenario, seed, lambda: Gate(scenario.name, **options)))
    finally:
        random.setstate(before)


def run_with_fixed_limit(scenario: Scenario, limit: int, *, seed: int = 1) -> Result:
    """Run a scenario without any gate: each client has so many in flight at once, and that is all it knows.

    What a gate is compared with: no retries, no pauses, nothing learnt. Everything else is as for `run_scenario`.
    """
    jobs = tuple(replace(load, jobs=min(load.jobs, limit)) for load in scenario.loads)
    return run_in_virtual_time(
        _run(replace(scenario, loads=jobs), seed, lambda: _FixedLimit(limit, scenario.gate.get("timeout")))
    )


async def _run(scenario: Scenario, seed: int, new_gate: "Callable[[], Gate | _FixedLimit]") -> Result:
    service = SimulatedService(**scenario.service, seed=seed)
    started = asyncio.get_running_loop().time()
    ticks = _tick(scenario.duration) + 1  # one more for what happens at the very end
    clients = tuple(Client(new_gate(), ticks) for _ in range(scenario.clients))
    for client in clients:
        client.gate.service(None)  # a rule that cannot work says so before there are jobs that fail by it
    for change in scenario.changes:
        service.change_in(change.at, **change.conditions)
    rng = random.Random(seed)
    loads = [_ask(load, client, service, started, rng) for load in scenario.loads for client in clients]
    tasks = [asyncio.create_task(task) for task in [_watch(clients), *loads]]
    try:
        ended, _ = await asyncio.wait(tasks, timeout=scenario.duration, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in ended:
        task.result()
    return Result(scenario, seed, clients, service)


async def _watch(clients: Iterable[Client]) -> None:
    """Note the limits. In the middle of each tick, so that it is never a question what came first."""
    await asyncio.sleep(TICK / 2)
    while True:
        for client in clients:
            queue = client.gate.service(None)
            client.limit.append(queue.limit)
            client.in_flight.append(queue.in_flight)
        await asyncio.sleep(TICK)


async def _ask(load: Load, client: Client, service: SimulatedService, started: float, rng: random.Random) -> None:
    """Ask one client's service for what a load says; cancelled at the end."""
    await asyncio.sleep(load.start)
    now = asyncio.get_running_loop().time

    async def job(_: object) -> None:
        began = now()
        try:
            await client.gate.perform(_Call(client, service, now, started))
        except Exception:
            if now() == began:  # an open breaker that fails fast: a backlog of that would never let time go on
                await asyncio.sleep(TICK / 10)
            raise

    async with _stopped(Executor(limit=load.jobs)) as executor:
        if load.kind == "backlog":
            source = itertools.takewhile(lambda _: now() < started + load.stop, itertools.repeat(None))
            async with executor.as_completed(job, source) as stream:
                async for outcome in stream:
                    (client.jobs_succeeded if outcome.ok else client.jobs_failed)[_tick(now() - started)] += 1
            return

        def ended(future: "asyncio.Future[None]") -> None:
            if not future.cancelled():
                failed = future.exception() is not None
                (client.jobs_failed if failed else client.jobs_succeeded)[_tick(now() - started)] += 1

        due = started + load.start
        while (due := due + (1 / load.rate if load.kind == "steady" else rng.expovariate(load.rate))) < (
            started + load.stop
        ):
            await asyncio.sleep(due - now())
            executor.submit(job, None).add_done_callback(ended)
        await asyncio.sleep(started + load.stop - now())


@asynccontextmanager
async def _stopped(executor: Executor) -> AsyncIterator[Executor]:
    """An executor that gives up at the end what it has not done."""
    async with executor:
        yield executor
        await executor.shutdown(cancel_futures=True, timeout=0.0)


class _FixedLimit:
    """What stands where a gate would: the executor has no more slots than there may be in flight."""

    def __init__(self, limit: int, timeout: float | None) -> None:
        self.limit = limit
        self.in_flight = 0
        self._timeout = timeout

    def service(self, _key: None) -> Self:
        return self

    async def perform(self, trip: RoundTrip[Answer]) -> Answer:
        self.in_flight += 1
        try:
            async with asyncio.timeout(self._timeout):
                return await trip.attempt()
        finally:
            self.in_flight -= 1


class _Call(RoundTrip[Answer]):
    """One round trip to the simulated service, which keeps count."""

    __slots__ = ("_attempted", "_client", "_now", "_service", "_started", "headers", "rtt")

    def __init__(self, client: Client, service: SimulatedService, now: Callable[[], float], started: float) -> None:
        self.rtt: float | None = None
        self.headers: Mapping[str, str] | None = None
        self._client = client
        self._service = service
        self._now = now
        self._started = started
        self._attempted = False

    async def attempt(self) -> Answer:
        client = self._client
        tick = int((self._now() - self._started) / TICK)
        client.attempts[tick] += 1
        if not self._attempted:
            self._attempted = True
            client.first_attempts[tick] += 1
        try:
            answer = await self._service.call()
        except HttpStatusError as error:
            self.headers = getattr(error, "headers", None)
            self._count(client.refused if error.status == 429 else client.failed)
            raise
        except BaseException:
            self._count(client.failed)
            raise
        at = self._now() - self._started
        client.succeeded[int(at / TICK)] += 1
        client.latencies_at.append(at)
        client.latencies.append(answer.elapsed)
        self.rtt = answer.elapsed
        if answer.headers:
            self.headers = answer.headers
        return answer

    def repeatable(self, _error: Exception) -> bool:
        return True

    def __str__(self) -> str:
        return "a simulated call"

    def _count(self, ticks: list[int]) -> None:
        ticks[int((self._now() - self._started) / TICK)] += 1


def _tick(at: float) -> int:
    return int(at / TICK)


# --- what came of it ---


def check(result: Result) -> list[Finding]:
    """What came of each expectation."""
    return [
        Finding(expectation, METRICS[expectation.metric](result, expectation))
        for expectation in result.scenario.expectations
    ]


def _window(result: Result, expectation: Expectation) -> Window:
    return result.scenario.windows[expectation.window]


def _best(result: Result, expectation: Expectation) -> Best:
    try:
        return result.scenario.best[expectation.window]
    except KeyError:
        raise UsageError(
            f"scenario {result.scenario.name!r}: nothing is known of the best fixed limit in {expectation.window!r}. "
            f"Find it with best_static."
        ) from None


def _share_of_best(result: Result, expectation: Expectation) -> float:
    window = _window(result, expectation)
    return result.throughput(window.start, window.stop) / _best(result, expectation).throughput


def _p99_by_best(result: Result, expectation: Expectation) -> float:
    window = _window(result, expectation)
    return _p99(result.latencies(window.start, window.stop)) / _best(result, expectation).p99


def _mean_by_best(result: Result, expectation: Expectation) -> float:
    window = _window(result, expectation)
    return _mean(result.latencies(window.start, window.stop)) / _best(result, expectation).mean


def _reached_after(result: Result, expectation: Expectation) -> float:
    """Seconds from `since` to the end of the first half second with 90 % of the best throughput."""
    return _reached(result, expectation, expectation.since)


def _first_answer_after(result: Result, expectation: Expectation) -> float:
    """Seconds from `since` to the first answer."""
    succeeded = result.series("succeeded")
    for tick in range(_tick(expectation.since), len(succeeded)):
        if succeeded[tick]:
            return tick * TICK - expectation.since
    return math.inf


def _reached_after_first_answer(result: Result, expectation: Expectation) -> float:
    """As `reached_after`, from the first answer on: what an open breaker waits is not held against the limit."""
    return _reached(result, expectation, expectation.since + _first_answer_after(result, expectation))


def _reached(result: Result, expectation: Expectation, since: float) -> float:
    if since == math.inf:
        return math.inf
    wanted = REACHED * _best(result, expectation).throughput * REACHED_OVER
    width = _tick(REACHED_OVER)
    succeeded = result.series("succeeded")
    for tick in range(_tick(since), len(succeeded) - width):
        if sum(succeeded[tick : tick + width]) >= wanted:
            return (tick + width) * TICK - since
    return math.inf


def _refused_share(result: Result, expectation: Expectation) -> float:
    window = _window(result, expectation)
    attempts = result.count("attempts", window.start, window.stop)
    return result.count("refused", window.start, window.stop) / max(1, attempts)


def _quota_share(result: Result, expectation: Expectation) -> float:
    window = _window(result, expectation)
    quota = result.scenario.service.get("quota")
    if quota is None:
        raise UsageError(f"scenario {result.scenario.name!r} has no quota.")
    return result.throughput(window.start, window.stop) / (quota.amount / quota.per)


def _amplification(result: Result, expectation: Expectation) -> float:
    """Attempts by first attempts, in the worst minute of the window."""
    window = _window(result, expectation)
    attempts, first = result.series("attempts"), result.series("first_attempts")
    width = _tick(min(MINUTE, window.stop - window.start))
    worst = 0.0
    for tick in range(_tick(window.start), _tick(window.stop) - width + 1):
        asked = sum(first[tick : tick + width])
        worst = max(worst, sum(attempts[tick : tick + width]) / asked) if asked else worst
    return worst


def _attempts_per_second(result: Result, expectation: Expectation) -> float:
    window = _window(result, expectation)
    return result.count("attempts", window.start, window.stop) / (window.stop - window.start)


def _jobs_succeeded_share(result: Result, expectation: Expectation) -> float:
    window = _window(result, expectation)
    succeeded = result.count("jobs_succeeded", window.start, window.stop)
    return succeeded / max(1, succeeded + result.count("jobs_failed", window.start, window.stop))


def _jain(result: Result, expectation: Expectation) -> float:
    """Jain's index: 1 when all clients get the same, 1/n when one gets all (Jain, Chiu, Hawe, DEC-TR-301, 1984)."""
    window = _window(result, expectation)
    got = [sum(c.succeeded[_tick(window.start) : _tick(window.stop)]) for c in result.clients]
    return sum(got) ** 2 / (len(got) * sum(amount * amount for amount in got))


def _mean_limit(result: Result, expectation: Expectation) -> float:
    return _mean(_limits(result, expectation))


def _limit_drift(result: Result, expectation: Expectation) -> float:
    """By which share the mean limit of the window's first sixth and that of all of it differ."""
    limits = _limits(result, expectation)
    first = _mean(limits[: len(limits) // 6])
    return abs(_mean(limits) - first) / first


def _limit_variation(result: Result, expectation: Expectation) -> float:
    """Standard deviation by mean of the limit."""
    limits = _limits(result, expectation)
    mean = _mean(limits)
    return math.sqrt(_mean([(limit - mean) ** 2 for limit in limits])) / mean


def _limits(result: Result, expectation: Expectation) -> list[int]:
    window = _window(result, expectation)
    return result.series("limit")[_tick(window.start) : _tick(window.stop)]


METRICS: Mapping[str, Callable[[Result, Expectation], float]] = {
    "throughput_share": _share_of_best,
    "p99_ratio": _p99_by_best,
    "mean_ratio": _mean_by_best,
    "reached_after": _reached_after,
    "first_answer_after": _first_answer_after,
    "reached_after_first_answer": _reached_after_first_answer,
    "refused_share": _refused_share,
    "quota_share": _quota_share,
    "amplification": _amplification,
    "attempts_per_second": _attempts_per_second,
    "jobs_succeeded_share": _jobs_succeeded_share,
    "jain": _jain,
    "mean_limit": _mean_limit,
    "limit_drift": _limit_drift,
    "limit_variation": _limit_variation,
}
"""What can be expected of a window."""


def best_static(scenario: Scenario, *, seeds: Sequence[int] = (1,)) -> dict[str, Best]:
    """The best fixed limit for each window in which anything gets through: runs the scenario with some twenty of them.

    The best one is the lowest whose throughput is within 1 % of the highest, among those that get no more than 2 % of
    their requests refused: beyond the knee more throughput is only bought by waiting. Its numbers are means over
    `seeds`: of one alone, the limit that was lucky would win.

    Raises:
        UsageError: the scenario has no `sweep`.
    """
    if scenario.sweep is None:
        raise UsageError(f"scenario {scenario.name!r} has no sweep = [lowest limit, highest limit].")
    seen: dict[str, list[tuple[int, _Seen]]] = {name: [] for name in scenario.windows}
    for limit in limits_between(*scenario.sweep):
        results = [run_with_fixed_limit(scenario, limit, seed=seed) for seed in seeds]
        for name, window in scenario.windows.items():
            seen[name].append((limit, _mean_of([_seen(result, window) for result in results])))
    found = {name: _best_of(limits) for name, limits in seen.items()}
    return {name: best for name, best in found.items() if best.throughput}


def limits_between(lowest: int, highest: int) -> list[int]:
    """Limits to try, each some 7 % above the one before, and never less than one."""
    limits = [lowest]
    while limits[-1] < highest:
        limits.append(min(highest, max(limits[-1] + 1, round(limits[-1] * 1.07))))
    return limits


class _Seen(NamedTuple):
    throughput: float
    mean: float
    p99: float
    refused: float


def _seen(result: Result, window: Window) -> _Seen:
    latencies = result.latencies(window.start, window.stop)
    refused = result.count("refused", window.start, window.stop)
    attempts = result.count("attempts", window.start, window.stop)
    throughput = result.throughput(window.start, window.stop)
    return _Seen(throughput, _mean(latencies), _p99(latencies), refused / max(1, attempts))


def _mean_of(seen: Sequence[_Seen]) -> _Seen:
    return _Seen(*map(_mean, zip(*seen, strict=True)))


def _best_of(seen: list[tuple[int, _Seen]]) -> Best:
    taken = [entry for entry in seen if entry[1].refused <= MOST_REFUSED] or seen
    highest = max(found.throughput for _, found in taken)
    limit, best = next(entry for entry in taken if entry[1].throughput >= (1 - LEAST_LOSS) * highest)
    return Best(limit, best.throughput, best.mean, best.p99)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _p99(values: Sequence[float]) -> float:
    """The 99th percentile of sorted values, by nearest rank."""
    return values[math.ceil(0.99 * len(values)) - 1] if values else math.nan
