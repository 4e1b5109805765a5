"""Whole processes: how a script ends, by itself and by signals, with what exit status, and what it says on its way.

Every line of output is compared, standard error included, so that no noise goes unseen: no "never awaited", no "loop is
closed", no exception that nobody retrieved.
"""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

BOUND = 20.0
"""Seconds after which a program that should have ended is killed."""
AT_ONCE = 5.0
"""Seconds for what takes a tenth of one on an idle machine, and as long as the hanging call, which is far longer, when
it is wrong."""

PRELUDE = """
import asyncio, contextlib, gc, itertools, os, signal, sys, threading, time, weakref
import penstock
"""
REPORT = """
report.verify()
print("report", report.read, report.done, report.left, report.stopped)
sys.exit(report.exit_code)
"""


class Script:
    """A Python program under test; its standard error is read together with its standard output."""

    def __init__(self, path: Path, program: str, *options: str) -> None:
        script = path / "script.py"
        script.write_text(PRELUDE + program)
        self._process = subprocess.Popen(
            [sys.executable, "-u", *options, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self._watchdog = threading.Timer(BOUND, self._process.kill)
        self._watchdog.start()
        self.lines: list[str] = []

    def read_until(self, wanted: str) -> None:
        """Wait for a line that holds these words."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard(line)
            if wanted in line:
                return
        raise AssertionError(f"{wanted!r} is not in the output:\n" + "\n".join(self.lines))

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def ended(self) -> int:
        """Read the rest; the exit status."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard(line)
        return self._process.wait(BOUND)

    def running(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.02)
        return self._process.returncode is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._watchdog.cancel()
        self._watchdog.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _heard(self, line: str) -> None:
        # asyncio's debug mode tells of slow steps, which a busy machine makes of any.
        if not re.match(r"Executing <.* took [\d.]+ seconds$", line):
            self.lines.append(line.rstrip("\n"))


class Start(Protocol):
    """Start a program, with these options of the interpreter."""

    def __call__(self, program: str, *options: str) -> Script: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as scripts:

        def start(program: str, *options: str) -> Script:
            script = Script(tmp_path, program, *options)
            scripts.callback(script.close)
            return script

        yield start


def first(name: str = "Ctrl-C", within: float = 25) -> str:
    return f"interrupted by {name}: finishing what is in flight within {within:g} s; {name} again cancels it"


def second(name: str = "Ctrl-C") -> str:
    return f"interrupted by {name}: cancelling what is in flight; {name} again ends the program"


def too_late(within: float) -> str:
    return f"not finished within {within:g} s: cancelling what is in flight"


def left_in_threads(*calls: str) -> str:
    """A pattern of the one warning about calls that hang; in whatever order they are named."""
    named = ", ".join(rf"(?:\w+\.)*{call} \([\d.,]+ s\)" for call in calls)
    subject = "1 call still runs in a thread" if len(calls) == 1 else f"{len(calls)} calls still run in threads"
    rest = "it" if len(calls) == 1 else "them"
    return rf"{subject} that nobody waits for: {named}\. The program's exit ends {rest}\."


both = pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")], ids=["SIGINT", "SIGTERM"]
)
DEV = ("-X", "dev")
"""All that the interpreter and asyncio can find to complain of is said in this mode."""
either = pytest.mark.parametrize(
    ("number", "name", "options"),
    [(signal.SIGINT, "Ctrl-C", DEV), (signal.SIGTERM, "SIGTERM", ())],
    ids=["SIGINT-dev", "SIGTERM-plain"],
)
statuses = pytest.mark.parametrize(("status", "options"), [(0, ()), (3, DEV)], ids=["0-plain", "3-dev"])


# --- one, two, three ---


@either
def test_a_signal_drains(start: Start, number: int, name: str, options: tuple[str, ...]) -> None:
    """What is in flight is finished, no other item is begun, and the report's exit status is a shell's for Ctrl-C."""
    script = start(
        """
said = asyncio.Event()
async def job(item):
    print("started", item)
    if item == 1:
        await asyncio.to_thread(sys.stdin.readline)
        said.set()
    await said.wait()
report = penstock.run(job, itertools.count(), limit=2)
print("handlers", signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) == 0)
"""
        + REPORT,
        *options,
    )
    script.read_until("started 1")
    script.send(number)
    script.read_until(first(name))
    script.say("go")
    assert script.ended() == 130
    assert script.lines == ["started 0", "started 1", first(name), "handlers True True", "report 2 2 0 interrupted"]


def test_a_script_that_has_drained_by_sigterm_may_say_that_all_is_well(start: Start) -> None:
    """What a container's orchestrator wants to see: `run` returned, and the script goes on after it."""
    script = start(
        """
async def job(item):
    print("started", item)
    await asyncio.to_thread(sys.stdin.readline)
report = penstock.run(job, itertools.count(), limit=1)
print("report", report.read, report.done, report.left, report.stopped)
"""
    )
    script.read_until("started 0")
    script.send(signal.SIGTERM)
    script.read_until(first("SIGTERM"))
    script.say("go")
    assert script.ended() == 0
    assert script.lines == ["started 0", first("SIGTERM"), "report 1 1 0 interrupted"]


def test_a_second_signal_cancels(start: Start) -> None:
    """Ctrl-C and SIGTERM count together."""
    script = start(
        """
async def job(item):
    print("started", item)
    try:
        await asyncio.sleep(3600)
    finally:
        print("cancelled", item)
report = penstock.run(job, itertools.count(), limit=2)
"""
        + REPORT,
        *DEV,
    )
    script.read_until("started 1")
    script.send(signal.SIGINT)
    script.read_until(first())
    script.send(signal.SIGTERM)
    assert script.ended() == 130
    # What the job prints and what is logged may come in either order, as the two streams are read.
    assert sorted(script.lines[2:6]) == sorted([first(), second("SIGTERM"), "cancelled 0", "cancelled 1"])
    assert script.lines[6:] == ["report 2 0 2 interrupted"]


@both
def test_a_third_signal_leaves_though_a_job_takes_its_time_to_clean_up(start: Start, number: int, name: str) -> None:
    """As the signal does by default: Ctrl-C with a KeyboardInterrupt, SIGTERM without a word."""
    script = start(
        """
async def job(item):
    try:
        print("started")
        await asyncio.sleep(3600)
    finally:
        print("cleaning up")
        await asyncio.sleep(3600)
report = penstock.run(job, [1])
"""
        + REPORT
    )
    script.read_until("started")
    script.send(number)
    script.read_until(first(name))
    script.send(number)
    script.read_until("cleaning up")
    script.send(number)
    assert script.ended() == -number
    assert script.lines[:4] == ["started", first(name), second(name), "cleaning up"]
    assert script.lines[-1] == ("KeyboardInterrupt" if number == signal.SIGINT else "cleaning up")
    assert "never" not in "".join(script.lines)


@both
def test_a_job_that_blocks_the_loop_can_be_left(start: Start, number: int, name: str) -> None:
    """The loop hears nothing, so it takes three; more are needed only if one overtakes another on its way."""
    script = start(
        """
async def job(item):
    print("started")
    time.sleep(3600)
report = penstock.run(job, [1])
"""
        + REPORT
    )
    script.read_until("started")
    sent = 0
    while script.running():
        script.send(number)
        sent += 1
    assert script.ended() == -number
    assert sent >= 3
    assert script.lines[-1] == ("KeyboardInterrupt" if number == signal.SIGINT else "started")


# --- calls that hang in threads ---


@statuses
def test_after_the_deadline_hung_threads_are_left_and_named(
    start: Start, status: int, options: tuple[str, ...]
) -> None:
    """The interpreter does not wait for them, and the script's exit status is kept."""
    script = start(
        f"""
def hang():
    os.write(1, b"hanging\\n")  # in one piece, also beside another thread
    time.sleep(60)
async def job(item):
    await penstock.to_thread(hang)
report = penstock.run(job, [1, 2, 3], drain_timeout=0.3)
report.verify()
print("report", report.read, report.done, report.left)
sys.exit({status})
""",
        *options,
    )
    for _ in range(3):
        script.read_until("hanging")
    script.send(signal.SIGTERM)
    script.read_until(first("SIGTERM", 0.3))
    script.read_until(too_late(0.3))
    deadline = time.monotonic()
    assert script.ended() == status
    assert time.monotonic() - deadline < AT_ONCE
    *before, warning, report = script.lines
    assert before == ["hanging"] * 3 + [first("SIGTERM", 0.3), too_late(0.3)]
    assert re.fullmatch(left_in_threads("hang", "hang", "hang"), warning)
    assert report == "report 3 0 3"


def test_a_second_ctrl_c_cancels_and_a_hung_thread_does_not_hold_the_exit_up(start: Start) -> None:
    """One job waits for the network, one hangs in a blocking call, one in a computation: all are left, and named."""
    script = start(
        """
def hang():
    os.write(1, b"hanging\\n")
    threading.Event().wait()
def compute():
    hang()
async def job(item):
    try:
        match item:
            case 0: await asyncio.sleep(3600)
            case 1: await penstock.to_thread(hang)
            case 2: await penstock.compute(compute)
    finally:
        print("cancelled", item)
report = penstock.run(job, itertools.count(), limit=3)
"""
        + REPORT,
        *DEV,
    )
    for _ in range(2):
        script.read_until("hanging")
    script.send(signal.SIGINT)
    script.read_until(first())
    script.send(signal.SIGINT)
    assert script.ended() == 130
    assert script.lines[:4] == ["hanging", "hanging", first(), second()]
    assert sorted(script.lines[4:7]) == ["cancelled 0", "cancelled 1", "cancelled 2"]
    assert script.lines[-1] == "report 3 0 3 interrupted"
    (warning,) = script.lines[7:-1]
    assert re.fullmatch(left_in_threads("hang", "compute") + "|" + left_in_threads("compute", "hang"), warning)


@statuses
def test_a_program_of_its_own_loop_ends_while_calls_hang(start: Start, status: int, options: tuple[str, ...]) -> None:
    """`asyncio.run` returns, and so does the interpreter: an executor's threads are waited for by nobody."""
    script = start(
        f"""
def hang():
    begun.release()
    time.sleep(60)
async def main():
    async with penstock.Executor() as executor:
        calls = [asyncio.ensure_future(executor.to_thread(hang)) for _ in range(3)]
        for _ in calls:
            await asyncio.to_thread(begun.acquire)
        print("hanging")
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
begun = threading.Semaphore(0)
asyncio.run(main())
print("over")
sys.exit({status})
""",
        *options,
    )
    script.read_until("hanging")
    started = time.monotonic()
    assert script.ended() == status
    assert time.monotonic() - started < AT_ONCE
    hanging, *warnings, over = script.lines
    assert (hanging, over) == ("hanging", "over")
    (warning,) = warnings
    assert re.fullmatch(left_in_threads("hang", "hang", "hang"), warning)


def test_a_call_that_ends_after_its_loop_was_closed_makes_no_noise(start: Start) -> None:
    """Whether it returns or raises: nobody is left to be told."""
    script = start(
        """
class Token: ...
def hang(token, error):
    begun.release()
    go.wait()
    if error:
        raise ValueError("nobody hears of it")
async def call(executor, error):
    token = Token()
    weakref.finalize(token, ended.release)
    await executor.to_thread(hang, token, error)
async def main():
    async with penstock.Executor() as executor:
        for error in (False, True):
            executor.submit(call, executor, error)
        for _ in range(2):
            await asyncio.to_thread(begun.acquire)
        await executor.shutdown(timeout=0)
begun, go, ended = threading.Semaphore(0), threading.Event(), threading.Semaphore(0)
asyncio.run(main())
go.set()
for _ in range(2):
    while not ended.acquire(timeout=0.01):  # the threads have let go of their calls
        gc.collect()
print("over")
""",
        *DEV,
    )
    assert script.ended() == 0
    warning, last = script.lines
    assert re.fullmatch(left_in_threads("hang", "hang"), warning)
    assert last == "over"


# --- no noise, wherever it comes ---


@either
def test_a_signal_while_resources_are_opened(start: Start, number: int, name: str, options: tuple[str, ...]) -> None:
    """They are opened and closed; nothing is begun."""
    script = start(
        """
async def score(item):
    print("started", item)
@penstock.job
async def job():
    print("opening")
    await asyncio.to_thread(sys.stdin.readline)
    yield score
    print("closed")
report = penstock.run(job, itertools.count())
"""
        + REPORT,
        *options,
    )
    script.read_until("opening")
    script.send(number)
    script.read_until(first(name))
    script.say("go")
    assert script.ended() == 130
    assert script.lines == ["opening", first(name), "closed", "report 0 0 0 interrupted"]


@either
def test_signals_end_an_opening_that_hangs(start: Start, number: int, name: str, options: tuple[str, ...]) -> None:
    """The second one; it needs no third, which would end the program without a report."""
    script = start(
        """
@penstock.job
async def job():
    try:
        print("opening")
        await asyncio.sleep(3600)
        yield print
    finally:
        print("closed")
report = penstock.run(job, itertools.count())
"""
        + REPORT,
        *options,
    )
    script.read_until("opening")
    script.send(number)
    script.read_until(first(name))
    script.send(number)
    assert script.ended() == 130
    assert script.lines == ["opening", first(name), second(name), "closed", "report 0 0 0 interrupted"]


@either
def test_a_deadline_ends_a_closing_that_hangs(start: Start, number: int, name: str, options: tuple[str, ...]) -> None:
    """A container is stopped in time though its job does not close."""
    script = start(
        """
sys.modules["penstock.executor.resources"].PATIENCE = 0.1
async def score(item): ...
@penstock.job
async def job():
    yield score
    print("closing")
    await asyncio.sleep(3600)
report = penstock.run(job, [1], drain_timeout=0.1)
"""
        + REPORT,
        *options,
    )
    script.read_until("closing")
    script.send(number)
    assert script.ended() == 0
    assert script.lines[:3] == ["closing", first(name, 0.1), too_late(0.1)]
    assert "<penstock.Job job> did not close its resources within 0.1 s" in script.lines[3]
    assert script.lines[4:] == ["report 1 1 0 None"]


@either
def test_a_signal_while_a_job_starts(start: Start, number: int, name: str, options: tuple[str, ...]) -> None:
    """In the middle of its first step, with others that have not had theirs."""
    script = start(
        f"""
async def job(item):
    if not item:
        os.kill(os.getpid(), {number})
report = penstock.run(job, itertools.count(), limit=100)
report.verify()
print("report", report.read == report.done, report.left, report.stopped)
""",
        *options,
    )
    assert script.ended() == 0
    assert script.lines == [first(name), "report True 0 interrupted"]


@either
def test_a_signal_during_a_computation(start: Start, number: int, name: str, options: tuple[str, ...]) -> None:
    """It is finished, also one that holds the interpreter whenever it can."""
    script = start(
        """
said = threading.Event()
def compute():
    threading.Thread(target=lambda: said.set() if sys.stdin.readline() else None).start()
    print("computing")
    steps = 0
    while not said.is_set():
        steps += 1
    return steps
async def job(item):
    await penstock.compute(compute)
report = penstock.run(job, itertools.count(), limit=1)
"""
        + REPORT,
        *options,
    )
    script.read_until("computing")
    script.send(number)
    script.read_until(first(name))
    script.say("go")
    assert script.ended() == 130
    assert script.lines == ["computing", first(name), "report 1 1 0 interrupted"]


@either
def test_signals_during_a_drain(start: Start, number: int, name: str, options: tuple[str, ...]) -> None:
    """Two jobs read streams of children; two of the children hang in threads, the others wait for a slot."""
    script = start(
        """
executors = []
def hang():
    os.write(1, b"hanging\\n")
    time.sleep(60)
async def child(item):
    await penstock.to_thread(hang)
async def job(item):
    async with executors[0].map(child, range(3)) as stream:
        async for _ in stream: ...
class Executor(penstock.Executor):
    async def __aenter__(self):
        executors.append(self)
        return await super().__aenter__()
sys.modules["penstock.run"].Executor = Executor
report = penstock.run(job, itertools.count(), limit=2)
"""
        + REPORT,
        *options,
    )
    for _ in range(2):
        script.read_until("hanging")
    script.send(number)
    script.read_until(first(name))
    script.send(number)
    assert script.ended() == 130
    *before, warning, report = script.lines
    assert before == ["hanging", "hanging", first(name), second(name)]
    assert re.fullmatch(left_in_threads("hang", "hang"), warning)
    assert report == "report 2 0 2 interrupted"


# --- the first and the last moment ---


AT_OPENING = """
class Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self):
        os.kill(os.getpid(), {number})
        return super().new_event_loop()
asyncio.set_event_loop_policy(Policy())
"""
AT_CLOSING = """
class Loop(asyncio.SelectorEventLoop):
    def close(self):
        super().close()
        os.kill(os.getpid(), {number})
class Policy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = Loop
asyncio.set_event_loop_policy(Policy())
"""
RUN = """
async def job(item):
    await asyncio.sleep(0)
report = penstock.run(job, itertools.count() if endless else [1])
"""


@either
def test_a_signal_while_the_loop_is_made_is_heard(
    start: Start, number: int, name: str, options: tuple[str, ...]
) -> None:
    """The report says that nothing was begun."""
    script = start(AT_OPENING.format(number=int(number)) + "endless = True" + RUN + REPORT, *options)
    assert script.ended() == 130
    assert script.lines == [first(name), "report 0 0 0 interrupted"]


@either
def test_a_signal_while_the_loop_is_closed_does_what_it_always_does(
    start: Start, number: int, name: str, options: tuple[str, ...]
) -> None:
    """Nothing is left to shut down: it comes as if `run` had returned."""
    script = start(AT_CLOSING.format(number=int(number)) + "endless = False" + RUN + REPORT, *options)
    assert script.ended() == -number
    if number == signal.SIGTERM:
        assert script.lines == []
    else:
        assert script.lines[0] == "Traceback (most recent call last):"
        assert script.lines[-1] == "KeyboardInterrupt"
        assert sum(line.startswith("Traceback") for line in script.lines) == 1


# --- who owns the signals ---


def test_a_server_that_owns_its_signals_keeps_them(start: Start) -> None:
    """An executor on its loop takes none; nor does a run in a thread of it."""
    script = start(
        """
async def job(item):
    if item == 0:
        print("serving")
    await stop.wait()
async def server():
    global stop
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping, number)
    async with penstock.Executor() as executor:
        async with executor.as_completed(job, range(3)) as stream:
            inner = asyncio.to_thread(penstock.run, quick, range(3))
            print("in a thread", (await inner).done)
            print("ended", len([outcome async for outcome in stream]))
async def quick(item):
    await asyncio.sleep(0)
def stopping(number):
    print("mine", signal.Signals(number).name)
    if number == signal.SIGTERM:
        stop.set()
asyncio.run(server())
"""
    )
    script.read_until("in a thread 3")
    script.send(signal.SIGINT)
    script.read_until("mine SIGINT")
    script.send(signal.SIGTERM)
    assert script.ended() == 0
    assert sorted(script.lines[:2]) == ["in a thread 3", "serving"]
    assert script.lines[2:] == ["mine SIGINT", "mine SIGTERM", "ended 3"]


# --- who does not want to end ---


def test_a_job_that_swallows_its_cancellation_does_not_hold_the_exit_up(start: Start) -> None:
    """It is named, abandoned, and the script reports and leaves."""
    script = start(
        """
for name in ("run", "executor.executor", "executor.running", "executor.feed"):
    sys.modules["penstock." + name].PATIENCE = 0.1
async def job(item):
    print("started")
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
report = penstock.run(job, [1], drain_timeout=0.1)
"""
        + REPORT
    )
    script.read_until("started")
    script.send(signal.SIGTERM)
    script.read_until(too_late(0.1))
    started = time.monotonic()
    assert script.ended() == 130
    assert time.monotonic() - started < AT_ONCE
    assert script.lines[:3] == ["started", first("SIGTERM", 0.1), too_late(0.1)]
    assert "swallowed asyncio.CancelledError" in script.lines[3]
    assert "report 1 0 1 interrupted" in script.lines[4:]
