"""`penstock.run` wherever it is called: on uvloop, in a cell of IPython, in threads, in servers and in other tests.

A real kernel is in test_notebook.py. Here IPython only looks present, so that each step of its path is seen.
"""

import asyncio
import contextvars
import itertools
import signal
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import FrameType, ModuleType
from typing import Any, TypeVar

import pytest
from aiohttp import ClientSession, web

import penstock
from penstock import Executor, HttpClient, Report, Retry, UsageError
from records import Record, key_of, make_records
from service import EmbeddedService, ServiceConfig

T = TypeVar("T")

BOUND = 20.0
"""Seconds after which what should have happened is not waited for any more."""

DEFAULTS = [signal.default_int_handler, signal.SIG_DFL]

REFUSED = r"under a running event loop, which it would block\. Write .*await executor\.run\(job, items\)`\.$"


async def double(item: int) -> int:
    await asyncio.sleep(0)
    return 2 * item


async def forever(_item: int) -> None:
    await asyncio.sleep(3600)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(autouse=True)
def _signals_are_as_before() -> Iterator[None]:
    assert handlers() == DEFAULTS
    yield
    assert handlers() == DEFAULTS


def press(number: int = signal.SIGINT) -> None:
    """What the terminal or the kernel's manager does: the main thread gets it, whoever sends it."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


class Steps:
    """What the logger of the run has said, to be waited for in a job that presses again."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def told(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == "penstock.run"]

    async def reached(self, step: str) -> None:
        async with asyncio.timeout(BOUND):
            while not any(step in message for message in self.told):
                await asyncio.sleep(0.001)


FIRST = "interrupted by Ctrl-C: finishing what is in flight within 25 s; Ctrl-C again cancels it"
SECOND = "interrupted by Ctrl-C: cancelling what is in flight; Ctrl-C again ends the program"


@pytest.fixture
def steps(caplog: pytest.LogCaptureFixture) -> Steps:
    return Steps(caplog)


def drained(steps: Steps, **options: Any) -> Report:
    """A run that one Ctrl-C drains."""

    async def job(item: int) -> None:
        if item == 10:
            press()
            await steps.reached("finishing")
        await asyncio.sleep(0)

    report = penstock.run(job, itertools.count(), limit=4, **options)
    report.verify()
    assert steps.told == [FIRST]
    return report


def cancelled(steps: Steps, **options: Any) -> Report:
    """A run that two times Ctrl-C cancels, the resources of its job closed."""
    closed = False

    async def job(item: int) -> None:
        if item == 3:
            press()
            await steps.reached("finishing")
            press()
        await asyncio.sleep(3600)

    @penstock.job
    async def definition() -> AsyncGenerator[Any, None]:
        nonlocal closed
        yield job
        closed = True

    report = penstock.run(definition, itertools.count(), limit=4, **options)
    report.verify()
    assert closed
    assert steps.told == [FIRST, SECOND]
    return report


# --- on whose loop ---


@pytest.fixture
def uvloop() -> Any:
    return pytest.importorskip("uvloop")


def round_trips(url: str) -> Any:
    """A job over the service, with a call in a thread and a computation."""

    @penstock.job
    async def score() -> AsyncGenerator[Callable[[Record], Coroutine[Any, Any, str]], None]:
        async with HttpClient(url, retry=Retry(attempts=20, wait=0), limit=8) as api:

            async def job(record: Record) -> str:
                loops.add(type(asyncio.get_running_loop()))
                found = await api.get_json("/api1", params=record)
                name = await penstock.to_thread(str, found["profile"])
                return await penstock.compute(name.upper)

            yield job

    loops: set[type[asyncio.AbstractEventLoop]] = set()
    return score, loops


@pytest.mark.parametrize("way", ["factory", "policy"])
def test_a_run_with_round_trips_and_threads_works_on_uvloop(uvloop: Any, way: str) -> None:
    """Given as a factory, or where its policy is installed. Faults are retried there too."""
    with EmbeddedService(ServiceConfig(latency=0.001, errors=0.1, drops=0.05, seed=3)) as service:
        job, loops = round_trips(service.url)
        if way == "policy":
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        try:
            options = {"loop_factory": uvloop.new_event_loop} if way == "factory" else {}
            report = penstock.run(job, make_records(100), key=key_of, limit=16, **options)
        finally:
            asyncio.set_event_loop_policy(None)
    report.verify()
    assert (report.done, report.stopped) == (100, None)
    assert report.attempts > 100, "some were retried"
    assert loops == {uvloop.Loop}


def test_on_uvloop_one_signal_drains(uvloop: Any, steps: Steps) -> None:
    report = drained(steps, loop_factory=uvloop.new_event_loop)
    assert (report.stopped, report.left, report.failed) == ("interrupted", 0, 0)
    assert report.done >= 11


def test_on_uvloop_a_second_signal_cancels(uvloop: Any, steps: Steps) -> None:
    report = cancelled(steps, loop_factory=uvloop.new_event_loop)
    assert (report.read, report.left, report.done, report.stopped) == (4, 4, 0, "interrupted")


def test_on_uvloop_a_third_one_is_a_keyboard_interrupt_where_a_job_blocks_the_loop(uvloop: Any) -> None:
    reached: list[int] = []

    async def job(item: int) -> None:
        for _ in range(3):
            reached.append(item)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        penstock.run(job, itertools.count(), limit=1, loop_factory=uvloop.new_event_loop)
    assert reached == [0, 0, 0]


def test_a_loop_factory_that_makes_none_is_refused() -> None:
    """Before anything begins, where that can be seen."""
    begun: list[int] = []

    def factory() -> Any:
        return "loop"

    for bad in ("uvloop", 3):
        with pytest.raises(UsageError, match=r"^loop_factory=.*expected a function that makes a new event loop"):
            penstock.run(begun.append, [1], loop_factory=bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"factory returned 'loop': expected a new event loop"):
        penstock.run(begun.append, [1], loop_factory=factory)
    assert not begun


# --- in IPython ---


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that says that a shell is there."""
    module = ModuleType("IPython")
    module.get_ipython = lambda: "the shell"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    return module


in_ipython = pytest.mark.usefixtures("ipython")


def in_a_cell(cell: Callable[[], T]) -> T:
    """Under a running loop whose program has no handlers of its own, as a kernel runs a cell."""

    async def run_cell() -> T:
        return cell()

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(run_cell())
    finally:
        loop.close()


@in_ipython
async def test_in_a_cell_a_run_works_in_a_thread_of_its_own() -> None:
    """On a loop of its own: the cell's waits."""
    seen: set[tuple[str, asyncio.AbstractEventLoop]] = set()

    async def job(_item: int) -> None:
        seen.add((threading.current_thread().name, asyncio.get_running_loop()))

    report = penstock.run(job, range(10))
    report.verify()
    assert report.done == 10
    ((thread, loop),) = seen
    assert thread == "penstock-run"
    assert loop is not asyncio.get_running_loop()
    assert loop.is_closed()


@in_ipython
async def test_in_a_cell_plain_jobs_run_and_context_variables_go_along() -> None:
    variable = contextvars.ContextVar("variable", default="nothing")
    variable.set("the cell's")
    found: list[str] = []
    report = penstock.run(lambda _item: found.append(variable.get()), range(3))
    assert (report.done, found) == (3, ["the cell's"] * 3)


@in_ipython
async def test_in_a_cell_progress_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    penstock.run(double, range(5), progress=True)
    assert capsys.readouterr().err.startswith("5 of 5 jobs, 0 failed, ")


@in_ipython
async def test_in_a_cell_errors_come_back_with_their_traceback() -> None:
    def breaking() -> Iterator[int]:
        yield 1
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone") as raised:
        penstock.run(double, breaking())
    assert "breaking" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    with pytest.raises(UsageError, match="^found 5 as items"):
        penstock.run(double, 5)  # type: ignore[arg-type]


@in_ipython
def test_in_a_cell_one_signal_drains(steps: Steps) -> None:
    report = in_a_cell(lambda: drained(steps))
    assert (report.stopped, report.left, report.failed) == ("interrupted", 0, 0)


@in_ipython
def test_in_a_cell_a_second_signal_cancels(steps: Steps) -> None:
    report = in_a_cell(lambda: cancelled(steps))
    assert (report.left, report.done, report.stopped) == (4, 0, "interrupted")


@in_ipython
def test_in_a_cell_a_third_signal_ends_the_cell_when_the_run_has_ended(steps: Steps) -> None:
    """What still runs is cancelled once more, and waited for; the interrupt goes on then."""
    ended: list[str] = []

    async def job(_item: int) -> None:
        press()
        await steps.reached("finishing")
        press()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            press()
            await asyncio.sleep(0)
            raise

    @penstock.job
    async def definition() -> AsyncGenerator[Any, None]:
        try:
            yield job
        finally:
            ended.append("closed")

    with pytest.raises(KeyboardInterrupt):
        in_a_cell(lambda: penstock.run(definition, [1]))
    assert ended == ["closed"]


@in_ipython
def test_in_a_cell_a_job_that_blocks_the_loop_is_left_behind_by_the_third_signal(
    monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    """A thread cannot be stopped. The cell ends within a bound all the same."""
    monkeypatch.setattr(sys.modules["penstock.run"], "PATIENCE", 0.01)
    released, threads = threading.Event(), list[threading.Thread]()

    async def job(_item: int) -> None:
        threads.append(threading.current_thread())
        press()
        await steps.reached("finishing")
        press()
        try:
            await steps.reached("cancelling")
        finally:
            press()
            released.wait(BOUND)

    try:
        with pytest.raises(KeyboardInterrupt):
            in_a_cell(lambda: penstock.run(job, [1]))
        assert threads[0].is_alive()
    finally:
        released.set()
    threads[0].join(BOUND)
    (left_behind,) = (message for message in steps.told if message.startswith("the run goes on"))
    assert "left behind in its thread" in left_behind


@in_ipython
def test_in_a_cell_an_error_of_the_program_s_own_handler_cancels_the_run() -> None:
    """Of a watchdog, for example."""
    ended: list[str] = []

    class TooLong(Exception): ...

    def watchdog(_number: int, _frame: FrameType | None) -> None:
        raise TooLong

    async def job(_item: int) -> None:
        try:
            press(signal.SIGALRM)
            await asyncio.sleep(3600)
        finally:
            ended.append("cleaned up")

    before = signal.signal(signal.SIGALRM, watchdog)
    try:
        with pytest.raises(TooLong):
            in_a_cell(lambda: penstock.run(job, [1]))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == ["cleaned up"]


@in_ipython
@pytest.mark.parametrize("replaced", [False, True])
def test_in_a_cell_that_awaits_the_kernel_s_handler_is_set_aside(steps: Steps, replaced: bool) -> None:
    """It would cancel the cell's task, which the run blocks. It is put back, unless somebody has set another one."""

    def handle_sigint(*_: object) -> None:
        raise AssertionError("the kernel's handler was called")

    def mine(*_: object) -> None: ...

    def watchdog(*_: object) -> None:
        signal.signal(signal.SIGINT, mine)

    async def replace(_item: int) -> None:
        press(signal.SIGALRM)
        async with asyncio.timeout(BOUND):
            while signal.getsignal(signal.SIGINT) is not mine:
                await asyncio.sleep(0.001)

    handle_sigint.__module__ = "ipykernel.ipkernel"
    before = signal.signal(signal.SIGALRM, watchdog)
    signal.signal(signal.SIGINT, handle_sigint)
    try:
        report = in_a_cell(lambda: penstock.run(replace, [1]) if replaced else drained(steps))
        left = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, before)
    assert report.failed == 0
    assert left is (mine if replaced else handle_sigint)


@in_ipython
def test_ipython_in_a_terminal_runs_no_loop_and_needs_nothing_special() -> None:
    """As a thread of a notebook's: the run is on the loop of whoever calls."""
    seen: set[threading.Thread] = set()

    async def job(_item: int) -> None:
        seen.add(threading.current_thread())

    assert penstock.run(job, range(3)).done == 3
    assert seen == {threading.main_thread()}


@in_ipython
async def test_a_job_in_a_notebook_may_not_block_its_own_loop() -> None:
    """Neither on the cell's loop nor on that of a run."""

    async def nested(_item: int) -> None:
        penstock.run(double, [1])

    async with Executor() as executor:
        with pytest.raises(UsageError, match=REFUSED):
            await executor.submit(nested, 1)
    report = penstock.run(nested, [1])
    assert (report.failed, report.causes[0].error.partition(":")[0]) == (1, "UsageError")


@in_ipython
async def test_a_loop_in_a_thread_of_the_program_s_is_not_the_cell_s() -> None:
    async def serve() -> None:
        with pytest.raises(UsageError, match=REFUSED):
            penstock.run(double, [1])

    await asyncio.to_thread(asyncio.run, serve())


@in_ipython
def test_a_thread_that_the_kernel_made_for_a_subshell_runs_cells_too() -> None:
    """Signals stay with the main thread."""

    class SubshellThread(threading.Thread): ...

    SubshellThread.__module__ = "ipykernel.subshell"
    reports: list[Report] = []
    seen: list[object] = []

    async def job(_item: int) -> None:
        seen.append(handlers())

    async def cell() -> None:
        reports.append(penstock.run(job, range(2)))

    thread = SubshellThread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join(BOUND)
    assert reports[0].done == 2
    assert seen == [DEFAULTS, DEFAULTS]


async def test_ipython_that_is_imported_but_runs_nothing_changes_nothing(ipython: ModuleType) -> None:
    """As in a program that uses a part of it, or is in the middle of importing it."""
    ipython.get_ipython = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=REFUSED):
        penstock.run(double, [1])
    del ipython.get_ipython
    with pytest.raises(UsageError, match=REFUSED):
        penstock.run(double, [1])


# --- in threads, servers and tests ---


def test_several_threads_may_run_at_once() -> None:
    """Each on a loop of its own; signals stay with the main thread."""
    barrier = threading.Barrier(4, timeout=BOUND)
    loops: set[asyncio.AbstractEventLoop] = set()
    taken: list[object] = []
    reports: list[Report] = []

    async def job(item: int) -> None:
        if item == 0:
            loops.add(asyncio.get_running_loop())
            taken.append(handlers())
            barrier.wait()  # all four are in the middle of it
        await asyncio.sleep(0)

    def call() -> None:
        reports.append(penstock.run(job, range(50), limit=5))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(BOUND)
    assert [report.done for report in reports] == [50] * 4
    assert len(loops) == 4
    assert taken == [DEFAULTS] * 4


def test_a_run_in_the_main_thread_hears_signals_while_another_thread_runs_on(steps: Steps) -> None:
    started, released = threading.Event(), threading.Event()
    reports: list[Report] = []

    async def patient(_item: int) -> None:
        started.set()
        await penstock.to_thread(released.wait, BOUND)

    other = threading.Thread(target=lambda: reports.append(penstock.run(patient, [1])))
    other.start()
    try:
        assert started.wait(BOUND)
        assert drained(steps).stopped == "interrupted"
    finally:
        released.set()
        other.join(BOUND)
    assert (reports[0].done, reports[0].stopped) == (1, None)


async def test_a_handler_of_a_server_may_run_one_in_a_thread() -> None:
    """Requests go on being answered meanwhile: the run asks this very server."""
    numbers = range(20)

    async def number(request: web.Request) -> web.Response:
        return web.json_response({"number": int(request.match_info["number"])})

    async def start(request: web.Request) -> web.Response:
        @penstock.job
        async def job() -> AsyncGenerator[Any, None]:
            async with HttpClient(f"http://{request.host}") as api:

                async def ask(item: int) -> int:
                    found = await api.get_json(f"/number/{item}")
                    return int(found["number"])

                yield ask

        report = await asyncio.to_thread(penstock.run, job, numbers, limit=4)
        return web.json_response({"done": report.done, "attempts": report.attempts})

    app = web.Application()
    app.add_routes([web.get("/number/{number}", number), web.post("/start", start)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with ClientSession() as session, session.post(f"http://{host}:{port}/start") as answer:
            assert await answer.json() == {"done": len(numbers), "attempts": len(numbers)}
    finally:
        await runner.cleanup()


async def test_an_async_test_is_told_what_to_write() -> None:
    """Which then works."""
    with pytest.raises(UsageError, match=REFUSED):
        penstock.run(double, [1, 2])
    async with Executor() as executor:
        report = await executor.run(double, [1, 2])
    assert report.done == 2


def test_a_plain_test_just_works() -> None:
    """Beside async tests, and again: nothing of the last loop is in the way."""
    for _ in range(2):
        assert penstock.run(double, [1, 2]).done == 2
