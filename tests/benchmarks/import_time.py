"""What `import penstock` takes in a fresh interpreter, against `import aiohttp`, which it cannot do without.

    python tests/benchmarks/import_time.py

The interpreter's own start is not counted. Compiled modules are kept in a folder of this run and are made before the
first round, so that neither side compiles and nothing is written beside the sources.
"""

import os
import subprocess
import sys
import tempfile
from functools import partial

from rounds import Cost, in_turn, make_parser, print_costs

REFERENCE = "import aiohttp"
IMPORTS = (REFERENCE, "import penstock", "import tenacity", "import aiohttp, tenacity")

TIMED = """
import time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print(time.process_time() - cpu, time.perf_counter() - wall)
"""


def measured(statement: str, environment: dict[str, str]) -> Cost:
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    cpu, wall = map(float, ended.stdout.split())
    return Cost(cpu, wall)


def main() -> None:
    flags = make_parser(__doc__, rounds=15).parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        contenders = {statement: partial(measured, statement, environment) for statement in IMPORTS}
        for measure in contenders.values():
            measure()  # compiles
        samples = in_turn(contenders, flags.rounds)
    print_costs(f"A fresh interpreter each time, {flags.rounds} rounds", samples, REFERENCE, unit="ms", scale=1e3)


if __name__ == "__main__":
    main()
