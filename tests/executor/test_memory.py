"""Memory depends on what is in flight, not on how many items there are."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, sys
from pathlib import Path
from penstock import Executor

async def job(item):
    await asyncio.sleep(0)
    return item

async def main(items):
    async with Executor(limit=200) as executor:
        async with executor.{call}(job, (number for number in range(items))) as stream:
            async for _ in stream:
                pass

asyncio.run(main(int(sys.argv[1])))
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""

FEW = 10_000
GROWTH_KIB = 4 * 1024
"""What a run may grow by, however long it is: free lists and the like, no item."""


def peak_kib(call: str, items: int) -> int:
    program = PROGRAM.format(call=call)
    ran = subprocess.run([sys.executable, "-c", program, str(items)], check=True, capture_output=True, text=True)
    return int(ran.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("call", ["as_completed", "map"])
@pytest.mark.parametrize("items", [100_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_a_run_over_many_items_takes_no_more_memory_than_one_over_few(call: str, items: int) -> None:
    """Generator in, results dropped: the peak does not grow with the number of items."""
    assert peak_kib(call, items) - peak_kib(call, FEW) < GROWTH_KIB
