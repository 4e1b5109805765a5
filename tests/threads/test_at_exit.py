"""What is finished before the interpreter ends, and what a fork leaves behind.

How an interpreter with a bridge really ends is shown by the tests of `BridgeExecutor`, in processes of their own.
"""

import gc
import os
import subprocess
import sys
import threading

import pytest

from penstock.threads import at_exit
from penstock.threads.at_exit import _Process, finish_at_exit, interpreter_is_ending


class Threads:
    """What lives in threads, and hears of the end."""

    def __init__(self, heard: list[str], name: str = "it") -> None:
        self._heard = heard
        self._name = name

    def finish(self) -> None:
        self._heard.append(f"finish {self._name}")

    def forsake(self) -> None:
        self._heard.append(f"forsake {self._name}")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> _Process:
    """A process that ends when a test says so. This one stays as it is."""
    process = _Process()
    monkeypatch.setattr(at_exit, "_process", process)
    return process


def test_all_that_lives_is_finished_at_the_end(process: _Process) -> None:
    """Each once, however often it was registered."""
    heard = list[str]()
    first, second = Threads(heard, "first"), Threads(heard, "second")
    for running in (first, second, first):
        finish_at_exit(running)
    process.end()
    assert sorted(heard) == ["finish first", "finish second"]


def test_nothing_is_kept_alive_for_the_end(process: _Process) -> None:
    heard = list[str]()
    running = Threads(heard)
    finish_at_exit(running)
    del running
    gc.collect()
    process.end()
    assert heard == []


def test_everybody_knows_that_the_end_has_begun_before_the_first_is_finished(process: _Process) -> None:
    """Or one that is being finished could begin something that nobody finishes."""

    class Asking(Threads):
        def finish(self) -> None:
            ending.append(interpreter_is_ending())

    ending = list[bool]()
    running = Asking([])
    finish_at_exit(running)
    assert not interpreter_is_ending()
    process.end()
    assert ending == [True]
    assert interpreter_is_ending()


def test_one_may_register_while_others_are_finished(process: _Process) -> None:
    """It is told nothing: it finds that the interpreter is ending, and begins nothing."""

    class Registering(Threads):
        def finish(self) -> None:
            super().finish()
            late.append(Threads(heard, "late"))
            finish_at_exit(late[0])

    heard, late = list[str](), list[Threads]()
    running = [Registering(heard, "early"), Threads(heard, "other")]
    for each in running:
        finish_at_exit(each)
    process.end()
    assert sorted(heard) == ["finish early", "finish other"]


def test_in_the_child_of_a_fork_all_are_forsaken_and_nobody_is_waited_for(process: _Process) -> None:
    heard = list[str]()
    running = Threads(heard)
    finish_at_exit(running)
    process.begin_anew()
    process.end()
    assert heard == ["forsake it"]


def test_who_is_forsaken_may_register_for_the_end_of_the_child(process: _Process) -> None:
    """One that has begun nothing can be used there."""

    class Unused(Threads):
        def forsake(self) -> None:
            super().forsake()
            finish_at_exit(self)

    heard = list[str]()
    running = Unused(heard)
    finish_at_exit(running)
    process.begin_anew()
    process.end()
    assert heard == ["forsake it", "finish it"]


def test_an_error_of_one_keeps_no_other_from_being_finished(process: _Process) -> None:
    """Ctrl-C while it waits, for example: it comes out at the end."""

    class Interrupted(Threads):
        def finish(self) -> None:
            super().finish()
            raise KeyboardInterrupt

    heard = list[str]()
    running = [Threads(heard, "first"), Interrupted(heard, "interrupted"), Threads(heard, "last")]
    for each in running:
        finish_at_exit(each)
    with pytest.raises(KeyboardInterrupt):
        process.end()
    assert sorted(heard) == ["finish first", "finish interrupted", "finish last"]


def test_one_may_register_from_another_thread_while_the_end_begins(process: _Process) -> None:
    """Those who are there are looked through at the same time."""

    def register() -> None:
        for each in late:
            finish_at_exit(each)

    early, late = ([Threads([]) for _ in range(500)] for _ in range(2))
    for each in early:
        finish_at_exit(each)
    thread = threading.Thread(target=register)
    thread.start()
    while thread.is_alive():
        process.end()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_tells_the_child_and_leaves_the_parent_alone() -> None:
    """By the hook of the real process. In a program of its own, since this one has threads."""
    program = """
import os
from penstock.threads.at_exit import finish_at_exit
class Threads:
    heard = []
    def finish(self): self.heard.append("finish")
    def forsake(self): self.heard.append("forsake")
running = Threads()
finish_at_exit(running)
child = os.fork()
if child == 0:
    os._exit(7 if running.heard == ["forsake"] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), running.heard)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("7 []\n", "")


def test_the_interpreter_finishes_when_the_main_thread_is_through() -> None:
    """Before it waits for threads that are no daemons, and before the functions of `atexit`."""
    program = """
import atexit, threading
from penstock.threads.at_exit import finish_at_exit, interpreter_is_ending
finished = threading.Event()
class Threads:
    def finish(self):
        print("finish", interpreter_is_ending(), flush=True)
        finished.set()
    def forsake(self): ...
def wait():
    finished.wait(20)
    print("thread", flush=True)
atexit.register(print, "atexit")
running = Threads()
finish_at_exit(running)
threading.Thread(target=wait).start()
print("main", interpreter_is_ending(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout.split("\n"), done.stderr) == (["main False", "finish True", "thread", "atexit", ""], "")


def test_the_hook_of_the_standard_library_is_there() -> None:
    """It is private: where it is missing, `atexit` takes its place, which runs when names cannot be resolved."""
    assert callable(getattr(threading, "_register_atexit", None))
