"""The main job: two round trips for each record, penstock with default settings against the usual program.

    python tests/benchmarks/main_job.py
    python tests/benchmarks/main_job.py --rounds 3 --items 2000 --threads-items 160

`examples/two_step.py` and `examples/threads_baseline.py` with 8 threads do the same job, each against a service of its
own that takes 50 ms and fails now and then. The thread program gets fewer records, or it would take minutes: jobs per
second do not depend on how many there are.
"""

import argparse
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from rounds import Cost, in_turn, make_parser, print_table, ratios

EXAMPLES = Path(__file__).parents[2] / "examples"
SOME_FAILED = 5
"""Exit status of `two_step.py` when records have failed for good: with seeded faults, some may."""

THREADS, PENSTOCK = "8 threads, requests", "penstock"


def measured(program: str, *options: str) -> Cost:
    """Seconds for one job; the CPU of the program with its service is in there, too."""
    command = [sys.executable, str(EXAMPLES / program), *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    rate = re.search(r"([\d.]+) jobs/s", ended.stdout)
    if rate is None or ended.returncode not in (0, SOME_FAILED):
        raise SystemExit(f"{program} ended with status {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    seconds = 1 / float(rate.group(1))
    return Cost(seconds, seconds)


def make_flags() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--items", type=int, default=10_000, help="records for penstock; default: 10000")
    parser.add_argument("--threads-items", type=int, default=640, help="records for the threads; default: 640")
    return parser


def main() -> None:
    flags = make_flags().parse_args()
    samples = in_turn(
        {
            THREADS: partial(measured, "threads_baseline.py", "--threads=8", f"--jobs={flags.threads_items}"),
            PENSTOCK: partial(measured, "two_step.py", f"--jobs={flags.items}"),
        },
        flags.rounds,
    )
    rates = {name: [1 / cost.wall for cost in costs] for name, costs in samples.items()}
    rows = []
    for name, by_round in rates.items():
        low, middle, high = ratios(by_round, rates[THREADS])
        rows.append((name, f"{statistics.median(by_round):.1f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}"))
    title = f"{flags.items:,} records for penstock, {flags.threads_items:,} for the threads, {flags.rounds} rounds"
    print_table(title, ("", "jobs/s", "x reference", "quartiles"), rows)


if __name__ == "__main__":
    main()
