"""CPython's own tests of `ThreadPoolExecutor`, run on `BridgeExecutor`.

    python3.13 -m pytest tests/executor/test_cpython_suite.py       those of that interpreter

They are those of the interpreter, `test.test_concurrent_futures`, unchanged: what they import as `futures` and
`assert_python_ok` is replaced, so that what makes a `ThreadPoolExecutor` makes ours. Many an installation comes without
them; there is nothing to run then.

Most of their time is sleep, and they count threads: so they run side by side in processes of their own, each of which
is this file as a script. There, names of tests come in, one a line, and outcomes go out, as JSON.
"""

import concurrent.futures
import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
import types
import unittest
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypedDict

import pytest

import penstock

PACKAGE = "test.test_concurrent_futures"
MODULES = ("test_as_completed", "test_init", "test_shutdown", "test_thread_pool", "test_wait")
"""Where the tests of thread pools are, if the package is not one module, as it was once."""

PROCESSES = 4
"""Side by side. Arbitrary, because: with them all takes little more than the longest, which sleeps for 6 s."""
BOUND = 50.0
"""Seconds after which a test hangs: less than pytest waits for one."""

EXCEPTIONS = {
    "ThreadPoolExecutorTest.test_default_workers": (
        "expects a number of threads that is computed from the number of cores; here it is measured"
    ),
    "ThreadPoolShutdownTest.test_cancel_futures_wait_false": (
        "before CPython 3.13: expects that a call has begun as soon as it is submitted, which no documentation promises"
    ),
    "ThreadPoolShutdownTest.test_thread_names_default": (
        "expects names like `ThreadPoolExecutor-0_1`; here a thread without a prefix is named after what it runs"
    ),
}
"""The tests that do not apply, and why."""
APPLIES_FROM = {"ThreadPoolShutdownTest.test_cancel_futures_wait_false": (3, 13)}
"""In which CPython they do. This one's is gh-116682: the call may be cancelled before it has begun."""
NEVER = (sys.maxsize,)

PAGE = Path(__file__).parent.parent.parent / "docs" / "how-to" / "cpython-tests.md"
"""Where users read the same."""


class Outcome(TypedDict):
    """What became of a test."""

    result: str
    """"passed", "skipped" or "failed"."""
    text: str
    """Why it was skipped, or how it failed."""


# --- ours in the place of theirs ---


class BridgeExecutor(penstock.BridgeExecutor):
    """One with the attributes that the tests look at inside of a `ThreadPoolExecutor`."""

    _had: frozenset[threading.Thread] = frozenset()

    @property
    def _threads(self) -> frozenset[threading.Thread]:
        """All threads it has had, once none is on its way: they are started one by another here."""
        workers = self._bridged.workers
        while workers._waking and not self._broken:
            time.sleep(0.001)
        self._had |= set(workers.threads)
        return self._had

    @property
    def _max_workers(self) -> int:
        return self._bridged.workers.most

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        _ = self._threads  # they are asked for when it is over, too
        super().shutdown(wait, cancel_futures=cancel_futures)


class Futures(types.ModuleType):
    """`concurrent.futures`, but for what a thread pool is."""

    ThreadPoolExecutor = BridgeExecutor

    def __getattr__(self, name: str) -> Any:
        return getattr(concurrent.futures, name)


def with_ours(assert_python_ok: Callable[..., Any]) -> Callable[[str, str], Any]:
    """The same, which runs a script: there, too, a thread pool is ours."""

    def assert_with_ours(option: str, script: str) -> Any:
        wanted = "from concurrent.futures import "
        assert script.count(wanted) == 1, "else nobody knows what it tests"
        ours = script.replace(wanted, "from penstock import BridgeExecutor as ")
        # It runs isolated, and does not look where the environment says that packages are.
        return assert_python_ok(option, f"import sys; sys.path[:] = {sys.path!r}\n{ours}")

    return assert_with_ours


def installed() -> bool:
    """Whether this interpreter comes with the tests."""
    try:
        return importlib.util.find_spec(PACKAGE) is not None
    except ModuleNotFoundError:  # not even with the package above
        return False


def theirs() -> list[types.ModuleType]:
    package = importlib.import_module(PACKAGE)
    if not hasattr(package, "__path__"):
        return [package]
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES]


@functools.cache
def cases() -> dict[str, unittest.TestCase]:
    """Every test of thread pools, by its name."""
    support: Any = importlib.import_module("test.support")
    support.verbose = 0  # else they print how long they took
    found = {}
    for module in theirs():
        patched: Any = module
        patched.futures = Futures("futures")
        if hasattr(module, "assert_python_ok"):
            patched.assert_python_ok = with_ours(patched.assert_python_ok)
        for name, kind in list(vars(module).items()):
            if getattr(kind, "executor_type", None) is concurrent.futures.ThreadPoolExecutor and is_complete(kind):
                ours = type(name, (kind,), {"executor_type": BridgeExecutor})
                for test in unittest.defaultTestLoader.getTestCaseNames(ours):
                    found[f"{name}.{test}"] = ours(test)
    return found


def is_complete(kind: object) -> bool:
    """Whether it is no mixin."""
    return isinstance(kind, type) and issubclass(kind, unittest.TestCase)


# --- this file as a script ---


def serve() -> None:
    """Run the tests that are named on standard input."""
    support: Any = importlib.import_module("test.support")
    answers, sys.stdout = sys.stdout, sys.stderr
    found = cases()
    for line in sys.stdin:
        support.environment_altered = False
        outcome = run(found[line.strip()])
        if support.environment_altered:
            outcome = Outcome(result="failed", text=f"it left threads behind\n{outcome['text']}")
        sys.stderr.flush()
        print(json.dumps(outcome), file=answers, flush=True)


def run(case: unittest.TestCase) -> Outcome:
    """Run one test. What is raised where nobody hears of it, in a thread or a finalizer, fails it as well."""
    unheard: list[str] = []
    threading.excepthook = lambda args: unheard.append(f"in {args.thread}: {args.exc_value!r}")
    sys.unraisablehook = lambda args: unheard.append(f"{args.err_msg} {args.object!r}: {args.exc_value!r}")
    result = unittest.TestResult()
    case.run(result)
    failures = [text for _, text in (*result.failures, *result.errors)] + unheard
    if failures:
        return Outcome(result="failed", text="\n".join(failures))
    if result.skipped:
        return Outcome(result="skipped", text=result.skipped[0][1])
    assert result.testsRun == 1
    return Outcome(result="passed", text="")


# --- the tests ---

needs_tests = pytest.mark.skipif(not installed(), reason=f"{sys.executable} comes without {PACKAGE}")


class Process:
    """This file as a script. It takes tests as long as there are any."""

    def __init__(self, names: deque[str], outcomes: dict[str, Future[Outcome]]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._names = names
        self._outcomes = outcomes
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def close(self) -> None:
        self._process.kill()
        self._thread.join()
        self._process.__exit__(None, None, None)

    def _work(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        while self._names:
            name = self._names.popleft()
            print(name, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
            outcome: Outcome = json.loads(line) if line else Outcome(result="failed", text="its process ended")
            self._outcomes[name].set_result(outcome)


def applies(name: str) -> bool:
    return name not in EXCEPTIONS or sys.version_info >= APPLIES_FROM.get(name, NEVER)


def params() -> list[Any]:
    if not installed():
        return [pytest.param("", marks=needs_tests, id="not installed")]
    return [
        pytest.param(name, marks=() if applies(name) else pytest.mark.skip(reason=EXCEPTIONS[name])) for name in cases()
    ]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """What becomes of the tests that have been asked for."""
    items: list[Any] = request.session.items
    names = [item.callspec.params["name"] for item in items if "outcomes" in item.fixturenames]
    wanted = {name: Future[Outcome]() for name in names if name and applies(name)}
    queue = deque(sorted(wanted, key=lambda name: "timeout" not in name))  # the longest sleepers first
    processes = [Process(queue, wanted) for _ in range(min(PROCESSES, len(queue)))]
    yield wanted
    for process in processes:
        process.close()


@pytest.mark.parametrize("name", params())
def test_cpython(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """What CPython asks of its own thread pool."""
    outcome = outcomes[name].result(BOUND)
    if outcome["result"] == "skipped":
        pytest.skip(outcome["text"])
    assert outcome["result"] == "passed", outcome["text"]


def test_the_page_tells_what_does_not_apply() -> None:
    """Each test that is skipped, and the same reason."""
    rows = re.findall(r"^\| `(.+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == EXCEPTIONS


@needs_tests
def test_what_does_not_apply_is_there() -> None:
    """So that the list has no line too many; nor is a group of tests overlooked."""
    assert set(cases()) > set(EXCEPTIONS)
    assert {name.partition(".")[0] for name in cases()} >= {
        "ThreadPoolAsCompletedTest",
        "ThreadPoolExecutorTest",
        "ThreadPoolFailingInitializerTest",
        "ThreadPoolInitializerTest",
        "ThreadPoolShutdownTest",
        "ThreadPoolWaitTests",
    }


if __name__ == "__main__":
    serve()
