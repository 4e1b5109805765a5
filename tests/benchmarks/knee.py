"""The measured limit against a real service with a knee: throughput, by that of the best fixed limit.

    python tests/benchmarks/knee.py
    python tests/benchmarks/knee.py --knee 12 --rounds 5

`examples/service.py` in a process of its own serves 12 requests at once, then another one 30, each for 50 ms; who is
one too many waits there. `HttpClient` with its default limit is compared with `HttpClient` with fixed limits around the
knee. All take turns, round after round, each with a new client, so that each round finds the limit anew. There is
always more to ask for than is let through.

For the fixed limits a round is a warm-up and a stretch that is counted; for ours the warm-up is longer, because its
time to 90 % is measured as well: until the end of the first half second with 90 % of the throughput of the best fixed
limit in that round. The best fixed limit is the lowest whose median is within 1 % of the highest; `x best` is the
median of the ratios to it, round by round. The bar is 0.90. `p99` is of all round trips of a turn; ours has those in it
that waited while the limit was looked for.
"""

import argparse
import asyncio
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rounds import make_parser, print_table, ratios

from penstock import HttpClient

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from service import EmbeddedService, ServiceConfig

KNEES = (12, 30)
LATENCY = 0.05
AROUND = (0.8, 1.0, 1.2, 1.5, 2.0)
"""Fixed limits, by the knee. Beyond it more only wait, so a finer comb finds nothing."""
CALLERS = 80
"""Who ask, one request after the other: more than any limit that makes sense here lets through."""
WARM_UP, COUNTED = 0.4, 1.2
"""Seconds, of a fixed limit."""
OUR_WARM_UP = 2.5
"""Seconds. More than is allowed for finding the limit, so that what is counted is the limit that was found."""
LEAST_LOSS = 0.01
"""Share of the highest throughput that the best fixed limit may give away: beyond the knee more only wait."""
OURS = "measured (default)"
REACHED, OVER, STEP = 0.9, 0.5, 0.05
"""Share of the throughput, the seconds for which it has to be there, and by how many seconds these are moved."""
BAR = 0.90


class Seen(NamedTuple):
    """What came of one turn."""

    rate: float
    """Answers a second, of the stretch that is counted."""
    p99: float
    """Seconds, of all of it."""
    limit: int
    """At the end."""
    answers: Sequence[float]
    """When they came, in seconds since the turn began."""


async def ask(url: str, limit: int | None, warm_up: float) -> Seen:
    """One turn, with a client of its own. `limit`: None is the default."""
    client = HttpClient(url) if limit is None else HttpClient(url, limit=limit)
    answers: list[float] = []
    async with client as api:
        started = time.perf_counter()
        ends = started + warm_up + COUNTED

        async def work(caller: int) -> None:
            while time.perf_counter() < ends:
                await api.get_json("/api1", params={"id": caller})
                answers.append(time.perf_counter() - started)

        async with asyncio.TaskGroup() as group:
            for caller in range(CALLERS):
                group.create_task(work(caller))
        (found,) = api.statistics().values()
    counted = sum(warm_up <= at < warm_up + COUNTED for at in answers)
    return Seen(counted / COUNTED, found.latency.p99, found.limit, answers)


async def take_turns(url: str, limits: Sequence[int], rounds: int) -> dict[str, list[Seen]]:
    """Everyone in turn; who begins moves on."""
    contenders: dict[str, int | None] = {OURS: None, **{f"fixed, {limit}": limit for limit in limits}}
    seen: dict[str, list[Seen]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            limit = contenders[name]
            seen[name].append(await ask(url, limit, OUR_WARM_UP if limit is None else WARM_UP))
    return seen


def reached_after(answers: Sequence[float], rate: float) -> float:
    """Seconds until `OVER` seconds have gone by with a share of `rate`; infinite if that never was."""
    ordered = sorted(answers)
    for step in range(int((ordered[-1] - OVER) / STEP) + 1):
        since = step * STEP
        if sum(since <= at < since + OVER for at in ordered) >= REACHED * rate * OVER:
            return since + OVER
    return math.inf


def rates(seen: Sequence[Seen]) -> list[float]:
    return [turn.rate for turn in seen]


def print_seen(knee: int, seen: Mapping[str, Sequence[Seen]]) -> None:
    """The table of one knee, and whether the bar is met."""
    fixed = {name: statistics.median(rates(turns)) for name, turns in seen.items() if name != OURS}
    best = next(name for name in fixed if fixed[name] >= (1 - LEAST_LOSS) * max(fixed.values()))
    rows = []
    for name, turns in seen.items():
        low, middle, high = ratios(rates(turns), rates(seen[best]))
        reached = [
            reached_after(turn.answers, other.rate) for turn, other in zip(seen[OURS], seen[best], strict=True)
        ]  # fmt: skip
        rows.append(
            (
                f"**{name}**" if name == best else name,
                f"{statistics.median(rates(turns)):.0f}", f"{middle:.3f}", f"{low:.2f}-{high:.2f}",
                f"{statistics.median(turn.p99 for turn in turns) * 1000:.0f}",
                " ".join(str(turn.limit) for turn in turns) if name == OURS else "",
                f"{statistics.median(reached):.2f}" if name == OURS else "",
            )
        )  # fmt: skip
    print_table(
        f"{knee} at once, {LATENCY * 1000:.0f} ms: at most {knee / LATENCY:.0f} a second; the best fixed limit is bold",
        ("", "answers/s", "x best", "quartiles", "p99 ms", "limits found", "s to 90 %"),
        rows,
    )
    _, ours, _ = ratios(rates(seen[OURS]), rates(seen[best]))
    print(f"\n{ours:.3f} of the best fixed limit; the bar is {BAR:.2f}: {'met' if ours >= BAR else 'MISSED'}")


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--knee", type=int, action="append", help=f"may be repeated; default: {KNEES}")
    return parser


def main() -> None:
    flags = make_flags().parse_args()
    for knee in flags.knee or KNEES:
        limits = sorted({max(1, round(knee * factor)) for factor in AROUND})
        with EmbeddedService(ServiceConfig(knee=knee, latency=LATENCY, errors=0.0, drops=0.0)) as service:
            print_seen(knee, asyncio.run(take_turns(service.url, limits, flags.rounds)))


if __name__ == "__main__":
    main()
