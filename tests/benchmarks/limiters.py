"""Our limit against the rules of others, in the same simulation: the same gate, the same services, another rule.

    python tests/benchmarks/limiters.py                      all scenarios, five seeds, two processes
    python tests/benchmarks/limiters.py --quick              one seed, without the long ones
    python tests/benchmarks/limiters.py --only s04 --only s05 --seeds 3 --rule Vegas
    python tests/benchmarks/limiters.py --only s04 --alone

The rules are those of `rivals.py`, the scenarios those of tests/scenarios for which the best fixed limit is known. Each
stretch of time of each scenario is a row. What is compared, medians over the seeds:

throughput   in per cent of the best fixed limit's
p99          of the round-trip times, divided by the best fixed limit's
90 %         seconds from the beginning, or the change, to half a second with 90 % of that throughput
refused      429s, in per cent of the attempts

**What is the gate's and not the rule's.** After refusals without a hint our gate finds a rate by trial. At a hard cap
that saves a rule that takes refusals for quick answers: its limit runs away, and the rate does its work. `--alone`
switches that off, for ours too, and shows the rules themselves.

**Who is the best in a row.** For throughput, who has most of it among those of whose attempts no more than 2 % were
refused: that is what the best fixed limit is held to as well, and beyond a hard cap more is to be had by being refused
more often. For p99, who has the lowest among those that also have 90 % of the best fixed limit's throughput: who leaves
a service idle does not wait there. Where nobody qualifies, nobody is the best.

**How good a row is.** The worst of three shares: throughput, the best p99 divided by this one, and what was not refused
beyond 2 %. A rule is as good as its worst row.
"""

import argparse
import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeAlias
from unittest import mock

from rivals import RIVALS
from rounds import print_table

from penstock.gate.adaptive import Adaptive
from penstock.gate.limiter import LimitRule
from penstock.gate.rate import Meter
from penstock.testing.scenario import METRICS, MOST_REFUSED, Expectation, Scenario, load_scenario, run_scenario

SCENARIOS = Path(__file__).parents[1] / "scenarios"
PROCESSES = 2
OURS = "penstock"
RULES: Mapping[str, LimitRule] = {OURS: Adaptive(), **RIVALS}
WORKS = 0.9
"""Share of the best fixed limit's throughput from which on a p99 is worth comparing."""
BEHIND = 0.03
"""Share of throughput that we may be behind the best."""
SLOWER = 1.10
"""By what our p99 may exceed the best."""


class Row(NamedTuple):
    """A stretch of time of a scenario."""

    scenario: str
    window: str

    def __str__(self) -> str:
        return f"{self.scenario}, {self.window}"


class Numbers(NamedTuple):
    """What a rule did there."""

    throughput: float
    p99: float
    reached: float
    refused: float

    @property
    def allowed(self) -> bool:
        """Whether its throughput was not bought with refusals."""
        return self.refused <= MOST_REFUSED

    @property
    def works(self) -> bool:
        """Whether its p99 is that of a limit that does its work."""
        return self.allowed and self.throughput >= WORKS

    @property
    def quality(self) -> float:
        """The worst of throughput, waiting and refusals, as a share."""
        return min(self.throughput, 1 / self.p99, 1 - max(0.0, self.refused - MOST_REFUSED))


Table: TypeAlias = dict[Row, dict[str, Numbers]]
"""By row, then by rule."""


# --- runs ---


def load_all() -> list[Scenario]:
    """The scenarios for which the best fixed limit is known."""
    best = json.loads((SCENARIOS / "best_static.json").read_text(encoding="utf-8"))
    return [load_scenario(SCENARIOS / f"{name}.toml", best[name]) for name in sorted(best)]


def run(scenario: Scenario, rule: str, seed: int) -> dict[str, Numbers]:
    """What came of a run, by window. Crosses into another process, as its arguments do."""
    result = run_scenario(scenario, limit=RULES[rule], seed=seed)

    def found(expectation: Expectation) -> float:
        value = METRICS[expectation.metric](result, expectation)
        return math.inf if math.isnan(value) else value  # nothing came back at all

    return {
        window: Numbers(
            found(anything("throughput_share", window)),
            found(anything("p99_ratio", window)),
            found(how_reached(scenario, window)),
            found(anything("refused_share", window)),
        )
        for window in scenario.best
    }


def anything(metric: str, window: str, since: float = 0.0) -> Expectation:
    """A metric without a range."""
    return Expectation(metric, window, -math.inf, math.inf, since)


def how_reached(scenario: Scenario, window: str) -> Expectation:
    """From when on the 90 % are timed: as the scenario says, or from the last change, or the last load's beginning."""
    for expectation in scenario.expectations:
        if expectation.window == window and expectation.metric.startswith("reached_after"):
            return expectation
    begins = [0.0, *(change.at for change in scenario.changes), *(load.start for load in scenario.loads)]
    return anything("reached_after", window, max(at for at in begins if at <= scenario.windows[window].start))


def run_by_name(task: tuple[str, str, int], alone: bool) -> dict[str, Numbers]:
    """One run, in a process of its own. `alone`: without the rate that the gate finds by trial."""
    name, rule, seed = task
    scenario = next(scenario for scenario in load_all() if scenario.name == name)
    if not alone:
        return run(scenario, rule, seed)
    with mock.patch.object(Meter, "throttled", autospec=True, return_value=None):
        return run(scenario, rule, seed)


def run_all(scenarios: Sequence[Scenario], rules: Sequence[str], seeds: int, *, alone: bool) -> Table:
    """All runs; the medians over the seeds."""
    # The long ones first: at the end no process waits for the other one's last.
    ordered = sorted(scenarios, key=lambda scenario: -scenario.duration * scenario.clients)
    tasks = [(scenario.name, rule, seed) for scenario in ordered for rule in rules for seed in range(1, seeds + 1)]
    with ProcessPoolExecutor(
        PROCESSES, mp_context=get_context("spawn"), initializer=logging.disable, initargs=(logging.CRITICAL,)
    ) as pool:
        found = dict(zip(tasks, pool.map(partial(run_by_name, alone=alone), tasks), strict=True))
    return {
        Row(scenario.name, window): {
            rule: medians([found[scenario.name, rule, seed][window] for seed in range(1, seeds + 1)]) for rule in rules
        }
        for scenario in scenarios
        for window in scenario.best
    }


def medians(by_seed: Sequence[Numbers]) -> Numbers:
    """Each number's median, which for an even number of seeds is one of them: "never" has no half."""
    return Numbers(*(statistics.median_low(column) for column in zip(*by_seed, strict=True)))


# --- verdict ---


def best_of(
    numbers: Mapping[str, Numbers], qualifies: Callable[[Numbers], bool], key: Callable[[Numbers], float]
) -> str | None:
    """Who has the highest `key` of those that qualify."""
    candidates = [rule for rule, found in numbers.items() if qualifies(found)]
    return max(candidates, key=lambda rule: key(numbers[rule]), default=None)


def most_throughput(numbers: Mapping[str, Numbers]) -> str | None:
    """Who is the best in a row for throughput."""
    return best_of(numbers, lambda found: found.allowed, lambda found: found.throughput)


def least_waiting(numbers: Mapping[str, Numbers]) -> str | None:
    """Who is the best in a row for p99."""
    return best_of(numbers, lambda found: found.works, lambda found: -found.p99)


def worst_row(table: Table, rule: str, key: Callable[[Numbers], float]) -> Row:
    """Where `key` is lowest."""
    return min(table, key=lambda row: key(table[row][rule]))


def behind(table: Table) -> list[str]:
    """In which rows we are too far behind the best, and whom."""
    found = []
    for row, numbers in table.items():
        ours = numbers[OURS]
        best = most_throughput(numbers)
        if best is not None and numbers[best].throughput - ours.throughput > BEHIND:
            points = 100 * (numbers[best].throughput - ours.throughput)
            found.append(f"{row}: {points:.1f} points of throughput behind {best}")
        if not ours.allowed:
            found.append(f"{row}: {100 * ours.refused:.1f} % refused")
        best = least_waiting(numbers)
        if best is not None and ours.p99 > SLOWER * numbers[best].p99:
            found.append(f"{row}: p99 is {ours.p99 / numbers[best].p99:.2f} x that of {best}")
    return found


# --- tables ---


def print_rows(table: Table, rules: Sequence[str]) -> None:
    """All numbers."""
    head = ("throughput % / p99 x / 90 % after s / refused %", *rules)
    print_table("By scenario", head, [(str(row), *(cell(table[row][rule]) for rule in rules)) for row in table])


def cell(found: Numbers) -> str:
    """Four numbers."""
    reached = "never" if found.reached == math.inf else f"{found.reached:.2g}"
    return f"{100 * found.throughput:.1f} / {found.p99:.2f} / {reached} / {100 * found.refused:.1f}"


def print_worst(table: Table, rules: Sequence[str]) -> None:
    """Each rule's worst rows."""

    def worst(rule: str, key: Callable[[Numbers], float], shown: Callable[[Numbers], str]) -> str:
        row = worst_row(table, rule, key)
        return f"{shown(table[row][rule])} ({row})"

    lines = [
        (
            rule,
            worst(rule, lambda found: found.quality, lambda found: f"{100 * found.quality:.0f} %"),
            worst(rule, lambda found: found.throughput, lambda found: f"{100 * found.throughput:.1f} %"),
            worst(rule, lambda found: -found.p99, lambda found: f"{found.p99:.2f}"),
            worst(rule, lambda found: -found.refused, lambda found: f"{100 * found.refused:.1f} %"),
        )
        for rule in rules
    ]
    print_table("Each rule's worst row", ("", "by all three", "throughput", "p99 x", "refused"), lines)


def print_verdict(table: Table, rules: Sequence[str]) -> None:
    """What was to be shown, and whether it was."""

    def worst(rule: str, key: Callable[[Numbers], float]) -> float:
        return key(table[worst_row(table, rule, key)][rule])

    def leads(key: Callable[[Numbers], float]) -> str:
        return "yes" if all(worst(OURS, key) >= worst(rule, key) for rule in rules) else "NO"

    print(f"\nThe best worst row of all, by all three: {leads(lambda found: found.quality)}")
    print(f"The best worst row of all, by throughput alone: {leads(lambda found: found.throughput)}")
    missed = behind(table)
    bar = f"{100 * BEHIND:.0f} points of throughput, or {100 * (SLOWER - 1):.0f} % of p99"
    print(f"In no row more than {bar}, behind the best: {'NO' if missed else 'yes'}")
    for line in missed:
        print(f"  {line}")


def make_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--only", action="append", default=[], help="scenarios whose names begin so; may be repeated")
    parser.add_argument(
        "--rule", action="append", default=[], choices=list(RIVALS), help="rivals; may be repeated; default: all"
    )
    parser.add_argument("--alone", action="store_true", help="without the rate that the gate finds after refusals")
    parser.add_argument("--quick", action="store_true", help="one seed, and none of the scenarios that take long")
    return parser


def main() -> None:
    flags = make_flags().parse_args()
    seeds = 1 if flags.quick else flags.seeds
    rules = [OURS, *(flags.rule or RIVALS)]
    scenarios = [
        scenario
        for scenario in load_all()
        if scenario.name.startswith(tuple(flags.only or [""])) and not (flags.quick and scenario.long)
    ]
    if not scenarios:
        raise SystemExit("No such scenario with a known best fixed limit. `renew.py --sweep` finds those.")
    table = run_all(scenarios, rules, seeds, alone=flags.alone)
    print_rows(table, rules)
    print_worst(table, rules)
    print_verdict(table, rules)


if __name__ == "__main__":
    main()
