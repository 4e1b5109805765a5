"""What a round trip costs the client: CPU of each request, everything on, against aiohttp by hand.

    python tests/benchmarks/client.py
    python tests/benchmarks/client.py --rounds 10 --items 100 --uvloop

A pair is a GET and a POST of the JSON that came back, 100 pairs in flight, over connections that stay open, against a
service in another process that is far cheaper than any client. CPU is that of this process. Rounds are short and many,
all contenders in one process and on one loop: read the medians of the ratios. `aiohttp again` is the reference a second
time: how far its ratio is from 1.00 is the noise.

The second table is the parts: what a permit, a guarded call, a timeout cost when nobody is in the way.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import aiohttp
from fast_service import running_service
from rounds import Cost, Measure, Samples, Stopwatch, in_turn, make_parser, new_runner, on_loop, print_costs
from tenacity import AsyncRetrying, stop_after_attempt, wait_random_exponential

from penstock import Executor, Gate, HttpClient, Retry

IN_FLIGHT = 100
RECORD: dict[str, str | int] = {"id": 17, "name": "Ada", "city": "Graz"}
MICRO_CALLS = 2_000

Pair: TypeAlias = Callable[[int], Awaitable[object]]
Run: TypeAlias = Callable[[int], Awaitable[None]]


def retrying() -> AsyncRetrying:
    """What a call gets that is retried with tenacity: shared objects mix up their calls, so each has its own."""
    return AsyncRetrying(stop=stop_after_attempt(3), wait=wait_random_exponential(max=20), reraise=True)


async def work_off(pair: Pair, pairs: int) -> None:
    """The worker loop that one would write by hand."""
    source = iter(range(pairs))

    async def work() -> None:
        for number in source:
            await pair(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(work())


def new_session() -> aiohttp.ClientSession:
    """A session as it comes, with a limit that does not bind."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=2 * IN_FLIGHT))


def by_hand(session: aiohttp.ClientSession, url: str) -> Pair:
    async def pair(_number: int) -> None:
        async with session.get(f"{url}/api1", params=RECORD) as response:
            profile = await response.json()
        async with session.post(f"{url}/api2", json=profile) as response:
            await response.json()

    return pair


def by_hand_retried(session: aiohttp.ClientSession, url: str) -> Pair:
    async def ask() -> Any:
        async with session.get(f"{url}/api1", params=RECORD) as response:
            response.raise_for_status()
            return await response.json()

    async def send(profile: Any) -> Any:
        async with session.post(f"{url}/api2", json=profile) as response:
            response.raise_for_status()
            return await response.json()

    async def pair(_number: int) -> None:
        profile: Any = await retrying()(ask)
        await retrying()(send, profile)

    return pair


def through_client(client: HttpClient) -> Pair:
    async def pair(_number: int) -> None:
        profile = await client.get_json("/api1", params=RECORD)
        await client.post_json("/api2", json=profile)

    return pair


def through_executor(client: HttpClient, executor: Executor) -> Run:
    pair = through_client(client)

    async def run(pairs: int) -> None:
        async with executor.as_completed(pair, range(pairs)) as stream:
            async for outcome in stream:
                outcome.unwrap()

    return run


REFERENCE = "aiohttp by hand"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[dict[str, Run]]:
    """All contenders, each with connections of its own."""
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(new_session()) for _ in range(3)]
        clients = [await stack.enter_async_context(HttpClient(url)) for _ in range(2)]
        executor = await stack.enter_async_context(Executor(limit=IN_FLIGHT))
        yield {
            REFERENCE: partial(work_off, by_hand(sessions[0], url)),
            "aiohttp again": partial(work_off, by_hand(sessions[1], url)),
            "aiohttp + AsyncRetrying": partial(work_off, by_hand_retried(sessions[2], url)),
            "HttpClient, worker loop": partial(work_off, through_client(clients[0])),
            "HttpClient, as_completed": through_executor(clients[1], executor),
        }


async def measured(run: Run, pairs: int) -> Cost:
    watch = Stopwatch()
    await run(pairs)
    return watch.cost(2 * pairs)


def time_round_trips(runner: asyncio.Runner, url: str, rounds: int, pairs: int) -> Samples:
    stack = AsyncExitStack()
    contenders = runner.run(stack.enter_async_context(opened(url)))
    try:
        measures: dict[str, Measure] = {
            name: on_loop(runner, partial(measured, run, pairs)) for name, run in contenders.items()
        }
        for measure in measures.values():
            measure()  # opens the connections
        return in_turn(measures, rounds)
    finally:
        runner.run(stack.aclose())


async def nothing() -> None:
    """What is guarded in the second table."""


async def repeated(call: Callable[[], Awaitable[object]]) -> Cost:
    watch = Stopwatch()
    for _ in range(MICRO_CALLS):
        await call()
    return watch.cost(MICRO_CALLS)


def make_parts() -> dict[str, Callable[[], Awaitable[object]]]:
    """What is done once for each round trip, by itself."""
    gate = Gate("timed")
    untimed = Gate("untimed", timeout=None, retry=Retry(timeout=None))
    semaphore = asyncio.Semaphore(IN_FLIGHT)

    async def semaphore_taken() -> None:
        async with semaphore:
            pass

    async def permit_taken() -> None:
        async with gate.permit():
            pass

    async def timed() -> None:
        async with asyncio.timeout(60.0):
            await nothing()

    return {
        "await a coroutine": nothing,
        "asyncio.Semaphore, taken and given back": semaphore_taken,
        "gate.permit(), taken and given back": permit_taken,
        "asyncio.timeout": timed,
        "gate.call": lambda: gate.call(nothing),
        "gate.call, without timeouts": lambda: untimed.call(nothing),
        "AsyncRetrying, a new one for each call": lambda: retrying()(nothing),
    }


def time_parts(runner: asyncio.Runner, rounds: int) -> Samples:
    async def made() -> dict[str, Callable[[], Awaitable[object]]]:
        return make_parts()

    parts = runner.run(made())
    return in_turn({name: on_loop(runner, partial(repeated, call)) for name, call in parts.items()}, rounds)


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=40)
    parser.add_argument("--items", type=int, default=300, help="pairs in each round; default: 300")
    parser.add_argument("--uvloop", action="store_true")
    return parser


def main() -> None:
    flags = make_flags().parse_args()
    with new_runner(flags.uvloop) as runner:
        with running_service() as url:
            samples = time_round_trips(runner, url, flags.rounds, flags.items)
        loop = "uvloop" if flags.uvloop else "asyncio"
        title = f"{flags.items} GET-POST pairs, {IN_FLIGHT} in flight, {flags.rounds} rounds, {loop}"
        print_costs(title, samples, REFERENCE, unit="us/request")
        parts = time_parts(runner, flags.rounds)
        print_costs(f"{MICRO_CALLS} calls one after the other", parts, "gate.call", unit="us/call")


if __name__ == "__main__":
    main()
