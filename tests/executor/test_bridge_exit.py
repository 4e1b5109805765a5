"""How a `BridgeExecutor` ends where nobody shuts it down: the interpreter's exit, Ctrl-C, a fork, garbage collection.

Whole programs: every line of output is compared, standard error included, so that no noise goes unseen: no "never
awaited", no "Exception ignored", no error that nobody asked for. As in `ThreadPoolExecutor`, of which all of this is
known.
"""

import asyncio
import contextlib
import gc
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import penstock
from penstock import BridgeExecutor

if TYPE_CHECKING:
    from concurrent.futures import Future

BOUND = 20.0
"""Seconds after which what should have ended hangs. Arbitrary, because it is spent by failing tests only."""

DEV = ("-X", "dev")
"""All that the interpreter and asyncio can find to complain of is said in this mode."""

STARTS_THREADS_AT_EXIT = not (3, 12) <= sys.version_info[:3] < (3, 12, 3)
"""CPython did not in between (gh-113964), so that nothing that needs a new thread works there, whoever asks."""

PRELUDE = """
import asyncio, atexit, concurrent.futures, multiprocessing, os, signal, sys, threading, time, warnings
import penstock
from penstock import BridgeExecutor
from penstock.threads.at_exit import interpreter_is_ending

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, also beside another thread

def refused(fn, *args, **kwargs):
    try:
        fn(*args, **kwargs)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
"""


class Ended(NamedTuple):
    """What became of a program."""

    status: int
    lines: list[str]

    def of(self, word: str) -> list[str]:
        """The lines that start with a word."""
        return [line for line in self.lines if line.split()[0] == word]


def ran(path: Path, program: str, *options: str) -> Ended:
    """Run a program; its standard error is read together with its standard output."""
    script = path / "script.py"
    script.write_text(PRELUDE + program)
    done = subprocess.run(
        [sys.executable, "-u", *options, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND,
        check=False,
    )
    # asyncio's debug mode tells of slow steps, which a busy machine makes of any.
    slow = re.compile(r"Executing <.* took [\d.]+ seconds$")
    return Ended(done.returncode, [line for line in done.stdout.splitlines() if not slow.match(line)])


# --- the interpreter's exit ---

AFTER_EXIT = "RuntimeError: cannot schedule new futures after interpreter shutdown"
AFTER_SHUTDOWN = (
    "ClosedError: cannot schedule new futures after shutdown: this BridgeExecutor has been shut down, as leaving its "
    "`with` block does. Submit within the block."
)


@pytest.mark.parametrize(
    ("end", "status", "options", "refusal"),
    [
        ("", 0, (), AFTER_EXIT),
        ("raise ValueError('unhandled')", 1, DEV, AFTER_EXIT),
        ("bridge.shutdown(wait=False); sys.exit(3)", 3, (), AFTER_SHUTDOWN),
    ],
    ids=["end of the script", "exception", "shutdown without waiting"],
)
def test_what_was_submitted_is_finished_at_the_interpreters_exit(
    tmp_path: Path, end: str, status: int, options: tuple[str, ...], refusal: str
) -> None:
    """In its order, and coroutines still resolve names and use threads. Who submits then is refused."""
    ended = ran(
        tmp_path,
        f"""
def plain(n):
    while not interpreter_is_ending():
        time.sleep(0.001)
    say("plain", n)
async def job(n):
    while not interpreter_is_ending():
        await asyncio.sleep(0.001)
    say("job", n)
async def last():
    if {STARTS_THREADS_AT_EXIT}:
        await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        await asyncio.to_thread(time.sleep, 0)
        await penstock.compute(time.sleep, 0)
    await penstock.to_thread(time.sleep, 0)
    say("job", refused(bridge.submit, print))
sys.excepthook = lambda kind, error, traceback: say("main", error)
@atexit.register
def at_exit():
    say("atexit", refused(unused.submit, print))
unused = BridgeExecutor()
bridge = BridgeExecutor(1, limit=1)
for n in range(3):
    bridge.submit(plain, n)
    bridge.submit(job, n)
bridge.submit(last)
bridge.submit(lambda: say("plain", refused(bridge.submit, print)))
say("main", "is through")
{end}
""",
        *options,
    )
    assert ended.status == status
    assert ended.of("main") == ["main is through"] + ["main unhandled"] * (status == 1)
    assert ended.of("plain") == ["plain 0", "plain 1", "plain 2", f"plain {refusal}"]
    assert ended.of("job") == ["job 0", "job 1", "job 2", f"job {refusal}"]
    assert ended.lines[-1] == f"atexit {AFTER_EXIT}"
    assert len(ended.lines) == 10 + (status == 1)


# --- Ctrl-C ---


def test_ctrl_c_ends_the_waiting_and_the_rest_is_finished(tmp_path: Path) -> None:
    """`result` raises KeyboardInterrupt, and leaving the `with` block still waits for all. So does the exit, when a
    second Ctrl-C ends that as well."""
    ended = ran(
        tmp_path,
        """
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
def plain(n):
    go.wait()
    say("plain", n)
async def job(n):
    while not go.is_set():
        await asyncio.sleep(0.001)
    say("job", n)
def until_exit():
    while not interpreter_is_ending():
        time.sleep(0.001)
    say("last")
def waits():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        if frame.f_code.co_name in ("result", "shutdown"):
            return True
        frame = frame.f_back
    return False
def interrupt_waiting():
    while not waits():
        time.sleep(0.001)
    interrupt()
go = threading.Event()
sys.excepthook = lambda kind, error, traceback: say("main", kind.__name__)
bridge = BridgeExecutor(2)
try:
    with bridge:
        blocked = bridge.submit(plain, 0)
        bridge.submit(interrupt_waiting)
        bridge.submit(plain, 1)
        bridge.submit(job, 0)
        try:
            blocked.result()
        except KeyboardInterrupt:
            say("main interrupted", blocked.done())
            go.set()
            raise
finally:
    say("main left")
    with BridgeExecutor() as bridge:
        bridge.submit(until_exit)
        bridge.submit(interrupt_waiting)
""",
    )
    assert ended.status == -signal.SIGINT
    assert ended.lines[0] == "main interrupted False"
    assert Counter(ended.lines[1:4]) == Counter(["plain 0", "plain 1", "job 0"])
    assert ended.lines[4:] == ["main left", "main KeyboardInterrupt", "last"]


class InterruptAt:
    """Ctrl-C at a step, where the interpreter looks for signals: in a function that begins, or after a call from one.

    In our functions and asyncio's: in those of `threading`, a lock may be lost by it, ours or not.
    """

    PLACES = tuple(str(Path(module.__file__ or "").parent) for module in (penstock, asyncio))

    def __init__(self, step: int) -> None:
        self._left = step
        self.came = False

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(self.PLACES):
            self._left -= 1
            if self._left < 0:
                sys.setprofile(None)
                self.came = True
                raise KeyboardInterrupt


async def nothing() -> None:
    """A coroutine function."""


@pytest.mark.parametrize("fn", [int, nothing], ids=["plain", "coroutine"])
@pytest.mark.parametrize("used", [(), (nothing,), (nothing, int)], ids=["new", "no thread", "idle thread"])
def test_an_interrupted_submit_leaves_a_bridge_that_works_and_ends(
    fn: Callable[[], Any], used: tuple[Callable[[], Any], ...]
) -> None:
    """Wherever Ctrl-C comes. `ThreadPoolExecutor` promises no such thing, and yet mostly keeps it."""
    came, step = True, 0
    while came:
        bridge = BridgeExecutor(2)
        for each in used:
            bridge.submit(each).result(BOUND)
        interrupt = InterruptAt(step)
        gc.disable()  # or it might come in a finalizer of something else, where it goes nowhere
        with contextlib.suppress(KeyboardInterrupt):
            try:
                sys.setprofile(interrupt)
                bridge.submit(fn)
            finally:
                sys.setprofile(None)
                gc.enable()
        if step % 2:
            bridge.submit(int).result(BOUND)
            bridge.submit(nothing).result(BOUND)
        shutdown = threading.Thread(target=bridge.shutdown, daemon=True)
        shutdown.start()
        joined([shutdown])
        came, step = interrupt.came, step + 1
    assert step > 20


# --- fork ---

FORKING = """
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
def child(run):
    pid = os.fork()
    if pid == 0:
        run()
        sys.exit(7)
    say("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
async def double(n):
    await asyncio.sleep(0)
    return 2 * n
"""
IN_USE = (
    "ClosedError: this BridgeExecutor was in use when the process forked, and its threads are not in the child. Make a "
    "new BridgeExecutor() in the child."
)


def test_a_child_does_not_wait_for_what_its_parent_runs(tmp_path: Path) -> None:
    """Neither at its exit, nor when it asks for it: it cannot use what was in use, and says so at once."""
    ended = ran(
        tmp_path,
        FORKING
        + """
async def forever():
    await asyncio.Event().wait()
def use():
    for fn in (print, double):
        say(refused(used.submit, fn, 1))
    say(refused(used.statistics))
    say(refused(used.open(penstock.HttpClient("http://127.0.0.1")).__enter__))
    say(refused(client.get, "/"))
    used.shutdown()
    used.shutdown(cancel_futures=True)
    say(refused(used.submit, double, 1))
go = threading.Event()
used = BridgeExecutor()
with used.open(penstock.HttpClient("http://127.0.0.1")) as client:
    blocked, waiting = used.submit(go.wait), used.submit(forever)
    child(lambda: None)
    child(use)
    say(blocked.done(), waiting.done(), used.submit(double, 1).result())
    go.set()
    waiting.cancel()
""",
        *DEV,
    )
    assert ended.lines == ["ended 7"] + [IN_USE] * 6 + ["ended 7", "False False 2"]
    assert ended.status == 0


def test_a_child_has_bridges_of_its_own(tmp_path: Path) -> None:
    """One that was not in use yet, and a new one; it waits for them at its exit, as its parent does."""
    ended = ran(
        tmp_path,
        FORKING
        + """
async def late(n):
    while not interpreter_is_ending():
        await asyncio.sleep(0.001)
    say("late", n)
def use(n):
    say(unused.submit(pow, 2, n).result(), list(unused.map(double, range(3))))
    unused.submit(late, n)
    with BridgeExecutor(2) as new:
        say(new.submit(pow, 3, n).result(), list(new.map(double, range(3))))
used, unused = BridgeExecutor(), BridgeExecutor()
used.submit(print).result()
for n in (1, 2):
    child(lambda: use(n))
use(3)
""",
    )
    said = [[f"{2**n} [0, 2, 4]", f"{3**n} [0, 2, 4]", f"late {n}"] for n in (1, 2, 3)]
    assert ended.lines == ["", *said[0], "ended 7", *said[1], "ended 7", *said[2]]
    assert ended.status == 0


def test_process_pools_can_fork_while_a_bridge_is_busy(tmp_path: Path) -> None:
    """At whatever moment of its threads: no lock of theirs is waited for in the child."""
    ended = ran(
        tmp_path,
        FORKING
        + """
def again():
    refused(bridge.submit, again)
async def again_on_the_loop():
    refused(bridge.submit, again_on_the_loop)
with BridgeExecutor(1) as bridge:
    bridge.submit(again)
    bridge.submit(again_on_the_loop)
    for n in range(10):
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as processes:
            say(processes.submit(pow, 2, n).result())
""",
        *DEV,
    )
    assert ended.lines == [str(2**n) for n in range(10)]
    assert ended.status == 0


# --- garbage collection ---


def threads_of(bridge: BridgeExecutor) -> list[threading.Thread]:
    """All it has, that of its loop included."""
    bridged = bridge._bridged
    assert bridged._thread is not None
    return [bridged._thread, *bridged.workers.threads]


def test_a_bridge_that_is_dropped_finishes_its_work_and_ends() -> None:
    """It is gone at once, without the garbage collector; its threads are when all is done."""
    go = threading.Event()

    async def job() -> str:
        await asyncio.to_thread(go.wait)
        return "job"

    bridge = BridgeExecutor(1)
    futures: list[Future[Any]] = [bridge.submit(job), bridge.submit(go.wait), bridge.submit(str, "queued")]
    threads, gone = threads_of(bridge), weakref.ref(bridge)
    assert len(threads) == 2
    gc.disable()
    del bridge
    assert gone() is None
    gc.enable()
    assert all(thread.is_alive() for thread in threads)
    go.set()
    assert [future.result(BOUND) for future in futures] == ["job", True, "queued"]
    joined(threads)


def test_one_that_is_dropped_where_it_works_ends_as_well() -> None:
    """In one of its threads, and on its loop: whoever has it last."""

    def plain(bridge: list[BridgeExecutor], go: threading.Event) -> None:
        go.wait()
        bridge.clear()

    async def job(bridge: list[BridgeExecutor], go: threading.Event) -> None:
        await asyncio.to_thread(go.wait)
        bridge.clear()

    for last in (plain, job):
        go, bridges = threading.Event(), [BridgeExecutor()]
        future = bridges[0].submit(last, bridges, go)
        threads, gone = threads_of(bridges[0]), weakref.ref(bridges[0])
        go.set()
        future.result(BOUND)
        joined(threads)
        assert gone() is None


def test_a_view_keeps_a_bridge_alive() -> None:
    """It is the same executor, whoever holds it."""
    view = BridgeExecutor().with_options(timeout=BOUND).with_options(key="a")
    gc.collect()
    assert view.submit(str, 1).result(BOUND) == "1"
    threads = threads_of(view)
    gc.collect()
    assert all(thread.is_alive() for thread in threads)
    del view
    joined(threads)


def test_the_values_of_map_do_not_keep_a_bridge_alive() -> None:
    """Unless there is still something to submit, with `buffersize`."""
    bridge = BridgeExecutor(1)
    values, gone = bridge.map(str, range(3)), weakref.ref(bridge)
    threads = threads_of(bridge)
    del bridge
    assert gone() is None
    joined(threads)
    assert list(values) == ["0", "1", "2"]

    bridge = BridgeExecutor(1)
    values, gone = bridge.map(str, range(3), buffersize=1), weakref.ref(bridge)
    threads = threads_of(bridge)
    del bridge
    gc.collect()
    assert list(values) == ["0", "1", "2"]
    del values
    joined(threads)
    assert gone() is None


def test_one_that_was_never_used_leaves_nothing() -> None:
    before = set(threading.enumerate())
    gone = weakref.ref(BridgeExecutor())
    assert gone() is None
    assert set(threading.enumerate()) <= before


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive()
