"""What all tests share: virtual time on request, a mock library kept alive, and nothing left behind.

Markers:
    virtual_clock: the test and its async fixtures run on `penstock.testing.VirtualClockLoop`.
    full: long; deselected unless asked for. `pytest -m "full or not full"` is the long form of the suite: it runs all,
        and tries more examples of each property.
    may_leave: what the test may leave behind, with a reason beside it: "tasks", "threads", "sockets", "errors".
"""

import asyncio
import faulthandler
import functools
import gc
import inspect
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import aiohttp
import aioresponses.core
import hypothesis
import pytest

from penstock.testing import VirtualClockLoop
from penstock.testing.task_location import locations
from penstock.threads.workers import Worker

# Seconds of real time for threads on their way out, and for the sockets in their hands. Arbitrary, because it is
# spent by failing tests only.
LEAVING_TIME = 1.0

T = TypeVar("T")

_test_failed = pytest.StashKey[bool]()

# What fixtures of a module or the session opened during a test, which it is not to answer for.
_wider_threads: set[threading.Thread] = set()
_wider_sockets: set[int] = set()


# The long form of the suite, and how many examples each form tries of a property.
LONG_FORM = "full or not full"
LONG_EXAMPLES = 4_000
SHORT_EXAMPLES = 60
LONG_TIMEOUT = 900.0
"""Seconds for a test of the long form, instead of `faulthandler_timeout`."""

# A busy machine is no failure of a property. The short form tries the same examples each time, so that it says
# something about the change that it is run for; the long form is for finding out more.
hypothesis.settings.register_profile("short", deadline=None, derandomize=True, max_examples=SHORT_EXAMPLES)
hypothesis.settings.register_profile("long", deadline=None, max_examples=LONG_EXAMPLES)


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("long" if config.option.markexpr == LONG_FORM else "short")
    for marker in (
        "virtual_clock: run the test and its async fixtures in virtual time",
        "full: long; deselected unless asked for with -m",
        "may_leave(*kinds): the test may leave behind 'tasks', 'threads', 'sockets' or 'errors'",
    ):
        config.addinivalue_line("markers", marker)


# --- virtual time ---


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """One factory for a test, so that it runs once and keeps its name."""
    if item.get_closest_marker("virtual_clock"):
        return {"virtual_clock": VirtualClockLoop}
    return {"asyncio": asyncio.new_event_loop}


# --- aioresponses ---


class _ClientResponse(aiohttp.ClientResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", SimpleNamespace(output_size=0))
        super().__init__(*args, **kwargs)


# aioresponses 0.7.9 builds a ClientResponse by hand and does not know this argument of aiohttp 3.14
# (pnuckowski/aioresponses #289).
if "stream_writer" in inspect.signature(aiohttp.ClientResponse.__init__).parameters:
    aioresponses.core.ClientResponse = _ClientResponse  # type: ignore[attr-defined]


# --- coverage, and time ---


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Trace nothing of a test that is marked `no_cover`, and give those of the long form the time that they need.

    In workers of pytest-xdist, pytest-cov goes on. The long form's thousands of examples may take minutes.
    """
    tracer = sys.gettrace()
    if item.get_closest_marker("no_cover"):
        sys.settrace(None)
    if item.config.option.markexpr == LONG_FORM:
        faulthandler.dump_traceback_later(LONG_TIMEOUT, exit=True, file=2)
    try:
        yield
    finally:
        sys.settrace(tracer)


# --- nothing left behind ---


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_test_failed] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Tell what a wider fixture opened from what the test did, and look for tasks before a loop's runner is closed.

    Tasks are looked for when the loop's async fixtures are torn down, and before its runner cancels what is left:
    finalizers run last in, first out; the runner's own was there before this one, the fixtures' come after it.
    """
    if fixturedef.scope == "function":
        result = yield
    else:
        threads, sockets = _our_threads(), _open_sockets()
        result = yield
        _wider_threads.update(_our_threads() - threads)
        _wider_sockets.update(_open_sockets() - sockets)
    if isinstance(result, asyncio.Runner):
        fixturedef.addfinalizer(functools.partial(_refuse_tasks, result.get_loop(), request.node))
    return result


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves threads, sockets, objects nobody closed, or errors nobody looked at.

    Not async, and so set up before the loop and torn down after it: what the loop closes at its end is gone by then.
    Objects that were not closed say so by a ResourceWarning when they are collected; as an error in a finalizer,
    pytest fails the test for it.
    """
    # What was there before cannot become this test's garbage: a collection then has next to nothing to look at.
    gc.freeze()
    threads, sockets = _our_threads(), _open_sockets()
    with _AsyncioErrors() as errors:
        yield
        gc.collect()
    gc.unfreeze()
    left_over = {
        "threads": _once_settled(lambda: _our_threads() - threads - _wider_threads),
        "sockets": _described(_once_settled(lambda: _open_sockets() - sockets - _wider_sockets)),
        "errors": errors.messages,
    }
    _refuse(request.node, left_over)


def _refuse_tasks(loop: asyncio.AbstractEventLoop, node: pytest.Item) -> None:
    if not loop.is_closed():
        _refuse(node, {"tasks": locations(asyncio.all_tasks(loop))})


def _refuse(node: pytest.Item, left_over: Mapping[str, object]) -> None:
    allowed = {kind for marker in node.iter_markers("may_leave") for kind in marker.args}
    problems = [f"{kind}:\n{found}" for kind, found in left_over.items() if found and kind not in allowed]
    # A test that failed half-way was not able to clean up: its own error is the one to read.
    if problems and _test_failed not in node.stash:
        pytest.fail("the test left behind " + "\n".join(problems), pytrace=False)


def _our_threads() -> set[threading.Thread]:
    """All threads that somebody should have ended. A daemon of a foreign library is not our affair.

    Nor is a worker that is idle: the process shares them.
    """
    return {
        thread
        for thread in threading.enumerate()
        if (not thread.daemon or thread.name.startswith("penstock"))
        and not (isinstance(thread, Worker) and thread.idle)
    }


def _open_sockets() -> set[int]:
    """The inodes of this process's sockets; nothing where there is no /proc."""
    inodes = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor with which the directory was listed
            continue
        if target.startswith("socket:["):
            inodes.add(int(target.removeprefix("socket:[").removesuffix("]")))
    return inodes


def _described(inodes: set[int]) -> list[str]:
    known = {
        os.fstat(found.fileno()).st_ino: repr(found)
        for found in (gc.get_objects() if inodes else ())
        if isinstance(found, socket.socket) and found.fileno() >= 0
    }
    return [known.get(inode, f"a socket without a Python object, inode {inode}") for inode in inodes]


def _once_settled(measure: Callable[[], set[T]]) -> set[T]:
    deadline = time.monotonic() + LEAVING_TIME
    while (left_over := measure()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left_over


class _AsyncioErrors(logging.Handler):
    """Collects what asyncio and concurrent.futures can only log, as an exception that nobody retrieved."""

    LOGGERS = (logging.getLogger("asyncio"), logging.getLogger("concurrent.futures"))

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))

    def __enter__(self) -> "_AsyncioErrors":
        for logger in self.LOGGERS:
            logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for logger in self.LOGGERS:
            logger.removeHandler(self)
