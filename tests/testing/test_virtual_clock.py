"""The rules of virtual time: when it jumps, when it must not, and what happens when nothing can ever run again."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from aiohttp import ClientSession, ClientTimeout, web
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import DeadlockError
from penstock.testing import ThreadLatch, VirtualClockLoop, run_in_virtual_time
from penstock.testing.task_location import location

HOUR = 3600.0


def virtual_loop() -> VirtualClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    return loop


async def elapsed(awaitable: Awaitable[object]) -> float:
    """Virtual seconds that it took, to the nanosecond: the start is large and so the differences are rounded."""
    start = virtual_loop().time()
    await awaitable
    return round(virtual_loop().time() - start, 9)


# --- time jumps ---


@pytest.mark.virtual_clock
async def test_a_sleep_takes_exactly_its_virtual_time() -> None:
    assert await elapsed(asyncio.sleep(HOUR)) == HOUR


@pytest.mark.virtual_clock
async def test_sleeps_of_different_tasks_overlap() -> None:
    assert await elapsed(asyncio.gather(asyncio.sleep(1), asyncio.sleep(3), asyncio.sleep(2))) == 3


@pytest.mark.virtual_clock
async def test_time_stands_still_while_anything_can_run() -> None:
    async def yield_often() -> None:
        for _ in range(1000):
            await asyncio.sleep(0)

    assert await elapsed(yield_often()) == 0


@pytest.mark.virtual_clock
async def test_a_deadline_beyond_what_a_selector_can_wait_is_met_exactly() -> None:
    """asyncio never asks its selector for more than a day."""
    assert await elapsed(asyncio.sleep(400 * 24 * HOUR)) == 400 * 24 * HOUR


def test_due_timers_fire_however_large_the_clock_is() -> None:
    """At 2 ** 40 s a nanosecond is less than half a unit in the last place: a fixed resolution would vanish."""
    start = 2.0**40
    assert run_in_virtual_time(asyncio.wait_for(asyncio.sleep(1, "done"), 2), start=start) == "done"


def test_the_clock_starts_far_from_zero_and_where_it_is_told() -> None:
    """Code that compares the loop's time with another clock must be wrong at once."""

    async def now() -> float:
        return virtual_loop().time()

    assert run_in_virtual_time(now()) > 100 * HOUR
    assert run_in_virtual_time(now()) == run_in_virtual_time(now())
    assert run_in_virtual_time(now(), start=17.5) == 17.5


@pytest.mark.virtual_clock
async def test_asyncio_timeout_fires_in_virtual_time() -> None:
    async def too_slow() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()

    assert await elapsed(too_slow()) == 30


@pytest.mark.virtual_clock
async def test_wait_for_fires_in_virtual_time_and_lets_a_fast_call_through() -> None:
    async def both() -> None:
        assert await asyncio.wait_for(asyncio.sleep(1, "value"), 2) == "value"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(3), 2)

    assert await elapsed(both()) == 3


@pytest.mark.virtual_clock
async def test_a_semaphore_serialises_in_virtual_time() -> None:
    semaphore = asyncio.Semaphore(2)

    async def hold() -> None:
        async with semaphore:
            await asyncio.sleep(1)

    assert await elapsed(asyncio.gather(*(hold() for _ in range(10)))) == 5


# --- the same schedule every time ---


@pytest.mark.virtual_clock
async def test_timers_of_one_deadline_fire_in_the_order_in_which_they_were_set() -> None:
    """A heap alone does not keep them in order, from four timers on."""
    loop = virtual_loop()
    fired: list[int] = []
    for number in range(100):
        loop.call_at(loop.time() + 1, fired.append, number)
    await asyncio.sleep(2)
    assert fired == list(range(100))


@given(st.lists(st.floats(min_value=0, max_value=1e6), max_size=30), st.floats(min_value=0, max_value=1e12))
def test_no_timer_fires_early_or_out_of_order(delays: list[float], start: float) -> None:
    """For any delays and any clock: each timer fires at its deadline, and ties in the order of setting."""
    fired: list[tuple[float, int]] = []

    async def main() -> list[float]:
        loop = virtual_loop()
        deadlines = [loop.time() + delay for delay in delays]

        def fire(number: int) -> None:
            fired.append((loop.time(), number))

        for number, deadline in enumerate(deadlines):
            loop.call_at(deadline, fire, number)
        await asyncio.sleep(2e6)
        return deadlines

    deadlines = run_in_virtual_time(main(), start=start)
    assert [at for at, _ in fired] == [deadlines[number] for _, number in fired]
    assert fired == sorted((deadline, number) for number, deadline in enumerate(deadlines))


def test_the_same_program_has_the_same_schedule() -> None:
    async def program() -> list[tuple[float, str]]:
        trace: list[tuple[float, str]] = []
        semaphore = asyncio.Semaphore(3)

        async def job(number: int) -> None:
            for step in range(5):
                async with semaphore:
                    await asyncio.sleep((number * 7 + step * 3) % 5 * 0.1)
                trace.append((virtual_loop().time(), f"{number}.{step}"))

        await asyncio.gather(*(job(number) for number in range(20)))
        return trace

    assert run_in_virtual_time(program()) == run_in_virtual_time(program())


@pytest.mark.virtual_clock
async def test_a_cancelled_timer_does_not_fire_and_does_not_hold_time_back() -> None:
    loop = virtual_loop()
    fired: list[str] = []
    loop.call_later(1, fired.append, "cancelled").cancel()
    loop.call_later(2, fired.append, "fires")
    assert await elapsed(asyncio.sleep(3)) == 3
    assert fired == ["fires"]


# --- threads are external work ---


@pytest.mark.virtual_clock
@pytest.mark.parametrize("own_pool", [False, True])
async def test_time_stands_still_while_a_thread_works(own_pool: bool) -> None:
    """For the default executor and any other; the thread works until the loop has had many chances to jump."""
    loop = virtual_loop()
    polls = threading.Semaphore(0)
    loop.iteration_hook = polls.release

    def wake_again() -> None:
        loop.call_soon(str)

    def work() -> str:
        loop.call_soon_threadsafe(wake_again)
        for _ in range(3):
            polls.acquire()
        return "worked"

    with ThreadPoolExecutor(1) as pool:
        start = loop.time()
        async with asyncio.timeout(0.001):
            assert await loop.run_in_executor(pool if own_pool else None, work) == "worked"
        assert loop.time() == start


@pytest.mark.virtual_clock
async def test_a_thread_that_nobody_waits_for_any_more_holds_time_until_it_has_really_ended() -> None:
    """The awaiting side is cancelled; the concurrent future still runs."""
    loop = virtual_loop()
    started, let_go = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        started.set()
        let_go.wait()
        order.append("thread ended")

    call = loop.run_in_executor(None, work)
    started.wait()
    call.cancel()
    # Released from outside, when the loop has nothing left but to wait.
    releaser = threading.Timer(0.02, let_go.set)
    releaser.start()
    await asyncio.sleep(HOUR)
    order.append("time jumped")
    releaser.join()
    assert order == ["thread ended", "time jumped"]


@pytest.mark.virtual_clock
async def test_a_call_cancelled_in_the_queue_of_its_executor_is_no_work() -> None:
    loop = virtual_loop()
    with ThreadPoolExecutor(1) as pool, ThreadLatch(loop) as latch:
        running = loop.run_in_executor(pool, latch.wait)
        queued = loop.run_in_executor(pool, latch.wait)
        queued.cancel()
        assert await elapsed(asyncio.sleep(1)) == 1
        latch.open()
        await running


@pytest.mark.virtual_clock
async def test_the_result_of_a_thread_arrives_before_time_jumps() -> None:
    """Many short calls, each against a deadline that would fire at the first wrong jump."""
    for number in range(200):
        async with asyncio.timeout(1e-6):
            assert await asyncio.to_thread(lambda value: value, number) == number


@pytest.mark.virtual_clock
async def test_a_default_executor_that_was_set_is_used_and_counts_as_work() -> None:
    loop = virtual_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as pool:
        loop.set_default_executor(pool)
        name = await asyncio.to_thread(lambda: threading.current_thread().name)
    assert name.startswith("mine")


@pytest.mark.virtual_clock
async def test_declared_external_work_stops_time_and_may_end_in_any_thread() -> None:
    loop = virtual_loop()
    done = asyncio.Event()
    with contextlib.ExitStack() as work:
        work.enter_context(loop.external_work())
        handover = work.pop_all()

        def finish() -> None:
            with handover:
                loop.call_soon_threadsafe(done.set)

        thread = threading.Thread(target=finish)
        thread.start()
        async with asyncio.timeout(1):
            await done.wait()
        thread.join()
    assert await elapsed(asyncio.sleep(1)) == 1


def test_a_thread_may_outlive_the_loop() -> None:
    """Its end is then nobody's business, and above all no error."""
    let_go = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        loop = VirtualClockLoop()
        loop.run_in_executor(pool, let_go.wait).cancel()
        loop.close()
        let_go.set()


def test_closing_waits_for_the_default_executor_in_real_time() -> None:
    """Leaving the runner joins the threads: neither a jump nor a deadlock may come between."""
    ended: list[bool] = []
    let_go = threading.Event()

    async def main() -> None:
        def work() -> None:
            let_go.wait()
            ended.append(True)

        virtual_loop().run_in_executor(None, work)
        threading.Timer(0.02, let_go.set).start()

    run_in_virtual_time(main())
    assert ended == [True]


# --- a thread that hangs on purpose ---


@pytest.mark.virtual_clock
async def test_a_thread_at_a_latch_lets_time_pass() -> None:
    """So a test of a hung call sees its time-out in virtual time."""
    with ThreadLatch(virtual_loop()) as latch:

        async def hang() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(30):
                    await asyncio.to_thread(latch.wait)

        assert await elapsed(hang()) == 30
        assert latch.held == 1
    assert latch.held == 0


@pytest.mark.virtual_clock
async def test_a_thread_let_go_by_a_latch_is_work_again_at_once() -> None:
    with ThreadLatch(virtual_loop()) as latch:
        call = asyncio.create_task(asyncio.to_thread(latch.wait))
        await asyncio.sleep(1)
        latch.open()
        async with asyncio.timeout(1e-6):
            await call
        async with asyncio.timeout(1e-6):
            await asyncio.to_thread(latch.wait)
    assert await elapsed(asyncio.sleep(1)) == 1


# --- sockets ---


async def serve(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    return runner, f"http://{host}:{port}/"


@pytest.mark.virtual_clock
@pytest.mark.parametrize("in_flight", [1, 10, 100])
async def test_http_over_loopback_takes_no_virtual_time_of_its_own(in_flight: int) -> None:
    """100 requests of 50 ms: each takes exactly these, and no time-out fires, though connections are real."""

    async def answer_late(_: web.Request) -> web.Response:
        await asyncio.sleep(0.05)
        return web.json_response({})

    runner, url = await serve(answer_late)
    slots = asyncio.Semaphore(in_flight)
    latencies: list[float] = []

    async def get(session: ClientSession) -> None:
        async with slots:
            latencies.append(await elapsed(fetch(session)))

    async def fetch(session: ClientSession) -> None:
        async with session.get(url) as response:
            await response.json()

    async def get_all(session: ClientSession) -> None:
        await asyncio.gather(*(get(session) for _ in range(100)))

    async with ClientSession(timeout=ClientTimeout(total=0.051)) as session:
        assert await elapsed(get_all(session)) == pytest.approx(100 / in_flight * 0.05)
    await runner.cleanup()
    assert latencies == [0.05] * 100


@pytest.mark.virtual_clock
async def test_a_peer_outside_the_loop_answers_in_real_time_when_declared_external_work() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)

    def answer() -> None:
        theirs.sendall(theirs.recv(5).upper())
        theirs.close()

    threading.Timer(0.02, answer).start()
    writer.write(b"hello")
    with virtual_loop().external_work():
        async with asyncio.timeout(1):
            assert await reader.read() == b"HELLO"
    writer.close()
    await writer.wait_closed()


def test_without_a_timer_the_loop_is_patient_with_open_sockets() -> None:
    """Nothing is there to jump to, so a slow peer costs nothing but real time."""

    async def main() -> bytes:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        answering = threading.Timer(0.02, theirs.sendall, [b"late\n"])
        answering.start()
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        answering.join()
        theirs.close()
        return line

    assert run_in_virtual_time(main()) == b"late\n"


def test_sockets_that_stay_silent_end_in_a_deadlock_error() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            await virtual_loop().sock_recv(ours, 1)

    with (
        pytest.raises(DeadlockError, match=r"1 sockets or pipes silent for 0\.01 s of real time"),
        asyncio.Runner(loop_factory=lambda: VirtualClockLoop(io_patience=0.01)) as runner,
    ):
        runner.run(main())


# --- nothing can ever run again ---


def test_a_program_that_can_never_go_on_raises_and_says_where_every_task_waits() -> None:
    """Go's rule: all goroutines are asleep."""

    async def wait_for_nobody(lock: asyncio.Lock) -> None:
        async with lock:
            pass

    async def main() -> None:
        lock = asyncio.Lock()
        await lock.acquire()
        await asyncio.sleep(12.5)
        child = asyncio.create_task(wait_for_nobody(lock), name="child")
        await child

    with pytest.raises(DeadlockError) as caught:
        run_in_virtual_time(main())
    told = str(caught.value)
    assert "12.5 s after the start" in told
    assert "child waits at" in told
    assert "in wait_for_nobody: async with lock:" in told
    assert "in main: await child" in told
    assert "locks.py" in told


def test_after_a_deadlock_the_tasks_are_cancelled_and_clean_up() -> None:
    cleaned_up: list[float] = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(5)
            cleaned_up.append(virtual_loop().time())

    with pytest.raises(DeadlockError):
        run_in_virtual_time(main(), start=100)
    assert cleaned_up == [105]


def test_a_wait_for_an_unknown_thread_is_a_deadlock_and_the_error_names_the_cure() -> None:
    with pytest.raises(DeadlockError, match=r"with loop\.external_work\(\)"):
        run_in_virtual_time(asyncio.wait_for(asyncio.Event().wait(), None))


# --- as an event loop ---


def test_a_closed_loop_refuses_timers_and_calls() -> None:
    loop = VirtualClockLoop()
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_later(1, print)
    with pytest.raises(RuntimeError, match="closed"):
        loop.run_in_executor(None, print)


def test_a_timer_from_another_thread_is_refused_in_debug_mode() -> None:
    async def main() -> None:
        virtual_loop().set_debug(True)
        with pytest.raises(RuntimeError, match="thread"):
            await asyncio.to_thread(virtual_loop_of_main.call_later, 1, print)
        virtual_loop_of_main.call_later(1, print).cancel()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        virtual_loop_of_main = runner.get_loop()
        runner.run(main())


@pytest.mark.virtual_clock
async def test_the_iteration_hook_runs_once_for_each_iteration_and_before_any_jump() -> None:
    loop = virtual_loop()
    times: list[float] = []
    loop.iteration_hook = lambda: times.append(loop.time())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(times) == 2
    await asyncio.sleep(1)
    loop.iteration_hook = None
    assert [later - earlier for earlier, later in pairwise(times)] == [0, 0, 1]


@pytest.mark.virtual_clock
async def test_what_the_iteration_hook_makes_ready_runs_before_time_jumps() -> None:
    loop = virtual_loop()
    awaited = loop.create_future()

    def make_ready() -> None:
        loop.iteration_hook = None
        awaited.set_result(loop.time())

    loop.call_soon(setattr, loop, "iteration_hook", make_ready)
    async with asyncio.timeout(1):
        assert await awaited == loop.time()


@pytest.mark.virtual_clock
async def test_the_location_of_a_task_follows_awaits_down_to_what_really_waits() -> None:
    @types.coroutine
    def old_style(future: asyncio.Future[None]) -> Generator[object, None, None]:
        yield from future

    async def inner() -> None:
        await old_style(virtual_loop().create_future())

    task = asyncio.create_task(inner())
    await asyncio.sleep(0)
    lines = location(task).splitlines()
    assert [line.split(" in ")[1].split(":")[0] for line in lines] == ["inner", "old_style"]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert "no Python frame" in location(task)


@pytest.mark.full
def test_the_schedule_does_not_depend_on_the_process() -> None:
    """The same program in fresh processes with different hash seeds, sockets included."""
    program = (
        "import asyncio, sys; sys.path[:0] = sys.argv[1].split(';')\n"
        "from penstock.testing import run_in_virtual_time\n"
        "async def main():\n"
        "    trace = []\n"
        "    async def serve(reader, writer):\n"
        "        while line := await reader.readline():\n"
        "            await asyncio.sleep(int(line) % 7 * 0.01); writer.write(line)\n"
        "        writer.close()\n"
        "    server = await asyncio.start_server(serve, '127.0.0.1', 0)\n"
        "    address = server.sockets[0].getsockname()\n"
        "    async def talk(number):\n"
        "        reader, writer = await asyncio.open_connection(*address)\n"
        "        for step in range(20):\n"
        "            writer.write(b'%d\\n' % (number + step)); await reader.readline()\n"
        "            trace.append((asyncio.get_running_loop().time(), number))\n"
        "        writer.close(); await writer.wait_closed()\n"
        "    await asyncio.gather(*map(talk, range(20)))\n"
        "    server.close()\n"
        "    print(trace)\n"
        "run_in_virtual_time(main())\n"
    )
    traces = {
        subprocess.run(
            [sys.executable, "-c", program, ";".join(sys.path)],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
        ).stdout
        for seed in range(5)
    }
    assert len(traces) == 1
