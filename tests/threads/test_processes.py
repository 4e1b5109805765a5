"""CPU work in other processes: what dies, hangs or cannot be pickled harms its own call, and nothing is left behind."""

import concurrent.futures.process
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import ClosedError, FailureKind, UsageError, classify
from penstock.threads import processes as module
from penstock.threads.main_guard import refuse_a_child_that_imports
from penstock.threads.processes import Processes, RemoteTraceback

BOUND = 20.0
"""Seconds of real time after which something hangs. Arbitrary, because it is spent by failing tests only."""

PROMPT = 15.0
"""Seconds within which a script ends that waits for nothing, on a busy machine; its processes would sleep for 60."""


@pytest.fixture(scope="module")
def work() -> Iterator[Any]:
    """A module that processes can import: those of the tests are known to pytest alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("work_for_processes")


@pytest.fixture(scope="module")
def one(work: Any) -> Iterator[Processes]:
    """One process for all tests that do not break it. It is started when it can find their functions."""
    processes = Processes(1)
    processes.call(os.getpid, (), {})
    yield processes
    processes.close()


@pytest.fixture
def unharmed(one: Processes) -> Iterator[Processes]:
    """That one process, which must be the same one afterwards."""
    before = one.call(os.getpid, (), {})
    yield one
    assert one.call(os.getpid, (), {}) == before


@pytest.fixture
def make(ask: object) -> Iterator[Callable[[int], Processes]]:
    """Makes what tests break or close, ends it before the threads that ask are waited for, and waits for its own."""
    threads = set(threading.enumerate())
    made: list[Processes] = []

    def make(size: int) -> Processes:
        made.append(Processes(size))
        return made[-1]

    yield make
    for processes in made:
        processes.kill()
    for thread in set(threading.enumerate()) - threads:
        if not thread.name.startswith("ask"):
            thread.join(BOUND)


@pytest.fixture
def ask() -> Iterator[Callable[..., "Future[Any]"]]:
    """Calls from threads of their own, as a lane makes them."""
    with ThreadPoolExecutor(16, thread_name_prefix="ask") as threads:
        yield lambda processes, fn, *args: threads.submit(processes.call, fn, args, {})


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def failure(future: "Future[Any]") -> BaseException:
    error = future.exception(BOUND)
    assert error is not None
    return error


# --- calls ---


def test_a_call_runs_in_another_process_with_all_its_arguments(unharmed: Processes, work: Any) -> None:
    assert unharmed.call(os.getpid, (), {}) != os.getpid()
    assert unharmed.call(work.all_of, (1, "two"), {"fn": 3, "self": 4}) == ((1, "two"), {"fn": 3, "self": 4})


def test_processes_are_never_forked_from_here(
    make: Callable[[int], Processes], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork copies locks that threads hold. Neither globals nor context variables go along."""
    monkeypatch.setattr(work, "state", "as changed")
    token = work.variable.set("as set")
    try:
        processes = make(1)
        assert processes.call(work.state_here, (), {}) == ("as imported", "default")
        assert processes.call(os.getppid, (), {}) == os.getpid(), "no fork server between, which signals may end"
    finally:
        work.variable.reset(token)


def test_processes_are_started_when_calls_need_them_and_never_more_than_size(
    make: Callable[[int], Processes], ask: Callable[..., "Future[Any]"], work: Any, fifo: str
) -> None:
    """Calls one after another need one process; two that wait for each other, two; twenty, no more than these."""
    processes = make(2)
    first = processes.call(work.pid, (), {})
    assert processes.call(work.pid, (), {}) == first
    both = {call.result(BOUND) for call in (ask(processes, work.meet, fifo, "r"), ask(processes, work.meet, fifo, "w"))}
    assert len(both) == 2
    assert first in both
    assert {call.result(BOUND) for call in [ask(processes, work.pid, n) for n in range(20)]} <= both


@pytest.mark.parametrize("size", [0, -1, True, 1.0, None, "2"])
def test_the_size_is_a_whole_number_of_at_least_one(size: Any) -> None:
    with pytest.raises(UsageError, match=f"processes={size!r}: expected a whole number of at least 1"):
        Processes(size)


DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner),
    max_leaves=5,
)


def echo(*args: object, **kwargs: object) -> object:
    return args, kwargs


@given(args=st.lists(DATA, max_size=3).map(tuple), kwargs=st.dictionaries(st.text(), DATA, max_size=3))
def test_whatever_is_sent_comes_back(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """The way of a call, without the process between."""
    assert module._run(module._question(echo, args, kwargs)).open("echo") == (args, kwargs)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("fail", (ValueError("x"),), ValueError),
        ("fail", (SystemExit(3),), UsageError),
        ("fail_to_fit", ("a", "b"), pickle.UnpicklingError),
        ("fail_with_a_lock", (), pickle.PicklingError),
        ("lock", (), TypeError),
    ],
)
def test_whatever_fails_is_told(work: Any, name: str, args: tuple[object, ...], expected: type[Exception]) -> None:
    """The way of an error, without the process between."""
    with pytest.raises(expected):
        module._run(module._question(getattr(work, name), args, {})).open(name)


# --- errors of the function ---


def test_an_error_keeps_its_arguments_its_notes_and_its_traceback_as_text(unharmed: Processes, work: Any) -> None:
    sent = ValueError("bad", 7)
    sent.add_note("of the third row")
    with pytest.raises(ValueError, match="bad") as caught:
        unharmed.call(work.fail, (sent,), {})
    assert caught.value.args == ("bad", 7)
    assert notes(caught.value) == "of the third row"
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "work_for_processes.py" in str(caught.value.__cause__)
    assert "in fail" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), KeyboardInterrupt(), StopIteration(1), GeneratorExit(), concurrent.futures.CancelledError()],
)
def test_what_would_end_more_than_the_call_comes_back_as_an_error(
    unharmed: Processes, work: Any, error: BaseException
) -> None:
    """Neither the process ends, nor the thread that asked it."""
    with pytest.raises(UsageError, match=f"fail raised {type(error).__name__}") as caught:
        unharmed.call(work.fail, (error,), {})
    assert type(caught.value.__cause__) is type(error)


def test_a_broken_pool_of_the_function_is_not_taken_for_ours(unharmed: Processes, work: Any) -> None:
    with pytest.raises(BrokenProcessPool, match="of its own") as caught:
        unharmed.call(work.break_a_pool_of_its_own, (), {})
    assert notes(caught.value) == ""


@pytest.mark.parametrize(("name", "raised"), [("fail_to_fit", pickle.UnpicklingError), ("die", BrokenProcessPool)])
def test_a_failed_call_leaves_no_cycle_behind(
    name: str, raised: type[Exception], make: Callable[[int], Processes], work: Any
) -> None:
    """Else every failed item, with its input, would live until the next garbage collection."""
    processes = make(1)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(raised):
            processes.call(getattr(work, name), ("a", "b"), {})
        assert not [found for found in gc.get_objects() if isinstance(found, raised)]
    finally:
        gc.enable()


# --- what cannot be pickled ---


def decorated_by_hand(work: Any) -> Callable[..., Any]:
    """A function whose name leads to another one."""
    hidden: Callable[..., Any] = work.hidden_by_its_wrapper
    return hidden


@pytest.mark.parametrize(
    "find",
    [
        lambda work: lambda: None,
        lambda work: functools.partial(lambda: None),
        lambda work: work.HoldsALock().method,
        decorated_by_hand,
    ],
    ids=["lambda", "partial", "method", "decorated"],
)
def test_a_function_that_a_process_cannot_find_is_refused_before_anything_is_sent(
    find: Callable[[Any], Callable[..., Any]], work: Any
) -> None:
    fn = find(work)
    processes = Processes(1)
    with pytest.raises(UsageError) as caught:
        processes.call(fn, (), {})
    assert str(caught.value).startswith(f"found {fn!r:.200}, which cannot be sent to a process (")
    assert "Define it at module level, and write `executor.to_process(name, ...)`." in str(caught.value)
    assert processes._pool is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("coroutine_function", "the async function coroutine_function, expected a plain one"),
        ("generator_function", "the async generator function generator_function"),
        ("state", "'as imported', expected a function"),
    ],
)
def test_only_plain_functions_run_in_processes(work: Any, name: str, found: str) -> None:
    processes = Processes(1)
    with pytest.raises(UsageError, match=f"found {found}"):
        processes.call(getattr(work, name), (), {})
    assert processes._pool is None


def test_an_argument_that_cannot_be_sent_is_named_as_such(unharmed: Processes) -> None:
    with pytest.raises(TypeError, match="cannot pickle") as caught:
        unharmed.call(len, (threading.Lock(),), {})
    assert notes(caught.value).startswith("An argument of len cannot be sent to a process")


def test_an_argument_that_cannot_be_rebuilt_in_the_process_fails_its_own_call(unharmed: Processes, work: Any) -> None:
    with pytest.raises(ValueError, match="only at home") as caught:
        unharmed.call(work.identity, (work.StaysHere(),), {})
    assert notes(caught.value).startswith("A process could not rebuild the function or its arguments.")


def test_a_function_of_a_module_that_the_process_cannot_import_says_so(
    unharmed: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one from a notebook."""
    notebook = ModuleType("notebook_of_here")
    exec("def fn(): ...", vars(notebook))
    monkeypatch.setitem(sys.modules, "notebook_of_here", notebook)
    with pytest.raises(ModuleNotFoundError, match="notebook_of_here") as caught:
        unharmed.call(notebook.fn, (), {})
    assert "nothing may come from an interactive session or a notebook" in notes(caught.value)


def test_a_value_that_cannot_be_sent_back_fails_its_own_call(unharmed: Processes, work: Any) -> None:
    with pytest.raises(TypeError, match="cannot pickle") as caught:
        unharmed.call(work.lock, (), {})
    assert notes(caught.value) == "The value of lock cannot be sent back from its process: return plain data."


def test_a_value_that_cannot_be_rebuilt_here_fails_its_own_call(unharmed: Processes, work: Any) -> None:
    with pytest.raises(ValueError, match="only at home") as caught:
        unharmed.call(work.stay_there, (), {})
    assert notes(caught.value) == "The value of stay_there came back from its process, and cannot be rebuilt here."


def test_a_coroutine_that_the_function_forgot_to_await_is_an_error(unharmed: Processes, work: Any) -> None:
    with pytest.raises(UsageError, match="forget_to_await returned a coroutine"):
        unharmed.call(work.forget_to_await, (), {})


def test_an_error_that_cannot_be_sent_back_is_told_with_its_traceback(unharmed: Processes, work: Any) -> None:
    with pytest.raises(pickle.PicklingError, match="HoldsALock: busy was raised in a process and cannot be") as caught:
        unharmed.call(work.fail_with_a_lock, (), {})
    assert "in fail_with_a_lock" in str(caught.value.__cause__)


def test_an_error_that_cannot_be_rebuilt_here_is_told_with_its_traceback(unharmed: Processes, work: Any) -> None:
    """The stdlib's pool would break for all calls."""
    with pytest.raises(pickle.UnpicklingError, match="raised DoesNotFit: a and b, which cannot be rebuilt") as caught:
        unharmed.call(work.fail_to_fit, ("a", "b"), {})
    assert "`DoesNotFit.__init__` asks for must stand in `args`" in str(caught.value)
    assert "in fail_to_fit" in str(caught.value.__cause__)


def test_an_error_that_cannot_even_be_told_fails_its_own_call(unharmed: Processes, work: Any) -> None:
    with pytest.raises(UsageError, match="fail_unspeakably raised KeyboardInterrupt"):
        unharmed.call(work.fail_unspeakably, (), {})


# --- processes that die ---


def test_a_process_that_dies_fails_its_call_and_the_next_one_works(make: Callable[[int], Processes], work: Any) -> None:
    processes = make(1)
    before = processes.call(work.pid, (), {})
    with pytest.raises(BrokenProcessPool) as caught:
        processes.call(os._exit, (3,), {})
    assert "A process died (os._exit, a signal, a crash, out of memory) while _exit ran" in notes(caught.value)
    assert "__main__" not in notes(caught.value)
    assert classify(caught.value) is FailureKind.TRANSIENT
    assert processes.call(work.pid, (), {}) != before


def test_every_call_beside_it_fails_once_and_the_pool_is_replaced_once(
    make: Callable[[int], Processes],
    ask: Callable[..., "Future[Any]"],
    work: Any,
    fifo: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with an error of its own, that names its own function; no descriptor of the old pool is kept."""
    pools, submitted = set(), []
    submit = module._Pool.submit

    def noted(pool: Any, question: bytes) -> "Future[Any]":
        future = submit(pool, question)
        pools.add(id(pool))
        submitted.append(future)
        return future

    monkeypatch.setattr(module._Pool, "submit", noted)
    processes = make(2)
    processes.call(work.pid, (), {})
    descriptors = len(os.listdir("/proc/self/fd"))

    calls = [ask(processes, work.die_when_told, fifo)]
    with open(fifo):
        calls += [ask(processes, signal.pause) for _ in range(8)]
    until(lambda: len(submitted) == 10)
    with open(fifo, "w"):
        errors = [failure(call) for call in calls]
    assert {type(error) for error in errors} == {BrokenProcessPool}
    assert len({id(error) for error in errors}) == 9
    assert "while die_when_told ran" in notes(errors[0])
    assert all("while pause ran" in notes(error) and "die_when_told" not in notes(error) for error in errors[1:])

    assert len({call.result(BOUND) for call in [ask(processes, work.pid, n) for n in range(8)]}) <= 2
    assert len(pools) == 2
    del errors, calls
    submitted.clear()
    gc.collect()
    spare = 2 * 3  # a second process may run now: the two pipes to it, and a copy of one
    assert len(os.listdir("/proc/self/fd")) <= descriptors + spare


def test_a_process_that_dies_while_it_is_idle_fails_nobody(make: Callable[[int], Processes], work: Any) -> None:
    threads = set(threading.enumerate())
    processes = make(1)
    pid = processes.call(work.pid, (), {})
    (manager,) = (thread for thread in set(threading.enumerate()) - threads if not thread.daemon)
    os.kill(pid, signal.SIGKILL)
    manager.join(BOUND)  # then the stdlib knows
    assert processes.call(work.pid, (), {}) != pid


def test_a_process_that_dies_in_the_middle_of_its_answer_hangs_nobody(
    make: Callable[[int], Processes], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does it to one that needs much memory. The stdlib waits for the other half for ever."""
    monkeypatch.setattr(module, "NOTICE", 0.2)
    processes = make(2)
    with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
        processes.call(work.die_in_the_middle_of_the_answer, (), {})
    assert processes.call(work.identity, (7,), {}) == 7


def test_a_call_that_takes_longer_than_a_death_to_be_noticed_is_waited_for(
    unharmed: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NOTICE", 0.01)
    assert unharmed.call(time.sleep, (0.05,), {}) is None


def test_a_call_whose_process_cannot_be_started_never_runs(
    make: Callable[[int], Processes], work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stdlib would run it beside the next one. Here as in a process that imports a script without a guard."""
    processes = make(1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError) as caught:
        patch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
        processes.call(work.touch, (str(tmp_path / "ran"),), {})
    assert notes(caught.value) == "No process could be started for touch."
    assert processes.call(work.identity, (7,), {}) == 7
    assert list(tmp_path.iterdir()) == []


# --- the main guard ---


def test_nothing_starts_in_a_process_that_still_imports_its_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else everything does, and multiprocessing is not loaded to find that out."""
    refuse_a_child_that_imports("A run")
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UsageError, match=r"^A run was reached in a worker process, which imports this script"):
        refuse_a_child_that_imports("A run")
    monkeypatch.delitem(sys.modules, "multiprocessing.process")
    refuse_a_child_that_imports("A run")
    assert "multiprocessing.process" not in sys.modules


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_call_goes_on_when_its_process_gets_a_signal_that_is_the_parents_to_act_upon(
    number: int, make: Callable[[int], Processes], ask: Callable[..., "Future[Any]"], work: Any, fifo: str
) -> None:
    processes = make(1)
    pid = processes.call(work.pid, (), {})
    call = ask(processes, work.run_until_told, fifo)
    with open(fifo):
        os.kill(pid, number)
    with open(fifo, "w"):
        assert call.result(BOUND) == pid


def test_what_a_function_forks_or_starts_ends_by_sigterm(unharmed: Processes, work: Any) -> None:
    """It is the function that may tell it to."""
    assert unharmed.call(work.terminate_a_fork, (), {}) == -signal.SIGTERM
    assert unharmed.call(work.terminate_a_program, (), {}) == -signal.SIGTERM


def test_the_thread_that_starts_a_process_hears_signals_afterwards(make: Callable[[int], Processes], work: Any) -> None:
    processes = make(1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    processes.call(work.pid, (), {})
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_the_others_of_a_process_that_dies_end_with_it_though_no_call_comes(
    make: Callable[[int], Processes], ask: Callable[..., "Future[Any]"], work: Any, fifo: str
) -> None:
    """The stdlib asks them by SIGTERM, to which they are deaf, and waits for them, as the interpreter's exit does."""
    threads = set(threading.enumerate())
    processes = make(2)
    calls = ask(processes, work.meet, fifo, "r"), ask(processes, work.meet, fifo, "w")
    first, second = (call.result(BOUND) for call in calls)
    (manager,) = (t for t in set(threading.enumerate()) - threads if not t.daemon and not t.name.startswith("ask"))
    os.kill(first, signal.SIGKILL)
    manager.join(BOUND)
    assert not manager.is_alive()
    assert not alive(second)


# --- close and kill ---


def test_a_closed_one_takes_no_calls_and_its_idle_processes_end(make: Callable[[int], Processes], work: Any) -> None:
    processes = make(1)
    pid = processes.call(work.pid, (), {})
    processes.close()
    processes.close()
    with pytest.raises(ClosedError, match="pid was to run in a process, but its executor has been shut down"):
        processes.call(work.pid, (), {})
    until(lambda: not alive(pid))


def test_one_that_was_never_used_can_be_closed_and_killed() -> None:
    processes = Processes(1)
    processes.close()
    processes.kill()
    with pytest.raises(ClosedError):
        processes.call(os.getpid, (), {})


def test_a_call_that_runs_when_it_is_closed_gets_its_value(
    make: Callable[[int], Processes], ask: Callable[..., "Future[Any]"], work: Any, fifo: str
) -> None:
    """Closing waits for nothing; the process ends after its last call."""
    processes = make(1)
    call = ask(processes, work.run_until_told, fifo)
    with open(fifo):
        processes.close()
    with open(fifo, "w"):
        pid = call.result(BOUND)
    until(lambda: not alive(pid))


@pytest.mark.parametrize("closed_before", [False, True])
def test_kill_ends_processes_that_hang_and_fails_their_calls(
    closed_before: bool,
    make: Callable[[int], Processes],
    ask: Callable[..., "Future[Any]"],
    work: Any,
    fifo: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the calls that wait for a process. It is over at once, whoever is blocked, and takes no more calls."""
    monkeypatch.setattr(module, "NOTICE", 0.2)
    processes = make(1)
    pid = processes.call(work.pid, (), {})
    calls = [ask(processes, work.meet_and_hang, fifo)]
    with open(fifo):
        calls += [ask(processes, len, bytes(1_000_000)) for _ in range(4)]  # more than a pipe takes
        until(lambda: processes._calls == 5)
    if closed_before:
        processes.close()
    processes.kill()
    processes.kill()
    errors = [failure(call) for call in calls]
    assert "All processes were killed while meet_and_hang ran or waited for one" in notes(errors[0])
    assert {type(error) for error in errors} <= {BrokenProcessPool, ClosedError}
    until(lambda: not alive(pid))
    with pytest.raises(ClosedError):
        processes.call(work.pid, (), {})


def test_a_call_that_meets_a_kill_on_its_way_is_refused(
    make: Callable[[int], Processes], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the one that accepted it and the pool there is no lock held."""
    processes = make(1)
    submit = module._Pool.submit

    def kill_before(pool: Any, question: bytes) -> "Future[Any]":
        processes.kill()
        return submit(pool, question)

    monkeypatch.setattr(module._Pool, "submit", kill_before)
    with pytest.raises(ClosedError, match="identity was to run in a process"):
        processes.call(work.identity, (1,), {})


# --- scripts ---

PREAMBLE = """
import os, signal, sys, threading, time
from penstock.threads.processes import Processes
"""


class Script:
    """A program of its own, in a process group of its own."""

    def __init__(self, path: Path, source: str) -> None:
        path.write_text(PREAMBLE + textwrap.dedent(source))
        self._running = subprocess.Popen(
            [sys.executable, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._running.pid

    def line(self) -> str:
        assert self._running.stdout is not None
        return self._running.stdout.readline().strip()

    def go_on(self) -> None:
        """For one that waits for a line of input."""
        assert self._running.stdin is not None
        self._running.stdin.write("\n")
        self._running.stdin.flush()

    def signal_all(self, number: int) -> None:
        os.killpg(self.pid, number)

    def ended(self) -> tuple[int, str, str]:
        """Its code, output and errors. All of its processes hold the output open, so that they have ended, too."""
        output, errors = self._running.communicate(timeout=BOUND)
        return self._running.returncode, output, errors

    def stop(self) -> None:
        if self._running.poll() is None:
            self.signal_all(signal.SIGKILL)
        self._running.communicate(timeout=BOUND)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[[str], Script]]:
    running: list[Script] = []

    def script(source: str) -> Script:
        running.append(Script(tmp_path / "script.py", source))
        return running[-1]

    yield script
    for each in running:
        each.stop()


def test_a_script_that_forgets_to_close_ends_promptly_and_without_a_word(script: Callable[[str], Script]) -> None:
    program = script("""
        if __name__ == "__main__":
            processes = Processes(2)
            print(processes.call(abs, (-7,), {}), flush=True)
    """)
    assert program.line() == "7"
    began = time.monotonic()
    assert program.ended() == (0, "", "")
    assert time.monotonic() - began < PROMPT


def test_a_process_that_hangs_does_not_keep_a_script_that_kills_it(script: Callable[[str], Script]) -> None:
    """Although the one thread that waits for it was abandoned, and more is waiting to be sent than a pipe takes."""
    program = script("""
        def hang():
            print("up", flush=True)
            time.sleep(60)

        def wait_for(fn, *args):
            try:
                processes.call(fn, args, {})
            except Exception as error:
                os.write(1, f"{type(error).__name__}\\n".encode())  # one write: two threads' prints may mingle

        if __name__ == "__main__":
            processes = Processes(1)
            threading.Thread(target=wait_for, args=(hang,), daemon=True).start()
            threading.Thread(target=wait_for, args=(len, bytes(1_000_000)), daemon=True).start()
            sys.stdin.readline()
            processes.kill()
    """)
    assert program.line() == "up"
    began = time.monotonic()
    program.go_on()
    code, output, errors = program.ended()
    assert (code, errors) == (0, "")
    assert set(output.split()) <= {"BrokenProcessPool"}
    assert time.monotonic() - began < PROMPT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_the_parents_to_act_upon(number: int, script: Callable[[str], Script]) -> None:
    """As terminals and supervisors send it; what runs is finished, the next call is, and nobody prints a traceback."""
    program = script("""
        def slow():
            print("up", flush=True)
            time.sleep(0.3)
            return 7

        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            processes = Processes(1)
            values = []
            thread = threading.Thread(target=lambda: values.append(processes.call(slow, (), {})))
            thread.start()
            try:
                signal.pause()
            except KeyboardInterrupt:
                thread.join()
                print(values, processes.call(abs, (-8,), {}))
    """)
    assert program.line() == "up"
    program.signal_all(number)
    assert program.ended() == (0, "[7] 8\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_harm_a_process_that_starts(
    number: int, script: Callable[[str], Script]
) -> None:
    program = script("""
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, lambda *_: None)
            signal.signal(signal.SIGTERM, lambda *_: None)
            print(Processes(1).call(abs, (-7,), {}))
        else:
            print("importing", flush=True)
            time.sleep(0.3)
    """)
    assert program.line() == "importing"
    program.signal_all(number)
    assert program.ended() == (0, "7\n", "")


def test_a_drain_by_a_signal_to_the_whole_group_loses_nothing(script: Callable[[str], Script]) -> None:
    program = script("""
        import penstock

        def slow(number):
            os.write(1, b"up\\n")
            time.sleep(0.3)
            return number

        async def job(number):
            await penstock.to_process(slow, number)

        if __name__ == "__main__":
            report = penstock.run(job, range(1_000), limit=2, processes=2)
            print(report.stopped, report.done >= 1, report.done == report.read - report.left, report.failed)
    """)
    assert program.line() == "up"
    program.signal_all(signal.SIGTERM)
    code, output, errors = program.ended()
    assert (code, output.replace("up\n", "")) == (0, "interrupted True True 0\n")
    (line,) = errors.splitlines()
    assert line.startswith("interrupted by SIGTERM: finishing what is in flight")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_when_their_parent_is_killed(number: int, script: Callable[[str], Script]) -> None:
    """It cannot tell them. Else they would wait for calls for ever, or work for nobody."""
    program = script("""
        def hang():
            print(os.getpid(), flush=True)
            time.sleep(60)

        if __name__ == "__main__":
            Processes(1).call(hang, (), {})
    """)
    worker = int(program.line())
    os.kill(program.pid, number)
    until(lambda: not alive(worker))
    assert program.ended()[0] == -number


def test_a_script_without_a_guard_is_told_what_it_lacks(script: Callable[[str], Script]) -> None:
    """Its processes start it all over. The question that nobody reads, longer than a pipe, keeps nobody waiting."""
    program = script("""
        try:
            Processes(1).call(len, (bytes(1_000_000),), {})
        except Exception as error:
            print(*error.__notes__)
            print(type(error).__name__)
            raise SystemExit(2)
    """)
    began = time.monotonic()
    code, output, _ = program.ended()
    assert code == 2
    assert output.splitlines()[-1] == "BrokenProcessPool"
    assert 'Keep what starts the work under `if __name__ == "__main__":`' in output
    assert "No process could be started for len." in output.splitlines()
    assert time.monotonic() - began < PROMPT


@pytest.mark.parametrize(
    ("start", "what"),
    [
        ("penstock.run(job, [1], progress=False)", "penstock.run()"),
        ("asyncio.run(main())", "An executor"),
    ],
)
def test_a_run_without_a_guard_is_not_repeated_by_the_processes(
    start: str, what: str, script: Callable[[str], Script]
) -> None:
    """They import the script. What the run does would be done once more by each, and the report would not tell."""
    program = script(f"""
        import asyncio
        import penstock

        async def job(number):
            os.write(1, b"effect\\n")
            try:
                await penstock.to_process(abs, number)
            except Exception as error:
                os.write(1, "\\n".join(error.__notes__).encode())

        async def main():
            async with penstock.Executor() as executor:
                await executor.submit(job, 1)

        {start}
    """)
    code, output, errors = program.ended()
    assert code == 0
    assert output.count("effect") == 1
    assert "without a main guard" in output
    assert errors.count("Traceback") == 1
    (last,) = (line for line in errors.splitlines() if "Error: " in line)
    assert last == (
        f"penstock.errors.UsageError: {what} was reached in a worker process, which imports this script to find its "
        f'functions. Keep what starts the work under `if __name__ == "__main__":`.'
    )
