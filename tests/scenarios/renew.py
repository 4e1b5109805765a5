"""Runs all scenarios and writes down what came of them: docs/simulation.md and a picture for each.

    python tests/scenarios/renew.py                    all scenarios, five seeds, two processes (half an hour)
    python tests/scenarios/renew.py --only s05 --only s06
    python tests/scenarios/renew.py --sweep            find the best fixed limits, and keep them (half an hour)
    python tests/scenarios/renew.py --show             print the table, write nothing

The best fixed limits are kept in best_static.json, since they change only with a scenario and not with the gate; what
was found in results.json, so that the page can be written when only some scenarios have been run again.
The same code gives the same bytes, so that a change of behaviour shows as a change of these files.
"""

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from penstock.testing.scenario import TICK, Finding, Result, Scenario, best_static, check, load_scenario, run_scenario

HERE = Path(__file__).parent
BEST = HERE / "best_static.json"
RESULTS = HERE / "results.json"
DOCS = HERE.parent.parent / "docs"
PAGE = DOCS / "simulation.md"
PICTURES = DOCS / "simulation"
SEEDS = (1, 2, 3, 4, 5)
PROCESSES = 2

T = TypeVar("T")
Found: TypeAlias = dict[str, dict[str, list[float]]]
"""What was found: by scenario and expectation, a number for each seed."""

HEAD = """\
# Simulation

What the gate does by default, with no number set, in closed loop: the real gate and the real executor in virtual time
against a [simulated service](../src/penstock/testing/simulated_service.py). Each scenario is a file in
[tests/scenarios](../tests/scenarios), with the service, what happens to it, what is asked of it, and what is expected.
The best fixed limit is what somebody would have set who knew everything, found by trying: the lowest whose throughput
is within 1 % of the highest.

This page and its pictures are written by `python tests/scenarios/renew.py`. Bit-identical for each seed; the numbers
are medians over {seeds} seeds, with the lowest and the highest behind them.

* `throughput_share`, `p99_ratio`, `mean_ratio`: throughput and round-trip times, each divided by those of the best
  fixed limit in the same stretch of time
* `reached_after`: seconds until there was half a second with 90 % of the throughput of the best fixed limit;
  `first_answer_after`: seconds until there was an answer at all
* `refused_share`: answers with a 429, of all attempts; `quota_share`: throughput, of what the quota allows
* `amplification`: attempts by first attempts, in the worst minute; `jain`: fairness among clients, 1 is equal shares
* `limit_drift`: how far the mean limit of all the time is from that of the first sixth; `limit_variation`: its standard
  deviation by its mean

In the pictures: the limit (dark), what is in flight (light) and the best fixed limits (dashed) above; below, the mean
round-trip time of each stretch and its 99th percentile in milliseconds, both of seed 1.
"""


class Outcome(NamedTuple):
    """What one run gave, as it crosses from process to process."""

    values: list[float]
    picture: str | None


def load_all() -> list[Scenario]:
    """All scenarios, with what is known of the best fixed limits, in the order of their names."""
    best = kept(BEST)
    return [load_scenario(path, best.get(path.stem)) for path in sorted(HERE.glob("*.toml"))]


def kept(path: Path) -> dict[str, Any]:
    """What earlier runs have found."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: found[name] for name in found if (HERE / f"{name}.toml").exists()}


def keep(path: Path, found: dict[str, Any]) -> None:
    """Write it down, in an order that does not depend on the runs."""
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def run(name: str, seed: int) -> Outcome:
    """One run of one scenario, in a process of its own."""
    scenario = next(scenario for scenario in load_all() if scenario.name == name)
    result = run_scenario(scenario, seed=seed)
    return Outcome(
        [finding.value for finding in check(result)],
        picture(result) if seed == SEEDS[0] else None,
    )


def sweep(name: str) -> dict[str, Any]:
    """The best fixed limits of one scenario, in a process of its own."""
    scenario = next(scenario for scenario in load_all() if scenario.name == name)
    return {window: best._asdict() for window, best in best_static(scenario, seeds=SEEDS).items()}


# --- page ---


def page(found: Found) -> str:
    """The whole page, of all scenarios of which something is known."""
    scenarios = [scenario for scenario in load_all() if scenario.name in found]
    lines = [
        HEAD.format(seeds=len(SEEDS)),
        "| scenario | expected | median | lowest to highest | met |",
        "|---|---|---|---|---|",
    ]
    for scenario in scenarios:
        lines += rows(scenario, found[scenario.name])
    for scenario in scenarios:
        lines += [
            "",
            f"## {scenario.title}",
            "",
            f"![{scenario.title}](simulation/{scenario.name}.svg)",
            "",
            *folded(scenario.about),
        ]
        lines += ["", f"[{scenario.name}.toml](../tests/scenarios/{scenario.name}.toml){best_of(scenario)}"]
    return "\n".join(lines) + "\n"


def rows(scenario: Scenario, found: dict[str, list[float]]) -> list[str]:
    """The lines of the table for one scenario."""
    lines = []
    for index, expectation in enumerate(scenario.expectations):
        values = found[str(expectation)]
        middle = Finding(expectation, statistics.median_low(values))
        name = f"[{scenario.title}](#{anchor(scenario.title)})" if index == 0 else ""
        lines.append(
            f"| {name} | {expectation} | {number(middle.value)} "
            f"| {number(min(values))} to {number(max(values))} | {'yes' if middle.met else '**no**'} |"
        )
    return lines


def best_of(scenario: Scenario) -> str:
    """What the best fixed limits are."""
    return "".join(
        f"; best fixed limit in {name}: {best.limit}, {best.throughput:.0f}/s, 99 % within {best.p99 * 1000:.0f} ms"
        for name, best in scenario.best.items()
    )


def anchor(title: str) -> str:
    """What a heading is called in a link, on GitHub."""
    return "".join(sign for sign in title.lower().replace(" ", "-") if sign.isalnum() or sign in "-_")


def number(value: float) -> str:
    """Three digits that count."""
    return "never" if value == math.inf else f"{value:.3g}" if abs(value) < 1_000 else f"{value:.0f}"


def folded(text: str, width: int = 120) -> Iterable[str]:
    """Lines of words."""
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".lstrip()
    yield line


# --- picture ---

POINTS = 150
"""At most, along the time: an SVG of some kB."""
WIDTH, HEIGHT, LEFT, TOP, GAP = 600, 110, 44, 18, 26


def picture(result: Result) -> str:
    """Limit, in flight and latency over time, as an SVG that is the same for the same run."""
    scenario = result.scenario
    limits, in_flight = result.series("limit"), result.series("in_flight")
    each = math.ceil(len(limits) / POINTS)
    latencies = [result.latencies(at * TICK, (at + each) * TICK) for at in range(0, len(limits), each)]
    highest = max([*limits, *(best.limit * scenario.clients for best in scenario.best.values())])
    slowest = max((values[-1] for values in latencies if values), default=1.0)
    above = Panel(TOP, highest * 1.05, scenario.duration)
    below = Panel(TOP + HEIGHT + GAP, slowest * 1000 * 1.05, scenario.duration)
    means = [math.fsum(values) / len(values) * 1000 if values else None for values in latencies]
    p99 = [values[math.ceil(0.99 * len(values)) - 1] * 1000 if values else None for values in latencies]
    dashes = [
        f'<path d="{above.line([best.limit * scenario.clients] * 2, window.stop - window.start, window.start)}" '
        f'stroke="#c40" stroke-dasharray="5 3"/>'
        for window, best in ((scenario.windows[name], best) for name, best in scenario.best.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {TOP + 2 * HEIGHT + GAP + 24}" '
            f'font-family="sans-serif" font-size="10" fill="none">',
            '<rect width="100%" height="100%" fill="#fff"/>',
            *above.frame("limit, in flight"),
            *below.frame("round trip, ms"),
            f'<path d="{above.line(thinned(in_flight, each), each * TICK)}" stroke="#8bd"/>',
            f'<path d="{above.line(thinned(limits, each), each * TICK)}" stroke="#036"/>',
            *dashes,
            f'<path d="{below.line(p99, each * TICK)}" stroke="#bbb"/>',
            f'<path d="{below.line(means, each * TICK)}" stroke="#060"/>',
            *below.times(),
            "</svg>",
            "",
        ]
    )


def thinned(values: Sequence[int], each: int) -> list[float]:
    """The mean of so many at a time."""
    return [statistics.fmean(values[at : at + each]) for at in range(0, len(values), each)]


class Panel(NamedTuple):
    """One of the two diagrams."""

    top: int
    highest: float
    duration: float

    def line(self, values: Sequence[float | None], step: float, start: float = 0.0) -> str:
        """The path of a line with a point each `step` seconds; interrupted where there is no value."""
        parts = []
        pen = "M"
        for index, value in enumerate(values):
            if value is None:
                pen = "M"
                continue
            x = LEFT + min(1.0, (start + index * step) / self.duration) * WIDTH
            y = self.top + HEIGHT * (1 - value / self.highest)
            parts.append(f"{pen}{x:.0f} {y:.1f}")
            pen = "L"
        return "".join(parts)

    def frame(self, title: str) -> list[str]:
        """Axes, and what is shown."""
        step = nice(self.highest / 3)
        lines = [f'<text x="{LEFT}" y="{self.top - 5}" fill="#333">{title}</text>']
        for mark in range(int(self.highest / step) + 1):
            y = self.top + HEIGHT * (1 - mark * step / self.highest)
            lines.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#eee"/>')
            lines.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" fill="#333" text-anchor="end">{mark * step:g}</text>')
        return lines

    def times(self) -> list[str]:
        """The seconds along the bottom."""
        step = nice(self.duration / 6)
        return [
            f'<text x="{LEFT + mark * step / self.duration * WIDTH:.0f}" y="{self.top + HEIGHT + 14}" fill="#333" '
            f'text-anchor="middle">{mark * step:g} s</text>'
            for mark in range(int(self.duration / step) + 1)
        ]


def nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


# --- command ---


def in_processes(fn: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
    """`fn` of each, in processes that are started afresh."""
    with ProcessPoolExecutor(
        PROCESSES, mp_context=get_context("spawn"), initializer=logging.disable, initargs=(logging.CRITICAL,)
    ) as pool:
        return list(pool.map(fn, *arguments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="scenarios whose names begin so; may be repeated")
    parser.add_argument("--sweep", action="store_true", help="find the best fixed limits, and no more")
    parser.add_argument("--show", action="store_true", help="print the table, and write nothing")
    chosen = parser.parse_args()
    scenarios = [s for s in load_all() if not chosen.only or s.name.startswith(tuple(chosen.only))]
    if chosen.sweep:
        names = [scenario.name for scenario in scenarios if scenario.sweep]
        keep(BEST, kept(BEST) | dict(zip(names, in_processes(sweep, names), strict=True)))
        return 0
    runs = [(scenario.name, seed) for scenario in scenarios for seed in SEEDS]
    outcomes = dict(zip(runs, in_processes(run, *zip(*runs, strict=True)), strict=True))
    new = {
        scenario.name: {
            str(expectation): [outcomes[scenario.name, seed].values[index] for seed in SEEDS]
            for index, expectation in enumerate(scenario.expectations)
        }
        for scenario in scenarios
    }
    lines = [line for scenario in scenarios for line in rows(scenario, new[scenario.name])]
    sys.stdout.write("\n".join(lines) + "\n")
    if not chosen.show:
        PICTURES.mkdir(exist_ok=True)
        for scenario in scenarios:
            drawn = outcomes[scenario.name, SEEDS[0]].picture
            assert drawn is not None, "the first seed is drawn"
            (PICTURES / f"{scenario.name}.svg").write_text(drawn, encoding="utf-8")
        found = kept(RESULTS) | new
        keep(RESULTS, found)
        PAGE.write_text(page(found), encoding="utf-8")
    return 1 if any("**no**" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
