"""`penstock.run`, and an executor, in the cells of a notebook whose kernel is a real one.

Its cells run on the kernel's main thread, below which the kernel's loop waits. Each step of `penstock.run` in a cell is
seen in test_run_everywhere.py.
"""

import ast
from typing import TYPE_CHECKING

import pytest

from service import EmbeddedService, ServiceConfig

if TYPE_CHECKING:
    from tests.notebook.conftest import Kernel

FIRST = "interrupted by Ctrl-C: finishing what is in flight within 25 s"
SECOND = "interrupted by Ctrl-C: cancelling what is in flight"


def test_a_run_works_and_tells_its_progress_in_the_cell(kernel: "Kernel") -> None:
    """Async jobs and plain ones. What jobs print appears below the cell."""
    cell = kernel.run("""
async def job(number):
    await asyncio.sleep(0)
    print("job", number)
report = penstock.run(job, range(3), limit=1, progress=True)
report.verify()
report.done
""")
    assert (cell.error, cell.value) == (None, "3")
    assert cell.streams["stdout"] == "job 0\njob 1\njob 2\n"
    assert cell.streams["stderr"].startswith("3 of 3 jobs, 0 failed, ")
    cell = kernel.run("penstock.run(lambda number: print('plain', number), range(2), threads=1, limit=1).done")
    assert (cell.error, cell.value, cell.out) == (None, "2", "plain 0\nplain 1\n")


def test_without_a_word_no_progress_is_told(kernel: "Kernel") -> None:
    """As where standard error is a file."""
    assert kernel.run("penstock.run(str, range(3)).done").out == ""


def test_a_run_over_a_real_service_works_in_a_cell(kernel: "Kernel") -> None:
    """With round trips, calls in threads and a computation."""
    with EmbeddedService(ServiceConfig(latency=0.001, errors=0.1, seed=3)) as service:
        value = kernel.value(f"""
@penstock.job
async def scoring():
    async with penstock.HttpClient({service.url!r}, retry=penstock.Retry(attempts=20, wait=0)) as api:
        async def score(number):
            found = await api.get_json("/api1", params={{"id": number}})
            text = await penstock.to_thread(str, found)
            return await penstock.compute(text.upper)
        yield score
report = penstock.run(scoring, range(50), limit=8)
report.verify()
(report.done, report.attempts > 50)
""")
    assert ast.literal_eval(value) == (50, True)


def test_a_run_on_uvloop_works_in_a_cell(kernel: "Kernel") -> None:
    pytest.importorskip("uvloop")
    value = kernel.value("""
import uvloop
async def job(_number):
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
penstock.run(job, range(3), loop_factory=uvloop.new_event_loop).done
""")
    assert value == "3"


def test_an_error_comes_back_with_its_traceback(kernel: "Kernel") -> None:
    """Down to the line of the cell that raised it. The next cell works."""
    cell = kernel.run("""
def numbers():
    yield 1
    raise OSError("the file is gone")
penstock.run(str, numbers())
""")
    assert cell.error == "OSError: the file is gone"
    assert "numbers" in cell.traceback
    assert kernel.value("penstock.run(str, range(3)).done") == "3"


def test_an_interrupt_drains(kernel: "Kernel") -> None:
    """What is in flight is finished; the report is the cell's."""
    cell = kernel.run(
        """
async def job(number):
    if number == 0:
        print("started", flush=True)
    await asyncio.sleep(0.001)
report = penstock.run(job, itertools.count(), limit=4)
report.verify()
(report.stopped, report.left, report.failed, report.done == report.read)
""",
        interrupt_at=("started",),
    )
    assert cell.value == "('interrupted', 0, 0, True)", cell
    assert (cell.out.count(FIRST), cell.out.count(SECOND)) == (1, 0)


@pytest.mark.parametrize("awaits", ["", "await asyncio.sleep(0)"], ids=["plain", "awaits"])
def test_a_second_interrupt_cancels(kernel: "Kernel", awaits: str) -> None:
    """Also in a cell that awaits something itself, where the kernel has a handler of its own. The next cell works."""
    cell = kernel.run(
        f"""
{awaits}
async def job(number):
    if number == 0:
        print("started", flush=True)
    await asyncio.sleep(3600)
report = penstock.run(job, itertools.count(), limit=4)
report.verify()
(report.stopped, report.read, report.left, report.done)
""",
        interrupt_at=("started", FIRST),
    )
    assert cell.value == "('interrupted', 4, 4, 0)", cell
    assert (cell.out.count(FIRST), cell.out.count(SECOND)) == (1, 1)
    assert kernel.value("penstock.run(str, range(3)).done") == "3"


def test_a_third_interrupt_ends_the_cell(kernel: "Kernel") -> None:
    """When the run has ended, which has closed its resources. The next cell works."""
    cell = kernel.run(
        """
async def job(number):
    print("started", flush=True)
    try:
        await asyncio.sleep(3600)
    finally:
        print("slow to clean up", flush=True)
        await asyncio.sleep(3600)
@penstock.job
async def slow():
    try:
        yield job
    finally:
        print("closed")
penstock.run(slow, [1])
""",
        interrupt_at=("started", FIRST, "slow to clean up"),
    )
    assert cell.error == "KeyboardInterrupt: ", cell
    assert cell.out.endswith("closed\n")
    assert kernel.value("[thread.name for thread in threading.enumerate() if 'penstock-run' in thread.name]") == "[]"
    assert kernel.value("penstock.run(str, range(3)).done") == "3"


def test_an_executor_works_in_a_cell_that_awaits_it(kernel: "Kernel") -> None:
    """On the kernel's own loop."""
    value = kernel.value("""
async def job(number):
    return threading.current_thread() is threading.main_thread()
async with Executor() as executor:
    report = await executor.run(job, range(3))
    outcome = await executor.submit(job, 1)
(report.done, outcome)
""")
    assert value == "(3, True)"


def test_an_interrupt_cancels_a_cell_that_awaits_an_executor(kernel: "Kernel") -> None:
    """The kernel's handler does that."""
    cell = kernel.run(
        """
async def job(number):
    try:
        if number == 0:
            print("started", flush=True)
        await asyncio.sleep(3600)
    finally:
        print("cancelled", number)
async with Executor(limit=2) as executor:
    await executor.run(job, itertools.count())
""",
        interrupt_at=("started",),
    )
    assert cell.error == "CancelledError: ", cell
    assert cell.streams["stdout"] == "started\ncancelled 0\ncancelled 1\n"


def test_a_run_in_a_job_of_a_cell_is_refused(kernel: "Kernel") -> None:
    """It would block the loop of the job, and says what to write."""
    cell = kernel.run("""
async def nested(number):
    penstock.run(str, [number])
async with Executor() as executor:
    await executor.submit(nested, 1)
""")
    assert cell.error is not None
    assert cell.error.startswith("UsageError: penstock.run() was called under a running event loop")
    assert "await executor.run(job, items)" in cell.error
