"""Rounds taken in turn, and the tables that are printed of them.

On a shared machine a number by itself says little: the next minute may be twice as slow. So contenders are measured in
turn, round after round, and each is compared with the reference of the same round. Of these ratios the median and the
quartiles are printed; noise that lasts longer than a round hits both sides alike and cancels out.
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias


class Cost(NamedTuple):
    """What one unit of work (an item, a request, a call) took in one round, in seconds."""

    cpu: float
    wall: float


Measure: TypeAlias = Callable[[], Cost]
Samples: TypeAlias = dict[str, list[Cost]]


class Stopwatch:
    """CPU of this process and wall-clock time since it was made."""

    def __init__(self) -> None:
        gc.collect()  # or one contender pays for what another one left behind
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def cost(self, units: int) -> Cost:
        """The share of one of `units`."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return Cost(cpu / units, wall / units)


def in_turn(contenders: Mapping[str, Measure], rounds: int) -> Samples:
    """Measure everyone `rounds` times. Who begins moves on, so that nobody always runs after the same neighbour."""
    samples: Samples = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(contenders[name]())
    return samples


def ratios(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios, round by round."""
    by_round = [value / base for value, base in zip(values, reference, strict=True)]
    if len(by_round) == 1:
        return by_round[0], by_round[0], by_round[0]
    low, middle, high = statistics.quantiles(by_round, n=4, method="inclusive")
    return low, middle, high


def print_costs(title: str, samples: Samples, reference: str, *, unit: str, scale: float = 1e6) -> None:
    """Medians, and the ratios of CPU to that of `reference`."""
    base = [cost.cpu for cost in samples[reference]]
    rows = []
    for name, costs in samples.items():
        cpu, wall = (statistics.median(column) for column in zip(*costs, strict=True))
        low, middle, high = ratios([cost.cpu for cost in costs], base)
        rows.append((name, f"{cpu * scale:.2f}", f"{wall * scale:.2f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}"))
    print_table(title, ("", f"cpu {unit}", f"wall {unit}", "x reference (cpu)", "quartiles"), rows)


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table that is also Markdown."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    print(f"\n{title}\n")
    for line in lines:
        first, *others = (cell.ljust if not at else cell.rjust for at, cell in enumerate(line))
        cells = [first(widths[0]), *(other(width) for other, width in zip(others, widths[1:], strict=True))]
        print(f"| {' | '.join(cells)} |", flush=True)


def on_loop(runner: asyncio.Runner, measure: Callable[[], Awaitable[Cost]]) -> Measure:
    """An async measurement as a plain one, on the loop of `runner`."""

    async def measured() -> Cost:
        return await measure()

    return lambda: runner.run(measured())


def new_runner(uvloop: bool) -> asyncio.Runner:
    """A runner with a loop of the chosen kind."""
    if not uvloop:
        return asyncio.Runner()
    from uvloop import new_event_loop

    return asyncio.Runner(loop_factory=new_event_loop)


def make_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    return parser
