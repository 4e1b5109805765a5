"""`BridgeExecutor` in the cells of a notebook, where it may stay open from one cell to the next."""

import ast
from typing import TYPE_CHECKING

import pytest

from service import EmbeddedService, ServiceConfig

if TYPE_CHECKING:
    from tests.notebook.conftest import Kernel

JOBS = """
async def double(number):
    await asyncio.sleep(0)
    return 2 * number
"""


@pytest.fixture(scope="module", autouse=True)
def _imported(kernel: "Kernel") -> None:
    assert (
        kernel.run(f"import concurrent.futures\nfrom penstock import BridgeExecutor, HttpClient\n{JOBS}").error is None
    )


def test_it_works_in_a_cell_beside_the_kernel_s_loop(kernel: "Kernel") -> None:
    """Coroutine functions and plain ones, waited for as in any program."""
    value = kernel.value("""
with BridgeExecutor() as bridge:
    numbers = list(bridge.map(double, range(3)))
    texts = list(bridge.map(str, range(3)))
    futures = [bridge.submit(double, number) for number in range(3)]
    done = sorted(future.result() for future in concurrent.futures.as_completed(futures))
(numbers, texts, done)
""")
    assert ast.literal_eval(value) == ([0, 2, 4], ["0", "1", "2"], [0, 2, 4])


def test_it_stays_open_from_one_cell_to_the_next(kernel: "Kernel") -> None:
    """Also for a cell that awaits, on whose loop its futures are awaited."""
    assert kernel.value("bridge = BridgeExecutor()\nbridge.submit(double, 1).result()") == "2"
    assert kernel.value("await asyncio.wrap_future(bridge.submit(double, 2))") == "4"
    assert kernel.value("await asyncio.get_running_loop().run_in_executor(bridge, str, 3)") == "'3'"
    cell = kernel.run("bridge.shutdown()\nbridge.submit(double, 4)")
    assert cell.error is not None
    assert cell.error.startswith("ClosedError: ")


def test_a_client_is_open_in_the_cells_that_use_it(kernel: "Kernel") -> None:
    with EmbeddedService(ServiceConfig(latency=0.001)) as service:
        value = kernel.value(f"""
with BridgeExecutor() as bridge, bridge.open(HttpClient({service.url!r})) as api:
    found = api.get_json("/api1", params={{"id": 17}})
str(found["id"])
""")
    assert ast.literal_eval(value) == "17"


def test_an_interrupt_ends_the_wait_and_not_the_bridge(kernel: "Kernel") -> None:
    """The wait for a future is a wait as any other. The block then waits for what it has been given."""
    cell = kernel.run(
        """
bridge = BridgeExecutor()
released = threading.Event()
def wait():
    print("started", flush=True)
    return released.wait(60)
bridge.submit(wait).result()
""",
        interrupt_at=("started",),
    )
    assert cell.error == "KeyboardInterrupt: ", cell
    assert kernel.value("released.set()\nnumber = bridge.submit(double, 5).result()\nbridge.shutdown()\nnumber") == "10"
